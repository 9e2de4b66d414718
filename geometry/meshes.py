"""geometry/meshes.py - low-poly meshes as sequences of faces: canonical order, few enough faces, welding.

A face of the sequence is 9 whole numbers: three corners of three coordinates, each one of BINS cells of [-1, 1].
LTM3D section 4 generates meshes as such sequences. Canonical order (y is up; corners counter-clockwise seen from outside):

    1. components (faces joined by shared vertices) by their number of faces, most first; those of as many by
       their centre, from left to right (x), then from back to front (z), then by their highest vertex, highest first
    2. a component starts at its highest vertex, of several the farthest back, then the one on the left; of the faces
       there and the corners of each, those with the highest next vertices in the same sense
    3. from there its faces are walked: out over the first free edge to the right of the one come in by; where there
       is none, back to the last face that has one. A face starts with the edge it is entered by

so that neither the order of the faces of a file nor the corner at which each starts matters. A head has to know the
order from the shape, so it is one that seldom jumps: like parts of a shape (legs, wheels) stay in place when another
part moves past them; a walk goes by which faces are neighbours, wherever they bend to; and positions are compared to
four decimals, not by bins, in which what is always a little higher would be higher in some shapes and level in others.

    python geometry/meshes.py out/table-0.glb --faces 256        # as many faces as fit, in canonical order, as a picture
"""
from collections import defaultdict

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from engine.commands import UserError

BINS = 128          # cells along a side of [-1, 1]^3: .016 each


def quantise(x):
    return np.clip((np.asarray(x) + 1) / 2 * BINS, 0, BINS - 1).astype(np.int64)


def bin_centres(bins):
    return (bins + .5) / BINS * 2 - 1


def check_mesh(vertices, faces):
    """What no later step could make sense of, in one line."""
    if len(faces) == 0:
        raise UserError("the mesh has no faces; export it as a surface")
    if not np.isfinite(vertices).all():
        raise UserError("the mesh has vertices that are not finite numbers (NaN); mend the file")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise UserError(f"the mesh has {len(vertices)} vertices, but a face names vertex {faces.max()}; mend the file")
    if abs(vertices).max() > 1:
        raise UserError(f"the mesh reaches to {abs(vertices).max():g}, shapes lie within [-1, 1]; move and scale it")


def canonical(vertices, faces, colours):
    """vertices v 3 in [-1, 1], faces f 3, colours f 3 -> corners f' 3 3 (bins, in x y z), colours f' 3, the number of each
    one's component f', in canonical order. Faces that quantisation makes degenerate, and all but one of equal ones, are left out."""
    check_mesh(vertices, faces)
    _, place = np.unique(vertices, axis=0, return_inverse=True)                        # joined where they are equal
    place = place.reshape(-1)[faces]
    component = face_components(place, len(vertices))                                            # f
    x, y, z = np.round(vertices * 1e4).astype(np.int64).T
    rank = np.unique(np.stack([-y, z, x], 1), axis=0, return_inverse=True)[1].reshape(-1)[faces]         # f 3
    turn = (rank.argmin(1)[:, None] + np.arange(3)) % 3                                # each face from its highest corner
    place, rank = np.take_along_axis(place, turn, 1), np.take_along_axis(rank, turn, 1)
    first = {}
    for i in np.unique(component):
        mine = component == i
        centre = vertices[np.unique(faces[mine])].mean(0).round(4) + 0.                # + 0: no -0
        first[i] = -mine.sum(), centre[0], centre[2], rank[mine].min()
    by_height = sorted(range(len(faces)), key=lambda i: (first[component[i]], *rank[i], *colours[i]))
    order, start = np.array(list(walk(place, by_height).items())).T
    turn = (turn[order, :1] + start[:, None] + np.arange(3)) % 3
    corners, colours, component = np.take_along_axis(quantise(vertices)[faces[order]], turn[..., None], 1), colours[order], component[order]
    kept = {}                                                                          # corners, whichever is first -> face
    for i, (a, b, c) in enumerate(map(tuple, face) for face in corners.tolist()):
        if a != b != c != a:
            kept.setdefault(min((a, b, c), (b, c, a), (c, a, b)), i)
    if not kept:
        raise UserError(f"no face of the mesh is larger than a bin, 1/{BINS // 2}; scale it to fill [-1, 1]")
    kept = list(kept.values())
    number = np.cumsum(np.diff(component[kept], prepend=component[kept][0]) != 0)
    return corners[kept], colours[kept], number


