# %% [markdown]
# # What is a star, to us?
# > The facts of the instrument and of its releases, and the one table that keeps what belongs to the same stars together.
#
# **Question.** A star reaches us as thousands of numbers in a file, a row in a catalogue and a path on a server. What do we have to know about the
# survey before we can read any of them, and how do we keep the pieces of one star from drifting apart?
#
# **Idea.** Everything that the survey decided (wavelengths, chips, mask bits, label names, directory trees) is *data*, and stands here once, as records.
# The code of all later chapters reads the records and has no branch for a release or an archive. And everything that belongs to a star stands in one
# object, `Spectra`, that can only be cut as a whole.
#
# You learn what an APOGEE spectrum is made of. You need numpy and a little astropy; the data model is that of
# [Holtzman et al. 2015](https://doi.org/10.1088/0004-6256/150/5/148) and the instrument that of
# [Majewski et al. 2017](https://doi.org/10.3847/1538-3881/aa784d).

# %%
#| default_exp survey

# %%
#| export
import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import stat
import sys
import threading
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import IntFlag
from importlib import import_module
from importlib.resources import as_file, files
from pathlib import Path, PurePosixPath

import astropy.units as u
import numpy as np
from astropy.table import QTable, Table

# %%
#| hide
import subprocess
import tempfile
import time
from unittest.mock import patch

import matplotlib.pyplot as plt
import pytest
from astropy.constants import c

from stellar_lab.archives import real_stars
from stellar_lab.survey import plot_spectrum, use_style

# %% [markdown]
# ## Where this book comes from
# APOGEE took spectra of several hundred thousand stars of the Milky Way in the near infrared. Reading temperatures and chemistry out of them was an
# exercise of a university course, a data laboratory whose inputs are public as `ucb-datalab`: fetch some thousand spectra, fit a model called
# The Cannon to stars whose labels are known, and ask it for the labels of a star whose name was wiped. One student's solution of that exercise, with its
# published table of results, is where this book starts. From here on it is *the original lab*: the chapters keep its ten stages, compare
# with its numbers, and say where they decide otherwise.
#
# And this is what it is all about: a star, as the survey published it.

# %%
sample = real_stars()
giants = np.flatnonzero((sample.stars["SNR"] > 200) & (sample.stars["TEFF"].value < 4500))
star = sample[giants[0]]
star.stars["APOGEE_ID", "FIELD", "SNR", "TEFF", "LOGG", "M_H"]

# %% [markdown]
# A giant, its light divided by the smooth shape that a star without lines would have. How it is drawn stands at the end of this chapter.

# %%
use_style()
plot_spectrum(
    star.wavelength, star.flux[0], star.ivar[0], title=f"a real giant: {star.stars['APOGEE_ID'][0]}"
).set(ylim=(0.3, 1.2), ylabel="flux / continuum");


# %% [markdown]
# **What to see.** Three stretches of spectrum with gaps between them, one for each detector. The dips are no noise: nearly every one is a line in which
# atoms or molecules of the star's atmosphere swallow light. Their depths are what this book reads.

# %% [markdown]
# ## Errors that help
# What a user can get wrong (a path, a label's name, an archive that is not there) is answered by an error of our own that names the thing, says what is
# wrong and what to do. All of them are a `LabError`, so a script can catch them in one place, and the command line prints them without a traceback.

# %%
#| export
class LabError(ValueError):
    "Something the user can mend: the message names what is wrong and what to do."


class WrongFile(ValueError):
    "What is wrong with what a file holds, in words for its reader; a `LabError` names the file."


def said_of(error) -> str:
    """What an error says of a file, in words that need no knowledge of the program.

    Parameters
    ----------
    error : Exception
        Whatever reading a damaged or foreign file brought about.

    Returns
    -------
    str
        One line.

    Examples
    --------
    >>> said_of(KeyError("seed"))
    'it has no entry seed'
    """
    if isinstance(error, (LabError, WrongFile)):
        return next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError):
        return "it does not fit into the memory that is left"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no whole JSON, from line {error.lineno} on"
    if isinstance(error, UnicodeError):
        return "it is no text in UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, KeyError) and error.args:
        return f"it has no entry {error.args[0]}"
    return getattr(error, "strerror", None) or "it holds something else than it should"


# %%
#| exporti
class MissingExtra(LabError, ImportError):
    "An optional package is not installed; the message says how to get it."


def require(package: str, extra: str):
    """Import an optional package.

    Parameters
    ----------
    package : str
        Its name for `import`.
    extra : str
        The extra of stellar_lab that brings it.

    Returns
    -------
    module
        The package.

    Raises
    ------
    MissingExtra
        If it is not installed; the message says how to get it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingExtra(
            f"this needs the package {package!r}, which is not installed: "
            f"pip install 'stellar_lab[{extra}]'"
        ) from error


# %%
with pytest.raises(MissingExtra, match=r"pip install 'stellar_lab\[network\]'") as refusal:
    require("a_package_nobody_wrote", "network")
assert require("json", "network") is json
print(refusal.value)


# %% [markdown]
# A path can name something that is no file at all: a folder, a device, or a *named pipe*, which keeps a program that opens it waiting until another
# one writes into it. So we look before we open.

# %%
#| exporti
def what_stands_at(path) -> str:
    """What stands at a path in place of a file.

    Parameters
    ----------
    path : path
        Where to look; links are followed.

    Returns
    -------
    str
        "a folder", "a named pipe", "a device", "a socket"; "" for a file, or where nothing stands.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # nothing there, or a path that cannot be one
        return ""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return "" if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "something that is no file")


# %%
what_stands_at("."), what_stands_at(os.devnull), what_stands_at("nowhere")

# %% [markdown]
# ## The wavelength grid
# Every combined spectrum of the survey stands on one grid of 8,575 pixels, evenly spaced in the logarithm of the vacuum wavelength and at rest:
# $$ \log_{10}(\lambda_i/\mathrm{Å}) = 4.179 + 6\times10^{-6}\,i . $$
# Even in the logarithm means even in velocity: a Doppler shift moves all lines by the same number of pixels.

# %%
#| exporti
N_PIXELS = 8575
LOG10_START = 4.179  # CRVAL1 of every apStar and aspcapStar file
LOG10_STEP = 6e-6  # CDELT1
CHIPS = {  # first and last pixel of the full grid that every star fills
    "blue": (322, 3241),
    "green": (3648, 6047),
    "red": (6412, 8305),
}

# %%
#| export
full_wavelength = 10 ** (LOG10_START + LOG10_STEP * np.arange(N_PIXELS))  # (8575,) [Angstrom]
on_band = np.concatenate([np.arange(first, last + 1) for first, last in CHIPS.values()])  # (7214,)
wavelength = full_wavelength[on_band]  # (7214,) [Angstrom, vacuum]: the grid of this book
for grid in (full_wavelength, on_band, wavelength):
    grid.flags.writeable = False

# %% [markdown]
# Three detectors catch three stretches of it. At their edges the light moves in and out with the star's velocity, so this book keeps, as the original lab
# did, the *on-band* pixels that every star fills: 2,920 + 2,400 + 1,894 = 7,214 of the 8,575.

