"""reading.py - a text prompt becomes words of a vocabulary. What is left out is said; what cannot be made is an error.

    python -m prompts.reading "a blue chiar with no arms"       # what is read of a prompt
    python -m prompts.reading                                   # all nouns: what can be made

A word that is not in the vocabulary may be a plural or a slip of the keyboard: then its known form is read. Another
word is left out, with a warning; but an unknown noun is an error. Of the shipped weights that know the noun, those that
know most of the other words are chosen.
"""
import difflib
import re
import sys
from pathlib import Path

from engine.commands import Parser, UserError, command
from engine.files import read_stage
from geometry.words import FILLERS, words

SHIPPED = "checkpoints/tiny", "checkpoints/assets"            # trained weights, in the order in which they are asked
ROWS = "qwertyuiop", "asdfghjkl", "zxcvbnm"
NEIGHBOURS = {pair for row in ROWS for pair in zip(row, row[1:])} | {
    pair for upper, lower in zip(ROWS, ROWS[1:]) for i in (0, 1) for pair in zip(upper[i:], lower)}
POLITE = {"please", "thanks", "thank", "you"}
LINKS = {"with", "without", "that", "which", "has", "having", "and", "in", "on", "under", "beside", "for", "from"}
SILENT = (FILLERS | LINKS) - {"without"}                       # words that say nothing of a shape


def plain(prompt):
    """A prompt in lowercase, with one word for what a shape has not: "without"."""
    return re.sub(r"\b(?:(?:with|has|have|having) )?no\b", "without", prompt.lower())


def nouns_of(captions):
    """{noun that captions are about, the last word of the first phrase: all words that they say of it}"""
    said = {}
    for caption in captions:
        if phrases := noun_phrases(caption):
            said.setdefault(phrases[0][-1], set()).update(words(plain(caption)))
    return {noun: " ".join(sorted(found)) for noun, found in sorted(said.items())}


# ---------------------------------------------------------------------------- trained weights

def find(folder):
    """A checkpoint folder where it is: here, or, when called from another folder, beside the code; None: nowhere."""
    return next((path for path in (Path(folder), Path(__file__).parent.parent / folder) if path.is_dir()), None)


def shipped():
    """The folders of trained weights that are here."""
    if folders := [folder for folder in SHIPPED if find(folder)]:
        return folders
    raise UserError(f"there is no folder {SHIPPED[0]}; name a folder that train.py made with --checkpoint")


def choose(text):
    """The shipped folder that knows the noun of a text; of several, the one that knows most of its words, then with
    fewest warnings. Without a text, the first. If none knows it, that is an error, which names the nearest noun."""
    folders, vocabulary, nouns, faults = shipped(), [], {}, {}
    for folder in folders if text is not None else []:
        entry = read_stage(find(folder), "encoders")
        try:
            remarks = remarks_on(text, entry["vocabulary"], entry["nouns"])
            faults[folder] = -len(known_words(text, entry["vocabulary"])), len(remarks)
        except UserError:
            vocabulary, nouns = vocabulary + entry["vocabulary"], nouns | entry["nouns"]
    if nouns and not faults:
        remarks_on(text, vocabulary, nouns)
    return min(faults, key=faults.get, default=folders[0])


# ---------------------------------------------------------------------------- one word

def singulars(word):
    """What a plural may be the plural of."""
    return [word.removesuffix(end) + new for end, new in (("ves", "f"), ("es", ""), ("s", "")) if word.endswith(end)]


def is_slip(word, known):
    """Is `word` typed for `known`: two letters swapped, one left out, doubled or struck for its neighbour?

    The rules are strict, so that no other word is taken for a known one: "bad" is no bed, "cable" is no table."""
    if len(word) == len(known) > 3:
        wrong = [i for i, pair in enumerate(zip(word, known)) if len(set(pair)) == 2]
        if len(wrong) == 2 and wrong[1] == wrong[0] + 1:
            i, j = wrong
            return word[i] == known[j] and word[j] == known[i]
        if len(wrong) == 1 and wrong != [0] and len(word) > 4:
            pair = word[wrong[0]], known[wrong[0]]
            return pair in NEIGHBOURS or pair[::-1] in NEIGHBOURS
        return False
    if len(word) + 1 == len(known) > 4:
        return word[:1] == known[0] and any(word == known[:i] + known[i + 1:] for i in range(1, len(known)))
    if len(word) == len(known) + 1 > 3:
        return any(word == known[:i] + known[i - 1] + known[i:] for i in range(1, len(known) + 1))
    return False


