"""backbone.py - Conditional Distribution Modelling (LTM3D section 3.3): prefix -> shape tokens.

    p(X | T) = prod_i p(x_i | known tokens, T)          X: all shape tokens, T: the prompt

A masked autoencoder (MAE) encodes [prefix, known tokens] and gives every unknown token i a context vector z_i; a small
MLP (DenoiseNet) runs a diffusion on that one token, conditioned on z_i. Training masks a random share of the tokens;
generation starts with all tokens unknown and samples a few at every step.

Unlike MAR (arXiv 2406.11838), besides the prefix:

    training     Muon, a learning rate that falls linearly, no dropout (engine/optimizers.py)
                 two noise draws a token, not four; numbers of known tokens of the cosine schedule (known_counts)
                 each shape has one encoding; MAR samples it, and noise on it gains nothing here (docs/RESULTS.md)
    DenoiseNet   a flow, not DDPM with a learnt variance; the more channels, the stronger the noise (Flow.loss);
                 no LayerNorm on context vectors, no learnt positions on them
    generation   guidance reaches its full strength at a quarter of the tokens (ramp); rounds of resampling

    python train.py --rep sdf --stage backbone
"""
import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

import encoders
import judge
import tokenizer
from engine.commands import UserError
from engine.files import load_stage, read_stage
from engine.loop import Loop
from engine.networks import Block, flow_pair, time_embedding
from engine.noise import bits, normal
from engine.stage import Stage
from heads import load as load_heads
from prefix import Prefix

SIZES = {  # encoder + decoder blocks of the MAE, then the DenoiseNet; base is MAR-B
    "tiny": dict(dim=256, encoder=1, decoder=5, heads=8, queries=8, head_dim=384, head_depth=3),
    "mini": dict(dim=256, encoder=1, decoder=5, heads=8, queries=8, head_dim=512, head_depth=4),
    "small": dict(dim=384, encoder=6, decoder=6, heads=6, queries=16, head_dim=512, head_depth=3),
    "base": dict(dim=768, encoder=12, decoder=12, heads=12, queries=64, head_dim=1024, head_depth=6),
    "large": dict(dim=1024, encoder=16, decoder=16, heads=16, queries=64, head_dim=1280, head_depth=8),
}
GROUPS = 9   # of the tokens; a round resamples one group at a time (unmasking_steps)
DRAWS = 2    # noise draws per masked token and step, which share one MAE pass
CACHED = 2 ** 20    # tokens x width x guidance branches in one chunk on a CPU (cache_sized)


# ---------------------------------------------------------------------------- DenoiseNet

class DenoiseNet(nn.Module):
    """A residual MLP on one noisy token; time and context vector z_i set shift, scale, gate of its blocks (adaLN)."""

    def __init__(self, channels, context_dim, dim, depth):
        super().__init__()
        self.x = nn.Linear(channels, dim)
        self.t = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.c = nn.Linear(context_dim, dim)                  # of context vectors
        self.modulate = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim)) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.last, self.out = nn.Linear(dim, 2 * dim), nn.Linear(dim, channels)
        for layer in (*self.modulate, self.last, self.out):   # every block starts as the identity, the output as 0
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, z):                               # noisy tokens k c, times k or 1, z: k d -> k c
        y = F.silu(self.t(time_embedding(t, self.x.out_features)) + self.c(z))
        x = self.x(x)
        for modulate, mlp in zip(self.modulate, self.mlp):
            shift, scale, gate = modulate(y).chunk(3, -1)
            x = x + gate * mlp(self.norm(x) * (1 + scale) + shift)
        shift, scale = self.last(y).chunk(2, -1)
        return self.out(self.norm(x) * (1 + scale) + shift).float()


# ---------------------------------------------------------------------------- classifier-free guidance

