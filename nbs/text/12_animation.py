# %% [markdown]
# # How does a star change?
# > A model spectrum in motion: one label moves, the others stay or follow the giant branch, and the lines say what they are made of.
#
# **Question.** A model knows every star between those that it was taught. What would we see if we could turn a single knob, the metallicity say, and
# watch the spectrum?
#
# **Idea.** A film is a *path* through the space of labels. Its frames are the model's spectra along the path, and because the model is a
# polynomial, all of them are one matrix product,
# $$ F = V(\boldsymbol\ell_1 \dots \boldsymbol\ell_n)\,\Theta^\mathsf T , $$
# long before the first is drawn. Its slope $\partial f/\partial\ell$ is another product. It is drawn in a second panel and says where the spectrum is
# about to move.
#
# You learn which lines of the H band belong to which element, how to ask the model whether that is true, how far a path may leave the stars that the
# model was taught, and how 200 pictures are drawn in a few seconds. You need the model of [the chapter on The Cannon](05_cannon.ipynb).

# %%
#| default_exp animation

# %%
#| export
import base64
import hashlib
import html
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import astropy.units as u
import numpy as np
from astropy.constants import Ryd, m_e, m_p
from astropy.table import QTable
from PIL import Image
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from tqdm import tqdm

from stellar_lab.cannon import Cannon
from stellar_lab.models import label_box, outside_training
from stellar_lab.survey import (
    LOG10_STEP,
    LabError,
    air_to_vacuum,
    atomic_path,
    label_record,
    plot_spectrum,
    require,
)

# %%
#| hide
import tempfile
from importlib.util import find_spec
from unittest.mock import patch

import matplotlib.pyplot as plt
import pytest
from astropy.table import Table
from IPython.display import Markdown

from stellar_lab.models import train_test_rows
from stellar_lab.normalize import training_set
from stellar_lab.survey import LABELS, archive_record, archive_root, use_style, wavelength

# %% [markdown]
# ## The model
# It is that of [the chapter on The Cannon](05_cannon.ipynb), trained on two thirds of the archive's stars. The moving label will be the metallicity,
# under the name that the archive has for it.

# %%
use_style()
names = list(archive_record(archive_root()).labels)
spectra, _ = training_set(archive_root(), progress=False)
model = Cannon(scatter=True, labels=names).fit(spectra[train_test_rows(len(spectra))[0]])
metallicity = next(name for name in ("FE_H", "M_H") if name in names)
training = dict(zip(names, model.training_labels_.T))


# %% [markdown]
# The animation of the original lab changed the model: it wrote the moving label over the stored means. A model that has been looked at must still be
# the same, so we take its fingerprint now and compare at the end.

# %%
def fingerprint(model):
    "A digest of everything that the model learned."
    learned = [
        np.asarray(value)
        for name, value in sorted(vars(model).items())
        if name.endswith("_") and isinstance(value, np.ndarray)
    ]
    return hashlib.sha256(b"".join(array.tobytes() for array in learned)).hexdigest()


before = fingerprint(model)
training_star = model.training_labels_[:1]
spectrum_before = model.predict(training_star)


# %% [markdown]
# ## A path through the labels
# One label moves from `low` to `high`. Each of the others is *given* a value, stays at its *training mean*, or *follows the giant branch*. A
# giant of low gravity is cool, and it is hotter if it has few metals: labels of real stars go together. To follow the branch means to expect of the
# other labels what the training stars have, given the moving label and the fixed ones. A quadratic regression over the training labels says it,
# $$ \ell_\mathrm{other} \approx \text{quadratic}(\ell_\mathrm{moving}, \ell_\mathrm{given}) . $$
# A parabola is stiff enough for a few hundred stars, and the branch is not more bent than that.
#
# How far may a path go? The polynomial answers anywhere, also where it was never taught. We use the two rules of
# [the inversion](06_inversion.ipynb). The *box* reaches a quarter of the training range beyond its ends; a path that leaves it is refused. Inside the
# box a label may lie beyond all training stars, or the star further from them than they are from each other. Such frames are *marked* as
# extrapolated.
#
# Names come first: labels may be written in any case, and each may be named once.

# %%
#| export
def _places(model, names):
    "Columns of labels by name, in any case; each once."
    known = {name.upper(): k for k, name in enumerate(model.label_names_)}
    unknown = [name for name in names if str(name).upper() not in known]
    if unknown:
        raise LabError(
            f"the model has no label {', '.join(map(repr, unknown))}: "
            f"choose from {', '.join(model.label_names_)}"
        )
    places = [known[str(name).upper()] for name in names]
    if len(set(places)) < len(places):
        raise LabError(
            f"a label occurs twice in {', '.join(map(str, names))}: "
            "a label moves or is fixed, not both"
        )
    return places


def _check_box(model, path):
    "Refuses a path (F, K) that leaves the box that `infer` searches."
    box_low, box_high = (model.unscale(bound) for bound in label_box(model))
    out = ~((path >= box_low) & (path <= box_high)).all(axis=0)
    if out.any():
        k = int(np.argmax(out))
        known = model.training_labels_[:, k]
        raise LabError(
            f"{model.label_names_[k]} would go from {path[:, k].min():.4g} "
            f"to {path[:, k].max():.4g}. The training stars reach from "
            f"{known.min():.4g} to {known.max():.4g}, and beyond {box_low[k]:.4g} "
            f"to {box_high[k]:.4g} the model is not asked: "
            "choose a smaller range, or fix this label"
        )


# %%
print(_places(model, ["logg", metallicity]), "in", *names)
with pytest.raises(LabError) as refused:
    _check_box(model, model.training_labels_[:1] + 1e4)
print(refused.value)


# %%
#| export
def _label_path(
    model: Cannon,
    moving: str,
    low: float,
    high: float,
    frames: int = 200,
    fixed: Mapping = None,
    others: str = "mean",
) -> np.ndarray:
    """Labels along a path: one label moves evenly from one value to another.

    Parameters
    ----------
    model : Cannon
        A fitted model with K labels.
    moving : str
        Name of the label that moves, in any case.
    low, high : float
        Where it starts and ends, physical units; `high` may be the smaller one.
    frames : int, default 200
        How many points the path has (F).
    fixed : mapping of str to float, optional
        Values of other labels, physical units.
    others : str, default "mean"
        What the remaining labels do: "mean" keeps them at the mean of the training stars, "branch"
        lets them follow the moving and the fixed ones as they do in the training stars.

    Returns
    -------
    array (F, K)
        Labels of each frame, physical units.

    Raises
    ------
    LabError
        For an unknown label or choice, where nothing moves, and where the path leaves the box that
        `infer` searches.
    """
    place = _places(model, [moving, *(fixed or {})])
    if isinstance(frames, bool) or not isinstance(frames, (int, np.integer)) or frames < 1:
        raise LabError(f"{frames!r} frames: a film has at least one")
    if not np.isfinite([low, high]).all() or (low == high and frames > 1):
        raise LabError(
            f"{moving} from {low:g} to {high:g}: nothing moves; choose two different numbers"
        )
    path = np.tile(model.training_labels_.mean(axis=0), (frames, 1))
    path[:, place] = [low, *(fixed or {}).values()]
    path[:, place[0]] = np.linspace(low, high, frames)
    if others == "branch":
        _follow_branch(model.training_labels_, path, place)
    elif others != "mean":
        raise LabError(
            f"others is {others!r}: choose 'mean' (of the training stars) "
            "or 'branch' (as the training stars have it)"
        )
    _check_box(model, path)
    return path


