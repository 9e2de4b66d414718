"""test_commands.py - the tests of sample.py, of the shipped weights, and of the README's commands.

    python -m pytest -q test_commands.py
"""
import functools
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

import data
import sample
import tokenizer
from conftest import HERE, assert_one_line, run, same_files
from engine import files
from engine.commands import UserError, pick_device
from geometry import export, metrics
from geometry.surface import field_of
from heads import load as load_heads
from prompts.scores import prompt_scores
from representations.sdf import grid_iou
from research import attributes

# ---------------------------------------------------------------------------- the shipped weights

def test_the_text_decides_the_colour_beside_a_picture():
    """The picture shows a green chair; with the words "a red chair", most samples are red chairs."""
    model = sample.load().load_heads("sdf")
    tokens = model.sample("a red chair", "assets/chair.png", 4)                   # b n c
    shapes = [attributes.measure_shape(field_of(model.heads["sdf"], x, model.autocast)) for x in tokens]
    assert sum(attributes.has_attribute(shape, "colour", attributes.colour(), "red") for shape in shapes) >= 3


def test_a_mesh_has_as_many_faces_as_asked():
    """With `faces`, the surface is simplified: closed, and never more faces. A surface has 19,000 by default."""
    model = sample.load()
    tokens = model.sample("a chair")[0]
    mesh = model.decode(tokens, "mesh", 0, 64, faces=300)
    assert 200 < len(mesh.faces) <= 300 and mesh.soundness()["closed edges"] > .98
    few = model.decode(tokens, "sdf", 0, 64, faces=1000)
    most = model.decode(tokens)
    assert 900 < len(few.faces) <= 1000 and 18_000 < len(most.faces) <= 19_000
    assert all(metrics.watertight(mesh.faces) for mesh in (few, most))


def test_the_sdf_head_brings_points_to_its_surface():
    """With it, points are at most half as far from its surface."""
    model = sample.load().load_heads("pc")
    tokens, head = model.sample("a chair")[0], model.heads["pc"]
    field, distances = field_of(model.heads["sdf"], tokens, model.autocast), []
    for heads in (model.heads, {"pc": head}):
        cloud = head.decode(tokens, heads, np.random.default_rng(0), model.autocast, points=512)
        distances.append(field(torch.from_numpy(cloud.points))[:, 0].abs().mean())
    assert distances[0] < distances[1] / 2


# ---------------------------------------------------------------------------- sample

