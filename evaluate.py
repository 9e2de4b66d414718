"""evaluate.py - how good checkpoints are, in tables: reconstruction, generation, attributes, pictures, ablations.

LTM3D section 4 reports such tables on ShapeNet; here they are on held-out built-in shapes. A command prints a Markdown
table, and writes it and a CSV to --out. Single results are stored there too: a run that was stopped resumes. Several
checkpoints are compared with --checkpoint checkpoints/tiny runs/mine.

    python evaluate.py tokenizer --rep sdf
    python evaluate.py generate --rep sdf
    python evaluate.py --help                    # all commands
"""
import time
from importlib import import_module

from engine.commands import Parser, UserError, add_device_flags, between, command, pick_device
from engine.files import make_folder, read_config
from engine.stage import RELATIVES
from geometry.prepare import TRAIN_SHAPES
from representations import REPRESENTATIONS, spelling
from sample import LIMITS, RESOLUTIONS, model_in

COMMANDS = {  # module of research/ and function, help
    "tokenizer": ("quality.evaluate_tokenizer", "held-out shapes, encoded and decoded"),
    "generate": ("quality.evaluate_generate", "samples of captions and class names, by every metric"),
    "attributes": ("attributes.evaluate_attributes", "\"a table with one leg\": does the sample have one?"),
    "retrieval": ("quality.evaluate_retrieval", "towers: does a caption or a picture find its shape among 200?"),
    "images": ("quality.evaluate_images", "from a caption, a picture, both: how near to the true shape?"),
    "names": ("names.evaluate_names", "of files: does a sample match its name, and is it new?"),
    "cross-view": ("quality.evaluate_views", "eight views of one shape: how far apart are the eight samples?"),
    "ablate-rgs": ("rgs.ablate_rgs", "Reconstruction-Guided Sampling, its rules and weights"),
    "overfit": ("experiments.overfit", "trains on ten chairs: does each caption give its shape?"),
    "versus": ("experiments.compare_variants", "trains LTM3D, latent diffusion, an autoregressive model and LoST"),
    "ablate-prefix": ("experiments.compare_variants", "trains the prefix and that of the paper"),
    "models": ("quality.draw_models", "the same prompts by several models, in one picture"),
    "latte3d": ("latte3d.evaluate_latte3d", "LATTE3D: are class and colour right, seen together in training or not?"),
    "prior": ("latte3d.evaluate_prior", "LATTE3D: are class and colour right in the prior's pictures?"),
    "scales": ("scales.evaluate_scales", "VAT: bytes, and what they keep of a shape"),
    "registers": ("registers.evaluate_registers", "LoST: what the first registers keep of a shape"),
    "search": ("registers.evaluate_search", "LoST: do its features find similar shapes?")}
COMPARED = [name for name, (function, _) in COMMANDS.items() if function == "experiments.compare_variants"]
TRAINED = ["overfit", *COMPARED]


