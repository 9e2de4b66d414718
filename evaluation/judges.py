"""evaluation/judges.py - how near does a head come? Its shape against the true one, each representation in its own way.

    judge(heads, tokens n c, a prepared set, row, rng, autocast, points) -> {name: number}      what JUDGES has for each

    python evaluate.py tokenizer --rep sdf       # stage 1: held-out shapes, encoded and decoded
"""
import numpy as np
import torch
from scipy.spatial import cKDTree

from engine.networks import grid_points
from evaluation.metrics import chamfer, emd, faces_within, fscore, iou, psnr, ssim
from geometry.meshes import bin_centres, closed_edges, quantise, sample_surface
from geometry.render import splat
from geometry.surface import TRUNCATION, sdf_grid
from geometry.training_samples import VIEW, view

# ---------------------------------------------------------------------------- fields

def occupancy(field, resolution=64):
    """Where the distance of a field (below) is negative: bool, (resolution + 1)^3 grid vertices of [-1, 1]^3.
    Hierarchical, as meshes are extracted: a third of the time of asking every point at 64."""
    return sdf_grid(lambda x: field(x)[:, 0], resolution) < 0


def decoded_field(head, tokens, autocast):
    """Tokens n c -> a function of points k 3 giving distance (in truncations) and colour, k 4, on the CPU."""
    @torch.no_grad()
    def ask(x):
        with autocast():
            return torch.cat([head.evaluate(memory, part[None].to(tokens.device))[0].cpu() for part in x.split(2 ** 15)])

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


# ---------------------------------------------------------------------------- the judges

def judge_sdf(heads, tokens, split, row, rng, autocast, points):
    """IoU on a 64^3 grid; L1 of the distance, in truncations, at queries drawn as in training; F-score at .02 of the
    surfaces, unless `points` a side is 0."""
    shape, results = split.shape(row), {}
    if points:
        surface = heads["sdf"].decode(tokens, heads, rng, autocast).surface(points, rng)[0]
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
    corners, best = quantise(mesh.vertices)[mesh.faces], (bin_centres(true).reshape(-1, 3), np.arange(3 * len(true)).reshape(-1, 3))
    surface, other = (split.shape(row).surface(2048, rng)[0] for _ in range(2))
    return {"within 1 bin": faces_within(corners, true, 1), "within 2 bins": faces_within(corners, true, 2),
            "closed edges": closed_edges(mesh.faces), "Chamfer": chamfer(mesh.surface(2048, rng)[0], surface),
            "of the true mesh": chamfer(sample_surface(*best, 2048, rng, hidden=False)[0], surface), "its floor": chamfer(other, surface)}


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
        results.append((psnr(image, true), ssim(image, true), abs(true - image)[inside].mean()))
    return dict(zip(("PSNR", "SSIM", "colour error"), np.mean(results, 0)))


JUDGES = {"sdf": judge_sdf, "pc": judge_pc, "mesh": judge_mesh, "gs": judge_gs}
