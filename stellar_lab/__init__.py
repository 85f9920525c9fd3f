"""Reading stars: labels from spectra, with errors that can be believed.

The names below are the front door; each is loaded when it is first used. The rooms behind it are
the modules of the package, one for each chapter of the book: ``stellar_lab.survey`` to
``stellar_lab.cli``.
"""

__version__ = "0.1.0"

from importlib import import_module

_FRONT_DOOR = {
    "Cannon": "cannon",
    "Flag": "models",
    "HiddenCannon": "hidden",
    "LatentLabels": "latents",
    "Refusal": "refusal",
    "RidgeLabels": "readers",
    "Spectra": "survey",
    "check_star": "spectrum",
    "cross_label": "judging",
    "error_table": "judging",
    "fold_numbers": "models",
    "from_arrays": "spectrum",
    "infer": "inversion",
    "label": "labelling",
    "label_star": "spectrum",
    "load_model": "training",
    "normalize": "normalize",
    "physics_model": "physics",
    "plot_comparison": "judging",
    "plot_fit": "cannon",
    "read_archive": "clean",
    "read_files": "clean",
    "read_spectrum": "spectrum",
    "repeats": "visits",
    "train": "training",
    "training_set": "normalize",
    "with_error_model": "judging",
}
__all__ = list(_FRONT_DOOR)


def __getattr__(name):
    if name not in _FRONT_DOOR:
        raise AttributeError(f"module 'stellar_lab' has no attribute {name!r}")
    room = import_module(f"stellar_lab.{_FRONT_DOOR[name]}")
    if _FRONT_DOOR[name] == "cannon":
        import_module("stellar_lab.inversion")  # which teaches a Cannon to answer
    if name == _FRONT_DOOR[name]:
        return room  # `normalize`: the room has the function's name, and can be called
    globals()[name] = getattr(room, name)
    return globals()[name]


def __dir__():
    return sorted([*globals(), *_FRONT_DOOR])
