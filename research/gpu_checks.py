"""gpu_checks.py - does a GPU compute what a CPU computes? The checks of `python -m research.gpu --quick`.

A check is a function of the flags that returns a line, or raises an exception that says what is wrong. No GPU has made
them yet; `--device cpu` compares a CPU with itself, which tests the checks.
"""
import csv
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from data import prepare
from engine.commands import UserError, pick_device
from engine.graphs import KEPT
from engine.networks import Attention, Block
from engine.stage import RELATIVES
from geometry.training_samples import PICTURES, SURFACE
from relatives.prior import SIDES
from relatives.sequence import AdaBlock
from representations.gs import VIEWS
from representations.mesh import FACES
from sample import load

HERE = Path(__file__).parents[1]
OLDEST = 2, 10                               # version of torch
NEAR = {"fp32": 1e-4, "bf16": .03}           # mean error of attention, relative to its mean size
TOKENS = .02                                 # mean difference of tokens, whose standard deviation is 1, in fp32
LOSSES = .05                                 # relative difference of losses, compiled and eager: bf16 rounds otherwise
STEPS, BATCH, SHAPES, CLASSES = 5, 8, 16, ("table", "chair")
MORE = {"ltm3d": (FACES, VIEWS), "latte3d": (SIDES,)}         # kinds of training samples that others lack
GROWTH = 64 * 2 ** 20                        # bytes that a repetition may add
TRAIN = """
import resource
import torch
import train
from engine.commands import command
command(train.main)
print(torch.cuda.is_available() and torch.cuda.max_memory_reserved()
      or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def device_of(args):
    """The flags of the device, for other commands."""
    return [word for name in ("device", "precision") if (value := getattr(args, name))
            for word in (f"--{name}", value)]


def run_train(flags):
    """train.py, as a command -> the bytes that it reserved at most: of a GPU, or else of memory."""
    words = [*map(str, flags)]
    done = subprocess.run([sys.executable, "-c", TRAIN, *words], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise UserError(f"python train.py {' '.join(words)}: {lines[-1]}")
    return int(done.stdout.split()[-1])


def card(args):
    """The name of the device."""
    device, _, _ = pick_device(args.device, args.precision)
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


# ---------------------------------------------------------------------------- the checks

def check_versions(args):
    found = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if found < OLDEST:
        raise UserError(f"torch {torch.__version__} is too old, see requirements.txt")
    missing = [name for name, there in (("Triton", find_spec("triton")), ("gcc", shutil.which("gcc"))) if not there]
    without = f"; no {' and no '.join(missing)}: training is eager" if missing else ""
    return f"{card(args)}, torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN " \
           f"{torch.backends.cudnn.version()}, Python {sys.version.split()[0]}{without}"


def outputs_of(layer, x, mask, device, bf16):
    """The output of a layer on a device, and the gradient of its input."""
    layer, x = layer.to(device), x.detach().to(device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        out = layer(x, mask.to(device))
    out.float().square().sum().backward()
    return [y.detach().float().cpu() for y in (out, x.grad)]


def check_attention(args):
    """Blocks of all head widths: with masks of keys, with masks of pairs, and VAT's and LoST's blocks."""
    device, worst = pick_device(args.device)[0], {}
    torch.manual_seed(0)
    for dim, heads in ((256, 8), (384, 6), (160, 5)):
        x, keys = torch.randn(4, 90, dim), torch.rand(4, 90) < .7
        keys[:, 0] = True
        pairs = keys[:, None] & (torch.ones(90, 90).tril() > 0)
        pairs[:, :, 0] = True
        ada, modulation = AdaBlock(dim, heads), torch.randn(4, 6, dim)
        plain, block = Attention(dim, heads), Block(dim, heads)
        layers = {"keys": (plain, keys), "pairs": (plain, pairs), "block": (block, keys), "ada": (ada, pairs)}
        for bf16 in (False, True):
            for name, (layer, mask) in layers.items():
                call = Called(layer, modulation if name == "ada" else None)
                true = outputs_of(call, x, mask, torch.device("cpu"), False)
                found = outputs_of(call, x, mask, device, bf16)
                error = max(float((a - b).abs().mean() / b.abs().mean()) for a, b in zip(found, true))
                precision = "bf16" if bf16 else "fp32"
                worst[precision] = max(worst.get(precision, 0.), error)
                if not error < NEAR[precision]:
                    raise UserError(f"{name}, {dim} dimensions, {heads} heads, {precision}: error {error:.2g}")
    return ", ".join(f"error in {precision} {error:.1g}" for precision, error in worst.items())


class Called(torch.nn.Module):
    """A layer as a function of rows and a mask."""

    def __init__(self, layer, modulation):
        super().__init__()
        self.layer = layer
        self.register_buffer("modulation", modulation)

    def forward(self, x, mask):
        return self.layer(x, mask=mask) if self.modulation is None else self.layer(x, self.modulation, mask)


def check_sample(args):
    """The same prompt and seed three times, eager, captured and replayed, in fp32: the CPU's tokens."""
    true = load(device="cpu", precision="fp32").sample("a red chair with arms", seed=3)
    model = load(device=args.device, precision="fp32")
    errors = [float((model.sample("a red chair with arms", seed=3).cpu() - true).abs().mean()) for _ in range(3)]
    if not max(errors) < TOKENS:
        raise UserError(f"tokens of checkpoints/tiny differ from the CPU's by {', '.join(f'{x:.2g}' for x in errors)}")
    return f"tokens of checkpoints/tiny differ from the CPU's by {max(errors):.1g}"


