"""test_geometry.py - the tests of geometry/."""
import contextlib
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

import data
import heads
import train
from conftest import HERE, TrueHead, assert_one_line, run, same_files
from engine import networks
from engine.commands import UserError
from evaluation import judges
from geometry import export, mesh_files, meshes, prepare, real, render, shapes, solids, soup, surface, training_samples
from geometry.captions import NUMBERS
from geometry.light import to_linear, view_rotation

# ---------------------------------------------------------------------------- shapes

@pytest.mark.parametrize("index", range(len(shapes.CLASSES)), ids=shapes.CLASSES)
def test_distance_is_that_to_the_surface(index):
    """The field = a search among 200,000 samples of the visible surface (.006 apart), in size and in sign."""
    shape, rng = shapes.make(3, index), np.random.default_rng(0)
    points, normals, _ = shape.surface(200_000, rng)
    x = (points[:3000] + rng.normal(0, .06, (3000, 3))).astype(np.float32)
    field, (distance, nearest) = shape.distance(x), cKDTree(points).query(x)
    deep = field < 1e-4 - surface.TRUNCATION                            # here the field is only a bound
    error = abs(abs(field) - distance)[~deep]
    assert error.mean() < .002
    assert np.quantile(error, .99) < .008
    assert error.max() < .04
    assert (distance[deep] > surface.TRUNCATION - .02).all()
    assert (field[~deep] < 0).sum() > 500
    side = ((x - points[nearest]) * normals[nearest]).sum(1)            # which side of the nearest sample
    clear = abs(side) > .7 * distance
    assert clear.mean() > .9
    assert ((side > 0) == (field > 0))[clear].mean() > .999


@pytest.mark.parametrize("index", range(len(shapes.CLASSES)), ids=shapes.CLASSES)
def test_surface_points_lie_on_the_surface(index):
    """At surface points the distance is 0, its gradient is the normal (but at creases), colours are those of parts."""
    shape = shapes.make(4, index)
    points, normals, colours = shape.surface(2000, np.random.default_rng(0))
    assert len(points) == 2000
    assert abs(shape.distance(points)).max() < 1e-4
    steps = .002 * np.eye(3, dtype=np.float32)
    rise = np.stack([shape.distance(points + step) - shape.distance(points - step) for step in steps], 1)
    assert ((rise / .004 * normals).sum(1) > .98).mean() > .9
    assert {tuple(colour) for colour in colours} <= {tuple(np.float32(colour)) for colour in shape.palette}


def test_shapes_are_functions_of_seed_and_index():
    """The same (seed, index) gives the same shape, bit by bit. Another seed or index gives another."""
    x = np.random.default_rng(0).uniform(-1, 1, (500, 3))
    one, again, *others = [shapes.make(*key) for key in ((0, 5), (0, 5), (1, 5), (0, 18))]
    assert one.captions == again.captions
    assert (one.distance(x) == again.distance(x)).all()
    assert all((one.distance(x) != other.distance(x)).mean() > .5 for other in others)


def test_train_and_test_never_meet(prepared):
    """Both sets have every class and no shape in common."""
    training, test = prepared
    assert set(training.classes) == set(test.classes) == set(shapes.CLASSES)
    assert max(prepare.TRAIN_SHAPES, 10 ** 7) <= prepare.TEST == min(record["index"] for record in test.records)
    clouds = [{split.arrays["points"][row].tobytes() for row in range(26)} for split in prepared]
    assert len(clouds[0]) == len(clouds[1]) == 26
    assert not clouds[0] & clouds[1]


def test_shapes_fill_their_box():
    """The longest side is 1.8, and the shape is centred: nothing comes near the faces of [-1, 1]^3."""
    for index in range(26):
        points, _, _ = shapes.make(2, index).surface(20_000, np.random.default_rng(0))
        low, high = points.min(0), points.max(0)
        assert abs((high - low).max() - 1.8) < .02
        assert abs(low + high).max() < .04


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
                    without = bool(re.search(rf"without[\w ]* {noun}|without {noun}", caption))
                    assert bool(has[noun]) != without, (caption, has)
            counts = {"boards", "cushions", "legs", "engines", "layers"} & has.keys()
            for number, noun in re.findall(r"\b(one|two|three|four|five|[1-5]) (?:\w+ )?(\w+?)\b", caption):
                plural = next((count for count in counts if noun.rstrip("s") == count.rstrip("s")), None)
                assert plural is None or int(NUMBERS.get(number, number)) == has[plural], (caption, has)


def test_counts_hold_on_the_geometry():
    """Slices of the field have as many table legs and shelf boards as the captions say."""
    s = np.linspace(-.95, .95, 400)
    plane = np.stack(np.meshgrid(s, [0], s, indexing="ij"), -1).reshape(-1, 3)           # half way up
    column = np.stack([0 * s, s, 0 * s + .05], 1)                                        # clear of the back
    for number in range(0, 12 * 13, 13):
        table = shapes.make(5, number + shapes.CLASSES.index("table"))
        shelf = shapes.make(5, number + shapes.CLASSES.index("shelf"))
        assert ndimage.label(table.distance(plane).reshape(400, 400) < 0)[1] == table.attributes["legs"]
        assert ndimage.label(shelf.distance(column) < 0)[1] == shelf.attributes["boards"]


# ---------------------------------------------------------------------------- low-poly meshes

def one_hot_bins(corners):
    """Corners f 3 3 -> distributions over the bins that are sure: f 3 3 BINS."""
    return np.eye(meshes.BINS)[corners]


def closed_components(vertices, faces):
    return trimesh.Trimesh(vertices, faces, process=False).split(only_watertight=True)


