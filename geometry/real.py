"""geometry/real.py - shapes from files: folders of meshes, ShapeNet, Objaverse, Sweet Home 3D libraries.

A path is listed first, as items that name a file, captions, a licence and an author; each is loaded on its own, later, in
a worker, so that one that is broken, huge or endless costs itself and nothing else. What comes out of a file is
triangles with a colour each, in [-.9, .9]^3; geometry/soup.py makes a solid of them.

    python geometry/real.py path/to/shapes            # what is there, by whom, and who may use it
"""
import csv
import io
import json
import re
import signal
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image

from geometry.captions import FILLERS, words
from engine.commands import Parser, UserError, command
from geometry.soup import Soup

SUFFIXES = (".obj", ".glb", ".gltf", ".ply", ".stl", ".off")
MOST_BYTES, MOST_FACES = 300_000_000, 1_000_000   # of a file
SECONDS = 120               # that a file may take
LONGEST = 1.8               # side of the bounding box, as of the built-in shapes
DETAIL = 1 / 16             # of the longest side: the size of a triangle that a texture is painted on
SYNSETS = {"02691156": "aeroplane", "02747177": "bin", "02773838": "bag", "02801938": "basket", "02808440": "bathtub", "02818832": "bed",
           "02828884": "bench", "02843684": "birdhouse", "02871439": "bookshelf", "02876657": "bottle", "02880940": "bowl", "02924116": "bus",
           "02933112": "cabinet", "02942699": "camera", "02946921": "can", "02954340": "cap", "02958343": "car", "02992529": "telephone",
           "03001627": "chair", "03046257": "clock", "03085013": "keyboard", "03207941": "dishwasher", "03211117": "display",
           "03261776": "earphone", "03325088": "tap", "03337140": "file cabinet", "03467517": "guitar", "03513137": "helmet", "03593526": "jar",
           "03624134": "knife", "03636649": "lamp", "03642806": "laptop", "03691459": "loudspeaker", "03710193": "mailbox",
           "03759954": "microphone", "03761084": "microwave", "03790512": "motorbike", "03797390": "mug", "03928116": "piano",
           "03938244": "pillow", "03948459": "pistol", "03991062": "pot", "04004475": "printer", "04074963": "remote control",
           "04090263": "rifle", "04099429": "rocket", "04225987": "skateboard", "04256520": "sofa", "04330267": "stove", "04379243": "table",
           "04401088": "telephone", "04460130": "tower", "04468005": "train", "04530566": "boat", "04554684": "washer"}   # of ShapeNetCore

NAMED = {"black": "0.1 0.1 0.1", "dkgrey": ".3 .3 .3", "dkgray": ".3 .3 .3", "grey": ".5 .5 .5", "gray": ".5 .5 .5", "ltgrey": ".75 .75 .75",
         "silver": ".75 .75 .78", "steel": ".6 .6 .62", "white": ".92 .92 .92", "bone": ".85 .8 .7", "tan": ".8 .68 .5", "sand": ".8 .7 .5",
         "brown": ".45 .3 .18", "ltbrown": ".65 .48 .32", "wood": ".6 .43 .25", "gold": ".8 .65 .25", "yellow": ".9 .8 .2", "orange": ".9 .5 .15",
         "red": ".75 .15 .12", "redorange": ".85 .3 .12", "pink": ".9 .6 .65", "flesh": ".9 .72 .6", "purple": ".5 .25 .6", "blue": ".2 .3 .7",
         "ltblue": ".6 .75 .9", "green": ".25 .5 .25", "glass": ".8 .87 .9"}    # materials that files of old name and do not define


@dataclass
class Item:
    """A shape that a source names."""
    key: str                    # which of the source, no two alike
    file: str
    member: str = ""            # of an archive
    captions: list = field(default_factory=list)     # the last is the class
    rotation: str = ""          # 9 numbers, by rows
    icon: str = ""              # a picture of it, of the same archive
    licence: str = ""
    author: str = ""

    def __post_init__(self):
        self.captions = [caption for caption in dict.fromkeys(self.captions) if set(words(caption)) - FILLERS] or ["shape"]


def tidy(text):
    """A name of a file or a thing as words: "coffeeTable_02" -> "coffee table", "Bookcase 45x160" -> "bookcase"."""
    return " ".join(re.findall(r"[^\W\d_]{2,}", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text))).lower()


def text(raw):
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


# ---------------------------------------------------------------------------- listing

