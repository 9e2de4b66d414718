"""prompts/image_tower.py - stage 2: what a picture prompt becomes. An image tower that learns which shape a picture is of.

LTM3D section 4 conditions on a frozen CLIP or DINOv2. Here the tower is trained from nothing, in minutes, on pictures of
the prepared shapes from many sides, in varied light, on varied ground (prompts/picture_files.py). The cloud tower (prompts/text_tower.py) is done
and locked by then (LiT, Zhai et al. 2022), so the clouds of ALL training shapes are embedded once, and every picture has
to tell its own from all of them, not only from those of a batch. That says which shape it is, not yet what it looks like;
so a small reader (reconstruct.py), thrown away afterwards, also has to find the shape's tokens x_i in the condition tokens:

    L = mean_i -log( e^s_ii / sum_k e^s_ik ) + 10 |x_i - reader(picture_i)|^2,    s_ik = <picture_i, cloud_k> / temperature

    python train.py --rep sdf --stage vision        # trains it
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import nn

from engine.files import load_model, read_stage
from engine.networks import Block
from geometry.training_pictures import SIZE
from prompts.text_tower import POINTS

SIZES = {  # dim is also the width of a condition token
    "tiny": dict(dim=128, depth=2, heads=4),
    "small": dict(dim=256, depth=4, heads=8),
    "base": dict(dim=512, depth=8, heads=8),
    "large": dict(dim=768, depth=12, heads=12),
}
TELLING = 10     # the reader's share of the loss


class Halve(nn.Module):
    """Residual convolutions that halve the sides. Without the norm and the way around, learning takes three times as long."""

    def __init__(self, channels, out):
        super().__init__()
        self.into, self.norm, self.mix = nn.Conv2d(channels, out, 3, 2, 1), nn.GroupNorm(8, out), nn.Conv2d(out, out, 3, 1, 1)
        self.past = nn.Conv2d(channels, out, 1, 2)

    def forward(self, x):                                     # b c h w -> b o h/2 w/2
        return self.past(x) + self.mix(F.gelu(self.norm(self.into(x))))


class ImageTower(nn.Module):
    """Pictures b 3 s s -> condition tokens b t e, one for each patch of 8 x 8 pixels."""

    def __init__(self, out, dim, depth, heads):               # out: the width of a cloud's embedding
        super().__init__()
        self.width = dim
        self.stem = nn.Sequential(Halve(3, dim // 4), Halve(dim // 4, dim // 2), Halve(dim // 2, dim))
        self.place = nn.Parameter(torch.randn((SIZE // 8) ** 2, dim) * dim ** -.5)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.out = nn.Linear(dim, out, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / .07)))

    def forward(self, pictures):                              # -> b t e, unit scale
        x = rearrange(self.stem(pictures), "b e h w -> b (h w) e") + self.place
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def embed(self, seen):                                    # b t e -> b out, on the unit sphere
        return F.normalize(self.out(reduce(seen, "b t e -> b e", "mean")).float(), dim=-1)

    def loss(self, pictures, clouds, own, reader, tokens):
        """clouds: k e, of all shapes; own: b, the row of each picture's shape; tokens: b n c, of each picture's shape."""
        condition = self.condition(pictures)
        picture, error = self.embed(condition[0]), F.mse_loss(reader({"image": condition})[0], tokens)
        with torch.autocast(picture.device.type, enabled=False):
            score = picture @ clouds.T * self.scale.exp().clamp(max=100)
            loss = F.cross_entropy(score, own)
        return loss + TELLING * error, {"picture_to_cloud": (score.argmax(1) == own).float().mean(), "token_error": error.detach()}

    def condition(self, pictures):
        """b 3 s s in [0, 1] -> condition b t e, mask b t: what the prefix of the backbone reads."""
        out = self(pictures)
        return out, torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)

    @torch.no_grad()
    def tokens(self, pictures):
        return self.condition(pictures.to(self.scale.device))


# ---------------------------------------------------------------------------- training and evaluation

@torch.no_grad()
def embed_clouds(encoders, prepared, batch=128):
    """The clouds of all shapes of a prepared set: k e."""
    parts = np.array_split(np.arange(len(prepared)), -(-len(prepared) // batch))
    clouds = (prepared.cloud(rows, POINTS, np.random.default_rng(rows[0])) for rows in parts)
    return torch.cat([encoders.embed_cloud(*(x.to(encoders.scale.device) for x in cloud)).float() for cloud in clouds])


@torch.no_grad()
def retrieval(vision, encoders, prepared, count=200):
    """Does a picture of a held-out shape, from any side, find that shape's cloud? -> shares of 1."""
    clouds = embed_clouds(encoders, prepared)
    rows = np.linspace(0, len(prepared) - 1, min(count, len(prepared))).astype(int)
    pictures = prepared.pictures(rows, np.random.default_rng(0))
    picture = torch.cat([vision.embed(vision.tokens(part)[0]) for part in pictures.split(64)])
    found = (picture @ clouds[rows].T).argsort(1, descending=True).cpu() == torch.arange(len(rows))[:, None]
    return {"shapes": len(rows)} | {f"recall_at_{k}": round(found[:, :k].any(1).float().mean().item(), 4) for k in (1, 5)}


def load(folder):
    """The image tower of a checkpoint folder, frozen."""
    return load_model(ImageTower, f"{folder}/vision.safetensors", **read_stage(folder, "vision")["settings"])
