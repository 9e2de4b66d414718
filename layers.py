"""layers.py - the ground floor: attention, blocks, embeddings, device choice, EMA, checkpoints.

Everything the stages share and nothing they do not. Letters used in every file:
b batch, n shape tokens, c channels of a shape token, p prefix tokens, t condition tokens,
d model width, h heads, k points or queries.

    python layers.py        # which device and precision this machine would use, and why
"""
import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

# ---------------------------------------------------------------------------- attention

# attention weights of far points are so small that a CPU computes them eight times slower; here they are 0
torch.set_flush_denormal(True)
GAMMAS = (0., 4., 16., 32.)  # distance bias per head, cycled: one head global, the others ever more local


def split_bf16(x):
    """x = hi + lo with both parts exact in bf16 (to 16 bits): what a bf16 matmul would round away stays."""
    hi = x.to(torch.bfloat16).to(x.dtype)
    return hi, x - hi


def distance_features(at, heads, side):
    """Features whose dot product is -gamma_h |q - k|^2: the bias becomes 13 more dimensions of query and key.

    -gamma |q - k|^2 = gamma (2 q.k - |k|^2 - |q|^2), so ordinary attention applies and no (b h q k) mask
    is ever made. |q|^2 is the same for all keys and softmax ignores it: it keeps the scores small in bf16.
    """
    hi, lo = split_bf16(at)                                                  # b k 3
    square = torch.cat(split_bf16((at ** 2).sum(-1, keepdim=True)), -1)      # b k 2
    ones = torch.ones_like(square)
    if side == "key":
        return repeat(torch.cat([hi, hi, lo, square, ones], -1), "b k f -> b h k f", h=heads)
    gamma = torch.tensor(GAMMAS, device=at.device).repeat(math.ceil(heads / len(GAMMAS)))[:heads]
    features = torch.cat([2 * hi, 2 * lo, 2 * hi, -ones, -square], -1)       # b q 13
    return rearrange(gamma, "h -> h 1 1") * rearrange(features, "b q f -> b 1 q f")


class Attention(nn.Module):
    """Multi-head attention onto `context` (self-attention if None), optionally biased by distance."""

    def __init__(self, dim, heads, context_dim=None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} attention heads do not divide {dim} dimensions")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context=None, mask=None, at=None):
        """x: b q d; context: b k e; mask: b k or b q k, True = may be looked at; at: (b q 3, b k 3) positions."""
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(y, "b k (h e) -> b h k e", h=self.heads).contiguous() for y in (q, k, v))
        width = q.shape[-1]
        q = q * width ** -0.5
        if at is not None:
            q = torch.cat([q, distance_features(at[0], self.heads, "query").to(q.dtype)], -1)
            k = torch.cat([k, distance_features(at[1], self.heads, "key").to(k.dtype)], -1)
        mask = None if mask is None else rearrange(mask, "b k -> b 1 1 k" if mask.ndim == 2 else "b q k -> b 1 q k")
        if q.is_cuda:
            v = F.pad(v, (0, q.shape[-1] - width))      # flash attention wants one width for all three
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.)[..., :width]
        else:                                           # unfused is twice as fast for short sequences on a CPU
            scores = q @ k.mT                                                # b h q k
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            out = scores.softmax(-1).to(v.dtype) @ v    # the softmax itself adds up in fp32
        return self.to_out(rearrange(out, "b h k e -> b k (h e)"))


class Block(nn.Module):
    """Pre-norm transformer block: attention (self, or onto a context), then feed-forward."""

    def __init__(self, dim, heads, context_dim=None, expand=4):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, context_dim)
        self.feed = nn.Sequential(nn.Linear(dim, expand * dim), nn.GELU(), nn.Linear(expand * dim, dim))

    def forward(self, x, context=None, mask=None, at=None, asked=None):
        """asked: b m, the rows of x that are wanted (default: all); the others are but looked at."""
        y = self.norm1(x)
        if asked is not None:
            context, asked = y if context is None else context, repeat(asked, "b m -> b m d", d=x.shape[-1])
            x, y = x.gather(1, asked), y.gather(1, asked)
        x = x + self.attention(y, context, mask, at)
        return x + self.feed(self.norm2(x))


# ---------------------------------------------------------------------------- embeddings

def fourier(x, bands):
    """x: ... 3 -> ... 3 + 6 bands: the position and its sines and cosines, a wavelength of 4 downwards."""
    angle = rearrange(x, "... i -> ... i 1") * (math.pi / 2 * 2 ** torch.arange(bands, device=x.device))
    return torch.cat([x, rearrange(torch.cat([angle.sin(), angle.cos()], -1), "... i f -> ... (i f)")], -1)


def time_embedding(t, dim):
    """t in [0, 1]: b -> b dim: sines and cosines of 1000 t, wavelengths from 2 pi to 20,000 pi."""
    rate = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = 1000 * rearrange(t, "b -> b 1") * rate
    return torch.cat([angle.cos(), angle.sin()], -1)


