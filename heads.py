"""heads.py - the heads of a checkpoint folder, and the stage that trains one on frozen tokens (representations/).

    python train.py --rep pc --stage head        # trains one
    python evaluate.py tokenizer --rep pc        # how well it reconstructs held-out shapes
"""
from functools import partial
from pathlib import Path

import torch

import judge
import tokenizer
from engine.commands import UserError
from engine.files import load_model, read_config, read_stage, trained_stages
from engine.loop import Loop
from engine.stage import Stage
from first_design import choose
from representations import REPRESENTATIONS, with_needs
from representations.head import NOISE
from representations.sdf import onto_surface


def load(folder, reps, device="cpu"):
    """Heads of a checkpoint folder and the heads that they need, frozen: {rep: head}."""
    settings, heads = read_stage(folder, "tokenizer")["settings"], {}
    found = [name.removeprefix("head-") for name in trained_stages(folder) if name.startswith("head-")]
    for rep in with_needs([*(name for rep in reps for name in REPRESENTATIONS[rep].helpers if name in found), *reps]):
        head = REPRESENTATIONS[rep]
        if rep not in found and head.stand_in:
            heads |= load(folder, {*head.stand_in.needs} - heads.keys(), device) | {rep: head.stand_in()}
            continue
        if rep not in found:
            if Path(folder, f"head-{rep}.state.safetensors").is_file():
                read_stage(folder, f"head-{rep}")             # an error: it is half trained
            raise UserError(f"{folder} has no head for {rep}, only for {', '.join(found)}; make it with: "
                            f"python train.py --rep {rep} --stage head --out {folder}")
        if f"head-{rep}" in read_config(folder):
            read_stage(folder, f"head-{rep}")                 # checks the weights of its tokenizer
        head = choose(rep, head, settings)
        heads[rep] = load_model(head, f"{folder}/head-{rep}.safetensors", **settings).to(device)
    return heads


# ---------------------------------------------------------------------------- stage: data, model, training, save

def train(run, rep):
    """One head on frozen tokens, with the tokenizer's noise."""
    head = REPRESENTATIONS[rep]

    # data
    stage = f"head-{rep}"
    encoder = tokenizer.load(run.folder).to(run.device)
    others = [*head.needs, *(name for name in head.helpers if name in run.joint)]
    needed = load(run.folder, others, run.device)             # for decoding
    tokens = {split: tokenizer.encode(run, encoder, split) for split in (run.train, run.test)}       # rows n c
    held_out = lambda count: tokens[run.test][run.test.spread(count)]

    def draw_batch(split):
        rows = split.draw_rows(run.micro_batch_size(stage), turned=True)
        return tokens[split][rows], head.batch_of(split, rows)

    # model: a head that was trained with the tokenizer is fine-tuned
    settings = read_stage(run.folder, "tokenizer")["settings"]
    if stage in trained_stages(run.folder):
        model = load(run.folder, [rep])[rep].requires_grad_()
    else:
        model = choose(rep, head, settings)(**settings)
        run.load_to_finetune(stage, {stage: model}, settings)

    # training
    loop = Loop(run, stage, model, draw_batch)
    for net, (x, samples) in loop:
        x = x + NOISE * torch.randn_like(x)
        if "sdf" in head.needs:                               # it is decoded on the surface of the sdf head
            with run.autocast():
                field = partial(needed["sdf"].evaluate, needed["sdf"].read(x))
                surface = onto_surface(field, samples["points"], samples["normals"])
            samples = samples | dict(zip(("points", "colours"), surface))
        loop.step(*net(x, samples))
        if path := loop.picture():
            judge.save_picture(path, judge.reconstructions(run, needed | {rep: loop.average}, held_out(14), rep))

    # save
    metrics = judge.head_metrics(run, needed | {rep: loop.average}, held_out(judge.SHAPES), rep)
    run.finish(loop, {stage: loop.average}, metrics=metrics)


def stages():
    """A stage for each representation."""
    return [Stage(f"head-{rep}", partial(train, rep=rep), head.steps, head.batch, head.lr, after=("tokenizer",))
            for rep, head in REPRESENTATIONS.items()]
