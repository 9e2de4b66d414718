"""fuzz.py - files as a stranger could send them, changed at random: does any loader crash, hang, or open other files?

Every loader reads a valid file in which bytes, numbers or names were changed. It may read it or refuse it with one
line, a UserError. A fault is any other exception, more than SECONDS or MEGABYTES, reading a file of ELSEWHERE, or
writing a file outside the folder.

    python -m evaluation.fuzz --count 10000
"""
import io
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image
from tqdm import tqdm

import heads
from engine.commands import Parser, UserError, between, command
from engine.files import atomic_write, make_folder
from evaluation.exam import ROOT
from evaluation.results import write_table
from evaluation.timing import measure
from geometry import mesh_files, real
from geometry.export import Cloud, Gaussians, Mesh
from geometry.view import read_shape
from prompts import picture_files

SECONDS, MEGABYTES = 20, 1000                                 # that a file may take
ELSEWHERE = ("../secret.txt", "/etc/passwd", "/dev/zero")     # names that are written into files
NUMBERS = b"-1", b"0", b"1e30", b"nan", b"65536", b"4294967295", b"99999999999999999999", b'"x"', b"[]", b"null"
opened = []                                                   # by Python while it fuzzes: (path, whether to write)
watching = False


def note_opened(event, arguments):
    if watching and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        opened.append((Path(os.fsdecode(arguments[0])), bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))))


# ---------------------------------------------------------------------------- valid files, and their loaders

def box(suffix):
    mesh = trimesh.creation.box((1, 2, 3))
    mesh.visual.face_colors = np.arange(12 * 4).reshape(12, 4) * 5
    content = mesh.export(file_type=suffix)
    return content if isinstance(content, bytes) else content.encode()


