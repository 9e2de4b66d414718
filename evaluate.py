"""evaluate.py - how good checkpoints are, in tables: reconstruction, generation, obedience, pictures.

LTM3D section 4 reports such tables on ShapeNet; here held-out built-in shapes play its part, which
also have their true solids, so that an attribute can be measured instead of guessed by a classifier.
evaluation/metrics.py says what each number means; evaluation/experiments.py holds the commands that train what they compare.

    python evaluate.py tokenizer --rep sdf       # stage 1 alone: encode and decode held-out shapes
    python evaluate.py cross                     # the same tokens through every head
    python evaluate.py joint --checkpoint ...    # shared tokens against own
    python evaluate.py generate --rep sdf        # from class names and captions: every metric (--quick: a quarter of it)
    python evaluate.py attributes --rep sdf      # "a table with one leg": has it one?
    python evaluate.py retrieval                 # the built-in aligner: does a caption or a picture find its shape?
    python evaluate.py images --rep sdf          # from a caption, from a picture, from both: how near to the true shape?
    python evaluate.py cross-view --rep sdf      # eight views of one shape: is it the same shape eight times?
    python evaluate.py ablate-rgs --rep sdf      # Reconstruction-Guided Sampling, its rules and weights
    python evaluate.py versus                    # LTM3D against its peers; also overfit, ablate-prefix, ablate-encoder,
                                                 # ablate-denoiser, data-scaling: these train first

Each prints a Markdown table and writes it, a CSV and a plot to --out, where what is done is kept: a run that was stopped
goes on. All but ablate-rgs and those that train take several checkpoints, side by side: --checkpoint checkpoints/tiny runs/mine.
"""
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from einops import repeat
from tqdm import tqdm

import heads
import tokenizer
from data import prepare
from engine.commands import Parser, UserError, between, command, pick_device
from engine.files import make_folder, read_config
from engine.state import plot_losses
from evaluation.attributes import ATTRIBUTES, holds, look
from evaluation.exam import POINTS, Exam, Job, clouds, kept, made, parts, shape
from evaluation.experiments import EXPERIMENTS, QUESTIONS, TRAINED, VARIANTS
from evaluation.judges import JUDGES, decoded_field, true_field
from evaluation.metrics import chamfer, chamfer_matrix, emd
from evaluation.results import Kept, compare, labels, mean, report
from evaluation.rgs import PROMPTS, ablate_rgs
from geometry.render import contact_sheet, save_png
from geometry.shapes import CLASSES
from geometry.training_pictures import lit
from geometry.training_samples import pictures
from heads import HEADS
from prompts import image_tower, text_tower
from sample import LTM3D, RESOLUTIONS, alpha


def held_out(args, kinds=("surface",)):
    return prepare("test", out=args.cache, kinds=kinds, data=args.data, copies=args.copies)


# ---------------------------------------------------------------------------- tokenizer

@torch.no_grad()
def encoded(args, folder, reps, kept, judge):
    """Every held-out shape, encoded from 2048 points: yields its row and what judge(heads, tokens n c, set, row, rng, autocast) says."""
    device, autocast, reason = pick_device(args.device)
    print(f"{folder}, running on {reason}")
    encoder, these = tokenizer.load(folder).to(device), heads.load(folder, reps, device)
    test = held_out(args, dict.fromkeys(kind for rep in reps for kind in HEADS[rep].kinds))
    for row in tqdm(range(min(args.shapes, len(test))), unit="shape"):       # classes take turns: balanced
        def result():
            rng = np.random.default_rng((args.seed, row))
            with autocast():
                tokens = encoder(*(x.to(device) for x in test.cloud([row], 2048, rng)))[0].float()   # n c
            return judge(these, tokens, test, row, rng, autocast)
        yield test.classes[row], {key: float(value) for key, value in kept(f"{'-'.join(reps)}-{row}", result).items()}


