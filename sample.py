"""sample.py - a prompt becomes files: text, image -> condition -> prefix -> shape tokens -> shapes, pictures.

    python sample.py --text "table"
    python sample.py --text "a red chair with arms" --n 4 --turntable --out out
    python sample.py --text "table" --rep all                # the same table as surface, cloud, mesh and 3D Gaussians
    python sample.py --image assets/chair.png                # the object in the picture, from all sides

    from sample import load                                  # the same as a Python API
    shapes = load().generate("a round table", rep="sdf", n=4, seed=0)
    shapes[0].save("table.glb")
"""
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

import encoders
import heads
import reconstruct
from engine.commands import Parser, UserError, add_device_flags, between, command, pick_device
from engine.files import make_folder
from geometry.render import contact_sheet, save_gif, save_png, turntable
from models import MODELS, model_in
from prompts import picture_files
from prompts.reading import choose, find

RESOLUTIONS = (32, 64, 128, 256, 512)
# of all models; where their defaults differ, that of the first, LTM3D
OPTIONS = {option: value for model in reversed(MODELS.values()) for option, value in model.SAMPLING.items()}


class Sampler:
    """A checkpoint folder, opened: prompts -> shape tokens -> shapes."""

    def __init__(self, folder="checkpoints/tiny", device=None, precision=None, wanted=None, models=MODELS):
        self.folder = find(folder)
        if self.folder is None:
            raise UserError(f"there is no folder {folder}; "
                            "--checkpoint takes checkpoints/tiny, checkpoints/assets, or a folder that train.py made")
        self.device, self.autocast, self.reason = pick_device(device, precision)
        self.name = model_in(self.folder, wanted)
        module = models[self.name]
        self.model = module.load(self.folder, self.device, self.autocast)
        self.encoders = encoders.load(self.folder, module.LAST, self.device)

    def load_heads(self, *reps):
        """Loads the heads of these representations; a missing one is an error at once."""
        self.model.load_heads(*reps)
        return self

    @property
    def heads(self):
        return self.model.heads

    @torch.no_grad()
    def tokens(self, prompts, seeds, pictures=None, **options):
        """b prompts, pictures b 3 s s, or both, and one seed each -> shape tokens b n c. options: those of its
        SAMPLING; None stands for the default."""
        options = {option: value for option, value in options.items() if value is not None}
        if unknown := options.keys() - MODELS[self.name].SAMPLING.keys():
            flags = ", ".join(f"--{option.replace('_', '-')}" for option in sorted(unknown))
            raise UserError(f"{self.name}, the model in {self.folder}, has no {flags}; leave it out")
        with self.autocast():
            return self.model.generate(self.encoders.encode(prompts, pictures), seeds, **options)

    def sample(self, prompt=None, image=None, n=1, seed=0, **options):
        """n samples of one prompt, one picture (a file, or an image of Pillow), or both -> shape tokens b n c, b = n.
        options: as for `tokens`."""
        if prompt is None and image is None:
            raise UserError("there is no prompt; give a text, an image or both")
        if not isinstance(prompt, str | None):
            raise UserError(f"a prompt is one string, not a {type(prompt).__name__}; call it once for each")
        if n < 1:
            raise UserError(f"n must be at least 1, not {n}")
        prompts = None if prompt is None else [prompt] * n
        for remark in [] if prompt is None else self.encoders.remarks(prompt):
            print(f"warning: {remark}", file=sys.stderr)
        pictures = None
        if image is not None:
            picture, warning = picture_files.load_picture(image)                  # 3 s s
            pictures = picture.expand(n, -1, -1, -1)
            if warning:
                print(f"warning: {image}: {warning}", file=sys.stderr)
        return self.tokens(prompts, [(seed, i) for i in range(n)], pictures, **options)

    def decode(self, tokens, rep="sdf", seed=(0, 0), resolution=128, points=None, faces=None):
        """Shape tokens n c -> Mesh, Cloud or Gaussians (geometry/export.py), a function of the tokens and the seed."""
        if rep not in heads.HEADS:
            raise UserError(f"rep must be one of {', '.join(heads.HEADS)}, not '{rep}'")
        if resolution not in RESOLUTIONS:
            raise UserError(f"resolution must be one of {', '.join(map(str, RESOLUTIONS))}, not {resolution}")
        return self.model.decode(tokens, rep, np.random.default_rng(seed), resolution, points, faces)

    def generate(self, prompt=None, image=None, rep="sdf", n=1, seed=0, resolution=128, points=None, faces=None,
                 **options):
        """`sample`, then `decode`: a list of n shapes."""
        tokens = self.sample(prompt, image, n, seed, **options)
        return [self.decode(t, rep, (seed, i), resolution, points, faces) for i, t in enumerate(tokens)]


load = Sampler        # load() is what the Python API shows


# ---------------------------------------------------------------------------- the command

