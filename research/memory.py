"""memory.py - are samples copies? Their distance to training shapes, over that of held-out shapes.

The distance of two surfaces is that of their tokens, by LTM3D's tokenizer: the folder's own, if it has one.
"""
from pathlib import Path

import numpy as np
import torch

import tokenizer
from data import prepare
from engine.commands import UserError
from engine.files import read_stage, trained_stages
from geometry.prepare import name_begins
from research import exam, metrics

BATCH = 64          # clouds encoded at once


def training_set_of(folder, args):
    """The prepared shapes that a checkpoint was trained on; None and a remark, if they are not in --cache."""
    name = read_stage(folder, exam.last_stage(folder))["data"].rpartition("-")[0]           # NAME-DIGEST
    if not name.startswith(name_begins(args.data) if args.data else "shapes-train-"):
        raise UserError(f"the generator in {folder} learnt from {name}; give the --data that it was trained on")
    if not (Path(args.cache) / name).is_dir():
        print(f"memorisation is left out: {name} is not in {args.cache}; data.py prepares it")
        return None
    if args.data:
        return prepare("train", None, args.cache, data=args.data)
    _, _, count, *classes = name.split("-")                   # shapes-train-COUNT-CLASSES
    return prepare("train", int(count), args.cache, classes=classes or None)


class Memory:
    """The tokens of the training shapes, by the tokenizer of a folder."""

    def __init__(self, folder, device, autocast, train):
        self.encoder, self.device, self.autocast = tokenizer.load(folder).to(device), device, autocast
        path = Path(folder) / "tokenizer.safetensors"
        self.known = tokenizer.encode_set(self.encoder, train, device, autocast, path).flatten(1)         # t (n c)

    @torch.no_grad()
    def vectors(self, cloud):
        """points, normals, colours, s k 3 each -> s (n c)."""
        with self.autocast():
            chunks = zip(*(torch.as_tensor(x).split(BATCH) for x in cloud))
            tokens = [self.encoder(*(x.to(self.device) for x in chunk)).float().cpu() for chunk in chunks]
        return torch.cat(tokens).flatten(1)


def score_memorisation(train, args, model, samples, new):
    """`memorisation` of samples, by held-out shapes `new`; and of copies: training shapes, with other points. A set of
    s shapes is points, normals, colours: s k 3 each."""
    if train is None:
        return {"memorisation": "", "of copies": ""}
    own = "tokenizer" in trained_stages(model.folder)
    memory = Memory(model.folder if own else args.scorer, model.device, model.autocast, train)
    points = len(samples[0][0])
    copies = [train.shape(row).surface(points, np.random.default_rng(row)) for row in range(min(len(train), BATCH))]
    copies = [np.float32(x) for x in map(np.stack, zip(*copies))]                 # b k 3 each
    samples, copies, new = map(memory.vectors, (samples, copies, new))            # s (n c) each
    return {"memorisation": metrics.memorisation(samples, new, memory.known),
            "of copies": metrics.memorisation(copies, new, memory.known)}
