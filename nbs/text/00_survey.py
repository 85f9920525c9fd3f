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
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.resources import as_file, files
from pathlib import Path, PurePosixPath

import astropy.units as u
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from astropy.nddata.bitmask import extend_bit_flag_map
from astropy.table import QTable, Table

# %%
#| hide
import pytest
from IPython.display import Markdown


# %% [markdown]
# ## Errors that help
# What a user can get wrong (a path, a label's name, an archive that is not there) is answered by an error of our own that names the thing, says what is
# wrong and what to do. All of them are a `LabError`, so a script can catch them in one place, and the command line prints them without a traceback.

# %%
#| export
class LabError(ValueError):
    "Something the user can mend: the message names what is wrong and what to do."


class MissingExtra(LabError, ImportError):
    "An optional package is not installed; the message says how to get it."


def require(package: str, extra: str):
    "Import `package`, or say which extra of stellar_lab brings it."
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingExtra(
            f"this needs the package {package!r}, which is not installed: pip install 'stellar_lab[{extra}]'"
        ) from error


# %%
with pytest.raises(MissingExtra, match=r"pip install 'stellar_lab\[network\]'"):
    require("a_package_nobody_wrote", "network")
assert require("json", "network") is json

# %% [markdown]
# ## The wavelength grid
# Every combined spectrum of the survey stands on one grid of 8,575 pixels, evenly spaced in the logarithm of the vacuum wavelength and at rest:
# $$ \log_{10}(\lambda_i/\mathrm{Å}) = 4.179 + 6\times10^{-6}\,i . $$
# Even in the logarithm means even in velocity: a Doppler shift moves all lines by the same number of pixels.

# %%
#| export
N_PIXELS = 8575
LOG10_START, LOG10_STEP = 4.179, 6e-6  # the CRVAL1 and CDELT1 of every apStar and aspcapStar file
CHIPS = {
    "blue": (322, 3241),
    "green": (3648, 6047),
    "red": (6412, 8305),
}  # inclusive pixels of the full grid that every star fills

full_wavelength = 10 ** (LOG10_START + LOG10_STEP * np.arange(N_PIXELS))  # (8575,) Angstrom, vacuum
on_band = np.concatenate(
    [np.arange(first, last + 1) for first, last in CHIPS.values()]
)  # (7214,) pixels of the full grid
wavelength = full_wavelength[on_band]  # (7214,) Angstrom, vacuum: the grid of the lab
for grid in (full_wavelength, on_band, wavelength):
    grid.flags.writeable = False

# %% [markdown]
# Three detectors catch three stretches of it. At their edges the light moves in and out with the star's velocity, so the lab keeps the *on-band* pixels
# that every star fills: 2,920 + 2,400 + 1,894 = 7,214 of the 8,575.

