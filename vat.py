"""vat.py - VAT (arXiv 2412.02202): a shape becomes whole numbers, coarse to fine, and a transformer predicts them.

The opposite bet to LTM3D, whose tokens are continuous and have no order:

    shape  -> Encoder -> latents z -> Quantiser.encode -> codes of the scales 1^3, 2^3, 3^3, 4^3 ...
    codes  -> Quantiser.decode -> f, nearly z -> Decoder -> shape
    prompt -> Generator -> the codes of one scale after another

Data, towers, blocks, training loop, surfaces and exams are those of LTM3D. Departures from the paper: docs/VAT.md.

    python train.py --model vat                           # trains it
    python sample.py --model vat --text "table"
    python vat.py compress chair.glb chair.vat            # a shape in 299 bytes; decompress brings it back

A code is a whole number; it stands for a vector of the codebook. Letters: n latents of c channels, on a grid S S S; m
features; N codes, of K scales; s the side of scale k = 0 ... K - 1; v vectors of the codebook; b k: k points or keys.
"""
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

import heads as heads_
import ltm3d
from backbone import guidance_branches, guide
from engine import processes
from engine.codes import Codebook, code_use, draw_codes
from engine.commands import UserError, cast_once, command
from engine.files import load_model, load_stage, read_stage, read_weights, trained_stages
from engine.loop import fit
from engine.networks import BANDS, Block, FromCells, fourier, grid_points
from engine.state import start
from evaluation import compression, progress
from geometry.surface import TRUNCATION
from prefix import Sequence
from tokenizer import encode_set

# the image tower learns from the tokens of LTM3D's tokenizer, which is trained with a head; then come our own stages
DEFAULTS = {stage: ltm3d.DEFAULTS[stage] for stage in ("encoders", "tokenizer", "vision", "head-sdf")} | {
    "vat-latents": (1500, 32, 2e-3), "vat-codes": (4500, 16, 1e-3),
    "vat-generator": (5000, 32, 2e-3), "vat-decoder": (2500, 16, 1e-3)}
STAGES = "encoders", "tokenizer", "vision", "vat-latents", "vat-codes", "vat-decoder", "vat-generator"
SEEING, LAST, REPS, SHIPPED = {"vision", "vat-generator"}, "vat-generator", ("sdf", "mesh"), "checkpoints/vat"
SAMPLING = {"cfg": 2., "cfg_image": 2., "temperature": 1., "top_k": None, "top_p": 1.}
LONG = "1 2 3 4 4 5 5 6 7 8 9"       # 2,214 codes of 14 bits: 3.9 KB; the paper has 2,220
SIZES = {                # side, features: of two grids, n = side^3 and m = features^3; codes: v
    "tiny": dict(side=4, channels=16, codes=1024, scales="1 2 3 4 4 4", features=6, dim=128, heads=4, depth=3),
    "large": dict(side=9, channels=16, codes=16384, scales=LONG, features=14, dim=768, heads=12, depth=9)}
GENERATORS = {"tiny": dict(dim=192, depth=6, heads=6, prefix=8), "large": dict(dim=1024, depth=24, heads=16, prefix=64)}
SOFT = 1 / 64           # occupancy falls from 1 to 0 between distances -SOFT and SOFT; 1/128 of the cube's side
OCCUPANCY = SOFT / (2 * TRUNCATION)     # logit: -y / OCCUPANCY. As a weight: no steeper than the L1 of distances
LATER = .5              # factor of the temperature after scale 0: codes drawn independently have to agree
KL, COMMIT, CODEBOOK = 1e-4, .25, .2                          # the other weights in the loss; the paper's
down = F.adaptive_avg_pool3d                                  # b c S S S, s -> b c s s s
as_rows = partial(rearrange, pattern="b c x y z -> b (x y z) c")


# ---------------------------------------------------------------------------- in-context transformer

