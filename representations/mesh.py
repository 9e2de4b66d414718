"""mesh.py - shape tokens -> a low-poly mesh, face by face. SimplifiedSurface stands in where no mesh head is trained.

    python train.py --rep mesh --stage head
    python sample.py --text "table" --rep mesh
    python evaluate.py tokenizer --rep mesh

Letters: s face slots, l levels.
"""
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from engine.commands import UserError
from engine.grids import from_patches
from engine.networks import Block
from geometry.export import Mesh
from geometry.kinds import Kind
from geometry.low_poly import canonical, check_mesh, in_order_again, match_like_components
from geometry.meshes import BINS, FACES, bin_centres, close_holes, face_components, quantise, sample_surface, weld
from geometry.metrics import chamfer, faces_within
from geometry.simplify import simplify_to
from geometry.symmetry import SYMMETRIES
from representations.head import Head

# ---------------------------------------------------------------------------- what it trains on

def take_faces(shape, rng, count=1):
    """A low-poly mesh in the first `count` positions (geometry/symmetry.py), each in its own canonical order; -1 where
    there is no face. A file with few faces keeps those that its author set."""
    vertices, faces, colours = shape.mesh(fine=shape.low_poly)
    check_mesh(vertices, faces)
    own = canonical(*simplify_to(vertices, faces, colours, FACES))                # corners, colours, components
    moved = [own, *(in_order_again(*own[:2], move) for move in SYMMETRIES[1:count])]
    return {name: np.stack(values) for name, values in zip(LOW_POLY.arrays, zip(*(padded(*mesh) for mesh in moved)))}


def padded(corners, colours, components):
    empty = FACES - len(corners)
    return (np.pad(corners, ((0, empty), (0, 0), (0, 0)), constant_values=-1),
            np.round(np.pad(colours, ((0, empty), (0, 0))) * 255), np.pad(components, (0, empty), constant_values=-1))


# 6 kB a mesh
LOW_POLY = Kind("faces", {"corners": (np.int16, (FACES, 3, 3)), "face_colours": (np.uint8, (FACES, 3)),
                          "components": (np.int16, (FACES,))}, take_faces, several="positions")


def faces_of(split, rows):
    """Low-poly meshes: corners b f 3 3 in bins, component b f (-1: no face), colours b f 3."""
    at = split.item[rows], split.position[rows]
    corners, components, colours = (split.arrays[name][at] for name in ("corners", "components", "face_colours"))
    return {"corners": corners.long(), "components": components.long(), "face_colours": colours.float() / 255}


# ---------------------------------------------------------------------------- the head

class SimplifiedSurface:
    """The surface of the sdf head with few faces, in place of a missing mesh head."""
    needs = "sdf",

    def decode(self, tokens, heads, rng, autocast=nullcontext, faces=None):
        return heads["sdf"].decode(tokens, heads, rng, autocast, 64).simplified(faces or FACES, flat=True)

    def judge(self, *args):
        return MeshHead.judge(self, *args)


