"""tokenizer.py - stage 1: coloured oriented surface points -> n shape tokens of c channels. heads.py decodes them.

In LTM3D (section 3.1) the shape encoder and decoder are frozen; the backbone generates tokens.
paper: tokens have no order; here: shape token i belongs to anchor a_i, a fixed point of a grid in [-1, 1]^3,
so token i has the same position in every shape, and attention has a distance bias.

    points, normals, colours, b k 3 each  ->  tokens b n c, unit variance

    python train.py --rep sdf --stage tokenizer      # trains it
    python evaluate.py tokenizer --rep sdf           # its reconstruction of held-out shapes
"""
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import repeat
from torch import nn
from tqdm import tqdm

import judge
from engine import processes
from engine.files import atomic_write, load_stage, signatures
from engine.loop import Loop, to_device
from engine.networks import BANDS, Block, BySize, fourier, from_patches, grid_points
from engine.stage import Stage

# n = side^3 tokens of c channels; patch^3 neighbours become one token. With conv, tokenizer and heads are convolutions
# on grids of conv^3 cells a token (convolutions.py).
SIZES = {
    "tiny": dict(side=4, channels=16, dim=128, heads=4),
    "mini": dict(side=6, patch=2, channels=16, dim=192, heads=6, conv=4),
    "small": dict(side=6, channels=16, dim=192, heads=6, conv=4),
    "base": dict(side=8, channels=32, dim=384, heads=6, conv=4),
    "large": dict(side=10, channels=32, dim=512, heads=8, conv=4),
}
NOISE = .05      # on the tokens in training: it makes the latent space smooth, and needs no KL weight
STAY = .3        # weight of the squared drift of tokens in fine-tuning


class Tokenizer(BySize, nn.Module):
    """The shape encoder: surface points, their normals and colours -> anchored tokens."""

    patch, points = 1, 2048                                   # points of an input; half as many in training

    def __init__(self, side, channels, dim, heads):
        super().__init__()
        self.register_buffer("anchors", grid_points(side), persistent=False)             # n 3
        self.point = nn.Sequential(nn.Linear(3 + 6 * BANDS + 6, dim), nn.GELU(), nn.Linear(dim, dim))
        self.query = nn.Parameter(torch.randn(side ** 3, dim) * .02)
        self.cross = nn.ModuleList(Block(dim, heads, context_dim=dim) for _ in range(2))
        self.blocks = nn.ModuleList(nn.ModuleList(Block(dim, heads) for _ in range(2)) for _ in range(2))
        last = nn.LayerNorm(channels, elementwise_affine=False)
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels), last)
        self.register_buffer("mean", torch.zeros(channels))   # of the tokens of the training set,
        self.register_buffer("std", torch.ones(channels))     # measured at the end of stage 1 (standardise)

    def forward(self, points, normals, colours):              # b k 3 each -> b n c
        b = len(points)
        context = self.point(torch.cat([fourier(points, BANDS), normals, colours], -1))        # b k d
        x = repeat(self.query, "n d -> b n d", b=b)                               # b n d
        anchors = repeat(self.anchors, "n i -> b n i", b=b)                       # b n 3
        for cross, blocks in zip(self.cross, self.blocks):
            x = cross(x, context, positions=(anchors, points))                    # b n d
            for block in blocks:
                x = block(x, positions=(anchors, anchors))                        # b n d
        tokens = (self.out(x).float() - self.mean) / self.std                     # b n c
        return tokens + NOISE * torch.randn_like(tokens) if self.training else tokens


@torch.no_grad()
def standardise(tokenizer, heads, tokens):                    # unit 1
    """Gives every channel of tokens b n c, a sample of the training set, mean 0 and variance 1, by the tokenizer's mean
    and std. The first layers of the heads, head.token, absorb the inverse: their outputs stay the same."""
    tokens = from_patches(tokens, tokenizer.patch)
    mean, std = tokens.mean((0, 1)), tokens.std((0, 1))       # c each
    tokenizer.mean.copy_(tokenizer.mean + tokenizer.std * mean)
    tokenizer.std.mul_(std)
    for head in heads:
        head.token.bias.add_(head.token.weight @ mean)
        head.token.weight.mul_(std)


