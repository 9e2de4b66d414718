"""sample.py - prompt -> files: text, image -> condition -> prefix -> shape tokens -> shapes, pictures.

    python sample.py --text "table"
    python sample.py --text "a red chair with arms" --n 4 --turntable --out out
    python sample.py --text "table" --rep all                # the same table as surface, cloud, mesh and 3D Gaussians
    python sample.py --image assets/chair.png                # the object in the picture, from all sides

    from sample import load                                  # the same as a Python API
    shapes = load().generate("a round table", rep="sdf", n=4, seed=0)
    shapes[0].save("out/table.glb")
"""
import os
import sys
from functools import partial
from importlib import import_module
from numbers import Integral, Real

if os.getloadavg()[0] > os.cpu_count() / 2:                   # on a busy machine, torch's threads yield to others
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from einops import rearrange

import backbone
import encoders
import heads
import reconstruct
from engine.commands import Parser, UserError, add_device_flags, between, cast_once, command, pick_device
from engine.files import read_config, read_stage
from engine.graphs import ReplayedSampling
from engine.noise import keys_of
from engine.stage import RELATIVES
from geometry.sample_files import Laps, write_samples
from prompts import picture_files
from prompts.reading import choose, find
from prompts.scores import prompt_scores
from prompts.text_files import guide, read_prompts
from representations import REPRESENTATIONS, accepting, spelling

RESOLUTIONS = (32, 64, 128, 256, 512)
MAX_INT = 2 ** 63 - 1
LIMITS = {  # option: type, minimum, maximum
    "n": (int, 1, 10_000), "best": (int, 1, 1000), "seed": (int, 0, MAX_INT),
    "points": (int, 1, 1_000_000), "faces": (int, 12, 10 ** 7), "height": (float, .001, 1000),
    "steps": (int, 1, 10_000), "denoise_steps": (int, 1, 1000), "rounds": (int, 0, 1000), "cool": (float, 0, 10),
    "cfg": (float, 0, 100), "cfg_image": (float, 0, 100), "temperature": (float, 0, 10), "window": (float, 0, 1),
    "registers": (int, 1, MAX_INT), "refine": (int, 0, 10_000), "top_k": (int, 1, 10 ** 6), "top_p": (float, 1e-6, 1)}
SAMPLING_FLAGS = ("steps", "denoise_steps", "rounds", "cfg", "cfg_image", "temperature", "cool", "rgs", "window",
                  "registers", "top_k", "top_p", "refine")


def check_numbers(**values):
    """Checks options of the Python API; the command's flags have the same limits."""
    for name, value in values.items():
        kind, least, most = LIMITS.get(name, (None, 0, 0))
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        if kind and (value is not None or name in ("n", "best", "seed")) and not (number and least <= value <= most):
            span = f"of at least {least}" if most == MAX_INT else f"from {least:g} to {most:,}"
            raise UserError(f"{name} is a {'whole ' * (kind is int)}number {span}, not {value!r}")


def check_shape(rep, resolution, **counts):
    """Checks arguments of `decode` and `generate`."""
    if not isinstance(rep, str) or rep not in REPRESENTATIONS:
        raise UserError(f"rep must be one of {', '.join(REPRESENTATIONS)}, not {rep!r}; call it once for each")
    if resolution not in RESOLUTIONS:
        raise UserError(f"resolution must be one of {', '.join(map(str, RESOLUTIONS))}, not {resolution}")
    check_numbers(**counts)
    for name in counts:
        if counts[name] and name not in REPRESENTATIONS[rep].options:
            raise UserError(f"{name} are of rep {' and '.join(accepting(name))}, not of {rep}")


# ---------------------------------------------------------------------------- the models of checkpoint folders

