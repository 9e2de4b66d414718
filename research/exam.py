"""exam.py - what a checkpoint makes of many prompts: sampled in batches, decoded, stored one by one, scored."""
import importlib.util
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import heads
from data import kinds_of, prepare
from engine.commands import UserError, pick_device
from engine.files import digest, read_config
from evaluation import metrics, peers
from evaluation.memory import score_memorisation, training_set_of
from evaluation.metrics import chamfer, chamfer_matrix
from evaluation.results import ResultCache, mean, weights
from geometry.real import Files
from geometry.shapes import CLASSES
from models import model_in
from prompts import text_tower
from sample import Sampler

POINTS = 1024       # of a cloud under Chamfer distance
BATCH = 64          # prompts sampled at once
CLOUD = "points", "normals", "colours"
SOUNDNESS = "one piece", "watertight", "closed edges"         # what a representation may say of its surface
SHARES = "R-precision", "COV", "1-NNA", "right class", *SOUNDNESS     # columns that end at 1
ROOT = Path(__file__).parent.parent
CODE = [ROOT / name for name in (                             # the files that decide what a result is
    "sample.py", "models.py", "ltm3d.py", "vat.py", "lost.py", "backbone.py", "prefix.py", "encoders.py",
    "reconstruct.py", "tokenizer.py", "heads.py", "bench.py", "prompts/reading.py", "prompts/text_tower.py",
    "prompts/image_tower.py", "prompts/relations.py",
    "geometry/surface.py", "geometry/meshes.py", "geometry/export.py", "geometry/render.py", "geometry/light.py",
    "geometry/solids.py", "geometry/shapes.py", "geometry/captions.py", "geometry/camera.py",
    "geometry/training_samples.py", "geometry/training_pictures.py", "engine/networks.py", "engine/commands.py",
    "evaluation/exam.py", "evaluation/peers.py", "evaluation/judges.py", "evaluation/metrics.py",
    "evaluation/attributes.py", "evaluation/words.py", "evaluation/low_poly.py", "evaluation/memory.py",
    "evaluation/vat_parts.py", "evaluation/scales.py", "engine/codes.py", "evaluation/registers.py")]


# ---------------------------------------------------------------------------- models and data

def open_model(args, folder):
    """A trained folder, whichever model is in it, or variant of one."""
    model = Sampler(folder, args.device, args.precision, models=peers.MODELS)
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


def head_stages(reps):
    """The heads that decide a result. The sdf head helps with points, and makes meshes where there is no mesh head."""
    return [f"head-{rep}" for rep in heads.with_needs([*reps, *["sdf"] * bool({"mesh", "pc"} & {*reps})])]


def tokenizer_stages(reps):
    """The stages that reconstruct a shape, of any model: a folder has those of one."""
    return "tokenizer", "vat-codes", "vat-decoder", "lost-registers", *head_stages(reps)


def stages_of(rep):
    """The stages that make a sample of a representation, of any model."""
    own = "backbone", "reconstruct", "vat-generator", "vat-codes", "vat-decoder", "lost-generator", "lost-registers"
    return "encoders", *own, *head_stages([rep])


def result_cache(args, label, folder, *stages, what=None, **settings):
    """The cache of a checkpoint and a command, or of `what` several commands share. It belongs to the weights of these
    stages, to these settings and to CODE: results of older code are refused."""
    rep = f"-{args.rep}" if "rep" in args else ""
    settings |= dict(seed=args.seed, weights=weights(folder, *stages), code=digest(*CODE))
    settings["sampling"] = read_config(folder).get("backbone", {}).get("sampling")
    settings["data"] = Files("test", args.data).name if args.data else None
    settings |= dict(resolution=getattr(args, "resolution", None), split=getattr(args, "split", ""))
    return ResultCache(f"{args.out}/{what or args.command}{rep}/{label}", **settings)


# ---------------------------------------------------------------------------- samples

