"""test_commands.py - the tests of train.py, of sample.py, and of the README's commands.

    python -m pytest -q test_commands.py
"""
import csv
import functools
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

import data
import ltm3d
import sample
from conftest import CHAIN, HERE, assert_one_line, run, same_files, train_small
from engine import files
from engine.commands import UserError, pick_device
from evaluation import attributes, peers
from evaluation.judges import grid_iou
from geometry import export
from heads import field_of

# ---------------------------------------------------------------------------- the shipped weights

def test_words_count_beside_a_picture():
    """The picture shows a green chair; with the words "a red chair", most samples are red chairs."""
    model = sample.load().load_heads("sdf")
    tokens = model.sample("a red chair", "assets/chair.png", 8)                   # b n c
    shapes = [attributes.measure_shape(field_of(model.heads["sdf"], x, model.autocast)) for x in tokens]
    assert sum(attributes.has_attribute(shape, "colour", attributes.colour(), "red") for shape in shapes) >= 6


def test_a_mesh_has_as_many_faces_as_asked():
    """With `faces`, the surface is simplified: closed, and never more faces."""
    for mesh in sample.load().generate("a chair", rep="mesh", n=2, faces=300):
        assert 200 < len(mesh.faces) <= 300
        assert mesh.soundness()["closed edges"] > .98


def test_the_sdf_head_brings_points_to_its_surface():
    """Half as far from it as where their own head leaves them, or nearer."""
    model = sample.load().load_heads("pc")
    tokens, head = model.sample("a chair")[0], model.heads["pc"]
    field, distances = field_of(model.heads["sdf"], tokens, model.autocast), []
    for heads in (model.heads, {"pc": head}):
        cloud = head.decode(tokens, heads, np.random.default_rng(0), model.autocast)
        distances.append(field(torch.from_numpy(cloud.points))[:, 0].abs().mean())
    assert distances[0] < distances[1] / 2


# ---------------------------------------------------------------------------- train

def same_weights(one, two, stages):
    names = [f"{stage}.safetensors" for stage in stages]
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.parametrize("kinds", [("text",), ("image",), ("text", "image")], ids="+".join)
def test_two_shapes_overfitted_through_all_stages(overfitted, kinds, tmp_path_factory):
    """train.py, then a prompt -> tokens -> field: the prompted one of two shapes comes back with IoU >= .9."""
    model = sample.load(overfitted).load_heads("sdf")
    split = data.prepare("train", 2, tmp_path_factory.getbasetemp() / "cache", kinds=("surface", "pictures"))
    texts = ["a table", "a chair"] if "text" in kinds else None
    pictures = split.pictures(np.arange(2), np.random.default_rng(0), vary=False) if "image" in kinds else None
    for i, tokens in enumerate(model.tokens(texts, [0, 1], pictures)):
        assert grid_iou(model.heads["sdf"], tokens, split.shape(i), model.autocast) >= .9
        assert grid_iou(model.heads["sdf"], tokens, split.shape(1 - i), model.autocast) < .5


def test_run_folder_holds_curves_and_pictures(overfitted):
    """Every stage leaves a CSV, some a picture, and its entry in config.json; no state and no unfinished file stays."""
    names = {path.name for path in overfitted.iterdir()}
    config = files.read_config(overfitted)
    assert {f"{stage}.csv" for stage in CHAIN} | {"losses.png"} <= names
    assert {"tokenizer-000280.png", "backbone-000180.png"} <= names
    assert not any("state" in name or "part" in name for name in names)
    assert list(config) == CHAIN
    assert config["backbone"]["steps"] == 180
    assert 1. in config["backbone"]["metrics"].values()
    rows = list(csv.DictReader((overfitted / "tokenizer.csv").open()))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_done_stages_are_skipped(overfitted, monkeypatch, capsys):
    monkeypatch.setattr(ltm3d, "fit", None)
    assert train_small(monkeypatch, overfitted, 2) == 0
    assert capsys.readouterr().out.count("already done") == 6


@pytest.mark.parametrize("data_name, flags, complaint", [
    ("shapes-train", ["--size", "tiny"], "--size small; give that"), ("furniture", [], "learnt from furniture")])
