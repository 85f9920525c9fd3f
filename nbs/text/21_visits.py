# %% [markdown]
# # How well does a star repeat?
# > Single visits on the detector's own pixels: read, brought to rest, combined, and labelled one by one.
#
# **Question.** The survey sees most stars several times and combines the visits. What happens on the way from a visit to the combination? And if we label each visit by
# itself, do the labels scatter as their errors say?
#
# **Idea.** A visit is a spectrum on a grid of its own, in the frame of the observatory. With the velocity in its header it is brought to rest,
# $\lambda_0=\lambda/(1+v/c)$; interpolated onto common pixels; and averaged with weights $1/\sigma^2$. All of it can be checked, because the survey keeps its own
# version of every step. And repeats are the one honest test of an error that needs no truth: the star is the same, so what differs between visits is error.
#
# You learn what stands in an apVisit file, how visits are combined, and the test of repeats. You need [a spectrum of your own](20_spectrum.ipynb).

# %%
#| default_exp visits

# %%
#| export
import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import QTable, Table, vstack

from stellar_lab.clean import (
    GENTLE,
    STRICT,
    MaskRule,
    Problem,
    checked_hdus,
    product_of,
    read_stars,
    star_fact,
    weigh_mask,
)
from stellar_lab.inversion import infer
from stellar_lab.models import ERROR_MODEL, LabelModel, label_values
from stellar_lab.normalize import as_trained
from stellar_lab.spectrum import LIGHT, from_arrays, interpolate, label_star, lsf_fwhm
from stellar_lab.survey import (
    PIXMASK,
    PRODUCTS,
    LabError,
    Spectra,
    chip_slices,
)
from stellar_lab.survey import wavelength as SURVEY_WAVELENGTH

# %%
#| hide
import tempfile

import matplotlib.pyplot as plt
import pytest

from stellar_lab.cannon import Cannon
from stellar_lab.judging import with_error_model
from stellar_lab.models import train_test_rows
from stellar_lab.normalize import training_set
from stellar_lab.survey import archive_root, label_record, real_data, use_style

# %%
#| hide
use_style()

# %% [markdown]
# ## Which pixels count?
# [A rule](02_clean.ipynb) says which bits of the survey's mask kill a pixel, and which only raise its error. For visits it is the gentle one: broken pixels die, doubtful ones count less.

# %%
bits = np.array([0, PIXMASK.CRPIX, PIXMASK.PERSIST_LOW, PIXMASK.PERSIST_LOW | PIXMASK.PERSIST_HIGH])
print("gentle", GENTLE.factors(bits), " strict", STRICT.factors(bits))
assert list(GENTLE.factors(bits)) == [1, np.inf, 3, 5]

# %% [markdown]
# ## One visit
# An apVisit file ([data model](https://data.sdss.org/datamodel/files/APOGEE_REDUX/APRED_VERS/TELESCOPE/PLATE_ID/MJD5/apVisit.html)) holds arrays of three chips by
# 4,096 pixels, the red chip first, wavelengths falling: flux (HDU 1), error (2), mask (3), wavelength (4), then sky, tellurics and the coefficients of wavelength and
# line-spread function. The header gives the velocity in the frame of the observatory (`VRAD`), the barycentric correction (`BC`) and their sum (`VHELIO`).

# %%
#| exporti
_SHAPE = (3, 4096)
_UNDITHERED = (3, 2048)


def is_visit(path, whole: bool = True) -> bool:
    """Whether a file is an apVisit file: its first extensions are three chips of 4,096 pixels, or
    of 2,048 for a visit whose exposures were not shifted by half a pixel. With `whole` False the
    flux alone will do."""
    try:
        with checked_hdus(path) as (hdus, _):
            return _is_visit(hdus, whole)
    except Exception:  # whatever a damaged file makes astropy raise
        return False


def _is_visit(hdus, whole=True):
    "Whether the HDUs of a file are those of a visit."
    needed = (1, 2, 3, 4) if whole else (1,)
    if len(hdus) <= max(needed):
        return False
    shape = hdus[1].shape
    right = shape in (_SHAPE, _UNDITHERED)
    return right and all(hdus[k].is_image and hdus[k].shape == shape for k in needed)


def _of_visit(path):
    """Header, arrays (flux, error, mask, wavelength), and whether there was a checksum, of a visit;
    LabError for another file."""
    with checked_hdus(path, "apVisit files") as (hdus, verified):
        if not _is_visit(hdus):
            raise LabError(f"{path} is no apVisit file: {_no_visit(hdus)}")
        arrays = [np.array(hdus[k].data, float) for k in (1, 2)]
        arrays += [np.array(hdus[3].data, np.int64), np.array(hdus[4].data, float)]
        return hdus[0].header.copy(), arrays, verified


def _no_visit(hdus):
    "What a file lacks that an apVisit file has."
    if len(hdus) > 1 and hdus[1].shape in (_SHAPE, _UNDITHERED):
        return "it has the pixels, but error, mask and wavelength must follow in HDUs 2 to 4"
    return "that has arrays of 3 x 4,096 pixels"


# %% [markdown]
# No real visit is shipped with this book, so here the file is made: a real giant, moved, put onto detector pixels of the true shape, with noise. `made_visit` writes to
# the letter of the data model as far as this chapter reads.

