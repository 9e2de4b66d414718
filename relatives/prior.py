"""prior.py - what LATTE3D learns from: a diffusion model of pictures of one shape from four sides.

MVDream's idea (arXiv 2308.16512), small and in pixel space: patches of all four pictures attend to each other, so the
sides agree. It generates pictures of a prompt; with the shape's depth, it paints them. It knows no 3D shape.

    python train.py --model latte3d --stage latte3d-prior
    python -m relatives.prior --text "a red chair"                       # its own samples
    python -m relatives.prior --text "a red chair" --depth chair.glb     # what it paints on a shape

Letters: v = 4 views of s x s pixels; a pixel is colour times coverage, and coverage, in [-1, 1]: 4 channels.
"""
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

import encoders as encoders_
import judge
from backbone import combine, split_condition
from engine.commands import Parser, add_device_flags, between, command, pick_device
from engine.files import load_stage, make_folder
from engine.loop import Loop
from engine.networks import time_embedding
from engine.noise import keys_of, normal
from engine.stage import Stage
from geometry import real
from geometry.kinds import Kind
from geometry.render import contact_sheet, save_png
from geometry.sample_files import file_name
from geometry.training_samples import render_flat, vertex_coloured
from geometry.volume import RIM, SIDE
from prompts.reading import find
from relatives.sequence import AdaBlock, MeanPrefix

SIZES = {"tiny": dict(patch=8, dim=160, depth=6, heads=5, queries=8),
         "small": dict(patch=4, dim=384, depth=12, heads=6, queries=16)}
DEPTH, DROPPED = .5, .1       # shares of training samples: they show their depth; they show no caption
SHOWN = torch.tensor([[[30. + 90 * i, 20] for i in range(4)]])                    # 1 v 2, cameras of pictures
DETAILS = 16                  # features of a pixel for the last convolutions
NEAREST = .05                 # the least 1 - t in the weight of the loss


def angle_features(angles):
    """Azimuth and elevation in degrees, ... 2 -> sines and cosines, ... 8."""
    azimuth, elevation = angles.deg2rad().unbind(-1)
    waves = azimuth, 2 * azimuth, 4 * azimuth, elevation
    return torch.stack([f(wave) for wave in waves for f in (torch.sin, torch.cos)], -1)


