# Row 0 of docs/RECORDS.md: the default recipe, as the README has it.
python train.py --rep sdf --out "$OUT" --cache "$CACHE" --seed "$SEED" --device "$DEVICE"
