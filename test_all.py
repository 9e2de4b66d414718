"""test_all.py - the tests of the method and of the code as a whole.

    python -m pytest -q -n 2 --dist worksteal      # all tests, those of the rooms too
    python -m pytest -q test_all.py -k prefix      # only those with this word in their name
"""
import copy
import functools
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh
from einops import repeat
from torch import nn

import backbone
import data
import reconstruct
import tokenizer
from conftest import HERE, SMALL, WIDTHS, NoWait, prompted, small_backbone
from engine.commands import UserError
from engine.grids import interpolate
from engine.networks import grid_points
from engine.noise import keys_of
from first_design import choose
from geometry.export import Mesh
from geometry.kinds import GREY
from geometry.spacing import gaps
from geometry.splat import baked_light
from geometry.surface import TRUNCATION
from prefix import Prefix
from representations import REPRESENTATIONS, with_needs
from representations.gs import GaussianHead
from representations.pc import PointHead
from representations.sdf import SdfHead, onto_surface, rarity

CONVOLUTIONS = SMALL[tokenizer]
FIRST = {key: value for key, value in CONVOLUTIONS.items() if key != "conv"}            # as in checkpoints/tiny
HEADS = [*product(REPRESENTATIONS, [CONVOLUTIONS]), ("sdf", FIRST)]
DESIGN = lambda x: x if isinstance(x, str) else "convolutions" if "conv" in x else "first"

# ---------------------------------------------------------------------------- the code

def test_ruff_finds_nothing():
    found = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", HERE], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


# ---------------------------------------------------------------------------- tokenizer

def test_heads_pull_equally_hard():
    """Gradients of joint heads have one norm, the micro-batch's share, whatever the losses; a gradient of 0 stays 0."""
    class Head:
        def __init__(self, scale):
            self.loss = lambda x, batch: (scale * x.sum(), {})
    tokens = torch.ones(4, 2, 3, requires_grad=True)
    batch = {"points": torch.zeros(4, 1, 3)}
    tokenizer.head_losses({"a": Head(1e3), "b": Head(0.)}, tokens, {"a": batch, "b": batch}, share=.25)[0].backward()
    assert tokens.grad.norm().item() == pytest.approx(.25, rel=1e-5)


@pytest.mark.parametrize("settings", [CONVOLUTIONS, FIRST], ids=DESIGN)
def test_standardise_changes_tokens_not_shapes(settings, prepared):
    """Afterwards tokens have mean 0 and deviation 1 per channel, and decode to the same field; it may be done twice."""
    torch.manual_seed(0)
    kinds = {"tokenizer": tokenizer.Tokenizer, "sdf": SdfHead}
    encoder, head = (choose(name, kind, settings)(**settings).eval() for name, kind in kinds.items())
    cloud, x = prepared[0].cloud(np.arange(12), 500, data.seeded(0)), torch.rand(12, 100, 3) * 2 - 1
    with torch.no_grad():
        before = head.evaluate(head.read(encoder(*cloud)), x)
        tokenizer.standardise(encoder, [head], encoder(*cloud)[:5])
        tokenizer.standardise(encoder, [head], encoder(*cloud))
        tokens = encoder(*cloud)
        after = head.evaluate(head.read(tokens), x)
    assert tokens.mean((0, 1)).abs().max() < 1e-4 and (tokens.std((0, 1)) - 1).abs().max() < 1e-4
    assert before.std() > .1 and torch.allclose(before, after, atol=1e-4)