# %%
fig, ax = plt.subplots(figsize=(8, 1.2))
ax.axvspan(full_wavelength[0], full_wavelength[-1], color="0.9")
for name, (first, last) in CHIPS.items():
    ax.axvspan(full_wavelength[first], full_wavelength[last], color=name, alpha=0.4)
    ax.text(
        full_wavelength[(first + last) // 2],
        0.5,
        f"{name}\n{last - first + 1} pixels",
        ha="center",
        va="center",
    )
ax.set(xlabel="vacuum wavelength [Å]", yticks=[]);

# %% [markdown]
# One pixel is how many kilometres a second wide? The step says it: $c\ln(10)\times 6\times10^{-6}$.

# %%
from astropy.constants import c

pixel_width = (c * np.log(10) * LOG10_STEP).to("km/s")
assert np.allclose(
    np.diff(full_wavelength) / full_wavelength[:-1] * c.to_value("km/s"),
    pixel_width.value,
    rtol=1e-5,
)
assert len(wavelength) == 7214 and len(full_wavelength) == N_PIXELS
assert 15100 < wavelength[0] < wavelength[-1] < 17000  # the H band
pixel_width


# %% [markdown]
# Line lists and older instruments count in *air*, where light is slower and its wave shorter by a few parts in ten thousand: 4.4 Å here, twenty pixels.
# A wavelength without that word is a trap. The refractive index of standard air follows from the wavenumber $\sigma=10^4\,\mathrm{Å}/\lambda$
# ([Ciddor 1996](https://doi.org/10.1364/AO.35.001566)),
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
    35, 1566. The formula takes the wavenumber in vacuum; the one in air moves the answer by less
    than a thousandth of an Angstrom in the H band.

    Examples
    --------
    >>> float(air_to_vacuum(16718.957).round(2))  # aluminium
    16723.52
    """
    air = np.asarray(air, dtype=float)
    sigma2 = (1e4 / air) ** 2
    return air * (1 + 0.05792105 / (238.0185 - sigma2) + 0.00167917 / (57.362 - sigma2))


# %% [markdown]
# The survey has published [pairs](https://www.sdss.org/dr7/products/spectra/vacwavelength.html) for lines of galaxies, computed by another formula (Morton's);
# and APOGEE's own users give 15753.291 and 15770.150 Å for two magnesium lines that line lists have at 15748.988 and 15765.842 Å in air.

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
float(air_to_vacuum(wavelength[0]) - wavelength[0])  # how far off the first pixel would be [Å]

# %% [markdown]
# Whatever works chip by chip asks for the runs of neighbouring pixels in the grid that it was given: `chip_slices` finds the three slices of the on-band
# grid, of the full grid, or of any grid cut from them. The split points are those of the lab, in the gaps between the chips.

# %%
#| export
CHIP_SPLITS = (3450, 6200)  # full-grid pixels between the chips, where the lab cuts


def chip_slices(
    grid: np.ndarray,  # (P,) increasing wavelengths [Angstrom, vacuum]
) -> dict:  # chip name -> slice of the grid
    "The pixels of each chip as a slice of `grid`."
    edges = np.searchsorted(grid, full_wavelength[list(CHIP_SPLITS)] * (1 - LOG10_STEP))
    edges = [0, *edges, len(grid)]
    return {name: slice(int(a), int(b)) for name, a, b in zip(CHIPS, edges[:-1], edges[1:])}


# %%
assert [s.stop - s.start for s in chip_slices(wavelength).values()] == [2920, 2400, 1894]
assert [s.start for s in chip_slices(full_wavelength).values()] == [0, 3450, 6200]
assert chip_slices(wavelength)["green"] == slice(2920, 5320)

# %% [markdown]
# ## The pixel mask
# Beside flux and error the survey keeps a bitmask a pixel, [APOGEE_PIXMASK](https://www.sdss4.org/dr17/algorithms/bitmasks/): each bit names one reason
# to doubt. astropy's flag map gives the bits their names.

# %%
#| export
PIXMASK = extend_bit_flag_map(
    "PIXMASK",
    BADPIX=1 << 0,
    CRPIX=1 << 1,
    SATPIX=1 << 2,
    UNFIXABLE=1 << 3,
    BADDARK=1 << 4,
    BADFLAT=1 << 5,
    BADERR=1 << 6,
    NOSKY=1 << 7,
    LITTROW_GHOST=1 << 8,
    PERSIST_HIGH=1 << 9,
    PERSIST_MED=1 << 10,
    PERSIST_LOW=1 << 11,
    SIG_SKYLINE=1 << 12,
    SIG_TELLURIC=1 << 13,
    NOT_ENOUGH_PSF=1 << 14,
)
PIXMASK_NAMES = (
    "BADPIX",
    "CRPIX",
    "SATPIX",
    "UNFIXABLE",
    "BADDARK",
    "BADFLAT",
    "BADERR",
    "NOSKY",
    "LITTROW_GHOST",
    "PERSIST_HIGH",
    "PERSIST_MED",
    "PERSIST_LOW",
    "SIG_SKYLINE",
    "SIG_TELLURIC",
    "NOT_ENOUGH_PSF",
)  # in the order of their bits

# %%
assert [int(getattr(PIXMASK, name)) for name in PIXMASK_NAMES] == [1 << bit for bit in range(15)]

# %% [markdown]
# ## Labels
# A *label* is a number that says what kind of star it is: effective temperature, surface gravity, abundances. A `Label` knows its symbol, its unit, the
# names of its columns in the survey's allStar tables (they changed over the years: the first one that a table has counts) and the range that plots
# show.

# %%
#| export
MISSING = -9000.0  # the survey writes -9999 (or -9999.99) where it has no value; everything at or below this means "none"


@dataclass(frozen=True)
class Label:
    "One stellar label: its name here, how it is written, its unit, its columns in allStar and the range that plots show."

    name: str
    symbol: str
    unit: u.UnitBase
    plot_range: tuple | None
    columns: tuple  # names in the allStar tables, the first that exists counts
    errors: tuple  # names of the column with its 1-sigma error

    @property
    def axis(self) -> str:
        "Symbol and unit, for an axis."
        return (
            self.symbol
            if self.unit == u.dimensionless_unscaled
            else f"{self.symbol} [{self.unit:unicode}]"
        )


def _label(name, symbol, unit, plot_range, *older):
    columns = (name, *older)
    return Label(
        name, symbol, unit, plot_range, columns, tuple(f"{column}_ERR" for column in columns)
    )


LABELS = {
    label.name: label
    for label in (
        _label("TEFF", r"$T_\mathrm{eff}$", u.K, (3200, 5700)),
        _label("LOGG", r"$\log g$", u.dex, (-0.5, 4.5)),
        _label("FE_H", "[Fe/H]", u.dex, (-1.2, 0.8)),
        _label("MG_FE", "[Mg/Fe]", u.dex, (-0.4, 0.6)),
        _label("SI_FE", "[Si/Fe]", u.dex, (-0.4, 0.5)),
        _label("M_H", "[M/H]", u.dex, (-2.7, 0.7), "PARAM_M_H"),
        _label("ALPHA_M", r"[$\alpha$/M]", u.dex, (-0.5, 0.6), "PARAM_ALPHA_M"),
        _label("C_M", "[C/M]", u.dex, (-0.9, 0.7)),
        _label("N_M", "[N/M]", u.dex, (-0.6, 1.1)),
    )
}


def label_record(name: str) -> Label:
    """The `Label` of any name, in any case.

    Parameters
    ----------
    name : str
        Name of a label. A name that is not in `LABELS` is a plain number.

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
    known = LABELS.get(str(name).upper())
    if known is not None:
        return known
    name = str(name)
    return Label(name, name, u.dimensionless_unscaled, None, (name,), (f"{name}_ERR",))


def label_records(names) -> tuple:
    "The `Label` of each name, in any case; an unknown name is an error that lists the known ones."
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if str(name).upper() not in LABELS]
    if unknown:
        raise LabError(
            f"unknown label {', '.join(map(repr, unknown))}: choose from {', '.join(LABELS)}"
        )
    return tuple(LABELS[str(name).upper()] for name in names)