# %%
fig, ax = plt.subplots(figsize=(8, 1.4))
ax.axvspan(full_wavelength[0], full_wavelength[-1], color="0.9")
for name, (first, last) in CHIPS.items():
    ax.axvspan(full_wavelength[first], full_wavelength[last], color=name, alpha=0.4)
    middle = full_wavelength[(first + last) // 2]
    ax.text(middle, 0.5, f"{name}\n{last - first + 1} pixels", ha="center", va="center")
ax.set(xlabel="vacuum wavelength [Å]", yticks=[], title="the on-band pixels of the three chips");

# %% [markdown]
# One pixel is how many kilometres a second wide? The step says it: $c\ln(10)\times 6\times10^{-6}$.

# %%
pixel_width = (c * np.log(10) * LOG10_STEP).to("km/s")
relative_step = np.diff(full_wavelength) / full_wavelength[:-1]
assert np.allclose(relative_step * c.to_value("km/s"), pixel_width.value, rtol=1e-5)
assert len(wavelength) == 7214 and len(full_wavelength) == N_PIXELS
assert 15100 < wavelength[0] < wavelength[-1] < 17000  # the H band
pixel_width


# %% [markdown]
# Line lists and older instruments count in *air*, where light is slower and its wave shorter by a few parts in ten thousand: 4.4 Å here, twenty pixels.
# A wavelength that does not say which it is is a trap. The refractive index of standard air follows from the wavenumber
# $\sigma=10^4\,\mathrm{Å}/\lambda$ ([Ciddor 1996](https://doi.org/10.1364/AO.35.001566)),
# $$ \frac{\lambda_\mathrm{vac}}{\lambda_\mathrm{air}} = 1 + \frac{0.05792105}{238.0185-\sigma^2} + \frac{0.00167917}{57.362-\sigma^2} . $$

# %%
#| export
def air_to_vacuum(air):
    """Vacuum wavelength of light whose wavelength in standard air is known.

    Parameters
    ----------
    air : float or array_like
        Wavelengths in air [Angstrom].

    Returns
    -------
    float or ndarray
        Wavelengths in vacuum [Angstrom], of the same shape.

    Notes
    -----
    Refractive index of air at 15 degrees Celsius and 101,325 Pa by Ciddor (1996), Applied Optics
    35, 1566. The formula asks for the wavenumber in vacuum; that in air moves the answer by less
    than a thousandth of an Angstrom.

    Examples
    --------
    >>> float(air_to_vacuum(16718.957).round(2))  # aluminium
    16723.52
    """
    air = np.asarray(air, dtype=float)
    sigma2 = (1e4 / air) ** 2
    return air * (1 + 0.05792105 / (238.0185 - sigma2) + 0.00167917 / (57.362 - sigma2))


# %% [markdown]
# The survey has published [pairs](https://www.sdss.org/dr7/products/spectra/vacwavelength.html) for lines of galaxies, computed by another formula. And
# two magnesium lines that line lists give at 15748.988 and 15765.842 Å in air are known to users of APOGEE at 15753.291 and 15770.150 Å.

# %%
pairs = {
    4861.363: 4862.721,  # hydrogen
    5006.843: 5008.239,  # oxygen
    6562.801: 6564.614,  # hydrogen
    6730.820: 6732.680,  # sulphur
    15748.988: 15753.291,  # magnesium
    15765.842: 15770.150,  # magnesium
}
assert np.allclose(air_to_vacuum(list(pairs)), list(pairs.values()), rtol=0, atol=0.002)
Table({"air [Å]": list(pairs), "vacuum [Å]": air_to_vacuum(list(pairs)).round(3)})

# %% [markdown]
# Whatever works chip by chip asks for the runs of neighbouring pixels in the grid that it was given: `chip_slices` finds the three slices of the on-band
# grid, of the full grid, or of any grid cut from them. The split points are those of the original lab, in the gaps between the chips.

# %%
#| export
_CHIP_SPLITS = (3450, 6200)  # pixels of the full grid between the chips


def chip_slices(grid: np.ndarray) -> dict:
    """The pixels of each chip.

    Parameters
    ----------
    grid : ndarray
        (P,) increasing wavelengths [Angstrom, vacuum], a part of the survey's grid.

    Returns
    -------
    dict
        Name of the chip -> slice of `grid`.

    Examples
    --------
    >>> chip_slices(wavelength)["green"]
    slice(2920, 5320, None)
    """
    edges = np.searchsorted(grid, full_wavelength[list(_CHIP_SPLITS)] * (1 - LOG10_STEP))
    edges = [0, *map(int, edges), len(grid)]
    return {name: slice(edges[k], edges[k + 1]) for k, name in enumerate(CHIPS)}


# %%
assert [s.stop - s.start for s in chip_slices(wavelength).values()] == [2920, 2400, 1894]
assert [s.start for s in chip_slices(full_wavelength).values()] == [0, 3450, 6200]
chip_slices(wavelength)

# %% [markdown]
# ## The pixel mask
# Besides flux and error the survey keeps a bitmask for each pixel, [APOGEE_PIXMASK](https://www.sdss4.org/dr17/algorithms/bitmasks/): each bit names one
# reason to doubt.

# %%
#| exporti
PIXMASK_NAMES = (  # in the order of their bits
    *("BADPIX", "CRPIX", "SATPIX", "UNFIXABLE", "BADDARK", "BADFLAT", "BADERR", "NOSKY"),
    *("LITTROW_GHOST", "PERSIST_HIGH", "PERSIST_MED", "PERSIST_LOW"),
    *("SIG_SKYLINE", "SIG_TELLURIC", "NOT_ENOUGH_PSF"),
)

# %%
#| export
PIXMASK = IntFlag("PIXMASK", {name: 1 << bit for bit, name in enumerate(PIXMASK_NAMES)})
PIXMASK.__doc__ = "Bits of the survey's mask of pixels, by name: `PIXMASK.BADPIX` is 1."

# %%
assert PIXMASK.CRPIX == 2 and PIXMASK.NOT_ENOUGH_PSF == 1 << 14
PIXMASK(4608)  # what is wrong with a pixel that carries this number?


# %% [markdown]
# ## Labels
# A *label* is a number that says what kind of star it is: effective temperature, surface gravity, abundances. A `Label` knows its symbol, its unit, the
# names of its columns in the survey's allStar tables (they changed over the years: the first one that a table has counts), the range that plots
# show, and a much wider one that no star of the survey leaves. The coolest dwarfs have some 2,400 K, the survey's hottest model stars 20,000 K: a value
# of 0 or 50,000 K is a slip, and so is 4.5 where somebody meant kilokelvin.

# %%
#| exporti
@dataclass(frozen=True)
class Label:
    """One stellar label.

    Parameters
    ----------
    name : str
        Its name here and, in lower case, in tables of labels.
    symbol : str
        How figures write it.
    unit : astropy.units.UnitBase
        Unit of its values; errors have the same.
    plot_range : tuple or None
        The range that plots show, None where nobody knows one.
    columns, errors : tuple of str
        Columns of value and 1-sigma error in the allStar tables; the first that exists counts.
    possible : tuple of float
        The open interval beyond which no star of the survey can be; no limits by default.
    """

    name: str
    symbol: str
    unit: u.UnitBase
    plot_range: tuple | None
    columns: tuple
    errors: tuple
    possible: tuple = (-np.inf, np.inf)

    @property
    def axis(self) -> str:
        "Symbol and unit, for an axis."
        if self.unit == u.dimensionless_unscaled:
            return self.symbol
        return f"{self.symbol} [{self.unit:unicode}]"


# %%
#| export
def _label(name, symbol, unit, plot_range, possible, *older):
    "A label with the name of its column; `older` are names that the column had before."
    columns = (name, *older)
    errors = tuple(f"{column}_ERR" for column in columns)
    return Label(name, symbol, unit, plot_range, columns, errors, possible)


_METALS = (-6, 1.5)  # dex; the poorest stars known, and more than the richest
_RATIOS = (-4, 4)  # dex
_RECORDS = (
    _label("TEFF", r"$T_\mathrm{eff}$", u.K, (3200, 5700), (2000, 30_000)),
    _label("LOGG", r"$\log g$", u.dex, (-0.5, 4.5), (-2, 7)),
    _label("FE_H", "[Fe/H]", u.dex, (-1.2, 0.8), _METALS),
    _label("MG_FE", "[Mg/Fe]", u.dex, (-0.4, 0.6), _RATIOS),
    _label("SI_FE", "[Si/Fe]", u.dex, (-0.4, 0.5), _RATIOS),
    _label("M_H", "[M/H]", u.dex, (-2.7, 0.7), _METALS, "PARAM_M_H"),
    _label("ALPHA_M", r"[$\alpha$/M]", u.dex, (-0.5, 0.6), _RATIOS, "PARAM_ALPHA_M"),
    _label("C_M", "[C/M]", u.dex, (-0.9, 0.7), _RATIOS),
    _label("N_M", "[N/M]", u.dex, (-0.6, 1.1), _RATIOS),
)
LABELS = {label.name: label for label in _RECORDS}

# %%
#| echo: false
Table(
    rows=[
        (label.name, label.unit, *map(str, ranges), ", ".join(label.columns))
        for label in LABELS.values()
        for ranges in [(label.plot_range, label.possible)]
    ],
    names=["label", "unit", "plot range", "possible", "columns in allStar"],
)


# %% [markdown]
# Who asks the survey for a label must name one that it has. A model, however, may be taught labels that the survey never had, such as an age: then
# `label_record` answers with a plain number under its own name.

# %%
#| export
def label_records(names) -> tuple:
    """The records of some labels of the survey.

    Parameters
    ----------
    names : str or sequence of str
        Names of labels, in any case.

    Returns
    -------
    tuple of Label
        In the order of the names.

    Raises
    ------
    LabError
        For a name that is not in `LABELS`; it lists the known ones.
    """
    names = [names] if isinstance(names, str) else [str(name) for name in names]
    unknown = [repr(name) for name in names if name.upper() not in LABELS]
    if unknown:
        raise LabError(f"unknown label {', '.join(unknown)}: choose from {', '.join(LABELS)}")
    return tuple(LABELS[name.upper()] for name in names)


def label_record(name: str) -> Label:
    """The record of any label.

    Parameters
    ----------
    name : str
        Name of a label, in any case.

    Returns
    -------
    Label
        The record in `LABELS`; for another name a dimensionless one whose symbol is the name.

    Examples
    --------
    >>> label_record("teff").unit
    Unit("K")
    >>> label_record("age").axis
    'age'
    """
    name = str(name)
    if name.upper() in LABELS:
        return LABELS[name.upper()]
    return Label(name, name, u.dimensionless_unscaled, None, (name,), (f"{name}_ERR",))


# %%
assert [label.name for label in label_records(["teff", "LOGG"])] == ["TEFF", "LOGG"]
assert label_record("m_h") is LABELS["M_H"]
with pytest.raises(LabError, match="unknown label 'TEF': choose from TEFF, LOGG"):
    label_records(["TEF"])
label_record("age")

# %% [markdown]
# ## Releases: where the files are
# The survey's trees changed from release to release, but a tree is only a template. A `Release` holds one for each product (`apstar`, the combined
# spectrum; `aspcapstar`, the pseudo-normalized one that the survey's own pipeline ASPCAP fitted), where the catalogue is, and how a target is called in it.
# Paths are relative to the root of an archive, `https://data.sdss.org/sas` or a folder.
#
# First the products: what the HDUs of a file hold, the numbered parts of a FITS file.

# %%
#| exporti
# An APOGEE_ID holds a minus sign for every star south of the equator;
# a file of a single visit appends -<visit> to it.
APOGEE_ID = r"(?:[A-Z0-9]{2}\d{8}[+-]\d{7}|[A-Za-z][A-Za-z0-9_.+]*)"


@dataclass(frozen=True)
class Product:
    """A kind of spectrum file. Layout: https://data.sdss.org/datamodel (apStar, aspcapStar).

    Parameters
    ----------
    name : str
        `apstar` or `aspcapstar`.
    hdus : int
        HDUs that a whole file has at least.
    flux, error : int
        Their HDUs.
    mask : int or None
        HDU of the bitmask, None where there is none.
    normalized : bool
        Whether the flux is already relative to a pseudo-continuum. Such files have one row.
    max_error : float
        A pixel with this error or a larger one is unusable, in the unit of the flux.
    max_flux : float
        A pixel with a larger flux is unusable: no star is so bright.
    """

    name: str
    hdus: int
    flux: int = 1
    error: int = 2
    mask: int | None = None
    normalized: bool = False
    max_error: float = np.inf
    max_flux: float = np.inf


# %%
#| export
PRODUCTS = {
    # An error of 1e10 means "no value"; the brightest star of the sky has a flux below 1e9.
    "apstar": Product("apstar", hdus=10, mask=3, max_error=1e10, max_flux=1e12),
    "aspcapstar": Product("aspcapstar", hdus=5, normalized=True, max_error=0.3, max_flux=1e4),
}

# %%
Table(
    rows=[(p.name, p.hdus, str(p.mask), p.normalized) for p in PRODUCTS.values()],
    names=["product", "HDUs", "mask in HDU", "normalized"],
)


# %% [markdown]
# Then what a template can do: become a path or a folder, or recognize the name of a file that was made from it.

# %%
#| export
class _Tree:
    "How the templates of a release become paths, and names of files become stars."

    numbered = False  # stars are called by their sdss_id, and lie in folders of its last digits

    def path(self, product: str, field: str, apogee_id: str, telescope: str = "apo25m") -> str:
        """Path of a star's file.

        Parameters
        ----------
        product : str
            `apstar` or `aspcapstar`; `mwmstar` or `mwmvisit` of a numbered release.
        field : str
            Location ID up to DR14, name of the field since DR16, `sdss_id_folder` since DR19.
        apogee_id : str
            Name of the star, its sdss_id since DR19.
        telescope : str, default "apo25m"
            `apo25m`, `lco25m` or `apo1m`.

        Returns
        -------
        str
            Path below the root of an archive.

        Raises
        ------
        LabError
            If the release has no such product.
        """
        prefix = self.prefixes.get(telescope, "ap")
        parts = {"telescope": telescope, "field": field, "id": apogee_id, "prefix": prefix}
        return self._template(product).format(**parts)

    def folder(self, product: str, field: str, telescope: str = "apo25m") -> str:
        "The folder that holds a field's files, below the root."
        return str(PurePosixPath(self.path(product, field, "x", telescope)).parent)

    def parse_name(self, product: str, file_name: str) -> str | None:
        "The APOGEE_ID in the name of a star's file; None for others, such as single visits."
        for name in {PurePosixPath(template).name for template in self.templates(product)}:
            star = r"\d+" if self.numbered else APOGEE_ID
            pattern = re.escape(name).replace(r"\{id\}", f"({star})")
            match = re.fullmatch(pattern.replace(r"\{prefix\}", "a[ps]"), file_name)
            if match:
                return match.group(1)
        return None

    def templates(self, product: str) -> tuple:
        "All templates of a product (or of the catalogue, `allstar`), the survey's own first."
        first = self.allstar if product == "allstar" else self._template(product)
        return (first, *self.other_layouts.get(product, ()))

    def _template(self, product):
        if product not in self.paths:
            known = ", ".join(self.paths)
            raise LabError(f"{self.name} has no product {product!r}: choose from {known}")
        return self.paths[product]


# %%
#| exporti
def same_star(one: str, other: str) -> bool:
    """Whether two names can be of the same star.

    Parameters
    ----------
    one, other : str
        APOGEE_IDs, or what stands in a header.

    Returns
    -------
    bool
        False only if both hold a place in the sky, as `2M21334193-0048169` does, and the places
        differ: other catalogues may have other names for a star.
    """
    places = [re.fullmatch(r"[A-Z0-9]{2}(\d{8}[+-]\d{7})", name.strip()) for name in (one, other)]
    return not all(places) or places[0][1] == places[1][1]


# %%
class Toy(_Tree):
    "A tree with a single branch."

    paths = {"apstar": "stars/{field}/{prefix}Star-x1-{id}.fits"}
    prefixes = {"lco25m": "as"}
    other_layouts = {}


assert same_star("2M21334193-0048169", "AP21334193-0048169") and same_star("VESTA", "anything")
assert not same_star("2M21334193-0048169", "2M21334193+0048169")
leaf = Toy().path("apstar", "M67", "VESTA", telescope="lco25m")
assert Toy().parse_name("apstar", Path(leaf).name) == "VESTA"
leaf


# %% [markdown]
# A `Release` is the templates and a few facts more. One of them saves a trap. A star that was seen several times has several rows in its `apStar` file:
# row 0 combines the visits pixel by pixel, row 1 with one weight per visit, and the visits follow. Which of the two is *the* spectrum depends on the
# release: row 1 up to DR16; but DR17 left the masks of row 1 empty, so there it is row 0 that knows its bad pixels.

# %%
#| exporti
@dataclass(frozen=True)
class Release(_Tree):
    """Path rules and facts of one data release.

    Parameters
    ----------
    name : str
        Such as `DR14`.
    paths : dict
        Product -> path template with `{telescope}`, `{field}`, `{id}`, `{prefix}`.
    allstar : str
        Path of the catalogue.
    target_id : str
        Template of the column TARGET_ID in the catalogue.
    telescopes : tuple of str
        Whose files it holds.
    field_column : str
        Column of the catalogue that names the folder.
    prefixes : dict
        Names of files begin with "ap", but for these telescopes.
    other_layouts : dict
        Product or `allstar` -> further templates that a folder may follow.
    row : int, default 1
        The row of an apStar file that holds the combined spectrum with its flags.
    numbered : bool, default False
        Stars are called by their sdss_id, and lie in folders of its last digits, not in fields.
    """

    name: str
    paths: dict
    allstar: str
    target_id: str
    telescopes: tuple = ("apo25m",)
    field_column: str = "FIELD"
    prefixes: dict = field(default_factory=lambda: {"lco25m": "as"})
    other_layouts: dict = field(default_factory=dict)
    row: int = 1
    numbered: bool = False

    @property
    def reductions(self) -> frozenset:
        "What its files' names call the reduction: `r8` in `apStar-r8-….fits`."
        return frozenset(PurePosixPath(path).name.split("-")[1] for path in self.paths.values())


def _release(name, apstar, aspcapstar, allstar, **rules):
    "A release whose paths all begin with <name>/apogee/spectro/."
    root = f"{name.lower()}/apogee/spectro/"
    paths = {"apstar": root + apstar, "aspcapstar": root + aspcapstar}
    return Release(name, paths, root + allstar, **rules)


# %%
toy = _release(
    "DR99", "apStar-x1-{id}.fits", "aspcapStar-v9-{id}.fits", "allStar.fits", target_id=""
)
toy.path("apstar", "M67", "VESTA"), toy.reductions, toy.row

# %% [markdown]
# Five releases. DR14 has a second layout: the folders of the original lab, `stars/<location>/…`. DR19 is the first of SDSS-V, the survey that goes on:
# it has no fields any more, and a star is called by a number, its `sdss_id`. [The chapter on SDSS-V](22_mwm.ipynb) says where each of its facts is from.

# %%
#| export
_NORTH_AND_SOUTH = {
    "target_id": "{telescope}.{field}.{id}",
    "telescopes": ("apo25m", "lco25m", "apo1m"),
}
_ASTRA = "dr19/spectro/astra/0.6.0/"  # written by astra, version 0.6.0
RELEASES = {
    "dr10": _release(
        "DR10",
        "redux/r3/s3/{field}/apStar-s3-{id}.fits",
        "redux/r3/s3/a3/v304/{field}/aspcapStar-v304-{id}.fits",
        "redux/r3/s3/a3/v304/allStar-v304.fits",
        target_id="{field}.{id}",
        field_column="LOCATION_ID",
    ),
    "dr14": _release(
        "DR14",
        "redux/r8/stars/{telescope}/{field}/apStar-r8-{id}.fits",
        "redux/r8/stars/l31c/l31c.2/{field}/aspcapStar-r8-l31c.2-{id}.fits",
        "redux/r8/stars/l31c/l31c.2/allStar-l31c.2.fits",
        target_id="{field}.{id}",
        telescopes=("apo25m", "apo1m"),
        field_column="LOCATION_ID",
        other_layouts={
            "apstar": ("stars/{field}/apStar-r8-{id}.fits",),
            "aspcapstar": ("stars/{field}/aspcapStar-r8-l31c.2-{id}.fits",),
            "allstar": ("stars/allStar-l31c.2.fits",),
        },
    ),
    "dr16": _release(
        "DR16",
        "redux/r12/stars/{telescope}/{field}/{prefix}Star-r12-{id}.fits",
        "aspcap/r12/l33/{telescope}/{field}/aspcapStar-r12-{id}.fits",
        "aspcap/r12/l33/allStar-r12-l33.fits",
        **_NORTH_AND_SOUTH,
    ),
    "dr17": _release(
        "DR17",
        "redux/dr17/stars/{telescope}/{field}/{prefix}Star-dr17-{id}.fits",
        "aspcap/dr17/synspec_rev1/{telescope}/{field}/aspcapStar-dr17-{id}.fits",
        "aspcap/dr17/synspec_rev1/allStar-dr17-synspec_rev1.fits",
        **_NORTH_AND_SOUTH,
        row=0,  # the masks of row 1 are empty
    ),
    "dr19": Release(
        "DR19",
        {
            "mwmstar": _ASTRA + "spectra/star/{field}/mwmStar-0.6.0-{id}.fits",
            "mwmvisit": _ASTRA + "spectra/visit/{field}/mwmVisit-0.6.0-{id}.fits",
        },
        _ASTRA + "summary/astraAllStarASPCAP-0.6.0.fits.gz",
        target_id="{id}",
        telescopes=("apo25m", "lco25m"),
        row=0,
        numbered=True,
    ),
}


# %% [markdown]
# A number says in which folder its star lies: its last four digits, in two pairs.

# %%
#| exporti
def sdss_id_folder(sdss_id: int) -> str:
    """The folder of a star of SDSS-V, which takes the place of a field.

    Parameters
    ----------
    sdss_id : int
        Number of the star, not negative.

    Returns
    -------
    str
        The last four digits in two pairs, the higher ones first; zeros where there are fewer.

    Examples
    --------
    >>> sdss_id_folder(70350907), sdss_id_folder(5)
    ('09/07', '00/05')
    """
    digits = f"{int(sdss_id):04d}"
    return f"{digits[-4:-2]}/{digits[-2:]}"


# %%
assert RELEASES["dr16"].reductions == {"r12"} and RELEASES["dr10"].reductions == {"s3", "v304"}
Table(
    rows=[(r.name, ", ".join(sorted(r.reductions)), r.row) for r in RELEASES.values()],
    names=["release", "in names of files", "combined row"],
)

# %% [markdown]
# A southern star is a star, too. (The original lab's pattern, `apStar-r8-*-*.fits` means a visit, lost all of them.)

# %%
dr14 = RELEASES["dr14"]
tree = "dr14/apogee/spectro/redux/r8/stars/apo25m/4230/"
south = "apStar-r8-2M21334193-0048169"
assert dr14.path("apstar", "4230", "2M21334193-0048169") == f"{tree}{south}.fits"
assert dr14.parse_name("apstar", f"{south}.fits") == "2M21334193-0048169"
assert dr14.parse_name("apstar", f"{south}-56931.fits") is None  # one visit
assert dr14.parse_name("apstar", "apStar-r8-VESTA.fits") == "VESTA"  # another catalogue's name
for wrong in (f"../{south}.fits", f"{south}.fits.png", "apStar-r12-2M21334193-0048169.fits"):
    assert dr14.parse_name("apstar", wrong) is None
with pytest.raises(LabError, match="DR14 has no product 'apvisit': choose from apstar, aspcapstar"):
    dr14.path("apvisit", "4230", "2M21334193-0048169")
star_19 = RELEASES["dr19"].path("mwmstar", sdss_id_folder(70_350_907), "70350907")
assert star_19 == "dr19/spectro/astra/0.6.0/spectra/star/09/07/mwmStar-0.6.0-70350907.fits"
assert RELEASES["dr19"].parse_name("mwmstar", "mwmStar-0.6.0-70350907.fits") == "70350907"
assert RELEASES["dr19"].parse_name("mwmstar", "mwmStar-0.7.0-70350907.fits") is None
in_the_south = RELEASES["dr17"].path("apstar", "N362", "2M01020000-7100000", "lco25m")
assert in_the_south.endswith("lco25m/N362/asStar-dr17-2M01020000-7100000.fits")
in_the_south

# %% [markdown]
# ## Archives: who is in them
# An *archive* is a root with stars in it, and what differs from one to the next is again a record: which release's tree it follows, which labels and
# fields a command takes unless told otherwise, and which cuts a star must pass.
#
# Some cuts ask for a number, such as the signal-to-noise ratio. Others ask for *flags*: the catalogue has bitmasks like those of the pixels, but for a
# whole star. `STARFLAG` (and `ANDFLAG`, which counts only what all visits had) says what the telescope met, `ASPCAPFLAG` what the survey's pipeline
# thinks of its own labels. The [numbers of the bits](https://www.sdss4.org/dr17/algorithms/bitmasks/) are the same in all releases; later ones added some.

# %%
#| export
_STAR_BITS = {
    **{name: bit for bit, name in enumerate(("BAD_PIXELS", "COMMISSIONING", "BRIGHT_NEIGHBOR"))},
    **{"VERY_BRIGHT_NEIGHBOR": 3, "LOW_SNR": 4},
    **{"PERSIST_HIGH": 9, "PERSIST_MED": 10, "PERSIST_LOW": 11},
    **{"PERSIST_JUMP_POS": 12, "PERSIST_JUMP_NEG": 13},
    **{"SUSPECT_RV_COMBINATION": 16, "SUSPECT_BROAD_LINES": 17, "BAD_RV_COMBINATION": 18},
    **{"RV_REJECT": 19, "RV_SUSPECT": 20, "MULTIPLE_SUSPECT": 21, "RV_FAIL": 22},
    **{"SUSPECT_ROTATION": 23, "MTPFLUX_LT_75": 24, "MTPFLUX_LT_50": 25},
}
_DOUBTS = (  # what ASPCAP doubts: bits 0 to 14 as warnings, 16 to 30 as verdicts
    *("TEFF", "LOGG", "VMICRO", "M_H", "ALPHA_M", "C_M", "N_M", "STAR"),
    *("CHI2", "COLORTE", "ROTATION", "SN", "SPEC_HOLE", "ATMOS_HOLE", "VSINI"),
)
_ASPCAP_BITS = {
    **{f"{name}_WARN": bit for bit, name in enumerate(_DOUBTS)},
    **{f"{name}_BAD": bit for bit, name in enumerate(_DOUBTS, start=16)},
    **{"NO_ASPCAP_RESULT": 31, "MISSING_APSTAR": 32, "NO_GRID": 33, "BAD_FRAC_LOWSNR": 34},
    **{"BAD_FRAC_BADPIX": 35, "FERRE_FAIL": 36, "PROBLEM_TARGET": 40, "MULTIPLE_SUSPECT": 41},
}
_STAR_FLAGS = {"STARFLAG": _STAR_BITS, "ANDFLAG": _STAR_BITS, "ASPCAPFLAG": _ASPCAP_BITS}

# %% [markdown]
# Bits are read from the column as it was written: the 31st bit of a 32-bit number is its sign.

# %%
#| export
_NO_FLAGS = -9999  # how the survey writes "no value" among whole numbers


def _bit_number(column, bit):
    "Number of a bit that was given by name or number; LabError if there is no such bit."
    names = _STAR_FLAGS.get(column.upper(), {})
    if isinstance(bit, str):
        if bit.upper() not in names:
            known = f"choose from {', '.join(names)}" if names else "give its number"
            raise LabError(f"{column} has no bit with the name {bit!r}: {known}")
        return names[bit.upper()]
    if not 0 <= bit < 64:
        raise LabError(f"a bit of {column} has a number from 0 to 63, not {bit}")
    return int(bit)


def _as_bits(values):
    "Whole numbers as 64 bits each, (N,) uint64, and which of them are known, (N,) bool."
    known = ~np.ma.getmaskarray(values)
    values = np.ma.getdata(values)
    if values.dtype.kind == "f":
        known &= np.isfinite(values)
        values = np.where(known, values, 0).astype(np.int64)
    known &= values != _NO_FLAGS
    if values.dtype.kind == "i":
        values = values.astype(f"u{values.dtype.itemsize}")
    return values.astype(np.uint64), known


# %%
assert (_bit_number("ASPCAPFLAG", "STAR_WARN"), _bit_number("ASPCAPFLAG", "star_bad")) == (7, 23)
assert _bit_number("STARFLAG", "PERSIST_HIGH") == 9 and _bit_number("SNR", 9) == 9
# The second carries bit 31, the third is unknown.
_as_bits(np.array([5, -(1 << 31), -9999], ">i4"))


# %% [markdown]
# So a cut keeps an open interval of a column, or the stars without certain bits, or both. It answers for itself: `keeps` takes a column and says who
# stays. A value that nobody knows passes no cut.

# %%
#| exporti
@dataclass(frozen=True)
class Cut:
    """A named rule that a star must pass: low < column < high, and none of some bits set.

    Parameters
    ----------
    name : str
        What the ledger calls the rule.
    column : str
        Column of the stars table, one number per star.
    low, high : float, default no limit
        Ends of the open interval, in the column's unit.
    reason : str, optional
        Why the others go, for the ledger.
    without_bits : int, str or sequence of these, default ()
        Bits that must not be set: by number, 0 is the lowest; in STARFLAG, ANDFLAG and ASPCAPFLAG
        also by name. LabError for a bit that does not exist.

    Examples
    --------
    >>> cut = Cut("star flags", "STARFLAG", without_bits=("BAD_PIXELS", "VERY_BRIGHT_NEIGHBOR"))
    >>> print(cut)
    STARFLAG without BAD_PIXELS, VERY_BRIGHT_NEIGHBOR
    >>> cut.keeps([0, 1, 4, 8])
    array([ True, False,  True, False])
    """

    name: str
    column: str
    low: float = -np.inf
    high: float = np.inf
    reason: str = ""
    without_bits: tuple = ()

    def __post_init__(self):
        bits = self.without_bits
        bits = (bits,) if isinstance(bits, (str, int, np.integer)) else tuple(bits)
        for bit in bits:
            _bit_number(self.column, bit)
        object.__setattr__(self, "without_bits", bits)

    def __str__(self):
        low = f"{self.low:g} < " if np.isfinite(self.low) else ""
        high = f" < {self.high:g}" if np.isfinite(self.high) else ""
        bits = [bit if isinstance(bit, str) else f"bit {bit}" for bit in self.without_bits]
        return f"{low}{self.column}{high}" + (f" without {', '.join(bits)}" if bits else "")

    def keeps(self, column) -> np.ndarray:
        "Which of N values (array, masked or not, or Quantity) the cut keeps: (N,) bool."
        return _passes(self, column)


def _passes(cut, column):
    "The rule of a cut; LabError unless the column holds one number per star."
    values = np.ma.asarray(getattr(column, "value", column))
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        text = values.dtype.kind in "SUO"
        raise LabError(
            f"the cut {cut.name!r} needs one number per star, but {cut.column} holds "
            + ("text" if text else f"an array of shape {values.shape}")
        )
    numbers = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan)
    kept = (numbers > cut.low) & (numbers < cut.high)
    if cut.without_bits:
        forbidden = sum({1 << _bit_number(cut.column, bit) for bit in cut.without_bits})
        bits, known = _as_bits(values)
        kept &= known & ((bits & np.uint64(forbidden)) == 0)
    return kept


