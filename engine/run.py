"""run.py - a run folder: which of its stages fit a command, and how a finished stage is saved.

config.json has an entry for each stage: the flags of train.py that it was made with, and the signatures of the stages
before it (engine/files.py). A stage fits a command that would make it with the same: one rule for reuse, for --from and
for resuming.
"""
import contextlib
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import torch

from engine import processes
from engine.commands import UserError, pick_device
from engine.files import (
    atomic_write,
    check_shapes,
    first_difference,
    joint_heads,
    make_folder,
    read_config,
    read_stage,
    read_weights,
    save_weights,
    signature,
    signatures,
    trained_stages,
    write_config,
)
from engine.networks import Block
from engine.state import plot_losses


@contextlib.contextmanager
def locked(folder):
    """In its body, no other command trains in the folder. The system releases the lock of a killed command."""
    if processes.rank():                                      # one lock for all processes of a command
        yield
        return
    path = make_folder(folder) / ".lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"process {path.read_text()} trains in {folder} already; "
                            "wait until it has ended, or give another --out") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):                # the folder may not be empty
                path.unlink()
                path.parent.rmdir()


class Run:
    """The argument of the training function of a stage.

    stages: {name: Stage}, with the steps, batch and learning rate of this run; reps: heads to train; joint: heads
    trained jointly with the tokenizer; last: the generator's stage; data: the name of --data. train.py adds prepared
    sets: `train` and `test` (data.Prepared), `classes` and `prompts`.
    """

    def __init__(self, args, stages, reps, joint, last, folder, data):
        self.folder, self.size, self.seed = Path(folder), args.size, args.seed
        self.stages, self.reps, self.joint, self.last, self.data = stages, reps, joint, last, data
        self.variant, self.denoiser = args.variant, args.denoiser
        self.tokens = f"joint --rep {' '.join(reps)}" if args.tokens == "joint" else args.tokens
        self.encoder_names = {"text": args.text_encoder, "image": args.image_encoder}
        self.micro_batches = args.micro_batches or processes.world()
        self.share = processes.world() / self.micro_batches   # weight of a micro-batch in the loss of its process
        self.recompute = args.recompute
        self.source, self.finetune = args.source, args.finetune
        if self.finetune and not self.source:
            raise UserError("--finetune continues from trained stages; name their folder, --from checkpoints/tiny")
        if self.micro_batches % processes.world():
            raise UserError(f"{self.micro_batches} micro-batches cannot be shared by {processes.world()} processes; "
                            f"give --micro-batches {processes.world()} or a multiple")
        self.device, self.autocast, self.reason = pick_device(processes.own_device(args.device), args.precision)
        self.compile = self.device.type == "cuda" and not args.no_compile

    def class_of(self, stage, default):
        """The class that a stage trains: the default, or that of --variant."""
        return self.stages[stage].variants.get(self.variant, default)

    def micro_batch_size(self, stage):
        """Shapes in a micro-batch."""
        batch, smallest = self.stages[stage].batch, self.stages[stage].smallest
        if batch % self.micro_batches:
            fixed = -(-batch // self.micro_batches) * self.micro_batches
            raise UserError(f"a batch of {batch} ({stage}) cannot be cut into {self.micro_batches} micro-batches; "
                            f"train it alone: --stage {'head' if stage.startswith('head-') else stage} --batch {fixed}")
        if batch // self.micro_batches < smallest:
            raise UserError(f"{stage} compares shapes; give --batch {smallest * self.micro_batches} or more")
        return batch // self.micro_batches

    # ------------------------------------------------------------------------ which stages fit

    def made_by(self, stage):
        """{flag: value} of what decides which weights a stage gets, but for the stages before it."""
        plan = self.stages[stage]
        every = {"variant": self.variant if plan.variants else None, "denoiser": self.denoiser, "tokens": self.tokens,
                 **{f"{kind}-encoder": name for kind, name in self.encoder_names.items()}}
        return {"size": self.size, "data": self.data} | {flag: every[flag] for flag in plan.flags}

    def made_with(self, stage):
        """{stage before it: its signature}"""
        present = signatures(self.folder)
        return {name: present[name] for name in self.stages[stage].after if name in present}

    def flags(self, stage):
        """What has to stay the same while a stage is trained."""
        plan = self.stages[stage]
        return {"steps": plan.steps, "batch": plan.batch, "lr": plan.lr, "seed": self.seed,
                "micro-batches": self.micro_batches, "data": self.train.version} | self.made_by(stage) | {
                f"stage {name}": signed for name, signed in self.made_with(stage).items()}

    def misfit(self, stage, entry):
        """Why a trained stage is none that this command would make; None if it is."""
        return first_difference(entry["flags"], self.made_by(stage))

    def check_folder(self):
        """All stages of the run folder have to fit."""
        for stage, entry in read_config(self.folder).items():
            if stage in self.stages and (difference := self.misfit(stage, entry)):
                raise UserError(f"stage {stage} of {self.folder} was trained {difference}; give that, or another --out")

    def is_copied(self, stage):
        """Are the weights of a stage those of --from?"""
        own = signatures(self.folder)
        return stage in own and own[stage] == signatures(self.source).get(stage)

    # ------------------------------------------------------------------------ how a stage begins and ends

    def load_to_finetune(self, stage, files, settings, longer=()):
        """With --finetune, loads the weights of a stage from --from, if it was trained with the same settings.
        files: {name of a weights file: its module}; longer: names of weights to which rows may have been added."""
        if not self.finetune:
            return
        entry = read_stage(self.source, stage)
        difference = first_difference(entry["flags"] | {"data": None}, self.made_by(stage) | {"data": None})
        if difference or entry.get("settings", settings) != settings:
            raise UserError(f"stage {stage} of {self.source} cannot be fine-tuned: it was trained "
                            f"{difference or 'with other sizes'}; give the flags that it was trained with")
        for name, module in files.items():
            path = f"{self.source}/{name}.safetensors"
            saved, own = read_weights(path), module.state_dict()
            for key in {*longer} & saved.keys():
                saved[key] = torch.cat([saved[key], own[key][len(saved[key]):].to(saved[key])])
            check_shapes(own, saved, path)
            module.load_state_dict(saved)

    @processes.first_process_only
    def finish(self, loop, files, **entries):
        """Saves weights in half precision, then the entry of config.json that marks the stage as done. files: {name:
        module}. Matrices of the backbone's transformer become int8: a DenoiseNet or a tokenizer would lose accuracy."""
        stage, plan, config = loop.stage, self.stages[loop.stage], read_config(self.folder)
        for file, module in files.items():
            matrices = [f"{block}.{name}" for block, part in module.named_modules() if isinstance(part, Block)
                        for name, w in part.named_parameters() if w.ndim == 2] if stage == "backbone" else ()
            save_weights(self.folder / f"{file}.safetensors", module.state_dict(), half=True, int8=matrices)
            if file != stage and file in config:              # another stage's weights have learnt, too
                write_config(self.folder, file, signature=signature(self.folder, file, config[file]))
        if self.finetune:
            before = read_config(self.source).get(stage, {})
            entries["finetuned"] = {key: before.get(key) for key in ("steps", "revision")}
        git = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True,
                             text=True)
        entry = {"flags": self.made_by(stage), "made_with": self.made_with(stage), "steps": plan.steps,
                 "batch": plan.batch, "lr": plan.lr, "seed": self.seed, "seconds": round(loop.log.seconds()),
                 "data": self.train.version, "revision": git.stdout.strip()} | entries
        write_config(self.folder, stage, **entry, signature=signature(self.folder, stage, entry))
        loop.state_path.unlink(missing_ok=True)
        print(f"{stage}: done in {loop.log.seconds() / 60:.1f} minutes  {entries.get('metrics', '')}")

    @processes.first_process_only
    def plot(self):
        columns = {"training": "loss", "held-out shapes": "held_out"}
        plot_losses({stage: [(label, self.folder / f"{stage}.csv", column) for label, column in columns.items()]
                     for stage in self.stages}, self.folder / "losses.png")


