"""camera.py - a pinhole camera, and sRGB. Letters: k points, p pixels. A `view` is a rotation, 3 3."""
import math

import numpy as np
import torch

EYE = 6.                           # distance of the eye from the origin; it is far, so perspective is slight
HALF = 1.42                        # half the height of the picture at the origin; shapes lie within .9


def as_tensor(array, dtype=torch.float32):
    """A numpy array, or a tensor on any device -> a tensor on the CPU. Arrays may be read-only or reversed."""
    array = array.detach().cpu() if torch.is_tensor(array) else torch.from_numpy(np.array(array, order="C"))
    return array.to(dtype)


def view_rotation(azimuth, elevation):
    """Angles in degrees -> 3 3, its rows: right, up, towards the eye. At (0, 0) the eye is in front of the shape."""
    a, e = math.radians(azimuth), math.radians(elevation)
    return torch.tensor([[math.cos(a), 0, -math.sin(a)],
                         [-math.sin(a) * math.sin(e), math.cos(e), -math.cos(a) * math.sin(e)],
                         [math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)]])


def project(points, view, width):
    """World points (k 3) -> pixel coordinates (k 2), y down, and their distance from the eye (k)."""
    x, y, z = (points @ view.T).unbind(-1)
    distance = (EYE - z).clamp(min=.5)                                         # a point behind the eye does no harm
    scale = EYE / HALF / distance
    return torch.stack([1 + x * scale, 1 - y * scale], -1) * width / 2, distance


def rays(view, width):
    """The direction through every pixel centre, row by row (p 3), of length 1 along the view axis."""
    s = (torch.arange(width, device=view.device) + .5) * 2 / width - 1
    y, x = torch.meshgrid(-s, s, indexing="ij")
    return torch.stack([x * HALF / EYE, y * HALF / EYE, -torch.ones_like(x)], -1).flatten(0, 1) @ view


def to_linear(colour):                             # sRGB, as in pictures, -> proportional to the light
    return torch.where(colour <= .04045, colour / 12.92, ((colour + .055) / 1.055) ** 2.4)


def to_srgb(colour):
    return torch.where(colour <= .0031308, colour * 12.92, 1.055 * colour.clamp(min=1e-8) ** (1 / 2.4) - .055)
