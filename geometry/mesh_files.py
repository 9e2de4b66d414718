"""mesh_files.py - one mesh file of anybody's -> triangles with a colour each, in [-.9, .9]^3, or one line that says why not."""
import io
import json
import re
import signal
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image

from engine.commands import UserError
from geometry.soup import Soup

MOST_BYTES, MOST_FACES = 300_000_000, 1_000_000   # of a file
SECONDS = 120               # that a file may take
LONGEST = 1.8               # side of the bounding box, as of the built-in shapes
DETAIL = 1 / 16             # of the longest side: the size of a triangle that a texture is painted on
NAMED = {"black": "0.1 0.1 0.1", "dkgrey": ".3 .3 .3", "dkgray": ".3 .3 .3", "grey": ".5 .5 .5", "gray": ".5 .5 .5", "ltgrey": ".75 .75 .75",
         "silver": ".75 .75 .78", "steel": ".6 .6 .62", "white": ".92 .92 .92", "bone": ".85 .8 .7", "tan": ".8 .68 .5", "sand": ".8 .7 .5",
         "brown": ".45 .3 .18", "ltbrown": ".65 .48 .32", "wood": ".6 .43 .25", "gold": ".8 .65 .25", "yellow": ".9 .8 .2", "orange": ".9 .5 .15",
         "red": ".75 .15 .12", "redorange": ".85 .3 .12", "pink": ".9 .6 .65", "flesh": ".9 .72 .6", "purple": ".5 .25 .6", "blue": ".2 .3 .7",
         "ltblue": ".6 .75 .9", "green": ".25 .5 .25", "glass": ".8 .87 .9"}    # materials that files of old name and do not define


def text(raw):
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


@contextmanager
def limit(seconds):
    def stop(*_):
        raise UserError(f"it takes more than {seconds} seconds")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Beside(trimesh.resolvers.Resolver):
    """What a model refers to, materials and textures, by a function that reads a name from where the model lies. Of what trimesh
    wants a resolver to have, loading asks for `get` and `namespaced`."""

    def __init__(self, read):
        self.read = read

    def get(self, name):
        raw = self.read(name.strip())
        return text(raw).encode() if name.strip().lower().endswith(".mtl") else raw

    def keys(self):
        return []

    def write(self, name, data):
        raise NotImplementedError

    def namespaced(self, namespace):
        return Beside(lambda name: self.read(f"{namespace}/{name}"))


def named(obj):
    """Materials for an OBJ that has none, by their names: each is the longest of NAMED that is part of it."""
    names = dict.fromkeys(re.findall(r"^usemtl[ \t]+(\S+)", obj, re.M))
    known = {name: max((key for key in NAMED if key in name.lower()), key=len, default=None) for name in names}
    return "".join(f"newmtl {name}\nKd {NAMED[key] if key else '.7 .7 .7'}\n" for name, key in known.items()).encode()


def bounded(archive, member):
    if archive.getinfo(member).file_size > MOST_BYTES:
        raise UserError(f"'{member}' has more than {MOST_BYTES:,} bytes")
    return archive.read(member)


def triangles(item):
    """An item -> vertices v 3, faces f 3, colours f 3."""
    suffix = Path(item.member or item.file).suffix.lower()[1:]
    if item.member:
        with zipfile.ZipFile(item.file) as archive:
            place = Path(item.member).parent.as_posix()
            meshes = drawn(bounded(archive, item.member), suffix, Beside(lambda name: bounded(archive, f"{place}/{name}")))
    elif Path(item.file).stat().st_size > MOST_BYTES:
        raise UserError(f"it has more than {MOST_BYTES:,} bytes")
    else:
        meshes = drawn(Path(item.file).read_bytes(), suffix, Beside(lambda name: (Path(item.file).parent / name).read_bytes()))
    for mesh in meshes:
        if mesh.faces.min() < 0 or mesh.faces.max() >= len(mesh.vertices):
            raise UserError(f"a face names vertex {mesh.faces.max()} of {len(mesh.vertices)}")
    size = np.ptp(np.concatenate([mesh.vertices for mesh in meshes]), 0).max()
    painted = [paint(mesh, DETAIL * size) for mesh in meshes]
    first = np.cumsum([0] + [len(vertices) for vertices, _, _ in painted])
    vertices, colours = (np.concatenate([one[i] for one in painted]) for i in (0, 2))
    faces = np.concatenate([faces + start for (_, faces, _), start in zip(painted, first)])
    if not np.isfinite(vertices[faces]).all():
        raise UserError("it has vertices that are not finite numbers")
    if item.rotation:
        vertices = vertices @ np.reshape(np.array(item.rotation.split(), float), (3, 3)).T
    if not np.ptp(vertices[faces.ravel()], 0).max() > 0:
        raise UserError("it is a single point")
    vertices = framed(vertices, faces)
    corners = vertices[faces]
    real = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) > 1e-10
    if not real.any():
        raise UserError("all of its triangles are without area")
    return vertices, faces[real], colours[real]


