"""shapes.py - the built-in shapes: thirteen classes of toys, from tables to trees, made of coloured parts.

A shape is a list of parts with closed-form signed distance. The list gives the exact field, a coloured point cloud and
true captions, as a function of (seed, index), with nothing to download. LTM3D itself trains on ShapeNet and Objaverse;
these shapes stand in for them on a laptop. No part is thinner than .09 in a cube of side 2: a grid of 64^3 resolves it.
y is up, x right, z towards the viewer, whom a shape faces.
"""
import numpy as np

from geometry.captions import write_captions
from geometry.solids import Shape, ball, box, capsule, cone, cylinder, rod, rotation_about, tube
from geometry.words import COLOURS

LONGEST = 1.8       # side of the bounding box after normalisation: room for a margin in [-1, 1]^3
ALONG_Z, ALONG_X = rotation_about("x", 90), rotation_about("z", -90)    # lay a round part down: y to z, y to x
LEAVES = "green", "green", "teal", "orange", "yellow", "pink", "red"    # colours of crowns; green is the most common
COUNTS = ("no", "one", "two", "three", "four", "five")


# ------------------------------------------------------------------------------------- classes
# A builder draws attributes and proportions. It returns parts, attributes and phrases for captions.
# u(a, b) is a random number from a to b, pick(...) one of its arguments. Mostly w, h, d are the width, height, depth of
# the whole shape, s the height of a seat, t a thickness, r a radius. The ground is y = 0; make() scales all to LONGEST.
# Parts overlap by .03 or more: a shape is one solid, not a pile of parts that touch. Its low-poly mesh has at most 256
# faces: `sides` of round parts decide that, and geometry/test_shapes.py tells.
# phrases: nouns (other names of the shape), adjectives, having, lacking (what it has and has not; {} = second colour);
# none of them has to be there. If most of the surface is not of `colour`, the attribute "colour" names its colour.
# A new class goes into BUILDERS, at the end of the list: `python data.py --classes CLASS --shapes 32` draws it.

def corners(x, z):
    return [(i * x, j * z) for i in (-1, 1) for j in (-1, 1)]

def table(u, pick, colour, second):
    top, legs, height = pick("round", "square", "rectangular"), pick(4, 4, 1), pick("low", "tall")
    w, h = 1.8, u(.6, .8) if height == "low" else u(1.1, 1.4)
    t, r = u(.12, .18), u(.07, .1)
    d = u(.9, 1.2) if top == "rectangular" else w
    parts = [cylinder((0, h - t / 2, 0), w / 2, t, colour, sides=16) if top == "round" else
             box((0, h - t / 2, 0), (w, t, d), colour)]
    if legs == 4:
        places = corners(.56, .56) if top == "round" else corners(w / 2 - r - .06, d / 2 - r - .06)
        parts += [cylinder((x, (h - .05) / 2, z), r, h - .05, second) for x, z in places]
    else:
        parts += [cylinder((0, (h - .05) / 2, 0), u(.1, .16), h - .05, second, sides=8),
                  cone((0, .08, 0), min(d, w) * u(.3, .36), .2, .16, second, sides=12)]
    return parts, {"top": top, "legs": legs, "height": height}, dict(
        nouns=["desk"] * (top == "rectangular") + ["coffee table"] * (height == "low"), adjectives=[height, top],
        having=[f"a {top} top", "four {} legs" if legs == 4 else "one {} leg"])

