"""prepare.py - samples of many shapes into memory-mapped files: in many processes, resumable, whatever a file does to its reader.

A prepared set is a folder of flat arrays (one row a shape) and one JSON file a kind and chunk of shapes with
their captions. A chunk's JSON is written last: whatever has one is done, so a killed run goes on
where it was, and any number of processes can share the work.
"""
import contextlib
import functools
import hashlib
import json
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.commands import UserError
from engine.files import atomic_write
from geometry import mesh_files, real, shapes, soup
from geometry.training_samples import KINDS, TAKE

CHUNK = 130                   # shapes prepared between two marks of progress
MEMORY = 12 << 30             # bytes that a worker may take
SEED = 0                      # another one, other built-in shapes
TEST = 10_000_000             # test shapes are numbered from here on: they never meet the training shapes
TRAIN_SHAPES = 10_400         # 800 of each class
TEST_SHAPES = 520             # 40 of each class


# ---------------------------------------------------------------------------- where shapes come from

def begins(path):
    """What the names of sets of those files begin with, of built-in shapes if None."""
    return f"{Path(path).resolve().stem}-" if path else "shapes-"


class BuiltIn:
    """The built-in shapes of a split, of all classes in turn or of some."""

    def __init__(self, split, count=None, classes=None):
        self.first, self.skipped, self.classes = TEST if split == "test" else 0, [], classes
        self.count = count or (TEST_SHAPES if split == "test" else TRAIN_SHAPES) * len(classes or shapes.CLASSES) // len(shapes.CLASSES)
        what = json.dumps([SEED, self.first, self.count, CHUNK, fingerprint(), *(classes or ())])
        self.name = f"{begins(None)}{split}-{self.count}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"

    def index(self, row):
        if not self.classes:
            return self.first + row
        turn, of = divmod(row, len(self.classes))
        return self.first + turn * len(shapes.CLASSES) + (shapes.CLASSES.index(self.classes[of]) - self.first) % len(shapes.CLASSES)

    def shape(self, row):
        return shapes.make(SEED, self.index(row))

    def about(self, shape, row):
        return {"index": self.index(row)}

    def mine(self, text):                                     # all of them are of the split
        return True


@functools.cache
def fingerprint():
    """Of the code that built-in samples come from: what the first 260 shapes are made of, samples of one of every class.
    Other shapes, other folder."""
    digest, classes = hashlib.sha256(), len(shapes.CLASSES)
    for row in range(20 * classes):
        shape = shapes.make(SEED, row)
        digest.update(repr((shape.parts, shape.captions)).encode())
        if row < classes:
            for kind in TAKE if row == 0 else ("surface", "faces"):          # pictures take a while: of one shape will do
                for values in TAKE[kind](shape, np.random.default_rng(0)).values():
                    digest.update(np.float16(values).tobytes())
    return digest.hexdigest()