class MeshHead(nn.Module, Head):
    """Face queries and tokens attend to each other. A query predicts FACES faces, neighbours in canonical order
    (geometry/low_poly.py). Every coordinate is a distribution over bins; its logits have rank LEVELS, so that bins
    share weights."""
    FACES, LEVELS = 4, 24
    RATE = 4         # factor of the learning rate (engine/optimizers.py)
    about = "a low-poly mesh"
    kinds = LOW_POLY,
    helpers = "sdf",
    stand_in = SimplifiedSurface
    options = {"faces": None}
    steps = 5000

    def __init__(self, side, channels, dim, heads, conv=0, patch=1):              # conv: of the other heads
        super().__init__()
        self.patch, dim = patch, dim * 3 // 2
        self.token, self.pos_embed = nn.Linear(channels, dim), nn.Parameter(torch.randn(side ** 3, dim) * .02)
        self.query = nn.Parameter(torch.randn(side ** 3, dim) * .5)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(6))
        self.norm = nn.LayerNorm(dim)
        self.coordinate = nn.Linear(dim, self.FACES * 9 * self.LEVELS)
        self.bins = nn.Parameter(torch.randn(self.LEVELS, BINS) * self.LEVELS ** -.5)
        self.other = nn.Linear(dim, self.FACES * 4)           # is there a face; its colour

    def forward(self, tokens):                                # b n c -> levels b s 9 l, exists b s, colours b s 3
        x = self.token(from_patches(tokens, self.patch)) + self.pos_embed                 # b side^3 d
        x = torch.cat([x, repeat(self.query, "q d -> b q d", b=len(x))], 1)
        for block in self.blocks[:-1]:
            x = block(x)
        queries = torch.arange(len(self.pos_embed), x.shape[1], device=x.device).expand(len(x), -1)     # b q
        x = self.norm(self.blocks[-1](x, rows=queries))
        levels = rearrange(self.coordinate(x), "b q (f i l) -> b (q f) i l", f=self.FACES, l=self.LEVELS)
        other = rearrange(self.other(x).float(), "b q (f i) -> b (q f) i", f=self.FACES)
        return levels, other[..., 0], other[..., 1:]

    def logits(self, levels):                                 # ... 9 l -> ... 9 BINS; only for faces that exist
        return (levels @ self.bins).float()

    # ------------------------------------------------------------------------ training

    @classmethod
    def batch_of(cls, split, rows, rng=None):
        return {"coloured": split.coloured[rows]} | faces_of(split, rows)

    def loss(self, tokens, batch):
        """Cross-entropy of the nine coordinates of every face and of whether the face exists; L1 of its colour."""
        levels, exists_logit, colour = self(self.between_shapes(tokens))
        components, corners, colours = batch["components"], batch["corners"].flatten(2), batch["face_colours"]
        true, f = components >= 0, components.shape[1]                                    # b f, is there a face
        logits = self.logits(levels[:, :f])                                               # b f 9 bins
        order = match_like_components(logits, corners, components)[..., None]
        corners, colours = (x.gather(1, order.expand_as(x)) for x in (corners, colours))  # b f 9, b f 3

        corners = corners.masked_fill(~true[..., None], -1)
        bins = F.cross_entropy(logits.flatten(0, 2), corners.flatten(), ignore_index=-1)
        exists = F.pad(true, (0, exists_logit.shape[1] - f)).float()                      # b s
        face = F.binary_cross_entropy_with_logits(exists_logit, exists)
        error = (true * batch["coloured"][:, None])[..., None] * (colour[:, :f] - colours).abs()
        error = error.sum() / (3 * true.sum())
        return bins + face + 2 * error, {"bins": bins.detach(), "face": face.detach(), "colour": error.detach()}

    @staticmethod
    def between_shapes(tokens):
        """Tokens b n c; one shape in four is moved up to .45 of the way to the nearest other. Generated tokens may lie
        between two shapes, and half of each makes no mesh: the head learns to choose the nearer one."""
        apart = torch.cdist(tokens.flatten(1), tokens.flatten(1)).fill_diagonal_(torch.inf)           # b b
        share = .45 * (4 * torch.rand(len(tokens), 1, 1, device=tokens.device) - 3).clamp(min=0)      # b 1 1
        return torch.lerp(tokens, tokens[apart.argmin(1)], share)

    # ------------------------------------------------------------------------ the shape

    @torch.no_grad()
    def decode(self, tokens, heads, rng, autocast=nullcontext, faces=None):
        """faces: of the sdf head's surface, simplified, instead; None: those that this head predicts."""
        if faces:
            if "sdf" not in heads:
                raise UserError("--faces simplifies the surface of an sdf head, which is missing here; leave it out")
            return SimplifiedSurface().decode(tokens, heads, rng, autocast, faces)

        # 1. predict: the faces that may exist, as distributions over bins
        with autocast():
            levels, exists_logit, colours = self(tokens[None])                            # 1 s 9 l, 1 s, 1 s 3
            exists = exists_logit[0].sigmoid()                                            # s
            chosen = exists > .05
            probability = self.logits(levels[0, chosen]).softmax(-1)                      # f 9 bins
        exists, colours = exists[chosen].cpu().numpy(), colours[0, chosen].clamp(0, 1).cpu().numpy()

        # 2. weld: corners become shared vertices; degenerate faces are removed
        vertices, faces, unfolded = weld(rearrange(probability, "f (i j) bins -> f i j bins", i=3).cpu().numpy())
        exists, colours = exists[unfolded], colours[unfolded]

        # 3. keep a component with mean existence above .8, or drop it as a whole: half a component is debris
        component = face_components(faces, len(vertices))                                 # f
        kept = (np.bincount(component, exists) > .8 * np.bincount(component))[component]

        # 4. colour: a vertex has the mean colour of its faces
        used, faces = np.unique(faces[kept], return_inverse=True)
        corner_colours = np.repeat(colours[kept], 3, 0).T                                 # 3 (f 3)
        total = np.stack([np.bincount(faces.ravel(), channel, len(used)) for channel in corner_colours], 1)
        colours = total / np.bincount(faces.ravel())[:, None]                             # v 3

        # 5. close holes of one or two missing faces
        faces = close_holes(faces.reshape(-1, 3))
        return Mesh(bin_centres(vertices[used]).astype(np.float32), faces, colours.astype(np.float32), smooth=False)

    # ------------------------------------------------------------------------ how good it is

    def judge(self, heads, tokens, split, row, rng, autocast, points):
        """Faces within 1 or 2 bins of the true ones in all nine coordinates; edges of the mesh that two faces share;
        Chamfer distance to the true surface of 2048 visible points, of the true low-poly mesh, of a second true
        cloud."""
        mesh, true = self.decode(tokens, heads, rng, autocast), faces_of(split, [row])["corners"][0].cpu().numpy()
        found, true = quantise(mesh.vertices)[mesh.faces], true[true[:, 0, 0] >= 0]           # f 3 3, g 3 3, in bins
        true_mesh = bin_centres(true).reshape(-1, 3), np.arange(3 * len(true)).reshape(-1, 3)
        surface, second = (split.shape(row).surface(2048, rng)[0] for _ in range(2))          # k 3 each
        return {"within 1 bin": faces_within(found, true, 1), "within 2 bins": faces_within(found, true, 2),
                **mesh.soundness(), "Chamfer": chamfer(mesh.surface(2048, rng)[0], surface),
                "of the true mesh": chamfer(sample_surface(*true_mesh, 2048, rng, hidden=False)[0], surface),
                "its floor": chamfer(second, surface)}
