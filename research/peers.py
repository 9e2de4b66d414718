"""peers.py - the peers of backbone.py: same shape tokens, same prompts, the same number of parameters, to 8 %.

A table without a peer says nothing. Two other ways to model all tokens x_1 ... x_n of a shape given a prompt T:

    diffusion        p(X | T): a transformer denoises all tokens at once (as the generator of 3DShape2VecSet)
    autoregressive   prod_i p(x_i | x_1 ... x_{i-1}, T): one token after the other, in a fixed order, by a DenoiseNet

Four other ways to give the condition to LTM3D's masked backbone:

    queries          the prefix of the paper: the q answers to learnt queries alone
    unpooled         the condition tokens beside them, but not the mean of the prefix in every c_i
    pooled           the mean of the condition tokens, through an MLP, is added to q learnt tokens (as MAR's class)
    cross            the q learnt tokens do not depend on the prompt; every other block attends to the condition tokens

And a harder task for it, the paper's reason for a backbone per representation:

    spaces           four latent spaces, each turned in a way of its own

Of lost.py (the variants of vat.py: vat_parts.py):

    without-rida     its decoder learns from the flow alone
    large            a generator with as many parameters as LTM3D's backbone at tiny

    python -m evaluation.peers --from checkpoints/tiny --variant diffusion --out runs/diffusion      # flags of train.py
    python evaluate.py versus                                                                       # compares all
"""
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

import lost
import ltm3d
import models
import train
import vat
from backbone import DENOISERS, SIZES, Backbone, Flow, draw_noise, guidance_branches
from engine.commands import UserError, command
from engine.networks import Block, time_embedding
from evaluation import vat_parts
from prefix import Conditions, Prefix

STEPS = 64    # of denoising all tokens at once

# ---------------------------------------------------------------------------- other generators

class TimedBlock(Block):
    """A block whose shifts, scales and gates come from outside, the same for all blocks, but for an offset (adaLN)."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.offset = nn.Parameter(torch.zeros(6, dim))

    def forward(self, x, mask, time):                         # b k d, b k, b 6 d -> b k d
        shift1, scale1, gate1, shift2, scale2, gate2 = rearrange(time + self.offset, "b i d -> i b 1 d")
        x = x + (1 + gate1) * self.attention(self.norm1(x) * (1 + scale1) + shift1, mask=mask)
        return x + (1 + gate2) * self.feed(self.norm2(x) * (1 + scale2) + shift2)


class Diffusion(nn.Module):
    """[prefix, noisy tokens] -> velocity or noise of all tokens. To a denoiser a shape is one vector: b (n c)."""
    takes_rgs = False

    def __init__(self, tokens, channels, widths, dim, encoder, decoder, heads, prefix, head_dim, head_depth,
                 denoiser="flow"):
        super().__init__()
        self.tokens, self.channels, self.dim, self.denoiser = tokens, channels, dim, DENOISERS[denoiser]
        self.prefix = Prefix(prefix, dim, heads, widths)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 6 * dim))
        nn.init.zeros_(self.time[-1].weight)
        self.token = nn.Linear(channels, dim)
        self.place = nn.Parameter(torch.randn(tokens, dim) * .02)                 # n d
        spare = (5 * head_depth + 4) * head_dim ** 2 - 7 * dim ** 2               # of a DenoiseNet, less self.time
        count = encoder + decoder + round(spare / (12 * dim ** 2))
        self.blocks = nn.ModuleList(TimedBlock(dim, heads) for _ in range(count))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels))

    def net(self, x, t, prefix, mask):                        # b (n c), b, b p d, b p -> b (n c)
        x = self.token(rearrange(x, "b (n c) -> b n c", c=self.channels)) + self.place               # b n d
        t = time_embedding(t, self.dim) + rearrange(self.prefix.summary(prefix, mask), "b 1 d -> b d")
        t = rearrange(self.time(t), "b (i d) -> b i d", i=6)
        y, mask = torch.cat([prefix, x], 1), F.pad(mask, (0, self.tokens), value=True)               # b (p + n) d
        for block in self.blocks:
            y = block(y, mask, t)
        return rearrange(self.out(y[:, -self.tokens:]).float(), "b n c -> b (n c)")

    def loss(self, x, condition, moment=None):                # b n c; it has no moments of generation
        prefix, mask = self.prefix(condition)                                     # b p d, b p
        return self.denoiser.loss(partial(self.net, mask=mask), rearrange(x, "b n c -> b (n c)"), prefix)

    @torch.no_grad()
    def generate(self, condition, seeds, denoise_steps=STEPS, cfg=2., temperature=1., steer=None, **_):
        """As Backbone.generate, without unmasking steps, and without known tokens that RGS could blend."""
        if steer:
            raise UserError("RGS blends known tokens, and this checkpoint denoises all at once; give --rgs none")
        device, steps = self.place.device, denoise_steps or STEPS
        noise_shape = self.denoiser.draws(steps), self.tokens * self.channels
        noise = draw_noise(map(np.random.default_rng, seeds), noise_shape, device)                   # b s (n c)

        condition, strengths = guidance_branches(condition, cfg)
        prefix, mask = self.prefix(condition)                                     # (r b) p d, (r b) p
        net = partial(self.net, mask=mask)
        x = self.denoiser.sample(net, prefix, noise, steps, strengths, temperature)                  # b (n c)
        return rearrange(x, "b (n c) -> b n c", c=self.channels)


class Autoregressive(lost.Generator):
    """The generator of lost.py, but of shape tokens, in the order of the grid."""
    takes_rgs = False

    def __init__(self, tokens, channels, widths, dim, encoder, decoder, heads, prefix, head_dim, head_depth,
                 denoiser="flow"):
        super().__init__(tokens, channels, widths, dim, encoder + decoder, heads, prefix, head_dim, head_depth)
        self.tokens, self.dim = tokens, dim
        if denoiser != "flow":
            raise UserError("--variant autoregressive takes no other --denoiser than flow")

    def loss(self, x, condition, moment=None):                # b n c; it has no moments of generation
        return super().loss(x, condition)[0]

    def generate(self, condition, seeds, denoise_steps=None, cfg=2., temperature=1., steer=None, **_):
        """As Backbone.generate, in n steps of one token each."""
        if steer:
            raise UserError("RGS needs tokens in random order, this checkpoint samples them in turn; give --rgs none")
        return super().generate(condition, seeds, denoise_steps=denoise_steps or Flow.steps, cfg=cfg,
                                temperature=temperature)


# ---------------------------------------------------------------------------- other ways to condition the backbone

def no_summary(self, tokens, mask):
    """Nothing of the prefix is added to context vectors."""
    return 0.


class Unpooled(Backbone):
    """The mean of the prefix is not added to the context vectors."""

    class Prefix(Prefix):
        summary = no_summary

    def __init__(self, *, prefix, dim, heads, widths, **rest):
        super().__init__(prefix=prefix, dim=dim, heads=heads, widths=widths, **rest)
        self.prefix = self.Prefix(prefix, dim, heads, widths)
        del self.prefix.pool


class Queries(Unpooled):
    """The paper's prefix: the answers to q learnt queries."""

    class Prefix(Unpooled.Prefix):
        def forward(self, condition):
            tokens, mask = super().forward(condition)                             # b (t + q) d, b (t + q)
            return tokens[:, -len(self.query):], mask[:, -len(self.query):]