def split_condition(condition, cfg):                          # unit 4
    """The branches that classifier-free guidance compares, stacked along the batch: r branches of b samples each.

    Each branch drops one more prompt kind; the last is unconditional. With text and picture:

        branch 0: text and picture      branch 1: text      branch 2: unconditional
        dropped:  {}                              {image}             {text, image}
        strengths: [cfg of the image (0 against 1), cfg of the text (1 against 2)]

    cfg: one strength, or {kind: strength}. If all strengths are 1, the branches cancel to branch 0: then r = 1.
    -> the condition of r b samples: a dropped kind keeps its tokens, its mask is False; the list of strengths.
    """
    kinds = list(condition)                                                       # ["text", "image"]
    strengths = [cfg.get(kind, 2.) if isinstance(cfg, dict) else cfg for kind in reversed(kinds)]
    if all(strength == 1 for strength in strengths):
        strengths = []
    dropped = [set(kinds[len(kinds) - i:]) for i in range(len(strengths) + 1)]    # of each branch: r sets of kinds

    stacked = {}
    for kind, (tokens, mask) in condition.items():
        masks = [torch.zeros_like(mask) if kind in branch else mask for branch in dropped]       # r times b t
        stacked[kind] = repeat(tokens, "b t e -> (r b) t e", r=len(dropped)), torch.cat(masks)
    return stacked, strengths


def ramp(strengths, known, n):
    """Guidance grows linearly from 1 at the first token to its full strength where a quarter of the n tokens is known
    (MAR's grows to the end). Guidance of early tokens reduces diversity."""
    return [1 + (strength - 1) * min(1, 4 * known / n) for strength in strengths]


def combine(branches, strengths):                             # unit 4
    """The outputs of r branches, stacked along the batch, (r b) ... -> guided, b ... (Brooks et al. 2023).

        out = out_unconditional + sum_i strength_i (out_i - out_(i+1))
    """
    out = branches.chunk(len(strengths) + 1)
    return out[-1] + sum(g * (more - less) for g, more, less in zip(strengths, out, out[1:]))


def denoise(net, x, t, z, strengths):
    """The guided output of a DenoiseNet. All branches share x: k c, t: 1; z: (r k) d holds their context vectors."""
    return combine(net(x.repeat(len(strengths) + 1, 1), t, z), strengths)         # k c


# ---------------------------------------------------------------------------- denoisers: t = 0 is noise, t = 1 a token

class Flow:
    """The default, a rectified flow: x_t = (1 - t) noise + t x, the network predicts the velocity x - noise."""
    steps = 4                                                 # by default

    @staticmethod
    def loss(net, x, z):                                      # unit 2
        """Tokens x: k c, z: k d -> mean squared error of the velocity net(noisy x, t, z), t: k.

        t is logit-normal. With 16 channels most t are near .5. The more channels, the more of a token shows through the
        same noise, so t is smaller: this is Stable Diffusion 3's shift (Esser et al. 2024, section 5.3.2)."""
        shift = math.log(16 / x.shape[-1]) / 2
        t = (torch.randn(len(x), device=x.device) + shift).sigmoid()
        noisy, velocity = flow_pair(x, rearrange(t, "k -> k 1"))                  # k c
        return F.mse_loss(net(noisy, t, z), velocity)

    @staticmethod
    def sample(net, z, noise, steps, strengths=(), temperature=1.):  # unit 2
        """Context vectors z (r k) d, noise: count -> k count c; -> tokens k c. Adams-Bashforth steps of `denoise` from
        t = 0 to 1: second order with one evaluation a step. temperature scales the noise."""
        x, before = temperature * noise(1)[:, 0], None
        for i in range(steps):
            t = torch.full((1,), i / steps, device=x.device)                      # 1
            v = denoise(net, x, t, z, strengths)                                  # k c
            x = x + (v if before is None else 1.5 * v - .5 * before) / steps
            before = v
        return x


