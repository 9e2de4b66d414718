"""evaluate.py - how good checkpoints are, in tables: reconstruction, generation, attributes, pictures.

LTM3D section 4 reports such tables on ShapeNet. Here they are on held-out built-in shapes, whose true solids are known:
an attribute is measured, not guessed by a classifier. evaluation/metrics.py says what each number means.

    python evaluate.py tokenizer --rep sdf       # stage 1 alone: encode and decode held-out shapes
    python evaluate.py cross                     # the same tokens through every head
    python evaluate.py joint --checkpoint A B    # shared tokens against own
    python evaluate.py low-poly --data FILES     # of files: ways to a mesh of few faces
    python evaluate.py generate --rep sdf        # from class names and captions: every metric
    python evaluate.py attributes                # "a table with one leg": does the shape have one?
    python evaluate.py words                     # prompts in words of their own, slips, plurals, synonyms
    python evaluate.py asked                     # what a stranger asked for, what was said, and a picture of each
    python evaluate.py retrieval                 # the built-in towers: does a caption or a picture find its shape?
    python evaluate.py images --rep sdf          # from a caption, a picture, both: how near to the true shape?
    python evaluate.py names --data FILES        # of files: does a sample fit its name, and is it new?
    python evaluate.py cross-view --rep sdf      # eight views of one shape: is it the same shape eight times?
    python evaluate.py ablate-rgs --rep sdf      # Reconstruction-Guided Sampling, its rules and weights
    python evaluate.py scales                    # of vat.py: bytes, and what they keep of a shape
    python evaluate.py ablate-vat                # of vat.py: trains it with parts in another way
    python evaluate.py registers                 # of lost.py: what the first registers say of a shape
    python evaluate.py search                    # of lost.py: do its features find shapes that are alike?
    python evaluate.py ablate-rida               # of lost.py: trains it with RIDA and without
    python evaluate.py versus                    # and overfit, ablate-prefix, ablate-encoder, ablate-denoiser,
                                                 # latent-spaces, data-scaling: these train (evaluation/experiments.py)

Each command prints a Markdown table and writes it, a CSV and a plot to --out. Single results are stored there too: a
run that was stopped goes on. Several checkpoints stand side by side: --checkpoint checkpoints/tiny runs/mine.
"""
import time
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from einops import repeat
from tqdm import tqdm

import heads
import lost
import vat
from data import turned_back, turns_to_front
from engine.commands import Parser, UserError, add_device_flags, between, command, pick_device
from engine.files import make_folder, read_config, trained_stages
from engine.state import plot_losses
from evaluation import exam
from evaluation.attributes import evaluate_attributes
from evaluation.experiments import TRAINED, VARIANTS, ablate_rgs, add_flags, compare_variants, overfit
from evaluation.judges import JUDGES
from evaluation.low_poly import evaluate_low_poly
from evaluation.metrics import chamfer, chamfer_matrix, emd, fscore
from evaluation.names import evaluate_names
from evaluation.registers import compare_rida, evaluate_registers, evaluate_search
from evaluation.results import labels, mean, write_table, write_tables
from evaluation.scales import compare_tokenizers, evaluate_scales
from evaluation.words import evaluate_words, show_asked
from geometry import training_pictures, training_samples
from geometry.render import contact_sheet, save_png
from geometry.shapes import CLASSES
from models import MODELS, model_in
from prompts import image_tower, text_tower
from reconstruct import RGS_FORMS
from sample import RESOLUTIONS

# ---------------------------------------------------------------------------- tokenizer and heads

def evaluate_tokenizer(args):
    """Held-out shapes, encoded and decoded, against the true ones."""
    judge, tables = JUDGES[args.rep], {}
    for folder, label in labels(args.checkpoint).items():
        cache = exam.result_cache(args, label, folder, *exam.tokenizer_stages([args.rep]), points=args.points)
        results = exam.judge_reconstructions(args, folder, [args.rep], cache, partial(judge, points=args.points))
        tables[label] = []
        for name in sorted({result["class"] for result in results}):
            rows = [result for result in results if result["class"] == name]
            tables[label].append({"class": name, "shapes": str(len(rows))} | mean(rows))
    print(" ".join(judge.__doc__.split()))
    write_tables(args.out, f"{args.command}-{args.rep}", tables)


