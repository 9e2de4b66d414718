"""test_shapes.py - the tests of built-in shapes, low-poly meshes, surfaces."""
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from conftest import TrueHead
from engine import networks
from engine.commands import UserError
from geometry import built_in, export, low_poly, meshes, metrics, palette, prepare, shapes, simplify, solids, surface
from geometry.captions import NUMBERS, write_captions
from representations.mesh import MeshHead, faces_of

# ---------------------------------------------------------------------------- shapes

@pytest.mark.parametrize("index", range(len(shapes.CLASSES)), ids=shapes.CLASSES)
def test_distance_is_that_to_the_surface(index):
    """The field = a search among 200,000 samples of the visible surface (.006 apart), in size and in sign. At samples
    it is 0 and its gradient is the normal, but at creases. The longest side is 1.8; the shape is centred."""
    shape, rng = shapes.make(3, index), np.random.default_rng(0)
    points, normals, colours = shape.surface(200_000, rng)
    x = (points[:3000] + rng.normal(0, .06, (3000, 3))).astype(np.float32)
    field, (distance, nearest) = shape.distance(x), cKDTree(points).query(x)
    deep = field < 1e-4 - surface.TRUNCATION                            # here the field is only a bound
    error = abs(abs(field) - distance)[~deep]
    assert error.mean() < .002 and np.quantile(error, .99) < .008 and error.max() < .04
    assert (distance[deep] > surface.TRUNCATION - .02).all() and (field[~deep] < 0).sum() > 500
    side = ((x - points[nearest]) * normals[nearest]).sum(1)            # which side of the nearest sample
    clear = abs(side) > .7 * distance
    assert clear.mean() > .9 and ((side > 0) == (field > 0))[clear].mean() > .999

    low, high, points, normals = points.min(0), points.max(0), points[:2000], normals[:2000]
    assert abs((high - low).max() - 1.8) < .02 and abs(low + high).max() < .04
    assert abs(shape.distance(points)).max() < 1e-4
    steps = .002 * np.eye(3, dtype=np.float32)
    rise = np.stack([shape.distance(points + step) - shape.distance(points - step) for step in steps], 1)
    assert ((rise / .004 * normals).sum(1) > .98).mean() > .9
    assert {*map(tuple, colours)} <= {*map(tuple, shape.palette)}


def test_train_and_test_never_meet(prepared):
    """Both sets have every class and no shape in common."""
    training, test = prepared
    assert set(training.classes) == set(test.classes) == set(shapes.CLASSES)
    assert max(prepare.TRAIN_SHAPES, 10 ** 7) <= built_in.TEST == min(record["index"] for record in test.records)
    assert len({points.numpy().tobytes() for split in prepared for points in split.arrays["points"]}) == 26


def test_captions_are_true():
    """Captions are lowercase, the class name comes first. They name arms, engines and numbers as the shape has them."""
    for index in range(520):
        shape = shapes.make(1, index)
        has = shape.attributes
        assert shape.captions[0] == shape.name
        assert len(set(shape.captions)) == len(shape.captions) >= 5
        for caption in shape.captions:
            assert caption == caption.lower()
            for noun in ("arms", "handle", "label", "stripe", "footboard", "engines"):
                if re.search(rf"\b{noun}\b", caption):
                    without = bool(re.search(rf"(without|no)[\w ]* {noun}", caption))
                    assert bool(has[noun]) != without, (caption, has)
            counts = {"boards", "cushions", "legs", "engines", "layers"} & has.keys()
            for number, noun in re.findall(r"\b(one|two|three|four|five|[1-5]) (?:\w+ )?(\w+?)\b", caption):
                plural = next((count for count in counts if noun.rstrip("s") == count.rstrip("s")), None)
                assert plural is None or int(NUMBERS.get(number, number)) == has[plural], (caption, has)


def test_a_full_caption_has_every_adjective():
    """Also one whose letters are in another word, as those of "low" in "yellow"."""
    phrases = dict(nouns=[], adjectives=["low"], having=["four {} legs"], lacking=[])
    captions = write_captions(np.random.default_rng(0), "table", {"colour": "red", "second": "yellow"}, phrases)
    assert any("low red table" in caption and "yellow" in caption for caption in captions)


