"""gs.py - shape tokens -> 3D Gaussians with colours that do not depend on the view (Kerbl et al. 2023).

    python train.py --rep gs --stage head
    python sample.py --text "table" --rep gs --points 30000
    python evaluate.py tokenizer --rep gs
"""
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from engine.grids import GridDecoder
from geometry.export import Shape, write_ply
from geometry.kinds import Kind
from geometry.metrics import psnr, ssim
from geometry.spacing import evenly, gaps
from geometry.splat import baked_light, render_gaussians, rotation_matrices, splat, splats
from geometry.symmetry import mirror_pictures, move_azimuths
from geometry.training_samples import render_flat, vertex_coloured
from representations.head import Head
from representations.sdf import SdfHead

# ---------------------------------------------------------------------------- what it trains on

SIZE = 128       # pixels along a side of a picture


def draw_view(shape, azimuth, elevation):                     # -> s s 4
    return render_flat(*vertex_coloured(shape), azimuth, elevation, SIZE)[..., :4].numpy()


def take_view(shape, rng):
    """One picture from a random side, a little above or below: colour times coverage, coverage."""
    angles = rng.uniform(0, 360), rng.uniform(-20, 60)
    return {"views": (draw_view(shape, *angles) * 255).round(), "angles": angles}


VIEWS = Kind("views", {"views": (np.uint8, (SIZE, SIZE, 4)), "angles": (np.float32, (2,))}, take_view, probes=1)


def views_of(split, rows):
    """The picture of each shape, b size size 4, and the camera's azimuth and elevation, b 2 in degrees."""
    views, angles, position = split.take("views", rows), split.take("angles", rows), split.position[rows]
    azimuth, elevation = angles.unbind(1)
    angles = torch.stack([move_azimuths(azimuth, position), elevation], 1)
    return {"views": mirror_pictures(views, position) / 255, "angles": angles}


# ---------------------------------------------------------------------------- the head

