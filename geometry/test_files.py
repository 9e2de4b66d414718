"""test_files.py - the tests of shapes from files of any kind."""
import csv
import io
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

import data
from conftest import HERE, TrueHead, run
from engine.commands import UserError
from geometry import mesh_files, metrics, prepare, real, soup, training_samples
from geometry.training_samples import SURFACE
from representations import sdf


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
    """A box of five sheets, two of them inside out, a ball on top and a hidden one: it is hollow, its walls are solid.
    `side` is right only near the surface, and gives the same mesh as `distance`."""
    box, turned = trimesh.creation.box((1, 1, 1)), np.array([2, 3, 8, 9])
    faces = np.asarray(box.faces)[np.asarray(box.face_normals)[:, 1] > -.5].copy()
    faces[turned] = faces[turned, ::-1]
    above, inside = trimesh.creation.icosphere(2, .3), trimesh.creation.icosphere(2, .2)
    above.apply_translation((0, .7, 0))
    mesh = trimesh.util.concatenate([trimesh.Trimesh(box.vertices, faces, process=False), above, inside])
    solid = white_soup(mesh.vertices, mesh.faces)
    assert (solid.distance(np.array([(.5, 0, 0), (0, .5, .1), (0, .7, 0)])) < 0).all()           # wall, top, ball
    assert (solid.distance(np.array([(.3, 0, .3), (.6, 0, 0)])) > 0).all()
    assert all(map(np.array_equal, soup.surface_of(solid.side), soup.surface_of(solid.distance)))


def test_a_flat_square_is_a_thin_solid():
    """Its mesh is closed and as thick as two skins. Edge on, a picture shows nothing."""
    square = np.array([[-.5, 0, -.5], [.5, 0, -.5], [.5, 0, .5], [-.5, 0, .5]])
    solid = white_soup(square, [[0, 1, 2], [0, 2, 3]])
    vertices, faces, _ = solid.mesh()
    assert metrics.watertight(faces)
    assert abs(np.ptp(vertices, 0) - [1, 0, 1] - 2 * soup.SKIN).max() < .02
    pictures = training_samples.draw_pictures(solid, [(0, 30), (0, 0)])
    assert [coverage.any() for coverage in pictures["picture_coverage"]] == [True, False]


BOX = {"box.off": trimesh.creation.box().export(file_type="off")}
TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nusemtl a\nf 1/1 2/1 3/1\n"


def library(path, models, entries, packing=zipfile.ZIP_STORED):
    """A Sweet Home 3D library of these files and catalogue lines."""
    lines = [f"{key}#{i}={value}" for i, entry in enumerate(entries, 1) for key, value in entry.items()]
    with zipfile.ZipFile(path, "w", packing) as archive:
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


def test_a_broken_library_is_skipped(tmp_path):
    entry = {"name": "box", "model": "/box.off"}
    library(tmp_path / "good.sh3f", BOX, [entry])
    raw = bytearray(library(tmp_path / "newer.sh3f", BOX, [entry]).read_bytes())
    raw[raw.rindex(b"PK\1\2") + 6] = 84                      # the version of ZIP that is needed to read it: 8.4
    (tmp_path / "newer.sh3f").write_bytes(raw)
    library(tmp_path / "packed.sh3f", BOX, [entry], zipfile.ZIP_LZMA)
    os.mkfifo(tmp_path / "pipe.sh3f")
    (tmp_path / "box.off").write_text(BOX["box.off"])
    items, skipped = real.list_items(tmp_path)
    assert [item.key for item in items] == ["good/1"]
    reasons = "version 8.4", "packed in an unusual way", "no regular file", "read for them alone"
    assert all(reason in found for reason, (_, found) in zip(reasons, skipped))
    assert len(skipped) == len(reasons)


def test_odd_libraries_are_read(tmp_path):
    """A superscript is no number; half a surrogate pair may be missing; a model at the root has materials."""
    entry = {"model": "/box.off", "creator": r"\ud83d\ude00\ud83d", "name#\u00b2": "two"}
    items, _ = real.list_items(library(tmp_path / "a.sh3f", BOX, [entry]))
    assert items[0].author == "\U0001f600\ufffd"
    files = {"a.obj": "mtllib a.mtl\n" + TRIANGLE, "a.mtl": "newmtl a\nKd 1 0 0\n"}
    items, _ = real.list_items(library(tmp_path / "a.sh3f", files, [{"model": "/a.obj"}]))
    assert (mesh_files.shape(items[0]).colours == [1, 0, 0]).all()


def test_captions_that_fit_any_shape_are_dropped():
    """And sizes are removed from names."""
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


