"""test_checkpoints.py - the tests of checkpoints, and of files that are never half written."""
import contextlib
import json
import pickle
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine import files, networks
from engine.commands import UserError
from geometry import render


@pytest.mark.parametrize("half, tolerance", [(False, 0), (True, 1e-3)], ids=["fp32", "half"])
def test_checkpoint_round_trip(half, tolerance, tmp_path):
    """Saved and loaded weights are the same bits; in half precision they differ by 1e-3 at most."""
    model = networks.Block(64, 4)
    files.save_weights(tmp_path / "a.safetensors", model.state_dict(), half=half)
    other = files.load_model(networks.Block, tmp_path / "a.safetensors", dim=64, heads=4)
    for saved, loaded in zip(model.state_dict().values(), other.state_dict().values()):
        assert (saved - loaded).abs().max() <= tolerance


def test_a_matrix_in_int8_takes_a_byte_a_number(tmp_path):
    """Each number is off by at most 1/254 of the largest in its row. A row of zeros stays zero."""
    state = {"w": torch.randn(64, 256) * torch.logspace(-3, 3, 64)[:, None] * (torch.arange(64) != 7)[:, None]}
    files.save_weights(tmp_path / "a.safetensors", state, half=True, int8=["w"])
    assert (tmp_path / "a.safetensors").stat().st_size < 64 * 256 + 1000
    read = files.read_weights(tmp_path / "a.safetensors")
    assert ((read["w"] - state["w"]).abs().amax(1) <= state["w"].abs().amax(1) / 253.9).all()


def test_int8_of_a_wrong_scale_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(4, 4, dtype=torch.int8), "w:scale": torch.ones(3, 1)}, path)
    with pytest.raises(UserError, match="truncated or no safetensors"):
        files.read_weights(path)


@pytest.mark.parametrize("damage", [lambda x: x[:-5], lambda x: x[:20], lambda x: b"", lambda x: pickle.dumps([1])])
def test_damaged_weights_are_named(damage, tmp_path):
    path = tmp_path / "a.safetensors"
    files.save_weights(path, nn.Linear(3, 2).state_dict())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="truncated or no safetensors"):
        files.load_model(lambda: nn.Linear(3, 2), path)


def test_weights_in_numbers_of_another_kind_are_read_or_refused(tmp_path):
    for kind in (torch.float8_e4m3fn, torch.bool):
        save_file({name: x.to(kind) for name, x in nn.Linear(3, 2).state_dict().items()}, tmp_path / "a.safetensors")
        with contextlib.suppress(UserError):
            files.load_model(lambda: nn.Linear(3, 2), tmp_path / "a.safetensors")


def test_weights_of_another_model_are_named(tmp_path):
    files.save_weights(tmp_path / "a.safetensors", nn.Sequential(nn.Linear(3, 2)).state_dict())
    for model, complaint in ((nn.Sequential(nn.Linear(4, 2)), r"0\.weight is \(2, 3\), not \(2, 4\)"),
                             (nn.Linear(3, 2, bias=False), r"missing weight; unknown 0\.bias; unknown 0\.weight")):
        with pytest.raises(UserError, match=complaint):
            files.load_model(lambda: model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("field, value", [
    *(("settings", value) for value in (3, [], "dim", None, {"dim": None}, {"dim": 1e30}, {"dim": 10 ** 30},
                                        {"dim": float("nan")}, {"depth": 10_000}, {"widths": {"text": "wide"}})),
    ("flags", ["tiny"]), ("flags", {"size": 1}), ("signature", None),
    ("heads", "sdf"), ("vocabulary", 3), ("vocabulary", [1]), ("nouns", None), ("steps", "many"),
    ("seconds", float("nan")), ("made_with", []), ("made_with", {"tokenizer": 1}), ("data", {})])
def test_a_field_of_another_form_is_named(field, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"backbone": {field: value}}))
    with pytest.raises(UserError, match=f"'{field}' of backbone is .*, where .* should stand"):
        files.read_config(tmp_path)


def test_a_huge_layer_is_refused_before_it_takes_memory(tmp_path):
    files.save_weights(tmp_path / "a.safetensors", nn.Linear(3, 3).state_dict())
    for dim in (10 ** 9, 10 ** 30):
        with pytest.raises(UserError, match="does not fit this model|make no Linear"):
            files.load_model(nn.Linear, tmp_path / "a.safetensors", in_features=dim, out_features=dim)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    files.save_weights(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    with pytest.raises(UserError, match="not finite numbers, nothing is written"):
        files.save_weights(tmp_path / "a.safetensors", {"x": torch.tensor([7e4])}, half=True)
    assert files.read_weights(tmp_path / "a.safetensors")["x"] == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_stopped_write_leaves_the_old_file(tmp_path, error):
    """Whatever stops a write half way, the old file stays as it was, and no other file lies beside it."""
    path = tmp_path / "new" / "file.txt"
    with files.atomic_write(path) as part:
        part.write_text("old")
    with pytest.raises(error), files.atomic_write(path) as part:
        part.write_text("ne")
        raise error
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name, write", [
    ("a.safetensors", lambda path: files.save_weights(path, {"x": torch.randn(10 ** 6)})),
    ("a.png", lambda path: render.save_png(path, np.random.default_rng(0).integers(0, 255, (800, 800, 3), np.uint8)))])
def test_full_disk_leaves_the_old_file(name, write, tmp_path):
    """A file that does not fit on the disk is one clear error, and the old file stays."""
    path = tmp_path / name
    path.write_bytes(b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))            # no file may be longer than this
    try:
        with pytest.raises(UserError, match=f"cannot write .*{name}"):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