def textured():
    """An OBJ with its material and its texture."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "png")
    corners = b"v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nvt 0 0\nvt 1 0\nvt 0 1\n"
    return {"a.obj": b"mtllib a.mtl\n" + corners + b"usemtl a\nf 1/1 2/2 3/3\nf 1/1 2/2 4/3\n",
            "a.mtl": b"newmtl a\nKd 1 0 0\nmap_Kd a.png\n", "a.png": picture.getvalue()}


def gltf():
    """A glTF and the file of its numbers."""
    tree = trimesh.exchange.gltf.export_gltf(trimesh.Scene(trimesh.creation.box()))
    return {"a.gltf" if name == "model.gltf" else name: content for name, content in tree.items()}


def members():
    """What is in a library of Sweet Home 3D."""
    return {"PluginFurnitureCatalog.properties": b"license=CC0\nname#1=box\nmodel#1=/a.off\n", "a.off": box("off")}


def pack(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return content.getvalue()


def picture():
    shown, content = Image.new("RGB", (64, 64), "white"), io.BytesIO()
    shown.paste((200, 40, 40), (16, 16, 48, 48))
    shown.save(content, "png")
    return {"a.png": content.getvalue()}


def sampled(make):
    """make(vertices, faces, colours) -> a shape; the file of it that sample.py would write."""
    mesh = trimesh.creation.box()
    vertices = np.float32(mesh.vertices)
    with tempfile.TemporaryDirectory() as folder:
        shape = make(vertices, mesh.faces, abs(vertices))
        path = Path(folder) / f"a{shape.suffix}"
        shape.save(path)
        return {path.name: path.read_bytes()}


def checkpoint():
    folder = ROOT / "checkpoints/tiny"
    return {name: (folder / name).read_bytes() for name in ("config.json", "head-sdf.safetensors")}


def load_shapes(folder):
    """Reads all shapes of a folder, as `--data` does; the first bad one is a UserError."""
    for item in real.list_items(folder)[0]:
        mesh_files.shape(item)


def load_packed(folder):
    raw = pack({path.name: path.read_bytes() for path in folder.iterdir()})
    (folder / "a.sh3f").write_bytes(raw)
    load_shapes(folder)


LOADERS = {  # what is read: its files, {name: content}, and a function of their folder
    **{suffix: (lambda suffix=suffix: {f"a.{suffix}": box(suffix)}, load_shapes)
       for suffix in ("ply", "glb", "stl", "off")},
    "obj": (textured, load_shapes), "gltf": (gltf, load_shapes),
    "sh3f": (lambda: {"a.sh3f": pack(members())}, load_shapes), "files in a sh3f": (members, load_packed),
    "csv": (lambda: {"a.off": box("off"), "captions.csv": b"file,caption\na.off,a red box\n"}, load_shapes),
    "png": (picture, lambda folder: picture_files.read_picture(folder / "a.png")),
    "sampled mesh": (lambda: sampled(Mesh), lambda folder: read_shape(folder / "a.glb")),
    "sampled cloud": (lambda: sampled(lambda v, f, c: Cloud(v, v, c)), lambda folder: read_shape(folder / "a.ply")),
    "sampled Gaussians": (lambda: sampled(lambda v, f, c: Gaussians(v, c, c[:, [0, 1, 2, 0]], c[:, 0], c)),
                          lambda folder: read_shape(folder / "a.ply")),
    "checkpoint": (checkpoint, lambda folder: heads.load(folder, ["sdf"]))}


# ---------------------------------------------------------------------------- changes

def mutate(content, rng):
    """Bytes with one to four random changes; mostly at the beginning, where headers are."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        reach = max(1, min(len(content), int(2 ** rng.uniform(3, 20))))
        i, size = int(rng.integers(reach)), int(2 ** rng.uniform(0, 6))
        kind = rng.integers(6)
        if kind == 0:
            content[i:i + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            content[i:i + 4] = bytes(rng.choice([0, 255, 127, 128], 4).astype(np.uint8))
        elif kind == 2:
            del content[i:i + size]
        elif kind == 3:
            content[i:i] = content[i:i + size] * int(rng.integers(1, 4))
        else:
            pattern, values = (rb"-?\d+(\.\d+)?", NUMBERS) if kind == 4 else \
                (rb"[\w./-]+\.(mtl|png|bin|off|obj)", [name.encode() for name in ELSEWHERE])
            places = list(re.finditer(pattern, content[:reach]))
            if places:
                start, end = places[rng.integers(len(places))].span()
                content[start:end] = values[rng.integers(len(values))]
    return bytes(content)


def outcome(load, folder):
    """"read", "refused", or what went wrong; the seconds and the MB that it took."""
    results = []
    seconds, megabytes = measure(lambda: results.append(attempt(load, folder)), torch.device("cpu"))
    if seconds > SECONDS:
        results = [f"{seconds:.0f} seconds"]
    if megabytes > MEGABYTES:
        results = [f"{megabytes:.0f} MB"]
    return results[0], seconds, megabytes


def attempt(load, folder):
    """Lets a loader read the folder -> "read", "refused", or what went wrong."""
    global watching
    opened.clear()
    watching = True
    try:
        with mesh_files.limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(folder)
        result = "read"
    except UserError:
        result = "refused"
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    finally:
        watching = False
    elsewhere = {(folder / name).resolve() for name in ELSEWHERE}
    for path, writes in opened:
        path = path.resolve()
        if path in elsewhere or writes and not path.is_relative_to(folder.resolve()):
            return f"it {'writes' if writes else 'reads'} {path}"
    return result


def fuzz(name, count, seed=0, out=None):
    """`count` changed files for one loader -> {outcome: how often}, the most seconds and MB that one took. Those with
    a fault are kept in the folder `out`."""
    make, load = LOADERS[name]
    files, found, most = make(), {"read": 0, "refused": 0}, (0, 0)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        (Path(place) / "secret.txt").write_text("secret")
        for i in range(count):
            rng, folder = np.random.default_rng((seed, i)), Path(place) / "files"
            changed = list(files)[rng.integers(len(files))]
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for file, content in files.items():
                (folder / file).write_bytes(mutate(content, rng) if file == changed else content)
            result, *costs = outcome(load, folder)
            most = np.maximum(most, costs)
            found[result] = found.get(result, 0) + 1
            if out and result not in ("read", "refused"):
                shutil.copytree(folder, Path(out) / f"{name}-{seed}-{i}", dirs_exist_ok=True)
    return found, *most


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--count", type=between(1), default=1000, help="of changed files, over all loaders")
    parser.add_argument("--seed", type=between(0), default=0, help="of the changes")
    parser.add_argument("--out", default="out/fuzz", help="folder of the table, and of files with a fault")
    args = parser.parse_args()
    make_folder(args.out)
    rows, faults = [], {}
    work = partial(fuzz, count=-(-args.count // len(LOADERS)), seed=args.seed, out=args.out)
    try:
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), sys.addaudithook, [note_opened]) as pool:
            results = list(tqdm(pool.map(work, LOADERS), total=len(LOADERS), unit="loader"))
    except BrokenProcessPool:
        raise UserError(f"a loader crashed its process; see {tempfile.gettempdir()}/fuzz-*/files") from None
    for name, (found, seconds, megabytes) in zip(LOADERS, results):
        wrong = {result: times for result, times in found.items() if result not in ("read", "refused")}
        faults[name] = wrong
        rows.append({"loader": name, "files": str(sum(found.values())), "read": str(found["read"]),
                     "refused": str(found["refused"]), "faults": str(sum(wrong.values())),
                     "seconds at most": seconds, "MB at most": megabytes})
    write_table(args.out, "fuzz", rows)
    with atomic_write(Path(args.out) / "faults.json") as part:
        part.write_text(json.dumps(faults, indent=1) + "\n")
    if any(faults.values()):
        raise UserError(f"there were faults; they are in {args.out}/faults.json, the files beside it")


if __name__ == "__main__":
    command(main)