def test_counts_hold_on_the_geometry():
    """Slices of the field have as many table legs and shelf boards as the captions say."""
    s = np.linspace(-.95, .95, 400)
    plane = np.stack(np.meshgrid(s, [0], s, indexing="ij"), -1).reshape(-1, 3)           # half way up
    column = np.stack([0 * s, s, 0 * s + .05], 1)                                        # clear of the back
    for number in range(0, 12 * len(shapes.CLASSES), len(shapes.CLASSES)):
        table = shapes.make(5, number + shapes.CLASSES.index("table"))
        shelf = shapes.make(5, number + shapes.CLASSES.index("shelf"))
        assert ndimage.label(table.distance(plane).reshape(400, 400) < 0)[1] == table.attributes["legs"]
        assert ndimage.label(shelf.distance(column) < 0)[1] == shelf.attributes["boards"]


# ---------------------------------------------------------------------------- low-poly meshes

def one_hot_bins(corners):
    """Corners f 3 3 -> distributions over the bins that are sure: f 3 3 BINS."""
    return np.eye(meshes.BINS)[corners]


def volumes(vertices, faces):
    """The volume of each component of a mesh that is closed."""
    assert metrics.watertight(faces)
    _, component = np.unique(meshes.face_components(faces, len(vertices)), return_inverse=True)
    return np.bincount(component, np.linalg.det(vertices[faces])) / 6


@pytest.mark.parametrize("fine, most, near", [(False, 256, .11), (True, 10_000, .006)], ids=["low", "fine"])
@pytest.mark.parametrize("index", [*range(len(shapes.CLASSES)), 25], ids=[*shapes.CLASSES, "round tree"])
def test_meshes_are_closed_and_near(index, fine, most, near):
    """A low-poly mesh has at most 256 faces. Both meshes are closed, outward and near, the fine one nearer."""
    shape, rng = shapes.make(3, index), np.random.default_rng(0)
    vertices, faces, colours = shape.mesh(fine)
    assert len(faces) == len(colours) <= most
    found = volumes(vertices, faces)
    assert len(found) == sum(fine or part.sides > 0 for part in shape.parts) and found.min() > 0
    x, _, _ = meshes.sample_surface(vertices, faces, 500, rng, hidden=False)
    assert abs(shape.distance(x)).max() < near


class Counted(np.ndarray):
    """An array that counts the numbers which are computed from it."""
    count = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        inputs = [x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs]
        result = np.asarray(getattr(ufunc, method)(*inputs, **options))
        Counted.count += result.size
        return result.view(Counted)


def solid_angles(x, vertices, faces):
    """The winding number of points x k 3, by the solid angle of every face (Van Oosterom and Strackee 1983): k."""
    a, b, c = vertices[faces].astype(float).swapaxes(0, 1)[:, :, None] - x                               # f k 3 each
    la, lb, lc = (np.linalg.norm(corner, axis=-1) for corner in (a, b, c))                              # f k each
    volume, dot = (a * np.cross(b, c)).sum(-1), lambda p, q: (p * q).sum(-1)
    angle = np.arctan2(volume, la * lb * lc + dot(a, b) * lc + dot(b, c) * la + dot(c, a) * lb)
    return angle.sum(0) / (2 * np.pi)


@pytest.mark.parametrize("index", range(len(shapes.CLASSES)), ids=shapes.CLASSES)
def test_winding_numbers_by_rays_are_those_of_solid_angles(index):
    """Exactly, if all components are closed; with a tenth of the faces removed, on the same side of one half nearly
    everywhere."""
    vertices, faces, _ = shapes.make(3, index).mesh()
    rng = np.random.default_rng(0)
    x = meshes.sample_surface(vertices, faces, 500, rng)[0] + rng.normal(0, .03, (500, 3))
    expected = solid_angles(x, vertices, faces)
    assert len(np.unique(expected.round())) > 1
    assert abs(meshes.winding_number(x, vertices, faces) - expected).max() < 1e-6
    faces = faces[rng.random(len(faces)) > .1]
    agree = (meshes.winding_number(x, vertices, faces) < .5) == (solid_angles(x, vertices, faces) < .5)
    assert agree.mean() > .95


