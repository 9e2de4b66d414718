"""bench.py - what does each trick bring? The plain way and ours take turns in one process.

Seconds change from run to run on a machine that others use too. The ratio of two ways that take turns hardly does.
Models have random weights where only their cost matters. Each command writes a table and a plot.

    python bench.py sample --size base          # MAR's published sampling, then one trick after the other
    python bench.py quality                     # samples of the trained weights, with fewer and fewer steps
    python bench.py decode                      # a dense grid against one that is refined near the surface
    python bench.py train --size small          # a training step in fp32, and as train.py does it
    python bench.py data                        # preparing shapes: by their number, with one process and with more
    python bench.py sizes                       # cost by tokens, batch, resolution and points
"""
import contextlib
import os
import resource
import tempfile
import time
from functools import partial
from unittest import mock

import numpy as np
import torch
from einops import rearrange
from torch import nn

import backbone
import data
import heads
import tokenizer
import vat
from engine.commands import Parser, add_device_flags, between, cast_once, command, pick_device
from engine.files import make_folder
from engine.loop import recompute_blocks
from engine.state import optimizers
from evaluation.exam import Exam, open_model, result_cache, stages_of
from evaluation.results import write_table
from evaluation.timing import count_flops, matmul_peak, take_turns
from geometry import surface
from geometry.shapes import CLASSES
from geometry.surface import TRUNCATION
from sample import RESOLUTIONS

PUBLISHED = dict(steps=64, denoise_steps=100)                 # of MAR
SCORES = "prompt score,of form,R-precision,Frechet,kernel,1-NNA,right class,one piece,diversity".split(",")


class Bench:
    """Where and how things are measured."""

    def __init__(self, args):
        self.args, self.rounds = args, getattr(args, "rounds", 1)
        self.device, self.autocast, reason = pick_device(args.device, args.precision)
        self.peak = matmul_peak(self.device, self.autocast)
        print(f"running on {reason}; a large matrix product reaches {self.peak / 1e12:.3f} TFLOP/s")

    def backbone(self, device=None, denoiser="flow", **changes):
        """A backbone with random weights."""
        torch.manual_seed(0)
        sizes = tokenizer.SIZES[self.args.size]
        settings = dict(tokens=sizes["side"] ** 3, channels=sizes["channels"], widths={"text": 128}, denoiser=denoiser)
        with torch.device(device or self.device):
            return backbone.Backbone(**backbone.SIZES[self.args.size] | settings | changes)

    def next_scale(self):
        """The generator of vat.py with random weights, ready to sample."""
        torch.manual_seed(0)
        sizes = vat.SIZES[self.args.size]
        settings = {key: sizes[key] for key in ("side", "channels", "codes", "scales")} | vat.GENERATORS[self.args.size]
        model = vat.Generator(**settings, widths={"text": 128}).eval().requires_grad_(False)
        return cast_once(model.to(self.device), self.autocast)

    def sampler(self, *args, **changes):
        """The same, ready to sample."""
        return cast_once(self.backbone(*args, **changes).eval().requires_grad_(False), self.autocast)


def random_condition(b, device):
    """Stands for b captions."""
    return {"text": (torch.randn(b, 20, 128, device=device), torch.ones(b, 20, dtype=torch.bool, device=device))}


# ---------------------------------------------------------------------------- sampling

@torch.no_grad()
def published(model, condition, seeds, steps, denoise_steps, cfg=2.):
    """MAR's sampling: many steps of both kinds, each with one pass with the prompt and one without; guidance grows."""
    b, n, device = len(seeds), model.tokens, model.unknown.device
    generators = [np.random.default_rng(seed) for seed in seeds]
    order = torch.from_numpy(np.stack([rng.permutation(n) for rng in generators])).to(device)         # b n
    noise = backbone.draw_noise(generators, (n, model.denoiser.draws(denoise_steps), model.channels), device)  # b n s c
    hidden = {kind: (tokens, torch.zeros_like(mask)) for kind, (tokens, mask) in condition.items()}
    prefix, no_prompt = model.prefix(condition), model.prefix(hidden)                                 # b p d, b p each

    x = torch.zeros(b, n, model.channels, device=device)                                              # b n c
    for known, then in backbone.schedule(n, steps):
        def contexts(prefix):                                 # of all tokens, as MAR, not of the new ones alone
            c = model.contexts(prefix, x, order, known, order)                                        # b n d
            return rearrange(c[:, known:then], "b m d -> (b m) d")

        def guided(x, t, c):
            out = model.net(x, t, c_no_prompt)
            return out + (1 + (cfg - 1) * then / n) * (model.net(x, t, c) - out)

        c, c_no_prompt = contexts(prefix), contexts(no_prompt)                                        # (b m) d
        new = order[:, known:then]                                                                    # b m
        sample = model.denoiser.sample(guided, c, backbone.take(noise, new), denoise_steps)           # (b m) c
        x = backbone.put(x, new, sample)
    return x


