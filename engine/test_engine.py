"""test_engine.py - the tests of the training loop and many processes.

    python -m pytest -q engine
"""
import contextlib
import csv
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from torch import nn

import data
import judge
import tokenizer
from conftest import CHAIN, HERE, assert_one_line, once, run, same_files, stop_in_step, train_small
from engine import files, loop, networks, optimizers, processes, state
from engine import run as run_folder
from engine.commands import UserError
from engine.networks import Block
from engine.stage import Stage
from representations.mesh import MeshHead

# ---------------------------------------------------------------------------- commands

@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_is_one_word(stop, capsys, request):
    before, handler = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))        # pytest in the background ignores Ctrl-C
    assert run(lambda: signal.raise_signal(stop)) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(signal.SIGTERM) == handler


# ---------------------------------------------------------------------------- the loop and its state

def test_shares_of_loss_add_up_to_one():
    """Shapes with losses of 0, 1 and 3: the second has a quarter of all."""
    class Three:
        losses, device = [0., 1., 3.], "cpu"
        __len__ = lambda self: 3

    train = Three()
    alone = SimpleNamespace(train=train, device=torch.device("cpu"), autocast=contextlib.nullcontext)
    model = nn.Identity()
    model.loss = lambda loss: (loss, {})
    shares = tokenizer.shares_of_loss(alone, model, lambda split, rows: [torch.tensor(split.losses[rows[0]])])
    assert shares.tolist() == [0, .25, .75]


def test_a_module_may_learn_faster():
    """RATE multiplies the learning rate of a module's parameters, in both optimizers, and of no others."""
    plain, quick = Block(64, 2), MeshHead(2, 4, 64, 2)
    groups = [group for opt in optimizers.optimizers(nn.ModuleList([plain, quick]), 1e-3) for group in opt.param_groups]
    rates = {p: group["rate"] for group in groups for p in group["params"]}
    assert MeshHead.RATE != 1
    assert rates == {p: 1 for p in plain.parameters()} | {p: MeshHead.RATE for p in quick.parameters()}


def log_rows(path):
    """The rows of a log, without the columns that depend on the time."""
    rows = csv.DictReader(path.open())
    return [{key: value for key, value in row.items() if key not in ("seconds", "waited")} for row in rows]


def test_resumed_training_is_uninterrupted_training(tmp_path, monkeypatch):
    """Every stage, killed once (SIGTERM) between two log lines and started again = never killed: losses and weights."""
    whole, cut, flags = tmp_path / "whole", tmp_path / "cut", ("--steps", 6, "--batch", 4)
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "CHECK", 4)
    assert train_small(monkeypatch, whole, 4, *flags) == 0
    monkeypatch.setattr(loop, "learning_rate", stop_in_step(2, lambda: signal.raise_signal(signal.SIGTERM)))
    for stage in CHAIN:
        assert train_small(monkeypatch, cut, 4, *flags, "--stage", stage) == 130
        assert (cut / f"{stage}.state.safetensors").is_file()
        assert signal.getsignal(signal.SIGTERM) == handler
        assert train_small(monkeypatch, cut, 4, *flags, "--stage", stage) == 0
    assert len(list(cut.glob("*.safetensors"))) == 6
    assert same_files(whole, cut, "*.safetensors")
    for stage in CHAIN:
        rows = log_rows(whole / f"{stage}.csv")
        assert [row["step"] for row in rows] == ["4", "6"]
        assert log_rows(cut / f"{stage}.csv") == rows


def test_a_set_that_does_not_fit_on_the_gpu_is_streamed(tmp_path, monkeypatch):
    """Worker processes draw it; a run in two parts = a run in one."""
    monkeypatch.setattr(data, "fits", lambda *_: False)
    flags = "--steps", 4, "--batch", 4, "--stage", "encoders", "--seed", 2 ** 60 + 1
    assert train_small(monkeypatch, tmp_path / "whole", 4, *flags) == 0
    monkeypatch.setattr(loop, "learning_rate", stop_in_step(1, lambda: signal.raise_signal(signal.SIGTERM)))
    assert [train_small(monkeypatch, tmp_path / "cut", 4, *flags) for _ in range(2)] == [130, 0]
    assert same_files(tmp_path / "whole", tmp_path / "cut", "*.safetensors")


@pytest.mark.parametrize("flag, value",
                         [("--steps", 8), ("--seed", 1), ("--batch", 2), ("--lr", 1e-4), ("--micro-batches", 2)])
