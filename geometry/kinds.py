"""kinds.py - the arrays that each kind of training samples fills (geometry/training_samples.py); data.py reads them.

The kind "records" has no arrays: its class, attributes and captions are JSON (geometry/prepare.py).
"""
import numpy as np

from geometry.crop import SIZE
from geometry.meshes import FACES

POINTS, QUERIES = 4096, 6144  # stored for each shape; a training step draws from them
GREY = .7                     # the colour of files without colours
VIEW = 128                    # pixels along a side of a picture that 3D Gaussians learn from
SIDE, RIM, REACH = 32, 4, 1.3    # of LATTE3D's pictures: pixels along a side and of the border, cut off; depth +-REACH
KINDS = {                     # kind of samples -> its arrays, one row per shape: 98, 6, 29 (a picture), 66 and 20 kB
    "surface": dict(points=(np.float16, (POINTS, 3)), normals=(np.int8, (POINTS, 3)), colours=(np.uint8, (POINTS, 3)),
                    queries=(np.float16, (QUERIES, 3)), distance=(np.float16, (QUERIES,))),
    "faces": dict(corners=(np.int16, (FACES, 3, 3)), face_colours=(np.uint8, (FACES, 3)),
                  components=(np.int16, (FACES,))),
    "pictures": dict(picture_colours=(np.uint8, (SIZE, SIZE, 3)),
                     picture_normals=(np.int8, (SIZE, SIZE, 3)),
                     picture_coverage=(np.uint8, (SIZE, SIZE)), picture_azimuth=(np.float32, ())),
    "views": dict(views=(np.uint8, (VIEW, VIEW, 4)), angles=(np.float32, (2,))),
    "sides": dict(sides=(np.uint8, (4, SIDE, SIDE, 5)), side_angles=(np.float32, (4, 2))),
    "records": {},
}
