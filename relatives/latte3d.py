"""latte3d.py - LATTE3D (arXiv 2403.15385): one network learns text to 3D for all prompts at once, from a 2D prior.

It sees no 3D shape at its output. Its shapes are rendered from four sides, and a diffusion model of pictures
(relatives/prior.py) says what should be different; afterwards a prompt takes one forward pass:

    prompt, cloud -> Grower -> tokens -> Field: three planes -> distance and colour      stage 1, geometry
    prompt, tokens -> Grower -> tokens -> finer Planes -> colour                         stage 2, geometry is frozen
    distance, colour -> render -> pictures x, noise -> Prior -> what they should be      score distillation

The cloud is of a true shape, for ever more samples a dummy: words are enough in the end. Departures: docs/LATTE3D.md.

    python train.py --model latte3d                           # trains it
    python sample.py --model latte3d --text "a red chair"

Letters: n tokens on a grid of side^3; v = 4 views of s x s pixels; k points; a grid of s^3 cells.
"""
from functools import partial
from zlib import crc32

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from tqdm import tqdm

import judge
import tokenizer as tokenizer_
from backbone import split_condition
from engine.commands import UserError, cast_once
from engine.files import load_stage
from engine.loop import Loop
from engine.networks import BANDS, Block, fourier, grid_points
from engine.stage import Stage
from geometry.surface import TRUNCATION
from geometry.volume import gradient, look_up, paint, render
from prefix import Prefix
from relatives import prior as prior_
from relatives.vat import ToPlanes
from representations.mesh import SimplifiedSurface
from representations.sdf import SdfHead
from sample import Sampler

REPS = "sdf", "mesh"
SIZES = {"tiny": dict(dim=160, depth=5, heads=5, queries=8, side=4),
         "small": dict(dim=384, depth=10, heads=6, queries=16, side=6)}
FINER = 32, 24, 16, 12        # features of stage 2, whose finest planes are twice as fine
CELLS, RADIUS = 32, .5        # along a side of the grid that is rendered; of the sphere at the beginning
SHARP = .1, .006              # beta of the density, at the beginning and at the end
LEVEL = .012 / TRUNCATION     # distance of the surface, where a cell is half opaque at the final beta
FADE = 0., .3                 # of training: from here to there, ever more samples see the dummy cloud
NOISE = .02, (.98, .5)        # least noise, and most: at the beginning, and from .8 of training on
GUIDANCE, RESCALED = 7.5, .5  # of score distillation
SILHOUETTE, EIKONAL = .3, .05 # weights in the loss
EMPTY, REFINE = .002, .01     # mean coverage of pictures: less is a collapse; learning rate of --refine


# ---------------------------------------------------------------------------- encode: prompt and cloud -> tokens

class Grower(nn.Module):
    """The prompt and tokens, one sequence -> tokens b n d on a grid."""

    def __init__(self, tokens, channels, widths, dim, depth, heads, queries):
        super().__init__()
        self.prefix, self.token = Prefix(queries, dim, heads, widths), nn.Linear(channels, dim)
        self.dummy = nn.Parameter(torch.randn(tokens, channels))                  # the dummy cloud of stage 1
        self.pos_embed = nn.Parameter(torch.randn(tokens, dim) * .02)
        self.blocks, self.norm = nn.ModuleList(Block(dim, heads) for _ in range(depth)), nn.LayerNorm(dim)

    def forward(self, condition, tokens=None):                # b n c, by default those of the dummy cloud
        prefix, mask = self.prefix(condition)                                     # b p d, b p
        x = self.token(repeat(self.dummy, "n c -> b n c", b=len(mask)) if tokens is None else tokens) + self.pos_embed
        mask = F.pad(mask, (0, x.shape[1]), value=True)
        x = torch.cat([prefix, x], 1)
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.norm(x[:, prefix.shape[1]:])


# ---------------------------------------------------------------------------- decode: three planes -> a field

class Planes(nn.Module):
    """Tokens -> three planes of features -> outputs of a small MLP at any point. Stage 2: a colour, of finer planes."""

    def __init__(self, side, dim, outputs, features, hidden=64):
        super().__init__()
        self.planes = ToPlanes(side, dim, features)
        self.where = nn.Linear(3 + 6 * BANDS, hidden)
        self.what, self.hidden, self.out = (nn.Linear(i, o, bias=False) for i, o in (
            (sum(features), hidden), (hidden, hidden), (hidden, outputs)))
        nn.init.zeros_(self.out.weight)

    def read(self, tokens):                                   # b n d -> levels of (b 3) f s s
        return self.planes(tokens)

    def evaluate(self, levels, x):                            # points b k 3 -> b k outputs
        return self.outputs(x, self.what(self.planes.look_up(levels, x)))

    def outputs(self, x, found):                              # 1 or b k 3, b k hidden; logits, if it is a colour
        y = F.silu(self.where(fourier(x, BANDS)) + found)
        return self.out(F.silu(self.hidden(y))).float()


