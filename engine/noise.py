"""noise.py - random numbers that depend on a key alone: number i of a stream is a hash of key, stream and i.

A generator with a state draws one number after another. Here every number is computed by itself, so all are made at
once where they are needed, and those of a sample depend on its key alone: not on its batch, nor on earlier draws. A CPU
and a GPU make the same bits.

    k = keys_of([(0, 1), (0, 2)], device)        # of samples 1 and 2 of seed 0: nothing else comes from the host
    normal(k, 0, (64, 16))                    # 2 64 16; the numbers of another stream are independent of these
"""
import math

import torch
from einops import rearrange

STEP = -0x61C8864680B583EB    # 2^64 / golden ratio, as int64


def mix(x):
    """The hash of SplitMix64: one other bit in x changes each bit of the result with probability 1/2. int64 wraps."""
    x = (x ^ x >> 30 & 2 ** 34 - 1) * -0x40A7B892E31B1A47     # & clears the copies of the sign that >> shifts in
    x = (x ^ x >> 27 & 2 ** 37 - 1) * -0x6B2FB644ECCEEE15
    return x ^ x >> 31 & 2 ** 33 - 1


def keys_of(seeds, device=None):
    """b seeds, each a whole number or a tuple of as many -> their keys: b int64."""
    parts, found = torch.tensor([seed if isinstance(seed, tuple) else (seed,) for seed in seeds], device=device), 0
    for part in parts.unbind(1):
        found = mix(found + part + STEP)
    return found


def bits(keys, stream, shape):                                # -> b *shape, int64
    index = torch.arange(1, math.prod(shape) + 1, device=keys.device)
    return mix(rearrange(mix(keys + stream), "b -> b 1") ^ mix(index * STEP)).view(-1, *shape)


def uniform(keys, stream, shape):                             # in (0, 1), symmetric, in steps of 2^-23: exact in fp32
    return ((bits(keys, stream, shape) >> 41 & 2 ** 23 - 1).float() + .5) / 2 ** 23


def normal(keys, stream, shape):
    return math.sqrt(2) * (2 * uniform(keys, stream, shape) - 1).erfinv()


def gumbel(keys, stream, shape):
    return -(-uniform(keys, stream, shape).log()).log()


def permutation(keys, stream, n):                             # -> b n
    return bits(keys, stream, (n,)).argsort(1)
