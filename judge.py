"""judges.py - how close does a head's shape come to the true one? Each representation has its own metrics.

    JUDGES[rep](heads, tokens n c, a prepared set, row, rng, autocast, points) -> {metric: number}

points: for the F-score of sdf; 0 leaves it out, which saves time. evaluate.py prints the docstring of a judge.

    python evaluate.py tokenizer --rep sdf       # stage 1: held-out shapes, encoded and decoded
"""
import numpy as np
import torch
from scipy.spatial import cKDTree

from engine.networks import grid_points
from evaluation.metrics import chamfer, emd, faces_within, fscore, iou, psnr, ssim
from geometry.meshes import bin_centres, quantise, sample_surface
from geometry.splat import splat
from geometry.surface import TRUNCATION, sdf_grid
from geometry.training_samples import VIEW, draw_view
from heads import field_of

# ---------------------------------------------------------------------------- fields: points k 3 -> distance, colour

def occupancy(field, resolution=64):
    """Where the distance of a field is negative: bool, (resolution + 1)^3 grid vertices of [-1, 1]^3. Coarse to fine,
    as meshes are extracted: at 64 a third of the time of all points."""
    return sdf_grid(lambda x: field(x)[:, 0], resolution) < 0


def true_field(shape):
    """A field of a built-in shape, as that of a head: points k 3 -> distance, in truncations, and colour: k 4."""
    return lambda x: torch.from_numpy(np.column_stack(shape.field(x.numpy())) / [TRUNCATION, 1, 1, 1]).float()


def grid_iou(head, tokens, shape, autocast, resolution=64):
    """IoU of a decoded sdf (tokens n c) and the true shape, at all resolution^3 cell centres of [-1, 1]^3. A flat face
    near a layer of points flips all of them: the IoU of one shape depends on the grid. Compare means over one grid."""
    points = grid_points(resolution)                                              # k 3
    return iou((field_of(head, tokens, autocast)(points)[:, 0] < 0).numpy(), shape.distance(points.numpy()) < 0)


# ---------------------------------------------------------------------------- the judges

def judge_sdf(heads, tokens, split, row, rng, autocast, points):
    """IoU on a 64^3 grid; L1 of the distance, in truncations, at queries drawn as in training; F-score at .02 of the
    surfaces, by `points` points of each."""
    shape, results = split.shape(row), {}
    if points:
        surface = heads["sdf"].decode(tokens, heads, rng, autocast).surface(points, rng)[0]
        results = {"F-score": fscore(surface, shape.surface(points, rng)[0], .02)}
    arrays = (split.arrays[name][split.rows[row]] for name in ("queries", "distance"))
    queries, distance = (torch.tensor(x, dtype=torch.float) for x in arrays)      # k 3, k
    error = field_of(heads["sdf"], tokens, autocast)(queries)[:, 0] - (distance / TRUNCATION).clamp(-1, 1)
    return {"IoU": grid_iou(heads["sdf"], tokens, shape, autocast), "L1": error.abs().mean().item()} | results


def judge_pc(heads, tokens, split, row, rng, autocast, points):
    """Chamfer distance of 2048 points to as many true ones, EMD of 1024; floors: of a second true cloud. Normals and
    colours against those of the nearest true point."""
    cloud = heads["pc"].decode(tokens, heads, rng, autocast, points=2048)
    true, normals, colours = split.shape(row).surface(2048, rng)                  # k 3 each
    second = split.shape(row).surface(2048, rng)[0]                               # k 3
    nearest = cKDTree(true).query(cloud.points)[1]                                # k, rows of `true`
    return {"Chamfer": chamfer(cloud.points, true), "its floor": chamfer(second, true),
            "EMD": emd(cloud.points[:1024], true[:1024]), "EMD floor": emd(second[:1024], true[:1024]),
            "normal cosine": (cloud.normals * normals[nearest]).sum(1).mean(),
            "colour error": abs(cloud.colours - colours[nearest]).mean()}


def judge_mesh(heads, tokens, split, row, rng, autocast, points):
    """Faces within so many bins of the true ones in all nine coordinates; edges of the mesh that two faces share;
    Chamfer distance to the true surface of 2048 visible points, of the true low-poly mesh, of a second true cloud."""
    mesh, true = heads["mesh"].decode(tokens, heads, rng, autocast), split.arrays["corners"][split.rows[row]]
    found, true = quantise(mesh.vertices)[mesh.faces], true[true[:, 0, 0] >= 0]   # f 3 3, g 3 3, in bins
    true_mesh = bin_centres(true).reshape(-1, 3), np.arange(3 * len(true)).reshape(-1, 3)
    surface, second = (split.shape(row).surface(2048, rng)[0] for _ in range(2))  # k 3 each
    return {"within 1 bin": faces_within(found, true, 1), "within 2 bins": faces_within(found, true, 2),
            **mesh.soundness(), "Chamfer": chamfer(mesh.surface(2048, rng)[0], surface),
            "of the true mesh": chamfer(sample_surface(*true_mesh, 2048, rng, hidden=False)[0], surface),
            "its floor": chamfer(second, surface)}


def judge_gs(heads, tokens, split, row, rng, autocast, points):
    """PSNR, SSIM and the mean error of a colour channel in pixels that the shape fills: 4 random views of 128 x 128
    pixels, on white."""
    true_shape, shape, results = split.shape(row), heads["gs"].decode(tokens, heads, rng, autocast), []
    gaussians = shape.means, shape.scales, shape.rotations, shape.opacities, shape.colours
    for _ in range(4):
        angles = rng.uniform(0, 360), rng.uniform(-20, 60)
        true = draw_view(true_shape, *angles)                                     # s s 4
        inside, true = true[..., 3] == 1, true[..., :3] + 1 - true[..., 3:]       # s s and, on white, s s 3
        image = splat(*map(torch.from_numpy, gaussians), *angles, size=VIEW).clamp(0, 1).numpy()
        results.append((psnr(image, true), ssim(image, true), abs(true - image)[inside].mean()))
    return dict(zip(("PSNR", "SSIM", "colour error"), np.mean(results, 0)))


JUDGES = {"sdf": judge_sdf, "pc": judge_pc, "mesh": judge_mesh, "gs": judge_gs}
