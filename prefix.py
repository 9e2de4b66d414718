"""prefix.py - Prefix Learning (LTM3D section 3.2): condition tokens -> the tokens before the shape tokens.

    prefix = [condition, FFN(CrossAttention(learnable queries, condition))]     p = t + q tokens of the backbone's width

It aligns the condition with the shape space while generating, so the shape tokenizer needs no text or pictures.
The paper's prefix is the q query outputs alone (`Queries` in research/peers.py); here the condition tokens join them.

A condition is a dict, {"text": (tokens b t e, mask b t), "image": ...}, with one kind of prompt or both. The mask is
False for padding, and for all tokens of a dropped prompt: training drops prompts at random, guidance drops them by
branch. Each kind has its own width e and its own Linear to the width d, whose bias is the embedding of the kind.

    python -m pytest -q test_all.py -k prefix       # its tests
"""
import torch
import torch.nn.functional as F
from einops import repeat
from torch import nn

from engine.networks import Block


class Conditions(nn.Module):
    """Condition tokens of every kind of prompt, one kind after another, projected to the width d."""

    def __init__(self, widths, dim):
        super().__init__()
        self.norm = nn.ModuleDict({kind: nn.LayerNorm(e) for kind, e in widths.items()})
        self.into = nn.ModuleDict({kind: nn.Linear(e, dim) for kind, e in widths.items()})      # bias: embeds the kind
        self.null = nn.Parameter(torch.randn(dim) * .02)      # null token: no prompt

    def forward(self, condition):
        """-> tokens b t d, their mask b t. The last token, `null`, is unmasked only where all others are masked."""
        tokens = [self.into[kind](self.norm[kind](x)) for kind, (x, _) in condition.items()]     # b t d each
        mask = torch.cat([mask for _, mask in condition.values()], 1)             # b t
        null = repeat(self.null, "d -> b 1 d", b=len(mask)).to(tokens[0].dtype)
        return torch.cat([*tokens, null], 1), torch.cat([mask, ~mask.any(1, keepdim=True)], 1)


class Prefix(nn.Module):
    def __init__(self, queries, dim, heads, widths):
        super().__init__()
        self.conditions = Conditions(widths, dim)
        self.query = nn.Parameter(torch.randn(queries, dim) * .02)                 # q d
        self.cross = Block(dim, heads, context_dim=dim)                           # one cross-attention + feed-forward

    def forward(self, condition):                             # unit 4
        """-> prefix b p d: condition tokens (t), outputs of the queries (q); a mask, False = padding, dropped."""
        context, mask = self.conditions(condition)                                # b t d, b t
        query = repeat(self.query, "q d -> b q d", b=len(context))
        outputs = self.cross(query, context, mask)                                # b q d
        return torch.cat([context, outputs], 1), F.pad(mask, (0, len(self.query)), value=True)