def evaluate_tokenizer(args):
    """Held-out shapes, encoded from 2048 points and decoded, against the true ones."""
    judge, tables = JUDGES[args.rep], {}
    for folder, label in labels(args.checkpoint).items():
        results, keep = {}, kept(args, label, folder, "tokenizer", *(f"head-{rep}" for rep in heads.with_needs([args.rep])), points=args.points)
        for name, one in encoded(args, folder, [args.rep], keep, lambda *what: judge(*what, args.points)):
            results.setdefault(name, []).append(one)
        tables[label] = [{"class": name, "shapes": str(len(each))} | mean(each) for name, each in sorted(results.items())]
    print(" ".join(judge.__doc__.split()))
    compare(args.out, f"{args.command}-{args.rep}", tables)


def evaluate_cross(args):
    """The same tokens of held-out shapes through every head: how far apart are the shapes that come out?"""
    names, tables = [*args.reps, "true"], {}

    def judge(these, tokens, test, row, rng, autocast):
        two = {rep: [these[rep].decode(tokens, these, rng, autocast, 64, 2048).surface(2048, rng)[0] for _ in range(2)] for rep in args.reps}
        two["true"] = [test.shape(row).surface(2048, rng)[0] for _ in range(2)]
        return {f"{one} {other}": chamfer(two[one][0], two[other][1]) for one in names for other in names}

    for folder, label in labels(args.checkpoint).items():
        keep = kept(args, label, folder, "tokenizer", *(f"head-{rep}" for rep in args.reps))
        table = mean([one for _, one in encoded(args, folder, args.reps, keep, judge)])
        tables[label] = [{"": one} | {other: table[f"{one} {other}"] for other in names} for one in names]
    print("Chamfer distance of 2048 points each, mean over the shapes; a representation against itself: two samplings, the floor")
    compare(args.out, args.command, tables, means=False)


def evaluate_joint(args):
    """Several checkpoints side by side, each head they have: shared tokens, own tokens, an encoder trained with all heads."""
    (references, classes), rows = references_of(held_out(args), args.seed), {}
    for folder, label in labels(args.checkpoint).items():
        config, model = read_config(folder), LTM3D(folder, args.device)
        print(f"{folder}: {sum(entry['seconds'] for entry in config.values()) / 60:.0f} minutes of training, all stages")
        for rep in [name.removeprefix("head-") for name in heads.trained(folder) if name.startswith("head-")]:
            keep = kept(args, f"{label}-{rep}", folder, "tokenizer", "backbone", *(f"head-{rep}" for rep in heads.with_needs([rep])))
            judged = mean([one for _, one in encoded(args, folder, [rep], keep, lambda *what: JUDGES[rep](*what, 0))])
            jobs = [Job(f"name-{name}-{i}", name, None, (args.seed, i)) for name in CLASSES for i in range(args.n)]
            points, names = clouds(made(model, jobs, keep, shape(model, rep, args.resolution))), [job.text for job in jobs]
            distance = chamfer_matrix(points, references)
            seconds = sum(config[stage]["seconds"] for stage in ("tokenizer", f"head-{rep}", "backbone") if stage in config)
            rows[list(HEADS).index(rep), folder] = {
                "rep": rep, "checkpoint": label, "reconstruction": ", ".join(f"{name} {value:.3f}" for name, value in judged.items()),
                "minutes": seconds / 60, "right class": np.mean(classes[distance.argmin(1)] == names),
                "Chamfer to nearest": np.mean([distance[i, classes == name].min().item() for i, name in enumerate(names)])}
    print(f"minutes: of training tokenizer, head and backbone. {args.shapes} held-out shapes reconstructed, {args.n} samples of every class name")
    report(args.out, args.command, [rows[key] for key in sorted(rows)])
    curves = [(label, Path(folder) / "backbone.csv", "held_out") for folder, label in labels(args.checkpoint).items()]
    if any(path.is_file() for _, path, _ in curves):                           # else there is nothing to draw
        plot_losses({"backbone, held-out loss": curves}, Path(args.out) / "joint-losses.png")
        print(f"{args.out}/joint-losses.png")


