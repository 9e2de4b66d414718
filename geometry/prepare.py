"""prepare.py - fills the arrays of a prepared set, in many processes. It can resume, and survives files that crash it.

A prepared set has a folder for each kind of samples, with arrays (one row a shape), and a JSON file for each chunk of
shapes, which is written when the chunk is done. A killed run goes on where it was, and several processes or machines
can share the work. A folder's name ends in a digest of what its kind depends on: new captions leave the arrays as they
are.
"""
import contextlib
import hashlib
import json
import os
import resource
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from tqdm import tqdm

from engine.commands import UserError
from engine.files import atomic_write
from geometry.kinds import RECORDS
from geometry.training_samples import SURFACE

CHUNK = 130                   # shapes in a chunk
SECONDS = .5                  # between two looks at what the workers have done
MEMORY = 12 << 30             # bytes that a worker may allocate
SEED = 0                      # of all built-in shapes
TRAIN_SHAPES = 2_600          # built-in ones: 200 of each class


# ---------------------------------------------------------------------------- sources of shapes
# A source is BuiltIn (geometry/built_in.py) or Files (geometry/real.py). `files`: how many files its shapes come from;
# 0 for built-in shapes, which are never broken, are of any number, and have a front.

def name_begins(path):
    """How the names of sets of these files begin; None: of sets of built-in shapes."""
    return f"{Path(path).resolve().stem}-" if path else "shapes-"


def short_digest(*values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def counts(source, kind):
    """[how many samples are taken of a shape], if there are several."""
    return [getattr(source, kind.several)] if kind.several else []


def version(source):
    """The name of a set, and a digest of what its surfaces depend on: what config.json says a stage learnt from."""
    everything = "-all" * (source.files > 0 and source.split == "all")
    return f"{source.name}-{source.folder(SURFACE).split('-')[-1]}{everything}"


# ---------------------------------------------------------------------------- preparing

def read_records(folder):
    """{row: record} of all shapes that are done in the folder of a kind."""
    return {int(path.stem) * CHUNK + i: record for path in sorted(folder.glob("?????.json"))
            for i, record in enumerate(json.loads(path.read_text()))}


def prepare_chunk(folder, source, chunk, kinds):
    """Fill the rows of a chunk in the arrays of these kinds, then write what became of its shapes. -> their number."""
    torch.set_num_threads(1)                                  # other workers use the other cores
    arrays = {name: np.load(folder / source.folder(kind) / f"{name}.npy", mmap_mode="r+")
              for kind in kinds for name in kind.arrays}
    attempts = folder / f"tried-{chunk:05d}"                  # rows at which a worker crashed, then the current row
    crashed = attempts.read_text().split() if attempts.is_file() else []
    records = []
    for row in range(chunk * CHUNK, min((chunk + 1) * CHUNK, source.count)):
        if crashed.count(str(row)) == 2:
            if not source.files:
                raise UserError(f"a process was killed twice at shape {row}; give fewer --workers, or more memory")
            records.append({"file": source.items[row].key, "broken": "the loader crashed twice on this file"})
            continue
        attempts.write_text(" ".join([*crashed, str(row)]))
        try:
            shape = source.shape(row)
            for kind in kinds:
                rng = np.random.default_rng((SEED, source.first + row, crc32(kind.name.encode())))
                for name, values in kind.take(shape, rng, *counts(source, kind)).items():
                    arrays[name][row] = values
            about = {"class": shape.name, "attributes": shape.attributes, "captions": shape.captions}
            records.append(source.origin(row) | about)
        except Exception as error:
            if not source.files:                              # a built-in shape never fails: this is a bug
                raise
            unknown = f"no samples can be taken of it ({type(error).__name__}: {error})"
            reason = str(error) if isinstance(error, UserError) else unknown
            records.append({"file": source.items[row].key, "broken": reason})
    for kind in kinds:                                        # only RECORDS says more than which files are broken
        done = records if kind == RECORDS else [{key: x[key] for key in x if "broken" in x} for x in records]
        with atomic_write(folder / source.folder(kind) / f"{chunk:05d}.json") as part:
            part.write_text(json.dumps(done))
    attempts.unlink(missing_ok=True)                          # another process may prepare the same
    return len(records)


def fill(folder, source, kinds, workers=2, shard=(0, 1)):
    """Prepare the missing chunks that have shapes of the split; shard (i, n): only chunks i, i + n, i + 2 n ..."""
    todo = {}                                                 # {chunk: kinds of samples that it lacks}
    for chunk in range(shard[0], -(-source.count // CHUNK), shard[1]):
        rows = range(chunk * CHUNK, min((chunk + 1) * CHUNK, source.count))
        if not any(map(source.in_split, rows)):
            continue
        missing = [kind for kind in kinds if not (folder / source.folder(kind) / f"{chunk:05d}.json").is_file()]
        if missing:
            todo[chunk] = missing
            (folder / f"tried-{chunk:05d}").unlink(missing_ok=True)    # an earlier run may have ended for other reasons
    for place, kind in [(folder / source.folder(kind), kind) for kind in kinds]:
        for name, (dtype, shape) in kind.arrays.items():
            if not any(place.glob("?????.json")) and not (place / f"{name}.npy").is_file():
                create_array(place / f"{name}.npy", dtype, (source.count, *counts(source, kind), *shape))

    names = ", ".join(kind.name for kind in kinds)
    total, finished = sum(min(CHUNK, source.count - chunk * CHUNK) for chunk in todo), 0
    with tqdm(total=total, unit="shape", desc=f"preparing {source.name}: {names}", disable=not todo) as bar:
        while todo:
            with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(os.getpid(),)) as pool:
                jobs = {pool.submit(prepare_chunk, folder, source, chunk, todo[chunk]): chunk for chunk in todo}
                try:
                    waiting = jobs.keys()
                    while waiting:
                        ended, waiting = wait(waiting, SECONDS, FIRST_COMPLETED)
                        for job in ended:
                            finished += job.result()
                            del todo[jobs[job]]
                        bar.update(max(0, finished + sum(shapes_done(folder, chunk) for chunk in todo) - bar.n))
                except BrokenProcessPool:                     # a file crashed its loader: which? one at a time tells
                    if not any(folder.glob("tried-*")):
                        raise
                    workers = 1
                except BaseException:                         # Ctrl-C: unfinished chunks are done again by the next run
                    for worker in active_children():
                        worker.kill()
                    pool.shutdown(cancel_futures=True)
                    raise


def shapes_done(folder, chunk):
    """How many shapes of an unfinished chunk are done: those before the current row, which its worker writes down."""
    with contextlib.suppress(FileNotFoundError, IndexError):  # no worker has it, or the file is just being written
        return int((folder / f"tried-{chunk:05d}").read_text().split()[-1]) % CHUNK
    return 0


def start_worker(parent):
    """A worker leaves Ctrl-C and kill to its parent; it ends when its parent ends; and its memory is limited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with contextlib.suppress(ValueError, OSError):            # macOS has no such limit
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()     # CUDA maps much
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def create_array(path, dtype, shape):
    """Creates an array file, unless another process is first."""
    with atomic_write(path.with_suffix(".new")) as part:
        array = np.lib.format.open_memmap(part, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):                    # macOS has none; a full disk is an error now
            with open(part, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
    path.with_suffix(".new").unlink(missing_ok=True)
