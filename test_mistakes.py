"""test_mistakes.py - a mistake in a command costs one line: exit status 2, what was wrong, what to do.

    python -m pytest -q test_mistakes.py
"""
import shlex
from importlib import import_module

import pytest
import trimesh

from conftest import HERE, assert_one_line, run

# {run}: a folder of train.py with the head of sdf alone. {out}: a folder that does not exist; no file is written there.
# {tmp}: the folder around it, with `file`, box.obj, an empty folder, and a .vat and a .sh3f that are text.
SAMPLE, TRAIN = "sample.py --checkpoint {run} --text table --out {out} ", "train.py --size small --out {out} "
RELATIVE = {name: f"sample.py --checkpoint checkpoints/{name} --text table --out {{out}} " for name in
            ("vat", "lost", "latte3d")}
DATA, RACE, VAT = "data.py --out {out} --data ", "-m research.race --out {out} --recipe ", "-m relatives.vat "
CHAIR = HERE / "assets" / "chair.png"
MISTAKES = [
    (SAMPLE + "--colour red", "unrecognized arguments: --colour"),
    (SAMPLE + "--step 3", "unrecognized arguments: --step"),
    (SAMPLE + "--steps 0", "--steps: must be between"),
    (SAMPLE + "--steps 65", "65 steps are not between 1 and"),
    (SAMPLE + "--cfg -1", "--cfg: must be"),
    (SAMPLE + "--cfg nan", "--cfg: must be"),
    (SAMPLE + "--n 0", "--n: must be"),
    (SAMPLE + "--seed -1", "--seed: must be"),
    (SAMPLE + "--resolution 100000", "choose from 32, 64"),
    (SAMPLE + "--rgs sampled=2", "RGS takes none, auto, sampled=A"),
    (SAMPLE + "--rgs x", "RGS takes none, auto, sampled=A"),
    (SAMPLE + "--window 2", "--window: must be between 0 and 1"),
    (SAMPLE + "--rep voxels", "choose from"),
    (SAMPLE + "--points 0", "--points: must be"),
    (SAMPLE + "--points 9", "give --rep pc or gs, too"),
    (SAMPLE + "--faces 3", "--faces: must be"),
    (SAMPLE + "--rep pc --faces 300", "give --rep sdf or mesh, too"),
    (SAMPLE + "--rep pc --height 2", "give --rep sdf or mesh, too"),
    (SAMPLE + "--rep pc", "has no head for pc, only for sdf; make it with: python train.py --rep pc"),
    (SAMPLE + "--device toaster", "--device toaster"),
    (SAMPLE + "--device meta", "--device meta"),
    (SAMPLE + "--text ''", "is empty"),
    (SAMPLE + "--text 'with the'", "names no object"),
    (SAMPLE + "--text 'a house'", "unknown object 'house'"),
    (SAMPLE + "--checkpoint nowhere", "there is no folder 'nowhere'"),
    (SAMPLE + f"--checkpoint {'x' * 300}", "cannot use xxx"),
    (SAMPLE + "--out {tmp}/file/below", "cannot write"),
    (RELATIVE["vat"] + "--steps 5", "--steps"),
    (RELATIVE["vat"] + "--rep pc", "vat generates sdf, mesh"),
    (RELATIVE["vat"] + "--model ltm3d", "holds vat, not ltm3d"),
    (RELATIVE["lost"] + "--top-k 2", "LoST, the model in"),
    (RELATIVE["lost"] + "--registers 99", "99 registers are not between 1 and 64"),
    (RELATIVE["latte3d"] + f"--image {CHAIR}", "learnt from texts alone"),
    (RELATIVE["latte3d"] + "--rep pc", "latte3d generates sdf, mesh, not pc"),
    (RELATIVE["latte3d"] + "--refine -1", "--refine: must be"),

    (TRAIN + "--stage dinner", "ltm3d has no stage dinner, but encoders"),
    (TRAIN + "--stage backbone", "holds no trained"),
    (TRAIN + "--stage vision", "give --image-encoder built-in"),
    (TRAIN + "--out ''", "--out is empty"),
    (TRAIN + "--steps 0", "--steps: must be at least 1"),
    (TRAIN + "--lr nan", "--lr: must be between"),
    (TRAIN + "--seed -1", "--seed: must be"),
    (TRAIN + "--shapes x", "invalid"),
    (TRAIN + "--bacth 3", "unrecognized arguments: --bacth"),
    (TRAIN + "--device toaster", "--device toaster cannot be used here"),
    (TRAIN + "--data {tmp}/box.obj --cache {tmp}/cache", "two of each are needed"),
    ("train.py --out {out} --model vat --denoiser ddpm", "vat has no --denoiser"),
    ("train.py --out {out} --model vat --tokens joint", "vat has no --tokens"),
    ("train.py --out {out} --model vat --variant queries", "vat has no variant queries"),
    ("train.py --out {out} --model vat --rep pc", "vat generates sdf, mesh, not pc"),

    (DATA + "{tmp}/none.sh3f", "there is no"),
    (DATA + "{tmp}/empty", "holds no shapes"),
    (DATA + "{tmp}/text.sh3f", "no Sweet Home 3D library"),
    (RACE + "{tmp}/none.sh", "there is no recipe"),

    ("evaluate.py ablate-rgs --checkpoint checkpoints/vat --out {out}", "has no Reconstruction"),
    ("evaluate.py tokenizer --rep gs --checkpoint checkpoints/vat --out {out}", "generates sdf, mesh, not gs"),
    (VAT + "compress {tmp}/none.glb {out}/a.vat", "there is no file"),
    (VAT + "compress {tmp}/box.obj {out}/a.vat --resolution 64", "unrecognized"),
    (VAT + "compress {tmp}/box.obj {out}/a.vat --checkpoint {tmp}", "holds no trained vat-codes"),
    (VAT + "decompress {tmp}/text.vat {out}/a.ply", "ends in .glb or"),
    (VAT + "decompress {tmp}/none.vat {out}/a.glb", "cannot read"),
    ("-m relatives.lost search --query table --in {tmp}/none --out {out}", "there is no"),
    ("-m relatives.lost search --query table --in {tmp} --checkpoint checkpoints/tiny", "holds no lost-student"),
    ("-m relatives.lost search --query {tmp}/none.glb --in {tmp}/box.obj --out {out}", "there is no file"),
    ("-m relatives.lost search --query {tmp}/none.gif --in {tmp}/box.obj --out {out}", "there is no file"),
    ("-m relatives.prior --text table --checkpoint checkpoints/tiny --out {out}", "holds no trained latte3d-prior"),
    ("-m relatives.prior --text table --depth {tmp}/none.glb --out {out}", "there is no file"),
]


@pytest.mark.parametrize("line, complaint", MISTAKES, ids=[f"{line.split()[0]}-{words}" for line, words in MISTAKES])
def test_a_mistake_is_one_line(line, complaint, overfitted, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    trimesh.creation.box((1, 1, 1)).export(tmp_path / "box.obj")
    for name, text in {"file": "", "text.sh3f": "no zip", "text.vat": "no codes"}.items():
        (tmp_path / name).write_text(text)
    words = shlex.split(line.format(run=overfitted, tmp=tmp_path, out=tmp_path / "out"))
    module, *flags = [word for word in words if word != "-m"]
    assert run(import_module(module.removesuffix(".py")).main, *flags) == 2
    assert_one_line(capsys.readouterr().err, complaint)
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))
