"""fuzz.py - randomly changed files: does any loader crash, hang, or open files outside the folder?

Every loader reads a valid file in which bytes, numbers or names were changed. It may read it or refuse it with one
line, a UserError. A fault is any other exception, more than SECONDS or MEGABYTES, or a file opened ELSEWHERE.

    python -m research.fuzz --count 10000
"""
import io
import os
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image

import heads
from engine.commands import Parser, UserError, between, command
from geometry import mesh_files, real
from geometry.export import Cloud, Gaussians, Mesh
from geometry.view import read_shape
from prompts import picture_files
from research.bench import measure
from research.closure import ROOT

SECONDS, MEGABYTES = 20, 1000                                 # that a file may take
ELSEWHERE = b"../secret.txt", b"/etc/passwd", b"/dev/zero"    # names that are written into files
NUMBERS = b"-1", b"0", b"1e30", b"nan", b"65536", b"4294967295", b"99999999999999999999", b'"x"', b"[]", b"null"
opened = []                                                   # paths that Python opens, from `watch`
OBJ = (b"mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nvt 0 0\nvt 1 0\nvt 0 1\nusemtl a\n"
       b"f 1/1 2/2 3/3\nf 1/1 2/2 4/3\n")


def watch(event, arguments):
    """An audit hook (sys.addaudithook), which stays for good: notes every file that is opened, and whether to write."""
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        opened.append((Path(os.fsdecode(arguments[0])), bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))))


# ---------------------------------------------------------------------------- valid files, and their loaders

def box(suffix):
    mesh = trimesh.creation.box((1, 2, 3))
    mesh.visual.face_colors = np.arange(12 * 4).reshape(12, 4) * 5
    content = mesh.export(file_type=suffix)
    return content if isinstance(content, bytes) else content.encode()


def picture():
    content = io.BytesIO()
    Image.fromarray(np.pad(np.full((32, 32, 3), (200, 40, 40), np.uint8), ((16, 16), (16, 16), (0, 0)),
                           constant_values=255)).save(content, "png")
    return content.getvalue()


def packed(files):                                            # {name: content} -> a library of Sweet Home 3D
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return content.getvalue()


def sampled(shape):                                           # the file that sample.py would write of it
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{shape.suffix}"
        shape.save(path)
        return {path.name: path.read_bytes()}


def load_shapes(folder, pack=False):
    """Reads all shapes of a folder, as `--data` does; the first bad one is a UserError."""
    if pack:
        (folder / "a.sh3f").write_bytes(packed({path.name: path.read_bytes() for path in folder.iterdir()}))
    for item in real.list_items(folder)[0]:
        mesh_files.shape(item)


def loaders():
    """{what is read: its files, {name: content}, and a function of their folder}"""
    gltf = trimesh.exchange.gltf.export_gltf(trimesh.Scene(trimesh.creation.box()))
    members = {"PluginFurnitureCatalog.properties": b"license=CC0\nname#1=box\nmodel#1=/a.off\n", "a.off": box("off")}
    tiny, cube = ROOT / "checkpoints/tiny", trimesh.creation.box()
    v, c = np.float32(cube.vertices), np.float32(abs(cube.vertices))
    return {
        **{suffix: ({f"a.{suffix}": box(suffix)}, load_shapes) for suffix in ("ply", "glb", "stl", "off")},
        "obj": ({"a.obj": OBJ, "a.mtl": b"newmtl a\nKd 1 0 0\nmap_Kd a.png\n", "a.png": picture()}, load_shapes),
        "gltf": ({name.replace("model.gltf", "a.gltf"): raw for name, raw in gltf.items()}, load_shapes),
        "sh3f": ({"a.sh3f": packed(members)}, load_shapes),
        "files in a sh3f": (members, partial(load_shapes, pack=True)),
        "csv": ({"a.off": box("off"), "captions.csv": b"file,caption\na.off,a red box\n"}, load_shapes),
        "png": ({"a.png": picture()}, lambda folder: picture_files.read_picture(folder / "a.png")),
        "sampled mesh": (sampled(Mesh(v, cube.faces, c)), lambda folder: read_shape(folder / "a.glb")),
        "sampled cloud": (sampled(Cloud(v, v, c)), lambda folder: read_shape(folder / "a.ply")),
        "sampled Gaussians": (sampled(Gaussians(v, c, c[:, [0, 1, 2, 0]], c[:, 0], c)),
                              lambda folder: read_shape(folder / "a.ply")),
        "checkpoint": ({name: (tiny / name).read_bytes() for name in ("config.json", "head-sdf.safetensors")},
                       lambda folder: heads.load(folder, ["sdf"]))}


