"""encoders.py - prompt -> condition tokens: the frozen text and image encoders (LTM3D section 4).

    condition = {"text": (tokens b t e, mask b t), "image": (tokens b t e, mask b t)}          one kind or both

The paper freezes CLIP and DINOv2. Here each tower is either built in (prompts/text_tower.py, prompts/image_tower.py),
trained from nothing in minutes, or any of `transformers` (prompts/pretrained.py); config.json remembers which.

    python train.py --rep sdf --stage encoders                                # trains the built-in text tower
    python train.py --rep sdf --stage vision --image-encoder built-in         # trains the built-in image tower
"""
import functools

import torch
from torch import nn

import judge
import tokenizer
from engine.files import read_config, read_stage
from engine.loop import Loop
from engine.stage import Stage
from prompts import image_tower, text_tower
from prompts.reading import nouns_of, untrained

BUILT_IN = "built-in"
KEPT = {  # kinds of prompts: {those that are not dropped: share of training samples}
    ("text",): {(): .1, ("text",): .9},
    ("text", "image"): {(): .1, ("text",): .35, ("image",): .3, ("text", "image"): .25}}
RECOLOURED = .5     # share of pictures beside a caption whose named colours are replaced


class Encoders:
    def __init__(self, towers, nouns={}):                     # nouns: of the training captions (reading.nouns_of)
        self.towers = towers                                  # {"text": tower}, or {"text": tower, "image": tower}
        self.widths = {kind: tower.width for kind, tower in self.towers.items()}  # e of each
        self.pretrained = {kind for kind, tower in self.towers.items() if hasattr(tower, "model")}
        self.nouns = nouns
        self.caches = {}                                      # of prepared sets

    def encode(self, prompts=None, pictures=None):
        """b strings, pictures b 3 s s, or both -> the condition of backbone and reconstructor."""
        given = {"text": prompts, "image": pictures}
        return {kind: self.towers[kind].tokens(x) for kind, x in given.items() if x is not None}

    def remarks(self, prompt):
        """The warnings about a text prompt (prompts/reading.py). For the built-in tower an unknown noun is an error."""
        return untrained(prompt, self.nouns) if "text" in self.pretrained else self.towers["text"].remarks(prompt)

    def draw_prompts(self, split, rows):
        """One prompt of each kind for each training shape, and which are not dropped, for `encode_drawn`; and the rows
        of these shapes."""
        captions = split.table.draw_captions(rows)            # b
        u, low, kept = torch.rand(len(rows), device=split.device), 0., {kind: False for kind in self.towers}
        for kinds, share in KEPT[(*self.towers,)].items():
            for kind in kinds:
                kept[kind] = kept[kind] | (low <= u) & (u < low + share)          # b
            low += share
        drawn = {"text": self.cache("text", split).take(captions), "kept": kept, "rows": rows % len(split)}
        return drawn | (self.draw_pictures(split, rows, captions, kept) if "image" in self.towers else {})

    def draw_pictures(self, split, rows, captions, kept):
        """One picture of each training shape, and the rows of these shapes: turned as in their pictures; without one,
        as in their files.

        Half of the pictures beside a caption are recoloured: the colours that the caption names are replaced in the
        picture (not for pretrained towers, whose tokens are computed once). So the backbone learns colours from words
        and form from pictures: a picture of a green chair with "a red chair" gives a red chair."""
        which = split.random_pictures(len(rows))              # b
        recoloured = kept["text"] & kept["image"] & (torch.rand(len(rows), device=split.device) < RECOLOURED)
        colours = torch.where(recoloured[:, None], split.table.colours[captions], -1)         # b m
        image = self.cache("image", split).take(rows * split.source.pictures + which) if "image" in self.pretrained \
            else split.pictures(rows, which=which, recoloured=colours)
        return {"image": image, "rows": torch.where(kept["image"], split.as_shown(rows, which), rows % len(split))}

    def encode_drawn(self, drawn):
        """`encode` of the output of `draw_prompts`; dropped prompts are masked."""
        condition = {}
        for kind, kept in drawn["kept"].items():                                  # kept: b
            x, tower = drawn[kind], self.towers[kind]
            if kind in self.pretrained:
                tokens, mask = x
            elif kind == "text":
                tokens, mask = tower.text(*x), x[1]
            else:
                tokens, mask = tower.tokens(x)
            condition[kind] = tokens.float(), mask & kept[:, None]                # b t e, b t
        return condition

    def cache(self, kind, split):
        """A sampler of a tower's input for the captions or pictures of a set; for pretrained towers, of its output."""
        if (kind, split.name) not in self.caches:
            self.caches[kind, split.name] = self.towers[kind].cache(split)
        return self.caches[kind, split.name]


def make(folder, names, device="cpu"):
    """names: {kind of prompt: BUILT_IN, the tower in the checkpoint folder; a hub name, or a folder; None: no such
    prompts}"""
    built_in = {"text": text_tower.load, "image": image_tower.load}
    towers = {kind: built_in[kind](folder).to(device) if name == BUILT_IN else load_pretrained(kind, name, device)
              for kind, name in names.items() if name}
    return Encoders(towers, read_config(folder).get("encoders", {}).get("nouns", {}))


@functools.cache
def load_pretrained(kind, name, device="cpu"):
    """A tower of transformers, loaded once."""
    from prompts import pretrained  # transformers: seldom needed, slow to load
    return {"text": pretrained.Text, "image": pretrained.Image}[kind](name, device)


