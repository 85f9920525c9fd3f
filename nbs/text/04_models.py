# %% [markdown]
# # What does every model of labels owe?
# > The contract between spectra, models and tables: who learns and who is asked, how labels are scaled, when an answer deserves doubt, and how a model is kept.
#
# **Question.** This book will meet many models: a polynomial for each pixel, a straight line, networks, physics. How can one set of tools train, judge, flag and keep
# them all, so that a comparison of models compares nothing but the models?
#
# **Idea.** Whatever a model does inside, it meets the same five duties.
# - It learns from stars with known labels, and refuses what it cannot learn from.
# - It works with *scaled* labels, so that 100 K and 0.1 dex weigh alike.
# - It gives for each star labels, a covariance, and the facts that tell when to doubt them.
# - It says of what kind its errors are.
# - It can be written to a file and read back, without running a stranger's code.
#
# What a model gives is an *answer*. One function, `infer`, turns the answer of any model into one table, and one function, `label_table`, decides the flags for all.
#
# You learn this contract by meeting it: the smallest model that fulfils it has a dozen lines.

# %%
#| default_exp models

# %%
#| export
import hashlib
import inspect
import math
import os
import re
import stat
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import IntFlag
from functools import singledispatch, wraps
from importlib import import_module
from pathlib import Path

import asdf
import numpy as np
import sklearn
import yaml
from astropy.table import QTable, Table
from scipy.spatial import cKDTree
from sklearn.base import BaseEstimator
from sklearn.model_selection import GroupKFold, train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted
from threadpoolctl import ThreadpoolController

from stellar_lab import __version__
from stellar_lab.normalize import MASKED_LIMIT, check_grid, continuum_steps
from stellar_lab.survey import (
    LABELS,
    LabError,
    Spectra,
    WrongFile,
    atomic_path,
    label_record,
    on_band,
    said_of,
)

# %%
#| hide
import tempfile

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from sklearn.exceptions import NotFittedError

from stellar_lab.normalize import training_set
from stellar_lab.survey import archive_record, archive_root, use_style


# %% [markdown]
# ## Who learns, who is asked
# A model that is judged on the stars it learned from looks better than it is. So some stars are left out. One split serves all models of this book, and it is the one
# of the original lab: a third of the stars, drawn with the seed 42.

# %%
#| export
def train_test_rows(n: int, test_size: float = 0.33, seed: int = 42) -> tuple:
    """Rows for training and rows for testing: the split of the original lab, shared by all models.

    Parameters
    ----------
    n : int
        number of stars
    test_size : float, default 0.33
        share of the stars to leave out for testing
    seed : int, default 42
        of the draw

    Returns
    -------
    tuple of two (n_train,) and (n_test,) int arrays
    """
    return train_test_split(np.arange(n), test_size=test_size, random_state=seed)


# %%
use_style()
names = list(archive_record(archive_root()).labels)
spectra, ledger = training_set(archive_root(), progress=False)
train, test = train_test_rows(len(spectra))
print(f"{len(spectra)} stars: {len(train)} to learn from, {len(test)} to ask")
assert not set(train) & set(test)

# %% [markdown]
# ## The simplest model
# A star looks like the training star whose spectrum is nearest, pixel by pixel. So it may have the labels of that star. That is a whole model, and it needs four lines:

# %%
known = np.where(spectra[train].ivar > 0, spectra[train].flux, 1)
for row in test[:5]:
    usable = spectra.ivar[row] > 0
    distance = ((spectra.flux[row] - known)[:, usable] ** 2).sum(axis=1)
    nearest = train[distance.argmin()]
    catalogue = spectra.labels(names[:3])[row].round(2)
    print(spectra.stars["APOGEE_ID"][row], catalogue, spectra.labels(names[:3])[nearest].round(2))


# %% [markdown]
# One row per star: its name, three labels of the catalogue, and the same labels of its nearest training star. The temperatures agree to a few hundred kelvin.
#
# But would you use these numbers? They have no units and no errors. Nothing warns us of a star that is like no training star, or of one that has hardly a good pixel. Spectra
# that were normalized in another way would be answered just as calmly. And tomorrow the model is gone. The rest of the chapter adds what is missing, for this model and for all others at once.

# %% [markdown]
# ## Every star once
# One split is one draw. In *folds* every star is left out once: the stars are dealt into five hands, and each hand is labelled by a model that learned from the other
# four. A star observed in two fields has two rows. Both rows go into the same hand, or else the model would be asked about a star that it knows.

# %%
#| export
def fold_numbers(n: int, folds: int = 5, seed: int = 0, stars: Sequence = None) -> np.ndarray:
    """The fold of each of `n` rows: the rows in random order, dealt out one by one.

    Parameters
    ----------
    n : int
        number of rows
    folds : int, default 5
        from 2 to `n`
    seed : int, default 0
        of the random order
    stars : (n,) sequence, optional
        name of the star of each row; all rows of a star share the fold of its first row

    Returns
    -------
    (n,) int array
        from 0 to `folds` - 1; without repeated stars, folds differ by at most one row

    Raises
    ------
    LabError
        where there cannot be so many folds, or `stars` has not `n` names

    Examples
    --------
    >>> from stellar_lab import fold_numbers
    >>> fold_numbers(6, folds=3, stars=["a", "b", "c", "d", "e", "a"]).tolist()
    [1, 2, 1, 0, 0, 1]
    """
    if not 2 <= folds <= n:
        raise LabError(f"{folds} folds of {n} stars: choose from 2 to {n}")
    if stars is not None and len(stars) != n:
        raise LabError(f"{len(stars)} names of stars for {n} rows: give one for each row")
    numbers = np.empty(n, dtype=int)
    numbers[np.random.default_rng(seed).permutation(n)] = np.arange(n) % folds
    if stars is None:
        return numbers
    _, first, star = np.unique(
        np.asarray(stars).astype(str), return_index=True, return_inverse=True
    )
    return numbers[first][star]


# %%
numbers = fold_numbers(11, folds=3)
twice = fold_numbers(11, folds=3, stars=[*"abcdefghij", "a"])
print(f"folds {numbers}, and with the first star seen twice {twice}")
assert np.ptp(np.bincount(numbers)) <= 1
assert twice[10] == twice[0] and np.array_equal(twice[:10], numbers[:10])
with pytest.raises(LabError, match="2 folds of 1 stars"):
    fold_numbers(1, folds=2)
with pytest.raises(LabError, match="2 names of stars for 3 rows"):
    fold_numbers(3, folds=2, stars="ab")


# %% [markdown]
# Stars of a cluster are alike in more than their labels. A harder question leaves out a whole group at a time, such as all stars of a field.

# %%
#| exporti
def group_numbers(groups: Sequence, most: int = 5, what: str = "group") -> np.ndarray:
    """The set in which each row's group is left out, where whole groups stay together.

    Parameters
    ----------
    groups : (n,) sequence
        name of the group of each row
    most : int, default 5
        sets; where there are more groups, several are left out together
    what : str, default "group"
        what the groups are, for the message

    Returns
    -------
    (n,) int array

    Raises
    ------
    LabError
        where all rows are in one group

    Examples
    --------
    >>> from stellar_lab.models import group_numbers
    >>> group_numbers(["a", "b", "a", "c"], most=2).tolist()
    [0, 1, 0, 1]
    """
    names = np.asarray(groups).astype(str)
    count = len(set(names))
    if count < 2:
        raise LabError(
            f"all stars have the same {what}: nothing is left to train on when it is left out"
        )
    numbers = np.empty(len(names), dtype=int)
    splits = GroupKFold(min(count, most)).split(names, groups=names)
    for number, (_, rows) in enumerate(splits):
        numbers[rows] = number
    return numbers


# %%
fields = np.array(["M13", "M67", "M13", "M92", "M67"])
numbers = group_numbers(fields, most=2)
print(dict(zip(fields.tolist(), numbers.tolist())))
assert all(len(set(numbers[fields == field])) == 1 for field in fields)


# %% [markdown]
# ## Labels, from any hand
# Training labels come as an array, a `pandas` table or an astropy table, or inside a `Spectra`. Names are kept: the columns of a table name the labels, and a known
# name in any case is the survey's own, with its unit. A mistake is answered before it costs time. The most frequent one is the order: scikit-learn's other
# estimators read `fit(spectra, labels)`, ours `fit(labels, flux)`, for the labels are what the spectrum follows from.

# %%
#| export
def name_list(names) -> list:
    """Names of labels as a list, also where there is only one.

    Parameters
    ----------
    names : str or sequence of str
        a text is one name, and not a sequence of letters

    Returns
    -------
    list of str
    """
    return [names] if isinstance(names, str) else [str(name) for name in names]


def label_values(table, names) -> np.ndarray:
    """Labels of a table as plain numbers.

    Parameters
    ----------
    table : Table or QTable
        with a column for each name in lower case, as `infer` gives it
    names : str or sequence of str
        K labels, or columns such as ``"teff_err"``, in any case

    Returns
    -------
    (N, K) float array
        in the units of the columns

    Raises
    ------
    LabError
        where the table lacks a column; it lists those that there are
    """
    columns = [name.lower() for name in name_list(names)]
    missing = [column for column in columns if column not in table.colnames]
    if missing:
        raise LabError(
            f"the table has no column {', '.join(missing)}: it has {', '.join(table.colnames)}"
        )
    return np.column_stack([_numbers(table[column]) for column in columns])


def stated_errors(spectra: Spectra, names) -> np.ndarray | None:
    """The errors (N, K) of labels that the stars' catalogue states, NaN where it states none for a
    star; None where it lacks the column of a label."""
    columns = {f"{name}_ERR" for name in names}
    return spectra.label_errors(names) if columns <= set(spectra.stars.colnames) else None


def _numbers(column):
    "A column of a table as plain numbers; NaN where it is masked."
    values = getattr(column, "value", column)
    return np.ma.filled(np.ma.asarray(values, dtype=float), np.nan)


# %%
few = Table({"teff": [4500.0, 4800.0], "teff_err": [90.0, 60.0]})
print(label_values(few, ["TEFF", "teff_err"]).tolist(), label_values(few, "TEFF").tolist())
with pytest.raises(LabError, match="no column logg: it has teff, teff_err"):
    label_values(few, ["TEFF", "LOGG"])


