"""processes.py - one training run in many processes, on one machine or on several.

    torchrun --nproc_per_node=8 train.py --rep sdf --size large
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_endpoint=HOST:29500 train.py ...      # on each of four machines

A step's batch consists of micro-batches, each with its own randomness. Of w processes, process r takes the
micro-batches r, r + w, ..., and all gradients are added up. So the weights depend on the number of micro-batches,
not of processes: a stopped run resumes with more processes or with one. Only the first process prints and writes.

    python -m pytest -q engine -k processes         # its tests
"""
import functools
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain

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


@torch.no_grad()
def sum_over_processes(*lists):
    """Replaces each tensor by its sum over all processes, in one message. All tensors lie on one device."""
    if world() == 1:
        return
    tensors = [*chain(*lists)]
    flat = torch.cat([x.flatten() for x in tensors])
    try:
        dist.all_reduce(flat)
    except RuntimeError as error:
        raise UserError(f"process {rank()} of {world()} waits for one that has ended, see above; the same command "
                        f"resumes from the last save ({str(error).splitlines()[0]})") from None
    for x, summed in zip(tensors, flat.split([x.numel() for x in tensors])):
        x.copy_(summed.view_as(x))


def any_process(condition):
    """Is `condition` true in any process?"""
    flag = torch.tensor([float(bool(condition))])
    sum_over_processes([flag])
    return flag.item() > 0


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
