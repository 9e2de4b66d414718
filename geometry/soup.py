"""soup.py - a solid from the triangles of a file, which may be open, crossing, or turned inside out.

Three quarters of the models that people draw are not watertight: sheets without thickness, crossing parts, faces turned
inside out, cupboards without a back. But they look right from outside. So:

    1. mark the cells of a fine grid that triangles touch, and flood all other cells from outside
    2. a point of a triangle is on the surface if the flood comes near it, on one side or, for a sheet, on both sides
    3. cells that the flood does not reach are inside

Every triangle gets a skin on both sides: a sheet becomes a thin solid. A distance is that to the nearest points of the
skin. A gap narrower than a cell counts as closed. The orientation of the triangles does not matter.
"""
from functools import cached_property, partial

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from engine.commands import UserError
from engine.networks import grid_points
from geometry.meshes import FACES, spread_points

CELLS = 128             # along a side of [-1, 1]^3
CELL = 2 / CELLS
SKIN = 1.25 * CELL      # thickness of the skin on either side: a sheet of twice that shows on a grid of 64
DENSITY = 16            # points a cell face: they miss one in 10^7 of the cells that a triangle crosses
POOL = 150_000          # surface points that are stored
FAR = .25               # distances are cut off here
REACH = 1.2, 1.8, 2.6   # steps from a point towards the flood, in cells
search_tree = partial(cKDTree, balanced_tree=False)     # balanced, many points in a plane overflow scipy's stack


def cell(x):
    """Points k 3 -> the cells that they lie in: three indices, k each."""
    return tuple(((x + 1) / CELL).astype(np.int64).clip(0, CELLS - 1).T)


