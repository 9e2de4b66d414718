"""palette.py - a few flat colours for a mesh, as artists paint low-poly shapes. A network's colours are slightly wrong
everywhere and blurred at borders.
"""
import numpy as np
from scipy.sparse import coo_matrix, diags, eye
from scipy.spatial import cKDTree

MOST, LEAST = 4, .03                          # colours of a palette; share of the vertices that each must explain
EXPLAINED = .9                                # share of the vertices that a palette must explain
TOLERANCES = .08, .1, .125, .15, .2           # a colour explains a vertex if no channel differs by more


def palette(colours, near):
    """Greedy: each colour is the one that explains most remaining vertices. k 3 -> p 3, the explained share."""
    candidates = colours[::5]
    explains = abs(candidates[:, None] - colours).max(-1) < near                  # m k
    left, found = np.ones(len(colours), bool), []
    while len(found) < MOST:
        best = explains[(explains & left).sum(1).argmax()] & left                 # k
        if best.mean() < LEAST:
            break
        found.append(colours[best].mean(0))
        left &= ~best
    return np.array(found).reshape(-1, 3), 1 - left.mean()


def neighbours(faces, count):
    """The matrix v v that averages each vertex and its neighbours."""
    rows, columns = faces.ravel(), np.roll(faces, -1, 1).ravel()
    joined = coo_matrix((np.ones(len(rows)), (rows, columns)), (count, count))
    joined = ((joined + joined.T + eye(count)) > 0).astype(float)
    return diags(1 / np.asarray(joined.sum(1)).ravel()) @ joined


def few_colours(faces, colours):
    """f 3, v 3 -> v 3, colours of the most precise palette that explains the vertices; if there is none, unchanged."""
    chosen = colours[np.linspace(0, len(colours) - 1, min(2000, len(colours))).astype(int)]       # k 3
    tried = (palette(chosen, near) for near in TOLERANCES)
    found = next((found for found, explained in tried if explained > EXPLAINED), None)            # p 3
    if found is None:
        return colours

    blur = neighbours(faces, len(colours))
    own = cKDTree(found).query(blur @ (blur @ colours))[1]                        # v
    for _ in range(2):                                        # a majority vote among neighbours removes speckles
        votes = np.eye(len(found))[own]                       # v p
        own = (blur @ (blur @ (blur @ votes))).argmax(1)
    return np.float32(found[own])
