"""relations.py - which shapes are alike? A vector for each; the dot product of two says how much they are.

The teacher of the student in lost.py knows facts (class and attributes), captions and, where --image-encoder names one
of `transformers`, pictures. The built-in image tower would be a circular teacher: it was trained to name shapes, and to
predict their tokens. Of files, the class is the caption, and there are no attributes: mostly the text tower teaches.
"""
import numpy as np
import torch
import torch.nn.functional as F

from prompts import pretrained, text_tower

BATCH = 256
POSITIVE, NEGATIVE = .96, .92     # shapes are alike, or unlike, from these quantiles of the similarities on


def facts(split):
    """{("class", name), (attribute, value) ...} of each shape of a prepared set."""
    return [{("class", name), *record["attributes"].items()} for name, record in zip(split.classes, split.records)]


def table_of(rows, known):
    """Sets of facts -> r f, of length 1: the class weighs as much as all attributes together."""
    table = torch.zeros(len(rows), len(known))
    for row, own in enumerate(rows):
        for fact in own & known.keys():
            table[row, known[fact]] = 1. if fact[0] == "class" else max(len(own) - 1, 1) ** -.5
    return F.normalize(table, dim=-1)


def seen(tower, split, mean=None):
    """-> what a tower makes of a shape's pictures, on average, r e, of length 1; and the mean of all shapes, or that
    given, which was taken away: features of a tower of pictures have much in common."""
    tokens, count = pretrained.picture_cache(tower, split), split.source.pictures
    x = torch.stack([tokens.draw(range(row * count, (row + 1) * count))[0].float().mean((0, 1))
                     for row in range(len(split))])                               # r e
    mean = x.mean(0) if mean is None else mean
    return F.normalize(x - mean, dim=-1), mean


@torch.no_grad()
def features(run):
    """Features of the training shapes and of the held-out ones, r e each, of length 1; what they are made of: facts,
    the text tower's vector of the longest caption and maybe pictures, each with the same weight."""
    known = {fact: i for i, fact in enumerate(sorted(set().union(*facts(run.train)), key=str))}
    tower, name, mean, found = text_tower.load(run.folder), run.encoder_names["image"], None, []
    camera = pretrained.Image(name, run.device) if name not in (None, "pixels") else None
    for split in (run.train, run.test):
        captions = [max(captions, key=len) for captions in split.captions]
        text = [tower.embed_text(*tower.word_ids(captions[i:i + BATCH])) for i in range(0, len(captions), BATCH)]
        parts = [table_of(facts(split), known), torch.cat(text)]
        if camera:
            pictures, mean = seen(camera, split, mean)
            parts.append(pictures)
        found.append(torch.cat(parts, 1) / len(parts) ** .5)
    return found, ["facts", "captions", *[name] * bool(camera)]


def thresholds(features):
    """Features r e -> the similarities below which two shapes are unlike, and above which they are alike."""
    some = features[:2000].unique(dim=0)                      # copies would be alike
    similar = (some @ some.T)[~torch.eye(len(some), dtype=torch.bool)]
    return np.quantile(similar.numpy(), (NEGATIVE, POSITIVE)) - 1e-4
