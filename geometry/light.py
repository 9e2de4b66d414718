"""geometry/light.py - lamps around a shape, and how much of their light reaches a point.

The light is a list of lamps: a sun spread over a small disc, a fill from the other side, a sky spread over the
hemisphere. Every lamp casts a hard shadow, the sum is soft: dark corners under a table top and the blurred
shadow on the floor come out of one line. Letters: l lamps, k points.

    python geometry/render.py out/table-0.glb        # a picture in this light
"""
import math

import torch
import torch.nn.functional as F

SHADOW = 96                        # texels along a lamp's shadow map: coarse is soft, and quick


def scatter(count):
    """Points evenly over the unit cube (k 3), always the same: multiples of the powers of 1/1.2207, modulo 1."""
    i = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    return (i * torch.tensor([.8191725134, .6710436067, .5497004779], dtype=torch.float64) % 1).float()


def look(azimuth, elevation):
    """Rows: right, up, towards the eye, for angles in degrees; (0, 0) looks an object in the face."""
    a, e = math.radians(azimuth), math.radians(elevation)
    return torch.tensor([[math.cos(a), 0, -math.sin(a)],
                         [-math.sin(a) * math.sin(e), math.cos(e), -math.cos(a) * math.sin(e)],
                         [math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)]])


def lamps(azimuth):
    """Directions (l 3) and linear colours (l 3). They turn with the eye: every view is lit from its left."""
    def cap(count, axis, cosine, colour):                          # evenly over the cap around an axis
        i = torch.arange(count)
        z, turn = 1 - (i + .5) / count * (1 - cosine), i * math.pi * (3 - 5 ** .5)             # golden angle
        r = (1 - z * z).sqrt()
        return torch.stack([r * turn.cos(), r * turn.sin(), z], -1) @ axis, torch.tensor(colour).expand(count, 3) / count

    sun = cap(12, look(azimuth - 48, 54), .97, (1.02, .96, .87))
    fill = cap(4, look(azimuth + 55, 20), .95, (.17, .18, .21))
    sky = cap(24, look(azimuth, 90), .05, (.64, .66, .71))
    return [torch.cat(part) for part in zip(sun, fill, sky)]


def light(cloud, azimuth, position, normal):
    """Light arriving at surface points (k 3): sum over lamps of colour x visible x cosine, plus the floor's glow.

    A lamp sees the shape as a cloud of surface points, drawn into a coarse shadow map. Receivers are lifted
    off their surface by two texels, so that a surface does not shade itself."""
    low, high = cloud.amin(0), cloud.amax(0)
    centre, radius = (low + high) / 2, (high - low).norm() / 2 + 1e-6
    cloud, lifted = ((cloud - centre) / radius).T, (position - centre) / radius + normal * 4 / SHADOW
    # Moving receivers about by a texel turns the edges of texels into grain, which anti-aliasing averages away.
    lifted = (lifted + (scatter(len(lifted)) - .5) * 4 / SHADOW).T.contiguous()
    glow = torch.tensor([.26, .25, .24])          # what looks down sees the floor, partly in the shape's own shadow
    total = glow * (.5 - .5 * normal[:, 1:2])
    for direction, colour in zip(*lamps(azimuth)):
        side = F.normalize(torch.linalg.cross(direction, torch.tensor([.31, .17, .94])), dim=0)
        basis = torch.stack([side, torch.linalg.cross(direction, side), -direction])

        def texel(points):                        # a rim of texels stays empty, for all that lies outside
            u, v, depth = basis @ points
            u, v = (s.mul_(.48 * SHADOW).add_(SHADOW / 2).long().clamp_(0, SHADOW - 1) for s in (u, v))
            return v * SHADOW + u, depth

        occluder = torch.full((SHADOW * SHADOW,), 9.).scatter_reduce_(0, *texel(cloud), "amin")
        index, depth = texel(lifted)
        visible = ((occluder[index] - depth) * (SHADOW / 4) + 1).clamp_(0, 1)
        total.addcmul_((visible * (normal @ direction).clamp_(min=0))[:, None], colour)
    return total


def baked(normal):
    """The light that colours of 3D Gaussians hold (... k 1), since viewers shine none on them: sRGB, a lamp up to the left."""
    return .75 + .25 * (normal @ F.normalize(torch.tensor([-.5, 1, .7]), dim=0).to(normal))[..., None]


def to_linear(colour):
    return torch.where(colour <= .04045, colour / 12.92, ((colour + .055) / 1.055) ** 2.4)


def to_srgb(colour):
    return torch.where(colour <= .0031308, colour * 12.92, 1.055 * colour.clamp(min=1e-8) ** (1 / 2.4) - .055)