# %%
#| exporti
def number_array(values, name: str, kinds: str = "fiu") -> np.ndarray:
    """Values as an array of numbers.

    Parameters
    ----------
    values : array_like
    name : str
        for the message
    kinds : str, default "fiu"
        kinds of numpy's dtypes that are taken: floats and integers

    Returns
    -------
    ndarray
        as it is, where it is one; NaN where a masked array hides a number

    Raises
    ------
    LabError
        for text, complex numbers, True and False, and what is no array at all
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise LabError(f"{name} is no array of numbers: give one, of one length") from error
    if array.dtype.kind not in kinds:
        raise LabError(f"{name} holds {array.dtype}, not real numbers: give an array of numbers")
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        return values.astype(float).filled(np.nan)
    return array


# %%
masked_text = np.ma.masked_equal(["1", "2"], "2")
for wrong in (["a", "b"], [1j], [True], [[1], [1, 2]], None, masked_text):
    with pytest.raises(LabError, match="flux (holds|is no array)"):
        number_array(wrong, "flux")
hidden = np.ma.masked_equal([1, 2, 999], 999)
print(number_array([1, 2.5], "flux"), number_array(hidden, "flux"), said_of(KeyError("one")))


# %%
#| export
def _named_labels(labels, names):
    """Labels as an array (N, K), and their names: those given, those of the table's columns, or
    numbers."""
    columns = getattr(labels, "colnames", getattr(labels, "columns", None))
    try:
        if columns is not None:
            names = list(columns) if names is None else name_list(names)
            labels = np.column_stack([_numbers(labels[c]) for c in _columns_of(columns, names)])
        labels = np.asarray(number_array(labels, "labels", "fiuO"), dtype=float)
    except LabError:
        raise
    except (TypeError, ValueError) as error:
        raise LabError("labels must be numbers, a column for each label") from error
    if labels.ndim == 1:
        labels = labels[None]
    if names is None:
        names = [f"LABEL_{k}" for k in range(labels.shape[-1])]
    return labels, tuple(label_record(name).name for name in name_list(names))


def _columns_of(columns, names):
    "The table's columns of these names, in any case; LabError where one is missing."
    known = {str(column).upper(): column for column in columns}
    missing = [str(name) for name in names if str(name).upper() not in known]
    if missing:
        raise LabError(
            f"the table of labels has no column {', '.join(missing)}: "
            f"it has {', '.join(map(str, columns))}"
        )
    return [known[str(name).upper()] for name in names]


# %%
frame = pd.DataFrame({"teff": [4500.0, 4800.0], "Age": [9.1, 2.3]})
values, columns = _named_labels(frame, None)
print(columns, values.tolist())
assert columns == ("TEFF", "Age")
turned, _ = _named_labels(frame, ["AGE", "teff"])  # by name, whatever the order
assert np.array_equal(turned, values[:, ::-1])
with pytest.raises(LabError, match="no column logg: it has teff, Age"):
    _named_labels(frame, ["teff", "logg"])
assert _named_labels(frame, "teff")[1] == ("TEFF",)  # one name, not four letters
with pytest.raises(LabError, match="labels must be numbers"):
    _named_labels(pd.DataFrame({"teff": ["hot", "cool"]}), None)

# %% [markdown]
# A name becomes a column of the table that `infer` gives, so no two labels may share one, and none may be called like a column that the table has anyway.

# %%
#| export
_COLUMNS = ("apogee_id", "covariance", "chi2", "n_good", "steps", "flags")  # of every table


def _check_names(names, n_labels):
    "LabError unless there is a name for each label, and each has columns of its own."
    if len(names) != n_labels:
        raise LabError(f"{len(names)} names ({', '.join(names)}) for {n_labels} labels")
    taken = set(_COLUMNS)
    for name in names:
        if not name or "," in name or not name.isprintable():
            raise LabError(f"a label cannot be called {name!r}: give it a name without commas")
        columns = {name.lower(), f"{name.lower()}_err"}
        if taken & columns:
            raise LabError(
                f"a label cannot be called {name}: the table of labels would have two columns "
                f"{', '.join(sorted(taken & columns))}; choose another name"
            )
        taken |= columns


# %%
#| export
_MANY_LABELS = 20  # more labels than this, and than pixels, are spectra
_LARGEST_LABEL = 1e30  # in any unit; its square must be a number, too


def _check_training(labels, flux, ivar, names, gaps=False):
    "LabError for training stars that no model could learn from; with gaps a star may lack labels."
    if labels.ndim != 2 or flux.ndim != 2 or flux.shape != ivar.shape or len(labels) != len(flux):
        raise LabError(
            f"labels {labels.shape}, flux {flux.shape} and ivar {ivar.shape} "
            "must be (N, K), (N, P) and (N, P)"
        )
    if not len(labels) or not labels.shape[1]:
        raise LabError(f"labels have the shape {labels.shape}: there is nothing to learn from")
    if labels.shape[1] > max(flux.shape[1], _MANY_LABELS):
        raise LabError(
            f"labels come first, then flux: fit(labels, flux, ivar). You gave {labels.shape[1]} "
            f"labels and {flux.shape[1]} pixels per star"
        )
    _check_names(names, labels.shape[1])
    known = np.isfinite(labels)
    without = ~known.all(axis=1)
    if without.any() and not gaps:
        raise LabError(
            f"{without.sum()} of {len(labels)} training stars lack a label "
            f"(first: row {np.argmax(without)}): leave them out (apply_cuts)"
        )
    if not known.any(axis=0).all():
        raise LabError(f"no training star has {names[np.argmin(known.any(axis=0))]}: leave it out")
    star, label = np.unravel_index(np.nan_to_num(np.abs(labels)).argmax(), labels.shape)
    if np.abs(labels[star, label]) > _LARGEST_LABEL:
        raise LabError(
            f"star {star} has the {names[label]} {labels[star, label]:.3g}, "
            "which is no star's: leave it out"
        )
    _check_outliers(labels, names)


_FARTHEST = 1e5  # times the spread of the other stars


def _check_outliers(labels, names):
    "LabError where one star's label makes those of all others the same number."
    if len(labels) < 10:
        return
    away = np.abs(labels - np.nanmedian(labels, axis=0))
    spread = np.nanmedian(away, axis=0)
    far = np.nan_to_num(away) / np.where(spread > 0, spread, np.inf)
    star, label = np.unravel_index(far.argmax(), far.shape)
    if far[star, label] > _FARTHEST:
        raise LabError(
            f"star {star} has the {names[label]} {labels[star, label]:.3g}, "
            f"{far[star, label]:.0e} times farther from the other stars than these are from each "
            "other: leave it out"
        )


# %%
with pytest.raises(LabError, match="labels come first"):
    _check_training(np.ones((5, 300)), np.ones((5, 6)), np.ones((5, 6)), columns)
for wrong in (["TEFF", "teff"], ["TEFF", "chi2"], ["age", "age_err"]):
    with pytest.raises(LabError, match="a label cannot be called") as refused:
        _check_training(np.ones((5, 2)), np.ones((5, 6)), np.ones((5, 6)), wrong)
    print(refused.value)

# %% [markdown]
# ## Pixels that count
# A pixel whose inverse variance `ivar` is 0 is unusable, and may hold anything. All others count. So they need a finite flux, and their `ivar` is a positive number. What breaks this rule is
# answered with the star's number, in training as in labelling: a single NaN would otherwise spread over all stars.

# %%
#| export
_ROWS = 1024  # stars that are looked at in one go


def _check_pixels(flux, ivar, first=0):
    "LabError where a pixel that counts holds no number; `first` is the first star's number."
    for start in range(0, len(flux), _ROWS):
        f = flux[start : start + _ROWS]
        w = ivar[start : start + _ROWS]
        negative = w < 0
        if negative.any():
            star, count = _first_star(negative)
            raise LabError(
                f"ivar is negative in {count} pixels of star {first + start + star}: "
                "give 0 where a pixel is unusable"
            )
        broken = ~np.isfinite(f) & (w > 0) | ~np.isfinite(w)
        if broken.any():
            star, count = _first_star(broken)
            raise LabError(
                f"star {first + start + star} has a usable pixel without a finite flux or ivar "
                f"({count} such pixels): set ivar to 0 there"
            )


_LARGEST_FLUX = 1e15  # relative to anything; its square must be a number of 32 bits


def _check_size(flux, ivar):
    "LabError where a pixel that counts is beyond any star's light."
    for start in range(0, len(flux), _ROWS):
        rows = slice(start, start + _ROWS)
        wild = (np.abs(flux[rows]) > _LARGEST_FLUX) & (ivar[rows] > 0)
        if wild.any():
            star, count = _first_star(wild)
            raise LabError(
                f"star {start + star} has {count} pixels with a flux beyond any star's: "
                "set ivar to 0 there"
            )


def _first_star(pixels):
    "The first star that has such a pixel (N, P), and how many it has."
    star = int(np.argmax(pixels.any(axis=1)))
    return star, int(pixels[star].sum())


# %%
#| exporti
def finite_flux(flux: np.ndarray, ivar: np.ndarray, first: int = 0) -> np.ndarray:
    """Flux that can be multiplied.

    Parameters
    ----------
    flux, ivar : (N, P) arrays
    first : int, default 0
        number of the first star, for the message

    Returns
    -------
    (N, P) array
        zero where the flux is not finite and not usable

    Raises
    ------
    LabError
        where a usable pixel has no finite flux or ivar, or an ivar is negative
    """
    _check_pixels(flux, ivar, first)
    return np.nan_to_num(flux, nan=0, posinf=0, neginf=0)


# %%
flux = np.array([[1.0, 0.9, 0.8], [1.0, np.nan, np.inf]])
ivar = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
print(finite_flux(flux, ivar).tolist())
for wrong in (np.ones((2, 3)), -ivar, np.where(ivar > 0, ivar, np.nan)):
    with pytest.raises(LabError) as refused:
        finite_flux(flux, wrong)
    print(refused.value)


# %% [markdown]
# ## Scaled labels
# A temperature runs over a thousand kelvin, a metallicity over one dex. Every model works with the *scaled* label $(\ell - \text{pivot}) / \text{scale}$; pivot and
# scale are the mean and the standard deviation of the training stars.

# %%
#| export
class _Scaled:
    "Physical units outside, scaled labels inside."

    def scale(self, labels) -> np.ndarray:
        "Labels in physical units (N, K) -> scaled labels (N, K)."
        return (np.asarray(labels, dtype=float) - self.pivots_) / self.scales_

    def unscale(self, labels) -> np.ndarray:
        "Scaled labels (N, K) -> labels in physical units (N, K)."
        return np.asarray(labels, dtype=float) * self.scales_ + self.pivots_


# %%
two = _Scaled()
two.pivots_ = np.array([4500, 2.0])
two.scales_ = np.array([300, 0.7])
print("a star of 4800 K and log g 1.3 has the scaled labels", two.scale([[4800, 1.3]]).tolist())
assert np.allclose(two.unscale(two.scale([[4800, 1.3]])), [[4800, 1.3]])


# %% [markdown]
# ## What is learned first
# Whatever comes later in its `fit`, a model begins by taking its training stars: it checks them, learns the scaling of their labels, and keeps what is known of their spectra.

# %%
#| export
def _checked_grid(wavelength, n_pixels):
    "The wavelength of each pixel, or None where they are not known."
    if wavelength is None:
        return None
    grid = np.array(wavelength, dtype=float)
    if grid.shape != (n_pixels,):
        raise LabError(f"wavelength has the shape {grid.shape}, but flux has {n_pixels} pixels")
    if not np.isfinite(grid).all() or np.any(np.diff(grid) <= 0):
        raise LabError("wavelengths must be finite and increase from pixel to pixel [Angstrom]")
    return grid


def _plain_facts(meta):
    "What a table says of its spectra, as far as a file can keep it."
    facts = {name: _plain_scalar(value) for name, value in meta.items()}
    return {name: v for name, v in facts.items() if isinstance(v, str | int | float | bool | list)}


def _plain_scalar(value):
    "A number of numpy as Python's own, also within a list."
    if isinstance(value, list):
        return [_plain_scalar(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def _names_of_stars(spectra, labels):
    "Names (N,) that copies of a star share: its own, else its labels."
    if spectra is not None and "APOGEE_ID" in spectra.stars.colnames:
        return np.asarray(spectra.stars["APOGEE_ID"]).astype(str)
    return np.array([row.tobytes().hex() for row in labels])


# %%
#| exporti
# what `apply_error_model` knows of the errors
ERROR_MODEL = (
    *("error_inflation_", "error_base_", "error_floor_", "error_slopes_"),
    "error_correlation_",
)
# what is learned from left-out stars, after a fit
_OF_LEFT_OUT_STARS = (*ERROR_MODEL, "catalogue_noise_", "fit_limit_", "refusal_")


# %%
#| export
class _Taught(_Scaled):
    "A model that takes training stars; `labels` is among its parameters."

    pivots = None  # parameters of some subclasses
    scales = None
    _takes_gaps = False  # may training stars lack some of their labels?

    def _begin(self, labels, flux, ivar, label_names, wavelength):
        "Check the training stars and learn their labels' scaling; returns flux and ivar (N, P)."
        for learned in _OF_LEFT_OUT_STARS:
            vars(self).pop(learned, None)  # of an earlier fit
        metadata = {}
        names = self.labels if label_names is None else label_names
        spectra = None
        if isinstance(labels, Spectra):
            spectra = labels
            names = spectra.label_names if self.labels is None else name_list(self.labels)
            labels = spectra.labels(names)
            flux, ivar, wavelength = spectra.flux, spectra.ivar, spectra.wavelength
            metadata = _plain_facts(spectra.stars.meta)
        elif flux is None:
            raise LabError("flux is missing: fit(labels, flux, ivar), or fit(spectra)")
        labels, names = _named_labels(labels, names)
        flux = number_array(flux, "flux")
        ivar = np.ones(flux.shape) if ivar is None else number_array(ivar, "ivar")
        _check_training(labels, flux, ivar, names, self._takes_gaps)
        _check_pixels(flux, ivar)
        _check_size(flux, ivar)
        self._learn_scaling(labels)
        self.label_names_ = names
        self._star_names = _names_of_stars(spectra, labels)
        self.metadata_ = metadata
        self.wavelength_ = _checked_grid(wavelength, flux.shape[1])
        self.training_labels_ = labels
        return flux, ivar

    def _learn_scaling(self, labels):
        scaler = StandardScaler().fit(labels)
        self.pivots_ = np.array(scaler.mean_ if self.pivots is None else self.pivots, dtype=float)
        self.scales_ = np.array(scaler.scale_ if self.scales is None else self.scales, dtype=float)

    def _digest(self, *columns):
        "Fingerprint of the training set: labels, and numbers (N,) that sum up each spectrum."
        digest = hashlib.sha256(self.training_labels_.tobytes())
        for column in columns:
            digest.update(column.tobytes())
        return digest.hexdigest()


# %%
pupil = _Taught()
pupil.labels = "teff"
pupil._begin(spectra[train], None, None, None, None)
print(f"labels {pupil.label_names_}, mean {pupil.pivots_.round()}, spread {pupil.scales_.round()}")
assert _plain_facts({"row": np.int64(1), "dark": np.float32(0.5), "a": np.ones(3)}) == {
    "row": 1,
    "dark": 0.5,
}
for grid in (np.arange(5.0), [3.0, 2, 1], [1.0, 2, np.inf]):
    with pytest.raises(LabError, match="wavelength"):
        _checked_grid(grid, 3)


# %% [markdown]
# ## What a file must hold
# A model is kept in a file, and a file can be anything: cut short, of another version, made by somebody with bad intentions. So each kind of model says beforehand what its file must hold: under which
# name, of which kind, in which shape. Shapes are written in letters, P for the pixels, N for the training stars, K for the labels; a letter means the same number everywhere in the file.

# %%
#| exporti
@dataclass(frozen=True)
class Held:
    """What a model's file must hold under a name.

    Parameters
    ----------
    kind : str
        ``number``, ``whole`` or ``flag``: one of them, or an array; ``text``; ``names``, a list of
        short texts; ``texts``, a list of any; ``facts``, a dict; ``any``
    shape : str, default ""
        of an array, a letter for each length; a letter means one length throughout the file, and
        ``*`` any
    holes : bool, default False
        may numbers be NaN?
    low, high : float, default -1e30 and 1e30
        the smallest and the largest number
    optional : bool, default False
        the file may do without it, or hold None
    several : bool, default False
        a list of such arrays
    """

    kind: str
    shape: str = ""
    holes: bool = False
    low: float = -1e30
    high: float = 1e30
    optional: bool = False
    several: bool = False


_DTYPES = {"number": "fiu", "whole": "iu", "flag": "b"}  # kind -> kinds of numpy's dtypes
_TYPES = {"text": str, "names": list, "texts": list, "facts": dict, "any": object}
_NEVER_EMPTY = "PNKT"


def _check_numbers(name, array, held):
    "ValueError where numbers are not finite, or beyond what they can be."
    unknown = np.isinf(array) if held.holes else ~np.isfinite(array)
    if unknown.any():
        raise WrongFile(f"{unknown.sum()} of {array.size} numbers in {name} are not finite")
    wide = np.asarray(array, float)  # a limit may be no number of the array's own type
    if np.any(wide < held.low) or np.any(wide > held.high):
        raise WrongFile(f"{name} holds numbers beyond {held.low:g} to {held.high:g}")


def _check_shape(name, array, held, lengths):
    "ValueError for another shape than the declared one; `lengths` learns what letters stand for."
    wanted = [lengths.get(letter) for letter in held.shape]
    known = len(wanted) == array.ndim
    if not known or any(w not in (None, n) for w, n in zip(wanted, array.shape)):
        letters = ", ".join(held.shape)
        there = ", ".join(f"{letter} = {n}" for letter, n in lengths.items() if letter in letters)
        raise WrongFile(
            f"{name} has the shape {array.shape} instead of ({letters}){there and f', {there}'}"
        )
    for letter, length in zip(held.shape, array.shape):
        if not length and letter in _NEVER_EMPTY:
            raise WrongFile(f"{name} is empty")
        if letter != "*":
            lengths[letter] = length


# %%
lengths = {}
_check_shape("theta_", np.ones((5, 3)), Held("number", "PT"), lengths)
with pytest.raises(ValueError, match=r"has the shape \(4,\) instead of \(P\), P = 5"):
    _check_shape("scatter_", np.ones(4), Held("number", "P"), lengths)
print(lengths)


# %%
#| exporti
def _check_entry(name, value, held, lengths):
    "ValueError where a value is not what a file must hold under a name."
    if held.several:
        if not isinstance(value, list) or not value:
            raise WrongFile(f"{name} is no list of arrays")
        for part in value:
            _check_entry(name, part, replace(held, several=False), lengths)
        return
    if held.kind not in _DTYPES:
        if not isinstance(value, _TYPES[held.kind]):
            raise WrongFile(f"{name} is {_kind_of(value)} instead of {held.kind}")
        if held.kind == "texts" and not all(isinstance(text, str) for text in value):
            raise WrongFile(f"{name} holds something else than texts")
        if held.kind == "names":
            _check_texts(name, value)
        if held.kind == "text":
            _check_texts(name, [value])
        return
    array = np.asarray(value)
    if set(held.shape) - {"*"} and not isinstance(value, np.ndarray):
        raise WrongFile(f"{name} is {_kind_of(value)} instead of an array")
    if array.dtype.kind not in _DTYPES[held.kind]:
        raise WrongFile(f"{name} is of the type {array.dtype} instead of {held.kind}s")
    _check_shape(name, array, held, lengths)
    _check_numbers(name, array, held)


def _kind_of(value):
    "What a value is, in a word or two."
    return "nothing" if value is None else f"a {type(value).__name__}"


def _check_texts(name, texts):
    "ValueError for texts that no one could print."
    for text in texts:
        if not isinstance(text, str) or not text.isprintable() or not 0 < len(text) <= 200:
            raise WrongFile(f"{name} holds {text!r:.50} instead of text")


def check_held(tree: dict, entries: dict):
    """Does a file hold what it must?

    Parameters
    ----------
    tree : dict
        of the file
    entries : dict
        name -> `Held`

    Raises
    ------
    ValueError
        that says what is wrong
    """
    names = tree.get("label_names_")
    lengths = {"K": len(names)} if isinstance(names, list | tuple) else {}
    for name, held in entries.items():
        value = tree.get(name)
        if value is None and held.optional:
            continue
        if name not in tree:
            raise WrongFile(f"it has no entry {name}")
        _check_entry(name, value, held, lengths)


# %%
entries = {"label_names_": Held("names"), "pivots_": Held("number", "K")}
check_held({"label_names_": ["TEFF", "LOGG"], "pivots_": np.array([4500, 2.0])}, entries)
for message, wrong in {
    "pivots_ is of the type <U1 instead of numbers": np.array(["a", "b"]),
    r"pivots_ has the shape \(3,\) instead of \(K\), K = 2": np.ones(3),
    "1 of 2 numbers in pivots_ are not finite": np.array([1, np.inf]),
}.items():
    with pytest.raises(ValueError, match=message) as problem:
        check_held({"label_names_": ["TEFF", "LOGG"], "pivots_": wrong}, entries)
    print(problem.value)

# %% [markdown]
# What is right by itself can be wrong together: wavelengths that do not increase, names of labels that would share a column, a recipe that no spectrum could follow.

# %%
#| export
_META = {  # what a model may know of its spectra -> the type that it must have
    "normalized": bool,
    "product": str,
    "release": str,
    "archive": str,
    "row": int,
    "continuum_source": str,
    "mask_rule": str,
    "dark": (int, float),
    "recipe": list,
    "continuum_pixels": list,
}


def _check_metadata(meta, pixels):
    "ValueError where a model's facts of its spectra are none."
    for name, kind in _META.items():
        value = meta.get(name)
        if value is not None and not isinstance(value, kind):
            raise WrongFile(f"metadata_ has a {type(value).__name__} as {name}")
    _check_texts("metadata_", [v for v in meta.values() if isinstance(v, str) and v])
    if not 0 <= (meta.get("dark") or 0) < 1 or (meta.get("row") or 0) < 0:
        raise WrongFile("metadata_ holds a number that cannot be")
    for step in meta.get("recipe") or []:
        if not isinstance(step, dict) or not isinstance(step.get("step"), str):
            raise WrongFile("a step of its recipe has no name")
        if step["step"] == "continuum":
            _check_continuum(step, pixels)
    _check_pixel_numbers(meta.get("continuum_pixels") or [], pixels)


_RULE = {"degree": (0, 20), "run": (1, 10_000), "tolerance": (1e-9, 1e9), "min_pixels": (1, 1e6)}


def _check_continuum(step, pixels):
    "ValueError for a division by a continuum that no spectrum could go through."
    if step.keys() - {"step", "pixels"} - set(_RULE) or not {"pixels", "degree"} <= step.keys():
        raise WrongFile(f"a step of its recipe has the entries {', '.join(map(str, step))}")
    for name, (low, high) in _RULE.items():
        value = step.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = isinstance(value, int) or name == "tolerance"
        if name in step and not (name == "min_pixels" and value is None):
            if not number or not whole or not low <= value <= high:
                raise WrongFile(f"its recipe says {name} {value!r:.30}")
    if step["pixels"] is not None:
        _check_pixel_numbers(step["pixels"], pixels)


def _check_pixel_numbers(numbers, pixels):
    "ValueError unless all are numbers of pixels."
    if not isinstance(numbers, list):
        raise WrongFile("its continuum pixels are no list")
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < pixels:
            raise WrongFile(f"{number!r:.30} is no number of one of its {pixels} pixels")


def _check_correlation(matrix):
    "WrongFile for what is no matrix of correlations."
    square = np.allclose(matrix, np.transpose(matrix)) and np.allclose(np.diag(matrix), 1)
    if not square or np.linalg.eigvalsh(matrix).min() < -1e-6:
        raise WrongFile("error_correlation_ holds no correlations")


def _check_restored(model):
    "ValueError where parts that came from a file are right each, and wrong together."
    pixels = len(model.typical_flux_)
    if hasattr(model, "error_inflation_") != hasattr(model, "error_floor_"):
        raise WrongFile("its error model is only half there")
    _check_correlation(getattr(model, "error_correlation_", np.eye(1)))
    _check_names(model.label_names_, len(model.pivots_))
    _checked_grid(model.wavelength_, pixels)
    _check_metadata(model.metadata_, pixels)


# %%
_check_metadata({"product": "apstar", "normalized": True, "row": 1, "release": None}, 40)
step = {"step": "continuum", "pixels": [3, 7], "degree": 2, "run": 20, "tolerance": 0.1}
_check_metadata({"recipe": [step]}, 40)
for message, wrong in {
    "its recipe says degree 1000000000": {"degree": 10**9},
    "no number of one of its 40 pixels": {"pixels": [3, 40]},
    "the entries step, pixels, degree, run, tolerance, colour": {"colour": "red"},
}.items():
    with pytest.raises(ValueError, match=message) as problem:
        _check_metadata({"recipe": [step | wrong]}, 40)
    print(problem.value)

# %% [markdown]
# ## The model
# `LabelModel` is what all models inherit. A subclass has `labels` among its parameters, and its `fit` begins with `_begin`. What it has learned are attributes whose name ends with an underscore, as
# everywhere in scikit-learn. How it is written to a file comes [below](#a-file-without-a-pickle).

# %%
#| exporti
_NO_SOLUTION = (
    "these stars have no solution in double precision: look for a star that is far from all others,"
    " and for pixels with far too small errors or far too large flux"
)


def all_or_nothing(fit):
    """A `fit` that fails leaves the model as it was: a decorator.

    Parameters
    ----------
    fit : callable
        method of a model

    Returns
    -------
    callable
        the same; where it raises, what the model had learned before is there again
    """

    @wraps(fit)
    def fit_or_restore(self, *arguments, **options):
        before = dict(vars(self))
        try:
            return fit(self, *arguments, **options)
        except BaseException as error:
            vars(self).clear()
            vars(self).update(before)
            if isinstance(error, np.linalg.LinAlgError):
                raise LabError(_NO_SOLUTION) from error
            raise

    return fit_or_restore


# %% [markdown]
# A toy that learns, and fails half the time:

# %%
class Forgetful:
    @all_or_nothing
    def fit(self, number):
        self.number_ = number
        np.linalg.inv(np.full((2, 2), number))  # has no inverse


toy = Forgetful()
toy.number_ = "what it knew"
with pytest.raises(LabError, match="no solution in double precision"):
    toy.fit(1.0)
print(toy.number_)
assert toy.number_ == "what it knew"


# %%
#| export
class LabelModel(_Taught, BaseEstimator):
    """What all models of spectra and labels share.

    A subclass has `labels` among its parameters, calls `_begin` in `fit`, and registers with
    `answer` how it reads a spectrum. After `fit` it has ``typical_flux_`` (P,), ``usable_`` (P,)
    and ``training_digest_``.
    """

    # what its file must hold; a subclass adds to it
    _entries = {
        "parameters": Held("facts"),
        "label_names_": Held("names"),
        "metadata_": Held("facts"),
        "training_digest_": Held("text"),
        "wavelength_": Held("number", "P", low=0, optional=True),
        "pivots_": Held("number", "K"),
        "scales_": Held("number", "K", low=1e-300),
        "training_labels_": Held("number", "NK"),
        "error_inflation_": Held("number", "K", low=0, optional=True),
        "error_floor_": Held("number", "K", low=0, optional=True),
        "error_base_": Held("number", "K", low=0, optional=True),
        "error_slopes_": Held("number", "KK", low=-9, high=9, optional=True),
        "error_correlation_": Held("number", "KK", low=-1, high=1, optional=True),
        "catalogue_noise_": Held("number", "K", low=0, optional=True),
        "fit_limit_": Held("number", low=0, optional=True),
        "refusal_": Held("facts", optional=True),
    }

    @property
    def least_pixels_(self) -> int:
        "Usable pixels without which a star has no labels."
        return len(self.label_names_) + 1

    @property
    def poor_fit_limit_(self) -> float:
        "chi2 per pixel from which a fit counts as poor; infinite where the model has no chi2."
        return np.inf

    @property
    def errors_(self) -> str:
        "Of what kind the errors are: ``calibrated`` on left-out stars, or ``formal``."
        return "calibrated" if hasattr(self, "error_inflation_") else "formal"

    def _outside(self, labels):
        "Which labels (N, K) are far from all training stars, (N,) bool."
        return outside_training(self, labels)

    def save(self, path):
        """Write the model as ASDF, whole or not at all.

        Parameters
        ----------
        path : str or Path
            .asdf file; replaced if it exists

        Raises
        ------
        NotFittedError
            where there is nothing to write yet
        """
        check_is_fitted(self)
        _write_model(self, path)

    @classmethod
    def load(cls, path):
        """Read a model that `save` wrote.

        Raises
        ------
        LabError
            where the file is missing, damaged, or holds another kind of model
        """
        return _read_model(cls, path)

    def _learned(self):
        "What the file holds beside the parameters."
        learned = {name: value for name, value in vars(self).items() if name.endswith("_")}
        return {name: plain_value(value) for name, value in learned.items()}

    @classmethod
    def _from_tree(cls, tree):
        "The model again, from what its file holds."
        return _model_of(cls, tree)

    def _check_restored(self):
        "ValueError where parts that came from a file are right each, and wrong together."
        _check_restored(self)


# %% [markdown]
# Now the simplest model is a model: `fit` remembers the stars.

# %%
class NearestStar(LabelModel):
    "The labels of the training star with the most similar spectrum."

    def __init__(self, labels=None):
        self.labels = labels

    def fit(self, labels, flux=None, ivar=None, label_names=None, wavelength=None):
        flux, ivar = self._begin(labels, flux, ivar, label_names, wavelength)
        self.flux_ = np.where(ivar > 0, flux, 1).astype("f4")
        self.typical_flux_ = self.flux_.mean(axis=0)
        self.usable_ = np.ones(flux.shape[1], dtype=bool)
        self.training_digest_ = self._digest()
        return self


# %%
model = NearestStar(names).fit(spectra[train])
print(f"{len(train)} stars, labels {', '.join(model.label_names_)}; errors: {model.errors_}")
assert np.allclose(model.scale(model.training_labels_).std(axis=0), 1)
with pytest.raises(NotFittedError):
    NearestStar(names).save("nowhere.asdf")


# %% [markdown]
# ## When to doubt
# A flag is a reason to doubt a star's labels. The column `flags` is their sum, so 0 means: no reason found.

# %%
#| export
class Flag(IntFlag):
    "Reasons to doubt a star's labels; `flags` is their sum."

    NOT_CONVERGED = 1  # the search did not come to rest
    AT_BOUND = 2  # a label stands at the edge of the box that the search may not leave
    OUTSIDE_TRAINING = 4  # further from the training stars than any of them is from the others
    POOR_FIT = 8  # chi2 per pixel larger than any training star's should be
    FEW_PIXELS = 16  # fewer usable pixels than asked for
    SHIFTED = 32  # lines stand at another velocity than the training stars'
    BROADENED = 64  # lines are broader, or narrower
    DILUTED = 128  # featureless light in it, or lines too deep
    TILTED = 256  # a slope of the continuum along a chip
    SECOND_LIGHT = 512  # another star's light in it
    UNUSUAL = 1024  # far from all training spectra, whatever the labels
    BRIGHT_LINES = 2048  # lines in emission


def flag_names(flags) -> list:
    """The names of the flags of each star.

    Parameters
    ----------
    flags : int or (N,) int array

    Returns
    -------
    list of str
        empty text where there is nothing to doubt
    """
    values = [int(value) for value in np.atleast_1d(flags)]
    return [" ".join(flag.name for flag in Flag if value & flag) for value in values]


# %%
#| exporti
def count_flags(flags) -> dict:
    """How many stars carry each flag.

    Parameters
    ----------
    flags : (N,) int array

    Returns
    -------
    dict
        name of a flag -> number of stars; flags that no star carries are left out
    """
    counts = {flag.name: int(np.count_nonzero(np.asarray(flags, int) & flag)) for flag in Flag}
    return {name: count for name, count in counts.items() if count}


# %%
assert flag_names([0, 5]) == ["", "NOT_CONVERGED OUTSIDE_TRAINING"]
assert count_flags([0, 5, 4]) == {"NOT_CONVERGED": 1, "OUTSIDE_TRAINING": 2}
flag_names([0, 5, 16])

# %% [markdown]
# Two facts make an answer doubtful whatever the model. *A star with few usable pixels* says little. And *a star that is far from all training stars* cannot be known: its distance to the third
# nearest one, in scaled labels, is compared with what the training stars have among themselves. A search, where a model has one, may go a little beyond the training stars, but not out of a *box* around them.

# %%
#| exporti
_POOR_FIT_FACTOR = 1.5  # the limit of chi2 per pixel is this times …
_POOR_FIT_QUANTILE = 0.99  # … this quantile of the training stars


def poor_fit_limit(chi2, learned: int = 0) -> float:
    """chi2 per pixel from which a fit counts as poor.

    Parameters
    ----------
    chi2 : (N,) array
        per pixel, of each training star
    learned : int, default 0
        numbers that each pixel learned from these stars; where they are many, the training stars
        fit better than others, by (N - learned) / (N + learned)

    Returns
    -------
    float
    """
    stars = len(chi2)
    limit = _POOR_FIT_FACTOR * float(np.quantile(chi2, _POOR_FIT_QUANTILE))
    return limit * ((stars + learned) / max(stars - learned, 1))


# %%
#| export
_NEIGHBOURS = 3  # a star's distance from the training stars is that to the third nearest


def outside_training(model: LabelModel, labels) -> np.ndarray:
    """Which labels lie further from the training stars than any training star from the others.

    Parameters
    ----------
    model : LabelModel
        fitted
    labels : (N, K) array
        physical units

    Returns
    -------
    (N,) bool array
        the third nearest training star, in scaled labels, is further away than it is for any
        training star
    """
    check_is_fitted(model)
    tree, farthest, k = _neighbours_of(model)
    scaled = np.atleast_2d(model.scale(labels))
    outside = np.ones(len(scaled), dtype=bool)
    near = np.isfinite(scaled).all(axis=1)
    if tree is not None and near.any():  # a tree without neighbours must not be asked
        distance, _ = tree.query(scaled[near], k=[k], workers=-1)
        outside[near] = distance[:, 0] > farthest
    return outside


def _neighbours_of(model):
    """The training stars as a tree to search in, the largest distance among them, and to which
    neighbour; made once for a fitted model, and not kept in its file."""
    learned = (model.training_labels_, model.pivots_, model.scales_)
    made_of, found = vars(model).get("_neighbours", ((), None))
    if len(made_of) == len(learned) and all(a is b for a, b in zip(made_of, learned)):
        return found
    training = model.scale(model.training_labels_)
    if len(training) < 2:  # one star has no neighbours, and all others are far from it
        return None, np.inf, 1
    tree = cKDTree(training)
    k = max(1, min(_NEIGHBOURS, len(training) - 1))
    nearest, _ = tree.query(training, k=[k + 1], workers=-1)  # the first is the star itself
    found = (tree, nearest.max(), k)
    model._neighbours = (learned, found)
    return found


# %%
#| exporti
_MARGIN = 0.25  # the box reaches this share of the training labels' range beyond them


def label_box(model: LabelModel) -> tuple:
    """The box of labels that a search may not leave.

    Returns
    -------
    tuple of two (K,) arrays
        lower and upper bound of the scaled labels, a quarter of their range beyond the
        training stars
    """
    check_is_fitted(model)
    scaled = model.scale(model.training_labels_)
    low, high = scaled.min(axis=0), scaled.max(axis=0)
    return low - _MARGIN * (high - low), high + _MARGIN * (high - low)


# %%
low, high = label_box(model)
beyond = model.training_labels_.max(axis=0) + 3 * model.scales_
far = outside_training(model, [beyond, model.training_labels_[0]])
print(f"outside the training stars: {far.tolist()}; the box in {names[0]}: ", end="")
print(f"{model.unscale(low)[0]:.0f} to {model.unscale(high)[0]:.0f} K")
assert far.tolist() == [True, False]
assert _neighbours_of(model) is _neighbours_of(model)  # made once
with pytest.raises(NotFittedError):
    label_box(NearestStar(names))


# %% [markdown]
# ## An answer
# `answer` is the one thing that a model has to bring: spectra go in, labels and their facts come out. Each kind of model registers its own way.

# %%
#| export
@dataclass
class Answer:
    """What a model says of N stars, before anyone judges it.

    Attributes
    ----------
    labels : (N, K) float array
        physical units; NaN where the model has none
    covariance : (N, K, K) float array
        formal, in the same units
    n_good : (N,) int array
        usable pixels
    chi2 : (N,) float array
        NaN where the model has none
    steps : (N,) int array
        of the search; 0 where nothing was searched
    resting : (N,) bool array
        the search came to rest
    at_bound : (N,) bool array
        a label stands at the edge of what the search may say
    columns : dict
        further columns of the table, name -> (N,) array
    """

    labels: np.ndarray
    covariance: np.ndarray
    n_good: np.ndarray
    chi2: np.ndarray = None
    steps: np.ndarray = None
    resting: np.ndarray = None
    at_bound: np.ndarray = None
    columns: dict = None

    def __post_init__(self):
        n = len(self.labels)
        self.chi2 = np.full(n, np.nan) if self.chi2 is None else self.chi2
        self.steps = np.zeros(n, dtype=int) if self.steps is None else self.steps
        self.resting = np.ones(n, dtype=bool) if self.resting is None else self.resting
        self.at_bound = np.zeros(n, dtype=bool) if self.at_bound is None else self.at_bound
        self.columns = {} if self.columns is None else self.columns


# %%
said = Answer(np.array([[4500.0, 2.0]]), covariance=np.full((1, 2, 2), np.nan), n_good=[7000])
print("chi2", said.chi2, "steps", said.steps, "resting", said.resting)


# %%
#| export
@singledispatch
def answer(model, spectra: Spectra, max_steps: int) -> Answer:
    """What a model says of some stars; a kind of model registers its own way.

    Parameters
    ----------
    model : LabelModel
    spectra : Spectra
        checked; flux relative to the continuum
    max_steps : int
        of a search, where there is one
    """
    raise LabError(
        f"{type(model).__name__} has not said how it reads a spectrum: "
        "import the module that teaches it (stellar_lab.inversion for a Cannon)"
    )


# %%
@answer.register(NearestStar)
def _(model, spectra, max_steps):
    weight = np.where(spectra.ivar > 0, 1, 0).astype("f4")
    flux = np.nan_to_num(spectra.flux) * weight
    distance = weight @ (model.flux_**2).T - 2 * flux @ model.flux_.T  # but for a constant
    labels = model.training_labels_[distance.argmin(axis=1)]
    spread = np.tile(np.diag(model.scales_**2), (len(labels), 1, 1))
    return Answer(labels, spread, n_good=weight.sum(axis=1).astype(int))


# %%
found = answer(model, spectra[test[:2]], max_steps=1)
print(found.labels[:, :3].round(2).tolist(), found.n_good)
with pytest.raises(LabError, match="object has not said how it reads a spectrum"):
    answer(object(), spectra[test], 1)


# %% [markdown]
# ## Spectra that the model can read
# Flux on another grid, without errors, or not normalized as the training spectra were: each would give labels that look like labels. They are refused.

# %%
#| export
def _check_recipe(model, meta, any_recipe):
    "Were the spectra normalized as the model's were, as far as both sides know?"
    trained = model.metadata_
    if not trained.get("normalized"):
        return
    if meta.get("normalized") is False:
        raise LabError(
            "these spectra are not normalized, the model's were: "
            "treat them alike first, stellar_lab.normalize.as_trained(model, spectra)"
        )
    if any_recipe:
        return
    if "product" in meta and continuum_steps(meta) != continuum_steps(trained):
        raise LabError(
            "these spectra went through another normalization than the model's "
            f"({meta['product']} here, {trained.get('product')} there, or another continuum): "
            "read them anew and use stellar_lab.normalize.as_trained(model, spectra), "
            "or insist with any_recipe=True, although the labels shift"
        )


# %%
raw = spectra[test].replace(stars=spectra.stars[test].copy())
raw.stars.meta["normalized"] = False
with pytest.raises(LabError, match="these spectra are not normalized") as refused:
    _check_recipe(model, raw.stars.meta, any_recipe=False)
print(refused.value)


# %%
#| exporti
def _as_float32(values):
    "Numbers of 32 bits; what is too large for them stays a number."
    with np.errstate(over="ignore"):
        small = np.asarray(values, dtype=np.float32)
    if values.dtype != np.float32 and not np.isfinite(small).all():
        large = np.isfinite(values) & ~np.isfinite(small)
        small[large] = np.sign(values[large]) * np.finfo(np.float32).max
    return small


def check_spectra(model: LabelModel, flux, ivar=None, any_recipe: bool = False) -> Spectra:
    """Spectra that the model can read.

    Parameters
    ----------
    model : LabelModel
        fitted
    flux : (N, P) array or Spectra
        relative to the continuum
    ivar : (N, P) array, optional
        inverse variance, 0 where unusable; a `Spectra` has its own
    any_recipe : bool, default False
        take spectra that went through another normalization, too

    Returns
    -------
    Spectra
        flux and ivar float32

    Raises
    ------
    LabError
        where grid, shape or normalization are not those of the training spectra
    """
    check_is_fitted(model)
    if isinstance(flux, Spectra):
        if model.wavelength_ is not None:
            check_grid(model, flux.wavelength)
        _check_recipe(model, flux.stars.meta, any_recipe)
        stars = flux.stars
        flux, ivar = flux.flux, flux.ivar
    else:
        stars = None
    if ivar is None:
        raise LabError(
            "ivar is missing: give the inverse variance of each pixel, 0 where unusable, "
            "or a Spectra"
        )
    flux = np.atleast_2d(_as_float32(number_array(flux, "flux")))
    ivar = np.atleast_2d(_as_float32(number_array(ivar, "ivar")))
    pixels = len(model.typical_flux_)
    if flux.shape != ivar.shape or flux.shape[1] != pixels:
        raise LabError(f"flux {flux.shape} and ivar {ivar.shape} must both be (N, {pixels})")
    if not len(flux):
        raise LabError("there are no spectra to label")
    if stars is None:
        stars = Table({"ROW": np.arange(len(flux))})
    grid = np.arange(pixels, dtype=float) if model.wavelength_ is None else model.wavelength_
    return Spectra(grid, flux, ivar, stars)


# %%
with pytest.raises(LabError, match="ivar is missing"):
    check_spectra(model, spectra.flux[:2])
with pytest.raises(LabError, match=r"must both be \(N, "):
    check_spectra(model, spectra.flux[:2, :100], spectra.ivar[:2, :100])
checked = check_spectra(model, spectra[test])
print(f"{len(checked)} spectra of {checked.flux.shape[1]} pixels, {checked.flux.dtype}")

# %% [markdown]
# ## Formal and calibrated errors
# A model's *formal* error is what follows if the model is right: from the noise that the survey states for each pixel and, in a Cannon with scatter, from the scatter that it learned for each pixel, all pixels
# being independent. It knows neither the errors of the catalogue, nor that a model may be wrong in many pixels at once. Left-out stars tell how large the errors really are
# ([the chapter on judging](07_judging.ipynb) learns it); then each variance becomes $a\,\sigma^2 + b$, an inflation and a floor for each label. Such errors are *calibrated*.

# %%
#| exporti
_REACH = 2.5  # spreads from the mean beyond which errors grow no more with a label


def label_trend(model: LabelModel, labels: np.ndarray) -> np.ndarray:
    """Labels (N, K) as the error model sees them: in spreads from the training stars' mean, and
    never further from it than training stars usually are."""
    scaled = (np.asarray(labels, dtype=float) - model.pivots_) / model.scales_
    return np.clip(np.nan_to_num(scaled), -_REACH, _REACH)


def beyond_base(variance: np.ndarray, base) -> np.ndarray:
    """What a formal variance (N, K) has beyond a base (K,) that all stars share, never less than a
    thirtieth of the base. A model that learned from noisy labels may count their noise as its own;
    the base takes it out."""
    return np.where(base > 0, np.maximum(variance - base, base / 30), variance)


def apply_error_model(model: LabelModel, covariance: np.ndarray, labels=None) -> np.ndarray:
    """Formal covariance -> calibrated covariance, where the model carries an error model.

    Parameters
    ----------
    model : LabelModel
        with ``error_inflation_`` and ``error_floor_`` (K,), variances, if it is calibrated; with
        ``error_base_`` (K,), a variance that is taken off first, with ``error_slopes_`` (K, K) if
        errors depend on the labels, and with ``error_correlation_`` (K, K) if labels err together
        beyond what the formal covariance says
    covariance : (N, K, K) array
        formal
    labels : (N, K) array, optional
        of the stars, in their units; the mean of the training stars by default

    Returns
    -------
    (N, K, K) array
        inflation times the formal covariance, plus the floors with their correlation; all of it
        times the exponential of the slopes times the scaled labels
    """
    if not hasattr(model, "error_inflation_"):
        return covariance
    stretch = np.sqrt(np.asarray(model.error_inflation_))[None]
    if hasattr(model, "error_base_"):
        variance = np.einsum("nkk->nk", covariance)
        with np.errstate(divide="ignore", invalid="ignore"):
            stretch = stretch * np.sqrt(beyond_base(variance, model.error_base_) / variance)
    both = stretch[:, :, None] * stretch[:, None, :]
    stretched = np.where(both > 0, covariance * both, 0)
    floor = np.sqrt(model.error_floor_)
    correlation = getattr(model, "error_correlation_", np.eye(len(floor)))
    calibrated = stretched + correlation * floor[:, None] * floor
    if labels is None or not hasattr(model, "error_slopes_"):
        return calibrated
    growth = np.exp(label_trend(model, labels) @ np.transpose(model.error_slopes_) / 2)
    return calibrated * growth[:, :, None] * growth[:, None, :]


# %%
calibrated = NearestStar(names[:1]).fit(spectra[train])
calibrated.error_inflation_ = np.array([4.0])
calibrated.error_floor_ = np.array([30.0**2])
variance = apply_error_model(calibrated, np.array([[[20.0**2]]]))
print(f"a formal error of 20 K, doubled, with a floor of 30 K: {np.sqrt(variance[0, 0, 0]):.0f} K")
assert variance[0, 0, 0] == 50**2

# %% [markdown]
# Errors may depend on the labels: hot or metal-poor stars have weak lines. With a slope of 0.5 in the logarithm of the variance, a star that is two spreads hotter than the mean has an error $e^{1/2}$ times as large.

# %%
calibrated.error_slopes_ = np.array([[0.5]])
hotter = calibrated.pivots_ + np.array([[2], [50]]) * calibrated.scales_
larger = apply_error_model(calibrated, np.full((2, 1, 1), 20.0**2), hotter)[:, 0, 0]
print(f"two spreads hotter: {np.sqrt(larger[0]):.0f} K; fifty: {np.sqrt(larger[1]):.0f} K")
assert np.isclose(np.sqrt(larger[0]), 50 * np.exp(0.5))
assert np.isclose(np.sqrt(larger[1]), 50 * np.exp(0.5 * _REACH / 2))

# %% [markdown]
# ## One table for all
# The flags follow from the facts of the answer, by the same rules for every model.

# %%
#| export
_MIN_GOOD = 1 - MASKED_LIMIT / len(on_band)  # the original lab drops stars with fewer good pixels


def _flags(model, found, min_good):
    "The sum of each star's flags (N,)."
    known = np.isfinite(found.labels).all(axis=1)
    outside = np.zeros(len(known), dtype=bool)
    outside[known] = model._outside(found.labels[known])
    least = max(min_good * model.usable_.sum(), model.least_pixels_)
    with np.errstate(invalid="ignore"):  # a model without chi2 has an infinite limit
        limit = getattr(model, "fit_limit_", model.poor_fit_limit_)  # that of left-out stars
        poor = found.chi2 > limit * found.n_good  # False for NaN
    doubts = {
        Flag.NOT_CONVERGED: ~found.resting,
        Flag.AT_BOUND: found.at_bound & known,
        Flag.OUTSIDE_TRAINING: outside,
        Flag.POOR_FIT: poor,
        Flag.FEW_PIXELS: found.n_good < least,
    }
    return sum(np.where(doubtful, int(flag), 0) for flag, doubtful in doubts.items())


# %%
dark = found.n_good * np.array([1, 0])
print(flag_names(_flags(model, replace(found, n_good=dark), _MIN_GOOD)))


# %%
#| export
def label_table(model: LabelModel, found: Answer, min_good: float = _MIN_GOOD) -> QTable:
    """The table of an answer: labels with units and errors, and flags, by the same rules for all.

    Parameters
    ----------
    model : LabelModel
        that answered
    found : Answer
    min_good : float, default 0.584
        share of the model's pixels below which a star is flagged FEW_PIXELS

    Returns
    -------
    QTable
        one row per star, columns as `infer` says
    """
    blind = (found.n_good < model.least_pixels_) | ~np.isfinite(found.labels).all(axis=1)
    found = replace(  # a copy: the answer stays as it was
        found,
        labels=np.where(blind[:, None], np.nan, found.labels),
        covariance=np.where(blind[:, None, None], np.nan, found.covariance),
        resting=found.resting & ~blind,
    )
    flags = _flags(model, found, min_good)
    covariance = apply_error_model(model, found.covariance, found.labels)
    covariance = np.where(blind[:, None, None], np.nan, covariance)  # a floor alone is no error
    errors = np.sqrt(np.einsum("nkk->nk", covariance))
    table = QTable()
    for k, name in enumerate(model.label_names_):
        unit = label_record(name).unit
        table[name.lower()] = found.labels[:, k] * unit
        table[f"{name.lower()}_err"] = errors[:, k] * unit
    table["covariance"] = covariance
    table["chi2"] = found.chi2
    for name, column in {"n_good": found.n_good, "steps": found.steps, "flags": flags}.items():
        table[name] = column.astype(np.int32)
    for name, column in found.columns.items():
        table[name] = column
    table.meta = _table_meta(model)
    return table


def _about(model):
    "What the errors of a model are about."
    if hasattr(model, "catalogue_noise_"):
        return "the true label, on the catalogue's scale"
    return "a label of the catalogue" if model.errors_ == "calibrated" else "the model alone"


def _table_meta(model):
    return {
        "labels": ",".join(model.label_names_),
        "training": model.training_digest_[:16],
        "errors": model.errors_,
        "about": _about(model),
        "flags": ", ".join(f"{flag.value} {flag.name}" for flag in Flag),
    }


# %%
table = label_table(model, replace(found, n_good=dark))
print(table["teff", "teff_err", "flags"])
assert np.isfinite(found.labels).all()  # the answer itself is left alone


# %% [markdown]
# ## `infer`
# The one door: spectra in, table out, whatever the model.

# %%
#| export
def _finite_spectra(spectra):
    """The spectra with zeros in unusable pixels that hold no number; LabError for usable ones.

    Pixels with a flux beyond any star's become unusable: their squares are no numbers any more."""
    _check_pixels(spectra.flux, spectra.ivar)
    tame = np.abs(spectra.flux) <= _LARGEST_FLUX  # False for NaN
    if tame.all():
        return spectra
    flux = finite_flux(spectra.flux, spectra.ivar)
    wild = np.abs(flux) > _LARGEST_FLUX
    if wild.any():  # no star's light: the pixel is as good as none
        flux = np.where(wild, 0, flux)
        return spectra.replace(flux=flux, ivar=np.where(wild, 0, spectra.ivar))
    return spectra.replace(flux=flux)


