"""data.py - training samples of shapes: prepared once, memory-mapped or on a GPU, drawn in batches.

geometry/prepare.py fills the arrays of a prepared set; Prepared draws from them, on the device where they lie, with
torch's global generator, or with `rng`. The built-in shapes need no download.

    python data.py                       # prepares the built-in shapes, and draws some of them
    python data.py --classes table --shapes 32
    python data.py --data path/to/meshes --out cache
    python data.py --data path/to/meshes --out cache --shard 0/4      # on the first of four machines
"""
import argparse
import copy
import csv
import functools
import re
import time
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from engine.commands import Parser, UserError, between, command, fits
from engine.files import atomic_write, make_folder
from geometry.built_in import BuiltIn
from geometry.kinds import GREY, RECORDS
from geometry.prepare import TRAIN_SHAPES, fill, read_records, version
from geometry.render import contact_sheet, render_mesh, save_png
from geometry.shapes import CLASSES
from geometry.symmetry import SYMMETRIES
from geometry.training_pictures import colours_named, recolour, relight
from geometry.training_samples import PICTURES, POINTS, QUERIES, SURFACE, vertex_coloured
from representations import REPRESENTATIONS


def turns_to_front(azimuth):
    """How many right angles a shape is turned, until a picture of this azimuth is from its front, to 45 degrees."""
    return (-azimuth / 90).round().long() % 4


def seeded(seed, device="cpu"):
    """A generator for the `rng` of draws. seed: what numpy takes as a seed, or a generator of numpy."""
    return torch.Generator(device).manual_seed(int(np.random.default_rng(seed).integers(2 ** 62)))


def prepare(split="train", count=None, out="cache", workers=2, kinds=(SURFACE,), data=None, shard=(0, 1),
            classes=None):
    """Prepares the missing samples of built-in shapes, or of the files of `data`. shard (i, n): only share i of n.
    -> Prepared"""
    if data:
        from geometry.real import Files  # readers of strangers' files, only for --data
        source = Files(split, data)
    else:
        source = BuiltIn(split, count, classes)
    kinds = [RECORDS, *kinds]
    fill(Path(out) / source.name, source, kinds, workers, shard)
    return Prepared(Path(out) / source.name, source, kinds)


def training_sets(args, kinds):
    """The training set and the held-out set of the flags of train.py."""
    settings = args.cache, args.workers, kinds, args.data
    train = prepare("all" if args.all_shapes else "train", args.shapes, *settings, classes=args.classes)
    test = prepare("test", None, *settings, classes=args.classes)
    if min(len(train), len(test)) < 2:
        where = f", see {train.folder}/skipped.csv" if train.broken else ""
        raise UserError(f"{args.data} has {len(train)} shapes to train on and {len(test)} held out, two of each are "
                        f"needed; {len(train.broken)} were left out{where}")
    return train.repeated(2), test


class Captions:
    """The captions of the shapes of a set as numbers, rows of `texts`: they are drawn on the device."""

    def __init__(self, captions, device):
        self.texts = sorted({caption for own in captions for caption in own})
        number = {text: i for i, text in enumerate(self.texts)}
        flat = torch.tensor([number[caption] for own in captions for caption in own])         # k, shape after shape
        counts = torch.tensor([len(own) for own in captions])                                 # r
        shape = torch.arange(len(captions)).repeat_interleave(counts)                         # k
        ends = torch.tensor([len(text.split()) for text in self.texts])[flat].cumsum(0)       # k, of words
        high = ends[counts.cumsum(0) - 1]                                                     # r
        pairs = (shape * len(self.texts) + flat).sort().values                                # k
        tables = flat, ends, high, F.pad(high[:-1], (1, 0)), pairs, colours_named(self.texts)
        self.flat, self.ends, self.high, self.low, self.pairs, self.colours = (x.to(device) for x in tables)

    def draw(self, rows, rng=None):
        """One caption of each row; the odds are its number of words."""
        share = torch.rand(len(rows), generator=rng, device=rows.device)
        word = self.low[rows] + (share * (self.high - self.low)[rows]).long()     # one word of all captions of the row
        return self.flat[torch.searchsorted(self.ends, word, right=True)]         # b

    def true(self, captions, rows):                           # b, k -> is caption i one of row j? b k
        pair = rearrange(captions, "b -> b 1") + rows * len(self.texts)
        return self.pairs[torch.searchsorted(self.pairs, pair).clamp(max=len(self.pairs) - 1)] == pair


