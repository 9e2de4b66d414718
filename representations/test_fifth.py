"""test_fifth.py - a fifth representation is one file, course/blocks.py, and one line.

    python -m pytest -q representations
"""
import csv
import shutil

import trimesh

import evaluate
import sample
from conftest import run, train_small
from course.blocks import BlockHead
from engine.files import read_config
from geometry import surface
from representations import REPRESENTATIONS


def test_a_fifth_representation_is_one_file_and_one_line(overfitted, examined, tmp_path, monkeypatch):
    """It is trained on frozen tokens, sampled, shown on a page, and judged on held-out shapes; no other file knows it.
    A sample has many sides, which look outward; a decoded shape has many blocks."""
    monkeypatch.setitem(REPRESENTATIONS, "blocks", BlockHead)                     # the line

    folder = shutil.copytree(overfitted, tmp_path / "run")
    monkeypatch.setattr(surface, "COARSE", 8)
    flags = "--rep", "blocks", "--stage", "head", "--steps", 60, "--batch", 2, "--lr", 6e-3
    with monkeypatch.context() as patch:
        assert train_small(patch, folder, 2, *flags, watched=True) == 0
    assert (folder / "head-blocks-000060.png").is_file()
    assert read_config(folder)["head-blocks"]["metrics"]["IoU"] > .5

    out = tmp_path / "out"
    flags = "--text", "a table", "--checkpoint", folder, "--rep", "blocks", "--html", "--out", out
    assert run(sample.main, *flags) == 0
    mesh = trimesh.load(out / "a-table-0-blocks.glb", force="mesh")
    assert len(mesh.faces) > 500 and mesh.volume > 0
    assert '"rep": "blocks"' in (out / "a-table.html").read_text()

    flags = "--checkpoint", folder, "--rep", "blocks", "--shapes", 2, "--out", out
    assert run(evaluate.main, "tokenizer", *flags) == 0
    rows = list(csv.DictReader((out / "tokenizer-blocks.csv").open()))
    assert {"IoU", "blocks"} <= rows[0].keys() and float(rows[0]["blocks"]) > 100
