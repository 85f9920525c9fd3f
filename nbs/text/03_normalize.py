# %% [markdown]
# # Where would the light be without the lines?
# > The pseudo-continuum of every star at once, the pixels it is drawn through, and what becomes of the pixels nobody should trust.
#
# **Question.** The same giant seen from twice as far, through dust, or through a fibre that drinks some of its light gives another spectrum but is
# the same star. Which part of the numbers is the star's?
#
# **Idea.** Divide it out. A smooth curve $c(\lambda)$ through pixels that hardly any line touches stands for lamp, dust and spectrograph together,
# and the star's lines are what is left: $f/c$ with the inverse variance $c^2/\sigma^2$. The curve is a polynomial of degree two on each of the
# three chips, and the weighted least squares behind it need nothing but *moments of the weights*,
# $$ \sum_k\Bigl(\sum_p w_p\,x_p^{\,j+k}\Bigr)a_k = \sum_p w_p\,x_p^{\,j}\,f_p ,\qquad w_p = 1/\sigma_p^2 , $$
# which are two matrix products for all stars together, and then a 3 × 3 system per star. That is why there is no loop over stars in this chapter.
#
# It is called *pseudo*-continuum because in a cool, metal-rich giant no pixel is free of lines: the curve is a convention, and what counts is that
# it is the same for every star. You need [the table of stars](02_clean.ipynb); the rule is that of [Ness et al.
# 2015](https://doi.org/10.1088/0004-637X/808/1/16) as the original lab applied it.

# %%
#| default_exp normalize

# %%
#| export
import os
import stat
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
from astropy.table import Table
from numpy.polynomial.polynomial import polyvander
from sklearn.utils.validation import check_is_fitted

from stellar_lab.clean import (
    STRICT,
    Ledger,
    MaskRule,
    apply_cuts,
    keep,
    nan_median,
    read_archive,
    weigh_mask,
)
from stellar_lab.survey import (
    CHIP_COLORS,
    CHIPS,
    LOG10_START,
    LOG10_STEP,
    N_PIXELS,
    PIXMASK,
    PIXMASK_NAMES,
    PRODUCTS,
    LabError,
    Spectra,
    WrongFile,
    chip_slices,
    data_file,
    full_wavelength,
    on_band,
    plot_spectrum,
    said_of,
    wavelength,
)

# %%
#| hide
import tempfile

import matplotlib.pyplot as plt
import pytest
from IPython.display import Markdown

from stellar_lab.archives import MYSTERY_FILE, true_continuum
from stellar_lab.cannon import Cannon
from stellar_lab.clean import read_files
from stellar_lab.inversion import infer
from stellar_lab.judging import cross_label, error_table
from stellar_lab.models import fold_numbers
from stellar_lab.survey import (
    LABELS,
    archive_record,
    archive_root,
    read_truth,
    real_data,
    use_style,
)


# %% [markdown]
# ## Pixels that lines hardly touch
# The original lab came with a ready list: 529 of the 7,214 pixels, chosen by [Ness et al. 2015](https://doi.org/10.1088/0004-637X/808/1/16) from the data
# because their flux is close to one in all stars and depends least on the labels. ([The Cannon](05_cannon.ipynb) finds such a list itself: one needs a model of the
# stars for it.) They are spread unevenly, for the green chip has half as many as the blue one, and that will be seen in the results.

# %%
#| export
def lab_continuum_pixels() -> np.ndarray:
    """The 529 continuum pixels of the original lab (Ness et al. 2015).

    Returns
    -------
    (7214,) bool array
        on-band grid
    """
    with data_file("continuum_pixels.npy") as path:
        return np.load(path)


# %%
continuum_pixels = lab_continuum_pixels()
chips = chip_slices(wavelength)
assert continuum_pixels.shape == wavelength.shape and continuum_pixels.sum() == 529
{name: int(continuum_pixels[chip].sum()) for name, chip in chips.items()}


# %% [markdown]
# Your own list may come as a file: flags or pixel numbers saved by numpy, or plain text with one wavelength per line. A wavelength has to meet a pixel
# within a quarter of its width. That is strict on purpose: a list in *air* wavelengths, 4.4 Å off, would otherwise fall on the wrong pixels in
# silence.

# %%
#| export
def _position(wavelengths):
    "Place on the full grid, in pixels."
    return (np.log10(wavelengths) - LOG10_START) / LOG10_STEP


def _pixels_at(wavelengths, path):
    "Full-grid pixels at these wavelengths."
    with np.errstate(divide="ignore", invalid="ignore"):
        position = _position(wavelengths)
    pixel = np.rint(np.nan_to_num(position, nan=-1, posinf=-1, neginf=-1)).astype(int)
    wrong = ~(np.abs(position - pixel) <= 0.25) | (pixel < 0) | (pixel >= N_PIXELS)
    if wrong.any():
        raise LabError(
            f"{path}: {wrong.sum()} of {len(wavelengths)} wavelengths meet no pixel of the "
            f"survey's grid, the first is {wavelengths[wrong][0]:.2f}: give vacuum wavelengths in "
            "Angstrom from survey.wavelength"
        )
    return pixel


# %%
some_wavelengths = wavelength[continuum_pixels][:3].round(1)
print("at", some_wavelengths, "are the pixels", _pixels_at(some_wavelengths, "a list"))
with pytest.raises(LabError) as problem:
    _pixels_at(wavelength[continuum_pixels] - 4.4, "a list in air")
print(problem.value)


# %% [markdown]
# A list may count the pixels on the chips (7,214, the *on-band* grid) or all of them (8,575, the full grid). What it means follows from its length and type.

# %%
#| export
def _chosen_pixels(values, path):
    "Full-grid pixels that a list of flags, pixel numbers or wavelengths means."
    if len(values) in (len(wavelength), N_PIXELS) and np.isin(values, (0, 1)).all():
        return np.flatnonzero(values) if len(values) == N_PIXELS else on_band[values != 0]
    if values.dtype.kind == "b":
        raise LabError(
            f"{path} holds {len(values)} flags, but the grids have {len(wavelength)} (on the "
            f"chips) or {N_PIXELS} (all) pixels"
        )
    if path.suffix != ".npy" or values.dtype.kind not in "iu":
        return _pixels_at(values, path)
    wrong = (values < 0) | (values >= len(wavelength))
    if wrong.any():
        raise LabError(
            f"{path} names pixel {values[wrong][0]}, but the on-band pixels are numbered 0 to "
            f"{len(wavelength) - 1}"
        )
    return on_band[values]


# %%
on_full_grid = np.isin(np.arange(N_PIXELS), on_band[continuum_pixels])
forms = {
    "flags on the chips": continuum_pixels,
    "flags of all pixels": on_full_grid,
    "pixel numbers": np.flatnonzero(continuum_pixels),
    "wavelengths": wavelength[continuum_pixels],
}
for form, values in forms.items():
    chosen = _chosen_pixels(values, Path("pixels.npy"))
    print(f"{form}: {len(values)} values mean {len(chosen)} pixels")
    assert np.array_equal(chosen, np.flatnonzero(on_full_grid))

# %%
#| export
_LARGEST_LIST = 10_000_000  # bytes of a list of pixels


def _listed(path):
    "What a list of pixels holds; nothing is allocated that is larger than the file."
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise WrongFile("it is no file")
    if found.st_size > _LARGEST_LIST:
        raise WrongFile(f"it has {found.st_size:,} bytes, far too many for a list of pixels")
    if path.suffix != ".npy":
        return np.loadtxt(path, ndmin=1)
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(values, np.ndarray):
        raise WrongFile("it holds several arrays")
    return np.array(values)


def read_continuum_pixels(path) -> np.ndarray:
    """Read a list of continuum pixels.

    Parameters
    ----------
    path : str or Path
        .npy: flags of the on-band or the full grid, or numbers of on-band pixels; else text:
        vacuum wavelengths [Angstrom], # comments

    Raises
    ------
    LabError
        that says what is wrong with the file

    Returns
    -------
    (7214,) bool array
        on-band grid
    """
    path = Path(path)
    try:
        values = _listed(path)
    except Exception as error:  # whatever a foreign or damaged file brings about
        raise LabError(
            f"cannot read continuum pixels from {path} ({said_of(error)}): give a .npy file of "
            "flags, or text, one wavelength per line"
        ) from error
    if values.ndim != 1 or values.dtype.kind not in "biuf" or not len(values):
        raise LabError(
            f"{path} holds an array of shape {values.shape} and type {values.dtype}: give one row "
            "of flags, pixel numbers or wavelengths"
        )
    chosen = _chosen_pixels(values, path)
    off = ~np.isin(chosen, on_band)
    if off.any():
        first = full_wavelength[chosen[off][0]]
        raise LabError(
            f"{path}: {off.sum()} of {len(chosen)} pixels lie beside the chips, the first at "
            f"{first:.2f} Angstrom, where not every star has light: take them out"
        )
    return np.isin(on_band, chosen)