class DDPM:
    """The paper's and MAR's: x_t = sqrt(a_t) x + sqrt(1 - a_t) noise, cosine a_t, the network predicts the noise."""
    steps = 100                                               # by default
    T = 1000                                                  # noise levels

    @classmethod
    def alpha(cls, level):                                    # tensor of levels -> a_level: a_0 = 1 ... a_T ~ 0
        angle = (level / cls.T + .008) / 1.008 * math.pi / 2
        return (angle.cos() / math.cos(.008 / 1.008 * math.pi / 2)).square().clamp_min(1e-5)

    @classmethod
    def loss(cls, net, x, z):
        i = torch.randint(1, cls.T + 1, (len(x),), device=x.device)
        noise, a = torch.randn_like(x), rearrange(cls.alpha(i), "k -> k 1")
        return F.mse_loss(net(a.sqrt() * x + (1 - a).sqrt() * noise, 1 - i / cls.T, z), noise)

    @classmethod
    def sample(cls, net, z, noise, steps, strengths=(), temperature=1.):
        """Context vectors z (r k) d, noise: count -> k count c; -> tokens k c. Ancestral sampling over `steps` of the
        1000 levels; temperature scales the injected noise, not the initial noise."""
        levels = [round(cls.T * (steps - step) / steps) for step in range(steps + 1)]
        drawn = noise(steps)                                                      # k steps c
        x = drawn[:, 0]
        for step, (i, j) in enumerate(zip(levels, levels[1:])):
            a, b = cls.table[i], cls.table[j]
            t = torch.full((1,), 1 - i / cls.T, device=x.device)                  # 1
            eps = denoise(net, x, t, z, strengths)                                # k c
            clean = ((x - (1 - a) ** .5 * eps) / a ** .5).clamp(-5, 5)            # k c; not in MAR: no token is larger
            ratio = a / b                                     # posterior q(x_j | x_i, clean)
            mean = (b ** .5 * (1 - ratio) * clean + ratio ** .5 * (1 - b) * x) / (1 - a)
            fresh = drawn[:, (step + 1) % steps]              # the last step adds none: there 1 - b is 0
            x = mean + temperature * ((1 - ratio) * (1 - b) / (1 - a)) ** .5 * fresh
        return x


DDPM.table = DDPM.alpha(torch.arange(DDPM.T + 1, dtype=torch.float64)).tolist()       # for sampling, on the host
DENOISERS = {"flow": Flow, "ddpm": DDPM}


# ---------------------------------------------------------------------------- MAE