def chair(u, pick, colour, second):
    back, arms = pick("tall", "low"), pick(True, False)
    w, d, s, t, r = u(.85, 1), u(.8, .95), u(.7, .8), u(.12, .18), u(.06, .08)
    h = u(1.7, 1.85) if back == "tall" else u(1.2, 1.3)
    parts = [box((0, s - t / 2, 0), (w, t, d), colour, .04),
             box((0, (h + s - .1) / 2, .07 - d / 2), (w - .02, h - s + .1, .14), colour, .04)]
    parts += [cylinder((x, (s - .05) / 2, z), r, s - .05, second) for x, z in corners(w / 2 - .1, d / 2 - .1)]
    if arms:
        y = s + u(.25, .32)
        for i in (-1, 1):
            parts += [box((i * (w / 2), y, -.02), (.13, .12, d - .04), second),
                      cylinder((i * (w / 2 - .02), (y + s - .08) / 2, d / 2 - .12), .06, y - s + .08, second)]
    return parts, {"back": back, "arms": arms, "legs": 4}, dict(nouns=["armchair"] * arms,
        having=[f"a {back} back", "four {} legs"] + ["arms"] * arms, lacking=["arms"] * (not arms))

def stool(u, pick, colour, second):
    seat, legs = pick("round", "square"), pick(3, 4)
    w, h, t, r, splay = u(.8, .95), 1.8, u(.16, .26), u(.065, .085), u(1.0, 1.2)
    parts = [cylinder((0, h - t / 2, 0), w / 2, t, colour, .05, sides=12) if seat == "round" else
             box((0, h - t / 2, 0), (w, t, w), colour, .05)]
    turns = np.arange(legs) * 2 * np.pi / legs + (np.pi / 4 if legs == 4 else np.pi / 2)
    feet = np.stack([np.cos(turns), 0 * turns, np.sin(turns)], 1) * w * (.5 if seat == "square" else .4)
    parts += [rod(foot * .8 + [0, h - .15, 0], foot * splay, r, second) for foot in feet]
    y = u(.45, .7)                                      # a foot rest, through the legs
    reach = np.linalg.norm(feet[0]) * (.8 + (splay - .8) * (1 - y / h))
    parts += [tube((0, y, 0), reach + .05, .1, .1, second)]
    return parts, {"seat": seat, "legs": legs}, dict(
        nouns=["bar stool"], adjectives=[seat], having=[f"a {seat} seat", COUNTS[legs] + " {} legs"])

def lamp(u, pick, colour, second):
    shade, height = pick("cone", "drum"), pick("tall", "short")
    h, r = 1.8, u(.36, .44) if height == "tall" else u(.58, .68)
    shade_height = u(.45, .6) if height == "tall" else u(.65, .75)
    base = r * u(.65, .85)
    top = r * u(.4, .5) if shade == "cone" else r
    parts = [cone((0, h - shade_height / 2, 0), r, top, shade_height, colour, .04, sides=12),
             cylinder((0, (h - .1) / 2, 0), u(.055, .075), h - .1, second),
             cone((0, .07, 0), base, base * .8, .14, second, .04, sides=12)]
    if height == "short":                               # a table lamp stands on a round body
        body = u(.3, .36)
        parts += [ball((0, .1 + body, 0), body, second, sides=10)]
    return parts, {"shade": shade, "height": height}, dict(
        nouns=["floor lamp" if height == "tall" else "table lamp"], adjectives=[height],
        having=[f"a {shade} shade", "a {} base"])

def sofa(u, pick, colour, second):
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
        y = s + u(.2, .28)
        parts += [box((i * (w - t) / 2, .08 + y / 2, .01), (t, y, d + .02), colour, .07) for i in (-1, 1)]
    parts += [cylinder((x, .08, z), .07, .16, "brown") for x, z in corners(w / 2 - .16, d / 2 - .14)]
    return parts, {"arms": arms, "cushions": cushions}, dict(nouns=["couch", "settee"],
        having=[COUNTS[cushions] + " {} cushions"] + ["arms"] * arms, lacking=["arms"] * (not arms))

