"""picture_files.py - picture prompts: a file is read, its object is cut out and framed.

In sampling the image tower gets one object that fills a square, on white.
"""
import contextlib
import os
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from engine.commands import UserError
from geometry.crop import crop_to_object

LARGEST = 64_000_000  # pixels of a file
SMALLEST = 16         # pixels along a side; no object can be recognised in a smaller picture


def read_picture(path):
    """A picture file, or an image of Pillow -> colour and coverage, h w 4 in [0, 1], and a warning (or None)."""
    from PIL import Image, ImageOps

    if not isinstance(path, (str, os.PathLike, Image.Image)):
        raise UserError(f"a picture is the name of a file or an image of Pillow, not a {type(path).__name__}")
    Image.MAX_IMAGE_PIXELS = None                             # Pillow's own limit is larger; ours is LARGEST
    try:
        if not isinstance(path, Image.Image) and Path(path).is_fifo():
            raise ValueError("it is a pipe")                  # reading it would never end
        with contextlib.nullcontext(path) if isinstance(path, Image.Image) else Image.open(path) as file:
            size = f"{file.width} x {file.height} pixels"
            if file.width * file.height > LARGEST:
                raise UserError(f"{path} has {size}, more than {LARGEST:,}; make it smaller")
            if min(file.size) < SMALLEST:
                raise UserError(f"{path} has {size}; a side needs at least {SMALLEST}")
            picture = ImageOps.exif_transpose(file)           # a phone stores which side is up
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}; give the name of a png, jpg or webp") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error}); save it as png, jpg or webp") from None
    if picture.mode.startswith(("I", "F")):                   # 16 bits and more a channel
        values = np.asarray(picture, np.float64)
        picture = Image.fromarray((values / max(values.max(), 1) * 255).astype(np.uint8))
    picture = picture.convert("RGBA" if "A" in picture.getbands() or "transparency" in picture.info else "RGB")
    picture.thumbnail((512, 512))
    pixels = np.asarray(picture, np.float32) / 255            # h w 3 or h w 4
    if pixels.shape[2] == 4 and pixels[..., 3].min() < 1:
        if pixels[..., 3].max() < .5:
            raise UserError(f"{path} is transparent all over; give it an opaque object")
        return pixels, None
    coverage = cut_out(pixels[..., :3])                       # h w
    if not coverage.any():
        raise UserError(f"{path} shows nothing but its background; give a picture of an object")
    warning = "no plain background was found: the whole picture counts as the object" if coverage.all() else None
    return np.dstack([pixels[..., :3], coverage]), warning


def cut_out(picture):
    """h w 3 -> h w, 1 on the object and 0 on the background; 1 everywhere if no plain background is found. A
    background is plain if most of the border has one colour. It ends at a step in colour: soft shadows belong to it."""
    from scipy import ndimage

    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])                    # k 3
    plain = np.median(border, 0)                              # 3, the colour of the background
    if (abs(border - plain).max(1) < .1).mean() < .8:
        return np.ones(picture.shape[:2], np.float32)
    smooth = ndimage.gaussian_filter(picture, (.7, .7, 0))    # h w 3
    step = np.hypot(*(ndimage.gaussian_filter1d(smooth, 1, axis, order=1) for axis in (0, 1))).max(-1)   # h w
    hue = smooth - smooth.mean(-1, keepdims=True) - plain + plain.mean()                                 # h w 3
    darker = plain.mean() - smooth.mean(-1)                   # h w; a shadow is darker, but not black
    alike = (step < .022) & (abs(hue).max(-1) < .04) & (darker > -.1) & (darker < .38)                   # h w

    region, _ = ndimage.label(alike)                          # h w, the number of the region
    at_border = np.unique(np.concatenate([region[0], region[-1], region[:, 0], region[:, -1]]))
    cover = ~np.isin(region, at_border[at_border > 0])
    cover = ndimage.binary_erosion(cover, iterations=2, border_value=1)       # the blur has made the object wider
    lost = 0 < cover.mean() < .01 or cover.mean() > .95       # what is left is a speck, or nearly everything
    return (np.ones_like(cover) if lost else cover).astype(np.float32)


def load_picture(path):
    """A picture file, or an image of Pillow -> the input of the tower, 3 s s, and a warning (or None)."""
    pixels, warning = read_picture(path)
    colour, coverage = np.split(crop_to_object(pixels), [3], -1)      # s s 3, s s 1
    return rearrange(torch.from_numpy(colour + 1 - coverage), "h w c -> c h w"), warning                 # on white
