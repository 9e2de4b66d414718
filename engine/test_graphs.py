"""test_graphs.py - the tests of what only a GPU does: CUDA graphs in sampling, chosen kernels, a full memory.

Without a GPU, a graph is a second run on what it captured.

    python -m pytest -q engine/test_graphs.py
"""
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import sample
from conftest import assert_one_line, run
from engine import commands, graphs

CAPTURED = "operation not permitted when stream is capturing"


def sampled(condition, keys, scale):
    """Stands for Sampler.shape_tokens."""
    tokens, mask = condition["text"]
    return (tokens * mask[..., None]).sum((1, 2)) * scale + keys


@pytest.fixture
def replayed(monkeypatch):
    """A ReplayedSampling of `sampled`, with stand-ins for torch.cuda; its `failing` are the captures that fail."""
    calls, failing = [], []

    class Graph:
        def replay(self):
            condition, keys, scale, output = self.captured
            output.copy_(sampled(condition, keys, scale))

    @contextmanager
    def capture(graph, **_):
        yield
        if failing:
            raise torch.AcceleratorError(f"CUDA error: {CAPTURED}\nSearch for ... in the documentation")
        graph.captured = calls[-1]

    @contextmanager
    def stream(_):
        yield

    def function(condition, keys, scale):
        calls.append((condition, keys, scale, sampled(condition, keys, scale)))
        return calls[-1][-1]

    for name, fake in {"CUDAGraph": Graph, "graph": capture, "graph_pool_handle": lambda: None, "stream": stream,
                       "current_stream": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    replayed = graphs.ReplayedSampling(function)
    replayed.failing, replayed.calls = failing, calls
    return replayed


def same_as_eager(replayed, scale=2, length=5):
    condition, keys = {"text": (torch.randn(3, length, 4), torch.rand(3, length) < .5)}, torch.randn(3)
    return torch.allclose(replayed(condition, keys, scale=scale), sampled(condition, keys, scale), atol=1e-5)


def captured(replayed):
    return [key for key, graph in replayed.graphs.items() if graph]


def test_sampling_is_replayed_on_new_inputs(replayed):
    """Padded prompts of one length share a graph."""
    assert all(same_as_eager(replayed, *pair) for pair in [(2, 5), (2, 5), (2, 7), (2, 9), (3, 6), (2, 8)])
    assert len(replayed.graphs) == 3 and len(captured(replayed)) == 1
    assert len(replayed.calls) == 4                           # two of (2, 8): the eager one and the captured one


def test_the_graphs_used_last_are_kept(replayed):
    """Beyond KEPT combinations, the one that was used longest ago is dropped, and captured again when it returns."""
    for scale in range(graphs.KEPT):
        assert all(same_as_eager(replayed, scale) for _ in range(2))
    assert same_as_eager(replayed, 0) and len(captured(replayed)) == graphs.KEPT
    assert same_as_eager(replayed, graphs.KEPT) and len(replayed.graphs) == graphs.KEPT
    before = len(replayed.calls)
    assert same_as_eager(replayed, 0) and len(replayed.calls) == before           # a replay
    assert same_as_eager(replayed, 1) and len(replayed.calls) == before + 1       # dropped: eager again


def test_a_capture_that_fails_is_one_line(replayed, capsys):
    """Sampling goes on eagerly, and tries no other capture."""
    replayed.failing.append(True)
    assert all(same_as_eager(replayed, scale) for scale in (2, 2, 2, 3, 3, 3))
    assert_one_line(capsys.readouterr().err, f"CUDA graphs cannot be used here (CUDA error: {CAPTURED})")
    assert not replayed.graphs and len(replayed.calls) == 7   # six, and the one that failed


@pytest.mark.parametrize("compile", [True, False])
def test_sampling_without_graphs(compile, monkeypatch):
    """--no-compile, and load(compile=False)."""
    device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(sample, "pick_device", lambda *_: (device, None, "a GPU"))
    monkeypatch.setattr(sample.encoders, "load", lambda *_: None)
    monkeypatch.setattr(sample.LTM3D, "open", lambda self: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model = sample.load(compile=compile)
    assert isinstance(model.shape_tokens, graphs.ReplayedSampling) == compile


def test_no_compile_is_a_flag_of_the_command(monkeypatch):
    found = []
    monkeypatch.setattr(sample, "load", lambda *args: found.append(args) or exit(0))
    for flags in ([], ["--no-compile"]):
        assert run(sample.main, "--text", "table", *flags) == 0
    assert [args[-1] for args in found] == [True, False]


def test_kernels_are_chosen_with_the_device(monkeypatch):
    """On a GPU: no cuDNN attention, no TF32."""
    monkeypatch.setattr(commands.torch, "device", lambda name: SimpleNamespace(type="cuda", index=None))
    monkeypatch.setattr(commands.torch, "zeros", lambda *_, **__: None)
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.allow_tf32
    try:
        commands.pick_device("cuda", "bf16")
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_a_full_memory_is_one_line(capsys):
    """It names the flags of the command that need less."""
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    for settings, flags in (({}, "--n or --resolution"), ({"less_memory": "--recompute"}, "--recompute")):
        with pytest.raises(SystemExit) as stop:
            commands.command(main, **settings)
        assert stop.value.code == 2
        assert_one_line(capsys.readouterr().err, flags)
