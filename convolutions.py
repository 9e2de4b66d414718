"""convolutions.py - tokenizer and heads of all sizes but tiny: convolutions on grids, normals in the loss.

A decoder that looks up features of each token's own cells shows their borders as dimples. Here features are refined by
convolutions on the way to a grid of 4 times the tokens' side, and interpolated: no seam lies between tokens. Form
and colour have grids of their own. Tokenizer, SdfHead, PointHead and GaussianHead become these classes where a size has
`conv`.

Letters, beside those of engine/networks.py: grids are channels last, b x y z f.

    python train.py --rep sdf --size small --stage tokenizer
"""
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import nn

from engine.networks import BANDS, FeedForward, FromCells, QueryDecoder, cell_means, fourier, from_patches, to_patches
from geometry.surface import TRUNCATION
from heads import GaussianHead, PointHead, SdfHead, rarity
from tokenizer import NOISE, Tokenizer

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


def interpolate(grid, x):
    """Features b s s s f, of the centres of cells, at points b k 3 in [-1, 1]^3: b k f."""
    b, s, k = len(grid), grid.shape[1], x.shape[1]
    place = ((x + 1) * s / 2 - .5).clamp(0, s - 1)
    low = place.floor().clamp(max=s - 2)
    corner = torch.cartesian_prod(*[torch.arange(2, device=x.device)] * 3)                    # 8 3
    at = rearrange(low.long(), "b k i -> b k 1 i") + corner                                   # b k 8 3
    first = torch.arange(b, device=x.device)[:, None, None] * s ** 3
    rows = (first + (at[..., 0] * s + at[..., 1]) * s + at[..., 2]).flatten()                 # (b k 8)
    share = rearrange(place - low, "b k i -> b k 1 i")                                        # b k 1 3
    weight = torch.where(corner == 1, share, 1 - share).prod(-1, keepdim=True)                # b k 8 1
    found = rearrange(grid, "b x y z f -> (b x y z) f").index_select(0, rows)
    return reduce(rearrange(found, "(b k v) f -> b k v f", b=b, k=k) * weight, "b k v f -> b k f", "sum")


# ---------------------------------------------------------------------------- encode

class ConvTokenizer(Tokenizer):
    """Points -> means of their features in (side conv)^3 cells -> one token for conv^3 cells -> a convolution."""
    FEATURES = 32

    def __init__(self, side, channels, dim, heads, conv, patch=1):        # heads: of the mesh head
        nn.Module.__init__(self)
        self.side, self.conv, self.patch, self.points = side, conv, patch, 4096
        self.point = nn.Sequential(nn.Linear(15, 64), nn.GELU(), nn.Linear(64, self.FEATURES))
        self.cells = FromCells(side, conv, self.FEATURES + 1, dim)
        self.place = nn.Parameter(torch.randn(side, side, side, dim) * .02)
        self.block, last = ResConv(dim), nn.LayerNorm(channels, elementwise_affine=False)
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels), last)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        for layer in (*self.point[::2], self.cells.into):
            nn.init.normal_(layer.weight, std=2 * layer.in_features ** -.5)

    def forward(self, points, normals, colours):              # b k 3 each -> b n c
        s = self.side * self.conv                             # cells along the cube
        inside = [(points + 1) * side % 2 - 1 for side in (s, self.side)]         # in the cell, in the token's cube
        features = self.point(torch.cat([*inside, points, normals, 2 * colours - 1], -1))
        means, count = cell_means(points, features, s)                            # b s^3 f, b s^3 1
        x = self.cells(torch.cat([means, (1 + count).log() / 2], -1))             # b n d
        x = self.block(rearrange(x, "b (x y z) d -> b x y z d", x=self.side, y=self.side) + self.place)
        tokens = rearrange(self.out(x).float() - self.mean, "b x y z c -> b (x y z) c") / self.std
        return to_patches(tokens + NOISE * torch.randn_like(tokens) if self.training else tokens, self.patch)


# ---------------------------------------------------------------------------- decode, loss

TETRAHEDRON = (1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)            # its corners, times sqrt 3
STEP, NORMALS = .01, .1     # of finite differences; the weight of normals in the loss


