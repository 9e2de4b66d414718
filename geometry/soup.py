"""geometry/soup.py - solids from triangles that were only meant to be looked at.

Three quarters of the models that people draw are not watertight: sheets without thickness, parts pushed through each
other, faces turned inside out, cupboards without a back. What can be trusted is where there is something to see, so:

    1. mark the cells of a fine grid that the triangles touch, and flood the others from outside
    2. a point of a triangle is surface if the flood comes near it, from one side or, of a sheet, from both
    3. what the flood does not reach is inside

Every triangle is given a skin, so that a sheet is a thin solid too and nothing is thinner than a grid of 64 can see:

    distance(x) = +- |x - nearest point of the skin|, close to it the projection on its normal

A gap narrower than a cell counts as closed. The triangles' own orientation is never asked.

    python -m geometry.real path/to/shapes --check 70       # how often is the solid what the triangles show?
"""
from functools import cached_property

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from engine.commands import UserError
from engine.networks import grid_points
from geometry.camera import see_mesh, tensor
from geometry.light import look

CELLS = 128             # along a side of [-1, 1]^3
CELL = 2 / CELLS
SKIN = 1.25 * CELL      # what every triangle is given on either side: what a grid of 64 can still see
DENSITY = 16            # points a cell face; a cell that a triangle crosses is missed once in 10^7
POOL = 150_000          # surface points that are kept
FAR = .25               # distances beyond are not told apart
REACH = 1.2, 1.8, 2.6   # cells from a point at which the flood is looked for


def tree(points):
    """For nearest neighbours. Not split at medians: of many points in one plane that overflows scipy's stack."""
    return cKDTree(points, balanced_tree=False)


