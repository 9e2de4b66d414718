"""text_tower.py - a text prompt becomes condition tokens. A text tower and a cloud tower learn to agree.

LTM3D section 4 conditions on a frozen CLIP. Here both towers are trained in minutes on prepared shapes.
The text tower is frozen then; it conditions the backbone. The cloud tower scores shapes against texts, and goes on
learning beside the image tower (prompts/image_tower.py).

    text:   words -> condition tokens b t e and their mask b t
    cloud:  coloured oriented points -> one unit vector b e, close to the vectors of captions that are true of it

    python train.py --rep sdf --stage encoders       # trains both towers
"""
import math
from functools import lru_cache, partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

from engine.files import load_model, read_stage
from engine.networks import Block, fourier
from geometry.words import words
from prompts.reading import LENGTH, Reading

SIZES = {  # dim is also e, the width of a condition token
    "tiny": dict(dim=128, depth=2, heads=4), "mini": dict(dim=128, depth=2, heads=4),
    "small": dict(dim=256, depth=4, heads=8),
    "base": dict(dim=512, depth=6, heads=8), "large": dict(dim=768, depth=8, heads=12),
}
POINTS = 256   # per cloud; twice as many cost twice the time, and the towers learn less in a minute
BANDS = 6      # finest wavelength 4 / 2^5 = .125, about the thickness of a part
QUERIES = 16   # one query only averages over the cloud; to count the boards of a shelf takes several
NO_WORD = ""   # stands for a text without known words, such as a caption of a held-out shape


def vocabulary(captions):
    """NO_WORD and every word of the captions, sorted."""
    return sorted({NO_WORD} | {word for caption in captions for word in words(caption)})


def info_nce(s, positive, negative):
    """InfoNCE with several positives. s: b k, similarities over the temperature; booleans b k.

        L = mean_i mean_{j in P(i)} -log( e^s_ij / (e^s_ij + sum_{l in N(i)} e^s_il) )

    Rows without a positive do not count. The fraction is a sigmoid: -log is softplus."""
    negatives = s.masked_fill(~negative, -1e4).logsumexp(1, keepdim=True)         # b 1
    losses = F.softplus(negatives - s) * positive                                 # b k
    return (losses.sum(1) / positive.sum(1).clamp(min=1)).sum() / positive.any(1).sum().clamp(min=1)


