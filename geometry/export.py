"""export.py - the shapes that are generated: meshes, point clouds, 3D Gaussians; written to files and read again.

    Mesh        .glb    vertices, faces, vertex colours (.obj; .stl without colours)
    Cloud       .ply    points, normals, 8-bit colours
    Gaussians   .ply    the layout of 3D Gaussian splatting (Kerbl et al. 2023), which its viewers open

Colours are sRGB everywhere in this code: the numbers of a picture's pixels. glTF defines vertex colours as linear
light, which viewers (three.js, Blender, Babylon) convert to sRGB for the screen. So a .glb stores linear light, in 8
bits, which trimesh keeps if it saves the file again. The error in sRGB is at most .013, below .1 at most .025.

    python -m geometry.export out/table-0.glb                       # prints what is in the file, and draws it
    python -m geometry.export out/table-0.glb --out table.obj       # another format
"""
import gc
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image
from trimesh.exchange.gltf import export_glb, load_glb

from engine.commands import Parser, UserError, between, command
from engine.files import atomic_write
from geometry import render
from geometry.camera import as_tensor
from geometry.light import to_linear, to_srgb
from geometry.meshes import check_mesh, closed_edges, face_areas, largest_component_share, sample_surface, watertight


class Shape:
    """What shapes of every kind have in common: how Python and notebooks show them."""

    def __repr__(self):
        faces = f", {len(self.faces):,} faces" if isinstance(self, Mesh) else ""
        return f"{type(self).__name__}: {len(self.positions()):,} points{faces}"

    def positions(self):
        return next(iter(vars(self).values()))                      # vertices, points or means

    def _repr_png_(self):
        content = BytesIO()
        Image.fromarray(self.picture()).save(content, "PNG")
        return content.getvalue()


@dataclass(repr=False)
class Mesh(Shape):
    """A surface."""
    vertices: np.ndarray  # v 3
    faces: np.ndarray     # f 3, outward
    colours: np.ndarray   # v 3, sRGB in [0, 1]
    smooth: bool = True   # False: low-poly, every face flat
    suffix = ".glb"

    def trimesh(self):
        colours = np.round(self.colours * 255).astype(np.uint8)
        return trimesh.Trimesh(self.vertices, self.faces, vertex_colors=colours, process=False)

    def save(self, path):
        suffix = Path(path).suffix.lower()
        if suffix in (".obj", ".stl"):
            check_faces(path, self.faces)
            content = self.trimesh().export(file_type=suffix[1:])
            with atomic_write(path) as temporary:
                temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        else:
            write_glb(path, self.vertices, self.faces, self.colours, self.smooth)

    def picture(self, size=320, **view):
        return render.render_mesh(self.vertices, self.faces, self.colours, size=size, **view)

    def surface(self, k, rng):
        """k points uniform over the surface (low-poly: where no component hides it), normals, colours: k 3 each."""
        points, face, weights = sample_surface(self.vertices, self.faces, k, rng, hidden=self.smooth)
        if not len(self.faces):
            return points, np.zeros_like(points), np.zeros_like(points)
        a, b, c = (self.vertices[self.faces[face][:, i]] for i in range(3))            # k 3
        normals = np.cross(b - a, c - a)
        normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-12)
        return points, normals, np.einsum("kc,kci->ki", weights, self.colours[self.faces[face]])

    def soundness(self):
        """The faults that a mesh of this kind can have: {test: result}."""
        if not self.smooth:
            _, place = np.unique(self.vertices, axis=0, return_inverse=True)      # corners may not be shared
            return {"closed edges": closed_edges(place.reshape(-1)[self.faces])}
        one_piece = largest_component_share(self.vertices, self.faces) >= .99
        return {"one piece": one_piece, "watertight": watertight(self.faces)}


@dataclass(repr=False)
class Cloud(Shape):
    """Surface points."""
    points: np.ndarray    # k 3
    normals: np.ndarray   # k 3, unit
    colours: np.ndarray   # k 3, sRGB in [0, 1]
    suffix = ".ply"

    def save(self, path):
        colours = np.round(self.colours * 255).astype(np.uint8)
        write_ply(path, [*zip(CLOUD, [*self.points.T, *self.normals.T, *colours.T])])

    def picture(self, size=320, **view):
        return render.render_points(self.points, self.colours, .03 * (2048 / len(self.points)) ** .5, size=size, **view)

    def surface(self, k, rng):
        rows = rng.choice(len(self.points), k, replace=k > len(self.points))
        return self.points[rows], self.normals[rows], self.colours[rows]

    def soundness(self):
        return {}


