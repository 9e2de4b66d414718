"""prefix.py - Prefix Learning (LTM3D section 3.2): condition tokens -> p prefix tokens.

    prefix = FFN(CrossAttention(learnable queries, condition))       p tokens of the backbone's width

The prefix is prepended to the shape tokens. It aligns the condition with the shape space while
generating, so the shape tokenizer never has to know about language.

    python -m pytest -q test_all.py -k prefix       # its tests
"""
import torch
from einops import rearrange, repeat
from torch import nn

from layers import Block


class Prefix(nn.Module):
    def __init__(self, prefix, dim, heads, condition_dim):
        super().__init__()
        self.query = nn.Parameter(torch.randn(prefix, dim) * .02)                 # p d
        self.nothing = nn.Parameter(torch.randn(1, condition_dim) * .02)          # what "no prompt" looks like
        self.norm = nn.LayerNorm(condition_dim)
        self.cross = Block(dim, heads, context_dim=condition_dim)                 # ONE cross-attention + feed-forward

    def forward(self, condition, mask, drop=None):
        """condition: b t e; mask: b t, True = a token; drop: b, True = this sample has no prompt -> b p d."""
        if drop is not None:
            drop = rearrange(drop, "b -> b 1")
            condition = torch.where(rearrange(drop, "b t -> b t 1"), self.nothing, condition)
            mask = mask | drop
        return self.cross(repeat(self.query, "p d -> b p d", b=len(condition)), self.norm(condition), mask)
