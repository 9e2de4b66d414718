"""symmetry.py - the eight positions of a shape whose file has no front: turned by right angles, and mirrored.

Low-poly meshes are stored in all of them (representations/mesh.py). Points and pictures are stored once, as the shape
is oriented in its file, and moved when they are drawn: stored, the surfaces alone of 6,116 files would take 4.8 GB in
place of .6.
"""
import functools

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

MIRROR, TURN = np.diag([-1, 1, 1]), np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])      # x to -x; x to -z, z to x
SYMMETRIES = np.stack([np.linalg.matrix_power(TURN, i // 2) @ np.linalg.matrix_power(MIRROR, i % 2)      # 8 3 3
                       for i in range(8)])                    # a shape, its mirror image, the same turned, ...


@functools.cache
def matrices(device):
    return torch.from_numpy(SYMMETRIES).float().to(device)


def is_mirrored(position):
    return position % 2 == 1


def move_points(x, position):
    """Points or vectors b k 3 of shapes in position 0, and positions b, numbers of SYMMETRIES -> the same, moved."""
    moves = rearrange(matrices(x.device)[position], "b i j -> b 1 i j")
    return (moves * rearrange(x, "b k j -> b k 1 j")).sum(-1)                     # autocast would round an einsum


def mirror_pictures(pictures, position):
    """b h w ...: those of mirrored shapes are flipped from left to right. Turned, a shape keeps its pictures."""
    mirrored = is_mirrored(position).reshape(-1, *[1] * (pictures.ndim - 1))
    return torch.where(mirrored, pictures.flip(2), pictures)


def mirror_normals(pictures, position):
    """The same for pictures of normals in the camera's frame, b h w 3: their x changes its sign."""
    sign = F.pad(rearrange(1 - 2 * (position % 2), "b -> b 1 1 1"), (0, 2), value=1)                      # b 1 1 3
    return sign * mirror_pictures(pictures, position)


def move_azimuths(azimuth, position):
    """The side, in degrees, from which a camera sees shapes after their move as it saw them before: b."""
    return torch.where(is_mirrored(position), -azimuth, azimuth) + 90 * (position // 2)


def turns_to_front(azimuth):
    """How many right angles a shape is turned, until a picture of this azimuth is from its front, to 45 degrees."""
    return (-azimuth / 90).round().long() % 4
