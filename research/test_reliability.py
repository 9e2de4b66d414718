"""test_reliability.py - randomly changed files. `-m fuzz` tries a thousand files per loader."""
import math
import sys
import time

import pytest

from research import fuzz
from research.bench import memory

NAMES = list(fuzz.loaders())


@pytest.fixture(scope="module", autouse=True)
def watched():
    sys.addaudithook(fuzz.watch)                              # for good: Python has no way to take it back


def test_unchanged_files_are_read(tmp_path):
    for name, (files, load) in fuzz.loaders().items():
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        assert fuzz.attempt(load, folder) == "read", name


@pytest.mark.parametrize("name", NAMES)
def test_changed_files_are_read_or_refused(name):
    assert fuzz.fuzz(name, 5)[0].keys() <= {"read", "refused"}


@pytest.mark.fuzz
@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_changed_files_are_read_or_refused(name):
    assert fuzz.fuzz(name, 1000, seed=1)[0].keys() == {"read", "refused"}


@pytest.mark.parametrize("load, found", [
    (lambda folder: open("/etc/passwd").close(), "it reads"), (lambda folder: {}["a"], "KeyError: 'a'"),
    (lambda folder: (folder / "../secret.txt").read_text(), "it reads"),
    (lambda folder: (folder / "../new.txt").write_text("new"), "it writes"),
    (lambda folder: time.sleep(1.1), "1 s"),
    pytest.param(lambda folder: len(b"x" * 2 ** 28), "256 MB", marks=pytest.mark.skipif(
        math.isnan(memory()), reason="memory is read from /proc"))])
def test_faults_are_found(load, found, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "MEGABYTES", 100)
    monkeypatch.setattr(fuzz, "loaders", lambda: {"a": ({"a.txt": b"a"}, load)})
    assert any(found in result for result in fuzz.fuzz("a", 1)[0]), found
