"""train.py - every stage, chained: encoders -> tokenizer -> vision -> head -> backbone (+ prefix) -> reconstruct.

    python train.py --rep sdf                          # everything, built-in shapes, an hour on two cores
    python train.py --rep pc                           # what is missing for point clouds: if the above is done, a head
    python train.py --rep pc --tokens own              # the paper's setting: encoder, head and backbone for pc alone
    python train.py --rep sdf --data path/to/meshes    # your shapes (data.py)
    python train.py --model vat                        # another model (models.py)
    torchrun --nproc_per_node=8 train.py --rep sdf --size large      # many GPUs (engine/processes.py)

A stage that is done is skipped. A stage that was stopped goes on exactly where it was (engine/loop.py). runs/<name>/
holds what sample.py reads (safetensors, config.json), and for people <stage>.csv, <stage>-<step>.png and losses.png.
"""
from pathlib import Path

import torch

import encoders as encoders_
import heads as heads_
import ltm3d
import tokenizer as tokenizer_
from backbone import DENOISERS
from data import kinds_of, training_sets
from engine import processes
from engine.commands import Parser, UserError, add_device_flags, between, command
from engine.files import read_config, trained_stages
from engine.run import Run, copy_stages, locked
from evaluation import progress
from geometry.prepare import TRAIN_SHAPES, name_begins
from geometry.shapes import CLASSES
from heads import HEADS
from models import MODELS


def arguments(variants):
    parser = Parser(__doc__.split("\n")[0])
    stages = {stage: values for model in MODELS.values() for stage, values in model.DEFAULTS.items()}
    defaults = [", ".join(f"{stage} {values[i]:g}" for stage, values in stages.items()) for i in range(3)]
    everyday = parser.add_argument_group("everyday")
    flag = everyday.add_argument
    flag("--model", choices=list(MODELS), help="what to train, models.py (default: ltm3d, or the model of --stage)")
    flag("--rep", nargs="+", type=heads_.spelling, choices=[*HEADS, "all"], default=["sdf"], help="representations")
    flag("--data", help="files to train on, whatever `data.py --data` takes (default: the built-in shapes)")
    flag("--shapes", type=between(2), help=f"number of built-in training shapes (default: {TRAIN_SHAPES})")
    flag("--classes", nargs="+", choices=CLASSES, metavar="CLASS", help="built-in classes to learn (default: all)")
    names = list(dict.fromkeys(stage for model in MODELS.values() for stage in model.STAGES))
    flag("--stage", choices=names, help="train this stage alone (default: all that are not done)")
    flag("--size", choices=list(tokenizer_.SIZES), default="tiny", help="model size")
    flag("--steps", type=between(1), help=f"training steps of every stage (default: {defaults[0]})")
    flag("--batch", type=between(1), help=f"batch size of every stage (default: {defaults[1]})")
    flag("--from", dest="source", metavar="FOLDER", help="start with the stages of this trained folder; the backbone, "
         "and the stage of --stage, are trained here")
    flag("--finetune", action="store_true", help="with --from: not from random weights, but from those of the folder")
    flag("--out", help="run folder (default: runs/<size>, runs/<model>); with --tokens own, -<rep> is added to it")
    flag("--cache", default="cache", help="folder of the prepared data")
    flag("--workers", type=between(1), default=2, help="processes that prepare data")
    add_device_flags(everyday)

    flag = parser.add_argument_group("research").add_argument
    flag("--tokens", choices=["shared", "own", "joint"], default="shared", help="shared: heads on a tokenizer trained "
         "for sdf; own: a tokenizer and a backbone for each representation; joint: one trained with these heads")
    for kind, simplest in (("text", "bag"), ("image", "pixels")):
        flag(f"--{kind}-encoder", metavar="NAME", help="a frozen encoder of transformers (prompts/pretrained.py): "
             f"a name in the hub's cache, or a folder; or {simplest} (default: the built-in one, trained here)")
    known = list(dict.fromkeys(name for names in variants.values() for name in names))
    if known:
        flag("--variant", choices=known, help="in place of a part of the model, one of these (evaluation/peers.py)")
    flag("--denoiser", choices=list(DENOISERS), default="flow", help="formulation of the DenoiseNet")
    flag("--lr", type=between(1e-9, 1, float), help=f"peak learning rate (default: {defaults[2]})")
    flag("--seed", type=between(0), default=0, help="of weights, batches and noise")

    flag = parser.add_argument_group("many GPUs").add_argument
    flag("--micro-batches", type=between(1), help="shares of a batch: more need less memory (default: one a process)")
    flag("--shard", action="store_true", help="every process holds a share of the backbone: for large models")
    flag("--recompute", action="store_true", help="compute activations twice: less memory, longer steps")
    parser.set_defaults(variant=None)
    args = parser.parse_args()
    args.model = args.model or next(name for name in MODELS if args.stage in (None, *MODELS[name].STAGES))
    model = MODELS[args.model]
    others = [name for stage in model.DEFAULTS for name in variants.get(stage, {})]
    for name, known in (("stage", model.STAGES), ("size", model.SIZES), ("variant", others)):
        if getattr(args, name) not in (None, *known):
            parser.error(f"{args.model} has no {name} {getattr(args, name)}, but {', '.join(known)}")
    for name, usual in (("denoiser", "flow"), ("tokens", "shared")):
        if getattr(args, name) != usual and args.model != "ltm3d":
            parser.error(f"{args.model} has no --{name}; leave it out")
    args.rep = model.REPS if "all" in args.rep else args.rep
    if missing := {*args.rep} - {*model.REPS}:
        parser.error(f"{args.model} makes {', '.join(model.REPS)}, not {', '.join(sorted(missing))}")
    return args


