"""stage.py - the description of a stage for train.py: its name, its training function, its defaults."""
from collections.abc import Callable
from typing import NamedTuple


class Stage(NamedTuple):
    """A stage file describes its stages below their functions. train.py chains LTM3D's; a relative (relatives/) lists
    its own."""
    name: str
    train: Callable             # of a Run (engine/run.py), in paragraphs: data, model, training, save
    steps: int                  # defaults, tuned at size tiny
    batch: int
    lr: float                   # peak learning rate
    after: tuple = ()           # stages whose weights it is trained on
    flags: tuple = ()           # flags of train.py that decide what it learns, beside --size and --data
    kinds: tuple = ()           # of training samples (geometry/kinds.py) beside surfaces and those of heads
    smallest: int = 1           # minimum of shapes in a micro-batch
    variants: dict = {}         # other classes for what it trains: {name: class}


RELATIVES = {"vat": "vat-generator", "lost": "lost-generator", "latte3d": "latte3d-texture"}    # model: its last stage
