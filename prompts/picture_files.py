"""prompts/picture_files.py - pictures as prompts: read, cut out and framed; and pictures of built-in shapes in any light, to learn from.

What the image tower sees is always the same kind of thing: one object that fills a square, before a plain background.

    python prompts/picture_files.py chair.png         # what is seen of it -> out/chair-seen.png
"""
import sys
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from scipy import ndimage

from engine.commands import Parser, UserError, command
from geometry.render import save_png
from geometry.training_pictures import framed

LARGEST = 64_000_000  # pixels of a file that are read
SMALLEST = 16         # pixels along a side, below which nothing can be told
Image.MAX_IMAGE_PIXELS = None   # Pillow's own limit only warns; ours is LARGEST


# ---------------------------------------------------------------------------- files

def read_picture(path):
    """A picture file -> colour and coverage, h w 4 in [0, 1], and what had to be guessed (or None)."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > LARGEST:
                raise UserError(f"{path} has {file.width} x {file.height} pixels, more than {LARGEST:,}; make it smaller")
            if min(file.size) < SMALLEST:
                raise UserError(f"{path} has {file.width} x {file.height} pixels; at least {SMALLEST} a side are needed")
            picture = ImageOps.exif_transpose(file)                        # phones store which way is up
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}; give the name of a png, jpg or webp") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error}); write it again as png, jpg or webp") from None
    if picture.mode.startswith(("I", "F")):                                # 16 bits and more a channel
        values = np.asarray(picture, np.float64)
        picture = Image.fromarray((values / max(values.max(), 1) * 255).astype(np.uint8))
    picture = picture.convert("RGBA" if "A" in picture.getbands() or "transparency" in picture.info else "RGB")
    picture.thumbnail((512, 512))
    pixels = np.asarray(picture, np.float32) / 255
    if pixels.shape[2] == 4 and pixels[..., 3].min() < 1:
        if pixels[..., 3].max() < .5:
            raise UserError(f"{path} is transparent all over; give it an opaque object")
        return pixels, None
    coverage = cut_out(pixels[..., :3])
    if not coverage.any():
        raise UserError(f"{path} shows nothing but its background; give a picture with a thing in it")
    guess = "no plain background was found: all of it is taken for the object" if coverage.all() else None
    return np.dstack([pixels[..., :3], coverage]), guess


def cut_out(picture, slope=.022):
    """Where a plain background is not, h w in {0, 1}; 1 all over if there is none. The background is what can be reached from the
    border without a step in colour: a soft shadow is part of it. It is plain if most of the border is alike."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    plain = np.median(border, 0)
    if (abs(border - plain).max(1) < .1).mean() < .8:
        return np.ones(picture.shape[:2], np.float32)
    smooth = ndimage.gaussian_filter(picture, (.7, .7, 0))
    step = np.hypot(*(ndimage.gaussian_filter1d(smooth, 1, axis, order=1) for axis in (0, 1))).max(-1)       # a pixel
    hue = smooth - smooth.mean(-1, keepdims=True) - plain + plain.mean()
    darker = plain.mean() - smooth.mean(-1)                                                  # than the paper: no shadow is black
    open_ = (step < slope) & (abs(hue).max(-1) < .04) & (darker > -.1) & (darker < .38)
    label, _ = ndimage.label(open_)
    rim = np.unique(np.concatenate([label[0], label[-1], label[:, 0], label[:, -1]]))
    thing = ~np.isin(label, rim[rim > 0])
    thing = ndimage.binary_erosion(thing, iterations=2, border_value=1)                      # an edge is as wide as its blur
    return (np.ones_like(thing) if 0 < thing.mean() < .01 or thing.mean() > .95 else thing).astype(np.float32)


# ---------------------------------------------------------------------------- framing

def load_picture(path):
    """A picture file -> what the tower sees, 3 size size, and what had to be guessed (or None)."""
    pixels, guess = read_picture(path)
    pixels = framed(pixels)
    return rearrange(torch.from_numpy(pixels[..., :3] + 1 - pixels[..., 3:]), "h w c -> c h w"), guess       # on white


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a picture: png, jpg, webp")
    parser.add_argument("--out", type=Path, help="picture to write (default: out/<name>-seen.png)")
    args = parser.parse_args()
    image, guess = load_picture(args.file)
    out = args.out or Path("out") / f"{args.file.stem}-seen.png"
    save_png(out, (rearrange(image.numpy(), "c h w -> h w c").clip(0, 1) * 255).round().astype(np.uint8))
    if guess:
        print(f"warning: {guess}", file=sys.stderr)
    print(out)


if __name__ == "__main__":
    command(main)
