"""engine/loop.py - the training loop that every stage shares: optimizers, schedule, log, exact resume.

Every part of a step's batch draws its randomness from (seed, stage, step, part) alone and the state holds all the rest, so
that a run that was stopped goes on as if it had not been, and many processes (engine/processes.py) learn what one does.

    python train.py --rep sdf        # what runs it
"""
import copy
import csv
import functools
import signal
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
from engine.files import claim, read_weights, save_weights, written
from engine.networks import EMA, Block

SAVE, CHECK, SHOW = 200, 100, 500            # steps between saves, held-out losses, pictures
THREADS = 4                                  # that draw batches for a GPU


def optimizers(model, lr):
    """Muon for the weight matrices inside the network, AdamW for all else; a module may learn at RATE times the rate."""
    matrices = {p for m in model.modules() if isinstance(m, nn.Linear) and min(m.weight.shape) >= 64 for p in [m.weight]}
    rates = {p: m.RATE for m in model.modules() if hasattr(m, "RATE") for p in m.parameters()}

    def groups(inside):
        chosen = [p for p in model.parameters() if (p in matrices) == inside]
        return [{"params": [p for p in chosen if rates.get(p, 1) == rate], "rate": rate}
                for rate in sorted({rates.get(p, 1) for p in chosen})]

    return [torch.optim.Muon(groups(True), lr, weight_decay=.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups(False), lr, betas=(.9, .99), weight_decay=.01, fused=True)]


def learning_rate(step, steps, peak):
    """Warm up over 100 steps, hold, fall linearly to 0 over the second half."""
    return peak * min(1, (step + 1) / min(100, steps / 10), 2 * (steps - step) / steps)


