"""test_prompts.py - the tests of prompts/."""
import json
import re
import shutil

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from einops import rearrange
from PIL import Image

import sample
from conftest import SMALL, assert_one_line, run, train_small
from engine import files
from engine.commands import UserError
from geometry import render, training_pictures
from prompts import picture_files, pretrained, text_tower

# ---------------------------------------------------------------------------- encoders

def small_text_tower():
    torch.manual_seed(0)
    return text_tower.Encoders(["chair", "red", "round", "table", "with"], **SMALL[text_tower]).eval()


def test_text_padding_has_no_influence():
    """A prompt alone = the same prompt padded in a batch with a longer one."""
    tower = small_text_tower()
    (alone, _), (both, mask) = tower.tokens(["Table"]), tower.tokens(["a red round table", "the table"])
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    assert torch.allclose(alone[0, 0], both[1, 0], atol=1e-5) and not torch.allclose(alone[0, 0], both[0, 0], atol=.1)


def test_unknown_words_are_named(capsys):
    """A misspelt word is left out, with a warning that names it and its neighbours; nothing left is an error."""
    tower = small_text_tower()
    assert torch.equal(tower.tokens(["red tabel chair"])[0], tower.tokens(["red chair"])[0])
    assert re.search("'tabel'.*nearest: table", capsys.readouterr().err)
    for prompt, complaint in (("tabel", "names nothing"), ("with", "names nothing"), ("  ", "is empty"), ("!?", "is empty")):
        with pytest.raises(UserError, match=complaint):
            tower.tokens([prompt])


# ---------------------------------------------------------------------------- images

def disc(size=96, paper=(1., 1., 1.), radius=.3):
    """A brown disc off the middle -> colour and coverage, size size 4, premultiplied by nothing."""
    y, x = np.mgrid[:size, :size] / size - .45
    inside = (x ** 2 + y ** 2 < radius ** 2)[..., None]
    return np.concatenate([np.where(inside, (.6, .4, .2), paper), inside], -1)


def saved(path, mode, **options):
    """The disc in a file of that mode; transparent around it where the mode knows how, else white."""
    picture = Image.fromarray((disc() * 255).round().astype(np.uint8))
    {"RGB": lambda: picture.convert("RGB"), "RGBA": lambda: picture, "LA": lambda: picture.convert("LA"), "L": lambda: picture.convert("L"),
     "CMYK": lambda: picture.convert("RGB").convert("CMYK"), "P": lambda: picture.convert("RGB").convert("P"),
     "I;16": lambda: Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)}[mode]().save(path, **options)
    return path


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("RGB", "webp"), ("RGBA", "png"), ("LA", "png"), ("L", "png"), ("CMYK", "jpg"),
                                          ("P", "png"), ("I;16", "png"), ("RGB", "jpg")])
def test_pictures_of_all_kinds_are_seen_alike(mode, suffix, tmp_path):
    """The same disc, cut out and framed, whichever way it was written; grey where colours were not kept."""
    seen, guess = picture_files.seen(saved(tmp_path / f"disc.{suffix}", mode))
    true = torch.from_numpy(training_pictures.framed(disc()))
    true = rearrange(true[..., :3] + 1 - true[..., 3:], "h w c -> c h w")
    if mode in ("L", "LA", "I;16"):
        true, seen = true.mean(0), seen.mean(0)
    assert guess is None and (seen - true).abs().mean() < .05
    assert abs((seen < .9).any(0).float().mean() - .88 ** 2 * np.pi / 4) < .05 or mode in ("L", "LA", "I;16")


def test_soft_shadow_and_gradient_are_background(tmp_path):
    """A paper that grows darker downwards, with a soft shadow on it, is cut away; a noisy one is said not to be plain."""
    picture, y = disc()[..., :3], np.linspace(0, 1, 96)[:, None, None]
    shadow = 1 - .4 * np.exp(-((np.mgrid[:96, :96][0] - 75) ** 2 + (np.mgrid[:96, :96][1] - 50) ** 2) / 300)[..., None]
    inside = disc()[..., 3:] > 0
    papered = np.where(inside, picture, .95 * shadow * (1 - .1 * y))
    assert (picture_files.cut_out(papered.astype(np.float32)) == inside[..., 0]).mean() > .96
    noisy = np.where(inside, picture, np.random.default_rng(0).random((96, 96, 3)))
    render.save_png(tmp_path / "noisy.png", (noisy * 255).astype(np.uint8))
    assert "no plain background" in picture_files.seen(tmp_path / "noisy.png")[1]