def grid_points(side, device=None):
    """Centres of a side^3 grid of cells over [-1, 1]^3, x slowest: side^3 3."""
    axis = (torch.arange(side, device=device) + .5) * 2 / side - 1
    return rearrange(torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1), "x y z i -> (x y z) i")


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


# ---------------------------------------------------------------------------- averaging

class EMA:
    """Exponential moving average of the weights; the decay warms up so that short runs work too."""

    def __init__(self, model, decay=.999):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        for ours, theirs in zip(self.model.state_dict().values(), model.state_dict().values()):
            ours.lerp_(theirs, 1 - decay) if ours.is_floating_point() else ours.copy_(theirs)


# ---------------------------------------------------------------------------- mistakes and files

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
        alone = os.environ.get("RANK", "0") == "0"            # of many processes (many.py), which all have these flags, one says it
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


def claim(folder):
    """Make the folder that results will go to; rather an error now than after minutes of work."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; name a folder that can be made") from None
    return Path(folder)


@contextlib.contextmanager
def written(path):
    """Yields a temporary name beside `path`; renamed onto it on success, removed on any failure."""
    path = Path(path)
    if not path.name:
        raise UserError(f"cannot write to '{path}', it is a folder; name a file")
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True) if path.parent.is_dir() else None


def save_weights(path, state, half=False):
    """A state dict to safetensors; half: floating-point weights as fp16 (what is shipped)."""
    state = {k: (v.half() if half and v.is_floating_point() else v).detach().cpu().contiguous() for k, v in state.items()}
    with written(path) as part:
        try:
            save_file(state, part)
            part.chmod(0o644)             # safetensors makes files that only their owner can read
        except SafetensorError as error:  # how a full disk shows up here
            raise OSError(str(error)) from None


def read_weights(path, cure="copy or train it again"):
    """A safetensors file -> dict of tensors; one clear line when it is not one."""
    if not Path(path).is_file():
        raise UserError(f"no file {path}; is --checkpoint a folder that train.py made, and is this stage trained?")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}); {cure}") from None


def load_weights(model, path):
    """Fill `model` from `path`, checking every name and shape; says what differs."""
    there, here = read_weights(path), model.state_dict()
    wrong = [f"missing {k}" for k in here.keys() - there.keys()] + [f"unknown {k}" for k in there.keys() - here.keys()]
    wrong += [f"{k} is {tuple(there[k].shape)}, not {tuple(here[k].shape)}" for k in here.keys() & there.keys()
              if there[k].shape != here[k].shape]
    if wrong:
        raise UserError(f"{path} does not fit this model: {'; '.join(sorted(wrong)[:3])}"
                         + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    if not all(x.isfinite().all() for x in there.values()):
        raise UserError(f"{path} holds numbers that are not finite: it is damaged; copy or train it again")
    model.load_state_dict(there)
    return model


def load_model(kind, path, **settings):
    """Build `kind` from the settings of its config.json, fill it from `path` and freeze it."""
    try:
        model = kind(**settings)
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"the settings beside {path} make no {kind.__name__} ({str(error).splitlines()[0]}); "
                        "was config.json edited? restore it or train again") from None
    return load_weights(model, path).eval().requires_grad_(False)


class Entry(dict):
    """What config.json says of a stage."""

    def __missing__(self, key):
        raise UserError(f"a stage in config.json has no '{key}'; was the file edited? restore it or train again")


def read_config(folder):
    """The config.json of a checkpoint folder: {stage: {settings, metrics ...}}; {} if there is none."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
        return {stage: Entry(entry) for stage, entry in config.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not readable JSON of the form {{stage: {{...}}}} ({error})") from None


def write_config(folder, stage, **entries):
    """Merge one stage's entries into config.json."""
    config = read_config(folder)
    config[stage] = {**config.get(stage, {}), **entries}
    with written(Path(folder) / "config.json") as part:
        part.write_text(json.dumps(config, indent=1) + "\n")


def digest(*paths):
    """Twelve letters that name what is in a file, or in several."""
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()[:12]


def read_stage(folder, stage):
    """A trained stage's entry of config.json; checks that what it was trained on is what lies beside it."""
    entry = read_config(folder).get(stage)
    if entry is None:
        raise UserError(f"{folder} holds no trained {stage}; make it with: python train.py --stage {stage} --out {folder}")
    for name, made_with in dict(entry.get("made_with", {})).items():
        path = Path(folder) / f"{name}.safetensors"
        if path.is_file() and digest(path) != made_with:
            raise UserError(f"the {stage} in {folder} was trained with another {name}; remove '{stage}' from its "
                             f"config.json and run: python train.py --stage {stage} --out {folder}")
    return entry


if __name__ == "__main__":
    print(f"nanoLTM3D would run on {pick_device()[2]}, torch {torch.__version__}, {torch.get_num_threads()} threads")
