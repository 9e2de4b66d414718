"""test_train.py - the tests of train.py.

    python -m pytest -q test_train.py
"""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
import trimesh
from torch.utils._pytree import tree_leaves

import backbone
import data
import encoders
import heads
import reconstruct
import sample
import tokenizer
from conftest import CHAIN, HERE, SMALL, NoWait, as_on_a_gpu, assert_one_line, no_waiting, run, train_small
from engine import files, loop
from engine.graphs import compiled
from engine.loop import Loop
from geometry.training_samples import PICTURES, SURFACE
from relatives import latte3d, lost, prior, vat
from representations.gs import GaussianHead
from representations.pc import PointHead
from representations.sdf import grid_iou


def same_weights(one, two, stages):
    names = [f"{stage}.safetensors" for stage in stages]
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.parametrize("kinds", [("text",), ("image",), ("text", "image")], ids="+".join)
def test_two_shapes_overfitted_through_all_stages(overfitted, kinds, cache):
    """train.py, then a prompt -> tokens -> field: the prompted one of two shapes is reconstructed with IoU >= .85. The
    prompts are full captions: a noun alone is 5 % of the backbone's captions, and some of its samples still fail."""
    model = sample.load(overfitted).load_heads("sdf")
    split = data.prepare("train", 2, cache, kinds=(SURFACE, PICTURES))
    texts = [max(captions, key=len) for captions in split.captions] if "text" in kinds else None
    pictures = split.pictures(np.arange(2), data.seeded(0), vary=False) if "image" in kinds else None
    for i, tokens in enumerate(model.tokens(texts, [0, 1], pictures)):
        right, wrong = [grid_iou(model.heads["sdf"], tokens, split.shape(k), model.autocast, 32) for k in (i, 1 - i)]
        assert right >= .85 and wrong < .5


def test_run_folder_holds_curves_and_pictures(overfitted):
    """Every stage writes a CSV, some a picture, and its entry in config.json; no state and no unfinished file stays."""
    names, config = {path.name for path in overfitted.iterdir()}, files.read_config(overfitted)
    pictures = {f"{stage}-{config[stage]['steps']:06d}.png" for stage in ("tokenizer", "backbone")}
    assert {f"{stage}.csv" for stage in CHAIN} | {"losses.png"} | pictures <= names
    assert not any("state" in name or "part" in name for name in names) and list(config) == CHAIN
    assert config["backbone"]["metrics"]["nearest held-out shape is of the right class"] >= .5         # two nouns alone
    rows = list(csv.DictReader((overfitted / "tokenizer.csv").open()))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_done_stages_are_skipped(overfitted, monkeypatch, capsys):
    monkeypatch.setattr(Loop, "__init__", None)
    assert train_small(monkeypatch, overfitted, 2) == 0
    assert capsys.readouterr().out.count("already done") == 6


@pytest.mark.parametrize("data_name, flags, complaint", [
    ("null", ["--size", "tiny"], "with --size small, not with --size tiny"),
    ('"furniture"', [], "with --data furniture, not with no --data")])
