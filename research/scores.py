"""scores.py - how good is a set of samples: faithful, like held-out shapes, sound, diverse, new?

Exam's docstring explains every column; evaluate.py prints it. The metrics: geometry/metrics.py, research/metrics.py.
"""
import runpy
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.commands import UserError
from geometry.metrics import chamfer, chamfer_matrix
from geometry.shapes import CLASSES
from prompts import text_tower
from research import exam, memory, metrics
from research.results import mean

SOUNDNESS = "one piece", "watertight", "closed edges"         # what a representation may say of its surface


class Scorer:
    """Features of clouds and prompts. They come from the towers of a trained folder, or from a Python file that defines
    cloud(points, normals, colours) -> b e, of tensors b k 3, and for scores of prompts text(prompts) -> b e."""

    def __init__(self, source, device="cpu"):
        self.source, self.device = source, device
        if Path(source).suffix == ".py":
            functions = self.attempt(runpy.run_path, str(source))
            self.cloud, self.text = self.attempt(functions.__getitem__, "cloud"), functions.get("text")
            return
        towers = text_tower.load(source).to(device)
        k, scale = text_tower.POINTS, towers.width ** .5      # it is trained on k points; scaled to about unit variance
        self.cloud = lambda *cloud: towers.embed_cloud(*(x[:, :k] for x in cloud)) * scale
        self.text = lambda prompts: towers.embed_text(*towers.word_ids(prompts))

    def attempt(self, function, *args):
        try:
            return function(*args)
        except (Exception, SystemExit) as error:              # the file may do anything
            raise UserError(f"{self.source} gives no features ({type(error).__name__}: {error}); define "
                            "cloud(points, normals, colours) -> b e") from None

    @torch.no_grad()
    def features(self, function, batches):
        """Batches of arguments of self.cloud or self.text -> their features n e, checked."""
        features = []
        for batch in batches:
            x = self.attempt(lambda: function(*batch).float().cpu())              # b e
            if x.ndim != 2 or len(x) != len(batch[0]) or not (x.isfinite().all() and x.norm(dim=1).all()):
                raise UserError(f"features of {self.source} have the shape {tuple(x.shape)} for {len(batch[0])}, or "
                                "rows that are not finite, or all 0; return a tensor b e")
            features.append(x)
        return torch.cat(features).numpy()

    def clouds(self, *cloud):
        """points, normals, colours, n k 3 each -> n e."""
        cloud = [torch.as_tensor(x, dtype=torch.float).to(self.device) for x in cloud]
        return self.features(self.cloud, zip(*(x.split(exam.BATCH) for x in cloud)))

    def texts(self, prompts):                                 # -> n e
        return self.features(self.text, [(prompts[i:i + exam.BATCH],) for i in range(0, len(prompts), exam.BATCH)])


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
        clouds = self.test.cloud(range(len(self.test)), 2 * k, np.random.default_rng(args.seed))          # r 2k 3 each
        self.cloud, self.second = [x[:, :k] for x in clouds], clouds[0][:, k:]
        self.described = [x[:count] for x in self.cloud]
        self.others = [x[count:2 * count] for x in self.cloud]
        self.floors = np.array([chamfer(*pair) for pair in zip(self.cloud[0], self.second)])              # r
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

    def caption_scores(self, cloud):
        """Of a shape for each caption (points, normals, colours, r k 3 each). It resembles the shape described, so sets
        are compared with others."""
        points, normals, colours = (torch.as_tensor(x) for x in cloud)
        features = self.scorer.clouds(points, normals, colours)                   # r e
        near = [chamfer(*pair) for pair in zip(points, self.described[0])]
        return {**self.prompt_scores(points, normals, features), "Chamfer to described": np.mean(near),
                "Frechet": metrics.frechet(features, self.features),
                "kernel": metrics.kernel_distance(features, self.features),
                **metrics.mmd_cov_1nna(points, self.others[0])}

    def real(self):
        """The scores of the shapes described themselves."""
        count = len(self.captions)
        return {**self.caption_scores(self.described), "Chamfer to described": self.floors[:count].mean(),
                "memorisation": 1., "of copies": "", "diversity": 1.}

    def scores(self, model, cache, **options):
        """-> all metrics of a checkpoint, a row of metrics for each class name, the samples of the class names."""
        result_of = exam.shape_result(model, self.args.rep, self.args.resolution)
        train = memory.training_set_of(model.folder, self.args)
        captioned = exam.sample_all(model, self.captioned, cache, result_of, **options)
        named = exam.sample_all(model, self.named, cache, result_of, **options)
        cloud, rows = [captioned[key] for key in exam.CLOUD], self.class_rows(named)
        means = mean(rows)
        scores = {**self.caption_scores(cloud),
                  **memory.score_memorisation(train, self.args, model, cloud, self.described),
                  "right class": means["right class"], **{key: means[key] for key in SOUNDNESS if key in means},
                  "diversity": means["ratio"], "seconds": np.mean([*captioned["seconds"], *named["seconds"]])}
        return scores, rows, named

    def class_rows(self, named):
        """For each class name: are its samples of that class, sound and diverse?"""
        points, rows = torch.from_numpy(named["points"]), []                      # s k 3
        batches = tqdm(points.split(8), desc="Chamfer", unit="batch")
        distance = torch.cat([chamfer_matrix(batch, self.cloud[0]) for batch in batches])                 # s r
        for i, name in enumerate(self.names):
            own, same = slice(i * self.n, (i + 1) * self.n), self.classes == name
            real, floor = metrics.distances_to_others(self.cloud[0][same]), self.floors[same].mean()
            diversity, diversity_of_real = metrics.diversity(points[own]), real.mean().item()
            rows.append({"class": name, "right class": np.mean(self.classes[distance[own].argmin(1)] == name)}
                        | {key: named[key][own].mean() for key in SOUNDNESS if key in named}
                        | {"Chamfer to nearest": distance[own][:, same].amin(1).mean().item(),
                           "of held-out": real.amin(1).mean().item(), "diversity": diversity,
                           "diversity of held-out": diversity_of_real, "floor": floor,
                           "ratio": (diversity - floor) / (diversity_of_real - floor)})
        return rows
