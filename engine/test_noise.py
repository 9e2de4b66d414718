"""test_noise.py - the tests of noise.py.

    python -m pytest -q engine/test_noise.py
"""
import pytest
import torch
from scipy import stats

from engine import noise

KEYS = noise.keys_of([(seed, i) for seed in range(10) for i in range(100)])       # 1000


def test_the_hash_is_that_of_splitmix64():
    """The first three numbers that its authors' generator makes from 1234567."""
    made = noise.mix(1234567 + torch.arange(1, 4) * noise.STEP)
    assert [x % 2 ** 64 for x in made.tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("draw, known, variance", [
    (noise.uniform, stats.uniform, 1 / 12), (noise.normal, stats.norm, 1)])
def test_draws_have_their_distribution(draw, known, variance):
    x = draw(KEYS, 0, (1000,)).double().numpy().ravel()
    assert stats.kstest(x, known.cdf).pvalue > .001
    assert abs(x.mean() - known.mean()) < 4 * (variance / x.size) ** .5
    assert x.var() == pytest.approx(variance, rel=.01)


def test_neighbours_are_independent():
    """Seeds, samples of a seed, numbers of a sample, streams: neither the numbers nor their squares correlate."""
    one, two = (noise.normal(KEYS, stream, (10, 100)).view(10, 100, 1000) for stream in (0, 1))      # seed i index
    for x, y in ((one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[..., 1:], one[..., :-1]), (one, two)):
        for power, spread in ((1, 1), (2, 2)):
            moment = ((x ** power - power + 1) * (y ** power - power + 1)).double().mean().abs()
            assert moment < 4 * spread / x.numel() ** .5


def test_bits_depend_on_their_key_alone():
    """Not on the batch, nor on how many follow. All keys are different."""
    together = noise.bits(KEYS, 3, (4, 5))
    assert torch.equal(together[7:8], noise.bits(KEYS[7:8], 3, (4, 5)))
    assert torch.equal(together[:, :2], noise.bits(KEYS, 3, (2, 5)))
    assert len(KEYS.unique()) == 1000 and together.unique().numel() == 20_000


def test_all_orders_are_equally_likely():
    drawn = noise.bits(noise.keys_of(range(24_000)), 0, (4,)).argsort(1)
    orders, counts = drawn.unique(dim=0, return_counts=True)
    assert len(orders) == 24 and stats.chisquare(counts).pvalue > .001
