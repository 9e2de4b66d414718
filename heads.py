"""heads.py - shape tokens -> a representation: signed distance, points, 3D Gaussians, faces.

LTM3D trains a tokenizer for each representation. Here four heads decode the tokens of one tokenizer, and the backbone,
which generates the tokens, is independent of the head. A head is a class with

    reads       its training samples: {cloud, queries, faces or views: how many points; None: all there are}
    needs       other heads that it decodes with
    helpers     other heads that improve its decoding, where they are trained
    COUNT       default number of points; None: not a point representation
    RATE        factor of its learning rate (engine/optimizers.py); optional
    token       an nn.Linear, its first layer: tokenizer.standardise changes it
    loss        (tokens b n c, batch: what the methods of data.Prepared named in `reads` return, and `coloured`, b:
                0 for shapes without colours) -> loss, logs
    decode      (tokens n c, heads, rng, autocast, resolution, points) -> Mesh, Cloud or Gaussians (geometry/export.py)

A new head also needs an entry in HEADS, TRAINING, JUDGES (judge.py) and NAMES (geometry/page.py).

    python train.py --rep pc --stage head        # trains one on frozen tokens
    python evaluate.py tokenizer --rep pc        # how well it reconstructs held-out shapes
"""
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

import judge
import tokenizer
from engine.commands import UserError
from engine.files import load_model, read_config, read_stage, trained_stages
from engine.loop import Loop
from engine.networks import Block, BySize, QueryDecoder, flow_pair, from_patches, time_embedding
from engine.stage import Stage
from geometry.export import Cloud, Gaussians, Mesh
from geometry.meshes import BINS, bin_centres, close_holes, face_components, weld
from geometry.surface import TRUNCATION, extract, field_of, in_chunks

# ---------------------------------------------------------------------------- sdf

def rarity(colours):
    """Colours of the points of b shapes, b k 3 -> weights with mean 1, b k. The weights of the points of one colour
    have the same sum for every colour of a shape."""
    share = reduce((torch.cdist(colours, colours) < .02).float(), "b q k -> b q", "mean")
    return 1 / share / reduce(1 / share, "b k -> b 1", "mean")


class SdfHead(BySize, QueryDecoder):
    """Tokens -> truncated signed distance (in units of the truncation) and colour at any point."""
    reads, needs, helpers, COUNT = {"cloud": 256, "queries": 640}, (), (), None

    def __init__(self, **size):
        super().__init__(**size, outputs=4)

    def loss(self, tokens, batch):
        """L1 of the clipped distance, at queries and at surface points, where it is 0; there, squared error of colours
        (L1 loses stripes of uncertain height). Every colour of a shape weighs the same, so that small ones are kept."""
        x = torch.cat([batch["queries"], batch["points"]], 1)                             # b k 3
        return self.errors(self.evaluate(self.read(tokens), x), batch)                    # of b k 4

    def errors(self, y, batch):
        k = batch["queries"].shape[1]
        target = F.pad((batch["distance"] / TRUNCATION).clamp(-1, 1), (0, y.shape[1] - k))
        distance = F.l1_loss(y[..., 0], target)
        error = reduce((y[:, k:, 1:] - batch["colours"]) ** 2, "b k i -> b k", "mean")
        colour = (rarity(batch["colours"]) * batch["coloured"][:, None] * error).mean()
        return distance + colour, {"distance": distance.detach(), "colour": colour.detach()}

    def decode(self, tokens, heads, rng, autocast=nullcontext, resolution=128, points=None):
        return Mesh(*extract(self, tokens, resolution, autocast))


def onto_surface(field, x, normals):
    """Points near the surface of a field, and their normals, ... 3 each -> points on it, and its colours there."""
    for _ in range(2):
        y = field(x)                                          # ... 4
        x = x - TRUNCATION * y[..., :1] * normals
    return x, y[..., 1:].clamp(0, 1)


# ---------------------------------------------------------------------------- pc

