"""commands.py - what every command shares: one-line errors, flags with help, the device and its precision."""
import argparse
import os
import signal
import sys

import torch
from torch import nn

# ---------------------------------------------------------------------------- mistakes of users, and flags

class UserError(Exception):
    """An error that the user can fix. In one line, whatever it quotes: the fault, its object and the remedy."""

    def __str__(self):
        return " ".join(super().__str__().splitlines())


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows the default of every flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, description=None, **rest):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False, **rest)

    def error(self, message):
        first = os.environ.get("RANK", "0") == "0"            # only the first process prints it
        self.exit(2, f"error: {message}; see {self.prog} --help\n" if first else None)


def between(low, high=2 ** 63 - 1, kind=int):
    """The type of a flag: a number from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            reach = f"at least {low}" if high == 2 ** 63 - 1 and kind(text) < low else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {reach}, not {text}")
        return kind(text)
    parse.__name__ = kind.__name__
    return parse


def command(main, less_memory="a smaller --n or --resolution"):
    """Runs a script. Exit status: 2 after one line for a UserError, an unusable file or a GPU whose memory is full;
    130 after one word for Ctrl-C or kill; 0, silently, for a closed output pipe (`head`). less_memory: its flags."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # else Python writes into the pipe again
        raise SystemExit(0) from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except torch.OutOfMemoryError as error:
        print(f"error: the memory of the GPU is full; give {less_memory}, or --device cpu "
              f"({str(error).splitlines()[0][:100]})", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if not error.filename:                                # no file: a bug of ours
            raise
        print(f"error: cannot use {error.filename}: {error.strerror}; name another file or folder", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------------------- device and precision

def has_bf16(device):
    """Has the device native bf16 matrix products? Emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        found = getattr(torch.cpu, "get_capabilities", dict)()               # new in torch 2.11
        return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))      # x86 (two) and ARM
    return False


def pick_device(name=None, precision=None):
    """-> device, a function that returns its autocast context, and the reason. No other function chooses."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("unknown here")
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0][:80]
        raise UserError(f"--device {name} cannot be used here ({why}); try --device cpu") from None
    if device.type == "cuda":
        set_kernels()
        if device.index is not None:
            torch.cuda.set_device(device)                     # streams and CUDA graphs are made on the current device
    bf16 = has_bf16(device) if precision is None else precision == "bf16"
    why = "as asked" if precision else f"the processor has {'' if bf16 else 'no '}bf16 matrix products"
    reason = f"{name}, {'bf16 autocast' if bf16 else 'fp32'} ({why})"
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16), reason


def set_kernels():
    """Chooses kernels of a GPU where those of PyTorch do not suit. For the whole process: a backward pass that
    recomputes a block has to find the kernels of its forward pass."""
    # Attention: flash before the others. On an H100 or B200, PyTorch prefers cuDNN's, which builds a plan for each new
    # shape (tens of milliseconds of the host); our shapes are many and short, from tens of rows to a thousand, where
    # a kernel takes microseconds. Not measured on a GPU yet: `python -m research.gpu --parts attention` does it.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # fp32 is fp32, as for matrix products: TF32, cuDNN's default for convolutions, keeps 10 bits. VAT's codes are the
    # nearest vectors to a residual that Quantiser.up computes, once to encode and once to decode. (The older name of
    # this setting: once cudnn.conv.fp32_precision is set, torch.compile, which reads the older one, fails.)
    torch.backends.cudnn.allow_tf32 = False


RESIDENT = .5    # share of a GPU's free memory for a prepared set, or for cached tokens


def fits(size, device):
    """Do `size` bytes fit into the device's memory, beside what a training step needs?"""
    return device.type != "cuda" or size < RESIDENT * torch.cuda.mem_get_info(device)[0]


def add_device_flags(parser):
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first that is available)")
    parser.add_argument("--precision", choices=["fp32", "bf16"],
                        help="of matrix products (default: bf16 where the processor has it)")


def cast_once(model, autocast):
    """Casts the matrices of a frozen model once, where autocast would cast them at every call: a fifth faster."""
    with autocast():
        if torch.is_autocast_enabled(next(model.parameters()).device.type):
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.bfloat16()
    return model
