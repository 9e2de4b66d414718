"""mesh_files.py - one mesh file -> triangles with a colour each, in [-.9, .9]^3, or one line with the reason."""
import io
import json
import re
import signal
import warnings
import zipfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import trimesh
from PIL import Image

from engine.commands import UserError
from geometry.camera import to_srgb
from geometry.kinds import GREY
from geometry.soup import Soup

MOST_BYTES, MOST_FACES = 300_000_000, 1_000_000   # of a mesh with its materials, textures and buffers
MOST_PARTS = 5000           # changes of material in an OBJ, nodes in a glTF: trimesh's time grows with the square
MOST_PIXELS = 50_000_000    # of a texture
GLTF = "gltf", "glb"
SECONDS = 120               # that reading a file may take
LONGEST = 1.8               # longest side of the bounding box, as of the built-in shapes
DETAIL = 1 / 16             # of the longest side: the size of a triangle that gets its colour from a texture
EXTENSIONS = (              # of glTF, that a file may require; the names of those that are read begin like this
    "KHR_draco_", "KHR_materials_", "KHR_mesh_quantization", "KHR_texture_transform", "KHR_lights_", "EXT_texture_webp")
MATERIALS = {               # materials that old files name and do not define
    "black": "0.1 0.1 0.1", "dkgrey": ".3 .3 .3", "dkgray": ".3 .3 .3", "grey": ".5 .5 .5", "gray": ".5 .5 .5",
    "ltgrey": ".75 .75 .75", "silver": ".75 .75 .78", "steel": ".6 .6 .62", "white": ".92 .92 .92", "bone": ".85 .8 .7",
    "tan": ".8 .68 .5", "sand": ".8 .7 .5", "brown": ".45 .3 .18", "ltbrown": ".65 .48 .32", "wood": ".6 .43 .25",
    "gold": ".8 .65 .25", "yellow": ".9 .8 .2", "orange": ".9 .5 .15", "red": ".75 .15 .12", "redorange": ".85 .3 .12",
    "pink": ".9 .6 .65", "flesh": ".9 .72 .6", "purple": ".5 .25 .6", "blue": ".2 .3 .7", "ltblue": ".6 .75 .9",
    "green": ".25 .5 .25", "glass": ".8 .87 .9"}


def decode_text(raw):
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


@contextmanager
def limit(seconds):
    """Code inside of it may take this long, and unpack no picture of more than MOST_PIXELS."""
    def stop(*_):
        raise UserError(f"it takes more than {seconds} seconds")
    previous, pixels = signal.signal(signal.SIGALRM, stop), Image.MAX_IMAGE_PIXELS
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)          # then every second: trimesh swallows some exceptions
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2                 # Pillow refuses pictures of twice as many
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        Image.MAX_IMAGE_PIXELS = pixels


def read_regular(path):
    """The bytes of a file, which may be neither huge nor a pipe or a device."""
    if path.exists() and not path.is_file():
        raise UserError(f"'{path.name}' is no regular file")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"'{path.name}' has more than {MOST_BYTES:,} bytes")
    try:
        return path.read_bytes()
    except PermissionError:
        raise UserError(f"you may not read '{path.name}'") from None


def read_beside(path, name):
    """The bytes of a file that the mesh `path` names. It has to be in the mesh's folder; links are resolved."""
    folder = path.parent.resolve()
    file = (folder / name).resolve()
    if not file.is_relative_to(folder):
        raise UserError(f"it names a file outside its folder, '{name[:100]}'")
    return read_regular(file)


class SideFiles(trimesh.resolvers.Resolver):
    """Materials and textures of a model: read(name) -> the bytes of a file beside it. trimesh goes on without a file
    that it cannot get, so `refused` remembers why. It wants four methods."""

    def __init__(self, read, parent=None):
        self.read = read
        self.sizes, self.refused = (parent.sizes, parent.refused) if parent else ([], [])

    def get(self, name):
        try:
            raw = self.read(name.strip())
            self.sizes.append(len(raw))
            if sum(self.sizes) > MOST_BYTES:
                raise UserError(f"the files that it names have more than {MOST_BYTES:,} bytes")
        except UserError as error:
            self.refused.append(error)
            raise
        return decode_text(raw).encode() if name.strip().lower().endswith(".mtl") else raw

    def keys(self):
        return []

    def write(self, name, data):                              # trimesh wants it of a resolver, and never calls it here
        raise NotImplementedError

    def namespaced(self, namespace):
        return SideFiles(lambda name: self.read(f"{namespace}/{name}"), self)


