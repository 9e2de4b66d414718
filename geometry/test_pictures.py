"""test_pictures.py - the tests of pictures, and files that come out."""
import io

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from scipy.spatial.transform import Rotation
from skimage.metrics import structural_similarity

from conftest import TrueHead
from engine.commands import UserError
from geometry import export, real, render, shapes, splat, surface
from geometry.camera import EYE, HALF, to_srgb
from geometry.metrics import chamfer, ssim
from geometry.spacing import evenly, gaps
from representations.gs import Gaussians
from representations.pc import Cloud


@pytest.fixture(scope="module")
def ball():
    """Vertices, faces, and a colour for each vertex."""
    shape = shapes.Shape("ball", [shapes.ball((0, 0, 0), .7, "red")], {}, [])
    vertices, faces, _ = surface.extract(TrueHead(shape), torch.zeros(1, 1), 32)
    return vertices, faces, np.random.default_rng(0).random(vertices.shape, np.float32)


def read_glb(path):
    """Vertices, faces, colours, as trimesh reads them."""
    mesh = trimesh.load(path, force="mesh", skip_materials=True, process=False)
    linear = torch.tensor(mesh.visual.vertex_colors[:, :3] / 255, dtype=torch.double)
    return mesh.vertices.astype(np.float32), mesh.faces, to_srgb(linear).numpy()


def test_glb_round_trip(ball, tmp_path):
    """trimesh reads vertices and faces exactly, colours to 8 bits of light; so does the reader of training meshes. The
    same mesh gives the same bytes; flat faces have no normals."""
    vertices, faces, colours = ball
    for name in "ab":
        export.write_glb(tmp_path / f"{name}.glb", *ball)
    assert (tmp_path / "a.glb").read_bytes() == (tmp_path / "b.glb").read_bytes()
    again = read_glb(tmp_path / "a.glb")
    assert np.array_equal(again[0], vertices) and np.array_equal(again[1], faces)
    assert abs(again[2] - colours).max() < .026
    assert abs(again[2] - colours)[colours > .1].max() < .013

    trimesh.load(tmp_path / "a.glb").export(tmp_path / "c.glb")    # as in a user's own script
    assert np.array_equal(read_glb(tmp_path / "c.glb")[2], again[2])
    export.Mesh(*ball, smooth=False).save(tmp_path / "flat.glb")
    assert [b'"NORMAL"' in (tmp_path / f"{name}.glb").read_bytes() for name in ("a", "flat")] == [True, False]
    export.write_glb(tmp_path / "d.glb", vertices, faces, np.full_like(colours, [.8, .5, .25]))
    assert np.allclose(real.read_shape(tmp_path / "d.glb").colours, [.8, .5, .25], atol=.013)
    with pytest.raises(UserError, match="ends in .glb"):
        export.write_glb(tmp_path / "a.obj", *ball)


def test_glb_stands_on_the_floor(ball, tmp_path):
    """As high as asked, its base in the middle at height 0; one material; 19,000 faces have less than 500 kB."""
    vertices, faces, colours = ball
    squeezed = export.Mesh(vertices * [1, .5, 2] + .2, faces, colours)
    for path, height in ((tmp_path / "a.glb", 1), (tmp_path / "b.glb", 3.), (tmp_path / "b.obj", 3.)):
        squeezed.save(path, height)
        found = trimesh.load(path, force="mesh", process=False)
        assert np.allclose(found.bounds, [[-height, 0, -2 * height], [height, height, 2 * height]], atol=.01)
        assert found.is_watertight and np.array_equal(found.faces, faces)
    assert (tmp_path / "a.glb").stat().st_size < 500_000 * len(faces) / 19_000
    assert (tmp_path / "a.glb").read_bytes().count(b'"materials":[{') == 1


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
    g = Gaussians(means, scales, rotations, opacities, colours)
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


@pytest.mark.parametrize("block, chunk", [(32, 4), (4, 100), (1, 30)])
def test_splatting_is_the_formula(block, chunk, monkeypatch):
    """By tiles = one Gaussian after the other over every pixel, however large blocks and chunks of them are."""
    monkeypatch.setattr(splat, "BLOCK", block)
    monkeypatch.setattr(splat, "CHUNK", chunk)
    g = gaussians(60)
    true = splat_by_pixel(*(x.double().numpy() for x in g), 40, 25, 40, (.2, .5, 1.))
    error = abs(splat.splat(*g, 40, 25, 40, (.2, .5, 1.)).numpy() - true)
    assert error.max() < .02 and error.mean() < 1e-3               # splat draws nothing beyond 3 sigma


