"""words.py - are prompts understood that are worded unlike training captions?

    prompts     by templates that no caption has; each names a class, its colour and another attribute
    pairs       "a low green table with one leg": the class with two attributes or three, in the order of captions
    variants    "a red chair" with a typo, in the plural, or with a synonym

A sample of each is measured: is the nearest held-out shape of its class, and does it have the attributes?

    python evaluate.py words
"""
import re
from typing import NamedTuple

import numpy as np

from geometry.built_in import BuiltIn
from geometry.metrics import chamfer_matrix
from geometry.shapes import CLASSES, LEAVES
from geometry.words import COLOURS, SYNONYMS, article
from heads import field_of
from prompts.reading import NEIGHBOURS
from research import exam
from research.attributes import ATTRIBUTES, colour, has_attribute, measure_shape
from research.results import labels, write_table

MOTTLED = {"stool", "shelf"}          # classes whose first colour does not cover most of the surface
TEMPLATES = ("I would like {a} {adjective} {noun} {detail}, {colour}", "{colour} {noun}, {adjective}, {detail}",
             "one {adjective} {noun} {detail}, painted {colour}",
             "please show me {a} {noun} in {colour} {detail}, {adjective}",
             "{noun} {detail} and in {colour}, {adjective}", "{a} {adjective} {noun}; colour: {colour}; {detail}")
OTHER_NAMES = {"table": ["desk"], "sofa": ["couch", "settee"], "shelf": ["bookcase", "bookshelf"],
               "mug": ["cup", "beaker"], "car": ["automobile"], "aeroplane": ["airplane", "plane"], "bottle": ["flask"]}
OTHER_NAMES |= {word: [synonym] for word, synonym in SYNONYMS.items() if word in COLOURS}


class Prompt(NamedTuple):
    text: str
    name: str                         # its class
    wanted: list                      # (attribute, checker, value) of each attribute that it names


def parts(prompt, name):
    """"a low table with one leg" -> "low", "table", "with one leg"; "a sedan" -> "", "sedan", ""."""
    known = re.fullmatch(rf"an? (?:(.*?) )?{name}(?: (with.*))?", prompt)
    return (known[1] or "", name, known[2] or "") if known else ("", prompt[2:], "")


def write_prompts(count, seed):
    """Prompts by TEMPLATES, classes in turn, with attributes and colours at random."""
    rng, prompts = np.random.default_rng(seed), []
    for i in range(count):
        name = CLASSES[i % len(CLASSES)]
        first = str(rng.choice(LEAVES if name == "tree" else list(COLOURS)))
        rows = [row for row in ATTRIBUTES if row[0] == name and row[1] != "colour"]
        _, attribute, checker, values = rows[rng.integers(len(rows))]
        value, plain = list(values.items())[rng.integers(len(values))]
        adjective, noun, detail = parts(plain, name)
        if attribute == "second":
            new = str(rng.choice([other for other in COLOURS if other != first]))
            adjective, detail, value = "", detail.replace(value, new), new
        words = dict(a="an" if (adjective + noun)[0] in "aeiou" else "a", adjective=adjective, noun=noun, detail=detail)
        text = TEMPLATES[rng.integers(len(TEMPLATES))].format(colour=first, **words)
        wanted = [(attribute, checker, value)] + [("colour", colour(), first)] * (name not in MOTTLED)
        # without the commas and semicolons that empty words leave
        text = re.sub(r" (?=[,;])|[,;] (?=[,;])", "", " ".join(text.split()).replace(", ,", ","))
        prompts.append(Prompt(text.strip(",; "), name, wanted))
    return prompts


