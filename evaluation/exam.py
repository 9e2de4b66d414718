"""evaluation/exam.py - what a checkpoint makes of many prompts: sampled in batches, decoded, kept one by one, scored.

    python evaluate.py generate --rep sdf       # a command that needs them
"""
import importlib.util
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import tokenizer
from data import prepare
from engine.commands import UserError
from engine.files import digest, read_config
from evaluation.metrics import (
    chamfer,
    chamfer_matrix,
    diversity,
    frechet,
    kernel_distance,
    memorisation,
    mmd_cov_1nna,
    others,
    prompt_score,
    r_precision,
)
from evaluation.results import Kept, mean, weights
from geometry.prepare import BuiltIn, Files, begins
from geometry.shapes import CLASSES
from heads import with_needs
from prompts import text_tower

POINTS = 1024       # of a cloud under Chamfer distance
BATCH = 64          # prompts sampled at once
ROOT = Path(__file__).parent.parent
CODE = [ROOT / name for name in (                             # makes them
    "sample.py", "backbone.py", "prefix.py", "encoders.py", "reconstruct.py", "tokenizer.py", "heads.py", "bench.py", "prompts/text_tower.py",
    "prompts/image_tower.py", "geometry/surface.py", "geometry/meshes.py", "geometry/export.py", "geometry/render.py", "geometry/light.py",
    "engine/networks.py", "engine/commands.py", "evaluation/exam.py", "evaluation/peers.py")]



class Job(NamedTuple):
    """One sample to make; with the seed (s, i) it is what `sample.py --n ... --seed s` calls i."""
    name: str
    text: str | None
    picture: torch.Tensor | None          # 3 s s (prompts/picture_files.py)
    seed: tuple


def made(model, jobs, kept, look, **options):
    """What look(tokens n c, job) gives of each of some jobs of one kind, kept one by one: {key: values, a row a job}."""
    todo = [job for job in jobs if job.name not in kept]
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=jobs[0].name.split("-")[0], unit="sample") as bar:
        for some in (todo[i:i + BATCH] for i in range(0, len(todo), BATCH)):
            start, (_, texts, pictures, seeds) = time.time(), zip(*some)
            said, seen = None if texts[0] is None else list(texts), None if pictures[0] is None else torch.stack(pictures)
            tokens = model.tokens(said, list(seeds), seen, **options)
            seconds = (time.time() - start) / len(some)
            for job, each in zip(some, tokens):
                kept(job.name, lambda: {"seconds": seconds} | look(each, job))
                bar.update()
    each = [kept(job.name, None) for job in jobs]
    try:
        return {key: np.stack([one[key] for one in each]) for key in each[0]}
    except (KeyError, ValueError) as error:
        raise UserError(f"{kept.folder} holds a result that is unlike the others ({error}); delete it, and it is made again") from None


def shape(model, rep, resolution, points=POINTS):
    """The shape itself: its tokens, points on it, and what is sound of it."""
    def look(tokens, job):
        shape = model.decode(tokens, rep, job.seed, resolution)
        cloud = (np.float32(x) for x in shape.surface(points, np.random.default_rng(job.seed)))
        return {"tokens": tokens.cpu().numpy(), **dict(zip(("points", "normals", "colours"), cloud)), **shape.soundness()}
    return look


def parts(rep):
    """The stages that a sample of a representation comes from."""
    return "encoders", "backbone", "reconstruct", *(f"head-{name}" for name in with_needs([rep]))


def kept(args, label, folder, *stages, what=None, **settings):
    """Where the single results of a command (or of `what` several share) and a checkpoint are, if of these stages and settings, and of
    this code: who changes how something is sampled sees what that does."""
    rep = f"-{args.rep}" if "rep" in args else ""
    return Kept(f"{args.out}/{what or args.command}{rep}/{label}", seed=args.seed, weights=weights(folder, *stages), code=digest(*CODE), data=args.data,
                copies=args.copies, resolution=getattr(args, "resolution", None), **settings)


def clouds(made):
    return torch.from_numpy(made["points"])                   # n k 3


# ---------------------------------------------------------------------------- features