class Encoder(nn.Module):
    """Features of the surface and learnt latents, one sequence: they attend to each other. Only the latents leave."""
    points, patch = 4096, 1       # it reads 4096 points, in training half; encode_set names files by the patch

    def __init__(self, side, channels, features, dim, heads, depth, cells=4):
        super().__init__()
        self.register_buffer("place", grid_points(side), persistent=False)                        # n 3
        self.register_buffer("centre", grid_points(features), persistent=False)                   # of features, m 3
        self.point = nn.Sequential(nn.Linear(3 + 6 * BANDS + 6, dim), nn.GELU(), nn.Linear(dim, 32))
        self.feature = FromCells(features, cells, 32, dim)    # the paper has 3,072 features, of a point each
        self.latent = nn.Parameter(torch.randn(side ** 3, dim) * .02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * channels))
        nn.init.constant_(self.out[-1].bias[channels:], -5.)  # begin with little noise

    def forward(self, points, normals, colours):              # b k 3 each -> mean and log variance: b n 2c
        features = self.feature(points, self.point(torch.cat([fourier(points, BANDS), normals, colours], -1)))
        return self.out(self.mix(features)).float()

    def mix(self, features):                                  # b m d -> b n d
        x = torch.cat([features, repeat(self.latent, "n d -> b n d", b=len(features))], 1)        # b (m + n) d
        place = repeat(torch.cat([self.centre, self.place]), "n i -> b n i", b=len(features))
        for block in self.blocks:
            x = block(x, positions=(place, place))
        return x[:, features.shape[1]:]


def latents_of(posterior, sampled=False):                     # what the encoder says, b n 2c -> latents z, b n c
    mean, log_variance = posterior.chunk(2, -1)
    return mean + (log_variance / 2).exp() * torch.randn_like(mean) if sampled else mean


# ---------------------------------------------------------------------------- variational vector quantiser

class Quantiser(nn.Module):
    """Residual quantisation over scales. f_k is what the codes of scales 0 ... k - 1 say of the latents z:

        f_0 = 0       q_k = argmin_v | Down_k(z - f_k) - code_v |^2             s_k^3 codes
                      f_(k+1) = f_k + phi_k(Up(code[q_k]))                      phi_k(x) = (x + conv_k(x)) / 2
    """

    def __init__(self, side, channels, codes, scales):
        super().__init__()
        self.side, self.channels, self.scales = side, channels, [int(s) for s in scales.split()]
        self.counts = [s ** 3 for s in self.scales]           # codes of each scale
        if not all(0 < s <= side for s in self.scales):
            raise ValueError(f"scales {scales}")
        self.book = Codebook(codes, channels)
        self.phi = nn.ModuleList(nn.Conv3d(channels, channels, 3, padding=1) for _ in self.scales)

    def nothing(self, b):                                     # f_0
        return torch.zeros(b, self.channels, *[self.side] * 3, device=self.book.code.device)

    def up(self, indices, k):                                 # codes b s^3 -> what scale k adds, b c S S S
        x = rearrange(self.book(indices), "b (x y z) c -> b c x y z", x=self.scales[k], y=self.scales[k])
        x = F.interpolate(x, size=(self.side,) * 3, mode="trilinear", align_corners=False)
        with torch.autocast(x.device.type, enabled=False):    # fp32: encode and decode get the same f
            return (x + self.phi[k](x)) / 2

    def decode(self, indices):                                # codes b N -> [f_0, f_1 ... f_K], b c S S S each
        f = [self.nothing(len(indices))]
        for k, codes in enumerate(indices.split(self.counts, 1)):
            f.append(f[-1] + self.up(codes, k))
        return f

    @torch.no_grad()
    def encode(self, z):                                      # b n c -> codes b N
        z = rearrange(z.float(), "b (x y z) c -> b c x y z", x=self.side, y=self.side)
        f, indices = self.nothing(len(z)), []
        for k, s in enumerate(self.scales):
            indices.append(self.book.nearest(as_rows(down(z - f, s))))
            f = f + self.up(indices[-1], k)
        return torch.cat(indices, 1)

    def forward(self, z):
        """z b n c -> quantised b n c, loss, codes b N.

            L = mean( (f_k - sg(z))^2 + COMMIT (sg(f_k) - z)^2 )      also over k = 1 ... K; sg: stop-gradient
        """
        z, indices = z.float(), self.encode(z)
        f = torch.stack([as_rows(f) for f in self.decode(indices)[1:]])           # K b n c
        loss = F.mse_loss(f, z.detach().expand_as(f)) + COMMIT * F.mse_loss(z.expand_as(f), f.detach())
        return z + (f[-1] - z).detach(), loss, indices        # straight-through: gradients reach z unchanged


