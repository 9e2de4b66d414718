"""judge.py - how good is what a stage has learnt? Metrics and pictures of held-out shapes, in a run and in evaluate.py.

    JUDGES[rep](heads, tokens n c, a prepared set, row, rng, autocast, points) -> {metric: number}

compares the decoded shape with the true one; points: for the F-score of sdf; 0 skips it, which saves time. A new head
needs a line in JUDGES. Stages import this file when they end: nothing that is learnt depends on it.

    python evaluate.py tokenizer --rep sdf       # held-out shapes, encoded and decoded
"""
from collections import Counter

import numpy as np
import torch
from scipy.spatial import cKDTree
from tqdm import tqdm

from engine import processes
from engine.networks import grid_points
from geometry.meshes import bin_centres, quantise, sample_surface
from geometry.metrics import chamfer, chamfer_matrix, emd, faces_within, fscore, iou, psnr, ssim
from geometry.render import contact_sheet, save_png
from geometry.shapes import CLASSES
from geometry.splat import splat
from geometry.surface import TRUNCATION
from geometry.training_samples import VIEW, draw_view
from geometry.words import article
from heads import field_of

SHAPES = 52         # held-out shapes on which a stage measures a head
save_picture = processes.first_process_only(save_png)

# ---------------------------------------------------------------------------- one shape

def grid_iou(head, tokens, shape, autocast, resolution=64):
    """IoU of a decoded sdf (tokens n c) and the true shape, at all resolution^3 cell centres of [-1, 1]^3. A flat face
    near a layer of points flips all of them: the IoU of one shape depends on the grid. Compare means over one grid."""
    points = grid_points(resolution)                                              # k 3
    return iou((field_of(head, tokens, autocast)(points)[:, 0] < 0).numpy(), shape.distance(points.numpy()) < 0)


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


# ---------------------------------------------------------------------------- a run

def classes_and_prompts(train, test, built_in):
    """The classes that samples are judged by, those of the held-out shapes; and the prompts that are sampled while
    training: the most common training classes. (Names of held-out families were never learnt.)"""
    if built_in:
        classes = [name for name in CLASSES if name in {*test.classes}]
        return classes, [article(name) for name in classes] + ["a round table"] * ("table" in classes)
    common = [name for name, _ in Counter(train.classes).most_common(len(CLASSES))]
    return [name for name in common if name in {*test.classes}], [article(name) for name in common]


def class_accuracy(run, encoders, generate, heads, n=4, points=1024):
    """n samples of every class name: the share whose nearest held-out shape (Chamfer distance) is of that class; {}, if
    no training class is among the held-out shapes."""
    if not run.classes:
        return {}
    names, rng = [name for name in run.classes for _ in range(n)], np.random.default_rng(0)
    with run.autocast():
        tokens = generate(encoders.encode(names), [(0, i) for i in range(len(names))])        # b n c
    clouds = torch.stack([torch.from_numpy(decode(run, heads, x).surface(points, rng)[0]) for x in tokens])      # b k 3
    references = run.test.cloud(range(len(run.test)), points, np.random.default_rng(0))[0]                 # r k 3
    nearest = chamfer_matrix(clouds, references).argmin(1)                        # b
    right = np.mean([run.test.classes[row] == name for row, name in zip(nearest, names)])
    return {"nearest held-out shape is of the right class": round(float(right), 4)}


def head_metrics(run, heads, tokens, rep):
    """The metrics of one head on held-out shapes; tokens n c of the rows 0, 1 ... of the set."""
    results = [JUDGES[rep](heads, x.to(run.device), run.test, row, np.random.default_rng(row), run.autocast, points=0)
               for row, x in enumerate(tqdm(tokens, desc="held-out shapes", leave=False))]
    means = {name: np.mean([result[name] for result in results]) for name in results[0]}
    return {"shapes": len(results)} | {name: round(float(value), 4) for name, value in means.items()}


def decode(run, heads, tokens, rep=None):
    """Tokens n c -> a small shape, by the head of `rep`, default: the one that the tokenizer was trained with."""
    head, rng = heads[rep or run.first[-1]], np.random.default_rng(0)
    return head.decode(tokens.to(run.device), heads, rng, run.autocast, resolution=64, points=2048)


def samples(run, heads, tokens):
    """A contact sheet of a sample for each prompt of a run."""
    return contact_sheet([decode(run, heads, x).picture(160) for x in tokens], 7, run.prompts)


def reconstructions(run, heads, tokens, rep):
    """A contact sheet of held-out shapes, encoded and decoded."""
    return contact_sheet([decode(run, heads, x, rep).picture(160) for x in tokens], 7)
