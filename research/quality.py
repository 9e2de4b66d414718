"""quality.py - how good are checkpoints? Reconstruction, samples of captions and names, retrieval, pictures.

    python evaluate.py tokenizer                 # and generate, retrieval, images, cross-view
"""
from itertools import combinations

import numpy as np
import torch
from einops import repeat

from data import seeded
from engine.commands import pick_device
from geometry import training_pictures, training_samples
from geometry.metrics import chamfer, chamfer_matrix, emd
from geometry.render import contact_sheet, render_mesh, save_png
from geometry.symmetry import SYMMETRIES, turns_to_front
from judge import caption_retrieval, picture_retrieval
from prompts import image_tower, text_tower
from representations import REPRESENTATIONS
from research import exam
from research.crisp import LIKENESS, crispness, likeness
from research.results import labels, mean, write_table, write_tables
from research.scores import Exam

CEILING = "(its reconstruction)"


def save_sheet(args, name, *sheet):
    """Pictures, how many a row, and their titles -> a contact sheet in --out."""
    save_png(f"{args.out}/{name}.png", contact_sheet(*sheet))
    print(f"{args.out}/{name}.png")


def draw_models(args):
    """The same prompts by the model of each checkpoint: a row each."""
    sheet = []
    for folder, label in labels(args.checkpoint).items():
        model = exam.open_model(args, folder)
        sheet += [(model.generate(text, seed=args.seed)[0].picture(200), f"{label}: {text}") for text in args.text]
    pictures, titles = zip(*sheet)
    save_sheet(args, args.command, [*pictures], len(args.text), [*titles])


def save_samples(args, model, name, jobs, tokens, columns):
    """A contact sheet of samples (tokens, of each n c as an array) and their prompts; -> the pictures."""
    pictures = [exam.picture_of(model, args, x, job, 200) for job, x in zip(jobs, tokens)]
    save_sheet(args, name, pictures, columns, [job.text for job in jobs])
    return pictures


def evaluate_tokenizer(args):
    """Encodes and decodes held-out shapes."""
    (device, autocast, _), tables = pick_device(args.device, args.precision), {}
    # opened before shapes are prepared: a wrong folder is an error now
    opened = {folder: exam.open_tokenizer(folder, args.rep, device) for folder in labels(args.checkpoint)}
    test = exam.held_out(args, [training_samples.SURFACE, *REPRESENTATIONS[args.rep].kinds])
    for folder, label in labels(args.checkpoint).items():
        encoder, decoders = opened[folder]

        @torch.no_grad()
        def judge(row, rng):
            tokens = exam.encode(test, row, encoder, device, autocast, rng)       # n c
            result = decoders[args.rep].judge(decoders, tokens, test, row, rng, autocast, points=100_000)
            if args.rep == "sdf":
                result |= crispness(decoders["sdf"], tokens, test.shape(row), rng, autocast)
            return result

        rows = range(min(args.shapes, len(test)))
        if test.source.files:                                 # kits come one after another, and most names are rare
            rows = test.spread(len(rows)).tolist()
        results = exam.each_shape(args, test, exam.result_cache(args, label, folder), judge, rows)
        save_reconstructions(args, label, test, encoder, decoders, autocast, device)
        classes = ["all"] * len(rows) if test.source.files else [test.classes[row] for row in rows]
        tables[label] = [{"class": name} | mean([x for x, other in zip(results, classes) if other == name])
                         for name in sorted({*classes})]
    print(" ".join(REPRESENTATIONS[args.rep].judge.__doc__.split()))
    write_tables(args.out, f"{args.command}-{args.rep}", tables)


def save_reconstructions(args, label, test, encoder, decoders, autocast, device, count=20):
    """A sheet of shapes, evenly spread over the set, each beside what is decoded of its tokens."""
    pictures = []
    for row in test.spread(min(count, args.shapes)):
        tokens = exam.encode(test, row, encoder, device, autocast, row)
        decoded = decoders[args.rep].decode(tokens, decoders, np.random.default_rng(0), autocast)
        pictures += [render_mesh(*training_samples.vertex_coloured(test.shape(row)), size=160), decoded.picture(160)]
    save_sheet(args, f"{args.command}-{args.rep}-{args.split}-{label}", pictures, 8)


def evaluate_generate(args):
    """Scores samples of captions and class names."""
    benchmark, rows, tables = Exam(args, args.n, args.shapes), [], {}
    options = {"registers": args.registers} if args.registers else {}
    for folder, label in labels(args.checkpoint).items():
        cache, model = exam.result_cache(args, label, folder, **options), exam.open_model(args, folder)
        scores, tables[label], named = benchmark.scores(model, cache, **options)
        rows.append({"checkpoint": label} | scores)
        chosen = [i * args.n + (4 * i + j) % args.n for i in range(len(benchmark.names)) for j in range(min(4, args.n))]
        jobs = [benchmark.named[row] for row in chosen]       # of each class four, of different seeds
        save_samples(args, model, f"{args.command}-{args.rep}-{label}", jobs, named["tokens"][chosen], 8)
    print(f"{len(benchmark.captions)} captions, {len(benchmark.names)} class names with {args.n} samples each.")
    print(" ".join(Exam.__doc__.split()))
    write_tables(args.out, f"{args.command}-{args.rep}-names", tables)
    real = {"checkpoint": "held-out shapes"} | benchmark.real()
    write_table(args.out, f"{args.command}-{args.rep}", [{key: real.get(key, "") for key in rows[0]}, *rows])