# ---------------------------------------------------------------------------- generation

def references_of(test, seed):
    """The clouds of all held-out shapes, r k 3, and their classes."""
    return test.cloud(range(len(test)), POINTS, np.random.default_rng(seed))[0], np.array(test.classes)


EXPLAINED = """From the fullest captions of {shapes} held-out shapes, one sample each. prompt score: cosine of the features of caption and shape;
of form: the same in the colours of the shape described. R-precision: share of samples whose features are nearest, of all captions, to
their own. Chamfer distance to the shape described. Frechet and kernel distance of features, MMD, COV and 1-NNA: to as many other held-out
shapes. memorisation: how near training shapes are, in tokens, 1 as near as to shapes held out; of copies: what training shapes score.
From {names} class names, {n} samples each. right class: share whose nearest held-out shape is of it. one piece: share with at least
99 % of the surface in one component. diversity: mean Chamfer distance of pairs, over that of held-out shapes. seconds a sample, without decoding."""


def evaluate_generate(args):
    """From the fullest captions of held-out shapes and from class names: faithful, like real shapes, whole, diverse, new?"""
    exam, rows, tables = Exam(args, *((4, 104) if args.quick else (args.n, args.shapes))), [], {}
    for folder, label in labels(args.checkpoint).items():
        keep, model = kept(args, label, folder, *parts(args.rep), alpha=args.alpha, cfg=args.cfg), LTM3D(folder, args.device)
        row, tables[label], named = exam.scores(model, keep, alpha=args.alpha, cfg=args.cfg)
        rows.append({"checkpoint": label} | row)
        draw(args, f"{args.command}-{args.rep}-{label}", model, exam, named)
    print(EXPLAINED.format(shapes=len(exam.captions), names=len(exam.names), n=exam.n))
    compare(args.out, f"{args.command}-{args.rep}-names", tables)
    real = exam.real()
    report(args.out, f"{args.command}-{args.rep}", [{"checkpoint": "held-out shapes"} | {key: real.get(key, "") for key in row}, *rows])


def draw(args, name, model, exam, named):
    """The first four samples of every class name, and of every seed some."""
    each = min(4, exam.n)
    some = [i * exam.n + (i * each + j) % exam.n for i in range(len(exam.names)) for j in range(each)]
    tokens = torch.from_numpy(named["tokens"][some])
    pictures = [model.decode(t, args.rep, exam.named[i].seed, args.resolution).picture(160)
                for i, t in zip(tqdm(some, desc="pictures", unit="picture"), tokens)]
    save_png(f"{args.out}/{name}.png", contact_sheet(pictures, 2 * each, [exam.named[i].text for i in some]))
    print(f"{args.out}/{name}.png")


# ---------------------------------------------------------------------------- pictures

def evaluate_retrieval(args):
    """Among 200 held-out shapes: does a full caption, does a picture of any side find the cloud of its shape?"""
    device, autocast, reason = pick_device(args.device)
    print(f"running on {reason}")
    test, tables = held_out(args, ("surface", "pictures")), {}
    for folder, label in labels(args.checkpoint).items():
        aligner, sight = text_tower.load(folder).to(device), image_tower.load(folder).to(device)
        with autocast():
            found = {"caption": text_tower.retrieval(aligner, test), "picture": image_tower.retrieval(sight, aligner, test)}
        tables[label] = [{"asked with": name, "shapes": str(each["shapes"]), "R@1": each["recall_at_1"], "R@5": each["recall_at_5"]}
                         for name, each in found.items()]
    compare(args.out, args.command, tables, means=False)


