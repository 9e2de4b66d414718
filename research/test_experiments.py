"""test_experiments.py - the tests of exams that train what they compare, and of ablate-rgs."""
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
from conftest import rows_of, run, train_small
from engine import files
from research import experiments

pytestmark = pytest.mark.chain


@pytest.fixture
def experiment(overfitted, tmp_path, examined, monkeypatch):
    """experiment(name, flags) runs evaluate.py; experiment.trainings lists the flags of its trainings."""
    def command(name, *flags):
        folders = "--runs", tmp_path / "runs", "--cache", tmp_path / "cache", "--out", tmp_path / "out"
        size = "--train-shapes", 2, "--steps", 2, "--batch", 2, "--resolution", 32
        return run(evaluate.main, name, "--checkpoint", overfitted, *folders, *size, *flags)

    def launch(flags):
        command.trainings.append(flags)
        folder = Path(flags[flags.index("--out") + 1])
        with pytest.MonkeyPatch.context() as patch:
            assert train_small(patch, folder, 2, *flags) == 0

    command.trainings = []
    monkeypatch.setattr(experiments, "launch", launch)
    return command


def test_experiments_train_what_they_compare(experiment, overfitted, tmp_path, monkeypatch, capsys):
    """versus: a second run trains nothing, other settings are an error."""
    variants = {"few": ("", "steps", {"steps": 4}), "half": ("--variant queries", "FLOPs", {"steps": 2})}
    monkeypatch.setattr(experiments, "gigaflops", lambda checkpoint, variant: {"mae": 1, "queries": 2}[variant])
    monkeypatch.setitem(experiments.VARIANTS, "versus", variants)
    monkeypatch.setattr(experiments, "GUIDANCE", (1, 3))
    small = "--seeds", 1, "--n", 2, "--shapes", 4, "--scorer", overfitted
    assert experiment("versus", *small) == 0
    assert len(experiment.trainings) == 2
    rows = rows_of(tmp_path / "out/versus")
    assert [row["variant"] for row in rows] == ["held-out shapes", *variants]
    assert [row["steps"] for row in rows] == ["", "2", "1"]
    assert experiment("versus", *small) == 0
    assert len(experiment.trainings) == 2

    other = shutil.copytree(overfitted, tmp_path / "other")
    files.save_weights(other / "tokenizer.safetensors", {"x": torch.zeros(1)})
    entry = files.read_config(other)["tokenizer"]
    files.write_config(other, "tokenizer", signature=files.signature(other, "tokenizer", entry))
    for flags, complaint in (
            (("--steps", 3), "was trained with other flags, or with other weights"),
            (("--checkpoint", overfitted, overfitted), "versus takes one --checkpoint"),
            (("--checkpoint", other), "was trained with other flags, or with other weights")):
        assert experiment("versus", *small, *flags) == 2
        assert complaint in capsys.readouterr().err


def test_rules_of_rgs_are_compared(overfitted, tmp_path, examined, monkeypatch):
    """A rule that reaches everywhere is sampling only; a = 0 is not."""
    monkeypatch.setattr("research.rgs.WITHIN", (100,))
    flags = "--shapes 1 --n 2 --seeds 1 --resolution 32 --alphas 0 --windows".split()
    folders = "--checkpoint", overfitted, "--out", tmp_path
    assert run(evaluate.main, "ablate-rgs", *flags, *folders, "--scorer", overfitted) == 0
    real, plain, blended, wide = rows_of(tmp_path / "ablate-rgs")[:4]
    rules = [row["rule"] for row in (real, plain, blended, wide)]
    assert rules == ["(the shapes)", "sampling only", "a = 0", "within 100 sigma"]
    for key in ("prompt score", "Chamfer to described", "share of diversity less floor"):
        # the order of sums depends on the threads that are free, so the last digits may differ
        assert float(wide[key]) == pytest.approx(float(plain[key]), rel=2e-3)
    assert float(plain["share of diversity less floor"]) == 1
    assert blended["Chamfer to described"] != plain["Chamfer to described"]
