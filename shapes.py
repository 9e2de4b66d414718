"""The built-in shapes: thirteen classes of toy furniture and vehicles, made of coloured parts.

A shape is a list of parts with closed-form signed distance, so one list gives the exact field, an
oriented coloured point cloud and captions that are true of it, all a function of (seed, index) with
nothing to download. LTM3D itself trains on ShapeNet and Objaverse; these shapes stand in for them on
a laptop: chunky enough (no part thinner than .09 in a cube of side 2) for a 64^3 grid to resolve.

y is up, x right, z towards the viewer; objects stand on their feet and face +z.

    python shapes.py        # prints a few captions of every class
"""
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.spatial import cKDTree

CLASSES = ("table", "chair", "stool", "lamp", "sofa", "shelf", "bed", "bench", "mug", "car",
           "aeroplane", "bottle", "tree")
# Every word or phrase that captions use for a class besides its own name.
SYNONYMS = {"desk": "table", "coffee table": "table", "armchair": "chair", "bar stool": "stool",
            "floor lamp": "lamp", "table lamp": "lamp", "couch": "sofa", "settee": "sofa",
            "bookcase": "shelf", "bookshelf": "shelf", "single bed": "bed", "double bed": "bed",
            "park bench": "bench", "cup": "mug", "beaker": "mug", "sedan": "car", "van": "car",
            "pickup": "car", "automobile": "car", "airplane": "aeroplane", "plane": "aeroplane",
            "jet": "aeroplane", "glider": "aeroplane", "flask": "bottle", "pine": "tree", "fir": "tree"}
COLOURS = {"red": (.80, .25, .22), "orange": (.92, .54, .22), "yellow": (.94, .78, .32),
           "green": (.36, .62, .34), "teal": (.20, .60, .60), "blue": (.26, .45, .75),
           "purple": (.52, .38, .68), "pink": (.92, .60, .66), "brown": (.52, .35, .23),
           "white": (.93, .91, .86), "grey": (.56, .58, .60), "black": (.17, .18, .21)}
NUMBERS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
TRUNCATION = .1     # inside, distances are exact down to this depth; deeper they are a bound
LONGEST = 1.8       # side of the bounding box after normalisation: room for a margin in [-1, 1]^3
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

def cone(centre, bottom, top, height, colour, radius=.03, rotation=None):
    """A frustum of outer radii `bottom` and `top`, upright unless rotated."""
    h = height / 2 - radius
    chain = np.array([(0, -h), (bottom - radius, -h), (top - radius, h), (0, h)])
    return Part("turned", np.array(centre, float), chain, radius, colour, rotation)

def cylinder(centre, r, height, colour, radius=.03, rotation=None):
    return cone(centre, r, r, height, colour, radius, rotation)

def tube(centre, r, wall, height, colour, radius=.03):
    a, b, h = r - wall + radius, r - radius, height / 2 - radius
    return Part("turned", np.array(centre, float), np.array([(a, -h), (b, -h), (b, h), (a, h), (a, -h)]), radius, colour)

def capsule(centre, r, length, colour, rotation=None):
    h = length / 2 - r
    return Part("turned", np.array(centre, float), np.array([(0, -h), (0, h)]), r, colour, rotation)

def ball(centre, r, colour):
    return capsule(centre, r, 2 * r, colour)

def rod(start, end, r, colour):
    """A capsule from one point to another: the rotation takes y to its direction."""
    start, end = np.array(start), np.array(end)
    length = np.linalg.norm(end - start)
    y = (end - start) / length
    x = np.cross(y, [0, 0, 1.]) / np.linalg.norm(np.cross(y, [0, 0, 1.]))
    return capsule((start + end) / 2, r, length + 2 * r, colour, np.stack([x, y, np.cross(x, y)], 1))

def turned_about(axis, degrees):
    """Rotation about x, y or z."""
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    m, a = np.eye(3), np.radians(degrees)
    m[[i, i, j, j], [i, j, i, j]] = np.cos(a), -np.sin(a), np.sin(a), np.cos(a)
    return m

ALONG_Z, ALONG_X = turned_about("x", 90), turned_about("z", -90)    # lay a turned part down: y to z, y to x