def memory_in_use(device):
    if device.type == "cuda":
        return torch.cuda.memory_reserved()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_memory(args):
    """More combinations than graphs are kept, again and again: memory in use stays."""
    model, used = load(device=args.device, precision=args.precision), []
    for _ in range(3):
        for n in range(1, KEPT + 3):
            for _ in range(3):
                model.sample("a table", n=n, steps=2, rounds=0)
        used.append(memory_in_use(model.device))
    if used[-1] - used[-2] > GROWTH:
        raise UserError(f"sampling uses ever more memory: {', '.join(f'{x / 2 ** 20:.0f}' for x in used)} MiB")
    return f"sampling uses {used[-1] / 2 ** 20:.0f} MiB"


def check_training(args, model):
    """Some steps of every stage, compiled and eager: the losses of the logs."""
    folders = {way: Path(args.out) / f"quick-{model}-{way}" for way in ("eager", "compiled")}
    common = ["--model", model, "--steps", STEPS, "--batch", BATCH, "--shapes", SHAPES, "--classes", *CLASSES,
              "--cache", args.cache, *device_of(args)]
    common += ["--rep", "all"] if model == "ltm3d" else ["--from", "checkpoints/tiny"]
    kinds = SURFACE, PICTURES, *MORE.get(model, ())
    for split, count in (("train", SHAPES), ("test", None)):   # once for both commands
        prepare(split, count, args.cache, os.cpu_count(), kinds, classes=CLASSES)
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
    with ThreadPoolExecutor(2) as pool:
        memory = pool.map(run_train, [[*common, "--out", folder, *["--no-compile"] * (way == "eager")]
                                      for way, folder in folders.items()])
        memory = dict(zip(folders, memory))
    used = ", ".join(f"{size / 2 ** 30:.1f} GiB {way}" for way, size in memory.items())
    return f"{compared(folders)}; {used}"


def compared(folders):
    """Compares the logs of two runs."""
    logs = {way: {path.stem: [*csv.DictReader(path.open())][-1] for path in sorted(folder.glob("*.csv"))}
            for way, folder in folders.items()}
    if not logs["eager"] or logs["eager"].keys() != logs["compiled"].keys():
        raise UserError(f"stages {', '.join(logs['eager'])} eager, {', '.join(logs['compiled'])} compiled")
    worst = 0.
    for stage, row in logs["eager"].items():
        for column in ("loss", "held_out"):
            one, other = float(row[column]), float(logs["compiled"][stage][column])
            error = abs(one - other) / max(abs(one), 1e-3)
            if not error < LOSSES:
                raise UserError(f"{stage}, {column} after {row['step']} steps: {one} eager, {other} compiled")
            worst = max(worst, error)
    return f"losses of {len(logs['eager'])} stages agree to {worst:.1g}"


CHECKS = {"versions": check_versions, "attention": check_attention, "sample": check_sample, "memory": check_memory}
CHECKS |= {name: partial(check_training, model=name) for name in ("ltm3d", *RELATIVES)}
