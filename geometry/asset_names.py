"""asset_names.py - what the name of a file in a kit of assets says: captions, and the family of its variants.

    tree_pineTallA_detailed.glb    "tall pine tree", "pine tree", "tree"                family "tree pine"
    Sword_Golden.glb               "golden sword", "sword"                              family "sword"

Makers of games draw a thing several times: tree A, B and C, with snow and without, of level 1, 2 and 3. Such variants
are a family. It is held out as a whole: an exam about a shape whose twin was learnt says nothing.

Captions are everyday English. Names begin with their noun (treePine) or end with it (PineTree), and some say nothing
(zenith, a spaceship): the tables below say which. `python -m geometry.real FOLDER` prints the captions of files.
"""
import re

VARIANTS = set("""age back bottom burnt center closed corner crop curve curved cut damaged dead default detailed double
    empty end filled first flat flowers front full group half harvested high inner large left level long low lvl mat
    medium mid middle mini moss narrow new old open opened outer pile quarter right rock round sample second short
    side single small snow square stage start stone straight tall thin third top transformed wide wood
    black blue brown dark gold golden gray green grey orange pink purple red white yellow""".split())
TILES = set("""block cliff corner floor ground hex path pipe platform rail river road roof stairs structure template
    terrain tile track wall window""".split())      # pieces of landscapes and buildings: half of some kits
KIT = re.compile(r"(kit|pack)s?(?![a-z])|modular", re.I)     # a folder with such a name holds things of all kinds

# ---------------------------------------------------------------------------- words of captions

# left out: codes, states of a drawing, names of persons and ships
SILENT = set("""age all allsides alternative and barbara basic beginning bob bottom bottompivot center challenger co
    collectible color colored colors complete decor default detail detailed dispatcher down exclusive executioner extra
    fernando filled finn flatshaded for front george id imperial in inner inset insurgent item items leela left leve
    level liner lvl mat mid middle mike mm modular no normal off omen outer pancake pickup primitive project prop props
    prototype rae resource right roe sample second secondary segment sidehouse sides speciaal spitfire stage stan start
    striker the third tier to transformed tsplit type ui unit up variant version way with without zenith""".split())
# groups of things; after them comes the noun
GROUPS = set("""building car character collectible debris enemy ground hazard item shape siege structure tool utensil
    vehicle weapon""".split())
# a noun only if the name has no other
ADJECTIVES = VARIANTS - {"first", "flowers", "pile", "rock", "stone"} | set("""angry animated arched armored asian
    autumn barred battered beach bent bevel big bigger broken built bundled bunk carved casual commercial cooked
    covered cracked crooked crushed curvy cushioned decorated decorative deep delivery deluxe demolished destroyed
    diagonal electric elevated endcap evil extralarge fall fancy fat fenced fi floating flying folded formal fortified
    four framed future gated gothic handed hanging hard heater hexagon hexagonal hidden hollow hooded horizontal
    individual inside japanese larger lit looking loose lower luxury lying medieval messy metal military modern mounted
    moving multiple one ornate outdoor outside oval packed painted pointy police posed private punk race raw rectangle
    rectangular relax retro rocky rotate rotating rounded running rustic sawed sci separate sharp simple sitting skew
    slant slanted sliced slim slope sloped smooth solid spacesuit spiky splayed split sports stacked standing steel
    steep striped strong suit swat tapered thick three triple twin two unlit upgraded upper vertical vintage walking
    walled waterless waving wireless wooden""".split())
# a noun, wherever it stands: what follows describes it
FIRST = set("""ammo arch architrave armchair armor arrow astronaut awning axe bag balcony barrel barrier beam bed bench
    blade block boat body bone book bookcase bottle bow bowl box bridge bucket bullet burger bush cabin cabinet cactus
    cake camera campfire can candle cannon capping carriage chair chest chimney cliff cloud club coaster coin column
    conveyor coping corridor couch craft crate crop crops cross crossbow crypt cube cup cupcake desk dock donut door
    doorway drawer driveway fence flag floor formation fountain gate grass grave gravestone grenade grip gun handguard
    handrail hangar heart hedge helmet house igloo kerb key knife lamp lantern light lightpost loaf locomotive lure
    magazine maki man mech monorail mountain mug mushroom muzzle pan panel parasol path pillar pipe plant planter plate
    platform popsicle pot potion present pumpkin queue rail railing railroad river road rocket rod rope rug run shaker
    shelf shelves shield ship shotgun shovel sign silo skirting skull snowman sofa spaceship speaker stairs stall
    statue stock stool sushi sword table tank target television tent terrain tile toilet torch tower track tractor
    train tree truck tunnel turret ufo umbrella van wagon wall washer wheelchair window woman worm""".split())
