#!/usr/bin/env bash
# Trains size small (216 tokens of 16 channels) on one GPU, in runs/small, in slices of eight minutes.
#
#     bash recipes/gpu.sh                            # built-in shapes; run it again until it prints "done"
#     DATA=path/to/assets bash recipes/gpu.sh        # your files (data.py)
#     SLICE=3600 bash recipes/gpu.sh
#
# On a new card, first: python -m research.gpu --quick
#
# A slice that ends stops after a training step and saves it; the next one resumes it. No GPU has run all of it yet.
set -euo pipefail
cd "$(dirname "$0")/.."

data=(--shapes 10400)
[ -z "${DATA:-}" ] || data=(--data "$DATA")
python data.py "${data[@]}" --kinds surface pictures --workers "$(nproc)"
end=$((SECONDS + ${SLICE:-480}))
train() {
    timeout --signal TERM $((end > SECONDS ? end - SECONDS : 1)) \
        python train.py --size small --image-encoder built-in --out runs/small --workers "$(nproc)" "${data[@]}" "$@" ||
        { [ $? = 124 ] && echo "the slice has ended; run the same command again" && exit 0; exit 1; }
}
train --stage encoders --steps 4000 --batch 256
train --stage tokenizer --steps 20000 --batch 64
train --stage vision --steps 20000 --batch 256
train --stage backbone --steps 60000 --batch 256
train --stage reconstruct --steps 10000 --batch 256
echo "done"
