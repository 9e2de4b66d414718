"""test_waiting.py - the tests that no loss makes Python wait for a GPU: of the models, with random batches.

They are quick. test_train.test_a_step_never_waits_and_is_one_graph looks at whole stages.

    python -m pytest -q test_waiting.py
"""
import pytest
import torch
from torch import nn

import reconstruct
import tokenizer
from conftest import SMALL, WIDTHS, NoWait, as_on_a_gpu, no_waiting, prompted, small_backbone
from geometry.volume import SIDE
from prompts import image_tower, text_tower
from relatives import latte3d, lost, prior, vat
from representations import REPRESENTATIONS
from representations.gs import GaussianHead

B, N, C = 3, 64, 8                                            # shapes, tokens, channels


def samples_of(prepared, rep):
    """Samples of B shapes that a head learns from."""
    split = prepared[0]
    return REPRESENTATIONS[rep].batch_of(split, split.draw_distinct(B))


@pytest.mark.parametrize("rep", REPRESENTATIONS)
def test_heads(rep, prepared, monkeypatch):
    monkeypatch.setattr(GaussianHead, "POINTS", 256)
    monkeypatch.setattr(GaussianHead, "COPIES", 2)
    head = REPRESENTATIONS[rep](**SMALL[tokenizer])
    no_waiting(head, (torch.randn(B, N, C), samples_of(prepared, rep)), lambda head, batch: head.loss(*batch))


def test_tokenizer(prepared):
    heads = {rep: REPRESENTATIONS[rep](**SMALL[tokenizer]) for rep in ("sdf", "pc")}
    model = tokenizer.Autoencoder(tokenizer.Tokenizer(**SMALL[tokenizer]), heads)
    batch = prepared[0].cloud(torch.arange(B), 256), {rep: samples_of(prepared, rep) for rep in heads}
    no_waiting(model, batch, lambda model, batch: model.loss(*batch))


def test_towers(prepared):
    split, count = prepared[0], 4
    captions = [caption for own in split.captions for caption in own]
    text = text_tower.TextAndCloud(text_tower.vocabulary(captions), {}, **SMALL[text_tower])
    words = text.cache(split)
    no_waiting(text, text_tower.training_batch(split, words, count), lambda text, batch: text.loss(*batch))

    vision = image_tower.ImageTower(text.width, **SMALL[image_tower])
    reader = image_tower.Reader(len(vision.pos_embed), vision.width, N, C)
    batch = torch.rand(2 * count, 3, 64, 64), torch.randn(count, text.width), torch.randn(2 * count, N, C)
    loss_of = lambda model, batch: model[0].loss(batch[0], batch[1], model[1], batch[2])
    no_waiting(nn.ModuleList([vision, reader]), batch, loss_of)


@pytest.mark.parametrize("denoiser", ["flow", "ddpm"])
def test_backbone(denoiser):
    model, condition = small_backbone(denoiser)
    no_waiting(model, torch.randn(B, 27, 8), lambda model, x: (model.loss(x, condition, 5), {}))


def test_reconstructor():
    model = reconstruct.Reconstructor(N, C, WIDTHS, **SMALL[reconstruct])
    no_waiting(model, (torch.randn(B, N, C), prompted(B)), lambda model, batch: model.loss(*batch))


@pytest.mark.parametrize("quantised", [False, True])
def test_vat_tokenizer(quantised, prepared, monkeypatch):
    monkeypatch.setattr(vat.Encoder, "points", 256)
    size = dict(side=4, channels=8, codes=64, scales="1 2 3 4", features=6, dim=32, heads=4, depth=1)
    model = vat.Autoencoder(vat.Tokenizer(**size), vat.Decoder(**size), quantised)
    batch = prepared[0].cloud(torch.arange(B), 128), samples_of(prepared, "sdf")
    no_waiting(model, batch, lambda model, batch: model.loss(*batch))