# ---------------------------------------------------------------------------- triplane decoder

class Decoder(heads_.SdfHead):
    """Latents -> three planes -> convolutions -> three mip levels, each twice as fine -> distance and colour.
    y[..., 0] is a distance in truncations; -y[..., 0] / OCCUPANCY the logit of the semi-continuous occupancy."""
    planes = True

    def __init__(self, side, channels, dim, heads, **_):
        super().__init__(side=side, channels=channels, dim=dim, heads=heads, planes=self.planes)

    def errors(self, y, batch):
        """Cross-entropy of the semi-continuous occupancy, L1 of the clipped distance, squared error of colours."""
        true = F.pad(batch["distance"], (0, y.shape[1] - batch["distance"].shape[1]))      # b k; 0 on the surface
        outside = (.5 + true / (2 * SOFT)).clamp(0, 1)
        occupancy = F.binary_cross_entropy_with_logits(y[..., 0] / OCCUPANCY, outside)
        others, logs = super().errors(y, batch)
        return OCCUPANCY * occupancy + others, logs | {"occupancy": occupancy.detach()}


class Tokenizer(nn.Module):
    Encoder, Quantiser, KL = Encoder, Quantiser, KL           # those of the variants in evaluation/vat_parts.py differ

    def __init__(self, side, channels, codes, scales, features, dim, heads, depth):
        super().__init__()
        self.encoder = self.Encoder(side, channels, features, dim, heads, depth)
        self.points, self.quantiser = self.encoder.points, self.Quantiser(side, channels, codes, scales)

    def codes(self, *cloud):                                  # b k 3 each -> codes b N
        return self.quantiser.encode(latents_of(self.encoder(*cloud)))

    def forward(self, *cloud):                                # b k 3 each -> quantised latents b n c
        return self.latents(self.codes(*cloud))

    def latents(self, indices):                               # codes b N -> b n c
        return as_rows(self.quantiser.decode(indices)[-1])

    def loss(self, decoder, cloud, samples, quantised):
        """L = reconstruction + KL D(N(mean, variance) | N(0, 1)) + CODEBOOK L_quantiser."""
        posterior = self.encoder(*cloud)                                          # b n 2c
        mean, log_variance = posterior.chunk(2, -1)
        kl = reduce(mean ** 2 + log_variance.exp() - 1 - log_variance, "b n c -> b n", "sum").mean() / 2
        z = latents_of(posterior, sampled=self.training)
        latents, loss, indices = self.quantiser(z) if quantised else (z, torch.zeros(()), None)
        total, logs = decoder.loss(latents, samples)
        logs |= {"kl": kl.detach(), "codebook": loss.detach()}
        if quantised:
            logs |= code_use(indices, len(self.quantiser.book.code))              # of this batch
        return total + self.KL * kl + CODEBOOK * loss, logs


# ---------------------------------------------------------------------------- next-scale generator