# %%
#| echo: false
Table(
    rows=[
        (label.name, label.unit, str(label.plot_range), ", ".join(label.columns))
        for label in LABELS.values()
    ],
    names=["label", "unit", "plot range", "columns in allStar"],
)

# %%
assert [label.name for label in label_records(["teff", "LOGG"])] == ["TEFF", "LOGG"]
with pytest.raises(LabError, match="unknown label 'TEF': choose from TEFF, LOGG"):
    label_records(["TEF"])

# %% [markdown]
# A model may be taught labels that the survey never had, such as an age. `label_record` answers for those, too: a plain number under its own name.

# %%
assert label_record("m_h") is LABELS["M_H"]
age = label_record("age")
assert (age.name, age.axis, age.unit) == ("age", "age", u.dimensionless_unscaled)

# %% [markdown]
# ## Releases: where the files are
# The survey's trees changed from release to release, but a tree is only a template. A `Release` holds one a product (`apstar`, the combined spectrum;
# `aspcapstar`, the pseudo-normalized one that the survey's own pipeline ASPCAP fitted), where the catalogue is, and how a target is called in it.
# Paths are relative to the root of an archive, `https://data.sdss.org/sas` or a folder.

# %%
#| export
# An APOGEE_ID holds a minus sign for every star south of the equator; a file of a single visit appends -<visit> to it.
APOGEE_ID = r"(?:[A-Z0-9]{2}\d{8}[+-]\d{7}|[A-Za-z][A-Za-z0-9_.+]*)"


@dataclass(frozen=True)
class Product:
    "A kind of spectrum file: what its HDUs hold. Layout: https://data.sdss.org/datamodel (apStar, aspcapStar)."

    name: str
    hdus: int  # HDUs that a whole file has at least
    flux: int = 1
    error: int = 2
    mask: int | None = None  # HDU of the bitmask, None where there is none
    normalized: bool = False  # flux is already relative to a pseudo-continuum
    max_error: float = np.inf  # a pixel with this error or a larger one is unusable


PRODUCTS = {
    product.name: product
    for product in (
        Product(
            "apstar", hdus=10, mask=3, max_error=1e10
        ),  # 1e10 is how the survey writes "no value"
        Product("aspcapstar", hdus=5, normalized=True, max_error=0.3),
    )
}


@dataclass(frozen=True)
class Release:
    "Path rules of one data release. `{field}` is a location ID up to DR14 and a name since DR16."

    name: str
    paths: dict  # product -> path template with {telescope}, {field}, {id}, {prefix}
    allstar: str  # path of the catalogue
    target_id: str  # template of TARGET_ID in the catalogue
    telescopes: tuple = ("apo25m",)
    field_column: str = "FIELD"  # the column of the catalogue that names the folder
    prefixes: dict = field(
        default_factory=lambda: {"lco25m": "as"}
    )  # file names begin with "ap", but for these telescopes
    other_layouts: dict = field(
        default_factory=dict
    )  # product or "allstar" -> further templates that a folder may follow
    row: int = 1  # of an apStar file: the combination to use, with its flags

    def path(self, product: str, field: str, apogee_id: str, telescope: str = "apo25m") -> str:
        "Path of a star's file below the root."
        prefix = self.prefixes.get(telescope, "ap")
        return self._template(product).format(
            telescope=telescope, field=field, id=apogee_id, prefix=prefix
        )

    def folder(self, product: str, field: str, telescope: str = "apo25m") -> str:
        "The folder that holds a field's files."
        return str(PurePosixPath(self.path(product, field, "x", telescope)).parent)

    def parse_name(self, product: str, file_name: str) -> str | None:
        "The APOGEE_ID in the name of a star's file; None for other files, those of single visits among them."
        names = {PurePosixPath(template).name for template in self.templates(product)}
        for name in names:
            pattern = (
                re.escape(name).replace(r"\{id\}", f"({APOGEE_ID})").replace(r"\{prefix\}", "a[ps]")
            )
            match = re.fullmatch(pattern, file_name)
            if match:
                return match.group(1)
        return None

    @property
    def reductions(self) -> frozenset:
        "What the names of its files call the reduction: `r8` in `apStar-r8-….fits`."
        return frozenset(PurePosixPath(path).name.split("-")[1] for path in self.paths.values())

    def templates(self, product: str) -> tuple:
        "All templates of a product (or of the catalogue, `allstar`), the survey's own first."
        first = self.allstar if product == "allstar" else self._template(product)
        return (first, *self.other_layouts.get(product, ()))

    def _template(self, product):
        if product not in self.paths:
            raise LabError(
                f"{self.name} has no product {product!r}: choose from {', '.join(self.paths)}"
            )
        return self.paths[product]


# %% [markdown]
# The lab's own layout, `stars/<location>/…`, is a further template of DR14: who did the lab by hand has such a folder.

# %%
#| export
def _release(name, apstar, aspcapstar, allstar, **rules):
    root = f"{name.lower()}/apogee/spectro/"
    paths = {
        product: root + path
        for product, path in (("apstar", apstar), ("aspcapstar", aspcapstar))
        if path
    }
    return Release(name, paths, root + allstar, **rules)


