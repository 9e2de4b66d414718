"""crisp.py - what IoU and F-score at .02 do not notice: wavy walls, round edges, colours that are off.

Beside each figure of a decoded mesh stands its ceiling, that of the mesh of the true field, extracted alike.
"""
import numpy as np
import torch
from einops import rearrange
from scipy.spatial import cKDTree

from data import seeded
from geometry.export import Mesh
from geometry.kinds import GREY
from geometry.metrics import chamfer, chamfer_matrix, fscore
from geometry.surface import TRUNCATION, extract, field_of
from geometry.symmetry import SYMMETRIES
from representations.sdf import TETRAHEDRON

CORNERS = np.array(TETRAHEDRON) / 3 ** .5
STEP = .01       # of the finite differences of a field
POINTS = 100_000  # surface points
LIKENESS = "Chamfer", "its floor", "n15", "colours right", "F@.01", "F@.05"


class TrueHead:
    """Stands in for a trained sdf head: its answer is the exact field of a shape, whatever the tokens."""

    def __init__(self, shape):
        self.shape = shape

    def read(self, tokens):
        return tokens

    def evaluate(self, memory, x):                            # x 1 k 3 -> 1 k 4
        distance, colour = self.shape.field(x[0].cpu().numpy())
        return torch.from_numpy(np.c_[distance / TRUNCATION, colour])[None].float().clamp(-1, 1).to(x.device)


def agreement(normals, colours, true_normals, true_colours):  # k 3 each
    """-> mean cosine of normals; n15: share within 15 degrees; colours right: share with no channel .1 off, nan for a
    shape without colours."""
    cosine = (normals * true_normals).sum(1)
    right = (abs(colours - true_colours).max(1) < .1).mean() if abs(true_colours - GREY).max() > .01 else np.nan
    return {"cosine": cosine.mean(), "n15": (cosine > np.cos(np.pi / 12)).mean(), "colours right": right}


def of_field(field, x, normals, colours):
    """`agreement` of a field at true surface points; its normals by finite differences at a tetrahedron's corners."""
    corners = rearrange(torch.from_numpy(np.float32(x[:, None] + STEP * CORNERS)), "k v i -> (k v) i")
    distance = rearrange(field(corners)[:, 0].double().numpy(), "(k v) -> k v", v=4)
    gradient = distance @ CORNERS                             # k 3, up to a factor
    gradient /= np.linalg.norm(gradient, axis=1, keepdims=True).clip(1e-12)
    found = field(torch.from_numpy(np.float32(x)))[:, 1:].clamp(0, 1).numpy()
    return agreement(gradient, found, normals, colours)


def of_surface(found, true):                                  # points, normals, colours: k 3 each
    """`agreement` of each true surface point and the nearest point found; F-score at .01."""
    near = cKDTree(found[0]).query(true[0])[1]
    return agreement(found[1][near], found[2][near], *true[1:]) | {"F@.01": fscore(found[0], true[0], .01)}


def likeness(shape, split, rows, rng):
    """A sample against the true shape. Chamfer: of 8192 points; its floor: of two samplings of the true shape. n15: the
    share of the true surface where the nearest normal of the sample is within 15 degrees; colours right: where no
    channel is .1 off. F: F-scores."""
    x, normals, colours = shape.with_hidden_parts().surface(POINTS, rng)      # to leave hidden points out takes 18 s
    near = chamfer_matrix(x[None, :1024], split.cloud(rows, 1024, seeded(rng))[0]).argmin()
    row, k = int(rows[near]), 8192                            # the nearest of these shapes, some mirrored or turned
    back, true = SYMMETRIES[split.position[row]], split.shape(row).surface(POINTS, rng)
    x, normals = x @ back, normals @ back                     # the inverse, as a point is a row
    found = {"row": row, "Chamfer": chamfer(x[:k], true[0][:k]), "its floor": chamfer(true[0][-k:], true[0][:k])}
    return found | of_surface((x, normals, colours), true) | {"F@.05": fscore(x, true[0], .05)}


def crispness(head, tokens, shape, rng, autocast, resolution=128):
    """Normals and colours of the field and of the mesh against the true surface; n15: the share of points whose normal
    is within 15 degrees; ceiling: the mesh of the true field."""
    true = [np.float64(x) for x in shape.surface(POINTS, rng)]                     # points, normals, colours: k 3 each
    found = {f"field {name}": value for name, value in of_field(field_of(head, tokens, autocast), *true).items()}
    for what, own in (("mesh", head), ("ceiling", TrueHead(shape))):
        surface = Mesh(*extract(own, tokens, resolution, autocast)).surface(POINTS, rng)
        found |= {f"{what} {name}": value for name, value in of_surface(surface, true).items()}
    return found