def test_a_stage_of_another_run_is_refused(overfitted, data_name, flags, complaint, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(overfitted, tmp_path / "run")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"data": null', f'"data": {data_name}'))
    assert train_small(monkeypatch, folder, 2, *flags) == 2
    assert_one_line(capsys.readouterr().err, complaint)


def test_heads_are_added_without_a_new_backbone(overfitted, four, tmp_path):
    """--rep all on a trained folder trains three heads and nothing else. sample.py then writes one shape in each."""
    new = {"head-pc", "head-mesh", "head-gs"}
    assert set(files.read_config(four)) == {*CHAIN, *new}
    assert {path.stem for path in four.glob("*.safetensors")} == {*CHAIN, "head-sdf", *new}
    assert same_weights(four, overfitted, CHAIN)
    flags = "--text", "a table", "--checkpoint", four, "--resolution", 32, "--points", 300
    assert run(sample.main, *flags, "--rep", "sdf", "pc", "3DGS", "--out", tmp_path) == 0
    names = {path.name for path in tmp_path.iterdir()}
    shapes = {"a-table-0-sdf.glb", "a-table-0-pc.ply", "a-table-0-gs.ply"}
    assert names == shapes | {f"a-table-0-{rep}.png" for rep in ("sdf", "pc", "gs")} | {"a-table-sdf-pc-gs.png"}
    assert len(trimesh.load(tmp_path / "a-table-0-pc.ply").vertices) == 300
    assert b"property float f_dc_0" in (tmp_path / "a-table-0-gs.ply").read_bytes()


def test_gaussians_learn_on_the_surface_of_the_sdf_head(four, tmp_path, monkeypatch):
    """Not on the true one: their loss gets the points and colours that onto_surface returns."""
    loss, batches = GaussianHead.loss, []
    moved = lambda field, x, normals: (torch.full_like(x, .25), torch.full_like(x, .75))

    def spy(self, tokens, batch):
        batches.append(batch)
        return loss(self, tokens, batch)
    monkeypatch.setattr(heads, "onto_surface", moved)
    monkeypatch.setattr(GaussianHead, "loss", spy)
    flags = "--rep", "gs", "--stage", "head", "--steps", 1, "--batch", 2
    assert train_small(monkeypatch, tmp_path, 2, "--from", four, "--finetune", *flags) == 0
    assert batches and all((x["points"] == .25).all() and (x["colours"] == .75).all() for x in batches)


BACKBONE = "--stage", "backbone", "--steps", 2, "--batch", 2


def test_training_masks_at_every_number_of_known_tokens(overfitted, tmp_path, monkeypatch):
    """Those of known_counts; held-out shapes at eight of them."""
    seen = {True: [], False: []}

    def loss(self, x, condition, known):
        seen[self.training].append(known)
        return 0 * self.pos_embed_in.sum()
    monkeypatch.setattr(backbone.Backbone, "loss", loss)
    flags = "--stage", "backbone", "--steps", 100, "--batch", 2
    assert train_small(monkeypatch, tmp_path, 2, "--from", overfitted, *flags) == 0
    assert {*seen[True]} == {*backbone.known_counts(64)} and len(seen[True]) == 100
    assert seen[False] == backbone.known_counts(64, 8, 1)


def test_a_run_starts_from_the_stages_of_another(overfitted, tmp_path, monkeypatch, capsys):
    """--from copies all stages but the backbone; the new backbone may be a variant, which sample.py refuses where it is
    unknown."""
    flags, folder = ("--from", overfitted, "--variant", "twin", *BACKBONE), tmp_path / "peer"
    monkeypatch.setitem(backbone.BACKBONES, "twin", backbone.Backbone)
    assert train_small(monkeypatch, folder, 2, *flags) == 0
    config, source = files.read_config(folder), files.read_config(overfitted)
    assert config["backbone"]["flags"]["variant"] == "twin"
    assert {**config, "backbone": 0} == {**source, "backbone": 0}
    assert same_weights(folder, overfitted, [stage for stage in source if stage != "backbone"])

    assert sample.load(folder).tokens(["a table"], [0]).shape == (1, 64, 8)
    capsys.readouterr()
    assert train_small(monkeypatch, folder, 2, *BACKBONE) == 2
    assert_one_line(capsys.readouterr().err, "with --variant twin, not with no --variant")
    monkeypatch.delitem(backbone.BACKBONES, "twin")
    assert run(sample.main, "--text", "a table", "--checkpoint", folder, "--out", tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, "is a variant, twin")


@pytest.mark.parametrize("stage", CHAIN)
def test_finetuning_starts_from_the_weights_of_another_run(overfitted, tmp_path, monkeypatch, stage):
    """With a rate near 0, the weights stay; config.json names their source. Stages that depend on a fine-tuned
    tokenizer are not copied."""
    flags, folder = ("--stage", stage, "--steps", 2, "--batch", 2, "--lr", 1e-9), tmp_path / "run"
    assert train_small(monkeypatch, folder, 2, "--from", overfitted, "--finetune", *flags) == 0
    old, new = (files.read_weights(path / f"{stage}.safetensors") for path in (overfitted, folder))
    assert all(torch.allclose(new[name], old[name], atol=1e-3) for name in old)
    config = files.read_config(folder)
    assert config[stage]["finetuned"]["steps"] == files.read_config(overfitted)[stage]["steps"]
    assert stage != "tokenizer" or set(config) == {"encoders", "tokenizer", "vision"}


def test_a_copied_stage_can_be_finetuned_later(overfitted, tmp_path, monkeypatch, capsys):
    """The image tower, copied beside a fine-tuned tokenizer; once only."""
    flags = "--from", overfitted, "--finetune", "--steps", 2, "--batch", 2, "--stage"
    for stage in ("tokenizer", "vision", "vision"):
        assert train_small(monkeypatch, tmp_path / "run", 2, *flags, stage) == 0
    assert files.read_config(tmp_path / "run")["vision"]["steps"] == 2
    assert capsys.readouterr().out.count("vision: already done") == 1


def test_a_head_is_finetuned_without_those_that_it_needs(overfitted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PointHead, "needs", ("sdf",))
    flags, first = ("--steps", 2, "--batch", 2, "--stage", "head", "--rep", "pc"), tmp_path / "first"
    assert train_small(monkeypatch, first, 2, "--from", overfitted, *flags) == 0
    assert capsys.readouterr().out.count("already done") == 1
    assert train_small(monkeypatch, tmp_path / "run", 2, "--from", first, "--finetune", *flags) == 0
    assert files.read_config(tmp_path / "run")["head-pc"]["finetuned"]["steps"] == 2
    out = capsys.readouterr().out
    assert "head-sdf: already done" in out and f"2 steps of 2, from {first}" in out


@pytest.mark.parametrize("source, flags, complaint", [
    (["--from", "{overfitted}", "--finetune"], ["--denoiser", "ddpm"], "--denoiser flow, not with --denoiser ddpm"),
    (["--finetune"], [], "name their folder"), (["--from", "{empty}"], [], "there is no trained stage in")])
def test_from_another_run_bad_input_is_one_line(overfitted, source, flags, complaint, tmp_path, monkeypatch, capsys):
    source = [flag.format(overfitted=overfitted, empty=tmp_path) for flag in source]
    assert train_small(monkeypatch, tmp_path / "run", 2, *source, *flags, *BACKBONE) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_finetuning_adds_words(overfitted, tmp_path, monkeypatch):
    """Words that --from lacks come last in the vocabulary; the vectors of the others are kept."""
    source, path = shutil.copytree(overfitted, tmp_path / "source"), tmp_path / "source" / "encoders.safetensors"
    config, weights = files.read_config(source), files.read_weights(path)
    words = config["encoders"]["vocabulary"]
    config["encoders"]["vocabulary"] = [*words[:2], *words[3:]]
    before = torch.cat([weights["word.weight"][:2], weights["word.weight"][3:]])
    files.save_weights(path, weights | {"word.weight": before}, half=True)
    config["encoders"]["signature"] = files.signature(source, "encoders", config["encoders"])
    (source / "config.json").write_text(json.dumps(config))
    flags = "--from", source, "--finetune", "--stage", "encoders", "--steps", 1, "--batch", 2, "--lr", 1e-9
    assert train_small(monkeypatch, tmp_path / "run", 2, *flags) == 0
    assert files.read_config(tmp_path / "run")["encoders"]["vocabulary"] == [*words[:2], *words[3:], words[2]]
    after = files.read_weights(tmp_path / "run" / "encoders.safetensors")["word.weight"]
    assert len(after) == len(words) and torch.allclose(after[:-1], before, atol=1e-3)


def test_finetuning_needs_the_stage_in_both_folders(overfitted, tmp_path, monkeypatch, capsys):
    """A stage that --from lacks cannot be fine-tuned; if the run has it, it is done."""
    source = shutil.copytree(overfitted, tmp_path / "source")
    config = files.read_config(source)
    config.pop("reconstruct")
    (source / "config.json").write_text(json.dumps(config))
    (source / "reconstruct.safetensors").unlink()
    flags = "--from", source, "--finetune", "--stage", "reconstruct"
    assert train_small(monkeypatch, tmp_path / "run", 2, *flags) == 2
    assert_one_line(capsys.readouterr().err, "holds no trained reconstruct")
    assert train_small(monkeypatch, shutil.copytree(overfitted, tmp_path / "done"), 2, *flags) == 0
    assert "reconstruct: already done" in capsys.readouterr().out


def test_own_tokens_train_their_own_encoder(tmp_path, monkeypatch):
    """--tokens own --rep pc: encoder and point head together, then a backbone, in a folder of its own; no sdf head."""
    flags = "--rep", "pc", "--tokens", "own", "--steps", 2, "--batch", 2
    assert train_small(monkeypatch, tmp_path / "own", 2, *flags, pictures=False) == 0
    assert files.read_config(tmp_path / "own-pc")["tokenizer"]["heads"] == ["pc"]
    assert {path.stem for path in (tmp_path / "own-pc").glob("*.safetensors")} == {*CHAIN, "head-pc"} - {"vision"}


def test_trained_from_texts_alone(overfitted, tmp_path, monkeypatch, capsys):
    """Without --image-encoder the generator has no image tower; a picture as a prompt is an error."""
    flags = "--from", overfitted, "--stage", "backbone", "--steps", 2, "--batch", 2
    assert train_small(monkeypatch, tmp_path / "run", 2, *flags, pictures=False) == 0
    assert set(encoders.load(tmp_path / "run", "backbone").towers) == {"text"}
    capsys.readouterr()
    assert run(sample.main, "--checkpoint", tmp_path / "run", "--image", HERE / "assets" / "chair.png") == 2
    assert_one_line(capsys.readouterr().err, "learnt from texts alone")


def test_files_are_augmented_in_eight_positions(tmp_path, monkeypatch):
    """Tokenizer and heads learn from files in all positions, the text tower only from files and their mirror images."""
    for i in range(3):
        trimesh.creation.box((1, .5, .2 + .2 * i)).export(tmp_path / f"box{i}x.obj")
    positions, drawable = {}, data.Prepared.drawable

    def counted(split, turned=False):
        positions[stage].add(drawable(split, turned) // len(split))
        return drawable(split, turned)

    monkeypatch.setattr(data.Prepared, "drawable", counted)
    flags = "--data", tmp_path, "--steps", 1, "--batch", 2, "--rep", "sdf", "pc", "--stage"
    for stage in ("encoders", "tokenizer", "head"):
        positions[stage] = set()
        assert train_small(monkeypatch, tmp_path / "run", 2, *flags, stage) == 0
    assert positions == {"encoders": {2}, "tokenizer": {8}, "head": {8}}


def test_the_sdf_head_continues_after_the_tokenizer(overfitted, tmp_path, monkeypatch, capsys):
    """--stage head --rep sdf: the head that was trained with the tokenizer learns on, once; the tokenizer stays."""
    folder = shutil.copytree(overfitted, tmp_path / "run")
    flags = "--rep", "sdf", "--stage", "head", "--steps", 1, "--batch", 2, "--lr", 1e-9
    for _ in range(2):
        assert train_small(monkeypatch, folder, 2, *flags) == 0
    assert capsys.readouterr().out.count("already done") == 1
    logs = {stage: list(csv.DictReader((folder / f"{stage}.csv").open())) for stage in ("head-sdf", "tokenizer")}
    assert len(logs["head-sdf"]) == 1
    assert float(logs["head-sdf"][0]["loss"]) < .5 * float(logs["tokenizer"][0]["loss"])
    assert same_weights(folder, overfitted, ["tokenizer"])


# ---------------------------------------------------------------------------- on a GPU

OWN = "--size", "tiny", "--from", "checkpoints/tiny"


@pytest.mark.chain
@pytest.mark.parametrize("flags, count", [
    (("--rep", "all"), 8), (("--stage", "tokenizer"), 1), (("--model", "vat", *OWN), 4), (("--model", "lost", *OWN), 3),
    (("--model", "latte3d", *OWN), 3)], ids=["ltm3d", "attention", "vat", "lost", "latte3d"])
def test_a_step_never_waits_and_is_one_graph(flags, count, tmp_path, monkeypatch):
    """Every stage: draws, loss, gradients and update never wait for a GPU. torch.compile makes one graph of the loss,
    with the same value, and no second one for other batches; for the backbone at most three, for all numbers of known
    tokens. What a GPU computes differently gives the same value."""
    small = {"dim": 64, "depth": 1, "heads": 4, "queries": 2}
    for sizes in (vat.SIZES, vat.GENERATORS, lost.SIZES, lost.STUDENTS, lost.GENERATORS, prior.SIZES, latte3d.SIZES):
        monkeypatch.setitem(sizes, "tiny", sizes["tiny"] | {key: small[key] for key in small if key in sizes["tiny"]})
    if "tokenizer" in flags:
        monkeypatch.delitem(SMALL[tokenizer], "conv")
    monkeypatch.setattr(vat.Encoder, "points", 256)
    monkeypatch.setattr(GaussianHead, "POINTS", 256)
    counts = {}

    update = loop.update

    def update_without_waiting(*args):
        with NoWait():
            return update(*args)

    class TestedLoop(Loop):
        def __init__(self, run, stage, model, draw_batch):
            def draw_without_waiting(split):
                if split is run.test:
                    return draw_batch(split)
                with as_on_a_gpu(), NoWait():
                    return draw_batch(split)

            draw_batch(run.train)                             # fills what is cached
            super().__init__(run, stage, model, draw_without_waiting)
            graphs, eager = [], self.net

            def backend(graph, inputs):
                graphs.append(graph)
                return graph.forward

            torch._dynamo.reset()
            traced = compiled(eager, backend=backend)

            def tested(*batch):
                state = torch.get_rng_state()

                def seeded(model, batch):
                    torch.set_rng_state(state)
                    found = eager(*batch)
                    return found if isinstance(found, tuple) else (found, {})
                loss = no_waiting(self.model, batch, seeded)
                self.model.zero_grad()
                torch.set_rng_state(state)
                assert tree_leaves(traced(*batch))[0].item() == pytest.approx(loss.item(), rel=1e-4)
                counts[stage] = len(graphs)
                torch.set_rng_state(state)
                return eager(*batch)
            tested.training = True
            self.net = tested

    monkeypatch.setattr(loop, "update", update_without_waiting)
    for module in (tokenizer, heads, backbone, encoders, reconstruct, vat, lost, latte3d, prior):
        monkeypatch.setattr(module, "Loop", TestedLoop)
    exactly = "--precision", "fp32"                           # in bf16, another order of operations rounds otherwise
    assert train_small(monkeypatch, tmp_path, 4, *flags, *exactly, "--steps", 3, "--batch", 4) == 0
    assert len(counts) == count
    assert counts.pop("backbone", 3) <= 3 and set(counts.values()) == {1}
