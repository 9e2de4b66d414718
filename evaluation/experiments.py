"""evaluation/experiments.py - the papers' questions: what does it cost to leave a part out, or to put another in its place?

Every variant is trained by train.py on the same tokens, prompts and shapes, with the same steps and several seeds; what is trained
already is not trained again, so the experiments share their first row. Then all are asked the same (evaluation/exam.py).

    python evaluate.py versus            # LTM3D against other generators of the same size
    python evaluate.py ablate-prefix     # the prefix against other ways to say what is wanted
    python evaluate.py ablate-encoder    # the text tower against a bag of words, and hub encoders: --text-encoders NAME ...
    python evaluate.py ablate-denoiser   # flow against ddpm, by the number of steps
    python evaluate.py data-scaling      # the number of shapes to learn from: what is new, what is copied?
    python evaluate.py overfit           # ten shapes of one class: does the prompt reach the shape?
"""
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from data import prepare
from engine.commands import UserError
from engine.files import read_config, read_stage, read_weights
from engine.state import plot_losses
from evaluation.exam import POINTS, Exam, Job, clouds, kept, made, parts, shape
from evaluation.metrics import chamfer, chamfer_matrix
from evaluation.results import intervals, report, weights
from geometry.render import contact_sheet, render_mesh, save_png
from geometry.training_samples import painted
from sample import LTM3D

VARIANTS = {  # name of the variant: flags of train.py, options of sampling
    "versus": {"LTM3D": ("", {}), "LTM3D, a token a step": ("", {"steps": 64}), "LTM3D, growing guidance": ("", {"growth": 1.}),
               "LTM3D, RGS": ("", {"alpha": .1}), "LTM3D, RGS within 1.5 sigma": ("", {"within": 1.5}),
               "latent diffusion": ("--generator diffusion", {}), "autoregressive": ("--generator autoregressive", {}),
               "autoregressive, growing guidance": ("--generator autoregressive", {"growth": 1.})},
    "ablate-prefix": {"prefix": ("", {}), "cross-attention": ("--generator cross", {}), "mean-pooled": ("--generator pooled", {})},
    "ablate-encoder": {"text tower": ("", {}), "bag of words": ("--text-encoder bag", {})},
    "ablate-denoiser": {f"{name}, {steps} steps": (flags, {"denoise_steps": steps})
                        for name, flags, counts in (("flow", "", (2, 4, 8, 16)), ("ddpm", "--denoiser ddpm", (25, 50, 100))) for steps in counts},
    "data-scaling": {f"{count} shapes": (f"--shapes {count}", {}) for count in (130, 1300)} | {"all shapes": ("", {})},
}
QUESTIONS = {
    "versus": "LTM3D against other generators: same shape tokens, number of parameters and steps.", "ablate-prefix": "A learnt prefix against "
    "plain cross-attention and mean-pooled conditioning.", "ablate-encoder": "The text tower against a bag of words, and against text encoders of "
    "others.", "ablate-denoiser": "Flow against DDPM, by the number of denoising steps.", "data-scaling": "How many shapes to learn from: what is "
    "new, what is copied?", "overfit": "The paper's first experiment, ten shapes of one class: does the prompt reach the shape?"}


def launch(flags):
    """train.py in a process of its own -> its exit status. If we are stopped, it is, and has time to save."""
    with subprocess.Popen([sys.executable, Path(__file__).parent.parent / "train.py", *flags]) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                child.send_signal(signal.SIGINT)


def train(args, flags, seed):
    """A backbone on the first stages of --checkpoint, unless it is there; -> its folder."""
    name = re.sub(r"[^\w.]+", "-", flags).strip("-") or "ltm3d"
    folder, words = Path(args.runs) / f"{name}-{seed}", flags.split()
    told = {"--from": args.checkpoint[0], "--stage": "backbone", "--shapes": args.train_shapes, "--steps": args.steps, "--seed": seed,
            "--cache": args.cache, "--out": folder} | ({"--device": args.device} if args.device else {}) | dict(zip(words[::2], words[1::2]))
    if entry := read_config(folder).get("backbone"):
        steps, shapes = entry["steps"], entry["data"].split("-")[2]                # shapes-train-COUNT-...
        if (str(steps), shapes) != (str(told["--steps"]), str(told["--shapes"])):
            raise UserError(f"{folder} was trained for {steps} steps with {shapes} shapes; give --steps {steps} --train-shapes {shapes}, "
                            "or another --runs")
        other = [name for name, made in entry["made_with"].items() if weights(args.checkpoint[0], name) != {name: made}]
        if other:
            raise UserError(f"{folder} was trained with another {other[0]} than that in {args.checkpoint[0]}; give another --runs")
    else:
        print(f"training {folder}")
        ended = launch([str(word) for flag in told.items() for word in flag])
        if ended == 130:
            raise KeyboardInterrupt
        if ended:
            raise UserError(f"training {folder} ended with status {ended}; see above")
    return folder


