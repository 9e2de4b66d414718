"""results.py - what evaluate.py leaves behind: tables, plots, and a cache of single results.

Each result that takes long has a file of its own, so a run that was stopped goes on where it was. A table is a list of
rows: dicts with the same keys, texts first. A number may be an Interval.
"""
import csv
import json
import zipfile
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from engine.commands import UserError
from engine.files import atomic_write, digest


class ResultCache:
    """A folder of results, dicts of arrays, that were all computed with the same settings."""

    def __init__(self, folder, **settings):
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))
        path, now, before = self.folder / "settings.json", self.settings, {}
        try:
            if path.is_file():
                before = json.loads(path.read_text())
            elif not any(self.folder.glob("*.npz")):
                before = now
            changed = [key for key in before | now if before.get(key) != now.get(key)]
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {folder}, and it is made again") from None
        if changed:
            what = "; ".join(f"{key}: {before.get(key)}, now {now.get(key)}" for key in changed)
            raise UserError(f"{folder} holds results of other settings ({what}); delete it, or give another --out")

    def __contains__(self, name):
        return (self.folder / f"{name}.npz").is_file()

    def write(self, name, result):
        if not (self.folder / "settings.json").is_file():
            with atomic_write(self.folder / "settings.json") as part:
                part.write_text(json.dumps(self.settings, indent=1) + "\n")
        with atomic_write(self.folder / f"{name}.npz") as part:
            np.savez(part, **result)

    def read(self, name):
        path = self.folder / f"{name}.npz"
        try:
            with np.load(path) as file:
                return dict(file)
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); delete it, and it is made again") from None


def weights(folder, *stages):
    """{stage: a name for its weights} of a checkpoint folder: results of other weights are not mixed with these."""
    return {stage: digest(path) for stage in stages if (path := Path(folder) / f"{stage}.safetensors").is_file()}


# ---------------------------------------------------------------------------- numbers

def mean(rows):
    """Dicts with the same keys -> one dict of their means; texts are left out."""
    numbers = [key for key, value in rows[0].items() if not isinstance(value, str)]
    return {key: np.mean([row[key] for row in rows]) for key in numbers}


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval."""
    mean: float
    low: float
    high: float

    def __str__(self):
        below, above = self.mean - self.low, self.high - self.mean
        return f"{self.mean:.3f} ± {below:.3f}" if above >= .999 * below else \
            f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def interval(values, most=np.inf):
    """Of several values: their Interval, by Student's t, not beyond the largest possible value; of one: that value."""
    values = np.asarray(values, float)
    if len(values) == 1:
        return values[0]
    half = student.ppf(.975, len(values) - 1) * values.std(ddof=1) / len(values) ** .5
    return Interval(values.mean(), values.mean() - half, min(values.mean() + half, most))


def whiskers(cell):
    """A number or an Interval -> its mean, and how far it reaches below and above: 2 1."""
    mean, low, high = cell if isinstance(cell, Interval) else (cell, cell, cell)
    return mean, [[mean - low], [high - mean]]


# ---------------------------------------------------------------------------- tables and plots

def labels(folders):
    """{checkpoint folder: a short name}, no two alike: as many of the last parts of its path as that takes."""
    folders = list(dict.fromkeys(map(Path, folders)))
    k = next(k for k in count(1) if len({folder.parts[-k:] for folder in folders}) == len(folders))
    return {folder: "-".join(folder.parts[-k:]).replace("/", "") for folder in folders}


def write_tables(out, name, tables, means=True):
    """{label: rows} -> a table for each label; of several labels also a table of their means, or else of all rows."""
    for label, rows in tables.items():
        write_table(out, name if len(tables) == 1 else f"{name}-{label}", rows, means)
    if len(tables) > 1:
        tables = {label: [mean(rows)] if means else rows for label, rows in tables.items()}
        write_table(out, name, [{"checkpoint": label} | row for label, rows in tables.items() for row in rows])


def format_cell(value):
    return str(value) if isinstance(value, (str, Interval)) else f"{value:.3f}"


def write_table(out, name, rows, mean_row=False, draw=None):
    """Print a table; write it as Markdown, as CSV and as a plot: of dots, or what draw(plt, rows) draws."""
    keys = list(rows[0])
    if mean_row:
        rows = rows + [{key: "" for key in keys} | mean(rows) | {keys[0]: "mean"}]
    texts = sum(all(isinstance(row[key], str) for row in rows) for key in keys)
    lines = [keys, ["---"] * texts + ["--:"] * (len(keys) - texts)]
    lines += [[format_cell(value) for value in row.values()] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(table)
    with atomic_write(f"{out}/{name}.md") as part:
        part.write_text(table + "\n")

    flat = [{} for _ in rows]                                 # an Interval takes three columns
    for flat_row, row in zip(flat, rows):
        for key, value in row.items():
            columns = key, f"{key} from", f"{key} to"
            flat_row.update(dict(zip(columns, value)) if isinstance(value, Interval) else {key: value})
    with atomic_write(f"{out}/{name}.csv") as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
        writer.writeheader()
        writer.writerows(flat)

    import matplotlib  # takes a second to import
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = (draw or draw_dots)(plt, rows)
    with atomic_write(f"{out}/{name}.png") as part:
        figure.savefig(part, dpi=100)
    plt.close(figure)
    print(*(f"{out}/{name}.{suffix}" for suffix in ("md", "csv", "png")), sep="\n")


def draw_dots(plt, rows):
    """One panel for each column of numbers, one dot for each row, with its interval."""
    keys = [key for key in rows[0] if not all(isinstance(row[key], str) for row in rows)]
    names = [" ".join(value for value in row.values() if isinstance(value, str) and value) for row in rows]
    columns = min(4, len(keys))
    lines = -(-len(keys) // columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, layout="constrained", sharey=True,
                                figsize=(2 + 2.4 * columns, lines * (.8 + .22 * len(rows))))
    for axis in axes.flat[len(keys):]:
        axis.axis("off")
    for axis, key in zip(axes.flat, keys):
        cells = [np.nan if isinstance(row[key], str) else row[key] for row in rows]
        x, beyond = zip(*map(whiskers, cells))
        axis.errorbar(x, range(len(rows)), xerr=np.hstack(beyond), fmt="o", color="#4c72b0", elinewidth=1)
        axis.grid(axis="y", linewidth=.3)
        axis.set(yticks=range(len(rows)), yticklabels=names)
        axis.set_title(key, size="medium")
        axis.tick_params(labelsize="small")
        axis.locator_params(axis="x", nbins=4)
    axes[0, 0].invert_yaxis()
    return figure