def shelf(u, pick, colour, second):
    boards, back = pick(2, 3, 4, 5), pick(True, False)  # boards: top and bottom included
    w, h, d = u(.85, 1.2), 1.8, u(.42, .6)
    t, side, foot = u(.1, .13), u(.1, .13), u(.12, .25)
    parts = [box((i * (w - side) / 2, h / 2, 0), (side, h, d), colour, .025) for i in (-1, 1)]
    parts += [box((0, y, .01), (w - side + .02, t, d - .04), second, .025)
              for y in np.linspace(foot, h - t / 2 - .02, boards)]
    if back:
        parts += [box((0, (h + foot) / 2 - .04, .06 - d / 2), (w - .06, h - foot, .1), colour, .025)]
    return parts, {"boards": boards, "back": back}, dict(nouns=["bookcase", "bookshelf"],
        having=[COUNTS[boards] + " {} boards"] + ["a back"] * back, lacking=["a back"] * (not back))

def bed(u, pick, colour, second):
    size, head, foot = pick("single", "double"), pick("tall", "low"), pick(True, False)
    w, d, s = u(.8, .92) if size == "single" else u(1.25, 1.45), 1.8, u(.2, .26)
    h = u(.9, 1.05) if head == "tall" else u(.6, .68)
    linen = pick("white", "white", "grey")
    parts = [box((0, .1 + s / 2, 0), (w, s, d - .1), colour),
             box((0, s + .14, .01), (w - .08, .2, d - .2), linen, .06),
             box((0, s + .16, .22), (w - .02, .22, d - .64), second, .06),     # the blanket
             box((0, h / 2, .06 - d / 2), (w + .02, h, .13), colour, .04)]
    if foot:
        parts += [box((0, .29, d / 2 - .06), (w + .02, .58, .13), colour, .04)]
    pillows, wide = (1, w * .7) if size == "single" else (2, w * .4)
    parts += [box(((i - (pillows - 1) / 2) * w * .46, s + .27, .31 - d / 2), (wide, .16, .3), linen, .07)
              for i in range(pillows)]
    parts += [box((x, .08, z), (.15, .16, .15), colour) for x, z in corners(w / 2 - .09, d / 2 - .13)]
    return parts, {"size": size, "headboard": head, "footboard": foot, "pillows": pillows}, dict(
        nouns=[f"{size} bed"], adjectives=[size], lacking=["a footboard"] * (not foot),
        having=[f"a {head} headboard", f"{COUNTS[pillows]} pillow" + "s" * (pillows > 1), "a {} blanket"]
        + ["a footboard"] * foot)

def bench(u, pick, colour, second):
    slats, legs = pick(1, 2, 3), pick(4, 2)
    w, d, s, t = 1.8, u(.46, .58), u(.44, .52), u(.1, .13)
    h, x = s + .06 + .2 * slats, w / 2 - u(.15, .25)
    parts = [box((0, s - t / 2, 0), (w, t, d), colour)]
    for i in (-1, 1):
        parts += [box((i * x, h / 2, .05 - d / 2), (.12, h - .03, .12), second)]        # post behind the slats
        if legs == 4:
            parts += [box((i * x, (s - .04) / 2, j * (d / 2 - .07)), (.12, s - .04, .12), second) for j in (-1, 1)]
        else:
            parts += [box((i * x, (s - .04) / 2, 0), (.13, s - .04, d - .08), second)]
    parts += [box((0, s + .16 + .2 * i, .1 - d / 2), (w, .12, .1), colour) for i in range(slats)]
    return parts, {"slats": slats, "legs": legs}, dict(
        nouns=["park bench"], having=[f"a back of {COUNTS[slats]} slat" + "s" * (slats > 1),
                                      "four {} legs" if legs == 4 else "two wide {} legs"])

def mug(u, pick, colour, second):
    height, handle, stripe = pick("tall", "wide"), pick(True, False), pick(True, False)
    h, r = (1.8, u(.52, .6)) if height == "tall" else (u(1.05, 1.2), u(.62, .68))
    parts = [tube((0, h / 2, 0), r, .12, h, colour, .045, sides=8),
             cylinder((0, .08, 0), r - .04, .15, colour, sides=8)]
    if handle:                                          # an arc of seven rods
        reach, thick, turns = h * u(.24, .32), u(.065, .08), np.linspace(-1.5, 1.5, 8)
        arc = np.stack([r - .05 + .85 * reach * np.cos(turns), h / 2 + reach * np.sin(turns), 0 * turns], 1)
        parts += [rod(a, b, thick, colour, 4) for a, b in zip(arc[:-1], arc[1:])]
    if stripe:
        parts += [tube((0, h * u(.25, .75), 0), r + .03, .12, h * u(.14, .2), second, sides=8)]
    return parts, {"shape": height, "handle": handle, "stripe": stripe}, dict(
        nouns=["cup"] if handle else ["cup", "beaker"], adjectives=[height], lacking=["a handle"] * (not handle),
        having=["a handle"] * handle + ["a {} stripe"] * stripe)

