"""Does a network gain from synthetic stars? Minutes on two cores, with TensorFlow.

  tuning.py [--out FILE] [--epochs N] [--folds N] [--few N]

Networks are trained on real stars alone, on synthetic ones first, and on synthetic ones only; each
real star is left out once. The chapter E_physics shows the record, data/sky_tuning.ecsv."""

import argparse
import os
import sys
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np  # noqa: E402
from astropy.table import QTable, vstack  # noqa: E402

from stellar_lab.archives import real_stars  # noqa: E402
from stellar_lab.inversion import infer  # noqa: E402
from stellar_lab.judging import error_table  # noqa: E402
from stellar_lab.models import fold_numbers  # noqa: E402
from stellar_lab.physics import (  # noqa: E402
    PHYSICS_LABELS,
    draw_stars,
    physics_model,
    redraw,
)
from stellar_lab.survey import LabError, write_table  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LABELS = ("TEFF", "LOGG", "M_H", "ALPHA_M", "C_M", "N_M")


def as_survey_labels(labels):
    """Labels (N, 10) of synthetic stars as the survey has them, (N, 6) in the order of LABELS.

    [alpha/M] is the mean of Mg, Si and the others."""
    column = dict(zip(PHYSICS_LABELS, np.asarray(labels, dtype=float).T))
    alpha = (column["MG_FE"] + column["SI_FE"] + column["ALPHA_FE"]) / 3
    return np.column_stack(
        [column["TEFF"], column["LOGG"], column["FE_H"], alpha, column["C_FE"], column["N_FE"]]
    )


def noisy_stars(stars, spectra, n=1000, seed=5):
    """Labels (n, 6), flux and ivar (n, P) of synthetic stars to train a network on.

    `stars` makes them (`SyntheticStars`); they get the noise and bad pixels of the real `spectra`.
    """
    rng = np.random.default_rng(seed)
    labels = draw_stars(n, seed)
    ivar = spectra.ivar[rng.integers(0, len(spectra), n)]
    noise = np.where(ivar > 0, 1 / np.sqrt(np.where(ivar > 0, ivar, 1)), 0)
    flux = stars(labels) + noise * rng.standard_normal(ivar.shape)
    return as_survey_labels(labels), flux.astype("f4"), ivar


def synthetic_first(synthetic=None, first_epochs=10, **options):
    """An ErrorAwareNetwork that sees synthetic stars before the real ones that `fit` gets.

    `synthetic` comes from `noisy_stars`; `options` are the network's. TensorFlow is imported here.
    """
    from stellar_lab.augmentation import ErrorAwareNetwork

    tf = import_module("tensorflow")

    class SyntheticFirst(ErrorAwareNetwork):
        def _train(self, data, held, checkpoint, progress):
            epochs = self.epochs
            real = self.training_labels_
            if synthetic is not None:
                labels, flux, ivar = synthetic
                # the learning rate's course counts stars and epochs
                self.training_labels_ = labels
                self.epochs = first_epochs
                arrays = (flux, ivar, self.scale(labels))
                tensors = tuple(tf.constant(array, tf.float32) for array in arrays)
                super()._train(tensors, None, None, progress)
                self.training_labels_ = real
                self.epochs = epochs
            if epochs:
                super()._train(data, held, checkpoint, progress)

    return SyntheticFirst(**options)


@dataclass
class Way:
    """One way of training."""

    name: str
    real_stars: str  # how many, in the table's words
    synthetic: tuple = None
    limit: int = None  # real stars of a fold to train on; all by default
    epochs: int = 40  # on real stars


def left_out_labels(way, spectra, numbers, **options):
    """Labels (N, 6) of all stars, each by a network that did not see it."""
    found = np.empty((len(spectra), len(LABELS)))
    for fold in np.unique(numbers):
        rows = np.flatnonzero(numbers != fold)
        train = np.random.default_rng(fold).permutation(rows)[: way.limit]
        network = synthetic_first(
            way.synthetic, labels=LABELS, epochs=way.epochs, members=8, width=64, **options
        )
        network.fit(spectra[train], progress=False)
        table = infer(network, spectra[numbers == fold])
        columns = [table[name.lower()] for name in LABELS]
        plain = [np.asarray(getattr(column, "value", column)) for column in columns]
        found[numbers == fold] = np.column_stack(plain)
    return found


def tuning_table(model, spectra, folds=3, few=40, epochs=40, progress=True, **options):
    """Errors of all ways of training on real giants, from `redraw`: a row per way and label."""
    numbers = fold_numbers(len(spectra), folds)
    truth = spectra.labels(LABELS)
    synthetic = noisy_stars(model.stars_, spectra)
    ways = [
        Way("real", "all", epochs=epochs),
        Way("synthetic, then real", "all", synthetic, epochs=epochs),
        Way("synthetic only", "none", synthetic, epochs=0),
        Way("real", f"{few}", limit=few, epochs=epochs),
        Way("synthetic, then real", f"{few}", synthetic, limit=few, epochs=epochs),
    ]
    parts = []
    for way in ways:
        found = left_out_labels(way, spectra, numbers, **options)
        columns = {name.lower(): found[:, k] for k, name in enumerate(LABELS)}
        errors = error_table(QTable(columns), truth, LABELS, truth.std(axis=0))
        errors.add_column([way.name] * len(errors), name="trained on", index=0)
        errors.add_column([way.real_stars] * len(errors), name="real stars", index=1)
        if progress:
            mean = errors["scaled_rmse"].mean()
            print(f"{way.name}, {way.real_stars} real stars: scaled RMSE {mean:.3f}", flush=True)
        parts.append(errors)
    return QTable(vstack(parts))


def record_tuning(path, **options):
    """The run on the embedded real giants, written to `path`."""
    spectra = redraw(real_stars())
    model = physics_model()
    giants = spectra[spectra.labels(("LOGG",))[:, 0] < 3.8]
    table = tuning_table(model, giants, **options)
    table.meta = {
        "command": "tools/tuning.py",
        "date": date.today().isoformat(),
        "stars": len(giants),
        "emulator_models": int(model.stars_.emulator.facts["MODELS"]),
        "tensorflow": import_module("tensorflow").__version__,
        "numpy": np.__version__,
    }
    write_table(table, path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "sky_tuning.ecsv")
    parser.add_argument("--epochs", type=int, default=40, help="on real stars")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--few", type=int, default=40, help="real stars of the smaller contest")
    options = parser.parse_args()
    try:
        record_tuning(options.out, epochs=options.epochs, folds=options.folds, few=options.few)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
