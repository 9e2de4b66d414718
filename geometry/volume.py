"""volume.py - differentiable pictures of a signed distance and colours on a grid (volume rendering).

Cameras, light and crop are those of the pictures that LATTE3D learns from (relatives/prior.py). Letters: v
views of p pixels, s x s; k points on each ray; a grid of s^3 cells over [-1, 1]^3.

    grid -> along_rays: points and weights -> render: colours of the grid, or paint: colours of a texture
"""
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange

from geometry.camera import EYE, rays, view_rotations
from geometry.splat import baked_light
from geometry.surface import TRUNCATION
from geometry.training_samples import REACH

SIDE, RIM = 32, 4                    # pixels along a side and of the border, cut off

POINTS = 32          # on each ray


def pixel_rays(angles):
    """Cameras, b v 2 in degrees -> eyes b v 1 3; directions b v p 3, of length 1 along the view axis; the view axis,
    towards the eye, b v 1 3."""
    view, width = view_rotations(angles.flatten(0, 1)), SIDE + 2 * RIM                             # (b v) 3 3
    ray = rays(torch.eye(3, device=view.device), width)                                            # (h w) 3
    ray = rearrange(ray, "(h w) i -> h w i", h=width)[RIM:-RIM, RIM:-RIM].flatten(0, 1)            # p 3
    ray, towards = torch.einsum("p i, b i j -> b p j", ray, view), view[:, 2:]
    return [x.unflatten(0, angles.shape[:2]) for x in (EYE * towards, ray, towards)]


def look_up(grid, points):                                    # b f s s s, points b ... 3 in [-1, 1]^3 -> b f ...
    flat = rearrange(points.flatten(1, -2).flip(-1), "b k i -> b k 1 1 i")        # grid_sample: last axis first
    found = F.grid_sample(grid, flat, align_corners=False, padding_mode="border")
    return found[..., 0, 0].unflatten(-1, points.shape[1:-1])


def gradient(distance):                                       # b s s s -> b 3 s s s
    return torch.stack(torch.gradient(distance, spacing=2 / distance.shape[-1], dim=(1, 2, 3)), 1)


def along_rays(grid, angles, beta, jitter=0.):
    """Volume rendering with the density of VolSDF (arXiv 2106.12052):

        density(d) = exp(-d / beta) / 2 beta             d > 0            alpha_i = 1 - exp(-density_i delta)
                     (1 - exp(d / beta) / 2) / beta      d <= 0           weight_i = alpha_i prod_(j < i) (1 - alpha_j)

    The product is exp(-sum_(j < i) density_j delta): the gradient of a cumulative product waits for a GPU.

    A grid b f s s s, distance first -> the rest at points on the rays, b f-1 v p k; these points, b v p k 3, their
    weights b v p k, and depths b v p k, from 0 (far) to 1."""
    eye, ray, towards = pixel_rays(angles)
    delta = 2 * REACH / POINTS
    t = EYE - REACH + delta * (torch.arange(POINTS, device=grid.device) + .5 + jitter)     # k
    points = rearrange(eye, "b v p i -> b v p 1 i") + rearrange(ray, "b v p i -> b v p 1 i") * t[:, None]
    found = look_up(grid, points)
    d, found = found[:, 0], found[:, 1:]
    tail = .5 * torch.exp(-d.abs() / beta)
    thick = torch.where(d > 0, tail, 1 - tail) * delta / beta                     # b v p k, density times delta
    before = F.pad(thick[..., :-1].cumsum(-1), (1, 0))                            # of the points in front
    depth = .5 + (points * towards[..., None, :]).sum(-1) / (2 * REACH)
    return found, points, (1 - torch.exp(-thick)) * torch.exp(-before), depth


def picture(colour, coverage, depth):                         # b v p c each -> pictures b v s s 4, depths b v s s 2
    square = partial(rearrange, pattern="b v (h w) c -> b v h w c", h=SIDE)
    return square(2 * torch.cat([colour, coverage], -1) - 1), square(torch.cat([depth, coverage], -1))


def render(grid, angles, beta, jitter=0.):
    """Distance and colour, b 4 s s s -> pictures in baked light, b v s s 4 in [-1, 1] (colour times coverage,
    coverage); depth times coverage and coverage, b v s s 2."""
    distance = TRUNCATION * grid[:, 0]
    normal = rearrange(F.normalize(gradient(distance), dim=1), "b i x y z -> b x y z i")
    lit = grid[:, 1:] * rearrange(baked_light(normal), "b x y z 1 -> b 1 x y z")
    found, _, weight, depth = along_rays(torch.cat([distance[:, None], lit], 1), angles, beta, jitter)
    colour = torch.einsum("b v p k, b i v p k -> b v p i", weight, found)
    return picture(colour, weight.sum(-1, keepdim=True), (weight * depth).sum(-1, keepdim=True))


def paint(grid, angles, beta, texture):
    """The same with the colours of a texture, a function of points (b k 3 -> b k 3), at one point of each ray: on the
    surface, which is frozen."""
    with torch.no_grad():
        distance = TRUNCATION * grid[:, 0]
        _, points, weight, depth = along_rays(distance[:, None], angles, beta)
        coverage = weight.sum(-1, keepdim=True)                                   # b v p 1
        surface = torch.einsum("b v p k, b v p k i -> b v p i", weight, points) / coverage.clamp(min=.01)
        normal = rearrange(F.normalize(look_up(gradient(distance), surface), dim=1), "b i v p -> b v p i")
    colour = texture(surface.flatten(1, 2)).unflatten(1, surface.shape[1:3])
    return picture(colour * baked_light(normal) * coverage, coverage, (weight * depth).sum(-1, keepdim=True))
