"""backbone.py - Conditional Distribution Modelling (LTM3D section 3.3): prefix -> shape tokens.

    p(X | T) = prod_i p(x_i | known tokens, T)

A masked auto-encoder sees [prefix, known tokens] and gives every unknown token i a context vector
c_i; a small MLP (DenoiseNet) runs a diffusion on that one token given c_i. Training hides a random
share of the tokens; generation starts with none known and places a few more a step.

    python train.py --rep sdf --stage backbone
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from engine.files import load_model, read_stage
from engine.networks import Block, time_embedding
from prefix import Prefix, drops

SIZES = {  # encoder + decoder blocks of the MAE, then the DenoiseNet; base is MAR-B
    "tiny": dict(dim=256, encoder=4, decoder=4, heads=8, prefix=8, head_dim=256, head_depth=3),
    "small": dict(dim=384, encoder=6, decoder=6, heads=6, prefix=16, head_dim=512, head_depth=3),
    "base": dict(dim=768, encoder=12, decoder=12, heads=12, prefix=64, head_dim=1024, head_depth=6),
    "large": dict(dim=1024, encoder=16, decoder=16, heads=16, prefix=64, head_dim=1280, head_depth=8),
}
DRAWS = 4    # noise draws a masked token and step: the MAE's work is shared by all of them
CACHED = 2 ** 20    # tokens times width that a CPU samples at a time: their activations fit its cache, many shapes take a fifth less time


# ---------------------------------------------------------------------------- DenoiseNet

class DenoiseNet(nn.Module):
    """adaLN residual MLP on one noisy token, told the time and the context vector c_i."""

    def __init__(self, channels, context_dim, dim, depth):
        super().__init__()
        self.x = nn.Linear(channels, dim)
        self.t = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.c = nn.Linear(context_dim, dim)
        self.modulate = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(depth))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim)) for _ in range(depth))
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


def guided(net, x, t, c, guidance):
    """Classifier-free guidance, a strength for each kind of prompt (Brooks et al. 2023): c holds [all that is told, ..., nothing told],
    one kind less each time, which share the noise x."""
    n = len(c) // len(x)
    out = net(x.repeat(n, 1), t.repeat(n), c).chunk(n)
    return out[-1] + sum(g * (more - less) for g, more, less in zip(guidance, out, out[1:]))


def branched(condition, b, cfg):
    """The branches of guidance: all that is told, one kind less ..., nothing. -> the condition, once for each; what each is not
    told; the strength of each kind, the last first. cfg: one strength, or {kind: strength}; if all are 1 there is one branch."""
    kinds = list(condition)
    strengths = [cfg.get(kind, 2.) if isinstance(cfg, dict) else cfg for kind in reversed(kinds)]
    strengths = strengths if any(g != 1 for g in strengths) else []
    hidden = [set(kinds[len(kinds) - i:]) for i in range(len(strengths) + 1)]
    again = {kind: [repeat(x, "b ... -> (r b) ...", r=len(hidden)) for x in both] for kind, both in condition.items()}
    return again, {kind: torch.tensor([kind in some for some in hidden], device=again[kind][1].device).repeat_interleave(b)
                   for kind in kinds}, strengths


def noise_of(draws, shape, device):
    """Of every sample its own generator's: b ..."""
    return torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in draws])).to(device)


class Flow:
    """Rectified flow: x_t = (1 - t) noise + t x, the network gives the velocity x - noise."""
    steps = 4

    @staticmethod
    def draws(steps):                                         # of noise a token
        return 1

    @staticmethod
    def loss(net, x, c):                                      # k c, k d -> mean squared error
        t = torch.randn(len(x), device=x.device).sigmoid()    # logit-normal: most effort in the middle
        noise = torch.randn_like(x)
        t_ = rearrange(t, "k -> k 1")
        return F.mse_loss(net((1 - t_) * noise + t_ * x, t, c), x - noise)

    @staticmethod
    def sample(net, c, noise, steps, guidance=(), temperature=1.):
        """Adams-Bashforth steps from t = 0 to 1, of second order with one evaluation each; temperature scales the noise (k 1 c)
        that everything starts from."""
        x, before = temperature * noise[:, 0], None
        for i in range(steps):
            v = guided(net, x, torch.full((len(x),), i / steps, device=x.device), c, guidance)
            x = x + (v if before is None else 1.5 * v - .5 * before) / steps
            before = v
        return x


