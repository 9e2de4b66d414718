"""images.py - pictures as prompts: read, cut out and framed; and pictures of built-in shapes in any light, to learn from.

What the image tower sees is always the same kind of thing: one object that fills a square, before a plain background.

    python images.py chair.png         # what is seen of it -> out/chair-seen.png
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from scipy import ndimage

from layers import Parser, UserError, command

SIZE = 64             # pixels along a side of what the tower sees
MARGIN = .06          # of the side, around the object
LARGEST = 64_000_000  # pixels of a file that are read
SMALLEST = 16         # pixels along a side, below which nothing can be told
Image.MAX_IMAGE_PIXELS = None   # Pillow's own limit only warns; ours is LARGEST


# ---------------------------------------------------------------------------- files

def read(path):
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

def framed(pixels, size=SIZE, margin=MARGIN):
    """h w c with the coverage last -> size size c: the square around what is covered; colours times coverage."""
    pixels = np.concatenate([pixels[..., :-1] * pixels[..., -1:], pixels[..., -1:]], -1)
    rows, columns = (np.flatnonzero((pixels[..., -1] > .5).any(axis)) for axis in (1, 0))
    if not len(rows):                                         # a sheet seen edge on
        return np.zeros((size, size, pixels.shape[-1]), np.float32)
    low, high = np.array([rows[0], columns[0]]), np.array([rows[-1], columns[-1]]) + 1
    side = (high - low).max() / (1 - 2 * margin)
    centre = (low + high) / 2
    x = rearrange(torch.from_numpy(pixels.astype(np.float32)), "h w c -> 1 c h w")
    pad = int(np.ceil(side))
    x = F.pad(x, [pad] * 4)
    top, left = (int(round(c + pad - side / 2)) for c in centre)
    x = x[..., top:top + pad, left:left + pad]
    x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    return rearrange(x[0], "c h w -> h w c").numpy()


def seen(path):
    """A picture file -> what the tower sees, 3 size size, and what had to be guessed (or None)."""
    pixels, guess = read(path)
    pixels = framed(pixels)
    return rearrange(torch.from_numpy(pixels[..., :3] + 1 - pixels[..., 3:]), "h w c -> c h w"), guess       # on white


# ---------------------------------------------------------------------------- pictures to learn from

def lit(looks, facing, covered, rng, vary=True):
    """Pictures without light, b s s 3, normals as the eye sees them, b s s 3, and coverage, b s s, in bytes (data.py) -> b 3 SIZE SIZE:
    in a light, before a background and in a crop of its own each; not `vary`: all in one light, on white, framed."""
    colour, normal, cover = (torch.from_numpy(x.astype(np.float32)) / high for x, high in ((looks, 255), (facing, 127), (covered, 255)))
    b = len(colour)
    draw = lambda low, high, *shape: torch.from_numpy(rng.uniform(low, high, (b, *shape)).astype(np.float32))
    lamp = F.normalize(torch.cat([draw(-1, 1, 1), draw(-.2, 1.2, 1), draw(.3, 1, 1)], 1) if vary else torch.tensor([[-.5, .9, .7]] * b), dim=1)
    ambient = draw(.3, .8, 1, 1, 1) if vary else torch.full((b, 1, 1, 1), .55)
    sun = torch.einsum("b h w i, b i -> b h w", normal, lamp).clamp(min=0)[..., None]
    sky = .5 + .5 * normal[..., 1:2]
    shade = ambient * (.7 + .3 * sky) + (1.05 - ambient) * sun
    shade = torch.where((normal == 0).all(-1, keepdim=True), 1, shade)        # a picture that came with its light
    image = colour * shade * (draw(.9, 1.1, 1, 1, 3) if vary else 1)
    background = torch.ones(b, 1, 1, 3)
    if vary:
        slope = torch.linspace(-1, 1, colour.shape[1])[None, :, None, None] * draw(-.15, .15, 1, 1, 3)
        background = torch.where(draw(0, 1, 1, 1, 1) < .6, background, draw(0, 1, 1, 1, 3) + slope)
    image = (image + (1 - cover[..., None]) * background).clamp(0, 1)
    image = rearrange(image, "b h w i -> b i h w")
    zoom, shift = (draw(.88, 1.06), draw(-.05, .05, 2)) if vary else (torch.ones(b), torch.zeros(b, 2))
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = shift
    image = F.grid_sample(image, F.affine_grid(theta, (b, 3, SIZE, SIZE), align_corners=False), padding_mode="border", align_corners=False)
    return image + (.02 * torch.from_numpy(rng.standard_normal(image.shape).astype(np.float32)) if vary else 0)


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a picture: png, jpg, webp")
    parser.add_argument("--out", type=Path, help="picture to write (default: out/<name>-seen.png)")
    args = parser.parse_args()
    from render import save_png
    image, guess = seen(args.file)
    out = args.out or Path("out") / f"{args.file.stem}-seen.png"
    save_png(out, (rearrange(image.numpy(), "c h w -> h w c").clip(0, 1) * 255).round().astype(np.uint8))
    if guess:
        print(f"warning: {guess}", file=sys.stderr)
    print(out)


if __name__ == "__main__":
    command(main)
