"""real.py - shapes from files: folders of meshes, ShapeNet, Objaverse, Sweet Home 3D libraries.

A path is first listed, as items: a file, captions, a licence and an author. A worker process reads each file later
(geometry/mesh_files.py): so a broken, huge or endless file costs only itself.

    python -m geometry.real path/to/shapes            # its items, licences and authors
"""
import csv
import hashlib
import io
import re
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from engine.commands import Parser, UserError, command
from geometry import asset_names, mesh_files, soup
from geometry.kinds import RECORDS
from geometry.prepare import CHUNK, counts, name_begins, short_digest
from geometry.words import FILLERS, words

SUFFIXES = (".obj", ".glb", ".gltf", ".ply", ".stl", ".off")
COPY = "#1"                 # ends the key of a stretched copy
FEW = 5_000                 # files
LARGEST = 12                # shapes of a family that may be held out: a kind of thing remains
SYNSETS = {  # of ShapeNetCore
    "02691156": "aeroplane", "02747177": "bin", "02773838": "bag", "02801938": "basket", "02808440": "bathtub",
    "02818832": "bed", "02828884": "bench", "02843684": "birdhouse", "02871439": "bookshelf", "02876657": "bottle",
    "02880940": "bowl", "02924116": "bus", "02933112": "cabinet", "02942699": "camera", "02946921": "can",
    "02954340": "cap", "02958343": "car", "02992529": "telephone", "03001627": "chair", "03046257": "clock",
    "03085013": "keyboard", "03207941": "dishwasher", "03211117": "display", "03261776": "earphone", "03325088": "tap",
    "03337140": "file cabinet", "03467517": "guitar", "03513137": "helmet", "03593526": "jar", "03624134": "knife",
    "03636649": "lamp", "03642806": "laptop", "03691459": "loudspeaker", "03710193": "mailbox",
    "03759954": "microphone", "03761084": "microwave", "03790512": "motorbike", "03797390": "mug", "03928116": "piano",
    "03938244": "pillow", "03948459": "pistol", "03991062": "pot", "04004475": "printer", "04074963": "remote control",
    "04090263": "rifle", "04099429": "rocket", "04225987": "skateboard", "04256520": "sofa", "04330267": "stove",
    "04379243": "table", "04401088": "telephone", "04460130": "tower", "04468005": "train", "04530566": "boat",
    "04554684": "washer"}


@dataclass
class Item:
    """A shape that a source lists."""
    key: str                    # its name in the source; no two are equal
    file: str
    member: str = ""            # the name in the archive, if the file is one
    captions: list = field(default_factory=list)     # the last is the class
    rotation: str = ""          # 9 numbers, row by row
    icon: str = ""              # the name of its picture in the same archive
    licence: str = ""
    author: str = ""
    family: str = ""            # of shapes that are nearly the same (geometry/asset_names.py); by default a shape alone
    weight: float = 1.          # how often it is drawn in training, relative to others
    stretch: tuple = (1, 1, 1)  # factors of x, y and z

    def __post_init__(self):
        captions = [caption for caption in dict.fromkeys(self.captions[::-1]) if set(words(caption)) - FILLERS]
        self.captions = captions[::-1] or ["shape"]
        self.family = self.family or self.key


def stretched(item):
    """A copy of an item for training, longer or shorter along each axis; the same at every call."""
    key = item.key + COPY
    rng = np.random.default_rng(int(hashlib.sha256(key.encode()).hexdigest(), 16) % 2 ** 32)
    return replace(item, key=key, icon="", stretch=tuple(np.exp(rng.uniform(-.35, .35, 3)).round(4).tolist()))


def tidy(name):
    """The name of a file or a shape as words: "coffeeTable_02" -> "coffee table", "Bookcase 45x160" -> "bookcase"."""
    return " ".join(asset_names.split(name))


# ---------------------------------------------------------------------------- listing

