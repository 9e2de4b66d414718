"""record1.py - train.py, as the first record of docs/RECORDS.md changes it: the backbone learns from words alone, and
more often from the longest caption of a shape.

    python -m research.race --recipe recipes/record1.sh
"""
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import backbone  # noqa: E402 - this file is a folder below
import encoders  # noqa: E402
import train  # noqa: E402

SHOWN, LONGEST = .9, .6       # shares of prompts: not dropped; the longest caption, not any


class Words(encoders.Encoders):
    """The goal's prompts are texts: no picture is prepared, drawn or encoded for the backbone."""

    @staticmethod
    @functools.cache
    def longest(split):                                       # -> the number of each shape's longest caption
        number = {text: i for i, text in enumerate(split.table.texts)}
        return torch.tensor([number[max(own, key=len)] for own in split.captions], device=split.device)

    def draw(self, split, rows):
        whole, shown = (torch.rand(len(rows), device=split.device) < share for share in (LONGEST, SHOWN))
        captions = torch.where(whole, self.longest(split)[rows], split.table.draw(rows))
        return {"text": self.cache("text", split).draw(captions), "shown": {"text": shown}, "rows": rows}


encoders.Encoders = Words
backbone.STAGE = backbone.STAGE._replace(kinds=())

if __name__ == "__main__":
    train.command(train.main)
