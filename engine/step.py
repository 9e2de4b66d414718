"""step.py - components of a training step: micro-batches, gradients, optimizers, the moving average of the weights.

Every micro-batch draws its randomness from (seed, stage, step, micro-batch) alone. So a resumed run equals an
uninterrupted one, and many processes (engine/processes.py) equal one with as many micro-batches.
"""
import copy
import functools
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, product
from zlib import crc32

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from engine import processes
from engine.commands import has_bf16

THREADS = 4                                  # draw batches for a GPU


# ---------------------------------------------------------------------------- micro-batches and gradients

def batches(run, stage, draw, first, steps):
    """The micro-batches of all remaining steps, each with a seed, a function of (seed, stage, step, micro-batch)
    alone."""
    def drawn(step, i):
        rng = np.random.default_rng((run.seed, crc32(stage.encode()), step, i))
        return int(rng.integers(2 ** 62)), draw(run.train, rng)

    todo = product(range(first, steps), range(processes.rank(), run.micro_batches, processes.world()))
    if run.device.type == "cpu":                              # drawing ahead would take cores from training
        yield from (drawn(*item) for item in todo)
        return
    with ThreadPoolExecutor(THREADS) as pool:                 # draws the next micro-batches while the GPU trains
        ahead = deque(pool.submit(drawn, *item) for item in islice(todo, 2 * THREADS))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(drawn, *item) for item in islice(todo, 1))


def to_device(batch, device):
    """Moves every tensor of a batch, which may be a dict or a list, to the device."""
    if isinstance(batch, torch.Tensor):
        if device.type == "cuda" and not batch.is_cuda:
            batch = batch.pin_memory()                        # else the copy is synchronous
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return [to_device(x, device) for x in batch] if isinstance(batch, (list, tuple)) else batch


def gradients(run, model, loss_of, ready):
    """Forward and backward passes of a step, whose micro-batches all processes share; -> its loss and logs, and the
    seconds of waiting for data."""
    total, waited = {}, 0
    for _ in range(run.micro_batches // processes.world()):
        start = time.perf_counter()
        seed, batch = next(ready)
        waited += time.perf_counter() - start
        torch.manual_seed(seed)
        with run.autocast():
            loss, logs = loss_of(model, to_device(batch, run.device))
        (loss / run.micro_batches).backward()
        for key, value in ({"loss": loss.detach()} | logs).items():
            total[key] = total.get(key, 0) + value.float().to(run.device) / run.micro_batches
    own = [p.grad for p in model.parameters() if p.grad is not None]
    processes.sum_over_processes(own + list(total.values()))
    return total, waited


@torch.no_grad()
def held_out_loss(run, model, draw, loss_of):
    """The loss on one fixed batch of held-out shapes."""
    torch.manual_seed(0)
    with run.autocast():
        batch = to_device(draw(run.test, np.random.default_rng(0)), run.device)
        return loss_of(model, batch)[0].item()


@torch.no_grad()
def shares_of_loss(run, model, loss_of, samples_of):
    """The loss of each training shape alone, over the sum of all: an array. A file is measured in one position."""
    losses, model = [], model.to(run.device)
    _, first, own = np.unique(run.train.rows, return_index=True, return_inverse=True)
    for row in tqdm(first, desc="loss of each shape", unit="shape", disable=processes.rank() > 0):
        batch = to_device(samples_of(run.train, np.array([row]), np.random.default_rng(row)), run.device)
        with run.autocast():
            losses.append(loss_of(model, batch)[0].item())
    losses = np.array(losses)[own]
    return losses / losses.sum()


def recompute_blocks(model):
    """Activation checkpointing: activations inside a block are recomputed in the backward pass."""
    for block in [module for module in model.modules() if getattr(module, "is_block", False)]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


# ---------------------------------------------------------------------------- optimizers

COEFFICIENTS = 3.4445, -4.7750, 2.0315     # steep at 0: after five steps singular values are within .3 of 1


def orthogonalise(m):
    """m = U S V^T -> about U V^T, by five Newton-Schulz steps: X = a X + b (X X^T) X + c (X X^T)^2 X."""
    a, b, c = COEFFICIENTS
    x = m.bfloat16() if has_bf16(m.device) else m
    x = x.T if m.shape[0] > m.shape[1] else x                 # so that X X^T is the smaller product
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if m.shape[0] > m.shape[1] else x


class Muon(torch.optim.Optimizer):
    """The optimizer of weight matrices (Jordan 2024): updates are orthogonalised.

        M = momentum M + (1 - momentum) G                   G: the gradient of W
        W = W - lr (.2 sqrt(longer side) U V^T + decay W)   momentum M + (1 - momentum) G = U S V^T (Nesterov)

    The factor makes a step as large as one of AdamW. torch.optim.Muon is the same, but always in bf16. That takes
    thirty times as long on a processor that has to emulate it."""

    def __init__(self, params, lr, decay, momentum=.95):
        super().__init__(params, dict(lr=lr, decay=decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for w in [w for w in group["params"] if w.grad is not None]:
                state = self.state[w]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(w)
                m = state["momentum_buffer"].lerp_(w.grad, 1 - momentum)
                update = orthogonalise(w.grad.lerp(m, momentum))                  # Nesterov momentum
                w.mul_(1 - lr * group["decay"]).add_(update, alpha=-lr * .2 * max(w.shape) ** .5)


def optimizers(model, lr):
    """Muon for Linear weights of at least 64 x 64, AdamW for the rest; a module's RATE multiplies its learning rate."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    matrices = {module.weight for module in linear if min(module.weight.shape) >= 64}
    rates = {p: m.RATE for m in model.modules() if hasattr(m, "RATE") for p in m.parameters()}

    def groups(inside):
        chosen = [p for p in model.parameters() if (p in matrices) == inside]
        return [{"params": [p for p in chosen if rates.get(p, 1) == rate], "rate": rate}
                for rate in sorted({rates.get(p, 1) for p in chosen})]

    return [Muon(groups(True), lr, decay=.01),
            torch.optim.AdamW(groups(False), lr, betas=(.9, .99), weight_decay=.01, fused=True)]


def learning_rate(step, steps, peak):
    """Warm up over 100 steps, or over a tenth of all if that is less; hold; fall linearly to 0 over the second half."""
    return peak * min(1, (step + 1) / min(100, steps / 10), 2 * (steps - step) / steps)


def update(opts, rate):
    """A step of all optimizers, at this learning rate."""
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = group["rate"] * rate
        opt.step()


class EMA:
    """Exponential moving average of the weights; the decay warms up, for short runs."""

    def __init__(self, model, decay=.999):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, current in zip(self.model.state_dict().values(), model.state_dict().values()):
            if average.is_floating_point():
                average.lerp_(current, 1 - decay)
            else:
                average.copy_(current)