def test_vat_generator():
    model = vat.Generator(side=4, channels=8, codes=64, scales="1 2 3 4", widths=WIDTHS, dim=32, depth=2, heads=4,
                          queries=2)
    condition = prompted(B)
    no_waiting(model, torch.randn(B, N, C), lambda model, z: model.loss(model.quantiser.encode(z), condition))


def test_lost():
    tokens, student = torch.randn(B, N, C), lost.Student(N, C, dim=32, depth=1, heads=4).requires_grad_(False)
    codec = lost.Codec(registers=8, width=6, dim=32, heads=4, encoder=1, decoder=1, tokens=N, channels=C)
    no_waiting(codec, tokens, lambda codec, x: codec.loss(x, student))

    generator = lost.Generator(8, 6, WIDTHS, dim=32, depth=2, heads=4, queries=2, head_dim=32, head_depth=2)
    condition = prompted(B)
    no_waiting(generator, torch.randn(B, 8, 6), lambda generator, x: generator.loss(x, condition))


TEXT, ANGLES = {"text": prompted(B)["text"]}, torch.rand(B, 4, 2) * 90


@pytest.fixture
def teacher():
    return prior.Prior(patch=8, dim=32, depth=1, heads=4, queries=2, widths={"text": 32})


def test_latte3d_prior(teacher):
    def loss_of(model, sides):
        x, depth = prior.pictures_of({"sides": sides})
        return model.loss(x, TEXT, ANGLES, depth)
    no_waiting(teacher, torch.rand(B, 4, SIDE, SIDE, 5), loss_of)


@pytest.mark.parametrize("stage", ["geometry", "texture"])
def test_latte3d(stage, teacher):
    size = dict(tokens=N, channels=C, widths={"text": 32}, dim=32, depth=1, heads=4, queries=2, side=4)
    geometry, texture = latte3d.Geometry(**size), latte3d.Texture(**size)
    nn.init.normal_(geometry.field.out.weight)
    nn.init.normal_(texture.texture.out.weight)
    teacher.requires_grad_(False)
    sides, progress = {"sides": torch.rand(B, 4, SIDE, SIDE, 5), "side_angles": ANGLES}, torch.full((), .5)
    if stage == "geometry":
        no_waiting(geometry, torch.randn(B, N, C), lambda model, x: model.loss(teacher, TEXT, sides, x, progress))
    else:
        geometry.requires_grad_(False)
        no_waiting(texture, geometry, lambda model, geometry: model.loss(teacher, TEXT, sides, geometry, progress))


# ---------------------------------------------------------------------------- the tests see what they look for

@pytest.mark.parametrize("loss_of", [
    lambda x: x.cumprod(-1), lambda x: x.prod(-1), lambda x: x[x > 0], lambda x: x * x.max().item(),
    lambda x: x[:, [1, 0]], lambda x: x + torch.tensor([1., 2, 3, 4], device=x.device)],
    ids=["cumprod", "prod", "mask", "item", "list", "numbers"])
def test_a_loss_that_waits_is_found(loss_of):
    """The first two only by the profiler: in their backward pass."""
    with pytest.raises((pytest.fail.Exception, AssertionError), match="waits for a GPU"):
        no_waiting(nn.Linear(4, 4), torch.randn(B, 4), lambda model, x: (loss_of(model(x)).sum(), {}))


@pytest.mark.parametrize("loss_of", [
    lambda x: x + torch.ones(4).to(x), lambda x: x * torch.arange(4), lambda x: x[:, torch.arange(2)]],
    ids=["copy", "product", "index"])
def test_a_loss_with_tensors_of_the_host_is_found(loss_of):
    with pytest.raises(pytest.fail.Exception, match="of the host and of the GPU"):
        no_waiting(nn.Linear(4, 4), torch.randn(B, 4), lambda model, x: (loss_of(model(x)).sum(), {}))


def test_constants_of_a_module_lie_on_the_host():
    """As those of prior.py do."""
    with as_on_a_gpu():
        assert prior.SHOWN.is_meta
        with NoWait(), pytest.raises(pytest.fail.Exception, match="of the host"):
            prior.SHOWN.to(torch.empty(0, device="cpu"))
