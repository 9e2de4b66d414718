"""text_alone.py - train.py for names of files: the backbone learns more often from text alone, and at stronger noise,
where it is decided what a token becomes.

    python recipes/text_alone.py --data path/to/assets --size mini --stage backbone  # flags of train.py; see assets.sh
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

sys.path.insert(0, str(Path(__file__).parents[1]))

import backbone  # noqa: E402 - this file is a folder below
import encoders  # noqa: E402
import train  # noqa: E402
from engine.networks import flow_pair  # noqa: E402

encoders.SHOWN["text", "image"] = {(): .1, ("text",): .6, ("image",): .15, ("text", "image"): .15}


class Flow(backbone.Flow):
    @staticmethod
    def loss(net, x, z):
        t = (torch.randn(len(x), device=x.device) - 1).sigmoid()                  # most samples near .27, not .5
        noisy, velocity = flow_pair(x, rearrange(t, "k -> k 1"))                  # k c
        return F.mse_loss(net(noisy, t, z), velocity)


backbone.DENOISERS["flow"] = Flow

if __name__ == "__main__":
    train.command(train.main)