# --------------------------------------------------------------------------------------- shapes
@dataclass
class Shape:
    name: str               # one of CLASSES
    parts: list
    attributes: dict        # what can be seen, e.g. {"top": "round", "legs": 4, "colour": "red"}
    captions: list          # several wordings, from the bare class name to a full description

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


# ------------------------------------------------------------------------------------- classes
# Each builder draws what can be seen, then free proportions, and returns (parts, attributes, words).
# Units are near the final ones (longest side 1.8) and y starts at the ground; make() normalises.
# Parts overlap by .03 or more: a shape is one solid, not a pile of touching ones.
# words: nouns (also true of this shape), adjectives, having / lacking (noun phrases; {} = second colour).

def table(rng, u, pick, colour, second):
    top, legs, height = pick("round", "square", "rectangular"), pick(4, 4, 1), pick("low", "tall")
    w, h, t, r = 1.8, u(.6, .8) if height == "low" else u(1.1, 1.4), u(.12, .18), u(.07, .1)
    d = u(.9, 1.2) if top == "rectangular" else w
    parts = [cylinder((0, h - t / 2, 0), w / 2, t, colour) if top == "round" else
             box((0, h - t / 2, 0), (w, t, d), colour)]
    if legs == 4:
        x, z = (.56, .56) if top == "round" else (w / 2 - r - .06, d / 2 - r - .06)
        parts += [cylinder((i * x, (h - .05) / 2, j * z), r, h - .05, second) for i in (-1, 1) for j in (-1, 1)]
    else:
        parts += [cylinder((0, (h - .05) / 2, 0), u(.1, .16), h - .05, second),
                  cone((0, .08, 0), min(d, w) * u(.3, .36), .2, .16, second)]
    return parts, {"top": top, "legs": legs, "height": height}, dict(
        nouns=["desk"] * (top == "rectangular") + ["coffee table"] * (height == "low"), adjectives=[height, top],
        having=[f"a {top} top", "four {} legs" if legs == 4 else "one {} leg"])

def chair(rng, u, pick, colour, second):
    back, arms = pick("tall", "low"), pick(True, False)
    w, d, s, t, r = u(.85, 1), u(.8, .95), u(.7, .8), u(.12, .18), u(.06, .08)
    h = u(1.7, 1.85) if back == "tall" else u(1.2, 1.3)
    parts = [box((0, s - t / 2, 0), (w, t, d), colour, .04),
             box((0, (h + s - .1) / 2, .07 - d / 2), (w - .02, h - s + .1, .14), colour, .04)]
    parts += [cylinder((i * (w / 2 - .1), (s - .05) / 2, j * (d / 2 - .1)), r, s - .05, second)
              for i in (-1, 1) for j in (-1, 1)]
    if arms:
        a = s + u(.25, .32)
        for i in (-1, 1):
            parts += [box((i * (w / 2), a, -.02), (.13, .12, d - .04), second),
                      cylinder((i * (w / 2 - .02), (a + s - .08) / 2, d / 2 - .12), .06, a - s + .08, second)]
    return parts, {"back": back, "arms": arms, "legs": 4}, dict(
        nouns=["armchair"] * arms, adjectives=[], having=[f"a {back} back", "four {} legs"] + ["arms"] * arms,
        lacking=["arms"] * (not arms))

def stool(rng, u, pick, colour, second):
    seat, legs, h = pick("round", "square"), pick(3, 4), 1.8
    w, t, r, splay = u(.8, .95), u(.16, .26), u(.065, .085), u(1.0, 1.2)
    parts = [cylinder((0, h - t / 2, 0), w / 2, t, colour, .05) if seat == "round" else
             box((0, h - t / 2, 0), (w, t, w), colour, .05)]
    turns = np.arange(legs) * 2 * np.pi / legs + (np.pi / 4 if legs == 4 else np.pi / 2)
    feet = np.stack([np.cos(turns), 0 * turns, np.sin(turns)], 1) * w * (.5 if seat == "square" else .4)
    parts += [rod(f * .8 + [0, h - .15, 0], f * splay, r, second) for f in feet]
    ring = u(.45, .7)                                   # a foot rest half way up, through the legs
    at = np.linalg.norm(feet[0]) * (.8 + (splay - .8) * (1 - ring / h))
    parts += [tube((0, ring, 0), at + .05, .1, .1, second)]
    return parts, {"seat": seat, "legs": legs}, dict(
        nouns=["bar stool"], adjectives=[seat], having=[f"a {seat} seat", {3: "three {} legs", 4: "four {} legs"}[legs]])

