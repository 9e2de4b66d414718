"""test_vat.py - the tests of vat.py, codes.py and compression.py.

    python -m pytest -q relatives/test_vat.py
"""
import csv

import numpy as np
import pytest
import torch
import trimesh
from torch import nn
from torch.distributions import Normal, kl_divergence

import evaluate
import sample
from conftest import WIDTHS, NoWait, prompted, run, train_small
from engine import files
from engine.commands import UserError
from engine.noise import keys_of
from relatives import codes, vat
from representations.sdf import grid_iou

PARTS = dict(side=4, channels=8, codes=64, scales="1 2 3 4")
SIZE = PARTS | dict(features=6, dim=32, heads=4, depth=1)


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return vat.Tokenizer(**SIZE).eval()


@pytest.fixture
def generator(tokenizer):
    model = vat.Generator(**PARTS, widths=WIDTHS, dim=32, depth=2, heads=4, queries=2).eval()
    nn.init.normal_(model.out.weight)
    model.quantiser.load_state_dict(tokenizer.quantiser.state_dict())
    return model


# ---------------------------------------------------------------------------- tokenizer

def test_every_code_is_the_nearest_to_what_is_left(tokenizer):
    """At each scale: to the mean of z less what earlier scales say."""
    quantiser, z = tokenizer.quantiser, torch.randn(3, 64, 8)
    indices, grid = quantiser.encode(z), z.mT.unflatten(2, (4, 4, 4))             # b N, b c S S S
    for s, f, chosen in zip(quantiser.scales, quantiser.decode(indices), indices.split([1, 8, 27, 64], 1)):
        left = vat.as_rows(vat.down(grid - f, s))                                 # b s^3 c
        assert (torch.cdist(left, quantiser.book.code).argmin(-1) == chosen).all()


def test_latents_and_codes_pull_each_other(tokenizer):
    """The gradient of latents: COMMIT mean (f_k - z)^2 over all k, and what reaches them straight through; of codes:
    mean (f_k - z)^2."""
    quantiser, z = tokenizer.quantiser, torch.randn(2, 64, 8, requires_grad=True)
    latents, loss, indices = quantiser(z)
    f = torch.stack([vat.as_rows(f) for f in quantiser.decode(indices)[1:]])      # K b n c
    assert torch.allclose(latents, f[-1], atol=1e-6)
    pull, = torch.autograd.grad(((f - z.detach()) ** 2).mean(), quantiser.book.code)
    (latents.sum() + loss).backward()
    assert torch.allclose(z.grad, 1 + .25 * 2 * (z - f).mean(0) / z.numel(), atol=1e-6)
    assert torch.allclose(quantiser.book.code.grad, pull, atol=1e-6)


def test_the_divergence_is_that_of_gaussians(tokenizer):
    points, normals, colours = cloud = torch.rand(3, 1, 100, 3)
    samples = {"points": points, "colours": colours, "queries": points, "distance": torch.rand(1, 100) * .2 - .1,
               "coloured": torch.ones(1)}
    mean, log_variance = tokenizer.encoder(*cloud).chunk(2, -1)                   # b n c each
    own = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0., 1.)).sum(-1).mean()
    _, logs = tokenizer.loss(vat.Decoder(**SIZE), cloud, samples, quantised=False)
    assert torch.allclose(logs["kl"], own, rtol=1e-4)


def test_occupancy_is_that_of_the_distance():
    """Its cross-entropy is lower for the true distance than for the opposite."""
    distance = torch.linspace(-.1, .1, 9)[None]
    y = nn.functional.pad(distance / .1, (0, 1))[..., None].expand(-1, -1, 4)     # 1 10 4; the last is on the surface
    batch = {"queries": torch.zeros(1, 9, 3), "distance": distance, "colours": torch.zeros(1, 1, 3),
             "coloured": torch.ones(1)}
    right, wrong = (vat.Decoder(**SIZE).errors(x, batch)[1]["occupancy"] for x in (y, -y))
    assert right < .5 * wrong


