"""simplify.py - fewer faces: files of a practical size, and low-poly meshes.

    1. debris, components below 1 % of the surface, is removed
    2. the surface is smoothed (Taubin 1995): along the grid it has needle-thin faces, which cannot collapse
    3. edges collapse where the quadric error is smallest (Garland and Heckbert 1997)
    4. edges that more than two faces share after that are split: a closed mesh stays closed
    5. walls become flat and their edges sharp (Zheng et al. 2011), but not those of a low-poly mesh

Colours are at vertices: a border between two colours is sharp if the faces along it are small, but on a flat wall they
collapse at no cost. Fins prevent this, as the constraint planes of Garland and Heckbert do at open borders. The imports
take long. Letters: v vertices, f faces, e edges, one after each corner of a face.
"""
import numpy as np
from fast_simplification import simplify
from scipy.sparse import csr_matrix
from scipy.spatial import cKDTree
from trimesh import Trimesh
from trimesh.smoothing import filter_taubin

from geometry.meshes import directed_edges, face_areas, face_components, join

STEP = .1           # difference of a colour channel along an edge that crosses a border
BEND = .0225        # 1 - cosine of the normals of two faces that hardly lie in one wall


def without_debris(vertices, faces, colours, share=.01):
    """A mesh without the components that have less than this share of its area."""
    component = face_components(faces, len(vertices))                                  # f
    area = np.bincount(component, face_areas(vertices, faces))
    kept = (area >= min(share * area.sum(), area.max()))[component]                    # f booleans
    used, faces = np.unique(faces[kept], return_inverse=True)
    return vertices[used], faces.reshape(-1, 3), colours[used]


def with_fins(vertices, faces, colours):
    """A mesh and its fins: where the corners of a face have two colours, a triangle stands on the edge of one colour.
    Its top is a new vertex, which collapses first, at no cost; the quadrics of the edge keep its plane."""
    ends = np.roll(faces, -1, 1)                                                       # f 3
    step = abs(colours[ends] - colours[faces]).max(-1)                                 # f 3, along edges
    crossing = (step.max(1) > STEP) & (step.min(1) <= STEP)                            # f booleans
    edge = step[crossing].argmin(1)[:, None]
    a, b = (np.take_along_axis(x[crossing], edge, 1)[:, 0] for x in (faces, ends))     # one for each fin
    x, y, z = vertices[faces[crossing]].swapaxes(0, 1)
    normal = np.cross(y - x, z - x)
    tops = vertices[a] + normal / np.linalg.norm(normal, axis=1, keepdims=True).clip(1e-12) ** .5
    fins = np.stack([a, b, len(vertices) + np.arange(len(a))], 1)
    return np.concatenate([vertices, tops]), np.concatenate([faces, fins])


def edge_numbers(faces):
    """A number for each edge, the same in both directions: e."""
    return np.sort(directed_edges(faces).astype(np.int64), 1) @ [2 ** 32, 1]


def split_pinches(vertices, faces):
    """A closed mesh -> one with two faces at every edge. Faces that lie back to back are removed. The others at an edge
    are paired; the two of a pair share its vertices. Where that leaves two edges between the same vertices, the second
    round pairs their faces the other way."""
    for order in (1, -1):
        place = np.unique(np.sort(faces, 1), axis=0, return_inverse=True)[1].reshape(-1)                # f
        side = (faces < np.roll(faces, -1, 1)).sum(1) * 2 - 3                          # f, 1 or -1
        faces = faces[np.bincount(place, side)[place] != 0]
        number, (start, end) = edge_numbers(faces), directed_edges(faces).T            # e each
        there, back = np.flatnonzero(start < end), np.flatnonzero(start > end)[::order]
        there, back = (edges[np.argsort(number[edges], kind="stable")] for edges in (there, back))
        following = lambda corner: corner // 3 * 3 + (corner + 1) % 3                  # edge i leads from i to this
        _, vertex = join(np.append(there, following(there)), np.append(following(back), back), faces.size)
        first = np.unique(vertex, return_index=True)[1]                                # a corner of each new vertex
        vertices, faces = vertices[faces.reshape(-1)[first]], vertex.reshape(-1, 3)
    return vertices, faces


