"""peers.py - the peers of backbone.py: same shape tokens, same prompts, as many parameters, to 8 %.

    diffusion        p(X | T): a transformer denoises all tokens at once (as the generator of 3DShape2VecSet)
    autoregressive   prod_i p(x_i | x_1 ... x_{i-1}, T): one token after the other, in a fixed order, by a DenoiseNet
    queries          the masked backbone with the prefix of the paper: the q outputs of learnt queries alone

    python -m research.peers --from checkpoints/tiny --variant diffusion --out runs/diffusion       # flags of train.py
    python evaluate.py versus                                                                       # compares them
"""
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

import train
from backbone import BACKBONES, DENOISERS, Backbone, Flow, split_condition
from engine.commands import UserError, command
from engine.networks import time_embedding
from engine.noise import normal
from prefix import Prefix
from relatives import lost
from relatives.sequence import AdaBlock, MeanPrefix

STEPS = 64    # of denoising all tokens at once

# ---------------------------------------------------------------------------- other generators

class Diffusion(nn.Module):
    """[prefix, noisy tokens] -> velocity or noise of all tokens. To a denoiser a shape is one vector: b (n c)."""

    def __init__(self, tokens, channels, widths, dim, encoder, decoder, heads, queries, head_dim, head_depth,
                 denoiser="flow"):
        super().__init__()
        self.tokens, self.channels, self.dim, self.denoiser = tokens, channels, dim, DENOISERS[denoiser]
        self.prefix = MeanPrefix(queries, dim, heads, widths)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 6 * dim))
        nn.init.zeros_(self.time[-1].weight)
        self.token = nn.Linear(channels, dim)
        self.pos_embed = nn.Parameter(torch.randn(tokens, dim) * .02)             # n d
        spare = (5 * head_depth + 4) * head_dim ** 2 - 8 * dim ** 2               # of a DenoiseNet, less others here
        count = encoder + decoder + round(spare / (12 * dim ** 2))
        self.blocks = nn.ModuleList(AdaBlock(dim, heads) for _ in range(count))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels))

    def net(self, x, t, prefix, mask, mean):                  # b (n c), b or 1, b p d, b p, b 1 d -> b (n c)
        x = self.token(rearrange(x, "b (n c) -> b n c", c=self.channels)) + self.pos_embed           # b n d
        t = time_embedding(t, self.dim) + rearrange(mean, "b 1 d -> b d")
        t = rearrange(self.time(t), "b (i d) -> b i d", i=6)
        y = torch.cat([prefix, x], 1)                                             # b (p + n) d
        mask = repeat(F.pad(mask, (0, self.tokens), value=True), "b k -> b q k", q=y.shape[1])
        for block in self.blocks:
            y = block(y, t, mask)
        return rearrange(self.out(y[:, -self.tokens:]).float(), "b n c -> b (n c)")

    def loss(self, x, condition, known=None):                 # b n c; no token is known
        prefix, mask, mean = self.prefix(condition)                               # b p d, b p, b 1 d
        return self.denoiser.loss(partial(self.net, mask=mask, mean=mean), rearrange(x, "b n c -> b (n c)"), prefix)

    @torch.no_grad()
    def generate(self, condition, keys, denoise_steps=None, cfg=2., temperature=1., rgs=None, **_):
        """As Backbone.generate, without unmasking steps, and without known tokens that RGS could blend."""
        if rgs:
            raise UserError("RGS blends known tokens, and this checkpoint denoises all at once; give --rgs none")
        steps = denoise_steps or STEPS
        noise = lambda count: normal(keys, 0, (count, self.tokens * self.channels))                   # b count (n c)
        condition, strengths = split_condition(condition, cfg)
        prefix, mask, mean = self.prefix(condition)                               # (r b) p d, (r b) p, (r b) 1 d
        x = self.denoiser.sample(partial(self.net, mask=mask, mean=mean), prefix, noise, steps, strengths, temperature)
        return rearrange(x, "b (n c) -> b n c", c=self.channels)


class Autoregressive(lost.Generator):
    """The generator of LoST, but of shape tokens, in the order of the grid."""

    def __init__(self, tokens, channels, widths, dim, encoder, decoder, heads, queries, head_dim, head_depth,
                 denoiser="flow"):
        super().__init__(tokens, channels, widths, dim, encoder + decoder, heads, queries, head_dim, head_depth)
        self.tokens, self.channels, self.dim = tokens, channels, dim
        if denoiser != "flow":
            raise UserError("--variant autoregressive takes no other --denoiser than flow")

    def loss(self, x, condition, known=None):                 # b n c; no token is known
        return super().loss(x, condition)[0]

    def generate(self, condition, keys, denoise_steps=None, cfg=2., temperature=1., rgs=None, **_):
        """As Backbone.generate, in n steps of one token each."""
        if rgs:
            raise UserError("RGS needs tokens in random order, this checkpoint samples them in turn; give --rgs none")
        return super().generate(condition, keys, denoise_steps=denoise_steps or Flow.steps, cfg=cfg,
                                temperature=temperature)


# ---------------------------------------------------------------------------- the masked backbone, changed

class Queries(Backbone):
    """The paper's prefix: the outputs of q learnt queries alone."""

    class Prefix(Prefix):
        def forward(self, condition):
            tokens, mask = super().forward(condition)                             # b (t + q) d, b (t + q)
            return tokens[:, -len(self.query):], mask[:, -len(self.query):]

    def __init__(self, *, queries, dim, heads, widths, **rest):
        super().__init__(queries=queries, dim=dim, heads=heads, widths=widths, **rest)
        self.prefix = self.Prefix(queries, dim, heads, widths)


PEERS = {"diffusion": Diffusion, "autoregressive": Autoregressive, "queries": Queries}
BACKBONES.update(PEERS)                                       # choices of --variant

if __name__ == "__main__":
    command(train.main)
