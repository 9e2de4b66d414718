"""palette.py - a few flat colours for a mesh, as artists paint; a network's are noisy, and blurred at borders."""
import numpy as np
from scipy.sparse import coo_matrix, diags
from scipy.sparse.csgraph import laplacian
from scipy.sparse.linalg import splu

from geometry.meshes import vertex_normals

MOST, LEAST, ALL = 4, .03, .9                 # colours of a palette; least share of vertices that each, all explain
TOLERANCES = .08, .1, .125, .15, .2           # a colour explains a vertex if no channel differs by more
FIT, REACH = .1, .15                          # deviation of a colour that fits; how far colours spread where none fits
BEND = .011                                   # 1 - cosine of two normals that make a crease


def palette(colours, tolerance):
    """Greedy: each colour is the one that explains most remaining vertices. k 3 -> p 3 colours, the explained share."""
    explains = abs(colours[::5, None] - colours).max(-1) < tolerance              # a fifth of them, k
    left, found = np.ones(len(colours), bool), []             # k
    while len(found) < MOST and (best := explains[(explains & left).sum(1).argmax()] & left).mean() >= LEAST:
        found.append(colours[best].mean(0))
        left &= ~best
    return np.array(found).reshape(-1, 3), 1 - left.mean()


def crease_laplacian(vertices, faces):
    """The graph Laplacian v v of a mesh; the weight of an edge falls with the angle between its vertices' normals."""
    normals, rows, columns = vertex_normals(vertices, faces), faces.ravel(), np.roll(faces, -1, 1).ravel()
    cosine = (normals[rows] * normals[columns]).sum(1)
    weights = coo_matrix((np.exp((cosine - 1) / BEND) + 1e-3, (rows, columns)), (len(vertices),) * 2).tocsr()
    return laplacian(weights.maximum(weights.T))


def largest(system, fit, faces, steps):
    """The argmax of each row of x, where system x = fit, v p -> v; far from borders of colours, that of fit."""
    best, near = fit.argmax(1), np.zeros(len(fit), bool)
    near[faces[best[faces].min(1) < best[faces].max(1)]] = True
    for _ in range(steps):
        near[faces[near[faces].any(1)]] = True
    if near.any():
        rows, others = system[near], np.eye(fit.shape[1], dtype=np.float32)[best[~near]]
        solver = splu(rows[:, near].tocsc(), "MMD_AT_PLUS_A", 0., options={"SymmetricMode": True})
        best[near] = solver.solve(fit[near] - rows[:, ~near] @ others).argmax(1)
    return best


def few_colours(vertices, faces, colours):
    """v 3, f 3, v 3 -> v 3, colours of the most precise palette that explains the vertices; unchanged, if none does.

    Random walks with priors (Grady, 2005): (F + s L) x = f, where F sums f over colours. A vertex that a colour fits
    prefers it, others that of their neighbours across flat edges: borders of colours lie at creases."""
    chosen = colours[np.linspace(0, len(colours) - 1, min(2000, len(colours))).astype(int)]       # k 3
    tried = (palette(chosen, tolerance) for tolerance in TOLERANCES)
    found = next((found for found, explained in tried if explained > ALL), None)                  # p 3
    if found is None:
        return colours
    fit = np.float32(np.exp(-((colours[:, None] - found) ** 2).sum(-1) / (2 * FIT ** 2)) + 1e-4)      # v p, never 0
    reach = REACH / ((vertices[faces] - np.roll(vertices[faces], 1, 1)) ** 2).sum(-1).mean() ** .5    # in edges
    system = (diags(fit.sum(1)) + reach ** 2 * crease_laplacian(vertices, faces)).tocsr().astype(np.float32)
    return np.float32(found[largest(system, fit, faces, int(reach))])