def test_a_stage_of_another_run_is_refused(overfitted, data_name, flags, complaint, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(overfitted, tmp_path / "run")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("shapes-train", data_name))
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
    assert len(export.read_shape(tmp_path / "a-table-0-pc.ply").points) == 300
    assert isinstance(export.read_shape(tmp_path / "a-table-0-gs.ply"), export.Gaussians)


BACKBONE = "--stage", "backbone", "--steps", 2, "--batch", 2


def test_a_run_starts_from_the_stages_of_another(overfitted, tmp_path, monkeypatch, capsys):
    """--from copies all stages but the backbone; the new backbone may be of another kind, which sample.py refuses."""
    flags, folder = ("--from", overfitted, "--generator", "diffusion", *BACKBONE), tmp_path / "peer"
    assert train_small(monkeypatch, folder, 2, *flags, generators=peers.GENERATORS) == 0
    config, source = files.read_config(folder), files.read_config(overfitted)
    assert config["backbone"]["generator"] == "diffusion"
    assert {**config, "backbone": 0} == {**source, "backbone": 0}
    assert same_weights(folder, overfitted, [stage for stage in source if stage != "backbone"])

    capsys.readouterr()
    assert run(sample.main, "--text", "a table", "--checkpoint", folder, "--out", tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, "is a peer of LTM3D")
    assert train_small(monkeypatch, folder, 2, *BACKBONE) == 2
    assert_one_line(capsys.readouterr().err, "--generator diffusion; give that")
    model = sample.load(folder, models={"ltm3d": peers.WithPeers})
    assert model.tokens(["a table"], [0]).shape == (1, 64, 8)
    with pytest.raises(UserError, match="give --rgs none"):
        model.tokens(["a table"], [0], rgs="sampled=.1")


@pytest.mark.parametrize("stage", ["encoders", "tokenizer", "vision", "backbone", "reconstruct"])
def test_finetuning_goes_on_from_the_weights_of_another_run(overfitted, tmp_path, monkeypatch, stage):
    """With no rate to speak of, the weights stay what they were; config.json says where they come from."""
    flags = "--stage", stage, "--steps", 2, "--batch", 2, "--lr", 1e-9
    assert train_small(monkeypatch, tmp_path / "run", 2, "--from", overfitted, "--finetune", *flags) == 0
    old, new = (files.read_weights(folder / f"{stage}.safetensors") for folder in (overfitted, tmp_path / "run"))
    assert all(torch.allclose(new[name], old[name], atol=1e-3) for name in old)
    steps = files.read_config(overfitted)[stage]["steps"]
    assert files.read_config(tmp_path / "run")[stage]["finetuned"]["steps"] == steps


def test_a_copied_stage_can_be_finetuned_later(overfitted, tmp_path, monkeypatch, capsys):
    """Beside a fine-tuned tokenizer stands a copied image tower. It goes on, and once only."""
    flags = "--from", overfitted, "--finetune", "--steps", 2, "--batch", 2, "--stage"
    assert train_small(monkeypatch, tmp_path / "run", 2, *flags, "tokenizer") == 0
    assert train_small(monkeypatch, tmp_path / "run", 2, *flags, "vision") == 0
    assert files.read_config(tmp_path / "run")["vision"]["steps"] == 2
    assert train_small(monkeypatch, tmp_path / "run", 2, *flags, "vision") == 0
    assert "vision: already done" in capsys.readouterr().out


def test_what_stands_on_a_finetuned_tokenizer_is_not_copied(overfitted, tmp_path, monkeypatch):
    """The towers stay; what reads tokens or makes them has to be fine-tuned, too."""
    flags = "--from", overfitted, "--finetune", "--stage", "tokenizer", "--steps", 2, "--batch", 2
    assert train_small(monkeypatch, tmp_path / "run", 2, *flags) == 0
    assert set(files.read_config(tmp_path / "run")) == {"encoders", "tokenizer", "vision"}


def test_finetuning_refuses_a_backbone_of_another_kind(overfitted, tmp_path, monkeypatch, capsys):
    flags = "--from", overfitted, "--finetune", "--denoiser", "ddpm", *BACKBONE
    assert train_small(monkeypatch, tmp_path / "run", 2, *flags) == 2
    assert "its size, denoiser, encoder or generator is another" in capsys.readouterr().err
    assert train_small(monkeypatch, tmp_path / "run", 2, "--finetune", *BACKBONE) == 2
    assert_one_line(capsys.readouterr().err, "name their folder")


