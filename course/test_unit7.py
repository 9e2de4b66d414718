"""Unit 7: your own representation."""
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import trimesh
from einops import rearrange
from torch import nn

from course import blocks
from course.blocks import CENTRES, SIDE, BlockHead

RADIUS = .6


class Ball:
    @staticmethod
    def distance(points):
        return np.linalg.norm(points - [.1, 0, 0], axis=1) - RADIUS


def test_voxels_of_a_ball():
    """A voxel is inside, if the distance of its centre is negative. Row (x 32 + y) 32 + z, as in CENTRES."""
    inside = blocks.voxels_of(Ball)
    assert inside.shape == (SIDE ** 3,) and inside.dtype == bool
    assert inside.mean() * 8 == pytest.approx(4 / 3 * np.pi * RADIUS ** 3, rel=.01)
    x = rearrange(inside, "(x y z) -> x (y z)", x=SIDE, y=SIDE)
    assert x.any(1).nonzero()[0].tolist() == [*range(8, 27)]  # it begins at x = -.5, and ends at .7


class Split:
    """Stands for a prepared set of two shapes; its second shape is mirrored."""
    device = torch.device("cpu")
    voxels = torch.stack([CENTRES[:, 0] > 0, CENTRES[:, 1] > .5])

    def take(self, name, rows, columns):
        assert name == "voxels"
        return self.voxels[rows][:, columns].float()

    def moved(self, x, rows):
        return torch.where(torch.as_tensor(rows)[:, None, None] == 1, -x, x)


def test_a_batch_of_voxels():
    """Centres of random voxels, moved as their shapes are, and what `take` finds at these voxels, the same ones."""
    batch = lambda seed: BlockHead.batch_of(Split(), torch.tensor([0, 1, 0]), torch.Generator().manual_seed(seed))
    points, inside = batch(0)["points"], batch(0)["inside"]
    assert points.shape == (3, BlockHead.POINTS, 3) and inside.shape == (3, BlockHead.POINTS)
    assert torch.equal(points[1], -points[0])
    assert torch.equal(inside[0], (points[0, :, 0] > 0).float())
    assert torch.equal(inside[1], (points[1, :, 1] < -.5).float())
    assert torch.equal(batch(0)["points"], points) and not torch.equal(batch(1)["points"], points)
    assert len(points[0].unique(dim=0)) > .9 * BlockHead.POINTS


class Head(BlockHead):
    """Its logit is 10 x: inside is where x > 0. The first token's first channel moves this border."""

    def __init__(self):
        nn.Module.__init__(self)

    def read(self, tokens):
        return tokens[:, :1, :1]

    def evaluate(self, memory, x, extra=0.):
        return 10 * (x[..., :1] - memory)


def test_the_loss_is_binary_cross_entropy():
    """log(1 + exp(-logit)) where it is inside, log(1 + exp(logit)) where it is not, the mean; "wrong" is the share of
    logits with the wrong sign. The logits are those of `evaluate`, given what `read` makes of the tokens."""
    tokens = torch.full((2, 4, 3), .1, requires_grad=True)
    points = torch.tensor([[[.2, 0, 0], [.3, 0, 0]], [[0., 0, 0], [.2, 0, 0]]])
    batch = {"points": points, "inside": torch.tensor([[1., 0], [0, 1]])}
    loss, logs = Head().loss(tokens, batch)
    logits = torch.tensor([1., -2, 1, 1])                     # positive where it is right
    assert torch.allclose(loss, (1 + (-logits).exp()).log().mean(), atol=1e-5) and logs["wrong"] == .25
    loss.backward()
    assert tokens.grad[0, 0, 0].abs() > .1


def test_sides_look_outward():
    """The volume that the sides enclose, by the divergence theorem, is that of the blocks: corners are
    counter-clockwise, seen from outside. So it is where two blocks touch at an edge, or at the border of the grid."""
    for first, second in (((1, 2, 3), (2, 2, 3)), ((1, 2, 3), (2, 3, 3)), ((0, 0, 0), (3, 3, 3))):
        inside = np.zeros((4, 4, 4), bool)
        inside[first] = inside[second] = True
        corners = blocks.outer_sides(inside)
        assert corners.shape[1:] == (4, 3)
        low, high = np.minimum(first, second), np.maximum(first, second) + 1
        assert (corners.min((0, 1)) == low).all() and (corners.max((0, 1)) == high).all()
        faces = np.arange(len(corners))[:, None, None] * 4 + [[0, 1, 2], [0, 2, 3]]
        assert trimesh.Trimesh(corners.reshape(-1, 3), faces.reshape(-1, 3)).volume == pytest.approx(2)


def test_no_side_is_between_two_blocks():
    """Only sides between inside and outside: a cube of 3^3 blocks has 9 on each of its faces."""
    inside = np.zeros((5, 5, 5), bool)
    inside[1:4, 1:4, 1:4] = True
    corners = blocks.outer_sides(inside)
    assert len(corners) == 6 * 9
    assert len(np.unique(corners.mean(1), axis=0)) == 6 * 9


class Red(nn.Module):
    """Stands for the sdf head: outputs distance, then colour."""

    def read(self, tokens):
        return tokens

    def evaluate(self, memory, x):
        return torch.tensor([9., 1, 0, 0]).expand(*x.shape[:2], 4)


def test_half_of_the_cube_is_decoded():
    """Blocks are where the logit is above 0; the grid fills [-1, 1]^3. Sides have the colours of the sdf head, which
    follow its distance; without one, they are grey."""
    tokens, head = torch.zeros(4, 3), Head()
    mesh = head.decode(tokens, {"sdf": Red()}, None, nullcontext)
    assert np.allclose(mesh.vertices.min(0), [0, -1, -1]) and np.allclose(mesh.vertices.max(0), 1)
    assert trimesh.Trimesh(mesh.vertices, mesh.faces).volume == pytest.approx(4)
    assert len(mesh.faces) == 2 * (2 * SIDE ** 2 + 4 * SIDE ** 2 // 2)
    assert (mesh.colours == [1, 0, 0]).all() and mesh.colours.shape == mesh.vertices.shape
    assert np.allclose(head.decode(tokens, {}, None, nullcontext).colours, blocks.GREY)