class Sampler:
    """Prompts -> shape tokens -> shapes. A model is a subclass: it adds LAST, its last stage; OPTIONS of sampling, with
    their defaults; `open`, which loads its generator; `shape_tokens`; and `steps`, for a page."""
    REPLAYED = True                                  # on a GPU, shape_tokens is captured as CUDA graphs

    def __init__(self, folder, device=None, precision=None, compile=True):
        self.folder, self.heads = folder, {}
        self.device, self.autocast, self.reason = pick_device(device, precision)
        self.encoders = encoders.load(folder, self.LAST, self.device)
        self.open()
        if self.device.type == "cuda" and self.REPLAYED and compile:
            self.shape_tokens = ReplayedSampling(self.shape_tokens)

    def load_heads(self, *reps):
        """Loads the heads of these representations and the heads that they need; a missing head is an error."""
        if not self.heads.keys() >= {*reps}:
            self.heads |= heads.load(self.folder, reps, self.device)
        return self

    @torch.no_grad()
    def tokens(self, prompts, seeds, pictures=None, watch=None, **options):
        """b prompts, pictures b 3 s s, or both, and a seed each -> shape tokens b n c. options: those of
        self.OPTIONS, or None. watch: of `steps`."""
        options = {option: value for option, value in options.items() if value is not None}
        if unknown := options.keys() - self.OPTIONS.keys():
            flags = ", ".join(f"--{option.replace('_', '-')}" for option in sorted(unknown))
            raise UserError(f"{type(self).__name__}, the model in {self.folder}, has no {flags}; leave it out")
        check_numbers(**options)
        options = self.OPTIONS | options
        options["cfg"] = {"text": options["cfg"], "image": options.pop("cfg_image")}
        generate = partial(type(self).shape_tokens, self, watch=watch) if watch else self.shape_tokens
        with self.autocast():
            return generate(self.encoders.encode(prompts, pictures), keys_of(seeds, self.device), **options)

    def sample(self, prompt=None, image=None, n=1, seed=0, best=1, **options):
        """n samples of one prompt, one picture (a file, or an image of Pillow), or both -> shape tokens b n c, b = n.
        best: each is the best of so many. options: as for `tokens`."""
        return self.best_samples(prompt, image, n, seed, best, **options)[0]

    def best_samples(self, prompt, image, n, seed, best, **options):
        """`sample`, and the seeds of these samples: b."""
        if prompt is None and image is None:
            raise UserError("there is no prompt; give a text, an image or both")
        if not isinstance(prompt, str | None):
            raise UserError(f"a prompt is one string, not a {type(prompt).__name__}; call it once for each")
        check_numbers(n=n, seed=seed, best=best)
        seeds = [(seed, i + 10_000 * j) for i in range(n) for j in range(best)]     # candidates: beyond any n
        prompted, warnings = self.prompted(prompt, image, seeds)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        tokens = self.tokens(*prompted, **options)
        if best > 1:
            scores = rearrange(prompt_scores(self, prompt, prompted[2], tokens), "(n best) -> n best", n=n)
            chosen = (scores.argmax(1) + best * torch.arange(n)).tolist()
            tokens, seeds = tokens[chosen], [seeds[i] for i in chosen]
        return tokens, seeds

    def prompted(self, prompt, image, seeds):
        """One prompt and a seed for each sample -> the arguments of `tokens`, warnings."""
        warnings, pictures = [] if prompt is None else self.encoders.remarks(prompt), None
        if image is not None and "image" not in self.encoders.towers:
            raise UserError(f"the {self.LAST} in {self.folder} learnt from texts alone; leave out the image, or "
                            "name a folder that was trained with --image-encoder")
        if image is not None:
            picture, warning = picture_files.load_picture(image)                  # 3 s s
            pictures = picture.expand(len(seeds), -1, -1, -1)
            warnings += [f"{image}: {warning}"] * bool(warning)
        return (None if prompt is None else [prompt] * len(seeds), seeds, pictures), warnings

    def decode(self, tokens, rep="sdf", seed=(0, 0), resolution=128, points=None, faces=None):
        """Shape tokens n c -> the shape of a representation (representations/), a function of the tokens and the seed.
        faces: at most, of "sdf" (default: 19,000), of "mesh" by simplifying the surface (default: the head's own)."""
        check_shape(rep, resolution, points=points, faces=faces)
        self.load_heads(rep)
        given, options = {"resolution": resolution, "points": points, "faces": faces}, REPRESENTATIONS[rep].options
        options = {name: given[name] or default for name, default in options.items()}
        rng = np.random.default_rng(seed)
        return self.heads[rep].decode(tokens.to(self.device), self.heads, rng, self.autocast, **options)

    def generate(self, prompt=None, image=None, rep="sdf", n=1, seed=0, resolution=128, points=None, faces=None,
                 **options):
        """`sample`, then `decode`: a list of n shapes."""
        check_shape(rep, resolution, points=points, faces=faces)
        tokens = self.sample(prompt, image, n, seed, **options)
        return [self.decode(x, rep, (seed, i), resolution, points, faces) for i, x in enumerate(tokens)]


