"""evaluation/metrics.py - how well it works, each metric a plain function with its convention in the docstring.

Papers differ in whether a Chamfer distance is squared, summed or averaged, so numbers can only be
compared after reading which it is. Here, unless asked otherwise: unsquared distances, averaged over the
points of a cloud, the two directions added, in a cube of side 2 that the shapes fill to 1.8.

    python evaluation/metrics.py out/table-0.glb out/chair-0.ply     # two files that sample.py wrote, compared
    python evaluate.py generate --rep sdf                 # a command that prints most of them
"""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.linalg import eigh, eigvalsh
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from engine.commands import Parser, UserError, between, command
from geometry.export import read


def sound(x, what, least=1, shape="k 3"):
    """x as an array that metrics can take; says what is wrong with any other."""
    x = np.asarray(x)
    if x.ndim != len(shape.split()) or shape.endswith("3") and x.shape[-1] != 3:
        raise UserError(f"{what} has the shape {tuple(x.shape)}, not {shape}")
    if len(x) < least or 0 in x.shape:
        raise UserError(f"{what} has {len(x)}, at least {least} {'is' if least == 1 else 'are'} needed: nothing can be measured")
    if not np.isfinite(x).all():
        raise UserError(f"{what} holds numbers that are not finite: nothing can be measured")
    return x


# ---------------------------------------------------------------------------- solids

def iou(a, b):
    """Intersection over union of two occupancies, boolean arrays of one shape."""
    if a.shape != b.shape or not (a | b).any():
        raise UserError(f"IoU takes two occupancies of one shape, not both empty; got {a.sum()} of {a.shape} and {b.sum()} of {b.shape}")
    return (a & b).sum() / (a | b).sum()


# ---------------------------------------------------------------------------- two clouds

def chamfer(a, b, squared=False):
    """Chamfer distance of two clouds (k 3, l 3): mean_a min_b |a - b| + mean_b min_a |a - b|; squared: of |a - b|^2."""
    a, b = sound(a, "the first cloud"), sound(b, "the second cloud")
    there, back = cKDTree(b).query(a)[0], cKDTree(a).query(b)[0]
    return (there ** 2).mean() + (back ** 2).mean() if squared else there.mean() + back.mean()


def emd(a, b):
    """Earth mover's distance of two clouds of one size (k 3): the mean distance of the best one-to-one assignment, exact."""
    a, b = alike(a, b)
    distance = cdist(a, b)
    return distance[linear_sum_assignment(distance)].mean()


def emd_fast(a, b, rounds=8, size=128, seed=0):
    """`emd` from above: an assignment that is best within blocks of points that are near each other, other blocks every round.
    At most 4 % too high for clouds of 1024 (test_fast_emd_is_nearly_exact), and of 2048 points in a fifth of the time."""
    a, b = alike(a, b)
    rng, to = np.random.default_rng(seed), np.empty(len(a), int)
    direction = rng.normal(size=3)
    to[(a @ direction).argsort()] = (b @ direction).argsort()                     # some assignment: a_i goes to b_to[i]
    for _ in range(rounds):
        for block in blocks((a + b[to]) / 2, np.arange(len(a)), size, rng):
            to[block] = to[block][linear_sum_assignment(cdist(a[block], b[to[block]]))[1]]
    return np.linalg.norm(a - b[to], axis=1).mean()


def alike(a, b):
    a, b = sound(a, "the first cloud"), sound(b, "the second cloud")
    if len(a) != len(b):
        raise UserError(f"the earth mover's distance is of clouds of one size, not of {len(a)} and {len(b)} points")
    return a, b


