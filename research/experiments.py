"""experiments.py - the ablations: what is the gain of a part, or of another one in its place?

Variants are trained on the same tokens, prompts and shapes, for the same number of steps (or of FLOPs), with several
seeds and LTM3D's learning rate. Experiments share what is trained already: `python evaluate.py versus` (VARIANTS).
"""
import functools
import math
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

import train
from backbone import BACKBONES, known_counts
from data import prepare, seeded
from engine.commands import UserError
from engine.files import read_config, read_stage, read_weights, signatures
from engine.stage import RELATIVES
from geometry.metrics import chamfer, chamfer_matrix
from research import exam, metrics
from research.bench import random_backbone, training_flops
from research.results import interval, write_table
from research.scores import Exam

GUIDANCE = 1.5, 2., 3., 4.      # for each variant the one with the best prompt score on captions of validation shapes
VARIANTS = {  # experiment: {variant: (flags of training, "steps" or "FLOPs" as many as LTM3D, options of sampling)}
    "versus": {
        "LTM3D": ("", "steps", {}),
        "LTM3D, a token a step": ("", "steps", {"steps": 64}),
        "LTM3D, RGS": ("", "steps", {"rgs": "sampled=.1"}),
        "LTM3D, RGS within 1.5 sigma": ("", "steps", {"rgs": "within=1.5"}),
        "latent diffusion": ("--variant diffusion", "steps", {}),
        "autoregressive": ("--variant autoregressive", "steps", {}),
        "latent diffusion, equal FLOPs": ("--variant diffusion", "FLOPs", {}),
        "autoregressive, equal FLOPs": ("--variant autoregressive", "FLOPs", {}),
        "LoST": ("--model lost --from checkpoints/lost", "steps", {})},
    "ablate-prefix": {
        "prefix": ("", "steps", {}),
        "queries alone, the paper's": ("--variant queries", "steps", {})}}


# ---------------------------------------------------------------------------- training

def launch(flags):
    """train.py with these flags. After Ctrl-C it saves and ends this process, too."""
    sys.argv = ["train.py", *flags]
    train.main()


def train_stages(args, name, seed, flags, stages):
    """Trains the stages that are not trained yet, on those of --checkpoint, in a folder of this name; -> the folder."""
    folder = Path(args.runs) / name
    flags = {"--from": args.checkpoint[0], "--shapes": args.train_shapes, "--steps": args.steps, "--batch": args.batch,
             "--seed": seed, "--cache": args.cache, "--out": folder, "--device": args.device,
             "--precision": args.precision} | flags
    for stage in stages:
        entry = read_config(folder).get(stage)
        if entry is None:
            print(f"training {stage} in {folder}")
            command = flags | {"--stage": stage}
            launch([str(word) for flag in command.items() if flag[1] is not None for word in flag])
            continue
        own = {name: signed for name, signed in signatures(folder).items() if name in stages}
        sources, count = signatures(flags["--from"]) | own, int(entry["data"].split("-")[2])  # shapes-train-COUNT-...
        if ([count, entry["steps"], entry["batch"]] != [flags["--shapes"], flags["--steps"], flags["--batch"]]
                or any(sources.get(name) != signed for name, signed in entry["made_with"].items())):
            raise UserError(f"{folder} was trained with other flags, or with other weights than those in "
                            f"{flags['--from']}; give another --runs")
    return folder


@functools.cache
def gigaflops(checkpoint, variant):
    """Of the training of one shape of the tokens of a checkpoint: a mean over numbers of known tokens."""
    grid = read_stage(checkpoint, "tokenizer")["settings"]
    model = random_backbone("meta", "tiny", kind=BACKBONES[variant], grid=grid)
    return np.mean([training_flops(model, 1, known) for known in known_counts(model.tokens, 4)]) / 1e9


def train_variant(args, variant, equal, seed):
    """A generator with the flags of a variant, for as many steps or FLOPs as LTM3D; -> its folder."""
    words = variant.split()                                   # --flag value --flag value ...
    flags, steps = dict(zip(words[::2], words[1::2])), args.steps
    name = re.sub(r"[^\w.]+", "-", variant).strip("-") or "ltm3d"
    if equal == "FLOPs":
        ours, its = (gigaflops(args.checkpoint[0], name) for name in ("mae", flags["--variant"]))
        print(f"training a shape takes LTM3D {ours:.2f} GFLOPs, {flags['--variant']} {its:.2f}")
        steps = math.ceil(args.steps * ours / its)
        name += f"-{steps}-steps"
    last = RELATIVES[flags["--model"]] if "--model" in flags else "backbone"
    return train_stages(args, f"{name}-{seed}", seed, flags | {"--steps": steps}, [last])


