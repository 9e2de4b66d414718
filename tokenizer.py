"""tokenizer.py - coloured oriented surface points -> n shape tokens of c channels. Heads decode them.

In LTM3D (section 3.1) the shape encoder and decoder are frozen; the backbone generates tokens.
paper: tokens have no order, queries cross-attend to points; here: shape token i belongs to a cube of [-1, 1]^3, the
same in every shape, and convolutions encode the points in it and around it.

    points, normals, colours, b k 3 each  ->  tokens b n c, unit variance

    python train.py --rep sdf --stage tokenizer      # trains it
    python evaluate.py tokenizer --rep sdf           # its reconstruction of held-out shapes
"""
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

import judge
from engine import processes
from engine.files import atomic_write, load_stage, read_stage, signatures
from engine.grids import FromCells, ResConv, cell_means, from_patches, to_patches
from engine.loop import Loop, to_device
from engine.stage import Stage
from first_design import choose
from representations import REPRESENTATIONS
from representations.head import NOISE

# n = side^3 tokens of c channels, each of conv^3 cells of points; patch^3 neighbours become one token
SIZES = {
    "tiny": dict(side=6, patch=2, channels=16, dim=128, heads=4, conv=4),
    "mini": dict(side=6, patch=2, channels=16, dim=192, heads=6, conv=4),
    "small": dict(side=6, channels=16, dim=192, heads=6, conv=4),
    "base": dict(side=8, channels=32, dim=384, heads=6, conv=4),
    "large": dict(side=10, channels=32, dim=512, heads=8, conv=4),
}
STAY = .3        # weight of the squared drift of tokens in fine-tuning


