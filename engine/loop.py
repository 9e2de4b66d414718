"""loop.py - the training loop that every stage shares.

Every micro-batch draws its randomness from (seed, stage, step, micro-batch) alone, and the state on disk holds the rest
(engine/state.py). So a run that was stopped goes on as if it had not been, and many processes (engine/processes.py)
learn what one does with as many micro-batches.
"""
import copy
import functools
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, product

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from engine import processes
from engine.commands import UserError
from engine.files import make_folder
from engine.networks import EMA, Block, GrowingBlock
from engine.state import Log, learning_rate, load_state, optimizers, save_state, stop_after_step

SAVE, CHECK, SHOW = 200, 100, 500            # steps between saves, held-out losses, pictures
MOST_SKIPPED = 10                            # steps in a row
THREADS = 4                                  # that draw batches for a GPU


def fit(run, stage, model, draw, loss_of, show=None):
    """Trains `model` on loss_of(model, draw(split, rng)), which gives loss and logs. Returns its moving average,
    frozen, and the seconds. show(model, path) draws a picture of what the model does."""
    steps, batch, lr = run.settings[stage]
    state_path = make_folder(run.folder) / f"{stage}.state.safetensors"
    model, ema, result = set_up(run, stage, model)
    opts = optimizers(model, lr)
    first, sums = load_state(state_path, model, ema, opts)
    log = Log(run.folder / f"{stage}.csv", first, sums)
    print(f"{stage}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {steps} steps of {batch}"
          + f", going on from step {first}" * bool(first))

    ready = batches(run, stage, draw, first, steps)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=stage, unit="step", smoothing=.05, mininterval=1.,
               disable=processes.rank() > 0)
    skipped = 0                                               # in a row
    with stop_after_step(bar, stage) as stop:
        for step in bar:
            # --- forward and backward passes
            rate = learning_rate(step, steps, lr)
            logs, waited = gradients(run, model, loss_of, ready)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.)

            # --- update, unless a gradient is not finite
            skipped = 0 if processes.whole_tensor(norm).isfinite() else skipped + 1
            log.add(logs, waited, skipped > 0)
            if skipped == min(MOST_SKIPPED, steps):
                raise UserError(f"{stage}: the gradients of {skipped} steps in a row are not finite; "
                                f"give an --lr below {lr:g}, or look for NaN in the data")
            if not skipped:
                update(opts, rate)
                ema.update(model, step)
            model.zero_grad()

            # --- log, save, draw a picture; of many processes the first writes
            done, last, stopped = step + 1, step + 1 == steps, processes.any_process(stop)
            if done % CHECK == 0 or last:
                bar.set_postfix(log.write(done, rate, held_out_loss(run, ema.model, draw, loss_of)))
            if done % SAVE == 0 or last or stopped:
                save_state(state_path, done, model, ema, opts, log.sums)
            if show and not stopped and (done % SHOW == 0 or last):
                with torch.no_grad():
                    show(ema.model, run.folder / f"{stage}-{done:06d}.png")
            if stopped:
                bar.close()
                print(f"{stage} is saved at step {done} of {steps}; the same command goes on from there")
                raise KeyboardInterrupt

    ready.close()
    if result is not ema.model:
        result.load_state_dict({k: processes.whole_tensor(v) for k, v in ema.model.state_dict().items()})
    return result, log.seconds()


def set_up(run, stage, model):
    """The model on its device, its moving average, and the model that the average ends up in, as the flags say."""
    model = model.to(run.device).train()
    ema = EMA(model)
    result = ema.model
    if run.recompute:
        recompute_blocks(model)
    if run.shard and stage == run.last:
        result = copy.deepcopy(ema.model)
        processes.shard(model, run.device)
        processes.shard(ema.model, run.device)
    return model, ema, result


def recompute_blocks(model):
    """Activations inside a block are not stored for the backward pass but computed again: less memory, longer steps."""
    for block in [module for module in model.modules() if isinstance(module, (Block, GrowingBlock))]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def batches(run, stage, draw, first, steps):
    """The micro-batches of all steps to come, each with a seed, a function of (seed, stage, step, micro-batch) alone:
    resumed = uninterrupted, many processes = one with as many micro-batches."""
    def drawn(step, i):
        rng = np.random.default_rng((run.seed, list(run.settings).index(stage), step, i))
        return int(rng.integers(2 ** 62)), draw(run.train, rng)

    todo = product(range(first, steps), range(processes.rank(), run.micro_batches, processes.world()))
    if run.device.type == "cpu":                              # a core that draws is a core that does not learn
        yield from (drawn(*item) for item in todo)
        return
    with ThreadPoolExecutor(THREADS) as pool:                 # draws micro-batches to come while the GPU learns
        ahead = deque(pool.submit(drawn, *item) for item in islice(todo, 2 * THREADS))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(drawn, *item) for item in islice(todo, 1))


def to_device(batch, device):
    """Moves every tensor of a batch, which may be a dict or a list, to the device."""
    if isinstance(batch, torch.Tensor):
        if device.type == "cuda" and not batch.is_cuda:
            batch = batch.pin_memory()                        # else the copy is waited for
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return [to_device(x, device) for x in batch] if isinstance(batch, (list, tuple)) else batch


def gradients(run, model, loss_of, ready):
    """Forward and backward passes of a step, whose micro-batches all processes share; -> its loss and logs, and the
    seconds that it waited for data."""
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
    whole = [p.grad for p in model.parameters() if type(p.grad) is torch.Tensor]          # not those that are sharded
    processes.sum_over_processes(whole + list(total.values()))
    return total, waited


def update(opts, rate):
    """A step of all optimizers, at this learning rate."""
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = group["rate"] * rate
        opt.step()


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


@torch.no_grad()
def held_out_loss(run, model, draw, loss_of):
    """The loss on one batch of held-out shapes, always the same."""
    torch.manual_seed(0)
    with run.autocast():
        batch = to_device(draw(run.test, np.random.default_rng(0)), run.device)
        return loss_of(model, batch)[0].item()
