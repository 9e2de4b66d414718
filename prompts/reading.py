"""reading.py - a text prompt becomes words of a vocabulary. Unknown words are ignored with a warning; an unknown object
is an error.

    python -m prompts.reading "a blue chiar with no arms"       # the known words of a prompt
    python -m prompts.reading                                   # all nouns: what can be generated

Plurals, typos and synonyms are understood. The checkpoint is chosen that knows the noun and most of the other words.
"""
import difflib
import re
import sys
from pathlib import Path

from engine.commands import Parser, UserError, command
from engine.files import read_stage
from geometry.words import FILLERS, words

SHIPPED = "checkpoints/tiny", "checkpoints/assets"            # in order of preference
LENGTH = 32    # words of a prompt that are used; the longest built-in caption has 20
POLITE = {"please", "thanks", "thank", "you"}
LINKS = {"with", "without", "that", "which", "has", "having", "and", "in", "on", "under", "beside", "for", "from"}
BREAKS = rf"[,;:.!?\n]|\b(?:{'|'.join(LINKS)})\b"             # between noun phrases
SILENT = (FILLERS | LINKS) - {"without"}                       # words without meaning for a shape
# words of one meaning; the first one in a vocabulary stands for those that are not
SYNONYMS = [line.split() for line in """house cottage bungalow villa mansion, sofa couch settee, car automobile auto,
    truck lorry, spaceship spacecraft starship, airplane aeroplane plane aircraft, ship galleon, boat dinghy rowboat,
    dumpster skip, bin trash dustbin rubbish garbage, rock stone boulder, pistol handgun, campfire bonfire, dog puppy,
    cat kitten, bunny rabbit hare, chick chicken hen, pig hog, mage wizard sorcerer, castle fortress, rug carpet,
    fridge refrigerator, television tv, phone telephone, stove oven cooker, faucet tap, cabinet cupboard, closet
    wardrobe, backpack rucksack, donut doughnut, fries chips, burger hamburger, eggplant aubergine, corn maize, cookie
    biscuit, axe ax hatchet, grave tomb, gravestone tombstone, bicycle bike, motorbike motorcycle, bookcase bookshelf,
    gray grey, wooden wood, golden gold, snow snowy, large big huge giant, small little tiny""".split(",")]
ALIKE = .75       # share of letters that a word and its nearest neighbours have in common
ROWS = "qwertyuiop", "asdfghjkl", "zxcvbnm"                    # of the keyboard
NEIGHBOURS = {pair for row in ROWS for pair in zip(row, row[1:])} | {
    pair for upper, lower in zip(ROWS, ROWS[1:]) for i in (0, 1) for pair in zip(upper[i:], lower)}
# no typos: frequent English words that is_typo would take for words of the shipped checkpoints, as "shirt" for "short"
ENGLISH = set("""action arrest boom both bride camp cane click coal cola cop cost create crow cure dont drunk father
    formed gain gave grace heading heat march math meal mold money only pace party pint plan playing pocket polo root
    ruby saddle salt seed self sept shake shape share shift shipping shirt shop shot sick skill sold soon sort spade
    spoke spot state string stuck tail there tons trail trans trial trick tries walk walked while widow""".split())


def plain(prompt):
    """A prompt in lowercase, with one word for what a shape has not: "without"."""
    return re.sub(r"\b(?:(?:with|has|have|having) )?no\b", "without", prompt.lower())


def noun_phrases(prompt):
    """The words of a prompt between commas and linking words: "a red chair with no arms" -> [red chair], [no arms]."""
    return [phrase for part in re.split(BREAKS, prompt.lower()) if (phrase := words(part))]


def nouns_of(captions):
    """{noun that captions are about, the last word of the first phrase: all words of these captions}"""
    nouns = {}
    for caption in captions:
        if phrases := noun_phrases(caption):
            nouns.setdefault(phrases[0][-1], set()).update(words(plain(caption)))
    return {noun: " ".join(sorted(found)) for noun, found in sorted(nouns.items())}


def respaced(text, vocabulary, nouns):
    """A text with compounds as training captions spell them: "space ship" -> "spaceship", "pinetree" -> "pine tree"."""
    known = lambda word, noun: word in nouns.get(noun, "").split()                # is it a word of the noun's captions?
    text = re.sub(r"\b(\w+) (?=(\w+))", lambda m: m[1] + " " * (m[1] + m[2] not in nouns or known(m[1], m[2])), text)
    parts = lambda word: [f"{word[:i]} {word[i:]}" for i in range(3, len(word)) if known(word[:i], word[i:])] or [word]
    return re.sub(r"\w+", lambda m: m[0] if m[0] in vocabulary else parts(m[0])[0], text)


