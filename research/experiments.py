"""experiments.py - the questions of the papers: what does it bring to have this part, or to have another in its place?

The variants of an experiment are trained on the same tokens, prompts and shapes, for the same number of steps (or for
equal FLOPs), with several seeds, and with LTM3D's learning rate. A variant that is trained already is not trained
again, so the experiments share their first row.

    python evaluate.py versus            # trains what it compares, as all VARIANTS below
    python evaluate.py overfit           # ten shapes of one class: does each prompt give its shape?
    python evaluate.py ablate-rgs        # Reconstruction-Guided Sampling: fidelity against diversity; trains nothing
"""
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from itertools import product
from pathlib import Path

import numpy as np
import torch

import backbone
import models
import tokenizer
from data import TRAIN_SHAPES, prepare
from engine.commands import UserError, between
from engine.files import read_config, read_stage, read_weights, trained_stages
from engine.state import plot_losses
from evaluation import exam, peers
from evaluation.metrics import chamfer, chamfer_matrix, cosine, kernel_distance
from evaluation.results import interval, labels, weights, whiskers, write_table
from evaluation.timing import count_flops
from geometry import training_samples
from geometry.render import contact_sheet, render_mesh, save_png
from geometry.shapes import CLASSES
from prompts import image_tower

VARIANTS = {  # experiment: (what it compares, {variant: (flags of training, options of sampling)})
    "versus": ("LTM3D against others of as many parameters: equal steps or FLOPs; VAT, LoST on codes of their own", {
        "LTM3D": ("", {}), "LTM3D, a token a step": ("", {"steps": 64}), "LTM3D, RGS": ("", {"rgs": "sampled=.1"}),
        "LTM3D, RGS within 1.5 sigma": ("", {"rgs": "within=1.5"}), "latent diffusion": ("--variant diffusion", {}),
        "autoregressive": ("--variant autoregressive", {}),
        "latent diffusion, equal FLOPs": ("--variant diffusion --steps equal", {}),
        "autoregressive, equal FLOPs": ("--variant autoregressive --steps equal", {}),
        "VAT": ("--model vat --variant large --from checkpoints/vat", {}),
        "LoST": ("--model lost --variant large --from checkpoints/lost", {})}),
    "ablate-prefix": ("the prefix; without its mean in c_i: the same, the paper's, cross-attention, mean-pooled", {
        "prefix": ("", {}), "without its mean in c_i": ("--variant unpooled", {}),
        "queries alone, the paper's": ("--variant queries", {}),
        "cross-attention": ("--variant cross", {}), "mean-pooled": ("--variant pooled", {})}),
    "ablate-encoder": ("the built-in towers against a bag of words and plain pixels, and encoders of transformers", {
        "built-in towers": ("", {}), "text: a bag of words": ("--text-encoder bag", {}),
        "picture: plain pixels": ("--image-encoder pixels", {})}),
    "ablate-denoiser": ("flow against DDPM, by the number of denoising steps", {
        **{f"flow, {steps} steps": ("", {"denoise_steps": steps}) for steps in (2, 4, 8, 16)},
        **{f"ddpm, {steps} steps": ("--denoiser ddpm", {"denoise_steps": steps}) for steps in (25, 50, 100)}}),
    "latent-spaces": ("one backbone for one latent space, and for four: each turned in a way of its own", {
        "one space": ("", {}), "one space, a quarter of the steps": ("--steps quarter", {}),
        "four spaces": ("--variant spaces", {})}),
    "data-scaling": ("the number of training shapes: are samples new, or copies?", {
        "130 shapes": ("--shapes 130", {}), "1300 shapes": ("--shapes 1300", {}), "all shapes": ("", {})}),
}


# ---------------------------------------------------------------------------- experiments that train

def launch(flags):
    """Train in a process of its own -> its exit status. If this process is stopped, that one has time to save."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(exam.ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, "-m", "evaluation.peers", *flags], env=environment) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                child.send_signal(signal.SIGINT)


def training_flops(variant=None):
    """Operations of a backbone's training step at tiny, for one shape with a caption of twenty words and a picture."""
    side, channels = tokenizer.SIZES["tiny"]["side"], tokenizer.SIZES["tiny"]["channels"]
    settings = dict(tokens=side ** 3, channels=channels, widths={"text": 128, "image": 128}, **backbone.SIZES["tiny"])

    def step(meta):
        with meta:
            model, x = peers.GENERATORS.get(variant, backbone.Backbone)(**settings), torch.zeros(1, side ** 3, channels)
            condition = {kind: (torch.zeros(1, t, 128), torch.ones(1, t, dtype=torch.bool))
                         for kind, t in (("text", 20), ("image", 16))}
        for i in range(8):
            model.loss(x, condition, ((i + .5) / 8) ** 1.5).backward()
    return count_flops(step) / 8


