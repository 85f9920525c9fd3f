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
# The spectra come from [Stars from physics](A_synthesis.ipynb), the files from [Archives](B_archives.ipynb); this chapter makes the stars between them. What the
# labels do not say, we hide in the spectra: carbon and nitrogen, turbulence, the width of the fibre's profile, a dwarf here and there, a companion.

# %%
#| default_exp mock

# %%
#| export
from functools import cache

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.table import Table
from scipy import constants
from scipy.ndimage import map_coordinates
from scipy.stats import truncnorm

from stellar_lab.archives import ArchiveSummary, black_body, write_archive
from stellar_lab.emulator import GRID_LABELS, Emulator, label_matrix, usual_vmicro
from stellar_lab.kiel import shipped_isochrones, total_metallicity
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
from stellar_lab.clean import apply_cuts, read_archive
from stellar_lab.survey import ARCHIVES, plot_spectrum, read_truth, real_data, use_style

# %%
#| hide
use_style()

# %% [markdown]
# ## Who lives there
# The Galaxy's disc has two sequences: an older one rich in alpha elements, and a younger one that is poor in them. A star's age and metallicity choose its isochrone. On it, a mass is as
# likely as the initial mass function says, $m^{-2.35}$, and as the survey chooses: a bright star is seen to greater distance, so giants come in with a power of their
# luminosity in the H band, $L_H \propto m\,g^{-1} B_H(T_\mathrm{eff})$.

# %%
#| export
STARS = 2723  # the lab's four fields
SEQUENCES = {  # share, [Fe/H] mean and spread, ages [Gyr], [alpha/Fe] at [Fe/H] = 0, its slope with [Fe/H], its limits
    "alpha-poor": (0.65, -0.11, 0.22, (1.2, 8.0), 0.05, -0.16, (-0.03, 0.18)),
    "alpha-rich": (0.32, -0.50, 0.25, (8.0, 13.0), 0.13, -0.22, (0.03, 0.30)),
    "metal-poor": (0.03, -1.00, 0.10, (11.0, 13.0), 0.28, 0.0, (0.2, 0.36)),
}
ALPHA_SPREAD = 0.03
FE_H_RANGE = (-1.22, 0.45)
LUMINOSITY_POWER = 0.8  # of the selection, by the H band: fits the gravities of DR17's giants
GIANTS_LOGG = (0.3, 3.7)
IMF_SLOPE = -2.35  # Salpeter (1955)


def draw_discs(
    n: int,
    rng: np.random.Generator,
) -> dict:  # (n,) SEQUENCE, FE_H, AGE [Gyr], ALPHA_FE
    "Ages and compositions of stars of the Galaxy's two discs, and a few metal-poor ones."
    which = rng.choice(len(SEQUENCES), n, p=[sequence[0] for sequence in SEQUENCES.values()])
    _, mean, spread, ages, alpha, slope, limits = (
        np.array(column)[which] for column in zip(*SEQUENCES.values())
    )
    low, high = ((limit - mean) / spread for limit in FE_H_RANGE)
    fe_h = truncnorm.rvs(low, high, mean, spread, random_state=rng)
    alpha = np.clip(alpha + slope * fe_h, *limits.T) + ALPHA_SPREAD * rng.standard_normal(n)
    return {
        "SEQUENCE": np.array(list(SEQUENCES))[which],
        "FE_H": fe_h,
        "AGE": rng.uniform(*ages.T),
        "ALPHA_FE": alpha,
    }


# %%
#| export
def _corner(nodes, x):
    "Number of the node below each x, and how far it is to the next, from 0 to 1."
    place = np.interp(x, nodes, np.arange(len(nodes)))
    low = np.minimum(place.astype(int), len(nodes) - 2)
    return low, (place - low)[:, None]


def place_on_isochrones(
    age: np.ndarray,
    metallicity: np.ndarray,  # (n,) [Gyr], [M/H]
    logg_range: tuple,
    power: float,  # of the luminosity in the selection
    rng: np.random.Generator,
) -> dict:  # (n,) TEFF [K], LOGG, MASS [Msun], PHASE, LUMINOSITY in H [relative]; NaN where no such star lives
    "A star for each age and metallicity, drawn along its isochrone (interpolated at fixed EEP) by mass function and selection."
    grid = shipped_isochrones()
    i, a = _corner(grid.feh, metallicity)
    j, b = _corner(grid.log_age, np.log10(age) + 9)
    log_teff, logg, mass = (
        (1 - a) * ((1 - b) * cube[i, j] + b * cube[i, j + 1])
        + a * ((1 - b) * cube[i + 1, j] + b * cube[i + 1, j + 1])
        for cube in (grid.log_teff, grid.logg, grid.mass)
    )
    light = (
        mass
        * 10**-logg
        / np.expm1(constants.h * constants.c / constants.k / (1.63e-6 * 10**log_teff))
    )
    there = (
        np.isfinite(light)
        & (logg > logg_range[0])
        & (logg < logg_range[1])
        & (grid.phase[i, j] < 5)
    )
    weight = np.where(there, np.abs(np.gradient(mass, axis=1)) * mass**IMF_SLOPE * light**power, 0)
    total = np.cumsum(np.nan_to_num(weight), axis=1)
    place = (
        (total < rng.random((len(age), 1)) * total[:, -1:])
        .sum(axis=1)
        .clip(0, total.shape[1] - 1)[:, None]
    )
    pick = lambda cube: np.where(
        total[:, -1] > 0, np.take_along_axis(cube, place, axis=1)[:, 0], np.nan
    )
    return {
        "TEFF": 10 ** pick(log_teff),
        "LOGG": pick(logg),
        "MASS": pick(mass),
        "PHASE": pick(grid.phase[i, j]),
        "LUMINOSITY": pick(light),
    }