BROKEN = {  # files that are no shapes: name -> content and the expected reason, a regular expression
    "cut.glb": (trimesh.creation.box().export(file_type="glb")[:200], "cannot be read"),
    "packed.gltf": (b'{"asset": {"version": "2.0"}, "extensionsRequired": ["KHR_materials_unlit", "EXT_meshopt"]}',
                    "EXT_meshopt"),
    "empty.obj": (b"# nothing\n", "read|triangles"),
    "nan.obj": (b"v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n", "not finite"),
    "other.stl": (b"\x89PNG\r\n\x1a\n not a mesh at all", "read|triangles|finite|area"),
    "flat.off": (b"OFF\n3 1 0\n0 0 0\n1 1 1\n2 2 2\n3 0 1 2\n", "without area"),
    "point.obj": (b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "single point")}


def test_broken_files_are_skipped(tmp_path, capsys, monkeypatch):
    """Broken files are named with the reason, good ones are prepared, and judged by their own samples."""
    source, cache = tmp_path / "source", tmp_path / "cache"
    for folder in ("one", "two"):
        (source / folder).mkdir(parents=True)
        trimesh.creation.icosphere(2).export(source / folder / "ball.obj")
    for name, (content, _) in BROKEN.items():
        (source / name).write_bytes(content)
    assert run(data.main, "--data", source, "--out", cache, "--picture", tmp_path / "sheet.png", "--workers", 1) == 0
    assert "7 of 9 shapes" in capsys.readouterr().out and (tmp_path / "sheet.png").is_file()
    with next(cache.glob("*/skipped.csv")).open() as file:
        reasons = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons.keys() == BROKEN.keys()
    assert all(re.search(BROKEN[name][1], reason) for name, reason in reasons.items()), reasons

    monkeypatch.setattr(real.Files, "in_split", lambda self, row: True)       # nothing is held out
    split = data.prepare(out=cache, kinds=(SURFACE, training_samples.PICTURES), data=source, workers=1)
    points, _, _ = split.cloud(np.array([1]), 100, data.seeded(0))
    assert split.classes == ["one", "two", "one"] and points.norm(dim=-1).min() > .89
    monkeypatch.setattr(sdf, "grid_iou", lambda *_: 1.)      # slow, and it does not read the samples
    judged = sdf.SdfHead.judge(TrueHead(split.shape(1)), {}, torch.zeros(1, 1), split, 1, None, nullcontext, 0)
    assert judged["L1"] < .01                                 # true distances are those of the samples of this row
    prepare.prepare_chunk(split.folder, split.source, 0, [replace(SURFACE, take=lambda *_: 1 / 0)])
    again = data.Prepared(split.folder, split.source, [SURFACE])
    assert "(ZeroDivisionError: division by zero)" in again.broken["one/ball.obj"]


def test_file_that_crashes_its_loader(tmp_path):
    """A crash in somebody's C code costs that file alone."""
    for name in "ab":
        (tmp_path / f"{name}.off").write_text(BOX["box.off"])
    code = ("import os, data; from geometry import mesh_files; shape = mesh_files.shape\n"
            "from representations.gs import VIEWS\n"
            "mesh_files.shape = lambda item: os.abort() if item.key == 'a.off' else shape(item)\n"
            f"print(data.prepare(out='{tmp_path}/cache', data='{tmp_path}', workers=1, kinds=[VIEWS]).broken)")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert "{'a.off': 'the loader crashed twice on this file'}" in done.stdout, done.stderr


def test_file_that_takes_too_long(tmp_path, monkeypatch):
    """A loader that never ends is stopped, also one that swallows the first exception."""
    def load(*_):
        with suppress(BaseException):
            time.sleep(30)
        time.sleep(30)

    monkeypatch.setattr(mesh_files, "SECONDS", .2)
    monkeypatch.setattr(mesh_files, "load_meshes", load)
    trimesh.creation.box((1, 1, 1)).export(tmp_path / "box.obj")
    with pytest.raises(UserError, match="more than 0.2 seconds"):
        real.read_shape(tmp_path / "box.obj")


def gltf(uri="", **parts):
    """The text of a glTF of one triangle, whose numbers are in the file `uri`."""
    accessor = {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}
    return json.dumps({
        "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}], "accessors": [accessor],
        "bufferViews": [{"buffer": 0, "byteLength": 36}], "buffers": [{"byteLength": 36, "uri": uri}]} | parts)


