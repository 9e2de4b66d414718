"""geometry/solids.py - coloured parts with closed-form distance -> signed distance, surface points, colours.

A shape is a list of rounded parts. One list gives the exact field of their union and a coloured,
oriented point cloud of its visible surface, with nothing to download: what geometry/shapes.py builds from.

y is up, x right, z towards the viewer.

    python data.py        # draws shapes made of these parts
"""
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.spatial import cKDTree

from geometry.surface import TRUNCATION

COLOURS = {"red": (.80, .25, .22), "orange": (.92, .54, .22), "yellow": (.94, .78, .32),
           "green": (.36, .62, .34), "teal": (.20, .60, .60), "blue": (.26, .45, .75),
           "purple": (.52, .38, .68), "pink": (.92, .60, .66), "brown": (.52, .35, .23),
           "white": (.93, .91, .86), "grey": (.56, .58, .60), "black": (.17, .18, .21)}
POOL = 16384        # surface samples behind the depth where parts overlap: some .02 apart


# ---------------------------------------------------------------------------------------- parts
@dataclass
class Part:
    """A core blown up by `radius`, which rounds its edges. Two kinds are enough:

    box     the core is a box; size = its half sides (3,)
    turned  the core is turned on a lathe about its y axis; size = the convex profile, a chain of
            points (radius, height) from bottom to top, counter-clockwise. It starts and ends on the
            axis (cylinder, cone, capsule, ball) or closes on itself (tube)
    """
    kind: str
    centre: np.ndarray                      # (3,)
    size: np.ndarray
    radius: float
    colour: str
    rotation: np.ndarray | None = None      # (3, 3), part to world: x = centre + rotation @ local
    sides: int = 6                          # of the polygon that stands for a circle in a low-poly mesh; 0: a ball
                                            # that has none of its own, the part before it bulges instead

    def distance(self, x):                  # (k, 3) -> (k,)
        x = x - self.centre.astype(x.dtype)
        x, y, z = (x if self.rotation is None else x @ self.rotation.astype(x.dtype)).T
        if self.kind == "box":
            q = [abs(c) - h for c, h in zip((x, y, z), self.size.tolist())]
            out = sum(np.square(np.maximum(c, 0)) for c in q)
            return np.sqrt(out) + np.minimum(np.maximum(np.maximum(*q[:2]), q[2]), 0) - self.radius
        # turned: a polygon in (rho, y). Outside, the nearest edge; inside a convex core, the nearest line.
        rho, near, line = np.sqrt(x * x + z * z), np.inf, -np.inf
        chain = self.size.tolist()
        for (a, b), (c, d) in zip(chain[:-1], chain[1:]):
            u, v, length = c - a, d - b, max(np.hypot(c - a, d - b), 1e-9)
            p, q = rho - a, y - b
            t = np.clip((p * u + q * v) / length ** 2, 0, 1)
            near = np.minimum(near, np.square(p - t * u) + np.square(q - t * v))
            line = np.maximum(line, (p * v - q * u) / length)
        return np.where(line < 0, line, np.sqrt(near)) - self.radius

    @cached_property
    def outline(self):
        """The rounded profile as rows (core rho, core y, angle of the normal): between two rows either
        the core point moves (a straight edge) or the angle turns (a rounded corner)."""
        chain = self.size
        step = np.diff(chain, axis=0)
        angle = np.unwrap(np.arctan2(-step[:, 0], step[:, 1]))
        closed = chain[0, 0] > 0 and (chain[0] == chain[-1]).all()
        angle = np.concatenate([[angle[-1] - 2 * np.pi if closed else -np.pi / 2], angle,
                                [angle[-1] if closed else np.pi / 2]])
        rows = np.concatenate([np.c_[np.tile(p, (9, 1)), np.linspace(a, b, 9)]
                               for p, a, b in zip(chain, angle[:-1], angle[1:])])     # (m, 3)
        rho = rows[:, 0] + self.radius * np.cos(rows[:, 2])
        length = np.hypot(*np.diff(rows[:, :2], axis=0).T) + self.radius * np.diff(rows[:, 2])
        return rows, rho.clip(0), np.pi * length * (rho[:-1] + rho[1:]).clip(0)  # the last: areas

    @cached_property
    def patches(self):
        """A box's surface by kind of patch: 3 pairs of faces, 3 bundles of edges, the corners; for each
        the axes its normals span, and its area."""
        h, r = self.size, self.radius
        faces = 8 * h[[1, 2, 0]] * h[[2, 0, 1]]
        return (np.concatenate([np.eye(3), 1 - np.eye(3), np.ones((1, 3))]),
                np.concatenate([faces, 4 * np.pi * r * h, [4 * np.pi * r * r]]))

    @property
    def area(self):
        return (self.patches[1] if self.kind == "box" else self.outline[2]).sum()

    def surface(self, k, rng):
        """k points uniform by area, and normals."""
        if self.kind == "box":
            axes, area = self.patches
            normal = rng.standard_normal((k, 3)) * axes[rng.choice(7, k, p=area / area.sum())]
            normal /= np.linalg.norm(normal, axis=1, keepdims=True)
            core = np.where(normal != 0, np.sign(normal), rng.uniform(-1, 1, (k, 3))) * self.size
        else:
            rows, rho, area = self.outline
            i = rng.choice(len(area), k, p=area / area.sum())
            a, b, u = rho[i], rho[i + 1], rng.random(k)
            t = u * (a + b) / (a + np.sqrt(a * a + u * (b * b - a * a)) + 1e-12)    # density ~ rho
            c, y, angle = (rows[i] + t[:, None] * (rows[i + 1] - rows[i])).T
            turn = rng.uniform(0, 2 * np.pi, k)
            cos, sin = np.cos(turn), np.sin(turn)
            normal = np.stack([np.cos(angle) * cos, np.sin(angle), np.cos(angle) * sin], 1)
            core = np.stack([c * cos, y, c * sin], 1)
        x = core + self.radius * normal
        if self.rotation is not None:
            x, normal = x @ self.rotation.T, normal @ self.rotation.T
        return x + self.centre, normal                                          # (k, 3), (k, 3)

    def mesh(self, fine):
        """Vertices v 3, faces f 3, outward and closed. Unless fine, rounded edges are sharp and circles have few sides."""
        x, faces = self._box_mesh(fine) if self.kind == "box" else self._turned_mesh(fine)
        return (x if self.rotation is None else x @ self.rotation.T) + self.centre, faces

    def bulge(self, x, middle):
        """Low-poly vertices x, moved straight away from `middle` to this ball, where it is farther."""
        reach, u = np.linalg.norm(x - middle, axis=1), self.centre - middle
        d = (x - middle) / reach[:, None]
        square = (1.05 * self.radius) ** 2 + (d @ u) ** 2 - u @ u                       # flat faces cut corners: 1.05
        far = np.where(square > 0, d @ u + np.sqrt(square.clip(0)), 0)
        return x + (far - reach).clip(0)[:, None] * d

    def _box_mesh(self, fine):
        """Six grids, whose rims, which lie beyond the core, are pulled onto the rounded edges."""
        h, r = self.size, self.radius
        rim = r * np.tan(np.linspace(0, np.pi / 4, 4)) if fine else np.array([r])
        line = h[:, None] + rim                                                         # 3 m: where lines cross each axis
        line = np.concatenate([-line[:, ::-1], line], 1)                                # 3 l
        l, x, faces = line.shape[1], [], []
        for axis in range(3):
            u, v = (axis + 1) % 3, (axis + 2) % 3                                       # u x v = axis
            i, j = (c.ravel() for c in np.meshgrid(np.arange(l - 1), np.arange(l - 1), indexing="ij"))
            quads = np.stack([i * l + j, (i + 1) * l + j, (i + 1) * l + j + 1, i * l + j + 1], -1)
            for sign in (-1, 1):
                p = np.empty((l, l, 3))
                p[..., axis], p[..., u], p[..., v] = sign * (h + r)[axis], line[u][:, None], line[v]
                faces.append(len(x) * l * l + quads[:, [0, 1, 2, 0, 2, 3]].reshape(-1, 3)[:, ::sign])
                x.append(p.reshape(-1, 3))
        x, faces = np.concatenate(x), np.concatenate(faces)
        if fine:
            core = x.clip(-h, h)
            x = core + r * (x - core) / np.linalg.norm(x - core, axis=1, keepdims=True)
        x, place = np.unique(x.round(12), axis=0, return_inverse=True)                  # the grids share their edges
        return x, place.reshape(-1)[faces]

    def _turned_mesh(self, fine):
        """Rings of vertices, one for each corner of the profile; more where it is rounded, of a ball also in few faces."""
        chain, closed = self.size, self.size[0, 0] > 0
        many = (48 if self.radius > .2 else 24) if fine else self.sides if len(chain) == 2 else 0      # of a circle in profile
        step = np.diff(chain, axis=0)
        angle = np.unwrap(np.arctan2(-step[:, 0], step[:, 1]))                          # of the normals of the straight edges
        before = np.append(angle[-1] - 2 * np.pi if closed else -np.pi / 2, angle)
        after = np.append(angle, np.pi / 2)
        rings = []
        for p, a, b in list(zip(chain, before, after))[:len(chain) - closed]:
            k = max(1, round(.14 * many * (b - a))) if b > a + 1e-6 else 0
            turn = a + (b - a) * (np.arange(k) + .5) / max(k, 1)                        # tangents meet half way between them
            reach = self.radius / np.cos((b - a) / max(2 * k, 1))
            rings += [p + reach * np.array([np.cos(t), np.sin(t)]) for t in turn]
        rings = np.array(rings)                                                         # m 2: radius, height
        n = (48 if rings[:, 0].max() > .2 else 24) if fine else self.sides
        turn = (np.arange(n) + .5) * 2 * np.pi / n
        polygon = np.stack([np.sin(turn), 0 * turn, np.cos(turn)], 1) * 2 / (1 + np.cos(np.pi / n))    # as far outside as inside
        x = (rings[:, :1, None] * polygon + rings[:, 1:, None] * np.array([0, 1, 0])).reshape(-1, 3)
        i, j = np.meshgrid(np.arange(len(rings) - (not closed)), np.arange(n), indexing="ij")
        a, b, k = i * n, (i + 1) % len(rings) * n, (j + 1) % n                          # the ring below and the one above
        faces = [np.stack([a + j, a + k, b + k], -1), np.stack([a + j, b + k, b + j], -1)]
        if not closed:                                                                  # a flat cap at each end
            fan = np.stack([np.zeros(n - 2, int), np.arange(1, n - 1), np.arange(2, n)], -1)
            faces += [fan[:, ::-1], fan + (len(rings) - 1) * n]
        return x, np.concatenate([f.reshape(-1, 3) for f in faces])

    def bounds(self):
        """Exact bounding box (2, 3): how far the core reaches along each world axis, plus the radius."""
        axes = np.eye(3) if self.rotation is None else self.rotation            # row i: world axis i
        if self.kind == "box":
            high = abs(axes) @ self.size
            low = -high
        else:
            flat = np.hypot(axes[:, :1], axes[:, 2:]) * self.size[:, 0]         # (3, n)
            tall = axes[:, 1:2] * self.size[:, 1]
            low, high = (tall - flat).min(1), (tall + flat).max(1)
        return self.centre + np.stack([low - self.radius, high + self.radius])


