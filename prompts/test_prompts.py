"""test_prompts.py - the tests of prompts/.

    python -m pytest -q prompts
"""
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

import data
import encoders
import sample
from conftest import SMALL, assert_one_line, run
from engine import files
from engine.commands import UserError
from geometry import asset_names, crop, render, sample_files, shapes, training_pictures
from geometry.words import COLOURS
from prompts import picture_files, reading, text_tower

# ---------------------------------------------------------------------------- towers

def small_text_tower():
    torch.manual_seed(0)
    words = ["", "blue", "chair", "no", "red", "round", "seat", "table", "with"]
    nouns = dict.fromkeys(["chair", "table"], " ".join(words))
    return text_tower.TextAndCloud(words, nouns, **SMALL[text_tower]).eval()


def test_text_padding_has_no_influence():
    """A prompt alone = the same prompt padded in a batch with a longer one."""
    tower = small_text_tower()
    alone, _ = tower.tokens(["Table"])
    both, mask = tower.tokens(["a red round table", "the table"])
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    assert torch.allclose(alone[0, 0], both[1, 0], atol=1e-5)
    assert not torch.allclose(alone[0, 0], both[0, 0], atol=.1)


def test_unknown_words_are_ignored():
    tower = small_text_tower()
    assert torch.equal(tower.tokens(["rid wooden chair"])[0], tower.tokens(["chair"])[0])
    assert [remark.split("'")[1] for remark in tower.remarks("rid wooden chair")] == ["rid", "wooden"]
    assert torch.equal(tower.tokens(["wooden"])[0], tower.tokens(["paper"])[0])           # of no known word


def test_pictures_train_the_cloud_tower_only():
    tower = small_text_tower()
    tower.freeze_text()
    ids, mask = tower.word_ids(["a red table", "a blue chair"])
    tower.loss(ids, mask, torch.randn(3, 2, 32, 3), torch.eye(2, dtype=torch.bool))[0].backward()
    trained = {name.split(".")[0] for name, p in tower.named_parameters() if p.grad is not None}
    assert trained == {"point", "query", "cross", "mix", "cloud_out"}


# ---------------------------------------------------------------------------- reading