# %% [markdown]
# Three temperatures, of which one is unknown; and three stars whose flags say nothing, a warning, and that there are no labels.

# %%
flags = np.ma.array(np.array([0, 1 << 7, -(1 << 31), 0], ">i4"), mask=[0, 0, 0, 1])
bad = Cut("failed", "ASPCAPFLAG", without_bits=("STAR_BAD", 31), reason="ASPCAP failed")
assert Cut("cool", "TEFF", high=5000).keeps([4000, 6000, np.nan]).tolist() == [True, False, False]
assert bad.keeps(flags).tolist() == [True, True, False, False]
with pytest.raises(LabError, match="STARFLAG has no bit with the name 'DUST': choose from BAD_PIX"):
    Cut("dusty", "STARFLAG", without_bits="DUST")
print(bad)

# %% [markdown]
# Now the archives. Besides its stars and its catalogue an archive has a few files at its root, and their names are known too: nobody else may use them.
# `survey` is what the original lab fetched, `mock` a made-up twin of it, `clusters` the real stars that come with this package. `milkyway` is the survey of
# today, SDSS-V, and `sdssv` the real stars of this package in its files.

# %%
#| exporti
ARCHIVE_FILE = "archive.json"  # at the root of an archive that we wrote
SUMS_FILE = "sha256sums.txt"  # at the root of what was fetched: a line for each file
TRUTH_FILE = "truth.fits"  # next to it, what only its writer knows
MYSTERY_FILE = "mystery_spec_wiped.fits"  # a star without a name


