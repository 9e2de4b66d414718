"""timing.py - how long something takes, how much memory, how many operations; bench.py measures with it.

Seconds change from run to run on a machine that others use too. The ratio of two ways that take turns hardly does.
"""
import contextlib
import math
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from geometry.surface import give_back_memory


def memory(field="VmRSS"):
    """Bytes that the process holds (VmRSS), or held at most (VmHWM); nan where there is no /proc."""
    status = Path("/proc/self/status")
    return int(status.read_text().split(f"{field}:")[1].split()[0]) * 1024 if status.is_file() else math.nan


def measure(way, device):
    """-> the seconds that way() takes, and the most MB that are in use meanwhile, above what was in use before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        way()
        torch.cuda.synchronize()
        return time.perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / 2 ** 20

    give_back_memory()                                        # its reuse would not be counted
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")         # the system forgets what the process held at most
    before, start = memory(), time.perf_counter()
    way()
    return time.perf_counter() - start, (memory("VmHWM") - before) / 2 ** 20


def matmul_peak(device, autocast):
    """FLOP/s of the fastest of ten large matrix products, in the precision that the models run in."""
    side = 8192 if device.type == "cuda" else 2048
    with autocast():
        a = torch.randn(side, side, device=device)
        a = a.to((a[:8, :8] @ a[:8, :8]).dtype)
        return 2 * side ** 3 / min(measure(lambda: a @ a, device)[0] for _ in range(10))


def count_flops(way):
    """Floating-point operations of the matrix products of way(device). The device "meta" only counts them."""
    with FlopCounterMode(display=False) as counter:
        way(torch.device("meta"))
    return counter.get_total_flops()


def take_turns(ways, bench, flops=None):
    """{name: function} take turns, `bench.rounds` times -> a row for each. flops: {name: operations}."""
    seconds, memory = {name: [] for name in ways}, {name: [] for name in ways}
    warm_up = bench.rounds > 1
    for i in range(bench.rounds + warm_up):
        for name, way in ways.items():
            duration, megabytes = measure(way, bench.device)
            memory[name].append(megabytes)
            if i >= warm_up:
                seconds[name].append(duration)

    rows, median = [], {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        rows.append({"way": name, "seconds": median[name], "spread": (max(values) - min(values)) / median[name],
                     "times as fast": median[next(iter(ways))] / median[name], "peak MB": max(memory[name])})
        if flops:
            rows[-1]["share of matmul peak"] = flops[name] / median[name] / bench.peak if name in flops else ""
    return rows
