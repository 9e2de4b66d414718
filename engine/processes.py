"""processes.py - one training run in many processes, on one machine or on several.

    torchrun --nproc_per_node=8 train.py --rep sdf --size large
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_endpoint=HOST:29500 train.py ...      # on each of four machines

A step's batch consists of micro-batches, each with its own randomness. Of w processes, process r takes the
micro-batches r, r + w, ...; DistributedDataParallel averages the gradients (engine/loop.py). So a stopped run resumes
with more processes or with one, and learns the same up to rounding. Only the first process prints and writes.

    python -m pytest -q engine -k processes         # its tests
"""
import functools
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.commands import UserError


def start():
    """Joins the process group, if torchrun started this process."""
    if "RANK" not in os.environ:
        return
    # gloo for CPU tensors: no GPU synchronisation; the first process may prepare data for hours
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=12))
    if rank():
        sys.stdout = open(os.devnull, "w")


def end():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device(device):
    """The GPU of this process, unless the user named one."""
    if world() > 1 and torch.cuda.is_available() and device in (None, "cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


@contextmanager
def partners():
    """In its body, processes wait for each other; if another one has ended, that is an error in one line."""
    try:
        yield
    except RuntimeError as error:
        if world() == 1:
            raise
        raise UserError(f"process {rank()} of {world()} waits for one that has ended, see above; the same command "
                        f"resumes from the last save ({str(error).splitlines()[0]})") from None


def mean(x):
    """The mean of a tensor over all processes."""
    if world() > 1:
        with partners():
            dist.all_reduce(x)
    return x / world()


def any_process(condition):
    """Is `condition` true in any process?"""
    return mean(torch.tensor([float(bool(condition))])).item() > 0


@contextmanager
def first_process_ahead():
    """The first process runs the body before the others: they find its files, and it alone reports errors."""
    if rank():
        try:
            any_process(False)
        except UserError:
            raise SystemExit(2) from None
    yield
    if not rank():
        any_process(False)


def first_process_only(write):
    """A function that only the first process runs; the others wait until it has."""
    @functools.wraps(write)
    def run(*args, **settings):
        if not rank():
            write(*args, **settings)
        any_process(False)
    return run
