"""low_poly.py - ways to a mesh of few faces, from the same shape tokens of held-out files.

    python evaluate.py low-poly --data path/to/meshes --checkpoint runs/meshes

The first way simplifies the surface of the sdf head. The second is the mesh head, if one is trained. The third starts
from the vertices of the true low-poly mesh (at most 256 faces): a generator of vertices has to guess them, so it will
hardly do better.
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
    """Vertices v 3 near a fine surface -> faces f 3. Each point of the surface belongs to its nearest vertex. Where the
    regions of three vertices meet, these three become a face (Delaunay's triangulation, along the surface)."""
    owner = cKDTree(vertices).query(surface_vertices)[1]
    faces = owner[surface_faces]
    faces = faces[(faces != np.roll(faces, 1, 1)).all(1)]                         # corners of three owners
    return faces[np.unique(np.sort(faces, 1), axis=0, return_index=True)[1]]


def judge_ways(decoders, tokens, split, row, rng, autocast, mesh_head):
    """faces: how many. Chamfer: distance of 2048 points to the true surface; floor: the same of the true low-poly mesh.
    closed edges: the share of the edges that two faces share. over the floor: mean Chamfer over mean floor."""
    bins = split.arrays["corners"][split.rows[row]]
    true = bin_centres(bins[bins[:, 0, 0] >= 0]).astype(np.float32)               # g 3 3, the true low-poly mesh
    vertices = np.unique(true.reshape(-1, 3), axis=0)
    surface = extract(decoders["sdf"], tokens, 64, autocast)[:2]
    joined = join_along(vertices, *surface) if len(surface[0]) else np.zeros((0, 3), int)
    meshes = {f"surface, {count} faces": heads.SimplifiedMesh(count).decode(tokens, decoders, rng, autocast)
              for count in COUNTS}
    meshes["true vertices, joined"] = Mesh(vertices, joined, np.ones_like(vertices), smooth=False)
    if mesh_head:
        meshes["mesh head"] = decoders["mesh"].decode(tokens, decoders, rng, autocast)

    true_points = split.shape(row).surface(2048, rng)[0]                          # k 3
    true_mesh = true.reshape(-1, 3), np.arange(3 * len(true)).reshape(-1, 3)
    floor, results = chamfer(sample_surface(*true_mesh, 2048, rng, hidden=False)[0], true_points), {}
    for name, mesh in meshes.items():
        distance = chamfer(mesh.surface(2048, rng)[0], true_points)
        numbers = {"faces": len(mesh.faces), "Chamfer": distance, "floor": floor} | mesh.soundness()
        results |= {f"{name}; {what}": number for what, number in numbers.items()}
    return results


def evaluate_low_poly(args):
    """Low-poly meshes of held-out files: the simplified surface, the mesh head, and true vertices."""
    tables = {}
    for folder, label in labels(args.checkpoint).items():
        mesh_head = "head-mesh" in trained_stages(folder)
        reps = ["sdf", *["mesh"] * mesh_head]
        cache = exam.result_cache(args, label, folder, *exam.tokenizer_stages(reps))
        judge = partial(judge_ways, mesh_head=mesh_head)
        rows = {}                                             # the cache keeps flat dicts: "way; what"
        for key, value in mean(exam.judge_reconstructions(args, folder, reps, cache, judge, ["faces"])).items():
            way, what = key.split("; ")
            rows.setdefault(way, {"": way})[what] = value
        tables[label] = [row | {"over the floor": row["Chamfer"] / row["floor"]} for row in rows.values()]
    print(" ".join(judge_ways.__doc__.split()))
    write_tables(args.out, args.command, tables, means=False)
