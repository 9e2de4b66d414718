"""train.py - every stage, chained: encoders -> tokenizer -> vision -> head -> backbone (+ prefix) -> reconstruct.

    python train.py --rep sdf                          # everything, built-in shapes, half an hour on two cores
    python train.py --image-encoder built-in           # the same; prompts can be pictures, too
    python train.py --rep pc                           # the stages that pc still lacks: after the line above, one head
    python train.py --rep pc --tokens own              # the paper's setting: encoder, head and backbone for pc alone
    python train.py --rep sdf --data path/to/meshes    # your shapes (data.py)
    python train.py --model vat                        # another model (relatives/)
    torchrun --nproc_per_node=8 train.py --rep sdf --size large      # many GPUs (engine/processes.py)

A finished stage is skipped, a stopped stage resumes exactly. runs/<name>/ holds the checkpoint (safetensors,
config.json), logs (<stage>.csv), pictures (<stage>-<step>.png) and loss curves (losses.png).
"""
from importlib import import_module
from pathlib import Path

import torch

import backbone
import encoders
import heads
import judge
import reconstruct
import tokenizer
from data import training_sets
from engine import processes
from engine.commands import Parser, UserError, add_device_flags, between, command
from engine.files import read_config, read_stage, trained_stages
from engine.run import Run, copy_stages, locked
from engine.stage import RELATIVES
from geometry import training_samples
from geometry.prepare import TRAIN_SHAPES
from geometry.shapes import CLASSES
from representations import REPRESENTATIONS, spelling, with_needs

# ---------------------------------------------------------------------------- the chain of stages

def stages_of(model):
    """The stages of a model, in the order of training."""
    ltm3d = [encoders.TEXT, tokenizer.STAGE, encoders.VISION, *heads.stages(), backbone.STAGE, reconstruct.STAGE]
    return ltm3d if model == "ltm3d" else import_module(f"relatives.{model}").stages(ltm3d)


def names_of(args, stages, reps):
    """The names of all stages that these flags ask for, with a head for each representation. Built-in towers are
    trained; the image tower learns to agree with the text tower."""
    names = [stage.name for stage in stages if not stage.name.startswith("head-") or stage.name[5:] in reps]
    text, image = (name == encoders.BUILT_IN for name in (args.text_encoder, args.image_encoder))
    left_out = ["vision"] * (not image) + ["encoders"] * (not text and not image and args.model == "ltm3d")
    return [name for name in names if name not in left_out]


def chain(args, reps, joint, folder):
    """Trains all unfinished stages, or --stage. joint: the heads trained jointly with the tokenizer."""
    with processes.first_process_ahead():
        stages = {stage.name: stage._replace(steps=args.steps or stage.steps, batch=args.batch or stage.batch,
                                             lr=args.lr or stage.lr) for stage in stages_of(args.model)}
        last = RELATIVES.get(args.model, "backbone")
        run = Run(args, stages, reps, joint, last, folder, args.data and Path(args.data).resolve().stem)
        for kind, name in run.encoder_names.items():
            if name not in (None, encoders.BUILT_IN):
                encoders.load_pretrained(kind, name, run.device)                  # a missing one is an error here
        every = names_of(args, stages.values(), reps)
        names = [name for name in every if args.stage in (None, name, "head" if name.startswith("head-") else name)]
        if args.source:
            copy_stages(run, Path(args.source), names if args.stage else ())
        run.check_folder()
        print(f"{run.folder}, running on {run.reason}")
        if not names:
            kind = "image" if args.stage == "vision" else "text"
            raise UserError(f"--stage {args.stage} trains a built-in tower; give --{kind}-encoder built-in")
        check_order(args, run, names)
        done = {*trained_stages(run.folder)}
        for name in sorted({*names} - done):
            run.micro_batch_size(name)                        # a wrong --batch is an error here
            if args.finetune and name not in trained_stages(args.source):
                raise UserError(f"{args.source} holds no trained {name} to fine-tune; leave out --finetune")
            for before in {*stages[name].after} & {*every} - {*names}:
                read_stage(run.folder, before)                # a missing one is an error here
        with locked(run.folder):                              # a folder that cannot be used is an error now
            pass
        kinds = [training_samples.SURFACE, *[training_samples.PICTURES] * bool(args.image_encoder),
                 *(kind for name in names for kind in stages[name].kinds),
                 *(kind for rep in joint + reps for kind in REPRESENTATIONS[rep].kinds)]
        run.train, run.test = training_sets(args, list(dict.fromkeys(kinds)), run.device)
        run.classes, run.prompts = judge.classes_and_prompts(run.train, run.test, built_in=args.data is None)
    with locked(run.folder):
        for name in names:
            again = args.stage and name.removeprefix("head-") in args.rep       # trained with the tokenizer
            done = read_config(run.folder) if again else trained_stages(run.folder)
            if name in done and not (args.finetune and (again or name == args.stage) and run.is_copied(name)):
                print(f"{name}: already done in {run.folder}")
                continue
            train_stage(run, stages[name])
    if last in names and not args.variant:
        print(f'next: python sample.py --checkpoint {run.folder} --rep {run.reps[-1]} --text "{run.prompts[0]}"')