def car(u, pick, colour, second):
    kind, glass = pick("sedan", "van", "pickup"), "white" if colour == "black" else "black"
    d, w, r, body = 1.8, u(.74, .84), u(.17, .2), u(.28, .32)
    floor = r * .75
    parts = [box((0, floor + body / 2, 0), (w, body, d), colour, .08)]
    # the cabin: z of its centre, length, height; the glass is a block inside the roof and the body
    z, length, tall = {"sedan": (-.1, u(.8, .95), u(.28, .34)), "van": (-.16, u(1.36, 1.42), u(.46, .54)),
                       "pickup": (.16, u(.52, .6), u(.34, .4))}[kind]
    top = floor + body + tall
    parts += [box((0, top - tall / 2 - .08, z), (w - .1, tall + .06, length), glass, .06),
              box((0, top - .06, z), (w - .04, .13, length + .02), colour, .05)]
    if kind == "pickup":                                # the walls of the load bed
        front, back, y = z - length / 2, -d / 2, floor + body + .04
        parts += [box((i * (w / 2 - .06), y, (front + back) / 2 + .02), (.12, .22, front - back), colour)
                  for i in (-1, 1)]
        parts += [box((0, y, back + .08), (w, .22, .12), colour)]
    parts += [cylinder((x, r, z), r, .18, "black", .04, ALONG_X, 8) for x, z in corners(w / 2 - .05, .52)]
    parts += [ball((i * (w / 2 - .16), floor + body * .6, d / 2 - .02), .075, "yellow") for i in (-1, 1)]
    return parts, {"kind": kind, "wheels": 4}, dict(nouns=[kind, "automobile"], having=["four wheels"])

def aeroplane(u, pick, colour, second):
    wings, engines = pick("straight", "swept"), pick(0, 2, 4)
    d, r, span, chord = 1.8, u(.17, .22), u(.78, .9), u(.26, .34)
    glass = "white" if colour == "black" else "black"
    parts = [capsule((0, 0, 0), r, d, colour, ALONG_Z, 8), ball((0, r - .07, .52), .13, glass)]
    sweep = u(24, 32) if wings == "swept" else 0
    for i in (-1, 1):                                   # left and right: wing, tail wing, engines
        turn = rotation_about("y", i * sweep)
        wing, tail = turn @ np.array([i * span / 2, 0, 0]), turn @ np.array([i * .2, 0, 0])
        parts += [box(wing + [0, -.03, .12], (span, .1, chord), second, .045, turn),
                  box(tail + [0, .05, -d / 2 + .16], (.4, .1, .2), second, .045, turn)]
        for along in {0: [], 2: [.45], 4: [.36, .72]}[engines]:
            place = turn @ np.array([i * span * along, 0, chord * .35]) + [0, -.12, .12]
            parts += [capsule(place, .085, u(.34, .4), colour, ALONG_Z)]
    parts += [box((0, r + .1, -d / 2 + .15), (.1, .4, .24), second, .045, rotation_about("x", -20))]
    return parts, {"wings": wings, "engines": engines}, dict(
        nouns=["airplane", "plane", "jet" if engines else "glider"], lacking=["engines"] * (not engines),
        having=[wings + " {} wings"] + [f"{COUNTS[engines]} engines"] * (engines > 0))