# %%
#| exporti
_CHIP_STARTS = (  # first wavelength and steps at both ends of each chip [Angstrom], as they are
    (16_954.9, -0.1063, -0.1290),
    (16_435.6, -0.1305, -0.1516),
    (15_810.4, -0.1531, -0.1726),
)


def _detector():
    "Wavelengths (3, 4096) like those of a visit, the red chip first, falling."
    rows = []
    for start, first, last in _CHIP_STARTS:
        steps = np.linspace(first, last, _SHAPE[1] - 1)
        rows.append(start + np.concatenate([[0], np.cumsum(steps)]))
    return np.array(rows)


# %%
for chip, row in zip(("red", "green", "blue"), _detector()):
    print(f"{chip:6} {row[0]:.1f} to {row[-1]:.1f} Å in steps of {-np.diff(row).mean():.3f}")


# %%
#| exporti
def made_visit(
    grid, flux, error, velocity, bc=0.0, name="star", mjd=58_000, seed=0, good=None
) -> fits.HDUList:
    """An apVisit file of a star whose spectrum is known.

    Parameters
    ----------
    grid, flux : (P,) arrays
        spectrum at rest, finite [Angstrom, vacuum]
    error : float
        of the noise of the visit's pixels, in the unit of the flux
    velocity, bc : float
        of the star in the frame of the observatory, barycentric correction [km/s]
    good : (P,) bool array, optional
        where the spectrum is known; elsewhere the visit's pixels are flagged as bad

    Returns
    -------
    HDUList
    """
    angstrom = _detector()
    rest = angstrom / (1 + velocity / LIGHT)
    order = np.argsort(rest, axis=None)
    weight = np.ones(len(grid)) if good is None else np.asarray(good, float)
    sharp, weight = interpolate(grid, flux, weight, rest.ravel()[order])
    seen = np.zeros(rest.size)
    known = np.zeros(rest.size, bool)
    seen[order] = sharp
    known[order] = weight > 0
    seen, known = seen.reshape(_SHAPE), known.reshape(_SHAPE)
    noise = error * np.random.default_rng(seed).standard_normal(_SHAPE)
    arrays = [
        np.where(known, seen + noise, 0).astype("f4"),
        np.where(known, error, 1e10).astype("f4"),
        np.where(known, 0, 1).astype("i2"),
        angstrom,
    ]
    header = fits.Header({"OBJID": name, "TELESCOP": "apo25m", "MJD5": mjd, "BC": bc})
    header.update(
        {"VRAD": velocity, "VHELIO": velocity + bc, "SNR": float(np.median(seen) / error)}
    )
    return fits.HDUList([fits.PrimaryHDU(header=header), *map(fits.ImageHDU, arrays)])


# %%
scratch = tempfile.TemporaryDirectory()
here = Path(scratch.name)
flat = here / "apVisit-flat.fits"
made_visit(SURVEY_WAVELENGTH, np.ones(7214), 0.01, velocity=-20.0, bc=5.0).writeto(flat)
print(f"{flat.name} is a visit: {is_visit(flat)}")
header, (flux, error, mask, angstrom), _ = _of_visit(flat)
print(flux.shape, "pixels,", f"{np.mean(mask == 0):.0%} of them good")


# %%
#| export
def _header_velocity(header):
    """VRAD, else VHELIO - BC; None where the header has neither, or the survey found none and wrote
    0 or a number that no star has."""
    numbers = {key: _number_of(header.get(key)) for key in ("VRAD", "VHELIO", "BC")}
    for value in (numbers["VRAD"], numbers["VHELIO"] - numbers["BC"]):
        if np.isfinite(value) and 0 < abs(value) < 2_000:
            return float(value)
    return None


def _number(header, key, missing):
    "The number of a card, in the type of what stands for none."
    value = header.get(key, missing)
    kinds = (int,) if isinstance(missing, int) else (int, float)
    right = isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < 1e6
    return type(missing)(value) if right else missing


def _number_of(value):
    "A card's value as a number; NaN for text, nothing or what stands for nothing."
    try:
        number = float(value)
    except (TypeError, ValueError):
        return np.nan
    return number if abs(number) < 9_000 else np.nan


def _lsf_widths(path, angstrom):
    "FWHM (3, 4096) of each pixel [Angstrom], from the coefficients in a visit's HDU 10."
    with checked_hdus(path, "apVisit files") as (hdus, _):
        if len(hdus) <= 10 or not hdus[10].is_image or hdus[10].data is None:
            raise LabError(f"{Path(path).name} has no coefficients of its line-spread function")
        chips = np.array(hdus[10].data, float)
    if chips.ndim != 2 or len(chips) != 3:
        raise LabError(f"{Path(path).name} has no line-spread function for each chip")
    widths = [lsf_fwhm(chip, np.arange(angstrom.shape[1])) for chip in chips]
    return np.array(widths) * np.abs(np.gradient(angstrom, axis=1))


# %%
print("as the header has it:", _header_velocity(header))
print("without VRAD:", _header_velocity({"VHELIO": -15.0, "BC": 5.0}))
print("where the survey found none:", _header_velocity({"VRAD": 0.0, "VHELIO": 999999.0}))


