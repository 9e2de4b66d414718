"""heads.py - shape tokens -> a representation: signed distance, points, 3D Gaussians, faces.

LTM3D trains a tokenizer per representation. Here one encoder's tokens are read by four heads, and the backbone, which
makes the tokens, never knows which. A head is a class with

    kinds       which prepared arrays of data.py it learns from
    needs       other heads that it decodes with
    COUNT       how many points it makes unless told
    samples     a training batch:  (split, rows, rng) -> dict of tensors
    loss        (tokens b n c, batch) -> loss, logs
    decode      (tokens n c, heads, rng, autocast, resolution, points) -> Mesh, Cloud or Gaussians (geometry/export.py)

    python train.py --rep pc --stage head        # trains one on frozen tokens
    python evaluate.py tokenizer --rep pc        # how well it reconstructs held-out shapes
"""
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from geometry.export import Cloud, Gaussians, Mesh
from engine.commands import UserError
from engine.files import load_model, read_config, read_stage
from engine.networks import Block, fourier, grid_points, time_embedding
from geometry.light import baked
from geometry.meshes import BINS, centres, close, like_parts, parts, weld
from geometry.render import splat
from geometry.surface import TRUNCATION, chunks, extract

BANDS = 7        # finest positional wavelength 4 / 2^6 = .06, twice the cell of a 64^3 grid


class QueryDecoder(nn.Module):
    """What every head is made of: tokens -> memory once, then any number of points ask the memory."""

    def __init__(self, side, channels, dim, heads, outputs):
        super().__init__()
        self.register_buffer("anchors", grid_points(side), persistent=False)
        self.token = nn.Linear(channels, dim)
        self.place = nn.Parameter(torch.randn(side ** 3, dim) * .02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(3))
        self.point = nn.Linear(3 + 6 * BANDS, dim)
        self.cross = nn.ModuleList(Block(dim, heads, context_dim=dim, expand=2) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, outputs)

    def read(self, tokens):                                   # b n c -> memory b n d
        x = self.token(tokens) + self.place
        anchors = repeat(self.anchors, "n i -> b n i", b=len(x))
        for block in self.blocks:
            x = block(x, at=(anchors, anchors))
        return x

    def ask(self, memory, x, told=0.):                        # memory b n d, x b k 3, told b k d -> b k outputs
        anchors = repeat(self.anchors, "n i -> b n i", b=len(x))
        y = self.point(fourier(x, BANDS)) + told
        for block in self.cross:
            y = block(y, memory, at=(x, anchors))
        y = self.norm(y)
        with torch.autocast(y.device.type, enabled=False):    # a surface is where this crosses zero: fp32
            return self.out(y.float())


# ---------------------------------------------------------------------------- sdf

class SdfHead(QueryDecoder):
    """Tokens -> truncated signed distance (in units of the truncation) and colour at any point."""
    kinds, needs, COUNT = ("surface",), (), None

    def __init__(self, **size):
        super().__init__(**size, outputs=4)

    @staticmethod
    def samples(split, rows, rng):
        points, _, colours = split.cloud(rows, 128, rng)
        return split.queries(rows, 640, rng) | {"surface": points, "surface_colour": colours}

    def loss(self, tokens, batch):
        """L1 on the clipped distance at queries near and far, and at surface points, where it is 0; the squared error of colour,
        as the likeliest colour, which L1 would make, has no stripe where it is not sure how high that is."""
        x = torch.cat([batch["queries"], batch["surface"]], 1)
        y = self.ask(self.read(tokens), x)                                                # b k 4
        k = batch["queries"].shape[1]
        target = F.pad((batch["distance"] / TRUNCATION).clamp(-1, 1), (0, x.shape[1] - k))
        distance = F.l1_loss(y[..., 0], target)
        colour = F.mse_loss(y[:, k:, 1:], batch["surface_colour"])
        return distance + colour, {"distance": distance.detach(), "colour": colour.detach()}

    def decode(self, tokens, heads, rng, autocast=nullcontext, resolution=128, points=None):
        return Mesh(*extract(self, tokens, resolution, autocast))