class Soup:
    """Triangles v 3, f 3, within [-.9, .9]^3, a colour each, f 3 in [0, 1]. It has the methods of a built-in Shape."""
    name, captions, attributes, icon = "", (), {}, None

    def __init__(self, vertices, faces, colours):
        self.vertices, self.faces, self.colours = vertices.astype(np.float32), faces, colours.astype(np.float32)

    def _draw(self, rng):
        """k points uniform by area over all triangles: points k 3, normals k 3, rows of their triangles k."""
        corners = self.vertices[self.faces]                                       # f 3 3
        cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])                  # f 3
        double = np.linalg.norm(cross, axis=1)                                    # f, twice the area
        k = int(np.clip(double.sum() / 2 / CELL ** 2 * DENSITY, POOL, 4_000_000))
        share = (np.arange(k) + rng.random(k)) / k                                # k, in equal steps of area
        x, triangle, _ = spread_points(self.vertices, self.faces, share, *rng.random((2, k), np.float32))
        return x, cross[triangle] / double[triangle, None], triangle

    @cached_property
    def _solid(self):
        """The flood (a boolean for each cell); points of the skin, normals into the flood, triangles, a search tree."""
        # 1. Flood the cells without triangles, from a corner of the cube.
        rng = np.random.default_rng(0)
        x, normal, triangle = self._draw(rng)
        free = np.ones((CELLS,) * 3, bool)
        free[cell(x)] = False
        label, _ = ndimage.label(free)
        flood = label == label[0, 0, 0]

        # 2. Find the points that the flood comes near, on either side, and move them onto the skin.
        sides = []
        for side in (1, -1):
            wet = np.any([flood[cell(x + side * reach * CELL * normal)] for reach in REACH], 0)         # k
            sides.append((x[wet] + side * SKIN * normal[wet], side * normal[wet], triangle[wet]))
        x, normal, triangle = (np.concatenate(arrays) for arrays in zip(*sides))
        if not len(x):
            raise UserError("nothing of the shape is visible from outside")

        # 3. Choose POOL of them. Points of one cell follow each other: nearest neighbours then take half the time.
        chosen = rng.permutation(len(x))[:POOL]
        chosen = chosen[np.lexsort(cell(x[chosen]))]
        x, normal, triangle = x[chosen], normal[chosen].astype(np.float32), triangle[chosen]

        # 4. Leave out points that lie within the skin of another triangle.
        bare = search_tree(x - SKIN * normal)                                            # the points without the skin
        clear = bare.query(x, distance_upper_bound=.8 * SKIN)[0] == np.inf        # k
        return flood, x[clear], normal[clear], triangle[clear], search_tree(x[clear])

    def surface(self, k, rng):
        """k points uniform by area over the visible surface: points, normals, colours, k 3 each."""
        _, x, normal, triangle, _ = self._solid
        chosen = rng.integers(len(x), size=k)
        return x[chosen], normal[chosen], self.colours[triangle[chosen]]

    def field(self, x):
        """Points k 3 -> signed distance k, negative inside, at most FAR; colour of the nearest surface point k 3."""
        flood, surface, normal, triangle, nearest = self._solid
        x = np.asarray(x, np.float32)
        distance, near = nearest.query(x, 4, distance_upper_bound=FAR)         # k 4 each
        near = near.clip(max=len(surface) - 1)                                    # beyond FAR: any point
        weight = 1 / (distance ** 2 + 1e-8)
        along = ((x[:, None] - surface[near]) * normal[near]).sum(-1)             # k 4, signed, along the normals
        close = (along * weight).sum(1) / weight.sum(1).clip(1e-9)                # k
        outside = np.where(distance[:, 0] < 2 * CELL, close > 0, flood[cell(x)])
        size = np.where(distance[:, 0] < CELL, abs(close), distance[:, 0].clip(max=FAR))
        return np.where(outside, size, -size).astype(np.float32), self.colours[triangle[near[:, 0]]]

    def distance(self, x):
        return self.field(x)[0]

    @property
    def low_poly(self):
        """Is the fine mesh a low-poly one? It has the faces that the author set."""
        return len(self.faces) <= FACES

    @cached_property
    def _near(self):
        """Cells within four cells of the surface, which is twice the step of a grid of 64."""
        near = np.zeros((CELLS,) * 3, bool)
        near[cell(self._solid[1])] = True
        return ndimage.maximum_filter(near, 9)

    def side(self, x):
        """distance(x) near the surface, elsewhere FAR or -FAR. A mesh needs no more; it takes a tenth of the time."""
        index = cell(x)
        near = self._near[index]                                                  # k booleans
        value = np.where(self._solid[0][index], FAR, -FAR)
        value[near] = self.distance(x[near])
        return value

    def mesh(self, fine=False):
        """Vertices v 3, faces f 3, colours f 3. Fine: the triangles as they are, with no vertex shared by faces of two
        colours. Else: a closed mesh of the solid."""
        if not fine:
            vertices, faces = surface_of(self.side)
            return vertices, faces, self.field(vertices[faces].mean(1))[1]
        shade, colour = np.unique(np.round(self.colours * 255), axis=0, return_inverse=True)
        _, place = np.unique(np.round(self.vertices, 5), axis=0, return_inverse=True)
        pairs = place.reshape(-1)[self.faces].astype(np.int64) * len(shade) + colour.reshape(-1, 1)     # f 3
        _, first, faces = np.unique(pairs, return_index=True, return_inverse=True)
        return self.vertices[self.faces.reshape(-1)[first]], faces.reshape(-1, 3), self.colours


def surface_of(inside, side=64):
    """A function that is negative inside -> the closed mesh around that, v 3 and f 3, by a grid of `side` cells."""
    values = np.concatenate([inside(x) for x in np.array_split(grid_points(side).numpy(), 64)]).reshape((side,) * 3)
    values = np.pad(values, 1, constant_values=1)
    if not values.min() < 0:
        return np.zeros((0, 3)), np.zeros((0, 3), int)
    vertices, faces, *_ = marching_cubes(values, 0)
    return (vertices - .5) * 2 / side - 1, faces
