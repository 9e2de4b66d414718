"""meshes.py - what decoding and export do with meshes: bins, welding, points on a surface, faults.

A face of a low-poly mesh is 9 whole numbers: three corners of three coordinates, each one of BINS cells of [-1, 1].
geometry/low_poly.py puts faces in order. scipy and trimesh are imported where they are used: they take long.
"""
import numpy as np
from einops import rearrange

BINS = 128          # cells along a side of [-1, 1]^3: .016 each
FACES = 256         # most faces of a low-poly mesh
CHUNK = 2 ** 14     # points whose winding number is computed at a time: bounds memory


def quantise(x):
    return np.clip((np.asarray(x) + 1) / 2 * BINS, 0, BINS - 1).astype(np.int64)

def bin_centres(bins):
    return (bins + .5) / BINS * 2 - 1


def join(a, b, count):
    """Connected components of `count` nodes, of which a[i] and b[i] are joined: how many, and that of each node."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    return connected_components(coo_array((np.ones(len(a)), (a, b)), (count, count)), directed=False)

def face_components(faces, count):
    """The connected component of each face (f 3) of a mesh of `count` vertices: f."""
    return join(faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel(), count)[1][faces[:, 0]]


def weld(share):
    """Single faces f 3 3 BINS, each coordinate a distribution over the bins -> vertices v 3 (in bins, with fractions),
    faces f' 3, and which faces are left: f booleans.

    In a closed mesh every directed edge meets its opposite. So each edge is paired with an opposite one, nearest first,
    and the corners of paired edges become one vertex. Components that only touch stay apart. Edges are near if the
    distributions of their corners overlap: where a shape leaves a choice, the likeliest bins may be far apart. A vertex
    lies where the mean distribution of its corners is likeliest."""
    from scipy.sparse import coo_array
    share = share.reshape(-1, 3, BINS)                                                 # (f 3) 3 bins
    bins, corner = np.arange(BINS), np.arange(len(share))                              # bins; f 3, called e below
    following = corner // 3 * 3 + (corner + 1) % 3                                     # e; edge e leads to this corner

    # 1. The distance of two corners: Bhattacharyya's, of blurred distributions, in the coordinate where it is largest.
    blurred = np.sqrt(share @ np.exp(-(bins[:, None] - bins) ** 2 / 2) / (2 * np.pi) ** .5)             # e 3 bins
    distance = -np.log(np.min([blurred[:, i] @ blurred[:, i].T for i in range(3)], 0).clip(1e-9))       # e e

    # 2. The distance of two opposite edges: that of their worse ends. No two are equal. Edges of one face do not pair.
    distance = np.maximum(distance[:, following], distance[:, following].T).astype(float)
    number = np.minimum.outer(corner, corner) * len(corner) + np.maximum.outer(corner, corner)          # e e
    distance += 1e-9 * number / max(1, len(corner)) ** 2
    distance[corner[:, None] // 3 == corner // 3] = np.inf

    # 3. Pairs: two edges that are nearest to each other, until no free edge has another near it.
    twin = np.full(len(corner), -1)                                                    # e; -1: none
    while (free := distance.min(1, initial=np.inf) <= 10).any():                      # 10: eight bins, if both are sure
        best = distance.argmin(1)                                                      # e
        mutual = free & (best[best] == corner)
        twin[mutual] = best[mutual]
        distance[mutual] = distance[:, mutual] = np.inf

    # 4. Vertices: the corners of paired edges are joined.
    paired = np.flatnonzero(twin >= 0)
    starts, ends = np.append(paired, following[paired]), np.append(following[twin[paired]], twin[paired])
    count, vertex = join(starts, ends, len(corner))                                    # vertex: e
    total = coo_array((np.ones(len(corner)), (vertex, corner)), (count, len(corner))) @ share.reshape(-1, 3 * BINS)
    total = total.reshape(count, 3, BINS)
    total = total * (abs(bins - total.argmax(-1, keepdims=True)) <= 4)                 # only around the likeliest bin

    # 5. Faces: without those that joining has folded up.
    faces = vertex.reshape(-1, 3)
    unfolded = (faces != np.roll(faces, 1, 1)).all(1)                                  # f
    return total @ bins / total.sum(-1), faces[unfolded], unfolded


def close_holes(faces):
    """faces f 3 -> the same and those that close holes of three or four edges, where a face or two are missing."""
    edges = set(map(tuple, directed_edges(faces).tolist()))
    rim, new = {b: a for a, b in edges if (b, a) not in edges}, []                     # around holes, vertex by vertex
    while rim:
        first, vertex = rim.popitem()
        loop = [first]
        while vertex in rim:
            loop.append(vertex)
            vertex = rim.pop(vertex)
        if vertex == first and len(loop) in (3, 4):
            new += [(first, b, c) for b, c in zip(loop[1:], loop[2:])]
    return np.concatenate([faces, np.array(new, faces.dtype).reshape(-1, 3)])


def face_areas(vertices, faces):
    a, b, c = (vertices[faces[:, i]].astype(np.float64) for i in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def vertex_normals(vertices, faces):
    """The mean normal of the faces at each vertex, v 3. Large faces count more: flat ones look flat beside a bevel."""
    a, b, c = vertices[faces].swapaxes(0, 1)
    corner_normals = np.repeat(np.cross(b - a, c - a), 3, 0).T                          # 3 (f 3), as long as areas
    total = np.stack([np.bincount(faces.ravel(), x, len(vertices)) for x in corner_normals], 1)
    return total / np.linalg.norm(total, axis=1, keepdims=True).clip(1e-12)


def numbered(counts):
    """Items of each owner, k -> the owner of each item, in turn, and its number among those of its owner."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (counts.cumsum() - counts)[owner]


