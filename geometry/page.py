"""page.py - one web page, without a network: shapes to turn and to zoom, how each came to be, their files to save.

    python sample.py --text "a red chair" --html
"""
import html
import json
import re
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from engine.files import atomic_write
from geometry.export import write_glb
from geometry.simplify import simplify_to

TEMPLATE = Path(__file__).with_name("page.html")
STEP_CELLS, STEP_FACES = 32, 1500  # of the surface after a step


def base64(content):
    return b64encode(content).decode()


def box_of(points):                # k 3 -> the middle of x, y and z, and half the diagonal
    low, high = points.min(0), points.max(0)
    return [*map(float, (low + high) / 2), float(np.linalg.norm(high - low) / 2)]


def picture_step(label, picture):
    """picture: an array, h w 3, or the file of one."""
    content = BytesIO()
    if isinstance(picture, np.ndarray):
        Image.fromarray(picture).save(content, "PNG")
    return {"label": label, "picture": base64(content.getvalue() or picture.read_bytes())}


def surface_step(label, mesh, states, box):
    """The surface after a step of generation. states: of its tokens, 0 unknown, 1 known, 2 new; or None."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "step.glb"
        path.touch()                                          # stays empty where there is no surface yet
        if len(mesh.faces):
            write_glb(path, *simplify_to(mesh.vertices, mesh.faces, mesh.colours, STEP_FACES, flat=False))
        return {"label": label, "data": base64(path.read_bytes()), "known": states, "box": box}


def entry(model, name, note, shapes, steps, height):
    """A sample. shapes: (shape, its file) each; steps: those of model.steps."""
    files = [{"rep": shape.title, "name": path.name, "data": base64(path.read_bytes()),
              "box": box_of(shape.placed(height))} for shape, path in shapes]
    decoded = [x if isinstance(x, np.ndarray) else model.decode(x, resolution=STEP_CELLS) for _, x, _ in steps]
    boxes = [box_of(x.vertices) for x in decoded if not isinstance(x, np.ndarray) and len(x.faces)]
    steps = [picture_step(label, shape) if isinstance(shape, np.ndarray) else
             surface_step(label, shape, states, (boxes or [None])[-1])            # all in the place of the last one
             for (label, _, states), shape in zip(steps, decoded)]
    return {"name": name, "note": note, "files": files, "steps": steps}


def write_run(folder):
    """The page of a run of train.py: its losses, and the pictures of each stage over time."""
    pictures = {}
    if (folder / "losses.png").is_file():                     # drawn after the first picture of a run
        pictures["losses"] = [picture_step("training and held-out shapes", folder / "losses.png")]
    for path in sorted(folder.glob(f"*-{'[0-9]' * 6}.png")):
        stage, _, step = path.stem.rpartition("-")
        pictures.setdefault(stage, []).append(picture_step(f"step {int(step)}", path))
    samples = [{"name": name, "note": "", "files": [], "steps": steps} for name, steps in pictures.items()]
    write(folder / "index.html", folder.name, "", samples)


def write(path, title, note, samples):
    """samples: dictionaries of name, note, files (as of `entry`) and steps (picture_step or surface_step)."""
    bare = re.sub(r"\n\s+|\s+// .*", lambda found: found[0][:1].strip(" "), TEMPLATE.read_text())       # for its size
    content = json.dumps({"title": title, "note": note, "samples": samples}).replace("<", r"\u003c")
    with atomic_write(path) as temporary:
        temporary.write_text(bare.replace("DATA", content, 1).replace("TITLE", html.escape(title), 1))
