"""test_evaluation.py - the tests of evaluation/."""
import csv
import functools
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import backbone
import bench
import data
import evaluate
import sample
import tokenizer
import train
from conftest import SMALL, WIDTHS, TrueHead, prompted, run, small_backbone, train_small
from engine import files
from engine.commands import UserError
from evaluation import exam, experiments, metrics, peers, results, rgs
from evaluation.judges import grid_iou
from geometry import prepare, shapes
from prompts import text_tower

# ---------------------------------------------------------------------------- tokenizer

@pytest.mark.parametrize("flags, columns", [
    ("sample --size small --batch 2 --ends", {"batch": {"2"}}), ("train --size small --batch 4", {"size": {"small"}}),
    ("decode --shapes 2 --resolutions 64", {"same mesh": {"1.000"}}), ("data --counts 2", {"shapes": {"2"}}), ("render --points 300", {"Gaussians": {"300"}}),
], ids=lambda value: value.split()[0] if isinstance(value, str) else "")
def test_benches(flags, columns, overfitted, tmp_path, monkeypatch):
    """Each compares two ways or more, and what both make is alike."""
    for module, size in SMALL.items():
        monkeypatch.setitem(module.SIZES, "small", size)
    monkeypatch.setattr(bench, "PUBLISHED", dict(steps=4, denoise_steps=4))
    flags += f" --checkpoint {overfitted}" * flags.startswith("decode")
    assert run(bench.main, *flags.split(), "--rounds", 1, "--out", tmp_path) == 0
    name = flags.split()[0]
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
    assert len({row["way"] for row in rows}) == len(rows) >= 2 and float(rows[0]["times as fast"]) == 1
    assert all(results.shown(row[key] if key != "same mesh" else float(row[key])) in values for row in rows for key, values in columns.items())
    assert float(rows[0].get("largest difference", 0)) < .02 and Image.open(tmp_path / f"{name}.png").width > 300


def test_the_work_counted_is_the_work_timed(tmp_path, monkeypatch):
    """How many tokens are hidden is drawn in the loss: it has to be the same draw where it is counted, timed, and in parts."""
    monkeypatch.setitem(backbone.SIZES, "small", SMALL[backbone])
    drawn, loss = [], backbone.Backbone.loss
    monkeypatch.setattr(backbone.Backbone, "loss", lambda *args: drawn.append(bytes(torch.get_rng_state())) or loss(*args))
    assert run(bench.main, *"train --size small --batch 4 --rounds 1 --out".split(), tmp_path) == 0
    assert len(drawn) == 3 * (1 + 1 + 1 + 1 + 4) and len(set(drawn)) == 3      # counted, fp32, as it is, recomputed, four parts


def test_iou_of_the_true_field_is_one():
    """grid_iou is 1 for a shape and itself, and between 0 and 1 for two tables."""
    one, other = shapes.make(0, 0), shapes.make(0, 13)
    head = TrueHead(one)
    assert grid_iou(head, torch.zeros(1, 1), one, torch.no_grad, 32) == 1
    assert 0 < grid_iou(head, torch.zeros(1, 1), other, torch.no_grad, 32) < .9


# ---------------------------------------------------------------------------- baselines

@pytest.mark.parametrize("size", backbone.SIZES)
def test_peers_are_as_large(size):
    """Of every size, all generators have the same number of parameters, to 6 %."""
    with torch.device("meta"):
        settings = dict(tokens=64, channels=16, widths=WIDTHS, **backbone.SIZES[size])
        count = {name: sum(p.numel() for p in kind(**settings).parameters()) for name, kind in peers.GENERATORS.items()}
    assert all(abs(each / count["masked"] - 1) < .06 for each in count.values()), count


