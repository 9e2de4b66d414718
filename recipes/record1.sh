# Record 1 of docs/RECORDS.md.
set -e
stage() {
    python recipes/record1.py --out "$OUT" --cache "$CACHE" --seed "$SEED" --device "$DEVICE" --stage "$@"
}
stage encoders --shapes 2600 --steps 400
stage tokenizer --shapes 2600 --steps 700
stage vision --shapes 26 --steps 2             # sample.py wants its weights; the goal has no picture
stage backbone --shapes 2600 --steps 1000
