"""test_lost.py - the tests of lost.py.

    python -m pytest -q test_lost.py
"""
import math
from types import SimpleNamespace

import lost
import numpy as np
import pytest
import torch
import trimesh
from evaluation import registers
from torch import nn

import evaluate
import sample
import tokenizer
from conftest import WIDTHS, assert_one_line, prompted, rows_of, run, train_small
from engine import files, loop
from engine.commands import UserError
from geometry.built_in import BuiltIn
from prompts import relations
from prompts.test_pretrained import pretrained_folder

SIZE = dict(registers=8, width=6, dim=32, heads=4, encoder=2, decoder=2)
TOKENS = dict(tokens=27, channels=8)


def awake(model):
    """Random weights everywhere, also where training starts with zeros."""
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=.15)
    return model.eval()


@pytest.fixture
def codec():
    torch.manual_seed(0)
    return awake(lost.Codec(**SIZE, **TOKENS))


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return awake(lost.Generator(8, 6, WIDTHS, dim=32, depth=2, heads=4, prefix=2, head_dim=32, head_depth=2))


# ---------------------------------------------------------------------------- RIDA

def test_contrast_by_hand():
    """Shapes 0 and 1 are alike, 2 is unlike both: of 0 and 1 the loss is -log(e^(s_01 / T) / (e^(s_01 / T) + e^(s_02 /
    T))); 2 has no positive, so it does not count."""
    t = torch.tensor([[1., .9, .1], [.9, 1., .1], [.1, .1, 1.]])
    s = torch.tensor([[1., .2, .1], [.2, 1., .3], [.1, .3, 1.]])
    rows = [math.log(1 + math.exp((other - .2) / .07)) for other in (.1, .3)]
    assert lost.contrast(s, t, low=.5, high=.8).item() == pytest.approx(np.mean(rows), rel=1e-5)


def test_shapes_in_between_do_not_count():
    """A similarity between the thresholds makes neither a positive nor a negative."""
    t = torch.tensor([[1., .9, .6, .1], [.9, 1., .6, .1], [.6, .6, 1., .1], [.1, .1, .1, 1.]])
    s = torch.rand(4, 4)
    other = s.clone()
    other[:2, 2] = 5.
    assert torch.equal(lost.contrast(s, t, .5, .8), lost.contrast(other, t, .5, .8))


def test_rank_by_hand():
    """Rows that differ in mean and scale alone have no loss; of rows in opposite order each number is 1 and -1."""
    t = torch.tensor([[1., .2, .4], [.2, 1., .6], [.4, .6, 1.]])
    assert lost.rank(2 * t - .3, t).item() == pytest.approx(0, abs=1e-3)
    assert lost.rank(-t, t).item() == pytest.approx(4, rel=.02)


def test_a_tower_of_pictures_teaches_too(prepared, overfitted, tmp_path):
    """With --image-encoder, a third of the features is what that encoder makes of a shape's pictures."""
    name = str(pretrained_folder(tmp_path / "dinov2", "dinov2"))
    train, test = prepared
    run = lambda name: SimpleNamespace(train=train, test=test, folder=overfitted, device="cpu",
                                       encoder_names={"image": name})
    (plain, _), teacher = relations.features(run("pixels"))
    (taught, held_out), teacher_too = relations.features(run(name))
    assert (teacher, teacher_too) == (["facts", "captions"], ["facts", "captions", name])
    assert torch.allclose(taught[:, :plain.shape[1]] * 3 ** .5, plain * 2 ** .5, atol=1e-5)
    assert torch.allclose(taught.norm(dim=1), torch.ones(len(train)), atol=1e-4)
    assert held_out[:, plain.shape[1]:].var(0).sum() > .01


def test_thresholds_need_two_shapes_that_differ():
    with pytest.raises(UserError, match="nothing to learn"):
        relations.thresholds(torch.ones(5, 3))


# ---------------------------------------------------------------------------- registers

