"""light.py - lamps around a shape, and how much of their light reaches a point.

The light is a list of lamps: a sun that covers a small disc, a fill from the other side, a sky that covers the
hemisphere. Every lamp casts a hard shadow. The sum of many hard shadows is soft. Letters: l lamps, k points.
"""
import math

import torch
import torch.nn.functional as F

from geometry.camera import view_rotation

SHADOW = 96                        # texels along the side of a shadow map; few, so that it is soft and fast


def scatter(count):
    """Points evenly over the unit cube (k 3), always the same: multiples of the powers of 1/1.2207, modulo 1."""
    i = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    return (i * torch.tensor([.8191725134, .6710436067, .5497004779], dtype=torch.float64) % 1).float()


def lamps(azimuth):
    """Directions (l 3) and linear colours (l 3). They turn with the eye: light comes from the left in every view."""
    def cap(count, axis, cosine, colour):                          # evenly over the cap around an axis
        i = torch.arange(count)
        z, turn = 1 - (i + .5) / count * (1 - cosine), i * math.pi * (3 - 5 ** .5)             # golden angle
        r = (1 - z * z).sqrt()
        directions = torch.stack([r * turn.cos(), r * turn.sin(), z], -1) @ axis
        return directions, torch.tensor(colour).expand(count, 3) / count

    sun = cap(12, view_rotation(azimuth - 48, 54), .97, (1.02, .96, .87))
    fill = cap(4, view_rotation(azimuth + 55, 20), .95, (.17, .18, .21))
    sky = cap(24, view_rotation(azimuth, 90), .05, (.64, .66, .71))
    return [torch.cat(group) for group in zip(sun, fill, sky)]


def arriving_light(cloud, azimuth, position, normal):
    """The light at surface points (k 3): the sum over lamps of colour x visible x cosine, and light from the floor.

    The shape casts its shadow as a cloud of surface points, drawn into a coarse shadow map for each lamp. The points
    are lifted off the surface by two texels: so the surface does not shade itself."""
    low, high = cloud.amin(0), cloud.amax(0)
    centre, radius = (low + high) / 2, (high - low).norm() / 2 + 1e-6
    cloud, lifted = ((cloud - centre) / radius).T, (position - centre) / radius + normal * 4 / SHADOW      # 3 k, k 3
    # Random moves by a texel turn the edges of texels into grain. Averaging the samples of a pixel removes the grain.
    lifted = (lifted + (scatter(len(lifted)) - .5) * 4 / SHADOW).T.contiguous()          # 3 k
    floor = torch.tensor([.26, .25, .24])         # reaches what faces down; the shape partly shades its own floor
    total = floor * (.5 - .5 * normal[:, 1:2])                                 # k 3

    for direction, colour in zip(*lamps(azimuth)):
        side = F.normalize(torch.linalg.cross(direction, torch.tensor([.31, .17, .94])), dim=0)
        basis = torch.stack([side, torch.linalg.cross(direction, side), -direction])

        def texel(points):                        # a rim of texels stays empty, for all that lies outside
            u, v, depth = basis @ points
            u, v = (s.mul_(.48 * SHADOW).add_(SHADOW / 2).long().clamp_(0, SHADOW - 1) for s in (u, v))
            return v * SHADOW + u, depth

        occluder = torch.full((SHADOW * SHADOW,), 9.).scatter_reduce_(0, *texel(cloud), "amin")
        index, depth = texel(lifted)
        visible = ((occluder[index] - depth) * (SHADOW / 4) + 1).clamp_(0, 1)            # k
        total.addcmul_((visible * (normal @ direction).clamp_(min=0))[:, None], colour)
    return total