@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_overrides_the_default(precision, dtype, monkeypatch):
    """--precision overrides what the processor has, and sample.py computes in it. torch 2.10 cannot tell: fp32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": precision == "fp32"})
    for name, expected in ((precision, precision == "bf16"), (None, precision == "fp32")):
        device, autocast, _ = pick_device("cpu", precision=name)
        with autocast():
            assert torch.is_autocast_enabled(device.type) == expected
    model = sample.load(device="cpu", precision=precision)
    assert model.backbone.token.weight.dtype == dtype
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert "fp32" in pick_device("cpu")[2]


@pytest.mark.parametrize("options, complaint", [
    (dict(prompt=None), "there is no prompt"), (dict(prompt=["a table"]), "one string, not a list"),
    (dict(rep="obj"), "sdf, pc, mesh, gs"), (dict(rep=["sdf"]), "sdf, pc, mesh, gs"), (dict(seed=-1), "seed is a"),
    (dict(seed="a"), "seed is a"), (dict(cfg=-3), "cfg is a number from 0 to 100"), (dict(points=9), "pc and gs"),
    (dict(rep="gs", faces=100), "sdf and mesh"), (dict(n=None), "n is a whole"), (dict(n=0), "n is a whole"),
    (dict(resolution=96), "32, 64, 128, 256, 512"),
    (dict(steps=65), "shape tokens"), (dict(rgs="sampled"), "RGS takes"), (dict(rgs="sampled=5"), "from 0 to 1")])
def test_python_api_names_a_wrong_argument(overfitted, options, complaint):
    with pytest.raises(UserError, match=complaint):
        sample.load(overfitted, device="cpu").generate(**dict(prompt="a table", steps=1) | options)


def test_same_seed_same_bytes(overfitted, tmp_path):
    """The command twice = the same files; the Python API = the command; another seed is another mesh."""
    flags = "--text", "a table", "--checkpoint", overfitted, "--resolution", 32, "--n", 2
    for out, seed in (("one", 5), ("two", 5), ("other", 6)):
        assert run(sample.main, *flags, "--seed", seed, "--out", tmp_path / out) == 0
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"a-table-0.glb", "a-table-0.png", "a-table-1.glb", "a-table-1.png", "a-table.png"}
    assert same_files(tmp_path / "one", tmp_path / "two")
    for i, mesh in enumerate(sample.load(overfitted).generate("a table", rep="sdf", n=2, seed=5, resolution=32)):
        mesh.save(tmp_path / "api.glb")
        content = (tmp_path / "api.glb").read_bytes()
        assert content == (tmp_path / "one" / f"a-table-{i}.glb").read_bytes()
        assert content != (tmp_path / "other" / f"a-table-{i}.glb").read_bytes()
        assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight


def test_a_head_in_training_is_half_trained(overfitted, tmp_path):
    files.write_config(tmp_path, "tokenizer", **files.read_config(overfitted)["tokenizer"] | {"heads": []})
    with pytest.raises(UserError, match="has no head for pc"):
        load_heads(tmp_path, ["pc"])
    (tmp_path / "head-pc.state.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="head-pc in .* is half trained; repeat the train.py command"):
        load_heads(tmp_path, ["pc"])


@pytest.mark.parametrize("name, damage, complaint", [
    ("backbone.safetensors", lambda content: content[:len(content) // 2], "is damaged"),
    ("head-sdf.safetensors", lambda content: pickle.dumps([1]), "no safetensors"),
    ("tokenizer.safetensors", lambda content: content + b"0", "is damaged"),
    ("reconstruct.safetensors", None, "no file"),
    ("config.json", lambda content: content[:100], "not readable JSON"),
    ("config.json", lambda content: b"{}", "holds no trained backbone"),
    ("config.json", lambda content: content.replace(b'"dim": 64', b'"dim": 128'), "was edited"),
    ("config.json", lambda content: content.replace(b'"signature"', b'"sign"'), "has no 'signature'"),
    ("config.json", lambda content: content.replace(b'"flags"', b'"sampling": {"steps": "x"}, "flags"'), "sampling"),
    ("config.json", lambda content: content.replace(b'"flags"', b'"sampling": {"haste": 1}, "flags"'), "no haste")])
def test_damaged_checkpoint_is_one_line(overfitted, name, damage, complaint, tmp_path, capsys):
    """Truncated, foreign, missing, exchanged and other-sized files of a checkpoint are named."""
    folder = shutil.copytree(overfitted, tmp_path / "checkpoint")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage:
        (folder / name).write_bytes(damage(content))
    flags = "--text", "a table", "--rgs", "sampled=.1", "--checkpoint", folder, "--out", tmp_path / "out"
    assert run(sample.main, *flags) == 2
    assert_one_line(capsys.readouterr().err, complaint)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_stores_its_sampling_options(overfitted, tmp_path):
    """Options in config.json are the defaults of a checkpoint; explicit options override them."""
    folder = shutil.copytree(overfitted, tmp_path / "checkpoint")
    files.write_config(folder, "backbone", sampling={"steps": 2, "temperature": 0.})
    plain, remembering = (sample.load(path, precision="fp32") for path in (overfitted, folder))
    tokens = remembering.tokens(["a table"], [0])
    assert torch.equal(tokens, plain.tokens(["a table"], [0], steps=2, temperature=0.))
    explicit = remembering.tokens(["a table"], [0], steps=10, temperature=1.)
    assert torch.equal(explicit, plain.tokens(["a table"], [0]))
    assert not torch.equal(explicit, tokens)


@pytest.mark.parametrize("prompt, image, best, gain", [
    ("a red chair", None, 2, .01), pytest.param(None, "assets/chair.png", 4, 0, marks=pytest.mark.chain)])
def test_the_best_candidates_score_higher(prompt, image, best, gain):
    """Candidate 0 of sample i is sample i, the others come after all samples. Texts need no image tower."""
    model = sample.load()
    if image is None:
        del model.encoders.towers["image"]
    pictures = model.prompted(prompt, image, [(0, 0)])[0][2]
    plain, chosen = (model.best_samples(prompt, image, 2, 0, count) for count in (1, best))
    assert plain[1] == [(0, 0), (0, 1)] and [seed % 10_000 for _, seed in chosen[1]] == [0, 1]
    scores = [prompt_scores(model, prompt, pictures, tokens) for tokens, _ in (plain, chosen)]
    assert (scores[1] > scores[0] - .01).all() and scores[1].mean() > scores[0].mean() + gain


def test_a_file_of_prompts(overfitted, tmp_path, capsys):
    """Each line is as --text; empty lines and copies are left out. A file that cannot be used is one line."""
    flags = "--checkpoint", overfitted, "--resolution", 32, "--out", tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("a table\n\na chair\na table\n")
    assert run(sample.main, "--prompts", tmp_path / "prompts.txt", *flags) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.glb")} == {"a-table-0.glb", "a-chair-0.glb"}
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "alike.txt").write_text("a chair\na chair!\n")
    (tmp_path / "wrong.txt").write_text("a chair\na mug\n")
    for name, complaint in (("empty.txt", "has no prompt"), ("none.txt", "cannot be read"), ("wrong.txt", "'mug'"),
                            ("alike.txt", "the same file names")):
        capsys.readouterr()
        assert run(sample.main, "--prompts", tmp_path / name, *flags) == 2
        assert_one_line(capsys.readouterr().err, complaint)


def test_without_flags_it_says_what_can_be_made(capsys):
    assert run(sample.main) == 0
    shown = capsys.readouterr().out
    assert "chair" in shown and len(re.findall("^    python sample.py --", shown, re.M)) == 3


def test_a_name_of_the_hub_is_a_checkpoint(overfitted, tmp_path, monkeypatch, capsys):
    """From the hub's cache. A name that is not there, without a network, is one line."""
    folder = tmp_path / "models--someone--toys"
    shutil.copytree(overfitted, folder / "snapshots" / ("a" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(*(sample.load(name).sample("a table") for name in ("someone/toys", overfitted)))
    assert run(sample.main, "--text", "a table", "--checkpoint", "someone/else", "--out", tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, "Hugging Face hub")


def test_shipped_weights_are_as_good_as_they_were(prepared):
    """One held-out shape of each class is reconstructed, and one sample of each class name is recognised by the cloud
    tower. Both are floors, well below the README's figures."""
    model, split, rows = sample.load(), prepared[1], np.arange(13)
    model.load_heads("sdf")
    encoder, names = tokenizer.load("checkpoints/tiny"), [split.classes[row] for row in rows]
    with torch.no_grad():
        tokens = encoder(*split.cloud(rows, encoder.points, data.seeded(0)))
    ious = [grid_iou(model.heads["sdf"], x, split.shape(row), model.autocast, 32) for row, x in zip(rows, tokens)]
    assert np.mean(ious) > .95

    rng, tower = np.random.default_rng(0), model.encoders.towers["text"]
    shapes = [model.decode(x, resolution=32) for x in model.tokens(names, [(0, int(row)) for row in rows])]
    clouds = [torch.from_numpy(np.stack(x)).float() for x in zip(*(shape.surface(512, rng) for shape in shapes))]
    with torch.no_grad():
        likeness = tower.embed_cloud(*clouds) @ tower.embed_text(*tower.word_ids(names)).T            # cloud, name
    assert (likeness.argmax(1).numpy() == rows).sum() >= 12


@pytest.mark.parametrize("folder", sorted((HERE / "checkpoints").iterdir()), ids=lambda path: path.name)
def test_a_checkpoint_has_a_model_card(folder):
    """Licence, data, figures, limits."""
    card = (folder / "README.md").read_text()
    assert all(text in card for text in ("license: mit", "**Data.**", "**Figures.**", "**Limits.**"))
    assert all((folder / link).exists() for link in re.findall(r"\]\((?!https?:)([^)]+)\)", card))


NO_SURFACE = export.Mesh(np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3)))