class DDPM:
    """The paper's and MAR's: x_t = sqrt(a_t) x + sqrt(1 - a_t) noise, cosine a_t, the network gives the noise."""
    steps = 100
    T = 1000
    alphas = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + .008) / 1.008 * math.pi / 2) ** 2
    alphas = (alphas / alphas[0]).clamp_min(1e-5).float()     # a_0 = 1 ... a_T ~ 0

    @staticmethod
    def draws(steps):                                         # the start, then one a step but the last
        return steps

    @classmethod
    def loss(cls, net, x, c):
        i = torch.randint(1, cls.T + 1, (len(x),), device=x.device)
        noise, a = torch.randn_like(x), rearrange(cls.alphas.to(x.device)[i], "k -> k 1")
        return F.mse_loss(net(a.sqrt() * x + (1 - a).sqrt() * noise, i / cls.T, c), noise)

    @classmethod
    def sample(cls, net, c, noise, steps, guidance=(), temperature=1.):
        """Ancestral sampling over `steps` of the 1000 levels; temperature scales the noise (k steps c) injected on the way."""
        levels = torch.linspace(cls.T, 0, steps + 1).round().long()
        x = noise[:, 0]
        for step, (i, j) in enumerate(zip(levels[:-1], levels[1:])):
            a, b = cls.alphas[i].to(x.device), cls.alphas[j].to(x.device)
            t = torch.full((len(x),), i / cls.T, device=x.device)
            eps = guided(net, x, t, c, guidance)
            clean = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-5, 5)          # tokens have unit variance
            ratio = a / b                                     # posterior q(x_j | x_i, clean)
            mean = (b.sqrt() * (1 - ratio) * clean + ratio.sqrt() * (1 - b) * x) / (1 - a)
            fresh = noise[:, (step + 1) % steps]              # the last step adds none: there 1 - b is 0
            x = mean + temperature * ((1 - ratio) * (1 - b) / (1 - a)).sqrt() * fresh
        return x


DENOISERS = {"flow": Flow, "ddpm": DDPM}


# ---------------------------------------------------------------------------- MAE