def evaluate_cross(args):
    """The same tokens of held-out shapes through every head: how far apart are the shapes that come out?"""
    names, tables = [*args.reps, "true"], {}

    def judge(decoders, tokens, test, row, rng, autocast):
        def decode(rep):
            return decoders[rep].decode(tokens, decoders, rng, autocast, 64, 2048) if rep != "true" else test.shape(row)

        clouds = {rep: [decode(rep).surface(2048, rng)[0] for _ in range(2)] for rep in names}     # two of each: k 3
        return {f"{one} {other}": chamfer(clouds[one][0], clouds[other][1]) for one in names for other in names}

    for folder, label in labels(args.checkpoint).items():
        cache = exam.result_cache(args, label, folder, *exam.tokenizer_stages(args.reps))
        distance = mean(exam.judge_reconstructions(args, folder, args.reps, cache, judge))
        tables[label] = [{"": one} | {other: distance[f"{one} {other}"] for other in names} for one in names]
    print("Chamfer distance of 2048 points, mean over the shapes; a representation against itself is the floor")
    write_tables(args.out, args.command, tables, means=False)


def evaluate_joint(args):
    """Every head of several checkpoints: shared tokens, own tokens, an encoder trained with all heads."""
    references, classes = exam.clouds_and_classes(exam.held_out(args), args.seed)
    jobs = [exam.Job(f"name-{name}-{i}", name, None, (args.seed, i)) for name in CLASSES for i in range(args.n)]
    names, rows = [job.text for job in jobs], {}
    for folder, label in labels(args.checkpoint).items():
        config, model = read_config(folder), exam.open_model(args, folder)
        for rep in [stage.removeprefix("head-") for stage in trained_stages(folder) if stage.startswith("head-")]:
            cache = exam.result_cache(args, f"{label}-{rep}", folder, "tokenizer", *exam.stages_of(rep))
            judged = mean(exam.judge_reconstructions(args, folder, [rep], cache, partial(JUDGES[rep], points=0)))
            results = exam.sample_all(model, jobs, cache, exam.shape_result(model, rep, args.resolution))
            distance = chamfer_matrix(results["points"], references)              # samples r
            near = [x[classes == name].min().item() for x, name in zip(distance, names)]
            trained = [config[stage] for stage in ("tokenizer", f"head-{rep}", "backbone") if stage in config]
            rows[list(heads.HEADS).index(rep), folder] = {
                "rep": rep, "checkpoint": label,
                "reconstruction": ", ".join(f"{name} {value:.3f}" for name, value in judged.items()),
                "minutes": sum(entry["seconds"] for entry in trained) / 60,
                "right class": np.mean(classes[distance.argmin(1)] == names), "Chamfer to nearest": np.mean(near)}
    if not rows:
        raise UserError("joint compares heads on LTM3D's tokens; no --checkpoint holds any")
    print(f"minutes: of training. {args.shapes} held-out shapes reconstructed, {args.n} samples of every class name")
    write_table(args.out, args.command, [rows[key] for key in sorted(rows)])
    curves = [(label, Path(folder) / "backbone.csv", "held_out") for folder, label in labels(args.checkpoint).items()]
    if any(path.is_file() for _, path, _ in curves):          # an old folder may have none
        plot_losses({"backbone, held-out loss": curves}, Path(args.out) / "joint-losses.png")
        print(f"{args.out}/joint-losses.png")


# ---------------------------------------------------------------------------- generation

def evaluate_generate(args):
    """From captions of held-out shapes and from class names: faithful, like real shapes, whole, diverse, new?"""
    benchmark = exam.Exam(args, 4, 104) if args.quick else exam.Exam(args, args.n, args.shapes)
    rows, tables, options = [], {}, exam.given(rgs=args.rgs, cfg=args.cfg, registers=args.registers)
    for folder, label in labels(args.checkpoint).items():
        cache = exam.result_cache(args, label, folder, *exam.stages_of(args.rep), **options)
        model = exam.open_model(args, folder)
        scores, tables[label], named = benchmark.scores(model, cache, **options)
        rows.append({"checkpoint": label} | scores)
        draw_samples(args, f"{args.command}-{args.rep}-{label}", model, benchmark, named["tokens"])
    print(f"{len(benchmark.captions)} captions, {len(benchmark.names)} class names with {benchmark.n} samples each.")
    print(" ".join(exam.Exam.__doc__.split()))
    write_tables(args.out, f"{args.command}-{args.rep}-names", tables)
    real = {"checkpoint": "held-out shapes"} | benchmark.real()
    write_table(args.out, f"{args.command}-{args.rep}", [{key: real.get(key, "") for key in rows[0]}, *rows])


