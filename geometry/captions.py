"""captions.py - the words of a caption, and the captions of built-in shapes."""
import re

NUMBERS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
ARTICLES = {"a", "an", "the"}  # dropped, so that "table", "a table" and "the table" are one prompt
FILLERS = {"with", "without", "and", "of", "in", "3d", "model", "style"}  # a prompt of these alone names nothing


def words(text):
    """Lowercase runs of letters and digits, in order, without articles."""
    return [word for word in re.findall(r"[^\W_]+", text.lower()) if word not in ARTICLES]


def article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase

def listed(items):
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)

def write_captions(rng, name, attributes, words):
    """From the bare class name to everything that can be seen. Each is true of the shape; the draws
    differ from shape to shape, so that over a data set every attribute is met alone and in company."""
    colour, second = attributes["colour"], attributes.get("second", "")
    plain = [h.replace("{} ", "") for h in words["having"]]
    full = [h.format(second) for h in words["having"]]
    lacking = words.get("lacking", [])
    details = [f"with {p}" for p in plain] + [f"without {p}" for p in lacking]
    noun = str(rng.choice(words["nouns"] + [name]))
    # "double bed" needs no second "double", nor "a table with a round top" a second "round"
    adjectives = [a for a in words["adjectives"] if a not in noun + listed(full)]
    everything = article(" ".join(adjectives + [colour, noun])) + " with " + listed(full)
    everything += " without " + listed(lacking) if lacking else ""
    detail, other = (str(d) for d in rng.choice(details, 2))
    lines = [name, article(name), article(noun), article(f"{colour} {noun}"),
             f"{article(name)} {detail}", f"{article(f'{colour} {name}')} {other}", everything,
             f"a 3d model of {article(name)}, in the style of {everything}"]
    if words["adjectives"]:
        lines.append(article(f"{rng.choice(words['adjectives'])} {name}"))
    digits = " ".join(NUMBERS.get(w, w) for w in lines[4].split())
    return list(dict.fromkeys(lines + [digits]))        # without doubles
