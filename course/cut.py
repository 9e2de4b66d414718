"""cut.py - a copy of the repository in which the functions of one unit raise; their docstrings say what to write.

    python course/cut.py 3 --out mine             # then, in mine: python -m pytest -q course/test_unit3.py
    python course/cut.py 3 --out mine --restore   # puts the real functions back

The comment "unit 3" beside a `def` marks a hole of unit 3: there is no second copy of any solution.
"""
import ast
import os
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from engine.commands import Parser, UserError, command  # noqa: E402 - this file is a folder below

UNITS = range(1, 8)
FOLDERS = ("engine", "geometry", "prompts", "relatives", "representations", "research", "recipes", "assets", "course",
           "docs")


def holes(path, unit):
    """The functions of a file that a unit cuts: (qualified name, node) each."""
    text = path.read_text()
    marked, found = {i for i, line in enumerate(text.splitlines(), 1) if re.search(rf"#.*\bunit {unit}$", line)}, []
    for parent in ast.walk(ast.parse(text)) if marked else ():
        for node in getattr(parent, "body", []) if isinstance(parent, (ast.Module, ast.ClassDef)) else []:
            if isinstance(node, ast.FunctionDef) and node.lineno in marked:
                found.append((f"{parent.name}.{node.name}" if isinstance(parent, ast.ClassDef) else node.name, node))
    return found


def all_holes(unit):
    """{file: its holes} of a unit."""
    paths = [*HERE.glob("*.py"), *(path for folder in FOLDERS for path in HERE.glob(f"{folder}/*.py"))]
    return {path: found for path in sorted(paths) if (found := holes(path, unit))}


def cut(path, found, unit):
    """Replaces the bodies of functions, but their docstrings, by an error."""
    lines = path.read_text().splitlines()
    for name, node in sorted(found, key=lambda hole: -hole[1].lineno):            # from below: line numbers hold
        first = node.body[1 if ast.get_docstring(node) else 0]
        hole = " " * (node.col_offset + 4) + f'raise NotImplementedError("unit {unit}: {name}")'
        lines[first.lineno - 1:node.end_lineno] = [hole]
    path.write_text("\n".join(lines) + "\n")


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("unit", type=int, choices=UNITS, help="which unit of the course")
    parser.add_argument("--out", required=True, help="the folder of the copy")
    parser.add_argument("--restore", action="store_true", help="put the real functions back into that copy")
    args = parser.parse_args()
    out = Path(args.out)
    if out.resolve() == HERE:
        raise UserError(f"{out} is the folder of this cut.py; run the one of the repository")
    if any((HERE / folder) in [out.resolve(), *out.resolve().parents] for folder in FOLDERS):
        raise UserError(f"{out} is in a folder that is copied; give another --out")
    if args.restore and not (out / "course").is_dir():
        raise UserError(f"there is no copy in {out} to restore; run this where it was cut, with the same --out")
    if not args.restore and out.exists():
        raise UserError(f"{out} exists; give another --out")
    if not args.restore:
        out.mkdir(parents=True)
        for path in HERE.iterdir():
            if path.is_file():
                shutil.copy(path, out)
        for folder in FOLDERS:
            shutil.copytree(HERE / folder, out / folder, ignore=shutil.ignore_patterns("__pycache__", "*-solved.ipynb"))
        (out / "checkpoints").symlink_to(HERE / "checkpoints")
    for path, found in all_holes(args.unit).items():
        copy = out / path.relative_to(HERE)
        shutil.copy(path, copy)
        if not args.restore:
            cut(copy, found, args.unit)
        print(f"{copy}: {', '.join(name for name, _ in found)}")
    print(f"next: cd {os.path.relpath(out)} && python -m pytest -q course/test_unit{args.unit}.py")


if __name__ == "__main__":
    command(main)
