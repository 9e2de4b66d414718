#!/usr/bin/env bash
# Trains checkpoints/tiny, vat, lost and latte3d from nothing, in runs/. 23 hours of one or two CPU cores with bf16.
#
#     bash recipes/tiny.sh
#
# Resumable: train.py skips stages that are done. After each command: its minutes, and what the shipped weights reach.
# These were trained by revision 15bb46e and earlier ones, with the tokenizer of first_design.py and 64 tokens, in several
# runs, later ones as fine-tuning, whose steps are added up here (docs/RESULTS.md); gs, with an earlier loss, of 4,096
# Gaussians without SSIM. Today the recipe trains the tokenizer of tokenizer.py; its figures are not measured yet.
set -euo pipefail
cd "$(dirname "$0")/.."

toys="--shapes 10400 --image-encoder built-in"
tiny="python train.py $toys --out runs/tiny"
$tiny --stage encoders --steps 1000                                    #  12  full caption -> cloud R@1 .960
$tiny --stage tokenizer --steps 3100                                   #  44  IoU .973
$tiny --stage head --rep sdf --steps 4200                              #  26  IoU .980
$tiny --stage vision --steps 4600                                      #  58  picture -> cloud R@1 .855
$tiny --stage backbone --steps 9300                                    # 396  held_out .111
$tiny --stage reconstruct --steps 1400                                 #  54  nll -.51, error .253
$tiny --stage head --rep pc --steps 3000                               #  26  Chamfer .053, floor .055
$tiny --stage head --rep mesh --steps 13500 --shapes 83200             #  90  .986 of the faces within 2 bins; 8 GB of data
$tiny --stage head --rep gs --steps 2000                               #  49  PSNR 32.1 dB

# checkpoints/vat: its generator trained on fixed codes for 5,000 steps; now latents are sampled at every step.
vat="python train.py $toys --model vat --from runs/tiny --out runs/vat"
$vat --stage vat-latents --steps 1500                                  #  32
$vat --stage vat-codes --steps 4500                                    #  49  IoU .943
$vat --stage vat-decoder --steps 7500                                  #  76  IoU .953
$vat --stage vat-generator --steps 5600                                # 165  prompt score .549

# checkpoints/lost: trained as here.
lost="python train.py $toys --model lost --from runs/tiny --out runs/lost"
$lost --stage lost-student --steps 1000                                #   2
$lost --stage lost-registers --steps 2000                              #  46  Chamfer .030 of 64 registers, of the tokens .028
$lost --stage lost-generator --steps 2000                              #  62  prompt score .555

# checkpoints/latte3d: by two processes (torchrun --nproc_per_node=2, --micro-batches 2); 6,000 and 4,500 of the steps
# of prior and geometry were on 2,600 shapes.
latte3d="python train.py --shapes 10400 --model latte3d --from runs/tiny --out runs/latte3d"
$latte3d --stage latte3d-prior --steps 11000                           #  75  right class .98, right colour 1.000
$latte3d --stage latte3d-geometry --steps 9500                         #  95  silhouette .044
$latte3d --stage latte3d-texture --steps 2000                          #  10

python evaluate.py generate --rep sdf --checkpoint runs/tiny           # prompt score .557, R-precision .909
python evaluate.py generate --checkpoint runs/vat                      # prompt score .549, R-precision .885
python evaluate.py generate --checkpoint runs/lost                     # prompt score .555, R-precision .938
python evaluate.py generate --checkpoint runs/latte3d                  # prompt score .546, R-precision .889