@pytest.mark.parametrize("name, text, complaint", [
    ("a.obj", "mtllib ../outside.mtl\n" + TRIANGLE, "outside its folder, '../outside.mtl'"),
    ("a.obj", "mtllib /dev/zero\n" + TRIANGLE, "outside its folder, '/dev/zero'"),
    ("a.obj", "mtllib link.mtl\n" + TRIANGLE, "outside its folder, 'link.mtl'"),
    ("a.obj", "mtllib pipe\n" + TRIANGLE, "'pipe' is no regular file"),
    ("a.obj", "mtllib texture.mtl\n" + TRIANGLE, "outside its folder, '../outside.png'"),
    ("a.gltf", gltf("../outside.bin"), "outside its folder, '../outside.bin'"),
    ("a.gltf", gltf("/dev/stdin"), "outside its folder, '/dev/stdin'"),
    ("a.gltf", gltf(nodes=[{"mesh": 0}] * 5001), "more than 5,000 nodes"),
    ("a.gltf", gltf(accessors=[{"componentType": 5126, "count": 10 ** 8, "type": "VEC3"}]), "more than 20,000,000"),
    ("a.obj", TRIANGLE * 5001, "more than 5,000 times"),
    ("a.stl", "x" * 80 + "\1\1\0\0", "cut short: 257 triangles take 12,934 bytes, it has 84")])
def test_hostile_meshes_are_refused(name, text, complaint, tmp_path):
    """A mesh names files beside it, and nothing else; what takes its loader long is counted first."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for file in ("outside.mtl", "outside.png", "outside.bin"):
        (tmp_path / file).write_text("secret")
    (folder / "link.mtl").symlink_to(tmp_path / "outside.mtl")
    (folder / "texture.mtl").write_text("newmtl a\nmap_Kd ../outside.png\n")
    os.mkfifo(folder / "pipe")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=complaint):
        real.read_shape(folder / name)


@pytest.mark.parametrize("factor, vertex, srgb", [
    ([1, .2140, .0512, 1], None, [1, .5, .25]), ([1., 1, 1, 1], [255, 55, 13, 255], [1, .5, .25]),
    ([1, .2140, 1, 1], [255, 255, 13, 255], [1, .5, .25])], ids=["material", "vertices", "both"])
def test_colours_of_gltf_are_linear(factor, vertex, srgb, tmp_path):
    """sRGB .5 is .214 in a glTF. Colours of the material and of vertices are multiplied."""
    mesh = trimesh.Trimesh(np.eye(3), [[0, 1, 2]], process=False)
    mesh.visual = trimesh.visual.TextureVisuals(material=trimesh.visual.material.PBRMaterial(baseColorFactor=factor))
    if vertex:
        mesh.visual.vertex_attributes["color"] = np.tile(np.uint8(vertex), (3, 1))
    (tmp_path / "a.glb").write_bytes(trimesh.exchange.gltf.export_glb(mesh))
    assert np.allclose(real.read_shape(tmp_path / "a.glb").colours, srgb, atol=.01)


def test_meshes_of_too_many_triangles_or_bytes_are_refused(tmp_path, monkeypatch):
    """Triangles are counted in every place where a mesh stands, bytes in all files that it names."""
    (tmp_path / "a.bin").write_bytes(np.eye(3, dtype=np.float32).tobytes().ljust(10_000))
    twice = {"nodes": [{"mesh": 0}, {"mesh": 0}], "scenes": [{"nodes": [0, 1]}]}
    (tmp_path / "a.gltf").write_text(gltf("a.bin", **twice))
    real.read_shape(tmp_path / "a.gltf")
    monkeypatch.setattr(mesh_files, "MOST_FACES", 1)
    with pytest.raises(UserError, match="more than 1 triangles"):
        real.read_shape(tmp_path / "a.gltf")
    (tmp_path / "a.gltf").write_text(gltf("a.bin", buffers=[{"byteLength": 36, "uri": "a.bin"}] * 3))
    monkeypatch.setattr(mesh_files, "MOST_BYTES", 20_000)
    with pytest.raises(UserError, match="the files that it names have more than 20,000 bytes"):
        real.read_shape(tmp_path / "a.gltf")


def test_a_texture_of_too_many_pixels_is_not_unpacked(tmp_path, monkeypatch):
    """The mesh is read, in the colour of its material."""
    monkeypatch.setattr(mesh_files, "MOST_PIXELS", 2000)
    (tmp_path / "a.mtl").write_text("newmtl a\nKd 1 0 0\nmap_Kd a.png\n")
    (tmp_path / "a.obj").write_text("mtllib a.mtl\n" + TRIANGLE)
    for side, colour in ((40, (0, 0, 1)), (50, (1, 0, 0))):
        Image.new("RGB", (side, side), "blue").save(tmp_path / "a.png")
        found = real.read_shape(tmp_path / "a.obj").colours[0]
        assert np.allclose(found, colour, atol=.02)
