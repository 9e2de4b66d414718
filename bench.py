"""bench.py - what does each trick bring? The plain way and ours take turns in one process, so that their ratio holds where seconds,
on a machine that others use too, do not.

    python bench.py sample --size base          # MAR's published sampling, then one trick after the other
    python bench.py quality                     # what it costs: samples of the trained weights, with ever fewer steps
    python bench.py decode                      # a dense grid against one that is refined near the surface
    python bench.py train --size small          # a training step in fp32, and as train.py takes it
    python bench.py data                        # preparing shapes: by their number, with one process and with more
    python bench.py render                      # pictures of Gaussians: all of them in every pixel, or by tiles
    python bench.py sizes                       # what everything costs, by tokens, batch, resolution and points

Each writes a table and a plot. Models have random weights where that does not matter: to know what they cost nothing has to be
trained.
"""
import contextlib
import functools
import os
import resource
import tempfile
import time
from unittest import mock

import numpy as np
import torch
from einops import rearrange, repeat
from torch import nn

import backbone
import data
import heads
import tokenizer
from engine import loop
from engine.commands import Parser, between, cast_once, command, pick_device
from engine.files import make_folder
from evaluation.exam import Exam, kept, parts
from evaluation.results import report
from evaluation.timing import flops, matmul_peak, turns
from geometry import surface
from geometry.light import look
from geometry.render import flatten, splat
from geometry.shapes import CLASSES
from geometry.surface import TRUNCATION
from sample import LTM3D, RESOLUTIONS

# ---------------------------------------------------------------------------- sampling

PUBLISHED = dict(steps=64, denoise_steps=100)                 # of MAR
SCORES = "prompt score", "of form", "R-precision", "Frechet", "kernel", "1-NNA", "right class", "one piece", "diversity"


def untrained(size, denoiser, device, **changes):
    torch.manual_seed(0)
    tokens = dict(tokens=tokenizer.SIZES[size]["side"] ** 3, channels=tokenizer.SIZES[size]["channels"])
    with torch.device(device):
        return backbone.Backbone(**backbone.SIZES[size] | tokens | changes, widths={"text": 128}, denoiser=denoiser)


def told(b, device):
    """Stands for b captions."""
    return {"text": (torch.randn(b, 20, 128, device=device), torch.ones(b, 20, dtype=torch.bool, device=device))}


@torch.no_grad()
def published(model, condition, seeds, steps, denoise_steps, cfg=2.):
    """MAR's sampling: many steps of both kinds, in every one a pass with the prompt and a pass without, and guidance that grows."""
    b, n, device = len(seeds), model.tokens, model.unknown.device
    draws = [np.random.default_rng(seed) for seed in seeds]
    order = torch.from_numpy(np.stack([rng.permutation(n) for rng in draws])).to(device)
    noise = backbone.noise_of(draws, (n, model.denoiser.draws(denoise_steps), model.channels), device)
    both = [model.told(condition, {"text": torch.full((b,), hidden, device=device)}) for hidden in (False, True)]
    x = torch.zeros(b, n, model.channels, device=device)
    for known, then in backbone.schedule(n, steps):
        new = order[:, known:then]
        c, blank = (rearrange(model.contexts(each, x, order, known, order)[:, known:then], "b m d -> (b m) d") for each in both)   # of all, as MAR

        def net(x, t, c):
            less = model.net(x, t, blank)
            return less + (1 + (cfg - 1) * then / n) * (model.net(x, t, c) - less)

        fresh = noise.gather(1, repeat(new, "b m -> b m r c", r=noise.shape[2], c=model.channels))
        made = model.denoiser.sample(net, c, rearrange(fresh, "b m r c -> (b m) r c"), denoise_steps)
        x = x.scatter(1, repeat(new, "b m -> b m c", c=model.channels), rearrange(made, "(b m) c -> b m c", b=b).to(x.dtype))
    return x


