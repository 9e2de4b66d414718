"""relations.py - which shapes are alike: what is known of them, as features whose products say so.

lost.py teaches by it. The image tower is no such teacher: it was trained to name shapes, and to tell their tokens.
"""
import torch
import torch.nn.functional as F

from prompts import text_tower

BATCH = 256


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
    """{set: r e, of length 1}. Their products: half by facts, half by the text tower, of the longest captions."""
    tower, found = text_tower.load(folder), {}
    known = {fact: i for i, fact in enumerate(sorted(set().union(*facts(train)), key=str))}
    for split in (train, test):
        captions = [max(captions, key=len) for captions in split.captions]
        text = [tower.embed_text(*tower.word_ids(captions[i:i + BATCH])) for i in range(0, len(captions), BATCH)]
        found[split] = torch.cat([table_of(facts(split), known), torch.cat(text)], 1) / 2 ** .5
    return found
