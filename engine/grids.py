"""grids.py - tokens on a grid, the cells that points lie in, and grids of features: refined, interpolated.

A decoder that looks up features of each token's own cells shows their borders as dimples. Here features are refined by
convolutions on the way to a grid of 4 times the tokens' side, and interpolated: no seam lies between tokens.

Letters, beside those of CONTRIBUTING.md: f features, s cells along the cube. Grids are channels last, b x y z f.

    python -m pytest -q engine        # its tests
"""
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from engine.networks import BANDS, FeedForward, fourier

# ---------------------------------------------------------------------------- tokens and cells

def to_patches(x, patch):
    """Tokens b n c on a grid -> b n / patch^3, c patch^3: patches of neighbours, as in DiT (Peebles and Xie 2023)."""
    side = round(x.shape[1] ** (1 / 3)) // patch
    return rearrange(x, "b (x i y j z k) c -> b (x y z) (i j k c)", x=side, y=side, z=side, i=patch, j=patch, k=patch)


def from_patches(x, patch):
    """The inverse of to_patches."""
    side = round(x.shape[1] ** (1 / 3))
    return rearrange(x, "b (x y z) (i j k c) -> b (x i y j z k) c", x=side, y=side, z=side, i=patch, j=patch, k=patch)


def cell_means(points, features, side):                       # unit 1
    """Points b k 3 in [-1, 1]^3 with features b k f -> the means of those in each of side^3 cells, b side^3 f, 0 in
    empty cells, and their numbers, b side^3 1. Rows are those of grid_points."""
    x, y, z = ((points + 1) * side / 2).long().clamp(0, side - 1).unbind(-1)      # b k each
    index = repeat((x * side + y) * side + z, "b k -> b k f", f=features.shape[-1] + 1)
    counted = F.pad(features.float(), (0, 1), value=1.)                           # b k (f + 1): the last counts points
    sums = counted.new_zeros(len(points), side ** 3, counted.shape[-1]).scatter_add(1, index, counted)
    return sums[..., :-1] / sums[..., -1:].clamp(min=1), sums[..., -1:]


class FromCells(nn.Module):
    """The features of all cells, b (side cells)^3 f -> side^3 tokens b n d, each of its own cells^3 cells."""

    def __init__(self, side, cells, features, dim):
        super().__init__()
        self.side, self.cells, self.into = side, cells, nn.Linear(cells ** 3 * features, dim)

    def forward(self, x):
        return self.into(rearrange(x, "b (x i y j z l) f -> b (x y z) (i j l f)", x=self.side, y=self.side, z=self.side,
                                   i=self.cells, j=self.cells, l=self.cells))


# ---------------------------------------------------------------------------- grids of features

