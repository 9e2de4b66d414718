"""state.py - around the training loop: the state to resume from, the log, the loss curves."""
import csv
import json
import signal
import time
from contextlib import contextmanager

import torch

from engine import processes
from engine.commands import UserError
from engine.files import atomic_write, first_difference, read_weights, save_weights

# ---------------------------------------------------------------------------- stop and resume

@processes.first_process_only
def save_state(path, step, flags, model, ema, opts, sums):
    """The state to resume from, as plain tensors. flags: {flag: value} of what must stay the same."""
    state = {"step": torch.tensor(step), "flags": torch.tensor([*json.dumps(flags).encode()], dtype=torch.uint8)}
    state |= {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"ema.{k}": v for k, v in ema.model.state_dict().items()}
    state |= {f"sums.{k}": torch.as_tensor(v) for k, v in sums.items()}
    for i, opt in enumerate(opts):
        for j, slots in opt.state_dict()["state"].items():
            state |= {f"opt.{i}.{j}.{k}": v for k, v in slots.items()}
    save_weights(path, {k: v.to("cpu", copy=True) for k, v in state.items()})


def load_state(path, flags, model, ema, opts):
    """-> the step to resume from and the sums since the last row of the log; 0 and {} for a new stage."""
    if not path.is_file():
        return 0, {}
    state = read_weights(path, "delete it to start the stage again")
    try:
        if difference := first_difference(json.loads(bytes(state["flags"].tolist())), flags):
            raise UserError(f"{path} was begun {difference}; give that, use another --out, or delete it to start the "
                            "stage again")
        for name, module in (("model.", model), ("ema.", ema.model)):
            module.load_state_dict({k: state[name + k] for k in module.state_dict()})
    except (KeyError, RuntimeError, ValueError):
        raise UserError(f"{path} is of another model or of an earlier version; use another --out, or delete it to "
                        "start the stage again") from None
    for i, opt in enumerate(opts):
        slots = {}
        for key in (k for k in state if k.startswith(f"opt.{i}.")):
            j, name = key.split(".")[2:]
            slots.setdefault(int(j), {})[name] = state[key]
        opt.load_state_dict({"state": slots, "param_groups": opt.state_dict()["param_groups"]})
    return int(state["step"]), {k[5:]: v for k, v in state.items() if k.startswith("sums.")}


@contextmanager
def stop_after_step(bar, stage):
    """Yields a list, empty until Ctrl-C or kill: the training loop stops after the current step."""
    stop = []

    def request(*_):
        bar.write(f"stopping {stage} after this step")
        stop.append(True)

    before = {name: signal.signal(name, request) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


# ---------------------------------------------------------------------------- the log

class Log:
    """<stage>.csv: mean loss and logs of the steps since the last row, the held-out loss, the number of steps skipped.
    The numbers are added up on the device, and read for a row of the file."""

    def __init__(self, path, first, sums, device):
        self.path, self.device, self.now, self.rows = path, device, {}, []
        self.sums = {name: torch.zeros((), device=device) for name in ("steps", "skipped", "in a row", "most in a row")}
        self.start = time.time() - float(sums.pop("seconds", 0))
        self.sums |= {name: value.to(device) for name, value in sums.items()}
        if first and path.is_file():
            self.rows = [row for row in csv.DictReader(path.open()) if int(row["step"]) <= first]

    def add(self, logs, share):
        """The numbers of a micro-batch, `share` of its step."""
        for name, value in logs.items():
            if name not in self.now:
                self.now[name] = torch.zeros((), device=self.device)
                self.sums.setdefault(name, torch.zeros((), device=self.device))
            self.now[name] += share * value.detach()

    def count(self, finite):
        """Ends a step, which is skipped if its gradients are not `finite`, a boolean on the device."""
        for name, value in self.now.items():
            self.sums[name] += torch.where(finite, value, 0.)
            value.zero_()
        self.sums["steps"] += finite
        self.sums["skipped"] += ~finite
        self.sums["in a row"].add_(1).mul_(~finite)
        torch.maximum(*(self.sums[name] for name in ("most in a row", "in a row")), out=self.sums["most in a row"])

    def write(self, done, rate, held_out):
        """Ends a row after step `done`; -> its columns for the progress bar, and the most steps skipped in a row."""
        values = dict(zip(self.sums, processes.mean(torch.stack([*self.sums.values()])).tolist()))
        count, skipped, _, most = (values.pop(name) for name in ("steps", "skipped", "in a row", "most in a row"))
        if not count:
            return {}, most
        names = sorted(values, key=lambda name: (name != "loss", name))           # the same after a resume
        row = {"step": done} | {name: f"{values[name] / count:.5f}" for name in names}
        row |= {"held_out": f"{held_out:.5f}", "lr": f"{rate:.2e}", "seconds": f"{self.seconds():.1f}",
                "skipped": f"{skipped:.0f}"}
        self.rows.append(row)
        for name in self.sums.keys() - {"in a row"}:
            self.sums[name].zero_()
        self.write_rows()
        return {k: row[k] for k in ("loss", "held_out", "lr")}, most

    @processes.first_process_only
    def write_rows(self):
        with atomic_write(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[-1].keys())
            writer.writeheader()
            writer.writerows(self.rows)

    def seconds(self):
        return time.time() - self.start


def plot_losses(panels, out):
    """{title: [(label, csv file, its column), ...]} -> one picture, a panel a title; missing files are left out."""
    import matplotlib  # takes a second to import
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = {title: [curve for curve in curves if curve[1].is_file()] for title, curves in panels.items()}
    found = {title: curves for title, curves in found.items() if curves}
    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3), squeeze=False, layout="constrained")
    for axis, (title, curves) in zip(axes[0], found.items()):
        lowest = 1
        for label, path, column in curves:
            rows = list(csv.DictReader(path.open()))
            values = [float(row[column]) for row in rows]
            axis.plot([int(row["step"]) for row in rows], values, label=label)
            lowest = min(lowest, *values)
        scale = "log" if lowest > 0 else "linear"             # a negative log likelihood may be below 0
        axis.set(title=title, xlabel="step", yscale=scale)
        axis.legend()
    with atomic_write(out) as part:
        figure.savefig(part, dpi=100)
    plt.close(figure)
