"""geometry/export.py - what comes out: meshes, point clouds, 3D Gaussians; to files and back in.

    Mesh        .glb    vertices, faces, vertex colours
    Cloud       .ply    points, normals, 8-bit colours
    Gaussians   .ply    the layout of 3D Gaussian splatting (Kerbl et al. 2023), which its viewers open

Colours of a glb: everywhere else in this code they are sRGB, the numbers one reads off a picture. glTF defines
vertex colours as linear light, and viewers (three.js, Blender, Babylon) encode them for the screen once
more, so sRGB numbers stored there come out pale. trimesh stores what it is given, in 8 bits, too few for
dark linear colours. So colours go out as linear light in 32-bit floats: a viewer shows our sRGB numbers,
and read_glb returns them to five decimals.

    python geometry/export.py out/table-0.glb        # says what is in the file
"""
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import trimesh
from trimesh.exchange.gltf import export_glb, load_glb

from engine.commands import Parser, UserError, between, command
from engine.files import atomic_write
from geometry.meshes import check_mesh, closed_edges, face_areas, largest_component_share, sample_surface, watertight
from geometry.render import MODES, render_gaussians, render_mesh, render_points, save_gif, save_png, turned, turntable


@dataclass
class Mesh:
    """A surface."""
    vertices: np.ndarray  # v 3
    faces: np.ndarray     # f 3, outward
    colours: np.ndarray   # v 3, sRGB in [0, 1]
    smooth: bool = True   # False: low-poly, every face flat
    suffix = ".glb"

    def save(self, path):
        write_glb(path, self.vertices, self.faces, self.colours, self.smooth)

    def picture(self, size=320, **view):
        return render_mesh(self.vertices, self.faces, self.colours, size=size, **view)

    def surface(self, k, rng):
        """k points, uniform over what is visible of it (low-poly parts end inside each other), their normals and colours: k 3 each."""
        points, face, weights = sample_surface(self.vertices, self.faces, k, rng, hidden=self.smooth)
        if not len(self.faces):
            return points, np.zeros_like(points), np.zeros_like(points)
        a, b, c = (self.vertices[self.faces[face][:, i]] for i in range(3))
        normals = np.cross(b - a, c - a)
        normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-12)
        return points, normals, np.einsum("kc,kci->ki", weights, self.colours[self.faces[face]])

    def soundness(self):
        """What can be wrong with a mesh of its kind."""
        if self.smooth:
            return {"one piece": largest_component_share(self.vertices, self.faces) >= .99, "watertight": watertight(self.faces)}
        return {"closed edges": closed_edges(self.faces)}


@dataclass
class Cloud:
    """Surface points."""
    points: np.ndarray    # k 3
    normals: np.ndarray   # k 3, unit
    colours: np.ndarray   # k 3, sRGB in [0, 1]
    suffix = ".ply"

    def save(self, path):
        write_ply(path, {**columns("xyz", self.points), **columns(["nx", "ny", "nz"], self.normals),
                         **columns(["red", "green", "blue"], np.round(self.colours * 255).astype(np.uint8))})

    def picture(self, size=320, **view):
        return render_points(self.points, self.colours, .03 * (2048 / len(self.points)) ** .5, size=size, **view)

    def surface(self, k, rng):
        some = rng.choice(len(self.points), k, replace=k > len(self.points))
        return self.points[some], self.normals[some], self.colours[some]

    def soundness(self):
        return {}


@dataclass
class Gaussians:
    """3D Gaussians with colours that do not depend on the view."""
    means: np.ndarray     # k 3
    scales: np.ndarray    # k 3, standard deviations
    rotations: np.ndarray  # k 4, w x y z, unit
    opacities: np.ndarray  # k, in (0, 1)
    colours: np.ndarray   # k 3, sRGB in [0, 1], light included
    suffix = ".ply"

    def save(self, path):
        write_gaussians(path, self)

    def picture(self, size=320, **view):
        return render_gaussians(self.means, self.scales, self.rotations, self.opacities, self.colours, size=size, **view)

    def surface(self, k, rng):
        """A normal is the shortest axis, on the side that is away from the centre of all."""
        some = rng.choice(len(self.means), k, replace=k > len(self.means))
        axes = turned(torch.from_numpy(self.rotations[some])).numpy()                  # k 3 3, an axis a column
        normals = axes[np.arange(k), :, self.scales[some].argmin(1)]
        outward = ((self.means[some] - self.means.mean(0)) * normals).sum(1, keepdims=True) >= 0
        return self.means[some], np.where(outward, normals, -normals), self.colours[some]

    def soundness(self):
        return {}


