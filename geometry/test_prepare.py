"""test_prepare.py - the tests of prepared sets."""
import contextlib
import copy
import functools
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import data
from conftest import same_files
from engine.commands import UserError
from geometry import asset_names, built_in, mesh_files, prepare, shapes
from geometry.kinds import RECORDS
from geometry.training_samples import SURFACE
from representations.mesh import LOW_POLY


@pytest.mark.parametrize("name", ["points.npy", "00000.json"])
def test_damaged_cache_is_one_line(prepared, name, tmp_path):
    """A file that is cut short is named as such, with what to do."""
    folder = shutil.copytree(prepared[1].folder, tmp_path / "set")
    path = folder / prepared[1].folders["surface"].name / name
    path.write_bytes(path.read_bytes()[:1])
    with pytest.raises(UserError, match="delete it"):
        data.Prepared(folder, prepared[1].source, [SURFACE])


@pytest.fixture
def in_threads(monkeypatch):
    """Preparation in threads, which see all patches; a thread can neither ignore Ctrl-C nor take signals."""
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(prepare, "start_worker", lambda parent: None)
    monkeypatch.setattr(mesh_files, "limit", lambda seconds: contextlib.nullcontext())


def test_interrupted_preparation_resumes(tmp_path, monkeypatch, in_threads):
    """Killed in the middle of a chunk and started again = never interrupted, byte by byte."""
    monkeypatch.setattr(prepare, "CHUNK", 3)
    whole = data.prepare("train", 8, tmp_path / "whole", workers=1)

    def stop_at_fifth(shape, rng):
        if rng.bit_generator.seed_seq.entropy[1] == 4:
            raise InterruptedError
        return SURFACE.take(shape, rng)

    with pytest.raises(InterruptedError):
        data.prepare("train", 8, tmp_path / "cut", workers=1, kinds=[replace(SURFACE, take=stop_at_fifth)])
    cut = tmp_path / "cut" / whole.folder.name / whole.folders["surface"].name
    assert (cut / "00000.json").is_file() and not (cut / "00001.json").is_file()
    assert len(data.prepare("train", 8, tmp_path / "cut", workers=1)) == 8
    assert same_files(whole.folders["surface"], cut)


def test_the_progress_bar_counts_shapes_not_chunks(tmp_path, monkeypatch, in_threads):
    """All shapes are in one chunk. Each waits until the bar has counted those before it."""
    monkeypatch.setattr(prepare, "SECONDS", .01)
    counted, shape = threading.Semaphore(0), built_in.BuiltIn.shape

    class Bar(prepare.tqdm):
        def update(self, count=1):
            for _ in range(count):
                counted.release()
            super().update(count)

    def wait_for_bar(source, row):
        assert row == 0 or counted.acquire(timeout=60)
        return shape(source, row)

    monkeypatch.setattr(prepare, "tqdm", Bar)
    monkeypatch.setattr(built_in.BuiltIn, "shape", wait_for_bar)
    assert len(data.prepare("train", 3, tmp_path, workers=1)) == 3


def test_a_kind_of_samples_is_named_by_what_it_depends_on(monkeypatch):
    """Other parts are another surface. Other captions leave the surface as it is, and are other records."""
    fingerprint, make = built_in.fingerprint.__wrapped__, shapes.make        # not the cached one
    change = {"parts": lambda shape: setattr(shape.parts[0], "sides", shape.parts[0].sides + 1),
              "captions": lambda shape: shape.captions.append("a thing")}

    def changed(seed, index, what):
        shape = make(seed, index)
        if index == 100:
            change[what](shape)
        return shape

    kinds = SURFACE, RECORDS
    before = [fingerprint(kind) for kind in kinds]
    for what, same in (("parts", [False, True]), ("captions", [True, False])):
        monkeypatch.setattr(shapes, "make", functools.partial(changed, what=what))
        assert [fingerprint(kind) == old for kind, old in zip(kinds, before)] == same


