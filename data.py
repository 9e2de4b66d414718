"""data.py - training samples of shapes: prepared once, memory-mapped or on a GPU, drawn in batches.

geometry/prepare.py fills the arrays of a prepared set; Prepared draws from them, on the device where they lie, with
torch's global generator, or with `rng`. The built-in shapes need no download.

    python data.py                       # prepares the built-in shapes, and draws some of them
    python data.py --classes table --shapes 32
    python data.py --data path/to/meshes --out cache
    python data.py --data path/to/meshes --out cache --shard 0/4      # on the first of four machines
"""
import argparse
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
from geometry.symmetry import mirror_normals, mirror_pictures, move_azimuths, move_points, turns_to_front
from geometry.training_pictures import colours_named, recolour, relight
from geometry.training_samples import PICTURES, POINTS, QUERIES, SURFACE, vertex_coloured
from representations import REPRESENTATIONS


def seeded(seed, device="cpu"):
    """A generator for the `rng` of draws. seed: what numpy takes as a seed, or a generator of numpy."""
    return torch.Generator(device).manual_seed(int(np.random.default_rng(seed).integers(2 ** 62)))


def prepare(split="train", count=None, out="cache", workers=2, kinds=(SURFACE,), data=None, shard=(0, 1),
            classes=None, device="cpu"):
    """Prepares the missing samples of built-in shapes, or of the files of `data`. shard (i, n): only part i of n.
    -> Prepared"""
    if data:
        from geometry.real import Files  # readers of strangers' files, only for --data
        source = Files(split, data)
    else:
        source = BuiltIn(split, count, classes)
    kinds = [RECORDS, *kinds]
    fill(Path(out) / source.name, source, kinds, workers, shard)
    return Prepared(Path(out) / source.name, source, kinds, device)


def training_sets(args, kinds, device):
    """The training set and the held-out set of the flags of train.py."""
    settings = dict(out=args.cache, workers=args.workers, kinds=kinds, data=args.data, classes=args.classes,
                    device=device)
    train = prepare("all" if args.all_shapes else "train", args.shapes, **settings)
    test = prepare("test", None, **settings)
    if min(len(train), len(test)) < 2:
        where = f", see {train.folder}/skipped.csv" if train.broken else ""
        raise UserError(f"{args.data} has {len(train)} shapes to train on and {len(test)} held out, two of each are "
                        f"needed; {len(train.broken)} were left out{where}")
    return train, test


class Captions:
    """The captions of the shapes of a set as numbers, rows of `texts`: they are drawn on the device."""

    def __init__(self, captions, device):
        self.texts = sorted({caption for own in captions for caption in own})
        number = {text: i for i, text in enumerate(self.texts)}
        flat = torch.tensor([number[caption] for own in captions for caption in own])         # k, shape after shape
        counts = torch.tensor([len(own) for own in captions])                                 # r
        shape = torch.arange(len(captions)).repeat_interleave(counts)                         # k
        weights = torch.tensor([len(text.split()) ** 2 for text in self.texts])
        ends = weights[flat].cumsum(0)                                                        # k
        high = ends[counts.cumsum(0) - 1]                                                     # r
        pairs = (shape * len(self.texts) + flat).sort().values                                # k
        tables = flat, ends, high, F.pad(high[:-1], (1, 0)), pairs, colours_named(self.texts)
        self.flat, self.ends, self.high, self.low, self.pairs, self.colours = (x.to(device) for x in tables)

    def draw_captions(self, rows, rng=None):
        """One caption of each row; its sampling weight is its number of words, squared: most are full descriptions."""
        share = torch.rand(len(rows), generator=rng, device=rows.device)
        at = self.low[rows] + (share * (self.high - self.low)[rows]).long()
        return self.flat[torch.searchsorted(self.ends, at, right=True)]           # b

    def true(self, captions, rows):                           # b, k -> is caption i one of row j? b k
        pair = rearrange(captions, "b -> b 1") + rows * len(self.texts)
        return self.pairs[torch.searchsorted(self.pairs, pair).clamp(max=len(self.pairs) - 1)] == pair


