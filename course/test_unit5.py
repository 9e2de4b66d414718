"""Unit 5: reconstruction-guided sampling, and honest evaluation."""
import numpy as np
import torch

import reconstruct
from research import metrics


def test_the_blend_of_the_paper():
    """weight is that of the sampled tokens: 0 is the reconstruction, 1 the sample."""
    sampled, recon = torch.full((1, 2, 3), 4.), torch.zeros(1, 2, 3)
    assert torch.allclose(reconstruct.blend(sampled, recon, .25), torch.ones(1, 2, 3))
    assert torch.equal(reconstruct.blend(sampled, recon, 0.), recon)


def test_within_moves_only_what_is_far_away():
    """Each channel is clamped to x_recon +- reach sigma, sigma = exp(log variance / 2)."""
    sampled, recon = torch.tensor([[[.5, 9., -9.]]]), torch.zeros(1, 1, 3)
    found = reconstruct.within(sampled, recon, torch.full((1, 1, 3), 2 * np.log(2.)).float(), 1.5)
    assert torch.allclose(found, torch.tensor([[[.5, 3., -3.]]]))


def test_r_precision_counts_nearest_prompts():
    """The nearest prompt of each shape, by cosine: is it true of the shape? Two captions may say the same."""
    prompts = np.array([[1., 0], [0, 2], [1, 1]])
    shapes = np.array([[9., 1], [1, 9], [9, 0]])
    assert metrics.r_precision(prompts, shapes, np.eye(3, dtype=bool)) == 2 / 3
    same = np.eye(3, dtype=bool)
    same[2, 0] = True
    assert metrics.r_precision(prompts, shapes, same) == 1


def clouds(offsets):
    corner = np.random.default_rng(0).random((16, 3)) * .01
    return np.stack([corner + [x, 0, 0] for x in offsets])


def test_one_nearest_neighbour_accuracy():
    """1-NNA is 1 if the sets are apart, 0 if each cloud's nearest one is of the other set; COV counts the references
    that are a sample's nearest; MMD is the mean distance of a reference to its nearest sample."""
    apart = metrics.mmd_cov_1nna(clouds([0, 1, 2]), clouds([50, 51, 52]))
    mixed = metrics.mmd_cov_1nna(clouds([0, 10, 20]), clouds([1, 11, 21]))
    copied = metrics.mmd_cov_1nna(clouds([0, .1, .2]), clouds([0, 10, 20]))
    assert apart["1-NNA"] == 1 and mixed["1-NNA"] == 0 and mixed["COV"] == 1
    assert copied["COV"] == 1 / 3 and copied["MMD"] > 15 and abs(mixed["MMD"] - 2) < .05     # both ways