class LTM3D(Sampler):
    LAST = "backbone"
    OPTIONS = {"steps": 10, "denoise_steps": None, "cfg": 2., "cfg_image": 2., "temperature": 1., "cool": 1.,
               "rounds": 1, "rgs": "auto", "window": .47}    # defaults; the "sampling" in config.json overrides them
    reconstructor = None                             # loaded at first use

    def open(self):
        stored = dict(read_stage(self.folder, "backbone").get("sampling", {}))
        if unknown := stored.keys() - self.OPTIONS.keys():
            raise UserError(f"{self.folder}/config.json: the backbone's sampling has no {', '.join(sorted(unknown))}, "
                            f"but {', '.join(self.OPTIONS)}")
        self.OPTIONS = self.OPTIONS | stored
        self.backbone = cast_once(backbone.load(self.folder).to(self.device), self.autocast)

    def shape_tokens(self, condition, keys, rgs, **options):
        """A condition (prefix.py) and one key per sample (engine/noise.py) -> shape tokens b n c."""
        tokens = []
        for own_condition, own_keys in backbone.cache_sized(self.backbone, condition, keys):
            rule = reconstruct.rule_of(self.reconstruct, own_condition, rgs)
            tokens.append(self.backbone.generate(own_condition, own_keys, rgs=rule, **options))
        return torch.cat(tokens).float()

    def steps(self, *prompted, **options):
        """One sample, anew: a label, its tokens n c, and their states, after each step, but not of rounds. States: "0"
        unknown, "1" known, "2" new."""
        found, n = [], self.backbone.tokens

        def watch(x, order, known, after):
            states = np.full(n, "0")
            states[order[0, :after].cpu()], states[order[0, known:after].cpu()] = "1", "2"
            if not found or "0" in found[-1][2]:              # else a round
                found.append((f"{after} of {n} tokens", x[0], "".join(states)))
        self.tokens(*prompted, watch=watch, **options)
        return found

    def reconstruct(self, condition):
        if self.reconstructor is None:
            self.reconstructor = cast_once(reconstruct.load(self.folder).to(self.device), self.autocast)
        return self.reconstructor(condition)


def model_in(folder, wanted=None):
    """The name of the model in a folder: that of its generator, else of any stage of a relative, else ltm3d.
    wanted: the model that the folder must hold."""
    stages = [*read_config(folder)]
    if wanted and not stages:
        raise UserError(f"nothing is trained in {folder}; --checkpoint takes a folder that train.py made")
    complete = ["ltm3d"] * ("backbone" in stages) + [name for name in RELATIVES if RELATIVES[name] in stages]
    started = [name for name in RELATIVES if any(stage.startswith(f"{name}-") for stage in stages)]
    found = [*complete, *started] or ["ltm3d"]
    if wanted and wanted not in found:
        raise UserError(f"{folder} holds {found[0]}, not {wanted}; give another --checkpoint")
    return wanted or found[0]


def load(folder="checkpoints/tiny", device=None, precision=None, model=None, compile=True):
    """Loads the model in a checkpoint folder, or in one of the Hugging Face hub: user/name. compile=False: on a GPU,
    sample without CUDA graphs."""
    if (found := find(folder) if folder else None) is None:
        from prompts.pretrained import download  # transformers: seldom needed
        found = download(str(folder))                         # an error if there is no such name
    name = model_in(found, model)
    model_class = LTM3D if name == "ltm3d" else import_module(f"relatives.{name}").Model
    return model_class(found, device, precision, compile)


# ---------------------------------------------------------------------------- the command

