"""test_pictures.py - the tests of pictures, and files that come out."""
import io
import re

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from scipy.spatial.transform import Rotation

from conftest import TrueHead
from engine.commands import UserError
from geometry import export, real, render, shapes, splat, surface
from geometry.camera import EYE, HALF, to_linear, view_rotation
from geometry.view import read_shape


@pytest.fixture(scope="module")
def ball():
    """Vertices, faces, and a colour for each vertex."""
    shape = shapes.Shape("ball", [shapes.ball((0, 0, 0), .7, "red")], {}, [])
    vertices, faces, _ = surface.extract(TrueHead(shape), torch.zeros(1, 1), 32)
    return vertices, faces, np.random.default_rng(0).random(vertices.shape, np.float32)


def test_glb_round_trip(ball, tmp_path):
    """We read vertices and faces exactly, colours to 8 bits of light; so do trimesh and the reader of training meshes.
    The same mesh gives the same bytes."""
    vertices, faces, colours = ball
    for name in "ab":
        export.write_glb(tmp_path / f"{name}.glb", *ball)
    assert (tmp_path / "a.glb").read_bytes() == (tmp_path / "b.glb").read_bytes()
    again = read_shape(tmp_path / "a.glb")
    assert np.array_equal(again.vertices, vertices) and np.array_equal(again.faces, faces)
    assert abs(again.colours - colours).max() < .026
    assert abs(again.colours - colours)[colours > .1].max() < .013

    trimesh.load(tmp_path / "a.glb").export(tmp_path / "c.glb")    # as in a user's own script
    assert np.array_equal(read_shape(tmp_path / "c.glb").colours, again.colours)
    plain = trimesh.load(tmp_path / "a.glb", force="mesh", skip_materials=True)
    assert plain.is_watertight and plain.visual.kind == "vertex"
    export.write_glb(tmp_path / "d.glb", vertices, faces, np.full_like(colours, [.8, .5, .25]))
    assert np.allclose(real.read_shape(tmp_path / "d.glb").colours, [.8, .5, .25], atol=.013)
    with pytest.raises(UserError, match="ends in .glb"):
        export.write_glb(tmp_path / "a.obj", *ball)


def test_meshes_in_other_formats(ball, tmp_path):
    """An OBJ has the colours of the mesh, an STL has none; a notebook shows a line and a picture."""
    shape = export.Mesh(*ball)
    for name in ("a.obj", "a.stl"):
        shape.save(tmp_path / name)
        assert len(trimesh.load(tmp_path / name, process=False).faces) == len(shape.faces)
    found = trimesh.load(tmp_path / "a.obj", process=False).visual.vertex_colors[:, :3] / 255
    assert abs(found - shape.colours).max() < .003
    assert repr(shape) == f"Mesh: {len(shape.vertices):,} points, {len(shape.faces):,} faces"
    with Image.open(io.BytesIO(shape._repr_png_())) as picture:
        assert picture.size == (320, 320)
    with pytest.raises(UserError, match="the mesh is empty"):
        export.Mesh(np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3))).save(tmp_path / "empty.stl")
    with pytest.raises(UserError, match=r"ends in .glb \(or .obj, .stl\)"):
        shape.save(tmp_path / "a.fbx")


def test_glb_of_others(ball, tmp_path):
    """Colours in 8 bits are the same colours. A mesh without colours, two meshes, bad vertices: one line each."""
    vertices, faces, colours = ball
    linear = (255 * to_linear(torch.from_numpy(colours))).round().byte().numpy()
    export.write_glb(tmp_path / "ours.glb", vertices, faces, colours)
    for scale, name in ((1, "theirs"), (np.nan, "nan"), (9, "far")):
        mesh = trimesh.Trimesh(vertices * scale, faces, vertex_colors=linear, process=False)
        mesh.export(tmp_path / f"{name}.glb")
    trimesh.Trimesh(vertices, faces, process=False).export(tmp_path / "grey.glb")
    trimesh.Scene([trimesh.Trimesh(vertices + i, faces) for i in range(2)]).export(tmp_path / "two.glb")
    export.Mesh(vertices, faces, colours, smooth=False).save(tmp_path / "flat.glb")
    export.write_glb(tmp_path / "thin.glb", vertices * [1, 0, 0], faces, colours)
    (tmp_path / "form.glb").write_bytes((tmp_path / "ours.glb").read_bytes().replace(b'"VEC3"', b'"VEC2"'))

    ours, theirs = read_shape(tmp_path / "ours.glb"), read_shape(tmp_path / "theirs.glb")
    assert abs(ours.colours - theirs.colours).max() < .02
    assert ours.smooth and not read_shape(tmp_path / "flat.glb").smooth
    for name, complaint in (("grey", "no vertex colours"), ("two", "holds 2 meshes"), ("nan", "not finite"),
                            ("far", "reaches to"), ("none", "cannot read"), ("thin", "no area"),
                            ("form", "another form")):
        with pytest.raises(UserError, match=complaint):
            read_shape(tmp_path / f"{name}.glb")


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
    """Every Gaussian at every pixel, in float64, by the formulas of the paper, not by geometry/splat.py."""
    a, e = np.radians([azimuth, elevation])
    view = np.array([[np.cos(a), 0, -np.sin(a)], [-np.sin(a) * np.sin(e), np.cos(e), -np.cos(a) * np.sin(e)],
                     [np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)]])
    focal, image = EYE / HALF * size / 2, np.tile(np.asarray(background, float), (size, size, 1))
    x = means @ view.T
    pixels = np.stack(np.mgrid[:size, :size][::-1], -1) + .5       # size size 2: x, y
    for i in np.argsort(x[:, 2]):                                  # far to near: each covers those behind it
        (u, v), distance = x[i, :2], EYE - x[i, 2]
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
        error = abs(splat.splat(*g, 40, 25, 40, (.2, .5, 1.), tiles).numpy() - true)
        assert error.max() < .02 and error.mean() < 1e-3           # splat draws nothing beyond 3 sigma


