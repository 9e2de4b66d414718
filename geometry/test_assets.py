"""test_assets.py - the tests of kits of assets, their families, and shapes that are mirrored and turned."""
import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial import cKDTree

import data
import encoders
from engine.commands import UserError
from geometry import asset_names, low_poly, mesh_files, real, soup
from geometry.meshes import bin_centres
from geometry.symmetry import SYMMETRIES
from geometry.training_samples import PICTURES, SURFACE, render_flat, vertex_coloured
from representations.gs import SIZE, VIEWS, views_of
from representations.mesh import LOW_POLY, faces_of, take_faces
from representations.sdf import SdfHead


def kit(folder, *stems):
    """A kit of boxes, of a size each."""
    folder.mkdir(parents=True)
    for i, stem in enumerate(stems):
        trimesh.creation.box((1, 1, 2 + i)).export(folder / f"{stem}.glb")
    return folder


@pytest.mark.parametrize("name, caption", [
    ("tree_pineTallA_detailed", "tall pine tree"), ("Sword_Golden", "golden sword"), ("Tree_3", "tree"),
    ("Houses_SecondAge_2_Level1", "house"), ("lampRoundFloor", "round floor lamp"), ("TVStand", "tv stand"),
    ("potStewLid", "pot stew lid"), ("wallWindowRound", "round wall with window"), ("building_castle_blue", "castle"),
    ("Simpletower", "simple tower"), ("rockLarge", "large rock"), ("WoodenBarrel", "barrel")])
def test_a_name_in_a_kit_becomes_a_caption(name, caption):
    assert caption in asset_names.captions(name, "some kit")


@pytest.mark.parametrize("name, kit, captions", [
    ("Zenith", "spaceships_pack", ["spaceship"]), ("George", "mech_pack", ["mech"]), ("building-a", "suburban-kit",
    ["house", "building"]), ("start", "minigolf-kit", ["course", "minigolf course"]), ("barrel", "castle-kit",
    ["castle barrel", "barrel"]), ("Grip_SMG_1", "modular_sci_fi_guns_pack", ["sci fi machine gun grip", "grip",
    "machine gun grip"])])
def test_a_kit_says_what_its_things_are(name, kit, captions):
    """Words that say nothing are left out; the noun is the kit's, if the name has none."""
    assert asset_names.captions(name, kit) == captions


def test_variants_of_a_shape_share_family_and_class(tmp_path):
    """Both orders of a name are one family and class; a caption has the kit's style; a plain folder is a class."""
    for one, other, same in (("Houses_SecondAge_2_Level1", "Houses_FirstAge_1", True), ("Rock_1", "Bush_1", False),
                             ("rockLarge", "rock_smallC", True), ("tree_pineTallA", "tree_palm", False)):
        assert ({*asset_names.family(one).split()} == {*asset_names.family(other).split()}) == same
    kit(tmp_path / "natureKit", "tree_pineA", "PineTree_Snow", "12")
    kit(tmp_path / "kitchen", "eames")
    items = {item.key: item for item in real.list_items(tmp_path)[0]}
    trees = [items[f"natureKit/{stem}.glb"] for stem in ("tree_pineA", "PineTree_Snow")]
    assert len({(item.family, item.captions[-1]) for item in trees}) == 1
    assert {"snow pine tree", "nature pine tree"} <= {*trees[1].captions}
    assert items["kitchen/eames.glb"].captions == ["eames", "kitchen"]
    assert items["natureKit/12.glb"].captions == ["nature kit"]       # no letters: the folder's name


def test_the_name_of_the_given_folder_is_no_caption(tmp_path):
    """A kit's folder, too: only how its names are parsed depends on it. Folders in it are captions."""
    for name in ("chairs", "castleKit"):
        kit(tmp_path / name, "barrel", "default", "12")
        kit(tmp_path / name / "sofas", "eames")
        items = {item.key: item.captions for item in real.list_items(tmp_path / name)[0]}
        assert items["barrel.glb"] == ["barrel"] and items["12.glb"] == ["shape"]
        assert items["default.glb"] == ["default"] and "eames" in items["sofas/eames.glb"]
    assert real.list_items(tmp_path / "chairs")[0][-1].captions == ["eames", "sofas"]


