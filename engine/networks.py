"""networks.py - components of every network: attention with a distance bias, blocks, embeddings, grids.

Letters in every file: b batch, n shape tokens, c channels of a shape token, p prefix tokens, t condition tokens,
d model width, h heads, q queries, k keys or points; of grids f features, s cells along the cube.

    python -m pytest -q engine        # its tests
"""
import math
from importlib import import_module

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn


class BySize:                                                 # Tokenizer(conv=4, ...) is a convolutions.ConvTokenizer
    def __new__(cls, *_, conv=0, **__):
        return super().__new__(getattr(import_module("convolutions"), f"Conv{cls.__name__}") if conv else cls)


# ---------------------------------------------------------------------------- attention

# attention weights of far points are denormal numbers, which slow a CPU eight times; flushed to 0
np.finfo(np.float32), np.finfo(np.float64)                    # older numpy caches them here, or warns later
torch.set_flush_denormal(True)
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


def mask_features(q, k, mask):
    """Flash attention takes no mask, but 8 more dimensions of q and k: their product is 0, or -2^14 under the mask."""
    apart = repeat(torch.where(mask, 0., -2. ** 11).to(k.dtype), "b k -> b h k i", h=k.shape[1], i=8)
    return F.pad(q, (0, 8), value=1.), torch.cat([k, apart], -1)


class Attention(nn.Module):
    """Multi-head attention onto `context` (self-attention if None), optionally biased by distance."""

    def __init__(self, dim, heads, context_dim=None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} attention heads do not divide {dim} dimensions")
        self.heads = heads
        self.register_buffer("gammas", torch.tensor(GAMMAS).repeat(heads)[:heads], persistent=False)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context=None, mask=None, positions=None):
        """x: b q d, context: b k e -> b q d. mask: b k or b q k, True = attend to it. positions: (b q 3, b k 3)."""
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(y, "b k (h w) -> b h k w", h=self.heads).contiguous() for y in (q, k, v))
        width = q.shape[-1]
        q = q * width ** -0.5
        if positions is not None:
            q = torch.cat([q, distance_features(positions[0], self.gammas, "query").to(q.dtype)], -1)
            k = torch.cat([k, distance_features(positions[1], self.gammas, "key").to(k.dtype)], -1)
        if mask is not None and mask.ndim == 2 and q.is_cuda:
            (q, k), mask = mask_features(q, k, mask), None
        if mask is not None:
            mask = rearrange(mask, "b k -> b 1 1 k" if mask.ndim == 2 else "b q k -> b 1 q k")
        if q.is_cuda:
            v = F.pad(v, (0, q.shape[-1] - width))      # flash attention needs one width for all three
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.)[..., :width]
        else:                                           # unfused is twice as fast for short sequences on a CPU
            scores = q @ k.mT                                                     # b h q k
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            out = scores.softmax(-1).to(v.dtype) @ v    # b h q w; the softmax accumulates in fp32
        return self.to_out(rearrange(out, "b h k w -> b k (h w)"))


class Block(nn.Module):
    """Pre-norm transformer block: attention (self, or onto a context), then feed-forward."""
    is_block = True                                           # for --recompute

    def __init__(self, dim, heads, context_dim=None, expand=4):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, context_dim)
        self.feed = nn.Sequential(nn.Linear(dim, expand * dim), nn.GELU(), nn.Linear(expand * dim, dim))

    def forward(self, x, context=None, mask=None, positions=None, rows=None):
        """x: b q d -> b q d. rows: b m, only these rows are queries; all rows are keys -> b m d."""
        y = self.norm1(x)
        if rows is not None:
            context = y if context is None else context
            index = repeat(rows, "b m -> b m d", d=x.shape[-1])
            x, y = x.gather(1, index), y.gather(1, index)                         # b m d
        x = x + self.attention(y, context, mask, positions)
        return x + self.feed(self.norm2(x))


class FeedForward(nn.Module):
    """A block without attention, independent for each row: ... d -> ... d."""

    def __init__(self, dim, expand=2):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.feed = nn.Sequential(nn.Linear(dim, expand * dim), nn.GELU(), nn.Linear(expand * dim, dim))

    def forward(self, x):
        return x + self.feed(self.norm(x))


# ---------------------------------------------------------------------------- embeddings

def fourier(x, bands):                                        # unit 1
    """x: ... 3 -> ... 3 + 6 bands: the position; of each coordinate sines, then cosines, of frequencies pi/2 2^k."""
    angle = rearrange(x, "... i -> ... i 1") * (math.pi / 2 * 2 ** torch.arange(bands, device=x.device))
    return torch.cat([x, rearrange(torch.cat([angle.sin(), angle.cos()], -1), "... i f -> ... (i f)")], -1)


def time_embedding(t, dim):
    """t in [0, 1]: b -> b dim: sines and cosines of 1000 t, wavelengths from 2 pi to 20,000 pi."""
    rate = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = 1000 * rearrange(t, "b -> b 1") * rate
    return torch.cat([angle.cos(), angle.sin()], -1)


def grid_points(side, device=None):
    """Centres of a side^3 grid of cells over [-1, 1]^3: side^3 3. Row (x side + y) side + z; y is up."""
    axis = (torch.arange(side, device=device) + .5) * 2 / side - 1
    return rearrange(torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1), "x y z i -> (x y z) i")


def flow_pair(x, t):                                          # unit 2
    """A rectified flow, noise at t = 0 and x at t = 1: x_t = (1 - t) noise + t x, and its velocity x - noise."""
    noise = torch.randn_like(x)
    return (1 - t) * noise + t * x, x - noise


# ---------------------------------------------------------------------------- grids of tokens and of features

def to_patches(x, patch):
    """Tokens b n c on a grid -> b n / patch^3, c patch^3: patches of neighbours, as in DiT (Peebles and Xie 2023)."""
    side = round(x.shape[1] ** (1 / 3)) // patch
    return rearrange(x, "b (x i y j z k) c -> b (x y z) (i j k c)", x=side, y=side, z=side, i=patch, j=patch, k=patch)


def from_patches(x, patch):
    """The inverse of to_patches."""
    side = round(x.shape[1] ** (1 / 3))
    return rearrange(x, "b (x y z) (i j k c) -> b (x i y j z k) c", x=side, y=side, z=side, i=patch, j=patch, k=patch)


def cell_means(points, features, side):
    """Points b k 3 in [-1, 1]^3 with features b k f -> the means of those in each of side^3 cells, b side^3 f, 0 in
    empty cells, and their numbers, b side^3 1."""
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


# ---------------------------------------------------------------------------- tokens -> a function of points

BANDS = 7        # finest positional wavelength 4 / 2^6 = .06, twice the cell of a 64^3 grid


class QueryDecoder(nn.Module):
    """`read` encodes tokens as a memory, once; `evaluate` decodes the memory at any number of points."""

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
