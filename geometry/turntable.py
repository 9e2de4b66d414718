"""turntable.py - a GIF of one full turn of a shape.

    python sample.py --text "table" --turntable
"""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from engine.files import atomic_write


def turntable(shape, frames=24, size=256):
    """Pictures of one full turn of a shape (geometry/export.py), each by one thread: its tensors are
    too small for several."""
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=[1]) as pool:
        return list(pool.map(lambda i: shape.picture(size, azimuth=35 + 360 * i / frames), range(frames)))

def save_gif(path, frames):
    """All frames share one palette: so colours do not flicker."""
    palette = Image.fromarray(np.concatenate(frames[::6])).quantize(256)
    first, *rest = [Image.fromarray(frame).quantize(palette=palette) for frame in frames]
    with atomic_write(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=rest, duration=83, loop=0)      # 12 a second
