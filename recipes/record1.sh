# Record 1 of docs/RECORDS.md: a quarter of the shapes, shorter stages, no reconstructor, words alone (record1.py).
stage() {
    python recipes/record1.py --out "$OUT" --cache "$CACHE" --seed "$SEED" --device "$DEVICE" --stage "$@"
}
stage encoders --shapes 2600 --steps 600
stage tokenizer --shapes 2600 --steps 1500 --lr 3e-3
stage vision --shapes 26 --steps 2             # sample.py wants its weights; the goal has no picture
stage backbone --shapes 2600 --steps 1500
