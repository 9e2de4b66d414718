"""metrics.py - how good is a set of samples? Each docstring states the convention of its metric. Of two shapes:
geometry/metrics.py.
"""
import numpy as np
import torch
from scipy.linalg import eigh, eigvalsh

from engine.commands import UserError
from geometry.metrics import chamfer_matrix, check, check_two

# ---------------------------------------------------------------------------- sets of clouds

def diversity(clouds):
    """Mean Chamfer distance of all pairs of different clouds: n k 3, n at least 2."""
    n = len(check(clouds, "the set of clouds", 2, "n k 3"))
    return chamfer_matrix(clouds, clouds)[~torch.eye(n, dtype=torch.bool)].mean().item()


def mmd_cov_1nna(samples, references):                        # unit 5
    """Two sets of clouds of one size, n k 3, under Chamfer distance (Achlioptas et al. 2018; Yang et al. 2019).
    MMD: mean over references of the distance to the nearest sample. COV: share of references that are the nearest one
    of a sample. 1-NNA: how often the nearest other cloud of the union is of the same set; .5 is the best. -> a dict of
    the three."""
    n = len(check(samples, "the set of samples", 2, "n k 3"))
    if len(check(references, "the set of references", 2, "n k 3")) != n:
        raise UserError(f"1-NNA compares sets of one size, not {n} samples and {len(references)} references")
    across = chamfer_matrix(samples, references)                                  # n n
    within = [chamfer_matrix(x, x).fill_diagonal_(torch.inf).amin(1) for x in (samples, references)]        # n each
    own = torch.cat([within[0] < across.amin(1), within[1] < across.amin(0)])     # 2n
    return {"MMD": across.amin(0).mean().item(), "COV": len(across.argmin(1).unique()) / n,
            "1-NNA": own.float().mean().item()}


def memorisation(samples, held_out, train):
    """Mean distance from samples (s d: all shape tokens of a shape in one vector) to the nearest training shape (t d),
    over that from held-out shapes (h d): 1 if samples are as new as those, 0 if they are training shapes."""
    sets = {"samples": samples, "shapes held out": held_out, "training shapes": train}
    *others, train = (torch.as_tensor(check(x, f"the set of {name}", 1, "n d")).double() for name, x in sets.items())
    of_samples, of_held_out = (torch.cdist(x, train).amin(1).mean().item() for x in others)
    if of_held_out < 1e-6:
        raise UserError("the shapes held out are training shapes: memorisation cannot be measured")
    return of_samples / of_held_out


# ---------------------------------------------------------------------------- features of clouds and of prompts

def frechet(a, b):
    """Frechet distance of two sets of features (n d, m d), taken for Gaussians with means mu and covariances A and B:
    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)). Compare sets of one size only: it is too large for few samples."""
    a, b = (x.astype(float) for x in check_two(a, b, "set of features", 2, "n d"))
    A, B = np.cov(a.T, ddof=1), np.cov(b.T, ddof=1)                               # d d
    values, vectors = eigh(A)
    root = vectors * values.clip(0) ** .5 @ vectors.T                             # A^(1/2)
    values = eigvalsh(root @ B @ root)                        # the eigenvalues of A B
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B) - 2 * np.sqrt(values.clip(0)).sum()


def kernel_distance(a, b):
    """Squared maximum mean discrepancy of sets of features (n d, m d), kernel (x . y / d + 1)^3, unbiased (Binkowski
    et al. 2018). It is about 0, or a little below, if both come from one distribution."""
    a, b = (x.astype(float) for x in check_two(a, b, "set of features", 2, "n d"))
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    within = lambda x: (kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1))
    return within(a) + within(b) - 2 * kernel(a, b).mean()


def cosine(a, b):                                             # n e, m e -> n m
    return (a / np.linalg.norm(a, axis=-1, keepdims=True)) @ (b / np.linalg.norm(b, axis=-1, keepdims=True)).T


def prompt_score(prompts, shapes):
    """Mean cosine of the features of a prompt and of the shape sampled from it, n e each (the ULIP score)."""
    return np.diag(cosine(prompts, shapes)).mean()


def r_precision(prompts, shapes, true):                       # unit 5
    """Share of shapes (n e) whose nearest prompt (n e), by cosine, is true of them. true[i, j]: is prompt j true of
    shape i?"""
    return true[np.arange(len(shapes)), cosine(shapes, prompts).argmax(1)].mean()
