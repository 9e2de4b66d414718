"""test_documented.py - every command in README, docs, course and model cards: its flags exist; with few steps, it runs.

    python -m pytest -q research/test_documented.py
    python -m pytest -q -m slow research/test_documented.py   # an hour or two of one core
"""
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import trimesh

from conftest import HERE, run
from engine.commands import Parser

SMALL = {  # flag: value, where it is given or has a default
    "steps": 2, "shapes": 8, "n": 2, "resolution": 32, "resolutions": 64, "seeds": 1, "train_shapes": 26, "batch": 4,
    "workers": 1, "unseen": 2, "rounds": 1, "registers": 2, "alphas": .1, "windows": .5, "device": "cpu",
    "parts": "peak", "refine": 2}
ELSEWHERE = "research.race", "notebooks"                      # test_race.py, course/test_course.py
NOUNS = "barrel boat bridge bush cactus candle chest cloud coin crate crown door fence flower gate hammer".split()


def documented_commands():
    """(file, words) of every command, tests aside."""
    paths = [HERE / "README.md", *(path for folder in ("docs", "course", "checkpoints/*")
                                   for path in sorted(HERE.glob(f"{folder}/*.md")))]
    for path in paths:
        text = path.read_text().replace("\\\n", " ")
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(r"`(python [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        for line in lines:
            line = re.sub(r"^torchrun --nproc_per_node=\d", "python", line.split("&& ")[-1]).replace("CLASS", "table")
            if re.match("python +(-m )?[a-z]", line) and "pytest" not in line and "..." not in line:
                line = line.replace("REP", "sdf").replace("PATH", "path/to/meshes")
                yield path.relative_to(HERE), shlex.split(line, comments=True)[1:]


COMMANDS = [*documented_commands()]
IDS = [f"{path}: {shlex.join(words)}" for path, words in COMMANDS]


class Parsed(Exception):
    pass


def flags_of(words, monkeypatch):
    """-> the module of a command, and its parsed flags. It is not run."""
    monkeypatch.syspath_prepend(HERE / "course")
    parse = Parser.parse_args

    def parse_only(*args):
        raise Parsed(parse(*args))
    monkeypatch.setattr(Parser, "parse_args", parse_only)
    start = 2 if words[0] == "-m" else 1
    module = words[1] if start == 2 else Path(words[0]).stem
    with pytest.raises(Parsed) as parsed:
        run(import_module(module).main, *words[start:])
    return module, vars(parsed.value.args[0])


@pytest.mark.parametrize("words", [words for _, words in COMMANDS], ids=IDS)
def test_a_command_has_the_flags_that_it_is_given(words, monkeypatch):
    flags_of(words, monkeypatch)


def test_commands_are_found():
    assert len(COMMANDS) > 80


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository, with the files that the documents speak of."""
    folder = tmp_path_factory.mktemp("copy") / "copy"
    ignored = shutil.ignore_patterns(".*", "checkpoints", "cache", "runs", "out", "mine*", "__pycache__")
    shutil.copytree(HERE, folder, ignore=ignored)
    (folder / "checkpoints").symlink_to(HERE / "checkpoints")
    for name in ("path/to/meshes", "path/to/assets"):
        (folder / name / "boxKit").mkdir(parents=True)
        for i, noun in enumerate(NOUNS):
            for letter in "AB":
                trimesh.creation.box((1, 1, 1 + i / 4)).export(folder / name / "boxKit" / f"{noun}_{letter}.glb")
    trimesh.creation.box((1, 1, 2)).export(folder / "chair.glb")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for _, words in COMMANDS], ids=IDS)
def test_a_command_runs(words, copy, monkeypatch):
    """In the order of the documents: some need what others wrote."""
    module, flags = flags_of(words, monkeypatch)
    if module in ELSEWHERE:
        pytest.skip("another test runs it")
    short = {flag: value for flag, value in SMALL.items() if flags.get(flag)}
    if module == "train":
        short |= {"steps": 2, "batch": 4} | ({} if flags["data"] else {"shapes": 26})
        short |= {"size": "tiny"} if flags["size"] in ("small", "large") else {}
    more = [str(word) for flag, value in short.items() for word in (f"--{flag.replace('_', '-')}", value)]
    if module == "data" and not flags["data"]:
        more += ["--shapes", "26"]
    done = subprocess.run([sys.executable, *words, *more], cwd=copy, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    after_two_steps = any(word.startswith("runs/") for word in words) and "empty" in done.stderr
    no_network = flags.get("text_encoder") and "cannot be loaded" in done.stderr
    assert done.returncode == 0 or after_two_steps or no_network, done.stderr[-2000:]