def lamp(rng, u, pick, colour, second):
    shade, height = pick("cone", "drum"), pick("tall", "short")
    h, r = 1.8, u(.36, .44) if height == "tall" else u(.58, .68)
    tall, base = u(.45, .6) if height == "tall" else u(.65, .75), r * u(.65, .85)
    top = r * u(.4, .5) if shade == "cone" else r
    parts = [cone((0, h - tall / 2, 0), r, top, tall, colour, .04),
             cylinder((0, (h - .1) / 2, 0), u(.055, .075), h - .1, second),
             cone((0, .07, 0), base, base * .8, .14, second, .04)]
    if height == "short":                               # a table lamp stands on a round body
        body = u(.3, .36)
        parts += [ball((0, .1 + body, 0), body, second)]
    return parts, {"shade": shade, "height": height}, dict(
        nouns=["floor lamp" if height == "tall" else "table lamp"], adjectives=[height],
        having=[f"a {shade} shade", "a {} base"])

def sofa(rng, u, pick, colour, second):
    arms, cushions = pick(True, False), pick(2, 3)
    w, d, s, h, t = 1.8, u(.75, .9), u(.3, .36), u(.75, .9), u(.2, .26)
    parts = [box((0, .08 + s / 2, 0), (w - .04, s, d), colour, .05),
             box((0, .08 + h / 2, t / 2 - d / 2), (w - .02, h, t + .02), colour, .07)]
    inner = w - .04 - (2 * t if arms else 0)
    wide, deep = inner / cushions, d - t + .06
    for i in range(cushions):                           # wide - .05: a visible groove between cushions
        x = (i - (cushions - 1) / 2) * wide
        parts += [box((x, .06 + s + .08, d / 2 - deep / 2 + .02), (wide - .05, .2, deep), second, .06)]
    if arms:
        a = s + u(.2, .28)
        parts += [box((i * (w - t) / 2, .08 + a / 2, .01), (t, a, d + .02), colour, .07) for i in (-1, 1)]
    parts += [cylinder((i * (w / 2 - .16), .08, j * (d / 2 - .14)), .07, .16, "brown") for i in (-1, 1) for j in (-1, 1)]
    return parts, {"arms": arms, "cushions": cushions}, dict(
        nouns=["couch", "settee"], adjectives=[], having=[{2: "two {} cushions", 3: "three {} cushions"}[cushions]] +
        ["arms"] * arms, lacking=["arms"] * (not arms))

def shelf(rng, u, pick, colour, second):
    boards, back = pick(2, 3, 4, 5), pick(True, False)  # boards: every one, top and bottom included
    w, h, d, t, side = u(.85, 1.2), 1.8, u(.42, .6), u(.1, .13), u(.1, .13)
    foot = u(.12, .25)
    parts = [box((i * (w - side) / 2, h / 2, 0), (side, h, d), colour, .025) for i in (-1, 1)]
    parts += [box((0, y, .01), (w - side + .02, t, d - .04), second, .025) for y in np.linspace(foot, h - t / 2 - .02, boards)]
    if back:
        parts += [box((0, (h + foot) / 2 - .04, .06 - d / 2), (w - .06, h - foot, .1), colour, .025)]
    count = {2: "two", 3: "three", 4: "four", 5: "five"}[boards]
    return parts, {"boards": boards, "back": back}, dict(
        nouns=["bookcase", "bookshelf"], adjectives=[], having=[f"{count} {{}} boards"] + ["a back"] * back,
        lacking=["a back"] * (not back))

