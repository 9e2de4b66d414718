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
from types import SimpleNamespace

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
from engine import files, networks
from engine.commands import UserError
from evaluation import judges
from geometry import export, mesh_files, meshes, prepare, real, render, shapes, solids, soup, surface, training_samples

# ---------------------------------------------------------------------------- shapes

@pytest.mark.parametrize("index", range(len(shapes.CLASSES)), ids=shapes.CLASSES)
def test_distance_is_that_to_the_surface(index):
    """The field = a search among 200,000 samples of the visible surface (.006 apart), in size and in sign."""
    shape, rng = shapes.make(3, index), np.random.default_rng(0)
    points, normals, _ = shape.surface(200_000, rng)
    x = (points[:3000] + rng.normal(0, .06, (3000, 3))).astype(np.float32)
    field, (distance, nearest) = shape.distance(x), cKDTree(points).query(x)
    deep = field < 1e-4 - solids.TRUNCATION                          # here the field is only a bound
    error = abs(abs(field) - distance)[~deep]
    assert error.mean() < .002 and np.quantile(error, .99) < .008 and error.max() < .04
    assert (distance[deep] > solids.TRUNCATION - .02).all() and (field[~deep] < 0).sum() > 500
    side = ((x - points[nearest]) * normals[nearest]).sum(1)            # which side of the nearest sample
    clear = abs(side) > .7 * distance
    assert clear.mean() > .9 and ((side > 0) == (field > 0))[clear].mean() > .999


@pytest.mark.parametrize("index", range(len(shapes.CLASSES)), ids=shapes.CLASSES)
def test_surface_points_lie_on_the_surface(index):
    """distance = 0 at surface points, and their normals = its gradient, but for creases; their colours are parts'."""
    shape = shapes.make(4, index)
    points, normals, colours = shape.surface(2000, np.random.default_rng(0))
    assert abs(shape.distance(points)).max() < 1e-4 and len(points) == 2000
    step = .002
    rise = np.stack([shape.distance(points + d) - shape.distance(points - d) for d in step * np.eye(3, dtype=np.float32)], 1)
    assert ((rise / (2 * step) * normals).sum(1) > .98).mean() > .9
    assert {tuple(c) for c in colours} <= {tuple(np.float32(c)) for c in shape.palette}


def test_shapes_are_functions_of_seed_and_index():
    """The same (seed, index) is the same shape to the bit; another seed or index is another."""
    x = np.random.default_rng(0).uniform(-1, 1, (500, 3))
    one, again, *others = [shapes.make(*key) for key in ((0, 5), (0, 5), (1, 5), (0, 18))]
    assert one.captions == again.captions and (one.distance(x) == again.distance(x)).all()
    assert all((one.distance(x) != other.distance(x)).mean() > .5 for other in others)


def test_train_and_test_never_meet(prepared):
    """Every class is in both sets, and no shape is."""
    training, test = prepared
    assert set(training.classes) == set(test.classes) == set(shapes.CLASSES)
    assert max(prepare.TRAIN_SHAPES, 10 ** 7) <= prepare.TEST == min(row["index"] for row in test.text)
    looks = [{split.arrays["points"][i].tobytes() for i in range(26)} for split in prepared]
    assert len(looks[0]) == len(looks[1]) == 26 and not looks[0] & looks[1]


def test_shapes_fill_their_box():
    """The longest side is 1.8, centred, so nothing comes near the faces of [-1, 1]^3."""
    for index in range(26):
        points, _, _ = shapes.make(2, index).surface(20_000, np.random.default_rng(0))
        low, high = points.min(0), points.max(0)
        assert abs((high - low).max() - 1.8) < .02 and abs(low + high).max() < .04


def test_captions_say_what_was_built():
    """All lowercase, class name first; arms, engines and the like are named exactly where the shape has them."""
    for index in range(520):
        shape = shapes.make(1, index)
        has = shape.attributes
        assert shape.captions[0] == shape.name and len(set(shape.captions)) == len(shape.captions) >= 5
        for caption in shape.captions:
            assert caption == caption.lower()
            for thing in ("arms", "handle", "label", "stripe", "footboard", "engines"):
                if re.search(rf"\b{thing}\b", caption):
                    without = bool(re.search(rf"without[\w ]* {thing}|without {thing}", caption))
                    assert bool(has[thing]) != without, (caption, has)
            counts = {"boards", "cushions", "legs", "engines", "layers"} & has.keys()
            for number, thing in re.findall(r"\b(one|two|three|four|five|[1-5]) (?:\w+ )?(\w+?)\b", caption):
                plural = next((c for c in counts if thing.rstrip("s") == c.rstrip("s")), None)
                assert plural is None or int(shapes.NUMBERS.get(number, number)) == has[plural], (caption, has)


def test_counts_hold_on_the_geometry():
    """Legs of tables and boards of shelves, counted on slices of the field = what the captions say."""
    s = np.linspace(-.95, .95, 400)
    plane, column = np.stack(np.meshgrid(s, [0], s, indexing="ij"), -1).reshape(-1, 3), np.stack([0 * s, s, 0 * s + .05], 1)
    for number in range(0, 12 * 13, 13):
        table, shelf = shapes.make(5, number + shapes.CLASSES.index("table")), shapes.make(5, number + shapes.CLASSES.index("shelf"))
        plane[:, 1] = 0                                                 # half way up
        assert ndimage.label(table.distance(plane).reshape(400, 400) < 0)[1] == table.attributes["legs"]
        assert ndimage.label(shelf.distance(column) < 0)[1] == shelf.attributes["boards"]    # clear of the back


