"""files.py - atomic writes, and checkpoints: weights, and config.json beside them."""
import contextlib
import hashlib
import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.commands import UserError


def make_folder(folder):
    """Creates the folder of results, before minutes of work: then an error costs nothing."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; name a folder that can be made") from None
    return Path(folder)


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary name beside `path`. That file becomes `path` on success and is removed on any failure."""
    path = Path(path)
    if not path.name:
        raise UserError(f"cannot write to '{path}', it is a folder; name a file")
    part = path.with_name(f".{path.stem}.{os.urandom(4).hex()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; name another file") from None
    finally:
        with contextlib.suppress(OSError):                    # the error above has the reason
            part.unlink(missing_ok=True)


def save_weights(path, state, half=False, int8=()):
    """A state dict to safetensors; half: floating-point weights as fp16, as in shipped checkpoints; int8: names of
    matrices that are saved as int8, with one scale a row."""
    scales = {f"{k}:scale": (state[k].abs().amax(1, keepdim=True) / 127).clamp(min=1e-30) for k in int8}  # r 1
    rounded = {k: (state[k] / scales[f"{k}:scale"]).round().char() for k in int8}                         # r c
    state = {k: v.half() if half and v.is_floating_point() else v for k, v in state.items()} | rounded | scales
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    if not all(v.isfinite().all() for v in state.values()):
        raise UserError(f"the weights for {path} are not finite numbers, nothing is written; give a lower --lr")
    with atomic_write(path) as part:
        try:
            save_file(state, part)
            part.chmod(0o644)             # safetensors' default: only the owner can read
        except SafetensorError as error:  # a full disk, too
            raise OSError(str(error)) from None


def read_weights(path, remedy="copy or train it again"):
    """A safetensors file -> dict of tensors; int8 matrices as floats."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; train {Path(path).stem} first, or name another folder")
    try:
        saved = load_file(path)
        return {k: v * saved.get(f"{k}:scale", 1.) if v.dtype == torch.int8 else v for k, v in saved.items()
                if not k.endswith(":scale")}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}); {remedy}") from None


def check_shapes(own, saved, path):
    """Raises an error unless the tensors of the file `path` have the names and shapes of the model."""
    wrong = [f"missing {k}" for k in own.keys() - saved.keys()] + [f"unknown {k}" for k in saved.keys() - own.keys()]
    wrong += [f"{k} is {tuple(saved[k].shape)}, not {tuple(own[k].shape)}" for k in own.keys() & saved.keys()
              if saved[k].shape != own[k].shape]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path} does not fit this model: {'; '.join(sorted(wrong)[:3])}{more}")


def is_small(settings):
    """Does a network with these settings fit into any memory?"""
    sizes = {name: x for name, x in settings.items() if type(x) is int}
    widest, blocks = max(sizes.values(), default=0), sum(sizes.get(name, 0) for name in LARGEST)
    return widest ** 2 * (1 + blocks) <= 2 ** 27 and widest * sizes.get("side", 0) ** 3 <= 2 ** 27


def load_model(model_class, path, **settings):
    """A model of this class, with the settings of its config.json and the weights of `path`, frozen."""
    saved = read_weights(path)
    try:
        if not is_small(settings):                            # meta tensors need no memory, but a second to import
            with torch.device("meta"):
                check_shapes(model_class(**settings).state_dict(), saved, path)
        model = model_class(**settings)
        check_shapes(model.state_dict(), saved, path)
        if not all(x.isfinite().all() for x in saved.values()):
            raise UserError(f"{path} holds numbers that are not finite: it is damaged; copy or train it again")
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, AttributeError) as error:
        raise UserError(f"the settings beside {path} make no {model_class.__name__} ({str(error).splitlines()[0]}); "
                        "was config.json edited? restore it or train again") from None
    model.load_state_dict(saved)
    return model.eval().requires_grad_(False)


LARGEST = {"side": 64, "depth": 1000, "encoder": 1000, "decoder": 1000, "head_depth": 1000}     # other sizes: 65,536


def is_sizes(value):
    """{name: a valid size of a network}"""
    return type(value) is dict and all(
        type(x) is int and 0 < x <= LARGEST.get(name, 65_536) for name, x in value.items())


def is_settings(value):
    """Arguments of a network: sizes, words, and sizes by kind of prompt."""
    return type(value) is dict and all(type(x) is str or is_sizes({name: x}) or name == "widths" and is_sizes(x)
                                       for name, x in value.items())


def is_sampling(value):
    """Options of sampling by name: a rule of RGS, whole numbers of steps, and other numbers."""
    kinds = {"rgs": (str,), "steps": (int,), "denoise_steps": (int,)}
    return type(value) is dict and all(type(x) in kinds.get(name, (int, float)) and (type(x) is str or 0 <= x <= 10_000)
                                       for name, x in value.items())


def is_words(value):
    return type(value) is list and all(type(x) is str for x in value)


FORMS = {  # a field of config.json: its form, in words and as a test
    **dict.fromkeys(("data", "signature"), ("a word", lambda x: type(x) is str)),
    **dict.fromkeys(("vocabulary", "heads"), ("a list of words", is_words)),
    "steps": ("a whole number", lambda x: type(x) is int),
    "seconds": ("a number", lambda x: type(x) in (int, float) and math.isfinite(x)),
    "settings": ("sizes of a network by name", is_settings),
    "sampling": ("options of sampling by name", is_sampling),
    **dict.fromkeys(("nouns", "made_with"), ("words by name", lambda x: type(x) is dict and is_words([*x.values()]))),
    "flags": ("words by name", lambda x: type(x) is dict and is_words([y for y in x.values() if y is not None]))}


class Entry(dict):
    """The entry of a stage in config.json."""

    def __missing__(self, key):
        raise UserError(f"a stage in config.json has no '{key}'; was the file edited? restore it or train again")


def read_config(folder):
    """The config.json of a checkpoint folder: {stage: {settings, metrics ...}}; {} if there is none."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
        config = {stage: Entry(entry) for stage, entry in config.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON of the form {{stage: {{...}}}} ({error})") from None
    for stage, entry in config.items():
        for field in entry.keys() & FORMS.keys():
            form, fits = FORMS[field]
            if not fits(entry[field]):
                raise UserError(f"{path}: '{field}' of {stage} is {str(entry[field])[:60]}, where {form} should stand; "
                                "was the file edited? restore it or train again")
    return config


def write_config(folder, stage, **entries):
    """Writes entries of one stage into config.json."""
    config = read_config(folder)
    config[stage] = {**config.get(stage, {}), **entries}
    with atomic_write(Path(folder) / "config.json") as part:
        part.write_text(json.dumps(config, indent=0) + "\n")      # most lines are words: no indentation


def digest(*paths):
    """The digest of the content of files, twelve hex digits."""
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()[:12]


# ---------------------------------------------------------------------------- trained stages

SIGNED = "flags", "settings", "heads", "vocabulary", "nouns", "made_with"         # fields of config.json


def signature(folder, stage, entry):
    """A hash of what a stage was made with (flags, settings, the signatures of the stages before it) and of its
    weights."""
    fields = {name: entry[name] for name in SIGNED if name in entry}
    weights = (Path(folder) / f"{stage}.safetensors").read_bytes()
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode() + weights).hexdigest()[:12]


