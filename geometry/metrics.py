"""metrics.py - how near are two shapes, or two sets of clouds? Each docstring states the convention of its metric.

Papers differ in whether a Chamfer distance is squared, summed or averaged. Here distances are not squared, they are
averaged over the points of a cloud, and the two directions are added. Shapes fill 1.8 of a cube of side 2.
scipy and skimage are imported where they are used: they take long.
"""
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from engine.commands import UserError
from geometry.meshes import directed_edges, face_areas, face_components


def check(x, what, least=1, form="k 3"):
    """-> x as an array; an error if it is not of this form, has too few rows, or numbers that are not finite."""
    x = np.asarray(x)
    if x.ndim != len(form.split()) or form.endswith("3") and x.shape[-1] != 3:
        raise UserError(f"{what} has the shape {tuple(x.shape)}, not {form}")
    if len(x) < least or 0 in x.shape:
        raise UserError(f"{what} has {len(x)}, at least {least} {'is' if least == 1 else 'are'} needed")
    if not np.isfinite(x).all():
        raise UserError(f"{what} holds numbers that are not finite")
    return x


def check_two(a, b, what="cloud", *limits):
    return check(a, f"the first {what}", *limits), check(b, f"the second {what}", *limits)


# ---------------------------------------------------------------------------- two shapes

def iou(a, b):
    """Intersection over union of two occupancies, boolean arrays of one shape."""
    if a.shape != b.shape or not (a | b).any():
        raise UserError(f"IoU takes two occupancies of one shape, not both empty; got {a.shape} and {b.shape}")
    return (a & b).sum() / (a | b).sum()


def chamfer(a, b):
    """Chamfer distance of two clouds (k 3, l 3): mean_a min_b |a - b| + mean_b min_a |a - b|."""
    from scipy.spatial import cKDTree
    a, b = check_two(a, b)
    return cKDTree(b).query(a)[0].mean() + cKDTree(a).query(b)[0].mean()


def emd(a, b):
    """Earth mover's distance of two clouds of one size (k 3): mean distance in the best one-to-one assignment."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist
    a, b = check_two(a, b)
    if len(a) != len(b):
        raise UserError(f"the earth mover's distance is of clouds of one size, not of {len(a)} and {len(b)} points")
    distance = cdist(a, b)                                                        # k k
    return distance[linear_sum_assignment(distance)].mean()


def fscore(a, b, threshold):
    """Harmonic mean of precision (share of a's points within `threshold` of b) and recall (of b's points, of a)."""
    from scipy.spatial import cKDTree
    a, b = check_two(a, b)
    within = lambda x, y: (cKDTree(y).query(x, distance_upper_bound=threshold)[0] < np.inf).mean()
    precision, recall = within(a, b), within(b, a)
    return 2 * precision * recall / max(precision + recall, 1e-9)


def faces_within(found, true, bins):
    """Share of faces that agree in all nine coordinates to within `bins`: pairs of a best assignment of the faces found
    (f 3 3) to the true ones (g 3 3), which may start at any corner, over the larger of the two counts."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist
    rotations = [np.roll(found, i, 1).reshape(-1, 9) for i in range(3)]           # three times f 9
    distance = np.min([cdist(x, true.reshape(-1, 9), "chebyshev") for x in rotations], 0)     # f g
    right = (distance <= bins).astype(int)
    return right[linear_sum_assignment(right, maximize=True)].sum() / max(len(found), len(true))


def psnr(a, b):
    """Peak signal-to-noise ratio of two pictures of one size, values in [0, 1], in dB: -10 log10 mean (a - b)^2."""
    from skimage.metrics import peak_signal_noise_ratio
    return peak_signal_noise_ratio(a, b, data_range=1)


def ssim(a, b):
    """Structural similarity of pictures ... h w 3 with values in [0, 1] (Wang et al. 2004), in windows of 7 x 7 pixels.
    It is differentiable."""
    a, b = (rearrange(torch.as_tensor(x), "... h w c -> (...) c h w") for x in (a, b))
    mean = partial(F.avg_pool2d, kernel_size=7, stride=1)
    covariance = lambda x, y: 49 / 48 * (mean(x * y) - mean(x) * mean(y))         # unbiased, of 49 pixels
    light = (2 * mean(a) * mean(b) + .01 ** 2) / (mean(a) ** 2 + mean(b) ** 2 + .01 ** 2)
    form = (2 * covariance(a, b) + .03 ** 2) / (covariance(a, a) + covariance(b, b) + .03 ** 2)
    return (light * form).mean()


# ---------------------------------------------------------------------------- sets of clouds

def chamfer_matrix(samples, references):
    """`chamfer` of every pair: samples s k 3, references r l 3 -> s r. A set with itself takes half of the work.

    |a - b|^2 = [-2 a, |a|^2, 1] . [b, 1, |b|^2] is one small matrix product. In fp32 that rounds distances
    below 3e-4 (equal points); nearest points of two clouds of 1024 are some .03 apart.
    """
    same, threads = samples is references, torch.get_num_threads()
    samples, references = (torch.as_tensor(x, dtype=torch.float).detach() for x in (samples, references))
    square, ones = lambda x: (x ** 2).sum(-1, keepdim=True), lambda x: torch.ones_like(x[..., :1])
    left = torch.cat([-2 * samples, square(samples), ones(samples)], -1)                                    # s k 5
    right = torch.cat([references, ones(references), square(references)], -1).mT.contiguous()               # r 5 l
    rows = samples.shape[1] if samples.is_cuda else 128       # so many rows fit a core's cache: 3 times faster
    matrix, mean_root = torch.zeros(len(left), len(right)), lambda x: x.clamp(min=0).sqrt().mean()          # s r

    def fill_row(i):
        memory = torch.empty(rows, references.shape[1], device=samples.device)    # for all products: 3 times faster
        for j in range(i if same else 0, len(references)):
            to_reference, to_sample = [], []
            for points in left[i].split(rows):
                distance = torch.mm(points, right[j], out=memory[:len(points)])   # rows l, squared
                to_reference.append(distance.amin(1))
                to_sample.append(distance.amin(0))
            matrix[i, j] = mean_root(torch.cat(to_reference)) + mean_root(torch.stack(to_sample).amin(0))

    torch.set_num_threads(1)                                  # a row for each core: faster than all on one product
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill_row, range(len(samples))))
    finally:
        torch.set_num_threads(threads)
    return torch.maximum(matrix, matrix.T) if same else matrix


# ---------------------------------------------------------------------------- how sound is a mesh?

def largest_component_share(vertices, faces):
    """Share of the surface area that is in the largest connected component; 0 for an empty mesh."""
    if len(faces) == 0:
        return 0.
    area = np.bincount(face_components(faces, len(vertices)), face_areas(vertices, faces))
    return area.max() / area.sum()


def watertight(faces):
    """Every edge belongs to exactly two faces, which run along it in opposite directions. An empty mesh is not."""
    edges = directed_edges(faces)
    forward, backward = (np.unique(ends @ [2 ** 31, 1]) for ends in (edges, edges[:, ::-1]))
    return 0 < len(edges) == len(forward) and np.array_equal(forward, backward)


def closed_edges(faces):
    """Share of the edges that exactly two faces share; 0 for an empty mesh."""
    edges = np.sort(directed_edges(faces), 1)
    return np.mean(np.unique(edges, axis=0, return_counts=True)[1] == 2) if len(edges) else 0.
