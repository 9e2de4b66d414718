"""solids.py - coloured parts with closed-form distance -> signed distance, surface points, colours, meshes.

A shape is a list of rounded parts. The list gives the distance field of their union (exact outside), and an oriented,
coloured point cloud of its visible surface. shapes.py builds shapes from it. y is up, x right, z towards the viewer.

    python data.py        # draws shapes made of these parts
"""
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.spatial import cKDTree

from geometry.surface import TRUNCATION
from geometry.words import COLOURS

POOL = 16384        # surface samples for the depth where parts overlap: about .02 apart
TOUCH = 3e-4        # a point this near to the union's surface counts as on it


@dataclass
class Part:
    """A core, and all points within `radius` of it: so its edges are round. There are two kinds of core:

    box     size = its half sides (3,)
    turned  a convex profile, turned about the y axis; size = a chain of points (distance from it, y), counter-clockwise
            from the bottom. It starts and ends on the axis (cylinder, cone, capsule, ball) or is closed (tube)
    """
    kind: str
    centre: np.ndarray                      # (3,)
    size: np.ndarray
    radius: float
    colour: str
    rotation: np.ndarray | None = None      # (3, 3), part to world: x = centre + rotation @ local
    sides: int = 6                          # of the polygon that stands for a circle in a low-poly mesh; 0: a ball
                                            # without a mesh of its own, the part before it bulges instead

    def distance(self, x):
        """Points k 3 -> signed distance k."""
        x = x - self.centre.astype(x.dtype)
        if self.rotation is not None:
            x = x @ self.rotation.astype(x.dtype)
        x, y, z = x.T
        if self.kind == "box":
            beyond = [abs(c) - half for c, half in zip((x, y, z), self.size.tolist())]      # the faces: 3 times (k,)
            outside = np.sqrt(sum(np.square(np.maximum(c, 0)) for c in beyond))
            return outside + np.minimum(np.maximum(np.maximum(*beyond[:2]), beyond[2]), 0) - self.radius

        # A turned part is a convex polygon in (rho, y). Outside, the nearest edge counts; inside, the nearest line.
        rho, square, line = np.sqrt(x * x + z * z), np.inf, -np.inf
        chain = self.size.tolist()
        for (a, b), (c, d) in zip(chain[:-1], chain[1:]):
            u, v, length = c - a, d - b, max(np.hypot(c - a, d - b), 1e-9)
            p, q = rho - a, y - b
            t = np.clip((p * u + q * v) / length ** 2, 0, 1)                    # where on the edge the nearest point is
            square = np.minimum(square, np.square(p - t * u) + np.square(q - t * v))
            line = np.maximum(line, (p * v - q * u) / length)
        return np.where(line < 0, line, np.sqrt(square)) - self.radius

    def normal_angles(self):
        """Angles of the normals of the profile's edges, with one before and one after: (n + 1,); is it closed?"""
        step = np.diff(self.size, axis=0)
        angle = np.unwrap(np.arctan2(-step[:, 0], step[:, 1]))
        closed = self.size[0, 0] > 0
        first, last = (angle[-1] - 2 * np.pi, angle[-1]) if closed else (-np.pi / 2, np.pi / 2)
        return np.concatenate([[first], angle, [last]]), closed

    @cached_property
    def outline(self):
        """The rounded profile: rows (core rho, core y, angle of the normal) (m, 3), their outer rho (m,), the areas
        between them (m - 1,). From row to row the core point moves (a straight edge) or the angle turns (a corner)."""
        angle, _ = self.normal_angles()
        rows = np.concatenate([np.c_[np.tile(point, (9, 1)), np.linspace(a, b, 9)]
                               for point, a, b in zip(self.size, angle[:-1], angle[1:])])
        rho = rows[:, 0] + self.radius * np.cos(rows[:, 2])
        length = np.hypot(*np.diff(rows[:, :2], axis=0).T) + self.radius * np.diff(rows[:, 2])
        return rows, rho.clip(0), np.pi * length * (rho[:-1] + rho[1:]).clip(0)

    @cached_property
    def patches(self):
        """The surface of a box is 7 patches: 3 pairs of faces, 3 bundles of edges, the corners. -> the axes that the
        normals of each patch span (7, 3), areas (7,)."""
        h, r = self.size, self.radius
        faces = 8 * h[[1, 2, 0]] * h[[2, 0, 1]]
        return (np.concatenate([np.eye(3), 1 - np.eye(3), np.ones((1, 3))]),
                np.concatenate([faces, 4 * np.pi * r * h, [4 * np.pi * r * r]]))

    @property
    def area(self):
        return (self.patches[1] if self.kind == "box" else self.outline[2]).sum()

    def surface(self, k, rng):
        """k points uniform by area, and normals: k 3 each."""
        if self.kind == "box":
            axes, area = self.patches
            normal = rng.standard_normal((k, 3)) * axes[rng.choice(7, k, p=area / area.sum())]
            normal /= np.linalg.norm(normal, axis=1, keepdims=True)
            core = np.where(normal != 0, np.sign(normal), rng.uniform(-1, 1, (k, 3))) * self.size
        else:
            rows, rho, area = self.outline
            i = rng.choice(len(area), k, p=area / area.sum())
            a, b, u = rho[i], rho[i + 1], rng.random(k)
            t = u * (a + b) / (a + np.sqrt(a * a + u * (b * b - a * a)) + 1e-12)    # a density proportional to rho
            c, y, angle = (rows[i] + t[:, None] * (rows[i + 1] - rows[i])).T
            turn = rng.uniform(0, 2 * np.pi, k)
            cos, sin = np.cos(turn), np.sin(turn)
            normal = np.stack([np.cos(angle) * cos, np.sin(angle), np.cos(angle) * sin], 1)
            core = np.stack([c * cos, y, c * sin], 1)
        x = core + self.radius * normal
        if self.rotation is not None:
            x, normal = x @ self.rotation.T, normal @ self.rotation.T
        return x + self.centre, normal

    def mesh(self, fine):
        """Vertices v 3, faces f 3, closed and outward. Unless fine, edges are sharp and circles have few sides."""
        x, faces = self._box_mesh(fine) if self.kind == "box" else self._turned_mesh(fine)
        return (x if self.rotation is None else x @ self.rotation.T) + self.centre, faces

    def bulge(self, x, middle):
        """Low-poly vertices x (v, 3), moved away from `middle` onto this ball where the ball reaches farther."""
        reach, u = np.linalg.norm(x - middle, axis=1), self.centre - middle
        d = (x - middle) / reach[:, None]                                       # directions (v, 3)
        square = (1.05 * self.radius) ** 2 + (d @ u) ** 2 - u @ u               # 1.05, because flat faces cut corners
        far = np.where(square > 0, d @ u + np.sqrt(square.clip(0)), 0)          # where the ball ends (v,)
        return x + (far - reach).clip(0)[:, None] * d

    def _box_mesh(self, fine):
        """Six grids. Their rims lie beyond the core, and are pulled onto the rounded edges."""
        h, r = self.size, self.radius
        rim = r * np.tan(np.linspace(0, np.pi / 4, 4)) if fine else np.array([r])
        line = np.concatenate([-(h[:, None] + rim)[:, ::-1], h[:, None] + rim], 1)      # (3, n): lines across each axis
        n = line.shape[1]
        i, j = (c.ravel() for c in np.meshgrid(np.arange(n - 1), np.arange(n - 1), indexing="ij"))
        quads = np.stack([i * n + j, (i + 1) * n + j, (i + 1) * n + j + 1, i * n + j + 1], -1)
        triangles = quads[:, [0, 1, 2, 0, 2, 3]].reshape(-1, 3)                 # of one grid
        grids, faces = [], []
        for axis in range(3):
            u, v = (axis + 1) % 3, (axis + 2) % 3                               # u x v = axis
            for sign in (-1, 1):
                grid = np.empty((n, n, 3))
                grid[..., axis], grid[..., u], grid[..., v] = sign * (h + r)[axis], line[u][:, None], line[v]
                faces.append(len(grids) * n * n + triangles[:, ::sign])
                grids.append(grid.reshape(-1, 3))
        x, faces = np.concatenate(grids), np.concatenate(faces)
        if fine:
            core = x.clip(-h, h)
            x = core + r * (x - core) / np.linalg.norm(x - core, axis=1, keepdims=True)
        x, place = np.unique(x.round(12), axis=0, return_inverse=True)          # the grids share their edges
        return x, place.reshape(-1)[faces]

    def _turned_mesh(self, fine):
        """Rings of vertices, one for each corner of the profile; more where a fine mesh or a ball is round."""
        sides = lambda radius: (48 if radius > .2 else 24) if fine else self.sides     # of a circle
        chain, (angle, closed) = self.size, self.normal_angles()
        many = sides(self.radius) if fine or len(chain) == 2 else 0             # of a full circle of the profile
        rings = []
        for point, a, b in list(zip(chain, angle[:-1], angle[1:]))[:len(chain) - closed]:
            k = max(1, round(.14 * many * (b - a))) if b > a + 1e-6 else 0
            turn = a + (b - a) * (np.arange(k) + .5) / max(k, 1)                # tangents meet half way between them
            reach = self.radius / np.cos((b - a) / max(2 * k, 1))
            rings += [point + reach * np.array([np.cos(t), np.sin(t)]) for t in turn]
        rings = np.array(rings)                                                 # (m, 2): rho, y
        n = sides(rings[:, 0].max())
        turn = (np.arange(n) + .5) * 2 * np.pi / n
        # The corners of the polygon lie as far outside of the circle as the middles of its sides lie inside.
        polygon = np.stack([np.sin(turn), 0 * turn, np.cos(turn)], 1) * 2 / (1 + np.cos(np.pi / n))
        x = (rings[:, :1, None] * polygon + rings[:, 1:, None] * np.array([0, 1, 0])).reshape(-1, 3)

        i, j = np.meshgrid(np.arange(len(rings) - (not closed)), np.arange(n), indexing="ij")
        below, above, k = i * n, (i + 1) % len(rings) * n, (j + 1) % n          # two rings, and the next side
        faces = [np.stack([below + j, below + k, above + k], -1), np.stack([below + j, above + k, above + j], -1)]
        if not closed:                                                     # a flat cap at each end
            fan = np.stack([np.zeros(n - 2, int), np.arange(1, n - 1), np.arange(2, n)], -1)
            faces += [fan[:, ::-1], fan + (len(rings) - 1) * n]
        return x, np.concatenate([triangles.reshape(-1, 3) for triangles in faces])

    def bounds(self):
        """Exact bounding box (2, 3): how far the core reaches along each world axis, plus the radius."""
        axes = np.eye(3) if self.rotation is None else self.rotation            # row i: world axis i
        if self.kind == "box":
            high = abs(axes) @ self.size
            low = -high
        else:
            flat = np.hypot(axes[:, :1], axes[:, 2:]) * self.size[:, 0]         # (3, n)
            tall = axes[:, 1:2] * self.size[:, 1]                               # (3, n)
            low, high = (tall - flat).min(1), (tall + flat).max(1)
        return self.centre + np.stack([low - self.radius, high + self.radius])