def blocks(x, rows, size, rng):
    """Rows of x (k 3), halved across random directions until there are at most `size` in each."""
    if len(rows) <= size:
        return [rows]
    rows = rows[(x[rows] @ rng.normal(size=3)).argsort()]
    return blocks(x, rows[:len(rows) // 2], size, rng) + blocks(x, rows[len(rows) // 2:], size, rng)


def fscore(a, b, threshold):
    """Harmonic mean of precision (share of a's points within `threshold` of b) and recall (of b's, of a)."""
    a, b = sound(a, "the first cloud"), sound(b, "the second cloud")
    precision, recall = ((cKDTree(y).query(x, distance_upper_bound=threshold)[0] < np.inf).mean() for x, y in ((a, b), (b, a)))
    return 2 * precision * recall / max(precision + recall, 1e-9)


def normal_consistency(a, normals_a, b, normals_b):
    """Mean |cosine| of the normal of a point (k 3) and that of the nearest point of the other cloud; mean of the two directions."""
    there, back = cKDTree(sound(b, "the second cloud")).query(sound(a, "the first cloud"))[1], cKDTree(a).query(b)[1]
    return (abs((normals_a * normals_b[there]).sum(1)).mean() + abs((normals_b * normals_a[back]).sum(1)).mean()) / 2


# ---------------------------------------------------------------------------- sets of clouds

def chamfer_matrix(samples, references):
    """`chamfer` of every pair: samples s k 3, references r l 3 -> s r. Twice the same set: half of the work.

    |a - b|^2 = [-2 a, |a|^2, 1] . [b, 1, |b|^2] is one small matrix product. In fp32 that rounds distances
    below 3e-4 (points on top of each other); nearest points of two clouds of 1024 are some .03 apart.
    """
    same, n = samples is references, torch.get_num_threads()
    samples, references = (torch.as_tensor(x, dtype=torch.float).detach() for x in (samples, references))
    square = lambda x: (x ** 2).sum(-1, keepdim=True)
    left = torch.cat([-2 * samples, square(samples), torch.ones_like(samples[..., :1])], -1)             # s k 5
    right = torch.cat([references, torch.ones_like(references[..., :1]), square(references)], -1).mT.contiguous()     # r 5 l
    rows = samples.shape[1] if samples.is_cuda else 128       # so many rows of distances stay in a core's cache: 3 times faster
    out, mean = torch.zeros(len(samples), len(references)), lambda x: x.clamp(min=0).sqrt().mean()

    def row(i):
        block = torch.empty(rows, references.shape[1], device=samples.device)            # one place for all distances: 3 times again
        for j in range(i if same else 0, len(references)):
            there, back = zip(*((d.amin(1), d.amin(0)) for d in (torch.mm(part, right[j], out=block[:len(part)]) for part in left[i].split(rows))))
            out[i, j] = mean(torch.cat(there)) + mean(torch.stack(back).amin(0))

    torch.set_num_threads(1)                                  # a core a row: less waiting than two cores a product
    try:
        with ThreadPoolExecutor(n) as pool:
            list(pool.map(row, range(len(samples))))
    finally:
        torch.set_num_threads(n)
    return torch.maximum(out, out.T) if same else out


def others(clouds):
    """`chamfer` from every cloud to every other: n k 3 -> n (n - 1)."""
    n = len(sound(clouds, "the set of clouds", 2, "n k 3"))
    return chamfer_matrix(clouds, clouds)[~torch.eye(n, dtype=torch.bool)].reshape(n, n - 1)


def diversity(clouds):
    """Mean Chamfer distance of all pairs of different clouds: n k 3, n at least 2. Of samples of one prompt it is how different
    they are; of what was made from several views of one shape, cross-view consistency, where less is better."""
    return others(clouds).mean().item()


def mmd_cov_1nna(samples, references):
    """Two sets of clouds of one size, n k 3, under Chamfer distance (Achlioptas et al. 2018; Yang et al. 2019):
    MMD: mean over references of the distance to the nearest sample; COV: share of references that are the nearest one of some
    sample; 1-NNA: how often the nearest other cloud of the union is of the same set, .5 if nobody could tell them apart."""
    n = len(sound(samples, "the set of samples", 2, "n k 3"))
    if len(sound(references, "the set of references", 2, "n k 3")) != n:
        raise UserError(f"1-NNA compares sets of one size, not {n} samples and {len(references)} references")
    across = chamfer_matrix(samples, references)                                  # s r
    within = [chamfer_matrix(x, x).fill_diagonal_(torch.inf).amin(1) for x in (samples, references)]
    own = torch.cat([within[0] < across.amin(1), within[1] < across.amin(0)])
    return {"MMD": across.amin(0).mean().item(), "COV": len(across.argmin(1).unique()) / n, "1-NNA": own.float().mean().item()}


def memorisation(samples, held_out, train):
    """Mean Euclidean distance from samples (s d; shape tokens, all of a shape in one vector) to the nearest of the training shapes (t d),
    over that from shapes held out (h d) to theirs: 1 if samples are as new as those, 0 if they are training shapes."""
    known = torch.as_tensor(sound(train, "the set of training shapes", 1, "n d")).double()
    near = [torch.cdist(torch.as_tensor(sound(x, f"the set of {what}", 1, "n d")).double(), known).amin(1).mean().item()
            for x, what in ((samples, "samples"), (held_out, "shapes held out"))]
    if near[1] < 1e-6:
        raise UserError("the shapes held out are training shapes: memorisation cannot be measured")
    return near[0] / near[1]


# ---------------------------------------------------------------------------- features: of clouds and of what was asked for

def frechet(a, b):
    """Frechet distance of two sets of features (n d, m d) taken for Gaussians: |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B
    their covariances. With few more samples than channels it is too large; compare sets of one size only."""
    a, b = sound(a, "the first set of features", 2, "n d").astype(float), sound(b, "the second set of features", 2, "n d").astype(float)
    A, B = np.cov(a.T, ddof=1), np.cov(b.T, ddof=1)
    values, vectors = eigh(A)
    root = vectors * values.clip(0) ** .5 @ vectors.T         # A B has the eigenvalues of A^(1/2) B A^(1/2), which is symmetric
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B) - 2 * np.sqrt(eigvalsh(root @ B @ root).clip(0)).sum()


def kernel_distance(a, b):
    """Squared maximum mean discrepancy of two sets of features (n d, m d), kernel (x . y / d + 1)^3, unbiased (Binkowski et al. 2018):
    about 0, or a little below, if they come from one distribution."""
    a, b = sound(a, "the first set of features", 2, "n d").astype(float), sound(b, "the second set of features", 2, "n d").astype(float)
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    within = lambda x: (kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1))
    return within(a) + within(b) - 2 * kernel(a, b).mean()


