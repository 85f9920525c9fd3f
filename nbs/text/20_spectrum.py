# %% [markdown]
# # How do I label a spectrum of my own?
# > Any grid, any unit, any resolution from 2,000 up: the model goes to the star, and not the star to the model.
#
# **Question.** You have observed a star in the near infrared, with another spectrograph. Your pixels are not the survey's, your wavelengths are in nanometres and in
# air, the star moves, and your lines are blurred. How does a model that learned from APOGEE read it, with errors that still hold?
#
# **Idea.** The usual answer is to resample the star onto the model's grid. That ties neighbouring pixels together: their errors are no longer independent, and every
# fit that believes they are is too sure of itself. We go the other way. In The Cannon each pixel is a polynomial of the labels,
# $$ f_p = \sum_t \theta_{pt}\,v_t(\ell), $$
# linear in its coefficients. Interpolating the spectrum and blurring it are linear, too. So whatever a spectrograph does to a spectrum can be done to the coefficients
# $\theta$, once, without noise. The star's pixels stay as they are, and so do their errors.
#
# You learn how to read a spectrum from arrays, tables and text; what resampling does to errors; how to measure a star's velocity; and what lower resolution costs. You
# need [the Cannon](05_cannon.ipynb), [its inversion](06_inversion.ipynb) and [the continuum](03_normalize.ipynb).

# %%
#| default_exp spectrum

# %%
#| export
import copy
import gzip
import math
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import astropy.units as u
import numpy as np
from astropy.io import ascii as text_tables
from astropy.table import QTable, Table
from scipy.ndimage import gaussian_filter1d
from scipy.sparse import csr_array
from sklearn.utils.validation import check_is_fitted

from stellar_lab.cannon import Cannon
from stellar_lab.clean import checked_hdus, strange_pixels
from stellar_lab.inversion import infer
from stellar_lab.models import Flag, LabelModel
from stellar_lab.normalize import as_trained, continuum, continuum_steps, normalize
from stellar_lab.survey import (
    LabError,
    Spectra,
    air_to_vacuum,
    chip_slices,
    plot_spectrum,
    said_of,
    what_stands_at,
)
from stellar_lab.survey import wavelength as SURVEY_GRID

# %%
#| hide
import tempfile

import matplotlib.pyplot as plt
import pytest
from astropy.io import fits
from scipy.interpolate import CubicSpline

from stellar_lab.models import train_test_rows
from stellar_lab.normalize import training_set
from stellar_lab.survey import archive_root, label_record, use_style, wavelength

# %%
#| hide
use_style()

# %% [markdown]
# ## In what unit?
# A column of numbers does not say its unit, but ours leave little doubt: APOGEE's range is 15,150 to 17,000 Å, 1,515 to 1,700 nm, 1.515 to 1.7 µm. The unit in which
# most numbers fall into that range is the one. Where none does, the spectrum is another one, and the message should say which.

# %%
#| export
_RANGE = (15_150.0, 17_000.0)  # Angstrom: what the survey's spectrograph sees
_BEYOND = 50.0  # Angstrom kept on either side, for stars that move
_NAMES = {u.AA: "Angstrom", u.nm: "nm", u.um: "micron", u.m: "m"}


def _in_range(angstrom, beyond=0.0):
    "Which wavelengths [Angstrom] the survey sees, or may see of a moving star."
    return (angstrom >= _RANGE[0] - beyond) & (angstrom <= _RANGE[1] + beyond)


def _what_else(numbers):
    "What wavelengths outside our range probably are, in words."
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    said = f"the wavelengths run from {low:.6g} to {high:.6g}"
    for unit in (u.AA, u.nm, u.um):
        ends = [float((edge * unit).to_value(u.AA)) for edge in (low, high)]
        if 2_900 < ends[0] and ends[1] < 11_500:
            return f"{said}: this looks like an optical spectrum in {_NAMES[unit]}"
        if 9_000 < ends[0] and ends[1] < 55_000:
            return f"{said}: this looks like another infrared band in {_NAMES[unit]}"
    return said


def _guess_unit(numbers):
    "The unit in which most of the numbers lie in our range; LabError where none does."
    counts = [np.sum(_in_range(numbers * unit.to(u.AA))) for unit in _NAMES]
    if not max(counts):
        raise LabError(
            f"no overlap with {_RANGE[0]:,.0f} to {_RANGE[1]:,.0f} Angstrom: "
            f"{_what_else(numbers)}. "
            "Labels need a spectrum of the H band; if the unit is another, say which (unit=…)"
        )
    return list(_NAMES)[int(np.argmax(counts))]


# %%
for numbers in (np.linspace(15_200, 16_900, 5), np.linspace(1.52, 1.69, 5)):
    print(f"{numbers[0]:>8.6g} to {numbers[-1]:.6g}: {_guess_unit(numbers)}")
with pytest.raises(LabError, match="no overlap .* an optical spectrum in Angstrom"):
    _guess_unit(np.linspace(4_000, 9_000, 100))

# %% [markdown]
# ## Wavelengths of the star
# Three steps lead from the numbers in a file to wavelengths at which a model can be asked: from the file's unit to Ångström, from air to vacuum, and from the moving
# star to one at rest, $\lambda_0=\lambda/(1+v/c)$.
#
# The order of the pixels is not ours to choose. Some files begin with the red end, some have a chip or an order of the spectrograph after the other. Sorting costs
# nothing. Only numbers that go up and down all the time are no wavelengths.

# %%
#| exporti
LIGHT = 299_792.458  # speed of light, km/s
_TURNS = 0.1  # share of pixels at which wavelengths may turn back


def _in_angstrom(wavelengths, unit, notes):
    "Plain numbers in Angstrom (P,), from a Quantity, a named unit or a guess; notes the guess."
    found = getattr(wavelengths, "unit", None)
    unit = found if unit is None and found is not None else unit
    numbers = np.ravel(np.asarray(getattr(wavelengths, "value", wavelengths), dtype=float))
    finite = np.isfinite(numbers)
    if not finite.any():
        raise LabError("there is no finite wavelength: is this the right column?")
    if unit is None and np.all(_in_range(10 ** np.clip(numbers[finite], 0, 9), _BEYOND)):
        notes.append("no unit given: the wavelengths are taken as log10 of Angstrom")
        numbers = 10**numbers
        unit = u.AA
    if unit is None:
        unit = _guess_unit(numbers[finite])
        notes.append(f"no unit given: the wavelengths are taken as {_NAMES[unit]}")
    try:
        return (numbers * u.Unit(unit)).to_value(u.AA, equivalencies=u.spectral())
    except (ValueError, TypeError, u.UnitsError) as error:
        raise LabError(
            f"{unit!r} is no unit of wavelength ({error}): give Angstrom, nm or micron"
        ) from error


def _order(angstrom):
    "Indices that sort the finite wavelengths; LabError where they are no grid."
    finite = np.flatnonzero(np.isfinite(angstrom))
    steps = np.sign(np.diff(angstrom[finite]))
    turns = np.sum(steps[1:] * steps[:-1] < 0)
    if turns > max(_TURNS * len(finite), 6):
        raise LabError(
            f"the wavelengths go up and down {turns} times in {len(finite)} pixels, so they are no "
            "grid: is this the right column?"
        )
    order = finite[np.argsort(angstrom[finite], kind="stable")]
    doubled = np.sum(np.diff(angstrom[order]) == 0)
    if doubled:
        raise LabError(
            f"{doubled} wavelengths occur twice: combine these pixels, or leave one of each out"
        )
    return order


# %%
notes = []
place = _order(_in_angstrom(np.array([1.62, 1.61, 1.60, np.nan]), None, notes))
assert list(place) == [2, 1, 0]  # the red end came first, and a NaN is no wavelength
with pytest.raises(LabError, match="go up and down 97 times"):
    _order(15_500 + np.arange(99) % 2 * 10.0)
print(notes[0])


# %% [markdown]
# ## Which pixels count?
# An error that is zero, negative or not a number means a pixel of which nothing is known. It gets the weight 0; the star stays. A spectrum without any errors is
# refused: labels without errors cannot be believed, and invented errors are worse.
#
# One trap hides in the flux. In $\mathrm{erg\,s^{-1}\,cm^{-2}\,Å^{-1}}$ it may be $10^{-19}$, and then $1/\sigma^2$ exceeds the largest number of single precision.
# Dividing by the median flux changes no label and avoids it.

# %%
#| export
def _plain(values, name, size):
    "Values as numbers (P,), one for each wavelength; a single number stands for all."
    values = np.asarray(getattr(values, "value", values), dtype=float)
    values = np.full(size, float(values)) if values.ndim == 0 else np.ravel(values)
    if len(values) != size:
        raise LabError(
            f"lengths differ: {size} wavelengths, {len(values)} values of {name}: "
            "give one for each pixel"
        )
    return values


def _in_unit_of(flux, error):
    "The error in the unit of the flux, where both have one; LabError where they do not fit."
    if not (hasattr(flux, "unit") and hasattr(error, "unit")) or None in (flux.unit, error.unit):
        return error
    try:
        return error.to(flux.unit)
    except u.UnitConversionError as problem:
        raise LabError(f"flux is in {flux.unit}, its error in {error.unit}: {problem}") from problem


def _weights(flux, error, ivar, size):
    "Flux and inverse variance (P,), 0 where a pixel is unusable; LabError without errors."
    if (error is None) == (ivar is None):
        raise LabError(
            "no errors are given: give error= (1 sigma, one number or one per pixel) or ivar="
            if error is None
            else "error and ivar are both given: give one of them"
        )
    weight = None if ivar is None else _plain(ivar, "ivar", size)
    if weight is None:
        sigma = _plain(_in_unit_of(flux, error), "error", size)
        good = np.isfinite(sigma) & (sigma > 0)
        weight = np.where(good, 1 / np.where(good, sigma, 1) ** 2, 0)
    flux = _plain(flux, "flux", size)
    good = np.isfinite(flux) & np.isfinite(weight) & (weight > 0)
    return np.where(good, flux, 0), np.where(good, weight, 0)


# %%
flux, ivar = _weights([1, np.nan, 1, 1], [0.1, 0.1, 0, -1], None, 4)
print("flux", flux, "ivar", ivar)
with pytest.raises(LabError, match="no errors are given"):
    _weights([1, 1], None, None, 2)
with pytest.raises(LabError, match="lengths differ: 3 wavelengths, 2 values of error"):
    _weights([1, 1, 1], [1, 1], None, 3)

# %% [markdown]
# ## From arrays
# All of it in one function. What it could not know it writes down: the notes travel with the star. A velocity that is not given stays unknown until a model measures it.

# %%
#| export
_LEAST = 50  # usable pixels that a spectrum must have in our range


def _facts(name, flux, ivar, velocity, resolution):
    "The table of one star, with the columns that files of the survey give."
    snr = np.median((flux * np.sqrt(ivar))[ivar > 0])
    facts = {"APOGEE_ID": name, "TELESCOPE": "", "FIELD": "", "LOCATION_ID": -1, "SNR": snr}
    facts |= {"NVISITS": 1, "J": np.nan, "H": np.nan, "K": np.nan, "RA": np.nan, "DEC": np.nan}
    facts |= {"FILE": "", "VELOCITY": np.nan if velocity is None else float(velocity)}
    return Table(
        {column: [value] for column, value in (facts | {"RESOLUTION": resolution}).items()}
    )


def _check_number(name, value, low):
    "LabError for what is no finite number above `low`."
    if not isinstance(value, (int, float, np.number)) or not low < value < np.inf:
        raise LabError(f"{name} is {value!r}: give a number above {low:g}")


# %% [markdown]
# How sharp is it? One number, the resolution $R=\lambda/\mathrm{FWHM}$, says it for many spectrographs. Others are sharper at one end than at the other, so a resolution, or a width
# of lines, may be given for each pixel.

# %%
#| export
def _sharpness(resolution, fwhm, wavelength, size):
    "R of a spectrum, a number or one per pixel, from either of two ways to say it; None for none."
    if resolution is None and fwhm is None:
        return None
    if resolution is not None and fwhm is not None:
        raise LabError("resolution and fwhm are both given: give one of them")
    if fwhm is not None:
        lines = np.ravel(np.asarray(getattr(wavelength, "value", wavelength), float))
        if hasattr(fwhm, "unit") and hasattr(wavelength, "unit"):
            fwhm = fwhm.to(wavelength.unit)
        with np.errstate(divide="ignore", invalid="ignore"):
            resolution = lines / _plain(fwhm, "fwhm", size)
    if np.ndim(resolution) == 0:
        _check_number("resolution", resolution, 0)
        return float(resolution)
    each = _plain(resolution, "resolution", size)
    good = np.isfinite(each) & (each > 0)
    if not good.any():
        raise LabError("no pixel has a resolution: give numbers above 0")
    return np.interp(np.arange(size), np.flatnonzero(good), each[good])


# %%
ramp = _sharpness(None, np.linspace(0.1, 0.2, 3), np.array([1520.0, 1600.0, 1700.0]), 3)
print(ramp.round())
with pytest.raises(LabError, match="give one of them"):
    _sharpness(22_500, 0.7, np.ones(3), 3)


# %% [markdown]
# Three more pieces. Only pixels in our range count. A pixel that no star and no detector can give, such as a flux of $10^{30}$, is unusable. And sorted pixels become a `Spectra` of one star.

# %%
#| export
def _order_in_range(angstrom):
    "Indices that sort the wavelengths in our range; what lies elsewhere is left out."
    with np.errstate(invalid="ignore"):  # such as 0 for a missing chip
        return _order(np.where(_in_range(angstrom, _BEYOND), angstrom, np.nan))


_FEW = 0.1  # of the pixels; where more are odd, it is the usual ones that mean nothing


def _strange(flux, ivar):
    "Pixels (P,) bool that hold what no star and no detector can give; few, or none."
    strange = strange_pixels(flux, ivar)
    return strange & (strange.sum() <= _FEW * np.count_nonzero(ivar > 0))


def _as_spectra(angstrom, flux, ivar, velocity, resolution, name, notes):
    "One star's `Spectra` from sorted pixels."
    usable = np.sum(ivar > 0)
    if usable < _LEAST:
        raise LabError(
            f"{name}: {usable} usable pixels between {_RANGE[0]:,.0f} and {_RANGE[1]:,.0f} "
            f"Angstrom, but labels need {_LEAST} at least"
        )
    level = np.median(np.abs(flux[ivar > 0])) or 1.0
    each = resolution if np.ndim(resolution) else None
    resolution = np.median(resolution[ivar > 0]) if np.ndim(resolution) else resolution
    rest = angstrom / (1 + (velocity or 0) / LIGHT)
    resolution = np.nan if resolution is None else float(resolution)
    stars = _facts(name, flux, ivar, velocity, resolution)
    stars.meta = {"product": "own", "normalized": False, "notes": notes, "level": float(level)}
    if each is not None:
        stars.meta["resolution"] = each
    scaled = (flux / level).astype(np.float32)[None]
    return Spectra(rest, scaled, (ivar * level**2).astype(np.float32)[None], stars)


# %%
print("sorted:", _order_in_range(np.array([0, 16_000, 15_800, 9_000, 15_900.0])))
odd = np.ones(200)
odd[7] = 1e30
print("strange:", np.flatnonzero(_strange(odd, np.full(200, 1e4))))
_as_spectra(
    np.linspace(15_800, 16_000, 200), np.ones(200), np.full(200, 1e4), 30, 22_500, "a star", []
)