def evaluate_retrieval(args):
    """Finds the clouds of 200 held-out shapes by a full caption, by a picture of any side."""
    device, autocast, _ = pick_device(args.device, args.precision)
    test, tables = exam.held_out(args, (training_samples.SURFACE, training_samples.PICTURES)), {}
    for folder, label in labels(args.checkpoint).items():
        towers, vision = text_tower.load(folder).to(device), image_tower.load(folder).to(device)
        with autocast():
            recalls = {"caption": caption_retrieval(towers, test),
                       "picture": picture_retrieval(vision, towers, test)}
        tables[label] = [{"prompt": kind, "R@1": found["recall_at_1"], "R@5": found["recall_at_5"]}
                         for kind, found in recalls.items()]
    write_tables(args.out, args.command, tables, means=False)


# ---------------------------------------------------------------------------- pictures

def turned_back(points, position):
    """Clouds r k 3 of shapes turned as in pictures, and their positions r -> clouds oriented as in files."""
    return np.einsum("rji,rkj->rki", SYMMETRIES[position], points).astype(np.float32)


def evaluate_images(args):
    """Samples from a held-out shape's name, any of its captions, the longest one, a picture, the last two together; and
    its reconstruction."""
    test, tables = exam.held_out(args, (training_samples.SURFACE, training_samples.PICTURES)), {}
    references, classes = test.cloud(range(len(test)), exam.POINTS, seeded(args.seed))[0], np.array(test.classes)
    rows, rng = torch.arange(min(args.shapes, len(test))), seeded(args.seed)
    any_caption = [test.table.texts[i] for i in test.table.draw_captions(rows, rng)]
    longest = exam.longest_captions(test, rows)
    which = test.random_pictures(len(rows), rng)                                  # r, a picture of each shape
    pictures, as_shown = test.pictures(rows, rng, which), test.as_shown(rows, which)      # r 3 s s; r, turned as in it
    nothing = [None] * len(rows)
    prompts = {CEILING: (classes, nothing), "name": (classes, nothing), "any caption": (any_caption, nothing),
               "longest caption": (longest, nothing), "picture": (nothing, pictures),
               "picture and longest caption": (longest, pictures)}
    for folder, label in labels(args.checkpoint).items():
        cache, model = exam.result_cache(args, label, folder), exam.open_model(args, folder)
        tables[label] = []
        for prompt, (texts, images) in prompts.items():
            own = rows if images is nothing else as_shown
            result_of = exam.shape_result(model, args.rep, args.resolution, split=test,
                                          true=lambda job: own[[job.seed[1]]])
            jobs = [exam.Job(f"{prompt}-{row}", text, image, (args.seed, row))
                    for row, text, image in zip(rows.tolist(), texts, images)]
            source = exam.Encoding(args, model, test) if prompt == CEILING else model
            results = exam.sample_all(source, jobs, cache, result_of)
            points = results["points"] if images is nothing else turned_back(results["points"], test.position[as_shown])
            nearest = chamfer_matrix(points, references).argmin(1).numpy()        # r
            tables[label].append({"prompt": prompt, **{key: np.nanmean(results[key]) for key in LIKENESS},
                                  "right class": (classes[nearest] == classes[:len(rows)]).mean()})
            if prompt == "picture":                           # sixty of them, evenly spread, each beside its sample
                chosen = np.linspace(0, len(jobs) - 1, min(60, len(jobs))).astype(int)
                samples = [exam.picture_of(model, args, results["tokens"][i], jobs[i], 128) for i in chosen]
                shown = (pictures[chosen].clamp(0, 1) * 255).byte().numpy()
                shown = repeat(shown, "b c h w -> b (h i) (w j) c", i=2, j=2)     # twice SIZE = 128 pixels
                save_sheet(args, f"images-{args.rep}-{label}", sum(zip(shown, samples), ()), 12)
    print(f"{len(rows)} held-out shapes, one sample each:", " ".join(likeness.__doc__.split()))
    write_tables(args.out, f"{args.command}-{args.rep}", tables, means=False)


def evaluate_views(args):
    """Samples from eight views of a held-out shape: how far apart are they, without RGS and with its default?"""
    test, tables, position = exam.held_out(args), {}, 2 * turns_to_front(45 * torch.arange(8.))
    for folder, label in labels(args.checkpoint).items():
        cache, model = exam.result_cache(args, label, folder), exam.open_model(args, folder)
        tables[label], result_of = [], exam.shape_result(model, args.rep, args.resolution)
        for row in range(min(args.shapes, len(test))):
            name, shape = f"{test.classes[row]} {row}", test.shape(row)
            unlit = training_samples.draw_pictures(shape, [(45 * i, 20) for i in range(8)])
            views = training_pictures.relight(*map(torch.from_numpy, unlit.values()), vary=False)           # 8 3 s s
            distances = {"shape": name}
            for rule in ("none", "auto"):
                jobs = [exam.Job(f"{name}, {rule}-{i}", None, view, (args.seed, i)) for i, view in enumerate(views)]
                points = exam.sample_all(model, jobs, cache, result_of, rgs=rule)["points"]           # 8 k 3
                pairs = list(combinations(turned_back(points, position) if args.data else points, 2))
                distances[f"Chamfer, {rule}"] = np.mean([chamfer(*pair) for pair in pairs])
                distances[f"EMD, {rule}"] = np.mean([emd(*pair) for pair in pairs])
            pair = [shape.surface(exam.POINTS, np.random.default_rng(i))[0] for i in range(2)]
            tables[label].append(distances | {"Chamfer floor": chamfer(*pair), "EMD floor": emd(*pair)})
    print(f"mean of all pairs of eight, {exam.POINTS} points each; floor: of two samplings of the true surface")
    write_tables(args.out, f"{args.command}-{args.rep}", tables)
