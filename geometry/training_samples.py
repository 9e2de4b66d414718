"""geometry/training_samples.py - what is taken of a shape to learn from: four kinds of samples, each a function of a shape and a generator.

A shape is anything that answers `surface`, `distance`, `mesh` and `icon`: a built-in one (geometry/solids.py) or triangles of a file
(geometry/soup.py). KINDS says which arrays each kind fills, a row a shape; data.py keeps them.
"""
import numpy as np
import torch

from geometry.camera import see_mesh, tensor
from geometry.light import look
from geometry.meshes import canonical, simplify_to
from geometry.render import flat
from geometry.training_pictures import SIZE, framed

POINTS, QUERIES = 4096, 6144  # kept per shape; a training step draws from them
FACES = 256                   # most faces of a low-poly mesh
PICTURES = 2                  # of a shape, as image prompts
VIEW = 128                    # pixels along a side of a picture that 3D Gaussians learn from
KINDS = {                     # kind of samples -> its arrays, a row a shape
    "surface": {"points": (np.float16, (POINTS, 3)), "normals": (np.int8, (POINTS, 3)), "colours": (np.uint8, (POINTS, 3)),
                "queries": (np.float16, (QUERIES, 3)), "distance": (np.float16, (QUERIES,))},              # 116 kB a shape
    "faces": {"corners": (np.int16, (FACES, 3, 3)), "face_colours": (np.uint8, (FACES, 3)), "components": (np.int16, (FACES,))},   # 6 kB
    "pictures": {"looks": (np.uint8, (PICTURES, SIZE, SIZE, 3)), "facing": (np.int8, (PICTURES, SIZE, SIZE, 3)),
                 "covered": (np.uint8, (PICTURES, SIZE, SIZE))},                                           # 57 kB
    "views": {"views": (np.uint8, (VIEW, VIEW, 4)), "angles": (np.float32, (2,))},                         # 66 kB
}


def take_surface(shape, rng):
    """Queries: 2/6 within .015 of the surface, 3/6 within .06, 1/6 anywhere."""
    points, normals, colours = shape.surface(POINTS, rng)
    k = QUERIES // 6
    near = points[rng.permutation(POINTS)[:2 * k]] + rng.normal(0, .015, (2 * k, 3))
    wide = points[rng.permutation(POINTS)[:3 * k]] + rng.normal(0, .06, (3 * k, 3))
    queries = np.concatenate([near, wide, rng.uniform(-1, 1, (k, 3))]).clip(-1, 1).astype(np.float16)
    return {"points": points, "normals": np.round(normals * 127), "colours": np.round(colours * 255),
            "queries": queries, "distance": shape.distance(queries.astype(np.float32))}


def take_faces(shape, rng):
    """A low-poly mesh in canonical order; -1 where there is no face."""
    corners, colours, components = canonical(*simplify_to(*shape.mesh(), FACES))
    empty = FACES - len(corners)
    return {"corners": np.pad(corners, ((0, empty), (0, 0), (0, 0)), constant_values=-1),
            "face_colours": np.round(np.pad(colours, ((0, empty), (0, 0))) * 255),
            "components": np.pad(components, (0, empty), constant_values=-1)}


def take_pictures(shape, rng):
    """From random sides, a little above or below; the last is the one that came with the shape, if one did."""
    drawn = pictures(shape, [(rng.uniform(0, 360), rng.uniform(-15, 50)) for _ in range(PICTURES)])
    if shape.icon is not None:                                # its light is in its colours: no normals
        seen = framed(shape.icon)
        drawn["looks"][-1], drawn["facing"][-1], drawn["covered"][-1] = np.round(seen[..., :3] * 255), 0, np.round(seen[..., 3] * 255)
    return drawn


def pictures(shape, angles):
    """A picture from each of some sides, before any light: colours and normals as the eye sees them (times coverage), coverage."""
    vertices, faces, paint = painted(shape)
    drawn = np.zeros((len(angles), 2 * SIZE, 2 * SIZE, 7), np.float32)
    for picture, (azimuth, elevation) in zip(drawn, angles):
        eye = look(azimuth, elevation)
        pixel, _, normal, colour = see_mesh(tensor(vertices), tensor(faces, torch.int64), tensor(paint), eye, 2 * SIZE)
        picture.reshape(-1, 7)[pixel] = torch.cat([colour, normal @ eye.T, torch.ones_like(colour[:, :1])], 1)
    seen = np.stack([framed(picture) for picture in drawn])
    return {"looks": np.round(seen[..., :3] * 255), "facing": np.round(seen[..., 3:6] * 127), "covered": np.round(seen[..., 6] * 255)}


def take_views(shape, rng):
    """One picture from a random side, a little above or below: colour times coverage, coverage."""
    angles = rng.uniform(0, 360), rng.uniform(-20, 60)
    return {"views": (view(shape, *angles) * 255).round(), "angles": angles}


def view(shape, azimuth, elevation, size=VIEW):
    return flat(*painted(shape), azimuth, elevation, size).numpy()


def painted(shape):
    """Its fine mesh, with colours at the vertices: v 3, f 3, v 3."""
    vertices, faces, colours = shape.mesh(fine=True)
    paint = np.zeros_like(vertices)
    paint[faces] = colours[:, None]                           # no vertex has faces of two colours
    return vertices, faces, paint


TAKE = {"surface": take_surface, "faces": take_faces, "pictures": take_pictures, "views": take_views}