# %%
with_holes = np.where(spectra.ivar[:2] > 0, spectra.flux[:2], np.nan)
holed = check_spectra(model, with_holes, spectra.ivar[:2])
print(f"{np.isnan(holed.flux).sum()} pixels that are NaN, then ", end="")
print(np.isnan(_finite_spectra(holed).flux).sum())


# %%
#| export
def infer(
    model: LabelModel,
    flux,
    ivar: np.ndarray = None,
    min_good: float = _MIN_GOOD,
    max_steps: int = 60,
    any_recipe: bool = False,
) -> QTable:
    """Labels of stars from their spectra, by any model.

    A Cannon is inverted: the labels minimize chi2 =
    sum_p (f_p - theta_p . v(labels))^2 / (sigma_p^2 + s_p^2) (Ness et al. 2015, ApJ 808, 16).
    Ridge regression and networks read the labels from the spectrum.

    Parameters
    ----------
    model : LabelModel
        fitted: a Cannon, RidgeLabels, a Network, a PhysicsModel
    flux : (N, P) array or Spectra
        relative to the continuum, as the training spectra were (`as_trained` sees to it)
    ivar : (N, P) array, optional
        inverse variance, 0 where a pixel is unusable; not needed with a `Spectra`
    min_good : float, default 0.584
        share of the model's pixels below which a star is flagged FEW_PIXELS
    max_steps : int, default 60
        of a search from one start, where the model searches
    any_recipe : bool, default False
        take spectra that went through another normalization than the model's, too

    Returns
    -------
    QTable
        one row per star: ``apogee_id`` where the spectra know it; each label in lower case with its
        unit, and its 1-sigma error ``<label>_err``; ``covariance`` (K, K); ``chi2``; ``n_good``
        (usable pixels); ``steps``; ``flags`` (sum of `Flag`). NaN where a star has no labels.
        ``table.meta["errors"]`` says whether the errors are formal or calibrated.

    Raises
    ------
    LabError
        where the spectra are not such as the model can read, or a usable pixel holds no number
    NotFittedError
        where the model has not learned yet

    Examples
    --------
    >>> import numpy as np
    >>> from stellar_lab import Cannon, infer
    >>> rng = np.random.default_rng(0)
    >>> labels = rng.normal(size=(200, 2))
    >>> flux = 1 + labels @ rng.normal(scale=0.05, size=(2, 50))
    >>> flux += rng.normal(scale=0.01, size=(200, 50))
    >>> model = Cannon(order=1).fit(labels, flux, np.full(flux.shape, 1e4), ["A", "B"])
    >>> table = infer(model, flux[:3], np.full((3, 50), 1e4), min_good=0)
    >>> bool(np.all(np.abs(table["a"].value - labels[:3, 0]) < 5 * table["a_err"].value))
    True
    >>> table.meta["errors"]
    'formal'
    """
    spectra = _finite_spectra(check_spectra(model, flux, ivar, any_recipe))
    table = label_table(model, answer(model, spectra, max_steps), min_good)
    if getattr(model, "refusal_", None) is not None:
        model.refusal_.examine(spectra, table)
    if "APOGEE_ID" in spectra.stars.colnames:
        ids = [str(name) for name in spectra.stars["APOGEE_ID"]]
        table.add_column(ids, index=0, name="apogee_id")
    return table


