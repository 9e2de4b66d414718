"""evaluate.py - how good a checkpoint is, in tables: reconstruction, generation, obedience, RGS.

LTM3D section 4 reports such tables on ShapeNet; here held-out built-in shapes play its part, which
also have their true solids, so that an attribute can be measured instead of guessed by a classifier.
metrics.py says what each number means.

    python evaluate.py tokenizer --rep sdf       # stage 1 alone: encode and decode held-out shapes
    python evaluate.py cross                     # the same tokens through every head
    python evaluate.py joint --checkpoints ...   # shared tokens against own
    python evaluate.py generate --rep sdf        # n samples of each bare class name
    python evaluate.py attributes --rep sdf      # "a table with one leg": has it one?
    python evaluate.py ablate-rgs --rep sdf      # Reconstruction-Guided Sampling, its weight varied
    python evaluate.py retrieval                 # the built-in aligner: does a caption or a picture find its shape?
    python evaluate.py images --rep sdf          # from a caption, from a picture, from both: how near to the true shape?
    python evaluate.py views --rep sdf           # eight views of one shape: is it the same shape eight times?

Each prints a Markdown table and writes it, a CSV beside it, to --out.
"""
import csv
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from einops import repeat
from tqdm import tqdm

import encoders
import heads
import tokenizer
import vision
from attributes import ATTRIBUTES, holds, look
from data import prepare
from fit import plot_losses
from heads import HEADS
from images import lit
from kinds import pictures
from layers import Parser, between, claim, command, pick_device, read_config, written
from metrics import JUDGES, chamfer, chamfer_matrix, decoded_field, diversity, emd, others, true_field
from render import contact_sheet, save_png
from sample import LTM3D, RESOLUTIONS, alpha
from shapes import CLASSES

POINTS = 1024       # of a cloud under Chamfer distance
BATCH = 64          # prompts sampled at once