def write_pairs(count, seed):
    """Prompts that name the colour and up to two other attributes of built-in shapes, so that they go together."""
    rng, source, prompts = np.random.default_rng(seed), BuiltIn("validation", count), []
    for row in range(count):
        name, attributes = source.shape(row).name, source.shape(row).attributes
        known = [(attribute, checker, attributes[attribute], values[attributes[attribute]])
                 for of, attribute, checker, values in ATTRIBUTES
                 if of == name and attribute not in ("colour", "second") and attributes[attribute] in values]
        chosen = [known[i] for i in rng.permutation(len(known))[:2]]
        adjectives, nouns, details = zip(*(parts(prompt, name) for *_, prompt in chosen))
        noun = next((other for other in nouns if other != name), name)            # a sedan
        text = " ".join(word for word in (*adjectives, attributes["colour"], noun) if word)
        text = f"{article(text)} {' and '.join(detail for detail in details if detail)}".strip()
        wanted = [(attribute, checker, value) for attribute, checker, value, _ in chosen]
        wanted += [("colour", colour(), attributes["colour"])] * (name not in MOTTLED)
        prompts.append(Prompt(text, name, wanted))
    return prompts


def typo(word, rng):
    """Two letters swapped, one left out, doubled, or replaced by a neighbour on the keyboard; never the first."""
    i = int(rng.integers(1, len(word) - 1))
    near = sorted(set("".join(a + b for a, b in NEIGHBOURS if word[i] in (a, b))) - {word[i]})
    typos = [word[:i] + word[i + 1] + word[i] + word[i + 2:], word[:i] + word[i + 1:], word[:i] + word[i] + word[i:],
             word[:i] + str(rng.choice(near)) + word[i + 1:]]
    return str(rng.choice([other for other in typos if other != word]))           # swapped equal letters change nothing


def write_variants(count, seed):
    """"a red chair" with a typo, in the plural, or with a synonym, in turn."""
    rng, prompts = np.random.default_rng(seed), []
    names = [name for name in CLASSES if name not in MOTTLED]
    while len(prompts) < count:
        name, kind = str(rng.choice(names)), len(prompts) % 3
        first = str(rng.choice(LEAVES if name == "tree" else list(COLOURS)))
        words, i = [first, name], int(rng.integers(2))
        if kind == 0 and len(words[i]) > 3:
            words[i] = typo(words[i], rng)
        elif kind == 1:
            words[1] = {"shelf": "shelves", "bench": "benches"}.get(name, f"{name}s")
        elif kind == 2 and words[i] in OTHER_NAMES:
            words[i] = str(rng.choice(OTHER_NAMES[words[i]]))
        else:
            continue
        text = " ".join(words) if kind == 1 else article(" ".join(words))
        prompts.append(Prompt(text, name, [("colour", colour(), first)]))
    return prompts


def evaluate_words(args):
    """Samples prompts in other words, with typos, plurals and synonyms: the right class and attributes?"""
    references, classes = exam.clouds_and_classes(exam.held_out(args), args.seed)
    rows, kinds = [], {"prompts": write_prompts(args.count, args.seed), "pairs": write_pairs(args.count, args.seed),
                       "variants": write_variants(args.count // 2, args.seed)}
    for folder, label in labels(args.checkpoint).items():
        model = exam.open_model(args, folder)
        cloud_of = exam.shape_result(model, "sdf", 64)
        for kind, prompts in kinds.items():
            cache = exam.result_cache(args, f"{label}-{kind}", folder, "research.words", "research.attributes")

            def result_of(tokens, job):
                found = measure_shape(field_of(model.heads["sdf"], tokens, model.autocast))
                wanted = prompts[int(job.name.split("-")[1])].wanted
                return cloud_of(tokens, job) | {"obeyed": np.mean([has_attribute(found, *want) for want in wanted])}

            jobs = [exam.Job(f"{kind}-{i}", prompt.text, None, (args.seed, i)) for i, prompt in enumerate(prompts)]
            results = exam.sample_all(model, jobs, cache, result_of)
            nearest = classes[chamfer_matrix(results["points"], references).argmin(1).numpy()]
            right, obeyed = nearest == np.array([prompt.name for prompt in prompts]), results["obeyed"]
            rows.append({"checkpoint": label, "kind": kind, "right class": right.mean(), "attributes": obeyed.mean(),
                         "all of them": (right & (obeyed == 1)).mean()})
            for prompt, ok, share in zip(prompts, right, obeyed):
                if not ok or share < 1:
                    print(f"{'' if ok else 'another class, '}{share:.1f} of its attributes: {prompt.text}")
    write_table(args.out, args.command, rows)