def save_state(path, step, model, ema, opts, sums):
    """Everything a run needs to go on, as plain tensors."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"ema.{k}": v for k, v in ema.model.state_dict().items()}
    state |= {f"opt.{i}.{j}.{k}": v for i, opt in enumerate(opts) for j, s in opt.state_dict()["state"].items() for k, v in s.items()}
    state |= {f"sums.{k}": torch.as_tensor(v) for k, v in sums.items()} | {"step": torch.tensor(step)}
    processes.by_the_first(save_weights)(path, {k: processes.whole(v).clone() for k, v in state.items()})


def load_state(path, model, ema, opts):
    """-> the step to go on from and the sums since the last log line; 0 and none at the very start."""
    if not path.is_file():
        return 0, {}
    state = read_weights(path, "delete it to start the stage again")
    try:
        for name, each in (("model.", model), ("ema.", ema.model)):
            own = each.state_dict()
            each.load_state_dict({k: processes.like(state[name + k], v) for k, v in own.items()})
    except (KeyError, RuntimeError):
        raise UserError(f"{path} is of a model of another size; use another --out, or delete it to start again") from None
    for i, opt in enumerate(opts):
        slots, params = {}, [p for group in opt.param_groups for p in group["params"]]
        for key in (k for k in state if k.startswith(f"opt.{i}.")):
            j, name = key.split(".")[2:]
            slots.setdefault(int(j), {})[name] = processes.like(state[key], params[int(j)])
        opt.load_state_dict({"state": slots, "param_groups": opt.state_dict()["param_groups"]})
    return int(state["step"]), {k[5:]: v for k, v in state.items() if k.startswith("sums.")}


def arrange(model, recompute=False, compiled=False):
    """What --recompute and --compile do to the blocks of a model, in training."""
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        if recompute:                                         # what is inside is not kept for the way back, but made again
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compiled:
            block.compile(dynamic=True)                       # how many tokens are known is another number every step


def batches(run, stage, draw, first, steps):
    """The parts of the batches of all steps to come, with a seed each. Of a part all randomness is a function of (seed, stage, step,
    part): resumed = uninterrupted, one process = many."""
    def drawn(step, part):
        rng = np.random.default_rng((run.seed, list(run.settings).index(stage), step, part))
        return int(rng.integers(2 ** 62)), draw(run.train, rng)

    todo = product(range(first, steps), range(processes.rank(), run.parts, processes.world()))
    if run.device.type == "cpu":                              # a core that draws is one that does not learn
        yield from (drawn(*each) for each in todo)
        return
    with ThreadPoolExecutor(THREADS) as pool:                 # they draw while other parts are learnt from
        ahead = deque(pool.submit(drawn, *each) for each in islice(todo, 2 * THREADS))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(drawn, *each) for each in islice(todo, 1))


def moved(batch, device):
    """Whatever of it is a tensor, onto the device."""
    if isinstance(batch, torch.Tensor):
        pinned = batch.pin_memory() if device.type == "cuda" and not batch.is_cuda else batch            # else the copy is waited for
        return pinned.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: moved(value, device) for key, value in batch.items()}
    return [moved(each, device) for each in batch] if isinstance(batch, (list, tuple)) else batch


def gradients(run, model, loss_of, ready):
    """Forward and backward passes of a step; -> its loss and logs, and how long it waited for its batch. The parts of the batch
    are shared by all processes."""
    total, waited = {}, 0
    for _ in range(run.parts // processes.world()):
        start = time.perf_counter()
        seed, batch = next(ready)
        waited += time.perf_counter() - start
        torch.manual_seed(seed)
        with run.autocast():
            loss, logs = loss_of(model, moved(batch, run.device))
        (loss / run.parts).backward()
        for key, value in ({"loss": loss.detach()} | logs).items():
            total[key] = total.get(key, 0) + value.float().to(run.device) / run.parts
    processes.add_up([p.grad for p in model.parameters() if type(p.grad) is torch.Tensor] + list(total.values()))      # not those in shares
    return total, waited


def fit(run, stage, model, draw, loss_of, show=None):
    """Train `model` on loss_of(model, draw(split, rng)) -> loss, logs; -> its moving average, frozen."""
    steps, batch, lr = run.settings[stage]
    state_path, csv_path = claim(run.folder) / f"{stage}.state.safetensors", run.folder / f"{stage}.csv"
    model = model.to(run.device).train()
    ema = EMA(model)
    result, sharded = ema.model, run.shard and stage == "backbone"
    arrange(model, run.recompute, run.compile)
    if sharded:
        result = copy.deepcopy(ema.model)
        processes.shard(model, run.device), processes.shard(ema.model, run.device)
    opts = optimizers(model, lr)
    first, sums = load_state(state_path, model, ema, opts)
    rows = [r for r in csv.DictReader(csv_path.open()) if int(r["step"]) <= first] if first and csv_path.is_file() else []
    print(f"{stage}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {steps} steps of {batch}"
          + (f", going on from step {first}" if first else ""))
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=stage, unit="step", smoothing=.05, mininterval=1., disable=processes.rank() > 0)
    start = time.time() - (float(rows[-1]["seconds"]) if rows else 0)
    stop, stopped = [], False  # Ctrl-C and kill are obeyed when a step is complete

    def obey(*_):
        bar.write(f"stopping {stage} after this step")
        stop.append(True)

    before = {name: signal.signal(name, obey) for name in (signal.SIGINT, signal.SIGTERM)}
    ready, idle, shown = batches(run, stage, draw, first, steps), 0, time.time()
    for step in bar:
        # --- forward, backward, update
        now = learning_rate(step, steps, lr)
        for group in (group for opt in opts for group in opt.param_groups):
            group["lr"] = group["rate"] * now
        logs, waited = gradients(run, model, loss_of, ready)
        idle += waited
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        ema.update(model, step)
        for key, value in logs.items():
            sums[key] = sums.get(key, torch.zeros(())).to(value.device) + value
        # --- log, look at held-out shapes, save, draw; of many processes the first writes
        done, last, stopped = step + 1, step + 1 == steps, processes.any_of(stop)
        if done % CHECK == 0 or last:
            count = (done - 1) % CHECK + 1
            row = {"step": done} | {k: f"{float(v) / count:.5f}" for k, v in sums.items()}
            torch.manual_seed(0)
            with torch.no_grad(), run.autocast():
                held = loss_of(ema.model, moved(draw(run.test, np.random.default_rng(0)), run.device))[0].item()
            row |= {"held_out": f"{held:.5f}", "lr": f"{now:.2e}", "seconds": f"{time.time() - start:.1f}",
                    "waited": f"{idle / (time.time() - shown):.4f}"}                      # share of the time, for batches
            rows, sums, idle, shown = rows + [row], {}, 0, time.time()
            write_rows(csv_path, rows)
            bar.set_postfix({k: row[k] for k in ("loss", "held_out", "lr")})
        if done % SAVE == 0 or last or stopped:
            save_state(state_path, done, model, ema, opts, sums)
        if show and not stopped and (done % SHOW == 0 or last):
            with torch.no_grad():
                show(ema.model, run.folder / f"{stage}-{done:06d}.png")
        if stopped:
            bar.close()
            print(f"{stage} is saved at step {done} of {steps}; the same command goes on from there")
            break
    ready.close()
    for name, handler in before.items():
        signal.signal(name, handler)
    if stopped:
        raise KeyboardInterrupt
    if sharded:
        result.load_state_dict({k: processes.whole(v) for k, v in ema.model.state_dict().items()})
    return result, time.time() - start


@processes.by_the_first
def write_rows(path, rows):
    with written(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1].keys())
        writer.writeheader()
        writer.writerows(rows)


def plot_losses(panels, out):
    """{title: [(label, csv file, its column), ...]} -> one picture, a panel a title, without files that are not there."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = {title: there for title, curves in panels.items() if (there := [curve for curve in curves if curve[1].is_file()])}
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), squeeze=False, layout="constrained")
    for axis, (title, curves) in zip(axes[0], panels.items()):
        lowest = 1
        for label, path, column in curves:
            rows = list(csv.DictReader(path.open()))
            values = [float(r[column]) for r in rows]
            axis.plot([int(r["step"]) for r in rows], values, label=label)
            lowest = min(lowest, *values)
        axis.set(title=title, xlabel="step", yscale="log" if lowest > 0 else "linear")     # a likelihood may be negative
        axis.legend()
    with written(out) as part:
        figure.savefig(part, dpi=100)
    plt.close(figure)
