"""test_evaluation.py - the tests of evaluation/, evaluate.py and bench.py."""
import csv
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod
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
from conftest import SMALL, WIDTHS, TrueHead, prompted, run, small_backbone, train_small
from engine import files
from engine.commands import UserError
from evaluation import exam, experiments, metrics, peers, results
from evaluation.judges import grid_iou
from geometry import shapes
from prompts import text_tower

# ---------------------------------------------------------------------------- bench.py

@pytest.mark.parametrize("command, column, values", [
    ("sample --size small --batch 2 --ends", "batch", {"2"}),
    ("train --size small --batch 4", "size", {"small"}),
    ("decode --shapes 2 --resolutions 64", "same mesh", {"1.0"}),
    ("data --counts 2", "shapes", {"2"}),
])
def test_benches(command, column, values, overfitted, tmp_path, monkeypatch):
    """Each compares at least two ways, the first with itself."""
    for module, size in SMALL.items():
        monkeypatch.setitem(module.SIZES, "small", size)
    monkeypatch.setattr(bench, "PUBLISHED", dict(steps=4, denoise_steps=4))
    name, *flags = command.split()
    if name == "decode":
        flags += ["--checkpoint", overfitted]
    assert run(bench.main, name, *flags, "--rounds", 1, "--out", tmp_path) == 0
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
    assert len({row["way"] for row in rows}) == len(rows) >= 2
    assert float(rows[0]["times as fast"]) == 1
    assert {row[column] for row in rows} == values
    assert Image.open(tmp_path / f"{name}.png").width > 300


def test_the_work_counted_is_the_work_timed(tmp_path, monkeypatch):
    """The loss draws how many tokens are hidden: the same draw when it is counted, timed, and in micro-batches."""
    monkeypatch.setitem(backbone.SIZES, "small", SMALL[backbone])
    states, loss = [], backbone.Backbone.loss

    def counted(*args):
        states.append(bytes(torch.get_rng_state()))
        return loss(*args)

    monkeypatch.setattr(backbone.Backbone, "loss", counted)
    assert run(bench.main, *"train --size small --batch 4 --rounds 1 --out".split(), tmp_path) == 0
    assert len(states) == 3 * (1 + 1 + 1 + 1 + 4)      # counted, fp32, as train.py does it, recomputed, 4 micro-batches
    assert len(set(states)) == 3


def test_fewer_steps_are_scored(overfitted, tmp_path, examined, monkeypatch):
    """bench.py quality: the same prompts by both ways, which give other samples."""
    monkeypatch.setattr(bench, "PUBLISHED", dict(steps=20, denoise_steps=20))
    flags = "--n", 2, "--shapes", 4, "--resolution", 32, "--checkpoint", overfitted, "--out", tmp_path
    assert run(bench.main, "quality", "--ends", *flags) == 0
    rows = rows_of(tmp_path / "quality")
    ways = ["as published, 20 steps of 20, two passes", "10 steps of 4", "(held-out shapes)"]
    assert [row["way"] for row in rows] == ways
    assert len({row["prompt score"] for row in rows}) == 3


def test_iou_of_the_true_field_is_one():
    """grid_iou is 1 for a shape and itself, and between 0 and 1 for two tables."""
    table, other_table = shapes.make(0, 0), shapes.make(0, 13)
    head = TrueHead(table)
    assert grid_iou(head, torch.zeros(1, 1), table, torch.no_grad, 32) == 1
    assert 0 < grid_iou(head, torch.zeros(1, 1), other_table, torch.no_grad, 32) < .9


# ---------------------------------------------------------------------------- peers

@pytest.mark.parametrize("size", backbone.SIZES)
def test_peers_are_as_large(size):
    """Of every size, all generators have the same number of parameters, to 6 %."""
    settings = dict(tokens=64, channels=16, widths=WIDTHS, **backbone.SIZES[size])
    with torch.device("meta"):
        models = {name: kind(**settings) for name, kind in peers.GENERATORS.items()}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert all(abs(count / counts["masked"] - 1) < .06 for count in counts.values()), counts


