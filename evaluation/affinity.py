"""affinity.py - does the student of lost.py have to know which places of a shape are alike (LoST's third loss)?

    L = mean_i KL( softmax_j(<p_i, p_j> / T) | softmax_j(<u_i, u_j> / T) )

p_i: features of the patches of a picture from the front, by the image tower. u_i: the student's features of the column
of shape tokens that the patch shows. Trains students with this loss and without; R@1 and R@3 of held-out shapes.

    python -m evaluation.affinity
"""
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from tqdm import tqdm

import data
import lost
import tokenizer
from engine.commands import command, pick_device
from evaluation.registers import recall
from evaluation.results import write_table
from geometry.render import render_mesh
from geometry.training_samples import vertex_coloured
from prompts import image_tower, relations

FOLDER, SHAPES, STEPS, BATCH, SEEDS, T, WEIGHT = "checkpoints/tiny", 2600, 600, 128, 3, .07, .5


def affinity(u, p):                                           # b t d, b t e, of length 1
    u, p = ((x @ x.mT / T).log_softmax(-1) for x in (u, p))
    return F.kl_div(u, p, log_target=True, reduction="none").sum(-1).mean()


class Student(lost.Student):
    def both(self, x):                                        # b n c -> features b e, and of columns b 16 d
        x = self.token(x) + self.place
        for block in self.blocks:
            x = block(x)
        columns = reduce(x, "b (x y z) d -> b (y x) d", "mean", x=4, y=4).flip(1)             # rows from above, below
        columns = rearrange(columns, "b (y x) d -> b y x d", y=4).flip(2)
        columns = F.normalize(rearrange(columns, "b y x d -> b (y x) d").float(), dim=-1)
        return F.normalize(self.out(reduce(x, "b n d -> b d", "mean")).float(), dim=-1), columns


def front_patches(split, rows):
    """Pictures of shapes from the front -> the image tower's features of 16 patches, r 16 e."""
    tower, found = image_tower.load(FOLDER), []
    for row in tqdm(rows, desc="pictures", leave=False):
        picture = render_mesh(*vertex_coloured(split.shape(row)), azimuth=0, elevation=0, size=64)
        picture = rearrange(torch.from_numpy(np.float32(picture)) / 255, "h w c -> 1 c h w")
        found.append(F.normalize(tower.tokens(picture)[0], dim=-1))
    return torch.cat(found)


def main():
    device, autocast, _ = pick_device("cpu")
    train, test = data.prepare("train", data.TRAIN_SHAPES), data.prepare("test")
    encoder, known = tokenizer.load(FOLDER), relations.features(FOLDER, train, test)
    x, held_out = (tokenizer.encode_set(encoder, split, device, autocast, limit=limit)
                   for split, limit in ((train, SHAPES), (test, None)))
    patches, facts = front_patches(train, range(SHAPES)), relations.facts(test)
    shared = np.array([[len(a & b) / len(a | b) for b in facts] for a in facts])
    low, high = relations.thresholds(known[train])
    rows = []
    for weight in (0., WEIGHT):
        found = []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            model = Student(**lost.STUDENTS["tiny"], tokens=64, channels=16)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            for _ in tqdm(range(STEPS), leave=False):
                some = torch.randperm(SHAPES)[:BATCH]
                with autocast():
                    own, columns = model.both(x[some] + tokenizer.NOISE * torch.randn_like(x[some]))
                s, t = own @ own.T, known[train][some] @ known[train][some].T
                loss = lost.contrast(s, t, low, high) + lost.rank(s, t)
                if weight:
                    loss = loss + weight * affinity(columns, patches[some])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad(), autocast():
                features = model(held_out).numpy()
            found.append([recall(features, shared, k) for k in (1, 3)])
            print(weight, seed, found[-1], flush=True)
        mean, std = np.mean(found, 0), np.std(found, 0, ddof=1)
        rows.append({"weight": f"{weight:g}"} | {f"R@{k}": f"{m:.3f} ± {s:.3f}" for k, m, s in zip((1, 3), mean, std)})
    write_table("out/evaluate", "affinity", rows)


if __name__ == "__main__":
    command(main)
