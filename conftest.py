"""conftest.py - what the tests share: small models, trained once in a temporary folder, and prepared shapes."""
import csv
import fcntl
import os
import re
import shutil
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import backbone
import data
import judge
import reconstruct
import tokenizer
import train
from engine import loop
from engine import run as run_folder
from engine.commands import command
from geometry import surface
from geometry.training_samples import PICTURES, SURFACE
from prompts import image_tower, text_tower
from relatives.prior import SIDES
from representations import REPRESENTATIONS
from representations.sdf import grid_iou
from research.crisp import TrueHead  # noqa: F401 - for the tests

HERE = Path(__file__).parent
PREPARE = data.prepare
PARALLEL = "PYTEST_XDIST_WORKER" in os.environ                # several processes run tests: each gets one thread
if PARALLEL:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

SMALL = {  # one size below tiny, for every stage; convolutions, which learn the two shapes in a third of the steps
    text_tower: dict(dim=64, depth=1, heads=4),
    image_tower: dict(dim=64, depth=1, heads=4),
    tokenizer: dict(side=4, channels=8, dim=64, heads=4, conv=4),
    backbone: dict(dim=64, encoder=1, decoder=2, heads=4, queries=2, head_dim=64, head_depth=2),
    reconstruct: dict(dim=64, depth=1, heads=4),
}
CHAIN = ["encoders", "tokenizer", "vision", "backbone", "reconstruct"]     # the sdf head is trained with the tokenizer
WIDTHS = {"text": 32, "image": 16}                            # of condition tokens


# ---------------------------------------------------------------------------- commands and their errors