# at the end of a name, the noun
LAST = set("""antler ball bank base basin bath bed bench bin block blueprint board bottle bowl bracket broom brush
    bucket bud bundle card case chalkboard channel clip clock cloth conditioner cone crate cutter drain drawers fitting
    fountain frame grate guard guardrail hammer handle hanger head hinge holder hook house hydrant icon jar kit knob
    ladder launcher lid light lily lock mill mold moss opener ornament pad paddle paper peg pestle pile pit portal post
    pot profile rack railing roll roof saw screw shelf shelving sign slicer spade sponge spout stack stand stick stool
    stump switch tag tender ticket tin trap tray tub vase vent wedge wheel windmill""".split())
# after a noun: "with" them
PARTS = set("""antenna armrest arms arrows balcony banner barricade barrier berries books bricks broth candles cannon
    cereal coins column columns crystal crystals cushion decoration door doors doorway drawer dress fire flower flowers
    food fruit gate gates grass hairstyle hat headrest hills ingots ladder logs looping pillows planks rails rocks sail
    shirt shutters sidewalk sleeve soup spikes stairs stew stones tablecloth tanktop tea trees vent vents water weapon
    weeds wheat window windows""".split())

SPELLINGS = {                 # words in a row -> as everybody spells them
    "stack of breeze blocks": "brick stack", "chest of drawers": "dresser", "pallet of pipes": "pipe pallet",
    "skull no teeth": "skull", "stack of coins": "coin stack", "story gable roof": "house",
    "story round roof": "house", "table cross cloth": "table tablecloth", "aid hearing": "hearing aid",
    "barrel ar": "muzzle rifle", "barrel grenade": "muzzle grenade", "barrel pistol": "muzzle pistol",
    "barrel single": "muzzle", "book case": "bookcase", "brick frog": "brick mould", "building sheep": "sheep pasture",
    "burger cheese": "cheeseburger", "campfire pit": "campfire", "cannon ball": "cannonball",
    "character female": "woman", "character male": "man", "chinese coin": "coin", "craft miner": "miner spaceship",
    "craft racer": "racer spaceship", "craft speeder": "speeder spaceship", "desk chair": "chair",
    "detail overhang": "overhang roof", "dim sum": "dimsum", "doors roof": "doors", "first age": "",
    "ginger bread": "gingerbread", "glass wine": "wine glass", "gold ring": "ring", "grand stand": "grandstand",
    "grey corner": "corner wall", "hanging moss": "moss plant", "hex dumbbell": "hexagon dumbbell",
    "horse shoe": "horseshoe", "hot dog": "hotdog", "ice cream": "icecream", "knight character": "knight",
    "night stand": "nightstand", "pick axe": "pickaxe", "resource gold": "gold ore", "resource wood": "wooden pile",
    "road crossroad": "crossroad", "road roundabout": "roundabout", "saw horse": "sawhorse", "second age": "",
    "shiba inu": "shiba dog", "ship light": "ship", "snow flat": "snow patch", "space craft": "spaceship",
    "story stack": "house", "table cloth": "table tablecloth", "tank top": "tanktop", "train carriage": "carriage",
    "train locomotive": "locomotive", "train wagon": "wagon", "watch tower": "watchtower", "ac": "air conditioner",
    "ar": "rifle", "archery": "archery range", "armour": "armor", "chinese": "chinese takeaway box",
    "coaster": "roller coaster", "colum": "column", "cooking": "kitchen", "cop": "police car", "details": "panel",
    "firetruck": "fire truck", "hex": "tile", "houses": "house", "leafs": "leaves", "lightpost": "lamp post",
    "lollypop": "lollipop", "musterd": "mustard", "numbers": "number", "pinetree": "pine tree", "rond": "rounded",
    "simpletower": "simple tower", "smg": "machine gun", "soy": "soy sauce", "story": "house",
    "streetlight": "street light", "sub": "sub sandwich", "thea": "tea", "trashcan": "trash can",
    "trex": "tyrannosaurus", "wholer": "whole", "wood": "wooden", "woodfire": "campfire"}