RELEASES = {
    release.name.lower(): release
    for release in (
        _release(
            "DR10",
            "redux/r3/s3/{field}/apStar-s3-{id}.fits",
            "redux/r3/s3/a3/v304/{field}/aspcapStar-v304-{id}.fits",
            "redux/r3/s3/a3/v304/allStar-v304.fits",
            target_id="{field}.{id}",
            field_column="LOCATION_ID",
        ),
        _release(
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
        _release(
            "DR16",
            "redux/r12/stars/{telescope}/{field}/{prefix}Star-r12-{id}.fits",
            "aspcap/r12/l33/{telescope}/{field}/aspcapStar-r12-{id}.fits",
            "aspcap/r12/l33/allStar-r12-l33.fits",
            target_id="{telescope}.{field}.{id}",
            telescopes=("apo25m", "lco25m", "apo1m"),
        ),
        _release(
            "DR17",
            "redux/dr17/stars/{telescope}/{field}/{prefix}Star-dr17-{id}.fits",
            "aspcap/dr17/synspec_rev1/{telescope}/{field}/aspcapStar-dr17-{id}.fits",
            "aspcap/dr17/synspec_rev1/allStar-dr17-synspec_rev1.fits",
            target_id="{telescope}.{field}.{id}",
            telescopes=("apo25m", "lco25m", "apo1m"),
            row=0,  # row 1 of its masks is empty
        ),
    )
}

# %% [markdown]
# A star that was seen several times has several rows in its `apStar` file: row 0 combines the visits pixel by pixel, row 1 with one weight per visit,
# and the visits follow. Which of the two is *the* spectrum is a fact of the release, too. Row 1 is it up to DR16; DR17 left the masks of row 1 empty,
# so there row 0 is the one that knows its bad pixels.

# %%
assert {name: release.row for name, release in RELEASES.items()} == {
    "dr10": 1,
    "dr14": 1,
    "dr16": 1,
    "dr17": 0,
}
assert RELEASES["dr16"].reductions == {"r12"} and RELEASES["dr10"].reductions == {"s3", "v304"}

# %% [markdown]
# A southern star is a star, too. (The lab's own pattern, `apStar-r8-*-*.fits` means a visit, lost all of them.)

# %%
dr14 = RELEASES["dr14"]
assert dr14.path("apstar", "4230", "2M21334193-0048169") == (
    "dr14/apogee/spectro/redux/r8/stars/apo25m/4230/apStar-r8-2M21334193-0048169.fits"
)
assert dr14.parse_name("apstar", "apStar-r8-2M21334193-0048169.fits") == "2M21334193-0048169"
assert dr14.parse_name("apstar", "apStar-r8-2M21334193-0048169-56931.fits") is None  # one visit
assert dr14.parse_name("apstar", "apStar-r8-VESTA.fits") == "VESTA"  # another catalogue's name
for wrong in (
    "../apStar-r8-2M21334193-0048169.fits",
    "apStar-r8-2M21334193-0048169.fits.png",
    "apStar-r12-2M21334193-0048169.fits",
):
    assert dr14.parse_name("apstar", wrong) is None
assert (
    RELEASES["dr17"]
    .path("apstar", "N362", "2M01020000-7100000", "lco25m")
    .endswith("lco25m/N362/asStar-dr17-2M01020000-7100000.fits")
)
with pytest.raises(LabError, match="DR14 has no product 'apvisit': choose from apstar, aspcapstar"):
    dr14.path("apvisit", "4230", "2M21334193-0048169")

# %% [markdown]
# ## Archives: who is in them
# An *archive* is a root with stars in it, and what differs from one to the next is again a record: which release's tree it follows, which labels and
# fields a command takes unless told otherwise, and which cuts a star must pass.

# %% [markdown]
# The catalogue also has columns of *flags*, bitmasks like those of the pixels but for a whole star: `STARFLAG` says what the telescope met,
# `ASPCAPFLAG` what the survey's pipeline thinks of its own labels. The numbers of the bits are the same in all releases; later ones added some.

# %%
#| export
_STAR_BITS = {
    "BAD_PIXELS": 0,
    "COMMISSIONING": 1,
    "BRIGHT_NEIGHBOR": 2,
    "VERY_BRIGHT_NEIGHBOR": 3,
    "LOW_SNR": 4,
    "PERSIST_HIGH": 9,
    "PERSIST_MED": 10,
    "PERSIST_LOW": 11,
    "PERSIST_JUMP_POS": 12,
    "PERSIST_JUMP_NEG": 13,
    "SUSPECT_RV_COMBINATION": 16,
    "SUSPECT_BROAD_LINES": 17,
    "BAD_RV_COMBINATION": 18,
    "RV_REJECT": 19,
    "RV_SUSPECT": 20,
    "MULTIPLE_SUSPECT": 21,
    "RV_FAIL": 22,
    "SUSPECT_ROTATION": 23,
    "MTPFLUX_LT_75": 24,
    "MTPFLUX_LT_50": 25,
}
_DOUBTS = (  # bits 0 to 14 of ASPCAPFLAG as warnings, 16 to 30 as verdicts
    *("TEFF", "LOGG", "VMICRO", "M_H", "ALPHA_M", "C_M", "N_M", "STAR"),
    *("CHI2", "COLORTE", "ROTATION", "SN", "SPEC_HOLE", "ATMOS_HOLE", "VSINI"),
)
_ASPCAP_BITS = {
    **{f"{name}_WARN": bit for bit, name in enumerate(_DOUBTS)},
    **{f"{name}_BAD": bit for bit, name in enumerate(_DOUBTS, start=16)},
    "NO_ASPCAP_RESULT": 31,
    "MISSING_APSTAR": 32,
    "NO_GRID": 33,
    "BAD_FRAC_LOWSNR": 34,
    "BAD_FRAC_BADPIX": 35,
    "FERRE_FAIL": 36,
    "PROBLEM_TARGET": 40,
    "MULTIPLE_SUSPECT": 41,
}
STAR_FLAGS = {"STARFLAG": _STAR_BITS, "ANDFLAG": _STAR_BITS, "ASPCAPFLAG": _ASPCAP_BITS}

# %%
assert (STAR_FLAGS["ASPCAPFLAG"]["STAR_WARN"], STAR_FLAGS["ASPCAPFLAG"]["STAR_BAD"]) == (7, 23)
assert STAR_FLAGS["STARFLAG"]["PERSIST_HIGH"] == 9


# %% [markdown]
# So a cut keeps an open interval of a column, or stars without certain bits. It answers for itself: `keeps` takes a column and says who stays. A value
# that nobody knows passes no cut. (Bits are read as the column was written: the 31st of a 32-bit column is its sign.)

# %%
#| export
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
        Why such stars go, for the ledger.
    without_bits : int, str or sequence of these, default ()
        Bits that must not be set, by number (0 is the lowest) or, for the columns in `STAR_FLAGS`,
        by name.

    Raises
    ------
    LabError
        For the name of a bit that is not known, or a number outside 0 to 63.

    Examples
    --------
    >>> cut = Cut("star flags", "STARFLAG", without_bits=("BAD_PIXELS", "VERY_BRIGHT_NEIGHBOR"))
    >>> print(cut)
    STARFLAG without BAD_PIXELS, VERY_BRIGHT_NEIGHBOR
    >>> cut.keeps([0, 1, 4, 8])
    array([ True, False,  True, False])
    >>> print(Cut("giants", "LOGG", high=3.8))
    LOGG < 3.8
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
        object.__setattr__(self, "without_bits", bits)
        for bit in bits:
            self._number(bit)

    def __str__(self):
        low = f"{self.low:g} < " if np.isfinite(self.low) else ""
        high = f" < {self.high:g}" if np.isfinite(self.high) else ""
        names = ", ".join(bit if isinstance(bit, str) else f"bit {bit}" for bit in self.without_bits)
        return f"{low}{self.column}{high}" + (f" without {names}" if names else "")

    def keeps(self, column) -> np.ndarray:
        """Which stars the cut keeps.

        Parameters
        ----------
        column : array_like
            (N,) values of the column, whole numbers where bits are tested; may be masked.

        Returns
        -------
        ndarray
            (N,) bool. False where the value is masked, NaN or missing.

        Raises
        ------
        LabError
            If the column does not hold one number per star.
        """
        values = np.ma.asarray(getattr(column, "value", column))
        if values.ndim != 1 or values.dtype.kind not in "biuf":
            raise LabError(
                f"the cut {self.name!r} needs one number per star, but {self.column} holds "
                f"{'text' if values.dtype.kind in 'SUO' else f'an array of shape {values.shape}'}"
            )
        numbers = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan)
        kept = (numbers > self.low) & (numbers < self.high)
        if self.without_bits:
            forbidden = sum(1 << bit for bit in {self._number(bit) for bit in self.without_bits})
            bits, known = _as_bits(values)
            kept &= known & ((bits & np.uint64(forbidden)) == 0)
        return kept

    def _number(self, bit):
        "Number of a bit that was named; LabError if there is none."
        names = STAR_FLAGS.get(self.column.upper(), {})
        if isinstance(bit, str):
            if bit.upper() not in names:
                known = f"choose from {', '.join(names)}" if names else "give its number"
                raise LabError(f"{self.column} has no bit with the name {bit!r}: {known}")
            return names[bit.upper()]
        if not 0 <= bit < 64:
            raise LabError(f"a bit of {self.column} has a number from 0 to 63, not {bit}")
        return int(bit)