def listed(path):
    """A path -> the items of it, in an order of their own, and what is none and why: [(file, reason)]."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no {path}; --data takes a mesh file, a folder of meshes or of .sh3f libraries, or a library")
    if path.suffix == ".sh3f" or path.is_dir() and any(path.glob("*.sh3f")):
        libraries = [path] if path.is_file() else sorted(path.glob("*.sh3f"))
        items, skipped = [], []
        for library in libraries:
            some, bad = sweet_home(library)
            items, skipped = items + some, skipped + bad
    elif path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} is none of {', '.join(SUFFIXES)} and .sh3f")
        items, skipped = [Item(path.name, str(path), captions=[tidy(path.stem)])], []
    else:
        items, skipped = folder(path)
    if not items:
        raise UserError(f"{path} holds no shapes: no {', '.join(SUFFIXES)} or .sh3f; --data takes a folder that does")
    return items, skipped


def folder(path):
    """Meshes in folders, of any depth: captions from a CSV, from a text file beside the mesh, or else from the names.
    ShapeNetCore's synset/model/models/model_normalized.obj and Objaverse's uid.glb with a CSV of uid,caption are such folders."""
    told, skipped, items = {}, [], []
    files = sorted(file for file in path.rglob("*") if not file.is_dir())
    tables = [file for file in files if file.suffix.lower() == ".csv" and file.parent == path]
    beside = {file.with_suffix(".txt") for file in files if file.suffix.lower() in SUFFIXES}
    for table in tables:
        try:
            rows = list(csv.reader(io.StringIO(text(table.read_bytes())), strict=True))
        except csv.Error as error:
            raise UserError(f"{table} cannot be read ({error}); is a quote open? Its lines are file,caption") from None
        pairs = [(row[0].strip().removeprefix("./"), row[1].strip()) for row in rows if len(row) > 1 and row[0].strip() and row[1].strip()]
        if not pairs:
            raise UserError(f"{table} has no line of file,caption; write it with commas, in UTF-8, or put it elsewhere")
        for name, caption in pairs[pairs[0][1].lower() == "caption":]:               # without the heading
            told.setdefault(name, []).append(caption)
    missing = set(told)
    for file in files:
        key = file.relative_to(path).as_posix().encode(errors="backslashreplace").decode()       # old archives have names in other letters
        if file.suffix.lower() not in SUFFIXES:
            if file not in beside and file not in tables:
                skipped.append((key, f"'{file.suffix}' is none of {', '.join(SUFFIXES)}"))
            continue
        if not file.is_file():
            skipped.append((key, "it is a link to a file that is not there"))
            continue
        names = [key, file.name, file.stem] + [part for part in file.relative_to(path).parts[:-1]]
        synset = next((SYNSETS[name] for name in names if name in SYNSETS), None)
        captions = [caption for name in dict.fromkeys(names) for caption in told.get(name, [])]
        missing -= set(names)
        if not captions and file.with_suffix(".txt").is_file():
            captions = [line.strip() for line in text(file.with_suffix(".txt").read_bytes()).splitlines() if line.strip()]
        kind = synset or tidy(file.parent.name if file.parent != path else file.stem)
        captions = captions or [tidy(file.stem)] * (synset is None)
        items.append(Item(key, str(file), captions=captions + [kind]))
    return items, skipped + [(name, "it has a caption, but there is no such file") for name in sorted(missing)]


def sweet_home(path):
    """A Sweet Home 3D library: a ZIP of models, icons and a catalogue of `key#number=value` lines, by its rules in latin-1."""
    try:
        with zipfile.ZipFile(path) as archive:
            names, raw = set(archive.namelist()), archive.read("PluginFurnitureCatalog.properties")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no Sweet Home 3D library ({error}); get it again") from None
    licence, entries, items, skipped = "", {}, [], []
    for line in raw.decode("latin-1").splitlines():
        name, _, value = line.partition("=")
        value = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), value).strip()
        key, _, number = name.strip().partition("#")
        if number.isdigit():
            entries.setdefault(int(number), {})[key] = value
        elif name.strip() == "license":
            licence = value
    for number, entry in sorted(entries.items()):
        key, member, icon = f"{path.stem}/{number}", entry.get("model", "").lstrip("/"), entry.get("icon", "").lstrip("/")
        if ".." in member.split("/"):
            skipped.append((key, f"'{member}' points outside the library"))
        elif member not in names:
            skipped.append((key, f"the library has no '{member}'"))
        elif not member.lower().endswith(SUFFIXES):
            skipped.append((key, f"'{member}' is none of {', '.join(SUFFIXES)}"))
        else:
            name = tidy(entry.get("name", "")) or tidy(Path(member).stem)
            items.append(Item(key, str(path), member, [name, *name.split()[-1:]], entry.get("modelRotation", ""),
                              icon if icon in names else "", licence, entry.get("creator", "")))
    return items, skipped


# ---------------------------------------------------------------------------- loading

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


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("path", help="a mesh, a folder of meshes, or Sweet Home 3D libraries")
    args = parser.parse_args()
    items, skipped = listed(args.path)
    for item in items:
        print(item.key, *item.captions, sep=" | ")
    for file, reason in skipped:
        print(f"skipped: {file}: {reason}")
    for licence in dict.fromkeys(item.licence for item in items if item.licence):
        some = [item for item in items if item.licence == licence]
        print(f"{len(some)} shapes, {licence}, by {', '.join(sorted({item.author for item in some}, key=str.lower))}")
    print(f"{len(items)} shapes, {len(skipped)} files that are none")


if __name__ == "__main__":
    command(main)
