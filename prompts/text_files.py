"""text_files.py - prompts from a file, and what sample.py says without flags.

    python sample.py --prompts prompts.txt                    # a text prompt on each line
"""
import textwrap
from pathlib import Path

from engine.commands import UserError
from geometry.sample_files import file_name
from prompts.reading import shipped

GUIDE = """Text or a picture becomes a shape.

{}

All nouns: python -m prompts.reading

    python sample.py --text "a red chair with arms" --n 4 --turntable
    python sample.py --text "a birthday cake" --best 4 --html          # a page to turn it in
    python sample.py --image assets/chair.png

All flags: python sample.py --help"""


def guide():
    known = (f"{folder} knows {', '.join(entry['nouns'])}" for folder, entry in shipped().items())
    return GUIDE.format("\n".join(textwrap.shorten(line, 300, placeholder=" ...") for line in known))


def read_prompts(path):
    """The lines of a file, but empty ones and copies."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a text file: {' '.join(str(error).split())[:160]}") from None
    if not (texts := list(dict.fromkeys(line.strip() for line in lines if line.strip()))):
        raise UserError(f"{path} has no prompt; write one on each line")
    if len({file_name(text, None) for text in texts}) < len(texts):
        raise UserError(f"{path}: two prompts have the same file names: their first 60 letters and digits are alike")
    return texts
