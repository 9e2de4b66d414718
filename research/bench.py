"""bench.py - the gain of the speed-ups: the plain way and ours take turns in one process.

Seconds change from run to run on a machine that others use too. The ratio of two ways that take turns hardly does.

    python -m research.bench sample --size base          # MAR's published sampling against ours
    python -m research.bench decode                      # a dense grid against one that is refined near the surface
    python -m research.bench train --size small          # a training step in fp32, and as train.py does it
    python -m research.bench busy                        # sample.py alone and beside two busy processes
"""
import contextlib
import math
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch.utils.flop_counter import FlopCounterMode

import backbone
import tokenizer
from engine.commands import Parser, add_device_flags, between, cast_once, command, pick_device
from engine.files import make_folder
from engine.loop import recompute_blocks
from engine.noise import bits, keys_of, normal
from engine.optimizers import optimizers, update
from geometry import surface
from geometry.shapes import CLASSES
from research.exam import open_model
from research.results import write_table

PUBLISHED = 64, 100           # unmasking steps and denoising steps of MAR
SAMPLED, TRAINED = (1, 16), 64            # shapes in a batch


# ---------------------------------------------------------------------------- measuring

def memory(field):
    """Bytes that the process holds (VmRSS), or held at most (VmHWM); nan where there is no /proc."""
    status = Path("/proc/self/status")
    return int(status.read_text().split(f"{field}:")[1].split()[0]) * 1024 if status.is_file() else math.nan


def measure(way, device):
    """-> the seconds that way() takes, and the most MB that it adds to those in use before."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        surface.give_back_memory()                            # its reuse would not be counted
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")     # resets VmHWM
    before, start = torch.cuda.memory_allocated() if cuda else memory("VmRSS"), time.perf_counter()
    way()
    if cuda:
        torch.cuda.synchronize()
    seconds, most = time.perf_counter() - start, torch.cuda.max_memory_allocated() if cuda else memory("VmHWM")
    return seconds, (most - before) / 2 ** 20


def take_turns(args, ways):
    """{name: function} take turns, --rounds times; if more than once, after one to warm up. -> a row for each."""
    rounds, rows = args.rounds, []
    turns = [[measure(way, args.place) for way in ways.values()] for _ in range(rounds + (rounds > 1))][-rounds:]
    for name, measured in zip(ways, zip(*turns)):
        seconds, megabytes = zip(*measured)
        rows.append({"way": name, "seconds": statistics.median(seconds), "peak MB": max(megabytes)})
        rows[-1]["times as fast"] = rows[0]["seconds"] / rows[-1]["seconds"]
    return rows


def random_backbone(place, size, denoiser="flow", widths={"text": 128}, kind=backbone.Backbone, grid=None):
    """A generator of this size without training, for tokens of a grid: side, channels and patch."""
    torch.manual_seed(0)
    grid = grid or tokenizer.SIZES[size]
    patch = grid.get("patch", 1) ** 3
    settings = dict(tokens=grid["side"] ** 3 // patch, channels=grid["channels"] * patch, widths=widths,
                    denoiser=denoiser)
    with torch.device(place):
        return kind(**backbone.SIZES[size] | settings)


def random_condition(b, device):
    """Stands for b captions."""
    return {"text": (torch.randn(b, 20, 128, device=device), torch.ones(b, 20, dtype=torch.bool, device=device))}


def training_flops(generator, batch, known):
    """Floating-point operations of the matrix products of a training step; a generator on the meta device."""
    x = torch.randn(batch, generator.tokens, generator.channels, device="meta")
    with FlopCounterMode(display=False) as counter:
        generator.loss(x, random_condition(batch, "meta"), known).backward()
    return counter.get_total_flops()


# ---------------------------------------------------------------------------- sampling

@torch.no_grad()
def published(model, condition, keys, cfg=2.):
    """MAR's sampling: many steps of both kinds, each with one pass with the prompt and one without; guidance grows."""
    steps, denoise_steps = PUBLISHED
    n = model.tokens
    order = bits(keys, 0, (n,)).argsort(1)                                                            # b n
    dropped = {kind: (tokens, torch.zeros_like(mask)) for kind, (tokens, mask) in condition.items()}
    prefix, unconditional = model.prefix(condition), model.prefix(dropped)                            # b p d, b p each

    x = torch.zeros(len(keys), n, model.channels, device=keys.device)                                 # b n c
    for step, (known, then) in enumerate(backbone.schedule(n, steps)):
        def contexts(prefix):                                 # of all tokens, as MAR, not of the new ones alone
            z = model.contexts(*prefix, x, order, known, order)                                       # b n d
            return rearrange(z[:, known:then], "b m d -> (b m) d")

        def net(x, t, z):
            out = model.net(x, t, z_unconditional)
            return out + (1 + (cfg - 1) * then / n) * (model.net(x, t, z) - out)

        z, z_unconditional = contexts(prefix), contexts(unconditional)                                # (b m) d
        noise = lambda count: normal(keys, 1 + step, (then - known, count, model.channels)).flatten(0, 1)
        sample = model.denoiser.sample(net, z, noise, denoise_steps)                                   # (b m) c
        index = repeat(order[:, known:then], "b m -> b m c", c=model.channels)
        x = x.scatter(1, index, rearrange(sample, "(b m) c -> b m c", b=len(x)))
    return x


