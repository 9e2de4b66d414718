"""test_engine.py - the tests of engine/."""
import contextlib
import csv
import functools
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn

import heads
from conftest import CHAIN, assert_one_line, run, same_files, small_backbone, train_small
from engine import commands, files, loop, networks, processes
from engine.commands import UserError
from geometry import render

# ---------------------------------------------------------------------------- layers

@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-5), (True, .03)], ids=["fp32", "bf16"])
def test_distance_bias_is_a_mask(bf16, tolerance):
    """Bias folded into 13 more dimensions = softmax(q k / sqrt(e) - gamma_h |x - a|^2), with a padding mask too."""
    torch.manual_seed(0)
    layer = networks.Attention(64, 8)
    nn.init.normal_(layer.to_v.weight, std=.3)
    x, context, at = torch.randn(2, 50, 64), torch.randn(2, 27, 64), (torch.rand(2, 50, 3) * 2 - 1, networks.grid_points(3)[None].repeat(2, 1, 1))
    mask = torch.rand(2, 27) < .8
    q, k, v = (rearrange(f(y), "b k (h e) -> b h k e", h=8) for f, y in ((layer.to_q, x), (layer.to_k, context), (layer.to_v, context)))
    gamma = rearrange(torch.tensor(2 * networks.GAMMAS), "h -> 1 h 1 1")
    scores = q @ k.mT / 8 ** .5 - gamma * rearrange(torch.cdist(*at) ** 2, "b q k -> b 1 q k")
    true = scores.masked_fill(~rearrange(mask, "b k -> b 1 1 k"), -torch.inf).softmax(-1) @ v
    true = layer.to_out(rearrange(true, "b h k e -> b k (h e)"))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = layer(x, context, mask, at)
        assert (out - true).abs().mean() < tolerance * true.abs().mean()
        assert (layer(x, context, mask) - true).abs().mean() > .3 * true.abs().mean()         # the bias matters


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_casting_once_is_casting_always(bf16):
    """Weights cast beforehand give the very numbers that autocast gives; without autocast they stay as they are."""
    layer, x = networks.Block(64, 4), torch.randn(2, 50, 64)
    autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with torch.no_grad(), autocast():
        before, after = layer(x), commands.cast_once(layer, autocast)(x)
    assert torch.equal(before, after) and layer.feed[0].weight.dtype == (torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.parametrize("first, decay", [(10_000, .9), (0, .999)], ids=["constant", "warm-up"])
def test_ema_is_its_closed_form(first, decay):
    """After k updates: sum over the weights w_i seen of (1 - d_i) prod_{j > i} d_j w_i."""
    model = nn.Linear(3, 2)
    ema, seen = networks.EMA(model, decay), [model.weight.detach().clone()]
    for step in range(first, first + 6):
        nn.init.normal_(model.weight)
        ema.update(model, step)
        seen.append(model.weight.detach().clone())
    d = np.array([min(decay, (1 + step) / (10 + step)) for step in range(first, first + 6)])
    share = [np.prod(d)] + [(1 - d[i]) * np.prod(d[i + 1:]) for i in range(6)]
    assert abs(sum(share) - 1) < 1e-9
    assert torch.allclose(ema.model.weight, sum(float(s) * w for s, w in zip(share, seen)), atol=1e-6)


def test_checkpoint_round_trip(tmp_path):
    """Weights saved and loaded are the same bits; half precision is the same to 1e-3."""
    model, other = networks.Block(64, 4), networks.Block(64, 4)
    files.save_weights(tmp_path / "a.safetensors", model.state_dict())
    files.load_weights(other, tmp_path / "a.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    files.save_weights(tmp_path / "a.safetensors", model.state_dict(), half=True)
    files.load_weights(other, tmp_path / "a.safetensors")
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_wrong_weights_are_named(tmp_path):
    """Truncated, pickled, missing, renamed and mis-shaped weights: one line that says what differs."""
    path, model = tmp_path / "a.safetensors", nn.Sequential(nn.Linear(3, 2))
    files.save_weights(path, model.state_dict())
    whole = path.read_bytes()
    for bad in (whole[:-5], whole[:20], b"", pickle.dumps(model.state_dict())):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="truncated or no safetensors"):
            files.load_weights(model, path)
    with pytest.raises(UserError, match="no file"):
        files.load_weights(model, tmp_path / "b.safetensors")
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"0\.weight is \(2, 3\), not \(2, 4\)"):
        files.load_weights(nn.Sequential(nn.Linear(4, 2)), path)
    with pytest.raises(UserError, match=r"missing weight; unknown 0\.bias; unknown 0\.weight"):
        files.load_weights(nn.Linear(3, 2, bias=False), path)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_written_keeps_the_old_file(tmp_path, error):
    """Whatever stops a write half way, the old file stays as it was and nothing lies beside it."""
    path = tmp_path / "new" / "file.txt"
    with files.atomic_write(path) as part:
        part.write_text("old")
    with pytest.raises(error), files.atomic_write(path) as part:
        part.write_text("ne")
        raise error
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_full_disk_keeps_the_old_file(tmp_path):
    """Saving more than fits is one clear error, for weights and for pictures, and the old file stays."""
    paths = tmp_path / "a.safetensors", tmp_path / "a.png"
    for path in paths:
        path.write_bytes(b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))     # no file may grow longer than this
    try:
        with pytest.raises(UserError, match="cannot write .*a.safetensors"):
            files.save_weights(paths[0], {"x": torch.randn(10 ** 6)})
        with pytest.raises(UserError, match="cannot write .*a.png"):
            render.save_png(paths[1], np.random.default_rng(0).integers(0, 255, (800, 800, 3), dtype=np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert all(path.read_bytes() == b"old" for path in paths) and len(list(tmp_path.iterdir())) == 2


def test_stage_of_other_weights_is_refused(tmp_path):
    """A backbone trained on another tokenizer than the one beside it is an error that says so."""
    files.save_weights(tmp_path / "tokenizer.safetensors", {"x": torch.zeros(1)})
    files.write_config(tmp_path, "backbone", made_with={"tokenizer": files.digest(tmp_path / "tokenizer.safetensors")})
    files.read_stage(tmp_path, "backbone")
    files.save_weights(tmp_path / "tokenizer.safetensors", {"x": torch.ones(1)})
    with pytest.raises(UserError, match="trained with another tokenizer"):
        files.read_stage(tmp_path, "backbone")


# ---------------------------------------------------------------------------- backbone

@pytest.mark.parametrize("how", ["recompute", "compiled"])
def test_blocks_arranged_otherwise_learn_the_same(how, monkeypatch):
    """--recompute and --compile: the same loss and gradients, though other numbers of tokens are known; with the first, less is kept."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))     # needs no C++
    (plain, condition), (other, _) = small_backbone(), small_backbone()
    other.load_state_dict(plain.state_dict())
    loop.arrange(other, **{how: True})
    x = torch.randn(3, 27, 8)
    for seed in range(2):
        kept, losses = {plain: 0, other: 0}, {}
        for model in kept:
            def pack(x):
                kept[model] += x.numel()
                return x
            torch.manual_seed(seed)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                losses[model] = model.loss(x, condition)
            losses[model].backward()
        assert torch.allclose(*losses.values(), atol=1e-6) and (how != "recompute" or kept[other] < .7 * kept[plain])
    assert all(torch.allclose(p.grad, q.grad, atol=1e-5) for p, q in zip(plain.parameters(), other.parameters()) if p.grad is not None)


def test_batches_are_drawn_ahead_for_a_gpu():
    """By threads, some parts ahead of what is asked for, and yet the same, in order."""
    seen = []

    def draw(split, rng):
        time.sleep(rng.uniform(0, .02))                                # not all threads are equally fast
        value = rng.integers(10 ** 6)
        seen.append(value)                                             # in whatever order
        return value

    def of(device):
        run = SimpleNamespace(device=torch.device(device), seed=0, settings={"encoders": 0}, parts=2, train=None)
        return loop.batches(run, "encoders", draw, 3, 23)

    plain = list(of("cpu"))
    seen.clear()
    ahead = of("cuda")
    first = next(ahead)
    time.sleep(.2)
    assert len(seen) == 2 * loop.THREADS and [first, *ahead] == plain and len(plain) == 40 == len({seed for seed, _ in plain})


# ---------------------------------------------------------------------------- train

def test_resumed_training_is_uninterrupted_training(tmp_path, monkeypatch):
    """Every stage killed once (SIGTERM) between two log lines and started again = never killed: losses and weights."""
    monkeypatch.setattr(loop, "CHECK", 4)
    whole, cut, flags = tmp_path / "whole", tmp_path / "cut", ("--steps", 6, "--batch", 4)
    assert train_small(monkeypatch, whole, 26, *flags) == 0
    rate, handler = loop.learning_rate, signal.getsignal(signal.SIGTERM)

    def kill_in_third_step(step, steps, peak):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return rate(step, steps, peak)

    monkeypatch.setattr(loop, "learning_rate", kill_in_third_step)
    for stage in CHAIN:                                         # and each stage in a process of its own
        assert train_small(monkeypatch, cut, 26, *flags, "--stage", stage) == 130
        assert (cut / f"{stage}.state.safetensors").is_file() and signal.getsignal(signal.SIGTERM) == handler
        assert train_small(monkeypatch, cut, 26, *flags, "--stage", stage) == 0
    assert same_files(whole, cut, "*.safetensors") and len(list(cut.glob("*.safetensors"))) == 6
    for stage in CHAIN:
        one, two = ([{k: v for k, v in row.items() if k not in ("seconds", "waited")} for row in csv.DictReader((folder / f"{stage}.csv").open())]
                    for folder in (whole, cut))
        assert one == two and [row["step"] for row in one] == ["4", "6"]
ENDS = {"is told to stop": (["130", "130"], 6), "dies": (["2", ""], 3)}           # exit statuses; the step saved last
BACKBONE = "--stage", "backbone", "--steps", 8, "--batch", 4


def one_of_two(rank, ports, folder, source):
    """What torchrun would start, once for each end: process 1 is told to stop in the sixth step, holding shares, or dies."""
    torch.set_num_threads(1)
    rate = loop.learning_rate
    for end, port in zip(ENDS, ports):
        os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=f"{port}")

        def end_in_sixth_step(step, *rest):
            if step == 5 and rank == 1:
                os._exit(9) if end == "dies" else signal.raise_signal(signal.SIGTERM)
            return rate(step, *rest)

        with pytest.MonkeyPatch.context() as patch, (folder / f"{end}-{rank}.txt").open("w") as said:
            for name, value in (("SAVE", 3), ("learning_rate", end_in_sixth_step)):
                patch.setattr(loop, name, value)
            patch.setattr(sys, "stderr", said)
            status = train_small(patch, folder / end, 2, "--from", source, *BACKBONE, *["--shard"] * (end != "dies"))
        (folder / f"{end}-{rank}.status").write_text(f"{status}")
        processes.end()


def test_two_processes_learn_what_one_does(overfitted, tmp_path, monkeypatch):
    """The same batch in two processes, one of which ends, then in a single one = all of it in a single one, byte by byte, or nearly, if
    they hold shares. If one is told to stop, all stop and save; if one dies, the other says so, and what was saved last is there."""
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in ENDS]
        for each in free:
            each.bind(("localhost", 0))
        ports = [each.getsockname()[1] for each in free]
    two = [multiprocessing.get_context("spawn").Process(target=one_of_two, args=(rank, ports, tmp_path, overfitted)) for rank in range(2)]
    for each in two:
        each.start()
    assert train_small(monkeypatch, tmp_path / "one", 2, "--from", overfitted, *BACKBONE, "--parts", 2) == 0
    for each in two:
        each.join(100)
        each.kill()                                              # should it hang: the statuses below then tell
    for end, (statuses, step) in ENDS.items():
        found = [path.read_text() if path.is_file() else "" for path in (tmp_path / f"{end}-{rank}.status" for rank in range(2))]
        assert found == statuses, [(tmp_path / f"{end}-{rank}.txt").read_text() for rank in range(2)]
        assert int(files.read_weights(tmp_path / end / "backbone.state.safetensors")["step"]) == step
        assert train_small(monkeypatch, tmp_path / end, 2, *BACKBONE, "--parts", 2) == 0
        if end == "is told to stop":                             # in shares
            one, shared = (files.read_weights(tmp_path / name / "backbone.safetensors") for name in ("one", end))
            far = sum((one[key] - shared[key]).double().square().sum() for key in one) ** .5
            assert one.keys() == shared.keys() and far < .2      # Muon rounds to bf16 on the way (.07); of other data they are .56 apart
        else:
            assert same_files(tmp_path / "one", tmp_path / end, "*.safetensors")
    assert_one_line((tmp_path / "dies-0.txt").read_text().replace("\r", "\n").splitlines()[-1] + "\n", "waits for one that has ended")


def test_parts_of_a_batch_have_to_be_alike(overfitted, tmp_path, monkeypatch, capsys):
    flags = "--from", overfitted, "--stage", "backbone", "--steps", 8
    assert train_small(monkeypatch, tmp_path, 2, *flags, "--batch", 4, "--parts", 3) == 2
    assert_one_line(capsys.readouterr().err, "a batch of 4 (backbone) cannot be shared by 3 parts; give --batch 6")


def test_a_module_may_learn_faster():
    """RATE multiplies the learning rate of a module's parameters, in both optimizers, and of no others; none is left out."""
    plain, quick = heads.QueryDecoder(2, 4, 64, 2, outputs=4), heads.MeshHead(2, 4, 64, 2)
    model = torch.nn.ModuleList([plain, quick])
    rates = {p: group["rate"] for opt in loop.optimizers(model, 1e-3) for group in opt.param_groups for p in group["params"]}
    assert rates == {p: 1 for p in plain.parameters()} | {p: heads.MeshHead.RATE for p in quick.parameters()}
    assert heads.MeshHead.RATE != 1


# ---------------------------------------------------------------------------- sample

def test_control_c_is_one_word(capsys):
    """Ctrl-C ends a script with status 130 and no traceback."""
    def interrupted():
        raise KeyboardInterrupt
    assert run(interrupted) == 130 and capsys.readouterr().err == "stopped\n"
