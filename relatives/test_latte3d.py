"""test_latte3d.py - the tests of latte3d.py, prior.py and geometry/volume.py.

    python -m pytest -q relatives/test_latte3d.py
"""
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from einops import rearrange

import evaluate
import sample
from conftest import WIDTHS, assert_one_line, prompted, run, same_files, stop_in_step, train_small
from engine import loop
from engine.networks import grid_points
from engine.optimizers import learning_rate, optimizers, set_rate
from geometry import shapes
from geometry.camera import EYE
from geometry.splat import baked_light
from geometry.surface import TRUNCATION
from geometry.training_samples import REACH
from geometry.volume import POINTS, SIDE, along_rays, gradient, look_up, paint, pixel_rays, render
from geometry.words import COLOURS
from relatives import latte3d, prior

CELLS = 48
ANGLES = torch.tensor([[[20. + 90 * i, 15] for i in range(4)]])                   # 1 v 2


def grid_of(distance, colour=.5):                             # of points k 3 -> 1 4 s s s
    d = rearrange(torch.as_tensor(distance).float(), "(x y z) -> 1 1 x y z", x=CELLS, y=CELLS) / TRUNCATION
    return torch.cat([d, torch.full_like(d, colour).expand(-1, 3, -1, -1, -1)], 1)


# ---------------------------------------------------------------------------- pictures

def test_a_sphere_looks_as_it_should():
    """Coverage, depth and colour of a sphere, where a ray is not at its rim: in closed form."""
    radius = .6
    x, depth = render(grid_of(grid_points(CELLS).norm(dim=-1) - radius), ANGLES, .004)
    eye, ray, towards = pixel_rays(ANGLES)                    # |eye + t ray| = radius
    a, half, c = (ray ** 2).sum(-1), (eye * ray).sum(-1), (eye ** 2).sum(-1) - radius ** 2
    root = half ** 2 - a * c
    t = (-half - root.clamp(min=0).sqrt()) / a                                    # 1 v p, where the ray enters
    point = eye + t[..., None] * ray
    closest = (EYE ** 2 - half ** 2 / a).clamp(min=0).sqrt()  # of the ray to the centre
    hit, missed = closest < radius - .06, closest > radius + .06
    x, depth = (rearrange(y, "b v h w c -> b v (h w) c") for y in (x, depth))
    assert hit.sum() > 500 and missed.sum() > 1000
    assert (x[hit][:, 3] > .99).all() and (x[missed][:, 3] < -.99).all()
    assert depth[hit][:, 0].sub(.5 + (point * towards).sum(-1)[hit] / (2 * REACH)).abs().max() < .03
    lit = .5 * baked_light(point[hit] / radius)
    assert (x[hit][:, :3] / 2 + .5 - lit).abs().max() < .03


@pytest.mark.parametrize("index", [1, 4])                     # a chair, a sofa
def test_cameras_agree_with_the_pictures_of_shapes(index):
    """The true distances, rendered, look like the pictures that the prior learns from: from all four sides."""
    shape = shapes.make(0, index)
    sides = {name: torch.as_tensor(np.array(x), dtype=torch.float32)[None]
             for name, x in prior.take_sides(shape, np.random.default_rng(index)).items()}
    x, depth = render(grid_of(shape.distance(grid_points(CELLS).numpy())), sides["side_angles"], .006)
    true, true_depth = prior.pictures_of({"sides": sides["sides"] / 255})
    turned = torch.roll(true, 1, 1)
    assert (x[..., 3] - true[..., 3]).abs().mean() / 2 < .035
    assert (depth - true_depth).abs().mean() < .03
    assert (x[..., 3] - turned[..., 3]).abs().mean() > 1.5 * (x[..., 3] - true[..., 3]).abs().mean()


