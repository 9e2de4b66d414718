"""sample.py - a prompt becomes files: text, image -> condition -> prefix -> shape tokens -> shapes, pictures.

    python sample.py --text "table"
    python sample.py --text "a red chair with arms" --n 4 --turntable --out out
    python sample.py --text "table" --rep all                # the same table as surface, cloud, mesh and 3D Gaussians
    python sample.py --image chair.png                       # what is in the picture, seen from all sides

    from sample import load                                  # the same as a Python API
    shapes = load().generate("a round table", rep="sdf", n=4, seed=0)
    shapes[0].save("table.glb")
"""
import argparse
import functools
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

import backbone
import heads
from prompts import picture_files
import reconstruct
import encoders
from engine.commands import Parser, UserError, between, cast_once, command, pick_device
from engine.files import claim
from geometry.render import contact_sheet, save_gif, save_png, turntable

RESOLUTIONS = (32, 64, 128, 256, 512)


class LTM3D:
    """Every trained stage of a checkpoint folder."""

    def __init__(self, folder="checkpoints/tiny", device=None):
        if not Path(folder).is_dir() and (Path(__file__).parent / folder).is_dir():
            folder = Path(__file__).parent / folder    # called from elsewhere: the weights lie beside this file
        if not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder}; --checkpoint takes checkpoints/tiny or a folder that train.py made")
        self.device, self.autocast, self.reason = pick_device(device)
        self.backbone = cast_once(backbone.load(folder).to(self.device), self.autocast)
        self.towers = encoders.load(folder, self.device)
        self.folder, self.heads = folder, {}

    @functools.cached_property
    def reconstruct(self):
        """Which only RGS needs."""
        return cast_once(reconstruct.load(self.folder).to(self.device), self.autocast)

    def ready(self, *reps):
        """Loads the heads that decode these, once; -> self."""
        if not self.heads.keys() >= set(reps):
            self.heads |= heads.load(self.folder, reps, self.device)
        return self

    @torch.no_grad()
    def tokens(self, prompts, seeds, pictures=None, alpha="auto", convention="figure", within=None, **options):
        """prompts (a list), pictures b 3 s s (prompts/picture_files.py) or both, one seed each -> shape tokens b n c. RGS (reconstruct.py): alpha None is
        none, auto blends for pictures, which say nearly all there is to know about a shape; within is the other rule, in its place."""
        if not (alpha in ("auto", None) or not isinstance(alpha, str) and 0 <= alpha <= 1):
            raise ValueError(f"alpha must be a number from 0 to 1, None or 'auto', not {alpha!r}")
        if alpha == "auto":
            alpha = None if pictures is None or not isinstance(self.backbone, backbone.Backbone) else .1
        with self.autocast():
            condition, steer = self.towers.encode(prompts, pictures), None
            if within is not None:
                recon, doubt = self.reconstruct(condition)
                steer = functools.partial(reconstruct.within, recon=recon, doubt=doubt, reach=within)
            elif alpha is not None:
                steer = functools.partial(reconstruct.blend, recon=self.reconstruct(condition)[0], alpha=alpha, convention=convention)
            return self.backbone.generate(condition, seeds, steer=steer, **options).float()

    def decode(self, tokens, rep="sdf", seed=(0, 0), resolution=128, points=None):
        """Shape tokens n c -> Mesh, Cloud or Gaussians (geometry/export.py), a function of the tokens and the seed."""
        if resolution not in RESOLUTIONS:
            raise ValueError(f"resolution must be one of {', '.join(map(str, RESOLUTIONS))}, not {resolution}")
        head, rng = self.ready(rep).heads[rep], np.random.default_rng(seed)
        return head.decode(tokens, self.heads, rng, self.autocast, resolution, points or head.COUNT)

    def generate(self, prompt=None, image=None, rep="sdf", n=1, seed=0, resolution=128, points=None, **options):
        """n shapes of one prompt, a picture file or both; options as for `tokens`: steps, denoise_steps, cfg, temperature, alpha,
        window, convention, within."""
        if rep not in heads.HEADS:
            raise ValueError(f"rep must be one of {', '.join(heads.HEADS)}, not '{rep}'")
        seeds = [(seed, i) for i in range(n)]
        if prompt is None and image is None:
            raise ValueError("say what to make: a prompt, an image or both")
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        prompts = None if prompt is None else [prompt] * n
        pictures = None if image is None else seen(image, n)
        return [self.decode(t, rep, s, resolution, points) for t, s in zip(self.tokens(prompts, seeds, pictures, **options), seeds)]


def load(folder="checkpoints/tiny", device=None):
    return LTM3D(folder, device)


def seen(path, n):
    """A picture file, as the tower sees it, n times: n 3 s s; says what had to be guessed."""
    picture, guess = picture_files.seen(path)
    if guess:
        print(f"warning: {path}: {guess}", file=sys.stderr)
    return picture.expand(n, -1, -1, -1)