COMMON = "arms blue five has in legs red with"
NOUNS = {noun: f"{noun} {COMMON}" for noun in "aeroplane bed bench bottle chair lamp shelf sofa table tree".split()}
NOUNS["chair"] += " wheels without"
VOCABULARY = [*NOUNS, *COMMON.split(), "wheels", "without"]


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Two shipped checkpoints, and one that is not there."""
    for name, nouns, words in (("toys", "mug chair", ""), ("things", "barrel chair elephant", "tiny")):
        known = f"{nouns} red wood {words}"
        files.write_config(tmp_path / name, "encoders", vocabulary=known.split(),
                           nouns=dict.fromkeys(nouns.split(), known), made_with={}, signature=name)
    monkeypatch.setattr(reading, "SHIPPED", [str(tmp_path / name) for name in ("toys", "things", "none")])
    return tmp_path


@pytest.mark.parametrize("prompt, words", [
    ("tables", "table"), ("shelves", "shelf"), ("benches", "bench"), ("wheel of a chair", "wheels chair"),
    ("a Chair, red", "chair red"), ("a blue chiar", "blue chair"), ("bleu bottel", "blue bottle"), ("lampp", "lamp"),
    ("aeroplame", "aeroplane"), ("tabble", "table"), ("tabel", "table"), ("tble", "table"), ("chsir", "chair"),
    ("office chair with five wheels", "chair with five wheels"), ("a chair with no arms, please", "chair without arms"),
    ("chair, no legs", "chair without legs"), (33 * "red " + "chair", 31 * "red " + "chair"),
    ("please make me a red chair", "red chair"), ("I would like a table that has legs", "table has legs")])
def test_words_of_a_prompt(prompt, words):
    """Plurals and typos are understood; unknown words are ignored; of many words, the noun is always one."""
    found = reading.Reading(prompt, VOCABULARY, NOUNS)
    remarks = found.remarks()
    assert found.words == words.split() and found.noun in found.words
    assert any("only 32 words" in remark for remark in remarks) == (len(found.known) > 32)


@pytest.mark.parametrize("prompt, complaint", [
    ("sculpture", "unknown object 'sculpture'; name one of aeroplane"), ("cable", "'cable'; nearest: table"),
    ("a house with a table", "object 'house'"), ("tree house", "object 'house'"), ("a dog on a sofa", "object 'dog'"),
    ("beach", "'beach'; .*bench"), ("soda", "'soda'"), ("balcony", "'balcony'; name"),
    ("red", "'red' names no object"), ("with", "names no object"),
    ("  ", "is empty"), ("!?", "names no object"), ("\U0001fa91", "names no object"),
    ("a mug", "object 'mug'; the checkpoint .*toys knows it")])
def test_an_unknown_object_is_an_error(prompt, complaint, shipped):
    """The noun of a prompt is never guessed. An error names the shipped checkpoint that knows it, or the nearest."""
    with pytest.raises(UserError, match=complaint):
        reading.Reading(prompt, VOCABULARY, NOUNS).remarks()


@pytest.mark.parametrize("word", ["crow", "crows", "chess", "skirt", "bride", "widow", "state", "there"])
def test_other_english_words_are_no_typos(word):
    for entry in reading.shipped().values():
        assert reading.known_form(word, entry["vocabulary"]) is None


@pytest.mark.parametrize("prompt, ignored", [
    ("a table with wheels", ["wheels"]), ("a chair with wheels", []), ("a chair without arms", []),
    ("a sofa with no arms", ["without"]), ("a red table on a blue table", [])])
def test_words_without_a_training_caption_are_left_out(prompt, ignored):
    """They would change the shape. What it has not is left out as a whole: "without arms" must not become arms."""
    found = reading.Reading(prompt, VOCABULARY, NOUNS)
    remarks = [remark for remark in found.remarks() if "no training" in remark]
    assert [remark.split("'")[1] for remark in remarks] == ignored
    assert not {*ignored, "arms" if "without" in ignored else None} & {*found.words}


def test_captions_are_read_word_by_word():
    """Every word of a caption is known with its noun, in its own form."""
    captions = [caption for i in range(300) for caption in shapes.make(0, i).captions]
    vocabulary, nouns = text_tower.vocabulary(captions), reading.nouns_of(captions)
    for caption in captions:
        found = reading.Reading(caption, vocabulary, nouns)
        assert found.words == reading.words(reading.plain(caption))[:reading.LENGTH]


@pytest.mark.parametrize("prompt, words", [
    ("a pine tree", "pine tree"), ("a pinetree", "pine tree"), ("a space ship", "spaceship"), ("a ship", "ship"),
    ("a pirate ship", "ship"), ("a big fortress", "large castle"), ("a boulder", "rock"), ("a pirate", "pirate")])
def test_compounds_and_synonyms(prompt, words):
    """They become the words of the training captions."""
    captions = "pine tree", "spaceship", "space barrel", "ship", "large castle", "rock", "pirate"
    found = reading.Reading(prompt, text_tower.vocabulary(captions), reading.nouns_of(captions))
    assert found.words == words.split() and found.noun == found.words[-1]


def test_nouns_are_those_of_captions():
    """A pizza box is a box and no pizza; a lamp table, as kits name it, is a table lamp."""
    names = "pizzaBox", "box", "lampTable", "lamp"
    nouns = reading.nouns_of([caption for name in names for caption in asset_names.captions(name, "some kit")])
    assert nouns == {"box": "box pizza", "lamp": "lamp table"}
    assert reading.nouns_of(["a red chair", "chair, red"]) == {"chair": "chair red"}


@pytest.mark.parametrize("text, chosen", [
    ("a red mug", "toys"), ("a wooden barrel", "things"), ("a chair of wood", "toys"), ("a tiny chair", "things"),
    (None, "things"), ("an elefant", "nearest: elephant"), ("a swing", "object 'swing'; name")])
def test_the_checkpoint_that_knows_the_noun_is_chosen(text, chosen, shipped):
    """Of two that know the noun, the one that knows more words, else the first; a noun that none knows is an error."""
    if (shipped / chosen).exists():
        assert reading.choose(text) == str(shipped / chosen)
    else:
        with pytest.raises(UserError, match=chosen):
            reading.choose(text)


def test_nouns_of_all_shipped_checkpoints_are_listed(shipped, capsys):
    run(reading.main)
    assert capsys.readouterr().out.split() == ["barrel", "chair", "elephant", "mug"]


@pytest.mark.parametrize("prompt", [[], ["a mug"]])
def test_no_shipped_checkpoint_is_one_line(prompt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "SHIPPED", [str(tmp_path / "none")])
    assert run(reading.main, *prompt) == 2
    assert_one_line(capsys.readouterr().err, "there is no folder")


# ---------------------------------------------------------------------------- picture files

def disc(size=96):
    """A brown disc off the middle, on white -> colour and coverage, size size 4."""
    y, x = np.mgrid[:size, :size] / size - .45
    inside = (x ** 2 + y ** 2 < .3 ** 2)[..., None]
    return np.concatenate([np.where(inside, (.6, .4, .2), 1.), inside], -1)


def save_disc(path, mode):
    """The disc in a file of this mode; the background is transparent where the mode allows it, else white."""
    picture = Image.fromarray((disc() * 255).round().astype(np.uint8))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    elif mode in ("CMYK", "P"):
        picture = picture.convert("RGB").convert(mode)
    else:
        picture = picture.convert(mode)
    picture.save(path)
    return path


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "png"), ("RGB", "webp"), ("RGB", "jpg"), ("RGBA", "png"), ("CMYK", "jpg"), ("P", "png"), ("LA", "png"),
    ("L", "png"), ("I;16", "png")])
def test_every_file_format_gives_the_same_picture(mode, suffix, tmp_path):
    """The same disc is cut out and framed, whatever file it comes from; some files have no colours."""
    picture, warning = picture_files.load_picture(save_disc(tmp_path / f"disc.{suffix}", mode))
    true = torch.from_numpy(crop.crop_to_object(disc()))
    true = rearrange(true[..., :3] + 1 - true[..., 3:], "h w c -> c h w")
    if mode in ("L", "LA", "I;16"):
        true, picture = true.mean(0), picture.mean(0)
    else:
        assert abs((picture < .9).any(0).float().mean() - .88 ** 2 * np.pi / 4) < .05      # the disc fills the frame
    assert warning is None and (picture - true).abs().mean() < .05


def test_an_image_of_pillow_is_a_picture_file(tmp_path):
    path = save_disc(tmp_path / "disc.png", "RGBA")
    with Image.open(path) as image:
        assert torch.equal(picture_files.load_picture(image)[0], picture_files.load_picture(path)[0])
    with pytest.raises(UserError, match="not a Tensor"):
        picture_files.load_picture(torch.zeros(3, 64, 64))


def test_soft_shadow_and_gradient_are_background():
    """A background that grows darker downwards, with a soft shadow on it, is cut away."""
    y, x = np.mgrid[:96, :96][..., None]
    shadow = 1 - .4 * np.exp(-((y - 75) ** 2 + (x - 50) ** 2) / 300)
    inside = disc()[..., 3:] > 0
    picture = np.where(inside, disc()[..., :3], .95 * shadow * (1 - .1 * y / 95))
    assert (picture_files.cut_out(picture.astype(np.float32)) == inside[..., 0]).mean() > .96


def test_a_noisy_background_is_a_warning(tmp_path):
    picture = np.where(disc()[..., 3:] > 0, disc()[..., :3], np.random.default_rng(0).random((96, 96, 3)))
    render.save_png(tmp_path / "noisy.png", (picture * 255).astype(np.uint8))
    assert "no plain background" in picture_files.load_picture(tmp_path / "noisy.png")[1]


@pytest.mark.parametrize("save, complaint", [
    (lambda path: path.write_bytes(b"not a picture"), "cannot be read as a picture"),
    (lambda path: path.write_bytes(save_disc(path, "RGB").read_bytes()[:-60]), "cannot be read as a picture"),
    (lambda path: None, "no picture"), (os.mkfifo, "it is a pipe"),
    (lambda path: Image.new("1", (1, 1)).save(path), "1 x 1 pixels"),
    (lambda path: Image.new("1", (30_000, 9000)).save(path), "30000 x 9000 pixels"),
    (lambda path: Image.new("RGBA", (64, 64)).save(path), "transparent all over"),
    (lambda path: Image.new("1", (64, 64)).save(path), "nothing but its background")],
    ids=["text", "truncated", "missing", "pipe", "tiny", "huge", "transparent", "empty"])
def test_bad_picture_is_one_line(save, complaint, tmp_path):
    save(tmp_path / "bad.png")
    with pytest.raises(UserError, match=complaint):
        picture_files.load_picture(tmp_path / "bad.png")


# ---------------------------------------------------------------------------- picture prompts

@pytest.mark.parametrize("text, name", [(None, "from-disc-1-0.glb"), ("a table", "a-table-from-disc-1-0.glb")])
def test_picture_prompt_is_command_and_api(overfitted, text, name, tmp_path):
    """sample.py --image = generate(image=...), alone and with a text."""
    path = save_disc(tmp_path / "Disc 1.png", "RGBA")
    flags = ["--checkpoint", overfitted, "--resolution", 32, "--image", path, "--out", tmp_path / "out"]
    assert run(sample.main, *flags, *(["--text", text] if text else [])) == 0
    sample.load(overfitted).generate(text, path, resolution=32)[0].save(tmp_path / "api.glb")
    assert (tmp_path / "api.glb").read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_long_texts_leave_the_name_of_the_picture():
    assert sample_files.file_name("a red table " * 9, "Disc 1.png") == "a-red-table-" * 5 + "from-disc-1"


def test_pictures_are_augmented_shapes_are_not(prepared):
    """A picture has another light, background and crop each time; without variation it is the same, on white."""
    split, rows = prepared[0], np.arange(4)
    plain, again = (split.pictures(rows, data.seeded(0), vary=False) for _ in range(2))
    varied = split.pictures(rows, data.seeded(0))
    assert torch.equal(plain, again) and (plain[:, :, 0, 0] > .99).all()
    assert .02 < (varied - plain).abs().mean() < .4


def test_named_colours_are_augmented(prepared):
    """Pixels of a named colour get another one; all others stay as they are."""
    colours = (255 * torch.tensor(COLOURS["green"])).round().repeat(2, 4, 4, 1)                       # b s s 3
    colours[:, 2:] = (255 * torch.tensor(COLOURS["white"])).round()
    named = training_pictures.colours_named(["a green chair", ""])
    new = training_pictures.recolour(colours, torch.full((2, 4, 4), 255.), named)
    assert (new[0, :2] != colours[0, :2]).any(-1).all()
    assert torch.equal(new[0, 2:], colours[0, 2:]) and torch.equal(new[1], colours[1])


def test_captions_are_drawn_by_the_square_of_their_number_of_words():
    """And each is known to be true of the shapes that have it."""
    table = data.Captions([["a", "b c d"], ["b c d"], ["e f", "a"]], "cpu")
    torch.manual_seed(0)
    drawn = table.draw_captions(torch.tensor([0, 2]).repeat_interleave(3000)).view(2, -1)
    share = (drawn == table.texts.index("a")).float().mean(1)
    assert table.draw_captions(torch.tensor([1] * 9)).unique().tolist() == [table.texts.index("b c d")]
    assert abs(share[0] - 1 / 10) < .03 and abs(share[1] - 1 / 5) < .03
    true = table.true(torch.tensor([table.texts.index(text) for text in ("a", "b c d")]), torch.arange(3))
    assert true.tolist() == [[True, False, True], [True, True, False]]


class Plain:
    """A tower whose condition is one constant token."""
    width = 8
    cache = lambda self, split: SimpleNamespace(take=lambda captions: [captions, self.tokens(captions)[1]])
    text = lambda self, ids, mask: self.tokens(ids)[0]

    def tokens(self, x):
        return torch.ones(len(x), 1, self.width), torch.ones(len(x), 1, dtype=torch.bool)


def test_prompts_are_dropped_at_the_given_rates(prepared, monkeypatch):
    """Each combination of prompts is drawn as often as KEPT says. About half of the pictures beside a caption, and no
    picture alone, get other colours."""
    towers, split, named = encoders.Encoders({"text": Plain(), "image": Plain()}), prepared[0], []
    black = torch.zeros(4000, 3, 8, 8)
    monkeypatch.setattr(split, "pictures", lambda *_, recoloured, **__: named.append(recoloured) or black)
    monkeypatch.setattr(split.table, "colours", torch.zeros(len(split.table.texts), 1, dtype=torch.long))
    torch.manual_seed(0)
    drawn = towers.draw_prompts(split, torch.zeros(4000, dtype=torch.long))
    condition = towers.encode_drawn(drawn)
    for kinds, share in encoders.KEPT["text", "image"].items():
        same = torch.stack([mask[:, 0] == (kind in kinds) for kind, (_, mask) in condition.items()]).all(0)
        assert abs(same.float().mean() - share) < .03
    both, recoloured = drawn["kept"]["text"] & drawn["kept"]["image"], named[0][:, 0] == 0
    assert not recoloured[~both].any() and .45 < recoloured[both].float().mean() < .55
