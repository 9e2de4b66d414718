"""train.py - every stage of LTM3D, chained: encoders -> tokenizer -> vision -> head -> backbone (+ prefix) -> reconstruct.

    python train.py --rep sdf                          # everything, built-in shapes, an hour on two cores
    python train.py --rep pc                           # what is missing for point clouds: with the above at hand, a head
    python train.py --rep sdf --stage backbone         # one stage alone
    python train.py --rep pc --tokens own              # the paper's setting: encoder, head and backbone for pc alone
    python train.py --rep sdf --data path/to/meshes    # your shapes (data.py)
    python train.py --rep sdf --size base --device cuda
    python train.py --from checkpoints/tiny --generator diffusion --out runs/diffusion     # a peer of the backbone (evaluation/peers.py)
    torchrun --nproc_per_node=8 train.py --rep sdf --size large                        # many GPUs (engine/processes.py)

A stage that is done is skipped; one that was stopped goes on exactly where it was, because every
step draws its randomness from (seed, stage, step, part) alone. runs/<name>/ holds what sample.py reads
(safetensors, config.json) and what a person reads: <stage>.csv, losses.png, <stage>-<step>.png.
"""
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

import backbone as backbone_
from prompts import text_tower as encoders_
import heads as heads_
from engine import processes
import reconstruct as reconstruct_
import tokenizer as tokenizer_
import encoders as towers_
from prompts import image_tower as vision_
from evaluation import progress
from evaluation.peers import GENERATORS
from data import prepare
from geometry.prepare import TRAIN_SHAPES, begins
from engine.loop import fit, plot_losses
from heads import HEADS
from engine.commands import Parser, UserError, between, command, pick_device
from engine.files import claim, digest, read_config, save_weights, write_config, written
from geometry.render import contact_sheet, save_png
from geometry.captions import article
from geometry.shapes import CLASSES

STAGES = ("encoders", "tokenizer", "vision", "head", "backbone", "reconstruct")
DEFAULTS = {  # of the tiny size: steps, batch, peak learning rate
    "encoders": (800, 128, 1e-3), "tokenizer": (1500, 32, 2e-3), "vision": (1200, 64, 2e-3), "backbone": (1700, 64, 2e-3), "reconstruct": (600, 64, 2e-3),
    "head-sdf": (1500, 32, 2e-3), "head-pc": (2500, 32, 2e-3), "head-gs": (1700, 4, 2e-3), "head-mesh": (5000, 32, 2e-3),
}
JUDGED = 52          # held-out shapes that a head is judged by
BEFORE = {"vision": ("encoders", "tokenizer"), "backbone": ("encoders", "tokenizer", "vision"), "reconstruct": ("encoders", "tokenizer", "vision")}


# ---------------------------------------------------------------------------- the stages

