"""evaluation/rgs.py - Reconstruction-Guided Sampling: what does it bring, what does it cost, can it cost less?

LTM3D blends what is known with a first guess in the first steps: nearer to the prompt, but all samples nearer to one another. Here the
blend at several weights a, in both readings of the paper (figure: a is the weight of the sampled tokens; text: of the guess), and for
several shares of the steps, beside a rule of ours (reconstruct.py): tokens are shown as they are, within so many standard deviations
of the guess. Fidelity is the prompt score and, where a prompt describes a shape, the Chamfer distance to it; diversity the mean Chamfer
distance of pairs of samples of a prompt, over that of sampling only.

    python evaluate.py ablate-rgs --rep sdf
"""
from itertools import product
from pathlib import Path

import numpy as np
import torch

from data import prepare
from engine.commands import UserError
from evaluation.exam import POINTS, Job, Scorer, kept, made, parts, shape
from evaluation.metrics import chamfer_matrix, cosine
from evaluation.results import interval, labels, report
from prompts import image_tower
from sample import LTM3D

PROMPTS = ("name", "caption", "picture")


def rules(args):
    """Name of the rule -> its a in either reading, its window, options of sampling."""
    blends = [(a, .75) for a in args.alphas] + [(.1, window) for window in args.windows]
    return {"sampling only": ("", "", "", {"alpha": None})} \
        | {f"a = {a:g}" + f", {window:g} of the steps" * (window != .75):
           (f"{a:g}", f"{1 - a:g}", f"{window:g}", {"alpha": a, "window": window}) for a, window in blends} \
        | {f"within {reach:g} sigma": ("", "", "0.75", {"within": reach}) for reach in args.within}


def pairs(points, n):
    """points (s n) k 3, s prompts -> mean Chamfer distance of different samples of one prompt, and of two halves of the same sample."""
    halves = points[:, :POINTS].contiguous(), points[:, POINTS:].contiguous()
    each = [chamfer_matrix(one, other) for one, other in zip(*(half.split(n) for half in halves))]
    same = torch.eye(n, dtype=torch.bool)
    return np.mean([m[~same].mean().item() for m in each]), np.mean([m[same].mean().item() for m in each])


def ablate_rgs(args):
    """Reconstruction-Guided Sampling, the paper's rule and ours: fidelity against diversity."""
    if Path(args.scorer).suffix == ".py" and "picture" in args.prompts:
        raise UserError(f"{args.scorer} has no features of pictures; give --prompts name caption, or a trained folder for --scorer")
    test = prepare("test", out=args.cache, kinds=("surface", "pictures"))
    rows, scorer, (folder, label) = np.arange(args.shapes), Scorer(args.scorer, args.device or "cpu"), *labels(args.checkpoint[:1]).items()
    model, sight = LTM3D(folder, args.device), image_tower.load(args.scorer) if "picture" in args.prompts else None
    pictures, captions = test.pictures(rows, np.random.default_rng(args.seed)), [max(test.captions[row], key=len) for row in rows]
    told = {"name": ([test.classes[row] for row in rows], None), "caption": (captions, None), "picture": (None, pictures)}
    real = test.cloud(rows, POINTS, np.random.default_rng(args.seed))
    true, table = real[0], []
    print(f"{folder}, running on {model.reason}")
    for kind, (rule, (figure, text, window, options)) in product(args.prompts, rules(args).items()):
        said, seen = told[kind]
        asked = scorer.texts(said) if said else sight.embed(sight.tokens(seen)[0]).numpy()
        seeds = []
        for seed in range(args.seed, args.seed + args.seeds):
            keep = kept(args, f"{label}/{kind}, {rule}, {seed}", folder, *parts(args.rep), "vision", options=options, sample=seed)
            jobs = [Job(f"{kind}-{row}-{i}", said and said[row], None if seen is None else seen[row], (seed, int(row), i))
                    for row in rows for i in range(args.n)]
            results = made(model, jobs, keep, shape(model, args.rep, args.resolution, 2 * POINTS), **options)
            features = scorer.clouds(*(results[key][:, :POINTS] for key in ("points", "normals", "colours")))
            points = torch.from_numpy(results["points"])
            near = np.mean([chamfer_matrix(points[i:i + 1, :POINTS], true[i // args.n:i // args.n + 1]).item() for i in range(len(points))])
            apart, floor = pairs(points, args.n)
            seeds.append({"prompt score": np.diag(cosine(np.repeat(asked, args.n, 0), features)).mean(), "Chamfer to described": near,
                          "diversity": apart, "diversity less floor": apart - floor})
        if rule == "sampling only":                           # the first
            plain = seeds
            table.append({"prompt": kind, "rule": "(the shapes themselves)", "a, figure": "", "a, text": "", "window": "",
                          "prompt score": np.diag(cosine(asked, scorer.clouds(*real))).mean(), "Chamfer to described": "",
                          "share of diversity": "", "share of diversity less floor": ""})
        row = {"prompt": kind, "rule": rule, "a, figure": figure, "a, text": text, "window": window}
        row |= {key: interval([one[key] for one in seeds]) for key in ("prompt score", "Chamfer to described")}
        table.append(row | {f"share of {key}": interval([one[key] / base[key] for one, base in zip(seeds, plain)])
                            for key in ("diversity", "diversity less floor")})
    of = f"means of {args.seeds} samplings of the same prompts and 95 % confidence intervals" if args.seeds > 1 else "one sampling"
    print(f"{len(rows)} prompts of a kind, {args.n} samples each, {of}. share of diversity:\n"
          "mean Chamfer distance of pairs of samples of one prompt over that of sampling only; less floor: less that of two samplings of one surface")
    report(args.out, args.command, table, draw=draw)


def draw(plt, rows):
    """A panel a kind of prompt: diversity to the right, prompt score upwards."""
    kinds = list(dict.fromkeys(row["prompt"] for row in rows))
    drawn, axes = plt.subplots(1, len(kinds), figsize=(5.5 * len(kinds), 4.2), squeeze=False, layout="constrained")
    for axis, kind in zip(axes[0], kinds):
        of = [row for row in rows if row["prompt"] == kind]
        axis.axhline(of[0]["prompt score"], color="grey", linewidth=.5, linestyle="dashed", label="the shapes themselves")
        axis.legend(loc="lower left", fontsize="x-small")
        for row in of[1:]:
            place = (row[key] for key in ("share of diversity less floor", "prompt score"))
            (x, dx), (y, dy) = (each if isinstance(each, tuple) else (each, 0) for each in place)
            colour = {"s": "black", "a": "#4c72b0", "w": "#c44e52"}[row["rule"][0]]
            axis.errorbar(x, y, dy, dx, "o", color=colour, elinewidth=.5, markersize=4)
            aside = dict(xytext=(-1, -3), ha="right", va="top") if row["rule"][0] == "w" else dict(xytext=(1, 3))
            axis.annotate(row["rule"], (x, y), textcoords="offset points", size="x-small", color=colour, rotation=55, **aside)
        axis.margins(.16, .24)                                # room for the labels
        axis.set(title=f"asked with a {kind}", xlabel="share of the diversity of sampling only, less floor", ylabel="prompt score")
    return drawn