def bench_sample(bench):
    """Sampling tokens: one trick after the other, or all of them against none. Left out: to reuse, in every other step, how the branches
    of guidance differed in the one before (LazyMAR), which saves a quarter of the work for a dozen lines in the loop that everybody reads;
    to denoise later tokens in fewer steps (DiSA), which with four steps is hardly faster."""
    ours, rows = backbone.Backbone.generate, []
    whole = mock.patch.object(backbone, "CACHED", 2 ** 60)(ours)
    ways = {  # name: how it samples, its denoiser, options
        "as published: 64 steps, 100 of ddpm, two passes": (published, "ddpm", PUBLISHED),
        "guidance in one batch": (whole, "ddpm", PUBLISHED),
        "flow": (whole, "flow", dict(steps=PUBLISHED["steps"])),
        "few steps": (whole, "flow", {}),
        "as sample.py does it: parts of a batch in turn": (ours, "flow", {})}
    ways = dict(list(ways.items())[::4]) if bench.args.ends else ways

    def sample(name, b, device, model, **more):
        how, _, options = ways[name]
        with bench.autocast():
            how(model, told(b, device), [(0, i) for i in range(b)], **options | more)

    def model(name, device):
        return untrained(bench.args.size, ways[name][1], device).eval().requires_grad_(False)

    models, work = {name: cast_once(model(name, bench.device), bench.autocast) for name in ways}, {}
    for name, (_, denoiser, options) in ways.items():         # of a shape; linear in the denoising steps: to count them all would take minutes
        one, two = (flops(lambda device: sample(name, 1, device, model(name, device), denoise_steps=k)) for k in (1, 2))
        work[name] = one + (options.get("denoise_steps", backbone.DENOISERS[denoiser].steps) - 1) * (two - one)
    for b in bench.args.batch:
        each = turns({name: functools.partial(sample, name, b, bench.device, models[name]) for name in ways}, bench,
                     {name: b * each for name, each in work.items()})
        rows += [{"batch": f"{b}"} | row for row in each]
    return rows


def bench_quality(bench):
    """Shapes of the same captions and class names, sampled with ever fewer steps, by the metrics of evaluate.py."""
    args, rows = bench.args, []
    args.scorer = args.checkpoint
    exam, model = Exam(args, args.n, args.shapes), LTM3D(args.checkpoint, args.device)
    generate = model.backbone.generate

    def reference(condition, seeds, steer):
        return published(model.backbone, condition, seeds, **PUBLISHED)
    counts = [(16, 16), (10, 16), (10, 4), (10, 2), (8, 4), (5, 4)]
    ways = {f"as published, {PUBLISHED['steps']} steps of {PUBLISHED['denoise_steps']}, two passes": (reference, {})} \
        | {f"{steps} steps of {few}": (generate, dict(steps=steps, denoise_steps=few)) for steps, few in (counts[2:3] if args.ends else counts)}
    for name, (model.backbone.generate, options) in ways.items():
        scores = exam.scores(model, kept(args, name, args.checkpoint, *parts(args.rep), **options), **options)[0]
        rows.append({"way": name} | {key: scores[key] for key in SCORES})
    real = exam.real()
    return [*rows, {"way": "(held-out shapes)"} | {key: real.get(key, "") for key in list(rows[0])[1:]}]


# ---------------------------------------------------------------------------- decoding

def bench_decode(bench):
    """Shapes of class names, each: a dense grid, and one that is refined near the surface. Is it the same mesh?"""
    model, rows = LTM3D(bench.args.checkpoint, bench.args.device).ready("sdf"), []
    some, head = model.tokens(CLASSES[:bench.args.shapes], [(0, i) for i in range(bench.args.shapes)]), model.heads["sdf"]
    for resolution in bench.args.resolutions:
        asked, meshes, ask = {}, {}, head.ask

        def way(name, hierarchical):
            def counted(memory, x):
                asked[name] = asked.get(name, 0) + x.shape[1]
                return ask(memory, x)

            def run():
                head.ask, asked[name] = counted, 0
                meshes[name] = [surface.extract(head, tokens, resolution, model.autocast, hierarchical) for tokens in some]
            return run
        each = turns({"dense": way("dense", False), "refined": way("refined", True)}, bench)
        same = np.mean([all(map(np.array_equal, *pair)) for pair in zip(*meshes.values())])
        rows += [{"resolution": f"{resolution}"} | row | {"seconds": row["seconds"] / len(some), "points asked": asked[row["way"]] / len(some),
                                                         "times fewer": asked["dense"] / asked[row["way"]], "same mesh": same} for row in each]
        del head.ask
    return rows


# ---------------------------------------------------------------------------- training

def bench_train(bench):
    """A step of the backbone, on random tokens: model FLOPs are those of forward and backward passes alone."""
    batch, seeds = bench.args.batch[-1], range(3)             # the share of tokens that is hidden is a seed's own
    ways = {"fp32": (contextlib.nullcontext, 1, {}), "as train.py does it": (bench.autocast, 1, {}),
            "with --recompute": (bench.autocast, 1, {"recompute": True})}
    ways |= {"with --parts 4": (bench.autocast, 4, {})} if batch % 4 == 0 else {}
    ways |= {"with --compile": (bench.autocast, 1, {"compiled": True})} if bench.args.compile else {}

    def loss(device, model, autocast, seed, parts=1):
        x, condition = torch.randn(batch // parts, model.tokens, model.channels, device=device), told(batch // parts, device)
        torch.manual_seed(seed)
        with autocast():
            return model.loss(x, condition) / parts

    def way(autocast, parts, arranged):
        model = untrained(bench.args.size, "flow", bench.device)
        loop.arrange(model, **arranged)
        opts = loop.optimizers(model, 1e-4)

        def run():
            for seed in seeds:
                for _ in range(parts):
                    loss(bench.device, model, autocast, seed, parts).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.)
                for opt in opts:
                    opt.step()
                    opt.zero_grad()
        return run

    def count(device):
        model = untrained(bench.args.size, "flow", device)
        for seed in seeds:
            loss(device, model, contextlib.nullcontext, seed).backward()
    work, steps = dict.fromkeys(ways, flops(count)), {name: way(*how) for name, how in ways.items()}
    if bench.args.compile:
        steps["with --compile"]()                             # minutes go by
    each = turns(steps, bench, work)
    return [{"size": bench.args.size, "batch": f"{batch}"} | row | {"seconds": row["seconds"] / len(seeds)} for row in each]


