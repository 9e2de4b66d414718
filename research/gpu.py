"""gpu.py - what a GPU does with this code, in one table: python -m research.gpu

It makes its own data and takes at most eight minutes. --parts chooses among: peak, train, sample, decode, default.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from engine.step import EMA, optimizers, set_rate, update
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import backbone
from data import prepare
from encoders import Encoders
from engine.commands import Parser, UserError, add_device_flags, between, cast_once, command, pick_device
from engine.files import atomic_write, make_folder, read_config
from engine.graphs import Replayed, ReplayedSampling, compiled
from engine.noise import keys_of
from geometry.surface import extract
from geometry.training_samples import PICTURES, SURFACE
from prompts import image_tower, text_tower
from prompts.reading import nouns_of
from research.bench import published, random_backbone, random_condition
from research.results import write_table
from sample import load

BATCHES = {"tiny": 256, "mini": 256, "small": 256, "base": 64, "large": 32}
WAYS = {"eager": (False, False), "graph": (True, False), "compiled": (True, True)}     # compiled: and a CUDA graph
LONGER = {"tokenizer": 4500}                 # steps of stages that stop short of an IoU of .97 by default
SAMPLED, SHAPES = (1, 16, 256), 130          # shapes at once; built-in shapes that batches are drawn from
NEEDED = "fast_simplification", "matplotlib"  # imported late


def timed(function, device, count, rounds=3, warm=1):
    """The median of `rounds` means over `count` calls, in seconds; `warm` more rounds come first."""
    times = []
    for _ in range(warm + rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times[warm:])


# ---------------------------------------------------------------------------- training

def small_set(args):
    """Built-in shapes on the device, untrained towers for their prompts."""
    split = prepare("train", SHAPES, args.cache, os.cpu_count(), (SURFACE, PICTURES)).to(args.place)
    captions = [caption for own in split.captions for caption in own]
    sizes = text_tower.SIZES["tiny"], image_tower.SIZES["tiny"]
    text = text_tower.TextAndCloud(text_tower.vocabulary(captions), nouns_of(captions), **sizes[0])
    towers = [tower.to(args.place).eval().requires_grad_(False)
              for tower in (text, image_tower.ImageTower(text.width, **sizes[1]))]
    return split, Encoders(*towers)


class Training:
    """The step of train.py's `fit`, for a backbone at one moment of generation."""

    def __init__(self, args, size, way, split, towers):
        self.graph, fused = WAYS[way]
        self.model = random_backbone(args, size, widths=towers.widths)
        self.args, self.split, self.towers = args, split, towers
        self.batch, self.known = args.batch or BATCHES[size], backbone.known_counts(self.model.tokens)[8]
        self.tokens = torch.randn(len(split), self.model.tokens, self.model.channels, device=args.place)
        self.ema, self.opts = EMA(self.model), optimizers(self.model, 1e-3)
        self.loss = compiled(self.loss_of) if fused else self.loss_of

    def draw(self):
        drawn = self.towers.draw(self.split, self.split.draw(self.batch))
        return self.tokens[drawn.pop("rows")], drawn

    def loss_of(self, batch):
        return self.model.loss(batch[0], self.towers.encode_drawn(batch[1]), self.known)

    def stepper(self, draw):
        """A function that takes one step on the batch of draw()."""
        def micro_batch():
            batch = draw()
            with self.args.autocast():
                loss = self.loss(batch)
            loss.backward()

        def update_weights():
            update(self.opts, nn.utils.clip_grad_norm_(self.model.parameters(), 1.).isfinite())
            self.model.zero_grad(set_to_none=not self.graph)

        micro_batch, update_weights = Replayed(micro_batch, self.graph), Replayed(update_weights, self.graph)

        def step():
            torch.manual_seed(0)
            set_rate(self.opts, 1e-3)
            micro_batch()
            update_weights()
            self.ema.update(10_000)
        return step

    def flops(self):
        """Floating-point operations of the matrix products of a step."""
        with FlopCounterMode(display=False) as counter, self.args.autocast():
            self.loss_of(self.draw()).backward()
        self.model.zero_grad()
        return counter.get_total_flops()


def bench_peak(args):
    n = 8192 if args.place.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=args.place, dtype=torch.bfloat16) for _ in range(2))
    args.peak = 2 * n ** 3 / timed(lambda: a @ b, args.place, 10)
    yield f"bf16 product of {n} x {n}, TFLOP/s", args.peak / 1e12


def bench_train(args):
    split, towers = small_set(args)
    for size in args.sizes:
        for way in args.ways or (WAYS if args.place.type == "cuda" else ["eager"]):
            start, name = time.perf_counter(), f"train {size}, {way}"
            try:
                training = Training(args, size, way, split, towers)
                flops, step = training.flops(), training.stepper(training.draw)
                for _ in range(3):
                    step()
                ready = time.perf_counter() - start
                if args.place.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                took, fixed = timed(step, args.place, args.count), training.draw()
                yield f"{name}: ms a step of {training.batch}", 1000 * took
                yield f"{name}: model FLOPs over the peak", flops / took / args.peak
                yield f"{name}: seconds until ready", ready
                if args.place.type == "cuda":
                    yield f"{name}: peak GiB", torch.cuda.max_memory_allocated() / 2 ** 30
                if way == "graph":
                    alone = training.stepper(lambda: fixed)
                    for _ in range(3):
                        alone()
                    yield f"{name}: share of time for data", 1 - timed(alone, args.place, args.count) / took
            except RuntimeError as error:                     # out of memory, or this version cannot compile it
                args.failed.append(f"{name} ({str(error)[:500]})")
            training = step = alone = fixed = None
            if args.place.type == "cuda":
                torch.cuda.empty_cache()