def _as_bits(values):
    "Whole numbers as 64 bits each, (N,) uint64, and which of them are known, (N,) bool."
    known = ~np.ma.getmaskarray(values)
    values = np.ma.getdata(values)
    if values.dtype.kind == "f":
        known &= np.isfinite(values)
        values = np.where(known, values, 0).astype(np.int64)
    known &= values != _NO_FLAGS
    if values.dtype.kind == "i":  # a sign is the highest bit of its own width, not of 64 bits
        values = values.astype(f"u{values.dtype.itemsize}")
    return values.astype(np.uint64), known


_NO_FLAGS = -9999  # how the survey writes "no value" among whole numbers

# %% [markdown]
# Three temperatures, of which one is unknown, and five flags: the last two have bit 31 of a 32-bit column and no value.

# %%
assert Cut("cool", "TEFF", high=5000).keeps([4000.0, 6000.0, np.nan]).tolist() == [True, False, False]
flags = np.ma.array(np.array([0, 1 << 9, 1 << 7, -(1 << 31), 0], ">i4"), mask=[0, 0, 0, 0, 1])
assert Cut("", "ASPCAPFLAG", without_bits="star_warn").keeps(flags).tolist() == [
    True,
    True,
    False,
    True,
    False,
]
assert Cut("", "ASPCAPFLAG", without_bits=(9, 31)).keeps(flags).tolist() == [
    True,
    False,
    True,
    False,
    False,
]
with pytest.raises(LabError, match="STARFLAG has no bit with the name 'DUST': choose from BAD_PIX"):
    Cut("dusty", "STARFLAG", without_bits="DUST")
print(Cut("flags", "ASPCAPFLAG", without_bits=("STAR_BAD", 31), reason="ASPCAP failed"))


# %% [markdown]
# Now the archives.

