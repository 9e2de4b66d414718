"""metrics.py - how well it works, each metric a plain function with its convention in the docstring."""
import numpy as np
import torch

from tokenizer import sdf_grid


@torch.no_grad()
def grid_iou(head, tokens, shape, autocast, resolution=64):
    """Volumetric intersection over union of a decoded sdf (tokens n c) and the true shape.

    Occupancy (distance < 0) at the resolution^3 cell centres of [-1, 1]^3, every point asked densely.
    """
    from layers import grid_points
    points = grid_points(resolution, tokens.device)                                          # k 3
    with autocast():
        memory = head.read(tokens[None])
        ours = torch.cat([head.ask(memory, x[None])[0, :, 0] for x in points.split(2 ** 15)]).cpu().numpy() < 0
    true = shape.distance(points.cpu().numpy()) < 0
    return (ours & true).sum() / max((ours | true).sum(), 1)