@dataclass(frozen=True)
class Archive:
    """What differs from archive to archive; `archive.json` at a root names the record.

    Parameters
    ----------
    name, title : str
        How it is called, and in words.
    release : str
        Whose tree it follows, a key of `RELEASES`.
    labels, fields : tuple of str
        Labels and folders that are taken by default.
    cuts : tuple of Cut
        What a star must pass.
    products : tuple of str
        Its kinds of files, the default first.
    files : tuple of str
        Further files that may stand at its root.
    """

    name: str
    title: str
    release: str
    labels: tuple
    fields: tuple
    cuts: tuple
    products: tuple = ("apstar", "aspcapstar")
    files: tuple = (MYSTERY_FILE, TRUTH_FILE)

    @property
    def rules(self) -> Release:
        "The path rules of its release."
        return RELEASES[self.release]


# %%
#| export
_SNR = Cut("signal-to-noise", "SNR", low=50, reason="too noisy to train on")
_FOUR_FIELDS = dict(
    release="dr14",
    labels=("TEFF", "LOGG", "FE_H", "MG_FE", "SI_FE"),
    fields=("4230", "4262", "5162", "4241"),
    cuts=(_SNR, Cut("metal-poor", "FE_H", low=-1, reason="few stars, weak lines")),
)
_CLUSTERS = dict(
    release="dr14",
    labels=("TEFF", "LOGG", "M_H", "ALPHA_M", "C_M", "N_M"),
    fields=(
        *("4105", "4128", "4147", "4148", "4160", "4161", "4162", "4200", "4201", "4202"),
        *("4217", "4230", "4259", "4260", "4261", "4262", "4263", "4264", "4418"),
    ),
    cuts=(_SNR, Cut("dwarf", "LOGG", high=3.8, reason="the model is one of giants")),
)
_BAD_LABELS = Cut("bad labels", "FLAG_BAD", high=0.5, reason="the survey calls its labels bad")
_TITLES = {
    "survey": "SDSS data release 14, four fields of the original lab",
    "mock": "synthetic stars with known truth, in four fields of the original lab",
    "clusters": "553 real stars of 18 star clusters and the Pleiades (SDSS DR10)",
    "milkyway": "SDSS-V data release 19, Milky Way Mapper",
    "sdssv": "553 real stars of SDSS DR10, in the files of SDSS-V",
}
_NUMBERED = dict(release="dr19", fields=(), products=("mwmstar", "mwmvisit"))
ARCHIVES = {
    "survey": Archive("survey", _TITLES["survey"], **_FOUR_FIELDS),
    "mock": Archive("mock", _TITLES["mock"], **_FOUR_FIELDS),
    "clusters": Archive("clusters", _TITLES["clusters"], **_CLUSTERS),
    "milkyway": Archive(
        "milkyway",
        _TITLES["milkyway"],
        **_NUMBERED,
        labels=("TEFF", "LOGG", "FE_H", "MG_FE", "SI_FE"),
        cuts=(_SNR, _BAD_LABELS),
    ),
    "sdssv": Archive(
        "sdssv",
        _TITLES["sdssv"],
        **_NUMBERED,
        labels=_CLUSTERS["labels"],
        cuts=(*_CLUSTERS["cuts"], _BAD_LABELS),
        files=(),
    ),
}