def box(centre, sides, colour, radius=.03, rotation=None):
    return Part("box", np.array(centre, float), np.array(sides) / 2 - radius, radius, colour, rotation)

def cone(centre, bottom, top, height, colour, radius=.03, rotation=None, sides=6):
    """A frustum of outer radii `bottom` and `top`, upright unless rotated."""
    h = height / 2 - radius
    chain = np.array([(0, -h), (bottom - radius, -h), (top - radius, h), (0, h)])
    return Part("turned", np.array(centre, float), chain, radius, colour, rotation, sides)

def cylinder(centre, r, height, colour, radius=.03, rotation=None, sides=6):
    return cone(centre, r, r, height, colour, radius, rotation, sides)

def tube(centre, r, wall, height, colour, radius=.03, sides=12):
    a, b, h = r - wall + radius, r - radius, height / 2 - radius
    return Part("turned", np.array(centre, float), np.array([(a, -h), (b, -h), (b, h), (a, h), (a, -h)]), radius, colour, None, sides)

def capsule(centre, r, length, colour, rotation=None, sides=6):
    h = length / 2 - r
    return Part("turned", np.array(centre, float), np.array([(0, -h), (0, h)]), r, colour, rotation, sides)

def ball(centre, r, colour, sides=6):
    return capsule(centre, r, 2 * r, colour, None, sides)

