# %% [markdown]
# # A survey whose truth is known
# > Some thousand synthetic giants of four fields, with all that makes a survey hard, in the survey's own files, and the answers in a sealed envelope.
#
# **Question.** A model's labels differ from the catalogue's by 75 K. Whose fault is it: the model's, the noise's, the continuum's, or the catalogue's own? On the sky nobody can
# say. We need an archive that looks like the survey's, where we know every star's true labels, and every error that was put in.
#
# **Idea.** Make the stars as the Galaxy makes them, and observe them as the survey does:
# $$ \underbrace{p(\mathrm{age},[\mathrm{Fe/H}],[\alpha/\mathrm{Fe}])}_{\text{two discs}} \;\to\; \underbrace{p(m)\,L_H^{\,\beta}}_{\text{isochrone}} \;\to\;
#    \underbrace{f(\lambda)}_{\text{emulator}} \;\to\; \underbrace{f + \sigma\,n,\ \text{mask}}_{\text{instrument}} ,\qquad
#    \underbrace{\ell_\mathrm{cat} = \ell + t(\ell) + \sigma_\ell\,n}_{\text{catalogue}} . $$
# The spectra come from [the emulator](B_emulator.ipynb), the files from [the chapter on archives](A_archives.ipynb); this chapter makes the stars between them. What the
# labels do not say, we hide in the spectra: carbon and nitrogen, turbulence, the width of the fibre's profile, a dwarf here and there, a companion.

# %%
#| default_exp mock

# %%
#| export
from functools import cache
from typing import NamedTuple

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.table import Table
from scipy import constants
from scipy.ndimage import map_coordinates
from scipy.stats import truncnorm

from stellar_lab.archives import ArchiveSummary, black_body, write_archive
from stellar_lab.clean import apply_cuts
from stellar_lab.emulator import GRID_LABELS, Emulator, label_matrix, usual_vmicro
from stellar_lab.isochrones import shipped_isochrones, total_metallicity
from stellar_lab.survey import (
    CHIPS,
    LABELS,
    LOG10_STEP,
    PIXMASK,
    LabError,
    Spectra,
    full_wavelength,
    on_band,
    wavelength,
)

# %%
#| hide
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from IPython.display import Markdown

from stellar_lab.archives import tree_digest
from stellar_lab.cannon import Cannon
from stellar_lab.clean import read_archive
from stellar_lab.survey import ARCHIVES, plot_spectrum, read_truth, real_data, use_style

# %%
#| hide
use_style()


# %% [markdown]
# ## Who lives there
# The Galaxy's disc has two sequences: an older one rich in alpha elements, and a younger one that is poor in them. A few stars are metal-poor.

# %%
#| export
class _Sequence(NamedTuple):
    "Stars of one origin."

    share: float
    mean: float  # [Fe/H]
    spread: float
    ages: tuple  # Gyr, from and to
    alpha: float  # [alpha/Fe] at [Fe/H] = 0
    slope: float  # of [alpha/Fe] with [Fe/H]
    limits: tuple  # of [alpha/Fe]


_SEQUENCES = {
    "alpha-poor": _Sequence(0.65, -0.11, 0.22, (1.2, 8.0), 0.05, -0.16, (-0.03, 0.18)),
    "alpha-rich": _Sequence(0.32, -0.50, 0.25, (8.0, 13.0), 0.13, -0.22, (0.03, 0.30)),
    "metal-poor": _Sequence(0.03, -1.00, 0.10, (11.0, 13.0), 0.28, 0.0, (0.2, 0.36)),
}
_ALPHA_SPREAD = 0.03
_FE_H_RANGE = (-1.22, 0.45)


def _draw_discs(n, rng):
    "Ages [Gyr] and compositions of n stars: SEQUENCE, FE_H, AGE, ALPHA_FE."
    which = rng.choice(len(_SEQUENCES), n, p=[sequence.share for sequence in _SEQUENCES.values()])
    columns = zip(*_SEQUENCES.values(), strict=True)
    of_star = _Sequence(*(np.array(column)[which] for column in columns))
    low, high = ((limit - of_star.mean) / of_star.spread for limit in _FE_H_RANGE)
    fe_h = truncnorm.rvs(low, high, of_star.mean, of_star.spread, random_state=rng)
    alpha = np.clip(of_star.alpha + of_star.slope * fe_h, *of_star.limits.T)
    alpha = alpha + _ALPHA_SPREAD * rng.standard_normal(n)
    age = rng.uniform(*of_star.ages.T)
    sequence = np.array(list(_SEQUENCES))[which]
    return {"SEQUENCE": sequence, "FE_H": fe_h, "AGE": age, "ALPHA_FE": alpha}


# %%
discs = Table(_draw_discs(2000, np.random.default_rng(1)))
rows = []
for name in _SEQUENCES:
    members = discs[discs["SEQUENCE"] == name]
    medians = (np.median(members[column]).round(2) for column in ("AGE", "FE_H", "ALPHA_FE"))
    rows.append((name, len(members), *medians))
Table(rows=rows, names=["sequence", "stars", "median age [Gyr]", "[Fe/H]", "[α/Fe]"])


# %% [markdown]
# A star's age and metallicity choose its isochrone. We take it from [the isochrones that are shipped](10_kiel.ipynb), between the nodes of their grid, at fixed evolutionary
# phase.

# %%
#| export
def _corner(nodes, x):
    "Number of the node below each x, and how far it is to the next, from 0 to 1."
    place = np.interp(x, nodes, np.arange(len(nodes)))
    low = np.minimum(place.astype(int), len(nodes) - 2)
    return low, (place - low)[:, None]


def _isochrones(age, metallicity):
    "An isochrone for each age [Gyr] and [M/H]: log10 Teff, log g, mass and phase, each (n, E)."
    grid = shipped_isochrones()
    i, a = _corner(grid.feh, metallicity)
    j, b = _corner(grid.log_age, np.log10(age) + 9)

    def between(cube):
        poorer = (1 - b) * cube[i, j] + b * cube[i, j + 1]
        richer = (1 - b) * cube[i + 1, j] + b * cube[i + 1, j + 1]
        return (1 - a) * poorer + a * richer

    return between(grid.log_teff), between(grid.logg), between(grid.mass), grid.phase[i, j]