def load(folder, stage, device="cpu"):
    """The encoders that a stage of a checkpoint folder was trained with."""
    entry = read_stage(folder, stage)
    towers = make(folder, {kind: entry["flags"].get(f"{kind}-encoder") for kind in ("text", "image")}, device)
    towers.nouns = towers.nouns or entry.get("nouns", {})     # without built-in towers, those of the generator's entry
    return towers


def training_nouns(split):
    """{noun: words of its captions} of a prepared set."""
    return nouns_of([caption for own in split.captions for caption in own])


# ---------------------------------------------------------------------------- training data of generators

def prompted_tokens(run, stage, shape_encoder, encoder_stage="tokenizer"):
    """The training data of a generator: frozen towers, the sizes of tokens, and a function that draws a batch of
    tokens with captions and pictures. shape_encoder: clouds -> tokens."""
    towers, shape_encoder = make(run.folder, run.encoder_names, run.device), shape_encoder.to(run.device)
    tokens = {split: tokenizer.encode(run, shape_encoder, split, stage=encoder_stage)
              for split in (run.train, run.test)}             # rows n c
    _, n, channels = tokens[run.test].shape

    def draw_batch(split):
        drawn = towers.draw_prompts(split, split.draw_rows(run.micro_batch_size(stage)))
        return tokens[split][drawn.pop("rows")], drawn

    with torch.random.fork_rng(devices=[]):                   # initial weights are the same wherever the set lies
        for split in (run.train, run.test):
            draw_batch(split)                                 # fills the caches of towers
    return towers, {"tokens": n, "channels": channels, "widths": towers.widths}, draw_batch


# ---------------------------------------------------------------------------- stage: data, model, training, save

def train_text(run):
    """The text tower, contrastively with a cloud tower."""
    # data
    captions = [caption for own in run.train.captions for caption in own]
    known = read_stage(run.source, "encoders")["vocabulary"] if run.finetune else []
    words, nouns = [*dict.fromkeys(known + text_tower.vocabulary(captions))], training_nouns(run.train)

    def draw_batch(split):
        return text_tower.training_batch(split, words_of[split], run.micro_batch_size("encoders"))

    # model
    settings = text_tower.SIZES[run.size]
    model = text_tower.TextAndCloud(words, nouns, **settings)
    run.load_to_finetune("encoders", {"encoders": model}, settings, longer=["word.weight"])
    words_of = {split: model.cache(split) for split in (run.train, run.test)}

    # training
    loop = Loop(run, "encoders", model, draw_batch)
    for net, batch in loop:
        loop.step(*net(*batch))

    # save
    with run.autocast():
        metrics = judge.caption_retrieval(loop.average, run.test)
    run.finish(loop, {"encoders": loop.average}, settings=settings, vocabulary=words, nouns=nouns, metrics=metrics)


class PicturesAndClouds(nn.Module):
    """The image tower, the cloud tower, and a linear probe (Reader), which is discarded."""

    def __init__(self, vision, reader, aligner):
        super().__init__()
        self.vision, self.reader, self.aligner = vision, reader, aligner

    def loss(self, pictures, captioned, x):
        """Pictures b 3 s s, captions and clouds of the same shapes (text_tower.captions_and_clouds), their tokens."""
        ids, mask, cloud, true = captioned
        text, cloud = self.aligner.embed_text(ids, mask), self.aligner.embed_cloud(*cloud)    # k e each
        captions, _ = self.aligner.contrast(text, cloud, true)
        loss, logs = self.vision.loss(pictures, cloud, self.reader, x)
        return loss + captions, logs | {"captions": captions.detach()}


def train_vision(run):
    """The image tower, with the cloud tower."""
    # data: of each shape a cloud and VIEWS pictures
    aligner, shape_encoder = text_tower.load(run.folder).to(run.device), tokenizer.load(run.folder).to(run.device)
    tokens = {split: tokenizer.encode(run, shape_encoder, split) for split in (run.train, run.test)}        # rows n c
    words_of = {split: aligner.cache(split) for split in (run.train, run.test)}

    def draw_batch(split):
        count = -(-run.micro_batch_size("vision") // image_tower.VIEWS)           # k, at least 1
        rows = split.draw_distinct(count)                     # k
        captioned = text_tower.captions_and_clouds(split, words_of[split], rows)
        rows = rows.repeat(image_tower.VIEWS)                 # (v k)
        which = split.random_pictures(len(rows))
        x = tokens[split][split.as_shown(rows, which)]        # (v k) n c
        return split.pictures(rows, which=which), captioned, x

    # model
    settings = image_tower.SIZES[run.size] | {"out": aligner.width}
    _, n, channels = tokens[run.test].shape
    vision = image_tower.ImageTower(**settings)
    reader = image_tower.Reader(len(vision.pos_embed), vision.width, n, channels)
    aligner.freeze_text()
    model = PicturesAndClouds(vision, reader, aligner)
    run.load_to_finetune("vision", {"vision": vision}, settings)

    # training
    loop = Loop(run, "vision", model, draw_batch)
    for net, batch in loop:
        loop.step(*net(*batch))

    # save
    vision, aligner = loop.average.vision, loop.average.aligner
    with run.autocast():
        metrics = judge.picture_retrieval(vision, aligner, run.test)
    run.finish(loop, {"encoders": aligner, "vision": vision}, settings=settings, metrics=metrics)


TEXT = Stage("encoders", train_text, 600, 128, 1e-3)
VISION = Stage("vision", train_vision, 1200, 64, 2e-3, after=("encoders",))