def train_stage(run, stage):
    """Trains a stage; if compiling it fails on this machine, once more without it, from the last save on."""
    torch.manual_seed(run.seed)                               # initial weights, whichever stages came before
    try:
        stage.train(run)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not run.compile:
            raise
        print(f"{stage.name}: torch.compile fails here ({str(error).splitlines()[0]}); training goes on without it")
        run.compile = False
        torch.manual_seed(run.seed)
        stage.train(run)
    judge.write_page(run.folder)


def check_order(args, run, names):
    """Raises an error if --from holds a relative but lacks its earlier stages: shipped folders omit some."""
    done = {*trained_stages(run.folder)}
    own = done & run.stages.keys() - {stage.name for stage in stages_of("ltm3d")}
    missing = [name for i, name in enumerate(names) if name not in done and own & {*names[i:]}]
    if args.source and not args.stage and missing:
        raise UserError(f"{args.source} holds {', '.join(sorted(own))}, but no {', '.join(missing)}, which come "
                        "before; name the stage to train with --stage")


# ---------------------------------------------------------------------------- the command

def arguments():
    parser = Parser(__doc__.split("\n")[0])
    defaults = [", ".join(f"{stage.name} {stage[i]:g}" for stage in stages_of("ltm3d")) for i in (2, 3, 4)]
    everyday = parser.add_argument_group("everyday")
    flag = everyday.add_argument
    flag("--model", choices=["ltm3d", *RELATIVES], help="what to train (default: ltm3d, or the model of --stage)")
    flag("--rep", nargs="+", type=spelling, choices=[*REPRESENTATIONS, "all"], default=["sdf"],
         help="representations")
    flag("--data", help="files to train on, as in `data.py --data` (default: the built-in shapes)")
    flag("--shapes", type=between(2), help=f"number of built-in training shapes (default: {TRAIN_SHAPES})")
    flag("--all-shapes", action="store_true",
         help="with --data: train on the held-out shapes, too, when all figures are known")
    flag("--classes", nargs="+", choices=CLASSES, metavar="CLASS",
         help=f"built-in classes to learn, of {', '.join(CLASSES)} (default: all)")
    flag("--image-encoder", metavar="NAME", help="learn from pictures, too: built-in, or a NAME as for --text-encoder "
         "(default: from texts alone)")
    flag("--stage", help="train this stage alone: encoders, tokenizer, vision, head, backbone, reconstruct, or one of "
         "--model (default: all that are not done)")
    flag("--size", choices=list(tokenizer.SIZES), default="tiny", help="model size")
    flag("--steps", type=between(1), help=f"training steps of every stage (default: {defaults[0]})")
    flag("--batch", type=between(1), help=f"batch size of every stage (default: {defaults[1]})")
    flag("--from", dest="source", metavar="FOLDER", help="copy the stages of this checkpoint, except the generator "
         "(backbone) and --stage, which are trained here")
    flag("--finetune", action="store_true", help="with --from: initialise with its weights")
    flag("--out", help="run folder (default: runs/<size>, runs/<model>); with --tokens own, -<rep> is added to it")
    flag("--cache", default="cache", help="folder of the prepared data")
    flag("--workers", type=between(1), default=2, help="processes that prepare data")
    add_device_flags(everyday)

    flag = parser.add_argument_group("research").add_argument
    flag("--tokens", choices=["shared", "own", "joint"], default="shared", help="shared: heads on a tokenizer trained "
         "for sdf; own: a tokenizer and a backbone for each representation; joint: one trained with these heads")
    flag("--text-encoder", metavar="NAME", default=encoders.BUILT_IN, help="built-in, which is trained here, or a "
         "frozen one of transformers (prompts/pretrained.py): a name in the hub's cache, or a folder")
    flag("--variant", help="train a variant of the backbone (python -m research.peers --help lists them)")
    flag("--denoiser", choices=list(backbone.DENOISERS), default="flow", help="formulation of the DenoiseNet")
    flag("--lr", type=between(1e-9, 1, float), help=f"peak learning rate (default: {defaults[2]})")
    flag("--seed", type=between(0), default=0, help="random seed of weights, batches and noise")

    flag = parser.add_argument_group("many GPUs").add_argument
    flag("--micro-batches", type=between(1), help="shares of a batch: more, less memory (default: one per process)")
    flag("--no-compile", action="store_true", help="on a GPU: without torch.compile and CUDA graphs")
    flag("--recompute", action="store_true", help="compute activations twice: less memory, longer steps")
    args = parser.parse_args()
    for name in ("data", "source", "out", "cache"):
        if getattr(args, name) == "":
            parser.error(f"--{'from' if name == 'source' else name} is empty; name a folder")
    if args.data and (args.classes or args.shapes):
        parser.error("--classes and --shapes choose built-in shapes; leave them or --data out")
    if args.all_shapes and not args.data:
        parser.error("--all-shapes is of --data; built-in shapes are unlimited")
    args.model = args.model or next((name for name in RELATIVES if (args.stage or "").startswith(f"{name}-")), "ltm3d")
    model, stages = import_module(f"relatives.{args.model}") if args.model in RELATIVES else None, stages_of(args.model)
    names = list(dict.fromkeys("head" if stage.name.startswith("head-") else stage.name for stage in stages))
    variants = [name for stage in stages for name in stage.variants]
    for name, known in (("stage", names), ("size", getattr(model, "SIZES", tokenizer.SIZES)), ("variant", variants)):
        if getattr(args, name) not in (None, *known):
            parser.error(f"{args.model} has no {name} {getattr(args, name)}, but {', '.join(known)}")
    for name, usual in (("denoiser", "flow"), ("tokens", "shared")):
        if getattr(args, name) != usual and model:
            parser.error(f"{args.model} has no --{name}; leave it out")
    reps = list(getattr(model, "REPS", REPRESENTATIONS))
    args.rep = reps if "all" in args.rep else args.rep
    if missing := {*args.rep} - {*reps}:
        parser.error(f"{args.model} generates {', '.join(reps)}, not {', '.join(sorted(missing))}")
    return args


def main():
    args = arguments()
    processes.start()
    folder = args.out or f"runs/{args.size if args.model == 'ltm3d' else args.model}"
    reps = with_needs(args.rep)
    if args.tokens == "own":
        for rep in args.rep:
            own = with_needs([rep])
            chain(args, own, own, f"{folder}-{rep}")
    else:
        chain(args, reps, ["sdf"] if args.tokens == "shared" else reps, folder)
    processes.end()


if __name__ == "__main__":
    command(main, less_memory="more --micro-batches, --recompute")