class PointHead(BySize, QueryDecoder):
    """A flow from noise to the surface, independent for each point: any number of points from one set of tokens.
    x_t = (1 - t) noise + t x; outputs are the velocity x - noise, and at t = 1 normal and colour. Where there is an
    sdf head, two steps along the normals project the points onto its surface. Clumped points, a third, are dropped."""
    reads, needs, helpers, COUNT = {"cloud": 768}, (), ("sdf",), 4096
    STEPS = 32       # of the flow; later steps are smaller: they determine the final position

    def __init__(self, **size):
        super().__init__(**size, outputs=9)
        dim = size["dim"]
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def loss(self, tokens, batch):
        """Squared error of the velocity; L1 of normals and colours, at a quarter of the points, for which t = 1."""
        x = batch["points"]                                                               # b k 3
        final = x.shape[1] // 4
        t = torch.rand(*x.shape[:2], 1, device=x.device)                                  # b k 1, one for each point
        t[:, :final].fill_(1)
        noisy, velocity = flow_pair(x, t)                                                 # b k 3
        y = self.velocity(self.read(tokens), noisy, t[..., 0])                            # b k 9
        flow = F.mse_loss(y[:, final:, :3], velocity[:, final:])
        normal = F.l1_loss(y[:, :final, 3:6], batch["normals"][:, :final])
        colour = (batch["coloured"][:, None, None] * (y[:, :final, 6:9] - batch["colours"][:, :final]).abs()).mean()
        logs = {"flow": flow.detach(), "normal": normal.detach(), "colour": colour.detach()}
        return flow + .2 * normal + .2 * colour, logs

    def velocity(self, memory, x, t):                         # b k 3, b k -> b k 9
        time = self.time(time_embedding(rearrange(t, "b k -> (b k)"), self.time[0].in_features))
        return self.evaluate(memory, x, rearrange(time, "(b k) d -> b k d", b=len(x)))

    @torch.no_grad()
    def decode(self, tokens, heads, rng, autocast=nullcontext, resolution=None, points=COUNT):
        x = torch.from_numpy(rng.standard_normal((points * 3 // 2, 3), np.float32)).to(tokens.device)  # k 3
        with autocast():
            memory = self.read(tokens[None])                                              # 1 n d

        def outputs(x, t):                                    # k 3, a time -> k 9
            with autocast():
                return in_chunks(lambda part: self.velocity(memory, part[None], t.expand(1, len(part)))[0], x)

        times = 1 - torch.linspace(1, 0, self.STEPS + 1, device=x.device) ** 1.5
        for t, then in zip(times[:-1], times[1:]):
            x = x + (then - t) * outputs(x, t)[:, :3]                                     # k 3
        y = outputs(x, times[-1])                                                         # k 9
        normals, colours = F.normalize(y[:, 3:6], dim=-1), y[:, 6:].clamp(0, 1)
        if "sdf" in heads:
            x, _ = onto_surface(field_of(heads["sdf"], tokens, autocast), x, normals)
        from geometry.spacing import evenly  # not for all heads
        return Cloud(*evenly(points, *(y.cpu().numpy() for y in (x, normals, colours))))


# ---------------------------------------------------------------------------- gs

class GaussianHead(BySize, QueryDecoder):
    """Tokens and surface points -> a Gaussian each, of the colour of the surface. Trained on pictures."""
    POINTS = 4096    # of a training shape; more Gaussians than these are smaller, less opaque
    SIZE = .016      # standard deviation at output 0
    PAIRS = 3        # most pairs (Gaussian, tile) a Gaussian, in a training picture
    reads, needs, helpers, COUNT = {"cloud": POINTS, "views": None}, ("sdf",), (), 16384

    def __init__(self, **size):
        super().__init__(**size, outputs=11)

    def attributes(self, memory, x):                          # x b k 3 -> means, scales, rotations, opacities
        offset, scale, rotation, opacity = self.evaluate(memory, x).split([3, 3, 4, 1], -1)
        factor = (self.POINTS / x.shape[1]) ** (1 / 3)                                    # 1 / factor as many overlap
        identity = torch.eye(1, 4, device=x.device)                                       # 1 0 0 0, as a quaternion
        return (x + .05 * offset.tanh(), self.SIZE * factor * scale.clamp(-3, 2).exp(), rotation + identity,
                1 - (1 - (opacity[..., 0] + 3).sigmoid()) ** factor)

    def loss(self, tokens, batch):
        """.8 L1 + .2 (1 - SSIM) of pictures (Kerbl et al. 2023) of COUNT Gaussians, on a random plain background."""
        from geometry.metrics import ssim  # only for training
        from geometry.splat import baked_light, splats
        copies = partial(repeat, pattern="b k i -> b (k r) i", r=self.COUNT // self.POINTS)
        points, normals, colours = map(copies, (batch["points"], batch["normals"], batch["colours"]))
        noise = torch.randn_like(points)                      # .01 along the surface, .002 off it
        x = points + .01 * (noise - .8 * (noise * normals).sum(-1, keepdim=True) * normals)         # b k 3
        gaussians = *self.attributes(self.read(tokens), x), colours * baked_light(normals)
        with torch.autocast(x.device.type, enabled=False):
            image = splats(*gaussians, batch["angles"], batch["views"].shape[1], self.PAIRS * x.shape[1])
        coloured, background = rearrange(batch["coloured"], "b -> b 1 1 1"), torch.rand_like(x[:, :1, None])
        shown = [coloured * x[..., :3] + (1 - x[..., 3:]) * background for x in (image, batch["views"])]
        return .8 * F.l1_loss(*shown) + .2 * (1 - ssim(*shown)), {}                       # of b s s 3

    @torch.no_grad()
    def decode(self, tokens, heads, rng, autocast=nullcontext, resolution=128, points=COUNT):
        from geometry.spacing import evenly, gaps  # not for all heads
        from geometry.splat import baked_light
        surface = SimplifiedMesh(flat=False).decode(tokens, heads, rng, autocast, resolution)
        x, normals, colours = map(torch.from_numpy, evenly(points, *surface.surface(points * 3 // 2, rng)))       # k 3
        with autocast():
            attributes = self.attributes(self.read(tokens[None]), x[None].to(tokens.device))
        means, scales, rotations, opacities = (y[0].float().cpu() for y in attributes)
        scales = scales.maximum(.3 * torch.from_numpy(gaps(x.numpy())[0])[:, None].clamp(max=.1).float())  # no holes
        rotations, colours = F.normalize(rotations, dim=-1), colours.float() * baked_light(normals)
        return Gaussians(*(y.numpy() for y in (means, scales, rotations, opacities.clamp(min=.5), colours)))


# ---------------------------------------------------------------------------- mesh

class MeshHead(nn.Module):
    """Face queries and tokens attend to each other. A query predicts FACES faces, neighbours in canonical order
    (geometry/low_poly.py). Every coordinate is a distribution over bins; its logits have rank LEVELS, so that bins
    share weights. s face slots, l levels."""
    reads, needs, helpers, COUNT = {"faces": None}, (), (), None
    FACES, LEVELS = 4, 24
    RATE = 4         # factor of the learning rate

    def __init__(self, side, channels, dim, heads, conv=0, patch=1):              # conv: of the other heads
        super().__init__()
        self.patch, dim = patch, dim * 3 // 2
        self.token, self.place = nn.Linear(channels, dim), nn.Parameter(torch.randn(side ** 3, dim) * .02)
        self.query = nn.Parameter(torch.randn(side ** 3, dim) * .5)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(6))
        self.norm = nn.LayerNorm(dim)
        self.coordinate = nn.Linear(dim, self.FACES * 9 * self.LEVELS)
        self.bins = nn.Parameter(torch.randn(self.LEVELS, BINS) * self.LEVELS ** -.5)
        self.other = nn.Linear(dim, self.FACES * 4)           # is there a face; its colour

    def forward(self, tokens):                                # b n c -> levels b s 9 l, exists b s, colours b s 3
        x = self.token(from_patches(tokens, self.patch)) + self.place                     # b side^3 d
        x = torch.cat([x, repeat(self.query, "q d -> b q d", b=len(x))], 1)
        for block in self.blocks[:-1]:
            x = block(x)
        queries = torch.arange(len(self.place), x.shape[1], device=x.device).expand(len(x), -1)         # b q
        x = self.norm(self.blocks[-1](x, rows=queries))
        levels = rearrange(self.coordinate(x), "b q (f i l) -> b (q f) i l", f=self.FACES, l=self.LEVELS)
        other = rearrange(self.other(x).float(), "b q (f i) -> b (q f) i", f=self.FACES)
        return levels, other[..., 0], other[..., 1:]

    def logits(self, levels):                                 # ... 9 l -> ... 9 BINS; only for faces that exist
        return (levels @ self.bins).float()

    def loss(self, tokens, batch):
        """Cross-entropy of the nine coordinates of every face and of whether the face exists; L1 of its colour."""
        from geometry.low_poly import match_like_components  # only for training
        levels, exists_logit, colour = self(self.between_shapes(tokens))
        components, corners, colours = batch["components"], batch["corners"].flatten(2), batch["face_colours"]
        true, f = components >= 0, components.shape[1]                                    # b f, is there a face
        logits = self.logits(levels[:, :f])                                               # b f 9 bins
        order = match_like_components(logits, corners, components)[..., None]
        corners, colours = (x.gather(1, order.expand_as(x)) for x in (corners, colours))  # b f 9, b f 3

        corners = corners.masked_fill(~true[..., None], -1)
        bins = F.cross_entropy(logits.flatten(0, 2), corners.flatten(), ignore_index=-1)
        exists = F.pad(true, (0, exists_logit.shape[1] - f)).float()                      # b s
        face = F.binary_cross_entropy_with_logits(exists_logit, exists)
        error = (true * batch["coloured"][:, None])[..., None] * (colour[:, :f] - colours).abs()
        error = error.sum() / (3 * true.sum())
        return bins + face + 2 * error, {"bins": bins.detach(), "face": face.detach(), "colour": error.detach()}

    @staticmethod
    def between_shapes(tokens):
        """Tokens b n c; one shape in four is moved up to .45 of the way to the nearest other. Generated tokens may lie
        between two shapes, and half of each makes no mesh: the head learns to choose the nearer one."""
        apart = torch.cdist(tokens.flatten(1), tokens.flatten(1)).fill_diagonal_(torch.inf)           # b b
        share = .45 * (4 * torch.rand(len(tokens), 1, 1, device=tokens.device) - 3).clamp(min=0)      # b 1 1
        return torch.lerp(tokens, tokens[apart.argmin(1)], share)

    @torch.no_grad()
    def decode(self, tokens, heads, rng, autocast=nullcontext, resolution=None, points=None):
        # 1. predict: the faces that may exist, as distributions over bins
        with autocast():
            levels, exists_logit, colours = self(tokens[None])                            # 1 s 9 l, 1 s, 1 s 3
            exists = exists_logit[0].sigmoid()                                            # s
            chosen = exists > .05
            probability = self.logits(levels[0, chosen]).softmax(-1)                      # f 9 bins
        exists, colours = exists[chosen].cpu().numpy(), colours[0, chosen].clamp(0, 1).cpu().numpy()

        # 2. weld: corners become shared vertices; degenerate faces are removed
        vertices, faces, unfolded = weld(rearrange(probability, "f (i j) bins -> f i j bins", i=3).cpu().numpy())
        exists, colours = exists[unfolded], colours[unfolded]

        # 3. keep a component with mean existence above .8, or drop it as a whole: half a component is debris
        component = face_components(faces, len(vertices))                                 # f
        kept = (np.bincount(component, exists) > .8 * np.bincount(component))[component]

        # 4. colour: a vertex has the mean colour of its faces
        used, faces = np.unique(faces[kept], return_inverse=True)
        corner_colours = np.repeat(colours[kept], 3, 0).T                                 # 3 (f 3)
        total = np.stack([np.bincount(faces.ravel(), channel, len(used)) for channel in corner_colours], 1)
        colours = total / np.bincount(faces.ravel())[:, None]                             # v 3

        # 5. close holes of one or two missing faces
        faces = close_holes(faces.reshape(-1, 3))
        return Mesh(bin_centres(vertices[used]).astype(np.float32), faces, colours.astype(np.float32), smooth=False)


class SimplifiedMesh:
    """The surface of the sdf head with at most `count` faces. flat: low-poly, in place of a missing mesh head."""
    needs, COUNT = ("sdf",), None

    def __init__(self, count=None, flat=True):
        self.count, self.flat = count or (256 if flat else 19_000), flat

    def decode(self, tokens, heads, rng, autocast=nullcontext, resolution=128, points=None):
        mesh = heads["sdf"].decode(tokens, heads, rng, autocast, 64 if self.flat else resolution)
        surface = mesh.vertices, mesh.faces, mesh.colours
        if len(mesh.faces):
            from geometry.simplify import simplify_surface
            surface = simplify_surface(*surface, self.count, self.flat)
        return Mesh(*surface, smooth=not self.flat)


HEADS = {"sdf": SdfHead, "pc": PointHead, "mesh": MeshHead, "gs": GaussianHead}


def spelling(name):
    '''The name of a representation; "3dgs" is accepted for "gs".'''
    return {"3dgs": "gs"}.get(name.lower(), name.lower())


def with_needs(reps):
    """Representations -> these, each after the representations that it needs."""
    return list(dict.fromkeys(name for rep in reps for name in (*HEADS[rep].needs, rep)))


def load(folder, reps, device="cpu"):
    """Heads of a checkpoint folder and the heads that they need, frozen: {rep: head}."""
    settings, heads = read_stage(folder, "tokenizer")["settings"], {}
    found = [name.removeprefix("head-") for name in trained_stages(folder) if name.startswith("head-")]
    for rep in with_needs([*(name for rep in reps for name in HEADS[rep].helpers if name in found), *reps]):
        if rep == "mesh" and rep not in found:
            heads |= {"mesh": SimplifiedMesh()} | load(folder, {"sdf"} - heads.keys(), device)
            continue
        if rep not in found:
            raise UserError(f"{folder} has no head for {rep}, only for {', '.join(found)}; make it with: "
                            f"python train.py --rep {rep} --stage head --out {folder}")
        if f"head-{rep}" in read_config(folder):
            read_stage(folder, f"head-{rep}")                 # checks the weights of its tokenizer
        heads[rep] = load_model(HEADS[rep], f"{folder}/head-{rep}.safetensors", **settings).to(device)
    return heads


# ---------------------------------------------------------------------------- stage: data, model, loss, save

def train(run, rep):
    """One head on frozen tokens, with the tokenizer's noise."""
    # data
    run, stage = run.turned(), f"head-{rep}"
    encoder = tokenizer.load(run.folder).to(run.device)
    others = [*HEADS[rep].needs, *(name for name in HEADS[rep].helpers if name in run.joint)]
    needed = load(run.folder, others, run.device)             # for decoding
    tokens = {split: tokenizer.encode(run, encoder, split) for split in (run.train, run.test)}       # shapes n c
    held_out = lambda count: tokens[run.test][run.test.spread(count)]

    def draw(split):
        rows = split.draw(run.micro_batch_size(stage))
        return tokens[split][rows], split.samples(rows, HEADS[rep].reads)

    # model: a head that was trained with the tokenizer is fine-tuned
    settings = read_stage(run.folder, "tokenizer")["settings"]
    if stage in trained_stages(run.folder):
        model = load(run.folder, [rep])[rep].requires_grad_()
    else:
        model = HEADS[rep](**settings)
        run.load_to_finetune(stage, {stage: model}, settings)

    # training
    loop = Loop(run, stage, model, draw)
    for net, (x, samples) in loop:
        x = x + tokenizer.NOISE * torch.randn_like(x)
        if "sdf" in HEADS[rep].needs:                         # it is decoded on the surface of the sdf head
            with run.autocast():
                field = partial(needed["sdf"].evaluate, needed["sdf"].read(x))
                surface = onto_surface(field, samples["points"], samples["normals"])
            samples = samples | dict(zip(("points", "colours"), surface))
        loop.step(*net(x, samples))
        if path := loop.picture():
            judge.save_picture(path, judge.reconstructions(run, needed | {rep: loop.average}, held_out(14), rep))

    # save
    metrics = judge.head_metrics(run, needed | {rep: loop.average}, held_out(judge.SHAPES), rep)
    run.finish(loop, {stage: loop.average}, metrics=metrics)


TRAINING = {"sdf": (1500, 32, 2e-3), "pc": (2500, 32, 2e-3), "gs": (1700, 4, 2e-3), "mesh": (5000, 32, 2e-3)}
STAGES = [Stage(f"head-{rep}", partial(train, rep=rep), *defaults, after=("tokenizer",))
          for rep, defaults in TRAINING.items()]
