#!/usr/bin/env bash
# Trains checkpoints/assets from nothing, in runs/assets, on the kits listed in docs/DATA.md. Fourteen hours of one CPU core.
#
#     DATA=path/to/assets bash recipes/assets.sh
#
# Resumable: train.py skips stages that are done. After each command: its minutes, and what the shipped weights reach.
# These were trained in several runs, the last ones on a GPU, whose steps are added up here (docs/DATA.md), on other
# shapes and with another tokenizer than today's size mini (revision f762557).
set -euo pipefail
cd "$(dirname "$0")/.."

python data.py --data "$DATA" --kinds surface pictures views           # 100
train() { python train.py --data "$DATA" --size mini --out runs/assets "$@"; }
train --stage encoders --steps 800                                     #   3  full caption -> cloud R@1 .315
train --stage tokenizer --steps 8700 --batch 16                        # 143  IoU .896
train --stage head --rep sdf --steps 900                               #  21  IoU .900
train --stage vision --steps 6600 --batch 256                          # 145  picture -> cloud R@1 .655
train --stage backbone --steps 8400 --batch 128                        # 300  held_out .305
train --stage reconstruct --steps 4500 --batch 128                     #  32
train --stage head --rep pc --steps 3600 --batch 16                    #  30  Chamfer .064, floor .053
train --stage head --rep gs --steps 2600                               #  60  PSNR 26.9 dB

# The options that sample.py takes by default for these weights
python - <<'END'
from engine.files import write_config
write_config("runs/assets", "backbone", sampling={"steps": 12, "temperature": 0.6, "cfg": 2.5, "denoise_steps": 12})
END

python evaluate.py names --data "$DATA" --checkpoint runs/assets       # .900 of the samples are nearest to their own name
