"""names.py - does a model of files know the things that it learnt, and does it make new ones or copies?

    python evaluate.py names --data path/to/meshes --checkpoint runs/meshes
"""
import numpy as np
import torch
from tqdm import tqdm

from data import prepare
from evaluation import exam, metrics
from evaluation.memory import Memory, training_set_of
from evaluation.results import labels, write_tables
from geometry.render import contact_sheet, render_mesh, save_png
from geometry.training_samples import vertex_coloured


@torch.no_grad()
def evaluate_names(args):
    """Names of training shapes, a sample of each: is its own name the nearest of all, and is it a copy?"""
    train, test = (prepare(split, None, args.cache, data=args.data) for split in ("train", "test"))
    names, first = np.unique(train.classes, return_index=True)                    # first: one shape of each name
    chosen = np.linspace(0, len(names) - 1, min(args.names, len(names))).astype(int)
    names, first = names[chosen].tolist(), first[chosen]
    jobs = [exam.Job(f"name-{name}", name, None, (args.seed, i)) for i, name in enumerate(names)]
    true = train.cloud(first, exam.POINTS, np.random.default_rng(args.seed))                              # r k 3 each
    new = test.cloud(range(len(test)), exam.POINTS, np.random.default_rng(args.seed))                     # h k 3 each
    tables, options = {}, exam.given(cfg=args.cfg)
    for folder, label in labels(args.checkpoint).items():
        training_set_of(folder, args)                    # an error, if it learnt from other files
        cache = exam.result_cache(args, label, folder, *exam.stages_of(args.rep), **options)
        model, scorer = exam.open_model(args, folder), exam.Scorer(folder, args.device or "cpu")
        results = exam.sample_all(model, jobs, cache, exam.shape_result(model, args.rep, args.resolution), **options)
        prompts, own = scorer.texts(names), np.eye(len(names), dtype=bool)        # r e, r r
        memory = Memory(folder, model.device, model.autocast, train)
        clouds = {"training shapes": true, "samples": [results[key] for key in exam.CLOUD]}
        vectors = {what: memory.vectors(cloud) for what, cloud in clouds.items()}                         # r (n c) each
        held_out = memory.vectors(new)                                            # h (n c)
        tables[label] = [{"": what, "R-precision": metrics.r_precision(prompts, scorer.clouds(*cloud), own),
                          "memorisation": memory.ratio(vectors[what], held_out)} for what, cloud in clouds.items()]
        draw(args, label, model, jobs, results["tokens"], train, memory.nearest(vectors["samples"]))
    print(f"{len(names)} names. R-precision: the share whose nearest name, of all of these, is its own. memorisation: "
          "the distance to the nearest training shape, in tokens of surfaces, over that of held-out shapes")
    write_tables(args.out, f"{args.command}-{args.rep}", tables, means=False)


def draw(args, label, model, jobs, tokens, train, nearest):
    """Forty samples, evenly spread, on one sheet; on another, each has its nearest training shape to the right."""
    rows = np.linspace(0, len(jobs) - 1, min(40, len(jobs))).astype(int)
    shapes = (model.decode(torch.from_numpy(tokens[i]), args.rep, jobs[i].seed, args.resolution) for i in rows)
    samples = [shape.picture(160) for shape in tqdm(shapes, "pictures", len(rows), unit="picture")]
    neighbours = [render_mesh(*vertex_coloured(train.shape(nearest[i])), size=160) for i in rows]
    names, others = [jobs[i].text for i in rows], [train.captions[nearest[i]][-1] for i in rows]
    sheets = {"": (samples, 8, names),
              "-nearest": (sum(zip(samples, neighbours), ()), 8, sum(zip(names, others), ()))}
    for ending, sheet in sheets.items():
        path = f"{args.out}/{args.command}-{args.rep}-{label}{ending}.png"
        save_png(path, contact_sheet(*sheet))
        print(path)