def test_empty_surface_is_one_line(overfitted, tmp_path, monkeypatch, capsys):
    """A sample without a surface is an error, not a traceback."""
    monkeypatch.setattr(sample.Sampler, "decode", lambda *_, **counts: NO_SURFACE)
    assert run(sample.main, "--text", "a table", "--checkpoint", overfitted, "--out", tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, "empty")


@pytest.mark.parametrize("flat, tests", [(True, {"closed edges"}), (False, {"one piece", "watertight"})])
def test_an_empty_surface_fails_the_tests_of_its_kind(flat, tests):
    """evaluate.py's tables need the same tests of every sample."""
    found = NO_SURFACE.simplified(300, flat).soundness()
    assert found.keys() == tests and not any(found.values())


def test_a_closed_pipe_ends_a_command_silently():
    """As in `python -m prompts.reading | head -1`."""
    end, pipe = os.pipe()
    os.close(end)
    done = subprocess.run([sys.executable, "-m", "prompts.reading"], stdout=pipe, stderr=subprocess.PIPE, cwd=HERE)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (0, b"")


# ---------------------------------------------------------------------------- README

README = (HERE / "README.md").read_text()


def readme_command(script):
    """The README's first command that calls this script, as a list; the installation before it is left out."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S)
    lines = [line.split("&&")[-1].strip() for block in blocks for line in block.splitlines()]
    return shlex.split(next(line for line in lines if line.startswith(f"python {script}")), comments=True)


@pytest.fixture
def fresh_copy(tmp_path):
    """A copy of the code with the shipped weights -> what runs a command in it."""
    for path in (HERE / "README.md", HERE / "pyproject.toml", *HERE.glob("*.py"), *HERE.glob("[a-z]*/*.py"),
                 HERE / "geometry" / "page.html"):
        copied = tmp_path / path.relative_to(HERE)
        copied.parent.mkdir(exist_ok=True)
        shutil.copy(path, copied)
    (tmp_path / "checkpoints").symlink_to(HERE / "checkpoints")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return functools.partial(subprocess.run, cwd=tmp_path, env=env, capture_output=True, text=True)


def test_readme_sample_command_runs_as_written(fresh_copy, tmp_path):
    done = fresh_copy(readme_command("sample.py"))
    assert done.returncode == 0, done.stderr
    paths = [tmp_path / line for line in done.stdout.splitlines() if re.fullmatch(r"\S+\.(glb|ply|png|gif)", line)]
    assert paths and all(path.is_file() for path in paths)


COUNT = r"(\| \[\S+\]\((\S+)\) \| )\d+ \|"               # in a row of a file map
COUNTED = "README.md", "CONTRIBUTING.md"


def count_lines(name):
    """Lines of a file, or of a folder's *.py without tests."""
    path = HERE / name
    paths = [p for p in path.glob("*.py") if not p.name.startswith("test_")] if path.is_dir() else [path]
    return sum(len(p.read_text().splitlines()) for p in paths)


