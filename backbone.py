"""backbone.py - Conditional Distribution Modelling (LTM3D section 3.3): prefix -> shape tokens.

    p(X | T) = prod_i p(x_i | known tokens, T)          X: all shape tokens, T: the prompt

A masked auto-encoder sees [prefix, known tokens] and gives every unknown token i a context vector
c_i; a small MLP (DenoiseNet) runs a diffusion on that one token given c_i. Training hides a random
share of the tokens; generation starts with none known and places a few more a step. Unlike MAR, there is no dropout,
the DenoiseNet learns no variance, and the learning rate falls linearly in the end (engine/state.py).

    python train.py --rep sdf --stage backbone
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from engine.files import load_stage
from engine.networks import Block, time_embedding
from prefix import Prefix

SIZES = {  # encoder + decoder blocks of the MAE, then the DenoiseNet; base is MAR-B
    "tiny": dict(dim=256, encoder=4, decoder=4, heads=8, prefix=8, head_dim=256, head_depth=3),
    "mini": dict(dim=256, encoder=2, decoder=3, heads=8, prefix=8, head_dim=256, head_depth=3),
    "small": dict(dim=384, encoder=6, decoder=6, heads=6, prefix=16, head_dim=512, head_depth=3),
    "base": dict(dim=768, encoder=12, decoder=12, heads=12, prefix=64, head_dim=1024, head_depth=6),
    "large": dict(dim=1024, encoder=16, decoder=16, heads=16, prefix=64, head_dim=1280, head_depth=8),
}
DRAWS = 2    # noise draws per hidden token and step: all of them share the MAE's work
CACHED = 2 ** 20    # tokens times width times branches of guidance that a CPU computes at once (cache_sized)


# ---------------------------------------------------------------------------- DenoiseNet

class DenoiseNet(nn.Module):
    """A residual MLP on one noisy token; time and context vector c_i set shift, scale, gate of its blocks (adaLN)."""

    def __init__(self, channels, context_dim, dim, depth):
        super().__init__()
        self.x = nn.Linear(channels, dim)
        self.t = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.c = nn.Linear(context_dim, dim)
        self.modulate = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim)) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.last, self.out = nn.Linear(dim, 2 * dim), nn.Linear(dim, channels)
        for layer in (*self.modulate, self.last, self.out):   # every block starts as the identity, the output as 0
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, c):                               # k c, k, k d -> k c
        y = F.silu(self.t(time_embedding(t, self.x.out_features)) + self.c(c))
        x = self.x(x)
        for modulate, mlp in zip(self.modulate, self.mlp):
            shift, scale, gate = modulate(y).chunk(3, -1)
            x = x + gate * mlp(self.norm(x) * (1 + scale) + shift)
        shift, scale = self.last(y).chunk(2, -1)
        return self.out(self.norm(x) * (1 + scale) + shift).float()


# ---------------------------------------------------------------------------- classifier-free guidance

def guidance_branches(condition, cfg):
    """The branches that classifier-free guidance compares, stacked along the batch: r branches of b samples each.

    Each branch sees one kind of prompt less than the branch before it; the last sees none. With text and picture:

        branch 0: text and picture      branch 1: text      branch 2: nothing
        hidden:   {}                              {image}             {text, image}
        strengths: [cfg of the image (0 against 1), cfg of the text (1 against 2)]

    cfg: one strength, or {kind: strength}. If all strengths are 1 the branches add up to branch 0 alone: then r = 1.
    -> the condition of r b samples; the strengths.
    """
    kinds = list(condition)                                                       # ["text", "image"]
    strengths = [cfg.get(kind, 2.) if isinstance(cfg, dict) else cfg for kind in reversed(kinds)]
    if all(strength == 1 for strength in strengths):
        strengths = []
    hidden = [set(kinds[len(kinds) - i:]) for i in range(len(strengths) + 1)]     # of each branch: r sets of kinds

    stacked = {}
    for kind, (tokens, mask) in condition.items():
        masks = [torch.zeros_like(mask) if kind in branch else mask for branch in hidden]        # r times b t
        stacked[kind] = repeat(tokens, "b t e -> (r b) t e", r=len(hidden)), torch.cat(masks)
    return stacked, strengths


def grown(strengths, known, n):
    """Guidance grows from none at the first token to all of it where a quarter of the n tokens is known (MAR's grows to
    the end). The first tokens choose among all that the prompt allows; guided, they choose the same more often."""
    return [1 + (strength - 1) * min(1, 4 * known / n) for strength in strengths]


def guide(branches, strengths):
    """The outputs of r branches, one below the other, (r b) ... -> guided, b ... (Brooks et al. 2023).

        out = out_nothing + sum_i strength_i (out_i - out_(i+1))
    """
    out = branches.chunk(len(strengths) + 1)
    return out[-1] + sum(g * (more - less) for g, more, less in zip(strengths, out, out[1:]))


def guided(net, x, t, c, strengths):
    """Classifier-free guidance of a DenoiseNet. x: k c, t: k are shared by all branches; c: (r k) d holds their context
    vectors."""
    r = len(c) // len(x)
    return guide(net(x.repeat(r, 1), t.repeat(r), c), strengths)                  # k c


# ---------------------------------------------------------------------------- denoisers

def draw_noise(generators, shape, device):
    """Noise of b samples: b ... Each sample has its own random generator, so it does not depend on its batch."""
    return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in generators])).to(device)


class Flow:
    """The default, a rectified flow: x_t = (1 - t) noise + t x, the network gives the velocity x - noise."""
    steps = 4                                                 # by default

    @staticmethod
    def draws(steps):                                         # noise draws that sampling a token takes
        return 1

    @staticmethod
    def loss(net, x, c):                                      # k c, k d -> mean squared error
        t = torch.randn(len(x), device=x.device).sigmoid()    # logit-normal: most effort in the middle
        noise = torch.randn_like(x)
        t_ = rearrange(t, "k -> k 1")
        return F.mse_loss(net((1 - t_) * noise + t_ * x, t, c), x - noise)

    @staticmethod
    def sample(net, c, noise, steps, strengths=(), temperature=1.):
        """noise k 1 c, context vectors c (r k) d -> tokens k c. Adams-Bashforth steps from t = 0 to 1: second order
        with one evaluation a step. temperature scales the noise."""
        x, before = temperature * noise[:, 0], None
        for i in range(steps):
            t = torch.full((len(x),), i / steps, device=x.device)                 # k
            v = guided(net, x, t, c, strengths)                                   # k c
            x = x + (v if before is None else 1.5 * v - .5 * before) / steps
            before = v
        return x


class DDPM:
    """The paper's and MAR's: x_t = sqrt(a_t) x + sqrt(1 - a_t) noise, cosine a_t, the network gives the noise."""
    steps = 100                                               # by default
    T = 1000                                                  # noise levels
    alphas = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + .008) / 1.008 * math.pi / 2) ** 2
    alphas = (alphas / alphas[0]).clamp_min(1e-5).float()     # a_0 = 1 ... a_T ~ 0

    @staticmethod
    def draws(steps):                                         # one to start from, one per step but the last
        return steps

    @classmethod
    def loss(cls, net, x, c):
        i = torch.randint(1, cls.T + 1, (len(x),), device=x.device)
        noise, a = torch.randn_like(x), rearrange(cls.alphas.to(x.device)[i], "k -> k 1")
        return F.mse_loss(net(a.sqrt() * x + (1 - a).sqrt() * noise, i / cls.T, c), noise)

    @classmethod
    def sample(cls, net, c, noise, steps, strengths=(), temperature=1.):
        """noise k steps c, context vectors c (r k) d -> tokens k c. Ancestral sampling over `steps` of the 1000 levels;
        temperature scales the noise that is injected on the way."""
        levels = torch.linspace(cls.T, 0, steps + 1).round().long()
        x = noise[:, 0]
        for step, (i, j) in enumerate(zip(levels[:-1], levels[1:])):
            a, b = cls.alphas[i].to(x.device), cls.alphas[j].to(x.device)
            t = torch.full((len(x),), i / cls.T, device=x.device)
            eps = guided(net, x, t, c, strengths)                                 # k c
            clean = (x - (1 - a).sqrt() * eps) / a.sqrt()                         # k c
            clean = clean.clamp(-5, 5)                        # not in MAR; tokens have unit variance, none is larger
            ratio = a / b                                     # posterior q(x_j | x_i, clean)
            mean = (b.sqrt() * (1 - ratio) * clean + ratio.sqrt() * (1 - b) * x) / (1 - a)
            fresh = noise[:, (step + 1) % steps]              # the last step adds none: there 1 - b is 0
            x = mean + temperature * ((1 - ratio) * (1 - b) / (1 - a)).sqrt() * fresh
        return x


DENOISERS = {"flow": Flow, "ddpm": DDPM}


# ---------------------------------------------------------------------------- MAE

class Backbone(nn.Module):
    takes_rgs = True                                          # Reconstruction-Guided Sampling blends known tokens

    def __init__(self, tokens, channels, widths, dim, encoder, decoder, heads, prefix, head_dim, head_depth,
                 denoiser="flow"):
        super().__init__()
        self.tokens, self.channels, self.dim, self.denoiser = tokens, channels, dim, DENOISERS[denoiser]
        self.prefix = Prefix(prefix, dim, heads, widths)
        self.token = nn.Linear(channels, dim)
        self.place_in = nn.Parameter(torch.randn(tokens, dim) * .02)              # two positional embeddings, as MAR
        self.place_out = nn.Parameter(torch.randn(prefix + tokens, dim) * .02)    # condition tokens: 0
        self.unknown = nn.Parameter(torch.randn(dim) * .02)                       # the "?" token
        self.encoder = nn.ModuleList(Block(dim, heads) for _ in range(encoder))
        self.decoder = nn.ModuleList(Block(dim, heads) for _ in range(decoder))
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.net = DenoiseNet(channels, dim, head_dim, head_depth)

    def contexts(self, prefix, x, order, known, rows):
        """The MAE: prefix tokens and their mask, shape tokens x b n c, order b n (its first `known` entries are known
        tokens) -> context vectors c_i of the tokens `rows` (b m): b m d."""
        prefix, mask = prefix                                                     # b p d, b p
        (b, p, d), n = prefix.shape, self.tokens
        summary = self.prefix.summary(prefix, mask)                               # b 1 d
        index = repeat(order[:, :known], "b k -> b k d", d=d)                     # b k d
        y = (self.token(x) + self.place_in).gather(1, index)                      # b k d
        y = torch.cat([prefix, y], 1)                                             # b (p + k) d
        for block in self.encoder:                                                # sees the known tokens only
            y = block(y, mask=F.pad(mask, (0, known), value=True))
        y = self.norm_in(y)

        full = repeat(self.unknown, "d -> b n d", b=b, n=n).to(y.dtype)
        full = full.scatter(1, index, y[:, p:])                                   # b n d
        place = F.pad(self.place_out, (0, 0, p + n - len(self.place_out), 0))     # (p + n) d
        y = torch.cat([y[:, :p], full], 1) + place                                # b (p + n) d
        mask = F.pad(mask, (0, n), value=True)                                    # b (p + n)
        for block in self.decoder[:-1]:                                           # sees all places
            y = block(y, mask=mask)
        return self.norm_out(self.decoder[-1](y, mask=mask, rows=p + rows)) + summary             # b m d

    def loss(self, x, condition, moment=None):
        """x: b n c shape tokens, and their condition (prefix.py) -> the diffusion loss of the hidden tokens.
        moment: of generation, from 0 (nothing is known) to 1; by default a random one."""
        b, n, device = len(x), self.tokens, x.device
        # The share of hidden tokens is the same for the whole batch: no padding. Early moments, when the prompt decides
        # most, are drawn more often. (MAR hides at least .7 of the tokens, by a truncated normal: then tokens placed
        # last, when nearly all are known, are never learnt.)
        moment = torch.rand(1).item() ** 1.5 if moment is None else moment
        known = n - math.ceil(n * math.cos(math.pi / 2 * moment))
        order = torch.rand(b, n, device=device).argsort(1)                        # b n
        hidden = order[:, known:]                                                 # b m

        prefix = self.prefix(condition)                                           # b p d and b p
        c = self.contexts(prefix, x, order, known, hidden)                        # b m d
        x = x.gather(1, repeat(hidden, "b m -> b m c", c=self.channels))          # b m c
        c = repeat(c, "b m d -> (draws b m) d", draws=DRAWS)
        x = repeat(x, "b m c -> (draws b m) c", draws=DRAWS)
        return self.denoiser.loss(self.net, x, c)

    @torch.no_grad()
    def generate(self, condition, seeds, steps=10, denoise_steps=None, cfg=2., temperature=1., steer=None, window=.75):
        """condition (prefix.py) and one seed per sample -> shape tokens b n c.
        steer: RGS, a function of x that gives what the MAE sees in the first `window` of the steps (reconstruct.py)."""
        b, n, c, device = len(seeds), self.tokens, self.channels, self.unknown.device
        denoise_steps = denoise_steps or self.denoiser.steps
        generators = [np.random.default_rng(seed) for seed in seeds]              # a sample is independent of its batch
        order = torch.from_numpy(np.stack([rng.permutation(n) for rng in generators])).to(device)             # b n
        noise = draw_noise(generators, (n, self.denoiser.draws(denoise_steps), c), device)                # b n draws c

        condition, strengths = guidance_branches(condition, cfg)
        prefix = self.prefix(condition)                                           # (r b) p d and (r b) p
        r = len(strengths) + 1
        rgs_steps = math.ceil(window * steps) if steer else 0

        x = torch.zeros(b, n, c, device=device)                                   # b n c, tokens not known yet are 0
        for step, (known, then) in enumerate(schedule(n, steps)):
            new = order[:, known:then]                                            # b m, the tokens of this step
            steered = steer(x) if step < rgs_steps else x                         # b n c, RGS; only known tokens count

            # MAE: c_i = f(prefix, known tokens), in all r branches; the one with the whole prompt is steered
            seen = torch.cat([steered] + [x] * len(strengths))                    # (r b) n c
            places, rows = (repeat(y, "b ... -> (r b) ...", r=r) for y in (order, new))
            context = self.contexts(prefix, seen, places, known, rows)            # (r b) m d
            context = rearrange(context, "rb m d -> (rb m) d")

            # DenoiseNet: x_i ~ p(x_i | c_i), guided by the r branches
            strength, start = grown(strengths, known, n), take(noise, new)
            sample = self.denoiser.sample(self.net, context, start, denoise_steps, strength, temperature)
            x = put(x, new, sample)                                               # b n c; sample: (b m) c
        return x


def take(x, rows):
    """x b n ..., rows b m -> those rows of every batch element, one below the other: (b m) ..."""
    return torch.cat([element[chosen] for element, chosen in zip(x, rows)])


def put(x, rows, values):
    """x b n c with the rows b m of every batch element replaced by `values`, (b m) c."""
    index = repeat(rows, "b m -> b m c", c=x.shape[-1])
    return x.scatter(1, index, rearrange(values, "(b m) c -> b m c", b=len(x)).to(x.dtype))


def cache_sized(backbone, condition, seeds):
    """Splits a batch into chunks whose activations fit a CPU's cache, which takes a fifth less time. Yields pairs:
    condition, seeds."""
    size = len(seeds)
    if backbone.token.weight.device.type == "cpu":
        size = max(1, CACHED // (backbone.tokens * backbone.dim * (len(condition) + 1)))
    for i in range(0, len(seeds), size):
        yield {kind: (x[i:i + size], mask[i:i + size]) for kind, (x, mask) in condition.items()}, seeds[i:i + size]


def schedule(n, steps):
    """The cosine unmasking schedule: pairs (known before, known after), at least one new token a step."""
    if not 1 <= steps <= n:
        raise ValueError(f"steps must be between 1 and the number of shape tokens, {n}; got {steps}")
    known, pairs = 0, []
    for step in range(1, steps + 1):
        then = n - math.floor(n * math.cos(math.pi / 2 * step / steps) + 1e-9)
        then = min(max(then, known + 1), n - (steps - step))                      # leave one token for every later step
        pairs.append((known, then))
        known = then
    return pairs


def load(folder, variants={}):
    """The backbone of a checkpoint folder, frozen."""
    return load_stage(folder, "backbone", Backbone, variants)
