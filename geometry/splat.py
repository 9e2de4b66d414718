"""splat.py - pictures of 3D Gaussians, differentiable (Kerbl et al. 2023). The light is in their colours.

Letters: b pictures, k Gaussians, n tiles, q blocks of m Gaussians that meet one tile, x and y pixels.
"""
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from geometry.camera import EYE, HALF, as_tensor, view_rotations
from geometry.render import shade

TILE = 8                           # pixels along a side of a tile, which blends only the Gaussians that meet it
BLOCK = 32                         # Gaussians: a tile has as many blocks as it needs, of which the last is padded
CHUNK = 512                        # blocks that are blended at a time
BLUR = .3                          # variance in pixels^2 that every Gaussian gains on the screen, as in 3DGS viewers


def baked_light(normal):
    """The light in the colours of 3D Gaussians (... k 1), as viewers add none: one lamp at the upper left, in sRGB."""
    x, y, z = normal.split(1, -1)
    return .75 + .25 * (-.5 * x + y + .7 * z) / (.5 ** 2 + 1 + .7 ** 2) ** .5


def rotation_matrices(rotations):
    """Quaternions w x y z of any length (... 4) -> rotation matrices (... 3 3)."""
    w, x, y, z = F.normalize(rotations, dim=-1).unbind(-1)
    matrix = torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                          2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                          2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1)
    return rearrange(matrix, "... (i j) -> ... i j", i=3)


def project_gaussians(means, scales, rotations, views, size):
    """3D Gaussians on the screen: centres (b k 2, pixels), covariances (b k 2 2), distances (b k). With the Jacobian J
    of the projection, Sigma' = J V R S^2 R^T V^T J^T (Zwicker et al. 2001, EWA splatting)."""
    x, y, z = (means @ views.mT).unbind(-1)
    distance = (EYE - z).clamp(min=.5)                                                     # as in camera.project
    zero, focal = torch.zeros_like(x), EYE / HALF * size / 2 / distance
    xy = size / 2 + torch.stack([focal * x, -focal * y], -1)                               # b k 2
    jacobian = torch.stack([torch.stack([focal, zero, focal * x / distance], -1),
                            torch.stack([zero, -focal, -focal * y / distance], -1)], -2)   # b k 2 3
    spread = jacobian @ views[:, None] @ (rotation_matrices(rotations) * scales[..., None, :])         # b k 2 3
    return xy, spread @ spread.mT + BLUR * torch.eye(2, device=means.device), distance


def numbered(counts, total):
    """Items of each owner, b k -> the owner of each of `total` consecutive items, b total (k: none), and its number
    among those of its owner."""
    ends = counts.cumsum(1)                                                                # b k
    item = torch.arange(total, device=counts.device).repeat(len(counts), 1)                # b total
    owner = torch.searchsorted(ends, item, right=True)
    return owner, item - F.pad(ends, (1, 0)).gather(1, owner)