# %%
#| export
@dataclass(frozen=True)
class Archive:
    "What the lab has to know about an archive; `archive.json` at its root names the record."

    name: str
    title: str
    release: str
    labels: tuple
    fields: tuple
    cuts: tuple
    products: tuple = ("apstar", "aspcapstar")

    @property
    def rules(self) -> Release:
        "The path rules of its release."
        return RELEASES[self.release]


_SNR = Cut("signal-to-noise", "SNR", low=50, reason="too noisy to train on")
_LAB = dict(
    release="dr14",
    labels=("TEFF", "LOGG", "FE_H", "MG_FE", "SI_FE"),
    fields=("4230", "4262", "5162", "4241"),
    cuts=(_SNR, Cut("metal-poor", "FE_H", low=-1, reason="few stars, weak lines")),
)
ARCHIVES = {
    archive.name: archive
    for archive in (
        Archive("survey", "SDSS data release 14, the lab's four fields", **_LAB),
        Archive("mock", "synthetic stars with known truth, in the lab's four fields", **_LAB),
        Archive(
            "clusters",
            "553 real stars of 18 star clusters and the Pleiades (SDSS DR10)",
            release="dr14",
            labels=("TEFF", "LOGG", "M_H", "ALPHA_M", "C_M", "N_M"),
            fields=(
                "4105",
                "4128",
                "4147",
                "4148",
                "4160",
                "4161",
                "4162",
                "4200",
                "4201",
                "4202",
                "4217",
                "4230",
                "4259",
                "4260",
                "4261",
                "4262",
                "4263",
                "4264",
                "4418",
            ),
            cuts=(_SNR, Cut("dwarf", "LOGG", high=3.8, reason="the model is one of giants")),
        ),
    )
}
ARCHIVE_FILE = "archive.json"  # at the root of an archive that we wrote
TRUTH_FILE = "truth.fits"  # beside it, what only its writer knows

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
def archive_record(
    root,  # a folder
) -> Archive:  # the record that its archive.json names, the survey's without one
    "Which archive stands at `root`."
    file = Path(root) / ARCHIVE_FILE
    if not file.exists():
        return ARCHIVES["survey"]
    try:
        name = json.loads(file.read_text(encoding="utf-8"))["archive"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(
            f"{file} does not name an archive ({error}): write the archive again, or remove the file if this is the survey"
        ) from error
    if name not in ARCHIVES:
        raise LabError(
            f"{file} names the archive {name!r}, which this version does not know: choose from {', '.join(ARCHIVES)}"
        )
    return ARCHIVES[name]


def archive_root() -> Path:
    "Root of the archive at hand: `STELLAR_LAB_ARCHIVE`, else `data/archives/clusters` of the project."
    root = os.environ.get("STELLAR_LAB_ARCHIVE")
    root = (
        Path(root)
        if root
        else Path(__file__).resolve().parents[1] / "data" / "archives" / "clusters"
    )
    if not root.is_dir():
        raise LabError(
            f"there is no archive at {root}: run 'make archive', or 'stellar-lab archive clusters {root}', "
            "or let STELLAR_LAB_ARCHIVE name a folder"
        )
    return root


def real_data() -> Path | None:
    "The optional folder of raw survey files that `STELLAR_LAB_REAL_DATA` names, or None."
    folder = os.environ.get("STELLAR_LAB_REAL_DATA")
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise LabError(
            f"STELLAR_LAB_REAL_DATA names {folder}, which is not a folder: mend the variable or unset it"
        )
    return Path(folder)


def profile() -> str:
    "`quick` (minutes) or `full` (every number of the lab), from `STELLAR_LAB_PROFILE`."
    name = os.environ.get("STELLAR_LAB_PROFILE", "quick")
    if name not in ("quick", "full"):
        raise LabError(f"STELLAR_LAB_PROFILE is {name!r}: choose quick or full")
    return name


# %%
import tempfile

with tempfile.TemporaryDirectory() as root:
    assert archive_record(root).name == "survey"
    (Path(root) / ARCHIVE_FILE).write_text('{"archive": "clusters"}')
    assert archive_record(root).labels[2] == "M_H"
    (Path(root) / ARCHIVE_FILE).write_text('{"archive": "atlantis"}')
    with pytest.raises(LabError, match="'atlantis'.*choose from survey, mock, clusters"):
        archive_record(root)


# %% [markdown]
# An archive that was written here brings a truth table: what the writer alone knows. For synthetic stars that is every label, and the trend that was planted in the catalogue,
# so that "wrong" can be told from "different".

# %%
#| export
def read_truth(
    root,  # of an archive
    apogee_ids=None,  # (N,) which stars, in this order ("mystery" for the nameless one); all by default
) -> (
    Table | None
):  # a row a star; None where the archive has no truth table, as the survey has none
    "What only the writer of an archive knows of its stars. LabError for a star that it does not list."
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
            f"{file} does not list {strangers[0]}, nor {len(strangers) - 1} more: is it the truth table of another archive?"
        )
    return table[[place[str(name)] for name in apogee_ids]]


def true_labels(
    root,
    apogee_ids,  # as for `read_truth`
    names,  # K label names
) -> (
    tuple | None
):  # labels (N, K), trends of the catalogue (N, K), physical units; None where nobody knows them
    "The true labels of stars, and what the catalogue was made to be off. Stars that were observed, not made, have none."
    truth = read_truth(root, apogee_ids)
    if truth is None or not all(f"{name}_TREND" in truth.colnames for name in names):
        return None
    return tuple(
        np.column_stack([np.asarray(truth[f"{name}{suffix}"], float) for name in names])
        for suffix in ("", "_TREND")
    )


