"""ltm3d.py - LTM3D as a whole: how each of its stages is trained, and how a prompt becomes a shape.

    python train.py --rep sdf --stage backbone         # trains one stage
    python sample.py --text "table"

The names in capitals are what models.py asks for.
"""
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import backbone as backbone_
import encoders as encoders_
import heads as heads_
import reconstruct as reconstruct_
import tokenizer as tokenizer_
from engine import processes
from engine.commands import UserError, cast_once
from engine.files import read_stage, trained_stages
from engine.loop import fit, shares_of_loss
from engine.state import start
from evaluation import progress  # a finished stage says how good it is; nothing that is learnt depends on it
from geometry.render import save_png
from heads import HEADS
from prompts import image_tower, text_tower
from prompts.reading import nouns_of

# steps, batch, peak learning rate, tuned at tiny. Stages are seeded by their position here: append, never insert
DEFAULTS = {
    "encoders": (800, 128, 1e-3), "tokenizer": (1500, 32, 2e-3), "vision": (1200, 64, 2e-3),
    "backbone": (1700, 64, 2e-3), "reconstruct": (600, 64, 2e-3), "head-sdf": (1500, 32, 2e-3),
    "head-pc": (2500, 32, 2e-3), "head-gs": (1700, 4, 2e-3), "head-mesh": (5000, 32, 2e-3),
}
STAGES = "encoders", "tokenizer", "vision", "head", "backbone", "reconstruct"
SEEING, LAST = {"vision", "backbone", "reconstruct"}, "backbone"
SIZES, REPS, SHIPPED = tokenizer_.SIZES, HEADS, "checkpoints/tiny"
SAMPLING = {"steps": 10, "denoise_steps": None, "cfg": 2., "cfg_image": 2., "temperature": 1., "rgs": "auto",
            "window": .75}                           # unless config.json has others for the backbone, "sampling"
JUDGED = 52          # held-out shapes that a head is measured on
save_picture = processes.first_process_only(save_png)


# ---------------------------------------------------------------------------- training: data, model, loss, save

def train_encoders(run):
    """The text tower, with a cloud tower that it learns to agree with."""
    # data
    captions = [caption for own in run.train.captions for caption in own]
    words, nouns = text_tower.vocabulary(captions), nouns_of(captions)

    def draw(split, rng):
        return text_tower.training_batch(split, model, rng, run.micro_batch_size("encoders"))

    # model
    settings = text_tower.SIZES[run.size]
    model = text_tower.TextAndCloud(words, nouns, **settings)
    start(run, "encoders", {"encoders": model}, settings=settings, vocabulary=words)

    # loss
    model, seconds = fit(run, "encoders", model, draw, lambda model, batch: model.loss(*batch))

    # save
    with run.autocast():
        found = dict(vocabulary=words, nouns=nouns, metrics=text_tower.retrieval(model, run.test))
    run.finish("encoders", seconds, {"encoders": model}, settings=settings, **found)


def train_tokenizer(run):
    """The tokenizer, with the heads that it is to serve. Data come last: how often a shape is drawn needs the loss."""
    run = run.turned()
    # model
    settings = tokenizer_.SIZES[run.size]
    model = nn.ModuleDict({"tokenizer": tokenizer_.Tokenizer(**settings)})
    model.update({rep: HEADS[rep](**settings) for rep in run.first})
    start(run, "tokenizer", {name if name == "tokenizer" else f"head-{name}": part for name, part in model.items()})
    before = tokenizer_.load(run.source).to(run.device) if run.finetune else None

    # loss: of the heads; with --finetune, tokens may move only a little: heads and backbone need few steps to follow
    def loss_of(model, batch):
        cloud, samples = batch
        tokens = model["tokenizer"](*cloud)                                                   # b n c
        loss, logs = heads_.loss(model, tokens, samples)
        moved = F.mse_loss(tokens, before(*cloud)) if run.finetune else torch.zeros(())
        return loss + tokenizer_.STAY * moved, logs | {"moved": moved.detach()}

    # data: with --finetune, training shapes are drawn in proportion to their loss at the start
    points = model["tokenizer"].points // 2

    def samples_of(split, rows, rng):
        return split.cloud(rows, points, rng), head_samples(run, run.first, split, rows, rng)

    odds = {run.train: shares_of_loss(run, model, loss_of, samples_of)} if run.finetune else {}

    def draw(split, rng):
        return samples_of(split, rng.choice(len(split), run.micro_batch_size("tokenizer"), p=odds.get(split)), rng)

    def show(model, path):
        tokens = encode(run, model["tokenizer"], run.test, limit=14)
        save_picture(path, progress.reconstructions(run, model, tokens, run.first[-1]))

    model, seconds = fit(run, "tokenizer", model, draw, loss_of, show)

    # save
    tokenizer, heads = model["tokenizer"], {rep: model[rep] for rep in run.first}
    tokenizer_.standardise(tokenizer, heads.values(), encode(run, tokenizer, run.train, limit=2000).to(run.device))
    metrics = progress.head_metrics(run, heads, encode(run, tokenizer, run.test, limit=JUDGED), run.first[-1])
    files = {"tokenizer": tokenizer} | {f"head-{rep}": head for rep, head in heads.items()}
    run.finish("tokenizer", seconds, files, settings=settings, heads=list(run.first), metrics=metrics)


