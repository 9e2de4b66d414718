"""optimizers.py - Muon and AdamW, the learning rate over time, the moving average of the weights."""
import copy

import torch
from torch import nn

COEFFICIENTS = 3.4445, -4.7750, 2.0315     # steep at 0: after five steps singular values are within .3 of 1
DECAY = .01                                # of weight matrices; norms, biases and embeddings do not decay


# ---------------------------------------------------------------------------- Muon

def orthogonalise(m):
    """k matrices m = U S V^T -> about U V^T, by five Newton-Schulz steps: X = a X + b (X X^T) X + c (X X^T)^2 X. Under
    autocast its products are in bf16, which is exact enough."""
    a, b, c = COEFFICIENTS
    x = m.mT if m.shape[1] > m.shape[2] else m                # so that X X^T is the smaller product
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

    def __init__(self, params, lr, decay=DECAY, momentum=.95):
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


# ---------------------------------------------------------------------------- all weights of a model

def optimizers(model, lr):
    """Muon for the weights of Linear and convolutions, as matrices of at least 64 x 64; AdamW for smaller ones, and,
    without decay, for the rest. A module's RATE multiplies its learning rate. Rates are tensors: changing them does
    not compile a step anew."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)]
    weights = {layer.weight for layer in layers}
    large = {layer.weight for layer in layers
             if not isinstance(layer, nn.Conv2d) and min(layer.weight.flatten(1).shape) >= 64}
    rates = {p: module.RATE for module in model.modules() if hasattr(module, "RATE") for p in module.parameters()}
    device = next(model.parameters()).device

    def groups(chosen, **settings):                           # one for each rate
        return [{"params": [p for p in chosen if rates.get(p, 1) == rate], "rate": rate,
                 "lr": torch.tensor(lr, device=device)} | settings
                for rate in sorted({rates.get(p, 1) for p in chosen})]

    params = [*model.parameters()]
    small = groups([p for p in params if p in weights - large], weight_decay=DECAY)
    others = groups([p for p in params if p not in weights], weight_decay=0.)
    found = [torch.optim.AdamW(small + others, lr, betas=(.9, .99), fused=True, capturable=device.type == "cuda")]
    if large:
        found.append(Muon(groups([p for p in params if p in large]), lr))
    return found


def learning_rate(step, steps, peak):
    """Warm up over 100 steps, or over a tenth of all if that is less; hold; fall linearly to 0 over the second half."""
    return peak * min(1, (step + 1) / min(100, steps / 10), 2 * (steps - step) / steps)


def set_rate(opts, rate):
    """Sets the learning rate of all optimizers."""
    for opt in opts:
        for group in opt.param_groups:
            group["lr"].fill_(group["rate"] * rate)


def update(model, opts):
    """One step of all optimizers, unless a gradient is not finite -> is it finite? A boolean on the device."""
    finite = nn.utils.clip_grad_norm_(model.parameters(), 1.).isfinite()
    for opt in opts:
        opt.found_inf = 1. - finite.float()
        opt.step()
    return finite


# ---------------------------------------------------------------------------- the moving average of the weights

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