class TextAndCloud(nn.Module):
    """The two towers, and the temperature of their comparison."""

    def __init__(self, vocabulary, nouns, dim, depth, heads):
        super().__init__()
        self.width = dim                                      # e
        self.vocabulary, self.index = list(vocabulary), {word: i for i, word in enumerate(vocabulary)}
        self.nouns = dict(nouns)                              # {noun: words of its captions} (reading.nouns_of)
        self.read = lru_cache(4096)(partial(Reading, vocabulary=self.index, nouns=self.nouns))    # a prompt -> Reading
        self.word = nn.Embedding(len(self.vocabulary), dim)
        self.pos_embed = nn.Parameter(torch.randn(LENGTH, dim) * dim ** -.5)
        nn.init.normal_(self.word.weight, std=dim ** -.5)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.text_out = nn.Linear(dim, dim, bias=False)
        self.point = nn.Sequential(nn.Linear(3 + 6 * BANDS + 6, dim), nn.GELU(), nn.Linear(dim, dim))
        self.query = nn.Parameter(torch.randn(QUERIES, dim) * dim ** -.5)
        self.cross = Block(dim, heads, context_dim=dim)
        self.mix = nn.ModuleList(Block(dim, heads) for _ in range(2))
        self.cloud_out = nn.Sequential(nn.LayerNorm(QUERIES * dim), nn.Linear(QUERIES * dim, dim, bias=False))
        self.scale = nn.Parameter(torch.tensor(math.log(1 / .07)))      # log(1 / temperature), starts as in CLIP

    def text(self, ids, mask):                                # b t, True = a word -> condition b t e, unit scale
        x = self.word(ids) + self.pos_embed[:ids.shape[1]]                        # b t e
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.norm(x)

    def embed_text(self, ids, mask):                          # -> b e, on the unit sphere
        weight = rearrange(mask / mask.sum(1, keepdim=True), "b t -> b t 1")      # a mean: every token has an effect
        mean = reduce(self.text(ids, mask) * weight, "b t e -> b e", "sum")
        return F.normalize(self.text_out(mean).float(), dim=-1)

    def embed_cloud(self, points, normals, colours):          # b k 3 each -> b e, on the unit sphere
        context = self.point(torch.cat([fourier(points, BANDS), normals, colours], -1))        # b k e
        x = self.cross(repeat(self.query, "q e -> b q e", b=len(points)), context)             # b q e
        for block in self.mix:
            x = block(x)
        return F.normalize(self.cloud_out(rearrange(x, "b q e -> b (q e)")).float(), dim=-1)

    def loss(self, ids, mask, cloud, true):
        """Symmetric InfoNCE over b captions and b clouds. true: b b, [i, j] = caption i is true of cloud j. In CLIP, i
        is true of i alone. Here "a table" is true of many clouds of a batch: each is a positive."""
        return self.contrast(self.embed_text(ids, mask), self.embed_cloud(*cloud), true)

    def contrast(self, text, cloud, true):                    # b e each, b b
        with torch.autocast(text.device.type, enabled=False):
            score = text @ cloud.T * self.scale.exp().clamp(max=100)              # b b; 100 is CLIP's limit
            total, hits = 0, []
            for s, positive in ((score, true), (score.T, true.T)):
                total = total + info_nce(s, positive, ~positive) / 2
                hits.append(positive.gather(1, s.argmax(1, keepdim=True)).float().mean())      # is the best one right?
        return total, {"text_to_cloud": hits[0], "cloud_to_text": hits[1], "temperature": (-self.scale).exp().detach()}

    def freeze_text(self):
        """From now on, the cloud tower alone learns."""
        self.requires_grad_(False)
        self.query.requires_grad_()
        for part in (self.point, self.cross, self.mix, self.cloud_out):
            part.requires_grad_()

    def remarks(self, prompt):
        """The warnings about a prompt; an error if it names no object that can be generated."""
        return self.read(prompt).remarks()

    def word_ids(self, prompts):
        """b strings -> ids b t and mask b t (True = a word); t is the length of the longest prompt."""
        rows = [torch.tensor([self.index[word] for word in self.read(prompt).words or [NO_WORD]]) for prompt in prompts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)                   # b t
        mask = nn.utils.rnn.pad_sequence([row >= 0 for row in rows], batch_first=True)         # b t
        return ids.to(self.scale.device), mask.to(self.scale.device)

    @torch.no_grad()
    def tokens(self, prompts):
        """b strings -> condition b t e and mask b t: the input of Prefix Learning."""
        ids, mask = self.word_ids(prompts)
        return self.text(ids, mask), mask

    def cache(self, split):
        """The word ids of a set's captions: `take(captions)` -> ids and mask, b t, on its device."""
        ids, mask = (x.to(split.device) for x in self.word_ids(split.table.texts))
        return SimpleNamespace(take=lambda captions: (ids[captions], mask[captions]))


# ---------------------------------------------------------------------------- training and evaluation

def training_batch(prepared, words, batch=128):
    """The input of `loss`. Half of the batches begin with all shapes of two classes: they teach finer differences."""
    half = torch.rand(1, device=prepared.device) < .5
    return captions_and_clouds(prepared, words, prepared.draw_distinct(batch, first=half & prepared.of_two_classes()))


def captions_and_clouds(prepared, words, rows):
    """A caption and a cloud of each row -> ids, mask, cloud, true: the input of `loss`."""
    captions = prepared.table.draw_captions(rows)                                 # b
    return *words.take(captions), prepared.cloud(rows, POINTS), prepared.table.true(captions, rows)


def load(folder):
    """The towers of a checkpoint folder, frozen."""
    entry = read_stage(folder, "encoders")
    settings = entry["settings"] | {key: entry[key] for key in ("vocabulary", "nouns")}
    return load_model(TextAndCloud, f"{folder}/encoders.safetensors", **settings)
