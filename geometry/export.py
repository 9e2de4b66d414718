"""export.py - what a generated shape is, meshes, and how shapes are written to files: .glb (.obj, .stl), .ply.

Other shapes are beside the heads that give them (representations/): Cloud in pc.py, Gaussians in gs.py.

Colours are sRGB everywhere in this code: the numbers of a picture's pixels. glTF defines vertex colours as linear
light, which viewers (three.js, Blender, Babylon) convert to sRGB for the screen. So a .glb stores linear light, in 8
bits, which trimesh keeps if it saves the file again. The error in sRGB is at most .013, below .1 at most .025.

trimesh, Pillow and the renderer are imported where they are used: they take long.
"""
import gc
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from engine.commands import UserError
from engine.files import atomic_write
from geometry.camera import as_tensor, to_linear
from geometry.meshes import sample_surface, vertex_normals
from geometry.metrics import closed_edges, largest_component_share, watertight
from geometry.render import render_mesh
from geometry.simplify import simplify_surface


class Shape:
    """What shapes of every kind have in common. Subclasses are dataclasses, whose first field is vertices, points or
    means; they add `suffix`, of their files; `title`, on a page; save, picture, surface."""

    def __repr__(self):
        return f"{type(self).__name__}: {len(self.positions()):,} points"

    def positions(self):
        return next(iter(vars(self).values()))                      # k 3

    def placed(self, height=None):
        """The positions in a file. height: of a mesh, in metres; other shapes keep their size."""
        return self.positions()

    def save(self, path, height=None):
        """height: as of `placed`."""
        raise NotImplementedError

    def picture(self, size=320, **view):
        """An image, size size 3. view: azimuth, elevation."""
        raise NotImplementedError

    def surface(self, k, rng):
        """k points, their normals and colours: k 3 each."""
        raise NotImplementedError

    def with_hidden_parts(self):
        """The same shape; its surface has the points, too, that other parts hide."""
        return self

    def soundness(self):
        """The faults that a shape of this kind can have: {test: result}."""
        return {}

    def _repr_png_(self):
        from PIL import Image
        content = BytesIO()
        Image.fromarray(self.picture()).save(content, "PNG")
        return content.getvalue()


@dataclass(repr=False)
class Mesh(Shape):
    """A surface. A .glb has vertices, faces, vertex colours; so has an .obj; an .stl has no colours."""
    vertices: np.ndarray  # v 3
    faces: np.ndarray     # f 3, outward
    colours: np.ndarray   # v 3, sRGB in [0, 1]
    smooth: bool = True   # False: low-poly, every face flat
    suffix = ".glb"

    @property
    def title(self):
        return "surface" if self.smooth else "low-poly"

    def __repr__(self):
        return f"{super().__repr__()}, {len(self.faces):,} faces"

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

    def with_hidden_parts(self):
        return replace(self, smooth=True)

    def simplified(self, count, flat=False):
        """The same surface with at most `count` faces. flat: low-poly."""
        surface = self.vertices, self.faces, self.colours
        if len(self.faces):
            surface = simplify_surface(*surface, count, flat)
        return Mesh(*surface, smooth=not flat)

    def soundness(self):
        if not self.smooth:
            _, place = np.unique(self.vertices, axis=0, return_inverse=True)      # corners may not be shared
            return {"closed edges": closed_edges(place.reshape(-1)[self.faces])}
        one_piece = largest_component_share(self.vertices, self.faces) >= .99
        return {"one piece": one_piece, "watertight": watertight(self.faces)}


def check_suffix(path, suffix):
    if Path(path).suffix.lower() != suffix:
        or_else = " (or .obj, .stl)" if suffix == ".glb" else ""
        raise UserError(f"{path}: a {suffix} file is written here; give it a name that ends in {suffix}{or_else}")


# ---------------------------------------------------------------------------- glb

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