def list_items(path):
    """A path -> its items, in a fixed order, and what is not an item: [(file, reason)]."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no {path}; give a mesh, a folder of meshes or .sh3f libraries, or a library")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    libraries = [file for file in files if file.suffix.lower() == ".sh3f"]
    if libraries:
        items, skipped = (sum(lists, []) for lists in zip(*map(list_library, libraries)))
        skipped += [(printable(file.name), "a folder that holds libraries is read for them alone")
                    for file in files if file not in libraries]
    elif path.is_dir():
        items, skipped = list_folder(path)
    elif path.suffix.lower() in SUFFIXES:
        items, skipped = [Item(path.name, str(path), captions=[tidy(path.stem)])], []
    else:
        raise UserError(f"{path} is none of {', '.join(SUFFIXES)} and .sh3f")
    if not items:
        why = f"{skipped[0][0]}: {skipped[0][1]}" if libraries and skipped else f"no {', '.join(SUFFIXES)} or .sh3f"
        raise UserError(f"{path} holds no shapes ({why}); name a folder that does")
    return items, skipped


def read_shape(path):
    """The shape of one mesh file, in the middle of the cube and as large as all shapes are."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; name a mesh: {', '.join(SUFFIXES)}")
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is no mesh file; name one that ends in {', '.join(SUFFIXES)}")
    (item,), _ = list_items(path)
    try:
        return mesh_files.shape(item)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_captions(table):
    """A CSV file of file,caption -> the pairs, without the heading."""
    try:
        rows = list(csv.reader(io.StringIO(mesh_files.decode_text(mesh_files.read_regular(table))), strict=True))
    except csv.Error as error:
        raise UserError(f"{table} cannot be read ({error}); is a quote open? Its lines are file,caption") from None
    pairs = [(row[0].strip().removeprefix("./"), row[1].strip()) for row in rows if len(row) > 1]
    pairs = [(name, caption) for name, caption in pairs if name and caption]
    if not pairs:
        raise UserError(f"{table} has no line of file,caption; write it with commas, in UTF-8, or put it elsewhere")
    return pairs[pairs[0][1].lower() == "caption":]


def printable(name):
    """A file name, which may not be UTF-8, as text that can be written."""
    return name.encode(errors="backslashreplace").decode()


def list_folder(path):
    """Meshes in folders, of any depth. Captions come from a CSV, a text file beside the mesh, or the names.
    ShapeNetCore (synset/model/models/model_normalized.obj), Objaverse (uid.glb with a CSV) and kits of assets
    (natureKit/tree_pineTallA.glb) are such folders."""
    files = sorted(file for file in path.rglob("*") if not file.is_dir())
    tables = [file for file in files if file.suffix.lower() == ".csv" and file.parent == path and file.is_file()]
    texts = {file.with_suffix(".txt") for file in files if file.suffix.lower() in SUFFIXES}
    table_captions = {}                                       # {name in a table: captions}
    for name, caption in [pair for table in tables for pair in read_captions(table)]:
        table_captions.setdefault(name, []).append(caption)

    items, skipped, missing, families = [], [], set(table_captions), {}
    for file in files:
        key = printable(file.relative_to(path).as_posix())
        if file.suffix.lower() not in SUFFIXES:
            if file not in texts and file not in tables:
                skipped.append((key, f"'{Path(key).suffix}' is none of {', '.join(SUFFIXES)}"))
            continue
        if not file.is_file():
            skipped.append((key, "it is no regular file, or a link to none"))
            continue
        names = dict.fromkeys([key, file.name, file.stem, *file.relative_to(path).parts[:-1]])
        missing -= set(names)
        captions = [caption for name in names for caption in table_captions.get(name, [])]
        if not captions and file.with_suffix(".txt").is_file():
            lines = mesh_files.decode_text(mesh_files.read_regular(file.with_suffix(".txt"))).splitlines()
            captions = [line.strip() for line in lines if line.strip()]
        synset = next((SYNSETS[name] for name in names if name in SYNSETS), None)
        class_name, family = synset or tidy(file.parent.name if file.parent != path else file.stem), ""
        weight = 1.
        kits = [folder.name for folder in file.relative_to(path).parents if asset_names.KIT.search(folder.name)]
        if asset_names.KIT.search(path.name):
            kits.append("")                                   # the name of the path itself is no caption
        if kits and tidy(file.stem) and not captions and not synset:
            *captions, class_name = asset_names.captions(file.stem, kits[0])
            name = asset_names.family(file.stem)
            family = families.setdefault(frozenset(name.split()), name)                   # "pine tree" is "tree pine"
            weight = asset_names.weight(family)
        elif not captions and not synset:
            captions = [tidy(file.stem)]
        items.append(Item(key, str(file), captions=captions + [class_name], family=family, weight=weight))
    return items, skipped + [(name, "it has a caption, but there is no such file") for name in sorted(missing)]


