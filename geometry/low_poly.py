"""low_poly.py - low-poly meshes as sequences of faces: the canonical order that the mesh head learns.

LTM3D section 4 generates a mesh as a sequence of faces. A face is 9 whole numbers: three corners of three coordinates,
each one of BINS cells of [-1, 1]. Canonical order (y is up; corners are counter-clockwise, seen from outside):

    1. A component is a set of faces joined by shared vertices. The one with most faces comes first. Equal ones follow
       each other from left to right (x), then from back to front (z) by their centre, then by their highest vertex.
    2. A component starts at its highest vertex; of several, at the farthest back, then at the leftmost. Of the faces
       there, the one with the highest next corners comes first.
    3. From there a walk visits its faces. It leaves a face over the first free edge to the right of where it came in.
       If there is none, it goes back to the last face with one. A face starts with the edge that it is entered by.

So the order of the faces in a file does not matter. A head has to guess the canonical order from the shape, so it must
seldom jump: equal components (legs, wheels) stay in place when another component moves past them. Positions are
compared to four decimals, because two heights may be one bin in some shapes and two bins in others.
"""
from collections import defaultdict

import numpy as np
import torch

from engine.commands import UserError
from geometry.meshes import BINS, bin_centres, face_components, quantise

MARGIN, MATCHED = .5, 16           # of match_like_components; built-in shapes have up to 12 components


def check_mesh(vertices, faces):
    """A mesh that the next steps cannot use is a one-line error."""
    if len(faces) == 0:
        raise UserError("the mesh has no faces; export it as a surface")
    if not np.isfinite(vertices).all():
        raise UserError("the mesh has vertices that are not finite numbers (NaN); repair the file")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise UserError(f"the mesh has {len(vertices)} vertices, but a face has vertex {faces.max()}; repair the file")
    if abs(vertices).max() > 1:
        raise UserError(f"the mesh reaches to {abs(vertices).max():g}, shapes lie within [-1, 1]; move and scale it")


def canonical(vertices, faces, colours):
    """vertices v 3 in [-1, 1], faces f 3, colours f 3 -> corners f' 3 3 (bins of x y z), colours f' 3, components f'
    (numbers), in canonical order. Repeated faces and faces that quantisation makes degenerate are left out."""
    check_mesh(vertices, faces)

    # 1. Components: equal vertices are one vertex, and faces that share a vertex are one component.
    _, merged = np.unique(vertices, axis=0, return_inverse=True)                       # v
    merged = merged.reshape(-1)[faces]                                                 # f 3
    component = face_components(merged, len(vertices))                                 # f

    # 2. Vertices: highest first, then farthest back, then leftmost. Each face starts at the first of its corners.
    x, y, z = np.round(vertices * 1e4).astype(np.int64).T                              # v each
    _, rank = np.unique(np.stack([-y, z, x], 1), axis=0, return_inverse=True)          # v
    rank = rank.reshape(-1)[faces]                                                     # f 3
    turn = (rank.argmin(1)[:, None] + np.arange(3)) % 3                                # f 3
    merged, rank = (np.take_along_axis(x, turn, 1) for x in (merged, rank))            # f 3 each

    # 3. Faces: sorted by component, then by their corners. The walk starts at the first face of each component.
    component_key = {}
    for i in np.unique(component):
        members = component == i                                                       # f booleans
        x, _, z = vertices[np.unique(faces[members])].mean(0).round(4) + 0.            # the centre; + 0 makes -0 a 0
        component_key[i] = -members.sum(), x, z, rank[members].min()
    starts = sorted(range(len(faces)), key=lambda i: (component_key[component[i]], *rank[i], *colours[i]))
    order, entered = np.array(list(walk(merged, starts).items())).T                    # f each

    # 4. Corners in bins; each face starts with the edge that it was entered by.
    turn = (turn[order, :1] + entered[:, None] + np.arange(3)) % 3                     # f 3
    corners = np.take_along_axis(quantise(vertices)[faces[order]], turn[..., None], 1)                  # f 3 3

    # 5. Of equal faces only the first is left, whichever corner they start with. Faces with two equal corners go too.
    first = {}
    for i, (a, b, c) in enumerate(map(tuple, face) for face in corners.tolist()):
        if a != b != c != a:
            first.setdefault(min((a, b, c), (b, c, a), (c, a, b)), i)
    if not first:
        raise UserError(f"no face of the mesh is larger than a bin, 1/{BINS // 2}; scale it to fill [-1, 1]")
    rows = list(first.values())
    component = component[order][rows]                                                 # f'
    return corners[rows], colours[order][rows], np.cumsum(np.diff(component, prepend=component[0]) != 0)


