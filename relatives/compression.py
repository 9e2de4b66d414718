"""compression.py - a shape in a few hundred bytes: packed codes, and how much of the shape they keep.

    python -m relatives.vat compress chair.glb chair.vat
    python -m relatives.vat decompress chair.vat chair.glb
"""
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from engine.commands import Parser, UserError
from engine.files import digest
from geometry import real
from geometry.metrics import fscore
from prompts.reading import find
from relatives.codes import read_codes, write_codes
from representations.sdf import grid_iou

POINTS = 100_000    # of each surface, for the F-score
POOR = .8           # below this IoU there is a warning
WRITTEN = ".glb", ".obj", ".stl"        # meshes that decompress writes


def compress(model, decoder, source, target, fingerprint):
    """Mesh -> a file of codes. Says how much of the mesh they keep; its size and place are not kept."""
    shape, rng, book = real.read_shape(source), np.random.default_rng(0), model.quantiser.book
    cloud = [torch.from_numpy(np.float32(x))[None] for x in shape.surface(model.points, rng)]         # 1 k 3 each
    indices = model.codes(*cloud)                                                 # 1 N
    write_codes(target, indices[0], book.bits, fingerprint)
    latents, = model.latents(indices)                                             # n c
    mesh = decoder.decode(latents, {}, None)
    x, y = mesh.surface(POINTS, rng)[0], shape.surface(POINTS, rng)[0]
    overlap = grid_iou(decoder, latents, shape, nullcontext)
    print(f"{target}: {target.stat().st_size} bytes; what comes back has F-score {fscore(x, y, .02):.3f} (at .02) "
          f"and IoU {overlap:.3f}")
    if overlap < POOR:
        print("warning: little of the shape is kept; it is not like those that the weights learnt", file=sys.stderr)


def decompress(model, decoder, source, target, fingerprint, resolution):
    """A file of codes -> mesh."""
    quantiser = model.quantiser
    codes = read_codes(source, quantiser.book, sum(quantiser.counts), fingerprint)
    latents, = model.latents(torch.from_numpy(codes)[None])                       # n c
    decoder.decode(latents, {}, None, resolution=resolution).save(target)
    print(target)


def main(load_tokenizer):
    """The commands of vat.py, which knows how its tokenizer is loaded."""
    parser = Parser("a shape in a few hundred bytes")
    commands = parser.add_subparsers(dest="command", required=True)
    for function, source, endings in ((compress, f"a mesh: {', '.join(real.SUFFIXES)}", [".vat"]),
                                      (decompress, "a file that compress wrote", WRITTEN)):
        own = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        own.set_defaults(function=function, endings=endings)
        own.add_argument("source", type=Path, help=source)
        own.add_argument("target", type=Path, help=f"file to write: {', '.join(endings)}")
        own.add_argument("--checkpoint", default="checkpoints/vat", help="folder of trained weights, the same for both")
    cells = commands.choices["decompress"].add_argument
    cells("--resolution", type=int, choices=(32, 64, 128, 256), default=128, help="cells along a side")
    args = parser.parse_args()
    if args.target.suffix.lower() not in args.endings:
        raise UserError(f"{args.target}: give it a name that ends in {' or '.join(args.endings)}")
    folder = find(args.checkpoint) or args.checkpoint
    model, decoder = load_tokenizer(folder)
    options = {"resolution": args.resolution} if args.function == decompress else {}
    args.function(model, decoder, args.source, args.target, digest(f"{folder}/vat-codes.safetensors"), **options)
