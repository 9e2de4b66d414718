"""training_samples.py - training samples that several stages draw from: points of the surface, pictures.

A shape is any object with `surface`, `distance`, `mesh`, `low_poly` and `icon`: a built-in shape (geometry/solids.py)
or triangles of a file (geometry/soup.py). A kind of samples (geometry/kinds.py) takes them from a shape.
"""
import numpy as np
import torch
from einops import reduce

from geometry.camera import as_tensor, view_rotation
from geometry.crop import SIZE, crop_to_object
from geometry.kinds import Kind
from geometry.rasterise import rasterise_mesh
from geometry.splat import baked_light

POINTS, QUERIES = 4096, 6144  # stored for each shape; a training step draws from them
REACH = 1.3                   # depths of a flat picture: +-REACH


def take_surface(shape, rng):
    """Queries: 2/6 are surface points plus noise of deviation .015, 3/6 of .06, 1/6 are anywhere."""
    points, normals, colours = shape.surface(POINTS, rng)                      # k 3 each
    k = QUERIES // 6
    near = points[rng.permutation(POINTS)[:2 * k]] + rng.normal(0, .015, (2 * k, 3))
    wide = points[rng.permutation(POINTS)[:3 * k]] + rng.normal(0, .06, (3 * k, 3))
    queries = np.concatenate([near, wide, rng.uniform(-1, 1, (k, 3))]).clip(-1, 1).astype(np.float16)
    return {"points": points, "normals": np.round(normals * 127), "colours": np.round(colours * 255),
            "queries": queries, "distance": shape.distance(queries.astype(np.float32))}


def take_pictures(shape, rng, count=2):
    """`count` pictures from random sides, a little above or below. If the file has a picture, it is the last one."""
    angles = [(rng.uniform(0, 360), rng.uniform(-15, 50)) for _ in range(count)]
    arrays = draw_pictures(shape, angles) | {"picture_azimuth": np.array(angles)[:, 0]}
    if shape.icon is not None:                                # its light is in its colours: no normals
        arrays["picture_azimuth"][-1] = 0
        icon = crop_to_object(shape.icon)                                      # s s 4
        for name, values in zip(PICTURES.arrays, (icon[..., :3] * 255, 0, icon[..., 3] * 255)):
            arrays[name][-1] = np.round(values)
    return arrays


def draw_pictures(shape, angles):
    """Pictures without light, one for each pair of angles: colours and camera-frame normals, times coverage."""
    vertices, faces, colours = vertex_coloured(shape)
    mesh, pictures = (as_tensor(vertices), as_tensor(faces, torch.int64), as_tensor(colours)), []
    for view in [view_rotation(*pair) for pair in angles]:
        pixel, _, normal, colour = rasterise_mesh(*mesh, view, 2 * SIZE)
        image = torch.zeros(4 * SIZE ** 2, 7)
        image[pixel] = torch.cat([colour, normal @ view.T, torch.ones_like(colour[:, :1])], 1)
        pictures.append(crop_to_object(image.reshape(2 * SIZE, 2 * SIZE, 7).numpy()))
    pictures = np.stack(pictures)                                              # b s s 7
    return {"picture_colours": np.round(pictures[..., :3] * 255), "picture_normals": np.round(pictures[..., 3:6] * 127),
            "picture_coverage": np.round(pictures[..., 6] * 255)}


def render_flat(vertices, faces, colours, azimuth, elevation, size):
    """The target of a rendered picture: a mesh with colours (v 3) in baked light, no shadow, no floor.
    -> size size 5: colour times coverage, coverage, depth times coverage, from 0 (far) to 1."""
    view = view_rotation(azimuth, elevation)
    pixel, position, normal, colour = rasterise_mesh(as_tensor(vertices), as_tensor(faces, torch.int64),
                                                     as_tensor(colours), view, 2 * size)
    image = torch.zeros(4 * size ** 2, 5)
    depth = (.5 + position @ view[2] / (2 * REACH)).clamp(0, 1)[:, None]                           # p 1
    image[pixel] = torch.cat([colour * baked_light(normal), torch.ones_like(depth), depth], -1)
    return reduce(image, "(h a w b) c -> h w c", "mean", h=size, w=size, a=2)


def vertex_coloured(shape):
    """The fine mesh of a shape, with colours at the vertices: v 3, f 3, v 3."""
    vertices, faces, face_colours = shape.mesh(fine=True)
    colours = np.zeros_like(vertices)
    colours[faces] = face_colours[:, None]                    # all faces at a vertex have the same colour
    return vertices, faces, colours


# 98 kB a shape; 29 kB a picture
SURFACE = Kind("surface", {"points": (np.float16, (POINTS, 3)), "normals": (np.int8, (POINTS, 3)),
                           "colours": (np.uint8, (POINTS, 3)), "queries": (np.float16, (QUERIES, 3)),
                           "distance": (np.float16, (QUERIES,))}, take_surface)
PICTURES = Kind("pictures", {"picture_colours": (np.uint8, (SIZE, SIZE, 3)),
                             "picture_normals": (np.int8, (SIZE, SIZE, 3)),
                             "picture_coverage": (np.uint8, (SIZE, SIZE)), "picture_azimuth": (np.float32, ())},
                take_pictures, several="pictures", probes=1)