KINDS = {                     # words of a kit's name -> what its things are
    "airplane": "airplane", "animal": "animal", "animals": "animal", "basic car": "car", "buildings": "building",
    "car": "car", "commercial": "building", "cube pets": "animal", "cute fish": "fish", "dinosaur": "dinosaur",
    "dinosaurs": "dinosaur", "farm animals": "animal", "fish": "fish", "industrial": "factory", "mech": "mech",
    "minigolf": "minigolf course", "modular men": "man", "modular women": "woman", "monster": "monster",
    "realistic car": "car", "spaceships": "spaceship", "suburban": "house", "tank": "tank"}
ALSO = {                      # a noun: names that are one too
    "burger": "cheeseburger", "campfire": "bonfire", "car": "ambulance hatchback sedan suv taxi", "dog": "husky pug",
    "gun": "blaster pistol revolver rifle shotgun smg sniper uzi", "shark": "hammerhead",
    "sword": "claymore gladius katana", "tower": "watchtower", "train": "locomotive",
    "tree": "birch oak palm pine willow"}
# words of kits: left out, and adjectives of a style
PACK = set("""animated asset assets background base builder character characters easy hexagon kay kaykit kit meshes
    mini new old pack posed prototype simple single textured town ultimate updated vol weapon""".split())
STYLES = set("""arcade castle city cyberpunk dungeon fantasy farm fi food forest graveyard holiday market medieval
    minigolf nature pirate platformer racing retro sci space survival toy urban""".split())


def split(name):
    """The words of a name, of two letters at least: "coffeeTable_02" -> [coffee, table], "TVStand" -> [tv, stand]."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return re.findall(r"[^\W\d_]{2,}", name.lower())


def family(name):
    """The words of a name without those that tell variants apart; the first one, if there are no others."""
    found = split(name)
    return " ".join(dict.fromkeys(word for word in found if word not in VARIANTS)) or " ".join(found[:1])


def weight(family):
    """How often a shape is drawn in training, relative to others."""
    return 1 / 3 if TILES & {*family.split()} else 1.


def spelled(name):
    """The words of a name that say something, as everybody spells them."""
    text = f" {' '.join(split(name))} "
    for written, spelling in SPELLINGS.items():
        text = text.replace(f" {written} ", f" {spelling} ")
    return [*dict.fromkeys(word for word in text.split() if word not in SILENT)]


def ordered(found):
    """Words -> adjectives, everyday name without them, noun: [tree, pine, tall] -> [tall], [pine, tree], tree."""
    adjectives = [word for word in found if word in ADJECTIVES]
    thing = [word for word in found if word not in ADJECTIVES]
    thing = thing[len(thing) > 1 and thing[0] in GROUPS:]
    if not thing:
        return found[1:], found[:1], found[0]
    if len(thing) > 1 and thing[-1] in LAST:
        return adjectives, thing, thing[-1]
    first = next((i for i, word in enumerate(thing) if word in FIRST), len(thing) - 1)
    parts = [word for word in thing[first + 1:] if word in PARTS]
    others = [word for word in thing[first + 1:] if word not in PARTS]
    joined = f"with {' and '.join(parts)}".split() if parts else []
    return adjectives, others + thing[:first + 1] + joined, thing[first]


def captions(name, kit):
    """A name in a kit -> captions. The last is the class: the everyday name without adjectives."""
    theme = [word for word in re.sub(r"(kit|pack)s?\b", " ", " ".join(split(kit))).split() if word not in PACK]
    kind, found = KINDS.get(" ".join(theme), "").split(), spelled(name)
    if not set(found) - ADJECTIVES:                           # the name has no noun: that of the kit
        found += kind
    adjectives, thing, noun = ordered(found or theme or split(kit) or split(name))
    style = [word for word in theme if word in STYLES and word not in thing]
    wider = [[word] for word, narrow in ALSO.items() if not {*narrow.split()}.isdisjoint(thing) and noun not in LAST]
    if noun not in FIRST | LAST and GROUPS.isdisjoint(found) or noun == "building":
        wider.append(kind)
    orders = [adjectives + thing, style + thing, [noun], *wider, thing]
    return [*dict.fromkeys(" ".join(words) for words in orders if words and words != thing), " ".join(thing)]