def run(main, *args):
    """Runs a command with these arguments -> its exit status. Any exception but SystemExit is a failure of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *map(str, args)])
        try:
            command(main)
        except SystemExit as stop:
            return stop.code
    return 0


def assert_one_line(err, complaint):
    """Standard error is one line with this complaint; progress bars do not count."""
    lines = [line for line in re.split("[\r\n]", err) if line.strip() and not line.startswith("preparing")]
    assert len(lines) == 1, err
    assert complaint in lines[0]


def same_files(one, two, pattern="*"):
    """Both folders hold the same files, byte by byte, and at least one."""
    names = sorted(path.name for path in one.glob(pattern))
    assert names
    assert names == sorted(path.name for path in two.glob(pattern))
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


# ---------------------------------------------------------------------------- small models and their inputs

def prompted(b=3):
    """Condition tokens of both kinds for b <= 3 samples; the texts have different lengths."""
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    return {"text": (torch.randn(b, 5, 32), mask[:b]), "image": (torch.randn(b, 4, 16), torch.ones(b, 4).bool())}


def small_backbone(denoiser="flow", kind=backbone.Backbone):
    """-> a generator with random weights everywhere, also where training starts with zeros, and a condition."""
    torch.manual_seed(0)
    model = kind(tokens=27, channels=8, widths=WIDTHS, denoiser=denoiser, **SMALL[backbone]).eval()
    for p in (model.net if isinstance(model.net, nn.Module) else model.time).parameters():
        nn.init.normal_(p, std=.15)
    return model, prompted()


# ---------------------------------------------------------------------------- what makes Python wait for a GPU

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
           "bincount", "repeat_interleave", "_linalg_check_errors", "lift_fresh"}          # operators of aten


@contextmanager
def as_on_a_gpu():
    """In its body the CPU plays a GPU, and the meta device, which has no data, plays the host. There lies what code
    makes without naming a device, and the tensors among the globals of our modules. To copy them fails."""
    as_tensor = torch.as_tensor
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(torch, "as_tensor", lambda x, **to: x if torch.is_tensor(x) and not to else as_tensor(x, **to))
        patch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device.type == "cpu"))
        patch.setattr(torch, "from_numpy", lambda *_: pytest.fail("an array is copied to the GPU"))
        for module in [*sys.modules.values()]:
            path = Path(getattr(module, "__file__", None) or "/")
            if HERE not in path.parents or path.name.startswith(("test_", "conftest")):
                continue
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    patch.setattr(module, name, value.to("meta"))
        yield


class NoWait(TorchDispatchMode):
    """In its body, what makes Python wait for a GPU is an error: reading values, shapes that depend on values, and, in
    as_on_a_gpu, tensors of the host. Autograd takes other ways under such a mode: for losses, see no_waiting."""
    INDEXED = {getattr(torch.ops.aten, name) for name in ("index", "index_put", "index_put_", "_index_put_impl_")}

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in ("tolist", "numpy", "cpu"):
            self.patch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} waits"))
        self.patch.setattr(torch.cuda, "get_rng_state", lambda *_: pytest.fail("the state of random numbers is read"))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op, index = func.overloadpacket, args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
        mask = op in self.INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in index)
        if op.__name__ in WAITING or mask:
            pytest.fail(f"{func} waits for a GPU")
        places = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        to = (kwargs or {}).get("device")
        if len(places | ({to.type} if to and places else set())) > 1:
            pytest.fail(f"{func} gets tensors of the host and of the GPU")
        return func(*args, **kwargs or {})


def no_waiting(model, batch, loss_of):
    """A test of a loss, (model, batch) -> loss and logs: forward and backward pass never wait for a GPU. They run
    twice, as on a GPU: under NoWait, and under the profiler, with the real backward pass. -> the loss."""
    with as_on_a_gpu():
        with NoWait():
            loss_of(model, batch)[0].backward()
        model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            loss, logs = loss_of(model, batch)
            loss.backward()
    waited = {event.name.removeprefix("aten::") for event in profiled.events()} & WAITING
    assert not waited, f"{', '.join(sorted(waited))}: the loss waits for a GPU"
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and {x.device.type for x in (loss, *logs.values(), *gradients)} == {"cpu"}
    return loss.detach()


# ---------------------------------------------------------------------------- folders that are made once

def once(tmp_path_factory, name, fill):
    """The folder that fill(folder) has filled. The first process that needs it fills it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if PARALLEL else base) / name
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.with_suffix(".done").exists():
            fill(folder)
            folder.with_suffix(".done").touch()
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Where train_small prepares its shapes, also in other processes."""
    os.environ["CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    return os.environ["CACHE"]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A shape of every class to train on, and one to test on."""
    def prepare(folder):
        own = [kind for head in REPRESENTATIONS.values() for kind in head.kinds]
        kinds = dict.fromkeys([SURFACE, PICTURES, *own, SIDES])
        return [data.prepare(split, 13, folder, kinds=kinds) for split in ("train", "test")]
    return prepare(once(tmp_path_factory, "prepared", prepare))


def train_small(patch, folder, count, *args, watched=False, pictures=True):
    """train.py at the size SMALL, trained and tested on the same `count` shapes -> exit status. Only if `watched`, it
    draws samples and measures, which takes longer than a few steps."""
    if not watched:
        black = np.zeros((160, 160, 3), np.uint8)
        results = dict(head_metrics={}, class_accuracy={}, samples=black, reconstructions=black)
        for name, value in results.items():
            patch.setattr(judge, name, lambda *_, value=value, **__: value)
        patch.setattr(run_folder, "plot_losses", lambda panels, out: None)
        patch.setattr(judge.page, "write_run", lambda folder: None)
        patch.setattr(judge, "write_page", lambda folder: None)
    for module, size in SMALL.items():
        patch.setitem(module.SIZES, "small", size)
    patch.setattr(data, "prepare", lambda split, _, *rest, **more: PREPARE("train", count, *rest, **more))
    patch.setattr(judge, "CLASSES", ("table", "chair"))
    shapes = [] if "--data" in args else ["--shapes", count]
    towers = ["--image-encoder", "built-in"] if pictures and "--image-encoder" not in args else []
    flags = "--size", "small", *towers, *shapes, "--out", folder, "--cache", os.environ["CACHE"]
    return run(train.main, *flags, *args)


