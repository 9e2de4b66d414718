"""camera.py - a pinhole camera, and sRGB. Letters: k points, p pixels. A `view` is a rotation, 3 3."""
import numpy as np
import torch
from einops import rearrange

EYE = 6.                           # distance of the eye from the origin; it is far, so perspective is slight
HALF = 1.42                        # half the height of the picture at the origin; shapes lie within .9


def as_tensor(array, dtype=torch.float32):
    """A numpy array, or a tensor on any device -> a tensor on the CPU. Arrays may be read-only or reversed."""
    array = array.detach().cpu() if torch.is_tensor(array) else torch.from_numpy(np.array(array, order="C"))
    return array.to(dtype)


def view_rotations(angles):
    """Azimuth and elevation in degrees, b 2 -> views b 3 3, their rows: right, up, towards the eye. At (0, 0) the eye
    is in front of the shape."""
    (sin_a, sin_e), (cos_a, cos_e) = (f(torch.deg2rad(angles)).unbind(-1) for f in (torch.sin, torch.cos))
    matrix = torch.stack([cos_a, torch.zeros_like(cos_a), -sin_a,
                          -sin_a * sin_e, cos_e, -cos_a * sin_e,
                          sin_a * cos_e, sin_e, cos_a * cos_e], -1)
    return rearrange(matrix, "b (i j) -> b i j", i=3)


def view_rotation(azimuth, elevation):
    """One view, 3 3."""
    return view_rotations(torch.tensor([[azimuth, elevation]], dtype=torch.double))[0].float()


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
