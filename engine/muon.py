"""muon.py - the optimizer of weight matrices (Jordan 2024): all directions of a step are equally long.

    M = momentum M + (1 - momentum) G                   G: the gradient of W
    W = W - lr (.2 sqrt(longer side) U V^T + decay W)   momentum M + (1 - momentum) G = U S V^T (Nesterov)

The factor makes a step as large as one of AdamW.

torch.optim.Muon is the same, but always in bf16. That takes thirty times as long on a processor that has to emulate it.
"""
import torch

from engine.commands import has_bf16

COEFFICIENTS = 3.4445, -4.7750, 2.0315     # steep at 0: five steps bring singular values to 1, up to .3 off


def orthogonalise(m):
    """m = U S V^T -> about U V^T, by five Newton-Schulz steps: X = a X + b (X X^T) X + c (X X^T)^2 X."""
    a, b, c = COEFFICIENTS
    x = m.bfloat16() if has_bf16(m.device) else m
    x = x.T if m.shape[0] > m.shape[1] else x                 # so that X X^T is the smaller product
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if m.shape[0] > m.shape[1] else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, decay, momentum=.95):
        super().__init__(params, dict(lr=lr, decay=decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for w in [w for w in group["params"] if w.grad is not None]:
                state = self.state[w]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(w)
                m = state["momentum_buffer"].lerp_(w.grad, 1 - momentum)
                update = orthogonalise(w.grad.lerp(m, momentum))                  # Nesterov's look ahead
                w.mul_(1 - lr * group["decay"]).add_(update, alpha=-lr * .2 * max(w.shape) ** .5)