def arguments():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--text", help="what to make, e.g. \"a round table\"")
    parser.add_argument("--image", help="a picture of what to make (png, jpg, webp), alone or with --text")
    parser.add_argument("--rep", nargs="+", type=heads.spelling, choices=[*heads.HEADS, "all"], default=["sdf"],
                        help="representations to make, of the same shape tokens: surface, point cloud, low-poly mesh, 3D Gaussians")
    parser.add_argument("--n", type=between(1, 10_000), default=1, help="how many")
    parser.add_argument("--seed", type=between(0), default=0, help="another seed, another shape; sample i depends on (seed, i) alone")
    parser.add_argument("--steps", type=between(1, 10_000), default=10, help="unmasking steps, at most the number of shape tokens")
    parser.add_argument("--denoise-steps", type=between(1, 1000), help="denoising steps of a token (default: 4 flow, 100 ddpm)")
    parser.add_argument("--cfg", type=between(0, 100, float), default=2., help="classifier-free guidance by the text; 1 is none")
    parser.add_argument("--cfg-image", type=between(0, 100, float), default=2., help="the same by the picture")
    parser.add_argument("--temperature", type=between(0, 10, float), default=1., help="of the noise; lower is tamer")
    parser.add_argument("--alpha", type=alpha, default="auto", help="RGS: weight of the sampled tokens in the first steps; 'none' is sampling "
                                                                    "only (default: the paper's .1 with a picture, none without)")
    parser.add_argument("--window", type=between(0, 10_000, float), default=.75, help="how long RGS lasts: a share of the steps below 1, else a number of steps")
    parser.add_argument("--convention", choices=["figure", "text"], default="figure",
                        help="alpha weighs the sampled tokens (figure) or the reconstruction (text)")
    parser.add_argument("--within", type=between(0, 100, float), help="RGS by another rule, in alpha's place: in the first steps, tokens may be so many "
                        "standard deviations from the reconstruction (1.5 keeps nearly all variety)")
    parser.add_argument("--resolution", type=int, choices=RESOLUTIONS, default=128, help="cells along a side when the surface is extracted")
    parser.add_argument("--points", type=between(1, 1_000_000), help=f"of a point cloud or of Gaussians (default: {heads.PointHead.COUNT}, "
                                                       f"{heads.GaussianHead.COUNT})")
    parser.add_argument("--turntable", action="store_true", help="also a GIF of each shape turning")
    parser.add_argument("--checkpoint", default="checkpoints/tiny", help="folder of trained weights")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--out", default="out", help="folder to write to")
    args = parser.parse_args()
    if args.text is None and not args.image:
        parser.error("say what to make, with --text or --image")
    args.rep = list(heads.HEADS) if "all" in args.rep else list(dict.fromkeys(args.rep))
    return args


def alpha(text):
    if text in ("auto", "none"):
        return text if text == "auto" else None
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, 'none' or 'auto', not {text}")
    return value


def main():
    args = arguments()
    phases, clock = {}, time.perf_counter()

    def lap(phase):
        nonlocal clock
        clock, before = time.perf_counter(), clock
        phases[phase] = phases.get(phase, 0) + clock - before

    asked = f"from {Path(args.image).stem}" if args.text is None else args.text        # else a picture in --out would be written over
    name = re.sub(r"[^a-z0-9]+", "-", asked.lower()).strip("-")[:60].strip("-") or "shape"
    picture = seen(args.image, args.n) if args.image else None
    model = load(args.checkpoint, args.device).ready(*args.rep)
    if args.steps > model.backbone.tokens:
        raise UserError(f"--steps {args.steps} is more than the {model.backbone.tokens} shape tokens of {args.checkpoint}; "
                        "every step places at least one")
    print(f"running on {model.reason}")
    lap("load")
    prompts = None if args.text is None else [args.text] * args.n
    tokens = model.tokens(prompts, [(args.seed, i) for i in range(args.n)], picture, args.alpha, steps=args.steps,
                          denoise_steps=args.denoise_steps, cfg={"text": args.cfg, "image": args.cfg_image}, temperature=args.temperature,
                          window=args.window, convention=args.convention, within=args.within)
    lap("tokens")
    out, pictures = claim(args.out), []
    for i, t in enumerate(tokens):
        for rep in args.rep:
            shape = model.decode(t, rep, (args.seed, i), args.resolution, args.points)
            lap(rep)
            path = out / f"{name}-{i}{f'-{rep}' if len(args.rep) > 1 else ''}{shape.suffix}"
            shape.save(path)
            pictures.append(shape.picture())
            save_png(path.with_suffix(".png"), pictures[-1])
            print(path, path.with_suffix(".png"), sep="\n")
            if args.turntable:
                save_gif(path.with_suffix(".gif"), turntable(shape))
                print(path.with_suffix(".gif"))
            lap("files")
    sheet = out / f"{name}.png"
    save_png(sheet, contact_sheet(pictures, len(args.rep) if len(args.rep) > 1 else min(4, args.n)))
    print(sheet)
    lap("files")
    print("seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in phases.items()))


if __name__ == "__main__":
    command(main)