# %% [markdown]
# The branch itself is a pipeline of scikit-learn. It fills the columns of the path that are not given.

# %%
#| export
def _follow_branch(training, path, place):
    "Fills the columns of `path` (F, K) that are not in `place`, as the training labels have them."
    free = np.setdiff1d(np.arange(path.shape[1]), place)
    if len(free):
        branch = make_pipeline(StandardScaler(), PolynomialFeatures(2), LinearRegression())
        branch.fit(training[:, place], training[:, free])
        path[:, free] = branch.predict(path[:, place])


# %%
middle = np.quantile(training["LOGG"], [0.75, 0.25])
Table(_label_path(model, "LOGG", *middle, 3, others="branch").round(2), names=names)


# %% [markdown]
# Two paths up the giant branch, one for metal-rich and one for metal-poor stars, and what happens if the temperature does not follow.

# %%
def gravities(value):
    "Gravities of training stars of about this metallicity, highest first, without the outer 5 %."
    return np.quantile(training["LOGG"][np.abs(training[metallicity] - value) < 0.25], [0.95, 0.05])


rich, poor = np.quantile(training[metallicity], [0.85, 0.3])
symbol = LABELS[metallicity].symbol
paths = {
    f"branch at {symbol} = {value:.2f}": _label_path(
        model, "LOGG", *gravities(value), 50, {metallicity: value}, "branch"
    )
    for value in (rich, poor)
}
paths["all others at their mean"] = _label_path(
    model, "LOGG", *np.quantile(training["LOGG"], [0.99, 0.01]), 50
)

# %%
fig, ax = plt.subplots(figsize=(6.5, 4))
stars = ax.scatter(training["TEFF"], training["LOGG"], 8, training[metallicity], cmap="viridis")
for (name, path), style in zip(paths.items(), ("-", "--", ":")):
    teff = path[:, names.index("TEFF")]
    logg = path[:, names.index("LOGG")]
    ax.plot(teff, logg, style, color="C3", lw=2, label=name)
fig.colorbar(stars, label=LABELS[metallicity].axis)
ax.set(xlabel=LABELS["TEFF"].axis, ylabel=LABELS["LOGG"].axis)
ax.invert_xaxis()
ax.invert_yaxis()
ax.legend(frameon=False, fontsize=9);

# %%
#| echo: false
ends = np.quantile(training["LOGG"], [0.9, 0.1])
followed = _label_path(model, "LOGG", *ends, 2, others="branch")
away = np.abs(followed - _label_path(model, "LOGG", *ends, 2))[:, names.index("TEFF")]
Markdown(
    "**What to see.** Each branch runs through the training stars of its own colour. The dotted "
    f"line leaves them at both ends: there its temperature is {away[0]:.0f} and {away[1]:.0f} K "
    "from what stars of such gravities have. A giant that changes its gravity and not its "
    "temperature is soon a star that does not exist."
)

# %% [markdown]
# The regression, checked on stars: it explains most of the temperature's spread. And on made-up labels that *are* quadratic in each other it must
# find them exactly.

# %%
both = model.scale(model.training_labels_)[:, [names.index("LOGG"), names.index(metallicity)]]
both = PolynomialFeatures(2).fit_transform(both)
off_branch = training["TEFF"] - both @ np.linalg.lstsq(both, training["TEFF"])[0]
print(
    f"Teff scatters by {training['TEFF'].std():.0f} K among the training stars, "
    f"by {np.std(off_branch):.0f} K around the branch"
)
assert np.std(off_branch) < 0.6 * training["TEFF"].std()

# %%
rng = np.random.default_rng(8)
logg = rng.uniform(1, 3, 300)
metals = rng.uniform(-1, 0.3, 300)
bent = np.column_stack([4000 + 300 * logg + 40 * logg**2 - 200 * metals * logg, logg, metals])
noise = rng.normal(1, 0.01, (300, 5))
exact = Cannon(order=1).fit(bent, noise, label_names=["TEFF", "LOGG", "M_H"])
path = _label_path(exact, "logg", 3, 1, 5, {"m_h": -0.5}, "branch")
teff, logg, metals = path.T
assert np.allclose(teff, 4000 + 300 * logg + 40 * logg**2 + 100 * logg)
assert np.all(metals == -0.5)
assert logg[0] == 3 and logg[-1] == 1  # a film may run backwards

# %% [markdown]
# ## Names for the lines
# Which line is which? A table of well-known strong lines, with the air wavelengths of [linemake](https://github.com/vmplacco/linemake)'s lists
# ([Placco et al. 2021](https://doi.org/10.3847/2515-5172/abf651)), among them those by which [Smith et al.
# 2013](https://doi.org/10.1088/0004-637X/765/1/16) measured abundances in APOGEE's first giants. For CO the wavelength is that of the *head*, where
# a band's lines crowd and turn back: the shortest wavelength of the band in the list.

# %%
#| export
# Angstrom in air, by species; linemake (Placco et al. 2021).
_AIR_LINES = {
    "Fe I": """
        15207.526 15294.560 15335.383 15394.673 15490.339 15531.752 15591.493 15621.654
        15631.948 15648.510 15662.016 15692.747 15723.586 15769.423 15788.998 15818.142
        15822.817 15868.524 15906.044 15920.645 15964.867 15980.728 16006.760 16009.611
        16040.657 16102.411 16153.247 16165.032 16198.503 16292.843 16316.323 16324.452
        16394.392 16398.170 16444.819 16486.669 16517.226 16561.767 16645.877 16665.484
    """,
    "Mg I": "15740.716 15748.988 15765.842 15879.567 15886.183 15954.477",
    "Al I": "15956.675 15968.287 16718.957 16750.564 16763.360",
    "Si I": """
        15361.161 15376.831 15557.779 15833.602 15884.454 15888.410 15960.063 16060.009
        16094.787 16163.691 16215.670 16241.833 16380.177 16434.927 16680.770 16828.159
    """,
    "K I": "15163.067 15168.376",
    "Ca I": "16136.823 16150.763 16155.236 16157.364 16197.075 16204.087",
    "Ti I": "15334.847 15543.756 15602.842 15698.979 15715.573 16330.532",
    "V I": "15924.822",
    "Cr I": "15680.063 15860.214 16015.323",
    "Mn I": "15157.848 15217.793 15262.702",
    "Ni I": "15555.421 15632.654 16310.504 16364.188 16589.294 16815.470 16867.369",
    "OH": """
        15278.525 15281.055 15407.294 15409.170 15558.017 15560.245 15568.782 15572.084
        15719.695 15893.513 16052.766 16055.466 16069.525 16074.162 16190.142 16192.129
        16204.077 16207.187 16352.213 16354.577 16364.593 16368.136 16523.498 16526.254
        16534.582 16538.588 16714.359 16904.278 16909.289
    """,
    "CO 3-0": "15577.376",
    "CO 4-1": "15775.155",
    "CO 5-2": "15977.502",
    "CO 6-3": "16184.503",
    "CO 7-4": "16396.329",
    "CO 8-5": "16613.169",
    "CO 9-6": "16835.141",
}

# %%
counts = {species: len(text.split()) for species, text in _AIR_LINES.items()}
print(*(f"{species}: {count}" for species, count in counts.items()), sep=", ")

# %% [markdown]
# APOGEE counts in vacuum. [Ciddor's formula](https://doi.org/10.1364/AO.35.001566) gives the refractive index of air, a few parts in ten
# thousand: 4.4 Å here, twenty pixels. Hydrogen needs no list. Rydberg's formula with the vacuum constant, corrected for the proton's motion, gives
# the Brackett series, the jumps from level 4 to $n$,
# $$ \frac1\lambda = \frac{R_\infty}{1 + m_e/m_p}\left(\frac1{4^2}-\frac1{n^2}\right). $$