# %% [markdown]
# What the labels do not tell still shapes the spectrum. On the giant branch, deep convection has brought burnt matter up: less carbon, more nitrogen, and the more so the heavier
# the star. Turbulence grows with luminosity. Magnesium and silicon follow the alpha elements, each with a scatter of its own.

# %%
#| export
def draw_chemistry(stars: dict, rng: np.random.Generator) -> dict:
    "The labels of `GRID_LABELS` that the discs leave open: dredge-up by mass and gravity, turbulence by gravity, elements beside alpha."
    n, alpha, mass = len(stars["TEFF"]), stars["ALPHA_FE"], np.clip(stars["MASS"], 0.8, 2.5)
    mixed = np.clip((3.6 - stars["LOGG"]) / 0.8, 0, 1)  # dredge-up is over at log g 2.8
    normal = rng.standard_normal((5, n))
    return {
        "MG_FE": alpha + 0.02 + 0.05 * normal[0],
        "SI_FE": 0.8 * alpha + 0.01 + 0.05 * normal[1],
        "C_FE": 0.6 * alpha + mixed * (-0.10 - 0.14 * (mass - 1)) + 0.04 * normal[2],
        "N_FE": 0.2 * alpha + mixed * (0.18 + 0.25 * (mass - 1)) + 0.05 * normal[3],
        "VMICRO": usual_vmicro(np.minimum(stars["LOGG"], 4.4)) + 0.1 * normal[4],
    }


# %% [markdown]
# A few stars are not what the sample is made of: **dwarfs**, which a photometric selection lets in, and **binaries**, two stars in one fibre. A dwarf's companion is seen if it is
# not much fainter; a giant's only if it is a giant too. Nothing in the archive marks them but the truth table.

# %%
#| export
KINDS = {"giant": 0.965, "dwarf": 0.015, "binary": 0.02}  # shares
BINARY_VELOCITY = 20.0  # spread of the companion's velocity [km/s]
FIBRES = (12.8, 13.3, 13.8, 14.3)  # widths of the profile: fibres differ [km/s]
DWARFS_LOGG = (4.2, 4.75)
_DRAWS = 2.0  # candidates a star: some fall outside the emulator's domain


@cache
def _emulators():
    "The emulator of giants and that of dwarfs."
    return {"giants": Emulator.load(), "dwarfs": Emulator.load(domain="dwarfs")}


def _domain(logg):
    return np.where(np.asarray(logg) < 4, "giants", "dwarfs")


def _candidates(n, dwarfs, rng):
    "Stars of one kind inside the emulator's domain, as a table; fewer than n, some lie outside."
    discs = draw_discs(n, rng)
    where = place_on_isochrones(
        discs["AGE"],
        total_metallicity(discs["FE_H"], discs["ALPHA_FE"]),
        DWARFS_LOGG if dwarfs else GIANTS_LOGG,
        0.0 if dwarfs else LUMINOSITY_POWER,
        rng,
    )
    table = Table(discs | where | draw_chemistry(discs | where, rng))
    known = np.isfinite(table["TEFF"])
    known[known] = _emulators()["dwarfs" if dwarfs else "giants"].inside(
        table[list(GRID_LABELS)][known]
    )
    return table[known]


def _draw_kind(n, dwarfs, rng):
    "Exactly n stars of one kind."
    found = _candidates(int(_DRAWS * n) + 50, dwarfs, rng)
    if len(found) < n:
        raise LabError(
            f"only {len(found)} of {n} {'dwarfs' if dwarfs else 'giants'} lie in the emulator's domain: another seed, or another emulator"
        )
    return found[:n]


# %%
#| export
FIELDS = {
    "4230": (322.5, 12.2),
    "4262": (290.2, 37.8),
    "5162": (254.0, -3.0),
    "4241": (100.2, 9.9),
}  # made-up centres, RA and Dec [deg], one south
FIELD_RADIUS = 1.4  # deg
RATIOS = (0.15, 1.0)  # companion to primary, light in the H band