def content(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a file that sample.py wrote") from None


# ---------------------------------------------------------------------------- glb

def to_linear(srgb):
    return np.where(srgb <= .04045, srgb / 12.92, ((srgb + .055) / 1.055) ** 2.4)


def to_srgb(linear):
    return np.where(linear <= .0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - .055)


def named(path, suffix):
    """Files are what their names say."""
    if Path(path).suffix.lower() != suffix:
        raise UserError(f"{path}: what is written is a {suffix} file; give it a name that ends so")


def write_glb(path, vertices, faces, colours, smooth=True):
    """vertices (v 3), faces (f 3), sRGB colours (v 3) in 0..1; the same mesh gives the same bytes. Without normals
    (smooth=False) viewers shade every face flat."""
    named(path, ".glb")
    if len(faces) == 0:
        raise UserError(f"{path}: the mesh is empty, there is nothing to write; try another seed, or train longer")
    mesh = trimesh.Trimesh(vertices, faces, process=False)          # process would merge and reorder vertices
    mesh.vertex_attributes["_linear"] = to_linear(np.asarray(colours, np.float64)).astype(np.float32)

    def finish(tree):
        part = tree["meshes"][0]["primitives"][0]
        part["attributes"]["COLOR_0"] = part["attributes"].pop("_linear")
        # Without a material viewers assume polished metal, which is black in an empty room. Faces show from
        # both sides, as in our pictures.
        part["material"] = 0
        tree["materials"] = [{"pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": .8}, "doubleSided": True}]

    data = export_glb(mesh, include_normals=smooth, tree_postprocessor=finish)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def read_glb(path):
    """What write_glb wrote -> vertices (v 3), faces (f 3), colours (v 3), smooth."""
    data = content(path)
    try:
        # not trimesh.load, which would round the colours to 8 bits
        meshes = list(load_glb(BytesIO(data), skip_materials=True)["geometry"].values())
    except Exception as error:                                      # trimesh raises whatever the bytes provoke
        raise UserError(f"{path}: not a .glb file ({error!r})") from None
    if len(meshes) != 1 or "vertex_colors" not in meshes[0]:
        what = "has no vertex colours" if len(meshes) == 1 else f"holds {len(meshes)} meshes"
        raise UserError(f"{path} {what}; one mesh with a colour at each vertex is read, as sample.py writes")
    vertices, faces, linear = (np.array(meshes[0][name]) for name in ("vertices", "faces", "vertex_colors"))
    check_mesh(vertices, faces)
    if face_areas(vertices, faces).sum() == 0:
        raise UserError(f"{path}: its faces have no area")
    linear = linear[:, :3] / (np.iinfo(linear.dtype).max if linear.dtype.kind == "u" else 1.)       # 8 and 16 bits are shares of 1
    return vertices, faces.astype(np.int64), to_srgb(linear.astype(np.float64)).astype(np.float32), "vertex_normals" in meshes[0]


# ---------------------------------------------------------------------------- ply

TYPES = {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8", "uchar": "u1", "uint8": "u1", "char": "i1", "int8": "i1",
         "short": "<i2", "int16": "<i2", "ushort": "<u2", "uint16": "<u2", "int": "<i4", "int32": "<i4", "uint": "<u4", "uint32": "<u4"}


def columns(names, array):
    return dict(zip(names, np.asarray(array).T))


def write_ply(path, fields):
    """fields: name -> k numbers, bytes as they are and the rest as floats; one vertex element, binary."""
    named(path, ".ply")
    if len(next(iter(fields.values()))) == 0:
        raise UserError(f"{path}: there are no points to write; try another seed, or train longer")
    kinds = [(name, "u1" if values.dtype == np.uint8 else "<f4") for name, values in fields.items()]
    rows = np.empty(len(next(iter(fields.values()))), kinds)
    for name, values in fields.items():
        rows[name] = values
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    header += [f"property {'uchar' if kind == 'u1' else 'float'} {name}" for name, kind in kinds] + ["end_header\n"]
    with atomic_write(path) as temporary:
        temporary.write_bytes("\n".join(header).encode() + rows.tobytes())