# %%
Table(
    rows=[
        (a.name, a.release, ", ".join(a.labels), len(a.fields), "; ".join(map(str, a.cuts)))
        for a in ARCHIVES.values()
    ],
    names=["archive", "tree of", "labels", "fields", "cuts"],
)


# %% [markdown]
# Which archive a notebook or a test works on is asked in one place. The variable `STELLAR_LAB_ARCHIVE` names a root; without it, it is the archive of
# real stars that `make` writes. A root that says nothing about itself is the survey's DR14.

# %%
#| export
def archive_record(root) -> Archive:
    """Which archive stands at a root.

    Parameters
    ----------
    root : path
        A folder.

    Returns
    -------
    Archive
        The record that its `archive.json` names. Where there is no such file, the survey's; that of
        SDSS-V if the root holds the tree of its release alone.

    Raises
    ------
    LabError
        If the file names no archive, or one that this version does not know.
    """
    file = Path(root) / ARCHIVE_FILE
    if not file.exists():
        trees = {rules.allstar.split("/")[0]: rules.numbered for rules in RELEASES.values()}
        there = [numbered for tree, numbered in trees.items() if (Path(root) / tree).is_dir()]
        return ARCHIVES["milkyway" if there == [True] else "survey"]
    try:
        if what_stands_at(file):
            raise WrongFile(f"it is {what_stands_at(file)}, not a file")
        name = json.loads(file.read_text(encoding="utf-8"))["archive"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LabError(
            f"{file} does not name an archive ({said_of(error)}): write the archive again, "
            "or remove the file if this is the survey"
        ) from error
    if name not in [*ARCHIVES]:  # a list: what stands there may not be a name at all
        raise LabError(
            f"{file} names the archive {name!r}, which this version does not know: "
            f"choose from {', '.join(ARCHIVES)}"
        )
    return ARCHIVES[name]


# %%
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / ARCHIVE_FILE).write_text('{"archive": "mock"}')
    print(archive_record(folder).title)
    (Path(folder) / ARCHIVE_FILE).write_text('{"archive": "andromeda"}')
    with pytest.raises(LabError, match="names the archive 'andromeda'"):
        archive_record(folder)


# %% [markdown]
# An archive may also know the checksums of its files. So a file that was changed on the way is found out, long after it came.

# %%
#| exporti
def archive_sums(root) -> dict:
    """The checksums that an archive has of its files.

    Parameters
    ----------
    root : path
        Of an archive.

    Returns
    -------
    dict
        Path below the root -> sha256: of `archive.json`, and of what a fetch noted of the files
        that came (`sha256sums.txt`); empty where neither is there.
    """
    sums = _fetched_sums(Path(root) / SUMS_FILE)
    file = Path(root) / ARCHIVE_FILE
    if not file.is_file():
        return sums
    archive_record(root)  # it may be damaged
    of_archive = json.loads(file.read_text(encoding="utf-8")).get("sha256", {})
    is_whole = isinstance(of_archive, dict)
    if not is_whole or not all(isinstance(value, str) for value in of_archive.values()):
        raise LabError(f"{file} is damaged (its checksums are none): write the archive again")
    return sums | of_archive


_SUM = re.compile(r"([0-9a-f]{64})  (.+)")  # as sha256sum writes it


def _fetched_sums(file):
    "Path -> sha256 of the files that were fetched; the last line for a path counts."
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:  # nothing there, or nothing that can be read
        return {}
    found = (_SUM.fullmatch(line) for line in lines[:-1])  # a line without its end is none
    return {match[2]: match[1] for match in found if match}


def known_sums(paths) -> list:
    """The checksum of each file, as the archive around it knows it.

    Parameters
    ----------
    paths : sequence of path
        Files anywhere.

    Returns
    -------
    list of str
        The sha256 of each file, "" where nobody knows it.
    """
    roots = {}  # folder -> the root above it and its sums

    def root_of(folder):
        if folder not in roots:
            marked = (folder / ARCHIVE_FILE).is_file() or (folder / SUMS_FILE).is_file()
            top = folder == folder.parent
            roots[folder] = (folder, _sums_or_none(folder)) if marked else None
            if not roots[folder] and not top:
                roots[folder] = root_of(folder.parent)
        return roots[folder]

    found = []
    for path in paths:
        path = Path(os.path.abspath(path))
        above = root_of(path.parent)
        found.append(above[1].get(path.relative_to(above[0]).as_posix(), "") if above else "")
    return found


def _sums_or_none(root):
    "The checksums of an archive; none where its record is damaged, or that of something else."
    try:
        return archive_sums(root)
    except LabError:
        return {}


# %%
with tempfile.TemporaryDirectory() as root:
    assert archive_record(root).name == "survey"
    (Path(root) / "dr19").mkdir()
    assert archive_record(root).name == "milkyway"
    (Path(root) / ARCHIVE_FILE).write_text('{"archive": "clusters", "sha256": {"a.fits": "0f"}}')
    assert archive_record(root).labels[2] == "M_H" and archive_sums(root) == {"a.fits": "0f"}
    (Path(root) / ARCHIVE_FILE).write_text('{"archive": "atlantis"}')
    with pytest.raises(LabError, match="'atlantis'.*choose from survey, mock, clusters") as refusal:
        archive_record(root)
print(str(refusal.value).replace(root, "…"))


# %% [markdown]
# Three variables of the environment are read, and only here.

# %%
#| export
def archive_root() -> Path:
    "Root of the archive at hand: `STELLAR_LAB_ARCHIVE`, else the project's own of clusters."
    root = os.environ.get("STELLAR_LAB_ARCHIVE")
    shipped = Path(__file__).resolve().parents[1] / "data" / "archives" / "clusters"
    root = Path(root) if root else shipped
    if not root.is_dir():
        raise LabError(
            f"there is no archive at {root}: run 'make archive', or "
            f"'stellar-lab archive clusters {root}', or let STELLAR_LAB_ARCHIVE name a folder"
        )
    return root


def real_data() -> Path | None:
    "The optional folder of raw survey files that `STELLAR_LAB_REAL_DATA` names, or None."
    folder = os.environ.get("STELLAR_LAB_REAL_DATA")
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise LabError(
            f"STELLAR_LAB_REAL_DATA names {folder}, which is not a folder: "
            "mend the variable or unset it"
        )
    return Path(folder)


def profile() -> str:
    "`quick` (minutes) or `full` (every number of this book), from `STELLAR_LAB_PROFILE`."
    name = os.environ.get("STELLAR_LAB_PROFILE", "quick")
    if name not in ("quick", "full"):
        raise LabError(f"STELLAR_LAB_PROFILE is {name!r}: choose quick or full")
    return name


# %%
with patch.dict(os.environ, STELLAR_LAB_PROFILE="slow", STELLAR_LAB_REAL_DATA="/nowhere"):
    for ask in (profile, real_data):
        with pytest.raises(LabError) as refusal:
            ask()
        print(refusal.value)


# %% [markdown]
# An archive that was written here brings a truth table: what the writer alone knows. For synthetic stars that is every label, and the trend that was
# planted in the catalogue, so that "wrong" can be told from "different".

