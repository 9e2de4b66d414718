"""attributes.py - does a sample have the attribute that its prompt names? `python evaluate.py attributes` measures it.

A checker takes o, the occupancy (x y z, y up, cropped to its bounding box), and measures one attribute of
geometry/shapes.py. Thresholds lie half way between the builders' proportions. The checker of a colour takes `paint`
instead, of the same size: the row of COLOURS that is nearest to the colour of each surface cell, elsewhere -1.
"""
import numpy as np
import torch
from scipy import ndimage
from scipy.ndimage import binary_erosion, binary_fill_holes
from scipy.signal import find_peaks

from geometry.shapes import COUNTS
from geometry.surface import field_of, sdf_grid
from geometry.words import COLOURS
from research import exam
from research.results import labels, write_tables

CELL = 2 / 64       # side of a cell of o; no part of a built-in shape is thinner than 2.8 cells
SPECK = 8           # cells; every built-in shape is longer than 12 in each direction


def crop(o):
    return o[tuple(slice(used.min(), used.max() + 1) for used in np.nonzero(o))]


def span(n, low, high):
    """The cells of n from the share `low` to the share `high`, at least one."""
    start = int(low * n)
    return slice(start, max(start + 1, int(high * n)))


def middle(o, low, high):                                     # the cells whose x is between two shares of the width
    return o[span(len(o), low, high)]


def count_runs(line):
    """How many occupied stretches a line of shares has; occupied = more than half."""
    return np.count_nonzero(np.diff(np.concatenate([[0], line > .5, [0]]).astype(int))) // 2


def count_components(o):
    """How many components a horizontal layer has: the median over the layers, without specks."""
    counts = [(np.bincount(ndimage.label(o[:, y])[0].ravel())[1:] > 1).sum() for y in range(o.shape[1])]
    return int(np.median(counts))


def heights(o):                                               # of the upper surface, in cells: x z
    return np.where(o.any(1), o.shape[1] - o[:, ::-1].argmax(1), 0)


def top(o):
    """The outline of the top, seen from above: a disc fills pi / 4 of its bounding box."""
    outline = crop(o[:, -3:].any(1))
    if min(outline.shape) < .83 * max(outline.shape):
        return "rectangular"
    return "round" if outline.mean() < .89 else "square"


def seat(o):
    """The highest layer that is nearly as full as the fullest one."""
    area = o.sum((0, 2))
    return np.flatnonzero(area > .7 * area.max())[-1]


def both(left, right):                                        # None: one alone, which no built-in shape has
    return bool(left) if left == right else None