# %%
#| export
_BRACKETT = range(11, 17)  # upper levels whose lines lie in the H band and stand apart


def _brackett(n):
    """Wavelength of hydrogen's line from level n to level 4.

    Parameters
    ----------
    n : int or array_like
        Upper level, above 4.

    Returns
    -------
    float or ndarray
        Wavelength in vacuum [Angstrom], by Rydberg's formula with the proton's motion.

    Examples
    --------
    >>> float(_brackett(11).round())
    16811.0
    """
    rydberg = (Ryd / (1 + m_e / m_p)).to_value(1 / u.AA)
    return 1 / (rydberg * (1 / 16 - 1 / np.square(n, dtype=float)))


def _strong_lines() -> QTable:
    """Well-known strong lines of the H band.

    Returns
    -------
    QTable
        One row per line, by wavelength: species, wavelength (vacuum) and source.
    """
    rows = [
        (species, air_to_vacuum(float(air)), "linemake (Placco et al. 2021)")
        for species, text in _AIR_LINES.items()
        for air in text.split()
    ]
    rows += [(f"Br {n}", _brackett(n), "Rydberg") for n in _BRACKETT]
    table = QTable(
        rows=sorted(rows, key=lambda row: row[1]),
        names=["species", "wavelength", "source"],
        units={"wavelength": u.AA},
    )
    table["wavelength"].info.format = ".2f"
    return table


# %%
lines = _strong_lines()
lines[:5]

# %%
assert abs(_brackett(11) - 16811.1) < 0.1
assert abs(_brackett(7) / 21661.2 - 1) < 1e-5  # Br gamma, in every textbook at 2.1661 micron
assert abs(air_to_vacuum(15748.988) - 15753.29) < 0.02
assert abs(air_to_vacuum(16763.360) - 16767.94) < 0.02

# %% [markdown]
# ### Is it true?
# A name above a spectrum is a claim, so we ask the model, which knows no line list at all. A line stays only if
#
# - the model's spectrum has a dip there: its minimum within one pixel of the wavelength, at least 3 % below the shoulders on either side, and
# - the dip deepens, by at least half a percent for one standard deviation, with a label that should know it. For a metal that is the metallicity, or
#   its own element where the model has one (Mg, Si; the $\alpha$ elements Mg, Si, Ca, Ti, and O in OH; carbon in CO). For a Brackett line it is the
#   temperature.
#
# Several trial stars may be given, and a line keeps its name if it passes in one of them: OH shows in cool stars, hydrogen in hot ones. Hydrogen's
# lines are broad, so they are looked at through every third pixel.
#
# First: where do we look?

# %%
#| export
_SHOULDERS = 6  # pixels: the shoulders are at most so far from the wavelength
_BROAD = 3  # hydrogen's lines are so many times wider


def _grid(model):
    "The wavelengths that the model knows."
    if model.wavelength_ is None:
        raise LabError(
            "the model does not know its wavelengths: "
            "fit it to a Spectra, or give wavelength= to fit"
        )
    return model.wavelength_


def _pixels_around(grid, wanted, species):
    "Pixels (L, R) around each line, and which lines (L,) have all of them on the grid."
    centre = np.searchsorted(grid * 10 ** (LOG10_STEP / 2), wanted).clip(0, len(grid) - 1)
    width = np.array([_BROAD if name.startswith("Br") else 1 for name in species])[:, None]
    near = centre[:, None] + width * np.arange(-_SHOULDERS, _SHOULDERS + 1)
    pixels = near.clip(0, len(grid) - 1)
    distance = np.abs(np.log10(grid[pixels] / wanted[:, None]))
    # A gap between chips is not a neighbourhood: its far side is further away than its pixels say.
    whole = (near == pixels) & (distance < (_SHOULDERS + 1) * width * LOG10_STEP)
    return pixels, whole.all(axis=1)


# %%
pixels, whole = _pixels_around(wavelength, lines["wavelength"].value, lines["species"])
print(f"{whole.sum()} of {len(lines)} lines have their surroundings on the grid")
print(*wavelength[pixels[1]].round(2))

# %% [markdown]
# Then: is there a dip?

# %%
#| export
_DIP_PIXELS = 1  # the dip is at most so far from the wavelength


def _dips(flux):
    """Dips in pieces of spectra (S, L, R) around lines.

    Returns the place of each dip in its piece and its depth below the lower shoulder, both (S, L).
    """
    middle = flux.shape[2] // 2
    first = middle - _DIP_PIXELS
    last = middle + _DIP_PIXELS
    known = np.where(np.isfinite(flux), flux, np.inf)
    place = first + known[:, :, first : last + 1].argmin(axis=2)
    lowest, left, right = (
        np.take_along_axis(flux, place[..., None] + step, axis=2)[..., 0] for step in (0, -1, 1)
    )
    left_shoulder = flux[:, :, :first].max(axis=2)
    right_shoulder = flux[:, :, last + 1 :].max(axis=2)
    depth = np.minimum(left_shoulder, right_shoulder) - lowest
    is_dip = np.minimum(left, right) >= lowest  # NaN is no dip
    return place, np.where(is_dip, np.nan_to_num(depth), 0)


# %%
gauss = 1 - 0.1 * np.exp(-0.5 * np.arange(-6, 7) ** 2)
pieces = np.array([gauss, np.roll(gauss, 1), np.roll(gauss, 3)])
place, depth = _dips(pieces[None])
print("places", place[0], "depths", depth[0].round(3))

# %% [markdown]
# Last: which labels should know a line, and how much does it deepen with the one that knows it best?

# %%
#| export
_LINE_LABELS = {  # species -> labels that deepen its lines, besides the metallicity
    "Mg I": ("MG_FE", "ALPHA_M"),
    "Si I": ("SI_FE", "ALPHA_M"),
    "Ca I": ("ALPHA_M",),
    "Ti I": ("ALPHA_M",),
    "OH": ("ALPHA_M",),
    "CO": ("C_M",),
    "Br": ("TEFF",),
}


def _judges(species):
    "Names of the labels that deepen the lines of a species."
    kind = species.split()[0] if species.startswith(("CO", "Br")) else species
    return _LINE_LABELS.get(kind, ()) + (() if kind == "Br" else ("FE_H", "M_H"))


def _deepening(model, labels, pixel, species):
    """How much each line deepens with the label that knows it best, (S, L).

    Counted for one standard deviation of the training stars; 0 where no label knows the line.
    """
    slopes = np.array([model.derivative(star)[0][:, p] for star, p in zip(labels, pixel)])
    slopes = slopes * model.scales_[:, None]  # (S, K, L)
    knows = [[name in _judges(kind) for kind in species] for name in model.label_names_]
    return np.where(np.array(knows, dtype=bool), -np.nan_to_num(slopes), 0).max(axis=1)


# %%
for species in ("Fe I", "Mg I", "OH", "CO 3-0", "Br 11"):
    print(f"{species:6s} deepens with", *_judges(species))

# %%
#| export
_MIN_DIP = 0.03  # below the shoulders
_MIN_DEEPENING = 0.005  # for one standard deviation of a label


