"""Unit 1: the tokenizer."""
import numpy as np
import torch
from torch import nn

import tokenizer
from engine import networks
from geometry import metrics


def test_fourier_features():
    """Beside the position: sin and cos of 2^k pi/2 x for k = 0, 1 ...; for each coordinate first all sines, then all
    cosines."""
    x = torch.tensor([[.5, -1., 0]])
    found = networks.fourier(x, 3)
    assert found.shape == (1, 21) and torch.equal(found[:, :3], x)
    half = 2 ** -.5
    expected = [half, 1, 0, half, 0, -1, -1, 0, 0, 0, -1, 1, 0, 0, 0, 1, 1, 1]
    assert torch.allclose(found[0, 3:], torch.tensor(expected), atol=1e-5)


def test_tokens_get_mean_0_and_deviation_1_and_heads_do_not_notice():
    """A head's first layer is W x + b. If tokens become (x - mean) / std, its W must grow by std, its b by W mean.
    Mind the order of the two. The tokenizer may have a mean and a std already."""
    torch.manual_seed(0)
    model = tokenizer.Tokenizer(side=4, channels=8, dim=64, heads=4, conv=4).eval()
    head, cloud = nn.Module(), [torch.randn(4, 512, 3) for _ in range(3)]
    head.token = nn.Linear(8, 5)
    with torch.no_grad():
        before = 3 * model(*cloud) + 2
        model.mean.sub_(2 / 3 * model.std)
        model.std.div_(3)                                     # now its tokens are `before`
        answer = head.token(before)
        tokenizer.standardise(model, [head], before)
        after = model(*cloud)
        assert after.mean((0, 1)).abs().max() < 1e-4 and (after.std((0, 1)) - 1).abs().max() < 5e-3
        assert torch.allclose(head.token(after), answer, atol=1e-4)


def test_intersection_over_union():
    """Voxels in both, over voxels in any of the two."""
    a, b = (np.arange(8).reshape(2, 2, 2) < k for k in (4, 6))
    assert metrics.iou(a, b) == 4 / 6 and metrics.iou(a, a) == 1 and metrics.iou(a, ~a) == 0