# ---------------------------------------------------------------------------- pc

class PointHead(QueryDecoder):
    """A flow that carries noise to the surface, one point at a time: any number of points from one set of tokens.
    x_t = (1 - t) noise + t x; outputs are the velocity x - noise, and at t = 1 normal and colour."""
    kinds, needs, COUNT = ("surface",), (), 4096
    STEPS = 32       # the later, the smaller: where a point lands is decided at the end

    def __init__(self, **size):
        super().__init__(**size, outputs=9)
        dim = size["dim"]
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    @staticmethod
    def samples(split, rows, rng):
        return dict(zip(("points", "normals", "colours"), split.cloud(rows, 768, rng)))

    def loss(self, tokens, batch):
        x, ends = batch["points"], batch["points"].shape[1] // 4
        t = torch.rand(*x.shape[:2], 1, device=x.device)                                  # each point has a time of its own
        t[:, :ends] = 1
        noise = torch.randn_like(x)
        y = self.velocity(self.read(tokens), (1 - t) * noise + t * x, t[..., 0])
        flow = F.mse_loss(y[:, ends:, :3], (x - noise)[:, ends:])
        normal, colour = (F.l1_loss(y[:, :ends, i:i + 3], batch[name][:, :ends]) for i, name in ((3, "normals"), (6, "colours")))
        return flow + .2 * normal + .2 * colour, {"flow": flow.detach(), "normal": normal.detach(), "colour": colour.detach()}

    def velocity(self, memory, x, t):                         # b k 3, b k -> b k 9
        b = len(x)
        told = self.time(time_embedding(rearrange(t, "b k -> (b k)"), self.time[0].in_features))
        return self.ask(memory, x, rearrange(told, "(b k) d -> b k d", b=b))

    @torch.no_grad()
    def decode(self, tokens, heads, rng, autocast=nullcontext, resolution=None, points=COUNT):
        x = torch.from_numpy(rng.standard_normal((points, 3), np.float32)).to(tokens.device)
        with autocast():
            memory = self.read(tokens[None])

        def ask(x, t):
            with autocast():
                return torch.cat([self.velocity(memory, part[None], t.expand(1, len(part)))[0] for part in chunks(x)])

        times = 1 - torch.linspace(1, 0, self.STEPS + 1, device=x.device) ** 1.5
        for t, then in zip(times[:-1], times[1:]):
            x = x + (then - t) * ask(x, t)[:, :3]
        y = ask(x, times[-1])
        return Cloud(x.cpu().numpy(), F.normalize(y[:, 3:6], dim=-1).cpu().numpy(), y[:, 6:].clamp(0, 1).cpu().numpy())


# ---------------------------------------------------------------------------- gs

class GaussianHead(QueryDecoder):
    """Tokens and points of the surface that the sdf head makes -> one Gaussian a point; learnt from pictures."""
    kinds, needs, COUNT = ("surface", "views"), ("sdf",), 16384
    POINTS = 4096    # of a training picture; with more, each Gaussian is a little smaller: some overlap, so there are no gaps
    SIZE = .016      # standard deviation that an output of 0 means

    def __init__(self, **size):
        super().__init__(**size, outputs=14)

    @classmethod
    def samples(cls, split, rows, rng):
        points, normals, colours = split.cloud(rows, cls.POINTS, rng)
        return {"points": points, "colours": colours * baked(normals)} | split.views(rows)

    def attributes(self, memory, x):                          # b k 3 -> means, scales, rotations, opacities, colours
        offset, scale, turn, opacity, colour = self.ask(memory, x).split([3, 3, 4, 1, 3], -1)
        fewer = (self.POINTS / x.shape[1]) ** .125
        return (x + .05 * offset.tanh(), self.SIZE * fewer * scale.clamp(-3, 2).exp(), turn + torch.tensor([1., 0, 0, 0], device=x.device),
                (opacity[..., 0] + 3).sigmoid(), colour.sigmoid())

    def loss(self, tokens, batch):
        """Pictures of the Gaussians before a random plain background against the true ones; L1 on colour."""
        x = batch["points"] + .004 * torch.randn_like(batch["points"])                    # about as far as the sdf head is off
        attributes, error = self.attributes(self.read(tokens), x), 0
        for i, gaussians in enumerate(zip(*attributes)):
            background = torch.rand(3, device=x.device)
            true = batch["views"][i, ..., :3] + (1 - batch["views"][i, ..., 3:]) * background
            with torch.autocast(x.device.type, enabled=False):
                image = splat(*gaussians, *batch["angles"][i].tolist(), size=len(true), background=background)
            error = error + (image - true).abs().mean() / len(x)
        colour = F.l1_loss(attributes[-1], batch["colours"])
        return error + .2 * colour, {"picture": error.detach(), "colour": colour.detach()}

    @torch.no_grad()
    def decode(self, tokens, heads, rng, autocast=nullcontext, resolution=128, points=COUNT):
        surface = heads["sdf"].decode(tokens, heads, rng, autocast, resolution)
        x = torch.from_numpy(surface.surface(points, rng)[0]).to(tokens.device)
        with autocast():
            out = self.attributes(self.read(tokens[None]), x[None])
        means, scales, turns, opacities, colours = (y[0].float().cpu() for y in out)
        return Gaussians(*(y.numpy() for y in (means, scales, F.normalize(turns, dim=-1), opacities, colours)))