# %%
log_teff, logg, mass, phase = _isochrones(np.array([2.0, 8.0]), np.array([0.0, -0.5]))
fig, ax = plt.subplots(figsize=(4.5, 3.4))
for row, label in enumerate(("2 Gyr, [M/H] = 0", "8 Gyr, [M/H] = -0.5")):
    ax.plot(10 ** log_teff[row], logg[row], label=label)
ax.set(xlabel=LABELS["TEFF"].axis, ylabel=LABELS["LOGG"].axis, xlim=(7000, 3000), ylim=(5, 0))
ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
assert np.nanmax(mass[1]) < np.nanmax(mass[0])  # old stars are light

# %% [markdown]
# On the isochrone a mass is as likely as the initial mass function says, $m^{-2.35}$, and as the survey chooses: a bright star is seen to greater distance, so giants come in
# with a power of their luminosity in the H band, $L_H \propto m\,g^{-1} B_H(T_\mathrm{eff})$.

# %%
#| export
_LUMINOSITY_POWER = 0.8  # of the selection, by the H band: fits the gravities of DR17's giants
_IMF_SLOPE = -2.35  # Salpeter (1955)
_H_BAND = 1.63e-6  # m


def _light(log_teff, logg, mass):
    "Luminosity in the H band [relative]: surface times Planck's function."
    temperature = constants.h * constants.c / constants.k / (_H_BAND * 10**log_teff)
    return mass * 10**-logg / np.expm1(temperature)


def _place_on_isochrones(age, metallicity, logg_range, power, rng):
    """A star for each age and metallicity, drawn along its isochrone by mass and selection.

    TEFF [K], LOGG, MASS [Msun], PHASE, LUMINOSITY; NaN where no such star lives.
    """
    log_teff, logg, mass, phase = _isochrones(age, metallicity)
    light = _light(log_teff, logg, mass)
    in_range = (logg > logg_range[0]) & (logg < logg_range[1])
    there = np.isfinite(light) & in_range & (phase < 5)
    weight = np.abs(np.gradient(mass, axis=1)) * mass**_IMF_SLOPE * light**power
    total = np.cumsum(np.nan_to_num(np.where(there, weight, 0)), axis=1)
    place = (total < rng.random((len(age), 1)) * total[:, -1:]).sum(axis=1)
    place = place.clip(0, total.shape[1] - 1)[:, None]

    def pick(cube):
        return np.where(total[:, -1] > 0, np.take_along_axis(cube, place, axis=1)[:, 0], np.nan)

    return {
        "TEFF": 10 ** pick(log_teff),
        "LOGG": pick(logg),
        "MASS": pick(mass),
        "PHASE": pick(phase),
        "LUMINOSITY": pick(light),
    }


# %%
share = {}
for power in (0.0, _LUMINOSITY_POWER):
    age = np.full(2000, 5.0)
    chosen = _place_on_isochrones(age, 0 * age, (0.3, 3.7), power, np.random.default_rng(2))
    share[power] = np.mean(chosen["LOGG"] < 2)
print(
    "share of giants with log g below 2, by power:",
    {k: round(float(x), 3) for k, x in share.items()},
)
assert share[0.0] < share[_LUMINOSITY_POWER]  # the survey sees far what is bright


# %% [markdown]
# What the labels do not tell still shapes the spectrum. On the giant branch, deep convection has brought burnt matter up: less carbon, more nitrogen, and the more so the heavier
# the star. Turbulence grows with luminosity. Magnesium and silicon follow the alpha elements, each with a scatter of its own.

# %%
#| export
def _draw_chemistry(stars, rng):
    "The labels that the discs leave open: dredge-up, turbulence, elements around alpha."
    alpha = stars["ALPHA_FE"]
    heavier = np.clip(stars["MASS"], 0.8, 2.5) - 1
    mixed = np.clip((3.6 - stars["LOGG"]) / 0.8, 0, 1)  # dredge-up is over at log g 2.8
    normal = rng.standard_normal((5, len(stars["TEFF"])))
    return {
        "MG_FE": alpha + 0.02 + 0.05 * normal[0],
        "SI_FE": 0.8 * alpha + 0.01 + 0.05 * normal[1],
        "C_FE": 0.6 * alpha + mixed * (-0.10 - 0.14 * heavier) + 0.04 * normal[2],
        "N_FE": 0.2 * alpha + mixed * (0.18 + 0.25 * heavier) + 0.05 * normal[3],
        "VMICRO": _vmicro(stars["LOGG"]) + 0.1 * normal[4],
    }


def _vmicro(logg):
    "Usual microturbulence [km/s], also of dwarfs."
    return usual_vmicro(np.minimum(logg, 4.4))


# %% [markdown]
# A few stars are not what the sample is made of: **dwarfs**, which a photometric selection lets in, and **binaries**, two stars in one fibre. A dwarf's companion is seen if it is
# not much fainter; a giant's only if it is a giant too. Nothing in the archive marks them but the truth table.

# %%
#| export
_KINDS = {"giant": 0.965, "dwarf": 0.015, "binary": 0.02}  # shares
_GIANTS_LOGG = (0.3, 3.7)
_DWARFS_LOGG = (4.2, 4.75)


@cache
def _emulator(domain):
    "The emulator of giants or that of dwarfs."
    return Emulator.load(domain=domain)


def _candidates(n, domain, rng):
    "Up to n stars of a domain, as a table; those outside the emulator's are left out."
    dwarfs = domain == "dwarfs"
    discs = _draw_discs(n, rng)
    where = _place_on_isochrones(
        discs["AGE"],
        total_metallicity(discs["FE_H"], discs["ALPHA_FE"]),
        _DWARFS_LOGG if dwarfs else _GIANTS_LOGG,
        0.0 if dwarfs else _LUMINOSITY_POWER,
        rng,
    )
    table = Table(discs | where | _draw_chemistry(discs | where, rng))
    known = np.isfinite(table["TEFF"])
    known[known] = _emulator(domain).inside(table[list(GRID_LABELS)][known])
    return table[known]


def _draw_kind(n, domain, rng):
    "Exactly n stars of a domain."
    found = _candidates(2 * n + 50, domain, rng)
    if len(found) < n:
        raise LabError(
            f"only {len(found)} of {n} {domain} lie in the emulator's domain: "
            "another seed, or another emulator"
        )
    return found[:n]


