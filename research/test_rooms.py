"""test_rooms.py - the direction of imports, those inside functions too.

    engine <- geometry <- prompts <- stage files <- {sample, train} <- relatives <- research <- evaluate
"""
import ast
from graphlib import TopologicalSorter

import pytest

from conftest import HERE

STAGE_FILES = ("data", "encoders", "representations", "first_design", "tokenizer", "heads", "prefix", "backbone",
               "reconstruct", "judge")
ROOMS = {"engine": 0, "geometry": 1, "prompts": 2, **dict.fromkeys(STAGE_FILES, 3), "sample": 4, "train": 4,
         "relatives": 5, "research": 6, "evaluate": 7, "course": 8, "recipes": 8}
FILES = {".".join(path.relative_to(HERE).with_suffix("").parts): path       # {module: its file}, without tests
         for pattern in ("*.py", "*/*.py") for path in HERE.glob(pattern)
         if not path.name.startswith(("test_", "conftest"))}


def imports(path):
    """The modules of the repository that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & FILES.keys()


def wrong_imports(files):
    room = lambda module: ROOMS[module.split(".")[0]]
    return [f"{a} imports {b}" for a, path in files.items() for b in imports(path) if room(b) > room(a)]


def test_imports_go_one_way():
    assert {"engine.files", "prefix"} <= imports(FILES["backbone"])
    assert wrong_imports(FILES) == []


def test_no_file_imports_itself_through_others():
    TopologicalSorter({module: imports(path) for module, path in FILES.items()}).prepare()


@pytest.mark.parametrize("module, text, imported", [
    ("engine.files", "import backbone", {"backbone"}),
    ("prefix", "class A:\n    from research import exam", {"research.exam"}),
    ("prefix", "def f():\n    import sample\n", {"sample"})])
def test_a_wrong_import_is_found(module, text, imported, tmp_path):
    (tmp_path / "a.py").write_text(text)
    assert imports(tmp_path / "a.py") == imported
    assert len(wrong_imports({module: tmp_path / "a.py"})) == 1
