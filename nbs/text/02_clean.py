# %% [markdown]
# # Which stars can we trust?
# > From a folder of survey files to spectra with labels, and a ledger that says where every star went that did not make it.
#
# **Question.** Thousands of files, a catalogue with hundreds of columns, and some of both are broken, noisy, doubled or missing. Which stars and
# which pixels can we learn from, and how does a reader check that we lost no good one on the way?
#
# **Idea.** Three kinds of "no" are kept apart. A *pixel* that knows nothing gets the weight zero, $w=1/\sigma^2=0$, and its star stays. A *star*
# that breaks a named rule is dropped. And every rule writes into a **ledger**, which must balance like any other,
# $$ N_\mathrm{found} = N_\mathrm{left} + \sum_\mathrm{rules} N_\mathrm{dropped} . $$
#
# You learn what stands in an APOGEE file, how files and catalogue rows find each other, and what the cuts of a sample do to it. You need
# [the survey's facts](00_survey.ipynb); files and catalogue are described by
# [Holtzman et al. 2015](https://doi.org/10.1088/0004-6256/150/5/148) and the survey's [data model](https://data.sdss.org/datamodel).

# %%
#| default_exp clean

# %%
#| export
import bz2
import gzip
import hashlib
import lzma
import math
import mmap
import os
import re
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from glob import escape, glob
from io import BytesIO
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import NamedTuple

import astropy.units as u
import numpy as np
from astropy.io import fits
from astropy.table import Column, QTable, Table
from astropy.utils.exceptions import AstropyWarning
from tqdm import tqdm

from stellar_lab.survey import (
    APOGEE_ID,
    ARCHIVES,
    LABELS,
    LOG10_START,
    LOG10_STEP,
    N_PIXELS,
    PIXMASK,
    PRODUCTS,
    RELEASES,
    LabError,
    Release,
    Spectra,
    WrongFile,
    archive_record,
    archive_sums,
    known_sums,
    label_records,
    on_band,
    plot_spectrum,
    same_star,
    sha256_of,
    wavelength,
    what_stands_at,
)

# %%
#| hide
import tempfile

import matplotlib.pyplot as plt
import pytest
from IPython.display import Markdown

from stellar_lab.survey import Cut, archive_root, real_data, use_style

# %%
#| hide
use_style()


# %% [markdown]
# ## The ledger
# A ledger starts with the number of files found. Each rule then takes stars away, by name, or only counts something worth knowing. A ledger is
# never changed: a rule returns a new one, so the state before a cut is still there after it, and later chapters simply go on writing.
#
# The order of rules matters for the lines but not for the sum. A star that is noisy *and* unlabelled falls to whichever rule comes first, and the
# other never sees it. So a line says what a rule took from the stars it met, not how many stars there are that break it.

# %%
#| exporti
class Step(NamedTuple):
    "One line of a ledger."

    rule: str
    stars: tuple = ()  # APOGEE_ID of each star that fell to the rule
    details: tuple = ()  # what was wrong with each of them, where the rule's name does not say it
    counted: int = 0  # for rules that count without dropping
    reason: str = ""


class _Readable:
    "How the steps of a ledger are shown and kept."

    @property
    def table(self) -> QTable:
        "One row per rule, in order: stars dropped, stars left after it, what it counted."
        drops = np.array([0] + [len(step.stars) for step in self.steps])
        return QTable(
            {
                "rule": ["files found"] + [step.rule for step in self.steps],
                "dropped": drops,
                "left": self.found - np.cumsum(drops),
                "counted": [0] + [step.counted for step in self.steps],
                "reason": [""] + [step.reason for step in self.steps],
            }
        )

    def __str__(self):
        align = ["<", ">", ">", ">", "<"]
        return "\n".join(self.table.pformat(max_lines=-1, max_width=-1, align=align))

    __repr__ = __str__

    def _repr_html_(self):
        return self.table._repr_html_()

    def to_dict(self) -> dict:
        "Plain numbers, strings and lists, for JSON."
        steps = [
            step._asdict() | {"stars": list(step.stars), "details": list(step.details)}
            for step in self.steps
        ]
        return {"found": self.found, "left": self.left, "steps": steps}

    @classmethod
    def from_dict(cls, plain: dict) -> "Ledger":
        "The ledger that `to_dict` wrote."
        steps = (
            Step(**(step | {"stars": tuple(step["stars"]), "details": tuple(step["details"])}))
            for step in plain["steps"]
        )
        return cls(plain["found"], tuple(steps))


# %%
class Toy(_Readable):
    "Two stars, of which one fell."

    found = 2
    steps = (Step("too noisy", ("Castor",), reason="SNR below 50"),)


Toy()


# %% [markdown]
# That is how it reads. This is how it is kept.

# %%
#| export
@dataclass(frozen=True, repr=False)
class Ledger(_Readable):
    """How many stars were found, and which rule dropped which of them.

    Parameters
    ----------
    found : int
        Stars (files) at the beginning.
    steps : tuple of Step
        What each rule dropped or counted.

    Examples
    --------
    >>> ledger = Ledger(3).drop("too noisy", ["Castor"]).count("seen twice", 1)
    >>> ledger.left, ledger.dropped
    (2, {'Castor': 'too noisy'})
    """

    found: int
    steps: tuple = ()

    def drop(self, rule: str, stars, reason: str = "", details=()) -> "Ledger":
        "The ledger with a further rule, to which `stars` (APOGEE_IDs) fell; `details` may say why."
        stars = tuple(map(str, stars))
        if len(stars) > self.left:
            raise LabError(
                f"rule {rule!r} drops {len(stars)} stars, but the ledger has only {self.left} left"
            )
        step = Step(rule, stars, tuple(map(str, details)), 0, reason)
        return Ledger(self.found, (*self.steps, step))

    def count(self, rule: str, number: int, reason: str = "") -> "Ledger":
        "The ledger with a further line that drops nothing."
        return Ledger(self.found, (*self.steps, Step(rule, counted=int(number), reason=reason)))

    @property
    def left(self) -> int:
        "Stars that no rule dropped."
        return self.found - sum(len(step.stars) for step in self.steps)

    @property
    def dropped(self) -> dict:
        "APOGEE_ID -> its rule (several joined by '; ' if the star was found more than once)."
        fallen = {}
        for step in self.steps:
            for star in step.stars:
                fallen[star] = f"{fallen[star]}; {step.rule}" if star in fallen else step.rule
        return fallen

    def why(self, apogee_id: str) -> str:
        "Why a star is not there any more; empty if no rule dropped it."
        said = []
        for step in self.steps:
            for k in np.flatnonzero(np.array(step.stars, dtype=object) == apogee_id):
                more = step.details[k] if step.details else step.reason
                said.append(f"{step.rule} ({more})" if more else step.rule)
        return "; ".join(said)


# %%
ledger = Ledger(5).drop("too noisy", ["Castor", "Pollux"])
ledger = ledger.count("seen twice", 1, "the better one counts").drop("no label", ["Mizar"])
ledger

# %% [markdown]
# The user may ask for a star by name, and the books balance. Taking away more stars than there are is a mistake, not a negative number.

# %%
assert ledger.left == 2
assert ledger.dropped == {"Castor": "too noisy", "Pollux": "too noisy", "Mizar": "no label"}
assert list(ledger.table["left"]) == [5, 3, 3, 2] and list(ledger.table["dropped"]) == [0, 2, 0, 1]
assert Ledger.from_dict(ledger.to_dict()) == ledger
two_files_of_one_star = Ledger(2).drop("a", ["Mira"]).drop("b", ["Mira"])
assert two_files_of_one_star.dropped == {"Mira": "a; b"}
with pytest.raises(LabError, match="rule 'x' drops 3 stars, but the ledger has only 2 left"):
    ledger.drop("x", ["a", "b", "c"])
ledger.why("Pollux")


# %% [markdown]
# As a picture: a bar for each rule, what is left in blue, what the rule took in orange.

# %%
#| exporti
def plot_ledger(ledger: Ledger, ax=None):
    """Draw what each dropping rule left and took.

    Parameters
    ----------
    ledger : Ledger
        To draw.
    ax : matplotlib Axes, optional
        Where; a new figure by default.

    Returns
    -------
    matplotlib Axes
    """
    import matplotlib.pyplot as plt

    table = ledger.table
    table = table[(table["dropped"] > 0) | (np.arange(len(table)) == 0)]
    ax = plt.subplots(figsize=(8, 0.6 + 0.35 * len(table)))[1] if ax is None else ax
    y = -np.arange(len(table))
    ax.barh(y, table["left"], color="C0", label="left")
    ax.barh(y, table["dropped"], left=table["left"], color="C1", label="dropped by this rule")
    for place, row in zip(y, table, strict=True):
        text = f"  {row['left']}" + (f"  ($-${row['dropped']})" if row["dropped"] else "")
        ax.text(row["left"] + row["dropped"], place, text, va="center", fontsize="small")
    ax.set(yticks=y, yticklabels=table["rule"], xlabel="stars")
    ax.set_xlim(0, 1.18 * max(ledger.found, 1))
    above = (0, 1.0 + 0.9 / len(table))
    ax.legend(loc="upper left", bbox_to_anchor=above, ncols=2, frameon=False, fontsize="small")
    return ax


# %%
plot_ledger(ledger);

# %% [markdown]
# ## One file
# A combined spectrum (`apStar`) is a FITS file of ten HDUs: flux, error and bitmask in the first three, sky and tellurics behind them. Its arrays
# have one row per combination and visit: row 0 combines the visits pixel by pixel, row 1 with one weight per visit, the visits follow. The traps: a star
# seen once has arrays *without* rows; DR17 writes float64 and int64 where others wrote float32 and int16, and no flags into row 1; "no value" is an
# error of $10^{10}$.
#
# Here is one from the archive at hand.

# %%
root = archive_root()
record = archive_record(root)
example = sorted(root.rglob("apStar-*.fits"))[0]
with fits.open(example) as hdus:
    layout = [
        (k, hdu.header.get("BUNIT", ""), str(getattr(hdu, "shape", "table")), hdu.header["BITPIX"])
        for k, hdu in enumerate(hdus)
    ]
Table(rows=layout, names=["HDU", "what", "shape", "bits"])


# %% [markdown]
# We read only what we need: `hdu.section[row]` fetches 34 kB from the middle of a file and leaves the visits on the disk. An error becomes a weight
# at once, and that weight is zero for every pixel of which the file itself says that it knows nothing.

# %%
#| exporti
def inverse_variance(flux, error, product) -> np.ndarray:
    """Weights of pixels.

    Parameters
    ----------
    flux, error : ndarray
        Any shape, error 1-sigma, in one unit.
    product : Product
        Says which errors are too large, and whether flux must be positive.

    Returns
    -------
    ndarray
        1/error^2, float32; 0 where error or flux are not usable.
    """
    error = np.asarray(error, np.float64)
    good = np.isfinite(flux) & np.isfinite(error) & (error > 0) & (error < product.max_error)
    if product.normalized:
        good &= np.asarray(flux) > 0  # a bad pixel of an aspcapStar file is a zero
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        ivar = np.where(good, 1 / error**2, 0).astype(np.float32)
    return np.where(np.isfinite(ivar), ivar, np.float32(0))


# %%
flux = np.array([1.0, 1.0, 1.0, 1.0, np.nan, 0.0])
error = np.array([0.1, 0.0, 1e10, np.nan, 0.1, 0.1])
raw = inverse_variance(flux, error, PRODUCTS["apstar"])
normalized = inverse_variance(flux, error, PRODUCTS["aspcapstar"])
assert np.allclose(raw, [100, 0, 0, 0, 0, 100])  # zero flux is a measurement here
assert np.allclose(normalized, [100, 0, 0, 0, 0, 0])  # and a hole here
Table({"flux": flux, "error": error, "apstar": raw, "aspcapstar": normalized})


# %% [markdown]
# ## Which pixels count?
# Each pixel carries a mask of bits, and not all of them are equally bad. A pixel hit by a cosmic ray knows nothing of the star. One on a detector that
# remembers brighter light (*persistence*) is doubtful, and if all pixels of a chip are doubtful, throwing them away throws away the chip. So a rule has two lists: bits
# that kill a pixel, and bits that raise its error by a factor.
#
# What kills is the survey's own choice: in its [code](https://github.com/sdss/apogee/blob/master/python/apogee/utils/bitmask.py) the bits of `APOGEE_PIXMASK` with level 1, BADPIX to NOSKY and
# NOT_ENOUGH_PSF, are bad, and the others are warnings ([their meaning](https://www.sdss4.org/dr17/algorithms/bitmasks/)). The factors are ours, and yours to change.

# %%
#| exporti
@dataclass(frozen=True)
class MaskRule:
    """Which bits of the survey's pixel mask kill a pixel, and which only raise its error.

    Parameters
    ----------
    kill : PIXMASK
        bits that take a pixel's weight
    raised : dict
        bit -> factor on the error; the largest that applies counts
    reason : str
        of the choice

    Examples
    --------
    >>> from stellar_lab.survey import PIXMASK
    >>> from stellar_lab.clean import MaskRule
    >>> MaskRule(PIXMASK.BADPIX, {PIXMASK.PERSIST_LOW: 3.0}).factors([0, 1, 2048]).tolist()
    [1.0, inf, 3.0]
    >>> print(MaskRule.parse("kill=BADPIX raise=PERSIST_LOW:3"))
    kill=BADPIX raise=PERSIST_LOW:3
    """

    kill: int
    raised: dict = field(default_factory=dict)
    reason: str = ""

    def factors(self, mask) -> np.ndarray:
        "Factor on the error of each pixel, infinite where it is killed; from a mask of any shape."
        mask = np.asarray(mask)
        factor = np.ones(mask.shape)
        for bit, times in self.raised.items():
            factor = np.where(mask & int(bit), np.maximum(factor, times), factor)
        return np.where(mask & int(self.kill), np.inf, factor)

    def __str__(self):
        killed = ",".join(bit.name for bit in PIXMASK if bit & int(self.kill))
        raised = ",".join(f"{PIXMASK(bit).name}:{times:g}" for bit, times in self.raised.items())
        return f"kill={killed}" + (f" raise={raised}" if raised else "")

    @classmethod
    def parse(cls, text: str) -> "MaskRule":
        """The rule that a text names.

        Parameters
        ----------
        text : str
            strict, gentle, a release such as dr17, or kill=BIT,… and raise=BIT:FACTOR,… with a
            blank between, bits by their names

        Returns
        -------
        MaskRule

        Raises
        ------
        LabError
            For anything else; it lists the bits.
        """
        known = {"strict": STRICT, "gentle": GENTLE} | MASK_RULES
        words = dict(word.partition("=")[::2] for word in str(text).split())
        if str(text).strip().lower() in known:
            return known[str(text).strip().lower()]
        if not words or words.keys() - {"kill", "raise"}:
            raise LabError(
                f"{text!r} is no rule for masks: say {', '.join(known)}, or "
                "'kill=BIT,… raise=BIT:FACTOR,…'"
            )
        kill = sum({int(_pixel_bit(name)) for name in words.get("kill", "").split(",") if name})
        raised = [entry.partition(":") for entry in words.get("raise", "").split(",") if entry]
        return cls(kill, {_pixel_bit(name): _factor(times) for name, _, times in raised})


# %%
first_rule = MaskRule(PIXMASK.BADPIX, {PIXMASK.PERSIST_LOW: 3.0})
print(first_rule)
flags = [0, PIXMASK.PERSIST_LOW, PIXMASK.BADPIX, PIXMASK.BADPIX | PIXMASK.PERSIST_LOW]
print("factors on the error:", first_rule.factors(flags))


# %%
#| exporti
def _pixel_bit(name):
    "A bit of PIXMASK by its name."
    if name.upper() not in PIXMASK.__members__:
        raise LabError(f"there is no bit {name!r}: choose from {', '.join(PIXMASK.__members__)}")
    return PIXMASK[name.upper()]


def _factor(text):
    "A factor on an error."
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 1 <= number < np.inf:
        raise LabError(f"{text!r} is no factor on an error: give a number from 1 up, as in BIT:3")
    return number


