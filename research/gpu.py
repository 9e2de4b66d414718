"""gpu.py - what a GPU does with this code, in one table; and whether it does it right.

    python -m research.gpu --quick            # PASS or FAIL, a line each (research/gpu_checks.py)
    python -m research.gpu                    # the bench
    python -m research.gpu --parts attention  # milliseconds of each attention kernel

Each part runs in a process of its own: an error in one does not spoil the next, and its memory is free afterwards.
Memory is what PyTorch reserves from the start of a process, with warm-up and captures: replays allocate nothing.
"""
import argparse
import csv
import json
import os
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import backbone
from engine.commands import Parser, UserError, add_device_flags, between, cast_once, command, pick_device
from engine.files import atomic_write, make_folder, read_config
from engine.graphs import ReplayedSampling
from engine.noise import keys_of
from geometry.surface import extract
from research import gpu_checks
from research.bench import published, random_backbone, random_condition, training_flops
from research.gpu_checks import device_of, run_train
from research.results import write_table
from sample import load

BATCHES = {"tiny": 256, "mini": 256, "small": 256, "base": 64, "large": 32}
WAYS = {"eager": ["--no-compile"], "compiled": []}            # flags of train.py
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
           "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
MASKED = 8                                   # dimensions that stand for a mask (networks.mask_features)
LONGER = {"tokenizer": 4500}                 # steps of stages that stop short of an IoU of .97 by default
SAMPLED = 1, 16, 256                         # shapes at once
STEPS = 300                                  # of a training; those after the first hundred are timed
NEEDED = "fast_simplification", "matplotlib"  # imported late


def apart(function, *args):
    """function(*args), in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


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


# ---------------------------------------------------------------------------- products, attention

def product_speed(device):
    """Floating-point operations a second of a large product in bf16."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n ** 3 / timed(lambda: a @ b, device, 10)


def bench_peak(args, device, autocast):
    yield "bf16 product of large matrices, TFLOP/s", product_speed(device) / 1e12


def bench_attention(args, device, autocast):
    """Forward and backward pass of the attention of a backbone's decoder in training, for each kernel. (pick_device
    switches cuDNN's off; sdpa_kernel switches a kernel on.)"""
    for size in args.sizes:
        settings = backbone.SIZES[size]
        model = random_backbone("meta", size)
        batch, rows = args.batch or BATCHES[size], model.tokens + settings["queries"] + 20
        shape = batch, settings["heads"], rows, settings["dim"] // settings["heads"] + MASKED
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

        def step():
            F.scaled_dot_product_attention(q, k, v, scale=1.).sum().backward()

        for name, kernel in KERNELS.items():
            with sdpa_kernel(kernel):
                try:
                    first = timed(step, device, 1, 1, 0)      # with the plan that cuDNN builds for a new shape
                    took = timed(step, device, args.count)
                except RuntimeError as error:                 # not for this card or width
                    print(f"attention {size}, {name}: {str(error).splitlines()[0]}")
                    continue
            yield f"attention {size} ({' x '.join(map(str, shape))}), {name}: ms, first call", 1000 * first
            yield f"attention {size} ({' x '.join(map(str, shape))}), {name}: ms", 1000 * took


# ---------------------------------------------------------------------------- training

def bench_train(args, device, autocast):
    """train.py: the backbone, on stages before it that had one step."""
    speed = product_speed(device)
    for size in args.sizes:
        batch, folder = args.batch or BATCHES[size], Path(args.out) / f"run-{size}"
        model = random_backbone("meta", size)
        flops = training_flops(model, batch, backbone.known_counts(model.tokens)[8])    # at one moment of generation
        common = ["--size", size, "--cache", args.cache, "--workers", os.cpu_count(), *device_of(args)]
        shutil.rmtree(folder, ignore_errors=True)
        for stage in ("encoders", "tokenizer", "vision"):
            run_train([*common, "--out", folder, "--stage", stage, "--steps", 1, "--batch", 8])
        for way in args.ways:
            own, start = folder.with_name(f"{folder.name}-{way}"), time.perf_counter()
            shutil.rmtree(own, ignore_errors=True)
            flags = ["--from", folder, "--out", own, "--stage", "backbone", "--steps", args.steps, "--batch", batch]
            memory = run_train([*common, *flags, *WAYS[way]])
            seconds = {int(row["step"]): float(row["seconds"]) for row in csv.DictReader((own / "backbone.csv").open())}
            first, last = min(seconds), max(seconds)
            took = (seconds[last] - seconds[first]) / max(last - first, 1) or float("nan")    # nan: too few steps
            name = f"train {size}, {way}"
            yield f"{name}: ms a step of {batch}", 1000 * took
            yield f"{name}: model FLOPs over those of a large product", flops / took / speed
            yield f"{name}: seconds of {first} steps, compiling included", seconds[first]
            yield f"{name}: seconds in all", time.perf_counter() - start
            yield f"{name}: GiB reserved", memory / 2 ** 30


# ---------------------------------------------------------------------------- sampling and decoding

