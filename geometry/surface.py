"""surface.py - shape tokens -> a mesh: distances on a grid that is refined near the surface, then marching cubes.

A dense grid of 256^3 has 17 million points, of which half a million matter.

Letters: r grid points along a side, k points.

    python -m research.bench decode             # compares its mesh and its time with those of the dense grid
"""
import ctypes
from contextlib import nullcontext, suppress

import numpy as np
import torch
import torch.nn.functional as F

from geometry.palette import few_colours

TRUNCATION = .1     # heads learn distances up to this; deeper inside a shape, distances are only a bound
COARSE = 32         # cells along a side of the first grid; a resolution is 32 times a power of two
NEAR = 1.           # cells: points of a finer grid that are nearer to the surface are evaluated first


def any_of_eight(x):
    """Booleans r r r -> one smaller along each axis: is one of eight neighbours True."""
    for axis in range(3):
        x = x.narrow(axis, 0, x.shape[axis] - 1) | x.narrow(axis, 1, x.shape[axis] - 1)
    return x


def corners_of_cut_cells(inside):
    """Booleans r r r at grid points, True inside -> r r r, True at all corners of cells that the surface cuts."""
    cells = any_of_eight(inside) & any_of_eight(~inside)      # a cell has eight corners: r - 1 along each axis
    return any_of_eight(F.pad(cells, [1] * 6))                # a corner has eight cells; outside the grid none is cut


@torch.no_grad()
def sdf_grid(evaluate, resolution, hierarchical=True, device="cpu"):
    """Distances (in units of the truncation) on a (resolution + 1)^3 grid over [-1, 1]^3: r r r, on the device.

    `evaluate` maps points k 3 to distances k, both on the device. Marching cubes needs the distances at the corners of
    cells that the surface cuts; elsewhere the sign is enough. So the mesh is the same as that of a dense grid, but for
    details that lie between the points of a coarser grid: they are lost."""
    # 1. A coarse grid: evaluate all of it.
    side = COARSE if hierarchical else resolution
    index = torch.stack(torch.meshgrid(*[torch.arange(side + 1, device=device)] * 3, indexing="ij"), -1)   # r r r 3
    grid = evaluate(index.reshape(-1, 3) * 2 / side - 1).reshape(index.shape[:3])                          # r r r

    while side < resolution:
        # 2. Interpolate it to twice the resolution.
        side *= 2
        grid = F.interpolate(grid[None, None], size=(side + 1,) * 3, mode="trilinear", align_corners=True)[0, 0]

        # 3. Evaluate it again near the surface, then at the corners of cut cells, until none is left.
        wanted = grid.abs() < NEAR * 2 / side / TRUNCATION                        # r r r booleans
        evaluated = torch.zeros_like(wanted)
        while len(points := (wanted & ~evaluated).nonzero()):                     # k 3
            grid[points.unbind(1)] = evaluate(points * 2 / side - 1)
            evaluated |= wanted
            wanted = corners_of_cut_cells(set_border(grid < 0, False))
    return set_border(grid, 1.)


def set_border(grid, value):
    """Gives all faces of the cube one value, in place. If that value is "outside", every mesh is closed."""
    for planes in (grid, grid.transpose(0, 1), grid.transpose(0, 2)):
        planes[0] = planes[-1] = value
    return grid


def in_chunks(evaluate, x):
    """evaluate(x) for points k 3, in chunks. Those that fit a core's cache save a quarter of the time. The last one is
    padded: torch keeps a plan for every size, so there should be few sizes."""
    padded = F.pad(x, (0, 0, 0, -len(x) % 1024))
    return torch.cat([evaluate(chunk) for chunk in padded.split(2 ** 17 if x.is_cuda else 2 ** 13)])[:len(x)]


def field_of(head, tokens, autocast):
    """Tokens n c -> a function: points k 3, on any device -> outputs of the head, k o."""
    with torch.no_grad(), autocast():
        memory = head.read(tokens[None])

    @torch.no_grad()
    def field(x):
        with autocast():
            return in_chunks(lambda part: head.evaluate(memory, part[None])[0], x.to(tokens.device)).to(x.device)
    return field


@torch.no_grad()
def extract(head, tokens, resolution=128, autocast=nullcontext, hierarchical=True):
    """tokens n c -> vertices v 3, faces f 3 (outward), colours v 3 in [0, 1] of a palette: numpy arrays."""
    from skimage.measure import marching_cubes  # slow to load

    evaluate = field_of(head, tokens, autocast)               # k 3 -> k 4: distance and colour
    grid = sdf_grid(lambda x: evaluate(x)[:, 0], resolution, hierarchical, tokens.device)
    least = torch.stack([grid.amin(axes) for axes in ((1, 2), (0, 2), (0, 1))]).cpu().numpy()     # 3 r: of each layer
    if least.min() >= 0:
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64), np.zeros((0, 3), np.float32)
    inside = [np.flatnonzero(layers <= 0) for layers in least]                # marching cubes gets their box alone
    box = grid[tuple(slice(rows[0] - 1, rows[-1] + 2) for rows in inside)].cpu().numpy()
    vertices, faces, _, _ = marching_cubes(box, 0., gradient_direction="descent")      # faces outward
    vertices = np.ascontiguousarray((vertices + [rows[0] - 1 for rows in inside]) * 2 / resolution - 1, np.float32)
    colours = evaluate(torch.from_numpy(vertices).to(tokens.device))[:, 1:].clamp(0, 1).cpu().numpy()
    faces = np.ascontiguousarray(faces, dtype=np.int64)
    give_back_memory()
    return vertices, faces, few_colours(vertices, faces, colours)


def give_back_memory():
    """Freed memory goes back to the system. malloc would keep it in fragments, more with each shape."""
    with suppress(AttributeError):                            # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