@pytest.mark.parametrize("generator", peers.GENERATORS)
def test_every_generator_learns_what_belongs_to_a_prompt(generator):
    """Two prompts, two sets of tokens: after some steps each prompt gives its own."""
    torch.manual_seed(0)
    sizes = dict(dim=32, encoder=1, decoder=2, heads=4, prefix=2, head_dim=64, head_depth=2)
    model = peers.GENERATORS[generator](tokens=6, channels=3, widths={"text": 8}, **sizes)
    x = torch.randn(2, 6, 3).repeat(4, 1, 1)                                      # b n c
    text, mask = torch.randn(2, 4, 8).repeat(4, 1, 1), torch.ones(8, 4, dtype=torch.bool)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(250):
        model.loss(x, {"text": (text, mask)}).backward()
        optimizer.step()
        optimizer.zero_grad()
    samples = model.eval().generate({"text": (text[:2], mask[:2])}, [0, 1], steps=4, cfg=1.)
    distance = ((samples[:, None] - x[None, :2]) ** 2).mean((2, 3)).sqrt()        # 2 2
    assert distance.diag().max() < .35
    assert min(distance[0, 1], distance[1, 0]) > .7


def test_a_chain_does_not_look_ahead():
    """autoregressive: c_i depends on every token before i and on none from it on."""
    model, condition = small_backbone(generator="autoregressive")
    prefix, x = model.prefix(condition), torch.randn(3, 26, 8)
    c, changed = model.contexts(prefix, x), x.clone()
    changed[:, 10] += 1
    same = torch.isclose(c, model.contexts(prefix, changed), atol=1e-6).all(-1).all(0)
    assert same[:11].all()
    assert not same[11:].any()                         # c_11 is the first context vector that depends on x_10


@pytest.mark.parametrize("generator", ["masked", "pooled", "cross"])
def test_contexts_depend_on_the_condition_not_on_its_order(generator):
    """The context vectors depend on the condition tokens, not on their order nor on those behind the mask."""
    model, condition = small_backbone(generator=generator)[0], prompted()
    x, order = torch.randn(3, 27, 8), torch.rand(3, 27).argsort(1)

    def contexts(change):
        changed = {kind: change(tokens, mask) for kind, (tokens, mask) in condition.items()}
        return model.contexts(model.prefix(changed), x, order, 9, order)          # b n d

    plain = contexts(lambda tokens, mask: (tokens, mask))
    turned = contexts(lambda tokens, mask: (tokens.flip(1), mask.flip(1)))
    noisy = contexts(lambda tokens, mask: (tokens.masked_fill(~mask[..., None], 9.), mask))
    negated = contexts(lambda tokens, mask: (-tokens, mask))
    assert torch.allclose(plain, turned, atol=1e-5)
    assert torch.allclose(plain, noisy, atol=1e-5)
    assert not torch.allclose(plain, negated, atol=1e-3)


def test_a_bag_of_words_has_no_order():
    bag = text_tower.BagOfWords("cpu")
    texts = "a red chair with a blue lamp", "blue with lamp red chair", "a blue chair"
    plain, turned, other = (bag.tokens([text])[0] for text in texts)
    assert torch.allclose(plain, turned, atol=1e-5)
    assert not torch.allclose(plain, other, atol=.1)


# ---------------------------------------------------------------------------- evaluate.py

