"""fill.py - what the notebooks of the course import: `fill` and `run_tests`. The working folder becomes the repository.

    @fill(backbone.Flow)      # the function below replaces the one of this name, in a module or in a class
    run_tests(2)              # runs the tests of unit 2
"""
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
os.chdir(HERE)                                                # Jupyter starts in the notebook's folder
sys.path.insert(0, str(HERE))


def fill(place):
    """A decorator: puts a function into a module or a class, and into all modules that imported it by name."""
    def put(new):
        name = new.__name__
        old = getattr(place, name)
        setattr(place, name, new)
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is old:
                setattr(module, name, new)
        return new
    return put


def run_tests(unit):
    """Runs the tests of a unit. A test that fails prints a hint."""
    pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", f"course/test_unit{unit}.py"])