def box(centre, sides, colour, radius=.03, rotation=None):
    return Part("box", np.array(centre, float), np.array(sides) / 2 - radius, radius, colour, rotation)

def turned(centre, chain, radius, colour, rotation, sides):
    return Part("turned", np.array(centre, float), np.array(chain), radius, colour, rotation, sides)

def cone(centre, bottom, top, height, colour, radius=.03, rotation=None, sides=6):
    """A frustum of outer radii `bottom` and `top`, upright unless rotated."""
    h = height / 2 - radius
    return turned(centre, [(0, -h), (bottom - radius, -h), (top - radius, h), (0, h)], radius, colour, rotation, sides)

def cylinder(centre, r, height, colour, radius=.03, rotation=None, sides=6):
    return cone(centre, r, r, height, colour, radius, rotation, sides)

def tube(centre, r, wall, height, colour, radius=.03, sides=12):
    a, b, h = r - wall + radius, r - radius, height / 2 - radius
    return turned(centre, [(a, -h), (b, -h), (b, h), (a, h), (a, -h)], radius, colour, None, sides)

def capsule(centre, r, length, colour, rotation=None, sides=6):
    h = length / 2 - r
    return turned(centre, [(0, -h), (0, h)], r, colour, rotation, sides)

def ball(centre, r, colour, sides=6):
    return capsule(centre, r, 2 * r, colour, None, sides)