def draw_samples(args, name, model, benchmark, tokens):
    """Four samples of every class name, of different seeds from name to name."""
    count, pictures = min(4, benchmark.n), []
    rows = [i * benchmark.n + (i * count + j) % benchmark.n for i in range(len(benchmark.names)) for j in range(count)]
    for row in tqdm(rows, desc="pictures", unit="picture"):
        shape = model.decode(torch.from_numpy(tokens[row]), args.rep, benchmark.named[row].seed, args.resolution)
        pictures.append(shape.picture(160))
    save_png(f"{args.out}/{name}.png", contact_sheet(pictures, 2 * count, [benchmark.named[row].text for row in rows]))
    print(f"{args.out}/{name}.png")


# ---------------------------------------------------------------------------- pictures

def evaluate_retrieval(args):
    """Among 200 held-out shapes: does a full caption, does a picture of any side find the cloud of its shape?"""
    device, autocast, reason = pick_device(args.device, args.precision)
    print(f"running on {reason}")
    test, tables = exam.held_out(args, ("surface", "pictures")), {}
    for folder, label in labels(args.checkpoint).items():
        towers, vision = text_tower.load(folder).to(device), image_tower.load(folder).to(device)
        with autocast():
            recalls = {"caption": text_tower.retrieval(towers, test),
                       "picture": image_tower.retrieval(vision, towers, test)}
        tables[label] = [{"prompt": kind, "shapes": str(found["shapes"]), "R@1": found["recall_at_1"],
                          "R@5": found["recall_at_5"]} for kind, found in recalls.items()]
    write_tables(args.out, args.command, tables, means=False)


def evaluate_images(args):
    """Held-out shapes from their name, any caption, their longest one, a picture of a random side, the last two."""
    test, tables = exam.held_out(args, ("surface", "pictures")), {}
    references, classes = exam.clouds_and_classes(test, args.seed)
    rows = np.arange(min(args.shapes, len(test)))
    any_caption, longest = test.draw_captions(rows, np.random.default_rng(args.seed)), exam.longest_captions(test, rows)
    rng = np.random.default_rng(args.seed)
    which = rng.integers(test.source.pictures, size=len(rows))                    # r, a picture of each shape
    pictures, turns = test.pictures(rows, rng, which), test.turns(rows, which)    # r 3 s s, r
    true, again = ([test.shape(row).surface(8192, np.random.default_rng((args.seed, row, i)))[0] for row in rows]
                   for i in range(2))                         # r times k 3
    nothing = [None] * len(rows)
    prompts = {"name": (classes[rows].tolist(), nothing), "any caption": (any_caption, nothing),
               "longest caption": (longest, nothing), "picture": (nothing, pictures),
               "picture and longest caption": (longest, pictures)}
    floor = np.mean([chamfer(*pair) for pair in zip(true, again)])
    for folder, label in labels(args.checkpoint).items():
        cache = exam.result_cache(args, label, folder, *exam.stages_of(args.rep), "vision", rgs=args.rgs)
        model = exam.open_model(args, folder)
        result_of = exam.shape_result(model, args.rep, args.resolution, 8192)
        tables[label] = [{"prompt": "(two samplings of the true surface)", "Chamfer": floor,
                          "F-score": np.mean([fscore(*pair, .05) for pair in zip(true, again)]), "right class": ""}]
        columns = min(len(CLASSES), len(rows))
        drawn = enlarged(pictures[:columns], 3)               # 3 SIZE = 192 pixels
        for prompt, (texts, images) in prompts.items():
            prompted = zip(rows, texts, images)
            jobs = [exam.Job(f"{prompt}-{row}", text, image, (args.seed, int(row))) for row, text, image in prompted]
            results = exam.sample_all(model, jobs, cache, result_of, rgs=args.rgs)
            points = results["points"] if images is nothing else turned_back(results["points"], turns)    # r k 3
            clouds = torch.from_numpy(points[:, :exam.POINTS].copy())
            nearest, pairs = chamfer_matrix(clouds, references).argmin(1), list(zip(points, true))        # r
            tables[label].append({"prompt": prompt, "Chamfer": np.mean([chamfer(*pair) for pair in pairs]),
                                  "F-score": np.mean([fscore(*pair, .05) for pair in pairs]),
                                  "right class": np.mean(classes[nearest] == classes[rows])})
            drawn += [model.decode(torch.from_numpy(tokens), args.rep, job.seed, args.resolution).picture(192)
                      for tokens, job in zip(results["tokens"][:columns], jobs)]
            if args.data and prompt == "picture":
                draw_pairs(args, f"pictures-{args.rep}-{label}", model, jobs, results["tokens"])
        names = [name for name in ("the picture", *prompts) for _ in range(columns)]
        save_png(f"{args.out}/images-{args.rep}-{label}.png", contact_sheet(drawn, columns, names))
        print(f"{args.out}/images-{args.rep}-{label}.png")
    print(f"{len(rows)} held-out shapes, one sample each. To the true shape, by 8192 points: Chamfer distance, F-score "
          "at .05")
    write_tables(args.out, f"{args.command}-{args.rep}", tables, means=False)