@pytest.fixture(scope="session")
def overfitted(tmp_path_factory):
    """A checkpoint of train.py for two shapes, a table and a chair; every stage takes some seconds."""
    def fill(folder):
        settings = {"encoders": (20, 2, 1e-3), "tokenizer": (110, 2, 6e-3), "vision": (12, 4, 1e-3),
                    "backbone": (120, 8, 6e-3), "reconstruct": (20, 8, 4e-3)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(surface, "COARSE", 8)
            patch.setattr(grid_iou, "__defaults__", (32,))
            patch.setattr(judge.class_accuracy, "__defaults__", (1, 256))
            for stage, (steps, batch, lr) in settings.items():
                flags = "--stage", stage, "--steps", steps, "--batch", batch, "--lr", lr
                assert train_small(patch, folder, 2, *flags, watched=True) == 0
    return once(tmp_path_factory, "overfitted", fill)


def pytest_collection_modifyitems(items):
    """Tests of the slowest fixture run last: by then it is made, and no process waits for it."""
    items.sort(key=lambda test: "overfitted" in test.fixturenames)


@pytest.fixture(scope="session", autouse=True)
def early(request):
    """One of several processes begins with the slowest fixture, so that the others need not wait for it."""
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw1":
        if any("overfitted" in test.fixturenames for test in request.session.items):
            request.getfixturevalue("overfitted")


@pytest.fixture(scope="session")
def four(overfitted, tmp_path_factory):
    """The same checkpoint with heads for all four representations; the new heads had two steps of training."""
    def fill(folder):
        shutil.copytree(overfitted, folder)
        with pytest.MonkeyPatch.context() as patch:
            assert train_small(patch, folder, 2, "--rep", "all", "--steps", 2, "--batch", 2) == 0
    return once(tmp_path_factory, "four", fill)


# ---------------------------------------------------------------------------- exams

@pytest.fixture
def examined(tmp_path_factory, monkeypatch):
    """The held-out shapes are four tables and four chairs, and so are the training shapes; few points of each, and
    surfaces begin with a coarser grid."""
    def prepare(split="test", count=None, *_, kinds=(SURFACE,), **flags):
        other, folder = "test" if split == "train" else "train", tmp_path_factory.getbasetemp() / "examined"
        return PREPARE(other, 8, folder, kinds=kinds, classes=["table", "chair"], workers=1)

    monkeypatch.setattr(surface, "COARSE", 8)
    names = [path.stem for path in (HERE / "research").glob("*.py") if not path.stem.startswith("test_")]
    for module in [import_module(f"research.{name}") for name in names]:
        for name, value in {"POINTS": 64, "prepare": prepare, "CLASSES": ("table", "chair")}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


def rows_of(path):
    """The rows of a table, which is there as Markdown and CSV; its numbers are finite."""
    assert path.with_suffix(".md").is_file()
    rows = list(csv.DictReader(path.with_suffix(".csv").open()))
    texts = {list(rows[0])[0], "checkpoint", "prompt", "rule", "kind"}
    numbers = [cell.split(" ± ")[0] for row in rows for key, cell in row.items() if cell and key not in texts]
    assert all(np.isfinite(float(number)) for number in numbers)
    return rows


def stop_in_step(number, stop):
    """A learning rate that calls stop() when training comes to this step."""
    learning_rate = loop.learning_rate

    def rate(current, steps, peak):
        if current == number:
            stop()
        return learning_rate(current, steps, peak)
    return rate


# ---------------------------------------------------------------------------- the course

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failing test of a unit is one line, and its docstring as a hint."""
    report = yield
    if report.failed and call.when == "call" and item.path.name.startswith("test_unit"):
        error = call.excinfo.exconly().splitlines()[0]
        report.longrepr = f"{item.name}: {error[:200]}\nhint: {' '.join(item.function.__doc__.split())}"
    return report
