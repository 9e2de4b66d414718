"""evaluation/results.py - what evaluate.py leaves behind: tables, plots, and the single results they are made of.

Whatever takes long is kept, a file each, so that a run that was killed goes on where it was. A table is a list of dicts with the
same keys, texts first; a number may be a pair, a mean and how far its 95 % confidence interval reaches to either side.

    python evaluate.py generate --rep sdf       # a command that writes them
"""
import csv
import json
import zipfile
from itertools import count
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from engine.commands import UserError
from engine.files import atomic_write, digest


class Kept:
    """Results of some settings, in a folder: `kept(name, make)` gives what make() did, a dict of arrays, or does it now."""

    def __init__(self, folder, **settings):
        self.folder, path = Path(folder), Path(folder) / "settings.json"
        self.settings = settings = json.loads(json.dumps(settings))
        try:
            before = json.loads(path.read_text()) if path.is_file() else settings
            other = [f"{key}: {before.get(key)}, now {settings.get(key)}" for key in before | settings if before.get(key) != settings.get(key)]
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {folder}, and it is made again") from None
        if other:
            raise UserError(f"{folder} holds results of other settings ({'; '.join(other)}); delete it, or give another --out")
        if not path.is_file() and any(self.folder.glob("*.npz")):
            raise UserError(f"{folder} holds results, but not their {path.name}; delete it, and they are made again")

    def __contains__(self, name):
        return (self.folder / f"{name}.npz").is_file()

    def __call__(self, name, make):
        path = self.folder / f"{name}.npz"
        if name not in self:
            made = make()
            if not (self.folder / "settings.json").is_file():
                with atomic_write(self.folder / "settings.json") as part:
                    part.write_text(json.dumps(self.settings, indent=1) + "\n")
            with atomic_write(path) as part:
                np.savez(part, **made)
        try:
            with np.load(path) as file:
                return dict(file)
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); delete it, and it is made again") from None


def weights(folder, *stages):
    """What names the weights of a checkpoint folder: results of others are not mixed with these."""
    return {stage: digest(path) for stage in stages if (path := Path(folder) / f"{stage}.safetensors").is_file()}


# ---------------------------------------------------------------------------- numbers

def mean(each):
    """Dicts of the same keys -> one of their means; texts are left out."""
    return {key: np.mean([one[key] for one in each]) for key in each[0] if not isinstance(each[0][key], str)} if each else {}


def interval(values):
    """-> mean, and how far the 95 % confidence interval of Student's t reaches; of a single value, that value."""
    values = np.asarray(values, float)
    if len(values) == 1:
        return values[0]
    return values.mean(), student.ppf(.975, len(values) - 1) * values.std(ddof=1) / len(values) ** .5


def intervals(each):
    """Dicts of the same keys -> one of their intervals; texts are left out."""
    return {key: interval([one[key] for one in each]) for key in each[0] if not isinstance(each[0][key], str)}


# ---------------------------------------------------------------------------- tables and plots

def labels(folders):
    """Short names of checkpoint folders, no two alike: as many of their last parts as that takes."""
    folders = list(dict.fromkeys(map(Path, folders)))
    k = next(k for k in count(1) if len({folder.parts[-k:] for folder in folders}) == len(folders))
    return {folder: "-".join(folder.parts[-k:]).replace("/", "") for folder in folders}


def compare(out, name, tables, means=True):
    """{label: rows}: a table for each; of several also one of all, of their means or, where those make no sense, of all rows."""
    for label, rows in tables.items():
        report(out, name if len(tables) == 1 else f"{name}-{label}", rows, means)
    if len(tables) > 1:
        report(out, name, [{"checkpoint": label} | row for label, rows in tables.items() for row in ([mean(rows)] if means else rows)])


def shown(value):
    if isinstance(value, tuple):
        return f"{value[0]:.3f} ± {value[1]:.3f}"
    return value if isinstance(value, str) else f"{value:.3f}"


def report(out, name, rows, mean_row=False, draw=None):
    """Prints a table; writes it as Markdown, as CSV and as a plot: dots, or what draw(plt, rows) draws."""
    keys = list(rows[0])
    if mean_row:
        rows = rows + [{key: "" for key in keys} | mean(rows) | {keys[0]: "mean"}]
    texts = sum(all(isinstance(row[key], str) for row in rows) for key in keys)
    lines = [keys, ["---"] * texts + ["--:"] * (len(keys) - texts)] + [list(map(shown, row.values())) for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(table)
    with atomic_write(f"{out}/{name}.md") as part:
        part.write_text(table + "\n")
    with atomic_write(f"{out}/{name}.csv") as part, part.open("w", newline="") as file:
        flat = [{k: v for key, value in row.items()
                 for k, v in (((key, value[0]), (f"{key} ±", value[1])) if isinstance(value, tuple) else ((key, value),))} for row in rows]
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
        writer.writeheader()
        writer.writerows(flat)
    figure(f"{out}/{name}.png", rows, draw or dots)
    print(*(f"{out}/{name}.{suffix}" for suffix in ("md", "csv", "png")), sep="\n")


def figure(path, rows, draw):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    drawn = draw(plt, rows)
    with atomic_write(path) as part:
        drawn.savefig(part, dpi=100)
    plt.close(drawn)


def dots(plt, rows):
    """A panel a number, a dot a row, with its interval."""
    keys = [key for key in rows[0] if not all(isinstance(row[key], str) for row in rows)]
    labels = [" ".join(value for value in row.values() if isinstance(value, str) and value) for row in rows]
    columns = min(4, len(keys))
    drawn, axes = plt.subplots(-(-len(keys) // columns), columns, squeeze=False, layout="constrained", sharey=True,
                               figsize=(2 + 2.4 * columns, -(-len(keys) // columns) * (.8 + .22 * len(rows))))
    for axis in axes.flat[len(keys):]:
        axis.axis("off")
    for axis, key in zip(axes.flat, keys):
        values = [row[key] if isinstance(row[key], tuple) else (np.nan if isinstance(row[key], str) else row[key], 0) for row in rows]
        axis.errorbar([value for value, _ in values], range(len(rows)), xerr=[reach for _, reach in values], fmt="o", color="#4c72b0", elinewidth=1)
        axis.grid(axis="y", linewidth=.3)
        axis.set(yticks=range(len(rows)), yticklabels=labels, title=key)
        axis.title.set_size("medium")
        axis.tick_params(labelsize="small")
        axis.locator_params(axis="x", nbins=4)
    axes[0, 0].invert_yaxis()
    return drawn
