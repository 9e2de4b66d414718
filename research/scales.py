"""scales.py - what the codes of vat.py keep of a shape, and which parts of its tokenizer matter.

    python evaluate.py scales          # scale after scale: bytes, IoU, F-score; code use
    python evaluate.py ablate-vat      # trains the variants of evaluation/vat_parts.py
"""
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import vat
from engine.codes import code_use, file_size
from engine.commands import UserError, pick_device
from engine.files import trained_stages
from evaluation import exam
from evaluation.experiments import refuse_trained, train_stages
from evaluation.judges import grid_iou
from evaluation.metrics import fscore
from evaluation.results import interval, labels, write_table
from evaluation.vat_parts import SECOND_PHASE, VARIANTS


def file_sizes(quantiser):
    """How many codes the first 1, 2 ... K scales have together, and the bytes of a file of them."""
    counts = np.cumsum(quantiser.counts)
    return counts, file_size(counts, quantiser.book.bits)


@torch.no_grad()
def judge_scales(args, label, folder):
    """-> {"codes": of held-out shapes, r N; IoU, F-score of what the first 1, 2 ... K scales keep: r K}, quantiser."""
    if "vat-codes" not in trained_stages(folder):
        raise UserError(f"{folder} holds no codes of vat.py; --checkpoint takes checkpoints/vat")
    device, autocast, reason = pick_device(args.device, args.precision)
    print(f"{folder}, running on {reason}")
    model, decoder = (part.to(device) for part in vat.load_tokenizer(folder, VARIANTS))
    test = exam.held_out(args)
    stages, results = ("vat-codes", "vat-decoder"), []
    cache = exam.result_cache(args, label, folder, *stages, what="scales", points=args.points, grid=args.grid)
    for row in tqdm(range(min(args.shapes, len(test))), unit="shape"):
        if str(row) not in cache:
            rng, shape = np.random.default_rng((args.seed, row)), test.shape(row)
            with autocast():
                indices = model.codes(*(x.to(device) for x in test.cloud([row], model.points, rng)))              # 1 N
            kept = [vat.as_rows(f)[0] for f in model.quantiser.decode(indices)[1:]]   # after each scale, n c
            overlaps = [grid_iou(decoder, x, shape, autocast, args.grid) for x in kept]
            result = {"codes": indices[0].cpu().numpy(), "IoU": overlaps}
            if args.points:
                true = shape.surface(args.points, rng)[0]                         # k 3
                meshes = [decoder.decode(x, {}, rng, autocast) for x in kept]
                result["F-score"] = [fscore(mesh.surface(args.points, rng)[0], true, .02) for mesh in meshes]
            cache.write(str(row), result)
        results.append(cache.read(str(row)))
    return {key: np.stack([result[key] for result in results]) for key in results[0]}, model.quantiser


def use_of(found, quantiser):
    """-> {"code use", "perplexity"} of the codes that judge_scales found."""
    use = code_use(torch.from_numpy(found["codes"]), len(quantiser.book.code))
    return {key: x.item() for key, x in use.items()}


def evaluate_scales(args):
    """How good is a shape from its first scales of codes alone, and how many bytes would these take?"""
    rows, use = [], []
    for folder, label in labels(args.checkpoint).items():
        found, quantiser = judge_scales(args, label, folder)
        counts, sizes = file_sizes(quantiser)
        rows += [{"checkpoint": label, "scales": " ".join(map(str, quantiser.scales[:k + 1])), "codes": str(counts[k]),
                  "bytes": str(sizes[k])} | {key: found[key][:, k].mean() for key in found if key != "codes"}
                 for k in range(len(counts))]
        use.append({"checkpoint": label, "CS-IoU": found["IoU"].mean()} | use_of(found, quantiser))
    print(f"bytes: of a file. IoU on a {args.grid}^3 grid; F-score at .02. CS-IoU: mean IoU over the scales.\n"
          "code use: share of all codes that occur in these shapes; perplexity: the effective number of codes")
    write_table(args.out, "scales", rows, draw=draw_curve)
    write_table(args.out, "scales-use", use)


def draw_curve(plt, rows):
    """Bytes to the right, IoU and F-score upwards; a line a checkpoint."""
    keys = [key for key in ("IoU", "F-score") if key in rows[0]]
    figure, axes = plt.subplots(1, len(keys), figsize=(4.5 * len(keys), 3.5), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], keys):
        for label in dict.fromkeys(row["checkpoint"] for row in rows):
            own = [row for row in rows if row["checkpoint"] == label]
            axis.plot([int(row["bytes"]) for row in own], [row[key] for row in own], "o-", label=label, markersize=4)
        axis.set(xlabel="bytes", title=key, xscale="log")
        sizes = sorted({int(row["bytes"]) for row in rows})
        axis.set_xticks(sizes, labels=map(str, sizes))
        axis.minorticks_off()
        axis.grid(linewidth=.3)
    axes[0, 0].legend(fontsize="small")
    return figure


# ---------------------------------------------------------------------------- variants

TITLES = {"": "in context, VVQ, three planes", "pooling": "features pooled", "q-former": "a Q-Former of one layer",
          "plain": "plain residual quantiser", "scale-dropout": "VVQ with scale dropout",
          "cross-attention": "decoder: cross-attention"}
SHARES = {"IoU", "CS-IoU", "code use", *exam.SHARES}          # columns that never exceed 1
GENERATED = "", "plain", "scale-dropout"                      # the quantisers: with all seeds, and generators, too


def compare_tokenizers(args):
    """Trains vat.py with one part replaced at a time, quantisers once a seed: what do codes keep, what is generated?"""
    refuse_trained(args, "vat-codes")
    rows, benchmark = [], exam.Exam(args, args.n, args.shapes)
    for variant, title in TITLES.items():
        stages = ["vat-codes"] if variant in SECOND_PHASE else ["vat-latents", "vat-codes"]
        stages += ["vat-generator"] * (variant in GENERATED)
        scores = []
        for seed in range(args.seeds if variant in GENERATED else 1):
            flags = {"--model": "vat", "--variant": variant or None}
            if variant in SECOND_PHASE:                       # phase 1 is that of vat.py itself
                flags["--from"] = Path(args.runs) / f"vat-{seed}"
            folder = train_stages(args, f"{variant or 'vat'}-{seed}", seed, flags, stages)
            found, quantiser = judge_scales(args, folder.name, folder)
            scores.append({"IoU": found["IoU"][:, -1].mean(), "CS-IoU": found["IoU"].mean()}
                          | use_of(found, quantiser))
            if variant in GENERATED:
                model = exam.open_model(args, folder)
                cache = exam.result_cache(args, folder.name, folder, *exam.stages_of(args.rep), what="variants")
                made, _, _ = benchmark.scores(model, cache)
                scores[-1] |= {key: made[key] for key in ("prompt score", "R-precision", "Chamfer to described",
                                                          "kernel", "right class", "one piece")}
        rows.append({"tokenizer": title, "trainings": str(len(scores))}
                    | {key: interval([score[key] for score in scores], 1 if key in SHARES else np.inf)
                       for key in scores[0]})
    print("means of all trainings; of several with 95 % confidence intervals. The columns are those of evaluate.py "
          f"scales, with IoU on a {args.grid}^3 grid, and of generate")
    keys = max(rows, key=len)
    write_table(args.out, args.command, [{key: row.get(key, "") for key in keys} for row in rows])
