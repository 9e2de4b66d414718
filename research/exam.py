"""exam.py - many prompts, one checkpoint: sampled in batches, decoded, and stored one by one."""
import functools
import time
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import heads
import tokenizer
from data import prepare, seeded
from engine.commands import UserError
from engine.files import digest, read_config, read_stage
from engine.stage import RELATIVES
from geometry.real import Files
from geometry.training_samples import SURFACE
from research import peers  # noqa: F401 - adds its classes to those that a folder may hold
from research.crisp import likeness
from research.results import ResultCache
from sample import load, model_in

POINTS = 1024       # of a cloud under Chamfer distance
BATCH = 64          # prompts sampled at once
CLOUD = "points", "normals", "colours"


# ---------------------------------------------------------------------------- models and data

def open_model(args, folder):
    """The model in a trained folder, or a variant of it (research/peers.py)."""
    model = load(folder, args.device, args.precision)
    print(f"{folder}, running on {model.reason}")
    if read_stage(folder, last_stage(folder))["data"].endswith("-all"):
        print(f"{folder} has learnt from the held-out shapes, too: its figures are those of training shapes")
    return model


def open_tokenizer(folder, rep, device):
    """-> what turns clouds of `points` points into tokens, {rep: what decodes them}; of any model."""
    if (name := model_in(folder)) == "ltm3d":
        return tokenizer.load(folder).to(device), heads.load(folder, [rep], device)
    model = import_module(f"relatives.{name}")
    if rep not in model.REPS:
        raise UserError(f"{name}, the model in {folder}, generates {', '.join(model.REPS)}, not {rep}")
    return model.open_tokenizer(folder, [rep], device)


def last_stage(folder):
    """The stage of a folder that generates."""
    return RELATIVES.get(model_in(folder), "backbone")


def weights(folder):
    """{stage: digest of its weights} of a checkpoint folder."""
    files = [path for path in sorted(Path(folder).glob("*.safetensors")) if not path.stem.endswith(".state")]
    return {path.stem: digest(path) for path in files}


def held_out(args, kinds=(SURFACE,)):
    return prepare(getattr(args, "split", "test"), out=args.cache, kinds=kinds, data=args.data)


@torch.no_grad()
def encode(split, row, encoder, device, autocast, seed):
    """The tokens of a shape of a prepared set: n c."""
    cloud = split.cloud([row], encoder.points, seeded(seed))                      # 1 k 3 each
    with autocast():
        return encoder(*(x.to(device) for x in cloud))[0].float()


def longest_captions(split, rows):
    return [max(split.captions[row], key=len) for row in rows]


# ---------------------------------------------------------------------------- results

@functools.cache
def code_digest():
    """The digest of the repository's Python files, tests aside."""
    root = Path(__file__).parent.parent
    files = [path for pattern in ("*.py", "*/*.py") for path in sorted(root.glob(pattern))]
    own = [digest(path) for path in files if not path.name.startswith(("test_", "conftest"))]
    return sha256(" ".join(own).encode()).hexdigest()[:12]


def result_cache(args, label, folder, what=None, **settings):
    """The cache of a checkpoint and a command, or of `what` several commands share. Its key: the weights, these
    settings, and the code."""
    settings |= {key: getattr(args, key, None) for key in ("rep", "seed", "resolution", "split", "faces")}
    settings |= dict(weights=weights(folder), sampling=read_config(folder).get("backbone", {}).get("sampling"),
                     data=Files("test", args.data).name if args.data else None,
                     code=code_digest())
    return ResultCache(f"{args.out}/{what or args.command}/{label}", **settings)


def each_shape(args, test, cache, judge, rows=None):
    """judge(row, rng), or what is cached of it, of `rows`, by default of the first --shapes shapes. Classes take turns:
    they are balanced."""
    rows = range(min(args.shapes, len(test))) if rows is None else rows
    for row in tqdm(rows, unit="shape"):
        if str(row) not in cache:
            cache.write(str(row), judge(row, np.random.default_rng((args.seed, row))))
    return [cache.read(str(row)) for row in rows]


class Job(NamedTuple):
    """A sample to generate. With the seed (s, i) it is sample i of `sample.py --n ... --seed s`."""
    name: str
    text: str | None
    picture: torch.Tensor | None          # 3 s s (prompts/picture_files.py)
    seed: tuple


def sample_all(model, jobs, cache, result_of, **options):
    """Jobs with the same kinds of prompt -> {key: array, a row for each job}, of what result_of(tokens n c, job) gives.
    What is in the cache is not sampled again."""
    todo = [job for job in jobs if job.name not in cache]
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=jobs[0].name.split("-")[0], unit="sample") as bar:
        for batch in (todo[i:i + BATCH] for i in range(0, len(todo), BATCH)):
            texts = None if batch[0].text is None else [job.text for job in batch]
            pictures = None if batch[0].picture is None else torch.stack([job.picture for job in batch])  # b 3 s s
            start = time.time()
            tokens = model.tokens(texts, [job.seed for job in batch], pictures, **options).cpu()          # b n c
            seconds = (time.time() - start) / len(batch)
            for job, x in zip(batch, tokens):
                cache.write(job.name, {"seconds": seconds} | result_of(x, job))
                bar.update()
    results = [cache.read(job.name) for job in jobs]
    return {key: np.stack([result[key] for result in results]) for key in results[0]}


class Encoding:
    """Stands in for a model in `sample_all`: of a job with the seed (s, row), the tokens of this shape, the ceiling of
    samples."""

    def __init__(self, args, model, split):
        self.model, self.split = model, split
        self.encoder = open_tokenizer(model.folder, args.rep, model.device)[0]

    def tokens(self, texts, seeds, pictures):                 # -> b n c
        return torch.stack([encode(self.split, seed[1], self.encoder, self.model.device, self.model.autocast, seed)
                            for seed in seeds])


def shape_result(model, rep, resolution, points=None, faces=None, split=None, true=None):
    """What `sample_all` stores of a shape: its tokens, a cloud of its surface (by default POINTS), whether the surface
    is sound; and its `likeness` to the true shape, the nearest of the rows true(job) of a prepared set."""
    model.load_heads(rep)                                     # a missing head is an error now

    def result_of(tokens, job):
        shape = model.decode(tokens, rep, job.seed, resolution, faces=faces)
        cloud = [np.float32(x) for x in shape.surface(points or POINTS, np.random.default_rng(job.seed))]     # k 3 each
        found = {"tokens": tokens.cpu().numpy()} | dict(zip(CLOUD, cloud)) | shape.soundness()
        return found | (likeness(shape, split, true(job), np.random.default_rng(job.seed)) if split else {})
    return result_of


def picture_of(model, args, tokens, job, size=192):
    """The picture of a sample: its tokens n c as an array, decoded."""
    return model.decode(torch.from_numpy(tokens), args.rep, job.seed, args.resolution, faces=args.faces).picture(size)
