"""evaluation/progress.py - what a training run shows of itself: figures and pictures of held-out shapes.

    python train.py --rep sdf        # what calls it, after every stage and on the way
"""
import numpy as np
import torch
from tqdm import tqdm

from evaluation.judges import JUDGES
from evaluation.metrics import chamfer_matrix
from geometry.render import contact_sheet


def class_accuracy(run, encoders, model, heads, n=4, points=1024):
    """n samples of every class name: the share whose nearest held-out shape, under Chamfer distance, is of that class."""
    names, rng = [name for name in run.classes for _ in range(n)], np.random.default_rng(0)
    with run.autocast():
        tokens = model.generate(encoders.encode(names), seeds=[(0, i) for i in range(len(names))])
    clouds = [torch.from_numpy(decoded(run, heads, t).surface(points, rng)[0]) for t in tokens]
    references = run.test.cloud(range(len(run.test)), points, np.random.default_rng(0))[0]
    nearest = chamfer_matrix(torch.stack(clouds), references).argmin(1)
    return round(float(np.mean([run.test.classes[row] == name for row, name in zip(nearest, names)])), 4)


def head_metrics(run, heads, tokens, rep):
    """The head's own figures on held-out shapes, rows 0 ... of the set."""
    each = [JUDGES[rep](heads, t.to(run.device), run.test, row, np.random.default_rng(row), run.autocast, points=0)
            for row, t in enumerate(tqdm(tokens, desc="held-out shapes", leave=False))]
    return {"shapes": len(each)} | {name: round(float(np.mean([one[name] for one in each])), 4) for name in each[0]}


def decoded(run, heads, tokens):
    """Tokens n c -> a shape, by the head that the encoder was trained for, small."""
    return heads[run.first[-1]].decode(tokens.to(run.device), heads, np.random.default_rng(0), run.autocast, resolution=64, points=2048)


def picture(run, heads, tokens):
    return decoded(run, heads, tokens).picture(160)


def reconstructions(run, heads, tokens, rep):
    """Held-out shapes, encoded and decoded."""
    shapes = (heads[rep].decode(t.to(run.device), heads, np.random.default_rng(0), run.autocast, resolution=64, points=2048)
              for t in tokens)
    return contact_sheet([shape.picture(160) for shape in shapes], 7)