def enlarged(pictures, times):
    """Pictures b 3 s s -> b images of bytes, each (s times) (s times) 3."""
    return [*repeat((pictures.clamp(0, 1) * 255).byte().numpy(), "b c h w -> b (h i) (w j) c", i=times, j=times)]


def draw_pairs(args, name, model, jobs, tokens):
    """Up to sixty pictures, evenly spread; to the right of each, the shape that was made of it."""
    drawn = []
    for i in tqdm(np.linspace(0, len(jobs) - 1, min(60, len(jobs))).astype(int), desc="pictures", unit="pair"):
        shape = model.decode(torch.from_numpy(tokens[i]), args.rep, jobs[i].seed, args.resolution)
        drawn += [*enlarged(jobs[i].picture[None], 2), shape.picture(128)]
    save_png(f"{args.out}/{name}.png", contact_sheet(drawn, 12))                  # six pairs a row
    print(f"{args.out}/{name}.png")


def evaluate_views(args):
    """Eight views of one held-out shape make eight shapes: how far apart are they? By rules of RGS."""
    test, tables, turns = exam.held_out(args), {}, turns_to_front(45 * np.arange(8))
    for folder, label in labels(args.checkpoint).items():
        cache = exam.result_cache(args, label, folder, *exam.stages_of(args.rep), "vision")
        model, tables[label] = exam.open_model(args, folder), []
        result_of = exam.shape_result(model, args.rep, args.resolution)
        for row in range(min(args.shapes, len(test))):
            name, shape = f"{test.classes[row]} {row}", test.shape(row)
            unlit = training_samples.draw_pictures(shape, [(45 * i, 20) for i in range(8)])
            views = training_pictures.relight(*unlit.values(), np.random.default_rng(0), vary=False)        # 8 3 s s
            distances = {"shape": name}
            for rule in args.rules:
                jobs = [exam.Job(f"{name}, {rule}-{i}", None, view, (args.seed, i)) for i, view in enumerate(views)]
                points = exam.sample_all(model, jobs, cache, result_of, rgs=rule)["points"]           # 8 k 3
                pairs = list(combinations(turned_back(points, turns) if args.data else points, 2))
                distances[f"Chamfer, {rule}"] = np.mean([chamfer(*pair) for pair in pairs])
                distances[f"EMD, {rule}"] = np.mean([emd(*pair) for pair in pairs])
            pair = [shape.surface(exam.POINTS, np.random.default_rng(i))[0] for i in range(2)]
            tables[label].append(distances | {"Chamfer floor": chamfer(*pair), "EMD floor": emd(*pair)})
    print(f"mean of all pairs of eight, {exam.POINTS} points each; floor: of two samplings of the true surface")
    write_tables(args.out, f"{args.command}-{args.rep}", tables)


# ---------------------------------------------------------------------------- the commands

COMMANDS = {
    "tokenizer": evaluate_tokenizer, "cross": evaluate_cross, "joint": evaluate_joint, "low-poly": evaluate_low_poly,
    "generate": evaluate_generate, "attributes": evaluate_attributes, "words": evaluate_words, "asked": show_asked,
    "retrieval": evaluate_retrieval, "images": evaluate_images, "names": evaluate_names, "cross-view": evaluate_views,
    "ablate-rgs": ablate_rgs, "scales": evaluate_scales, "ablate-vat": compare_tokenizers,
    "registers": evaluate_registers, "search": evaluate_search, "ablate-rida": compare_rida,
    **dict.fromkeys(VARIANTS, compare_variants), "overfit": overfit}


