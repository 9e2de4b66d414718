"""test_peers.py - the tests of the peers of the backbone."""
import pytest
import torch

import backbone
from backbone import BACKBONES
from conftest import WIDTHS, small_backbone
from engine.noise import keys_of
from research import bench, peers


@pytest.mark.parametrize("size", backbone.SIZES)
def test_peers_are_as_large(size):
    """Of every size, all generators have the same number of parameters, to 9 %."""
    settings = dict(tokens=64, channels=16, widths=WIDTHS, **backbone.SIZES[size])
    with torch.device("meta"):
        models = [kind(**settings) for kind in (backbone.Backbone, *peers.PEERS.values())]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert all(abs(count / counts[0] - 1) < .09 for count in counts), counts


@pytest.mark.chain
@pytest.mark.parametrize("variant", ["diffusion", "autoregressive"])
def test_other_generators_learn_what_belongs_to_a_prompt(variant):
    """Two prompts, two sets of tokens: after some steps each prompt gives its own."""
    torch.manual_seed(0)
    sizes = dict(dim=32, encoder=1, decoder=2, heads=4, queries=2, head_dim=64, head_depth=2)
    model = BACKBONES[variant](tokens=6, channels=3, widths={"text": 8}, **sizes)
    x = torch.randn(2, 6, 3).repeat(10, 1, 1)                                     # b n c
    text, mask = torch.randn(2, 4, 8).repeat(10, 1, 1), torch.ones(20, 4, dtype=torch.bool)
    optimizer = torch.optim.Adam(model.parameters(), 6e-3)
    for _ in range(100):
        model.loss(x, {"text": (text, mask)}, 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    samples = model.eval().generate({"text": (text[:2], mask[:2])}, keys_of(range(2)), steps=4, cfg=1.)
    distance = ((samples[:, None] - x[None, :2]) ** 2).mean((2, 3)).sqrt()        # 2 2
    assert distance.diag().max() < .35
    assert min(distance[0, 1], distance[1, 0]) > .7


def test_flops_are_those_of_the_products():
    """Of y = A x: the product itself, and the one of the gradient of A."""
    class Line(torch.nn.Linear):
        tokens, channels = 6, 8

        def loss(self, x, condition, known):                  # b n c
            return self(x).sum()

    assert bench.training_flops(Line(8, 3, device="meta"), 5, 0) == 2 * (2 * 5 * 6 * 8 * 3)


@pytest.mark.parametrize("variant", peers.PEERS)
def test_every_generator_is_sampled_in_chunks(variant):
    """A batch is cut by the size of the model, as sample.py does; every sample is a whole shape."""
    model, condition = small_backbone(kind=BACKBONES[variant])
    samples = [model.generate(*part, steps=2) for part in backbone.cache_sized(model, condition, keys_of(range(3)))]
    assert torch.cat(samples).shape == (3, model.tokens, 8)


def test_contexts_depend_on_the_condition_not_on_its_order():
    """The context vectors depend on the condition tokens, not on their order nor on those that are masked."""
    model, condition = small_backbone(kind=peers.Queries)
    x, order = torch.randn(3, 27, 8), torch.rand(3, 27).argsort(1)

    def contexts(change):
        changed = {kind: change(tokens, mask) for kind, (tokens, mask) in condition.items()}
        return model.contexts(*model.prefix(changed), x, order, 9, order)          # b n d

    plain = contexts(lambda tokens, mask: (tokens, mask))
    assert torch.allclose(plain, contexts(lambda tokens, mask: (tokens.flip(1), mask.flip(1))), atol=1e-5)
    assert torch.allclose(plain, contexts(lambda tokens, mask: (tokens.masked_fill(~mask[..., None], 9.), mask)),
                          atol=1e-5)
    assert not torch.allclose(plain, contexts(lambda tokens, mask: (-tokens, mask)), atol=1e-3)
