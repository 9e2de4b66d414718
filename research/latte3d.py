"""latte3d.py - LATTE3D: are class and colour right, for combinations that training has seen, and for others?

    python evaluate.py latte3d                      # its shapes
    python evaluate.py prior                        # the pictures that it learns from
"""
import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

import encoders as encoders_
from data import seeded
from engine.commands import pick_device
from engine.files import load_stage
from engine.noise import keys_of
from geometry.crop import crop_to_object
from geometry.metrics import chamfer_matrix
from geometry.shapes import CLASSES
from geometry.surface import field_of
from geometry.training_samples import SURFACE
from geometry.words import COLOURS
from prompts import image_tower
from relatives import latte3d, prior
from research import exam
from research.attributes import SPECK, measure_shape
from research.crisp import TrueHead
from research.quality import save_sheet
from research.results import labels, mean, write_table, write_tables
from research.scores import SOUNDNESS, Scorer

SHADES = .6, .7, .8, .9, 1., 1.1    # of a colour, in splat.baked_light
SEEN, SECOND = .2, .03        # shares of a surface, or of a picture, that a shape's two colours always have


class FirstStage(latte3d.LATTE3D):
    """LATTE3D with the colours of its first stage."""
    LAST = "latte3d-geometry"

    def open(self):
        self.geometry = latte3d.load_geometry(self.folder).to(self.device)
        self.heads = {"sdf": self.geometry.field}

    def shape_tokens(self, condition, keys, **_):
        return self.geometry.grower(condition)


class Judge:
    """Is the class right, that of the nearest held-out shape? Are the main and the second colour seen?"""

    def __init__(self, args):
        self.args, self.test = args, exam.held_out(args)
        self.clouds = self.test.cloud(range(len(self.test)), exam.POINTS, seeded(args.seed))[0]   # r k 3

    def scores(self, model, cache, records, **options):
        """The means, and the results, of samples of the longest captions of shapes."""
        surface = exam.shape_result(model, "sdf", self.args.resolution)
        by_name = {f"{record['index']}": record for record in records}
        jobs = [exam.Job(name, max(record["captions"], key=len), None, (self.args.seed, i))
                for i, (name, record) in enumerate(by_name.items())]

        def result_of(tokens, job):
            record, found = by_name[job.name], surface(tokens, job)
            near = chamfer_matrix(torch.from_numpy(found["points"])[None], self.clouds).argmin()
            colours = self.colours(field_of(model.heads["sdf"], tokens, model.autocast), record["attributes"])
            return found | {"right class": self.test.classes[near] == record["class"]} | colours

        results = exam.sample_all(model, jobs, cache, result_of, **options)
        keys = "right class", "main colour", "second colour", *SOUNDNESS
        return {key: np.nanmean(results[key]) for key in keys if key in results}, results, jobs

    @staticmethod
    def colours(field, attributes):
        """Whether a shape shows its colours; nan if it has no second one."""
        o, paint = measure_shape(field)
        share = np.bincount(paint[paint >= 0], minlength=len(COLOURS)) / max(1, (paint >= 0).sum())
        share = dict(zip(COLOURS, share * (min(o.shape) >= SPECK)))               # specks show nothing
        second = attributes.get("second")
        return {"main colour": share[attributes["colour"]] > SEEN,
                "second colour": share[second] > SECOND if second in share else np.nan}


def evaluate_latte3d(args):
    """Measures the shapes of the longest captions of held-out shapes. Of combinations that training has not seen, one
    of each class, a picture: what the prior makes of them, the shapes of stage 1, with the texture, and refined."""
    judge, tables = Judge(args), {}
    for folder, label in labels(args.checkpoint).items():
        model, first = exam.open_model(args, folder), FirstStage(folder, args.device, args.precision)
        tables[label], columns = [], []
        seen, unseen = ([record for record in judge.test.records if latte3d.unseen(record) == held_out][:count]
                        for held_out, count in ((False, args.shapes), (True, args.unseen)))
        for name, records, model_, options in (
                ("seen together", seen, model, {}), ("not seen together", unseen, model, {}),
                ("the same, stage 1 alone", unseen, first, {}),
                (f"the same, refined for {args.refine} steps", unseen, model, {"refine": args.refine})):
            cache = exam.result_cache(args, label, folder, shapes=name, options=options)
            scores, results, jobs = judge.scores(model_, cache, records, **options)
            tables[label].append({"class and colour": name, "prompts": str(len(records)), **scores})
            shown = {record["class"]: i for i, record in reversed([*enumerate(records)])}.values()      # one a class
            columns.append([exam.picture_of(model_, args, results["tokens"][i], jobs[i]) for i in shown])
        _, texture, geometry, refined = columns
        texts = [jobs[i].text for i in shown]
        rows = zip(prior_pictures(args, folder, texts), geometry, texture, refined)
        titles = [title for text in texts for title in (text, "stage 1", "stage 2", "refined")]
        save_sheet(args, f"{args.command}-{label}", sum(rows, ()), 8, titles)
    fields = [field_of(TrueHead(judge.test.shape(row)), torch.zeros(1), torch.no_grad) for row in range(args.unseen)]
    true = [judge.colours(field, record["attributes"]) for field, record in zip(fields, judge.test.records)]
    print("the shapes themselves:", {key: f"{np.nanmean([one[key] for one in true]):.3f}" for key in true[0]})
    write_tables(args.out, args.command, tables, means=False)


