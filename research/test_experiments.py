"""test_experiments.py - the tests of exams that train what they compare, and of ablate-rgs."""
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import lost
import vat
from conftest import rows_of, run, train_small
from engine import files
from evaluation import exam, experiments, scales


@pytest.fixture
def experiment(overfitted, tmp_path, examined, monkeypatch):
    """experiment(name, flags) runs evaluate.py; experiment.trainings lists the flags of its trainings."""
    def command(name, *flags):
        folders = "--runs", tmp_path / "runs", "--cache", tmp_path / "cache", "--out", tmp_path / "out"
        size = "--train-shapes", 2, "--steps", 2, "--batch", 2, *["--resolution", 32] * (name != "ablate-rida")
        return run(evaluate.main, name, "--checkpoint", overfitted, *folders, *size, *flags)

    def launch(flags):
        command.trainings.append(flags)
        folder = Path(flags[flags.index("--out") + 1])
        with pytest.MonkeyPatch.context() as patch:
            return train_small(patch, folder, 2, *flags)

    command.trainings = []
    monkeypatch.setattr(experiments, "launch", launch)
    return command


def test_experiments_train_what_they_compare(experiment, overfitted, tmp_path, monkeypatch, capsys):
    """versus: two variants share a training, a second run trains nothing, other settings are an error."""
    variants = {"LTM3D": ("", {}), "fewer steps": ("", {"steps": 8}), "pooled": ("--variant pooled", {})}
    monkeypatch.setitem(experiments.VARIANTS, "versus", ("", variants))
    small = "--seeds", 1, "--n", 2, "--shapes", 4, "--scorer", overfitted, "--guidance", 1, 3
    assert experiment("versus", *small) == 0
    assert len(experiment.trainings) == 2
    assert [row["variant"] for row in rows_of(tmp_path / "out/versus")] == ["held-out shapes", *variants]
    settings, *_ = (tmp_path / "out").glob("guidance*/*/settings.json")
    assert json.loads(settings.read_text())["split"] == "validation"
    assert (tmp_path / "out/versus-losses.png").is_file()
    assert experiment("versus", *small) == 0
    assert len(experiment.trainings) == 2

    other = shutil.copytree(overfitted, tmp_path / "other")
    files.save_weights(other / "tokenizer.safetensors", {"x": torch.zeros(1)})
    for flags, complaint in (
            (("--steps", 3), "was trained with --train-shapes 2 --steps 2 --batch 2; give these flags"),
            (("--checkpoint", overfitted, overfitted), "versus takes one --checkpoint"),
            (("--checkpoint", other), "was trained with another tokenizer than that in"),
            (("--only", "pooled", "dinner"), "has no variant dinner, but LTM3D; fewer steps; pooled"),
            (("--scorer", "none.py"), "gives no features")):
        assert experiment("versus", *small, *flags) == 2
        assert complaint in capsys.readouterr().err


def test_other_towers_are_shown_pictures(experiment, overfitted, tmp_path, monkeypatch):
    """ablate-encoder: another text tower has no reconstructor, and is compared by pictures all the same."""
    variants = {"built-in towers": ("", {}), "bag": ("--text-encoder bag", {})}
    monkeypatch.setitem(experiments.VARIANTS, "ablate-encoder", ("", variants))
    assert experiment("ablate-encoder", "--seeds", 1, "--n", 2, "--shapes", 4, "--scorer", overfitted,
                      "--guidance", 1) == 0
    _, built_in, bag = rows_of(tmp_path / "out/ablate-encoder")
    assert float(bag["Chamfer to shown"]) > 0 < float(built_in["Chamfer to shown"])


def test_overfit_compares_every_shape_with_its_own(experiment, tmp_path):
    assert experiment("overfit") == 0
    *rows, mean = rows_of(tmp_path / "out/overfit")
    assert len(rows) == 8
    assert all(float(row["its floor"]) < float(row["Chamfer"]) for row in rows)
    assert float(mean["nearest is its own"]) == np.mean([float(row["nearest is its own"]) for row in rows])
    assert (tmp_path / "out/overfit-shapes.png").is_file()


FAKE_TRAINING = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
try:
    (folder / "begun").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    (folder / "saved").touch()
    sys.exit(130)
