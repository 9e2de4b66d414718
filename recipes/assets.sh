#!/usr/bin/env bash
# Trains checkpoints/assets from nothing, in runs/assets and runs/all, on the kits of kits.txt. A GPU, and nine hours
# of two CPU cores.
#
#     DATA=path/to/assets bash recipes/assets.sh
#
# Resumable: train.py skips stages that are done. After each command: its minutes, and what these weights reached.
# The shipped weights began in ways that no command repeats (revision 15bb46e has the details): tokenizer and sdf head
# on a GPU, outside of train.py; gs, for 1,900 steps, on the true surface; the backbone of runs/assets in an earlier,
# smaller design; the shipped backbone from nothing, in 590 minutes, with three more blocks of the decoder in the last
# 5,000 steps.
set -euo pipefail
cd "$(dirname "$0")/.."

python data.py --data "$DATA" --kinds surface pictures views
train() { python train.py --data "$DATA" --size mini --image-encoder built-in --out runs/assets "$@"; }
train --stage encoders --steps 1200                                    #  11  full caption -> cloud R@1 .455
train --stage tokenizer --steps 41000 --batch 64 --lr 2e-3             #      on a GPU; n15 .801 on held-out families
train --stage vision --steps 2800 --batch 256                          #  51  picture -> cloud R@1 .765
train --stage backbone --steps 11400 --batch 128 --lr 2e-3             # 198  held_out .692
train --stage reconstruct --steps 4500 --batch 128                     #  28
train --stage head --rep pc --steps 3600 --batch 16                    #  31  Chamfer 1.06 x its floor
train --stage head --rep gs --steps 2300 --lr 1e-3                     #  73  PSNR 26.8 dB

# The shipped weights then learn from held-out shapes, too
all() { python "$@" --data "$DATA" --size mini --image-encoder built-in --out runs/all --all-shapes --from runs/assets \
        --finetune; }
all train.py --stage encoders --steps 400 --lr 2e-4                    #   1
all train.py --stage vision --steps 300 --batch 256 --lr 4e-4          #   5
all recipes/text_alone.py --stage backbone --steps 8000 --batch 128 --lr 1.5e-3  # 135
all train.py --stage reconstruct --steps 1200 --batch 128 --lr 1e-3    #   8

# The options that sample.py takes by default for these weights
python - <<'END'
from engine.files import write_config
write_config("runs/all", "backbone", sampling={"steps": 18, "temperature": 0.7, "cfg": 2.0, "cool": 0.5,
                                              "denoise_steps": 12})
END

python evaluate.py names --data "$DATA" --checkpoint runs/all --resolution 64    # R-precision .910, n15 .665
