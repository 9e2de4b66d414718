"""results.py - the output of evaluate.py: tables, and a cache of single results.

A table is a list of rows: dicts with the same keys, texts first. A number may be an Interval.
"""
import csv
import json
import zipfile
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.commands import UserError
from engine.files import atomic_write


class ResultCache:
    """A folder of results, dicts of arrays, each in a file of its own: a run that was stopped resumes. The folder's
    name ends with a digest of the settings, so that results of other settings are not mixed with these."""

    def __init__(self, folder, **settings):
        self.folder = Path(f"{folder}-{sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}")

    def __contains__(self, name):
        return (self.folder / f"{name}.npz").is_file()

    def write(self, name, result):
        with atomic_write(self.folder / f"{name}.npz") as part:
            np.savez(part, **result)

    def read(self, name):
        path = self.folder / f"{name}.npz"
        try:
            with np.load(path) as file:
                return dict(file)
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); delete it, and it is computed again") from None


def labels(folders):
    """{checkpoint folder: a short name}, no two alike: as many of the last parts of its path as that takes."""
    folders = list(dict.fromkeys(map(Path, folders)))
    k = next(k for k in count(1) if len({folder.parts[-k:] for folder in folders}) == len(folders))
    return {folder: "-".join(folder.parts[-k:]).replace("/", "") for folder in folders}


# ---------------------------------------------------------------------------- numbers

def mean(rows):
    """Dicts with the same keys -> one dict of their means, without texts and nan."""
    numbers = [key for key, value in rows[0].items() if not isinstance(value, str)]
    return {key: np.nanmean([row[key] for row in rows]) for key in numbers}


class Interval(NamedTuple):
    """A mean and half of its 95 % confidence interval."""
    mean: float
    half: float

    def __str__(self):
        return f"{self.mean:.3f} ± {self.half:.3f}"


def interval(values):
    """Of several values: their Interval, by Student's t; of one: that value."""
    from scipy.stats import t as student  # takes a second to import
    values = np.asarray(values, float)
    if len(values) == 1:
        return values[0]
    return Interval(values.mean(), student.ppf(.975, len(values) - 1) * values.std(ddof=1) / len(values) ** .5)


# ---------------------------------------------------------------------------- tables

def write_tables(out, name, tables, means=True):
    """{label: rows} -> a table for each label; of several labels also a table of their means, or else of all rows."""
    for label, rows in tables.items():
        write_table(out, name if len(tables) == 1 else f"{name}-{label}", rows, means)
    if len(tables) > 1:
        tables = {label: [mean(rows)] if means else rows for label, rows in tables.items()}
        write_table(out, name, [{"checkpoint": label} | row for label, rows in tables.items() for row in rows])


def write_table(out, name, rows, mean_row=False):
    """Print a table; write it as Markdown and as CSV."""
    keys = list(rows[0])
    if mean_row:
        rows = rows + [{key: "" for key in keys} | mean(rows) | {keys[0]: "mean"}]
    texts = sum(all(isinstance(row[key], str) for row in rows) for key in keys)
    lines = [keys, ["---"] * texts + ["--:"] * (len(keys) - texts)]
    lines += [[str(x) if isinstance(x, (str, Interval)) else f"{x:.3f}" for x in row.values()] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(table)
    with atomic_write(f"{out}/{name}.md") as part:
        part.write_text(table + "\n")
    with atomic_write(f"{out}/{name}.csv") as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    print(f"{out}/{name}.md", f"{out}/{name}.csv", sep="\n")