def chain(args, variants, reps, first, folder):
    """All stages that are not done, or one."""
    with processes.first_process_ahead():
        model = MODELS[args.model]
        settings = {stage: (args.steps or s, args.batch or b, args.lr or r)
                    for stage, (s, b, r) in model.DEFAULTS.items()}
        run = Run(args, settings, reps, first, folder)
        run.variants, run.last = variants, model.LAST
        encoders_.load_pretrained(**run.encoder_names, device=run.device)         # if missing: an error now, not later
        if args.source:
            copy_stages(run, Path(args.source), name_begins(args.data), stages_of(args, reps) if args.stage else ())
        run.check_folder(name_begins(args.data))
        print(f"{run.folder}, running on {run.reason}")
        stages = stages_of(args, run.reps)
        if not stages:
            raise UserError("--image-encoder takes the place of the image tower; leave out --stage vision")
        check_order(args, run.folder, stages)
        for name in sorted(stages.keys() - {*trained_stages(run.folder)}):
            run.micro_batch_size(name)                        # an error now, not later
            if args.finetune and name not in trained_stages(args.source):
                raise UserError(f"{args.source} holds no trained {name} that could go on; leave out --finetune")
        kinds = ["surface", *["pictures"] * bool(args.image_encoder or model.SEEING & stages.keys())]
        kinds += kinds_of(HEADS[rep] for rep in run.first + run.reps)
        run.train, run.test = training_sets(args, list(dict.fromkeys(kinds)))
        run.classes, run.prompts = progress.classes_and_prompts(run.train, run.test, built_in=args.data is None)
    with locked(run.folder):
        for name, train in stages.items():
            goes_on = args.stage and name.removeprefix("head-") in args.rep     # trained with the tokenizer
            done = read_config(run.folder) if goes_on else trained_stages(run.folder)
            if name in done and not (args.stage and args.finetune and run.is_copied(name)):
                print(f"{name}: already done in {run.folder}")
                continue
            torch.manual_seed(run.seed)                       # initial weights, whichever stages came before
            train(run)
    if model.LAST in stages and not args.variant:
        print(f'next: python sample.py --checkpoint {run.folder} --rep {run.reps[-1]} --text "{run.prompts[0]}"')


def check_order(args, folder, stages):
    """A shipped folder lacks stages that only the training of others needs. They are not trained unasked."""
    done, names = {*trained_stages(folder)}, [*stages]
    own = done & MODELS[args.model].DEFAULTS.keys() - ltm3d.DEFAULTS.keys()
    missing = [name for i, name in enumerate(names) if name not in done and own & {*names[i:]}]
    if args.source and not args.stage and missing:
        raise UserError(f"{args.source} holds {', '.join(sorted(own))}, but no {', '.join(missing)}, which come "
                        "before; name the stage to train with --stage")


def stages_of(args, reps):
    """{name of a stage: function}, in order: all, or those of --stage; a head for each representation."""
    stages = MODELS[args.model].stages(reps)
    if args.image_encoder:                                    # takes the place of the image tower
        del stages["vision"]
    return {name: train for name, train in stages.items()
            if args.stage is None or name == args.stage or name.startswith(f"{args.stage}-")}


def main(variants={}):
    """variants: {stage: {name: a class in place of that of the model}}."""
    args = arguments(variants)
    processes.start()
    folder = args.out or f"runs/{args.size if args.model == 'ltm3d' else args.model}"
    reps = heads_.with_needs(args.rep)
    if args.tokens == "own":
        for rep in args.rep:
            own = heads_.with_needs([rep])
            chain(args, variants, own, own, f"{folder}-{rep}")
    else:
        chain(args, variants, reps, ["sdf"] if args.tokens == "shared" else reps, folder)
    processes.end()


if __name__ == "__main__":
    command(main)