class Backbone(nn.Module):
    def __init__(self, tokens, channels, widths, dim, encoder, decoder, heads, queries, head_dim, head_depth,
                 denoiser="flow"):
        super().__init__()
        self.tokens, self.channels, self.dim, self.denoiser = tokens, channels, dim, DENOISERS[denoiser]
        self.prefix = Prefix(queries, dim, heads, widths)
        self.token = nn.Linear(channels, dim)
        self.pos_embed_in = nn.Parameter(torch.randn(tokens, dim) * .02)          # of the encoder
        self.pos_embed_out = nn.Parameter(torch.randn(queries + tokens, dim) * .02)         # of the decoder
        self.mask_token = nn.Parameter(torch.randn(dim) * .02)                    # stands for an unknown token
        self.encoder = nn.ModuleList(Block(dim, heads) for _ in range(encoder))
        self.decoder = nn.ModuleList(Block(dim, heads) for _ in range(decoder))
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.net = DenoiseNet(channels, dim, head_dim, head_depth)

    def contexts(self, prefix, mask, x, order, known, rows):
        """The MAE: prefix tokens b p d, their mask b p, shape tokens x b n c, order b n (its first `known` entries are
        known tokens) -> context vectors z_i of the tokens `rows` (b m): b m d."""
        (b, p, d), n = prefix.shape, self.tokens

        index = repeat(order[:, :known], "b k -> b k d", d=d)                     # b k d
        y = (self.token(x) + self.pos_embed_in).gather(1, index)                  # b k d
        y = torch.cat([prefix, y], 1)                                             # b (p + k) d
        mask_in = F.pad(mask, (0, known), value=True)                             # b (p + k)
        for block in self.encoder:                                                # prefix and known tokens
            y = block(y, mask=mask_in)
        y = self.norm_in(y)

        full = repeat(self.mask_token, "d -> b n d", b=b, n=n).to(y.dtype)
        full = full.scatter(1, index, y[:, p:])                                   # b n d
        position = F.pad(self.pos_embed_out, (0, 0, p + n - len(self.pos_embed_out), 0))    # (p + n) d; condition: 0
        y = torch.cat([y[:, :p], full], 1) + position                             # b (p + n) d
        mask_out = F.pad(mask, (0, n), value=True)                                # b (p + n)
        for block in self.decoder[:-1]:                                           # prefix, known and mask tokens
            y = block(y, mask=mask_out)
        y = self.decoder[-1](y, mask=mask_out, rows=p + rows)                     # b m d
        return self.norm_out(y)

    def loss(self, x, condition, known):                      # unit 3
        """x: b n c shape tokens; condition (prefix.py); known: how many tokens are not masked -> the diffusion loss of
        the masked tokens. The number is the same for the whole batch: no padding."""
        order = torch.rand(len(x), self.tokens, device=x.device).argsort(1)       # b n
        masked = order[:, known:]                                                 # b m

        prefix, mask = self.prefix(condition)                                     # b p d, b p
        z = self.contexts(prefix, mask, x, order, known, masked)                  # b m d
        x = x.gather(1, repeat(masked, "b m -> b m c", c=self.channels))          # b m c
        z = repeat(z, "b m d -> (draws b m) d", draws=DRAWS)
        x = repeat(x, "b m c -> (draws b m) c", draws=DRAWS)
        return self.denoiser.loss(self.net, x, z)

    @torch.no_grad()
    def generate(self, condition, keys, steps=10, denoise_steps=None, cfg=2., temperature=1., rgs=None, window=.47,
                 rounds=0, cool=1., watch=lambda *_: None):
        """condition (prefix.py) and one key per sample (engine/noise.py) -> shape tokens b n c.
        rgs: a rule of reconstruct.py; in the first `window` of the steps (paper: 30 of 64) the MAE encodes rgs(x).
        rounds: none in pictures of training; sample.py has one. cool: factor of their temperature.
        watch: a function of what is known after each step."""
        b, n, c, denoise_steps = len(keys), self.tokens, self.channels, denoise_steps or self.denoiser.steps
        condition, strengths = split_condition(condition, cfg)
        prefix, mask = self.prefix(condition)                                     # (r b) p d, (r b) p
        rgs_steps = math.ceil(window * steps) if rgs else 0

        x = torch.zeros(b, n, c, device=keys.device)                              # b n c, unknown tokens are 0
        for step, (order, known, after) in enumerate(unmasking_steps(n, keys, steps, rounds)):
            new = order[:, known:after]                                           # b m, the tokens of this step
            encoded = rgs(x) if step < rgs_steps else x                           # b n c, what the MAE encodes
            ramped = ramp(strengths, known, n) if known else []                   # first step: branch 0 alone
            r = len(ramped) + 1

            # MAE: z_i = f(prefix, known tokens), in all r branches
            inputs, orders, rows = (repeat(y, "b ... -> (r b) ...", r=r) for y in (encoded, order, new))
            z = self.contexts(prefix[:r * b], mask[:r * b], inputs, orders, known, rows)          # (r b) m d
            z = rearrange(z, "rb m d -> (rb m) d")

            # DenoiseNet: x_i ~ p(x_i | z_i), guided by the r branches
            noise = lambda count: normal(keys, 1 + step, (after - known, count, c)).flatten(0, 1)     # (b m) count c
            cooled = temperature * (cool if step >= steps else 1)
            sample = self.denoiser.sample(self.net, z, noise, denoise_steps, ramped, cooled)
            index = repeat(new, "b m -> b m c", c=c)
            x = x.scatter(1, index, rearrange(sample, "(b m) c -> b m c", b=b))   # b n c
            watch(x, order, known, after)
        return x


BACKBONES = {"mae": Backbone}                                 # the choices of --variant; research/peers.py adds others