def test_finding_the_visible_surface_does_not_compare_every_point_with_every_face():
    vertices, faces, _ = shapes.make(3, shapes.CLASSES.index("car")).mesh(fine=True)
    Counted.count = 0
    meshes.sample_surface(vertices.view(Counted), faces, 2000, np.random.default_rng(0), hidden=False)
    assert 2000 < Counted.count < 5 * 2000 * len(faces)       # less than five numbers a pair


def test_canonical_order():
    """Shuffled faces, rotated corners and renumbered vertices give the same sequence; inside out is another mesh. Each
    component starts at its highest vertex. Every other face is entered over an edge of an earlier face."""
    vertices, faces, colours = shapes.make(0, 2).mesh()
    canonical, rng = low_poly.canonical(vertices, faces, colours), np.random.default_rng(0)
    for _ in range(3):
        rows, number = rng.permutation(len(faces)), rng.permutation(len(vertices))
        turned = np.stack([np.roll(face, rng.integers(3)) for face in faces[rows]])
        other = low_poly.canonical(vertices[np.argsort(number)], number[turned], colours[rows])
        assert all(map(np.array_equal, canonical, other))
    assert not np.array_equal(low_poly.canonical(vertices, faces[:, ::-1], colours)[0], canonical[0])

    corners, _, number = canonical
    assert len(corners) == len(faces)
    for component in np.split(corners, np.flatnonzero(np.diff(number)) + 1):
        assert component[0, 0, 1] == component[..., 1].max()
        edges = [list(map(tuple, np.stack([face, np.roll(face, -1, 0)], 1).reshape(3, 6))) for face in component]
        assert all(tuple(np.roll(face[0], 3)) in sum(edges[:i], []) for i, face in enumerate(edges) if i)


def test_a_bulging_ball_keeps_its_order():
    """Wherever a low-poly ball bulges, its faces come in the order of the round one."""
    part, rng = solids.ball((0, 0, 0), .6, "green", 15), np.random.default_rng(0)
    x, faces = part.mesh(fine=False)
    names = np.repeat(np.arange(len(faces))[:, None], 3, 1)
    order = lambda x: low_poly.canonical(x, faces, names)[1]
    for turn in rng.uniform(0, 2 * np.pi, 8):
        centre = .35 * np.sin(turn), rng.uniform(-.3, 0), .35 * np.cos(turn)
        bulging = solids.ball(centre, .4, "green").bulge(x, part.centre)
        assert np.linalg.norm(bulging, axis=1).max() > .7 and np.array_equal(order(bulging), order(x))


@pytest.mark.parametrize("index", range(len(shapes.CLASSES)), ids=shapes.CLASSES)
def test_welding_closes_what_was_closed(index):
    """Single faces become closed components in their old places. With corners that are off by a bin they nearly do."""
    shape, rng = shapes.make(0, index), np.random.default_rng(0)
    corners, *_ = low_poly.canonical(*shape.mesh())
    vertices, faces, unfolded = meshes.weld(one_hot_bins(corners))
    assert unfolded.all() and metrics.watertight(faces)
    assert abs(vertices[faces] - corners).max() < 1e-6
    assert len(volumes(vertices, faces)) == sum(part.sides > 0 for part in shape.parts)
    off = (rng.random(corners.shape) < .1) * rng.integers(-1, 2, corners.shape)
    _, faces, unfolded = meshes.weld(one_hot_bins((corners + off).clip(0, meshes.BINS - 1)))
    assert metrics.closed_edges(faces) > .98 and unfolded.mean() > .9