def copy_stages(run, source, training):
    """Copies the stages of a trained folder that fit. Not copied: the generator, unless --stage names another stage;
    stages in `training`, those of --stage; those of other models; those trained on other pretrained encoders, or on
    other weights than those in the folder."""
    if Path(source).resolve() == run.folder.resolve():
        raise UserError(f"--from and --out are one folder, {source}; name another --out")
    if not run.stages.keys() & {*trained_stages(source)}:
        raise UserError(f"there is no trained stage in {source} that could be copied; "
                        "--from takes checkpoints/tiny or a folder that train.py made")
    config, folder = read_config(source), make_folder(run.folder)
    joint, generator = joint_heads(config), () if training else (run.last,)
    training = {*training} - joint.keys()                     # training of these heads is resumed
    left_out = {*generator, *training, *trained_stages(folder)}
    wanted = [stage for stage in trained_stages(source) if stage in run.stages and stage not in left_out]
    encoders = "text-encoder", "image-encoder"
    made_with = {stage: {joint[stage]: config[joint[stage]]["signature"]} for stage in joint}
    made_with |= {stage: entry["made_with"] for stage, entry in config.items()}
    for stage in sorted(wanted, key=lambda stage: len(made_with[stage])):         # what others were trained on first
        flags, own = config[stage]["flags"] if stage in config else {}, run.made_by(stage)
        if any(flags.get(name) != own[name] for name in encoders if name in flags):
            continue
        if difference := first_difference(flags, own):
            raise UserError(f"stage {stage} of {source} was trained {difference}; give that, or another --from")
        present = signatures(folder)
        others = [name for name, before in made_with[stage].items()
                  if name in training or present.get(name, before) != before]
        if others:
            print(f"{stage} is not copied from {source}: it was trained on other weights of {others[0]}")
            continue
        with atomic_write(folder / f"{stage}.safetensors") as part:
            shutil.copyfile(Path(source) / f"{stage}.safetensors", part)
        if stage in config:
            write_config(folder, stage, **config[stage])