class Field(Planes):
    """Distance, in truncations, and colour. At the beginning a grey sphere."""
    decode = SdfHead.decode

    def __init__(self, side, dim):
        super().__init__(side, dim, outputs=4, features=(32, 24, 16))
        self.register_buffer("points", grid_points(CELLS), persistent=False)      # s^3 3

    def outputs(self, x, found):
        distance, colour = super().outputs(x, found).split([1, 3], -1)
        sphere = (x.norm(dim=-1, keepdim=True) - RADIUS) / TRUNCATION
        return torch.cat([distance + sphere, colour.sigmoid()], -1)

    def read(self, tokens):
        """Distance and colour in the cells of a grid, b 4 s s s. There, features are sums of pixels of the planes."""
        levels = [F.interpolate(level, size=(CELLS, CELLS), mode="bilinear") for level in super().read(tokens)]
        xy, yz, zx = self.what(rearrange(torch.cat(levels, 1), "(b i) f u v -> i b u v f", i=3))
        found = rearrange(xy, "b x y h -> b x y 1 h") + yz[:, None] + rearrange(zx, "b z x h -> b x 1 z h")
        y = self.outputs(self.points[None], rearrange(found, "b x y z h -> b (x y z) h"))
        return rearrange(y, "b (x y z) c -> b c x y z", x=CELLS, y=CELLS)

    def evaluate(self, grid, x):                              # points b k 3 -> b k 4
        distance, colour = look_up(grid, x).split([1, 3], 1)
        return rearrange(torch.cat([distance - LEVEL, colour], 1), "b c k -> b k c")


class Textured(nn.Module):
    """The tokens of both stages, one after another -> distance of the one, colour of the other."""
    decode = SdfHead.decode

    def __init__(self, field, texture):
        super().__init__()
        self.field, self.texture = field, texture

    def read(self, tokens):                                   # b 2n d
        return [part.read(own) for part, own in zip((self.field, self.texture), tokens.chunk(2, 1))]

    def evaluate(self, levels, x):                            # b k 3 -> b k 4
        distance, colour = self.field.evaluate(levels[0], x), self.texture.evaluate(levels[1], x)
        return torch.cat([distance[..., :1], colour.sigmoid()], -1)


# ---------------------------------------------------------------------------- loss: score distillation

@torch.no_grad()
def distilled(prior, x, condition, angles, noise, depth=None, cfg=GUIDANCE):
    """What pictures x should be: with noise (b, its share from 0 to 1), the prior finds clean pictures, guided. (Guided
    colours are too strong: half of their standard deviation, over the four views, is that without guidance.)"""
    condition, strengths = split_condition(condition, cfg)
    share = rearrange(noise, "b -> b 1 1 1 1")
    noisy = share * torch.randn_like(x) + (1 - share) * x
    found, plain = prior.guided(noisy, 1 - noise, condition, strengths, angles, depth)
    deviation = lambda y: rearrange(y.flatten(1).std(1), "b -> b 1 1 1 1")
    return RESCALED * found * deviation(plain) / deviation(found) + (1 - RESCALED) * found


def distillation(prior, x, *args, **settings):                # unit 6
    """The mean of 1/2 (x - sg(x_hat))^2. Its gradient, x - x_hat, is that of score distillation, of clean pictures."""
    return F.mse_loss(x, distilled(prior, x, *args, **settings).detach()) / 2


def annealed(progress, low, high):                            # of training: 0 before `low`, 1 after `high`
    return ((progress - low) / (high - low)).clamp(0, 1)


def faded(cloud, dummy, progress):
    """Of ever more samples, the tokens of the dummy cloud."""
    kept = torch.rand(len(cloud), 1, 1, device=progress.device) >= annealed(progress, *FADE)
    return torch.where(kept, cloud, dummy)


def draw_noise(progress, count):
    """Shares of noise, uniform; the most falls in training: from form to details."""
    least, (most, then) = NOISE
    most = most + (then - most) * annealed(progress, 0., .8)
    return least + (most - least) * torch.rand(count, device=progress.device)


