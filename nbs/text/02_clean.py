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
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import NamedTuple

import corner
import matplotlib.pyplot as plt
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
    MISSING,
    N_PIXELS,
    PRODUCTS,
    RELEASES,
    LabError,
    Release,
    Spectra,
    archive_record,
    label_records,
    on_band,
    plot_spectrum,
    wavelength,
)

# %%
#| hide
import tempfile

import pytest
from IPython.display import Markdown

from stellar_lab.survey import archive_root, real_data, use_style

use_style()


# %% [markdown]
# ## The ledger
# A ledger starts with the number of files found. Each rule then takes stars away, by name, or only counts something worth knowing. A ledger is
# never changed: a rule returns a new one, so the state before a cut is still there after it, and later chapters simply go on writing.
#
# The order of rules matters for the lines but not for the sum. A star that is noisy *and* unlabelled falls to whichever rule comes first, and the
# other never sees it. So a line says what a rule took from the stars it met, not how many stars there are that break it.

# %%
#| export
class Step(NamedTuple):
    "One line of a ledger."

    rule: str
    stars: tuple = ()  # APOGEE_ID of each star that fell to the rule
    details: tuple = ()  # what was wrong with each of them, where a rule has more to say than its name
    counted: int = 0  # for rules that count without dropping
    reason: str = ""


@dataclass(frozen=True, repr=False)
class Ledger:
    "How many stars were found, and which rule dropped which of them."

    found: int
    steps: tuple = ()

    def drop(self, rule: str, stars, reason: str = "", details=()) -> "Ledger":
        "The ledger with one more rule, to which the `stars` (APOGEE_IDs) fell; `details` may say of each why."
        stars = tuple(map(str, stars))
        if len(stars) > self.left:
            raise LabError(
                f"rule {rule!r} drops {len(stars)} stars, but the ledger has only {self.left} left"
            )
        return Ledger(
            self.found, (*self.steps, Step(rule, stars, tuple(map(str, details)), 0, reason))
        )

    def count(self, rule: str, number: int, reason: str = "") -> "Ledger":
        "The ledger with one more line that drops nothing."
        return Ledger(self.found, (*self.steps, Step(rule, counted=int(number), reason=reason)))

    @property
    def left(self) -> int:
        "Stars that no rule dropped."
        return self.found - sum(len(step.stars) for step in self.steps)

    @property
    def dropped(self) -> dict:
        "APOGEE_ID -> the rule it fell to (rules joined by '; ' if the star was found more than once)."
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

    @property
    def table(self) -> QTable:
        "One row a rule, in their order: how many stars it dropped, how many were left after it, and what it counted."
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
        return "\n".join(
            self.table.pformat(max_lines=-1, max_width=-1, align=["<", ">", ">", ">", "<"])
        )

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
ledger = (
    Ledger(5)
    .drop("too noisy", ["Castor", "Pollux"])
    .count("seen twice", 1, "the better one counts")
    .drop("no label", ["Mizar"])
)
ledger

# %% [markdown]
# The user may ask for a star by name, and the books balance. Taking away more stars than there are is a mistake, not a negative number.

# %%
assert ledger.left == 2 and ledger.dropped == {
    "Castor": "too noisy",
    "Pollux": "too noisy",
    "Mizar": "no label",
}
assert list(ledger.table["left"]) == [5, 3, 3, 2] and list(ledger.table["dropped"]) == [0, 2, 0, 1]
assert Ledger.from_dict(ledger.to_dict()) == ledger
assert Ledger(2).drop("a", ["Mira"]).drop("b", ["Mira"]).dropped == {
    "Mira": "a; b"
}  # two files of one star
with pytest.raises(LabError, match="rule 'x' drops 3 stars, but the ledger has only 2 left"):
    ledger.drop("x", ["a", "b", "c"])


# %% [markdown]
# As a picture: a bar a rule, what is left in blue, what the rule took in orange.

# %%
#| export
def plot_ledger(
    ledger: Ledger,
    ax=None,
):
    "Bars of what each dropping rule left and took; returns the Axes."
    table = ledger.table
    table = table[(table["dropped"] > 0) | (np.arange(len(table)) == 0)]
    ax = plt.subplots(figsize=(8, 0.6 + 0.35 * len(table)))[1] if ax is None else ax
    y = -np.arange(len(table))
    ax.barh(y, table["left"], color="C0", label="left")
    ax.barh(y, table["dropped"], left=table["left"], color="C1", label="dropped by this rule")
    for place, left, dropped in zip(y, table["left"], table["dropped"]):
        ax.text(
            left + dropped,
            place,
            f"  {left}" + (f"  ($-${dropped})" if dropped else ""),
            va="center",
            fontsize="small",
        )
    ax.set(
        yticks=y, yticklabels=table["rule"], xlabel="stars", xlim=(0, 1.18 * max(ledger.found, 1))
    )
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(0, 1.0 + 0.9 / len(table)),
        ncols=2,
        frameon=False,
        fontsize="small",
    )
    return ax


# %% [markdown]
# ## One file
# A combined spectrum (`apStar`) is a FITS file of ten HDUs: flux, error and bitmask in the first three, sky and tellurics behind them. Its arrays
# have a row per combination and visit: row 0 combines the visits pixel by pixel, row 1 with one weight a visit, the visits follow. The lab takes
# row 1. The traps: a star seen once has arrays *without* rows; DR17 writes float64 and int64 where others wrote float32 and int16; "no value" is an
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
#| export
def inverse_variance(
    flux: np.ndarray,  # any shape
    error: np.ndarray,  # same shape, 1-sigma
    product,  # survey.Product: says which errors are too large, and whether flux must be positive
) -> np.ndarray:  # same shape, float32
    "1/error^2, and 0 where error or flux are not usable."
    error = np.asarray(error, np.float64)
    good = np.isfinite(flux) & np.isfinite(error) & (error > 0) & (error < product.max_error)
    if product.normalized:
        good &= np.asarray(flux) > 0  # a bad pixel of an aspcapStar file is a zero
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        ivar = np.where(good, 1 / error**2, 0).astype(np.float32)
    return np.where(np.isfinite(ivar), ivar, np.float32(0))


# %%
cases = np.array([1.0, 1.0, 1.0, 1.0, np.nan, 0.0]), np.array([0.1, 0.0, 1e10, np.nan, 0.1, 0.1])
assert np.allclose(
    inverse_variance(*cases, PRODUCTS["apstar"]), [100, 0, 0, 0, 0, 100]
)  # zero flux is a measurement here
assert np.allclose(
    inverse_variance(*cases, PRODUCTS["aspcapstar"]), [100, 0, 0, 0, 0, 0]
)  # and a hole here

# %% [markdown]
# What a file is called says what it is and whose it is. The lab's mystery star has lost its name: then the HDUs have to say what it is, for the third
# holds integers (a mask) in one product and floats (the best-fitting model) in the other.

# %%
#| export
FILE_NAME = re.compile(
    rf"(?P<kind>aspcap|ap|as)Star-(?:(?P<reduction>[^-]+)-)?(?:.*?-)?(?P<id>{APOGEE_ID})(?:-\d+)?"
    r"\.fits(?:\.gz)?"
)


def product_of(
    path,  # a file
) -> str | None:  # "apstar" or "aspcapstar", None if neither
    "Which product a file is: from its name, else from its HDUs."
    match = FILE_NAME.fullmatch(Path(path).name)
    if match:
        return "aspcapstar" if match["kind"] == "aspcap" else "apstar"
    try:
        with fits.open(path, lazy_load_hdus=True) as hdus:
            return _product_of_hdus(hdus)
    except Exception:  # whatever a damaged file makes astropy raise
        return None


def _product_of_hdus(hdus):
    third = hdus[3]
    if not third.is_image or third.shape is None or third.shape[-1:] != (N_PIXELS,):
        return None
    return "apstar" if third.header["BITPIX"] in (16, 32, 64) else "aspcapstar"