class ResConv(nn.Module):
    """A residual convolution of 3^3 cells; at the start of training it changes little."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.conv, self.out = nn.LayerNorm(dim), nn.Conv3d(dim, dim, 3, padding=1), nn.Linear(dim, dim)
        nn.init.normal_(self.out.weight, std=.01)

    def forward(self, x):                                     # b x y z d
        y = self.conv(rearrange(self.norm(x), "b x y z d -> b d x y z"))
        return x + self.out(F.gelu(rearrange(y, "b d x y z -> b x y z d")))


class Refine(nn.Module):
    """A grid of tokens -> grids of features, each twice as fine as the one before. depths: convolutions on each."""

    def __init__(self, dim, widths, depths):
        super().__init__()
        self.into = nn.ModuleList(nn.Linear(d, 8 * f) for d, f in zip((dim, *widths), widths))
        self.blocks = nn.ModuleList(nn.Sequential(*map(ResConv, [f] * depth)) for f, depth in zip(widths, depths))
        for layer in self.into:
            nn.init.normal_(layer.weight, std=layer.in_features ** -.5)

    def forward(self, x):                                     # b s s s d -> b 2s 2s 2s f, b 4s 4s 4s f ...
        grids = []
        for into, blocks in zip(self.into, self.blocks):
            x = blocks(rearrange(into(x), "b x y z (i j k f) -> b (x i) (y j) (z k) f", i=2, j=2, k=2))
            grids.append(x)
        return grids


class PointMLP(nn.Sequential):
    """The features of points, interpolated in grids, and their positions -> outputs, in fp32: finite differences
    would lose their digits in bf16."""

    def __init__(self, widths, outputs, dim=128, depth=3):
        sizes = sum(widths) + 3, *[dim] * depth
        layers = [nn.Linear(*pair) for pair in zip(sizes, sizes[1:])]
        super().__init__(*(part for layer in layers for part in (layer, nn.ReLU())), nn.Linear(dim, outputs))
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, grids, x):                              # b s s s f each, b k 3 -> b k outputs
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(torch.cat([*(interpolate(grid.float(), x) for grid in grids), x], -1))


def interpolate(grid, x):                                     # unit 1
    """Features b s s s f, of the centres of cells, at points b k 3 in [-1, 1]^3: b k f."""
    b, s = grid.shape[:2]
    position = ((x + 1) * s / 2 - .5).clamp(0, s - 1)
    low = position.floor().clamp(max=s - 2)
    corner = torch.cartesian_prod(*[torch.arange(2, device=x.device)] * 3)                    # 8 3
    at = rearrange(low.long(), "b k i -> b k 1 i") + corner                                   # b k 8 3
    first = torch.arange(b, device=x.device)[:, None, None] * s ** 3
    rows = first + (at[..., 0] * s + at[..., 1]) * s + at[..., 2]                             # b k 8
    share = rearrange(position - low, "b k i -> b k 1 i")                                     # b k 1 3
    weight = torch.where(corner == 1, share, 1 - share).prod(-1)                              # b k 8
    found = F.embedding_bag(rows.flatten(0, 1), rearrange(grid, "b x y z f -> (b x y z) f"), mode="sum",
                            per_sample_weights=weight.flatten(0, 1))      # the weighted sum of 8 rows, in one pass
    return rearrange(found, "(b k) f -> b k f", b=b)


# ---------------------------------------------------------------------------- tokens -> a function of points

class TokenGrid(nn.Module):
    """Tokens -> a grid of them, refined by two convolutions. Subclasses refine it further."""
    FORM, COLOUR = ((64, 32), (2, 1)), ((32, 16), (1, 0))     # widths of finer grids, convolutions on each

    def __init__(self, side, channels, dim, heads, conv, patch=1):        # heads: of the mesh head; conv: tokenizer.py
        super().__init__()
        self.side, self.patch, self.token = side, patch, nn.Linear(channels, dim)
        self.pos_embed = nn.Parameter(torch.randn(side, side, side, dim) * .02)
        self.blocks = nn.Sequential(ResConv(dim), ResConv(dim))
        nn.init.normal_(self.token.weight, std=channels ** -.5)

    def grid(self, tokens):                                   # b n c -> b side side side d
        x = self.token(from_patches(tokens, self.patch))
        return self.blocks(rearrange(x, "b (x y z) d -> b x y z d", x=self.side, y=self.side) + self.pos_embed)


class GridDecoder(TokenGrid):
    """`read` turns tokens into grids of features, once; `evaluate` decodes these at any number of points, each
    independently. Convolutions have half the width of the sdf head's, whose surface this has to follow."""

    def __init__(self, dim, outputs, **size):
        super().__init__(dim=dim // 2, **size)
        self.grids = Refine(dim // 2, *self.FORM)
        self.point = nn.Linear(3 + 6 * BANDS + sum(self.FORM[0]), dim)
        self.feed = nn.Sequential(FeedForward(dim), FeedForward(dim))
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, outputs)

    def read(self, tokens):                                   # b n c -> grids of features
        return self.grids(self.grid(tokens))

    def evaluate(self, grids, x, extra=0.):                   # grids, points x b k 3, extra b k d -> b k outputs
        found = [interpolate(grid.float(), x) for grid in grids]
        y = self.norm(self.feed(self.point(torch.cat([fourier(x, BANDS), *found], -1)) + extra))     # b k d
        with torch.autocast(y.device.type, enabled=False):    # outputs are positions: fp32
            return self.out(y.float())