_LEVEL_ONE = PIXMASK(0xFF) | PIXMASK.NOT_ENOUGH_PSF  # bits 0 to 7, and 14
_DOUBTFUL = {
    PIXMASK.PERSIST_HIGH: 5.0,
    PIXMASK.PERSIST_MED: 4.0,
    PIXMASK.PERSIST_LOW: 3.0,
    PIXMASK.SIG_SKYLINE: 10.0,
    PIXMASK.SIG_TELLURIC: 2.0,
    PIXMASK.LITTROW_GHOST: 2.0,
}
STRICT = MaskRule(PIXMASK(2**15 - 1), {}, "every flag kills: as in the original lab")
GENTLE = MaskRule(_LEVEL_ONE, _DOUBTFUL, "what the survey calls bad dies, its warnings count less")
_ANY_VISIT = "row 0 carries the flags of all visits: one doubtful visit marks a pixel of the sum"
_SAME_BITS = "pixel_flags are those of the apStar combination, with the same bits"
MASK_RULES = {
    **dict.fromkeys(("dr10", "dr14", "dr16"), GENTLE),
    "dr17": replace(GENTLE, raised=_DOUBTFUL | {PIXMASK.SIG_SKYLINE: 5.0}, reason=_ANY_VISIT),
    "dr19": replace(GENTLE, raised=_DOUBTFUL | {PIXMASK.SIG_SKYLINE: 5.0}, reason=_SAME_BITS),
}

# %%
Table(
    rows=[(name, str(rule.kill.value), rule.reason) for name, rule in MASK_RULES.items()],
    names=["release", "kills", "why"],
)

# %%
with pytest.raises(LabError, match="there is no bit 'DUST': choose from BADPIX"):
    MaskRule.parse("kill=DUST")
assert MaskRule.parse(str(GENTLE)).factors(2048) == GENTLE.factors(2048) == 3
print(MaskRule.parse("dr17"))


# %%
#| exporti
def weigh_mask(spectra: Spectra, rule: MaskRule = GENTLE) -> Spectra:
    """Spectra whose mask is spent: bits that kill took the weight, others raised the error.

    Parameters
    ----------
    spectra : Spectra
        raw flux, with a mask
    rule : MaskRule, optional
        `GENTLE` by default

    Returns
    -------
    Spectra
        with an empty mask, so that `normalize` and `as_trained` take nothing more, and the rule in
        ``stars.meta["mask_rule"]``; where errors were raised, the column DOUBTFUL says of which
        pixels

    Raises
    ------
    LabError
        where there is no mask, or the spectra are normalized already
    """
    if spectra.mask is None:
        raise LabError("these spectra have no mask: only apStar and apVisit files carry one")
    if spectra.stars.meta.get("normalized"):
        raise LabError("the mask is weighed before the continuum is drawn: give raw spectra")
    factor = rule.factors(spectra.mask)
    stars = spectra.stars.copy(copy_data=False)
    stars.meta["mask_rule"] = str(rule)
    raised = (factor > 1) & np.isfinite(factor)
    if raised.any():
        stars["DOUBTFUL"] = raised
    ivar = (spectra.ivar / factor**2).astype(np.float32)
    return spectra.replace(ivar=ivar, mask=np.zeros_like(spectra.mask), stars=stars)


# %% [markdown]
# One bit that flipped on a disk can make a flux of 100 one of $10^{36}$. Such a pixel is no measurement, and one of them would spoil every sum over the
# spectrum. No star shines in one pixel ten thousand times as bright as in the others, and no error is a thousand times smaller than its neighbours': the
# extremes of real spectra are 52 and 0.4. Pixels beyond these limits lose their weight, and the table of stars counts them (`STRANGE_PIXELS`).

# %%
#| exporti
_STRANGE_FLUX = 1e4  # in units of the star's median flux
_STRANGE_ERROR = 1e-3  # in units of the star's median error


def strange_pixels(flux, ivar, max_flux=np.inf) -> np.ndarray:
    """Pixels whose numbers no star and no detector can give.

    Parameters
    ----------
    flux, ivar : ndarray
        (P,) of one star; ivar 0 where a pixel is unusable anyway.
    max_flux : float, optional
        No star has more, in the unit of the flux.

    Returns
    -------
    ndarray
        (P,) bool.
    """
    usable = ivar > 0
    size = np.abs(np.asarray(flux, np.float64))
    strange = usable & (size > max_flux)
    usable &= ~strange
    if usable.any():
        sizes = size[usable]
        weights = ivar[usable].astype(np.float64)
        if _are_alike(sizes, _STRANGE_FLUX) and _are_alike(weights, _STRANGE_ERROR**-2):
            return strange  # as nearly always
        level = np.median(sizes)
        limit = _STRANGE_FLUX * level if level > 0 else np.inf
        strange |= usable & ((size > limit) | (ivar > np.median(weights) / _STRANGE_ERROR**2))
    return strange


def _are_alike(values, times):
    "Whether no value is so many times the median; found by counting, which is faster."
    high = values >= 2 * values.max() / times
    return 2 * np.count_nonzero(high) > len(values) + 1


# %%
flux = np.full(100, 50.0, "f4")
ivar = np.full(100, 1.0, "f4")
flux[[3, 4]] = (1e36, -3e38)
ivar[[4, 7]] = (0, 1e24)  # an error of 1e-12
assert not strange_pixels(flux[10:], ivar[10:], PRODUCTS["apstar"].max_flux).any()
np.flatnonzero(strange_pixels(flux, ivar, PRODUCTS["apstar"].max_flux))

# %% [markdown]
# What a file is called says what it is and whose it is. The original lab's mystery star has lost its name: then the HDUs have to say what it is, for the
# third holds integers (a mask) in one product and floats (the best-fitting model) in the other.

# %%
#| exporti
FILE_NAME = re.compile(
    rf"(?P<kind>aspcap|ap|as)Star-(?:(?P<reduction>[^-]+)-)?(?:.*?-)?(?P<id>{APOGEE_ID})"
    r"(?:-\d+)?\.fits(?:\.gz)?"
)


# %%
#| exporti
def product_of(path) -> str | None:
    """Which product a file is: from its name, else from its HDUs.

    Parameters
    ----------
    path : path
        A file.

    Returns
    -------
    str or None
        `apstar` or `aspcapstar`, None if neither.

    Examples
    --------
    >>> product_of("aspcapStar-r8-l31c.2-2M21334193-0048169.fits")
    'aspcapstar'
    """
    match = FILE_NAME.fullmatch(Path(path).name)
    if match:
        return "aspcapstar" if match["kind"] == "aspcap" else "apstar"
    if what_stands_at(path):
        return None
    try:
        with _glance(path) as hdus:
            return _product_of_hdus(hdus)
    except Exception:  # whatever a damaged file makes astropy raise
        return None


@contextmanager
def _glance(path):
    "The HDUs of a file of which nothing is known yet; astropy's remarks on it stay unsaid."
    _check_sane(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)
        with fits.open(path) as hdus:
            yield hdus


def _product_of_hdus(hdus):
    "The product that the third HDU belongs to; None if to neither."
    third = hdus[3]
    if not third.is_image or third.shape is None or third.shape[-1:] != (N_PIXELS,):
        return None
    whole_numbers = third.header["BITPIX"] > 0 and third.header.get("BSCALE", 1) == 1
    return "apstar" if whole_numbers else "aspcapstar"


# %%
for name, product, star in [
    ("apStar-r8-2M21334193-0048169.fits", "apstar", "2M21334193-0048169"),
    ("asStar-dr17-2M01020000-7100000.fits", "apstar", "2M01020000-7100000"),
    ("aspcapStar-r8-l31c.2-2M21334193-0048169.fits", "aspcapstar", "2M21334193-0048169"),
    ("aspcapStar-v304-VESTA.fits", "aspcapstar", "VESTA"),
]:
    assert product_of(name) == product and FILE_NAME.fullmatch(name)["id"] == star
assert product_of("no_such_file.fits") is None
product_of(example)


# %% [markdown]
# The name also says which reduction wrote the file, and with it the release. That matters for one number: which row is the combination to use (row 1 up
# to DR16, row 0 in DR17, whose row 1 carries no flags). A file that lost its name still lists the visits that it was made of.

# %%
#| export
def _combined_row(path, header):
    "The row in which a file's release keeps the combination; the usual one for unknown releases."
    match = FILE_NAME.fullmatch(os.path.basename(path))
    visit = re.fullmatch(r"a[ps]Visit-([^-]+)-.*", str(header.get("SFILE1", "")).strip())
    for reduction in (match and match["reduction"], visit and visit[1]):
        for release in RELEASES.values():
            if reduction in release.reductions:
                return release.row
        if reduction and _OF_SDSS5.fullmatch(reduction):
            return RELEASES["dr17"].row
    return Release.row


_OF_SDSS5 = re.compile(r"daily|\d+\.\d+(\.\d+)?")  # reductions of SDSS-V, which follow DR17

# %%
assert _combined_row("apStar-1.2-apo25m-2M05560393-0133549.fits", {}) == 0  # of SDSS-V
visits = {"SFILE1": "apVisit-dr17-5815-56396-212.fits"}
assert _combined_row("apStar-r8-2M21334193-0048169.fits", visits) == 1
assert _combined_row("mystery.fits", visits) == 0 and _combined_row("mystery.fits", {}) == 1
_combined_row("apStar-dr17-2M17335483-2753043.fits", {})

# %% [markdown]
# Header facts go into the stars table under the names that the survey's catalogue uses for them.

# %%
#| exporti
_MISSING = -9000.0  # the survey writes -9999 or -9999.99 for "no value"; so do we read all below


class _Fact(NamedTuple):
    "A column of the stars table that comes from a file's header."

    column: str
    keys: tuple  # header cards, the first that exists counts
    missing: object  # value where no card exists; its type is the column's
    low: float = -np.inf  # what is beyond these limits is no value
    high: float = np.inf

    def read(self, header):
        "Its value in a header."
        return self.checked(next((header[key] for key in self.keys if key in header), None))

    def checked(self, value):
        "A value, if a star can have it."
        value = self.missing if value is None else value
        try:
            if isinstance(self.missing, str):
                return str(value).strip()
            value = type(self.missing)(value)
        except (TypeError, ValueError, OverflowError):
            return self.missing
        possible = value > _MISSING and self.low <= value <= self.high
        return value if possible else self.missing


_FACTS = (
    _Fact("APOGEE_ID", ("OBJID", "OBJ"), ""),
    _Fact("TELESCOPE", ("TELESCOP",), ""),
    _Fact("FIELD", ("FIELD",), ""),
    _Fact("LOCATION_ID", ("LOCID",), -1),
    _Fact("SNR", ("SNR",), np.nan, 0, 1e6),
    _Fact("NVISITS", ("NVISITS",), -1, 0, 1e6),
    *(_Fact(band, (band,), np.nan, -10, 50) for band in ("J", "H", "K")),
    _Fact("RA", ("RA",), np.nan, 0, 360),
    _Fact("DEC", ("DEC",), np.nan, -90, 90),
)


def star_fact(column, value):
    """A fact of a star as a file states it, if any star can have it.

    Parameters
    ----------
    column : str
        SNR, RA, DEC, NVISITS, J, H, K or another column of the stars that comes from a header.
    value : object
        Whatever stands in the file; None for nothing.

    Returns
    -------
    float, int or str
        In the column's type; what stands for no value (NaN, -1, "") where no star can have it.
    """
    (fact,) = (fact for fact in _FACTS if fact.column == column)
    return fact.checked(value)


# %%
print([star_fact("DEC", value) for value in (41.3, 1e300, "north", None)])
assert star_fact("DEC", 41.3) == 41.3 and np.isnan(star_fact("DEC", 1e300))

# %%
header = fits.Header(
    {"OBJ": "2M21334193-0048169", "LOCID": 4419, "SNR": 88.5, "J": "unknown", "K": -9999.99}
)
facts = {fact.column: fact.read(header) for fact in _FACTS}
assert facts["APOGEE_ID"] == "2M21334193-0048169" and np.isnan(facts["J"]) and np.isnan(facts["K"])
facts


# %% [markdown]
# Now the reader of one file. Whatever is wrong with it (cut short, a web page under a FITS name, HDUs of something else, another grid, no such row)
# becomes a `Problem` with the reason, never an exception: one bad file must not stop a thousand good ones.
#
# First the checks. A broken download often has a perfect beginning, and the HDUs that we need stand at the beginning: so a file is read whole, and a
# packed one unpacked to its end, where its checksum is. Then we walk along the chain of HDUs: each says in a few cards how long it is, and the next one
# begins behind it.

# %%
#| exporti
class Problem(NamedTuple):
    "A file that could not be read (`path`), and why (`reason`)."

    path: str
    reason: str

    def __str__(self):
        return f"{Path(self.path).name}: {self.reason}"


class _Wrong(WrongFile):
    "What is wrong with a star's file."


_CUT_PACKED = "cut short: what is packed in it ends too early; fetch it again"
_BAD_PACKED = "damaged: what is packed in it does not fit its checksum; fetch it again"


def _open_zip(path, mode="rb"):
    "The first file in a zip archive."
    with zipfile.ZipFile(path) as archive:
        return archive.open(archive.namelist()[0])


_PACKINGS = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"PK\x03\x04": _open_zip,
}
_BAD_PACKINGS = (OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError, LookupError)
_MAX_STAR = 1 << 28  # bytes; a star's file is never that large, also unpacked


def _opener(path):
    "The function that opens a packed file, by how it begins; None for what is not packed."
    with open(path, "rb") as file:
        return _opener_of(file.read(6))


def _opener_of(start):
    "The same, by the bytes with which a file begins."
    return next((opener for magic, opener in _PACKINGS.items() if start.startswith(magic)), None)


def _packing_problem(path):
    "Why a packed file cannot be unpacked to its end; '' if it can, or is not packed."
    try:
        opener = _opener(path)
        if opener:
            with opener(path) as file:
                while file.read(1 << 20):
                    pass
    except EOFError:
        return _CUT_PACKED
    except _BAD_PACKINGS:
        return _BAD_PACKED
    return ""


# %%
with tempfile.TemporaryDirectory() as folder:
    packed = Path(folder) / "star.fits.gz"
    for damage in ("", "cut", "changed"):
        content = bytearray(gzip.compress(example.read_bytes(), compresslevel=0))
        if damage == "changed":
            content[100_000] ^= 1
        packed.write_bytes(content[:-1000] if damage == "cut" else content)
        print(f"{damage or 'whole'}: {_packing_problem(packed) or 'nothing to say'}")


# %%
#| export
def _content(path):
    """All bytes of a star's file, unpacked and as they stand there, and whether a checksum was
    verified on the way."""
    if os.path.getsize(path) > _MAX_STAR:
        raise _Wrong("larger than any star's file")
    stored = Path(path).read_bytes()
    opener = _opener_of(stored[:6])
    if opener is None:
        return stored, stored, False
    try:
        with opener(BytesIO(stored)) as file:
            content = file.read(_MAX_STAR)
            if len(content) == _MAX_STAR:
                raise _Wrong("unpacks to more than any star's file")
    except EOFError as error:
        raise _Wrong(_CUT_PACKED) from error
    except _BAD_PACKINGS as error:
        raise _Wrong(_BAD_PACKED) from error
    return content, stored, True


# %%
print(f"{len(_content(example)[0]):,} bytes, compared with a checksum: {_content(example)[2]}")


# %%
#| export
class _Place(NamedTuple):
    "Where an HDU is in the bytes of a file."

    header: int
    data: int
    size: int  # of the data, without the padding
    end: int  # where the next one begins


_END = b"END" + b" " * 77
_BLOCK = 2880  # bytes; headers and data are padded to it


def _chain(content):
    "The places of all HDUs; raises _Wrong where the file ends before they do."
    places = []
    start = 0
    while content[start : start + 8] == (b"XTENSION" if places else b"SIMPLE  "):
        stop = content.find(_END, start)
        while stop > 0 and (stop - start) % 80:
            stop = content.find(_END, stop + 1)
        if stop < 0:
            raise _Wrong(f"cut short: the header of HDU {len(places)} has no end")
        data = start + math.ceil((stop + 80 - start) / _BLOCK) * _BLOCK
        size = _data_size(content[start:stop], len(places))
        if data + size > len(content):
            raise _Wrong(f"cut short: {len(content)} of {data + size} bytes")
        places.append(_Place(start, data, size, data + math.ceil(size / _BLOCK) * _BLOCK))
        start = places[-1].end
    return places


_MOST = 999  # axes of an array, or columns of a table