# ---------------------------------------------------------------------------- data

def bench_data(bench):
    """Preparing built-in shapes, surface and pictures: by their number, with one process and with all cores."""
    rows, cores = [], os.cpu_count()
    for count in bench.args.counts:
        used = {}

        def way(workers):
            def run():
                before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                with tempfile.TemporaryDirectory() as folder:
                    data.prepare("train", count, folder, workers, ("surface", "pictures"))
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                used[workers] = busy / (time.perf_counter() - start) / workers, after.ru_maxrss / 2 ** 10
            return run
        each = turns({f"{workers} process{'es' * (workers > 1)}": way(workers) for workers in (1, cores)}, bench)
        rows += [{"shapes": f"{count}"} | row | {"ms a shape": 1e3 * row["seconds"] / count, "share of cores used": busy, "MB of a process": most}
                 for row, (busy, most) in zip(each, used.values())]
    return rows


# ---------------------------------------------------------------------------- pictures

def blended(means, scales, rotations, opacities, colours, size):
    """What `splat` does by tiles: here every Gaussian is blended into every pixel, row by row."""
    xy, cov, distance = flatten(means, scales, rotations, look(35, 25), size)
    order = distance.argsort()
    xy, inverse, image = xy[order], torch.linalg.inv(cov[order]), []
    for y in torch.arange(size) + .5:
        d = torch.stack(torch.broadcast_tensors(torch.arange(size)[:, None] + .5 - xy[:, 0], y - xy[:, 1]), -1)           # x k 2
        alpha = (opacities[order] * (-.5 * torch.einsum("x k i, k i j, x k j -> x k", d, inverse, d)).exp()).clamp(max=.99)
        through = torch.log1p(-alpha).cumsum(-1).exp()
        image.append((alpha * torch.nn.functional.pad(through[:, :-1], (1, 0), value=1)) @ colours[order] + through[:, -1:])
    return torch.stack(image)


def bench_render(bench):
    """A picture of Gaussians that lie on a ball, forwards only."""
    rows = []
    for count in bench.args.points:
        rng = torch.Generator().manual_seed(0)
        means = nn.functional.normalize(torch.randn(count, 3, generator=rng), dim=-1) * .7
        cloud = means, torch.full((count, 3), .016 * (4096 / count) ** .5), torch.randn(count, 4, generator=rng), torch.full((count,), .9), means / 2 + .5
        pictures = {}

        def way(name, draw):
            def run():
                with torch.no_grad():
                    pictures[name] = draw(*cloud, size=128)
            return run
        each = turns({"all in every pixel": way("all", blended), "by tiles": way("tiles", splat)}, bench)
        rows += [{"Gaussians": f"{count}"} | row | {"largest difference": (pictures["all"] - pictures["tiles"]).abs().max().item()} for row in each]
    return rows


# ---------------------------------------------------------------------------- everything, by size

class Ball(heads.SdfHead):
    """Of any size, untrained: the network is asked, and there is a ball."""

    def ask(self, memory, x):
        y = super().ask(memory, x)
        y[..., 0] = (x.norm(dim=-1) - .7) / TRUNCATION
        return y


def bench_sizes(bench):
    """Cost against size, one thing at a time, the others as in sample.py."""
    model, whole = (LTM3D(bench.args.checkpoint, bench.args.device).ready("sdf", "pc") for _ in range(2))
    tokens = model.tokens(["a chair"], [(0, 0)])[0]

    def net(**changes):
        return cast_once(untrained(bench.args.size, "flow", bench.device, **changes).eval().requires_grad_(False), bench.autocast)
    whole.backbone, whole.heads["sdf"] = net(), Ball(**tokenizer.SIZES[bench.args.size]).to(bench.device).eval()

    def generate(b, **changes):
        made = net(**changes)

        def run():
            with bench.autocast():
                made.generate(told(b, bench.device), [(0, i) for i in range(b)])
        return run
    ways = {"shape tokens": {n: generate(1, tokens=n) for n in (64, 216, 512, 1000)},
            "shapes at once": {b: generate(b) for b in (1, 4, 16, 64)},
            "from text to meshes": {b: functools.partial(whole.generate, "a chair", n=b) for b in (1, 4, 16)},
            "resolution of the surface": {r: functools.partial(model.decode, tokens, "sdf", resolution=r) for r in (64, 128, 256, 512)},
            "points of the cloud": {k: functools.partial(model.decode, tokens, "pc", points=k) for k in (2_000, 20_000, 200_000)}}
    return [{"what": what, "how many": f"{size}"} | {key: row[key] for key in ("seconds", "spread", "peak MB")}
            for what, each in ways.items() for size, row in zip(each, turns({f"{size}": way for size, way in each.items()}, bench))]