@pytest.mark.parametrize("fine, most, near", [(False, 256, .11), (True, 10_000, .006)], ids=["low", "fine"])
@pytest.mark.parametrize("index", [*range(len(shapes.CLASSES)), 25], ids=[*shapes.CLASSES, "round tree"])
def test_meshes_are_closed_and_near(index, fine, most, near):
    """A low-poly mesh has at most 256 faces. Both meshes are closed, outward and near, the fine one nearer."""
    shape = shapes.make(3, index)
    vertices, faces, colours = shape.mesh(fine)
    assert len(faces) == len(colours) <= most
    components = closed_components(vertices, faces)
    assert len(components) == sum(fine or part.sides > 0 for part in shape.parts)
    assert all(component.volume > 0 for component in components)
    visible, _, _ = meshes.sample_surface(vertices, faces, 500, np.random.default_rng(0), hidden=False)
    assert abs(shape.distance(visible)).max() < near


def test_canonical_order_ignores_the_order_of_a_file():
    """Shuffled faces, rotated corners and renumbered vertices give the same sequence. Inside out is another mesh."""
    vertices, faces, colours = shapes.make(0, 2).mesh()
    canonical, rng = meshes.canonical(vertices, faces, colours), np.random.default_rng(0)
    for _ in range(3):
        rows, number = rng.permutation(len(faces)), rng.permutation(len(vertices))
        turned = np.stack([np.roll(face, rng.integers(3)) for face in faces[rows]])
        other = meshes.canonical(vertices[np.argsort(number)], number[turned], colours[rows])
        assert all(map(np.array_equal, canonical, other))
    assert not np.array_equal(meshes.canonical(vertices, faces[:, ::-1], colours)[0], canonical[0])


def test_canonical_order_walks_over_edges():
    """Each component starts at its highest vertex. Every other face is entered over an edge of an earlier face."""
    vertices, faces, colours = shapes.make(0, 2).mesh()
    corners, _, number = meshes.canonical(vertices, faces, colours)
    assert len(corners) == len(faces)
    for component in np.split(corners, np.flatnonzero(np.diff(number)) + 1):
        assert component[0, 0, 1] == component[..., 1].max()
        edges = [list(map(tuple, np.stack([face, np.roll(face, -1, 0)], 1).reshape(3, 6))) for face in component]
        assert all(tuple(np.roll(face[0], 3)) in sum(edges[:i], []) for i, face in enumerate(edges) if i)


def test_a_bulging_ball_keeps_its_order():
    """Wherever a low-poly ball bulges, its faces come in the order of the round one."""
    part = solids.ball((0, 0, 0), .6, "green", 15)
    x, faces = part.mesh(fine=False)
    names, rng = np.repeat(np.arange(len(faces))[:, None], 3, 1), np.random.default_rng(0)
    _, order, _ = meshes.canonical(x, faces, names)
    for turn in rng.uniform(0, 2 * np.pi, 8):
        centre = .35 * np.sin(turn), rng.uniform(-.3, 0), .35 * np.cos(turn)
        bulging = solids.ball(centre, .4, "green").bulge(x, part.centre)
        assert np.linalg.norm(bulging, axis=1).max() > .7
        assert np.array_equal(meshes.canonical(bulging, faces, names)[1], order)


@pytest.mark.parametrize("index", range(len(shapes.CLASSES)), ids=shapes.CLASSES)
def test_welding_closes_what_was_closed(index):
    """Single faces become closed components in their old places. With corners that are off by a bin they nearly do."""
    shape, rng = shapes.make(0, index), np.random.default_rng(0)
    corners, *_ = meshes.canonical(*shape.mesh())
    vertices, faces, unfolded = meshes.weld(one_hot_bins(corners))
    assert unfolded.all() and meshes.watertight(faces)
    assert abs(vertices[faces] - corners).max() < 1e-6
    assert len(closed_components(vertices, faces)) == sum(part.sides > 0 for part in shape.parts)
    off = (rng.random(corners.shape) < .1) * rng.integers(-1, 2, corners.shape)
    _, faces, unfolded = meshes.weld(one_hot_bins((corners + off).clip(0, meshes.BINS - 1)))
    assert meshes.closed_edges(faces) > .98
    assert unfolded.mean() > .9