def walk(faces, roots):
    """From each of the faces (vertices f 3) that is new when it is a root's turn, to its neighbours, to the right first: {face:
    which of its corners starts the edge it was entered by}, in order."""
    beside, entered = defaultdict(list), {}
    for i in roots[::-1]:                                                              # beside an edge, the first is popped first
        for k in range(3):
            beside[faces[i, k], faces[i, (k + 1) % 3]].append((i, k))
    for root in roots:
        todo = [(root, 0)]
        while todo:
            i, k = todo.pop()
            if i not in entered:
                entered[i] = k
                a, b, c = np.roll(faces[i], -k)                                        # in by a -> b
                todo += beside[b, a] + beside[a, c] + beside[c, b]
    return entered


def connected(a, b, count):
    """Connected components of `count` things of which a[i] and b[i] are joined."""
    return connected_components(coo_array((np.ones(len(a)), (a, b)), (count, count)), directed=False)


def face_components(faces, count):
    """Which connected component of a mesh of `count` vertices each face (f 3) belongs to: f."""
    return connected(faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel(), count)[1][faces[:, 0]]


def match_like_components(logits, corners, components, margin=.5):
    """Where the canonical order of parts with as many faces (legs, wheels) jumps, a head would be torn between two. So they are
    compared in another order where that costs less by `margin` a coordinate: logits of each (f' 9 BINS), corners b f 9, components b f
    -> rows b f."""
    order = torch.arange(corners.shape[1], device=corners.device).repeat(len(corners), 1)
    for i, numbers in enumerate(components.cpu()):
        first = 0
        sizes, counts = numbers[numbers >= 0].bincount().unique_consecutive(return_counts=True)
        for faces, parts in zip(sizes.tolist(), counts.tolist()):
            block = slice(first, first + parts * faces)
            if parts > 1:
                said = logits[i][block].reshape(parts, 1, faces * 9, -1).expand(-1, parts, -1, -1)
                true = corners[i, block].reshape(1, parts, faces * 9, 1).expand(parts, -1, -1, -1)
                score = said.gather(3, true).mean((2, 3)).cpu() + margin * torch.eye(parts)     # of part j in place i
                order[i, block] = order[i, block].reshape(parts, faces)[linear_sum_assignment(score, maximize=True)[1]].flatten()
            first += parts * faces
    return order


def weld(share):
    """Single faces whose corners are distributions over the bins, share f 3 3 BINS (face, corner, coordinate) -> vertices v 3
    (in bins, fractions too), faces f' 3, and which of the f are left.

    In a closed mesh every directed edge meets its opposite. So edges are paired with opposite ones, nearest first, and the
    corners of paired edges become one vertex: parts that merely touch stay apart, as pairing vertices by distance would not.
    Near is where what the two corners say overlaps: where a shape leaves a choice, the likeliest of each may be far apart.
    Then they decide together: a vertex is where the mean of its corners' distributions is likeliest."""
    share = share.reshape(-1, 3, BINS)                                                 # of corner e = 3 face + corner
    bins, e = np.arange(BINS), np.arange(len(share))
    after = e // 3 * 3 + (e + 1) % 3                                                   # edge e is from corner e to this one
    blurred = np.sqrt(share @ np.exp(-(bins[:, None] - bins) ** 2 / 2) / (2 * np.pi) ** .5)
    apart = -np.log(np.min([blurred[:, i] @ blurred[:, i].T for i in range(3)], 0).clip(1e-9))        # Bhattacharyya's distance
    apart = np.maximum(apart[:, after], apart[:, after].T).astype(float)               # of the worse end
    apart += 1e-9 * (np.minimum.outer(e, e) * len(e) + np.maximum.outer(e, e)) / max(1, len(e)) ** 2       # no two pairs tie
    apart[e[:, None] // 3 == e // 3] = np.inf                                          # not within a face
    twin = np.full(len(e), -1)
    while (free := apart.min(1, initial=np.inf) <= 10).any():                          # d^2 / 8: nine bins, where both are sure
        best = apart.argmin(1)
        mutual = free & (best[best] == e)
        twin[mutual] = best[mutual]
        apart[mutual], apart[:, mutual] = np.inf, np.inf
    one = np.flatnonzero(twin >= 0)
    count, vertex = connected(np.append(one, after[one]), np.append(after[twin[one]], twin[one]), len(e))
    mixed = coo_array((np.ones(len(e)), (vertex, e)), (count, len(e))) @ share.reshape(len(e), 3 * BINS)
    mixed = mixed.reshape(count, 3, BINS)
    mixed = mixed * (abs(bins - mixed.argmax(-1, keepdims=True)) <= 4)                 # the mean around the likeliest
    faces = vertex.reshape(-1, 3)
    whole = (faces != np.roll(faces, 1, 1)).all(1)                                     # welding may fold a face up
    return mixed @ bins / mixed.sum(-1), faces[whole], whole


def close_holes(faces, most=4):
    """faces f 3 -> the same and those that close holes of at most `most` edges: what is left where a face or two got lost."""
    edges = set(map(tuple, faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).tolist()))
    rim, new = {b: a for a, b in edges if (b, a) not in edges}, []                     # around a hole, vertex after vertex
    while rim:
        first, at = rim.popitem()
        loop = [first]
        while at in rim:
            loop.append(at)
            at = rim.pop(at)
        if at == first and 3 <= len(loop) <= most:
            new += [(first, b, c) for b, c in zip(loop[1:], loop[2:])]
    return np.concatenate([faces, np.array(new, faces.dtype).reshape(-1, 3)])


