"""networks.py - components of every network: attention, blocks, embeddings. Those on grids: engine/grids.py.

Letters of shape comments: CONTRIBUTING.md.

    python -m pytest -q engine        # its tests
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

# ---------------------------------------------------------------------------- attention

# attention weights of far points are denormal numbers, which slow a CPU eight times; flushed to 0
np.finfo(np.float32), np.finfo(np.float64)                    # older numpy caches them here, or warns later
torch.set_flush_denormal(True)
BANDS = 7        # of a position; the finest wavelength is 4 / 2^6 = .06, twice the cell of a 64^3 grid


def mask_features(q, k, mask):
    """Flash attention takes no mask, but 8 more dimensions of q and k: their product is 0, or -2^14 under the mask."""
    apart = repeat(torch.where(mask, 0., -2. ** 11).to(k.dtype), "b k -> b h k i", h=k.shape[1], i=8)
    return F.pad(q, (0, 8), value=1.), torch.cat([k, apart], -1)


def attend(q, k, v, mask=None):
    """softmax(q k) v: q b h q w, k and v b h k w; q is scaled. mask: b k or b q k, True = attend to it."""
    width = v.shape[-1]
    if mask is not None and mask.ndim == 2 and q.is_cuda:
        (q, k), mask = mask_features(q, k, mask), None
    if mask is not None:
        mask = rearrange(mask, "b k -> b 1 1 k" if mask.ndim == 2 else "b q k -> b 1 q k")
    if q.is_cuda:
        v = F.pad(v, (0, q.shape[-1] - width))          # flash attention needs one width for all three
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.)[..., :width]
    scores = q @ k.mT                                   # b h q k; unfused is twice as fast for short sequences on a CPU
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v           # b h q w; the softmax accumulates in fp32


class Attention(nn.Module):
    """Multi-head attention onto `context` (self-attention if None)."""

    def __init__(self, dim, heads, context_dim=None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} attention heads do not divide {dim} dimensions")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context=None, mask=None):
        """x: b q d, context: b k e -> b q d. mask: b k or b q k, True = attend to it."""
        out = attend(*self.projected(x, context), mask)
        return self.to_out(rearrange(out, "b h k w -> b k (h w)"))

    def projected(self, x, context=None):                     # -> queries b h q w, scaled; keys and values b h k w
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(y, "b k (h w) -> b h k w", h=self.heads).contiguous() for y in (q, k, v))
        return q * q.shape[-1] ** -0.5, k, v


class Block(nn.Module):
    """Pre-norm transformer block: attention (self, or onto a context), then feed-forward."""
    is_block = True                                           # for --recompute

    def __init__(self, dim, heads, context_dim=None, expand=4):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, context_dim)
        self.feed = nn.Sequential(nn.Linear(dim, expand * dim), nn.GELU(), nn.Linear(expand * dim, dim))

    def forward(self, x, context=None, mask=None, rows=None):
        """x: b q d -> b q d. rows: b m, only these rows are queries; all rows are keys -> b m d."""
        y = self.norm1(x)
        if rows is not None:
            context = y if context is None else context
            index = repeat(rows, "b m -> b m d", d=x.shape[-1])
            x, y = x.gather(1, index), y.gather(1, index)                         # b m d
        x = x + self.attention(y, context, mask)
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