def arguments():
    common = Parser(add_help=False)
    common.add_argument("--seed", type=between(0), default=0, help="of the samples and of the points drawn")
    common.add_argument("--cache", default="cache", help="folder of the prepared data")
    common.add_argument("--out", default="out/evaluate", help="folder of the results")
    add_device_flags(common)
    common.set_defaults(data=None)
    parser = Parser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {}
    for name, function in COMMANDS.items():
        text = VARIANTS[name][0] if name in VARIANTS else function.__doc__
        parsers[name] = commands.add_parser(name, parents=[common], help=text, description=text)

    def flag(names, flag_name, **settings):
        for name in names:
            parsers[name].add_argument(flag_name, **settings)

    shipped_with = {"scales": vat.SHIPPED, "registers": lost.SHIPPED, "search": lost.SHIPPED}
    for name in COMMANDS:                                     # not in `common`: parsers share its flags and defaults
        shipped = shipped_with.get(name, "checkpoints/tiny")
        flag([name], "--checkpoint", nargs="+", default=[shipped], help="folders of trained weights")
    reps = list(heads.HEADS)
    generated = [name for name in TRAINED if name != "ablate-rida"]
    sampled = ["generate", "images", "names", "cross-view", "ablate-rgs", *generated]
    judged = ["tokenizer", *sampled]
    judged.remove("ablate-vat")
    files = ["tokenizer", "cross", "generate", "retrieval", "images", "cross-view", "registers", "search"]
    flag(judged, "--rep", type=heads.spelling, choices=reps, default="sdf", help="what to judge")
    flag(["cross"], "--reps", nargs="+", type=heads.spelling, choices=reps, default=reps, help="to compare")
    for names, least, count in ((["tokenizer"], 1, 260), (["cross", "images", "low-poly"], 1, 208),
                                (["scales", "registers"], 1, 208), (["generate"], 2, 208), (["joint"], 1, 52),
                                (["cross-view", "ablate-rgs"], 1, 26),
                                (TRAINED, 2, 104)):
        flag(names, "--shapes", type=between(least, 520), default=count, help="held-out shapes, of all classes alike")
    for names, count in ((["generate"], 16), (["attributes"], 8), (["joint", "ablate-rgs", *generated], 4)):
        flag(names, "--n", type=between(2, 1000), default=count, help="samples of each prompt")
    flag(["names", "low-poly"], "--data", required=True, help="the files that it was trained on")
    flag(["names"], "--names", type=between(2), default=200, help="how many names, evenly spread")
    flag(["joint", *sampled], "--resolution", type=int, choices=RESOLUTIONS, default=64, help="of surfaces")
    flag(files, "--data", help="the files that it was trained on, a tenth held out (default: the built-in shapes)")
    flag(["generate", "ablate-rgs", "registers", "search", *TRAINED], "--scorer", default="checkpoints/tiny",
         help="gives features of clouds and prompts: a trained folder, or a Python file with "
         "cloud(points, normals, colours) and text(prompts)")
    flag(["generate", "attributes", "words", "images"], "--rgs", metavar="RULE",
         help=f"{RGS_FORMS} (default: what the weights remember, else auto)")
    flag(["cross-view"], "--rules", nargs="+", default=["none", "auto"], metavar="RULE", help=f"of RGS: {RGS_FORMS}")
    flag(["words"], "--count", type=between(2, 10_000), default=200, help="prompts, and pairs; half as many variants")
    flag(["tokenizer", "scales"], "--points", type=between(100, 10 ** 7), default=100_000, help="of F-scores, a side")
    flag(["generate"], "--quick", action="store_true", help="three eighths of it: --n 4 --shapes 104")
    flag(["generate"], "--split", choices=["test", "validation"], default="test", help="held-out shapes: "
         "choose settings on validation, report numbers on test")
    flag(["generate", "names"], "--cfg", type=between(0, 100, float),
         help="guidance by the text; 1 is none (default: what the weights remember, else that of the model)")
    flag(["generate"], "--registers", type=between(1), help="of lost: stop after so many (default: all)")
    flag(["attributes"], "--check", action="store_true", help="only try the checkers, on the held-out shapes")
    add_flags(flag)
    parsers["overfit"].set_defaults(train_shapes=10, steps=400)
    parsers["scales"].set_defaults(grid=64)
    parsers["ablate-vat"].set_defaults(rep="sdf", grid=32, points=0)              # an eighth of the time; no F-score
    return parser.parse_args()


def main():
    args, start = arguments(), time.time()
    make_folder(args.out)
    pick_device(args.device, args.precision)                  # one that cannot be used is an error now
    if len(args.checkpoint) > 1 and args.command in ("ablate-rgs", *TRAINED):
        raise UserError(f"{args.command} takes one --checkpoint")
    for folder in args.checkpoint:
        if not read_config(folder):
            raise UserError(f"nothing is trained in {folder}; --checkpoint takes folders that train.py made")
        if args.command in ("cross-view", "ablate-rgs") and "rgs" not in MODELS[model_in(folder)].SAMPLING:
            raise UserError(f"{folder} holds {model_in(folder)}, which has no Reconstruction-Guided Sampling")
        for stage, entry in read_config(folder).items():
            print(f"{folder}: {stage}, {entry.get('steps', '?')} steps, git revision {entry.get('revision', '?')}")
    COMMANDS[args.command](args)
    print(f"{time.time() - start:.0f} seconds")


if __name__ == "__main__":
    command(main)