def named_materials(obj):
    """Materials for an OBJ that defines none, from their names: the longest key of MATERIALS in a name decides."""
    lines = []
    for name in dict.fromkeys(re.findall(r"^usemtl[ \t]+(\S+)", obj, re.M)):
        key = max((key for key in MATERIALS if key in name.lower()), key=len, default=None)
        lines.append(f"newmtl {name}\nKd {MATERIALS.get(key, '.7 .7 .7')}\n")
    return "".join(lines).encode()


def read_member(archive, member):
    """The bytes of a file in a ZIP. Deflate alone stops unpacking at the size that the archive claims."""
    info = archive.getinfo(member)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"'{member}' is packed in an unusual way; pack it again")
    if info.file_size > MOST_BYTES:
        raise UserError(f"'{member}' has more than {MOST_BYTES:,} bytes")
    with archive.open(info) as file:
        return file.read(info.file_size)


def triangles(item):
    """An item -> vertices v 3, faces f 3, colours f 3."""
    path, suffix = Path(item.file), Path(item.member or item.file).suffix.lower()[1:]
    if item.member:
        with zipfile.ZipFile(path) as archive:
            folder = PurePosixPath(item.member).parent        # "." at the root, which a path drops
            side_files = SideFiles(lambda name: read_member(archive, str(folder / name)))
            meshes = load_meshes(read_member(archive, item.member), suffix, side_files)
    else:
        meshes = load_meshes(read_regular(path), suffix, SideFiles(lambda name: read_beside(path, name)))
    for mesh in meshes:
        if mesh.faces.min() < 0 or mesh.faces.max() >= len(mesh.vertices):
            raise UserError(f"a face names a vertex that is none of its {len(mesh.vertices)}")

    size = np.ptp(np.concatenate([mesh.vertices for mesh in meshes]), 0).max()
    vertices, faces, colours = zip(*[colour_faces(mesh, DETAIL * size, suffix in GLTF) for mesh in meshes])
    first = np.cumsum([0, *map(len, vertices)])               # the number of each mesh's first vertex
    faces = np.concatenate([mesh_faces + start for mesh_faces, start in zip(faces, first)])      # f 3
    vertices, colours = np.concatenate(vertices), np.concatenate(colours)                        # v 3, f 3
    if not np.isfinite(vertices[faces]).all():
        raise UserError("it has vertices that are not finite numbers")

    if item.rotation:
        vertices = vertices @ np.reshape(np.array(item.rotation.split(), float), (3, 3)).T
    vertices = vertices * item.stretch
    if not np.ptp(vertices[faces.ravel()], 0).max() > 0:
        raise UserError("it is a single point")
    vertices = fit_to_box(vertices, faces)
    a, b, c = vertices[faces].swapaxes(0, 1)                                                     # f 3 each
    has_area = np.linalg.norm(np.cross(b - a, c - a), axis=1) > 1e-10
    if not has_area.any():
        raise UserError("all of its triangles are without area")
    return vertices, faces[has_area], colours[has_area]


def fit_to_box(vertices, faces):
    """Moves the bounding box of the faces to the centre, and scales its longest side to LONGEST."""
    low, high = vertices[faces.ravel()].min(0), vertices[faces.ravel()].max(0)
    return (vertices - (low + high) / 2) / (high - low).max() * LONGEST


