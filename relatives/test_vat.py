"""test_vat.py - the tests of vat.py.

    python -m pytest -q test_vat.py
"""
import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh
import vat
from evaluation import scales, vat_parts

import evaluate
import sample
import train
from conftest import assert_one_line, run, train_small
from engine import codes, files
from engine.commands import UserError

SIZE = dict(side=4, channels=8, codes=64, scales="1 2 3 4", features=6, dim=32, heads=4, depth=1)
PARTS = {key: SIZE[key] for key in ("side", "channels", "codes", "scales")}


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return vat.Tokenizer(**SIZE).eval()


@pytest.fixture
def generator(tokenizer):
    model = vat.Generator(**PARTS, widths={"text": 16}, dim=32, depth=2, heads=4, prefix=2).eval()
    torch.nn.init.normal_(model.out.weight)
    model.quantiser.load_state_dict(tokenizer.quantiser.state_dict())
    return model


def condition(b):
    torch.manual_seed(1)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 2, 5, 1])[:b, None]
    return {"text": (torch.randn(b, 5, 16), mask)}


# ---------------------------------------------------------------------------- quantiser

def test_every_code_is_the_nearest_to_what_is_left(tokenizer):
    """At every scale: to the mean of z less what the scales before say."""
    quantiser, z = tokenizer.quantiser, torch.randn(3, 64, 8)
    indices, grid = quantiser.encode(z), z.mT.unflatten(2, (4, 4, 4))             # b N, b c S S S
    for s, f, chosen in zip(quantiser.scales, quantiser.decode(indices), indices.split([1, 8, 27, 64], 1)):
        left = vat.as_rows(vat.down(grid - f, s))                                 # b s^3 c
        assert (torch.cdist(left, quantiser.book.code).argmin(-1) == chosen).all()


def test_latents_are_pulled_to_their_codes(tokenizer):
    """The commitment: the gradient of COMMIT mean (f_k - z)^2, over all k."""
    z = torch.randn(2, 64, 8, requires_grad=True)
    _, loss, indices = tokenizer.quantiser(z)
    loss.backward()
    f = torch.stack([vat.as_rows(f) for f in tokenizer.quantiser.decode(indices)[1:]])       # K b n c
    assert torch.allclose(z.grad, .25 * 2 * (z - f).mean(0) / z.numel(), atol=1e-6)


def test_codes_are_pulled_to_the_latents(tokenizer):
    """Some steps of the quantiser's loss alone bring what the codes say nearer to the latents."""
    quantiser, z, losses = tokenizer.quantiser, torch.randn(2, 64, 8), []
    optimizer = torch.optim.Adam(quantiser.parameters(), 1e-2)
    for _ in range(10):
        _, loss, _ = quantiser(z)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < .95 * losses[0]


def test_the_divergence_is_that_of_gaussians(tokenizer):
    cloud = torch.rand(3, 1, 100, 3)
    batch = {"points": cloud[0], "colours": cloud[2], "queries": cloud[0], "distance": torch.rand(1, 100) * .2 - .1}
    mean, log_variance = tokenizer.encoder(*cloud).chunk(2, -1)                   # b n c each
    normal = torch.distributions.Normal
    own = torch.distributions.kl_divergence(normal(mean, log_variance.exp().sqrt()), normal(0., 1.))
    _, logs = tokenizer.loss(vat.Decoder(**SIZE), cloud, batch, quantised=False)
    assert torch.allclose(logs["kl"], own.sum(-1).mean(), rtol=1e-4)


def test_occupancy_is_that_of_the_distance():
    """Its cross-entropy is lower for the true distance than for the opposite."""
    distance = torch.linspace(-.1, .1, 9)[None]
    y = F.pad(distance / .1, (0, 1))[..., None].expand(-1, -1, 4)                 # 1 10 4; the last is on the surface
    batch = {"queries": torch.zeros(1, 9, 3), "distance": distance, "colours": torch.zeros(1, 1, 3)}
    right, wrong = (vat.Decoder(**SIZE).errors(x, batch)[1]["occupancy"] for x in (y, -y))
    assert right < .5 * wrong


def test_gradients_pass_the_quantiser(tokenizer):
    """As if the quantised latents were the latents: the gradient of their sum is 1."""
    z = torch.randn(2, 64, 8, requires_grad=True)
    tokenizer.quantiser(z)[0].sum().backward()
    assert torch.allclose(z.grad, torch.ones_like(z))