def test_families_are_held_out_as_a_whole(tmp_path):
    """No family is in both splits, and both have some. A training shape has a stretched copy: its sides are those of
    the shape, times its factors."""
    things = "barrel boat bridge bush cactus candle chest cloud coin crate crown door fence flower gate hammer".split()
    path = kit(tmp_path / "kit", *(f"{thing}_{letter}" for thing in things for letter in "AB"))
    source, test = [real.Files(split, path) for split in ("train", "test")]
    families = [{item.family for row, item in enumerate(x.items) if x.in_split(row)} for x in (source, test)]
    assert not families[0] & families[1] and min(map(len, families)) > 1
    assert len(families[0] | families[1]) == len(things)

    trained = [item for row, item in enumerate(source.items[:source.files]) if source.in_split(row)]
    copies = source.items[source.files:]
    assert [copy.family for copy in copies] == [item.family for item in trained] and len(trained) < source.files
    one, other = (np.ptp(mesh_files.triangles(item)[0], axis=0) for item in (trained[0], copies[0]))
    assert np.ptp(other / one / copies[0].stretch) == pytest.approx(0, abs=1e-5)


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory):
    """Shapes that look different from every side, prepared."""
    folder = tmp_path_factory.mktemp("lopsided")
    blocks = [trimesh.creation.box((2 - i / 2, .3 + i / 4, .5), trimesh.transformations.translation_matrix(place))
              for i, place in enumerate([(0, 0, 0), (-.7, .4, .3), (.4, .3, -.6)])]
    for block, colour in zip(blocks, ([200, 40, 40, 255], [40, 200, 40, 255], [40, 40, 200, 255])):
        block.visual.face_colors = colour
    for i in range(4):                                        # half of them are held out
        trimesh.util.concatenate(blocks[:3 - i // 2]).export(folder / f"{'abcd'[i]}.ply")
    return data.prepare(out=folder / "cache", data=folder, workers=1, kinds=(SURFACE, PICTURES, VIEWS, LOW_POLY))


@pytest.mark.parametrize("i", range(8))
def test_samples_of_turned_shapes(lopsided, i):
    """Distances, points, a view and low-poly faces are those of the turned shape."""
    row, true, move = i * len(lopsided), lopsided.shape(0), SYMMETRIES[i]
    samples = SdfHead.batch_of(lopsided, [row], data.seeded(0)) | views_of(lopsided, [row]) | faces_of(lopsided, [row])
    assert abs(true.distance(samples["points"][0].numpy() @ move)).max() < .02
    assert true.distance(samples["queries"][0].numpy() @ move) == pytest.approx(samples["distance"][0].numpy(), abs=.01)

    vertices, faces, colours = vertex_coloured(true)
    faces = faces[:, ::-1] if i % 2 else faces                # mirrored triangles face inwards
    view = render_flat(vertices @ move.T, faces.copy(), colours, *samples["angles"][0].tolist(), SIZE)[..., :4]
    assert abs(view - samples["views"][0]).mean() < .01

    count, before = (samples["components"] >= 0).sum(), faces_of(lopsided, [0])
    assert count == (before["components"] >= 0).sum()
    corners, plain = (bin_centres(x["corners"][0, :count].numpy()) for x in (samples, before))       # f 3 3
    assert abs(true.distance((corners @ move).reshape(-1, 3))).max() < .05
    assert np.linalg.det(corners).sum() == pytest.approx(np.linalg.det(plain).sum())       # it looks outwards


def test_training_files_are_drawn_in_their_positions(lopsided):
    """As in the file and mirrored; turned: in all eight, each as often. Held-out files stay as they are."""
    test = data.prepare("test", out=lopsided.folder.parent, data=lopsided.folder.parents[1], workers=1)
    assert len(test) == 2
    torch.manual_seed(0)
    for split, turned, count in (lopsided, False, 2), (lopsided, True, 8), (test, False, 1), (test, True, 1):
        for rows in (split.draw_rows(4000, turned), split.draw_distinct(99, turned)):
            share = split.position[rows].bincount(minlength=8) / len(rows)
            assert (abs(share[:count] - 1 / count) < .03).all() and not share[count:].any()


def test_captions_and_classes_are_those_of_the_shape(lopsided):
    """In all positions."""
    rows = torch.arange(len(lopsided.position))
    texts = [lopsided.table.texts[i] for i in lopsided.table.draw_captions(rows)]
    assert all(text in lopsided.captions[row % len(lopsided)] for row, text in zip(rows, texts))
    assert all(torch.equal(x, x[:len(lopsided)].repeat(8)) for x in (lopsided.class_of, lopsided.coloured))


@pytest.mark.parametrize("i", range(1, 8))
def test_a_row_is_its_shape_moved(lopsided, i):
    """The samples of a row are those of its shape, as in the file, after the symmetry: points, the side of a view, and
    low-poly faces, which are in the canonical order of their position."""
    rows = 0, i * len(lopsided)
    (plain, normals, _), (moved, other, _) = (lopsided.cloud([row], 500, data.seeded(0)) for row in rows)
    move = torch.from_numpy(SYMMETRIES[i]).float()
    assert torch.equal(plain @ move.T, moved) and torch.equal(normals @ move.T, other)

    before, after = (views_of(lopsided, [row])["angles"][0] for row in rows)
    side = -before[0] if i % 2 else before[0]
    assert torch.equal(after, torch.stack([side + i // 2 * 90, before[1]]))

    before, after = ({name: x[0].numpy() for name, x in faces_of(lopsided, [row]).items()} for row in rows)
    there, here = (x["components"] >= 0 for x in (before, after))
    again = low_poly.in_order_again(before["corners"][there], before["face_colours"][there], SYMMETRIES[i])
    for name, values in zip(("corners", "face_colours", "components"), again):
        assert np.array_equal(after[name][here], values)


def test_symmetries_are_exact_under_autocast(lopsided):
    """Some clouds are turned under bf16 autocast."""
    points = lambda: lopsided.cloud([0, 2], 100, data.seeded(0))[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = points()
    assert torch.equal(rounded, points())


@pytest.mark.parametrize("subdivisions", [1, 3])
def test_a_low_poly_file_keeps_its_faces(subdivisions):
    """A ball of 80 faces is a low-poly mesh as it is; one of 1,280 is simplified."""
    ball = trimesh.creation.icosphere(subdivisions, .8)
    found = take_faces(soup.Soup(np.array(ball.vertices), ball.faces, np.ones(ball.faces.shape)), None)
    corners = bin_centres(found["corners"][found["components"] >= 0]).reshape(-1, 3)              # (f 3) 3
    keeps = len(corners) == ball.faces.size, cKDTree(ball.vertices).query(corners)[0].max() < .02
    assert keeps == (subdivisions == 1,) * 2


def test_pictures_of_mirror_images(lopsided):
    """Pictures are mirrored with the shape, and stay as they are when it turns."""
    (plain, mirrored, turned) = (lopsided.pictures([i * len(lopsided)], data.seeded(0), torch.tensor([0]), vary=False)
                                 for i in range(3))
    assert torch.equal(turned, plain)
    assert abs(mirrored.flip(3) - plain).mean() < .05         # light comes from one side
    assert abs(mirrored - plain).mean() > .05


def test_the_side_in_the_picture_becomes_the_front(tmp_path):
    """A cube with four coloured sides: in the row of the picture, the colour of most pixels is in front. (Those of an
    edge, where two sides have almost as many pixels, do not count.)"""
    cube, colours = trimesh.creation.box((1, 1, 1)), {(0, 0, 1): 0, (1, 0, 0): 1, (0, 0, -1): 2, (-1, 0, 0): 3}
    rainbow = np.array([[250, 0, 0, 255], [0, 250, 0, 255], [0, 0, 250, 255], [250, 250, 0, 255], [90, 90, 90, 255]])
    sides = [colours.get(tuple(normal.round().astype(int)), 4) for normal in cube.face_normals]
    cube.visual.face_colors = rainbow[sides]
    for name in "ab":
        cube.export(tmp_path / f"{name}.ply")
    train = data.prepare(out=tmp_path / "cache", data=tmp_path, workers=1, kinds=(PICTURES,))
    which = torch.arange(8).repeat_interleave(train.drawable())
    rows = torch.arange(train.drawable()).repeat(8)           # as in the files, and mirrored
    shown = train.arrays["picture_colours"][train.item[rows], which].reshape(len(rows), -1, 3).numpy().astype(int)
    alike = (abs(shown[:, :, None] - rainbow[:4, :3]).sum(3) < 60).sum(1)         # pictures, 4 colours: pixels
    moves = SYMMETRIES[train.position[train.as_shown(rows, which)].numpy()]
    fronts = [move @ list(colours)[i] for move, i in zip(moves, alike.argmax(1))]
    second, most = np.sort(alike, 1)[:, -2:].T
    clear = most > 1.5 * second
    assert clear.mean() > .5
    assert all(tuple(front.round().astype(int)) == (0, 0, 1) for front in np.array(fronts)[clear])


def test_without_a_picture_a_shape_is_as_in_its_file(lopsided):
    split, tower = copy.copy(lopsided), SimpleNamespace(width=1, cache=lambda split: split.table)
    split.table.draw_captions = split.table.take = lambda rows: rows              # captions are not read
    drawn = torch.arange(split.drawable()).repeat(40)
    torch.manual_seed(0)
    batch = encoders.Encoders({"text": tower, "image": tower}).draw_prompts(split, drawn)
    kept, own = batch["kept"]["image"], batch["rows"] == drawn % len(split)
    assert own[~kept].all() and .05 < own[kept].float().mean() < .5               # of eight turns and mirror images


def test_draco_without_its_package_is_named(tmp_path, monkeypatch):
    path = tmp_path / "ball.gltf"
    path.write_text(json.dumps({"asset": {"version": "2.0"}, "extensionsRequired": ["KHR_draco_mesh_compression"]}))
    monkeypatch.setattr(mesh_files, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install DracoPy"):
        real.read_shape(path)