def _draw_binaries(n, dwarfs, rng):
    "Exactly n pairs of the same age and composition, the brighter one first; the companion in columns that end in _2."
    first = _candidates(int(12 * n) + 200, dwarfs, rng)
    limits = DWARFS_LOGG if dwarfs else GIANTS_LOGG
    other = Table(
        place_on_isochrones(
            np.array(first["AGE"]),
            total_metallicity(first["FE_H"], first["ALPHA_FE"]),
            limits,
            0.0,
            rng,
        )
    )
    ratio = np.asarray(other["LUMINOSITY"] / first["LUMINOSITY"])
    second = first.copy()
    for name in ("TEFF", "LOGG", "MASS", "PHASE", "LUMINOSITY"):
        second[name] = other[name]
    second["VMICRO"] = usual_vmicro(np.minimum(second["LOGG"], 4.4))
    known = np.isfinite(ratio) & (ratio > RATIOS[0]) & (ratio < RATIOS[1])
    known[known] = _emulators()[_domain(limits[0])[()]].inside(second[list(GRID_LABELS)][known])
    if known.sum() < n:
        raise LabError(f"only {known.sum()} of {n} binaries could be drawn: another seed")
    pairs, second = first[known][:n], second[known][:n]
    for name in GRID_LABELS:
        pairs[f"{name}_2"] = second[name]
    pairs["RATIO"], pairs["VELOCITY_2"] = ratio[known][:n], BINARY_VELOCITY * rng.standard_normal(n)
    return pairs