def bottle(u, pick, colour, second):
    body, label = pick("slim", "wide"), pick(True, False)
    shoulder, cap = pick("round", "sloping"), u(.14, .2)
    h, r = 1.8, u(.25, .29) if body == "slim" else u(.4, .46)
    neck, b = u(.1, .13), u(.85, 1.0)                   # radius of the neck, height of the body
    parts = [cylinder((0, b / 2, 0), r, b, colour, .06, sides=10),
             cylinder((0, (b + h) / 2 - .15, 0), neck, h - b + .18, colour, sides=8)]
    if shoulder == "round":
        parts += [ball((0, b - .06, 0), r, colour, 10)]
    else:
        parts += [cone((0, b + .12, 0), r, neck + .02, .4, colour, sides=10)]
    parts += [cylinder((0, h - cap / 2, 0), neck + .05, cap, second, sides=8)]
    if label:
        parts += [cylinder((0, b * .48, 0), r + .03, b * u(.4, .55), pick("white", "yellow", "pink"), sides=10)]
    return parts, {"body": body, "shoulder": shoulder, "label": label}, dict(nouns=["flask"], adjectives=[body],
        having=["a {} cap", f"a {shoulder} shoulder"] + ["a label"] * label, lacking=["a label"] * (not label))

def tree(u, pick, colour, second):
    crown, layers = pick("round", "cone"), 0
    leaf = pick(*LEAVES)
    h, r, trunk, w = 1.8, u(.09, .13), u(.4, .6), u(.5, .62)
    trunk = trunk if crown == "cone" else h - 2 * w
    parts = [cylinder((0, (trunk + .3) / 2, 0), r, trunk + .3, "brown")]
    if crown == "round":
        parts += [ball((0, h - w, 0), w, leaf, 15)]
        for a in np.arange(3) * 2 * np.pi / 3 + u(0, 2):
            place = .55 * w * np.cos(a), h - w * u(1.1, 1.45), .55 * w * np.sin(a)
            parts += [ball(place, w * u(.6, .72), leaf, 0)]
    else:
        layers = pick(2, 3)
        step = (h - trunk) / layers
        for i in range(layers):
            wide = w * (1 - .22 * i)
            top, tall = (wide * .35, step * 1.35) if i < layers - 1 else (.06, step)
            parts += [cone((0, trunk + i * step + tall / 2, 0), wide, top, tall, leaf, .05, sides=12)]
    return parts, {"crown": crown, "layers": layers, "colour": leaf}, dict(nouns=["pine", "fir"] * (layers > 0),
        having=[f"a {crown} crown", "a brown trunk"] + [f"{COUNTS[layers]} layers"] * (layers > 0))


BUILDERS = {"table": table, "chair": chair, "stool": stool, "lamp": lamp, "sofa": sofa, "shelf": shelf, "bed": bed,
            "bench": bench, "mug": mug, "car": car, "aeroplane": aeroplane, "bottle": bottle, "tree": tree}
CLASSES = tuple(BUILDERS)


def make(seed, index):
    """Shape number `index` of the endless set `seed`. Classes take turns."""
    rng = np.random.default_rng((seed, index))
    name = CLASSES[index % len(CLASSES)]
    pick = lambda *options: options[rng.integers(len(options))]
    colour, second = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
    parts, attributes, phrases = BUILDERS[name](rng.uniform, pick, colour, second)
    attributes = {"colour": colour} | attributes
    phrases = dict.fromkeys(("nouns", "adjectives", "having", "lacking"), []) | phrases
    if any("{}" in phrase for phrase in phrases["having"]):
        attributes["second"] = second
    bounds = np.stack([part.bounds() for part in parts])                        # parts 2 3
    low, high = bounds[:, 0].min(0), bounds[:, 1].max(0)
    scale = LONGEST / float((high - low).max())
    for part in parts:
        part.centre = (part.centre - (low + high) / 2) * scale
        part.size, part.radius = part.size * scale, part.radius * scale
    return Shape(name, parts, attributes, write_captions(rng, name, attributes, phrases))