def arguments():
    common = Parser(add_help=False)
    common.add_argument("--seed", type=between(0), default=0, help="of samples and points")
    common.add_argument("--cache", default="cache", help="folder of the prepared data")
    common.add_argument("--out", default="out/evaluate", help="folder of the results")
    add_device_flags(common)
    common.set_defaults(data=None, faces=None, rep="sdf")
    parser = Parser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name, parents=[common], help=text, description=text)
               for name, (_, text) in COMMANDS.items()}

    def flag(names, flag_name, **settings):
        for name in names:
            parsers[name].add_argument(flag_name, **settings)

    shipped = {"scales": "checkpoints/vat", "registers": "checkpoints/lost", "search": "checkpoints/lost",
               **dict.fromkeys(("latte3d", "prior"), "checkpoints/latte3d")}
    every = [f"checkpoints/{name}" for name in ("tiny", *RELATIVES)]
    for name in COMMANDS:                                     # not in `common`: parsers share its flags and defaults
        flag([name], "--checkpoint", nargs="+",
             default=every if name == "models" else [shipped.get(name, "checkpoints/tiny")],
             help="folders of trained weights")
    sampled = ["generate", "images", "names", "cross-view", "ablate-rgs", "overfit", *COMPARED]
    flag(["tokenizer", *sampled], "--rep", type=spelling, choices=list(REPRESENTATIONS), default="sdf",
         help="what to judge")
    flag([*sampled, "latte3d"], "--resolution", type=int, choices=RESOLUTIONS, default=64, help="of surfaces")
    for names, count in ((["tokenizer"], 260), (["generate", "images", "scales", "registers", "latte3d", "prior"], 208),
                         (["cross-view", "ablate-rgs"], 26), (COMPARED, 104)):
        flag(names, "--shapes", type=between(1, 520), default=count, help="held-out shapes, of all classes alike")
    flag(["tokenizer"], "--split", choices=["train", "test"], default="test", help="training or held-out shapes")
    for names, count in ((["generate"], 16), (["attributes"], 8), (["ablate-rgs", *COMPARED], 4)):
        flag(names, "--n", type=between(2, 1000), default=count, help="samples of each prompt")
    flag(["generate"], "--registers", type=between(1), help="LoST: stop after so many (default: all)")
    flag(["models"], "--text", nargs="+", help="prompts",
         default=["a blue lamp", "a red bed with a white blanket", "a black chair", "a green bottle"])
    flag(["latte3d"], "--unseen", type=between(1, 520), default=60, help="prompts of combinations that are held out")
    flag(["latte3d"], "--refine", type=between(1, 10_000), default=50, help="steps for one prompt alone")
    flag(["prior"], "--cfg", type=between(0, 100, float), default=3., help="scale of classifier-free guidance")
    flag(["names"], "--data", required=True, help="the files that it was trained on")
    flag(["names"], "--words", nargs="+", help="only a sheet: four samples of each of these words")
    flag(["names"], "--faces", type=between(*LIMITS["faces"][1:]), help="of a mesh, at most, as of sample.py")
    flag(["tokenizer", "generate", "retrieval", "images", "cross-view", "registers", "search"], "--data",
         help="the files that it was trained on (default: the built-in shapes)")
    flag(["generate", "ablate-rgs", "registers", "search", "prior", *TRAINED], "--scorer",
         default="checkpoints/tiny",
         help="trained folder, whose towers give features of clouds and prompts")
    flag(["ablate-rgs"], "--alphas", nargs="*", type=between(0, 1, float), default=[0, .05, .1, .15, .2, .3, .9],
         help="weights of the sampled tokens")
    flag(["ablate-rgs"], "--windows", nargs="*", type=between(.01, 1, float), default=[.25, .75],
         help="shares of the steps in which RGS acts, besides .47, the paper's, at a = .1")
    flag(["ablate-rgs", *COMPARED], "--seeds", type=between(1, 100), default=3,
         help="samplings, or trainings of each variant")
    flag(TRAINED, "--train-shapes", type=between(2), default=TRAIN_SHAPES, help="built-in training shapes")
    flag(TRAINED, "--steps", type=between(1), default=400, help="training steps of every variant")
    flag(TRAINED, "--batch", type=between(1), default=32, help="shapes a training step")
    flag(TRAINED, "--runs", default="runs/experiments", help="folder of the trained variants")
    parsers["overfit"].set_defaults(train_shapes=10)
    for name in ("images", "names"):
        parsers[name].set_defaults(resolution=128)            # at 64, n15 of the true surface is lower
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
        if args.command in ("cross-view", "ablate-rgs") and model_in(folder) != "ltm3d":
            raise UserError(f"{folder} holds {model_in(folder)}, which has no Reconstruction-Guided Sampling")
    module, function = COMMANDS[args.command][0].split(".")
    getattr(import_module(f"research.{module}"), function)(args)
    print(f"{time.time() - start:.0f} seconds")


if __name__ == "__main__":
    command(main)
