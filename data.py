"""data.py - training samples of shapes: prepared once, memory-mapped, drawn in batches.

geometry/prepare.py fills the arrays of a prepared set; Prepared reads them. The built-in shapes need no download.

    python data.py                       # prepares the built-in shapes, and draws some of them
    python data.py --classes table --shapes 32
    python data.py --data path/to/meshes --out cache
    python data.py --data path/to/meshes --out cache --shard 0/4      # on the first of four machines
"""
import argparse
import copy
import csv
import re
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.commands import Parser, UserError, between, command
from engine.files import atomic_write, make_folder
from geometry.kinds import KINDS, POINTS, QUERIES
from geometry.prepare import TRAIN_SHAPES, fill, read_records, version
from geometry.training_pictures import recolour, relight

# entry of a head's `reads`, a method of Prepared -> its kind of samples
READ_FROM = {"cloud": "surface", "queries": "surface", "faces": "faces", "views": "views"}
MIRROR, TURN = np.diag([-1, 1, 1]), np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])      # x to -x; x to -z, z to x
SYMMETRIES = np.stack([np.linalg.matrix_power(TURN, i // 2) @ np.linalg.matrix_power(MIRROR, i % 2)      # 8 3 3
                       for i in range(8)])                    # a shape, its mirror image, the same turned, ...


def turns_to_front(azimuth):
    """How many right angles a shape is turned, until a picture of this azimuth is from its front, to 45 degrees."""
    return np.round(-azimuth / 90).astype(int) % 4


def turned_back(points, turns):
    """Clouds r k 3 of shapes turned as in pictures, and their turns r -> clouds oriented as in files."""
    return np.einsum("rji,rkj->rki", SYMMETRIES[2 * turns], points).astype(np.float32)


def prepare(split="train", count=None, out="cache", workers=2, kinds=("surface",), data=None, shard=(0, 1),
            classes=None):
    """Prepares the missing samples of built-in shapes, or of the files of `data`. shard (i, n): only share i of n.
    -> Prepared"""
    if data:
        from geometry.real import Files  # only for --data
        source = Files(split, data)
    else:
        from geometry.built_in import BuiltIn
        source = BuiltIn(split, count, classes)
    kinds = ["records", *(kind for kind in kinds if kind != "records")]
    fill(Path(out) / source.name, source, kinds, workers, shard)
    return Prepared(Path(out) / source.name, source, kinds)


def training_sets(args, kinds):
    """The training set and the held-out set of the flags of train.py."""
    settings = args.cache, args.workers, kinds, args.data
    train = prepare("train", args.shapes, *settings, classes=args.classes)
    test = prepare("test", None, *settings, classes=args.classes)
    if min(len(train), len(test)) < 2:
        where = f", see {train.folder}/skipped.csv" if train.broken else ""
        raise UserError(f"{args.data} has {len(train)} shapes to train on and {len(test)} held out, two of each are "
                        f"needed; {len(train.broken)} were left out{where}")
    return train.repeated(2), test


def kinds_of(heads):
    """The kinds of training samples of some heads."""
    return list(dict.fromkeys(READ_FROM[name] for head in heads for name in head.reads))


class Prepared:
    """A prepared set, read from disk as needed: the shapes of the split that have samples of all kinds."""

    def __init__(self, folder, source, kinds):
        self.folder, self.source, self.version = Path(folder), source, version(source)
        self.folders = {kind: self.folder / source.folder(kind) for kind in kinds}
        self.name = f"{source.name}-{source.split}" if source.files else source.name
        try:
            self.arrays = {name: np.load(self.folders[kind] / f"{name}.npy", mmap_mode="r")
                           for kind in kinds for name in KINDS[kind]}
            records = [read_records(self.folders[kind]) for kind in kinds]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is damaged ({error}); delete it, and run the same command again") from None
        broken = {row: record for of_kind in records for row, record in of_kind.items() if "broken" in record}
        self.broken = {record["file"]: record["broken"] for row, record in broken.items() if row < source.files}
        rows = sorted(row for row in set.intersection(*map(set, records))
                      if row not in broken and source.in_split(row))
        self.rows = np.array(rows, int)                       # rows of the arrays: one for each shape of this set
        self.records = [records[0][row] for row in rows]
        self.classes = [record["class"] for record in self.records]
        self.captions = [record["captions"] for record in self.records]
        self.symmetry = np.zeros(len(rows), int)              # row of SYMMETRIES for each shape
        if source.skipped or self.broken:
            path = self.folder / "skipped.csv"
            with atomic_write(path) as part, part.open("w", newline="", errors="backslashreplace") as file:
                csv.writer(file).writerows([("file", "reason"), *source.skipped, *self.broken.items()])

    def __len__(self):
        return len(self.records)

    def repeated(self, count):
        """A set of files `count` times: 2 adds mirror images, 8 also turns of 90, 180 and 270 degrees. Files are few.
        Built-in shapes are unlimited: their set is returned unchanged."""
        if not self.source.files:
            return self
        first = np.flatnonzero(self.symmetry == 0)            # of a set that is already repeated
        other = copy.copy(self)
        other.name, other.symmetry = f"{self.name}-{count}", np.repeat(np.arange(count), len(first))
        other.rows = np.tile(self.rows[first], count)
        for name in ("records", "classes", "captions"):
            setattr(other, name, getattr(self, name)[:len(first)] * count)
        return other

    def shape(self, row):
        """The source shape, for exact distances at any point."""
        return self.source.shape(self.rows[row])

    def tensors(self, names, rows, columns=slice(None)):
        """Rows of several arrays, and some of their columns, as float tensors."""
        return [torch.from_numpy(self.arrays[name][self.rows[rows]][:, columns].astype(np.float32)) for name in names]

    def samples(self, rows, reads, rng):
        """Training samples of a head (heads.py). reads: {method below: point count} -> {name: tensor of b rows}."""
        batch = {}
        for name, count in reads.items():
            values = getattr(self, name)(rows, count, rng)
            batch |= dict(zip(("points", "normals", "colours"), values)) if name == "cloud" else values
        return batch

    def cloud(self, rows, k, rng):
        """k oriented coloured surface points of each row: points, normals, colours, b k 3 each."""
        columns = rng.permutation(POINTS)[:k]
        points, normals, colours = self.tensors(("points", "normals", "colours"), rows, columns)
        return self.moved(points, rows), self.moved(normals, rows) / 127, colours / 255

    def moved(self, x, rows):
        """Points or vectors b k 3, mirrored and turned as the symmetries of these rows say."""
        moves = SYMMETRIES[self.symmetry[rows]].astype(np.float32)                # b 3 3
        return torch.from_numpy(np.einsum("bij,bkj->bki", moves, x.numpy()))      # in torch, autocast would round

    def queries(self, rows, k, rng):
        """k points of each row and their signed distance: b k 3, b k."""
        queries, distance = self.tensors(("queries", "distance"), rows, rng.permutation(QUERIES)[:k])
        return {"queries": self.moved(queries, rows), "distance": distance}

    def faces(self, rows, *_):
        """Low-poly meshes: corners b f 3 3 in bins, component b f (-1: no face), colours b f 3."""
        corners, components, colours = self.tensors(("corners", "components", "face_colours"), rows)
        for i in np.flatnonzero(self.symmetry[rows]):
            from geometry.low_poly import in_order_again  # built-in shapes are never moved
            move, faces = SYMMETRIES[self.symmetry[rows[i]]], components[i] >= 0
            moved = in_order_again(corners[i][faces].numpy(), colours[i][faces].numpy(), move)
            components[i] = -1
            for array, values in zip((corners, colours, components), moved):
                array[i, :len(values)] = torch.from_numpy(values)
        return {"corners": corners.long(), "components": components.long(), "face_colours": colours / 255}

    def views(self, rows, *_):
        """One picture of each shape, b size size 4, and the camera's azimuth and elevation, b 2 in degrees."""
        views, angles = self.tensors(("views", "angles"), rows)
        mirrored, turns = self.symmetry[rows] % 2 == 1, torch.from_numpy(self.symmetry[rows] // 2)
        views[mirrored] = views[mirrored].flip(2)
        angles[mirrored, 0] *= -1
        angles[:, 0] += 90 * turns
        return {"views": views / 255, "angles": angles}

    def turns(self, rows, which):
        """How many right angles a shape is turned, until its picture `which` is from the front, to 45 degrees: b. Files
        do not define a front: with a picture, the shape is turned as in the picture. Built-in shapes have a front: they
        are not turned."""
        azimuth = self.arrays["picture_azimuth"][self.rows[rows], which]
        azimuth = np.where(self.symmetry[rows] % 2 == 1, -azimuth, azimuth)
        return turns_to_front(azimuth) * bool(self.source.files)

    def rows_as_shown(self, rows, which, seen=True):
        """The rows of `repeated(8)` of these shapes, turned as in their pictures `which`, where `seen` is true."""
        return rows + np.where(seen, 2 * np.count_nonzero(self.symmetry == 0) * self.turns(rows, which), 0)

    def draw_captions(self, rows, rng):
        """One caption of each shape; the odds are its number of words."""
        lengths = [np.array([len(caption.split()) for caption in self.captions[row]]) for row in rows]
        return [self.captions[row][rng.choice(len(k), p=k / k.sum())] for row, k in zip(rows, lengths)]

    def pictures(self, rows, rng, which=None, vary=True, recoloured=()):
        """One picture of each shape in random light (geometry/training_pictures.py): b 3 s s. recoloured: b texts; the
        colours that text i names are replaced in picture i."""
        which = rng.integers(self.source.pictures, size=len(rows)) if which is None else which
        names = "picture_colours", "picture_normals", "picture_coverage"
        colours, normals, coverage = (self.arrays[name][self.rows[rows], which] for name in names)
        mirrored = self.symmetry[rows] % 2 == 1
        for array in (colours, normals, coverage):            # b s s ...
            array[mirrored] = array[mirrored, :, ::-1]
        normals[mirrored, ..., 0] *= -1
        return relight(recolour(colours, coverage, recoloured, rng), normals, coverage, rng, vary)


def parse_share(text):
    """The type of --shard: "0/4" is the first of four."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"must be i/n with i from 0 to n - 1, not {text}")
    return int(match[1]), int(match[2])


def main():
    from geometry.render import contact_sheet, render_mesh, save_png
    from geometry.shapes import CLASSES
    from geometry.training_samples import vertex_coloured
    parser = Parser(__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--data", help="files to prepare: a folder of meshes, of ShapeNet or of Objaverse, or Sweet Home 3D libraries "
                        "(geometry/real.py); default: the built-in shapes")
    flag("--kinds", nargs="+", choices=[kind for kind in KINDS if KINDS[kind]], default=["surface", "pictures"],
         help="training samples: surface for all heads, pictures for image prompts, faces for mesh, views for gs")
    flag("--shard", type=parse_share, default=(0, 1), metavar="i/n",
         help="only share i of n, from 0: n machines can fill one folder")
    flag("--shapes", type=between(1), default=TRAIN_SHAPES, help="number of built-in training shapes")
    flag("--classes", nargs="+", choices=CLASSES, metavar="CLASS", help="built-in classes (default: all)")
    flag("--out", default="cache", help="folder of the prepared sets")
    flag("--workers", type=between(1), default=2, help="processes that prepare data")
    flag("--picture", default="out/shapes.png", help="contact sheet to write")
    args = parser.parse_args()

    if args.data and args.classes:
        raise UserError("--classes chooses built-in shapes; leave it or --data out")
    make_folder(Path(args.picture).parent)
    start = time.time()
    settings = args.out, args.workers, args.kinds, args.data, args.shard, args.classes
    train = prepare("train", args.shapes, *settings)
    test = prepare("test", None, *settings)
    print(f"{train.folder}: {len(train)} shapes to train on, {len(test)} held out, {time.time() - start:.1f} s")
    if args.data:
        where = f"; the reasons are in {train.folder}/skipped.csv" * bool(train.broken or train.source.skipped)
        print(f"left out: {len(train.broken)} of {train.source.files} shapes, "
              f"{len(train.source.skipped)} other files{where}")
    if not len(train):
        if train.broken:
            raise UserError(f"no shape of {args.data} can be used")
        return                                                # a share of few shapes may have none

    rows = np.linspace(0, len(train) - 1, min(4 * len(CLASSES), len(train))).astype(int)
    rows = sorted(rows, key=lambda row: train.classes[row])
    bar = tqdm(rows, "drawing", unit="shape")
    pictures = [render_mesh(*vertex_coloured(train.shape(row)), size=160) for row in bar]
    labels = [train.captions[row][:4][-1] for row in rows]
    save_png(args.picture, contact_sheet(pictures, 8, labels))
    print(args.picture)


if __name__ == "__main__":
    command(main)
