"""captions.py - the words of a text, and the captions of built-in shapes."""
import re

NUMBERS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
ARTICLES = {"a", "an", "the"}  # left out, so that "table", "a table" and "the table" are one prompt
FILLERS = {"with", "without", "and", "of", "in", "3d", "model", "style"}  # a prompt of only these names no shape


def words(text):
    """The lowercase words and numbers of a text, in order, without articles."""
    return [word for word in re.findall(r"[^\W_]+", text.lower()) if word not in ARTICLES]


def article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase

def enumeration(phrases):
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join([", ".join(phrases[:-1])] * (len(phrases) > 1) + phrases[-1:])

def write_captions(rng, name, attributes, phrases):
    """Captions from the bare class name to a full description. Each is true of the shape. The draws differ from shape
    to shape: over a data set every attribute is named alone and together with others. phrases: see shapes.py."""
    colour, second = attributes["colour"], attributes.get("second", "")
    plain = [phrase.replace("{} ", "") for phrase in phrases["having"]]
    coloured = enumeration([phrase.format(second) for phrase in phrases["having"]])
    adjectives, lacking = phrases.get("adjectives", []), phrases.get("lacking", [])
    noun = str(rng.choice(phrases["nouns"] + [name]))
    # "double bed" needs no second "double", and "a table with a round top" no second "round"
    described = " ".join([word for word in adjectives if word not in noun + coloured] + [colour, noun])
    everything = f"{article(described)} with {coloured}" + f" without {enumeration(lacking)}" * bool(lacking)
    details = [f"with {phrase}" for phrase in plain] + [f"without {phrase}" for phrase in lacking]
    detail, other = (str(phrase) for phrase in rng.choice(details, 2))
    captions = [name, article(name), article(noun), article(f"{colour} {noun}"),
                f"{article(name)} {detail}", f"{article(f'{colour} {name}')} {other}", everything,
                f"a 3d model of {article(name)}, in the style of {everything}"]
    if adjectives:
        captions.append(article(f"{rng.choice(adjectives)} {name}"))
    with_digits = " ".join(NUMBERS.get(word, word) for word in captions[4].split())
    return list(dict.fromkeys(captions + [with_digits]))       # without repetitions