def test_codes_out_of_use_are_revived(tokenizer):
    """Codes that no vector is near become vectors of the batch; the one that all are nearest to stays."""
    book, x = tokenizer.quantiser.book.train(), torch.randn(4, 64, 8)
    book.code.data = 100. * (torch.arange(64) > 0)[:, None].repeat(1, 8)
    book.use.fill_(.02)
    book.nearest(x)
    assert not book.code[0].any()
    assert torch.cdist(book.code[1:], x.flatten(0, 1)).min(1).values.max() < .01


@torch.no_grad()
def test_a_plane_reads_columns():
    """A token that changes is seen in each plane in the cells that stand for its column, and in those beside them."""
    torch.manual_seed(0)
    planes, tokens = vat.ToPlanes(4, 16, (8, 8, 8)), torch.randn(1, 64, 16).repeat(2, 1, 1)
    planes.norm = nn.ModuleList(nn.Identity() for _ in range(3))                  # group norms see everything
    tokens[1, (0 * 4 + 1) * 4 + 3] += 1                       # x 0, y 1, z 3
    level = planes(tokens)[0].unflatten(0, (2, 3))                                # 2 3 f 16 16
    for plane, (u, v) in zip((level[0] - level[1]).abs().amax(1), ((0, 1), (1, 3), (3, 0))):      # xy, yz, zx
        assert plane[4 * u:4 * u + 4, 4 * v:4 * v + 4].min() > 0                  # 4 x 4 cells a token
        plane[max(0, 4 * u - 2):4 * u + 6, max(0, 4 * v - 2):4 * v + 6] = 0
        assert plane.max() == 0


@pytest.mark.parametrize("size, count, size_of_file", [("tiny", 228, 299), ("large", 2214, 3889)])
def test_every_size_can_be_built(size, count, size_of_file):
    """Its codes and files are as large as the README says."""
    parts = vat.SIZES[size]
    with torch.device("meta"):
        quantiser = vat.Tokenizer(**parts).quantiser
        levels = vat.Decoder(**parts).read(torch.zeros(1, parts["side"] ** 3, parts["channels"]))
        vat.Generator(**{key: parts[key] for key in PARTS}, **vat.GENERATORS[size], widths=WIDTHS)
    assert [level.shape[-1] for level in levels] == [4 * parts["side"] * k for k in (1, 2, 4)]
    assert (sum(quantiser.counts), codes.file_size(count, quantiser.book.bits)) == (count, size_of_file)


def test_impossible_scales_are_refused():
    for scales in ("1 2 -1", "1 2 9999", "1 2 x", "1 2 0"):
        with pytest.raises(ValueError):
            vat.Quantiser(**PARTS | {"scales": scales})


# ---------------------------------------------------------------------------- generator

def test_cached_is_uncached(generator, monkeypatch):
    """Without noise and guidance, what is sampled with the cache is what one pass over all scales finds likeliest."""
    sampled, guesses, up, condition = [], [], generator.quantiser.up, prompted()
    monkeypatch.setattr(generator.quantiser, "up", lambda chosen, k: sampled.append(chosen) or up(chosen, k))
    generator.generate(condition, keys_of(range(3)), cfg=1., temperature=0.)
    indices = torch.cat(sampled, 1)                                               # b N
    generator.out.register_forward_hook(lambda module, inputs, out: guesses.append(out.argmax(-1)))
    generator.loss(indices, condition)
    assert torch.equal(guesses[0], indices)


def test_a_sample_depends_on_its_seed_and_guidance_not_on_its_batch(generator):
    both = prompted(2)
    one = {kind: (tokens[1:], mask[1:]) for kind, (tokens, mask) in both.items()}
    alone, guided, other = (generator.generate(one, keys_of([seed]), cfg) for seed, cfg in ((5, 1.), (5, 4.), (6, 1.)))
    assert torch.allclose(alone, generator.generate(both, keys_of([4, 5]), 1.)[1:], atol=1e-4)
    assert not torch.equal(alone, guided) and not torch.equal(alone, other)


def test_sampling_does_not_wait(generator, monkeypatch):
    condition, keys = prompted(), keys_of(range(3))
    monkeypatch.delattr(np.random, "default_rng")             # all numbers are drawn on the device
    with NoWait():
        generator.generate(condition, keys, top_k=5, top_p=.9)


