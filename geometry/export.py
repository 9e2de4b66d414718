"""export.py - generated shapes: meshes, point clouds, 3D Gaussians; and how they are written to files.

    Mesh        .glb    vertices, faces, vertex colours (.obj; .stl without colours); metres, y up, base at 0
    Cloud       .ply    points, normals, 8-bit colours
    Gaussians   .ply    the layout of 3D Gaussian splatting (Kerbl et al. 2023), which its viewers open

Colours are sRGB everywhere in this code: the numbers of a picture's pixels. glTF defines vertex colours as linear
light, which viewers (three.js, Blender, Babylon) convert to sRGB for the screen. So a .glb stores linear light, in 8
bits, which trimesh keeps if it saves the file again. The error in sRGB is at most .013, below .1 at most .025.

trimesh, Pillow and the renderer are imported where they are used: they take long.
"""
import gc
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from engine.commands import UserError
from engine.files import atomic_write
from geometry.camera import as_tensor, to_linear
from geometry.meshes import sample_surface


class Shape:
    """What shapes of every kind have in common: how Python and notebooks show them."""

    def __repr__(self):
        faces = f", {len(self.faces):,} faces" if isinstance(self, Mesh) else ""
        return f"{type(self).__name__}: {len(self.positions()):,} points{faces}"

    def positions(self):
        return next(iter(vars(self).values()))                      # vertices, points or means

    def _repr_png_(self):
        from PIL import Image
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

    def placed(self, height=None):
        """Vertices of a file: y up, the middle of the base at 0. height: in metres; default: the longest side has 1."""
        low, high = (bound(self.vertices[self.faces], (0, 1)) for bound in (np.min, np.max))            # 3 each
        origin = np.where([False, True, False], low, (low + high) / 2)
        longest, own = (high - low).max(), max(high[1] - low[1], 1e-3)
        return (self.vertices - origin) * (height / own if height else 1 / longest)

    def save(self, path, height=None):
        suffix = Path(path).suffix.lower()
        if not len(self.faces):
            raise UserError(f"{path}: the mesh is empty, there is nothing to write; try another seed, or train longer")
        if suffix not in (".obj", ".stl"):
            return write_glb(path, self.placed(height), self.faces, self.colours, self.smooth)
        from trimesh import Trimesh
        colours = np.uint8(np.round(self.colours * 255))
        mesh = Trimesh(self.placed(height), self.faces, vertex_colors=colours, process=False)
        content = mesh.export(file_type=suffix[1:])
        with atomic_write(path) as temporary:
            temporary.write_bytes(content if isinstance(content, bytes) else content.encode())

    def picture(self, size=320, **view):
        from geometry.render import render_mesh
        return render_mesh(self.vertices, self.faces, self.colours, size=size, **view)

    def surface(self, k, rng):
        """k points uniform over the surface (low-poly: where no component hides it), normals, colours: k 3 each."""
        points, face, weights = sample_surface(self.vertices, self.faces, k, rng, hidden=self.smooth)
        if not len(self.faces):
            return points, np.zeros_like(points), np.zeros_like(points)
        a, b, c = (self.vertices[self.faces[face][:, i]] for i in range(3))            # k 3
        normals = np.cross(b - a, c - a)
        normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-12)
        return points, normals, np.einsum("kc,kci->ki", weights, self.colours[self.faces[face]])


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
        from geometry.render import render_points
        return render_points(self.points, self.colours, .03 * (2048 / len(self.points)) ** .5, size=size, **view)

    def surface(self, k, rng):
        rows = rng.choice(len(self.points), k, replace=k > len(self.points))
        return self.points[rows], self.normals[rows], self.colours[rows]


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
        from geometry.splat import render_gaussians
        return render_gaussians(*vars(self).values(), size=size, **view)

    def surface(self, k, rng):
        """The normal is the shortest axis, on the side away from the centre of all Gaussians."""
        from geometry.splat import rotation_matrices
        rows = rng.choice(len(self.means), k, replace=k > len(self.means))
        axes = rotation_matrices(torch.from_numpy(self.rotations[rows])).numpy()       # k 3 3, an axis a column
        normals = axes[np.arange(k), :, self.scales[rows].argmin(1)]
        outward = ((self.means[rows] - self.means.mean(0)) * normals).sum(1, keepdims=True) >= 0
        return self.means[rows], np.where(outward, normals, -normals), self.colours[rows]


def check_suffix(path, suffix):
    if Path(path).suffix.lower() != suffix:
        or_else = " (or .obj, .stl)" if suffix == ".glb" else ""
        raise UserError(f"{path}: a {suffix} file is written here; give it a name that ends in {suffix}{or_else}")


# ---------------------------------------------------------------------------- glb

def vertex_normals(vertices, faces):
    """The mean normal of the faces at each vertex, v 3. Large faces count more: flat ones look flat beside a bevel."""
    a, b, c = vertices[faces].swapaxes(0, 1)
    corner_normals = np.repeat(np.cross(b - a, c - a), 3, 0).T                          # 3 (f 3), as long as areas
    total = np.stack([np.bincount(faces.ravel(), x, len(vertices)) for x in corner_normals], 1)
    return total / np.linalg.norm(total, axis=1, keepdims=True).clip(1e-12)


def write_glb(path, vertices, faces, colours, smooth=True):
    """vertices (v 3), faces (f 3), sRGB colours (v 3) in 0..1. The same mesh gives the same bytes. Viewers shade every
    face flat if there are no normals (smooth=False)."""
    check_suffix(path, ".glb")
    from trimesh import Trimesh
    from trimesh.exchange.gltf import export_glb
    linear = (255 * to_linear(as_tensor(colours, torch.float64).clamp(0, 1))).round().byte().numpy()
    mesh = Trimesh(vertices, faces, vertex_colors=linear, process=False)        # process would merge vertices
    mesh.vertex_normals = vertex_normals(vertices, faces)

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


# ---------------------------------------------------------------------------- ply

CLOUD = ["x", "y", "z", "nx", "ny", "nz", "red", "green", "blue"]
GAUSSIANS = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2",
             "rot_0", "rot_1", "rot_2", "rot_3"]
DC = .28209479177387814     # the constant spherical harmonic: colour = .5 + DC f_dc


def write_ply(path, columns):
    """columns: pairs of a name and k numbers. Bytes stay bytes, others become floats. One vertex element, binary."""
    check_suffix(path, ".ply")
    if not (count := len(columns[0][1])):
        raise UserError(f"{path}: there are no points to write; try another seed, or train longer")
    types = [(name, "u1" if values.dtype == np.uint8 else "<f4") for name, values in columns]
    table = np.empty(count, types)
    for name, values in columns:
        table[name] = values
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    header += [f"property {'uchar' if kind == 'u1' else 'float'} {name}" for name, kind in types] + ["end_header\n"]
    with atomic_write(path) as temporary:
        temporary.write_bytes("\n".join(header).encode() + table.tobytes())
