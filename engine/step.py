"""step.py - components of a training step: random numbers, optimizers, the moving average of the weights.

Every micro-batch draws its randomness from (seed, stage, step, micro-batch) alone. So a resumed run equals an
uninterrupted one, and many processes (engine/processes.py) equal one with as many micro-batches. No step makes Python
wait for a GPU: what a step computes is read when the log is written.
"""
import copy
import functools
from zlib import crc32

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from engine.commands import has_bf16

RESIDENT = .5                                # share of a GPU's free memory for a prepared set, or for cached tokens


# ---------------------------------------------------------------------------- micro-batches

def seed_batch(run, stage, step, i, choices=((),)):
    """Seeds torch for a micro-batch, a function of (seed, stage, step, micro-batch) alone; -> one of `choices`."""
    rng = np.random.default_rng((run.seed, crc32(stage.encode()), step, i))
    torch.manual_seed(int(rng.integers(2 ** 62)))
    return choices[rng.integers(len(choices))]


def to_device(batch, device):
    """A batch, which may be a dict or a list, on a device."""
    return tree_map_only(torch.Tensor, lambda x: x.to(device), batch)


def fits(size, device):
    """Do `size` bytes fit into the device's memory, beside what a training step needs?"""
    return device.type != "cuda" or size < RESIDENT * torch.cuda.mem_get_info(device)[0]


@torch.no_grad()
def held_out_loss(run, model, draw, loss_of):
    """The loss on one fixed batch of held-out shapes."""
    torch.manual_seed(0)
    batch = to_device(draw(run.test), run.device)
    with run.autocast():
        return loss_of(model, batch)[0].item()


def recompute_blocks(model):
    """Activation checkpointing: activations inside a block are recomputed in the backward pass."""
    for block in [module for module in model.modules() if getattr(module, "is_block", False)]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


# ---------------------------------------------------------------------------- optimizers

COEFFICIENTS = 3.4445, -4.7750, 2.0315     # steep at 0: after five steps singular values are within .3 of 1


def orthogonalise(m):
    """k matrices m = U S V^T -> about U V^T, by five Newton-Schulz steps: X = a X + b (X X^T) X + c (X X^T)^2 X."""
    a, b, c = COEFFICIENTS
    x = m.bfloat16() if has_bf16(m.device) else m
    x = x.mT if m.shape[1] > m.shape[2] else x                # so that X X^T is the smaller product
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if m.shape[1] > m.shape[2] else x


class Muon(torch.optim.Optimizer):
    """The optimizer of weight matrices (Jordan 2024): updates are orthogonalised.

        M = momentum M + (1 - momentum) G                   G: the gradient of W
        W = W - lr (.2 sqrt(longer side) U V^T + decay W)   momentum M + (1 - momentum) G = U S V^T (Nesterov)

    The factor makes a step as large as one of AdamW. Matrices of one shape are stacked. torch.optim.Muon takes them one
    by one and always in bf16, which takes thirty times as long on a processor that has to emulate it."""
    found_inf = None                                          # 1: leave out this step, as in AdamW

    def __init__(self, params, lr, decay, momentum=.95):
        super().__init__(params, dict(lr=torch.as_tensor(lr), decay=decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for w in group["params"]:
                if w.grad is not None:
                    shapes.setdefault(w.flatten(1).shape, []).append(w)
            for shape, own in shapes.items():
                self.update(own, self.state[own[0]], .2 * max(shape) ** .5, **group)

    def update(self, own, state, factor, lr, decay, momentum, **_):
        g = torch.stack([w.grad.flatten(1) for w in own])     # k i j
        keep = torch.ones_like(lr) if self.found_inf is None else 1 - self.found_inf          # 0: skips the step
        g = torch.where(keep > 0, g, 0.)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(g)
        m = state["momentum_buffer"].lerp_(g, (1 - momentum) * keep)
        step = orthogonalise(g.lerp(m, momentum)) * (-factor * lr * keep)         # k i j, Nesterov momentum
        torch._foreach_mul_(own, 1 - lr * decay * keep)
        torch._foreach_add_(own, [x.view_as(w) for w, x in zip(own, step.to(g.dtype))])


def optimizers(model, lr):
    """Muon for the weights of Linear and Conv3d, as matrices of at least 64 x 64, AdamW for the rest; a module's RATE
    multiplies its learning rate. Rates are tensors: a CUDA graph reads them."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv3d)]
    matrices = {module.weight for module in linear if min(module.weight.flatten(1).shape) >= 64}
    device = next(model.parameters()).device
    rates = {p: m.RATE for m in model.modules() if hasattr(m, "RATE") for p in m.parameters()}

    def groups(inside):
        chosen = [p for p in model.parameters() if (p in matrices) == inside]
        return [{"params": [p for p in chosen if rates.get(p, 1) == rate], "rate": rate,
                 "lr": torch.tensor(lr, device=device)} for rate in sorted({rates.get(p, 1) for p in chosen})]

    return [Muon(groups(True), lr, decay=.01),
            torch.optim.AdamW(groups(False), lr, betas=(.9, .99), weight_decay=.01, fused=True,
                              capturable=device.type == "cuda")]


def learning_rate(step, steps, peak):
    """Warm up over 100 steps, or over a tenth of all if that is less; hold; fall linearly to 0 over the second half."""
    return peak * min(1, (step + 1) / min(100, steps / 10), 2 * (steps - step) / steps)


def set_rate(opts, rate):
    """Sets the learning rate of all optimizers."""
    for opt in opts:
        for group in opt.param_groups:
            group["lr"].fill_(group["rate"] * rate)


def update(opts, finite):
    """A step of all optimizers, unless a gradient is not finite. finite: a boolean on the device."""
    for opt in opts:
        opt.found_inf = 1. - finite.float()
        opt.step()


class EMA:
    """Exponential moving average of the weights; the decay warms up, for short runs."""

    def __init__(self, model, decay=.999):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = [*zip(self.model.state_dict().values(), model.state_dict().values())]
        self.numbers = [*zip(*[pair for pair in pairs if pair[0].is_floating_point()])]        # averages, weights
        self.others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step):
        torch._foreach_lerp_(*self.numbers, 1 - min(self.decay, (1 + step) / (10 + step)))
        for average, current in self.others:
            average.copy_(current)
