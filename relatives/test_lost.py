"""test_lost.py - the tests of lost.py, relations.py and search.py.

    python -m pytest -q relatives/test_lost.py
"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from torch import nn

import evaluate
import sample
from conftest import PREPARE, WIDTHS, NoWait, assert_one_line, prompted, rows_of, run, train_small
from engine import files, loop
from engine.commands import UserError
from engine.noise import keys_of
from geometry.built_in import BuiltIn
from geometry.training_samples import PICTURES, SURFACE
from prompts.test_pretrained import pretrained_folder
from relatives import lost, relations, search

SIZE = dict(registers=8, width=6, dim=32, heads=4, encoder=2, decoder=2)
TOKENS = dict(tokens=27, channels=8)
GENERATOR = dict(dim=32, depth=2, heads=4, queries=2, head_dim=32, head_depth=2)
STUDENT = dict(dim=32, depth=1, heads=4)


def awake(model):                                             # random weights also where training starts with zeros
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
    return awake(lost.Generator(8, 6, WIDTHS, **GENERATOR))


# ---------------------------------------------------------------------------- RIDA

def test_contrast_by_hand():
    """Shapes 0 and 1 are alike, 2 is unlike both: of 0 and 1 the loss is -log(e^(s_01 / T) / (e^(s_01 / T) + e^(s_02 /
    T))). 2 has no positive, so it does not count; 3 is in between, whatever s says."""
    t = torch.tensor([[1., .9, .1, .6], [.9, 1., .1, .6], [.1, .1, 1., .6], [.6, .6, .6, 1.]])
    s = torch.tensor([[1., .2, .1, 5.], [.2, 1., .3, 5.], [.1, .3, 1., 5.], [5., 5., 5., 1.]])
    rows = np.log(1 + np.exp((np.array([.1, .3]) - .2) / .07))
    assert lost.contrast(s, t, low=.5, high=.8).item() == pytest.approx(rows.mean(), rel=1e-5)


def test_rank_by_hand():
    """Rows that differ in mean and scale alone have no loss; of rows in opposite order each number is 1 and -1."""
    t = torch.tensor([[1., .2, .4], [.2, 1., .6], [.4, .6, 1.]])
    assert lost.rank(2 * t - .3, t).item() == pytest.approx(0, abs=1e-3)
    assert lost.rank(-t, t).item() == pytest.approx(4, rel=.02)


def test_a_tower_of_pictures_teaches_too(tmp_path):
    """With --image-encoder, a third of the features is what that encoder says of a shape's pictures."""
    names = {"image": str(pretrained_folder(tmp_path / "dinov2", "dinov2"))}      # its tokens have width 32
    split = PREPARE("train", 2, tmp_path, kinds=(SURFACE, PICTURES), workers=1)
    (taught, _), teacher = relations.features(SimpleNamespace(
        train=split, test=split, folder="checkpoints/tiny", device="cpu", encoder_names=names))       # r e
    assert teacher == ["facts", "captions", names["image"]]
    assert torch.allclose(taught.norm(dim=1), torch.tensor(1.), atol=1e-4)
    assert torch.allclose(taught[:, -32:].norm(dim=1), torch.tensor(3 ** -.5), atol=1e-4)
    assert taught[:, -32:].var(0).sum() > .01


def test_thresholds_need_two_shapes_that_differ():
    with pytest.raises(UserError, match="nothing to learn"):
        relations.thresholds(torch.ones(5, 3))


# ---------------------------------------------------------------------------- registers

def test_registers_see_earlier_registers_alone(codec):
    """Another register 5 changes registers 5 to 8, and no other; another shape changes all. Without blocks, register i
    depends on token order_i alone; no two begin as the same."""
    def changed(x):
        return ((codec.encoder(x) - before).abs().amax((0, 2)) > 1e-5).tolist()

    x, order = torch.randn(2, 27, 8), codec.encoder.order
    before = codec.encoder(x)
    assert all(changed(x + torch.randn_like(x)))
    with torch.no_grad():
        codec.encoder.register[4] = torch.randn(32)
    assert changed(x) == [False] * 4 + [True] * 4
    codec.encoder.blocks = nn.ModuleList()
    before = codec.encoder(x)
    assert changed(torch.where(torch.arange(27)[:, None] == order[3], 0., x)) == [i == 3 for i in range(8)]
    assert len({*order.tolist()}) == codec.count


