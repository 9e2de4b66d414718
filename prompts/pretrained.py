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

from geometry.training_samples import PICTURES
from engine.commands import Parser, UserError, command
from engine.files import written

LENGTH = 64    # most tokens of a prompt that are read


class Pretrained:
    """A frozen tower of a hub name or a folder; a subclass says what it reads."""

    def __init__(self, name, device="cpu"):
        os.environ["HF_HUB_OFFLINE"] = "1"                    # from the hub's cache or a folder, never over the network
        import transformers                                   # takes seconds, and few need it
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.name, self.device, self.kept = name, torch.device(device), {}
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

    def draw(self, split, rows, rng):
        """Condition tokens of one caption, or one picture, of each of some training shapes: b t e and their mask b t."""
        if split.name not in self.kept:
            self.kept[split.name] = self.keep(split)
        tokens, start, index = self.kept[split.name]
        which = [index[question] for question in self.choose(split, rows, rng)]
        each = [torch.from_numpy(tokens[start[i]:start[i + 1]]) for i in which]
        length = torch.tensor([len(one) for one in each])
        tokens = pad_sequence(each, batch_first=True)
        return tokens, torch.arange(tokens.shape[1]) < length[:, None]

    def read(self, drawn):
        tokens, mask = drawn
        return tokens.float(), mask

    def keep(self, split, batch=64):
        """All it can be asked about a prepared set -> the tokens of one answer after another, memory-mapped, where each starts, which is which."""
        questions = self.questions(split)
        name = hashlib.sha256(repr([self.name, self.model.config.to_dict()]).encode()).hexdigest()[:12]
        path, lengths = (split.folder / f"tower-{name}-{split.name}{end}" for end in (".half", "-lengths.npy"))
        if not lengths.is_file():                             # it is written last
            length = []
            with written(path) as part, part.open("wb") as file:
                for i in tqdm(range(0, len(questions), batch), desc=f"{Path(self.name).name} on {split.name}", unit="batch"):
                    tokens, mask = self.tokens(self.asked(split, questions[i:i + batch]))
                    file.write(tokens[mask].half().cpu().numpy().tobytes())
                    length += mask.sum(1).tolist()
            with written(lengths) as part:
                np.save(part, length)
        tokens = np.memmap(path, np.float16, "c").reshape(-1, self.width)
        return tokens, np.concatenate([[0], np.load(lengths).cumsum()]), {question: i for i, question in enumerate(questions)}


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

    def questions(self, split):
        return sorted({caption for captions in split.captions for caption in captions})

    def asked(self, split, captions):
        return captions

    def choose(self, split, rows, rng):
        return split.told(rows, rng)


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

    def questions(self, split):
        return range(len(split) * PICTURES)

    def asked(self, split, questions):
        which = np.array(questions)
        return split.pictures(which // PICTURES, np.random.default_rng(which[0]), which % PICTURES)

    def choose(self, split, rows, rng):
        return rows * PICTURES + rng.integers(PICTURES, size=len(rows))


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