@torch.no_grad()
def encode_set(tokenizer, split, device, autocast, signature=None, rows=None):
    """The tokens of a prepared set, or of some rows: shapes n c. signature: of a frozen tokenizer, whose tokens are
    computed once and saved beside the set."""
    path = signature and rows is None and split.folders["surface"] / f"tokens-{signature}-{split.name}.npy"
    if path and path.is_file():
        return torch.from_numpy(np.load(path)).float().to(split.device)
    rows, chunks = np.arange(len(split)) if rows is None else rows, []
    for some in tqdm(np.array_split(rows, -(-len(rows) // 64)), desc="tokens", unit="batch", leave=False):
        rng = torch.Generator(split.device).manual_seed(int(some[0]))
        cloud = [x.to(device) for x in split.cloud(some, tokenizer.points, rng)]
        with autocast():
            chunks.append(tokenizer(*cloud).float())
    tokens = torch.cat(chunks)                                # shapes n c
    if path:
        tokens = tokens.half()  # as in the file: a resumed run gets the same numbers
        with atomic_write(path) as part:
            np.save(part, tokens.cpu().numpy())
    return tokens.float().to(split.device)


def encode(run, tokenizer, split, rows=None, stage="tokenizer"):
    """The tokens of a prepared set, on its device: shapes n c. stage: that of the tokenizer, once it is trained."""
    return encode_set(tokenizer, split, run.device, run.autocast, signatures(run.folder).get(stage), rows)


load = partial(load_stage, stage="tokenizer", part=Tokenizer)        # of a checkpoint folder, frozen


# ---------------------------------------------------------------------------- stage: model, data, training, save

def head_losses(heads, tokens, samples, share=1.):
    """The sum of the heads' losses on the same tokens, each on its own samples. Gradients of several heads are scaled
    to one norm, the micro-batch's share of the batch: the tokenizer weighs all heads equally, whatever their losses."""
    losses, logs = [], {}
    for rep, batch in samples.items():
        x = tokens[:len(next(iter(batch.values())))].clone()                                  # b n c
        if x.requires_grad and len(samples) > 1:
            x.register_hook(lambda gradient: gradient * share / gradient.norm().clamp(min=1e-12))
        loss, head_logs = heads[rep].loss(x, batch)
        losses.append(loss)
        logs |= {f"{rep} {name}": value for name, value in head_logs.items()}
    return sum(losses), logs


class Autoencoder(nn.Module):
    """The tokenizer and the heads that it is trained with. share: weight of a micro-batch in the loss."""

    def __init__(self, tokenizer, heads, share=1.):
        super().__init__()
        self.tokenizer, self.heads, self.share = tokenizer, nn.ModuleDict(heads), share

    def loss(self, cloud, samples, before=None):
        """cloud: points, normals, colours; samples: {rep: those of its head}; before: with --finetune, the tokens of
        the weights at the start. Their drift is penalised: heads and backbone need few steps to adapt."""
        tokens = self.tokenizer(*cloud)                                           # b n c
        loss, logs = head_losses(self.heads, tokens, samples, self.share)
        drift = torch.zeros_like(loss) if before is None else F.mse_loss(tokens, before)
        return loss + STAY * drift, logs | {"drift": drift.detach()}

    def files(self):                                          # name of a weights file: its module
        return {"tokenizer": self.tokenizer} | {f"head-{rep}": head for rep, head in self.heads.items()}


@torch.no_grad()
def shares_of_loss(run, model, samples_of):
    """The loss of each training shape alone, over the sum of all: r. A file is measured in one position."""
    losses, model = {}, model.to(run.device)
    files = run.train.rows.tolist()
    for row in tqdm(range(len(files)), desc="loss of each shape", unit="shape", disable=processes.rank() > 0):
        if files[row] not in losses:
            torch.manual_seed(row)
            batch = to_device(samples_of(run.train, torch.tensor([row], device=run.train.device)), run.device)
            with run.autocast():
                losses[files[row]] = model.loss(*batch)[0].item()
    losses = torch.tensor([losses[number] for number in files], device=run.train.device)
    return losses / losses.sum()


def train(run):
    """The tokenizer, jointly with the heads run.joint."""
    run = run.turned()

    # model
    settings = SIZES[run.size]
    model = Autoencoder(Tokenizer(**settings), {rep: run.heads[rep](**settings) for rep in run.joint}, run.share)
    run.load_to_finetune("tokenizer", model.files(), settings)
    before = load(run.source).to(run.device) if run.finetune else None

    # data: with --finetune, training shapes are drawn in proportion to their loss at the start
    points = model.tokenizer.points // 2

    def samples_of(split, rows):
        own = {rep: rows[:run.micro_batch_size(f"head-{rep}")] for rep in run.joint}          # batch of its own stage
        return split.cloud(rows, points), {rep: split.samples(own[rep], run.heads[rep].reads) for rep in own}

    weights = shares_of_loss(run, model, samples_of).cumsum(0) if run.finetune else None

    def draw(split):
        rows = split.draw(run.micro_batch_size("tokenizer"))
        if run.finetune and split is run.train:
            share = torch.rand(len(rows), device=weights.device)
            rows = torch.searchsorted(weights, share).clamp(max=len(weights) - 1)
        return samples_of(split, rows)

    # training
    loop = Loop(run, "tokenizer", model, draw)
    for net, (cloud, samples) in loop:
        loop.step(*net(cloud, samples, before(*cloud) if run.finetune else None))
        if path := loop.picture():
            tokens = encode(run, loop.average.tokenizer, run.test, run.test.spread(14))
            judge.save_picture(path, judge.reconstructions(run, loop.average.heads, tokens, run.joint[-1]))

    # save
    encoder, heads = loop.average.tokenizer, loop.average.heads
    tokens = encode(run, encoder, run.train, run.train.spread(2000))
    standardise(encoder, heads.values(), tokens.to(run.device))
    tokens = encode(run, encoder, run.test, run.test.spread(judge.SHAPES))
    metrics = judge.head_metrics(run, heads, tokens, run.joint[-1])
    run.finish(loop, loop.average.files(), settings=settings, heads=list(run.joint), metrics=metrics)


STAGE = Stage("tokenizer", train, 1500, 32, 2e-3, flags=("tokens",))
