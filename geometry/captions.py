"""captions.py - the captions of built-in shapes."""
import re

from geometry.words import SYNONYMS, enumeration, words

NUMBERS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
SYNONYM_SHARE = .15             # of these words, in captions
ADJECTIVES = {"leg": "legged", "wheel": "wheeled"}


def write_captions(rng, name, attributes, phrases):
    """Captions from the bare class name to a full description. Each is true of the shape. The draws differ from shape
    to shape: over a data set every attribute is named alone and together with others. phrases: see shapes.py."""
    pick = lambda options: str(rng.choice(options))
    colour, adjectives, lacks = attributes["colour"], phrases["adjectives"], phrases["lacking"]
    noun, other = pick(phrases["nouns"] + [name]), pick(phrases["nouns"] + [name])

    # what it has, without and with its colour, and what it lacks
    has = [phrase.replace("{} ", "") for phrase in phrases["having"]]
    has_coloured = [phrase.format(attributes.get("second", "")) for phrase in phrases["having"]]
    coloured = [phrase for phrase in has_coloured if phrase not in has]
    bare = lambda phrase: phrase.removeprefix("a ")           # "without a back", but "no back"
    with_ = [f"with {phrase}" for phrase in has]
    with_ += [without for phrase in lacks for without in (f"without {phrase}", f"with no {bare(phrase)}")]
    that = [f"has {phrase}" for phrase in has] + [f"has no {bare(phrase)}" for phrase in lacks]

    # "double bed" needs no second "double", and "a table with a round top" no second "round"
    everything = enumeration(has_coloured) if has else ""
    described = " ".join([word for word in adjectives if word not in words(f"{noun} {everything}")] + [colour, noun])
    full = f"a {described}" + f" with {everything}" * bool(has) + f" without {enumeration(lacks)}" * bool(lacks)
    captions = [name, f"a {name}", f"a {noun}", f"a {colour} {noun}", f"a {name} {pick(with_)}",
                f"a {colour} {other} {pick(with_)}", f"a {other} that is {colour} and {pick(that)}", full]
    if adjectives:
        captions.append(f"a {pick(adjectives)} {name}")
    if coloured:
        captions += [f"a {colour} {noun} with {pick(coloured)}", f"a {other} with {pick(coloured)}"]
    listed = [colour, f"with {pick(has_coloured)}" if has else pick(with_)]
    listed += [word for word in adjectives if word not in other.split()]
    captions.append(", ".join([other, *rng.permutation(listed)]))                 # in any order
    for number, part in re.findall(r"(\w+) (?:wide )?(leg|wheel)s?\b", " ".join(has)):
        captions.append(f"a {pick([number, NUMBERS[number]])}-{ADJECTIVES[part]} {other}")
    captions.append(" ".join(NUMBERS.get(word, word) for word in captions[4].split()))          # with digits

    # synonyms, except in the first four captions; "an orange cap"
    synonym = lambda word: SYNONYMS[word] if word in SYNONYMS and rng.random() < SYNONYM_SHARE else word
    captions = captions[:4] + [" ".join(map(synonym, caption.split())) for caption in captions[4:]]
    captions = [re.sub(r"\ba (?=[aeiou])", "an ", caption) for caption in captions]
    return list(dict.fromkeys(captions))                      # without repetitions
