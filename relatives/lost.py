"""lost.py - LoST (arXiv 2603.17995): a shape is encoded as registers, from semantics to details.

The first register alone decodes to a whole chair; each further one adds details of the encoded chair:

    shape tokens   -> Registers -> r_1 ... r_m
    r_1 ... r_k    -> PrefixDecoder, a flow -> shape tokens       for any k; the rest is sampled
    shape tokens   -> Student -> similarities of shapes           RIDA: a semantic loss of the decoder
    prompt         -> Generator -> one register after another

Input and output are the frozen shape tokens of tokenizer.py: LTM3D's heads decode them. Departures: docs/LOST.md.

    python train.py --model lost                                          # trains it
    python sample.py --model lost --text "table" --registers 8            # the first 8 alone
    python -m relatives.lost search --query chair.glb --in FOLDER

Letters: n shape tokens of c channels; m registers of w numbers, of which the first k are kept; e features.
"""
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

import encoders as encoders_
import heads as heads_
import judge
import tokenizer as tokenizer_
from backbone import DRAWS, DenoiseNet, Flow, split_condition
from engine.commands import UserError, cast_once, command
from engine.files import load_stage
from engine.loop import Loop
from engine.networks import Block, flow_pair, time_embedding
from engine.noise import keys_of, normal
from engine.stage import Stage
from prompts.text_tower import info_nce
from relatives import relations
from relatives.sequence import AdaBlock, KVCache, Sequence
from representations import REPRESENTATIONS
from representations.head import NOISE
from sample import Sampler

REPS = tuple(REPRESENTATIONS)
SIZES = {"tiny": dict(registers=64, width=64, dim=256, heads=8, encoder=4, decoder=6),    # at most one a token: 27
         "large": dict(registers=512, width=16, dim=768, heads=12, encoder=12, decoder=24)}
STUDENTS = {"tiny": dict(dim=128, depth=2, heads=4), "large": dict(dim=768, depth=8, heads=12)}
GENERATORS = {"tiny": dict(dim=160, depth=6, heads=5, queries=8, head_dim=160, head_depth=3),
              "large": dict(dim=1024, depth=24, heads=16, queries=64, head_dim=1280, head_depth=8)}
SIZES["mini"], STUDENTS["mini"], GENERATORS["mini"] = SIZES["tiny"], STUDENTS["tiny"], GENERATORS["tiny"]


# ---------------------------------------------------------------------------- encode: registers

class Registers(nn.Module):
    """Shape tokens and registers, one sequence. Tokens attend to tokens; register i, initialised with token order_i,
    attends to tokens and registers 1 ... i. Returns registers, normalised to mean 0, std 1."""

    def __init__(self, tokens, channels, order, width, dim, heads, depth):
        super().__init__()
        self.token, self.pos_embed = nn.Linear(channels, dim), nn.Parameter(torch.randn(tokens, dim))
        self.register = nn.Parameter(torch.randn(len(order), dim) * .02)
        self.register_buffer("order", order, persistent=False)                    # m
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        i = torch.arange(tokens + len(order))                 # places in the sequence; tokens come first
        self.register_buffer("mask", ((i < tokens) | (i <= i[:, None]))[None], persistent=False)   # 1 q k: may q see k?

    def forward(self, x):                                     # b n c -> b m w
        y = self.token(x) + self.pos_embed                                        # b n d
        y = torch.cat([y, y[:, self.order] + self.register], 1)                   # b (n + m) d
        for block in self.blocks:
            y = block(y, mask=self.mask)
        return F.layer_norm(self.out(y[:, x.shape[1]:]).float(), [self.out[-1].out_features])


# ---------------------------------------------------------------------------- decode: a flow, from any prefix