def test_a_stopped_stage_refuses_other_flags(tmp_path, monkeypatch, capsys, flag, value):
    flags = {"--steps": 6, "--batch": 4, "--seed": 0, "--lr": .001, "--micro-batches": 1, "--stage": "encoders"}
    train_once = lambda flags: train_small(monkeypatch, tmp_path, 4, *(word for pair in flags.items() for word in pair))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", stop_in_step(2, lambda: signal.raise_signal(signal.SIGTERM)))
        assert train_once(flags) == 130
    capsys.readouterr()
    assert train_once(flags | {flag: value}) == 2
    assert f"was begun with {flag} {flags[flag]}, not with {flag} {value}" in capsys.readouterr().err


def test_seconds_of_a_stopped_stage_are_counted(tmp_path):
    """Also those since the last row of the log."""
    assert 50 <= state.Log(tmp_path / "a.csv", 3, {"seconds": torch.tensor(50.)}, "cpu").seconds() < 60


class Line(nn.Linear):
    def loss(self, x):
        return ((self(x) - x) ** 2).mean()


def toy_run(folder, steps, monkeypatch):
    monkeypatch.setattr(loop, "CHECK", 4)
    return SimpleNamespace(folder=folder, stages={"line": Stage("line", None, steps, 4, .1)}, seed=0, test=None,
                           device=torch.device("cpu"), recompute=False, autocast=contextlib.nullcontext,
                           micro_batches=1, share=1., compile=False, finetune=False, flags=lambda stage: {},
                           plot=lambda: None, train=SimpleNamespace(streamed=False))


def train_line(folder, bad, monkeypatch, steps=12):
    """Trains y = W x for `steps` steps; the data of the steps `bad` are not numbers. -> the moving average."""
    step = iter(range(steps))

    def draw_batch(split):
        return torch.randn(()).expand(4, 64) * (float("nan") if split and next(step) in bad else 1)

    run = toy_run(folder, steps, monkeypatch)
    torch.manual_seed(0)
    training = loop.Loop(run, "line", Line(64, 64), draw_batch)
    for net, x in training:
        training.step(net(x))
    return training.average


def test_steps_whose_gradients_are_not_finite_are_skipped(tmp_path, monkeypatch):
    model = train_line(tmp_path, {2, 5, 6}, monkeypatch)
    rows = log_rows(tmp_path / "line.csv")
    assert [row["skipped"] for row in rows] == ["1", "2", "0"]
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert all(p.isfinite().all() for p in model.parameters())


def test_training_goes_on_where_compiling_fails(tmp_path, monkeypatch, capsys):
    """One line says so; the weights are those of a run without it. Here the second step fails."""
    def failing(net):
        calls = iter(range(9))

        def compiled(*batch):
            if next(calls):
                raise RuntimeError("no compiler was found\nin a long message")
            return net(*batch)
        return compiled

    flags = "--stage", "encoders", "--steps", 4, "--batch", 4
    assert train_small(monkeypatch, tmp_path / "eager", 4, *flags) == 0
    begin = run_folder.Run.__init__

    def begin_compiled(self, *args):
        begin(self, *args)
        self.compile = True
    monkeypatch.setattr(run_folder.Run, "__init__", begin_compiled)
    monkeypatch.setattr(loop, "compiled", failing)
    assert train_small(monkeypatch, tmp_path / "failed", 4, *flags) == 0
    assert same_files(tmp_path / "eager", tmp_path / "failed", "*.safetensors")
    assert capsys.readouterr().out.count("fails here (no compiler was found); training goes on without it") == 1


def test_a_stop_while_metrics_are_measured_loses_no_training(tmp_path, monkeypatch):
    """They come before saving; the same command then measures them again, and trains no step."""
    flags, steps = ("--stage", "encoders", "--steps", 3, "--batch", 2), []
    retrieval, update = judge.caption_retrieval, loop.update
    monkeypatch.setattr(loop, "update", lambda *args: (steps.append(1), update(*args))[1])
    monkeypatch.setattr(judge, "caption_retrieval", lambda *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)             # pytest in the background ignores it
    assert train_small(monkeypatch, tmp_path, 2, *flags) == 130
    signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(judge, "caption_retrieval", retrieval)
    assert train_small(monkeypatch, tmp_path, 2, *flags) == 0
    assert len(steps) == 3 and files.trained_stages(tmp_path) == ["encoders"]


