"""rasterise.py - a z-buffer: which point of a mesh, or of many balls, each pixel shows.

Letters: f faces, v vertices, k points, p pixels. A `view` is a rotation, 3 3 (geometry/camera.py).
"""
import math

import torch
import torch.nn.functional as F

from geometry.camera import EYE, HALF, project
from geometry.meshes import vertex_normals


def nearest(width, low, high, depth):
    """The z-buffer of a picture. Item i, a face or a ball, lies in the rectangle low[i]..high[i] (k 2), in pixels.
    depth(i, x, y) -> the distance of items i at pixel centres x, y; infinite where they do not cover them.
    -> the covered pixels (p) and the item in front of each (p). Items of similar size are drawn together: one operation
    handles thousands of tiny triangles, and the two big triangles of a box's side are no special case."""
    first = (low - .5).ceil().clamp(min=0)
    last = (high - .5).floor().clamp(max=width - 1)
    count, first = last - first + 1, first.long()                              # k 2, pixels along x and y
    power = count.clamp(min=1).log2().ceil().long()                            # k 2, rounded up to powers of two
    group = torch.where((count > 0).all(-1), power[:, 0] * 32 + power[:, 1], -1)         # k, -1: between pixel centres
    front = torch.full((width * width,), torch.iinfo(torch.int64).max)

    for code in group[group >= 0].unique().tolist():
        columns, rows = 2 ** (code // 32), 2 ** (code % 32)
        for i in (group == code).nonzero()[:, 0].split(max(1, 2 ** 20 // (columns * rows))):       # bounds memory
            x = (first[i, 0, None] + torch.arange(columns))[:, None, :]        # k 1 columns
            y = (first[i, 1, None] + torch.arange(rows))[:, :, None]           # k rows 1
            distance = depth(i, x + .5, y + .5)                                # k rows columns
            hit = distance.isfinite() & (x < width) & (y < width)
            # Positive floats sort like their bits. With the distance above and the item below, one amin finds both.
            key = distance.view(torch.int32).long() << 32 | i[:, None, None]
            front.scatter_reduce_(0, (y * width + x)[hit], key[hit], "amin")
    pixel = (front < torch.iinfo(torch.int64).max).nonzero()[:, 0]
    return pixel, front[pixel] & 0xffffffff


def rasterise_mesh(vertices, faces, colours, view, width):
    """A mesh -> the covered pixels (p), and the surface's position, normal and colour in each (p 3)."""
    xy, distance = project(vertices, view, width)
    corners, near = xy[faces], 1 / distance[faces]                             # f 3 2, f 3
    a, b, c = corners.unbind(1)                                                # f 2
    # Barycentric weights are 1/3 at the centroid and affine in x and y: weight = 1/3 + slope . (xy - centroid).
    centroid, edges = corners.mean(1), torch.stack([b - c, c - a, a - b], 1)   # f 2; f 3 2, opposite a, b, c
    area = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]
    area = torch.where(area == 0, math.nan, area)                              # nan: the face covers no pixel
    slope = torch.stack([edges[..., 1], -edges[..., 0]], -1) / area[:, None, None]                     # f 3 2
    def depth(i, x, y):
        i = i[:, None, None]
        x, y = x - centroid[i, 0], y - centroid[i, 1]
        u, v, w = (1 / 3 + slope[i, j, 0] * x + slope[i, j, 1] * y for j in range(3))              # f rows columns
        inverse = u * near[i, 0] + v * near[i, 1] + w * near[i, 2]             # 1 / distance is affine too
        return torch.where(u.minimum(v).minimum(w) >= 0, 1 / inverse, math.inf)

    pixel, face = nearest(width, corners.amin(1), corners.amax(1), depth)
    xy = torch.stack([pixel % width, pixel // width], -1) + .5                 # p 2
    weight = 1 / 3 + (slope[face] * (xy - centroid[face])[:, None]).sum(-1)    # p 3
    weight = F.normalize(weight * near[face], p=1, dim=-1)[..., None]          # p 3 1, perspective-correct

    a, b, c = vertices[faces].unbind(1)
    flat = torch.linalg.cross(b - a, c - a)                                    # f 3
    smooth = torch.from_numpy(vertex_normals(vertices.numpy(), faces.numpy())).to(flat)                # v 3
    flat, smooth = F.normalize(flat, dim=-1)[face][:, None], smooth[faces[face]]     # p 1 3, p 3 3
    # A corner whose smooth normal is over 46 degrees off its face's lies on a crease: it stays flat. Below 33: smooth.
    soft = (((flat * smooth).sum(-1, keepdim=True) - .70) / .14).clamp(0, 1)
    normal = (weight * (flat + soft * (smooth - flat))).sum(1)                 # p 3
    position = (weight * vertices[faces[face]]).sum(1)                         # p 3
    away = (flat[:, 0] * (EYE * view[2] - position)).sum(-1, keepdim=True) < 0
    normal = F.normalize(torch.where(away, -normal, normal), dim=-1)           # faces are drawn from both sides
    return pixel, position, normal, (weight * colours[faces[face]]).sum(1)


def rasterise_points(points, colours, radius, view, width):
    """Points (k 3) as balls of one radius -> the same as rasterise_mesh."""
    xy, distance = project(points, view, width)
    reach = radius * EYE / HALF / distance * width / 2                         # k, radius in pixels

    def rise(i, x, y):                                                         # of the ball above its rim, 0..1
        return (1 - ((x - xy[i, 0]) ** 2 + (y - xy[i, 1]) ** 2) / reach[i] ** 2).sqrt()            # nan outside

    def depth(i, x, y):
        i = i[:, None, None]
        return (distance[i] - radius * rise(i, x, y)).nan_to_num(math.inf)

    pixel, ball = nearest(width, xy - reach[:, None], xy + reach[:, None], depth)
    x, y = pixel % width + .5, pixel // width + .5
    (u, v), r = xy[ball].T, reach[ball]
    normal = torch.stack([(x - u) / r, (v - y) / r, rise(ball, x, y)], -1) @ view        # p 3
    return pixel, points[ball] + radius * normal, normal, colours[ball]
