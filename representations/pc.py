"""pc.py - shape tokens -> a point cloud: a flow moves each point from noise to the surface.

    python train.py --rep pc --stage head
    python sample.py --text "table" --rep pc --points 10000
    python evaluate.py tokenizer --rep pc
"""
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from engine.grids import GridDecoder
from engine.networks import flow_pair, time_embedding
from geometry.export import Shape, write_ply
from geometry.metrics import chamfer, emd
from geometry.render import render_points
from geometry.spacing import evenly
from geometry.surface import field_of, in_chunks
from representations.head import Head
from representations.sdf import onto_surface


class PointHead(GridDecoder, Head):
    """A flow from noise to the surface, independent for each point: any number of points from one set of tokens.
    x_t = (1 - t) noise + t x; outputs are the velocity x - noise, and at t = 1 normal and colour. Where there is an
    sdf head, two steps along the normals project the points onto its surface. Clumped points, a third, are dropped."""
    POINTS = 768     # of a training shape
    STEPS = 32       # of the flow; later steps are smaller: they determine the final position
    about = "a point cloud"
    helpers = "sdf",
    options = {"points": 4096}
    preview = {"points": 2048}
    steps = 2500

    def __init__(self, dim, **size):
        super().__init__(dim=dim, **size, outputs=9)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def velocity(self, grids, x, t):                          # b k 3, b k -> b k 9
        time = self.time(time_embedding(rearrange(t, "b k -> (b k)"), self.time[0].in_features))
        return self.evaluate(grids, x, rearrange(time, "(b k) d -> b k d", b=len(x)))

    # ------------------------------------------------------------------------ training

    @classmethod
    def batch_of(cls, split, rows, rng=None):
        points, normals, colours = split.cloud(rows, cls.POINTS, rng)
        return {"points": points, "normals": normals, "colours": colours, "coloured": split.coloured[rows]}

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

    # ------------------------------------------------------------------------ the shape

    @torch.no_grad()
    def decode(self, tokens, heads, rng, autocast=nullcontext, points=4096):
        x = torch.from_numpy(rng.standard_normal((points * 3 // 2, 3), np.float32)).to(tokens.device)  # k 3
        with autocast():
            grids = self.read(tokens[None])                                               # of one shape

        def outputs(x, t):                                    # k 3, a time -> k 9
            with autocast():
                return in_chunks(lambda part: self.velocity(grids, part[None], t.expand(1, len(part)))[0], x)

        times = 1 - torch.linspace(1, 0, self.STEPS + 1, device=x.device) ** 1.5
        for t, then in zip(times[:-1], times[1:]):
            x = x + (then - t) * outputs(x, t)[:, :3]                                     # k 3
        y = outputs(x, times[-1])                                                         # k 9
        normals, colours = F.normalize(y[:, 3:6], dim=-1), y[:, 6:].clamp(0, 1)
        if "sdf" in heads:
            x, _ = onto_surface(field_of(heads["sdf"], tokens, autocast), x, normals)
        return Cloud(*evenly(points, *(y.cpu().numpy() for y in (x, normals, colours))))

    # ------------------------------------------------------------------------ how good it is

    def judge(self, heads, tokens, split, row, rng, autocast, points):
        """Chamfer distance of 2048 points to as many true ones, EMD of 1024; floors: those of a second true cloud.
        Normals and colours against those of the nearest true point."""
        from scipy.spatial import cKDTree  # slow to load
        cloud = self.decode(tokens, heads, rng, autocast, points=2048)
        true, normals, colours = split.shape(row).surface(2048, rng)              # k 3 each
        second = split.shape(row).surface(2048, rng)[0]                           # k 3
        nearest = cKDTree(true).query(cloud.points)[1]                            # k, rows of `true`
        return {"Chamfer": chamfer(cloud.points, true), "its floor": chamfer(second, true),
                "EMD": emd(cloud.points[:1024], true[:1024]), "EMD floor": emd(second[:1024], true[:1024]),
                "normal cosine": (cloud.normals * normals[nearest]).sum(1).mean(),
                "colour error": abs(cloud.colours - colours[nearest]).mean() if split.coloured[row] else np.nan}


@dataclass(repr=False)
class Cloud(Shape):
    """Surface points. A file has points, normals, 8-bit colours."""
    points: np.ndarray    # k 3
    normals: np.ndarray   # k 3, unit
    colours: np.ndarray   # k 3, sRGB in [0, 1]
    suffix, title = ".ply", "points"
    COLUMNS = "x", "y", "z", "nx", "ny", "nz", "red", "green", "blue"

    def save(self, path, height=None):
        colours = np.round(self.colours * 255).astype(np.uint8)
        write_ply(path, [*zip(self.COLUMNS, [*self.points.T, *self.normals.T, *colours.T])])

    def picture(self, size=320, **view):
        return render_points(self.points, self.colours, .03 * (2048 / len(self.points)) ** .5, size=size, **view)

    def surface(self, k, rng):
        rows = rng.choice(len(self.points), k, replace=k > len(self.points))
        return self.points[rows], self.normals[rows], self.colours[rows]