class Generator(Sequence):
    """[prefix, scale 0, scale 1 ...]: a scale attends to the prefix, earlier scales and itself. The first token is the
    pooled prompt, those of scale k > 0 are Down_k(f_k). From its tokens come the logits of all codes of a scale."""

    def __init__(self, side, channels, codes, scales, widths, dim, depth, heads, prefix):
        super().__init__(prefix, widths, dim, depth, heads)
        self.quantiser = Quantiser(side, channels, codes, scales).requires_grad_(False)           # a copy, it makes f
        self.scales, self.counts, self.token = self.quantiser.scales, self.quantiser.counts, nn.Linear(channels, dim)
        self.place = nn.Parameter(torch.randn(sum(self.counts), dim) * .02)
        self.out = nn.Linear(dim, codes)
        nn.init.zeros_(self.out.weight)

    def tokens(self, k, f, first):                            # f_k b c S S S -> b s^3 d
        place = self.place.split(self.counts)[k]
        return place + (self.token(as_rows(down(f, self.scales[k]))) if k else first)

    def loss(self, indices, condition):
        """Codes b N and their condition -> cross-entropy, and the share of codes that is guessed right."""
        prefix, shown, first, modulation = self.begin(condition)
        p, levels = prefix.shape[1], self.quantiser.decode(indices)[:-1]
        x = torch.cat([prefix, *(self.tokens(k, f, first) for k, f in enumerate(levels))], 1)     # b (p + N) d
        scale = torch.tensor([0] * p + [k for k, count in enumerate(self.counts, 1) for _ in range(count)]).to(x.device)
        shown = F.pad(shown, (0, len(scale) - p), value=True)
        mask = (scale <= scale[:, None]) & rearrange(shown, "b k -> b 1 k")                       # b q k
        logits = self.out(self.read(x, modulation, mask)[:, p:]).float()          # b N v
        right = (logits.argmax(-1) == indices).float().mean()
        return F.cross_entropy(logits.flatten(0, 1), indices.flatten()), {"right": right}

    @torch.no_grad()
    def generate(self, condition, seeds, cfg=2., top_k=None, top_p=1., temperature=1.):
        """condition (prefix.py) and one seed per sample -> latents b n c. Keys and values are kept."""
        randoms = [np.random.default_rng(seed) for seed in seeds]                 # a sample is independent of its batch
        condition, strengths = guidance_branches(condition, cfg)                  # r branches of b samples
        prefix, shown, first, modulation = self.begin(condition)
        cache, f = [None] * len(self.blocks), self.quantiser.nothing(len(seeds))
        self.read(prefix, modulation, repeat(shown, "b k -> b q k", q=prefix.shape[1]), cache)
        for k, count in enumerate(self.counts):
            x = self.tokens(k, f.repeat(len(strengths) + 1, 1, 1, 1, 1), first)   # (r b) s^3 d
            shown = F.pad(shown, (0, count), value=True)
            logits = self.out(self.read(x, modulation, repeat(shown, "b k -> b q k", q=count), cache)).float()
            logits = guide(logits, strengths)                 # b s^3 v; full strength at every scale
            f = f + self.quantiser.up(draw_codes(logits, randoms, top_k, top_p, temperature * (LATER if k else 1)), k)
        return as_rows(f)


# ---------------------------------------------------------------------------- training: data, model, loss, save