def list_library(path):
    """A Sweet Home 3D library: a ZIP of models, icons and a catalogue in latin-1, with lines `key#number=value`."""
    try:
        if not path.is_file():
            raise UserError("it is no regular file")
        with zipfile.ZipFile(path) as archive:
            raw = mesh_files.read_member(archive, "PluginFurnitureCatalog.properties")
            names = set(archive.namelist())
    except (UserError, OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        return [], [(path.name, f"it is no Sweet Home 3D library ({error}); get it again")]
    licence, entries, items, skipped = "", {}, [], []
    for line in raw.decode("latin-1").splitlines():
        name, _, value = line.partition("=")
        value = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), value).strip()
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")             # pairs are a letter
        key, _, number = name.strip().partition("#")
        if number.isdecimal() and len(number) < 10:
            entries.setdefault(int(number), {})[key] = value
        elif name.strip() == "license":
            licence = value
    for number, entry in sorted(entries.items()):
        key, member = f"{path.stem}/{number}", entry.get("model", "").lstrip("/")
        if ".." in member.split("/"):
            skipped.append((key, f"'{member}' points outside the library"))
        elif member not in names:
            skipped.append((key, f"the library has no '{member}'"))
        elif not member.lower().endswith(SUFFIXES):
            skipped.append((key, f"'{member}' is none of {', '.join(SUFFIXES)}"))
        else:
            name = tidy(entry.get("name", "")) or tidy(Path(member).stem)
            icon = entry.get("icon", "").lstrip("/")
            items.append(Item(key, str(path), member, [name, *name.split()[-1:]], entry.get("modelRotation", ""),
                              icon if icon in names else "", licence, entry.get("creator", "")))
    return items, skipped


# ---------------------------------------------------------------------------- a source of training samples

class Files:
    """The shapes of a path. One folder holds both splits: a thirteenth of the families of at most LARGEST shapes,
    always the same, is held out. Files are few: each has more pictures. Below FEW, each training shape has a stretched
    copy; the copies are last."""
    pictures, positions = 8, 8                                # of a shape (geometry/symmetry.py)

    def __init__(self, split, path):
        self.split, (self.items, self.skipped) = split, list_items(path)
        families = Counter(item.family for item in self.items)
        numbers = {family: int(hashlib.sha256(family.encode()).hexdigest(), 16) / 2 ** 256
                   for family, count in families.items() if count <= LARGEST or len(families) < 4}
        lowest = sorted(numbers, key=numbers.get)
        least = min(2, len(families) // 2)                    # of few families, too
        self.held_out = {*lowest[:least], *(family for family in lowest if numbers[family] < 1 / 13)}
        self.files = len(self.items)
        if self.files < FEW:
            self.items += [stretched(item) for item in self.items if item.family not in self.held_out]
        self.count, self.first = len(self.items), 0
        values = [(item.key, item.rotation, Path(item.file).stat().st_size) for item in self.items]
        named = [item.family for item in self.items if item.family != item.key]
        self.name = f"{name_begins(path)}{short_digest(values, *named)}"

    def folder(self, kind):
        if kind == RECORDS:
            return f"{kind.name}-{short_digest(CHUNK, [item.captions for item in self.items])}"
        how = CHUNK, kind.name, kind.arrays, soup.CELLS, soup.SKIN, soup.POOL, *counts(self, kind)
        return f"{kind.name}-{short_digest(*how)}"

    def shape(self, row):
        return mesh_files.shape(self.items[row])

    def weight(self, row):
        return self.items[row].weight

    def origin(self, row):
        item = self.items[row]
        return {"file": item.key, "licence": item.licence, "author": item.author}

    def in_split(self, row):                                  # "all": of both
        return self.split == "all" or (self.items[row].family in self.held_out) == (self.split == "test")


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("path", help="a mesh, a folder of meshes, or Sweet Home 3D libraries")
    items, skipped = list_items(parser.parse_args().path)
    for item in items:
        print(item.key, *item.captions, sep=" | ")
    for file, reason in skipped:
        print(f"skipped: {file}: {reason}")
    for licence in dict.fromkeys(item.licence for item in items if item.licence):
        authors = [item.author for item in items if item.licence == licence]
        print(f"{len(authors)} shapes, {licence}, by {', '.join(sorted(set(authors), key=str.lower))}")
    print(f"{len(items)} shapes, {len(skipped)} other files")


if __name__ == "__main__":
    command(main)
