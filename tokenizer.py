"""tokenizer.py - stage 1: coloured oriented surface points <-> n x c shape tokens, and the sdf head.

LTM3D section 3.1 freezes a shape encoder and decoder and generates in between. Here shape token i
belongs to anchor a_i, a fixed point of a grid in [-1, 1]^3 (differs from the paper, whose tokens are
unordered: anchors give the backbone a canonical order and attention a sense of distance).

    encode:   points b k 9  ->  tokens b n c, unit variance       Tokenizer
    decode:   tokens, x b k 3  ->  signed distance, colour        SdfHead (the first of several heads)
    extract:  tokens n c  ->  coloured mesh                       hierarchical marching cubes

    python train.py --rep sdf --stage tokenizer      # trains it
    python evaluate.py tokenizer --rep sdf           # how well it reconstructs held-out shapes
"""
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from einops import repeat
from skimage.measure import marching_cubes
from torch import nn

from layers import Block, fourier, grid_points, load_model, read_stage
from solids import TRUNCATION

SIZES = {  # n = side^3 tokens of c channels
    "tiny": dict(side=4, channels=16, dim=128, heads=4),
    "small": dict(side=6, channels=16, dim=256, heads=8),
    "base": dict(side=8, channels=32, dim=512, heads=8),
    "large": dict(side=10, channels=32, dim=768, heads=12),
}
NOISE = .05      # on the tokens while training: a smooth latent space without a KL weight to tune
BANDS = 7        # finest positional wavelength 4 / 2^6 = .06, twice the cell of a 64^3 grid


class Tokenizer(nn.Module):
    """The shape encoder: surface points, their normals and colours -> anchored tokens."""

    def __init__(self, side, channels, dim, heads):
        super().__init__()
        self.register_buffer("anchors", grid_points(side), persistent=False)             # n 3
        self.point = nn.Sequential(nn.Linear(3 + 6 * BANDS + 6, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.query = nn.Parameter(torch.randn(side ** 3, dim) * .02)
        self.cross = nn.ModuleList(Block(dim, heads, context_dim=dim) for _ in range(2))
        self.blocks = nn.ModuleList(nn.ModuleList(Block(dim, heads) for _ in range(2)) for _ in range(2))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels), nn.LayerNorm(channels, elementwise_affine=False))
        self.register_buffer("mean", torch.zeros(channels))   # of the tokens over the training set,
        self.register_buffer("std", torch.ones(channels))     # measured when stage 1 ends (standardise)

    def forward(self, points, normals, colours):              # b k 3 each
        b = len(points)
        context = self.point(torch.cat([fourier(points, BANDS), normals, colours], -1))  # b k d
        x = repeat(self.query, "n d -> b n d", b=b)
        anchors = repeat(self.anchors, "n i -> b n i", b=b)
        for cross, blocks in zip(self.cross, self.blocks):
            x = cross(x, context, at=(anchors, points))       # bias -gamma_h |a_i - x|^2
            for block in blocks:
                x = block(x, at=(anchors, anchors))
        tokens = (self.out(x).float() - self.mean) / self.std
        return tokens + NOISE * torch.randn_like(tokens) if self.training else tokens    # b n c


class QueryDecoder(nn.Module):
    """What every head is made of: tokens -> memory once, then any number of points ask the memory."""

    def __init__(self, side, channels, dim, heads, outputs):
        super().__init__()
        self.register_buffer("anchors", grid_points(side), persistent=False)
        self.token = nn.Linear(channels, dim)
        self.place = nn.Parameter(torch.randn(side ** 3, dim) * .02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(3))
        self.point = nn.Linear(3 + 6 * BANDS, dim)
        self.cross = nn.ModuleList(Block(dim, heads, context_dim=dim, expand=2) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, outputs)

    def read(self, tokens):                                   # b n c -> memory b n d
        x = self.token(tokens) + self.place
        anchors = repeat(self.anchors, "n i -> b n i", b=len(x))
        for block in self.blocks:
            x = block(x, at=(anchors, anchors))
        return x

    def ask(self, memory, x):                                 # memory b n d, x b k 3 -> b k outputs
        anchors = repeat(self.anchors, "n i -> b n i", b=len(x))
        y = self.point(fourier(x, BANDS))
        for block in self.cross:
            y = block(y, memory, at=(x, anchors))
        y = self.norm(y)
        with torch.autocast(y.device.type, enabled=False):    # a surface is where this crosses zero: fp32
            return self.out(y.float())


