"""test_metrics.py - the tests of results, scores, metrics, and of prompts whose samples are measured."""
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import judge
import sample
from conftest import TrueHead
from engine.commands import UserError
from geometry import shapes
from geometry.built_in import BuiltIn
from geometry.surface import field_of
from geometry.symmetry import SYMMETRIES
from representations.pc import Cloud
from research import attributes, crisp, exam, metrics, results
from research.scores import score_memorisation

# ---------------------------------------------------------------------------- results and scores

def test_prompts_of_a_run_are_names_that_it_learns():
    """Of files, the prompts are names of training shapes; a class is judged if there is a held-out shape of it."""
    train, test = SimpleNamespace(classes=["barrel", "crate", "barrel"]), SimpleNamespace(classes=["sword", "crate"])
    assert judge.classes_and_prompts(train, test, built_in=False) == (["crate"], ["a barrel", "a crate"])


def test_labels_are_as_short_as_possible():
    """Checkpoints of one name get labels of their own; one that is named twice gets a single one."""
    assert list(results.labels(["a/tiny", "a/tiny/", "b/tiny", "b/x/tiny"]).values()) == ["a-tiny", "b-tiny", "x-tiny"]
    assert list(results.labels(["runs/tiny/", "checkpoints/small"]).values()) == ["tiny", "small"]


def test_copies_are_known(overfitted, examined):
    """Training shapes score least, copies of them (other points) a little more, held-out shapes 1."""
    splits, model, args = [exam.prepare(split) for split in ("train", "test")], sample.load(overfitted), None
    sets = [split.cloud(range(len(split)), 2048, data.seeded(0)) for split in splits]
    known, new = (score_memorisation(splits[0], args, model, clouds, sets[1]) for clouds in sets)
    assert known["memorisation"] < known["of copies"] < .9
    assert known["of copies"] == new["of copies"]
    assert new["memorisation"] == pytest.approx(1, abs=1e-3)
    assert score_memorisation(None, args, model, None, None) == {"memorisation": "", "of copies": ""}


# ---------------------------------------------------------------------------- metrics

def test_scores_of_prompts_by_hand():
    prompts, samples = np.array([[1., 0], [0, 1]]), np.array([[0., 2], [3, 4]])   # cosines 0, 1; .6, .8
    assert metrics.prompt_score(prompts, samples) == pytest.approx(.4)
    assert metrics.r_precision(prompts, samples, np.eye(2, dtype=bool)) == .5
    assert metrics.r_precision(prompts, samples, np.ones((2, 2), bool)) == 1


def random_balls(rng, n, centre=0.):
    """n noisy balls of different sizes: n k 3."""
    x = rng.normal(size=(n, 300, 3)) * rng.uniform(.2, 1, (n, 1, 3)) + centre
    return torch.tensor(x, dtype=torch.float)


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
    (lambda x: metrics.diversity(x[None]), "has 1, at least 2"),
    (lambda x: metrics.mmd_cov_1nna(np.stack([x, x]), np.stack([x] * 3)), "not 2 samples and 3"),
    (lambda x: metrics.frechet(x[:1], x), "first set of features has 1"),
    (lambda x: metrics.memorisation(x, x, x), "are training shapes"),
    (lambda x: metrics.memorisation(x, x, x[:0]), "of training shapes has 0")])
def test_what_cannot_be_measured_is_an_error(measure, complaint):
    with pytest.raises(UserError) as caught:
        measure(np.arange(12.).reshape(4, 3))
    assert complaint in str(caught.value)


# ---------------------------------------------------------------------------- prompts that are measured

def test_attributes_are_found():
    """The checkers are right about built-in shapes themselves."""
    right = []
    for index in range(26):
        shape = shapes.make(6, index)
        found = attributes.measure_shape(field_of(TrueHead(shape), torch.zeros(1, 1), torch.no_grad))
        for name, attribute, checker, texts in attributes.ATTRIBUTES:
            value = shape.attributes.get(attribute)
            if shape.name == name and (attribute in ("colour", "second") and value or value in texts):
                right.append(attributes.has_attribute(found, attribute, checker, value))
    assert len(right) > 40 and all(right)


@pytest.mark.parametrize("name, lost", [
    ("table", slice(1, 3)), ("chair", slice(2, 3)), ("stool", slice(1, 2)), ("sofa", slice(-1, None)),
    ("bench", slice(2, 4)), ("mug", slice(3, 6)), ("car", slice(-3, -2))])
def test_lost_parts_are_noticed(name, lost):
    """Held-out shapes are complete; without a leg, a foot, a wheel or a piece of the handle they are not."""
    complete = lambda shape: attributes.complete(attributes.measure_shape(
        field_of(TrueHead(shape), torch.zeros(1, 1), torch.no_grad))[0], name)
    test = [shape for i in range(7) if (shape := BuiltIn("test", classes=[name]).shape(i)).attributes.get("handle", 1)]
    assert all(map(complete, test))
    for shape in test:
        del shape.parts[lost]
    assert test and not any(map(complete, test))


def test_intervals_are_written(tmp_path):
    rows = [{"name": "a", "score": results.interval([.8, .9, 1.])}, {"name": "b", "score": results.interval([2.])}]
    results.write_table(tmp_path, "x", rows)
    assert (tmp_path / "x.csv").read_text().splitlines() == ["name,score", "a,0.900 ± 0.248", "b,2.0"]


def test_a_sample_is_compared_with_the_shape_as_it_stands():
    """Turned in its set, a mug is found as it is turned; compared unturned, its handle points elsewhere."""
    mug, rng = shapes.make(0, shapes.CLASSES.index("mug")), np.random.default_rng(0)
    x, normals, colours = mug.surface(50_000, rng)
    every = torch.tensor(np.stack([x[:1024] @ move.T for move in SYMMETRIES]))
    split = SimpleNamespace(position=range(8), shape=lambda row: mug, cloud=lambda rows, *_: [every[rows]])
    sample = Cloud(x @ SYMMETRIES[2].T, normals @ SYMMETRIES[2].T, colours)
    found, unturned = (crisp.likeness(sample, split, rows, rng) for rows in (np.arange(8), np.arange(1)))
    assert found["Chamfer"] < 1.05 * found["its floor"] and min(found["n15"], found["F@.05"]) > .95
    assert unturned["Chamfer"] > 2 * found["Chamfer"]


def test_crispness_sees_waves_and_wrong_colours():
    """The true field reaches the ceiling; waves of 1 % of its size, which IoU hardly notices, do not."""
    class Wavy(crisp.TrueHead):
        def evaluate(self, memory, x):
            y = super().evaluate(memory, x)
            y[..., 0] += .1 * (60 * x).sin().prod(-1)
            y[..., 1:] = 1 - y[..., 1:]
            return y
    shape, nothing = shapes.make(0, shapes.CLASSES.index("table")), torch.zeros(1, 1)
    true, wavy = (crisp.crispness(head(shape), nothing, shape, np.random.default_rng(0), nullcontext, 64)
                  for head in (crisp.TrueHead, Wavy))
    assert abs(true["mesh n15"] - true["ceiling n15"]) < .01 and true["ceiling n15"] > .8
    assert true["field n15"] > .9 and true["field colours right"] > .95
    assert wavy["field n15"] < .8 * true["field n15"] and wavy["mesh n15"] < .9 * true["mesh n15"]
    assert wavy["field colours right"] < .3