def test_holes_are_closed():
    """A mesh without one face gets that face again. A closed mesh and an empty one stay as they are."""
    corners, *_ = meshes.canonical(*shapes.make(0, 12).mesh())
    _, faces, _ = meshes.weld(one_hot_bins(np.delete(corners, len(corners) // 2, 0)))
    closed = meshes.close_holes(faces)
    assert not meshes.watertight(faces) and meshes.watertight(closed)
    assert np.array_equal(closed[:-1], faces)
    assert np.array_equal(meshes.close_holes(closed), closed)
    assert len(meshes.close_holes(faces[:0])) == meshes.closed_edges(faces[:0]) == 0
    assert [len(x) for x in meshes.weld(one_hot_bins(corners[:0]))] == [0, 0, 0]


def test_unsure_corners_decide_together():
    """Two meshes 12 bins apart are about as likely. Each corner leans to one by chance. The welded mesh is closed,
    and more vertices than corners lie where the likelier mesh has them."""
    corners, *_ = meshes.canonical(*shapes.make(0, 0).mesh())
    lean = .52 + .2 * (np.random.default_rng(0).random((*corners.shape, 1)) - .5)
    share = lean * one_hot_bins(corners) + (1 - lean) * one_hot_bins(corners - 12)
    vertices, faces, unfolded = meshes.weld(share)
    assert unfolded.all() and meshes.watertight(faces)
    assert (share.argmax(-1) == corners).mean() < .65
    assert (np.round(vertices[faces]) == corners).mean() > .75


@pytest.mark.parametrize("unsure", [None, 0, 2])
def test_unsure_components_are_left_out_whole(unsure, monkeypatch):
    """If every second face of a component is unsure, the mesh has all other components. If none is, it is whole."""
    corners, _, components = meshes.canonical(*shapes.make(0, 1).mesh())                 # a chair
    head, bins = heads.MeshHead(2, 4, 64, 2), F.one_hot(torch.from_numpy(corners).flatten(1), meshes.BINS)
    exists = torch.full((1, len(corners)), 6.)
    exists[:, (components == unsure) & (np.arange(len(corners)) % 2 == 0)] = 0.
    monkeypatch.setattr(head, "logits", lambda levels: levels)
    monkeypatch.setattr(head, "forward", lambda tokens: (20. * bins[None], exists, torch.ones(*exists.shape, 3)))
    mesh, sure = head.decode(torch.zeros(8, 4), {}, None), components != unsure
    assert meshes.watertight(mesh.faces) and len(mesh.faces) == sure.sum()
    true = np.unique(meshes.bin_centres(corners[sure]).reshape(-1, 3), axis=0)
    assert abs(np.sort(mesh.vertices.ravel()) - np.sort(true.ravel())).max() < 1e-6


def test_like_components_may_come_in_any_order(prepared):
    """The canonical order is right, and that of two legs swapped. A head without an opinion gets the canonical one."""
    batch = prepared[0].faces([1])                                                       # a chair
    corners, components = batch["corners"].flatten(2), batch["components"]
    sizes = components[components >= 0].bincount().tolist()
    first = next(i for i in range(len(sizes) - 1) if sizes[i] == sizes[i + 1])
    start, size, rows = sum(sizes[:first]), sizes[first], torch.arange(training_samples.FACES)
    swapped = rows.clone()
    swapped[start:start + 2 * size] = rows[start:start + 2 * size].roll(size)
    for order in (rows, swapped):
        logits = 5. * F.one_hot(corners[:, order].clamp(min=0), meshes.BINS)
        assert torch.equal(meshes.match_like_components(logits, corners, components)[0], order)
    assert torch.equal(meshes.match_like_components(0 * logits, corners, components)[0], rows)


def test_mesh_head_learns_from_tokens_between_two_shapes(prepared, monkeypatch):
    """Training moves tokens towards the most similar shape of the batch, and never past the middle."""
    torch.manual_seed(0)
    head, inputs = heads.MeshHead(4, 16, 64, 2), []
    tokens = torch.tensor([0., 1., 3.])[:, None, None].expand(3, 64, 16)
    monkeypatch.setattr(head, "forward", lambda x: inputs.append(x) or heads.MeshHead.forward(head, x))
    for _ in range(20):
        head.loss(tokens, prepared[0].faces([0, 1, 2]))
    share = (torch.stack(inputs) - tokens)[..., 0, 0] / torch.tensor([1., -1., -2.])     # towards 1, 0 and 1
    assert 0 <= share.min() < .01
    assert .4 < share.max() < .5


@pytest.mark.parametrize("vertices, faces, complaint", [
    (np.eye(3), np.zeros((0, 3), int), "no faces"), (np.eye(3) * np.nan, [[0, 1, 2]], "NaN"),
    (np.eye(3), [[1, 2, 3]], "has vertex 3"), (np.eye(3) * 1e-6, [[0, 1, 2]], "larger than a bin")])
def test_bad_meshes_are_one_line(vertices, faces, complaint):
    """No faces, missing vertices, vertices that are not numbers, a mesh in one bin."""
    with pytest.raises(UserError, match=complaint):
        meshes.canonical(vertices, np.array(faces), np.ones((len(faces), 3)))


def test_repeated_faces_are_dropped():
    """Of three faces one is degenerate and one is repeated from another corner."""
    corners, _, _ = meshes.canonical(np.eye(3), np.array([[0, 1, 2], [1, 2, 0], [0, 1, 1]]), np.ones((3, 3)))
    assert len(corners) == 1


def test_large_meshes_are_simplified():
    """A ball of 1280 faces becomes one of at most 256, no farther out than it was."""
    ball = trimesh.creation.icosphere(3, .8)
    colours = np.random.default_rng(0).random((len(ball.faces), 3))
    points, few, paint = meshes.simplify_to(np.array(ball.vertices), np.array(ball.faces), colours, 256)
    assert 200 < len(few) == len(paint) <= 256
    assert abs(np.linalg.norm(points, axis=1) - .8).max() < .1
    assert (abs(points) <= abs(ball.vertices).max(0)).all()


# ---------------------------------------------------------------------------- data

@pytest.mark.parametrize("name", ["points.npy", "surface-00000.json"])
def test_damaged_cache_is_one_line(prepared, name, tmp_path):
    """A file that is cut short is named as such, with what to do."""
    folder = shutil.copytree(prepared[1].folder, tmp_path / "set")
    (folder / name).write_bytes((folder / name).read_bytes()[:500])
    with pytest.raises(UserError, match="delete it"):
        data.Prepared(folder, prepared[1].source, ["surface"])


@pytest.fixture
def in_threads(monkeypatch):
    """Preparation in threads, which see all patches; a thread can neither ignore Ctrl-C nor take signals."""
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(prepare, "start_worker", lambda parent: None)
    monkeypatch.setattr(mesh_files, "limit", lambda seconds: contextlib.nullcontext())


def test_interrupted_preparation_resumes(tmp_path, monkeypatch, in_threads):
    """Killed in the middle of a chunk and started again = never interrupted, byte by byte."""
    monkeypatch.setattr(prepare, "CHUNK", 3)
    whole = data.prepare("train", 8, tmp_path / "whole", workers=1)
    take_surface = training_samples.take_surface

    def stop_at_fifth(shape, rng):
        if rng.bit_generator.seed_seq.entropy == (0, 4, 1):
            raise InterruptedError
        return take_surface(shape, rng)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setitem(training_samples.TAKE, "surface", stop_at_fifth)
        data.prepare("train", 8, tmp_path / "cut", workers=1)
    cut = tmp_path / "cut" / whole.folder.name
    assert (cut / "surface-00000.json").is_file() and not (cut / "surface-00001.json").is_file()
    assert len(data.prepare("train", 8, tmp_path / "cut", workers=1)) == 8 and same_files(whole.folder, cut)


def test_other_shapes_are_another_set(monkeypatch):
    """One part of one shape that looks different changes the fingerprint."""
    make, fingerprint = shapes.make, prepare.fingerprint.__wrapped__        # not the cached one
    first, second = fingerprint(), fingerprint()

    def changed(seed, index):
        shape = make(seed, index)
        shape.parts[0].sides += index == 100
        return shape

    monkeypatch.setattr(shapes, "make", changed)
    assert first == second != fingerprint()


# ---------------------------------------------------------------------------- shapes of files

def sheets():
    """An open box of five sheets, two of them inside out, with a hidden ball inside and a ball on top."""
    box, turned = trimesh.creation.box((1, 1, 1)), np.array([2, 3, 8, 9])
    faces = np.asarray(box.faces)[np.asarray(box.face_normals)[:, 1] > -.5].copy()
    faces[turned] = faces[turned, ::-1]
    above, inside = trimesh.creation.icosphere(2, .3), trimesh.creation.icosphere(2, .2)
    above.apply_translation((0, .7, 0))
    return trimesh.util.concatenate([trimesh.Trimesh(box.vertices, faces, process=False), above, inside])


def white_soup(vertices, faces):
    return soup.Soup(np.asarray(vertices), np.asarray(faces), np.ones((len(faces), 3)))


def test_soup_is_a_solid():
    """A ball with every other face inside out and a hidden box: distances are those of the ball and its skin."""
    ball, inner = trimesh.creation.icosphere(4, .8), trimesh.creation.box((.3, .3, .3))
    faces = np.asarray(ball.faces).copy()
    faces[::2] = faces[::2, ::-1]
    both = trimesh.util.concatenate([trimesh.Trimesh(ball.vertices, faces, process=False), inner])
    solid = white_soup(both.vertices, both.faces)
    x = np.random.default_rng(0).uniform(-1, 1, (2000, 3))
    true = np.linalg.norm(x, axis=1) - .8 - soup.SKIN
    near = abs(true) < .2
    assert abs(solid.distance(x[near]) - true[near]).max() < .006
    assert (solid.distance(x[~near]) * true[~near] > 0).all()
    points, normals, _ = solid.surface(500, np.random.default_rng(0))
    assert abs(np.linalg.norm(points, axis=1) - .8 - soup.SKIN).max() < .006
    assert ((points * normals).sum(1) > .75).all()


def test_open_sheets_become_solid():
    """A box without a bottom is hollow, and its walls are solid."""
    mesh = sheets()
    solid = white_soup(mesh.vertices, mesh.faces)
    inside = np.array([(.5, 0, 0), (0, .5, .1), (0, .7, 0)])              # a wall, the top, the ball on top
    assert (solid.distance(inside) < 0).all()
    assert (solid.distance(np.array([(.3, 0, .3), (.6, 0, 0)])) > 0).all()


def test_a_flat_square_is_a_thin_solid():
    """Its mesh is closed and as thick as two skins. Edge on, a picture shows nothing."""
    square = np.array([[-.5, 0, -.5], [.5, 0, -.5], [.5, 0, .5], [-.5, 0, .5]])
    solid = white_soup(square, [[0, 1, 2], [0, 2, 3]])
    vertices, faces, _ = solid.mesh()
    assert meshes.watertight(faces)
    assert abs(np.ptp(vertices, 0) - [1, 0, 1] - 2 * soup.SKIN).max() < .02
    assert (training_samples.take_faces(solid, np.random.default_rng(0))["components"] >= 0).sum() > 10
    pictures = training_samples.draw_pictures(solid, [(0, 30), (0, 0)])
    assert [coverage.any() for coverage in pictures["picture_coverage"]] == [True, False]


def test_a_mesh_needs_distances_only_near_the_surface():
    """`side` is right only near the surface, and gives the same mesh as `distance`."""
    mesh = sheets()
    solid = white_soup(mesh.vertices, mesh.faces)
    assert all(map(np.array_equal, soup.surface_of(solid.side), soup.surface_of(solid.distance)))


def library(path, models, entries):
    """A Sweet Home 3D library of these files and catalogue lines."""
    lines = [f"{key}#{i}={value}" for i, entry in enumerate(entries, 1) for key, value in entry.items()]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(["license=CC0", *lines]).encode("latin-1"))
        for name, content in models.items():
            archive.writestr(name, content)
    return path


def test_library_is_read(tmp_path, capsys):
    """Name, licence, author, rotation, icon and the colour of a material; a broken entry is skipped with the reason."""
    box, icon = trimesh.creation.box((1, 2, 3)), io.BytesIO()
    Image.new("RGBA", (32, 32), (255, 0, 0, 255)).save(icon, "png")
    files = {"a/box.obj": "mtllib some.mtl\nusemtl red\n" + trimesh.exchange.obj.export_obj(box),
             "a/some.mtl": "newmtl red\nKd 1 0 0\n", "a/box.png": icon.getvalue()}
    good = {"name": "Caf\u00e9 tableTop 2", "model": "/a/box.obj", "icon": "/a/box.png", "creator": "Ann",
            "modelRotation": "1 0 0 0 0 1 0 -1 0"}
    skips = [{"model": "/../box.obj"}, {"model": "/a/none.obj"}, {"model": "/a/box.png"}]
    unreadable = good | {"modelRotation": "one turn"}
    items, skipped = real.list_items(library(tmp_path / "some.sh3f", files, [good, *skips, unreadable]))
    shape = mesh_files.shape(items[0])
    assert (items[0].captions, items[0].licence, items[0].author) == (["caf\u00e9 table top", "top"], "CC0", "Ann")
    assert shape.icon.shape == (32, 32, 4) and (shape.colours == [1, 0, 0]).all()
    assert np.allclose(np.ptp(shape.vertices, 0), np.array([1, 3, 2]) / 3 * mesh_files.LONGEST, atol=1e-4)
    reasons = [re.search(r"outside|has no|none of", reason)[0] for _, reason in skipped]
    assert reasons == ["outside", "has no", "none of"]
    with pytest.raises(UserError, match="cannot be read"):
        mesh_files.shape(items[1])
    assert run(real.main, tmp_path / "some.sh3f") == 0 and "\n2 shapes, CC0, by Ann\n" in capsys.readouterr().out


def test_a_caption_names_something():
    """Sizes are left out of names, and captions that fit any shape are left out."""
    assert real.tidy("Bookcase_45x160") == "bookcase"
    assert real.Item("", "", captions=["3D model", "car model", "car model", "???", "model"]).captions == ["car model"]
    assert real.Item("", "", captions=["a model"]).captions == ["shape"]


def test_folder_is_read(tmp_path):
    """Captions from a table, a text beside the mesh, ShapeNet's numbers or the names; a broken table is one line."""
    for path in ("chairs/one.obj", "chairs/two.ply", "03001627/ab12/models/model_normalized.obj", "lamp_7.stl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        trimesh.creation.box((1, 1, 1)).export(tmp_path / path)
    table = 'file,caption\nchairs/one.obj,"a ""red"", chair"\nchairs/one.obj,a caf\xe9 chair\nnone.obj,x\n\n'
    (tmp_path / "captions.csv").write_bytes(table.encode("latin-1"))
    (tmp_path / "chairs" / "two.txt").write_text("a blue chair\n")
    (tmp_path / "picture.tiff").write_bytes(b"")
    items, skipped = real.list_items(tmp_path)
    assert {item.key: item.captions for item in items} == {
        "chairs/one.obj": ['a "red", chair', "a caf\xe9 chair", "chairs"], "chairs/two.ply": ["a blue chair", "chairs"],
        "03001627/ab12/models/model_normalized.obj": ["chair"], "lamp_7.stl": ["lamp"]}
    assert sorted(name for name, _ in skipped) == ["none.obj", "picture.tiff"]
    for table, fault in (('chairs/one.obj,"a chair\nlamp_7.stl,a lamp\n', "is a quote open"),
                         ("lamp_7.stl;a lamp\n", "no line of file,caption")):
        (tmp_path / "captions.csv").write_text(table)
        with pytest.raises(UserError, match=fault):
            real.list_items(tmp_path)


def broken_files():
    """Files that are no shapes: name -> content and the expected reason, a regular expression."""
    header = {"asset": {"version": "2.0"}, "extensionsRequired": ["KHR_draco_mesh_compression"]}
    return {"cut.glb": (trimesh.creation.box((1, 1, 1)).export(file_type="glb")[:200], "cannot be read"),
            "draco.gltf": (json.dumps(header).encode(), "compressed"),
            "empty.obj": (b"# nothing\n", "read|triangles"),
            "nan.obj": (b"v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n", "not finite"),
            "other.stl": (b"\x89PNG\r\n\x1a\n not a mesh at all", "read|triangles|finite|area"),
            "flat.off": (b"OFF\n3 1 0\n0 0 0\n1 1 1\n2 2 2\n3 0 1 2\n", "without area"),
            "point.obj": (b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "single point")}


def test_broken_files_are_skipped(tmp_path, capsys, monkeypatch):
    """Broken files are named with the reason, good ones are prepared; two files of one name in two folders are two."""
    source = tmp_path / "source"
    for folder in ("one", "two"):
        (source / folder).mkdir(parents=True)
        trimesh.creation.icosphere(2).export(source / folder / "ball.obj")
    broken = broken_files()
    for name, (content, _) in broken.items():
        (source / name).write_bytes(content)
    flags = ("--data", source, "--out", tmp_path / "cache", "--picture", tmp_path / "sheet.png", "--workers", 1)
    assert run(data.main, *flags) == 0
    assert "7 of 9 shapes" in capsys.readouterr().out and (tmp_path / "sheet.png").is_file()
    table = next((tmp_path / "cache").glob("*/skipped.csv"))
    with table.open() as file:
        reasons = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons.keys() == broken.keys()
    assert all(re.search(broken[name][1], reason) for name, reason in reasons.items()), reasons

    monkeypatch.setattr(prepare.Files, "in_split", lambda self, record: True)    # nothing is held out
    split = data.prepare(out=tmp_path / "cache", kinds=("surface", "pictures"), data=source, workers=1)
    points, _, _ = split.cloud(np.array([1]), 100, np.random.default_rng(0))
    assert split.classes == ["one", "two"] and points.norm(dim=-1).min() > .89
    monkeypatch.setitem(training_samples.TAKE, "surface", lambda *_: 1 / 0)
    prepare.prepare_chunk(split.folder, split.source, 0, ["surface"])
    again = data.Prepared(split.folder, split.source, ["surface"])
    assert "(ZeroDivisionError: division by zero)" in again.broken["one/ball.obj"]


def test_files_are_judged_by_their_own_samples(tmp_path, monkeypatch):
    """A head that gives the true distances is right at the queries of a row, also if an earlier file was left out."""
    monkeypatch.setattr(judges, "grid_iou", lambda *_: 1.)          # slow, and it does not read the samples
    for i in range(4):
        trimesh.creation.box((1, 1, 1 + i)).export(tmp_path / f"box{i}.obj")
    (tmp_path / "a.obj").write_text("v 1 2 3")
    split = data.prepare("train", out=tmp_path / "cache", data=tmp_path, workers=1)
    assert len(split) > 1 and (split.rows > np.arange(len(split))).all()
    heads = {"sdf": TrueHead(split.shape(0))}
    assert judges.judge_sdf(heads, torch.zeros(1, 1), split, 0, None, contextlib.nullcontext, 0)["L1"] < .01


def test_file_that_crashes_its_loader(tmp_path):
    """A crash in somebody's C code costs that file alone."""
    (tmp_path / "source").mkdir()
    for name in ("a", "b", "c"):
        trimesh.creation.box((1, 1, 1)).export(tmp_path / "source" / f"{name}.obj")
    code = ("import os, data; from geometry import mesh_files; shape = mesh_files.shape\n"
            "mesh_files.shape = lambda item, copy: os.abort() if 'b.obj' in item.key else shape(item, copy)\n"
            f"print(data.prepare(out='{tmp_path}/cache', data='{tmp_path}/source', workers=1).broken)")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert "{'b.obj': 'the loader crashed twice on this file'}" in done.stdout, done.stderr


def test_file_that_takes_too_long(tmp_path, monkeypatch):
    """A loader that never ends is stopped."""
    monkeypatch.setattr(mesh_files, "SECONDS", 1)
    monkeypatch.setattr(mesh_files, "load_meshes", lambda *_: time.sleep(30))
    trimesh.creation.box((1, 1, 1)).export(tmp_path / "box.obj")
    with pytest.raises(UserError, match="more than 1 seconds"):
        mesh_files.shape(real.list_items(tmp_path)[0][0])


@pytest.mark.parametrize("make, complaint", [
    (lambda path: None, "there is no"), (lambda path: path.mkdir(), "holds no shapes"),
    (lambda path: path.write_bytes(b"no zip"), "no Sweet Home 3D library")])
def test_bad_data_is_one_line(make, complaint, tmp_path, capsys):
    """A path that does not exist, an empty folder, a library that is no ZIP file."""
    path = tmp_path / "some.sh3f"
    make(path)
    assert run(data.main, "--data", path, "--out", tmp_path / "cache") == 2
    assert_one_line(capsys.readouterr().err, complaint)


def test_shards_are_the_whole(tmp_path, monkeypatch, in_threads):
    """Two shares prepared one after the other = all at once; the first alone lacks the shapes of the other."""
    monkeypatch.setattr(prepare, "CHUNK", 2)
    source = tmp_path / "source"
    source.mkdir()
    for i in range(4):
        trimesh.creation.box((1, 1 + i, 1)).export(source / f"box{i}.obj")
    arguments = dict(data=source, workers=1)
    whole = data.prepare(out=tmp_path / "whole", **arguments)
    second = data.prepare(out=tmp_path / "shares", shard=(1, 2), **arguments)
    both = data.prepare(out=tmp_path / "shares", shard=(0, 2), **arguments)
    assert len(second) <= 2 and same_files(whole.folder, both.folder)
    assert not len(data.prepare(out=tmp_path / "none", shard=(2, 3), **arguments))         # a share without a chunk
    held_out = data.prepare("test", out=tmp_path / "whole", **arguments)
    assert held_out.folder == whole.folder and held_out.name != whole.name       # one folder; caches have the name
    assert len(held_out) + len(whole) == 4 and not set(held_out.rows) & set(whole.rows)


def test_too_few_files_to_train_on(tmp_path, capsys):
    """One file leaves nothing to hold out."""
    trimesh.creation.box((1, 1, 1)).export(tmp_path / "box.obj")
    flags = ("--data", tmp_path / "box.obj", "--cache", tmp_path / "cache", "--out", tmp_path / "run")
    assert run(train.main, *flags) == 2
    assert_one_line(capsys.readouterr().err.split("\n")[-2], "two of each are needed")


def test_batches_are_functions_of_their_generator(prepared):
    """The same generator gives the same batch; the distances in it are those of the shapes in its rows."""
    split, rows = prepared[0], np.array([3, 20])
    batch, again, other = (split.queries(rows, 640, np.random.default_rng(seed)) for seed in (0, 0, 1))
    points, normals, colours = split.cloud(rows, 1024, np.random.default_rng(0))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["queries"], other["queries"])
    for i, row in enumerate(rows):
        shape = split.shape(row)
        assert abs(shape.distance(batch["queries"][i].numpy()) - batch["distance"][i].numpy()).max() < 1e-3
        assert abs(shape.distance(points[i].numpy())).max() < 2e-3          # points are stored in half precision
    assert (normals.norm(dim=-1) - 1).abs().max() < .02 and 0 <= colours.min() <= colours.max() <= 1


# ---------------------------------------------------------------------------- distances -> a mesh

SHAPE_GRIDS = {"chair-64": (1, 64), "mug-64": (8, 64), "shelf-64": (5, 64), "lamp-128": (3, 128)}


@pytest.mark.parametrize("index, resolution", SHAPE_GRIDS.values(), ids=SHAPE_GRIDS)
def test_hierarchical_is_dense(index, resolution):
    """A grid refined near the surface gives the same mesh as a dense one: closed, outward, of the right volume."""
    shape = shapes.make(6, index)
    head = TrueHead(shape)
    fine, dense = (surface.extract(head, torch.zeros(1, 1), resolution, hierarchical=h) for h in (True, False))
    assert all(map(np.array_equal, fine, dense))
    vertices, faces, colours = fine
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    inside = (shape.distance(networks.grid_points(64).numpy()) < 0).mean() * 8
    assert len(faces) > 1000
    assert mesh.is_watertight and mesh.is_winding_consistent
    assert abs(mesh.volume / inside - 1) < .05
    assert abs(shape.distance(vertices)).max() < .03
    assert 0 <= colours.min() <= colours.max() <= 1


def test_cut_cells_have_corners_on_both_sides():
    inside = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(0)) < .1
    corners = [slice(i, i + 2) for i in range(6)]
    true = torch.zeros_like(inside)
    for cell in ((x, y, z) for x in corners[:4] for y in corners[:5] for z in corners):
        true[cell] |= inside[cell].any() & ~inside[cell].all()
    assert torch.equal(surface.corners_of_cut_cells(inside), true)
    assert true.any() and not true.all()


@pytest.mark.parametrize("sign, full", [(-1., True), (1., False)], ids=["inside", "outside"])
def test_nothing_leaves_the_cube(sign, full):
    """A field that is inside everywhere gives a closed mesh, one that is outside everywhere an empty one."""
    head = TrueHead(None)
    head.evaluate = lambda memory, x: torch.full((1, x.shape[1], 4), sign)
    fine, dense = (surface.extract(head, torch.zeros(1, 1), 64, hierarchical=h) for h in (True, False))
    assert all(map(np.array_equal, fine, dense))
    assert meshes.watertight(fine[1]) == full == (len(fine[1]) > 0)


# ---------------------------------------------------------------------------- pictures and files

def ball(radius=.7):
    shape = shapes.Shape("ball", [shapes.ball((0, 0, 0), radius, "red")], {}, [])
    return surface.extract(TrueHead(shape), torch.zeros(1, 1), 32)


def test_glb_round_trip(tmp_path):
    """Vertices and faces are read exactly, colours to five decimals; other readers open it; same mesh, same bytes."""
    vertices, faces, _ = ball()
    colours = np.random.default_rng(0).random(vertices.shape, np.float32)
    for name in "ab":
        export.write_glb(tmp_path / f"{name}.glb", vertices, faces, colours)
    assert (tmp_path / "a.glb").read_bytes() == (tmp_path / "b.glb").read_bytes()
    again = export.read_shape(tmp_path / "a.glb")
    assert np.array_equal(again.vertices, vertices) and np.array_equal(again.faces, faces)
    assert abs(again.colours - colours).max() < 1e-5
    assert trimesh.load(tmp_path / "a.glb", force="mesh").is_watertight
    with pytest.raises(UserError, match="ends in .glb"):
        export.write_glb(tmp_path / "a.obj", vertices, faces, colours)


def test_glb_of_others(tmp_path):
    """Colours in 8 bits are the same colours. A mesh without colours, two meshes, bad vertices: one line each."""
    vertices, faces, colours = ball()
    linear = (255 * to_linear(torch.from_numpy(colours))).round().byte().numpy()
    export.write_glb(tmp_path / "ours.glb", vertices, faces, colours)
    for scale, name in ((1, "theirs"), (np.nan, "nan"), (9, "far")):
        mesh = trimesh.Trimesh(vertices * scale, faces, vertex_colors=linear, process=False)
        mesh.export(tmp_path / f"{name}.glb")
    trimesh.Trimesh(vertices, faces, process=False).export(tmp_path / "grey.glb")
    trimesh.Scene([trimesh.Trimesh(vertices + i, faces) for i in range(2)]).export(tmp_path / "two.glb")
    export.Mesh(vertices, faces, colours, smooth=False).save(tmp_path / "flat.glb")
    export.write_glb(tmp_path / "thin.glb", vertices * [1, 0, 0], faces, colours)

    ours, theirs = export.read_shape(tmp_path / "ours.glb"), export.read_shape(tmp_path / "theirs.glb")
    assert abs(ours.colours - theirs.colours).max() < .02
    assert ours.smooth and not export.read_shape(tmp_path / "flat.glb").smooth
    for name, complaint in (("grey", "no vertex colours"), ("two", "holds 2 meshes"), ("nan", "not finite"),
                            ("far", "reaches to"), ("none", "cannot read"), ("thin", "no area")):
        with pytest.raises(UserError, match=complaint):
            export.read_shape(tmp_path / f"{name}.glb")


def gaussians(count, seed=0):
    """Of all kinds: needles, discs, nearly opaque and nearly clear, some outside the picture."""
    rng = np.random.default_rng(seed)
    arrays = (rng.uniform(-1.2, 1.2, (count, 3)), np.exp(rng.uniform(-5, -1.5, (count, 3))),
              rng.standard_normal((count, 4)), rng.uniform(.02, .99, count), rng.random((count, 3)))
    return [torch.from_numpy(x.astype(np.float32)) for x in arrays]


def saved_gaussians(path, count):
    """Gaussians in a file -> Gaussians."""
    means, scales, rotations, opacities, colours = (x.numpy() for x in gaussians(count))
    rotations /= np.linalg.norm(rotations, axis=1, keepdims=True)
    g = export.Gaussians(means, scales, rotations, opacities, colours)
    g.save(path)
    return g


def splat_by_pixel(means, scales, rotations, opacities, colours, azimuth, elevation, size, background):
    """Every Gaussian at every pixel, in float64, by the formulas of the paper, not by geometry/render.py."""
    a, e = np.radians([azimuth, elevation])
    view = np.array([[np.cos(a), 0, -np.sin(a)], [-np.sin(a) * np.sin(e), np.cos(e), -np.cos(a) * np.sin(e)],
                     [np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)]])
    focal, image = render.EYE / render.HALF * size / 2, np.tile(np.asarray(background, float), (size, size, 1))
    x = means @ view.T
    pixels = np.stack(np.mgrid[:size, :size][::-1], -1) + .5       # size size 2: x, y
    for i in np.argsort(x[:, 2]):                                  # far to near: each covers those behind it
        (u, v), distance = x[i, :2], render.EYE - x[i, 2]
        centre = size / 2 + focal * np.array([u, -v]) / distance
        jacobian = focal / distance * np.array([[1, 0, u / distance], [0, -1, -v / distance]]) @ view
        rotation = Rotation.from_quat(rotations[i][[1, 2, 3, 0]]).as_matrix()
        covariance = jacobian @ rotation @ np.diag(scales[i] ** 2) @ rotation.T @ jacobian.T + .3 * np.eye(2)
        offset, inverse = pixels - centre, np.linalg.inv(covariance)
        alpha = opacities[i] * np.exp(-.5 * np.einsum("yxi,ij,yxj->yx", offset, inverse, offset))
        alpha = np.minimum(alpha, .99)[..., None]
        image = alpha * colours[i] + (1 - alpha) * image
    return image