def test_registers_see_earlier_registers_alone(codec):
    """Another register 5 changes registers 5 to 8, and no other."""
    x = torch.randn(2, 27, 8)
    before = codec.encoder(x)
    with torch.no_grad():
        codec.encoder.register[4] = torch.randn(32)
    changed = (codec.encoder(x) - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 4 + [True] * 4


def test_a_register_begins_as_its_token(codec):
    """Without blocks, register i says what token order_i says, and nothing else. No two begin as the same."""
    codec.encoder.blocks = nn.ModuleList()
    x = torch.randn(2, 27, 8)
    other = x.clone()
    other[:, codec.encoder.order[3]] = 0.
    changed = (codec.encoder(other) - codec.encoder(x)).abs().amax((0, 2)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [3]
    assert len({*codec.encoder.order.tolist()}) == codec.count


def test_there_are_no_more_registers_than_tokens():
    codec = lost.Codec(**SIZE | {"registers": 64}, **TOKENS)
    assert (codec.count, codec.lengths) == (27, [1, 2, 4, 8, 16, 27])
    assert codec.encoder(torch.randn(1, 27, 8)).shape == (1, 27, 6)


def test_every_register_depends_on_the_shape(codec):
    x = torch.randn(2, 27, 8)
    assert ((codec.encoder(x) - codec.encoder(x + torch.randn(2, 27, 8))).abs().amax((0, 2)) > 1e-3).all()


def test_absent_registers_are_not_seen(codec):
    """The flow with three registers of eight is the flow with three."""
    x, t, r = torch.randn(2, 27 * 8), torch.tensor([.2, .7]), torch.randn(2, 8, 6)
    there = (torch.arange(8) < 3).expand(2, 8)
    masked = codec.decoder.velocity(x, t, there, codec.decoder.read(r))
    short = codec.decoder.velocity(x, t, there[:, :3], codec.decoder.read(r[:, :3]))
    assert torch.allclose(masked, short, atol=1e-5)


def test_a_shape_of_registers_depends_on_its_seed_alone(codec):
    r = torch.randn(1, 3, 6).expand(3, 3, 6)
    one, same, other = codec.decode(r, [1, 1, 2])
    assert torch.allclose(one, same, atol=1e-5)
    assert not torch.allclose(one, other, atol=1e-2)
    assert torch.allclose(codec.decode(r[:1], [2])[0], other, atol=1e-4)


@pytest.mark.parametrize("size", lost.SIZES)
def test_every_size_can_be_built(size):
    with torch.device("meta"):
        codec = lost.Codec(**lost.SIZES[size], tokens=1000, channels=32)
        lost.Student(**lost.STUDENTS[size], tokens=1000, channels=32)
        lost.Generator(codec.count, codec.width, WIDTHS, **lost.GENERATORS[size])
    assert codec.lengths[-1] == codec.count


def test_the_true_velocity_has_no_loss(codec, monkeypatch):
    """With v = x - noise, x' is x: no error, and the same meaning. The registers that are there are the first 1, 2, 4
    or 8."""
    x, seen = torch.randn(40, 27, 8), []

    def true(noisy, t, there, memory):
        seen.append(there)
        return (x.flatten(1) - noisy) / (1 - t[:, None])
    monkeypatch.setattr(codec.decoder, "velocity", true)
    _, logs = codec.loss(x, lambda x: nn.functional.normalize(x.flatten(1), dim=-1))
    assert logs["flow"].item() == pytest.approx(0, abs=1e-6)
    assert logs["meaning"].item() == pytest.approx(0, abs=1e-5)
    counts = seen[0].sum(1)
    assert {*counts.tolist()} == {1, 2, 4, 8}
    assert torch.equal(seen[0], torch.arange(8) < counts[:, None])


def test_the_student_teaches_the_decoder(codec, monkeypatch):
    """RIDA changes the gradient of the decoder, and leaves the frozen student alone."""
    student = lost.Student(**TOKENS, dim=32, depth=1, heads=4).requires_grad_(False)
    x, gradients = torch.randn(4, 27, 8), []
    for weight in (.5, 0.):
        monkeypatch.setattr(lost.Codec, "MEANING", weight)
        torch.manual_seed(0)
        codec.zero_grad()
        codec.loss(x, student)[0].backward()
        gradients.append(codec.decoder.out[-1].weight.grad.clone())
    assert not torch.allclose(*gradients, atol=1e-5)
    assert all(p.grad is None for p in student.parameters())


# ---------------------------------------------------------------------------- generator

def test_cached_is_uncached(generator, monkeypatch):
    """The context vectors of sampling, with the cache, are those of one pass over all registers."""
    seen = []
    monkeypatch.setattr(lost.Flow, "sample", lambda net, c, noise, *_: seen.append(c) or noise[:, 0])
    condition = prompted()
    r = generator.generate(condition, range(3), cfg=1.)
    monkeypatch.setattr(lost.Flow, "loss", lambda net, x, c: c)
    c, _ = generator.loss(r, condition)
    assert torch.allclose(torch.stack(seen, 1).flatten(0, 1), c[:24], atol=1e-4)


def test_fewer_registers_are_the_first(generator):
    condition = prompted()
    assert torch.allclose(generator.generate(condition, range(3), registers=3),
                          generator.generate(condition, range(3))[:, :3], atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch(generator):
    both = prompted(2)
    one = {kind: (tokens[1:], mask[1:]) for kind, (tokens, mask) in both.items()}
    assert torch.allclose(generator.generate(one, [5]), generator.generate(both, [4, 5])[1:], atol=1e-4)


def test_recomputed_blocks_learn_the_same(generator):
    """--recompute: the same gradients; the blocks run twice."""
    runs, condition, x = [], prompted(), torch.randn(3, 8, 6)
    generator.blocks[0].feed.register_forward_hook(lambda *_: runs.append(1))
    gradients = []
    for _ in range(2):
        generator.zero_grad()
        torch.manual_seed(0)
        generator.loss(x, condition)[0].backward()
        gradients.append(generator.token.weight.grad.clone())
        loop.recompute_blocks(generator)
    assert torch.allclose(*gradients, atol=1e-6)
    assert len(runs) == 1 + 2


# ---------------------------------------------------------------------------- as a whole

def test_search_finds_what_shares_most():
    """The nearest of 0, 1 and 3 is their best match; the best match of 2 is 0, the furthest of all but 4, which has
    nothing in common with any."""
    x = np.array([[1, 0], [.9, .1], [0, 1], [.1, .9], [-1, -1]])
    shared = np.eye(5)
    shared[:4, :4] = [[1, .5, .5, 0], [.5, 1, 0, 0], [.5, 0, 1, .2], [0, 0, .2, 1]]
    assert registers.recall(x, shared, 1) == .75
    assert registers.recall(x, shared, 3) == 1


def test_all_stages_end_to_end(overfitted, examined, tmp_path, monkeypatch, capsys):
    """The chain, with the tokenizer of another folder; a prompt becomes a mesh, of few registers or all; a search finds
    the mesh in its folder; it sits the exams."""
    monkeypatch.setitem(lost.SIZES, "small", SIZE | {"dim": 64})
    monkeypatch.setitem(lost.STUDENTS, "small", dict(dim=64, depth=1, heads=4))
    monkeypatch.setitem(lost.GENERATORS, "small", dict(dim=64, depth=1, heads=4, prefix=2, head_dim=64, head_depth=1))
    folder = tmp_path / "run"
    flags = "--model", "lost", "--from", overfitted, "--steps", 3, "--batch", 4
    assert train_small(monkeypatch, folder, 4, *flags) == 0
    assert {"lost-student", "lost-registers", "lost-generator"} <= {*files.trained_stages(folder)}

    flags = "--checkpoint", folder, "--resolution", 32
    out = tmp_path / "out"
    assert run(sample.main, "--text", "a table", "--registers", 2, "--out", out, *flags) == 0
    assert run(sample.main, "--text", "a table", "--top-k", 2, "--out", out, *flags) == 2
    assert run(sample.main, "--text", "a table", "--registers", 9, "--out", out, *flags) == 2
    assert "9 registers are not between 1 and 8" in capsys.readouterr().err

    search = "search", "--in", out, "--checkpoint", folder, "--out", tmp_path / "found"
    for query, sheet in (("a table", "search-a-table.png"), (out / "a-table-0.png", "search-a-table-0-png.png")):
        assert run(lost.main, "--query", query, *search) == 0
        assert (tmp_path / "found" / sheet).is_file()
    trimesh.creation.icosphere(radius=.5).export(out / "a-ball.glb")
    capsys.readouterr()
    assert run(lost.main, "--query", out / "a-ball.glb", *search) == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first == "1.000  a-ball.glb" and second.endswith("a-table-0.glb")
    for name in "none.glb", "none.gif", "none":
        assert run(lost.main, "--query", out / name, *search) == 2
        assert_one_line(capsys.readouterr().err, "there is no file")
    assert run(lost.main, "--query", "a table", *search[:2], tmp_path / "none", *search[3:]) == 2

    flags = "--checkpoint", folder, "--scorer", overfitted, "--out", tmp_path / "exams", "--cache", tmp_path / "cache"
    assert run(evaluate.main, "registers", *flags, "--shapes", 2) == 0
    assert run(evaluate.main, "search", *flags) == 0
    capsys.readouterr()
    assert run(evaluate.main, "ablate-rida", *flags) == 2
    assert_one_line(capsys.readouterr().err, "trains lost-registers itself")
    assert [row["registers"] for row in rows_of(tmp_path / "exams/registers")] == ["1", "2", "4", "8", "(its tokens)"]


def test_one_register_leaves_open_what_all_decide():
    """Shipped weights: from the first register of a chair every seed gives another shape, in one piece; from all
    registers nearly the same."""
    model = sample.load(lost.SHIPPED)
    codec, encoder = lost.load_codec(lost.SHIPPED), tokenizer.load(lost.SHIPPED)
    chair = BuiltIn("test", 1, ["chair"]).shape(0)
    cloud = chair.surface(encoder.points, np.random.default_rng(0))               # k 3 each
    registers = codec.encoder(encoder(*(torch.from_numpy(np.float32(x))[None] for x in cloud)))
    first, all_of_them = (codec.decode(registers[:, :k].expand(4, -1, -1), range(4)) for k in (1, codec.count))
    assert first.var(0).mean() > 4 * all_of_them.var(0).mean()
    assert all(model.decode(tokens, resolution=32).soundness()["one piece"] for tokens in first)


def test_a_student_needs_shapes_to_compare(overfitted, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(lost.SIZES, "small", SIZE)
    flags = "--model", "lost", "--from", overfitted, "--steps", 1, "--batch", 4, "--micro-batches", 2
    assert train_small(monkeypatch, tmp_path, 2, *flags) == 2
    assert_one_line(capsys.readouterr().err, "lost-student compares shapes; give --batch 6 or more")


def test_without_weights_is_one_line(tmp_path, capsys):
    assert run(lost.main, "search", "--query", "a table", "--in", tmp_path, "--checkpoint", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "holds no lost-student")