def compare_variants(args):
    """Every metric of every variant, with 95 % confidence intervals over the seeds."""
    variants = dict(VARIANTS[args.command])
    if args.command == "ablate-encoder":
        variants |= {name: (f"--text-encoder {name}", {}) for name in args.text_encoders}
    if any({"alpha", "within"} & options.keys() for _, options in variants.values()):
        read_stage(args.checkpoint[0], "reconstruct")         # rather an error now than after hours
    exam, rows = Exam(args, args.n, args.shapes), []
    folders = {name: [train(args, flags, seed) for seed in range(args.seeds)] for name, (flags, _) in variants.items()}
    for name, (_, options) in variants.items():
        scores = []
        for folder in folders[name]:
            slug = "-".join([folder.name, *(f"{key}-{value}" for key, value in options.items())])
            keep = kept(args, slug, folder, *parts(args.rep), what="variants", options=options)
            scores.append(exam.scores(LTM3D(folder, args.device), keep, **options)[0])
        stages = ["backbone"] + ["reconstruct"] * bool({"alpha", "within"} & options.keys())         # RGS has a network of its own
        count = sum(x.numel() for stage in stages for x in read_weights(folders[name][0] / f"{stage}.safetensors").values()) / 1e6
        minutes = np.mean([sum(read_config(folder)[stage]["seconds"] for stage in stages) for folder in folders[name]]) / 60
        rows.append({"variant": name, "M parameters": count, "minutes": minutes} | intervals(scores))
    real = exam.real()
    of = f"means of {args.seeds} trainings and 95 % confidence intervals" if args.seeds > 1 else "one training of each"
    print(f"{args.steps} steps, {of}; else as evaluate.py generate says")
    report(args.out, args.command, [{"variant": "held-out shapes"} | {key: real.get(key, "") for key in list(rows[0])[1:]}, *rows])
    panels = {}
    for name, each in folders.items():
        panels.setdefault(tuple(each), name)                  # one for variants that are the same weights
    curves = {name: [(f"seed {i}", folder / "backbone.csv", "held_out") for i, folder in enumerate(each)] for each, name in panels.items()}
    plot_losses(curves, Path(args.out) / f"{args.command}-losses.png")
    print(f"{args.out}/{args.command}-losses.png")


def overfit(args):
    """Does the fullest caption of each give that shape?"""
    folder = train(args, f"--classes {args.of} --shapes {args.train_shapes}", 0)
    split = prepare("train", args.train_shapes, args.cache, classes=[args.of])
    captions, model = [max(each, key=len) for each in split.captions], LTM3D(folder, args.device)
    jobs = [Job(f"shape-{row}", text, None, (args.seed, row)) for row, text in enumerate(captions)]
    results = made(model, jobs, kept(args, folder.name, folder, *parts(args.rep)), shape(model, args.rep, args.resolution))
    draw = split.cloud(range(len(split)), 2 * POINTS, np.random.default_rng(args.seed))[0]
    true, again = draw[:, :POINTS].contiguous(), draw[:, POINTS:]
    distance = chamfer_matrix(clouds(results), true)
    rows = [{"caption": text, "Chamfer": distance[i, i].item(), "its floor": chamfer(true[i], again[i]), "nearest of the others":
             distance[i, torch.arange(len(split)) != i].min().item(), "nearest is its own": float(captions[distance[i].argmin()] == text)}
            for i, text in enumerate(captions)]
    report(args.out, args.command, rows, mean_row=True)
    drawn = [render_mesh(*painted(split.shape(row)), size=192) for row in range(len(split))]
    drawn += [model.decode(torch.from_numpy(t), args.rep, job.seed, args.resolution).picture(192) for t, job in zip(results["tokens"], jobs)]
    save_png(f"{args.out}/overfit-shapes.png", contact_sheet(drawn, len(split)))
    print(f"{args.out}/overfit-shapes.png")


TRAINED = [*VARIANTS, "overfit"]
EXPERIMENTS = {name: compare_variants for name in VARIANTS} | {"overfit": overfit}
