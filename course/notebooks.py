"""notebooks.py - writes the notebooks of the course from its pages, unitN.md, and from the source.

    python course/notebooks.py                                # course/unitN.ipynb and unitN-solved.ipynb
    python course/notebooks.py --run course/unit3.ipynb       # runs its cells, without Jupyter

A page's Python blocks become cells, which show their picture. At "## Task", each hole of the unit becomes a cell, and
then come the tests. Each question gets a cell for its answer.
"""
import ast
import json
import re
import sys
import textwrap
from pathlib import Path

from cut import HERE, UNITS, Parser, UserError, all_holes, command

from geometry import surface  # cut.py has made it importable

IMPORT = "# Write each function in its cell; `fill` puts it into its file's module. Then run the tests.\n" \
         "from fill import fill, run_tests"
ANSWER = "*Your answer:*"
LESS = {"n=8": "n=2", "range(1500)": "range(20)", "range(100)": "range(2)", "range(8)": "range(1)",
        "spread(52)": "spread(2)", "(0, 1, 2, 7)": "(0, 7)", "=128": "=32", "=64": "=32",
        "{}, None)": "{}, None, resolution=32)", '"test", out': '"test", 13, out', '"test", 26': '"test", 13',
        '"train", 260': '"train", 13', "range(400)": "range(2)"}                                       # of --run


def hole_cell(path, name, node, solved):
    """A function of a module or of a class as a cell that replaces it there."""
    module = ".".join(path.relative_to(HERE).with_suffix("").parts)
    holder = name.rpartition(".")[0]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = textwrap.dedent("\n".join(path.read_text().splitlines()[first - 1:node.end_lineno])).splitlines()
    if not solved:
        body = node.body[1 if ast.get_docstring(node) else 0]
        lines = [*lines[:body.lineno - first], "    raise NotImplementedError        # write this"]
    place = f"@fill({module}.{holder})      # its other methods are in {path.relative_to(HERE)}" if holder \
        else f"@fill({module})"
    return "\n".join([f"import {module}", f"from {module} import *", "", place, *lines])


def cells_of(unit, solved):
    """[("markdown" or "code", text)]"""
    cells = []
    page, questions = (HERE / "course" / f"unit{unit}.md").read_text().split("## Questions\n")
    for part in re.split(r"(^```python\n.*?^```\n|^## Task\n.*?(?=^## ))", page, flags=re.M | re.S):
        if part.startswith("```python"):
            picture = f'Image.open("out/unit{unit}.png")             # a notebook shows the value of the last line'
            cells.append(("code", f"from PIL import Image\n{part[10:-5]}\n{picture}"))
        elif part.strip():
            cells.append(("markdown", part.strip()))
        if part.startswith("## Task"):
            holes = [(path, *hole) for path, found in all_holes(unit).items() for hole in found]
            holes.sort(key=lambda hole: part.index(f"`{hole[1]}`"))               # as the page names them
            cells += [("code", IMPORT), *(("code", hole_cell(*hole, solved)) for hole in holes)]
            cells.append(("code", f"run_tests({unit})"))
    cells.append(("markdown", "## Questions"))
    for question in re.findall(r"^\d\. .*?(?=^\d\. |\Z)", questions, flags=re.M | re.S):
        cells += [("markdown", question.strip()), ("markdown", ANSWER)]
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
    """Runs the cells of a notebook with smaller numbers and coarser grids. With holes, the experiment may fail. Solved,
    it has to call every hole."""
    surface.COARSE = 8
    names, called, solved = {}, set(), path.stem.endswith("-solved")

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename == path.name:
            called.add(frame.f_code.co_name)

    sys.setprofile(note)
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        for more, less in LESS.items():
            source = source.replace(more, less)
        if cell["cell_type"] == "code":
            print(f"--- {path.name}\n{source[:200]}")
            try:
                exec(compile(source, path.name, "exec"), names)
            except NotImplementedError:
                if solved:
                    raise
                print("not written yet")
        if source.startswith("run_tests("):
            called.clear()                                    # by the tests
    sys.setprofile(None)
    holes = {name.rpartition(".")[2] for found in all_holes(int(path.stem[4])).values() for name, _ in found}
    if solved and holes - called:
        raise UserError(f"the experiment of {path.name} does not call {', '.join(sorted(holes - called))}")


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