def bed(rng, u, pick, colour, second):
    size, head, foot = pick("single", "double"), pick("tall", "low"), pick(True, False)
    w, l, s = u(.8, .92) if size == "single" else u(1.25, 1.45), 1.8, u(.2, .26)
    h, white = u(.9, 1.05) if head == "tall" else u(.6, .68), pick("white", "white", "grey")
    parts = [box((0, .1 + s / 2, 0), (w, s, l - .1), colour),
             box((0, s + .14, .01), (w - .08, .2, l - .2), white, .06),
             box((0, s + .16, .22), (w - .02, .22, l - .64), second, .06),     # the blanket
             box((0, h / 2, .06 - l / 2), (w + .02, h, .13), colour, .04)]
    if foot:
        parts += [box((0, .29, l / 2 - .06), (w + .02, .58, .13), colour, .04)]
    n = 1 if size == "single" else 2
    parts += [box(((i - (n - 1) / 2) * w * .46, s + .27, .31 - l / 2), (w * (.7 if n == 1 else .4), .16, .3), white, .07)
              for i in range(n)]
    parts += [box((i * (w / 2 - .09), .08, j * (l / 2 - .13)), (.15, .16, .15), colour) for i in (-1, 1) for j in (-1, 1)]
    return parts, {"size": size, "headboard": head, "footboard": foot, "pillows": n}, dict(
        nouns=[f"{size} bed"], adjectives=[size],
        having=[f"a {head} headboard", "one pillow" if n == 1 else "two pillows", "a {} blanket"] +
        ["a footboard"] * foot, lacking=["a footboard"] * (not foot))

def bench(rng, u, pick, colour, second):
    slats, legs = pick(1, 2, 3), pick(4, 2)
    w, d, s, t = 1.8, u(.46, .58), u(.44, .52), u(.1, .13)
    h, x = s + .06 + .2 * slats, w / 2 - u(.15, .25)
    parts = [box((0, s - t / 2, 0), (w, t, d), colour)]
    for i in (-1, 1):
        parts += [box((i * x, h / 2, .05 - d / 2), (.12, h - .03, .12), second)]        # post behind the slats
        parts += ([box((i * x, (s - .04) / 2, j * (d / 2 - .07)), (.12, s - .04, .12), second) for j in (-1, 1)] if legs == 4
                  else [box((i * x, (s - .04) / 2, 0), (.13, s - .04, d - .08), second)])
    parts += [box((0, s + .16 + .2 * i, .1 - d / 2), (w, .12, .1), colour) for i in range(slats)]
    return parts, {"slats": slats, "legs": legs}, dict(
        nouns=["park bench"], adjectives=[], having=[{1: "a back of one slat", 2: "a back of two slats", 3: "a back of three slats"}[slats],
                                         "four {} legs" if legs == 4 else "two wide {} legs"])

def mug(rng, u, pick, colour, second):
    height, handle, stripe = pick("tall", "wide"), pick(True, False), pick(True, False)
    h, r, wall = (1.8, u(.52, .6), .12) if height == "tall" else (u(1.05, 1.2), u(.62, .68), .12)
    parts = [tube((0, h / 2, 0), r, wall, h, colour, .045), cylinder((0, .08, 0), r - .04, .15, colour)]
    if handle:
        ring, thick, turns = h * u(.24, .32), u(.065, .08), np.linspace(-1.5, 1.5, 8)    # an arc of seven rods
        arc = np.stack([r - .05 + .85 * ring * np.cos(turns), h / 2 + ring * np.sin(turns), 0 * turns], 1)
        parts += [rod(a, b, thick, colour) for a, b in zip(arc[:-1], arc[1:])]
    if stripe:
        parts += [tube((0, h * u(.25, .75), 0), r + .03, .12, h * u(.14, .2), second)]
    return parts, {"shape": height, "handle": handle, "stripe": stripe}, dict(
        nouns=["cup"] if handle else ["cup", "beaker"], adjectives=[height], having=["a handle"] * handle + ["a {} stripe"] * stripe,
        lacking=["a handle"] * (not handle))