def cosine(a, b):
    return (a / np.linalg.norm(a, axis=-1, keepdims=True)) @ (b / np.linalg.norm(b, axis=-1, keepdims=True)).T


def prompt_score(prompts, shapes):
    """Mean cosine of the features of a prompt and of the shape made from it, n e each (the ULIP score, of whatever aligner)."""
    return np.diag(cosine(prompts, shapes)).mean()


def r_precision(prompts, shapes, true):
    """Share of shapes (n e) nearest, of all prompts (n e), to one that is true of them: true n n, [i, j] = prompt j of shape i."""
    return true[np.arange(len(shapes)), cosine(shapes, prompts).argmax(1)].mean()


# ---------------------------------------------------------------------------- pictures

def psnr(a, b):
    """Peak signal-to-noise ratio of two pictures of one size with values in [0, 1], in dB: -10 log10 mean (a - b)^2."""
    return peak_signal_noise_ratio(a, b, data_range=1)


def ssim(a, b):
    """Structural similarity of two pictures h w 3 with values in [0, 1]: windows of 7 x 7 pixels, mean of the channels."""
    return structural_similarity(a, b, data_range=1, channel_axis=-1)


# ---------------------------------------------------------------------------- meshes (geometry/meshes.py: components, watertight, closed_edges)

def faces_within(found, true, bins):
    """Share of faces that agree in all nine coordinates to within `bins`: pairs of a best assignment of the faces found
    (f 3 3) to the true ones (g 3 3), which may start at any corner, over the larger of the two counts."""
    apart = np.min([cdist(np.roll(found, i, 1).reshape(-1, 9), true.reshape(-1, 9), "chebyshev") for i in range(3)], 0)
    right = (apart <= bins).astype(int)
    return right[linear_sum_assignment(right, maximize=True)].sum() / max(len(found), len(true))


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("files", nargs=2, metavar="FILE", help="what sample.py wrote, .glb or .ply")
    parser.add_argument("--points", type=between(1, 100_000), default=2048, help="drawn from each")
    parser.add_argument("--threshold", type=between(1e-6, 2, float), default=.02, help="of the F-score")
    args = parser.parse_args()
    a, b = (read(file).surface(args.points, np.random.default_rng(i))[0] for i, file in enumerate(args.files))
    for name, value in (("Chamfer distance", chamfer(a, b)), ("the same, squared", chamfer(a, b, squared=True)),
                        ("earth mover's distance", (emd if args.points <= 4096 else emd_fast)(a, b)),
                        (f"F-score at {args.threshold:g}", fscore(a, b, args.threshold))):
        print(f"{name:24} {value:.5f}")


if __name__ == "__main__":
    command(main)
