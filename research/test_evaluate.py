"""test_evaluate.py - the tests of evaluate.py, of research/bench.py and of research/gpu.py."""
import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

import evaluate
import sample
from conftest import SMALL, TrueHead, assert_one_line, rows_of, run
from engine.commands import UserError
from geometry import shapes, surface
from representations.sdf import grid_iou
from research import bench, exam, gpu, gpu_checks

# ---------------------------------------------------------------------------- bench.py

@pytest.mark.chain
@pytest.mark.parametrize("command", ["sample --size small", "train --size small", "decode --shapes 1 --resolutions 64",
                                     "busy"])
def test_benches(command, tmp_path, monkeypatch):
    """Each compares at least two ways, the first with itself; the refined mesh is the dense one."""
    for module, size in SMALL.items():
        monkeypatch.setitem(module.SIZES, "small", size)
    for name, value in {"PUBLISHED": (4, 4), "SAMPLED": (1, 2), "TRAINED": 4, "SAMPLE": ["--help"], "BUSY": ""}.items():
        monkeypatch.setattr(bench, name, value)
    name, *flags = command.split()
    assert run(bench.main, name, *flags, "--rounds", 1, "--out", tmp_path) == 0
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
    assert len({row["way"] for row in rows}) >= 2
    assert float(rows[0]["times as fast"]) == 1
    assert all(float(row.get("same mesh", 1)) == 1 for row in rows)


@pytest.mark.chain
def test_the_bench_of_a_gpu_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    """A part that fails is named at the end, after the others. Training: from the log of train.py."""
    for module, size in SMALL.items():
        monkeypatch.setitem(module.SIZES, "small", size)

    def run_train(flags):
        folder = Path(flags[flags.index("--out") + 1])
        folder.mkdir(exist_ok=True)
        (folder / "backbone.csv").write_text("step,seconds\n100,10\n200,15\n300,20\n")
        return 2 ** 31
    monkeypatch.setattr(gpu, "run_train", run_train)
    monkeypatch.setattr(gpu, "apart", lambda function, *args: function(*args))
    monkeypatch.setattr(gpu, "SAMPLED", (1, 2))
    monkeypatch.setattr(bench, "PUBLISHED", (2, 2))
    flags = "--device", "cpu", "--sizes", "small", "--batch", 2, "--count", 1, "--cache", os.environ["CACHE"]
    parts = "peak", "attention", "train", "decode", "sample"
    assert run(gpu.main, *flags, "--parts", *parts, "--out", tmp_path) == 2
    assert "not measured: decode" in capsys.readouterr().err
    rows = {row["what"]: float(row["value"]) for row in csv.DictReader((tmp_path / "gpu.csv").open())}
    assert rows["train small, eager: ms a step of 2"] == 50
    assert rows["train small, compiled: seconds of 100 steps, compiling included"] == 10
    assert rows["train small, eager: GiB reserved"] == 2
    assert rows["sample small: published over ours, 2 at once"] > 0
    assert any(name.endswith("math: ms") for name in rows)


def test_checks_of_a_gpu_are_a_line_each(tmp_path, monkeypatch, capsys):
    """All are made, each in its own process; exit status 1 if one fails."""
    monkeypatch.setattr(gpu_checks, "CHECKS", {"bad": len, "versions": gpu_checks.check_versions})
    flags = "--quick", "--device", "cpu", "--out", tmp_path
    for parts, status, verdicts in ((("bad", "versions"), 1, ["FAIL bad: TypeError: object of", "PASS versions: cpu"]),
                                    (("versions",), 0, ["PASS versions: cpu, torch"])):
        assert run(gpu.main, *flags, "--parts", *parts) == status
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(verdicts) and all(map(str.startswith, lines, verdicts))
    assert run(gpu.main, "--parts", "bad") == run(gpu.main, "--quick", "--parts", "peak") == 2


@pytest.mark.parametrize("loss, complaint", [(1.01, None), (1.2, "backbone, loss after 5 steps: 1.0 eager, 1.2 comp"),
                                             (np.nan, "nan compiled"), (None, "stages backbone eager,  compiled")])
def test_losses_of_two_logs_are_compared(loss, complaint, tmp_path):
    for way, value in (("eager", 1.), ("compiled", loss)):
        (tmp_path / way).mkdir()
        if value:
            (tmp_path / way / "backbone.csv").write_text(f"step,loss,held_out\n5,{value},2.0\n")
    folders = {way: tmp_path / way for way in ("eager", "compiled")}
    if complaint is None:
        assert gpu_checks.compared(folders) == "losses of 1 stages agree to 0.01"
    else:
        with pytest.raises(UserError, match=complaint):
            gpu_checks.compared(folders)


@pytest.mark.chain
def test_the_checks_of_a_gpu_pass_on_a_cpu(tmp_path, capsys):
    """LoST's stages stand for those of the other models."""
    flags = "--quick", "--device", "cpu", "--out", tmp_path, "--cache", os.environ["CACHE"]
    assert run(gpu.main, *flags, "--parts", "attention", "sample", "memory", "lost") == 0
    assert "lost: losses of 3 stages agree to 0" in capsys.readouterr().out


def test_iou_of_the_true_field_is_one():
    """grid_iou is 1 for a shape and itself, and between 0 and 1 for two tables."""
    table, other_table = shapes.make(0, 0), shapes.make(0, 13)
    head = TrueHead(table)
    assert grid_iou(head, torch.zeros(1, 1), table, torch.no_grad, 32) == 1
    assert 0 < grid_iou(head, torch.zeros(1, 1), other_table, torch.no_grad, 32) < .9


# ---------------------------------------------------------------------------- evaluate.py

BLACK = lambda *_: np.zeros((8, 8, 3), np.uint8)              # for pictures that another test looks at


