"""notebooks.py - writes the notebooks of the course from its pages, unitN.md, and from the source.

    python course/notebooks.py                                # course/unitN.ipynb and unitN-solved.ipynb
    python course/notebooks.py --run course/unit3.ipynb       # runs its cells, without Jupyter

A page's Python blocks become cells. At "## Task", each hole of the unit becomes a cell, and then a test of all.
"""
import ast
import json
import re
import textwrap
from pathlib import Path

from cut import HERE, UNITS, Parser, all_holes, command

from geometry import surface  # cut.py has made it importable

SETUP = """import os, sys
if not os.path.isfile("backbone.py"):              # Jupyter starts in the notebook's folder
    os.chdir("..")
sys.path[:0] = [os.getcwd()]
import pytest

def put(module, new):                              # replaces a function, also where it was imported by name
    old = getattr(module, new.__name__)
    for other in list(sys.modules.values()):
        if getattr(other, "__dict__", {}).get(new.__name__) is old:
            setattr(other, new.__name__, new)"""
CHECK = 'pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", "course/test_unit{unit}.py"]);'
LESS = {"n=8": "n=2", "range(1500)": "range(20)", "range(100)": "range(2)", "range(8)": "range(1)",
        "spread(52)": "spread(2)", "(0, 1, 2, 7)": "(0, 7)", "=128": "=32", "=64": "=32",
        "{}, None)": "{}, None, resolution=32)", '"test", out': '"test", 13, out'}                     # of --run


def hole_cell(path, name, node, unit, solved):
    """A function of a module as a cell that replaces it there."""
    module = ".".join(path.relative_to(HERE).with_suffix("").parts)
    lines = textwrap.dedent("\n".join(path.read_text().splitlines()[
        min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1:node.end_lineno])).splitlines()
    if not solved:
        first = node.body[1 if ast.get_docstring(node) else 0]
        lines = [*lines[:first.lineno - node.end_lineno - 1], "    raise NotImplementedError        # write this"]
    holder = name.rpartition(".")[0]
    note = [f"# a method of {module}.{holder}: its other methods are in {path.relative_to(HERE)}"] if holder else []
    put = f"{module}.{name} = {node.name}" if holder else f"put({module}, {name})"
    return "\n".join([f"import {module}", f"from {module} import *", "", *note, *lines, "", put])


def cells_of(unit, solved):
    """[("markdown" or "code", text)]"""
    cells = [("code", SETUP)]
    page = (HERE / "course" / f"unit{unit}.md").read_text()
    for part in re.split(r"(^```python\n.*?^```\n|^## Task\n.*?(?=^## ))", page, flags=re.M | re.S):
        if part.startswith("```python"):
            cells.append(("code", part[10:-5]))
        elif part.strip():
            cells.append(("markdown", part.strip()))
        if part.startswith("## Task"):
            cells += [("code", hole_cell(path, name, node, unit, solved))
                      for path, found in all_holes(unit).items() for name, node in found]
            cells.append(("code", CHECK.format(unit=unit)))
    return cells


def notebook(cells):
    written = []
    for i, (kind, text) in enumerate(cells):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": text.splitlines(keepends=True)}
        written.append(cell | ({"outputs": [], "execution_count": None} if kind == "code" else {}))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return json.dumps({"cells": written, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def paths_of(unit):
    """{solved: file}"""
    return {solved: HERE / "course" / f"unit{unit}{'-solved' * solved}.ipynb" for solved in (False, True)}


def run(path):
    """Runs the cells of a notebook with smaller numbers and coarser grids. With holes, the experiment may fail."""
    surface.COARSE = 8
    names = {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        for more, less in LESS.items():
            source = source.replace(more, less)
        if cell["cell_type"] == "code":
            print(f"--- {path.name}\n{source[:200]}")
            try:
                exec(compile(source, path.name, "exec"), names)
            except NotImplementedError:
                if path.stem.endswith("-solved"):
                    raise
                print("not written yet")


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="run this notebook")
    args = parser.parse_args()
    if args.run:
        return run(args.run)
    for unit in UNITS:
        for solved, path in paths_of(unit).items():
            path.write_text(notebook(cells_of(unit, solved)))
            print(path.relative_to(HERE))


if __name__ == "__main__":
    command(main)
