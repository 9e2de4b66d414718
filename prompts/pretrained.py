"""prompts/pretrained.py - other people's encoders for prompts: any CLIP, SigLIP, T5, BERT, GPT-2 or DINOv2 of `transformers`.

LTM3D section 4 freezes CLIP and DINOv2. A tower from here is frozen too, in half precision on a GPU, and what it says
of all captions or pictures of a prepared set is computed once and kept beside it.

    hf download openai/clip-vit-base-patch32          # once; nothing here opens a connection
    python train.py --rep sdf --text-encoder openai/clip-vit-base-patch32 --image-encoder path/to/dinov2
    python prompts/pretrained.py --text-encoder path/to/t5    # is it there, and what does it give?
"""
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from engine.commands import Parser, UserError, command
from engine.files import atomic_write
from geometry.training_samples import PICTURES

LENGTH = 64    # most tokens of a prompt that are read


class Pretrained:
    """A frozen tower of a hub name or a folder; a subclass says what it reads."""

    def __init__(self, name, device="cpu"):
        os.environ["HF_HUB_OFFLINE"] = "1"                    # from the hub's cache or a folder, never over the network
        import transformers  # takes seconds, and few need it
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.name, self.device = name, torch.device(device)
        try:
            kind = transformers.AutoConfig.from_pretrained(name, local_files_only=True).model_type
            if kind not in self.FAMILIES:
                raise UserError(f"'{name}' is a {kind}; {self.flag} takes one of {', '.join(self.FAMILIES)}")
            half = torch.float16 if self.device.type == "cuda" else torch.float32
            self.model = getattr(transformers, self.FAMILIES[kind]).from_pretrained(name, local_files_only=True, dtype=half)
            self.prepare(transformers)
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            mend = (f"get it once with `hf download {name}`, or give {self.flag} a folder that has it" if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
                    and not Path(name).exists() else f"{self.flag} takes a hub name, or a folder with config.json and weights")
            raise UserError(f"'{name}' cannot be loaded ({' '.join(str(error).split())[:160]}); {mend}") from None
        self.model = self.model.to(self.device).eval().requires_grad_(False)
        self.width = self.model.config.hidden_size            # e


class Text(Pretrained):
    """Strings -> condition tokens, one a word piece."""
    flag = "--text-encoder"
    FAMILIES = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "siglip": "SiglipTextModel", "siglip_text_model": "SiglipTextModel",
                "t5": "T5EncoderModel", "bert": "BertModel", "gpt2": "GPT2Model"}

    def prepare(self, transformers):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.name, local_files_only=True)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token                  # GPT-2 has none

    @torch.no_grad()
    def tokens(self, prompts):                                # b strings -> b t e, b t
        if not all(prompt.strip() for prompt in prompts):
            raise UserError("the prompt is empty; say what to make")
        padded = "siglip" in self.model.config.model_type      # has learnt on texts filled up to one length, and reads the filling too
        most = min(LENGTH, getattr(self.model.config, "max_position_embeddings", LENGTH))
        words = self.tokenizer(prompts, padding="max_length" if padded else True, truncation=True, max_length=most, return_tensors="pt").to(self.device)
        mask = torch.ones_like(words.input_ids) if padded else words.attention_mask
        return self.model(input_ids=words.input_ids, attention_mask=mask).last_hidden_state.float(), mask.bool()


class Image(Pretrained):
    """Pictures -> condition tokens, one a patch."""
    flag = "--image-encoder"
    FAMILIES = {"clip": "CLIPVisionModel", "clip_vision_model": "CLIPVisionModel", "siglip": "SiglipVisionModel",
                "siglip_vision_model": "SiglipVisionModel", "dinov2": "Dinov2Model"}

    def prepare(self, transformers):
        file = transformers.utils.cached_file(self.name, "preprocessor_config.json", local_files_only=True)
        shown = json.loads(Path(file).read_text())
        self.mean, self.std = (torch.tensor(shown[key])[:, None, None] for key in ("image_mean", "image_std"))

    @torch.no_grad()
    def tokens(self, pictures):                               # b 3 s s in [0, 1] -> b t e, b t
        side = self.model.config.image_size
        x = F.interpolate(pictures.cpu(), size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        out = self.model(pixel_values=((x - self.mean) / self.std).to(self.device, self.model.dtype)).last_hidden_state.float()
        return out, torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)


# ---------------------------------------------------------------------------- tokens of a prepared set, computed once

class TokenCache:
    """The tokens of all captions or pictures of a prepared set, in a memory-mapped file beside it.

    keys: names of the inputs; inputs: a function from some keys to what `tower.tokens` takes.
    """

    def __init__(self, tower, split, keys, inputs, batch=64):
        name = hashlib.sha256(repr([tower.name, tower.model.config.to_dict()]).encode()).hexdigest()[:12]
        path, lengths = (split.folder / f"tower-{name}-{split.name}{end}" for end in (".half", "-lengths.npy"))
        if not lengths.is_file():                             # it is written last
            counts = []
            with atomic_write(path) as part, part.open("wb") as file:
                for i in tqdm(range(0, len(keys), batch), desc=f"{Path(tower.name).name} on {split.name}", unit="batch"):
                    tokens, mask = tower.tokens(inputs(keys[i:i + batch]))
                    file.write(tokens[mask].half().cpu().numpy().tobytes())
                    counts += mask.sum(1).tolist()
            with atomic_write(lengths) as part:
                np.save(part, counts)
        self.tokens = np.memmap(path, np.float16, "c").reshape(-1, tower.width)   # of one key after another
        self.start = np.concatenate([[0], np.load(lengths).cumsum()])
        self.row = {key: i for i, key in enumerate(keys)}

    def draw(self, keys):
        """-> tokens b t e in half precision, and their mask b t."""
        rows = [self.row[key] for key in keys]
        tokens = [torch.from_numpy(self.tokens[self.start[row]:self.start[row + 1]]) for row in rows]
        length = torch.tensor([len(x) for x in tokens])
        tokens = pad_sequence(tokens, batch_first=True)
        return tokens, torch.arange(tokens.shape[1]) < length[:, None]


def caption_cache(tower, split):
    return TokenCache(tower, split, sorted({caption for captions in split.captions for caption in captions}), list)


def picture_cache(tower, split):
    def inputs(keys):
        which = np.array(keys)
        return split.pictures(which // PICTURES, np.random.default_rng(which[0]), which % PICTURES)

    return TokenCache(tower, split, range(len(split) * PICTURES), inputs)


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--text-encoder", help="a hub name or a folder")
    parser.add_argument("--image-encoder", help="a hub name or a folder")
    args = parser.parse_args()
    for kind, name, example in ((Text, args.text_encoder, ["a round table"]), (Image, args.image_encoder, torch.rand(1, 3, 64, 64))):
        if name:
            tower = kind(name)
            tokens, _ = tower.tokens(example)
            print(f"{name}: {type(tower.model).__name__}, {sum(p.numel() for p in tower.model.parameters()):,} weights; "
                  f"{tokens.shape[1]} condition tokens of {tokens.shape[2]} numbers")


if __name__ == "__main__":
    command(main)
