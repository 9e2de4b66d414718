"""kinds.py - what a kind of training samples is. Prepared sets have samples of some kinds (geometry/prepare.py).

SURFACE and PICTURES are in geometry/training_samples.py; others are beside what trains on them (representations/,
relatives/prior.py).
"""
from collections.abc import Callable
from dataclasses import dataclass, field

GREY = .7                     # the colour of files without colours


@dataclass(frozen=True)
class Kind:
    """A kind of training samples: the arrays that it fills, a row for each shape."""
    name: str
    arrays: dict = field(compare=False)                       # name: dtype, shape of a row
    take: Callable = field(compare=False)                     # a shape, a generator of numpy -> {name: values of a row}
    several: str = field(default="", compare=False)           # "pictures" or "positions": a shape has source.pictures
                                                              # or source.positions; `take` gets their number
    probes: int = field(default=13, compare=False)            # shapes whose samples are compared (geometry/built_in.py)


def take_nothing(shape, rng):
    return {}


RECORDS = Kind("records", {}, take_nothing)                   # class, attributes, captions: JSON (geometry/prepare.py)
