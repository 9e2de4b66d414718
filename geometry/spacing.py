"""spacing.py - evenly spaced points. Independent samples of a surface have clumps and gaps.

scipy takes long to import: this file is imported where it is used.
"""
import numpy as np
from scipy.spatial import cKDTree


def gaps(x):
    """Points k 3 -> the distance to the nearest neighbour, and its row, k each."""
    tree = cKDTree(x, balanced_tree=False)                    # a balanced one crashes where hundreds coincide
    distance, near = tree.query(x, 2)                         # itself, its nearest neighbour
    return distance[:, 1], near[:, 1]


def evenly(count, x, *others):
    """Sample elimination: `count` of the points x and their attributes, k 3 each. The closest pairs lose one first."""
    kept = np.arange(len(x))
    while len(kept) > count:
        distance, near = gaps(x[kept])
        closest = np.where(near < np.arange(len(kept)), distance, np.inf).argsort()       # the later one of a pair
        kept = np.delete(kept, closest[:max(1, (len(kept) - count) // 2)])
    return [y[kept] for y in (x, *others)]