def test_finetuning_needs_the_stage_in_both_folders(overfitted, tmp_path, monkeypatch, capsys):
    """What the folder of --from lacks cannot go on; a stage of the run that it lacks is done, not copied."""
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


def test_no_vision_stage_beside_another_image_tower(tmp_path, monkeypatch, capsys):
    assert train_small(monkeypatch, tmp_path / "run", 2, "--stage", "vision", "--image-encoder", "pixels") == 2
    assert_one_line(capsys.readouterr().err, "leave out --stage vision")


def test_from_needs_a_trained_folder(tmp_path, monkeypatch, capsys):
    assert train_small(monkeypatch, tmp_path / "run", 2, "--from", tmp_path, *BACKBONE) == 2
    assert_one_line(capsys.readouterr().err, "there is no trained tokenizer in")


def test_a_reconstructor_of_another_encoder_is_not_copied(overfitted, tmp_path, monkeypatch):
    flags = "--from", overfitted, "--text-encoder", "bag", *BACKBONE
    assert train_small(monkeypatch, tmp_path / "bag", 2, *flags) == 0
    assert set(files.read_config(tmp_path / "bag")) == {*CHAIN} - {"reconstruct"}


def test_own_tokens_train_their_own_encoder(tmp_path, monkeypatch):
    """--tokens own --rep pc: encoder and point head together, then a backbone, in a folder of its own; no sdf head."""
    flags = "--rep", "pc", "--tokens", "own", "--steps", 2, "--batch", 2
    assert train_small(monkeypatch, tmp_path / "own", 2, *flags) == 0
    assert files.read_config(tmp_path / "own-pc")["tokenizer"]["heads"] == ["pc"]
    assert {path.stem for path in (tmp_path / "own-pc").glob("*.safetensors")} == {*CHAIN, "head-pc"}


def test_a_head_goes_on_where_the_tokenizer_left_it(overfitted, tmp_path, monkeypatch, capsys):
    """--stage head --rep sdf: the head that was trained with the encoder learns on, once; the encoder stays."""
    folder = shutil.copytree(overfitted, tmp_path / "run")
    flags = "--rep", "sdf", "--stage", "head", "--steps", 1, "--batch", 2, "--lr", 1e-9
    for _ in range(2):
        assert train_small(monkeypatch, folder, 2, *flags) == 0
    assert capsys.readouterr().out.count("already done") == 1
    logs = {stage: list(csv.DictReader((folder / f"{stage}.csv").open())) for stage in ("head-sdf", "tokenizer")}
    assert len(logs["head-sdf"]) == 1
    assert float(logs["head-sdf"][0]["loss"]) < .5 * float(logs["tokenizer"][0]["loss"])
    assert same_weights(folder, overfitted, ["tokenizer"])


@pytest.mark.parametrize("flags, complaint", [
    (["--stage", "dinner"], "choose from"), (["--steps", "0"], "--steps: must be at least 1"),
    (["--lr", "nan"], "--lr: must be between"), (["--seed", "-1"], "--seed: must be"), (["--shapes", "x"], "invalid"),
    (["--bacth", "3"], "unrecognized arguments: --bacth"),
    (["--device", "toaster"], "--device toaster cannot be used here"),
    (["--stage", "backbone"], "holds no trained encoders")])
def test_train_bad_input_is_one_line(flags, complaint, tmp_path, monkeypatch, capsys):
    """A mistake is one line that names it, with exit status 2, and nothing is written."""
    assert train_small(monkeypatch, tmp_path / "run", 2, *flags) == 2
    assert_one_line(capsys.readouterr().err, complaint)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- sample