def read_ply(path, needed):
    """-> name -> k numbers of the vertex element of a binary PLY that has at least the fields `needed`, all of them finite."""
    head, end, body = content(path).partition(b"end_header\n")
    lines = head.decode("latin-1").split("\n")
    if lines[0].strip() != "ply" or not end:
        raise UserError(f"{path}: not a PLY file")
    words = [line.split() for line in lines if line.strip()]
    if ["format", "binary_little_endian", "1.0"] not in words:
        raise UserError(f"{path}: only binary little-endian PLY files are read; write it again as binary")
    elements = [i for i, word in enumerate(words) if word[0] == "element"] + [len(words)]
    if len(elements) < 2 or words[elements[0]][1:2] != ["vertex"] or not "".join(words[elements[0]][2:]).isdecimal():
        raise UserError(f"{path}: its first element is not 'vertex' and how many there are")
    fields = [word for word in words[elements[0] + 1:elements[1]] if word[0] == "property"]
    missing = [name for name in needed if name not in [word[-1] for word in fields]]
    if missing:
        raise UserError(f"{path}: has no {', '.join(missing)}; is it a file of another kind?")
    if any(word[1] not in TYPES for word in fields):
        raise UserError(f"{path}: its vertices hold lists, which is not read")
    if len({word[-1] for word in fields}) < len(fields):
        raise UserError(f"{path}: two fields of its vertices have one name")
    kind, count = np.dtype([(word[-1], TYPES[word[1]]) for word in fields]), int(words[elements[0]][2])
    if count == 0:
        raise UserError(f"{path}: holds no points")
    if len(body) < count * kind.itemsize:
        raise UserError(f"{path}: truncated, {len(body)} bytes of {count * kind.itemsize}; copy or write it again")
    rows = np.frombuffer(body, kind, count)
    bad = [name for name in needed if not np.isfinite(rows[name]).all()]
    if bad:
        raise UserError(f"{path}: holds numbers that are not finite (NaN) in {', '.join(bad)}")
    return {name: rows[name] for name in kind.names}


CLOUD = ["x", "y", "z", "nx", "ny", "nz", "red", "green", "blue"]
GAUSSIANS = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
DC = .28209479177387814     # the constant spherical harmonic: colour = .5 + DC f_dc


def write_gaussians(path, g):
    """Opacity as its logit, scales as logarithms, colours as the constant spherical harmonic; normals are part of the layout."""
    opacity = np.clip(g.opacities.astype(np.float64), 1e-6, 1 - 1e-6)
    write_ply(path, {**columns("xyz", g.means), **columns(["nx", "ny", "nz"], np.zeros_like(g.means)),
                     **columns(["f_dc_0", "f_dc_1", "f_dc_2"], (g.colours - .5) / DC),
                     "opacity": np.log(opacity / (1 - opacity)), **columns(["scale_0", "scale_1", "scale_2"], np.log(g.scales)),
                     **columns(["rot_0", "rot_1", "rot_2", "rot_3"], g.rotations)})


def read_gaussians(path):
    fields = read_ply(path, GAUSSIANS)
    pick = lambda *names: np.stack([fields[name] for name in names], -1).astype(np.float32)
    rotations = pick("rot_0", "rot_1", "rot_2", "rot_3")
    return Gaussians(pick("x", "y", "z"), np.exp(pick("scale_0", "scale_1", "scale_2")),
                     rotations / np.linalg.norm(rotations, axis=1, keepdims=True).clip(1e-9),
                     1 / (1 + np.exp(-fields["opacity"].astype(np.float32))), .5 + DC * pick("f_dc_0", "f_dc_1", "f_dc_2"))


def read_cloud(path):
    fields = read_ply(path, CLOUD)
    points, normals, colours = (np.stack([fields[name] for name in CLOUD[i:i + 3]], -1).astype(np.float32) for i in (0, 3, 6))
    return Cloud(points, normals, colours / 255)


def read(path):
    """Any file that sample.py wrote -> Mesh, Cloud or Gaussians."""
    if str(path).lower().endswith(".ply"):
        return read_gaussians(path) if "f_dc_0" in read_ply(path, ["x", "y", "z"]) else read_cloud(path)
    return Mesh(*read_glb(path))


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="what sample.py wrote, .glb or .ply")
    parser.add_argument("--out", type=Path, help="picture to write (default: beside the file, .png or .gif)")
    parser.add_argument("--mode", default="colour", choices=MODES, help="what the picture shows")
    parser.add_argument("--azimuth", type=float, default=35, help="degrees around the object; 0 sees its face")
    parser.add_argument("--elevation", type=float, default=25, help="degrees above the horizon")
    parser.add_argument("--size", type=between(16, 4096), default=512, help="pixels a side")
    parser.add_argument("--turntable", action="store_true", help="one full turn as a GIF")
    args = parser.parse_args()
    shape = read(args.file)
    x = shape.vertices if isinstance(shape, Mesh) else shape.means if isinstance(shape, Gaussians) else shape.points
    count = f", {len(shape.faces):,} faces" if isinstance(shape, Mesh) else ""
    print(f"{type(shape).__name__}: {len(x):,} points{count}, from {x.min(0)} to {x.max(0)}, mean colour {shape.colours.mean(0)}")
    out = args.out or args.file.with_suffix(".gif" if args.turntable else ".png")
    if args.turntable:
        save_gif(out, turntable(shape, size=args.size))
    else:
        save_png(out, shape.picture(args.size, azimuth=args.azimuth, elevation=args.elevation, mode=args.mode))
    print(out)


if __name__ == "__main__":
    command(main)