def test_absent_registers_are_not_seen(codec):
    """The flow with three registers of eight is the flow with three."""
    x, t, r = torch.randn(2, 27 * 8), torch.tensor([.2, .7]), torch.randn(2, 8, 6)
    there = (torch.arange(8) < 3).expand(2, 8)
    masked = codec.decoder.velocity(x, t, there, codec.decoder.read(r))
    short = codec.decoder.velocity(x, t, there[:, :3], codec.decoder.read(r[:, :3]))
    assert torch.allclose(masked, short, atol=1e-5)


def test_a_shape_of_registers_depends_on_its_seed_alone(codec):
    r = torch.randn(1, 3, 6).expand(3, 3, 6)
    one, same, other = codec.decode(r, keys_of([1, 1, 2]))
    assert torch.allclose(one, same, atol=1e-5)
    assert not torch.allclose(one, other, atol=1e-2)
    assert torch.allclose(codec.decode(r[:1], keys_of([2]))[0], other, atol=1e-4)


@pytest.mark.parametrize("size", lost.SIZES)
def test_every_size_can_be_built(size):
    """There are no more registers than tokens."""
    with torch.device("meta"):
        codec = lost.Codec(**lost.SIZES[size], **TOKENS)
        lost.Student(**lost.STUDENTS[size], **TOKENS)
        lost.Generator(codec.count, codec.width, WIDTHS, **lost.GENERATORS[size])
        assert codec.encoder(torch.randn(1, 27, 8)).shape == (1, 27, codec.width)
    assert (codec.count, codec.lengths) == (27, [1, 2, 4, 8, 16, 27])


def test_the_true_velocity_has_no_loss(codec, monkeypatch):
    """With v = x - noise, x' is x: no error, and the same meaning. Of each shape 1, 2, 4 or 8 registers are there."""
    x, masks = torch.randn(40, 27, 8), []
    monkeypatch.setattr(codec.decoder, "velocity", lambda noisy, t, there, memory:
                        masks.append(there) or (x.flatten(1) - noisy) / (1 - t[:, None]))
    _, logs = codec.loss(x, lambda x: nn.functional.normalize(x.flatten(1), dim=-1))
    assert [logs["flow"].item(), logs["meaning"].item()] == pytest.approx([0, 0], abs=1e-5)
    counts = masks[0].sum(1)
    assert {*counts.tolist()} == {1, 2, 4, 8}
    assert torch.equal(masks[0], torch.arange(8) < counts[:, None])


def test_the_student_teaches_the_decoder(codec, monkeypatch):
    """RIDA changes the gradient of the decoder, and leaves the frozen student alone."""
    student = lost.Student(**TOKENS, **STUDENT).requires_grad_(False)
    x, gradients = torch.randn(4, 27, 8), []
    for weight in (.5, 0.):
        monkeypatch.setattr(lost.Codec, "MEANING", weight)
        torch.manual_seed(0)
        codec.loss(x, student)[0].backward()
        gradients.append(codec.decoder.out[-1].weight.grad)
        codec.zero_grad()                                     # to None
    assert not torch.allclose(*gradients, atol=1e-5)
    assert all(p.grad is None for p in student.parameters())


# ---------------------------------------------------------------------------- generator