class PrefixDecoder(nn.Module):
    """A flow from noise to shape tokens, which attend to each other and to the first k registers."""

    def __init__(self, tokens, channels, order, width, dim, heads, depth):
        super().__init__()
        self.channels, self.dim, self.heads, self.norm = channels, dim, heads, nn.LayerNorm(dim)
        self.token, self.pos_embed = nn.Linear(channels, dim), nn.Parameter(torch.randn(tokens, dim))
        self.register, self.turn = nn.Linear(width, dim), nn.Parameter(self.pos_embed[order].detach().clone())
        self.blocks = nn.ModuleList(AdaBlock(dim, heads) for _ in range(depth))
        self.cross = nn.ModuleList(nn.Linear(dim, 2 * dim, bias=False) for _ in range(depth))      # to keys and values
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels))
        nn.init.zeros_(self.time[-1].weight)
        nn.init.zeros_(self.out[-1].weight)

    def read(self, registers):                                # b k w -> b k d, and keys and values for each block
        y = self.norm(self.register(registers) + self.turn[:registers.shape[1]])
        pairs = (rearrange(into(y), "b k (i h j) -> i b h k j", i=2, h=self.heads) for into in self.cross)
        return y, [(F.normalize(k, dim=-1), v) for k, v in pairs]

    def velocity(self, x, t, kept, memory):
        """Noisy tokens b (n c), time b, a mask of kept registers b k, and their `read` -> b (n c)."""
        y, pairs = memory
        mean = (y * rearrange(kept, "b k -> b k 1")).sum(1) / kept.sum(1, keepdim=True)           # b d
        x = self.token(rearrange(x, "b (n c) -> b n c", c=self.channels)) + self.pos_embed
        mask = repeat(F.pad(kept, (0, x.shape[1]), value=True), "b k -> b n k", n=x.shape[1])
        time = rearrange(self.time(time_embedding(t, self.dim) + mean), "b (i d) -> b i d", i=6)
        for block, pair in zip(self.blocks, pairs):           # keys and values of the registers come first
            x = block(x, time, mask, lambda *own: [torch.cat(both, 2) for both in zip(pair, own)])
        return rearrange(self.out(x).float(), "b n c -> b (n c)")


# ---------------------------------------------------------------------------- loss: Relational Inter-Distance Alignment