@pytest.fixture
def examined(tmp_path_factory, monkeypatch):
    """The held-out shapes are four tables and four chairs, and so are the training shapes; few points of each."""
    def prepare(split="test", count=None, *_, kinds=("surface",), **flags):
        other, folder = "test" if split == "train" else "train", tmp_path_factory.getbasetemp() / "examined"
        return data.prepare(other, 8, folder, kinds=kinds, classes=["table", "chair"], workers=1)

    monkeypatch.setattr(exam, "POINTS", 64)
    for module in (exam, experiments):
        monkeypatch.setattr(module, "prepare", prepare)
    for module in (exam, evaluate):
        monkeypatch.setattr(module, "CLASSES", ("table", "chair"))


def rows_of(path):
    """The rows of a table, which is there in all three forms; its numbers are finite."""
    assert path.with_suffix(".md").is_file()
    assert path.with_suffix(".png").is_file()
    rows = list(csv.DictReader(path.with_suffix(".csv").open()))
    texts = {list(rows[0])[0], "rep", "checkpoint", "reconstruction", "prompt", "rule"}
    assert all(np.isfinite(float(value)) for row in rows for key, value in row.items() if value and key not in texts)
    return rows


@pytest.mark.parametrize("command, table", [
    ("tokenizer --rep pc --shapes 2", "tokenizer-pc"), ("cross --reps sdf pc --shapes 1", "cross"),
    ("retrieval", "retrieval"), ("cross-view --shapes 1 --resolution 32", "cross-view-sdf"),
])
def test_evaluations_write_their_tables(command, table, four, tmp_path, examined):
    assert run(evaluate.main, *command.split(), "--checkpoint", four, "--out", tmp_path) == 0
    assert rows_of(tmp_path / table)


def test_all_heads_are_compared(four, tmp_path, examined):
    flags = "--shapes", 1, "--n", 2, "--resolution", 32, "--checkpoint", four, "--out", tmp_path
    assert run(evaluate.main, "joint", *flags) == 0
    assert [row["rep"] for row in rows_of(tmp_path / "joint")] == ["sdf", "pc", "mesh", "gs"]
    assert (tmp_path / "joint-losses.png").is_file()


def test_prompts_of_all_kinds_are_compared(four, tmp_path, examined):
    """images: samples are not as near to the true surface as another sampling of it, nor anywhere else."""
    assert run(evaluate.main, *"images --shapes 2 --resolution 32 --checkpoint".split(), four, "--out", tmp_path) == 0
    distance = {row["prompt"]: float(row["Chamfer"]) for row in rows_of(tmp_path / "images-sdf")}
    floor = distance.pop("(two samplings of the true surface)")
    assert len(distance) == 5
    assert floor < min(distance.values())
    assert max(distance.values()) < 1.5
    assert (tmp_path / f"images-sdf-{four.name}.png").is_file()


@pytest.fixture
def generate(four, overfitted, tmp_path, examined, monkeypatch):
    """generate(out, flags) runs evaluate.py; generate.decoded counts the shapes, generate.stop is where it stops."""
    decode = sample.LTM3D.decode

    def command(out, *flags):
        command.decoded = 0
        flags = "--scorer", overfitted, "--checkpoint", four, *flags, "--out", tmp_path / out
        return run(evaluate.main, *"generate --n 2 --shapes 4 --resolution 32".split(), *flags)

    def counted(self, *args):
        command.decoded += 1
        if command.decoded == command.stop:
            raise KeyboardInterrupt
        return decode(self, *args)

    command.stop = None
    monkeypatch.setattr(evaluate, "draw_samples", lambda *_: None)
    monkeypatch.setattr(sample.LTM3D, "decode", counted)
    return command


