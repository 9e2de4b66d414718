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


def main(load_tokenizer, shipped):
    """The command of vat.py, which knows how a tokenizer is loaded, and from which folder by default."""
    parser = Parser(__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("command", choices=["compress", "decompress"])
    flag("source", type=Path, help="a mesh (obj, glb, gltf, ply, stl, off), or a file that compress wrote")
    flag("target", type=Path, help="file to write: of codes, or a mesh (.glb, .obj, .stl, .ply)")
    flag("--checkpoint", default=shipped, help="folder of trained weights, the same for both")
    flag("--resolution", type=int, choices=(32, 64, 128, 256), default=128, help="cells along a side of the grid")
    args = parser.parse_args()
    model, decoder = load_tokenizer(args.checkpoint)
    quantiser, book = model.quantiser, digest(f"{args.checkpoint}/vat-codes.safetensors")
    bits, count = (len(quantiser.book.code) - 1).bit_length(), sum(s ** 3 for s in quantiser.scales)
    if args.command == "compress":
        (item, *_), _ = real.list_items(args.source)
        shape, rng = mesh_files.shape(item), np.random.default_rng(0)
        cloud = [torch.from_numpy(np.float32(x))[None] for x in shape.surface(model.points, rng)]
        _, _, indices = quantiser(model.encoder(*cloud))      # 1 N
        write_codes(args.target, indices[0], bits, book)
    else:
        indices = torch.from_numpy(read_codes(args.source, bits, count, book))[None]
    latents, = model.latents(indices)                         # n c
    mesh = decoder.decode(latents, {}, None, resolution=args.resolution)
    if args.command == "decompress":
        return mesh.save(args.target)
    x, y = mesh.surface(100_000, rng)[0], shape.surface(100_000, rng)[0]
    overlap = grid_iou(decoder, latents, shape, nullcontext)
    print(f"{args.target}: {args.target.stat().st_size} bytes; what comes back has F-score "
          f"{fscore(x, y, .02):.3f} (at .02) and IoU {overlap:.3f}")