class Run:
    """What every stage is given: the settings, the data, the place to write, and the stages before it."""

    def __init__(self, args, reps, first, folder):
        self.size, self.seed, self.folder = args.size, args.seed, Path(folder)
        self.generator, self.denoiser = args.generator, args.denoiser
        self.parts, self.shard, self.recompute, self.compile = args.parts or processes.world(), args.shard, args.recompute, args.compile
        if self.shard and processes.world() == 1:
            raise UserError("--shard needs several processes to share the backbone; start train.py with torchrun (engine/processes.py), or without --shard")
        if self.parts % processes.world():
            raise UserError(f"{self.parts} parts cannot be shared by {processes.world()} processes; give --parts {processes.world()} or a multiple")
        self.reps, self.first = reps, first              # to be able to decode; the heads that the encoder is trained with
        self.towers = {"text": args.text_encoder, "image": args.image_encoder}
        self.device, self.autocast, reason = pick_device(processes.own(args.device))
        if self.compile and self.device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            raise UserError("--compile needs a C++ compiler, and there is none; install one (g++), or leave --compile out")
        towers_.others(**self.towers, device=self.device)        # rather an error now than after the stages before
        if args.source:
            take_over(Path(args.source), claim(self.folder), self.towers)
        self.agree(args)
        print(f"{self.folder}, running on {reason}")
        self.settings = {stage: (args.steps or s, args.batch or b, args.lr or r) for stage, (s, b, r) in DEFAULTS.items()}
        kinds = dict.fromkeys(["surface", "pictures"] + [kind for rep in first + reps for kind in HEADS[rep].kinds])
        self.train, self.test = (prepare(split, count, args.cache, args.workers, kinds, args.data, args.copies, classes=args.classes)
                                 for split, count in (("train", args.shapes), ("test", None)))
        if min(len(self.train), len(self.test)) < 2:
            raise UserError(f"{args.data} has {len(self.train)} shapes to train on and {len(self.test)} held out, two of each are needed; "
                            f"{len(self.train.broken)} were left out" + f", see {self.train.folder}/skipped.csv" * bool(self.train.broken))
        common = [name for name, _ in Counter(self.test.classes).most_common(len(CLASSES))]
        self.classes = common if args.data else [name for name in CLASSES if name in common]
        self.prompts = [article(name) for name in self.classes] + ["a round table"] * ("table" in self.classes and args.data is None)       # drawn while training

    def agree(self, args):
        """What the folder holds has to be of the same encoders, size and shapes."""
        for stage, entry in read_config(self.folder).items():
            if entry.get("towers", self.towers) != self.towers:
                raise UserError(f"the {stage} in {self.folder} is conditioned on the encoders {entry['towers']}; give the same ones, or another --out")
            if entry["size"] != self.size:
                raise UserError(f"the {stage} in {self.folder} is of the size {entry['size']}; give --size {entry['size']}, or another --out")
            if entry.get("generator", self.generator) != self.generator:
                raise UserError(f"the backbone in {self.folder} is {entry['generator']}; give --generator {entry['generator']}, or another --out")
            if not entry["data"].startswith(begins(args.data)):
                raise UserError(f"the {stage} in {self.folder} learnt from {entry['data']}; give the same --data, or another --out")

    @processes.by_the_first
    def finish(self, stage, seconds, files, **entries):
        """Weights in half precision, then the entry of config.json that says the stage is done."""
        for name, module in files.items():
            save_weights(self.folder / f"{name}.safetensors", module.state_dict(), half=True)
        steps, batch, lr = self.settings[stage]
        before = BEFORE.get(stage, ("tokenizer",) if stage.startswith("head-") else ())
        made = {name: digest(path) for name in before if (path := self.folder / f"{name}.safetensors").is_file()}
        revision = subprocess.run("git rev-parse --short HEAD", shell=True, capture_output=True, text=True).stdout.strip()
        write_config(self.folder, stage, size=self.size, steps=steps, batch=batch, lr=lr, seed=self.seed, seconds=round(seconds),
                     data=self.train.folder.name, made_with=made, revision=revision, **entries)
        (self.folder / f"{stage}.state.safetensors").unlink(missing_ok=True)
        curves = ("training", "loss"), ("held-out shapes", "held_out")
        plot_losses({stage: [(label, self.folder / f"{stage}.csv", column) for label, column in curves] for stage in DEFAULTS},
                    self.folder / "losses.png")
        print(f"{stage}: done in {seconds / 60:.1f} minutes  {entries.get('metrics', '')}")

    def share(self, stage):
        """Shapes of a part of the batch."""
        batch = self.settings[stage][1]
        if batch % self.parts:
            raise UserError(f"a batch of {batch} ({stage}) cannot be shared by {self.parts} parts; give --batch {-(-batch // self.parts) * self.parts}")
        return batch // self.parts


def take_over(source, folder, towers):
    """All stages but the backbone, which those stand on or beside; a reconstructor only if it was conditioned on the same encoders."""
    if "tokenizer" not in heads_.trained(source):
        raise UserError(f"there is no trained tokenizer in {source}; --from takes checkpoints/tiny or a folder that train.py made")
    config = read_config(source)
    for stage in set(heads_.trained(source)) - {"backbone", *heads_.trained(folder)}:
        if config.get(stage, {}).get("towers", towers) != towers:
            continue
        with written(folder / f"{stage}.safetensors") as part:
            shutil.copyfile(source / f"{stage}.safetensors", part)
        if stage in config:                                   # else it was trained with the encoder only
            write_config(folder, stage, **config[stage])


