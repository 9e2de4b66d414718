"""progress.py - what a training run shows of itself: metrics and pictures of held-out shapes."""
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from evaluation.judges import JUDGES
from evaluation.metrics import chamfer_matrix
from geometry.render import contact_sheet
from geometry.shapes import CLASSES
from geometry.words import article


def classes_and_prompts(train, test, built_in):
    """The classes that samples are judged by, those of the held-out shapes; and the prompts that are drawn while
    training, of the most common training classes: where families are held out, their names were never learnt."""
    if built_in:
        classes = [name for name in CLASSES if name in {*test.classes}]
        return classes, [article(name) for name in classes] + ["a round table"] * ("table" in classes)
    common = [name for name, _ in Counter(train.classes).most_common(len(CLASSES))]
    return [name for name in common if name in {*test.classes}], [article(name) for name in common]


def class_accuracy(run, encoders, generate, heads, n=4, points=1024):
    """n samples of every class name: the share whose nearest held-out shape (Chamfer distance) is of that class; none,
    if no class of the training set is among the held-out shapes."""
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
    """Tokens n c -> a small shape, by the head of `rep` or else by the one that the encoder was trained for."""
    head, rng = heads[rep or run.first[-1]], np.random.default_rng(0)
    return head.decode(tokens.to(run.device), heads, rng, run.autocast, resolution=64, points=2048)


def samples(run, heads, tokens):
    """A contact sheet of what a generator made of the prompts of a run."""
    return contact_sheet([decode(run, heads, x).picture(160) for x in tokens], 7, run.prompts)


def reconstructions(run, heads, tokens, rep):
    """A contact sheet of held-out shapes, encoded and decoded."""
    return contact_sheet([decode(run, heads, x, rep).picture(160) for x in tokens], 7)
