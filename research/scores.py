"""scores.py - how good is a set of samples: faithful, like held-out shapes, sound, diverse, new?

Exam's docstring explains every column; evaluate.py prints it. The metrics: geometry/metrics.py, research/metrics.py.
"""
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import tokenizer
from data import prepare, seeded
from engine.commands import UserError
from engine.files import read_stage, signatures, trained_stages
from geometry.metrics import chamfer, chamfer_matrix
from geometry.prepare import name_begins
from geometry.shapes import CLASSES
from geometry.surface import field_of
from prompts import text_tower
from research import exam, metrics
from research.attributes import complete, measure_shape
from research.results import mean

SOUNDNESS = "one piece", "watertight", "closed edges", "complete"     # what a representation may say of its surface


class Scorer:
    """Features of clouds and of prompts, by the towers of a trained folder."""

    def __init__(self, folder, device):
        self.towers = text_tower.load(folder).to(device or "cpu")

    @torch.no_grad()
    def clouds(self, *cloud):
        """points, normals, colours, n k 3 each -> n e, scaled to about unit variance."""
        cloud = [torch.as_tensor(x[:, :text_tower.POINTS], dtype=torch.float, device=self.towers.scale.device)
                 for x in cloud]
        batches = zip(*(x.split(exam.BATCH) for x in cloud))
        return torch.cat([self.towers.embed_cloud(*batch) for batch in batches]).cpu().numpy() * self.towers.width ** .5

    @torch.no_grad()
    def texts(self, prompts):                                 # -> n e
        return self.towers.embed_text(*self.towers.word_ids(prompts)).cpu().numpy()


def training_set_of(folder, args):
    """The prepared shapes that a checkpoint was trained on; None and a remark, if they are not in --cache."""
    version = read_stage(folder, exam.last_stage(folder))["data"]                 # NAME-DIGEST, or NAME-DIGEST-all
    name = version.removesuffix("-all").rpartition("-")[0]
    if not name.startswith(name_begins(args.data) if args.data else "shapes-train-"):
        raise UserError(f"the generator in {folder} learnt from {name}; give the --data that it was trained on")
    if not (Path(args.cache) / name).is_dir():
        print(f"memorisation is left out: {name} is not in {args.cache}; data.py prepares it")
        return None
    if args.data:
        return prepare("all" if version.endswith("-all") else "train", None, args.cache, data=args.data)
    _, _, count, *classes = name.split("-")                   # shapes-train-COUNT-CLASSES
    return prepare("train", int(count), args.cache, classes=classes or None)


class Memory:
    """The tokens of training shapes, by the tokenizer of a folder: the distance of two surfaces is that of tokens."""

    def __init__(self, folder, device, autocast, train):
        self.encoder, self.device, self.autocast = tokenizer.load(folder).to(device), device, autocast
        known = tokenizer.encode_set(self.encoder, train, device, autocast, signatures(folder)["tokenizer"])
        self.known = known[:len(train)].flatten(1)            # t (n c): of the shapes as they are in their files

    @torch.no_grad()
    def vectors(self, cloud):
        """points, normals, colours, s k 3 each -> s (n c)."""
        with self.autocast():
            chunks = zip(*(torch.as_tensor(x).split(exam.BATCH) for x in cloud))
            tokens = [self.encoder(*(x.to(self.device) for x in chunk)).float().cpu() for chunk in chunks]
        return torch.cat(tokens).flatten(1)


def score_memorisation(train, args, model, samples, new):
    """`memorisation` of samples, by held-out shapes `new`; and of copies: training shapes, with other points. A set of
    s shapes is points, normals, colours: s k 3 each."""
    if train is None:
        return {"memorisation": "", "of copies": ""}
    own = "tokenizer" in trained_stages(model.folder)
    memory = Memory(model.folder if own else args.scorer, model.device, model.autocast, train)
    rows, points = range(min(len(train), exam.BATCH)), len(samples[0][0])
    copies = [train.shape(row).surface(points, np.random.default_rng(row)) for row in rows]
    copies = [np.float32(x) for x in map(np.stack, zip(*copies))]                 # b k 3 each
    samples, copies, new = map(memory.vectors, (samples, copies, new))            # s (n c) each
    return {"memorisation": metrics.memorisation(samples, new, memory.known),
            "of copies": metrics.memorisation(copies, new, memory.known)}