def chair_arms(o):
    above = o[:, seat(o) + 3:, o.shape[2] // 2:]                 # over the front half of the seat
    return both(*(side.sum() * CELL ** 3 > .0015 for side in np.array_split(above, 2)))      # a sixth of an arm there


def sofa_front(o):                                            # heights of the seat and the arms, along x
    return heights(o)[:, span(o.shape[2], .5, .9)].mean(1)


def sofa_arms(o):
    front = sofa_front(o)
    return both(*(front[side].mean() > np.median(front) + .5 for side in ([3, 4], [-4, -5])))


def sofa_cushions(o):
    """Grooves are in the middle (2 cushions) or at both thirds of the seat (3), or there is none (1)."""
    front = sofa_front(o)
    groove = (np.median(front) - front).clip(0)
    x = abs(np.linspace(-1, 1, len(front)))                      # arms make the seat narrower: thirds from .23 to .33
    two, three = groove[x < .14].sum(), groove[(x > .16) & (x < .48)].sum() / 2
    if max(two, three) < .5:
        return 1
    return 2 if two > three else 3


def bed_footboard(o):
    profile = np.median(heights(middle(o, .1, .9)), 0)           # along z: does it rise at the end?
    return bool(profile[-5:].max() > profile[span(len(profile), .45, .7)].mean() + .75)


def car_kind(o):
    roof = heights(middle(o, .4, .6)).mean(0)
    share = (roof > .85 * roof.max()).mean()                     # of the length that is under the roof
    if share < .385:
        return "pickup"
    return "sedan" if share < .63 else "van"


def wing_tips(o):                                             # x, y, z of the cells at both ends of the wings
    return np.nonzero(np.concatenate([middle(o, 0, .06), middle(o, .94, 1)]))


def engines(o):
    """How many of four places below the wings are occupied? One pair of engines hangs at .45 of a wing, two at
    .36 and .72; sweep moves them outwards by up to .05."""
    below = o[:, :max(1, wing_tips(o)[1].min() - 1)].any((1, 2))                                 # along x
    wings = below[len(below) // 2:], below[len(below) // 2::-1]
    places = [wing[span(len(wing), low, high)] for wing in wings for low, high in ((.36, .54), (.64, .8))]
    return sum(int(place.any()) for place in places)


def mug_handle(o):            # None: it encloses no hole. A handle adds at least .16 to the width
    hole = (binary_fill_holes(o.any(2)) & ~o.any(2)).sum() > 2                    # from the front
    return both(hole, len(o) > 1.08 * o.shape[2])


def crown_layers(o):          # of a fir: bulges of the width (root of the area) along y; any has more than 3 cells
    return len(find_peaks(np.sqrt(np.append(o.sum((0, 2)), 0)), prominence=3)[0])


def colour(x=(0, 1), y=(0, 1), z=(0, 1), rank=0):
    """-> a checker: the most common colour within these shares of the box, or with rank 1 the next most common one."""
    def check(paint):
        box = paint[tuple(span(n, *share) for n, share in zip(paint.shape, (x, y, z)))]
        counts = np.bincount(box[box >= 0], minlength=len(COLOURS))
        return list(COLOURS)[counts.argsort()[-1 - rank]]
    return check


def prompts(template, *values):
    """{value: prompt}: the template with the value in it."""
    return {value: template.format(COUNTS[value] if isinstance(value, int) else value) for value in values}


ATTRIBUTES = [  # class, attribute of geometry/shapes.py, its checker, {value: prompt}
    ("table", "top", top, prompts("a {} table", "round", "square", "rectangular")),
    ("table", "legs", lambda o: count_components(o[:, span(o.shape[1], .35, .6)]),
     {4: "a table with four legs", 1: "a table with one leg"}),
    ("table", "height", lambda o: "low" if o.shape[1] < .53 * len(o) else "tall", prompts("a {} table", "low", "tall")),
    ("chair", "arms", chair_arms, {True: "a chair with arms", False: "a chair without arms"}),
    ("chair", "back", lambda o: "tall" if seat(o) < .5 * o.shape[1] else "low",
     prompts("a chair with a {} back", "tall", "low")),
    ("stool", "seat", top, prompts("a {} stool", "round", "square")),
    ("stool", "legs", lambda o: count_components(o[:, span(o.shape[1], .05, .18)]),
     prompts("a stool with {} legs", 3, 4)),
    ("lamp", "height", lambda o: "tall" if len(o) < .56 * o.shape[1] else "short",
     prompts("a {} lamp", "tall", "short")),
    ("lamp", "shade", lambda o: "cone" if len(crop(o[:, -3:])) < .75 * len(crop(o[:, o.shape[1] // 2:])) else "drum",
     prompts("a lamp with a {} shade", "cone", "drum")),
    ("sofa", "arms", sofa_arms, {True: "a sofa with arms", False: "a sofa without arms"}),
    ("sofa", "cushions", sofa_cushions, prompts("a sofa with {} cushions", 2, 3)),
    ("shelf", "boards", lambda o: count_runs(middle(o, .3, .7)[..., span(o.shape[2], .45, .9)].mean((0, 2))),
     prompts("a shelf with {} boards", 2, 3, 4, 5)),
    ("shelf", "back", lambda o: bool(middle(o, .3, .7)[:, span(o.shape[1], .2, .9), 1:3].mean() > .6),
     {True: "a shelf with a back", False: "a shelf without a back"}),
    ("bed", "size", lambda o: "single" if len(o) < .62 * o.shape[2] else "double",
     prompts("a {} bed", "single", "double")),
    ("bed", "headboard", lambda o: "low" if o.shape[1] < .44 * o.shape[2] else "tall",
     prompts("a bed with a {} headboard", "tall", "low")),
    ("bed", "footboard", bed_footboard, {True: "a bed with a footboard", False: "a bed without a footboard"}),
    ("bench", "slats", lambda o: count_runs(middle(o, .4, .6)[..., 2:5].mean((0, 2))) - 1,     # the lowest is the seat
     {1: "a bench with a back of one slat"} | prompts("a bench with a back of {} slats", 2, 3)),
    ("bench", "legs", lambda o: count_components(o[:, 3:9]),
     {4: "a bench with four legs", 2: "a bench with two wide legs"}),
    ("mug", "shape", lambda o: "tall" if o.shape[1] > 1.2 * o.shape[2] else "wide",
     prompts("a {} mug", "tall", "wide")),
    ("mug", "handle", mug_handle, {True: "a mug with a handle", False: "a mug without a handle"}),
    ("car", "kind", car_kind, prompts("a {}", "sedan", "van", "pickup")),
    ("aeroplane", "wings", lambda o: "swept" if wing_tips(o)[2].mean() < .49 * o.shape[2] else "straight",
     prompts("an aeroplane with {} wings", "straight", "swept")),
    ("aeroplane", "engines", engines,
     {0: "an aeroplane without engines", 2: "an aeroplane with two engines", 4: "an aeroplane with four engines"}),
    ("bottle", "body", lambda o: "slim" if o.shape[2] < .4 * o.shape[1] else "wide",
     prompts("a {} bottle", "slim", "wide")),
    ("tree", "crown", lambda o: "round" if o.sum((0, 2)).argmax() > .45 * o.shape[1] else "cone",
     prompts("a tree with a {} crown", "round", "cone")),
    ("tree", "layers", crown_layers, prompts("a tree with {} layers", 2, 3)),
    *((name, "colour", colour(), prompts(f"a {{}} {name}", "red", "blue", "yellow", "green"))
      for name in ("car", "mug", "chair")),
    ("table", "second", colour(y=(0, .7)), prompts("a white table with four {} legs", "black", "red")),
    ("chair", "second", colour(y=(0, .3)), prompts("a blue chair with four {} legs", "yellow", "white")),
    ("stool", "second", colour(y=(.1, .6)), prompts("a red stool with three {} legs", "black", "green")),
    ("lamp", "second", colour(y=(0, .06)), prompts("a green lamp with a {} base", "white", "brown")),
    ("sofa", "second", colour((.25, .75), (.42, .7), (.5, 1)),
     prompts("a grey sofa with two {} cushions", "pink", "teal")),
    ("shelf", "second", colour((.3, .7), z=(.6, 1)), prompts("a brown shelf with four {} boards", "white", "orange")),
    ("bed", "second", colour((.3, .7), (.3, .8), (.55, .8)), prompts("a red bed with a {} blanket", "blue", "green")),
    ("bench", "second", colour(y=(0, .3)), prompts("a green bench with four {} legs", "black", "yellow")),
    ("mug", "second", colour(rank=1), prompts("a tall white mug with a handle and a {} stripe", "red", "blue")),
    ("aeroplane", "second", colour(x=(0, .15)), prompts("a white aeroplane with straight {} wings", "red", "blue")),
    ("bottle", "second", colour(y=(.94, 1)), prompts("a black bottle with a {} cap", "red", "yellow"))]


def measure_shape(field):
    """A field: points k 3 -> distance, colour -> o and paint, as checkers take them."""
    o = (sdf_grid(lambda x: field(x)[:, 0], 64) < 0).numpy()  # x y z: vertices of the grid
    if not o.any():
        return o[:0], o[:0]
    surface = np.argwhere(o & ~binary_erosion(o))                                 # k 3
    colours = field(torch.from_numpy(surface).float() * CELL - 1)[:, 1:]          # k 3
    nearest = torch.cdist(colours, torch.tensor(list(COLOURS.values()))).argmin(1)          # k, rows of COLOURS
    paint = np.full(o.shape, -1)
    paint[tuple(surface.T)] = nearest.numpy()
    return crop(o), paint[tuple(slice(x.min(), x.max() + 1) for x in surface.T)]


def has_attribute(measured, attribute, checker, value):
    """Whether a shape, from `measure_shape`, has this value of the attribute. Empty shapes and specks do not."""
    o, paint = measured
    return min(o.shape) >= SPECK and checker(paint if attribute in ("colour", "second") else o) == value


# class: a range of heights, as shares, with nothing but legs (or feet, wheels, a pole, a neck, a trunk, a fin); how
# many of them the front half and the back half may have. A mug has none
LEGS = {"table": (.35, .6, (2, 2), (1, 1)), "chair": (.05, .25, (2, 2)), "stool": (.05, .2, (2, 2), (1, 2)),
        "lamp": (.47, .57, (1, 1)), "sofa": (.04, .08, (2, 2)), "shelf": (0, .03, (2, 2)),
        "bed": (.05, .1, (2, 1), (1, 1)), "bench": (.05, .25, (2, 2)), "car": (.05, .12, (2, 2)),
        "aeroplane": (.75, .95, (0, 1)), "bottle": (.8, .95, (1, 1)), "tree": (.15, .2, (1, 1), (1, 0), (0, 1))}
PARTS = "arms", "handle", "slats", "boards", "engines"        # attributes that tell whether something is missing


def count_legs(layers):
    """`count_components` of layers of half a shape. -1: there is more on the left than on the right, as where a leg is
    lost; or it fills more than .4, as no legs do."""
    centre = np.argwhere(layers)[:, 0].mean() / (len(layers) - 1) if layers.any() else .5
    return count_components(layers) if abs(centre - .5) < .1 and layers.mean() < .4 else -1


def complete(o, name):
    """Whether a shape has all that any shape of a built-in class has: LEGS and PARTS."""
    if min(o.shape) < SPECK:
        return False
    low, high, *right = LEGS.get(name, (0, 1))
    layers, half = o[:, span(o.shape[1], low, high)], o.shape[2] // 2
    found = count_legs(layers[..., half:]), count_legs(layers[..., :half])        # front, back
    return found in (right or [found]) and all(
        checker(o) in texts for of, part, checker, texts in ATTRIBUTES if of == name and part in PARTS)


def evaluate_attributes(args):
    """Measures on the solid whether it has the visible attribute that its prompt names."""
    wanted = {prompt: (*attribute, value) for _, *attribute, texts in ATTRIBUTES for value, prompt in texts.items()}
    jobs = [exam.Job(f"{x}-{i}", x, None, (args.seed, i)) for x in wanted for i in range(args.n)]
    second = np.array([attribute == "second" for attribute, *_ in wanted.values()])               # prompts
    tables = {}
    for folder, label in labels(args.checkpoint).items():
        cache = exam.result_cache(args, label, folder)
        model = exam.open_model(args, folder).load_heads("sdf")

        def result_of(tokens, job):
            found = measure_shape(field_of(model.heads["sdf"], tokens, model.autocast))
            return {"obeyed": has_attribute(found, *wanted[job.text])}

        obeyed = exam.sample_all(model, jobs, cache, result_of)["obeyed"].reshape(-1, args.n).mean(1)
        tables[label] = [{"prompt": prompt, "obeyed": share} for prompt, share in zip(wanted, obeyed)]
        print(f"{label}: {obeyed[~second].mean():.3f} in the mean of the {(~second).sum()} prompts without a second "
              f"colour, {obeyed[second].mean():.3f} of the {second.sum()} with one")
    print(f"obeyed: the share of {args.n} samples of a prompt that have its attribute")
    write_tables(args.out, args.command, tables)