def cache_sized(backbone, condition, keys):
    """Splits a batch into chunks whose activations fit a CPU's cache, a fifth faster: pairs of condition and keys."""
    size = max(1, CACHED // (backbone.tokens * backbone.dim * (len(condition) + 1))) if keys.is_cpu else len(keys)
    for i in range(0, len(keys), size):
        yield {kind: (x[i:i + size], mask[i:i + size]) for kind, (x, mask) in condition.items()}, keys[i:i + size]


def schedule(n, steps):                                       # unit 3
    """The cosine unmasking schedule: a list of pairs (known before, known after), at least one new token a step."""
    if not 1 <= steps <= n:
        raise UserError(f"{steps} steps are not between 1 and {n}, the number of shape tokens")
    known, pairs = 0, []
    for step in range(1, steps + 1):
        after = n - math.floor(n * math.cos(math.pi / 2 * step / steps) + 1e-9)
        after = min(max(after, known + 1), n - (steps - step))                    # at least one token for later steps
        pairs.append((known, after))
        known = after
    return pairs


def unmasking_steps(n, keys, steps, rounds):
    """(order b n, known, after): the tokens order[:, known:after] are sampled, given the first `known` ones. After the
    schedule, each round resamples all tokens, one of GROUPS groups at a time, given the others (Gibbs sampling; not in
    the paper): tokens that were sampled early, or in one step, do not agree."""
    order = bits(keys, 0, (n,)).argsort(1)                                        # a permutation for each sample
    for known, after in schedule(n, steps):
        yield order, known, after

    ends = sorted({n * i // GROUPS for i in range(GROUPS + 1)})                   # a set: n may be less than GROUPS
    for i in range(rounds):
        order = bits(keys, -1 - i, (n,)).argsort(1)
        for start, end in pairwise(ends):
            yield order.roll(-end, 1), n - (end - start), n   # this group is last


def known_counts(n, count=16, power=1.5):                     # unit 3
    """How many of n tokens are known at a share ((i + .5) / count)^power of generation. A power above 1: early steps,
    when the prompt decides most, come more often. (MAR's mask ratio is at least .7: it never trains on late steps.)"""
    return [n - math.ceil(n * math.cos(math.pi / 2 * ((i + .5) / count) ** power)) for i in range(count)]


load = partial(load_stage, stage="backbone", kind=Backbone, variants=BACKBONES)           # frozen


# ---------------------------------------------------------------------------- stage: data, model, training, save

def train(run):
    """Prefix, masked autoencoder and DenoiseNet, on frozen tokens and frozen encoders."""
    # data
    towers, sizes, draw_batch = encoders.prompted_tokens(run, "backbone", tokenizer.load(run.folder))
    decoders = load_heads(run.folder, run.joint, run.device)

    # model
    size = read_stage(run.source, "backbone")["settings"] if run.finetune else SIZES[run.size]
    settings = size | sizes | {"denoiser": run.denoiser}
    model = run.class_of("backbone", Backbone)(**settings)
    run.load_to_finetune("backbone", {"backbone": model}, settings)

    # training: one of 16 numbers of known tokens a step; the held-out loss is the mean over eight
    counts, held_out_counts = known_counts(model.tokens), known_counts(model.tokens, 8, 1)
    loop = Loop(run, "backbone", model, draw_batch)
    for net, (x, prompts) in loop:
        with run.autocast():
            condition = towers.encode_drawn(prompts)
        chosen = [counts[torch.randint(len(counts), ())]] if net.training else held_out_counts
        loop.step(sum(net(x, condition, known) for known in chosen) / len(chosen))
        if path := loop.picture():
            judge.save_picture(path, judge.samples(run, towers, loop.average.generate, decoders))

    # save
    metrics = judge.class_accuracy(run, towers, loop.average.generate, decoders)
    nouns = {} if towers.nouns else {"nouns": encoders.training_nouns(run.train)}
    run.finish(loop, {"backbone": loop.average}, settings=settings, metrics=metrics, **nouns)


STAGE = Stage("backbone", train, 1300, 64, 4e-3, after=("encoders", "tokenizer", "vision"),
              flags=("variant", "denoiser", "text-encoder", "image-encoder"), variants=BACKBONES)
