"""words.py - the words of a text; names of colours, synonyms, and words that say nothing of a shape."""
import re

ARTICLES = {"a", "an", "the"}  # left out, so that "table", "a table" and "the table" are one prompt
FILLERS = {"with", "without", "and", "of", "in", "that", "is", "has", "no", "3d", "model", "style"}  # name no shape
SYNONYMS = {"grey": "gray", "purple": "violet", "teal": "turquoise", "slim": "narrow", "wide": "broad", "tall": "high",
            "round": "circular"}
COLOURS = {"red": (.80, .25, .22), "orange": (.92, .54, .22), "yellow": (.94, .78, .32),
           "green": (.36, .62, .34), "teal": (.20, .60, .60), "blue": (.26, .45, .75),
           "purple": (.52, .38, .68), "pink": (.92, .60, .66), "brown": (.52, .35, .23),
           "white": (.93, .91, .86), "grey": (.56, .58, .60), "black": (.17, .18, .21)}


def words(text):
    """The lowercase words and numbers of a text, in order, without articles."""
    return [word for word in re.findall(r"[^\W_]+", text.lower()) if word not in ARTICLES]


def article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def enumeration(phrases):
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join([", ".join(phrases[:-1])] * (len(phrases) > 1) + phrases[-1:])