def train_encoders(run):
    settings, words = encoders_.SIZES[run.size], encoders_.vocabulary(c for split in (run.train, run.test) for captions in split.captions for c in captions)
    model = encoders_.Encoders(words, **settings)

    def draw(split, rng):
        return encoders_.training_batch(split, model, rng, run.share("encoders"))

    model, seconds = fit(run, "encoders", model, draw, lambda model, batch: model.loss(*batch))
    with run.autocast():
        metrics = encoders_.retrieval(model, run.test)
    run.finish("encoders", seconds, {"encoders": model}, settings=settings, vocabulary=words, metrics=metrics)


def train_tokenizer(run):
    """The encoder, with the heads that it is to serve."""
    settings = tokenizer_.SIZES[run.size]
    model = nn.ModuleDict({"tokenizer": tokenizer_.Tokenizer(**settings)} | {rep: HEADS[rep](**settings) for rep in run.first})

    def draw(split, rng):
        rows = rng.integers(len(split), size=run.share("tokenizer"))
        return split.cloud(rows, 1024, rng), samples(run, run.first, split, rows, rng)

    def loss_of(model, batch):
        cloud, each = batch
        return heads_.loss(model, model["tokenizer"](*cloud), each)

    model, seconds = fit(run, "tokenizer", model, draw, loss_of,
                         lambda model, path: save_picture(path, progress.reconstructions(
                           run, model, tokenise(run, model["tokenizer"], run.test, limit=14), run.first[-1])))
    tokenizer, heads = model["tokenizer"], {rep: model[rep] for rep in run.first}
    # tokens of the training set: zero mean, unit variance per channel from here on
    tokenizer_.standardise(tokenizer, heads.values(), tokenise(run, tokenizer, run.train, limit=2000).to(run.device))
    metrics = progress.judged(run, heads, tokenise(run, tokenizer, run.test, limit=JUDGED), run.first[-1])
    run.finish("tokenizer", seconds, {"tokenizer": tokenizer} | {f"head-{rep}": head for rep, head in heads.items()}, settings=settings,
               heads=list(run.first), metrics=metrics)


def train_vision(run):
    """The image tower, with a reader that is not kept."""
    encoders, tokenizer = encoders_.load(run.folder).to(run.device), tokenizer_.load(run.folder).to(run.device)
    settings, tokens = vision_.SIZES[run.size] | {"out": encoders.width}, {split: tokenise(run, tokenizer, split) for split in (run.train, run.test)}
    _, n, channels = tokens[run.test].shape
    reader = reconstruct_.Reconstructor(n, channels, {"image": settings["dim"]}, **reconstruct_.SIZES[run.size] | {"depth": 1})
    model = nn.ModuleDict({"vision": vision_.Vision(**settings), "reader": reader})
    with run.autocast():
        clouds = {split: vision_.embedded(encoders, split) for split in (run.train, run.test)}

    def draw(split, rng):
        rows = rng.integers(len(split), size=run.share("vision"))
        return split.pictures(rows, rng), clouds[split], torch.from_numpy(rows), tokens[split][rows]

    def loss_of(model, batch):
        pictures, every, own, x = batch
        return model["vision"].loss(pictures, every, own, model["reader"], x)

    model, seconds = fit(run, "vision", model, draw, loss_of)
    with run.autocast():
        metrics = vision_.retrieval(model["vision"], encoders, run.test)
    run.finish("vision", seconds, {"vision": model["vision"]}, settings=settings, metrics=metrics)


def train_head(run, rep):
    """One head on frozen tokens, with the noise that the tokenizer had in training. One that learnt with the encoder goes on."""
    tokenizer = tokenizer_.load(run.folder).to(run.device)
    heads = heads_.load(run.folder, HEADS[rep].needs, run.device)
    begun = f"head-{rep}" in heads_.trained(run.folder)
    model = nn.ModuleDict(heads_.load(run.folder, [rep]) if begun else {rep: HEADS[rep](**tokenizer_.SIZES[run.size])}).requires_grad_()
    tokens = {split: tokenise(run, tokenizer, split) for split in (run.train, run.test)}

    def draw(split, rng):
        rows = rng.integers(len(split), size=run.share(f"head-{rep}"))
        return tokens[split][rows], samples(run, [rep], split, rows, rng)

    def loss_of(model, batch):
        x, each = batch
        return heads_.loss(model, x + tokenizer_.NOISE * torch.randn_like(x), each)

    model, seconds = fit(run, f"head-{rep}", model, draw, loss_of,
                         lambda model, path: save_picture(path, progress.reconstructions(run, heads | dict(model.items()), tokens[run.test][:14], rep)))
    run.finish(f"head-{rep}", seconds, {f"head-{rep}": model[rep]},
               metrics=progress.judged(run, heads | dict(model.items()), tokens[run.test][:JUDGED], rep))


