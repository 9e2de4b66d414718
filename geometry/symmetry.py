"""symmetry.py - the eight positions of a shape whose file has no front: turned by right angles, and mirrored."""
import numpy as np

MIRROR, TURN = np.diag([-1, 1, 1]), np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])      # x to -x; x to -z, z to x
SYMMETRIES = np.stack([np.linalg.matrix_power(TURN, i // 2) @ np.linalg.matrix_power(MIRROR, i % 2)      # 8 3 3
                       for i in range(8)])                    # a shape, its mirror image, the same turned, ...