# %%
#| export
def read_truth(root, apogee_ids=None) -> Table | None:
    """What only the writer of an archive knows of its stars.

    Parameters
    ----------
    root : path
        Of an archive.
    apogee_ids : sequence of str, optional
        (N,) which stars, in this order ("mystery" for the nameless one). All by default.

    Returns
    -------
    Table or None
        One row per star. None where the archive has no truth table, as the survey has none.

    Raises
    ------
    LabError
        For a star that the table does not list.
    """
    file = Path(root) / TRUTH_FILE
    if not file.is_file():
        return None
    table = Table.read(file)
    table.convert_bytestring_to_unicode()
    if apogee_ids is None:
        return table
    place = {str(name): row for row, name in enumerate(table["APOGEE_ID"])}
    strangers = [str(name) for name in apogee_ids if str(name) not in place]
    if strangers:
        raise LabError(
            f"{file} does not list {strangers[0]}, nor {len(strangers) - 1} more: "
            "is it the truth table of another archive?"
        )
    return table[[place[str(name)] for name in apogee_ids]]


def true_labels(root, apogee_ids, names) -> tuple | None:
    """The true labels of stars, and what the catalogue was made to be off.

    Parameters
    ----------
    root, apogee_ids
        As for `read_truth`.
    names : sequence of str
        K names of labels.

    Returns
    -------
    tuple of ndarray or None
        Labels (N, K) and trends of the catalogue (N, K), in physical units. None where nobody knows
        them: stars that were observed, not made.
    """
    truth = read_truth(root, apogee_ids)
    if truth is None or not all(f"{name}_TREND" in truth.colnames for name in names):
        return None
    labels = [np.asarray(truth[name], float) for name in names]
    trends = [np.asarray(truth[f"{name}_TREND"], float) for name in names]
    return np.column_stack(labels), np.column_stack(trends)


# %%
made = Table(
    {
        "APOGEE_ID": ["a", "b", "mystery"],
        "TEFF": [4000.0, 4500.0, 5000.0],
        "TEFF_TREND": [9.0, 0.0, -9.0],
    }
)
with tempfile.TemporaryDirectory() as root:
    assert read_truth(root) is None and true_labels(root, ["a"], ["TEFF"]) is None
    made.write(Path(root) / TRUTH_FILE)
    assert read_truth(root, ["b"])["TEFF"][0] == 4500
    labels, trend = true_labels(root, ["mystery", "a"], ["TEFF"])
    assert labels.tolist() == [[5000], [4000]] and trend.tolist() == [[-9], [9]]
    assert true_labels(root, ["a"], ["TEFF", "LOGG"]) is None
    with pytest.raises(LabError, match="does not list c, nor 1 more"):
        read_truth(root, ["a", "c", "d"])
labels


# %% [markdown]
# ## Files that the package brings
# The package's data are opened through `importlib.resources`, so a clone, an editable install and a wheel find the same ones.

# %%
#| exporti
def data_file(name: str):
    """A file that the package brings.

    Parameters
    ----------
    name : str
        Of a file in the package's data folder.

    Returns
    -------
    context manager
        Gives the path of the file.

    Raises
    ------
    LabError
        If the installation lacks it.
    """
    file = files("stellar_lab.data") / name
    if not file.is_file():
        raise LabError(
            f"the installed package lacks its data file {name}: install stellar_lab again"
        )
    return as_file(file)


# %%
with data_file("continuum_pixels.npy") as path:
    assert np.load(path).shape == wavelength.shape
with pytest.raises(LabError, match="lacks its data file lost.fits") as refusal:
    data_file("lost.fits")
print(refusal.value)


# %% [markdown]
# ## Nothing of the user's is lost
# Before anything is written we look at what stands there: a link, a read-only file or a pipe is not replaced. And a checksum tells one content of a
# file from another.

# %%
#| exporti
def sha256_of(path) -> str:
    """The checksum of a file.

    Parameters
    ----------
    path : path
        A file.

    Returns
    -------
    str
        Its sha256, in hexadecimal digits.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_target(path):
    "LabError if a file cannot or should not be written at a path."
    if path.is_symlink():
        raise LabError(
            f"{path} is a symbolic link to {os.readlink(path)}: name the file itself, "
            "or remove the link"
        )
    other = what_stands_at(path)
    if other:
        raise LabError(f"{path} is {other}, not a file: give another name for the output")
    if not path.exists():
        return
    if not (path.stat().st_mode & 0o222 and os.access(path, os.W_OK)):
        raise LabError(
            f"{path} is read-only: give another name for the output, or allow writing to it "
            "(chmod u+w)"
        )


# %%
with tempfile.TemporaryDirectory() as folder:
    kept = Path(folder) / "labels.fits"
    kept.touch(mode=0o444)
    link = Path(folder) / "link.fits"
    link.symlink_to(kept)
    for path in (kept, link, Path(folder)):
        with pytest.raises(LabError) as refusal:
            _check_target(path)
        print(str(refusal.value).replace(folder, "…"))


# %% [markdown]
# Two kinds of names are never an output's: the file that was just read, under whatever name, and the names that an archive keeps for its own files. A
# command that takes an output asks `safe_output` first, before it computes for an hour.

# %%
#| exporti
def safe_output(path, inputs=(), marks=()) -> Path:
    """Check that writing a file would replace nothing of the user's.

    Parameters
    ----------
    path : path
        The output.
    inputs : iterable of path
        Files that are read: spectra, models, catalogues. Those that do not exist do not count.
    marks : sequence of bytes, optional
        What each file of the kind that is written holds, in small letters (capital ones count as
        such): a file without it is somebody else's.

    Returns
    -------
    Path
        The same path.

    Raises
    ------
    LabError
        If the output is one of the inputs (under any name), bears a name that an archive keeps for
        its own files, is a link, read-only or no file, or is a file of another kind.
    """
    path = Path(path)
    _check_target(path)
    here = _identity(path)
    if here is not None and here in map(_identity, inputs):
        raise LabError(f"{path} is one of the inputs: give another name for the output")
    in_archive = any((folder / ARCHIVE_FILE).is_file() for folder in path.absolute().parents)
    if (path.exists() or in_archive) and _is_survey_name(path.name):
        raise LabError(
            f"{path} is the name of an archive's own file: give another name for the output"
        )
    _check_marks(path, marks)
    return path


def _check_marks(path, marks):
    "LabError if a file that is not empty lacks what files of ours hold."
    if not marks or not path.exists() or not path.stat().st_size:
        return
    content = path.read_bytes().lower()
    if not all(mark in content for mark in marks):
        raise LabError(
            f"{path} is a file of another kind than what would be written: give another name for "
            "the output, or remove that file"
        )


def _identity(path):
    "What two names of the same file have in common; None where there is no file."
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _is_survey_name(name):
    "Whether an archive's catalogue, star or other file is called so."
    plain = name.removesuffix(".gz")
    known = {ARCHIVE_FILE, TRUTH_FILE, MYSTERY_FILE}
    for release in RELEASES.values():
        known |= {PurePosixPath(path).name for path in release.templates("allstar")}
    stars = (
        rules.parse_name(product, plain) for rules in RELEASES.values() for product in rules.paths
    )
    return plain in known or any(stars)


# %%
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "star.fits").touch()
    (Path(folder) / ARCHIVE_FILE).touch()
    for name in ("star.fits", "archive.json", "truth.fits"):
        with pytest.raises(LabError) as refusal:
            safe_output(Path(folder) / name, inputs=[Path(folder) / "star.fits"])
        print(str(refusal.value).replace(folder, "…"))
    assert safe_output(Path(folder) / "labels.fits").name == "labels.fits"
    (Path(folder) / "notes.csv").write_text("my only copy")
    with pytest.raises(LabError, match="a file of another kind"):
        safe_output(Path(folder) / "notes.csv", marks=[b"apogee_id"])


# %% [markdown]
# ## Writing without leaving halves behind
# A run can be stopped at any moment, and a file that is half there is worse than none. So every file is written under a temporary name next to its place
# and renamed when it is whole: the rename is atomic. The temporary name holds the number of the process. What a run that was killed has left behind is
# recognized by it, and removed by the next run that writes the same file.

# %%
#| exporti
def own_temporary(path) -> Path:
    """The temporary name of a file or folder that this process writes.

    Parameters
    ----------
    path : path
        Where it will stand.

    Returns
    -------
    Path
        In the same folder, with the same extension.
    """
    path = Path(path)
    return path.with_name(f".{os.getpid()}.{path.name}")


def remove_strays(path):
    """Remove what runs that ended too early have left of a file or folder.

    Parameters
    ----------
    path : path
        Where it should have stood.
    """
    path = Path(path)
    stray = re.compile(rf"(?:\.(\d+)\.)+{re.escape(path.name)}")  # a writer may have its own
    with suppress(OSError):
        for name in os.listdir(path.parent):
            match = stray.fullmatch(name)
            if match and not _runs(int(match[1])):
                left = path.with_name(name)
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)


def _runs(process):
    "Whether a process of this number runs; True where the system does not say."
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


# %%
ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True)
with tempfile.TemporaryDirectory() as folder:
    target = Path(folder) / "labels.ecsv"
    own_temporary(target).touch()
    (Path(folder) / f".{int(ended.stdout)}.labels.ecsv").touch()
    remove_strays(target)
    assert [file.name for file in Path(folder).iterdir()] == [own_temporary(target).name]

# %% [markdown]
# What goes wrong while writing is said in words: which file, what is wrong, and a way out.

# %%
#| exporti
_DISK_TROUBLE = {
    errno.ENOSPC: "the disk is full: free some space, or choose another place",
    errno.EDQUOT: "the quota is used up: free some space, or choose another place",
    errno.EROFS: "the disk is read-only: choose another place",
    errno.EACCES: "permission denied: choose another place, or change the permissions",
    errno.EPERM: "permission denied: choose another place, or change the permissions",
    errno.EFBIG: "the file would be too large for this disk: choose another place",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.ENOTDIR: "what should be its folder is none: choose another place",
    errno.EIO: "the disk reports a fault: choose another one",
}


@contextmanager
def trouble_in_words(path):
    """What a disk can answer becomes a LabError that names the file and a way out.

    Parameters
    ----------
    path : path
        What is written in the block.

    Raises
    ------
    LabError
        Where the disk is full, read-only, out of order, or the path cannot be one.
    """
    try:
        yield
    except LabError:
        raise
    except (OSError, RuntimeError) as error:
        number = getattr(error, "errno", None)
        quoted = re.search(r"\[Errno (\d+)\]", str(error))  # of a library that wraps it
        if quoted:
            number = int(quoted[1])
        if re.search("space on disk|No space left", str(error)):  # of astropy and of HDF5
            number = errno.ENOSPC
        if number not in _DISK_TROUBLE:
            raise
        target = Path(path)
        target = target.with_name(re.sub(r"^(\.\d+\.)+", "", target.name))  # its final name
        raise LabError(f"cannot write {target}: {_DISK_TROUBLE[number]}") from error


# %%
with pytest.raises(LabError) as refusal, trouble_in_words("labels.fits"):
    raise OSError(errno.EROFS, "Read-only file system")
print(refusal.value)


# %%
#| exporti
@contextmanager
def atomic_path(path):
    """A temporary path to write to, in the folder of `path`.

    It becomes `path` when the block ends well and vanishes when it does not.

    Parameters
    ----------
    path : path
        Where the file will stand. Folders are made.

    Yields
    ------
    Path
        The temporary path, with the same extension, by which writers choose the format.

    Raises
    ------
    LabError
        If a link, a read-only file or something that is no file stands there, or the disk is full,
        read-only or out of order.
    """
    path = Path(path)
    with trouble_in_words(path):
        _check_target(path)
        with suppress(FileExistsError):  # a file in place of a folder is said below
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder")
        remove_strays(path)
        temporary = own_temporary(path)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


# %%
with tempfile.TemporaryDirectory() as folder:
    for problem in (OSError(errno.ENOSPC, "No space"), OSError("Not enough space on disk: 9")):
        with pytest.raises(LabError) as refusal, atomic_path(Path(folder) / "labels.fits"):
            raise problem
        print(str(refusal.value).replace(folder, "…"))
    assert not list(Path(folder).iterdir())

# %%
#| exporti
TABLE_FORMATS = {".fits": "fits", ".ecsv": "ascii.ecsv", ".parquet": "parquet"}


# %%
#| export
def write_table(table: Table, path):
    """Write a table whole or not at all.

    Parameters
    ----------
    table : Table
        What to write.
    path : path
        Its extension, `.fits`, `.ecsv` or `.parquet`, names the format.

    Raises
    ------
    LabError
        For another extension, or if Parquet is asked for without pyarrow.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in TABLE_FORMATS:
        known = ", ".join(TABLE_FORMATS)
        raise LabError(f"cannot write {path}: the extension must be one of {known}")
    if suffix == ".parquet":
        require("pyarrow", "parquet")
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # dex: FITS has no such unit, and astropy keeps it another way
        warnings.filterwarnings("ignore", message=".*could not be saved in native FITS format")
        plain_text(table, suffix).write(temporary, format=TABLE_FORMATS[suffix], overwrite=True)


