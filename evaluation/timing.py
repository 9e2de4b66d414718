"""evaluation/timing.py - how long does it take, how much memory, how many operations? What bench.py asks of everything.

On a machine that others use too, seconds do not hold, but the ratio of two ways that take turns does.

    python bench.py decode         # one of the commands that need it
"""
import contextlib
import ctypes
import math
import resource
import statistics
import threading
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode


class Peak:
    """The most memory that the process holds above what it held before, MB; of a GPU, what torch allocates there. nan where /proc is not."""

    def __init__(self, device):
        self.device = device

    def held(self):
        pages = Path("/proc/self/statm")
        return int(pages.read_text().split()[1]) * resource.getpagesize() if pages.is_file() else math.nan

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)                  # what was freed before is given back, not used again unseen
        self.start = self.most = self.held()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.over.wait(.005):
            self.most = max(self.most, self.held())

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.most = torch.cuda.max_memory_allocated()
        else:
            self.over.set()
            self.thread.join()
        self.megabytes = (self.most - self.start) / 2 ** 20


def seconds(way, device):
    """How long it takes, and the most memory that it takes."""
    with Peak(device) as peak:
        start = time.perf_counter()
        way()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
    return taken, peak.megabytes


def matmul_peak(device, autocast):
    """FLOP/s of the best of some large matrix products, in the precision that the models run in."""
    side = 8192 if device.type == "cuda" else 2048
    with autocast():
        a = torch.randn(side, side, device=device)
        a = a.to((a[:8, :8] @ a[:8, :8]).dtype)
        return 2 * side ** 3 / min(seconds(lambda: a @ a, device)[0] for _ in range(10))


def flops(way):
    """Floating-point operations of the matrix products of way(device), counted without making any: on the device "meta"."""
    with FlopCounterMode(display=False) as counter:
        way(torch.device("meta"))
    return counter.get_total_flops()


def turns(ways, bench, work=None):
    """{name: function} take turns -> a row each. work: {name: its FLOPs}."""
    times, memory, warm = {name: [] for name in ways}, {name: [] for name in ways}, bench.rounds > 1
    for i in range(bench.rounds + warm):
        for name, way in ways.items():
            taken, most = seconds(way, bench.device)
            memory[name].append(most)
            if i >= warm:
                times[name].append(taken)
    median = {name: statistics.median(each) for name, each in times.items()}
    first = median[next(iter(ways))]
    return [{"way": name, "seconds": median[name], "spread": (max(each) - min(each)) / median[name], "times as fast": first / median[name],
             "peak MB": max(memory[name])} | ({"share of matmul peak": work[name] / median[name] / bench.peak} if work else {})
            for name, each in times.items()]