class Unfold(nn.Module):
    """Tokens -> a grid of them, refined by two convolutions."""
    FORM, COLOUR = ((64, 32), (2, 1)), ((32, 16), (1, 0))     # widths of finer grids, convolutions on each

    def __init__(self, side, channels, dim, heads, conv, patch=1):        # heads: of the mesh head
        nn.Module.__init__(self)
        self.side, self.patch, self.token = side, patch, nn.Linear(channels, dim)
        self.place = nn.Parameter(torch.randn(side, side, side, dim) * .02)
        self.blocks = nn.Sequential(ResConv(dim), ResConv(dim))
        nn.init.normal_(self.token.weight, std=channels ** -.5)

    def unfold(self, tokens):                                 # b n c -> b side side side d
        x = self.token(from_patches(tokens, self.patch))
        return self.blocks(rearrange(x, "b (x y z) d -> b x y z d", x=self.side, y=self.side) + self.place)


class ConvSdfHead(Unfold, SdfHead):
    """Tokens -> two grids of features for the form, two for the colour -> points."""
    reads, STENCILS = {"cloud": 256, "queries": 640}, 96

    def __init__(self, dim, **size):
        super().__init__(dim=dim, **size)
        self.form_grids, self.colour_grids = Refine(dim, *self.FORM), Refine(dim, *self.COLOUR)
        self.form, self.colour = PointMLP(self.FORM[0], 1), PointMLP(self.COLOUR[0], 3, depth=2)
        self.register_buffer("corners", torch.tensor(TETRAHEDRON) / 3 ** .5, persistent=False)         # 4 3
        nn.init.constant_(self.colour[-1].bias, .5)

    def read(self, tokens):                                   # b n c -> grids of the form, grids of the colour
        x = self.unfold(tokens)
        return self.form_grids(x), self.colour_grids(x)

    def evaluate(self, memory, x):                            # memory, points b k 3 -> b k 4: distance, colour
        return torch.cat([self.form(memory[0], x), self.colour(memory[1], x)], -1)

    def loss(self, tokens, batch):
        """L1 of the clipped distance; the error of normals n, the gradient g by finite differences at corners v of a
        tetrahedron; a robust error of colours, which learns sharp borders.

            g = 3 T / (4 h) sum_v f(x + h v) v      L = mean |f - d| + NORMALS mean |g - n| + colours

        T is TRUNCATION, h is STEP.
        """
        memory, x, n = self.read(tokens), batch["points"], batch["normals"][:, :self.STENCILS]         # b k 3
        near = rearrange(x[:, :self.STENCILS, None] + STEP * self.corners, "b k v i -> b (k v) i")
        y = self.form(memory[0], torch.cat([x, batch["queries"], near], 1))[..., 0]                # b k
        y, near = y.split([y.shape[1] - near.shape[1], near.shape[1]], 1)
        target = F.pad((batch["distance"] / TRUNCATION).clamp(-1, 1), (x.shape[1], 0))             # 0 on the surface
        distance = F.l1_loss(y, target)
        near = rearrange(near, "b (k v) -> b k v 1", v=4)
        gradient = 3 * TRUNCATION / (4 * STEP) * reduce(near * self.corners, "b k v i -> b k i", "sum")
        normal = ((gradient - n).square().sum(-1) + 1e-8).sqrt().mean()
        error = (self.colour(memory[1], x) - batch["colours"]).square().mean(-1)                       # b k
        weight = rarity(batch["colours"]) * batch["coloured"][:, None]                                 # b k
        colour = (weight * ((error + 1e-4).sqrt() - .01)).mean() / 2
        logs = {"distance": distance.detach(), "normal": normal.detach(), "colour": colour.detach()}
        return distance + NORMALS * normal + colour, logs


class GridDecoder(Unfold, QueryDecoder):
    """A QueryDecoder whose memory is grids of features: it decodes each point independently. Its convolutions have half
    the width of the sdf head's, whose surface it has to follow."""

    def __init__(self, dim, outputs, **size):
        super().__init__(dim=dim // 2, **size)
        self.grids = Refine(dim // 2, *self.FORM)
        self.point = nn.Linear(3 + 6 * BANDS + sum(self.FORM[0]), dim)
        self.feed = nn.Sequential(FeedForward(dim), FeedForward(dim))
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, outputs)

    def read(self, tokens):                                   # b n c -> grids of features
        return self.grids(self.unfold(tokens))

    def points(self, memory, x, extra):                       # b k d
        found = [interpolate(grid.float(), x) for grid in memory]
        return self.feed(self.point(torch.cat([fourier(x, BANDS), *found], -1)) + extra)


class ConvPointHead(PointHead, GridDecoder):
    """heads.PointHead, on grids."""


class ConvGaussianHead(GaussianHead, GridDecoder):
    """heads.GaussianHead, on grids."""