@pytest.mark.parametrize("name, content, complaint", [
    ("text.png", b"not a picture", "cannot be read as a picture"), ("cut.png", -60, "cannot be read as a picture"), ("none.png", None, "no picture"),
    ("dot.png", (1, 1), "1 x 1 pixels"), ("huge.png", (30_000, 9000), "30000 x 9000 pixels"), ("clear.png", "RGBA", "transparent all over"),
    ("white.png", "1", "nothing but its background")])
def test_bad_picture_is_one_line(overfitted, name, content, complaint, tmp_path, capsys):
    """No picture, a truncated one, none at all, one pixel, a decompression bomb, an invisible one, an empty one."""
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, tuple):
        Image.new("1", content).save(path)
    elif isinstance(content, str):
        Image.new(content, (64, 64)).save(path)
    elif content:
        path.write_bytes(saved(path, "RGB").read_bytes()[:content])
    assert run(sample.main, "--image", path, "--checkpoint", overfitted, "--out", tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, complaint)
    assert not (tmp_path / "out").exists()


def test_picture_prompt_is_command_and_api(overfitted, tmp_path, capsys):
    """sample.py --image = generate(image=...), alone and with a text; neither of the two is an error."""
    path = saved(tmp_path / "Disc 1.png", "RGBA")
    flags = ("--checkpoint", overfitted, "--resolution", 32, "--image", path)
    for out, more, options in (("one", [], {}), ("two", ["--text", "a table"], {"prompt": "a table"})):
        assert run(sample.main, *flags, *more, "--out", tmp_path / out) == 0
        shape = sample.load(overfitted).generate(image=path, resolution=32, **options)[0]
        shape.save(tmp_path / "api.glb")
        assert (tmp_path / "api.glb").read_bytes() == (tmp_path / out / ("a-table-0.glb" if more else "from-disc-1-0.glb")).read_bytes()
    model, seen = sample.load(overfitted), picture_files.seen(path)[0][None]
    plain, guided, auto = (model.tokens(None, [0], seen, **options) for options in ({"alpha": None}, {"alpha": .1}, {}))
    assert torch.equal(auto, guided) and not torch.equal(auto, plain)           # a picture is sampled with RGS
    capsys.readouterr()
    assert run(sample.main, *flags[:-2]) == 2
    assert_one_line(capsys.readouterr().err, "--text or --image")


def test_light_changes_pictures_not_shapes(prepared):
    """Drawn twice, a picture has another light, background and crop; without variation it is the same, on white."""
    split, rows = prepared[0], np.arange(4)
    plain = [split.pictures(rows, np.random.default_rng(0), vary=False) for _ in range(2)]
    assert torch.equal(*plain) and plain[0].shape == (4, 3, picture_files.SIZE, picture_files.SIZE) and (plain[0][:, :, 0, 0] > .99).all()
    varied = split.pictures(rows, np.random.default_rng(0))
    assert .02 < (varied - plain[0]).abs().mean() < .4


# ---------------------------------------------------------------------------- encoders of others

TINY = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=32)
SIGHT = dict(image_size=32, patch_size=8)
WORDS = ["[pad]", "[end]", "[unknown]", "a", "table", "chair", "red"]


def pretrained_folder(folder, family):
    """A tiny random model of that family in a folder, with a tokenizer of a few words and the numbers that pictures are normalised with."""
    torch.manual_seed(0)
    vocabulary = dict(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, bos_token_id=1)
    model = {
        "clip": lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config=TINY | vocabulary, vision_config=TINY | SIGHT)),
        "clip text": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TINY, **vocabulary)),
        "clip vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY, **SIGHT)),
        "siglip": lambda: transformers.SiglipModel(transformers.SiglipConfig(text_config=TINY | vocabulary, vision_config=TINY | SIGHT)),
        "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, **vocabulary)),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**TINY, **vocabulary)),
        "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=len(WORDS), bos_token_id=1, eos_token_id=1)),
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**TINY, **SIGHT)),
    }[family]()
    model.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(WORDS, range(len(WORDS)))), "[unknown]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pad = {} if family == "gpt2" else {"pad_token": "[pad]"}                 # the real one has none either
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[end]", unk_token="[unknown]", **pad).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [.5, .4, .3], "image_std": [.2, .2, .2]}))
    return folder


