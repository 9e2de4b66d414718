"""scales.py - what the codes of VAT keep of a shape: bytes against quality, scale by scale.

    python evaluate.py scales          # IoU, F-score; code use
"""
import numpy as np
import torch

from data import seeded
from engine.commands import UserError, pick_device
from engine.files import trained_stages
from geometry.metrics import fscore
from relatives import vat
from relatives.codes import code_use, file_size
from representations.sdf import grid_iou
from research import exam
from research.results import labels, write_table


def evaluate_scales(args):
    """Decodes held-out shapes from their first scales of codes: quality against bytes."""
    (device, autocast, _), test, points = pick_device(args.device, args.precision), exam.held_out(args), 100_000
    rows, use = [], []
    for folder, label in labels(args.checkpoint).items():
        if "vat-codes" not in trained_stages(folder):
            raise UserError(f"{folder} holds no codes of VAT; --checkpoint takes checkpoints/vat")
        model, decoder = (part.to(device) for part in vat.load_tokenizer(folder))
        quantiser = model.quantiser

        @torch.no_grad()
        def judge(row, rng):
            shape = test.shape(row)
            with autocast():
                indices = model.codes(*(x.to(device) for x in test.cloud([row], model.points, seeded(rng))))  # 1 N
            kept = [vat.as_rows(f)[0] for f in quantiser.decode(indices)[1:]]     # after each scale, n c
            overlaps, true = [grid_iou(decoder, x, shape, autocast) for x in kept], shape.surface(points, rng)[0]
            meshes = [decoder.decode(x, {}, rng, autocast) for x in kept]
            scores = [fscore(mesh.surface(points, rng)[0], true, .02) for mesh in meshes]
            return {"codes": indices[0].cpu().numpy(), "IoU": overlaps, "F-score": scores}

        results = exam.each_shape(args, test, exam.result_cache(args, label, folder), judge)
        found = {key: np.stack([result[key] for result in results]) for key in results[0]}      # r N, r K
        counts = np.cumsum(quantiser.counts)                  # codes in the first 1, 2 ... K scales together
        sizes = file_size(counts, quantiser.book.bits)        # bytes of a file of them
        rows += [{"checkpoint": label, "scales": " ".join(map(str, quantiser.scales[:k + 1])), "codes": str(counts[k]),
                  "bytes": str(sizes[k])} | {key: found[key][:, k].mean() for key in ("IoU", "F-score")}
                 for k in range(len(counts))]
        used = code_use(torch.from_numpy(found["codes"]), len(quantiser.book.code))
        use.append({"checkpoint": label, "CS-IoU": found["IoU"].mean()} | {key: x.item() for key, x in used.items()})
    print("bytes: of a file. IoU on a 64^3 grid; F-score at .02. CS-IoU: mean IoU over the scales.\n"
          "code use: share of all codes that occur in these shapes; perplexity: the effective number of codes")
    write_table(args.out, "scales", rows)
    write_table(args.out, "scales-use", use)