@pytest.mark.parametrize("command, table", [
    ("tokenizer --rep pc --shapes 1", "tokenizer-pc"), ("retrieval", "retrieval"),
    pytest.param("cross-view --shapes 1 --resolution 32", "cross-view-sdf", marks=pytest.mark.chain)])
def test_evaluations_write_their_tables(command, table, four, tmp_path, examined):
    assert run(evaluate.main, *command.split(), "--checkpoint", four, "--out", tmp_path) == 0
    assert rows_of(tmp_path / table)


@pytest.mark.chain
def test_prompts_of_all_kinds_are_compared(four, tmp_path, examined, monkeypatch):
    """images: samples are not as near to the true surface as another sampling of it, nor anywhere else."""
    monkeypatch.setattr("research.crisp.POINTS", 20_000)
    assert run(evaluate.main, *"images --shapes 2 --resolution 32 --checkpoint".split(), four, "--out", tmp_path) == 0
    rows = rows_of(tmp_path / "images-sdf")
    assert [row["prompt"] for row in rows][:2] == ["(its reconstruction)", "name"] and len(rows) == 6
    assert all(float(row["its floor"]) < float(row["Chamfer"]) < 1.5 for row in rows)
    assert (tmp_path / f"images-sdf-{four.name}.png").is_file()


@pytest.mark.chain
def test_samples_of_names_are_measured(overfitted, tmp_path, monkeypatch, capsys):
    """First without the check that these weights learnt from these files, then with it."""
    kit = tmp_path / "some kit"
    kit.mkdir()
    for i, name in enumerate(("table", "chair", "mug", "sofa")):                  # two of them are held out
        box = trimesh.creation.box((1, 1, 2 + i))
        box.visual.vertex_colors = 200, 50, 50, 255
        box.export(kit / f"{name}.glb")
    flags = "--data", kit, "--cache", tmp_path / "cache", "--out", tmp_path, "--checkpoint", overfitted
    flags += "--resolution", 32
    with monkeypatch.context() as patch:
        patch.setattr("research.names.training_set_of", lambda folder, args: None)
        patch.setattr("research.crisp.POINTS", 2000)
        patch.setattr(exam, "picture_of", BLACK)
        patch.setattr(surface, "COARSE", 8)
        assert run(evaluate.main, "names", *flags) == 0
        assert run(evaluate.main, "names", *flags, "--words", "table") == 0
        assert run(evaluate.main, "names", *flags, "--rep", "mesh", "--faces", 50) == 0
    assert float(rows_of(tmp_path / "names-sdf")[0]["memorisation"]) > 0
    for row in rows_of(tmp_path / "names-mesh"):              # reconstructions, samples
        assert float(row["its floor"]) < float(row["Chamfer"]) and float(row["closed edges"]) > .5
    assert (tmp_path / "names-sdf-overfitted.png").is_file() and (tmp_path / "words-sdf-overfitted.png").is_file()
    assert run(evaluate.main, "names", *flags) == 2
    assert_one_line(capsys.readouterr().err.splitlines()[-1], "give the --data that it was trained on")


@pytest.fixture
def generate(overfitted, tmp_path, examined, monkeypatch):
    """generate(out, flags) runs evaluate.py; generate.decoded counts the shapes, generate.stop is where it stops."""
    decode = sample.Sampler.decode

    def command(out, *flags):
        command.decoded = 0
        flags = "--scorer", overfitted, "--checkpoint", overfitted, *flags, "--out", tmp_path / out
        return run(evaluate.main, *"generate --n 2 --shapes 4 --resolution 32".split(), *flags)

    def counted(self, *args, **faces):
        command.decoded += 1
        if command.decoded == command.stop:
            raise KeyboardInterrupt
        return decode(self, *args, **faces)

    command.stop = None
    monkeypatch.setattr(exam, "picture_of", BLACK)
    monkeypatch.setattr(sample.Sampler, "decode", counted)
    return command


@pytest.mark.chain
def test_a_stopped_evaluation_resumes(generate, four, tmp_path, monkeypatch, capsys):
    """Stopped at a sample, it samples only the others, and its table is that of a run that was not stopped. Another
    checkpoint is added; a damaged file is an error; with another seed or other code all are sampled anew."""
    assert generate("whole") == 0
    assert generate.decoded == 4 + 2 * 2                                          # four captions, twice two names
    generate.stop = 6
    assert generate("cut") == 130
    generate.stop = None
    assert generate("cut", four) == 0
    assert generate.decoded == 3 + 8
    assert {4 * float(row["complete"]) for row in rows_of(tmp_path / "whole/generate-sdf-names")} <= {0, 1, 2, 3, 4}
    whole, cut = (rows_of(tmp_path / out / "generate-sdf") for out in ("whole", "cut"))
    assert [row["checkpoint"] for row in cut] == ["held-out shapes", "overfitted", "four"]
    for key in set(whole[1]) - {"checkpoint", "seconds"}:
        # the samples that were left are a smaller batch, whose sums have another order: the last digits may differ
        for one, other in zip(cut, whole):
            assert float(one[key] or 0) == pytest.approx(float(other[key] or 0), rel=1e-3)
    assert float(whole[0]["of form"]) == pytest.approx(float(whole[0]["prompt score"]), abs=1e-3)

    generate.stop = 1                                         # it samples
    assert generate("whole", "--seed", 1) == 130
    with monkeypatch.context() as patch:
        patch.setattr(exam, "code_digest", lambda: "other")
        assert generate("whole") == 130
    for path in (tmp_path / "whole/generate").glob("*/caption-0.npz"):
        path.write_bytes(b"torn")
    assert generate("whole") == 2
    assert "caption-0.npz is damaged" in capsys.readouterr().err
