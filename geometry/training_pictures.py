"""training_pictures.py - pictures of shapes to learn from: framed like a prompt, then lit in any light on any ground."""
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

SIZE = 64             # pixels along a side of what the tower sees
MARGIN = .06          # of the side, around the object


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
