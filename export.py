"""Meshes out to files and back in.

Colours: everywhere else in this code they are sRGB, the numbers one reads off a picture. glTF defines
vertex colours as linear light, and viewers (three.js, Blender, Babylon) encode them for the screen once
more, so sRGB numbers stored there come out pale. trimesh stores what it is given, in 8 bits, too few for
dark linear colours. So colours go out as linear light in 32-bit floats: a viewer shows our sRGB numbers,
and read_glb returns them to five decimals.

    python export.py out/table-0.glb        # says what is in the file
"""
import sys

import numpy as np
import trimesh
from trimesh.exchange.gltf import export_glb, load_glb

from layers import UserError, written


def to_linear(srgb):
    return np.where(srgb <= .04045, srgb / 12.92, ((srgb + .055) / 1.055) ** 2.4)


def to_srgb(linear):
    return np.where(linear <= .0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - .055)


def write_glb(path, vertices, faces, colours):
    """vertices (v 3), faces (f 3), sRGB colours (v 3) in 0..1; the same mesh gives the same bytes."""
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

    data = export_glb(mesh, include_normals=True, tree_postprocessor=finish)
    with written(path) as temporary:
        temporary.write_bytes(data)


def read_glb(path):
    """What write_glb wrote -> vertices (v 3), faces (f 3), colours (v 3); one clear ValueError for other files."""
    with open(path, "rb") as file:
        try:
            # not trimesh.load, which would round the colours to 8 bits
            scene = load_glb(file, skip_materials=True)
            mesh, = scene["geometry"].values()
            vertices, faces, linear = mesh["vertices"], mesh["faces"], mesh["vertex_colors"]
        except Exception as error:                                  # trimesh raises whatever the bytes provoke
            raise ValueError(f"{path}: not a .glb of one coloured mesh, as sample.py writes ({error!r})") from None
    return np.array(vertices), np.array(faces, np.int64), to_srgb(linear[:, :3].astype(np.float64)).astype(np.float32)


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: python export.py FILE.glb")
    try:
        vertices, faces, colours = read_glb(sys.argv[1])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(vertices):,} vertices, {len(faces):,} faces, from {vertices.min(0)} to {vertices.max(0)}, "
          f"mean colour {colours.mean(0)}")


if __name__ == "__main__":
    main()