class GaussianHead(GridDecoder, Head):
    """Tokens and surface points -> a Gaussian each, of the colour of the surface. Trained on pictures."""
    POINTS, COPIES = 4096, 4                                  # of a training shape; Gaussians at each
    DEVIATION = .016                                          # of a Gaussian at output 0
    PAIRS = 3        # most pairs (Gaussian, tile) a Gaussian, in a training picture
    about = "3D Gaussians"
    kinds = VIEWS,
    needs = "sdf",
    options = {"resolution": 128, "points": POINTS * COPIES}
    preview = {"resolution": 64, "points": 2048}
    steps, batch = 1700, 4

    def __init__(self, **size):
        super().__init__(**size, outputs=11)

    def attributes(self, grids, x):                           # x b k 3 -> means, scales, rotations, opacities
        offset, scale, rotation, opacity = self.evaluate(grids, x).split([3, 3, 4, 1], -1)
        factor = (self.POINTS / x.shape[1]) ** (1 / 3)        # more Gaussians are smaller, less opaque: as many overlap
        identity = torch.eye(1, 4, device=x.device)                                       # 1 0 0 0, as a quaternion
        scale = self.DEVIATION * factor * scale.clamp(-3, 2).exp()
        opacity = 1 - (1 - (opacity[..., 0] + 3).sigmoid()) ** factor
        return x + .05 * offset.tanh(), scale, rotation + identity, opacity

    # ------------------------------------------------------------------------ training

    @classmethod
    def batch_of(cls, split, rows, rng=None):
        points, normals, colours = split.cloud(rows, cls.POINTS, rng)
        surface = {"points": points, "normals": normals, "colours": colours, "coloured": split.coloured[rows]}
        return surface | views_of(split, rows)

    def loss(self, tokens, batch):
        """.8 L1 + .2 (1 - SSIM) of pictures (Kerbl et al. 2023) of all Gaussians, on a random plain background."""
        copies = partial(repeat, pattern="b k i -> b (k r) i", r=self.COPIES)
        points, normals, colours = map(copies, (batch["points"], batch["normals"], batch["colours"]))
        noise = torch.randn_like(points)                      # .01 along the surface, .002 off it
        x = points + .01 * (noise - .8 * (noise * normals).sum(-1, keepdim=True) * normals)         # b k 3
        gaussians = *self.attributes(self.read(tokens), x), colours * baked_light(normals)
        with torch.autocast(x.device.type, enabled=False):
            image = splats(*gaussians, batch["angles"], batch["views"].shape[1], self.PAIRS * x.shape[1])
        coloured, background = rearrange(batch["coloured"], "b -> b 1 1 1"), torch.rand_like(x[:, :1, None])
        shown = [coloured * x[..., :3] + (1 - x[..., 3:]) * background for x in (image, batch["views"])]
        return .8 * F.l1_loss(*shown) + .2 * (1 - ssim(*shown)), {}                       # of b s s 3

    # ------------------------------------------------------------------------ the shape

    @torch.no_grad()
    def decode(self, tokens, heads, rng, autocast=nullcontext, resolution=128, points=POINTS * COPIES):
        faces = SdfHead.options["faces"]
        surface = heads["sdf"].decode(tokens, heads, rng, autocast, resolution, faces)
        x, normals, colours = map(torch.from_numpy, evenly(points, *surface.surface(points * 3 // 2, rng)))       # k 3
        with autocast():
            attributes = self.attributes(self.read(tokens[None]), x[None].to(tokens.device))
        means, scales, rotations, opacities = (y[0].float().cpu() for y in attributes)
        scales = scales.maximum(.3 * torch.from_numpy(gaps(x.numpy())[0])[:, None].clamp(max=.1).float())  # no holes
        rotations, colours = F.normalize(rotations, dim=-1), colours.float() * baked_light(normals)
        return Gaussians(*(y.numpy() for y in (means, scales, rotations, opacities.clamp(min=.5), colours)))

    # ------------------------------------------------------------------------ how good it is

    def judge(self, heads, tokens, split, row, rng, autocast, points):
        """PSNR, SSIM and the mean error of a colour channel in pixels that the shape fills: 4 random views of 128 x 128
        pixels, on white. Shapes without colours do not count."""
        if not split.coloured[row]:
            return dict.fromkeys(("PSNR", "SSIM", "colour error"), np.nan)
        true_shape, shape, results = split.shape(row), self.decode(tokens, heads, rng, autocast), []
        gaussians = shape.means, shape.scales, shape.rotations, shape.opacities, shape.colours
        for _ in range(4):
            angles = rng.uniform(0, 360), rng.uniform(-20, 60)
            true = draw_view(true_shape, *angles)                                 # s s 4
            inside, true = true[..., 3] == 1, true[..., :3] + 1 - true[..., 3:]   # s s and, on white, s s 3
            image = splat(*map(torch.from_numpy, gaussians), *angles, size=SIZE).clamp(0, 1).numpy()
            results.append((psnr(image, true), ssim(image, true), abs(true - image)[inside].mean()))
        return dict(zip(("PSNR", "SSIM", "colour error"), np.mean(results, 0)))


@dataclass(repr=False)
class Gaussians(Shape):
    """3D Gaussians. A file has the layout of 3D Gaussian splatting, which its viewers open."""
    means: np.ndarray     # k 3
    scales: np.ndarray    # k 3, standard deviations
    rotations: np.ndarray  # k 4, w x y z, unit
    opacities: np.ndarray  # k, in (0, 1)
    colours: np.ndarray   # k 3, sRGB in [0, 1], light included
    suffix, title = ".ply", "Gaussians"
    COLUMNS = ("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity",
               "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3")
    DC = .28209479177387814     # the constant spherical harmonic: colour = .5 + DC f_dc

    def save(self, path, height=None):
        """The layout has normals, opacities as logits, scales as logarithms, colours as spherical harmonics."""
        opacities = np.clip(self.opacities.astype(np.float64), 1e-6, 1 - 1e-6)
        normals, harmonics = np.zeros_like(self.means), (self.colours - .5) / self.DC
        columns = [*self.means.T, *normals.T, *harmonics.T, np.log(opacities / (1 - opacities)),
                   *np.log(self.scales).T, *self.rotations.T]
        write_ply(path, [*zip(self.COLUMNS, columns)])

    def picture(self, size=320, **view):
        return render_gaussians(*vars(self).values(), size=size, **view)

    def surface(self, k, rng):
        """The normal is the shortest axis, on the side away from the centre of all Gaussians."""
        rows = rng.choice(len(self.means), k, replace=k > len(self.means))
        axes = rotation_matrices(torch.from_numpy(self.rotations[rows])).numpy()       # k 3 3, an axis a column
        normals = axes[np.arange(k), :, self.scales[rows].argmin(1)]
        outward = ((self.means[rows] - self.means.mean(0)) * normals).sum(1, keepdims=True) >= 0
        return self.means[rows], np.where(outward, normals, -normals), self.colours[rows]
