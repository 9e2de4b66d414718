"""relations.py - which shapes are alike? A vector for each; the dot product of two says how much they are.

The teacher of the student in lost.py. The image tower would be a circular teacher: it was trained to name shapes, and
to predict their tokens. Of files, the class is the caption, and there are no attributes: mostly the text tower teaches.
"""
import numpy as np
import torch
import torch.nn.functional as F

from prompts import text_tower

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


@torch.no_grad()
def features(folder, train, test):
    """{set: r e, of length 1}: half of it facts, the other half the text tower's vector of the longest caption."""
    tower, found = text_tower.load(folder), {}
    known = {fact: i for i, fact in enumerate(sorted(set().union(*facts(train)), key=str))}
    for split in (train, test):
        captions = [max(captions, key=len) for captions in split.captions]
        text = [tower.embed_text(*tower.word_ids(captions[i:i + BATCH])) for i in range(0, len(captions), BATCH)]
        found[split] = torch.cat([table_of(facts(split), known), torch.cat(text)], 1) / 2 ** .5
    return found


def thresholds(features):
    """Features r e -> the similarities below which two shapes are unlike, and above which they are alike."""
    some = features[:2000].unique(dim=0)                      # copies would be alike
    similar = (some @ some.T)[~torch.eye(len(some), dtype=torch.bool)]
    return np.quantile(similar.numpy(), (NEGATIVE, POSITIVE)) - 1e-4
