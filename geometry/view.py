"""view.py - opens a file that sample.py wrote: prints what it holds, draws it, or converts it.

    python -m geometry.view out/table-0.glb                         # -> out/table-0-view.png
    python -m geometry.view out/table-0.glb --turntable             # -> out/table-0-turning.gif
    python -m geometry.view out/table-0.glb --out table.obj         # another format
"""
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from trimesh.exchange.gltf import load_glb

from engine.commands import Parser, UserError, between, command
from geometry import render
from geometry.camera import as_tensor, to_srgb
from geometry.export import CLOUD, DC, GAUSSIANS, Cloud, Gaussians, Mesh
from geometry.meshes import check_mesh, face_areas

TYPES = {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8", "uchar": "u1", "uint8": "u1",
         "char": "i1", "int8": "i1", "short": "<i2", "int16": "<i2", "ushort": "<u2", "uint16": "<u2", "int": "<i4",
         "int32": "<i4", "uint": "<u4", "uint32": "<u4"}


def read_bytes(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a file that sample.py wrote") from None


def read_glb(path):
    """A file of write_glb -> vertices (v 3), faces (f 3), colours (v 3), smooth."""
    data = read_bytes(path)
    try:
        # trimesh.load would round colours of other writers to 8 bits
        meshes = list(load_glb(BytesIO(data), skip_materials=True)["geometry"].values())
    except Exception as error:                                      # trimesh raises errors of any type
        raise UserError(f"{path}: not a .glb file ({error!r})") from None
    if len(meshes) != 1 or "vertex_colors" not in meshes[0]:
        fault = "has no vertex colours" if len(meshes) == 1 else f"holds {len(meshes)} meshes"
        raise UserError(f"{path} {fault}; it must hold one mesh with vertex colours, as sample.py writes it")
    vertices, faces, linear = (np.array(meshes[0][name]) for name in ("vertices", "faces", "vertex_colors"))
    if vertices.shape[1:] != (3,) or faces.shape[1:] != (3,) or linear.shape[1:] not in ((3,), (4,)):
        raise UserError(f"{path}: its vertices or colours have another form than those that sample.py writes")
    if not np.isfinite(linear).all():
        raise UserError(f"{path}: holds colours that are not finite numbers (NaN)")
    check_mesh(vertices, faces)
    if face_areas(vertices, faces).sum() == 0:
        raise UserError(f"{path}: its faces have no area")
    most = np.iinfo(linear.dtype).max if linear.dtype.kind == "u" else 1.          # integers are shares of the largest
    colours = to_srgb(as_tensor(linear[:, :3] / most, torch.float64)).float().numpy()
    return vertices, faces.astype(np.int64), colours, "vertex_normals" in meshes[0]


def read_ply(path, needed):
    """A binary PLY file -> {name: k numbers} of its vertex element. The fields `needed` must be there, and finite."""
    head, end, body = read_bytes(path).partition(b"end_header\n")
    lines = [line.split() for line in head.decode("latin-1").split("\n") if line.strip()]
    if lines[:1] != [["ply"]] or not end:
        raise UserError(f"{path}: not a PLY file")
    if ["format", "binary_little_endian", "1.0"] not in lines:
        raise UserError(f"{path}: only binary little-endian PLY files are read; write it again as binary")
    elements = [i for i, words in enumerate(lines) if words[0] == "element"] + [len(lines)]
    name, count = (lines[elements[0]] + ["", ""])[1:3] if len(elements) > 1 else ("", "")
    if name != "vertex" or not count.isdecimal() or len(count) > 12:
        raise UserError(f"{path}: its first element is not 'vertex' with a count")

    fields = [words for words in lines[elements[0] + 1:elements[1]] if words[0] == "property"]
    names = [words[-1] for words in fields]
    missing = [name for name in needed if name not in names]
    if missing:
        raise UserError(f"{path}: has no {', '.join(missing)}; is it a file of another kind?")
    if any(len(words) != 3 or words[1] not in TYPES for words in fields):
        raise UserError(f"{path}: its vertices hold lists, which are not supported")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two fields of its vertices have the same name")

    row, count = np.dtype([(words[-1], TYPES[words[1]]) for words in fields]), int(count)
    if count == 0:
        raise UserError(f"{path}: holds no points")
    if len(body) < count * row.itemsize:
        raise UserError(f"{path}: truncated, {len(body)} bytes of {count * row.itemsize}; copy or write it again")
    table = np.frombuffer(body, row, count)
    damaged = [name for name in needed if not np.isfinite(table[name]).all()]
    if damaged:
        raise UserError(f"{path}: holds numbers that are not finite (NaN) in {', '.join(damaged)}")
    return {name: table[name] for name in names}


def read_shape(path):
    """Any file that sample.py wrote -> Mesh, Cloud or Gaussians."""
    if not str(path).lower().endswith(".ply"):
        return Mesh(*read_glb(path))
    names = GAUSSIANS if "f_dc_0" in read_ply(path, ["x", "y", "z"]) else CLOUD
    fields = read_ply(path, names)
    columns = lambda i, j: np.stack([fields[name] for name in names[i:j]], -1).astype(np.float32)          # k (j - i)
    if names is CLOUD:
        return Cloud(columns(0, 3), columns(3, 6), columns(6, 9) / 255)
    opacities = 1 / (1 + np.exp(-fields["opacity"].astype(np.float32)))
    rotations = columns(10, 14)
    rotations = rotations / np.linalg.norm(rotations, axis=1, keepdims=True).clip(1e-9)
    return Gaussians(columns(0, 3), np.exp(columns(7, 10)), rotations, opacities, .5 + DC * columns(3, 6))


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a file that sample.py wrote, .glb or .ply")
    parser.add_argument("--out", type=Path, help="picture, or .glb, .obj, .stl, .ply (default: a picture beside it)")
    parser.add_argument("--azimuth", type=float, default=35, help="degrees around the shape; 0 shows its front")
    parser.add_argument("--elevation", type=float, default=25, help="degrees above the horizon")
    parser.add_argument("--size", type=between(16, 4096), default=512, help="pixels along a side")
    parser.add_argument("--turntable", action="store_true", help="one full turn as a GIF")
    args = parser.parse_args()

    shape = read_shape(args.file)
    points = shape.positions()
    print(f"{shape}, from {points.min(0)} to {points.max(0)}, mean colour {shape.colours.mean(0)}")
    out = args.out or args.file.with_name(args.file.stem + ("-turning.gif" if args.turntable else "-view.png"))
    if out.suffix.lower() in (".glb", ".obj", ".stl", ".ply"):
        shape.save(out)
    elif args.turntable:
        render.save_gif(out, render.turntable(shape, size=args.size))
    else:
        render.save_png(out, shape.picture(args.size, azimuth=args.azimuth, elevation=args.elevation))
    print(out)


if __name__ == "__main__":
    command(main)