def test_splatting_has_true_gradients(monkeypatch):
    """The gradient of every input = finite differences, in double precision."""
    monkeypatch.setattr(splat, "TILE", 8)
    g = [x.double().requires_grad_() for x in gaussians(4, seed=3)]
    with torch.no_grad():
        g[1].clamp_(min=.15)                                       # wide: their rim at 3 sigma lies outside the picture
    monkeypatch.setattr(splat, "view_rotation", lambda *angles: view_rotation(*angles).double())
    assert torch.autograd.gradcheck(lambda *g: splat.splat(*g, 40, 25, 6), g, eps=1e-6, atol=1e-4)


def test_gaussians_round_trip(tmp_path):
    """The 3DGS layout: we read the same values and draw the same picture; another reader reads the same values."""
    g = saved_gaussians(tmp_path / "g.ply", 300)
    again = read_shape(tmp_path / "g.ply")
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
    again, other = read_shape(tmp_path / "c.ply"), trimesh.load(tmp_path / "c.ply")
    assert np.array_equal(again.points, cloud.points) and np.array_equal(again.normals, cloud.normals)
    assert np.array_equal(other.vertices.astype(np.float32), cloud.points)
    assert np.array_equal(other.colors[:, :3], np.round(cloud.colours * 255))
    assert abs(again.colours - cloud.colours).max() < .002


@pytest.mark.parametrize("old, new, complaint", [
    (b"f_dc_1", b"f_no_1", "has no f_dc_1"), (b"binary_little_endian", b"ascii", "only binary"),
    (rb"(?s)....$", np.float32(np.nan).tobytes(), "not finite"), (rb"(?s).$", b"", "truncated"),
    (b"^ply", b"", "not a PLY"), (b"(?s).*", b"", "not a PLY"), (b"element vertex", b"element edges ", "not 'vertex'"),
    (rb"vertex \d+", b"vertex -5", "not 'vertex'"), (rb"vertex \d+", b"vertex " + b"9" * 5000, "not 'vertex'"),
    (b"end_header", b"property\nend_header", "lists, which"), (rb"vertex \d+", b"vertex 0", "no points")])
def test_bad_ply_is_one_line(old, new, complaint, tmp_path):
    """Missing fields, ASCII, NaN, truncated, another kind of file."""
    saved_gaussians(tmp_path / "g.ply", 5)
    (tmp_path / "bad.ply").write_bytes(re.sub(old, lambda _: new, (tmp_path / "g.ply").read_bytes()))
    with pytest.raises(UserError, match=complaint):
        read_shape(tmp_path / "bad.ply")


def test_contact_sheet_holds_every_picture(tmp_path):
    """Five pictures in three columns: each is in its place, also in the file; labels take a line."""
    pictures = [np.full((32, 32, 3), 40 * i, np.uint8) for i in range(5)]
    sheet = render.contact_sheet(pictures, 3)
    assert sheet.shape == (2 * 36 + 4, 3 * 36 + 4, 3)
    for i, picture in enumerate(pictures):
        assert (sheet[4 + i // 3 * 36:, 4 + i % 3 * 36:][:32, :32] == picture).all()
    render.save_png(tmp_path / "sheet.png", sheet)
    assert (np.asarray(Image.open(tmp_path / "sheet.png")) == sheet).all()
    assert render.contact_sheet(pictures, 3, labels=list("abcde")).shape[0] > sheet.shape[0]
