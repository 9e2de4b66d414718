"""rgs.py - Reconstruction-Guided Sampling (LTM3D section 3.4): fidelity against diversity, by rules and weights.

    python evaluate.py ablate-rgs --shapes 13 --seeds 3
"""
from itertools import product

import numpy as np
import torch

from data import seeded
from geometry.metrics import chamfer_matrix
from geometry.training_samples import PICTURES, SURFACE
from prompts import image_tower
from research import exam
from research.metrics import cosine, kernel_distance
from research.results import interval, labels, write_table
from research.scores import Scorer

WITHIN = 1, 1.5, 2                                           # reaches of our rule, in standard deviations
SCORES, LEFT = ("prompt score", "Chamfer to described", "kernel"), "share of diversity less floor"


def rgs_rules(args):
    """{name of the rule: options of sampling}"""
    rules = {"sampling only": {"rgs": "none"}} | {f"a = {a:g}": {"rgs": f"sampled={a}"} for a in args.alphas}
    rules |= {f"a = 0.1, {share:g} of the steps": {"rgs": "sampled=.1", "window": share} for share in args.windows}
    return rules | {f"within {s:g} sigma": {"rgs": f"within={s}"} for s in WITHIN}


def rgs_scores(results, n, prompt_features, described, others, scorer):
    """n samples of each of r prompts (features r e) of r shapes (clouds r k 3) -> how faithful, how diverse, how like
    other held-out shapes (features s e)."""
    k, same = exam.POINTS, torch.eye(n, dtype=torch.bool)
    features = scorer.clouds(*(results[name][:, :k] for name in exam.CLOUD))      # (r n) e
    points = torch.from_numpy(results["points"])                                  # (r n) 2k 3
    first, second = points[:, :k].contiguous().split(n), points[:, k:].contiguous().split(n)      # r times n k 3
    near = [chamfer_matrix(own, shape[None]).tolist() for own, shape in zip(first, described)]
    pairs = [chamfer_matrix(*halves) for halves in zip(first, second)]            # r times n n
    diversity = np.mean([matrix[~same].mean().item() for matrix in pairs])
    floor = np.mean([matrix[same].mean().item() for matrix in pairs])             # two halves of one cloud
    return {"prompt score": np.diag(cosine(np.repeat(prompt_features, n, 0), features)).mean(),
            "Chamfer to described": np.mean(near), "kernel": kernel_distance(features, others),
            "diversity less floor": diversity - floor}


def ablate_rgs(args):
    """Compares the rules and weights of RGS by fidelity and diversity, with 95 % confidence intervals."""
    test, rows = exam.held_out(args, (SURFACE, PICTURES)), np.arange(args.shapes)
    scorer, tower, table = Scorer(args.scorer, args.device), image_tower.load(args.scorer), []
    (folder, label), = labels(args.checkpoint).items()
    model = exam.open_model(args, folder)
    result_of = exam.shape_result(model, args.rep, args.resolution, 2 * exam.POINTS)
    pictures = test.pictures(rows, seeded(args.seed))              # r 3 s s
    names, captions = [test.classes[row] for row in rows], exam.longest_captions(test, rows)
    with torch.no_grad():
        features = {"name": scorer.texts(names), "caption": scorer.texts(captions),
                    "picture": tower.embed(tower.tokens(pictures)[0]).numpy()}    # r e each
    prompts = {"name": [(text, None) for text in names], "caption": [(text, None) for text in captions],
               "picture": [(None, picture) for picture in pictures]}
    described = test.cloud(rows, exam.POINTS, seeded(args.seed))   # points, normals, colours: r k 3 each
    rest = range(args.shapes, len(test)) or rows              # the other held-out shapes, where there are any
    others = scorer.clouds(*test.cloud(rest, exam.POINTS, seeded(args.seed)))            # s e
    for kind in prompts:
        score = np.diag(cosine(features[kind], scorer.clouds(*described))).mean()
        table.append({"prompt": kind, "rule": "(the shapes)"} | dict.fromkeys([*SCORES, LEFT], "") | {SCORES[0]: score})
        plain = None                                          # the scores of sampling only, the first rule
        for rule, options in rgs_rules(args).items():
            scores = []
            for seed in range(args.seed, args.seed + args.seeds):
                cache = exam.result_cache(args, f"{label}/{kind}, {rule}, {seed}", folder, options=options, sample=seed)
                jobs = [exam.Job(f"{kind}-{row}-{i}", *prompts[kind][row], (seed, int(row), i))
                        for row, i in product(rows, range(args.n))]
                results = exam.sample_all(model, jobs, cache, result_of, **options)
                scores.append(rgs_scores(results, args.n, features[kind], described[0], others, scorer))
            plain = plain or scores
            left = [score["diversity less floor"] / base["diversity less floor"] for score, base in zip(scores, plain)]
            table.append({"prompt": kind, "rule": rule}
                         | {key: interval([score[key] for score in scores]) for key in SCORES} | {LEFT: interval(left)})
    print(f"{len(rows)} prompts of a kind, {args.n} samples each, {args.seeds} samplings. a: weight of the samples.\n"
          "diversity: mean Chamfer distance of pairs of samples of a prompt; its share of that of sampling only")
    write_table(args.out, args.command, table)