@lru_cache(maxsize=256)  # the stars of an archive have the same headers but for the first
def _data_size(header, number):
    "Bytes of an HDU's data, by section 4.4 of the FITS standard."

    def card(key, usual=None):
        at = header.find(key.ljust(8).encode() + b"=")
        while at > 0 and at % 80:
            at = header.find(key.ljust(8).encode() + b"=", at + 1)
        text = header[at + 10 : at + 80].split(b"/")[0].strip()
        if at < 0 and usual is not None:
            return usual
        if at < 0 or not text.isdigit() and not (key == "BITPIX" and text[1:].isdigit()):
            raise _Wrong(f"damaged: the header of HDU {number} has no good card {key}")
        return int(text)

    # The standard knows no more; astropy would count up to whatever stands there.
    if card("NAXIS") > _MOST or card("TFIELDS", 0) > _MOST:
        raise _Wrong(f"damaged: HDU {number} has more axes or columns than FITS allows")
    axes = [card(f"NAXIS{k}") for k in range(1, card("NAXIS") + 1)]
    elements = card("GCOUNT", 1) * (card("PCOUNT", 0) + math.prod(axes)) if axes else 0
    return abs(card("BITPIX")) // 8 * elements


# %% [markdown]
# Only a file whose chain makes sense is handed to astropy: a header that promises two thousand million axes would keep it counting.

# %%
#| export
def _check_sane(path):
    "Raise _Wrong where the headers of a file, packed or not, promise what no FITS file has."
    opener = _opener(path)
    with (opener or open)(path, "rb") as file:
        if opener is None and os.path.getsize(path):
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                _chain(content)
            return
        start = file.read(_FIRST)
    try:
        _chain(start)
    except _Wrong as error:
        if len(start) < _FIRST or not str(error).startswith("cut short"):
            raise


_FIRST = 1 << 22  # bytes; the headers of a packed table stand in them

# %%
_check_sane(example)
places = _chain(example.read_bytes())
with fits.open(example) as hdus:
    for place, hdu in zip(places, hdus, strict=True):
        known = hdu.fileinfo()
        assert (place.header, place.data) == (known["hdrLoc"], known["datLoc"])
        assert place.end == known["datLoc"] + known["datSpan"]
with pytest.raises(_Wrong, match="cut short: 100000 of") as refusal:
    _chain(example.read_bytes()[:100_000])
print(refusal.value)


# %% [markdown]
# A file may bring checksums of its own: `DATASUM` is the sum of an HDU's data as 32-bit numbers, with the carry added at the low end, and `CHECKSUM` is
# chosen so that the same sum over the whole HDU is all ones (FITS standard, appendix J). Where they are, they are verified.

# %%
#| export
def _ones_sum(content, start, end):
    "Sum of 32-bit numbers in ones' complement, a block at a time."
    total = 0
    for at in range(start, end, _SUM_BLOCK):
        piece = content[at : min(at + _SUM_BLOCK, end)]
        piece += bytes(-len(piece) % 4)
        total += int(np.frombuffer(piece, ">u4").sum(dtype=np.uint64))
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total


_SUM_BLOCK = 1 << 26  # bytes


def _check_sums(content, places):
    "Raise _Wrong where a checksum does not fit; returns whether there were any."
    found = False
    for number, place in enumerate(places):
        header = content[place.header : place.data]
        if b"DATASUM =" not in header and b"CHECKSUM=" not in header:
            continue
        cards = fits.Header.fromstring(header.decode("ascii", "replace"))
        datasum = str(cards.get("DATASUM", "")).strip()
        of_data = _ones_sum(content, place.data, place.end)
        wrong = datasum and (not datasum.isdigit() or of_data != int(datasum))
        checksum = str(cards.get("CHECKSUM", "")).strip()
        of_all = _ones_sum(content, place.header, place.data) + of_data
        wrong = wrong or (checksum and of_all % 0xFFFFFFFF)
        if wrong:
            raise _Wrong(f"damaged: HDU {number} does not fit its checksum; fetch it again")
        found = found or bool(datasum or checksum)
    return found


# %%
with tempfile.TemporaryDirectory() as folder:
    summed = Path(folder) / "summed.fits"
    with fits.open(example) as hdus:
        hdus.writeto(summed, checksum=True)
    content = bytearray(summed.read_bytes())
places = _chain(bytes(content))
assert _check_sums(bytes(content), places)
assert not _check_sums(example.read_bytes(), _chain(example.read_bytes()))  # it has none
content[places[1].data + 5] ^= 1
with pytest.raises(_Wrong, match="HDU 1 does not fit its checksum") as refusal:
    _check_sums(bytes(content), places)
print(refusal.value)


# %% [markdown]
# The grid is asked for in every file, too: a spectrum on other wavelengths would look quite normal and be wrong in every pixel. And so would the light
# of the sky in the place of the star's. What an HDU holds stands in its `BUNIT`, where the survey begins with *Flux*, *Error* or *Sky*.

# %%
#| export
def _check_whole(hdus, number, product):
    "Raise _Wrong unless the right HDUs (of so many) and the survey's grid are there."
    found = _product_of_hdus(hdus) if number > 3 else None
    if found not in (None, product.name):
        raise _Wrong(f"its HDUs are those of an {found} file, not of an {product.name} file")
    if number < product.hdus:
        raise _Wrong(f"has {number} HDUs, a whole {product.name} file at least {product.hdus}")
    roles = {"flux": product.flux, "error": product.error, "mask": product.mask}
    needed = {role: k for role, k in roles.items() if k is not None}
    _check_grid(hdus[product.flux].header, hdus[0].header)
    shapes = {getattr(hdus[k], "shape", None) for k in needed.values()}
    if found is None or len(shapes) > 1 or len(shapes.pop()) > 2:
        raise _Wrong(f"its HDUs are not those of an {product.name} file")
    for role, k in needed.items():
        _check_cards(hdus[k].header, k)
        held = _role(hdus[k].header.get("BUNIT", ""))
        # The errors of normalized spectra may have inherited the card of their flux.
        inherited = product.normalized and (role, held) == ("error", "flux")
        if held not in ("", role) and not inherited:
            unit = hdus[k].header["BUNIT"]
            raise _Wrong(f"HDU {k} holds {unit!r}, where the {role} should be")
    _check_cards(hdus[0].header, 0)


def _role(unit):
    "What an HDU holds, by its BUNIT; '' where that does not say it."
    words = re.findall("[A-Z]+", str(unit).upper()) or [""]
    if words[0] == "FLUX":
        return "error" if words[1:2] and words[1].startswith("ERR") else "flux"
    kinds = {"SKY": "sky", "TELLURIC": "tellurics", "BEST": "best fit", "MODEL": "best fit"}
    kinds |= {"PIXEL": "mask", "FLAG": "mask", "MASK": "mask", "BITMASK": "mask"}
    return "error" if words[0].startswith("ERR") else kinds.get(words[0], "")


# %%
units = ("Flux (10^-17 erg/s/cm^2/Ang)", "Err (10^-17 …)", "Sky error", "Flag Mask (bitwise)", "")
print(*[_role(unit) or "?" for unit in units], sep=", ")

# %%
#| export
_GRID = {"CRVAL1": LOG10_START, "CDELT1": LOG10_STEP, "NAXIS1": N_PIXELS, "CRPIX1": 1}


def _check_grid(header, first):
    "Raise _Wrong unless a header, or the file's first, describes the survey's grid."
    usual = {"CRPIX1": 1}
    found = {key: header.get(key, first.get(key, usual.get(key))) for key in _GRID}
    if not all(_is_near(found[key], value) for key, value in _GRID.items()):
        said = ", ".join(f"{key} {value}" for key, value in found.items())
        raise _Wrong(f"another wavelength grid: {said}")


def _is_near(value, right):
    "Whether the value of a card is the right number."
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value - right) <= 1e-7 * abs(right)


def _check_cards(header, number):
    "Raise _Wrong where a header contradicts the survey's grid; a card that is not there may lack."
    problem = ""
    for key in ("CRVAL1", "CDELT1", "CD1_1", "CRPIX1"):
        right = _GRID["CDELT1" if key == "CD1_1" else key]
        if key in header and not _is_near(header[key], right):
            problem = f"{key} {header[key]}"
    kind = str(header.get("CTYPE1", "LOG-LINEAR")).strip().upper()
    if kind and ("LOG" not in kind or kind.startswith("AWAV")):
        problem = f"CTYPE1 {kind}"
    if header.get("DC-FLAG", 1) != 1:
        problem = f"DC-FLAG {header['DC-FLAG']}"
    unit = str(header.get("CUNIT1", "")).strip().upper()
    if unit and unit != "A" and "ANG" not in unit:
        problem = f"CUNIT1 {unit}"
    if problem:
        raise _Wrong(f"another wavelength grid: {problem} in HDU {number}")


def _check_star(path, header):
    "Raise _Wrong if the header names another star than the file, or the spectrum is not at rest."
    match = FILE_NAME.fullmatch(os.path.basename(path))
    named = str(header.get("OBJID", header.get("OBJ", ""))).strip()
    if match and not same_star(named, match["id"]):
        raise _Wrong(f"holds another star: its header says {named}, its name {match['id']}")
    velocity = header.get("VRAD", 0)
    if isinstance(velocity, (int, float)) and not abs(velocity) <= _AT_REST:
        raise _Wrong(
            f"not at rest: its header says VRAD {velocity:g} km/s, and a combined spectrum "
            "should have 0"
        )


_AT_REST = 1.0  # km/s; a quarter of a pixel

# %%
with fits.open(example) as hdus:
    _check_whole(hdus, len(hdus), PRODUCTS["apstar"])  # nothing to say
    _check_star(example, hdus[0].header)
    for key, value in (("CTYPE1", "LINEAR"), ("CRVAL1", "4.179"), ("BUNIT", "Sky (10^-17 erg)")):
        kept = hdus[1].header[key]
        hdus[1].header[key] = value
        with pytest.raises(_Wrong) as refusal:
            _check_whole(hdus, len(hdus), PRODUCTS["apstar"])
        print(refusal.value)
        hdus[1].header[key] = kept
    with pytest.raises(ValueError, match="of an apstar file, not of an aspcapstar file") as refusal:
        _check_whole(hdus, len(hdus), PRODUCTS["aspcapstar"])
print(refusal.value)


# %% [markdown]
# Astropy reads any FITS file, and takes its time: of ten HDUs it looks at every card, and we need a dozen cards and three rows. A file without anything unusual in its headers is read here directly, three times
# faster. Whatever is not plain (scaled or compressed images, long texts, a file that is cut short) is left to Astropy, whose numbers must be the same.

# %%
#| export
class _NotPlain(ValueError):
    "Something in a file is left to astropy."


_HEADER_END = b"END" + b" " * 77
_UNUSUAL = (
    b"BZERO   ",
    b"BSCALE  ",
    b"BLANK   ",
    b"ZIMAGE  ",
    b"CONTINUE",
    b"GROUPS  ",
    b"HIERARCH",
)
_NUMBER = re.compile(rb" *([+-]?\d+)(\.\d*(?:E[+-]?\d+)?|E[+-]?\d+)? *(?:/.*)?")
_TEXT = re.compile(rb" *'([^']*)' *(?:/.*)?")


@cache
def _padded(key):
    "A keyword as it stands in a card."
    return key.ljust(8).encode()


class _PlainHeader:
    "The cards of a header, read when somebody asks."

    def __init__(self, data):
        cards = [data[start : start + 80] for start in range(0, len(data), 80)]
        self.cards = dict(zip((card[:8] for card in reversed(cards)), reversed(cards)))
        if not data.isascii() or any(key in self.cards for key in _UNUSUAL):
            raise _NotPlain

    def __contains__(self, key):
        return _padded(key) in self.cards

    def __getitem__(self, key):
        return self._value(self.cards[_padded(key)])

    def get(self, key, usual=None):
        card = self.cards.get(_padded(key))
        return usual if card is None else self._value(card)

    @staticmethod
    @lru_cache(maxsize=4096)  # most cards are the same in all files
    def _value(card):
        "What stands in a card."
        number = _NUMBER.fullmatch(card, 10) if card[8:10] == b"= " else None
        if number:
            whole = number[1] + (number[2] or b"")
            return float(whole) if number[2] else int(whole)
        text = _TEXT.fullmatch(card, 10) if card[8:10] == b"= " else None
        return text[1].decode().rstrip() if text else fits.Card.fromstring(card).value


# %%
#| export
@lru_cache(maxsize=256)  # the stars of an archive have the same headers but for the first
def _plain_header(data):
    "The cards of a header; nobody changes them, so that files may share them."
    return _PlainHeader(data)


# %%
cards = _plain_header(
    b"SNR     =                123.5 / good".ljust(80) + b"OBJID   = 'Castor  '".ljust(80)
)
print(cards["SNR"], cards["OBJID"], cards.get("VRAD"))
assert "SNR" in cards and (cards["SNR"], cards["OBJID"]) == (123.5, "Castor")


# %%
#| export
class _PlainHdu:
    "An image, or a table of which only the size is known."

    def __init__(self, content, start, first):
        stop = content.find(_HEADER_END, start)
        while stop > 0 and (stop - start) % 80:
            stop = content.find(_HEADER_END, stop + 1)
        if stop < 0:
            raise _NotPlain
        self.header = _plain_header(content[start:stop])
        head = self.header
        right = isinstance(head.get("XTENSION"), str)
        if first:
            right = b"= " + b" " * 19 + b"T" in head.cards.get(b"SIMPLE  ", b"")
        if not right:
            raise _NotPlain
        self.is_image = first or str(head["XTENSION"]).strip() == "IMAGE"
        axes = [head.get(f"NAXIS{k + 1}") for k in range(self._whole("NAXIS", 9))]
        if not all(type(axis) is int and 0 < axis < 1 << 40 for axis in axes):
            raise _NotPlain
        self.shape = tuple(axes[::-1])
        bits = head.get("BITPIX")
        if bits not in (8, 16, 32, 64, -32, -64):
            raise _NotPlain
        if first and ("PCOUNT" in head or "GCOUNT" in head):
            raise _NotPlain
        extra = 0 if first else self._whole("PCOUNT", 1 << 40)
        if not first and self._whole("GCOUNT", 1) != 1:
            raise _NotPlain
        self.size = (math.prod(axes) + extra) * abs(bits) // 8 if axes else 0
        self.place = start + math.ceil((stop + 80 - start) / 2880) * 2880
        self.end = self.place + math.ceil(self.size / 2880) * 2880
        if self.place + self.size > len(content):
            raise _NotPlain
        self.content = content
        self.dtype = np.dtype(f">{'f' if bits < 0 else 'i' if bits > 8 else 'u'}{abs(bits) // 8}")

    def _whole(self, key, most):
        value = self.header.get(key)
        if type(value) is not int or not 0 <= value <= most:
            raise _NotPlain
        return value

    @property
    def section(self):
        count = math.prod(self.shape)
        return np.frombuffer(self.content, self.dtype, count, self.place).reshape(self.shape)

    def fileinfo(self):
        return {"datLoc": self.place}


# %%
data = b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80)
data += b"NAXIS   =                    0".ljust(80) + _HEADER_END
empty = _PlainHdu(data.ljust(2880), 0, first=True)
print(empty.shape, empty.size, empty.end)
assert empty.is_image and empty.end == 2880


# %%
#| export
@contextmanager
def _hdus_of(content, needed=_MOST):
    """The HDUs of a file's bytes, so many as are needed at least: read directly where they are
    plain, by astropy otherwise."""
    try:
        hdus = [_PlainHdu(content, 0, first=True)]
        while len(hdus) < needed and content.startswith(b"XTENSION", hdus[-1].end):
            hdus.append(_PlainHdu(content, hdus[-1].end, first=False))
    except (_NotPlain, fits.VerifyError, KeyError):
        hdus = None
    if hdus is not None:
        yield hdus
        return
    with fits.open(BytesIO(content), lazy_load_hdus=True) as hdus:
        yield hdus


# %%
with _hdus_of(Path(example).read_bytes()) as plain, fits.open(example) as hdus:
    print(type(plain[0]).__name__, len(plain), plain[1].header["CRVAL1"], plain[1].shape)
    assert len(plain) == len(hdus) and isinstance(plain, list)
    for one, other in zip(plain, hdus, strict=True):
        assert one.is_image == other.is_image and one.size == other.size
        for key in ("NAXIS1", "CRVAL1", "BUNIT", "OBJID", "SNR", "RA", "XTENSION"):
            assert one.header.get(key) == other.header.get(key), key
    for k in (1, 2, 3):
        np.testing.assert_array_equal(plain[k].section[:], hdus[k].data)


