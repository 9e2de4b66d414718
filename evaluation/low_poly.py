"""low_poly.py - ways to a mesh of few faces, from the same shape tokens of held-out files.

    python evaluate.py low-poly --data path/to/meshes --checkpoint runs/meshes

The surface of the sdf head, simplified; the faces of the mesh head, if one is trained; vertices that are joined along
the surface. A generator of vertices makes at best those of the file, which are given here: so this is its upper bound.
"""
from functools import partial

import numpy as np
from scipy.spatial import cKDTree

import heads
from engine.files import trained_stages
from evaluation import exam
from evaluation.metrics import chamfer
from evaluation.results import labels, mean, write_tables
from geometry.export import Mesh
from geometry.meshes import bin_centres, sample_surface
from geometry.surface import extract

COUNTS = 128, 256, 512


def join_along(vertices, surface_vertices, surface_faces):
    """Vertices v 3 near a fine surface -> faces f 3 between them: three are joined where the parts of the surface that
    are nearest to them meet (the dual of their Voronoi cells on the surface)."""
    owner = cKDTree(vertices).query(surface_vertices)[1]
    faces = owner[surface_faces]                                                  # of each small face: three vertices
    faces = faces[(faces != np.roll(faces, 1, 1)).all(1)]
    return faces[np.unique(np.sort(faces, 1), axis=0, return_index=True)[1]]


def judge_ways(decoders, tokens, split, row, rng, autocast, low_poly):
    """Chamfer distance of 2048 points to the true surface; over that of the low-poly mesh of the file; edges that two
    faces share."""
    true = split.arrays["corners"][split.rows[row]]
    true = bin_centres(true[true[:, 0, 0] >= 0]).astype(np.float32)               # g 3 3, the faces of the file
    vertices = np.unique(true.reshape(-1, 3), axis=0)
    fine = extract(decoders["sdf"], tokens, 64, autocast)[:2]
    faces = join_along(vertices, *fine)
    meshes = {f"surface, {count} faces": heads.SimplifiedMesh(count).decode(tokens, decoders, rng, autocast)
              for count in COUNTS}
    meshes["vertices of the file, joined"] = Mesh(vertices, faces, np.ones_like(vertices), smooth=False)
    if low_poly:
        meshes["mesh head"] = decoders["mesh"].decode(tokens, decoders, rng, autocast)
    surface = split.shape(row).surface(2048, rng)[0]                              # k 3
    floor = chamfer(sample_surface(true.reshape(-1, 3), np.arange(3 * len(true)).reshape(-1, 3), 2048, rng, False)[0],
                    surface)
    return {f"{name}; {what}": value for name, mesh in meshes.items() for what, value in {
        "faces": len(mesh.faces), "Chamfer": chamfer(mesh.surface(2048, rng)[0], surface), "floor": floor,
        **mesh.soundness()}.items()}


def evaluate_low_poly(args):
    """Low-poly meshes of held-out files: the simplified surface, the mesh head, and the vertices of the file."""
    tables = {}
    for folder, label in labels(args.checkpoint).items():
        cache = exam.result_cache(args, label, folder, "tokenizer", *exam.head_stages(["mesh"]))
        judge = partial(judge_ways, low_poly="head-mesh" in trained_stages(folder))
        means = mean(exam.judge_reconstructions(args, folder, ["mesh"], cache, judge))
        rows = {}
        for key, value in means.items():
            way, what = key.split("; ")
            rows.setdefault(way, {"": way})[what] = value
        tables[label] = [row | {"over the floor": row["Chamfer"] / row["floor"]} for row in rows.values()]
    print(" ".join(judge_ways.__doc__.split()))
    write_tables(args.out, args.command, tables, means=False)