# %%
#| export
@np.errstate(all="ignore")  # what a file holds may be any number
def from_arrays(
    wavelength,
    flux,
    error=None,
    ivar=None,
    *,
    mask=None,
    doubtful=None,
    unit=None,
    air: bool = False,
    velocity: float = None,
    resolution=None,
    fwhm=None,
    name: str = "star",
) -> Spectra:
    """A spectrum of one star, from arrays on any grid.

    Parameters
    ----------
    wavelength : (P,) array or Quantity
        of the pixels, in any order
    flux : (P,) array or Quantity
        in any unit, relative to a continuum or not
    error, ivar : float or (P,) array
        1-sigma error, or inverse variance; one of them. NaN, 0 and negative mark unusable pixels
    mask : (P,) bool array, optional
        True where a pixel is unusable
    doubtful : (P,) bool array, optional
        True where a pixel counts for the labels, but a model's guard should not look at it
    unit : str or Unit, optional
        of the wavelengths; guessed from the numbers by default
    air : bool, default False
        the wavelengths are those in air
    velocity : float, optional
        of the star in the frame of the wavelengths [km/s], 0 for a star at rest; unknown by default
    resolution : float or (P,) array, optional
        R = wavelength / FWHM of a narrow line, one for all pixels or one each; the model's by
        default
    fwhm : float or (P,) array, optional
        the same as a width, in the unit of the wavelengths, in place of a resolution
    name : str, default "star"

    Returns
    -------
    Spectra
        one star, wavelengths in Angstrom, vacuum, at rest if the velocity is known; flux over its
        median. ``stars.meta["notes"]`` says what was guessed

    Raises
    ------
    LabError
        where arrays do not fit, or nothing of it lies between 15,150 and 17,000 Angstrom

    Examples
    --------
    >>> import numpy as np
    >>> from stellar_lab.spectrum import from_arrays
    >>> grid = np.linspace(1.70, 1.52, 5000)
    >>> from_arrays(grid, np.ones(5000), error=0.01)
    <Spectra: 1 stars, 5000 pixels from 15200.0 to 17000.0 Å, 100.0% of the pixels usable>
    """
    notes = []
    angstrom = _in_angstrom(wavelength, unit, notes)
    flux, ivar = _weights(flux, error, ivar, len(angstrom))
    if mask is not None:
        ivar = np.where(_plain(mask, "mask", len(angstrom)) != 0, 0, ivar)
    if velocity is not None:
        _check_number("velocity", velocity, -LIGHT / 10)
    sharp = _sharpness(resolution, fwhm, wavelength, len(angstrom))
    if air:
        angstrom = air_to_vacuum(angstrom)
    order = _order_in_range(angstrom)
    strange = _strange(flux[order], ivar[order])
    flux[order] = np.where(strange, 0, flux[order])
    ivar[order] = np.where(strange, 0, ivar[order])
    sharp = sharp if np.ndim(sharp) == 0 else sharp[order]
    star = _as_spectra(angstrom[order], flux[order], ivar[order], velocity, sharp, name, notes)
    star.stars["STRANGE_PIXELS"] = [int(strange.sum())]
    if doubtful is None:
        return star
    doubt = _plain(doubtful, "doubtful", len(angstrom))[order]
    return star.replace(mask=(doubt != 0).astype(np.int32)[None])


# %%
tiny = from_arrays(np.linspace(1.70, 1.52, 900), np.full(900, 1e-19), error=1e-21)
assert np.isfinite(tiny.ivar).all() and np.isclose(tiny.stars["SNR"][0], 100)
same = Spectra.from_arrays(np.linspace(1.70, 1.52, 900), np.full(900, 1e-19), error=1e-21)
assert np.array_equal(same.flux, tiny.flux)  # the class knows the way, too
tiny

# %% [markdown]
# ## From other people's objects and files
# A `Spectrum` of [specutils](https://specutils.readthedocs.io) carries its units, and says whether its uncertainty is a standard deviation, a variance or an inverse
# variance. We ask the object for these and need not import the package.

# %%
#| export
_TO_ERROR = {  # what specutils calls the kind of an uncertainty -> the 1-sigma error
    "std": lambda values: values,
    "var": np.sqrt,
    "ivar": lambda values: 1 / np.sqrt(values),
}


def from_specutils(spectrum, **options) -> Spectra:
    """A spectrum of one star, from a `Spectrum` of specutils.

    Parameters
    ----------
    spectrum : specutils.Spectrum
        or any object with `spectral_axis`, `flux`, `uncertainty` and perhaps `mask`
    **options
        for `from_arrays`, such as ``air=True``

    Returns
    -------
    Spectra

    Raises
    ------
    LabError
        where it has no uncertainty, or one of an unknown kind
    """
    uncertainty = getattr(spectrum, "uncertainty", None)
    if uncertainty is None:
        raise LabError("the spectrum has no uncertainty: set one, such as StdDevUncertainty")
    kind = getattr(uncertainty, "uncertainty_type", "unknown")
    if kind not in _TO_ERROR:
        raise LabError(f"an uncertainty of the type {kind!r}: give std, var or ivar")
    with np.errstate(divide="ignore", invalid="ignore"):
        error = _TO_ERROR[kind](np.asarray(uncertainty.array, dtype=float))
    mask = getattr(spectrum, "mask", None)
    return from_arrays(spectrum.spectral_axis, spectrum.flux, error, mask=mask, **options)


# %%
from astropy.nddata import InverseVariance  # the class that specutils uses, too


class LikeSpecutils:
    "The four attributes that we ask for."

    spectral_axis = np.linspace(1520, 1700, 900) * u.nm
    flux = np.ones(900) * u.Jy
    uncertainty = InverseVariance(np.full(900, 1e4))
    mask = np.arange(900) < 90


shown = from_specutils(LikeSpecutils())
assert np.isclose(np.sqrt(shown.ivar.max()), 100)
shown

# %% [markdown]
# A table is known by the names of its columns. Names are a matter of taste, so we take the usual ones; a unit may stand behind the name, as in `wavelength [nm]` or
# `wave_um`. Without names, columns count in the order wavelength, flux, error. Uncertainty has many forms, too: a standard deviation, a variance, an inverse variance, a
# share of the flux in per cent, a signal-to-noise ratio. All of them say the same, and become one.

# %%
#| export
_COLUMNS = {  # what a column may be called
    "wavelength": (
        "wavelength wavelengths wave lambda lam wl wvl loglam log_lambda log_wave loglambda "
        "log10_wavelength logwave wavenumber"
    ).split(),
    "flux": (
        "flux fluxes f_lambda intensity flux_norm norm_flux f spec spectrum normalized_flux "
        "flux_normalized normflux relative_flux flam"
    ).split(),
    "error": (
        "error err sigma sig flux_err flux_error uncertainty e_flux std unc flux_uncertainty "
        "err_flux error_flux flux_sigma sigma_flux flux_std stddev noise fluxerr eflux"
    ).split(),
    "ivar": ("ivar flux_ivar inverse_variance invvar").split(),
    "variance": ("variance var flux_var flux_variance").split(),
    "percent": ("error_percent err_percent error_pct percent_error").split(),
    "snr": ("snr sn s/n s2n").split(),
    "mask": ("mask bad and_mask").split(),
    "fwhm": ("fwhm lsf lsf_fwhm").split(),  # in the unit of the wavelengths
}
_LOGARITHMS = ("loglam", "log_lambda", "log_wave", "loglambda", "log10_wavelength", "logwave")
_UNCERTAINTIES = ("error", "ivar", "variance", "percent", "snr")  # the first that is there counts
_SUFFIXES = dict.fromkeys(("nm", "nanometer", "nanometers"), "nm")
_SUFFIXES |= dict.fromkeys(("um", "micron", "microns", "µm", "μm", "micrometer"), "um")
_SUFFIXES |= dict.fromkeys(("aa", "a", "å", "ang", "angstrom", "angstroms", "ångström"), "AA")
_SUFFIXES |= dict.fromkeys(("cm-1", "1/cm", "cm^-1", "/cm"), "1/cm") | {"%": "%", "percent": "%"}


def _split_name(name):
    "A column's name in lower case, its unit and whether it says air, as far as it says so."
    words = re.match(r"(.*?)[\s_]*[\[(](.*)[\])]\s*$", name.strip().lower())
    base, said = words.groups() if words else (name.strip().lower(), "")
    base = re.sub(r"[\s.-]+", "_", base)
    stem, _, tail = base.rpartition("_")
    if tail in _SUFFIXES and tail != "percent":
        base, said = stem, tail
    air = bool(re.search(r"[\s_]air$", base))
    base = re.sub(r"[\s_]+(air|vacuum|vac)$", "", base)
    return base, "1/cm" if base == "wavenumber" else _SUFFIXES.get(said.strip(), None), air


def _shown(names):
    "Names of columns for a message, whatever a damaged file holds in their place."
    return ", ".join(name if name.isprintable() else ascii(name) for name in names)


def _find_columns(names):
    "Role -> (name of the column, unit, air) in a table with these columns."
    found = {}
    split = {name: _split_name(name) for name in names}
    for role, known in _COLUMNS.items():
        for name, (base, unit, air) in split.items():
            if base in known:
                found.setdefault(role, (name, unit, air))
    return found


# %%
roles = _find_columns(["Wave_air_nm", "FLUX", "e_flux", "order"])
print(roles)
assert roles["wavelength"] == ("Wave_air_nm", "nm", True)
assert _find_columns(["wavelength [um]"])["wavelength"] == ("wavelength [um]", "um", False)
assert _split_name("lambda_air") == ("lambda", None, True)
assert set(_find_columns(["lambda(Å)", "normalized flux", "S/N"])) == {"wavelength", "flux", "snr"}

# %% [markdown]
# Files hold more than numbers. Some mark what is missing by a word, or by -9999. Some repeat a wavelength where two orders of a spectrograph overlap: two measurements, which
# we average with their weights. If a row is there twice, it is one measurement all the same.

# %%
#| export
_NO_NUMBER = {"", "null", "na", "n/a", "nan", "--", "-", "none", "indef", "masked", "inf"}
_MISSING = (0.0, -9999.0, -9999.99, -999.0)  # a flux of exactly this was not measured


def _column(column):
    "A column's values (P,), from one row per pixel or one row that holds them all; NaN if masked."
    values = np.ma.asarray(getattr(column, "value", column))
    if values.ndim > 1 and 1 < len(values) < values.shape[-1]:
        raise LabError(
            f"the column {_shown([column.info.name])} holds {len(values)} spectra, one per row: "
            "give a file for each"
        )
    if values.dtype.kind == "b":
        return np.ravel(values)
    try:
        if values.dtype.kind in "US":
            return np.array([_number(text) for text in np.ravel(values.filled(""))])
        return np.ravel(np.ma.filled(np.ma.asarray(values, dtype=float), np.nan))
    except (TypeError, ValueError) as error:
        named = _shown([column.info.name])
        raise LabError(f"the column {named} holds no numbers") from error


def _number(text):
    "A number that somebody wrote: 15,168.13 and 1.5D4 are some; NaN for words that say none."
    text = text.decode("latin-1") if isinstance(text, bytes) else str(text)
    if text.strip().lower() in _NO_NUMBER:
        return np.nan
    if re.fullmatch(r"\s*[+-]?\d{1,3}(,\d{3})+(\.\d*)?\s*", text):
        text = text.replace(",", "")
    return float(re.sub(r"(?<=[\d.])[dD](?=[+-]?\d)", "e", text))


# %%
words = ["15,168.13", "1.5D4", "NULL", "--", "15168.13"]
print([_number(word) for word in words])
with pytest.raises(LabError, match="holds 2 spectra, one per row"):
    _column(Table({"flux": np.ones((2, 5))})["flux"])


# %%
#| export
def _merged(values, notes):
    "The same arrays, sorted, with one pixel per wavelength: doubled ones are averaged."
    grid = values["wavelength"]
    order = np.lexsort((values["error"], values["flux"], grid))
    order = order[np.isfinite(grid[order])]
    place, first, number = np.unique(grid[order], return_index=True, return_counts=True)[:3]
    if len(place) == len(order):
        return values
    flux, error = values["flux"][order], values["error"][order]
    same = np.r_[False, (np.diff(grid[order]) == 0) & (np.diff(flux) == 0) & (np.diff(error) == 0)]
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = np.where(np.isfinite(flux) & (error > 0) & ~same, error**-2.0, 0)
    total = np.add.reduceat(weight, first)
    light = np.add.reduceat(np.where(weight > 0, weight * flux, 0), first)
    kept = {name: array[order][first] for name, array in values.items() if np.ndim(array)}
    safe = np.where(total > 0, total, 1)
    kept["flux"] = np.where(total > 0, light / safe, np.nan)
    kept["error"] = np.where(total > 0, 1 / np.sqrt(safe), np.nan)
    notes.append(f"{np.sum(number > 1)} wavelengths stand there more than once: averaged")
    return values | kept


# %%
twice = {"wavelength": np.array([2.0, 1.0, 2.0]), "flux": np.array([1.0, 5.0, 3.0])}
once = _merged(twice | {"error": np.ones(3)}, notes := [])
print(once, notes)
assert list(once["flux"]) == [5, 2] and np.isclose(once["error"][1], np.sqrt(0.5))


# %%
#| export
def _error_of(table, roles, values, notes):
    "The 1-sigma error (P,) from whatever a table has."
    kind = next(role for role in _UNCERTAINTIES if role in roles)
    name, said, _ = roles[kind]
    number = values[kind]
    flux = np.abs(values["flux"])
    absolute = table[roles["flux"][0]].unit == u.dimensionless_unscaled
    if kind == "error" and (said == "%" or str(table[name].unit) == "%") and not absolute:
        kind = "percent"
    elif kind == "error":
        scale = _scale(table[name].unit, table[roles["flux"][0]].unit)
        return number * scale
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind == "percent":
            notes.append(f"{name} is taken as the error in per cent of the flux")
            return number * flux / 100
        if kind == "snr":
            notes.append(f"{name} is taken as flux over error")
            return flux / number
        return np.sqrt(number) if kind == "variance" else np.where(number > 0, number, 0) ** -0.5


def _scale(unit, wanted):
    "From one unit to another, 1 where they do not go together or there is none."
    try:
        return u.Unit(unit).to(u.Unit(wanted))
    except (TypeError, ValueError, u.UnitsError):
        return 1.0


def _known_unit(unit):
    "A unit of wavelength, or None for anything else that a column may carry."
    try:
        unit = None if unit is None else u.Unit(unit)
        return unit if unit is not None and unit.is_equivalent(u.m) else None
    except (ValueError, TypeError):
        return None


# %%
for name, number in {
    "err": 0.02,
    "variance": 4e-4,
    "ivar": 2500.0,
    "err_percent": 1.0,
    "snr": 100.0,
}.items():
    pixel = Table({"wave": [1600.0], "flux": [2.0], name: [number]})
    numbers = {
        role: _column(pixel[column])
        for role, (column, _, _) in _find_columns(pixel.colnames).items()
    }
    (found,) = _error_of(pixel, _find_columns(pixel.colnames), numbers, [])
    print(f"{name:11} {number:6g}  ->  error {found:g}")
    assert np.isclose(found, 0.02)


# %%
#| export
@np.errstate(all="ignore")  # what a file holds may be any number
def from_table(table, **options) -> Spectra:
    """A spectrum of one star, from a table.

    Parameters
    ----------
    table : Table
        with columns such as wavelength, flux, error (or ivar) and perhaps mask; one row per pixel,
        or one row that holds arrays
    **options
        for `from_arrays`

    Returns
    -------
    Spectra

    Raises
    ------
    LabError
        where a column is missing; it lists those that there are
    """
    roles = _find_columns(table.colnames)
    if not {"wavelength", "flux"} <= roles.keys():
        lacking = " and ".join(sorted({"wavelength", "flux"} - roles.keys()))
        raise LabError(
            f"the table has no column of {lacking}: it has {_shown(table.colnames)}; "
            "call them wavelength, flux and error (or ivar)"
        )
    if not roles.keys() & set(_UNCERTAINTIES):
        raise LabError(
            f"the table has no errors: it has {', '.join(table.colnames)}; add a column error "
            "(1 sigma) or ivar. Labels without errors cannot be believed"
        )
    notes = []
    values = {role: _column(table[name]) for role, (name, _, _) in roles.items()}
    name, unit, air = roles["wavelength"]
    if _split_name(name)[0] in _LOGARITHMS:
        values["wavelength"] = 10 ** np.asarray(values["wavelength"], float)
        unit = "AA"
    unit = _known_unit(table[name].unit) or unit
    values["error"] = _error_of(table, roles, values, notes)
    weights = values.get("ivar") if "error" not in roles else None
    values = {role: v for role, v in values.items() if role not in _UNCERTAINTIES[1:]}
    missing = np.isin(values["flux"], _MISSING)
    if missing.any():
        values["flux"] = np.where(missing, np.nan, values["flux"])
        notes.append(f"{missing.sum()} pixels without flux are left out (0 or -9999)")
    if options.get("resolution") is not None:
        values.pop("fwhm", None)
    if len({len(array) for array in values.values()}) == 1:
        size = len(values["flux"])
        values = _merged(values, notes)
        if weights is not None and len(values["flux"]) == size:  # as they stand there, to the bit
            values["ivar"] = weights
            del values["error"]
    said = {key: value for key, value in (("unit", unit), ("air", air)) if value}
    spectra = from_arrays(**(values | said | options))
    spectra.stars.meta["notes"] = notes + spectra.stars.meta["notes"]
    return spectra


