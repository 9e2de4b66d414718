"""registers.py - what the first registers of LoST keep of a shape; does its student find similar shapes?

    python evaluate.py registers      # decoded from 1, 2, 4 ... registers; a picture of some
    python evaluate.py search         # R@1, R@3 of several features
"""
import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

import heads
import tokenizer
from data import seeded
from engine.commands import pick_device
from engine.noise import keys_of
from geometry.metrics import chamfer, chamfer_matrix
from geometry.render import render_mesh
from geometry.training_samples import vertex_coloured
from relatives import lost, relations
from relatives.search import find_folder
from research import exam
from research.metrics import cosine
from research.quality import save_sheet
from research.results import labels, write_tables
from research.scores import Scorer

STAGES = "lost-student", "lost-registers"
POINTS = 8192       # for Chamfer distances; of fewer, it is mostly that of two samplings
FEW_POINTS = 256    # tell which shape is nearest


class Opened:
    """The stages of a folder that registers need, and held-out shapes."""

    def __init__(self, args, folder):
        folder = find_folder(folder, *STAGES)
        self.device, self.autocast, _ = pick_device(args.device, args.precision)
        parts = tokenizer.load(folder), lost.load_codec(folder), lost.load_student(folder)
        self.tokenizer, self.codec, self.student = (part.to(self.device) for part in parts)
        self.heads, self.test = heads.load(folder, ["sdf"], self.device), exam.held_out(args)

    def tokens(self, row, seed):                              # of a held-out shape: 1 n c
        return exam.encode(self.test, row, self.tokenizer, self.device, self.autocast, (seed, row))[None]

    @torch.no_grad()
    def mesh(self, tokens, k, seed, rng):
        """Tokens 1 n c, encoded, decoded with k registers (None: unchanged), meshed."""
        if k is not None:
            with self.autocast():
                tokens = self.codec.decode(self.codec.encoder(tokens)[:, :k], keys_of([seed], self.device)).float()
        return self.heads["sdf"].decode(tokens[0], self.heads, rng, self.autocast, 64)


def judge_registers(args, label, folder):
    """-> {k: mean scores of held-out shapes, decoded from k registers; None: from their tokens}; the Chamfer distance
    of two samplings of a shape; the model."""
    model, scorer = Opened(args, folder), Scorer(args.scorer, args.device)
    lengths = [*model.codec.lengths, None]

    def judge(row, rng):
        tokens = model.tokens(row, args.seed)
        clouds = [model.mesh(tokens, k, (args.seed, row), rng).surface(POINTS, rng) for k in lengths]
        true, second = (model.test.shape(row).surface(POINTS, rng)[0] for _ in range(2))
        return {name: np.float32([x[:exam.POINTS] for x in xs]) for name, xs in zip(exam.CLOUD, zip(*clouds))} | {
            "Chamfer": [chamfer(x, true) for x, *_ in clouds], "floor": chamfer(second, true)}

    results = exam.each_shape(args, model.test, exam.result_cache(args, label, folder), judge)
    held_out = model.test.cloud(range(len(model.test)), exam.POINTS, seeded(args.seed))    # r k 3 each
    count, classes, scores = len(results), np.array(model.test.classes), {}
    features = scorer.clouds(*(x[:count] for x in held_out))
    for i, k in enumerate(lengths):
        clouds = [torch.from_numpy(np.stack([result[name][i] for result in results])) for name in exam.CLOUD]
        distance = chamfer_matrix(clouds[0][:, :FEW_POINTS], held_out[0][:, :FEW_POINTS])                 # s r
        distance[range(count), range(count)] = torch.inf      # a shape is not its own neighbour
        scores[k] = {"similarity": np.diag(cosine(features, scorer.clouds(*clouds))).mean(),
                     "right class": np.mean(classes[distance.argmin(1)] == classes[:count]),
                     "Chamfer": np.mean([result["Chamfer"][i] for result in results])}
    return scores, np.mean([result["floor"] for result in results]), model


