"""search.py - which shapes of a folder are most like a mesh, a picture or words? The student of lost.py says.

    python -m relatives.lost search --query chair.glb --in path/to/meshes
    python -m relatives.lost search --query "a red chair" --in path/to/meshes

The student encodes shapes alone. From words or a picture, SAMPLES shapes are generated; the mean of their features is
the query.
"""
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import tokenizer
from engine.commands import Parser, UserError, between
from engine.files import make_folder, trained_stages
from geometry import mesh_files, real
from geometry.render import contact_sheet, render_mesh, save_png
from geometry.training_samples import vertex_coloured
from prompts import reading
from sample import load

SAMPLES = 4


def find_folder(folder, *stages):
    """The checkpoint folder, wherever it is (prompts/reading.py); these stages of lost.py have to be in it."""
    cure, found = "--checkpoint takes a folder of train.py --model lost", reading.find(folder)
    if found is None:
        raise UserError(f"there is no folder {folder}; {cure}")
    if missing := {*stages} - {*trained_stages(found)}:
        raise UserError(f"{folder} holds no {', '.join(sorted(missing))}; {cure}")
    return found


def cloud_of(shape, points):                                  # 1 k 3 each
    return [torch.from_numpy(np.float32(x))[None] for x in shape.surface(points, np.random.default_rng(0))]


@torch.no_grad()
def query_features(query, folder, student, encoder):
    """A mesh, a picture or words -> features e."""
    path, is_file = Path(query), os.path.isfile(query)         # Path.is_file may refuse a long text
    if not is_file and (re.search(r"\.[a-z]\w*$", query.lower()) or len(path.parts) > 1):
        raise UserError(f"there is no file {query}; --query takes a mesh, a picture, or words")
    if path.suffix.lower() in real.SUFFIXES:
        return student(encoder(*cloud_of(real.read_shape(path), encoder.points)))[0]
    prompt = {"image": path} if is_file else {"prompt": query}
    tokens = load(folder, "cpu", "fp32", "lost").sample(**prompt, n=SAMPLES)
    return F.normalize(student(tokens).mean(0), dim=-1)


def main(load_student):
    """The command of lost.py, which knows how its student is loaded."""
    parser = Parser("lost.py - which shapes of a folder are most like a mesh, a picture or words?")
    flag = parser.add_argument
    flag("command", choices=["search"])
    flag("--query", required=True, help="the file of a mesh or of a picture, or words")
    flag("--in", dest="source", required=True, help="folder of meshes, or whatever `data.py --data` takes")
    flag("--n", type=between(1, 1000), default=12, help="how many shapes to show")
    flag("--checkpoint", default="checkpoints/lost", help="folder of trained weights")
    flag("--out", default="out", help="folder of the contact sheet")
    args = parser.parse_args()
    folder, (items, _) = find_folder(args.checkpoint, "tokenizer", "lost-student"), real.list_items(args.source)
    student, encoder = load_student(folder), tokenizer.load(folder)
    query = query_features(args.query, folder, student, encoder)
    make_folder(args.out)
    found, skipped = [], []
    for item in tqdm(items, unit="shape"):
        try:
            cloud = cloud_of(mesh_files.shape(item), encoder.points)
        except UserError as error:
            skipped.append(f"skipped: {item.key}: {error}")
            continue
        found.append((float(student(encoder(*cloud))[0] @ query), item))
    for line in skipped:
        print(line)
    if not found:
        raise UserError(f"no shape of {args.source} could be read; --in takes a folder of meshes")
    found = sorted(found, key=lambda entry: -entry[0])[:args.n]
    for likeness, item in found:
        print(f"{likeness:.3f}  {item.key}")
    pictures = [render_mesh(*vertex_coloured(mesh_files.shape(item)), size=192) for _, item in found]
    name = Path(args.query).name if os.path.isfile(args.query) else args.query
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "shape"
    sheet = Path(args.out) / f"search-{name}.png"
    save_png(sheet, contact_sheet(pictures, min(6, len(pictures)), [item.captions[-1] for _, item in found]))
    print(sheet)
