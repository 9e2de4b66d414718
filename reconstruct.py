"""reconstruct.py - Latent Token Reconstruction and Reconstruction-Guided Sampling (LTM3D section 3.4).

    x_recon = SelfAttention^D(CrossAttention(learnable shape tokens, condition))      n x c

A deterministic first guess of all shape tokens, trained apart from the backbone with MSE against the
tokenizer's tokens: the mean of what the prompt allows. While generating, the first steps show the
backbone known tokens that are blended with it (`blend`, RGS), and so keep to what was asked for.

Showing a mean costs diversity. So the reconstructor also says how far a token may be from its guess,
log sigma^2 by maximum likelihood of N(x_recon, sigma^2), and `within` only calls back what strays.

    python train.py --rep sdf --stage reconstruct
"""
import torch
from einops import repeat
from torch import nn

from engine.files import load_model, read_stage
from engine.networks import Block
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
        self.doubt = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, channels))

    def forward(self, condition, drop=None):                                      # -> x_recon, log sigma^2, b n c each
        context, mask = self.conditions(condition, drop)
        x = self.cross(repeat(self.query, "n d -> b n d", b=len(context)), context, mask)
        for block in self.blocks:
            x = block(x)
        return self.out(x).float(), self.doubt(x.detach()).float()                # the guess is that of MSE alone

    def loss(self, tokens, condition):
        recon, doubt = self(condition, drops(len(tokens), condition, tokens.device))
        error = (recon - tokens) ** 2
        unlikely = (doubt + error.detach() / doubt.exp()).mean() / 2              # -log N(x; x_recon, sigma^2), but for a constant
        return error.mean() + unlikely, {"error": error.mean().detach(), "unlikely": unlikely.detach()}


def blend(sampled, recon, alpha, convention="figure"):
    """The known tokens the backbone sees in an early step.

    figure: known = (1 - alpha) x_recon + alpha x_sampled (the paper's pipeline figure: alpha = .1 keeps 90 % of
    the reconstruction). text: the other way round (the paper's text: "alpha = 0 is pure diffusion").
    """
    weight = alpha if convention == "figure" else 1 - alpha                       # of the sampled tokens
    return torch.lerp(recon, sampled, weight)


def within(sampled, recon, doubt, reach):
    """RGS that keeps diversity: sampled tokens as they are, as long as they are within `reach` standard deviations of the guess."""
    far = reach * (doubt / 2).exp()
    return recon + (sampled - recon).clamp(-far, far)


def load(folder):
    """The reconstructor of a checkpoint folder, frozen."""
    return load_model(Reconstructor, f"{folder}/reconstruct.safetensors", **read_stage(folder, "reconstruct")["settings"])