class Scorer:
    """What says how near a cloud is to a prompt: the text and cloud towers of a checkpoint folder, or a Python file with
    cloud(points, normals, colours) -> b e, of tensors b k 3, and, unless scores of prompts are not wanted, text(prompts) -> b e."""

    def __init__(self, source, device="cpu"):
        self.device = device
        if Path(source).suffix != ".py":
            self.weights = weights(source, "encoders")
            model = text_tower.load(source).to(device)
            # trained on so many points; times the root of their number, channels have about unit variance
            self.cloud = lambda *cloud: model.embed_cloud(*(x[:, :text_tower.POINTS] for x in cloud)) * model.width ** .5
            self.text = lambda prompts: model.embed_text(*model.tokenise(prompts))
            return
        try:
            spec = importlib.util.spec_from_file_location("scorer", source)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.weights, self.cloud, self.text = digest(source), module.cloud, getattr(module, "text", None)
        except (Exception, SystemExit) as error:              # it may do anything
            raise UserError(f"{source} gives no features ({type(error).__name__}: {error}); it has to define cloud(points, normals, colours)") from None

    @torch.no_grad()
    def features(self, what, some):
        """Batches of arguments of self.cloud or self.text -> n e; of a file, whatever it does wrong is one line."""
        made = []
        for part in some:
            try:
                each = getattr(self, what)(*part).float().cpu()
                fits = each.ndim == 2 and len(each) == len(part[0]) and each.isfinite().all() and each.norm(dim=1).all()
            except (Exception, SystemExit) as error:
                raise UserError(f"{what} of the scorer failed ({type(error).__name__}: {error}); it has to give a tensor b e") from None
            if not fits:
                raise UserError(f"{what} of the scorer gave a tensor of the shape {tuple(each.shape)} for {len(part[0])}: rows of "
                                "finite numbers that are not all 0 are wanted, one each")
            made.append(each)
        return torch.cat(made).numpy()

    def clouds(self, *cloud):
        """points, normals, colours, n k 3 each -> n e."""
        return self.features("cloud", zip(*(torch.as_tensor(x, dtype=torch.float).to(self.device).split(BATCH) for x in cloud)))

    def texts(self, prompts):                                 # -> n e
        return self.features("text", [(prompts[i:i + BATCH],) for i in range(0, len(prompts), BATCH)])


def learnt_from(folder, args):
    """The prepared shapes that a checkpoint learnt from, or None with a word why, if they are not at hand."""
    name = read_config(folder)["backbone"]["data"]
    if not name.startswith(begins(args.data)):
        raise UserError(f"the backbone in {folder} learnt from {name}; give the --data that it was trained on")
    source = Files("train", args.data, args.copies) if args.data else BuiltIn("train", int(name.split("-")[2]))     # shapes-train-COUNT-...
    if not (Path(args.cache) / source.name).is_dir():
        how = f"--data {args.data} --copies {args.copies}" if args.data else f"--shapes {source.count}"
        print(f"memorisation is left out: {source.name} is not in {args.cache}; make it with: python data.py {how}")
        return None
    if source.name != name:
        print(f"memorisation is by {source.name}, where {folder} learnt from {name}")
    return prepare("train", source.count, args.cache, data=args.data, copies=args.copies)


def copied(train, model, test, tokens):
    """`memorisation` of samples, in the space of their tokens (s n c), and what it would be of copies: training shapes, encoded anew."""
    if train is None:
        return {"memorisation": "", "of copies": ""}
    weights, encoder = Path(model.folder) / "tokenizer.safetensors", tokenizer.load(model.folder).to(model.device)
    known, held_out = (tokenizer.tokenise(encoder, split, model.device, model.autocast, weights) for split in (train, test))
    anew = [train.shape(row).surface(2048, np.random.default_rng(row)) for row in range(min(len(train), BATCH))]
    with torch.no_grad(), model.autocast():
        again = encoder(*(torch.from_numpy(np.float32(x)).to(model.device) for x in map(np.stack, zip(*anew)))).float().cpu()
    vectors = [x.flatten(1) for x in (held_out[:len(tokens)], known)]
    return {"memorisation": memorisation(torch.from_numpy(tokens).flatten(1), *vectors), "of copies": memorisation(again.flatten(1), *vectors)}


# ---------------------------------------------------------------------------- what generators are asked