def evaluate_images(args):
    """Held-out shapes from their class name, any caption, their longest one, a picture of a random side, the last two."""
    test, tables = held_out(args, ("surface", "pictures")), {}
    references, classes = references_of(test, args.seed)
    rows = np.arange(min(args.shapes, len(test)))
    captions = [max(test.captions[row], key=len) for row in rows]
    pictures, any_ = test.pictures(rows, np.random.default_rng(args.seed)), test.told(rows, np.random.default_rng(args.seed))
    true = [[test.shape(row).surface(8192, np.random.default_rng((args.seed, row, i)))[0] for row in rows] for i in range(2)]
    prompts = {"name": (classes[rows].tolist(), None), "any caption": (any_, None), "longest caption": (captions, None),
               "picture": (None, pictures), "picture and longest caption": (captions, pictures)}
    for folder, label in labels(args.checkpoint).items():
        keep, model = kept(args, label, folder, *parts(args.rep), "vision", alpha=args.alpha), LTM3D(folder, args.device)
        floor = np.mean([chamfer(*pair) for pair in zip(*true)])
        tables[label] = [{"told": "(two samplings of the true surface)", "Chamfer": floor, "right class": ""}]
        shown = [list(repeat((pictures[:len(CLASSES)].clamp(0, 1) * 255).byte().numpy(), "b c h w -> b (h i) (w j) c", i=3, j=3))]
        for told, (said, seen) in prompts.items():
            jobs = [Job(f"{told}-{row}", said and said[row], None if seen is None else seen[row], (args.seed, int(row))) for row in rows]
            results = made(model, jobs, keep, shape(model, args.rep, args.resolution, 8192), alpha=args.alpha)
            nearest = chamfer_matrix(clouds(results)[:, :POINTS].contiguous(), references).argmin(1)
            tables[label].append({"told": told, "Chamfer": np.mean([chamfer(*pair) for pair in zip(results["points"], true[0])]),
                                  "right class": np.mean(classes[nearest] == classes[rows])})
            shown.append([model.decode(torch.from_numpy(t), args.rep, job.seed, args.resolution).picture(192)
                          for t, job in zip(results["tokens"][:len(CLASSES)], jobs)])
        save_png(f"{args.out}/images-{args.rep}-{label}.png", contact_sheet([one for row in shown for one in row], len(shown[0])))
        print(f"{args.out}/images-{args.rep}-{label}.png")
    print(f"{len(rows)} held-out shapes, one sample each; Chamfer distance of 8192 points to the true shape")
    compare(args.out, f"{args.command}-{args.rep}", tables, means=False)


def evaluate_views(args):
    """Eight views of one held-out shape, eight shapes: how far apart are they? With and without RGS."""
    test, tables = held_out(args), {}
    for folder, label in labels(args.checkpoint).items():
        keep, model = kept(args, label, folder, *parts(args.rep), "vision"), LTM3D(folder, args.device)
        print(f"{folder}, running on {model.reason}")
        look, tables[label] = shape(model, args.rep, args.resolution), []
        for row in range(min(args.shapes, len(test))):
            drawn = pictures(test.shape(row), [(45 * i, 20) for i in range(8)])
            seen = lit(*drawn.values(), np.random.default_rng(0), vary=False)
            results = {"shape": f"{test.classes[row]} {row}"}
            for name, a in (("sampling only", None), ("RGS", "auto")):
                jobs = [Job(f"{test.classes[row]} {row}, {name}-{i}", None, each, (args.seed, i)) for i, each in enumerate(seen)]
                pairs = list(combinations(made(model, jobs, keep, look, alpha=a)["points"], 2))
                results |= {f"Chamfer, {name}": np.mean([chamfer(*pair) for pair in pairs]), f"EMD, {name}": np.mean([emd(*pair) for pair in pairs])}
            two = [test.shape(row).surface(POINTS, np.random.default_rng(i))[0] for i in range(2)]
            tables[label].append(results | {"Chamfer floor": chamfer(*two), "EMD floor": emd(*two)})
    print(f"mean of all pairs of eight, {POINTS} points each; floor: of two samplings of the true surface")
    compare(args.out, f"{args.command}-{args.rep}", tables)


# ---------------------------------------------------------------------------- attributes