# %%
#| export
def read_visit(path, velocity=None, rule: MaskRule = GENTLE, lsf: bool = False) -> Spectra:
    """One visit, on its own pixels, at rest.

    Parameters
    ----------
    path : str or Path
        an apVisit file
    velocity : float or "measure", optional
        by which to bring it to rest [km/s], in the frame of the observatory; by default what its
        header says. "measure" leaves it to `label_star`
    rule : MaskRule, optional
        which pixels count
    lsf : bool, default False
        take the resolution of each pixel from the file's line-spread function; the model's
        resolution by default

    Returns
    -------
    Spectra
        of one star; the columns MJD, BC and VELOCITY say when and how it moved

    Raises
    ------
    LabError
        where the file is damaged or another
    """
    header, (flux, error, mask, angstrom), verified = _of_visit(path)
    if velocity is None:
        velocity = _header_velocity(header)
    with np.errstate(invalid="ignore"):
        factors = rule.factors(mask)
        error = np.where(error < 1e10, error, 0) * factors
    name = str(header.get("OBJID", Path(path).stem)).strip()
    velocity = None if velocity == "measure" else velocity
    widths = _lsf_widths(path, angstrom).ravel() if lsf else None
    unit = "AA" if np.nanmedian(angstrom) > 1_000 else None  # guessed where it is no Angstrom
    how = {"unit": unit, "velocity": velocity, "name": name, "fwhm": widths}
    how |= {"doubtful": factors > 1}
    visit = from_arrays(angstrom, flux, error, **how)
    facts = {"FILE": Path(path).name, "TELESCOPE": str(header.get("TELESCOP", "")).strip()}
    facts |= {name: star_fact(name, header.get(name)) for name in ("RA", "DEC")}
    facts |= {"MJD": _number(header, "MJD5", -1), "BC": _number(header, "BC", np.nan)}
    for column, value in facts.items():
        visit.stars[column] = [value]
    visit.stars["VERIFIED"] = [verified]
    visit.stars.meta["product"] = "apvisit"
    return visit


# %%
spectra, _ = training_set(archive_root(), progress=False)
learn, left_out = train_test_rows(len(spectra))
giants = Cannon(scatter=True).fit(spectra[learn])
row = left_out[np.argmax(spectra.stars["SNR"][left_out])]
good = spectra.ivar[row] > 0
quiet = np.interp(np.arange(len(good)), np.flatnonzero(good), spectra.flux[row][good])
moves = {-55.2: 0.012, -44.6: 0.011, 12.0: 0.02, 31.4: 0.015}  # km/s: error of the visit
paths = []
for k, (velocity, error) in enumerate(moves.items()):
    paths.append(here / f"apVisit-r8-5094-{55_874 + k}-088.fits")
    made = made_visit(SURVEY_WAVELENGTH, quiet, error, velocity, bc=-5.4, mjd=55_874 + k, seed=k)
    made.writeto(paths[-1])
visit = read_visit(paths[0])
print(visit, float(visit.stars["VELOCITY"][0]))
assert is_visit(paths[0]) and visit.stars["MJD"][0] == 55_874


# %% [markdown]
# ## At rest, and on the survey's pixels
# To compare or to average visits they must share pixels. Interpolation by Lanczos kernels keeps the lines sharp; where a common pixel is wider than the detector's, it
# takes in all that it covers, so no light is thrown away. A pixel that leans on a broken one is unusable.

# %%
#| exporti
def on_grid(visit: Spectra, grid=SURVEY_WAVELENGTH) -> Spectra:
    """A visit at rest, on other pixels.

    Parameters
    ----------
    visit : Spectra
        one star, as `read_visit` gives it
    grid : (P,) array, optional
        wavelengths; the survey's on-band pixels by default

    Returns
    -------
    Spectra
        raw flux in the file's unit, ready for `as_trained`
    """
    level = visit.stars.meta.get("level", 1.0)
    flux, ivar = interpolate(visit.wavelength, visit.flux[0], visit.ivar[0], grid)
    stars = visit.stars.copy()
    stars.meta = {"product": "apstar", "normalized": False, "level": 1.0, "row": None}
    flux = np.where(ivar > 0, flux, 0) * level
    ivar = (ivar / level**2).astype(np.float32)
    return Spectra(
        grid, flux.astype(np.float32)[None], ivar[None], stars, np.zeros((1, len(grid)), int)
    )


# %%
seen = on_grid(visit)
difference = (seen.flux[0] - quiet)[seen.ivar[0] > 0] * np.sqrt(seen.ivar[0][seen.ivar[0] > 0])
print(f"visit less star, in its errors: median size {np.median(np.abs(difference)):.2f}")
assert 0.5 < np.median(np.abs(difference)) < 0.8  # 0.67 for a Gaussian


# %% [markdown]
# ## Combined
# Nights differ: the same star is brighter or redder through another atmosphere. So each visit is first brought to the level of the best one, by a parabola for each chip,
# and then averaged with the weights of its pixels.