def curves(plt, rows):
    """A panel for each thing that has sizes."""
    whats = list(dict.fromkeys(row["what"] for row in rows))
    drawn, axes = plt.subplots(1, len(whats), figsize=(3.4 * len(whats), 3), sharey=True, layout="constrained")
    ticks = [.01, .03, .1, .3, 1, 3, 10, 30, 100]
    for axis, what in zip(axes, whats):
        of = [row for row in rows if row["what"] == what]
        axis.loglog([int(row["how many"]) for row in of], [row["seconds"] for row in of], "o-")
        axis.set(xlabel=what, xticks=[int(row["how many"]) for row in of], xticklabels=[row["how many"] for row in of],
                 yticks=ticks, yticklabels=[f"{tick:g} s" for tick in ticks])
        axis.minorticks_off()
        axis.grid(linewidth=.3)
    axes[0].set_ylim(.8 * min(row["seconds"] for row in rows), 1.25 * max(row["seconds"] for row in rows))
    return drawn


# ---------------------------------------------------------------------------- the commands

BENCHES = {"sample": bench_sample, "quality": bench_quality, "decode": bench_decode, "train": bench_train, "data": bench_data,
           "render": bench_render, "sizes": bench_sizes}


class Bench:
    """Where and how things are measured."""

    def __init__(self, args):
        self.args, self.rounds, (self.device, self.autocast, reason) = args, args.rounds, pick_device(args.device)
        self.peak = matmul_peak(self.device, self.autocast)
        print(f"running on {reason}; a large matrix product reaches {self.peak / 1e12:.3f} TFLOP/s")


def main():
    common = Parser(add_help=False)
    common.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    common.add_argument("--out", default="out/bench", help="folder for table and plot")
    parser = Parser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = {name: commands.add_parser(name, parents=[common], help=bench.__doc__, description=bench.__doc__) for name, bench in BENCHES.items()}
    for names, flag, settings in (
            ("sample decode train data render sizes", "--rounds",
             dict(type=between(1, 1000), default=3, help="turns of every way; of several a first one is not timed")),
            ("sample train sizes", "--size", dict(choices=list(backbone.SIZES), default="tiny", help="of the untrained model")),
            ("sample quality", "--ends", dict(action="store_true", help="only as published and as sample.py does it")),
            ("sample", "--batch", dict(nargs="+", type=between(1, 4096), default=[1, 16], help="shapes at once")),
            ("train", "--batch", dict(nargs=1, type=between(1, 4096), default=[64], help="shapes a step")),
            ("train", "--compile", dict(action="store_true", help="also compiled, which takes minutes")),
            ("quality", "--n", dict(type=between(2, 1000), default=16, help="samples of every class name")),
            ("quality", "--shapes", dict(type=between(2, 520), default=208, help="captions, of held-out shapes")),
            ("quality", "--resolution", dict(type=int, choices=RESOLUTIONS, default=64, help="of surfaces")),
            ("quality decode sizes", "--checkpoint", dict(default="checkpoints/tiny", help="folder of trained weights")),
            ("decode", "--shapes", dict(type=between(1, len(CLASSES)), default=2, help="how many, a class each")),
            ("decode", "--resolutions", dict(nargs="+", type=int, choices=(64, 128, 256, 512), default=[64, 128, 256], help="cells along a side")),
            ("data", "--counts", dict(nargs="+", type=between(1, 10 ** 6), default=[260, 520, 1040], help="shapes to prepare")),
            ("render", "--points", dict(nargs="+", type=between(1, 10 ** 6), default=[1024, 4096, 16384], help="Gaussians"))):
        for name in names.split():
            sub[name].add_argument(flag, **settings)
    sub["quality"].set_defaults(rounds=1, rep="sdf", seed=0, data=None, copies=1, cache="cache")
    args = parser.parse_args()
    make_folder(args.out)
    bench = Bench(args)
    report(args.out, args.command, BENCHES[args.command](bench), draw=curves if args.command == "sizes" else None)


if __name__ == "__main__":
    command(main)
