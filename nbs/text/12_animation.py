# %% [markdown]
# # How does a star change?
# > A model spectrum in motion: one label moves, the others stay or follow the giant branch, and the lines say what they are made of.
#
# **Question.** A model knows every star between those that it was taught. What would we see if we could turn a single knob, the metallicity say, and
# watch the spectrum?
#
# **Idea.** A film is a *path* through the space of labels. Its frames are the model's spectra along the path, and because the model is a
# polynomial, all of them are one
# matrix product,
# $$ F = V(\boldsymbol\ell_1 \dots \boldsymbol\ell_n)\,\Theta^\mathsf T , $$
# long before the first is drawn. Its slope $\partial f/\partial\ell$ is another product, and stands in a second panel: where the spectrum is
# about to move.
#
# You learn which lines of the H band belong to whom, how to ask the model whether that is true, how far a path may leave the stars that the model
# was taught, and how
# 200 pictures are drawn in a few seconds. You need the model of chapter 4.

# %%
#| default_exp animation

# %%
#| export
import base64
import hashlib
import html
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import astropy.units as u
import matplotlib.style
import numpy as np
from astropy.constants import Ryd, m_e, m_p
from astropy.table import QTable
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from tqdm import tqdm

from stellar_lab.cannon import Cannon
from stellar_lab.models import label_box, outside_training
from stellar_lab.survey import (
    LABELS,
    LOG10_STEP,
    LabError,
    air_to_vacuum,
    atomic_path,
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
from IPython.display import Markdown

from stellar_lab.models import train_test_rows
from stellar_lab.normalize import training_set
from stellar_lab.survey import archive_record, archive_root, use_style, wavelength

# %% [markdown]
# ## The model
# That of chapter 4: trained on two thirds of the archive's stars. The moving label will be the metallicity, under the name that the archive has
# for it.

# %%
use_style()
names = list(archive_record(archive_root()).labels)
spectra, _ = training_set(archive_root(), progress=False)
model = Cannon(scatter=True, labels=names).fit(spectra[train_test_rows(len(spectra))[0]])
metallicity = next(name for name in ("FE_H", "M_H") if name in names)
training = dict(zip(names, model.training_labels_.T))


# %% [markdown]
# The lab's animation changed the model: it wrote the moving label over the stored means. A model that has been looked at must still be the same,
# so we take its
# fingerprint now and compare at the end.

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
# giant of low gravity is cool, and it
# is hotter if it has few metals: labels of real stars go together. Following means: expect of the others what the training stars have, given the
# moving label and the given
# ones, by a quadratic regression over the training labels,
# $$ \ell_\mathrm{other} \approx \text{quadratic}(\ell_\mathrm{moving}, \ell_\mathrm{given}) . $$
# A parabola is stiff enough for a few hundred stars, and the branch is not more bent than that.
#
# How far may a path go? The polynomial answers anywhere, also where it was never taught. We use the two rules of the inversion: outside the
# *box*, a quarter of the training range beyond
# its ends, a path is refused; inside the box, but with a label beyond all training stars or further from them than they are from each other, its
# frames are *marked* as extrapolated.

# %%
#| export
def label_path(
    model: Cannon,
    moving: str,  # name of the label that moves, in any case
    low: float,
    high: float,  # from and to, physical units; high may be the smaller one
    frames: int = 200,
    fixed: Mapping = None,  # values of other labels
    others: str = "mean",  # labels that are not fixed: "mean" of training, or "branch", following the moving and the fixed ones
) -> np.ndarray:  # (F, K) labels, physical units
    "Labels of each frame. LabError for an unknown label, and where the path leaves the box that `infer` searches."
    place = _places(model, [moving, *(fixed or {})])
    if isinstance(frames, bool) or not isinstance(frames, (int, np.integer)) or frames < 1:
        raise LabError(f"{frames!r} frames: a film has at least one")
    if not np.isfinite([low, high]).all() or (low == high and frames > 1):
        raise LabError(
            f"{moving} from {low:g} to {high:g}: nothing moves; choose two different numbers"
        )
    if others not in ("mean", "branch"):
        raise LabError(
            f"others is {others!r}: choose 'mean' (of the training stars) or 'branch' (as the training stars have it)"
        )
    path = np.tile(model.training_labels_.mean(axis=0), (frames, 1))
    path[:, place] = [low, *(fixed or {}).values()]
    path[:, place[0]] = np.linspace(low, high, frames)
    free = np.setdiff1d(np.arange(path.shape[1]), place)
    if others == "branch" and len(free):
        training = model.training_labels_
        branch = make_pipeline(StandardScaler(), PolynomialFeatures(2), LinearRegression())
        path[:, free] = branch.fit(training[:, place], training[:, free]).predict(path[:, place])
    _check_box(model, path)
    return path


def _places(model, names):
    "Columns of labels by name, in any case; each once."
    known = {name.upper(): k for k, name in enumerate(model.label_names_)}
    unknown = [name for name in names if str(name).upper() not in known]
    if unknown:
        raise LabError(
            f"the model has no label {', '.join(map(repr, unknown))}: choose from {', '.join(model.label_names_)}"
        )
    places = [known[str(name).upper()] for name in names]
    if len(set(places)) < len(places):
        raise LabError(
            f"a label occurs twice in {', '.join(map(str, names))}: a label moves or is fixed, not both"
        )
    return places


def _check_box(model, path):
    box = np.array([model.unscale(bound) for bound in label_box(model)])
    out = ~((path >= box[0]) & (path <= box[1])).all(axis=0)
    if out.any():
        k = int(np.argmax(out))
        low, high = model.training_labels_[:, k].min(), model.training_labels_[:, k].max()
        raise LabError(
            f"{model.label_names_[k]} would go from {path[:, k].min():.4g} to {path[:, k].max():.4g}. The training stars reach from "
            f"{low:.4g} to {high:.4g}, and beyond {box[0, k]:.4g} to {box[1, k]:.4g} the model is not asked: "
            "choose a smaller range, or fix this label"
        )


# %% [markdown]
# Two paths up the giant branch, one for metal-rich and one for metal-poor stars, and what happens if the temperature does not follow.

# %%
def gravities(value):
    "Gravities of the training stars of about this metallicity, highest to lowest, without the outermost 5 %."
    return np.quantile(training["LOGG"][np.abs(training[metallicity] - value) < 0.25], [0.95, 0.05])


rich, poor = np.quantile(training[metallicity], [0.85, 0.3])
symbol = LABELS[metallicity].symbol
paths = {
    f"branch at {symbol} = {value:.2f}": label_path(
        model, "LOGG", *gravities(value), 50, {metallicity: value}, "branch"
    )
    for value in (rich, poor)
}
paths["all others at their mean"] = label_path(
    model, "LOGG", *np.quantile(training["LOGG"], [0.99, 0.01]), 50
)

# %%
fig, ax = plt.subplots(figsize=(6.5, 4))
stars = ax.scatter(training["TEFF"], training["LOGG"], 8, training[metallicity], cmap="viridis")
for (name, path), style in zip(paths.items(), ("-", "--", ":")):
    ax.plot(
        path[:, names.index("TEFF")],
        path[:, names.index("LOGG")],
        style,
        color="C3",
        lw=2,
        label=name,
    )
fig.colorbar(stars, label=LABELS[metallicity].axis)
ax.set(xlabel=LABELS["TEFF"].axis, ylabel=LABELS["LOGG"].axis)
ax.invert_xaxis(), ax.invert_yaxis()
ax.legend(frameon=False, fontsize=9);

# %%
#| echo: false
ends = np.quantile(training["LOGG"], [0.9, 0.1])
away = np.abs(
    label_path(model, "LOGG", *ends, 2, others="branch") - label_path(model, "LOGG", *ends, 2)
)[:, names.index("TEFF")]
Markdown(
    "**What to see.** Each branch runs through the training stars of its own colour. The dotted line leaves them at both ends: where a tenth "
    f"of the training stars have a higher gravity, and where a tenth have a lower one, its temperature is {away[0]:.0f} and {away[1]:.0f} K from "
    "what such stars have. A giant that changes its gravity and not its temperature is soon a star that does not exist."
)

# %% [markdown]
# The regression, checked on stars: it explains most of the temperature's spread. And on made-up labels that *are* quadratic in each other it must
# find them exactly.

# %%
both = model.scale(model.training_labels_)[:, [names.index("LOGG"), names.index(metallicity)]]
both = PolynomialFeatures(2).fit_transform(both)
slow = both @ np.linalg.lstsq(both, training["TEFF"])[0]
print(
    f"Teff scatters by {training['TEFF'].std():.0f} K among the training stars, by {np.std(training['TEFF'] - slow):.0f} K around the branch"
)
assert np.std(training["TEFF"] - slow) < 0.6 * training["TEFF"].std()

# %%
rng = np.random.default_rng(8)
g, m = rng.uniform(1, 3, 300), rng.uniform(-1, 0.3, 300)
bent = np.column_stack([4000 + 300 * g + 40 * g**2 - 200 * m * g, g, m])
exact = Cannon(order=1).fit(
    bent, rng.normal(1, 0.01, (300, 5)), label_names=["TEFF", "LOGG", "M_H"]
)
path = label_path(exact, "logg", 3, 1, 5, {"m_h": -0.5}, "branch")
assert np.allclose(
    path[:, 0], 4000 + 300 * path[:, 1] + 40 * path[:, 1] ** 2 + 100 * path[:, 1]
) and np.all(path[:, 2] == -0.5)
assert path[0, 1] == 3 and path[-1, 1] == 1  # a film may run backwards

# %% [markdown]
# ## Names for the lines
# Which line is which? A table of well-known strong lines, with the air wavelengths of [linemake](https://github.com/vmplacco/linemake)'s lists
# ([Placco et al. 2021](https://doi.org/10.3847/2515-5172/abf651)), among them those by which [Smith et al.
# 2013](https://doi.org/10.1088/0004-637X/765/1/16) measured abundances in
# APOGEE's first giants. For CO the wavelength is that of the *head*, where a band's lines crowd and turn back: the shortest wavelength of the
# band in the list.

# %%
#| export
AIR_LINES = {  # Angstrom in air; linemake (Placco et al. 2021)
    "Fe I": (
        15207.526,
        15294.560,
        15335.383,
        15394.673,
        15490.339,
        15531.752,
        15591.493,
        15621.654,
        15631.948,
        15648.510,
        15662.016,
        15692.747,
        15723.586,
        15769.423,
        15788.998,
        15818.142,
        15822.817,
        15868.524,
        15906.044,
        15920.645,
        15964.867,
        15980.728,
        16006.760,
        16009.611,
        16040.657,
        16102.411,
        16153.247,
        16165.032,
        16198.503,
        16292.843,
        16316.323,
        16324.452,
        16394.392,
        16398.170,
        16444.819,
        16486.669,
        16517.226,
        16561.767,
        16645.877,
        16665.484,
    ),
    "Mg I": (15740.716, 15748.988, 15765.842, 15879.567, 15886.183, 15954.477),
    "Al I": (15956.675, 15968.287, 16718.957, 16750.564, 16763.360),
    "Si I": (
        15361.161,
        15376.831,
        15557.779,
        15833.602,
        15884.454,
        15888.410,
        15960.063,
        16060.009,
        16094.787,
        16163.691,
        16215.670,
        16241.833,
        16380.177,
        16434.927,
        16680.770,
        16828.159,
    ),
    "K I": (15163.067, 15168.376),
    "Ca I": (16136.823, 16150.763, 16155.236, 16157.364, 16197.075, 16204.087),
    "Ti I": (15334.847, 15543.756, 15602.842, 15698.979, 15715.573, 16330.532),
    "V I": (15924.822,),
    "Cr I": (15680.063, 15860.214, 16015.323),
    "Mn I": (15157.848, 15217.793, 15262.702),
    "Ni I": (15555.421, 15632.654, 16310.504, 16364.188, 16589.294, 16815.470, 16867.369),
    "OH": (
        15278.525,
        15281.055,
        15407.294,
        15409.170,
        15558.017,
        15560.245,
        15568.782,
        15572.084,
        15719.695,
        15893.513,
        16052.766,
        16055.466,
        16069.525,
        16074.162,
        16190.142,
        16192.129,
        16204.077,
        16207.187,
        16352.213,
        16354.577,
        16364.593,
        16368.136,
        16523.498,
        16526.254,
        16534.582,
        16538.588,
        16714.359,
        16904.278,
        16909.289,
    ),
    "CO 3-0": (15577.376,),
    "CO 4-1": (15775.155,),
    "CO 5-2": (15977.502,),
    "CO 6-3": (16184.503,),
    "CO 7-4": (16396.329,),
    "CO 8-5": (16613.169,),
    "CO 9-6": (16835.141,),
}

# %% [markdown]
# APOGEE counts in vacuum. [Ciddor's formula](https://doi.org/10.1364/AO.35.001566) gives the refractive index of air, a few parts in ten
# thousand: 4.4 Å here, twenty pixels. Hydrogen needs no list:
# Rydberg's formula with the vacuum constant, corrected for the proton's motion, gives the Brackett series, the jumps from level 4 to $n$,
# $$ \frac1\lambda = \frac{R_\infty}{1 + m_e/m_p}\left(\frac1{4^2}-\frac1{n^2}\right). $$

# %%
#| export
BRACKETT = range(11, 17)  # upper levels whose lines lie in the H band and stand apart


def brackett(
    n,  # upper level
):
    "Vacuum wavelength [Angstrom] of hydrogen's line from level n to level 4 (Rydberg)."
    rydberg = (Ryd / (1 + m_e / m_p)).to_value(1 / u.AA)
    return 1 / (rydberg * (1 / 16 - 1 / np.square(n, dtype=float)))


def strong_lines() -> QTable:
    "Name, species, vacuum wavelength and source of well-known strong lines of the H band, by wavelength."
    rows = [
        (species, air_to_vacuum(air), "linemake (Placco et al. 2021)")
        for species, lines in AIR_LINES.items()
        for air in lines
    ]
    rows += [(f"Br {n}", brackett(n), "Rydberg") for n in BRACKETT]
    table = QTable(
        rows=sorted(rows, key=lambda row: row[1]),
        names=["species", "wavelength", "source"],
        units={"wavelength": u.AA},
    )
    table["wavelength"].info.format = ".2f"
    return table


# %%
lines = strong_lines()
assert (
    abs(brackett(11) - 16811.1) < 0.1 and abs(brackett(7) / 21661.2 - 1) < 1e-5
)  # Br gamma, in every textbook at 2.1661 micron
assert (
    abs(air_to_vacuum(15748.988) - 15753.29) < 0.02
    and abs(air_to_vacuum(16763.360) - 16767.94) < 0.02
)
lines[:5]

# %% [markdown]
# ### Is it true?
# A name above a spectrum is a claim, so we ask the model, which knows no line list at all. A line stays only if
#
# - the model's spectrum has a dip there: its minimum within one pixel of the wavelength, at least 3 % below the shoulders on either side, and
# - the dip deepens, by at least half a percent for one standard deviation, with a label that should know it: a metal with the metallicity or with
#   its own element where the model has one (Mg, Si; the
#   $\alpha$ elements Mg, Si, Ca, Ti, and O in OH; carbon in CO), a Brackett line with the temperature.
#
# Given several trial stars, a line keeps its name if it passes in one of them: OH shows in cool stars, hydrogen in hot ones. Hydrogen's lines are
# broad, so they are looked at through every third pixel.

# %%
#| export
LINE_LABELS = {  # species -> labels that deepen its lines, beside the metallicity
    "Mg I": ("MG_FE", "ALPHA_M"),
    "Si I": ("SI_FE", "ALPHA_M"),
    "Ca I": ("ALPHA_M",),
    "Ti I": ("ALPHA_M",),
    "OH": ("ALPHA_M",),
    "CO": ("C_M",),
    "Br": ("TEFF",),
}
MIN_DIP = 0.03  # below the shoulders
MIN_DEEPENING = 0.005  # for one standard deviation of a label
DIP_PIXELS, SHOULDERS = (
    1,
    6,
)  # the dip is at most so far from the wavelength, the shoulders at most so far
BROAD = 3  # hydrogen's lines are so many times wider


def check_lines(
    model: Cannon,
    labels: np.ndarray = None,  # (S, K) trial stars, physical units; by default one of mean training labels
    table: QTable = None,  # `strong_lines` or a table like it
) -> (
    QTable
):  # the lines on the model's grid, with `dip`, `offset` of the dip, `verdict` and `named`
    "Which lines does the model confirm?"
    grid, table = _grid(model), strong_lines() if table is None else table
    labels = np.atleast_2d(model.training_labels_.mean(axis=0) if labels is None else labels)
    wanted = table["wavelength"].to_value(u.AA)
    centre = np.searchsorted(grid * 10 ** (LOG10_STEP / 2), wanted).clip(0, len(grid) - 1)
    width = np.array([BROAD if name.startswith("Br") else 1 for name in table["species"]])[:, None]
    near = centre[:, None] + width * np.arange(-SHOULDERS, SHOULDERS + 1)
    inside = near.clip(0, len(grid) - 1)
    whole = (
        (near == inside)
        & (np.abs(np.log10(grid[inside] / wanted[:, None])) < (SHOULDERS + 1) * width * LOG10_STEP)
    ).all(axis=1)
    table, inside = table[whole], inside[whole]
    place, dip = _dips(model.predict(labels)[:, inside])
    pixel = inside[np.arange(len(table)), place]  # (S, L)
    deepening = _deepening(model, labels, pixel, table["species"])
    good = (dip >= MIN_DIP) & (deepening >= MIN_DEEPENING)
    star = (dip + good).argmax(axis=0)  # the one where it passes, and is deepest
    pixel, dip, named = (part[star, np.arange(len(table))] for part in (pixel, dip, good))
    table["dip"], table["offset"], table["named"] = dip, (grid[pixel] - wanted[whole]) * u.AA, named
    table["verdict"] = np.where(
        named, "named", np.where(dip < MIN_DIP, "no dip", "does not deepen")
    )
    table["dip"].info.format, table["offset"].info.format = ".3f", "+.2f"
    return table


def _grid(model):
    if model.wavelength_ is None:
        raise LabError(
            "the model does not know its wavelengths: fit it to a Spectra, or give wavelength= to fit"
        )
    return model.wavelength_


def _dips(
    flux,
):  # (S, L, R): around each line; returns the place of the dip in R and its depth below the lower shoulder, both (S, L)
    middle = flux.shape[2] // 2
    place = (
        middle
        - DIP_PIXELS
        + np.where(np.isfinite(flux), flux, np.inf)[
            :, :, middle - DIP_PIXELS : middle + DIP_PIXELS + 1
        ].argmin(axis=2)
    )
    lowest, *beside = (
        np.take_along_axis(flux, place[..., None] + side, axis=2)[..., 0] for side in (0, -1, 1)
    )
    shoulder = np.minimum(
        flux[:, :, : middle - DIP_PIXELS].max(axis=2),
        flux[:, :, middle + DIP_PIXELS + 1 :].max(axis=2),
    )
    return place, np.where(
        np.minimum(*beside) >= lowest, np.nan_to_num(shoulder - lowest), 0
    )  # NaN is no dip


def _deepening(model, labels, pixel, species):  # (S, L)
    "How much each line deepens with one training standard deviation of the label that knows it best; 0 where no label does."
    slopes = (
        np.array([model.derivative(star)[0][:, p] for star, p in zip(labels, pixel)])
        * model.scales_[:, None]
    )  # (S, K, L)
    knows = np.array(
        [[name in _judges(kind) for kind in species] for name in model.label_names_]
    ).reshape(len(model.label_names_), len(species))
    return np.where(knows, -np.nan_to_num(slopes), 0).max(axis=1)


def _judges(species):
    kind = species.split()[0] if species.startswith(("CO", "Br")) else species
    return LINE_LABELS.get(kind, ()) + (() if kind == "Br" else ("FE_H", "M_H"))


# %% [markdown]
# Asked at three stars of mean labels but metallicities from -1 to 0.5. Then two counter-questions: how many *random* wavelengths would pass, and
# how many of the lines if we had forgotten to go to vacuum?

# %%
FROM, TO = -1.0, 0.5
trial = label_path(model, metallicity, FROM, TO, 3)
checked = check_lines(model, trial)
rng = np.random.default_rng(8)
metals = strong_lines()[
    [not name.startswith(("Br", "CO", "OH")) for name in strong_lines()["species"]]
]
random, air = metals.copy(), metals.copy()
random["wavelength"] = rng.uniform(wavelength[0], wavelength[-1], len(metals)) * u.AA
air["wavelength"] = metals["wavelength"] ** 2 / air_to_vacuum(metals["wavelength"].value) / u.AA
share = {
    name: check_lines(model, trial, table)["named"].mean()
    for name, table in (("true", metals), ("random", random), ("air", air))
}

# %%
#| echo: false
named = checked[checked["named"]]
dropped = "; ".join(
    f"{row['species']} {row['wavelength'].value:.0f} ({row['verdict']})"
    for row in checked
    if not row["named"]
)
Markdown(
    f"**What to see.** {len(named)} of {len(checked)} lines may keep their names; of the atomic ones {share['true']:.0%}, of as many random "
    f"wavelengths {share['random']:.0%} (the H band of a giant is full of lines, so chance finds a dip), at their wavelengths in air "
    f"{share['air']:.0%}. The dips of the named lines lie {np.median(named['offset'].value):+.2f} Å from the table at the median, where a pixel is "
    f"0.22 Å. Dropped: {dropped}."
)

# %%
assert share["true"] > 0.75 and max(share["random"], share["air"]) < 0.75 * share["true"]
assert abs(np.median(named["offset"].value)) < 0.1 and len(named) > 0.6 * len(checked)

# %% [markdown]
# And on a made-up model where we know: lines that deepen with the metallicity at three wavelengths of the table, one that fades instead, nothing
# elsewhere. Exactly the three may keep their names.

# %%
true, fading = ["Fe I 16045", "Al I 16755", "Mn I 15222"], "Fe I 16169"
where = {
    f"{row['species']} {row['wavelength'].value:.0f}": row["wavelength"].value
    for row in strong_lines()
}
profile = {name: np.exp(-0.5 * ((wavelength - where[name]) / 0.4) ** 2) for name in (*true, fading)}
feh = np.linspace(-1, 0.5, 40)[:, None]
flux = 1 - sum(
    (0.2 + 0.1 * feh * (-1 if name == fading else 1)) * profile[name] for name in profile
)
toy = Cannon(order=1).fit(feh, flux, label_names=["FE_H"], wavelength=wavelength)
verdict = check_lines(toy)
assert {
    f"{row['species']} {row['wavelength'].value:.0f}" for row in verdict[verdict["named"]]
} == set(true)
assert (
    verdict["verdict"][np.abs(verdict["wavelength"].value - where[fading]).argmin()]
    == "does not deepen"
)

# %% [markdown]
# ## A film
# `film` puts it together: the path, all spectra by one `predict`, the slope with respect to the moving label, which frames are extrapolated, and
# the lines that the model confirms in the first, the
# middle or the last frame. It only reads the model.

# %%
#| export
LAB_WINDOW = (16000.0, 16200.0)  # Angstrom, the lab's


@dataclass(frozen=True)
class Film:
    "Spectra along a path of labels: F frames, P pixels."

    moving: str  # name of the label that moves
    label_names: tuple  # K names
    labels: np.ndarray  # (F, K) physical units
    wavelength: np.ndarray  # (P,) [Angstrom, vacuum]
    flux: np.ndarray  # (F, P) relative to the continuum
    slope: np.ndarray  # (F, P) partial derivative with respect to the moving label, per unit of it
    outside: np.ndarray  # (F,) bool: extrapolated, a label beyond all training stars or all labels far from any of them
    reference: np.ndarray  # (P,) spectrum at the mean training labels
    lines: QTable  # confirmed lines in the window, the deepest dip first

    def __len__(self):
        return len(self.labels)

    @property
    def values(self) -> np.ndarray:
        "The moving label (F,)."
        return self.labels[:, self.label_names.index(self.moving)]


def film(
    model: Cannon,
    moving: str,  # name of the label that moves
    low: float,
    high: float,  # from and to, physical units
    frames: int = 200,
    window: tuple = LAB_WINDOW,  # (low, high) [Angstrom, vacuum], or None for the whole grid
    fixed: Mapping = None,  # values of other labels
    others: str = "mean",  # labels that are not fixed: "mean" of training, or "branch", following the moving and the fixed ones
) -> Film:
    "Model spectra while one label moves. The model is not changed."
    labels = label_path(model, moving, low, high, frames, fixed, others)
    k, inside = _places(model, [moving])[0], _pixels(model, window)
    mean = model.training_labels_.mean(axis=0, keepdims=True)
    lines = check_lines(model, labels[[0, len(labels) // 2, -1]])
    grid = model.wavelength_[inside]
    shown = (
        lines["named"]
        & (lines["wavelength"] > grid[0] * u.AA)
        & (lines["wavelength"] < grid[-1] * u.AA)
    )
    lines = lines[shown]
    lines.sort("dip", reverse=True)
    slope = [
        model.derivative(part)[:, k, inside]
        for part in np.array_split(labels, -(-len(labels) // 32))
    ]  # in parts: it comes for all labels
    return Film(
        model.label_names_[k],
        model.label_names_,
        labels,
        grid,
        model.predict(labels)[:, inside],
        np.concatenate(slope),
        _extrapolated(model, labels),
        model.predict(mean)[0, inside],
        lines,
    )


def _extrapolated(model, labels):
    "Frames (F,) with a label beyond all training stars, or further from them than any of them is from the others."
    training = model.training_labels_
    beyond = (labels < training.min(axis=0)) | (labels > training.max(axis=0))
    return outside_training(model, model.scale(labels)) | beyond.any(axis=1)


def _pixels(model, window):
    "Pixels of the window (bool)."
    grid = _grid(model)
    if window is None:
        return np.ones(len(grid), dtype=bool)
    low, high = window
    inside = (grid >= low) & (grid <= high)
    if low < grid[0] or high > grid[-1] or not inside[model.usable_].any():
        problem = (
            "has no usable pixel" if low >= grid[0] and high <= grid[-1] else "leaves the grid"
        )
        raise LabError(
            f"the window from {low:g} to {high:g} Angstrom {problem}: the model reaches from {grid[0]:.1f} to {grid[-1]:.1f}, "
            "with gaps between the chips; give (low, high) inside"
        )
    return inside


# %%
lab_film = film(model, metallicity, FROM, TO)
assert lab_film.flux.shape == (200, len(lab_film.wavelength)) and lab_film.values[
    [0, -1]
].tolist() == [FROM, TO]
in_window = np.isin(wavelength, lab_film.wavelength)
assert np.allclose(
    lab_film.flux[7], model.predict(lab_film.labels[7])[0, in_window], equal_nan=True
)  # a frame is a spectrum of the model
still = np.delete(lab_film.labels, names.index(metallicity), axis=1)
assert np.ptp(still, axis=0).max() == 0 and np.allclose(
    still[0], np.delete(model.training_labels_.mean(axis=0), names.index(metallicity))
)

# %% [markdown]
# More metals, deeper lines: at each confirmed iron line the flux must fall from frame to frame. And the slope panel must be what finite
# differences between frames say. (A quadratic model makes the central difference
# exact, up to rounding.)

# %%
iron = lab_film.lines[lab_film.lines["species"] == "Fe I"]
at_iron = np.abs(lab_film.wavelength[:, None] - (iron["wavelength"] + iron["offset"]).value).argmin(
    axis=0
)
depth = 1 - lab_film.flux[:, at_iron]
assert len(iron) >= 4 and np.all(np.diff(depth, axis=0) > 0)
between = (lab_film.flux[2:] - lab_film.flux[:-2]) / (lab_film.values[2:] - lab_film.values[:-2])[
    :, None
]
assert np.allclose(between, lab_film.slope[1:-1], atol=1e-9, equal_nan=True)

# %%
fig, ax = plt.subplots(figsize=(6.5, 3.2))
for row, curve in zip(iron, depth.T):
    ax.plot(lab_film.values, curve, label=f"Fe I {row['wavelength'].value:.1f}")
ax.axvspan(training[metallicity].max(), TO, color="0.9") if TO > training[
    metallicity
].max() else None
ax.set(xlabel=LABELS[metallicity].axis, ylabel="depth of the line")
ax.legend(frameon=False, fontsize=8);

# %% [markdown]
# **What to see.** Iron lines grow with the metallicity, steadily. (Grey: beyond the most metal-rich training star.)
#
# ## Drawing fast
# Most of a picture never changes: axes, ticks, names, the spectrum at the mean labels in grey. It is drawn once and kept. For each frame the
# background is put back and only the two curves and the title are drawn over it; the
# pixels go from the canvas to Pillow without a file between. That is *blitting*, and makes a frame take some ten milliseconds instead of a hundred.
#
# Limits of the axes are those of the whole film, so that it is the spectrum that moves and not the picture. Names are thinned where they would
# overlap: the deeper line keeps its own.

# %%
#| export
FILM_STYLE = {
    "font.size": 10,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.1,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
COLORS = {
    "flux": "#0173b2",
    "slope": "#d55e00",
    "mark": "#d55e00",
}  # colour-blind safe, as everywhere
NAME_ROOM = 13  # points that a name needs along the wavelength


class Picture:
    "Draws a film's frames: the spectrum under its line names, the slope below, the moving value in the title."

    def __init__(self, film: Film, size: tuple = (9, 4.8), dpi: int = 90):
        self.film = film
        with matplotlib.style.context(
            ["default", FILM_STYLE]
        ):  # whatever style the session has: the same pictures
            self.figure = Figure(figsize=size, dpi=dpi, layout="constrained")
            self.canvas = FigureCanvasAgg(self.figure)
            self.axes = self.figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
            self._draw_still()
            self._background = self.canvas.copy_from_bbox(self.figure.bbox)

    def _draw_still(self):
        film, (top, bottom), unit = self.film, self.axes, _slope_unit(self.film.moving)
        plot_spectrum(film.wavelength, film.reference, ax=top, color="0.75", lw=0.8)
        self.flux = plot_spectrum(
            film.wavelength, film.flux[0], ax=top, color=COLORS["flux"], lw=1.1
        ).lines[-1]
        bottom.axhline(0, color="0.8", lw=0.8)
        self.slope = plot_spectrum(
            film.wavelength, film.slope[0] * unit[0], ax=bottom, color=COLORS["slope"], lw=1.0
        ).lines[-1]
        top.set(
            xlabel="",
            ylabel="flux / continuum",
            ylim=_limits(np.vstack([film.flux, film.reference]), above=0.36),
        )
        symbol = LABELS[film.moving].symbol if film.moving in LABELS else film.moving
        bottom.set(
            ylabel=f"slope with {symbol}\n{unit[1]}", ylim=_limits(film.slope * unit[0], above=0.05)
        )
        self.figure.text(
            0.005, 0.01, "grey: the mean of the training stars", fontsize=8, color="0.45"
        )
        self.title = top.set_title(" ", loc="left", fontsize=13)
        self.aside = top.set_title(" ", loc="right", fontsize=9, color="0.35")
        self.mark = self.figure.text(
            0.995,
            0.01,
            "outside the training stars: extrapolated",
            ha="right",
            fontsize=9,
            color=COLORS["mark"],
        )
        self._moving = [
            (top, self.flux),
            (bottom, self.slope),
            (top, self.title),
            (top, self.aside),
            (self.figure, self.mark),
        ]
        self.canvas.draw()
        self.names = self._name_lines(top)
        self.figure.set_layout_engine("none")
        for _, artist in self._moving:
            artist.set_animated(True)
        self.canvas.draw()

    def _name_lines(self, ax):
        "Writes the names that have room; returns their rows of the film's table."
        per_point = np.ptp(ax.get_xlim()) / (
            ax.get_window_extent().width * 72 / self.figure.dpi
        )  # Angstrom
        placed = []
        for row in self.film.lines:
            x = row["wavelength"].to_value(u.AA)
            if all(
                abs(x - other["wavelength"].to_value(u.AA)) > NAME_ROOM * per_point
                for other in placed
            ):
                placed.append(row)
                ax.plot(
                    [x, x], [0.75, 0.79], transform=ax.get_xaxis_transform(), color="0.5", lw=0.7
                )
                ax.text(
                    x,
                    0.80,
                    row["species"],
                    transform=ax.get_xaxis_transform(),
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=8,
                )
        return placed

    def titles(self, k: int) -> tuple:
        "The moving value of frame `k`, and the values of the other labels, as text."
        film = self.film
        step = abs(film.values[-1] - film.values[0]) / max(len(film) - 1, 1)
        digits = max(
            0 if _kelvin(film.moving) else 2, int(np.ceil(-np.log10(step))) if step else 0
        )  # so that no two frames have the same title
        rest = [
            _value(name, value)
            for name, value in zip(film.label_names, film.labels[k])
            if name != film.moving
        ]
        return _value(film.moving, film.values[k], digits), "  ".join(rest)

    def frame(self, k: int) -> np.ndarray:  # (height, width, 3) uint8
        "Frame `k` as RGB."
        self.canvas.restore_region(self._background)
        for line, values in (
            (self.flux, self.film.flux[k]),
            (self.slope, self.film.slope[k] * _slope_unit(self.film.moving)[0]),
        ):
            y = np.full(len(line.get_xdata()), np.nan)
            y[~np.isnan(line.get_xdata())] = values  # NaN breaks the line between the chips
            line.set_ydata(y)
        for text, words in zip((self.title, self.aside), self.titles(k)):
            text.set_text(words)
        self.mark.set_visible(bool(self.film.outside[k]))
        for parent, artist in self._moving:
            parent.draw_artist(artist)
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()

    def place(
        self, wavelength, flux
    ) -> np.ndarray:  # (N, 2) column and row, counted from the upper left corner
        "Where points of the upper panel are in a frame."
        x, y = (
            self.axes[0]
            .transData.transform(np.column_stack(np.broadcast_arrays(wavelength, flux)))
            .T
        )
        return np.column_stack([x, self.canvas.get_width_height()[1] - y])


def _kelvin(name):
    return name in LABELS and LABELS[name].unit == u.K


def _slope_unit(name):
    "Factor and text: a kelvin is too little to see."
    return (100, "per 100 K") if _kelvin(name) else (1, "per dex" if name in LABELS else "per unit")


def _value(name, value, digits=None):
    label = LABELS.get(name)
    if _kelvin(name):
        return f"{label.symbol} = {value:.{digits or 0}f} K"
    return f"{label.symbol if label else name} = {value:.{2 if digits is None else digits}f}"


def _limits(values, above):
    low, high = np.nanmin(values), np.nanmax(values)
    span = max(high - low, 1e-6)
    return low - 0.05 * span, high + above * span


# %%
picture = Picture(lab_film)
fig, axes = plt.subplots(2, 1, figsize=(8.5, 9), dpi=72)
for ax, k in zip(axes, (0, len(lab_film) - 1)):
    ax.imshow(picture.frame(k))
    ax.set_axis_off()

# %%
#| echo: false
bump, branch_bump = (
    np.nanmax(lab_film.flux),
    np.nanmax(film(model, metallicity, FROM, TO, 30, others="branch").flux),
)
end = (
    "At the very end the film says so itself: no training star is that metal-rich."
    if lab_film.outside[-1]
    else ""
)
Markdown(
    f"**What to see.** The named lines deepen, and so do hundreds without a name. At the end the flux climbs to {bump:.2f} in places, and no "
    "absorption does that: of stars as metal-rich as this and in all else like the average of all training stars the model has seen hardly any, so the "
    f"polynomial leans on few. On the branch, where the other labels follow, the highest flux is {branch_bump:.2f}. {end}"
)

# %% [markdown]
# Blitting must not change the picture: a frame is the same to the pixel after many others as from a fresh start, and equal to matplotlib's own
# full drawing of the same artists. What has moved must be gone.

# %%
first = picture.frame(0)
assert np.array_equal(first, Picture(lab_film).frame(0)) and not np.array_equal(
    first, picture.frame(199)
)
picture.frame(120)
for _, artist in picture._moving:
    artist.set_animated(False)
picture.canvas.draw()
whole = np.asarray(picture.canvas.buffer_rgba())[..., :3].astype(int)
picture = Picture(lab_film)
different = (np.abs(whole - picture.frame(120)) > 8).any(
    axis=2
)  # curves lie over the frame of the axes here, under it there
assert different.mean() < 0.002

# %%
assert picture.titles(0)[0] == f"{LABELS[metallicity].symbol} = -1.000" and picture.titles(199)[
    0
].endswith("= 0.500")
assert len({picture.titles(k)[0] for k in range(200)}) == 200  # every frame has a title of its own

# %% [markdown]
# ## A file
# A GIF by Pillow, always: one palette for the whole film, so that nothing flickers, and a comment that says what it shows and from which training
# set. MP4 where ffmpeg is there
# (the package `imageio-ffmpeg` brings one; the extra `video`): a tenth of the size. And `.html`, a page with a player that needs nothing but a
# browser. All through a temporary name, so that a film is
# there whole or not at all. A GIF counts time in hundredths of a second, and browsers slow down what is faster than 50 frames a second; other
# intervals are refused rather than rounded.

# %%
#| export
GIF_COLORS = 64


def write_film(
    film: Film,
    path,  # .gif, .mp4 or .html
    interval: float = 50,  # milliseconds a frame
    size: tuple = (9, 4.8),
    dpi: int = 90,  # inches, and pixels per inch
    progress: bool = True,
):
    "Draw a film into a file. The same film, versions and arguments give the same bytes."
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise LabError(f"cannot write {path}: the extension must be one of {', '.join(WRITERS)}")
    if not np.isfinite(interval) or interval <= 0:
        raise LabError(
            f"an interval of {interval} ms: give the milliseconds that a frame stays, above 0"
        )
    if suffix == ".gif" and (interval < 20 or interval % 10):
        raise LabError(
            f"an interval of {interval} ms: a GIF counts in steps of 10 ms and is not shown faster than 20; choose 20, 30, 40, …"
        )
    if suffix == ".mp4":
        require("imageio_ffmpeg", "video")
    picture = Picture(film, size, dpi)
    frames = (
        picture.frame(k)
        for k in tqdm(
            range(len(film)), desc="frames", unit="frame", disable=not progress, leave=False
        )
    )
    with atomic_path(path) as temporary:
        WRITERS[suffix](picture, frames, temporary, interval)


def _write_gif(picture, frames, path, interval):
    film = picture.film
    palette = _palette(picture)
    indexed = (
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    )
    comment = f"{film.moving} from {film.values[0]:g} to {film.values[-1]:g}, {film.wavelength[0]:.1f} to {film.wavelength[-1]:.1f} Angstrom"
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


def _palette(picture):
    "An image that carries the colours of the first, middle and last frame; its white is white."
    sample = np.vstack(
        [picture.frame(k) for k in (0, len(picture.film) // 2, len(picture.film) - 1)]
    )
    palette = Image.fromarray(sample).quantize(GIF_COLORS, Image.Quantize.MEDIANCUT)
    colors = np.array(palette.getpalette()).reshape(-1, 3)
    colors[colors.min(axis=1) > 240] = 255
    palette.putpalette(colors.ravel().tolist())
    return palette


def _write_mp4(picture, frames, path, interval):
    ffmpeg = require("imageio_ffmpeg", "video")
    width, height = (
        side // 2 * 2 for side in picture.canvas.get_width_height()
    )  # the codec wants even sides
    try:
        video = ffmpeg.write_frames(
            str(path),
            (width, height),
            fps=1000 / interval,
            codec="libx264",
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=[
                "-movflags",
                "+faststart",
                "-fflags",
                "+bitexact",
                "-flags:v",
                "+bitexact",
                "-threads",
                "1",
            ],
        )
        video.send(None)
        for frame in frames:
            video.send(np.ascontiguousarray(frame[:height, :width]))
        video.close()
    except (OSError, RuntimeError) as error:
        raise LabError(
            f"ffmpeg could not write the film ({str(error).strip()[:300]}): write a .gif instead, or let IMAGEIO_FFMPEG_EXE name "
            "another ffmpeg"
        ) from error


# %% [markdown]
# The player is a picture, a button and a slider; its frames are PNGs written into the page, and its script is a dozen lines. Where scripts do not
# run, the first frame stays.

# %%
#| export
PLAYER = """<figure id="{id}" class="film" style="margin: 0; max-width: {width}px">
<img src="data:image/png;base64,{first}" alt="{alt}" style="width: 100%; display: block">
<div style="display: flex; gap: 0.6em; align-items: center"><button type="button">play</button>
<input type="range" min="0" max="{last}" value="0" aria-label="frame" style="flex: 1"></div>
<script>(function () {{
  const root = document.getElementById("{id}"), frames = {frames}, interval = {interval};
  const image = root.querySelector("img"), button = root.querySelector("button"), slider = root.querySelector("input");
  let timer = null;
  function show(k) {{ slider.value = k; image.src = "data:image/png;base64," + frames[k]; }}
  function stop() {{ clearInterval(timer); timer = null; button.textContent = "play"; }}
  function step() {{ if (document.body.contains(root)) show((Number(slider.value) + 1) % frames.length); else stop(); }}
  button.onclick = function () {{ if (timer) stop(); else {{ timer = setInterval(step, interval); button.textContent = "pause"; }} }};
  slider.oninput = function () {{ stop(); show(Number(slider.value)); }};
}})();</script></figure>"""


@dataclass(frozen=True)
class Player:
    "HTML that plays a film; a notebook shows it."

    html: str

    def __repr__(self):
        return f"<Player: {len(self.html) / 1e6:.1f} MB of HTML>"

    def _repr_html_(self):
        return self.html


def player(
    film: Film,
    interval: float = 100,  # milliseconds a frame
    size: tuple = (7, 4),
    dpi: int = 70,
) -> Player:
    "A player for a notebook. It holds each frame, so make few: 30 of the usual size take half a megabyte."
    picture = Picture(film, size, dpi)
    return Player(_player_html(picture, (picture.frame(k) for k in range(len(film))), interval))


def _player_html(picture, frames, interval):
    palette = _palette(picture)
    encoded = [base64.b64encode(_png(frame, palette)).decode() for frame in frames]
    names = picture.titles(0)[0], picture.titles(len(picture.film) - 1)[0]
    digest = hashlib.sha256("".join(encoded).encode()).hexdigest()[:12]
    return PLAYER.format(
        id=f"film-{digest}",
        width=picture.canvas.get_width_height()[0],
        first=encoded[0],
        last=len(encoded) - 1,
        interval=f"{interval:g}",
        frames=json.dumps(encoded),
        alt=html.escape(f"model spectrum, from {names[0]} to {names[1]}"),
    )


def _png(frame, palette):
    file = io.BytesIO()
    Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE).save(
        file, format="PNG", optimize=True
    )
    return file.getvalue()


def _write_html(picture, frames, path, interval):
    title = html.escape(
        f"{picture.film.moving} from {picture.film.values[0]:g} to {picture.film.values[-1]:g}"
    )
    head = f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head><body>\n'
    Path(path).write_text(
        f"{head}{_player_html(picture, frames, interval)}\n</body></html>\n", encoding="utf-8"
    )


WRITERS = {".gif": _write_gif, ".mp4": _write_mp4, ".html": _write_html}

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
# ## The lab's animation
# 16,000 to 16,200 Å, every other label at its training mean, metallicity from -1 to 0.5 in 200 frames of 50 ms. Written, and then judged by
# reading the file back: what a viewer gets, not what we meant to write.

# %%
def read_gif(path):
    "Frames (F, height, width, 3) and durations of a GIF."
    with Image.open(path) as image:
        frames, durations = np.empty((image.n_frames, image.height, image.width, 3), np.uint8), []
        for k in range(image.n_frames):
            image.seek(k)
            frames[k] = image.convert("RGB")
            durations.append(image.info["duration"])
        return frames, durations


with tempfile.TemporaryDirectory() as folder:
    write_film(lab_film, Path(folder) / "lab.gif", progress=False)
    frames, durations = read_gif(Path(folder) / "lab.gif")
assert len(frames) == 200 and set(durations) == {50}
assert (
    all((a != b).any() for a, b in zip(frames, frames[1:]))
    and (frames[0] != frames[-1]).mean() > 0.02
)

# %% [markdown]
# How deep is a line *in the picture*? In the three pixel columns around an iron line, look for the lowest pixel of the curve's colour, and
# compare it with the lowest point of the model's spectrum there.
# It must sink from frame to frame and never rise.

# %%
blue = [int(COLORS["flux"][i : i + 2], 16) for i in (1, 3, 5)]
floor = int(
    picture.place(deep := lab_film.wavelength[at_iron], picture.axes[0].get_ylim()[0])[0, 1]
)
columns = np.floor(picture.place(deep, 1.0)[:, 0]).astype(int)
strips = np.stack([frames[:, :floor, x - 1 : x + 2] for x in columns], axis=1).astype(
    int
)  # (F, L, height, 3 columns, RGB)
is_curve = (np.abs(strips - blue).sum(axis=-1) < 150).any(axis=-1)
rows = floor - 1 - is_curve[:, :, ::-1].argmax(axis=2)

# %%
fine = np.linspace(lab_film.wavelength[0], lab_film.wavelength[-1], 20_000)
in_columns = np.abs(picture.place(fine, 1.0)[:, 0] - columns[:, None] - 0.5) < 1.5
lowest = np.array(
    [
        [np.interp(fine[inside], lab_film.wavelength, flux).min() for inside in in_columns]
        for flux in lab_film.flux
    ]
)
expected = np.stack([picture.place(deep, flux)[:, 1] for flux in lowest])
print(
    f"drawn minus expected: {np.mean(rows - expected):+.1f} pixels on average, at most {np.abs(rows - expected).max():.1f}"
)

# %%
assert (
    np.abs(rows - expected).max() < 2.5
)  # the curve is where the model says, within its own thickness
assert np.all(np.diff(rows, axis=0) >= -1) and np.all(
    rows[-1] - rows[0] > 10
)  # and sinks (an antialiased edge may flicker by one)
assert all(
    np.corrcoef(drawn, model_depth)[0, 1] > 0.99 for drawn, model_depth in zip(rows.T, 1 - lowest.T)
)

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
        write_film(short, Path(folder) / "short.mp4", interval=100, progress=False)
        count, seconds = require("imageio_ffmpeg", "video").count_frames_and_secs(
            str(Path(folder) / "short.mp4")
        )
        assert count == 12 and abs(seconds - 1.2) < 0.11
    with (
        patch.dict("sys.modules", imageio_ffmpeg=None),
        pytest.raises(LabError, match=r"pip install 'stellar_lab\[video\]'"),
    ):
        write_film(short, Path(folder) / "none.mp4")
    assert not (Path(folder) / "none.mp4").exists()

# %% [markdown]
# ## The model is as it was
# The lab's slip, tested: after all these films the model has the fingerprint that it had, and draws a star as before.

# %%
assert fingerprint(model) == before
assert np.array_equal(model.predict(training_star), spectrum_before, equal_nan=True)

# %% [markdown]
# ## What goes wrong, said clearly

# %%
with pytest.raises(LabError, match="the model has no label 'COLOUR': choose from TEFF, LOGG"):
    film(model, "COLOUR", 0, 1)
with pytest.raises(
    LabError,
    match=f"{metallicity} would go from -9 to 0. The training stars reach from .* choose a smaller range",
):
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