def train_backbone(run):
    towers, heads, tokens, common = conditioned(run)
    settings = backbone_.SIZES[run.size] | common | {"denoiser": run.denoiser}
    model = GENERATORS[run.generator](**settings)

    def loss_of(model, batch):
        x, drawn = batch
        return model.loss(x, towers.read(drawn)), {}

    def show(model, path):
        with run.autocast():
            x = model.generate(towers.encode(run.prompts), seeds=[(0, i) for i in range(len(run.prompts))])
        save_picture(path, contact_sheet([progress.picture(run, heads, t) for t in x], 7, run.prompts))

    model, seconds = fit(run, "backbone", model, paired(run, "backbone", towers, tokens), loss_of, show)
    run.finish("backbone", seconds, {"backbone": model}, generator=run.generator, settings=settings, towers=run.towers,
               metrics={"nearest held-out shape is of the class asked for": progress.class_accuracy(run, towers, model, heads)})


def train_reconstruct(run):
    towers, heads, tokens, common = conditioned(run)
    settings = reconstruct_.SIZES[run.size] | common
    model = reconstruct_.Reconstructor(**settings)

    def loss_of(model, batch):
        x, drawn = batch
        return model.loss(x, towers.read(drawn))

    def show(model, path):
        with run.autocast():
            x, _ = model(towers.encode(run.prompts))
        save_picture(path, contact_sheet([progress.picture(run, heads, t) for t in x], 7, run.prompts))

    model, seconds = fit(run, "reconstruct", model, paired(run, "reconstruct", towers, tokens), loss_of, show)
    run.finish("reconstruct", seconds, {"reconstruct": model}, settings=settings, towers=run.towers)


# ---------------------------------------------------------------------------- what the stages share

save_picture = processes.by_the_first(save_png)


def samples(run, reps, split, rows, rng):
    """Samples for each head, of as many of the shapes as its own stage takes."""
    return {rep: HEADS[rep].samples(split, rows[:run.share(f"head-{rep}")], rng) for rep in reps}


def tokenise(run, tokenizer, split, limit=None):
    """Tokens n n c of a prepared set."""
    weights = run.folder / "tokenizer.safetensors"
    return tokenizer_.tokenise(tokenizer, split, run.device, run.autocast, weights if weights.is_file() else None, limit)


def conditioned(run):
    """What backbone and reconstructor both stand on: frozen towers and heads, the tokens of both sets, their sizes."""
    towers, tokenizer = towers_.make(run.folder, **run.towers, device=run.device), tokenizer_.load(run.folder).to(run.device)
    tokens = {split: tokenise(run, tokenizer, split) for split in (run.train, run.test)}
    _, n, channels = tokens[run.test].shape
    common = {"tokens": n, "channels": channels, "widths": towers.widths}
    return towers, heads_.load(run.folder, run.first, run.device), tokens, common


