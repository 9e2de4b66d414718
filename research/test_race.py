"""test_race.py - the tests of the race, with a recipe that copies the shipped weights."""
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import assert_one_line, run
from research import race

JUDGE = race.judge
RECIPE = """test ! -e "$OUT" && mkdir "$OUT" && cp checkpoints/tiny/* "$OUT"
echo "$SEED $DEVICE $(command -v python)" > "$OUT/said"
"""


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Of a race whose judge is quick."""
    monkeypatch.setattr(race, "judge", lambda *_: {"IoU": .96, "R-precision": .91, "right class": 1.})
    monkeypatch.setattr(race, "product_seconds", lambda device: .01)
    (tmp_path / "mine.sh").write_text(RECIPE)
    return "--recipe", tmp_path / "mine.sh", "--out", tmp_path / "runs"


def test_a_race_is_a_table_and_a_record_for_each_seed(flags, tmp_path):
    """A recipe has empty folders, its seed and device, and this Python. What is done is not run again: its seconds
    stay."""
    assert run(race.main, *flags, "--seeds", 3, 4) == 0
    records = [json.loads((tmp_path / "runs" / f"seed-{seed}" / "record.json").read_text()) for seed in (3, 4)]
    assert [record["reached"] for record in records] == [True, True] and records[0]["recipe"] == RECIPE
    said = (tmp_path / "runs" / "seed-4" / "run" / "said").read_text()
    assert said == f"4 cpu {Path(sys.executable).parent}/python\n"
    assert (tmp_path / "runs" / "race.md").read_text().count("\n") == 5         # a head, two seeds, their mean
    assert run(race.main, *flags, "--seeds", 3) == 0
    again = json.loads((tmp_path / "runs" / "seed-3" / "record.json").read_text())
    assert again["seconds"] == records[0]["seconds"] > 0


def test_a_stopped_recipe_resumes_and_its_seconds_add_up(flags, tmp_path):
    (tmp_path / "mine.sh").write_text('test -e "$OUT" || { mkdir "$OUT"; cp checkpoints/tiny/* "$OUT"; exit 3; }\n')
    assert run(race.main, *flags) == 2
    path = tmp_path / "runs" / "seed-0" / "run.json"
    before = json.loads(path.read_text())["seconds"]
    assert run(race.main, *flags) == 0
    assert json.loads(path.read_text())["seconds"] > before > 0


def test_the_judge_reads_the_tables_of_evaluate(tmp_path, monkeypatch):
    """Of the tokenizer the mean row, of samples the row of the checkpoint: the last ones."""
    tables = {"tokenizer": "tokenizer-sdf", "generate": "generate-sdf"}

    def evaluate(words, **_):
        (tmp_path / "judged").mkdir(exist_ok=True)
        text = "name,IoU,R-precision,right class\na,0,0,0\nb,.1,.2,.3\n"
        (tmp_path / "judged" / f"{tables[words[2]]}.csv").write_text(text)
        return subprocess.CompletedProcess(words, 0)
    monkeypatch.setattr(race.subprocess, "run", evaluate)
    assert JUDGE(tmp_path, tmp_path) == {"IoU": .1, "R-precision": .2, "right class": .3}


def test_a_recipe_that_fails_is_one_line(flags, tmp_path, capsys):
    (tmp_path / "mine.sh").write_text("exit 3\n")
    assert run(race.main, *flags) == 2
    assert_one_line(capsys.readouterr().err, "ended with status 3")


def test_another_recipe_needs_another_folder(flags, tmp_path, capsys):
    assert run(race.main, *flags) == 0
    (tmp_path / "mine.sh").write_text(RECIPE + "true\n")
    assert run(race.main, *flags) == 2
    assert_one_line(capsys.readouterr().err, "another recipe")


def test_a_folder_with_other_files_is_refused(flags, tmp_path, capsys):
    """What lies there could be weights, or a killed race's, whose seconds are unknown."""
    (tmp_path / "runs" / "seed-0" / "run").mkdir(parents=True)
    assert run(race.main, *flags) == 2
    assert_one_line(capsys.readouterr().err, "is not empty")


def test_the_goal_is_one_of_means(flags, tmp_path, monkeypatch):
    found = iter([.88, .94])
    monkeypatch.setattr(race, "judge", lambda *_: {"IoU": .96, "R-precision": next(found), "right class": 1.})
    assert run(race.main, *flags, "--seeds", 0, 1) == 0
    rows = [*csv.DictReader((tmp_path / "runs" / "race.csv").open())]
    assert [float(row["goal"]) for row in rows] == [0, 1, 1]


def test_a_goal_that_is_missed_is_said(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "judge", lambda *_: {"IoU": .94, "R-precision": .91, "right class": 1.})
    assert run(race.main, *flags) == 0
    assert not json.loads((tmp_path / "runs" / "seed-0" / "record.json").read_text())["reached"]