# %%
#| export
def _tilt(visit, best):
    "Smooth ratio (P,) of a visit to the best one, a parabola for each chip; 1 where nothing is."
    ratio = np.ones(len(visit.wavelength))
    both = (visit.ivar[0] > 0) & (best.ivar[0] > 0) & (best.flux[0] > 0)
    for chip in chip_slices(visit.wavelength).values():
        good = np.flatnonzero(both[chip]) + chip.start
        if len(good) < 100:
            continue
        x = (visit.wavelength - visit.wavelength[chip].mean()) / 300
        quotient = visit.flux[0][good] / best.flux[0][good]
        weight = np.sqrt(visit.ivar[0][good]) * best.flux[0][good]
        kept = np.abs(quotient / np.median(quotient) - 1) < 0.5
        curve = np.polyfit(x[good][kept], quotient[kept], 2, w=weight[kept])
        ratio[chip] = np.polyval(curve, x[chip])
    return np.where(ratio > 0, ratio, 1)


def combine(visits) -> Spectra:
    """One spectrum of several visits of a star: the mean of their pixels, weighted by 1/error^2.

    Parameters
    ----------
    visits : list of Spectra
        at rest and on the same pixels, as `on_grid` gives them

    Returns
    -------
    Spectra
        one star

    Raises
    ------
    LabError
        where there is no visit, or they have other pixels
    """
    visits = list(visits)
    if not visits:
        raise LabError("there are no visits to combine")
    if any(not np.array_equal(v.wavelength, visits[0].wavelength) for v in visits):
        raise LabError("the visits have other pixels: bring each to the same with on_grid")
    best = visits[int(np.argmax([np.median(v.flux[0] * np.sqrt(v.ivar[0])) for v in visits]))]
    light = np.zeros(len(best.wavelength))
    weight = np.zeros(len(best.wavelength))
    for visit in visits:
        ratio = _tilt(visit, best)
        own = visit.ivar[0].astype(float) * ratio**2
        light += own * visit.flux[0] / ratio
        weight += own
    flux = np.where(weight > 0, light / np.where(weight > 0, weight, 1), 0)
    stars = best.stars.copy()
    known = flux[weight > 0] * np.sqrt(weight[weight > 0])
    stars["SNR"] = [float(np.median(known)) if len(known) else 0.0]
    stars["NVISITS"] = [len(visits)]
    return best.replace(
        flux=flux.astype(np.float32)[None], ivar=weight.astype(np.float32)[None], stars=stars
    )


# %%
together = combine([on_grid(read_visit(path)) for path in paths])
snr = [read_visit(path).stars["SNR"][0] for path in paths]
print(f"SNR of the visits {np.round(snr)}, together {together.stars['SNR'][0]:.0f}")
good = together.ivar[0] > 0
left = (together.flux[0] - quiet)[good] * np.sqrt(together.ivar[0][good])
assert 0.5 < np.median(np.abs(left)) < 0.8


# %% [markdown]
# ## The survey's own combination
# Where the survey's files are at hand (`STELLAR_LAB_REAL_DATA`), our steps meet the survey's: three visits of one giant, and the apStar file that was made of them, whose
# rows 2 to 4 are the visits at rest.

# %%
def survey_row(path, row):
    "Flux, error and mask of one row of an apStar file, on-band."
    spectra = read_stars([path], PRODUCTS["apstar"], row=row, progress=False)[0]
    return spectra.flux[0].astype(float), spectra.ivar[0].astype(float), spectra.mask[0]


real = real_data()
if real is None:
    print("Skipped: STELLAR_LAB_REAL_DATA is not set, so there are no visits of the survey.")
else:
    real_visits = sorted((real / "own").glob("apVisit-*.fits"))
    star_file = real / "apStar-r6-2M00005143+5615568.fits"
    used = (-55.161, -44.637, -43.029)  # the combination's own velocities [km/s]
    rows = []
    shown = []
    for k, (path, velocity) in enumerate(zip(real_visits, used)):
        ours = on_grid(read_visit(path, velocity, MaskRule(GENTLE.kill)))
        flux, ivar, mask = survey_row(star_file, k + 2)
        good = (ours.ivar[0] > 0) & (ivar > 0) & (mask & int(GENTLE.kill) == 0)
        for name, chip in chip_slices(SURVEY_WAVELENGTH).items():
            on = np.flatnonzero(good[chip]) + chip.start
            scale = np.median(flux[on] / ours.flux[0][on])
            off = (ours.flux[0][on] * scale - flux[on]) * np.sqrt(ivar[on])
            trend = np.polyfit(np.linspace(-1, 1, len(on)), off, 1)[0]
            rows.append((k + 1, name, len(on), np.median(np.abs(off)), trend))
            shown.append((SURVEY_WAVELENGTH[on], off))
    names = ["visit", "chip", "pixels", "median |difference| / error", "trend along the chip"]
    agreement = Table(rows=rows, names=names)
    for name in names[3:]:
        agreement[name].info.format = ".3f"
    display(agreement)
    assert np.all(agreement["median |difference| / error"] < 0.6)
    assert np.all(np.abs(agreement["trend along the chip"]) < 0.1)

# %%
if real is not None:
    fig, ax = plt.subplots(figsize=(9, 2.6))
    for grid, off in shown[:3]:
        ax.plot(grid, off, ".", ms=1.5, alpha=0.5)
    ax.set(xlabel="vacuum wavelength [Å]", ylabel="(ours - survey) / error", ylim=(-5, 5))
    ax.set_title("One visit, brought to rest by us and by the survey")

# %% [markdown]
# **What to see.** No step between chips, no slope, and a scatter well below the errors: both start from the same photons, and differ only in how they interpolate.
#
# The combination, the velocities and the labels follow. A velocity is measured with nothing of the header's.