def draw_population(
    stars: int = STARS,
    seed: int = 42,
) -> Table:  # N rows: APOGEE_ID, KIND, SEQUENCE, LOCATION_ID, RA, DEC, AGE, MASS, GRID_LABELS, FWHM, companion (NaN for single stars)
    "The stars of the mock survey, with all that is true of them. Same seed, same stars."
    if stars < 20:
        raise LabError(
            f"a survey of {stars} stars is too small to hold every kind: ask for 20 or more"
        )
    rng = np.random.default_rng([seed, 2])
    dwarfs, binaries = (max(1, round(share * stars)) for share in (KINDS["dwarf"], KINDS["binary"]))
    parts = [
        ("giant", _draw_kind(stars - dwarfs - binaries, False, rng)),
        ("dwarf", _draw_kind(dwarfs, True, rng)),
        ("binary", _draw_binaries(binaries - binaries // 2, True, rng)),
        ("binary", _draw_binaries(binaries // 2, False, rng)),
    ]
    columns = list(dict.fromkeys(name for _, part in parts for name in part.colnames))
    table = Table(
        {
            name: np.concatenate(
                [
                    part[name] if name in part.colnames else np.full(len(part), np.nan)
                    for _, part in parts
                ]
            )
            for name in columns
        }
    )
    table["KIND"] = np.repeat([kind for kind, _ in parts], [len(part) for _, part in parts])
    table = table[rng.permutation(stars)]
    table["FWHM"] = rng.choice(FIBRES, stars)
    _place_on_sky(table, rng)
    return table


def _place_on_sky(table, rng):
    "Field, position and name."
    n = len(table)
    field = rng.choice(len(FIELDS), n)
    centre = np.array(list(FIELDS.values()))[field]
    radius, angle = FIELD_RADIUS * np.sqrt(rng.random(n)), rng.uniform(0, 2 * np.pi, n)
    table["LOCATION_ID"] = np.array(list(FIELDS), int)[field]
    table["DEC"] = centre[:, 1] + radius * np.sin(angle)
    table["RA"] = centre[:, 0] + radius * np.cos(angle) / np.cos(np.radians(table["DEC"]))
    sky = SkyCoord(table["RA"], table["DEC"], unit="deg")
    digits = zip(
        sky.ra.to_string("hour", sep="", precision=2, pad=True),
        sky.dec.to_string(sep="", precision=1, pad=True, alwayssign=True),
    )
    table["APOGEE_ID"] = [f"2M{ra}{dec}".replace(".", "") for ra, dec in digits]
    table["GLON"], table["GLAT"] = sky.galactic.l.deg, sky.galactic.b.deg


# %%
people = draw_population()
single = people["KIND"] == "giant"
assert len(people) == STARS and len(set(people["APOGEE_ID"])) == STARS
people["APOGEE_ID", "KIND", "SEQUENCE", "AGE", "TEFF", "LOGG", "FE_H", "MG_FE", "SI_FE"][:6]

# %% [markdown]
# Left, our giants in the Kiel diagram; the red clump is the knot at log g 2.5. Right, the two sequences. Where `STELLAR_LAB_REAL_DATA` names a folder of real files, 20,000 giants of
# the survey's data release 17 lie beneath.

# %%
folder = real_data()
dr17 = np.load(folder / "dr17_giants_labels.npz")["labels"].astype(float).T if folder else None
fig, axes = plt.subplots(1, 2, figsize=(10, 4.2))
if folder:
    axes[0].plot(dr17[0], dr17[1], ".", ms=1, color="0.8", zorder=0)
    axes[1].plot(dr17[2], dr17[3], ".", ms=1, color="0.8", zorder=0)
points = axes[0].scatter(people["TEFF"], people["LOGG"], c=people["FE_H"], s=4, cmap="viridis")
axes[0].set(xlabel=LABELS["TEFF"].axis, ylabel=LABELS["LOGG"].axis, xlim=(6400, 3400), ylim=(5, 0))
axes[1].scatter(people["FE_H"], people["ALPHA_FE"], c=people["FE_H"], s=4, cmap="viridis")
axes[1].set(
    xlabel=LABELS["FE_H"].axis, ylabel=r"[$\alpha$/Fe] [dex]", xlim=(-1.3, 0.6), ylim=(-0.15, 0.45)
)
fig.colorbar(points, ax=axes, label=LABELS["FE_H"].axis);

# %%
quantiles = (5, 16, 50, 84, 95)
rows = [
    ("mock", name, *np.percentile(people[name][single], quantiles).round(2))
    for name in ("TEFF", "LOGG", "FE_H", "ALPHA_FE")
]
if folder:
    there = (dr17[1] < GIANTS_LOGG[1]) & (dr17[2] > FE_H_RANGE[0]) & (dr17[0] > 3650)
    rows += [
        ("DR17", name, *np.percentile(column[there], quantiles).round(2))
        for name, column in zip(("TEFF", "LOGG", "FE_H", "ALPHA_FE"), dr17)
    ]
Table(rows=rows, names=["giants of", "label", *(f"{q} %" for q in quantiles)])

# %%
clump = (people["LOGG"] > 2.3) & (people["LOGG"] < 2.6) & single
assert (
    np.mean(people["PHASE"][clump] == 3) > 0.5 > np.mean(people["PHASE"][single & ~clump] == 3)
)  # the clump is made of stars that burn helium
rich = people["SEQUENCE"] == "alpha-rich"
assert np.median(people["ALPHA_FE"][rich]) > np.median(people["ALPHA_FE"][~rich]) + 0.1
mixed = single & (people["LOGG"] < 2.5)
assert (
    np.corrcoef(people["C_FE"][mixed] - people["N_FE"][mixed], people["MASS"][mixed])[0, 1] < -0.3
)  # what dredge-up writes into C/N: the mass
if folder:
    for name, column, tolerance in (
        ("LOGG", dr17[1], 0.3),
        ("FE_H", dr17[2], 0.08),
        ("ALPHA_FE", dr17[3], 0.05),
    ):
        assert abs(np.median(people[name][single]) - np.median(column[there])) < tolerance

# %% [markdown]
# ## Their light
# The emulator gives the spectrum of each star, in the profile of its fibre. A companion adds its own, shifted by the difference of velocities and weighed by the light that
# it gives at each wavelength. These are the true spectra: no noise, no continuum to find.

# %%
#| export
PIXEL_VELOCITY = constants.c / 1e3 * np.log(10) * LOG10_STEP  # km/s a pixel
_PADDED = np.arange(
    CHIPS["blue"][0] - 58, CHIPS["red"][1] + 58
)  # full-grid pixels, so that a shifted companion has no edge


def _single_spectra(labels, fwhm, grid):
    "Spectra of (N, 9) labels, each by the emulator of its domain and in its fibre's profile."
    flux, domain = (
        np.empty((len(labels), len(grid)), "f4"),
        _domain(labels[:, GRID_LABELS.index("LOGG")]),
    )
    for name, emulator in _emulators().items():
        for width in np.unique(fwhm[domain == name]):
            mine = (domain == name) & (fwhm == width)
            flux[mine] = emulator(labels[mine], grid, fwhm=width, outside="ignore")
    return flux


def companion_share(
    truth: Table,  # N binaries
) -> np.ndarray:  # (N, 7214) from 0 to 1
    "The companion's part of the light at each on-band pixel: two black bodies, of the given ratio in the H band."
    ratio = (
        np.asarray(truth["RATIO"])[:, None]
        * black_body(wavelength, truth["TEFF_2"])
        / black_body(wavelength, truth["TEFF"])
    )
    return ratio / (1 + ratio)


def true_spectra(
    truth: Table,  # N rows of `draw_population`, or of an archive's truth table
) -> np.ndarray:  # (N, 7214) float32, flux relative to the true continuum
    "What the stars send, without noise and with the continuum divided out."
    fwhm = np.asarray(truth["FWHM"], float)
    flux = _single_spectra(label_matrix(truth), fwhm, wavelength)
    double = np.flatnonzero(np.isfinite(truth["RATIO"]))
    if len(double):
        pairs = truth[double]
        theirs = _single_spectra(
            np.column_stack([np.asarray(pairs[f"{name}_2"], float) for name in GRID_LABELS]),
            fwhm[double],
            full_wavelength[_PADDED],
        )
        shift = np.asarray(pairs["VELOCITY_2"], float) / PIXEL_VELOCITY  # pixels, to the red
        place = np.broadcast_to(on_band - _PADDED[0], (len(double), len(on_band))) - shift[:, None]
        moved = map_coordinates(
            theirs,
            [np.broadcast_to(np.arange(len(double))[:, None], place.shape), place],
            order=3,
            mode="nearest",
        )
        share = companion_share(pairs)
        flux[double] = (1 - share) * flux[double] + share * moved
    return flux


# %%
truth_flux = true_spectra(people)
twin = people[people["KIND"] == "binary"][:1]
fig, axes = plt.subplots(2, 1, figsize=(9, 4.5))
shown = [
    int(np.flatnonzero(single & (people["LOGG"] < 1))[0]),
    int(np.flatnonzero(people["KIND"] == "dwarf")[0]),
]
for ax, window in zip(axes, ((15860, 15960), (16750, 16870))):
    for row, name, color in zip(shown, ("giant", "dwarf"), ("C0", "C1")):
        plot_spectrum(
            wavelength,
            truth_flux[row],
            window=window,
            ax=ax,
            lw=1,
            color=color,
            label=f"{name}, {people['TEFF'][row]:.0f} K, log g {people['LOGG'][row]:.1f}, [Fe/H] {people['FE_H'][row]:+.1f}",
        )
axes[0].legend(frameon=False, ncols=2, loc="lower left");

# %% [markdown]
# A pair's limits are known: with no light from the companion it is the primary alone; two equal stars at rest look like one.

# %%
alone, equal = twin.copy(), twin.copy()
alone["RATIO"] = 1e-9
for name in GRID_LABELS:
    equal[f"{name}_2"] = equal[name]
equal["RATIO"], equal["VELOCITY_2"] = 0.7, 0.0
one = _single_spectra(label_matrix(twin), np.asarray(twin["FWHM"]), wavelength)
assert np.allclose(true_spectra(alone), one, atol=1e-6) and np.allclose(
    true_spectra(equal), one, atol=1e-4
)
apart = equal.copy()
apart["VELOCITY_2"] = 60.0
assert np.isclose(
    (1 - true_spectra(apart)[0, 200:2700]).sum(), (1 - one[0, 200:2700]).sum(), rtol=0.02
)  # moving light around loses none

# %% [markdown]
# ## The instrument
# The night sky shines in hydroxyl lines at fixed places on the *detector*; on the star's rest frame they move with its velocity. Where a line is bright, the pixel carries the bit SIG_SKYLINE
# and a larger error. Water vapour of our own air absorbs (SIG_TELLURIC) and is divided out imperfectly. Some fibres of the blue chip remember the night before (persistence), all of
# that chip then has bits. Detectors have dead columns, and cosmic rays hit.

# %%
#| export
SKY_LINES, TELLURIC_BANDS = 190, 20  # that may be strong enough for a bit
SKY_SEED = 20140601  # of their places: the same sky for every archive
VELOCITY_SPREAD = 55.0  # km/s
SUPERPERSISTENCE, PERSISTENCE = (
    0.08,
    0.12,
)  # shares of the fibres: the whole blue chip, patches of it
DEAD_COLUMNS, COSMIC = 0.010, 0.0012  # shares of pixels
SNR_MEDIAN, SNR_SPREAD, SNR_RANGE = 125.0, 0.75, (15.0, 900.0)  # log-normal
TELLURIC_RESIDUAL = 0.004  # of the flux, what the division leaves
VISITS = {1: 0.40, 2: 0.20, 3: 0.35, 6: 0.05}


def _sky():
    "Brightness of the sky's lines (0 to 1, 0 between them) and flags of telluric bands on the full grid, at the observer's rest."
    rng = np.random.default_rng(SKY_SEED)
    lines, bands = np.zeros(len(full_wavelength), "f4"), np.zeros(len(full_wavelength), bool)
    for centre, width in zip(rng.integers(250, 8400, SKY_LINES), rng.integers(3, 8, SKY_LINES)):
        lines[centre : centre + width] = rng.random()
    for centre, width in zip(
        rng.integers(250, 8400, TELLURIC_BANDS), rng.integers(8, 30, TELLURIC_BANDS)
    ):
        bands[centre : centre + width] = True
    return lines, bands


def draw_mask(
    velocity: np.ndarray,  # (N,) [km/s]
    rng: np.random.Generator,
) -> np.ndarray:  # (N, 7214) int16 APOGEE_PIXMASK bits
    "Pixel masks: sky and air at fixed places of the detector, so the star's velocity moves them; persistence by fibre; columns and cosmic rays."
    n = len(velocity)
    shift = np.rint(velocity / PIXEL_VELOCITY).astype(int)
    detector = on_band[None] + shift[:, None]  # the place on the detector of each rest-frame pixel
    lines, bands = _sky()
    darkness = rng.uniform(0.1, 0.6, (n, 1))  # of the night: how bright a line must be for its bit
    bits = (lines[detector] > darkness) * PIXMASK.SIG_SKYLINE + bands[
        detector
    ] * PIXMASK.SIG_TELLURIC
    dead = (
        np.random.default_rng([SKY_SEED, 1]).random((30, len(full_wavelength))) < DEAD_COLUMNS
    )  # thirty bundles of fibres share their columns
    bits |= dead[rng.integers(30, size=n)[:, None], detector] * PIXMASK.BADPIX
    bits |= (rng.random(bits.shape) < COSMIC) * PIXMASK.CRPIX
    draw, blue = rng.random(n), on_band <= CHIPS["blue"][1]
    patch = rng.random((n, 1)) * 2400
    high = draw < SUPERPERSISTENCE
    some = ~high & (draw < SUPERPERSISTENCE + PERSISTENCE)
    bits |= (high[:, None] & blue) * PIXMASK.PERSIST_HIGH
    bits |= (
        some[:, None] & blue & (np.abs(on_band - CHIPS["blue"][0] - patch) < 450)
    ) * PIXMASK.PERSIST_LOW
    return bits.astype("i2")


def observe(
    flux: np.ndarray,  # (N, 7214) true spectra
    snr: np.ndarray,  # (N,)
    mask: np.ndarray,  # (N, 7214)
    rng: np.random.Generator,
) -> tuple:  # flux, error (N, 7214) float32
    "Photon noise by the light that is there, more under sky lines; imperfect telluric division, memory of the detector and cosmic rays where the mask says so."
    relative = np.sqrt(np.clip(flux, 0.05, None)) / snr[:, None]
    sky, air = (mask & PIXMASK.SIG_SKYLINE) > 0, (mask & PIXMASK.SIG_TELLURIC) > 0
    error = (relative * np.where(sky, 6.0, np.where(air, 1.5, 1.0))).astype("f4")
    observed = flux + error * rng.standard_normal(flux.shape, dtype="f4")
    observed += air * (TELLURIC_RESIDUAL * 4 * rng.standard_normal(flux.shape, dtype="f4"))
    observed += ((mask & PIXMASK.PERSIST_HIGH) > 0) * np.abs(
        rng.normal(0.06, 0.03, (len(flux), 1))
    ).astype("f4")
    observed += ((mask & PIXMASK.CRPIX) > 0) * rng.exponential(0.4, flux.shape).astype("f4")
    dead = (mask & PIXMASK.BADPIX) > 0
    return np.where(dead, 0, observed).astype("f4"), np.where(dead, 0, error).astype("f4")


# %%
rng = np.random.default_rng(5)
masks = draw_mask(VELOCITY_SPREAD * rng.standard_normal(len(people)), rng)
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
    f"**What to see.** Left, black is a pixel with a bit: sky lines move with each star's velocity, some stars have lost their blue chip. On average {flagged.mean():.1%} of the pixels "
    f"carry one (the survey's spectra: about 16.5 %); {np.mean(flagged * masks.shape[1] > 3000):.1%} of the stars have more than 3000 and will be dropped."
)

# %%
quiet_flux, quiet_error = observe(
    truth_flux[:300],
    np.full(300, 100.0),
    np.zeros((300, len(wavelength)), "i2"),
    np.random.default_rng(0),
)
pull = (quiet_flux - truth_flux[:300]) / quiet_error
assert abs(pull.std() - 1) < 0.01 and abs(pull.mean()) < 0.01  # the stated errors are the noise's
assert np.isclose(
    np.median(truth_flux[:300] / quiet_error), 100, rtol=0.05
)  # and the SNR means what it says
assert 0.15 < flagged.mean() < 0.18 and 0.05 < np.mean(flagged > 3000 / 7214) < 0.12
moved = (
    draw_mask(np.array([0.0, 41.4189]), np.random.default_rng(1)) & PIXMASK.SIG_TELLURIC
)  # ten pixels' worth of velocity
assert np.array_equal(
    moved[0, 110:2900], moved[1, 100:2890]
)  # what the air does stays on the detector

# %% [markdown]
# ## The catalogue
# Labels are measured too. A catalogue's have errors, which grow when the noise does, and *trends*: its temperatures are a little too low for hot stars and too high for cool ones, and
# so on. A model that learns from a catalogue learns its trends; the truth table keeps them apart, so that a bias can be told from what was planted. Some stars got no labels.

# %%
#| export
LABEL_ERRORS = {
    "TEFF": 35.0,
    "LOGG": 0.07,
    "FE_H": 0.020,
    "MG_FE": 0.022,
    "SI_FE": 0.022,
}  # of a bright star
FAINT = 70.0  # SNR at which noise has doubled an error's square
NO_LABELS, ONE_MISSING = (
    0.07,
    0.03,
)  # shares of stars without any label, without one of the abundances


def catalogue_trend(
    truth: Table,
) -> dict:  # label -> (N,) what the catalogue is off, without noise
    "The trends planted in the catalogue, in the sense catalogue minus truth."
    warm, compact = (np.asarray(truth["TEFF"]) - 4500) / 500, np.asarray(truth["LOGG"]) - 2.2
    return {
        "TEFF": -18 * warm,
        "LOGG": 0.04 * compact,
        "FE_H": 0.012 * warm,
        "MG_FE": -0.08 * (np.asarray(truth["MG_FE"]) - 0.1),
        "SI_FE": 0.012 * warm,
    }


def draw_catalogue(
    truth: Table,
    snr: np.ndarray,
    rng: np.random.Generator,
) -> Table:  # the five labels and their _ERR, NaN where the survey has none
    "What a pipeline would have measured: truth, trend, and errors like the survey's."
    n, trend, table = len(truth), catalogue_trend(truth), Table()
    growth = np.sqrt(1 + (FAINT / snr) ** 2)
    for name, error in LABEL_ERRORS.items():
        sigma = error * growth * rng.uniform(0.85, 1.15, n)
        table[name], table[f"{name}_ERR"] = (
            np.asarray(truth[name]) + trend[name] + sigma * rng.standard_normal(n),
            sigma,
        )
    nothing, one = rng.random(n) < NO_LABELS * growth**2, rng.random((2, n)) < ONE_MISSING
    for name in LABEL_ERRORS:
        lost = nothing | (one[int(name == "SI_FE")] if name in ("MG_FE", "SI_FE") else False)
        for column in (name, f"{name}_ERR"):
            table[column] = np.where(lost, np.nan, table[column])
    for name in LABELS:
        for column in {name, f"{name}_ERR"} & set(table.colnames):
            table[column].unit = LABELS[name].unit
    return table


# %%
labels = draw_catalogue(people, np.full(len(people), 100.0), np.random.default_rng(2))
trend = catalogue_trend(people)
fig, axes = plt.subplots(1, 5, figsize=(13, 2.6), layout="constrained")
for ax, name in zip(axes, LABEL_ERRORS):
    ax.plot(people[name], labels[name] - people[name], ".", ms=1, color="0.6")
    ax.plot(people[name], trend[name], ".", ms=1, color="C1")
    ax.set(xlabel=LABELS[name].axis, title="catalogue - truth" if name == "TEFF" else "")

# %% [markdown]
# **What to see.** Grey, what the catalogue is off; orange, the trend in it, as a function of the true labels.

# %%
for name, error in LABEL_ERRORS.items():
    rest = (labels[name] - people[name] - trend[name]) / labels[f"{name}_ERR"]
    assert (
        abs(np.nanstd(rest) - 1) < 0.05 and abs(np.nanmean(rest)) < 0.08
    )  # the stated errors are honest once the trend is known
assert 0.05 < np.mean(np.isnan(labels["TEFF"])) < np.mean(np.isnan(labels["MG_FE"])) < 0.25


# %% [markdown]
# ## Put together
# `mock_stars` draws them, `write_mock` writes them; `stellar-lab archive mock ROOT` is the same on the command line.

# %%
#| export
def mock_stars(
    stars: int = STARS,
    seed: int = 42,
) -> tuple:  # Spectra as the writer takes them (observed flux beside the true continuum, catalogue labels), truth Table
    "A synthetic survey as it was observed, and its truth. Same seed, same arrays."
    truth = draw_population(stars, seed)
    rng = np.random.default_rng([seed, 3])
    n = len(truth)
    snr = np.clip(SNR_MEDIAN * np.exp(SNR_SPREAD * rng.standard_normal(n)), *SNR_RANGE)
    velocity = VELOCITY_SPREAD * rng.standard_normal(n)
    mask = draw_mask(velocity, rng)
    flux, error = observe(true_spectra(truth), snr, mask, rng)
    with np.errstate(divide="ignore"):
        ivar = np.where(error > 0, 1 / error**2, 0).astype("f4")
    h = np.clip(
        12.2 - 2.5 * np.log10(snr / SNR_MEDIAN) / 1.3 + 0.3 * rng.standard_normal(n), 6.5, 14.0
    )
    colour = 0.75 + (4600 - truth["TEFF"]) / 2500
    facts = {
        "APOGEE_ID": truth["APOGEE_ID"],
        "FIELD": [f"MOCK-{number}" for number in truth["LOCATION_ID"]],
        "LOCATION_ID": truth["LOCATION_ID"],
        "TELESCOPE": ["apo25m"] * n,
        "SNR": snr,
        "NVISITS": rng.choice(list(VISITS), n, p=list(VISITS.values())),
        "J": h + colour,
        "H": h,
        "K": h - 0.15,
        "RA": truth["RA"],
        "DEC": truth["DEC"],
        "GLON": truth["GLON"],
        "GLAT": truth["GLAT"],
        "VHELIO": velocity,
        "VSCATTER": np.abs(rng.normal(0.1, 0.05, n)),
        "VERR": 0.02 + 2 / snr,
        "TEFF_CONTINUUM": truth["TEFF"],
    }
    catalogue = draw_catalogue(truth, snr, rng)
    for name, offset in catalogue_trend(truth).items():
        truth[f"{name}_TREND"] = offset
    table = Table(facts | {name: catalogue[name] for name in catalogue.colnames})
    table.meta = {"product": "aspcapstar", "release": "mock", "archive": "mock", "normalized": True}
    return Spectra(wavelength, flux, ivar, table, mask), truth


def write_mock(
    root,  # folder to make
    seed: int = 42,
    stars: int = None,  # how many; the lab's 2,723 by default
    flaws: dict = None,  # name of a flaw -> how many; all of FLAWS by default
    workers: int = None,  # processes; one a core by default
    progress: bool = True,
) -> ArchiveSummary:
    "Write the archive of synthetic stars in DR14's files, the truth beside them. Same seed, same bytes."
    spectra, truth = mock_stars(STARS if stars is None else stars, seed)
    return write_archive(
        root, spectra, "mock", seed, truth=truth, flaws=flaws, workers=workers, progress=progress
    )


# %% [markdown]
# A hundred stars will do to see that it works: the files, read back by the lab's own reader, hold the observed flux; the catalogue does not know what the truth table knows.

# %%
scratch = tempfile.TemporaryDirectory()
root = Path(scratch.name) / "mock"
print(write_mock(root, stars=100, progress=False))
truth = read_truth(root)
truth["APOGEE_ID", "FLAW", "KIND", "TEFF", "LOGG", "FE_H", "MG_FE", "SI_FE", "TEFF_TREND"][:5]

# %%
spectra, ledger = read_archive(root)
kept, ledger = apply_cuts(spectra, ledger=ledger)
ledger

# %%
rows = [list(truth["APOGEE_ID"]).index(name) for name in kept.stars["APOGEE_ID"]]
expected = np.array([truth[name][rows] + truth[f"{name}_TREND"][rows] for name in LABEL_ERRORS]).T
assert np.all(
    np.abs(kept.labels(LABEL_ERRORS) - expected) / kept.label_errors(LABEL_ERRORS) < 6
)  # each file under its own star's labels
assert not {"KIND", "SEQUENCE", "RATIO", "C_FE", "TEFF_CONTINUUM"} & set(
    spectra.stars.colnames
)  # nothing of the truth leaks
assert set(ARCHIVES["mock"].labels) == set(LABEL_ERRORS) and set(
    np.unique(spectra.stars["LOCATION_ID"]).astype(str)
) <= set(ARCHIVES["mock"].fields)

# %% [markdown]
# Same seed, same bytes; another seed, another survey.

# %%
again, other = Path(scratch.name) / "again", Path(scratch.name) / "other"
for folder_, seed in ((again, 42), (other, 43)):
    write_mock(folder_, stars=30, seed=seed, flaws={}, workers=1, progress=False)
digest = tree_digest(again)
write_mock(Path(scratch.name) / "third", stars=30, flaws={}, workers=2, progress=False)
assert tree_digest(Path(scratch.name) / "third") == digest != tree_digest(other)
scratch.cleanup()

# %% [markdown]
# ## Hard in the right ways
# If a quadratic could reproduce these spectra exactly, the archive would flatter The Cannon. So fit the quadratic to *true* spectra at *true* labels, without noise, and see
# how far it stays off at the median pixel: what is left is curvature of higher order, and what the five labels do not say.

# %%
train = single & (np.arange(len(people)) % 2 == 0)
five = np.column_stack([people[name] for name in LABEL_ERRORS])
best = Cannon().fit(
    five[train],
    truth_flux[train],
    ivar=np.full(truth_flux[train].shape, 1e4, "f4"),
    label_names=list(LABEL_ERRORS),
)
test = single & ~train
off = np.sqrt(np.mean((best.predict(five[test]) - truth_flux[test]) ** 2, axis=0))

# %%
#| echo: false
Markdown(
    f"The best quadratic stays **{np.median(off):.2%}** off at the median pixel, {np.percentile(off, 95):.2%} at the worst twentieth."
)

# %%
assert 0.001 < np.median(off) < 0.01

# %% [markdown]
# **Exercise.** Draw two surveys that differ only in the width of the fibres' profiles (`FIBRES`). How much of the quadratic's error is that? And which label would take it up, if
# all fibres of one field were narrower than those of the others?