class Geometry(nn.Module):
    """Stage 1: prompt and cloud -> tokens -> distance and colour."""

    def __init__(self, side, dim, **rest):
        super().__init__()
        self.grower, self.field = Grower(dim=dim, **rest), Field(side, dim)

    def loss(self, prior, condition, sides, cloud, progress):
        """L = (1 - a) L_distillation + a L_silhouette + EIKONAL (|gradient| - 1)^2, a = SILHOUETTE. sides: true
        pictures and their cameras; cloud: tokens of the true shape; progress: of training, from 0 to 1."""
        angles = sides["side_angles"]
        grid = self.field.read(self.grower(condition, faded(cloud, self.grower.dummy, progress)))
        beta = SHARP[0] * (SHARP[1] / SHARP[0]) ** progress
        x, depth = render(grid, angles, beta, torch.rand((), device=progress.device) - .5)
        teacher = distillation(prior, x, condition, angles, draw_noise(progress, len(x)))
        silhouette = F.mse_loss(depth[..., 1], sides["sides"][..., 3])
        eikonal = ((gradient(TRUNCATION * grid[:, 0]).norm(dim=1) - 1) ** 2).mean()
        logs = {"distillation": teacher, "silhouette": silhouette, "eikonal": eikonal, "coverage": depth[..., 1].mean()}
        return (1 - SILHOUETTE) * teacher + SILHOUETTE * silhouette + EIKONAL * eikonal, logs


class Texture(nn.Module):
    """Stage 2: prompt and tokens of stage 1 -> colour. One block is enough: these tokens know the form."""

    def __init__(self, channels, depth, dim, side, **rest):
        super().__init__()
        self.grower, self.texture = Grower(channels=dim, depth=1, dim=dim, **rest), Planes(side, dim, 3, FINER)

    def paint(self, tokens, grid, angles):
        """Pictures of the surface of `grid` in the colours of `tokens`, and their depth."""
        levels = self.texture.read(tokens)
        return paint(grid, angles, SHARP[1], lambda points: self.texture.evaluate(levels, points).sigmoid())

    def loss(self, prior, condition, sides, geometry, progress):
        """Score distillation of colours alone, by a prior that sees the depth. geometry: stage 1, frozen."""
        tokens = geometry.grower(condition)
        x, depth = self.paint(self.grower(condition, tokens), geometry.field.read(tokens), sides["side_angles"])
        return distillation(prior, x, condition, sides["side_angles"], draw_noise(progress, len(x)), depth), {}


# ---------------------------------------------------------------------------- stages: data, model, training, save

def unseen(record):
    """Is a combination of class and colour held out? A tenth is; of files, none."""
    return "colour" in (own := record["attributes"]) and crc32(f"{record['class']} {own['colour']}".encode()) % 10 == 0


def training_data(run, stage):
    """Frozen encoders and prior; a function that draws captions, silhouettes and cameras, and tokens of clouds."""
    prior = load_stage(run.folder, "latte3d-prior", prior_.Prior).to(run.device)
    encoder = tokenizer_.load(run.folder).to(run.device)
    tokens = {split: tokenizer_.encode(run, encoder, split) for split in (run.train, run.test)}    # shapes n c
    seen = torch.tensor([not unseen(record) for record in run.train.records], device=run.train.device)
    encoders, draw_sides = prior_.prompted_sides(run, stage, {run.train: run.train.weights * seen})

    def draw_batch(split):
        rows, captions, sides = draw_sides(split)
        return captions, sides, tokens[split][rows]

    _, n, channels = tokens[run.test].shape
    settings = dict(tokens=n, channels=channels, widths={"text": encoders.widths["text"]}, **SIZES[run.size])
    return encoders, prior, draw_batch, settings


def train_geometry(run):
    """Stage 1."""
    # data
    encoders, prior, draw_batch, settings = training_data(run, "latte3d-geometry")

    # model
    model = Geometry(**settings)
    run.load_to_finetune("latte3d-geometry", {"latte3d-geometry": model}, settings)

    # training
    loop = Loop(run, "latte3d-geometry", model, draw_batch)
    generate = lambda condition, keys: loop.average.grower(condition)
    for net, (captions, sides, cloud) in loop:
        with run.autocast():
            condition = prior_.condition_of(encoders, captions)
        loss, logs = net(prior, condition, sides, cloud, loop.progress)
        if not net.training and logs["coverage"] < EMPTY:
            raise UserError("all shapes have vanished; give a lower --lr or a larger --batch")
        loop.step(loss, logs)
        if path := loop.picture():
            judge.save_picture(path, judge.samples(run, encoders, generate, {run.joint[-1]: loop.average.field}))

    # save
    run.finish(loop, {"latte3d-geometry": loop.average}, settings=settings)