def test_cached_is_uncached(generator, monkeypatch):
    """The context vectors of sampling, with the cache, are those of one pass over all registers."""
    contexts, condition = [], prompted()
    monkeypatch.setattr(lost.Flow, "sample", lambda net, z, noise, *_: contexts.append(z) or noise(1)[:, 0])
    r = generator.generate(condition, keys_of(range(3)), cfg=1.)
    monkeypatch.setattr(lost.Flow, "loss", lambda net, x, z: z)
    z, _ = generator.loss(r, condition)
    assert torch.allclose(torch.stack(contexts, 1).flatten(0, 1), z[:24], atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch(generator):
    """Nor do its first registers depend on how many follow."""
    both = prompted(2)
    one = {kind: (tokens[1:], mask[1:]) for kind, (tokens, mask) in both.items()}
    few, every = generator.generate(one, keys_of([5]), registers=3), generator.generate(both, keys_of([4, 5]))
    assert torch.allclose(few, every[1:, :3], atol=1e-4)


def test_sampling_does_not_wait(codec, generator, monkeypatch):
    condition, keys = prompted(), keys_of(range(3))
    monkeypatch.delattr(np.random, "default_rng")             # all numbers are drawn on the device
    with NoWait():
        lost.generate_tokens(codec, generator, condition, keys)


def test_recomputed_blocks_learn_the_same(generator):
    """--recompute: the same gradients; the blocks run twice."""
    runs, gradients, condition, x = [], [], prompted(), torch.randn(3, 8, 6)
    generator.blocks[0].feed.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(2):
        torch.manual_seed(0)
        gradients += torch.autograd.grad(generator.loss(x, condition)[0], generator.token.weight)
        loop.recompute_blocks(generator)
    assert torch.allclose(*gradients, atol=1e-6) and len(runs) == 1 + 2


# ---------------------------------------------------------------------------- as a whole

@pytest.mark.chain
def test_all_stages_end_to_end(examined, tmp_path, monkeypatch, capsys):
    """The chain, on another folder's tokenizer; tables; a prompt becomes a mesh; a search finds it; mistakes are one
    line."""
    for sizes, size in ((lost.SIZES, SIZE), (lost.STUDENTS, STUDENT), (lost.GENERATORS, GENERATOR)):
        monkeypatch.setitem(sizes, "tiny", size | {"dim": 64})
    folder, out = tmp_path / "run", tmp_path / "out"
    flags = "--model", "lost", "--size", "tiny", "--from", "checkpoints/tiny", "--batch", 4, "--steps", 3
    assert train_small(monkeypatch, folder, 4, *flags, "--micro-batches", 2) == 2
    assert_one_line(capsys.readouterr().err, "lost-student compares shapes; give --batch 6 or more")
    assert train_small(monkeypatch, folder, 4, *flags) == 0
    assert {"lost-student", "lost-registers", "lost-generator"} <= {*files.trained_stages(folder)}

    table = "--checkpoint", folder, "--out", tmp_path
    assert run(evaluate.main, "registers", *table, "--shapes", 1) == 0
    assert [row["registers"] for row in rows_of(tmp_path / "registers")] == ["1", "2", "4", "8", "(its tokens)"]
    assert run(evaluate.main, "search", *table) == 0
    assert len(rows_of(tmp_path / "search")) == 5

    sampled = "--text", "a table", "--checkpoint", folder, "--resolution", 32, "--out", out
    seeds = range(8)                                          # after three steps of training, some samples are empty
    assert any(run(sample.main, *sampled, "--registers", 2, "--seed", seed) == 0 for seed in seeds)
    look = "search", "--checkpoint", folder, "--in", out, "--out", tmp_path / "found", "--query"
    for query, sheet in (("a table", "a-table"), (out / "a-table-lost-0.png", "a-table-lost-0-png")):
        assert run(lost.main, *look, query) == 0
        assert (tmp_path / f"found/search-{sheet}.png").is_file()
    trimesh.creation.icosphere(radius=.5).export(out / "a-ball.glb")
    capsys.readouterr()
    assert run(lost.main, *look, out / "a-ball.glb") == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first == "1.000  a-ball.glb" and second.endswith("a-table-lost-0.glb")


@pytest.mark.chain
def test_one_register_leaves_open_what_all_decide():
    """Shipped weights: of a chair's first register each seed makes another shape, in one piece; of all, nearly one."""
    model, heads = lost.open_tokenizer("checkpoints/lost", ["sdf"], "cpu")
    cloud = search.cloud_of(BuiltIn("test", 1, ["chair"]).shape(0), model.points)             # 1 k 3 each
    r = model.codec.encoder(model.tokenizer(*cloud))                                          # 1 m w
    keys = keys_of(range(16))
    first, every = (model.codec.decode(r[:, :k].expand(16, -1, -1), keys) for k in (1, model.codec.count))
    assert first.var(0).mean() > 3 * every.var(0).mean()      # 4.6 times; of four samples, 2.8 to 7.4
    assert all(heads["sdf"].decode(x, heads, None, resolution=32).soundness()["one piece"] for x in first[:4])