class Exam:
    """Prompts for every generator alike, with what its shapes are measured by: held-out shapes, which it has not seen."""

    def __init__(self, args, n, shapes):
        self.args, self.n, self.scorer = args, n, Scorer(args.scorer, args.device or "cpu")
        self.test = prepare("test", out=args.cache, data=args.data, copies=args.copies)
        self.classes, count = np.array(self.test.classes), min(shapes, len(self.test) // 2)
        self.names = [name for name in (CLASSES if args.data is None else sorted(set(self.classes))) if (self.classes == name).sum() > 1]
        draw = self.test.cloud(range(len(self.test)), 2 * POINTS, np.random.default_rng(args.seed))
        self.cloud, self.again = ([x[:, some] for x in draw] for some in (slice(POINTS), slice(POINTS, None)))
        self.truth, self.rest = ([x[some] for x in self.cloud] for some in (slice(count), slice(count, 2 * count)))
        self.captions = [max(captions, key=len) for captions in self.test.captions[:count]]        # the fullest
        self.named = [Job(f"name-{name}-{i}", name, None, (args.seed, i)) for name in self.names for i in range(n)]
        self.captioned = [Job(f"caption-{row}", text, None, (args.seed, row)) for row, text in enumerate(self.captions)]
        if self.scorer.text:
            self.asked, self.true = self.scorer.texts(self.captions), np.array([[a == b for b in self.captions] for a in self.captions])
        self.features = self.scorer.clouds(*self.rest)
        if self.scorer.text and self.asked.shape[1] != self.features.shape[1]:
            raise UserError(f"{args.scorer} has {self.asked.shape[1]} features of a prompt and {self.features.shape[1]} of a cloud")

    def told(self, points, normals, features):
        """How well a shape for each caption obeys it; and in the colours of the shape described, so that its form alone counts."""
        if not self.scorer.text:
            return {}
        nearest = [torch.cdist(one, true).argmin(1) for one, true in zip(points, self.truth[0])]
        colours = torch.stack([true[some] for true, some in zip(self.truth[2], nearest)])
        form = self.scorer.clouds(points, normals, colours)
        return {"prompt score": prompt_score(self.asked, features), "of form": prompt_score(self.asked, form),
                "R-precision": r_precision(self.asked, features, self.true)}

    def like(self, points, features):
        """How much a set is like held-out shapes, not those described: of these, each of its samples has a twin."""
        return {"Frechet": frechet(features, self.features), "kernel": kernel_distance(features, self.features),
                **mmd_cov_1nna(torch.as_tensor(points), self.rest[0])}

    def real(self):
        """What the shapes described score themselves."""
        near, features = np.mean([chamfer(*pair) for pair in zip(self.truth[0], self.again[0])]), self.scorer.clouds(*self.truth)
        return {**self.told(*self.truth[:2], features), "Chamfer to described": near, **self.like(self.truth[0], features),
                "memorisation": 1., "of copies": "", "diversity": 1.}

    def scores(self, model, kept, **options):
        """A checkpoint's -> a dict of all metrics, another of every class name, and its shapes from those names."""
        args, look = self.args, shape(model.ready(self.args.rep), self.args.rep, self.args.resolution)
        print(f"{model.folder}, running on {model.reason}")
        train = learnt_from(model.folder, args)
        told, named = (made(model, jobs, kept, look, **options) for jobs in (self.captioned, self.named))
        cloud = [torch.from_numpy(told[key]) for key in ("points", "normals", "colours")]
        features = self.scorer.clouds(*cloud)
        near, by_class = [chamfer(*pair) for pair in zip(told["points"], self.truth[0])], []
        distance = torch.cat([chamfer_matrix(part, self.cloud[0]) for part in tqdm(clouds(named).split(8), desc="Chamfer", unit="batch")])
        sound = [key for key in ("one piece", "watertight", "closed edges") if key in named]
        for i, name in enumerate(self.names):
            own, same = slice(i * self.n, (i + 1) * self.n), self.classes == name
            ours, real = diversity(clouds(named)[own]), others(self.cloud[0][same])
            by_class.append({"class": name, "right class": np.mean(self.classes[distance[own].argmin(1)] == name)}
                            | {key: named[key][own].mean() for key in sound}
                            | {"Chamfer to nearest": distance[own][:, same].amin(1).mean().item(), "of held-out": real.amin(1).mean().item(),
                               "diversity": ours, "diversity of held-out": real.mean().item(), "ratio": ours / real.mean().item()})
        means = mean(by_class)
        return {**self.told(*cloud[:2], features), "Chamfer to described": np.mean(near), **self.like(told["points"], features),
                **copied(train, model, self.test, told["tokens"]), "right class": means["right class"],
                **{key: means[key] for key in sound}, "diversity": means["ratio"],
                "seconds": np.mean([*told["seconds"], *named["seconds"]])}, by_class, named
