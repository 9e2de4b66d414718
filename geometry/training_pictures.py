"""training_pictures.py - pictures of shapes for training: cropped like a prompt, relit, before a random background."""
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from geometry.crop import SIZE
from geometry.words import COLOURS, SYNONYMS, words


def recolour(colours, coverage, texts, rng):
    """Colours b s s 3 and coverage b s s, in bytes; in picture i, the colours that texts[i] names are replaced."""
    colours = colours.copy()
    for picture, cover, text in zip(colours, coverage[..., None], texts):                               # s s 3, s s 1
        named = [name for name in COLOURS if {name, SYNONYMS.get(name)} & {*words(text)}]
        near = [(abs(picture - cover * np.array(COLOURS[name])) < 25).all(-1) & (cover[..., 0] > 50) for name in named]
        for name, pixels in zip(named, near):                                                           # s s
            other = COLOURS[str(rng.choice([other for other in COLOURS if other != name]))]
            picture[pixels] = np.round(cover[pixels] * np.array(other))
    return colours


def ground_shadow(draw, size):
    """The share of the background's light that a shadow takes, b s s 1: an ellipse near the ground, with a soft or a
    sharp edge. Photos keep such shadows when their background is removed. Half of the pictures have none."""
    y, x = torch.meshgrid(*[torch.linspace(0, 1, size)] * 2, indexing="ij")                             # s s each
    across, down = (x - draw(.3, .7, 1, 1)) / draw(.1, .4, 1, 1), (y - draw(.75, .95, 1, 1)) / draw(.03, .15, 1, 1)
    inside = torch.sigmoid((1 - across ** 2 - down ** 2) * draw(1, 10, 1, 1))                           # b s s
    darkness = draw(-.4, .4, 1, 1).clamp(min=0)                                                         # b 1 1
    return rearrange(darkness * inside, "b h w -> b h w 1")


def relight(colours, normals, coverage, rng, vary=True):
    """Arrays of a prepared set, in bytes: colours b s s 3, normals in the camera's frame b s s 3, coverage b s s
    -> pictures b 3 SIZE SIZE. Each has a random light, background and crop, some a shadow; without `vary`: one light,
    on white."""
    colours, normals, coverage = (torch.from_numpy(x.astype(np.float32)) for x in (colours, normals, coverage))
    colours, normals, coverage = colours / 255, normals / 127, coverage[..., None] / 255
    b = len(colours)
    draw = lambda low, high, *shape: torch.from_numpy(rng.uniform(low, high, (b, *shape)).astype(np.float32))

    lamp, ambient, tint = torch.tensor([[-.5, .9, .7]] * b), torch.full((b, 1, 1, 1), .55), 1
    if vary:
        lamp = torch.cat([draw(-1, 1, 1), draw(-.2, 1.2, 1), draw(.3, 1, 1)], 1)                        # b 3
        ambient = draw(.3, .8, 1, 1, 1)
        tint = draw(.9, 1.1, 1, 1, 3)
    sun = torch.einsum("b h w i, b i -> b h w", normals, F.normalize(lamp, dim=1)).clamp(min=0)[..., None]
    sky = .5 + .5 * normals[..., 1:2]
    shade = ambient * (.7 + .3 * sky) + (1.05 - ambient) * sun                                          # b s s 1
    shade = torch.where((normals == 0).all(-1, keepdim=True), 1, shade)       # no normals: the light is in the colours

    background = torch.ones(b, 1, 1, 3)                       # white, or any colour with a slope from top to bottom
    if vary:
        slope = torch.linspace(-1, 1, colours.shape[1])[None, :, None, None] * draw(-.15, .15, 1, 1, 3)
        background = torch.where(draw(0, 1, 1, 1, 1) < .6, background, draw(0, 1, 1, 1, 3) + slope)
        background = background * (1 - ground_shadow(draw, colours.shape[1]))
    image = rearrange((colours * shade * tint + (1 - coverage) * background).clamp(0, 1), "b h w i -> b i h w")

    zoom, shift = (draw(.88, 1.06), draw(-.05, .05, 2)) if vary else (torch.ones(b), torch.zeros(b, 2))
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, (b, 3, SIZE, SIZE), align_corners=False)
    image = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    return image + (.02 * torch.from_numpy(rng.standard_normal(image.shape).astype(np.float32)) if vary else 0)