@pytest.mark.parametrize("family", ["clip", "clip text", "siglip", "t5", "bert", "gpt2"])
def test_text_encoders_of_others(family, tmp_path):
    """Every family is found by its config.json; padding beside a longer prompt changes nothing; the words do."""
    tower = pretrained.Text(str(pretrained_folder(tmp_path / "tower", family)))
    (alone, _), (both, mask) = tower.tokens(["table"]), tower.tokens(["a red table", "table"])
    assert alone.shape[2] == tower.width == 32
    assert torch.allclose(alone[0, 0], both[1, 0], atol=1e-5) and not torch.allclose(both[0, 0], both[1, 0], atol=1e-3)
    assert mask.all() if family == "siglip" else mask.tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize("family", ["clip", "clip vision", "siglip", "dinov2"])
def test_image_encoders_of_others(family, tmp_path):
    """Every family; pictures of any size are scaled to its own and normalised with its own numbers."""
    tower = pretrained.Image(str(pretrained_folder(tmp_path / "tower", family)))
    tokens, mask = tower.tokens(torch.tensor([.5, .4, .3])[None, :, None, None].expand(2, 3, 64, 64))
    patches = tower.model(pixel_values=torch.zeros(1, 3, 32, 32)).last_hidden_state
    assert mask.all() and tokens.shape == (2, patches.shape[1], 32) and torch.allclose(tokens[1], patches[0], atol=1e-4)


def test_encoders_of_others_end_to_end(overfitted, tmp_path, capsys):
    """Backbone and reconstructor train on them, what they say is kept, the checkpoint remembers them, and sample.py uses them."""
    names = {kind: str(pretrained_folder(tmp_path / family, family)) for kind, family in (("text", "t5"), ("image", "dinov2"))}
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("encoders", "tokenizer", "head-sdf"):
        shutil.copy(overfitted / f"{name}.safetensors", folder)
    config = files.read_config(overfitted)
    (folder / "config.json").write_text(json.dumps({stage: config[stage] for stage in ("encoders", "tokenizer")}))
    flags = ("--steps", 2, "--batch", 2, "--text-encoder", names["text"], "--image-encoder", names["image"])
    with pytest.MonkeyPatch.context() as patch:
        assert train_small(patch, folder, 2, *flags) == 0
        kept = sorted((folder.parent / "cache").glob("*/tower-*"))
        assert len(kept) == 4 and not (folder / "vision.safetensors").exists()
        first = kept[0].read_bytes()
        config = files.read_config(folder)
        assert config["backbone"]["towers"] == names and config["backbone"]["settings"]["widths"] == {"text": 32, "image": 32}
        capsys.readouterr()
        assert train_small(patch, folder, 2, *flags[:-2]) == 2
    assert_one_line(capsys.readouterr().err, "conditioned on the encoders")
    assert kept[0].read_bytes() == first
    picture = saved(tmp_path / "disc.png", "RGBA")
    assert run(sample.main, "--text", "a red table", "--image", picture, "--checkpoint", folder, "--resolution", 32, "--out", tmp_path / "out") == 0


@pytest.mark.parametrize("kind, make, complaint", [
    ("text", None, "hf download"), ("image", None, "hf download"), ("text", "dinov2", "takes one of"), ("image", "bert", "takes one of")])
def test_bad_encoder_is_one_line(kind, make, complaint, tmp_path, capsys):
    """One that is not there, or of a kind that reads something else."""
    name = str(pretrained_folder(tmp_path / "tower", make)) if make else "nobody/nothing"
    capsys.readouterr()
    assert run(pretrained.main, f"--{kind}-encoder", name) == 2
    assert_one_line(capsys.readouterr().err, complaint)
