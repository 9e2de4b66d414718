"""vat.py - VAT (arXiv 2412.02202): a shape is quantised to codes, coarse to fine; a transformer generates them.

In contrast, the tokens of LTM3D are continuous and have no order:

    shape  -> Encoder -> latents z -> Quantiser.encode -> codes of the scales 1^3, 2^3, 3^3, 4^3 ...
    codes  -> Quantiser.decode -> f, nearly z -> Decoder -> shape
    prompt -> Generator -> the codes of one scale after another

Data, towers, training loop and surfaces are those of LTM3D. Departures from the paper: docs/VAT.md.

    python train.py --model vat                           # trains it
    python sample.py --model vat --text "table"
    python -m relatives.vat compress chair.glb chair.vat  # a shape in 299 bytes; decompress decodes it

A code is the index of a vector of the codebook. Letters: n latents of c channels, on a grid S S S; m
features; N codes, of K scales; s the side of scale k = 0 ... K - 1; v vectors of the codebook; b k: k points or keys.
"""
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

import encoders as encoders_
import judge
import tokenizer as tokenizer_
from backbone import combine, split_condition
from engine import processes
from engine.commands import UserError, cast_once, command
from engine.files import load_model, load_stage, read_stage, read_weights, trained_stages
from engine.grids import FromCells, cell_means
from engine.loop import Loop
from engine.networks import BANDS, FeedForward, fourier, grid_points
from engine.stage import Stage
from first_design import FirstSdfHead, NearBlock
from geometry.surface import TRUNCATION
from relatives.codes import Codebook, code_use, draw_codes
from relatives.sequence import KVCache, Sequence
from representations.mesh import SimplifiedSurface
from sample import Sampler

REPS = "sdf", "mesh"
LONG = "1 2 3 4 4 5 5 6 7 8 9"       # 2,214 codes of 14 bits: 3.9 KB; the paper has 2,220
SIZES = {                # side, features: of two grids, n = side^3 and m = features^3; codes: v
    "tiny": dict(side=4, channels=16, codes=1024, scales="1 2 3 4 4 4", features=6, dim=128, heads=4, depth=3),
    "large": dict(side=9, channels=16, codes=16384, scales=LONG, features=14, dim=768, heads=12, depth=9)}
GENERATORS = {"tiny": dict(dim=192, depth=6, heads=6, queries=8),
              "large": dict(dim=1024, depth=24, heads=16, queries=64)}
SOFT = 1 / 64           # occupancy falls from 1 to 0 between distances -SOFT and SOFT; 1/128 of the cube's side
OCCUPANCY = SOFT / (2 * TRUNCATION)     # logit: -y / OCCUPANCY. As a weight: no steeper than the L1 of distances
LATER = .5              # factor of the temperature after scale 0: codes drawn independently have to agree
KL, COMMIT, CODEBOOK = 1e-4, .25, .2                          # the other weights in the loss; the paper's
down = F.adaptive_avg_pool3d                                  # b c S S S, s -> b c s s s
as_rows = partial(rearrange, pattern="b c x y z -> b (x y z) c")


# ---------------------------------------------------------------------------- encode: in-context transformer

class Encoder(nn.Module):
    """Features of the surface and learnt latents attend to each other, as one sequence. Returns the latents."""
    points, patch = 4096, 1       # input points, half of them in training; encode_set names files by the patch

    def __init__(self, side, channels, features, dim, heads, depth, cells=4):
        super().__init__()
        self.register_buffer("place", grid_points(side), persistent=False)                        # n 3
        self.register_buffer("centre", grid_points(features), persistent=False)                   # of features, m 3
        self.point = nn.Sequential(nn.Linear(3 + 6 * BANDS + 6, dim), nn.GELU(), nn.Linear(dim, 32))
        self.feature = FromCells(features, cells, 32, dim)    # the paper has 3,072 features, of a point each
        self.latent = nn.Parameter(torch.randn(side ** 3, dim) * .02)
        self.blocks = nn.ModuleList(NearBlock(dim, heads) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * channels))
        nn.init.constant_(self.out[-1].bias[channels:], -5.)  # begin with little noise

    def forward(self, points, normals, colours):              # b k 3 each -> mean and log variance: b n 2c
        x = self.point(torch.cat([fourier(points, BANDS), normals, colours], -1))              # b k 32
        features = self.feature(cell_means(points, x, self.feature.side * self.feature.cells)[0])      # b m d
        x = torch.cat([features, repeat(self.latent, "n d -> b n d", b=len(features))], 1)        # b (m + n) d
        place = repeat(torch.cat([self.centre, self.place]), "n i -> b n i", b=len(features))
        for block in self.blocks:
            x = block(x, positions=(place, place))
        return self.out(x[:, features.shape[1]:]).float()     # b n 2c