class Job(NamedTuple):
    """One sample to make. With the seed (s, i) it is sample i of `sample.py --n ... --seed s`."""
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
        raise UserError(f"{cache.folder} holds a result that is unlike the others ({error}); delete it all") from None


def given(**options):
    """The options of sampling that are not None: the others are what the weights remember."""
    return {name: value for name, value in options.items() if value is not None}


def shape_result(model, rep, resolution, points=POINTS):
    """What `sample_all` stores of a shape: its tokens, a cloud of its surface, how sound the surface is."""
    model.load_heads(rep)                                     # if there is no such head, the error comes now

    def result_of(tokens, job):
        shape = model.decode(tokens, rep, job.seed, resolution)
        cloud = [np.float32(x) for x in shape.surface(points, np.random.default_rng(job.seed))]     # k 3 each
        return {"tokens": tokens.cpu().numpy()} | dict(zip(CLOUD, cloud)) | shape.soundness()
    return result_of


@torch.no_grad()
def judge_reconstructions(args, folder, reps, cache, judge, kinds=()):
    """Encode held-out shapes -> a row for each: its class and what judge(heads, tokens n c, set, row, ...) measures, by
    samples of these kinds and those that the heads learn from."""
    device, autocast, reason = pick_device(args.device, args.precision)
    print(f"{folder}, running on {reason}")
    model = peers.MODELS[model_in(folder)]
    if other := {*reps} - {*model.REPS}:
        raise UserError(f"the model in {folder} makes {', '.join(model.REPS)}, not {', '.join(sorted(other))}")
    encoder, decoders = model.open_tokenizer(folder, reps, device)
    test = held_out(args, list(dict.fromkeys(["surface", *kinds, *kinds_of(heads.HEADS[rep] for rep in reps)])))
    results = []
    for row in tqdm(range(min(args.shapes, len(test))), unit="shape"):       # classes take turns: balanced
        name = f"{'-'.join(reps)}-{row}"
        if name not in cache:
            rng = np.random.default_rng((args.seed, row))
            cloud = [x.to(device) for x in test.cloud([row], encoder.points, rng)]          # 1 k 3 each
            with autocast():
                tokens = encoder(*cloud)[0].float()                               # n c
            cache.write(name, judge(decoders, tokens, test, row, rng, autocast))
        results.append({"class": test.classes[row]} | {key: float(x) for key, x in cache.read(name).items()})
    return results


# ---------------------------------------------------------------------------- features

class Scorer:
    """Features of clouds and prompts. They come from the towers of a trained folder, or from a Python file that defines
    cloud(points, normals, colours) -> b e, of tensors b k 3, and for scores of prompts text(prompts) -> b e."""

    def __init__(self, source, device="cpu"):
        self.device = device
        if Path(source).suffix != ".py":
            towers = text_tower.load(source).to(device)
            k, scale = text_tower.POINTS, towers.width ** .5  # it is trained on k points; scaled to about unit variance
            self.cloud = lambda *cloud: towers.embed_cloud(*(x[:, :k] for x in cloud)) * scale
            self.text = lambda prompts: towers.embed_text(*towers.word_ids(prompts))
            return
        try:
            spec = importlib.util.spec_from_file_location("scorer", source)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.cloud, self.text = module.cloud, getattr(module, "text", None)
        except (Exception, SystemExit) as error:              # the file may do anything
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"{source} gives no features ({why}); define cloud(points, normals, colours)") from None

    @torch.no_grad()
    def features(self, name, batches):
        """Batches of arguments of self.cloud or self.text (the name) -> their features n e, checked."""
        features = []
        for batch in batches:
            try:
                x = getattr(self, name)(*batch).float().cpu()                     # b e
                if x.ndim != 2 or len(x) != len(batch[0]) or not (x.isfinite().all() and x.norm(dim=1).all()):
                    raise ValueError(f"the shape {tuple(x.shape)} for {len(batch[0])}, or rows not finite, or all 0")
            except (Exception, SystemExit) as error:          # the file may do anything
                why = f"{type(error).__name__}: {error}"
                raise UserError(f"{name} of the scorer failed ({why}); it has to give a tensor b e") from None
            features.append(x)
        return torch.cat(features).numpy()

    def clouds(self, *cloud):
        """points, normals, colours, n k 3 each -> n e."""
        cloud = [torch.as_tensor(x, dtype=torch.float).to(self.device) for x in cloud]
        return self.features("cloud", zip(*(x.split(BATCH) for x in cloud)))

    def texts(self, prompts):                                 # -> n e
        return self.features("text", [(prompts[i:i + BATCH],) for i in range(0, len(prompts), BATCH)])