def test_a_stopped_evaluation_goes_on(generate, tmp_path):
    """Stopped at a sample, it makes only the others, and its table is that of a run that was not stopped."""
    assert generate("whole") == 0
    assert generate.decoded == 4 + 2 * 2                                          # four captions, twice two names
    generate.stop = 6
    assert generate("cut") == 130
    generate.stop = None
    assert generate("cut") == 0
    assert generate.decoded == 3
    whole, cut = (rows_of(tmp_path / out / "generate-sdf") for out in ("whole", "cut"))
    assert [row["checkpoint"] for row in whole] == [row["checkpoint"] for row in cut] == ["held-out shapes", "four"]
    for key in set(whole[1]) - {"checkpoint", "seconds"}:
        # the samples that were left are a smaller batch, whose sums have another order: the last digits may differ
        assert [float(row[key] or 0) for row in cut] == pytest.approx([float(row[key] or 0) for row in whole], rel=1e-3)
    assert float(whole[0]["of form"]) == pytest.approx(float(whole[0]["prompt score"]), abs=1e-3)


def test_results_belong_to_checkpoint_settings_and_code(generate, overfitted, tmp_path, monkeypatch, capsys):
    """Another checkpoint stands beside the first; another seed, a damaged file and other code are errors."""
    assert generate("out") == 0
    assert generate("out", overfitted) == 0
    assert generate.decoded == 4 + 2 * 2
    names = [row["checkpoint"] for row in rows_of(tmp_path / "out/generate-sdf")]
    assert names == ["held-out shapes", "four", "overfitted"]
    capsys.readouterr()
    assert generate("out", "--seed", 1) == 2
    assert "other settings (seed: 0, now 1); delete it, or give another --out" in capsys.readouterr().err
    (tmp_path / "out/generate-sdf/four/caption-0.npz").write_bytes(b"torn")
    assert generate("out") == 2
    assert "caption-0.npz is damaged" in capsys.readouterr().err
    monkeypatch.setattr(exam, "CODE", exam.CODE[1:])                              # as if sample.py were another
    assert generate("out") == 2
    assert "other settings (code: " in capsys.readouterr().err


# ---------------------------------------------------------------------------- experiments

@pytest.fixture
def experiment(overfitted, tmp_path, examined, monkeypatch):
    """experiment(name, flags) runs evaluate.py; experiment.trainings lists the flags of its trainings."""
    def command(name, *flags):
        folders = "--runs", tmp_path / "runs", "--cache", tmp_path / "cache", "--out", tmp_path / "out"
        flags = "--checkpoint", overfitted, *folders, "--steps", 2, "--train-shapes", 2, "--resolution", 32, *flags
        return run(evaluate.main, name, *flags)

    def launch(flags):
        command.trainings.append(flags)
        folder = Path(flags[flags.index("--out") + 1])
        with pytest.MonkeyPatch.context() as patch:
            return train_small(patch, folder, 2, *flags, "--batch", 2, generators=peers.GENERATORS)

    command.trainings = []
    monkeypatch.setattr(experiments, "launch", launch)
    return command


def test_experiments_train_what_they_compare(experiment, overfitted, tmp_path, monkeypatch, capsys):
    """versus: two variants share a training, a second run trains nothing, other settings are an error."""
    variants = {"LTM3D": ("", {}), "fewer steps": ("", {"steps": 8}), "pooled": ("--generator pooled", {})}
    monkeypatch.setitem(experiments.VARIANTS, "versus", ("", variants))
    small = "--seeds", 1, "--n", 2, "--shapes", 4, "--scorer", overfitted
    assert experiment("versus", *small) == 0
    assert len(experiment.trainings) == 2
    assert [row["variant"] for row in rows_of(tmp_path / "out/versus")] == ["held-out shapes", *variants]
    assert (tmp_path / "out/versus-losses.png").is_file()
    assert experiment("versus", *small) == 0
    assert len(experiment.trainings) == 2

    other = shutil.copytree(overfitted, tmp_path / "other")
    files.save_weights(other / "tokenizer.safetensors", {"x": torch.zeros(1)})
    for flags, complaint in (
            (("--steps", 3), "was trained for 2 steps with 2 shapes"),
            (("--train-shapes", 3), "give --steps 2 --train-shapes 2"),
            (("--checkpoint", overfitted, overfitted), "versus takes one --checkpoint"),
            (("--checkpoint", other), "was trained with another tokenizer than that in"),
            (("--scorer", "none.py"), "gives no features")):
        assert experiment("versus", *small, *flags) == 2
        assert complaint in capsys.readouterr().err


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
    assert experiments.launch(["--generator", "none"]) == 2
    assert "invalid choice: 'none'" in capfd.readouterr().err