def in_order_again(corners, colours, move):
    """The canonical order of a mesh of `canonical` after a symmetry of the cube (a matrix 3 3): corners f 3 3, colours
    f 3, components f. Positions are now centres of bins: equal heights may be ordered differently."""
    corners = bin_centres(corners)[:, ::int(np.linalg.det(move).round())]              # mirrored, faces look inwards
    return canonical(corners.reshape(-1, 3) @ move.T, np.arange(3 * len(corners)).reshape(-1, 3), colours)


def walk(faces, starts):
    """Visits faces f 3 over their edges, to the right first; starts anew at the next of `starts` that is not visited.
    -> {face: which of its corners starts the edge that it was entered by}, in the order of the visits."""
    beside = defaultdict(list)                                # edge from a to b -> [(face, corner a)]
    for face in starts[::-1]:                                 # the last in a list is popped first
        for corner in range(3):
            beside[faces[face, corner], faces[face, (corner + 1) % 3]].append((face, corner))

    entered = {}
    for start in starts:
        stack = [(start, 0)]
        while stack:
            face, corner = stack.pop()
            if face not in entered:
                entered[face] = corner
                a, b, c = np.roll(faces[face], -corner)       # entered over a -> b
                stack += beside[b, a] + beside[a, c] + beside[c, b]         # a neighbour has the opposite edge
    return entered


@torch.no_grad()
def match_like_components(logits, corners, components):
    """Components with as many faces (legs, wheels) have an arbitrary order, which no head can know. So the loss takes
    the order that is likeliest for the head, if it wins by MARGIN a coordinate: exchanges of two or three components,
    the best first. Only the first MATCHED components move.
    logits b f 9 BINS, corners b f 9, components b f -> rows b f, the order of the faces. c components."""
    c, face = (torch.arange(count, device=corners.device) for count in (MATCHED, corners.shape[1]))
    inside = components[:, None] == c[:, None]                                         # b c f
    size = inside.sum(2)                                                               # b c
    start = size.cumsum(1) - size                                                      # b c, the first face
    # score[i, j]: how likely true component j is in place i
    offset = face - start.gather(1, components.clamp(0, MATCHED - 1))                  # b f, from the first face
    rows = (start[:, None] + offset[..., None]).clamp(0, len(face) - 1).flatten(1)     # b (f c), the same face of each
    true = corners.clamp(min=0).gather(1, rows[..., None].expand(-1, -1, 9)).unflatten(1, (-1, MATCHED))     # b f c 9
    likely = logits.gather(3, true.mT).mean(2)                                         # b f c
    score = (inside[..., None] * likely[:, None]).sum(2) / size.clamp(min=1)[..., None]
    score = score + MARGIN * torch.eye(MATCHED, device=c.device)                       # b i j
    own, unlike = torch.eye(MATCHED, dtype=torch.bool, device=c.device), size[:, None] != size[..., None]
    place = c.expand_as(size)                                                          # b c, the component in each
    for _ in range(8):
        now = score.gather(2, place[:, None].expand_as(score))                         # b i j, that of j moves to i
        gain = (now - now.diagonal(dim1=1, dim2=2)[..., None]).masked_fill(unlike, -torch.inf)
        away = gain.masked_fill(own, -torch.inf)
        total = away[..., None] + gain[:, None] + away.mT[:, :, None]                  # b i j k: to i, to j, to k
        most, best = total.flatten(1).max(1, keepdim=True)                             # b 1
        best = best * (most > 0)                                                       # 0: all stay
        i, j, k = best // MATCHED ** 2, best // MATCHED % MATCHED, best % MATCHED
        place = place.gather(1, c.expand_as(size).scatter(1, i, j).scatter(1, j, k).scatter(1, k, i))
    return face + (inside * (start.gather(1, place) - start)[..., None]).sum(1)