def test_codes_out_of_use_are_revived(tokenizer):
    """Codes that no vector is near become vectors of the batch; the one that all are nearest to stays."""
    book, x = tokenizer.quantiser.book.train(), torch.randn(4, 64, 8)
    with torch.no_grad():
        book.code.fill_(100.)
        book.code[0] = 0.
        book.use.fill_(.02)
    book.nearest(x)
    assert not book.code[0].any()
    assert torch.cdist(book.code[1:], x.flatten(0, 1)).min(1).values.max() < .01


@pytest.mark.parametrize("size, count, size_of_file", [("tiny", 228, 299), ("large", 2214, 3889)])
def test_files_are_as_large_as_we_say(size, count, size_of_file):
    quantiser = vat.Quantiser(*(vat.SIZES[size][key] for key in ("side", "channels", "codes", "scales")))
    counts, sizes = scales.file_sizes(quantiser)
    assert (counts[-1], sizes[-1]) == (count, size_of_file)


@pytest.mark.parametrize("size", vat.SIZES)
def test_every_size_can_be_built(size):
    with torch.device("meta"):
        parts = vat.SIZES[size]
        vat.Tokenizer(**parts)
        decoder = vat.Decoder(**parts)
        latents = torch.zeros(1, parts["side"] ** 3, parts["channels"])
        levels, = decoder.read(latents)
        vat.Generator(**{key: parts[key] for key in PARTS}, **vat.GENERATORS[size], widths={"text": 128})
    assert [level.shape[-1] for level in levels] == [4 * parts["side"] * k for k in (1, 2, 4)]


# ---------------------------------------------------------------------------- variants