@pytest.mark.parametrize("generator", peers.GENERATORS)
def test_every_generator_learns_what_belongs_to_a_prompt(generator):
    """Two prompts, two sets of tokens: after some steps each prompt gives its own."""
    torch.manual_seed(0)
    model = peers.GENERATORS[generator](tokens=6, channels=3, widths={"text": 8}, dim=32, encoder=1, decoder=2, heads=4, prefix=2, head_dim=64, head_depth=2)
    x, condition = torch.randn(2, 6, 3).repeat(4, 1, 1), {"text": (torch.randn(2, 4, 8).repeat(4, 1, 1), torch.ones(8, 4, dtype=torch.bool))}
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(250):
        model.loss(x, condition).backward()
        optimizer.step()
        optimizer.zero_grad()
    made = model.eval().generate({"text": tuple(y[:2] for y in condition["text"])}, [0, 1], steps=4, cfg=1.)
    far = ((made[:, None] - x[None, :2]) ** 2).mean((2, 3)).sqrt()
    assert far.diag().max() < .35 < .7 < far[0, 1] and far[1, 0] > .7


def test_a_chain_does_not_look_ahead():
    """autoregressive: c_i depends on every token before i and on none from it on."""
    model, condition = small_backbone(generator="autoregressive")
    prefix, x = model.prefix(condition), torch.randn(3, 26, 8)
    c, other = model.contexts(prefix, x), x.clone()
    other[:, 10] += 1
    same = torch.isclose(c, model.contexts(prefix, other), atol=1e-6).all(-1).all(0)
    assert same[:11].all() and not same[11:].any()                     # x_11 is the first token that may know of the 11th


def test_ways_to_tell_differ_in_what_they_hear():
    """pooled and bag of words do not hear an order of what they are told, a prefix does not either, the text tower does; nobody hears what
    is masked."""
    condition = prompted()
    turned = {kind: (x.flip(1), mask.flip(1)) for kind, (x, mask) in condition.items()}
    noisy = {kind: (x.masked_fill(~mask[..., None], 9.), mask) for kind, (x, mask) in condition.items()}
    for generator in ("masked", "pooled", "cross"):
        model, _ = small_backbone(generator=generator)
        x, order = torch.randn(3, 27, 8), torch.rand(3, 27).argsort(1)
        say = lambda told: model.contexts(model.told(told), x, order, 9, order)
        assert torch.allclose(say(condition), say(turned), atol=1e-5) and torch.allclose(say(condition), say(noisy), atol=1e-5)
        assert not torch.allclose(say(condition), say({kind: (-y, mask) for kind, (y, mask) in condition.items()}), atol=1e-3)
    bag = text_tower.Bag("cpu")
    one, same, other = (bag.tokens([text])[0] for text in ("a red chair with a blue lamp", "blue with lamp red chair", "a blue chair"))
    assert torch.allclose(one, same, atol=1e-5) and not torch.allclose(one, other, atol=.1)


# ---------------------------------------------------------------------------- train

