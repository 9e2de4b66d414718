"""tokenizer.py - stage 1: coloured oriented surface points -> n x c shape tokens. heads.py reads them back.

LTM3D section 3.1 freezes a shape encoder and decoder and generates in between. Here shape token i
belongs to anchor a_i, a fixed point of a grid in [-1, 1]^3 (differs from the paper, whose tokens are
unordered: anchors give the backbone a canonical order and attention a sense of distance).

    points, normals, colours, b k 3 each  ->  tokens b n c, unit variance

    python train.py --rep sdf --stage tokenizer      # trains it
    python evaluate.py tokenizer --rep sdf           # how well it reconstructs held-out shapes
"""
import numpy as np
import torch
from einops import repeat
from torch import nn
from tqdm import tqdm

from engine.files import atomic_write, digest, load_model, read_stage
from engine.networks import Block, fourier, grid_points

SIZES = {  # n = side^3 tokens of c channels
    "tiny": dict(side=4, channels=16, dim=128, heads=4),
    "small": dict(side=6, channels=16, dim=256, heads=8),
    "base": dict(side=8, channels=32, dim=512, heads=8),
    "large": dict(side=10, channels=32, dim=768, heads=12),
}
NOISE = .05      # on the tokens while training: a smooth latent space without a KL weight to tune
BANDS = 7        # finest positional wavelength 4 / 2^6 = .06, twice the cell of a 64^3 grid


class Tokenizer(nn.Module):
    """The shape encoder: surface points, their normals and colours -> anchored tokens."""

    def __init__(self, side, channels, dim, heads):
        super().__init__()
        self.register_buffer("anchors", grid_points(side), persistent=False)             # n 3
        self.point = nn.Sequential(nn.Linear(3 + 6 * BANDS + 6, dim), nn.GELU(), nn.Linear(dim, dim))
        self.query = nn.Parameter(torch.randn(side ** 3, dim) * .02)
        self.cross = nn.ModuleList(Block(dim, heads, context_dim=dim) for _ in range(2))
        self.blocks = nn.ModuleList(nn.ModuleList(Block(dim, heads) for _ in range(2)) for _ in range(2))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels), nn.LayerNorm(channels, elementwise_affine=False))
        self.register_buffer("mean", torch.zeros(channels))   # of the tokens over the training set,
        self.register_buffer("std", torch.ones(channels))     # measured when stage 1 ends (standardise)

    def forward(self, points, normals, colours):              # b k 3 each
        b = len(points)
        context = self.point(torch.cat([fourier(points, BANDS), normals, colours], -1))  # b k d
        x = repeat(self.query, "n d -> b n d", b=b)
        anchors = repeat(self.anchors, "n i -> b n i", b=b)
        for cross, blocks in zip(self.cross, self.blocks):
            x = cross(x, context, positions=(anchors, points))       # bias -gamma_h |a_i - x|^2
            for block in blocks:
                x = block(x, positions=(anchors, anchors))
        tokens = (self.out(x).float() - self.mean) / self.std
        return tokens + NOISE * torch.randn_like(tokens) if self.training else tokens    # b n c


@torch.no_grad()
def standardise(tokenizer, heads, tokens):
    """Give tokens (samples b n c of the training set) zero mean and unit variance per channel; the
    heads' first layers absorb the inverse, so that their outputs do not change."""
    mean, std = tokens.mean((0, 1)), tokens.std((0, 1))
    tokenizer.mean.copy_(tokenizer.mean + tokenizer.std * mean)
    tokenizer.std.mul_(std)
    for head in heads:
        head.token.bias.add_(head.token.weight @ mean)
        head.token.weight.mul_(std)


@torch.no_grad()
def encode_set(tokenizer, split, device, autocast, weights=None, limit=None):
    """Tokens n n c of a prepared set. If the file of the weights is named, they are kept beside the set's other arrays: the
    tokenizer is frozen then, so once is enough."""
    path = split.folder / f"tokens-{digest(weights)}-{split.name}.npy" if weights and limit is None else None
    if path and path.is_file():
        return torch.from_numpy(np.load(path)).float()
    out, count = [], min(limit or len(split), len(split))
    for rows in tqdm(np.array_split(np.arange(count), -(-count // 64)), desc="tokens", unit="batch", leave=False):
        cloud = [x.to(device, non_blocking=True) for x in split.cloud(rows, 2048, np.random.default_rng(rows[0]))]
        with autocast():
            out.append(tokenizer(*cloud).float().cpu())
    tokens = torch.cat(out)
    if path:
        tokens = tokens.half()  # also now, so that a resumed run sees the same numbers
        with atomic_write(path) as part:
            np.save(part, tokens.numpy())
    return tokens.float()


def load(folder):
    """The encoder of a checkpoint folder, frozen."""
    return load_model(Tokenizer, f"{folder}/tokenizer.safetensors", **read_stage(folder, "tokenizer")["settings"])