def test_splatting_has_true_gradients(monkeypatch):
    """The gradient of every input = finite differences, in double precision."""
    monkeypatch.setattr(splat, "BLOCK", 2)
    g = [x.double().requires_grad_() for x in gaussians(4, seed=3)]
    with torch.no_grad():
        g[1].clamp_(min=.15)                                       # wide: their rim at 3 sigma lies outside the picture
    assert torch.autograd.gradcheck(lambda *g: splat.splat(*g, 40, 25, 6), g, eps=1e-6, atol=1e-4)


def test_pictures_at_once_are_those_of_each():
    """With too few pairs of Gaussians and tiles, the farthest Gaussians are missing."""
    g, angles = [*map(torch.stack, zip(gaussians(60), gaussians(60, seed=1)))], torch.tensor([[40., 25], [200, -10]])
    for i, image in enumerate(splat.splats(*g, angles, 40, pairs=2000)):
        assert torch.allclose(image[..., :3], splat.splat(*(x[i] for x in g), *angles[i], 40, (0, 0, 0)), atol=1e-5)
    g[0], g[1] = torch.tensor([[[0, 0, -.5], [0, 0, .5]]]), torch.ones(1, 2, 3)      # far and near, over the only tile
    near, few, both = (splat.splats(*(x[:1, i:2] for x in g), angles[:1], 8, n) for i, n in ((1, 1), (0, 1), (0, 2)))
    assert torch.equal(near, few) and not torch.allclose(near, both, atol=.01)


def test_structural_similarity_is_that_of_skimage():
    """Of one picture, and the mean of two."""
    pictures, noise = np.random.default_rng(0).random((2, 2, 40, 30, 3), np.float32)
    other = .9 * pictures + .1 * noise
    true = [structural_similarity(*pair, data_range=1, channel_axis=-1) for pair in zip(pictures, other)]
    assert ssim(pictures[0], other[0]).item() == pytest.approx(true[0], abs=1e-5)
    assert ssim(pictures, other).item() == pytest.approx(np.mean(true), abs=1e-5)


def test_gaussians_round_trip(tmp_path):
    """The 3DGS layout: another reader reads the same values."""
    g = saved_gaussians(tmp_path / "g.ply", 300)
    other = trimesh.load(tmp_path / "g.ply").metadata["_ply_raw"]["vertex"]["data"]
    names = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
    assert list(other.dtype.names) == names and np.array_equal(other["x"].ravel(), g.means[:, 0])
    assert np.allclose(1 / (1 + np.exp(-other["opacity"].ravel())), g.opacities, atol=1e-5)
    assert np.allclose(np.exp(other["scale_1"].ravel()), g.scales[:, 1], rtol=1e-5)
    assert np.allclose(other["f_dc_2"].ravel() * .28209479 + .5, g.colours[:, 2], atol=1e-5)


def test_cloud_round_trip(tmp_path):
    """Points, normals and 8-bit colours, as another reader reads them."""
    rng = np.random.default_rng(0)
    cloud = Cloud(*(rng.random((50, 3)).astype(np.float32) for _ in range(3)))
    cloud.save(tmp_path / "c.ply")
    other = trimesh.load(tmp_path / "c.ply")
    raw = other.metadata["_ply_raw"]["vertex"]["data"]
    assert np.array_equal(np.column_stack([raw[name] for name in ("nx", "ny", "nz")]), cloud.normals)
    assert np.array_equal(other.vertices.astype(np.float32), cloud.points)
    assert np.array_equal(other.colors[:, :3], np.round(cloud.colours * 255))


def test_points_that_are_left_are_even():
    """Of a sphere; they are nearer to other points of it than as many random ones, and copies do no harm."""
    points = np.random.default_rng(0).normal(size=(2, 900, 3))
    random, other = points / np.linalg.norm(points, axis=-1, keepdims=True)
    even, = evenly(600, random)
    assert len(np.unique(even, axis=0)) == 600
    assert chamfer(even, other) < .96 * chamfer(random[:600], other)
    assert evenly(2, np.zeros((9, 3)), np.arange(9))[1].shape == (2,)
    assert gaps(even)[0].min() > 2 * gaps(random[:600])[0].min()


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