# %%
for name, product, star in [
    ("apStar-r8-2M21334193-0048169.fits", "apstar", "2M21334193-0048169"),
    ("asStar-dr17-2M01020000-7100000.fits", "apstar", "2M01020000-7100000"),
    ("aspcapStar-r8-l31c.2-2M21334193-0048169.fits", "aspcapstar", "2M21334193-0048169"),
    ("aspcapStar-v304-VESTA.fits", "aspcapstar", "VESTA"),
]:
    assert product_of(name) == product and FILE_NAME.fullmatch(name)["id"] == star
assert product_of("no_such_file.fits") is None


# %% [markdown]
# The name also says which reduction wrote the file, and with it the release. That matters for one number: which row of the file is the combination to
# use (row 1 up to DR16, row 0 in DR17, whose row 1 carries no flags). A file that lost its name still lists the visits that it was made of.

# %%
#| export
def _combined_row(path, header):
    "The row of a file that its release combines the visits in; the usual one if nobody knows the release."
    match = FILE_NAME.fullmatch(Path(path).name)
    visit = re.fullmatch(r"a[ps]Visit-([^-]+)-.*", str(header.get("SFILE1", "")).strip())
    for reduction in (match and match["reduction"], visit and visit[1]):
        for release in RELEASES.values():
            if reduction in release.reductions:
                return release.row
    return Release.row


# %%
visits = {"SFILE1": "apVisit-dr17-5815-56396-212.fits"}
assert _combined_row("apStar-dr17-2M17335483-2753043.fits", {}) == 0
assert _combined_row("apStar-r8-2M21334193-0048169.fits", {}) == 1
assert _combined_row("mystery.fits", visits) == 0 and _combined_row("mystery.fits", {}) == 1


# %% [markdown]
# Header facts go into the stars table under the names that the survey's catalogue uses for them.

# %%
#| export
class Fact(NamedTuple):
    "A column of the stars table that comes from a file's header."

    column: str
    keys: tuple  # header cards, the first that exists counts
    missing: object  # value where no card exists; its type is the column's

    def read(self, header):
        "Its value in a header."
        value = next((header[key] for key in self.keys if key in header), self.missing)
        try:
            value = type(self.missing)(
                str(value).strip() if isinstance(self.missing, str) else value
            )
        except (TypeError, ValueError):
            return self.missing
        return value if isinstance(value, str) or not value <= MISSING else self.missing


FACTS = (
    Fact("APOGEE_ID", ("OBJID", "OBJ"), ""),
    Fact("TELESCOPE", ("TELESCOP",), ""),
    Fact("FIELD", ("FIELD",), ""),
    Fact("LOCATION_ID", ("LOCID",), -1),
    Fact("SNR", ("SNR",), np.nan),
    Fact("NVISITS", ("NVISITS",), -1),
    Fact("J", ("J",), np.nan),
    Fact("H", ("H",), np.nan),
    Fact("K", ("K",), np.nan),
    Fact("RA", ("RA",), np.nan),
    Fact("DEC", ("DEC",), np.nan),
)

# %%
header = fits.Header(
    {"OBJ": "2M21334193-0048169", "LOCID": 4419, "SNR": 88.5, "J": "unknown", "K": -9999.99}
)
facts = {fact.column: fact.read(header) for fact in FACTS}
assert facts["APOGEE_ID"] == "2M21334193-0048169" and np.isnan(facts["J"]) and np.isnan(facts["K"])
facts


# %% [markdown]
# Now the reader of one file. Whatever is wrong with it (cut short, a web page under a FITS name, HDUs of something else, another grid, no such row)
# becomes a `Problem` with the reason, never an exception: one bad file must not stop a thousand good ones.
#
# First the checks. A broken download often has a perfect beginning, and the three HDUs that we need stand at the beginning: so we ask where the last
# HDU ends, and whether the file goes that far. The grid is asked for in every file, too: a spectrum on other wavelengths would look quite normal and
# be wrong in every pixel.

# %%
#| export
class Problem(NamedTuple):
    "A file that could not be read, and why."

    path: str
    reason: str

    def __str__(self):
        return f"{Path(self.path).name}: {self.reason}"


def _check_bytes(hdu, path):
    "Raise ValueError if the file ends before the HDU does; a packed file finds out for itself."
    size, end = os.path.getsize(path), hdu.fileinfo()["datLoc"] + hdu.size
    if size < end and not str(path).endswith(".gz"):
        raise ValueError(f"cut short: {size} of {end} bytes")


def _check_whole(hdus, path, product):
    "Raise ValueError unless the file has all its bytes, HDUs of the right kind and the survey's grid."
    _check_bytes(hdus[-1], path)
    found = _product_of_hdus(hdus) if len(hdus) > 3 else None
    if found not in (None, product.name):
        raise ValueError(f"its HDUs are those of an {found} file, not of an {product.name} file")
    if len(hdus) < product.hdus:
        raise ValueError(
            f"has {len(hdus)} HDUs, a whole {product.name} file at least {product.hdus}"
        )
    header = hdus[product.flux].header
    grid = [
        header.get(key, hdus[0].header.get(key, np.nan)) for key in ("CRVAL1", "CDELT1", "NAXIS1")
    ]
    if (
        not np.allclose(grid, [LOG10_START, LOG10_STEP, N_PIXELS], rtol=1e-7, atol=0)
        or header.get("CRPIX1", 1) != 1
    ):
        raise ValueError(
            "another wavelength grid: CRVAL1 {}, CDELT1 {}, NAXIS1 {}, CRPIX1 {}".format(
                *grid, header.get("CRPIX1", 1)
            )
        )
    shapes = {
        getattr(hdus[k], "shape", None)
        for k in (product.flux, product.error, product.mask)
        if k is not None
    }
    if found is None or len(shapes) > 1 or len(shapes.pop()) > 2:
        raise ValueError(f"its HDUs are not those of an {product.name} file")


# %% [markdown]
# Then one row of three HDUs, cut to the on-band pixels. For a star seen once both combinations are the same single spectrum, so rows 0 and 1 mean the
# same; row 2 and beyond ask for visits, and a file that has no such row says so. What the reader returns is in the machine's byte order (FITS is
# big-endian) and in our number types, whatever the release wrote.

# %%
#| export
class _Star(NamedTuple):
    facts: dict
    flux: np.ndarray
    ivar: np.ndarray
    mask: np.ndarray | None
    row: int | None  # the row it was read from; None where files of the product have no rows


def _pixels(hdu, row):
    "On-band pixels of one row; an array without rows is the only row there is."
    if len(hdu.shape) == 1 or hdu.shape[0] == 1:
        if row > 1:
            raise ValueError(
                f"row {row} does not exist: the star was seen once, and the file holds one spectrum"
            )
        data = hdu.section[:] if len(hdu.shape) == 1 else hdu.section[0, :]
    else:
        if row >= hdu.shape[0]:
            raise ValueError(f"row {row} does not exist: the file has rows 0 to {hdu.shape[0] - 1}")
        data = hdu.section[row, :]
    return np.asarray(data)[on_band]


def _read_star(path, product, row) -> _Star:
    with fits.open(path, memmap=True, lazy_load_hdus=True) as hdus:
        _check_whole(hdus, path, product)
        header = hdus[0].header
        if row is None:
            row = 0 if product.normalized else _combined_row(path, header)
        flux, error = _pixels(hdus[product.flux], row), _pixels(hdus[product.error], row)
        mask = None if product.mask is None else _pixels(hdus[product.mask], row).astype(np.int32)
        facts = {fact.column: fact.read(header) for fact in FACTS}
    match = FILE_NAME.fullmatch(Path(path).name)
    facts["APOGEE_ID"] = match["id"] if match else facts["APOGEE_ID"] or Path(path).stem
    facts["FILE"] = Path(path).name
    ivar = inverse_variance(flux, error, product)
    flux = np.nan_to_num(flux, nan=0, posinf=0, neginf=0).astype(np.float32)
    return _Star(facts, flux, ivar, mask, None if product.normalized else row)


def _try_star(path, product, row) -> _Star | Problem:
    try:
        return _read_star(path, product, row)
    except Exception as error:  # a damaged file can make any layer below raise anything
        return Problem(str(path), _reason(path, error))