def ours(model, condition, keys):
    """As sample.py does it: a flow, few steps, guidance in one batch, chunks of a batch in turn."""
    for chunk, chunk_keys in backbone.cache_sized(model, condition, keys):
        model.generate(chunk, chunk_keys)


def bench_sample(args):
    """Sampling tokens, as MAR published it and as sample.py does it."""
    new = lambda kind: random_backbone(args.place, args.size, kind).eval().requires_grad_(False)
    models = {kind: cast_once(new(kind), args.autocast) for kind in ("ddpm", "flow")}

    def sample(way, denoiser, b):
        with args.autocast():
            way(models[denoiser], random_condition(b, args.place), keys_of([(0, i) for i in range(b)], args.place))

    return [{"batch": f"{b}"} | row for b in SAMPLED for row in take_turns(args, {
        "as published": partial(sample, published, "ddpm", b), "ours": partial(sample, ours, "flow", b)})]


# ---------------------------------------------------------------------------- decoding, training

def bench_decode(args):
    """Meshes of shapes of different classes: a dense grid, and one refined near the surface. Is it the same mesh?"""
    count, rows, model = args.shapes, [], open_model(args, "checkpoints/tiny").load_heads("sdf")
    tokens, head, meshes = model.tokens(CLASSES[:count], [(0, i) for i in range(count)]), model.heads["sdf"], {}

    def extract(way, resolution):
        meshes[way] = [surface.extract(head, x, resolution, model.autocast, way == "refined") for x in tokens]

    for resolution in args.resolutions:
        turns = take_turns(args, {way: partial(extract, way, resolution) for way in ("dense", "refined")})
        same = np.mean([all(map(np.array_equal, *pair)) for pair in zip(*meshes.values())])
        rows += [{"resolution": f"{resolution}"} | row | {"seconds": row["seconds"] / count, "same mesh": same}
                 for row in turns]
    return rows


def bench_train(args):
    """A training step of the backbone, on random tokens."""
    ways = {  # name: autocast, micro-batches, recompute
        "fp32": (contextlib.nullcontext, 1, False), "as train.py does it": (args.autocast, 1, False),
        "with --recompute": (args.autocast, 1, True), "with --micro-batches 4": (args.autocast, 4, False)}

    def trainer(autocast, micro_batches, recompute):
        model, b = random_backbone(args.place, args.size), TRAINED // micro_batches
        opts = optimizers(model, 1e-4)
        if recompute:
            recompute_blocks(model)

        def steps():
            for seed in range(3):                             # three numbers of known tokens
                for _ in range(micro_batches):
                    torch.manual_seed(seed)
                    x = torch.randn(b, model.tokens, model.channels, device=args.place)
                    with autocast():
                        known = backbone.known_counts(model.tokens)[4 + 4 * seed]
                        loss = model.loss(x, random_condition(b, args.place), known) / micro_batches
                    loss.backward()
                update(model, opts)
                model.zero_grad()
        return steps

    turns = take_turns(args, {name: trainer(*settings) for name, settings in ways.items()})
    return [row | {"seconds": row["seconds"] / 3} for row in turns]


# ---------------------------------------------------------------------------- other processes

HERE, SAMPLE = Path(__file__).parents[1], ("--text", "table")
BUSY = "import torch; torch.set_num_threads(1); x = torch.randn(512, 512)\nwhile True: x @ x"


def bench_busy(args):
    """sample.py, alone and beside two busy processes: torch's threads wait as by default, and as sample.py has it."""
    words, rows = [*SAMPLE, "--out", str(Path(args.out).resolve())], []
    for count in (0, 2):
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]

        def sample(load):                                     # sample.py is told the load: the average takes a minute
            code = f"import os, sys; os.getloadavg = lambda: [{load}]; sys.argv[1:] = {words}"
            code += "; import sample; sample.main()"
            env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}        # our own
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=HERE, env=env)
        try:
            rows += [{"beside": f"{count} busy processes"} | row for row in
                     take_turns(args, {"torch's default": partial(sample, 0), "ours": partial(sample, count)})]
        finally:
            for other in others:
                other.kill()
    return rows


# ---------------------------------------------------------------------------- the command

BENCHES = {"sample": bench_sample, "decode": bench_decode, "train": bench_train, "busy": bench_busy}


def main():
    parser = Parser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, bench in BENCHES.items():
        flag = commands.add_parser(name, help=bench.__doc__, description=bench.__doc__).add_argument
        add_device_flags(commands.choices[name])
        flag("--out", default="out/bench", help="folder for the table")
        flag("--rounds", type=between(1, 1000), default=3, help="turns of each way; several after one to warm up")
        if name == "decode":
            flag("--shapes", type=between(1, len(CLASSES)), default=2, help="how many")
            flag("--resolutions", nargs="+", type=int, choices=(64, 128, 256, 512), default=[64, 128, 256],
                 help="cells along a side of the grid")
        else:
            flag("--size", choices=list(backbone.SIZES), default="tiny", help="of the untrained model")
    args = parser.parse_args()
    args.place, args.autocast, reason = pick_device(args.device, args.precision)
    print(f"running on {reason}")
    make_folder(args.out)
    write_table(args.out, args.command, BENCHES[args.command](args))


if __name__ == "__main__":
    command(main)