@pytest.mark.parametrize("beta", [latte3d.SHARP[0], latte3d.SHARP[1], 1e-4])
def test_what_is_behind_fades_as_a_product(beta):
    """The weights of along_rays = alpha_i prod_(j < i) (1 - alpha_j), written as a product, and so are the gradients;
    also where nothing of the light is left."""
    torch.manual_seed(0)
    distance = grid_of(grid_points(CELLS).norm(dim=-1) - .6)[:, :1] * TRUNCATION
    distance = (distance + .02 * torch.randn_like(distance)).requires_grad_()
    _, points, weight, _ = along_rays(distance, ANGLES, beta)
    found = look_up(distance, points)[:, 0]                                       # 1 v p k
    density = torch.where(found > 0, torch.exp(-found.abs() / beta) / 2, 1 - torch.exp(-found.abs() / beta) / 2) / beta
    clear = torch.exp(-density * 2 * REACH / POINTS)                              # 1 v p k
    product = torch.cat([torch.ones_like(clear[..., :1]), clear[..., :-1].cumprod(-1)], -1)
    factor, weights = torch.randn_like(clear), (weight, (1 - clear) * product)
    gradients = [torch.autograd.grad((x * factor).sum(), distance, retain_graph=True)[0] for x in weights]
    assert weights[0].sum(-1).max() > .99 and gradients[0].abs().max() > 0
    assert torch.allclose(*weights, atol=1e-6)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5 * gradients[0].abs().max())


def test_paint_is_render_for_one_colour():
    """A texture of one colour gives the same pictures as a grid of that colour."""
    grid = grid_of(grid_points(CELLS).norm(dim=-1) - .6, .3)
    x, depth = render(grid, ANGLES, .006)
    painted, same = paint(grid, ANGLES, .006, lambda points: torch.full_like(points, .3))
    assert (depth - same).abs().max() < 1e-5
    assert (x - painted).abs().mean() < .01


def test_a_grid_is_the_planes_at_its_cells():
    torch.manual_seed(0)
    field = latte3d.Field(side=4, dim=32)
    torch.nn.init.normal_(field.out.weight, std=.2)
    tokens = torch.randn(2, 64, 32)
    planes, points, grid = latte3d.Planes.read(field, tokens), field.points.expand(2, -1, -1), field.read(tokens)
    found = latte3d.Planes.evaluate(field, planes, points)    # b k 4
    assert torch.allclose(rearrange(grid, "b c x y z -> b (x y z) c"), found, atol=1e-4)
    assert torch.allclose(field.evaluate(grid, points), found - torch.tensor([latte3d.LEVEL, 0, 0, 0]), atol=1e-4)


def test_it_begins_as_a_sphere():
    field = latte3d.Field(side=4, dim=32)
    mesh = field.decode(torch.randn(64, 32), {}, None, resolution=32)
    radius = latte3d.RADIUS + latte3d.LEVEL * TRUNCATION
    assert np.linalg.norm(mesh.vertices, axis=1) == pytest.approx(radius, abs=.005)


def test_the_surface_is_where_a_cell_is_half_opaque():
    """Thin parts that pictures show do not break."""
    beta, cell = latte3d.SHARP[1], 2 / latte3d.CELLS
    density = math.exp(-latte3d.LEVEL * TRUNCATION / beta) / (2 * beta)           # VolSDF, outside
    assert 1 - math.exp(-density * cell) == pytest.approx(.5, abs=.01)


# ---------------------------------------------------------------------------- score distillation

TEXT = {"text": prompted(2)["text"]}


class LinearPrior:
    """Finds that the clean pictures are `share` of the noisy ones, and without the prompt `less` of them."""
    share, less = .8, .5

    def guided(self, x, t, condition, strengths, angles, depth=None):
        return self.less * x + strengths[0] * (self.share - self.less) * x, self.share * x


def test_the_gradient_of_score_distillation(monkeypatch):
    """x - x_hat, over the number of values, with x_hat in closed form: noise and time are the same."""
    monkeypatch.setattr(latte3d, "RESCALED", 0.)
    x, noise = torch.randn(2, 4, 8, 8, 4, requires_grad=True), torch.tensor([.3, .9])
    torch.manual_seed(1)
    latte3d.distillation(LinearPrior(), x, TEXT, ANGLES, noise, cfg=3.).backward()
    torch.manual_seed(1)
    share = rearrange(noise, "b -> b 1 1 1 1")
    found = (.5 + 3 * .3) * (share * torch.randn_like(x) + (1 - share) * x)
    assert torch.allclose(x.grad, ((x - found) / x.numel()).detach(), atol=1e-7)


def test_guidance_is_rescaled():
    """Half of the standard deviation is that of pictures without guidance, over all four views of a shape."""
    x, noise = torch.randn(2, 4, 8, 8, 4), torch.tensor([.3, .9])
    x = latte3d.distilled(LinearPrior(), x, TEXT, ANGLES, noise, cfg=7.)
    factor = .5 + 7 * .3
    plain = x.flatten(1).std(1) / (.5 * .8 / factor + .5) / factor                # of noisy pictures
    assert torch.allclose(x.flatten(1).std(1), plain * (.5 * .8 + .5 * factor), rtol=1e-4)


