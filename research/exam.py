"""exam.py - many prompts, one checkpoint: sampled in batches, decoded, and stored one by one."""
import time
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import heads
import tokenizer
from data import kinds_of, prepare
from engine.commands import UserError, pick_device
from engine.files import read_config
from engine.stage import RELATIVES
from geometry.metrics import soundness
from geometry.real import Files
from research import peers  # adds its classes to those that a folder may hold
from research.closure import closure, code_digest
from research.results import ResultCache, weights
from sample import load, model_in

POINTS = 1024       # of a cloud under Chamfer distance
BATCH = 64          # prompts sampled at once
CLOUD = "points", "normals", "colours"


# ---------------------------------------------------------------------------- models and data

def open_model(args, folder):
    """The model in a trained folder, or a variant of it (research/peers.py)."""
    model = load(folder, args.device, args.precision)
    print(f"{folder}, running on {model.reason}")
    return model


def held_out(args, kinds=("surface",)):
    split = getattr(args, "split", "test")
    if args.data and split == "validation":
        raise UserError("files have no validation split; leave --split out")
    return prepare(split, out=args.cache, kinds=kinds, data=args.data)


def clouds_and_classes(split, seed):
    """A cloud of every shape, r k 3, and its class."""
    return split.cloud(range(len(split)), POINTS, np.random.default_rng(seed))[0], np.array(split.classes)


def longest_captions(split, rows):
    return [max(split.captions[row], key=len) for row in rows]


def result_cache(args, label, folder, *modules, what=None, **settings):
    """The cache of a checkpoint and a command, or of `what` several commands share. It belongs to the weights, to these
    settings and to the code: that of sample.py, of the model, and of the research modules that measure."""
    rep = f"-{args.rep}" if "rep" in args else ""
    models = closure("sample", *(f"relatives.{name}" for name in RELATIVES))
    code = code_digest(*models, "judge", "research.exam", peers.__name__, *modules)
    settings |= dict(seed=args.seed, weights=weights(folder), code=code)
    settings["sampling"] = read_config(folder).get("backbone", {}).get("sampling")
    settings["data"] = Files("test", args.data).name if args.data else None
    settings |= dict(resolution=getattr(args, "resolution", None), split=getattr(args, "split", ""))
    return ResultCache(f"{args.out}/{what or args.command}{rep}/{label}", **settings)


# ---------------------------------------------------------------------------- samples

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
    try:
        return {key: np.stack([result[key] for result in results]) for key in results[0]}
    except (KeyError, ValueError) as error:
        raise UserError(f"{cache.folder} holds results of different forms ({error}); delete the folder") from None


def shape_result(model, rep, resolution, points=POINTS):
    """What `sample_all` stores of a shape: its tokens, a cloud of its surface, whether the surface is sound."""
    model.load_heads(rep)                                     # a missing head is an error now

    def result_of(tokens, job):
        shape = model.decode(tokens, rep, job.seed, resolution)
        cloud = [np.float32(x) for x in shape.surface(points, np.random.default_rng(job.seed))]     # k 3 each
        return {"tokens": tokens.cpu().numpy()} | dict(zip(CLOUD, cloud)) | soundness(shape)
    return result_of


def picture_of(model, args, tokens, job, size=192):
    """The picture of a sample: its tokens n c as an array, decoded."""
    return model.decode(torch.from_numpy(tokens), args.rep, job.seed, args.resolution).picture(size)


def last_stage(folder):
    """The stage of a folder that generates."""
    return "backbone" if (name := model_in(folder)) == "ltm3d" else f"{name}-generator"


def open_tokenizer(folder, rep, device):
    """-> what turns clouds of `points` points into tokens, {rep: what decodes them}; of any model."""
    if (name := model_in(folder)) == "ltm3d":
        return tokenizer.load(folder).to(device), heads.load(folder, [rep], device)
    model = import_module(f"relatives.{name}")
    if rep not in model.REPS:
        raise UserError(f"{name}, the model in {folder}, generates {', '.join(model.REPS)}, not {rep}")
    return model.open_tokenizer(folder, [rep], device)


@torch.no_grad()
def judge_reconstructions(args, folder, cache, judge):
    """Encode held-out shapes -> a row for each: its class and what judge(heads, tokens n c, set, row, ...) measures."""
    device, autocast, reason = pick_device(args.device, args.precision)
    print(f"{folder}, running on {reason}")
    encoder, decoders = open_tokenizer(folder, args.rep, device)
    test = held_out(args, list(dict.fromkeys(["surface", *kinds_of([heads.HEADS[args.rep]])])))
    results = []
    for row in tqdm(range(min(args.shapes, len(test))), unit="shape"):       # classes take turns: balanced
        if str(row) not in cache:
            rng = np.random.default_rng((args.seed, row))
            cloud = [x.to(device) for x in test.cloud([row], encoder.points, rng)]          # 1 k 3 each
            with autocast():
                tokens = encoder(*cloud)[0].float()                               # n c
            cache.write(str(row), judge(decoders, tokens, test, row, rng, autocast))
        results.append({"class": test.classes[row]} | {key: float(x) for key, x in cache.read(str(row)).items()})
    return results
