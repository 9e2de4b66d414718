"""evaluation/peers.py - the peers of backbone.py: same shape tokens, same prompts, same number of parameters.

A table without a peer says nothing. Two other ways to model all tokens x_1 ... x_n of a shape given a prompt T,

    diffusion        p(X | T) in one piece: a transformer denoises all tokens at once (3DShape2VecSet's generator in our dress)
    autoregressive   prod_i p(x_i | x_1 ... x_{i-1}, T): one token after the other, in a fixed order, with LTM3D's DenoiseNet

and two other ways to tell LTM3D's masked backbone what was asked for, where it learns a prefix:

    pooled           the mean of the condition tokens, through an MLP, is added to p learnt tokens (MAR's way with a class)
    cross            p learnt tokens know of no prompt; every other block looks at the condition tokens instead

    python -m evaluation.peers --from checkpoints/tiny --generator diffusion --out runs/diffusion     # trains one; flags of train.py
    python evaluate.py versus                                                              # trains and compares all
"""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

import train
from backbone import DENOISERS, DRAWS, Backbone, DenoiseNet, draw_noise, guidance_branches
from engine.commands import UserError, command
from engine.files import load_model, read_stage
from engine.networks import Block, time_embedding
from prefix import Conditions, Prefix, random_drops

STEPS = 64    # of denoising all tokens at once


# ---------------------------------------------------------------------------- other generators

class Diffusion(nn.Module):
    """[prefix, time, noisy tokens] -> velocity or noise of all tokens. A shape is one long vector to the denoisers: b (n c)."""

    takes_rgs = False

    def __init__(self, tokens, channels, widths, dim, encoder, decoder, heads, prefix, head_dim, head_depth, denoiser="flow"):
        super().__init__()
        self.tokens, self.channels, self.dim, self.denoiser = tokens, channels, dim, DENOISERS[denoiser]
        self.prefix = Prefix(prefix, dim, heads, widths)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.token = nn.Linear(channels, dim)
        self.place = nn.Parameter(torch.randn(tokens, dim) * .02)
        spare = round((5 * head_depth + 4) * head_dim ** 2 / (12 * dim ** 2))     # blocks for the parameters of a DenoiseNet
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(encoder + decoder + spare))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels))

    def net(self, x, t, prefix):                              # b (n c), b, b p d -> b (n c)
        x = self.token(rearrange(x, "b (n c) -> b n c", c=self.channels)) + self.place
        t = rearrange(self.time(time_embedding(t, x.shape[-1])), "b d -> b 1 d")
        y = torch.cat([prefix, t, x], 1)
        for block in self.blocks:
            y = block(y)
        return rearrange(self.out(y[:, -self.tokens:]).float(), "b n c -> b (n c)")

    def loss(self, x, condition):                             # b n c
        prefix = self.prefix(condition, random_drops(len(x), condition, x.device))
        return self.denoiser.loss(self.net, rearrange(x, "b n c -> b (n c)"), prefix)

    @torch.no_grad()
    def generate(self, condition, seeds, denoise_steps=STEPS, cfg=2., temperature=1., steer=None, **_):
        """As Backbone.generate; there are no known tokens that RGS could blend, nor steps of unmasking."""
        if steer:
            raise UserError("RGS blends known tokens, and this checkpoint denoises all at once; give --rgs none")
        device, steps = self.place.device, denoise_steps or STEPS
        noise = draw_noise(map(np.random.default_rng, seeds), (self.denoiser.draws(steps), self.tokens * self.channels), device)
        condition, drop, strengths = guidance_branches(condition, len(seeds), cfg)
        x = self.denoiser.sample(self.net, self.prefix(condition, drop), noise, steps, strengths, temperature)
        return rearrange(x, "b (n c) -> b n c", c=self.channels)


