"""grids.py - convolutions on grids of features, channels last: b x y z f. With them, neighbouring tokens share a wall.

A decoder that looks up features of each token's own cells shows their borders as dimples; here features are refined by
convolutions on the way to a grid of 4 times the tokens' side, and interpolated.
"""
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import nn


class ResConv(nn.Module):
    """A residual convolution of 3^3 cells; at the start of training it changes little."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.conv, self.out = nn.LayerNorm(dim), nn.Conv3d(dim, dim, 3, padding=1), nn.Linear(dim, dim)
        nn.init.normal_(self.out.weight, std=.01)

    def forward(self, x):                                     # b x y z d
        y = self.conv(rearrange(self.norm(x), "b x y z d -> b d x y z"))
        return x + self.out(F.gelu(rearrange(y, "b d x y z -> b x y z d")))


class Refine(nn.Module):
    """A grid of tokens -> grids of features, each twice as fine as the one before. depths: convolutions on each."""

    def __init__(self, dim, widths, depths):
        super().__init__()
        self.into = nn.ModuleList(nn.Linear(d, 8 * f) for d, f in zip((dim, *widths), widths))
        self.blocks = nn.ModuleList(nn.Sequential(*map(ResConv, [f] * depth)) for f, depth in zip(widths, depths))
        for layer in self.into:
            nn.init.normal_(layer.weight, std=layer.in_features ** -.5)

    def forward(self, x):                                     # b s s s d -> b 2s 2s 2s f, b 4s 4s 4s f ...
        grids = []
        for into, blocks in zip(self.into, self.blocks):
            x = blocks(rearrange(into(x), "b x y z (i j k f) -> b (x i) (y j) (z k) f", i=2, j=2, k=2))
            grids.append(x)
        return grids


class PointMLP(nn.Sequential):
    """The features of points, interpolated in grids, and their positions -> outputs, in fp32: for normals, the loss
    differentiates them by position."""

    def __init__(self, widths, outputs, dim=128, depth=3):
        sizes = sum(widths) + 3, *[dim] * depth
        layers = [nn.Linear(*pair) for pair in zip(sizes, sizes[1:])]
        super().__init__(*(part for layer in layers for part in (layer, nn.ReLU())), nn.Linear(dim, outputs))
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, grids, x):                              # b s s s f each, b k 3 -> b k outputs
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(torch.cat([*(interpolate(grid.float(), x) for grid in grids), x], -1))


def interpolate(grid, x):
    """Features b s s s f, of the centres of cells, at points b k 3 in [-1, 1]^3: b k f. (3D grid_sample has no second
    derivative.)"""
    b, s, k = len(grid), grid.shape[1], x.shape[1]
    place = ((x + 1) * s / 2 - .5).clamp(0, s - 1)
    low = place.floor().clamp(max=s - 2)
    corner = torch.cartesian_prod(*[torch.arange(2, device=x.device)] * 3)                    # 8 3
    at = rearrange(low.long(), "b k i -> b k 1 i") + corner                                   # b k 8 3
    first = torch.arange(b, device=x.device)[:, None, None] * s ** 3
    rows = (first + (at[..., 0] * s + at[..., 1]) * s + at[..., 2]).flatten()                 # (b k 8)
    share = rearrange(place - low, "b k i -> b k 1 i")                                        # b k 1 3
    weight = torch.where(corner == 1, share, 1 - share).prod(-1, keepdim=True)                # b k 8 1
    found = rearrange(grid, "b x y z f -> (b x y z) f").index_select(0, rows)
    return reduce(rearrange(found, "(b k v) f -> b k v f", b=b, k=k) * weight, "b k v f -> b k f", "sum")