def car(rng, u, pick, colour, second):
    kind, glass = pick("sedan", "van", "pickup"), "white" if colour == "black" else "black"
    l, w, r, b = 1.8, u(.74, .84), u(.17, .2), u(.28, .32)
    floor = r * .75
    parts = [box((0, floor + b / 2, 0), (w, b, l), colour, .08)]
    # the cabin: (centre along z, length, height); the glass is a block that the roof and body enclose
    z, length, tall = {"sedan": (-.1, u(.8, .95), u(.28, .34)), "van": (-.16, u(1.36, 1.42), u(.46, .54)),
                       "pickup": (.16, u(.52, .6), u(.34, .4))}[kind]
    top = floor + b + tall
    parts += [box((0, top - tall / 2 - .08, z), (w - .1, tall + .06, length), glass, .06),
              box((0, top - .06, z), (w - .04, .13, length + .02), colour, .05)]
    if kind == "pickup":                                # the walls of the load bed
        tail, back = z - length / 2, -l / 2
        parts += [box((i * (w / 2 - .06), floor + b + .04, (tail + back) / 2 + .02), (.12, .22, tail - back), colour) for i in (-1, 1)]
        parts += [box((0, floor + b + .04, back + .08), (w, .22, .12), colour)]
    parts += [cylinder((i * (w / 2 - .05), r, j * .52), r, .18, "black", .04, ALONG_X) for i in (-1, 1) for j in (-1, 1)]
    parts += [ball((i * (w / 2 - .16), floor + b * .6, l / 2 - .02), .075, "yellow") for i in (-1, 1)]
    return parts, {"kind": kind, "wheels": 4}, dict(nouns=[kind, "automobile"], adjectives=[], having=["four wheels"])

def aeroplane(rng, u, pick, colour, second):
    wings, engines = pick("straight", "swept"), pick(0, 2, 4)
    l, r, span, chord = 1.8, u(.17, .22), u(.78, .9), u(.26, .34)
    glass = "white" if colour == "black" else "black"
    parts = [capsule((0, 0, 0), r, l, colour, ALONG_Z), ball((0, r - .07, .52), .13, glass)]
    sweep = u(24, 32) if wings == "swept" else 0
    for i in (-1, 1):
        turn = turned_about("y", i * sweep)
        mid = turn @ np.array([i * span / 2, 0, 0])
        parts += [box(mid + [0, -.03, .12], (span, .1, chord), second, .045, turn),
                  box(turn @ np.array([i * .2, 0, 0]) + [0, .05, -l / 2 + .16], (.4, .1, .2), second, .045, turn)]
        for along in {0: [], 2: [.45], 4: [.36, .72]}[engines]:
            at = turn @ np.array([i * span * along, 0, chord * .35]) + [0, -.12, .12]
            parts += [capsule(at, .085, u(.34, .4), colour, ALONG_Z)]
    parts += [box((0, r + .1, -l / 2 + .15), (.1, .4, .24), second, .045, turned_about("x", -20))]
    none = [] if engines else ["engines"]
    return parts, {"wings": wings, "engines": engines}, dict(
        nouns=["airplane", "plane", "jet" if engines else "glider"], adjectives=[],
        having=[wings + " {} wings"] + {0: [], 2: ["two engines"], 4: ["four engines"]}[engines], lacking=none)

def bottle(rng, u, pick, colour, second):
    body, label = pick("slim", "wide"), pick(True, False)
    shoulder, cap = pick("round", "sloping"), u(.14, .2)
    h, r, n = 1.8, u(.25, .29) if body == "slim" else u(.4, .46), u(.1, .13)
    b = u(.85, 1.0)
    parts = [cylinder((0, b / 2, 0), r, b, colour, .06), cylinder((0, (b + h) / 2 - .15, 0), n, h - b + .18, colour)]
    if shoulder == "round":
        parts += [ball((0, b - .06, 0), r, colour)]
    else:
        parts += [cone((0, b + .12, 0), r, n + .02, .4, colour)]
    parts += [cylinder((0, h - cap / 2, 0), n + .05, cap, second)]
    if label:
        parts += [cylinder((0, b * .48, 0), r + .03, b * u(.4, .55), pick("white", "yellow", "pink"))]
    return parts, {"body": body, "shoulder": shoulder, "label": label}, dict(
        nouns=["flask"], adjectives=[body], having=["a {} cap", f"a {shoulder} shoulder"] + ["a label"] * label, lacking=["a label"] * (not label))

