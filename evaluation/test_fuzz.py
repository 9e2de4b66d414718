"""test_fuzz.py - files as a stranger could send them. `-m fuzz` tries a thousand for every loader."""
import sys

import pytest

from engine.commands import UserError
from evaluation import fuzz


@pytest.fixture(scope="module", autouse=True)
def watched():
    sys.addaudithook(fuzz.note_opened)                        # for good: Python has no way to take it back


@pytest.mark.parametrize("name", fuzz.LOADERS)
def test_unchanged_files_are_read(name, tmp_path):
    make, load = fuzz.LOADERS[name]
    for file, content in make().items():
        (tmp_path / file).write_bytes(content)
    assert fuzz.outcome(load, tmp_path) == "read"


@pytest.mark.parametrize("name", fuzz.LOADERS)
def test_changed_files_are_read_or_refused(name):
    assert fuzz.fuzz(name, 5)[0].keys() == {"read", "refused"}


@pytest.mark.fuzz
@pytest.mark.parametrize("name", fuzz.LOADERS)
def test_a_thousand_changed_files_are_read_or_refused(name):
    assert fuzz.fuzz(name, 1000, seed=1)[0].keys() == {"read", "refused"}


def refuse(folder):
    raise UserError("no\nnever")


@pytest.mark.parametrize("load, found", [
    (lambda folder: open("/etc/passwd").close(), "it opened /etc/passwd"), (lambda folder: {}["a"], "KeyError: 'a'"),
    (lambda folder: open(folder / "../secret.txt"), "it opened"), (refuse, "more than one line")])
def test_faults_are_found(load, found, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "files").mkdir()
    assert fuzz.outcome(load, tmp_path / "files").startswith(found)
