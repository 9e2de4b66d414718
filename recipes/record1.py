"""record1.py - train.py with what the first record of docs/RECORDS.md changes: tokens by convolutions, words alone.

    bash recipes/record1.sh
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import backbone  # noqa: E402 - this file is a folder below
import encoders  # noqa: E402
import tokenizer  # noqa: E402
import train  # noqa: E402


class Words(encoders.Encoders):
    """The goal's prompts are texts: no picture is prepared, drawn or encoded for the backbone."""
    SHOWN = .9                                                # share of captions that are not dropped

    def draw(self, split, rows):
        shown = torch.rand(len(rows), device=split.device) < self.SHOWN
        return {"text": self.cache("text", split).draw(split.table.draw(rows)), "shown": {"text": shown}, "rows": rows}


encoders.Encoders = Words
tokenizer.SIZES["tiny"]["conv"] = 4
train.LTM3D = [stage._replace(kinds=()) if stage is backbone.STAGE else stage for stage in train.LTM3D]

if __name__ == "__main__":
    train.command(train.main)