def test_splatting_is_the_formula():
    """By tiles = one Gaussian after the other over every pixel, whatever the number of tiles at a time."""
    g = gaussians(60)
    true = splat_by_pixel(*(x.double().numpy() for x in g), 40, 25, 40, (.2, .5, 1.))
    for tiles in (1, 4, 100):
        error = abs(render.splat(*g, 40, 25, 40, (.2, .5, 1.), tiles).numpy() - true)
        assert error.max() < .02 and error.mean() < 1e-3           # splat draws nothing beyond 3 sigma


def test_splatting_has_true_gradients(monkeypatch):
    """The gradient of every input = finite differences, in double precision."""
    monkeypatch.setattr(render, "TILE", 8)
    g = [x.double().requires_grad_() for x in gaussians(4, seed=3)]
    with torch.no_grad():
        g[1].clamp_(min=.15)                                       # wide: their rim at 3 sigma lies outside the picture
    monkeypatch.setattr(render, "view_rotation", lambda *angles: view_rotation(*angles).double())
    assert torch.autograd.gradcheck(lambda *g: render.splat(*g, 40, 25, 6), g, eps=1e-6, atol=1e-4)


def test_gaussians_round_trip(tmp_path):
    """The 3DGS layout: we read the same values and draw the same picture; another reader reads the same values."""
    g = saved_gaussians(tmp_path / "g.ply", 300)
    again = export.read_shape(tmp_path / "g.ply")
    for name in ("means", "scales", "rotations", "opacities", "colours"):
        assert abs(getattr(again, name) - getattr(g, name)).max() < 1e-5
    assert abs(g.picture(64).astype(int) - again.picture(64)).max() <= 1
    other = trimesh.load(tmp_path / "g.ply").metadata["_ply_raw"]["vertex"]["data"]
    names = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
    assert list(other.dtype.names) == names and np.array_equal(other["x"].ravel(), g.means[:, 0])
    assert np.allclose(1 / (1 + np.exp(-other["opacity"].ravel())), g.opacities, atol=1e-5)
    assert np.allclose(np.exp(other["scale_1"].ravel()), g.scales[:, 1], rtol=1e-5)
    assert np.allclose(other["f_dc_2"].ravel() * .28209479 + .5, g.colours[:, 2], atol=1e-5)


