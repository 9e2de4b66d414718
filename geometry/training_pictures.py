"""training_pictures.py - pictures of shapes for training: cropped like a prompt, relit, before a random background."""
import functools

import torch
import torch.nn.functional as F
from einops import rearrange

from geometry.crop import SIZE
from geometry.words import COLOURS, SYNONYMS, words


@functools.cache
def palette(device):                                          # colours by number, 0..1
    return torch.tensor(list(COLOURS.values()), device=device)


def colours_named(texts):
    """The colours that each text names, by number: k m, m of the text with most, -1 where there is no more."""
    named = [torch.tensor([i for i, name in enumerate(COLOURS) if {name, SYNONYMS.get(name)} & {*words(text)}],
                          dtype=torch.long) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(named, batch_first=True, padding_value=-1)


def recolour(colours, coverage, named, rng=None):
    """Colours b s s 3 and coverage b s s, 0..255; in picture i, the colours named[i] (b m) become other ones."""
    known, before, coverage = palette(colours.device), colours, coverage[..., None]
    for number in named.T:                                                                              # b
        other = torch.randint(1, len(known), number.shape, generator=rng, device=number.device)
        old, new = (rearrange(known[i % len(known)], "b i -> b 1 1 i") * coverage for i in (number, number + other))
        near = ((before - old).abs() < 25).all(-1, keepdim=True) & (coverage > 50)                      # b s s 1
        colours = torch.where(near & rearrange(number >= 0, "b -> b 1 1 1"), new.round(), colours)
    return colours


def ground_shadow(uniform, size):
    """The share of the background's light that a shadow takes, b s s 1: an ellipse near the ground, with a soft or a
    sharp edge. Photos keep such shadows when their background is removed. Half of the pictures have none."""
    centre, radius = uniform(.3, .7, 1, 1), uniform(.1, .4, 1, 1)                                       # b 1 1 each
    y, x = torch.meshgrid(*[torch.linspace(0, 1, size, device=centre.device)] * 2, indexing="ij")       # s s each
    across, down = (x - centre) / radius, (y - uniform(.75, .95, 1, 1)) / uniform(.03, .15, 1, 1)
    inside = torch.sigmoid((1 - across ** 2 - down ** 2) * uniform(1, 10, 1, 1))                        # b s s
    darkness = uniform(-.4, .4, 1, 1).clamp(min=0)                                                      # b 1 1
    return rearrange(darkness * inside, "b h w -> b h w 1")


def relight(colours, normals, coverage, rng=None, vary=True):
    """Arrays of a prepared set, in bytes: colours b s s 3, normals in the camera's frame b s s 3, coverage b s s
    -> pictures b 3 SIZE SIZE. Each has a random light, background and crop, some a shadow; without `vary`: one light,
    on white."""
    colours, normals, coverage = colours / 255, normals / 127, coverage[..., None] / 255
    b, device = len(colours), colours.device

    def uniform(low, high, *shape):                           # b ...
        return low + (high - low) * torch.rand(b, *shape, generator=rng, device=device)

    if vary:
        lamp = torch.cat([uniform(-1, 1, 1), uniform(-.2, 1.2, 1), uniform(.3, 1, 1)], 1)               # b 3
        ambient, tint = uniform(.3, .8, 1, 1, 1), uniform(.9, 1.1, 1, 1, 3)
    else:
        lamp, ambient, tint = torch.tensor([[-.5, .9, .7]] * b, device=device), .55, 1
    sun = torch.einsum("b h w i, b i -> b h w", normals, F.normalize(lamp, dim=1)).clamp(min=0)[..., None]
    sky = .5 + .5 * normals[..., 1:2]
    shade = ambient * (.7 + .3 * sky) + (1.05 - ambient) * sun                                          # b s s 1
    shade = torch.where((normals == 0).all(-1, keepdim=True), 1, shade)       # no normals: the light is in the colours

    background = torch.ones(b, 1, 1, 3, device=device)        # white, or any colour with a slope from top to bottom
    if vary:
        down = rearrange(torch.linspace(-1, 1, colours.shape[1], device=device), "h -> 1 h 1 1")
        slope = down * uniform(-.15, .15, 1, 1, 3)
        background = torch.where(uniform(0, 1, 1, 1, 1) < .6, background, uniform(0, 1, 1, 1, 3) + slope)
        background = background * (1 - ground_shadow(uniform, colours.shape[1]))
    image = rearrange((colours * shade * tint + (1 - coverage) * background).clamp(0, 1), "b h w i -> b i h w")

    zoom, shift = (uniform(.88, 1.06), uniform(-.05, .05, 2)) if vary else (uniform(1, 1), uniform(0, 0, 2))  # b, b 2
    theta = torch.cat([torch.diag_embed(zoom[:, None].expand(b, 2)), shift[..., None]], -1)             # b 2 3
    grid = F.affine_grid(theta, (b, 3, SIZE, SIZE), align_corners=False)
    image = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    noise = torch.randn(image.shape, generator=rng, device=device)
    return image + .02 * noise if vary else image