@torch.no_grad()
def bench_sample(args, device, autocast):
    for size in args.sizes:
        took = {}
        for way, denoiser, counts in (("ours", "flow", SAMPLED), ("published", "ddpm", SAMPLED[1:2])):
            model = cast_once(random_backbone(device, size, denoiser).eval().requires_grad_(False), autocast)
            generate = partial(published, model)
            if way == "ours":                                 # as sample.py does it
                generate = ReplayedSampling(model.generate) if device.type == "cuda" else model.generate
            with autocast():
                for b in counts:
                    keys = keys_of([(0, i) for i in range(b)], device)
                    tokens = partial(generate, random_condition(b, device), keys)
                    took[way, b] = timed(tokens, device, 1, *((1, 0) if way == "published" else (3, 3))) / b
                    yield f"sample {size}, {way}: ms a shape, {b} at once", 1000 * took[way, b]
        b = SAMPLED[1]
        yield f"sample {size}: published over ours, {b} at once", took["published", b] / took["ours", b]


def trained(args):
    return f"{args.out}/trained"


def bench_decode(args, device, autocast):
    """Needs the weights that `default` trains."""
    model = load(trained(args), device.type).load_heads("sdf")
    tokens = model.sample("table")[0]
    for resolution in (128, 256, 512) if device.type == "cuda" else (64,):
        took = timed(lambda: extract(model.heads["sdf"], tokens, resolution, model.autocast), device, 1)
        yield f"decode tiny: seconds of a surface at {resolution}^3", took
    took = timed(lambda: model.generate("table", resolution=128), device, 1, 5)
    yield "text to mesh at 128^3, tiny, weights loaded: seconds", took


def bench_default(args, device, autocast):
    """train.py --rep sdf from nothing, with a longer tokenizer."""
    shutil.rmtree(trained(args), ignore_errors=True)
    start, common = time.perf_counter(), ["--rep", "sdf", "--out", trained(args), "--cache", args.cache]
    common += ["--workers", os.cpu_count(), *device_of(args), *args.train_flags]
    stages = [["--stage", "encoders"], *(["--stage", name, "--steps", steps] for name, steps in LONGER.items()), []]
    for flags in stages if not args.train_flags else [[]]:
        run_train([*common, *flags])
    yield "default training: minutes in all", (time.perf_counter() - start) / 60
    for stage, entry in read_config(Path(trained(args))).items():
        yield f"default training, {stage}: seconds", entry["seconds"]
        for name, value in (entry.get("metrics") or {}).items():
            yield f"default training, {stage}: {name}", value


PARTS = {"peak": bench_peak, "attention": bench_attention, "train": bench_train, "sample": bench_sample,
         "default": bench_default, "decode": bench_decode}


def measure(part, args):
    """The rows of a part."""
    device, autocast, reason = pick_device(args.device, args.precision)
    print(f"{part}, running on {reason}")
    rows = []
    for name, value in PARTS[part](args, device, autocast):
        rows.append({"what": name, "value": value})
        tqdm.write(f"{name}: {value:.4g}")
    return rows


# ---------------------------------------------------------------------------- the command

def main():
    parser = Parser(__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--quick", action="store_true", help="checks instead of the bench; exit status 1 if one fails")
    flag("--parts", nargs="+", choices=[*PARTS, *gpu_checks.CHECKS],
         help=f"what to measure, of {', '.join(PARTS)} (decode needs default), or with --quick to check, of "
         f"{', '.join(gpu_checks.CHECKS)} (default: all)")
    flag("--sizes", nargs="+", choices=backbone.SIZES, default=[*backbone.SIZES][:4], help="of backbones")
    flag("--ways", nargs="+", choices=WAYS, default=[*WAYS], help="of training")
    flag("--batch", type=between(1), help="shapes a step (default: 256; base 64, large 32)")
    flag("--steps", type=between(1), default=STEPS, help="training steps; those after the first hundred are timed")
    flag("--count", type=between(1), default=10, help="calls of attention to time, three times")
    flag("--cache", default="cache", help="folder of the prepared data")
    flag("--out", default="out/bench", help="folder for the table and for runs")
    flag("--train-flags", nargs=argparse.REMAINDER, default=[], help="more flags of the default training")
    add_device_flags(parser)
    args = parser.parse_args()
    known = gpu_checks.CHECKS if args.quick else PARTS
    args.parts = args.parts or list(known)
    if other := {*args.parts} - {*known}:
        parser.error(f"--parts {', '.join(sorted(other))} {'are not checks' if args.quick else 'need --quick'}")
    make_folder(args.out)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"not installed here: {', '.join(missing)}; training needs them")
    if args.quick:
        if not all([check(part, args) for part in args.parts]):
            raise SystemExit(1)
        return
    rows, failed = [], []
    for part in args.parts:
        start = time.perf_counter()
        try:
            rows += apart(measure, part, args)
        except Exception as error:                            # the other parts are still measured
            failed.append(f"{part} ({str(error)[:500]})")
        rows.append({"what": f"({part}: seconds)", "value": time.perf_counter() - start})
        with atomic_write(Path(args.out) / "gpu.json") as file:
            file.write_text(json.dumps({"card": apart(gpu_checks.card, args), "torch": torch.__version__, "rows": rows},
                                       indent=1))
    write_table(args.out, "gpu", rows)
    if failed:
        raise UserError(f"not measured: {'; '.join(failed)}")


def check(part, args):
    """Prints the line of a check -> has it passed?"""
    start = time.perf_counter()
    try:
        verdict, text = "PASS", apart(gpu_checks.CHECKS[part], args)
    except Exception as error:                                # the other checks are still made
        verdict, text = "FAIL", " ".join(f"{type(error).__name__}: {error}".split())[:500]
    print(f"{verdict} {part}: {text} ({time.perf_counter() - start:.0f} s)", flush=True)
    return verdict == "PASS"


if __name__ == "__main__":
    command(main)