def sample_in_chunks(model, condition, seeds, **options):
    """As sample.py does it."""
    for condition, seeds in backbone.cache_sized(model, condition, seeds):
        model.generate(condition, seeds, **options)


def bench_sample(bench):
    """Sampling tokens: one trick after the other, or all of them against none; and sampling codes, as vat.py does it.
    Two tricks are left out. LazyMAR reuses the difference of the branches of guidance in every other step: a quarter
    less work, a dozen lines more. DiSA denoises later tokens in fewer steps: with four steps that is hardly faster."""
    generate, rows = backbone.Backbone.generate, []
    ways = {  # name: function, denoiser (none: a model of vat.py), options
        "as published: 64 steps, 100 of ddpm, two passes": (published, "ddpm", PUBLISHED),
        "guidance in one batch": (generate, "ddpm", PUBLISHED),
        "flow": (generate, "flow", dict(steps=PUBLISHED["steps"])),
        "few steps": (generate, "flow", {}),
        "as sample.py does it: parts of a batch in turn": (sample_in_chunks, "flow", {})}
    if bench.args.ends:
        ways = dict(list(ways.items())[::4])
    if bench.args.size in vat.SIZES:
        ways["vat.py, scale by scale"] = vat.Generator.generate, None, {}

    def sample(name, b, model, **more):
        function, _, options = ways[name]
        with bench.autocast():
            condition = random_condition(b, next(model.parameters()).device)
            function(model, condition, [(0, i) for i in range(b)], **options | more)

    models, flops = {}, {}
    for name, (_, denoiser, options) in ways.items():
        if denoiser is None:
            models[name] = bench.next_scale()
            continue
        models[name] = bench.sampler(denoiser=denoiser)
        # operations of one shape are linear in the denoising steps; to count all steps would take minutes
        on_meta = lambda meta: bench.backbone(meta, denoiser).requires_grad_(False)
        count = lambda k: count_flops(lambda meta: sample(name, 1, on_meta(meta), denoise_steps=k))
        steps = options.get("denoise_steps", backbone.DENOISERS[denoiser].steps)
        one, two = count(1), count(2)
        flops[name] = one + (steps - 1) * (two - one)

    for b in bench.args.batch:
        runs = {name: partial(sample, name, b, model) for name, model in models.items()}
        turns = take_turns(runs, bench, {name: b * count for name, count in flops.items()})
        rows += [{"batch": f"{b}"} | row for row in turns]
    return rows


def bench_quality(bench):
    """Samples of the same captions and class names, with fewer and fewer steps, by the metrics of evaluate.py."""
    args, rows = bench.args, []
    args.scorer = args.checkpoint
    exam, model = Exam(args, args.n, args.shapes), open_model(args, args.checkpoint)
    masked = model.model.backbone

    def reference(condition, seeds, **_):
        return published(masked, condition, seeds, **PUBLISHED)

    ways = {"as published, {steps} steps of {denoise_steps}, two passes".format(**PUBLISHED): (reference, {})}
    for steps, few in [(10, 4)] if args.ends else [(16, 16), (10, 16), (10, 4), (10, 2), (8, 4), (5, 4)]:
        ways[f"{steps} steps of {few}"] = masked.generate, dict(steps=steps, denoise_steps=few)

    for name, (generate, options) in ways.items():
        masked.generate = generate
        cache = result_cache(args, name, args.checkpoint, *stages_of(args.rep), **options)
        scores, _, _ = exam.scores(model, cache, **options)
        rows.append({"way": name} | {key: scores[key] for key in SCORES})
    real = exam.real()
    return [*rows, {"way": "(held-out shapes)"} | {key: real.get(key, "") for key in SCORES}]


# ---------------------------------------------------------------------------- decoding, training, data