# %%
if real is not None:
    ours = combine(
        [on_grid(read_visit(p, v, MaskRule(GENTLE.kill))) for p, v in zip(real_visits, used)]
    )
    flux, ivar, mask = survey_row(star_file, 1)
    good = (ours.ivar[0] > 0) & (ivar > 0) & (mask & int(GENTLE.kill) == 0)
    for name, chip in chip_slices(SURVEY_WAVELENGTH).items():
        on = np.flatnonzero(good[chip]) + chip.start
        scale = np.median(flux[on] / ours.flux[0][on])
        off = (ours.flux[0][on] * scale - flux[on]) * np.sqrt(ivar[on])
        print(f"{name:6} combination, median |difference| / error {np.median(np.abs(off)):.2f}")
        assert np.median(np.abs(off)) < 1


# %%
def judged_model(spectra, learn, left_out):
    "A Cannon with calibrated errors."
    model = Cannon(scatter=True).fit(spectra[learn])
    kept = spectra[left_out]
    return with_error_model(model, infer(model, kept), kept.labels())


model = judged_model(spectra, learn, left_out)
if real is not None:
    found = [label_star(model, read_visit(path, "measure")) for path in real_visits]
    velocities = [round(float(one.table["velocity"].value[0]), 2) for one in found]
    print("measured", velocities, "used by the survey", used)
    assert np.all(np.abs(np.array(velocities) - used) < 0.5)
    sharp = [read_visit(path, lsf=True).stars["RESOLUTION"][0] for path in real_visits]
    print("resolution by the files' line-spread functions:", np.round(sharp, -2))
    assert np.all((np.array(sharp) > 20_000) & (np.array(sharp) < 27_000))
    table = vstack([one.table for one in found] + [infer(model, as_trained(model, ours))])
    display(table["teff", "teff_err", "logg", "logg_err", "m_h", "m_h_err", "flags"])
    for name in ("teff", "logg", "m_h"):
        away = np.abs(table[name][:3] - table[name][3]) / table[f"{name}_err"][:3]
        assert np.all(away < 1), name

# %% [markdown]
# The same holds for the visits that we made, where the velocities are known.

# %%
found = [label_star(model, read_visit(path, "measure")) for path in paths]
velocities = np.array([float(one.table["velocity"].value[0]) for one in found])
rest = velocities.mean() - np.mean(list(moves))  # what is left in the survey's file of the star
print("measured less made:", np.round(velocities - list(moves), 2))
assert np.all(np.abs(velocities - list(moves) - rest) < 0.2)


# %% [markdown]
# ## The test of repeats
# Visits of one star have one set of labels. With $V$ visits, values $\ell_v$ and errors $\sigma_v$, and $\bar\ell$ their weighted mean,
# $$ \chi^2_\mathrm{repeat} = \sum_v \frac{(\ell_v-\bar\ell)^2}{\sigma_v^2} \approx V-1 , $$
# and its root over $V-1$ is the ratio of the real scatter to the stated error. *Formal* errors, photon noise alone, should give 1 if noise is all that changes from
# visit to visit. *Calibrated* errors hold what is wrong with the model, too; this error is the same in all visits, so the ratio must be below 1. Repeats measure
# precision, not accuracy.

# %%
#| export
def _rows_of(path):
    "How many rows of single visits an apStar file has; 0 for a star that was seen once."
    with checked_hdus(path, "apStar files") as (hdus, _):
        shape = hdus[1].shape
    return max(shape[0] - 2, 0) if len(shape) == 2 else 0


def _label_visits(model: LabelModel, path, rule: MaskRule = GENTLE) -> QTable:
    """Labels of each visit of a star.

    Parameters
    ----------
    model : LabelModel
        fitted
    path : str or Path
        an apStar file with single visits (rows 2 and on), or an apVisit file
    rule : MaskRule, optional
        which pixels count

    Returns
    -------
    QTable
        as `infer` gives it, one row per visit, with `snr` and `visit`

    Raises
    ------
    LabError
        where the file holds no visits
    """
    if is_visit(path):
        visit = read_visit(path, rule=rule)
        found = label_star(model, visit).table
        found["snr"] = np.asarray(visit.stars["SNR"], float)
        found["visit"] = [str(Path(path).name)]
        return found
    if product_of(path) != "apstar":
        raise LabError(f"{path} holds no visits: give apStar or apVisit files")
    parts = []
    for row in range(2, _rows_of(path) + 2):
        spectra, problems = read_stars([path], PRODUCTS["apstar"], row=row, progress=False)[::2]
        if problems:
            raise LabError(str(problems[0]))
        parts.append(_label_row(model, weigh_mask(spectra, rule), row))
    if not parts:
        raise LabError(f"{Path(path).name}: the star was seen once, there is nothing to compare")
    return vstack(parts, metadata_conflicts="silent")


def _label_row(model, spectra, row):
    "Labels of one visit of an apStar file."
    raw = (
        np.median((spectra.flux * np.sqrt(spectra.ivar))[spectra.ivar > 0])
        if spectra.ivar.any()
        else 0
    )
    table = infer(model, as_trained(model, spectra), any_recipe=True)
    table["snr"] = [float(raw)]
    table["visit"] = [f"row {row}"]
    return table