# %%
#| exporti
def plain_text(table, suffix):
    """The table with texts that its format can hold.

    FITS takes ASCII alone: other letters become the bytes of their UTF-8. A name of a file may hold
    bytes that are no letters at all; outside FITS these are spelled out.

    Parameters
    ----------
    table : Table
    suffix : str
        Of the file that it goes to.

    Returns
    -------
    Table
        The same table where there is nothing to change, else a copy that shares its numbers.
    """
    texts = [name for name in table.colnames if np.asarray(table[name]).dtype.kind == "U"]
    texts = [name for name in texts if not all(map(str.isascii, map(str, table[name])))]
    table = table.copy(copy_data=False) if texts else table
    for name in texts:
        values = np.asarray(table[name]).tolist()
        data = [value.encode("utf-8", "surrogateescape") for value in values]
        if suffix != ".fits":
            data = [text.decode("utf-8", "backslashreplace") for text in data]
        table[name] = data
    return table


# %% [markdown]
# A table is written; then another file under the same name is begun and fails.

# %%
with tempfile.TemporaryDirectory() as folder:
    target = Path(folder) / "labels.ecsv"
    write_table(QTable({"teff": [4700, 4800] * u.K}), target)
    write_table(QTable({"logg": [2.5] * u.dex}), Path(folder) / "dex.fits")  # no warning
    assert QTable.read(Path(folder) / "dex.fits")["logg"].unit == u.dex
    (Path(folder) / "dex.fits").unlink()
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("half a")
        raise ZeroDivisionError
    left = [file.name for file in Path(folder).iterdir()]
    assert left == ["labels.ecsv"]  # no trace of the failure
    assert QTable.read(target)["teff"].unit == u.K  # and the old file is whole
    with pytest.raises(LabError, match="extension must be one of .fits, .ecsv, .parquet"):
        write_table(QTable(), Path(folder) / "labels.doc")
left

# %% [markdown]
# Letters beyond ASCII come back from all formats.

# %%
with tempfile.TemporaryDirectory() as folder:
    for suffix in (".fits", ".ecsv"):
        target = Path(folder) / f"names{suffix}"
        write_table(Table({"name": ["étoile", "星"]}), target)
        back = Table.read(target)
        back.convert_bytestring_to_unicode()
        assert list(back["name"]) == ["étoile", "星"]


# %% [markdown]
# ## Workers that end with their parent
# A few chapters share their work among processes. When the parent is killed, its workers must not wait for it for ever. So each of them watches its
# parent in a thread of its own: between the two is a pipe that closes when the parent ends, however that happens.

# %%
#| exporti
def end_with_parent():
    """Let this worker process end when its parent does: the `initializer` of a pool.

    Examples
    --------
    >>> from concurrent.futures import ProcessPoolExecutor
    >>> with ProcessPoolExecutor(2, initializer=end_with_parent) as pool:
    ...     list(pool.map(abs, [-1, -2]))
    [1, 2]
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent):
    "Wait for the end of the parent, then end at once."
    parent.join()
    os._exit(1)


# %% [markdown]
# A program with two workers that sleep is killed while they do. A moment later nobody of them is left.

# %%
program = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from stellar_lab.survey import end_with_parent
if __name__ == "__main__":
    with ProcessPoolExecutor(2, initializer=end_with_parent) as pool:
        print(*{pool.submit(os.getpid).result() for _ in range(9)}, flush=True)
        list(pool.map(time.sleep, [60, 60]))
"""
parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
workers = [int(number) for number in parent.stdout.readline().split()]
parent.kill()
parent.wait()
patience = time.monotonic() + 10
while any(map(_runs, workers)) and time.monotonic() < patience:
    time.sleep(0.01)
assert workers and not any(map(_runs, workers))
print(f"{len(workers)} workers ended with their parent")


# %% [markdown]
# ## `Spectra`: rows stay together
# The original lab lost track of its stars once: it cut the spectra and forgot to cut the names, and later titles named other stars. Here flux, inverse
# variance, mask and catalogue rows of the same stars live in one object. `spectra[rows]` cuts all of it, with anything that numpy takes as an index.
#
# A pixel that cannot be used has `ivar = 0`: the weight says it all, and every sum over pixels ignores it without a special case.

# %%
#| export
def _check_parts(spectra):
    "LabError unless all parts have one row per star and one column per wavelength."
    shape = (len(spectra.stars), len(spectra.wavelength))
    for name in ("flux", "ivar", "mask"):
        array = getattr(spectra, name)
        if array is not None and array.shape != shape:
            raise LabError(
                f"{name} has the shape {array.shape}, but {shape[0]} stars and "
                f"{shape[1]} wavelengths need {shape}"
            )
    if np.any(np.diff(spectra.wavelength) <= 0):
        raise LabError("wavelengths must increase from pixel to pixel")


def _as_index(rows):
    "An index that keeps the table a table, even for one star or none."
    if isinstance(rows, slice):
        return rows
    rows = np.atleast_1d(rows)
    return rows if rows.size else rows.astype(int)  # an empty list is one of floats to numpy


# %%
_as_index(1), _as_index([]), _as_index(slice(2))


# %% [markdown]
# Labels are columns of its table of stars, and there is one way to ask for them.

# %%
#| export
class _Labelled:
    "What has a table of `stars` with columns of labels and their errors."

    @property
    def label_names(self) -> tuple:
        """Names of the labels that were asked for, in the order of `LABELS`.

        They stand in `stars.meta["labels"]`; without that entry, all that the table holds.
        """
        asked = self.stars.meta.get("labels", LABELS)
        return tuple(name for name in LABELS if name in asked and name in self.stars.colnames)

    def labels(self, names=None) -> np.ndarray:
        """Label values as one array.

        Parameters
        ----------
        names : sequence of str, optional
            K label names; `label_names` by default.

        Returns
        -------
        ndarray
            (N, K) float64, physical units, NaN where there is none.

        Raises
        ------
        LabError
            If the table lacks a label.
        """
        return self._columns(names, "")

    def label_errors(self, names=None) -> np.ndarray:
        "1-sigma errors of the labels, (N, K), like `labels`."
        return self._columns(names, "_ERR")

    def _columns(self, names, suffix):
        records = label_records(self.label_names if names is None else names)
        columns = [label.name + suffix for label in records]
        missing = [column for column in columns if column not in self.stars.colnames]
        if missing:
            known = ", ".join(self.stars.colnames)
            raise LabError(f"the stars have no column {', '.join(missing)}: there are {known}")
        values = [np.ma.asarray(self.stars[column], dtype=float) for column in columns]
        filled = [np.ma.filled(value, np.nan) for value in values]
        return np.column_stack(filled) if filled else np.empty((len(self.stars), 0))


# %%
class Toy(_Labelled):
    "Stars without spectra."

    stars = Table({"TEFF": [4000.0, 4500.0], "FE_H": [0.1, np.nan]})


Toy().label_names, Toy().labels()


# %% [markdown]
# The object itself only keeps its parts in step.

