"""built_in.py - the built-in shapes as a source of training samples (geometry/prepare.py)."""
import functools

import numpy as np

from geometry import shapes
from geometry.kinds import RECORDS
from geometry.prepare import CHUNK, SEED, TRAIN_SHAPES, counts, name_begins, short_digest

TEST_SHAPES = 520             # 40 of each class
TEST = 10_000_000             # the number of the first test shape: no training shape has a number as high
FIRST = {"train": 0, "test": TEST, "validation": 2 * TEST}    # settings are chosen on the last


class BuiltIn:
    """The built-in shapes of a split, of all classes in turn or of these."""
    files = 0
    pictures, positions = 2, 1                                # of a shape: as image prompts; it has a front

    def __init__(self, split, count=None, classes=None):
        self.first, self.skipped, self.classes = FIRST[split], [], classes
        default = TRAIN_SHAPES if split == "train" else TEST_SHAPES
        self.count = count or default * len(classes or shapes.CLASSES) // len(shapes.CLASSES)
        self.name = "-".join([f"{name_begins(None)}{split}", f"{self.count}", *(classes or ())])

    def folder(self, kind):
        return f"{kind.name}-{fingerprint(kind)}"

    def index(self, row):
        if not self.classes:
            return self.first + row
        turn, i = divmod(row, len(self.classes))
        offset = (shapes.CLASSES.index(self.classes[i]) - self.first) % len(shapes.CLASSES)
        return self.first + turn * len(shapes.CLASSES) + offset

    def shape(self, row):
        return shapes.make(SEED, self.index(row))

    def weight(self, row):                                    # all are drawn as often
        return 1.

    def origin(self, row):
        return {"index": self.index(row)}

    def in_split(self, row):
        return True


@functools.cache
def fingerprint(kind):
    """A digest of the code that makes samples of this kind: the captions, or the parts, of the first 260 shapes, and
    samples of one of every class (of pictures, which take long: of one). Samples of changed code go to another
    folder."""
    first = [shapes.make(SEED, row) for row in range(20 * len(shapes.CLASSES))]
    if kind == RECORDS:
        return short_digest(CHUNK, [(shape.name, shape.attributes, shape.captions) for shape in first])
    taken = [kind.take(shape, np.random.default_rng(0)) for shape in first[:kind.probes]]
    return short_digest(SEED, CHUNK, kind.name, *counts(BuiltIn, kind), [shape.parts for shape in first],
                        [np.float16(values).tobytes() for samples in taken for values in samples.values()])