class Tokenizer(nn.Module):
    """The shape encoder: surface points, their normals and colours -> means of their features in (side conv)^3 cells ->
    one token for conv^3 cells -> a convolution. It does not depend on the order of the points."""
    FEATURES, points = 32, 4096                               # points of an input; half as many in training

    def __init__(self, side, channels, dim, heads, conv, patch=1):        # heads: of the mesh head
        super().__init__()
        self.side, self.conv, self.patch = side, conv, patch
        self.point = nn.Sequential(nn.Linear(15, 64), nn.GELU(), nn.Linear(64, self.FEATURES))
        self.cells = FromCells(side, conv, self.FEATURES + 1, dim)
        self.pos_embed = nn.Parameter(torch.randn(side, side, side, dim) * .02)
        self.block, last = ResConv(dim), nn.LayerNorm(channels, elementwise_affine=False)
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels), last)
        self.register_buffer("mean", torch.zeros(channels))   # of the tokens of the training set,
        self.register_buffer("std", torch.ones(channels))     # measured after training (standardise)
        for layer in (*self.point[::2], self.cells.into):
            nn.init.normal_(layer.weight, std=2 * layer.in_features ** -.5)

    def forward(self, points, normals, colours):              # b k 3 each -> b n c
        s = self.side * self.conv                             # cells along the cube
        inside = [(points + 1) * side % 2 - 1 for side in (s, self.side)]         # in the cell, in the token's cube
        features = self.point(torch.cat([*inside, points, normals, 2 * colours - 1], -1))
        means, count = cell_means(points, features, s)                            # b s^3 f, b s^3 1
        x = self.cells(torch.cat([means, (1 + count).log() / 2], -1))             # b n d
        x = self.block(rearrange(x, "b (x y z) d -> b x y z d", x=self.side, y=self.side) + self.pos_embed)
        tokens = rearrange(self.out(x).float() - self.mean, "b x y z c -> b (x y z) c") / self.std
        return to_patches(tokens + NOISE * torch.randn_like(tokens) if self.training else tokens, self.patch)


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
    """The tokens of all rows of a prepared set, or of some: rows n c. signature: of a frozen tokenizer, whose tokens
    are computed once and saved beside the set."""
    path = signature and rows is None and split.folders["surface"] / f"tokens-{signature}-{split.name}.npy"
    if path and path.is_file():
        return torch.from_numpy(np.load(path)).float().to(split.device)
    rows, chunks = np.arange(len(split.item)) if rows is None else rows, []
    for some in tqdm(np.array_split(rows, -(-len(rows) // 64)), desc="tokens", unit="batch", leave=False):
        rng = torch.Generator(split.device).manual_seed(int(some[0]))
        cloud = [x.to(device) for x in split.cloud(some, tokenizer.points, rng)]
        with autocast():
            chunks.append(tokenizer(*cloud).float())
    tokens = torch.cat(chunks)                                # rows n c
    if path:
        tokens = tokens.half()  # as in the file: a resumed run gets the same numbers
        with atomic_write(path) as part:
            np.save(part, tokens.cpu().numpy())
    return tokens.float().to(split.device)


def encode(run, tokenizer, split, rows=None, stage="tokenizer"):
    """The tokens of a prepared set, on its device: rows n c. stage: that of the tokenizer, once it is trained."""
    return encode_set(tokenizer, split, run.device, run.autocast, signatures(run.folder).get(stage), rows)


def load(folder):
    """The tokenizer of a checkpoint folder, frozen."""
    settings = read_stage(folder, "tokenizer")["settings"]
    return load_stage(folder, "tokenizer", choose("tokenizer", Tokenizer, settings))


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
        the weights at the start. Their drift is penalised: heads and backbone need few steps to adapt. (NOISE^2 of it
        is the noise.)"""
        tokens = self.tokenizer(*cloud)                                           # b n c
        loss, logs = head_losses(self.heads, tokens, samples, self.share)
        drift = tokens.new_zeros(()) if before is None else F.mse_loss(tokens, before)
        return loss + STAY * drift, logs | {"drift": drift.detach()}

    def files(self):                                          # name of a weights file: its module
        return {"tokenizer": self.tokenizer} | {f"head-{rep}": head for rep, head in self.heads.items()}


@torch.no_grad()
def shares_of_loss(run, model, samples_of):
    """The loss of each training shape alone, over the sum of all."""
    losses, model = [], model.to(run.device)
    for row in tqdm(range(len(run.train)), desc="loss of each shape", unit="shape", disable=processes.rank() > 0):
        torch.manual_seed(row)
        batch = to_device(samples_of(run.train, torch.tensor([row], device=run.train.device)), run.device)
        with run.autocast():
            losses.append(model.loss(*batch)[0].item())
    losses = torch.tensor(losses, device=run.train.device)
    return losses / losses.sum()


def train(run):
    """The tokenizer, jointly with the heads run.joint."""
    # model
    settings = read_stage(run.source, "tokenizer")["settings"] if run.finetune else SIZES[run.size]
    heads = {rep: choose(rep, REPRESENTATIONS[rep], settings)(**settings) for rep in run.joint}
    model = Autoencoder(choose("tokenizer", Tokenizer, settings)(**settings), heads, run.share)
    run.load_to_finetune("tokenizer", model.files(), settings)
    start = load(run.source).to(run.device) if run.finetune else None

    # data: with --finetune, training shapes are drawn in proportion to their loss at the start
    points = model.tokenizer.points // 2

    def samples_of(split, rows):
        own = {rep: rows[:run.micro_batch_size(f"head-{rep}")] for rep in run.joint}          # batch of its own stage
        return split.cloud(rows, points), {rep: REPRESENTATIONS[rep].batch_of(split, own[rep]) for rep in own}

    weights = {run.train: shares_of_loss(run, model, samples_of)} if run.finetune else {}

    def draw_batch(split):
        return samples_of(split, split.draw_rows(run.micro_batch_size("tokenizer"), True, weights.get(split)))

    # training
    loop = Loop(run, "tokenizer", model, draw_batch)
    for net, (cloud, samples) in loop:
        with run.autocast():
            before = start(*cloud) if run.finetune else None
        loop.step(*net(cloud, samples, before))
        if path := loop.picture():
            tokens = encode(run, loop.average.tokenizer, run.test, run.test.spread(14))
            judge.save_picture(path, judge.reconstructions(run, loop.average.heads, tokens, run.joint[-1]))

    # save
    encoder, heads = loop.average.tokenizer, loop.average.heads
    tokens = encode(run, encoder, run.train, run.train.spread(2000, turned=True))
    standardise(encoder, heads.values(), tokens.to(run.device))
    tokens = encode(run, encoder, run.test, run.test.spread(judge.SHAPES))
    metrics = judge.head_metrics(run, heads, tokens, run.joint[-1])
    run.finish(loop, loop.average.files(), settings=settings, heads=list(run.joint), metrics=metrics)


STAGE = Stage("tokenizer", train, 750, 16, 3e-3, flags=("tokens",))