# ---------------------------------------------------------------------------- comparing

def best_guidance(args, validation, folder, options):
    """The GUIDANCE with the best prompt score on captions of validation shapes."""
    model, scores = exam.open_model(args, folder), {}
    result_of = exam.shape_result(model, args.rep, args.resolution)
    for cfg in GUIDANCE:
        cache = exam.result_cache(validation.args, folder.name, folder, what="guidance", options=options, cfg=cfg)
        results = exam.sample_all(model, validation.captioned, cache, result_of, **options, cfg=cfg)
        features = validation.scorer.clouds(*(results[key] for key in exam.CLOUD))            # r e
        scores[cfg] = metrics.prompt_score(validation.prompt_features, features)
    return max(scores, key=scores.get)


def compare_variants(args):
    """Trains every variant with every seed; compares them by all metrics."""
    variants = VARIANTS[args.command]
    if any("rgs" in options for *_, options in variants.values()):
        read_stage(args.checkpoint[0], "reconstruct")         # a missing one is an error now, not after hours
    benchmark, rows = Exam(args, args.n, args.shapes), []
    validation = Exam(Namespace(**vars(args) | {"split": "validation"}), args.n, args.shapes // 2)
    folders = {name: [train_variant(args, flags, equal, seed) for seed in range(args.seeds)]
               for name, (flags, equal, _) in variants.items()}
    for name, (*_, options) in variants.items():
        options = options | {"cfg": best_guidance(args, validation, folders[name][0], options)}
        caches = [exam.result_cache(args, folder.name, folder, what="variants", options=options)
                  for folder in folders[name]]
        scores = [benchmark.scores(exam.open_model(args, folder), cache, **options)[0]
                  for folder, cache in zip(folders[name], caches)]
        stages = [exam.last_stage(folders[name][0]), *["reconstruct"] * ("rgs" in options)]
        config = [read_config(folder) for folder in folders[name]]
        files = [read_weights(folders[name][0] / f"{stage}.safetensors") for stage in stages]
        minutes = np.mean([sum(entry[stage]["seconds"] for stage in stages) for entry in config]) / 60
        rows.append({"variant": name, "guidance": f"{options['cfg']:g}", "steps": str(config[0][stages[0]]["steps"]),
                     "M parameters": sum(x.numel() for file in files for x in file.values()) / 1e6, "minutes": minutes})
        rows[-1] |= {key: interval([score[key] for score in scores])
                     for key, value in scores[0].items() if not isinstance(value, str)}
    print(f"{args.seeds} trainings of each variant: means with 95 % confidence intervals; columns as those of generate")
    real = {"variant": "held-out shapes"} | benchmark.real()
    write_table(args.out, args.command, [{key: real.get(key, "") for key in rows[0]}, *rows])


def overfit(args):
    """Trains on ten chairs: does each longest caption give its shape? (The paper's first experiment.)"""
    folder = train_variant(args, "--classes chair", "steps", 0)
    split = prepare("train", args.train_shapes, args.cache, classes=["chair"])
    captions, model = exam.longest_captions(split, range(len(split))), exam.open_model(args, folder)
    jobs = [exam.Job(f"shape-{row}", text, None, (args.seed, row)) for row, text in enumerate(captions)]
    cache = exam.result_cache(args, folder.name, folder)
    results = exam.sample_all(model, jobs, cache, exam.shape_result(model, args.rep, args.resolution))
    clouds = split.cloud(range(len(split)), 2 * exam.POINTS, seeded(args.seed))[0]         # r 2k 3
    true, second = clouds[:, :exam.POINTS].contiguous(), clouds[:, exam.POINTS:]
    distance = chamfer_matrix(results["points"], true)                            # r r
    others = distance.clone().fill_diagonal_(torch.inf).amin(1)                   # r
    rows = [{"caption": text, "Chamfer": distance[i, i].item(), "its floor": chamfer(true[i], second[i]),
             "nearest of the others": others[i].item()} for i, text in enumerate(captions)]
    write_table(args.out, args.command, rows, mean_row=True)
