"""Prints digests of the tokens that checkpoints/tiny makes of six prompts, with and without a picture and RGS.

    python .ci/same_tokens.py > after.txt        # on one machine, before and after a change that changes nothing
"""
import hashlib
import inspect
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path.cwd()))
from sample import load  # noqa: E402  the code of the folder that this is run in

torch.set_num_threads(1)                                      # sums depend on the number of threads
PROMPTS = ["table", "a red chair with arms", "a floor lamp", "an aeroplane with two engines",
           "a shelf with three boards", "a 3d model of a mug, in the style of a tall blue mug with a handle"]
model = load()
if "rgs" in inspect.signature(model.tokens).parameters:
    rules = {"none": {"rgs": "none"}, "blend": {"rgs": "sampled=.1"}, "text": {"rgs": "recon=.1"},
             "within": {"rgs": "within=1.5"}}
else:
    rules = {"none": {"alpha": None}, "blend": {"alpha": .1}, "text": {"alpha": .1, "convention": "text"},
             "within": {"within": 1.5}}
generator = torch.Generator().manual_seed(0)
pictures = torch.rand(len(PROMPTS), 3, 64, 64, generator=generator)
for what, prompts, seen in (("text", PROMPTS, None), ("picture", None, pictures), ("both", PROMPTS, pictures)):
    for rule, options in rules.items():
        tokens = model.tokens(prompts, [(0, i) for i in range(len(PROMPTS))], seen, **options)
        print(f"{what:8} {rule:7} {hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]}")
