"""asset_names.py - what the name of a file in a kit of assets says: captions, and the family of its variants.

    tree_pineTallA_detailed.glb    "detailed tall pine tree"       family "tree pine"
    Sword_Golden.glb               "golden sword"                  family "sword"

Makers of games draw a thing several times: tree A, B and C, with snow and without, of level 1, 2 and 3. Such variants
are a family. It is held out as a whole: an exam about a shape whose twin was learnt says nothing.
"""
import re

VARIANTS = set("""age back bottom burnt center closed corner crop curve curved cut damaged dead default detailed double
    empty end filled first flat flowers front full group half harvested high inner large left level long low lvl mat
    medium mid middle mini moss narrow new old open opened outer pile quarter right rock round sample second short
    side single small snow square stage start stone straight tall thin third top transformed wide wood
    black blue brown dark gold golden gray green grey orange pink purple red white yellow""".split())
SILENT = {"default", "level", "lvl", "mat", "sample", "stage", "transformed"}     # variants that say nothing of a shape
TILES = set("""block cliff corner floor ground hex path pipe platform rail river road roof stairs structure template
    terrain tile track wall window""".split())      # pieces of landscapes and buildings: half of some kits
KIT = re.compile(r"(kit|pack)s?(?![a-z])|modular", re.I)     # a folder with such a name holds things of all kinds


def split(name):
    """The words of a name, of two letters at least: "coffeeTable_02" -> [coffee, table], "TVStand" -> [tv, stand]."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return re.findall(r"[^\W\d_]{2,}", name.lower())


def family(name):
    """The words of a name without those that tell variants apart; the first one, if there are no others."""
    found = split(name)
    return " ".join(dict.fromkeys(word for word in found if word not in VARIANTS)) or " ".join(found[:1])


def odds(family):
    """How often a shape is drawn in training, relative to others."""
    return 1 / 3 if TILES & {*family.split()} else 1.


def captions(name, kit):
    """A name in a kit -> captions. The last is the family. A name may begin with its noun (treePine) or end with it
    (PineTree): there are captions for both."""
    thing = family(name).split()
    if not thing:
        return []
    said = [word for word in split(name) if word in VARIANTS - SILENT and word not in thing]
    orders = [" ".join(words) for words in (said + thing, said + thing[::-1], thing[::-1])]
    return [*dict.fromkeys(orders), f"{orders[0]} from the {' '.join(split(kit))}", " ".join(thing)]
