"""test_networks.py - the tests of attention, grids of features, Muon, moving averages, recomputed blocks.

    python -m pytest -q engine/test_networks.py
"""
import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn

from conftest import small_backbone
from engine import commands, grids, loop, networks, optimizers
from first_design import GAMMAS, NearAttention


@pytest.mark.parametrize("near", [False, True])
def test_attention_on_a_gpu_is_that_on_a_cpu(near, monkeypatch):
    """There, more dimensions replace a mask of keys; so flash attention applies. So does it with a distance bias."""
    torch.manual_seed(0)
    x, mask = torch.randn(3, 10, 64), torch.rand(3, 10) < .6
    mask[:, 0] = True
    attention = NearAttention(64, 4) if near else networks.Attention(64, 4)
    call = (x, None, (torch.rand(3, 10, 3),) * 2) if near else (x, None, mask)
    plain = attention(*call)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    assert torch.allclose(attention(*call), plain, atol=1e-5)


@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-5), (True, .03)], ids=["fp32", "bf16"])
def test_distance_bias_is_a_mask(bf16, tolerance):
    """Bias folded into 13 more dimensions = softmax(q k / sqrt(e) - gamma_h |x - a|^2)."""
    torch.manual_seed(0)
    layer = NearAttention(64, 8)
    nn.init.normal_(layer.to_v.weight, std=.3)
    x, context = torch.randn(2, 50, 64), torch.randn(2, 27, 64)
    positions = torch.rand(2, 50, 3) * 2 - 1, networks.grid_points(3)[None].repeat(2, 1, 1)

    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    q, k, v = (rearrange(y, "b k (h e) -> b h k e", h=8) for y in (q, k, v))
    gamma = rearrange(torch.tensor(2 * GAMMAS), "h -> 1 h 1 1")
    scores = q @ k.mT / 8 ** .5 - gamma * rearrange(torch.cdist(*positions) ** 2, "b q k -> b 1 q k")
    true = layer.to_out(rearrange(scores.softmax(-1) @ v, "b h k e -> b k (h e)"))

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        biased, unbiased = layer(x, context, positions), networks.Attention.forward(layer, x, context)
    assert (biased - true).abs().mean() < tolerance * true.abs().mean()
    assert (unbiased - true).abs().mean() > .3 * true.abs().mean()


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_casting_once_is_casting_always(bf16):
    """Weights that are cast beforehand give the same numbers as autocast; without autocast they stay in fp32."""
    layer, x = networks.Block(64, 4), torch.randn(2, 50, 64)
    autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with torch.no_grad(), autocast():
        before = layer(x)
        after = commands.cast_once(layer, autocast)(x)
    assert torch.equal(before, after)
    assert layer.feed[0].weight.dtype == (torch.bfloat16 if bf16 else torch.float32)


def test_a_token_gets_the_mean_of_the_points_in_its_cells():
    """It is 0 for cells without points."""
    torch.manual_seed(0)
    cells = grids.FromCells(side=2, cells=2, features=3, dim=24)
    nn.init.eye_(cells.into.weight)                           # a token is its 8 cells of 3 features
    nn.init.zeros_(cells.into.bias)
    points, features = torch.rand(1, 500, 3) * 2 - 1, torch.randn(1, 500, 3)
    inside = (points[0] > torch.tensor([0, -1, .5])).all(1) & (points[0] < torch.tensor([.5, -.5, 1])).all(1)
    means, count = grids.cell_means(points, features, 4)
    token, cell = cells(means)[0, 0b101], 0b001               # x > 0, y < 0, z > 0; in it x low, y low, z high
    assert inside.any() and count.sum() == 500
    assert torch.allclose(token[3 * cell:3 * cell + 3], features[0, inside].mean(0), atol=1e-6)
    assert not grids.cell_means(torch.full((1, 5, 3), .9), torch.randn(1, 5, 3), 4)[0][0, :63].any()


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (96, 64)])
def test_muon_is_that_of_torch(shape, bf16):
    """Three steps of stacked matrices end where those of torch.optim.Muon do, one by one. That one always rounds to
    bf16; ours does in products, under autocast. A step whose gradients are not finite changes nothing."""
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(s)) for s in (shape, (64, 128), shape)] for _ in range(2))
    both = (optimizers.Muon(ours, 1e-2, decay=.01),
            torch.optim.Muon(theirs, 1e-2, weight_decay=.01, adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for optimizer in both:
                optimizer.step()
    for one, other in zip(ours, theirs):
        assert (one - other).abs().mean() < .03 * (other - 1).abs().mean()
    before, both[0].found_inf = [one.clone() for one in ours], torch.ones(())
    ours[0].grad[0] = torch.nan
    both[0].step()
    assert all(map(torch.equal, before, ours))


@pytest.mark.parametrize("first, decay", [(10_000, .9), (0, .999)], ids=["constant", "warm-up"])
def test_ema_is_its_closed_form(first, decay):
    """After k updates with the weights w_i: prod_j d_j w_0 + sum_i (1 - d_i) (prod_{j > i} d_j) w_i."""
    model = nn.Linear(3, 2)
    ema, weights = optimizers.EMA(model, decay), [model.weight.detach().clone()]
    for i in range(first, first + 6):
        nn.init.normal_(model.weight)
        ema.update(i)
        weights.append(model.weight.detach().clone())
    d = np.array([min(decay, (1 + i) / (10 + i)) for i in range(first, first + 6)])
    shares = [np.prod(d)] + [(1 - d[i]) * np.prod(d[i + 1:]) for i in range(6)]
    mean = sum(float(share) * weight for share, weight in zip(shares, weights))
    assert torch.allclose(ema.model.weight, mean, atol=1e-6)


def test_recomputed_blocks_learn_the_same():
    """--recompute: the same losses and gradients, with fewer stored activations."""
    (plain, condition), (recomputed, _) = small_backbone(), small_backbone()
    recomputed.load_state_dict(plain.state_dict())
    loop.recompute_blocks(recomputed)
    x, losses, stored = torch.randn(3, 27, 8), [], []
    for model in (plain, recomputed):
        sizes = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            losses.append(model.loss(x, condition, 5))
        losses[-1].backward()
        stored.append(sum(sizes))
    assert torch.allclose(*losses, atol=1e-6) and stored[1] < .7 * stored[0]
    for p, q in zip(plain.parameters(), recomputed.parameters()):
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-5)


def test_a_patch_is_a_cube_of_neighbours():
    """And from_patches is the inverse of to_patches."""
    patches = rearrange(grids.to_patches(networks.grid_points(4)[None], 2), "1 n (p i) -> n p i", p=8)
    assert torch.allclose(patches.amax(1) - patches.amin(1), torch.full((8, 3), .5))
    x = torch.randn(2, 216, 5)
    assert torch.equal(grids.from_patches(grids.to_patches(x, 3), 3), x)