"""


def test_a_stopped_experiment_lets_training_save(tmp_path, monkeypatch):
    """Ctrl-C while a variant is trained: the training has the seconds that it takes to save."""
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/peers.py").write_text(FAKE_TRAINING)
    monkeypatch.setattr(exam, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)

    def stop():
        for _ in range(400):                                                      # 20 seconds at most
            if (tmp_path / "begun").exists():
                break
            time.sleep(.05)
        os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(stop)
        assert experiments.launch([str(tmp_path)]) == 130
    assert (tmp_path / "saved").is_file()


def test_training_is_launched_from_any_folder(tmp_path, monkeypatch, capfd):
    """A user's relative folders keep their meaning: training runs in the user's folder, not in ours."""
    monkeypatch.chdir(tmp_path)
    assert experiments.launch(["--variant", "none"]) == 2
    assert "invalid choice: 'none'" in capfd.readouterr().err


def test_rules_of_rgs_are_compared(overfitted, tmp_path, examined, monkeypatch):
    """A rule that reaches everywhere is sampling only; a = 0 is not."""
    flags = "--shapes 2 --n 2 --seeds 2 --resolution 32 --alphas 0 --windows --within 100 --prompts name".split()
    folders = "--checkpoint", overfitted, "--scorer", overfitted, "--out", tmp_path
    assert run(evaluate.main, "ablate-rgs", *flags, *folders) == 0
    real, plain, blended, wide = rows_of(tmp_path / "ablate-rgs")
    rules = [row["rule"] for row in (real, plain, blended, wide)]
    assert rules == ["(the shapes themselves)", "sampling only", "a = 0", "within 100 sigma"]
    for key in ("prompt score", "Chamfer to described", "share of diversity", "share of diversity less floor"):
        # the order of sums depends on the threads that are free, so the last digits may differ
        assert float(wide[key]) == pytest.approx(float(plain[key]), rel=1e-4)
    assert (blended["a, figure"], blended["a, text"], blended["window"]) == ("0", "1", "0.75")
    assert float(plain["share of diversity"]) == 1
    assert blended["Chamfer to described"] != plain["Chamfer to described"]


def test_variants_of_vat_are_trained_and_compared(experiment, overfitted, tmp_path, monkeypatch):
    """ablate-vat: one shares the first phase of training, another does not; the first alone has a generator."""
    small = dict(side=4, channels=8, codes=64, scales="1 2 3 4", features=6, dim=64, heads=4, depth=1)
    monkeypatch.setitem(vat.SIZES, "small", small)
    monkeypatch.setitem(vat.GENERATORS, "small", dict(dim=64, depth=1, heads=4, prefix=2))
    monkeypatch.setattr(scales, "TITLES", {"": "ours", "scale-dropout": "dropout", "plain": "no Gaussian"})
    monkeypatch.setattr(scales, "GENERATED", {""})
    flags = "--seeds", 1, "--n", 2, "--shapes", 4, "--scorer", overfitted
    assert experiment("ablate-vat", *flags) == 0
    ours, dropout, plain = rows_of(tmp_path / "out/ablate-vat")
    assert len(experiment.trainings) == 3 + 1 + 2
    assert 0 <= float(ours["CS-IoU"]) <= 1
    assert ours["prompt score"] and not dropout["prompt score"]
    assert experiment("ablate-vat", *flags) == 0
    assert len(experiment.trainings) == 6


def test_registers_are_trained_with_rida_and_without(experiment, overfitted, tmp_path, monkeypatch):
    """ablate-rida: a student, and registers of each variant; a row for each number of registers."""
    small = dict(registers=2, width=6, dim=64, heads=4, encoder=1, decoder=1)
    monkeypatch.setitem(lost.SIZES, "small", small)
    monkeypatch.setitem(lost.STUDENTS, "small", dict(dim=64, depth=1, heads=4))
    assert experiment("ablate-rida", "--seeds", 1, "--shapes", 2, "--batch", 4, "--scorer", overfitted) == 0
    rows = rows_of(tmp_path / "out/ablate-rida")
    assert [(row["decoder"], row["registers"]) for row in rows] == [
        (decoder, k) for decoder in ("with RIDA", "without") for k in ("1", "2")]
    assert len(experiment.trainings) == 1 + 2