def _reason(path, error):
    try:
        with open(path, "rb") as file:
            start = file.read(80)
    except OSError as problem:
        return problem.strerror or str(problem)
    if not start:
        return "empty"
    if not start.startswith((b"SIMPLE", b"\x1f\x8b")):
        return f"not a FITS file: it begins with {start[:20].decode('latin-1')!r}"
    return str(error) or type(error).__name__


# %% [markdown]
# ## Many files
# Room for all stars is made first, in float32, and each file goes straight into its row. Good stars close ranks: a damaged file leaves no hole. A
# few threads read ahead, so that waiting for one disk block or server does not stop the next. (Processes were tried, too: a file takes a few
# milliseconds, and starting processes and sending them back and forth cost more than a second core gains on some hundred files.)

# %%
#| export
def read_stars(paths, product, row=None, workers=None, keep=None, progress=True):
    "Spectra of the files where `keep`, their places in `paths`, and the problems of all."
    if row is not None and (not isinstance(row, (int, np.integer)) or row < 0):
        raise LabError(
            f"row must be 0, 1, 2 … (0 and 1 are the combinations, the visits follow), not {row!r}"
        )
    keep = np.ones(len(paths), bool) if keep is None else keep
    flux, ivar = (np.empty((keep.sum(), len(on_band)), np.float32) for _ in range(2))
    mask = None if product.mask is None else np.empty(flux.shape, np.int32)
    facts, places, problems = [], [], []
    rows = set()
    with warnings.catch_warnings(), ThreadPoolExecutor(workers or 4) as pool:
        warnings.simplefilter("ignore", AstropyWarning)  # said by the problem's reason
        stars = pool.map(partial(_try_star, product=product, row=row), paths)
        for place, star in enumerate(
            tqdm(
                stars,
                total=len(paths),
                desc="reading",
                unit="file",
                disable=not progress,
                leave=False,
            )
        ):
            if isinstance(star, Problem):
                problems.append(star)
            elif keep[place]:
                n = len(places)
                flux[n], ivar[n] = star.flux, star.ivar
                if mask is not None:
                    mask[n] = star.mask
                facts.append(star.facts)
                rows.add(star.row)
                places.append(place)
    n = len(places)
    stars = (
        Table(
            {
                name: [fact[name] for fact in facts]
                for name in (*(fact.column for fact in FACTS), "FILE")
            }
        )
        if n
        else Table()
    )
    stars.meta = {
        "product": product.name,
        "release": None,
        "archive": None,
        "normalized": product.normalized,
        "row": rows.pop() if len(rows) == 1 else None,  # None: none, or not the same for all
    }
    spectra = Spectra(wavelength, flux[:n], ivar[:n], stars, None if mask is None else mask[:n])
    return spectra, np.array(places, int), problems