@dataclass(repr=False)
class Gaussians(Shape):
    """3D Gaussians with colours that do not depend on the view."""
    means: np.ndarray     # k 3
    scales: np.ndarray    # k 3, standard deviations
    rotations: np.ndarray  # k 4, w x y z, unit
    opacities: np.ndarray  # k, in (0, 1)
    colours: np.ndarray   # k 3, sRGB in [0, 1], light included
    suffix = ".ply"

    def save(self, path):
        """The layout has normals, opacities as logits, scales as logarithms, colours as spherical harmonics."""
        opacities = np.clip(self.opacities.astype(np.float64), 1e-6, 1 - 1e-6)
        normals, harmonics = np.zeros_like(self.means), (self.colours - .5) / DC
        columns = [*self.means.T, *normals.T, *harmonics.T, np.log(opacities / (1 - opacities)),
                   *np.log(self.scales).T, *self.rotations.T]
        write_ply(path, [*zip(["x", "y", "z", "nx", "ny", "nz", *GAUSSIANS[3:]], columns)])

    def picture(self, size=320, **view):
        return render.render_gaussians(self.means, self.scales, self.rotations, self.opacities, self.colours,
                                       size=size, **view)

    def surface(self, k, rng):
        """The normal is the shortest axis, on the side away from the centre of all Gaussians."""
        rows = rng.choice(len(self.means), k, replace=k > len(self.means))
        axes = render.rotation_matrices(torch.from_numpy(self.rotations[rows])).numpy()       # k 3 3, an axis a column
        normals = axes[np.arange(k), :, self.scales[rows].argmin(1)]
        outward = ((self.means[rows] - self.means.mean(0)) * normals).sum(1, keepdims=True) >= 0
        return self.means[rows], np.where(outward, normals, -normals), self.colours[rows]

    def soundness(self):
        return {}


def read_bytes(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a file that sample.py wrote") from None


def check_suffix(path, suffix):
    if Path(path).suffix.lower() != suffix:
        or_else = " (or .obj, .stl)" if suffix == ".glb" else ""
        raise UserError(f"{path}: a {suffix} file is written here; give it a name that ends in {suffix}{or_else}")


def check_faces(path, faces):
    if len(faces) == 0:
        raise UserError(f"{path}: the mesh is empty, there is nothing to write; try another seed, or train longer")


# ---------------------------------------------------------------------------- glb

def write_glb(path, vertices, faces, colours, smooth=True):
    """vertices (v 3), faces (f 3), sRGB colours (v 3) in 0..1. The same mesh gives the same bytes. Viewers shade every
    face flat if there are no normals (smooth=False)."""
    check_suffix(path, ".glb")
    check_faces(path, faces)
    linear = (255 * to_linear(as_tensor(colours, torch.float64).clamp(0, 1))).round().byte().numpy()
    mesh = trimesh.Trimesh(vertices, faces, vertex_colors=linear, process=False)        # process would merge vertices

    def finish(tree):
        primitive = tree["meshes"][0]["primitives"][0]
        # Without a material viewers assume polished metal, which looks black. Both sides of a face show, as here.
        material = {"pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": .8}, "doubleSided": True}
        tree["materials"], primitive["material"] = [material], 0

    data = export_glb(mesh, include_normals=smooth, tree_postprocessor=finish)
    del mesh
    gc.collect(1)       # objects of trimesh hold each other; Python would keep many before it looks
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


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


# ---------------------------------------------------------------------------- ply

TYPES = {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8", "uchar": "u1", "uint8": "u1",
         "char": "i1", "int8": "i1", "short": "<i2", "int16": "<i2", "ushort": "<u2", "uint16": "<u2", "int": "<i4",
         "int32": "<i4", "uint": "<u4", "uint32": "<u4"}
CLOUD = ["x", "y", "z", "nx", "ny", "nz", "red", "green", "blue"]
GAUSSIANS = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2",
             "rot_0", "rot_1", "rot_2", "rot_3"]
DC = .28209479177387814     # the constant spherical harmonic: colour = .5 + DC f_dc


def write_ply(path, columns):
    """columns: pairs of a name and k numbers. Bytes stay bytes, others become floats. One vertex element, binary."""
    check_suffix(path, ".ply")
    count = len(columns[0][1])
    if count == 0:
        raise UserError(f"{path}: there are no points to write; try another seed, or train longer")
    types = [(name, "u1" if values.dtype == np.uint8 else "<f4") for name, values in columns]
    table = np.empty(count, types)
    for name, values in columns:
        table[name] = values
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    header += [f"property {'uchar' if kind == 'u1' else 'float'} {name}" for name, kind in types] + ["end_header\n"]
    with atomic_write(path) as temporary:
        temporary.write_bytes("\n".join(header).encode() + table.tobytes())


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
