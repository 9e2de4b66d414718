"""blocks.py - shape tokens -> blocks, a fifth representation: which voxels of a 32^3 grid are inside. Unit 7 writes it.

No other file knows it. One line registers it, in representations/__init__.py or, for one program, in that program:

    REPRESENTATIONS["blocks"] = BlockHead

    python -m pytest -q representations/test_fifth.py        # trains it, samples it, judges it

Letters: s sides of blocks.
"""
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from engine.grids import GridDecoder
from engine.networks import grid_points
from geometry.export import Mesh
from geometry.kinds import GREY, Kind
from geometry.metrics import iou
from geometry.surface import field_of
from representations.head import Head

# ---------------------------------------------------------------------------- what it trains on

SIDE = 32                            # voxels along a side
CENTRES = grid_points(SIDE)          # (x y z) 3, of voxels


def voxels_of(shape):                                         # unit 7
    """Is the centre of each voxel inside of the shape? Booleans (x y z), in the order of CENTRES. shape.distance maps
    points k 3, an array, to signed distances k."""
    return shape.distance(CENTRES.numpy()) < 0


def take_voxels(shape, rng):
    return {"voxels": voxels_of(shape)}


VOXELS = Kind("voxels", {"voxels": (np.bool_, (SIDE ** 3,))}, take_voxels)


# ---------------------------------------------------------------------------- the head

class BlockHead(GridDecoder, Head):
    """Tokens -> the logit that a point is inside."""
    POINTS = 2048                    # voxels of a training shape
    about = "blocks, the voxels of a 32^3 grid"
    kinds = VOXELS,
    helpers = "sdf",                 # for colours
    steps, batch, lr = 400, 16, 2e-3

    def __init__(self, conv=None, **size):                    # no conv: tokens of first_design.py
        super().__init__(conv=conv, **size, outputs=1)

    # ------------------------------------------------------------------------ training

    @classmethod
    def batch_of(cls, split, rows, rng=None):                 # unit 7
        """{"points": centres of POINTS random voxels, b k 3, "inside": are they inside, b k}. The voxels are the same
        for all rows. Random numbers are those of rng, on split.device; split.moved mirrors and turns the points, as the
        shapes of these rows are."""
        columns = torch.randint(SIDE ** 3, (cls.POINTS,), generator=rng, device=split.device)         # k
        points = repeat(CENTRES.to(split.device)[columns], "k i -> b k i", b=len(rows))
        return {"points": split.moved(points, rows), "inside": split.take("voxels", rows, columns)}

    def loss(self, tokens, batch):                            # unit 7
        """Binary cross-entropy, the mean over all points. -> loss, {"wrong": the share of points whose logit has the
        wrong sign}"""
        logits = self.evaluate(self.read(tokens), batch["points"])[..., 0]                            # b k
        loss = F.binary_cross_entropy_with_logits(logits, batch["inside"])
        return loss, {"wrong": ((logits > 0) != batch["inside"].bool()).float().mean()}

    # ------------------------------------------------------------------------ the shape

    def decode(self, tokens, heads, rng, autocast):           # unit 7
        """The blocks with a logit above 0. The sdf head, where there is one, gives the colour of the middle of each
        side."""
        logits = field_of(self, tokens, autocast)(CENTRES)                                            # (x y z) 1
        inside = rearrange(logits > 0, "(x y z) 1 -> x y z", x=SIDE, y=SIDE)
        corners = np.float32(outer_sides(inside.numpy()) * 2 / SIDE - 1)                              # s 4 3
        colours = np.full((len(corners), 3), GREY, np.float32)
        if "sdf" in heads:
            middles = torch.from_numpy(corners.mean(1))                                               # s 3
            colours = field_of(heads["sdf"], tokens, autocast)(middles)[:, 1:].clamp(0, 1).numpy()
        return Blocks.of(corners, colours)

    # ------------------------------------------------------------------------ how good it is

    def judge(self, heads, tokens, split, row, rng, autocast, points):
        """IoU with the voxels of the true shape; the number of blocks."""
        inside = field_of(self, tokens, autocast)(CENTRES)[:, 0] > 0                                  # (x y z)
        true = split.take("voxels", [row])[0].bool().cpu()
        return {"IoU": iou(inside.numpy(), true.numpy()), "blocks": inside.sum().item()}


# ---------------------------------------------------------------------------- the shape

def outer_sides(inside):                                      # unit 7
    """Voxels x y z, booleans -> the corners of the sides between inside and outside, s 4 3: whole numbers,
    counter-clockwise, seen from outside. A voxel (x, y, z) has the corners (x, y, z) to (x + 1, y + 1, z + 1)."""
    padded, unit, corners = np.pad(inside, 1), np.eye(3, dtype=int), []
    for axis in range(3):
        u, v = unit[(axis + 1) % 3], unit[(axis + 2) % 3]     # u x v is the axis
        for step, u, v in ((1, u, v), (-1, v, u)):
            outside = ~np.roll(padded, -step, axis)[1:-1, 1:-1, 1:-1]             # x y z, of the neighbour
            first = np.argwhere(inside & outside) + (step > 0) * unit[axis]       # s 3
            corners.append(np.stack([first, first + u, first + u + v, first + v], 1))
    return np.concatenate(corners)


class Blocks(Mesh):
    """The sides of blocks, two triangles each."""
    title = "blocks"

    @classmethod
    def of(cls, corners, colours):                            # s 4 3, s 3
        first = 4 * np.arange(len(corners))[:, None, None]
        faces = (first + [[0, 1, 2], [0, 2, 3]]).reshape(-1, 3)
        vertices = rearrange(corners, "s k i -> (s k) i")
        return cls(vertices, faces, repeat(colours, "s i -> (s k) i", k=4), smooth=False)
