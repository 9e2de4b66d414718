"""models.py - the systems that this project teaches. A model is a module. The commands ask it for

    DEFAULTS      {stage: (steps, batch, peak learning rate)}; stages are seeded by their position: append, never insert
    STAGES        what --stage takes
    SEEING        the stages that learn from pictures
    LAST          its last stage: a folder that has it holds this model; its entry names the encoders
    SIZES         sizes that can be trained
    REPS          representations that it makes
    SAMPLING      {option of `generate`: its default}; flags of sample.py
    SHIPPED       the folder of its shipped weights, if there are any
    stages(reps)  {stage: a function of a run (engine/run.py) that trains it}, in order
    open_tokenizer(folder, reps, device) -> what turns clouds of `points` points into tokens, {rep: what decodes them}
    load(folder, device, autocast) -> an object with

        heads         {rep: what decodes it}
        load_heads(*reps)
        generate(condition, seeds, **options) -> tokens, a row for each seed
        decode(tokens, rep, rng, resolution, points, faces) -> a shape (geometry/export.py)
"""
import lost
import ltm3d
import vat
from engine.commands import UserError
from engine.files import read_config

MODELS = {"ltm3d": ltm3d, "vat": vat, "lost": lost}


def model_in(folder, wanted=None):
    """The name of the model in a folder: its last stage is there, or else a stage that is its own; or it is ltm3d.
    wanted: the one that it has to be."""
    stages = read_config(folder).keys()
    if wanted and not stages:
        raise UserError(f"nothing is trained in {folder}; --checkpoint takes a folder that train.py made")
    whole = [name for name, model in MODELS.items() if model.LAST in stages]
    begun = [name for name, model in MODELS.items() if ({*model.STAGES} - {*ltm3d.STAGES}) & stages]
    found = [*whole, *begun] or ["ltm3d"]
    if wanted and wanted not in found:
        raise UserError(f"{folder} holds {found[0]}, not {wanted}; give another --checkpoint")
    return wanted or found[0]