class SdfHead(QueryDecoder):
    """Tokens -> truncated signed distance (in units of the truncation) and colour at any point."""

    def __init__(self, **size):
        super().__init__(**size, outputs=4)

    def loss(self, tokens, batch):
        """L1 on the clipped distance at queries near and far, and at surface points, where it is 0; L1 on colour."""
        x = torch.cat([batch["queries"], batch["surface"]], 1)
        y = self.ask(self.read(tokens), x)                                                # b k 4
        k = batch["queries"].shape[1]
        target = F.pad((batch["distance"] / TRUNCATION).clamp(-1, 1), (0, x.shape[1] - k))
        distance = F.l1_loss(y[..., 0], target)
        colour = F.l1_loss(y[:, k:, 1:], batch["surface_colour"])
        return distance + .2 * colour, {"distance": distance.detach(), "colour": colour.detach()}


HEADS = {"sdf": SdfHead}


def load(folder, rep="sdf"):
    """The encoder and one head of a checkpoint folder, frozen."""
    settings = read_stage(folder, "tokenizer")["settings"]
    return [load_model(Tokenizer, f"{folder}/tokenizer.safetensors", **settings),
            load_model(HEADS[rep], f"{folder}/head-{rep}.safetensors", **settings)]


@torch.no_grad()
def standardise(tokenizer, head, tokens):
    """Give tokens (samples b n c of the training set) zero mean and unit variance per channel; the
    head's first layer absorbs the inverse, so that its outputs do not change."""
    mean, std = tokens.mean((0, 1)), tokens.std((0, 1))
    tokenizer.mean.copy_(tokenizer.mean + tokenizer.std * mean)
    tokenizer.std.mul_(std)
    head.token.bias.add_(head.token.weight @ mean)
    head.token.weight.mul_(std)


# ---------------------------------------------------------------------------- tokens -> mesh

COARSE = 32  # the first grid; a resolution is 32 times a power of two


@torch.no_grad()
def sdf_grid(ask, resolution, hierarchical=True):
    """Distances (units of the truncation) on a (resolution + 1)^3 grid over [-1, 1]^3: numpy r r r.

    `ask` maps points k 3 to distances k. Coarse to fine: distances are interpolated to the double resolution and
    asked again where the surface may be near; elsewhere their sign is all that marching cubes needs.
    """
    side = COARSE if hierarchical else resolution
    index = torch.stack(torch.meshgrid(*[torch.arange(side + 1)] * 3, indexing="ij"), -1)
    grid = ask(index.reshape(-1, 3) * 2 / side - 1).reshape(index.shape[:3])
    while side < resolution:
        side *= 2
        grid = F.interpolate(grid[None, None], size=(side + 1,) * 3, mode="trilinear", align_corners=True)[0, 0]
        # an edge that the surface cuts has its ends within its length, 2 / side, of it; the interpolated
        # distance is off by less than a coarse cell's curvature: together less than a fine cell's diagonal
        near = grid.abs() < 2 * 3 ** .5 / side / TRUNCATION
        grid[near] = ask(near.nonzero() * 2 / side - 1)
    for face in (grid, grid.transpose(0, 1), grid.transpose(0, 2)):
        face[0] = face[-1] = 1.  # nothing leaves the cube: every mesh is closed
    return grid.numpy()


@torch.no_grad()
def extract(head, tokens, resolution=128, autocast=nullcontext, hierarchical=True):
    """tokens n c -> vertices v 3, faces f 3 (outward), colours v 3 in [0, 1]: numpy arrays."""
    with autocast():
        memory = head.read(tokens[None])
    chunk = 2 ** 17 if tokens.is_cuda else 2 ** 13            # what fits a core's cache is a quarter faster

    def ask(x):                                               # k 3 -> k 4, chunk by chunk
        with autocast():
            return torch.cat([head.ask(memory, part[None].to(tokens.device))[0].cpu() for part in x.split(chunk)])

    grid = sdf_grid(lambda x: ask(x)[:, 0], resolution, hierarchical)
    if grid.min() >= 0:
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64), np.zeros((0, 3), np.float32)
    vertices, faces, _, _ = marching_cubes(grid, 0., gradient_direction="descent")
    vertices = np.ascontiguousarray(vertices * 2 / resolution - 1, dtype=np.float32)
    colours = ask(torch.from_numpy(vertices))[:, 1:].clamp(0, 1).numpy()
    return vertices, np.ascontiguousarray(faces, dtype=np.int64), colours