class Pooled(Backbone):
    """Its prefix: q learnt tokens; to each an MLP of the mean of the condition tokens is added."""

    class Prefix(nn.Module):
        summary = no_summary

        def __init__(self, prefix, dim, widths):
            super().__init__()
            self.conditions = Conditions(widths, dim)
            self.query = nn.Parameter(torch.randn(prefix, dim) * .02)             # q d
            mlp = nn.Linear(dim, 6 * dim), nn.GELU(), nn.Linear(6 * dim, dim)     # 12 d^2 parameters, as a Block
            self.feed = nn.Sequential(nn.LayerNorm(dim), *mlp)

        def forward(self, condition):
            context, mask = self.conditions(condition)                            # b t d, b t
            weight = rearrange(mask / mask.sum(1, keepdim=True), "b t -> b t 1")
            mean = reduce(context * weight, "b t d -> b 1 d", "sum")              # of tokens that are not masked
            prefix = self.query + self.feed(mean)                                 # b q d
            return prefix, torch.ones(prefix.shape[:2], dtype=torch.bool, device=prefix.device)

    def __init__(self, *, prefix, dim, widths, **rest):
        super().__init__(prefix=prefix, dim=dim, widths=widths, **rest)
        self.prefix = self.Prefix(prefix, dim, widths)


class ConditionBlock(Block):
    """A block that attends to the condition tokens. Cross sets `condition`, tokens and mask, before every pass."""
    condition = None

    def forward(self, x, mask=None, rows=None):               # mask: of shape tokens, which it does not attend to
        return super().forward(x, *self.condition, rows=rows)