# ---------------------------------------------------------------------------- low-poly meshes

@pytest.mark.parametrize("index", [*range(len(shapes.CLASSES)), 25], ids=[*shapes.CLASSES, "round tree"])
def test_low_poly_meshes_are_closed_and_near(index):
    """At most 256 faces, closed, outward, near the shape; the fine mesh is nearer."""
    shape = shapes.make(3, index)
    own = sum(part.sides > 0 for part in shape.parts)
    for (vertices, faces, colours), count, most, near in ((shape.mesh(), own, 256, .11), (shape.mesh(fine=True), len(shape.parts), 10_000, .006)):
        parts = trimesh.Trimesh(vertices, faces, process=False).split(only_watertight=True)
        assert len(faces) <= most and len(parts) == count and all(part.volume > 0 for part in parts)
        seen = meshes.sample_surface(vertices, faces, 500, np.random.default_rng(0), hidden=False)[0]
        assert abs(shape.distance(seen)).max() < near and len(colours) == len(faces)


def test_canonical_order_knows_no_other():
    """Faces shuffled, their corners rotated, vertices renumbered: the same sequence; every step of the documented order holds."""
    vertices, faces, colours = shapes.make(0, 2).mesh()
    one, rng = meshes.canonical(vertices, faces, colours), np.random.default_rng(0)
    for _ in range(3):
        some, number = rng.permutation(len(faces)), rng.permutation(len(vertices))
        turned = np.stack([np.roll(face, rng.integers(3)) for face in faces[some]])
        other = meshes.canonical(vertices[np.argsort(number)], number[turned], colours[some])
        assert all(map(np.array_equal, one, other))
    corners, _, number = one
    assert len(corners) == len(faces)
    for part in np.split(corners, np.flatnonzero(np.diff(number)) + 1):                            # from the top, each beside an earlier one
        assert part[0, 0, 1] == part[..., 1].max()
        edges = [list(map(tuple, np.stack([face, np.roll(face, -1, 0)], 1).reshape(3, 6))) for face in part]
        assert all(tuple(np.roll(face[0], 3)) in sum(edges[:i], []) for i, face in enumerate(edges) if i)
    assert not np.array_equal(meshes.canonical(vertices, faces[:, ::-1], colours)[0], one[0])      # inside out is another mesh


def test_a_bulging_ball_keeps_its_order():
    """Wherever a low-poly ball bulges, its faces come in the order of the round one."""
    part = solids.ball((0, 0, 0), .6, "green", 15)
    x, faces = part.mesh(fine=False)
    names, rng = np.repeat(np.arange(len(faces))[:, None], 3, 1), np.random.default_rng(0)
    _, order, _ = meshes.canonical(x, faces, names)
    for turn in rng.uniform(0, 2 * np.pi, 8):
        bulging = solids.ball((.35 * np.sin(turn), rng.uniform(-.3, 0), .35 * np.cos(turn)), .4, "green").bulge(x, part.centre)
        assert np.linalg.norm(bulging, axis=1).max() > .7 and np.array_equal(meshes.canonical(bulging, faces, names)[1], order)


