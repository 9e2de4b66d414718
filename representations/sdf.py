"""sdf.py - shape tokens -> a surface, where a signed distance is 0, with colours.

    python train.py --rep sdf
    python sample.py --text "table" --rep sdf
    python evaluate.py tokenizer --rep sdf       # how well it reconstructs held-out shapes
"""
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import nn

from engine.grids import PointMLP, Refine, TokenGrid
from engine.networks import grid_points
from geometry.export import Mesh
from geometry.metrics import fscore, iou
from geometry.surface import TRUNCATION, extract, field_of
from representations.head import Head

TETRAHEDRON = (1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)            # its corners, times sqrt 3
STEP, NORMALS = .01, .1     # of finite differences; the weight of normals in the loss


def rarity(colours):
    """Colours of the points of b shapes, b k 3 -> weights with mean 1, b k. The weights of the points of one colour
    have the same sum for every colour of a shape."""
    share = reduce((torch.cdist(colours, colours) < .02).float(), "b q k -> b q", "mean")
    return 1 / share / reduce(1 / share, "b k -> b 1", "mean")


class SdfHead(TokenGrid, Head):
    """Tokens -> two grids of features for the form, two for the colour -> truncated signed distance (in units of the
    truncation) and colour at any point."""
    POINTS, QUERIES, STENCILS = 256, 640, 96                  # in training: on the surface, around it; with normals
    about = "a surface"
    options = {"resolution": 128, "faces": 19_000}            # so many make less than 500 kB
    preview = {"resolution": 64}

    def __init__(self, dim, **size):
        super().__init__(dim=dim, **size)
        self.form_grids, self.colour_grids = Refine(dim, *self.FORM), Refine(dim, *self.COLOUR)
        self.form, self.colour = PointMLP(self.FORM[0], 1), PointMLP(self.COLOUR[0], 3, depth=2)
        self.register_buffer("corners", torch.tensor(TETRAHEDRON) / 3 ** .5, persistent=False)         # 4 3
        nn.init.constant_(self.colour[-1].bias, .5)

    def read(self, tokens):                                   # b n c -> grids of the form, grids of the colour
        x = self.grid(tokens)
        return self.form_grids(x), self.colour_grids(x)

    def evaluate(self, grids, x):                             # grids, points b k 3 -> b k 4: distance, colour
        return torch.cat([self.form(grids[0], x), self.colour(grids[1], x)], -1)

    # ------------------------------------------------------------------------ training

    @classmethod
    def batch_of(cls, split, rows, rng=None):
        points, normals, colours = split.cloud(rows, cls.POINTS, rng)
        surface = {"points": points, "normals": normals, "colours": colours, "coloured": split.coloured[rows]}
        return surface | split.queries(rows, cls.QUERIES, rng)

    def loss(self, tokens, batch):
        """L1 of the clipped distance; the error of normals n, the gradient g by finite differences at corners v of a
        tetrahedron; the error e of colours: |e| learns sharp borders, e^2 keeps stripes of uncertain place. All colours
        of a shape weigh the same (w: rarity), so that small ones are kept.

            g = 3 T / (4 h) sum_v f(x + h v) v
            L = mean |f - d| + NORMALS mean |g - n| + mean w (|e| / 2 + 2 e^2)

        T is TRUNCATION, h is STEP.
        """
        form_grids, colour_grids = self.read(tokens)
        x, n = batch["points"], batch["normals"][:, :self.STENCILS]                                    # b k 3
        near = rearrange(x[:, :self.STENCILS, None] + STEP * self.corners, "b k v i -> b (k v) i")
        y = self.form(form_grids, torch.cat([x, batch["queries"], near], 1))[..., 0]                   # b k
        y, near_y = y.split([y.shape[1] - near.shape[1], near.shape[1]], 1)
        target = F.pad((batch["distance"] / TRUNCATION).clamp(-1, 1), (x.shape[1], 0))             # 0 on the surface
        distance = F.l1_loss(y, target)
        near_y = rearrange(near_y, "b (k v) -> b k v 1", v=4)
        gradient = 3 * TRUNCATION / (4 * STEP) * reduce(near_y * self.corners, "b k v i -> b k i", "sum")
        normal = ((gradient - n).square().sum(-1) + 1e-8).sqrt().mean()
        square = (self.colour(colour_grids, x) - batch["colours"]).square().mean(-1)                   # e^2: b k
        weight = rarity(batch["colours"]) * batch["coloured"][:, None]                                 # b k
        colour = (weight * ((square + 1e-4).sqrt() / 2 - .005 + 2 * square)).mean()
        logs = {"distance": distance.detach(), "normal": normal.detach(), "colour": colour.detach()}
        return distance + NORMALS * normal + colour, logs

    # ------------------------------------------------------------------------ the shape

    def decode(self, tokens, heads, rng, autocast=nullcontext, resolution=128, faces=None):
        """faces: at most so many; None: as marching cubes makes them."""
        mesh = Mesh(*extract(self, tokens, resolution, autocast))
        return mesh.simplified(faces) if faces else mesh

    # ------------------------------------------------------------------------ how good it is

    def judge(self, heads, tokens, split, row, rng, autocast, points):
        """IoU on a 64^3 grid; L1 of the distance, in truncations, at queries drawn as in training; F-score at .02 of
        the surfaces, by `points` points of each."""
        shape, results = split.shape(row), {}
        if points:
            surface = self.decode(tokens, heads, rng, autocast).surface(points, rng)[0]
            results = {"F-score": fscore(surface, shape.surface(points, rng)[0], .02)}
        queries, distance = (split.take(name, [row])[0].cpu() for name in ("queries", "distance"))       # k 3, k
        error = field_of(self, tokens, autocast)(queries)[:, 0] - (distance / TRUNCATION).clamp(-1, 1)
        return {"IoU": grid_iou(self, tokens, shape, autocast), "L1": error.abs().mean().item()} | results


def grid_iou(head, tokens, shape, autocast, resolution=64):
    """IoU of a decoded sdf (tokens n c) and the true shape, at all resolution^3 cell centres of [-1, 1]^3. A flat face
    near a layer of points flips all of them: the IoU of one shape depends on the grid. Compare means over one grid."""
    points = grid_points(resolution)                                              # k 3
    return iou((field_of(head, tokens, autocast)(points)[:, 0] < 0).numpy(), shape.distance(points.numpy()) < 0)


def onto_surface(field, x, normals):
    """Points near the surface of a field, and their normals, ... 3 each -> points on it; colours of one step before."""
    for _ in range(2):
        y = field(x)                                          # ... 4
        x = x - TRUNCATION * y[..., :1] * normals
    return x, y[..., 1:].clamp(0, 1)
