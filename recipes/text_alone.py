"""text_alone.py - train.py for names of files: the backbone learns more often from text alone.

    python recipes/text_alone.py --data path/to/assets --size mini --stage backbone  # flags of train.py; see assets.sh
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import encoders  # noqa: E402 - this file is a folder below
import train  # noqa: E402

encoders.KEPT["text", "image"] = {(): .1, ("text",): .6, ("image",): .15, ("text", "image"): .15}

if __name__ == "__main__":
    train.command(train.main)