def signatures(folder):
    """{stage: signature} of the stages in a checkpoint folder."""
    return {stage: entry["signature"] for stage, entry in read_config(folder).items()}


def first_difference(before, now):
    """What a stage was made with and what this command would make it with, {flag: value} -> "with --size tiny, not with
    --size small", of the first flag that differs; None: they are the same."""
    for flag, value in before.items():
        if now.get(flag) != value:
            words = [f"no --{flag}" if x is None else f"--{flag} {x}" for x in (value, now.get(flag))]
            return f"with {words[0]}, not with {words[1]}"


def read_stage(folder, stage):
    """The entry of a trained stage in config.json. Its weights, and the stages beside it, must be those of its
    signature."""
    entry = read_config(folder).get(stage)
    if entry is None and (Path(folder) / f"{stage}.state.safetensors").is_file():
        raise UserError(f"the {stage} in {folder} is half trained; repeat the train.py command that began it")
    if entry is None:
        raise UserError(f"{folder} holds no trained {stage}; name another folder, or train it there: "
                        f"python train.py --stage {stage.replace('head-', 'head --rep ')} --out {folder}")
    path, again = Path(folder) / f"{stage}.safetensors", f"python train.py --stage {stage} --out {folder}"
    if path.is_file() and entry["signature"] != signature(folder, stage, entry):
        raise UserError(f"{path} is damaged, or its entry in {folder}/config.json was edited; restore them, or remove "
                        f"'{stage}' from config.json and run: {again}")
    present = signatures(folder)
    for name, before in entry["made_with"].items():
        if present.get(name, before) != before:
            raise UserError(f"the {stage} in {folder} was trained with another {name}; restore that, or remove "
                            f"'{stage}' from config.json and run: {again}")
    return entry


def load_stage(folder, stage, kind, variants={}):
    """The model of a trained stage, frozen: of class `kind` or, if the stage is a variant, its class in `variants`."""
    entry = read_stage(folder, stage)
    name = entry["flags"].get("variant")
    if name not in (None, *variants):
        raise UserError(f"the {stage} in {folder} is a variant, {name}; evaluate.py loads those, other commands do not")
    return load_model(variants.get(name, kind), f"{folder}/{stage}.safetensors", **entry["settings"])


def joint_heads(config):
    """{head: the stage that it was trained with}; such a head may have no entry of its own."""
    return {f"head-{rep}": stage for stage, entry in config.items() for rep in entry.get("heads", ())}


def trained_stages(folder):
    """The stages in a checkpoint folder, joint heads included."""
    config = read_config(folder)
    return list(dict.fromkeys([*config, *joint_heads(config)]))
