"""data.py - training samples from shapes: prepared once, memory-mapped, drawn in batches.

A prepared set is a folder of flat arrays (one row a shape) and one JSON file a kind and chunk of shapes with
their captions. A chunk's JSON is written last: whatever has one is done, so a killed run goes on
where it was, and any number of processes can share the work.

    python data.py                       # prepares the built-in shapes; a contact sheet to look at
    python data.py --data path/to/meshes --out cache
    python data.py --data path/to/meshes --out cache --shard 0/4      # on the first of four machines
"""
import argparse
import csv
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.commands import Parser, UserError, between, command
from engine.files import atomic_write, make_folder
from geometry import shapes
from geometry.prepare import CHUNK, TRAIN_SHAPES, BuiltIn, Files, fill
from geometry.render import contact_sheet, render_mesh, save_png
from geometry.training_pictures import lit
from geometry.training_samples import KINDS, PICTURES, POINTS, QUERIES, painted


def prepare(split="train", count=None, out="cache", workers=2, kinds=("surface",), data=None, copies=1, shard=(0, 1), classes=None):
    """Prepare what is missing of a set, of built-in shapes or of the files of `data`, or every n-th chunk of it; -> Prepared."""
    source = Files(split, data, copies) if data else BuiltIn(split, count, classes)
    folder, kinds = Path(out) / source.name, list(kinds)
    fill(folder, source, kinds, workers, shard)
    return Prepared(folder, source, kinds)


READ_FROM = {"cloud": "surface", "queries": "surface", "faces": "faces", "views": "views"}      # method of Prepared -> kind of samples


def kinds_of(heads):
    """The kinds of samples that some heads learn from."""
    return list(dict.fromkeys(READ_FROM[name] for head in heads for name in head.reads))