class Prepared:
    """A prepared set: the shapes of a split that have samples of all kinds. Drawing is indexing: a row is a shape in a
    position, `item` its number in the source and in the arrays, `position` that of geometry/symmetry.py.

    The first len(self) rows are all shapes as their source orients them. Built-in shapes have no other rows. Of files,
    the same shapes follow, mirrored, then turned, in seven more positions. A shape in other proportions or colours is
    an item of its own, with captions and pictures (`stretched` in geometry/real.py).

    Arrays that do not fit into a GPU's memory stay on disk: `streamed`, worker processes draw batches of them
    (engine/streamed.py). Others lie on `device`, as rows do."""

    def __init__(self, folder, source, kinds, device="cpu"):
        self.folder, self.source, self.version = Path(folder), source, version(source)
        self.folders = {kind.name: self.folder / source.folder(kind) for kind in kinds}
        try:                                                  # "c": torch wants them writable; files do not change
            arrays = {name: torch.from_numpy(np.load(self.folders[kind.name] / f"{name}.npy", mmap_mode="c"))
                      for kind in kinds for name in kind.arrays}
            records = [read_records(folder) for folder in self.folders.values()]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is damaged ({error}); delete it, and run the same command again") from None
        self.streamed = not fits(sum(array.nbytes for array in arrays.values()), torch.device(device))
        self.device = torch.device("cpu" if self.streamed else device)
        self.arrays = {name: array.to(self.device) for name, array in arrays.items()}

        # the shapes: those that no kind of samples lacks
        broken = {item: record for of_kind in records for item, record in of_kind.items() if "broken" in record}
        self.broken = {record["file"]: record["broken"] for item, record in broken.items() if item < source.files}
        items = [item for item in sorted(set.intersection(*map(set, records)))
                 if item not in broken and source.in_split(item)]
        self.records = [records[0][item] for item in items]
        self.classes = [record["class"] for record in self.records]
        self.captions = [record["captions"] for record in self.records]
        self.name = f"{source.name}-{source.split}-{source.positions}" if source.files else source.name
        self.name += f"-{crc32(repr(sorted(broken)).encode()):x}" * bool(broken)       # it names files of tokens
        if source.skipped or self.broken:
            path = self.folder / "skipped.csv"
            with atomic_write(path) as part, part.open("w", newline="", errors="backslashreplace") as file:
                csv.writer(file).writerows([("file", "reason"), *source.skipped, *self.broken.items()])

        # the rows: all shapes in position 0, all in position 1 ...
        self.item = self.rows_of(torch.tensor(items, dtype=torch.long))
        self.position = torch.arange(source.positions, device=self.device).repeat_interleave(len(items))

    def __len__(self):
        return len(self.records)

    def rows_of(self, values):
        """Values of the shapes -> the same for all rows."""
        return torch.as_tensor(values, device=self.device).repeat(self.source.positions)

    def shape(self, row):
        """The source shape, in position 0: exact distances at any point."""
        return self.source.shape(int(self.item[row]))

    # ------------------------------------------------------------------------ which rows

    def drawable(self, turned=False):
        """How many rows, the first ones, are drawn from. Training files are drawn as they are and mirrored; turned: in
        all positions, for stages without prompts, as a prompt does not define the front. Held-out files stay as they
        are."""
        most = 8 if turned else 2
        if self.source.files and self.source.split == "test":
            most = 1
        return len(self) * min(self.source.positions, most)

    @functools.cached_property
    def weights(self):                                        # sampling weights of the shapes
        precise = torch.float if self.device.type == "mps" else torch.double
        return torch.tensor([self.source.weight(item) for item in self.item[:len(self)].tolist()], dtype=precise,
                            device=self.device)

    def draw_rows(self, count, turned=False, weights=None):
        """Rows of `count` random shapes. weights: of the shapes, other ones than those of the set."""
        weights = self.weights if weights is None else weights
        ends = weights.repeat(self.drawable(turned) // len(self)).cumsum(0)
        share = torch.rand(count, dtype=ends.dtype, device=self.device)
        return torch.searchsorted(ends, share * ends[-1], right=True).clamp(max=len(ends) - 1)

    def draw_distinct(self, count, turned=False, first=None):
        """`count` different random rows, at most all. first: booleans of all rows; these are taken first."""
        rows = self.drawable(turned)
        weights = self.weights.repeat(rows // len(self))
        keys = torch.rand(rows, device=self.device) ** (1 / weights)              # Efraimidis and Spirakis (2006)
        if first is not None:
            keys = keys + 1. * first[:rows]
        return keys.argsort(descending=True)[:count]

    def of_two_classes(self):
        """Booleans of all rows: is its class one of two random ones (those of two random shapes)?"""
        pair = self.class_of[self.draw_rows(2)]
        return (self.class_of == pair[:1]) | (self.class_of == pair[1:])

    @functools.cached_property
    def class_of(self):                                       # number of each row's class
        return self.rows_of(np.unique(self.classes, return_inverse=True)[1])

    def spread(self, count, turned=False):                    # rows from all of the set: files are sorted
        rows = self.drawable(turned) if turned else len(self)
        return np.linspace(0, rows - 1, min(count, rows)).astype(int)

    def as_shown(self, rows, which):
        """The rows of these shapes turned until their pictures `which` are from the front, to 45 degrees. Files do not
        define a front: with a picture, the shape is turned as in the picture. Built-in shapes have a front."""
        if self.source.positions == 1:
            return rows
        position = self.position[rows]
        azimuth = move_azimuths(self.arrays["picture_azimuth"][self.item[rows], which], position)
        return (position + 2 * turns_to_front(azimuth)) % 8 * len(self) + rows % len(self)

    # ------------------------------------------------------------------------ their samples

    def take(self, name, rows, columns=None):
        """Rows of an array, and some of their columns, as floats. They are samples of shapes in position 0."""
        items = self.item[torch.as_tensor(rows, device=self.device)]
        array = self.arrays[name]
        return (array[items] if columns is None else array[items[:, None], columns]).float()

    def moved(self, x, rows):
        """Points or vectors b k 3 of shapes in position 0, moved to the positions of these rows."""
        return x if self.source.positions == 1 else move_points(x, self.position[rows])

    def cloud(self, rows, k, rng=None):
        """k oriented coloured surface points of each row: points, normals, colours, b k 3 each."""
        columns = torch.rand(POINTS, generator=rng, device=self.device).argsort()[:k]
        points, normals, colours = (self.take(name, rows, columns) for name in ("points", "normals", "colours"))
        return self.moved(points, rows), self.moved(normals, rows) / 127, colours / 255

    @functools.cached_property
    def coloured(self):
        """1 for each row that has colours; 0 for those of files without, which are GREY all over."""
        own = self.arrays["colours"][self.item[:len(self)]]                       # shapes k 3
        return self.rows_of((own != round(255 * GREY)).flatten(1).any(1).float())

    def queries(self, rows, k, rng=None):
        """k points of each row and their signed distance: {"queries": b k 3, "distance": b k}."""
        columns = torch.rand(QUERIES, generator=rng, device=self.device).argsort()[:k]
        return {"queries": self.moved(self.take("queries", rows, columns), rows),
                "distance": self.take("distance", rows, columns)}

    @functools.cached_property
    def table(self):
        return Captions(self.captions * self.source.positions, self.device)

    def random_pictures(self, count, rng=None):
        """Which picture of `count` shapes."""
        return torch.randint(self.source.pictures, (count,), generator=rng, device=self.device)

    def pictures(self, rows, rng=None, which=None, vary=True, recoloured=None):
        """One picture of each row in random light (geometry/training_pictures.py): b 3 s s. recoloured: b m, colours
        that are replaced in each picture (training_pictures.colours_named)."""
        rows = torch.as_tensor(rows, device=self.device)
        which = self.random_pictures(len(rows), rng) if which is None else which
        names = "picture_colours", "picture_normals", "picture_coverage"
        colours, normals, coverage = (self.arrays[name][self.item[rows], which].float() for name in names)
        if self.source.positions > 1:
            position = self.position[rows]
            colours, coverage = mirror_pictures(colours, position), mirror_pictures(coverage, position)
            normals = mirror_normals(normals, position)
        if recoloured is not None:
            colours = recolour(colours, coverage, recoloured, rng)
        return relight(colours, normals, coverage, rng, vary)


def parse_shard(text):
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
    flag("--shard", type=parse_shard, default=(0, 1), metavar="i/n",
         help="only part i of n, from 0: n machines can fill one folder")
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