def evaluate_registers(args):
    """Decodes held-out shapes from their first registers."""
    tables = {}
    for folder, label in labels(args.checkpoint).items():
        scores, floor, model = judge_registers(args, label, folder)
        tables[label] = [{"registers": str(k) if k else "(its tokens)"} | row for k, row in scores.items()]
        draw_prefixes(args, label, model)
        print(f"Chamfer: to the shape, {POINTS} points; of two samplings of the shape {floor:.3f}")
    print("similarity: cosine of the features of the shape and of the decoded one. right class: of the nearest other")
    write_tables(args.out, args.command, tables, means=False)


def draw_prefixes(args, label, model):
    """A row for each of four shapes: from 1, 2, 4 ... registers, then the shape. Below, the first shape from 1, 4 and
    all registers, with three seeds."""
    rng, pictures, names = np.random.default_rng(0), [], [*map(str, model.codec.lengths), "the shape"]
    rows = [model.test.classes.index(name) for name in dict.fromkeys(model.test.classes)][:4]     # of four classes
    for row in rows:
        tokens = model.tokens(row, args.seed)
        pictures += [model.mesh(tokens, k, (args.seed, row), rng).picture(160) for k in model.codec.lengths]
        pictures.append(render_mesh(*vertex_coloured(model.test.shape(row)), size=160))
    tokens = model.tokens(rows[0], args.seed)
    seeds = [(k, seed) for k in (1, 4, model.codec.count) for seed in range(3)][:len(names)]
    pictures += [model.mesh(tokens, k, seed, rng).picture(160) for k, seed in seeds]
    titles = names * len(rows) + [f"{k}, seed {seed}" for k, seed in seeds]
    save_sheet(args, f"{args.command}-{label}", pictures, len(names), titles)


# ---------------------------------------------------------------------------- search

@torch.no_grad()
def evaluate_search(args):
    """Searches held-out shapes by held-out shapes, with several features."""
    tables = {}
    for folder, label in labels(args.checkpoint).items():
        model, scorer = Opened(args, folder), Scorer(args.scorer, args.device)
        facts = relations.facts(model.test)
        shared = np.array([[len(a & b) / len(a | b) for b in facts] for a in facts])                  # r r
        tokens = torch.cat([model.tokens(row, args.seed) for row in tqdm(range(len(facts)), unit="shape")])
        with model.autocast():
            registers, student = model.codec.encoder(tokens).float(), model.student(tokens)
        cloud = model.test.cloud(range(len(facts)), exam.POINTS, seeded(args.seed))
        features = {"shape tokens": rearrange(tokens, "r n c -> r (n c)"), "point tower": scorer.clouds(*cloud),
                    "first register": registers[:, 0], "first four": rearrange(registers[:, :4], "r k w -> r (k w)"),
                    "student": student}
        features = {name: torch.as_tensor(x).cpu().numpy() for name, x in features.items()}
        tables[label] = [{"features": name} | {f"R@{k}": recall(x, shared, k) for k in (1, 3)}
                         for name, x in features.items()]
    print(f"{len(facts)} held-out shapes. R@k: the share of queries that find, among the k nearest by the cosine of\n"
          "features, one of those that share most attributes with it. Student and point tower learnt such attributes")
    write_tables(args.out, args.command, tables, means=False)


def recall(x, shared, k):
    """Features r e, shares of common attributes r r -> share of rows that find one of their best matches; rows that
    have nothing in common with another do not count."""
    same = np.eye(len(x), dtype=bool)
    likeness, shared = np.where(same, -np.inf, cosine(x, x)), np.where(same, -1., shared)
    nearest = np.argsort(-likeness, 1)[:, :k]                                     # r k
    found, best = np.take_along_axis(shared, nearest, 1).max(1), shared.max(1)
    return np.mean((found >= best - 1e-9)[best > 0])