# %%
grid = np.linspace(1520, 1700, 900)
as_columns = Table({"wave_nm": grid, "flux": np.ones(900), "err": np.full(900, 0.02)})
as_arrays = Table({name: [as_columns[name]] for name in as_columns.colnames})  # one row
assert np.array_equal(from_table(as_columns).wavelength, from_table(as_arrays).wavelength)
with pytest.raises(LabError, match="has no errors: it has wave_nm, flux"):
    from_table(as_columns["wave_nm", "flux"])
from_table(as_columns)

# %% [markdown]
# Text files may say more in comments: `# velocity: -12.3`, `# resolution: 11000`, `# air: yes`, `# unit: nm`, `# name: my star`. Images with one axis say their
# wavelengths in the header, as IRAF did.

# %%
#| export
_NOTED = {"velocity": float, "resolution": float, "unit": str, "name": str, "air": str}
_TEXT_FILES = (".csv", ".txt", ".dat", ".ecsv", ".asc", ".ascii", ".tsv")


def _comments(text, path):
    "What comments such as `# velocity: 12` say, as options for `from_arrays`."
    options = {}
    for line in text.split("\n"):
        if not line.startswith("#"):
            break
        match = re.match(r"#\s*(\w+)\s*[:=]\s*(.+?)\s*$", line)
        if match and match[1].lower() in _NOTED:
            options[match[1].lower()] = match[2]
    for key, value in options.items():
        try:
            options[key] = _NOTED[key](value)
        except ValueError as error:
            raise LabError(f"{path}: the comment '{key}: {value}' is no number") from error
    if "air" in options:
        options["air"] = options["air"].lower() in ("yes", "true", "1", "air")
    return options


# %%
_comments("# velocity: -12.3\n# air: yes\n# taken through thin clouds\nwave,flux\n", "my.csv")


# %% [markdown]
# Tables of text come from many hands: with a byte-order mark, in Windows' encoding, with decimal commas, with a line of units below the names. What follows brings them into one
# form, and leaves the columns to astropy.

# %%
#| export
def _text_of(path):
    "The text of a file, packed or not, in whatever encoding; LabError for what is no text."
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with (gzip.open if packed else open)(path, "rb") as file:
        content = file.read(_LARGEST_TEXT)
    for encoding in ("utf-16",) if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig",):
        with suppress(UnicodeDecodeError):
            return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    if b"\0" in content[:4096]:
        raise LabError(f"{path} is no text, and no FITS or NumPy file either")
    return content.decode("latin-1").replace("\r\n", "\n").replace("\r", "\n")


_LARGEST_TEXT = 1 << 28  # bytes
_SEPARATORS = (";", "\t", "|", ",")


def _lines_of(text):
    "Lines that are no comments, decimal points for commas, and what separates their columns."
    lines = [line for line in text.split("\n") if line.strip() and line.lstrip()[0] not in "#%!"]
    few = (lines[2:] or lines or [""])[-200:]
    found = (mark for mark in _SEPARATORS if np.median([line.count(mark) for line in few]) >= 1)
    mark = next(found, None)
    fields = [field.strip() for line in few for field in line.split(mark)]
    commas = sum(bool(re.fullmatch(r"[+-]?\d+,\d+([eE][+-]?\d+)?", field)) for field in fields)
    if mark != "," and commas > len(fields) / 2:
        lines = [line.replace(",", ".") for line in lines]
    return lines, mark


def _has_names(line, mark):
    "Whether a first line names columns: some of it is no number and no word for none."
    try:
        for field in line.split(mark):
            _number(field.strip(' "'))
    except ValueError:
        return True
    return False


def _commented_names(text, mark, number):
    "Names of columns in the last comment before the numbers, if there are so many; else None."
    head = [line for line in text.split("\n")[:200] if line.lstrip().startswith("#")]
    names = [field.strip() for field in head[-1].lstrip("# ").split(mark)] if head else []
    known = _find_columns(names)
    return names if len(names) == number and {"wavelength", "flux"} <= known.keys() else None


# %%
for text in ("# mine\nwave;flux\n1,5;2,5\n", "1.5 2.5\n", 'a,b\n"1,500.5","2"\n'):
    lines, mark = _lines_of(text)
    print(repr(mark), lines, _has_names(lines[0], mark))


# %%
#| export
def _read_text(path):
    "Table and options of a text file, which has no checksum; LabError where it is none."
    text = _text_of(path)
    start = text.lstrip()[:200]
    if start.startswith("# MIST"):
        raise LabError(f"{path} holds isochrones (MIST), no spectrum")
    if start.lower().startswith(("<!doctype html", "<html")):
        raise LabError(
            f"{path} is no table of text but a page of the web: was the download refused?"
        )
    try:
        if start.startswith("# %ECSV"):
            return Table.read(text.split("\n"), format="ascii.ecsv"), {}, False
        if start.startswith(("<?xml", "<VOTABLE")):
            return Table.read(path, format="votable"), {}, False
        table = _any_table(text)
    except Exception as error:  # whatever the guessing of formats comes to
        raise LabError(
            f"{path} is no table of text: give columns wavelength, flux, error, "
            "with or without a line of names, separated by commas or spaces"
        ) from error
    if not len(table):
        raise LabError(f"{path} has names of columns and no rows")
    return table, _comments(text, path), False


def _any_table(text):
    "A table of text, by our rules, or else by astropy's guess."
    lines, mark = _lines_of(text)
    try:
        table = _table_of(lines, mark)
        names = _commented_names(text, mark, len(table.colnames))
        if names and not _has_names(lines[0], mark):
            table.rename_columns(table.colnames, names)
        if {"wavelength", "flux"} <= _find_columns(table.colnames).keys():
            return table
    except Exception:  # whatever astropy raises: it guesses now
        return text_tables.read(text.split("\n"))
    with suppress(Exception):
        guessed = text_tables.read(text.split("\n"))
        if {"wavelength", "flux"} <= _find_columns(guessed.colnames).keys():
            return guessed
    return table


def _table_of(lines, mark):
    "A table of lines of text; columns without names are wavelength, flux, error."
    named = _has_names(lines[0], mark)
    kind = "basic" if named else "no_header"
    table = text_tables.read(lines, format=kind, delimiter=mark or " ", guess=False)
    names = table.colnames
    if not named and len(names) in (2, 3):
        table.rename_columns(names, ("wavelength", "flux", "error")[: len(names)])
    units = [_known_unit(_SUFFIXES.get(str(field).strip().lower(), field)) for field in table[0]]
    if named and any(units) and not any(str(field)[:1].isdigit() for field in table[0]):
        table = table[1:]  # the first row says units
        for name, unit in zip(names, units):
            table[name].unit = unit
    return table


# %%
table = _table_of(*_lines_of("wave;flux;error\nnm;;\n1520,5;1,0;0,1\n1520,6;1,1;0,1\n"))
print(table)
assert _column(table["wave"])[0] == 1520.5 and table["wave"].unit == u.nm


# %% [markdown]
# FITS has tables, and images whose header says the wavelengths, as IRAF wrote them: one axis; or several bands, one of which is the error; or the orders of an echelle, each with its own
# wavelengths in a text that is spread over many cards ("multispec"). Others put wavelength, flux and error into an image each.

# %%
#| export
def _axes_of(header, orders):
    "Wavelengths (orders, pixels) that a header says; None where it says none."
    text = "".join(str(header[key]).ljust(68) for key in header if key.startswith("WAT2_"))
    place = np.arange(header["NAXIS1"])
    if "multispec" in text:
        found = re.findall(r'spec\d+\s*=\s*"([^"]*)"', text)
        if len(found) != orders:
            return None
        return np.array([_order_of(entry.split(), place) for entry in found])
    step = header.get("CDELT1", header.get("CD1_1"))
    if "CRVAL1" not in header or not step or orders != 1:
        return None
    axis = header["CRVAL1"] + step * (place + 1 - header.get("CRPIX1", 1))
    logarithmic = header.get("DC-FLAG") == 1 or "LOG" in str(header.get("CTYPE1", "")).upper()
    return [10**axis if logarithmic else axis]


def _order_of(entry, place):
    "Wavelengths of one order: its type, first wavelength, step, number of pixels and redshift."
    kind = int(entry[2])
    if kind not in (0, 1):
        raise LabError(
            "its wavelengths are a function that we do not know (nonlinear multispec): "
            "write it as a table of wavelength, flux and error"
        )
    first, step = float(entry[3]), float(entry[4])
    axis = first + step * place
    axis = 10**axis if kind == 1 else axis
    axis = axis / (1 + float(entry[6]))
    return np.where(place < int(entry[5]), axis, np.nan)


# %%
card = 'wtype=multispec spec1 = "1 1 0 15200. 0.2 4 0. 1. 1." spec2 = "2 2 1 4.2 1e-5 3 0. 1. 1."'
header = fits.Header({"NAXIS1": 4, "WAT2_001": card[:60], "WAT2_002": card[60:]})
print(_axes_of(header, 2).round(1))


# %%
#| export
def _of_named_images(hdus):
    "Table of images called WAVE, FLUX, ERR or so; None where there are none."
    images = {h.name: h for h in hdus if h.is_image and h.shape is not None and h.size and h.name}
    roles = _find_columns(images)
    if not {"wavelength", "flux"} <= roles.keys():
        return None
    size = np.prod(images[roles["flux"][0]].shape)
    columns = {role: images[name] for role, (name, _, _) in roles.items()}
    table = Table({r: np.ravel(h.data) for r, h in columns.items() if np.prod(h.shape) == size})
    if "wavelength" not in table.colnames:
        return None
    table["wavelength"].unit = _known_unit(columns["wavelength"].header.get("BUNIT"))
    return table


def _of_image(hdus):
    "Table of an image with wavelengths in its header; None where there is none."
    images = [hdu for hdu in hdus if hdu.is_image and hdu.shape is not None and hdu.size]
    if not images:
        return None
    header = images[0].header
    shape = images[0].shape
    if len(shape) > 3:
        return None
    bands = np.asarray(images[0].data, float).reshape((1, 1, *shape)[-3:])  # of orders of pixels
    axes = _axes_of(header, bands.shape[1])
    if axes is None:
        return None
    table = Table({"wavelength": np.ravel(axes), "flux": np.ravel(bands[0])})
    table["wavelength"].unit = _known_unit(header.get("CUNIT1"))
    for number in range(1, len(bands)):
        if "sigma" in str(header.get(f"BANDID{number + 1}", "")).lower():
            table["error"] = np.ravel(bands[number])
    for hdu in images[1:]:
        name = next((n for n in ("ivar", "variance") if n[:3].upper() in hdu.name.upper()), "error")
        name = "ivar" if "IVAR" in hdu.name.upper() else name
        if np.prod(hdu.shape) == len(table) and name not in table.colnames:
            table[name] = np.ravel(hdu.data)
    return table


# %%
iraf = fits.PrimaryHDU(np.ones(4), fits.Header({"CRVAL1": 15_200.0, "CDELT1": 0.2}))
print(_of_image([iraf, fits.ImageHDU(np.full(4, 0.02), name="ERROR")]))
images = {"WAVE": [15_200.0, 15_200.2], "FLUX": [1.0, 0.9], "ERR": [0.02, 0.02]}
print(_of_named_images([fits.ImageHDU(np.array(v), name=k) for k, v in images.items()]))


# %%
#| export
def _read_fits(path):
    "Table, options and whether a checksum fits, of a FITS file; LabError for no spectrum."
    with checked_hdus(path) as (hdus, verified):
        options = _of_header(hdus[0].header)
        for hdu in hdus[1:]:
            names = [] if hdu.is_image else hdu.columns.names
            if {"wavelength", "flux"} <= _find_columns(names).keys():
                return Table.read(hdus, hdu=hdus.index_of(hdu)), options, verified
        try:
            table = _of_named_images(hdus) or _of_image(hdus)
        except LabError as error:
            raise LabError(f"{path}: {error}") from error
        held = ", ".join(map(_in_words, hdus)) or "nothing"
    if table is None:
        raise LabError(
            f"{path} holds no spectrum that we know, but {held}: give a table with columns "
            "wavelength, flux and error, or an image of one axis with CRVAL1 and CDELT1"
        )
    return table, options, verified


def _in_words(hdu):
    "What an HDU is, in a few words."
    if not hdu.is_image:
        names = hdu.columns.names
        return f"a table ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
    if not hdu.size:
        return "a header"
    return f"an image of {' x '.join(map(str, hdu.shape))}"


def _of_header(header):
    "Options that a FITS header says: ESO's SPEC_RES, and OBJECT."
    options = {"resolution": header.get("SPEC_RES"), "name": header.get("OBJECT")}
    return {key: value for key, value in options.items() if value}


# %%
scratch = tempfile.TemporaryDirectory()
here = Path(scratch.name)
iraf.header["OBJECT"] = "my star"
fits.HDUList([iraf, fits.ImageHDU(np.full(4, 0.02), name="ERROR")]).writeto(here / "iraf.fits")
table, options, verified = _read_fits(here / "iraf.fits")
print(len(table), "pixels,", options)