def _check_lines(model: Cannon, labels: np.ndarray = None, table: QTable = None) -> QTable:
    """Which lines does the model confirm?

    A line is named if the model's spectrum has a dip there that deepens with a label that should
    know it, in at least one of the trial stars.

    Parameters
    ----------
    model : Cannon
        A fitted model with K labels that knows its wavelengths.
    labels : array (S, K), optional
        Trial stars, physical units; by default one of mean training labels.
    table : QTable, optional
        Lines with `species` and `wavelength` (vacuum); by default `_strong_lines`.

    Returns
    -------
    QTable
        The lines that lie on the model's grid, with the depth of the `dip`, its `offset` from the
        wavelength, `named`, and the `verdict` in words.

    Raises
    ------
    LabError
        If the model does not know its wavelengths.
    """
    grid = _grid(model)
    table = _strong_lines() if table is None else table
    labels = np.atleast_2d(model.training_labels_.mean(axis=0) if labels is None else labels)
    wanted = table["wavelength"].to_value(u.AA)
    pixels, whole = _pixels_around(grid, wanted, table["species"])
    table = table[whole]
    pixels = pixels[whole]
    line = np.arange(len(table))
    place, dip = _dips(model.predict(labels)[:, pixels])
    pixel = pixels[line, place]  # (S, L)
    deepens = _deepening(model, labels, pixel, table["species"]) >= _MIN_DEEPENING
    good = (dip >= _MIN_DIP) & deepens
    best = (dip + good).argmax(axis=0)  # the star where the line passes, and is deepest
    table["dip"] = dip[best, line]
    table["offset"] = (grid[pixel[best, line]] - wanted[whole]) * u.AA
    table["named"] = good[best, line]
    reason = np.where(table["dip"] < _MIN_DIP, "no dip", "does not deepen")
    table["verdict"] = np.where(table["named"], "named", reason)
    table["dip"].info.format = ".3f"
    table["offset"].info.format = "+.2f"
    return table


# %% [markdown]
# Asked at three stars of mean labels but metallicities from -1 to 0.5. Then two counter-questions: how many *random* wavelengths would pass, and
# how many of the lines if we had forgotten to go to vacuum?

# %%
FROM = -1.0
TO = 0.5
trial = _label_path(model, metallicity, FROM, TO, 3)
checked = _check_lines(model, trial)
named = checked[checked["named"]]
is_metal = [not name.startswith(("Br", "CO", "OH")) for name in lines["species"]]
metals = lines[is_metal]
random = metals.copy()
drawn = np.random.default_rng(8).uniform(wavelength[0], wavelength[-1], len(metals))
random["wavelength"] = drawn * u.AA
air = metals.copy()
air["wavelength"] = metals["wavelength"] ** 2 / air_to_vacuum(metals["wavelength"].value) / u.AA
share = {
    name: _check_lines(model, trial, table)["named"].mean()
    for name, table in (("true", metals), ("random", random), ("air", air))
}

# %% [markdown]
# The lines that lose their names, and why (wavelengths in vacuum, in Å):

# %%
#| echo: false
rows = ["| species | lines | named | no dip | does not deepen |", "|:--|--:|--:|:--|:--|"]
for species in dict.fromkeys(name.split()[0] for name in checked["species"]):
    of_species = checked[[name.split()[0] == species for name in checked["species"]]]
    dropped = [
        ", ".join(f"{row['wavelength'].value:.0f}" for row in of_species if row["verdict"] == why)
        for why in ("no dip", "does not deepen")
    ]
    counts = [len(of_species), of_species["named"].sum()]
    rows.append(f"| {' | '.join(map(str, [species, *counts, *dropped]))} |")
Markdown("\n".join(rows))

# %%
#| echo: false
Markdown(
    f"**What to see.** {len(named)} of {len(checked)} lines keep their names. Of the atomic ones "
    f"{share['true']:.0%} pass, of as many random wavelengths {share['random']:.0%} (a giant's "
    "H band is full of lines, so chance finds a dip), and at the wavelengths in air "
    f"{share['air']:.0%}."
)

# %%
offset = np.median(named["offset"].value)
print(f"dips minus table, median: {offset:+.2f} Å; a pixel is 0.22 Å")
assert share["true"] > 0.75 and max(share["random"], share["air"]) < 0.75 * share["true"]
assert abs(offset) < 0.1 and len(named) > 0.6 * len(checked)


# %% [markdown]
# And on a made-up model where we know: lines that deepen with the metallicity at three wavelengths of the table, one that fades instead, nothing
# elsewhere. Exactly the three may keep their names.

# %%
def line_name(row):
    "Species and rounded wavelength."
    return f"{row['species']} {row['wavelength'].value:.0f}"


true = ["Fe I 16045", "Al I 16755", "Mn I 15222"]
fading = "Fe I 16169"
where = {line_name(row): row["wavelength"].value for row in lines}
feh = np.linspace(-1, 0.5, 40)[:, None]
flux = np.ones((len(feh), len(wavelength)))
for name in (*true, fading):
    profile = np.exp(-0.5 * ((wavelength - where[name]) / 0.4) ** 2)
    flux -= (0.2 + 0.1 * feh * (-1 if name == fading else 1)) * profile
toy = Cannon(order=1).fit(feh, flux, label_names=["FE_H"], wavelength=wavelength)
verdict = {line_name(row): row["verdict"] for row in _check_lines(toy)}
print(*(f"{name}: {verdict[name]}" for name in (*true, fading)), sep="\n")
assert {name for name, word in verdict.items() if word == "named"} == set(true)
assert verdict[fading] == "does not deepen"


# %% [markdown]
# ## A film
# A film holds all that will be drawn: the path, the spectra, their slopes, and which frames are extrapolated.

# %%
#| exporti
@dataclass(frozen=True)
class Film:
    """Spectra along a path of labels: F frames, P pixels.

    Attributes
    ----------
    moving : str
        Name of the label that moves.
    label_names : tuple of str
        Names of all K labels.
    labels : array (F, K)
        Labels of each frame, physical units.
    wavelength : array (P,)
        Wavelengths in vacuum [Angstrom].
    flux : array (F, P)
        Spectra, relative to the continuum.
    slope : array (F, P)
        Partial derivative of the flux with respect to the moving label, per unit of it.
    outside : array (F,) of bool
        Extrapolated frames: a label beyond all training stars, or all labels far from any of them.
    reference : array (P,)
        Spectrum at the mean training labels.
    lines : QTable
        Confirmed lines in the window, the deepest dip first.
    """

    moving: str
    label_names: tuple
    labels: np.ndarray
    wavelength: np.ndarray
    flux: np.ndarray
    slope: np.ndarray
    outside: np.ndarray
    reference: np.ndarray
    lines: QTable

    def __len__(self):
        return len(self.labels)

    @property
    def values(self) -> np.ndarray:
        "The moving label (F,)."
        return self.labels[:, self.label_names.index(self.moving)]


# %% [markdown]
# Three helpers find its pieces: the pixels of the window, the lines that the model confirms in the first, the middle or the last frame, and the
# frames that leave the training stars.

# %%
#| export
def _pixels(model, window):
    "Pixels of the window (bool)."
    grid = _grid(model)
    if window is None:
        return np.ones(len(grid), dtype=bool)
    low, high = window
    inside = (grid >= low) & (grid <= high)
    off_grid = low < grid[0] or high > grid[-1]
    if off_grid or not inside[model.usable_].any():
        raise LabError(
            f"the window from {low:g} to {high:g} Angstrom "
            f"{'leaves the grid' if off_grid else 'has no usable pixel'}: "
            f"the model reaches from {grid[0]:.1f} to {grid[-1]:.1f}, "
            "with gaps between the chips; give (low, high) inside"
        )
    return inside