# ---------------------------------------------------------------------------- one word

def singulars(word):
    """What a plural may be the plural of."""
    endings = ("ves", "f"), ("ves", "fe"), ("ies", "y"), ("es", ""), ("s", "")
    return [word.removesuffix(end) + new for end, new in endings if word.endswith(end) and not word.endswith("ss")]


def is_typo(word, known):
    """Is `word` typed for `known`: a letter doubled, two swapped, one left out or replaced by its neighbour?

    The rules are strict, so that other words are not taken for known ones: the first letter has to be right; no letter
    of a short word is left out or replaced, nor the last letter. "bad" is no bed, "cable" no table, "crow" no crown."""
    if word[:1] != known[:1] or len(known) < 3 or abs(len(word) - len(known)) > 1:
        return False
    inner = range(1, len(known) - 1)
    typos = {known[:i] + known[i - 1:] for i in range(1, len(known) + 1)}         # doubled
    if len(known) > 3:
        typos |= {known[:i] + known[i + 1] + known[i] + known[i + 2:] for i in inner}
    if len(known) > 4:
        typos |= {known[:i] + known[i + 1:] for i in inner}
        typos |= {known[:i] + x + known[i + 1:] for i in inner for pair in NEIGHBOURS if known[i] in pair for x in pair}
    return word in typos


def known_form(word, vocabulary):
    """The one word of the vocabulary that `word` is, or is a plural, singular, synonym or typo of. None: no such."""
    if word in vocabulary:
        return word
    forms = word, *singulars(word)
    found = {form for form in (*forms, word + "s") if form in vocabulary and len(word) > 2}
    if not found:
        found = {next(filter(vocabulary.__contains__, line), None) for line in SYNONYMS if {*line} & {*forms}} - {None}
    if not found and ENGLISH.isdisjoint(forms):
        found = {known for known in vocabulary if any(is_typo(form, known) for form in forms)}
    return found.pop() if len(found) == 1 else None


# ---------------------------------------------------------------------------- a prompt