def train_tokenizer(run, stage):
    """Phase 1, "vat-latents", without the quantiser; 2, "vat-codes", with it; 3, "vat-decoder", the decoder alone."""
    if processes.world() > 1:                                 # codes are revived from the batch of one process
        raise UserError(f"{stage} learns in one process; use torchrun with --stage vat-generator alone")
    run, settings, parts = run.turned(), SIZES[run.size], {"vat-codes": Tokenizer, "vat-decoder": Decoder}
    model = nn.ModuleDict({name: run.part(name, own)(**settings) for name, own in parts.items()})
    if stage == "vat-codes" and not run.finetune:
        model.load_state_dict(read_weights(run.folder / "vat-latents.safetensors"))
    if stage == "vat-decoder":
        model["vat-codes"] = load_stage(run.folder, "vat-codes", Tokenizer, run.variants)         # frozen; z is sampled
        if (phase2 := run.folder / "vat-decoder.safetensors").is_file():
            model[stage].load_state_dict(read_weights(phase2))

    def files(model):                                         # {name of a file: what is in it}
        return dict(model) if stage == "vat-codes" else {stage: model if stage == "vat-latents" else model[stage]}
    start(run, stage, files(model), settings=settings, variant=run.variant)

    def draw(split, rng):
        rows = rng.integers(len(split), size=run.micro_batch_size(stage))
        return split.cloud(rows, Encoder.points // 2, rng), split.samples(rows, heads_.SdfHead.reads, rng)

    def loss_of(model, batch):
        return model["vat-codes"].loss(model["vat-decoder"], *batch, quantised=stage != "vat-latents")

    def held_out(model):                                      # latents of the first held-out shapes
        part = model["vat-codes"].encoder if stage == "vat-latents" else model["vat-codes"]
        x = encode_set(part, run.test, run.device, run.autocast, limit=ltm3d.JUDGED).to(run.device)
        return latents_of(x) if stage == "vat-latents" else x

    def show(model, path):
        latents = held_out(model)[:14]
        ltm3d.save_picture(path, progress.reconstructions(run, {"sdf": model["vat-decoder"]}, latents, "sdf"))

    model, seconds = fit(run, stage, model, draw, loss_of, show)
    metrics = progress.head_metrics(run, {"sdf": model["vat-decoder"]}, held_out(model), "sdf")
    run.finish(stage, seconds, files(model), settings=settings, variant=run.variant, metrics=metrics)


def train_generator(run):
    """On frozen codes and frozen encoders."""
    tokenizer, decoder = (part.to(run.device) for part in load_tokenizer(run.folder, run.variants))
    encoders, _, draw = ltm3d.tokens_and_prompts(run, "vat-generator", lambda _: tokenizer.encoder, "vat-codes")
    settings = {key: SIZES[run.size][key] for key in ("side", "channels", "codes", "scales")}
    settings |= GENERATORS[run.size] | {"widths": encoders.widths}
    model = run.part("vat-generator", Generator)(**settings)
    model.quantiser.load_state_dict(tokenizer.quantiser.state_dict())
    entries = dict(settings=settings, variant=run.variant)
    start(run, "vat-generator", {"vat-generator": model}, towers=run.encoder_names, **entries)

    def loss_of(model, batch):                                # fresh codes at each step: they are not learnt by heart
        codes = tokenizer.quantiser.encode(latents_of(batch[0], sampled=model.training))
        return model.loss(codes, encoders.encode_drawn(batch[1]))

    ltm3d.fit_generator(run, "vat-generator", model, draw, loss_of, encoders, {"sdf": decoder}, **entries)


def stages(reps):
    shared = {stage: train for stage, train in ltm3d.stages([]).items() if stage in STAGES}
    phases = {stage: partial(train_tokenizer, stage=stage) for stage in ("vat-latents", "vat-codes", "vat-decoder")}
    return shared | phases | {"vat-generator": train_generator}


# ---------------------------------------------------------------------------- sampling

def load_tokenizer(folder, variants={}):
    """-> Tokenizer and Decoder: that of phase 3, where it is done, else of phase 2."""
    tokenizer = load_stage(folder, "vat-codes", Tokenizer, variants)
    entry = read_stage(folder, "vat-decoder" if "vat-decoder" in trained_stages(folder) else "vat-codes")
    decoder = variants.get("vat-decoder", {}).get(entry.get("variant"), Decoder)
    return tokenizer, load_model(decoder, f"{folder}/vat-decoder.safetensors", **entry["settings"])


def open_tokenizer(folder, reps, device, variants={}):
    tokenizer, decoder = (part.to(device) for part in load_tokenizer(folder, variants))
    return tokenizer, {"sdf": decoder, "mesh": heads_.SimplifiedMesh()}


class VAT:
    """The stages of a checkpoint folder that sampling needs."""

    def __init__(self, folder, device, autocast, variants={}):
        self.device, self.autocast = device, autocast
        self.generator = cast_once(load_stage(folder, "vat-generator", Generator, variants).to(device), autocast)
        _, self.heads = open_tokenizer(folder, REPS, device, variants)

    def load_heads(self, *reps):                              # they are there
        if other := {*reps} - {*REPS}:
            raise UserError(f"vat makes {', '.join(REPS)}, not {', '.join(sorted(other))}; give another --rep")

    def generate(self, condition, seeds, **options):
        options = SAMPLING | options
        cfg = {"text": options.pop("cfg"), "image": options.pop("cfg_image")}
        return self.generator.generate(condition, seeds, cfg, **options)

    def decode(self, latents, rep, rng, resolution=128, points=None, faces=None):
        self.load_heads(rep)
        head = heads_.SimplifiedMesh(faces) if rep == "mesh" and faces else self.heads[rep]
        return head.decode(latents.to(self.device), self.heads, rng, self.autocast, resolution)


load, main = VAT, partial(compression.main, load_tokenizer, SHIPPED)              # main: compress, decompress

if __name__ == "__main__":
    command(main)