def test_holes_are_closed():
    """A mesh without one face gets that face again. A closed mesh and an empty one stay as they are."""
    corners, *_ = low_poly.canonical(*shapes.make(0, 12).mesh())
    _, faces, _ = meshes.weld(one_hot_bins(np.delete(corners, len(corners) // 2, 0)))
    closed = meshes.close_holes(faces)
    assert not metrics.watertight(faces) and metrics.watertight(closed)
    assert np.array_equal(closed[:-1], faces) and np.array_equal(meshes.close_holes(closed), closed)
    assert len(meshes.close_holes(faces[:0])) == metrics.closed_edges(faces[:0]) == 0
    assert [len(x) for x in meshes.weld(one_hot_bins(corners[:0]))] == [0, 0, 0]


def test_uncertain_corners_are_welded_jointly():
    """Two meshes 12 bins apart are nearly equally likely, at random for each corner. The welded mesh is closed, and
    more vertices than corners are those of the likelier mesh."""
    corners, *_ = low_poly.canonical(*shapes.make(0, 0).mesh())
    lean = .52 + .2 * (np.random.default_rng(0).random((*corners.shape, 1)) - .5)
    share = lean * one_hot_bins(corners) + (1 - lean) * one_hot_bins(corners - 12)
    vertices, faces, unfolded = meshes.weld(share)
    assert unfolded.all() and metrics.watertight(faces)
    assert (share.argmax(-1) == corners).mean() < .65
    assert (np.round(vertices[faces]) == corners).mean() > .75


@pytest.mark.parametrize("unsure", [None, 2])
def test_uncertain_components_are_dropped_whole(unsure, monkeypatch):
    """If every second face of a component is uncertain, the mesh has all other components. If none is, it is whole."""
    corners, _, components = low_poly.canonical(*shapes.make(0, 1).mesh())                 # a chair
    head, bins = MeshHead(2, 4, 64, 2), F.one_hot(torch.from_numpy(corners).flatten(1), meshes.BINS)
    exists = torch.full((1, len(corners)), 6.)
    exists[:, (components == unsure) & (np.arange(len(corners)) % 2 == 0)] = 0.
    monkeypatch.setattr(head, "logits", lambda levels: levels)
    monkeypatch.setattr(head, "forward", lambda tokens: (20. * bins[None], exists, torch.ones(*exists.shape, 3)))
    mesh, sure = head.decode(torch.zeros(8, 4), {}, None), components != unsure
    assert metrics.watertight(mesh.faces) and len(mesh.faces) == sure.sum()
    true = np.unique(meshes.bin_centres(corners[sure]).reshape(-1, 3), axis=0)
    assert abs(np.sort(mesh.vertices.ravel()) - np.sort(true.ravel())).max() < 1e-6


def test_equal_components_may_come_in_any_order(prepared):
    """The canonical order is right, and that with all legs in turn. Uniform logits get the canonical one."""
    batch = faces_of(prepared[0], [1])                                                       # a chair
    corners, components = batch["corners"].flatten(2), batch["components"]
    sizes, counts = components[components >= 0].bincount().unique_consecutive(return_counts=True)
    legs, rows = counts.argmax(), torch.arange(meshes.FACES)
    block = slice((sizes * counts)[:legs].sum(), (sizes * counts)[:legs + 1].sum())
    turned = rows.clone()
    turned[block] = rows[block].roll(sizes[legs].item())
    assert counts[legs] > 2
    for order in (rows, turned):
        logits = 5. * F.one_hot(corners[:, order].clamp(min=0), meshes.BINS)
        assert torch.equal(low_poly.match_like_components(logits, corners, components)[0], order)
    assert torch.equal(low_poly.match_like_components(0 * logits, corners, components)[0], rows)


@pytest.mark.parametrize("vertices, faces, complaint", [
    (np.eye(3), np.zeros((0, 3), int), "no faces"), (np.eye(3) * np.nan, [[0, 1, 2]], "NaN"),
    (np.eye(3), [[1, 2, 3]], "has vertex 3"), (np.eye(3) * 1e-6, [[0, 1, 2]], "larger than a bin")])
def test_bad_meshes_are_one_line(vertices, faces, complaint):
    with pytest.raises(UserError, match=complaint):
        low_poly.canonical(vertices, np.array(faces), np.ones((len(faces), 3)))


def test_repeated_and_degenerate_faces_are_dropped():
    corners, _, _ = low_poly.canonical(np.eye(3), np.array([[0, 1, 2], [1, 2, 0], [0, 1, 1]]), np.ones((3, 3)))
    assert len(corners) == 1


def test_needles_keep_no_edge_from_collapsing():
    """A box whose sides run along the grid is extracted with needle-thin faces; 128 faces of it are closed, as large
    as it, and reach no farther."""
    axis = np.linspace(-1, 1, 65)
    grid = np.abs(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))).max(0) - .5
    vertices, faces, *_ = marching_cubes(grid, 0, gradient_direction="descent")
    vertices = vertices / 32 - 1
    points, few, paint = simplify.simplify_to(vertices, faces, np.ones((len(faces), 3)), 128)
    assert len(few) == len(paint) <= 128 and volumes(points, few) == pytest.approx([1], abs=.02)
    assert (abs(points) <= abs(vertices).max(0)).all()


def test_simplified_surfaces_are_closed_and_keep_colours():
    """A white box with a red band and a speck: 1,000 faces of it have no speck, and colours are right where they were.
    Without fins they are not."""
    parts = solids.box((0, 0, 0), (1, 1, 1), "white"), solids.ball((.8, .8, .8), .06, "white")
    shape = shapes.Shape("box", [*parts], {}, [])
    vertices, faces, colours = surface.extract(TrueHead(shape), torch.zeros(1, 1), 64)
    colours[abs(vertices[:, 1]) < .2] = 1, 0, 0
    points, few, paint = simplify.simplify_surface(vertices, faces, colours, 1000, flat=False)
    assert metrics.watertight(few) and 900 < len(few) <= 1000 and abs(points).max() < .52
    found, _, colour = export.Mesh(points, few, paint).surface(10_000, np.random.default_rng(0))
    inside, sure = abs(found[:, 1]) < .2, abs(abs(found[:, 1]) - .2) > .04
    assert (abs(colour - np.where(inside[:, None], [1, 0, 0], colours[0]))[sure].max(1) < .1).mean() > .995


def test_wavy_walls_become_flat():
    """Of a box with waves on its walls most of the area then lies within 5 degrees of a wall; its edges do not move."""
    box = shapes.Shape("box", [solids.box((0, 0, 0), (1, .8, .6), "white")], {}, [])
    vertices, faces, _ = surface.extract(TrueHead(box), torch.zeros(1, 1), 64)
    wavy = vertices * (1 + .01 * np.sin(30 * vertices.sum(1, keepdims=True)))
    flat, shares = simplify.denoised(wavy, faces), []
    for x in (wavy, flat):
        mesh = trimesh.Trimesh(x, faces, process=False)
        shares.append(mesh.area_faces[abs(mesh.face_normals).max(1) > np.cos(np.radians(5))].sum() / mesh.area)
    assert shares[0] < .3 and shares[1] > .9
    assert abs(flat.max(0) - wavy.max(0)).max() < .01 and wavy.dtype == flat.dtype


def test_pinched_edges_are_split():
    """Two boxes that share an edge become two closed meshes; a face with its back, which encloses nothing, goes."""
    a, b = trimesh.creation.box((1, 1, 1)), trimesh.creation.box((1, 1, 1))
    b.apply_translation((1, 1, 0))
    both = trimesh.util.concatenate([a, b])
    both.merge_vertices()
    faces = np.concatenate([both.faces, [[0, 1, 2], [2, 1, 0]]])
    assert not metrics.watertight(faces)
    points, faces = simplify.split_pinches(both.vertices, faces)
    assert metrics.watertight(faces) and len(faces) == 24 and volumes(points, faces) == pytest.approx([1, 1])


# ---------------------------------------------------------------------------- distances -> a mesh

@pytest.mark.parametrize("name, resolution", [("chair", 64), ("mug", 64), ("lamp", 128)])
def test_hierarchical_is_dense(name, resolution):
    """A grid refined near the surface gives the same mesh as a dense one: closed, outward, of the right volume."""
    shape = shapes.make(6, shapes.CLASSES.index(name))
    head = TrueHead(shape)
    fine, dense = (surface.extract(head, torch.zeros(1, 1), resolution, hierarchical=h) for h in (True, False))
    assert all(map(np.array_equal, fine, dense))
    vertices, faces, colours = fine
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    inside = (shape.distance(networks.grid_points(64).numpy()) < 0).mean() * 8
    assert len(faces) > 1000 and mesh.is_watertight and mesh.is_winding_consistent
    assert abs(mesh.volume / inside - 1) < .05 and abs(shape.distance(vertices)).max() < .03
    assert 0 <= colours.min() <= colours.max() <= 1


@pytest.mark.parametrize("sign, full", [(-1., True), (1., False)], ids=["inside", "outside"])
def test_meshes_are_closed_at_the_border_of_the_cube(sign, full):
    """A field that is inside everywhere gives a closed mesh, one that is outside everywhere an empty one."""
    head = TrueHead(None)
    head.evaluate = lambda memory, x: torch.full((1, x.shape[1], 4), sign)
    fine, dense = (surface.extract(head, torch.zeros(1, 1), 64, hierarchical=h) for h in (True, False))
    assert all(map(np.array_equal, fine, dense))
    assert metrics.watertight(fine[1]) == full == (len(fine[1]) > 0)


def test_chunks_keep_points_in_order_and_have_few_sizes():
    """torch keeps a plan of each product by its size: memory would grow with every new one."""
    sizes, x = set(), torch.rand(30_000, 3)
    for k in range(1, len(x), 97):
        assert surface.in_chunks(lambda chunk: sizes.add(len(chunk)) or 2 * chunk, x[:k]).equal(2 * x[:k])
    assert len(sizes) == 8


def test_a_surface_gets_few_flat_colours(monkeypatch):
    """Two colours, noisy and blurred at their border, become two and meet at a crease; those of a rainbow stay. To
    solve for all vertices, not only for those near the border, gives nearly the same."""
    rng, side = np.random.default_rng(0), 60
    i, j = (x.ravel() for x in np.meshgrid(range(side - 1), range(side - 1), indexing="ij"))
    corner, flat = i * side + j, np.zeros((side * side, 3), np.float32)
    flat[:, :2] = np.stack(np.divmod(np.arange(side * side), side), 1) / 30
    faces = np.concatenate([np.stack([corner, corner + 1, corner + side], 1),
                            np.stack([corner + 1, corner + side + 1, corner + side], 1)])
    share = np.clip(np.arange(side) / 6 - side / 12, 0, 1)    # of the second colour, in each column
    true = np.array([[.8, .3, .1], [.2, .3, .6]], np.float32)
    noisy = np.outer(1 - share, true[0]) + np.outer(share, true[1]) + .02 * rng.standard_normal((side, side, 3))
    found = palette.few_colours(flat, faces, np.float32(noisy.reshape(-1, 3)))
    assert len(np.unique(found, axis=0)) == 2
    assert abs(found - true[np.tile(share > .5, side).astype(int)]).max(1).mean() < .05
    folded = flat + np.maximum(flat[:, 1:2] - 31 / 30, 0) * [0, 0, 2]             # along column 31, two from the border
    found = palette.few_colours(np.float32(folded), faces, np.float32(noisy.reshape(-1, 3))).reshape(side, side, 3)
    assert (abs(found[:, 32:] - true[1]).max() < .05) and (abs(found[:, :31] - true[0]).max() < .05)
    rainbow = rng.random((side * side, 3)).astype(np.float32)
    assert palette.few_colours(flat, faces, rainbow) is rainbow
    solve = palette.largest
    monkeypatch.setattr(palette, "largest", lambda system, fit, faces, steps: solve(system, fit, faces, side))
    everywhere = palette.few_colours(np.float32(folded), faces, np.float32(noisy.reshape(-1, 3))).reshape(side, side, 3)
    assert (everywhere == found).all(-1).mean() > .99
