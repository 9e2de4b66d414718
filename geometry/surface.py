"""geometry/surface.py - shape tokens -> a mesh: distances on a grid that is refined only near the surface, then marching cubes.

A dense grid of 256^3 asks 17 million points, of which half a million matter. What asks them is a head (heads.py):

    memory = head.read(tokens)         once
    head.evaluate(memory, points)           in chunks; to keep keys and values of the memory would spare 1 in 100 operations

    python bench.py decode             # is it the same mesh as that of the dense grid, and how much faster?
"""
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from skimage.measure import marching_cubes

TRUNCATION = .1     # distances are learnt this deep, and exact so deep inside; deeper they are a bound
COARSE = 32  # the first grid; a resolution is 32 times a power of two
NEAR = 1.    # cells of a finer grid within which of the surface it is asked at first


def cut(inside):
    """inside: r r r of booleans -> the corners of cells that have corners both inside and outside."""
    some, all_ = inside, inside
    for axis in range(3):                                     # corners to cells: r - 1 along each axis
        ends = lambda x: (x.narrow(axis, 0, x.shape[axis] - 1), x.narrow(axis, 1, x.shape[axis] - 1))
        some, all_ = torch.logical_or(*ends(some)), torch.logical_and(*ends(all_))
    cells = F.pad(some & ~all_, [1] * 6)                      # a border of cells that are not cut
    for axis in range(3):                                     # and back
        cells = cells.narrow(axis, 0, cells.shape[axis] - 1) | cells.narrow(axis, 1, cells.shape[axis] - 1)
    return cells


@torch.no_grad()
def sdf_grid(ask, resolution, hierarchical=True, device="cpu"):
    """Distances (units of the truncation) on a (resolution + 1)^3 grid over [-1, 1]^3: numpy r r r.

    `ask` maps points k 3 to distances k, both on the device. Coarse to fine: distances are interpolated to the double
    resolution and asked again where the surface may be near, then at all corners of cells that it turns out to cut, until
    there are no more: what marching cubes makes of it is what it makes of a dense grid, unless a part is missed that lies
    between the points of a coarser one. Elsewhere the sign is all that it needs.
    """
    side = COARSE if hierarchical else resolution
    index = torch.stack(torch.meshgrid(*[torch.arange(side + 1, device=device)] * 3, indexing="ij"), -1)
    grid = ask(index.reshape(-1, 3) * 2 / side - 1).reshape(index.shape[:3])
    while side < resolution:
        side *= 2
        grid = F.interpolate(grid[None, None], size=(side + 1,) * 3, mode="trilinear", align_corners=True)[0, 0]
        reach = NEAR * 2 / side / TRUNCATION
        near, asked = (grid < reach) & (grid > -reach), torch.zeros_like(grid, dtype=torch.bool)
        while len(points := (near & ~asked).nonzero()):
            grid[points.unbind(1)] = ask(points * 2 / side - 1)
            asked |= near
            near = cut(border(grid < 0, False))
    return border(grid, 1.).cpu().numpy()


def border(grid, value):
    """Nothing leaves the cube: every mesh is closed."""
    for face in (grid, grid.transpose(0, 1), grid.transpose(0, 2)):
        face[0] = face[-1] = value
    return grid


def chunks(x):
    """k 3 in parts: what fits a core's cache is a quarter faster."""
    return x.split(2 ** 17 if x.is_cuda else 2 ** 13)


@torch.no_grad()
def extract(head, tokens, resolution=128, autocast=nullcontext, hierarchical=True):
    """tokens n c -> vertices v 3, faces f 3 (outward), colours v 3 in [0, 1]: numpy arrays."""
    with autocast():
        memory = head.read(tokens[None])

    def ask(x):                                               # k 3 -> k 4, chunk by chunk
        with autocast():
            return torch.cat([head.evaluate(memory, part[None])[0] for part in chunks(x)])

    grid = sdf_grid(lambda x: ask(x)[:, 0], resolution, hierarchical, tokens.device)
    if grid.min() >= 0:
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64), np.zeros((0, 3), np.float32)
    vertices, faces, _, _ = marching_cubes(grid, 0., gradient_direction="descent")
    vertices = np.ascontiguousarray(vertices * 2 / resolution - 1, dtype=np.float32)
    colours = ask(torch.from_numpy(vertices).to(tokens.device))[:, 1:].clamp(0, 1).cpu().numpy()
    return vertices, np.ascontiguousarray(faces, dtype=np.int64), colours