@torch.no_grad()
def prior_pictures(args, folder, prompts):
    """What the prior makes of prompts, four sides in a square each."""
    device, autocast, _ = pick_device(args.device, args.precision)
    model = load_stage(folder, "latte3d-prior", prior.Prior).to(device)
    with autocast():
        condition = encoders_.load(folder, "latte3d-prior", device).encode(prompts)
        return prior.images(model.generate(condition, keys_of(range(len(prompts)), device)), rows=2, scale=3)


# ---------------------------------------------------------------------------- the prior

@torch.no_grad()
def evaluate_prior(args):
    """Of the pictures of the longest captions: what do the towers and the pixels say of class and colour?"""
    device, autocast, _ = pick_device(args.device, args.precision)
    test, table = exam.held_out(args, (SURFACE, prior.SIDES)), []
    rows = range(min(args.shapes, len(test)))
    scorer, tower = Scorer(args.scorer, args.device), image_tower.load(args.scorer).to(device)
    names, palette = scorer.texts(list(CLASSES)), np.array(list(COLOURS.values()))                 # m e, 12 3
    for folder, label in labels(args.checkpoint).items():
        model = load_stage(folder, "latte3d-prior", prior.Prior).to(device)
        encoders, captions = encoders_.load(folder, "latte3d-prior", device), exam.longest_captions(test, rows)
        found = []
        for chunk in tqdm(np.array_split(rows, -(-len(rows) // 16)), unit="batch"):
            with autocast():
                angles = prior.sides_of(test, chunk)["side_angles"].to(device)
                x = model.generate(encoders.encode([captions[row] for row in chunk]),
                                   keys_of([(args.seed, int(row)) for row in chunk], device), angles, cfg=args.cfg)
            found.append((x.clamp(-1, 1) + 1) / 2)
        table.append({"checkpoint": label, **judge_pictures(torch.cat(found).cpu(), test, rows, tower, names, palette)})
    true = prior.sides_of(test, rows)["sides"][..., :4]
    table.append({"checkpoint": "held-out shapes", **judge_pictures(true, test, rows, tower, names, palette)})
    write_table(args.out, args.command, table)


def judge_pictures(x, test, rows, tower, names, palette):
    """b v s s 4 in [0, 1] -> shares of shapes whose class (by the mean feature of four pictures) and main colour (it
    is the nearest of all, in some shade, to a fifth of the pixels) are right."""
    shades, results = np.multiply.outer(SHADES, palette), []                      # l 12 3
    for sides, row in zip(x, rows):
        own = [np.concatenate([side[..., :3] / side[..., 3:].clip(1e-3), side[..., 3:]], -1) for side in sides.numpy()]
        pictures = np.stack([crop_to_object(side) for side in own])               # v s s 4
        white = rearrange(torch.from_numpy(pictures[..., :3] + 1 - pictures[..., 3:]), "v h w i -> v i h w")
        feature = tower.embed(tower.tokens(white)[0]).cpu().numpy().mean(0)       # e
        inside = sides[sides[..., 3] > .9].numpy()                                # p 4
        colours = inside[:, None, None, :3] / inside[:, None, None, 3:]
        nearest = ((colours - shades) ** 2).sum(-1).min(1).argmin(1)              # p
        record = test.records[row]
        main = list(COLOURS).index(record["attributes"]["colour"])
        results.append({"right class": list(CLASSES)[(names @ feature).argmax()] == record["class"],
                        "right colour": len(nearest) and (nearest == main).mean() > SEEN})
    return mean(results)