def rod(start, end, r, colour, sides=6):
    """A capsule from one point to another: the rotation takes y to its direction."""
    start, end = np.array(start), np.array(end)
    length = np.linalg.norm(end - start)
    y = (end - start) / length
    x = np.cross(y, [0, 0, 1.] if abs(y[2]) < .99 else [1., 0, 0])
    x = x / np.linalg.norm(x)
    return capsule((start + end) / 2, r, length + 2 * r, colour, np.stack([x, y, np.cross(x, y)], 1), sides)

def rotation_about(axis, degrees):
    """Rotation (3, 3) about x, y or z."""
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix, angle = np.eye(3), np.radians(degrees)
    matrix[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return matrix


@dataclass
class Shape:
    name: str               # one of CLASSES
    parts: list
    attributes: dict        # what is visible, e.g. {"top": "round", "legs": 4, "colour": "red"}
    captions: list          # several wordings, from the bare class name to a full description
    icon = None             # no picture came with it
    low_poly = False        # the fine mesh has thousands of faces

    @cached_property
    def palette(self):
        return np.array([COLOURS[part.colour] for part in self.parts], np.float32)      # parts 3

    def _sample(self, k, rng):
        """k points uniform over the parts, less those inside another part: points, normals, rows of parts."""
        area = np.array([part.area for part in self.parts])
        counts = rng.multinomial(k, area / area.sum())
        samples = [part.surface(count, rng) for part, count in zip(self.parts, counts)]
        x, normal = (np.concatenate(arrays).astype(np.float32) for arrays in zip(*samples))
        owner = np.repeat(np.arange(len(self.parts)), counts)
        visible = np.ones(len(x), bool)
        for i, part in enumerate(self.parts):       # only points in the bounding box of a part can be inside it
            low, high = part.bounds().astype(np.float32)
            near = np.flatnonzero(((x > low) & (x < high)).all(1) & (owner != i) & visible)
            visible[near] = part.distance(x[near]) > -1e-6
        return x[visible], normal[visible], owner[visible]

    def surface(self, k, rng):
        """k points uniform by area over the visible surface: points, normals, colours, k 3 each."""
        samples, count = [], 0
        while count < k:
            samples.append(self._sample(int(1.4 * (k - count)) + 64, rng))
            count += len(samples[-1][0])
        x, normal, owner = (np.concatenate(arrays) for arrays in zip(*samples))
        chosen = rng.permutation(count)[:k]         # samples are sorted by part
        return x[chosen], normal[chosen], self.palette[owner[chosen]]

    @cached_property
    def _tree(self):
        return cKDTree(self._sample(POOL, np.random.default_rng(0))[0])

    def _distances(self, x):                        # k 3 -> parts k
        return np.stack([part.distance(x) for part in self.parts])

    def _slope(self, x, owner):
        """Points k 3, each with the row of a part -> distance to that part k, gradient k 3 by differences."""
        d = np.empty((len(x), 4))
        for i in np.unique(owner):
            moved = x[owner == i][:, None] + 1e-5 * np.eye(4, 3, -1)            # the point, then 3 steps along x, y, z
            d[owner == i] = self.parts[i].distance(moved.reshape(-1, 3)).reshape(-1, 4)
        return d[:, 0], (d[:, 1:] - d[:, :1]) / 1e-5

    def _depth(self, x, deepest):
        """Inside points k 3, rows of their deepest parts -> distance to the visible surface k: the nearest of
        three candidates. None is too near, as each is visible: the minimum over the parts is zero there."""
        x = x.astype(float)
        depth = self._tree.query(x)[0]                                          # 1. a sample of the surface

        # 2. the nearest point of the deepest part's own surface, unless another part hides it
        d, n = self._slope(x, deepest)
        p = x - d[:, None] * n                                                  # k 3
        distances = self._distances(p)                                          # (parts, k)
        union = distances.min(0)
        depth = np.where(abs(union) < TOUCH, abs(d), depth)

        # 3. if another part hides it, the crease between both surfaces: the point that is nearest to x on both
        #    tangent planes, a few times. Planes n.(q - p) = -d and m.(q - p) = -e; q = x + s n + t m.
        hidden = np.flatnonzero(union < -TOUCH)
        x, p, deepest, hider = x[hidden], p[hidden], deepest[hidden], distances[:, hidden].argmin(0)
        for _ in range(4):
            (d, n), (e, m) = self._slope(p, deepest), self._slope(p, hider)
            u, v, c = ((p - x) * n).sum(1) - d, ((p - x) * m).sum(1) - e, (n * m).sum(1)
            s, t = np.stack([u - c * v, v - c * u]) / np.maximum(1 - c * c, 1e-3)
            p = x + s[:, None] * n + t[:, None] * m
        crease = np.where(abs(self._distances(p).min(0)) < TOUCH, np.linalg.norm(p - x, axis=1), np.inf)
        depth[hidden] = np.minimum(depth[hidden], crease)
        return depth

    def mesh(self, fine=False):
        """Vertices v 3, faces f 3, colours f 3; every part is closed. Low-poly: at most 256 faces. Fine: some thousand
        faces, within .003 of the shape."""
        meshes, count = [], 0
        for part, colour in zip(self.parts, self.palette):
            if fine or part.sides:
                vertices, faces = part.mesh(fine)
                meshes.append([vertices, faces + count, np.tile(colour, (len(faces), 1))])
                count, middle = count + len(vertices), part.centre
            else:
                meshes[-1][0] = part.bulge(meshes[-1][0], middle)
        return tuple(np.concatenate(arrays) for arrays in zip(*meshes))

    def field(self, x):
        """Points k 3 -> signed distance of the union k, negative inside; colour of the nearest part k 3."""
        x = np.asarray(x, np.float32)
        distances = self._distances(x)
        nearest, distance = distances.argmin(0), distances.min(0)
        # A minimum over parts is exact outside. Inside it is a bound: a second part may hide the nearest point of the
        # deepest part, but only a part that is nearer than the point is deep.
        np.put_along_axis(distances, nearest[None], np.inf, 0)
        bounded = np.flatnonzero((distance < 0) & (distance > -TRUNCATION) & (distances.min(0) < -distance))
        if len(bounded):
            depth = self._depth(x[bounded], nearest[bounded]).clip(max=TRUNCATION)
            distance[bounded] = np.minimum(distance[bounded], -depth)
        return distance, self.palette[nearest]

    def distance(self, x):
        return self.field(x)[0]