class Exam:
    """The same prompts for every generator. prompt score: cosine of the features of a caption and of its sample. of
    form: the same in the colours of the shape described. R-precision: share of samples whose nearest caption is their
    own. Chamfer: distance to the shape described. Frechet, kernel, MMD, COV, 1-NNA: distances to as many other
    held-out shapes. memorisation: distance to training shapes, in tokens, over that of held-out shapes; of copies: what
    copies would have. right class: share of samples whose nearest held-out shape has that class. one piece: share with
    99 % of the surface in one component. complete: share with all legs, arms, wheels ... of its class.
    diversity: mean Chamfer distance of pairs of a class, over that of held-out shapes, both less the distance of two
    samplings of one shape. seconds: of a sample in a batch of up to 64."""

    def __init__(self, args, n, shapes):
        self.args, self.n, self.scorer = args, n, Scorer(args.scorer, args.device)
        self.test = exam.held_out(args)
        self.classes = np.array(self.test.classes)
        names = CLASSES if args.data is None else sorted(set(self.classes))
        self.names = [name for name in names if (self.classes == name).sum() > 1]
        count = min(shapes, len(self.test) // 2)
        if count < 2 or not self.names:
            raise UserError(f"{len(self.test)} shapes are held out; it takes four, two of them of one class")
        self.captions = exam.longest_captions(self.test, range(count))
        self.named = [exam.Job(f"name-{x}-{i}", x, None, (args.seed, i)) for x in self.names for i in range(n)]
        self.captioned = [exam.Job(f"caption-{row}", x, None, (args.seed, row)) for row, x in enumerate(self.captions)]

        # two clouds of each held-out shape; captions describe the first `count` shapes, sets are compared with the next
        k = exam.POINTS
        clouds = self.test.cloud(range(len(self.test)), 2 * k, seeded(args.seed))          # r 2k 3 each
        self.cloud, second = [x[:, :k] for x in clouds], clouds[0][:, k:]
        self.described = [x[:count] for x in self.cloud]
        self.others = [x[count:2 * count] for x in self.cloud]
        self.floors = np.array([chamfer(*pair) for pair in zip(self.cloud[0], second)])                   # r
        self.features, self.prompt_features = self.scorer.clouds(*self.others), self.scorer.texts(self.captions)  # r e
        self.same_caption = np.array([[a == b for b in self.captions] for a in self.captions])            # r r

    def caption_scores(self, cloud):
        """Of a shape for each caption (points, normals, colours, r k 3 each). It resembles the shape described, so sets
        are compared with others."""
        points, normals, colours = (torch.as_tensor(x) for x in cloud)
        features = self.scorer.clouds(points, normals, colours)                   # r e
        nearest = [torch.cdist(x, true).argmin(1) for x, true in zip(points, self.described[0])]
        colours = torch.stack([true[rows] for true, rows in zip(self.described[2], nearest)])             # r k 3
        form = self.scorer.clouds(points, normals, colours)                       # r e
        near = [chamfer(*pair) for pair in zip(points, self.described[0])]
        return {"prompt score": metrics.prompt_score(self.prompt_features, features),
                "of form": metrics.prompt_score(self.prompt_features, form),
                "R-precision": metrics.r_precision(self.prompt_features, features, self.same_caption),
                "Chamfer to described": np.mean(near), "Frechet": metrics.frechet(features, self.features),
                "kernel": metrics.kernel_distance(features, self.features),
                **metrics.mmd_cov_1nna(points, self.others[0])}

    def real(self):
        """The scores of the shapes described themselves."""
        return {**self.caption_scores(self.described), "Chamfer to described": self.floors[:len(self.captions)].mean(),
                "memorisation": 1., "of copies": "", "diversity": 1.}

    def scores(self, model, cache, **options):
        """-> all metrics of a checkpoint, a row of metrics for each class name, the samples of the class names."""
        result_of = exam.shape_result(model, self.args.rep, self.args.resolution)
        train = training_set_of(model.folder, self.args)
        captioned = exam.sample_all(model, self.captioned, cache, result_of, **options)

        def with_parts(tokens, job):                          # a class name promises parts
            found = measure_shape(field_of(model.heads["sdf"], tokens, model.autocast))[0]
            return result_of(tokens, job) | {"complete": complete(found, job.text)}

        of_names = with_parts if self.args.rep == "sdf" and self.args.data is None else result_of
        named = exam.sample_all(model, self.named, cache, of_names, **options)
        cloud, rows = [captioned[key] for key in exam.CLOUD], self.class_rows(named)
        scores = {**self.caption_scores(cloud),
                  **score_memorisation(train, self.args, model, cloud, self.described), **mean(rows),
                  "seconds": np.mean([*captioned["seconds"], *named["seconds"]])}
        return scores, rows, named

    def class_rows(self, named):
        """For each class name: are its samples of that class, sound and diverse?"""
        points, rows = torch.from_numpy(named["points"]), []                      # s k 3
        batches = tqdm(points.split(8), desc="Chamfer", unit="batch")
        nearest = torch.cat([chamfer_matrix(batch, self.cloud[0]).argmin(1) for batch in batches])        # s
        for i, name in enumerate(self.names):
            own, same = slice(i * self.n, (i + 1) * self.n), self.classes == name
            floor, real = self.floors[same].mean(), metrics.diversity(self.cloud[0][same])
            rows.append({"class": name, "right class": np.mean(self.classes[nearest[own]] == name),
                         **{key: named[key][own].mean() for key in SOUNDNESS if key in named},
                         "diversity": (metrics.diversity(points[own]) - floor) / (real - floor)})
        return rows
