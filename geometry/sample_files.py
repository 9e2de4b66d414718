"""sample_files.py - what sample.py writes: each shape with its picture, a sheet of all pictures, turntables, a page.

    python sample.py --text "table" --n 4 --turntable --html
"""
import re
import time
from pathlib import Path

from engine.files import make_folder
from geometry import page
from geometry.render import contact_sheet, save_png
from geometry.turntable import save_gif, turntable


class Laps(dict):
    """Seconds of each phase."""

    def __init__(self):
        self.start = time.perf_counter()

    def end(self, phase):
        now = time.perf_counter()
        self[phase], self.start = self.get(phase, 0) + now - self.start, now


def file_name(text, image):
    """The base name of a prompt's files. A picture adds from-NAME, so that pictures do not overwrite each other."""
    name = (text or "")[:60] + (f" from {Path(image).stem}"[:60] if image else "")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "shape"


def write_samples(model, text, args, options, laps):
    """Samples one prompt, and writes all its files. args: the flags of sample.py; options: those of sampling."""
    tokens, seeds = model.best_samples(text, args.image, args.n, args.seed, args.best, **options)
    laps.end("tokens")

    kind = type(model).__name__
    name = file_name(text, args.image) + (f"-{kind.lower()}" if kind != "LTM3D" else "")
    out, pictures, entries = make_folder(args.out), [], []
    ending = {rep: "" if args.rep == ["sdf"] else f"-{rep}" for rep in args.rep}
    ending["mesh"] = f"-mesh-{args.faces}" if args.faces else ending.get("mesh")
    for i, x in enumerate(tokens):                                                # n c
        shapes = []                                           # for a page
        for rep in args.rep:
            shape = model.decode(x, rep, (args.seed, i), args.resolution, **args.counts[rep])
            laps.end(rep)
            path = out / f"{name}-{i}{ending[rep]}{shape.suffix}"
            pictures.append(write_shape(shape, path, args.height))
            shapes.append((shape, path))
            laps.end("pictures")
            if args.turntable:
                save_gif(path.with_suffix(".gif"), turntable(shape))
                print(path.with_suffix(".gif"))
                laps.end("turntable")
        if args.html:
            steps = model.steps(*model.prompted(text, args.image, seeds[i:i + 1])[0], **options)
            entries.append(page.entry(model, f"sample {i}", f"seed {args.seed}", shapes, steps, args.height))
            laps.end("page")
    if len(pictures) > 1:
        sheet = out / f"{name}{''.join(ending[rep] for rep in args.rep)}.png"
        save_png(sheet, contact_sheet(pictures, len(args.rep) if len(args.rep) > 1 else min(4, args.n)))
        print(sheet)
        laps.end("pictures")
    if args.html:
        used = {option: value for option, value in (model.OPTIONS | options).items() if value is not None}
        note = f"{kind}, {model.folder}: " + ", ".join(f"{option} {value}" for option, value in used.items())
        page.write(out / f"{name}.html", text or name, note, entries)
        print(out / f"{name}.html")
        laps.end("page")


def write_shape(shape, path, height):
    """Writes the shape (a mesh: of this height) and its picture; -> the picture."""
    picture = shape.picture()
    shape.save(path, height)
    save_png(path.with_suffix(".png"), picture)
    print(path, path.with_suffix(".png"), sep="\n")
    return picture
