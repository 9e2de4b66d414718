"""crop.py - a picture is cropped to its object, as the image tower takes it."""
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

SIZE = 64             # pixels along a side of the pictures that the image tower takes
MARGIN = .06          # share of the side that stays empty around the object


def crop_to_object(pixels):
    """h w c, the last channel is coverage -> SIZE SIZE c: the square around the object, the rest times coverage."""
    pixels = np.concatenate([pixels[..., :-1] * pixels[..., -1:], pixels[..., -1:]], -1)                # h w c
    rows, columns = (np.flatnonzero((pixels[..., -1] > .5).any(axis)) for axis in (1, 0))
    if not len(rows):                                         # a sheet from its edge covers no pixel
        return np.zeros((SIZE, SIZE, pixels.shape[-1]), np.float32)
    low = np.array([rows[0], columns[0]])
    high = np.array([rows[-1], columns[-1]]) + 1
    side = (high - low).max() / (1 - 2 * MARGIN)
    pad = int(np.ceil(side))
    top, left = (int(round(centre + pad - side / 2)) for centre in (low + high) / 2)

    x = rearrange(torch.from_numpy(pixels.astype(np.float32)), "h w c -> 1 c h w")
    x = F.pad(x, [pad] * 4)[..., top:top + pad, left:left + pad]
    x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return rearrange(x[0], "c h w -> h w c").numpy()