def train(args, variant, seed):
    """The last stage of a model on the others of --checkpoint, with the flags of a variant; -> its folder."""
    name = re.sub(r"[^\w.]+", "-", variant).strip("-") or "ltm3d"
    words = variant.split()                                   # --flag value --flag value ...
    flags = dict(zip(words[::2], words[1::2]))
    if flags.get("--steps") == "equal":                       # FLOPs
        flags["--steps"] = round(args.steps * training_flops() / training_flops(flags["--variant"]))
    if flags.get("--steps") == "quarter":
        flags["--steps"] = -(-args.steps // 4)
    return train_stages(args, f"{name}-{seed}", seed, flags, [models.MODELS[flags.get("--model", "ltm3d")].LAST])


def refuse_trained(args, stage):
    """For experiments that train a tokenizer themselves, from --checkpoint on."""
    if stage in trained_stages(args.checkpoint[0]):
        raise UserError(f"{args.command} trains {stage} itself; --checkpoint takes a folder without, checkpoints/tiny")


def train_stages(args, name, seed, flags, stages):
    """Trains what is not trained yet in a folder of this name; -> the folder."""
    folder = Path(args.runs) / name
    flags = {"--from": args.checkpoint[0], "--shapes": args.train_shapes, "--steps": args.steps, "--batch": args.batch,
             "--seed": seed, "--cache": args.cache, "--out": folder, "--device": args.device,
             "--precision": args.precision} | flags
    for stage in stages:
        entry = read_config(folder).get(stage)
        if entry is None:
            print(f"training {stage} in {folder}")
            command = flags | {"--stage": stage}
            status = launch([str(word) for flag in command.items() if flag[1] is not None for word in flag])
            if status == 130:
                raise KeyboardInterrupt
            if status:
                raise UserError(f"training {folder} ended with status {status}; see above")
            continue
        shapes = entry["data"].split("-")[2]                                      # shapes-train-COUNT-...
        trained = f"--train-shapes {shapes} --steps {entry['steps']} --batch {entry['batch']}"
        if trained != f"--train-shapes {flags['--shapes']} --steps {flags['--steps']} --batch {flags['--batch']}":
            raise UserError(f"{folder} was trained with {trained}; give these flags, or another --runs")
        for other, digest in entry["made_with"].items():
            source = folder if other in stages else flags["--from"]
            if weights(source, other) != {other: digest}:
                raise UserError(f"{folder} was trained with another {other} than that in {source}; give another --runs")
    return folder


def variant_cache(args, what, folder, options):
    """The cache of the samples of a trained variant, by these options of sampling."""
    label = "-".join([folder.name, *(f"{key}-{value}" for key, value in options.items())])
    return exam.result_cache(args, label, folder, *exam.stages_of(args.rep), what=what, options=options)


def best_guidance(args, validation, folder, options):
    """Of several strengths of guidance, that with the best prompt score on captions of validation shapes."""
    if validation is None:
        return args.guidance[0]
    model, scores = exam.open_model(args, folder), {}
    result_of = exam.shape_result(model, args.rep, args.resolution)
    for cfg in args.guidance:
        guided = options | {"cfg": cfg}
        cache = variant_cache(validation.args, "guidance", folder, guided)
        captioned = exam.sample_all(model, validation.captioned, cache, result_of, **guided)
        scores[cfg] = validation.fidelity(captioned)[0]["prompt score"]
    return max(scores, key=scores.get)


def compare_variants(args):
    """Train every variant with every seed; compare them by all metrics."""
    variants = dict(VARIANTS[args.command][1])
    if args.command == "ablate-encoder":
        variants |= {name: (f"--text-encoder {name}", {}) for name in args.text_encoders}
    if unknown := {*args.only} - {*variants}:
        raise UserError(f"{args.command} has no variant {', '.join(sorted(unknown))}, but {'; '.join(variants)}")
    variants = {name: variants[name] for name in args.only or variants}
    if any("rgs" in options for _, options in variants.values()):
        read_stage(args.checkpoint[0], "reconstruct")         # a missing one is an error now, not after hours
    benchmark, rows, panels = exam.Exam(args, args.n, args.shapes), [], {}
    validation = None                                         # shapes by which guidance is chosen
    if len(args.guidance) > 1:
        if not benchmark.scorer.text:
            raise UserError(f"{args.scorer} scores no prompts; give one --guidance")
        validation = exam.Exam(Namespace(**vars(args) | {"split": "validation"}), args.n, args.shapes // 2)
    folders = {name: [train(args, flags, seed) for seed in range(args.seeds)] for name, (flags, _) in variants.items()}
    for name, (_, options) in variants.items():
        guided, scores = options | {"cfg": best_guidance(args, validation, folders[name][0], options)}, []
        for folder in folders[name]:
            model, cache = exam.open_model(args, folder), variant_cache(args, "variants", folder, guided)
            scores.append(benchmark.scores(model, cache, **guided)[0])
            if args.command == "ablate-encoder":
                plain = {"rgs": "none"}                       # guidance of their own; no reconstructor
                cache = variant_cache(args, "variants", folder, plain)
                scores[-1] |= benchmark.picture_scores(model, cache, **plain)
        last = models.MODELS[models.model_in(folders[name][0])].LAST
        stages = [last, "reconstruct"] if "rgs" in options else [last]
        files = [read_weights(folders[name][0] / f"{stage}.safetensors") for stage in stages]
        seconds = [sum(read_config(folder)[stage]["seconds"] for stage in stages) for folder in folders[name]]
        parameters = sum(x.numel() for file in files for x in file.values()) / 1e6
        steps = read_config(folders[name][0])[last]["steps"]
        rows.append({"variant": name, "guidance": f"{guided['cfg']:g}", "steps": str(steps),
                     "M parameters": parameters, "minutes": np.mean(seconds) / 60})
        numbers = [key for key, value in scores[0].items() if not isinstance(value, str)]
        rows[-1] |= {key: interval([score[key] for score in scores], 1 if key in exam.SHARES else np.inf)
                     for key in numbers}
        panels.setdefault(tuple(folders[name]), name)         # one panel for variants with the same weights

    several = f"means of {args.seeds} trainings, with 95 % confidence intervals"
    print(f"{several if args.seeds > 1 else 'one training'}; else as evaluate.py generate says")
    real = {"variant": "held-out shapes"} | benchmark.real()
    write_table(args.out, args.command, [{key: real.get(key, "") for key in rows[0]}, *rows])
    curves = {name: [(f"seed {i}", folder / f"{models.MODELS[models.model_in(folder)].LAST}.csv", "held_out")
                     for i, folder in enumerate(paths)] for paths, name in panels.items()}
    plot_losses(curves, Path(args.out) / f"{args.command}-losses.png")
    print(f"{args.out}/{args.command}-losses.png")


def overfit(args):
    """The paper's first experiment, ten training shapes of one class: does each longest caption give its shape?"""
    folder = train(args, f"--classes {args.of} --shapes {args.train_shapes}", 0)
    split = prepare("train", args.train_shapes, args.cache, classes=[args.of])
    captions, model = exam.longest_captions(split, range(len(split))), exam.open_model(args, folder)
    jobs = [exam.Job(f"shape-{row}", text, None, (args.seed, row)) for row, text in enumerate(captions)]
    cache = exam.result_cache(args, folder.name, folder, *exam.stages_of(args.rep))
    results = exam.sample_all(model, jobs, cache, exam.shape_result(model, args.rep, args.resolution))
    clouds = split.cloud(range(len(split)), 2 * exam.POINTS, np.random.default_rng(args.seed))[0]         # r 2k 3
    true, second = clouds[:, :exam.POINTS].contiguous(), clouds[:, exam.POINTS:]
    distance = chamfer_matrix(results["points"], true)                            # r r
    rows = []
    for i, text in enumerate(captions):
        others = torch.arange(len(split)) != i
        rows.append({"caption": text, "Chamfer": distance[i, i].item(), "its floor": chamfer(true[i], second[i]),
                     "nearest of the others": distance[i, others].min().item(),
                     "nearest is its own": float(captions[distance[i].argmin()] == text)})
    write_table(args.out, args.command, rows, mean_row=True)
    pictures = [render_mesh(*training_samples.vertex_coloured(split.shape(row)), size=192) for row in range(len(split))]
    pictures += [model.decode(torch.from_numpy(tokens), args.rep, job.seed, args.resolution).picture(192)
                 for tokens, job in zip(results["tokens"], jobs)]
    save_png(f"{args.out}/overfit-shapes.png", contact_sheet(pictures, len(split)))
    print(f"{args.out}/overfit-shapes.png")


# ---------------------------------------------------------------------------- Reconstruction-Guided Sampling

REAL = "(the shapes themselves)"
RGS_COLUMNS = ("prompt", "rule", "a, figure", "a, text", "window", "prompt score", "Chamfer to described", "kernel",
               "share of diversity", "share of diversity less floor")


def rgs_rules(args):
    """{name of the rule: (a in the paper's figure, a in its text, window, options of sampling)}"""
    rules = {"sampling only": ("", "", "", {"rgs": "none"})}
    for a, window in [(a, .75) for a in args.alphas] + [(.1, window) for window in args.windows]:
        name = f"a = {a:g}" if window == .75 else f"a = {a:g}, {window:g} of the steps"
        rules[name] = f"{a:g}", f"{1 - a:g}", f"{window:g}", {"rgs": f"sampled={a}", "window": window}
    return rules | {f"within {reach:g} sigma": ("", "", "0.75", {"rgs": f"within={reach}"}) for reach in args.within}


def rgs_scores(results, n, prompt_features, described, others, scorer):
    """n samples of each of r prompts (features r e) of r shapes (clouds r k 3) -> how faithful, how diverse, how like
    other held-out shapes (features s e)."""
    k, same = exam.POINTS, torch.eye(n, dtype=torch.bool)
    features = scorer.clouds(*(results[name][:, :k] for name in ("points", "normals", "colours")))        # (r n) e
    points = torch.from_numpy(results["points"])                                  # (r n) 2k 3
    first, second = points[:, :k].contiguous().split(n), points[:, k:].contiguous().split(n)      # r times n k 3
    near = [chamfer_matrix(own, shape[None]).tolist() for own, shape in zip(first, described)]
    pairs = [chamfer_matrix(*halves) for halves in zip(first, second)]            # r times n n
    diversity = np.mean([matrix[~same].mean().item() for matrix in pairs])
    floor = np.mean([matrix[same].mean().item() for matrix in pairs])             # two halves of one cloud
    return {"prompt score": np.diag(cosine(np.repeat(prompt_features, n, 0), features)).mean(),
            "Chamfer to described": np.mean(near), "kernel": kernel_distance(features, others),
            "diversity": diversity, "diversity less floor": diversity - floor}


def ablate_rgs(args):
    """Reconstruction-Guided Sampling, the paper's rule and ours: fidelity against diversity."""
    if Path(args.scorer).suffix == ".py" and "picture" in args.prompts:
        raise UserError(f"{args.scorer} has no features of pictures; give --prompts name caption, or another --scorer")
    test, rows = exam.held_out(args, ("surface", "pictures")), np.arange(args.shapes)
    scorer, table = exam.Scorer(args.scorer, args.device or "cpu"), []
    (folder, label), = labels(args.checkpoint).items()
    model = exam.open_model(args, folder)
    result_of = exam.shape_result(model, args.rep, args.resolution, 2 * exam.POINTS)
    pictures = test.pictures(rows, np.random.default_rng(args.seed))              # r 3 s s
    names = [test.classes[row] for row in rows]
    texts = {"name": names, "caption": exam.longest_captions(test, rows), "picture": [None] * len(rows)}
    described = test.cloud(rows, exam.POINTS, np.random.default_rng(args.seed))   # points, normals, colours: r k 3 each
    rest = range(args.shapes, len(test)) or rows              # the other held-out shapes, where there are any
    others = scorer.clouds(*test.cloud(rest, exam.POINTS, np.random.default_rng(args.seed)))            # s e
    for kind in args.prompts:
        if kind == "picture":
            tower = image_tower.load(args.scorer)
            features = tower.embed(tower.tokens(pictures)[0]).numpy()             # r e
        else:
            features = scorer.texts(texts[kind])                                  # r e
        prompt_score = np.diag(cosine(features, scorer.clouds(*described))).mean()
        table.append(dict.fromkeys(RGS_COLUMNS, "") | {"prompt": kind, "rule": REAL, "prompt score": prompt_score})
        plain = None                                          # the scores of sampling only, the first rule
        for rule, (figure, text, window, options) in rgs_rules(args).items():
            scores = []
            for seed in range(args.seed, args.seed + args.seeds):
                cache = exam.result_cache(args, f"{label}/{kind}, {rule}, {seed}", folder, *exam.stages_of(args.rep),
                                          "vision", options=options, sample=seed)
                jobs = [exam.Job(f"{kind}-{row}-{i}", texts[kind][row], pictures[row] if kind == "picture" else None,
                                 (seed, int(row), i)) for row, i in product(rows, range(args.n))]
                results = exam.sample_all(model, jobs, cache, result_of, **options)
                scores.append(rgs_scores(results, args.n, features, described[0], others, scorer))
            plain = plain or scores
            row = {"prompt": kind, "rule": rule, "a, figure": figure, "a, text": text, "window": window}
            for key in ("prompt score", "Chamfer to described", "kernel"):
                row[key] = interval([score[key] for score in scores])
            for key in ("diversity", "diversity less floor"):
                row[f"share of {key}"] = interval([score[key] / base[key] for score, base in zip(scores, plain)])
            table.append(row)

    several = f"means of {args.seeds} samplings, with 95 % confidence intervals" if args.seeds > 1 else "one sampling"
    print(f"{len(rows)} prompts of a kind, {args.n} samples each, {several}. share of diversity: mean\n"
          "Chamfer distance of pairs of samples of a prompt, over that of sampling only; less floor: without its floor")
    write_table(args.out, args.command, table, draw=draw_rgs)


def draw_rgs(plt, rows):
    """A panel for each kind of prompt: diversity to the right, prompt score upwards."""
    kinds = list(dict.fromkeys(row["prompt"] for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(5.5 * len(kinds), 4.2), squeeze=False, layout="constrained")
    for axis, kind in zip(axes[0], kinds):
        real, *others = [row for row in rows if row["prompt"] == kind]
        axis.axhline(real["prompt score"], color="grey", linewidth=.5, linestyle="dashed", label=REAL)
        axis.legend(loc="lower left", fontsize="x-small")
        for row in others:
            cells = row["share of diversity less floor"], row["prompt score"]
            (x, dx), (y, dy) = map(whiskers, cells)
            ours = row["rule"].startswith("within")
            colour = "#c44e52" if ours else "black" if row["rule"] == "sampling only" else "#4c72b0"
            axis.errorbar(x, y, dy, dx, "o", color=colour, elinewidth=.5, markersize=4)
            place = dict(xytext=(-1, -3), ha="right", va="top") if ours else dict(xytext=(1, 3))
            axis.annotate(row["rule"], (x, y), textcoords="offset points", size="x-small", color=colour, rotation=55,
                          **place)
        axis.margins(.16, .24)                                # room for the labels
        axis.set(title=f"prompt: a {kind}", xlabel="share of diversity less floor", ylabel="prompt score")
    return figure


TRAINED = [*VARIANTS, "overfit", "ablate-vat", "ablate-rida"]           # the last two: scales.py, registers.py


def add_flags(flag):
    """The flags of these commands alone. flag(names of commands, name, **settings) adds one."""
    kinds, share, reach = ["name", "caption", "picture"], between(0, 1, float), between(0, 100, float)
    rgs = ["ablate-rgs"]
    flag(rgs, "--prompts", nargs="+", choices=kinds, default=kinds, help="kinds of prompt")
    flag(rgs, "--alphas", nargs="*", type=share, default=[0, .05, .1, .15, .2, .3, .9], help="weights of samples")
    flag(rgs, "--windows", nargs="*", type=between(.01, 1, float), default=[.25, .5], help="besides .75, at a = .1")
    flag(rgs, "--within", nargs="*", type=reach, default=[1, 1.5, 2], help="reaches of our rule, standard deviations")
    flag([*rgs, "ablate-vat", "ablate-rida", *VARIANTS], "--seeds", type=between(1, 100), default=3,
         help="samplings or trainings of each variant; of ablate-vat, of each quantiser")
    flag(TRAINED, "--train-shapes", type=between(2), default=TRAIN_SHAPES, help="built-in shapes to learn from")
    flag(TRAINED, "--steps", type=between(1), default=400, help="training steps of every variant")
    flag(TRAINED, "--batch", type=between(1), default=32, help="shapes a training step")
    flag(VARIANTS, "--guidance", nargs="+", type=between(0, 100, float), default=[1.5, 2., 3., 4.],
         help="to choose from, for each variant the best one for captions of validation shapes")
    flag(VARIANTS, "--only", nargs="+", default=[], metavar="VARIANT", help="leave out the others")
    flag(TRAINED, "--runs", default="runs/experiments", help="folder of the trained variants")
    flag(["ablate-encoder"], "--text-encoders", nargs="+", default=[], metavar="NAME", help="of transformers, to add")
    flag(["overfit"], "--of", choices=CLASSES, default="chair", help="the class")