def rod(start, end, r, colour, sides=6):
    """A capsule from one point to another: the rotation takes y to its direction."""
    start, end = np.array(start), np.array(end)
    length = np.linalg.norm(end - start)
    y = (end - start) / length
    x = np.cross(y, [0, 0, 1.]) / np.linalg.norm(np.cross(y, [0, 0, 1.]))
    return capsule((start + end) / 2, r, length + 2 * r, colour, np.stack([x, y, np.cross(x, y)], 1), sides)

def turned_about(axis, degrees):
    """Rotation about x, y or z."""
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    m, a = np.eye(3), np.radians(degrees)
    m[[i, i, j, j], [i, j, i, j]] = np.cos(a), -np.sin(a), np.sin(a), np.cos(a)
    return m


# --------------------------------------------------------------------------------------- shapes
@dataclass
class Shape:
    name: str               # one of CLASSES
    parts: list
    attributes: dict        # what can be seen, e.g. {"top": "round", "legs": 4, "colour": "red"}
    captions: list          # several wordings, from the bare class name to a full description
    icon = None             # no picture came with it

    @cached_property
    def palette(self):
        return np.array([COLOURS[p.colour] for p in self.parts], np.float32)    # (parts, 3)

    def _sample(self, k, rng):
        """About k points uniform over the parts, of which those inside another part are dropped."""
        area = np.array([p.area for p in self.parts])
        drawn = [p.surface(n, rng) for p, n in zip(self.parts, rng.multinomial(k, area / area.sum()))]
        x, normal = (np.concatenate(c).astype(np.float32) for c in zip(*drawn))
        owner = np.repeat(np.arange(len(self.parts)), [len(p) for p, _ in drawn])
        seen = np.ones(len(x), bool)
        for i, part in enumerate(self.parts):       # only points in a part's bounding box can be inside it
            low, high = part.bounds().astype(np.float32)
            near = np.flatnonzero(((x > low) & (x < high)).all(1) & (owner != i) & seen)
            seen[near] = part.distance(x[near]) > -1e-6
        return x[seen], normal[seen], owner[seen]

    def surface(self, k, rng):
        """k points uniform by area over the visible surface: points, normals, colours, (k, 3) each."""
        kept, n = [], 0
        while n < k:
            kept.append(self._sample(int(1.4 * (k - n)) + 64, rng))
            n += len(kept[-1][0])
        x, normal, owner = (np.concatenate(c) for c in zip(*kept))
        chosen = rng.permutation(n)[:k]             # the draw comes sorted by part
        return x[chosen], normal[chosen], self.palette[owner[chosen]]

    @cached_property
    def _tree(self):
        return cKDTree(self._sample(POOL, np.random.default_rng(0))[0])

    def _each(self, x):                             # (k, 3) -> (parts, k)
        return np.stack([p.distance(x) for p in self.parts])

    def _slope(self, x, part):
        """Distance (k,) from each point to its own part, and the gradient (k, 3) by differences."""
        d = np.empty((len(x), 4))
        for i in np.unique(part):
            moved = x[part == i][:, None] + 1e-5 * np.eye(4, 3, -1)             # itself, then along x, y, z
            d[part == i] = self.parts[i].distance(moved.reshape(-1, 3)).reshape(-1, 4)
        return d[:, 0], (d[:, 1:] - d[:, :1]) / 1e-5

    def _depth(self, x, deepest):
        """Distance (k,) from inside points to the visible surface: the nearest of three candidates.
        A point where the minimum over the parts is zero is visible, so no candidate is too near."""
        x = x.astype(float)
        depth = self._tree.query(x)[0]                                          # 1. a sample
        d, n = self._slope(x, deepest)
        p = x - d[:, None] * n                                                  # 2. the deepest part's surface
        each = self._each(p)
        depth = np.where(abs(each.min(0)) < 3e-4, abs(d), depth)
        # 3. where another part hides that: the crease of the two surfaces, the point nearest to x on both
        #    tangent planes, a few times. Planes n.(q - p) = -d and m.(q - p) = -e; q = x + s n + t m.
        k = np.flatnonzero(each.min(0) < -3e-4)
        x, p, deepest, hider = x[k], p[k], deepest[k], each[:, k].argmin(0)
        for _ in range(4):
            (d, n), (e, m) = self._slope(p, deepest), self._slope(p, hider)
            u, v, c = ((p - x) * n).sum(1) - d, ((p - x) * m).sum(1) - e, (n * m).sum(1)
            s, t = np.stack([u - c * v, v - c * u]) / np.maximum(1 - c * c, 1e-3)
            p = x + s[:, None] * n + t[:, None] * m
        crease = np.where(abs(self._each(p).min(0)) < 3e-4, np.linalg.norm(p - x, axis=1), np.inf)
        depth[k] = np.minimum(depth[k], crease)
        return depth

    def mesh(self, fine=False):
        """Vertices v 3, faces f 3, colours f 3, every part closed: low-poly, at most 256 faces, or fine, some thousand
        and within .003 of the shape."""
        xs, faces, colours, first = [], [], [], 0
        for part, colour in zip(self.parts, self.palette):
            if fine or part.sides:
                x, f = part.mesh(fine)
                xs, faces, colours = xs + [x], faces + [f + first], colours + [np.tile(colour, (len(f), 1))]
                first, middle = first + len(x), part.centre
            else:
                xs[-1] = part.bulge(xs[-1], middle)
        return np.concatenate(xs), np.concatenate(faces), np.concatenate(colours)

    def field(self, x):
        """Signed distance of the union (k,), negative inside, and the nearest part's colour (k, 3)."""
        x = np.asarray(x, np.float32)
        each = self._each(x)
        nearest = each.argmin(0)
        first = each.min(0)
        # A minimum over parts is exact outside. Inside it is a bound: the nearest point of the deepest
        # part may be hidden in a second one - but only in one that is nearer than the point is deep.
        np.put_along_axis(each, nearest[None], np.inf, 0)
        doubt = np.flatnonzero((first < 0) & (first > -TRUNCATION) & (each.min(0) < -first))
        if len(doubt):
            depth = self._depth(x[doubt], nearest[doubt]).clip(max=TRUNCATION)
            first[doubt] = np.minimum(first[doubt], -depth)
        return first, self.palette[nearest]

    def distance(self, x):
        return self.field(x)[0]