def report(args, name, rows, mean_row=True):
    """rows: dicts with the same keys, the first a label. Adds their mean, prints, writes .md and .csv."""
    keys = list(rows[0])
    if mean_row:
        last = {key: "" if isinstance(rows[0][key], str) else np.mean([row[key] for row in rows]) for key in keys}
        rows = rows + [last | {keys[0]: "mean"}]
    lines = [keys, ["---"] + ["--:"] * (len(keys) - 1)]
    lines += [[value if isinstance(value, str) else f"{value:.3f}" for value in row.values()] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(table)
    with written(f"{args.out}/{name}.md") as part:
        part.write_text(table + "\n")
    with written(f"{args.out}/{name}.csv") as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    print(f"{args.out}/{name}.md", f"{args.out}/{name}.csv", sep="\n")


def held_out(args, kinds=("surface",)):
    return prepare("test", out=args.cache, kinds=kinds, data=args.data, copies=args.copies)


# ---------------------------------------------------------------------------- tokenizer

@torch.no_grad()
def encoded(args, folder, reps):
    """Every held-out shape, encoded from 2048 points: yields the set, its row, a generator, the heads, tokens n c, autocast."""
    device, autocast, reason = pick_device(args.device)
    print(f"running on {reason}")
    encoder, these = tokenizer.load(folder).to(device), heads.load(folder, reps, device)
    test = held_out(args, dict.fromkeys(kind for rep in reps for kind in HEADS[rep].kinds))
    for row in tqdm(range(min(args.shapes, len(test))), unit="shape"):       # classes take turns: balanced
        rng = np.random.default_rng((args.seed, row))
        with autocast():
            tokens = encoder(*(x.to(device) for x in test.cloud([row], 2048, rng)))[0].float()   # n c
        yield test, row, rng, these, tokens, autocast


def mean(each):
    """Dicts of the same keys -> one of their means."""
    return {key: np.mean([one[key] for one in each]) for key in each[0]} if each else {}


def evaluate_tokenizer(args):
    """Held-out shapes, encoded from 2048 points and decoded, against the true ones."""
    results = {}
    for test, row, rng, these, tokens, autocast in encoded(args, args.checkpoint, [args.rep]):
        results.setdefault(test.classes[row], []).append(JUDGES[args.rep](these, tokens, test, row, rng, autocast, args.points))
    print(" ".join(JUDGES[args.rep].__doc__.split()))
    report(args, f"{args.command}-{args.rep}",
           [{"class": name, "shapes": str(len(each))} | mean(each) for name, each in sorted(results.items())])


def evaluate_cross(args):
    """The same tokens of held-out shapes through every head: how far apart are the shapes that come out?"""
    results, names = {}, [*args.reps, "true"]
    for test, row, rng, these, tokens, autocast in encoded(args, args.checkpoint, args.reps):
        two = {rep: [these[rep].decode(tokens, these, rng, autocast, 64, 2048).sample(2048, rng) for _ in range(2)] for rep in args.reps}
        two["true"] = [test.shape(row).surface(2048, rng)[0] for _ in range(2)]
        for one in names:
            for other in names:
                results.setdefault((one, other), []).append(chamfer(two[one][0], two[other][1]))
    print("Chamfer distance of 2048 points each, mean over the shapes; a representation against itself: two samplings, the floor")
    report(args, args.command, [{"": one} | {other: np.mean(results[one, other]) for other in names} for one in names], mean_row=False)


# ---------------------------------------------------------------------------- generation

def sample_tokens(model, prompts, n, seed, **options):
    """n samples of every prompt -> tokens (prompts n) n c. Sample i of each is the one that
    `sample.py --text prompt --n n --seed seed` calls i."""
    jobs = [(prompt, (seed, i)) for prompt in prompts for i in range(n)]
    batches = [jobs[i:i + BATCH] for i in range(0, len(jobs), BATCH)]
    return torch.cat([model.tokens(*map(list, zip(*batch)), **options) for batch in tqdm(batches, desc="tokens", unit="batch")])


def decode(model, tokens, rep, args):
    """-> the shapes, and POINTS points on each: n k 3."""
    shapes = [model.decode(t, rep, (args.seed, i), args.resolution) for i, t in enumerate(tqdm(tokens, desc="decoding", unit="shape"))]
    clouds = [shape.sample(POINTS, np.random.default_rng((args.seed, i))) for i, shape in enumerate(shapes)]
    return shapes, torch.from_numpy(np.stack(clouds))


def references_of(test, seed):
    """The clouds of all held-out shapes, r k 3, and their classes."""
    return test.cloud(range(len(test)), POINTS, np.random.default_rng(seed))[0], np.array(test.classes)


def evaluate_generate(args):
    """n samples of every class name: the right class, whole, closed, near to real shapes, diverse?"""
    model, (references, classes) = LTM3D(args.checkpoint, args.device).ready(args.rep), references_of(held_out(args), args.seed)
    print(f"running on {model.reason}")
    shapes, clouds = decode(model, sample_tokens(model, args.prompts, args.n, args.seed, alpha=args.alpha), args.rep, args)
    distance = torch.cat([chamfer_matrix(part, references) for part in tqdm(clouds.split(8), desc="Chamfer", unit="batch")])
    rows = []
    for i, name in enumerate(args.prompts):
        own, same = slice(i * args.n, (i + 1) * args.n), classes == name
        ours, real = diversity(clouds[own]), others(references[same])
        rows.append({"class": name,
                     "right class": np.mean(classes[distance[own].argmin(1)] == name),
                     **mean([shape.soundness() for shape in shapes[own]]),
                     "Chamfer to nearest": distance[own][:, same].amin(1).mean().item(),
                     "of held-out": real.amin(1).mean().item(),
                     "diversity": ours,
                     "diversity of held-out": real.mean().item(),
                     "ratio": ours / real.mean().item()})
    print(f"{args.n} samples a class. right class: share whose nearest held-out shape is of it. one piece: share with at least 99 % of\n"
          "the surface in one component. closed edges: share that two faces share. Chamfer to the nearest held-out shape of\n"
          "the class; of held-out: from each of those to its nearest other. diversity: mean Chamfer of pairs")
    report(args, f"{args.command}-{args.rep}", rows)
    each = min(4, args.n)
    shown = [i * args.n + (i * each + j) % args.n for i in range(len(args.prompts)) for j in range(each)]      # of every seed some
    pictures = [shapes[i].picture(160) for i in tqdm(shown, desc="pictures", unit="picture")]
    save_png(f"{args.out}/generate-{args.rep}.png", contact_sheet(pictures, 2 * each, [name for name in args.prompts for _ in range(each)]))
    print(f"{args.out}/generate-{args.rep}.png")


def evaluate_joint(args):
    """Several checkpoints side by side, each head they have: shared tokens, own tokens, an encoder trained with all heads."""
    (references, classes), names, rows = references_of(held_out(args), args.seed), np.repeat(CLASSES, args.n), {}
    for folder in args.checkpoints:
        config, model = read_config(folder), LTM3D(folder, args.device)
        print(f"{folder}: {sum(entry['seconds'] for entry in config.values()) / 60:.0f} minutes of training, all stages")
        made = sample_tokens(model, CLASSES, args.n, args.seed)
        for rep in [name.removeprefix("head-") for name in heads.trained(folder) if name.startswith("head-")]:
            judged = mean([JUDGES[rep](these, tokens, test, row, rng, autocast, 0)
                           for test, row, rng, these, tokens, autocast in encoded(args, folder, [rep])])
            distance = chamfer_matrix(decode(model, made, rep, args)[1], references)
            seconds = sum(config[stage]["seconds"] for stage in ("tokenizer", f"head-{rep}", "backbone") if stage in config)
            rows[list(HEADS).index(rep), folder] = {
                "rep": rep, "checkpoint": Path(folder).name, "minutes": seconds / 60,
                "reconstruction": ", ".join(f"{name} {value:.3f}" for name, value in judged.items()),
                "right class": np.mean(classes[distance.argmin(1)] == names),
                "Chamfer to nearest": np.mean([distance[i, classes == name].min().item() for i, name in enumerate(names)])}
    print(f"minutes: of training tokenizer, head and backbone. {args.shapes} held-out shapes reconstructed, "
          f"{args.n} samples of every class name")
    report(args, args.command, [rows[key] for key in sorted(rows)], mean_row=False)
    curves = [(Path(folder).name, Path(folder) / "backbone.csv", "held_out") for folder in args.checkpoints]
    if any(path.is_file() for _, path, _ in curves):                           # else there is nothing to draw
        plot_losses({"backbone, held-out loss": curves}, Path(args.out) / "joint.png")
        print(f"{args.out}/joint.png")


def evaluate_ablate_rgs(args):
    """x~ = a x + (1 - a) x_recon in the first steps (section 3.3): what does a trade?"""
    model, (references, classes) = LTM3D(args.checkpoint, args.device).ready(args.rep), references_of(held_out(args), args.seed)
    print(f"running on {model.reason}")
    rows = []
    for a in args.alphas:
        _, clouds = decode(model, sample_tokens(model, args.prompts, args.n, args.seed, alpha=a), args.rep, args)
        rows.append({"a": "sampling only" if a is None else f"{a:g}"} | mean(
            [{"Chamfer to nearest": chamfer_matrix(own, references[classes == name]).amin(1).mean().item(), "diversity": diversity(own)}
             for name, own in zip(args.prompts, clouds.split(args.n))]))
    real = [others(references[classes == name]) for name in args.prompts]      # what real shapes score
    rows.append({"a": "held-out shapes"} | mean([{"Chamfer to nearest": x.amin(1).mean().item(), "diversity": x.mean().item()}
                                                 for x in real]))
    print(f"{args.n} samples of each of {len(args.prompts)} class names; Chamfer to the nearest held-out shape of the class; "
          "mean Chamfer of pairs of one prompt")
    report(args, args.command, rows, mean_row=False)


# ---------------------------------------------------------------------------- pictures

def evaluate_retrieval(args):
    """Among 200 held-out shapes: does a full caption, does a picture of any side find the cloud of its shape?"""
    device, autocast, reason = pick_device(args.device)
    print(f"running on {reason}")
    aligner, sight = encoders.load(args.checkpoint).to(device), vision.load(args.checkpoint).to(device)
    test = held_out(args, ("surface", "pictures"))
    with autocast():
        found = {"caption": encoders.retrieval(aligner, test), "picture": vision.retrieval(sight, aligner, test)}
    report(args, args.command, [{"asked with": name, "shapes": str(each["shapes"]), "R@1": each["recall_at_1"], "R@5": each["recall_at_5"]}
                                for name, each in found.items()], mean_row=False)


def evaluate_images(args):
    """Held-out shapes from their class name, any caption, their longest one, a picture of a random side, the last two."""
    model, test = LTM3D(args.checkpoint, args.device).ready(args.rep), held_out(args, ("surface", "pictures"))
    references, classes = references_of(test, args.seed)
    rows = np.arange(min(args.shapes, len(test)))
    captions, seeds = [max(test.captions[row], key=len) for row in rows], [(args.seed, int(row)) for row in rows]
    pictures, any_ = test.pictures(rows, np.random.default_rng(args.seed)), test.told(rows, np.random.default_rng(args.seed))
    true = [[test.shape(row).surface(8192, np.random.default_rng((args.seed, row, i)))[0] for row in rows] for i in range(2)]
    table = [{"told": "(two samplings of the true surface)", "Chamfer": np.mean([chamfer(*pair) for pair in zip(*true)]), "right class": ""}]
    shown = [list(repeat((pictures[:len(CLASSES)].clamp(0, 1) * 255).byte().numpy(), "b c h w -> b (h i) (w j) c", i=3, j=3))]
    prompts = {"name": (classes[rows].tolist(), None), "any caption": (any_, None), "longest caption": (captions, None),
               "picture": (None, pictures), "picture and longest caption": (captions, pictures)}
    parts = [slice(i, i + BATCH) for i in range(0, len(rows), BATCH)]
    for told, (said, seen) in prompts.items():
        tokens = torch.cat([model.tokens(said and said[part], seeds[part], None if seen is None else seen[part], args.alpha)
                            for part in tqdm(parts, desc=told, unit="batch")])
        shapes = [model.decode(t, args.rep, seed, args.resolution) for t, seed in zip(tokens, seeds)]
        clouds = [shape.sample(8192, np.random.default_rng(seed)) for shape, seed in zip(shapes, seeds)]
        nearest = chamfer_matrix(torch.from_numpy(np.stack(clouds))[:, :POINTS].contiguous(), references).argmin(1)
        table.append({"told": told, "Chamfer": np.mean([chamfer(*pair) for pair in zip(clouds, true[0])]),
                      "right class": np.mean(classes[nearest] == classes[rows])})
        shown.append([shape.picture(192) for shape in shapes[:len(CLASSES)]])
    print(f"{len(rows)} held-out shapes, one sample each; Chamfer distance of 8192 points to the true shape")
    report(args, f"{args.command}-{args.rep}", table, mean_row=False)
    save_png(f"{args.out}/images-{args.rep}.png", contact_sheet([one for row in shown for one in row], len(shown[0])))
    print(f"{args.out}/images-{args.rep}.png")


def evaluate_views(args):
    """Eight views of one held-out shape, eight shapes: how far apart are they? With and without RGS."""
    model, test = LTM3D(args.checkpoint, args.device).ready(args.rep), held_out(args)
    print(f"running on {model.reason}")
    rows = []
    for row in tqdm(range(min(args.shapes, len(test))), unit="shape"):
        looks = pictures(test.shape(row), [(45 * i, 20) for i in range(8)])
        seen = lit(*looks.values(), np.random.default_rng(0), vary=False)
        results = {"shape": f"{test.classes[row]} {row}"}
        for name, a in (("sampling only", None), ("RGS", "auto")):
            tokens = model.tokens(None, [(args.seed, i) for i in range(8)], seen, alpha=a)
            clouds = [model.decode(t, args.rep, (args.seed, i), args.resolution).sample(POINTS, np.random.default_rng(i))
                      for i, t in enumerate(tokens)]
            pairs = list(combinations(clouds, 2))
            results |= {f"Chamfer, {name}": np.mean([chamfer(*pair) for pair in pairs]), f"EMD, {name}": np.mean([emd(*pair) for pair in pairs])}
        two = [test.shape(row).surface(POINTS, np.random.default_rng(i))[0] for i in range(2)]
        rows.append(results | {"Chamfer floor": chamfer(*two), "EMD floor": emd(*two)})
    print(f"mean of all pairs of eight, {POINTS} points each; floor: of two samplings of the true surface")
    report(args, f"{args.command}-{args.rep}", rows)


# ---------------------------------------------------------------------------- attributes

def check(args):
    """Every checker on the held-out shapes themselves: (class, attribute) -> for each shape, was it right?"""
    test = held_out(args)
    seen = [look(true_field(test.shape(row))) for row in tqdm(range(len(test)), desc="checking the checkers", unit="shape")]
    right = {}
    for name, attribute, checker, prompts in ATTRIBUTES:
        for row in range(len(test)):
            value = test.text[row]["attributes"].get(attribute)
            if test.classes[row] == name and (value in prompts or attribute == "colour"):    # all colours, though few are asked for
                right.setdefault((name, attribute), []).append(holds(seen[row], attribute, checker, value))
    return right


def evaluate_attributes(args):
    """Prompts that name a visible attribute, and whether the solid that comes out has it."""
    right = check(args)
    if args.check:
        return report(args, "attributes-check", [{"checker": f"{name}: {attribute}", "shapes": str(len(each)), "right": np.mean(each)}
                                                 for (name, attribute), each in right.items()])
    model = LTM3D(args.checkpoint, args.device).ready("sdf")
    print(f"running on {model.reason}")
    asked = [(prompt, value, *entry) for *entry, prompts in ATTRIBUTES for value, prompt in prompts.items()]
    tokens = sample_tokens(model, [prompt for prompt, *_ in asked], args.n, args.seed, alpha=args.alpha)
    seen = [look(decoded_field(model.heads["sdf"], t, model.autocast)) for t in tqdm(tokens, desc="looking", unit="shape")]
    print(f"{args.n} samples a prompt. obeyed: the share that has it; checker: how often the checker is right about held-out shapes")
    rows = []
    for (prompt, value, name, attribute, checker), i in zip(asked, range(0, len(seen), args.n)):
        obeyed = [holds(each, attribute, checker, value) for each in seen[i:i + args.n]]
        rows.append({"prompt": prompt, "obeyed": np.mean(obeyed), "checker": np.mean(right[name, attribute])})
    report(args, args.command, rows)


# ---------------------------------------------------------------------------- the commands

def main():
    common = Parser(add_help=False)
    common.add_argument("--checkpoint", default="checkpoints/tiny", help="folder of trained weights")
    common.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    common.add_argument("--seed", type=between(0), default=0, help="of the samples and of the points drawn")
    common.add_argument("--cache", default="cache", help="folder of the prepared data")
    common.add_argument("--out", default="out/evaluate", help="folder for the results")
    common.set_defaults(data=None, copies=1)
    parser = Parser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = {name: commands.add_parser(name, parents=[common], help=run.__doc__, description=run.__doc__) for name, run in COMMANDS.items()}
    for name in ("tokenizer", "generate", "attributes", "ablate-rgs", "images", "views"):
        reps = ["sdf"] if name == "attributes" else list(HEADS)
        sub[name].add_argument("--rep", type=heads.spelling, choices=reps, default="sdf", help="the representation to judge")
    flag = sub["tokenizer"].add_argument
    flag("--shapes", type=between(1, 520), default=260, help="how many held-out shapes, all classes alike")
    flag("--points", type=between(100, 10 ** 7), default=100_000, help="surface points a side of the F-score")
    flag = sub["cross"].add_argument
    flag("--shapes", type=between(1, 520), default=208, help="how many held-out shapes, all classes alike")
    flag("--reps", nargs="+", choices=list(HEADS), default=list(HEADS), help="representations to compare")
    flag = sub["joint"].add_argument
    flag("--checkpoints", nargs="+", required=True, help="folders that train.py made, e.g. with --tokens shared, own and joint")
    flag("--shapes", type=between(1, 520), default=52, help="how many held-out shapes to reconstruct, all classes alike")
    flag("--n", type=between(1, 1000), default=4, help="samples of every class name")
    flag("--resolution", type=int, choices=RESOLUTIONS, default=64, help="of surfaces")
    for name, n in (("generate", 16), ("ablate-rgs", 8)):
        flag = sub[name].add_argument
        flag("--n", type=between(2, 1000), default=n, help="samples of every prompt")
        flag("--prompts", nargs="+", choices=CLASSES, default=list(CLASSES), metavar="CLASS", help="class names to ask for")
        flag("--resolution", type=int, choices=RESOLUTIONS, default=64, help="of the meshes")
    flag("--alphas", nargs="+", type=alpha, default=[None, .1, .3], help="weights of the sampled tokens; 'none' is sampling only")
    for name, count in (("images", 208), ("views", 26)):
        flag = sub[name].add_argument
        flag("--shapes", type=between(1, 520), default=count, help="how many held-out shapes, all classes alike")
        flag("--resolution", type=int, choices=RESOLUTIONS, default=64, help="of the meshes")
    for name in ("tokenizer", "cross", "retrieval", "images", "views"):
        sub[name].add_argument("--data", help="the files that it was trained on, a tenth of which was held out (default: the built-in shapes)")
        sub[name].add_argument("--copies", type=between(1, 100), default=1, help="as in training")
    flag = sub["attributes"].add_argument
    flag("--n", type=between(1, 1000), default=8, help="samples of every prompt")
    flag("--check", action="store_true", help="only try the checkers, on the held-out shapes themselves")
    for name in ("generate", "attributes", "images"):
        sub[name].add_argument("--alpha", type=alpha, default="auto", help="RGS weight of the sampled tokens; 'none' is sampling only (default: "
                                                                            ".1 with a picture, none without)")
    args = parser.parse_args()
    start = time.time()
    claim(args.out)
    for stage, entry in read_config(args.checkpoint).items():
        print(f"{args.checkpoint}: {stage}, {entry.get('steps', '?')} steps, git revision {entry.get('revision', '?')}")
    COMMANDS[args.command](args)
    print(f"{time.time() - start:.0f} seconds")


COMMANDS = {"tokenizer": evaluate_tokenizer, "cross": evaluate_cross, "joint": evaluate_joint, "generate": evaluate_generate,
            "attributes": evaluate_attributes, "ablate-rgs": evaluate_ablate_rgs, "retrieval": evaluate_retrieval, "images": evaluate_images,
            "views": evaluate_views}

if __name__ == "__main__":
    command(main)
