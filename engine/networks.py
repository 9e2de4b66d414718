"""networks.py - what every network is built from: attention with a distance bias, blocks, embeddings, moving averages.

Letters in every file: b batch, n shape tokens, c channels of a shape token, p prefix tokens, t condition tokens,
d model width, h heads, k points or queries.

    python -m pytest -q engine        # its tests
"""
import copy
import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

# ---------------------------------------------------------------------------- attention

# attention weights of far points are so small that a CPU computes them eight times slower; here they are 0
torch.set_flush_denormal(True)
GAMMAS = (0., 4., 16., 32.)  # distance bias per head, cycled: one head global, the others ever more local


def split_bf16(x):
    """x = hi + lo with both parts exact in bf16 (to 16 bits): what a bf16 matmul would round away stays."""
    hi = x.to(torch.bfloat16).to(x.dtype)
    return hi, x - hi


def distance_features(at, heads, side):
    """Features whose dot product is -gamma_h |q - k|^2: the bias becomes 13 more dimensions of query and key.

    -gamma |q - k|^2 = gamma (2 q.k - |k|^2 - |q|^2), so ordinary attention applies and no (b h q k) mask
    is ever made. |q|^2 is the same for all keys and softmax ignores it: it keeps the scores small in bf16.
    """
    hi, lo = split_bf16(at)                                                  # b k 3
    square = torch.cat(split_bf16((at ** 2).sum(-1, keepdim=True)), -1)      # b k 2
    ones = torch.ones_like(square)
    if side == "key":
        return repeat(torch.cat([hi, hi, lo, square, ones], -1), "b k f -> b h k f", h=heads)
    gamma = torch.tensor(GAMMAS, device=at.device).repeat(math.ceil(heads / len(GAMMAS)))[:heads]
    features = torch.cat([2 * hi, 2 * lo, 2 * hi, -ones, -square], -1)       # b q 13
    return rearrange(gamma, "h -> h 1 1") * rearrange(features, "b q f -> b 1 q f")


class Attention(nn.Module):
    """Multi-head attention onto `context` (self-attention if None), optionally biased by distance."""

    def __init__(self, dim, heads, context_dim=None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} attention heads do not divide {dim} dimensions")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context=None, mask=None, at=None):
        """x: b q d; context: b k e; mask: b k or b q k, True = may be looked at; at: (b q 3, b k 3) positions."""
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(y, "b k (h e) -> b h k e", h=self.heads).contiguous() for y in (q, k, v))
        width = q.shape[-1]
        q = q * width ** -0.5
        if at is not None:
            q = torch.cat([q, distance_features(at[0], self.heads, "query").to(q.dtype)], -1)
            k = torch.cat([k, distance_features(at[1], self.heads, "key").to(k.dtype)], -1)
        mask = None if mask is None else rearrange(mask, "b k -> b 1 1 k" if mask.ndim == 2 else "b q k -> b 1 q k")
        if q.is_cuda:
            v = F.pad(v, (0, q.shape[-1] - width))      # flash attention wants one width for all three
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.)[..., :width]
        else:                                           # unfused is twice as fast for short sequences on a CPU
            scores = q @ k.mT                                                # b h q k
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            out = scores.softmax(-1).to(v.dtype) @ v    # the softmax itself adds up in fp32
        return self.to_out(rearrange(out, "b h k e -> b k (h e)"))


class Block(nn.Module):
    """Pre-norm transformer block: attention (self, or onto a context), then feed-forward."""

    def __init__(self, dim, heads, context_dim=None, expand=4):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, context_dim)
        self.feed = nn.Sequential(nn.Linear(dim, expand * dim), nn.GELU(), nn.Linear(expand * dim, dim))

    def forward(self, x, context=None, mask=None, at=None, asked=None):
        """asked: b m, the rows of x that are wanted (default: all); the others are but looked at."""
        y = self.norm1(x)
        if asked is not None:
            context, asked = y if context is None else context, repeat(asked, "b m -> b m d", d=x.shape[-1])
            x, y = x.gather(1, asked), y.gather(1, asked)
        x = x + self.attention(y, context, mask, at)
        return x + self.feed(self.norm2(x))


# ---------------------------------------------------------------------------- embeddings

def fourier(x, bands):
    """x: ... 3 -> ... 3 + 6 bands: the position and its sines and cosines, a wavelength of 4 downwards."""
    angle = rearrange(x, "... i -> ... i 1") * (math.pi / 2 * 2 ** torch.arange(bands, device=x.device))
    return torch.cat([x, rearrange(torch.cat([angle.sin(), angle.cos()], -1), "... i f -> ... (i f)")], -1)


def time_embedding(t, dim):
    """t in [0, 1]: b -> b dim: sines and cosines of 1000 t, wavelengths from 2 pi to 20,000 pi."""
    rate = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = 1000 * rearrange(t, "b -> b 1") * rate
    return torch.cat([angle.cos(), angle.sin()], -1)


def grid_points(side, device=None):
    """Centres of a side^3 grid of cells over [-1, 1]^3, x slowest: side^3 3."""
    axis = (torch.arange(side, device=device) + .5) * 2 / side - 1
    return rearrange(torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1), "x y z i -> (x y z) i")


# ---------------------------------------------------------------------------- moving average

class EMA:
    """Exponential moving average of the weights; the decay warms up so that short runs work too."""

    def __init__(self, model, decay=.999):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        for ours, theirs in zip(self.model.state_dict().values(), model.state_dict().values()):
            ours.lerp_(theirs, 1 - decay) if ours.is_floating_point() else ours.copy_(theirs)
