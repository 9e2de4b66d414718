"""test_rooms.py - the limits of what a reader has to read, and the direction of imports.

    engine <- geometry <- prompts <- stage files <- {sample, train} <- relatives <- research
"""
import pytest

from research import closure

STAGE_FILES = ("data", "encoders", "tokenizer", "heads", "convolutions", "prefix", "backbone", "reconstruct", "judge")
ROOMS = {"engine": 0, "geometry": 1, "prompts": 2, **dict.fromkeys(STAGE_FILES, 3), "sample": 4, "train": 4,
         "relatives": 5, "research": 6, "evaluate": 7, "course": 8, "recipes": 8}
MOST = {"sample": (24, 3300), "train": (30, 4600)}            # files, lines


def wrong_imports():
    graph = {module: closure.imports(module) for module in closure.FILES}
    return [f"{a} imports {b}" for a, imported in graph.items() for b in imported
            if ROOMS[b.split(".")[0]] > ROOMS[a.split(".")[0]]]


def test_imports_go_one_way():
    assert {"engine.files", "prefix"} <= closure.imports("backbone")
    assert wrong_imports() == []


@pytest.mark.parametrize("module, text, imported", [
    ("engine.files", "import backbone", {"backbone"}),
    ("prefix", "class A:\n    from research import exam", {"research.exam"}),
    ("prefix", "def f():\n    import sample\n", set())])
def test_a_wrong_import_is_found(module, text, imported, tmp_path, monkeypatch):
    """Imports inside functions are lazy and do not count."""
    (tmp_path / "a.py").write_text(text)
    monkeypatch.setitem(closure.FILES, module, tmp_path / "a.py")
    closure.imports.cache_clear()
    assert closure.imports(module) == imported
    assert len(wrong_imports()) == len(imported)
    closure.imports.cache_clear()


@pytest.mark.parametrize("start", MOST)
def test_the_core_imports_only_the_core(start):
    files = closure.closure(start)
    lines = sum(len(closure.FILES[name].read_text().splitlines()) for name in files)
    assert len(files) <= MOST[start][0] and lines <= MOST[start][1], (len(files), lines)


def test_a_sample_has_few_modules_in_memory(tmp_path):
    """With those that are imported when they are needed."""
    found = closure.loaded("sample.py", "--text", "table", "--resolution", "64", "--out", str(tmp_path))
    lines = sum(closure.FILES[name].read_text().count("\n") for name in found)
    assert {"sample", "geometry.render"} <= {*found} and lines <= 3825, (found, lines)
