"""closure.py - the static import closure of a file: what its reader may have to read. Imports inside functions do not
count: they are lazy, for what a run may not use.

    python -m research.closure sample train
"""
import ast
import hashlib
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


if __name__ == "__main__":
    for start in [name for name in sys.argv[1:] or ["sample", "train"] if name in FILES]:
        lines = {name: FILES[name].read_text().count("\n") for name in closure(start)}
        print(*(f"{count:6} {name}" for name, count in lines.items()), sep="\n")
        print(f"{start}: {len(lines)} files, {sum(lines.values())} lines")