# %%
some = _draw_kind(5, "dwarfs", np.random.default_rng(3))
some["AGE", "TEFF", "LOGG", "FE_H", "C_FE", "N_FE", "VMICRO"]

# %%
#| export
_BINARY_VELOCITY = 20.0  # spread of the companion's velocity [km/s]
_RATIOS = (0.15, 1.0)  # companion to primary, light in the H band


def _draw_binaries(n, domain, rng):
    "Exactly n pairs of one age and composition, the brighter first; the companion in _2."
    first = _candidates(12 * n + 200, domain, rng)
    metallicity = total_metallicity(first["FE_H"], first["ALPHA_FE"])
    limits = _DWARFS_LOGG if domain == "dwarfs" else _GIANTS_LOGG
    other = Table(_place_on_isochrones(np.array(first["AGE"]), metallicity, limits, 0.0, rng))
    second = first.copy()
    for name in ("TEFF", "LOGG", "MASS", "PHASE", "LUMINOSITY"):
        second[name] = other[name]
    second["VMICRO"] = _vmicro(second["LOGG"])
    ratio = np.asarray(other["LUMINOSITY"] / first["LUMINOSITY"])
    known = np.isfinite(ratio) & (ratio > _RATIOS[0]) & (ratio < _RATIOS[1])
    known[known] = _emulator(domain).inside(second[list(GRID_LABELS)][known])
    if known.sum() < n:
        raise LabError(f"only {known.sum()} of {n} binaries could be drawn: another seed")
    pairs = first[known][:n]
    for name in GRID_LABELS:
        pairs[f"{name}_2"] = second[name][known][:n]
    pairs["RATIO"] = ratio[known][:n]
    pairs["VELOCITY_2"] = _BINARY_VELOCITY * rng.standard_normal(n)
    return pairs


# %%
some = _draw_binaries(4, "dwarfs", np.random.default_rng(4))
some["AGE", "FE_H", "TEFF", "TEFF_2", "LOGG", "LOGG_2", "RATIO", "VELOCITY_2"]

# %% [markdown]
# Last they get a field, a place on the sky, and the name that follows from it.

# %%
#| export
# made-up centres of four fields, RA and Dec [deg], one south
_FIELDS = {
    "4230": (322.5, 12.2),
    "4262": (290.2, 37.8),
    "5162": (254.0, -3.0),
    "4241": (100.2, 9.9),
}
_FIELD_RADIUS = 1.4  # deg


def _place_on_sky(table, rng):
    "Field, position and name."
    n = len(table)
    field = rng.choice(len(_FIELDS), n)
    centre = np.array(list(_FIELDS.values()))[field]
    radius = _FIELD_RADIUS * np.sqrt(rng.random(n))
    angle = rng.uniform(0, 2 * np.pi, n)
    table["LOCATION_ID"] = np.array(list(_FIELDS), int)[field]
    table["DEC"] = centre[:, 1] + radius * np.sin(angle)
    table["RA"] = centre[:, 0] + radius * np.cos(angle) / np.cos(np.radians(table["DEC"]))
    sky = SkyCoord(table["RA"], table["DEC"], unit="deg")
    hours = sky.ra.to_string("hour", sep="", precision=2, pad=True)
    degrees = sky.dec.to_string(sep="", precision=1, pad=True, alwayssign=True)
    digits = zip(hours, degrees, strict=True)
    table["APOGEE_ID"] = [f"2M{ra}{dec}".replace(".", "") for ra, dec in digits]
    table["GLON"] = sky.galactic.l.deg
    table["GLAT"] = sky.galactic.b.deg


# %%
placed = Table({"number": range(3)})
_place_on_sky(placed, np.random.default_rng(5))
assert all(len(name) == 18 for name in placed["APOGEE_ID"])
placed["LOCATION_ID", "RA", "DEC", "APOGEE_ID"]

# %%
#| exporti
_STARS = 2723  # as many as the original lab has in its four fields
_FIBRES = (12.8, 13.3, 13.8, 14.3)  # widths of the profile: fibres differ [km/s]