# %%
each = vstack([_label_visits(model, path) for path in paths], metadata_conflicts="silent")
for name in ("snr", "teff", "teff_err", "m_h", "m_h_err"):
    each[name].info.format = ".3f" if name.startswith("m_h") else ".0f"
each["visit", "snr", "teff", "teff_err", "m_h", "m_h_err"]


# %%
#| exporti
def _formal(model):
    "The model as if nobody had calibrated its errors."
    plain = copy.copy(model)
    for learned in ERROR_MODEL:
        vars(plain).pop(learned, None)
    return plain


@dataclass
class Repeats:
    """What visits of the same stars say of a model's errors; `print` shows it.

    Attributes
    ----------
    table : Table
        one row per label and range of SNR: visits, scatter, formal and quoted errors, and the
        ratios of the scatter to each
    visits : QTable
        the labels of each visit, with `star`, `snr`, and `formal_<label>`
    problems : list of Problem
        files without visits
    """

    table: Table
    visits: QTable
    problems: list

    def __str__(self):
        stars = len(np.unique(np.asarray(self.visits["star"])))
        head = f"{len(self.visits)} visits of {stars} stars"
        lines = self.table.pformat(max_lines=-1, max_width=-1)
        said = [f"left out: {problem}" for problem in self.problems]
        return "\n".join([head, "", *lines, *said])


def _differences(visits, name):
    "Each visit less its star's weighted mean, made as wide as a single visit's error (N,)."
    values = label_values(visits, [name])[:, 0]
    errors = label_values(visits, [f"formal_{name}"])[:, 0]
    away = np.full(len(values), np.nan)
    stars = np.asarray(visits["star"])
    for star in np.unique(stars):
        mine = np.flatnonzero((stars == star) & np.isfinite(values) & (errors > 0))
        if len(mine) > 1:
            weight = errors[mine] ** -2
            mean = np.average(values[mine], weights=weight)
            left = 1 - weight / weight.sum()  # of the variance, after the mean was taken out
            away[mine] = (values[mine] - mean) / np.sqrt(left)
    return away


# %%
toy = QTable({"star": ["a", "a", "b", "b"], "teff": [4_000.0, 4_020, 4_500, 4_500]})
toy["formal_teff"] = 10.0
_differences(toy, "teff").round(1)  # star a scatters by 20 K / √2, star b not at all

# %%
#| export
_SNR_EDGES = (0, 30, 60, 100, 200, np.inf)


def _repeat_rows(visits, name):
    "Rows of the table of repeats for one label, one per range of SNR that holds visits."
    away = _differences(visits, name)
    snr = np.asarray(visits["snr"], float)
    formal, quoted = (
        label_values(visits, [column])[:, 0] for column in (f"formal_{name}", f"{name}_err")
    )
    for low, high in zip(_SNR_EDGES[:-1], _SNR_EDGES[1:]):
        chosen = np.isfinite(away) & (snr >= low) & (snr < high)
        if chosen.sum() < 2:
            continue
        scatter = np.sqrt(np.mean(away[chosen] ** 2))
        by_formal = np.sqrt(np.mean((away / formal)[chosen] ** 2))
        by_quoted = np.sqrt(np.mean((away / quoted)[chosen] ** 2))
        middle = (np.median(formal[chosen]), np.median(quoted[chosen]))
        span = f"{low:g}-{high:g}" if np.isfinite(high) else f">{low:g}"
        yield name, span, chosen.sum(), scatter, *middle, by_formal, by_quoted


_REPEAT_COLUMNS = (
    *("label", "SNR", "visits", "scatter", "formal error", "quoted error"),
    *("scatter/formal", "scatter/quoted"),
)

# %%
toy["teff_err"] = 40.0
toy["snr"] = 80.0
for told in _repeat_rows(toy, "teff"):
    for name, value in zip(_REPEAT_COLUMNS, told):
        print(f"{name:15}", value if isinstance(value, str) else f"{value:g}")