def latents_of(posterior, sampled=False):                     # posterior b n 2c -> latents z, b n c
    mean, log_variance = posterior.chunk(2, -1)
    return mean + (log_variance / 2).exp() * torch.randn_like(mean) if sampled else mean


# ---------------------------------------------------------------------------- encode: variational vector quantiser

class Quantiser(nn.Module):
    """Residual quantisation over scales. f_k approximates the latents z by the codes of scales 0 ... k - 1:

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
        with torch.autocast(x.device.type, enabled=False):    # encode and decode get the same f: commands.set_kernels
            return (x + self.phi[k](x)) / 2

    def decode(self, indices):                                # codes b N -> [f_0, f_1 ... f_K], b c S S S each
        f = [self.nothing(len(indices))]
        for k, codes in enumerate(indices.split(self.counts, 1)):
            f.append(f[-1] + self.up(codes, k))
        return f

    @torch.no_grad()
    def encode(self, z):                                      # unit 6
        """Latents b n c -> the codes of all scales, coarse to fine, b N; by nothing, down, book.nearest, up."""
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


# ---------------------------------------------------------------------------- decode: three planes

class ToPlanes(nn.Module):
    """side^3 tokens -> three planes (xy, yz, zx) of features, in levels of 4, 8 and 16 times the side. A cell of a
    plane is a projection of its column of tokens."""

    def __init__(self, side, dim, features=(64, 32, 16)):     # features: of each level
        super().__init__()
        self.side, self.features = side, sum(features)
        self.into = nn.ModuleList(nn.Linear(side * dim, 4 * features[0]) for _ in range(3))
        widths = features[0], *features
        self.norm = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[:-1])
        self.conv = nn.ModuleList(nn.Conv2d(width, out, 3, padding=1) for width, out in zip(widths, widths[1:]))

    def forward(self, tokens):                                # b n d -> levels of (b 3) f s s
        x = rearrange(tokens, "b (x y z) d -> b x y z d", x=self.side, y=self.side)
        columns = [rearrange(x, f"b x y z d -> {plane}") for plane in ("b x y (z d)", "b y z (x d)", "b z x (y d)")]
        x = torch.stack([into(column) for into, column in zip(self.into, columns)], 1)            # b 3 side side 4f
        x = rearrange(x, "b i u v (j k f) -> (b i) f (u j) (v k)", j=2, k=2)
        levels = []
        for norm, conv in zip(self.norm, self.conv):
            x = F.gelu(conv(F.interpolate(norm(x), scale_factor=2, mode="bilinear", align_corners=False)))
            levels.append(x)
        return levels

    def look_up(self, levels, points):
        """The features of points b k 3 in the planes of all levels: b k f, sums over the three planes."""
        x, y, z = points.float().unbind(-1)                   # b k each
        vu = torch.stack([y, x, z, y, x, z], -1)              # grid_sample: last axis first
        vu = rearrange(vu, "b k (i j) -> (b i) k 1 j", j=2)
        found = [F.grid_sample(level.float(), vu, align_corners=False, padding_mode="border") for level in levels]
        return torch.cat([reduce(x, "(b i) f k 1 -> b k f", "sum", i=3) for x in found], -1)


class Decoder(FirstSdfHead):
    """Latents -> three planes -> convolutions -> three mip levels, each twice as fine -> distance and colour.
    y[..., 0] is a distance in truncations; -y[..., 0] / OCCUPANCY the logit of the semi-continuous occupancy."""

    def __init__(self, side, channels, dim, heads, **_):
        super().__init__(side=side, channels=channels, dim=dim, heads=heads)
        del self.cross                                        # a point looks its features up, instead of attending
        self.grids = nn.ModuleList([ToPlanes(side, dim)])
        self.point = nn.Linear(3 + 6 * BANDS + self.grids[0].features, dim)
        self.feed = nn.Sequential(FeedForward(dim), FeedForward(dim))

    def read(self, tokens):                                   # b n c -> levels of (b 3) f s s
        return self.grids[0](super().read(tokens))

    def points(self, memory, x, extra):                       # b k d
        return self.feed(self.point(torch.cat([fourier(x, BANDS), self.grids[0].look_up(memory, x)], -1)) + extra)

    def errors(self, y, batch):
        """Cross-entropy of the semi-continuous occupancy, L1 of the clipped distance, squared error of colours."""
        true = F.pad(batch["distance"], (0, y.shape[1] - batch["distance"].shape[1]))      # b k; 0 on the surface
        outside = (.5 + true / (2 * SOFT)).clamp(0, 1)
        occupancy = F.binary_cross_entropy_with_logits(y[..., 0] / OCCUPANCY, outside)
        others, logs = super().errors(y, batch)
        return OCCUPANCY * occupancy + others, logs | {"occupancy": occupancy.detach()}


# ---------------------------------------------------------------------------- loss: tokenizer and decoder

class Tokenizer(nn.Module):
    def __init__(self, side, channels, codes, scales, features, dim, heads, depth):
        super().__init__()
        self.encoder = Encoder(side, channels, features, dim, heads, depth)
        self.points, self.quantiser = self.encoder.points, Quantiser(side, channels, codes, scales)

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
        latents, loss, indices = self.quantiser(z) if quantised else (z, z.new_zeros(()), None)
        total, logs = decoder.loss(latents, samples)
        logs |= {"kl": kl.detach(), "codebook": loss.detach()}
        if quantised:
            logs |= code_use(indices, len(self.quantiser.book.code))              # of this batch
        return total + KL * kl + CODEBOOK * loss, logs


# ---------------------------------------------------------------------------- loss, generate: next-scale transformer

class Generator(Sequence):
    """[prefix, scale 0, scale 1 ...]: a scale attends to the prefix, earlier scales and itself. The first token is the
    pooled prompt, those of scale k > 0 are Down_k(f_k). From its tokens come the logits of all codes of a scale."""

    def __init__(self, side, channels, codes, scales, widths, dim, depth, heads, queries):
        super().__init__(queries, widths, dim, depth, heads)
        self.quantiser = Quantiser(side, channels, codes, scales).requires_grad_(False)           # a copy, for f
        self.scales, self.counts, self.token = self.quantiser.scales, self.quantiser.counts, nn.Linear(channels, dim)
        scale = torch.tensor([k for k, count in enumerate(self.counts, 1) for _ in range(count)])
        self.register_buffer("scale", scale, persistent=False)                    # N; 0: the prefix
        self.pos_embed = nn.Parameter(torch.randn(sum(self.counts), dim) * .02)
        self.out = nn.Linear(dim, codes)
        nn.init.zeros_(self.out.weight)

    def tokens(self, k, f, first):                            # f_k b c S S S -> b s^3 d
        position = self.pos_embed.split(self.counts)[k]
        return position + (self.token(as_rows(down(f, self.scales[k]))) if k else first)

    def loss(self, indices, condition):
        """Codes b N and their condition -> cross-entropy, and the accuracy of the predicted codes."""
        prefix, valid, first, modulation = self.begin(condition)
        p, levels = prefix.shape[1], self.quantiser.decode(indices)[:-1]
        x = torch.cat([prefix, *(self.tokens(k, f, first) for k, f in enumerate(levels))], 1)     # b (p + N) d
        scale, valid = F.pad(self.scale, (p, 0)), F.pad(valid, (0, len(self.scale)), value=True)      # p + N, b (p + N)
        mask = (scale <= scale[:, None]) & rearrange(valid, "b k -> b 1 k")                       # b q k
        logits = self.out(self.read(x, modulation, mask)[:, p:]).float()          # b N v
        right = (logits.argmax(-1) == indices).float().mean()
        return F.cross_entropy(logits.flatten(0, 1), indices.flatten()), {"right": right}

    @torch.no_grad()
    def generate(self, condition, keys, cfg=2., top_k=None, top_p=1., temperature=1., watch=lambda *_: None):
        """condition (prefix.py) and one key per sample (engine/noise.py) -> latents b n c. watch: of each scale."""
        condition, strengths = split_condition(condition, cfg)                    # r branches of b samples
        r, f = len(strengths) + 1, self.quantiser.nothing(len(keys))
        cache = KVCache(self, condition, sum(self.counts))
        for k in range(len(self.scales)):
            x = self.tokens(k, f.repeat(r, 1, 1, 1, 1), cache.first)               # (r b) s^3 d
            logits = combine(self.out(cache.append(x)).float(), strengths)         # b s^3 v
            codes = draw_codes(logits, keys, k, top_k, top_p, temperature * (LATER if k else 1))              # b s^3
            f = f + self.quantiser.up(codes, k)
            watch(as_rows(f), self.scales[k])
        return as_rows(f)


# ---------------------------------------------------------------------------- stages: data, model, training, save

class Autoencoder(nn.Module):
    """Tokenizer and Decoder, which are trained together. quantised: with the quantiser."""

    def __init__(self, codes, decoder, quantised=True):
        super().__init__()
        self.codes, self.decoder, self.quantised = codes, decoder, quantised

    def loss(self, cloud, samples):
        return self.codes.loss(self.decoder, cloud, samples, self.quantised)


def train_tokenizer(run, stage, model, files, held_out_latents):
    """A phase. files: model -> {name of a weights file: module}; held_out_latents: model -> those of held-out shapes.
    """
    # data
    def draw_batch(split):
        rows = split.draw_rows(run.micro_batch_size(stage), turned=True)
        return split.cloud(rows, Encoder.points // 2), Decoder.batch_of(split, rows)

    # model
    settings = SIZES[run.size]
    run.load_to_finetune(stage, files(model), settings)

    # training
    loop = Loop(run, stage, model, draw_batch)
    for net, batch in loop:
        loop.step(*net(*batch))
        if path := loop.picture():
            heads, latents = {"sdf": loop.average.decoder}, held_out_latents(loop.average)
            judge.save_picture(path, judge.reconstructions(run, heads, latents[:14], "sdf"))

    # save
    metrics = judge.head_metrics(run, {"sdf": loop.average.decoder}, held_out_latents(loop.average), "sdf")
    run.finish(loop, files(loop.average), settings=settings, metrics=metrics)


def new_autoencoder(run, stage, quantised=True):
    if processes.world() > 1:                                 # codes are revived from the batch of one process
        raise UserError(f"{stage} learns in one process; use torchrun with --stage vat-generator alone")
    return Autoencoder(Tokenizer(**SIZES[run.size]), Decoder(**SIZES[run.size]), quantised)


def held_out(run, encoder):
    """Outputs of `encoder` for held-out shapes."""
    rows = run.test.spread(judge.SHAPES)
    return tokenizer_.encode_set(encoder, run.test, run.device, run.autocast, rows=rows).to(run.device)


def both_files(model):
    return {"vat-codes": model.codes, "vat-decoder": model.decoder}


def train_latents(run):
    """Phase 1: encoder and decoder, without the quantiser."""
    model = new_autoencoder(run, "vat-latents", quantised=False)
    train_tokenizer(run, "vat-latents", model, lambda model: {"vat-latents": model},
                    lambda model: latents_of(held_out(run, model.codes.encoder)))


def train_codes(run):
    """Phase 2: encoder, quantiser and decoder."""
    model = new_autoencoder(run, "vat-codes")
    if not run.finetune:
        model.load_state_dict(read_weights(run.folder / "vat-latents.safetensors"))
    train_tokenizer(run, "vat-codes", model, both_files, lambda model: held_out(run, model.codes))


def train_decoder(run):
    """Phase 3: the decoder alone, on frozen codes; z is still sampled."""
    model = new_autoencoder(run, "vat-decoder")
    model.codes = load_stage(run.folder, "vat-codes", Tokenizer)
    if (phase2 := run.folder / "vat-decoder.safetensors").is_file():
        model.decoder.load_state_dict(read_weights(phase2))
    train_tokenizer(run, "vat-decoder", model, lambda model: {"vat-decoder": model.decoder},
                    lambda model: held_out(run, model.codes))


def train_generator(run):
    """On frozen codes and frozen encoders."""
    # data
    tokenizer, decoder = (part.to(run.device) for part in load_tokenizer(run.folder))
    encoders, _, draw_batch = encoders_.prompted_tokens(run, "vat-generator", tokenizer.encoder, "vat-codes")

    # model
    settings = {key: SIZES[run.size][key] for key in ("side", "channels", "codes", "scales")}
    settings |= GENERATORS[run.size] | {"widths": encoders.widths}
    model = Generator(**settings)
    model.quantiser.load_state_dict(tokenizer.quantiser.state_dict())
    run.load_to_finetune("vat-generator", {"vat-generator": model}, settings)

    # training: latents are sampled at each step, against memorisation
    loop = Loop(run, "vat-generator", model, draw_batch)
    for net, (posterior, prompts) in loop:
        with run.autocast():
            codes = tokenizer.quantiser.encode(latents_of(posterior, sampled=net.training))
            condition = encoders.encode_drawn(prompts)
        loop.step(*net(codes, condition))
        if path := loop.picture():
            judge.save_picture(path, judge.samples(run, encoders, loop.average.generate, {"sdf": decoder}))

    # save
    metrics = judge.class_accuracy(run, encoders, loop.average.generate, {"sdf": decoder})
    run.finish(loop, {"vat-generator": loop.average}, settings=settings, metrics=metrics)


def stages(ltm3d):
    """Stages of LTM3D, then those of VAT. The image tower is trained on LTM3D's shape tokens: hence its tokenizer."""
    shared = [stage for stage in ltm3d if stage.name in ("encoders", "tokenizer", "vision", "head-sdf")]
    return [*shared, Stage("vat-latents", train_latents, 1500, 32, 2e-3),
            Stage("vat-codes", train_codes, 4500, 16, 1e-3),
            Stage("vat-decoder", train_decoder, 2500, 16, 1e-3, after=("vat-codes",)),
            Stage("vat-generator", train_generator, 5000, 32, 2e-3, after=("encoders", "vision", "vat-codes"),
                  flags=("text-encoder", "image-encoder"))]