# ---------------------------------------------------------------------------- sampling and decoding

@torch.no_grad()
def bench_sample(args):
    for size in args.sizes:
        took = {}
        for way, denoiser, counts in (("ours", "flow", SAMPLED), ("published", "ddpm", SAMPLED[1:2])):
            model = cast_once(random_backbone(args, size, denoiser).eval().requires_grad_(False), args.autocast)
            generate = partial(published, model)
            if way == "ours":                                 # as sample.py does it
                generate = ReplayedSampling(model.generate) if args.place.type == "cuda" else model.generate
            with args.autocast():
                for b in counts:
                    keys = keys_of([(0, i) for i in range(b)], args.place)
                    tokens = partial(generate, random_condition(b, args.place), keys)
                    took[way, b] = timed(tokens, args.place, 1, *((1, 0) if way == "published" else (3, 3))) / b
                    yield f"sample {size}, {way}: ms a shape, {b} at once", 1000 * took[way, b]
        b = SAMPLED[1]
        yield f"sample {size}: published over ours, {b} at once", took["published", b] / took["ours", b]


def bench_decode(args):
    """Needs the weights that `default` trains."""
    model = load(args.trained, args.place.type).load_heads("sdf")
    tokens = model.sample("table")[0]
    for resolution in (128, 256, 512) if args.place.type == "cuda" else (64,):
        took = timed(lambda: extract(model.heads["sdf"], tokens, resolution, model.autocast), args.place, 1)
        yield f"decode tiny: seconds of a surface at {resolution}^3", took
    took = timed(lambda: model.generate("table", resolution=128), args.place, 1, 5)
    yield "text to mesh at 128^3, tiny, weights loaded: seconds", took


def bench_default(args):
    """train.py --rep sdf from nothing, with a longer tokenizer."""
    shutil.rmtree(args.trained, ignore_errors=True)
    start, common = time.perf_counter(), ["--rep", "sdf", "--out", args.trained, "--cache", args.cache]
    common += ["--workers", os.cpu_count(), "--device", args.place.type, *args.train_flags]
    stages = [["--stage", "encoders"], *(["--stage", name, "--steps", steps] for name, steps in LONGER.items()), []]
    for flags in stages if not args.train_flags else [[]]:
        command = [sys.executable, "train.py", *common, *flags]
        log = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if log.returncode:
            raise UserError(f"{' '.join(map(str, command))} failed: {log.stderr.strip().splitlines()[-1]}")
    yield "default training: minutes in all", (time.perf_counter() - start) / 60
    for stage, entry in read_config(Path(args.trained)).items():
        yield f"default training, {stage}: seconds", entry["seconds"]
        for name, value in (entry.get("metrics") or {}).items():
            yield f"default training, {stage}: {name}", value


PARTS = {"peak": bench_peak, "train": bench_train, "sample": bench_sample, "default": bench_default,
         "decode": bench_decode}


# ---------------------------------------------------------------------------- the command

def main():
    parser = Parser(__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="what to measure; decode needs default")
    flag("--sizes", nargs="+", choices=backbone.SIZES, default=[*backbone.SIZES][:4], help="of backbones")
    flag("--ways", nargs="+", choices=WAYS,
         help="of training: eager, as CUDA graphs, compiled too, a minute a size (default: all on a GPU)")
    flag("--batch", type=between(1), help="shapes a step (default: 256; base 64, large 32)")
    flag("--count", type=between(1), default=10, help="steps to time, three times")
    flag("--cache", default="cache", help="folder of the prepared data")
    flag("--out", default="out/bench", help="folder for the table")
    flag("--train-flags", nargs=argparse.REMAINDER, default=[], help="more flags of the default training")
    add_device_flags(parser)
    args = parser.parse_args()
    args.place, args.autocast, reason = pick_device(args.device, args.precision)
    if args.place.type != "cuda" and {*(args.ways or ())} - {"eager"}:
        raise UserError("--ways graph and compiled need a GPU; leave --ways out")
    print(f"running on {reason}")
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"not installed here: {', '.join(missing)}; the part `default` needs them")
    card = torch.cuda.get_device_name() if args.place.type == "cuda" else "CPU"
    args.peak, args.trained, args.failed, rows = float("nan"), f"{make_folder(args.out)}/trained", [], []
    for part in args.parts:
        start = time.perf_counter()
        try:
            for name, value in PARTS[part](args):
                rows.append({"what": name, "value": value})
                tqdm.write(f"{name}: {value:.4g}")
        except Exception as error:                            # the other parts are still measured
            args.failed.append(f"{part} ({str(error)[:500]})")
        rows.append({"what": f"({part}: seconds)", "value": time.perf_counter() - start})
        with atomic_write(Path(args.out) / "gpu.json") as file:
            file.write_text(json.dumps({"card": card, "torch": torch.__version__, "rows": rows}, indent=1))
    write_table(args.out, "gpu", rows)
    if args.failed:
        raise UserError(f"not measured: {'; '.join(args.failed)}")


if __name__ == "__main__":
    command(main)
