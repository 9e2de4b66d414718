"""bench.py - the gain of each speed-up: the plain way and ours take turns in one process.

Seconds change from run to run on a machine that others use too. The ratio of two ways that take turns hardly does.
Models have random weights where only their cost matters.

    python -m research.bench sample --size base          # MAR's published sampling, then one speed-up after the other
    python -m research.bench quality                     # scores of samples with fewer and fewer steps
    python -m research.bench decode                      # a dense grid against one that is refined near the surface
    python -m research.bench train --size small          # a training step in fp32, and as train.py does it
    python -m research.bench data                        # preparing shapes with one process and with all cores
"""
import contextlib
import math
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import nn

import backbone
import data
import tokenizer
from engine.commands import Parser, add_device_flags, between, cast_once, command, pick_device
from engine.files import make_folder
from engine.step import optimizers, recompute_blocks, update
from geometry import surface
from geometry.shapes import CLASSES
from research.exam import open_model, result_cache
from research.results import write_table
from research.scores import Exam

PUBLISHED = dict(steps=64, denoise_steps=100)                 # of MAR
SAMPLES = 16                                                  # of each class name, in `quality`
SCORES = "prompt score,of form,R-precision,Frechet,kernel,1-NNA,right class,one piece,diversity".split(",")


# ---------------------------------------------------------------------------- measuring

def memory(field="VmRSS"):
    """Bytes that the process holds (VmRSS), or held at most (VmHWM); nan where there is no /proc."""
    status = Path("/proc/self/status")
    return int(status.read_text().split(f"{field}:")[1].split()[0]) * 1024 if status.is_file() else math.nan


