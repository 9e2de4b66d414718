"""reconstruct.py - Latent Token Reconstruction and Reconstruction-Guided Sampling (LTM3D section 3.4).

    x_recon = SelfAttention^D(CrossAttention(learnable shape tokens, condition))      n x c

A deterministic first guess of all shape tokens, trained apart from the backbone with MSE against the
tokenizer's tokens: the mean of what the prompt allows. While generating, the first steps show the
backbone known tokens that are blended with it (`blend`, RGS), and so keep to what was asked for.

    python train.py --rep sdf --stage reconstruct
"""
import torch
import torch.nn.functional as F
from einops import repeat
from torch import nn

from layers import Block, load_model, read_stage
from prefix import Conditions, drops

SIZES = {
    "tiny": dict(dim=192, depth=4, heads=6), "small": dict(dim=384, depth=6, heads=6),
    "base": dict(dim=768, depth=8, heads=12), "large": dict(dim=1024, depth=12, heads=16),
}


class Reconstructor(nn.Module):
    def __init__(self, tokens, channels, widths, dim, depth, heads):
        super().__init__()
        self.conditions = Conditions(widths, dim)
        self.query = nn.Parameter(torch.randn(tokens, dim) * .02)                 # n d
        self.cross = Block(dim, heads, context_dim=dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels))

    def forward(self, condition, drop=None):                                      # -> b n c
        context, mask = self.conditions(condition, drop)
        x = self.cross(repeat(self.query, "n d -> b n d", b=len(context)), context, mask)
        for block in self.blocks:
            x = block(x)
        return self.out(x).float()

    def loss(self, tokens, condition):
        return F.mse_loss(self(condition, drops(len(tokens), condition, tokens.device)), tokens)


def blend(sampled, recon, alpha, convention="figure"):
    """The known tokens the backbone sees in an early step.

    figure: known = (1 - alpha) x_recon + alpha x_sampled (the paper's pipeline figure: alpha = .1 keeps 90 % of
    the reconstruction). text: the other way round (the paper's text: "alpha = 0 is pure diffusion").
    """
    weight = alpha if convention == "figure" else 1 - alpha                       # of the sampled tokens
    return torch.lerp(recon, sampled, weight)


def load(folder):
    """The reconstructor of a checkpoint folder, frozen."""
    return load_model(Reconstructor, f"{folder}/reconstruct.safetensors", **read_stage(folder, "reconstruct")["settings"])