def simplify_to(vertices, faces, colours, limit, many="simplify"):
    """At most `limit` faces: simplified by quadric error, or refused."""
    check_mesh(vertices, faces)
    if len(faces) <= limit:
        return vertices, faces, colours
    if many == "refuse":
        raise UserError(f"the mesh has {len(faces)} faces and at most {limit} fit; simplify it, or allow it with --many simplify")
    from fast_simplification import simplify  # only meshes of other people need it
    points, few = simplify(vertices.astype(np.float32), faces.astype(np.int32), target_count=limit)
    points = points.clip(vertices.min(0), vertices.max(0))                             # quadrics may reach beyond
    nearest = cKDTree(vertices[faces].mean(1)).query(points[few].mean(1))[1]           # the colour of the nearest old face
    return points, few[:limit].astype(np.int64), colours[nearest][:limit]


def face_areas(vertices, faces):
    a, b, c = (vertices[faces[:, i]].astype(np.float64) for i in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def winding(points, vertices, faces):
    """Generalised winding number (k): how many closed parts a point is in (Jacobson et al. 2013, Van Oosterom's solid angle)."""
    total = np.zeros(len(points))
    for a, b, c in vertices[faces].astype(np.float64):
        a, b, c = a - points, b - points, c - points
        la, lb, lc = (np.linalg.norm(x, axis=1) for x in (a, b, c))
        up = (a * np.cross(b, c)).sum(1)
        total += np.arctan2(up, la * lb * lc + (a * b).sum(1) * lc + (b * c).sum(1) * la + (c * a).sum(1) * lb)
    return total / (2 * np.pi)


def sample_surface(vertices, faces, k, rng, hidden=True):
    """k points uniform by area on a mesh, k 3, the face that each is on, k, and its weights of that face's corners, k 3; without
    those inside another part, unless `hidden`. Of an empty mesh, k times a corner of the cube, far from any shape, on face -1."""
    area = face_areas(vertices, faces)
    if area.sum() == 0:
        return np.ones((k, 3), np.float32), np.full(k, -1), np.zeros((k, 3))
    some = rng.choice(len(faces), k if hidden else 3 * k, p=area / area.sum())
    corners = vertices[faces[some]]                                                    # k 3 3
    u, v = np.sqrt(rng.random(len(some))), rng.random(len(some))                       # sqrt: uniform in a triangle
    weights = np.stack([1 - u, u * (1 - v), u * v], 1)
    x = np.einsum("kc,kci->ki", weights, corners).astype(np.float32)
    if not hidden:
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        above = x + 1e-3 * normal / np.linalg.norm(normal, axis=1, keepdims=True).clip(1e-12)
        seen = np.flatnonzero(winding(above, vertices, faces) < .5)
        x, some, weights = (y[seen if len(seen) >= k else slice(None)][:k] for y in (x, some, weights))
    return x, some, weights


def largest_component_share(vertices, faces):
    """Share of the surface area that is in the largest connected component; 0 for an empty mesh."""
    if len(faces) == 0:
        return 0.
    area = np.bincount(face_components(faces, len(vertices)), face_areas(vertices, faces))
    return area.max() / area.sum()


def watertight(faces):
    """Every edge belongs to exactly two faces, which run along it in opposite directions; an empty mesh is not."""
    edge = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    there, back = (np.unique(edge @ [2 ** 31, 1]) for edge in (edge, edge[:, ::-1]))
    return 0 < len(edge) == len(there) and np.array_equal(there, back)


def closed_edges(faces):
    """Share of the edges that exactly two faces share; 0 for an empty mesh."""
    edge = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
    return np.mean(np.unique(edge, axis=0, return_counts=True)[1] == 2) if len(edge) else 0.
