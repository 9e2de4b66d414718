"""pretrained.py - encoders from the hub for prompts: any CLIP, SigLIP, T5, BERT, GPT-2 or DINOv2 of `transformers`.

LTM3D section 4 freezes CLIP and DINOv2. These towers are frozen too; their tokens of a prepared set are computed once.

    hf download openai/clip-vit-base-patch32                     # once; towers are never downloaded
    python train.py --rep sdf --text-encoder openai/clip-vit-base-patch32 --image-encoder path/to/dinov2
"""
import hashlib
import json
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from engine.commands import UserError, fits
from engine.files import atomic_write
from geometry import crop, training_pictures

LENGTH = 64    # word pieces of a prompt that are read


def download(name):
    """A checkpoint of the Hugging Face hub, from its cache or over the network -> its folder."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("runs/") or Path(name).parent.is_dir():
        raise UserError(f"there is no folder '{name}'; --checkpoint takes checkpoints/tiny, checkpoints/assets, "
                        "a folder that train.py made, or a name of the Hugging Face hub")
    try:
        from huggingface_hub import snapshot_download
        found = partial(snapshot_download, name, allow_patterns=["config.json", "*.safetensors"])
        try:
            return Path(found(local_files_only=True))
        except OSError:
            return Path(found())
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"there is no folder '{name}', nor can it be had from the Hugging Face hub "
                        f"({' '.join(str(error).split())[:160]})") from None


class Pretrained:
    """A frozen tower, by hub name or folder. A subclass has the classes of its model types."""

    def __init__(self, name, device="cpu"):
        os.environ["HF_HUB_OFFLINE"] = "1"                    # from the hub's cache or a folder, never over the network
        try:
            import transformers  # takes seconds
        except ImportError:
            raise UserError(f"{self.flag} needs the package transformers; pip install transformers") from None
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.name, self.device = name, torch.device(device)
        try:
            family = transformers.AutoConfig.from_pretrained(name, local_files_only=True).model_type
            if family not in self.FAMILIES:
                raise UserError(f"'{name}' is a {family}; {self.flag} takes one of {', '.join(self.FAMILIES)}")
            dtype = torch.float16 if self.device.type == "cuda" else torch.float32
            tower = getattr(transformers, self.FAMILIES[family])
            self.model = tower.from_pretrained(name, local_files_only=True, dtype=dtype)
            self.prepare(transformers)
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            advice = f"{self.flag} takes a hub name, or a folder with config.json and weights"
            if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists():
                advice = f"get it once with `hf download {name}`, or give {self.flag} a folder that has it"
            raise UserError(f"'{name}' cannot be loaded ({' '.join(str(error).split())[:160]}); {advice}") from None
        self.model = self.model.to(self.device).eval().requires_grad_(False)
        self.width = self.model.config.hidden_size            # e


class Text(Pretrained):
    """Strings -> condition tokens, one for each word piece."""
    flag = "--text-encoder"
    FAMILIES = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "bert": "BertModel", "gpt2": "GPT2Model",
                "siglip": "SiglipTextModel", "siglip_text_model": "SiglipTextModel", "t5": "T5EncoderModel"}

    def prepare(self, transformers):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.name, local_files_only=True)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token           # GPT-2 has none

    @torch.no_grad()
    def tokens(self, prompts):                                # b strings -> b t e, b t
        if not all(prompt.strip() for prompt in prompts):
            raise UserError("the prompt is empty; say what to make")
        siglip = "siglip" in self.model.config.model_type     # trained on texts of one length: it reads padding
        length = min(LENGTH, getattr(self.model.config, "max_position_embeddings", LENGTH))
        pieces = self.tokenizer(prompts, padding="max_length" if siglip else True, truncation=True, max_length=length,
                                return_tensors="pt").to(self.device)
        mask = torch.ones_like(pieces.input_ids) if siglip else pieces.attention_mask             # b t
        return self.model(input_ids=pieces.input_ids, attention_mask=mask).last_hidden_state.float(), mask.bool()

    def cache(self, split):
        """The tokens of all captions of a prepared set."""
        return TokenCache(self, split, "records", split.table.texts, list)


class Image(Pretrained):
    """Pictures -> condition tokens, one for each patch."""
    flag = "--image-encoder"
    FAMILIES = {"clip": "CLIPVisionModel", "clip_vision_model": "CLIPVisionModel", "siglip": "SiglipVisionModel",
                "siglip_vision_model": "SiglipVisionModel", "dinov2": "Dinov2Model"}

    def prepare(self, transformers):
        file = transformers.utils.cached_file(self.name, "preprocessor_config.json", local_files_only=True)
        colours = json.loads(Path(file).read_text())
        self.mean, self.std = (torch.tensor(colours[key]).reshape(3, 1, 1) for key in ("image_mean", "image_std"))

    @torch.no_grad()
    def tokens(self, pictures):                               # b 3 s s in [0, 1] -> b t e, b t
        side = self.model.config.image_size
        x = F.interpolate(pictures.cpu(), size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        x = ((x - self.mean) / self.std).to(self.device, self.model.dtype)        # b 3 side side
        tokens = self.model(pixel_values=x).last_hidden_state.float()             # b t e
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

    def cache(self, split):
        """The tokens of all pictures of a prepared set; the number of picture i of a row is row * pictures + i."""
        count = split.source.pictures                         # of each shape

        def inputs(keys):
            keys, rng = torch.tensor(keys, device=split.device), torch.Generator(split.device).manual_seed(keys[0])
            return split.pictures(keys // count, rng, keys % count)

        return TokenCache(self, split, "pictures", range(split.drawable() * count), inputs)


# ---------------------------------------------------------------------------- tokens of a prepared set, computed once

class TokenCache:
    """The tokens of all captions or pictures of a prepared set, in a memory-mapped file beside it, or on a GPU. keys:
    one for each caption or picture; inputs: a function from keys to the input of `tower.tokens`."""

    def __init__(self, tower, split, kind, keys, inputs, batch=64):
        made_by = [Path(module.__file__).read_text() for module in (crop, training_pictures)]    # names the tokens
        name = hashlib.sha256(repr([tower.name, tower.model.config.to_dict(), made_by]).encode()).hexdigest()[:12]
        path, lengths = (split.folders[kind] / f"tower-{name}-{split.name}{end}" for end in (".half", "-lengths.npy"))
        if not lengths.is_file():                             # this file is written last
            counts = []
            with atomic_write(path) as part, part.open("wb") as file:
                for i in tqdm(range(0, len(keys), batch), f"{Path(tower.name).name} on {split.name}", unit="batch"):
                    tokens, mask = tower.tokens(inputs(keys[i:i + batch]))
                    file.write(tokens[mask].half().cpu().numpy().tobytes())
                    counts += mask.sum(1).tolist()
            with atomic_write(lengths) as part:
                np.save(part, counts)
        tokens = torch.from_numpy(np.memmap(path, np.float16, "c").reshape(-1, tower.width))      # of keys in turn
        self.resident = fits(tokens.nbytes, split.device)
        self.tokens = tokens.to(split.device) if self.resident else tokens
        self.length = torch.from_numpy(np.load(lengths)).to(split.device)
        self.start, self.longest = self.length.cumsum(0) - self.length, int(self.length.max())

    def take(self, numbers):
        """Numbers of keys, b -> tokens b t e in half precision, and their mask b t."""
        place = torch.arange(self.longest, device=numbers.device)
        mask = place < self.length[numbers][:, None]                              # b t
        rows = torch.where(mask, self.start[numbers][:, None] + place, 0)         # b t
        return self.tokens[rows.to(self.tokens.device)].to(rows.device), mask