# ---------------------------------------------------------------------------- mesh

class MeshHead(nn.Module):
    """Face queries and tokens attend to each other; a query speaks of FACES faces that are neighbours in canonical order
    (geometry/meshes.py). Every coordinate is a distribution over the bins, whose logits have rank LEVELS: like coordinates are alike."""
    kinds, needs, COUNT = ("surface", "faces"), (), None
    FACES, LEVELS = 4, 24
    RATE = 4         # times the learning rate of the others: it learns fastest there (engine/loop.py)

    def __init__(self, side, channels, dim, heads):
        super().__init__()
        dim = dim * 3 // 2
        self.token, self.place = nn.Linear(channels, dim), nn.Parameter(torch.randn(side ** 3, dim) * .02)
        self.query = nn.Parameter(torch.randn(side ** 3, dim) * .5)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(6))
        self.norm = nn.LayerNorm(dim)
        self.coordinate = nn.Linear(dim, self.FACES * 9 * self.LEVELS)
        self.bins = nn.Parameter(torch.randn(self.LEVELS, BINS) * self.LEVELS ** -.5)
        self.other = nn.Linear(dim, self.FACES * 4)           # is there a face; its colour

    @staticmethod
    def samples(split, rows, rng):
        return split.faces(rows)

    def forward(self, tokens):                                # b n c -> levels b s 9 l; is there a face b s; colours b s 3
        x = self.token(tokens) + self.place
        n = x.shape[1]
        x = torch.cat([x, repeat(self.query, "q d -> b q d", b=len(x))], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, n:])
        levels = rearrange(self.coordinate(x), "b q (f i l) -> b (q f) i l", f=self.FACES, l=self.LEVELS)
        other = rearrange(self.other(x).float(), "b q (f i) -> b (q f) i", f=self.FACES)
        return levels, other[..., 0], other[..., 1:]

    def logits(self, levels):                                 # ... 9 l -> ... 9 BINS, asked for the faces that there are: half
        return (levels @ self.bins).float()

    def loss(self, tokens, batch):
        """Cross-entropy on the nine coordinates of every face and on whether there is one; L1 on colour. Tokens that are made
        may lie between two shapes, and half of each makes no mesh: so it learns to say the nearer one, on the way to another."""
        apart = torch.cdist(tokens.flatten(1), tokens.flatten(1)).fill_diagonal_(torch.inf)
        share = .45 * (4 * torch.rand(len(tokens), 1, 1, device=tokens.device) - 3).clamp(min=0)      # of one in four
        levels, there, colour = self(torch.lerp(tokens, tokens[apart.argmin(1)], share))
        true = batch["components"] >= 0                                                   # b f
        exists = F.pad(true, (0, there.shape[1] - true.shape[1]))                         # b s
        corners, colours = batch["corners"].flatten(2), batch["face_colours"]
        logits = self.logits(levels[exists])                                              # faces of all shapes, one after another
        order = like_parts(logits.detach().split(true.sum(1).tolist()), corners, batch["components"])[..., None]
        corners, colours = (x.gather(1, order.expand_as(x)) for x in (corners, colours))
        bins = F.cross_entropy(logits.flatten(0, 1), corners[true].flatten())
        face = F.binary_cross_entropy_with_logits(there, exists.float())
        paint = F.l1_loss(colour[exists], colours[true])
        return bins + face + 2 * paint, {"bins": bins.detach(), "face": face.detach(), "colour": paint.detach()}

    @torch.no_grad()
    def decode(self, tokens, heads, rng, autocast=nullcontext, resolution=None, points=None):
        with autocast():
            levels, there, colours = self(tokens[None])
            sure = there[0].sigmoid()
            some = sure > .05                                 # faces that may be there
            logits = self.logits(levels[0, some])
        share, colours, sure = logits.softmax(-1), colours[0, some].clamp(0, 1).cpu().numpy(), sure[some].cpu().numpy()
        vertices, faces, whole = weld(rearrange(share, "f (i j) bins -> f i j bins", i=3).cpu().numpy())
        # a part is there as a whole, or left out where the tokens are not sure of it: half of its faces would be debris
        part = parts(faces, len(vertices))
        kept = (np.bincount(part, sure[whole]) > .8 * np.bincount(part))[part]
        used, faces = np.unique(faces[kept], return_inverse=True)
        paint = np.repeat(colours[whole][kept], 3, 0).T                                    # a vertex has its faces' mean colour
        paint = np.stack([np.bincount(faces.ravel(), c, len(used)) for c in paint], 1) / np.bincount(faces.ravel())[:, None]
        return Mesh(centres(vertices[used]).astype(np.float32), close(faces.reshape(-1, 3)), paint.astype(np.float32), smooth=False)