def test_the_most_noise_falls():
    torch.manual_seed(0)
    first, last = (latte3d.draw_noise(torch.tensor(progress), 4000) for progress in (0., 1.))
    assert first.max() == pytest.approx(.98, abs=.01) and last.max() == pytest.approx(.5, abs=.01)
    assert first.min() >= .02 and last.min() >= .02


def test_words_alone_are_enough_at_the_end():
    """When annealing has ended, the cloud changes nothing, exactly; before, it does."""
    torch.manual_seed(0)
    grower = latte3d.Grower(27, 8, WIDTHS, dim=32, depth=1, heads=4, queries=2)
    condition, clouds = prompted(), torch.randn(2, 3, 27, 8)
    one, two = (grower(condition, latte3d.faded(cloud, grower.dummy, torch.tensor(.75))) for cloud in clouds)
    assert torch.equal(one, two) and torch.equal(one, grower(condition))
    for progress, share in ((0., 1.), (.15, .5)):
        kept = latte3d.faded(torch.ones(400, 1, 1), torch.zeros(1, 1), torch.tensor(progress)).mean()
        assert kept == pytest.approx(share, abs=.1)


def test_a_tenth_of_the_combinations_is_held_out():
    """Of class and colour; files have no attributes, and none is."""
    assert not any(latte3d.unseen({"class": name, "attributes": {}}) for name in shapes.CLASSES)
    pairs = [{"class": name, "attributes": {"colour": colour}} for name in shapes.CLASSES for colour in COLOURS]
    assert .05 < np.mean([latte3d.unseen(pair) for pair in pairs]) < .15


# ---------------------------------------------------------------------------- the prior

def small_prior():
    torch.manual_seed(0)
    model = prior.Prior(patch=8, dim=32, depth=1, heads=4, queries=2, widths=WIDTHS)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=.1)
    return model.eval()


@torch.no_grad()
def test_the_prior_sees_all_sides_its_cameras_and_depth():
    """A change of one view changes what it finds for the others; so do other cameras, and a depth."""
    model, condition = small_prior(), {"text": prompted(2)["text"]}
    x, t, angles = torch.randn(2, 4, SIDE, SIDE, 4), torch.tensor([.2, .7]), ANGLES.expand(2, -1, -1)
    before = model(x, t, condition, angles)
    other = torch.cat([torch.randn_like(x[:, :1]), x[:, 1:]], 1)
    for found in (model(other, t, condition, angles), model(x, t, condition, angles + 45),
                  model(x, t, condition, angles, torch.rand(2, 4, SIDE, SIDE, 2))):
        assert (found - before)[:, 2].abs().max() > 1e-4


def test_a_file_is_not_mirrored(monkeypatch):
    """The pictures of its four sides exist in one position: a mirrored row becomes the shape itself."""
    class Files:
        table = SimpleNamespace(draw_captions=lambda rows: rows, take=lambda captions: captions)
        __len__ = lambda self: 3
        draw_rows = lambda self, count, weights: torch.arange(count)

    monkeypatch.setattr(prior.encoders_, "make", lambda *_: SimpleNamespace(cache=lambda *_: Files.table))
    monkeypatch.setattr(prior, "sides_of", lambda split, rows: rows)
    run_of_six = SimpleNamespace(folder="", device="cpu", encoder_names={}, micro_batch_size=lambda stage: 6)
    drawn = prior.prompted_sides(run_of_six, "latte3d-prior")[1](Files())
    assert [rows.tolist() for rows in drawn] == [[0, 1, 2, 0, 1, 2]] * 3


@torch.no_grad()
def test_without_guidance_one_branch_is_enough():
    """With strength 1 the branches cancel to the first."""
    model, condition = small_prior(), {"text": prompted(2)["text"]}
    x, t, angles = torch.randn(2, 4, SIDE, SIDE, 4), torch.tensor([.2, .7]), ANGLES.expand(2, -1, -1)
    guided, plain = model.guided(x, t, condition, [], angles)
    assert torch.equal(guided, plain)


# ---------------------------------------------------------------------------- as a whole