def train_vision(run):
    """The image tower, with the cloud tower, and a reader that is thrown away."""
    # data: of each shape a cloud and VIEWS pictures
    aligner, tokenizer = text_tower.load(run.folder).to(run.device), tokenizer_.load(run.folder).to(run.device)
    tokens = {split: encode(run, tokenizer, split.repeated(8)) for split in (run.train, run.test)}       # shapes n c

    def draw(split, rng):
        count = -(-run.micro_batch_size("vision") // image_tower.VIEWS)           # k; of one picture, too, one
        rows = rng.permutation(len(split))[:count]            # k
        captioned = text_tower.captions_and_clouds(split, aligner, rows, rng)
        rows = np.tile(rows, image_tower.VIEWS)               # (v k)
        which = rng.integers(split.source.pictures, size=len(rows))
        x = tokens[split][split.rows_as_shown(rows, which)]                       # (v k) n c
        return split.pictures(rows, rng, which), captioned, x

    # model
    settings = image_tower.SIZES[run.size] | {"out": aligner.width}
    _, n, channels = tokens[run.test].shape
    vision = image_tower.ImageTower(**settings)
    reader = image_tower.Reader(len(vision.place), vision.width, n, channels)
    model = nn.ModuleDict({"vision": vision, "reader": reader, "aligner": aligner})
    aligner.freeze_text()
    start(run, "vision", {"vision": model["vision"]}, settings=settings)

    # loss
    def loss_of(model, batch):
        pictures, (ids, mask, cloud, true), x = batch
        text, cloud = model["aligner"].embed_text(ids, mask), model["aligner"].embed_cloud(*cloud)      # k e each
        captions, _ = model["aligner"].contrast(text, cloud, true)
        loss, logs = model["vision"].loss(pictures, cloud, model["reader"], x)
        return loss + captions, logs | {"captions": captions.detach()}

    model, seconds = fit(run, "vision", model, draw, loss_of)

    # save
    with run.autocast():
        metrics = image_tower.retrieval(model["vision"], model["aligner"], run.test)
    files = {"vision": model["vision"], "encoders": model["aligner"]}
    run.finish("vision", seconds, files, settings=settings, metrics=metrics)


def train_head(run, rep):
    """One head on frozen tokens, with noise of NOISE standard deviations."""
    # data
    run, stage = run.turned(), f"head-{rep}"
    tokenizer = tokenizer_.load(run.folder).to(run.device)
    others = [*HEADS[rep].needs, *(name for name in heads_.helpers(rep) if name in run.first)]
    needed = heads_.load(run.folder, others, run.device)      # to decode with
    tokens = {split: encode(run, tokenizer, split) for split in (run.train, run.test)}       # shapes n c

    def draw(split, rng):
        rows = rng.integers(len(split), size=run.micro_batch_size(stage))
        return tokens[split][rows], head_samples(run, [rep], split, rows, rng)

    # model: a head that the tokenizer was trained with goes on
    if stage in trained_stages(run.folder):
        model = nn.ModuleDict({rep: heads_.load(run.folder, [rep])[rep]}).requires_grad_()
    else:
        model = nn.ModuleDict({rep: HEADS[rep](**tokenizer_.SIZES[run.size])})
        start(run, stage, {stage: model[rep]})

    # loss
    def loss_of(model, batch):
        x, samples = batch
        return heads_.loss(model, x + tokenizer_.NOISE * torch.randn_like(x), samples)

    def show(model, path):
        save_picture(path, progress.reconstructions(run, needed | dict(model.items()), tokens[run.test][:14], rep))

    model, seconds = fit(run, stage, model, draw, loss_of, show)

    # save
    metrics = progress.head_metrics(run, needed | dict(model.items()), tokens[run.test][:JUDGED], rep)
    run.finish(stage, seconds, {stage: model[rep]}, metrics=metrics)


def train_backbone(run):
    """Prefix, masked auto-encoder and DenoiseNet, on frozen tokens and frozen encoders."""
    # data
    encoders, sizes, draw = tokens_and_prompts(run, "backbone", tokenizer_.load)
    heads = heads_.load(run.folder, run.first, run.device)

    # model
    settings = backbone_.SIZES[run.size] | sizes | {"denoiser": run.denoiser}
    model = run.part("backbone", backbone_.Backbone)(**settings)
    start(run, "backbone", {"backbone": model}, settings=settings, variant=run.variant, towers=run.encoder_names)

    # loss: in training at a random moment of generation, of held-out shapes the mean of eight
    def loss_of(model, batch):
        x, condition = batch[0], encoders.encode_drawn(batch[1])
        moments = [None] if model.training else [(i + .5) / 8 for i in range(8)]
        return sum(model.loss(x, condition, moment) for moment in moments) / len(moments), {}

    # save
    fit_generator(run, "backbone", model, draw, loss_of, encoders, heads, variant=run.variant, settings=settings)


def fit_generator(run, stage, model, draw, loss_of, encoders, heads,
                  generate=lambda model, condition, seeds: model.generate(condition, seeds), **entries):
    """Trains and saves what makes shape tokens from prompts. It shows samples while it learns, and judges some."""
    def show(model, path):
        with run.autocast():
            x = generate(model, encoders.encode(run.prompts), [(0, i) for i in range(len(run.prompts))])
        save_picture(path, progress.samples(run, heads, x))

    model, seconds = fit(run, stage, model, draw, loss_of, show)
    metrics = progress.class_accuracy(run, encoders, functools.partial(generate, model), heads)
    run.finish(stage, seconds, {stage: model}, towers=run.encoder_names, metrics=metrics, **entries)


def train_reconstruct(run):
    """The deterministic first guess of RGS."""
    # data
    encoders, sizes, draw = tokens_and_prompts(run, "reconstruct", tokenizer_.load)
    heads = heads_.load(run.folder, run.first, run.device)

    # model
    settings = reconstruct_.SIZES[run.size] | sizes
    model = reconstruct_.Reconstructor(**settings)
    start(run, "reconstruct", {"reconstruct": model}, settings=settings, towers=run.encoder_names)

    # loss
    def loss_of(model, batch):
        return model.loss(batch[0], encoders.encode_drawn(batch[1]))

    def show(model, path):
        with run.autocast():
            x, _ = model(encoders.encode(run.prompts))
        save_picture(path, progress.samples(run, heads, x))

    model, seconds = fit(run, "reconstruct", model, draw, loss_of, show)

    # save
    run.finish("reconstruct", seconds, {"reconstruct": model}, settings=settings, towers=run.encoder_names)


def head_samples(run, reps, split, rows, rng):
    """{rep: samples for its head}, of the first shapes, as many as the head's own stage takes."""
    return {rep: split.samples(rows[:run.micro_batch_size(f"head-{rep}")], HEADS[rep].reads, rng) for rep in reps}


def encode(run, tokenizer, split, limit=None, file="tokenizer"):
    """The tokens of a prepared set: shapes n c. file: of the tokenizer's weights."""
    file = run.folder / f"{file}.safetensors"
    return tokenizer_.encode_set(tokenizer, split, run.device, run.autocast, file, limit)


def tokens_and_prompts(run, stage, load, file="tokenizer"):
    """What generators stand on: frozen encoders, the sizes of tokens, and a function that draws a batch of tokens, with
    one caption and one picture of each shape. load, file: what loads the tokenizer, and the name of its weights."""
    encoders = encoders_.make(run.folder, **run.encoder_names, device=run.device)
    tokenizer = load(run.folder).to(run.device)
    tokens = {split: encode(run, tokenizer, split.repeated(8), file=file)
              for split in (run.train, run.test)}             # shapes n c
    _, n, channels = tokens[run.test].shape

    def draw(split, rng):
        drawn = encoders.draw(split, rng.integers(len(split), size=run.micro_batch_size(stage)), rng)
        return tokens[split][drawn.pop("rows")], drawn

    for split in (run.train, run.test):
        draw(split, np.random.default_rng(0))                 # encoders of transformers read all prompts here, once
    return encoders, {"tokens": n, "channels": channels, "widths": encoders.widths}, draw


def stages(reps):
    """{name of a stage: function of a run}, in the order of training."""
    heads = {f"head-{rep}": functools.partial(train_head, rep=rep) for rep in reps}
    return {"encoders": train_encoders, "tokenizer": train_tokenizer, "vision": train_vision, **heads,
            "backbone": train_backbone, "reconstruct": train_reconstruct}


# ---------------------------------------------------------------------------- sampling

class LTM3D:
    """The stages of a checkpoint folder that sampling needs. Reconstructor and heads are loaded when needed."""

    def __init__(self, folder, device, autocast, variants={}):
        self.folder, self.device, self.autocast, self.heads = folder, device, autocast, {}
        self.sampling = dict(read_stage(folder, "backbone").get("sampling", {}))
        if unknown := self.sampling.keys() - SAMPLING.keys():
            raise UserError(f"{folder}/config.json: the backbone's sampling has no {', '.join(sorted(unknown))}, but "
                            f"{', '.join(SAMPLING)}")
        self.backbone = cast_once(backbone_.load(folder, variants).to(device), autocast)

    @functools.cached_property
    def reconstruct(self):
        return cast_once(reconstruct_.load(self.folder).to(self.device), self.autocast)

    def load_heads(self, *reps):
        """The heads that decode these representations, and the heads that those need."""
        if not self.heads.keys() >= set(reps):
            self.heads |= heads_.load(self.folder, reps, self.device)

    def generate(self, condition, seeds, **options):
        """A condition (prefix.py) and one seed per sample -> shape tokens b n c. options: those of SAMPLING that are to
        differ from what the weights remember."""
        options = SAMPLING | self.sampling | options
        rgs, steps, cfg = options.pop("rgs"), options["steps"], {"text": options.pop("cfg")}
        cfg["image"] = options.pop("cfg_image")
        if not 1 <= steps <= self.backbone.tokens:
            raise UserError(f"{steps} steps are not between 1 and {self.backbone.tokens}, the number of shape tokens "
                            f"of {self.folder}: every step places at least one")
        reconstruct_.parse_rgs(rgs)
        if rgs == "auto" and not self.backbone.takes_rgs:
            rgs = "none"
        chunks = []
        for chunk, chunk_seeds in backbone_.cache_sized(self.backbone, condition, seeds):
            steer = reconstruct_.steering(lambda chunk: self.reconstruct(chunk), chunk, rgs)      # loaded if needed
            chunks.append(self.backbone.generate(chunk, chunk_seeds, steer=steer, cfg=cfg, **options).float())
        return torch.cat(chunks)                                                  # b n c

    def decode(self, tokens, rep, rng, resolution=128, points=None, faces=None):
        """Shape tokens n c -> Mesh, Cloud or Gaussians (geometry/export.py). faces: of "mesh", which then is a
        simplified surface; by default the mesh head decides."""
        head = heads_.SimplifiedMesh(faces) if rep == "mesh" and faces else None
        self.load_heads(*head.needs if head else [rep])
        head = head or self.heads[rep]
        return head.decode(tokens.to(self.device), self.heads, rng, self.autocast, resolution, points or head.COUNT)


load = LTM3D


def open_tokenizer(folder, reps, device):
    """-> the encoder, clouds of `points` points -> tokens b n c; {rep: head}."""
    return tokenizer_.load(folder).to(device), heads_.load(folder, reps, device)
