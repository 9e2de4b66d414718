"""run.py - a run folder: its stages, their compatibility with new stages, and how a finished stage is saved."""
import contextlib
import copy
import os
import shutil
import subprocess
from pathlib import Path
from zlib import crc32

import torch

from engine import processes
from engine.commands import UserError, pick_device
from engine.files import (
    atomic_write,
    check_shapes,
    digest,
    joint_heads,
    make_folder,
    read_config,
    read_stage,
    read_weights,
    save_weights,
    trained_stages,
    write_config,
)
from engine.networks import Block
from engine.state import plot_losses

try:
    import fcntl
except ImportError:                                           # Windows has none
    fcntl = None

@contextlib.contextmanager
def locked(folder):
    """In its body, no other command trains in the folder. The system releases the lock of a killed command."""
    if processes.rank():                                      # one lock for all processes of a command
        yield
        return
    path = make_folder(folder) / ".lock"
    with path.open("a+") as file:
        try:
            if fcntl:
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
            with contextlib.suppress(OSError):                # Windows keeps the file, and the folder may not be empty
                path.unlink()
                path.parent.rmdir()


class Run:
    """The argument of the training function of a stage.

    stages: {name: Stage}, with the steps, batch and learning rate of this run; heads: {rep: class}; reps: heads to
    train; joint: heads trained jointly with the tokenizer; last: the generator's stage; fit: the training loop; judge:
    the module judge.py. train.py adds prepared data: `train` and `test` (data.Prepared), `classes` and `prompts`.
    """

    def __init__(self, args, stages, heads, reps, joint, last, folder, fit, judge):
        self.folder, self.size, self.seed = Path(folder), args.size, args.seed
        self.stages, self.heads = stages, heads
        self.reps, self.joint, self.last, self.loop, self.judge = reps, joint, last, fit, judge
        self.variant, self.denoiser = args.variant, args.denoiser
        self.encoder_names = {"text": args.text_encoder, "image": args.image_encoder}
        self.micro_batches = args.micro_batches or processes.world()
        self.recompute = args.recompute
        self.source, self.finetune = args.source, args.finetune
        if self.finetune and not self.source:
            raise UserError("--finetune continues from trained stages; name their folder, --from checkpoints/tiny")
        if self.micro_batches % processes.world():
            raise UserError(f"{self.micro_batches} micro-batches cannot be shared by {processes.world()} processes; "
                            f"give --micro-batches {processes.world()} or a multiple")
        self.device, self.autocast, self.reason = pick_device(processes.own_device(args.device), args.precision)
        self.progress = torch.zeros((), device=self.device)   # of training, from 0 to 1
        self.graphs = self.device.type == "cuda" and not args.no_compile

    def fit(self, *args, **settings):
        """Trains a model (train.py) -> its moving average, and the seconds."""
        return self.loop(self, *args, **settings)

    def part(self, stage, default):
        """The class that a stage trains: the default, or that of --variant."""
        return self.stages[stage].variants.get(self.variant, default)

    def turned(self):
        """The same run, on files in eight positions (data.py): for stages without prompts. A prompt does not
        define the front, so the other stages train on shapes as oriented in their files."""
        other = copy.copy(self)
        other.train = self.train.repeated(8)
        return other

    def fingerprint(self, stage):
        """A number for how a stage is trained: size, encoders, variant, denoiser, the weights of stages before it."""
        weights = [self.folder / f"{name}.safetensors" for name in self.stages[stage].after]
        return crc32(repr([self.size, self.encoder_names, self.variant, self.denoiser if stage == self.last else None,
                           [digest(path) for path in weights if path.is_file()]]).encode())

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

    def check_folder(self, begin):
        for stage, entry in read_config(self.folder).items():
            self.check_stage(self.folder, stage, entry, begin)

    def check_stage(self, folder, stage, entry, begin):
        """A stage must have the same size, variant, heads and encoders, and a prepared set whose name starts with
        `begin`."""
        if self.size != entry["size"]:
            raise UserError(f"{stage} in {folder}: --size {entry['size']}; give that, or another folder")
        variant = entry.get("variant", None if stage in self.stages and self.variant in self.stages[stage].variants
                            else self.variant)
        if self.variant != variant:
            found = f"--variant {variant}; give that" if variant else "no --variant; leave it out"
            raise UserError(f"{stage} in {folder}: {found}, or give another folder")
        if entry.get("heads", self.joint) != self.joint:
            raise UserError(f"the {stage} in {folder} was trained for {', '.join(entry['heads'])}; "
                            "give the same --tokens, or another folder")
        if entry.get("towers", self.encoder_names) != self.encoder_names:
            names = " ".join(f"--{kind}-encoder {name}" for kind, name in entry["towers"].items() if name)
            raise UserError(f"{stage} in {folder}: {names or 'the built-in encoders'}; give these, or another folder")
        if not entry["data"].startswith(begin):
            raise UserError(f"the {stage} in {folder} learnt from {entry['data']}; "
                            "give the same --data, or another folder")

    def is_copied(self, stage):
        """Are the weights of a stage equal to those of --from?"""
        own, other = (Path(folder) / f"{stage}.safetensors" for folder in (self.folder, self.source))
        return other.is_file() and digest(own) == digest(other)

    def load_to_finetune(self, stage, files, longer=(), **settings):
        """With --finetune, loads the weights of a stage from --from, if it was trained with the same settings.
        files: {name of a weights file: its module}; longer: names of weights to which rows may have been added."""
        if not self.finetune:
            return
        entry = read_stage(self.source, stage)
        if any(entry.get(name, value) != value for name, value in settings.items()):
            raise UserError(f"the {stage} of {self.source} cannot be fine-tuned: its size, denoiser, encoder or "
                            "variant is another; give the flags that it was trained with")
        for name, module in files.items():
            path = f"{self.source}/{name}.safetensors"
            saved, own = read_weights(path), module.state_dict()
            for key in {*longer} & saved.keys():
                saved[key] = torch.cat([saved[key], own[key][len(saved[key]):].to(saved[key])])
            check_shapes(own, saved, path)
            module.load_state_dict(saved)

    @processes.first_process_only
    def finish(self, stage, seconds, files, **entries):
        """Saves weights in half precision, then the entry of config.json that marks the stage as done. Matrices of the
        backbone's transformer become int8: a DenoiseNet or a tokenizer would lose accuracy."""
        for file, module in files.items():
            matrices = [f"{block}.{name}" for block, part in module.named_modules() if isinstance(part, Block)
                        for name, w in part.named_parameters() if w.ndim == 2] if stage == "backbone" else ()
            save_weights(self.folder / f"{file}.safetensors", module.state_dict(), half=True, int8=matrices)
        own = self.stages[stage]
        weights = {name: self.folder / f"{name}.safetensors" for name in own.after}
        made_with = {name: digest(path) for name, path in weights.items() if path.is_file()}
        entries = {key: value for key, value in entries.items() if value is not None}         # no variant: no entry
        if self.finetune:
            before = read_config(self.source).get(stage, {})
            entries["finetuned"] = {key: before.get(key) for key in ("steps", "revision")}
        git = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True,
                             text=True)
        write_config(self.folder, stage, size=self.size, steps=own.steps, batch=own.batch, lr=own.lr, seed=self.seed,
                     seconds=round(seconds), data=self.train.version, made_with=made_with,
                     revision=git.stdout.strip(), **entries)
        (self.folder / f"{stage}.state.safetensors").unlink(missing_ok=True)
        print(f"{stage}: done in {seconds / 60:.1f} minutes  {entries.get('metrics', '')}")

    @processes.first_process_only
    def plot(self):
        columns = {"training": "loss", "held-out shapes": "held_out"}
        plot_losses({stage: [(label, self.folder / f"{stage}.csv", column) for label, column in columns.items()]
                     for stage in self.stages}, self.folder / "losses.png")
        self.judge.write_page(self.folder)


