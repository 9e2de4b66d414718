"""metrics.py - how well it works, each metric a plain function with its convention in the docstring.

Papers differ in whether a Chamfer distance is squared, summed or averaged, so numbers can only be
compared after reading which it is. Here, everywhere: unsquared distances, averaged over the points of
a cloud, the two directions added, in a cube of side 2 that the shapes fill to 1.8.

    python evaluate.py generate --rep sdf       # a command that prints most of them
"""
import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from tokenizer import TRUNCATION, sdf_grid

# ---------------------------------------------------------------------------- solids


def iou(a, b):
    """Intersection over union of two occupancies, boolean arrays of one shape; 0 if both are empty."""
    return (a & b).sum() / max((a | b).sum(), 1)


def occupancy(field, resolution=64):
    """Where the distance of a field (below) is negative: bool, (resolution + 1)^3 grid vertices of [-1, 1]^3.
    Hierarchical, as meshes are extracted."""
    return sdf_grid(lambda x: field(x)[:, 0], resolution) < 0


def decoded_field(head, tokens, autocast):
    """Tokens n c -> a function of points k 3 giving distance (in truncations) and colour, k 4, on the CPU."""
    @torch.no_grad()
    def ask(x):
        with autocast():
            return torch.cat([head.ask(memory, part[None].to(tokens.device))[0].cpu() for part in x.split(2 ** 15)])

    with torch.no_grad(), autocast():
        memory = head.read(tokens[None])
    return ask


def true_field(shape):
    """What `decoded_field` gives, of a built-in shape itself."""
    return lambda x: torch.from_numpy(np.column_stack(shape.field(x.numpy())) / [TRUNCATION, 1, 1, 1]).float()


def grid_iou(head, tokens, shape, autocast, resolution=64):
    """Volumetric IoU of a decoded sdf (tokens n c) and the true shape, on the grid of `occupancy`."""
    return iou(occupancy(decoded_field(head, tokens, autocast), resolution), occupancy(true_field(shape), resolution))


# ---------------------------------------------------------------------------- clouds

def chamfer(a, b):
    """Chamfer distance of two clouds (k 3, l 3): mean_a min_b |a - b| + mean_b min_a |a - b|, unsquared."""
    return cKDTree(b).query(a)[0].mean() + cKDTree(a).query(b)[0].mean()


@torch.no_grad()
def chamfer_matrix(samples, references):
    """`chamfer` of every pair: samples s k 3, references r l 3 -> s r.

    |a - b|^2 = [-2 a, |a|^2, 1] . [b, 1, |b|^2] is one small matrix product. In fp32 that rounds distances
    below 3e-4 (points on top of each other); nearest points of two clouds of 1024 are some .03 apart.
    """
    square = lambda x: (x ** 2).sum(-1, keepdim=True)
    left = torch.cat([-2 * samples, square(samples), torch.ones_like(samples[..., :1])], -1)             # s k 5
    right = torch.cat([references, torch.ones_like(references[..., :1]), square(references)], -1).mT     # r 5 l
    rows = samples.shape[1] if samples.is_cuda else 128   # 128 x 1024 distances stay in a core's cache: 3 times faster
    mean = lambda x: x.clamp(min=0).sqrt().mean()
    out = torch.empty(len(samples), len(references))
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            blocks = [(d.amin(1), d.amin(0)) for d in (part @ b for part in a.split(rows))]              # rows l
            there, back = torch.cat([there for there, _ in blocks]), torch.stack([back for _, back in blocks]).amin(0)
            out[i, j] = mean(there) + mean(back)
    return out


def fscore(a, b, threshold):
    """Harmonic mean of precision (share of a's points within `threshold` of b) and recall (of b's, of a)."""
    precision, recall = ((cKDTree(y).query(x, distance_upper_bound=threshold)[0] < np.inf).mean() for x, y in ((a, b), (b, a)))
    return 2 * precision * recall / max(precision + recall, 1e-9)


def diversity(clouds):
    """Mean Chamfer distance of all pairs of different clouds: n k 3, n at least 2."""
    return chamfer_matrix(clouds, clouds)[~torch.eye(len(clouds), dtype=torch.bool)].mean().item()


# ---------------------------------------------------------------------------- meshes

def face_areas(vertices, faces):
    a, b, c = (vertices[faces[:, i]].astype(np.float64) for i in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def sample_surface(vertices, faces, k, rng):
    """k points uniform by area on a mesh: k 3."""
    area = face_areas(vertices, faces)
    corners = vertices[faces[rng.choice(len(faces), k, p=area / area.sum())]]          # k 3 3
    u, v = np.sqrt(rng.random(k)), rng.random(k)                                        # sqrt: uniform in a triangle
    weights = np.stack([1 - u, u * (1 - v), u * v], 1)
    return np.einsum("kc,kci->ki", weights, corners).astype(np.float32)


def components(vertices, faces):
    """Share of the surface area that is in the largest connected component; 0 for an empty mesh."""
    if len(faces) == 0:
        return 0.
    ends = np.concatenate([faces[:, :2], faces[:, 1:]]).T
    _, label = connected_components(coo_array((np.ones(ends.shape[1]), ends), (len(vertices),) * 2), directed=False)
    area = np.bincount(label[faces[:, 0]], face_areas(vertices, faces))
    return area.max() / area.sum()


def watertight(faces):
    """Every edge belongs to exactly two faces, which run along it in opposite directions; an empty mesh is not."""
    edge = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    there, back = (np.unique(edge @ [2 ** 31, 1]) for edge in (edge, edge[:, ::-1]))
    return 0 < len(edge) == len(there) and np.array_equal(there, back)