# %%
table = infer(model, spectra[test])
table[:3]

# %%
catalogue = spectra[test].labels(names)
found = label_values(table, names)
fig, axes = plt.subplots(1, 3, figsize=(9, 2.8))
for ax, name, x, y in zip(axes, names, catalogue.T, found.T):
    record = LABELS[name]
    ax.plot(x, y, ".", ms=4, alpha=0.6)
    ax.plot(record.plot_range, record.plot_range, color="0.3", lw=0.8)
    ax.set(xlabel=f"catalogue {record.axis}", title=record.symbol, xlim=record.plot_range)
axes[0].set_ylabel("the nearest star's label");

# %% [markdown]
# **What to see.** Even this model knows a cool star from a hot one and a rich one from a poor one. It can never say a label that no training star has. Every later
# model has to do better than this cloud.

# %%
ratio = (found - catalogue).std(axis=0) / catalogue.std(axis=0)
print("scatter over the labels' spread:", dict(zip(names, ratio.round(2).tolist())))
assert np.all(ratio[:3] < 0.8) and list(table.colnames[:3]) == ["apogee_id", "teff", "teff_err"]
assert table.meta["errors"] == "formal" and np.isnan(table["chi2"]).all()

# %% [markdown]
# ## The contract, tested
# A star of which no pixel is usable has no labels and says so. Spectra that are not normalized are refused.