# %% [markdown]
# Then one row of three HDUs, cut to the on-band pixels. For a star seen once both combinations are the same single spectrum, so rows 0 and 1 mean the
# same; row 2 and beyond ask for visits, and a file that has no such row says so. What the reader returns is in the machine's byte order (FITS is
# big-endian) and in our number types, whatever the release wrote.

# %%
#| export
class _Star(NamedTuple):
    "What one file gives."

    facts: dict
    flux: np.ndarray
    ivar: np.ndarray
    mask: np.ndarray | None
    row: int | None  # the row it was read from; None where files of the product have no rows


def _pixels(hdu, row):
    "On-band pixels of one row; an array without rows is the only row there is."
    if len(hdu.shape) == 1 or hdu.shape[0] == 1:
        if row > 1:
            raise _Wrong(
                f"row {row} does not exist: the star was seen once, and the file holds one spectrum"
            )
        data = hdu.section[:] if len(hdu.shape) == 1 else hdu.section[0, :]
    else:
        if row >= hdu.shape[0]:
            raise _Wrong(f"row {row} does not exist: the file has rows 0 to {hdu.shape[0] - 1}")
        data = hdu.section[row, :]
    return np.asarray(data)[on_band]


# %%
with fits.open(example) as hdus:
    print(_pixels(hdus[1], row=1)[:4])

# %%
#| export
_SEVEN_BITS = "damaged: each byte lost its first bit, as when sent as text; fetch it again"
_TINY = 1e-18  # the square of a smaller error is no number of single precision


def _checked_content(path, sha256):
    "Bytes of a file, the places of its HDUs, and whether a checksum was verified."
    content, stored, verified = _content(path)
    if sha256:
        if hashlib.sha256(stored).hexdigest() != sha256:
            raise _Wrong("damaged: its sha256 is not the one its archive knows; fetch it again")
        verified = True
    places = _chain(content)
    if not places:
        raise ValueError("not a FITS file")
    return content, places, _check_sums(content, places) or verified


def _read_star(path, product, row, sha256="") -> _Star:
    "The star of a file. Whatever is wrong with the file raises."
    content, places, verified = _checked_content(path, sha256)
    with _hdus_of(content, needed=4) as hdus:  # flux, error and mask are the first
        _check_whole(hdus, len(places), product)
        header = hdus[0].header
        _check_star(path, header)
        if row is None:
            row = _combined_row(path, header)
        flux = _pixels(hdus[product.flux], row)
        error = _pixels(hdus[product.error], row)
        mask = None if product.mask is None else _pixels(hdus[product.mask], row).astype(np.int32)
        facts = {fact.column: fact.read(header) for fact in _FACTS}
    if content.isascii() and flux.any():  # numbers of so many pixels use all eight bits
        raise _Wrong(_SEVEN_BITS)
    facts["FILE"] = os.path.basename(path)
    match = FILE_NAME.fullmatch(facts["FILE"])
    facts["APOGEE_ID"] = match["id"] if match else facts["APOGEE_ID"] or Path(path).stem
    ivar = inverse_variance(flux, error, product)
    strange = strange_pixels(flux, ivar, product.max_flux)
    strange |= (error > 0) & (error < _TINY)
    facts["STRANGE_PIXELS"] = int(strange.sum())
    facts["VERIFIED"] = verified
    if strange.any():
        flux = np.where(strange, 0, flux)
        ivar = np.where(strange, np.float32(0), ivar)
    with np.errstate(over="ignore"):
        flux = np.asarray(flux).astype(np.float32)
    flux = np.nan_to_num(flux, nan=0, posinf=0, neginf=0)
    return _Star(facts, flux, ivar, mask, None if product.normalized else row)


# %%
seen = _read_star(example, PRODUCTS["apstar"], row=None)
assert seen.flux.shape == seen.ivar.shape == seen.mask.shape == (7214,) and seen.row == 1
seen.facts


# %% [markdown]
# A file may also be whole and something else. Archives hold visits, catalogues and optical spectra next to the files that we want, all of them
# FITS; and who clones a repository may get a *pointer* of Git LFS, three lines of text in place of the file. Such files are named for what they are.

# %%
#| export
def _kind_of_fits(path):
    "What a FITS file is, in words, if it is well known; empty if not."
    try:
        with _glance(path) as hdus:
            if len(hdus) == 1:
                return _other_fits(path, hdus[0])
            second = hdus[1]
            names = [hdu.name for hdu in hdus[1:3]]
            columns = set() if second.is_image else {name.upper() for name in second.columns.names}
            product = _product_of_hdus(hdus) if len(hdus) > 3 else None
            shape = second.shape if second.is_image else None
            other = _other_fits(path, second)
    except Exception:  # whatever a damaged file makes astropy raise
        return ""
    if names[:1] == ["COADD"]:
        return "an optical spectrum of SDSS (spec-PLATE-MJD-FIBER), not one of APOGEE"
    if shape in ((3, 4096), (3, 2048)):
        return "an apVisit file, a single visit on the detectors' own pixels"
    if "APOGEE_ID" in columns:
        return _kind_of_table(columns)
    return f"a spectrum, an {product} file" if product else other


def _other_fits(path, hdu):
    "What an HDU holds, in words, if the file's name does not say that it is a star."
    if FILE_NAME.fullmatch(Path(path).name):
        return ""
    if hdu.is_image:
        return f"an image of {' x '.join(map(str, hdu.shape))} pixels" if hdu.shape else ""
    names = hdu.columns.names
    return f"a table of {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"


def _kind_of_table(columns):
    "allVisit tables know the fibre of each visit, allStar tables do not."
    if columns & {"VISIT_ID", "FIBERID"}:
        return "an allVisit table, one row per visit"
    return "an allStar table, a catalogue"


# %%
_kind_of_fits(example), _kind_of_table({"APOGEE_ID", "TEFF"})

# %%
#| export
_POINTER = b"version https://git-lfs.github.com/spec/v1"


def _reason(path, error, wanted="apStar or aspcapStar files"):
    "Why a file cannot be read, in words."
    other = what_stands_at(path)
    if other:
        return f"{other}{'' if other == 'a folder' else ', not a file'}: give {wanted}"
    try:
        with open(path, "rb") as file:
            start = file.read(80)
    except OSError as problem:
        return problem.strerror or str(problem)
    except ValueError:
        return "its name cannot be that of a file"
    if not start:
        return "empty"
    if start.startswith(_POINTER):
        return "a pointer of Git LFS, not the file itself: fetch it with 'git lfs pull'"
    if any(map(start.startswith, _PACKINGS)):
        problem = "" if isinstance(error, _Wrong) else _packing_problem(path)
        if problem:
            return problem
    elif not start.startswith(b"SIMPLE") and not start.startswith(_ZIPPED):
        return f"not a FITS file: it begins with {start[:20].decode('latin-1')!r}"
    kind = _kind_of_fits(path)
    is_wanted = ("allStar" in kind or kind.startswith("a table of")) and "allStar" in wanted
    is_wanted |= kind.startswith("a spectrum") and "apStar" in wanted
    is_wanted |= kind.startswith("an apVisit file") and "apVisit" in wanted
    if kind.startswith(("a table of", "an image of")):  # such may be wanted where spectra are
        is_wanted |= "apStar" not in wanted and "allStar" not in wanted
    if kind and not is_wanted:
        return f"{kind}: give {wanted}"
    return _in_words(error)


_ZIPPED = (b"\x1f\x9d",)  # a further packing, that of compress


def _in_words(error):
    "An error of any layer below in our words."
    if isinstance(error, (_Wrong, LabError)):
        return str(error)
    if isinstance(error, MemoryError):
        return "larger than the memory: its headers may be damaged"
    if isinstance(error, PermissionError) and error.strerror:
        return error.strerror
    return "damaged: its headers do not describe what is in it; fetch it again"


# %%
with tempfile.TemporaryDirectory() as folder:
    other = {name: Path(folder) / f"{name}.fits" for name in ("visit", "optical", "table", "lfs")}
    grid = fits.ImageHDU(np.zeros((3, 4096), "f4"))
    fits.HDUList([fits.PrimaryHDU(), grid]).writeto(other["visit"])
    coadd = fits.BinTableHDU(Table({"flux": [1.0], "loglam": [3.6]}), name="COADD")
    spall = fits.BinTableHDU(Table({"PLATE": [5094]}), name="SPALL")
    fits.HDUList([fits.PrimaryHDU(), coadd, spall]).writeto(other["optical"])
    Table({"APOGEE_ID": ["a"], "FIBERID": [88]}).write(other["table"])
    other["lfs"].write_bytes(_POINTER + b"\noid sha256:00\nsize 494336\n")
    reasons = {name: _reason(file, ValueError()) for name, file in other.items()}
Table({"file": list(reasons), "what the reader says": list(reasons.values())})


# %%
#| export
def _try_star(path, sha256="", product=None, row=None) -> _Star | Problem:
    "The star of a file, or what is wrong with the file."
    try:
        if what_stands_at(path):  # a pipe would keep whoever opens it
            raise _Wrong("not a file")
        with np.errstate(all="ignore"):  # damaged numbers may be of any kind
            return _read_star(path, product, row, sha256)
    except Exception as error:  # a damaged file can make any layer below raise anything
        return Problem(str(path), _reason(path, error))


# %%
assert isinstance(_try_star(example, product=PRODUCTS["apstar"]), _Star)
for path in (example.parent, os.devnull):
    print(_try_star(path, product=PRODUCTS["apstar"]).reason)


# %% [markdown]
# Other rooms read other files of a star: visits, the files of SDSS-V, spectra of one's own. They get the same look at the evidence.

# %%
#| exporti
@contextmanager
def checked_hdus(path, wanted="spectra"):
    """The HDUs of a FITS file of one star, of whatever kind, whose bytes are all there and fit all
    checksums that anybody noted.

    Parameters
    ----------
    path : path
        Of a file, packed or not.
    wanted : str, optional
        What should be given in place of a file of a known other kind.

    Yields
    ------
    hdus : HDUList
        Open until the block ends.
    verified : bool
        Whether a checksum was there to compare with.

    Raises
    ------
    LabError
        Where the file is damaged, or none; or where the block stumbles over what it holds.
    """
    try:
        if what_stands_at(path):
            raise _Wrong("not a file")
        content, places, verified = _checked_content(path, *known_sums([path]))
        _check_eight_bits(content, places)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", AstropyWarning)  # said by the reason
            with fits.open(BytesIO(content)) as hdus:
                yield hdus, verified
    except LabError:
        raise
    except Exception as error:  # a damaged file can make any layer below raise anything
        said = f"{Path(path).name}" if os.path.exists(path) else f"cannot read {path}"
        raise LabError(f"{said}: {_reason(path, error, wanted)}") from error


def _check_eight_bits(content, places):
    "Raise _Wrong if no byte uses its first bit, although there are numbers."
    numbers = any(content[place.data : place.data + place.size].strip(b"\0") for place in places)
    if numbers and b"XTENSION= 'TABLE" not in content and content.isascii():
        raise _Wrong(_SEVEN_BITS)


# %%
with checked_hdus(example) as (hdus, verified):
    print(f"{len(hdus)} HDUs of {hdus[0].header['OBJID']}; compared with a checksum: {verified}")
with pytest.raises(LabError, match="a folder: give spectra"), checked_hdus(example.parent):
    pass


# %% [markdown]
# ## Many files
# Room for all stars is made first, in float32, and each file goes straight into its row. Good stars close ranks: a damaged file leaves no hole. A
# few threads read ahead, so that waiting for one disk block or server does not stop the next. (Processes were tried, too: a file takes a few
# milliseconds, and starting processes and sending them back and forth cost more than a second core gains on some hundred files.)

# %%
#| export
class _Room:
    "Room for the stars of some files, filled row by row."

    def __init__(self, n_stars, product):
        shape = (n_stars, len(on_band))
        self.product = product
        self.flux = np.empty(shape, np.float32)
        self.ivar = np.empty(shape, np.float32)
        self.mask = None if product.mask is None else np.empty(shape, np.int32)
        self.facts = []
        self.rows = set()

    def add(self, star):
        n = len(self.facts)
        self.flux[n] = star.flux
        self.ivar[n] = star.ivar
        if self.mask is not None:
            self.mask[n] = star.mask
        self.facts.append(star.facts)
        self.rows.add(star.row)

    def spectra(self) -> Spectra:
        "What was filled, as spectra."
        n = len(self.facts)
        names = (*(fact.column for fact in _FACTS), "FILE", "STRANGE_PIXELS", "VERIFIED")
        stars = Table({name: [fact[name] for fact in self.facts] for name in names if n})
        stars.meta = {
            "product": self.product.name,
            "release": None,
            "archive": None,
            "normalized": self.product.normalized,
            "row": next(iter(self.rows)) if len(self.rows) == 1 else None,
        }
        mask = None if self.mask is None else self.mask[:n]
        return Spectra(wavelength, self.flux[:n], self.ivar[:n], stars, mask)


# %%
room = _Room(2, PRODUCTS["apstar"])
room.add(seen)
room.spectra()


# %%
#| exporti
def read_stars(
    paths, product, row=None, workers=None, keep=None, progress=True, sums=None
) -> tuple:
    """Spectra of files of one product, in their order, and what became of each file.

    `read_files` is the door for people; this one says also where each star came from.

    Parameters
    ----------
    paths : sequence of path
        F files.
    product : Product
        What they are, of `survey.PRODUCTS`.
    row : int, optional
        For apStar files: 0 and 1 are the combinations, the visits follow. By default that of each
        file's release.
    workers : int, optional
        Threads that read ahead, 4 by default.
    keep : ndarray, optional
        (F,) bool, whose spectra to keep; all by default. The others are opened, too.
    progress : bool, default True
        Show a bar.
    sums : sequence of str, optional
        (F,) sha256 of each file, "" where nobody knows it.

    Returns
    -------
    spectra : Spectra
        Of N good files. `stars.STRANGE_PIXELS` counts pixels of impossible flux or error, which
        have no weight; `stars.VERIFIED` says whether a checksum was verified. `stars.meta["row"]`
        is the row that was used, None if not one for all.
    places : ndarray
        (N,) their places in `paths`.
    problems : list of Problem
        Of the others.

    Raises
    ------
    LabError
        If `row` is no row.
    """
    if row is not None and (not isinstance(row, (int, np.integer)) or row < 0):
        raise LabError(
            f"row must be 0, 1, 2 … (0 and 1 are the combinations, the visits follow), not {row!r}"
        )
    keep = np.ones(len(paths), bool) if keep is None else keep
    room = _Room(keep.sum(), product)
    places, problems = [], []
    with warnings.catch_warnings(), ThreadPoolExecutor(workers or 4) as pool:
        warnings.simplefilter("ignore", AstropyWarning)  # said by the problem's reason
        read = partial(_try_star, product=product, row=row)
        stars = pool.map(read, paths, [""] * len(paths) if sums is None else sums)
        bar = {"desc": "reading", "unit": "file", "disable": not progress, "leave": False}
        for place, star in enumerate(tqdm(stars, total=len(paths), **bar)):
            if isinstance(star, Problem):
                problems.append(star)
            elif keep[place]:
                room.add(star)
                places.append(place)
    return room.spectra(), np.array(places, int), problems


# %%
spectra, places, problems = read_stars(
    ["nowhere.fits", example], PRODUCTS["apstar"], progress=False
)
assert list(places) == [1] and spectra.stars.meta["row"] == 1
problems


# %% [markdown]
# The door for people takes whatever names files: a path, a list of them, a folder, a pattern with stars and question marks.

# %%
#| export
def _files_named(paths, product):
    "The files that paths, folders and patterns name; LabError for one that names none."
    found = []
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        if Path(path).is_dir():
            found += _files_in(path, product)
        elif set("*?[") & set(str(path)) and not Path(path).exists():
            matches = sorted(glob(str(path), recursive=True))
            if not matches:
                raise LabError(f"no file matches the pattern {path}: write another, or a path")
            found += map(Path, matches)
        else:
            found.append(Path(path))
    return found


