"""noise.py - random numbers that depend on a key alone: number i of a stream is a hash of key, stream and i.

    normal(keys_of([(0, 1), (0, 2)]), 0, (64, 16))            # 2 64 16: stream 0 of samples 1 and 2 of seed 0
"""
import math

import torch
from einops import rearrange

STEP = -0x61C8864680B583EB    # 2^64 / golden ratio, as int64


def mix(x):
    """The finaliser of SplitMix64: flipping one bit of x flips each bit of the result with probability 1/2."""
    x = (x ^ (x >> 30).bitwise_and_(2 ** 34 - 1)).mul_(-0x40A7B892E31B1A47)       # and: >> shifts copies of the sign in
    x = (x ^ (x >> 27).bitwise_and_(2 ** 37 - 1)).mul_(-0x6B2FB644ECCEEE15)
    return x ^ (x >> 31).bitwise_and_(2 ** 33 - 1)


def keys_of(seeds, device=None):
    """b seeds, whole numbers or tuples of one length -> their keys: b int64. Sampling's only copy to the device."""
    parts, keys = torch.tensor([seed if isinstance(seed, tuple) else (seed,) for seed in seeds], device=device), 0
    for part in parts.unbind(1):
        keys = mix(keys + part + STEP)
    return keys


def bits(keys, stream, shape):                                # b keys -> b *shape, int64
    index = torch.arange(1, math.prod(shape) + 1, device=keys.device)
    return mix(rearrange(mix(keys + stream), "b -> b 1") ^ mix(index * STEP)).view(-1, *shape)


def uniform(keys, stream, shape):                             # in (0, 1), symmetric, in steps of 2^-23: exact in fp32
    return ((bits(keys, stream, shape) >> 41).float() + .5) / 2 ** 23 + .5


def normal(keys, stream, shape):
    return math.sqrt(2) * (2 * uniform(keys, stream, shape) - 1).erfinv()