def test_rules_of_rgs_are_compared(overfitted, tmp_path, examined, monkeypatch):
    """A rule that reaches everywhere is sampling only. If guidance ignores the prompt, a = 0 is more faithful to it."""
    without_guidance = partialmethod(backbone.Backbone.generate, cfg=0.)
    monkeypatch.setattr(backbone.Backbone, "generate", without_guidance)
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
    assert float(blended["prompt score"]) > float(plain["prompt score"]) + .1


# ---------------------------------------------------------------------------- results and scores

def test_labels_are_as_short_as_possible():
    """Checkpoints of one name get labels of their own; one that is named twice gets a single one."""
    assert list(results.labels(["a/tiny", "a/tiny/", "b/tiny", "b/x/tiny"]).values()) == ["a-tiny", "b-tiny", "x-tiny"]
    assert list(results.labels(["runs/tiny/", "checkpoints/small"]).values()) == ["tiny", "small"]


def test_damaged_results_are_one_line(tmp_path):
    """An array instead of a dict, results that are unlike, results without settings."""
    cache = results.ResultCache(tmp_path, seed=0)
    cache.write("one", {"x": np.zeros(3)})
    cache.write("longer", {"x": np.zeros(4)})
    with pytest.raises(UserError, match="unlike the others"):
        exam.sample_all(None, [exam.Job(name, "", None, ()) for name in ("one", "longer")], cache, None)
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UserError, match="array.npz is damaged"):
        cache.read("array")
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match="seed: None, now 1"):
        results.ResultCache(tmp_path, seed=1)


def test_copies_are_known(overfitted, prepared):
    """Training shapes score least, copies of them (other points) a little more, held-out shapes 1."""
    train, test = prepared
    model, encoder = sample.LTM3D(overfitted), tokenizer.load(overfitted)
    sets = [tokenizer.encode_set(encoder, split, model.device, model.autocast).numpy() for split in prepared]
    known, new = (exam.score_memorisation(train, model, test, tokens) for tokens in sets)
    assert known["memorisation"] < known["of copies"] < .9
    assert known["of copies"] == new["of copies"]
    assert new["memorisation"] == pytest.approx(1, abs=1e-3)
    assert exam.score_memorisation(None, model, test, None) == {"memorisation": "", "of copies": ""}


def test_a_scorer_may_be_a_file(tmp_path):
    path = tmp_path / "scorer.py"
    path.write_text("def cloud(points, normals, colours):\n    return points.mean(1)\n")
    scorer, points = exam.Scorer(str(path)), np.random.default_rng(0).random((100, 8, 3))
    assert np.allclose(scorer.clouds(points, points, points), points.mean(1), atol=1e-6)
    assert scorer.text is None


@pytest.mark.parametrize("text, complaint", [
    ("x = 1", "no attribute 'cloud'"), ("1 +", "SyntaxError"), ("import ulip", "No module named 'ulip'"),
    ("exit(3)", "SystemExit"), (None, "gives no features")])
def test_a_scorer_without_features_is_one_line(text, complaint, tmp_path, capsys):
    if text:
        (tmp_path / "scorer.py").write_text(text)
    assert run(evaluate.main, "generate", "--scorer", tmp_path / "scorer.py", "--out", tmp_path) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("code, complaint", [
    ("return points.mean(1) * float('nan')", "not finite"), ("return points[:1, 0]", r"\(1, 3\) for 64"),
    ("return 3", "AttributeError"), ("return points.mean(1) * 0", "all 0"), ("exit(3)", "SystemExit"),
    ("return points", r"\(64, 8, 3\)")])