def _files_in(folder, product):
    "The stars' files in a folder and below, sorted, those of single visits left out."
    found = []
    for file in sorted(Path(folder).rglob("*Star-*.fits*")):
        match = FILE_NAME.fullmatch(file.name)
        combined = match and file.name[match.end("id") :].startswith(".fits")
        if combined and product in (None, product_of(file)):
            found.append(file)
    if not found:
        kind = "apStar or aspcapStar" if product is None else product
        raise LabError(
            f"the folder {folder} holds no {kind} file, neither does a folder in it "
            "(they are known by name): name its files one by one"
        )
    return found


# %%
assert _files_named(example, None) == [example]
[file.name for file in _files_named(example.parent, "apstar")[:2]]


# %%
#| export
def read_files(paths, product=None, row=None, workers=None, progress=True) -> tuple:
    """Read loose apStar or aspcapStar files of any release.

    Parameters
    ----------
    paths : path or sequence of paths
        Files in any order; folders (and the folders in them); patterns such as `"stars/*/*.fits"`.
    product : str, optional
        `apstar` or `aspcapstar`; from the files by default.
    row : int, optional
        For apStar files: 0 and 1 are the combinations, the visits follow. By default the one that
        each file's release means: row 1, in DR17 row 0, whose row 1 carries no flags.
    workers : int, optional
        Threads that read ahead, 4 by default.
    progress : bool, default True
        Show a bar.

    Returns
    -------
    spectra : Spectra
        Of the good files, in their order. `stars.meta["row"]` is the row that was used; None if it
        is not the same for all of them, or if such files have no rows.
    problems : list of Problem
        Of the other files, each with a sentence on what is wrong.

    Raises
    ------
    LabError
        If no file is good, or if they are of both kinds and `product` does not say which to take.

    Examples
    --------
    >>> from stellar_lab.survey import archive_root
    >>> some = find_files(archive_root(), "apstar")["path"][:3]
    >>> spectra, problems = read_files(some, progress=False)
    >>> spectra.stars.meta["product"], spectra.stars.meta["row"]
    ('apstar', 1)
    """
    paths = _files_named(paths, product)
    if product is None:
        kinds = {kind for kind in map(product_of, paths) if kind}
        if len(kinds) > 1:
            known = " and ".join(sorted(kinds))
            raise LabError(f"the files are of two kinds, {known}: choose one with product=…")
        product = kinds.pop() if kinds else "apstar"
    if product not in PRODUCTS:
        raise LabError(f"unknown product {product!r}: choose from {', '.join(PRODUCTS)}")
    spectra, _, problems = read_stars(paths, PRODUCTS[product], row, workers, progress=progress)
    if not len(spectra):
        raise LabError(f"none of {len(paths)} files is a good {product} file" + _first(problems))
    return spectra, problems


def _first(problems, n=3):
    "The first problems in words, for a sentence."
    more = f"; and {len(problems) - n} more" if len(problems) > n else ""
    return (": " + "; ".join(map(str, problems[:n])) + more) if problems else ": no file was given"


# %% [markdown]
# Three files of the archive, and what their headers say.

# %%
names_a_star = partial(record.rules.parse_name, "apstar")
paths = [path for path in sorted(example.parent.glob("apStar-*.fits")) if names_a_star(path.name)]
paths = paths[:3]
three, problems = read_files(paths, progress=False)
three.stars["APOGEE_ID", "TELESCOPE", "FIELD", "SNR", "NVISITS", "H", "RA", "DEC"]

# %% [markdown]
# The reference implementation is the plain way, one whole array after the other. It has to give the same numbers, whatever we did to be fast.

# %%
for n, path in enumerate(paths):
    flux, error, mask = (np.atleast_2d(fits.getdata(path, hdu))[:, on_band] for hdu in (1, 2, 3))
    k = min(1, len(flux) - 1)  # one visit: one row
    usable = error[k] < 1e10
    assert np.array_equal(three.flux[n], flux[k]) and np.array_equal(three.mask[n], mask[k])
    assert np.array_equal(three.ivar[n] > 0, usable)
    assert np.allclose(three.ivar[n][usable], 1 / error[k][usable].astype(float) ** 2, rtol=1e-6)

# %% [markdown]
# Now we damage copies of the first one on purpose. The healthy file among them comes through, each of the others gets its reason.

# %%
whole = paths[0].read_bytes()
damaged = {
    "a": whole,
    "b": whole[: len(whole) // 2],
    "c": b"<html>404 Not Found</html>",
    "d": b"",
    "e": whole.replace(b"CDELT1  =", b"CDELT9  ="),
}
with tempfile.TemporaryDirectory() as folder:
    files = [Path(folder) / f"apStar-r8-{name}.fits" for name in damaged]
    for file, content in zip(files, damaged.values(), strict=True):
        file.write_bytes(content)
    spectra, problems = read_files(folder, progress=False)
    with pytest.raises(LabError, match="none of 1 files is a good apstar file: apStar-r8-d.fits"):
        read_files(files[3:4], progress=False)
print(*problems, sep="\n")

# %%
assert list(spectra.stars["APOGEE_ID"]) == ["a"] and len(problems) == 4
assert np.array_equal(spectra.flux[0], three.flux[0])


# %% [markdown]
# And back again: spectra written into a file of the same layout and read once more are the same spectra. A weight becomes an error and a weight
# again, so it may move in its last digit; a pixel without weight must stay one.

# %%
#| hide
def write_apstar(path, spectra):
    "One star as the simplest whole apStar file: one visit, arrays without rows, full grid."
    on_grid = np.zeros((3, N_PIXELS))
    with np.errstate(divide="ignore"):
        error = np.where(spectra.ivar[0] > 0, spectra.ivar[0] ** -0.5, 1e10)
    on_grid[:, on_band] = [spectra.flux[0], error, spectra.mask[0]]
    grid = fits.Header({"CRVAL1": LOG10_START, "CDELT1": LOG10_STEP})
    cards = {"OBJID": "APOGEE_ID", "SNR": "SNR", "LOCID": "LOCATION_ID", "H": "H"}
    header = fits.Header({card: spectra.stars[0][name] for card, name in cards.items()})
    kinds = zip(on_grid, ("f4", "f4", "i2"), strict=True)
    images = [fits.ImageHDU(values.astype(kind), grid) for values, kind in kinds]
    rest = [fits.ImageHDU() for _ in range(6)]
    fits.HDUList([fits.PrimaryHDU(header=header), *images, *rest]).writeto(path)


# %%
with tempfile.TemporaryDirectory() as folder:
    nameless = Path(folder) / "once.fits"
    write_apstar(nameless, three[:1])
    again, problems = read_files(nameless, progress=False)
assert not problems and np.array_equal(again.flux, three.flux[:1])
assert np.array_equal(again.mask, three.mask[:1])
assert np.array_equal(again.ivar > 0, three.ivar[:1] > 0)
assert np.allclose(again.ivar, three.ivar[:1], rtol=1e-6)
for name in ("APOGEE_ID", "SNR", "LOCATION_ID", "H"):
    assert again.stars[name][0] == three.stars[name][0]
again


# %% [markdown]
# ## Finding the files
# Where files are is data: the release's templates, turned into folders. A folder may follow the survey's tree or one of the other layouts that the
# record knows, such as the original lab's `stars/<location>/`. Files of single visits are left out.

# %%
#| exporti
def find_files(root, product="apstar", fields=None, telescopes=None, release=None) -> Table:
    """The stars' files of an archive.

    Parameters
    ----------
    root : path
        Of an archive.
    product : str, default "apstar"
        `apstar` or `aspcapstar`; `mwmstar` or `mwmvisit` of SDSS-V.
    fields : str or sequence of str, optional
        Names of folders; those of the archive's record by default, "all" for whatever is there.
        SDSS-V has none: all stars are found.
    telescopes : str or sequence of str, optional
        All of the release's by default.
    release : str, optional
        A key of `survey.RELEASES`; the record's by default.

    Returns
    -------
    Table
        `path`, `TELESCOPE`, `FOLDER` and `APOGEE_ID` of each star's file, sorted; maybe no rows. A
        star that stands in several layouts is taken from the first.

    Raises
    ------
    LabError
        If the release or the product is not known.
    """
    record = archive_record(root)
    rules = _rules(record, release)
    if fields is None and rules is record.rules:
        fields = record.fields
    if rules.numbered:
        fields = ["*/*"]
    elif fields is None or (isinstance(fields, str) and fields == "all"):
        fields = ["*"]
    else:
        fields = [escape(str(name)) for name in np.atleast_1d(fields)]
    telescopes = list(np.atleast_1d(rules.telescopes if telescopes is None else telescopes))
    found = {}
    for template in rules.templates(product):
        for telescope, folder in _folders(Path(root), template, fields, telescopes):
            for entry in sorted(os.listdir(folder)):
                star = rules.parse_name(product, entry)
                if star:
                    found.setdefault((telescope, folder.name, star), str(folder / entry))
    rows = [(path, *key) for key, path in found.items()]
    names = ("path", "TELESCOPE", "FOLDER", "APOGEE_ID")
    return Table({name: np.array([row[k] for row in rows], str) for k, name in enumerate(names)})


def _folders(root, template, fields, telescopes):
    "Folders of a template that exist, with the telescope (the first where it names none)."
    parent = str(PurePosixPath(template).parent)
    for telescope in telescopes if "{telescope}" in parent else telescopes[:1]:
        for name in fields:
            for folder in sorted(root.glob(parent.format(telescope=telescope, field=name))):
                if folder.is_dir():
                    yield str(telescope), folder


def _rules(record, release):
    "The release of that name, the record's without one."
    if release is None:
        return record.rules
    if str(release).lower() not in RELEASES:
        raise LabError(f"unknown release {release!r}: choose from {', '.join(RELEASES)}")
    return RELEASES[str(release).lower()]


# %%
files = find_files(root)
folders, number = np.unique(files["FOLDER"], return_counts=True)
Table({"folder": folders, "files": number})

# %% [markdown]
# A record is all it takes to read another release. An empty file under the name that DR17 gives to a southern star of the second telescope is
# found, a single visit is not.

# %%
names = ("2M01020000-7100000.fits", "2M01020000-7100000-58000.fits", "2M01020000-7100000.png")
with tempfile.TemporaryDirectory() as folder:
    here = Path(folder) / "dr17/apogee/spectro/redux/dr17/stars/lco25m/N362"
    here.mkdir(parents=True)
    for name in names:
        (here / f"asStar-dr17-{name}").touch()
    there = find_files(folder, release="dr17")
assert not np.char.endswith(files["path"], "-56931.fits").any()
assert list(there["APOGEE_ID"]) == ["2M01020000-7100000"]
there["TELESCOPE", "FOLDER", "APOGEE_ID"]


# %% [markdown]
# The catalogue is found in the same way: the survey's place first, then that of the original lab.

# %%
#| exporti
def find_catalogue(root, release=None) -> Path:
    """The allStar table of an archive.

    Parameters
    ----------
    root : path
        Of an archive.
    release : str, optional
        A key of `survey.RELEASES`; the record's by default.

    Returns
    -------
    Path
        The table, packed (.gz) or not.

    Raises
    ------
    LabError
        If there is none.
    """
    rules = _rules(archive_record(root), release)
    templates = rules.templates("allstar")
    for template in templates:
        for suffix in ("", ".gz"):
            path = Path(root) / (template + suffix)
            if path.is_file():
                return path
    raise LabError(
        f"no allStar table below {root}: looked for {', '.join(templates)}; "
        "fetch it with 'stellar-lab fetch'"
    )


# %%
find_catalogue(root).relative_to(root)

# %% [markdown]
# ## The catalogue
# The survey's allStar table of DR14 has 263,000 rows of several hundred columns, 1.5 GB, of which we need twenty columns. It is mapped into memory,
# not read, and only these columns are copied, block by block, in the machine's own byte order. A value at or below -9000 means "none" and becomes
# NaN, a number that no comparison lets pass: a forgotten cut cannot mistake -9999 for a very cool star. Labels get their units.
#
# First the columns. A label's column went by different names over the years, and its record in `survey` lists them: the first one that the table has
# counts, and its error is the column of the same name with `_ERR` behind it. What is not there is said at once, with what is, before a single file has
# been read.

# %%
#| export
_KEYS = ("APOGEE_ID", "TARGET_ID", "TELESCOPE", "FIELD", "LOCATION_ID")  # to find a row by
_TEXT_KEYS = ("APOGEE_ID", "TARGET_ID", "TELESCOPE", "FIELD")
_FLAGS = ("STARFLAG", "ASPCAPFLAG")  # a cut may ask for them
_NEAREST = {
    "FE_H": "M_H",
    "M_H": "FE_H",
    "MG_FE": "ALPHA_M",
    "SI_FE": "ALPHA_M",
    "ALPHA_M": "MG_FE",
}  # where one catalogue has no such label, the other's that says most of it


def _label_columns(path, known, labels):
    "label -> {label: its column, label_ERR: its error's column or None}"
    pairs = {name: _pair(label, known) for name, label in LABELS.items()}
    has = {name: pair for name, pair in pairs.items() if pair}
    if labels is None:
        return has
    names = [label.name for label in label_records(labels)]
    lacking = [name for name in names if name not in has]
    if lacking:
        tried = ", ".join(column for name in lacking for column in LABELS[name].columns)
        raise LabError(
            f"{path} has no label {', '.join(lacking)} (looked for the columns {tried}): "
            f"it has {', '.join(has) or 'none'}{_nearest_labels(lacking, has)}"
        )
    return {name: has[name] for name in names}


def _nearest_labels(lacking, has):
    "Which of the labels that are there comes nearest to one that is not."
    pairs = [(_NEAREST[name], name) for name in lacking if _NEAREST.get(name) in has]
    return "".join(f"; {near} comes nearest to {name}" for near, name in pairs)


def _pair(label, known):
    "Columns of a label's value and error, by their names here; None if the table has no value."
    for column, error in zip(label.columns, label.errors, strict=True):
        if column in known:
            return {label.name: known[column], f"{label.name}_ERR": known.get(error)}
    return None


def _column(path, known, name):
    "The table's own spelling of a column."
    if name.upper() not in known:
        raise LabError(f"{path} has no column {name}: a cut needs it")
    return known[name.upper()]


# %%
old_names = {name: name for name in ("TEFF", "PARAM_M_H", "PARAM_M_H_ERR")}
_label_columns("an old table", old_names, None)

# %% [markdown]
# A column holds what its type and its unit say, and both are looked at. One number per star is needed: text, complex numbers or arrays are refused
# before anything is read. A temperature in kilokelvin becomes one in kelvin; a gravity in m/s², which is no logarithm, is refused. (The survey's own
# tables name no units; then the values are taken as what they are called.)

# %%
#| export
_HELD = {"A": "text", "C": "complex numbers", "M": "complex numbers", "L": "truth values"}
_HELD |= {"P": "arrays of varying length", "Q": "arrays of varying length", "X": "bits"}


def _check_types(path, columns, texts, numbers):
    "LabError unless each of some columns of a FITS table holds one text, or one number, per star."
    for names, letters, need in ((texts, "A", "text"), (numbers, "BIJKED", "number")):
        for name in names:
            form = re.match(r"(\d*)([A-Z])", columns[name].format)
            repeat = 1 if form[2] == "A" or form[1] == "" else int(form[1])
            held = _HELD.get(form[2], "numbers" if need == "text" else "")
            if columns[name].dim or repeat != 1:
                held = "arrays"
            if held and (form[2] not in letters or held == "arrays"):
                raise LabError(
                    f"{path}: the column {name} holds {held}; one {need} per star is needed"
                )


def _converted(path, name, values, unit, label):
    "Values of a label, or of its error, in the label's unit; LabError if the unit is another."
    text = str(unit or "").strip()
    if text in ("", str(label.unit)):
        return values
    is_error = name.endswith("_ERR")
    if label.unit == u.dex:
        shift = _dex_shift(text, label)
        if shift is not None:
            return values + (0 if is_error else shift)
    else:
        known = u.Unit({"KELVIN": "K", "DEG_K": "K"}.get(text.upper(), text), parse_strict="silent")
        if is_error and known == u.deg_C:
            return values
        if known.is_equivalent(label.unit) or known == u.deg_C:
            return known.to(label.unit, values, equivalencies=u.temperature())
    raise LabError(
        f"{path}: the column {name} is in {text!r}, which does not become {label.unit}: "
        "convert it, and write the table again"
    )


def _dex_shift(text, label):
    "What a logarithm in another unit needs added; None if the unit is not that of a logarithm."
    plain = re.sub(r"[\s()\[\].*^_-]|10", "", text.lower())
    if plain in ("", "dex", "log", "logarithm", "dexsolar", "logsolar", "sun", "solar"):
        return 0.0
    is_log = text.lower().startswith(("dex", "log", "["))
    if label.name != "LOGG" or not is_log:
        return None
    unit = plain.removeprefix("dex").removeprefix("log")
    return {"cgs": 0.0, "cm/s2": 0.0, "cms2": 0.0, "m/s2": 2.0, "ms2": 2.0, "si": 2.0}.get(unit)


# %%
for text in ("kK", "K", "deg_C", ""):
    print(
        f"TEFF 4.5 in {text!r}:",
        _converted("a table", "TEFF", np.array([4.5]), text, LABELS["TEFF"]),
    )
for text in ("dex", "log(cgs)", "[cm/s2]", "log10(cm s^-2)", "[-]", "log (cgs)"):
    assert _dex_shift(text, LABELS["LOGG"]) == 0, text
assert _dex_shift("dex(m/s2)", LABELS["LOGG"]) == 2 and _dex_shift("%", LABELS["M_H"]) is None
with pytest.raises(LabError, match="LOGG is in 'm/s2', which does not become dex") as refusal:
    _converted("a table", "LOGG", np.array([2.5]), "m/s2", LABELS["LOGG"])
print(refusal.value)


# %% [markdown]
# "No value" is written in more than one way: -9999 in a column of whole numbers, too, or any number that the column's card `TNULL` names. Labels, errors
# and SNR become numbers with a comma, NaN where there is none; of the other whole numbers, such as flags, the unknown ones are masked.
#
# The columns lie scattered through the rows, so even a few of them touch every page of the file. Mapping it anew for each block of rows lets go of
# the pages of the block before: what stays in memory are the copies.

# %%
#| export
def _copy_columns(path, sources, rows, block, numbers=()):
    "Copies of some columns, a block of rows at a time so that no more than a block is resident."
    step = rows if _opener(path) else block  # what is packed has to be unpacked whole
    blocks = []
    for start in range(0, rows, step):
        with fits.open(path, memmap=True) as hdus:
            data = hdus[1].data[start : start + step]
            nulls = {name: hdus[1].columns[source].null for name, source in sources.items()}
            blocks.append(
                {
                    name: _native(data[source], nulls[name], name in numbers)
                    for name, source in sources.items()
                }
            )
    return Table({name: np.ma.concatenate([part[name] for part in blocks]) for name in sources})


def _native(values, null=None, as_number=False):
    "A copy in the machine's byte order; text without padding, missing values NaN or masked."
    values = np.asarray(values)
    if values.dtype.kind in "SU":
        return np.char.strip(values.astype(str))
    is_null = values == null if isinstance(null, (int, np.integer)) else np.zeros(len(values), bool)
    if values.dtype.kind == "f" or as_number:
        values = values.astype(np.float64)
        return np.where((values <= _MISSING) | is_null, np.nan, values)
    is_null |= values == int(_NO_NUMBER)
    values = values.astype(values.dtype.newbyteorder("="))
    return np.ma.array(values, mask=is_null) if is_null.any() else values


_NO_NUMBER = -9999  # among whole numbers; flags may be below it, for their highest bit is the sign

# %%
whole = np.array([4500, -9999, 7], ">i4")
print(_native(whole, null=7, as_number=True), _native(whole, null=7), _native(whole[:1]))
some = _copy_columns(find_catalogue(root), {"star": "APOGEE_ID", "H": "H"}, rows=3, block=2)
some["H"].info.format = ".3f"
some


# %% [markdown]
# A table may be broken, or another one: an allVisit table has the same names and one row per visit, so a star would be there several times.

# %%
#| export
@contextmanager
def _catalogue_errors(path):
    "Whatever reading a table raises becomes a LabError that says what the file is."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)  # said by the error
        try:
            yield
        except LabError:
            raise
        except Exception as error:  # a damaged file can make any layer below raise anything
            reason = _reason(path, error, "the allStar table, one row per star")
            remedy = "" if "give the" in reason or "fetch it" in reason else ": fetch it again"
            raise LabError(f"{path} is not a whole allStar table ({reason}){remedy}") from error


