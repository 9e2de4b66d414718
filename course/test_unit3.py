"""Unit 3: masked generation, its order and its schedule."""
import pytest
import torch

import backbone
from conftest import small_backbone


@pytest.mark.parametrize("n, steps", [(64, 10), (27, 18), (5, 5), (64, 1)])
def test_every_step_samples_at_least_one_token_and_all_are_sampled(n, steps):
    """A step begins where the one before ended; the last one ends at n. Leave one token for each later step."""
    pairs = backbone.schedule(n, steps)
    assert len(pairs) == steps and pairs[0][0] == 0 and pairs[-1][1] == n
    assert all(after > before for before, after in pairs)
    assert all(end == start for (_, end), (start, _) in zip(pairs, pairs[1:]))


def test_the_schedule_is_a_cosine():
    """After step k of K, n - floor(n cos(pi/2 k / K)) tokens are known: few at first, when little is decided."""
    assert [after for _, after in backbone.schedule(64, 10)] == [1, 4, 7, 13, 19, 27, 35, 45, 54, 64]


def test_training_sees_the_moments_of_generation():
    """n - ceil(n cos(pi/2 ((i + .5) / count)^power)) known tokens; a power above 1: early moments are frequent."""
    assert backbone.known_counts(64, 4, 1) == [1, 10, 28, 51]
    counts = backbone.known_counts(64)
    assert len(counts) == 16 and counts == sorted(counts) and sum(count < 8 for count in counts) >= 5


def test_the_loss_is_that_of_masked_tokens():
    """A random order for each sample; its first `known` tokens are encoded, the loss is of the others, with their z_i;
    DRAWS draws of noise share one pass."""
    model, condition = small_backbone()
    x, seen = torch.randn(3, 27, 8), []
    model.denoiser = type("Spy", (), {"loss": staticmethod(lambda net, x, z: seen.append((x, z)) or x.mean())})
    model.loss(x, condition, 20)
    (targets, z), = seen
    assert len(targets) == len(z) == backbone.DRAWS * 3 * 7
    first = targets[:7]
    assert all((x[0] == token).all(1).any() for token in first)                   # of the first sample
    assert len(first.unique(dim=0)) == 7 and torch.equal(targets[:21], targets[21:])


def test_a_known_token_matters_and_a_masked_one_does_not():
    """`contexts` gets the order, how many are known, and the rows of the masked tokens."""
    torch.manual_seed(1)
    model, condition = small_backbone()
    x, losses = torch.randn(3, 27, 8), []
    model.denoiser = type("Spy", (), {"loss": staticmethod(lambda net, x, z: losses.append(z) or x.mean())})
    for changed in (x, x.clone()):
        torch.manual_seed(2)
        order = torch.rand(3, 27).argsort(1)
        if changed is not x:
            changed[0, order[0, -1]] += 1                     # masked in the first sample
        torch.manual_seed(2)
        model.loss(changed, condition, 20)
    assert torch.allclose(*losses, atol=1e-5)
