"""scores.py - prompt scores of samples: `sample.py --best N` keeps those that resemble their prompt most."""
import numpy as np
import torch

from engine.commands import UserError
from prompts.text_tower import POINTS


@torch.no_grad()
def prompt_scores(model, prompt, pictures, tokens):
    """Shape tokens b n c of one prompt, or of pictures b 3 s s -> the cosines of its features and the surface's, b."""
    towers, rng = model.encoders.towers, np.random.default_rng(0)
    if model.encoders.pretrained:
        raise UserError("--best takes the built-in encoders, and this checkpoint has others; leave it out")
    clouds = [model.decode(x, resolution=32).surface(POINTS, rng) for x in tokens]            # b times k 3 each
    clouds = [torch.tensor(np.stack(x), dtype=torch.float, device=model.device) for x in zip(*clouds)]
    if prompt is None:
        query = towers["image"].embed(towers["image"].tokens(pictures[:1])[0])                # 1 e
    else:
        query = towers["text"].embed_text(*towers["text"].word_ids([prompt]))                 # 1 e
    return (towers["text"].embed_cloud(*clouds) * query).sum(1).cpu()