class Student(nn.Module):
    """Shape tokens -> unit-norm features, trained on the similarities of its teacher."""

    def __init__(self, tokens, channels, dim, depth, heads):
        super().__init__()
        self.token, self.pos_embed = nn.Linear(channels, dim), nn.Parameter(torch.randn(tokens, dim) * .02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))

    def forward(self, x):                                     # b n c -> b e
        x = self.token(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return F.normalize(self.out(reduce(x, "b n d -> b d", "mean")).float(), dim=-1)

    def loss(self, x, target, low, high):
        """Shape tokens b n c; the teacher's features of the same shapes, b e, and its thresholds (`contrast`)."""
        own = self(x + self.training * NOISE * torch.randn_like(x))    # b e
        with torch.autocast(x.device.type, enabled=False):
            s, t = own @ own.T, target @ target.T             # b b
            alike, ranks = contrast(s, t, low, high), rank(s, t)                  # both have weight 1, as in the paper
        return alike + ranks, {"contrast": alike.detach(), "rank": ranks.detach()}


def contrast(s, t, low, high, temperature=.07):
    """s, t: b b, similarities of shapes by the student and by the teacher. Positives are more than `high` alike to the
    teacher, negatives less than `low`; others do not count."""
    return info_nce(s / temperature, (t > high) & ~torch.eye(len(t), dtype=torch.bool, device=t.device), t < low)


def rank(s, t):                                               # unit 6
    """Rank distillation: rows of s and t, b b as above, standardised without the diagonal; mean squared error."""
    b = len(s)
    others = (x.flatten()[1:].view(b - 1, b + 1)[:, :-1].reshape(b, b - 1) for x in (s, t))       # skips every b + 1st
    return F.mse_loss(*(F.layer_norm(x, [b - 1]) for x in others))


class Codec(nn.Module):
    """Registers and PrefixDecoder, which are trained together."""
    MEANING = .5                                              # weight of RIDA

    def __init__(self, registers, width, dim, heads, encoder, decoder, tokens, channels):
        super().__init__()
        order = (torch.arange(tokens) * .618034 % 1).argsort()[:registers]        # golden ratio: all over the grid
        sizes = dict(tokens=tokens, channels=channels, order=order, width=width, dim=dim, heads=heads)
        self.encoder, self.decoder = Registers(**sizes, depth=encoder), PrefixDecoder(**sizes, depth=decoder)
        self.tokens, self.count, self.width = tokens, len(order), width
        self.lengths = [*(2 ** i for i in range((len(order) - 1).bit_length())), len(order)]      # 1, 2, 4 ... m

    def loss(self, x, student):
        """Nested dropout: of each shape only the first k registers are kept, k = 1, 2, 4 ... m at random. A flow:

            x_t = (1 - t) noise + t x       v = x - noise       x' = x_t + (1 - t) v'
            L = mean (v' - v)^2 + MEANING (1 - <S(x'), S(x)>)   v': of the decoder, S: the student
        """
        r, b = self.encoder(x), len(x)                                            # b m w
        r = r + self.training * NOISE * torch.randn_like(r)
        k = (2 ** torch.randint(len(self.lengths), (b, 1), device=x.device)).clamp(max=self.count)    # of self.lengths
        kept = torch.arange(self.count, device=x.device) < k                      # b m
        t = (torch.randn(b, 1, device=x.device) - 1).sigmoid()                    # mostly noise: registers matter there
        flat = rearrange(x, "b n c -> b (n c)")
        noisy, velocity = flow_pair(flat, t)                                      # b (n c)
        v = self.decoder.velocity(noisy, t[:, 0], kept, self.decoder.read(r))
        flow, clean = F.mse_loss(v, velocity), rearrange(noisy + (1 - t) * v, "b (n c) -> b n c", n=self.tokens)
        meaning = 1 - (student(clean) * student(x)).sum(-1).mean()
        return flow + self.MEANING * meaning, {"flow": flow.detach(), "meaning": meaning.detach()}

    @torch.no_grad()
    def decode(self, registers, keys, steps=10):
        """The first k registers of b shapes, b k w, and one key per shape (engine/noise.py) -> shape tokens b n c."""
        kept = torch.ones(registers.shape[:2], dtype=torch.bool, device=registers.device)
        noise = lambda count: normal(keys, 1, (count, self.tokens * self.decoder.channels))    # stream 0: registers
        memory = self.decoder.read(registers)
        net = lambda x, t, _: self.decoder.velocity(x, t, kept, memory)           # its condition is the memory
        return rearrange(Flow.sample(net, None, noise, steps), "b (n c) -> b n c", n=self.tokens)


# ---------------------------------------------------------------------------- loss, generate: LoST-GPT

class Generator(Sequence):
    """[prefix, start, r_1 ... r_(m-1)] -> causal blocks -> context vectors z_1 ... z_m -> DenoiseNet."""

    def __init__(self, registers, width, widths, dim, depth, heads, queries, head_dim, head_depth):
        super().__init__(queries, widths, dim, depth, heads)
        self.count, self.width, self.token = registers, width, nn.Linear(width, dim)
        self.pos_embed = nn.Parameter(torch.randn(registers, dim))                # of the register that comes next
        self.net = DenoiseNet(width, dim, head_dim, head_depth)

    def loss(self, registers, condition):                     # b m w
        prefix, valid, first, modulation = self.begin(condition)
        p = prefix.shape[1]
        before = registers[:, :-1] + self.training * NOISE * torch.randn_like(registers[:, :-1])
        x = torch.cat([prefix, torch.cat([first, self.token(before)], 1) + self.pos_embed], 1)        # b (p + m) d
        i = torch.arange(x.shape[1], device=x.device)
        mask = ((i <= i[:, None]) | (i < p)) & rearrange(F.pad(valid, (0, self.count), value=True), "b k -> b 1 k")
        z = self.read(x, modulation, mask)[:, p:]                                 # b m d
        z, x = (repeat(y, "b m d -> (draws b m) d", draws=DRAWS) for y in (z, registers))
        return Flow.loss(self.net, x, z), {}

    @torch.no_grad()
    def generate(self, condition, keys, registers=None, denoise_steps=4, cfg=1.5, temperature=1.):
        """condition (prefix.py) and one key per sample (engine/noise.py) -> the first registers, b k w."""
        noise = normal(keys, 0, (self.count, 1, self.width))                      # b m 1 w: one draw of each register
        condition, strengths = split_condition(condition, cfg)                    # r branches of b samples
        cache, chosen = KVCache(self, condition, self.count), []
        x = cache.first                                                           # (r b) 1 d
        for i in range(registers or self.count):
            z = cache.append(x + self.pos_embed[i])[:, 0]     # (r b) d
            chosen.append(Flow.sample(self.net, z, lambda count: noise[:, i], denoise_steps, strengths,
                                      temperature))           # b w
            x = rearrange(self.token(chosen[-1]), "b d -> b 1 d").repeat(len(strengths) + 1, 1, 1)
        return torch.stack(chosen, 1)


# ---------------------------------------------------------------------------- stages: data, model, training, save

def tokens_of(run):
    """{split: tokens of all its rows, r n c}, and the sizes n and c by name."""
    tokenizer = tokenizer_.load(run.folder).to(run.device)
    tokens = {split: tokenizer_.encode(run, tokenizer, split) for split in (run.train, run.test)}
    return tokens, dict(zip(("tokens", "channels"), tokens[run.test].shape[1:]))


def train_student(run):
    """RIDA. The teacher has class, attributes, captions and maybe pictures; the student has shape tokens alone."""
    # data
    targets, teacher = relations.features(run)                # of shapes oriented as in files, r e
    low, high = relations.thresholds(targets[0])
    tokens, sizes = tokens_of(run)
    # rows e: the positions of a shape share its features
    features = {split: x.to(split.device).repeat(split.source.positions, 1)
                for split, x in zip((run.train, run.test), targets)}

    def draw_batch(split):
        rows = split.draw_distinct(run.micro_batch_size("lost-student"), turned=True)
        return tokens[split][rows], features[split][rows]

    # model
    settings = STUDENTS[run.size] | sizes
    model = Student(**settings)
    run.load_to_finetune("lost-student", {"lost-student": model}, settings)

    # training
    loop = Loop(run, "lost-student", model, draw_batch)
    for net, (x, target) in loop:
        loop.step(*net(x, target, low, high))

    # save
    run.finish(loop, {"lost-student": loop.average}, settings=settings, teacher=teacher)


def train_registers(run):
    """Registers and decoder, on frozen tokens; RIDA: the student compares decoded tokens with the true ones."""
    # data
    tokens, sizes = tokens_of(run)
    heads = heads_.load(run.folder, run.joint, run.device)
    student = load_student(run.folder).to(run.device)

    def draw_batch(split):
        return tokens[split][split.draw_rows(run.micro_batch_size("lost-registers"), turned=True)]

    # model
    settings = SIZES[run.size] | sizes
    model = Codec(**settings)
    run.load_to_finetune("lost-registers", {"lost-registers": model}, settings)

    def decoded(codec):                                       # at tiny a row for each shape: of 1, 2, 4 ... registers
        with run.autocast():
            r = codec.encoder(tokens[run.test][:4].to(run.device))
            keys = keys_of(range(len(r)), run.device)
            return torch.cat([codec.decode(r[:, :k], keys)[:, None] for k in codec.lengths], 1).flatten(0, 1)

    # training
    loop = Loop(run, "lost-registers", model, draw_batch)
    for net, x in loop:
        loop.step(*net(x, student))
        if path := loop.picture():
            judge.save_picture(path, judge.reconstructions(run, heads, decoded(loop.average), run.joint[-1]))

    # save
    run.finish(loop, {"lost-registers": loop.average}, settings=settings)


def train_generator(run):
    """On frozen registers and frozen encoders."""
    # data
    codec = load_codec(run.folder).to(run.device)
    encoders, _, draw_batch = encoders_.prompted_tokens(run, "lost-generator", tokenizer_.load(run.folder))
    heads = heads_.load(run.folder, run.joint, run.device)

    # model
    settings = GENERATORS[run.size] | {"registers": codec.count, "width": codec.width, "widths": encoders.widths}
    model = Generator(**settings)
    run.load_to_finetune("lost-generator", {"lost-generator": model}, settings)

    # training
    loop = Loop(run, "lost-generator", model, draw_batch)
    generate = lambda *prompted: generate_tokens(codec, loop.average, *prompted)
    for net, (x, prompts) in loop:
        with run.autocast():
            registers, condition = codec.encoder(x), encoders.encode_drawn(prompts)
        loop.step(*net(registers, condition))
        if path := loop.picture():
            judge.save_picture(path, judge.samples(run, encoders, generate, heads))

    # save
    metrics = judge.class_accuracy(run, encoders, generate, heads)
    run.finish(loop, {"lost-generator": loop.average}, settings=settings, metrics=metrics)


def stages(ltm3d):
    """Stages of LTM3D, for its tokens and heads, then those of LoST."""
    shared = [stage for stage in ltm3d if stage.name not in ("backbone", "reconstruct")]
    return [*shared, Stage("lost-student", train_student, 1000, 128, 1e-3, after=("encoders", "tokenizer"),
                           flags=("image-encoder",), smallest=3),
            Stage("lost-registers", train_registers, 2000, 64, 2e-3, after=("tokenizer", "lost-student")),
            Stage("lost-generator", train_generator, 2000, 64, 2e-3, after=("encoders", "vision", "lost-registers"),
                  flags=("text-encoder", "image-encoder"))]


# ---------------------------------------------------------------------------- a checkpoint folder, opened

def generate_tokens(codec, generator, condition, keys, **options):                # -> shape tokens b n c
    return codec.decode(generator.generate(condition, keys, **options), keys)


class Autoencoder(nn.Module):
    """Clouds -> shape tokens -> registers -> shape tokens."""

    def __init__(self, tokenizer, codec):
        super().__init__()
        self.tokenizer, self.codec, self.points = tokenizer, codec, tokenizer.points

    def forward(self, *cloud):                                # b k 3 each -> b n c
        keys = keys_of([0] * len(cloud[0]), cloud[0].device)
        return self.codec.decode(self.codec.encoder(self.tokenizer(*cloud)), keys)


load_student = partial(load_stage, stage="lost-student", kind=Student)
load_codec = partial(load_stage, stage="lost-registers", kind=Codec)


def open_tokenizer(folder, reps, device):
    return Autoencoder(tokenizer_.load(folder), load_codec(folder)).to(device), heads_.load(folder, reps, device)


class LoST(Sampler):
    LAST = "lost-generator"
    OPTIONS = {"registers": None, "denoise_steps": 4, "cfg": 1.5, "cfg_image": 2., "temperature": 1.}

    def open(self):
        self.generator = cast_once(load_stage(self.folder, "lost-generator", Generator).to(self.device), self.autocast)
        self.codec = cast_once(load_codec(self.folder).to(self.device), self.autocast)

    def shape_tokens(self, condition, keys, **options):       # b n c
        if options["registers"] not in (None, *range(1, self.codec.count + 1)):
            raise UserError(f"{options['registers']} registers are not between 1 and {self.codec.count}")
        return generate_tokens(self.codec, self.generator, condition, keys, **options)

    def steps(self, *prompted, registers=None, **options):    # of 1, 2, 4 ... registers
        last = registers or self.codec.count
        counts = [*(2 ** i for i in range(10) if 2 ** i < last), last]
        return [(f"{k} of {self.codec.count} registers", self.tokens(*prompted, registers=k, **options)[0], None)
                for k in counts]


Model = LoST


def main():
    from relatives import search  # its command alone
    search.main(load_student)


if __name__ == "__main__":
    command(main)