def test_cloud_round_trip(tmp_path):
    """Points, normals and 8-bit colours, as we and another reader read them."""
    rng = np.random.default_rng(0)
    cloud = export.Cloud(*(rng.random((50, 3)).astype(np.float32) for _ in range(3)))
    cloud.save(tmp_path / "c.ply")
    again, other = export.read_shape(tmp_path / "c.ply"), trimesh.load(tmp_path / "c.ply")
    assert np.array_equal(again.points, cloud.points) and np.array_equal(again.normals, cloud.normals)
    assert np.array_equal(other.vertices.astype(np.float32), cloud.points)
    assert np.array_equal(other.colors[:, :3], np.round(cloud.colours * 255))
    assert abs(again.colours - cloud.colours).max() < .002


@pytest.mark.parametrize("damage, complaint", [
    (lambda b: b.replace(b"f_dc_1", b"f_no_1"), "has no f_dc_1"),
    (lambda b: b.replace(b"binary_little_endian", b"ascii"), "only binary"),
    (lambda b: b[:-4] + np.float32(np.nan).tobytes(), "not finite"), (lambda b: b[:-1], "truncated"),
    (lambda b: b[3:], "not a PLY"), (lambda b: b"", "not a PLY"),
    (lambda b: b.replace(b"element vertex", b"element edges "), "not 'vertex'"),
    (lambda b: re.sub(rb"vertex \d+", b"vertex -5", b), "not 'vertex'"),
    (lambda b: re.sub(rb"vertex \d+", b"vertex 0", b), "no points")])
def test_bad_ply_is_one_line(damage, complaint, tmp_path):
    """Missing fields, ASCII, NaN, truncated, another kind of file."""
    saved_gaussians(tmp_path / "g.ply", 5)
    (tmp_path / "bad.ply").write_bytes(damage((tmp_path / "g.ply").read_bytes()))
    with pytest.raises(UserError, match=complaint):
        export.read_shape(tmp_path / "bad.ply")


def test_contact_sheet_holds_every_picture(tmp_path):
    """Five pictures in three columns: the size is as computed, each picture is found in its place, also in the file."""
    pictures = [np.full((32, 32, 3), 40 * i, np.uint8) for i in range(5)]
    sheet = render.contact_sheet(pictures, 3)
    assert sheet.shape == (2 * 36 + 4, 3 * 36 + 4, 3)
    for i, picture in enumerate(pictures):
        y, x = 4 + i // 3 * 36, 4 + i % 3 * 36
        assert (sheet[y:y + 32, x:x + 32] == picture).all()
    render.save_png(tmp_path / "sheet.png", sheet)
    assert (np.asarray(Image.open(tmp_path / "sheet.png")) == sheet).all()
    assert render.contact_sheet(pictures, 3, labels=list("abcde")).shape[0] > sheet.shape[0]
