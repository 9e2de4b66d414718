"""render.py - pictures of meshes, point clouds and 3D Gaussians, without a window and without a GPU.

A z-buffer (geometry/rasterise.py) finds the surface point in each pixel; `shade` lights it (geometry/light.py).
Letters: f faces, v vertices, k points or Gaussians, p pixels.

    python sample.py --text "table"
"""
import math
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from PIL import Image, ImageDraw, ImageFont

from engine.files import atomic_write
from geometry.camera import EYE, as_tensor, rays, to_linear, to_srgb, view_rotation
from geometry.light import arriving_light, lamps, scatter
from geometry.meshes import spread_points
from geometry.rasterise import rasterise_mesh, rasterise_points

PAPER = (.985, .98, .972)          # the background, sRGB: white with a drop of warmth
SAMPLES = 2                        # samples a pixel, along x and along y
FLOOR, CELLS = 2.7, 96             # the floor that receives a shadow: half its width, and its cells along a side
COVER = 30000                      # points that cover a surface, to cast its shadow


# ---------------------------------------------------------------------------- floor and picture

def floor(share, height, view, width):
    """share (z x c): how much light each floor cell keeps -> the same for every pixel (p 3)."""
    share = F.avg_pool2d(F.pad(rearrange(share, "z x c -> 1 c z x"), [2] * 4, mode="replicate"), 5, stride=1)   # softer
    eye, ray = EYE * view[2], rays(view, width)
    t = (height - eye[1]) / ray[:, 1]
    place = (eye + t[:, None] * ray)[:, [0, 2]]                                # p 2, where the ray meets the floor
    share = F.grid_sample(share, place[None, None] / FLOOR, align_corners=True, padding_mode="border")[0, :, 0].T
    # The shadow fades away from the shape and towards the edge of the picture: floor and background are one.
    s = 1 - ((torch.arange(width) + .5) * 2 / width - 1).abs()
    rim = (s[:, None].minimum(s) / .3).clamp(0, 1).flatten()
    fade = ((2.6 - place.norm(dim=-1)) / 1.2).clamp(0, 1) * rim ** 2 * (3 - 2 * rim) * ((t > 0) & (ray[:, 1] < 0))
    return 1 - fade[:, None] * (1 - share)


def shade(rasterise, cloud, azimuth, elevation, size):
    """rasterise(view, width) -> pixels, positions, normals, colours. cloud: points all over the surface (k 3)."""
    view, width = view_rotation(azimuth, elevation), size * SAMPLES
    image = to_linear(torch.tensor(PAPER)).repeat(width * width, 1)
    pixel, position, normal, colour = rasterise(view, width)
    if len(cloud):
        height, s = cloud[:, 1].amin(), torch.linspace(-FLOOR, FLOOR, CELLS)
        cells = torch.cartesian_prod(s, height[None], s).flip(-1)              # x fastest
        up = torch.tensor([[0., 1, 0]]).expand_as(cells)
        light = arriving_light(cloud, azimuth, torch.cat([position, cells]), torch.cat([normal, up]))
        directions, lamp_colours = lamps(azimuth)
        share = light[len(pixel):] / (directions[:, 1].clamp(min=0) @ lamp_colours)      # of the light on an open floor
        share = floor(rearrange(share, "(z x) c -> z x c", z=CELLS), height, view, size)       # smooth: one a pixel
        image *= repeat(share, "(h w) c -> (h a w b) c", h=size, a=SAMPLES, b=SAMPLES)
        image[pixel] = to_linear(colour) * light[:len(pixel)]
    image = reduce(image.clamp(0, 1), "(h a w b) c -> h w c", "mean", h=size, w=size, a=SAMPLES)
    return (to_srgb(image) * 255).round().byte().numpy()


def cover(vertices, faces):
    """Points evenly over the surface (k 3): equal steps of area, then a scattered place in the face."""
    u, v, _ = scatter(COVER).T.numpy()
    return torch.from_numpy(spread_points(vertices.numpy(), faces.numpy(), (np.arange(COVER) + .5) / COVER, u, v)[0])


# ---------------------------------------------------------------------------- pictures: uint8, size size 3

def render_mesh(vertices, faces, colours, azimuth=35, elevation=25, size=256):
    """vertices (v 3), faces (f 3), colours (v 3) in 0..1."""
    vertices, faces, colours = as_tensor(vertices), as_tensor(faces, torch.int64), as_tensor(colours)
    cloud = cover(vertices, faces) if len(faces) else vertices[:0]
    rasterise = lambda view, width: rasterise_mesh(vertices, faces, colours, view, width)
    return shade(rasterise, cloud, azimuth, elevation, size)


def render_points(points, colours, radius, azimuth=35, elevation=25, size=256):
    """points (k 3), colours (k 3) in 0..1; every point is a ball of this radius."""
    points, colours = as_tensor(points), as_tensor(colours)
    offsets = F.normalize(scatter(max(1, COVER // max(1, len(points)))) - .5, dim=1)     # n 3, to points on a ball
    cloud = rearrange(points[:, None] + radius * offsets, "k n c -> (k n) c")
    rasterise = lambda view, width: rasterise_points(points, colours, radius, view, width)
    return shade(rasterise, cloud, azimuth, elevation, size)


def contact_sheet(images, columns, labels=None):
    """Pictures of one size side by side, row by row, a label under each, wrapped -> uint8 (h w 3)."""
    h, w, _ = images[0].shape
    gap, text_size = max(4, w // 32), max(11, w // 16)
    labels = [textwrap.fill(label, 7 * w // (4 * text_size)) for label in labels or ()]
    under = text_size * 3 // 2 * max((label.count("\n") + 1 for label in labels), default=0)
    size = columns * (w + gap) + gap, math.ceil(len(images) / columns) * (h + under + gap) + gap
    sheet = Image.new("RGB", size, tuple(round(255 * c) for c in PAPER))
    for i, image in enumerate(images):
        x, y = gap + i % columns * (w + gap), gap + i // columns * (h + under + gap)
        sheet.paste(Image.fromarray(image), (x, y))
        if labels:
            ImageDraw.Draw(sheet).text((x + w // 2, y + h + text_size // 4), labels[i], fill=(90, 84, 78),
                                       font=ImageFont.load_default(size=text_size), anchor="ma", align="center")
    return np.asarray(sheet)


def save_png(path, array):
    with atomic_write(path) as temporary:
        Image.fromarray(array).save(temporary, "PNG", optimize=True)