@pytest.mark.parametrize("variant", ["", *vat_parts.TOKENIZERS])
def test_every_variant_learns(variant):
    """After some steps on one batch, the loss of each is lower."""
    torch.manual_seed(0)
    decoder = vat_parts.VARIANTS["vat-decoder"].get(variant, vat.Decoder)(**SIZE)
    model, losses = vat_parts.TOKENIZERS.get(variant, vat.Tokenizer)(**SIZE), []
    cloud = torch.rand(2, 300, 3) * 2 - 1, torch.randn(2, 300, 3), torch.rand(2, 300, 3)
    samples = {"points": cloud[0], "colours": cloud[2], "queries": cloud[0], "distance": torch.rand(2, 300) * .2 - .1}
    optimizer = torch.optim.Adam([*model.parameters(), *decoder.parameters()], 3e-3)
    for _ in range(20):
        loss, _ = model.loss(decoder, cloud, samples, quantised=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < .9 * losses[0]


@pytest.mark.parametrize("kind, same", [(vat.Tokenizer, False), (vat_parts.Plain, True)])
def test_a_plain_tokenizer_has_no_noise(kind, same):
    """In training, ours draws other latents each time, a plain one the same."""
    posterior = kind(**SIZE).encoder(*torch.rand(3, 1, 100, 3))
    assert torch.equal(*(vat.latents_of(posterior, sampled=True) for _ in range(2))) == same


def test_dropped_scales_are_those_of_the_codes():
    """In training, the latents are what the first codes say, of one or more scales; else what all say."""
    torch.manual_seed(0)
    quantiser, z = vat_parts.ScaleDropout(**SIZE).quantiser, torch.randn(40, 64, 8)
    latents, _, indices = quantiser(z)
    levels = torch.stack([vat.as_rows(f) for f in quantiser.decode(indices)[1:]])            # K b n c
    found = (levels - latents).abs().amax((2, 3)).argmin(0)                       # b
    assert {*found.tolist()} == {0, 1, 2, 3}
    assert (levels[found, torch.arange(40)] - latents).abs().max() < 1e-5
    whole, _, indices = quantiser.eval()(z)
    assert torch.allclose(whole, vat.as_rows(quantiser.decode(indices)[-1]), atol=1e-5)


def test_pooled_latents_read_features_near_them():
    """The feature in a corner changes the latent in that corner, and no other."""
    encoder, features = vat_parts.PoolingEncoder(4, 8, 6, 32, 4, depth=0), torch.zeros(1, 216, 32)
    features[0, 0] = 1.
    changed = (encoder.mix(features)[0] - encoder.latent).abs().amax(1) > 1e-6    # n
    assert changed.nonzero().flatten().tolist() == [0]


# ---------------------------------------------------------------------------- generator

def test_cached_is_uncached(generator, monkeypatch):
    """Without noise and guidance, what is sampled with the cache is what one pass over all scales finds likeliest."""
    sampled, guesses, up = [], [], generator.quantiser.up
    monkeypatch.setattr(generator.quantiser, "up", lambda chosen, k: sampled.append(chosen) or up(chosen, k))
    generator.generate(condition(3), range(3), cfg=1., temperature=0.)
    indices = torch.cat(sampled, 1)                                               # b N
    generator.out.register_forward_hook(lambda module, inputs, out: guesses.append(out.argmax(-1)))
    generator.loss(indices, condition(3))
    assert torch.equal(guesses[0], indices)


def test_guidance_and_seed_change_a_sample(generator):
    plain, guided, other = (generator.generate(condition(1), [seed], cfg) for cfg, seed in ((1., 0), (4., 0), (1., 1)))
    assert not torch.equal(plain, guided) and not torch.equal(plain, other)


def test_a_sample_does_not_depend_on_its_batch(generator):
    both = generator.generate(condition(2), [4, 5])
    one = {kind: (tokens[1:], mask[1:]) for kind, (tokens, mask) in condition(2).items()}
    assert torch.allclose(generator.generate(one, [5]), both[1:], atol=1e-4)


@pytest.mark.parametrize("options, allowed", [(dict(top_k=1), {2}), (dict(top_p=.6), {1, 2}), ({}, {0, 1, 2}),
                                              (dict(top_k=9), {0, 1, 2})])
def test_only_the_likeliest_codes_are_drawn(options, allowed):
    logits = torch.log(torch.tensor([.1, .4, .5])).expand(1, 500, 3)
    found = codes.draw_codes(logits, [np.random.default_rng(0)], **dict(top_k=None, top_p=1., temperature=1.) | options)
    assert {*found.flatten().tolist()} == allowed


# ---------------------------------------------------------------------------- files of codes

BOOK = codes.Codebook(1000, 8)


def test_codes_survive_a_file(tmp_path):
    numbers = np.random.default_rng(0).integers(1000, size=100)
    codes.write_codes(tmp_path / "a.vat", numbers, 10, "0123456789ab")
    assert (tmp_path / "a.vat").stat().st_size == 14 + 125
    assert (codes.read_codes(tmp_path / "a.vat", BOOK, 100, "0123456789ab") == numbers).all()


@pytest.mark.parametrize("damage, complaint", [
    (lambda raw: raw[:50], "altered"), (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "altered"),
    (lambda raw: raw + b"0", "altered"), (lambda raw: raw[:10] + bytes([raw[10] ^ 1]) + raw[11:], "altered"),
    (lambda raw: b"", "no file of"), (lambda raw: raw[:10], "no file of"),
    (lambda raw: b"RIFF" + raw[4:], "no file of"),
    (lambda raw: raw[:4] + b"\0" + raw[5:], "was written with weights")])
def test_a_damaged_file_of_codes_is_one_line(damage, complaint, tmp_path):
    path = tmp_path / "a.vat"
    codes.write_codes(path, np.arange(100), 10, "0123456789ab")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=complaint):
        codes.read_codes(path, BOOK, 100, "0123456789ab")


def test_a_code_beyond_the_codebook_is_one_line(tmp_path):
    """A file that is whole, of 1000 codes of ten bits; one of them is 1010."""
    codes.write_codes(tmp_path / "a.vat", [*range(99), 1010], 10, "0123456789ab")
    with pytest.raises(UserError, match="altered"):
        codes.read_codes(tmp_path / "a.vat", BOOK, 100, "0123456789ab")


@pytest.mark.parametrize("words, complaint", [
    (["compress", "chair.glb", "chair.obj"], "ends in .vat"), (["compress", "no.glb", "a.vat"], "there is no file"),
    (["compress", "no.png", "a.vat"], "there is no file"), (["decompress", "no.vat", "a.ply"], "ends in .glb or"),
    (["compress", "chair.glb", "a.vat", "--resolution", 64], "unrecognized"),
    (["decompress", "nothing.vat", "a.glb"], "cannot read")])
