"""closure.py - the static import closure of a file: what its reader may have to read. Imports inside functions do not
count: they are lazy, for what a run may not use.

    python -m research.closure sample train
    python -m research.closure loaded sample.py --text table        # what a run has in memory
"""
import ast
import hashlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path       # {module: its file}, without tests
         for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern)
         if not path.name.startswith(("test_", "conftest"))}


def static(node):
    """All nodes below a node, but those inside functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.Lambda)):
            yield child
            yield from static(child)


@cache
def imports(module):
    """The modules of the project that a module imports."""
    names = set()
    for node in static(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & FILES.keys()


def closure(*names):
    """Modules -> these and all that they import, sorted."""
    found = {*names}.union(*map(imports, names))
    return sorted(found) if found == {*names} else closure(*found)


@cache
def code_digest(*names):
    """A digest of the syntax trees of modules: comments and docstrings do not change it."""
    trees = []
    for name in sorted({*names}):
        trees.append(ast.parse(FILES[name].read_text()))
        for node in ast.walk(trees[-1]):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                del node.body[0]
    return hashlib.sha256("\n".join(map(ast.dump, trees)).encode()).hexdigest()[:16]


def loaded(*argv):
    """The modules of ours that a command has in memory when it ends."""
    end = "; import sys, json; print(json.dumps([getattr(m, '__file__', None) for m in sys.modules.values()]))"
    code = f"import sys, runpy; sys.argv = {[*argv]}; runpy.run_path({argv[0]!r}, run_name='__main__')" + end
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    files = {Path(file).resolve() for file in json.loads(out.splitlines()[-1]) if file} | {Path(argv[0]).resolve()}
    return sorted(name for name, path in FILES.items() if path.resolve() in files)


def report(title, names):
    lines = {name: FILES[name].read_text().count("\n") for name in names}
    print(*(f"{count:6} {name}" for name, count in lines.items()), sep="\n")
    print(f"{title}: {len(lines)} files, {sum(lines.values())} lines")


if __name__ == "__main__":
    if sys.argv[1:2] == ["loaded"]:
        report("in memory", loaded(*sys.argv[2:]))
    else:
        for start in [name for name in sys.argv[1:] or ["sample", "train"] if name in FILES]:
            report(start, closure(start))
