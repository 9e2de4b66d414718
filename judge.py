"""judge.py - evaluates stages: metrics and pictures of held-out shapes, in a run and in evaluate.py.

How one decoded shape is compared with the true one is the representation's own (representations/, `judge`).

    python evaluate.py tokenizer --rep sdf       # held-out shapes, encoded and decoded
"""
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from data import seeded
from engine import processes
from engine.noise import keys_of
from geometry import page
from geometry.metrics import chamfer_matrix
from geometry.render import contact_sheet, save_png
from geometry.shapes import CLASSES
from geometry.words import article
from prompts import text_tower
from representations import REPRESENTATIONS

SHAPES = 26         # held-out shapes on which a stage measures a head


@processes.first_process_only
def save_picture(path, picture):
    """A picture of a stage in training; the page of the run shows it."""
    save_png(path, picture)
    page.write_run(path.parent)


write_page = processes.first_process_only(page.write_run)


# ---------------------------------------------------------------------------- a run

def classes_and_prompts(train, test, built_in):
    """The classes of `class_accuracy`, those of the held-out shapes; and the prompts of training pictures: the most
    common training classes. (Names of held-out families have no training shapes.)"""
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
        keys = keys_of([(0, i) for i in range(len(names))], run.device)
        tokens = generate(encoders.encode(names), keys)       # b n c
    clouds = torch.stack([torch.from_numpy(decode(run, heads, x).surface(points, rng)[0]) for x in tokens])      # b k 3
    references = run.test.cloud(range(len(run.test)), points, seeded(0, run.test.device))[0].cpu()         # r k 3
    nearest = chamfer_matrix(clouds, references).argmin(1)                        # b
    right = np.mean([run.test.classes[row] == name for row, name in zip(nearest, names)])
    return {"nearest held-out shape is of the right class": round(float(right), 4)}


def head_metrics(run, heads, tokens, rep):
    """The metrics of one head on held-out shapes, with the tokens n c of run.test.spread(SHAPES)."""
    results = []
    for row, x in zip(run.test.spread(SHAPES), tqdm(tokens, desc="held-out shapes", leave=False)):
        rng = np.random.default_rng(row)
        results.append(heads[rep].judge(heads, x.to(run.device), run.test, row, rng, run.autocast, points=0))
    found = {name: [result[name] for result in results if result[name] == result[name]] for name in results[0]}
    return {"shapes": len(results)} | {name: round(float(np.mean(x)), 4) for name, x in found.items() if x}     # no nan


def decode(run, heads, tokens, rep=None):
    """Tokens n c -> a coarse shape, by the head of `rep`, default: the last head trained with the tokenizer."""
    rep, rng = rep or run.joint[-1], np.random.default_rng(0)
    return heads[rep].decode(tokens.to(run.device), heads, rng, run.autocast, **REPRESENTATIONS[rep].preview)


@torch.no_grad()
def samples(run, encoders, generate, heads):
    """A contact sheet of a sample for each prompt of a run. generate: condition and keys -> tokens b n c."""
    with run.autocast():
        tokens = generate(encoders.encode(run.prompts), keys_of(range(len(run.prompts)), run.device))
    return contact_sheet([decode(run, heads, x).picture(160) for x in tokens], 7, run.prompts)


def reconstructions(run, heads, tokens, rep):
    """A contact sheet of held-out shapes, encoded and decoded."""
    return contact_sheet([decode(run, heads, x, rep).picture(160) for x in tokens], 7)


# ---------------------------------------------------------------------------- the towers

@torch.no_grad()
def caption_retrieval(encoders, prepared, count=200):
    """On held-out shapes: accuracy of class names by clouds, recall of clouds by full captions; from 0 to 1."""
    rows = prepared.spread(count)                             # m
    clouds = prepared.cloud(rows, text_tower.POINTS, seeded(0, prepared.device))
    points = [x.to(encoders.scale.device) for x in clouds]
    cloud = torch.cat([encoders.embed_cloud(*chunk) for chunk in zip(*(x.split(64) for x in points))])       # m e

    names = sorted(set(prepared.classes))
    nearest_name = (cloud @ encoders.embed_text(*encoders.word_ids(names)).T).argmax(1).tolist()             # m
    right = sum(names[i] == prepared.classes[row] for i, row in zip(nearest_name, rows)) / len(rows)

    # a caption is also true of a shape with the same class and attributes, and of a shape that has the same caption
    captions = [max(prepared.captions[row], key=len) for row in rows]
    labels = [(prepared.classes[row], prepared.records[row]["attributes"]) for row in rows]
    true = torch.tensor([[label == other or caption in prepared.captions[row] for other, row in zip(labels, rows)]
                         for label, caption in zip(labels, captions)])            # m m
    order = (encoders.embed_text(*encoders.word_ids(captions)) @ cloud.T).argsort(1, descending=True).cpu()  # m m
    recall = {f"recall_at_{k}": round(true.gather(1, order[:, :k]).any(1).float().mean().item(), 4) for k in (1, 5)}
    return {"shapes": len(rows), "class_accuracy": right} | recall


@torch.no_grad()
def embed_clouds(encoders, prepared):
    """Cloud embeddings of all shapes of a prepared set: k out."""
    chunks = np.array_split(np.arange(len(prepared)), -(-len(prepared) // 128))
    clouds = (prepared.cloud(rows, text_tower.POINTS, seeded(rows[0], prepared.device)) for rows in chunks)
    return torch.cat([encoders.embed_cloud(*(x.to(encoders.scale.device) for x in cloud)).float() for cloud in clouds])


@torch.no_grad()
def picture_retrieval(vision, encoders, prepared, count=200):
    """Recall of the clouds of held-out shapes by their pictures, from any side; from 0 to 1."""
    clouds = embed_clouds(encoders, prepared)                                     # k out
    rows = prepared.spread(count)                             # m
    pictures = prepared.pictures(rows, seeded(0, prepared.device))                # m 3 s s
    embedded = torch.cat([vision.embed(vision.tokens(chunk)[0]) for chunk in pictures.split(64)])            # m out
    order = (embedded @ clouds[rows].T).argsort(1, descending=True).cpu()         # m m
    right = order == torch.arange(len(rows))[:, None]                             # m m
    recall = {f"recall_at_{k}": round(right[:, :k].any(1).float().mean().item(), 4) for k in (1, 5)}
    return {"shapes": len(rows)} | recall