# %%
#| export
def _read_numpy(path):
    "Table of the arrays (P,) in a file of NumPy; the survey's pixels are known by their number."
    try:
        with open(path, "rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.ndarray):
                return _of_rows(file, path), {}, False
            arrays = {name: np.squeeze(file[name]) for name in file.files}
    except LabError:
        raise
    except Exception as error:  # whatever a damaged file comes to
        raise LabError(
            f"{path} is damaged: what is packed in it cannot be read; is it cut short?"
        ) from error
    columns = {name: array for name, array in arrays.items() if array.ndim == 1}
    sizes = {len(array) for array in columns.values()}
    if len(sizes) != 1:
        held = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise LabError(
            f"{path} holds {held or 'nothing'}: a spectrum has arrays wavelength, flux and error "
            "of one length"
        )
    table = Table(columns)
    if "wavelength" not in _find_columns(columns) and sizes == {len(SURVEY_GRID)}:
        table["wavelength"] = SURVEY_GRID
    return table, {}, True  # an archive of zip has a checksum for each array


def _of_rows(array, path):
    "Table of an array (3, P) or (P, 3): wavelength, flux, error."
    array = array.T if array.ndim == 2 and array.shape[1] == 3 else array
    if array.ndim != 2 or len(array) != 3:
        raise LabError(
            f"{path} holds one array of the shape {array.shape}: a spectrum has three, wavelength, "
            "flux and error"
        )
    return Table(list(array), names=("wavelength", "flux", "error"))


# %%
np.savez(here / "survey.npz", flux=np.ones(7214), error=np.full(7214, 0.02))
table, _, verified = _read_numpy(here / "survey.npz")
print(len(table), "pixels, from", table["wavelength"][0].round(2), "Å; checksum fits:", verified)
np.save(here / "odd.npy", np.ones((5, 7)))
with pytest.raises(LabError, match="holds one array of the shape") as said:
    _read_numpy(here / "odd.npy")


# %% [markdown]
# A folder holds other things than spectra. A glance at a file's name, or inside, says whether it is worth reading.

# %%
#| exporti
def _is_text(path) -> bool:
    "Whether a path has an extension of text files that may hold a spectrum."
    return Path(path).suffix.lower() in _TEXT_FILES


def holds_spectrum(path) -> bool:
    """Whether a file is one that `read_spectrum` may read, from its name or a glance inside.

    Parameters
    ----------
    path : str or Path
        of a file that is none of the survey's own stars

    Returns
    -------
    bool
    """
    if _is_text(path) or Path(path).suffix.lower() in (".npz", ".npy", ".vot", ".xml", ".parquet"):
        return True
    if what_stands_at(path):  # a pipe would be waited for
        return False
    try:
        if not _may_be_fits(path):
            return bool(np.isfinite(_any_number(path)))
        with checked_hdus(path) as (hdus, _):
            if any(hdu.name == "COADD" for hdu in hdus[1:]):  # an optical spectrum of the survey
                return False
            tables = [hdu.columns.names for hdu in hdus[1:] if not hdu.is_image]
            if any({"wavelength", "flux"} <= _find_columns(names).keys() for names in tables):
                return True
            images = [hdu for hdu in hdus if hdu.is_image and hdu.shape]
            if {"wavelength", "flux"} <= _find_columns(hdu.name for hdu in images).keys():
                return True
            return bool(images) and _axes_of(images[0].header, _orders(images[0].shape)) is not None
    except Exception:  # whatever a damaged file makes astropy raise
        return False


def _orders(shape):
    "How many orders an image of this shape has."
    return 1 if len(shape) == 1 else shape[-2]


def _may_be_fits(path):
    "Whether a file begins as FITS does, unpacked."
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with (gzip.open if packed else open)(path, "rb") as file:
        return file.read(6) == b"SIMPLE"


def _any_number(path):
    "A number that stands in the last line of a text; LabError or ValueError where none does."
    lines, mark = _lines_of(_text_of(path))
    return _number(lines[-1].split(mark)[0])


# %%
(here / "notes.pdf").write_bytes(b"%PDF-1.4")
for file in sorted(here.iterdir()):
    print(f"{file.name:11} {holds_spectrum(file)}")
assert not holds_spectrum(here / "notes.pdf")


# %%
#| export
def read_spectrum(path, **options) -> Spectra:
    """A spectrum of one star, from a file of one's own.

    Parameters
    ----------
    path : str or Path
        text (CSV or any other that astropy guesses), a FITS table or a FITS image of one axis
    **options
        for `from_arrays`; what is given here overrides what the file says

    Returns
    -------
    Spectra

    Raises
    ------
    LabError
        where there is no spectrum in it, or not one that a model could read

    Examples
    --------
    >>> from stellar_lab import read_spectrum
    >>> star = read_spectrum("my.csv", velocity=-12.3, resolution=11_000)  # doctest: +SKIP
    """
    path = Path(path)
    other = what_stands_at(path)
    if other:
        raise LabError(f"{path} is {other}, not a file: give a spectrum")
    try:
        with open(path, "rb") as file:
            start = file.read(80)
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror}") from error
    if not start:
        raise LabError(f"{path} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd units of other people's columns
            table, noted, verified = _reader_of(path, start)(path)
    except (OSError, EOFError) as error:
        raise LabError(f"{path} cannot be read ({said_of(error)}); is it cut short?") from error
    spectra = _named(path, table, {"name": path.stem} | noted | options)
    spectra.stars["FILE"] = [path.name]
    spectra.stars["VERIFIED"] = [verified]
    return spectra


def _reader_of(path, start):
    "The function that reads a file which begins so."
    if start.startswith((b"PK", b"\x93NUMPY")):
        return _read_numpy
    if start.startswith(b"PAR1"):
        return _read_parquet
    return _read_fits if _may_be_fits(path) else _read_text


def _read_parquet(path):
    "Table of a Parquet file."
    try:
        return Table.read(path, format="parquet"), {}, False
    except Exception as error:  # of a library that may be missing
        raise LabError(f"{path} cannot be read: {said_of(error)}") from error


def _named(path, table, options):
    "`from_table`, whose complaints name the file."
    try:
        return from_table(table, **options)
    except LabError as error:
        raise LabError(f"{path.name}: {error}") from error


# %%
lines = [f"{w:.5f}, 1.0, 0.02" for w in grid]
(here / "my.csv").write_text(
    "# velocity: -12.5\n# air: yes\nwavelength, flux, error\n" + "\n".join(lines)
)
mine = read_spectrum(here / "my.csv")
print(mine, mine.stars["APOGEE_ID"][0], mine.stars["VELOCITY"][0], mine.stars.meta["notes"])
(here / "bare.txt").write_text("\n".join(line.replace(",", " ") for line in lines))
assert len(read_spectrum(here / "bare.txt").wavelength) == 900  # no names at all
shift = mine.wavelength[0] / (grid[0] * 10)
assert np.isclose(shift, 1.000273 * (1 + 12.5 / LIGHT), rtol=1e-6)  # vacuum, and at rest


# %% [markdown]
# ## What resampling does to errors
# Some readers, such as [ridge regression](13_readers.ipynb), want their own pixels and nothing else. For them a star must be resampled. A new pixel is the mean of the
# old ones that it covers, each weighted by the overlap $W_{qp}$; then no flux is lost ([Carnall 2017](https://arxiv.org/abs/1705.05165)). The error of one pixel is
# easy, $\sum_p W_{qp}^2\sigma_p^2$. But two new pixels that share an old one share its noise: their covariance is $C=W\,\mathrm{diag}(\sigma^2)\,W^\top$.
#
# A fit that sums over pixels sees no covariance. What it needs is an *effective* variance that keeps the information of a whole line right, and lines are wider than
# pixels. That is the sum of a row of the covariance,
# $$ \sigma_{\mathrm{eff},q}^2=\sum_r C_{qr} . $$

# %%
#| export
def _edges(grid):
    "Borders (P + 1,) of pixels, halfway between their centres."
    middle = (grid[1:] + grid[:-1]) / 2
    return np.concatenate([[2 * grid[0] - middle[0]], middle, [2 * grid[-1] - middle[-1]]])


def _overlaps(grid, new):
    "Share of each new pixel that each old pixel covers, as a sparse matrix (Q, P)."
    edges, borders = _edges(grid), _edges(new)
    cuts = np.unique(np.concatenate([edges, borders]))
    cuts = cuts[(cuts >= max(edges[0], borders[0])) & (cuts <= min(edges[-1], borders[-1]))]
    middle = (cuts[1:] + cuts[:-1]) / 2
    old = np.clip(np.searchsorted(edges, middle) - 1, 0, len(grid) - 1)
    row = np.clip(np.searchsorted(borders, middle) - 1, 0, len(new) - 1)
    share = np.diff(cuts) / np.diff(borders)[row]
    return csr_array((share, (row, old)), shape=(len(new), len(grid)))


_COVERED = 0.99  # share of a new pixel that good old ones must cover


def resample(grid, flux, ivar, new) -> tuple:
    """A spectrum on other pixels, flux conserved, for readers that want their own pixels.

    Parameters
    ----------
    grid, new : (P,) and (Q,) arrays
        increasing wavelengths
    flux, ivar : (P,) arrays
        inverse variance 0 where a pixel is unusable

    Returns
    -------
    tuple of two (Q,) arrays
        flux, NaN where nothing is known, and the effective inverse variance: it accounts for the
        noise that neighbours share, so that sums over pixels keep their errors

    Notes
    -----
    The rule of Carnall 2017, arXiv:1705.05165, for the flux; ivar = 1 / (W diag(1/ivar) W^T 1).
    """
    grid, new = np.asarray(grid, float), np.asarray(new, float)
    good = (np.asarray(ivar) > 0) & np.isfinite(flux)
    weights = _overlaps(grid, new)
    known = weights @ good.astype(float) >= _COVERED
    variance = np.where(good, 1 / np.where(good, ivar, 1), 0)
    spread = weights @ (variance * (weights.T @ np.ones(len(new))))
    mean = weights @ np.where(good, flux, 0)
    usable = known & (spread > 0)
    return np.where(known, mean, np.nan), np.where(usable, 1 / np.where(usable, spread, 1), 0)


# %% [markdown]
# The published example of this rule: pixels at 3, 5 and 13, on which specutils was once [found wrong](https://github.com/astropy/specutils/issues/1059). The first new
# pixel reaches beyond the data and has no value. (The resampler of specutils gave [wrong errors](https://github.com/astropy/specutils/issues/1300) until early 2026, which is
# why we do not use it.)

# %%
flux, _ = resample([3, 5, 13], np.array([2.5, 4.5, 8.5]), np.ones(3), [2, 6, 10])
assert np.isnan(flux[0]) and np.allclose(flux[1:], [4.5, 7.5])
flux

# %% [markdown]
# Does the effective error hold? We resample pure noise and measure the strength of a line, once with the error of single pixels and once with the effective one. With
# independent pixels the pulls have the width 1.

# %%
rng = np.random.default_rng(19)
fine = np.arange(15_800, 16_000, 0.22)
line = np.exp(-0.5 * ((fine - 15_900) / 1.5) ** 2)


def pulls(step, errors):
    "Line strengths in pure noise on pixels of `step`, over their stated errors."
    grid = np.arange(15_790, 16_010, step)
    weights = _overlaps(grid, fine)
    single = weights.power(2) @ np.ones(len(grid))
    noise = np.array(
        [
            resample(grid, rng.standard_normal(len(grid)), np.ones(len(grid)), fine)
            for _ in range(300)
        ]
    )
    ivar = noise[:, 1] if errors == "effective" else 1 / single
    strength = (noise[:, 0] * ivar * line).sum(axis=1)
    return strength / np.sqrt((ivar * line**2 + 0 * noise[:, 0]).sum(axis=1))


per_pixel = [0.5, 0.8, 1.0, 1.5, 2.0, 3.0]
widths = {
    kind: [pulls(0.22 / n, kind).std() for n in per_pixel] for kind in ("single", "effective")
}
fig, ax = plt.subplots(figsize=(6, 2.8))
ax.plot(per_pixel, widths["single"], "o-", color="C1", label="error of single pixels")
ax.plot(per_pixel, widths["effective"], "o-", color="C0", label="effective error")
ax.axhline(1, color="0.6", lw=0.8)
ax.set(xlabel="old pixels per new pixel", ylabel="width of the pulls", ylim=(0.7, 2.3))
ax.set_title("The strength of a line after resampling")
ax.legend(frameon=False);

# %% [markdown]
# **What to see.** Where one old pixel feeds several new ones (left), the naive error is much too small. The effective error holds everywhere.

# %%
assert np.all(np.abs(np.array(widths["effective"]) - 1) < 0.15) and widths["single"][0] > 1.3

# %% [markdown]
# ## The model goes to the star
# Now the better way. A model spectrum is asked for at any wavelength by interpolation between its pixels, and blurred if the star's spectrograph sees less sharply. Both
# are one matrix $W$ with a row per pixel of the star. Widths of Gaussians add in squares: what is missing between the model's resolution $R_m$ and the star's $R$ is
# $$ \sigma=\frac{\lambda}{2.355}\sqrt{R^{-2}-R_m^{-2}} . $$
# The rows are Lanczos kernels, the windowed form of the interpolation that loses nothing of a well sampled spectrum, blurred by that Gaussian. (The resolution of a
# spectrum is that of its lines as they are seen; the width of its pixels is part of it.)

# %%
#| export
_RESOLUTION = 22_500  # of the survey's spectra: wavelength over FWHM
_FWHM = np.sqrt(8 * np.log(2))  # of a Gaussian, in sigmas
_LANCZOS = 6  # pixels that the interpolation reaches


def _lanczos(x):
    "Lanczos kernel at distances in pixels."
    return np.where(np.abs(x) < _LANCZOS, np.sinc(x) * np.sinc(x / _LANCZOS), 0)


def _kernel(distance, sigma):
    "Weight of pixels at a distance, from interpolation blurred by a Gaussian; both in pixels."
    wide = np.maximum(sigma, 1.0)
    gauss = np.exp(-0.5 * (distance / wide) ** 2) / (wide * np.sqrt(2 * np.pi))
    if np.all(sigma >= 1):
        return gauss
    if not np.any(sigma):
        return _lanczos(distance)
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    narrow = sum(w * _lanczos(distance - sigma * x) for x, w in zip(nodes, weights))
    return np.where(sigma >= 1, gauss, narrow / weights.sum())


def _pieces(grid):
    "Slices of a grid between its gaps."
    steps = np.diff(np.log(grid))
    breaks = np.flatnonzero(steps > 1.5 * np.median(steps)) + 1
    ends = [0, *breaks.tolist(), len(grid)]
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:])]


# %%
fig, ax = plt.subplots(figsize=(6, 2.8))
distance = np.linspace(-7, 7, 281)
for sigma in (0, 0.6, 2):
    ax.plot(distance, _kernel(distance, np.array(float(sigma))), label=f"{sigma:g}")
ax.set(xlabel="distance [pixels of the model]", ylabel="weight")
ax.set_title("How a star's pixel sees the model's, for three widths of blur")
ax.legend(frameon=False, title="sigma of the blur\n[pixels]", loc="upper left");


# %% [markdown]
# **What to see.** Without blur the kernel is 1 at its own pixel and 0 at all others, so a star on the model's pixels sees them as they are. A wide blur is a plain Gaussian.

# %%
#| export
@dataclass(frozen=True)
class _Sampling:
    "How a model's pixels are seen by a star's: weights (Q, P), and what a star's pixel is."

    weights: csr_array
    inside: np.ndarray  # (Q,) bool, the model knows all that the pixel sees
    dense: np.ndarray  # (Q,) the star's pixels per pixel of the model
    sigma: np.ndarray  # (Q,) blur, in pixels of the model


def _sampling(grid, new, fwhm, average=False):
    """The `_Sampling` of a model's grid at other wavelengths (Q,), blurred by `fwhm` (Q,) Angstrom.

    With `average`, pixels wider than the grid's take in all that they cover."""
    rows, columns = [np.zeros(0, int)], [np.zeros(0, int)]
    values = [np.zeros(0)]
    inside = np.zeros(len(new), bool)
    dense = np.ones(len(new))
    blur = np.zeros(len(new))
    for piece in _pieces(grid):
        part = np.log(grid[piece])
        if len(part) < 2:
            continue  # a lone pixel, between which nothing lies
        step = np.median(np.diff(part))
        here = np.flatnonzero((new >= grid[piece][0]) & (new <= grid[piece][-1]))
        place = np.interp(np.log(new[here]), part, np.arange(len(part)))
        sigma = fwhm[here] / _FWHM / (new[here] * step)
        reach = int(np.ceil((3 if average else 1) * _LANCZOS + 5 * sigma.max(initial=0)))
        pixels = np.rint(place).astype(int)[:, None] + np.arange(-reach, reach + 1)
        distance = pixels - place[:, None]
        if average and len(here) > 1:
            distance = distance / np.clip(np.gradient(place), 1, 4)[:, None]
        value = _kernel(distance, sigma[:, None])
        off = (pixels < 0) | (pixels >= len(part))
        lost = np.where(
            off,
            np.exp(-0.5 * ((pixels - place[:, None]) / np.maximum(sigma, 1e-3)[:, None]) ** 2),
            0,
        )
        rows.append(np.repeat(here, pixels.shape[1]))
        columns.append(np.clip(pixels, 0, len(part) - 1).ravel() + piece.start)
        values.append((value / value.sum(axis=1, keepdims=True)).ravel())
        inside[here] = lost.sum(axis=1) <= 0.02 * np.maximum(sigma * np.sqrt(2 * np.pi), 1)
        if len(new) > 1:
            dense[here] = step / np.gradient(np.log(new))[here]
        blur[here] = sigma
    index = (np.concatenate(rows), np.concatenate(columns))
    weights = csr_array((np.concatenate(values), index), shape=(len(new), len(grid)))
    return _Sampling(weights, inside, dense, blur)


# %% [markdown]
# A spectrograph that blurs more at the red end than at the blue: the width of each pixel counts at that pixel. A line in the middle of each half of a toy spectrum must get its own width.

# %%
ends = np.array([wavelength[3200], wavelength[5000]])
lines = 1 - 0.4 * np.exp(-0.5 * ((wavelength[:, None] - ends) / 0.45) ** 2).sum(axis=1)
widths = np.interp(wavelength, ends, [0.8, 2.4])
seen = _sampling(wavelength, wavelength, widths).weights @ lines
for end, fwhm in zip(ends, (0.8, 2.4)):
    depth = 1 - seen[np.abs(wavelength - end).argmin()]
    expected = 0.4 * 0.45 / np.hypot(0.45, fwhm / _FWHM)
    print(f"depth {depth:.4f}, expected {expected:.4f}")
    assert abs(depth - expected) < 2e-3


# %% [markdown]
# APOGEE itself says more: for each chip the coefficients of a profile, a sum of Gauss-Hermite functions and a wing, whose parameters are polynomials of the pixel. The header of the
# extension explains their order; [public code](https://github.com/jobovy/apogee/blob/main/apogee/spec/lsf.py) reads them so, too. We take from them what we can use, the width: one
# Gaussian of that FWHM stands for the profile. Its wings, some percent of the light, are left out.

# %%
#| exporti
def lsf_fwhm(coefficients, pixels) -> np.ndarray:
    """Width of APOGEE's line-spread function, from the coefficients in its files.

    Parameters
    ----------
    coefficients : (C,) array
        of one chip: a row of HDU 10 of an apVisit file, or HDU 8 of an apStar file
    pixels : (P,) array
        where, counted from 0

    Returns
    -------
    (P,) array
        FWHM in pixels

    Notes
    -----
    The order is binsize, X0, Horder, Porder, GHcoefs, Wproftype, nWpar, WPorder, Wcoefs. With x the
    pixel plus X0, sigma and the Hermite terms H1 to H5 are polynomials of x; H0 is what the wing, a
    Gaussian, leaves of 1. The profile is averaged over binsize, the width of a detector's pixel.
    """
    numbers = np.asarray(coefficients, float)
    if numbers.ndim != 1 or len(numbers) < 6 or not 0 <= numbers[2] <= 12:
        raise LabError("these are no coefficients of APOGEE's line-spread function")
    order = int(numbers[2])
    terms, rest = _polynomials(numbers[3 : 4 + order], numbers[4 + order :])
    number = int(rest[1])
    wing, _ = _polynomials(rest[2 : 2 + number], rest[2 + number :])
    nodes = np.unique(np.linspace(np.min(pixels), np.max(pixels), 33))
    widths = [_profile_width(numbers[0], terms, wing, node + numbers[1]) for node in nodes]
    return np.interp(pixels, nodes, widths)