class Files:
    """Shapes of files (geometry/real.py), in `copies` each. One folder holds all; a tenth of the files, always the same, is held out."""

    def __init__(self, split, path, copies=1):
        self.split, self.copies, (self.items, self.skipped) = split, copies, real.listed(path)
        self.count, self.first = copies * len(self.items), 0
        what = repr([[(i.key, i.captions, i.rotation, Path(i.file).stat().st_size) for i in self.items], copies, KINDS, soup.CELLS, soup.SKIN, soup.POOL, CHUNK])
        self.name = f"{begins(path)}{hashlib.sha256(what.encode()).hexdigest()[:12]}"
        draw = {item.key: int(hashlib.sha256(item.key.encode()).hexdigest(), 16) for item in self.items}
        tenth = {key for key, number in draw.items() if number % 10 == 0}
        self.held_out = tenth if len(tenth) > 1 else set(sorted(draw, key=draw.get)[:min(2, len(draw) // 2)])

    def shape(self, row):
        return mesh_files.shape(self.item(row), row // len(self.items))

    def item(self, row):
        return self.items[row % len(self.items)]

    def about(self, shape, row):
        return {"file": self.item(row).key, "copy": row // len(self.items), "licence": self.item(row).licence, "author": self.item(row).author}

    def mine(self, text):
        held_out = text["file"] in self.held_out
        return held_out and not text["copy"] if self.split == "test" else not held_out


# ---------------------------------------------------------------------------- preparing

def prepare_chunk(folder, source, chunk, kinds):
    """Rows chunk * CHUNK ... of the arrays of some kinds, then what the shapes are called: the mark that it is done."""
    torch.set_num_threads(1)                                  # the others have a process of their own
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for kind in kinds for name in KINDS[kind]}
    tried = folder / f"tried-{chunk:05d}"                     # the rows at which earlier attempts ended
    ended = tried.read_text().split() if tried.is_file() else []
    texts = []
    for row in range(chunk * CHUNK, min((chunk + 1) * CHUNK, source.count)):
        if ended.count(str(row)) == 2:
            texts.append({"file": source.item(row).key, "broken": "whoever reads it dies, twice"})
            continue
        tried.write_text(" ".join([*ended, str(row)]))
        try:
            shape = source.shape(row)
            for kind in kinds:
                rng = np.random.default_rng((SEED, source.first + row, 1 + list(KINDS).index(kind)))
                for name, values in TAKE[kind](shape, rng).items():
                    arrays[name][row] = values
            texts.append(source.about(shape, row) | {"class": shape.name, "attributes": shape.attributes, "captions": shape.captions})
        except Exception as error:
            if not isinstance(source, Files):                 # those are ours: a bug
                raise
            reason = str(error) if isinstance(error, UserError) else f"no samples can be taken of it ({type(error).__name__}: {error})"
            texts.append({"file": source.item(row).key, "broken": reason})
    for kind in kinds:
        with atomic_write(folder / f"{kind}-{chunk:05d}.json") as part:
            part.write_text(json.dumps(texts))
    tried.unlink()
    return len(texts)


def fill(folder, source, kinds, workers=2, shard=(0, 1)):
    """Prepare what is missing of a set, or every n-th chunk of it."""
    mark = lambda kind, chunk: folder / f"{kind}-{chunk:05d}.json"
    chunks = range(shard[0], -(-source.count // CHUNK), shard[1])
    todo = {chunk: missing for chunk in chunks if (missing := [kind for kind in kinds if not mark(kind, chunk).is_file()])}
    for chunk in todo:                                        # whatever ended an earlier run, it may not have been the file
        (folder / f"tried-{chunk:05d}").unlink(missing_ok=True)
    for kind in [kind for kind in kinds if not any(folder.glob(f"{kind}-*.json"))]:
        for name, (dtype, shape) in KINDS[kind].items():
            if not (folder / f"{name}.npy").is_file():
                lay_out(folder / f"{name}.npy", dtype, (source.count, *shape))
    size = lambda chunk: min(CHUNK, source.count - chunk * CHUNK)
    what = f"preparing {source.name}: {', '.join(kinds)}"
    with tqdm(total=sum(map(size, todo)), unit="shape", desc=what, disable=not todo) as bar:
        while todo:
            with ProcessPoolExecutor(workers, initializer=alone, initargs=(os.getpid(),)) as pool:
                jobs = {pool.submit(prepare_chunk, folder, source, chunk, missing): chunk for chunk, missing in todo.items()}
                try:
                    for job in as_completed(jobs):
                        bar.update(job.result())
                        del todo[jobs[job]]
                except BrokenProcessPool:                     # a file may end its reader; after two tries without it
                    if not any(folder.glob("tried-*")):
                        raise
                except BaseException:                         # Ctrl-C: what they are at is done again
                    for worker in active_children():
                        worker.kill()
                    pool.shutdown(cancel_futures=True)
                    raise


def alone(parent):
    """In a worker: Ctrl-C is for the parent to handle, without whom there is nothing to do; and no file may take all memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with contextlib.suppress(ImportError, ValueError, OSError):                        # not on every system
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def lay_out(path, dtype, shape):
    """An array file of that shape, unless another process has just made it."""
    with atomic_write(path.with_suffix(".new")) as part:
        array = np.lib.format.open_memmap(part, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # a full disk shows up now, as an error, not later as a crash
            with open(part, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
    path.with_suffix(".new").unlink(missing_ok=True)
