"""prompts/text_tower.py - stage 0: what a text prompt becomes. A text tower and a cloud tower, trained to agree.

LTM3D section 4 conditions on a frozen CLIP. Here both towers are trained from nothing, in minutes and
with the contrastive loss of CLIP, on the captions and clouds of the prepared shapes; then they are
frozen. The text tower's tokens condition the backbone; the cloud tower scores shape against text, and
teaches the tower for pictures (prompts/image_tower.py).

    text:   words -> condition tokens b t e and their mask b t
    cloud:  coloured oriented points -> one unit vector b e, near those of the captions true of it

    python train.py --rep sdf --stage encoders      # trains it
    python prompts/text_tower.py "a round table"              # which words it puts nearest to a prompt
"""
import difflib
import math
import sys
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

from engine.commands import Parser, UserError, command
from engine.files import load_model, read_stage
from engine.networks import Block, fourier
from geometry.captions import FILLERS, words

SIZES = {  # dim is also e, the width of a condition token
    "tiny": dict(dim=128, depth=2, heads=4),
    "small": dict(dim=256, depth=4, heads=8),
    "base": dict(dim=512, depth=6, heads=8),
    "large": dict(dim=768, depth=8, heads=12),
}
LENGTH = 32    # words of a prompt that are read; the longest built-in caption has 20
POINTS = 256   # per cloud; twice as many cost twice the time and, minute for minute, learnt less
BANDS = 6      # finest wavelength 4 / 2^5 = .125, about the thickness of a part
QUERIES = 16   # one query sees only averages over the cloud; counting the boards of a shelf takes several


def vocabulary(captions):
    """Every word of the captions (an iterable of strings), sorted."""
    return sorted({word for caption in captions for word in words(caption)})


class TextAndCloud(nn.Module):
    """The two towers and the temperature they are compared at."""

    def __init__(self, vocabulary, dim, depth, heads):
        super().__init__()
        self.width = dim                                      # e
        self.vocabulary, self.index = list(vocabulary), {word: i for i, word in enumerate(vocabulary)}
        self.told = set()                                     # words already warned about
        self.word = nn.Embedding(len(self.vocabulary), dim)
        self.place = nn.Parameter(torch.randn(LENGTH, dim) * dim ** -.5)
        nn.init.normal_(self.word.weight, std=dim ** -.5)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.text_out = nn.Linear(dim, dim, bias=False)
        self.point = nn.Sequential(nn.Linear(3 + 6 * BANDS + 6, dim), nn.GELU(), nn.Linear(dim, dim))
        self.query = nn.Parameter(torch.randn(QUERIES, dim) * dim ** -.5)
        self.cross = Block(dim, heads, context_dim=dim)
        self.mix = nn.ModuleList(Block(dim, heads) for _ in range(2))
        self.cloud_out = nn.Sequential(nn.LayerNorm(QUERIES * dim), nn.Linear(QUERIES * dim, dim, bias=False))
        self.scale = nn.Parameter(torch.tensor(math.log(1 / .07)))   # log(1 / temperature), from where CLIP starts

    def text(self, ids, mask):                                # b t, True = a word -> condition b t e, unit scale
        x = self.word(ids) + self.place[:ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.norm(x)

    def embed_text(self, ids, mask):                          # -> b e, on the unit sphere
        weight = rearrange(mask / mask.sum(1, keepdim=True), "b t -> b t 1")   # a mean: every token has to carry its share
        return F.normalize(self.text_out(reduce(self.text(ids, mask) * weight, "b t e -> b e", "sum")).float(), dim=-1)

    def embed_cloud(self, points, normals, colours):          # b k 3 each -> b e, on the unit sphere
        context = self.point(torch.cat([fourier(points, BANDS), normals, colours], -1))
        x = self.cross(repeat(self.query, "q e -> b q e", b=len(points)), context)
        for mix in self.mix:
            x = mix(x)
        return F.normalize(self.cloud_out(rearrange(x, "b q e -> b (q e)")).float(), dim=-1)

    def loss(self, ids, mask, cloud, true):
        """Symmetric InfoNCE with several positives. true: b b, [i, j] = caption i holds for cloud j.

        s_ij = <text_i, cloud_j> / temperature;   P(i) = {j: true_ij}
        L = mean_i mean_{j in P(i)} -log( e^s_ij / (e^s_ij + sum_{k not in P(i)} e^s_ik) ), and the same down
        the columns, halved. CLIP has P(i) = {i}; here "a table" is true of many clouds of a batch, and each
        of them is a positive of its own and no other's negative. The fraction is a sigmoid: -log is softplus.
        """
        text, cloud = self.embed_text(ids, mask), self.embed_cloud(*cloud)
        with torch.autocast(text.device.type, enabled=False):
            score = text @ cloud.T * self.scale.exp().clamp(max=100)          # CLIP's limit: 1 / .01
            total = 0
            for s, positive in ((score, true), (score.T, true.T)):
                against = s.masked_fill(positive, -1e4).logsumexp(1, keepdim=True)
                each = F.softplus(against - s) * positive                     # b b
                total = total + (each.sum(1) / positive.sum(1)).mean() / 2
        hit = [true.gather(1, score.argmax(1, keepdim=True)), true.T.gather(1, score.T.argmax(1, keepdim=True))]
        return total, {"text_to_cloud": hit[0].float().mean(), "cloud_to_text": hit[1].float().mean(),
                       "temperature": (-self.scale).exp().detach()}

    def known(self, prompt):
        """A prompt -> the ids of the words in it that this encoder knows; complains about the others."""
        said = words(prompt)
        found = [word for word in said if word in self.index]
        if not set(found) - FILLERS:
            examples = ", ".join([word for word in self.vocabulary if word.isalpha() and word not in FILLERS][:20])
            what = f"'{' '.join(prompt.split())[:60]}' names nothing this encoder knows" if said else "is empty"
            raise UserError(f"the prompt {what}; name one of {examples}")
        for word in dict.fromkeys(said):                      # each once, in order
            if word not in self.index and word not in self.told:
                self.told.add(word)
                near = difflib.get_close_matches(word, self.vocabulary) or ["none is spelt like it"]
                print(f"warning: '{word}' is not a word this encoder knows; nearest: {', '.join(near)}; left out", file=sys.stderr)
        if len(found) > LENGTH:
            print(f"warning: a prompt of {len(found)} words is cut after {LENGTH}: '... {found[LENGTH - 1]}'", file=sys.stderr)
        return [self.index[word] for word in found[:LENGTH]]

    def tokenise(self, prompts):
        """A list of strings -> ids b t and mask b t (True = a word), as long as the longest needs."""
        rows = [self.known(prompt) for prompt in prompts]
        length = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(length.max())) < rearrange(length, "b -> b 1")
        ids = torch.zeros(mask.shape, dtype=torch.long)
        ids[mask] = torch.tensor([i for row in rows for i in row])
        return ids.to(self.scale.device), mask.to(self.scale.device)

    @torch.no_grad()
    def tokens(self, prompts):
        """A list of strings -> condition b t e, mask b t: what the prefix of the backbone reads."""
        ids, mask = self.tokenise(prompts)
        return self.text(ids, mask), mask