def _polynomials(orders, numbers):
    "Coefficients of polynomials of these orders, and the numbers that are left."
    cuts = np.cumsum(orders.astype(int) + 1)
    return np.split(numbers[: cuts[-1]], cuts[:-1]), numbers[cuts[-1] :]


def _profile_width(binsize, terms, wing, place):
    "FWHM of the profile at one place."
    sigma, *hermite = (np.polynomial.polynomial.polyval(place, term) for term in terms)
    share, broad = (np.polynomial.polynomial.polyval(place, term) for term in wing)
    step = sigma / 100
    x = np.arange(-8 * sigma, 8 * sigma, step)
    scale = np.sqrt([math.factorial(k) for k in range(len(terms))])
    series = np.polynomial.hermite_e.hermeval(x / sigma, np.array([1 - share, *hermite]) / scale)
    profile = series * np.exp(-0.5 * (x / sigma) ** 2) / sigma
    profile = profile + share * np.exp(-0.5 * (x / broad) ** 2) / broad
    bins = max(round(binsize / step), 1)
    profile = np.convolve(profile, np.ones(bins) / bins, "same")
    return np.count_nonzero(profile >= profile.max() / 2) * step


# %%
plain = [0, 0, 0, 0, 1.5, 1, 2, 0, 0, 0.0, 9.0]  # a Gaussian of sigma 1.5, no wing
real = [1, 4287, 5, 1, 1, 1, 1, 1, 0, 1.5426, 9.66e-6, 0.0147, -5.38e-6, -0.193, 1.6e-6, 0.034]
real += [-2.1e-6, 0.153, 5.5e-6, -0.064, 1, 2, 0, 0, 0.01, 0.031]  # of an apStar file of DR13
assert np.isclose(lsf_fwhm(plain, [0, 10])[0], 1.5 * _FWHM, rtol=0.01)
fwhm = lsf_fwhm(real, np.array([400, 4300, 8300]))
print("R =", np.round(1 / (fwhm * 6e-6 * np.log(10)), -2))
with pytest.raises(LabError, match="no coefficients"):
    lsf_fwhm([1, 2], [0])

# %% [markdown]
# A check against another interpolation, cubic splines, which is how the test makes its truth: a toy spectrum, sampled between its pixels, blurred analytically.

# %%
toy = wavelength[3000:3800]
centre, width = 15_960.0, 0.45  # Angstrom
fwhm = np.full(700, 1.2)
ask = np.linspace(toy[20], toy[-20], 700)
seen = _sampling(toy, ask, fwhm).weights @ (1 - 0.4 * np.exp(-0.5 * ((toy - centre) / width) ** 2))
broad = np.hypot(width, 1.2 / _FWHM)
exact = 1 - 0.4 * width / broad * np.exp(-0.5 * ((ask - centre) / broad) ** 2)
print(f"largest error: {np.abs(seen - exact).max():.1e}")
assert np.abs(seen - exact).max() < 1e-4


# %% [markdown]
# The same kernel interpolates a well sampled spectrum of one's own, such as [a visit](21_visits.ipynb), without blurring it.

# %%
#| export
def interpolate(grid, flux, ivar, new) -> tuple:
    """A well sampled spectrum between its pixels, by Lanczos kernels: its lines stay as sharp.

    Parameters
    ----------
    grid, new : (P,) and (Q,) arrays
        increasing wavelengths; gaps of the grid are gaps
    flux, ivar : (P,) arrays
        inverse variance 0 where a pixel is unusable

    Returns
    -------
    tuple of two (Q,) arrays
        flux, and the inverse variance of each pixel by itself, 0 where a twentieth of the kernel
        falls on unusable pixels
    """
    grid, new = np.asarray(grid, float), np.asarray(new, float)
    sampling = _sampling(grid, new, np.zeros(len(new)), average=True)
    good = (np.asarray(ivar) > 0) & np.isfinite(flux)
    filled = np.interp(grid, grid[good], np.asarray(flux, float)[good])
    variance = np.where(good, 1 / np.where(good, ivar, 1.0), 0)
    spread = sampling.weights.power(2) @ variance
    missed = np.abs(sampling.weights) @ (~good).astype(float)
    usable = sampling.inside & (missed < 0.05) & (spread > 0)
    return sampling.weights @ filled, np.where(usable, 1 / np.where(usable, spread, 1), 0)


# %%
half = (toy[1:] + toy[:-1]) / 2
curve, exact = (1 - 0.4 * np.exp(-0.5 * ((places - centre) / width) ** 2) for places in (toy, half))
between, _ = interpolate(toy, curve, np.ones(len(toy)), half)
print(f"largest error between pixels {np.abs(between - exact).max():.1e}")
assert np.allclose(between[8:-8], exact[8:-8], atol=1e-3)

# %% [markdown]
# ## Treated alike
# One thing remains: the continuum. The model learned from spectra divided by a polynomial through chosen pixels. At low resolution no pixel is free of lines, and the
# same rule draws another curve. So the model is treated as the star is. We let it draw its training stars, blur and sample them as the star is, divide them by *the same
# rule, through the same pixels, with the star's own weights*, and fit the polynomial of the labels again. No noise enters: the spectra are the model's own. Whatever
# the rule does to the star, it does to the model.
#
# The same holds for a spectrum that somebody else has normalized, and for a model that learned from the survey's normalized files. The rule is applied once more, to both.

# %%
spectra, _ = training_set(archive_root(), progress=False)
learn, left_out = train_test_rows(len(spectra))
giants = Cannon(scatter=True).fit(spectra[learn])
green = chip_slices(wavelength)["green"]

# %%
#| export
_RULE = {"degree": 2, "run": 20, "tolerance": 0.1, "min_pixels": None}  # of the original lab


