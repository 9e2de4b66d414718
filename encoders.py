"""encoders.py - a prompt becomes condition tokens: the frozen text and image encoders (LTM3D section 4).

    condition = {"text": (tokens b t e, mask b t), "image": (tokens b t e, mask b t)}          one kind or both

The paper freezes CLIP and DINOv2. Here each tower is either built in (prompts/text_tower.py, prompts/image_tower.py),
trained from nothing in minutes, or any of `transformers` (prompts/pretrained.py); config.json remembers which.

    python train.py --rep sdf --stage encoders       # trains the built-in text tower
    python train.py --rep sdf --stage vision         # trains the built-in image tower
"""
import functools

import numpy as np
import torch

from engine.files import read_stage
from prompts import image_tower, pretrained, text_tower

SHOWN = {  # kinds of prompt that a training sample sees -> share of samples
    (): .1, ("text",): .35, ("image",): .3, ("text", "image"): .25}
RECOLOURED = .5     # share of the pictures beside a caption in which the colours that it names are replaced


class Encoders:
    def __init__(self, text, image):
        self.towers = {"text": text, "image": image}
        self.widths = {kind: tower.width for kind, tower in self.towers.items()}  # e of each
        self.caches = {}                                      # tokens of a prepared set, of towers that are slow

    def encode(self, prompts=None, pictures=None):
        """b strings, pictures b 3 s s, or both -> the condition of backbone and reconstructor."""
        given = {"text": prompts, "image": pictures}
        return {kind: self.towers[kind].tokens(x) for kind, x in given.items() if x is not None}

    def remarks(self, prompt):
        """The warnings about a text prompt (prompts/reading.py). Towers of transformers read every word."""
        tower = self.towers["text"]
        return tower.remarks(prompt) if isinstance(tower, text_tower.TextAndCloud) else []

    def draw(self, split, rows, rng):
        """One caption and one picture of each training shape, and which of them it sees: what `encode_drawn` takes; and
        the rows of `repeated(8)`, of the shapes as the pictures show them.

        In half of the pictures that have a caption beside them, the colours that it names are replaced (but not for
        towers of transformers, which read every picture once). So the backbone takes colours from words and form from
        pictures: a picture of a green chair with "a red chair" gives a red chair."""
        captions = split.draw_captions(rows, rng)
        choice = rng.choice(len(SHOWN), len(rows), p=[*SHOWN.values()])           # b, numbers of entries of SHOWN
        shown = {kind: np.array([kind in kinds for kinds in SHOWN])[choice] for kind in self.towers}  # b: is it seen?
        recoloured = shown["text"] & shown["image"] & (rng.random(len(rows)) < RECOLOURED)
        text = self.cache("text", split).draw(captions) if self.is_pretrained("text") else captions
        pictures = split.source.pictures                      # of each shape
        which = rng.integers(pictures, size=len(rows))
        image = self.cache("image", split).draw(rows * pictures + which) if self.is_pretrained("image") else \
            split.pictures(rows, rng, which, recoloured=np.where(recoloured, captions, ""))
        return {"text": text, "image": image, "shown": {kind: torch.from_numpy(x) for kind, x in shown.items()},
                "rows": split.rows_as_shown(rows, which, shown["image"])}

    def encode_drawn(self, drawn):
        """The same as `encode`, of what was drawn; what a sample does not see is behind the mask."""
        condition = {}
        for kind, shown in drawn["shown"].items():                                # shown: b
            x = drawn[kind]
            tokens, mask = (x[0].float(), x[1]) if self.is_pretrained(kind) else self.towers[kind].tokens(x)
            condition[kind] = tokens, mask & shown[:, None].to(mask.device)       # b t e, b t
        return condition

    def is_pretrained(self, kind):
        return isinstance(self.towers[kind], pretrained.Pretrained)

    def cache(self, kind, split):
        if (kind, split.name) not in self.caches:
            make = pretrained.caption_cache if kind == "text" else pretrained.picture_cache
            self.caches[kind, split.name] = make(self.towers[kind], split)
        return self.caches[kind, split.name]


def make(folder, text=None, image=None, device="cpu"):
    """text, image: a hub name or a folder; None: the tower in the checkpoint folder. The simplest towers are the text
    tower "bag", a bag of words, and the image tower "pixels"."""
    text, image = load_pretrained(text=text, image=image, device=device)         # the same call as train.py's: cached
    return Encoders(text or text_tower.load(folder).to(device), image or image_tower.load(folder).to(device))


@functools.cache
def load_pretrained(text=None, image=None, device="cpu"):
    """The text and the image tower of these names, loaded once; None stays None."""
    if text == "bag":
        tower = text_tower.BagOfWords(device)
    else:
        tower = pretrained.Text(text, device) if text else None
    if image == "pixels":
        return tower, image_tower.Pixels(device)
    return tower, pretrained.Image(image, device) if image else None


def load(folder, stage, device="cpu"):
    """The encoders that a stage of a checkpoint folder was trained with."""
    return make(folder, **read_stage(folder, stage)["towers"], device=device)
