"""reconstruct.py - Latent Token Reconstruction and Reconstruction-Guided Sampling, RGS (LTM3D section 3.4).

    x_recon = SelfAttention^D(CrossAttention(learnt queries, condition))      n x c

A deterministic reconstruction of all shape tokens, trained apart from the backbone with MSE against the tokenizer's
tokens: their conditional mean. During the first steps of generation the MAE encodes the known tokens blended with
x_recon (`blend`), so that samples stay close to the prompt.

Blending with a mean costs diversity. A second rule, ours (`within`), needs the variance of x_recon. So the
reconstructor also predicts log sigma^2, by maximum likelihood of N(x_recon, sigma^2).

    python train.py --rep sdf --stage reconstruct
"""
import math
from functools import partial

import torch
from einops import repeat
from torch import nn

import encoders
import heads
import judge
import tokenizer
from engine.commands import UserError
from engine.files import load_stage
from engine.loop import Loop
from engine.networks import Block
from engine.stage import Stage
from prefix import Conditions

SIZES = {
    "tiny": dict(dim=192, depth=4, heads=6), "mini": dict(dim=192, depth=1, heads=6),
    "small": dict(dim=384, depth=6, heads=6),
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
        self.log_variance = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, channels))

    def forward(self, condition):                                                 # -> x_recon, log sigma^2, b n c each
        context, mask = self.conditions(condition)                                # b t d, b t
        x = self.cross(repeat(self.query, "n d -> b n d", b=len(context)), context, mask)
        for block in self.blocks:
            x = block(x)                                                          # b n d
        log_variance = self.log_variance(x.detach()).float().clamp(-10, 10)       # detach: MSE alone trains x_recon
        return self.out(x).float(), log_variance

    def loss(self, tokens, condition):
        """tokens b n c -> mean squared error + negative log likelihood, and logs of both."""
        recon, log_variance = self(condition)
        error = (recon - tokens) ** 2                                             # b n c
        nll = (log_variance + error.detach() / log_variance.exp()).mean() / 2     # -log N(x; x_recon, sigma^2) + const.
        return error.mean() + nll, {"error": error.mean().detach(), "nll": nll.detach()}


# ---------------------------------------------------------------------------- Reconstruction-Guided Sampling

def blend(sampled, recon, weight):                            # unit 5
    """The paper's rule: known = (1 - a) x_recon + a x_sampled, where `weight` = a is the weight of the sampled tokens.

    That is alpha in the paper's pipeline figure (alpha = .1 keeps 90 % of the reconstruction). The paper's text
    defines the opposite ("alpha = 0 is pure diffusion"): there alpha is the weight of the reconstruction, 1 - a.
    """
    return torch.lerp(recon, sampled, weight)


def within(sampled, recon, log_variance, reach):              # unit 5
    """Our rule, which keeps diversity: each channel of a sampled token stays within `reach` sigma of x_recon."""
    margin = reach * (log_variance / 2).exp()                                     # b n c
    return sampled.clamp(recon - margin, recon + margin)


RGS_FORMS = "none, auto, sampled=A or recon=A (A: a weight from 0 to 1) or within=S (S: standard deviations)"


def parse_rgs(text):
    """"none", "auto", "sampled=A" (the figure's alpha), "recon=A" (the text's alpha), "within=S" -> rule, number."""
    if text in ("none", "auto"):
        return text, None
    rule, _, number = str(text).partition("=")
    maximum = {"sampled": 1., "recon": 1., "within": 100.}.get(rule, -1.)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value <= maximum:
        raise UserError(f"RGS takes {RGS_FORMS}, not '{text}'")
    return rule, value


def rule_of(model, condition, rgs):
    """The function from the tokens sampled so far to the tokens that the MAE encodes; None: no RGS.

    rgs: a rule of `parse_rgs`. auto: sampled=.1 for a picture alone, which determines most of the shape; none with
    a text, which is ambiguous or adds what the picture lacks.
    """
    rule, value = parse_rgs(rgs)
    if rule == "auto":
        rule, value = ("sampled", .1) if condition.keys() == {"image"} else ("none", None)
    if rule == "none":
        return None
    recon, log_variance = model(condition)                                        # b n c each
    if rule == "within":
        return lambda x: within(x, recon, log_variance, value)
    weight = value if rule == "sampled" else 1 - value
    return lambda x: blend(x, recon, weight)


load = partial(load_stage, stage="reconstruct", kind=Reconstructor)        # of a checkpoint folder, frozen


# ---------------------------------------------------------------------------- stage: data, model, training, save

def train(run):
    """The deterministic reconstruction of RGS, on frozen tokens and frozen encoders."""
    # data
    towers, sizes, draw_batch = encoders.prompted_tokens(run, "reconstruct", tokenizer.load(run.folder))
    decoders = heads.load(run.folder, run.joint, run.device)

    # model
    settings = SIZES[run.size] | sizes
    model = Reconstructor(**settings)
    run.load_to_finetune("reconstruct", {"reconstruct": model}, settings)

    # training
    loop = Loop(run, "reconstruct", model, draw_batch)
    for net, (x, prompts) in loop:
        with run.autocast():
            condition = towers.encode_drawn(prompts)
        loop.step(*net(x, condition))
        if path := loop.picture():
            reconstruct = lambda condition, keys: loop.average(condition)[0]
            judge.save_picture(path, judge.samples(run, towers, reconstruct, decoders))

    # save
    run.finish(loop, {"reconstruct": loop.average}, settings=settings)


STAGE = Stage("reconstruct", train, 300, 64, 2e-3, after=("encoders", "tokenizer", "vision"),
              flags=("text-encoder", "image-encoder"))