@pytest.mark.chain
def test_a_shape_comes_back_from_its_pictures():
    """A field learns a bottle from its true pictures: IoU >= .9. (Of other shapes, pictures hide more.)"""
    torch.manual_seed(0)
    shape, field = shapes.make(0, 11), latte3d.Field(side=4, dim=64)
    taken = [prior.take_sides(shape, np.random.default_rng(i)) for i in range(8)]
    sides, angles = (torch.tensor(np.stack([x[name] for x in taken])).float() for name in ("sides", "side_angles"))
    true, true_depth = prior.pictures_of({"sides": sides / 255})
    field.tokens, steps = torch.nn.Parameter(torch.randn(1, 64, 64)), 80
    opts = optimizers(field, 5e-3)
    for step in range(steps):
        set_rate(opts, learning_rate(step, steps, 5e-3))
        i, grid = [step % len(taken)], field.read(field.tokens)
        x, depth = render(grid, angles[i], .1 * .06 ** (step / steps), torch.rand(()) - .5)
        slope = gradient(TRUNCATION * grid[:, 0]).norm(dim=1)
        loss = (x - true[i]).square().mean() + (depth - true_depth[i]).square().mean()
        (loss + .05 * (slope - 1).square().mean()).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    points = grid_points(CELLS)
    inside = torch.from_numpy(shape.distance(points.numpy())) < 0
    found = field.evaluate(field.read(field.tokens), points[None])[0, :, 0] < 0
    assert (found & inside).sum() / (found | inside).sum() > .9


@pytest.mark.chain
def test_all_stages_end_to_end(examined, tmp_path, monkeypatch, capsys):
    """The chain, stopped and resumed = not stopped; a prompt becomes a textured mesh, also refined; pictures of the
    prior, also of a mesh; a table; mistakes are one line."""
    monkeypatch.setitem(latte3d.SIZES, "tiny", dict(dim=64, depth=1, heads=4, queries=2, side=4))
    monkeypatch.setitem(prior.SIZES, "tiny", dict(patch=8, dim=64, depth=1, heads=4, queries=2))
    whole, cut, out = (tmp_path / name for name in ("whole", "cut", "out"))
    flags = "--model", "latte3d", "--size", "tiny", "--from", "checkpoints/tiny", "--batch", 2, "--steps", 4
    stages = "latte3d-prior", "latte3d-geometry", "latte3d-texture"
    assert train_small(monkeypatch, whole, 4, *flags) == 0
    with monkeypatch.context() as patch:
        patch.setattr(latte3d, "EMPTY", 1.)                   # every picture is as good as empty
        assert train_small(monkeypatch, tmp_path / "empty", 4, *flags, "--stage", "latte3d-prior") == 0
        assert train_small(monkeypatch, tmp_path / "empty", 4, *flags, "--stage", "latte3d-geometry") == 2
        assert_one_line(capsys.readouterr().err.splitlines()[-1], "all shapes have vanished")
    monkeypatch.setattr(loop, "learning_rate", stop_in_step(2, lambda: signal.raise_signal(signal.SIGTERM)))
    for stage in stages:
        assert train_small(monkeypatch, cut, 4, *flags, "--stage", stage) == 130
        assert train_small(monkeypatch, cut, 4, *flags, "--stage", stage) == 0
    assert same_files(whole, cut, "latte3d-*.safetensors")

    sampled = "--text", "a table", "--checkpoint", whole, "--resolution", 32, "--out", out
    assert run(sample.main, *sampled) == 0
    for other in ("one", "two"):
        assert run(sample.main, *sampled, "--refine", 1, "--out", tmp_path / other) == 0
    assert same_files(tmp_path / "one", tmp_path / "two")
    one, two = (sample.load(whole).sample("a table", n=n, refine=1) for n in (1, 2))
    assert torch.allclose(one[0], two[0], atol=1e-3) and not torch.allclose(two[0], two[1], atol=1e-3)
    mesh = out / "a-table-latte3d-0.glb"
    assert len(trimesh.load(mesh, force="mesh").faces)
    for depth in ((), ("--depth", mesh)):
        assert run(prior.main, "--text", "a table", "--checkpoint", whole, "--n", 1, "--out", out, *depth) == 0
    monkeypatch.setattr(latte3d, "unseen", lambda record: record["class"] == "chair")
    table = "--checkpoint", whole, "--shapes", 2, "--unseen", 1, "--refine", 1, "--resolution", 32, "--out", out
    assert run(evaluate.main, "latte3d", *table) == 0