def candidates(points, corners):
    """Points k 2, triangles f 3 2 -> pairs of a point and a triangle whose bounding box it lies in: rows, p each. A
    grid finds them: each of its cells, about as many as triangles, has a list of those that reach into it."""
    low, high = corners.min(1), corners.max(1)                                         # f 2
    side = min(int(len(corners) ** .5) + 1, 128)
    scale = side / (high.max(0) - low.min(0)).clip(1e-12)                              # 2
    cell = lambda x: ((x - low.min(0)) * scale).astype(np.int64).clip(0, side - 1)
    first = cell(low)
    count = cell(high) - first + 1                                                     # f 2, cells along both axes
    face, number = numbered(count.prod(1))                                             # a row for each cell of a face
    place = (first[face] + np.stack(np.divmod(number, count[face, 1]), 1)) @ [side, 1]
    face = face[place.argsort()]
    start = np.append(0, np.bincount(place, minlength=side * side).cumsum())           # rows of each cell in `face`
    own = cell(points) @ [side, 1]                                                     # k
    point, number = numbered(start[own + 1] - start[own])
    face = face[start[own][point] + number]
    near = ((low[face] < points[point]) & (points[point] < high[face])).all(1)
    return point[near], face[near]


def winding_number(points, vertices, faces):
    """How many closed components a point lies in: k. On any ray from the point it is how often the ray leaves the mesh,
    less how often it enters. Of a mesh with holes, the mean over all directions (Jacobson et al. 2013); here the mean
    over six, along the axes."""
    total, vertices = np.zeros(len(points)), vertices.astype(np.float64)
    for axis in range(3):
        plane = [(axis + 1) % 3, (axis + 2) % 3]
        point, face = candidates(points[:, plane], vertices[faces][:, :, plane])       # p each
        corners = vertices[faces[face]] - points[point][:, None]                       # p 3 3, from the point
        (ax, ay), (bx, by), (cx, cy) = rearrange(corners[:, :, plane], "p c i -> c i p")               # p each
        weight = np.stack([bx * cy - by * cx, cx * ay - cy * ax, ax * by - ay * bx])   # 3 p, areas: barycentric
        area = weight.sum(0)                                                           # p, > 0: outward is upward
        height = (weight * corners[:, :, axis].T).sum(0) * np.sign(area)               # p, > 0: above the point
        crossed = (weight > 0).all(0) | (weight < 0).all(0)
        total += np.bincount(point, crossed * np.sign(area) * np.sign(height), len(points))
    return total / 6


def spread_points(vertices, faces, share, u, v):
    """Three numbers in [0, 1] for each point, k each -> points on a mesh, k 3, their faces, k, and the weights of the
    faces' corners, k 3. share: of the area before the face. If the numbers are uniform, so are the points, by area."""
    area = face_areas(vertices, faces).cumsum()                                        # f
    face = np.searchsorted(area / area[-1], share, side="right").clip(max=len(faces) - 1)              # k
    u = np.sqrt(u)                                                                     # evenly, not along the sides
    weights = np.stack([1 - u, u * (1 - v), u * v], 1)                                 # k 3
    return np.einsum("kc,kci->ki", weights, vertices[faces[face]]).astype(np.float32), face, weights


def sample_surface(vertices, faces, k, rng, hidden=True):
    """k points uniform by area on a mesh, k 3, their faces, k, and the weights of the faces' corners, k 3. Points
    inside another component are left out, unless `hidden` or fewer than k are left. An empty mesh gives a corner of the
    cube, on face -1."""
    if face_areas(vertices, faces).sum() == 0:
        return np.ones((k, 3), np.float32), np.full(k, -1), np.zeros((k, 3))
    share, u, v = rng.random((3, k if hidden else 3 * k))                              # k, or 3 k to choose from
    x, face, weights = spread_points(vertices, faces, share, u, v)
    if not hidden:
        corners = vertices[faces[face]]                                                # k 3 3
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        above = x + 1e-3 * normal / np.linalg.norm(normal, axis=1, keepdims=True).clip(1e-12)
        visible = []                                                                   # rows
        for chunk in np.split(np.arange(len(x)), range(CHUNK, len(x), CHUNK)):
            visible.extend(chunk[winding_number(above[chunk], vertices, faces) < .5])
            if len(visible) >= k:
                break
        rows = visible[:k] if len(visible) >= k else np.arange(k)
        x, face, weights = x[rows], face[rows], weights[rows]
    return x, face, weights


def directed_edges(faces):
    return faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)        # (f 3) 2