def counted(text):
    """The README with the true numbers of lines. `python test_commands.py` writes it."""
    text = re.sub(COUNT, lambda m: f"{m[1]}{count_lines(m[2])} |", text)
    method = sum(map(count_lines, ("prefix.py", "backbone.py", "reconstruct.py")))
    return re.sub(r"three files, \d+ lines", f"three files, {method} lines", text)


@pytest.mark.parametrize("name", COUNTED)
def test_lines_of_files_are_counted(name):
    text = (HERE / name).read_text()
    changed = {*counted(text).splitlines()} - {*text.splitlines()}
    assert len(re.findall(COUNT, text)) > 7
    assert not changed, f"these lines of {name} have changed; `python test_commands.py` writes them"


def test_readme_has_no_git_hash():
    assert not re.search(r"\b(?=[0-9a-f]*\d)(?=\d*[a-f])[0-9a-f]{7,40}\b", README)


def test_links_of_readme_and_docs_exist():
    for path in (HERE / "README.md", *(HERE / "docs").glob("*.md")):
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text())
        assert [link for link in links if not (path.parent / link).exists()] == []


def test_readme_names_packages_for_another_torch():
    """All that requirements.txt pins, but torch and transformers; no lower bound is above its pin."""
    lowest = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', re.search(r"^pip install \"numpy.*$", README, re.M)[0]))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (HERE / "requirements.txt").read_text(), re.M))
    assert lowest.keys() == pins.keys() - {"torch", "transformers"}
    assert all([*map(int, lowest[name].split("."))] <= [*map(int, pins[name].split("."))] for name in lowest)


if __name__ == "__main__":
    for name in COUNTED:
        (HERE / name).write_text(counted((HERE / name).read_text()))
