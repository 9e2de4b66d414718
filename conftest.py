"""conftest.py - what the tests share: small models, trained once in a temporary folder, and prepared shapes."""
import fcntl
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import backbone
import data
import reconstruct
import tokenizer
import train
from engine import run as run_folder
from engine.commands import command
from evaluation import peers, progress
from geometry import solids, training_samples
from prompts import image_tower, text_tower

HERE = Path(__file__).parent
SHARED = "PYTEST_XDIST_WORKER" in os.environ                  # with others: one thread each
if SHARED:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
SMALL = {  # one size below tiny, for every stage
    text_tower: dict(dim=64, depth=1, heads=4), image_tower: dict(dim=64, depth=1, heads=4), tokenizer: dict(side=4, channels=8, dim=64, heads=4),
    backbone: dict(dim=64, encoder=1, decoder=2, heads=4, prefix=2, head_dim=64, head_depth=2),
    reconstruct: dict(dim=64, depth=1, heads=4),
}


def once(tmp_path_factory, name, make):
    """The folder that make(folder) fills: once, by whichever of the processes needs it first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if SHARED else base) / name
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.with_suffix(".done").exists():
            make(folder)
            folder.with_suffix(".done").touch()
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Two shapes of every class to train on, and two to test on."""
    sets = lambda folder: [data.prepare(split, 26, folder, kinds=training_samples.KINDS) for split in ("train", "test")]
    return sets(once(tmp_path_factory, "prepared", sets))


def run(main, *args):
    """What the command line would do with these arguments -> exit status. Any other exception is a failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *map(str, args)])
        try:
            command(main)
        except SystemExit as stop:
            return stop.code
    return 0


def train_small(patch, folder, count, *args, watched=False):
    """train.py at the size SMALL on `count` shapes, which are also those it is tested on -> exit status."""
    if not watched:                                             # what a run shows of itself costs more than a few steps
        black = np.zeros((160, 160, 3), np.uint8)
        for name, value in dict(head_metrics={}, class_accuracy=0., picture=black, reconstructions=black).items():
            patch.setattr(progress, name, lambda *_, value=value, **__: value)
        patch.setattr(run_folder, "plot_losses", lambda panels, out: None)
    for module, size in SMALL.items():
        patch.setitem(module.SIZES, "small", size)
    patch.setattr(train, "prepare", lambda split, _, *rest, **more: data.prepare("train", count, *rest, **more))
    patch.setattr(train, "CLASSES", ("table", "chair"))
    return run(train.main, "--size", "small", "--shapes", count, "--out", folder, "--cache", folder.parent / "cache", *args)


@pytest.fixture(scope="session")
def overfitted(tmp_path_factory):
    """A checkpoint that train.py made of just two shapes, a table and a chair, every stage in some seconds."""
    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            for stage, steps, batch, lr in (("encoders", 30, 2, 1e-3), ("tokenizer", 280, 2, 6e-3), ("vision", 30, 4, 1e-3),
                                            ("backbone", 180, 8, 4e-3), ("reconstruct", 60, 16, 4e-3)):
                assert train_small(patch, folder, 2, "--stage", stage, "--steps", steps, "--batch", batch, "--lr", lr, watched=True) == 0
    return once(tmp_path_factory, "overfitted", make)


@pytest.fixture(scope="session", autouse=True)
def early(request):
    """Of several workers one begins with what takes longest, so that no other has to wait for it."""
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw1" and any("overfitted" in test.fixturenames for test in request.session.items):
        request.getfixturevalue("overfitted")


@pytest.fixture(scope="session")
def four(overfitted, tmp_path_factory):
    """The same with heads for all representations, hardly trained."""
    def make(folder):
        shutil.copytree(overfitted, folder)
        with pytest.MonkeyPatch.context() as patch:
            assert train_small(patch, folder, 2, "--rep", "all", "--steps", 2, "--batch", 2) == 0
    return once(tmp_path_factory, "four", make)
CHAIN = ["encoders", "tokenizer", "vision", "backbone", "reconstruct"]     # the sdf head is trained with the tokenizer


def same_files(one, two, pattern="*"):
    """Both folders hold the same files, byte by byte, and at least one."""
    names = sorted(path.name for path in one.glob(pattern))
    assert names and names == sorted(path.name for path in two.glob(pattern))
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


class TrueHead:
    """Stands in for a trained head: answers with the exact field of a built-in shape."""

    def __init__(self, shape):
        self.shape = shape

    def read(self, tokens):
        return tokens

    def ask(self, memory, x):
        field, colour = self.shape.field(x[0].numpy())
        return torch.from_numpy(np.c_[field / solids.TRUNCATION, colour])[None].float().clamp(-1, 1)
WIDTHS = {"text": 32, "image": 16}


def prompted(b=3):
    """Condition tokens of both kinds, the text's of different lengths."""
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    return {"text": (torch.randn(b, 5, 32), mask[:b]), "image": (torch.randn(b, 4, 16), torch.ones(b, 4, dtype=torch.bool))}


def small_backbone(denoiser="flow", generator="masked"):
    """Random weights everywhere, also where training starts with zeros."""
    torch.manual_seed(0)
    model = peers.GENERATORS[generator](tokens=27, channels=8, widths=WIDTHS, **SMALL[backbone], denoiser=denoiser).eval()
    for p in model.net.parameters() if isinstance(model.net, nn.Module) else ():
        nn.init.normal_(p, std=.15)
    return model, prompted()


def assert_one_line(err, complaint):
    """One line of complaint; progress bars do not count."""
    lines = [line for line in re.split("[\r\n]", err) if line.strip() and not line.startswith("preparing")]
    assert len(lines) == 1 and complaint in lines[0], err