class Backbone(nn.Module):
    def __init__(self, tokens, channels, widths, dim, encoder, decoder, heads, prefix, head_dim, head_depth,
                 denoiser="flow"):
        super().__init__()
        self.tokens, self.channels, self.denoiser = tokens, channels, DENOISERS[denoiser]
        self.prefix = Prefix(prefix, dim, heads, widths)
        self.token = nn.Linear(channels, dim)
        self.place_in = nn.Parameter(torch.randn(tokens, dim) * .02)              # two positional embeddings, as MAR
        self.place_out = nn.Parameter(torch.randn(prefix + tokens, dim) * .02)
        self.unknown = nn.Parameter(torch.randn(dim) * .02)                       # the "?" token
        self.encoder = nn.ModuleList(Block(dim, heads) for _ in range(encoder))
        self.decoder = nn.ModuleList(Block(dim, heads) for _ in range(decoder))
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.net = DenoiseNet(channels, dim, head_dim, head_depth)

    def told(self, condition, drop=None):
        """What a prompt becomes: the prefix, b p d. (In evaluation/peers.py also what blocks read besides.)"""
        return self.prefix(condition, drop),

    def contexts(self, told, x, order, known, asked):
        """told: (prefix b p d,), x b n c, order b n (a permutation: its first `known` are known), asked b m -> c_i of these, b m d."""
        prefix, *read = told
        b, p, d = prefix.shape
        seen = repeat(order[:, :known], "b k -> b k d", d=d)
        y = (self.token(x) + self.place_in).gather(1, seen)                       # b k d
        y = torch.cat([prefix, y], 1)
        for block in self.encoder:                                                # sees only what is known
            y = block(y, *read)
        y = self.norm_in(y)
        full = repeat(self.unknown, "d -> b n d", b=b, n=self.tokens).to(y.dtype).scatter(1, seen, y[:, p:])
        y = torch.cat([y[:, :p], full], 1) + self.place_out
        for block in self.decoder[:-1]:                                           # sees all places
            y = block(y, *read)
        return self.norm_out(self.decoder[-1](y, *read, asked=p + asked))

    def loss(self, x, condition):
        """x: b n c shape tokens and their condition (prefix.py). The diffusion loss, on the hidden tokens only."""
        b, n, device = len(x), self.tokens, x.device
        # the share hidden is that of a random moment of generation, one for the batch: no padding. (MAR hides .7 and more. Here
        # the tokens that are placed last, when all others are known, then never were learnt, and are torn.)
        ratio = math.cos(math.pi / 2 * torch.rand(1).item())
        known = n - math.ceil(n * ratio)
        order = torch.rand(b, n, device=device).argsort(1)
        hidden = order[:, known:]                                                 # b m: no other reaches the head
        c = self.contexts(self.told(condition, drops(b, condition, device)), x, order, known, hidden)
        x = x.gather(1, repeat(hidden, "b m -> b m c", c=self.channels))
        c, x = repeat(c, "b m d -> (r b m) d", r=DRAWS), repeat(x, "b m c -> (r b m) c", r=DRAWS)
        return self.denoiser.loss(self.net, x, c)

    @torch.no_grad()
    def generate(self, condition, seeds, steps=10, denoise_steps=None, cfg=2., temperature=1.,
                 growth=0., steer=None, window=.75):
        """condition (prefix.py), one seed a sample -> shape tokens b n c. cfg: the strength of guidance, or one for each kind.
        growth: it grows with the share of tokens known to this power. 1 is MAR's, which hardly guides the first, that decide most.

        steer: RGS, a function of the tokens sampled so far that gives what the MAE sees of them (reconstruct.py), during the first
        `window` of the steps (a share if below 1, else a number of steps); None is sampling only.
        """
        b, n, device = len(seeds), self.tokens, self.unknown.device
        # a sample's randomness is its own, so that it does not depend on who else is in the batch
        draws = [np.random.default_rng(seed) for seed in seeds]
        order = torch.from_numpy(np.stack([rng.permutation(n) for rng in draws])).to(device)             # b n
        denoise_steps = denoise_steps or self.denoiser.steps
        noise = noise_of(draws, (n, self.denoiser.draws(denoise_steps), self.channels), device)          # b n r c
        condition, drop, strengths = branched(condition, b, cfg)
        told, branches = self.told(condition, drop), len(strengths) + 1
        orders, some = order.repeat(branches, 1), max(1, CACHED // (n * len(self.unknown))) if device.type == "cpu" else branches * b
        guided_early = window if window >= 1 else math.ceil(window * steps)
        x = torch.zeros(b, n, self.channels, device=device)
        for step, (known, then) in enumerate(schedule(n, steps)):
            seen = x if steer is None or step >= guided_early else steer(x)                               # RGS
            parts = zip(*(y.split(some) for y in (*told, seen.repeat(branches, 1, 1), orders)))
            c = torch.cat([self.contexts(told_, seen_, order_, known, order_[:, known:then]) for *told_, seen_, order_ in parts])
            place = repeat(order[:, known:then], "b m -> b m c", c=self.channels)
            guidance = [1 + (g - 1) * (then / n) ** growth for g in strengths]
            fresh = noise.gather(1, repeat(place, "b m c -> b m r c", r=noise.shape[2]))
            new = self.denoiser.sample(self.net, rearrange(c, "b m d -> (b m) d"), rearrange(fresh, "b m r c -> (b m) r c"),
                                       denoise_steps, guidance, temperature)
            x = x.scatter(1, place, rearrange(new, "(b m) c -> b m c", b=b).to(x.dtype))
        return x


def schedule(n, steps):
    """The cosine unmasking schedule: pairs (known before, known after), at least one new token a step."""
    if not 1 <= steps <= n:
        raise ValueError(f"steps must be between 1 and the number of shape tokens, {n}; got {steps}")
    known, pairs = 0, []
    for step in range(1, steps + 1):
        then = n - math.floor(n * math.cos(math.pi / 2 * step / steps) + 1e-9)
        then = min(max(then, known + 1), n - (steps - step))                      # leave one for each step to come
        pairs.append((known, then))
        known = then
    return pairs


def load(folder):
    """The backbone of a checkpoint folder, frozen."""
    entry, kind = read_stage(folder, "backbone"), Backbone
    if entry.get("generator", "masked") != "masked":
        from evaluation.peers import GENERATORS                      # few need them
        kind = GENERATORS[entry["generator"]]
    return load_model(kind, f"{folder}/backbone.safetensors", **entry["settings"])
