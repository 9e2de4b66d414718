"""data.py - training samples from shapes: prepared once, memory-mapped, drawn in batches.

A prepared set is a folder of flat arrays (one row a shape) and one JSON file a kind and chunk of shapes with
their captions. A chunk's JSON is written last: whatever has one is done, so a killed run goes on
where it was, and any number of processes can share the work.

    python data.py                       # prepares the built-in shapes; a contact sheet to look at
    python data.py --shapes 5000 --out cache --workers 2
"""
import hashlib
import json
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import shapes
from layers import Parser, UserError, between, claim, command, written
from meshes import canonical, fit
from render import contact_sheet, flat, render_sdf, save_png

POINTS, QUERIES = 4096, 6144  # kept per shape; a training step draws from them
CHUNK = 130                   # shapes prepared between two marks of progress
TEST = 10_000_000             # test shapes are numbered from here on: they never meet the training shapes
TRAIN_SHAPES = 10_400         # 800 of each class
TEST_SHAPES = 520             # 40 of each class
FACES = 256                   # most faces of a low-poly mesh
VIEW = 128                    # pixels along a side of a picture
KINDS = {                     # kind of samples -> its arrays, a row a shape
    "surface": {"points": (np.float16, (POINTS, 3)), "normals": (np.int8, (POINTS, 3)), "colours": (np.uint8, (POINTS, 3)),
                "queries": (np.float16, (QUERIES, 3)), "distance": (np.float16, (QUERIES,))},              # 116 kB a shape
    "faces": {"corners": (np.int16, (FACES, 3, 3)), "face_colours": (np.uint8, (FACES, 3)), "components": (np.int16, (FACES,))},   # 6 kB
    "views": {"views": (np.uint8, (VIEW, VIEW, 4)), "angles": (np.float32, (2,))},                         # 66 kB
}


def sample_surface(shape, rng):
    """Queries: 2/6 within .015 of the surface, 3/6 within .06, 1/6 anywhere."""
    points, normals, colours = shape.surface(POINTS, rng)
    k = QUERIES // 6
    near = points[rng.permutation(POINTS)[:2 * k]] + rng.normal(0, .015, (2 * k, 3))
    wide = points[rng.permutation(POINTS)[:3 * k]] + rng.normal(0, .06, (3 * k, 3))
    queries = np.concatenate([near, wide, rng.uniform(-1, 1, (k, 3))]).clip(-1, 1).astype(np.float16)
    return {"points": points, "normals": np.round(normals * 127), "colours": np.round(colours * 255),
            "queries": queries, "distance": shape.distance(queries.astype(np.float32))}


def sample_faces(shape, rng):
    """A low-poly mesh in canonical order; -1 where there is no face."""
    corners, colours, components = canonical(*fit(*shape.mesh(), FACES))
    empty = FACES - len(corners)
    return {"corners": np.pad(corners, ((0, empty), (0, 0), (0, 0)), constant_values=-1),
            "face_colours": np.round(np.pad(colours, ((0, empty), (0, 0))) * 255),
            "components": np.pad(components, (0, empty), constant_values=-1)}


def sample_views(shape, rng):
    """One picture from a random side, a little above or below: colour times coverage, coverage."""
    angles = rng.uniform(0, 360), rng.uniform(-20, 60)
    return {"views": (view(shape, *angles) * 255).round(), "angles": angles}


def view(shape, azimuth, elevation, size=VIEW):
    vertices, faces, colours = shape.mesh(fine=True)
    paint = np.zeros_like(vertices)
    paint[faces] = colours[:, None]                           # no vertex has faces of two colours
    return flat(vertices, faces, paint, azimuth, elevation, size).numpy()


def prepare_chunk(folder, seed, first, kind, chunk, count):
    """Rows chunk * CHUNK ... of the arrays of a kind, then what the shapes are called: the mark that it is done."""
    torch.set_num_threads(1)                                  # the others have a process of their own
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in KINDS[kind]}
    texts = []
    for row in range(chunk * CHUNK, min((chunk + 1) * CHUNK, count)):
        shape = shapes.make(seed, first + row)
        rng = np.random.default_rng((seed, first + row, 1 + list(KINDS).index(kind)))
        for name, values in globals()[f"sample_{kind}"](shape, rng).items():
            arrays[name][row] = values
        texts.append({"index": first + row, "class": shape.name, "attributes": shape.attributes, "captions": shape.captions})
    with written(folder / f"{kind}-{chunk:05d}.json") as part:
        part.write_text(json.dumps(texts))
    return len(texts)


def fingerprint(seed, first, count):
    """Names a prepared set by what is in it: what the first 260 shapes are made of, samples of one of every class.
    Other shapes or settings, other folder."""
    digest, classes = hashlib.sha256(json.dumps([seed, first, count, CHUNK]).encode()), len(shapes.CLASSES)
    for index in range(first, first + 20 * classes):
        shape = shapes.make(seed, index)
        digest.update(repr((shape.parts, shape.captions)).encode())
        if index < first + classes:
            samples = [sample_surface, sample_faces] + [sample_views] * (index == first)     # pictures take a while: one will do
            for values in (v for kind in samples for v in kind(shape, np.random.default_rng(0)).values()):
                digest.update(np.float16(values).tobytes())
    return digest.hexdigest()[:12]


