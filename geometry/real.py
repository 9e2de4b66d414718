"""geometry/real.py - shapes from files: folders of meshes, ShapeNet, Objaverse, Sweet Home 3D libraries.

A path is listed first, as items that name a file, captions, a licence and an author; each is loaded on its own, later, in
a worker, so that one that is broken, huge or endless costs itself and nothing else. What comes out of a file is
triangles with a colour each, in [-.9, .9]^3; geometry/soup.py makes a solid of them.

    python geometry/real.py path/to/shapes            # what is there, by whom, and who may use it
"""
import contextlib
import csv
import io
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.commands import Parser, UserError, between, command
from geometry import mesh_files
from geometry.captions import FILLERS, words
from geometry.mesh_files import text
from geometry.soup import SKIN, faithful, surface_of

SUFFIXES = (".obj", ".glb", ".gltf", ".ply", ".stl", ".off")
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


def check(items):
    """How often is the solid that soup.py makes of a file what its triangles show?"""
    shares = []
    for item in tqdm(items, unit="shape"):
        with contextlib.suppress(UserError):
            soup = mesh_files.shape(item)
            shares.append(faithful((soup.vertices, soup.faces), surface_of(soup.side)))
    if not shares:
        raise UserError(f"none of the {len(items)} shapes can be read")
    there, back = np.mean(shares, 0)
    print(f"{len(shares)} of {len(items)} shapes could be read. Of what is seen of the triangles the solid has {there:.3f} within {2 * SKIN:.3f}; "
          f"of what is seen of the solid the triangles have {back:.3f}; both are at least .95 for {np.mean(np.min(shares, 1) >= .95):.3f} of the shapes")


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("path", help="a mesh, a folder of meshes, or Sweet Home 3D libraries")
    parser.add_argument("--check", type=between(1), metavar="N", help="try N of them, evenly spread: is the solid what the triangles show?")
    args = parser.parse_args()
    items, skipped = listed(args.path)
    if args.check:
        check([items[i] for i in np.linspace(0, len(items) - 1, min(args.check, len(items))).astype(int)])
        return
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