def test_a_wrong_file_is_one_line(words, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(vat.main, *words) == 2
    assert_one_line(capsys.readouterr().err, complaint)


@pytest.mark.parametrize("sides", ["1 2 -1", "1 2 9999", "1 2 x", "1 2 0"])
def test_impossible_scales_are_refused(sides):
    with pytest.raises(ValueError):
        vat.Quantiser(**PARTS | {"scales": sides})


def test_vat_without_weights_is_one_line(tmp_path, capsys):
    assert run(vat.main, "compress", "chair.glb", tmp_path / "a.vat", "--checkpoint", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "holds no trained vat-codes")


def test_all_stages_end_to_end(overfitted, tmp_path, monkeypatch, capsys):
    """The chain, with the towers of another folder; a prompt becomes a mesh; a mesh becomes codes, and a mesh again; it
    sits the exams."""
    monkeypatch.setitem(vat.SIZES, "small", SIZE | {"dim": 64})
    monkeypatch.setitem(vat.GENERATORS, "small", dict(dim=64, depth=2, heads=4, prefix=2))
    folder = tmp_path / "run"
    flags = "--model", "vat", "--from", overfitted, "--steps", 60, "--batch", 2
    assert train_small(monkeypatch, folder, 2, *flags) == 0
    assert {*vat.STAGES} <= {*files.trained_stages(folder)}

    flags = "--checkpoint", folder, "--resolution", 32
    assert run(sample.main, "--text", "a table", "--top-k", 5, "--out", tmp_path / "out", *flags) == 0
    refused = "--text", "a table", "--out", tmp_path / "no", *flags
    for main, words, complaint in ((train.main, ["--model", "vat", "--denoiser", "ddpm"], "vat has no --denoiser"),
                                   (train.main, ["--model", "vat", "--tokens", "joint"], "vat has no --tokens"),
                                   (train.main, ["--model", "vat", "--rep", "pc"], "vat makes sdf, mesh"),
                                   (train.main, ["--model", "vat", "--from", "checkpoints/vat", "--out",
                                                 tmp_path / "no"], "but no tokenizer, vat-latents, which come before"),
                                   (evaluate.main, ["ablate-rgs", "--checkpoint", folder], "has no Reconstruction"),
                                   (evaluate.main, ["ablate-vat", "--checkpoint", folder], "trains vat-codes itself"),
                                   (sample.main, [*refused, "--steps", 5], "--steps"),
                                   (sample.main, [*refused, "--model", "ltm3d"], "holds vat, not ltm3d"),
                                   (evaluate.main, ["tokenizer", "--rep", "gs", "--checkpoint", folder], "sdf, mesh")):
        capsys.readouterr()
        assert run(main, *words) == 2
        assert_one_line(capsys.readouterr().err, complaint)
    with pytest.raises(UserError, match="vat makes sdf, mesh"):
        sample.load(folder).generate("a table", rep="pc")
    mesh, packed, back = tmp_path / "out" / "a-table-0.glb", tmp_path / "a.vat", tmp_path / "back.glb"
    assert run(vat.main, "compress", mesh, packed, "--checkpoint", folder) == 0
    assert "what comes back" in capsys.readouterr().out
    assert run(vat.main, "decompress", packed, back, *flags) == 0
    assert len(trimesh.load(back, force="mesh").faces)

    flags = "--model", "vat", "--from", folder, "--finetune", "--stage", "vat-decoder", "--steps", 1, "--batch", 2
    assert train_small(monkeypatch, tmp_path / "more", 2, *flags) == 0
    assert "vat-generator" in files.trained_stages(tmp_path / "more")

    flags = "--checkpoint", folder, "--shapes", 2, "--out", tmp_path / "exams", "--cache", tmp_path / "cache"
    assert run(evaluate.main, "scales", *flags, "--points", 1000) == 0
    rows = list(csv.DictReader((tmp_path / "exams" / "scales.csv").open()))
    assert [row["bytes"] for row in rows] == ["15", "21", "41", "89"]             # of 6 bits a code, and 14 bytes more
    assert run(evaluate.main, "tokenizer", *flags, "--points", 1000) == 0
    assert run(evaluate.main, "generate", *flags, "--n", 2, "--resolution", 32, "--scorer", overfitted) == 0
    _, own = csv.DictReader((tmp_path / "exams" / "generate-sdf.csv").open())
    assert float(own["memorisation"]) > 0