@pytest.fixture
def four_files(tmp_path, monkeypatch, in_threads):
    """Four files; built-in shapes are read from them, which is quicker."""
    for i in range(4):
        (tmp_path / f"shape{i}.obj").touch()
    monkeypatch.setattr(mesh_files, "shape", lambda item: shapes.make(0, int(item.file[-5])))
    return dict(data=tmp_path, workers=1)


def test_shards_are_the_whole(tmp_path, monkeypatch, four_files):
    """Two shares prepared one after the other = all at once; the first alone lacks the shapes of the other. Held-out
    shapes are prepared without the others."""
    monkeypatch.setattr(prepare, "CHUNK", 2)
    whole = data.prepare(out=tmp_path / "whole", **four_files)
    second = data.prepare(out=tmp_path / "shares", shard=(1, 2), **four_files)
    both = data.prepare(out=tmp_path / "shares", shard=(0, 2), **four_files)
    assert len(second) <= 2 and same_files(whole.folders["surface"], both.folders["surface"])
    assert not len(data.prepare(out=tmp_path / "none", shard=(3, 4), **four_files))         # a share without a chunk
    held_out = data.prepare("test", out=tmp_path / "whole", **four_files)
    assert held_out.folder == whole.folder and held_out.name != whole.name       # one folder; caches have the name
    assert len(held_out) == 2 and len(whole) == 4 and not {*held_out.item.tolist()} & {*whole.item.tolist()}
    every = data.prepare("all", out=tmp_path / "whole", **four_files)
    assert len(every) == 6 and every.version == f"{whole.version}-all" and every.name != whole.name
    monkeypatch.setattr(prepare, "CHUNK", 1)
    alone = data.prepare("test", out=tmp_path / "alone", **four_files)
    assert len(alone) == len([*alone.folders["surface"].glob("?????.json")]) == 2


def test_sets_without_broken_files_have_a_name_of_their_own(tmp_path, monkeypatch, four_files):
    """A file lacks one kind of samples: tokens of the rows with this kind and without are other files."""
    first = iter([True])

    def fail_once(*args):
        if next(first, False):
            raise UserError("no faces")
        return LOW_POLY.take(*args)

    surfaces, both = (data.prepare("all", out=tmp_path / "set", kinds=kinds, **four_files)
                      for kinds in ((SURFACE,), (SURFACE, replace(LOW_POLY, take=fail_once))))
    assert len(both) == len(surfaces) - 1 and both.name != surfaces.name


def test_batches_are_functions_of_their_generator(prepared):
    """The same generator gives the same batch; the distances in it are those of the shapes in its rows."""
    split, rows = prepared[0], prepared[0].spread(2)
    batch, again, other = (split.queries(rows, 640, data.seeded(seed)) for seed in (0, 0, 1))
    points, normals, colours = split.cloud(rows, 1024, data.seeded(0))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["queries"], other["queries"])
    for i, row in enumerate(rows):
        shape = split.shape(row)
        assert abs(shape.distance(batch["queries"][i].numpy()) - batch["distance"][i].numpy()).max() < 1e-3
        assert abs(shape.distance(points[i].numpy())).max() < 2e-3          # points are stored in half precision
    assert (normals.norm(dim=-1) - 1).abs().max() < .02 and 0 <= colours.min() <= colours.max() <= 1


def test_tiles_are_drawn_a_third_as_often(prepared):
    split = copy.copy(prepared[0])
    split.weights = torch.tensor([asset_names.weight(name) for name in ["stone wall", *["tree"] * 12]])
    torch.manual_seed(0)
    drawn = split.draw_rows(8000), torch.cat([split.draw_distinct(1) for _ in range(4000)])
    assert all((rows == 0).float().mean().item() == pytest.approx(1 / 37, abs=.008) for rows in drawn)
    assert len(split.draw_distinct(99).unique()) == 13