# ---------------------------------------------------------------------------- the exam

class Exam:
    """The same prompts for every generator. prompt score: cosine of the features of a caption and of its sample. of
    form: the same in the colours of the shape described. R-precision: share of samples whose nearest caption is their
    own. Chamfer: distance to the shape described. Frechet, kernel, MMD, COV, 1-NNA: distances to as many other
    held-out shapes. memorisation: distance to training shapes, in tokens, over that of held-out shapes; of copies: what
    copies would have. right class: share of samples whose nearest held-out shape has that class. one piece: share with
    99 % of the surface in one component. diversity: mean Chamfer distance of pairs of a class, over that of held-out
    shapes, both less the distance of two samplings of one shape. seconds: of a sample in a batch of up to 64."""

    def __init__(self, args, n, shapes):
        self.args, self.n, self.scorer = args, n, Scorer(args.scorer, args.device or "cpu")
        self.test = held_out(args)
        self.classes = np.array(self.test.classes)
        names = CLASSES if args.data is None else sorted(set(self.classes))
        self.names = [name for name in names if (self.classes == name).sum() > 1]
        count = min(shapes, len(self.test) // 2)
        if count < 2 or not self.names:
            raise UserError(f"{len(self.test)} shapes are held out; it takes four, two of them of one class")
        self.captions = longest_captions(self.test, range(count))
        self.named = [Job(f"name-{name}-{i}", name, None, (args.seed, i)) for name in self.names for i in range(n)]
        self.captioned = [Job(f"caption-{row}", text, None, (args.seed, row)) for row, text in enumerate(self.captions)]

        # two clouds of each held-out shape; captions describe the first `count` shapes, sets are compared with the next
        clouds = self.test.cloud(range(len(self.test)), 2 * POINTS, np.random.default_rng(args.seed))     # r k 3 each
        self.cloud, self.second_cloud = ([x[:, half] for x in clouds] for half in (slice(POINTS), slice(POINTS, None)))
        self.described = [x[:count] for x in self.cloud]
        self.others = [x[count:2 * count] for x in self.cloud]
        self.features = self.scorer.clouds(*self.others)                          # r e
        if self.scorer.text:
            self.prompt_features = self.scorer.texts(self.captions)               # r e
            self.same_caption = np.array([[a == b for b in self.captions] for a in self.captions])        # r r
            widths = self.prompt_features.shape[1], self.features.shape[1]
            if widths[0] != widths[1]:
                raise UserError(f"{args.scorer} has {widths[0]} features of a prompt and {widths[1]} of a cloud")

    def prompt_scores(self, points, normals, features):
        """How well a shape for each caption fits it; "of form": in the colours of the shape described."""
        if not self.scorer.text:
            return {}
        nearest = [torch.cdist(cloud, true).argmin(1) for cloud, true in zip(points, self.described[0])]
        colours = torch.stack([true[rows] for true, rows in zip(self.described[2], nearest)])             # r k 3
        form = self.scorer.clouds(points, normals, colours)                       # r e
        return {"prompt score": metrics.prompt_score(self.prompt_features, features),
                "of form": metrics.prompt_score(self.prompt_features, form),
                "R-precision": metrics.r_precision(self.prompt_features, features, self.same_caption)}

    def set_scores(self, points, features):
        """How much a set is like held-out shapes: not those described, since each sample resembles one of them."""
        return {"Frechet": metrics.frechet(features, self.features),
                "kernel": metrics.kernel_distance(features, self.features),
                **metrics.mmd_cov_1nna(torch.as_tensor(points), self.others[0])}

    def real(self):
        """The scores of the shapes described themselves."""
        features = self.scorer.clouds(*self.described)
        floor = np.mean([chamfer(*pair) for pair in zip(self.described[0], self.second_cloud[0])])
        return {**self.prompt_scores(*self.described[:2], features), "Chamfer to described": floor,
                **self.set_scores(self.described[0], features), "memorisation": 1., "of copies": "", "diversity": 1.}

    def fidelity(self, captioned):
        """How near are samples to their captions and described shapes? -> scores, features r e."""
        cloud = [torch.from_numpy(captioned[key]) for key in CLOUD]               # r k 3 each
        features = self.scorer.clouds(*cloud)                                     # r e
        near = [chamfer(*pair) for pair in zip(captioned["points"], self.described[0])]
        return {**self.prompt_scores(*cloud[:2], features), "Chamfer to described": np.mean(near)}, features

    def scores(self, model, cache, **options):
        """-> all metrics of a checkpoint, a row of metrics for each class name, the samples of the class names."""
        result_of = shape_result(model, self.args.rep, self.args.resolution)
        train = training_set_of(model.folder, self.args)
        captioned = sample_all(model, self.captioned, cache, result_of, **options)
        named = sample_all(model, self.named, cache, result_of, **options)
        fidelity, features = self.fidelity(captioned)
        rows = self.class_rows(named)
        means = mean(rows)
        scores = {**fidelity, **self.set_scores(captioned["points"], features),
                  **score_memorisation(train, self.args, model, [captioned[key] for key in CLOUD], self.described),
                  "right class": means["right class"], **{key: means[key] for key in SOUNDNESS if key in means},
                  "diversity": means["ratio"], "seconds": np.mean([*captioned["seconds"], *named["seconds"]])}
        return scores, rows, named

    def picture_scores(self, model, cache, **options):
        """Samples from a picture of each shape described, of a random side: how near to it are they?"""
        rows, test = range(len(self.captions)), held_out(self.args, ("surface", "pictures"))
        pictures = test.pictures(np.array(rows), np.random.default_rng(self.args.seed))           # r 3 s s
        jobs = [Job(f"picture-{row}", None, pictures[row], (self.args.seed, row)) for row in rows]
        shown = sample_all(model, jobs, cache, shape_result(model, self.args.rep, self.args.resolution), **options)
        return {"Chamfer to shown": np.mean([chamfer(*pair) for pair in zip(shown["points"], self.described[0])])}

    def class_rows(self, named):
        """For each class name: are its samples of that class, sound and diverse?"""
        points, rows = torch.from_numpy(named["points"]), []                      # s k 3
        batches = tqdm(points.split(8), desc="Chamfer", unit="batch")
        distance = torch.cat([chamfer_matrix(batch, self.cloud[0]) for batch in batches])                 # s r
        for i, name in enumerate(self.names):
            own, same = slice(i * self.n, (i + 1) * self.n), self.classes == name
            real = metrics.distances_to_others(self.cloud[0][same])
            diversity, diversity_of_real = metrics.diversity(points[own]), real.mean().item()
            floor = np.mean([chamfer(*pair) for pair in zip(self.cloud[0][same], self.second_cloud[0][same])])
            rows.append({"class": name, "right class": np.mean(self.classes[distance[own].argmin(1)] == name)}
                        | {key: named[key][own].mean() for key in SOUNDNESS if key in named}
                        | {"Chamfer to nearest": distance[own][:, same].amin(1).mean().item(),
                           "of held-out": real.amin(1).mean().item(), "diversity": diversity,
                           "diversity of held-out": diversity_of_real, "floor": floor,
                           "ratio": (diversity - floor) / (diversity_of_real - floor)})
        return rows
