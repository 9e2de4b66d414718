"""test_reliability.py - files as a stranger could send them; memory. `-m fuzz` tries a thousand files per loader."""
import math
import sys
import time

import pytest

from evaluation import fuzz, growth
from evaluation.timing import memory

needs_proc = pytest.mark.skipif(math.isnan(memory()), reason="memory is read from /proc")


@pytest.fixture(scope="module", autouse=True)
def hooked():
    sys.addaudithook(fuzz.note_opened)                        # for good: Python has no way to take it back


@pytest.mark.parametrize("name", fuzz.LOADERS)
def test_unchanged_files_are_read(name, tmp_path):
    make, load = fuzz.LOADERS[name]
    for file, content in make().items():
        (tmp_path / file).write_bytes(content)
    assert fuzz.outcome(load, tmp_path)[0] == "read"


@pytest.mark.parametrize("name", fuzz.LOADERS)
def test_changed_files_are_read_or_refused(name):
    assert fuzz.fuzz(name, 5)[0].keys() == {"read", "refused"}


@pytest.mark.fuzz
@pytest.mark.parametrize("name", fuzz.LOADERS)
def test_a_thousand_changed_files_are_read_or_refused(name):
    assert fuzz.fuzz(name, 1000, seed=1)[0].keys() == {"read", "refused"}


@pytest.mark.parametrize("load, found", [
    (lambda folder: open("/etc/passwd").close(), "it reads"), (lambda folder: {}["a"], "KeyError: 'a'"),
    (lambda folder: (folder / "../secret.txt").read_text(), "it reads"), (lambda folder: time.sleep(1), "1 seconds"),
    (lambda folder: (folder / "../new.txt").write_text("new"), "it writes")])
def test_faults_are_found(load, found, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", .9)
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "files").mkdir()
    assert fuzz.outcome(load, tmp_path / "files")[0].startswith(found)


@needs_proc
def test_a_file_that_takes_much_memory_is_a_fault(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "MEGABYTES", 100)
    assert fuzz.outcome(lambda folder: len(b"x" * 2 ** 28), tmp_path)[0].endswith("MB")


@needs_proc
def test_memory_that_grows_is_seen():
    kept = []
    with growth.watched() as readings:
        for i in range(40):
            kept.append(bytes([i]) * 2 ** 21)
            time.sleep(.05)
    early, late = growth.growth(readings)
    assert late - early > growth.ALLOWED