def read_files(
    paths,  # files in any order; a single path works, too
    product: str = None,  # "apstar" or "aspcapstar"; from the files by default
    row: int = None,  # apStar only: 0 and 1 are the combinations, the visits follow; by default the one that each file's release means
    workers: int = None,  # threads that read ahead, 4 by default
    progress: bool = True,
) -> tuple:  # Spectra of the good files in their order, list of `Problem` of the others
    "Read loose apStar or aspcapStar files of any release; LabError if none is good or if they are of both kinds."
    paths = (
        [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
    )
    if product is None:
        kinds = {kind for kind in map(product_of, paths) if kind}
        if len(kinds) > 1:
            raise LabError(
                f"the files are of two kinds, {' and '.join(sorted(kinds))}: choose one with product=…"
            )
        product = kinds.pop() if kinds else "apstar"
    if product not in PRODUCTS:
        raise LabError(f"unknown product {product!r}: choose from {', '.join(PRODUCTS)}")
    spectra, _, problems = read_stars(paths, PRODUCTS[product], row, workers, progress=progress)
    if not len(spectra):
        raise LabError(f"none of {len(paths)} files is a good {product} file" + _first(problems))
    return spectra, problems


def _first(problems, n=3):
    more = f"; and {len(problems) - n} more" if len(problems) > n else ""
    return (": " + "; ".join(map(str, problems[:n])) + more) if problems else ": no file was given"


# %% [markdown]
# Three files of the archive, and what their headers say.

# %%
paths = [
    path
    for path in sorted(example.parent.glob("apStar-*.fits"))
    if record.rules.parse_name("apstar", path.name)
][:3]
three, problems = read_files(paths, progress=False)
three.stars["APOGEE_ID", "TELESCOPE", "FIELD", "LOCATION_ID", "SNR", "NVISITS", "J", "H", "K"]

# %% [markdown]
# The witness is the plain way, one whole array after the other. It has to give the same numbers, whatever we did to be fast.

# %%
for n, path in enumerate(paths):
    flux, error, mask = (np.atleast_2d(fits.getdata(path, hdu))[:, on_band] for hdu in (1, 2, 3))
    k = min(1, len(flux) - 1)  # one visit: one row
    assert np.array_equal(three.flux[n], flux[k]) and np.array_equal(three.mask[n], mask[k])
    assert np.array_equal(three.ivar[n] > 0, error[k] < 1e10)
    usable = error[k] < 1e10
    assert np.allclose(three.ivar[n][usable], 1 / error[k][usable].astype(float) ** 2, rtol=1e-6)

# %% [markdown]
# Now we damage copies of the first one on purpose. The healthy file among them comes through, each of the others gets its reason.

# %%
with tempfile.TemporaryDirectory() as folder:
    whole = paths[0].read_bytes()
    wrong_grid = whole.replace(b"CDELT1  =", b"CDELT9  =")
    damaged = {
        "a": whole,
        "b": whole[: len(whole) // 2],
        "c": b"<html>404 Not Found</html>",
        "d": b"",
        "e": wrong_grid,
    }
    files = [Path(folder) / f"apStar-r8-{name}.fits" for name in damaged]
    for file, content in zip(files, damaged.values()):
        file.write_bytes(content)
    spectra, problems = read_files(files, progress=False)
    with pytest.raises(
        LabError, match="none of 1 files is a good apstar file: apStar-r8-d.fits: empty"
    ):
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
    on_grid[:, on_band] = spectra.flux[0], error, spectra.mask[0]
    grid = fits.Header({"CRVAL1": LOG10_START, "CDELT1": LOG10_STEP})
    star = spectra.stars[0]
    header = fits.Header(
        {
            "OBJID": star["APOGEE_ID"],
            "SNR": star["SNR"],
            "LOCID": star["LOCATION_ID"],
            "H": star["H"],
        }
    )
    images = [
        fits.ImageHDU(values.astype(kind), grid)
        for values, kind in zip(on_grid, ("f4", "f4", "i2"))
    ]
    fits.HDUList(
        [fits.PrimaryHDU(header=header), *images, *(fits.ImageHDU() for _ in range(6))]
    ).writeto(path)


# %%
with tempfile.TemporaryDirectory() as folder:
    write_apstar(Path(folder) / "once.fits", three[:1])  # a name that says nothing
    again, problems = read_files(Path(folder) / "once.fits", progress=False)
assert (
    not problems
    and np.array_equal(again.flux, three.flux[:1])
    and np.array_equal(again.mask, three.mask[:1])
)
assert np.allclose(again.ivar, three.ivar[:1], rtol=1e-6) and np.array_equal(
    again.ivar > 0, three.ivar[:1] > 0
)
assert all(
    again.stars[name][0] == three.stars[name][0]
    for name in ("APOGEE_ID", "SNR", "LOCATION_ID", "H")
)


# %% [markdown]
# ## Finding the files
# Where files are is data: the release's templates, turned into folders. A folder may follow the survey's tree or one of the other layouts that the
# record knows, such as the lab's own `stars/<location>/`. Files of single visits are left out.

# %%
#| export
def find_files(
    root,  # of an archive
    product: str = "apstar",
    fields=None,  # names of folders; the record's by default, "all" for whatever is there
    telescopes=None,  # all of the release's by default
    release: str = None,  # the record's by default
) -> Table:  # path, APOGEE_ID, TELESCOPE and FOLDER of each star's file, sorted; maybe empty
    "The stars' files below `root`; a star that stands in several layouts is taken from the first."
    record = archive_record(root)
    rules = _rules(record, release)
    if fields is None and rules is record.rules:
        fields = record.fields
    fields = (
        ["*"]
        if fields is None or isinstance(fields, str) and fields == "all"
        else [escape(str(name)) for name in np.atleast_1d(fields)]
    )
    telescopes = (
        list(np.atleast_1d(telescopes)) if telescopes is not None else list(rules.telescopes)
    )
    found = {}
    for template in rules.templates(product):
        for telescope, folder in _folders(Path(root), template, fields, telescopes):
            for entry in sorted(os.listdir(folder)):
                star = rules.parse_name(product, entry)
                if star:
                    found.setdefault((telescope, folder.name, star), str(folder / entry))
    names = ("path", "TELESCOPE", "FOLDER", "APOGEE_ID")
    columns = zip(*((path, *key) for key, path in found.items())) if found else [[]] * 4
    return Table({name: np.array(list(column), str) for name, column in zip(names, columns)})


def _folders(root, template, fields, telescopes):
    "The folders of a template that exist, with the telescope; a template that names no telescope means the first."
    parent = str(PurePosixPath(template).parent)
    for telescope in telescopes if "{telescope}" in parent else telescopes[:1]:
        for field in fields:
            for folder in sorted(root.glob(parent.format(telescope=telescope, field=field))):
                if folder.is_dir():
                    yield str(telescope), folder


def _rules(record, release):
    if release is None:
        return record.rules
    if str(release).lower() not in RELEASES:
        raise LabError(f"unknown release {release!r}: choose from {', '.join(RELEASES)}")
    return RELEASES[str(release).lower()]


# %% [markdown]
# The catalogue is found in the same way: the survey's place first, then the lab's.

# %%
#| export
def find_catalogue(
    root,  # of an archive
    release: str = None,  # the record's by default
) -> Path:
    "The allStar table below `root`, packed (.gz) or not; LabError if there is none."
    rules = _rules(archive_record(root), release)
    tried = [
        Path(root) / (template + suffix)
        for template in rules.templates("allstar")
        for suffix in ("", ".gz")
    ]
    for path in tried:
        if path.is_file():
            return path
    raise LabError(
        f"no allStar table below {root}: looked for {', '.join(str(p.relative_to(root)) for p in tried if p.suffix != '.gz')}; "
        "fetch it with 'stellar-lab fetch'"
    )


# %%
files = find_files(root)
folders, number = np.unique(files["FOLDER"], return_counts=True)
Table({"folder": folders, "files": number})

# %% [markdown]
# A record is all it takes to read another release. An empty file under the name that DR17 gives to a southern star of the second telescope is
# found, a single visit is not.

# %%
with tempfile.TemporaryDirectory() as folder:
    here = Path(folder) / "dr17/apogee/spectro/redux/dr17/stars/lco25m/N362"
    here.mkdir(parents=True)
    for name in (
        "asStar-dr17-2M01020000-7100000.fits",
        "asStar-dr17-2M01020000-7100000-58000.fits",
        "asStar-dr17-2M01020000-7100000.png",
    ):
        (here / name).touch()
    there = find_files(folder, release="dr17")
assert (
    list(there["APOGEE_ID"]) == ["2M01020000-7100000"]
    and list(there["TELESCOPE"]) == ["lco25m"]
    and list(there["FOLDER"]) == ["N362"]
)
assert not np.char.endswith(files["path"], "-56931.fits").any()

# %% [markdown]
# ## The catalogue
# The survey's allStar table of DR14 has 263,000 rows of several hundred columns, 1.5 GB, of which we need twenty columns. It is mapped into memory,
# not read, and only these columns are copied, block by block, in the machine's own byte order. A value at or below -9000 means "none" and becomes
# NaN, a number that no comparison lets pass: a forgotten cut cannot mistake -9999 for a very cool star. Labels get their units.
#
# Cuts may need a column that is no label of this run, such as $\log g$ when only temperatures are asked for. It is read as well, but `meta["labels"]`
# remembers what was asked for, so that no model is trained on it by accident.

# %%
#| export
KEYS = ("APOGEE_ID", "TARGET_ID", "TELESCOPE", "FIELD", "LOCATION_ID")  # what a row can be found by
FLAGS = ("STARFLAG", "ASPCAPFLAG")  # what a cut may ask for, in every catalogue that has them
BLOCK = 8192  # rows of the catalogue that are mapped at a time


def read_catalogue(
    path,  # allStar table, .fits or .fits.gz
    labels=None,  # label names; all that the table has by default
    columns=(),  # further labels or columns, for cuts
) -> Table:  # keys, SNR, flags, labels and their errors with units; NaN where there is no value. meta["labels"]: the label names
    "The needed columns of an allStar table of any release; LabError if it lacks one."
    with _catalogue_errors(path), fits.open(path, memmap=True) as hdus:
        _check_bytes(hdus[1], path)
        known = {name.upper(): name for name in hdus[1].columns.names}
        rows = hdus[1].header["NAXIS2"]
    if "APOGEE_ID" not in known or not rows:
        raise LabError(
            f"{path} is not an allStar table: it has {'no rows' if not rows else 'no column APOGEE_ID'}"
        )
    wanted = _label_columns(path, known, labels)
    extra = _label_columns(
        path, known, [name for name in columns if name in LABELS and name not in wanted]
    )
    plain = {name: _column(path, known, name) for name in columns if name not in LABELS}
    sources = {name: known[name] for name in (*KEYS, "SNR", *FLAGS) if name in known} | plain
    sources |= {
        name: source
        for pair in (wanted | extra).values()
        for name, source in pair.items()
        if source
    }
    with _catalogue_errors(path):
        table = _copy_columns(path, sources, rows)
    for name in (*wanted, *extra):
        error = (
            np.asarray(table[f"{name}_ERR"])
            if f"{name}_ERR" in table.colnames
            else np.full(rows, np.nan)
        )
        table[name] = Column(table[name], unit=LABELS[name].unit)
        table[f"{name}_ERR"] = Column(
            np.where(error > 0, error, np.nan), unit=LABELS[name].unit
        )  # older tables write -1 for "none"
    table.meta = {"labels": list(wanted), "catalogue": Path(path).name}
    return table


# %% [markdown]
# A label's column went by different names over the years, and its record in `survey` lists them: the first one that the table has counts, and its
# error is the column of the same name with `_ERR` behind it. What is not there is said at once, with what is, before a single file has been read.

# %%
#| export
@contextmanager
def _catalogue_errors(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyWarning)  # said by the error
            yield
    except Exception as error:  # a damaged file can make any layer below raise anything
        raise LabError(
            f"{path} is not a whole allStar table ({_reason(path, error)}): fetch it again"
        ) from error


def _label_columns(path, known, labels):
    "label -> {label: its column, label_ERR: its error's column or None}"
    has = {name: pair for name, label in LABELS.items() for pair in [_pair(label, known)] if pair}
    if labels is None:
        return has
    names = [label.name for label in label_records(labels)]
    lacking = [name for name in names if name not in has]
    if lacking:
        tried = ", ".join(column for name in lacking for column in LABELS[name].columns)
        raise LabError(
            f"{path} has no label {', '.join(lacking)} (looked for the columns {tried}): it has {', '.join(has) or 'none'}"
        )
    return {name: has[name] for name in names}


def _pair(label, known):
    for column, error in zip(label.columns, label.errors):
        if column in known:
            return {label.name: known[column], f"{label.name}_ERR": known.get(error)}


def _column(path, known, name):
    if name.upper() not in known:
        raise LabError(f"{path} has no column {name}: a cut needs it")
    return known[name.upper()]


# %% [markdown]
# The columns lie scattered through the rows, so even a few of them touch every page of the file. Mapping it anew for each block of rows lets go of
# the pages of the block before: what stays in memory are the copies.

# %%
#| export
def _copy_columns(path, sources, rows):
    "Copies of some columns, a block of rows at a time so that no more than a block is ever resident."
    step = rows if str(path).endswith(".gz") else BLOCK  # what is packed has to be unpacked whole
    blocks = []
    for start in range(0, rows, step):
        with fits.open(path, memmap=True) as hdus:
            data = hdus[1].data[start : start + step]
            blocks.append({name: _native(data[source]) for name, source in sources.items()})
    return Table({name: np.concatenate([block[name] for block in blocks]) for name in sources})


def _native(values):
    "A copy in the machine's byte order; text without padding, floats with NaN for missing values."
    values = np.asarray(values)
    if values.dtype.kind in "SU":
        return np.char.strip(values.astype(str))
    if values.dtype.kind == "f":
        values = values.astype(np.float64)
        return np.where(values <= MISSING, np.nan, values)
    return values.astype(values.dtype.newbyteorder("="))


# %%
catalogue = read_catalogue(find_catalogue(root), record.labels)
catalogue[
    "APOGEE_ID", "LOCATION_ID", "SNR", record.labels[0], f"{record.labels[0]}_ERR", record.labels[2]
][:4]

# %% [markdown]
# Not every release has every label: DR12 wrote [Mg/H], not [Mg/Fe]. Then the error says what was looked for and what there is.

# %%
with tempfile.TemporaryDirectory() as folder:
    old = Path(folder) / "allStar-v603.fits"
    Table(
        {
            "APOGEE_ID": ["2M00004994+1621552"],
            "TEFF": [4705.0],
            "PARAM_M_H": [-9999.0],
            "MG_H": [0.01],
        }
    ).write(old)
    table = read_catalogue(old)
    with pytest.raises(
        LabError, match=r"no label MG_FE \(looked for the columns MG_FE\): it has TEFF, M_H"
    ):
        read_catalogue(old, ["TEFF", "MG_FE"])
assert (
    table.meta["labels"] == ["TEFF", "M_H"]
    and np.isnan(table["M_H"][0])
    and np.isnan(table["TEFF_ERR"][0])
)
assert table["TEFF"].unit == "K" and not np.any(catalogue["SNR"] < MISSING)


# %% [markdown]
# ## Files meet rows
# Which row is a file's? The survey's own key, TARGET_ID, holds field and star, as the release's template says. Where a table uses it otherwise,
# telescope, field and star together do the same. The star's name alone is the last resort, for a file whose folder is no field of the catalogue.
#
# All of it is one sort and one binary search, not a scan of the table for every star. Rows of the same target are put in order of falling SNR
# before, so the first one found is the best. (The lab's text said the lowest; its aim was the best measurement.)

# %%
#| export
def match_catalogue(
    stars: Table,  # N rows: APOGEE_ID, TELESCOPE, FOLDER
    catalogue: Table,  # of `read_catalogue`
    rules,  # survey.Release
) -> (
    tuple
):  # (N,) row of the catalogue, -1 where there is none; (N,) further rows of the same target
    "Row of each star, that with the highest SNR."
    ids, folders = (np.asarray(stars[name], str) for name in ("APOGEE_ID", "FOLDER"))
    near = np.flatnonzero(np.isin(catalogue["APOGEE_ID"], ids))
    snr = np.asarray(catalogue["SNR"])[near] if "SNR" in catalogue.colnames else np.zeros(len(near))
    near = near[np.argsort(-np.nan_to_num(snr, nan=-np.inf), kind="stable")]
    rows, further = np.full(len(stars), -1), np.zeros(len(stars), int)
    for mine, theirs, applies in _keys(stars, catalogue, near, rules):
        place, count = _look_up(mine, theirs)
        new = applies & (rows < 0) & (place >= 0)
        rows[new], further[new] = near[place[new]], count[new] - 1
    return rows, further


# %% [markdown]
# The search itself: with $N$ files and $M$ rows a scan costs $N M$ comparisons of strings, sorting and bisecting about $(M+N)\log M$. `np.unique`
# sorts, tells where each key stood first and how often it occurred, which is the number of duplicates.

# %%
#| export
def _look_up(mine, theirs):
    "For each of `mine` the first place in `theirs` and how many there are."
    if not len(theirs):
        return np.full(len(mine), -1), np.zeros(len(mine), int)
    unique, first, count = np.unique(theirs, return_index=True, return_counts=True)
    place = np.minimum(np.searchsorted(unique, mine), len(unique) - 1)
    hit = unique[place] == mine
    return np.where(hit, first[place], -1), np.where(hit, count[place], 0)


# %% [markdown]
# And the three kinds of key, from the surest to the weakest. Each is tried only on the stars that the ones before left without a row.

# %%
#| export
def _keys(stars, catalogue, near, rules):
    "Pairs of keys (the stars', the rows') from the surest to the weakest, and for which stars they apply."
    everyone = np.ones(len(stars), bool)
    columns = {name: _text(catalogue[name]) for name in KEYS if name in catalogue.colnames}
    ids, folders, telescopes = (_text(stars[name]) for name in ("APOGEE_ID", "FOLDER", "TELESCOPE"))
    if "TARGET_ID" in columns:
        yield (
            _fill(rules.target_id, telescope=telescopes, field=folders, id=ids),
            columns["TARGET_ID"][near],
            everyone,
        )
    known = np.zeros(len(stars), bool)
    for name in ("FIELD", "LOCATION_ID"):
        if name in columns:
            known |= np.isin(folders, columns[name])
            mine, theirs = (
                _fill("{a}\n{b}", a=folders, b=ids),
                _fill("{a}\n{b}", a=columns[name][near], b=columns["APOGEE_ID"][near]),
            )
            if "TELESCOPE" in columns:
                mine, theirs = (
                    _fill("{a}\n{b}", a=telescopes, b=mine),
                    _fill("{a}\n{b}", a=columns["TELESCOPE"][near], b=theirs),
                )
            yield mine, theirs, everyone
    yield ids, columns["APOGEE_ID"][near], ~known


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


# %%
rules = RELEASES["dr14"]
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
match_catalogue(stars, rows, rules)

# %% [markdown]
# Star *a* gets the better of its two rows, *b* is found by field and name, *d* by its name alone. Star *c* has a row, but in another field: that is
# another observation, and *c* goes without.

# %%
assert [list(x) for x in match_catalogue(stars, rows, rules)] == [[1, 2, -1, 4], [1, 0, 0, 0]]

# %% [markdown]
# The witness for the join is what the lab did: for every star a scan through the whole table. It must find the same row.

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
# Chip edges move with the star's velocity, so a pixel may see nothing in one star and the full light in the others. The lab's rule: a pixel
# below 5 % of its median over all stars is unusable. Taken literally it compares a faint star with bright ones, and stars of the archive differ by a
# factor of hundreds. So we divide each star by its own median $m_n$ over usable pixels first,
# $$ \frac{f_{np}}{m_n} < 0.05\;\operatorname{median}_{k}\frac{f_{kp}}{m_k} \quad\Rightarrow\quad w_{np}=0 , $$
# which no longer depends on how bright the companions happen to be.

# %% [markdown]
# The rule needs medians over usable pixels only. Unusable ones become NaN, sorting puts them last, and the middle of the rest is where half their
# number says. (numpy's own `nanmedian` does the same ten times slower, and warns where there is nothing.)

# %%
#| export
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
    lower, upper = (
        np.take_along_axis(ordered, place, axis=axis)
        for place in (np.maximum(count - 1, 0) // 2, np.minimum(count // 2, ordered.shape[axis] - 1))
    )
    return np.squeeze(0.5 * (lower + upper), axis=axis)


# %%
numbers = np.random.default_rng(0).normal(size=(4, 7, 5)).astype("f4")
numbers[numbers > 1] = np.nan
numbers[2, :, 3] = np.nan
for axis in (0, 1, 2):
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        slow = np.nanmedian(numbers, axis=axis)
    assert np.array_equal(nan_median(numbers, axis), slow, equal_nan=True)
assert np.isnan(nan_median(numbers, 1)[2, 3])


# %% [markdown]
# With it the rule is a few lines. Blocks of pixels keep the copies small, some megabytes instead of a second set of spectra.

# %%
#| export
def dark_pixels(
    flux: np.ndarray,  # (N, P)
    ivar: np.ndarray,  # (N, P)
    fraction: float = 0.05,
    block: int = 256,  # stars or pixels in work at a time
) -> np.ndarray:  # (N, P) bool
    "Pixels below `fraction` of the pixel's median over stars, each star relative to its own median. One star alone has none."
    dark = np.zeros(flux.shape, bool)
    if len(flux) < 2:
        return dark
    starts = range(0, len(flux), block)
    usable = (np.where(ivar[a : a + block] > 0, flux[a : a + block], np.nan) for a in starts)
    level = np.concatenate([nan_median(values, axis=1) for values in usable])
    level = np.where(level > 0, level, np.nan).astype(np.float32)[
        :, None
    ]  # without a level a star neither judges nor is judged
    for start in range(0, flux.shape[1], block):
        relative = flux[:, start : start + block] / level
        usable = np.where(ivar[:, start : start + block] > 0, relative, np.nan)
        typical = nan_median(usable.T, axis=1)
        with np.errstate(invalid="ignore"):
            dark[:, start : start + block] = relative < fraction * typical
    return dark


# %%
#| export
def drop_dark_pixels(
    spectra: Spectra,
    fraction: float = 0.05,
) -> Spectra:  # shares everything but ivar
    "The spectra with weight 0 on dark pixels."
    return spectra.replace(
        ivar=np.where(
            dark_pixels(spectra.flux, spectra.ivar, fraction), np.float32(0), spectra.ivar
        )
    )


# %% [markdown]
# Six stars with the same spectrum, each ten times fainter than the one before; one pixel of the third is dark. The rule finds that pixel and no
# other.

# %%
level = 10.0 ** -np.arange(6)[:, None]
toy = (level * np.random.default_rng(1).uniform(0.5, 1.5, (6, 400))).astype("f4")
toy[2, 7] *= 1e-3
weight = np.ones_like(toy)
weight[:, 50] = 0  # a pixel that nobody has measured judges nobody
assert np.array_equal(np.argwhere(dark_pixels(toy, weight)), [[2, 7]])
assert not dark_pixels(toy[:1], weight[:1]).any()  # a star alone has nobody to be compared with

# %% [markdown]
# The witness is numpy's own median of the usable values, pixel by pixel.

# %%
relative = (
    np.where(weight > 0, toy, np.nan)
    / np.nanmedian(np.where(weight > 0, toy, np.nan), axis=1)[:, None]
)
slow = [relative[:, p] < 0.05 * np.nanmedian(relative[:, p]) for p in range(400) if p != 50]
assert np.array_equal(np.delete(dark_pixels(toy, weight), 50, axis=1), np.transpose(slow))


# %% [markdown]
# ## An archive
# All of it together: find, match, read, darken. The result are the stars that have a file and a row, with the labels that the archive's record asks
# for. Nothing in it depends on which archive this is: labels, fields, cuts and paths come from the record that stands at the root.
#
# The order saves memory. The catalogue is matched first and let go but for the rows of our stars; then there is room for exactly the spectra that
# have a row, $N\times 7214\times(4+4+4)$ bytes for flux, weight and mask: 236 MB for the lab's 2,723 stars. Files without a row are opened, too, so
# that the ledger can tell a damaged file from a star that nobody knows.

# %%
#| export
def read_archive(
    root,  # of an archive
    product: str = None,  # "apstar" or "aspcapstar"; the first of the record's that has files by default
    fields=None,  # folders; the record's by default, "all" for whatever is there
    labels=None,  # label names; the record's by default
    row: int = None,  # apStar only: 0 and 1 are the combinations, the visits follow; the release's by default
    workers: int = None,  # threads that read ahead, 4 by default
    telescopes=None,  # all of the release's by default
    release: str = None,  # the record's by default
    dark: float = 0.05,  # `fraction` of `drop_dark_pixels`, for products with raw flux
    progress: bool = True,
) -> tuple:  # Spectra with labels, Ledger
    "Stars of an archive that have a good file and a row in the catalogue; LabError if there are none."
    record = archive_record(root)
    rules = _rules(record, release)
    product, files = _archive_files(root, record, rules, product, fields, telescopes, release)
    names = record.labels if labels is None else labels
    catalogue = read_catalogue(
        find_catalogue(root, release), names, [cut.column for cut in record.cuts]
    )
    rows, further = match_catalogue(files, catalogue, rules)
    lonely = _rows_without_file(files, catalogue, rules)
    catalogue, rows = (
        catalogue[rows],
        np.where(rows < 0, -1, np.arange(len(rows))),
    )  # one row a file; -1 takes any
    row = rules.row if row is None else row
    spectra, places, problems = read_stars(
        list(files["path"]), PRODUCTS[product], row, workers, rows >= 0, progress
    )

    broken = np.isin(files["path"], [problem.path for problem in problems])
    ledger = Ledger(len(files)).drop(
        "damaged",
        files["APOGEE_ID"][broken],
        "the file cannot be read",
        [p.reason for p in problems],
    )
    ledger = ledger.drop("no row in the catalogue", files["APOGEE_ID"][~broken & (rows < 0)])
    ledger = ledger.count(
        "duplicate rows resolved", further[places].sum(), "the row with the highest SNR counts"
    )
    ledger = ledger.count("rows of the catalogue without a file", lonely)
    if not len(spectra):
        raise LabError(
            f"no star of {root} is left: {len(files)} {product} files found, of which {broken.sum()} are damaged"
            f"{_first(problems) if problems else ''}, and the others have no row in {catalogue.meta['catalogue']}"
        )
    stars = _with_labels(spectra.stars, files[places], catalogue[places], rules)
    stars.meta |= {
        "release": rules.name.lower(),
        "archive": record.name,
        "labels": list(catalogue.meta["labels"]),
    }
    if not PRODUCTS[product].normalized and dark:
        spectra.ivar[dark_pixels(spectra.flux, spectra.ivar, dark)] = (
            0  # our own array, nobody else has seen it
        )
    return spectra.replace(stars=stars), ledger


def _archive_files(root, record, rules, product, fields, telescopes, release):
    if not Path(root).is_dir():
        raise LabError(
            f"there is no folder {root}: write an archive with 'stellar-lab archive', or fetch one with 'stellar-lab fetch'"
        )
    products = record.products if product is None else (product,)
    for name in products:
        files = find_files(root, name, fields, telescopes, release)
        if len(files):
            return name, files
    tried = ", ".join(template for name in products for template in rules.templates(name))
    where = (
        "all fields"
        if isinstance(fields, str) and fields == "all"
        else f"fields {', '.join(map(str, np.atleast_1d(fields or record.fields)))}"
    )
    raise LabError(
        f"no star's file below {root}: looked for {tried} in {where}; "
        "fetch them with 'stellar-lab fetch', or name other fields or another release"
    )


def _rows_without_file(files, catalogue, rules):
    "Targets of the catalogue in the same folders that no file belongs to."
    if rules.field_column not in catalogue.colnames:
        return 0
    folders = _text(catalogue[rules.field_column])
    here = np.isin(folders, _text(files["FOLDER"]))
    if "TELESCOPE" in catalogue.colnames:
        here &= np.isin(catalogue["TELESCOPE"], files["TELESCOPE"])
    theirs = _fill("{a}\n{b}", a=folders[here], b=_text(catalogue["APOGEE_ID"])[here])
    return len(
        np.setdiff1d(
            theirs, _fill("{a}\n{b}", a=_text(files["FOLDER"]), b=_text(files["APOGEE_ID"]))
        )
    )


def _with_labels(stars, files, catalogue, rules):
    "The stars table with what path and catalogue know beyond the header."
    stars = stars.copy()
    stars["APOGEE_ID"] = files["APOGEE_ID"]
    stars["TELESCOPE"] = np.where(
        _text(stars["TELESCOPE"]) == "", _text(files["TELESCOPE"]), _text(stars["TELESCOPE"])
    )
    for name in ("FIELD", "LOCATION_ID"):
        if name in catalogue.colnames:
            unknown = np.isin(_text(stars[name]), ["", "-1"])
            stars[name] = np.where(unknown, catalogue[name], stars[name])
    for name in catalogue.colnames:
        if name == "SNR":
            stars["SNR"] = np.where(np.isfinite(catalogue["SNR"]), catalogue["SNR"], stars["SNR"])
        elif name not in KEYS:
            stars[name] = catalogue[name]
    return stars


# %% [markdown]
# ## Cuts
# A star must have light, all its labels, and pass the cuts that the archive's record names. Each rule sees only the stars that earlier rules left,
# and the spectra are cut once, at the end, by all rules together. A value that is not known passes no cut.
#
# `keep` is the same for a single rule: the next chapters use it for theirs, and hand the ledger on.

# %%
#| export
def keep(
    spectra: Spectra,
    good: np.ndarray,  # (N,) bool
    rule: str,
    ledger: Ledger = None,  # to go on with; a new one by default
    reason: str = "",
) -> tuple:  # Spectra, Ledger
    "The stars that a rule calls `good`, and the ledger with one more rule."
    ledger = _going_on(spectra, ledger)
    good = np.asarray(good, bool)
    return spectra[good], ledger.drop(rule, spectra.stars["APOGEE_ID"][~good], reason)


def _going_on(spectra, ledger):
    if ledger is None:
        return Ledger(len(spectra))
    if ledger.left != len(spectra):
        raise LabError(
            f"the ledger has {ledger.left} stars left, but there are {len(spectra)} spectra: go on with the ledger of these spectra"
        )
    return ledger


def apply_cuts(
    spectra: Spectra,
    cuts=None,  # survey.Cut records; those of the archive's record by default
    ledger: Ledger = None,  # to go on with; a new one by default
) -> tuple:  # Spectra, Ledger
    "Drop stars without light, without all labels, or outside a cut; LabError if a column is missing or nothing is left."
    ledger = _going_on(spectra, ledger)
    good = np.ones(len(spectra), bool)
    for rule, passed, reason in _rules_of(spectra, _cuts_of(spectra, cuts)):
        ledger = ledger.drop(rule, spectra.stars["APOGEE_ID"][good & ~passed], reason)
        good &= passed
    if not good.any():
        raise LabError(f"no star passed the cuts, widen them:\n{ledger}")
    return spectra[good], ledger


def _cuts_of(spectra, cuts):
    if cuts is not None:
        return cuts
    name = spectra.stars.meta.get("archive")
    if name not in ARCHIVES:
        raise LabError(
            "these spectra come from no known archive: say which cuts to apply, cuts=[Cut(…)] or cuts=()"
        )
    return ARCHIVES[name].cuts


def _rules_of(spectra, cuts):
    "Name, stars that pass, and reason of each rule."
    yield (
        "flux all zero",
        np.any((spectra.flux != 0) & (spectra.ivar > 0), axis=1),
        "no usable pixel",
    )
    yield (
        "missing labels",
        np.isfinite(spectra.labels()).all(axis=1),
        "needs " + ", ".join(spectra.label_names),
    )
    for cut in cuts:
        if cut.column not in spectra.stars.colnames:
            raise LabError(
                f"the cut {cut.name!r} needs a column {cut.column}, which the stars lack: there are {', '.join(spectra.stars.colnames)}"
            )
        reason = f"keep {cut}" + (f": {cut.reason}" if cut.reason else "")
        yield cut.name, cut.keeps(spectra.stars[cut.column]), reason


# %% [markdown]
# ## The stars at hand
# Now for the archive of this run: read, and see what the ledger says before any cut is made.

# %%
spectra, found = read_archive(root, progress=False)
spectra

# %%
good, ledger = apply_cuts(spectra, ledger=found)
ledger

# %%
#| echo: false
Markdown(
    f"Of {ledger.found} files {ledger.left} stars are left. "
    + " ".join(
        f"To *{step.rule}* fell {len(step.stars)} ({len(step.stars) / ledger.found:.1%})."
        for step in ledger.steps
        if step.stars
    )
)

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
assert ledger.found == len(find_files(root)) == ledger.left + ledger.table[
    "dropped"
].sum() and ledger.left == len(good)

# %%
survivors = []
for n, star in enumerate(spectra.stars):
    labelled = all(np.isfinite(star[name]) for name in record.labels)
    if (
        labelled
        and all(cut.low < star[cut.column] < cut.high for cut in record.cuts)
        and spectra.flux[n].any()
    ):
        survivors.append(n)
assert list(good.stars["FILE"]) == list(spectra.stars["FILE"][survivors])
assert np.array_equal(good.flux, spectra.flux[survivors]) and np.array_equal(
    good.labels(), spectra.labels()[survivors]
)

# %% [markdown]
# A later chapter goes on with the same ledger, here with a rule of its own. A ledger of other stars is refused.

# %%
fewer, longer = keep(good, good.stars["NVISITS"] > 1, "seen once", ledger)
assert (
    longer.left == len(fewer)
    and longer.steps[:-1] == ledger.steps
    and longer.steps[-1].rule == "seen once"
)
with pytest.raises(LabError, match="go on with the ledger of these spectra"):
    keep(good, np.ones(len(good), bool), "nothing", found)

# %% [markdown]
# ## What the literal rule would have done
# Back to the dark pixels, now on the archive. The lab's literal rule compares flux with the median flux of all stars; ours takes each star's own
# level out first. We ask both twice: once on (at most some 600) stars of all kinds, once on the brightest tenth and the faintest twentieth of them
# alone.

# %%
paths = find_files(root, "apstar")["path"]
raw, _ = read_files(
    paths[:: max(len(paths) // 600, 1)], progress=False
)  # loose files: nobody has darkened them yet
level = np.ma.median(np.ma.array(raw.flux, mask=raw.ivar == 0), axis=1).filled(0)
bright_first = np.argsort(-level)[: np.sum(level > 0)]  # stars without light have no say
n = len(bright_first)
samples = {
    "all stars": bright_first,
    "brightest and faintest": np.r_[bright_first[: n // 10], bright_first[-n // 20 :]],
}


# %%
def literal_rule(spectra):
    "The lab's rule to the letter."
    typical = np.ma.median(np.ma.array(spectra.flux, mask=spectra.ivar == 0), axis=0)
    return (spectra.flux < 0.05 * typical).filled(False) & (spectra.ivar > 0)


def our_rule(spectra):
    return dark_pixels(spectra.flux, spectra.ivar) & (spectra.ivar > 0)


# %%
rows = []
for name, sample in samples.items():
    stars = raw[sample]
    counts = {
        rule: dark(stars).sum(axis=1)
        for rule, dark in (("literal", literal_rule), ("ours", our_rule))
    }
    rows += [
        (name, len(stars), rule, count.sum(), np.sum(count > 3000))
        for rule, count in counts.items()
    ]
Table(
    rows=rows,
    names=["sample", "stars", "rule", "dark pixels", "stars that lose more than 3,000 pixels"],
)

# %%
fig, ax = plt.subplots(figsize=(7, 3.2))
for rule, color in (("literal", "C1"), ("ours", "C0")):
    ax.plot(
        stars.stars["H"],
        counts[rule],
        "o",
        ms=4,
        alpha=0.6,
        color=color,
        label={"literal": "literal rule", "ours": "our rule"}[rule],
    )
ax.axhline(3000, color="0.6", ls="--", lw=0.8)
ax.set(
    xlabel="$H$ [mag]",
    ylabel="dark pixels of 7,214",
    yscale="symlog",
    ylim=(-0.5, 3e4),
    title="brightest and faintest stars",
)
ax.legend(loc="lower right");

# %%
#| echo: false
alone, flagged = rows[2][4], (raw.mask[bright_first][our_rule(raw[bright_first])] != 0).sum()
contrast = level.max() / level[level > 0].min()
Markdown(f"""**What to see.** The brightest star here has {contrast:,.0f} times the flux of the faintest. Among all {n} stars with light most are
faint, so the literal rule's median is a faint star's, and the rules find {rows[0][3]:,} and {rows[1][3]:,} dark pixels (of ours, {flagged:,} carry a mask
bit anyway). In the company of the brightest, the literal rule takes {alone} faint stars whole: beyond the dashed line the lab drops a star. Nothing
is wrong with them but their neighbours. Our rule takes {rows[3][4]}.""")

# %% [markdown]
# As a test: dimming every fifth star a hundredfold changes nothing in our answer, and much in the literal one.

# %%
dim = raw.replace(flux=raw.flux * np.where(np.arange(len(raw)) % 5, 1, 0.01).astype("f4")[:, None])
assert np.mean(our_rule(dim) != our_rule(raw)) < 1e-6  # but for float32's last digit
assert np.mean(literal_rule(dim) != literal_rule(raw)) > 0.1


# %% [markdown]
# ## The labels
# What kind of stars are left? A corner plot shows each label's distribution (dashed: 16th and 84th percentile) and each pair against one another.

# %%
#| export
def plot_corner(
    spectra: Spectra,
    names=None,  # label names; all that the stars have by default
    **style,  # for corner.corner
):
    "Corner plot of the labels in the survey's plot ranges, with the 16 and 84 % quantiles; returns the Figure."
    labels = label_records(spectra.label_names if names is None else names)
    values = spectra.labels([label.name for label in labels])
    values = values[np.isfinite(values).all(axis=1)]
    if len(values) < 2:
        raise LabError(
            f"a corner plot needs at least two stars with the labels {', '.join(label.name for label in labels)}, there are {len(values)}"
        )
    fig = plt.figure(
        figsize=(1.6 * len(labels), 1.6 * len(labels)), layout="none"
    )  # corner spaces its panels itself
    corner.corner(
        values,
        fig=fig,
        labels=[label.axis for label in labels],
        range=[label.plot_range for label in labels],
        max_n_ticks=4,
        **(
            {
                "quantiles": [0.16, 0.84],
                "bins": 25,
                "color": "#0173b2",
                "labelpad": 0.12,
                "plot_contours": False,
                "plot_density": False,
                "data_kwargs": {"alpha": 0.6, "ms": 3},
            }
            | style
        ),
    )
    return fig


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
#| export
def plot_raw(
    spectra: Spectra,
    rows=(0, 1, 2),  # which stars
    window=(16_000, 16_150),  # of the zoom [Angstrom]
):
    "Some stars, whole on the left and zoomed on the right, each with its error on a second axis; returns the Figure."
    fig, axes = plt.subplots(
        len(rows), 2, figsize=(11, 2.2 * len(rows) + 0.3), width_ratios=(3, 2), squeeze=False
    )
    for row, pair in zip(rows, axes):
        star, flux, ivar = spectra.stars[row], spectra.flux[row], spectra.ivar[row]
        shown = ivar > 0 if spectra.mask is None else (ivar > 0) & (spectra.mask[row] == 0)
        for ax, part in zip(pair, (None, window)):
            plot_spectrum(spectra.wavelength, flux, ivar, part, error=True, ax=ax)
            _show_most(ax, fig.axes[-1], flux[shown], ivar[shown])
            ax.set(xlabel=None, ylabel=None)
        pair[0].set_title(
            f"{star['APOGEE_ID']}, $H$ = {star['H']:.1f}, SNR {star['SNR']:.0f}",
            fontsize="small",
            loc="left",
        )
        fig.axes[-2].set_ylabel(
            None
        )  # the error axis of the left panel: the right one's label serves both
    normalized = spectra.stars.meta.get("normalized")
    fig.supylabel(
        "flux / continuum" if normalized else r"flux [$10^{-17}$ erg s$^{-1}$ cm$^{-2}$ Å$^{-1}$]",
        fontsize="small",
    )
    fig.supxlabel("vacuum wavelength [Å]", fontsize="small")
    return fig


def _show_most(ax, error_ax, flux, ivar):
    "Limits that show the star; what a sky line left behind may leave the axes."
    if len(flux):
        low, high = np.percentile(flux, [0.5, 99.5])
        ax.set_ylim(low - 0.2 * (high - low), high + 0.2 * (high - low))
        error_ax.set_ylim(0, 4 / np.sqrt(np.median(ivar)))
    ax.xaxis.set_major_locator(plt.MaxNLocator(5))


# %%
order = np.argsort(good.labels()[:, 2])  # poor, middling and rich in metals
plot_raw(good, order[[0, len(good) // 2, -1]]);

# %% [markdown]
# **What to see.** The slope over a chip is the star's temperature and the instrument's throughput, and the next chapter takes both away. Where the
# error jumps, a line of the night sky was subtracted. And from the first star to the last the lines multiply: that is metallicity, before any
# model.

# %% [markdown]
# ## The survey's own files
# Our archive is written by our own code, and a reader that agrees with its own writer proves little. The variable `STELLAR_LAB_REAL_DATA` may name
# a folder of raw files of several releases: with visits and without, float32 and float64, and the mystery star without a name.

# %%
real = real_data()
if real is None:
    print(
        "Skipped: STELLAR_LAB_REAL_DATA is not set, so there are no raw files of the survey to read."
    )
else:
    raw_paths = [*sorted(real.glob("apStar-*.fits")), real / "mystery_spec_wiped.fits"]
    sky, problems = read_files(raw_paths, progress=False)
    assert not problems and len(sky) == len(raw_paths) and product_of(raw_paths[-1]) == "apstar"
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
# leaves the axes; in the dwarfs the lines are many and blurred. Two traps show in the table. The third star is flagged on nearly all of its blue
# chip (persistence), though its errors there look like those of the other chips: flux and error alone do not tell, the mask has to. And row 1 of
# the DR17 file carries *no* flags, while its row 0 does: who reads DR17 takes `row=0`.

# %%
if real is not None:
    seventeen = raw_paths[0]
    flagged = [(read_files(seventeen, row=k, progress=False)[0].mask != 0).mean() for k in range(3)]
    print(
        f"{seventeen.name}: flagged in row 0 {flagged[0]:.1%}, in row 1 {flagged[1]:.1%}, in row 2 (a visit) {flagged[2]:.1%}"
    )
    assert flagged[0] > 0.05 and flagged[1] == 0

# %% [markdown]
# Both real catalogues go through the same two functions. In the newer one each star has one row and finds it by TARGET_ID. The older one holds
# stars several times, and stars of a second telescope under another form of the key: each must find a row of its own name, no worse than the one it
# came from.

# %%
if real is not None:
    new = read_catalogue(real / "allStar-dr16-33rows.fits")
    own = Table(
        {"APOGEE_ID": new["APOGEE_ID"], "TELESCOPE": new["TELESCOPE"], "FOLDER": new["FIELD"]}
    )
    rows, further = match_catalogue(own, new, RELEASES["dr16"])
    assert list(rows) == list(range(len(new))) and not further.any()
    print(
        f"{len(new)} rows, labels {', '.join(new.meta['labels'])}; without a [Mg/Fe]: {np.isnan(new['MG_FE']).sum()}"
    )

# %%
if real is not None:
    old_path = real / "allStar-v603-hipparcos.fits.gz"
    old = read_catalogue(old_path)
    with pytest.raises(
        LabError, match="no label MG_FE, SI_FE .* it has TEFF, LOGG, FE_H, M_H, ALPHA_M"
    ):
        read_catalogue(old_path, ["TEFF", "MG_FE", "SI_FE"])
    own = Table(
        {
            "APOGEE_ID": old["APOGEE_ID"],
            "TELESCOPE": old["TELESCOPE"],
            "FOLDER": old["LOCATION_ID"].astype(str),
        }
    )
    rows, further = match_catalogue(own, old, RELEASES["dr14"])
    assert np.array_equal(old["APOGEE_ID"][rows], old["APOGEE_ID"]) and np.all(
        old["SNR"][rows] >= old["SNR"]
    )
    print(
        f"{len(old)} rows, {np.isfinite(old['TEFF']).sum()} with a temperature, {np.sum(further > 0)} in company of the same target"
    )

# %% [markdown]
# **Exercise.** Read the archive with `row=0`, the combination weighted pixel by pixel, and compare it with row 1 star by star. Where do they differ
# by more than the errors, and why there?