def bench_decode(bench):
    """Meshes of shapes of different classes: a dense grid, and one refined near the surface. Is it the same mesh?"""
    count, rows, model = bench.args.shapes, [], open_model(bench.args, bench.args.checkpoint).load_heads("sdf")
    tokens, head = model.tokens(CLASSES[:count], [(0, i) for i in range(count)]), model.heads["sdf"]  # b n c
    evaluate = head.evaluate
    for resolution in bench.args.resolutions:
        points, meshes = {}, {}

        def extract(way, hierarchical):                       # and count the points that the head evaluates
            def counted(memory, x):
                points[way] += x.shape[1]
                return evaluate(memory, x)

            points[way] = 0
            with mock.patch.object(head, "evaluate", counted):
                meshes[way] = [surface.extract(head, t, resolution, model.autocast, hierarchical) for t in tokens]

        ways = {"dense": partial(extract, "dense", False), "refined": partial(extract, "refined", True)}
        turns = take_turns(ways, bench)
        same = np.mean([all(map(np.array_equal, *pair)) for pair in zip(*meshes.values())])
        rows += [{"resolution": f"{resolution}"} | row
                 | {"seconds": row["seconds"] / count, "points evaluated": points[row["way"]] / count,
                    "times fewer": points["dense"] / points[row["way"]], "same mesh": same} for row in turns]
    return rows


def bench_train(bench):
    """A step of the backbone, on random tokens. Operations are those of the forward and backward passes alone."""
    batch, seeds = bench.args.batch[0], range(3)              # a seed decides the share of hidden tokens
    ways = {  # name: autocast, micro-batches, recompute
        "fp32": (contextlib.nullcontext, 1, False), "as train.py does it": (bench.autocast, 1, False),
        "with --recompute": (bench.autocast, 1, True), "with --micro-batches 4": (bench.autocast, 4, False)}
    if batch % 4:
        del ways["with --micro-batches 4"]

    def backward(model, autocast, seed, micro_batches=1):
        b, device = batch // micro_batches, model.unknown.device
        x, condition = torch.randn(b, model.tokens, model.channels, device=device), random_condition(b, device)
        torch.manual_seed(seed)
        with autocast():
            loss = model.loss(x, condition) / micro_batches
        loss.backward()

    def trainer(autocast, micro_batches, recompute):
        model = bench.backbone()
        if recompute:
            recompute_blocks(model)
        opts = optimizers(model, 1e-4)

        def run():
            for seed in seeds:
                for _ in range(micro_batches):
                    backward(model, autocast, seed, micro_batches)
                nn.utils.clip_grad_norm_(model.parameters(), 1.)
                for opt in opts:
                    opt.step()
                    opt.zero_grad()
        return run

    passes = lambda meta: [backward(bench.backbone(meta), contextlib.nullcontext, seed) for seed in seeds]
    runs, flops = {name: trainer(*settings) for name, settings in ways.items()}, count_flops(passes)
    turns, size = take_turns(runs, bench, dict.fromkeys(ways, flops)), {"size": bench.args.size, "batch": f"{batch}"}
    return [size | row | {"seconds": row["seconds"] / len(seeds)} for row in turns]


def bench_data(bench):
    """Preparing built-in shapes, surface and pictures: by their number, with one process and with all cores."""
    rows = []
    for count in bench.args.counts:
        usage = {}                                            # processes: share of the cores

        def prepare(workers):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                data.prepare("train", count, folder, workers, ("surface", "pictures"))
            after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
            busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            usage[workers] = busy / seconds / workers

        cores = os.cpu_count()
        turns = take_turns({"1 process": partial(prepare, 1), f"{cores} processes": partial(prepare, cores)}, bench)
        rows += [{"shapes": f"{count}"} | row | {"ms a shape": 1e3 * row["seconds"] / count, "share of cores": share}
                 for row, share in zip(turns, usage.values())]
    return rows


# ---------------------------------------------------------------------------- cost by size

class Ball(heads.SdfHead):
    """An untrained head that evaluates its network, but gives the distance of a ball."""

    def evaluate(self, memory, x):
        y = super().evaluate(memory, x)                                           # b k 4
        y[..., 0] = (x.norm(dim=-1) - .7) / TRUNCATION
        return y


