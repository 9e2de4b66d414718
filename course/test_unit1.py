"""Unit 1: the tokenizer."""
import torch
from einops import rearrange
from torch import nn

import tokenizer
from engine import grids, networks


def test_fourier_features():
    """Beside the position: sin and cos of 2^k pi/2 x for k = 0, 1 ...; for each coordinate first all sines, then all
    cosines."""
    x = torch.tensor([[.5, -1., 0]])
    found = networks.fourier(x, 3)
    assert found.shape == (1, 21) and torch.equal(found[:, :3], x)
    half = 2 ** -.5
    expected = [half, 1, 0, half, 0, -1, -1, 0, 0, 0, -1, 1, 0, 0, 0, 1, 1, 1]
    assert torch.allclose(found[0, 3:], torch.tensor(expected), atol=1e-5)


def test_the_mean_of_each_cell():
    """Row (x side + y) side + z holds the mean of the features of the points in this cell, 0 if there is none; the
    second result is the number of these points. Points on the far faces of the cube, at 1, are in the last cells."""
    points = torch.tensor([[[-.9, -.9, -.9], [-.1, -.5, -.5], [-.5, .5, -.5], [.5, .5, .5], [1, 1, 1]],
                           [[.5, -.5, -.5], [.6, -.4, -.5], [.5, -.5, .5], [.5, -.5, .5], [.5, -.5, -.6]]])
    features = torch.tensor([[[1., 10], [3, 30], [5, 50], [7, 70], [8, 80]], [[1., 0], [2, 0], [3, 0], [5, 1], [6, 0]]])
    means, counts = grids.cell_means(points, features, 2)
    assert means.shape == (2, 8, 2) and counts.shape == (2, 8, 1)
    assert torch.allclose(means[0, :, 0], torch.tensor([2., 0, 5, 0, 0, 0, 0, 7.5]))
    assert torch.allclose(means[0, :, 1], 10 * means[0, :, 0])
    assert torch.allclose(means[1], torch.tensor([[0., 0]] * 4 + [[3, 0], [4, .5], [0, 0], [0, 0]]))
    assert counts[..., 0].tolist() == [[2, 0, 1, 0, 0, 0, 0, 2], [0, 0, 0, 0, 3, 2, 0, 0]]


def test_interpolation_is_exact_for_linear_features():
    """The corner v of a point's eight centres has the weight prod_i (s_i if v_i = 1, else 1 - s_i)."""
    torch.manual_seed(0)
    centres = rearrange(networks.grid_points(4), "(x y z) i -> x y z i", x=4, y=4)
    grid = torch.stack([centres, 2 * centres + 1])            # two shapes: what a point has is its position
    x = torch.rand(2, 100, 3) * 1.5 - .75                     # between the outermost centres
    found = grids.interpolate(grid, x)
    assert torch.allclose(found[0], x[0], atol=1e-5) and torch.allclose(found[1], 2 * x[1] + 1, atol=1e-5)
    at_centres = grids.interpolate(grid[:1] ** 2, rearrange(centres, "x y z i -> 1 (x y z) i"))
    assert torch.allclose(at_centres, rearrange(grid[:1] ** 2, "b x y z i -> b (x y z) i"), atol=1e-5)


def test_points_beyond_the_outermost_centres():
    """They get the features of the nearest point between the centres: nothing is extrapolated."""
    centres = rearrange(networks.grid_points(4), "(x y z) i -> 1 x y z i", x=4, y=4)
    x = torch.tensor([[[-1., .3, .9], [1, 1, 1]]])
    assert torch.allclose(grids.interpolate(centres, x), torch.tensor([[[-.75, .3, .75], [.75, .75, .75]]]))


class Tokens(nn.Module):
    """Stands for a tokenizer. Its tokens have neither mean 0 nor std 1; 2^3 tokens are a patch."""
    patch = 2

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("std", torch.rand(channels) + 1)

    def forward(self, x):                                     # b n c -> b n / 8 8c
        return grids.to_patches((x - self.mean) / self.std, self.patch)


def test_tokens_get_mean_0_and_std_1_and_heads_do_not_notice():
    """A head's first layer is W x + b. If tokens become (x - mean) / std, its W must grow by std, its b by W mean.
    Mind the order of the two. The tokenizer may have a mean and a std already. Patches are separated first."""
    torch.manual_seed(0)
    model, head, x = Tokens(8), nn.Module(), 3 * torch.randn(4, 64, 8) + torch.arange(8)
    head.token = nn.Linear(8, 5)
    with torch.no_grad():
        before = model(x)
        answer = head.token(grids.from_patches(before, 2))
        tokenizer.standardise(model, [head], before)
        after = grids.from_patches(model(x), 2)
        assert after.mean((0, 1)).abs().max() < 1e-4 and (after.std((0, 1)) - 1).abs().max() < 5e-3
        assert torch.allclose(head.token(after), answer, atol=1e-4)
