"""race.py - how long does a recipe take from an empty folder to the goal? The rules and the records: docs/RECORDS.md.

    python -m research.race                                  # recipes/race.sh: row 0, the default recipe
    python -m research.race --recipe mine.sh --seeds 0 1 2

A recipe is a bash script. It trains a checkpoint in $OUT and prepares data in $CACHE, two new folders, with $SEED on
$DEVICE. A recipe that was stopped resumes, and its seconds add up; the judge's do not count.
"""
import csv
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from engine.commands import Parser, UserError, between, command, pick_device
from engine.files import atomic_write, make_folder, read_config
from research.results import interval, write_table

ROOT = Path(__file__).parents[1]
GOAL = {"IoU": .95, "R-precision": .90, "right class": .99}   # of 52 shapes, 208 captions, 13 x 8 samples; means


def product_seconds(device, size=2048, rounds=30):
    """Machines differ: the median of the seconds of a product of two matrices, fp32, by which a time is divided."""
    a, b = torch.randn(2, size, size, device=device)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        (a @ b)[0, 0].item()                                  # a GPU is waited for
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def train(recipe, folder, seed, device):
    """Runs a recipe, or resumes it. run.json of its folder holds its text, with that of files of the same name, its
    seconds, and the machine's product."""
    path = folder / "run.json"
    texts = [part.read_text() for part in sorted(recipe.parent.glob(f"{recipe.stem}.*"))]         # mine.sh, mine.py
    settings = {"recipe": "".join(texts), "seed": seed, "device": device}
    if path.is_file():
        run = json.loads(path.read_text())
    elif any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, and has no run.json with seconds; delete it, or name another --out")
    else:
        run = {"product": product_seconds(device), "seconds": 0.} | settings
    if settings.items() - run.items():
        raise UserError(f"{folder} holds a run of another recipe or device; name another --out")
    if run.get("done"):
        return run
    env = os.environ | {"OUT": f"{folder}/run", "CACHE": f"{folder}/cache", "SEED": f"{seed}", "DEVICE": device,
                        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}           # `python` is this one
    start, process = time.time(), subprocess.Popen(["bash", "-e", recipe], env=env, cwd=ROOT, start_new_session=True)
    try:
        run["done"] = process.wait() == 0
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)                 # train.py saves
        process.wait()
        raise
    finally:
        run["seconds"] += time.time() - start
        with atomic_write(path) as part:
            part.write_text(json.dumps(run, indent=1))
    if not run["done"]:
        raise UserError(f"the recipe ended with status {process.returncode}")
    return run


def judge(folder, cache):
    """-> the metrics of the goal, as evaluate.py measures them; checkpoints/tiny is the scorer."""
    def table(name, *flags):
        done = subprocess.run([sys.executable, "evaluate.py", *flags, "--checkpoint", f"{folder}/run", "--cache", cache,
                               "--out", f"{folder}/judged"], cwd=ROOT)
        if done.returncode:
            raise UserError(f"evaluate.py {flags[0]} ended with status {done.returncode}; the same command goes on")
        with open(f"{folder}/judged/{name}.csv") as file:
            return [*csv.DictReader(file)][-1]                # the mean row, or the row of the checkpoint
    found = table("tokenizer-sdf", "tokenizer", "--shapes", "52")
    found |= table("generate-sdf", "generate", "--shapes", "208", "--n", "8")
    return {metric: float(found[metric]) for metric in GOAL}


def main():
    parser = Parser(__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--recipe", type=Path, default="recipes/race.sh", help="a bash script that trains a checkpoint")
    flag("--seeds", nargs="+", type=between(0), default=[0], help="one run of the recipe for each")
    flag("--out", help="folder of the runs (default: runs/ and the recipe's name)")
    flag("--cache", default="cache", help="folder of the judge's prepared data")
    flag("--device", choices=["cpu", "cuda"], default="cpu", help="the track: two CPU cores, or one GPU")
    args = parser.parse_args()
    if not args.recipe.is_file():
        raise UserError(f"there is no recipe {args.recipe}")
    pick_device(args.device)                                  # one that cannot be used is an error now
    out = Path(args.out or f"runs/{args.recipe.stem}{'-cuda' * (args.device == 'cuda')}").resolve()
    rows = []
    for seed in dict.fromkeys(args.seeds):
        folder = make_folder(out / f"seed-{seed}")
        run = train(args.recipe.resolve(), folder, seed, args.device)
        metrics = judge(folder, Path(args.cache).resolve())
        record = run | metrics | {
            "reached": all(metrics[name] >= least for name, least in GOAL.items()),
            "revision": [*read_config(folder / "run").values()][-1]["revision"],
            "date": f"{datetime.date.today()}"}
        with atomic_write(folder / "record.json") as part:
            part.write_text(json.dumps(record, indent=1))
        rows.append({"seed": f"{seed}", "minutes": run["seconds"] / 60,
                     "thousand products": run["seconds"] / run["product"] / 1000, **metrics,
                     "goal": 1. * record["reached"]})
    if len(rows) > 1:
        reached = all(statistics.fmean(row[name] for row in rows) >= least for name, least in GOAL.items())
        means = {key: interval([row[key] for row in rows]) for key in rows[0] if key != "seed"}
        rows.append({"seed": "mean"} | means | {"goal": 1. * reached})
    write_table(out, "race", rows)


if __name__ == "__main__":
    command(main)
