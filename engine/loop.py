"""loop.py - the training loop. A stage draws batches from it and gives it their losses; the loop does the rest.

    loop = Loop(run, "encoders", model, draw_batch)           # a stopped run resumes
    for net, batch in loop:                                   # batch: what draw_batch(run.train) returns
        loop.step(*net(*batch))                               # net(...) is model.loss(...) -> loss, logs
        if path := loop.picture():                            # about three times
            save_png(path, ...)
    loop.average                                              # the moving average of the weights, frozen

Every hundred steps the loop hands out one batch of held-out shapes, too, with the moving average as `net`: the same
lines measure the held-out loss. net.training says which of the two it is.

A step's batch may be cut into micro-batches (--micro-batches). Each draws its random numbers from (seed, stage, step,
micro-batch) alone: so a resumed run equals an uninterrupted one. Many processes share the micro-batches; their
gradients are averaged by DistributedDataParallel.

    python -m pytest -q engine        # its tests
"""
import functools
from itertools import product
from zlib import crc32

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from engine import processes
from engine.commands import UserError
from engine.files import make_folder
from engine.graphs import compiled
from engine.optimizers import EMA, learning_rate, optimizers, set_rate, update
from engine.state import Log, load_state, save_state, stop_after_step
from engine.streamed import stream

SAVE, CHECK = 200, 100                       # steps between saves and held-out losses
SHOW, PICTURES = 500, 3                      # at least so many steps between pictures; about so many pictures
MOST_SKIPPED = 10                            # steps in a row


class Loss(nn.Module):
    """net(...) = model.loss(...). DistributedDataParallel and torch.compile want a forward pass."""

    def __init__(self, model, autocast):
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, *batch):
        with self.autocast(), torch.set_grad_enabled(self.training):
            return self.model.loss(*batch)


class Loop:
    """run: engine/run.py; model: a module with `loss`; draw_batch: a prepared set (data.py) -> a batch on its
        device."""

    def __init__(self, run, stage, model, draw_batch):
        self.run, self.stage, self.draw_batch = run, stage, draw_batch
        self.steps, self.batch, self.lr = run.stages[stage].steps, run.stages[stage].batch, run.stages[stage].lr
        self.model = model.to(run.device).train()
        self.ema = EMA(self.model)
        self.average = self.ema.model
        if run.recompute:
            recompute_blocks(self.model)
        self.optimizers = optimizers(self.model, self.lr)

        self.state_path = make_folder(run.folder) / f"{stage}.state.safetensors"
        self.flags = run.flags(stage)
        self.start, sums = load_state(self.state_path, self.flags, self.model, self.ema, self.optimizers)
        self.log = Log(run.folder / f"{stage}.csv", self.start, sums, run.device)
        self.progress = torch.zeros((), device=run.device)    # of training, from 0 to 1
        size = sum(p.numel() for p in self.model.parameters())
        origin = f", resuming from step {self.start}" if self.start else f", from {run.source}" if run.finetune else ""
        print(f"{stage}: {size / 1e6:.2f} M parameters, {self.steps} steps of {self.batch}{origin}")

        self.net = Loss(self.model, run.autocast)
        if processes.world() > 1:
            self.net = DistributedDataParallel(self.net, broadcast_buffers=False)
        if run.compile:
            self.net = compiled(self.net)
        self.held_out_net = Loss(self.average, run.autocast).eval()

    def __iter__(self):
        own = range(processes.rank(), self.run.micro_batches, processes.world())  # micro-batches of this process
        batches = self.batches(product(range(self.start, self.steps), own))
        bar = tqdm(range(self.start, self.steps), initial=self.start, total=self.steps, desc=self.stage, unit="step",
                   smoothing=.05, mininterval=1., disable=processes.rank() > 0)
        with stop_after_step(bar, self.stage) as stop:
            for self.now in bar:
                self.progress.fill_(self.now / self.steps)

                # --- forward and backward passes, update: at each `yield` the lines of the stage run, and call `step`
                for i in own:
                    self.updates = i == own[-1]        # the last one of the step
                    yield self.net, next(batches)

                # --- log, save, draw curves: only the first process writes
                done, last, stopped = self.now + 1, self.now + 1 == self.steps, processes.any_process(stop)
                if done % CHECK == 0 or last:
                    self.updates = False
                    yield self.held_out_net, self.held_out_batch()
                    columns, skipped = self.log.write(done, self.rate, self.held_out_loss)
                    bar.set_postfix(columns)
                    if skipped >= min(MOST_SKIPPED, self.steps):
                        raise UserError(f"{self.stage}: the gradients of {skipped:.0f} steps in a row are not finite; "
                                        f"give an --lr below {self.lr:g}, or look for NaN in the data")
                if done % SAVE == 0 or last or stopped:
                    sums = self.log.sums | {"seconds": self.log.seconds()}
                    save_state(self.state_path, done, self.flags, self.model, self.ema, self.optimizers, sums)
                if self.shows():
                    self.run.plot()
                if stopped:
                    bar.close()
                    print(f"{self.stage} is saved at step {done} of {self.steps}; the same command resumes it")
                    raise KeyboardInterrupt

    def step(self, loss, logs={}):
        """The backward pass of a micro-batch; after the last one of a step, the update of the weights. Of held-out
        shapes, only the loss is kept."""
        if not loss.requires_grad:
            self.held_out_loss = loss.item()
            return
        with processes.partners():
            (self.run.share * loss).backward()
        self.log.add({"loss": loss} | logs, self.run.share)
        if self.updates:
            self.rate = learning_rate(self.now, self.steps, self.lr)
            set_rate(self.optimizers, self.rate)
            with self.run.autocast():                         # for Muon's products
                self.log.count(update(self.model, self.optimizers))
            self.model.zero_grad(set_to_none=not self.run.compile)                # a CUDA graph adds in place
            self.ema.update(self.now)

    def picture(self):
        """The path of a picture, after a step that shows one."""
        if self.updates and self.shows():
            return self.run.folder / f"{self.stage}-{self.now + 1:06d}.png"

    def shows(self):
        done = self.now + 1
        return done % max(SHOW, -(-self.steps // PICTURES)) == 0 or done == self.steps

    # ------------------------------------------------------------------------ batches

    def batches(self, items):
        """The batch of each item, (step, micro-batch). torch's random numbers depend on it alone, here and in the lines
        of the stage. A set that does not fit on a GPU is drawn by worker processes."""
        if not self.run.train.streamed:
            for item in items:
                self.seed(*item)
                yield self.draw_batch(self.run.train)
            return
        self.draw_batch(self.run.train)                       # fills the caches of the set, before workers fork

        def draw_item(item):
            self.seed(*item)
            return self.draw_batch(self.run.train)

        items = [*items]
        for item, batch in zip(items, stream(draw_item, items, self.run.device)):
            self.seed(*item)
            yield batch

    def seed(self, step, i):
        rng = np.random.default_rng((self.run.seed, crc32(self.stage.encode()), step, i))
        torch.manual_seed(int(rng.integers(2 ** 62)))

    def held_out_batch(self):                                 # always the same one
        torch.manual_seed(0)
        return to_device(self.draw_batch(self.run.test), self.run.device)


def to_device(batch, device):
    """A batch, which may be a dict or a list, on a device."""
    return tree_map_only(torch.Tensor, lambda x: x.to(device), batch)


def recompute_blocks(model):
    """Activation checkpointing: activations inside a block are recomputed in the backward pass."""
    for block in [module for module in model.modules() if getattr(module, "is_block", False)]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