def check(args):
    """Every checker on the held-out shapes themselves: (class, attribute) -> for each shape, was it right?"""
    test, right = held_out(args), {}
    keep = Kept(f"{args.out}/{args.command}/checkers", shapes=test.name)
    for row in tqdm(range(len(test)), desc="checking the checkers", unit="shape"):
        def result():
            seen = look(true_field(test.shape(row)))
            return {f"{name}: {attribute}": holds(seen, attribute, checker, test.text[row]["attributes"][attribute])
                    for name, attribute, checker, prompts in ATTRIBUTES if test.classes[row] == name
                    and (test.text[row]["attributes"].get(attribute) in prompts or attribute == "colour")}    # all, though few are asked for
        for key, value in keep(f"{row}", result).items():
            right.setdefault(key, []).append(value)
    return right


def evaluate_attributes(args):
    """Prompts that name a visible attribute, and whether the solid that comes out has it."""
    right, tables = check(args), {}
    if args.check:
        return report(args.out, "attributes-check", [{"checker": key, "shapes": str(len(each)), "right": np.mean(each)} for key, each in right.items()], True)
    asked = [(prompt, value, *entry) for *entry, prompts in ATTRIBUTES for value, prompt in prompts.items()]
    for folder, label in labels(args.checkpoint).items():
        keep, model = kept(args, label, folder, *parts("sdf"), alpha=args.alpha), LTM3D(folder, args.device).ready("sdf")
        print(f"{folder}, running on {model.reason}")
        jobs, meant = [], {}
        for prompt, value, name, attribute, checker in asked:
            jobs += [Job(f"{prompt}-{i}", prompt, None, (args.seed, i)) for i in range(args.n)]
            meant |= {prompt: (attribute, checker, value)}

        def obeyed(tokens, job):
            return {"obeyed": holds(look(decoded_field(model.heads["sdf"], tokens, model.autocast)), *meant[job.text])}

        each = made(model, jobs, keep, obeyed, alpha=args.alpha)["obeyed"].reshape(-1, args.n).mean(1)
        tables[label] = [{"prompt": prompt, "obeyed": share, "checker": np.mean(right[f"{name}: {attribute}"])}
                         for (prompt, _, name, attribute, _), share in zip(asked, each)]
    print(f"{args.n} samples a prompt. obeyed: the share that has it; checker: how often the checker is right about held-out shapes")
    compare(args.out, args.command, tables)


# ---------------------------------------------------------------------------- the commands

COMMANDS = {"tokenizer": evaluate_tokenizer, "cross": evaluate_cross, "joint": evaluate_joint, "generate": evaluate_generate,
            "attributes": evaluate_attributes, "retrieval": evaluate_retrieval, "images": evaluate_images, "cross-view": evaluate_views,
            "ablate-rgs": ablate_rgs} | EXPERIMENTS