class Prepared:
    """A prepared set, read from disk as needed: the shapes of the split that came through, for all kinds."""

    def __init__(self, folder, source, kinds):
        self.folder, self.source, self.name = Path(folder), source, source.name
        if isinstance(source, Files):                         # both splits are in one folder
            self.name += f"-{source.split}"
        try:
            self.arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for kind in kinds for name in KINDS[kind]}
            texts = [{int(path.stem[-5:]) * CHUNK + i: text for path in sorted(self.folder.glob(f"{kind}-*.json"))
                      for i, text in enumerate(json.loads(path.read_text()))} for kind in kinds]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is damaged ({error}); delete it, and it is made again") from None
        self.broken = {text["file"]: text["broken"] for some in texts for text in some.values() if "broken" in text}
        bad = {row for some in texts for row, text in some.items() if "broken" in text}
        self.rows = np.array([row for row, text in texts[0].items() if row not in bad and source.mine(text)], int)
        self.text = [texts[0][row] for row in self.rows]
        self.classes, self.captions = [text["class"] for text in self.text], [text["captions"] for text in self.text]
        if source.skipped or self.broken:
            with atomic_write(self.folder / "skipped.csv") as part, part.open("w", newline="", errors="backslashreplace") as file:
                csv.writer(file).writerows([("file", "reason"), *source.skipped, *self.broken.items()])

    def __len__(self):
        return len(self.text)

    def shape(self, row):
        """The shape itself, for what needs more than samples: exact distances at any point."""
        return self.source.shape(self.rows[row])

    def samples(self, rows, reads, rng):
        """What a head learns from (heads.py): reads names methods below, with how many points -> a dict of tensors, b rows each."""
        batch = {}
        for name, count in reads.items():
            batch |= self.named_cloud(rows, count, rng) if name == "cloud" else getattr(self, name)(rows, count, rng)
        return batch

    def named_cloud(self, rows, k, rng):
        return dict(zip(("points", "normals", "colours"), self.cloud(rows, k, rng)))

    def cloud(self, rows, k, rng):
        """k oriented coloured surface points of each row: points, normals, colours, b k 3 each."""
        some = rng.permutation(POINTS)[:k]
        points, normals, colours = (torch.from_numpy(self.arrays[name][self.rows[rows]][:, some].astype(np.float32))
                                    for name in ("points", "normals", "colours"))
        return points, normals / 127, colours / 255

    def queries(self, rows, k, rng):
        """k points of each row and their signed distance: b k 3, b k."""
        some = rng.permutation(QUERIES)[:k]
        return {name: torch.from_numpy(self.arrays[name][self.rows[rows]][:, some].astype(np.float32)) for name in ("queries", "distance")}

    def faces(self, rows, *_):
        """Low-poly meshes: corners b f 3 3 in bins, component b f (-1: no face), colours b f 3."""
        corners, components, colours = (torch.from_numpy(self.arrays[name][self.rows[rows]]) for name in ("corners", "components", "face_colours"))
        return {"corners": corners.long(), "components": components.long(), "face_colours": colours.float() / 255}

    def draw_captions(self, rows, rng):
        """One caption of each."""
        return [self.captions[row][rng.integers(len(self.captions[row]))] for row in rows]

    def pictures(self, rows, rng, which=None, vary=True):
        """One picture of each, in random light (prompts/picture_files.py): b 3 s s."""
        which = rng.integers(PICTURES, size=len(rows)) if which is None else which
        return lit(*(self.arrays[name][self.rows[rows], which] for name in KINDS["pictures"]), rng, vary)

    def views(self, rows, *_):
        """A picture of each: b size size 4, and where it was taken from, b 2 in degrees."""
        views, angles = (torch.from_numpy(self.arrays[name][self.rows[rows]]) for name in ("views", "angles"))
        return {"views": views.float() / 255, "angles": angles}


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--data", help="files to prepare: a folder of meshes, of ShapeNet or of Objaverse, or Sweet Home 3D libraries "
                                       "(geometry/real.py); default: the built-in shapes")
    parser.add_argument("--copies", type=between(1, 100), default=1, help="of each file's shape to learn from: mirrored, stretched")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["surface", "pictures"], help="samples to take: surface for every "
                        "representation, pictures for image prompts, faces for mesh, views for gs")
    parser.add_argument("--shard", type=part, default=(0, 1), metavar="i/n", help="only the i-th of n shares: so many machines, one folder")
    parser.add_argument("--shapes", type=between(1), default=TRAIN_SHAPES, help="how many built-in training shapes to prepare")
    parser.add_argument("--out", default="cache", help="folder of the prepared sets")
    parser.add_argument("--workers", type=between(1), default=2, help="processes to use")
    parser.add_argument("--picture", default="out/shapes.png", help="contact sheet to write")
    args = parser.parse_args()
    make_folder(Path(args.picture).parent)
    start = time.time()
    train = prepare("train", args.shapes, args.out, args.workers, args.kinds, args.data, args.copies, args.shard)
    test = prepare("test", None, args.out, args.workers, args.kinds, args.data, args.copies, args.shard)
    print(f"{train.folder}: {len(train)} shapes to train on, {len(test)} held out, {time.time() - start:.1f} s")
    if args.data:
        print(f"left out: {len(train.broken)} of {len(train.source.items)} shapes, {len(train.source.skipped)} other files"
              + f", why is in {train.folder}/skipped.csv" * bool(train.broken or train.source.skipped))
    if not len(train):
        if train.broken:
            raise UserError(f"no shape of {args.data} can be used")
        return                                                # a share of few shapes may have none
    rows = np.linspace(0, len(train) - 1, min(4 * len(shapes.CLASSES), len(train))).astype(int)
    rows = sorted(rows, key=lambda row: train.classes[row])
    drawn = [render_mesh(*painted(train.shape(row)), size=160) for row in tqdm(rows, desc="drawing", unit="shape")]
    labels = [train.captions[row][min(3, len(train.captions[row]) - 1)] for row in rows]
    save_png(args.picture, contact_sheet(drawn, 8, labels))
    print(args.picture)


def part(text):
    """The type of --shard: "0/4" is the first of four."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"must be i/n with i from 0 to n - 1, not {text}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    command(main)