# ---------------------------------------------------------------------------- changes

def mutate(content, rng):
    """Bytes with one to four random changes; mostly at the beginning, where headers are."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        reach = max(1, min(len(content), int(2 ** rng.uniform(3, 20))))
        i, size, kind = int(rng.integers(reach)), int(2 ** rng.uniform(0, 6)), rng.integers(6)
        if kind == 0:
            content[i:i + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            content[i:i + 4] = bytes(rng.choice([0, 255, 127, 128], 4).astype(np.uint8))
        elif kind == 2:
            del content[i:i + size]
        elif kind == 3:
            content[i:i] = content[i:i + size] * int(rng.integers(1, 4))
        else:
            pattern, values = [(rb"-?\d+(\.\d+)?", NUMBERS), (rb"[\w./-]+\.(mtl|png|bin|off|obj)", ELSEWHERE)][kind - 4]
            if places := list(re.finditer(pattern, content[:reach])):
                start, end = places[rng.integers(len(places))].span()
                content[start:end] = values[rng.integers(len(values))]
    return bytes(content)


def attempt(load, folder):
    """Lets a loader read the folder -> "read", "refused", or the fault."""
    opened.clear()
    try:
        with mesh_files.limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(folder)
        result = "read"
    except UserError:
        result = "refused"
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    elsewhere = {(folder / os.fsdecode(name)).resolve() for name in ELSEWHERE}
    for path, writes in [(path.resolve(), writes) for path, writes in opened]:
        if path in elsewhere or writes and not path.is_relative_to(folder.resolve()):
            result = f"it {'writes' if writes else 'reads'} {path}"
    return result


def fuzz(name, count, seed=0):
    """`count` changed files for one loader -> {outcome: how often}, the most seconds and MB that one took."""
    (files, load), found, most = loaders()[name], Counter(), (0, 0)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        (Path(place) / "secret.txt").write_text("secret")
        for i in range(count):
            rng, folder, results = np.random.default_rng((seed, i)), Path(place) / f"{i}", []
            folder.mkdir()
            changed = list(files)[rng.integers(len(files))]
            for file, content in files.items():
                (folder / file).write_bytes(mutate(content, rng) if file == changed else content)
            seconds, megabytes = measure(lambda: results.append(attempt(load, folder)))
            shutil.rmtree(folder)
            most = np.maximum(most, (seconds, megabytes))
            result = results[0]
            if seconds > SECONDS or megabytes > MEGABYTES:
                result = f"{seconds:.0f} s, {megabytes:.0f} MB"
            found[result] += 1
            if result not in ("read", "refused"):
                print(f"{name}, seed {seed}, file {i}: {result}")
    return found, *most


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--count", type=between(1), default=1000, help="of changed files, over all loaders")
    parser.add_argument("--seed", type=between(0), default=0, help="of the changes")
    args, names = parser.parse_args(), list(loaders())
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), sys.addaudithook, [watch]) as pool:
        results = dict(zip(names, pool.map(partial(fuzz, count=-(-args.count // len(names)), seed=args.seed), names)))
    print("| loader | read | refused | seconds at most | MB at most |\n| --- | --: | --: | --: | --: |")
    for name, (found, seconds, megabytes) in results.items():
        print(f"| {name} | {found['read']} | {found['refused']} | {seconds:.1f} | {megabytes:.0f} |")
    if any(found.keys() - {"read", "refused"} for found, *_ in results.values()):
        raise UserError("there were faults; see above")


if __name__ == "__main__":
    command(main)