def collapse(vertices, faces, limit, colours=None):
    """A closed surface -> vertices, faces: at most `limit`, or some more where many components are left. colours: of
    the vertices, if borders between them matter."""
    smooth = np.asarray(filter_taubin(Trimesh(vertices, faces, process=False)).vertices)
    attempts = [(haste, smooth, faces) for haste in (5, 7, 9)]    # a low one keeps the form better, but may not suffice
    if colours is not None:
        attempts = [(haste, *with_fins(smooth, faces, colours)) for haste in (3, 4)] + attempts
    for haste, points, few in attempts:
        points, few = simplify(points.astype(np.float32), few.astype(np.int32), target_count=limit, agg=haste)
        if len(few) <= limit:
            break
    _, edge, count = np.unique(edge_numbers(few), return_inverse=True, return_counts=True)
    few = few[(count[edge.reshape(-1, 3)] > 1).all(1)].astype(np.int64)                # a fin that is left is open
    return split_pinches(points.clip(vertices.min(0), vertices.max(0)), few)           # quadrics may reach beyond


def simplify_to(vertices, faces, colours, limit, flat=True):
    """A closed surface -> at most `limit` faces. colours: of the faces, or if not `flat`, of the vertices."""
    if len(faces) <= limit:
        return vertices, faces, colours
    points, few = collapse(vertices, faces, limit, None if flat else colours)
    few = few[:limit]                                                                  # still too many: some go
    old, new = (vertices[faces].mean(1), points[few].mean(1)) if flat else (vertices, points)
    return points, few, colours[cKDTree(old, balanced_tree=False).query(new)[1]]       # of the nearest old one


def denoised(vertices, faces, rounds=20, moves=15):
    """v 3, f 3 -> v 3. A bilateral filter: the normal of a face becomes the mean of its neighbours', of which those
    beyond a bend hardly count. Then vertices move towards the planes that these normals give their faces."""
    x, mesh = np.array(vertices, np.float32), Trimesh(vertices, faces, process=False)
    ones, start = np.ones(faces.size, np.float32), np.arange(0, faces.size + 1, 3)
    corners = csr_matrix((ones, faces.ravel(), start), (len(faces), len(x)))           # f v
    near = corners @ corners.T                                # f f: pairs p of faces that share a vertex
    one, other = np.arange(len(faces)).repeat(np.diff(near.indptr)), near.indices      # p each
    area, normals = np.float32(mesh.area_faces)[other], np.float32(mesh.face_normals)  # p, f 3
    for _ in range(rounds):
        near.data = area * np.exp(((normals[one] * normals[other]).sum(1) - 1) / BEND)
        normals = near @ normals
        normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-12)
    count = np.bincount(faces.ravel(), minlength=len(x)).clip(1)[:, None]              # v 1, faces at a vertex
    for _ in range(moves):
        inward = x[faces].mean(1, keepdims=True) - x[faces]                            # f 3 3: corners to the middle
        corners.data = (inward * normals[:, None]).sum(-1).ravel()
        x += corners.T @ normals / count
    return x


def simplify_surface(vertices, faces, colours, limit, flat):
    """A closed surface, colours of its vertices -> no debris, at most `limit` faces; flat: they share no vertices."""
    vertices, faces, colours = without_debris(vertices, faces, colours)
    vertices, faces, colours = simplify_to(vertices, faces, colours[faces[:, 0]] if flat else colours, limit, flat)
    if flat:
        vertices, faces = vertices[faces].reshape(-1, 3), np.arange(faces.size).reshape(-1, 3)          # e 3, f 3
        return vertices.astype(np.float32), faces, np.repeat(colours, 3, 0)            # e 3
    return denoised(vertices, faces), faces, colours