# %%
with tempfile.TemporaryDirectory() as root:
    assert read_truth(root) is None and true_labels(root, ["a"], ["TEFF"]) is None
    made = Table(
        {
            "APOGEE_ID": ["a", "b", "mystery"],
            "TEFF": [4000.0, 4500.0, 5000.0],
            "TEFF_TREND": [9.0, 0.0, -9.0],
        }
    )
    made.write(Path(root) / TRUTH_FILE)
    assert read_truth(root, ["b"])["TEFF"][0] == 4500
    labels, trend = true_labels(root, ["mystery", "a"], ["TEFF"])
    assert labels.tolist() == [[5000], [4000]] and trend.tolist() == [[-9], [9]]
    assert true_labels(root, ["a"], ["TEFF", "LOGG"]) is None
    with pytest.raises(LabError, match="does not list c, nor 1 more"):
        read_truth(root, ["a", "c", "d"])


# %% [markdown]
# ## Files that the package brings
# The package's data are opened through `importlib.resources`, so a clone, an editable install and a wheel find the same ones.

# %%
#| export
def data_file(
    name: str,  # of a file in the package's data folder
):  # -> context manager that gives its path
    "A file that the package brings; LabError if the installation lacks it."
    file = files("stellar_lab.data") / name
    if not file.is_file():
        raise LabError(
            f"the installed package lacks its data file {name}: install stellar_lab again"
        )
    return as_file(file)


# %%
with data_file("continuum_pixels.npy") as path:
    assert np.load(path).shape == wavelength.shape
with pytest.raises(LabError, match="lacks its data file lost.fits: install stellar_lab again"):
    data_file("lost.fits")


# %% [markdown]
# ## Writing without leaving halves behind
# A run can be stopped at any moment, and a file that is half there is worse than none. So every file is written under a temporary name beside its place
# and renamed when it is whole: the rename is atomic.

# %%
#| export
@contextmanager
def atomic_path(path):
    "A temporary path beside `path` to write to; it becomes `path` when the block ends well and vanishes when it does not."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{os.getpid()}.{path.name}"
    )  # keeps the extension, by which writers choose the format
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


TABLE_FORMATS = {".fits": "fits", ".ecsv": "ascii.ecsv", ".parquet": "parquet"}


def write_table(
    table: Table,
    path,  # .fits, .ecsv or .parquet
):
    "Write a table whole or not at all, in the format that the extension names."
    suffix = Path(path).suffix.lower()
    if suffix not in TABLE_FORMATS:
        raise LabError(
            f"cannot write {path}: the extension must be one of {', '.join(TABLE_FORMATS)}"
        )
    if suffix == ".parquet":
        require("pyarrow", "parquet")
    with atomic_path(path) as temporary:
        table.write(temporary, format=TABLE_FORMATS[suffix], overwrite=True)


# %%
with tempfile.TemporaryDirectory() as folder:
    target = Path(folder) / "labels.ecsv"
    write_table(QTable({"teff": [4700, 4800] * u.K}), target)
    with pytest.raises(ZeroDivisionError):
        with atomic_path(target) as temporary:
            temporary.write_text("half a")
            1 / 0
    assert [file.name for file in Path(folder).iterdir()] == [
        "labels.ecsv"
    ]  # no trace of the failure
    assert QTable.read(target)["teff"].unit == u.K  # and the old file is whole
    with pytest.raises(
        LabError, match="labels.doc: the extension must be one of .fits, .ecsv, .parquet"
    ):
        write_table(QTable(), Path(folder) / "labels.doc")


# %% [markdown]
# ## `Spectra`: rows stay together
# The lab lost track of its stars once: it cut the spectra and forgot to cut the names, and later titles named other stars. Here flux, inverse variance,
# mask and catalogue rows of the same stars live in one object. `spectra[rows]` cuts all of it, with anything that numpy takes as an index.
#
# A pixel that cannot be used has `ivar = 0`: the weight says it all, and every sum over pixels ignores it without a special case.