def test_features_are_checked(code, complaint, tmp_path):
    (tmp_path / "scorer.py").write_text(f"def cloud(points, normals, colours):\n    {code}\n")
    points = np.ones((100, 8, 3))
    with pytest.raises(UserError, match=complaint):
        exam.Scorer(str(tmp_path / "scorer.py")).clouds(points, points, points)


def test_pictures_need_a_trained_scorer(tmp_path, capsys):
    assert run(evaluate.main, "ablate-rgs", "--scorer", "scorer.py", "--out", tmp_path) == 2
    assert "has no features of pictures; give --prompts name caption" in capsys.readouterr().err


# ---------------------------------------------------------------------------- metrics

def test_metrics_of_two_shapes_by_hand():
    """Two points that move by 3 and 4; occupancies that share a third of their cells; a picture that is .1 lighter."""
    a = np.array([[0., 0, 0], [10, 0, 0]])
    b = a + [[3, 0, 0], [0, 4, 0]]
    assert metrics.emd(a, b) == 3.5
    assert metrics.chamfer(a, b) == 7
    assert metrics.chamfer(a[:1], b) == 3 + (3 + 116 ** .5) / 2
    assert [metrics.fscore(a, b, threshold) for threshold in (1, 3.5, 5)] == [0, .5, 1]
    assert metrics.iou(np.array([1, 1, 0], bool), np.array([0, 1, 1], bool)) == 1 / 3
    image = np.zeros((16, 16, 3))
    assert metrics.psnr(image, image + .1) == pytest.approx(20)
    assert metrics.ssim(image, image) == 1
    assert metrics.ssim(image, image + .1) < 1


def test_scores_of_prompts_by_hand():
    prompts, samples = np.array([[1., 0], [0, 1]]), np.array([[0., 2], [3, 4]])   # cosines 0, 1; .6, .8
    assert metrics.prompt_score(prompts, samples) == pytest.approx(.4)
    assert metrics.r_precision(prompts, samples, np.eye(2, dtype=bool)) == .5
    assert metrics.r_precision(prompts, samples, np.ones((2, 2), bool)) == 1


def test_faces_within_some_bins_by_hand():
    """Of three faces one is right, one is off by a bin, one by two; the order and the first corner do not matter."""
    true = np.arange(27).reshape(3, 3, 3) * 4
    found = true[[2, 0, 1]] + np.array([0, 1, 2])[:, None, None] * np.eye(3, dtype=int)
    assert [metrics.faces_within(np.roll(found, 1, 1), true, bins) for bins in (0, 1, 2)] == [1 / 3, 2 / 3, 1]
    assert metrics.faces_within(found[:1], true, 2) == 1 / 3


def random_balls(rng, n, centre=0.):
    """n noisy balls of different sizes: n k 3."""
    x = rng.normal(size=(n, 300, 3)) * rng.uniform(.2, 1, (n, 1, 3)) + centre
    return torch.tensor(x, dtype=torch.float)


def test_the_matrix_has_the_distances_of_all_pairs():
    rng = np.random.default_rng(0)
    a, b = random_balls(rng, 20), random_balls(rng, 20)
    matrix = metrics.chamfer_matrix(a, b)
    assert all(abs(matrix[i, j] - metrics.chamfer(a[i], b[j])) < 1e-3 for i in range(3) for j in range(20))
    assert torch.allclose(metrics.chamfer_matrix(a, a), metrics.chamfer_matrix(a, a.clone()), atol=1e-3)
    assert metrics.diversity(a[:2]) == pytest.approx(metrics.chamfer(a[0], a[1]), abs=1e-3)