# %%
#| export
@dataclass
class Spectra(_Labelled):
    """Spectra of N stars on P pixels, and all that belongs to the same stars.

    Parameters
    ----------
    wavelength : ndarray
        (P,) float64, increasing [Angstrom, vacuum].
    flux : ndarray
        (N, P) float32.
    ivar : ndarray
        (N, P) float32, inverse variance of the flux; 0 marks an unusable pixel.
    stars : Table
        N rows. The readers give APOGEE_ID, TELESCOPE, FIELD, LOCATION_ID, SNR, NVISITS, J, H, K
        [mag], RA, DEC [degree, J2000] and FILE, each empty or NaN where the header does not say it;
        STRANGE_PIXELS (how many were taken out) and VERIFIED (by a checksum); from the catalogue
        labels and `_ERR` columns in physical units, NaN where there is none.
        Its `meta` says what the flux is: `product`, `release`, `archive`, `normalized`, `row`.
    mask : ndarray, optional
        (N, P) integer APOGEE_PIXMASK bits; None where the product has none.

    Raises
    ------
    LabError
        If shapes do not fit, or wavelengths do not increase.

    Examples
    --------
    >>> stars = Table({"APOGEE_ID": ["one", "two"], "TEFF": [4000.0, 4500.0]})
    >>> spectra = Spectra(np.array([15200.0, 15201.0]), np.ones((2, 2)), np.ones((2, 2)), stars)
    >>> spectra
    <Spectra: 2 stars, 2 pixels from 15200.0 to 15201.0 Å, 100.0% of the pixels usable>
    >>> hot = spectra[spectra.labels(["TEFF"])[:, 0] > 4200]
    >>> hot.stars["APOGEE_ID"][0], hot.flux.shape
    (np.str_('two'), (1, 2))
    """

    wavelength: np.ndarray
    flux: np.ndarray
    ivar: np.ndarray
    stars: Table
    mask: np.ndarray | None = None

    def __post_init__(self):
        _check_parts(self)

    def __len__(self):
        return len(self.stars)

    def __getitem__(self, rows) -> "Spectra":
        rows = _as_index(rows)
        mask = None if self.mask is None else self.mask[rows]
        return Spectra(self.wavelength, self.flux[rows], self.ivar[rows], self.stars[rows], mask)

    def __repr__(self):
        grid = f"{len(self.wavelength)} pixels from {self.wavelength[0]:.1f} to "
        good = f"{np.mean(self.ivar > 0):.1%} of the pixels usable" if self.ivar.size else "empty"
        return f"<Spectra: {len(self)} stars, {grid}{self.wavelength[-1]:.1f} Å, {good}>"

    @classmethod
    def from_arrays(cls, wavelength, flux, error=None, ivar=None, **options) -> "Spectra":
        """A star of your own, from arrays on any grid: `stellar_lab.spectrum.from_arrays`.

        Parameters
        ----------
        wavelength, flux, error, ivar : (P,) arrays
            Angstrom, nm or micron, in any order; one of error (1 sigma) and inverse variance
        **options
            such as ``velocity``, ``resolution``, ``air`` and ``unit``

        Returns
        -------
        Spectra

        Raises
        ------
        LabError
            where arrays do not fit, or nothing of it lies between 15,150 and 17,000 Angstrom
        """
        made = import_module("stellar_lab.spectrum")  # a room further up, asked for when needed
        return made.from_arrays(wavelength, flux, error, ivar, **options)

    def replace(self, **changes) -> "Spectra":
        "A copy with some parts exchanged; the other parts are shared, not copied."
        return replace(self, **changes)


# %%
stars = Table(
    {
        "APOGEE_ID": ["one", "two", "three"],
        "TEFF": [4000.0, 4500.0, np.nan] * u.K,
        "TEFF_ERR": [50.0, 60, 70] * u.K,
    }
)
spectra = Spectra(np.array([15200.0, 15201.0]), np.ones((3, 2), "f4"), np.ones((3, 2), "f4"), stars)
spectra

# %%
hot = spectra[spectra.labels(["TEFF"])[:, 0] > 4200]
assert list(hot.stars["APOGEE_ID"]) == ["two"] and hot.flux.shape == (1, 2)
assert len(spectra[[]]) == 0
for one in (1, slice(-2, -1), [True, False, False]):
    assert len(spectra[one]) == 1  # a single star is still a table
hot.stars.meta["labels"] = ()  # a temperature that only a cut needs is not a label of this run
assert spectra.label_names == ("TEFF",) and hot.label_names == ()
with pytest.raises(LabError, match=r"flux has the shape \(2, 2\), but 3 stars and 2 wavelengths"):
    spectra.replace(flux=np.ones((2, 2), "f4"))
with pytest.raises(LabError, match="no column LOGG: there are APOGEE_ID, TEFF, TEFF_ERR"):
    spectra.labels(["LOGG"])
hot

# %% [markdown]
# ## One style for all pictures
# Seaborn's colour-blind palette, thin lines, units on every axis. `plot_spectrum` draws a star as the original lab did: flux on the left axis, its error
# in grey on a second one, no line across the gaps between the chips. (The plotting libraries are imported when something is drawn: who only reads
# spectra need not wait for them.)

# %%
#| export
_STYLE = {
    "lines.linewidth": 0.9,
    "figure.constrained_layout.use": True,
    "figure.dpi": 80,
    "savefig.dpi": 80,
    "axes.grid": False,
}

# %%
#| exporti
_CHIP_PALETTE = ("#0173b2", "#029e73", "#d55e00")  # of seaborn's colour-blind palette
CHIP_COLORS = dict(zip(CHIPS, _CHIP_PALETTE, strict=True))


# %%
#| export
def _for_reading(table):
    "A table with six digits a number where nobody asked for another format; the numbers stay."
    table = table.copy(copy_data=False)
    for column in table.itercols():
        if getattr(column, "dtype", np.dtype(bool)).kind == "f" and not column.info.format:
            column.info.format = ".6g"
    return table


def use_style():
    "Set the style of this book's figures and tables for the session."
    import seaborn

    seaborn.set_theme(
        context="notebook", style="ticks", palette="colorblind", font_scale=0.9, rc=_STYLE
    )
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
        forms = shell.display_formatter.formatters
        forms["text/html"].for_type(Table, lambda table: _for_reading(table)._repr_html_())
        forms["text/plain"].for_type(
            Table, lambda table, page, _: page.text(repr(_for_reading(table)))
        )


# %%
use_style()
CHIP_COLORS

# %% [markdown]
# A table in a notebook shows six digits of a number. The number itself stays whole.

# %%
third = QTable({"third": [1 / 3], "in kelvin": [1e4 / 3] * u.K, "stars": [3]})
assert third["third"].info.format is None and third["third"][0] == 1 / 3
assert "0.333333" in repr(_for_reading(third)) and "0.3333333" not in repr(_for_reading(third))
third


# %%
#| export
def broken_at_gaps(grid, values, shown):
    """The `shown` pixels of a spectrum, with a NaN in each gap between chips, which breaks a line.

    Parameters
    ----------
    grid, values : ndarray
        (P,) wavelengths of the whole spectrum [Angstrom], and what to draw there
    shown : ndarray of bool
        (P,) pixels to draw

    Returns
    -------
    tuple of two ndarray
        wavelengths and values, both with the NaNs
    """
    steps = np.diff(np.log10(grid))
    usual = max(np.median(steps), LOG10_STEP) if len(steps) else LOG10_STEP
    gaps = np.flatnonzero(np.diff(np.log10(grid[shown])) > 1.5 * usual) + 1
    x = np.insert(grid[shown].astype(float), gaps, np.nan)
    return x, np.insert(values[shown].astype(float), gaps, np.nan)


def plot_spectrum(grid, flux, ivar=None, window=None, error=False, ax=None, title=None, **line):
    """Draw one spectrum.

    Parameters
    ----------
    grid, flux : ndarray
        (P,) wavelengths [Angstrom] and flux.
    ivar : ndarray, optional
        (P,) inverse variance; pixels of weight 0 leave a gap.
    window : tuple of float, optional
        Lowest and highest wavelength to show [Angstrom].
    error : bool, default False
        Draw the 1-sigma error on a second axis.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    title : str, optional
        Of the figure.
    **line
        For `Axes.plot`.

    Returns
    -------
    matplotlib Axes
    """
    import matplotlib.pyplot as plt

    ax = plt.subplots(figsize=(9, 2.5))[1] if ax is None else ax
    low, high = (-np.inf, np.inf) if window is None else window
    shown = (grid >= low) & (grid <= high)
    good = np.ones(len(grid), bool) if ivar is None else np.asarray(ivar) > 0
    flux = np.where(good, flux, np.nan)
    ax.plot(*broken_at_gaps(grid, flux, shown), **({"color": "C0", "lw": 0.7} | line))
    if error and ivar is not None:
        with np.errstate(divide="ignore"):
            sigma = np.where(good, 1 / np.sqrt(np.asarray(ivar, float)), np.nan)
        _error_axis(ax, *broken_at_gaps(grid, sigma, shown))
    ax.set(xlabel="vacuum wavelength [Å]", ylabel="flux", title=title)
    ax.margins(x=0.01)
    return ax


def _error_axis(ax, x, sigma):
    "The error in grey behind the flux, on an axis of its own."
    second = ax.twinx()
    second.plot(x, sigma, color="0.6", lw=0.5)
    second.set_ylabel("error", color="0.5")
    second.set_ylim(bottom=0)
    ax.set_zorder(second.get_zorder() + 1)
    ax.patch.set_visible(False)


# %% [markdown]
# The star of the beginning once more, closer and with its error.

# %%
ax = plot_spectrum(
    star.wavelength,
    star.flux[0],
    star.ivar[0],
    window=(16_650, 16_800),
    error=True,
    title="aluminium",
)
ax.set(ylabel="flux / continuum")
for air in (16718.957, 16750.564, 16763.360):
    ax.axvline(air_to_vacuum(air), color="C3", lw=0.6, ls="--")

# %% [markdown]
# **What to see.** Three lines of aluminium (dashed) stand where their wavelengths in air, turned into vacuum, say. Without the turn they would stand at
# the wrong dips.

# %%
line = plot_spectrum(wavelength, np.ones(7214)).lines[0].get_xdata()
plt.close()
assert np.isnan(line).sum() == 2 and np.nanmax(line) == wavelength[-1]  # two gaps, three chips

# %% [markdown]
# **Exercise.** The survey's next release moves its files again. Write the record for it, and nothing else: which tests of this chapter should it pass?