def known_form(word, vocabulary):
    """The one word of the vocabulary that `word` is, or is a plural of, or a slip for. None: no such one."""
    if word in vocabulary:
        return word
    for found in ([single for single in singulars(word) if single in vocabulary],
                  sorted({known for known in vocabulary if any(is_slip(x, known) for x in (word, *singulars(word)))})):
        if len(found) == 1:
            return found[0]
    return None


# ---------------------------------------------------------------------------- a prompt

def known_words(prompt, vocabulary):
    """The words of a prompt that are in the vocabulary, in their known form."""
    forms = (known_form(word, vocabulary) for word in words(plain(prompt)))
    return [form for form in forms if form]


def remarks_on(prompt, vocabulary, nouns):
    """The warnings about a prompt: words that are changed, left out, or were never said of its noun. A prompt that is
    not about one of `nouns` (nouns_of) is an error, which names the nearest."""
    prompt = plain(prompt)
    if not prompt.strip():
        raise UserError(f"the prompt is empty; {some_of(nouns)}")
    forms = {word: known_form(word, vocabulary) for word in words(prompt)}
    phrases = noun_phrases(prompt)
    about = [phrase for phrase in phrases if any(forms[word] in nouns for word in phrase)]
    unknown = unknown_noun(phrases, forms, nouns)
    if unknown or not about:
        noun = unknown or next((word for phrase in phrases for word in phrase[::-1] if not forms[word]), None)
        named = f"'{(noun or ' '.join(prompt.split()))[:60]}'"
        fault = f"{named} is nothing that can be made" if noun else f"{named} names no shape"
        near = noun and difflib.get_close_matches(noun, nouns, cutoff=.5)
        raise UserError(f"{fault}; nearest: {', '.join(near)}" if near else f"{fault}; {some_of(nouns)}")

    remarks = [f"'{word}' is read as '{known}'" for word, known in forms.items()
               if known not in (word, None) and known not in singulars(word)]
    if len(about) > 1:
        remarks.append(f"one shape is made, of '{' '.join(about[0])}' and '{' '.join(about[1])}' together")
    else:
        noun = [forms[word] for word in about[0] if forms[word] in nouns][-1]
        strange = {*forms.values()} - {None, *nouns[noun].split(), *SILENT}
        remarks += [f"'{word}' was said of no {noun} in training; it may be ignored" for word in sorted(strange)]
    for word in [word for word, known in forms.items() if known is None and word not in POLITE]:
        near = ", ".join(difflib.get_close_matches(word, vocabulary)) or "none is spelt like it"
        remarks.append(f"the unknown word '{word}' is left out; nearest: {near}")
    return remarks


def some_of(nouns, most=32):
    """What can be made: all of it, or some of very many."""
    shown = [*nouns][::-(-len(nouns) // most)]
    more = f" ... (python -m prompts.reading lists all {len(nouns)})" if len(shown) < len(nouns) else ""
    return f"name one of {', '.join(shown)}{more}"


def noun_phrases(prompt):
    """The words of a prompt between commas and linking words: "a red chair with no arms" -> [red chair], [no arms]."""
    links = "|".join(LINKS)
    return [phrase for part in re.split(rf"[,;:.!?\n]|\b(?:{links})\b", prompt.lower()) if (phrase := words(part))]


def unknown_noun(phrases, forms, nouns):
    """The unknown noun that a prompt is about: it ends the phrase with the first noun ("tree house"), or an earlier,
    short phrase ("a house with a table"). None if there is none."""
    for i, phrase in enumerate(phrases):
        phrase = [word for word in phrase if word not in POLITE]
        last = max((k for k, word in enumerate(phrase) if forms[word] in nouns), default=None)
        if last is not None:
            return phrase[-1] if last == len(phrase) - 2 and not forms[phrase[-1]] else None
        if phrase and not forms[phrase[-1]] and (i == 0 and len(phrase) < 3 or len(phrase) == 1):
            return phrase[-1]
    return None


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("prompt", nargs="?", help="a text prompt (default: list the nouns that can be made)")
    parser.add_argument("--checkpoint", help="folder that train.py made (default: the shipped weights)")
    args = parser.parse_args()
    if args.prompt is None:
        folders = [args.checkpoint] if args.checkpoint else map(find, shipped())
        nouns = {noun for folder in folders for noun in read_stage(folder, "encoders")["nouns"]}
        return print(*sorted(nouns), sep="\n")
    entry = read_stage(args.checkpoint or find(choose(args.prompt)), "encoders")
    for remark in remarks_on(args.prompt, entry["vocabulary"], entry["nouns"]):
        print(f"warning: {remark}", file=sys.stderr)
    print(*known_words(args.prompt, entry["vocabulary"]))


if __name__ == "__main__":
    command(main)
