"""test_pretrained.py - the tests of prompts/pretrained.py, on tiny random encoders of transformers.

    python -m pytest -q prompts -k transformers
"""
import json
import shutil

import pytest
import tokenizers
import torch
import transformers

import sample
from conftest import HERE, assert_one_line, run, train_small
from engine import files
from engine.commands import UserError
from prompts import pretrained

TINY = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=32)
PATCHES = dict(image_size=32, patch_size=8)
WORDS = ["[pad]", "[end]", "[unknown]", "a", "table", "chair", "red"]
IDS = dict(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, bos_token_id=1)
T5 = dict(d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2)
GPT2 = dict(n_embd=32, n_layer=2, n_head=2, vocab_size=len(WORDS), bos_token_id=1, eos_token_id=1)
FAMILIES = {  # family -> model class, its configuration
    "clip": ("CLIPModel", "CLIPConfig", dict(text_config=TINY | IDS, vision_config=TINY | PATCHES)),
    "clip text": ("CLIPTextModel", "CLIPTextConfig", TINY | IDS),
    "clip vision": ("CLIPVisionModel", "CLIPVisionConfig", TINY | PATCHES),
    "siglip": ("SiglipModel", "SiglipConfig", dict(text_config=TINY | IDS, vision_config=TINY | PATCHES)),
    "t5": ("T5EncoderModel", "T5Config", T5 | IDS),
    "bert": ("BertModel", "BertConfig", TINY | IDS),
    "gpt2": ("GPT2Model", "GPT2Config", GPT2),
    "dinov2": ("Dinov2Model", "Dinov2Config", TINY | PATCHES),
}


def pretrained_folder(folder, family):
    """A tiny random model of this family in a folder, with a tokenizer of a few words."""
    torch.manual_seed(0)
    model, config, settings = FAMILIES[family]
    getattr(transformers, model)(getattr(transformers, config)(**settings)).save_pretrained(folder)
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[unknown]")
    pieces = tokenizers.Tokenizer(words)
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict(eos_token="[end]", unk_token="[unknown]")
    if family != "gpt2":                                      # GPT-2 has no padding
        special["pad_token"] = "[pad]"
    transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, **special).save_pretrained(folder)
    colours = {"image_mean": [.5, .4, .3], "image_std": [.2, .2, .2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(colours))
    return folder


@pytest.mark.parametrize("family", ["clip", "clip text", "siglip", "t5", "bert", "gpt2"])
def test_text_encoders_of_transformers(family, tmp_path):
    """Every family loads from its config.json. Padding has no influence; the words have."""
    tower = pretrained.Text(str(pretrained_folder(tmp_path / "tower", family)))
    alone, _ = tower.tokens(["table"])
    both, mask = tower.tokens(["a red table", "table"])
    assert alone.shape[2] == tower.width == 32
    assert torch.allclose(alone[0, 0], both[1, 0], atol=1e-5)
    assert not torch.allclose(both[0, 0], both[1, 0], atol=1e-3) and mask[0, :3].all()
    assert mask[1].all() if family == "siglip" else mask[1].tolist() == [True, False, False]


@pytest.mark.parametrize("family", ["clip", "clip vision", "siglip", "dinov2"])
def test_image_encoders_of_transformers(family, tmp_path):
    """Every family; pictures of any size are resized and normalised as its files say."""
    tower = pretrained.Image(str(pretrained_folder(tmp_path / "tower", family)))
    tokens, mask = tower.tokens(torch.tensor([.5, .4, .3])[None, :, None, None].expand(2, 3, 64, 64))
    patches = tower.model(pixel_values=torch.zeros(1, 3, 32, 32)).last_hidden_state
    assert mask.all() and tokens.shape == (2, patches.shape[1], 32)
    assert torch.allclose(tokens[1], patches[0], atol=1e-4)


def test_encoders_of_transformers_end_to_end(overfitted, tmp_path, monkeypatch, capsys):
    """Backbone and reconstructor train on them, a cache keeps their tokens, and sample.py finds them again."""
    text, image = (str(pretrained_folder(tmp_path / family, family)) for family in ("t5", "dinov2"))
    folder, config = tmp_path / "run", files.read_config(overfitted)
    folder.mkdir()
    for name in ("encoders", "tokenizer", "head-sdf"):
        shutil.copy(overfitted / f"{name}.safetensors", folder)
    (folder / "config.json").write_text(json.dumps({stage: config[stage] for stage in ("encoders", "tokenizer")}))

    flags = "--cache", tmp_path / "cache", "--steps", 2, "--batch", 2, "--text-encoder", text, "--image-encoder", image
    assert train_small(monkeypatch, folder, 2, *flags) == 0
    capsys.readouterr()
    assert train_small(monkeypatch, folder, 2, *flags[:-2]) == 2
    assert_one_line(capsys.readouterr().err, "not with --image-encoder built-in")

    entry = files.read_config(folder)["backbone"]
    assert [entry["flags"][f"{kind}-encoder"] for kind in ("text", "image")] == [text, image]
    assert entry["settings"]["widths"] == {"text": 32, "image": 32}
    assert not (folder / "vision.safetensors").exists()
    assert len(list((tmp_path / "cache").glob("*/*/tower-*"))) == 4         # tokens and lengths, of texts and pictures

    flags = "--checkpoint", folder, "--resolution", 32, "--out", tmp_path / "out"
    assert run(sample.main, "--text", "a red table", "--image", HERE / "assets" / "chair.png", *flags) == 0
    assert "no training caption" not in capsys.readouterr().err
    assert run(sample.main, "--text", "a purple flibber", *flags) == 0
    assert "about this: unknown object 'flibber'; name one of" in capsys.readouterr().err


@pytest.mark.parametrize("kind, family, complaint", [
    ("text", None, "hf download"), ("image", None, "hf download"),
    ("text", "dinov2", "takes one of"), ("image", "bert", "takes one of")])
def test_bad_encoder_is_one_line(kind, family, complaint, tmp_path):
    """An encoder that is missing, or that reads the other kind of prompt, is one line."""
    name = str(pretrained_folder(tmp_path / "tower", family)) if family else "nobody/nothing"
    with pytest.raises(UserError, match=complaint):
        {"text": pretrained.Text, "image": pretrained.Image}[kind](name)
