"""test_peers.py - the tests of the peers of the backbone."""

import pytest
import torch

import backbone
import lost
import vat
from conftest import WIDTHS, prompted, small_backbone
from evaluation import peers, vat_parts
from prompts import image_tower, text_tower

# ---------------------------------------------------------------------------- peers

@pytest.mark.parametrize("size", backbone.SIZES)
def test_peers_are_as_large(size):
    """Of every size, all generators have the same number of parameters, to 8 %."""
    settings = dict(tokens=64, channels=16, widths=WIDTHS, **backbone.SIZES[size])
    with torch.device("meta"):
        models = [kind(**settings) for kind in (backbone.Backbone, *peers.GENERATORS.values())]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert all(abs(count / counts[0] - 1) < .08 for count in counts), counts


def test_large_generators_are_as_large_as_ltm3d():
    settings = {key: vat.SIZES["tiny"][key] for key in ("side", "channels", "codes", "scales")}
    with torch.device("meta"):
        models = [backbone.Backbone(tokens=64, channels=16, widths=WIDTHS, **backbone.SIZES["tiny"]),
                  vat_parts.Large(**settings, **vat.GENERATORS["tiny"], widths=WIDTHS),
                  peers.LargeLoST(registers=64, width=8, widths=WIDTHS, **lost.GENERATORS["tiny"])]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert all(abs(count / counts[0] - 1) < .08 for count in counts), counts


@pytest.mark.parametrize("variant", [None, *(name for name in peers.GENERATORS if name != "spaces")])     # slow
def test_every_generator_learns_what_belongs_to_a_prompt(variant):
    """Two prompts, two sets of tokens: after some steps each prompt gives its own."""
    torch.manual_seed(0)
    sizes = dict(dim=32, encoder=1, decoder=2, heads=4, prefix=2, head_dim=64, head_depth=2)
    model = peers.GENERATORS.get(variant, backbone.Backbone)(tokens=6, channels=3, widths={"text": 8}, **sizes)
    x = torch.randn(2, 6, 3).repeat(10, 1, 1)                                     # b n c
    text, mask = torch.randn(2, 4, 8).repeat(10, 1, 1), torch.ones(20, 4, dtype=torch.bool)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(250):
        model.loss(x, {"text": (text, mask)}).backward()
        optimizer.step()
        optimizer.zero_grad()
    samples = model.eval().generate({"text": (text[:2], mask[:2])}, [0, 1], steps=4, cfg=1.)
    distance = ((samples[:, None] - x[None, :2]) ** 2).mean((2, 3)).sqrt()        # 2 2
    assert distance.diag().max() < .35
    assert min(distance[0, 1], distance[1, 0]) > .7


@pytest.mark.parametrize("variant", peers.GENERATORS)
def test_every_generator_is_sampled_in_parts(variant):
    """A batch is cut by the size of the model, as ltm3d.py does it; every sample is a whole shape."""
    model, condition = small_backbone(variant=variant)
    samples = [model.generate(*part, steps=2) for part in backbone.cache_sized(model, condition, range(3))]
    assert torch.cat(samples).shape == (3, model.tokens, 8)


def test_shapes_are_turned_into_every_latent_space(monkeypatch):
    spaces, condition = small_backbone(variant="spaces")
    x, seen = torch.randn(3, 27, 8), []
    monkeypatch.setattr(backbone.Backbone, "loss", lambda self, x, *_: seen.append(x))
    spaces.loss(x, condition)
    assert torch.allclose(seen[0] @ spaces.rotation[spaces.space].mT, x, atol=1e-5)


def test_samples_of_all_latent_spaces_are_turned_back():
    plain, condition = small_backbone()
    spaces, _ = small_backbone(variant="spaces")
    spaces.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.zeros_(spaces.label.weight)
    samples = spaces.generate(condition, [0, 1, 2], steps=3)
    assert len(spaces.space.unique()) > 1
    assert torch.allclose(samples, plain.generate(condition, [0, 1, 2], steps=3) @ spaces.rotation[spaces.space].mT,
                          atol=1e-5)


@pytest.mark.parametrize("variant", [None, "queries", "pooled", "cross"])
def test_contexts_depend_on_the_condition_not_on_its_order(variant):
    """The context vectors depend on the condition tokens, not on their order nor on those behind the mask."""
    model, condition = small_backbone(variant=variant)[0], prompted()
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


def test_a_patch_of_a_picture_is_a_token_of_its_pixels():
    pictures = torch.zeros(2, 3, 64, 64)
    pictures[1, :, :16, 16:32] = 1
    (plain, painted), mask = image_tower.Pixels("cpu").tokens(pictures)
    changed = (plain != painted).any(-1)
    assert changed.nonzero().flatten().tolist() == [1] and mask.all()


def test_a_bag_of_words_has_no_order():
    bag = text_tower.BagOfWords("cpu")
    texts = "a red chair with a blue lamp", "blue with lamp red chair", "a blue chair"
    plain, turned, other = (bag.tokens([text])[0] for text in texts)
    assert torch.allclose(plain, turned, atol=1e-5)
    assert not torch.allclose(plain, other, atol=.1)
