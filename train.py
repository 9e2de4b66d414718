"""train.py - every stage, chained: encoders -> tokenizer -> vision -> head -> backbone (+ prefix) -> reconstruct.

    python train.py --rep sdf                          # everything, built-in shapes, 40 minutes on two cores
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
from zlib import crc32

import torch
from torch import nn
from tqdm import tqdm

import backbone
import encoders
import heads
import reconstruct
import tokenizer
from data import kinds_of, training_sets
from engine import processes
from engine.commands import Parser, UserError, add_device_flags, between, command
from engine.files import make_folder, read_config, trained_stages
from engine.graphs import COMPILED, Replayed, compiled
from engine.run import Run, copy_stages, locked
from engine.stage import RELATIVES
from engine.state import Log, load_state, save_state, stop_after_step
from engine.step import EMA, held_out_loss, learning_rate, optimizers, recompute_blocks, seed_batch, set_rate, update
from geometry.prepare import TRAIN_SHAPES, name_begins

LTM3D = [encoders.TEXT, tokenizer.STAGE, encoders.VISION, *heads.STAGES, backbone.STAGE, reconstruct.STAGE]
SAVE, CHECK = 200, 100                       # steps between saves and held-out losses
SHOW, PICTURES = 500, 3                      # steps between pictures, at least; about how many
MOST_SKIPPED = 10                            # steps in a row


# ---------------------------------------------------------------------------- the loop of every stage

def fit(run, stage, model, draw, loss_of, show=None, choices=((),)):
    """Trains `model` on loss_of(model, draw(split), *choice), -> loss, logs; each micro-batch takes one of `choices`,
    tuples of numbers. Returns its moving average, frozen, and the seconds. show(model, path) draws its output."""
    steps, batch, lr = run.stages[stage].steps, run.stages[stage].batch, run.stages[stage].lr
    state_path = make_folder(run.folder) / f"{stage}.state.safetensors"
    model = model.to(run.device).train()
    ema = EMA(model)
    if run.recompute:
        recompute_blocks(model)
    opts = optimizers(model, lr)
    flags = {"steps": steps, "batch": batch, "seed": run.seed, "lr": lr, "data": crc32(run.train.version.encode()),
             "micro-batches": run.micro_batches, "others": run.fingerprint(stage)}
    start, sums = load_state(state_path, flags, model, ema, opts)
    log = Log(run.folder / f"{stage}.csv", start, sums, run.device)
    size = sum(p.numel() for p in model.parameters())
    origin = f", resuming from step {start}" if start else f", from {run.source}" if run.finetune else ""
    print(f"{stage}: {size / 1e6:.2f} M parameters, {steps} steps of {batch}{origin}")

    streamed = None
    if run.train.streamed:
        from engine.streamed import Streamed  # for sets that do not fit into a GPU's memory
        streamed = Streamed(run, stage, draw, start, steps)
    step_loss = compiled(loss_of) if run.graphs and size > COMPILED else loss_of

    def micro_batch(*choice):                                 # forward and backward pass
        samples = streamed.batch if streamed else draw(run.train)
        with run.autocast():
            loss, logs = step_loss(model, samples, *choice)
        (loss / run.micro_batches).backward()
        log.add({"loss": loss} | logs, 1 / run.micro_batches)

    def update_weights():                                     # unless a gradient is not finite
        finite = nn.utils.clip_grad_norm_(model.parameters(), 1.).isfinite()
        update(opts, finite)
        log.count(finite)
        model.zero_grad(set_to_none=not run.graphs)

    micro_batch, update_weights = Replayed(micro_batch, run.graphs), Replayed(update_weights, run.graphs)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=stage, unit="step", smoothing=.05, mininterval=1.,
               disable=processes.rank() > 0)
    with stop_after_step(bar, stage) as stop:
        for step in bar:
            run.progress.fill_(step / steps)
            # --- forward and backward passes: process r takes micro-batches r, r + world ...
            for i in range(processes.rank(), run.micro_batches, processes.world()):
                if streamed:
                    streamed.advance()
                micro_batch(*seed_batch(run, stage, step, i, choices))
            processes.sum_over_processes([p.grad for p in model.parameters() if p.grad is not None], log.now.values())

            # --- update
            rate = learning_rate(step, steps, lr)
            set_rate(opts, rate)
            update_weights()
            ema.update(step)

            # --- log, save, draw a picture; only the first process writes
            done, last, stopped = step + 1, step + 1 == steps, processes.any_process(stop)
            if done % CHECK == 0 or last:
                columns, skipped = log.write(done, rate, held_out_loss(run, ema.model, draw, loss_of))
                bar.set_postfix(columns)
                if skipped >= min(MOST_SKIPPED, steps):
                    raise UserError(f"{stage}: the gradients of {skipped:.0f} steps in a row are not finite; "
                                    f"give an --lr below {lr:g}, or look for NaN in the data")
            if done % SAVE == 0 or last or stopped:
                save_state(state_path, done, flags, model, ema, opts, log.sums | {"seconds": log.seconds()})
            if not stopped and (done % max(SHOW, -(-steps // PICTURES)) == 0 or last):
                if show:
                    with torch.no_grad():
                        show(ema.model, run.folder / f"{stage}-{done:06d}.png")
                run.plot()
            if stopped:
                bar.close()
                print(f"{stage} is saved at step {done} of {steps}; the same command resumes it")
                raise KeyboardInterrupt

    return ema.model, log.seconds()


# ---------------------------------------------------------------------------- the chain of stages

def stages_of(model):
    """The stages of a model, in the order of training."""
    return LTM3D if model == "ltm3d" else import_module(f"relatives.{model}").stages(LTM3D)


def chosen(args, stages, reps):
    """The names of the stages to train, all or --stage, with a head for each representation."""
    names = [stage.name for stage in stages if not stage.name.startswith("head-") or stage.name[5:] in reps]
    if args.image_encoder:                                    # replaces the image tower
        names.remove("vision")
    return [name for name in names if args.stage in (None, name, "head" if name.startswith("head-") else name)]


def chain(args, reps, joint, folder):
    """Trains all unfinished stages, or --stage. joint: the heads trained jointly with the tokenizer."""
    import judge
    with processes.first_process_ahead():
        stages = {stage.name: stage._replace(steps=args.steps or stage.steps, batch=args.batch or stage.batch,
                                             lr=args.lr or stage.lr) for stage in stages_of(args.model)}
        last = RELATIVES.get(args.model, "backbone")
        run, begin = Run(args, stages, heads.HEADS, reps, joint, last, folder, fit, judge), name_begins(args.data)
        encoders.load_pretrained(**run.encoder_names, device=run.device)          # a missing one is an error here
        names = chosen(args, stages.values(), reps)
        if args.source:
            copy_stages(run, Path(args.source), begin, names if args.stage else ())
        run.check_folder(begin)
        print(f"{run.folder}, running on {run.reason}")
        if not names:
            raise UserError("--image-encoder replaces the image tower; leave out --stage vision")
        check_order(args, run, names)
        done = {*trained_stages(run.folder)}
        for name in sorted({*names} - done):
            run.micro_batch_size(name)                        # a wrong --batch is an error here
            if args.finetune and name not in trained_stages(args.source):
                raise UserError(f"{args.source} holds no trained {name} to fine-tune; leave out --finetune")
        with locked(run.folder):                              # a folder that cannot be used is an error now
            pass
        own = ["pictures"] * bool(args.image_encoder) + [kind for name in names for kind in stages[name].kinds]
        kinds = ["surface", *own, *kinds_of(heads.HEADS[rep] for rep in joint + reps)]
        run.train, run.test = (split.to(run.device) for split in training_sets(args, list(dict.fromkeys(kinds))))
        run.classes, run.prompts = judge.classes_and_prompts(run.train, run.test, built_in=args.data is None)
    with locked(run.folder):
        for name in names:
            again = args.stage and name.removeprefix("head-") in args.rep       # trained with the tokenizer
            done = read_config(run.folder) if again else trained_stages(run.folder)
            if name in done and not (args.finetune and (again or name == args.stage) and run.is_copied(name)):
                print(f"{name}: already done in {run.folder}")
                continue
            torch.manual_seed(run.seed)                       # initial weights, whichever stages came before
            stages[name].train(run)
    if last in names and not args.variant:
        print(f'next: python sample.py --checkpoint {run.folder} --rep {run.reps[-1]} --text "{run.prompts[0]}"')


def check_order(args, run, names):
    """Raises an error if --from holds a relative but lacks its earlier stages: shipped folders omit some."""
    done = {*trained_stages(run.folder)}
    own = done & run.stages.keys() - {stage.name for stage in LTM3D}
    missing = [name for i, name in enumerate(names) if name not in done and own & {*names[i:]}]
    if args.source and not args.stage and missing:
        raise UserError(f"{args.source} holds {', '.join(sorted(own))}, but no {', '.join(missing)}, which come "
                        "before; name the stage to train with --stage")


# ---------------------------------------------------------------------------- the command

def arguments():
    from geometry.shapes import CLASSES
    parser = Parser(__doc__.split("\n")[0])
    defaults = [", ".join(f"{stage.name} {stage[i]:g}" for stage in LTM3D) for i in (2, 3, 4)]
    everyday = parser.add_argument_group("everyday")
    flag = everyday.add_argument
    flag("--model", choices=["ltm3d", *RELATIVES], help="what to train (default: ltm3d, or the model of --stage)")
    flag("--rep", nargs="+", type=heads.spelling, choices=[*heads.HEADS, "all"], default=["sdf"],
         help="representations")
    flag("--data", help="files to train on, as in `data.py --data` (default: the built-in shapes)")
    flag("--shapes", type=between(2), help=f"number of built-in training shapes (default: {TRAIN_SHAPES})")
    flag("--all-shapes", action="store_true",
         help="with --data: train on the held-out shapes, too, when all figures are known")
    flag("--classes", nargs="+", choices=CLASSES, metavar="CLASS",
         help=f"built-in classes to learn, of {', '.join(CLASSES)} (default: all)")
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
    for kind in ("text", "image"):
        flag(f"--{kind}-encoder", metavar="NAME", help="a frozen encoder of transformers (prompts/pretrained.py): "
             "a name in the hub's cache, or a folder (default: the built-in one, trained here)")
    flag("--variant", help="train a variant of the backbone or codec (python -m research.peers --help lists them)")
    flag("--denoiser", choices=list(backbone.DENOISERS), default="flow", help="formulation of the DenoiseNet")
    flag("--lr", type=between(1e-9, 1, float), help=f"peak learning rate (default: {defaults[2]})")
    flag("--seed", type=between(0), default=0, help="random seed of weights, batches and noise")

    flag = parser.add_argument_group("many GPUs").add_argument
    flag("--micro-batches", type=between(1), help="shares of a batch: more, less memory (default: one per process)")
    flag("--no-compile", action="store_true", help="on a GPU: eager, without CUDA graphs and torch.compile")
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
    reps = list(getattr(model, "REPS", heads.HEADS))
    args.rep = reps if "all" in args.rep else args.rep
    if missing := {*args.rep} - {*reps}:
        parser.error(f"{args.model} generates {', '.join(reps)}, not {', '.join(sorted(missing))}")
    return args


def main():
    args = arguments()
    processes.start()
    folder = args.out or f"runs/{args.size if args.model == 'ltm3d' else args.model}"
    reps = heads.with_needs(args.rep)
    if args.tokens == "own":
        for rep in args.rep:
            own = heads.with_needs([rep])
            chain(args, own, own, f"{folder}-{rep}")
    else:
        chain(args, reps, ["sdf"] if args.tokens == "shared" else reps, folder)
    processes.end()


if __name__ == "__main__":
    command(main)
