"""training_samples.py - five kinds of training samples, each a function of a shape and a random generator.

A shape is any object with `surface`, `distance`, `mesh`, `low_poly` and `icon`: a built-in shape (geometry/solids.py)
or triangles of a file (geometry/soup.py). They fill the arrays of geometry/kinds.py.
"""
import numpy as np
import torch
from einops import reduce

from geometry.camera import as_tensor, view_rotation
from geometry.crop import SIZE, crop_to_object
from geometry.kinds import KINDS, POINTS, QUERIES, REACH, RIM, SIDE, VIEW
from geometry.low_poly import canonical, check_mesh
from geometry.meshes import FACES
from geometry.rasterise import rasterise_mesh
from geometry.simplify import simplify_to
from geometry.splat import baked_light


def take_surface(shape, rng):
    """Queries: 2/6 are surface points plus noise of deviation .015, 3/6 of .06, 1/6 are anywhere."""
    points, normals, colours = shape.surface(POINTS, rng)                      # k 3 each
    k = QUERIES // 6
    near = points[rng.permutation(POINTS)[:2 * k]] + rng.normal(0, .015, (2 * k, 3))
    wide = points[rng.permutation(POINTS)[:3 * k]] + rng.normal(0, .06, (3 * k, 3))
    queries = np.concatenate([near, wide, rng.uniform(-1, 1, (k, 3))]).clip(-1, 1).astype(np.float16)
    return {"points": points, "normals": np.round(normals * 127), "colours": np.round(colours * 255),
            "queries": queries, "distance": shape.distance(queries.astype(np.float32))}


def take_faces(shape, rng):
    """A low-poly mesh in canonical order; -1 where there is no face. A file with few faces keeps those that its author
    set."""
    vertices, faces, colours = shape.mesh(fine=shape.low_poly)
    check_mesh(vertices, faces)
    corners, colours, components = canonical(*simplify_to(vertices, faces, colours, FACES))
    empty = FACES - len(corners)
    return {"corners": np.pad(corners, ((0, empty), (0, 0), (0, 0)), constant_values=-1),
            "face_colours": np.round(np.pad(colours, ((0, empty), (0, 0))) * 255),
            "components": np.pad(components, (0, empty), constant_values=-1)}


def take_pictures(shape, rng, count=2):
    """`count` pictures from random sides, a little above or below. If the file has a picture, it is the last one."""
    angles = [(rng.uniform(0, 360), rng.uniform(-15, 50)) for _ in range(count)]
    arrays = draw_pictures(shape, angles) | {"picture_azimuth": np.array(angles)[:, 0]}
    if shape.icon is not None:                                # its light is in its colours: no normals
        arrays["picture_azimuth"][-1] = 0
        icon = crop_to_object(shape.icon)                                      # s s 4
        for name, values in zip(KINDS["pictures"], (icon[..., :3] * 255, 0, icon[..., 3] * 255)):
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


def take_views(shape, rng):
    """One picture from a random side, a little above or below: colour times coverage, coverage."""
    angles = rng.uniform(0, 360), rng.uniform(-20, 60)
    return {"views": (draw_view(shape, *angles) * 255).round(), "angles": angles}


def take_sides(shape, rng):
    """Pictures from four sides, 90 degrees apart: colour times coverage, coverage, depth times coverage."""
    first, elevation = rng.uniform(0, 360), rng.uniform(0, 40)
    angles = [(first + 90 * i, elevation) for i in range(4)]
    return {"sides": np.round(draw_sides(vertex_coloured(shape), angles) * 255), "side_angles": angles}


def draw_sides(mesh, angles):                                 # -> v s s 5
    return torch.stack([render_flat(*mesh, *pair, SIDE + 2 * RIM)[RIM:-RIM, RIM:-RIM] for pair in angles]).numpy()


def draw_view(shape, azimuth, elevation):
    return render_flat(*vertex_coloured(shape), azimuth, elevation)[..., :4].numpy()


def render_flat(vertices, faces, colours, azimuth, elevation, size=VIEW):
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


TAKE = {"surface": take_surface, "faces": take_faces, "pictures": take_pictures, "views": take_views,
        "sides": take_sides, "records": lambda shape, rng: {}}
