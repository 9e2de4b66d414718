"""head.py - what a representation is: one class, with all that other files ask of it.

LTM3D trains a tokenizer for each representation. Here heads decode the tokens of one tokenizer, and the backbone, which
generates the tokens, is independent of the head. A head is an nn.Module, and has

    token       an nn.Linear, its first layer: tokenizer.standardise changes it
    batch_of    the training samples of some rows of a prepared set (data.py), one row a shape; those of files without
                colours are grey: `coloured` is 0 for them
    loss        (tokens b n c, this batch) -> loss, logs
    decode      (tokens n c, heads, rng, autocast, its options) -> a shape. heads: {rep: head}, with those it `needs`
    judge       (heads, tokens n c, a prepared set, row, rng, autocast, points) -> {metric: number}: compares the
                decoded shape with the true one. points: of surfaces; 0 skips what takes many, which saves time

A shape has vertices or points first, and `suffix`, `title`, save, picture, surface (geometry/export.py: Shape).
"""
NOISE = .1       # on the tokens in training: it makes the latent space smooth, and needs no KL weight


class Head:
    """What most representations have in common."""
    about = ""                   # what it gives, in the help of commands
    kinds = ()                   # of training samples (geometry/kinds.py) beside SURFACE, which all stages have
    needs = ()                   # other heads that it decodes with
    helpers = ()                 # other heads that improve its decoding, where they are trained
    stand_in = None              # a class that decodes instead, where this head is not trained; it has needs, too
    options = {}                 # of decode, with the defaults of sample.py: of resolution, points, faces
    preview = {}                 # of decode, for pictures and metrics during training
    steps, batch, lr = 1500, 32, 2e-3                         # of its training on frozen tokens, tuned at size tiny
