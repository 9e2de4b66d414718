"""Representations of shapes: the one registry. A file of this folder is a representation, from end to end.

head.py lists what such a class has; sdf.py is the simplest. A new one needs a line here, and no other file.
"""
from representations.gs import GaussianHead
from representations.mesh import MeshHead
from representations.pc import PointHead
from representations.sdf import SdfHead

REPRESENTATIONS = {
    "sdf": SdfHead,
    "pc": PointHead,
    "mesh": MeshHead,
    "gs": GaussianHead,
}


def spelling(name):
    '''The name of a representation; "3dgs" is accepted for "gs".'''
    return {"3dgs": "gs"}.get(name.lower(), name.lower())


def with_needs(reps):
    """Representations -> these, each after the representations that it needs."""
    return list(dict.fromkeys(name for rep in reps for name in (*REPRESENTATIONS[rep].needs, rep)))


def accepting(option):
    """The representations that have an option of decoding: "resolution", "points" or "faces"."""
    return [rep for rep, head in REPRESENTATIONS.items() if option in head.options]