def draw_population(stars: int = _STARS, seed: int = 42, fibres: tuple = _FIBRES) -> Table:
    """The stars of the mock survey, with all that is true of them. Same seed, same stars.

    Parameters
    ----------
    stars : int, optional
        How many, 2,723 by default.
    seed : int, optional
        Of all that is drawn.
    fibres : tuple of float, optional
        Widths of the fibres' profiles [km/s], of which each star gets one.

    Returns
    -------
    Table
        One row per star: APOGEE_ID, KIND, SEQUENCE, LOCATION_ID, RA and DEC [deg], AGE [Gyr], MASS
        [Msun], GRID_LABELS, FWHM [km/s], and the companion's in _2 (NaN for single stars).

    Raises
    ------
    LabError
        If the survey is too small to hold every kind.
    """
    if stars < 20:
        raise LabError(
            f"a survey of {stars} stars is too small to hold every kind: ask for 20 or more"
        )
    rng = np.random.default_rng([seed, 2])
    dwarfs = max(1, round(_KINDS["dwarf"] * stars))
    binaries = max(1, round(_KINDS["binary"] * stars))
    groups = [
        ("giant", _draw_kind(stars - dwarfs - binaries, "giants", rng)),
        ("dwarf", _draw_kind(dwarfs, "dwarfs", rng)),
        ("binary", _draw_binaries(binaries - binaries // 2, "dwarfs", rng)),
        ("binary", _draw_binaries(binaries // 2, "giants", rng)),
    ]
    table = _joined([group for _, group in groups])
    kinds = [kind for kind, _ in groups]
    table["KIND"] = np.repeat(kinds, [len(group) for _, group in groups])
    table = table[rng.permutation(stars)]
    table["FWHM"] = rng.choice(fibres, stars)
    _place_on_sky(table, rng)
    return table


def _joined(tables):
    "Tables one below the other; NaN where one lacks a column."
    names = list(dict.fromkeys(name for table in tables for name in table.colnames))
    joined = Table()
    for name in names:
        columns = [
            table[name] if name in table.colnames else np.full(len(table), np.nan)
            for table in tables
        ]
        joined[name] = np.concatenate(columns)
    return joined


# %%
people = draw_population()
single = people["KIND"] == "giant"
assert len(people) == _STARS and len(set(people["APOGEE_ID"])) == _STARS
people["APOGEE_ID", "KIND", "SEQUENCE", "AGE", "TEFF", "LOGG", "FE_H", "MG_FE", "SI_FE"][:6]

# %% [markdown]
# Left, our giants in the Kiel diagram; the red clump is the knot at log g 2.5. Right, the two sequences. Where `STELLAR_LAB_REAL_DATA` names a folder of real files, 20,000 giants of
# the survey's data release 17 lie beneath.

# %%
folder = real_data()
dr17 = np.load(folder / "dr17_giants_labels.npz")["labels"].astype(float).T if folder else None
fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
if folder:
    axes[0].plot(dr17[0], dr17[1], ".", ms=1, color="0.8", zorder=0)
    axes[1].plot(dr17[2], dr17[3], ".", ms=1, color="0.8", zorder=0)
points = axes[0].scatter(people["TEFF"], people["LOGG"], c=people["FE_H"], s=4, cmap="viridis")
axes[0].set(xlabel=LABELS["TEFF"].axis, ylabel=LABELS["LOGG"].axis, xlim=(6400, 3400), ylim=(5, 0))
axes[1].plot(people["FE_H"], people["ALPHA_FE"], ".", ms=2, color="C0")
axes[1].set(xlabel=LABELS["FE_H"].axis, ylabel=r"[$\alpha$/Fe] [dex]")
axes[1].set(xlim=(-1.3, 0.6), ylim=(-0.15, 0.45))
fig.colorbar(points, ax=axes[0], label=LABELS["FE_H"].axis);

# %%
quantiles = (5, 16, 50, 84, 95)
compared = ("TEFF", "LOGG", "FE_H", "ALPHA_FE")
rows = [
    ("mock", name, *np.percentile(people[name][single], quantiles).round(2)) for name in compared
]
if folder:
    there = (dr17[1] < _GIANTS_LOGG[1]) & (dr17[2] > _FE_H_RANGE[0]) & (dr17[0] > 3650)
    for name, column in zip(compared, dr17, strict=False):
        rows.append(("DR17", name, *np.percentile(column[there], quantiles).round(2)))
Table(rows=rows, names=["giants of", "label", *(f"{q} %" for q in quantiles)])

# %%
clump = (people["LOGG"] > 2.3) & (people["LOGG"] < 2.6) & single
# the clump is made of stars that burn helium
assert np.mean(people["PHASE"][clump] == 3) > 0.5 > np.mean(people["PHASE"][single & ~clump] == 3)
rich = people["SEQUENCE"] == "alpha-rich"
assert np.median(people["ALPHA_FE"][rich]) > np.median(people["ALPHA_FE"][~rich]) + 0.1
mixed = single & (people["LOGG"] < 2.5)
carbon_nitrogen = people["C_FE"][mixed] - people["N_FE"][mixed]
# what dredge-up writes into C/N: the mass
assert np.corrcoef(carbon_nitrogen, people["MASS"][mixed])[0, 1] < -0.3
if folder:
    for name, k, tolerance in (("LOGG", 1, 0.3), ("FE_H", 2, 0.08), ("ALPHA_FE", 3, 0.05)):
        assert abs(np.median(people[name][single]) - np.median(dr17[k][there])) < tolerance

# %% [markdown]
# ## Their light
# The emulator gives the spectrum of each star, in the profile of its fibre. A companion adds its own, shifted by the difference of velocities and weighed by the light that
# it gives at each wavelength. These are the true spectra: no noise, no continuum to find.

# %%
#| export
_PIXEL_VELOCITY = constants.c / 1e3 * np.log(10) * LOG10_STEP  # km/s per pixel
# full-grid pixels, so that a shifted companion has no edge
_PADDED = np.arange(CHIPS["blue"][0] - 58, CHIPS["red"][1] + 58)


def _single_spectra(labels, fwhm, grid):
    "Spectra of (N, 9) labels, each by the emulator of its domain and in its fibre's profile."
    flux = np.empty((len(labels), len(grid)), "f4")
    giant = labels[:, GRID_LABELS.index("LOGG")] < 4
    for domain, members in (("giants", giant), ("dwarfs", ~giant)):
        for width in np.unique(fwhm[members]):
            alike = members & (fwhm == width)
            flux[alike] = _emulator(domain)(labels[alike], grid, fwhm=width, outside="ignore")
    return flux


def _companion_share(truth):
    "(N, 7214) the companion's part of a binary's light: two black bodies of the given ratio in H."
    colour = black_body(wavelength, truth["TEFF_2"]) / black_body(wavelength, truth["TEFF"])
    ratio = _column(truth, "RATIO")[:, None] * colour
    return ratio / (1 + ratio)


def _column(table, name):
    "A column as plain numbers."
    return np.asarray(table[name], float)


# %% [markdown]
# A cooler companion gives more of its light in the red:

# %%
pairs = people[people["KIND"] == "binary"]
coolest = pairs[[int(np.argmin(pairs["TEFF_2"] - pairs["TEFF"]))]]
fig, ax = plt.subplots(figsize=(5, 2.6))
ax.plot(wavelength, 100 * _companion_share(coolest)[0], ".", ms=1)
ax.set(xlabel="vacuum wavelength [Å]", ylabel="companion's light [%]")
ax.set(title=f"{coolest['TEFF'][0]:.0f} K with a companion of {coolest['TEFF_2'][0]:.0f} K");


# %%
#| export
def true_spectra(truth: Table) -> np.ndarray:
    """What the stars send, without noise and with the continuum divided out.

    Parameters
    ----------
    truth : Table
        Rows of `draw_population`, or of an archive's truth table.

    Returns
    -------
    ndarray of float32, shape (N, 7214)
        Flux relative to the true continuum, on the survey's on-band pixels.
    """
    fwhm = _column(truth, "FWHM")
    flux = _single_spectra(label_matrix(truth), fwhm, wavelength)
    double = np.flatnonzero(np.isfinite(truth["RATIO"]))
    if len(double):
        pairs = truth[double]
        labels = np.column_stack([_column(pairs, f"{name}_2") for name in GRID_LABELS])
        companions = _single_spectra(labels, fwhm[double], full_wavelength[_PADDED])
        shift = _column(pairs, "VELOCITY_2") / _PIXEL_VELOCITY  # pixels, to the red
        share = _companion_share(pairs)
        flux[double] = (1 - share) * flux[double] + share * _shifted(companions, shift)
    return flux


def _shifted(flux, shift):
    "Spectra on the padded grid, moved by some pixels each, on the on-band pixels."
    place = np.broadcast_to(on_band - _PADDED[0], (len(flux), len(on_band))) - shift[:, None]
    rows = np.broadcast_to(np.arange(len(flux))[:, None], place.shape)
    return map_coordinates(flux, [rows, place], order=3, mode="nearest")


# %%
truth_flux = true_spectra(people)
giant = int(np.flatnonzero(single & (people["LOGG"] < 1))[0])
dwarf = int(np.flatnonzero(people["KIND"] == "dwarf")[0])
fig, axes = plt.subplots(2, 1, figsize=(9, 4.5), layout="constrained")
for ax, window in zip(axes, ((15860, 15960), (16750, 16870)), strict=True):
    for row, name, color in ((giant, "giant", "C0"), (dwarf, "dwarf", "C1")):
        star = people[row]
        labels = f"{star['TEFF']:.0f} K, log g {star['LOGG']:.1f}, [Fe/H] {star['FE_H']:+.1f}"
        plot_spectrum(
            wavelength,
            truth_flux[row],
            window=window,
            ax=ax,
            lw=1,
            color=color,
            label=f"{name}, {labels}",
        )
axes[0].legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0));

# %% [markdown]
# A pair's limits are known: with no light from the companion it is the primary alone; two equal stars at rest look like one.

# %%
twin = people[people["KIND"] == "binary"][:1]
alone = twin.copy()
alone["RATIO"] = 1e-9
equal = twin.copy()
for name in GRID_LABELS:
    equal[f"{name}_2"] = equal[name]
equal["RATIO"] = 0.7
equal["VELOCITY_2"] = 0.0
one = _single_spectra(label_matrix(twin), np.asarray(twin["FWHM"]), wavelength)
assert np.allclose(true_spectra(alone), one, atol=1e-6)
assert np.allclose(true_spectra(equal), one, atol=1e-4)
apart = equal.copy()
apart["VELOCITY_2"] = 60.0
moved = (1 - true_spectra(apart)[0, 200:2700]).sum()
assert np.isclose(moved, (1 - one[0, 200:2700]).sum(), rtol=0.02)  # moving light loses none

# %% [markdown]
# ## The instrument
# The night sky shines in hydroxyl lines at fixed places on the *detector*; on the star's rest frame they move with its velocity. Where a line is bright, the pixel carries the bit SIG_SKYLINE
# and a larger error. Water vapour of our own air absorbs (SIG_TELLURIC) and is divided out imperfectly. Some fibres of the blue chip remember the night before (persistence), all of
# that chip then has bits. Detectors have dead columns, and cosmic rays hit.

# %%
#| export
_SKY_LINES = 190  # that may be strong enough for a bit
_TELLURIC_BANDS = 20
_SKY_SEED = 20140601  # of their places: the same sky for every archive
_SKY_RANGE = (250, 8400)  # full-grid pixels


def _sky():
    "Brightness of the sky's lines (0 to 1) and telluric bands (bool), on the full grid at rest."
    rng = np.random.default_rng(_SKY_SEED)
    lines = np.zeros(len(full_wavelength), "f4")
    centres = rng.integers(*_SKY_RANGE, _SKY_LINES)
    widths = rng.integers(3, 8, _SKY_LINES)
    for centre, width in zip(centres, widths, strict=True):
        lines[centre : centre + width] = rng.random()
    bands = np.zeros(len(full_wavelength), bool)
    centres = rng.integers(*_SKY_RANGE, _TELLURIC_BANDS)
    widths = rng.integers(8, 30, _TELLURIC_BANDS)
    for centre, width in zip(centres, widths, strict=True):
        bands[centre : centre + width] = True
    return lines, bands


# %%
lines, bands = _sky()
print(
    f"{np.mean(lines > 0):.1%} of the pixels have a sky line, {np.mean(bands):.1%} a telluric band"
)

# %%
#| export
_DEAD_COLUMNS = 0.010  # share of the pixels
_COSMIC = 0.0012  # share of the pixels
_SUPERPERSISTENCE = 0.08  # share of the fibres: the whole blue chip
_PERSISTENCE = 0.12  # share of the fibres: a patch of it


def _draw_mask(velocity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pixel masks: what is fixed on the detector moves with the star's velocity.

    Parameters
    ----------
    velocity : ndarray, shape (N,)
        Of the stars [km/s].
    rng : numpy Generator

    Returns
    -------
    ndarray of int16, shape (N, 7214)
        APOGEE_PIXMASK bits of sky and air, dead columns, cosmic rays and persistence.
    """
    n = len(velocity)
    shift = np.rint(velocity / _PIXEL_VELOCITY).astype(int)
    detector = on_band[None] + shift[:, None]  # the place on the detector of each rest-frame pixel
    lines, bands = _sky()
    darkness = rng.uniform(0.1, 0.6, (n, 1))  # of the night: how bright a line must be for its bit
    bits = (lines[detector] > darkness) * PIXMASK.SIG_SKYLINE
    bits = bits + bands[detector] * PIXMASK.SIG_TELLURIC
    # thirty bundles of fibres share their columns
    columns = np.random.default_rng([_SKY_SEED, 1]).random((30, len(full_wavelength)))
    dead = columns < _DEAD_COLUMNS
    bits |= dead[rng.integers(30, size=n)[:, None], detector] * PIXMASK.BADPIX
    bits |= (rng.random(bits.shape) < _COSMIC) * PIXMASK.CRPIX
    draw = rng.random(n)
    whole = draw < _SUPERPERSISTENCE
    some = ~whole & (draw < _SUPERPERSISTENCE + _PERSISTENCE)
    blue = on_band <= CHIPS["blue"][1]
    centre = rng.random((n, 1)) * 2400
    patch = blue & (np.abs(on_band - CHIPS["blue"][0] - centre) < 450)
    bits |= (whole[:, None] & blue) * PIXMASK.PERSIST_HIGH
    bits |= (some[:, None] & patch) * PIXMASK.PERSIST_LOW
    return bits.astype("i2")


# %%
rng = np.random.default_rng(5)
masks = _draw_mask(55.0 * rng.standard_normal(len(people)), rng)
flagged = (masks != 0).mean(axis=1)
fig, axes = plt.subplots(1, 2, figsize=(10, 3))
axes[0].imshow(
    masks[:60] != 0,
    aspect="auto",
    cmap="Greys",
    interpolation="nearest",
    extent=(0, masks.shape[1], 60, 0),
)
axes[0].set(xlabel="on-band pixel", ylabel="star")
axes[1].hist(flagged * masks.shape[1], bins=60)
axes[1].axvline(3000, color="C1", lw=1)
axes[1].set(xlabel="pixels with a bit", ylabel="stars", yscale="log");

# %%
#| echo: false
Markdown(
    "**What to see.** Left, black is a pixel with a bit: sky lines move with each star's velocity, "
    "some stars have lost their blue chip. On average "
    f"{flagged.mean():.1%} of the pixels carry one (the survey's spectra: about 16.5 %); "
    f"{np.mean(flagged * masks.shape[1] > 3000):.1%} of the stars have more than 3000 and will be "
    "dropped."
)

# %% [markdown]
# Photons are counted, so the noise follows the light that is there, and is larger under sky lines. What the division by the air's absorption, the detector's memory and cosmic
# rays leave behind comes on top.

# %%
#| export
_TELLURIC_RESIDUAL = 0.004  # of the flux, what the division leaves


def _observe(
    flux: np.ndarray, snr: np.ndarray, mask: np.ndarray, rng: np.random.Generator
) -> tuple:
    """Spectra as the instrument delivers them.

    Parameters
    ----------
    flux : ndarray, shape (N, P)
        True spectra.
    snr : ndarray, shape (N,)
        Signal to noise per pixel.
    mask : ndarray, shape (N, P)
        APOGEE_PIXMASK bits, as of `_draw_mask`.
    rng : numpy Generator

    Returns
    -------
    flux, error : ndarray of float32, shape (N, P)
        Both 0 in dead pixels.
    """

    def has(bit):
        return (mask & bit) > 0

    normal = rng.standard_normal
    air = has(PIXMASK.SIG_TELLURIC)
    relative = np.sqrt(np.clip(flux, 0.05, None)) / snr[:, None]
    worse = np.where(has(PIXMASK.SIG_SKYLINE), 6.0, np.where(air, 1.5, 1.0))
    error = (relative * worse).astype("f4")
    observed = flux + error * normal(flux.shape, dtype="f4")
    observed += air * (_TELLURIC_RESIDUAL * 4 * normal(flux.shape, dtype="f4"))
    memory = np.abs(rng.normal(0.06, 0.03, (len(flux), 1))).astype("f4")
    observed += has(PIXMASK.PERSIST_HIGH) * memory
    observed += has(PIXMASK.CRPIX) * rng.exponential(0.4, flux.shape).astype("f4")
    dead = has(PIXMASK.BADPIX)
    return np.where(dead, 0, observed).astype("f4"), np.where(dead, 0, error).astype("f4")


# %%
quiet_mask = np.zeros((300, len(wavelength)), "i2")
quiet_flux, quiet_error = _observe(
    truth_flux[:300], np.full(300, 100.0), quiet_mask, np.random.default_rng(0)
)
pull = (quiet_flux - truth_flux[:300]) / quiet_error
assert abs(pull.std() - 1) < 0.01 and abs(pull.mean()) < 0.01  # the stated errors are the noise's
# and the SNR means what it says
assert np.isclose(np.median(truth_flux[:300] / quiet_error), 100, rtol=0.05)
assert 0.15 < flagged.mean() < 0.18 and 0.05 < np.mean(flagged > 3000 / 7214) < 0.12
# ten pixels' worth of velocity: what the air does stays on the detector
moved = _draw_mask(np.array([0.0, 41.4189]), np.random.default_rng(1)) & PIXMASK.SIG_TELLURIC
assert np.array_equal(moved[0, 110:2900], moved[1, 100:2890])
print(f"scatter over stated error: {pull.std():.3f}")

# %% [markdown]
# ## The catalogue
# Labels are measured too. A catalogue's have errors, which grow when the noise does, and *trends*: its temperatures are a little too low for hot stars and too high for cool ones, and
# so on. A model that learns from a catalogue learns its trends; the truth table keeps them apart, so that a bias can be told from what was planted. Some stars got no labels.

# %%
#| export
# of a bright star
_LABEL_ERRORS = {"TEFF": 35.0, "LOGG": 0.07, "FE_H": 0.020, "MG_FE": 0.022, "SI_FE": 0.022}
_FAINT = 70.0  # SNR at which noise has doubled an error's square
_NO_LABELS = 0.07  # share of stars without any label
_ONE_MISSING = 0.03  # share of stars without one of the abundances


def _catalogue_trend(truth):
    "What the catalogue is off, without noise, for each label: catalogue minus truth."
    warm = (_column(truth, "TEFF") - 4500) / 500
    return {
        "TEFF": -18 * warm,
        "LOGG": 0.04 * (_column(truth, "LOGG") - 2.2),
        "FE_H": 0.012 * warm,
        "MG_FE": -0.08 * (_column(truth, "MG_FE") - 0.1),
        "SI_FE": 0.012 * warm,
    }


def _draw_catalogue(truth, snr, rng):
    "What a pipeline would have measured: five labels and their _ERR; NaN where it has none."
    n = len(truth)
    trend = _catalogue_trend(truth)
    table = Table()
    growth = np.sqrt(1 + (_FAINT / snr) ** 2)
    for name, error in _LABEL_ERRORS.items():
        sigma = error * growth * rng.uniform(0.85, 1.15, n)
        table[name] = np.asarray(truth[name]) + trend[name] + sigma * rng.standard_normal(n)
        table[f"{name}_ERR"] = sigma
    nothing = rng.random(n) < _NO_LABELS * growth**2
    missing = dict(zip(("MG_FE", "SI_FE"), rng.random((2, n)) < _ONE_MISSING, strict=True))
    for name in _LABEL_ERRORS:
        lost = nothing | missing.get(name, False)
        for column in (name, f"{name}_ERR"):
            table[column] = np.where(lost, np.nan, table[column])
            table[column].unit = LABELS[name].unit
    return table


# %%
labels = _draw_catalogue(people, np.full(len(people), 100.0), np.random.default_rng(2))
trend = _catalogue_trend(people)
fig, axes = plt.subplots(1, 5, figsize=(13, 2.8), layout="constrained")
for ax, name in zip(axes, _LABEL_ERRORS, strict=True):
    ax.plot(people[name], labels[name] - people[name], ".", ms=1, color="0.6")
    ax.plot(people[name], trend[name], ".", ms=1, color="C1")
    ax.set(xlabel=LABELS[name].axis)
axes[0].set(ylabel="catalogue minus truth");

# %% [markdown]
# **What to see.** Grey, what the catalogue is off; orange, the trend in it. The trends of [Fe/H] and [Si/Fe] follow the temperature, so that over the label itself they are a band.

# %%
for name in _LABEL_ERRORS:
    rest = (labels[name] - people[name] - trend[name]) / labels[f"{name}_ERR"]
    # the stated errors are right once the trend is known
    assert abs(np.nanstd(rest) - 1) < 0.05 and abs(np.nanmean(rest)) < 0.08
assert 0.05 < np.mean(np.isnan(labels["TEFF"])) < np.mean(np.isnan(labels["MG_FE"])) < 0.25

# %% [markdown]
# ## Put together
# `mock_stars` draws them, `write_mock` writes them; `stellar-lab archive mock ROOT` is the same on the command line.

# %%
#| export
_VELOCITY_SPREAD = 55.0  # km/s
# log-normal
_SNR_MEDIAN = 125.0
_SNR_SPREAD = 0.75
_SNR_RANGE = (15.0, 900.0)
_VISITS = {1: 0.40, 2: 0.20, 3: 0.35, 6: 0.05}  # shares


def _observing_facts(truth, snr, velocity, rng):
    "What the survey's catalogue tells of a star beyond its labels, by column."
    n = len(truth)
    h = 12.2 - 2.5 * np.log10(snr / _SNR_MEDIAN) / 1.3 + 0.3 * rng.standard_normal(n)
    h = np.clip(h, 6.5, 14.0)
    colour = 0.75 + (4600 - truth["TEFF"]) / 2500
    visits = rng.choice(list(_VISITS), n, p=list(_VISITS.values()))
    return {
        "APOGEE_ID": truth["APOGEE_ID"],
        "FIELD": [f"MOCK-{number}" for number in truth["LOCATION_ID"]],
        "LOCATION_ID": truth["LOCATION_ID"],
        "TELESCOPE": ["apo25m"] * n,
        "SNR": snr,
        "NVISITS": visits,
        "J": h + colour,
        "H": h,
        "K": h - 0.15,
        **{name: truth[name] for name in ("RA", "DEC", "GLON", "GLAT")},
        "VHELIO": velocity,
        "VSCATTER": np.abs(rng.normal(0.1, 0.05, n)),
        "VERR": 0.02 + 2 / snr,
        "TEFF_CONTINUUM": truth["TEFF"],
    }


# %%
facts = Table(_observing_facts(people[:3], np.array([30.0, 100, 300]), np.zeros(3), rng))
facts["APOGEE_ID", "FIELD", "SNR", "NVISITS", "J", "H", "K", "VERR"]


# %%
#| export
def mock_stars(stars: int = _STARS, seed: int = 42, snr: float = None) -> tuple:
    """A synthetic survey as it was observed, and its truth. Same seed, same arrays.

    Parameters
    ----------
    stars : int, optional
        How many, 2,723 by default.
    seed : int, optional
        Of all that is drawn.
    snr : float, optional
        Signal to noise of all stars; drawn by default, as a survey's. Whatever it is, stars, masks
        and velocities stay the same.

    Returns
    -------
    spectra : Spectra
        Observed flux relative to the true continuum, with the catalogue's labels.
    truth : Table
        Rows of `draw_population`, and the trends planted in the catalogue (_TREND).
    """
    truth = draw_population(stars, seed)
    rng = np.random.default_rng([seed, 3])
    n = len(truth)
    drawn = np.clip(_SNR_MEDIAN * np.exp(_SNR_SPREAD * rng.standard_normal(n)), *_SNR_RANGE)
    snr = drawn if snr is None else np.full(n, float(snr))
    velocity = _VELOCITY_SPREAD * rng.standard_normal(n)
    mask = _draw_mask(velocity, rng)
    flux, error = _observe(true_spectra(truth), snr, mask, rng)
    with np.errstate(divide="ignore"):
        ivar = np.where(error > 0, 1 / error**2, 0).astype("f4")
    facts = _observing_facts(truth, snr, velocity, rng)
    catalogue = _draw_catalogue(truth, snr, rng)
    for name, offset in _catalogue_trend(truth).items():
        truth[f"{name}_TREND"] = offset
    table = Table(facts | {name: catalogue[name] for name in catalogue.colnames})
    table.meta = {"product": "aspcapstar", "release": "mock", "archive": "mock", "normalized": True}
    return Spectra(wavelength, flux, ivar, table, mask), truth


# %%
few, few_truth = mock_stars(20, seed=1)
few.stars["APOGEE_ID", "SNR", "VHELIO", "TEFF", "TEFF_ERR", "FE_H", "FE_H_ERR"][:4]

# %%
faint = mock_stars(20, seed=1, snr=30)[0]
assert np.array_equal(faint.mask, few.mask) and set(faint.stars["SNR"]) == {30}
weight_of = [np.median(some.ivar[3][some.mask[3] == 0]) for some in (faint, few)]
assert np.isclose(weight_of[1] / weight_of[0], (few.stars["SNR"][3] / 30) ** 2, rtol=1e-3)

# %% [markdown]
# A study in memory needs no files. It wants stars to learn from, as the survey lists them, and others to judge by, whose labels are the true ones as a catalogue without noise would list them. Those are single giants: a binary has no label that is right.

# %%
#| exporti
# a step to either side in each quantity in which single giants differ
GIANT_STEPS = {"TEFF": 20.0, "LOGG": 0.05, **dict.fromkeys(GRID_LABELS[2:8], 0.02)}
GIANT_STEPS |= {"VMICRO": 0.05, "FWHM": 0.2}


def _unflagged(spectra):
    "Spectra whose flagged pixels have lost their weight."
    return spectra.replace(ivar=np.where(spectra.mask == 0, spectra.ivar, 0), mask=None)


def learning_stars(stars: int, seed: int = 7) -> Spectra:
    """Synthetic stars with the noisy labels of a survey's catalogue, after its cuts.

    Parameters
    ----------
    stars : int
        How many are drawn; some seven in ten are left.
    seed : int, optional

    Returns
    -------
    Spectra
        Relative to the true continuum; flagged pixels have no weight.
    """
    spectra, _ = apply_cuts(mock_stars(stars, seed)[0])
    return _unflagged(spectra)


def judged_giants(stars: int, snr: float, seed: int = 8) -> tuple:
    """Synthetic single giants of one brightness, whose labels are true.

    Parameters
    ----------
    stars : int
        How many are drawn; single giants above [Fe/H] = -1 are kept.
    snr : float
        Signal to noise per pixel.
    seed : int, optional

    Returns
    -------
    spectra : Spectra
        N stars; their labels are what a catalogue without noise would list.
    truth : Table
        Their rows of `mock_stars`.
    """
    spectra, truth = mock_stars(stars, seed, snr)
    table = spectra.stars.copy()
    for name in spectra.label_names:
        table[name] = _column(truth, name) + _column(truth, f"{name}_TREND")
    single = ~np.isfinite(truth["RATIO"]) & (truth["LOGG"] < 3.5)
    rows = np.flatnonzero(single & (table["FE_H"] > -1))
    return _unflagged(spectra.replace(stars=table))[rows], truth[rows]


# %%
learned = learning_stars(60)
giants, giants_truth = judged_giants(60, snr=100)
print(f"of 60 stars each, {len(learned)} to learn from, {len(giants)} to judge by")
assert np.isfinite(learned.labels()).all() and min(learned.stars["SNR"]) > 50
assert max(giants_truth["LOGG"]) < 3.5 and not np.isfinite(giants_truth["RATIO"]).any()
assert np.allclose(giants.labels(["TEFF"])[:, 0] - giants_truth["TEFF"], giants_truth["TEFF_TREND"])


# %%
#| export
def write_mock(
    root,
    seed: int = 42,
    stars: int = None,
    flaws: dict = None,
    workers: int = None,
    progress: bool = True,
) -> ArchiveSummary:
    """Write the archive of synthetic stars in DR14's files. Same seed, same bytes.

    Parameters
    ----------
    root : path
        Folder to make; the truth goes into `truth.fits` in it.
    seed : int, optional
        Of all that is drawn.
    stars : int, optional
        How many, 2,723 by default.
    flaws : dict, optional
        Name of a flaw -> how many; all flaws of the chapter on archives by default.
    workers : int, optional
        Processes; one per core by default.
    progress : bool, optional
        Whether to show a bar.

    Returns
    -------
    ArchiveSummary
    """
    spectra, truth = mock_stars(_STARS if stars is None else stars, seed)
    return write_archive(
        root, spectra, "mock", seed, truth=truth, flaws=flaws, workers=workers, progress=progress
    )


# %% [markdown]
# Sixty stars will do to see that it works: our own reader reads the files back, each under its own star's labels; the catalogue does not know what the truth table knows.

# %%
scratch = tempfile.TemporaryDirectory()
root = Path(scratch.name) / "mock"
print(write_mock(root, stars=60, workers=1, progress=False))
truth = read_truth(root)
truth["APOGEE_ID", "FLAW", "KIND", "TEFF", "LOGG", "FE_H", "MG_FE", "SI_FE", "TEFF_TREND"][:5]

# %%
spectra, ledger = read_archive(root)
kept, ledger = apply_cuts(spectra, ledger=ledger)
ledger

# %%
rows = [list(truth["APOGEE_ID"]).index(name) for name in kept.stars["APOGEE_ID"]]
expected = np.array([truth[name][rows] + truth[f"{name}_TREND"][rows] for name in _LABEL_ERRORS]).T
off = np.abs(kept.labels(_LABEL_ERRORS) - expected) / kept.label_errors(_LABEL_ERRORS)
assert np.all(off < 6)  # each file under its own star's labels
# nothing of the truth leaks
secrets = {"KIND", "SEQUENCE", "RATIO", "C_FE", "TEFF_CONTINUUM"}
assert not secrets & set(spectra.stars.colnames)
assert set(ARCHIVES["mock"].labels) == set(_LABEL_ERRORS)
fields = np.unique(spectra.stars["LOCATION_ID"]).astype(str)
assert set(fields) <= set(ARCHIVES["mock"].fields)

# %% [markdown]
# Same seed, same bytes; another seed, another survey.

# %%
digests = {}
for name, seed, workers in (("first", 42, 1), ("again", 42, 2), ("other", 43, 1)):
    place = Path(scratch.name) / name
    write_mock(place, stars=20, seed=seed, flaws={}, workers=workers, progress=False)
    digests[name] = tree_digest(place)
assert digests["again"] == digests["first"] != digests["other"]
scratch.cleanup()

# %%
with pytest.raises(LabError, match="a survey of 5 stars is too small to hold every kind"):
    draw_population(5)

# %% [markdown]
# ## Hard in the right ways
# If a quadratic could reproduce these spectra exactly, the archive would flatter The Cannon. So fit the quadratic to *true* spectra at *true* labels, without noise, and see
# how far it stays off at the median pixel: what is left is curvature of higher order, and what the five labels do not say.

# %%
train = single & (np.arange(len(people)) % 2 == 0)
five = np.column_stack([people[name] for name in _LABEL_ERRORS])
best = Cannon().fit(
    five[train],
    truth_flux[train],
    ivar=np.full(truth_flux[train].shape, 1e4, "f4"),
    label_names=list(_LABEL_ERRORS),
)
test = single & ~train
off = np.sqrt(np.mean((best.predict(five[test]) - truth_flux[test]) ** 2, axis=0))

# %%
#| echo: false
Markdown(
    f"The best quadratic stays **{np.median(off):.2%}** off at the median pixel, "
    f"{np.percentile(off, 95):.2%} at the worst twentieth."
)

# %%
assert 0.001 < np.median(off) < 0.01

# %% [markdown]
# **Exercise.** Draw two surveys that differ only in the width of the fibres' profiles (`fibres` of `draw_population`). How much of the quadratic's error is that? And which label
# would take it up, if all fibres of one field were narrower than those of the others?