class BagOfWords:
    """A bag of words for a text tower: one condition token, the sum of a fixed random vector of each word, in whatever order."""
    width = 128

    def __init__(self, device):
        self.device = device

    def tokens(self, prompts):                                # -> condition b 1 e, mask b 1
        vectors = [[np.random.default_rng(crc32(word.encode())).standard_normal(self.width) for word in words(prompt)] for prompt in prompts]
        if not all(vectors):
            raise UserError("a prompt is empty; say what to make")
        out = torch.tensor(np.array([[np.sum(some, 0)] for some in vectors]), dtype=torch.float, device=self.device)
        return out, torch.ones(out.shape[:2], dtype=torch.bool, device=self.device)


# ---------------------------------------------------------------------------- training and evaluation

def training_batch(prepared, encoders, rng, batch=128):
    """`batch` shapes, one caption and one cloud each -> ids, mask, cloud, true (what `loss` takes)."""
    classes = np.array(prepared.classes)
    alike = np.isin(classes, rng.choice(np.unique(classes), min(2, len(np.unique(classes))), replace=False))
    rows = rng.permutation(np.flatnonzero(alike) if rng.random() < .5 else len(prepared))[:batch]     # half of the batches: finer differences
    captions = prepared.draw_captions(rows, rng)
    lists = [frozenset(prepared.captions[row]) for row in rows]
    true = torch.tensor([[caption in there for there in lists] for caption in captions])
    return *encoders.tokenise(captions), prepared.cloud(rows, POINTS, rng), true


@torch.no_grad()
def retrieval(encoders, prepared, count=200):
    """On held-out shapes: does a cloud find its class name, and a full caption its cloud? -> shares of 1."""
    rows = np.linspace(0, len(prepared) - 1, min(count, len(prepared))).astype(int)
    device = encoders.scale.device
    cloud = [x.to(device) for x in prepared.cloud(rows, POINTS, np.random.default_rng(0))]
    cloud = torch.cat([encoders.embed_cloud(*part) for part in zip(*(x.split(64) for x in cloud))])
    classes, names = [prepared.classes[row] for row in rows], sorted(set(prepared.classes))
    best = (cloud @ encoders.embed_text(*encoders.tokenise(names)).T).argmax(1).tolist()
    right = sum(names[i] == name for i, name in zip(best, classes)) / len(rows)
    captions = [max(prepared.captions[row], key=len) for row in rows]
    # a caption is true of another shape too if that shape has the same visible attributes, or lists the same words
    looks = [(prepared.classes[row], prepared.text[row]["attributes"]) for row in rows]
    true = torch.tensor([[look == other or caption in prepared.captions[row] for other, row in zip(looks, rows)]
                         for look, caption in zip(looks, captions)])
    order = (encoders.embed_text(*encoders.tokenise(captions)) @ cloud.T).argsort(1, descending=True).cpu()
    first, five = (round(true.gather(1, order[:, :k]).any(1).float().mean().item(), 4) for k in (1, 5))
    return {"shapes": len(rows), "class_accuracy": right, "recall_at_1": first, "recall_at_5": five}


def load(folder):
    """The encoders of a checkpoint folder, frozen."""
    entry = read_stage(folder, "encoders")
    return load_model(TextAndCloud, f"{folder}/encoders.safetensors", vocabulary=entry["vocabulary"], **entry["settings"])


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("prompt", help="what to look up")
    parser.add_argument("--checkpoint", default="checkpoints/tiny", help="folder that train.py made")
    args = parser.parse_args()
    encoders = load(args.checkpoint)
    ours = encoders.embed_text(*encoders.tokenise([args.prompt]))             # 1 e
    names = [word for word in encoders.vocabulary if word not in FILLERS]
    score = (encoders.embed_text(*encoders.tokenise(names)) @ ours.T)[:, 0]
    for i in score.argsort(descending=True)[:8].tolist():
        print(f"{score[i]:6.2f}  {names[i]}")


if __name__ == "__main__":
    command(main)