def _confirmed_lines(model, labels, grid):
    "Lines on `grid` that the model confirms along a path (F, K), the deepest dip first."
    lines = _check_lines(model, labels[[0, len(labels) // 2, -1]])
    wanted = lines["wavelength"].to_value(u.AA)
    lines = lines[lines["named"] & (wanted > grid[0]) & (wanted < grid[-1])]
    lines.sort("dip", reverse=True)
    return lines


def _extrapolated(model, labels):
    "Frames (F,) with a label beyond all training stars, or further from them than they are apart."
    training = model.training_labels_
    beyond = (labels < training.min(axis=0)) | (labels > training.max(axis=0))
    return outside_training(model, labels) | beyond.any(axis=1)


# %%
path = _label_path(model, metallicity, FROM, TO, 9)
inside = _pixels(model, (16000, 16200))
print(f"{inside.sum()} pixels; extrapolated frames:", *np.flatnonzero(_extrapolated(model, path)))
_confirmed_lines(model, path, wavelength[inside])[:3]

# %% [markdown]
# `film` puts it together. It needs one `predict` for all spectra and one slope with respect to the moving label, and only reads the model.

# %%
#| export
_BLOCK = 32  # frames whose derivatives are computed at once: they come for all labels


def film(
    model: Cannon,
    moving: str,
    low: float,
    high: float,
    frames: int = 200,
    window: tuple = (16000.0, 16200.0),
    fixed: Mapping = None,
    others: str = "mean",
) -> Film:
    """Model spectra while one label moves. The model is not changed.

    Parameters
    ----------
    model : Cannon
        A fitted model that knows its wavelengths.
    moving, low, high, frames, fixed, others
        The path, as for `_label_path`.
    window : (float, float) or None, default (16000, 16200)
        Wavelengths to show [Angstrom, vacuum]; None for the whole grid. The default is that of the
        original lab.

    Returns
    -------
    Film
        To be shown by `player` or written by `write_film`.

    Raises
    ------
    LabError
        For a path that `_label_path` refuses, a window off the grid or without usable pixels, and
        a model that does not know its wavelengths.
    """
    labels = _label_path(model, moving, low, high, frames, fixed, others)
    k = _places(model, [moving])[0]
    inside = _pixels(model, window)
    grid = model.wavelength_[inside]
    mean = model.training_labels_.mean(axis=0, keepdims=True)
    blocks = np.array_split(labels, math.ceil(len(labels) / _BLOCK))
    return Film(
        moving=model.label_names_[k],
        label_names=model.label_names_,
        labels=labels,
        wavelength=grid,
        flux=model.predict(labels)[:, inside],
        slope=np.concatenate([model.derivative(block)[:, k, inside] for block in blocks]),
        outside=_extrapolated(model, labels),
        reference=model.predict(mean)[0, inside],
        lines=_confirmed_lines(model, labels, grid),
    )


# %%
metal_film = film(model, metallicity, FROM, TO)
print(f"{len(metal_film)} frames of {len(metal_film.wavelength)} pixels")
assert metal_film.flux.shape == (200, len(metal_film.wavelength))
assert metal_film.values[[0, -1]].tolist() == [FROM, TO]

# %%
in_window = np.isin(wavelength, metal_film.wavelength)
seventh = model.predict(metal_film.labels[7])[0, in_window]
assert np.allclose(metal_film.flux[7], seventh, equal_nan=True)  # a frame is a model spectrum
still = np.delete(metal_film.labels, names.index(metallicity), axis=1)
means = np.delete(model.training_labels_.mean(axis=0), names.index(metallicity))
assert np.ptp(still, axis=0).max() == 0 and np.allclose(still[0], means)

# %% [markdown]
# More metals, deeper lines: at each confirmed iron line the flux must fall from frame to frame. And the slope panel must be what finite
# differences between frames say. (A quadratic model makes the central difference exact, up to rounding.)

# %%
iron = metal_film.lines[metal_film.lines["species"] == "Fe I"]
dips = (iron["wavelength"] + iron["offset"]).value
at_iron = np.abs(metal_film.wavelength[:, None] - dips).argmin(axis=0)
depth = 1 - metal_film.flux[:, at_iron]
assert len(iron) >= 4 and np.all(np.diff(depth, axis=0) > 0)
rise = metal_film.flux[2:] - metal_film.flux[:-2]
between = rise / (metal_film.values[2:] - metal_film.values[:-2])[:, None]
assert np.allclose(between, metal_film.slope[1:-1], atol=1e-9, equal_nan=True)

# %%
fig, ax = plt.subplots(figsize=(6.5, 3.2))
for row, curve in zip(iron, depth.T):
    ax.plot(metal_film.values, curve, label=f"Fe I {row['wavelength'].value:.1f}")
if TO > training[metallicity].max():
    ax.axvspan(training[metallicity].max(), TO, color="0.9")
ax.set(xlabel=LABELS[metallicity].axis, ylabel="depth of the line")
ax.legend(frameon=False, fontsize=8);


# %% [markdown]
# **What to see.** Iron lines grow with the metallicity, steadily. (Grey: beyond the most metal-rich training star.)
#
# ## Drawing fast
# Most of a picture never changes: axes, ticks, names, the spectrum at the mean labels in grey. It is drawn once and kept. For each frame the
# background is put back, and only the two curves and the title are drawn over it. The pixels go from the canvas to Pillow without a file between.
# That is *blitting*, and makes a frame take some ten milliseconds instead of a hundred.
#
# We begin with the words. The title is the moving value, with as many digits as it takes to tell neighbouring frames apart.

# %%
#| export
def _kelvin(name):
    "Is the label a temperature?"
    return label_record(name).unit == u.K


def _slope_unit(name):
    "Factor and text of a slope: a kelvin is too little to see."
    if _kelvin(name):
        return 100, "per 100 K"
    return 1, "per dex" if label_record(name).unit == u.dex else "per unit"


def _value(name, value, digits=None):
    "A label and its value as text."
    if digits is None:
        digits = 0 if _kelvin(name) else 2
    return f"{label_record(name).symbol} = {value:.{digits}f}{' K' if _kelvin(name) else ''}"


def _titles(film, k):
    "The moving value of frame `k`, and the values of the other labels, as text."
    digits = 0 if _kelvin(film.moving) else 2
    step = abs(film.values[-1] - film.values[0]) / max(len(film) - 1, 1)
    if step:  # so that no two frames have the same title
        digits = max(digits, int(np.ceil(-np.log10(step))))
    rest = [
        _value(name, value)
        for name, value in zip(film.label_names, film.labels[k])
        if name != film.moving
    ]
    return _value(film.moving, film.values[k], digits), "  ".join(rest)


# %%
print(*_titles(metal_film, 0), sep="; ")
assert _titles(metal_film, 0)[0] == f"{LABELS[metallicity].symbol} = -1.000"
assert _titles(metal_film, 199)[0].endswith("= 0.500")
assert len({_titles(metal_film, k)[0] for k in range(200)}) == 200  # every frame has its own title

# %% [markdown]
# Then the two panels. Limits of the axes are those of the whole film, so that it is the spectrum that moves and not the picture.

# %%
#| export
_COLORS = {"flux": "#0173b2", "slope": "#d55e00", "mark": "#d55e00"}  # colour-blind safe


def _limits(values, above):
    "Limits of an axis that holds all values, with some room below and `above`."
    low = np.nanmin(values)
    span = max(np.nanmax(values) - low, 1e-6)
    return low - 0.05 * span, np.nanmax(values) + above * span


def _draw_panels(film, top, bottom):
    "Draws the first frame's spectrum and slope; returns the two curves."
    factor, unit = _slope_unit(film.moving)
    plot_spectrum(film.wavelength, film.reference, ax=top, color="0.75", lw=0.8)
    plot_spectrum(film.wavelength, film.flux[0], ax=top, color=_COLORS["flux"], lw=1.1)
    bottom.axhline(0, color="0.8", lw=0.8)
    slope = film.slope * factor
    plot_spectrum(film.wavelength, slope[0], ax=bottom, color=_COLORS["slope"], lw=1.0)
    everything = np.vstack([film.flux, film.reference])
    top.set(xlabel="", ylabel="flux / continuum", ylim=_limits(everything, above=0.36))
    symbol = label_record(film.moving).symbol
    bottom.set(ylabel=f"slope with {symbol}\n{unit}", ylim=_limits(slope, above=0.05))
    return top.lines[-1], bottom.lines[-1]


# %%
fig, axes = plt.subplots(2, 1, figsize=(8.5, 4.5), sharex=True, height_ratios=(5, 2))
curves = _draw_panels(metal_film, *axes)

# %% [markdown]
# The upper panel has room for the names of the lines. They are thinned where they would overlap: the deeper line keeps its own. Then come the title
# and the notes at the foot.

# %%
#| export
_NAME_ROOM = 13  # points that a name needs along the wavelength


def _name_lines(ax, lines):
    "Writes the names that have room, the first of `lines` first; returns their wavelengths."
    points = ax.get_window_extent().width * 72 / ax.figure.dpi
    room = _NAME_ROOM * np.ptp(ax.get_xlim()) / points  # Angstrom
    transform = ax.get_xaxis_transform()
    placed = []
    for species, x in zip(lines["species"], lines["wavelength"].to_value(u.AA)):
        if all(abs(x - other) > room for other in placed):
            placed.append(x)
            ax.plot([x, x], [0.75, 0.79], transform=transform, color="0.5", lw=0.7)
            style = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 8}
            ax.text(x, 0.80, species, transform=transform, **style)
    return placed


def _draw_words(figure, top):
    "Writes the note about the grey curve, and empty titles and the mark, which are returned."
    note = "grey: the mean of the training stars"
    figure.text(0.005, 0.01, note, fontsize=8, color="0.45")
    title = top.set_title(" ", loc="left", fontsize=13)
    aside = top.set_title(" ", loc="right", fontsize=9, color="0.35")
    warning = "outside the training stars: extrapolated"
    color = _COLORS["mark"]
    mark = figure.text(0.995, 0.01, warning, ha="right", fontsize=9, color=color)
    return title, aside, mark


# %%
placed = _name_lines(axes[0], metal_film.lines)
title, _, mark = _draw_words(fig, axes[0])
title.set_text(_titles(metal_film, 0)[0])
mark.set_visible(bool(metal_film.outside[0]))
print(f"{len(placed)} of {len(metal_film.lines)} names have room")
fig

# %% [markdown]
# The picture keeps what is drawn once, and `frame` draws the rest. Its style is its own, whatever style the session has, so that the same film gives
# the same pixels.

# %%
#| export
_FILM_STYLE = {
    "font.size": 10,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.1,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class _Picture:
    "Draws a film's frames: the spectrum under its line names, its slope, the values in the title."

    def __init__(self, film, size=(9, 4.8), dpi=90):
        import matplotlib.style

        self.film = film
        with matplotlib.style.context(["default", _FILM_STYLE]):
            self._draw_still(size, dpi)

    def _draw_still(self, size, dpi):
        "Draws what never changes and keeps its pixels."
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
        top, bottom = self.axes
        self.flux, self.slope = _draw_panels(self.film, top, bottom)
        self.title, self.aside, self.mark = _draw_words(self.figure, top)
        self.canvas.draw()  # finds the layout, which the names need
        _name_lines(top, self.film.lines)
        self.figure.set_layout_engine("none")
        self.moving = (self.flux, self.slope, self.title, self.aside, self.mark)
        for artist in self.moving:
            artist.set_animated(True)
        self.canvas.draw()
        self._background = self.canvas.copy_from_bbox(self.figure.bbox)

    def frame(self, k):
        "Frame `k` as RGB, (height, width, 3) uint8."
        return _draw_frame(self, k)

    def place(self, wavelength, flux):
        "Columns and rows (N, 2), from the upper left, of points of the upper panel."
        points = np.column_stack(np.broadcast_arrays(wavelength, flux))
        x, y = self.axes[0].transData.transform(points).T
        return np.column_stack([x, self.canvas.get_width_height()[1] - y])


# %%
#| export
def _draw_frame(picture, k):
    "Puts the background back, draws frame `k` over it, and returns the pixels."
    film = picture.film
    picture.canvas.restore_region(picture._background)
    slope = film.slope[k] * _slope_unit(film.moving)[0]
    for line, values in ((picture.flux, film.flux[k]), (picture.slope, slope)):
        there = ~np.isnan(line.get_xdata())
        y = np.full(len(there), np.nan)  # NaN breaks the line between the chips
        y[there] = values
        line.set_ydata(y)
    for text, words in zip((picture.title, picture.aside), _titles(film, k)):
        text.set_text(words)
    picture.mark.set_visible(bool(film.outside[k]))
    for artist in picture.moving:
        parent = artist.axes or picture.figure
        parent.draw_artist(artist)
    return np.asarray(picture.canvas.buffer_rgba())[..., :3].copy()


# %% [markdown]
# The first and the last frame:

# %%
picture = _Picture(metal_film)
fig, axes = plt.subplots(2, 1, figsize=(8.5, 9), dpi=72)
for ax, k in zip(axes, (0, len(metal_film) - 1)):
    ax.imshow(picture.frame(k))
    ax.set_axis_off()

# %%
#| echo: false
bump = np.nanmax(metal_film.flux)
branch_bump = np.nanmax(film(model, metallicity, FROM, TO, 30, others="branch").flux)
Markdown(
    "**What to see.** The named lines deepen, and so do hundreds without a name. At the end the "
    f"flux climbs to {bump:.2f} in places, which no absorption does: hardly any star taught the "
    "model that is so metal-rich and average in all else. Where "
    f"the other labels follow the branch, the highest flux is {branch_bump:.2f}."
)

# %% [markdown]
# Blitting must not change the picture: a frame is the same to the pixel after many others as from a fresh start, and equal to matplotlib's own
# full drawing of the same artists. What has moved must be gone.

# %%
first = picture.frame(0)
assert np.array_equal(first, _Picture(metal_film).frame(0))
assert not np.array_equal(first, picture.frame(199))
picture.frame(120)
for artist in picture.moving:
    artist.set_animated(False)
picture.canvas.draw()
whole = np.asarray(picture.canvas.buffer_rgba())[..., :3].astype(int)
picture = _Picture(metal_film)
# Curves lie over the frame of the axes in one and under it in the other.
different = (np.abs(whole - picture.frame(120)) > 8).any(axis=2)
print(f"{different.mean():.3%} of the pixels differ")
assert different.mean() < 0.002

# %% [markdown]
# ## A file
# A GIF can always be written, by Pillow. One palette serves the whole film, so that nothing flickers, and a comment says what the film shows.

# %%
#| export
_GIF_COLORS = 64


def _palette(picture):
    "An image that carries the colours of the first, middle and last frame; its white is white."
    last = len(picture.film) - 1
    sample = np.vstack([picture.frame(k) for k in (0, len(picture.film) // 2, last)])
    palette = Image.fromarray(sample).quantize(_GIF_COLORS, Image.Quantize.MEDIANCUT)
    colors = np.array(palette.getpalette()).reshape(-1, 3)
    colors[colors.min(axis=1) > 240] = 255
    palette.putpalette(colors.ravel().tolist())
    return palette


def _write_gif(picture, frames, path, interval):
    "Writes frames as a GIF that repeats for ever."
    film = picture.film
    palette = _palette(picture)
    indexed = (
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    )
    comment = (
        f"{film.moving} from {film.values[0]:g} to {film.values[-1]:g}, "
        f"{film.wavelength[0]:.1f} to {film.wavelength[-1]:.1f} Angstrom"
    )
    next(indexed).save(
        path,
        format="GIF",
        save_all=True,
        append_images=indexed,
        duration=interval,
        loop=0,
        optimize=False,
        comment=comment.encode(),
    )


# %%
with tempfile.TemporaryDirectory() as folder:
    _write_gif(picture, map(picture.frame, (0, 100, 199)), Path(folder) / "three.gif", 50)
    with Image.open(Path(folder) / "three.gif") as image:
        print(image.n_frames, "frames:", image.info["comment"].decode())


# %% [markdown]
# MP4 is a tenth of the size. It needs ffmpeg, which the package `imageio-ffmpeg` brings (the extra `video`).

# %%
#| export
def _write_mp4(picture, frames, path, interval):
    "Writes frames as an MP4, by ffmpeg."
    ffmpeg = require("imageio_ffmpeg", "video")
    # The codec wants even sides.
    width, height = (side // 2 * 2 for side in picture.canvas.get_width_height())
    options = "-movflags +faststart -fflags +bitexact -flags:v +bitexact -threads 1"
    try:
        video = ffmpeg.write_frames(
            str(path),
            (width, height),
            fps=1000 / interval,
            codec="libx264",
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=options.split(),
        )
        video.send(None)
        for frame in frames:
            video.send(np.ascontiguousarray(frame[:height, :width]))
        video.close()
    except (OSError, RuntimeError) as error:
        raise LabError(
            f"ffmpeg could not write the film ({str(error).strip()[:300]}): "
            "write a .gif instead, or let IMAGEIO_FFMPEG_EXE name another ffmpeg"
        ) from error


# %% [markdown]
# The player is a picture, a button and a slider; its frames are PNGs written into the page, and its script is a dozen lines. Where scripts do not
# run, the first frame stays.

# %%
#| export
# A backslash ends a line here that goes on in the page.
_PLAYER = """<figure id="{id}" class="film" style="margin: 0; max-width: {width}px">
<img src="data:image/png;base64,{first}" alt="{alt}" style="width: 100%; display: block">
<div style="display: flex; gap: 0.6em; align-items: center"><button type="button">play</button>
<input type="range" min="0" max="{last}" value="0" aria-label="frame" style="flex: 1"></div>
<script>(function () {{
  const root = document.getElementById("{id}"), frames = {frames}, interval = {interval};
  const image = root.querySelector("img"), button = root.querySelector("button"), \
slider = root.querySelector("input");
  let timer = null;
  function show(k) {{ slider.value = k; image.src = "data:image/png;base64," + frames[k]; }}
  function stop() {{ clearInterval(timer); timer = null; button.textContent = "play"; }}
  function step() {{ if (document.body.contains(root)) \
show((Number(slider.value) + 1) % frames.length); else stop(); }}
  button.onclick = function () {{ if (timer) stop(); else {{ \
timer = setInterval(step, interval); button.textContent = "pause"; }} }};
  slider.oninput = function () {{ stop(); show(Number(slider.value)); }};
}})();</script></figure>"""


def _png(frame, palette):
    "A frame as the bytes of a PNG."
    file = io.BytesIO()
    indexed = Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
    indexed.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _player_html(picture, frames, interval):
    "The HTML of a player that holds the frames."
    palette = _palette(picture)
    encoded = [base64.b64encode(_png(frame, palette)).decode() for frame in frames]
    start, end = (_titles(picture.film, k)[0] for k in (0, len(picture.film) - 1))
    digest = hashlib.sha256("".join(encoded).encode()).hexdigest()[:12]
    return _PLAYER.format(
        id=f"film-{digest}",
        width=picture.canvas.get_width_height()[0],
        first=encoded[0],
        last=len(encoded) - 1,
        interval=f"{interval:g}",
        frames=json.dumps(encoded),
        alt=html.escape(f"model spectrum, from {start} to {end}"),
    )


# %%
page = _player_html(picture, map(picture.frame, (0, 199)), 100)
print(f"{len(page) / 1e6:.2f} MB for two frames:", page[:60], "…")


# %%
#| export
@dataclass(frozen=True)
class _Player:
    "HTML that plays a film; a notebook shows it."

    html: str

    def __repr__(self):
        return f"<Player: {len(self.html) / 1e6:.1f} MB of HTML>"

    def _repr_html_(self):
        return self.html


def player(film: Film, interval: float = 100, size: tuple = (7, 4), dpi: int = 70) -> _Player:
    """A player for a notebook.

    It holds each frame, so make few: 30 of the usual size take half a megabyte.

    Parameters
    ----------
    film : Film
        What to play.
    interval : float, default 100
        Time that a frame stays [milliseconds].
    size : (float, float), default (7, 4)
        Width and height [inches].
    dpi : int, default 70
        Pixels per inch.

    Returns
    -------
    object
        A notebook shows it as a player; its `html` is the page's text.
    """
    picture = _Picture(film, size, dpi)
    return _Player(_player_html(picture, map(picture.frame, range(len(film))), interval))


# %% [markdown]
# The metallicity again, but on the giant branch. (Press play; it needs the notebook to run scripts, which JupyterLab does for a notebook that you
# trust.)

# %%
player(film(model, metallicity, FROM, TO, 13, others="branch"), interval=150)

# %% [markdown]
# And gravity, near aluminium's three strong lines and a Brackett line.

# %%
climb = film(
    model,
    "LOGG",
    *gravities(rich),
    frames=11,
    window=(16700, 16830),
    fixed={metallicity: rich},
    others="branch",
)
player(climb, interval=200)


# %% [markdown]
# The same player makes a page that needs nothing but a browser. `write_film` chooses the writer by the file's extension. All writers go through a
# temporary name, so that a film is there whole or not at all. A GIF counts time in hundredths of a second, and browsers slow down what is faster than
# 50 frames a second; other intervals are refused rather than rounded.

# %%
#| export
def _write_html(picture, frames, path, interval):
    "Writes a page with a player."
    values = picture.film.values
    title = html.escape(f"{picture.film.moving} from {values[0]:g} to {values[-1]:g}")
    head = f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>'
    body = f"<body>\n{_player_html(picture, frames, interval)}\n</body></html>"
    Path(path).write_text(f"<!DOCTYPE html>\n{head}{body}\n", encoding="utf-8")


_WRITERS = {".gif": _write_gif, ".mp4": _write_mp4, ".html": _write_html}


def _check_interval(suffix, interval):
    "Refuses a time between frames that a film of this extension cannot have."
    if not np.isfinite(interval) or interval <= 0:
        raise LabError(
            f"an interval of {interval} ms: give the milliseconds that a frame stays, above 0"
        )
    if suffix == ".gif" and (interval < 20 or interval % 10):
        raise LabError(
            f"an interval of {interval} ms: a GIF counts in steps of 10 ms "
            "and is not shown faster than 20; choose 20, 30, 40, …"
        )


# %%
for interval in (0, 33):
    with pytest.raises(LabError) as refused:
        _check_interval(".gif", interval)
    print(refused.value)


# %%
#| export
def write_film(
    film: Film,
    path,
    interval: float = 50,
    size: tuple = (9, 4.8),
    dpi: int = 90,
    progress: bool = True,
):
    """Draw a film into a file.

    The same film, versions and arguments give the same bytes.

    Parameters
    ----------
    film : Film
        What to draw.
    path : str or Path
        Where to; the extension .gif, .mp4 or .html says what.
    interval : float, default 50
        Time that a frame stays [milliseconds].
    size : (float, float), default (9, 4.8)
        Width and height [inches].
    dpi : int, default 90
        Pixels per inch.
    progress : bool, default True
        Show a progress bar.

    Raises
    ------
    LabError
        For another extension, an interval that the file cannot have, or where ffmpeg is missing or
        fails.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _WRITERS:
        raise LabError(f"cannot write {path}: the extension must be one of {', '.join(_WRITERS)}")
    _check_interval(suffix, interval)
    if suffix == ".mp4":
        require("imageio_ffmpeg", "video")  # before the work
    picture = _Picture(film, size, dpi)
    numbers = tqdm(range(len(film)), desc="frames", unit="frame", disable=not progress, leave=False)
    with atomic_path(path) as temporary:
        _WRITERS[suffix](picture, map(picture.frame, numbers), temporary, interval)


# %% [markdown]
# ## The animation of the original lab
# 16,000 to 16,200 Å, every other label at its training mean, metallicity from -1 to 0.5 in 200 frames of 50 ms. Written, and then judged by
# reading the file back: what a viewer gets, not what we meant to write.

# %%
def read_gif(path):
    "Frames (F, height, width, 3) and durations of a GIF."
    with Image.open(path) as image:
        frames = np.empty((image.n_frames, image.height, image.width, 3), np.uint8)
        durations = []
        for k in range(image.n_frames):
            image.seek(k)
            frames[k] = image.convert("RGB")
            durations.append(image.info["duration"])
        return frames, durations


with tempfile.TemporaryDirectory() as folder:
    write_film(metal_film, Path(folder) / "metals.gif", progress=False)
    frames, durations = read_gif(Path(folder) / "metals.gif")
print(f"{len(frames)} frames of {durations[0]} ms, {frames.shape[2]} x {frames.shape[1]} pixels")
assert len(frames) == 200 and set(durations) == {50}
assert all((a != b).any() for a, b in zip(frames, frames[1:]))
assert (frames[0] != frames[-1]).mean() > 0.02

# %% [markdown]
# How deep is a line *in the picture*? In the three pixel columns around an iron line, look for the lowest pixel of the curve's colour, and
# compare it with the lowest point of the model's spectrum there. It must sink from frame to frame and never rise.

# %%
blue = [int(_COLORS["flux"][i : i + 2], 16) for i in (1, 3, 5)]
deep = metal_film.wavelength[at_iron]
floor = int(picture.place(deep, picture.axes[0].get_ylim()[0])[0, 1])
columns = np.floor(picture.place(deep, 1.0)[:, 0]).astype(int)
# Frames, lines, rows above the floor, three columns, RGB.
strips = np.stack([frames[:, :floor, x - 1 : x + 2] for x in columns], axis=1).astype(int)
is_curve = (np.abs(strips - blue).sum(axis=-1) < 150).any(axis=-1)
rows = floor - 1 - is_curve[:, :, ::-1].argmax(axis=2)

# %%
fine = np.linspace(metal_film.wavelength[0], metal_film.wavelength[-1], 20_000)
in_columns = np.abs(picture.place(fine, 1.0)[:, 0] - columns[:, None] - 0.5) < 1.5
lowest = np.array(
    [
        [np.interp(fine[inside], metal_film.wavelength, flux).min() for inside in in_columns]
        for flux in metal_film.flux
    ]
)
expected = np.stack([picture.place(deep, flux)[:, 1] for flux in lowest])
error = rows - expected
print(f"drawn minus expected: {error.mean():+.1f} pixels on average, ", end="")
print(f"at most {np.abs(error).max():.1f}")

# %%
# The curve is where the model says, within its own thickness, …
assert np.abs(error).max() < 2.5
# … and sinks (an antialiased edge may flicker by one).
assert np.all(np.diff(rows, axis=0) >= -1)
assert np.all(rows[-1] - rows[0] > 10)
for drawn, model_depth in zip(rows.T, 1 - lowest.T):
    assert np.corrcoef(drawn, model_depth)[0, 1] > 0.99

# %% [markdown]
# The same arguments give the same bytes. An MP4 has the same number of frames and length, where ffmpeg is there; without the package, the error
# says how to get it.

# %%
short = film(model, metallicity, FROM, TO, 12)
with tempfile.TemporaryDirectory() as folder:
    for name in ("one.gif", "two.gif"):
        write_film(film(model, metallicity, FROM, TO, 12), Path(folder) / name, progress=False)
    assert (Path(folder) / "one.gif").read_bytes() == (Path(folder) / "two.gif").read_bytes()

# %%
with tempfile.TemporaryDirectory() as folder:
    if find_spec("imageio_ffmpeg"):
        path = Path(folder) / "short.mp4"
        write_film(short, path, interval=100, progress=False)
        ffmpeg = require("imageio_ffmpeg", "video")
        count, seconds = ffmpeg.count_frames_and_secs(str(path))
        assert count == 12 and abs(seconds - 1.2) < 0.11
    with (
        patch.dict("sys.modules", imageio_ffmpeg=None),
        pytest.raises(LabError, match=r"pip install 'stellar_lab\[video\]'"),
    ):
        write_film(short, Path(folder) / "none.mp4")
    assert not (Path(folder) / "none.mp4").exists()

# %% [markdown]
# ## The model is as it was
# The slip of the original lab, tested: after all these films the model has the fingerprint that it had, and draws a star as before.

# %%
assert fingerprint(model) == before
assert np.array_equal(model.predict(training_star), spectrum_before, equal_nan=True)

# %% [markdown]
# ## What goes wrong, said clearly

# %%
with pytest.raises(LabError, match="the model has no label 'COLOUR': choose from TEFF, LOGG"):
    film(model, "COLOUR", 0, 1)
message = (
    f"{metallicity} would go from -9 to 0. The training stars reach from .* choose a smaller range"
)
with pytest.raises(LabError, match=message):
    film(model, metallicity, -9, 0)
with pytest.raises(LabError, match="leaves the grid: the model reaches from 15168"):
    film(model, metallicity, FROM, TO, window=(14000, 15200))
with pytest.raises(LabError, match="0 frames: a film has at least one"):
    film(model, metallicity, FROM, TO, frames=0)

# %%
with pytest.raises(LabError, match=f"a label occurs twice in {metallicity}, {metallicity.lower()}"):
    film(model, metallicity, FROM, TO, fixed={metallicity.lower(): 0})
with pytest.raises(LabError, match="has no usable pixel"):
    film(model, metallicity, FROM, TO, window=(15800, 15850))  # between two chips
with pytest.raises(LabError, match="the extension must be one of .gif, .mp4, .html"):
    write_film(short, "film.avi")
with pytest.raises(LabError, match="a GIF counts in steps of 10 ms"):
    write_film(short, "film.gif", interval=33)

# %% [markdown]
# **Exercise.** On the giant branch the other labels move, too, so the spectrum changes by more than the slope in the second panel, which holds
# them fixed. Compute the slope *along the path*, $\sum_k \frac{\partial f}{\partial\ell_k}\frac{\mathrm d\ell_k}{\mathrm d\ell}$, from
# `model.derivative` and `np.gradient` of the film's labels, and check it against the difference of neighbouring frames. In which lines do the two
# differ most when the gravity moves, and why there?
