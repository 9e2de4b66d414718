"""codes.py - codes are whole numbers: found by a codebook, drawn from logits, packed into a small file.

    magic "VAT1"    fingerprint of the weights, 6 bytes    CRC-32 of what follows, 4 bytes    the codes, packed

All bits form one row, the lowest of a code first; every eight are a byte, its highest first. Numbers: little-endian.
"""
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import nn

from engine.commands import UserError
from engine.files import atomic_write
from engine.noise import uniform

HEAD = struct.Struct("<4s6sI")
MAGIC = b"VAT1"                                               # with the version


class Codebook(nn.Module):
    """v vectors of c numbers. In training, those that are hardly ever chosen become vectors of the batch."""
    RARE = .03                                                # times the mean; all scales of a batch count together

    def __init__(self, codes, channels):
        super().__init__()
        self.code = nn.Parameter(torch.randn(codes, channels) * .5)               # v c: what the codes stand for
        self.register_buffer("use", torch.ones(codes))        # how often a code was chosen lately; 1: the mean
        self.bits = (codes - 1).bit_length()                  # of a code

    def forward(self, indices):
        return self.code[indices]

    @torch.no_grad()
    def nearest(self, x):                                     # b n c -> b n
        chosen = torch.cdist(x, self.code).argmin(-1)
        if self.training and self.code.requires_grad:
            self.use.lerp_(shares(chosen, len(self.use)) * len(self.use), .01)
            dead, x = self.use < self.RARE, rearrange(x, "b n c -> (b n) c")      # v
            drawn = x[torch.randint(len(x), dead.shape, device=x.device)]         # v c
            self.code.copy_(torch.where(dead[:, None], drawn, self.code))
            self.use.masked_fill_(dead, 1.)
        return chosen


def shares(indices, codes):
    """The share of each code in a tensor, v. (torch.bincount waits for a GPU.)"""
    indices = indices.flatten()
    one = torch.ones(1, device=indices.device).expand(len(indices))
    return torch.zeros(codes, device=indices.device).scatter_add(0, indices, one) / len(indices)


def code_use(indices, codes):
    """The share of all codes that occur in a tensor; perplexity, e^entropy: the effective number of codes."""
    share = shares(indices, codes)
    return {"code use": (share > 0).float().mean(), "perplexity": torch.special.entr(share).sum().exp()}


def draw_codes(logits, keys, stream, top_k, top_p, temperature):
    """Logits b n v and keys b (engine/noise.py) -> codes b n. top_k and top_p cut before the temperature acts."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered > top_p         # likelier ones have that share already
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    gumbel = -(-uniform(keys, stream, logits.shape[1:]).log()).log()
    return (logits + temperature * gumbel).argmax(-1)


def pack(codes, bits):                                        # n whole numbers -> bytes
    return np.packbits((np.asarray(codes)[:, None] >> np.arange(bits)) & 1).tobytes()


def unpack(raw, bits, count):
    digits = np.unpackbits(np.frombuffer(raw, np.uint8))[:count * bits].reshape(count, bits)
    return (digits.astype(int) << np.arange(bits)).sum(1)


def file_size(count, bits):
    return HEAD.size + -(-count * bits // 8)


def write_codes(path, codes, bits, fingerprint):
    """n codes below 2^bits; fingerprint: twelve hex digits (files.digest)."""
    packed = pack(codes, bits)
    with atomic_write(path) as part:
        part.write_bytes(HEAD.pack(MAGIC, bytes.fromhex(fingerprint), zlib.crc32(packed)) + packed)


def read_codes(path, book, count, fingerprint):
    """-> the codes of a file, `count` of them. It may come from a stranger: all is checked but spare bits."""
    length = file_size(count, book.bits)
    try:
        with Path(path).open("rb") as file:
            raw = file.read(length + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a file that compress wrote") from None
    if len(raw) < HEAD.size or not raw.startswith(MAGIC):
        raise UserError(f"{path} is no file that compress wrote; make one: "
                        "python -m relatives.vat compress chair.glb chair.vat")
    _, found, check = HEAD.unpack(raw[:HEAD.size])
    if found.hex() != fingerprint:
        raise UserError(f"{path} was written with weights {found.hex()}, not {fingerprint}; give their --checkpoint")
    codes = unpack(raw[HEAD.size:], book.bits, count) if len(raw) == length else None
    if codes is None or zlib.crc32(raw[HEAD.size:]) != check or codes.max() >= len(book.code):
        raise UserError(f"{path} is truncated or was altered; compress the shape again")
    return codes