def _check_table(path):
    "Raise _Wrong unless the bytes of a table are all there, and fit their checksums."
    other = what_stands_at(path)
    problem = f"{other}, not a file" if other else _packing_problem(path)
    if problem:
        raise _Wrong(problem)
    _check_sane(path)
    if _opener(path) is None:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            _check_sums(content, _chain(content))


def _columns_of(path):
    "Names of a table's columns (upper case -> as written), its number of rows, its columns."
    with _catalogue_errors(path):
        _check_table(path)
        with fits.open(path, memmap=True) as hdus:
            columns = hdus[1].columns
            known = {name.upper(): name for name in columns.names}
            rows = hdus[1].header["NAXIS2"]
    kind = _kind_of_table(set(known)) if "APOGEE_ID" in known else _kind_of_fits(path)
    if kind and "allStar" not in kind and not kind.startswith("a table of"):
        raise LabError(f"{path} is {kind}: give the allStar table, one row per star")
    if "APOGEE_ID" not in known or not rows:
        lacks = "no rows" if not rows else "no column APOGEE_ID"
        raise LabError(f"{path} is not an allStar table: it has {lacks}")
    return known, rows, columns


# %%
with tempfile.TemporaryDirectory() as folder:
    visits = Path(folder) / "allVisit.fits"
    Table({"APOGEE_ID": ["a", "a"], "VISIT_ID": ["1", "2"]}).write(visits)
    with pytest.raises(LabError, match="an allVisit table, one row per visit") as refusal:
        _columns_of(visits)
print(str(refusal.value).replace(folder, "…"))


# %% [markdown]
# Cuts may need a column that is no label of this run, such as $\log g$ when only temperatures are asked for. It is read as well, but `meta["labels"]`
# remembers what was asked for, so that no model is trained on it by accident. The two flags of a star are read wherever a table has them.

# %%
#| export
def read_catalogue(path, labels=None, columns=(), block=8192) -> Table:
    """The needed columns of an allStar table of any release.

    Parameters
    ----------
    path : path
        The table, .fits or .fits.gz.
    labels : sequence of str, optional
        Label names; all that the table has by default.
    columns : sequence of str, default ()
        Further labels or columns, for cuts.
    block : int, default 8192
        Rows that are mapped into memory at a time.

    Returns
    -------
    Table
        Keys, SNR, STARFLAG and ASPCAPFLAG where the table has them; labels and their errors with
        units, NaN where there is no value. `meta["labels"]` are the label names.

    Raises
    ------
    LabError
        If the file is broken or another table, lacks a label or column, or one of them holds
        something else than a number per star or is in a unit that cannot be converted.
    """
    known, rows, columns_there = _columns_of(path)
    wanted = _label_columns(path, known, labels)
    extra = [name for name in columns if name in LABELS and name not in wanted]
    extra = _label_columns(path, known, extra)
    sources = {name: known[name] for name in (*_KEYS, "SNR", *_FLAGS) if name in known}
    sources |= {name: _column(path, known, name) for name in columns if name not in LABELS}
    numbers = {}
    for pair in (wanted | extra).values():
        numbers |= {name: source for name, source in pair.items() if source}
    sources |= numbers
    texts = [sources[name] for name in _TEXT_KEYS if name in sources]
    plain = [sources[name] for name in (*numbers, *columns, "SNR", *_FLAGS) if name in sources]
    _check_types(path, columns_there, texts, plain)
    with _catalogue_errors(path):
        table = _copy_columns(path, sources, rows, block, numbers.keys() | {"SNR"})
    for name, source in numbers.items():
        unit = columns_there[source].unit or columns_there[source.removesuffix("_ERR")].unit
        label = LABELS[name.removesuffix("_ERR")]
        table[name] = _converted(path, name, np.asarray(table[name]), unit, label)
    for name in (*wanted, *extra):
        _give_unit(table, name)
    table.meta = {"labels": list(wanted), "catalogue": Path(path).name}
    return table


def _give_unit(table, name):
    "Units for a label and its error; NaN for errors that are no errors (older tables write -1)."
    unit = LABELS[name].unit
    known = f"{name}_ERR" in table.colnames
    error = np.asarray(table[f"{name}_ERR"]) if known else np.full(len(table), np.nan)
    table[name] = Column(table[name], unit=unit)
    table[f"{name}_ERR"] = Column(np.where(error > 0, error, np.nan), unit=unit)


# %%
catalogue = read_catalogue(find_catalogue(root), record.labels)
first, third = record.labels[0], record.labels[2]
shown = catalogue["APOGEE_ID", "LOCATION_ID", "SNR", first, f"{first}_ERR", third][:4]
for name in shown.colnames[2:]:
    shown[name].info.format = ".5g"
shown

# %% [markdown]
# Not every release has every label: DR12 wrote [Mg/H], not [Mg/Fe]. Then the error says what was looked for and what there is.

# %%
made = {
    "APOGEE_ID": ["2M00004994+1621552"],
    "TEFF": [4705.0],
    "PARAM_M_H": [-9999.0],
    "MG_H": [0.0],
}
with tempfile.TemporaryDirectory() as folder:
    old = Path(folder) / "allStar-v603.fits"
    Table(made).write(old)
    table = read_catalogue(old)
    with pytest.raises(
        LabError, match=r"no label MG_FE \(looked for the columns MG_FE\)"
    ) as refusal:
        read_catalogue(old, ["TEFF", "MG_FE"])
assert table.meta["labels"] == ["TEFF", "M_H"]
assert np.isnan(table["M_H"][0]) and np.isnan(table["TEFF_ERR"][0])
assert table["TEFF"].unit == "K" and not np.any(catalogue["SNR"] < -9000)
print(str(refusal.value).replace(folder, "…"))


# %% [markdown]
# ## Files meet rows
# Which row is a file's? The survey's own key, TARGET_ID, holds field and star, as the release's template says. Where a table uses it otherwise,
# telescope, field and star together do the same. The star's name alone is the last resort, for a file whose folder is no field of the catalogue.
#
# All of it is one sort and one binary search, not a scan of the table for every star: with $N$ files and $M$ rows a scan costs $N M$ comparisons of
# strings, sorting and bisecting about $(M+N)\log M$. `np.unique` sorts, tells where each key stood first and how often it occurred, which is the number
# of duplicates.

# %%
#| export
def _look_up(keys, offered):
    "For each of `keys` the first place in `offered` and how many there are."
    if not len(offered):
        return np.full(len(keys), -1), np.zeros(len(keys), int)
    unique, first, count = np.unique(offered, return_index=True, return_counts=True)
    place = np.minimum(np.searchsorted(unique, keys), len(unique) - 1)
    hit = unique[place] == keys
    return np.where(hit, first[place], -1), np.where(hit, count[place], 0)


# %%
_look_up(np.array(["b", "x"]), np.array(["c", "b", "a", "b"]))


# %% [markdown]
# And the three kinds of key, from the surest to the weakest. Each is tried only on the stars that the ones before left without a row.

# %%
#| export
def _text(values):
    return np.asarray(values).astype(str)


def _fill(template, **parts):
    "`template.format` for arrays of strings."
    text = np.array("")
    for literal, name, _, _ in Formatter().parse(template):
        text = np.char.add(text, literal)
        if name is not None:
            text = np.char.add(text, parts[name])
    return text


def _joined(*columns):
    "One key of several columns of text."
    names = "abc"[: len(columns)]
    template = "\n".join(f"{{{name}}}" for name in names)
    return _fill(template, **dict(zip(names, columns, strict=True)))


def _keys(stars, catalogue, near, rules):
    "Keys of the stars, keys of the rows `near`, and to which stars they apply; the surest first."
    everyone = np.ones(len(stars), bool)
    columns = {name: _text(catalogue[name]) for name in _KEYS if name in catalogue.colnames}
    ids, folders, telescopes = (_text(stars[name]) for name in ("APOGEE_ID", "FOLDER", "TELESCOPE"))
    if "TARGET_ID" in columns:
        targets = _fill(rules.target_id, telescope=telescopes, field=folders, id=ids)
        yield targets, columns["TARGET_ID"][near], everyone
    known = np.zeros(len(stars), bool)
    for name in ("FIELD", "LOCATION_ID"):
        if name in columns:
            known |= np.isin(folders, columns[name])
            of_stars = (folders, ids)
            of_rows = (columns[name][near], columns["APOGEE_ID"][near])
            if "TELESCOPE" in columns:
                of_stars = (telescopes, *of_stars)
                of_rows = (columns["TELESCOPE"][near], *of_rows)
            yield _joined(*of_stars), _joined(*of_rows), everyone
    yield ids, columns["APOGEE_ID"][near], ~known


# %%
_joined(np.array(["4230", "4262"]), np.array(["a", "b"]))


# %% [markdown]
# Rows of the same target are put in order of falling SNR before, so the first one found is the best. (The original lab's text said the lowest; its aim
# was the best measurement.)

# %%
#| exporti
def match_catalogue(stars, catalogue, rules) -> tuple:
    """The row of each star, that with the highest SNR.

    Parameters
    ----------
    stars : Table
        N rows: APOGEE_ID, TELESCOPE, FOLDER, as `find_files` gives them.
    catalogue : Table
        Of `read_catalogue`.
    rules : Release
        Says what TARGET_ID looks like.

    Returns
    -------
    rows : ndarray
        (N,) row of the catalogue, -1 where there is none.
    further : ndarray
        (N,) how many further rows the same target has.
    """
    ids = np.asarray(stars["APOGEE_ID"], str)
    near = np.flatnonzero(np.isin(catalogue["APOGEE_ID"], ids))
    snr = np.asarray(catalogue["SNR"])[near] if "SNR" in catalogue.colnames else np.zeros(len(near))
    near = near[np.argsort(-np.nan_to_num(snr, nan=-np.inf), kind="stable")]
    rows = np.full(len(stars), -1)
    further = np.zeros(len(stars), int)
    for keys, offered, applies in _keys(stars, catalogue, near, rules):
        place, count = _look_up(keys, offered)
        new = applies & (rows < 0) & (place >= 0)
        rows[new] = near[place[new]]
        further[new] = count[new] - 1
    return rows, further


# %%
stars = Table(
    {
        "APOGEE_ID": ["a", "b", "c", "d"],
        "TELESCOPE": ["apo25m"] * 4,
        "FOLDER": ["4230", "4230", "4230", "elsewhere"],
    }
)
rows = Table(
    {
        "TARGET_ID": ["4230.a", "4230.a", "x", "9.c", "9.d"],
        "TELESCOPE": ["apo25m"] * 5,
        "LOCATION_ID": [4230, 4230, 4230, 9, 9],
        "APOGEE_ID": ["a", "a", "b", "c", "d"],
        "SNR": [60.0, 90.0, 70.0, 80.0, 80.0],
    }
)
match_catalogue(stars, rows, RELEASES["dr14"])

# %% [markdown]
# Star *a* gets the better of its two rows, *b* is found by field and name, *d* by its name alone. Star *c* has a row, but in another field: that is
# another observation, and *c* goes without.

# %%
place, further = match_catalogue(stars, rows, RELEASES["dr14"])
assert list(place) == [1, 2, -1, 4] and list(further) == [1, 0, 0, 0]

# %% [markdown]
# The reference implementation of the join is what the original lab did: for every star a scan through the whole table. It must find the same row.

