"""metrics.py - how well it works, each metric a plain function with its convention in the docstring.

Papers differ in whether a Chamfer distance is squared, summed or averaged, so numbers can only be
compared after reading which it is. Here, everywhere: unsquared distances, averaged over the points of
a cloud, the two directions added, in a cube of side 2 that the shapes fill to 1.8.

    python evaluate.py generate --rep sdf       # a command that prints most of them
"""
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from heads import TRUNCATION, sdf_grid
from kinds import VIEW, view
from layers import grid_points
from meshes import centres, closed_edges, quantise, sample_surface
from render import splat

# ---------------------------------------------------------------------------- solids


def iou(a, b):
    """Intersection over union of two occupancies, boolean arrays of one shape; 0 if both are empty."""
    return (a & b).sum() / max((a | b).sum(), 1)


def occupancy(field, resolution=64):
    """Where the distance of a field (below) is negative: bool, (resolution + 1)^3 grid vertices of [-1, 1]^3.
    Hierarchical, as meshes are extracted: a third of the time of asking every point at 64."""
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
    """Volumetric IoU of a decoded sdf (tokens n c) and the true shape: occupancy at the resolution^3 cell
    centres of [-1, 1]^3, every point asked. A flat face that lies near a layer of points flips all of it, so
    that one shape's figure depends on the grid (by .05 and more at 64); compare means over the same one.
    """
    points = grid_points(resolution)
    return iou((decoded_field(head, tokens, autocast)(points)[:, 0] < 0).numpy(), shape.distance(points.numpy()) < 0)


# ---------------------------------------------------------------------------- clouds

def chamfer(a, b):
    """Chamfer distance of two clouds (k 3, l 3): mean_a min_b |a - b| + mean_b min_a |a - b|, unsquared."""
    return cKDTree(b).query(a)[0].mean() + cKDTree(a).query(b)[0].mean()


def emd(a, b):
    """Earth mover's distance of two clouds of one size (k 3): the mean distance of the best one-to-one assignment, exact."""
    distance = cdist(a, b)
    return distance[linear_sum_assignment(distance)].mean()


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


def others(clouds):
    """`chamfer` from every cloud to every other: n k 3 -> n (n - 1)."""
    n = len(clouds)
    return chamfer_matrix(clouds, clouds)[~torch.eye(n, dtype=torch.bool)].reshape(n, n - 1)


def diversity(clouds):
    """Mean Chamfer distance of all pairs of different clouds: n k 3, n at least 2."""
    return others(clouds).mean().item()


# ---------------------------------------------------------------------------- meshes

def faces_within(found, true, bins):
    """Share of faces that agree in all nine coordinates to within `bins`: pairs of a best assignment of the faces found
    (f 3 3) to the true ones (g 3 3), which may start at any corner, over the larger of the two counts."""
    apart = np.min([cdist(np.roll(found, i, 1).reshape(-1, 9), true.reshape(-1, 9), "chebyshev") for i in range(3)], 0)
    right = (apart <= bins).astype(int)
    return right[linear_sum_assignment(right, maximize=True)].sum() / max(len(found), len(true))


# ---------------------------------------------------------------------------- reconstruction, each representation its own way
# (heads, tokens n c, a prepared set, row, rng, autocast, points) -> {name: number}: `tokens` decoded against the true shape

def judge_sdf(heads, tokens, split, row, rng, autocast, points):
    """IoU on a 64^3 grid; L1 of the distance, in truncations, at queries drawn as in training; F-score at .02 of the
    surfaces, unless `points` a side is 0."""
    shape, results = split.shape(row), {}
    if points:
        surface = heads["sdf"].decode(tokens, heads, rng, autocast).sample(points, rng)
        results = {"F-score": fscore(surface, shape.surface(points, rng)[0], .02)}
    queries, distance = (torch.tensor(split.arrays[name][split.rows[row]], dtype=torch.float) for name in ("queries", "distance"))
    error = decoded_field(heads["sdf"], tokens, autocast)(queries)[:, 0] - (distance / TRUNCATION).clamp(-1, 1)
    return {"IoU": grid_iou(heads["sdf"], tokens, shape, autocast), "L1": error.abs().mean().item()} | results


def judge_pc(heads, tokens, split, row, rng, autocast, points):
    """Chamfer distance of 2048 points to as many true ones, EMD of 1024; floors: of a second true cloud. Normals and colours
    against those of the nearest true point."""
    cloud = heads["pc"].decode(tokens, heads, rng, autocast, points=2048)
    (true, normals, colours), other = split.shape(row).surface(2048, rng), split.shape(row).surface(2048, rng)[0]
    near = cKDTree(true).query(cloud.points)[1]
    return {"Chamfer": chamfer(cloud.points, true), "its floor": chamfer(other, true),
            "EMD": emd(cloud.points[:1024], true[:1024]), "EMD floor": emd(other[:1024], true[:1024]),
            "normal cosine": (cloud.normals * normals[near]).sum(1).mean(), "colour error": abs(cloud.colours - colours[near]).mean()}


def judge_mesh(heads, tokens, split, row, rng, autocast, points):
    """Faces within so many bins of the true ones in all nine coordinates; edges of the welded mesh that two faces share;
    Chamfer distance of 2048 visible points to the true surface, and of the true low-poly mesh; floor: of a second true cloud."""
    mesh, true = heads["mesh"].decode(tokens, heads, rng, autocast), split.arrays["corners"][split.rows[row]]
    true = true[true[:, 0, 0] >= 0]
    corners, best = quantise(mesh.vertices)[mesh.faces], (centres(true).reshape(-1, 3), np.arange(3 * len(true)).reshape(-1, 3))
    surface, other = (split.shape(row).surface(2048, rng)[0] for _ in range(2))
    return {"within 1 bin": faces_within(corners, true, 1), "within 2 bins": faces_within(corners, true, 2),
            "closed edges": closed_edges(mesh.faces), "Chamfer": chamfer(mesh.sample(2048, rng), surface),
            "of the true mesh": chamfer(sample_surface(*best, 2048, rng, hidden=False), surface), "its floor": chamfer(other, surface)}


def judge_gs(heads, tokens, split, row, rng, autocast, points, views=4):
    """PSNR, SSIM and the mean error of a colour channel where the true picture is all shape: 4 random views of
    128 x 128 pixels, on white."""
    g = heads["gs"].decode(tokens, heads, rng, autocast)
    results = []
    for _ in range(views):
        angles = rng.uniform(0, 360), rng.uniform(-20, 60)
        true = view(split.shape(row), *angles)
        inside, true = true[..., 3] == 1, true[..., :3] + 1 - true[..., 3:]                             # on white
        image = splat(*(torch.from_numpy(x) for x in (g.means, g.scales, g.rotations, g.opacities, g.colours)),
                      *angles, size=VIEW).clamp(0, 1).numpy()
        results.append((peak_signal_noise_ratio(true, image, data_range=1),
                        structural_similarity(true, image, data_range=1, channel_axis=-1), abs(true - image)[inside].mean()))
    return dict(zip(("PSNR", "SSIM", "colour error"), np.mean(results, 0)))


JUDGES = {"sdf": judge_sdf, "pc": judge_pc, "mesh": judge_mesh, "gs": judge_gs}
