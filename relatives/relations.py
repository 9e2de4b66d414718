"""relations.py - which shapes are alike? A vector for each; the dot product of two says how alike they are.

The teacher of the student in lost.py knows facts (class and attributes), captions and, where --image-encoder names one
of `transformers`, pictures. The built-in image tower would be a circular teacher: it was trained to name shapes, and to
predict their tokens. Files have no attributes, and few share a class: mostly the text tower teaches.
"""
import numpy as np
import torch
import torch.nn.functional as F

import encoders
from engine.commands import UserError
from prompts import text_tower

BATCH = 256
POSITIVE, NEGATIVE = .96, .92     # quantiles of similarities: shapes above the first are alike, below the second unlike


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
    """What a tower makes of a shape's pictures, on average, less the mean of all shapes (pictures have much in common)
    or a given mean -> r e, of length 1; that mean."""
    tokens, count = tower.cache(split), split.source.pictures
    numbers = torch.arange(len(split) * count, device=split.device).split(count)
    x = torch.stack([tokens.take(own)[0].float().mean((0, 1)).cpu() for own in numbers])      # r e
    mean = x.mean(0) if mean is None else mean
    return F.normalize(x - mean, dim=-1), mean


@torch.no_grad()
def features(run):
    """-> [features of training shapes, of held-out shapes], r e each, of length 1; the names of their parts: facts,
    captions (the text tower's vector of the longest) and maybe pictures, of equal weight."""
    known = {fact: i for i, fact in enumerate(sorted(set().union(*facts(run.train)), key=str))}
    name, mean, found = run.encoder_names["image"], None, []
    text_encoder = text_tower.load(run.folder)
    pretrained = name not in (None, encoders.BUILT_IN)        # the built-in tower was taught to predict tokens
    for split in (run.train, run.test):
        captions = [max(captions, key=len) for captions in split.captions]
        text = [text_encoder.embed_text(*text_encoder.word_ids(captions[i:i + BATCH]))
                for i in range(0, len(captions), BATCH)]
        parts = [table_of(facts(split), known), torch.cat(text)]
        if pretrained:
            pictures, mean = seen(encoders.load_pretrained("image", name, run.device), split, mean)
            parts.append(pictures)
        found.append(torch.cat(parts, 1) / len(parts) ** .5)
    return found, ["facts", "captions", *[name] * pretrained]


def thresholds(features):
    """Features r e -> the similarities below which two shapes are unlike, and above which they are alike."""
    rows = np.linspace(0, len(features) - 1, min(2000, len(features))).astype(int)            # all over the set
    some = features[rows].round(decimals=4).unique(dim=0)     # copies would be alike
    if len(some) < 2:
        raise UserError("no two shapes differ in class, attributes or caption: lost-student has nothing to learn")
    similar = (some @ some.T)[~torch.eye(len(some), dtype=torch.bool)]
    return np.quantile(similar.numpy(), (NEGATIVE, POSITIVE)) - 1e-4      # as similar as that: alike