def test_welding_closes_what_was_closed():
    """Single faces: every part comes out closed and where it was, parts that touch stay apart; nearly so with corners off by a bin."""
    rng, sure = np.random.default_rng(0), lambda corners: np.eye(meshes.BINS)[corners]
    for index in range(len(shapes.CLASSES)):
        shape = shapes.make(0, index)
        corners, *_ = meshes.canonical(*shape.mesh())
        vertices, faces, whole = meshes.weld(sure(corners))
        assert meshes.watertight(faces) and whole.all() and abs(vertices[faces] - corners).max() < 1e-6
        assert len(trimesh.Trimesh(vertices, faces, process=False).split(only_watertight=True)) == sum(part.sides > 0 for part in shape.parts)
        off = (rng.random(corners.shape) < .1) * rng.integers(-1, 2, corners.shape)
        vertices, faces, whole = meshes.weld(sure((corners + off).clip(0, meshes.BINS - 1)))
        assert meshes.closed_edges(faces) > .98 and whole.mean() > .9
    vertices, faces, _ = meshes.weld(sure(np.delete(corners, len(corners) // 2, 0)))
    assert meshes.closed_edges(faces) < 1 and meshes.watertight(meshes.close(faces))                    # one face is lost
    assert np.array_equal(meshes.close(faces)[:-1], faces) and len(meshes.close(faces[:0])) == 0
    vertices, faces, _ = meshes.weld(sure(corners))
    assert np.array_equal(meshes.close(faces), faces) and meshes.closed_edges(faces[:0]) == 0
    assert [len(x) for x in meshes.weld(sure(corners[:0]))] == [0, 0, 0]


def test_corners_that_waver_decide_together():
    """Every corner finds two meshes about as likely, 12 bins apart, and leans to one of them by chance: what they make is closed,
    and most vertices are where the one lies that is a little likelier on the whole."""
    corners, *_ = meshes.canonical(*shapes.make(0, 0).mesh())
    lean = .52 + .2 * (np.random.default_rng(0).random((*corners.shape, 1)) - .5)
    share = lean * np.eye(meshes.BINS)[corners] + (1 - lean) * np.eye(meshes.BINS)[corners - 12]
    vertices, faces, whole = meshes.weld(share)
    alone, together = share.argmax(-1) == corners, np.round(vertices[faces]) == corners
    assert whole.all() and meshes.watertight(faces) and alone.mean() < .65 and together.mean() > .75


def test_unsure_parts_are_left_out_whole(monkeypatch):
    """Every second face of a part is as likely as not: the mesh is that of the other parts, and closed. All sure: all parts."""
    corners, _, components = meshes.canonical(*shapes.make(0, 1).mesh())                                # a chair
    head, levels = heads.MeshHead(2, 4, 64, 2), 20. * F.one_hot(torch.from_numpy(corners).flatten(1), meshes.BINS)[None]
    monkeypatch.setattr(head, "logits", lambda levels: levels)
    for unsure in (None, 0, 2):
        there = torch.full(levels.shape[:2], 6.)
        there[:, (components == unsure) & (np.arange(len(corners)) % 2 == 0)] = 0.
        monkeypatch.setattr(head, "forward", lambda tokens: (levels, there, torch.ones(*there.shape, 3)))
        mesh, left = head.decode(torch.zeros(8, 4), {}, None), components != unsure
        assert meshes.watertight(mesh.faces) and len(mesh.faces) == left.sum()
        assert abs(np.sort(mesh.vertices.ravel()) - np.sort(np.unique(meshes.centres(corners[left]).reshape(-1, 3), axis=0).ravel())).max() < 1e-6


def test_like_parts_may_come_in_any_order(prepared):
    """A head that says the canonical order, or that of two legs swapped, is right; one that says nothing is told the canonical one."""
    batch = prepared[0].faces([1])                                                                      # a chair
    corners, components = batch["corners"].flatten(2), batch["components"]
    sizes = components[components >= 0].bincount().tolist()
    first = next(i for i in range(len(sizes) - 1) if sizes[i] == sizes[i + 1])
    start, size, rows = sum(sizes[:first]), sizes[first], torch.arange(training_samples.FACES)[None]
    swapped = torch.cat([rows[:, :start], rows[:, start + size:start + 2 * size], rows[:, start:start + size], rows[:, start + 2 * size:]], 1)
    said = lambda rows: 5. * F.one_hot(corners[:, rows[0]].clamp(min=0), meshes.BINS)
    for order in (rows, swapped):
        assert torch.equal(meshes.like_parts(said(order), corners, components), order)
    assert torch.equal(meshes.like_parts(0 * said(swapped), corners, components), rows)


def test_between_two_shapes_the_nearer_one_is_said(prepared, monkeypatch):
    """In training the mesh head sees tokens on the way to the most similar shape of the batch, and never past the middle."""
    torch.manual_seed(0)
    head, tokens, seen = heads.MeshHead(4, 16, 64, 2), torch.tensor([0., 1., 3.])[:, None, None].expand(3, 64, 16), []
    monkeypatch.setattr(head, "forward", lambda x: seen.append(x) or heads.MeshHead.forward(head, x))
    for _ in range(20):
        head.loss(tokens, prepared[0].faces([0, 1, 2]))
    share = (torch.stack(seen) - tokens)[..., 0, 0] / torch.tensor([1., -1., -2.])                      # towards 1, 0 and 1
    assert 0 <= share.min() < .01 and .4 < share.max() < .5


def test_bad_meshes_are_one_line():
    """No faces, vertices that are not there or not numbers, too many faces; degenerate and double faces are dropped."""
    vertices, faces, colours = np.eye(3), np.array([[0, 1, 2]]), np.ones((1, 3))
    for args, complaint in (((vertices, faces[:0], colours), "no faces"), ((vertices * np.nan, faces, colours), "NaN"),
                            ((vertices, faces + 1, colours), "names vertex 3"), ((vertices * 1e-6, faces, colours), "larger than a bin")):
        with pytest.raises(UserError, match=complaint):
            meshes.canonical(*args)
    with pytest.raises(UserError, match="2 faces and at most 1"):
        meshes.fit(vertices, np.repeat(faces, 2, 0), colours, 1, many="refuse")
    assert len(meshes.canonical(vertices, np.array([[0, 1, 2], [1, 2, 0], [0, 1, 1]]), np.ones((3, 3)))[0]) == 1
    ball_ = trimesh.creation.icosphere(3, .8)
    points, few, paint = meshes.fit(np.array(ball_.vertices), np.array(ball_.faces), np.random.default_rng(0).random((len(ball_.faces), 3)), 256)
    assert 200 < len(few) == len(paint) <= 256 and abs(np.linalg.norm(points, axis=1) - .8).max() < .1
    assert (abs(points) <= abs(ball_.vertices).max(0)).all()            # no farther out than it was


# ---------------------------------------------------------------------------- data

@pytest.mark.parametrize("name", ["points.npy", "surface-00000.json"])
def test_damaged_cache_is_one_line(prepared, name, tmp_path):
    """A file that is cut short is named as such, with what to do."""
    folder = shutil.copytree(prepared[1].folder, tmp_path / "set")
    (folder / name).write_bytes((folder / name).read_bytes()[:500])
    with pytest.raises(UserError, match="delete it"):
        data.Prepared(folder, prepared[1].source, ["surface"])


def test_interrupted_preparation_resumes(tmp_path, monkeypatch):
    """Killed in the middle of a chunk and started again = never interrupted, byte by byte."""
    monkeypatch.setattr(data, "CHUNK", 3)
    monkeypatch.setattr(data, "ProcessPoolExecutor", ThreadPoolExecutor)   # so that the workers see all patches
    monkeypatch.setattr(data, "alone", lambda parent: None)                     # which is for processes
    whole = data.prepare("train", 8, tmp_path / "whole", workers=1)
    make = training_samples.take_surface

    def stop_at_fifth(shape, rng):
        if rng.bit_generator.seed_seq.entropy == (0, 4, 1):
            raise InterruptedError
        return make(shape, rng)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setitem(training_samples.TAKE, "surface", stop_at_fifth)
        data.prepare("train", 8, tmp_path / "cut", workers=1)
    cut = tmp_path / "cut" / whole.folder.name
    assert (cut / "surface-00000.json").is_file() and not (cut / "surface-00001.json").is_file()
    assert len(data.prepare("train", 8, tmp_path / "cut", workers=1)) == 8 and same_files(whole.folder, cut)


def test_other_shapes_are_another_set(monkeypatch):
    """One part of one shape that looks different, and what was prepared before is not taken for it."""
    make, fingerprint = shapes.make, prepare.fingerprint.__wrapped__        # not the one of this process, which is kept
    one, two = fingerprint(), fingerprint()

    def other(seed, index):
        shape = make(seed, index)
        shape.parts[0].sides += index == 100
        return shape

    monkeypatch.setattr(shapes, "make", other)
    assert one == two != fingerprint()


# ---------------------------------------------------------------------------- shapes of files

def sheets():
    """An open box of five sheets, the faces of two turned inside out, with a ball inside that nobody sees and one on top."""
    box, turned = trimesh.creation.box((1, 1, 1)), np.array([2, 3, 8, 9])
    faces = np.asarray(box.faces)[np.asarray(box.face_normals)[:, 1] > -.5].copy()
    faces[turned] = faces[turned, ::-1]
    above, inside = trimesh.creation.icosphere(2, .3), trimesh.creation.icosphere(2, .2)
    above.apply_translation((0, .7, 0))
    return trimesh.util.concatenate([trimesh.Trimesh(box.vertices, faces, process=False), above, inside])


def test_soup_is_a_solid():
    """Triangles of any orientation, some open, some hidden: distances are those of the closed thing they show, plus the skin."""
    ball = trimesh.creation.icosphere(4, .8)
    faces = np.asarray(ball.faces).copy()
    faces[::2] = faces[::2, ::-1]                             # every other face inside out
    inner = trimesh.creation.box((.3, .3, .3))
    both = trimesh.util.concatenate([trimesh.Trimesh(ball.vertices, faces, process=False), inner])
    solid = soup.Soup(np.asarray(both.vertices), np.asarray(both.faces), np.ones((len(both.faces), 3)) * .5)
    x = np.random.default_rng(0).uniform(-1, 1, (2000, 3))
    true = np.linalg.norm(x, axis=1) - .8 - soup.SKIN
    near = abs(true) < .2
    assert abs(solid.distance(x[near]) - true[near]).max() < .006 and (solid.distance(x[~near]) * true[~near] > 0).all()
    points, normals, colours = solid.surface(500, np.random.default_rng(0))
    assert abs(np.linalg.norm(points, axis=1) - .8 - soup.SKIN).max() < .006 and ((points * normals).sum(1) > .75).all()


def test_open_sheets_become_solid():
    """A box without a bottom is hollow, its walls are solid; a flat square is a thin solid, of which nothing is seen edge on."""
    mesh = sheets()
    solid = soup.Soup(np.asarray(mesh.vertices), np.asarray(mesh.faces), np.ones((len(mesh.faces), 3)))
    inside = lambda *x: solid.distance(np.array([x]))[0] < 0
    assert inside(.5, 0, 0) and inside(0, .5, .1) and inside(0, .7, 0) and not inside(.3, 0, .3) and not inside(.6, 0, 0)
    square = soup.Soup(np.array([[-.5, 0, -.5], [.5, 0, -.5], [.5, 0, .5], [-.5, 0, .5]]), np.array([[0, 1, 2], [0, 2, 3]]), np.ones((2, 3)))
    assert (training_samples.take_faces(square, np.random.default_rng(0))["components"] >= 0).sum() > 10
    for each in (solid, square):                              # asked near the surface only: the same mesh
        assert all((a == b).all() for a, b in zip(soup.surface_of(each.side), soup.surface_of(each.distance)))
    vertices, faces, _ = square.mesh()
    assert meshes.watertight(faces) and abs(np.ptp(vertices, 0) - [1, 0, 1] - 2 * soup.SKIN).max() < .02
    assert [seen.any() for seen in training_samples.pictures(square, [(0, 30), (0, 0)])["covered"]] == [True, False]


def library(path, models, entries):
    """A Sweet Home 3D library of these files and catalogue lines."""
    with zipfile.ZipFile(path, "w") as archive:
        lines = ["license=CC0"] + [f"{key}#{i}={value}" for i, entry in enumerate(entries, 1) for key, value in entry.items()]
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(lines).encode("latin-1"))
        for name, content in models.items():
            archive.writestr(name, content)
    return path


def obj(mesh, material=""):
    return (f"mtllib some.mtl\n{material}" if material else "") + trimesh.exchange.obj.export_obj(mesh)


def test_library_is_read(tmp_path, capsys):
    """Name, licence, author, rotation, icon and the colour of a material; what is wrong with an entry is said."""
    box, icon = trimesh.creation.box((1, 2, 3)), io.BytesIO()
    Image.new("RGBA", (32, 32), (255, 0, 0, 255)).save(icon, "png")
    files = {"a/box.obj": obj(box, "usemtl red\n"), "a/some.mtl": "newmtl red\nKd 1 0 0\n", "a/box.png": icon.getvalue()}
    good = {"name": "Caf\u00e9 tableTop 2", "model": "/a/box.obj", "icon": "/a/box.png", "creator": "Ann", "modelRotation": "1 0 0 0 0 1 0 -1 0"}
    bad = [{"name": "x", "model": "/../box.obj"}, {"name": "y", "model": "/a/none.obj"}, {"name": "z", "model": "/a/box.png"}]
    turned = good | {"modelRotation": "one turn"}
    items, skipped = real.listed(library(tmp_path / "some.sh3f", files, [good, *bad, turned]))
    shape = mesh_files.shape(items[0])
    assert (items[0].captions, items[0].licence, items[0].author) == (["caf\u00e9 table top", "top"], "CC0", "Ann")
    assert shape.icon.shape == (32, 32, 4) and (shape.colours == [1, 0, 0]).all()
    assert np.allclose(np.ptp(shape.vertices, 0), np.array([1, 3, 2]) / 3 * mesh_files.LONGEST, atol=1e-4)
    assert [re.search(r"outside|has no|none of", reason)[0] for _, reason in skipped] == ["outside", "has no", "none of"]
    with pytest.raises(UserError, match="cannot be read"):
        mesh_files.shape(items[1])
    assert run(real.main, tmp_path / "some.sh3f") == 0 and "\n2 shapes, CC0, by Ann\n" in capsys.readouterr().out


def test_a_caption_names_something():
    """Sizes and words that are true of any shape say nothing; the last word of a library's name is the class."""
    assert real.tidy("Bookcase_45x160") == "bookcase"
    assert real.Item("", "", captions=["3D model", "car model", "car model", "???", "model"]).captions == ["car model"]
    assert real.Item("", "", captions=["a model"]).captions == ["shape"]


def test_folder_is_read(tmp_path):
    """Captions from a table, a text beside the mesh, ShapeNet's numbers or the names; a table's faults are said."""
    for path in ("chairs/one.obj", "chairs/two.ply", "03001627/ab12/models/model_normalized.obj", "lamp_7.stl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        trimesh.creation.box((1, 1, 1)).export(tmp_path / path)
    (tmp_path / "captions.csv").write_bytes('file,caption\nchairs/one.obj,"a ""red"", chair"\nchairs/one.obj,a caf\xe9 chair\nnone.obj,x\n\n'.encode("latin-1"))
    (tmp_path / "chairs" / "two.txt").write_text("a blue chair\n")
    (tmp_path / "picture.tiff").write_bytes(b"")
    items, skipped = real.listed(tmp_path)
    told = {item.key: item.captions for item in items}
    assert told == {"chairs/one.obj": ['a "red", chair', "a caf\xe9 chair", "chairs"], "chairs/two.ply": ["a blue chair", "chairs"],
                    "03001627/ab12/models/model_normalized.obj": ["chair"], "lamp_7.stl": ["lamp"]}
    assert sorted(name for name, _ in skipped) == ["none.obj", "picture.tiff"]
    for table, fault in (('chairs/one.obj,"a chair\nlamp_7.stl,a lamp\n', "is a quote open"), ("lamp_7.stl;a lamp\n", "no line of file,caption")):
        (tmp_path / "captions.csv").write_text(table)
        with pytest.raises(UserError, match=fault):
            real.listed(tmp_path)


def broken_files():
    """name -> content of files that are no shapes, and what is to be said of them."""
    box = trimesh.creation.box((1, 1, 1))
    header = json.dumps({"asset": {"version": "2.0"}, "extensionsRequired": ["KHR_draco_mesh_compression"]}).encode()
    points = "OFF\n3 1 0\n0 0 0\n1 1 1\n2 2 2\n3 0 1 2\n"
    return {"cut.glb": (box.export(file_type="glb")[:200], "cannot be read"), "draco.gltf": (header, "compressed"), "empty.obj": (b"# nothing\n", "read|triangles"),
            "nan.obj": (b"v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n", "not finite"), "other.stl": (b"\x89PNG\r\n\x1a\n not a mesh at all", "read|triangles|finite|area"),
            "flat.off": (points.encode(), "without area"), "point.obj": (b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "single point")}


def test_broken_files_are_skipped(tmp_path, capsys, monkeypatch):
    """Each is named with the reason, the good one is prepared, twice the same; two of one name in two folders are two."""
    source = tmp_path / "source"
    for folder in ("one", "two"):
        (source / folder).mkdir(parents=True)
        trimesh.creation.icosphere(2).export(source / folder / "ball.obj")
    wrong = broken_files()
    for name, (content, _) in wrong.items():
        (source / name).write_bytes(content)
    flags = ("--data", source, "--out", tmp_path / "cache", "--picture", tmp_path / "sheet.png", "--workers", 1)
    assert run(data.main, *flags) == 0
    said = capsys.readouterr().out
    table = next((tmp_path / "cache").glob("*/skipped.csv"))
    with table.open() as file:
        reasons = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons.keys() == wrong.keys() and all(re.search(wrong[name][1], reason) for name, reason in reasons.items()), reasons
    assert "7 of 9 shapes" in said and (tmp_path / "sheet.png").is_file()
    monkeypatch.setattr(prepare.Files, "mine", lambda self, text: True)          # not a tenth held out
    split = data.prepare(out=tmp_path / "cache", kinds=("surface", "pictures"), data=source, workers=1)
    assert split.classes == ["one", "two"] and split.cloud(np.array([1]), 100, np.random.default_rng(0))[0].norm(dim=-1).min() > .89
    monkeypatch.setitem(training_samples.TAKE, "surface", lambda *_: 1 / 0)
    prepare.prepare_chunk(split.folder, split.source, 0, ["surface"])
    assert "(ZeroDivisionError: division by zero)" in data.Prepared(split.folder, split.source, ["surface"]).broken["one/ball.obj"]


def test_files_are_judged_by_their_own_samples(tmp_path, monkeypatch):
    """A head that gives the true distances is right about a row's queries, also where files before it were left out."""
    monkeypatch.setattr(judges, "grid_iou", lambda *_: 1.)          # takes long, and asks the shape itself
    for i in range(4):
        trimesh.creation.box((1, 1, 1 + i)).export(tmp_path / f"box{i}.obj")
    (tmp_path / "a.obj").write_text("v 1 2 3")
    split = data.prepare("train", out=tmp_path / "cache", data=tmp_path, workers=1)
    assert len(split) > 1 and (split.rows > np.arange(len(split))).all()
    true = judges.true_field(split.shape(0))
    head = SimpleNamespace(read=lambda tokens: None, ask=lambda memory, x: true(x[0])[None].clamp(-1, 1))
    assert judges.judge_sdf({"sdf": head}, torch.zeros(1, 1), split, 0, None, contextlib.nullcontext, 0)["L1"] < .01


def test_file_that_ends_its_reader(tmp_path):
    """A crash in somebody's C code costs that file alone."""
    (tmp_path / "source").mkdir()
    for name in ("a", "b", "c"):
        trimesh.creation.box((1, 1, 1)).export(tmp_path / "source" / f"{name}.obj")
    code = "import data, os; from geometry import mesh_files; old = mesh_files.shape; mesh_files.shape = lambda item, copy: os.abort() if 'b.obj' in item.key else old(item, copy)\n" \
           f"print(data.prepare(out={str(tmp_path / 'cache')!r}, data={str(tmp_path / 'source')!r}, workers=1).broken)"
    said = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert "{'b.obj': 'whoever reads it dies, twice'}" in said.stdout, said.stderr


def test_file_that_takes_too_long(tmp_path, monkeypatch):
    """A reader that never ends is stopped."""
    monkeypatch.setattr(mesh_files, "SECONDS", 1)
    monkeypatch.setattr(mesh_files, "drawn", lambda *_: time.sleep(30))
    trimesh.creation.box((1, 1, 1)).export(tmp_path / "box.obj")
    with pytest.raises(UserError, match="more than 1 seconds"):
        mesh_files.shape(real.listed(tmp_path)[0][0])


@pytest.mark.parametrize("make, complaint", [(lambda path: None, "there is no"), (lambda path: path.mkdir(), "holds no shapes"),
                                             (lambda path: path.write_bytes(b"no zip"), "no Sweet Home 3D library")])
def test_bad_data_is_one_line(make, complaint, tmp_path, capsys):
    """A path that is not there, an empty folder, a library that is none."""
    path = tmp_path / "some.sh3f"
    make(path)
    assert run(data.main, "--data", path, "--out", tmp_path / "cache") == 2
    assert_one_line(capsys.readouterr().err, complaint)


def test_shards_are_the_whole(tmp_path):
    """Two shares prepared apart, one after the other = all at once; one alone is a set without the other's."""
    source = tmp_path / "source"
    source.mkdir()
    for i in range(4):
        trimesh.creation.box((1, 1 + i, 1)).export(source / f"box{i}.obj")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CHUNK", 2)
        patch.setattr(data, "ProcessPoolExecutor", ThreadPoolExecutor)
        patch.setattr(data, "alone", lambda parent: None)
        patch.setattr(real, "limit", lambda _: contextlib.nullcontext())              # signals are for main threads
        whole = data.prepare(out=tmp_path / "whole", data=source, workers=1)
        for i in (1, 0):
            part = data.prepare(out=tmp_path / "part", data=source, workers=1, shard=(i, 2))
            assert len(part.rows) <= 2 or i == 0
        assert not len(data.prepare(out=tmp_path / "none", data=source, workers=1, shard=(2, 3)))      # a share without a chunk
        held_out = data.prepare("test", out=tmp_path / "whole", data=source, workers=1)
    assert same_files(whole.folder, part.folder)
    assert held_out.folder == whole.folder and held_out.name != whole.name            # what is computed from them has a file each
    assert len(held_out) + len(whole) == 4 and not set(held_out.rows) & set(whole.rows)


def test_too_few_files_to_train_on(tmp_path, capsys):
    """One file leaves nothing to hold out."""
    trimesh.creation.box((1, 1, 1)).export(tmp_path / "box.obj")
    assert run(train.main, "--data", tmp_path / "box.obj", "--cache", tmp_path / "cache", "--out", tmp_path / "run") == 2
    assert_one_line(capsys.readouterr().err.split("\n")[-2], "two of each are needed")


def test_batches_are_functions_of_their_generator(prepared):
    """The same generator gives the same batch; the distances in it are those of the shapes in its rows."""
    rows = np.array([3, 20])
    one, again, other = [prepared[0].queries(rows, 640, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    cloud = prepared[0].cloud(rows, 1024, np.random.default_rng(0))
    assert all(torch.equal(one[k], again[k]) for k in one) and not torch.equal(one["queries"], other["queries"])
    for i, row in enumerate(rows):
        true = prepared[0].shape(row).distance(one["queries"][i].numpy())
        assert abs(true - one["distance"][i].numpy()).max() < 1e-3
        assert abs(prepared[0].shape(row).distance(cloud[0][i].numpy())).max() < 2e-3       # half precision
    assert (cloud[1].norm(dim=-1) - 1).abs().max() < .02 and 0 <= cloud[2].min() <= cloud[2].max() <= 1


# ---------------------------------------------------------------------------- tokenizer

@pytest.mark.parametrize("index, resolution", [(1, 64), (8, 64), (5, 64), (3, 128)], ids=["chair-64", "mug-64", "shelf-64", "lamp-128"])
def test_hierarchical_is_dense(index, resolution):
    """A grid refined near the surface gives the same mesh as every point asked; closed, outward, of the right volume."""
    shape = shapes.make(6, index)
    fine, dense = (surface.extract(TrueHead(shape), torch.zeros(1, 1), resolution, hierarchical=h) for h in (True, False))
    assert len(fine[1]) > 1000 and all(np.array_equal(a, b) for a, b in zip(fine, dense))
    vertices, faces, colours = fine
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    inside = (shape.distance(networks.grid_points(64).numpy()) < 0).mean() * 8
    assert mesh.is_watertight and mesh.is_winding_consistent and abs(mesh.volume / inside - 1) < .05
    assert abs(shape.distance(vertices)).max() < .03 and 0 <= colours.min() <= colours.max() <= 1


def test_cut_cells_are_those_with_corners_on_both_sides():
    inside = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(0)) < .1
    corners = [slice(i, i + 2) for i in range(6)]
    true = torch.zeros_like(inside)
    for cell in ((x, y, z) for x in corners[:4] for y in corners[:5] for z in corners):
        true[cell] |= inside[cell].any() & ~inside[cell].all()
    assert torch.equal(surface.cut(inside), true) and true.any() and not true.all()


def test_nothing_leaves_the_cube():
    """A field that is inside everywhere still gives a closed mesh, and one that is outside everywhere an empty one."""
    for sign, faces in ((-1, True), (1, False)):
        head = TrueHead(None)
        head.ask = lambda memory, x: torch.full((1, x.shape[1], 4), float(sign))
        mesh, dense = (surface.extract(head, torch.zeros(1, 1), 64, hierarchical=each) for each in (True, False))
        assert all(map(np.array_equal, mesh, dense))
        assert bool(len(mesh[1])) == faces and (not faces or trimesh.Trimesh(*mesh[:2], process=False).is_watertight)


# ---------------------------------------------------------------------------- pictures and files

def ball(radius=.7):
    return surface.extract(TrueHead(shapes.Shape("ball", [shapes.ball((0, 0, 0), radius, "red")], {}, [])), torch.zeros(1, 1), 32)


def test_glb_round_trip(tmp_path):
    """Vertices and faces come back exactly, colours to five decimals; other readers open it; same mesh, same bytes."""
    vertices, faces, _ = ball()
    colours = np.random.default_rng(0).random(vertices.shape, np.float32)
    for name in "ab":
        export.write_glb(tmp_path / f"{name}.glb", vertices, faces, colours)
    assert (tmp_path / "a.glb").read_bytes() == (tmp_path / "b.glb").read_bytes()
    again = export.read_glb(tmp_path / "a.glb")
    assert np.array_equal(again[0], vertices) and np.array_equal(again[1], faces) and abs(again[2] - colours).max() < 1e-5
    assert trimesh.load(tmp_path / "a.glb", force="mesh").is_watertight
    with pytest.raises(UserError, match="ends so"):
        export.write_glb(tmp_path / "a.obj", vertices, faces, colours)


def test_glb_of_others(tmp_path):
    """Colours in 8 bits are the same colours; no colours, two meshes, vertices that are no numbers or far away: one line each."""
    vertices, faces, colours = ball()
    export.write_glb(tmp_path / "ours.glb", vertices, faces, colours)
    for scale, name in ((1, "theirs"), (np.nan, "nan"), (9, "far")):
        trimesh.Trimesh(vertices * scale, faces, vertex_colors=(255 * export.to_linear(colours)).round().astype(np.uint8),
                        process=False).export(tmp_path / f"{name}.glb")
    trimesh.Trimesh(vertices, faces, process=False).export(tmp_path / "grey.glb")
    trimesh.Scene([trimesh.Trimesh(vertices + i, faces) for i in range(2)]).export(tmp_path / "two.glb")
    assert abs(export.read(tmp_path / "ours.glb").colours - export.read(tmp_path / "theirs.glb").colours).max() < .02
    export.Mesh(vertices, faces, colours, smooth=False).save(tmp_path / "flat.glb")
    assert export.read(tmp_path / "ours.glb").smooth and not export.read(tmp_path / "flat.glb").smooth
    export.write_glb(tmp_path / "thin.glb", vertices * [1, 0, 0], faces, colours)
    for name, complaint in (("grey", "no vertex colours"), ("two", "holds 2 meshes"), ("nan", "not finite"), ("far", "reaches to"),
                            ("none", "cannot read"), ("thin", "no area")):
        with pytest.raises(UserError, match=complaint):
            export.read(tmp_path / f"{name}.glb")


def gaussians(count, seed=0):
    """Of all kinds: needles, discs, nearly opaque and nearly clear, some outside the picture."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(x.astype(np.float32)) for x in
            (rng.uniform(-1.2, 1.2, (count, 3)), np.exp(rng.uniform(-5, -1.5, (count, 3))), rng.standard_normal((count, 4)),
             rng.uniform(.02, .99, count), rng.random((count, 3)))]


def splat_by_pixel(means, scales, rotations, opacities, colours, azimuth, elevation, size, background):
    """Every Gaussian at every pixel, in float64, by the formulas of the paper and none of geometry/render.py's code for them."""
    a, e = np.radians([azimuth, elevation])
    eye = np.array([[np.cos(a), 0, -np.sin(a)], [-np.sin(a) * np.sin(e), np.cos(e), -np.cos(a) * np.sin(e)],
                    [np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)]])
    focal, image = render.EYE / render.HALF * size / 2, np.tile(np.asarray(background, float), (size, size, 1))
    x = means @ eye.T
    for i in np.argsort(x[:, 2]):                                  # far to near: each is laid over what is behind
        (u, v), d = x[i, :2], render.EYE - x[i, 2]
        centre = size / 2 + focal * np.array([u, -v]) / d
        slope = focal / d * np.array([[1, 0, u / d], [0, -1, -v / d]]) @ eye
        turn = Rotation.from_quat(rotations[i][[1, 2, 3, 0]]).as_matrix()
        cov = slope @ turn @ np.diag(scales[i] ** 2) @ turn.T @ slope.T + .3 * np.eye(2)
        y, x_ = np.mgrid[:size, :size] + .5
        off = np.stack([x_ - centre[0], y - centre[1]], -1)
        alpha = np.minimum(opacities[i] * np.exp(-.5 * np.einsum("yxi,ij,yxj->yx", off, np.linalg.inv(cov), off)), .99)[..., None]
        image = alpha * colours[i] + (1 - alpha) * image
    return image


def test_splatting_is_the_formula():
    """Tiled, sorted and vectorised = one Gaussian after the other over every pixel, whatever is done at a time."""
    g = gaussians(60)
    true = splat_by_pixel(*(x.double().numpy() for x in g), 40, 25, 40, (.2, .5, 1.))
    for tiles in (1, 4, 100):
        image = render.splat(*g, 40, 25, 40, (.2, .5, 1.), tiles)
        assert abs(image.numpy() - true).max() < .02 and abs(image.numpy() - true).mean() < 1e-3         # beyond 3 sigma: nothing


def test_splatting_has_true_gradients(monkeypatch):
    """Every input's gradient = differences, in double precision."""
    monkeypatch.setattr(render, "TILE", 8)
    g = [x.double().requires_grad_() for x in gaussians(4, seed=3)]
    with torch.no_grad():
        g[1].clamp_(min=.15)                                       # wide ones, whose rim at 3 sigma is out of the picture
    monkeypatch.setattr(render, "look", lambda *angles, look=render.look: look(*angles).double())
    assert torch.autograd.gradcheck(lambda *g: render.splat(*g, 40, 25, 6), g, eps=1e-6, atol=1e-4)


def test_gaussians_round_trip(tmp_path):
    """The 3DGS layout: read again and by another reader, the same values; the pictures before and after are the same."""
    means, scales, turns, opacities, colours = (x.numpy() for x in gaussians(300))
    g = export.Gaussians(means, scales, turns / np.linalg.norm(turns, axis=1, keepdims=True), opacities, colours)
    g.save(tmp_path / "g.ply")
    again = export.read(tmp_path / "g.ply")
    for name in ("means", "scales", "rotations", "opacities", "colours"):
        assert abs(getattr(again, name) - getattr(g, name)).max() < 1e-5
    assert abs(g.picture(64).astype(int) - again.picture(64)).max() <= 1
    other = trimesh.load(tmp_path / "g.ply").metadata["_ply_raw"]["vertex"]["data"]
    names = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
    assert list(other.dtype.names) == names and np.array_equal(other["x"].ravel(), means[:, 0])
    assert np.allclose(1 / (1 + np.exp(-other["opacity"].ravel())), opacities, atol=1e-5)
    assert np.allclose(np.exp(other["scale_1"].ravel()), scales[:, 1], rtol=1e-5)
    assert np.allclose(other["f_dc_2"].ravel() * .28209479 + .5, colours[:, 2], atol=1e-5)


def test_cloud_round_trip(tmp_path):
    """Points, normals and 8-bit colours, read again and by another reader."""
    rng = np.random.default_rng(0)
    cloud = export.Cloud(*(rng.random((50, 3)).astype(np.float32) for _ in range(3)))
    cloud.save(tmp_path / "c.ply")
    again, other = export.read(tmp_path / "c.ply"), trimesh.load(tmp_path / "c.ply")
    assert np.array_equal(again.points, cloud.points) and np.array_equal(again.normals, cloud.normals)
    assert np.array_equal(other.vertices.astype(np.float32), cloud.points)
    assert np.array_equal(other.colors[:, :3], np.round(cloud.colours * 255)) and abs(again.colours - cloud.colours).max() < .002


@pytest.mark.parametrize("damage, complaint", [
    (lambda b: b.replace(b"f_dc_1", b"f_no_1"), "has no f_dc_1"), (lambda b: b.replace(b"binary_little_endian", b"ascii"), "only binary"),
    (lambda b: b[:-4] + np.float32(np.nan).tobytes(), "not finite"), (lambda b: b[:-1], "truncated"), (lambda b: b[3:], "not a PLY"),
    (lambda b: b.replace(b"element vertex", b"element edges "), "not 'vertex'"), (lambda b: b"", "not a PLY"),
    (lambda b: re.sub(rb"vertex \d+", b"vertex -5", b), "not 'vertex'"), (lambda b: re.sub(rb"vertex \d+", b"vertex 0", b), "no points")])
def test_bad_ply_is_one_line(damage, complaint, tmp_path):
    """Missing fields, ASCII, NaN, truncated, another kind of file."""
    means, scales, turns, opacities, colours = (x.numpy() for x in gaussians(5))
    export.Gaussians(means, scales, turns, opacities, colours).save(tmp_path / "g.ply")
    (tmp_path / "bad.ply").write_bytes(damage((tmp_path / "g.ply").read_bytes()))
    with pytest.raises(UserError, match=complaint):
        export.read(tmp_path / "bad.ply")


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
