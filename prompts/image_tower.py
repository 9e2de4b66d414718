"""image_tower.py - a picture prompt becomes condition tokens. The tower learns which shape a picture shows.

LTM3D section 4 conditions on a frozen CLIP or DINOv2. Here the tower is trained from nothing in minutes, on pictures of
the prepared shapes from many sides, in varied light, on varied ground (geometry/training_pictures.py). A picture has to
find its own cloud among those of a batch, and a cloud its picture (CLIP, Radford et al. 2021). The cloud tower
(prompts/text_tower.py) learns, too: what pictures show of a shape, without forgetting what captions say of it. The text
tower is frozen.

This loss teaches which shape a picture shows, not how it looks. So a reader, a linear map, also has to find the shape
tokens x_i in the condition tokens. It is thrown away after training. A batch has two pictures of every shape.

    L = mean_i [ -log( e^s_ii / sum_k e^s_ik ) / 2 - log( e^s_ii / sum_k e^s_ki ) / 2 + 10 |x_i - reader(picture_i)|^2 ]
    s_ik = <picture_i, cloud_k> / temperature

    python train.py --rep sdf --stage vision        # trains it
"""
import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import nn

from engine.files import load_stage
from engine.networks import Block
from geometry.crop import SIZE

SIZES = {  # dim is also e, the width of a condition token
    "tiny": dict(dim=128, depth=2, heads=4), "mini": dict(dim=128, depth=2, heads=4, convolutions=3),
    "small": dict(dim=256, depth=4, heads=8, convolutions=3),
    "base": dict(dim=512, depth=8, heads=8, convolutions=3), "large": dict(dim=768, depth=12, heads=12, convolutions=3),
}
READER_WEIGHT = 10    # of the reader's error in the loss
RANK = 512            # of the reader: so many directions hold 95 % of the variance of shape tokens
VIEWS = 2             # pictures of a shape in a batch; a cloud costs about as much time as a picture


class Downsample(nn.Module):
    """Residual convolutions that halve the sides. Without norm and skip connection, training takes 3 times longer."""

    def __init__(self, channels, out):
        super().__init__()
        self.into = nn.Conv2d(channels, out, 3, 2, 1)
        self.norm = nn.GroupNorm(8, out)
        self.mix = nn.Conv2d(out, out, 3, 1, 1)
        self.past = nn.Conv2d(channels, out, 1, 2)            # the skip connection

    def forward(self, x):                                     # b c h w -> b o h/2 w/2
        return self.past(x) + self.mix(F.gelu(self.norm(self.into(x))))


class ResidualConv(nn.Module):
    """Residual convolutions; at the start of training they change nothing."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.into, self.mix = (nn.Conv2d(channels, channels, 3, 1, 1) for _ in range(2))
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, x):                                     # b c h w -> b c h w
        return x + self.mix(F.gelu(self.into(F.gelu(self.norm(x)))))


class ImageTower(nn.Module):
    """Pictures b 3 s s -> condition tokens b t e, one for each patch of 16 x 16 pixels."""

    def __init__(self, out, dim, depth, heads, convolutions=0):      # out: the width of a cloud's embedding
        super().__init__()
        self.width = dim                                      # e
        widths = dim // 4, dim // 2, dim                      # 16, 8, 4 pixels wide
        if convolutions:                                      # few channels at many pixels take most of the time
            residual = [ResidualConv(dim // 4) for _ in range(convolutions)]
            self.stem = nn.Sequential(nn.Conv2d(3, dim // 4, 4, 4), *residual)
        else:
            self.stem = nn.Sequential(Downsample(3, dim // 8), Downsample(dim // 8, dim // 4))
        for channels, wider in itertools.pairwise(widths):
            self.stem.append(Downsample(channels, wider))
            self.stem.extend(ResidualConv(wider) for _ in range(convolutions if wider < dim else 0))
        self.pos_embed = nn.Parameter(torch.randn((SIZE // 16) ** 2, dim) * dim ** -.5)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.out = nn.Linear(dim, out, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / .07)))                # log(1 / temperature)

    def forward(self, pictures):                              # b 3 s s in [0, 1] -> b t e, unit scale
        x = rearrange(self.stem(pictures), "b e h w -> b (h w) e") + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def embed(self, tokens):                                  # b t e -> b out, on the unit sphere
        return F.normalize(self.out(reduce(tokens, "b t e -> b e", "mean")).float(), dim=-1)

    def loss(self, pictures, clouds, reader, x):
        """VIEWS pictures of each of k shapes, (v k) 3 s s; the clouds of these, k e; their tokens as the pictures show
        them, (v k) n c."""
        tokens, k = self(pictures), len(clouds)                                   # (v k) t e
        error = F.mse_loss(reader(tokens), x)
        picture, own = self.embed(tokens), torch.arange(k, device=x.device)       # (v k) e, k
        with torch.autocast(picture.device.type, enabled=False):
            score = rearrange(picture @ clouds.T, "(v k) j -> v k j", k=k) * self.scale.exp().clamp(max=100)
            own = own.expand(len(score), k)                                       # v k
            loss = F.cross_entropy(score.mT, own) / 2 + F.cross_entropy(score, own) / 2          # over dimension 1
        right = (score.argmax(2) == own).float().mean()
        return loss + READER_WEIGHT * error, {"picture_to_cloud": right, "token_error": error.detach()}

    @torch.no_grad()
    def tokens(self, pictures):
        """b 3 s s -> condition b t e and mask b t: the input of Prefix Learning."""
        tokens = self(pictures.to(self.scale.device))                             # b t e
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


class Reader(nn.Module):
    """Condition tokens -> shape tokens, a linear map of low rank. Attention in its place learnt more slowly."""

    def __init__(self, condition, width, tokens, channels):
        super().__init__()
        self.into = nn.Linear(condition * width, RANK)
        self.out, self.channels = nn.Linear(RANK, tokens * channels), channels

    def forward(self, condition):                             # b t e -> b n c
        x = self.out(self.into(rearrange(condition, "b t e -> b (t e)"))).float()
        return rearrange(x, "b (n c) -> b n c", c=self.channels)


load = partial(load_stage, stage="vision", kind=ImageTower)      # of a checkpoint folder, frozen