def paired(run, stage, towers, tokens):
    """What draws a batch of shape tokens, each with one of its captions and one of its pictures."""
    def draw(split, rng):
        rows = rng.integers(len(split), size=run.share(stage))
        return tokens[split][rows], towers.draw(split, rows, rng)
    for split in (run.train, run.test):
        draw(split, np.random.default_rng(0))                 # others' towers read all captions and pictures, once, now
    return draw


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--rep", nargs="+", type=heads_.spelling, choices=[*HEADS, "all"], default=["sdf"], help="representations to train")
    parser.add_argument("--tokens", choices=["shared", "own", "joint"], default="shared",
                        help="shared: heads on the tokens of one encoder, which is trained for sdf; own: an encoder and a backbone for "
                             "each representation alone; joint: one encoder trained with all these heads")
    parser.add_argument("--stage", choices=STAGES, help="train this stage alone (default: all that are not done); head also lets "
                        "one that the encoder was trained with go on learning, on frozen tokens")
    parser.add_argument("--size", choices=list(tokenizer_.SIZES), default="tiny", help="model size")
    for kind in towers_.KINDS:
        parser.add_argument(f"--{kind}-encoder", metavar="NAME", help="a frozen encoder of transformers to condition on, a hub name that "
                            "is in its cache or a folder (prompts/pretrained.py); default: the built-in one, which is trained here")
    parser.add_argument("--generator", choices=list(GENERATORS), default="masked", help="LTM3D's masked backbone, or a peer to measure it "
                        "against (evaluation/peers.py)")
    parser.add_argument("--denoiser", choices=list(backbone_.DENOISERS), default="flow", help="formulation of the DenoiseNet")
    for i, (name, kind, what) in enumerate((("steps", between(1), "training steps of a stage"), ("batch", between(1), "batch size"),
                                            ("lr", between(1e-9, 1, float), "peak learning rate"))):
        defaults = ", ".join(f"{stage} {values[i]:g}" for stage, values in DEFAULTS.items())
        parser.add_argument(f"--{name}", type=kind, help=f"{what} (default: {defaults})")
    parser.add_argument("--parts", type=between(1), help="a step's batch comes in so many parts, one after the other or shared by processes: more "
                        "take less memory (default: one for each process)")
    parser.add_argument("--shard", action="store_true", help="every process holds a share of the backbone, not a copy of it: for models that "
                        "are too large for one GPU")
    parser.add_argument("--recompute", action="store_true", help="what is inside a block is computed again on the way back, not kept: less memory, "
                        "longer steps")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks: shorter steps, once some minutes have gone by; needs a "
                        "C++ compiler")
    parser.add_argument("--data", help="files to train on, whatever `data.py --data` takes (default: the built-in shapes)")
    parser.add_argument("--copies", type=between(1, 100), default=1, help="of each file's shape to learn from: mirrored, stretched")
    parser.add_argument("--shapes", type=between(2), help=f"number of built-in training shapes (default: {TRAIN_SHAPES})")
    parser.add_argument("--classes", nargs="+", choices=CLASSES, metavar="CLASS", help="learn from built-in shapes of these alone (default: of all)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--seed", type=between(0), default=0, help="of weights and noise")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="a trained folder, whose stages other than the backbone are taken over "
                        "where --out has none")
    parser.add_argument("--out", help="run folder (default: runs/<size>); for own tokens, what -<rep> is added to")
    parser.add_argument("--cache", default="cache", help="folder of the prepared data")
    parser.add_argument("--workers", type=between(1), default=2, help="processes that prepare data")
    args = parser.parse_args()
    processes.start()
    folder, reps = args.out or f"runs/{args.size}", heads_.with_needs(args.rep)
    if args.tokens == "own":
        for rep in HEADS if "all" in args.rep else args.rep:
            own = heads_.with_needs([rep])
            chain(args, own, own, f"{folder}-{rep}")
    else:
        chain(args, reps, ["sdf"] if args.tokens == "shared" else reps, folder)
    processes.end()


def chain(args, reps, first, folder):
    """All stages that are not done, or one."""
    with processes.in_turn():
        run = Run(args, reps, first, folder)
        names = [name for stage in ([args.stage] if args.stage else STAGES) if not (stage == "vision" and args.image_encoder)
                 for name in ([f"head-{rep}" for rep in reps] if stage == "head" else [stage])]
        for name in names:
            if name not in heads_.trained(run.folder):
                run.share(name)                               # rather an error now than after the stages before
    for name in names:
        more = args.stage and name.removeprefix("head-") in args.rep                          # a head that was begun goes on
        if name in (read_config(run.folder) if more else heads_.trained(run.folder)):
            print(f"{name}: already done in {run.folder}")
            continue
        torch.manual_seed(run.seed)  # initial weights, the same whichever stages came before
        if name.startswith("head-"):
            train_head(run, name.removeprefix("head-"))
        else:
            globals()[f"train_{name}"](run)


if __name__ == "__main__":
    command(main)
