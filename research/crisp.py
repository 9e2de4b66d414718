"""crisp.py - what IoU and F-score at .02 do not notice: wavy walls, round edges, colours that are off.

Beside each figure of a decoded mesh stands its ceiling, that of the mesh of the true field, extracted alike.
"""
import numpy as np
import torch
from einops import rearrange
from scipy.spatial import cKDTree

from geometry.export import Mesh
from geometry.metrics import fscore
from geometry.surface import TRUNCATION, extract
from heads import field_of

TETRAHEDRON = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3 ** .5
STEP = .01       # of the finite differences of a field
POINTS = 100_000  # surface points


class TrueHead:
    """Stands in for a trained sdf head: its answer is the exact field of a shape, any tokens aside."""

    def __init__(self, shape):
        self.shape = shape

    def read(self, tokens):
        return tokens

    def evaluate(self, memory, x):                            # x 1 k 3 -> 1 k 4
        distance, colour = self.shape.field(x[0].cpu().numpy())
        return torch.from_numpy(np.c_[distance / TRUNCATION, colour])[None].float().clamp(-1, 1).to(x.device)


def agreement(normals, colours, true_normals, true_colours):  # k 3 each
    """-> mean cosine of normals, n15: the share within 15 degrees, the share of colours with no channel .1 off."""
    cosine = (normals * true_normals).sum(1)
    right = abs(colours - true_colours).max(1) < .1
    return {"cosine": cosine.mean(), "n15": (cosine > np.cos(np.pi / 12)).mean(), "colours right": right.mean()}


def of_field(field, x, normals, colours):
    """`agreement` at true surface points: of the gradient, by differences at the corners of a tetrahedron."""
    corners = rearrange(torch.from_numpy(np.float32(x[:, None] + STEP * TETRAHEDRON)), "k v i -> (k v) i")
    distance = rearrange(field(corners)[:, 0].double().numpy(), "(k v) -> k v", v=4)
    gradient = distance @ TETRAHEDRON                         # k 3, up to a factor
    gradient /= np.linalg.norm(gradient, axis=1, keepdims=True).clip(1e-12)
    found = field(torch.from_numpy(np.float32(x)))[:, 1:].clamp(0, 1).numpy()
    return agreement(gradient, found, normals, colours)


def of_mesh(mesh, x, normals, colours, rng):
    """`agreement` of each true surface point and the nearest point of the mesh; F-score at .01."""
    points, own_normals, own_colours = mesh.surface(POINTS, rng)
    near = cKDTree(points).query(x)[1]
    return agreement(own_normals[near], own_colours[near], normals, colours) | {"F@.01": fscore(points, x, .01)}


def crispness(head, tokens, shape, rng, autocast, resolution=128):
    """Normals and colours of the field and of the mesh against the true surface; n15: the share of points whose normal
    is within 15 degrees; ceiling: the mesh of the true field."""
    true = [np.float64(x) for x in shape.surface(POINTS, rng)]                     # points, normals, colours: k 3 each
    found = {f"field {name}": value for name, value in of_field(field_of(head, tokens, autocast), *true).items()}
    for what, own in (("mesh", head), ("ceiling", TrueHead(shape))):
        mesh = Mesh(*extract(own, tokens, resolution, autocast))
        found |= {f"{what} {name}": value for name, value in of_mesh(mesh, *true, rng).items()}
    return found