class Cross(Backbone):
    """Blocks alternate: one attends to the shape tokens, the next to the condition tokens. The encoder has one block
    more, in place of that of Prefix Learning."""

    class Prefix(nn.Module):
        """The condition tokens, which only ConditionBlocks read, and q learnt tokens."""
        summary = no_summary

        def __init__(self, prefix, dim, widths):
            super().__init__()
            self.conditions = Conditions(widths, dim)
            self.query = nn.Parameter(torch.randn(prefix, dim) * .02)             # q d

        def forward(self, condition):
            context, mask = self.conditions(condition)                            # b t d, b t
            query = repeat(self.query, "q d -> b q d", b=len(context)).to(context.dtype)
            return torch.cat([context, query], 1), F.pad(mask, (0, len(self.query)), value=True)

    def __init__(self, *, prefix, dim, heads, widths, **rest):
        super().__init__(prefix=prefix, dim=dim, heads=heads, widths=widths, **rest)
        self.prefix = self.Prefix(prefix, dim, widths)
        encoder = len(self.encoder) + 1
        blocks = [ConditionBlock(dim, heads, context_dim=dim) if i % 2 else Block(dim, heads)
                  for i in range(encoder + len(self.decoder))]
        self.encoder, self.decoder = nn.ModuleList(blocks[:encoder]), nn.ModuleList(blocks[encoder:])

    def contexts(self, prefix, *rest):
        (tokens, mask), q = prefix, len(self.prefix.query)                        # b (t + q) d, b (t + q)
        for block in (*self.encoder, *self.decoder):
            if isinstance(block, ConditionBlock):
                block.condition = tokens[:, :-q], mask[:, :-q]
        return super().contexts((tokens[:, -q:], mask[:, -q:]), *rest)


# ---------------------------------------------------------------------------- several latent spaces

class Spaces(Backbone):
    """One backbone for four latent spaces. In each of them the channels of all tokens are multiplied by an orthogonal
    matrix of its own, so that what a channel says in one space is nowhere to be found in another. A label names the
    space."""
    takes_rgs = False

    def __init__(self, *, channels, dim, **rest):
        super().__init__(channels=channels, dim=dim, **rest)
        self.label = nn.Embedding(4, dim)
        random = torch.randn(4, channels, channels, generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("rotation", torch.linalg.qr(random).Q)               # s c c

    def contexts(self, prefix, *rest):
        tokens, mask = prefix                                                     # (r b) p d, (r b) p
        label = repeat(self.label(self.space), "b d -> (r b) 1 d", r=len(tokens) // len(self.space))
        return super().contexts((tokens + label, mask), *rest)

    def loss(self, x, condition, moment=None):
        self.space = torch.randint(4, (len(x),), device=x.device)                 # b, of each sample
        return super().loss(x @ self.rotation[self.space], condition, moment)

    def generate(self, condition, seeds, **options):
        """Samples of all spaces, turned back; the seed decides of which."""
        if options.get("steer"):
            raise UserError("the reconstructor knows none of these latent spaces; give --rgs none")
        spaces = [np.random.default_rng(seed).integers(4) for seed in seeds]
        self.space = torch.tensor(spaces, device=self.unknown.device)             # b
        return super().generate(condition, seeds, **options) @ self.rotation[self.space].mT


# ---------------------------------------------------------------------------- parts of lost.py

class WithoutRIDA(lost.Codec):
    """Its decoder learns from the flow alone."""
    MEANING = 0.


class LargeLoST(lost.Generator):
    """With as many parameters as LTM3D's backbone at tiny, whatever the size of the run."""

    def __init__(self, registers, width, widths, **smaller):
        tiny = dict(SIZES["tiny"])
        super().__init__(registers, width, widths, depth=tiny.pop("encoder") + tiny.pop("decoder"), **tiny)


# ---------------------------------------------------------------------------- all of them

GENERATORS = {"diffusion": Diffusion, "autoregressive": Autoregressive, "queries": Queries, "unpooled": Unpooled,
              "pooled": Pooled, "cross": Cross, "spaces": Spaces}
VARIANTS = {"backbone": GENERATORS, **vat_parts.VARIANTS,                         # stage: {variant: class}
            "lost-registers": {"without-rida": WithoutRIDA},
            "lost-generator": {"without-rida": lost.Generator, "large": LargeLoST}}
MODELS = models.MODELS | {                                    # the models, which load variants, too
    "ltm3d": SimpleNamespace(**vars(ltm3d) | {"load": partial(ltm3d.LTM3D, variants=VARIANTS)}),
    "vat": SimpleNamespace(**vars(vat) | {"load": partial(vat.VAT, variants=VARIANTS),
                                          "open_tokenizer": partial(vat.open_tokenizer, variants=VARIANTS)}),
    "lost": SimpleNamespace(**vars(lost) | {"load": partial(lost.LoST, variants=VARIANTS),
                                            "open_tokenizer": partial(lost.open_tokenizer, variants=VARIANTS)})}


if __name__ == "__main__":
    command(lambda: train.main(VARIANTS))