def test_the_first_picture_of_a_run_has_no_curves_beside_it(tmp_path):
    judge.save_picture(tmp_path / "backbone-000500.png", np.zeros((8, 8, 3), np.uint8))
    assert "backbone" in (tmp_path / "index.html").read_text()


def test_micro_batches_add_up(tmp_path, monkeypatch):
    """The gradient of a step is the mean over its micro-batches."""
    batches, gradients = [torch.randn(4, 64) for _ in range(4)], []
    for own in ([torch.cat(batches)], batches):
        run, batches = toy_run(tmp_path / f"{len(own)}", 1, monkeypatch), iter([*own, own[0]])
        run.micro_batches, run.share = len(own), 1 / len(own)
        torch.manual_seed(0)
        training = loop.Loop(run, "line", Line(64, 64), lambda split: next(batches))
        monkeypatch.setattr(loop, "update", lambda model, opts: (gradients.append(model.weight.grad.clone()),
                                                                 torch.tensor(True))[1])
        for net, x in training:
            training.step(net(x))
    assert torch.allclose(*gradients, atol=1e-7)


def test_the_learning_rate_warms_up_holds_and_falls():
    rates = [optimizers.learning_rate(step, 1000, 2.) for step in range(1000)]
    assert rates[0] == .02 and rates[99] == rates[499] == 2 and rates[750] == 1 and 0 < rates[999] < .01
    assert sorted(rates[:100]) == rates[:100] and sorted(rates[500:], reverse=True) == rates[500:]


def test_saved_weights_are_the_moving_average(tmp_path, monkeypatch):
    averages, finish = [], run_folder.Run.finish
    monkeypatch.setattr(run_folder.Run, "finish", lambda self, loop, *args, **entries: (
        averages.append((loop.average.state_dict(), loop.model.state_dict())), finish(self, loop, *args, **entries)))
    assert train_small(monkeypatch, tmp_path, 2, "--stage", "encoders", "--steps", 8, "--batch", 2, "--lr", .01) == 0
    saved, (average, last) = files.read_weights(tmp_path / "encoders.safetensors"), averages[0]
    assert all(torch.equal(saved[key], average[key].half()) for key in saved)
    assert any(not torch.equal(saved[key], last[key].half()) for key in saved)


def test_norms_biases_and_embeddings_do_not_decay():
    model = nn.ModuleDict({"block": networks.Block(64, 4), "small": nn.Linear(3, 5), "word": nn.Embedding(9, 64)})
    groups = [group for opt in optimizers.optimizers(model, 1e-3) for group in opt.param_groups]
    decayed = {p for group in groups for p in group["params"] if group.get("weight_decay", group.get("decay"))}
    assert decayed == {p for name, p in model.named_parameters() if name.endswith("weight") and "norm" not in name
                       and "word" not in name}


def test_an_error_is_one_line_whatever_it_quotes():
    assert str(UserError("no stage 'a\nb'")) == "no stage 'a b'"


def test_many_skipped_steps_in_a_row_are_an_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="gradients of 11 steps in a row are not finite; give an --lr below 0.1"):
        train_line(tmp_path, set(range(1, 12)), monkeypatch)


def test_two_commands_do_not_train_in_one_folder(tmp_path):
    """The lock names the process that holds it; that of a process that was killed is taken over."""
    hold = (f"import time; from engine.run import locked\n"
            f"with locked('{tmp_path}'): print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", hold], cwd=HERE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {other.pid} trains in .* already"), run_folder.locked(tmp_path):
        pass
    other.kill()
    other.wait()
    with run_folder.locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_lock_leaves_nothing_behind(tmp_path):
    with run_folder.locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def test_stages_that_do_not_fit_are_not_copied(overfitted, tmp_path, monkeypatch, capsys):
    """With other encoders, --from copies what does not stand on them."""
    files.save_weights(tmp_path / "encoders.safetensors", {"x": torch.zeros(1)})
    files.write_config(tmp_path, "encoders", **files.read_config(overfitted)["encoders"])
    assert train_small(monkeypatch, tmp_path, 2, "--from", overfitted, "--stage", "encoders") == 0
    left_out = {"vision", "backbone", "reconstruct"}
    assert set(files.trained_stages(tmp_path)) == set(files.trained_stages(overfitted)) - left_out
    assert f"vision is not copied from {overfitted}: it was trained on other weights of enc" in capsys.readouterr().out


