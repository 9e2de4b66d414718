"""streamed.py - batches of a set that does not fit into a GPU's memory: worker processes draw them from disk."""
import os
import signal

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

WORKERS = min(4, os.cpu_count())


def stream(draw_batch, items, device):
    """draw_batch(item) of each item, on the device; worker processes are some items ahead."""

    def ignore_signals(_):                                    # Ctrl-C: the main process stops, after its step
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)

    loader = DataLoader(items, None, collate_fn=draw_batch, num_workers=WORKERS, pin_memory=device.type == "cuda",
                        worker_init_fn=ignore_signals, multiprocessing_context="fork")
    for batch in loader:
        yield tree_map_only(torch.Tensor, lambda x: x.to(device, non_blocking=True), batch)
