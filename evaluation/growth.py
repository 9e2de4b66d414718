"""growth.py - memory in use, early and late in many samples and in many steps of training, within one process.

    python -m evaluation.growth
"""
import math
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
from tqdm import tqdm

import train
from engine.commands import Parser, UserError, between, command
from engine.files import make_folder
from evaluation.results import write_table
from evaluation.timing import memory
from sample import load

ALLOWED = 10         # MB: what Python and torch keep for later comes and goes


@contextmanager
def watched():
    """Yields a list that fills with MB in use, twenty readings a second."""
    readings, over = [], threading.Event()

    def watch():
        while not over.wait(.05):
            readings.append(memory() / 2 ** 20)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield readings
    finally:
        over.set()
        thread.join()


def growth(readings):
    """-> the lowest readings of the second tenth of the time, and of the last one."""
    tenths = np.array_split(readings, 10)
    return tenths[1].min(), tenths[-1].min()


def sample(count, folder):
    model = load("checkpoints/tiny")
    for i in tqdm(range(count), desc="samples", unit="shape"):
        model.generate("a red chair", seed=i)[0].save(folder / "chair.glb")


def steps(count, folder):
    flags = {"--stage": "encoders", "--shapes": 400, "--batch": 8, "--steps": count,
             "--out": folder / f"run-{count}", "--cache": folder / "cache"}
    with mock.patch.object(sys, "argv", ["train.py", *(str(word) for flag in flags.items() for word in flag)]):
        train.main()


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--samples", type=between(100, 10_000), default=200, help="to draw")
    parser.add_argument("--steps", type=between(100, 100_000), default=2000, help="to train")
    parser.add_argument("--out", default="out/growth", help="folder of the table")
    args, rows = parser.parse_args(), []
    if math.isnan(memory()):
        raise UserError("memory is read from /proc, which only Linux has")
    make_folder(args.out)
    for what, count, way in (("samples", args.samples, sample), ("steps", args.steps, steps)):
        with tempfile.TemporaryDirectory() as folder:
            way(20, Path(folder))                             # prepares data, fills caches
            with watched() as readings:
                way(count, Path(folder))
        early, late = growth(readings)
        rows.append({"what": f"{count} {what}", "MB early": early, "MB late": late, "growth": late - early})
    write_table(args.out, "growth", rows)
    if any(row["growth"] > ALLOWED for row in rows):
        raise UserError(f"memory grows by more than {ALLOWED} MB")


if __name__ == "__main__":
    command(main)