@pytest.fixture
def examined(tmp_path_factory, monkeypatch):
    """Four tables and four chairs in the place of the held-out shapes, and others to learn from; few points of each."""
    def prepare(split="test", count=None, *_, kinds=("surface",), **more):
        return data.prepare("test" if split == "train" else "train", 8, tmp_path_factory.getbasetemp() / "examined", kinds=kinds, classes=["table", "chair"], workers=1)
    for module in (evaluate, exam, experiments, rgs):
        for name, value in (("prepare", prepare), ("CLASSES", ("table", "chair")), ("POINTS", 64)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


def rows_of(path):
    """A table's rows; it is there in all three forms, and its numbers are numbers."""
    assert path.with_suffix(".md").is_file() and path.with_suffix(".png").is_file()
    rows = list(csv.DictReader(path.with_suffix(".csv").open()))
    wrong = [(k, v) for row in rows for k, v in list(row.items())[1:] if v and k not in ("rep", "checkpoint", "reconstruction", "prompt", "rule")
             and not np.isfinite(float(v))]
    assert rows and not wrong
    return rows


def test_evaluations_write_their_tables(four, tmp_path, examined):
    """Representations are judged and compared."""
    flags = ("--checkpoint", four, "--out", tmp_path)
    assert run(evaluate.main, "tokenizer", "--rep", "pc", "--shapes", 2, *flags) == 0            # joint does the others
    for name, count in (("images", 2), ("cross-view", 1)):
        assert run(evaluate.main, name, "--shapes", count, "--resolution", 32, *flags) == 0
    assert run(evaluate.main, "cross", "--reps", "sdf", "pc", "--shapes", 1, *flags) == 0
    assert run(evaluate.main, "retrieval", *flags) == 0
    assert run(evaluate.main, "joint", "--shapes", 1, "--n", 2, "--resolution", 32, *flags) == 0
    assert [row["rep"] for row in rows_of(tmp_path / "joint")] == ["sdf", "pc", "mesh", "gs"]
    assert (tmp_path / "joint-losses.png").is_file() and (tmp_path / f"images-sdf-{four.name}.png").is_file()
    told = {row.pop("told"): float(row["Chamfer"]) for row in rows_of(tmp_path / "images-sdf")}
    floor = told.pop("(two samplings of the true surface)")
    assert len(told) == 5 and all(floor < other < 1.5 for other in told.values())
    for name in ("tokenizer-pc", "cross", "retrieval", "cross-view-sdf"):
        assert rows_of(tmp_path / name)


def test_a_stopped_evaluation_goes_on(four, overfitted, tmp_path, examined, monkeypatch, capsys):
    """generate: stopped at a sample it makes only the others, with the same table as one that was not; several checkpoints stand side by
    side; results of other settings or other code are one clear line, a damaged one too."""
    decode, seen = sample.LTM3D.decode, []

    def counted(self, *args, stop=None):
        seen.append(args)
        if len(seen) == stop:
            raise KeyboardInterrupt
        return decode(self, *args)

    generate = lambda out, *more: run(evaluate.main, "generate", "--n", 2, "--shapes", 4, "--resolution", 32, "--scorer", overfitted,
                                      "--checkpoint", four, *more, "--out", tmp_path / out)
    monkeypatch.setattr(evaluate, "draw", lambda *_: None)
    monkeypatch.setattr(sample.LTM3D, "decode", counted)
    assert generate("whole") == 0 and len(seen) == 8                   # four captions, twice two names
    seen.clear()
    monkeypatch.setattr(sample.LTM3D, "decode", functools.partialmethod(counted, stop=6))
    assert generate("cut") == 130
    monkeypatch.setattr(sample.LTM3D, "decode", counted)
    seen.clear()
    assert generate("cut") == 0 and len(seen) == 3
    one, other = ([{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(tmp_path / out / "generate-sdf")] for out in ("whole", "cut"))
    assert one == other and [row["checkpoint"] for row in one] == ["held-out shapes", "four"]
    assert float(one[0]["of form"]) == pytest.approx(float(one[0]["prompt score"]), abs=1e-3)      # their colours are their own
    seen.clear()
    assert generate("cut", overfitted) == 0 and len(seen) == 8         # the second checkpoint's
    assert [row["checkpoint"] for row in rows_of(tmp_path / "cut/generate-sdf")] == ["held-out shapes", "four", "overfitted"]
    capsys.readouterr()
    assert generate("cut", "--seed", 1) == 2
    assert "holds results of other settings (seed: 0, now 1); delete it, or give another --out" in capsys.readouterr().err
    (tmp_path / "cut/generate-sdf/four/caption-0.npz").write_bytes(b"torn")
    assert generate("cut") == 2 and "caption-0.npz is damaged" in capsys.readouterr().err
    monkeypatch.setattr(exam, "CODE", exam.CODE[1:])             # as if sample.py were another
    assert generate("cut") == 2 and "other settings (code: " in capsys.readouterr().err


def test_fewer_steps_are_scored(overfitted, tmp_path, examined, monkeypatch):
    """bench.py quality: the same prompts by both ways, which give other samples."""
    monkeypatch.setattr(bench, "PUBLISHED", dict(steps=20, denoise_steps=20))
    assert run(bench.main, "quality", "--ends", "--n", 2, "--shapes", 4, "--resolution", 32, "--checkpoint", overfitted, "--out", tmp_path) == 0
    plain, fast, true = rows_of(tmp_path / "quality")
    assert [row["way"] for row in (plain, fast, true)] == ["as published, 20 steps of 20, two passes", "10 steps of 4", "(held-out shapes)"]
    assert len({row["prompt score"] for row in (plain, fast, true)}) == 3


def test_experiments_train_what_they_compare(overfitted, tmp_path, examined, monkeypatch, capsys):
    """versus: variants with the same shapes, prompts and steps, each trained once; one that was trained otherwise is an error."""
    def trained(flags):
        calls.append(flags)
        with pytest.MonkeyPatch.context() as patch:
            return train_small(patch, Path(flags[flags.index("--out") + 1]), 2, *flags, "--batch", 2)
    calls = []
    monkeypatch.setattr(experiments, "launch", trained)
    monkeypatch.setitem(experiments.VARIANTS, "versus", {"one": ("", {}), "in fewer steps": ("", {"steps": 8}), "other": ("--generator pooled", {})})
    versus = lambda *flags: run(evaluate.main, "versus", "--checkpoint", overfitted, "--seeds", 1, "--n", 2, "--shapes", 4, "--resolution", 32, "--steps", 2,
                                "--train-shapes", 2, "--scorer", overfitted, "--runs", tmp_path / "runs", "--cache", tmp_path / "cache", "--out", tmp_path / "out", *flags)
    assert versus() == 0
    assert [row["variant"] for row in rows_of(tmp_path / "out/versus")] == ["held-out shapes", *experiments.VARIANTS["versus"]]
    assert (tmp_path / "out/versus-losses.png").is_file()
    assert len(calls) == 2 and versus() == 0 and len(calls) == 2
    other = shutil.copytree(overfitted, tmp_path / "other")
    files.save_weights(other / "tokenizer.safetensors", {"x": torch.zeros(1)})
    for flags, words in ((("--steps", 3), "was trained for 2 steps with 2 shapes"), (("--train-shapes", 3), "give --steps 2 --train-shapes 2"),
                         (("--checkpoint", overfitted, overfitted), "versus takes one --checkpoint"),
                         (("--checkpoint", other), "was trained with another tokenizer than that in"), (("--scorer", "none.py"), "gives no features")):
        assert versus(*flags) == 2 and words in capsys.readouterr().err
    assert run(evaluate.main, "overfit", "--checkpoint", overfitted, "--steps", 2, "--train-shapes", 2, "--resolution", 32,
               "--runs", tmp_path / "runs", "--cache", tmp_path / "cache", "--out", tmp_path / "out") == 0
    *each, mean = rows_of(tmp_path / "out/overfit")
    assert len(each) == 8 and all(float(row["its floor"]) < float(row["Chamfer"]) for row in each)
    assert float(mean["nearest is its own"]) == np.mean([float(row["nearest is its own"]) for row in each])
    assert (tmp_path / "out/overfit-shapes.png").is_file()


def test_a_stopped_experiment_lets_training_save(tmp_path, monkeypatch):
    """Ctrl-C while a variant is trained: train.py is told, and has the seconds that it takes to save."""
    (tmp_path / "train.py").write_text("import pathlib, sys, time\n"
        "try:\n    pathlib.Path(sys.argv[1], 'begun').touch(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(1); pathlib.Path(sys.argv[1], 'saved').touch(); sys.exit(130)\n")
    monkeypatch.setattr(experiments, "__file__", str(tmp_path / "evaluation/experiments.py"))

    def stop():
        for _ in range(400):                                    # 20 seconds at most
            if (tmp_path / "begun").exists():
                break
            time.sleep(.05)
        os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(stop)
        assert experiments.launch([str(tmp_path)]) == 130 and (tmp_path / "saved").is_file()


def test_copies_are_known(overfitted, prepared):
    """Memorisation of training shapes, drawn anew, is what a table says copies would have; that of other shapes is more, of held-out ones 1."""
    train, test = prepared
    model = sample.LTM3D(overfitted)
    encoder = tokenizer.load(overfitted)
    known, new = (exam.copied(train, model, test, tokenizer.tokenise(encoder, split, model.device, model.autocast).numpy()) for split in prepared)
    assert known["memorisation"] < known["of copies"] == new["of copies"] < .9 and new["memorisation"] == pytest.approx(1, abs=1e-3)
    assert exam.copied(None, model, test, None) == {"memorisation": "", "of copies": ""}


def test_kept_results_are_told_apart(tmp_path):
    """Checkpoints of one name get labels of their own, one that is named twice a single one; results without settings, an array where
    several are meant and results that are unlike are one clear line."""
    assert list(results.labels(["a/tiny", "a/tiny/", "b/tiny", "b/x/tiny"]).values()) == ["a-tiny", "b-tiny", "x-tiny"]
    assert list(results.labels(["runs/tiny/", "checkpoints/small"]).values()) == ["tiny", "small"]
    keep = results.Kept(tmp_path / "kept", seed=0)
    keep("one", lambda: {"x": np.zeros(3)})
    np.save(tmp_path / "kept/two.npy", np.zeros(3))
    (tmp_path / "kept/two.npy").rename(tmp_path / "kept/two.npz")
    with pytest.raises(UserError, match="two.npz is damaged"):
        keep("two", None)
    keep("three", lambda: {"x": np.zeros(4)})
    with pytest.raises(UserError, match="unlike the others"):
        exam.made(None, [exam.Job(name, "", None, ()) for name in ("one", "three")], keep, None)
    (tmp_path / "kept/settings.json").unlink()
    with pytest.raises(UserError, match="not their settings.json"):
        results.Kept(tmp_path / "kept", seed=1)


def test_rules_of_rgs_are_compared(overfitted, tmp_path, examined, monkeypatch):
    """ablate-rgs: one that reaches everywhere is sampling only; with guidance that ignores the prompt, one of weight 0 is truer to it."""
    monkeypatch.setattr(backbone.Backbone, "generate", functools.partialmethod(backbone.Backbone.generate, cfg=0.))
    assert run(evaluate.main, "ablate-rgs", "--checkpoint", overfitted, "--scorer", overfitted, "--shapes", 2, "--n", 2, "--seeds", 2, "--resolution", 32,
               "--alphas", 0, "--windows", "--within", 100, "--prompts", "name", "--out", tmp_path) == 0
    rows = rows_of(tmp_path / "ablate-rgs")
    assert [row["rule"] for row in rows] == ["(the shapes themselves)", "sampling only", "a = 0", "within 100 sigma"]
    _, plain, blended, wide = rows
    assert {**wide, "rule": "", "window": ""} == {**plain, "rule": "", "window": ""}
    assert float(plain["share of diversity"]) == 1 and float(blended["prompt score"]) > float(plain["prompt score"]) + .1


def test_features_of_somebody_else(tmp_path, capsys):
    """--scorer FILE.py: whatever it says counts; a file that gives no features is one clear line."""
    (tmp_path / "mine.py").write_text("def cloud(points, normals, colours):\n    return points.mean(1)\n")
    scorer = exam.Scorer(str(tmp_path / "mine.py"))
    points = np.random.default_rng(0).random((100, 8, 3))
    assert np.allclose(scorer.clouds(points, points, points), points.mean(1), atol=1e-6) and scorer.text is None
    for text, words in (("x = 1", "no attribute 'cloud'"), ("1 +", "SyntaxError"), ("import ulip", "No module named 'ulip'")):
        (tmp_path / "bad.py").write_text(text)
        assert run(evaluate.main, "generate", "--scorer", tmp_path / "bad.py", "--out", tmp_path) == 2
        assert words in capsys.readouterr().err
    for does, words in (("return points.mean(1) * float('nan')", "finite numbers"), ("return points[:1, 0]", r"\(1, 3\) for 64"), ("return 3", "failed"),
                        ("return points.mean(1) * 0", "not all 0"), ("exit(3)", "SystemExit"), ("return points", r"\(64, 8, 3\)")):
        (tmp_path / "bad.py").write_text(f"def cloud(points, normals, colours):\n    {does}\n")
        with pytest.raises(UserError, match=words):
            exam.Scorer(str(tmp_path / "bad.py")).clouds(points, points, points)
    assert run(evaluate.main, "generate", "--scorer", tmp_path / "none.py", "--out", tmp_path) == 2
    capsys.readouterr()
    assert run(evaluate.main, "ablate-rgs", "--scorer", tmp_path / "mine.py", "--out", tmp_path) == 2
    assert "has no features of pictures; give --prompts name caption" in capsys.readouterr().err


# ---------------------------------------------------------------------------- sample

def test_metrics_by_hand():
    """Two points moved by 3 and by 4, and what each convention makes of that; of three faces one is off by a bin and one by two."""
    a = np.array([[0., 0, 0], [10, 0, 0]])
    b = a + [[3, 0, 0], [0, 4, 0]]
    assert metrics.emd(a, b) == metrics.emd_fast(a, b) == 3.5 and metrics.chamfer(a[:1], b) == 3 + (3 + 116 ** .5) / 2
    assert metrics.chamfer(a, b) == 7 and metrics.chamfer(a, b, squared=True) == 25
    assert [metrics.fscore(a, b, threshold) for threshold in (1, 3.5, 5)] == [0, .5, 1]
    up, side = np.array([[0., 0, 1]] * 2), np.array([[0., 0, -1], [1, 0, 0]])
    assert metrics.normal_consistency(a, up, b, side) == .5                        # a normal and its opposite agree
    assert metrics.iou(np.array([1, 1, 0], bool), np.array([0, 1, 1], bool)) == 1 / 3
    image = np.zeros((16, 16, 3))
    assert metrics.psnr(image, image + .1) == pytest.approx(20) and metrics.ssim(image, image) == 1 > metrics.ssim(image, image + .1)
    text, shape = np.array([[1., 0], [0, 1]]), np.array([[0., 2], [3, 4]])         # cosines 0, 1; .6, .8
    assert metrics.prompt_score(text, shape) == pytest.approx(.4)
    assert metrics.r_precision(text, shape, np.eye(2, dtype=bool)) == .5 and metrics.r_precision(text, shape, np.ones((2, 2), bool)) == 1
    true = np.arange(27).reshape(3, 3, 3) * 4
    found = true[[2, 0, 1]] + np.array([0, 1, 2])[:, None, None] * np.eye(3, dtype=int)
    assert [metrics.faces_within(np.roll(found, 1, 1), true, bins) for bins in (0, 1, 2)] == [1 / 3, 2 / 3, 1]
    assert metrics.faces_within(found[:1], true, 2) == 1 / 3


def test_fast_emd_is_nearly_exact():
    """A little above the exact one, of two shapes and, where that is hardest, of two samplings of one."""
    for one, other in ((0, 0), (0, 13), (1, 3)):
        a, b = (shapes.make(0, index).surface(1024, np.random.default_rng(i))[0] for i, index in enumerate((one, other)))
        exact = metrics.emd(a, b)
        assert exact <= metrics.emd_fast(a, b) + 1e-6 < 1.04 * exact


def test_distances_of_sets():
    """The matrix has the distances of all pairs; copies, strangers and equals are told apart as the papers say."""
    rng = np.random.default_rng(0)
    balls = lambda n, where=0., k=300: torch.tensor(rng.normal(size=(n, k, 3)) * rng.uniform(.2, 1, (n, 1, 3)) + where, dtype=torch.float)
    one, two, far = balls(20), balls(20), balls(20, 9.)
    matrix = metrics.chamfer_matrix(one, two)
    assert all(abs(matrix[i, j] - metrics.chamfer(one[i], two[j])) < 1e-3 for i in range(3) for j in range(20))
    assert torch.allclose(metrics.chamfer_matrix(one, one), metrics.chamfer_matrix(one, one.clone()), atol=1e-3)
    assert metrics.diversity(one[:2]) == pytest.approx(metrics.chamfer(one[0], one[1]), abs=1e-3)
    same, equal, strange = (metrics.mmd_cov_1nna(x, one) for x in (one.clone(), two, far))
    assert same["COV"] == 1 and same["MMD"] < 1e-2 and same["1-NNA"] == 0          # each is nearest to its copy
    assert .3 < equal["1-NNA"] < .7 and equal["COV"] > .25 and strange["1-NNA"] == 1 and strange["MMD"] > 9
    lazy = metrics.mmd_cov_1nna(torch.cat([one[:1]] * 20) + .001 * balls(20), one)
    assert lazy["COV"] == 1 / 20                                                   # one shape again and again
    train, held, new = np.random.default_rng(0).normal(size=(3, 400, 8))
    assert metrics.memorisation(train[:20], held, train) < 1e-6 and metrics.memorisation(new, held, train) == pytest.approx(1, rel=.05)
    assert metrics.memorisation([[1., 0]], [[0, 5]], [[0., 0], [4, 4]]) == pytest.approx(1 / 17 ** .5)


def test_distances_of_features():
    """Frechet: of Gaussians whose covariances commute, sum (mu - nu)^2 + (sigma - tau)^2. Kernel distance: against its sum, term by term."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 4))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T         # mean 0, covariance 1 exactly
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    scales = np.array([1., 2, 3, 4])
    assert metrics.frechet(x @ turn, x * scales @ turn + [1, 2, 0, 0]) == pytest.approx(5 + 0 + 1 + 4 + 9, rel=1e-6)
    assert abs(metrics.frechet(x, x)) < 1e-6
    a, b = x[:5], x[5:9]
    k = lambda u, v: (u @ v / 4 + 1) ** 3
    pairs = lambda z: np.mean([k(u, v) for i, u in enumerate(z) for j, v in enumerate(z) if i != j])
    assert metrics.kernel_distance(a, b) == pytest.approx(pairs(a) + pairs(b) - 2 * np.mean([k(u, v) for u in a for v in b]))
    assert abs(metrics.kernel_distance(x[:1000], x[1000:])) < .05 < metrics.kernel_distance(x[:1000], x[1000:] + .3)


@pytest.mark.parametrize("measure, words", [
    (lambda x: metrics.chamfer(x[:0], x), "the first cloud has 0, at least 1"), (lambda x: metrics.chamfer(x, x * np.nan), "second cloud holds numbers"),
    (lambda x: metrics.emd(x, x[:3]), "of clouds of one size, not of 4 and 3"), (lambda x: metrics.emd_fast(x[:3], x), "of clouds of one size"),
    (lambda x: metrics.fscore(x[:, :2], x, .1), "has the shape (4, 2), not k 3"), (lambda x: metrics.diversity(x[None]), "has 1, at least 2"),
    (lambda x: metrics.mmd_cov_1nna(x[None], x[None]), "the set of samples has 1, at least 2"),
    (lambda x: metrics.mmd_cov_1nna(np.stack([x, x]), np.stack([x] * 3)), "not 2 samples and 3"),
    (lambda x: metrics.frechet(x[:1], x), "first set of features has 1"), (lambda x: metrics.kernel_distance(x, x[:, :0]), "second set of features has"),
    (lambda x: metrics.memorisation(x, x, x), "are training shapes"),
    (lambda x: metrics.iou(x > 99, x > 99), "not both empty"), (lambda x: metrics.memorisation(x, x, x[:0]), "of training shapes has 0"),
])
def test_what_cannot_be_measured_is_said(measure, words):
    with pytest.raises(UserError) as caught:
        measure(np.arange(12.).reshape(4, 3))
    assert words in str(caught.value)