def arguments():
    parser = Parser(__doc__.split("\n")[0])
    flag = parser.add_argument

    def number(name, help, default=None):
        kind, least, most = LIMITS[name]
        flag(f"--{name.replace('_', '-')}", type=between(least, most, kind), default=default, help=help)

    flag("--text", help="what to generate, e.g. \"a round table\"")
    flag("--prompts", metavar="FILE", help="a file with a text on each line, instead of --text")
    flag("--image", help="a picture of it (png, jpg, webp), alone or with --text")
    about = "; ".join(f"{rep}: {head.about}" for rep, head in REPRESENTATIONS.items())
    flag("--rep", nargs="+", type=spelling, choices=[*REPRESENTATIONS, "all"], default=["sdf"],
         help=f"representations, all of the same shape tokens ({about})")
    number("n", "number of shapes", 1)
    number("best", "of so many candidates, the one with the highest prompt score", 1)
    number("seed", "random seed; shape i is the same for every --n, up to rounding", 0)
    flag("--resolution", type=int, choices=RESOLUTIONS, default=128, help="cells along a side of the surface's grid")
    counts = ", ".join(f"{rep} {REPRESENTATIONS[rep].options['points']}" for rep in accepting("points"))
    number("points", f"number of points or Gaussians (default: {counts})")
    number("faces", "at most this many faces of a surface (default: 19,000, less than 500 kB; 10,000,000 keeps all); "
           "with --rep mesh, of the surface as a low-poly mesh (default: the mesh head predicts up to 256 faces)")
    number("height", "height of a surface or mesh in its file, in metres (default: its longest side has one metre)")
    flag("--turntable", action="store_true", help="also write a turntable GIF of each shape")
    flag("--html", action="store_true", help="also write a page to turn the shapes in, with the steps of generation")
    flag("--model", choices=["ltm3d", *RELATIVES], help="which model (default of --checkpoint: its shipped weights)")
    flag("--checkpoint", help="folder of trained weights, or user/name of the Hugging Face hub (default: the shipped "
         "ones trained on the noun of --text; for a picture alone, checkpoints/assets)")
    add_device_flags(parser)
    flag("--no-compile", action="store_true", help="on a GPU: eager, without CUDA graphs")
    flag("--out", default="out", help="folder to write to")

    usual = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in LTM3D.OPTIONS.items() if value)
    flag = parser.add_argument_group("sampling", f"default: the checkpoint's own, else {usual}").add_argument
    number("steps", "unmasking steps, at most the number of shape tokens")
    number("denoise_steps", "denoising steps of a token (default: 4 flow, 100 ddpm)")
    number("rounds", "how often to resample all tokens, each given the others; more: parts agree better")
    number("cfg", "scale of classifier-free guidance by the text; 1: no guidance (default of lost: 1.5)")
    number("cfg_image", "scale of guidance by the picture")
    number("temperature", "temperature of the noise; lower: less diversity")
    number("cool", "factor of the temperature in rounds; lower: parts are more precise")
    number("registers", "lost: number of registers to generate (default: all)")
    number("top_k", "vat: sample among the k most likely codes")
    number("top_p", "vat: sample among the most likely codes whose probabilities add up to p")
    number("refine", "latte3d: steps of score distillation for this prompt alone")
    flag("--rgs", metavar="RULE", type=lambda text: reconstruct.parse_rgs(text) and text,
         help="Reconstruction-Guided Sampling: what the MAE encodes in the first steps. sampled=A, recon=A: a blend, A "
         "is the weight of the sampled tokens (alpha in the paper's figure) or of the reconstruction (in its text); "
         "within=S: tokens within S standard deviations of it; none; auto: sampled=.1 for a picture alone, else none")
    number("window", "RGS: its share of the steps, from the first")
    args = parser.parse_args()
    if None not in (args.text, args.prompts) or {args.text, args.prompts, args.image} == {None}:
        parser.error("give --text or --prompts, or --image, alone or with one of them")
    args.texts = [args.text]
    if args.prompts is not None:
        args.texts = read_prompts(args.prompts)
    if "" in (args.checkpoint, args.out):
        parser.error("--checkpoint and --out take a folder, not an empty name")
    args.rep = list(REPRESENTATIONS) if "all" in args.rep else list(dict.fromkeys(args.rep))
    counts = {name: accepting(name) for name in ("points", "faces")}
    for name, reps in (counts | {"height": counts["faces"]}).items():
        if getattr(args, name) and not {*reps} & {*args.rep}:
            parser.error(f"--{name} is an option of other representations; give --rep {' or '.join(reps)}, too")
    args.counts = {rep: {name: getattr(args, name) for name, reps in counts.items() if rep in reps} for rep in args.rep}
    if {"sdf", "mesh"} <= {*args.rep}:                        # --faces are those of the mesh
        del args.counts["sdf"]["faces"]
    return args


def main():
    if len(sys.argv) == 1:
        return print(guide())
    args = arguments()
    laps = Laps()
    if args.image is not None:                                # an unreadable picture is an error before loading
        picture_files.load_picture(args.image)
    own = args.checkpoint or (f"checkpoints/{args.model}" if args.model in RELATIVES else None)
    folders, models = [own or choose(text) for text in args.texts], {}
    for folder in dict.fromkeys(folders):
        model = load(folder, args.device, args.precision, args.model, not args.no_compile)
        models[folder] = model.load_heads(*args.rep)
        print(f"{folder}, running on {models[folder].reason}")
    for text, folder in zip(args.texts, folders):             # an unknown noun is an error before anything is written
        if text is not None:
            models[folder].encoders.remarks(text)
    laps.end("load")

    options = {option: value for option in SAMPLING_FLAGS if (value := getattr(args, option)) is not None}
    for text, folder in zip(args.texts, folders):
        write_samples(models[folder], text, args, options, laps)
    print("seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in laps.items()))


if __name__ == "__main__":
    command(main)
