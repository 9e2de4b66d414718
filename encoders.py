"""encoders.py - the frozen encoders of a checkpoint, whoever trained them: what is asked for -> condition tokens.

A condition is a dict of what there is, {"text": (tokens b t e, mask b t), "image": ...}; the tower of either kind is ours
(prompts/text_tower.py, prompts/image_tower.py) or somebody else's (prompts/pretrained.py), and config.json remembers which.
"""
import functools

from prompts import text_tower
from prompts import image_tower
from prompts import pretrained
from engine.files import read_stage

KINDS = ("text", "image")


class Towers:
    def __init__(self, text, image):
        self.of = {"text": text, "image": image}
        self.widths = {kind: tower.width for kind, tower in self.of.items()}      # e of each

    def encode(self, prompts=None, pictures=None):
        """b strings, pictures b 3 s s, or both -> what the backbone and the reconstructor are conditioned on."""
        return {kind: self.of[kind].tokens(what) for kind, what in (("text", prompts), ("image", pictures)) if what is not None}

    def draw(self, split, rows, rng):
        """One caption and one picture of each of some training shapes."""
        return {kind: tower.draw(split, rows, rng) for kind, tower in self.of.items()}

    def read(self, drawn):
        """The same as `encode`, of what was drawn."""
        return {kind: tower.read(drawn[kind]) for kind, tower in self.of.items()}


def make(folder, text=None, image=None, device="cpu"):
    """The towers of these names, hub names or folders; None is ours, in the checkpoint folder."""
    text, image = others(text=text, image=image, device=device)
    return Towers(text or text_tower.load(folder).to(device), image or image_tower.load(folder).to(device))


@functools.cache
def others(text=None, image=None, device="cpu"):
    """Other people's towers of these names, loaded once; None stays None."""
    if not text and not image:
        return None, None
    read = text_tower.Bag(device) if text == "bag" else pretrained.Text(text, device) if text else None
    return read, pretrained.Image(image, device) if image else None


def load(folder, device="cpu"):
    """The towers that the backbone of a checkpoint folder was trained with."""
    return make(folder, **read_stage(folder, "backbone")["towers"], device=device)
