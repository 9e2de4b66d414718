"""names.py - a model of files: do samples match the names that it learnt, and are they new or copies?

    python evaluate.py names --data path/to/meshes --checkpoint runs/meshes
"""
import numpy as np
import torch

from data import prepare, seeded
from geometry.render import render_mesh
from geometry.training_samples import vertex_coloured
from research import exam, metrics
from research.quality import save_sheet
from research.results import labels, write_table
from research.scores import Memory, Scorer, training_set_of


@torch.no_grad()
def evaluate_names(args):
    """Samples 200 names of training shapes: is its own name the nearest of all, and is it a copy?"""
    train, test = (prepare(split, None, args.cache, data=args.data) for split in ("train", "test"))
    names = np.unique(train.classes)
    names, rows = names[np.linspace(0, len(names) - 1, min(200, len(names))).astype(int)].tolist(), []
    jobs = [exam.Job(f"name-{name}", name, None, (args.seed, i)) for i, name in enumerate(names)]
    new = test.cloud(range(len(test)), exam.POINTS, seeded(args.seed))                     # h k 3 each
    for folder, label in labels(args.checkpoint).items():
        training_set_of(folder, args)                         # an error, if it learnt from other files
        cache, model = exam.result_cache(args, label, folder), exam.open_model(args, folder)
        scorer, memory = Scorer(folder, args.device), Memory(folder, model.device, model.autocast, train)
        results = exam.sample_all(model, jobs, cache, exam.shape_result(model, args.rep, args.resolution))
        cloud, own = [results[key] for key in exam.CLOUD], np.eye(len(names), dtype=bool)                 # r r
        vectors = memory.vectors(cloud)                                           # r (n c)
        rows.append({"checkpoint": label,
                     "R-precision": metrics.r_precision(scorer.texts(names), scorer.clouds(*cloud), own),
                     "memorisation": metrics.memorisation(vectors, memory.vectors(new), memory.known)})

        # forty samples, evenly spread; on a second sheet each beside its nearest training shape
        nearest = torch.cdist(vectors, memory.known).argmin(1).tolist()
        chosen = np.linspace(0, len(jobs) - 1, min(40, len(jobs))).astype(int)
        samples = [exam.picture_of(model, args, results["tokens"][i], jobs[i], 160) for i in chosen]
        pairs = [(sample, render_mesh(*vertex_coloured(train.shape(nearest[i])), size=160))
                 for i, sample in zip(chosen, samples)]
        titles = [(names[i], train.captions[nearest[i]][-1]) for i in chosen]
        save_sheet(args, f"names-{args.rep}-{label}", samples, 8, [names[i] for i in chosen])
        save_sheet(args, f"names-{args.rep}-{label}-nearest", sum(pairs, ()), 8, sum(titles, ()))
    print(f"{len(names)} names. R-precision: share whose nearest name is its own. memorisation: as of generate")
    write_table(args.out, f"{args.command}-{args.rep}", rows)
