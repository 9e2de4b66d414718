"""digests.py - digests of the tokens sampled with the shipped weights: does an edit change what is computed?

Compare the output before and after an edit, on one machine: rounding differs between machines.

    python -m research.digests > out/before.txt
"""
import hashlib

import torch

from sample import load

TOYS = ("a red chair with arms", "a round table", "a tall lamp", "a shelf with three boards", "a blue car",
        "a mug without a handle")
ASSETS = "a green pine tree", "a wooden chest", "a house", "a stone bridge", "a red car", "a fence"
FOLDERS = {  # folder: prompts, rules of RGS
    "checkpoints/tiny": (TOYS, (None, "sampled=.1", "within=2")),
    "checkpoints/assets": (ASSETS, (None, "sampled=.1", "within=2")),
    "checkpoints/vat": (TOYS, (None,)), "checkpoints/lost": (TOYS, (None,))}


def main():
    torch.set_num_threads(1)                                  # the order of sums depends on threads
    for folder, (prompts, rules) in FOLDERS.items():
        model = load(folder, "cpu", "fp32")
        for rgs in rules:
            options = {"rgs": rgs} if rgs else {}
            tokens = [model.sample(prompt, seed=3, **options) for prompt in prompts]
            tokens += [model.sample(text, "assets/chair.png", n=n, seed=3, **options)
                       for text, n in ((None, 1), (prompts[0], 2))]
            print(folder, rgs, *(hashlib.sha256(x.numpy().tobytes()).hexdigest()[:12] for x in tokens), flush=True)


if __name__ == "__main__":
    main()