# %%
#| exporti
def find_visits(paths) -> list:
    """Files that may hold visits, from files and folders.

    Parameters
    ----------
    paths : sequence of str or Path
        folders are searched for apStar and apVisit files, down to the last one

    Returns
    -------
    list of Path
        sorted within each folder

    Raises
    ------
    LabError
        where there is nothing
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = (p for kind in ("Star", "Visit") for p in path.rglob(f"a[ps]{kind}-*.fits*"))
            found += sorted(inside)
        elif path.exists():
            found.append(path)
        else:
            raise LabError(f"there is no file or folder {path}")
    if not found:
        raise LabError("there are no apStar or apVisit files: name files or folders")
    return found


# %%
found = find_visits([here])
print(*(path.name for path in found), sep="\n")
assert found == sorted([*paths, flat])


# %%
#| export
def repeats(model: LabelModel, paths, rule: MaskRule = GENTLE) -> Repeats:
    """The test of repeats: how far labels of the same star's visits scatter, and the errors.

    Parameters
    ----------
    model : LabelModel
        fitted; its quoted errors are calibrated if it is
    paths : sequence of str or Path
        apStar files with single visits, apVisit files
    rule : MaskRule, optional
        which pixels count

    Returns
    -------
    Repeats

    Raises
    ------
    LabError
        where no star has two visits

    Examples
    --------
    >>> from stellar_lab import repeats
    >>> print(repeats(model, ["apStar-r8-2M21334193-0048169.fits"]))  # doctest: +SKIP
    """
    plain = _formal(model)
    tables = []
    problems = []
    for path in paths:
        try:
            table = _label_visits(model, path, rule)
            formal = _label_visits(plain, path, rule)
        except LabError as error:
            problems.append(Problem(str(path), str(error)))
            continue
        for name in model.label_names_:
            table[f"formal_{name.lower()}"] = formal[f"{name.lower()}_err"]
        table["star"] = [str(star) for star in table["apogee_id"]]
        tables.append(table)
    visits = vstack(tables, metadata_conflicts="silent") if tables else QTable({"star": []})
    rows = (
        [row for name in model.label_names_ for row in _repeat_rows(visits, name.lower())]
        if tables
        else []
    )
    if not rows:
        few = "; ".join(map(str, problems[:3]))
        raise LabError(f"no star has two visits{f': {few}' if few else ''}")
    table = Table(rows=rows, names=_REPEAT_COLUMNS)
    for name in _REPEAT_COLUMNS[3:]:
        table[name].info.format = ".3g"
    return Repeats(table, visits, problems)


# %%
stars = [
    path for path in sorted(archive_root().rglob("apStar-*.fits")) if path.stat().st_size > 420_000
]
names = set(map(str, spectra.stars["APOGEE_ID"][left_out]))
some = [path for path in stars if path.stem.split("-", 2)[2] in names and _rows_of(path) > 1][:24]
again = repeats(model, some)
again.table[[name in ("teff", "m_h") for name in again.table["label"]]]

# %%
fig, axes = plt.subplots(2, 1, figsize=(6, 5.5), sharex=True)
for ax, name in zip(axes, ("teff", "m_h")):
    away = _differences(again.visits, name)
    ax.plot(again.visits["snr"], np.abs(away), ".", ms=4, color="0.6", label="|visit - mean|")
    formal = label_values(again.visits, [f"formal_{name}"])[:, 0]
    quoted = label_values(again.visits, [f"{name}_err"])[:, 0]
    order = np.argsort(again.visits["snr"])
    ax.plot(again.visits["snr"][order], formal[order], ".", ms=3, color="C0", label="formal error")
    ax.plot(again.visits["snr"][order], quoted[order], ".", ms=3, color="C1", label="quoted error")
    ax.set(ylabel=label_record(name).axis, yscale="log")
axes[-1].set_xlabel("SNR of the visit")
fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
axes[0].set_title("Visits of the same real giants: differences and errors");

# %% [markdown]
# **What to see.** Grey points follow the blue ones: from visit to visit little changes but the noise. The quoted, calibrated error lies far above. It holds what is wrong
# in all visits alike, and repeats cannot see that.

# %%
table = again.table
high = np.array([span not in ("0-30", "30-60") for span in table["SNR"]])
assert np.all(table["scatter/quoted"] < 1), "calibrated errors must cover the repeats"
assert np.median(table["scatter/formal"][high]) < 2

# %% [markdown]
# A test that could not fail would prove nothing: with errors that are stated four times too small the ratio is four times larger.

# %%
boast = _formal(model)
for path in paths[:1]:
    with pytest.raises(LabError, match="no star has two visits"):
        repeats(boast, [path])
shrunk = again.visits.copy()
for name in ("teff", "formal_teff"):
    shrunk[f"{name}_err" if name == "teff" else name] = (
        shrunk[f"{name}_err" if name == "teff" else name] / 4
    )
told = next(_repeat_rows(shrunk, "teff"))
assert np.isclose(told[-1], 4 * next(_repeat_rows(again.visits, "teff"))[-1])

# %% [markdown]
# ## What a mask costs
# Strict or gentle? The archive's masks hold broken pixels only, so we plant what happens to real stars: the whole blue chip is flagged for weak persistence. How many
# pixels are left, how far do labels move, and what do errors become?

# %%
raw = read_stars(some[:8], PRODUCTS["apstar"], progress=False)[0]
blue = np.arange(len(SURVEY_WAVELENGTH)) < chip_slices(SURVEY_WAVELENGTH)["blue"].stop
raw = raw.replace(mask=np.where(blue, raw.mask | int(PIXMASK.PERSIST_LOW), raw.mask))
strict = infer(model, as_trained(model, weigh_mask(raw, STRICT)), any_recipe=True)
gentle = infer(model, as_trained(model, weigh_mask(raw, GENTLE)), any_recipe=True)
usual = infer(model, as_trained(model, raw))
assert np.allclose(
    strict["teff"].value, usual["teff"].value, rtol=1e-5
)  # strict is what we do today
effect = Table(
    {"star": raw.stars["APOGEE_ID"], "pixels, strict": strict["n_good"], "gentle": gentle["n_good"]}
)
effect["teff moves [K]"] = (gentle["teff"] - strict["teff"]).value
effect["error, strict"] = strict["teff_err"].value
effect["error, gentle"] = gentle["teff_err"].value
both = np.hypot(effect["error, strict"], effect["error, gentle"])
for name in effect.colnames[3:]:
    effect[name].info.format = ".1f"
effect

# %%
assert np.all(gentle["n_good"] > strict["n_good"] + 1000)
assert np.all(np.abs(effect["teff moves [K]"]) < 2 * both)

# %% [markdown]
# On the command line the rule is `--mask gentle`, `--mask dr17`, or one of your own such as `--mask 'kill=BADPIX,CRPIX raise=PERSIST_LOW:3'`: `train` writes it into the model, `label` follows
# the model unless it is told otherwise. The survey's giant with persistence on nearly all of its blue chip, where the files are at hand:

# %%
if real is not None:
    raw = read_stars([star_file], PRODUCTS["apstar"], progress=False)[0]
    for word, rule in (("strict", STRICT), ("gentle", GENTLE)):
        found = infer(model, as_trained(model, weigh_mask(raw, rule)), any_recipe=True)[0]
        print(
            f"{word}: {found['n_good']} pixels, Teff {found['teff']:.0f} +- {found['teff_err']:.0f}"
        )


# %% [markdown]
# ## Which lines decided?
# The best labels move if one pixel's flux moves. To first order, with $J$ the derivatives of the spectrum and $C$ the covariance of the labels,
# $$ \frac{\partial\ell}{\partial f_p} = C\,J_p\,w_p , $$
# so the pixel's residual pulls the labels by this times the residual. Summed over a line, in units of the error, it says which line decided, and which one disagrees with
# the others.

# %%
#| export
def influence(model, spectra: Spectra, table, row: int = 0) -> np.ndarray:
    """How much each label moves per unit of each pixel's flux.

    Parameters
    ----------
    model : Cannon
        fitted, on the star's pixels (as `model_for` or `label_star` gives it)
    spectra : Spectra
        relative to the continuum
    table : QTable
        of `infer`, for these spectra
    row : int, default 0
        which star

    Returns
    -------
    (K, P) array
        physical units of the label per unit of flux; 0 where a pixel is unusable
    """
    labels = label_values(table[[row]], model.label_names_)
    slopes = np.nan_to_num(model.derivative(labels)[0])
    scatter = np.nan_to_num(model.scatter_) ** 2
    ivar = np.where(model.usable_, spectra.ivar[row], 0).astype(float)
    weight = ivar / (1 + ivar * scatter)
    information = (slopes * weight) @ slopes.T
    return np.linalg.solve(information, slopes * weight)


def line_influence(model, spectra: Spectra, table, row: int = 0, width: float = 5.0) -> Table:
    """Which parts of a spectrum decided a star's labels, and where each pulls.

    Parameters
    ----------
    model, spectra, table, row
        as for `influence`
    width : float, default 5
        of a part [Angstrom]

    Returns
    -------
    Table
        the middle of each part [Angstrom]; for each label its share of the information, in
        per cent, and `<label>_pull`, by how much it moved the label, in the label's errors
    """
    labels = label_values(table[[row]], model.label_names_)
    rest = np.nan_to_num(spectra.flux[row] - model.predict(labels)[0])
    moves = influence(model, spectra, table, row)
    parts = np.floor((spectra.wavelength - spectra.wavelength[0]) / width).astype(int)
    used = np.unique(parts)
    found = Table({"wavelength": [spectra.wavelength[parts == part].mean() for part in used]})
    ivar = np.where(spectra.ivar[row] > 0, spectra.ivar[row], np.inf)
    variance = 1 / ivar + np.nan_to_num(model.scatter_) ** 2
    for name, move in zip(model.label_names_, moves):
        noise = np.where(np.isfinite(ivar), move**2 * variance, 0)
        share = np.bincount(parts, noise)[used]
        found[name.lower()] = 100 * share / share.sum()
        found[f"{name.lower()}_pull"] = np.bincount(parts, move * rest)[used] / np.sqrt(noise.sum())
    return found


# %%
treated = as_trained(giants, read_stars(some[:1], PRODUCTS["apstar"], progress=False)[0])
labels = infer(giants, treated)
decided = line_influence(giants, treated, labels)
top = decided[np.argsort(decided["teff"])[::-1][:5]]
for name in top.colnames:
    top[name].info.format = ".1f" if name == "wavelength" else ".2f"
top["wavelength", "teff", "teff_pull", "m_h", "m_h_pull"]

# %%
fig, ax = plt.subplots(figsize=(7, 2.8))
for name, color in (("teff", "C0"), ("m_h", "C3")):
    share = decided["wavelength"], decided[name]
    ax.step(*share, where="mid", lw=0.8, color=color, label=label_record(name).symbol)
ax.set(xlabel="vacuum wavelength [Å]", ylabel="share of the variance [%]")
ax.set_title("Where one giant's temperature and metallicity come from")
ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1));

# %% [markdown]
# The derivative can be checked by brute force: raise the flux of a few pixels a little, label again, and compare.

# %%
pixel = int(np.argmax(np.abs(influence(giants, treated, labels)[0])))
nudged = treated.flux.copy()
nudged[0, pixel] += 1e-3
moved = infer(giants, treated.replace(flux=nudged))["teff"][0] - labels["teff"][0]
expected = influence(giants, treated, labels)[0, pixel] * 1e-3
print(f"moved {moved.value:.4f} K, expected {expected:.4f} K")
assert np.isclose(moved.value, expected, rtol=0.2)

# %% [markdown]
# **Exercise.** Combine three of the four visits that we made, leaving out each in turn. How far do the labels move, and is it what the formal errors of the combination
# say?

# %%
#| hide
scratch.cleanup()