def main():
    common = Parser(add_help=False)
    common.add_argument("--checkpoint", nargs="+", default=["checkpoints/tiny"], help="folders of trained weights, to be put side by side")
    common.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    common.add_argument("--seed", type=between(0), default=0, help="of the samples and of the points drawn")
    common.add_argument("--cache", default="cache", help="folder of the prepared data")
    common.add_argument("--out", default="out/evaluate", help="folder for the results; a run that was stopped goes on from what is there")
    common.set_defaults(data=None, copies=1)
    parser = Parser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    about = {name: run.__doc__ for name, run in COMMANDS.items()} | QUESTIONS
    sub = {name: commands.add_parser(name, parents=[common], help=text, description=text) for name, text in about.items()}

    def flag(names, *flags, **settings):
        for name in names.split():
            sub[name].add_argument(*flags, **settings)

    flag("tokenizer generate images cross-view ablate-rgs " + " ".join(TRAINED), "--rep", type=heads.spelling, choices=list(HEADS), default="sdf",
         help="the representation to judge")
    for names, least, shapes in (("tokenizer", 1, 260), ("cross images", 1, 208), ("generate", 2, 208), ("joint", 1, 52), ("cross-view ablate-rgs", 1, 26),
                                 (" ".join(TRAINED), 2, 104)):
        flag(names, "--shapes", type=between(least, 520), default=shapes, help="how many held-out shapes, all classes alike")
    for names, n in (("generate", 16), ("attributes", 8), ("joint ablate-rgs " + " ".join(TRAINED), 4)):
        flag(names, "--n", type=between(2, 1000), default=n, help="samples of every prompt, where there are several")
    flag("joint generate images cross-view ablate-rgs " + " ".join(TRAINED), "--resolution", type=int, choices=RESOLUTIONS, default=64,
         help="of surfaces")
    flag("tokenizer", "--points", type=between(100, 10 ** 7), default=100_000, help="surface points a side of the F-score")
    flag("cross", "--reps", nargs="+", choices=list(HEADS), default=list(HEADS), help="representations to compare")
    flag("generate", "--quick", action="store_true", help="a quarter of it: --n 4 --shapes 104")
    flag("generate ablate-rgs " + " ".join(TRAINED), "--scorer", default="checkpoints/tiny", help="what gives features of clouds and prompts: a "
         "trained folder, or a Python file that defines cloud(points, normals, colours) and text(prompts), e.g. with ULIP's weights")
    flag("generate", "--cfg", type=between(0, 100, float), default=2., help="classifier-free guidance by the text; 1 is none")
    flag("attributes", "--check", action="store_true", help="only try the checkers, on the held-out shapes themselves")
    flag("generate attributes images", "--alpha", type=alpha, default="auto", help="RGS weight of the sampled tokens; 'none' is sampling only "
                                                                                   "(default: .1 with a picture, none without)")
    flag("tokenizer cross generate retrieval images cross-view", "--data", help="the files that it was trained on, a tenth of which was held out "
                                                                            "(default: the built-in shapes)")
    flag("tokenizer cross generate retrieval images cross-view", "--copies", type=between(1, 100), default=1, help="as in training")
    names = " ".join(TRAINED)
    flag(names, "--steps", type=between(1), default=1200, help="training steps of every variant")
    flag(names, "--train-shapes", type=between(2), default=20_800, help="built-in shapes that every variant learns from")
    flag(names, "--runs", default="runs/experiments", help="folder of the variants, which the experiments share")
    flag("ablate-rgs " + " ".join(VARIANTS), "--seeds", type=between(1, 100), default=3, help="samplings of every rule, or trainings of every variant")
    flag("ablate-rgs", "--prompts", nargs="+", choices=PROMPTS, default=list(PROMPTS), help="what to ask with")
    flag("ablate-rgs", "--alphas", nargs="*", type=between(0, 1, float), default=[0, .05, .1, .2, .3, .5, .9],
         help="weights of the sampled tokens")
    flag("ablate-rgs", "--windows", nargs="*", type=between(.01, .99, float), default=[.25, .5], help="shares of the steps besides .75, at a = .1")
    flag("ablate-rgs", "--within", nargs="*", type=between(0, 100, float), default=[1, 1.5, 2], help="reaches of our rule, in standard deviations")
    flag("overfit", "--of", choices=CLASSES, default="chair", help="the class")
    sub["overfit"].set_defaults(train_shapes=10, steps=400)
    flag("ablate-encoder", "--text-encoders", nargs="+", default=[], metavar="NAME", help="text encoders of transformers to try as well (prompts/pretrained.py)")
    args = parser.parse_args()
    start = time.time()
    make_folder(args.out), pick_device(args.device)
    if len(args.checkpoint) > 1 and args.command in ("ablate-rgs", *TRAINED):
        raise UserError(f"{args.command} takes one --checkpoint")
    for folder in args.checkpoint:
        if not read_config(folder):
            raise UserError(f"there is nothing trained in {folder}; --checkpoint takes checkpoints/tiny or folders that train.py made")
        for stage, entry in read_config(folder).items():
            print(f"{folder}: {stage}, {entry.get('steps', '?')} steps, git revision {entry.get('revision', '?')}")
    COMMANDS[args.command](args)
    print(f"{time.time() - start:.0f} seconds")


if __name__ == "__main__":
    command(main)