def framed(vertices, faces):
    """Its bounding box in the middle, the longest side LONGEST."""
    low, high = (getattr(vertices[faces.ravel()], end)(0) for end in ("min", "max"))
    return (vertices - (low + high) / 2) / (high - low).max() * LONGEST


def drawn(raw, suffix, resolver):
    """A mesh file -> the meshes of its scene, where they are in it."""
    if suffix in ("gltf", "glb"):
        start = raw[20:20 + int.from_bytes(raw[12:16], "little")] if raw[:4] == b"glTF" else raw
        needed = json.loads(start).get("extensionsRequired", [])
        if "KHR_draco_mesh_compression" in needed or "EXT_meshopt_compression" in needed:
            raise UserError("it is compressed (Draco or meshopt); write it again without")
    if suffix == "obj":
        raw = text(raw)
        if "mtllib" not in raw:
            materials = named(raw)
            resolver, raw = Beside(lambda _: materials), "mtllib named.mtl\n" + raw
        raw = raw.encode()
    scene = trimesh.load_scene(io.BytesIO(raw), file_type=suffix, resolver=resolver, process=False)
    meshes = [mesh for mesh in scene.dump() if isinstance(mesh, trimesh.Trimesh) and len(mesh.faces)]
    if not meshes:
        raise UserError("it has no triangles")
    if sum(len(mesh.faces) for mesh in meshes) > MOST_FACES:
        raise UserError(f"it has more than {MOST_FACES:,} triangles")
    return meshes


def paint(mesh, size):
    """A mesh -> vertices, faces and a colour each; faces with a texture are cut until they are of that size."""
    vertices, faces, visual = np.asarray(mesh.vertices, float), np.asarray(mesh.faces), mesh.visual
    material = getattr(visual, "material", None)
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    uv = getattr(visual, "uv", None)
    if image is not None and uv is not None and len(uv) == len(vertices):
        for _ in range(6):
            corners = vertices[faces]
            long = np.linalg.norm(corners - corners[:, [1, 2, 0]], axis=-1).max(1) > size
            if not long.any() or len(faces) > 200_000:
                break
            vertices, faces, cut = trimesh.remesh.subdivide(vertices, faces, np.flatnonzero(long), vertex_attributes={"uv": uv})
            uv = cut["uv"]
        image = image.convert("RGB")
        image.thumbnail((256, 256))
        pixels = np.asarray(image, float) / 255
        at = uv[faces].mean(1) % 1 * [image.width, image.height]
        return vertices, faces, pixels[::-1][at[:, 1].astype(int).clip(0, image.height - 1), at[:, 0].astype(int).clip(0, image.width - 1)]
    if material is not None:
        colour = np.asarray(material.main_color, float)[:3] / 255
        return vertices, faces, np.tile(colour, (len(faces), 1))
    if visual.kind in ("face", "vertex"):
        return vertices, faces, np.asarray(visual.face_colors, float)[:, :3] / 255
    return vertices, faces, np.full((len(faces), 3), .7)


def shape(item, copy=0):
    """An item -> a Soup that knows what it is called; UserError says why not. Copy 1 is its mirror image, higher ones are
    stretched along the axes by up to a quarter, every other one mirrored."""
    try:
        with limit(SECONDS), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            vertices, faces, colours = triangles(item)
            rng, picture = np.random.default_rng(copy), icon(item)
            stretch = np.exp(rng.uniform(-.22, .22, 3)) if copy > 1 else np.ones(3)
            made = Soup(framed(vertices * stretch * [(-1) ** copy, 1, 1], faces), faces, colours)
            made.surface(1, rng)                              # there is one
    except UserError:
        raise
    except Exception as error:                                # what others wrote may go wrong in any way
        raise UserError(f"it cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:100]})") from None
    made.name, made.captions = item.captions[-1], item.captions
    made.icon = None if picture is None or copy > 1 else picture[:, ::(-1) ** copy]
    return made


def icon(item):
    """The picture of an item that came with it, h w 4 in [0, 1], or None."""
    if not item.icon:
        return None
    with zipfile.ZipFile(item.file) as archive:
        return np.asarray(Image.open(io.BytesIO(bounded(archive, item.icon))).convert("RGBA"), np.float32) / 255
