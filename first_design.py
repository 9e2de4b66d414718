"""first_design.py - the first design of tokenizer and heads: attention with a distance bias. It is not trained anew.

This file exists only to load weights that were trained before tokenizer.py became convolutions, those of
checkpoints/tiny and the folders made from it, and for VAT (relatives/vat.py). It goes when their weights are made anew.
Nothing else here is needed to understand the method. Settings without `conv` choose it: see `choose`.

Learnt queries, one for each point of a grid, cross-attend to surface points; points that are decoded cross-attend to
tokens. It learns slower: after 300 steps IoU .684, convolutions .891 (docs/RESULTS.md).
"""
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

from engine.networks import BANDS, Attention, Block, attend, fourier, grid_points
from geometry.surface import TRUNCATION
from representations.gs import GaussianHead
from representations.head import NOISE
from representations.pc import PointHead
from representations.sdf import SdfHead, rarity


def choose(name, usual, settings):
    """The class of a tokenizer or of a head: the usual one or, for settings of this design, its class here."""
    return usual if "conv" in settings else FIRST.get(name, usual)


# ---------------------------------------------------------------------------- attention with a distance bias

GAMMAS = (0., 4., 16., 32.)  # distance bias per head, cycled: one head global, the others ever more local


def split_bf16(x):
    """x = hi + lo. In bf16 each keeps 8 bits: together 16 bits of x, where one product in bf16 would keep 8."""
    hi = x.to(torch.bfloat16).to(x.dtype)
    return hi, x - hi


def distance_features(x, gammas, side):
    """Positions x (b k 3) -> features (b h k 13) that bias attention by distance:

        softmax(q k - gamma_h |a - x|^2)          a: position of a query, x: position of a key

    -gamma |a - x|^2 = gamma (2 a.x - |x|^2 - |a|^2) is a dot product, so the features are 13 more dimensions of query
    and key, and ordinary attention applies without a mask (b h q k). a = a_hi + a_lo and x = x_hi + x_lo (split_bf16):

        query part     2 a_hi   2 a_lo   2 a_hi      -1      -|a|^2        times gamma_h
        key part         x_hi     x_hi     x_lo   |x|^2           1
        term           2 a_hi x_hi + 2 a_lo x_hi + 2 a_hi x_lo - |x|^2 - |a|^2
        dimensions          3        3        3       2           2        |.|^2 is split into hi and lo as well

    |a|^2 is the same for all keys, so softmax does not change with it; it keeps the scores small in bf16.
    """
    hi, lo = split_bf16(x)                                                        # b k 3
    square = torch.cat(split_bf16((x ** 2).sum(-1, keepdim=True)), -1)            # b k 2
    ones = torch.ones_like(square)                                                # b k 2
    if side == "key":
        return repeat(torch.cat([hi, hi, lo, square, ones], -1), "b k f -> b h k f", h=len(gammas))
    features = torch.cat([2 * hi, 2 * lo, 2 * hi, -ones, -square], -1)            # b q 13
    return rearrange(gammas, "h -> h 1 1") * rearrange(features, "b q f -> b 1 q f")


class NearAttention(Attention):
    """Attention, biased by distance."""

    def __init__(self, dim, heads, context_dim=None):
        super().__init__(dim, heads, context_dim)
        self.register_buffer("gammas", torch.tensor(GAMMAS).repeat(heads)[:heads], persistent=False)

    def forward(self, x, context, positions):                 # b q d, b k e, (b q 3, b k 3) -> b q d
        q, k, v = self.projected(x, context)
        q = torch.cat([q, distance_features(positions[0], self.gammas, "query").to(q.dtype)], -1)
        k = torch.cat([k, distance_features(positions[1], self.gammas, "key").to(k.dtype)], -1)
        return self.to_out(rearrange(attend(q, k, v), "b h k w -> b k (h w)"))


class NearBlock(Block):
    """A transformer block whose attention is biased by distance."""

    def __init__(self, dim, heads, context_dim=None, expand=4):
        super().__init__(dim, heads, context_dim, expand)
        self.attention = NearAttention(dim, heads, context_dim)

    def forward(self, x, context=None, *, positions):
        x = x + self.attention(self.norm1(x), context, positions)
        return x + self.feed(self.norm2(x))


# ---------------------------------------------------------------------------- encode