def test_stages_that_learnt_from_other_data_are_not_copied(overfitted, tmp_path, monkeypatch, capsys):
    trimesh.creation.box((1, 1, 1)).export(tmp_path / "box.obj")
    assert train_small(monkeypatch, tmp_path / "run", 2, "--from", overfitted, "--data", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, f"with no --data, not with --data {tmp_path.name}")
    assert not files.trained_stages(tmp_path / "run")


def test_a_batch_has_to_divide_into_micro_batches(overfitted, tmp_path, monkeypatch, capsys):
    flags = "--from", overfitted, "--stage", "backbone", "--steps", 8, "--batch", 4, "--micro-batches", 3
    assert train_small(monkeypatch, tmp_path, 2, *flags) == 2
    complaint = "a batch of 4 (backbone) cannot be cut into 3 micro-batches; train it alone: --stage backbone --batch 6"
    assert_one_line(capsys.readouterr().err, complaint)


# ---------------------------------------------------------------------------- processes

ENDS = {  # what happens to process 1 in the sixth step -> exit statuses of both processes; the step that was saved last
    "terminated": (["130", "130"], 6), "died": (["2", ""], 3)}
BACKBONE = "--stage", "backbone", "--steps", 8, "--batch", 4


def one_of_two(rank, ports, folder, source):
    """A process that torchrun would start, once for each end. Process 1 is terminated, or it dies."""
    torch.set_num_threads(1)
    for end, port in zip(ENDS, ports):
        os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", MASTER_ADDR="localhost",
                          MASTER_PORT=f"{port}")
        stop = {("terminated", 1): lambda: signal.raise_signal(signal.SIGTERM), ("died", 1): lambda: os._exit(9)}
        flags = ["--from", source, *BACKBONE]
        with pytest.MonkeyPatch.context() as patch, (folder / f"{end}-{rank}.txt").open("w") as errors:
            patch.setattr(loop, "SAVE", 3)
            patch.setattr(loop, "learning_rate", stop_in_step(5, stop.get((end, rank), lambda: None)))
            patch.setattr(sys, "stderr", errors)
            status = train_small(patch, folder / end, 2, *flags)
        (folder / f"{end}-{rank}.status").write_text(f"{status}")
        processes.end()


def run_in_two_processes(folder, source):
    """Fills the folder with the runs of ENDS, each ended and then finished in one process, and `one`, a run in one."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in ENDS]
        for free in sockets:
            free.bind(("localhost", 0))
        ports = [free.getsockname()[1] for free in sockets]
    spawn = multiprocessing.get_context("spawn")
    both = [spawn.Process(target=one_of_two, args=(rank, ports, folder, source)) for rank in range(2)]
    for process in both:
        process.start()
    with pytest.MonkeyPatch.context() as patch:
        flags = *BACKBONE, "--micro-batches", 2
        assert train_small(patch, folder / "one", 2, "--from", source, *flags) == 0
        for process in both:
            process.join(300)
            process.kill()                                    # a process that hangs has written no status
        for end in ENDS:
            state = folder / end / "backbone.state.safetensors"
            if state.is_file():
                (folder / f"{end}.step").write_text(f"{int(files.read_weights(state)['step'])}")
            assert train_small(patch, folder / end, 2, *flags) == 0


@pytest.fixture(scope="session")
def two_processes(overfitted, tmp_path_factory):
    return once(tmp_path_factory, "processes", lambda folder: run_in_two_processes(folder, overfitted))


@pytest.mark.parametrize("end", ENDS)
def test_processes_end_together(two_processes, end):
    """If one process is terminated, both stop and save; if one dies, the other stops with an error."""
    paths = [two_processes / f"{end}-{rank}.status" for rank in range(2)]
    statuses, step = ENDS[end]
    assert [path.read_text() if path.is_file() else "" for path in paths] == statuses
    assert int((two_processes / f"{end}.step").read_text()) == step


def test_a_dead_process_is_one_line(two_processes):
    err = (two_processes / "died-0.txt").read_text().replace("\r", "\n")
    assert_one_line(err.splitlines()[-1], "waits for one that has ended")


def test_two_processes_learn_what_one_does(two_processes):
    """Two processes, then one for the rest = one process, up to rounding."""
    one, two = (files.read_weights(two_processes / name / "backbone.safetensors") for name in ("one", "died"))
    assert all(torch.allclose(one[key], two[key], rtol=.02, atol=2e-3) for key in one)