def test_sets_of_copies_equals_and_strangers():
    """MMD, COV and 1-NNA of copies, of a set of the same kind, of strangers, of one shape again and again."""
    rng = np.random.default_rng(0)
    real, equal, far = random_balls(rng, 20), random_balls(rng, 20), random_balls(rng, 20, 9.)
    one_shape = torch.cat([real[:1]] * 20) + .001 * random_balls(rng, 20)
    copies, equal, strange, lazy = (metrics.mmd_cov_1nna(x, real) for x in (real.clone(), equal, far, one_shape))
    assert (copies["COV"], copies["1-NNA"]) == (1, 0)
    assert copies["MMD"] < 1e-2
    assert .3 < equal["1-NNA"] < .7
    assert equal["COV"] > .25
    assert strange["1-NNA"] == 1
    assert strange["MMD"] > 9
    assert lazy["COV"] == 1 / 20


def test_memorisation_of_vectors():
    """0 for training shapes, about 1 for others; by hand: 1 to the nearest, over the root of 17."""
    train, held_out, new = np.random.default_rng(0).normal(size=(3, 400, 8))
    assert metrics.memorisation(train[:20], held_out, train) < 1e-6
    assert metrics.memorisation(new, held_out, train) == pytest.approx(1, rel=.05)
    assert metrics.memorisation([[1., 0]], [[0, 5]], [[0., 0], [4, 4]]) == pytest.approx(1 / 17 ** .5)


def test_frechet_distance_of_gaussians():
    """If covariances commute it is sum (mu - nu)^2 + (sigma - tau)^2."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 4))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T        # mean 0, covariance 1 exactly
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    other = x * np.array([1., 2, 3, 4]) @ turn + [1, 2, 0, 0]
    assert metrics.frechet(x @ turn, other) == pytest.approx(5 + 0 + 1 + 4 + 9, rel=1e-6)
    assert abs(metrics.frechet(x, x)) < 1e-6


def test_kernel_distance_term_by_term():
    x = np.random.default_rng(0).normal(size=(2000, 4))
    a, b = x[:5], x[5:9]
    kernel = lambda u, v: (u @ v / 4 + 1) ** 3
    within = lambda z: np.mean([kernel(u, v) for i, u in enumerate(z) for j, v in enumerate(z) if i != j])
    across = np.mean([kernel(u, v) for u in a for v in b])
    assert metrics.kernel_distance(a, b) == pytest.approx(within(a) + within(b) - 2 * across)
    assert abs(metrics.kernel_distance(x[:1000], x[1000:])) < .05
    assert metrics.kernel_distance(x[:1000], x[1000:] + .3) > .05


@pytest.mark.parametrize("measure, complaint", [
    (lambda x: metrics.chamfer(x[:0], x), "the first cloud has 0, at least 1"),
    (lambda x: metrics.chamfer(x, x * np.nan), "second cloud holds numbers"),
    (lambda x: metrics.emd(x, x[:3]), "of clouds of one size, not of 4 and 3"),
    (lambda x: metrics.fscore(x[:, :2], x, .1), "has the shape (4, 2), not k 3"),
    (lambda x: metrics.diversity(x[None]), "has 1, at least 2"),
    (lambda x: metrics.mmd_cov_1nna(x[None], x[None]), "the set of samples has 1, at least 2"),
    (lambda x: metrics.mmd_cov_1nna(np.stack([x, x]), np.stack([x] * 3)), "not 2 samples and 3"),
    (lambda x: metrics.frechet(x[:1], x), "first set of features has 1"),
    (lambda x: metrics.kernel_distance(x, x[:, :0]), "second set of features has"),
    (lambda x: metrics.memorisation(x, x, x), "are training shapes"),
    (lambda x: metrics.memorisation(x, x, x[:0]), "of training shapes has 0"),
    (lambda x: metrics.iou(x > 99, x > 99), "not both empty"),
])
def test_what_cannot_be_measured_is_an_error(measure, complaint):
    with pytest.raises(UserError) as caught:
        measure(np.arange(12.).reshape(4, 3))
    assert complaint in str(caught.value)