@torch.no_grad()
def blocks_of(xy, covariance, distance, size, pairs):
    """-> the Gaussians of every block, nearest first, b q m (k: none); its tile (n: none) and its number in the blocks
    of that tile, b q each; the last block of every tile, b n.

    As in Kerbl et al., pairs of a Gaussian and a tile that it meets are sorted by tile. A picture has at most `pairs`:
    the farthest Gaussians lose theirs. (None: all; this waits for a GPU.)"""
    k, side, reach = xy.shape[1], -(-size // TILE), 3 * covariance.diagonal(dim1=2, dim2=3).sqrt()     # three sigma
    low, high = ((xy + sign * reach).div(TILE).floor().clamp(-1, side).long() for sign in (-1, 1))     # b k 2, tiles
    low, high = low.clamp(min=0), high.clamp(max=side - 1)
    order, (width, height) = distance.argsort(), (high - low + 1).clamp(min=0).unbind(-1)  # b k each
    count = (width * height).gather(1, order)                                              # b k
    rank, number = numbered(count, pairs or int(count.sum(1).max()))                       # b p
    gaussian = F.pad(order, (0, 1), value=k).gather(1, rank)                               # b p
    left, top, width = (F.pad(x, (0, 1), value=1).gather(1, gaussian) for x in (*low.unbind(-1), width))
    tile = torch.where(gaussian < k, (top + number // width) * side + left + number % width, side ** 2)
    tile, by_tile = tile.sort(stable=True)                                                 # then by distance
    gaussian = F.pad(gaussian.gather(1, by_tile), (0, 1), value=k)                         # b (p + 1)

    start = torch.searchsorted(tile, torch.arange(side ** 2 + 2, device=xy.device).repeat(len(xy), 1))      # b (n + 2)
    count = (-(-start[:, :-1].diff() // BLOCK)).clamp(min=1)                               # b n, blocks
    tile, number = numbered(count, pairs // BLOCK + side ** 2 if pairs else int(count.sum(1).max()))        # b q
    place = (start.gather(1, tile) + BLOCK * number)[..., None] + torch.arange(BLOCK, device=xy.device)     # b q m
    place = torch.where(place < start.gather(1, tile + 1)[..., None], place, gaussian.shape[1] - 1)
    return gaussian.gather(1, place.flatten(1)).view_as(place), tile, number, count.cumsum(1) - 1


def blend(features, index, tile, side):
    """Features of Gaussians k 10, the Gaussians of blocks q m, their tiles q -> the pixels of the blocks, q y x 4:
    colour times coverage, coverage."""
    found = features[index]                                                                # q m 10
    x, y, a, b, c, opacity, *_ = rearrange(found, "q m i -> i q 1 1 m")
    pixel = torch.arange(TILE, device=tile.device) + .5
    dx = rearrange(tile % side * TILE, "q -> q 1 1 1") + rearrange(pixel, "x -> x 1") - x  # q 1 x m
    dy = rearrange(tile // side * TILE, "q -> q 1 1 1") + rearrange(pixel, "y -> y 1 1") - y           # q y 1 m
    power = -.5 * a * dx ** 2 - .5 * c * dy ** 2 - b * dx * dy                             # q y x m
    alpha = (opacity * power.exp()).clamp(max=.99)
    passed = torch.log1p(-alpha).cumsum(-1)                                                # log of prod (1 - alpha)
    weight = alpha * F.pad(passed[..., :-1], (1, 0)).exp()
    return torch.einsum("q y x m, q m c -> q y x c", weight, found[..., 6:])


def composite(pixels, number, most):
    """Pixels of blocks, b q y x 4, and the numbers of the blocks in their tiles, b q, below `most` -> each block behind
    all earlier ones of its tile: a segmented parallel scan (Hillis and Steele 1986)."""
    for i in range((most - 1).bit_length()):
        front, back = pixels[:, :-2 ** i], pixels[:, 2 ** i:]
        there = rearrange(number[:, 2 ** i:] >= 2 ** i, "b q -> b q 1 1 1")                # in the same tile
        pixels = torch.cat([pixels[:, :2 ** i], torch.where(there, front + (1 - front[..., 3:]) * back, back)], 1)
    return pixels


def splats(means, scales, rotations, opacities, colours, angles, size, pairs=None):
    """means, scales (b k 3), rotations (b k 4, w x y z), opacities (b k), colours (b k 3), azimuth and elevation (b 2,
    degrees) -> pictures (b size size 4): colour times coverage, coverage. All of it is differentiable (Kerbl et al.
    2023):

        C = sum_i c_i alpha_i prod_{j < i} (1 - alpha_j),    alpha_i = o_i exp(-d^T Sigma'^-1 d / 2),    nearest first

    Chunks of blocks are blended one after another, and blended again for the gradient: this bounds memory. pairs: see
    blocks_of."""
    xy, covariance, distance = project_gaussians(means, scales, rotations, view_rotations(angles), size)
    index, tile, number, last = blocks_of(xy, covariance, distance, size, pairs)
    (a, b), (_, c) = rearrange(covariance, "b k i j -> i j b k")
    inverse = torch.stack([c, -b, a], -1) / (a * c - b ** 2)[..., None]                    # b k 3; linalg.inv waits
    features = torch.cat([xy, inverse, opacities[..., None], F.pad(colours, (0, 1), value=1)], -1)     # b k 10
    features = F.pad(features, (0, 0, 0, 1))                                               # row k: no Gaussian
    row = torch.arange(len(xy), device=xy.device)[:, None]                                 # b 1
    index, side, pixels = index + row[..., None] * features.shape[1], -(-size // TILE), []
    again = partial(checkpoint, blend, use_reentrant=False, preserve_rng_state=False)
    for chunk in zip(index.flatten(0, 1).split(CHUNK), tile.flatten().split(CHUNK)):
        pixels.append((again if torch.is_grad_enabled() else blend)(features.flatten(0, 1), *chunk, side))
    pixels = rearrange(torch.cat(pixels), "(b q) y x c -> b q y x c", b=len(xy))
    pixels = composite(pixels, number, -(-xy.shape[1] // BLOCK))[row, last]                # b n y x 4
    return rearrange(pixels, "b (r q) y x c -> b (r y) (q x) c", r=side)[:, :size, :size]


def splat(means, scales, rotations, opacities, colours, azimuth, elevation, size, background=(1., 1., 1.)):
    """One picture (size size 3), from angles in degrees, before a background: a colour, or a picture."""
    gaussians = (x[None] for x in (means, scales, rotations, opacities, colours))
    image = splats(*gaussians, torch.tensor([[azimuth, elevation]]).to(means), size)[0]
    return image[..., :3] + (1 - image[..., 3:]) * torch.as_tensor(background).to(image)


def render_gaussians(means, scales, rotations, opacities, colours, azimuth=35, elevation=25, size=256):
    """3D Gaussians as `splat` takes them, above the same floor, with their shadow."""
    means, scales, rotations, opacities, colours = map(as_tensor, (means, scales, rotations, opacities, colours))
    no_pixels = torch.zeros(0, dtype=torch.int64), *[torch.zeros(0, 3)] * 3
    ground = shade(lambda view, width: no_pixels, means[opacities > .5], azimuth, elevation, size)
    image = splat(means, scales, rotations, opacities, colours, azimuth, elevation, size, as_tensor(ground) / 255)
    return (image.clamp(0, 1) * 255).round().byte().numpy()
