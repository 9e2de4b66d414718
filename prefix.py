"""prefix.py - Prefix Learning (LTM3D section 3.2): condition tokens -> p prefix tokens.

    prefix = FFN(CrossAttention(learnable queries, condition))       p tokens of the backbone's width

The prefix is prepended to the shape tokens. It aligns the condition with the shape space while
generating, so the shape tokenizer never has to know about language or pictures.

A condition is a dict of what there is, {"text": (tokens b t e, mask b t), "image": ...}; each kind of prompt
has a width e of its own, and a learnt embedding says which kind a token is of.

    python -m pytest -q test_all.py -k prefix       # its tests
"""
import torch
from einops import repeat
from torch import nn

from engine.networks import Block

DROPS = {(): .1, ("text",): .35, ("image",): .3, ("text", "image"): .25}   # what a training sample is told, and how often


class Conditions(nn.Module):
    """Condition tokens of every kind, one after another: b t d and their mask."""

    def __init__(self, widths, dim):
        super().__init__()
        self.norm = nn.ModuleDict({kind: nn.LayerNorm(e) for kind, e in widths.items()})
        self.into = nn.ModuleDict({kind: nn.Linear(e, dim) for kind, e in widths.items()})      # its bias is the kind's embedding
        self.nothing = nn.Parameter(torch.randn(dim) * .02)   # what "no prompt" looks like

    def forward(self, condition, drop=None):
        """drop: {kind: b, True = this sample is not told}."""
        context = torch.cat([self.into[kind](self.norm[kind](tokens)) for kind, (tokens, _) in condition.items()], 1)
        mask = torch.cat([mask if drop is None else mask & ~drop[kind][:, None] for kind, (_, mask) in condition.items()], 1)
        nothing = repeat(self.nothing, "d -> b 1 d", b=len(mask)).to(context.dtype)
        return torch.cat([context, nothing], 1), torch.cat([mask, ~mask.any(1, keepdim=True)], 1)


def drops(b, kinds, device):
    """What each of b training samples is not told, at random: {kind: b}."""
    told = [[kind in names for names in DROPS] for kind in kinds]
    some = torch.multinomial(torch.tensor(list(DROPS.values())), b, replacement=True)
    return {kind: ~torch.tensor(each)[some].to(device) for kind, each in zip(kinds, told)}


class Prefix(nn.Module):
    def __init__(self, prefix, dim, heads, widths):
        super().__init__()
        self.conditions = Conditions(widths, dim)
        self.query = nn.Parameter(torch.randn(prefix, dim) * .02)                 # p d
        self.cross = Block(dim, heads, context_dim=dim)                           # ONE cross-attention + feed-forward

    def forward(self, condition, drop=None):                                      # -> b p d
        context, mask = self.conditions(condition, drop)
        return self.cross(repeat(self.query, "p d -> b p d", b=len(context)), context, mask)