# %%
blind = spectra[test][:2].replace(ivar=np.zeros_like(spectra.ivar[:2]))
table = infer(model, blind)
assert np.isnan(label_values(table, names)).all()
assert flag_names(table["flags"]) == ["NOT_CONVERGED FEW_PIXELS"] * 2

# %%
with pytest.raises(LabError, match="these spectra are not normalized"):
    infer(model, raw)
broken = spectra[test[:2]].replace(ivar=np.full_like(spectra.ivar[:2], np.nan))
with pytest.raises(LabError, match="star 0 has a usable pixel without a finite flux or ivar"):
    infer(model, broken)
with pytest.raises(LabError, match="star 0 has a usable pixel without a finite flux or ivar"):
    NearestStar(names).fit(broken)

# %% [markdown]
# ## A file without a pickle
# A model is kept as [ASDF](https://asdf.readthedocs.io): text that a person can read, and behind it *blocks* of plain bytes, one for each array. A pickle could run code when it is opened; this format
# cannot. Each block carries a checksum.
#
# ASDF can do more than a model needs: an array may lie in another file or on another computer, a block may be packed so that a small file fills the memory, a text may refer to itself. We read the few
# things that our own writer writes, and refuse the rest before any of it is looked at. Nothing is allocated that is larger than the file. Last, the whole has a *fingerprint*: a number that somebody changed
# by hand is as wrong as one that a disk changed.