class Autoregressive(nn.Module):
    """[prefix, start, x_1 ... x_(n-1)] -> causal blocks -> c_1 ... c_n -> DenoiseNet. Every token but the last is read, every one told."""

    takes_rgs = False

    def __init__(self, tokens, channels, widths, dim, encoder, decoder, heads, prefix, head_dim, head_depth, denoiser="flow"):
        super().__init__()
        self.tokens, self.channels, self.dim, self.denoiser = tokens, channels, dim, DENOISERS[denoiser]
        self.prefix = Prefix(prefix, dim, heads, widths)
        self.token, self.start = nn.Linear(channels, dim), nn.Parameter(torch.randn(dim) * .02)
        self.place = nn.Parameter(torch.randn(tokens, dim) * .02)                 # of the token to come
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(encoder + decoder))
        self.norm = nn.LayerNorm(dim)
        self.net = DenoiseNet(channels, dim, head_dim, head_depth)

    def contexts(self, prefix, x):                            # b p d, b m c: the first m tokens -> c_1 ... c_(m+1), b (m + 1) d
        start = repeat(self.start, "d -> b 1 d", b=len(x))
        y = torch.cat([prefix, torch.cat([start, self.token(x)], 1) + self.place[:x.shape[1] + 1]], 1)
        i = torch.arange(y.shape[1], device=x.device)
        past = rearrange((i <= i[:, None]) | (i < prefix.shape[1]), "q k -> 1 q k")
        for block in self.blocks:
            y = block(y, mask=past)
        return self.norm(y[:, prefix.shape[1]:])

    def loss(self, x, condition):                             # b n c
        prefix = self.prefix(condition, random_drops(len(x), condition, x.device))
        c = self.contexts(prefix, x[:, :-1])
        c, x = repeat(c, "b n d -> (r b n) d", r=DRAWS), repeat(x, "b n c -> (r b n) c", r=DRAWS)
        return self.denoiser.loss(self.net, x, c)

    @torch.no_grad()
    def generate(self, condition, seeds, denoise_steps=None, cfg=2., temperature=1., steer=None, **_):
        """As Backbone.generate, in n steps of one token each."""
        if steer:
            raise UserError("RGS was made for tokens in random order, and this checkpoint makes them in turn; give --rgs none")
        b, n, steps = len(seeds), self.tokens, denoise_steps or self.denoiser.steps
        noise = draw_noise(map(np.random.default_rng, seeds), (n, self.denoiser.draws(steps), self.channels), self.place.device)
        condition, drop, strengths = guidance_branches(condition, b, cfg)
        prefix, x = self.prefix(condition, drop), torch.zeros(b, 0, self.channels, device=self.place.device)
        for i in range(n):
            c = self.contexts(prefix, x.repeat(len(strengths) + 1, 1, 1))[:, -1]
            new = self.denoiser.sample(self.net, c, noise[:, i], steps, strengths, temperature)
            x = torch.cat([x, rearrange(new, "b c -> b 1 c")], 1)
        return x


# ---------------------------------------------------------------------------- other ways to tell the backbone

class Pooled(Backbone):
    """The prefix is p learnt tokens, to each of which an MLP of the mean of the condition tokens is added."""

    class Prefix(nn.Module):
        def __init__(self, prefix, dim, widths):
            super().__init__()
            self.conditions = Conditions(widths, dim)
            self.query = nn.Parameter(torch.randn(prefix, dim) * .02)
            self.feed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 6 * dim), nn.GELU(), nn.Linear(6 * dim, dim))   # 12 dim^2, as a Block

        def forward(self, condition, drop=None):              # -> b p d
            context, mask = self.conditions(condition, drop)
            weight = rearrange(mask / mask.sum(1, keepdim=True), "b t -> b t 1")
            return self.query + rearrange(self.feed(reduce(context * weight, "b t d -> b d", "sum")), "b d -> b 1 d")

    def __init__(self, *, prefix, dim, widths, **rest):
        super().__init__(prefix=prefix, dim=dim, widths=widths, **rest)
        self.prefix = self.Prefix(prefix, dim, widths)


class Reader(Block):
    """A block that attends to the condition tokens, which Cross puts into `memory` before every pass."""
    memory = None

    def forward(self, x, rows=None):
        return super().forward(x, *self.memory, rows=rows)


class Cross(Backbone):
    """Blocks take turns: one attends to the shape tokens, the next to the condition tokens. One block more, for that of the prefix."""

    class Prefix(nn.Module):
        """Learnt tokens and, behind them, the condition tokens with their mask as one more channel: b (p + t) (d + 1)."""

        def __init__(self, prefix, dim, widths):
            super().__init__()
            self.conditions, self.query = Conditions(widths, dim), nn.Parameter(torch.randn(prefix, dim) * .02)

        def forward(self, condition, drop=None):
            context, mask = self.conditions(condition, drop)                      # b t d, b t
            tokens = torch.cat([repeat(self.query, "p d -> b p d", b=len(context)).to(context.dtype), context], 1)
            return torch.cat([tokens, F.pad(mask.to(context.dtype), (len(self.query), 0))[..., None]], -1)

    def __init__(self, *, prefix, dim, heads, widths, **rest):
        super().__init__(prefix=prefix, dim=dim, heads=heads, widths=widths, **rest)
        self.prefix = self.Prefix(prefix, dim, widths)
        depth = len(self.encoder) + 1 + len(self.decoder)
        turns = [Block(dim, heads) if i % 2 == 0 else Reader(dim, heads, context_dim=dim) for i in range(depth)]
        self.encoder, self.decoder = nn.ModuleList(turns[:len(self.encoder) + 1]), nn.ModuleList(turns[len(self.encoder) + 1:])

    def contexts(self, prefix, *rest):
        p = len(self.prefix.query)
        tokens, mask = prefix[..., :-1], prefix[:, p:, -1] > 0
        for block in (*self.encoder, *self.decoder):
            if isinstance(block, Reader):
                block.memory = tokens[:, p:], mask
        return super().contexts(tokens[:, :p], *rest)


GENERATORS = {"masked": Backbone, "diffusion": Diffusion, "autoregressive": Autoregressive, "pooled": Pooled, "cross": Cross}


def load(folder):
    """The backbone of a checkpoint folder, whichever generator it is, frozen."""
    entry = read_stage(folder, "backbone")
    return load_model(GENERATORS[entry.get("generator", "masked")], f"{folder}/backbone.safetensors", **entry["settings"])


if __name__ == "__main__":
    command(lambda: train.main(GENERATORS))
