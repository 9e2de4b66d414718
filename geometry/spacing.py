"""spacing.py - evenly spaced points. Independent samples of a surface have clumps and gaps.

scipy takes long to import: this file is imported where it is used.
"""
import numpy as np
from scipy.spatial import cKDTree


def evenly(count, x, *others):
    """`count` of the points x, and what belongs to them, k 3 each: of two that are close one goes, closest first."""
    kept = np.arange(len(x))
    while len(kept) > count:
        distance, near = cKDTree(x[kept]).query(x[kept], 2)   # itself, its nearest neighbour
        later = near[:, 1] < np.arange(len(kept))             # in its pair
        closest = np.where(later, distance[:, 1], np.inf).argsort()
        kept = np.delete(kept, closest[:max(1, (len(kept) - count) // 2)])
    return [y[kept] for y in (x, *others)]