HEADS = {"sdf": SdfHead, "pc": PointHead, "mesh": MeshHead, "gs": GaussianHead}


def spelling(name):
    return {"3dgs": "gs"}.get(name.lower(), name.lower())


def with_needs(reps):
    """Representations as asked for -> those to have, what others need first."""
    reps = HEADS if "all" in reps else reps
    return list(dict.fromkeys(name for rep in reps for name in (*HEADS[rep].needs, rep)))


def loss(heads, tokens, samples):
    """The sum of the heads' losses on the same tokens, each on its own samples. Several heads pull equally hard at an encoder,
    however large their losses are."""
    losses, logs = [], {}
    for rep, batch in samples.items():
        read = tokens[:len(next(iter(batch.values())))].clone()
        if read.requires_grad and len(samples) > 1:
            read.register_hook(lambda gradient: gradient / gradient.norm())
        error, parts = heads[rep].loss(read, batch)
        losses, logs = losses + [error], logs | {f"{rep} {name}": value for name, value in parts.items()}
    return sum(losses), logs


def trained(folder):
    """The stages that a checkpoint folder holds; a head is one, also when it was trained with the encoder."""
    config = read_config(folder)
    return list(dict.fromkeys([*config, *(f"head-{rep}" for rep in config.get("tokenizer", {}).get("heads", ()))]))


def load(folder, reps, device="cpu"):
    """Heads of a checkpoint folder, and those that they need, frozen: {rep: head}."""
    settings, heads = read_stage(folder, "tokenizer")["settings"], {}
    there = [name.removeprefix("head-") for name in trained(folder) if name.startswith("head-")]
    for rep in with_needs(reps):
        if rep not in there:
            raise UserError(f"{folder} has no head for {rep}, only for {', '.join(there)}; make it with: "
                            f"python train.py --rep {rep} --stage head --out {folder}")
        if f"head-{rep}" in read_config(folder):
            read_stage(folder, f"head-{rep}")                 # was it trained on these tokens?
        heads[rep] = load_model(HEADS[rep], f"{folder}/head-{rep}.safetensors", **settings).to(device)
    return heads
