"""spacing.py - evenly spaced points. Independent samples of a surface have clumps and gaps.

scipy takes long to import: this file is imported where it is used.
"""
import numpy as np
from scipy.spatial import cKDTree


def evenly(x, count):
    """Rows of `count` of the points k 3: of two that are too close one goes, the closest pairs first."""
    kept = np.arange(len(x))
    while len(kept) > count:
        distance, near = cKDTree(x[kept]).query(x[kept], 2)   # itself, its nearest neighbour
        later = near[:, 1] < np.arange(len(kept))             # in its pair
        closest = np.where(later, distance[:, 1], np.inf).argsort()
        kept = np.delete(kept, closest[:max(1, (len(kept) - count) // 2)])
    return kept