def _rule_of(model):
    "The rule of the model's continuum, and the flags (P,) of its pixels."
    steps = continuum_steps(model.metadata_)
    if steps:
        rule = {name: steps[-1][name] for name in _RULE}
        return rule, np.isin(np.arange(len(model.wavelength_)), steps[-1]["pixels"])
    near_one = np.nan_to_num(np.abs(model.typical_flux_ - 1), nan=np.inf)
    listed = np.zeros(len(near_one), bool)
    for chip in chip_slices(model.wavelength_).values():
        size = max((chip.stop - chip.start) // 14, 0)
        listed[chip.start + np.argsort(near_one[chip])[:size]] = True
    return _RULE, listed


def _listed_on(grid, listed, new):
    "Continuum pixels of a model as flags (Q,) on another grid: the nearest, on either side."
    wanted = grid[listed]
    nearest = np.clip(np.searchsorted(_edges(new), wanted) - 1, 0, len(new) - 1)
    inside = (wanted >= new[0]) & (wanted <= new[-1])
    flags = np.zeros(len(new), bool)
    flags[nearest[inside]] = True
    own = np.clip(np.searchsorted(_edges(grid), new) - 1, 0, len(grid) - 1)
    return flags | listed[own]


def _fittable(spectra, listed, rule):
    "Pixels (P,) of the chips that have enough continuum pixels for the rule."
    needed = rule["min_pixels"] or 4 * (rule["degree"] + 1)
    good = np.zeros(len(listed), bool)
    for chip in chip_slices(spectra.wavelength).values():
        good[chip] = np.sum(listed[chip] & (spectra.ivar[0, chip] > 0)) >= needed
    return good


# %%
rule, listed = _rule_of(giants)
print(rule, "through", listed.sum(), "pixels of the survey")
halved = wavelength[::2]
print("on every other pixel:", _listed_on(wavelength, listed, halved).sum(), "of", len(halved))
doubled = np.linspace(15_200, 15_800, 10_000)
print("on finer pixels of one chip:", _listed_on(wavelength, listed, doubled).sum())


# %%
#| export
def _cropped(spectra, pixels):
    "One star's spectra with these pixels only."
    return spectra.replace(
        wavelength=spectra.wavelength[pixels],
        flux=spectra.flux[:, pixels],
        ivar=spectra.ivar[:, pixels],
        mask=None,
    )


def _without_dark(spectra):
    "Dark pixels, below a twentieth of the chip's median, lose their weight as in training."
    ivar = spectra.ivar.copy()
    for chip in chip_slices(spectra.wavelength).values():
        good = ivar[0, chip] > 0
        if good.any():
            level = np.median(spectra.flux[0, chip][good])
            ivar[0, chip][spectra.flux[0, chip] < 0.05 * level] = 0
    return spectra.replace(ivar=ivar)


def _divided(spectra, listed, rule):
    "The star over its continuum, and the continuum pixels that survived as flags (P,)."
    fit = continuum(spectra, continuum_pixels=listed, **rule)
    return normalize(_raw(spectra), continuum_pixels=listed, **rule), fit.used[0]


def _raw(spectra):
    "The same spectra, not yet normalized."
    stars = spectra.stars.copy()
    stars.meta["normalized"] = False
    return spectra.replace(stars=stars)


# %%
tilted = from_arrays(wavelength, 300 - wavelength / 100, 1.0, velocity=0)
divided, survived = _divided(_without_dark(tilted), listed, rule)
level = divided.flux[divided.ivar > 0]
print(f"before {np.ptp(tilted.flux):.2f} from end to end, after {np.ptp(level):.4f}")
assert survived.sum() > 500


# %% [markdown]
# The scatter of a pixel, what the polynomial gets wrong beyond the noise, is shared by all pixels of the star that see the same pixel of the model. So with three pixels
# of the star per pixel of the model its variance counts three times, and blurring over $m$ pixels of the model takes it down to a share.

# %%
#| export
def _scatter_at(scatter, sampling):
    "Scatter (P,) of a model as it acts on a star's pixels (Q,)."
    variance = np.nan_to_num(np.asarray(scatter, float)) ** 2
    weights = np.abs(sampling.weights)
    seen = weights @ variance / np.maximum(weights.sum(axis=1), 1e-9)
    blurred = 1 / (1 + 2 * np.sqrt(np.pi) * sampling.sigma)
    return np.sqrt(seen * np.maximum(sampling.dense, blurred))


def _filled(theta):
    "Coefficients (P, T) with gaps bridged, and which pixels are known (P,)."
    known = np.isfinite(theta[:, 0])
    pixels = np.arange(len(theta))
    if known.all():
        return theta, known
    filled = [np.interp(pixels, pixels[known], column[known]) for column in theta.T]
    return np.column_stack(filled), known


def _missing_fwhm(model, spectra, resolution):
    "What has to be added to the model's lines at each pixel of the star [Angstrom]."
    sharp = float(model.metadata_.get("resolution", _RESOLUTION))
    if resolution is None or not np.isfinite(resolution):
        return np.zeros(len(spectra.wavelength))
    each = spectra.stars.meta.get("resolution")
    if each is not None and resolution == _of_star(spectra, "RESOLUTION"):
        resolution = each
    missing = np.maximum(np.asarray(resolution, float) ** -2 - sharp**-2, 0)
    return spectra.wavelength * np.sqrt(missing)


# %%
middle = wavelength[3000:3700]
for step, blur in ((0.5, 0), (1, 0), (3, 0), (3, 2)):
    places = np.exp(np.arange(np.log(middle[0]), np.log(middle[-1]), step * 1.3816e-5))
    there = _sampling(wavelength, places, np.full(len(places), blur * 0.52))
    shared = np.median(_scatter_at(np.full(len(wavelength), 0.01), there))
    print(f"pixels of {step:3} the model's, FWHM of the blur {blur} pixels: scatter {shared:.4f}")

# %% [markdown]
# The continuum is drawn through noisy pixels, so it is wrong by a little, and wrong along a whole chip. To believe in it would make the errors too small by a half. So
# the fit may move each chip's continuum again, by a polynomial of the same degree. These directions enter as
# [hidden labels](16_hidden.ipynb) do: they are solved for with the labels, and widen their errors as they must.

# %%
#| export
_LOOSE = 0.1  # by how much the fit may move the continuum


def _loose_continuum(star, theta, rule):
    "Directions (q, P) in which a wrong continuum moves the spectrum, a polynomial for each chip."
    rows = []
    for chip in chip_slices(star.wavelength).values():
        if chip.stop > chip.start:
            x = np.linspace(-1, 1, chip.stop - chip.start)
            for degree in range(rule["degree"] + 1):
                row = np.zeros(len(star.wavelength))
                row[chip] = (
                    _LOOSE
                    * theta[chip, 0]
                    * np.polynomial.legendre.legval(x, np.eye(degree + 1)[-1])
                )
                rows.append(row)
    return np.array(rows)


# %%
window = from_arrays(np.linspace(15_900, 16_400, 600), np.ones(600), 0.01, velocity=0)
waves = _loose_continuum(window, np.ones((600, 1)), rule)
fig, ax = plt.subplots(figsize=(6, 2.4))
ax.plot(window.wavelength, waves.T)
ax.set(xlabel="wavelength [Å]", ylabel="change of the flux")
ax.set_title("How the fit may move the continuum of a chip");


# %%
#| export
def _some_terms(model, times=5):
    "Terms (N, T) of enough training stars, evenly chosen, to fit the polynomial to their spectra."
    labels = model.training_labels_
    few = min(len(labels), times * len(model.vectorizer_))
    rows = np.unique(np.linspace(0, len(labels) - 1, few).astype(int))
    terms = model.vectorizer_(model.scale(labels[rows]))
    if np.linalg.matrix_rank(terms) < terms.shape[1]:  # they are too much alike: take all
        terms = model.vectorizer_(model.scale(labels))
    return terms


def _on_pixels(model, sampling, theta, pixels, star, used, rule):
    "The Cannon on these pixels of the star, its spectra divided as the star's was."
    weights = sampling.weights[pixels]
    terms = _some_terms(model)
    drawn = (weights @ (theta @ terms.T)).T
    copies = Table({"APOGEE_ID": np.arange(len(drawn)).astype(str)})
    ivar = np.broadcast_to(star.ivar[0], drawn.shape)
    drawn = Spectra(star.wavelength, drawn.astype(np.float32), ivar, copies)
    through = rule | {"tolerance": np.inf, "min_pixels": rule["degree"] + 1}
    drawn = normalize(drawn, continuum_pixels=used, **through)
    there = copy.copy(model)
    vars(there).pop("refusal_", None)  # it knows the survey's pixels alone: see `_guarded`
    there.theta_ = np.linalg.lstsq(terms, drawn.flux.astype(float), rcond=None)[0].T
    there.scatter_ = _scatter_at(model.scatter_, sampling)[pixels]
    hidden = getattr(model, "hidden_", np.empty((0, weights.shape[1])))
    there.hidden_ = np.vstack([(weights @ hidden.T).T, _loose_continuum(star, there.theta_, rule)])
    there.wavelength_ = star.wavelength
    there.metadata_ = model.metadata_ | {"recipe": star.stars.meta["recipe"], "product": "own"}
    return there


def _fit(model, spectra, resolution=None):
    "Model and star on the star's pixels, and the table of its labels."
    there, star = model_for(model, spectra, resolution)
    return there, star, infer(there, star, any_recipe=True)


# %%
print(*_some_terms(giants).shape, "stars and terms")


# %%
#| export
def model_for(model: Cannon, spectra: Spectra, resolution: float = None) -> tuple:
    """A Cannon on a star's own pixels, and the star treated as the model's spectra are.

    Parameters
    ----------
    model : Cannon
        fitted, with wavelengths
    spectra : Spectra
        one star at rest, on any grid, as `from_arrays` gives it
    resolution : float, optional
        of the star's spectrum; that of its table, or else the model's, by default

    Returns
    -------
    tuple
        the Cannon, whose pixels are the star's, and the `Spectra` of the star, relative to the
        continuum: ready for `infer` and `plot_fit`

    Raises
    ------
    LabError
        where model and star have no pixels in common, or too few for a continuum

    Notes
    -----
    With W the interpolation and blur, the model's own spectra W theta v(l) are divided by the
    star's continuum rule, and the coefficients are fitted to them anew.
    """
    check_is_fitted(model)
    if resolution is None:
        resolution = _of_star(spectra, "RESOLUTION")
    sampling = _sampling(
        model.wavelength_, spectra.wavelength, _missing_fwhm(model, spectra, resolution)
    )
    rule, listed = _rule_of(model)
    theta, known = _filled(model.theta_)
    seen = np.abs(sampling.weights) @ (~known).astype(float) < 0.1
    listed = _listed_on(model.wavelength_, listed, spectra.wavelength) & sampling.inside
    pixels = sampling.inside & seen & _fittable(spectra, listed, rule)
    if np.sum(pixels & (spectra.ivar[0] > 0)) < _LEAST:
        raise LabError(
            f"{spectra.stars['APOGEE_ID'][0]}: too few of its pixels lie where the model learned, "
            "or hold its continuum pixels: give a wider range, 100 Angstrom at least"
        )
    star, used = _divided(_without_dark(_cropped(spectra, pixels)), listed[pixels], rule)
    return _on_pixels(model, sampling, theta, pixels, star, used, rule), star


def _of_star(spectra, column):
    "A number from the star's table; None where it is not known."
    if column not in spectra.stars.colnames or not np.isfinite(spectra.stars[column][0]):
        return None
    return float(spectra.stars[column][0])


# %%
giant = from_arrays(wavelength[::2], spectra.flux[0, ::2], ivar=spectra.ivar[0, ::2], velocity=0)
there, star = model_for(giants, giant)
print(
    len(there.wavelength_),
    "of",
    len(giant.wavelength),
    "pixels,",
    len(there.hidden_),
    "free numbers of the continuum",
)
labels = infer(there, star)
print(f"chi2 per pixel {labels['chi2'][0] / labels['n_good'][0]:.2f}")


# %% [markdown]
# ## The proof
# A simulated star knows its labels. We take a model, draw stars, sample them by another interpolation than the one under test (cubic splines), give each a continuum of
# its own and noise, and read them back. If all is right, chi2 per degree of freedom is 1, and the labels' pulls have the width 1: with half as many pixels as the
# model, with three times as many, and at a fifth of the resolution. (The model's coefficients are smoothed by a pixel first: a spectrum that a spectrograph saw has no
# structure below its resolution, and the noise of training does.)

# %%
def one_chip(model, chip):
    "A noiseless model of one chip, its spectrum smoothed by a pixel."
    smooth = copy.copy(model)
    theta, _ = _filled(model.theta_)
    smooth.theta_ = gaussian_filter1d(theta, 1.0, axis=0)[chip]
    smooth.scatter_ = np.zeros(len(smooth.theta_))
    smooth.wavelength_ = model.wavelength_[chip]
    listed = np.isin(
        np.arange(len(model.wavelength_)), continuum_steps(model.metadata_)[-1]["pixels"]
    )
    step = continuum_steps(model.metadata_)[-1] | {"pixels": np.flatnonzero(listed[chip]).tolist()}
    smooth.metadata_ = model.metadata_ | {"recipe": [step]}
    return smooth


def observe(model, labels, dense=1.0, resolution=None, error=0.01, seed=0):
    "A star seen by another spectrograph: its own pixels, resolution, continuum and noise."
    rng = np.random.default_rng(seed)
    log_grid = np.log(model.wavelength_)
    step = np.median(np.diff(log_grid)) / dense
    grid = np.arange(log_grid[0] + 0.37 * step, log_grid[-1], step)
    curve = CubicSpline(log_grid, model.predict(labels)[0])
    nodes = np.linspace(-4.5, 4.5, 181)
    weights = np.exp(-0.5 * nodes**2) / np.exp(-0.5 * nodes**2).sum()
    width = 0 if resolution is None else np.sqrt(resolution**-2 - 22_500**-2) / 2.3548
    places = np.clip(grid + width * nodes[:, None], log_grid[0], log_grid[-1])
    flux = weights @ curve(places) if width else curve(grid)
    x = (np.exp(grid) - 16_000) / 1_000
    flux = flux * 300 * (1 + 0.2 * x - 0.15 * x**2)
    sigma = error * np.median(flux)
    noisy = flux + sigma * rng.standard_normal(len(flux))
    return from_arrays(np.exp(grid), noisy, sigma, unit="AA", velocity=0, resolution=resolution)


# %%
simple = Cannon(labels=["TEFF", "LOGG", "M_H"]).fit(spectra[learn])
toy_model = one_chip(simple, green)
inner = np.argsort(np.abs(simple.scale(simple.training_labels_)).max(axis=1))[:160]  # no extremes


def read_back(dense, resolution, stars=24):
    "Pulls (stars, K) and chi2 per degree of freedom (stars,) of simulated stars, read back."
    found = []
    names = toy_model.label_names_
    for k in range(stars):
        truth = simple.training_labels_[inner[4 * k]]
        star = observe(toy_model, truth, dense, resolution, seed=k)
        table = _fit(toy_model, star)[2]
        pull = [
            (table[n.lower()].value - t) / table[f"{n.lower()}_err"].value
            for n, t in zip(names, truth)
        ]
        free = table["n_good"][0] - len(names) - 3  # three numbers of the continuum
        found.append([*np.ravel(pull), table["chi2"][0] / free])
    found = np.array(found)
    return found[:, :-1], found[:, -1]


settings = [(0.5, None), (1.0, None), (3.0, None), (1.0, 11_000), (0.7, 5_000), (0.5, 2_000)]
proof = Table(
    names=["pixels per pixel", "R", "chi2 per dof", "width of pulls"],
    dtype=[float, int, float, float],
)
for dense, resolution in settings:
    pull, chi2 = read_back(dense, resolution)
    proof.add_row((dense, resolution or 22_500, chi2.mean(), np.sqrt(np.mean(pull**2))))
proof["chi2 per dof"].info.format = proof["width of pulls"].info.format = ".3f"
proof

# %%
assert np.all(np.abs(proof["chi2 per dof"] - 1) < 0.03)
assert np.all(np.abs(proof["width of pulls"] - 1) < 0.2)  # 72 pulls each: 1 +- 0.08
assert abs(np.mean(proof["width of pulls"]) - 1) < 0.08

# %% [markdown]
# A wrong blur must show, or the test is worth little: the same star of R = 5,000, read as if its lines were as sharp as the survey's.

# %%
blurred = observe(toy_model, simple.training_labels_[inner[0]], 0.7, 5_000)
wrong = _fit(toy_model, blurred, resolution=22_500)[2]
print(f"chi2 per pixel {wrong['chi2'][0] / wrong['n_good'][0]:.1f}, flags {wrong['flags'][0]}")
assert wrong["chi2"][0] / wrong["n_good"][0] > 1.5

# %% [markdown]
# ## How fast does it move?
# A star that moves shows all its lines shifted by the same factor. On a logarithmic grid that is a shift by some pixels, the same everywhere, and we look for the shift
# at which a model spectrum fits best. With data $d$, weights $w$ and a template $t$ shifted by $k$ pixels, the best strength of the template takes
# $$ \Delta\chi^2(k) = \frac{\bigl(\sum_p w_p d_p t_{p-k}\bigr)^2}{\sum_p w_p t_{p-k}^2} $$
# off chi2. Both sums are correlations, so a Fourier transform finds them for all shifts at once. Slow waves, the continuum, are taken out of both first. A dozen training
# stars serve as templates.

# %%
#| export
_TEMPLATES = 12
_SMOOTH = 25.0  # Angstrom: slower waves than this are continuum
_FASTEST = 600.0  # km/s


def _ripples(flux, weight, width):
    "Flux (…, P) over its running mean, less 1; 0 where the weight, (P,) or (…, P), is 0."
    mean = gaussian_filter1d(np.where(weight > 0, flux, 0), width, axis=-1, mode="nearest")
    share = gaussian_filter1d((weight > 0).astype(float), width, axis=-1, mode="nearest")
    good = (weight > 0) & (mean > 0.02 * np.maximum(share, 1e-9)) & (share > 0.1)
    level = np.where(good, mean / np.where(good, share, 1), 1)
    return np.where(good, flux / level - 1, 0), level


def _star_shapes(model):
    "Spectra (M, P) of some training stars; the typical one of a model that draws none."
    if not hasattr(model, "predict"):
        return np.asarray(model.typical_flux_, float)[None]
    order = np.argsort(model.training_labels_[:, 0])
    rows = order[np.linspace(0, len(order) - 1, _TEMPLATES).astype(int)]
    return model.predict(model.training_labels_[rows])


def _templates(model, resolution, step, size, first):
    "Ripples (M, P) of the model's stars on a logarithmic grid of `size` pixels."
    drawn = _star_shapes(model)
    known = np.isfinite(drawn).all(axis=0)
    place = np.rint((np.log(model.wavelength_) - first) / step).astype(int)
    shown = np.ones((len(drawn), size))
    weight = np.zeros(size)
    shown[:, place[known]] = drawn[:, known]
    weight[place[known]] = 1
    width = 1 / (step * model.wavelength_.mean()) * _SMOOTH
    ripples = _ripples(shown, weight, width)[0]
    if resolution is not None and resolution < _RESOLUTION:
        sigma = np.sqrt(resolution**-2.0 - _RESOLUTION**-2.0) / _FWHM / step
        ripples = gaussian_filter1d(ripples, sigma, axis=1) * weight
    return ripples


# %%
shapes = _star_shapes(giants)
known = np.isfinite(shapes[:, green]).all(axis=0)
slope = shapes[-1, green] * np.linspace(0.8, 1.2, len(known))  # a star with the wrong continuum
waves, _ = _ripples(np.where(known, slope, 0), known.astype(float), 120)
same, _ = _ripples(np.where(known, shapes[-1, green], 0), known.astype(float), 120)
print(len(shapes), "templates")
print(f"a slope changes the flux by {np.nanstd(slope - shapes[-1, green]):.3f},")
print(f"but the ripples by {np.std(waves - same):.3f} of {np.std(same):.3f}")


# %%
#| export
def _gains(model, spectra, resolution):
    "Velocities [km/s], and what the best template takes off chi2 at each."
    step = np.median(np.diff(np.log(model.wavelength_)))
    first = np.log(_RANGE[0] - _BEYOND)
    size = int((np.log(_RANGE[1] + _BEYOND) - first) / step) + 1
    first = np.log(model.wavelength_[0]) - step * np.rint(
        (np.log(model.wavelength_[0]) - first) / step
    )
    grid = np.exp(first + step * np.arange(size))
    flux, ivar = resample(spectra.wavelength, spectra.flux[0], spectra.ivar[0], grid)
    good = spectra.ivar[0] > 0
    if (
        np.count_nonzero(ivar) < 0.2 * good.sum()
    ):  # bad pixels everywhere: neighbours stand for them
        flux, ivar = resample(
            spectra.wavelength[good], spectra.flux[0][good], spectra.ivar[0][good], grid
        )
    data, level = _ripples(np.nan_to_num(flux), ivar, _SMOOTH / (step * grid.mean()))
    weight = np.where(data == 0, 0, ivar * level**2)
    seen = weight[weight > 0]
    weight = np.minimum(weight, 10 * np.median(seen) if len(seen) else 0)
    data = np.clip(data, -1, 1)  # a cosmic ray is no line
    reach = int(_FASTEST / LIGHT / step)
    lags = np.arange(-reach, reach + 1)
    shapes = _templates(model, resolution, step, size, first)
    length = 2 ** int(np.ceil(np.log2(2 * size)))
    along = np.fft.irfft(np.fft.rfft(weight * data, length) * np.conj(np.fft.rfft(shapes, length)))
    norms = np.fft.irfft(np.fft.rfft(weight, length) * np.conj(np.fft.rfft(shapes**2, length)))
    along, norms = along[:, lags], np.maximum(norms[:, lags], 1e-9)
    gains = np.where(along > 0, along**2 / norms, 0).max(axis=0)
    return (np.exp(lags * step) - 1) * LIGHT, gains


def _peak(velocities, gains):
    """Velocity at the top of a parabola through the highest gain and its neighbours, and its
    error: where the gain has fallen by one."""
    top = int(np.clip(np.argmax(gains), 1, len(gains) - 2))
    low, middle, high = gains[top - 1 : top + 2]
    bend = low - 2 * middle + high
    step = (velocities[top + 1] - velocities[top - 1]) / 2
    if bend >= 0:
        return float(velocities[top]), np.inf
    place = top + 0.5 * (low - high) / bend
    error = step * np.sqrt(2 / -bend)
    return float(np.interp(place, np.arange(len(gains)), velocities)), float(error)


# %%
moving = observe(toy_model, simple.training_labels_[inner[3]], 1.3, error=0.05, seed=3)
moving = moving.replace(wavelength=moving.wavelength * (1 + 123.4 / LIGHT))
velocities, gains = _gains(toy_model, moving, None)
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.plot(velocities, gains)
ax.axvline(123.4, color="0.6", ls="--", lw=0.8)
ax.set(
    xlabel="velocity [km/s]",
    ylabel=r"$\Delta\chi^2$",
    title="One chip at SNR 20: the star moves at 123.4 km/s",
)
print("found {:.1f} +- {:.1f} km/s".format(*_peak(velocities, gains)))
assert abs(_peak(velocities, gains)[0] - 123.4) < 2


# %% [markdown]
# **What to see.** One peak stands above all others, at the star's velocity. The side peaks are other lines that happen to meet.

# %% [markdown]
# Once labels are known, the star's own best-fitting spectrum $m$ is the best template, and a velocity that is off by $\delta v$ leaves the residual
# $-\frac{\delta v}{c}\,\mathrm{d}m/\mathrm{d}\ln\lambda$. Least squares gives $\delta v$ and its error. So we go twice: velocity, labels, velocity, labels.

# %%
#| export
def _velocity_step(there, star, table):
    "By how much [km/s] the star is off its rest frame, and the 1-sigma error."
    model_flux = np.nan_to_num(there.predict(table)[0], nan=1)
    slope = np.zeros(len(model_flux))
    for piece in _pieces(star.wavelength):
        if piece.stop - piece.start > 2:
            slope[piece] = -np.gradient(model_flux[piece], np.log(star.wavelength[piece])) / LIGHT
    variance = np.nan_to_num(there.scatter_) ** 2
    weight = star.ivar[0] / (1 + star.ivar[0] * variance)
    residual = star.flux[0] - model_flux
    known = (weight * slope**2).sum()
    if not known > 0:
        return 0.0, np.inf
    poor = max(table["chi2"][0] / max(table["n_good"][0], 1), 1.0)
    return float((weight * residual * slope).sum() / known), float(np.sqrt(poor / known))


def _at_rest(spectra, velocity):
    "The spectra of a star that moves at `velocity` [km/s], in its own frame."
    return spectra.replace(wavelength=spectra.wavelength / (1 + velocity / LIGHT))


_LEAST_GAIN = 30.0  # what a template must take off chi2, or there is no velocity


def measure_velocity(model: LabelModel, spectra: Spectra, resolution: float = None) -> float:
    """The velocity of a star, by correlation with a model's spectra.

    Parameters
    ----------
    model : LabelModel
        fitted; a model that draws no spectra lends its typical one
    spectra : Spectra
        one star
    resolution : float, optional
        of its spectrum; that of its table, or else the model's, by default

    Returns
    -------
    float
        in the frame of the wavelengths [km/s]

    Raises
    ------
    LabError
        where no template resembles the star at any velocity
    """
    resolution = _of_star(spectra, "RESOLUTION") if resolution is None else resolution
    return _measured(model, spectra, resolution)[0]


def _measured(model, spectra, resolution):
    "Velocity and its error [km/s], by correlation."
    velocities, gains = _gains(model, spectra, resolution)
    if gains.max() < _LEAST_GAIN:
        raise LabError(
            f"{spectra.stars['APOGEE_ID'][0]}: no spectrum of the model resembles it at a velocity "
            f"up to {_FASTEST:.0f} km/s; is it noise, or another kind of object? Give velocity= if "
            "you know it"
        )
    return _peak(velocities, gains)


# %%
print(f"by correlation {measure_velocity(toy_model, moving):.2f} km/s")
there, star, table = _fit(toy_model, _at_rest(moving, 120.0))
step, error = _velocity_step(there, star, table)
print(f"by least squares, from 120 km/s: {120 + step:.2f} +- {error:.2f} km/s")
assert abs(step - 3.4) < 2


# %% [markdown]
# ## Labels
# Everything together. A Cannon goes to the star. Other models, which read their own pixels, get the star resampled, and refuse one whose lines are blurred.

# %%
#| exporti
@dataclass
class StarLabels:
    """The labels of one star of one's own, and what they were found with.

    Attributes
    ----------
    table : QTable
        as `infer` gives it, with velocity and its error [km/s]
    model : LabelModel
        on the star's own pixels, where it is a Cannon
    spectra : Spectra
        the star at rest, relative to the continuum
    notes : list of str
        what was guessed or measured
    """

    table: QTable
    model: LabelModel
    spectra: Spectra
    notes: list = field(default_factory=list)


def _resampled(model, spectra, resolution):
    "The star on the model's own pixels, treated as it was trained; LabError for a blurred one."
    sharp = model.metadata_.get("resolution", _RESOLUTION)
    if resolution is not None and resolution < 0.8 * sharp:
        raise LabError(
            f"the star's resolution is {resolution:,.0f} and a {type(model).__name__} reads pixels "
            f"of {sharp:,.0f}: take a Cannon, whose spectra can be blurred"
        )
    flux, ivar = resample(spectra.wavelength, spectra.flux[0], spectra.ivar[0], model.wavelength_)
    star = Spectra(
        model.wavelength_,
        np.nan_to_num(flux).astype(np.float32)[None],
        ivar.astype(np.float32)[None],
        spectra.stars,
    )
    return as_trained(model, star)


def _read_once(model, spectra, resolution):
    "Model, star and table, by the way that the kind of model wants."
    if isinstance(model, Cannon):
        return _fit(model, spectra, resolution)
    star = _resampled(model, spectra, resolution)
    unguarded = copy.copy(model)  # the guard looks later, and not at doubtful pixels
    vars(unguarded).pop("refusal_", None)
    return model, star, infer(unguarded, star, any_recipe=True)


# %%
from stellar_lab.readers import RidgeLabels

straight = RidgeLabels().fit(spectra[learn])
for model in (giants, straight):
    read, star, table = _read_once(model, giant, None)
    print(
        f"{type(model).__name__:11} read {len(star.wavelength)} pixels: Teff {table['teff'][0]:.0f}"
    )
with pytest.raises(LabError, match="reads pixels of 22,500: take a Cannon"):
    _read_once(straight, giant, 11_000)

# %% [markdown]
# A model may have [a guard](18_refusal.ipynb), which says when no star like the training stars explains a spectrum. It knows its own pixels alone. So for the guard, and for nothing else, the
# star is interpolated onto these pixels, with the smaller of two weights: that of a pixel by itself and the effective one. It then asks its usual questions, of pixels beyond doubt. One answer gains a meaning: a
# *velocity* that is left over says that the velocity that was given is wrong. Lines that are blurred on purpose would all be called broadened, so there it stays silent, and a note says so.

# %%
#| export
_LEAST_SEEN = 0.5  # share of the model's pixels that the guard must see
_FAR_OFF = 10.0  # km/s between a velocity that was given and where the lines stand


def _guarded(model, spectra, resolution, table, notes):
    "Flags of the model's guard in the table of one star at rest, and a note where it is silent."
    guard = getattr(model, "refusal_", None)
    if guard is None:
        return
    sharp = model.metadata_.get("resolution", _RESOLUTION)
    if resolution is not None and resolution < 0.8 * sharp:
        notes.append("the guard did not look: it knows lines as sharp as the model's only")
        return
    parts = (spectra.wavelength, spectra.flux[0], spectra.ivar[0], model.wavelength_)
    try:
        flux, single = interpolate(*parts)
        weight = np.minimum(single, resample(*parts)[1])
        if np.sum(weight > 0) < _LEAST_SEEN * len(weight):
            raise LabError("it sees too few of its pixels")
        flux = np.where(weight > 0, flux, 0).astype(np.float32)[None]
        star = Spectra(model.wavelength_, flux, weight.astype(np.float32)[None], spectra.stars)
        star = as_trained(model, _raw(star))
        if spectra.mask is not None:
            clean = np.where(spectra.mask[0] == 0, spectra.ivar[0], 0)
            doubtful = weight > 0
            if clean.any():
                doubtful &= interpolate(*parts[:2], clean, parts[3])[1] == 0
            star.stars["DOUBTFUL"] = doubtful[None]
        seen = guard.examine(star, table.copy())
    except LabError as error:
        notes.append(f"the guard did not look: {error}")
        return
    table["flags"] = seen["flags"]
    if np.asarray(seen["flags"])[0] & int(Flag.SHIFTED):
        left = float(seen["velocity"][0].value)
        notes.append(f"lines stand {left:+.1f} km/s off: is the velocity right?")


def _velocity_note(model, spectra, resolution, told):
    "A sentence, in a list, where lines stand far from the velocity that was given."
    with suppress(LabError):
        off = measure_velocity(model, spectra, resolution)
        if abs(off) > _FAR_OFF:
            return [f"lines stand at {told + off:.0f} km/s, not at the {told:.1f} that was given"]
    return []


# %%
for told in (0.0, 40.0):  # what somebody says of a star at rest
    print(told, _velocity_note(giants, _at_rest(giant, told), None, told))
assert _velocity_note(giants, _at_rest(giant, 40.0), None, 40.0)


# %%
#| export
def label_star(
    model: LabelModel,
    spectra: Spectra,
    velocity: float = None,
    resolution: float = None,
) -> StarLabels:
    """Labels of one star from a spectrum on any grid.

    Parameters
    ----------
    model : LabelModel
        fitted on a `Spectra`
    spectra : Spectra
        one star, from `from_arrays`, `read_spectrum` or any other reader
    velocity : float, optional
        by which it still has to be shifted to rest [km/s]; measured by default, unless the reader
        was told it
    resolution : float, optional
        R of its spectrum; the reader's, or else the model's, by default

    Returns
    -------
    StarLabels

    Raises
    ------
    LabError
        where the model has no wavelengths, or the star's do not meet them

    Examples
    --------
    >>> from stellar_lab.spectrum import label_star, read_spectrum
    >>> found = label_star(model, read_spectrum("my.csv"))  # doctest: +SKIP
    >>> found.table["teff"]  # doctest: +SKIP
    """
    check_is_fitted(model)
    if model.wavelength_ is None:
        raise LabError("the model does not know its wavelengths: fit it on a Spectra, or give them")
    notes = list(spectra.stars.meta.get("notes", []))
    resolution = _of_star(spectra, "RESOLUTION") if resolution is None else resolution
    if resolution is None:
        notes.append("no resolution given: lines are taken to be as sharp as the model's")
    told = _of_star(spectra, "VELOCITY")
    measured = velocity is None and told is None
    error = 0.0
    if measured:
        velocity, error = _measured(model, spectra, resolution)
    shift = velocity or 0.0
    there, star, table = _read_once(model, _at_rest(spectra, shift), resolution)
    if measured and isinstance(model, Cannon):
        for _ in range(2):
            step, error = _velocity_step(there, star, table)
            shift += np.clip(step, -10, 10)
            there, star, table = _read_once(model, _at_rest(spectra, shift), resolution)
            if abs(step) < 0.3 * error:
                break
    _guarded(model, _at_rest(spectra, shift), resolution, table, notes)
    if told is not None and velocity is None and isinstance(model, Cannon):
        notes += _velocity_note(model, spectra, resolution, told)
    if measured:
        notes.append(f"velocity measured: {shift:.2f} +- {error:.2f} km/s in the frame of the file")
    table["velocity"] = [shift + (told or 0.0)] * u.km / u.s
    table["velocity_err"] = [error] * u.km / u.s
    return StarLabels(table, there, star, notes)


# %% [markdown]
# ## A real star in disguise
# Now a real giant, one that the model did not learn from, as an unknown spectrograph might have seen it: its pixels rebinned to 1.4 of the survey's, wavelengths in
# nanometres and in air, the red end first, moving at 87.6 km/s, written as text. What do we find, compared with the survey's own file of the star read the usual way?

# %%
rows = [star for star in left_out if spectra.stars["SNR"][star] > 150][:8]


def disguised(row, path, step=1.4, velocity=87.6):
    "One giant as a text file of another spectrograph."
    log_grid = np.log(wavelength)
    pieces = []
    for piece in _pieces(wavelength):
        size = int((log_grid[piece][-1] - log_grid[piece][0]) / (step * 1.3816e-5))
        grid = np.exp(np.linspace(log_grid[piece][0], log_grid[piece][-1], size))
        part = spectra.flux[row, piece], spectra.ivar[row, piece]
        pieces.append((grid, *resample(wavelength[piece], *part, grid)))
    grid, flux, ivar = map(np.concatenate, zip(*pieces))
    moving = grid * (1 + velocity / LIGHT)
    air = moving / (air_to_vacuum(moving) / moving) / 10  # nm
    with np.errstate(divide="ignore", invalid="ignore"):
        table = Table({"wave_air_nm": air, "flux": flux, "error": 1 / np.sqrt(ivar)})[::-1]
    table.write(path, format="ascii.csv", overwrite=True)
    return path


# %%
usual = infer(giants, spectra[rows])
readings = [label_star(giants, read_spectrum(disguised(row, here / "giant.csv"))) for row in rows]
print(readings[0].notes)
comparison = Table()
for name in giants.label_names_:
    values = [found.table[name.lower()].value[0] for found in readings]
    errors = [found.table[f"{name.lower()}_err"].value[0] for found in readings]
    difference = values - usual[name.lower()].value
    comparison[name] = [np.median(difference), np.median(np.abs(difference)), np.median(errors)]
comparison.add_column(
    ["median difference", "its size", "formal error"],
    index=0,
    name="read in disguise less read as usual",
)
for name in giants.label_names_:
    comparison[name].info.format = ".3g"
comparison


# %%
def still(row):
    "The velocity that is left in the survey's own file of a star, by the same measurement [km/s]."
    star = from_arrays(wavelength, spectra.flux[row], ivar=spectra.ivar[row])
    return label_star(giants, star, resolution=22_500).table["velocity"].value[0]


found_velocities = np.array([found.table["velocity"].value[0] for found in readings])
left = np.array([still(row) for row in rows])
print("velocity, less that of the survey's own file:", np.round(found_velocities - left, 2))
assert np.all(np.abs(found_velocities - left * (1 + 87.6 / LIGHT) - 87.6) < 0.3)

# %%
from stellar_lab.cannon import plot_fit

star = readings[0]
plot_fit(star.model, star.spectra, 0, star.table, window=(15_960, 16_060));

# %% [markdown]
# **What to see.** The model stands on the star's own, wider pixels; the grey band is the stated error.

# %% [markdown]
# ## What lower resolution costs
# The same stars, blurred to R = 11,000, 5,000 and 2,000 with the noise of the survey's pixels added *after* blurring, as a spectrograph does. The labels should stay, and
# their errors should grow.

# %%
resolutions = [22_500, 11_000, 5_000, 2_000]


def seen_at(row, resolution, error=0.01):
    "A real giant, blurred and sampled by three pixels per resolution element, with new noise."
    rng = np.random.default_rng([row, resolution])
    blur = np.sqrt(resolution**-2 - 22_500**-2) / _FWHM / 1.3816e-5 if resolution < 22_500 else 0
    every = max(round(22_500 / resolution), 1)
    grids, fluxes = [], []
    for piece in _pieces(wavelength):
        good = spectra.ivar[row, piece] > 0
        pixels = np.arange(len(good))
        flux = np.interp(pixels, pixels[good], spectra.flux[row, piece][good])  # gaps bridged
        flux = gaussian_filter1d(flux, blur, mode="nearest") if blur else flux
        edge = int(4 * blur)  # what lies beyond the chip is not known
        grids.append(wavelength[piece][edge : len(good) - edge : every])
        fluxes.append(flux[edge : len(good) - edge : every])
    flux = np.concatenate(fluxes)
    noisy = flux + error * rng.standard_normal(len(flux))
    return from_arrays(np.concatenate(grids), noisy, error, velocity=0, resolution=resolution)


# %%
from stellar_lab.judging import with_error_model

judged = spectra[left_out]
calibrated = with_error_model(giants, infer(giants, judged), judged.labels())
answers = {}
for resolution in resolutions:
    tables = [label_star(calibrated, seen_at(row, resolution)).table for row in rows]
    answers[resolution] = {
        name: np.array(
            [(t[name.lower()].value[0], t[f"{name.lower()}_err"].value[0]) for t in tables]
        )
        for name in giants.label_names_
    }


# %%
def cost_of(resolution, name):
    "A row of the table: how far the labels move from those at full resolution, and their errors."
    value, error = answers[resolution][name].T
    difference = value - answers[22_500][name][:, 0]
    rms = np.sqrt(np.mean(difference**2))
    return resolution, name, np.median(error), rms, np.sqrt(np.mean((difference / error) ** 2))


columns = ["R", "label", "calibrated error", "rms difference", "rms in errors"]
cost = Table(
    rows=[cost_of(r, n) for n in ("TEFF", "LOGG", "M_H") for r in resolutions], names=columns
)
for column in columns[2:]:
    cost[column].info.format = ".3g"
cost

# %%
fig, axes = plt.subplots(3, 1, figsize=(6, 6.6), sharex=True)
for ax, name in zip(axes, ("TEFF", "LOGG", "M_H")):
    for k in range(len(rows)):
        value, error = np.array([answers[r][name][k] for r in resolutions]).T
        ax.errorbar(
            np.array(resolutions) * 1.03 ** (k - 3.5),
            value - value[0],
            error,
            fmt=".",
            ms=5,
            lw=0.7,
        )
    ax.axhline(0, color="0.6", lw=0.8)
    ax.set_xscale("log")
    ax.set_xticks(resolutions, [f"{r / 1000:g}k" for r in resolutions])
    ax.minorticks_off()
    ax.set(ylabel=f"change of {label_record(name).axis}")
axes[0].invert_xaxis()
axes[-1].set_xlabel("resolution")
axes[0].set_title("Eight real giants, less their labels at R = 22,500");

# %% [markdown]
# **What to see.** Each colour is a star. Going right, the lines blur, the points stray and the error bars grow with them.

# %%
for name in ("TEFF", "LOGG", "M_H"):
    errors = [np.median(answers[r][name][:, 1]) for r in resolutions]
    assert np.all(np.diff(errors) > 0), "blurring must cost something"
assert np.all(cost["rms in errors"] < 1.5)


# %% [markdown]
# ## Is my data fit for this?
# Before believing labels, look at what could be wrong with the spectrum. `check_star` goes through a list, and each line ends in a verdict and, where needed, in what to
# do.
#
# Air or vacuum is the classical trap. The two differ by a factor 1.000273, the same within $10^{-7}$ over our whole range, so *a spectrum in air looks like one that
# approaches at 82 km/s*. From the lines alone the two cannot be told apart; with a velocity that is known they can. If the velocity is measured, it takes up the
# difference, and the labels are right either way.

# %%
#| exporti
@dataclass(frozen=True)
class Verdict:
    "What was looked at, `ok`, `look` or `bad`, what was found, and what to do."

    what: str
    verdict: str
    found: str
    advice: str = ""

    def __str__(self):
        advice = f"\n{'':22}-> {self.advice}" if self.advice else ""
        return f"{self.what:<14}{self.verdict:<6}  {self.found}{advice}"


@dataclass
class StarCheck:
    """What `check_star` found; `print` shows it.

    Attributes
    ----------
    verdicts : list of Verdict
    found : StarLabels
        the labels, with their model and spectrum
    chi2 : (R,) array
        chi2 per pixel at each resolution that was tried
    gains : tuple of two arrays
        velocities [km/s], and what the best template takes off chi2
    """

    verdicts: list
    found: StarLabels
    chi2: np.ndarray
    gains: tuple

    @property
    def ok(self) -> bool:
        "Nothing is bad."
        return all(verdict.verdict != "bad" for verdict in self.verdicts)

    def __str__(self):
        return "\n".join([*map(str, self.verdicts), *(f"note: {n}" for n in self.found.notes)])

    def __repr__(self):
        bad = [verdict.what for verdict in self.verdicts if verdict.verdict == "bad"]
        return f"<StarCheck: {', '.join(bad) or 'nothing'} bad>"


# %%
some = [Verdict("grid", "ok", "7214 pixels"), Verdict("errors", "bad", "none", "give errors")]
report = StarCheck(some, StarLabels(None, None, None, ["made up"]), None, None)
print(report)
report

# %% [markdown]
# Grid and pixels first, then where the lines stand.

# %%
#| export
_AIR = -82.0  # km/s: how a spectrum in air looks when it is taken for one in vacuum
_TRIED = (22_500, 16_000, 11_000, 8_000, 5_500, 4_000, 2_800, 2_000)  # resolutions


def _grid_verdict(spectra):
    "Range, step and chips."
    grid = spectra.wavelength
    step = np.median(np.diff(grid))
    lit = [n for n, c in chip_slices(grid).items() if np.sum(spectra.ivar[0, c] > 0) > _LEAST]
    found = f"{len(grid)} pixels of {step:.3f} Angstrom, {grid[0]:.1f} to {grid[-1]:.1f}"
    found += f"; {', '.join(lit)}"
    if len(lit) < 3:
        return Verdict("grid", "look", found, "a part of the range: errors are larger, labels hold")
    return Verdict("grid", "ok", found)


def _pixel_verdict(spectra):
    "Share of bad pixels and signal-to-noise ratio."
    bad = np.mean(spectra.ivar[0] == 0)
    snr = _of_star(spectra, "SNR") or 0.0
    found = f"{bad:.1%} without weight; SNR {snr:.0f} per pixel"
    if bad > 0.4:
        return Verdict("bad pixels", "bad", found, "look at the mask: few pixels decide")
    if snr < 20:
        return Verdict("bad pixels", "look", found, "noisy: errors will be large")
    return Verdict("bad pixels", "ok" if bad < 0.15 else "look", found)


# %%
sample = read_spectrum(here / "giant.csv")
print(_grid_verdict(sample))
print(_pixel_verdict(sample))


# %%
#| export
def _velocity_verdict(offset, error, told):
    "Whether the star is where it is said to be; the test of air or vacuum."
    found = f"{offset:+.2f} +- {error:.2f} km/s off"
    if told is None:
        found = f"measured {offset:.2f} +- {error:.2f} km/s"
        advice = (
            ""
            if abs(offset - _AIR) > 15
            else "if the star should be at rest, this is air: air=True"
        )
        return Verdict("velocity", "ok" if not advice else "look", found, advice)
    if abs(offset) < max(5 * error, 3):
        return Verdict("velocity", "ok", f"{found} the {told:.2f} that was given")
    found += f" the {told:.2f} that was given"
    for shift, advice in (
        (_AIR, "the wavelengths are in air: say so (air)"),
        (-_AIR, "they are in vacuum already"),
    ):
        if abs(offset - shift) < 5:
            return Verdict("velocity", "bad", found, advice)
    return Verdict("velocity", "bad", found, "leave the velocity out, and it is measured")


def _air_verdict(offset, told):
    "Air or vacuum, from strong lines whose place is known if the velocity is."
    if told is None:
        return Verdict("air or vacuum", "ok", "counts as velocity, which is measured anyway")
    if abs(offset - _AIR) < 5:
        return Verdict(
            "air or vacuum", "bad", "strong lines stand 82 km/s to the blue: air", "say so: air"
        )
    if abs(offset + _AIR) < 5:
        return Verdict(
            "air or vacuum", "bad", "strong lines stand 82 km/s to the red", "they are in vacuum"
        )
    return Verdict("air or vacuum", "ok", "strong lines stand where vacuum puts them")


# %%
for off, told in ((0.2, 0.0), (-81.7, 0.0), (35.0, 0.0), (-81.7, None)):
    print(_velocity_verdict(off, 0.1, told))
    print(_air_verdict(off, told))


# %% [markdown]
# How sharp are the lines? The star is labelled at a row of resolutions, and where chi2 is least is the answer.

# %%
#| export
def _best_resolution(model, star, velocity):
    "chi2 at each resolution of `_TRIED`, and the best R by a parabola in log R."
    rest = _at_rest(star, velocity)
    chi2 = []
    for resolution in _TRIED:
        table = _fit(model, rest, float(resolution))[2]
        chi2.append(table["chi2"][0] / max(table["n_good"][0], 1))
    chi2 = np.array(chi2)
    top = int(np.argmin(chi2))
    if top in (0, len(chi2) - 1):
        return chi2, float(_TRIED[top])
    low, high = top - 1, top + 2
    a, b, _ = np.polyfit(np.log(_TRIED[low:high]), chi2[low:high], 2)
    return chi2, float(np.exp(-b / (2 * a)))


def _resolution_verdict(best, told):
    "Whether lines are as sharp as they are said to be."
    if told is None and best < 0.8 * _RESOLUTION:
        advice = f"give the resolution, about {best:,.0f}: labels are wrong without it"
        return Verdict("resolution", "bad", f"lines are those of R = {best:,.0f}", advice)
    told = _RESOLUTION if told is None else told
    found = f"lines are those of R = {best:,.0f}, {told:,.0f} is assumed"
    if abs(np.log(best / min(told, _RESOLUTION))) < 0.25:
        return Verdict("resolution", "ok", found)
    return Verdict("resolution", "look", found, "a rotating star, or another resolution: try it")


# %%
soft = seen_at(rows[0], 8_000)
_, best = _best_resolution(giants, soft, 0.0)
for told in (None, 22_500.0, 8_000.0):
    print(_resolution_verdict(best, told))
assert abs(np.log(best / 8_000)) < 0.25

# %% [markdown]
# A continuum that follows the lines, such as a running median, takes away what is broad: where lines crowd, the spectrum should lie lower for some Ångström, and does not. The model
# knows how much lower. So both are smoothed by 6 Å, and a straight line is put through star against model. Its slope is 1 for a fair continuum, and near 0 where all was eaten.

# %%
#| export
_BROAD = 6.0  # Angstrom: wider than a line, narrower than a continuum
_SHARE_LEFT = (0.7, 0.88)  # of the broad shape that must be left: below it is bad, and to look at


def _share_left(found):
    "Share of the model's broad dips that the star shows; NaN where too little of it is seen."
    star = found.spectra
    made = found.model.predict(found.table)[0]
    good = (star.ivar[0] > 0) & np.isfinite(made)
    both = []
    for chip in chip_slices(star.wavelength).values():
        if np.count_nonzero(good[chip]) < 100:
            continue
        width = _BROAD / np.median(np.diff(star.wavelength[chip]))
        known = good[chip].astype(float)
        seen = np.maximum(gaussian_filter1d(known, width, mode="constant"), 1e-3)
        x = np.linspace(-1, 1, len(known))
        for flux in (star.flux[0, chip], np.nan_to_num(made[chip])):
            broad = gaussian_filter1d(flux * known, width, mode="constant") / seen
            curve = np.polynomial.legendre.legfit(x, broad, 3, w=known)
            both.append((broad - np.polynomial.legendre.legval(x, curve)) * known)
    if not both:
        return np.nan
    ours, model = np.concatenate(both[::2]), np.concatenate(both[1::2])
    return float((ours * model).sum() / max((model**2).sum(), 1e-12))


def _continuum_verdict(found):
    "Chips whose continuum could not be drawn, or was drawn through the lines."
    failed = int(found.spectra.stars["CHIPS_FAILED"][0])
    good = found.spectra.ivar[0] > 0
    level = np.median(found.spectra.flux[0][good]) if good.any() else np.nan
    share = _share_left(found)
    text = f"median of flux / continuum {level:.3f}; {share:.0%} of the broad dips are left"
    if failed:
        return Verdict(
            "continuum", "bad", text, f"no continuum on chips {failed:b} (bits): look at them"
        )
    if share < _SHARE_LEFT[1]:
        verdict = "bad" if share < _SHARE_LEFT[0] else "look"
        advice = "divided by a curve that follows the lines? Give the flux before that division"
        return Verdict("continuum", verdict, text, advice)
    return Verdict("continuum", "ok" if 0.6 < level < 1.1 else "look", text)


# %%
print(_continuum_verdict(readings[0]))

# %% [markdown]
# Errors are compared with two things. The *residuals* hold noise and all that the model does not know. Differences of *neighbouring* residuals, $r_{p-1}-2r_p+r_{p+1}$, hold noise
# alone, for lines are wider than a pixel. So four cases can be told apart: errors that are too small or too large (both say so), a star that the model does not know (residuals alone), and
# a spectrum that was resampled, whose neighbours share their noise (differences alone). If the ratio changes along the spectrum, the errors are not those of this spectrum.

# %%
#| export
_BINS = 16  # parts of a spectrum in which errors are compared with noise
_UNEVEN = 2.5  # ratio of the noisiest to the quietest part, in units of their errors


def _noise_ratios(found, doubtful=None):
    "Residuals, and differences of neighbours, over their errors; and the latter in parts (B,)."
    made = found.model.predict(found.table)[0]
    star = found.spectra
    good = (star.ivar[0] > 0) & np.isfinite(made)
    if doubtful is not None:
        good &= ~doubtful
    left = np.where(good, star.flux[0] - made, 0)
    variance = 1 / np.where(good, star.ivar[0], 1.0)
    scatter = np.nan_to_num(found.model.scatter_) ** 2
    pulls = (left / np.sqrt(variance + scatter))[good]
    bend = left[:-2] - 2 * left[1:-1] + left[2:]
    noise = np.abs(bend) / np.sqrt(variance[:-2] + 4 * variance[1:-1] + variance[2:])
    noise = noise[good[:-2] & good[1:-1] & good[2:]]
    parts = [_width(part) for part in np.array_split(noise, _BINS) if len(part) > 40]
    return _width(pulls), _width(noise) if len(noise) else np.nan, np.array(parts)


def _width(values):
    "Robust width of values about nought."
    return 1.4826 * np.median(np.abs(values))


def _doubtful(spectra, velocity, star):
    "Which pixels (P,) of a star are doubtful by the mask of its spectra; None where it has none."
    if spectra.mask is None:
        return None
    grid = spectra.wavelength / (1 + velocity / LIGHT)
    place = np.clip(np.searchsorted(_edges(grid), star.wavelength) - 1, 0, len(grid) - 1)
    doubt = spectra.mask[0, place] != 0
    return doubt if doubt.mean() < 0.9 else None


def _error_verdict(found, doubtful=None):
    "Stated errors against what the best-fitting spectrum leaves, and against neighbours."
    ratio, fast, parts = _noise_ratios(found, doubtful)
    text = f"residuals are {ratio:.2f} times the errors (with the model's scatter), "
    text += f"neighbours differ by {fast:.2f}"
    if fast > 1.5:
        return Verdict("errors", "bad", text, f"too small, by a factor of about {fast:.1f}")
    if fast < 0.5 and fast < 0.35 * ratio:
        advice = "neighbours share their noise: resampled? Give the pixels as they were observed"
        return Verdict("errors", "bad", text, advice)
    if ratio > 1.5:
        return Verdict("errors", "bad", text, "too small, or a star that the model does not know")
    if fast < 0.5 and ratio < 0.75:
        return Verdict("errors", "look", text, f"too large, by a factor of about {1 / fast:.1f}")
    if len(parts) > 3 and np.quantile(parts, 0.9) > _UNEVEN * np.quantile(parts, 0.1):
        advice = f"not those of this spectrum: {parts.min():.1f} to {parts.max():.1f} along it"
        return Verdict("errors", "look", text, advice)
    return Verdict(
        "errors", "ok" if ratio > 0.5 else "look", text, "" if ratio > 0.5 else "too large"
    )


# %%
one = readings[0]
print(_error_verdict(one))
unsure = one.spectra.replace(ivar=one.spectra.ivar / 9)  # errors three times as large
print(_error_verdict(StarLabels(one.table, one.model, unsure, one.notes)))


# %%
#| export
def _that_draws(model):
    "The model, if it draws spectra; else the Cannon of the guard beside it."
    for one in (model, getattr(model, "refusal_", None)):
        if isinstance(one, Cannon):
            return one
    raise LabError(
        f"a {type(model).__name__} without a guard draws no spectra: check with a Cannon, or with "
        "a model that 'stellar-lab train' made"
    )


def check_star(model: Cannon, spectra: Spectra) -> StarCheck:
    """Is a spectrum fit for labels? Grid, velocity, resolution, continuum, errors, bad pixels.

    Parameters
    ----------
    model : Cannon
        fitted; or another model, whose guard then draws the spectra
    spectra : Spectra
        one star, from `from_arrays` or `read_spectrum`

    Returns
    -------
    StarCheck

    Raises
    ------
    LabError
        where neither the model nor its guard is a Cannon, or the star cannot be labelled at all

    Examples
    --------
    >>> from stellar_lab import check_star, read_spectrum
    >>> print(check_star(model, read_spectrum("my.csv")))  # doctest: +SKIP
    """
    model = _that_draws(model)
    told = _of_star(spectra, "VELOCITY")
    resolution = _of_star(spectra, "RESOLUTION")
    gains = _gains(model, spectra, resolution)
    offset = measure_velocity(model, spectra, resolution)
    chi2, best = _best_resolution(model, spectra, offset)
    found = label_star(model, spectra, offset, resolution)
    doubtful = _doubtful(spectra, offset, found.spectra)
    step, error = _velocity_step(found.model, found.spectra, found.table)
    offset += float(np.clip(step, -10, 10))
    verdicts = [
        _grid_verdict(spectra),
        _pixel_verdict(spectra),
        _air_verdict(offset, told),
        _velocity_verdict(offset, error, told),
        _resolution_verdict(best, resolution),
        _continuum_verdict(found),
        _error_verdict(found, doubtful),
    ]
    return StarCheck(verdicts, found, chi2, gains)


# %%
good = check_star(giants, read_spectrum(here / "giant.csv"))
print(good)
assert good.ok

# %% [markdown]
# And now what goes wrong: the same star, said to be at rest, in vacuum and sharp, though its wavelengths are those in air and its lines are blurred to R = 8,000.

# %%
poor = seen_at(rows[0], 8_000)
sham = from_arrays(
    poor.wavelength / 1.000273, poor.flux[0], ivar=poor.ivar[0], velocity=0, unit="AA"
)
bad = check_star(giants, sham)
print(bad)
verdicts = {verdict.what: verdict.verdict for verdict in bad.verdicts}
assert verdicts["air or vacuum"] == verdicts["velocity"] == verdicts["resolution"] == "bad"


# %% [markdown]
# The picture of a check: velocity, resolution, the star and what the model leaves.

# %%
#| export
def plot_check(check: StarCheck, window: tuple = None):
    """Draw a check: the velocities, the resolutions, the star under its model, and the rest.

    Parameters
    ----------
    check : StarCheck
    window : (low, high), optional
        of the spectrum [Angstrom]; 150 Angstrom in its middle by default

    Returns
    -------
    matplotlib Figure
    """
    import matplotlib.pyplot as plt

    found = check.found
    star = found.spectra
    middle = np.median(star.wavelength)
    window = (middle - 75, middle + 75) if window is None else window
    fig = plt.figure(figsize=(7, 6), layout="constrained")
    panels = fig.subplot_mosaic([["v", "r"], ["s", "s"], ["d", "d"]], height_ratios=(2, 3, 1.4))
    panels["v"].plot(*check.gains, lw=0.8)
    panels["v"].set(xlabel="velocity [km/s]", ylabel=r"$\Delta\chi^2$")
    panels["r"].plot(_TRIED, check.chi2, "o-", ms=4)
    panels["r"].set(xlabel="resolution", ylabel=r"$\chi^2$ per pixel", xscale="log")
    panels["r"].set_xticks(_TRIED[::2], [f"{r:,}" for r in _TRIED[::2]])
    panels["r"].minorticks_off()
    made = found.model.predict(found.table)[0]
    known = (star.ivar[0] > 0) & np.isfinite(made)
    plot_spectrum(star.wavelength, star.flux[0], star.ivar[0], window, ax=panels["s"], color="k")
    plot_spectrum(star.wavelength, made, known, window, ax=panels["s"], color="C3")
    panels["s"].set(xlabel=None, ylabel="flux / continuum")
    panels["s"].set_title(
        f"{star.stars['APOGEE_ID'][0]} (black) and the model in colour", fontsize="small"
    )
    plot_spectrum(star.wavelength, star.flux[0] - made, known, window, ax=panels["d"], color="C3")
    panels["d"].set(ylabel="star less\nmodel")
    return fig


# %%
plot_check(bad);

# %% [markdown]
# **What to see.** The peak stands at -82 km/s: air. Chi2 is lowest near R = 8,000 and not where the star claims to be. Both are read off before any label is believed.

# %% [markdown]
# ## Traps
# What has gone wrong for others, and what happens here:
#
# | trap | what happens |
# |---|---|
# | wavelengths in air | with a velocity given, `check` says so; with a measured one nothing happens |
# | resampling before the fit | errors too small by up to 2; do not resample, give your own pixels |
# | a resolution that is not said | chi2 is high and labels are wrong; `check` measures it |
# | error bars that are not given | refused |
# | one error for all pixels, though sky lines are worse | chi2 is high; mask the sky |
# | flux in physical units, 1e-17 | taken over its median, nothing happens |
# | a spectrum that was normalized elsewhere | normalized again, and so is the model |
# | an optical spectrum | refused, in one sentence |
#
# **Exercise.** Leave out two of the three chips of the disguised giant. By how much do the errors of each label grow, and which label needs the red chip?

# %%
#| hide
scratch.cleanup()