def prepare(split="train", count=None, seed=0, out="cache", workers=2, kinds=("surface",)):
    """Prepare what is missing of a set of built-in shapes; -> Prepared."""
    first = TEST if split == "test" else 0
    count = count or (TEST_SHAPES if split == "test" else TRAIN_SHAPES)
    folder = Path(out) / f"shapes-{split}-{count}-{fingerprint(seed, first, count)}"
    chunks, kinds = range(-(-count // CHUNK)), list(kinds)
    for kind in kinds:
        todo = [i for i in chunks if not (folder / f"{kind}-{i:05d}.json").is_file()]
        if not todo:
            continue
        for name, (dtype, shape) in KINDS[kind].items():
            if not (folder / f"{name}.npy").is_file():
                with written(folder / f"{name}.npy") as part:
                    array = np.lib.format.open_memmap(part, "w+", dtype, (count, *shape))
                    if hasattr(os, "posix_fallocate"):  # a full disk shows up now, as an error, not later as a crash
                        with open(part, "r+b") as file:
                            os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
        bar = tqdm(total=count, initial=(len(chunks) - len(todo)) * CHUNK, unit="shape", desc=f"preparing {split} shapes: {kind}")
        # Ctrl-C is for this process alone to handle
        with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            jobs = [pool.submit(prepare_chunk, folder, seed, first, kind, i, count) for i in todo]
            try:
                for job in as_completed(jobs):
                    bar.update(job.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        bar.close()
    return Prepared(folder, seed, kinds)


class Prepared:
    """A prepared set, read from disk as needed."""

    def __init__(self, folder, seed, kinds):
        self.folder, self.seed = Path(folder), seed
        try:
            self.arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for kind in kinds for name in KINDS[kind]}
            self.text = [row for path in sorted(self.folder.glob(f"{kinds[0]}-*.json")) for row in json.loads(path.read_text())]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is damaged ({error}); delete it, and it is made again") from None
        self.classes = [row["class"] for row in self.text]
        self.captions = [row["captions"] for row in self.text]

    def __len__(self):
        return len(self.text)

    def shape(self, row):
        """The shape itself, for what needs more than samples: exact distances at any point."""
        return shapes.make(self.seed, self.text[row]["index"])

    def cloud(self, rows, k, rng):
        """k oriented coloured surface points of each row: points, normals, colours, b k 3 each."""
        some = rng.permutation(POINTS)[:k]
        points, normals, colours = (torch.from_numpy(self.arrays[name][rows][:, some].astype(np.float32))
                                    for name in ("points", "normals", "colours"))
        return points, normals / 127, colours / 255

    def queries(self, rows, k, rng):
        """k points of each row and their signed distance: b k 3, b k."""
        some = rng.permutation(QUERIES)[:k]
        return {name: torch.from_numpy(self.arrays[name][rows][:, some].astype(np.float32)) for name in ("queries", "distance")}

    def faces(self, rows):
        """Low-poly meshes: corners b f 3 3 in bins, component b f (-1: no face), colours b f 3."""
        corners, components, colours = (torch.from_numpy(self.arrays[name][rows]) for name in ("corners", "components", "face_colours"))
        return {"corners": corners.long(), "components": components.long(), "face_colours": colours.float() / 255}

    def views(self, rows):
        """A picture of each: b size size 4, and where it was taken from, b 2 in degrees."""
        views, angles = (torch.from_numpy(self.arrays[name][rows]) for name in ("views", "angles"))
        return {"views": views.float() / 255, "angles": angles}


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--shapes", type=between(1), default=TRAIN_SHAPES, help="how many training shapes to prepare")
    parser.add_argument("--seed", type=between(0), default=0, help="another seed, other shapes")
    parser.add_argument("--out", default="cache", help="folder of the prepared sets")
    parser.add_argument("--workers", type=between(1), default=2, help="processes to use")
    parser.add_argument("--picture", default="out/shapes.png", help="contact sheet to write")
    args = parser.parse_args()
    claim(Path(args.picture).parent)
    start = time.time()
    train = prepare("train", args.shapes, args.seed, args.out, args.workers)
    prepare("test", None, args.seed, args.out, args.workers)
    print(f"{train.folder}: {len(train)} shapes, {time.time() - start:.1f} s")

    pictures, labels = [], []
    for i in tqdm(range(4 * len(shapes.CLASSES)), desc="drawing", unit="shape"):
        shape = shapes.make(args.seed, i // 4 + i % 4 * len(shapes.CLASSES))
        pictures.append(render_sdf(shape.distance, colour_fn=lambda x: shape.field(x)[1], size=160))
        labels.append(shape.captions[3])
    save_png(args.picture, contact_sheet(pictures, 8, labels))
    print(args.picture)


if __name__ == "__main__":
    command(main)