# %%
rows, further = match_catalogue(files, catalogue, record.rules)
for n in range(0, len(files), max(len(files) // 50, 1)):
    target = record.rules.target_id.format(
        telescope=files["TELESCOPE"][n], field=files["FOLDER"][n], id=files["APOGEE_ID"][n]
    )
    same = np.flatnonzero(np.asarray(catalogue["TARGET_ID"]) == target)
    best = same[np.argmax(catalogue["SNR"][same])] if len(same) else -1
    assert rows[n] == best and further[n] == max(len(same) - 1, 0)


# %% [markdown]
# ## Dark pixels
# Chip edges move with the star's velocity, so a pixel may see nothing in one star and the full light in the others. The original lab's rule: a pixel
# below 5 % of its median over all stars is unusable. Taken literally it compares a faint star with bright ones, and stars of the archive differ by a
# factor of hundreds. So we divide each star by its own median $m_n$ over usable pixels first,
# $$ \frac{f_{np}}{m_n} < 0.05\;\operatorname{median}_{k}\frac{f_{kp}}{m_k} \quad\Rightarrow\quad w_{np}=0 , $$
# which no longer depends on how bright the companions happen to be.
#
# The rule needs medians over usable pixels only. Unusable ones become NaN, sorting puts them last, and the middle of the rest is where half their
# number says. (numpy's own `nanmedian` does the same ten times slower, and warns where there is nothing.)

# %%
#| exporti
def nan_median(values, axis: int = -1) -> np.ndarray:
    """Median of the finite values along one axis.

    Parameters
    ----------
    values : array_like
        Floating-point numbers of any shape; what is NaN or infinite does not count.
    axis : int, default -1
        The axis to go along.

    Returns
    -------
    ndarray
        The shape of `values` without the axis, in their precision. NaN where nothing is finite.

    Examples
    --------
    >>> nan_median(np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]]))
    array([ 2., nan])
    """
    ordered = np.where(np.isfinite(values), values, np.nan)
    ordered.sort(axis=axis)  # NaN last
    count = np.isfinite(ordered).sum(axis=axis, keepdims=True)
    last = ordered.shape[axis] - 1
    lower = np.take_along_axis(ordered, np.maximum(count - 1, 0) // 2, axis=axis)
    upper = np.take_along_axis(ordered, np.minimum(count // 2, last), axis=axis)
    return np.squeeze(0.5 * (lower + upper), axis=axis)


# %%
numbers = np.random.default_rng(0).normal(size=(4, 7, 5)).astype("f4")
numbers[numbers > 1] = np.nan
for axis in (0, 1, 2):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's about slices of NaN
        slow = np.nanmedian(numbers, axis=axis)
    assert np.array_equal(nan_median(numbers, axis), slow, equal_nan=True)
nan_median(numbers, axis=1)


# %% [markdown]
# With it the rule is a few lines. Blocks of pixels keep the copies small, some megabytes instead of a second set of spectra.

# %%
#| exporti
def dark_pixels(flux, ivar, fraction=0.05, block=256) -> np.ndarray:
    """Pixels that see much less of their star than they see of others.

    Parameters
    ----------
    flux, ivar : ndarray
        (N, P).
    fraction : float, default 0.05
        A pixel is dark below this fraction of its median over stars, each star relative to its own
        median.
    block : int, default 256
        Stars or pixels in work at a time.

    Returns
    -------
    ndarray
        (N, P) bool. One star alone has no dark pixels: there is nobody to compare it with.
    """
    dark = np.zeros(flux.shape, bool)
    if len(flux) < 2:
        return dark
    starts = range(0, len(flux), block)
    usable = (np.where(ivar[a : a + block] > 0, flux[a : a + block], np.nan) for a in starts)
    level = np.concatenate([nan_median(values, axis=1) for values in usable])
    # Without a level a star neither judges nor is judged.
    level = np.where(level > 0, level, np.nan).astype(np.float32)[:, None]
    for start in range(0, flux.shape[1], block):
        pixels = slice(start, start + block)
        relative = flux[:, pixels] / level
        usable = np.where(ivar[:, pixels] > 0, relative, np.nan)
        typical = nan_median(usable.T, axis=1)
        with np.errstate(invalid="ignore"):
            dark[:, pixels] = relative < fraction * typical
    return dark


def drop_dark_pixels(spectra: Spectra, fraction=0.05) -> Spectra:
    "The spectra with weight 0 on dark pixels; all but `ivar` is shared. See `dark_pixels`."
    dark = dark_pixels(spectra.flux, spectra.ivar, fraction)
    return spectra.replace(ivar=np.where(dark, np.float32(0), spectra.ivar))


# %% [markdown]
# Six stars with the same spectrum, each ten times fainter than the one before; one pixel of the third is dark. The rule finds that pixel and no
# other.

# %%
level = 10.0 ** -np.arange(6)[:, None]
toy = (level * np.random.default_rng(1).uniform(0.5, 1.5, (6, 400))).astype("f4")
toy[2, 7] *= 1e-3
weight = np.ones_like(toy)
weight[:, 50] = 0  # a pixel that nobody has measured judges nobody
assert not dark_pixels(toy[:1], weight[:1]).any()  # a star alone has nobody to be compared with
assert np.array_equal(np.argwhere(dark_pixels(toy, weight)), [[2, 7]])
np.argwhere(dark_pixels(toy, weight))

# %% [markdown]
# The reference implementation is numpy's own median of the usable values, pixel by pixel.

# %%
usable = np.where(weight > 0, toy, np.nan)
relative = usable / np.nanmedian(usable, axis=1)[:, None]
slow = [relative[:, p] < 0.05 * np.nanmedian(relative[:, p]) for p in range(400) if p != 50]
assert np.array_equal(np.delete(dark_pixels(toy, weight), 50, axis=1), np.transpose(slow))


# %% [markdown]
# ## An archive
# All of it together: find, match, read, darken. The result are the stars that have a file and a row, with the labels that the archive's record asks
# for. Nothing in it depends on which archive this is: labels, fields, cuts and paths come from the record that stands at the root.
#
# First the helpers: which files; which rows of the catalogue have none; and the table of stars with what path and catalogue know beyond the header.

# %%
#| export
def _archive_files(root, record, product, fields, telescopes, release):
    "The product that is taken, and its files; LabError if there are none."
    if not Path(root).is_dir():
        raise LabError(
            f"there is no folder {root}: write an archive with 'stellar-lab archive', "
            "or fetch one with 'stellar-lab fetch'"
        )
    products = record.products if product is None else (product,)
    for name in products:
        files = find_files(root, name, fields, telescopes, release)
        if len(files):
            return name, files
    rules = _rules(record, release)
    tried = ", ".join(template for name in products for template in rules.templates(name))
    where = "all fields"
    if not (isinstance(fields, str) and fields == "all"):
        where = f"fields {', '.join(map(str, np.atleast_1d(fields or record.fields)))}"
    raise LabError(
        f"no star's file below {root}: looked for {tried} in {where}; fetch them with "
        "'stellar-lab fetch', or name other fields or another release"
    )


def _rows_without_file(files, catalogue, rules):
    "How many targets of the catalogue in the same folders no file belongs to."
    if rules.field_column not in catalogue.colnames:
        return 0
    folders = _text(catalogue[rules.field_column])
    here = np.isin(folders, _text(files["FOLDER"]))
    if "TELESCOPE" in catalogue.colnames:
        here &= np.isin(catalogue["TELESCOPE"], files["TELESCOPE"])
    targets = _joined(folders[here], _text(catalogue["APOGEE_ID"])[here])
    return len(np.setdiff1d(targets, _joined(_text(files["FOLDER"]), _text(files["APOGEE_ID"]))))


# %%
_rows_without_file(files, catalogue, record.rules)


# %%
#| export
def _with_labels(stars, files, catalogue):
    "The stars table with what path and catalogue know beyond the header."
    stars = stars.copy()
    stars["APOGEE_ID"] = files["APOGEE_ID"]
    telescope = _text(stars["TELESCOPE"])
    stars["TELESCOPE"] = np.where(telescope == "", _text(files["TELESCOPE"]), telescope)
    for name in ("FIELD", "LOCATION_ID"):
        if name in catalogue.colnames:
            unknown = np.isin(_text(stars[name]), ["", "-1"])
            stars[name] = np.where(unknown, catalogue[name], stars[name])
    for name in catalogue.colnames:
        if name == "SNR":
            stars["SNR"] = np.where(np.isfinite(catalogue["SNR"]), catalogue["SNR"], stars["SNR"])
        elif name not in _KEYS:
            stars[name] = catalogue[name]
    return stars


def _ledger_of(files, problems, rows, further, places, lonely):
    "What became of the files of an archive. LabError if no star is left."
    broken = np.isin(files["path"], [problem.path for problem in problems])
    reasons = [problem.reason for problem in problems]
    ids = files["APOGEE_ID"]
    ledger = Ledger(len(files)).drop("damaged", ids[broken], "the file cannot be read", reasons)
    ledger = ledger.drop("no row in the catalogue", ids[~broken & (rows < 0)])
    better = "the row with the highest SNR counts"
    ledger = ledger.count("duplicate rows resolved", further[places].sum(), better)
    return ledger.count("rows of the catalogue without a file", lonely)


# %%
#| export
def _rows_of_files(root, files, record, rules, labels, release):
    "For each file its row of the catalogue, the row's number or -1, how many others it has."
    labels = record.labels if labels is None else labels
    for_cuts = [cut.column for cut in record.cuts]
    path = find_catalogue(root, release)
    (known,) = known_sums([path])
    if known and sha256_of(path) != known:
        raise LabError(
            f"{path} is damaged: its sha256 is not the one that its archive knows; fetch it, or "
            "write the archive, again"
        )
    catalogue = read_catalogue(path, labels, for_cuts)
    rows, further = match_catalogue(files, catalogue, rules)
    lonely = _rows_without_file(files, catalogue, rules)
    return catalogue[rows], rows, further, lonely  # for -1 any row will do


def _nobody(root, product, files, problems, catalogue):
    "Why no star of an archive is left, in words."
    return (
        f"no star of {root} is left: {len(files)} {product} files found, "
        f"of which {len(problems)} are damaged{_first(problems) if problems else ''}, "
        f"and the others have no row in {catalogue}"
    )


# %%
two = files[:2]
_ledger_of(two, [Problem(two["path"][0], "empty")], np.array([3, -1]), np.array([0, 0]), [], 7)


# %% [markdown]
# The order saves memory. The catalogue is matched first and let go but for the rows of our stars; then there is room for exactly the spectra that
# have a row, $N\times 7214\times(4+4+4)$ bytes for flux, weight and mask: 236 MB for the 2,723 stars of the original lab. Files without a row are opened,
# too, so that the ledger can tell a damaged file from a star that nobody knows.

# %%
#| export
def read_archive(
    root,
    product=None,
    fields=None,
    labels=None,
    row=None,
    workers=None,
    telescopes=None,
    release=None,
    dark=0.05,
    progress=True,
) -> tuple:
    """Stars of an archive that have a good file and a row in the catalogue.

    Parameters
    ----------
    root : path
        Of an archive.
    product : str, optional
        `apstar` or `aspcapstar`; the first of the archive's record that has files by default.
    fields, telescopes, release
        As for `find_files`.
    labels : sequence of str, optional
        Label names; the record's by default.
    row : int, optional
        For apStar files: 0 and 1 are the combinations, the visits follow; the release's by default.
    dark : float, default 0.05
        `fraction` of `dark_pixels`, for products with raw flux; 0 keeps all pixels.
    workers, progress
        As for `read_stars`.

    Returns
    -------
    spectra : Spectra
        With labels, SNR and flags of the catalogue.
    ledger : Ledger
        What became of the other files.

    Raises
    ------
    LabError
        If there are no files, no catalogue or no star with both; or an unknown label or release.

    Examples
    --------
    >>> from stellar_lab import read_archive
    >>> from stellar_lab.survey import archive_record, archive_root
    >>> root = archive_root()
    >>> fields = archive_record(root).fields[:1]
    >>> spectra, ledger = read_archive(root, fields=fields, progress=False)
    >>> len(spectra) == ledger.left
    True
    """
    record = archive_record(root)
    rules = _rules(record, release)
    product, files = _archive_files(root, record, product, fields, telescopes, release)
    catalogue, rows, further, lonely = _rows_of_files(root, files, record, rules, labels, release)
    row = rules.row if row is None else row
    paths = list(files["path"])
    known = archive_sums(root)
    sums = [known.get(Path(path).relative_to(root).as_posix(), "") for path in paths]
    spectra, places, problems = read_stars(
        paths, PRODUCTS[product], row, workers, rows >= 0, progress, sums
    )
    ledger = _ledger_of(files, problems, rows, further, places, lonely)
    if not len(spectra):
        raise LabError(_nobody(root, product, files, problems, catalogue.meta["catalogue"]))
    stars = _with_labels(spectra.stars, files[places], catalogue[places])
    known = {"release": rules.name.lower(), "archive": record.name}
    known["catalogue_sha256"] = sha256_of(find_catalogue(root, release))
    known["dark"] = 0.0 if PRODUCTS[product].normalized else float(dark or 0)
    strange = np.sum(stars["STRANGE_PIXELS"])
    if strange:
        ledger = ledger.count("strange pixels", strange, "no star has such a flux or error")
    stars.meta |= known | {"labels": list(catalogue.meta["labels"])}
    if dark and not PRODUCTS[product].normalized:
        # In place: this array is our own, nobody else has seen it.
        spectra.ivar[dark_pixels(spectra.flux, spectra.ivar, dark)] = 0
    return spectra.replace(stars=stars), ledger


# %%
spectra, found = read_archive(root, progress=False)
spectra

# %%
found


# %% [markdown]
# ## Cuts
# A star must have light, all its labels, none that no star can have (a temperature of 0 K, a metallicity of 99), and pass the cuts that the archive's
# record names. Each rule sees only the stars that earlier rules left,
# and the spectra are cut once, at the end, by all rules together. A value that is not known passes no cut.
#
# `keep` is the same for a single rule: the next chapters use it for theirs, and hand the ledger on.

# %%
#| export
def keep(spectra, good, rule, ledger=None, reason="") -> tuple:
    """The stars that a rule calls good.

    Parameters
    ----------
    spectra : Spectra
        N stars.
    good : ndarray
        (N,) bool.
    rule : str
        Its name.
    ledger : Ledger, optional
        To go on with; a new one by default.
    reason : str, optional
        Why the others go.

    Returns
    -------
    spectra : Spectra
        The good stars.
    ledger : Ledger
        With one more rule.

    Raises
    ------
    LabError
        If the ledger is that of other stars.
    """
    ledger = _going_on(spectra, ledger)
    good = np.asarray(good, bool)
    return spectra[good], ledger.drop(rule, spectra.stars["APOGEE_ID"][~good], reason)


def _going_on(spectra, ledger):
    "The ledger to go on with; LabError if it is that of other stars."
    if ledger is None:
        return Ledger(len(spectra))
    if ledger.left != len(spectra):
        raise LabError(
            f"the ledger has {ledger.left} stars left, but there are {len(spectra)} spectra: "
            "go on with the ledger of these spectra"
        )
    return ledger


# %%
_, ledger = keep(spectra, spectra.stars["NVISITS"] > 1, "seen once")
ledger


# %%
#| export
def _cuts_of(spectra, cuts):
    "The cuts that were given, else those of the archive that the spectra come from."
    if cuts is not None:
        return cuts
    name = spectra.stars.meta.get("archive")
    if name not in ARCHIVES:
        raise LabError(
            "these spectra come from no known archive: say which cuts to apply, "
            "cuts=[Cut(…)] or cuts=()"
        )
    return ARCHIVES[name].cuts


def _impossible(spectra):
    "Name of a label -> the stars (N,) whose value no star can have; only labels with such stars."
    stars = {}
    for label in label_records(spectra.label_names):
        values = spectra.labels([label.name])[:, 0]
        low, high = label.possible
        outside = (values <= low) | (values >= high)
        if outside.any():
            stars[label.name] = outside
    return stars


def _rules_of(spectra, cuts, gaps=False):
    "Name, stars that pass, and reason of each rule."
    light = np.any((spectra.flux != 0) & (spectra.ivar > 0), axis=1)
    yield "flux all zero", light, "no usable pixel"
    known = np.isfinite(spectra.labels())
    labelled = known.any(axis=1) if gaps else known.all(axis=1)
    needs = "needs one of " if gaps else "needs "
    yield "missing labels", labelled, needs + ", ".join(spectra.label_names)
    impossible = _impossible(spectra)
    if impossible:
        ranges = [
            f"{label.name} within {label.possible[0]:g} and {label.possible[1]:g}"
            for label in label_records(impossible)
        ]
        possible = ~np.any(list(impossible.values()), axis=0)
        yield "impossible label", possible, f"stars have {', '.join(ranges)}"
    for cut in cuts:
        if cut.column not in spectra.stars.colnames:
            known = ", ".join(spectra.stars.colnames)
            raise LabError(
                f"the cut {cut.name!r} needs a column {cut.column}, which the stars lack: "
                f"there are {known}"
            )
        reason = f"keep {cut}" + (f": {cut.reason}" if cut.reason else "")
        yield cut.name, cut.keeps(spectra.stars[cut.column]), reason


# %%
for name, passed, reason in _rules_of(spectra, _cuts_of(spectra, None)):
    print(f"{name}: {passed.sum()} of {len(passed)} pass ({reason})")


# %%
#| export
def apply_cuts(spectra, cuts=None, ledger=None, gaps=False) -> tuple:
    """Drop stars without light, without all labels, or that fail a cut.

    Parameters
    ----------
    spectra : Spectra
        N stars.
    cuts : sequence of survey.Cut, optional
        Those of the archive's record by default, `()` for none.
    ledger : Ledger, optional
        To go on with; a new one by default.
    gaps : bool, default False
        Keep stars that lack some labels, if they have one.

    Returns
    -------
    spectra : Spectra
        The stars that are left.
    ledger : Ledger
        With one line per rule.

    Raises
    ------
    LabError
        If a column is missing, nothing is left, or nobody says which cuts to apply.
    """
    ledger = _going_on(spectra, ledger)
    good = np.ones(len(spectra), bool)
    for rule, passed, reason in _rules_of(spectra, _cuts_of(spectra, cuts), gaps):
        ledger = ledger.drop(rule, spectra.stars["APOGEE_ID"][good & ~passed], reason)
        good &= passed
    if not good.any():
        raise LabError(f"no star passed the cuts, widen them:\n{ledger}")
    return spectra[good], ledger


# %% [markdown]
# ## The stars at hand
# Now for the archive of this run: what do the cuts of its record take?

# %%
good, ledger = apply_cuts(spectra, ledger=found)
ledger

# %%
#| echo: false
dropping = [step for step in ledger.steps if step.stars]
lines = [
    f"To *{step.rule}* fell {len(step.stars)} ({len(step.stars) / ledger.found:.1%})."
    for step in dropping
]
Markdown(f"Of {ledger.found} files {ledger.left} stars are left. " + " ".join(lines))

# %%
plot_ledger(ledger);

# %% [markdown]
# **What to see.** Each bar is as long as the blue one above it: no star leaves without a rule. Which one took a given star, and what was wrong with
# it?

# %%
asked = list(ledger.dropped)[:: max(len(ledger.dropped) // 6, 1)]
Table(rows=[(star, ledger.why(star)) for star in asked], names=["star", "why it is gone"])

# %% [markdown]
# The ledger is a claim, so we count again without it. Found is left plus dropped; and a plain loop over the rows of the table, with the record's
# cuts, keeps the same stars.

# %%
assert ledger.found == len(find_files(root)) == ledger.left + ledger.table["dropped"].sum()
survivors = []
for n, star in enumerate(spectra.stars):
    labelled = all(np.isfinite(star[name]) for name in record.labels)
    inside = all(cut.low < star[cut.column] < cut.high for cut in record.cuts)
    if labelled and inside and spectra.flux[n].any():
        survivors.append(n)
assert list(good.stars["FILE"]) == list(spectra.stars["FILE"][survivors])
assert np.array_equal(good.flux, spectra.flux[survivors])
assert np.array_equal(good.labels(), spectra.labels()[survivors])

# %% [markdown]
# A user may add cuts of her own, here of bits: stars whose light met another star's or whose labels the survey's pipeline calls bad.

# %%
of_ones_own = [
    *record.cuts,
    Cut("neighbour", "STARFLAG", without_bits="VERY_BRIGHT_NEIGHBOR"),
    Cut("doubtful labels", "ASPCAPFLAG", without_bits=("STAR_WARN", "STAR_BAD")),
]
apply_cuts(spectra, of_ones_own, found)[1]

# %% [markdown]
# A later chapter goes on with the same ledger, here with a rule of its own. A ledger of other stars is refused.

# %%
fewer, longer = keep(good, good.stars["NVISITS"] > 1, "seen once", ledger)
assert longer.left == len(fewer)
assert longer.steps[:-1] == ledger.steps and longer.steps[-1].rule == "seen once"
with pytest.raises(LabError, match="go on with the ledger of these spectra"):
    keep(good, np.ones(len(good), bool), "nothing", found)

# %% [markdown]
# ## What the literal rule would have done
# Back to the dark pixels, now on the archive. The original lab's literal rule compares flux with the median flux of all stars; ours takes each star's own
# level out first. We ask both twice: once on (at most some 600) stars of all kinds, once on the brightest tenth and the faintest twentieth of them
# alone.

# %%
paths = find_files(root, "apstar")["path"]
step = max(len(paths) // 600, 1)
raw, _ = read_files(paths[::step], progress=False)  # loose files: nobody has darkened them yet
level = nan_median(np.where(raw.ivar > 0, raw.flux, np.nan))
level = np.nan_to_num(level)
bright_first = np.argsort(-level)[: np.sum(level > 0)]  # stars without light have no say
n = len(bright_first)
extremes = np.r_[bright_first[: n // 10], bright_first[-n // 20 :]]
samples = {"all stars": bright_first, "brightest and faintest": extremes}


# %%
def literal_rule(spectra):
    "The original lab's rule to the letter."
    typical = np.ma.median(np.ma.array(spectra.flux, mask=spectra.ivar == 0), axis=0)
    return (spectra.flux < 0.05 * typical).filled(False) & (spectra.ivar > 0)


def our_rule(spectra):
    return dark_pixels(spectra.flux, spectra.ivar) & (spectra.ivar > 0)


# %%
rules = {"literal": literal_rule, "ours": our_rule}
rows = []
for name, sample in samples.items():
    stars = raw[sample]
    counts = {rule: dark(stars).sum(axis=1) for rule, dark in rules.items()}
    for rule, count in counts.items():
        rows.append((name, len(stars), rule, count.sum(), np.sum(count > 3000)))
columns = ["sample", "stars", "rule", "dark pixels", "stars that lose more than 3,000 pixels"]
Table(rows=rows, names=columns)

# %%
fig, ax = plt.subplots(figsize=(7, 3.2))
for rule, color, text in (("literal", "C1", "literal rule"), ("ours", "C0", "our rule")):
    ax.plot(stars.stars["H"], counts[rule], "o", ms=4, alpha=0.6, color=color, label=text)
ax.axhline(3000, color="0.6", ls="--", lw=0.8)
ax.set(xlabel="$H$ [mag]", ylabel="dark pixels of 7,214", title="brightest and faintest stars")
ax.set_yscale("symlog")
ax.set_ylim(-0.5, 3e4)
ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False);

# %%
#| echo: false
contrast = level.max() / level[level > 0].min()
Markdown(
    f"**What to see.** The brightest star here has {contrast:,.0f} times the flux of the faintest. "
    f"In the company of the brightest the literal rule takes {rows[2][4]} faint stars whole: "
    "beyond the dashed line the original lab drops a star. Nothing is wrong with them but their "
    f"neighbours. Our rule takes {rows[3][4]}."
)

# %% [markdown]
# As a test: dimming every fifth star a hundredfold changes nothing in our answer, and much in the literal one.

# %%
dimming = np.where(np.arange(len(raw)) % 5, 1, 0.01).astype("f4")
dim = raw.replace(flux=raw.flux * dimming[:, None])
assert np.mean(our_rule(dim) != our_rule(raw)) < 1e-6  # but for float32's last digit
assert np.mean(literal_rule(dim) != literal_rule(raw)) > 0.1


# %% [markdown]
# ## The labels
# What kind of stars are left? A corner plot shows each label's distribution (dashed: 16th and 84th percentile) and each pair against one another.

# %%
#| exporti
def plot_corner(spectra: Spectra, names=None, **style):
    """Corner plot of labels in the survey's plot ranges, with the 16 and 84 % quantiles.

    Parameters
    ----------
    spectra : Spectra
        At least two stars with all the labels.
    names : sequence of str, optional
        Label names; all that the stars have by default.
    **style
        For `corner.corner`.

    Returns
    -------
    matplotlib Figure

    Raises
    ------
    LabError
        If there are fewer stars.
    """
    import corner
    import matplotlib.pyplot as plt

    labels = label_records(spectra.label_names if names is None else names)
    names = [label.name for label in labels]
    values = spectra.labels(names)
    values = values[np.isfinite(values).all(axis=1)]
    if len(values) < 2:
        raise LabError(
            "a corner plot needs at least two stars with the labels "
            f"{', '.join(names)}, there are {len(values)}"
        )
    size = 1.6 * len(labels)
    fig = plt.figure(figsize=(size, size), layout="none")  # corner spaces its panels itself
    usual = {
        "labels": [label.axis for label in labels],
        "range": [label.plot_range for label in labels],
        "quantiles": [0.16, 0.84],
        "bins": 25,
        "color": "#0173b2",
        "labelpad": 0.12,
        "plot_contours": False,
        "plot_density": False,
        "data_kwargs": {"alpha": 0.6, "ms": 3},
    }
    corner.corner(values, fig=fig, **(usual | style))
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks(_inner_ticks(axis))
    return fig


def _inner_ticks(axis):
    "Ticks of an axis but those at its ends, whose numbers would meet the next panel's."
    low, high = axis.get_view_interval()
    edge = 0.1 * (high - low)
    return [tick for tick in axis.get_ticklocs() if low + edge < tick < high - edge]


# %%
plot_corner(good);

# %% [markdown]
# **What to see.** Temperature and gravity lie on a narrow band, the giant branch, and the more metals a star has, the cooler it is at the same
# gravity. Labels that are tied to one another in the sample will be hard to tell apart in a model trained on it. (In the archive of clusters [M/H]
# falls into islands: a cluster was born with one metallicity.)

# %%
with pytest.raises(LabError, match="at least two stars with the labels TEFF, LOGG, there are 1"):
    plot_corner(good[0], ["TEFF", "LOGG"])


# %% [markdown]
# ## The spectra
# Three stars as the telescope saw them, whole and zoomed, with their errors in grey. The axes end where the star does: what a line of the night sky
# left behind may stick out ten times higher.

# %%
#| exporti
def plot_raw(spectra: Spectra, rows=(0, 1, 2), window=(16_000, 16_150)):
    """Some stars, whole on the left and zoomed on the right, each with its error on a second axis.

    Parameters
    ----------
    spectra : Spectra
        Where they are.
    rows : sequence of int
        Which stars.
    window : tuple of float
        Of the zoom [Angstrom].

    Returns
    -------
    matplotlib Figure
    """
    import matplotlib.pyplot as plt

    size = (11, 2.2 * len(rows) + 0.3)
    fig, axes = plt.subplots(len(rows), 2, figsize=size, width_ratios=(3, 2), squeeze=False)
    for row, pair in zip(rows, axes, strict=True):
        star, flux, ivar = spectra.stars[row], spectra.flux[row], spectra.ivar[row]
        shown = ivar > 0 if spectra.mask is None else (ivar > 0) & (spectra.mask[row] == 0)
        for ax, part in zip(pair, (None, window), strict=True):
            plot_spectrum(spectra.wavelength, flux, ivar, part, error=True, ax=ax)
            _show_most(ax, fig.axes[-1], flux[shown], ivar[shown])
            ax.set(xlabel=None, ylabel=None)
        title = f"{star['APOGEE_ID']}, $H$ = {star['H']:.1f}, SNR {star['SNR']:.0f}"
        pair[0].set_title(title, fontsize="small", loc="left")
        fig.axes[-2].set_ylabel(None)  # the right panel's error label serves both
    raw = r"flux [$10^{-17}$ erg s$^{-1}$ cm$^{-2}$ Å$^{-1}$]"
    normalized = spectra.stars.meta.get("normalized")
    fig.supylabel("flux / continuum" if normalized else raw, fontsize="small")
    fig.supxlabel("vacuum wavelength [Å]", fontsize="small")
    return fig


def _show_most(ax, error_ax, flux, ivar):
    "Limits that show the star; what a sky line left behind may leave the axes."
    from matplotlib.ticker import MaxNLocator

    if len(flux):
        low, high = np.percentile(flux, [0.5, 99.5])
        ax.set_ylim(low - 0.2 * (high - low), high + 0.2 * (high - low))
        error_ax.set_ylim(0, 4 / np.sqrt(np.median(ivar)))
    ax.xaxis.set_major_locator(MaxNLocator(5))


# %%
order = np.argsort(good.labels()[:, 2])  # poor, middling and rich in metals
plot_raw(good, order[[0, len(good) // 2, -1]]);

# %% [markdown]
# **What to see.** The slope over a chip is the star's temperature and the instrument's throughput, and
# [the chapter on the continuum](03_normalize.ipynb) takes both away. Where the error jumps, a line of the night sky was subtracted. And from the first
# star to the last the lines multiply: that is metallicity, before any model.

# %% [markdown]
# ## The survey's own files
# Our archive is written by our own code, and a reader that agrees with its own writer proves little. The variable `STELLAR_LAB_REAL_DATA` may name
# a folder of raw files of several releases: with visits and without, float32 and float64, and the mystery star without a name.

# %%
real = real_data()
if real is None:
    print("Skipped: STELLAR_LAB_REAL_DATA is not set, so there are no raw files of the survey.")
else:
    raw_paths = [*sorted(real.glob("apStar-*.fits")), real / "mystery_spec_wiped.fits"]
    sky, problems = read_files(raw_paths, progress=False)
    assert not problems and len(sky) == len(raw_paths) and product_of(raw_paths[-1]) == "apstar"
    assert sky.stars.meta["row"] is None  # one of them is of DR17
    print(sky)

# %%
if real is not None:
    sky.stars["usable"] = [f"{share:.2%}" for share in (sky.ivar > 0).mean(axis=1)]
    sky.stars["flagged"] = [f"{share:.1%}" for share in (sky.mask != 0).mean(axis=1)]
    display(sky.stars["FILE", "FIELD", "NVISITS", "SNR", "H", "usable", "flagged"])

# %%
if real is not None:
    plot_raw(sky, range(len(sky)))

# %% [markdown]
# **What to see** (where the files are at hand). Seven very different stars on one grid. The fourth is faint, seen once, and its flagged blue chip
# leaves the axes; in the dwarfs the lines are many and blurred. The third star is flagged on nearly all of its blue chip (persistence), though its errors
# look like those of the other chips: the mask has to tell.

# %% [markdown]
# Now the flags of the DR17 file, row by row: had we taken row 1, as in every release before, we would have believed that all its pixels are good.

# %%
if real is not None:
    seventeen = raw_paths[0]
    rows = [read_files(seventeen, row=k, progress=False)[0] for k in range(3)]
    flagged = [(spectra.mask != 0).mean() for spectra in rows]
    assert flagged[0] > 0.05 and flagged[1] == 0
    assert np.array_equal(rows[0].flux[0], sky.flux[0])  # the row that its release means
    display(Table({"row": range(3), "pixels flagged": [f"{share:.1%}" for share in flagged]}))

# %% [markdown]
# Both real catalogues go through the same two functions. In the newer one each star has one row and finds it by TARGET_ID. The older one holds
# stars several times, and stars of a second telescope under another form of the key: each must find a row of its own name, no worse than the one it
# came from.

# %%
if real is not None:
    new = read_catalogue(real / "allStar-dr16-33rows.fits")
    as_files = new["APOGEE_ID", "TELESCOPE", "FIELD"]
    as_files.rename_column("FIELD", "FOLDER")
    rows, further = match_catalogue(as_files, new, RELEASES["dr16"])
    assert list(rows) == list(range(len(new))) and not further.any()
    missing = np.isnan(new["MG_FE"]).sum()
    print(f"{len(new)} rows, labels {', '.join(new.meta['labels'])}; without a [Mg/Fe]: {missing}")

# %%
if real is not None:
    old_path = real / "allStar-v603-hipparcos.fits.gz"
    old = read_catalogue(old_path)
    with pytest.raises(LabError, match="no label MG_FE, SI_FE .* it has TEFF, LOGG, FE_H, M_H"):
        read_catalogue(old_path, ["TEFF", "MG_FE", "SI_FE"])
    as_files = old["APOGEE_ID", "TELESCOPE"]
    as_files["FOLDER"] = old["LOCATION_ID"].astype(str)
    rows, further = match_catalogue(as_files, old, RELEASES["dr14"])
    assert np.array_equal(old["APOGEE_ID"][rows], old["APOGEE_ID"])
    assert np.all(old["SNR"][rows] >= old["SNR"])
    known = np.isfinite(old["TEFF"]).sum()
    company = np.sum(further > 0)
    print(f"{len(old)} rows, {known} with a temperature, {company} in company of the same target")

# %% [markdown]
# **Exercise.** Read the archive with `row=0`, the combination weighted pixel by pixel, and compare it with row 1 star by star. Where do they differ
# by more than the errors, and why there?
