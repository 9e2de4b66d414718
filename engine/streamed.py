"""streamed.py - batches of a set that does not fit into a GPU's memory: worker processes draw them from disk."""
import os
import signal
from itertools import product

from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from engine import processes
from engine.step import seed_batch, to_device

WORKERS = min(4, os.cpu_count())


class Streamed:
    """Micro-batches, some of them ahead. `batch` is the current one, always the same tensors on the GPU."""
    batch = None

    def __init__(self, run, stage, draw, first, steps):
        items = [*product(range(first, steps), range(processes.rank(), run.micro_batches, processes.world()))]

        def drawn(item):
            seed_batch(run, stage, *item)
            return draw(run.train)

        def deaf(_):                                          # the main process stops, after its step
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, signal.SIG_IGN)

        draw(run.train)                                       # fills the caches of the set, before the workers fork
        self.device, pinned = run.device, run.device.type == "cuda"
        self.loader = iter(DataLoader(items, None, collate_fn=drawn, num_workers=WORKERS, pin_memory=pinned,
                                      worker_init_fn=deaf, multiprocessing_context="fork"))

    def advance(self):
        new = next(self.loader)
        if self.batch is None:
            self.batch = to_device(new, self.device)
        for old, x in zip(tree_leaves(self.batch), tree_leaves(new)):
            old.copy_(x, non_blocking=True)