def load_meshes(raw, suffix, side_files):
    """The bytes of a mesh file -> the meshes of its scene, each in its place."""
    if suffix in GLTF:
        header = json.loads(raw[20:20 + int.from_bytes(raw[12:16], "little")] if raw[:4] == b"glTF" else raw)
        needed = header.get("extensionsRequired", [])
        if unknown := [str(name) for name in needed if not str(name).startswith(EXTENSIONS)]:
            raise UserError(f"it needs the glTF extension {unknown[0][:40]!r}, which is not read; export it without")
        if "KHR_draco_mesh_compression" in needed and not find_spec("DracoPy"):
            raise UserError("it is compressed by Draco; pip install DracoPy==2.2.0 reads it")
        if len(header.get("nodes", [])) > MOST_PARTS:
            raise UserError(f"it has more than {MOST_PARTS:,} nodes")
        if sum(abs(accessor.get("count", 0)) for accessor in header.get("accessors", [])) > 20 * MOST_FACES:
            raise UserError(f"its accessors claim more than {20 * MOST_FACES:,} items")
    if suffix == "stl" and not raw.lstrip().startswith(b"solid"):
        count = int.from_bytes(raw[80:84], "little")
        if len(raw) < 84 + 50 * count:
            raise UserError(f"it is cut short: {count:,} triangles take {84 + 50 * count:,} bytes, it has {len(raw):,}")
    if suffix == "obj":
        obj = decode_text(raw)
        if obj.count("usemtl") > MOST_PARTS:
            raise UserError(f"it changes its material more than {MOST_PARTS:,} times")
        if "mtllib" not in obj:
            materials = named_materials(obj)
            side_files, obj = SideFiles(lambda _: materials), "mtllib named.mtl\n" + obj
        raw = obj.encode()
    scene = trimesh.load_scene(io.BytesIO(raw), file_type=suffix, resolver=side_files, process=False)
    if side_files.refused:
        raise side_files.refused[0]
    places = [scene.graph[node] for node in scene.graph.nodes_geometry]           # 4 4, name; a mesh may stand in many
    placed = [(scene.geometry[name], place) for place, name in places]
    if sum(len(getattr(part, "faces", part.vertices)) for part, _ in placed) > MOST_FACES:
        raise UserError(f"it has more than {MOST_FACES:,} triangles")
    meshes = []
    for part, place in placed:
        if isinstance(part, trimesh.Trimesh) and len(part.faces):
            meshes.append(part.copy().apply_transform(place))
            if hasattr(part.visual, "material"):              # its copy has no colours of vertices
                meshes[-1].visual.vertex_attributes.update(part.visual.vertex_attributes.data)
    if not meshes:
        raise UserError("it has no triangles")
    return meshes


def colour_faces(mesh, size, linear):
    """A mesh -> vertices, faces, colours of faces. Textured faces longer than `size` are halved, at most six times.
    linear: colours of materials and vertices are proportional to the light, as glTF wants them, and become sRGB."""
    srgb = (lambda colours: to_srgb(torch.from_numpy(colours)).numpy()) if linear else lambda colours: colours
    vertices, faces, visual = np.asarray(mesh.vertices, float), np.asarray(mesh.faces), mesh.visual
    material = getattr(visual, "material", None)
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    uv = getattr(visual, "uv", None)
    if image is not None and uv is not None and len(uv) == len(vertices):
        for _ in range(6):
            corners = vertices[faces]                                                            # f 3 3
            long = np.flatnonzero(np.linalg.norm(corners - corners[:, [1, 2, 0]], axis=-1).max(1) > size)
            if not len(long) or len(faces) > 200_000:
                break
            vertices, faces, cut = trimesh.remesh.subdivide(vertices, faces, long, vertex_attributes={"uv": uv})
            uv = cut["uv"]
        image = image.convert("RGB")
        image.thumbnail((256, 256))
        pixels = np.asarray(image, float)[::-1] / 255                                            # h w 3, from below
        x, y = (uv[faces].mean(1) % 1 * [image.width, image.height]).astype(int).T
        return vertices, faces, pixels[y.clip(0, image.height - 1), x.clip(0, image.width - 1)]
    if material is not None:
        factor = material.baseColorFactor if linear else material.main_color
        white = np.full(3, 255)                               # glTF's default
        colours = np.tile(np.asarray(white if factor is None else factor, float)[:3] / 255, (len(faces), 1))     # f 3
        shades = visual.vertex_attributes.get("color")        # v 3 or v 4: glTF multiplies both
        if shades is not None and len(shades) == len(vertices):
            most = np.iinfo(shades.dtype).max if shades.dtype.kind == "u" else 1.
            colours *= (shades[faces, :3] / most).mean(1).clip(0, 1)
        return vertices, faces, srgb(colours)
    if visual.kind in ("face", "vertex"):
        return vertices, faces, srgb(np.asarray(visual.face_colors, float)[:, :3] / 255)
    return vertices, faces, np.full((len(faces), 3), GREY)


def shape(item):
    """An item -> a Soup with its name and captions; a UserError gives the reason if there is none."""
    try:
        with limit(SECONDS), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            vertices, faces, colours = triangles(item)
            soup = Soup(fit_to_box(vertices, faces), faces, colours)
            soup.icon = icon(item)
            soup.surface(1, np.random.default_rng(0))         # raises a UserError if nothing is visible
    except UserError:
        raise
    except Exception as error:                                # a broken file can raise any error
        raise UserError(f"it cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:100]})") from None
    soup.name, soup.captions = item.captions[-1], item.captions
    return soup


def icon(item):
    """The picture of an item that lies beside it, h w 4 in [0, 1], or None."""
    if not item.icon:
        return None
    with zipfile.ZipFile(item.file) as archive:
        picture = Image.open(io.BytesIO(read_member(archive, item.icon))).convert("RGBA")
        picture.thumbnail((512, 512))
        return np.asarray(picture, np.float32) / 255