class Soup:
    """Triangles v 3, f 3 with a colour each, f 3 in [0, 1], within [-.9, .9]^3: answers what a built-in Shape answers."""
    name, captions, attributes, icon = "", (), {}, None

    def __init__(self, vertices, faces, colours):
        self.vertices, self.faces, self.colours = vertices.astype(np.float32), faces, colours.astype(np.float32)

    def _draw(self, rng):
        """Points uniform by area over all triangles: points, normals, triangle."""
        corners = self.vertices[self.faces]                                  # f 3 3
        across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        double = np.linalg.norm(across, axis=1)
        count = int(np.clip(double.sum() / 2 / CELL ** 2 * DENSITY, POOL, 4_000_000))
        which = np.searchsorted(double.cumsum() / double.sum(), (np.arange(count) + rng.random(count)) / count).clip(max=len(double) - 1)
        u, v = rng.random((2, count, 1), np.float32)
        u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
        a, b, c = corners[which].swapaxes(0, 1)
        return a + u * (b - a) + v * (c - a), across[which] / double[which, None], which

    @staticmethod
    def _cell(x):
        return tuple(((x + 1) / CELL).astype(np.int64).clip(0, CELLS - 1).T)

    @cached_property
    def _solid(self):
        """The flood, and surface points with normals that point into it and the triangle each is of."""
        rng = np.random.default_rng(0)
        x, normal, which = self._draw(rng)
        free = np.ones((CELLS,) * 3, bool)
        free[self._cell(x)] = False
        label, _ = ndimage.label(free)
        flood = label == label[0, 0, 0]
        sides = []
        for side in (1, -1):                                                 # which the flood comes near
            wet = np.any([flood[self._cell(x + side * reach * CELL * normal)] for reach in REACH], 0)
            sides.append((x[wet] + side * SKIN * normal[wet], side * normal[wet], which[wet]))
        x, normal, which = (np.concatenate(each) for each in zip(*sides))
        if not len(x):
            raise UserError("nothing of it can be seen from outside")
        some = rng.permutation(len(x))[:POOL]
        some = some[np.lexsort(self._cell(x[some]))]                         # neighbours follow each other: the query takes half the time
        x, normal, which = x[some], normal[some].astype(np.float32), which[some]
        bare = tree(x - SKIN * normal)                                       # without the skin
        seen = bare.query(x, distance_upper_bound=.8 * SKIN)[0] == np.inf    # not within the skin of another triangle
        return flood, x[seen], normal[seen], which[seen]

    @cached_property
    def _tree(self):
        return tree(self._solid[1])

    def surface(self, k, rng):
        """k points uniform by area over what can be seen: points, normals, colours, (k, 3) each."""
        _, x, normal, which = self._solid
        some = rng.integers(len(x), size=k)
        return x[some], normal[some], self.colours[which[some]]

    def field(self, x):
        """Signed distance (k,), negative inside, at most FAR, and the colour of the nearest surface point (k, 3)."""
        flood, surface, normal, which = self._solid
        x = np.asarray(x, np.float32)
        apart, near = self._tree.query(x, 4, distance_upper_bound=FAR)
        near = near.clip(max=len(surface) - 1)                               # beyond FAR: any
        weight = 1 / (apart ** 2 + 1e-8)
        along = ((x[:, None] - surface[near]) * normal[near]).sum(-1)        # k 4: signed, along the normals
        close = (along * weight).sum(1) / weight.sum(1).clip(1e-9)
        outside = np.where(apart[:, 0] < 2 * CELL, close > 0, flood[self._cell(x)])
        far = np.where(apart[:, 0] < CELL, abs(close), apart[:, 0].clip(max=FAR))
        return np.where(outside, far, -far).astype(np.float32), self.colours[which[near[:, 0]]]

    def distance(self, x):
        return self.field(x)[0]

    @cached_property
    def _near(self):
        """Cells that have surface within four, twice the step of a grid of 64."""
        near = np.zeros((CELLS,) * 3, bool)
        near[self._cell(self._solid[1])] = True
        return ndimage.maximum_filter(near, 9)

    def side(self, x):
        """distance(x) near the surface; elsewhere just FAR, inside -FAR: all that a mesh of it needs, in a tenth of the time."""
        cell = self._cell(x)
        near, value = self._near[cell], np.where(self._solid[0][cell], FAR, -FAR)
        value[near] = self.distance(x[near])
        return value

    def mesh(self, fine=False):
        """Vertices v 3, faces f 3, colours f 3: the triangles as they are, no vertex with faces of two colours; or a closed
        mesh around the solid."""
        if fine:
            shade, colour = np.unique(np.round(self.colours * 255), axis=0, return_inverse=True)
            _, place = np.unique(np.round(self.vertices, 5), axis=0, return_inverse=True)
            pairs = place.reshape(-1)[self.faces].astype(np.int64) * len(shade) + colour.reshape(-1, 1)
            _, first, faces = np.unique(pairs, return_index=True, return_inverse=True)
            return self.vertices[self.faces.reshape(-1)[first]], faces.reshape(-1, 3), self.colours
        vertices, faces = surface_of(self.side)
        return vertices, faces, self.field(vertices[faces].mean(1))[1]


# ---------------------------------------------------------------------------- is the solid what the triangles show?

def visible(vertices, faces, width=160):
    """Points of triangles that are seen from any of ten sides: k 3."""
    vertices, faces = tensor(vertices), tensor(np.ascontiguousarray(faces), torch.int64)
    sides = [(azimuth, elevation) for azimuth in (20, 110, 200, 290) for elevation in (-25, 30)] + [(0, 89), (0, -89)]
    return torch.cat([see_mesh(vertices, faces, torch.zeros_like(vertices), look(*side), width)[1] for side in sides]).numpy()


def faithful(triangles, solid, near=2 * SKIN):
    """Two meshes -> the share of what is seen of the first that the second has within `near`, and the other way round."""
    a, b = visible(*triangles), visible(*solid)
    if not len(b):
        return 0., 0.
    return tuple(float((tree(there).query(here, distance_upper_bound=near)[0] < near).mean()) for here, there in ((a, b), (b, a)))


def surface_of(inside, side=64):
    """A function that is negative inside -> the closed mesh v 3, f 3 around that, on a grid."""
    values = np.concatenate([inside(x) for x in np.array_split(grid_points(side).numpy(), 64)]).reshape((side,) * 3)
    values = np.pad(values, 1, constant_values=1)
    if not values.min() < 0:
        return np.zeros((0, 3)), np.zeros((0, 3), int)
    vertices, faces, *_ = marching_cubes(values, 0)
    return (vertices - .5) * 2 / side - 1, faces