@pytest.mark.parametrize("options, shares", [(dict(top_k=1), [0, 0, 1]), (dict(top_p=.6), [0, .444, .556]),
                                             (dict(top_k=9), [.1, .4, .5]), ({}, [.1, .4, .5])])
def test_codes_are_drawn_by_their_probabilities(options, shares):
    logits = torch.log(torch.tensor([.1, .4, .5])).expand(1, 5000, 3)
    found = codes.draw_codes(logits, keys_of([0]), 0, **dict(top_k=None, top_p=1., temperature=1.) | options)
    counts = found.flatten().bincount(minlength=3)
    assert (counts / 5000).tolist() == pytest.approx(shares, abs=.03)
    assert (counts > 0).tolist() == [share > 0 for share in shares]


# ---------------------------------------------------------------------------- files of codes, commands

def test_codes_survive_a_file_or_it_is_refused(tmp_path):
    path, numbers, book = tmp_path / "a.vat", np.random.default_rng(0).integers(1000, size=100), codes.Codebook(1000, 8)
    codes.write_codes(path, numbers, 10, "0123456789ab")
    raw = path.read_bytes()
    assert len(raw) == 14 + 125 and (codes.read_codes(path, book, 100, "0123456789ab") == numbers).all()
    codes.write_codes(path, [*numbers[1:], 1010], 10, "0123456789ab")             # beyond the codebook
    beyond, flipped = path.read_bytes(), {i: raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1:] for i in (0, 4, 10, 138)}
    for damaged, complaint in ((beyond, "altered"), (raw[:50], "altered"), (raw + b"0", "altered"),
                               (flipped[10], "altered"), (flipped[138], "altered"), (b"", "no file that"),
                               (raw[:10], "no file that"), (flipped[0], "no file that"), (flipped[4], "with weights")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=complaint):
            codes.read_codes(path, book, 100, "0123456789ab")


@pytest.mark.chain
def test_all_stages_end_to_end(examined, tmp_path, monkeypatch, capsys):
    """The chain, on towers of another folder; fine-tuning; a prompt becomes a mesh, codes, and a mesh again; a table of
    scales; mistakes are one line. Grids are coarse."""
    decode = vat.Decoder.decode
    monkeypatch.setattr(vat.Decoder, "decode", lambda self, x, *rest, **more: decode(self, x, {}, None, resolution=32))
    monkeypatch.setattr(grid_iou, "__defaults__", (32,))
    monkeypatch.setitem(vat.SIZES, "tiny", SIZE | {"dim": 64, "scales": "1 4"})
    monkeypatch.setitem(vat.GENERATORS, "tiny", dict(dim=64, depth=1, heads=4, queries=2))
    folder, other, out = tmp_path / "run", tmp_path / "other", tmp_path / "out"
    flags = "--model", "vat", "--size", "tiny", "--batch", 2
    assert train_small(monkeypatch, folder, 2, *flags, "--from", "checkpoints/tiny", "--steps", 12, "--lr", 6e-3) == 0
    phases = [next(csv.DictReader((folder / f"vat-{phase}.csv").open())) for phase in ("latents", "codes", "decoder")]
    assert float(phases[2]["loss"]) < .8 * float(phases[0]["loss"])               # each goes on with the one before
    flags += "--from", folder, "--finetune", "--stage", "vat-decoder", "--steps", 1
    assert train_small(monkeypatch, other, 2, *flags) == 0
    assert "vat-generator" in files.trained_stages(other)

    checkpoint = "--checkpoint", folder
    assert run(sample.main, "--text", "a table", "--top-k", 5, "--out", out, *checkpoint) == 0
    assert run(vat.main, "compress", out / "a-table-vat-0.glb", out / "a.vat", *checkpoint) == 0
    assert "what comes back" in capsys.readouterr().out
    assert run(vat.main, "decompress", out / "a.vat", out / "b.glb", *checkpoint) == 0
    assert len(trimesh.load(out / "b.glb", force="mesh").faces)
    assert run(evaluate.main, "scales", *checkpoint, "--shapes", 1, "--out", out) == 0
    assert [row["bytes"] for row in csv.DictReader((out / "scales.csv").open())] == ["15", "63"]      # of 6 bits a code