def copy_stages(run, source, begin, training):
    """Copies the stages of a trained folder that fit. Not copied: the generator, unless --stage names another stage;
    stages in `training`, those of --stage; those of other models; those trained on other pretrained encoders, or on
    other weights than those in the folder."""
    if Path(source).resolve() == run.folder.resolve():
        raise UserError(f"--from and --out are one folder, {source}; name another --out")
    if not run.stages.keys() & {*trained_stages(source)}:
        raise UserError(f"there is no trained stage in {source} that could be copied; "
                        "--from takes checkpoints/tiny or a folder that train.py made")
    config, folder = read_config(source), make_folder(run.folder)
    generator, joint = () if training else (run.last,), joint_heads(config)
    training = {*training} - joint.keys()                     # training of these heads is resumed
    wanted = [stage for stage in trained_stages(source)
              if stage in run.stages and stage not in (*generator, *training, *trained_stages(folder))
              and config.get(stage, {}).get("towers", run.encoder_names) == run.encoder_names]
    for stage in config.keys() & wanted:
        run.check_stage(source, stage, config[stage], begin)
    made_with = {stage: config[stage].get("made_with", {}) if stage in config else
                 {joint[stage]: digest(source / f"{joint[stage]}.safetensors")} for stage in wanted}
    for stage in sorted(wanted, key=lambda stage: len(made_with[stage])):         # what others were trained on first
        others = [name for name, weights in made_with[stage].items() if name in training
                  or (path := folder / f"{name}.safetensors").is_file() and digest(path) != weights]
        if others:
            print(f"{stage} is not copied from {source}: it was trained on other weights of {others[0]}")
            continue
        with atomic_write(folder / f"{stage}.safetensors") as part:
            shutil.copyfile(source / f"{stage}.safetensors", part)
        if stage in config:
            write_config(folder, stage, **config[stage])
