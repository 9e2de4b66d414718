"""compression.py - a shape in a few hundred bytes: the codes of vat.py, packed; and how much is lost.

    python vat.py compress chair.glb chair.vat
    python vat.py decompress chair.vat chair.glb
"""
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from engine.codes import read_codes, write_codes
from engine.commands import Parser
from engine.files import digest
from evaluation.judges import grid_iou
from evaluation.metrics import fscore
from geometry import mesh_files, real

POINTS = 100_000    # of each surface, for the F-score


def compress(model, decoder, source, target, fingerprint):
    """Writes the codes of a mesh, and prints how much of it they keep."""
    (item, *_), _ = real.list_items(source)
    shape, rng, book = mesh_files.shape(item), np.random.default_rng(0), model.quantiser.book
    cloud = [torch.from_numpy(np.float32(x))[None] for x in shape.surface(model.points, rng)]         # 1 k 3 each
    indices = model.codes(*cloud)                                                 # 1 N
    write_codes(target, indices[0], book.bits, fingerprint)
    latents, = model.latents(indices)                                             # n c
    mesh = decoder.decode(latents, {}, None)
    x, y = mesh.surface(POINTS, rng)[0], shape.surface(POINTS, rng)[0]
    print(f"{target}: {target.stat().st_size} bytes; what comes back has F-score {fscore(x, y, .02):.3f} (at .02) "
          f"and IoU {grid_iou(decoder, latents, shape, nullcontext):.3f}")


def decompress(model, decoder, source, target, fingerprint, resolution):
    """Codes -> a mesh."""
    quantiser = model.quantiser
    codes = read_codes(source, quantiser.book.bits, sum(s ** 3 for s in quantiser.scales), fingerprint)
    latents, = model.latents(torch.from_numpy(codes)[None])                       # n c
    decoder.decode(latents, {}, None, resolution=resolution).save(target)


def main(load_tokenizer, shipped):
    """The command of vat.py, which knows how a tokenizer is loaded, and from which folder by default."""
    parser = Parser(__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("command", choices=["compress", "decompress"])
    flag("source", type=Path, help="a mesh (obj, glb, gltf, ply, stl, off), or a file that compress wrote")
    flag("target", type=Path, help="file to write: of codes, or a mesh (.glb, .obj, .stl, .ply)")
    flag("--checkpoint", default=shipped, help="folder of trained weights, the same for both commands")
    flag("--resolution", type=int, choices=(32, 64, 128, 256), default=128, help="of decompress: cells along a side")
    args = parser.parse_args()
    model, decoder = load_tokenizer(args.checkpoint)
    fingerprint = digest(f"{args.checkpoint}/vat-codes.safetensors")
    if args.command == "compress":
        compress(model, decoder, args.source, args.target, fingerprint)
    else:
        decompress(model, decoder, args.source, args.target, fingerprint, args.resolution)
