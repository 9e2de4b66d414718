"""names.py - a model of files: do samples match the names that it learnt, and are they new or copies?

    python evaluate.py names --data path/to/meshes --checkpoint runs/meshes
    python evaluate.py names --data path/to/meshes --checkpoint runs/meshes --words barrel sword      # a sheet of these
"""
import numpy as np
import torch

from data import prepare, seeded
from geometry.render import render_mesh
from geometry.training_samples import vertex_coloured
from research import exam, metrics
from research.crisp import LIKENESS, likeness
from research.quality import save_samples, save_sheet
from research.results import labels, write_table
from research.scores import SOUNDNESS, Memory, Scorer, training_set_of


def show_words(args):
    """A sheet with four samples of each of --words; sample i is that of `sample.py --n 4`."""
    for folder, label in labels(args.checkpoint).items():
        model = exam.open_model(args, folder)
        for word in args.words:
            print(word, *model.encoders.remarks(word), sep=": ")
        jobs = [exam.Job("", word, None, (args.seed, i)) for word in args.words for i in range(4)]
        tokens = model.tokens([job.text for job in jobs], [job.seed for job in jobs]).cpu().numpy()       # b n c
        save_samples(args, model, f"words-{args.rep}-{label}", jobs, tokens, 8)


@torch.no_grad()
def evaluate_names(args):
    """Samples 200 names of training shapes. Is a sample's name the nearest of all? Is it a copy? How near is it to the
    nearest training shape of that name?"""
    if args.words:
        return show_words(args)
    train, test = (prepare(split, None, args.cache, data=args.data) for split in ("train", "test"))
    names = np.unique(train.classes)
    classes = np.tile(train.classes, train.drawable() // len(train))              # and mirror images
    names, rows = names[np.linspace(0, len(names) - 1, min(200, len(names))).astype(int)].tolist(), []
    jobs = [exam.Job(f"name-{name}", name, None, (args.seed, i)) for i, name in enumerate(names)]
    new = test.cloud(range(len(test)), exam.POINTS, seeded(args.seed))                     # h k 3 each
    meant = lambda job: np.flatnonzero(classes == job.text)
    for folder, label in labels(args.checkpoint).items():
        training_set_of(folder, args)                         # an error, if it learnt from other files
        cache, model = exam.result_cache(args, label, folder), exam.open_model(args, folder)
        scorer, memory = Scorer(folder, args.device), Memory(folder, model.device, model.autocast, train)
        result_of = exam.shape_result(model, args.rep, args.resolution, faces=args.faces, split=train, true=meant)
        sampled = exam.sample_all(model, jobs, cache, result_of)
        own = [exam.Job(f"shape-{name}", name, None, (args.seed, row)) for name, row in zip(names, sampled["row"])]
        decoded = exam.sample_all(exam.Encoding(args, model, train), own, cache, result_of)
        for title, results in ((f"{label}, reconstructions", decoded), (label, sampled)):
            cloud = [results[key] for key in exam.CLOUD]
            vectors = memory.vectors(cloud)                                       # r (n c)
            rows.append({"checkpoint": title,
                         "R-precision": metrics.r_precision(scorer.texts(names), scorer.clouds(*cloud),
                                                            np.eye(len(names), dtype=bool)),
                         "memorisation": metrics.memorisation(vectors, memory.vectors(new), memory.known),
                         **{key: np.nanmean(results[key]) for key in (*SOUNDNESS, *LIKENESS) if key in results}})

        # sixty samples, drawn by --seed; on a second sheet each beside its nearest training shape
        chosen = np.random.default_rng(args.seed).permutation(len(jobs))[:60]
        shown, sheet = [jobs[i] for i in chosen], f"names-{args.rep}-{label}"
        samples = save_samples(args, model, sheet, shown, sampled["tokens"][chosen], 10)
        nearest = torch.cdist(vectors[chosen], memory.known).argmin(1).tolist()
        true = [render_mesh(*vertex_coloured(train.shape(row)), size=200) for row in nearest]
        titles = zip([job.text for job in shown], [train.captions[row][-1] for row in nearest])
        save_sheet(args, f"{sheet}-nearest", sum(zip(samples, true), ()), 10, sum(titles, ()))
    print(f"{len(names)} names. R-precision: share whose nearest name is its own. memorisation: 1 for new shapes.\n"
          f"{' '.join(likeness.__doc__.split())} The true shape: the nearest of the training shapes with the name")
    write_table(args.out, f"{args.command}-{args.rep}", rows)