def test_patches_change_tokens_not_shapes(prepared):
    """The same weights with patches of 2^3 tokens: an eighth as many tokens, the same field."""
    cloud, x = prepared[0].cloud(np.arange(3), 500, data.seeded(0)), torch.rand(3, 100, 3) * 2 - 1
    fields = []
    for patch in (1, 2):
        torch.manual_seed(0)
        settings = CONVOLUTIONS | {"patch": patch}
        encoder, head = (kind(**settings).eval() for kind in (tokenizer.Tokenizer, SdfHead))
        tokenizer.standardise(encoder, [head], encoder(*cloud))
        tokens = encoder(*cloud)                                                  # b n c
        fields.append(head.evaluate(head.read(tokens), x))
    assert tokens.shape == (3, 4 ** 3 // 8, 8 * CONVOLUTIONS["channels"])
    assert torch.allclose(*fields, atol=1e-4)


# ---------------------------------------------------------------------------- heads

def test_points_arrive_where_the_flow_goes():
    """With the velocity field that ends in four given points, every one of 3000 samples ends in one of the four."""
    head, ends = PointHead(**CONVOLUTIONS), torch.tensor([[.5, 0, 0], [-.5, 0, 0], [0, .5, 0], [0, 0, -.5]])

    def velocity(memory, x, t):                               # E[x - noise | x_t] for x one of the four, noise normal
        t = t[..., None].clamp(max=.999)
        weight = (-((x[:, :, None] - t[..., None] * ends) ** 2).sum(-1) / (2 * (1 - t) ** 2)).softmax(-1)
        return F.pad((weight @ ends - x) / (1 - t), (0, 6))

    head.velocity = velocity
    points = head.decode(torch.zeros(64, 8), {}, np.random.default_rng(0), points=3000).points
    distance = np.linalg.norm(points[:, None] - ends.numpy(), axis=-1)
    assert len(points) == 3000 and distance.min(1).max() < .02
    assert (abs(np.bincount(distance.argmin(1)) / 3000 - .25) < .05).all()


def test_grids_are_interpolated():
    """A linear function at the centres of cells is linear between them, and so is its slope."""
    x, grid = torch.rand(2, 50, 3) * 1.5 - .75, repeat(grid_points(4), "(x y z) i -> b x y z i", b=2, x=4, y=4)
    found = interpolate(grid, x.requires_grad_())
    assert torch.allclose(found, x, atol=1e-6)
    slope, = torch.autograd.grad(found.sum(), x)
    assert torch.allclose(slope, torch.ones_like(x), atol=1e-5)


def test_every_colour_has_the_same_weight():
    """Three points of one colour and one of another: the weights of both add up to 2 of 4."""
    weights = rarity(torch.tensor([[[.8, .2, .2]] * 3 + [[.2, .2, .8]]]))
    assert torch.allclose(weights, torch.tensor([[2 / 3, 2 / 3, 2 / 3, 2]]))


@pytest.mark.parametrize("rep, settings", HEADS, ids=DESIGN)
def test_files_without_colours_teach_none(rep, settings, prepared):
    """They are grey all over. The loss of no head depends on their colours: it learns the form."""
    assert prepared[0].coloured.tolist() == [1.] * len(prepared[0])
    split, head = copy.copy(prepared[0]), choose(rep, REPRESENTATIONS[rep], settings)(**settings)
    split.arrays = split.arrays | {"colours": torch.full_like(split.arrays["colours"], round(255 * GREY))}
    del split.coloured                                        # computed anew
    samples = head.batch_of(split, np.array([0, 1]), data.seeded(0))
    tokens, losses = torch.randn(2, 64, 8), []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(head.loss(tokens, samples)[0].item())
        for name in samples.keys() & {"colours", "face_colours", "views"}:
            samples[name] = torch.cat([torch.rand_like(samples[name][..., :3]), samples[name][..., 3:]], -1)
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("rep, settings", HEADS, ids=DESIGN)
def test_heads_learn_and_decode(rep, settings, prepared, monkeypatch):
    """Each head's loss falls in a few steps on two shapes. It decodes on the device of its tokens, whatever the default
    device is, and its shape can be sampled and drawn."""
    torch.manual_seed(0)
    monkeypatch.setattr(GaussianHead, "POINTS", 500)
    options = {name: {"resolution": 32, "points": 200, "faces": None}[name] for name in REPRESENTATIONS[rep].options}
    kinds = {name: choose(name, REPRESENTATIONS[name], settings) for name in with_needs([rep])}
    models = nn.ModuleDict({name: kind(**settings) for name, kind in kinds.items()})
    tokens, optimizer, losses = torch.randn(2, 64, 8), torch.optim.Adam(models.parameters(), 1e-3), []
    for _ in range(4):
        loss, _ = models[rep].loss(tokens, models[rep].batch_of(prepared[0], np.array([0, 1]), data.seeded(0)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    decoded = lambda: models[rep].decode(tokens[0], models, np.random.default_rng(0), **options)
    shape = decoded()
    with torch.device("meta"):
        assert all(map(np.array_equal, vars(decoded()).values(), vars(shape).values()))
    assert [x.shape for x in shape.surface(50, np.random.default_rng(0))] == 3 * [(50, 3)]
    assert shape.picture(32).shape == (32, 32, 3)


def test_points_move_onto_the_surface():
    """Of a ball, along their normals; with the colours that it has there."""
    normals = F.normalize(torch.randn(2, 50, 3), dim=-1)
    field = lambda x: torch.cat([(x.norm(dim=-1, keepdim=True) - .5) / TRUNCATION, x], -1)
    x, colours = onto_surface(field, normals * (.45 + .1 * torch.rand(2, 50, 1)), normals)
    assert torch.allclose(x, .5 * normals, atol=1e-5) and torch.allclose(colours, x.clamp(0, 1), atol=1e-5)


def test_gaussians_have_the_colour_of_the_surface_and_no_holes():
    """Of a red ball, whatever the head learnt: lit red, half opaque, not much smaller than the gaps between them."""
    ball = trimesh.creation.icosphere(3, .5)
    red = Mesh(np.float32(ball.vertices), ball.faces, np.tile(np.float32([.8, 0, 0]), (len(ball.vertices), 1)))
    surface, head = SimpleNamespace(decode=lambda *_: red), GaussianHead(**CONVOLUTIONS)
    head.evaluate = lambda memory, x: torch.full((*x.shape[:2], 11), -9.)                 # tiny, transparent
    found = head.decode(torch.zeros(64, 8), {"sdf": surface}, np.random.default_rng(0), points=500)
    assert len(found.means) == 500 and (found.colours[:, 1:] == 0).all()
    light = baked_light(torch.from_numpy(found.means))[:, 0].numpy()
    assert np.corrcoef(found.colours[:, 0], light)[0, 1] > .9
    assert (found.scales >= .24 * gaps(found.means)[0].min()).all() and (found.opacities >= .5).all()


# ---------------------------------------------------------------------------- prefix

def small_prefix():
    """-> a function of a condition that gives the tokens of its prefix, those behind the mask as 0; and a condition."""
    torch.manual_seed(0)
    model = Prefix(4, 64, 4, WIDTHS)

    def prefix(condition):
        tokens, mask = model(condition)
        return tokens * mask[..., None]
    return prefix, prompted()


def test_prefix_padding_has_no_influence():
    """Condition tokens behind the mask may hold anything."""
    prefix, condition = small_prefix()
    text, mask = condition["text"]
    padded = torch.where(mask[..., None], text, 100 * torch.randn_like(text))
    assert torch.allclose(prefix(condition), prefix(condition | {"text": (padded, mask)}), atol=1e-5)
    answers = prefix(condition)[:, -4:]
    assert not torch.allclose(answers[0], answers[1], atol=1e-2)


def hide(condition, *kinds):
    """The condition with these kinds of prompt behind the mask."""
    return {kind: (x, torch.zeros_like(mask) if kind in kinds else mask) for kind, (x, mask) in condition.items()}


def test_a_masked_prompt_has_no_influence():
    """A hidden prompt = no such prompt, of either kind; if both are hidden, all samples have the same prefix."""
    prefix, condition = small_prefix()
    places = slice(0, 5), slice(5, 9)                         # of the tokens of both kinds
    for kind, other, place in (("text", "image", places[0]), ("image", "text", places[1])):
        hidden, alone = prefix(hide(condition, kind)), prefix({other: condition[other]})
        assert not hidden[:, place].any()
        kept = torch.cat([hidden[:, :place.start], hidden[:, place.stop:]], 1)
        assert torch.allclose(kept, alone, atol=1e-5)
    nothing = prefix(hide(condition, "text", "image"))
    assert torch.allclose(nothing[0], nothing[2], atol=1e-5)
    assert torch.allclose(nothing[:, 5:], prefix(hide({"image": condition["image"]}, "image")), atol=1e-5)
    assert not torch.allclose(nothing[0, -4:], prefix(condition)[0, -4:], atol=1e-2)


# ---------------------------------------------------------------------------- backbone

def test_training_covers_every_moment_of_generation():
    """From no known token to few unknown ones. The hidden share, cos(pi/2 u^1.5), u uniform, has mean .74."""
    counts = backbone.known_counts(27)
    assert len(counts) == 16 and counts[0] == 0 and counts[-1] == 25 and abs(1 - np.mean(counts) / 27 - .74) < .02


@pytest.mark.parametrize("n", [1, 2, 7, 64, 512])
def test_schedules_place_every_token_once(n):
    """The steps follow one another from none to all, and each places at least one token."""
    for steps in {1, 2, 16, n // 2, n - 1, n} & set(range(1, n + 1)):
        pairs = backbone.schedule(n, steps)
        edges = [0, *(then for _, then in pairs)]
        assert len(pairs) == steps and [known for known, _ in pairs] == edges[:-1]
        assert edges == sorted(set(edges)) and edges[-1] == n
    for steps in (0, -1, n + 1):
        with pytest.raises(UserError, match=str(n)):
            backbone.schedule(n, steps)


@pytest.mark.parametrize("n", [1, 27, 64])
def test_a_round_resamples_every_token_once_given_the_others(n):
    """After the schedule. The order differs from sample to sample and from round to round."""
    found = list(backbone.unmasking_steps(n, keys_of([0, 1]), min(n, 8), rounds=2))
    first, *rounds = np.split(np.arange(len(found)), [min(n, 8), (len(found) + min(n, 8)) // 2])
    for part in (first, *rounds):
        drawn = torch.cat([found[i][0][:, found[i][1]:found[i][2]] for i in part], 1)
        assert (drawn.sort(1).values == torch.arange(n)).all()
        assert n == 1 or not (drawn[0] == drawn[1]).all()
    for order, known, after in found[min(n, 8):]:
        assert after == n and (order.sort(1).values == torch.arange(n)).all()


def test_a_schedule_places_few_tokens_at_first():
    sizes = [then - known for known, then in backbone.schedule(512, 8)]
    assert sizes == sorted(sizes) and sizes[-1] > 5 * sizes[0]


def test_contexts_ignore_unknown_tokens():
    """Context vectors depend on the known tokens, as a set, and on no unknown token; a few rows = those of all."""
    model, condition = small_backbone()
    prefix, x = model.prefix(condition), torch.randn(3, 27, 8)
    order, known, rows = torch.rand(3, 27).argsort(1), 10, torch.arange(27).expand(3, -1)
    changed = lambda places: x.scatter(1, places[..., None].expand(-1, -1, 8), torch.randn(3, 27, 8))
    z = model.contexts(*prefix, x, order, known, rows)
    assert torch.equal(z, model.contexts(*prefix, changed(order[:, known:]), order, known, rows))
    assert not torch.allclose(z, model.contexts(*prefix, changed(order[:, :1]), order, known, rows))
    flipped = torch.cat([order[:, :known].flip(1), order[:, known:]], 1)
    assert torch.allclose(z, model.contexts(*prefix, x, flipped, known, rows), atol=1e-5)
    few = order[:, known:known + 4]
    own = z.gather(1, few[..., None].expand(-1, -1, z.shape[-1]))
    assert torch.allclose(own, model.contexts(*prefix, x, order, known, few), atol=1e-6)


# ---------------------------------------------------------------------------- guidance

@pytest.mark.parametrize("denoiser", backbone.DENOISERS)
def test_guidance_one_is_conditional_only(denoiser):
    """With cfg = 1 the unconditional branch has no influence; with cfg = 2 it has."""
    model, condition = small_backbone(denoiser)
    other = copy.deepcopy(model)
    nn.init.normal_(other.prefix.conditions.null, std=3.)
    sampled = lambda model, cfg: model.generate(condition, keys_of(range(3)), steps=5, denoise_steps=4, cfg=cfg)
    assert torch.equal(sampled(model, 1.), sampled(other, 1.))
    assert not torch.equal(sampled(model, 2.), sampled(other, 2.))
    assert torch.allclose(sampled(model, 1.), sampled(model, 1 + 1e-7), atol=.01)              # all branches computed


def test_guidance_has_a_strength_for_each_prompt(monkeypatch):
    """The strength of the image comes first. Both grow from none to all of it at a quarter of the tokens."""
    model, condition = small_backbone()
    strengths = []
    monkeypatch.setattr(backbone.Flow, "sample", lambda net, z, noise, steps, strength, temperature:
                        strengths.append(strength) or noise(1)[:, 0])
    model.generate(condition, keys_of(range(3)), steps=27, cfg={"text": 4., "image": 2.})
    assert strengths[0] == []                                 # the conditional branch alone
    assert strengths[3] == pytest.approx([1 + 4 * 3 / 27, 1 + 3 * 4 * 3 / 27])
    assert strengths[7:] == [[2., 4.]] * 20


def test_rounds_are_cooler(monkeypatch):
    model, condition = small_backbone()
    temperatures = []
    monkeypatch.setattr(backbone.Flow, "sample", lambda net, z, noise, steps, strength, temperature:
                        temperatures.append(temperature) or noise(1)[:, 0])
    model.generate(condition, keys_of(range(3)), steps=5, temperature=.8, rounds=1, cool=.5)
    assert temperatures == [.8] * 5 + [.4] * backbone.GROUPS


def test_branches_in_one_batch_are_three_passes():
    """The contexts of text and picture, of the text alone, and of nothing, are stacked along the batch."""
    model, condition = small_backbone()
    x, order = torch.randn(3, 27, 8), torch.rand(3, 27).argsort(1)

    def contexts(condition):
        b = len(condition["text"][0])
        places = order.repeat(b // 3, 1)
        return model.contexts(*model.prefix(condition), x.repeat(b // 3, 1, 1), places, 9, places)     # b n d

    stacked, _ = backbone.split_condition(condition, 2.)
    both, text, nothing = contexts(stacked).chunk(3)
    alone = {"text": condition["text"]}
    assert torch.allclose(both, contexts(condition), atol=1e-5)
    assert torch.allclose(text, contexts(alone), atol=1e-5)
    assert torch.allclose(nothing, contexts(hide(alone, "text")), atol=1e-5)


def test_branches_share_their_noise():
    """All branches of a guided step get the same x and t. They add up to none + 3 (text - none) + 2 (both - text)."""
    def net(x, t, z):
        assert torch.equal(x, noisy.repeat(len(z) // 6, 1)) and torch.equal(t, time)
        return z * x
    noisy, time, z = torch.randn(6, 8), torch.rand(1), torch.randn(18, 8)
    out, (both, text, none) = backbone.denoise(net, noisy, time, z, [2., 3.]), (branch * noisy for branch in z.chunk(3))
    assert torch.allclose(out, none + 3 * (text - none) + 2 * (both - text), atol=1e-5)
    assert torch.equal(backbone.denoise(net, noisy, time, z[:6], []), both)


# ---------------------------------------------------------------------------- samples

@pytest.mark.parametrize("denoiser", backbone.DENOISERS)
def test_a_sample_does_not_depend_on_its_batch(denoiser, monkeypatch):
    """Three samples together = each alone = two and one, whatever was drawn before; another seed is another sample."""
    model, condition = small_backbone(denoiser)
    sampled = functools.partial(model.generate, steps=5, denoise_steps=4, cfg=1.5)             # more amplifies rounding
    keys, other = keys_of([7, 8, 9]), keys_of([8, 8, 9])
    together = sampled(condition, keys)
    assert torch.equal(together, sampled(condition, keys))
    assert not torch.allclose(together[0], sampled(condition, other)[0], atol=.1)
    for size in (1, 2):
        monkeypatch.setattr(backbone, "CACHED", size * 27 * SMALL[backbone]["dim"] * 3)        # 3 branches
        chunks = list(backbone.cache_sized(model, condition, keys))
        assert len(chunks[0][1]) == size
        apart = torch.cat([sampled(*chunk) for chunk in chunks])
        assert torch.allclose(together, apart, atol=.01)


@pytest.mark.parametrize("denoiser", backbone.DENOISERS)
def test_sampling_does_not_wait(denoiser, monkeypatch):
    (model, condition), keys = small_backbone(denoiser), keys_of(range(3))
    monkeypatch.delattr(np.random, "default_rng")             # all numbers are drawn on the device
    with NoWait():
        model.generate(condition, keys, steps=5, denoise_steps=4)


@pytest.mark.parametrize("denoiser", backbone.DENOISERS)
def test_a_model_allocates_on_its_device_alone(denoiser):
    """Device "meta" does not mix with the CPU, as a GPU does not."""
    model, condition = small_backbone(denoiser)
    model, condition = model.to("meta"), {kind: [x.to("meta") for x in pair] for kind, pair in condition.items()}
    model.loss(torch.zeros(3, 27, 8, device="meta"), condition, 5).backward()
    assert all(weight.grad.is_meta for weight in model.parameters() if weight.grad is not None)
    assert model.generate(condition, keys_of([7, 8, 9], "meta"), steps=5, denoise_steps=4).is_meta


# ---------------------------------------------------------------------------- denoisers

def exact_net(denoiser, mean, std):
    """What a perfect DenoiseNet answers when the data are N(mean, std^2)."""
    def flow(x, t, c):                                        # x_t = (1 - t) noise + t x
        t = t[:, None]
        share = (x - t * mean) / ((1 - t) ** 2 + (t * std) ** 2)
        return mean + t * std ** 2 * share - (1 - t) * share  # E[x | x_t] - E[noise | x_t]

    def ddpm(x, t, c):                                        # x_t = sqrt(a) x + sqrt(1 - a) noise
        a = backbone.DDPM.alpha(((1 - t) * backbone.DDPM.T).round())[:, None]
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std ** 2 + 1 - a)

    return {"flow": flow, "ddpm": ddpm}[denoiser]


@pytest.mark.parametrize("denoiser, steps", [("flow", 100), ("ddpm", 250)])
def test_denoisers_recover_a_known_distribution(denoiser, steps):
    """With the exact network, samples have the data's mean and deviation, and the loss is least."""
    torch.manual_seed(0)
    kind, net = backbone.DENOISERS[denoiser], exact_net(denoiser, 1., .5)
    x = kind.sample(net, torch.zeros(8000, 1), lambda count: torch.randn(8000, count, 2), steps)
    assert (x.mean(0) - 1).abs().max() < .03 and (x.std(0) - .5).abs().max() < .03

    def loss(factor, offset):
        torch.manual_seed(0)
        data, z = 1 + .5 * torch.randn(40_000, 2), torch.zeros(40_000, 1)
        return kind.loss(lambda x, t, z: factor * net(x, t, z) + offset, data, z)

    assert all(loss(1, 0) < loss(*other) for other in ((1.1, 0), (.9, 0), (1, .1), (1, -.1)))


def test_flow_steps_are_of_second_order():
    """Twice the steps, about a quarter of the error; for Euler's method it would be half."""
    net, z, noise = exact_net("flow", 1., .5), torch.zeros(1000, 1), torch.randn(1000, 1, 1)
    truth = 1 + .5 * noise[:, 0]                              # where the flow ends for this distribution
    errors = [(backbone.Flow.sample(net, z, lambda _: noise, steps) - truth).abs().mean() for steps in (16, 32, 64)]
    assert all(3 < coarse / fine < 5 for coarse, fine in zip(errors, errors[1:]))


def test_temperature_zero_is_one_answer():
    """Without noise the flow has one answer; a higher temperature spreads the samples."""
    net, z, noise = exact_net("flow", 1., .5), torch.zeros(4000, 1), torch.randn(4000, 1, 1)
    cold, cool, warm = (backbone.Flow.sample(net, z, lambda _: noise, 30, temperature=t).std() for t in (0., .5, 1.))
    assert cold < 1e-6 < cool < .7 * warm


# ---------------------------------------------------------------------------- reconstruction and RGS

def test_blending_conventions_are_mirror_images():
    """sampled=A (the figure's alpha) = recon=1-A (the text's alpha). auto blends with a picture alone, by .1."""
    x, recon = torch.randn(2, 27, 8), torch.randn(2, 27, 8)
    rule = lambda rgs, *kinds: reconstruct.rule_of(lambda condition: (recon, None), dict.fromkeys(kinds), rgs)
    for a in (0., .1, .7, 1.):
        assert torch.allclose(rule(f"sampled={a}")(x), rule(f"recon={1 - a}")(x), atol=1e-6)
    assert torch.equal(rule("sampled=1")(x), x) and torch.equal(rule("sampled=0")(x), recon)
    assert torch.equal(rule("auto", "image")(x), reconstruct.blend(x, recon, .1))
    assert rule("auto", "text") is rule("auto", "text", "image") is rule("none", "image") is None


@pytest.mark.parametrize("rgs", ["", "alpha=.1", "sampled", "sampled=2", "recon=-1", "within=x", "none=1"])
def test_a_wrong_rule_of_rgs_is_an_error(rgs):
    with pytest.raises(UserError, match="RGS takes"):
        reconstruct.parse_rgs(rgs)


def test_reconstruction_guides_the_first_steps():
    """RGS changes no token of the first step, where none is known, and every later token. A window is a share of the
    steps."""
    model, condition = small_backbone()
    recon = 3 * torch.randn(3, 27, 8)
    sampled = functools.partial(model.generate, condition, keys_of(range(3)), steps=8, denoise_steps=4)
    blend = lambda x: reconstruct.blend(x, recon, .1)
    plain = sampled()
    assert torch.equal(plain, sampled(rgs=lambda x: reconstruct.blend(x, recon, 1.)))
    assert torch.equal(plain, sampled(rgs=blend, window=1 / 8))
    changed = (sampled(rgs=blend, window=.25) != plain).any(-1).sum(1)
    assert (changed == 27 - backbone.schedule(27, 8)[0][1]).all()
    for window, count in ((0, 0), (.25, 2), (.75, 6), (1, 8)):
        calls = []
        sampled(window=window, rgs=lambda x: calls.append(x) or x)
        assert len(calls) == count


def test_tokens_near_the_reconstruction_are_kept():
    """within=S moves a token that is farther than S standard deviations, and no farther than needed; within=0 is the
    guess; the others keep every bit."""
    x, recon = torch.tensor([0., .9, -3, 5]), torch.tensor([0., 0, 0, 4])
    log_variance = 2 * torch.tensor([0., 0, 0, 2])            # standard deviations 1, 1, 1, e^2
    assert torch.equal(reconstruct.within(x, recon, log_variance, 1.), torch.tensor([0., .9, -1, 5]))
    assert torch.equal(reconstruct.within(x, recon, log_variance, 0.), recon)
    x, recon = torch.randn(2, 10_000)
    near = (x - recon).abs() < .99
    assert torch.equal(reconstruct.within(x, recon, torch.zeros(()), 1.)[near], x[near])


def test_the_reconstructor_predicts_its_variance():
    """The first token depends on the prompt alone, the second is noise of deviation .7. The guess is the mean."""
    torch.manual_seed(0)
    model = reconstruct.Reconstructor(2, 1, {"text": 8}, dim=32, depth=1, heads=2)
    prompts, optimizer = torch.randn(4, 1, 8), torch.optim.Adam(model.parameters(), 3e-3)
    condition = lambda rows: {"text": (prompts[rows], torch.ones(len(rows), 1, dtype=torch.bool))}
    for step in range(400):
        rows = torch.randint(4, (64,))
        tokens = torch.stack([rows - 1.5, .7 * torch.randn(64)], 1)[..., None]
        model.loss(tokens, condition(rows))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    recon, log_variance = model(condition(torch.arange(4)))
    sigma = (log_variance / 2).exp()[..., 0]
    assert (recon[:, 0, 0] - (torch.arange(4) - 1.5)).abs().max() < .3
    assert recon[:, 1].abs().max() < .3 and abs(sigma[:, 1].mean() - .7) < .2
    assert sigma[:, 0].max() < .45 * sigma[:, 1].min()


def test_all_branches_get_the_blend_in_the_first_steps(monkeypatch):
    model, condition = small_backbone()
    contexts, inputs = model.contexts, []

    def record(prefix, mask, x, *rest):
        inputs.append(x.chunk(3))
        return contexts(prefix, mask, x, *rest)
    monkeypatch.setattr(model, "contexts", record)
    model.generate(condition, keys_of(range(3)), steps=4, rgs=lambda x: torch.full_like(x, 7.), window=.5)
    for step, branches in enumerate(inputs[1:], 1):           # the first step has one branch
        assert all((x == 7).all() == (step < 2) for x in branches)