def train_texture(run):
    """Stage 2."""
    # data
    encoders, prior, draw_batch, settings = training_data(run, "latte3d-texture")
    geometry = load_geometry(run.folder).to(run.device)

    # model
    model = Texture(**settings)
    run.load_to_finetune("latte3d-texture", {"latte3d-texture": model}, settings)

    # training
    loop = Loop(run, "latte3d-texture", model, draw_batch)
    generate = lambda condition, keys: tokens_of(geometry, loop.average, condition)
    for net, (captions, sides, _) in loop:
        with run.autocast():
            condition = prior_.condition_of(encoders, captions)
        loop.step(*net(prior, condition, sides, geometry, loop.progress))
        if path := loop.picture():
            textured = Textured(geometry.field, loop.average.texture)
            judge.save_picture(path, judge.samples(run, encoders, generate, {run.joint[-1]: textured}))

    # save
    run.finish(loop, {"latte3d-texture": loop.average}, settings=settings)


def stages(ltm3d):
    """Of LTM3D the encoders and the tokenizer, for the tokens of clouds; then those of LATTE3D."""
    shared = [stage for stage in ltm3d if stage.name in ("encoders", "tokenizer", "vision", "head-sdf")]
    before = "encoders", "tokenizer", "latte3d-prior"
    geometry = Stage("latte3d-geometry", train_geometry, 4500, 8, 2e-3, before, flags=("text-encoder",),
                     kinds=(prior_.SIDES,))
    texture = geometry._replace(name="latte3d-texture", train=train_texture, steps=1000, lr=1e-3,
                                after=(*before, "latte3d-geometry"))
    return [*shared, prior_.STAGE, geometry, texture]


# ---------------------------------------------------------------------------- generate: a checkpoint folder, opened

load_geometry = partial(load_stage, stage="latte3d-geometry", kind=Geometry)
load_texture = partial(load_stage, stage="latte3d-texture", kind=Texture)


def tokens_of(geometry, texture, condition):                  # -> of both stages, b 2n d
    tokens = geometry.grower(condition)
    return torch.cat([tokens, texture.grower(condition, tokens)], 1)


@torch.enable_grad()
def refined(tokens, geometry, texture, prior, condition, cfg, steps, seed):
    """Score distillation goes on for this prompt alone, with the noise of the end of training: of the tokens of both
    stages, 1 2n d. The networks are frozen."""
    tokens = tokens.detach().float().requires_grad_()
    optimizer = torch.optim.Adam([tokens], REFINE)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in tqdm(range(steps), "refining", unit="step", leave=False):
            angles = (prior_.SHOWN + torch.rand(1, 1, 1) * torch.tensor([90., 0])).to(tokens)
            noise = draw_noise(torch.ones((), device=tokens.device), 1)
            grid = geometry.field.read(tokens.chunk(2, 1)[0])
            x, _ = render(grid, angles, SHARP[1], torch.rand(()) - .5)
            y, depth = texture.paint(tokens.chunk(2, 1)[1], grid, angles)
            loss = distillation(prior, x, condition, angles, noise, cfg=cfg)
            loss = loss + distillation(prior, y, condition, angles, noise, depth, cfg)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return tokens.detach()


class LATTE3D(Sampler):
    LAST, REPLAYED = "latte3d-texture", False        # --refine trains, which a graph cannot
    OPTIONS = {"cfg": GUIDANCE, "cfg_image": 1., "refine": 0}
    steps = prior_.steps

    def open(self):
        self.geometry, self.texture = (cast_once(load(self.folder).to(self.device), self.autocast)
                                       for load in (load_geometry, load_texture))
        self.heads = {"sdf": Textured(self.geometry.field, self.texture.texture), "mesh": SimplifiedSurface()}

    def load_heads(self, *reps):                              # `open` loaded them
        if other := {*reps} - {*REPS}:
            raise UserError(f"latte3d generates {', '.join(REPS)}, not {', '.join(sorted(other))}; give another --rep")
        return self

    def shape_tokens(self, condition, keys, refine, cfg, **_):
        tokens = tokens_of(self.geometry, self.texture, condition)
        if refine:
            prior = load_stage(self.folder, "latte3d-prior", prior_.Prior).to(self.device)
            own = [{"text": pair} for pair in zip(*(x.split(1) for x in condition["text"]))]      # of each sample
            tokens = torch.cat([refined(x, self.geometry, self.texture, prior, prompt, cfg, refine, key)
                                for x, prompt, key in zip(tokens.split(1), own, keys.tolist())])
        return tokens


Model = LATTE3D
