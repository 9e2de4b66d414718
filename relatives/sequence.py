"""sequence.py - a transformer on a prefix and a growing sequence, with a KV cache: the generator of VAT and LoST."""
import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

from prefix import Prefix


class MeanPrefix(Prefix):
    """A prefix, and its mean through a Linear: what modulates blocks."""

    def __init__(self, queries, dim, heads, widths):
        super().__init__(queries, dim, heads, widths)
        self.pool = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))

    def forward(self, condition):
        """-> prefix tokens b p d, their mask b p, and their mean b 1 d."""
        tokens, mask = super().forward(condition)
        valid = rearrange(mask, "b p -> b p 1").to(tokens.dtype)
        mean = reduce(tokens * valid, "b p d -> b 1 d", "sum") / reduce(valid, "b p 1 -> b 1 1", "sum")
        return tokens, mask, self.pool(mean)


class AdaBlock(nn.Module):
    """A transformer block with QK-norm (queries and keys are normalised) and adaLN: shifts, scales and gates come from
    outside, the same for all rows; gates start at 1."""
    is_block = True                                           # for --recompute

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv, self.merge = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.sharpness = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))    # log of the scale of cosines
        self.feed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.offset = nn.Parameter(torch.zeros(6, dim))

    def forward(self, x, modulation, mask, earlier=None):
        """x: b q d, modulation: b 6 d, mask: b q k, True = attend to it -> b q d. earlier: a function that puts the
        keys and values of earlier rows before those of x, b h q w each."""
        shift1, scale1, gate1, shift2, scale2, gate2 = rearrange(modulation + self.offset, "b i d -> i b 1 d")
        y = self.qkv(self.norm(x) * (1 + scale1) + shift1)
        q, k, v = rearrange(y, "b q (i h w) -> i b h q w", i=3, h=self.heads)
        q, k = F.normalize(q, dim=-1) * self.sharpness.exp(), F.normalize(k, dim=-1)
        if earlier:
            k, v = earlier(k, v)                                                  # b h k w each
        y = F.scaled_dot_product_attention(q, k, v, rearrange(mask, "b q k -> b 1 q k"), scale=1.)
        x = x + (1 + gate1) * self.merge(rearrange(y, "b h q w -> b q (h w)"))
        return x + (1 + gate2) * self.feed(self.norm(x) * (1 + scale2) + shift2)


class Sequence(nn.Module):
    def __init__(self, queries, widths, dim, depth, heads):
        super().__init__()
        self.prefix = MeanPrefix(queries, dim, heads, widths)
        self.pooled, self.start = nn.Linear(dim, 6 * dim), nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(AdaBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        nn.init.zeros_(self.pooled.weight)

    def begin(self, condition):
        """-> prefix b p d, its mask b p, the first token b 1 d, shifts, scales and gates of all blocks b 6 d. The last
        two come from the mean of the prefix."""
        prefix, mask, mean = self.prefix(condition)
        return prefix, mask, self.start(mean), rearrange(self.pooled(mean), "b 1 (i d) -> b i d", i=6)

    def read(self, x, modulation, mask, caches=None):
        """Rows x: b q d, mask: b q k, which rows each may attend to -> b q d. caches: one for each block."""
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x = block(x, modulation, mask, cache)
        return self.norm(x)


class BlockCache:
    """The KV cache of one block: keys and values of up to `length` rows, b h k w each, written in place."""

    def __init__(self, length):
        self.length, self.used = length, 0

    def __call__(self, *new):                                 # keys and values b h q w -> those of all rows so far
        if not self.used:
            self.rows = [x.new_empty(*x.shape[:2], self.length, x.shape[3]) for x in new]
        start, self.used = self.used, self.used + new[0].shape[2]
        for rows, x in zip(self.rows, new):
            rows[:, :, start:self.used] = x
        return [rows[:, :, :self.used] for rows in self.rows]


class KVCache:
    """A Sequence in sampling: it begins with the prefix, and `append` adds up to `length` rows. Keys and values of all
    rows so far are kept."""

    def __init__(self, sequence, condition, length):
        prefix, self.mask, self.first, self.modulation = sequence.begin(condition)
        p = prefix.shape[1]
        self.sequence, self.caches = sequence, [BlockCache(p + length) for _ in sequence.blocks]
        sequence.read(prefix, self.modulation, repeat(self.mask, "b k -> b q k", q=p), self.caches)

    def append(self, x):                                      # b q d, which attend to all rows so far -> b q d
        self.mask = F.pad(self.mask, (0, x.shape[1]), value=True)                 # b k
        mask = repeat(self.mask, "b k -> b q k", q=x.shape[1])
        return self.sequence.read(x, self.modulation, mask, self.caches)