# %%
#| export
@dataclass
class Spectra:
    "Spectra of N stars on P pixels, and all that belongs to the same stars. Label columns are in physical units, NaN where there is none."

    wavelength: np.ndarray  # (P,) float64, increasing [Angstrom, vacuum]
    flux: np.ndarray  # (N, P) float32
    ivar: np.ndarray  # (N, P) float32, inverse variance of flux; 0 marks an unusable pixel
    stars: Table  # N rows: APOGEE_ID, FIELD, SNR, labels, label errors, …
    mask: np.ndarray | None = (
        None  # (N, P) integer APOGEE_PIXMASK bits, None where the product has none
    )

    def __post_init__(self):
        shape = (len(self.stars), len(self.wavelength))
        for name in ("flux", "ivar", "mask"):
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise LabError(
                    f"{name} has the shape {array.shape}, but {shape[0]} stars and {shape[1]} wavelengths need {shape}"
                )
        if np.any(np.diff(self.wavelength) <= 0):
            raise LabError("wavelengths must increase from pixel to pixel")

    def __len__(self):
        return len(self.stars)

    def __getitem__(self, rows) -> "Spectra":
        if not isinstance(rows, slice):
            rows = np.atleast_1d(rows)
            rows = (
                rows if rows.size else rows.astype(int)
            )  # an empty list means no stars, not a float
        mask = None if self.mask is None else self.mask[rows]
        return Spectra(self.wavelength, self.flux[rows], self.ivar[rows], self.stars[rows], mask)

    def __repr__(self):
        good = f"{np.mean(self.ivar > 0):.1%} of the pixels usable" if self.ivar.size else "empty"
        return f"<Spectra: {len(self)} stars, {len(self.wavelength)} pixels from {self.wavelength[0]:.1f} to {self.wavelength[-1]:.1f} Å, {good}>"

    def replace(self, **changes) -> "Spectra":
        "A copy with some parts exchanged; the other parts are shared, not copied."
        return replace(self, **changes)

    @property
    def label_names(self) -> tuple:
        "Names of the labels that were asked for (`labels` of the stars' meta), else of all that the table holds; in the order of `LABELS`."
        asked = self.stars.meta.get("labels", LABELS)
        return tuple(name for name in LABELS if name in asked and name in self.stars.colnames)

    def labels(
        self,
        names=None,  # K label names; all that the table holds by default
    ) -> np.ndarray:  # (N, K) float64, physical units, NaN where there is none
        "Label values as one array."
        return self._columns(
            [label.name for label in label_records(self.label_names if names is None else names)]
        )

    def label_errors(self, names=None) -> np.ndarray:
        "1-sigma errors of the labels, like `labels`."
        return self._columns(
            [
                f"{label.name}_ERR"
                for label in label_records(self.label_names if names is None else names)
            ]
        )

    def _columns(self, columns):
        missing = [column for column in columns if column not in self.stars.colnames]
        if missing:
            raise LabError(
                f"the stars have no column {', '.join(missing)}: there are {', '.join(self.stars.colnames)}"
            )
        if not columns:
            return np.empty((len(self), 0))
        return np.column_stack(
            [
                np.ma.filled(np.ma.asarray(self.stars[column], dtype=float), np.nan)
                for column in columns
            ]
        )


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
assert (
    len(spectra[1]) == len(spectra[-2:-1]) == len(spectra[[True, False, False]]) == 1
)  # a single star is still a table
hot.stars.meta["labels"] = ()  # a temperature that only a cut needs is not a label of this run
assert spectra.label_names == ("TEFF",) and hot.label_names == ()
with pytest.raises(
    LabError, match=r"flux has the shape \(2, 2\), but 3 stars and 2 wavelengths need \(3, 2\)"
):
    spectra.replace(flux=np.ones((2, 2), "f4"))
with pytest.raises(LabError, match="no column LOGG: there are APOGEE_ID, TEFF, TEFF_ERR"):
    spectra.labels(["LOGG"])

# %% [markdown]
# ## One style for all pictures
# Seaborn's colour-blind palette, thin lines, units on every axis. `plot_spectrum` draws a star as the lab does: flux on the left axis, its error in
# grey on a second one, no line across the gaps between the chips.

# %%
#| export
STYLE = {
    "lines.linewidth": 0.9,
    "figure.constrained_layout.use": True,
    "figure.dpi": 80,
    "savefig.dpi": 80,
    "axes.grid": False,
}
CHIP_COLORS = dict(
    zip(CHIPS, ("#0173b2", "#029e73", "#d55e00"))
)  # of seaborn's colour-blind palette


def use_style():
    "Set the style of the lab's figures for this session."
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=0.9, rc=STYLE)


def plot_spectrum(
    grid: np.ndarray,  # (P,) [Angstrom]
    flux: np.ndarray,  # (P,)
    ivar: np.ndarray = None,  # (P,); pixels of weight 0 leave a gap
    window: tuple = None,  # (low, high) [Angstrom] to show
    error: bool = False,  # draw the 1-sigma error on a second axis
    ax=None,
    title: str = None,
    **line,
):
    "One spectrum; returns the Axes."
    ax = plt.subplots(figsize=(9, 2.5))[1] if ax is None else ax
    shown = (
        np.ones(len(grid), bool) if window is None else (grid >= window[0]) & (grid <= window[1])
    )
    good = np.ones(len(grid), bool) if ivar is None else np.asarray(ivar) > 0
    gaps = (
        np.flatnonzero(np.diff(np.log10(grid[shown])) > 1.5 * LOG10_STEP) + 1
    )  # NaNs between the chips break the line

    def broken(y):
        return np.insert(np.where(good, y, np.nan)[shown].astype(float), gaps, np.nan)

    x = np.insert(grid[shown], gaps, np.nan)
    ax.plot(x, broken(flux), **({"color": "C0", "lw": 0.7} | line))
    if error and ivar is not None:
        with np.errstate(divide="ignore"):
            sigma = 1 / np.sqrt(np.asarray(ivar, float))
        second = ax.twinx()
        second.plot(x, broken(sigma), color="0.6", lw=0.5)
        second.set_ylabel("error", color="0.5")
        second.set_ylim(bottom=0)
        ax.set_zorder(second.get_zorder() + 1)
        ax.patch.set_visible(False)
    ax.set(xlabel="vacuum wavelength [Å]", ylabel="flux", title=title)
    ax.margins(x=0.01)
    return ax


# %%
use_style()
ax = plot_spectrum(
    wavelength,
    1 - 0.1 * np.sin(wavelength / 50),
    ivar=1e4 * np.ones_like(wavelength),
    error=True,
    title="not a star",
)
line = ax.lines[0].get_xdata()
assert np.isnan(line).sum() == 2 and np.nanmax(line) == wavelength[-1]  # two gaps, three chips

# %% [markdown]
# **Exercise.** The survey's next release moves its files again. Write the record for it, and nothing else: which tests of this chapter should it pass?