# %%
#| exporti
_FORMAT_VERSION = 1
_MOST_TEXT = 1 << 22  # bytes of a file's text; a model's has some thousand
_DEEPEST = 32  # lists in lists
_TREE_END = re.compile(rb"\r?\n\.\.\.\r?\n")
_BLOCK = b"\xd3BLK"
_BLOCK_HEADER = struct.Struct(">I4sQQQ16s")  # flags, packing, room, used, size, MD5


class _Tree(dict):
    "What a model's file holds; an entry that is missing is named, and so is the file."

    def __missing__(self, name):
        raise _lacking(self, [name])


def _lacking(tree, names):
    "The LabError of a file that lacks some entries."
    file = tree.get("file", "the model's file")
    return LabError(f"{file} has no entry {', '.join(map(str, names))}: train the model again")


def plain_value(value):
    "A numpy scalar, a tuple or a model within a model as ASDF takes it."
    if isinstance(value, LabelModel):
        return _tree_of(value)
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


# %%
print(plain_value(np.float64(0.5)), plain_value((1, 2)))
with pytest.raises(LabError, match="giants.asdf has no entry theta_: train the model again"):
    _Tree(file="giants.asdf")["theta_"]


# %%
#| exporti
def read_regular(path, most: int = None, first: int = -1) -> bytes:
    """The bytes of a file that is one: no folder, pipe, device or socket.

    Parameters
    ----------
    path : str or Path
    most : int, optional
        bytes that such a file can have
    first : int, default -1
        so many bytes from its start; all by default

    Raises
    ------
    FileNotFoundError
        where there is none
    ValueError
        where it is something else, or larger
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a device or a socket"
        raise WrongFile(f"it is {what}, no file")
    if most is not None and found.st_size > most:
        raise WrongFile(f"it has {found.st_size:,} bytes, {most:,} at most would be right")
    with open(path, "rb") as file:
        return file.read(first)


def _blocks(data, place):
    "The blocks of an ASDF file (bytes) from a place on, each verified."
    found = []
    while data[place : place + 4] == _BLOCK:
        start = place + 6 + int.from_bytes(data[place + 4 : place + 6], "big")
        header = data[place + 6 : place + 6 + _BLOCK_HEADER.size]
        if len(header) < _BLOCK_HEADER.size or start < place + 6 + _BLOCK_HEADER.size:
            raise WrongFile("it is cut short")
        flags, packing, room, used, size, checksum = _BLOCK_HEADER.unpack(header)
        if flags or packing != bytes(4) or used != size:
            raise WrongFile("an array in it is packed or has no end")
        if room < used or start + room > len(data):
            raise WrongFile("it is cut short")
        block = data[start : start + used]
        if hashlib.md5(block, usedforsecurity=False).digest() != checksum:
            raise WrongFile(f"the checksum of its array {len(found)} is wrong: it is damaged")
        found.append(block)
        place = start + room
    return found


# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "numbers.asdf"
    asdf.AsdfFile({"numbers": np.arange(3)}).write_to(path)
    data = read_regular(path)
    with pytest.raises(ValueError, match="it is a folder, no file"):
        read_regular(folder)
print(data[:5], [np.frombuffer(block, int) for block in _blocks(data, data.index(_BLOCK))])
with pytest.raises(ValueError, match="it is cut short"):
    _blocks(data[: data.index(_BLOCK) + 60], data.index(_BLOCK))


# %%
#| export
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    "Plain values alone, and notes on arrays."


class _ArrayNote(dict):
    "What the text of a file says of an array."


def _construct(loader, suffix, node):
    kind = suffix.rpartition("-")[0]
    if kind not in ("asdf", "ndarray", "software", "extension_metadata", "history_entry"):
        raise WrongFile(f"it holds a {suffix!r:.50}, which no model has")
    values = loader.construct_mapping(node, deep=True)
    return _ArrayNote(values) if kind == "ndarray" else values


_Loader.add_multi_constructor("tag:stsci.edu:asdf/core/", _construct)


def _check_text(text):
    "ValueError where the text of a file refers to itself, or goes too deep."
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise WrongFile("its text refers to itself")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise WrongFile("its text goes too deep")


def _dtype(note):
    "The numpy dtype of an array that the text of a file describes."
    kind = note.get("datatype")
    order = {"little": "<", "big": ">"}[note.get("byteorder", "big")]
    if isinstance(kind, list):  # text of so many characters
        letter = {"ascii": "S", "ucs4": "U"}[kind[0]]
        return np.dtype(f"{order}{letter}{int(kind[1])}")
    if kind == "bool8":
        return np.dtype(bool)
    if not re.fullmatch(r"u?int(8|16|32|64)|float(16|32|64)", str(kind)):
        raise WrongFile(f"it holds an array of {kind!r:.30}")
    return np.dtype(kind).newbyteorder(order)


# %%
for text, message in {
    b"a: &x [1, 2]\nb: *x": "refers to itself",
    b"[" * 99 + b"]" * 99: "too deep",
}.items():
    with pytest.raises(ValueError, match=message):
        _check_text(text)
print(_dtype({"datatype": "float64", "byteorder": "little"}), _dtype({"datatype": ["ucs4", 3]}))


# %%
#| export
class _Arrays:
    "Arrays in the blocks of a file, by the notes in its text."

    def __init__(self, blocks):
        self.blocks = blocks
        self.left = 2 * sum(map(len, blocks)) + 1024  # bytes that all arrays may take together

    def of(self, value):
        "A value of the text with its arrays in place of the notes."
        if isinstance(value, _ArrayNote):
            return self._array(value)
        if isinstance(value, dict):
            return {str(key): self.of(part) for key, part in value.items()}
        return [self.of(part) for part in value] if isinstance(value, list) else value

    def _array(self, note):
        source = note.get("source")
        shape = note.get("shape")
        known = {"source", "shape", "datatype", "byteorder", "offset", "strides"}
        inside = type(source) is int and 0 <= source < len(self.blocks)
        if not inside or note.keys() - known:
            raise WrongFile("an array is not in the file itself")
        sizes = [*shape, note.get("offset", 0)] if isinstance(shape, list) else [None]
        if not all(type(size) is int and size >= 0 for size in sizes) or len(sizes) > 9:
            raise WrongFile(f"it holds an array of the shape {shape!r:.50}")
        dtype = _dtype(note)
        size = math.prod(shape) * dtype.itemsize
        block = self.blocks[source]
        self.left -= size
        if size > len(block) or self.left < 0:
            raise WrongFile("an array is larger than the file")
        if not size:
            return np.empty(shape, dtype)
        place = {"offset": note.get("offset", 0), "strides": note.get("strides")}
        return np.array(np.ndarray(shape, dtype, block, **place), dtype.newbyteorder("="))


def _read_tree(path):
    "What an ASDF file of ours holds; ValueError (or another error) for any other file."
    start = read_regular(path, first=20)
    if not start.startswith(b"#ASDF"):
        raise WrongFile(f"it begins with {start.decode('latin-1')!r}" if start else "empty")
    data = read_regular(path)
    end = _TREE_END.search(data, 0, _MOST_TEXT)
    if not end:
        raise WrongFile("it is cut short")
    text = data[: end.end()]
    try:
        _check_text(text)
        tree = yaml.load(text, _Loader)  # plain values alone: see above
    except yaml.YAMLError as error:
        raise WrongFile("its text is no plain YAML, or goes too deep") from error
    blocks = _blocks(data, end.end())
    if not isinstance(tree, dict):
        raise WrongFile("it holds no entries")
    return _Arrays(blocks).of(tree)


# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "numbers.asdf"
    asdf.AsdfFile({"numbers": np.arange(6).reshape(2, 3).T}).write_to(path)
    print(_read_tree(path)["numbers"].tolist())
    text = path.read_bytes()
    for old, new in {
        b"source: 0": b"source: http://127.0.0.1/x",
        b"shape: [3, 2]": b"shape: [3000000000, 2]",
        b"datatype: int64": b"datatype: object",
    }.items():
        path.write_bytes(text.replace(old, new))
        with pytest.raises(ValueError, match="not in the file|larger than the file|array of"):
            _read_tree(path)

# %%
#| export
_NOT_OURS = ("fingerprint", "asdf_library", "history")  # entries that have no share in it


def _fingerprint(tree):
    "SHA-256 of all that a model's file holds."
    digest = hashlib.sha256()
    _add(digest, {name: value for name, value in tree.items() if name not in _NOT_OURS})
    return digest.hexdigest()


def _add(digest, value):
    "Let a value have its share in a fingerprint."
    if isinstance(value, dict):
        digest.update(f"{{{len(value)}".encode())
        for key in sorted(value):
            digest.update(f"{key!r}:".encode())
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for part in value:
            _add(digest, part)
    elif isinstance(value, np.ndarray):
        little = value.dtype.newbyteorder("<")
        digest.update(f"{little.str}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value, little).tobytes())
    else:
        digest.update(f"{type(value).__name__} {value!r};".encode())


# %%
one = {"a": np.arange(3.0), "b": [1, True, None, "x"]}
print(_fingerprint(one)[:16])
assert _fingerprint(one) == _fingerprint({"b": [1, True, None, "x"], "a": np.arange(3.0).copy()})
for other in ({"a": np.arange(3)}, {"b": [1, 1, None, "x"]}, {"c": 0}):
    assert _fingerprint(one | other) != _fingerprint(one)


# %%
#| exporti
def read_model_file(path) -> dict:
    """What a model's file holds, arrays and all.

    Parameters
    ----------
    path : str or Path
        .asdf file

    Returns
    -------
    dict
        with the key ``stellar_lab_model``, the name of the model's class, and ``file``, its path;
        asked for an entry that is missing, it raises a LabError

    Raises
    ------
    LabError
        where there is no such file, or it is damaged, or no model of this version
    """
    try:
        tree = _read_tree(path)
    except FileNotFoundError as error:
        raise LabError(
            f"there is no model at {path}: train one with 'stellar-lab train'"
        ) from error
    except MemoryError as error:
        raise LabError(f"{path} does not fit into the memory that is left") from error
    except PermissionError as error:
        raise LabError(f"{path} may not be read: {said_of(error)}") from error
    except Exception as error:  # whatever a foreign or damaged file brings about
        raise LabError(
            f"{path} is not a model of stellar_lab ({said_of(error)}): train the model again"
        ) from error
    kind = tree.get("stellar_lab_model")
    version = tree.get("format_version")
    versions = tree.setdefault("versions", {})
    if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
        raise LabError(f"{path} does not say by which versions it was made: train the model again")
    named = isinstance(kind, str) and kind.isidentifier()
    if not named or type(version) is not int or version != _FORMAT_VERSION:
        raise LabError(
            f"{path} holds {kind!r:.50} in format {version!r:.50}; this version reads models in "
            f"format {_FORMAT_VERSION}: train the model again"
        )
    found = _Tree(tree, file=str(path))
    found.fingerprint = _fingerprint(tree)
    return found


# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "later.asdf"
    asdf.AsdfFile({"stellar_lab_model": "Oracle", "format_version": 99}).write_to(path)
    with pytest.raises(LabError, match="in format 99; this version reads") as problem:
        read_model_file(path)
    print(str(problem.value).replace(str(path), "<file>"))


# %% [markdown]
# What a model has learned are its attributes whose name ends with an underscore. So writing and reading need no list of them; a subclass only says which ones it cannot do without.

# %%
#| export
def _unshared(value):
    "Lists and dicts of their own: text that refers to itself is refused when it is read."
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_unshared(part) for part in value]
    return np.array(value) if isinstance(value, np.ndarray) else plain_value(value)


def _tree_of(model):
    "What a fitted model is: its class, parameters, and what it has learned."
    return {
        "stellar_lab_model": type(model).__name__,
        "parameters": {name: plain_value(v) for name, v in model.get_params().items()},
        **model._learned(),
    }


_OLD = 86_400  # seconds; what is as old as that is not being written any more


def _remove_old_strays(folder):
    "Remove models that asdf had begun under its own names when an older version was ended."
    for stray in folder.glob(".asdf_tmp*"):
        with suppress(OSError, WrongFile):
            if time.time() - stray.stat().st_mtime > _OLD:
                if b"stellar_lab_model" in read_regular(stray, first=_MOST_TEXT):
                    stray.unlink()


def _write_model(model, path):
    "Write a fitted model as ASDF, whole or not at all."
    _remove_old_strays(Path(path).parent)
    versions = {"stellar_lab": __version__, "numpy": np.__version__}
    versions["scikit-learn"] = sklearn.__version__
    tree = {**_tree_of(model), "format_version": _FORMAT_VERSION, "versions": versions}
    tree = _unshared(tree)
    tree["fingerprint"] = _fingerprint(tree)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        asdf.AsdfFile(tree).write_to(file)  # by its path, asdf would make a temporary of its own


# %%
with tempfile.TemporaryDirectory() as folder:
    _write_model(model, Path(folder) / "nearest.asdf")
    tree = read_model_file(Path(folder) / "nearest.asdf")
print(tree["stellar_lab_model"], "with", ", ".join(name for name in tree if name.endswith("_")))
assert np.array_equal(tree["flux_"], model.flux_)


# %%
#| exporti
def _read_model(cls, path):
    "The model in a file, which must be of this class."
    tree = read_model_file(path)
    if tree["stellar_lab_model"] != cls.__name__:
        raise LabError(
            f"{path} holds a {tree['stellar_lab_model']}, not a {cls.__name__}: "
            "stellar_lab.load_model reads either"
        )
    return restored(cls, tree)


def restored(cls, tree: dict):
    """The model that a file holds.

    Parameters
    ----------
    cls : type
        its class
    tree : dict
        from `read_model_file`

    Returns
    -------
    LabelModel

    Raises
    ------
    LabError
        where something in the file is missing, wrong, or was changed since it was written
    """
    model = cls._from_tree(tree)
    if tree.fingerprint != tree.get("fingerprint"):
        raise LabError(
            f"{tree['file']} was changed since it was written, although it looks whole: "
            "train the model again"
        )
    return model


# %%
#| exporti
@contextmanager
def whole_model(file, kind: str):
    """Whatever goes wrong while a model is put together from a file becomes one sentence.

    Parameters
    ----------
    file : str or Path
        for the message
    kind : str
        of model, for the message

    Raises
    ------
    LabError
        that says to train the model again
    """
    try:
        yield
    except LabError as error:
        if "train the" in str(error):
            raise
        raise LabError(f"{file} is no whole {kind} ({error}): train the model again") from error
    except Exception as error:  # a file can hold anything
        said = said_of(error)
        raise LabError(f"{file} is no whole {kind} ({said}): train the model again") from error


def check_parameters(cls, parameters: dict, file):
    """LabError where a file has parameters that a class does not take.

    Parameters
    ----------
    cls : type
        class of models
    parameters : dict
    file : str or Path
        for the message
    """
    known = inspect.signature(cls.__init__).parameters
    unknown = [str(name) for name in parameters if name not in cls._get_param_names()]
    if unknown:
        raise LabError(
            f"{file} has the parameters {', '.join(sorted(unknown))}, "
            f"which a {cls.__name__} does not have: train the model again"
        )
    for name, value in parameters.items():
        usual = known[name].default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(usual, bool) != isinstance(value, bool) or (
            isinstance(usual, int | float) and not isinstance(usual, bool) and not number
        ):
            raise LabError(
                f"{file} has {value!r:.50} as the parameter {name}: train the model again"
            )


# %%
with pytest.raises(LabError, match="nearest.asdf has the parameters depth") as problem:
    check_parameters(NearestStar, {"depth": 3}, "nearest.asdf")
print(problem.value)


# %%
#| export
def _guard(tree, file):
    """The guard within a model, as the front door knows it: its room stands above this one, and is
    entered only where a file holds a guard."""
    if tree.get("stellar_lab_model") != "Refusal":
        raise WrongFile(f"it holds a guard of kind {tree.get('stellar_lab_model')!r:.50}")
    return import_module("stellar_lab").Refusal._from_tree(_Tree(tree, file=str(file)))


def _model_of(cls, tree):
    "A model from what its file holds."
    file = tree.get("file", "the model's file")
    entries = cls._entries if isinstance(cls._entries, dict) else dict.fromkeys(cls._entries, _ANY)
    missing = [name for name, held in entries.items() if name not in tree and not held.optional]
    if missing:
        raise _lacking(tree, missing)
    with whole_model(file, cls.__name__):
        check_held(tree, entries)
        check_parameters(cls, tree["parameters"], file)
        model = cls(**tree["parameters"])
        for name, value in tree.items():
            if name.endswith("_"):
                if name not in entries and hasattr(cls, name):
                    raise WrongFile(f"it has the entry {name}")
                if value is None and name in _OF_LEFT_OUT_STARS:
                    continue  # as if the file did not name it: nobody has learned it
                setattr(model, name, _guard(value, file) if name == "refusal_" else value)
        if not hasattr(model, "wavelength_"):
            model.wavelength_ = None  # it may be unknown
        model.label_names_ = tuple(model.label_names_)
        model._check_restored()
    return model


_ANY = Held("any")

# %% [markdown]
# A file brings back the same model, and one that is cut short, damaged or incomplete is refused.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "nearest.asdf"
    model.save(path)
    again = NearestStar.load(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LabError, match=r"nearest.asdf is not a model of stellar_lab"):
        NearestStar.load(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(LabError, match="checksum"):
        NearestStar.load(path)
    asdf.AsdfFile({"stellar_lab_model": "NearestStar", "format_version": 1}).write_to(path)
    with pytest.raises(LabError, match="nearest.asdf has no entry parameters, label_names_"):
        NearestStar.load(path)
print(f"{len(whole) / 1e6:.1f} MB hold a {type(again).__name__} of {len(again.flux_)} stars")
assert np.array_equal(again.training_labels_, model.training_labels_)
assert (
    infer(again, spectra[test])["flags"].tolist() == infer(model, spectra[test])["flags"].tolist()
)


# %% [markdown]
# ## All stars at once
# Thousands of stars and thousands of pixels are a job for matrix products. `in_blocks` cuts such a job into blocks of rows that fit into the processor's cache, and
# gives each core a block at a time. The blocks do not depend on the number of cores: sums of rounded numbers depend on where they are cut, and a model should be the same, to the last bit, on every machine. The numerical library underneath (BLAS) would start threads of its own in each of ours, so it is kept to one. This setting belongs to the whole process: where
# two threads ask for it and overlap, the first to come sets it, and only the last to go takes it back.

# %%
#| exporti
class _OneThread:
    "BLAS keeps to one thread from the first entry to the last exit, from whatever thread."

    def __init__(self):
        self._lock = threading.Lock()
        self._inside = 0  # entries without their exit
        self._pools = None  # of the libraries that are loaded; looking for them takes a while
        self._limit = None

    def __enter__(self):
        with self._lock:
            if self._inside == 0:
                self._pools = self._pools or ThreadpoolController()
                self._limit = self._pools.limit(limits=1)
            self._inside += 1

    def __exit__(self, *problem):
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limit.restore_original_limits()


_one_thread = _OneThread()


def single_threaded():
    "A context in which BLAS keeps to one thread: its own would go on spinning in the way of ours."
    return _one_thread


# %%
def blas_threads():
    "The largest number of threads that a numerical library may use now."
    pools = ThreadpoolController().select(user_api="blas").info()
    return max((pool["num_threads"] for pool in pools), default=1)


before = blas_threads()
first = single_threaded()
second = single_threaded()
first.__enter__()
second.__enter__()
first.__exit__()  # the first to come is the first to go
during = blas_threads()
second.__exit__()
print(f"threads of BLAS: {before}, then {during}, then {blas_threads()}")
assert during == 1 and blas_threads() == before


# %%
#| exporti
def in_blocks(work, size: int, block: int = 520) -> list:
    """Run `work` on blocks of rows, in as many threads as there are cores.

    Parameters
    ----------
    work : callable
        called with a slice of rows; the result may be anything
    size : int
        rows in all
    block : int, default 520
        rows of a call, at most

    Returns
    -------
    list
        the results, in the order of the rows
    """
    count = math.ceil(size / block)
    if count > 1:  # an even number, whatever the cores: the same sums on every machine
        count = min(2 * math.ceil(count / 2), size)
    edges = np.linspace(0, size, count + 1).astype(int) if count else []
    slices = [slice(int(start), int(stop)) for start, stop in zip(edges[:-1], edges[1:])]
    with single_threaded(), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, slices))


# %%
squares = in_blocks(lambda rows: np.arange(2000)[rows] ** 2, 2000)
print(f"the blocks put together: {len(np.concatenate(squares))} rows")
assert np.array_equal(np.concatenate(squares), np.arange(2000) ** 2)

# %% [markdown]
# **Exercise.** Let the nearest *five* stars vote: the mean of their labels, and their scatter as the error. How much does the cloud shrink? Which flag should a star get whose five neighbours disagree?