class Prior(nn.Module):
    """Noisy pictures, their time, the prompt, the cameras and, if known, the depth -> the clean pictures."""

    def __init__(self, patch, dim, depth, heads, queries, widths):
        super().__init__()
        self.patch, count = patch, (SIDE // patch) ** 2
        self.prefix = MeanPrefix(queries, dim, heads, widths)
        self.picture, self.depth = nn.Linear(4 * patch ** 2, dim), nn.Linear(2 * patch ** 2, dim)
        self.camera, self.pos_embed = nn.Linear(8, dim), nn.Parameter(torch.randn(count, dim) * .02)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.pooled = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(AdaBlock(dim, heads) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, DETAILS * patch ** 2)
        conv, silu = partial(nn.Conv2d, kernel_size=3, padding=1), nn.SiLU            # across the borders of patches
        self.details = nn.Sequential(conv(DETAILS + 6, 32), silu(), conv(32, 32), silu(), conv(32, 4))
        for layer in (self.time[-1], self.pooled):
            nn.init.zeros_(layer.weight)

    def forward(self, x, t, condition, angles, depth=None):
        """x: b v s s 4, t: b, angles: b v 2, depth: b v s s 2, depth times coverage and coverage -> b v s s 4."""
        prefix, mask, mean = self.prefix(condition)                               # b p d, b p, b 1 d
        dim = prefix.shape[-1]
        depth = x.new_zeros(*x.shape[:-1], 2) if depth is None else depth         # hidden
        patches = lambda image: rearrange(image, "b v (h i) (w j) c -> b v (h w) (i j c)", i=self.patch, j=self.patch)
        y = self.picture(patches(x)) + self.depth(patches(depth)) + self.pos_embed
        y = y + rearrange(self.camera(angle_features(angles)), "b v d -> b v 1 d")
        y = torch.cat([prefix, rearrange(y, "b v n d -> b (v n) d")], 1)          # b (p + v n) d
        modulation = self.time(time_embedding(t, dim)) + self.pooled(mean[:, 0])
        modulation = rearrange(modulation, "b (i d) -> b i d", i=6)
        mask = repeat(F.pad(mask, (0, y.shape[1] - mask.shape[1]), value=True), "b k -> b q k", q=y.shape[1])
        for block in self.blocks:
            y = block(y, modulation, mask)
        y = self.out(self.norm(y[:, prefix.shape[1]:]))
        y = rearrange(y, "b (v h w) (i j c) -> b v (h i) (w j) c", v=x.shape[1], h=SIDE // self.patch,
                      i=self.patch, j=self.patch)
        y = self.details(rearrange(torch.cat([y, x, depth], -1), "b v h w c -> (b v) c h w"))
        return rearrange(y, "(b v) c h w -> b v h w c", v=x.shape[1]).float()

    def loss(self, x, condition, angles, depth):
        """The rectified flow x_t = (1 - t) noise + t x: squared error of the velocity, (x - x_t) / (1 - t)."""
        t = torch.randn(len(x), device=x.device).sigmoid()    # logit-normal
        shown = torch.rand(len(x), device=x.device) < DEPTH
        noise, t_ = torch.randn_like(x), rearrange(t, "b -> b 1 1 1 1")
        found = self((1 - t_) * noise + t_ * x, t, condition, angles, depth * rearrange(shown, "b -> b 1 1 1 1"))
        return (((found - x) / (1 - t_).clamp(min=NEAREST)) ** 2).mean(), {"x": F.mse_loss(found, x).detach()}

    def guided(self, x, t, condition, strengths, angles, depth=None):
        """Clean pictures, guided, and those of the first branch; `condition` is that of r branches
        (backbone.split_condition)."""
        r = len(strengths) + 1
        x, t, angles = (repeat(y, "b ... -> (r b) ...", r=r) for y in (x, t, angles))
        depth = depth if depth is None else repeat(depth, "b ... -> (r b) ...", r=r)
        found = self(x, t, condition, angles, depth)
        return combine(found, strengths), found[:len(found) // r]

    @torch.no_grad()
    def generate(self, condition, keys, angles=None, depth=None, cfg=3., steps=20, temperature=.8):
        condition, strengths = split_condition(condition, cfg)
        angles = SHOWN.to(keys.device).repeat(len(keys), 1, 1) if angles is None else angles
        x, before = temperature * normal(keys, 0, (angles.shape[1], SIDE, SIDE, 4)), None
        for i in range(steps):                                # Adams-Bashforth, as Flow of backbone.py
            t = torch.full((len(x),), i / steps, device=x.device)
            v = (self.guided(x, t, condition, strengths, angles, depth)[0] - x) / (1 - i / steps)
            x, before = x + (v if before is None else 1.5 * v - .5 * before) / steps, v
        return x


def steps(model, prompts, seeds, *_, **options):
    """What the prior makes of a prompt, for the page of a LATTE3D model: its teacher."""
    prior = load_stage(model.folder, "latte3d-prior", Prior).to(model.device)
    with model.autocast():
        x = prior.generate(model.encoders.encode(prompts), keys_of(seeds, model.device))
    return [("the prior: four sides", images(x)[0], None)]


# ---------------------------------------------------------------------------- stage: data, model, training, save

def take_sides(shape, rng):
    """Pictures from four sides, 90 degrees apart: colour times coverage, coverage, depth times coverage."""
    first, elevation = rng.uniform(0, 360), rng.uniform(0, 40)
    angles = [(first + 90 * i, elevation) for i in range(4)]
    return {"sides": np.round(draw_sides(vertex_coloured(shape), angles) * 255), "side_angles": angles}


def draw_sides(mesh, angles):                                 # -> v s s 5
    return torch.stack([render_flat(*mesh, *pair, SIDE + 2 * RIM)[RIM:-RIM, RIM:-RIM] for pair in angles]).numpy()


SIDES = Kind("sides", {"sides": (np.uint8, (4, SIDE, SIDE, 5)), "side_angles": (np.float32, (4, 2))}, take_sides,
             probes=1)


def sides_of(split, rows):
    """Four pictures of each shape, b v s s 5; azimuth and elevation of their cameras, b v 2 in degrees."""
    return {"sides": split.take("sides", rows) / 255, "side_angles": split.take("side_angles", rows)}


def pictures_of(batch):
    """The same -> pictures b v s s 4 in [-1, 1], depth b v s s 2."""
    return 2 * batch["sides"][..., :4] - 1, batch["sides"][..., 3:].flip(-1)


def images(x, rows=1, scale=4):
    """Pictures b v s s 4 in [-1, 1] -> images of the four sides, on white."""
    x = (x.clamp(-1, 1) + 1) / 2
    x = (x[..., :3] + 1 - x[..., 3:]).clamp(0, 1)
    x = repeat(x, "b (i j) h w c -> b (i h k) (j w l) c", i=rows, k=scale, l=scale)
    return [*(x * 255).byte().cpu().numpy()]


def prompted_sides(run, stage, weights={}):
    """Frozen encoders, and a function that draws rows, captions and pictures from four sides. weights: {prepared set:
    sampling weights of its shapes, where they are others}."""
    encoders = encoders_.make(run.folder, run.encoder_names | {"image": None}, run.device)

    def draw_batch(split):
        rows = split.draw_rows(run.micro_batch_size(stage), weights=weights.get(split)) % len(split)  # none mirrored
        return rows, encoders.cache("text", split).take(split.table.draw_captions(rows)), sides_of(split, rows)

    return encoders, draw_batch


def condition_of(encoders, captions, dropped=0.):
    """The condition of drawn captions; this share of them is dropped."""
    net = encoders.towers["text"]
    tokens, mask = captions if "text" in encoders.pretrained else (net.text(*captions), captions[1])
    return {"text": (tokens.float(), mask & (torch.rand(len(mask), 1, device=mask.device) >= dropped))}


def train(run):
    """On frozen encoders."""
    # data
    encoders, draw_batch = prompted_sides(run, "latte3d-prior")

    # model
    settings = SIZES[run.size] | {"widths": {"text": encoders.widths["text"]}}
    model = Prior(**settings)
    run.load_to_finetune("latte3d-prior", {"latte3d-prior": model}, settings)

    # training
    loop = Loop(run, "latte3d-prior", model, draw_batch)
    prompts, keys = run.prompts[:8], keys_of(range(len(run.prompts[:8])), run.device)
    for net, (_, captions, sides) in loop:
        x, depth = pictures_of(sides)
        with run.autocast():
            condition = condition_of(encoders, captions, DROPPED if net.training else 0.)
        loop.step(*net(x, condition, sides["side_angles"], depth))
        if path := loop.picture():
            with run.autocast():
                x = loop.average.generate(encoders.encode(prompts), keys)
            judge.save_picture(path, contact_sheet(images(x), 2, prompts))

    # save
    run.finish(loop, {"latte3d-prior": loop.average}, settings=settings)


STAGE = Stage("latte3d-prior", train, 6000, 32, 1e-3, after=("encoders",), flags=("text-encoder",), kinds=(SIDES,))


# ---------------------------------------------------------------------------- the command

def depth_of(path):
    """The file of a mesh -> its depth from the four sides that are shown, 1 v s s 2."""
    sides = draw_sides(vertex_coloured(real.read_shape(path)), SHOWN[0].tolist())
    return torch.from_numpy(sides[None, ..., [4, 3]])


def main():
    parser = Parser(__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--text", required=True, help="what the pictures show, e.g. \"a red chair\"")
    flag("--depth", help="the file of a mesh, to paint it")
    flag("--n", type=between(1, 64), default=4, help="number of samples, of four pictures each")
    flag("--seed", type=between(0), default=0, help="random seed")
    flag("--cfg", type=between(0, 100, float), default=3., help="scale of classifier-free guidance; 1: none")
    flag("--checkpoint", default="checkpoints/latte3d", help="folder of trained weights")
    flag("--out", default="out", help="folder to write to")
    add_device_flags(parser)
    args = parser.parse_args()
    folder = find(args.checkpoint) or args.checkpoint
    device, autocast, _ = pick_device(args.device, args.precision)
    model = load_stage(folder, "latte3d-prior", Prior).to(device)
    encoders = encoders_.load(folder, "latte3d-prior", device)
    for warning in encoders.remarks(args.text):
        print(f"warning: {warning}", file=sys.stderr)
    depth = depth_of(args.depth).to(device).repeat(args.n, 1, 1, 1, 1) if args.depth else None
    with autocast():
        keys = keys_of([(args.seed, i) for i in range(args.n)], device)
        x = model.generate(encoders.encode([args.text] * args.n), keys, depth=depth, cfg=args.cfg)
    path = Path(make_folder(args.out)) / f"prior-{file_name(args.text, args.depth)}.png"
    save_png(path, contact_sheet(images(x), 2, [args.text] * args.n))
    print(path)


if __name__ == "__main__":
    command(main)