# ---------------------------------------------------------------------------- a checkpoint folder, opened

def load_tokenizer(folder):
    """-> Tokenizer and Decoder: that of phase 3, where it is done, else of phase 2."""
    tokenizer = load_stage(folder, "vat-codes", Tokenizer)
    entry = read_stage(folder, "vat-decoder" if "vat-decoder" in trained_stages(folder) else "vat-codes")
    return tokenizer, load_model(Decoder, f"{folder}/vat-decoder.safetensors", **entry["settings"])


def open_tokenizer(folder, reps, device):
    tokenizer, decoder = (part.to(device) for part in load_tokenizer(folder))
    return tokenizer, {"sdf": decoder, "mesh": SimplifiedSurface()}


class VAT(Sampler):
    LAST = "vat-generator"
    OPTIONS = {"cfg": 2., "cfg_image": 2., "temperature": 1., "top_k": None, "top_p": 1.}

    def open(self):
        self.generator = cast_once(load_stage(self.folder, "vat-generator", Generator).to(self.device), self.autocast)
        _, self.heads = open_tokenizer(self.folder, REPS, self.device)

    def load_heads(self, *reps):                              # `open` loaded them
        if other := {*reps} - {*REPS}:
            raise UserError(f"vat generates {', '.join(REPS)}, not {', '.join(sorted(other))}; give another --rep")
        return self

    def shape_tokens(self, condition, keys, **options):       # latents b n c
        return self.generator.generate(condition, keys, **options)

    def steps(self, *prompted, **options):                    # after each scale
        found = []
        self.tokens(*prompted, watch=lambda x, side: found.append((f"scale of {side}^3 codes", x[0], None)), **options)
        return found


Model = VAT


def main():
    from relatives import compression  # its command alone
    compression.main(load_tokenizer)


if __name__ == "__main__":
    command(main)
