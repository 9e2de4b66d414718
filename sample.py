"""sample.py - a prompt becomes files: text -> condition -> prefix -> shape tokens -> mesh, pictures.

    python sample.py --text "table"
    python sample.py --text "a red chair with arms" --n 4 --turntable --out out

    from sample import load                                  # the same as a Python API
    shapes = load().generate("a round table", rep="sdf", n=4, seed=0)
    shapes[0].save("table.glb")
"""
import argparse
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import backbone
import encoders
import reconstruct
import tokenizer
from export import write_glb
from layers import Help, UserError, claim, command, pick_device
from render import contact_sheet, render_mesh, save_gif, save_png, turntable

RESOLUTIONS = (32, 64, 128, 256, 512)


@dataclass
class Mesh:
    """One generated surface."""
    vertices: np.ndarray  # v 3
    faces: np.ndarray     # f 3, outward
    colours: np.ndarray   # v 3, in [0, 1]

    def save(self, path):
        write_glb(path, self.vertices, self.faces, self.colours)

    def picture(self, size=320):
        return render_mesh(self.vertices, self.faces, self.colours, size=size)


class LTM3D:
    """Every trained stage of a checkpoint folder."""

    def __init__(self, folder="checkpoints/tiny", device=None, rep="sdf"):
        if not Path(folder).is_dir() and (Path(__file__).parent / folder).is_dir():
            folder = Path(__file__).parent / folder    # called from elsewhere: the weights lie beside this file
        if not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder}; --checkpoint takes checkpoints/tiny or a folder that train.py made")
        self.device, self.autocast, self.reason = pick_device(device)
        stages = encoders.load(folder), backbone.load(folder), reconstruct.load(folder), tokenizer.load(folder, rep)[1]
        self.encoders, self.backbone, self.reconstruct, self.head = (stage.to(self.device) for stage in stages)

    @torch.no_grad()
    def tokens(self, prompts, seeds, alpha=None, **options):
        """prompts, one seed each -> shape tokens b n c. alpha None: sampling only, no RGS."""
        with self.autocast():
            condition, mask = self.encoders.encode(prompts)
            recon = None if alpha is None else self.reconstruct(condition, mask)
            return self.backbone.generate(condition, mask, seeds, recon=recon, alpha=alpha, **options).float()

    @torch.no_grad()
    def decode(self, tokens, resolution=128):
        """Shape tokens n c -> Mesh."""
        return Mesh(*tokenizer.extract(self.head, tokens, resolution, self.autocast))

    def generate(self, prompt, rep="sdf", n=1, seed=0, resolution=128, **options):
        """n shapes of one prompt; options as for `tokens`: steps, denoise_steps, cfg, temperature, alpha, window, convention."""
        if rep != "sdf":
            raise ValueError(f"rep must be 'sdf', not '{rep}'")
        return [self.decode(t, resolution) for t in self.tokens([prompt] * n, [(seed, i) for i in range(n)], **options)]


def load(folder="checkpoints/tiny", device=None):
    return LTM3D(folder, device)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help, allow_abbrev=False)
    parser.add_argument("--text", required=True, help="what to make, e.g. \"a round table\"")
    parser.add_argument("--rep", choices=["sdf"], default="sdf", help="the representation to make")
    parser.add_argument("--n", type=int, default=1, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another shape; sample i depends on (seed, i) alone")
    parser.add_argument("--steps", type=int, default=16, help="unmasking steps, at most the number of shape tokens")
    parser.add_argument("--denoise-steps", type=int, help="denoising steps of a token (default: 16 flow, 100 ddpm)")
    parser.add_argument("--cfg", type=float, default=2., help="classifier-free guidance; 1 is none")
    parser.add_argument("--temperature", type=float, default=1., help="of the noise; lower is tamer")
    parser.add_argument("--alpha", type=alpha, help="RGS: weight of the sampled tokens in the first steps, the paper's is .1; "
                                                      "'none' is sampling only")
    parser.add_argument("--window", type=float, default=.25, help="how long RGS lasts: a share of the steps below 1, else a number of steps")
    parser.add_argument("--convention", choices=["figure", "text"], default="figure",
                        help="alpha weighs the sampled tokens (figure) or the reconstruction (text)")
    parser.add_argument("--resolution", type=int, choices=RESOLUTIONS, default=128, help="cells along a side when the surface is extracted")
    parser.add_argument("--turntable", action="store_true", help="also a GIF of each shape turning")
    parser.add_argument("--checkpoint", default="checkpoints/tiny", help="folder of trained weights")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--out", default="out", help="folder to write to")
    args = parser.parse_args()
    for name, low, high in (("n", 1, 10_000), ("seed", 0, 2 ** 63 - 1), ("steps", 1, 10_000), ("denoise_steps", 1, 1000),
                            ("cfg", 0, 100), ("temperature", 0, 10), ("window", 0, 10_000)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} must be between {low} and {high}, not {value}")
    return args


def alpha(text):
    if text == "none":
        return None
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, or 'none', not {text}")
    return value


def main():
    args = arguments()
    phases, clock = {}, time.perf_counter()

    def lap(phase):
        nonlocal clock
        clock, before = time.perf_counter(), clock
        phases[phase] = phases.get(phase, 0) + clock - before

    name = re.sub(r"[^a-z0-9]+", "-", args.text.lower()).strip("-")[:60].strip("-") or "shape"
    model = load(args.checkpoint, args.device)
    if args.steps > model.backbone.tokens:
        raise UserError(f"--steps {args.steps} is more than the {model.backbone.tokens} shape tokens of {args.checkpoint}; "
                        "every step places at least one")
    print(f"running on {model.reason}")
    lap("load")
    tokens = model.tokens([args.text] * args.n, [(args.seed, i) for i in range(args.n)], alpha=args.alpha, steps=args.steps,
                          denoise_steps=args.denoise_steps, cfg=args.cfg, temperature=args.temperature,
                          window=args.window, convention=args.convention)
    lap("tokens")
    out = claim(args.out)
    pictures = []
    for i, t in enumerate(tokens):
        mesh = model.decode(t, args.resolution)
        lap("surface")
        mesh.save(out / f"{name}-{i}.glb")
        pictures.append(mesh.picture())
        save_png(out / f"{name}-{i}.png", pictures[-1])
        print(out / f"{name}-{i}.glb", out / f"{name}-{i}.png", sep="\n")
        if args.turntable:
            save_gif(out / f"{name}-{i}.gif", turntable(mesh.vertices, mesh.faces, mesh.colours))
            print(out / f"{name}-{i}.gif")
        lap("files")
    save_png(out / f"{name}.png", contact_sheet(pictures, min(4, args.n)))
    print(out / f"{name}.png")
    lap("files")
    print("seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in phases.items()))


if __name__ == "__main__":
    command(main)