@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_of_the_user_wins(precision, dtype, monkeypatch):
    """--precision counts more than what the processor can do, and sample.py computes in it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": precision == "fp32"})
    for name, expected in ((precision, precision == "bf16"), (None, precision == "fp32")):
        device, autocast, _ = pick_device("cpu", precision=name)
        with autocast():
            assert torch.is_autocast_enabled(device.type) == expected
    model = sample.load(device="cpu", precision=precision)
    assert model.model.backbone.token.weight.dtype == dtype


@pytest.mark.parametrize("options, complaint", [
    (dict(prompt=None), "there is no prompt"), (dict(prompt=["a table"]), "one string, not a list"),
    (dict(rep="obj"), "sdf, pc, mesh, gs"), (dict(resolution=96), "32, 64, 128, 256, 512"), (dict(n=0), "at least 1"),
    (dict(steps=65), "shape tokens"), (dict(rgs="sampled"), "RGS takes"), (dict(rgs="sampled=5"), "from 0 to 1")])
def test_python_api_names_a_wrong_argument(overfitted, options, complaint):
    with pytest.raises(UserError, match=complaint):
        sample.load(overfitted, device="cpu").generate(**dict(prompt="a table", steps=1) | options)


def test_same_seed_same_bytes(overfitted, tmp_path):
    """The command twice = the same files; the Python API = the command; another seed is another mesh."""
    flags = "--text", "a table", "--checkpoint", overfitted, "--resolution", 64, "--n", 2
    for out, seed in (("one", 5), ("two", 5), ("other", 6)):
        assert run(sample.main, *flags, "--seed", seed, "--out", tmp_path / out) == 0
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"a-table-0.glb", "a-table-0.png", "a-table-1.glb", "a-table-1.png", "a-table.png"}
    assert same_files(tmp_path / "one", tmp_path / "two")
    for i, mesh in enumerate(sample.load(overfitted).generate("a table", rep="sdf", n=2, seed=5, resolution=64)):
        mesh.save(tmp_path / "api.glb")
        content = (tmp_path / "api.glb").read_bytes()
        assert content == (tmp_path / "one" / f"a-table-{i}.glb").read_bytes()
        assert content != (tmp_path / "other" / f"a-table-{i}.glb").read_bytes()
        assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight


@pytest.mark.parametrize("flags, complaint", [
    (["--colour", "red"], "unrecognized arguments: --colour"), (["--step", "3"], "unrecognized arguments: --step"),
    (["--steps", "0"], "--steps: must be between"), (["--steps", "65"], "65 steps are not between 1 and"),
    (["--cfg", "-1"], "--cfg: must be"), (["--cfg", "nan"], "--cfg: must be"), (["--n", "0"], "--n: must be"),
    (["--seed", "-1"], "--seed: must be"), (["--resolution", "100000"], "choose from 32, 64"),
    (["--rgs", "sampled=2"], "RGS takes none, auto, sampled=A"), (["--rgs", "x"], "RGS takes none, auto, sampled=A"),
    (["--window", "2"], "--window: must be between 0 and 1"), (["--rep", "voxels"], "choose from"),
    (["--points", "0"], "--points: must be"), (["--faces", "3"], "--faces: must be"),
    (["--faces", "300"], "give --rep mesh, too"),
    (["--device", "toaster"], "--device toaster"),
    (["--rep", "pc"], "has no head for pc, only for sdf; make it with: python train.py --rep pc"),
    (["--text", ""], "is empty"), (["--text", "with the"], "names no shape"), (["--device", "meta"], "--device meta"),
    (["--text", "a house"], "'house' is nothing that can be made"),
    (["--checkpoint", "nowhere"], "there is no folder nowhere"), (["--out", "{file}/below"], "cannot write")])
def test_sample_bad_input_is_one_line(overfitted, flags, complaint, tmp_path, capsys):
    """A mistake is one line that names it, with exit status 2, and nothing is written."""
    (tmp_path / "file").write_text("")
    flags = [flag.format(file=tmp_path / "file") for flag in flags]
    base = "--text", "a table", "--checkpoint", overfitted, "--resolution", 32, "--out", tmp_path / "out"
    assert run(sample.main, *base, *flags) == 2
    assert_one_line(capsys.readouterr().err, complaint)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name, damage, complaint", [
    ("backbone.safetensors", lambda content: content[:len(content) // 2], "truncated"),
    ("backbone.safetensors", lambda content: content[:-1000] + b"\xff" * 1000, "not finite"),
    ("head-sdf.safetensors", lambda content: pickle.dumps([1]), "no safetensors"),
    ("tokenizer.safetensors", lambda content: content + b"0", "trained with another tokenizer"),
    ("reconstruct.safetensors", None, "no file"),
    ("config.json", lambda content: content[:100], "not readable JSON"),
    ("config.json", lambda content: b"{}", "holds no trained backbone"),
    ("config.json", lambda content: content.replace(b'"dim": 64', b'"dim": 128'), "does not fit this model"),
    ("config.json", lambda content: content.replace(b'"heads": 4', b'"heads": 7'), "7 attention heads do not divide"),
    ("config.json", lambda content: content.replace(b'"settings"', b'"sittings"'), "has no 'settings'"),
    ("config.json", lambda content: content.replace(b'"towers"', b'"sampling": {"steps": "x"}, "towers"'), "sampling"),
    ("config.json", lambda content: content.replace(b'"towers"', b'"sampling": {"haste": 1}, "towers"'), "no haste")])
def test_damaged_checkpoint_is_one_line(overfitted, name, damage, complaint, tmp_path, capsys):
    """Truncated, foreign, missing, exchanged and other-sized files of a checkpoint are named."""
    folder = shutil.copytree(overfitted, tmp_path / "checkpoint")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage:
        (folder / name).write_bytes(damage(content))
    flags = "--text", "a table", "--rgs", "sampled=.1", "--checkpoint", folder, "--out", tmp_path / "out"
    assert run(sample.main, *flags) == 2
    assert_one_line(capsys.readouterr().err, complaint)
    assert not (tmp_path / "out").exists()


def test_weights_remember_how_they_are_sampled(overfitted, tmp_path):
    """Options in config.json are those of every sample; what is asked for wins."""
    folder = shutil.copytree(overfitted, tmp_path / "checkpoint")
    files.write_config(folder, "backbone", sampling={"steps": 2, "temperature": 0.})
    plain, remembering = (sample.load(path, precision="fp32") for path in (overfitted, folder))
    tokens = remembering.tokens(["a table"], [0])
    assert torch.equal(tokens, plain.tokens(["a table"], [0], steps=2, temperature=0.))
    asked = remembering.tokens(["a table"], [0], steps=10, temperature=1.)
    assert torch.equal(asked, plain.tokens(["a table"], [0]))
    assert not torch.equal(asked, tokens)


def test_empty_surface_is_one_line(overfitted, tmp_path, monkeypatch, capsys):
    """A sample without a surface is an error, not a traceback."""
    empty = export.Mesh(np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3)))
    monkeypatch.setattr(sample.Sampler, "decode", lambda *_: empty)
    assert run(sample.main, "--text", "a table", "--checkpoint", overfitted, "--out", tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, "empty")


# ---------------------------------------------------------------------------- README

def readme_command(script):
    """The README's first command that calls this script, as a list; the installation before it is left out."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.S)
    lines = [line.split("&&")[-1].strip() for block in blocks for line in block.splitlines()]
    return shlex.split(next(line for line in lines if line.startswith(f"python {script}")), comments=True)