def bench_sizes(bench):
    """Cost against size: one size changes, the others are those of sample.py."""
    args = bench.args
    model, untrained = (open_model(args, args.checkpoint).load_heads("sdf", "pc") for _ in range(2))
    tokens = model.tokens(["a chair"], [(0, 0)])[0]                               # n c
    untrained.backbone = bench.sampler()
    untrained.heads["sdf"] = Ball(**tokenizer.SIZES[args.size]).to(bench.device).eval()

    def sample(b, net):
        with bench.autocast():
            sample_in_chunks(net, random_condition(b, bench.device), [(0, i) for i in range(b)])

    decode = partial(model.decode, tokens)
    ways = {
        "shape tokens": {n: partial(sample, 1, bench.sampler(tokens=n)) for n in (64, 216, 512, 1000)},
        "shapes at once": {b: partial(sample, b, bench.sampler()) for b in (1, 4, 16, 64)},
        "from text to meshes": {b: partial(untrained.generate, "a chair", n=b) for b in (1, 4, 16)},
        "resolution of the surface": {r: partial(decode, "sdf", resolution=r) for r in (64, 128, 256, 512)},
        "points of the cloud": {k: partial(decode, "pc", points=k) for k in (2_000, 20_000, 200_000)}}
    return [{"what": what, "how many": row["way"]} | {key: row[key] for key in ("seconds", "spread", "peak MB")}
            for what, sizes in ways.items() for row in take_turns({f"{k}": way for k, way in sizes.items()}, bench)]


def draw_curves(plt, rows):
    """A panel for each quantity that is varied."""
    panels = list(dict.fromkeys(row["what"] for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3), sharey=True, layout="constrained")
    ticks = [.01, .03, .1, .3, 1, 3, 10, 30, 100]
    for axis, what in zip(axes, panels):
        labels, seconds = zip(*((row["how many"], row["seconds"]) for row in rows if row["what"] == what))
        sizes = [int(label) for label in labels]
        axis.loglog(sizes, seconds, "o-")
        axis.set(xlabel=what, xticks=sizes, xticklabels=labels, yticks=ticks, yticklabels=[f"{t:g} s" for t in ticks])
        axis.minorticks_off()
        axis.grid(linewidth=.3)
    axes[0].set_ylim(.8 * min(row["seconds"] for row in rows), 1.25 * max(row["seconds"] for row in rows))
    return figure


# ---------------------------------------------------------------------------- the command

BENCHES = {"sample": bench_sample, "quality": bench_quality, "decode": bench_decode, "train": bench_train,
           "data": bench_data, "sizes": bench_sizes}


def main():
    common = Parser(add_help=False)
    add_device_flags(common)
    common.add_argument("--out", default="out/bench", help="folder for table and plot")
    parser = Parser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name, parents=[common], help=bench.__doc__, description=bench.__doc__)
               for name, bench in BENCHES.items()}

    def flag(names, flag_name, **settings):
        for name in names.split():
            parsers[name].add_argument(flag_name, **settings)

    flag("sample decode train data sizes", "--rounds", type=between(1, 1000), default=3,
         help="turns of each way; if more than one, a turn before them is not timed")
    flag("sample train sizes", "--size", choices=list(backbone.SIZES), default="tiny", help="of the untrained model")
    flag("sample quality", "--ends", action="store_true", help="only as published and as sample.py does it")
    flag("sample", "--batch", nargs="+", type=between(1, 4096), default=[1, 16], help="shapes at once")
    flag("train", "--batch", nargs=1, type=between(1, 4096), default=[64], help="shapes a step")
    flag("quality", "--n", type=between(2, 1000), default=16, help="samples of every class name")
    flag("quality", "--shapes", type=between(2, 520), default=208, help="captions, of held-out shapes")
    flag("quality", "--resolution", type=int, choices=RESOLUTIONS, default=64, help="of surfaces")
    flag("quality decode sizes", "--checkpoint", default="checkpoints/tiny", help="folder of trained weights")
    flag("decode", "--shapes", type=between(1, len(CLASSES)), default=2, help="how many, each of another class")
    flag("decode", "--resolutions", nargs="+", type=int, choices=(64, 128, 256, 512), default=[64, 128, 256],
         help="cells along a side of the grid")
    flag("data", "--counts", nargs="+", type=between(1, 10 ** 6), default=[260, 520, 1040], help="shapes to prepare")
    parsers["quality"].set_defaults(rep="sdf", seed=0, data=None, cache="cache")
    args = parser.parse_args()
    make_folder(args.out)
    rows = BENCHES[args.command](Bench(args))
    write_table(args.out, args.command, rows, draw=draw_curves if args.command == "sizes" else None)


if __name__ == "__main__":
    command(main)