def measure(way, device=torch.device("cpu")):
    """-> the seconds that way() takes, and the most MB that it adds to those in use before."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        surface.give_back_memory()                            # its reuse would not be counted
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")     # resets VmHWM
    before, start = torch.cuda.memory_allocated() if cuda else memory(), time.perf_counter()
    way()
    if cuda:
        torch.cuda.synchronize()
    seconds, most = time.perf_counter() - start, torch.cuda.max_memory_allocated() if cuda else memory("VmHWM")
    return seconds, (most - before) / 2 ** 20


class Bench:
    """Where and how things are measured."""

    def __init__(self, args):
        self.args = args
        self.device, self.autocast, reason = pick_device(args.device, args.precision)
        print(f"running on {reason}")

    def backbone(self, denoiser="flow"):
        """A backbone with random weights."""
        torch.manual_seed(0)
        sizes = tokenizer.SIZES[self.args.size]
        settings = dict(tokens=sizes["side"] ** 3, channels=sizes["channels"], widths={"text": 128}, denoiser=denoiser)
        return backbone.Backbone(**backbone.SIZES[self.args.size] | settings).to(self.device)

    def take_turns(self, ways):
        """{name: function} take turns, --rounds times; if more than once, after one to warm up. -> a row for each."""
        rounds, rows = self.args.rounds, []
        turns = [[measure(way, self.device) for way in ways.values()] for _ in range(rounds + (rounds > 1))][-rounds:]
        for name, measured in zip(ways, zip(*turns)):
            seconds, megabytes = zip(*measured)
            median = statistics.median(seconds)
            rows.append({"way": name, "seconds": median, "spread": (max(seconds) - min(seconds)) / median,
                         "times as fast": rows[0]["seconds"] / median if rows else 1., "peak MB": max(megabytes)})
        return rows


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
    dropped = {kind: (tokens, torch.zeros_like(mask)) for kind, (tokens, mask) in condition.items()}
    prefix, unconditional = model.prefix(condition), model.prefix(dropped)                            # b p d, b p each

    x = torch.zeros(b, n, model.channels, device=device)                                              # b n c
    for known, then in backbone.schedule(n, steps):
        def contexts(prefix):                                 # of all tokens, as MAR, not of the new ones alone
            z = model.contexts(prefix, x, order, known, order)                                        # b n d
            return rearrange(model.net.c(z[:, known:then]), "b m d -> (b m) d")

        def net(x, t, z):
            out = model.net(x, t, z_unconditional)
            return out + (1 + (cfg - 1) * then / n) * (model.net(x, t, z) - out)

        z, z_unconditional = contexts(prefix), contexts(unconditional)                                # (b m) d
        new = order[:, known:then]                                                                    # b m
        sample = model.denoiser.sample(net, z, backbone.take(noise, new), denoise_steps)              # (b m) c
        x = backbone.put(x, new, sample)
    return x


def sample_in_chunks(model, condition, seeds, **options):
    """As sample.py does it."""
    for chunk, chunk_seeds in backbone.cache_sized(model, condition, seeds):
        model.generate(chunk, chunk_seeds, **options)


def bench_sample(bench):
    """Sampling tokens: one speed-up after the other."""
    generate, rows = backbone.Backbone.generate, []
    ways = {  # name: function, denoiser, options
        "as published: 64 steps, 100 of ddpm, two passes": (published, "ddpm", PUBLISHED),
        "guidance in one batch": (generate, "ddpm", PUBLISHED),
        "flow": (generate, "flow", dict(steps=PUBLISHED["steps"])),
        "few steps": (generate, "flow", {}),
        "as sample.py does it: parts of a batch in turn": (sample_in_chunks, "flow", {})}
    if bench.args.ends:
        ways = dict([*ways.items()][::4])

    models = {name: cast_once(bench.backbone(denoiser).eval().requires_grad_(False), bench.autocast)
              for name, (_, denoiser, _) in ways.items()}

    def sample(name, b):
        function, _, options = ways[name]
        with bench.autocast():
            function(models[name], random_condition(b, bench.device), [(0, i) for i in range(b)], **options)

    for b in bench.args.batch:
        rows += [{"batch": f"{b}"} | row for row in bench.take_turns({name: partial(sample, name, b) for name in ways})]
    return rows


def bench_quality(bench):
    """Scores of samples of the same captions and class names, with fewer and fewer steps."""
    args, rows = bench.args, []
    exam, model = Exam(args, SAMPLES, args.shapes), open_model(args, args.checkpoint)
    masked = model.backbone
    ways = {"as published, {steps} steps of {denoise_steps}, two passes".format(**PUBLISHED): (
        lambda condition, seeds, **_: published(masked, condition, seeds, **PUBLISHED), {})}
    for steps, few in [(10, 4)] if args.ends else [(16, 16), (10, 16), (10, 4), (10, 2), (8, 4), (5, 4)]:
        ways[f"{steps} steps of {few}"] = masked.generate, dict(steps=steps, denoise_steps=few)
    for name, (generate, options) in ways.items():
        masked.generate = generate
        cache = result_cache(args, name, args.checkpoint, "research.bench", **options)
        scores, _, _ = exam.scores(model, cache, **options)
        rows.append({"way": name} | {key: scores[key] for key in SCORES})
    real = exam.real()
    return [*rows, {"way": "(held-out shapes)"} | {key: real.get(key, "") for key in SCORES}]


# ---------------------------------------------------------------------------- decoding, training, data

def bench_decode(bench):
    """Meshes of shapes of different classes: a dense grid, and one refined near the surface. Is it the same mesh?"""
    count, rows, model = bench.args.shapes, [], open_model(bench.args, bench.args.checkpoint).load_heads("sdf")
    tokens, head, meshes = model.tokens(CLASSES[:count], [(0, i) for i in range(count)]), model.heads["sdf"], {}

    def extract(way, resolution):
        meshes[way] = [surface.extract(head, x, resolution, model.autocast, way == "refined") for x in tokens]

    for resolution in bench.args.resolutions:
        turns = bench.take_turns({way: partial(extract, way, resolution) for way in ("dense", "refined")})
        same = np.mean([all(map(np.array_equal, *pair)) for pair in zip(*meshes.values())])
        rows += [{"resolution": f"{resolution}"} | row | {"seconds": row["seconds"] / count, "same mesh": same}
                 for row in turns]
    return rows


def bench_train(bench):
    """A training step of the backbone, on random tokens."""
    batch, seeds = bench.args.batch[0], range(3)              # a seed decides the mask ratio
    ways = {  # name: autocast, micro-batches, recompute
        "fp32": (contextlib.nullcontext, 1, False), "as train.py does it": (bench.autocast, 1, False),
        "with --recompute": (bench.autocast, 1, True), "with --micro-batches 4": (bench.autocast, 4, False)}

    def trainer(autocast, micro_batches, recompute):
        model, b = bench.backbone(), batch // micro_batches
        opts = optimizers(model, 1e-4)
        if recompute:
            recompute_blocks(model)

        def run():
            for seed in seeds:
                for _ in range(micro_batches):
                    x = torch.randn(b, model.tokens, model.channels, device=bench.device)
                    torch.manual_seed(seed)
                    with autocast():
                        loss = model.loss(x, random_condition(b, bench.device)) / micro_batches
                    loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.)
                update(opts, 1e-4)
                model.zero_grad()
        return run

    turns = bench.take_turns({name: trainer(*settings) for name, settings in ways.items()})
    return [row | {"seconds": row["seconds"] / len(seeds)} for row in turns]


def bench_data(bench):
    """Preparing built-in shapes, surface and pictures, with one process and with all cores."""
    def prepare(workers):
        with tempfile.TemporaryDirectory() as folder:
            data.prepare("train", bench.args.shapes, folder, workers, ("surface", "pictures"))

    cores = os.cpu_count()
    return bench.take_turns({"1 process": partial(prepare, 1), f"{cores} processes": partial(prepare, cores)})


# ---------------------------------------------------------------------------- the command

BENCHES = {"sample": bench_sample, "quality": bench_quality, "decode": bench_decode, "train": bench_train,
           "data": bench_data}


def main():
    parser = Parser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, bench in BENCHES.items():
        flag = commands.add_parser(name, help=bench.__doc__, description=bench.__doc__).add_argument
        add_device_flags(commands.choices[name])
        flag("--out", default="out/bench", help="folder for the table")
        if name != "quality":
            flag("--rounds", type=between(1, 1000), default=3, help="turns of each way; several after one to warm up")
        if name in ("sample", "train"):
            flag("--size", choices=list(backbone.SIZES), default="tiny", help="of the untrained model")
            flag("--batch", nargs="+", type=between(1, 4096), default=[1, 16] if name == "sample" else [64],
                 help="shapes at once; of train, a multiple of 4")
        if name in ("sample", "quality"):
            flag("--ends", action="store_true", help="only as published and as sample.py does it")
        if name in ("quality", "decode", "data"):
            flag("--shapes", type=between(1), default={"quality": 208, "decode": 2, "data": 520}[name], help="how many")
            flag("--checkpoint", default="checkpoints/tiny", help="folder of trained weights")
        if name == "decode":
            flag("--resolutions", nargs="+", type=int, choices=(64, 128, 256, 512), default=[64, 128, 256],
                 help="cells along a side of the grid")
    commands.choices["quality"].set_defaults(rep="sdf", seed=0, data=None, cache="cache", resolution=64)
    args = parser.parse_args()
    args.scorer = getattr(args, "checkpoint", None)
    make_folder(args.out)
    write_table(args.out, args.command, BENCHES[args.command](Bench(args)))


if __name__ == "__main__":
    command(main)