@pytest.fixture
def fresh_copy(tmp_path):
    """A copy of the code with the shipped weights -> what runs a command in it."""
    for path in (HERE / "pyproject.toml", *HERE.glob("*.py"), *HERE.glob("[a-z]*/*.py")):
        copied = tmp_path / path.relative_to(HERE)
        copied.parent.mkdir(exist_ok=True)
        shutil.copy(path, copied)
    (tmp_path / "checkpoints").symlink_to(HERE / "checkpoints")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return functools.partial(subprocess.run, cwd=tmp_path, env=env, capture_output=True, text=True)


def test_readme_sample_command_runs_as_written(fresh_copy, tmp_path):
    done = fresh_copy(readme_command("sample.py"))
    assert done.returncode == 0, done.stderr
    paths = [tmp_path / line for line in done.stdout.splitlines() if re.fullmatch(r"\S+\.(glb|ply|png|gif)", line)]
    assert paths
    assert all(path.is_file() for path in paths)


def test_readme_test_command_finds_the_tests(fresh_copy):
    found = fresh_copy([*readme_command("-m pytest"), "--collect-only"])
    assert found.returncode == 0, found.stdout + found.stderr
    for name in ("test_all.py", "test_engine.py", "test_shapes.py", "test_prompts.py", "test_peers.py"):
        assert name in found.stdout