def arguments():
    parser = Parser(__doc__.split("\n")[0])
    flag, points = parser.add_argument, f"{heads.PointHead.COUNT}, {heads.GaussianHead.COUNT}"
    flag("--text", help="what to make, e.g. \"a round table\"")
    flag("--image", help="a picture of what to make (png, jpg, webp), alone or with --text")
    flag("--rep", nargs="+", type=heads.spelling, choices=[*heads.HEADS, "all"], default=["sdf"],
         help="representations, all of the same shape tokens: surface, point cloud, low-poly mesh, 3D Gaussians")
    flag("--n", type=between(1, 10_000), default=1, help="how many shapes")
    flag("--seed", type=between(0), default=0, help="another seed, another shape; shape i is the same for "
         "every --n, but for rounding, which depends on the machine and its threads, too")
    flag("--resolution", type=int, choices=RESOLUTIONS, default=128, help="cells along a side of the surface's grid")
    flag("--points", type=between(1, 1_000_000), help=f"how many points or Gaussians (default: {points})")
    flag("--faces", type=between(12, 100_000), help="how many faces a mesh has at most: the surface, simplified "
         "(default: the mesh head decides, up to 256)")
    flag("--turntable", action="store_true", help="also a GIF of each shape turning")
    flag("--model", choices=list(MODELS), help="the model that --checkpoint has to hold; alone: its shipped weights")
    flag("--checkpoint", help="folder of trained weights (default: the shipped ones that know the noun of --text)")
    add_device_flags(parser)
    flag("--out", default="out", help="folder to write to")

    known = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in OPTIONS.items() if value)
    flag = parser.add_argument_group("sampling", f"default: what the weights remember, else {known}").add_argument
    flag("--steps", type=between(1, 10_000), help="unmasking steps, at most the number of shape tokens")
    flag("--denoise-steps", type=between(1, 1000), help="denoising steps of a token (default: 4 flow, 100 ddpm)")
    flag("--cfg", type=between(0, 100, float), help="classifier-free guidance by the text; 1 is none "
         f"(lost: {MODELS['lost'].SAMPLING['cfg']})")
    flag("--cfg-image", type=between(0, 100, float), help="the same by the picture")
    flag("--temperature", type=between(0, 10, float), help="of the noise; lower gives less variety")
    flag("--registers", type=between(1), help="of lost: stop after so many (default: all)")
    flag("--top-k", type=between(1, 10 ** 6), help="of vat: draw among the k likeliest codes")
    flag("--top-p", type=between(1e-6, 1, float), help="of vat: draw among the likeliest codes that have this share")
    flag("--rgs", metavar="RULE",
         help="Reconstruction-Guided Sampling: what the backbone sees in the first steps. sampled=A, recon=A: a blend, "
              "A is the weight of the sampled tokens (alpha in the paper's figure) or of the reconstruction (alpha in "
              "its text); within=S: tokens within S standard deviations of the reconstruction; none; auto: sampled=.1 "
              "with a picture alone, else none")
    flag("--window", type=between(0, 1, float), help="the share of steps, from the first, that RGS steers")
    args = parser.parse_args()
    if args.text is None and not args.image:
        parser.error("say what to make, with --text or --image")
    if args.rgs:
        reconstruct.parse_rgs(args.rgs)
    args.rep = list(heads.HEADS) if "all" in args.rep else list(dict.fromkeys(args.rep))
    if args.points and not {"pc", "gs"} & {*args.rep}:
        parser.error("--points is the number of points or of Gaussians; give --rep pc or gs, too")
    if args.faces and "mesh" not in args.rep:
        parser.error("--faces is the number of faces of a low-poly mesh; give --rep mesh, too")
    return args


def file_name(text, image):
    """What the files of a prompt are called. A picture adds from-NAME, so that it is not written over."""
    name = (text or "") + (f" from {Path(image).stem}" if image else "")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60].strip("-") or "shape"


class Stopwatch:
    """Seconds of every phase: `lap(phase)` ends a phase."""

    def __init__(self):
        self.seconds, self.start = {}, time.perf_counter()

    def lap(self, phase):
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0) + now - self.start
        self.start = now


def write_shape(shape, path, turn):
    """The shape, a picture of it and perhaps a GIF; -> the picture."""
    picture = shape.picture()
    shape.save(path)
    save_png(path.with_suffix(".png"), picture)
    print(path, path.with_suffix(".png"), sep="\n")
    if turn:
        save_gif(path.with_suffix(".gif"), turntable(shape))
        print(path.with_suffix(".gif"))
    return picture


def main():
    args, watch = arguments(), Stopwatch()
    folder = args.checkpoint or (MODELS[args.model].SHIPPED if args.model else choose(args.text))
    model = load(folder, args.device, args.precision, args.model).load_heads(*args.rep)
    options = {option: getattr(args, option) for option in OPTIONS}
    print(f"{folder}, running on {model.reason}")
    watch.lap("load")

    tokens = model.sample(args.text, args.image, args.n, args.seed, **options)     # b n c
    watch.lap("tokens")

    out, name, pictures = make_folder(args.out), file_name(args.text, args.image), []
    ending = {rep: "" if args.rep == ["sdf"] else f"-{rep}" for rep in args.rep}
    for i, t in enumerate(tokens):                                                # n c
        for rep in args.rep:
            shape = model.decode(t, rep, (args.seed, i), args.resolution, args.points, args.faces)
            watch.lap(rep)
            pictures.append(write_shape(shape, out / f"{name}-{i}{ending[rep]}{shape.suffix}", args.turntable))
            watch.lap("pictures")
    if len(pictures) > 1:
        sheet = out / f"{name}{''.join(ending.values())}.png"
        save_png(sheet, contact_sheet(pictures, len(args.rep) if len(args.rep) > 1 else min(4, args.n)))
        print(sheet)
        watch.lap("pictures")
    print("seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in watch.seconds.items()))


if __name__ == "__main__":
    command(main)