# %%
with tempfile.TemporaryDirectory() as folder:
    text = Path(folder) / "pixels.txt"
    np.savetxt(text, wavelength[continuum_pixels], fmt="%.1f", header="vacuum [Angstrom]")
    from_text = read_continuum_pixels(text)
    np.savetxt(text, wavelength[continuum_pixels] - 4.4)  # air
    with pytest.raises(LabError, match="wavelengths meet no pixel.*give vacuum wavelengths"):
        read_continuum_pixels(text)
print(f"read from text: {from_text.sum()} pixels")
assert np.array_equal(from_text, continuum_pixels)


# %% [markdown]
# ## Outliers first
# A cosmic ray on a continuum pixel would pull the curve up. So the chip's continuum pixels, taken in order, are cut into *runs* of 20 of the list,
# whatever gaps lie between them; the last run takes what remains (20 to 39 pixels, for a run of one pixel would be its own median and could never
# be doubted). The median of a run is that of its usable pixels, and a pixel further than 10 % from it is dropped. Cutting by the list and not by
# what is usable in this star makes the runs the same for all stars, and medians of all runs of all stars one sort of a three-dimensional array.

# %%
#| export
def _inliers(flux, good, run=20, tolerance=0.1):
    """Which of a chip's M continuum pixels are left without the outliers of each run, (N, M) bool.

    From flux (N, M) and what is usable (N, M): a pixel stays that is at most `tolerance` of the
    median of its run away from it.
    """
    n_stars, n_pixels = flux.shape
    head = max(n_pixels // run - 1, 0) * run  # pixels of all runs but the last
    values = np.where(good, flux, np.nan)
    median = np.empty_like(values)
    runs = values[:, :head].reshape(n_stars, head // run, run)
    median[:, :head] = np.repeat(nan_median(runs), run, axis=1)
    median[:, head:] = nan_median(values[:, head:])[:, None]
    return np.abs(values - median) <= tolerance * np.abs(median)  # False where either is NaN


# %% [markdown]
# Sixty pixels whose light falls slowly, with noise of 1 %; three of them were hit.

# %%
rng = np.random.default_rng(3)
number = np.arange(60)
falling = (1.2 - number / 300) * rng.normal(1, 0.01, 60)
falling[[11, 30, 52]] *= [1.4, 1.25, 0.7]
stays = _inliers(falling[None], np.ones((1, 60), bool))[0]
fig, ax = plt.subplots(figsize=(7, 2.8))
for run in number.reshape(3, 20):
    middle = np.median(falling[run])
    ax.fill_between(run, 0.9 * middle, 1.1 * middle, color="0.9")
ax.plot(number[stays], falling[stays], ".", color="C0")
ax.plot(number[~stays], falling[~stays], "x", color="red", ms=7, mew=1.5)
ax.set(xlabel="continuum pixel", ylabel="flux", title="Three runs of 20 pixels, and outliers");

# %%
assert np.flatnonzero(~stays).tolist() == [11, 30, 52]


# %% [markdown]
# **What to see.** Each run has a band of its own, 10 % above and below its median (grey), so a slow fall of the light costs nothing. The three pixels that
# were hit lie outside.
#
# The reference implementation is the plain loop over stars and runs, written as the rule is spoken. Random fluxes with a scatter of 7 % put about every seventh
# pixel beyond the limit, and lists of 5 to 108 pixels try all shapes of the last run; three of the stars have no usable pixel at all.

# %%
def inliers_loop(flux, good, run=20, tolerance=0.1):
    keep = np.zeros_like(good)
    starts = [run * i for i in range(max(flux.shape[1] // run, 1))]
    for n in range(len(flux)):
        for first, last in zip(starts, [*starts[1:], flux.shape[1]]):
            pixels = [p for p in range(first, last) if good[n, p]]
            if pixels:
                middle = np.median(flux[n, pixels])
                near = [p for p in pixels if abs(flux[n, p] - middle) <= tolerance * middle]
                keep[n, near] = True
    return keep


# %%
dropped = []
for n_pixels in (5, 20, 39, 40, 41, 108):
    y = rng.normal(1, 0.07, (30, n_pixels))
    usable = rng.random((30, n_pixels)) < 0.7
    usable[:3] = False
    kept_pixels = _inliers(y, usable)
    assert np.array_equal(kept_pixels, inliers_loop(y, usable))
    dropped.append(1 - kept_pixels.sum() / usable.sum())
print("share dropped, by the number of pixels:", np.round(dropped, 2))

# %% [markdown]
# ## The polynomials of all stars
# Powers of the wavelength in Ångström would be numbers like $10^{17}$, and their sums would lose all digits, so $x$ runs from -1 to 1 over the
# chip. All is done in float64: it is a small part of the work. A system is called singular when its condition number says that fewer than four
# digits of the answer would hold, which happens when one pixel outweighs all others. Since only ratios of weights matter, each star's are divided
# by their largest: whether a star is bright or faint then makes no difference to the digits.

# %%
#| export
_MAX_CONDITION = 1e12


def _fit_polynomials(x, y, weights, degree=2):
    """Weighted least squares of N polynomials at once, from the moments of the weights.

    From abscissae (M,) of about -1 to 1, values (N, M) and inverse variances (N, M), 0 leaves a
    point out: (N, degree + 1) coefficients of 1, x, x², …, and (N,) bool, whether the points
    determine them. Coefficients are zero where they do not.
    """
    powers = polyvander(x, 2 * degree)
    weights = np.asarray(weights, float)
    with np.errstate(invalid="ignore"):
        weights = np.nan_to_num(weights / weights.max(axis=1, initial=0, keepdims=True))
    moments = weights @ powers
    matrix = moments[:, np.add.outer(np.arange(degree + 1), np.arange(degree + 1))]
    right = (weights * np.where(weights > 0, y, 0)) @ powers[:, : degree + 1]
    solvable = np.linalg.cond(matrix) < _MAX_CONDITION
    matrix[~solvable] = np.eye(degree + 1)
    right[~solvable] = 0
    return np.linalg.solve(matrix, right[..., None])[..., 0], solvable


# %% [markdown]
# Two checks: `np.polyfit` (its weights multiply the residuals, so it wants $1/\sigma$), and points that lie on a parabola.

# %%
x = np.linspace(-1, 1, 50)
ivar = rng.gamma(2, 1, (40, 50)) * (rng.random((40, 50)) < 0.8)
y = 50 + 10 * x - 5 * x**2 + rng.standard_normal((40, 50))
coefficients, solvable = _fit_polynomials(x, y, ivar)
by_numpy = [np.polyfit(x, f, 2, w=np.sqrt(w))[::-1] for f, w in zip(y, ivar)]
print(f"largest distance from numpy: {np.abs(coefficients / by_numpy - 1).max():.0e}")
assert solvable.all() and np.allclose(coefficients, by_numpy, rtol=1e-10)

# %%
three_points = np.eye(3, 50) + np.array([[1], [1], [0]])  # the third star has a single point
on_parabola = np.tile(3 - x + 2 * x**2, (3, 1))
coefficients, solvable = _fit_polynomials(x, on_parabola, three_points)
print(coefficients.round(6), solvable)
assert np.allclose(coefficients[:2], [3, -1, 2], atol=1e-12)
assert not solvable[2] and np.all(coefficients[2] == 0)  # one point determines no parabola


# %% [markdown]
# ## The continuum, chip by chip
# Now the steps come together for each of the three chips, whose borders are those of the original lab: take the listed pixels, drop the outliers, fit, and
# draw the curve over the whole chip.
#
# As in the original lab every pixel with a valid error takes part in the fit, even if its bitmask warns of it: most bits do little harm to the level of the
# light. But a chip on which nearly every pixel carries a warning has a level that nobody should believe. So a chip's fit **fails** when fewer than
# `min_pixels` of its continuum pixels are usable, no outliers *and* free of bits. The default is four per coefficient, twelve: the curve's variance
# is on average $(d+1)/n$ of a pixel's, so that its own error is then at most half of a pixel's. It also fails where the curve is not positive on a
# usable pixel.
#
# First what a caller can get wrong: numbers that make no rule, and a list for another grid.

# %%
#| export
def _check_whole(name, value, low):
    "LabError for what is no whole number of at least `low`."
    if not isinstance(value, (int, np.integer)) or value < low:
        raise LabError(f"{name} is {value!r}: it must be a whole number of at least {low}")


def _check(degree, run, tolerance, min_pixels):
    "How many pixels a chip needs; LabError for a rule that makes no sense."
    _check_whole("degree", degree, 0)
    _check_whole("run", run, 1)
    if min_pixels is None:
        min_pixels = 4 * (degree + 1)
    _check_whole("min_pixels", min_pixels, degree + 1)
    if not isinstance(tolerance, (int, float, np.number)) or not tolerance > 0:
        raise LabError(f"tolerance is {tolerance!r}: it must be positive")
    return min_pixels


def _on_grid(continuum_pixels, grid):
    "The continuum pixels as flags on `grid`; by default the 529."
    if continuum_pixels is None:
        grid = np.asarray(grid)
        return _lab_pixels_on(grid.tobytes(), grid.dtype.str)
    continuum_pixels = np.asarray(continuum_pixels)
    if continuum_pixels.shape != grid.shape or continuum_pixels.dtype != bool:
        raise LabError(
            f"continuum_pixels has the shape {continuum_pixels.shape} and type "
            f"{continuum_pixels.dtype}: give one flag (bool) for each of the {len(grid)} pixels of "
            "the spectra"
        )
    return continuum_pixels


@lru_cache(maxsize=8)
def _lab_pixels_on(grid, dtype):
    "The 529 as flags on a grid, given as bytes: each block of stars asks, and few grids there are."
    position = _position(np.frombuffer(grid, dtype))
    pixel = np.rint(position).astype(int)
    if np.abs(position - pixel).max(initial=0) > 0.01:
        raise LabError(
            "the 529 continuum pixels are those of the survey's grid, and these spectra have "
            "another: give continuum_pixels"
        )
    flags = np.isin(pixel, on_band[lab_continuum_pixels()])
    flags.setflags(write=False)
    return flags


# %%
grids = {"on the chips": wavelength, "all pixels": full_wavelength}
for name, grid in grids.items():
    print(f"{name}: {_on_grid(None, grid).sum()} of {len(grid)} are continuum pixels")
with pytest.raises(LabError) as problem:
    _check(degree=-1, run=20, tolerance=0.1, min_pixels=12)
print(problem.value)


# %% [markdown]
# To try the fit we need stars whose answer is known: lines everywhere but at the continuum pixels, on parabolas of very different heights.

# %%
def made_up(n_stars=6, seed=0, noise=0.01):
    "Stars with lines everywhere but at the continuum pixels; their true curves; the lines' depth."
    rng = np.random.default_rng(seed)
    curve = np.empty((n_stars, len(wavelength)))
    x = (wavelength - 16_000) / 1_000
    for chip in chips.values():
        height = rng.lognormal(5, 2, (n_stars, 1))
        bend = rng.uniform(-0.2, 0.2, (n_stars, 2)) @ [x[chip], x[chip] ** 2]
        curve[:, chip] = height * (1 + bend)
    depth = np.where(continuum_pixels, 0, rng.uniform(0, 0.5, len(wavelength)))
    flux = curve * (1 - depth) * (1 + noise * rng.standard_normal(curve.shape))
    ivar = 1 / (np.maximum(noise, 0.01) * curve) ** 2
    stars = Table({"APOGEE_ID": [f"star {n}" for n in range(n_stars)]}, meta={"normalized": False})
    mask = np.zeros(curve.shape, np.int16)
    return Spectra(wavelength, flux.astype("f4"), ivar.astype("f4"), stars, mask), curve, depth


# %% [markdown]
# One chip at a time, all stars together. A chip fails where too few trustworthy pixels are left, where these do not determine the polynomial, or where the curve sinks to zero.

# %%
#| export
@dataclass(frozen=True)
class ContinuumFit:
    "The pseudo-continuum of N stars and what it was drawn through."

    continuum: np.ndarray  # (N, P) float32, positive at usable pixels; NaN on a chip that failed
    used: np.ndarray  # (N, P) bool, continuum pixels that were fitted
    rejected: np.ndarray  # (N, P) bool, usable continuum pixels dropped as outliers
    failed: np.ndarray  # (N, 3) bool, by chip in the order of `survey.CHIPS`


def _empty_fit(spectra):
    "A `ContinuumFit` of these spectra, to be filled chip by chip."
    shape = spectra.flux.shape
    return ContinuumFit(
        continuum=np.ones(shape, np.float32),
        used=np.zeros(shape, bool),
        rejected=np.zeros(shape, bool),
        failed=np.zeros((len(spectra), len(CHIPS)), bool),
    )


def _fit_chip(spectra, fit, chip, pixels, degree, run, tolerance, min_pixels):
    "Fill the chip's part of `fit`; which stars failed."
    flux = spectra.flux[:, pixels].astype(float)
    ivar = spectra.ivar[:, pixels].astype(float)
    good = np.isfinite(flux) & np.isfinite(ivar) & (ivar > 0)
    keep = _inliers(flux, good, run, tolerance)
    fit.used[:, pixels] = keep
    fit.rejected[:, pixels] = good & ~keep
    grid = spectra.wavelength[chip]
    width = grid[-1] - grid[0]
    x = (2 * spectra.wavelength - grid[0] - grid[-1]) / width  # -1 to 1 over the chip
    coefficients, solvable = _fit_polynomials(x[pixels], flux, np.where(keep, ivar, 0), degree)
    curve = fit.continuum[:, chip]
    curve[:] = coefficients @ polyvander(x[chip], degree).T
    sinks = ((curve <= 0) & (spectra.ivar[:, chip] > 0)).any(axis=1)
    trusted = keep if spectra.mask is None else keep & (spectra.mask[:, pixels] == 0)
    failed = (trusted.sum(axis=1) < min_pixels) | ~solvable | sinks
    curve[failed] = np.nan
    return failed


# %%
spectra, curve, depth = made_up()
spectra.ivar[2] = 0  # a star without light
fit = _empty_fit(spectra)
green = chips["green"]
listed = green.start + np.flatnonzero(continuum_pixels[green])
failed = _fit_chip(spectra, fit, green, listed, degree=2, run=20, tolerance=0.1, min_pixels=12)
off = np.abs(fit.continuum[:, green] / curve[:, green] - 1).max(axis=1)
Table(
    {
        "star": spectra.stars["APOGEE_ID"],
        "true level": curve[:, green].mean(axis=1).round(1),
        "pixels used": fit.used.sum(axis=1),
        "failed": failed,
        "largest error of the curve": [f"{error:.2%}" for error in off],
    }
)

# %% [markdown]
# **What to see.** Green light that differs by factors of a hundred, and curves that are right to a percent, the noise of one pixel. The star without light has no curve, and says so.

# %%
assert failed.tolist() == [False, False, True, False, False, False]
assert np.nanmax(off) < 0.02 and np.isnan(off[2])


# %%
#| export
def continuum(
    spectra: Spectra,
    continuum_pixels: np.ndarray = None,
    degree: int = 2,
    run: int = 20,
    tolerance: float = 0.1,
    min_pixels: int = None,
) -> ContinuumFit:
    """Fit the pseudo-continuum of all stars.

    On each chip it is a polynomial through the continuum pixels, weighted by 1/error (Ness et al.
    2015, ApJ 808, 16).

    Parameters
    ----------
    spectra : Spectra
    continuum_pixels : (P,) bool array, optional
        on the grid of the spectra; the 529 of the original lab by default
    degree : int, default 2
        of the polynomial in wavelength
    run : int, default 20
        continuum pixels in a run
    tolerance : float, default 0.1
        largest relative distance from the run's median
    min_pixels : int, optional
        trustworthy continuum pixels that a chip needs; 4 (degree + 1) by default

    Returns
    -------
    ContinuumFit
    """
    min_pixels = _check(degree, run, tolerance, min_pixels)
    listed = _on_grid(continuum_pixels, spectra.wavelength)
    fit = _empty_fit(spectra)
    for number, (name, chip) in enumerate(chip_slices(spectra.wavelength).items()):
        if chip.stop > chip.start:
            pixels = chip.start + np.flatnonzero(listed[chip])
            if len(pixels) < min_pixels:
                raise LabError(
                    f"the list holds {len(pixels)} continuum pixels on the {name} chip, a fit "
                    f"needs {min_pixels}: give a longer list"
                )
            rule = (degree, run, tolerance, min_pixels)
            fit.failed[:, number] = _fit_chip(spectra, fit, chip, pixels, *rule)
    return fit


# %% [markdown]
# The whole fit once more by a plain loop over stars and chips, with `np.polyfit` in Ångström from the chip's middle. Now the stars have noise, a
# tenth of their pixels is unusable, and every 97th pixel is half as bright again, so that the outlier rule has work to do. Both ways agree to
# $10^{-6}$ of the flux.

# %%
def chip_curve(x, flux, ivar, listed):
    "The parabola of one star on one chip."
    usable = listed & (ivar > 0)
    usable[listed] = inliers_loop(flux[None, listed], usable[None, listed])[0]
    middle = x.mean()
    weights = np.sqrt(ivar[usable])
    parabola = np.polyfit(x[usable] - middle, flux[usable], 2, w=weights)
    return np.polyval(parabola, x - middle)


def continuum_loop(spectra, listed):
    "The curves of all stars, one star and one chip after the other."
    curve = np.empty(spectra.flux.shape)
    for n in range(len(spectra)):
        for chip in chip_slices(spectra.wavelength).values():
            flux = spectra.flux[n, chip].astype(float)
            ivar = spectra.ivar[n, chip].astype(float)
            curve[n, chip] = chip_curve(spectra.wavelength[chip], flux, ivar, listed[chip])
    return curve


# %%
spectra, curve, depth = made_up(n_stars=7)
spectra.ivar[np.random.default_rng(1).random(spectra.ivar.shape) < 0.1] = 0
spectra.flux[:, ::97] *= 1.5  # outliers, on continuum pixels too
fit = continuum(spectra)
slow = continuum_loop(spectra, continuum_pixels)
agree = np.abs(fit.continuum / slow - 1).max()
print(f"{fit.rejected.sum()} pixels rejected; the curves agree to {agree:.0e}")
assert np.allclose(fit.continuum, slow, rtol=1e-6) and fit.rejected.any()

# %% [markdown]
# ## Divide, then mask
# Flux and error are divided by the curve. After that every pixel with a bit in its mask is unusable, and so is every chip that failed: weight zero,
# and a finite flux, so that a product of both is zero and not NaN. The column `CHIPS_FAILED` says which chips failed (1 blue, 2 green, 4 red).
# What was done is written into the table's meta: the star's *recipe*.

# %%
#| export
_CHIP_BITS = {name: 1 << bit for bit, name in enumerate(CHIPS)}  # of the column CHIPS_FAILED


def _divide(spectra, curve):
    "Flux and ivar relative to the curve; masked pixels without weight."
    with np.errstate(all="ignore"):
        flux = spectra.flux / curve
        ivar = spectra.ivar * curve * curve
    good = np.isfinite(flux) & np.isfinite(ivar) & (ivar > 0)
    if spectra.mask is not None:
        good &= spectra.mask == 0
    return np.where(np.isfinite(flux), flux, 1), np.where(good, ivar, 0)


def _continuum_step(listed, degree, run, tolerance, min_pixels):
    "The rule of one division, as the recipe keeps it."
    return {
        "step": "continuum",
        "pixels": np.flatnonzero(listed).tolist(),
        "degree": int(degree),
        "run": int(run),
        "tolerance": float(tolerance),
        "min_pixels": None if min_pixels is None else int(min_pixels),
    }


def _noted(stars, failed, step):
    "The table of the stars with a note of what was done to them, and which chips failed."
    stars = stars.copy()
    stars["CHIPS_FAILED"] = (failed @ list(_CHIP_BITS.values())).astype(np.uint8)
    bits = ", ".join(f"{bit} {name}" for name, bit in _CHIP_BITS.items())
    stars["CHIPS_FAILED"].description = f"chips without a continuum: {bits}"
    stars.meta["normalized"] = True
    stars.meta["recipe"] = [*stars.meta.get("recipe", []), step]
    return stars


# %%
flux, ivar = _divide(spectra, fit.continuum)
at_continuum = np.median(flux[:, continuum_pixels & (np.arange(len(wavelength)) % 97 > 0)])
print(
    f"median flux at continuum pixels: before {np.median(spectra.flux[:, continuum_pixels]):.0f}, "
    f"after {at_continuum:.3f}"
)
assert abs(at_continuum - 1) < 0.002 and np.isfinite(flux).all()


# %% [markdown]
# Spectra that the survey has normalized itself (aspcapStar) come back as they are. The stars go through in blocks, so that besides the result only
# a few megabytes are needed.

# %%
#| export
def normalize(
    spectra: Spectra,
    continuum_pixels: np.ndarray = None,
    degree: int = 2,
    run: int = 20,
    tolerance: float = 0.1,
    min_pixels: int = None,
    block: int = 256,
) -> Spectra:
    """Flux relative to the pseudo-continuum; masked pixels become unusable.

    On each chip the flux is divided by a polynomial through pixels that lines hardly touch (Ness et
    al. 2015, ApJ 808, 16): flux / c and ivar * c^2.

    Parameters
    ----------
    spectra : Spectra
        raw flux; spectra that are normalized already come back unchanged
    continuum_pixels, degree, run, tolerance, min_pixels
        the rule, as for `continuum`
    block : int, default 256
        stars at a time

    Returns
    -------
    Spectra
        flux finite everywhere; ivar 0 at masked pixels and on chips that failed. The stars get the
        column ``CHIPS_FAILED``, and ``stars.meta["recipe"]`` says what was done.

    Raises
    ------
    LabError
        where the rule makes no sense, or the pixels do not fit the grid

    Examples
    --------
    >>> import numpy as np
    >>> from astropy.table import Table
    >>> from stellar_lab import Spectra, normalize
    >>> from stellar_lab.survey import wavelength
    >>> flux = np.full((1, 7214), 250.0, "f4")
    >>> star = Spectra(wavelength, flux, 1e-2 * np.ones_like(flux), Table({"APOGEE_ID": ["a"]}))
    >>> bool(np.allclose(normalize(star).flux, 1))
    True
    """
    if spectra.stars.meta.get("normalized", False):
        return spectra
    flux = np.empty(spectra.flux.shape, np.float32)
    ivar = np.empty(spectra.flux.shape, np.float32)
    failed = np.zeros((len(spectra), len(CHIPS)), bool)
    for start in range(0, len(spectra), block):
        rows = slice(start, start + block)
        some = spectra[rows]
        fit = continuum(some, continuum_pixels, degree, run, tolerance, min_pixels)
        flux[rows], ivar[rows] = _divide(some, fit.continuum)
        failed[rows] = fit.failed
    listed = _on_grid(continuum_pixels, spectra.wavelength)
    step = _continuum_step(listed, degree, run, tolerance, min_pixels)
    return spectra.replace(flux=flux, ivar=ivar, stars=_noted(spectra.stars, failed, step))


# %% [markdown]
# Without noise, the made-up stars must come out as their lines alone, to the last digit of float32 but one. Brightness must not matter, and neither may the number of
# stars that are treated at a time.

# %%
spectra, curve, depth = made_up(noise=0)
result = normalize(spectra)
back = result.flux * continuum(spectra).continuum
print(f"largest error of the lines: {np.abs(result.flux / (1 - depth) - 1).max():.0e}")
print({name: value for name, value in result.stars.meta["recipe"][0].items() if name != "pixels"})
assert np.allclose(result.flux, 1 - depth, rtol=4e-7, atol=0)
assert np.allclose(back, spectra.flux, rtol=4e-7)  # nothing but a division
assert np.allclose(result.ivar, 1e4, rtol=1e-5)  # relative errors stay
assert result.flux.dtype == result.ivar.dtype == np.float32

# %%
spectra, curve, depth = made_up(n_stars=7)
result = normalize(spectra, block=3)
thousand = normalize(spectra.replace(flux=spectra.flux * 1000, ivar=spectra.ivar / 1000**2))
assert np.allclose(thousand.flux, result.flux, rtol=1e-6)
assert np.allclose(thousand.ivar, result.ivar, rtol=1e-5)
assert np.allclose(result.flux, normalize(spectra).flux, rtol=1e-6)

# %% [markdown]
# What no one should trust is counted, chip by chip: here one star without any good pixel on the green chip, one with bits on almost the whole blue
# chip, one whose red light is negative. The other chips of these stars do not suffer, and no result is NaN.

# %%
spectra, curve, depth = made_up()
spectra.ivar[0, chips["green"]] = 0
spectra.mask[1, chips["blue"]] = PIXMASK.PERSIST_MED
spectra.mask[1, np.flatnonzero(continuum_pixels)[:11]] = 0
spectra.flux[2, chips["red"]] *= -1
spectra.flux[3, 100:200] = np.nan
spectra.mask[4, 5000] = PIXMASK.CRPIX
flux_before = spectra.flux.copy()
ivar_before = spectra.ivar.copy()
result = normalize(spectra)
unusable = np.count_nonzero(result.ivar == 0, axis=1)
Table(
    [result.stars["APOGEE_ID"], result.stars["CHIPS_FAILED"], unusable],
    names=["star", "CHIPS_FAILED", "unusable pixels"],
)

# %%
assert list(result.stars["CHIPS_FAILED"]) == [
    *(_CHIP_BITS[c] for c in ("green", "blue", "red")),
    0,
    0,
    0,
]
assert np.all(result.ivar[0, chips["green"]] == 0) and np.all(result.ivar[0, chips["red"]] > 0)
assert np.all(np.isfinite(result.flux)) and np.all(np.isfinite(result.ivar))
assert np.all(result.ivar[3, 100:200] == 0)
assert result.ivar[4, 5000] == 0 and result.ivar[4, 5001] > 0
assert np.array_equal(flux_before, spectra.flux, equal_nan=True)  # the input is untouched
assert np.array_equal(ivar_before, spectra.ivar)
assert normalize(result) is result and "CHIPS_FAILED" not in spectra.stars.colnames

# %% [markdown]
# Mistakes of the caller are answered by name: a list for another grid, a list that leaves a chip without pixels, a degree that does not exist.

# %%
mistakes = {
    r"continuum_pixels has the shape \(8575,\).*for each of the 7214 pixels": {
        "continuum_pixels": np.ones(N_PIXELS, bool)
    },
    "the list holds 0 continuum pixels on the blue chip, a fit needs 12": {
        "continuum_pixels": np.arange(7214) > 4000
    },
    "degree is -1: it must be a whole number of at least 0": {"degree": -1},
}
for message, rule in mistakes.items():
    with pytest.raises(LabError, match=message):
        normalize(spectra, **rule)


# %% [markdown]
# ## What the fit looks like
# A picture of one chip: the spectrum as it came, the curve, the pixels it was drawn through, and in red those that were dropped.

# %%
#| export
def _plot_continuum(spectra, fit, star=0, chip=None, ax=None):
    "The raw spectrum of one star, its continuum, and the pixels fitted and rejected."
    import matplotlib.pyplot as plt

    ax = plt.subplots(figsize=(9, 2.8))[1] if ax is None else ax
    pieces = chip_slices(spectra.wavelength)
    for name in [chip] if chip else pieces:
        grid = spectra.wavelength[pieces[name]]
        flux = spectra.flux[star, pieces[name]]
        good = spectra.ivar[star, pieces[name]] > 0
        used = fit.used[star, pieces[name]]
        rejected = fit.rejected[star, pieces[name]]
        ax.plot(grid, np.where(good, flux, np.nan), color="0.7", lw=0.5)
        ax.plot(grid[used], flux[used], ".", ms=3, color=CHIP_COLORS[name])
        ax.plot(grid[rejected], flux[rejected], "x", ms=6, mew=1.5, color="red")
        ax.plot(grid, fit.continuum[star, pieces[name]], color="black", lw=1.2)
    ax.set(xlabel="vacuum wavelength [Å]", ylabel="flux")
    ax.margins(x=0.01)
    return ax


# %% [markdown]
# Now real stars. The first picture is of a star of middling signal-to-noise. `raw` are the apStar spectra of the archive at hand, light as it was
# counted; the ledger of [the chapter on cleaning](02_clean.ipynb) goes on with them.

# %%
use_style()
raw, ledger = read_archive(archive_root(), product="apstar", progress=False)
fit = continuum(raw)
whole = ~fit.failed.any(axis=1) & (raw.stars["SNR"] > 50)
typical = np.flatnonzero(whole)[np.argsort(raw.stars["SNR"][whole])[whole.sum() // 2]]
ax = _plot_continuum(raw, fit, typical)
name = raw.stars["APOGEE_ID"][typical]
ax.set_title(f"{name}: flux, continuum (black) and the pixels it was drawn through");

# %% [markdown]
# **What to see.** The light of the star falls towards the red as a black body's does, bent a little by the instrument, and the lines hang down from
# it. The three chips are three detectors: each has its own curve, and the curves need not meet.
#
# Outliers are rare, so the next picture looks for them: the two stars that lost most continuum pixels, chip by chip, rejected pixels as red
# crosses.

# %%
fig, axes = plt.subplots(2, 3, figsize=(11, 5.2))
for row, star in zip(axes, np.argsort(-fit.rejected.sum(axis=1) * whole)[:2]):
    for ax, chip in zip(row, CHIPS):
        _plot_continuum(raw, fit, star, chip, ax=ax)
        number = fit.rejected[star, chips[chip]].sum()
        ax.set(title=f"{raw.stars['APOGEE_ID'][star]}, {number} rejected", xlabel="", ylabel="")
fig.supxlabel("vacuum wavelength [Å]")
fig.supylabel("flux");

# %% [markdown]
# **What to see.** A red cross far from the curve was dropped as it should be. Had it stayed, its weight $1/\sigma^2$ could have bent the whole
# chip, and the bend would look like weak or strong lines everywhere. Crosses close to the curve belong to noisy stars: 10 % is a rule for good
# ones.
#
# Divided by the curve, and with the pixels masked that carry a bit, the star looks like this.

# %%
spectra = normalize(raw)
ax = plot_spectrum(
    wavelength,
    spectra.flux[typical],
    spectra.ivar[typical],
    error=True,
    title=f"{spectra.stars['APOGEE_ID'][typical]}, normalized",
)
ax.axhline(1, color="black", lw=0.5)
ax.set_ylabel("flux / continuum");

# %%
#| echo: false
rejected = fit.rejected.sum()
listed = (fit.used | fit.rejected).sum()
failed = ", ".join(f"{number} on the {name}" for name, number in zip(CHIPS, fit.failed.sum(axis=0)))
Markdown(
    f"{len(raw)} stars have {listed:,} usable continuum pixels, of which the rule drops "
    f"{rejected:,} ({rejected / listed:.2%}). Chips whose fit failed: {failed}."
)

# %% [markdown]
# The same on real stars: twenty of them by the plain loop, to $10^{-6}$ again. And what the division is for must hold in each: at the pixels
# that were fitted the normalized flux is one, to 2 % in the median.

# %%
some = np.flatnonzero(whole)[:: max(len(raw) // 20, 1)]
slow = continuum_loop(raw[some], continuum_pixels)
assert np.allclose(fit.continuum[some] / slow, 1, rtol=0, atol=1e-6)
at_continuum = np.where(fit.used[some] & (spectra.ivar[some] > 0), spectra.flux[some], np.nan)
assert np.all(np.abs(np.nanmedian(at_continuum, axis=1) - 1) < 0.02)


# %% [markdown]
# ## Which bits cost most?
# Every set bit of the mask, counted over all stars and on-band pixels. A pixel may carry several, so the bars add up to more than the share of
# masked pixels. The original lab treats all bits alike. Some of them (a cosmic ray, a saturated pixel) spoil the flux beyond repair, others (a weak
# persistence, the wing of a sky line) only warn; to choose among them was tried there, without gain.

# %%
#| exporti
def count_mask_bits(spectra: Spectra) -> Table:
    """How often each bit of the survey's pixel mask is set.

    Parameters
    ----------
    spectra : Spectra
        with a mask

    Returns
    -------
    Table
        bit, name, pixels, share of all pixels

    Raises
    ------
    LabError
        where there is no mask
    """
    if spectra.mask is None:
        raise LabError("these spectra have no bitmask: only apStar files carry one")
    bits = np.arange(len(PIXMASK_NAMES))
    table = Table({"bit": bits, "name": PIXMASK_NAMES})
    table["pixels"] = [int(np.count_nonzero(spectra.mask & (1 << bit))) for bit in bits]
    table["share"] = table["pixels"] / max(spectra.mask.size, 1)
    return table


# %%
bits = count_mask_bits(raw)
fig, ax = plt.subplots(figsize=(8, 3.2))
ax.bar(bits["name"], 100 * bits["share"])
ax.set(ylabel="on-band pixels [%]")
ax.tick_params(axis="x", rotation=60);

# %%
assert bits["pixels"].sum() >= np.count_nonzero(raw.mask)
assert np.all(bits["pixels"] <= raw.mask.size)
assert bits["pixels"][PIXMASK_NAMES.index("BADPIX")] == sum((row & 1).sum() for row in raw.mask)
with pytest.raises(LabError, match="no bitmask: only apStar"):
    count_mask_bits(raw.replace(mask=None))


# %% [markdown]
# ## Stars with too few pixels left
# The original lab drops a star when more than 3,000 of its 7,214 on-band pixels, 41.6 %, are unusable after all this. The ledger keeps count. Few pixels are
# no harm by themselves, for a label is a mean over thousands. The harm is in what these stars have in common: a fibre or a detector in trouble,
# whose good pixels are only the less bad ones.

# %%
#| export
def _unusable_pixels(spectra):
    "How many on-band pixels of each star have no weight (N,)."
    inside = np.isin(np.rint(_position(spectra.wavelength)), on_band)
    return np.sum(~(spectra.ivar[:, inside] > 0), axis=1)


MASKED_LIMIT = 3000  # as in the original lab: 41.6 % of the 7,214 on-band pixels


def drop_masked(
    spectra: Spectra,
    limit: int = MASKED_LIMIT,
    ledger: Ledger = None,
) -> tuple:
    """Drop stars with more than `limit` unusable on-band pixels.

    Parameters
    ----------
    spectra : Spectra
        after `normalize`
    limit : int, default MASKED_LIMIT
        unusable on-band pixels that a star may have
    ledger : Ledger, optional
        to go on with; a new one by default

    Returns
    -------
    tuple
        Spectra, Ledger
    """
    good = _unusable_pixels(spectra) <= limit
    reason = f"more than {limit} of {len(on_band)} on-band pixels unusable"
    return keep(spectra, good, "masked", ledger, reason)


# %%
lost = _unusable_pixels(spectra)
kept, ledger = drop_masked(spectra, ledger=ledger)
fig, ax = plt.subplots(figsize=(7, 2.8))
ax.hist(lost, bins=50)
ax.axvline(3000, color="black", lw=1, ls="--")
ax.set(xlabel=f"unusable on-band pixels of {len(wavelength)}", ylabel="stars");

# %%
assert np.array_equal(lost, [(row == 0).sum() for row in spectra.ivar])
assert len(kept) == np.sum(lost <= 3000) and _unusable_pixels(kept).max() <= 3000
ledger

# %% [markdown]
# ## Nine stars, ready for a model
# From the most metal-poor to the most metal-rich, each with its error in grey. A gap is a masked pixel. All continua stand at one now and only the
# lines are left: this is what a model of stars can learn from.

# %%
metal = "FE_H" if "FE_H" in kept.label_names else "M_H"
values = kept.labels([metal])[:, 0]
ranked = np.argsort(values)[: np.isfinite(values).sum()]
nine = kept[ranked[np.linspace(0, len(ranked) - 1, 9).astype(int)]]
fig, axes = plt.subplots(9, 1, figsize=(10, 13), sharex=True, sharey=True)
for n, ax in enumerate(axes):
    value = nine.labels([metal])[n, 0]
    name = nine.stars["APOGEE_ID"][n]
    title = f"{name}, {LABELS[metal].symbol} {value:.2f}, SNR {nine.stars['SNR'][n]:.0f}"
    plot_spectrum(wavelength, nine.flux[n], nine.ivar[n], error=True, ax=ax, title=title)
    ax.set(ylim=(0.3, 1.2), xlabel="" if n < 8 else "vacuum wavelength [Å]")

# %% [markdown]
# ## The star without a name
# An archive may hold one more file: a star whose name was taken from it, to be identified from its light alone in a later chapter. The original lab forgot
# its bitmask. Here it goes the way of all others.

# %%
mystery_file = archive_root() / MYSTERY_FILE
if mystery_file.exists():
    mystery, _ = read_files(mystery_file, progress=False)
    mystery = normalize(mystery)
    plot_spectrum(
        wavelength,
        mystery.flux[0],
        mystery.ivar[0],
        error=True,
        title=f"mystery star, SNR {mystery.stars['SNR'][0]:.0f}",
    )
    assert np.all(mystery.ivar[mystery.mask != 0] == 0) and mystery.stars["CHIPS_FAILED"][0] == 0
else:
    print("Skipped: this archive has no mystery star.")


# %% [markdown]
# ## How far from the known curve?
# The archives written here know their curves: each star's normalized spectrum was multiplied by one. The ratio of fitted to known curve tells two
# things for each star and chip: its median says how much too high or low the *level* is, its rms about the mean how much the *shape* is off.

# %%
def distance(fitted, known, usable):
    "Median and rms of fitted / known curve - 1, star by star and chip by chip: two arrays (N, 3)."
    ratio = np.where(usable, fitted / known - 1, np.nan)
    level = [np.nanmedian(ratio[:, chip], axis=1) for chip in chips.values()]
    shape = [np.nanstd(ratio[:, chip], axis=1) for chip in chips.values()]
    return np.transpose(level), np.transpose(shape)


# %%
known = None
if read_truth(archive_root()) is not None:
    names, curves = true_continuum(archive_root())
    place = {name: row for row, name in enumerate(names)}
    known = curves[[place[name] for name in raw.stars["APOGEE_ID"][whole]]]
    level, shape = distance(fit.continuum[whole], known, spectra.ivar[whole] > 0)
else:
    print("Skipped: only the archives written here know their continua.")


# %%
def plot_distance(level, shape, stars, metallicity):
    fig, axes = plt.subplots(2, 3, figsize=(11, 5), sharex=True, sharey="row")
    for n, (chip, (top, bottom)) in enumerate(zip(CHIPS, axes.T)):
        for ax, y in ((top, level), (bottom, shape)):
            dots = ax.scatter(stars["SNR"], 100 * y[:, n], c=metallicity, s=8, cmap="cividis")
        top.axhline(0, color="black", lw=0.5)
        top.set(title=f"{chip} chip", xscale="log")
        bottom.set(xlabel="SNR")
    axes[0, 0].set_ylabel("level: median [%]")
    axes[1, 0].set_ylabel("shape: rms [%]")
    fig.colorbar(dots, ax=axes, label=LABELS[metal].axis)


if known is not None:
    metallicity = raw.labels([metal])[whole, 0]
    plot_distance(level, shape, raw.stars[whole], metallicity)


# %%
#| echo: false
def distance_table(level, shape, groups):
    found = []
    for name, rows in groups.items():
        if rows.any():
            row = {"stars": name, "number": int(rows.sum())}
            for what, values in (("level", level), ("shape", shape)):
                typical = 100 * np.median(values[rows], axis=0)
                row |= {f"{what} {chip} [%]": value for chip, value in zip(CHIPS, typical)}
            found.append(row)
    table = Table(found)
    for name in table.colnames[2:]:
        table[name].format = "+.2f" if name.startswith("level") else ".2f"
    return table


def distance_groups():
    noisy = raw.stars["SNR"][whole] < 150
    poor = metallicity < -1
    dwarf = raw.labels(["LOGG"])[whole, 0] > 3.8
    return {
        "noisy, metal-poor giants": noisy & poor & ~dwarf,
        "good, metal-poor giants": ~noisy & poor & ~dwarf,
        "noisy, metal-rich giants": noisy & ~poor & ~dwarf,
        "good, metal-rich giants": ~noisy & ~poor & ~dwarf,
        "dwarfs": dwarf,
    }


distance_table(level, shape, distance_groups()) if known is not None else None


# %%
#| echo: false
def distance_text():
    snr = np.asarray(raw.stars["SNR"][whole], float)
    finite = np.isfinite(metallicity)
    design = np.column_stack([np.ones(len(snr)), 1 / snr, metallicity + 1])[finite]
    per_noise, per_dex = np.linalg.lstsq(design, level.mean(axis=1)[finite], rcond=None)[0][1:]
    fitted = continuum(raw[whole].replace(flux=known.astype("f4"))).continuum
    parabola = distance(fitted, known, spectra.ivar[whole] > 0)
    return Markdown(
        "Median distance (noisy: SNR < 150; metal-poor: below -1 dex). A straight line through "
        f"all levels says {per_noise:+.2f} times a pixel's relative noise, and "
        f"{100 * per_dex:+.2f} % per dex of metallicity. A parabola fitted to the known curves "
        "themselves, without lines or noise, misses their shape by an rms of "
        f"{100 * np.median(parabola[1]):.2f} %; with lines and noise it is "
        f"{100 * np.median(shape):.2f} %."
    )


distance_text() if known is not None else None


# %% [markdown]
# **What to see** on the archive of real stars. In bright stars the two curves agree. The noisier the star, the lower is ours, by the part of a
# pixel's noise given above. In the most metal-rich giants (the yellow dots on top) our curve is the higher one.
#
# Our rule goes through the middle of the noise. The survey's goes along its upper side, as any rule does that drops
# low pixels more readily than high ones to escape the lines. In metal-rich giants lines are everywhere, and no
# pixel shows noise alone. So the known curve is not the truth
# but the survey's convention ([García Pérez et al. 2016](https://doi.org/10.3847/0004-6256/151/6/144)), and ours is another.
#
# The shape is off alike in metal-poor and metal-rich stars; the green chip with its few pixels is the worst. A part of it is the parabola's,
# which cannot follow an instrument whose throughput bends like an S. Would a higher degree do better?

# %%
#| echo: false
def degree_table():
    rows = []
    for degree in (1, 2, 3, 4):
        fitted = continuum(raw[whole], degree=degree).continuum
        _, off = distance(fitted, known, spectra.ivar[whole] > 0)
        rows.append((degree, *100 * np.median(off, axis=0)))
    table = Table(rows=rows, names=["degree", *(f"shape {chip} [%]" for chip in CHIPS)])
    for name in table.colnames[1:]:
        table[name].format = ".2f"
    return table


degree_table() if known is not None else None

# %% [markdown]
# **What to see.** A parabola does much better than a straight line, and a cubic no better than a parabola: what it gains in freedom it loses to noise and to lines. With
# degree four the ends of the green chip swing freely, since its list has no pixel near either end. The choice of the original lab was good.

# %%
if known is not None:
    good = raw.stars["SNR"][whole] > 150
    assert np.all(np.abs(np.median(level[good], axis=0)) < 0.03)
    assert np.all(np.median(shape, axis=0) < 0.02)
    assert np.percentile(np.abs(level), 99) < 0.06

# %% [markdown]
# ## What does that cost in labels?
# A continuum is not right or wrong by itself; it is good if labels come out well. The judge is [The Cannon](05_cannon.ipynb), trained on two
# thirds and asked for the labels of the rest, in turns: once with the survey's own normalization (aspcapStar) and once with ours (apStar), for the
# same stars and with the same folds.

# %%
raw = fit = spectra = known = None  # `kept` holds what we need


def targets(spectra):
    stars = spectra.stars
    return [f"{field}.{name}" for field, name in zip(stars["FIELD"], stars["APOGEE_ID"])]


theirs = None
ours, _ = apply_cuts(kept)
try:
    theirs, _ = apply_cuts(read_archive(archive_root(), product="aspcapstar", progress=False)[0])
    _, rows, our_rows = np.intersect1d(targets(theirs), targets(ours), return_indices=True)
    theirs = theirs[rows]
    ours = ours[our_rows]
except LabError as error:
    print(f"Skipped: {error}")


# %%
def errors_of(spectra, folds=3):
    numbers = fold_numbers(len(spectra), folds)
    table = cross_label(Cannon(scatter=True), spectra, numbers, progress=False)
    labels = spectra.labels()
    return error_table(table, labels, spectra.label_names, labels.std(axis=0))


if theirs is not None:
    cost = errors_of(theirs)["label", "unit", "rmse"]
    cost.rename_column("rmse", "RMSE, aspcapStar")
    cost["RMSE, apStar by us"] = errors_of(ours)["rmse"]
    cost["ratio"] = cost["RMSE, apStar by us"] / cost["RMSE, aspcapStar"]
    cost["ratio"].info.format = ".2f"

# %%
#| echo: false
cost if theirs is not None else None


# %% [markdown]
# A continuum of our own is not free: some labels get a little worse. What is worse is to *mix*: a model trained on the one normalization
# and asked about spectra of the other answers with a bias that no error bar knows of. The second table shows the median shift of the same stars,
# compared with the error that the inversion gives for a single one. Hence a rule for every user of a model: normalize new spectra as the training spectra
# were.

# %%
#| echo: false
def mixing_table():
    model = Cannon(scatter=True).fit(theirs)
    same = infer(model, theirs)
    other = infer(model, ours, any_recipe=True)
    names = [name.lower() for name in theirs.label_names]
    shift = [np.nanmedian(np.asarray(other[name]) - np.asarray(same[name])) for name in names]
    error = [np.nanmedian(np.asarray(other[f"{name}_err"])) for name in names]
    table = Table(
        [theirs.label_names, shift, error],
        names=["label", "shift when mixed", "error that infer gives"],
    )
    for name in table.colnames[1:]:
        table[name].format = ".3g"
    return table


mixed = mixing_table() if theirs is not None else None
mixed

# %%
if theirs is not None:
    assert len(theirs) == len(ours) and np.array_equal(theirs.labels(), ours.labels())
    assert 0.8 < np.mean(cost["ratio"]) < 1.5


# %% [markdown]
# ## Raw files from the sky
# With `STELLAR_LAB_REAL_DATA` set, real apStar files of three releases go the same way, the survey's own flaws included: the left panels show the
# light and the curve, the right ones what remains after the mask.

# %%
#| export
def _plot_normalization(raw, number=8, **rule):
    "The first raw spectra with their continuum on the left, what is left of them on the right."
    import matplotlib.pyplot as plt

    raw = raw[:number]
    fit = continuum(raw, **rule)
    result = normalize(raw, **rule)
    lost = _unusable_pixels(result)
    fig, axes = plt.subplots(len(raw), 2, figsize=(12, 2 * len(raw)), sharex=True, squeeze=False)
    for n, (left, right) in enumerate(axes):
        _plot_continuum(raw, fit, n, ax=left)
        seen = np.where(raw.ivar[n] > 0, raw.flux[n], np.nan)
        left.set_ylim(0, 1.5 * np.nanpercentile(seen, 95))
        failed = ", ".join(name for name, bad in zip(CHIPS, fit.failed[n]) if bad)
        title = f"{raw.stars['APOGEE_ID'][n]}, SNR {raw.stars['SNR'][n]:.0f}"
        left.set_title(f"{title}, failed: {failed}" if failed else title)
        plot_spectrum(raw.wavelength, result.flux[n], result.ivar[n], ax=right)
        right.axhline(1, color="black", lw=0.5)
        right.set(ylim=(0.3, 1.3), ylabel="flux / continuum")
        right.set_title(f"{lost[n]} of {raw.flux.shape[1]} pixels unusable")
        if n < len(raw) - 1:
            left.set_xlabel("")
            right.set_xlabel("")
    return fig


# %%
folder = real_data()
if folder is None:
    print("Skipped: STELLAR_LAB_REAL_DATA names no folder with raw files of the survey.")
else:
    wild, problems = read_files(
        [*sorted(folder.glob("apStar-*.fits")), *sorted(folder.glob("mystery*.fits"))],
        progress=False,
    )
    assert not problems
    _plot_normalization(wild)

# %%
if folder is not None:
    found = Table(
        {
            "star": wild.stars["APOGEE_ID"],
            "SNR": wild.stars["SNR"],
            "unusable pixels": _unusable_pixels(normalize(wild)),
            "CHIPS_FAILED": normalize(wild).stars["CHIPS_FAILED"],
        }
    )
    print(found)

# %% [markdown]
# The third star is a hard case: *persistence*, the memory of the detector for brighter light before, covers most of its blue chip with bits. In row
# 1 of its file 53 continuum pixels are free of them, and a fit through these alone stays within 3 % of the fit through all. In row 0 three are
# left: that chip's continuum cannot be trusted, and the fit says so. The young M dwarf in the row below has not a single good blue pixel.

# %%
if folder is not None:
    persistent = folder / "apStar-r6-2M00005143+5615568.fits"
    first_row, _ = read_files(persistent, row=0, progress=False)
    assert normalize(first_row).stars["CHIPS_FAILED"][0] == _CHIP_BITS["blue"]
    failed = dict(zip(found["star"], found["CHIPS_FAILED"]))
    assert failed["2M03290406+3117075"] == _CHIP_BITS["blue"]


# %% [markdown]
# ## Which flags count?
# Here every flag of the mask takes its pixel away. [Another rule](02_clean.ipynb) may be named, which lets doubtful pixels count a little. It is applied before the continuum is drawn.

# %%
#| exporti
def weigh_by(spectra: Spectra, mask: str | None) -> Spectra:
    """Raw spectra whose mask is spent by the rule that a text names.

    Parameters
    ----------
    spectra : Spectra
        raw flux, with a mask
    mask : str or None
        as for `MaskRule.parse`; nothing changes without one, nor by the strict rule, which
        `normalize` follows anyway

    Returns
    -------
    Spectra
    """
    rule = None if mask is None else MaskRule.parse(mask)
    if rule is None or str(rule) == str(STRICT):
        return spectra
    return weigh_mask(spectra, rule)


# %%
first_field = archive_record(archive_root()).fields[:1]
few_pixels, _ = read_archive(archive_root(), "apstar", fields=first_field, progress=False)
for word in ("strict", "gentle"):
    shown = normalize(weigh_by(few_pixels, word))
    print(f"{word}: {np.mean(shown.ivar > 0):.1%} of the pixels count")


# %% [markdown]
# ## A training set
# From a folder of files to stars that a model can learn from: read, join with the catalogue, cut, normalize, drop what is mostly masked. The ledger accounts for every star.

# %%
#| export
def training_set(
    root,
    product: str = None,
    fields: Sequence = None,
    labels: Sequence = None,
    continuum_pixels: np.ndarray = None,
    progress: bool = True,
    row: int = None,
    gaps: bool = False,
    mask: str = None,
) -> tuple:
    """Normalized spectra of the stars to learn from, and the account of those that fell.

    Parameters
    ----------
    root : str or Path
        of an archive
    product : {"apstar", "aspcapstar"}, optional
        the archive's first that has files by default
    fields : sequence of str or "all", optional
        fields to take; the archive's by default
    labels : sequence of str, optional
        labels that a star must have; the archive's by default
    continuum_pixels : (P,) bool array, optional
        the 529 of the original lab by default
    progress : bool, default True
        show a bar
    row : int, optional
        of apStar files: 0 and 1 are the combinations, the visits follow; by default the release's
    gaps : bool, default False
        keep stars that lack some of the labels, for a model that can learn from them
    mask : str, optional
        rule for flagged pixels, as for `MaskRule.parse`; by default every flag kills

    Returns
    -------
    tuple
        `Spectra` of the stars that pass all cuts, and their `Ledger`

    Raises
    ------
    LabError
        where there is no archive, or no star is left

    Examples
    --------
    >>> from stellar_lab import training_set
    >>> from stellar_lab.survey import archive_record, archive_root
    >>> root = archive_root()
    >>> fields = archive_record(root).fields[:2]
    >>> spectra, ledger = training_set(root, fields=fields, progress=False)
    >>> len(spectra) == ledger.left
    True
    """
    spectra, ledger = read_archive(
        root, product=product, fields=fields, labels=labels, row=row, progress=progress
    )
    spectra = weigh_by(spectra, mask)
    spectra, ledger = apply_cuts(spectra, ledger=ledger, gaps=gaps)
    spectra = normalize(spectra, continuum_pixels=continuum_pixels)
    return drop_masked(spectra, ledger=ledger)


# %%
own_pixels = np.roll(lab_continuum_pixels(), 1)
mine, ledger = training_set(archive_root(), continuum_pixels=own_pixels, progress=False)
ledger


# %% [markdown]
# ## The recipe travels
# A star that is to be labelled must be treated exactly as the training stars were. So `normalize` writes down what it did: the pixels, the degree, the rule for outliers. The
# note lies in the spectra's `stars.meta["recipe"]`, a model keeps it, and `as_trained` repeats it, step by step, on any new star.

# %%
#| exporti
def continuum_steps(meta: dict) -> list:
    """The divisions by a pseudo-continuum that spectra went through.

    Parameters
    ----------
    meta : dict
        of the stars of a `Spectra`, or ``metadata_`` of a model

    Returns
    -------
    list of dict
        in order: pixels, degree, run, tolerance, min_pixels; empty where the survey normalized
    """
    steps = [step for step in meta.get("recipe", []) if step["step"] == "continuum"]
    if not steps and "continuum_pixels" in meta:  # written before recipes were
        rule = {"degree": 2, "run": 20, "tolerance": 0.1, "min_pixels": None}
        steps = [{"step": "continuum", "pixels": list(meta["continuum_pixels"]), **rule}]
    return steps


# %%
(step,) = continuum_steps(mine.stars.meta)
print(f"one step, degree {step['degree']}, {len(step['pixels'])} pixels from {step['pixels'][:3]}")
assert step["pixels"] == np.flatnonzero(own_pixels).tolist()

# %% [markdown]
# Two more things belong to the treatment. New spectra must lie on the model's grid, for a model knows pixels by their number. And [pixels that are dark](02_clean.ipynb) lose their weight. An archive finds them by comparing its stars with each other; a single
# star is compared with the typical star of the model. A model that learned from the survey's own normalization never saw raw light; its raw spectra follow the usual rule.

# %%
#| exporti
_DARK = 0.05  # share of the typical light, as in `clean.read_archive`


def check_grid(model, grid):
    """LabError for spectra on another grid than the model's.

    Parameters
    ----------
    model : LabelModel
        fitted
    grid : (P,) array
        wavelengths of the spectra, Angstrom
    """
    known = model.wavelength_
    if known is None:
        known = np.arange(len(model.typical_flux_))
        same = len(grid) == len(known)
    else:
        same = len(grid) == len(known) and np.allclose(grid, known, rtol=1e-8)
    if not same:
        raise LabError(
            f"the spectra have {len(grid)} pixels from {grid[0]:.2f} Angstrom, the model "
            f"{len(known)} from {known[0]:.2f}: read the spectra on the model's grid"
        )


def _dark_share(meta):
    "Share of the typical light below which a raw pixel is dark, for a model with this metadata."
    product = meta.get("product")
    if product in PRODUCTS and PRODUCTS[product].normalized:
        return _DARK
    return meta.get("dark", _DARK)


def _dark_as_trained(model, spectra, fraction):
    "Pixels (N, P) below `fraction` of a typical star's, each star relative to its own median."
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # a star without light has no median
        seen = np.where(spectra.ivar > 0, spectra.flux, np.nan)
        level = np.nanmedian(seen, axis=1, keepdims=True)
        typical = model.typical_flux_ / np.nanmedian(model.typical_flux_)
        return spectra.flux < fraction * np.where(level > 0, level, np.nan) * typical


# %%
model = Cannon(order=1).fit(mine)
file = next(archive_root().rglob(str(mine.stars["FILE"][0])))
raw, _ = read_files([file], progress=False)
shadow = raw.replace(flux=np.where(np.arange(len(wavelength)) == 4000, 1e-3, raw.flux))
more = _dark_as_trained(model, shadow, 0.05) & ~_dark_as_trained(model, raw, 0.05)
print("with a shadow on pixel 4000, dark are also the pixels", np.flatnonzero(more[0]))
assert np.flatnonzero(more[0]).tolist() == [4000]
assert (_dark_share({}), _dark_share({"dark": 0, "product": "aspcapstar"})) == (0.05, 0.05)


# %%
#| export
def as_trained(model, spectra: Spectra) -> Spectra:
    """Spectra treated as the model's training spectra were, each star by itself.

    Parameters
    ----------
    model : LabelModel
        fitted on a `Spectra`, whose recipe it keeps
    spectra : Spectra
        as read, of the product that the model was trained on

    Returns
    -------
    Spectra
        ready for `infer`: dark pixels without weight, flux relative to the continuum; spectra that
        are normalized already come back as they are

    Raises
    ------
    LabError
        where the spectra are on another grid than the model's
    """
    check_is_fitted(model)
    check_grid(model, spectra.wavelength)
    if spectra.stars.meta.get("normalized", False):
        return spectra
    if spectra.mask is not None and "mask_rule" not in spectra.stars.meta:
        spectra = weigh_by(spectra, model.metadata_.get("mask_rule"))
    fraction = _dark_share(model.metadata_)
    if fraction:
        dark = _dark_as_trained(model, spectra, fraction)
        spectra = spectra.replace(ivar=np.where(dark, np.float32(0), spectra.ivar))
    for step in continuum_steps(model.metadata_) or [{"pixels": None}]:
        rule = {name: value for name, value in step.items() if name not in ("step", "pixels")}
        pixels = step["pixels"]
        if pixels is not None:
            pixels = np.isin(np.arange(len(spectra.wavelength)), pixels)
        spectra = _normalize_again(spectra, continuum_pixels=pixels, **rule)
    return spectra


def _normalize_again(spectra, **rule):
    "One more division by a pseudo-continuum, whatever the spectra went through before."
    stars = spectra.stars.copy(copy_data=False)
    stars.meta["normalized"] = False
    return normalize(spectra.replace(stars=stars), **rule)


# %% [markdown]
# The model above learned with pixels of our own. It must treat a new star with the same, not with those of the original lab.

# %%
treated = as_trained(model, raw)
difference = np.abs(treated.flux - mine.flux[:1])[mine.ivar[:1] > 0].max()
print(f"largest difference from the training spectrum: {difference:.0e}")
assert continuum_steps(treated.stars.meta) == continuum_steps(model.metadata_)
assert difference < 1e-5
with pytest.raises(LabError, match="read the spectra on the model's grid"):
    as_trained(model, raw.replace(wavelength=raw.wavelength + 1))


# %% [markdown]
# The front door of the package has the name `normalize` for the function, and so has this room. Whichever of the two `from stellar_lab import normalize` brings, it can be called.

# %%
#| export
class _CallableRoom(ModuleType):
    "This module; calling it calls its function `normalize`."

    def __call__(self, *arguments, **rule):
        return normalize(*arguments, **rule)


if __name__ == "stellar_lab.normalize":
    sys.modules[__name__].__class__ = _CallableRoom

# %% [markdown]
# **Exercise.** The level of our curve depends on nothing but the list of pixels. Take every second one of the 529, normalize again, and look at how
# far the level moves in metal-poor and in metal-rich stars: which of them tell you that a pixel of the list is not free of lines?
