"""test_fifth.py - a fifth representation, blocks, in this file and one line: the proof that a file is enough.

    python -m pytest -q representations
"""
import csv
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh
from einops import rearrange, repeat

import evaluate
import sample
from conftest import run, train_small
from engine.files import read_config
from engine.grids import GridDecoder
from engine.networks import grid_points
from geometry import surface
from geometry.export import Mesh
from geometry.kinds import Kind
from geometry.metrics import iou
from geometry.surface import field_of
from representations import REPRESENTATIONS
from representations.head import Head

# ---------------------------------------------------------------------------- what it trains on

SIDE = 32                            # voxels along a side
CENTRES = grid_points(SIDE)          # (x y z) 3


def take_voxels(shape, rng):
    return {"voxels": shape.distance(CENTRES.numpy()) < 0}


VOXELS = Kind("voxels", {"voxels": (np.bool_, (SIDE ** 3,))}, take_voxels)


# ---------------------------------------------------------------------------- the head

class BlockHead(GridDecoder, Head):
    """Tokens -> is the centre of a voxel inside?"""
    POINTS = 1024                    # voxels of a training shape
    about = "cubes of a 32^3 grid"
    kinds = VOXELS,
    steps, batch, lr = 400, 16, 2e-3

    def __init__(self, **size):
        super().__init__(**size, outputs=1)

    @classmethod
    def batch_of(cls, split, rows, rng=None):
        columns = torch.randint(SIDE ** 3, (cls.POINTS,), generator=rng, device=split.device)         # k
        points = repeat(CENTRES.to(split.device)[columns], "k i -> b k i", b=len(rows))
        return {"points": split.moved(points, rows), "inside": split.take("voxels", rows, columns)}

    def loss(self, tokens, batch):
        logits = self.evaluate(self.read(tokens), batch["points"])[..., 0]                            # b k
        loss = F.binary_cross_entropy_with_logits(logits, batch["inside"])
        return loss, {"wrong": ((logits > 0) != batch["inside"].bool()).float().mean()}

    def decode(self, tokens, heads, rng, autocast):
        logits = field_of(self, tokens, autocast)(CENTRES)                                            # (x y z) 1
        return Blocks.of(rearrange(logits > 0, "(x y z) 1 -> x y z", x=SIDE, y=SIDE).numpy())

    def judge(self, heads, tokens, split, row, rng, autocast, points):
        """IoU with the voxels of the true shape; blocks: their number."""
        inside, true = field_of(self, tokens, autocast)(CENTRES)[:, 0] > 0, split.take("voxels", [row])[0].bool().cpu()
        return {"IoU": iou(inside.numpy(), true.numpy()), "blocks": inside.sum().item()}


# ---------------------------------------------------------------------------- the shape

class Blocks(Mesh):
    """The sides of voxels between inside and outside."""
    title = "blocks"

    @classmethod
    def of(cls, inside):                                      # x y z, booleans
        padded, corners = np.pad(inside, 1), []
        for axis in range(3):
            for step in (-1, 1):
                voxel = np.argwhere(inside & ~np.roll(padded, -step, axis)[1:-1, 1:-1, 1:-1])         # k 3
                u, v = np.eye(3, dtype=int)[[(axis + 1) % 3, (axis + 2) % 3]][::step]                 # outward
                first = voxel + (step > 0) * np.eye(3, dtype=int)[axis]
                corners.append(np.stack([first, first + u, first + u + v, first + v], 1))             # k 4 3
        vertices, squares = np.unique(np.concatenate(corners).reshape(-1, 3), axis=0, return_inverse=True)
        faces = squares.reshape(-1, 4)[:, [0, 1, 2, 0, 2, 3]].reshape(-1, 3)
        grey = np.full((len(vertices), 3), .7, np.float32)
        return cls(np.float32(vertices * 2 / SIDE - 1), faces, grey, smooth=False)


# ---------------------------------------------------------------------------- the proof

def test_blocks_are_a_closed_mesh_of_the_right_volume():
    """Faces look outward: a mesh of two blocks encloses two voxels, and so does one of two that touch at an edge."""
    for other in ((1, 0, 0), (1, 1, 0)):
        inside = np.zeros((SIDE,) * 3, bool)
        inside[3, 4, 5] = inside[3 + other[0], 4 + other[1], 5 + other[2]] = True
        mesh = Blocks.of(inside)
        assert trimesh.Trimesh(mesh.vertices, mesh.faces).volume == pytest.approx(2 * (2 / SIDE) ** 3)


def test_a_fifth_representation_is_one_file_and_one_line(overfitted, examined, tmp_path, monkeypatch):
    """It is trained on frozen tokens, sampled, shown on a page, and judged on held-out shapes; no other file knows it.
    Its samples are blocks about as many as the true shape has."""
    monkeypatch.setitem(REPRESENTATIONS, "blocks", BlockHead)                     # the line

    folder = shutil.copytree(overfitted, tmp_path / "run")
    monkeypatch.setattr(surface, "COARSE", 8)
    flags = "--rep", "blocks", "--stage", "head", "--steps", 60, "--batch", 2, "--lr", 6e-3
    with monkeypatch.context() as patch:
        assert train_small(patch, folder, 2, *flags, watched=True) == 0
    assert (folder / "head-blocks-000060.png").is_file()
    assert read_config(folder)["head-blocks"]["metrics"]["IoU"] > .5

    out = tmp_path / "out"
    flags = "--text", "a table", "--checkpoint", folder, "--rep", "blocks", "--html", "--out", out
    assert run(sample.main, *flags) == 0
    assert 500 < len(trimesh.load(out / "a-table-0-blocks.glb", force="mesh").faces)
    assert '"rep": "blocks"' in (out / "a-table.html").read_text()

    flags = "--checkpoint", folder, "--rep", "blocks", "--shapes", 2, "--out", out
    assert run(evaluate.main, "tokenizer", *flags) == 0
    rows = list(csv.DictReader((out / "tokenizer-blocks.csv").open()))
    assert {"IoU", "blocks"} <= rows[0].keys() and float(rows[0]["blocks"]) > 100
