"""geometry/camera.py - the camera, and which surface point each pixel of it sees: of meshes, balls, signed distance fields.

Letters: f faces, v vertices, k points, p pixels.

    python geometry/render.py out/table-0.glb        # a picture of them
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

EYE = 6.                           # distance of the eye; far, so that perspective stays slight
HALF = 1.42                        # half the height of what is seen at the origin; objects are within .9


def tensor(array, dtype=torch.float32):
    """From torch on any device or from numpy; copied there, as torch wants no read-only or reversed arrays."""
    array = array.detach().cpu() if torch.is_tensor(array) else torch.from_numpy(np.array(array, order="C"))
    return array.to(dtype)


def project(points, view, width):
    """World points (k 3) -> pixel coordinates (k 2), y down, and distance before the eye (k)."""
    x, y, z = (points @ view.T).unbind(-1)
    distance = (EYE - z).clamp(min=.5)                             # a stray point behind the eye stays harmless
    scale = EYE / HALF / distance
    return torch.stack([1 + x * scale, 1 - y * scale], -1) * width / 2, distance


def rays(view, width):
    """Direction through every pixel centre, row by row (p 3), scaled to advance 1 along the view axis."""
    s = (torch.arange(width) + .5) * 2 / width - 1
    y, x = torch.meshgrid(-s, s, indexing="ij")
    return torch.stack([x * HALF / EYE, y * HALF / EYE, -torch.ones_like(x)], -1).flatten(0, 1) @ view


# ---- what each pixel sees: pixel (p), position, normal, colour (p 3), for three kinds of shape

def nearest(size, low, high, inside):
    """The z-buffer. Item i lies in the rectangle low[i]..high[i] (k 2); inside(i, x, y) -> its distance at
    pixel centres, infinite where it does not cover them. Returns the pixels covered and the item in front.

    Items of like size go together: one operation handles thousands of pixel-sized marching-cubes triangles,
    and the two big triangles of a box's side are no special case."""
    first, last = (low - .5).ceil().clamp(min=0), (high - .5).floor().clamp(max=size - 1)
    count, first = last - first + 1, first.long()                              # pixels along x and y, k 2
    power = count.clamp(min=1).log2().ceil().long()                            # rounded up to powers of two
    group = torch.where((count > 0).all(-1), power[:, 0] * 32 + power[:, 1], -1)   # -1: between pixel centres
    front = torch.full((size * size,), torch.iinfo(torch.int64).max)
    for code in group[group >= 0].unique().tolist():
        columns, rows = 2 ** (code // 32), 2 ** (code % 32)
        for i in (group == code).nonzero()[:, 0].split(max(1, 2 ** 20 // (columns * rows))):   # bounds memory
            x = (first[i, 0, None] + torch.arange(columns))[:, None, :]        # k 1 columns
            y = (first[i, 1, None] + torch.arange(rows))[:, :, None]           # k rows 1
            distance = inside(i, x + .5, y + .5)                               # k rows columns
            hit = distance.isfinite() & (x < size) & (y < size)
            # positive floats sort like their bits: distance above, item below, and one amin finds both
            key = distance.view(torch.int32).long() << 32 | i[:, None, None]
            front.scatter_reduce_(0, (y * size + x)[hit], key[hit], "amin")
    pixel = (front < torch.iinfo(torch.int64).max).nonzero()[:, 0]
    return pixel, front[pixel] & 0xffffffff


def see_mesh(vertices, faces, colours, view, width):
    xy, distance = project(vertices, view, width)
    corner, near = xy[faces], 1 / distance[faces]                              # f 3 2, f 3
    a, b, c = corner.unbind(1)
    # Barycentric weights are 1/3 at the centroid and affine in x and y: weight = 1/3 + slope . (xy - middle).
    middle, edge = corner.mean(1), torch.stack([b - c, c - a, a - b], 1)       # f 2; f 3 2, opposite a, b, c
    area = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]
    area = torch.where(area == 0, math.nan, area)                              # nan is inside nothing
    slope = torch.stack([edge[..., 1], -edge[..., 0]], -1) / area[:, None, None]

    def inside(i, x, y):
        i = i[:, None, None]
        x, y = x - middle[i, 0], y - middle[i, 1]
        u, v, w = (1 / 3 + slope[i, j, 0] * x + slope[i, j, 1] * y for j in range(3))          # f rows columns
        inverse = u * near[i, 0] + v * near[i, 1] + w * near[i, 2]             # 1 / distance is affine too
        return torch.where(u.minimum(v).minimum(w) >= 0, 1 / inverse, math.inf)

    pixel, face = nearest(width, corner.amin(1), corner.amax(1), inside)
    xy = torch.stack([pixel % width, pixel // width], -1) + .5                 # p 2
    weight = 1 / 3 + (slope[face] * (xy - middle[face])[:, None]).sum(-1)      # p 3
    weight = F.normalize(weight * near[face], p=1, dim=-1)[..., None]          # perspective-correct

    a, b, c = vertices[faces].unbind(1)
    flat = torch.linalg.cross(b - a, c - a)
    smooth = torch.zeros_like(vertices)
    for j in range(3):
        smooth.index_add_(0, faces[:, j], flat)                                # big faces count for more
    flat, smooth = F.normalize(flat, dim=-1)[face][:, None], F.normalize(smooth, dim=-1)[faces[face]]
    # A corner whose averaged normal leaves its face's by over 40 degrees sits on a crease: stay flat there.
    crease = (((flat * smooth).sum(-1, keepdim=True) - .70) / .14).clamp(0, 1)
    normal = (weight * (flat + crease * (smooth - flat))).sum(1)
    position = (weight * vertices[faces[face]]).sum(1)
    away = (flat[:, 0] * (EYE * view[2] - position)).sum(-1, keepdim=True) < 0
    normal = F.normalize(torch.where(away, -normal, normal), dim=-1)           # inside-out faces are drawn too
    return pixel, position, normal, (weight * colours[faces[face]]).sum(1)


def see_points(points, colours, radius, view, width):
    """Every point is a little ball."""
    xy, distance = project(points, view, width)
    reach = radius * EYE / HALF / distance * width / 2                         # radius in pixels

    def rise(i, x, y):                                                         # of the ball above its rim, 0..1
        return (1 - ((x - xy[i, 0]) ** 2 + (y - xy[i, 1]) ** 2) / reach[i] ** 2).sqrt()      # nan beyond it

    def inside(i, x, y):
        i = i[:, None, None]
        return (distance[i] - radius * rise(i, x, y)).nan_to_num(math.inf)

    pixel, ball = nearest(width, xy - reach[:, None], xy + reach[:, None], inside)
    x, y = pixel % width + .5, pixel // width + .5
    normal = torch.stack([(x - xy[ball, 0]) / reach[ball], (xy[ball, 1] - y) / reach[ball], rise(ball, x, y)], -1) @ view
    return pixel, points[ball] + radius * normal, normal, colours[ball]
