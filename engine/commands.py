"""commands.py - what every command shares: one-line errors, flags with help, the device and its precision."""
import argparse
import os
import sys
import time

import torch
from torch import nn


# ---------------------------------------------------------------------------- mistakes of users, and flags

class UserError(Exception):
    """What a user can mend: says what was wrong, with what, and what to do."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows every default, where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Whose complaints are one line."""

    def __init__(self, description=None, **rest):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False, **rest)

    def error(self, message):
        alone = os.environ.get("RANK", "0") == "0"            # of many processes (engine/processes.py), which all have these flags, one says it
        self.exit(2, f"error: {message}; see {self.prog} --help\n" if alone else None)


def between(low, high=2 ** 63 - 1, kind=int):
    """The type of a flag: a number from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            reach = f"at least {low}" if high == 2 ** 63 - 1 else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {reach}, not {text}")
        return kind(text)
    parse.__name__ = kind.__name__
    return parse


def command(main):
    """Run a script: a user's mistake is one line and exit status 2, Ctrl-C one word and 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


# ---------------------------------------------------------------------------- device and precision

def pick_device(name=None):
    """The one place that chooses: -> device, a function giving its autocast context, and the reason."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        a = torch.randn(512, 512, device=device)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("unknown here")
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0][:80]}); try --device cpu") from None

    def seconds(dtype):
        x = a.to(dtype)
        start = time.perf_counter()
        (x @ x).float().sum().item()
        return time.perf_counter() - start

    if device.type == "cuda":
        bf16, why = torch.cuda.is_bf16_supported(), "the chip has bf16 matrix units"
    else:
        fp32, half = zip(*((seconds(torch.float32), seconds(torch.bfloat16)) for _ in range(16)))        # in turns: others use it, too
        ratio = min(fp32) / min(half)
        bf16, why = ratio > 1.2, f"a bf16 matrix product takes {1 / ratio:.2f} of the time of an fp32 one"
    reason = f"{name}, {'bf16 autocast' if bf16 else 'fp32'} ({why if bf16 or device.type != 'cuda' else 'no bf16 units'})"
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16), reason


def cast_once(model, autocast):
    """A frozen model's matrices as autocast would cast them at every call: the same numbers, a fifth faster."""
    with autocast():
        if torch.is_autocast_enabled(next(model.parameters()).device.type):
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.bfloat16()
    return model