class Tokenizer(nn.Module):
    """Surface points, their normals and colours -> anchored tokens."""

    patch, points = 1, 2048                                   # points of an input; half as many in training

    def __init__(self, side, channels, dim, heads):
        super().__init__()
        self.register_buffer("anchors", grid_points(side), persistent=False)             # n 3
        self.point = nn.Sequential(nn.Linear(3 + 6 * BANDS + 6, dim), nn.GELU(), nn.Linear(dim, dim))
        self.query = nn.Parameter(torch.randn(side ** 3, dim) * .02)
        self.cross = nn.ModuleList(NearBlock(dim, heads, context_dim=dim) for _ in range(2))
        self.blocks = nn.ModuleList(nn.ModuleList(NearBlock(dim, heads) for _ in range(2)) for _ in range(2))
        last = nn.LayerNorm(channels, elementwise_affine=False)
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels), last)
        self.register_buffer("mean", torch.zeros(channels))   # of the tokens of the training set,
        self.register_buffer("std", torch.ones(channels))     # measured at the end of stage 1 (standardise)

    def forward(self, points, normals, colours):              # b k 3 each -> b n c
        b = len(points)
        context = self.point(torch.cat([fourier(points, BANDS), normals, colours], -1))        # b k d
        x = repeat(self.query, "n d -> b n d", b=b)                               # b n d
        anchors = repeat(self.anchors, "n i -> b n i", b=b)                       # b n 3
        for cross, blocks in zip(self.cross, self.blocks):
            x = cross(x, context, positions=(anchors, points))                    # b n d
            for block in blocks:
                x = block(x, positions=(anchors, anchors))                        # b n d
        tokens = (self.out(x).float() - self.mean) / self.std                     # b n c
        return tokens + NOISE * torch.randn_like(tokens) if self.training else tokens


# ---------------------------------------------------------------------------- decode

class QueryDecoder(nn.Module):
    """`read` encodes tokens as a memory, once; `evaluate` decodes the memory at any number of points."""

    def __init__(self, side, channels, dim, heads, outputs):
        nn.Module.__init__(self)
        self.register_buffer("anchors", grid_points(side), persistent=False)
        self.token = nn.Linear(channels, dim)
        self.pos_embed = nn.Parameter(torch.randn(side ** 3, dim) * .02)
        self.blocks = nn.ModuleList(NearBlock(dim, heads) for _ in range(3))
        self.point = nn.Linear(3 + 6 * BANDS, dim)
        self.cross = nn.ModuleList(NearBlock(dim, heads, context_dim=dim, expand=2) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, outputs)

    def read(self, tokens):                                   # b n c -> memory b n d
        x = self.token(tokens) + self.pos_embed
        anchors = repeat(self.anchors, "n i -> b n i", b=len(x))
        for block in self.blocks:
            x = block(x, positions=(anchors, anchors))
        return x

    def points(self, memory, x, extra):                       # points cross-attend to tokens
        y = self.point(fourier(x, BANDS)) + extra             # b k d
        anchors = repeat(self.anchors, "n i -> b n i", b=len(x))
        for block in self.cross:
            y = block(y, memory, positions=(x, anchors))
        return y

    def evaluate(self, memory, x, extra=0.):                  # memory, points x b k 3, extra b k d -> b k outputs
        y = self.norm(self.points(memory, x, extra))
        with torch.autocast(y.device.type, enabled=False):    # a surface is where this crosses zero: fp32
            return self.out(y.float())


class FirstSdfHead(QueryDecoder, SdfHead):
    """Tokens -> truncated signed distance (in units of the truncation) and colour at any point."""

    def __init__(self, **size):
        super().__init__(**size, outputs=4)

    def loss(self, tokens, batch):
        """L1 of the clipped distance, at queries and at surface points, where it is 0; there, squared error of colours
        (L1 loses stripes of uncertain height). Every colour of a shape weighs the same, so that small ones are kept."""
        x = torch.cat([batch["queries"], batch["points"]], 1)                             # b k 3
        return self.errors(self.evaluate(self.read(tokens), x), batch)                    # of b k 4

    def errors(self, y, batch):
        k = batch["queries"].shape[1]
        target = F.pad((batch["distance"] / TRUNCATION).clamp(-1, 1), (0, y.shape[1] - k))
        distance = F.l1_loss(y[..., 0], target)
        error = reduce((y[:, k:, 1:] - batch["colours"]) ** 2, "b k i -> b k", "mean")
        colour = (rarity(batch["colours"]) * batch["coloured"][:, None] * error).mean()
        return distance + colour, {"distance": distance.detach(), "colour": colour.detach()}


class FirstPointHead(QueryDecoder, PointHead):
    def __init__(self, dim, **size):
        super().__init__(dim=dim, **size, outputs=9)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))


class FirstGaussianHead(QueryDecoder, GaussianHead):
    def __init__(self, **size):
        super().__init__(**size, outputs=11)


FIRST = {"tokenizer": Tokenizer, "sdf": FirstSdfHead, "pc": FirstPointHead, "gs": FirstGaussianHead}