def tree(rng, u, pick, colour, second):
    crown = pick("round", "cone")
    leaf, r, h, trunk = pick("green", "green", "teal", "orange", "yellow", "pink", "red"), u(.09, .13), 1.8, u(.4, .6)
    w = u(.5, .62)
    trunk = trunk if crown == "cone" else h - 2 * w
    parts = [cylinder((0, (trunk + .3) / 2, 0), r, trunk + .3, "brown")]
    layers = 0
    if crown == "round":
        parts += [ball((0, h - w, 0), w, leaf)]
        for a in np.arange(3) * 2 * np.pi / 3 + u(0, 2):
            parts += [ball((.55 * w * np.cos(a), h - w * u(1.1, 1.45), .55 * w * np.sin(a)), w * u(.6, .72), leaf)]
    else:
        layers = pick(2, 3)
        each = (h - trunk) / layers
        for i in range(layers):
            wide, tall = w * (1 - .22 * i), each * (1.35 if i < layers - 1 else 1)
            parts += [cone((0, trunk + i * each + tall / 2, 0), wide, .06 if i == layers - 1 else wide * .35, tall, leaf, .05)]
    return parts, {"crown": crown, "layers": layers, "colour": leaf}, dict(
        nouns=["pine", "fir"] if layers else [], adjectives=[],
        having=[f"a {crown} crown", "a brown trunk"] + {0: [], 2: ["two layers"], 3: ["three layers"]}[layers])


# ------------------------------------------------------------------------------------ captions
def article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase

def listed(items):
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)

def write_captions(rng, name, attributes, words):
    """From the bare class name to everything that can be seen. Each is true of the shape; the draws
    differ from shape to shape, so that over a data set every attribute is met alone and in company."""
    colour, second = attributes["colour"], attributes.get("second", "")
    plain = [h.replace("{} ", "") for h in words["having"]]
    full = [h.format(second) for h in words["having"]]
    lacking = words.get("lacking", [])
    details = [f"with {p}" for p in plain] + [f"without {p}" for p in lacking]
    noun = str(rng.choice(words["nouns"] + [name]))
    # "double bed" needs no second "double", nor "a table with a round top" a second "round"
    adjectives = [a for a in words["adjectives"] if a not in noun + listed(full)]
    everything = article(" ".join(adjectives + [colour, noun])) + " with " + listed(full)
    everything += " without " + listed(lacking) if lacking else ""
    detail, other = (str(d) for d in rng.choice(details, 2))
    lines = [name, article(name), article(noun), article(f"{colour} {noun}"),
             f"{article(name)} {detail}", f"{article(f'{colour} {name}')} {other}", everything,
             f"a 3d model of {article(name)}, in the style of {everything}"]
    if words["adjectives"]:
        lines.append(article(f"{rng.choice(words['adjectives'])} {name}"))
    digits = " ".join(NUMBERS.get(w, w) for w in lines[4].split())
    return list(dict.fromkeys(lines + [digits]))        # without doubles


# ---------------------------------------------------------------------------------------- make
def make(seed, index):
    """The shape number `index` of the endless set `seed`; classes take turns."""
    rng = np.random.default_rng((seed, index))
    name = CLASSES[index % len(CLASSES)]
    pick = lambda *options: options[rng.integers(len(options))]
    colour, second = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
    parts, attributes, words = globals()[name](rng, rng.uniform, pick, colour, second)
    attributes = {"colour": colour} | attributes
    if any("{}" in h for h in words["having"]):
        attributes["second"] = second
    corners = np.stack([p.bounds() for p in parts])                             # (parts, 2, 3)
    low, high = corners[:, 0].min(0), corners[:, 1].max(0)
    scale = LONGEST / float((high - low).max())
    for p in parts:
        p.centre, p.size, p.radius = (p.centre - (low + high) / 2) * scale, p.size * scale, p.radius * scale
    return Shape(name, parts, attributes, write_captions(rng, name, attributes, words))


if __name__ == "__main__":
    for index in range(2 * len(CLASSES)):
        shape = make(0, index)
        print(f"\n{shape.name}, {len(shape.parts)} parts, {shape.attributes}")
        print("".join(f"    {c}\n" for c in shape.captions), end="")