class Prepared:
    """A prepared set: the shapes of the split that have samples of all kinds. Its arrays are read from disk as needed,
    or lie on a GPU (`to`). `rows` are numbers of shapes, on its device."""
    streamed = False

    def __init__(self, folder, source, kinds):
        self.folder, self.source, self.version = Path(folder), source, version(source)
        self.device = torch.device("cpu")
        self.folders = {kind.name: self.folder / source.folder(kind) for kind in kinds}
        self.name = f"{source.name}-{source.split}" if source.files else source.name
        try:                                                  # "c": torch wants them writable; files do not change
            self.arrays = {name: torch.from_numpy(np.load(self.folders[kind.name] / f"{name}.npy", mmap_mode="c"))
                           for kind in kinds for name in kind.arrays}
            records = [read_records(folder) for folder in self.folders.values()]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is damaged ({error}); delete it, and run the same command again") from None
        broken = {row: record for of_kind in records for row, record in of_kind.items() if "broken" in record}
        self.broken = {record["file"]: record["broken"] for row, record in broken.items() if row < source.files}
        rows = sorted(row for row in set.intersection(*map(set, records)) if row not in broken and source.in_split(row))
        self.rows = torch.tensor(rows, dtype=torch.long)      # rows of the arrays: one for each shape of this set
        self.records = [records[0][row] for row in rows]
        self.classes = [record["class"] for record in self.records]
        self.captions = [record["captions"] for record in self.records]
        self.name += f"-{crc32(repr(sorted(broken)).encode()):x}" * bool(broken)       # it names files of tokens
        self.computed = {}                                    # {function: its result} of `once`
        self.symmetry = torch.zeros_like(self.rows)           # row of SYMMETRIES for each shape
        self.unmoved = len(rows)                              # shapes as oriented in their files, which come first
        if source.skipped or self.broken:
            path = self.folder / "skipped.csv"
            with atomic_write(path) as part, part.open("w", newline="", errors="backslashreplace") as file:
                csv.writer(file).writerows([("file", "reason"), *source.skipped, *self.broken.items()])

    def __len__(self):
        return len(self.records)

    def changed(self, **changes):
        """A copy with other attributes; its tables are made anew."""
        other = copy.copy(self)
        for name in ("table", "class_of", "odds", "coloured", "moves"):
            other.__dict__.pop(name, None)
        other.computed = {}
        vars(other).update(changes)
        return other

    def to(self, device):
        """The same set on a device. Arrays that do not fit into a GPU's memory stay on disk: worker processes draw
        batches of them (engine/streamed.py)."""
        if not fits(sum(array.nbytes for array in self.arrays.values()), device):
            return self.changed(streamed=True)
        return self.changed(device=device, arrays={name: array.to(device) for name, array in self.arrays.items()},
                            rows=self.rows.to(device), symmetry=self.symmetry.to(device))

    def repeated(self, count):
        """A set of files `count` times: 2 adds mirror images, 8 also turns of 90, 180 and 270 degrees. Files are few.
        Built-in shapes are unlimited: their set is returned unchanged."""
        if not self.source.files:
            return self
        first = self.unmoved                                  # of a set that is already repeated
        lists = {name: getattr(self, name)[:first] * count for name in ("records", "classes", "captions")}
        return self.changed(name=f"{self.name}-{count}", rows=self.rows[:first].repeat(count),
                            symmetry=torch.arange(count, device=self.device).repeat_interleave(first), **lists)

    def shape(self, row):
        """The source shape, as oriented in its file: exact distances at any point."""
        return self.source.shape(int(self.rows[row]))

    # ------------------------------------------------------------------------ which shapes

    @functools.cached_property
    def odds(self):                                           # of each shape, relative to others
        own = [self.source.items[row].odds for row in self.rows.tolist()] if self.source.files else [1.] * len(self)
        return torch.tensor(own, dtype=torch.float if self.device.type == "mps" else torch.double, device=self.device)

    def spread(self, count):                                  # rows from all of the set: files are sorted
        return np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)

    def draw(self, count):
        """Rows of `count` random shapes."""
        ends = self.odds.cumsum(0)
        return torch.searchsorted(ends, torch.rand(count, dtype=ends.dtype, device=self.device) * ends[-1], right=True)

    def draw_distinct(self, count, first=False):
        """Rows of `count` different random shapes, at most all. first: booleans; these shapes are taken first."""
        keys = torch.rand(len(self), device=self.device) ** (1 / self.odds)       # Efraimidis and Spirakis (2006)
        return (keys + 1. * first).argsort(descending=True)[:count]

    @functools.cached_property
    def class_of(self):                                       # number of each shape's class
        return torch.from_numpy(np.unique(self.classes, return_inverse=True)[1]).to(self.device)

    def of_two_classes(self):
        """Booleans: is the class of a shape one of two random ones (those of two random shapes)?"""
        pair = self.class_of[self.draw(2)]
        return (self.class_of == pair[:1]) | (self.class_of == pair[1:])

    # ------------------------------------------------------------------------ their samples

    def take(self, name, rows, columns=None):
        """Rows of an array, and some of their columns, as floats."""
        rows = self.rows[torch.as_tensor(rows, device=self.device)]
        array = self.arrays[name]
        return (array[rows] if columns is None else array[rows[:, None], columns]).float()

    def once(self, function):
        """function(self), computed once."""
        if function not in self.computed:
            self.computed[function] = function(self)
        return self.computed[function]

    def cloud(self, rows, k, rng=None):
        """k oriented coloured surface points of each row: points, normals, colours, b k 3 each."""
        columns = torch.rand(POINTS, generator=rng, device=self.device).argsort()[:k]
        points, normals, colours = (self.take(name, rows, columns) for name in ("points", "normals", "colours"))
        return self.moved(points, rows), self.moved(normals, rows) / 127, colours / 255

    @functools.cached_property
    def coloured(self):
        """1 for each shape that has colours; 0 for those of files without, which are GREY all over."""
        own = self.arrays["colours"][self.rows[:self.unmoved]]                    # r k 3
        return (own != round(255 * GREY)).flatten(1).any(1).float().repeat(len(self) // self.unmoved)

    @functools.cached_property
    def moves(self):                                          # 8 3 3
        return torch.from_numpy(SYMMETRIES).float().to(self.device)

    def moved(self, x, rows):
        """Points or vectors b k 3, mirrored and turned as the symmetries of these rows say."""
        if not self.source.files:
            return x
        moves = rearrange(self.moves[self.symmetry[rows]], "b i j -> b 1 i j")
        return (moves * rearrange(x, "b k j -> b k 1 j")).sum(-1)                 # autocast would round an einsum

    def queries(self, rows, k, rng=None):
        """k points of each row and their signed distance: b k 3, b k."""
        columns = torch.rand(QUERIES, generator=rng, device=self.device).argsort()[:k]
        return {"queries": self.moved(self.take("queries", rows, columns), rows),
                "distance": self.take("distance", rows, columns)}

    def turns(self, rows, which):
        """How many right angles a shape is turned, until its picture `which` is from the front, to 45 degrees: b. Files
        do not define a front: with a picture, the shape is turned as in the picture. Built-in shapes have a front: they
        are not turned."""
        azimuth = self.arrays["picture_azimuth"][self.rows[rows], which]
        azimuth = torch.where(self.symmetry[rows] % 2 == 1, -azimuth, azimuth)
        return turns_to_front(azimuth) * bool(self.source.files)

    def rows_as_shown(self, rows, which):
        """The rows of `repeated(8)` of these shapes, turned as in their pictures `which`."""
        return rows + 2 * self.unmoved * self.turns(rows, which)

    @functools.cached_property
    def table(self):
        return Captions(self.captions, self.device)

    def draw_pictures(self, count, rng=None):
        """Which picture of `count` shapes."""
        return torch.randint(self.source.pictures, (count,), generator=rng, device=self.device)

    def pictures(self, rows, rng=None, which=None, vary=True, recoloured=None):
        """One picture of each shape in random light (geometry/training_pictures.py): b 3 s s. recoloured: b m, colours
        that are replaced in each picture (training_pictures.colours_named)."""
        rows = torch.as_tensor(rows, device=self.device)
        which = self.draw_pictures(len(rows), rng) if which is None else which
        names = "picture_colours", "picture_normals", "picture_coverage"
        colours, normals, coverage = (self.arrays[name][self.rows[rows], which].float() for name in names)
        if self.source.files:
            mirrored = rearrange(self.symmetry[rows] % 2 == 1, "b -> b 1 1")
            coverage = torch.where(mirrored, coverage.flip(2), coverage)          # b s s
            colours = torch.where(mirrored[..., None], colours.flip(2), colours)  # b s s 3
            normals = torch.where(mirrored[..., None], normals.flip(2), normals)
            normals = torch.cat([torch.where(mirrored[..., None], -1, 1) * normals[..., :1], normals[..., 1:]], -1)
        if recoloured is not None:
            colours = recolour(colours, coverage, recoloured, rng)
        return relight(colours, normals, coverage, rng, vary)


def parse_share(text):
    """The type of --shard: "0/4" is the first of four."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"must be i/n with i from 0 to n - 1, not {text}")
    return int(match[1]), int(match[2])


def main():
    parser = Parser(__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--data", help="files to prepare: a folder of meshes, of ShapeNet or of Objaverse, or Sweet Home 3D libraries "
                        "(geometry/real.py); default: the built-in shapes")
    own = [(kind, rep) for rep, head in REPRESENTATIONS.items() for kind in head.kinds]
    kinds = {kind.name: kind for kind in (SURFACE, PICTURES, *(kind for kind, _ in own))}
    uses = "; ".join(f"{kind.name}: {rep}" for kind, rep in own)
    flag("--kinds", nargs="+", choices=list(kinds), default=["surface", "pictures"],
         help=f"training samples (surface: all; pictures: image prompts; {uses})")
    flag("--shard", type=parse_share, default=(0, 1), metavar="i/n",
         help="only share i of n, from 0: n machines can fill one folder")
    flag("--shapes", type=between(1), help=f"number of built-in training shapes (default: {TRAIN_SHAPES})")
    flag("--classes", nargs="+", choices=CLASSES, metavar="CLASS", help="built-in classes (default: all)")
    flag("--out", default="cache", help="folder of the prepared sets")
    flag("--workers", type=between(1), default=2, help="processes that prepare data")
    flag("--picture", default="out/shapes.png", help="contact sheet to write")
    args = parser.parse_args()

    if args.data and (args.classes or args.shapes):
        raise UserError("--classes and --shapes choose built-in shapes; leave them or --data out")
    make_folder(Path(args.picture).parent)
    start = time.time()
    settings = args.out, args.workers, [kinds[name] for name in args.kinds], args.data, args.shard, args.classes
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

    rows = sorted(train.spread(4 * len(CLASSES)), key=lambda row: train.classes[row])
    sheet = [render_mesh(*vertex_coloured(train.shape(row)), size=160) for row in tqdm(rows, "drawing", unit="shape")]
    labels = [train.captions[row][:4][-1] for row in rows]
    save_png(args.picture, contact_sheet(sheet, 8, labels))
    print(args.picture)


if __name__ == "__main__":
    command(main)