class Reading:
    """A prompt, parsed once for a vocabulary and nouns (nouns_of): it chooses the checkpoint, warns, and becomes words.

    noun: what the prompt is about, or None if that cannot be generated; words: at most LENGTH known words, in their
    known form, with the noun. A word that no training caption has with the noun is left out: it would change the shape
    into what has the word, as "pirate" in "a pirate ship"."""

    def __init__(self, prompt, vocabulary, nouns):
        self.prompt, self.vocabulary, self.nouns = prompt, vocabulary, nouns
        text = respaced(plain(prompt), vocabulary, nouns)
        phrases = noun_phrases(text)
        self.forms = {word: known_form(word, vocabulary) for word in words(text)}
        self.unknown = unknown_noun(phrases, self.forms, nouns)
        self.noun, trained = None, vocabulary
        about = [named for phrase in phrases if (named := [self.forms[x] for x in phrase if self.forms[x] in nouns])]
        if about and not self.unknown:
            self.noun = about[0][-1]
            trained = {self.noun, *nouns[self.noun].split()}
            if "without" not in trained:                      # what the shape has not is left out, too
                text = re.sub(rf"\bwithout\b.*?(?={BREAKS}|$)", "", text)
        self.known = [form for word in words(text) if (form := self.forms[word]) in trained]
        while self.known[-1:] and self.known[-1] in SILENT:   # what it linked is left out
            self.known.pop()
        self.words = self.known[:LENGTH]
        if self.noun and self.noun not in self.words:
            self.words[LENGTH - 1:] = [self.noun]

    def remarks(self):
        """The warnings about a prompt: changed, ignored and untrained words. Without a known noun, an error."""
        if not self.noun:
            raise UserError(self.error())
        remarks = [f"'{word}' is understood as '{known}'" for word, known in self.forms.items()
                   if known not in (word, None, word + "s", *singulars(word))]
        untrained = {*self.forms.values()} - {None, self.noun, *self.nouns[self.noun].split()} - SILENT
        remarks += [f"no training caption has '{word}' with '{self.noun}'; it is ignored" for word in sorted(untrained)]
        for word in [word for word, known in self.forms.items() if known is None and word not in POLITE | SILENT]:
            near = difflib.get_close_matches(word, self.vocabulary, cutoff=ALIKE)
            remarks.append(f"unknown word '{word}' is ignored" + f"; nearest: {', '.join(near)}" * bool(near))
        if len(self.known) > LENGTH:
            remarks.append(f"only {LENGTH} words of a prompt are used, of this one: {' '.join(self.words)}")
        return remarks

    def error(self):
        """What is wrong, and the checkpoint that knows the noun, or the nearest nouns, or some nouns."""
        named = " ".join(self.prompt.split())[:60]
        fault = f"'{named}' names no object" if named else "the prompt is empty"
        if self.unknown:
            fault = f"unknown object '{self.unknown[:60]}'"
        if folders := [*readings(self.prompt)]:
            return f"{fault}; the checkpoint {folders[0]} knows it"
        nouns = [*self.nouns]
        if near := self.unknown and difflib.get_close_matches(self.unknown, nouns, cutoff=ALIKE):
            return f"{fault}; nearest: {', '.join(near)}"
        shown = nouns[::-(-len(nouns) // 32) or 1]            # all, or 32 of very many
        more = f" ... (python -m prompts.reading lists all {len(nouns)})" if len(shown) < len(nouns) else ""
        return f"{fault}; name one of {', '.join(shown)}{more}"


def untrained(prompt, nouns):
    """The warnings about a prompt for a text tower that knows every word: is no training caption about its noun?"""
    vocabulary = {word for noun, captions in nouns.items() for word in (noun, *captions.split())}
    reading = Reading(prompt, vocabulary, nouns)
    return [] if reading.noun or not nouns else [f"no training caption is about this: {reading.error()}"]


def unknown_noun(phrases, forms, nouns):
    """The unknown noun that a prompt is about: it ends the phrase with the first noun ("tree house"), or an earlier,
    short phrase ("a house with a table"). Without any noun, an unknown word, or None."""
    for i, phrase in enumerate(phrases):
        phrase = [word for word in phrase if word not in POLITE]
        last = max((k for k, word in enumerate(phrase) if forms[word] in nouns), default=None)
        if last is not None:
            return phrase[-1] if last == len(phrase) - 2 and not forms[phrase[-1]] else None
        if phrase and not forms[phrase[-1]] and (i == 0 and len(phrase) < 3 or len(phrase) == 1):
            return phrase[-1]
    return next((word for phrase in phrases for word in phrase[::-1] if not forms[word]), None)


# ---------------------------------------------------------------------------- checkpoints

def find(folder):
    """A checkpoint folder in the current folder or, if it is not there, beside the code. None: nowhere."""
    return next((path for path in (Path(folder), Path(__file__).parent.parent / folder) if path.is_dir()), None)


def shipped():
    """{folder: its config.json entry "encoders"} of the shipped checkpoints that are here."""
    return {folder: read_stage(path, "encoders") for folder in SHIPPED if (path := find(folder))}


def readings(prompt):
    """{shipped folder: Reading} of the checkpoints that know the noun of a prompt."""
    found = {folder: Reading(prompt, entry["vocabulary"], entry["nouns"]) for folder, entry in shipped().items()}
    return {folder: reading for folder, reading in found.items() if reading.noun}


def choose(prompt=None):
    """The shipped folder that knows the noun of a prompt; of several, the one that knows most of its words, then the
    first, whose shapes are the best. Without a prompt, the last, which has seen the most things. If none knows the
    noun, that is an error."""
    if not (entries := shipped()):
        raise UserError(f"there is no folder {SHIPPED[0]}; name a folder that train.py made with --checkpoint")
    if prompt is None:
        return [*entries][-1]
    if not (found := readings(prompt)):                       # an error that names the nearest noun of all
        vocabulary = {word for entry in entries.values() for word in entry["vocabulary"]}
        nouns = {noun: captions for entry in [*entries.values()][::-1] for noun, captions in entry["nouns"].items()}
        Reading(prompt, vocabulary, nouns).remarks()
        return next(iter(entries))                            # each knows a part of the prompt
    return max(found, key=lambda folder: len(found[folder].words))


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("prompt", nargs="?", help="a text prompt (default: list the nouns that can be generated)")
    parser.add_argument("--checkpoint", help="folder that train.py made (default: the shipped checkpoints)")
    args = parser.parse_args()
    folder = args.checkpoint or choose(args.prompt)
    entry = read_stage(find(folder) or folder, "encoders")
    if args.prompt is None:
        entries = [entry] if args.checkpoint else shipped().values()
        return print(*sorted({noun for entry in entries for noun in entry["nouns"]}), sep="\n")
    reading = Reading(args.prompt, entry["vocabulary"], entry["nouns"])
    for remark in reading.remarks():
        print(f"warning: {remark}", file=sys.stderr)
    print(*reading.words)


if __name__ == "__main__":
    command(main)
