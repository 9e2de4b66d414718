"""vat_parts.py - other ways to build the parts of vat.py.

Table 4 of the paper, how features of the surface become latents (ours: one sequence with learnt latents, three blocks):

    pooling            three blocks over the features alone; a latent is the mean of those near it
    q-former           two blocks over the features, then learnt latents attend to them, once

Quantisers (ours: VVQ, the latents are a Gaussian, sampled while it learns):

    plain              the latents are the mean: no noise, no KL
    scale-dropout      as ours; in training, some shapes keep the codes of their first scales alone

Table 5 of the paper, the decoder (ours: three planes):

    cross-attention    a point attends to the latents, in two layers

And a generator, `large`, with as many parameters as LTM3D's backbone at tiny.

    python -m evaluation.peers --model vat --variant plain --from checkpoints/tiny --out runs/plain
    python evaluate.py scales --checkpoint checkpoints/vat runs/plain
"""
import torch
from einops import rearrange, repeat

import vat
from engine.networks import Block

# ---------------------------------------------------------------------------- features -> latents

class PoolingEncoder(vat.Encoder):
    def mix(self, features):                                  # b m d -> b n d
        place = repeat(self.centre, "m i -> b m i", b=len(features))
        for block in self.blocks:
            features = block(features, positions=(place, place))
        s = round(len(self.centre) ** (1 / 3))
        grid = rearrange(features, "b (x y z) d -> b d x y z", x=s, y=s)
        return vat.as_rows(vat.down(grid, round(len(self.place) ** (1 / 3)))) + self.latent


class QFormerEncoder(vat.Encoder):
    def __init__(self, side, channels, features, dim, heads, depth):
        super().__init__(side, channels, features, dim, heads, depth - 1)
        self.cross = Block(dim, heads, context_dim=dim)

    def mix(self, features):                                  # b m d -> b n d
        centre, place = (repeat(x, "n i -> b n i", b=len(features)) for x in (self.centre, self.place))
        for block in self.blocks:
            features = block(features, positions=(centre, centre))
        latents = repeat(self.latent, "n d -> b n d", b=len(features))
        return self.cross(latents, features, positions=(place, centre))


class Pooling(vat.Tokenizer):
    Encoder = PoolingEncoder


class QFormer(vat.Tokenizer):
    Encoder = QFormerEncoder


# ---------------------------------------------------------------------------- quantisers

class Plain(vat.Tokenizer):
    """Without the Gaussian: a deviation of e^-50 is none."""
    KL = 0.

    class Encoder(vat.Encoder):
        def forward(self, *cloud):
            mean = vat.latents_of(super().forward(*cloud))
            return torch.cat([mean, torch.full_like(mean, -100.)], -1)


class ScaleDropout(vat.Tokenizer):
    """In training, a shape keeps all K scales with a chance of (K + 1) / 2K, else the first 1, 2 ... or K - 1."""

    class Quantiser(vat.Quantiser):
        def forward(self, z):
            latents, loss, indices = super().forward(z)
            if self.training:
                f = torch.stack(self.decode(indices)[1:], 1)                      # b K c S S S
                last = torch.randint(2 * len(self.scales), (len(z),), device=z.device).clamp(max=len(self.scales) - 1)
                kept = vat.as_rows(f[torch.arange(len(z)), last])                 # b n c
                latents = z + (kept - z).detach()
            return latents, loss, indices


# ---------------------------------------------------------------------------- decoder, generator

class CrossAttention(vat.Decoder):
    planes = False


class Large(vat.Generator):
    """With as many parameters as LTM3D's backbone at tiny, whatever the size of the run."""

    def __init__(self, dim, depth, heads, **rest):
        super().__init__(dim=256, depth=9, heads=8, **rest)


SECOND_PHASE = {"scale-dropout"}                              # variants whose first phase of training is that of vat.py
TOKENIZERS = {"pooling": Pooling, "q-former": QFormer, "plain": Plain, "scale-dropout": ScaleDropout,
              "cross-attention": vat.Tokenizer}
FIRST_PHASE = {name: own for name, own in TOKENIZERS.items() if name not in SECOND_PHASE}
# --variant names one tokenizer for all its stages: their generator is that of vat.py
VARIANTS = {"vat-latents": FIRST_PHASE, "vat-codes": TOKENIZERS, "vat-decoder": {"cross-attention": CrossAttention},
            "vat-generator": dict.fromkeys(TOKENIZERS, vat.Generator) | {"large": Large}}
