"""test_course.py - every unit fails when it is cut, and passes when it is restored; the notebooks run.

    python -m pytest -q -n 2 course
"""
import subprocess
import sys

import cut
import fill
import notebooks
import pytest

import backbone
from engine import networks

FAILED = 1


def command(folder, *words):
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository that is cut for unit 3."""
    folder = tmp_path_factory.mktemp("course") / "clone"
    assert command(folder.parent, str(cut.HERE / "course" / "cut.py"), "3", "--out", "clone").returncode == 0
    (folder / "old").mkdir()
    return folder


@pytest.mark.parametrize("unit", cut.UNITS)
def test_a_unit_fails_when_cut_and_is_restored(unit, tmp_path):
    """Cut, every test fails with a hint. Restored, the copy is as the original, whose tests pass."""
    mine, script = tmp_path / "mine", str(cut.HERE / "course" / "cut.py")
    assert command(tmp_path, script, str(unit), "--out", "mine").returncode == 0
    found = command(mine, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", f"course/test_unit{unit}.py")
    assert found.returncode == FAILED and "passed" not in found.stdout, found.stdout[-2000:]
    assert found.stdout.count("\nhint: ") == found.stdout.count("\n____") > 2      # a line of ____ is a test's title
    assert command(tmp_path, script, str(unit), "--out", "mine", "--restore").returncode == 0
    copies = [*mine.glob("*.py"), *mine.glob("[a-z]*/*.py")]
    assert copies and all(path.read_bytes() == (cut.HERE / path.relative_to(mine)).read_bytes() for path in copies)


@pytest.mark.parametrize("path", [path for unit in cut.UNITS for path in notebooks.paths_of(unit).values()],
                         ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    """With holes it shows hints, solved it shows none, and its experiment calls every hole."""
    done = command(cut.HERE, "course/notebooks.py", "--run", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    solved = path.stem.endswith("-solved")
    assert ("hint: " in done.stdout) != solved


def test_notebooks_are_those_of_pages_and_source():
    for unit in cut.UNITS:
        for solved, path in notebooks.paths_of(unit).items():
            assert path.read_text() == notebooks.notebook(notebooks.cells_of(unit, solved)), \
                f"{path.name} is old; `python course/notebooks.py` writes it"


@pytest.mark.parametrize("unit", cut.UNITS)
def test_a_notebook_begins_with_its_subject_and_ends_with_answers(unit):
    """What Jupyter needs comes with the first hole, and every question has a cell for its answer."""
    kinds, texts = zip(*notebooks.cells_of(unit, solved=False))
    task = next(i for i, text in enumerate(texts) if text.startswith("## Task"))
    assert {*kinds[:task + 1]} == {"markdown"}
    assert texts[task + 1] == notebooks.IMPORT
    questions = texts[texts.index("## Questions") + 1:]
    page = (cut.HERE / "course" / f"unit{unit}.md").read_text()
    assert [text[:2] for text in questions[::2]] == [f"{i + 1}." for i in range(len(questions) // 2)]
    assert {*questions[1::2]} == {notebooks.ANSWER} and " ".join(questions[-2].split()) in " ".join(page.split())


def test_an_experiment_that_misses_a_hole_is_reported(tmp_path):
    """Here it is one that does nothing."""
    cells = [cell for cell in notebooks.cells_of(2, solved=True) if "savefig" not in cell[1]]
    path = tmp_path / "unit2-solved.ipynb"
    path.write_text(notebooks.notebook(cells))
    done = command(cut.HERE, "course/notebooks.py", "--run", str(path))
    assert done.returncode == 2 and "does not call flow_pair, loss, sample" in done.stderr


def test_a_copy_of_a_copy_is_cut(clone):
    """With --out below the repository, as on the page, and beside an older copy."""
    for unit in (1, 5):
        assert command(clone, "course/cut.py", str(unit), "--out", f"mine{unit}").returncode == 0
        for path in cut.all_holes(unit):
            text = (clone / f"mine{unit}" / path.relative_to(cut.HERE)).read_text()
            assert f"raise NotImplementedError(\"unit {unit}: " in text
    assert not [*clone.rglob("*-solved.ipynb")]


@pytest.mark.parametrize("words, complaint", [
    (("--out", "docs"), "is copied"), (("--out", "docs/mine"), "is copied"), (("--out", "old"), "give another --out"),
    (("--out", "old", "--restore"), "no copy in old"), (("--out", ".", "--restore"), "the folder of this cut.py")])
def test_a_wrong_folder_is_refused(words, complaint, clone):
    """A folder that is there is never overwritten, and no copy lands in a folder that is copied."""
    done = command(clone, "course/cut.py", "1", *words)
    assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr


def test_a_cell_replaces_a_function_wherever_it_was_imported():
    old = backbone.flow_pair

    def flow_pair(x, t):
        pass
    fill.fill(networks)(flow_pair)
    try:
        assert networks.flow_pair is backbone.flow_pair is flow_pair
    finally:
        fill.fill(networks)(old)
    assert networks.flow_pair is backbone.flow_pair is old
