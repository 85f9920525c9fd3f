# %% [markdown]
# # Where do the stars come from?
# > Real spectra small enough for a repository, and a writer that gives them back the survey's own files, flaws included.
#
# **Question.** A lesson on real stars wants real files, but the survey's weigh gigabytes, sit on a server and hide their faults. How do we get stars
# that are real, files laid out as the survey lays out its own, and faults that we know the number of?
#
# **Idea.** Take apart and put together. The *spectra* are real: 553 stars of star clusters, published by the survey and carried on in the test data
# of a small program. They come relative to a pseudo-continuum, $f = F/C$, and that is what we ship. The *instrument* is ours: a writer multiplies
# by a continuum that it knows,
# $$ F(\lambda) = f(\lambda)\; 10^{-0.4H}F_0\,\frac{B_\lambda(T_\mathrm{eff})}{B_{\lambda_0}(T_\mathrm{eff})}\;t(\lambda), $$
# a black body of the star's temperature $T_\mathrm{eff}$, scaled to its magnitude $H$, seen through a smooth throughput $t$, and lays the result
# out in the files of data release 14. Reading them takes all the steps that the sky's own files take; but where the sky keeps its answers, here
# we can look.
#
# You learn where the stars of all other chapters come from, who they are, and how much of each file is real. You need numpy and astropy's FITS
# files. The data model is that of [Holtzman et al. 2015](https://doi.org/10.1088/0004-6256/150/5/148), the stars are those of [Mészáros et al.
# 2013](https://doi.org/10.1088/0004-6256/146/5/133).

# %%
#| default_exp archives

# %%
#| export
import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from glob import escape
from importlib import import_module
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import QTable, Table
from numpy.polynomial.legendre import legval
from scipy import constants
from scipy.ndimage import binary_opening
from tqdm import tqdm

from stellar_lab.normalize import MASKED_LIMIT
from stellar_lab.survey import (
    ARCHIVE_FILE,
    ARCHIVES,
    CHIPS,
    LABELS,
    LOG10_START,
    LOG10_STEP,
    MYSTERY_FILE,
    N_PIXELS,
    PIXMASK,
    TRUTH_FILE,
    LabError,
    Spectra,
    atomic_path,
    data_file,
    end_with_parent,
    on_band,
    own_temporary,
    read_truth,
    remove_strays,
    sdss_id_folder,
    sha256_of,
    trouble_in_words,
    wavelength,
    what_stands_at,
)

# %%
#| hide
import astropy.units as u
import matplotlib.pyplot as plt
import pytest
from astropy.modeling.models import BlackBody
from IPython.display import Markdown

from stellar_lab.survey import (
    PIXMASK_NAMES,
    archive_record,
    plot_spectrum,
    use_style,
)

# %%
#| hide
use_style()


# %% [markdown]
# ## From a tarball to one file
# Version 0.3.5 of the program *TheCannon* (A. Y. Q. Ho, MIT licence) carried its example in its source distribution: 553 `aspcapStar` files of SDSS
# DR10 and a table of labels, the stars on which [Ness et al. 2015](https://doi.org/10.1088/0004-637X/808/1/16) trained. The package registry still
# has it: `pip download --no-deps --no-binary :all: TheCannon==0.3.5`. Later versions dropped the data, so we keep a copy, and say by checksums what
# it is a copy of. First, one checksum for a whole folder; we shall need it again when two archives are compared.

# %%
#| exporti
def tree_digest(root) -> str:
    """One checksum for a whole folder.

    Parameters
    ----------
    root : str or Path
        A folder.

    Returns
    -------
    str
        The sha256 over names and contents of all files below it, hidden ones left out.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(root).rglob("*") if path.is_file()):
        name = file.relative_to(root).as_posix()
        if not any(step.startswith(".") for step in name.split("/")):
            digest.update(f"{name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


# %%
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "star.txt").write_text("one")
    first = tree_digest(folder)
    (Path(folder) / "star.txt").write_text("two")
    second = tree_digest(folder)
assert first != second
print(first[:16], second[:16], sep="\n")

# %% [markdown]
# A source of the spectra is either the tarball or its unpacked folder. Both are checked, file by file, before anything is believed: a truncated
# download or a folder with one file edited is refused with the reason.

# %%
#| export
_TARBALL_SHA256 = "4c65eb239868b90f944d4fe268d8f839f0e6926e8cb862e6c6a6867281fd9d58"
_EXAMPLE = "TheCannon-0.3.5/TheCannon/example_DR10"  # the folder in it that we take
# of its 553 spectra and their label table:
_EXAMPLE_DIGEST = "68fe3779aa948dba0dceb76009340ce47a8a4793db59ea15297a494a5af59494"


def _example_folder(source, scratch):
    "The unpacked folder of the example, checked; `scratch` is where a tarball may be unpacked."
    source = Path(source)
    if source.is_file():
        if sha256_of(source) != _TARBALL_SHA256:
            raise LabError(
                f"{source} is not TheCannon-0.3.5.tar.gz as we know it "
                f"(sha256 {_TARBALL_SHA256}): download it again"
            )
        with tarfile.open(source) as tar:
            members = [member for member in tar if member.name.startswith(_EXAMPLE)]
            tar.extractall(scratch, members, filter="data")
        source = Path(scratch) / _EXAMPLE
    if not (source / "reference_labels.csv").is_file():
        raise LabError(
            f"{source} holds no reference_labels.csv: name the tarball TheCannon-0.3.5.tar.gz "
            "or its folder example_DR10"
        )
    if _example_digest(source) != _EXAMPLE_DIGEST:
        raise LabError(
            f"the files in {source} are not those of TheCannon 0.3.5: unpack the tarball again"
        )
    return source


def _example_digest(folder):
    "One checksum for the files that we take."
    digest = hashlib.sha256()
    for file in [*sorted((folder / "Data").glob("*.fits")), folder / "reference_labels.csv"]:
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


# %%
with tempfile.TemporaryDirectory() as folder:
    with pytest.raises(LabError, match="no reference_labels.csv: name the tarball"):
        _example_folder(folder, folder)
    tarball = Path(folder) / "TheCannon-0.3.5.tar.gz"
    tarball.write_bytes(b"half a download")
    with pytest.raises(LabError, match="as we know it .*: download it again") as caught:
        _example_folder(tarball, folder)
    assert "is not TheCannon-0.3.5.tar.gz" in str(caught.value)
    print(str(caught.value).replace(folder, "…"))

# %% [markdown]
# ### Which labels
# The table holds two sets. The *raw* ones are what the survey's pipeline ASPCAP fitted; the *calibrated* ones, `_{corr}`, were moved onto the scale
# of independent measurements (asteroseismic gravities, literature metallicities of these very clusters: Mészáros et al. 2013). We take the
# calibrated temperature, gravity and metallicity, and keep the raw ones as `TEFF_RAW`, `LOGG_RAW`, `M_H_RAW`. [α/M], [C/M] and [N/M]
# were never calibrated. A file's own parameter vector `FPARAM` holds raw values too, but for some stars others than the table: the table counts, as
# in Ness et al.

# %%
#| export
_CSV_LABELS = {  # our names -> columns of reference_labels.csv
    "TEFF": "Teff_{corr}",
    "LOGG": "logg_{corr}",
    "M_H": "[M/H]_{corr}",
    "ALPHA_M": "[a/M]",
    "C_M": "[C/M]",
    "N_M": "[N/M]",
    "TEFF_RAW": "Teff",
    "LOGG_RAW": "logg",
    "M_H_RAW": "[M/H]",
}
_CSV_ERRORS = {"TEFF": "e_Teff_corr", "M_H": "e_[MH]+corr"}
# Places in the survey's parameter vector:
_FPARAM = {"TEFF": 0, "LOGG": 1, "M_H": 3, "C_M": 4, "N_M": 5, "ALPHA_M": 6}
# Facts that a file's own table (HDU 4) gives, and the two that it calls otherwise:
_FACTS = (
    "FIELD LOCATION_ID RA DEC GLON GLAT J H K SNR NVISITS VHELIO VSCATTER VERR "
    "STARFLAG ANDFLAG ASPCAPFLAG CHI2 TARG1 TARG2"
).split()
_NAMES_IN_FILE = {"LOCATION_ID": "LOC", "CHI2": "PARAM_CHI2"}

# %% [markdown]
# ### Which errors
# Calibration errors exist for temperature and metallicity, for most stars: in the median 139 K and 0.10 dex. Everything else has only the
# covariance of the pipeline's fit, which knows photon noise and nothing else: its median is 6 K and 0.017 dex in gravity, and no comparison of
# ASPCAP with other measurements ever came out that well. We put a floor under it. The floors are a judgement of ours; they say "not better than
# this", and nothing more.

# %%
#| export
_ERROR_FLOORS = {"TEFF": 50.0, "LOGG": 0.1, "M_H": 0.05, "ALPHA_M": 0.04, "C_M": 0.07, "N_M": 0.07}

# %%
rows = [
    (name, column, _CSV_ERRORS.get(name, "the fit's"), _ERROR_FLOORS[name])
    for name, column in _CSV_LABELS.items()
    if name in _ERROR_FLOORS
]
Table(rows=rows, names=["label", "its column", "its error", "but at least"])


# %%
#| export
def _catalogue_row(file, table, labels):
    "A star's row of the packed table, from its file's HDU 4 and its row of reference_labels.csv."
    row = {"APOGEE_ID": str(table["OBJ"]).strip(), "FILE": file.name}
    for name in _FACTS:
        value = table[_NAMES_IN_FILE.get(name, name)]
        row[name] = value.strip() if isinstance(value, str) else value.item()
    row |= {name: float(labels[column]) for name, column in _CSV_LABELS.items()}
    for name, place in _FPARAM.items():
        given = float(labels[_CSV_ERRORS[name]]) if name in _CSV_ERRORS else 0.0
        formal = float(table["FPARAM_COV"][place, place]) ** 0.5
        row[f"{name}_ERR"] = given if given > 0 else max(formal, _ERROR_FLOORS[name])
    return row


# %% [markdown]
# ### How it becomes small
# In float32, flux and error of 553 stars take 32 MB, most of it noise in digits that mean nothing. The spectra's errors are 0.005 or more, so a
# flux in steps of $10^{-4}$ loses nothing: rounding adds a variance of $(10^{-4})^2/12$, less than $10^{-4}$ of the smallest noise. Errors run over
# four decades and are kept as logarithms, in steps of 0.05 %. Integers compress well: FITS's own Rice compression brings both to about 8 MB.
# Off-band pixels are zero in all 553 files and are left out.
#
# One thing must survive exactly: whether a pixel is *good* (flux above zero, error between 0 and 0.3). An error of 0.29999 may not become 0.30001.
# So `_encode` rounds towards the right side of the limit, and a faint flux never to zero.

# %%
#| export
_FLUX_STEP = 1e-4
_LOG_ERROR_STEP = 5e-4
_NO_ERROR = -32768  # where the survey wrote an error of zero
_MAX_ERROR = 0.3  # a pixel with a larger error is unusable


def _encode(flux, error):
    "Flux and error as 16-bit steps; a pixel never changes between usable and unusable."
    flux = flux.astype(float)
    error = error.astype(float)
    steps = np.rint(flux / _FLUX_STEP).astype("i2")
    with np.errstate(divide="ignore"):
        levels = np.where(error > 0, np.log(error) / _LOG_ERROR_STEP, _NO_ERROR)
    levels = np.rint(levels)
    limit = int(np.floor(np.log(_MAX_ERROR) / _LOG_ERROR_STEP))
    usable = np.minimum(levels, limit)
    unusable = np.maximum(levels, limit + 1)
    levels = np.where(error < _MAX_ERROR, usable, unusable).astype("i2")
    return np.where(flux > 0, np.maximum(steps, 1), steps).astype("i2"), levels


# %%
flux = np.array([0, 4e-5, 0.9, 1.0])
error = np.array([0, 0.29999, 0.30001, 0.02])
steps, levels = _encode(flux, error)
assert list(steps) == [0, 1, 9000, 10000] and levels[0] == _NO_ERROR
assert list(np.exp(levels[1:] * _LOG_ERROR_STEP) < _MAX_ERROR) == [True, False, True]
Table([flux, error, steps, levels], names=["flux", "error", "flux kept as", "error kept as"])

# %%
#| exporti
_PACKED_STARS = "clusters_dr10.fits"  # in stellar_lab.data


def pack_real_stars(source, path, progress: bool = True) -> str:
    """Pack the 553 spectra and their labels into one file; same source, same bytes.

    Parameters
    ----------
    source : str or Path
        TheCannon-0.3.5.tar.gz, or the folder example_DR10 in it.
    path : str or Path
        The FITS file to write.
    progress : bool, default True
        Show a bar.

    Returns
    -------
    str
        The sha256 of the file.

    Raises
    ------
    LabError
        If the source is not the one we know.
    """
    with tempfile.TemporaryDirectory() as scratch:
        rows, steps, levels = _read_example(_example_folder(source, scratch), progress)
    flux = fits.CompImageHDU(np.array(steps), compression_type="RICE_1", name="FLUX")
    error = fits.CompImageHDU(np.array(levels), compression_type="RICE_1", name="ERROR")
    flux.header["STEP"] = (_FLUX_STEP, "flux = STEP * value")
    error.header["STEP"] = (_LOG_ERROR_STEP, f"error = exp(STEP * value); {_NO_ERROR}: zero")
    table = fits.BinTableHDU(Table(rows=rows), name="STARS")
    with atomic_path(path) as temporary:
        fits.HDUList([fits.PrimaryHDU(), flux, error, table]).writeto(temporary)
    return sha256_of(path)


def _read_example(folder, progress):
    "Table rows, encoded fluxes and encoded errors of the stars in the example's folder."
    with open(folder / "reference_labels.csv", newline="") as file:
        labels = {row["ID"]: row for row in csv.DictReader(file)}
    files = sorted((folder / "Data").glob("*.fits"))
    rows = []
    spectra = []
    for file in tqdm(files, desc="packing", unit="star", disable=not progress):
        with fits.open(file) as hdus:
            rows.append(_catalogue_row(file, hdus[4].data[0], labels[file.name]))
            spectra.append(_encode(hdus[1].data[on_band], hdus[2].data[on_band]))
    steps, levels = zip(*spectra, strict=True)
    return rows, steps, levels


# %% [markdown]
# The shipped file is what this function makes of that tarball. Its checksum is tested always. That it can be *remade*, bit by bit, is tested when
# the variable `STELLAR_LAB_CANNON_TARBALL` names the tarball (or the unpacked folder `example_DR10`).

# %%
with data_file(_PACKED_STARS) as packed:
    shipped = sha256_of(packed)
    print(f"{_PACKED_STARS}: {packed.stat().st_size / 1e6:.1f} MB, checksum as it should be")
assert shipped == "f4aa9313225a39cfb82ca8132aae671b423ec51f4cde51d1e7491ad379ac22f3"

# %%
source = os.environ.get("STELLAR_LAB_CANNON_TARBALL")
if source:
    with tempfile.TemporaryDirectory() as folder:
        assert pack_real_stars(source, Path(folder) / "again.fits", progress=False) == shipped
print("remade, same bytes" if source else "remaking skipped: STELLAR_LAB_CANNON_TARBALL is not set")


# %% [markdown]
# ## Reading them
# The table of clusters is text (ECSV), with units, and can be read by eye.

# %%
#| export
def clusters() -> QTable:
    """The star clusters of the real stars, with literature metallicities and ages.

    Returns
    -------
    QTable
        One row per cluster: CLUSTER, KIND, FIELDS (the survey's names with blanks between),
        LOCATION_ID, FE_H [dex], AGE [Gyr], FE_H_SOURCE, AGE_SOURCE (bibcodes), NOTE.
    """
    with data_file("clusters.ecsv") as path:
        return QTable.read(path, format="ascii.ecsv")


def _cluster_of(fields):
    "The cluster that each field of the survey was pointed at."
    names = {field: row["CLUSTER"] for row in clusters() for field in str(row["FIELDS"]).split()}
    return [names[str(field).strip()] for field in fields]


# %%
assert _cluster_of(["M67 "]) == ["M67"]
Table(clusters()["CLUSTER", "FIELDS", "FE_H", "AGE"][:3])


# %% [markdown]
# The packed file is read back into fluxes, errors and a table of facts.

# %%
#| export
@cache
def _packed(file):
    "What the package holds, read once: encoded fluxes and errors (553, 7214), the stars table."
    with data_file(file) as path, fits.open(path) as hdus:
        steps = hdus["FLUX"].data
        levels = hdus["ERROR"].data
        stars = Table(hdus["STARS"].data)
    stars["TELESCOPE"] = "apo25m"
    stars["CLUSTER"] = _cluster_of(stars["FIELD"])
    for name in LABELS:
        for column in {name, f"{name}_ERR", f"{name}_RAW"} & set(stars.colnames):
            stars[column].unit = LABELS[name].unit
    stars.meta = {
        "product": "aspcapstar",
        "release": "dr10",
        "archive": "clusters",
        "normalized": True,
    }
    return steps, levels, stars


def _unpack(rows=slice(None)):
    "Flux (N, 7214), its error with 0 where the survey gave none, and the stars table."
    steps, levels, stars = _packed(_PACKED_STARS)
    levels = levels[rows]
    error = np.where(levels > _NO_ERROR, np.exp(levels * _LOG_ERROR_STEP), 0)
    return (steps[rows] * _FLUX_STEP).astype("f4"), error.astype("f4"), Table(stars[rows])


# %%
flux, error, stars = _unpack()
print(flux.shape, error.shape, len(stars), "stars")
unusable = (flux <= 0) | (error <= 0) | (error >= _MAX_ERROR)
assert flux.dtype == error.dtype == np.float32 and abs(unusable.mean() - 0.112) < 0.001

# %% [markdown]
# ### Bad pixels become bits
# The raw files of the survey carry a bitmask; the pseudo-normalized ones do not. What ASPCAP did not trust it left with a flux of zero (and an
# error of 10) or with an error blown up a hundredfold and more. We do not know its reasons, so the bits are read off the shape: nothing there is
# `BADPIX`; a blown-up error is `BADERR`, and where five or more neighbours have one it is surely a sky line, `SIG_SKYLINE` too; on a chip's rim,
# `NOT_ENOUGH_PSF` is added.

# %%
#| export
_EDGE = 60  # pixels from a chip's edge that count as its rim
_RUN = 5  # neighbours in a row that make a sky line
_CHIP_SIZES = [last - first + 1 for first, last in CHIPS.values()]


def _pixel_bits(flux, error):
    """APOGEE_PIXMASK bits (N, 7214), 0 on good pixels, of pseudo-normalized spectra.

    These mark a pixel as bad only by a flux of zero or an error of 0.3 and more."""
    empty = (flux <= 0) | (error <= 0)
    inflated = ~empty & (error >= _MAX_ERROR)
    sky = binary_opening(inflated, np.ones((1, _RUN), bool))
    to_edge = [np.minimum(np.arange(size), np.arange(size)[::-1]) for size in _CHIP_SIZES]
    rim = np.concatenate(to_edge) < _EDGE
    bits = empty * PIXMASK.BADPIX + inflated * PIXMASK.BADERR + sky * PIXMASK.SIG_SKYLINE
    return (bits + ((empty | inflated) & rim) * PIXMASK.NOT_ENOUGH_PSF).astype("i2")


# %% [markdown]
# A made-up spectrum has a sky line of six pixels, a pair of bad pixels, and two empty ones at the end of the red chip.

# %%
flux = np.ones((1, 7214))
error = np.full((1, 7214), 0.01)
error[0, 1000:1006] = 5
error[0, 1056:1058] = 5
flux[0, -2:] = 0
error[0, -2:] = (10, 0)
bits = _pixel_bits(flux, error)
assert np.all(bits[0, 1000:1006] == PIXMASK.BADERR + PIXMASK.SIG_SKYLINE)
assert np.all(bits[0, 1056:1058] == PIXMASK.BADERR)
assert np.all(bits[0, -2:] == PIXMASK.BADPIX + PIXMASK.NOT_ENOUGH_PSF)
assert np.count_nonzero(bits) == 10
names = [
    " + ".join(name for bit, name in enumerate(PIXMASK_NAMES) if value >> bit & 1)
    for value in (bits[0, 1000], bits[0, 1056], bits[0, -1])
]
names


# %% [markdown]
# `real_stars` gives what every other chapter starts from: `Spectra` on the common grid, sorted by the names of the survey's files, unusable pixels
# with `ivar = 0`, a table of labels and facts with them. The writer wants one thing more, what the errors of the bad pixels were and why they are bad.

# %%
#| export
def real_stars(with_mask: bool = False) -> Spectra:
    """The embedded real spectra, pseudo-normalized as SDSS DR10 published them.

    Parameters
    ----------
    with_mask : bool, default False
        Keep the errors of bad pixels in `ivar`, and give the reasons as APOGEE_PIXMASK bits in
        `mask`: the form that `write_archive` takes. Without it, bad pixels have `ivar = 0`.

    Returns
    -------
    Spectra
        553 stars, 7,214 pixels, sorted by the name of the survey's file; their labels and facts
        in `stars`.
    """
    return _real_stars(slice(None), with_mask)


def _real_stars(rows, with_mask):
    "Some of the real stars, as `real_stars` gives them all."
    flux, error, stars = _unpack(rows)
    known = error > 0
    good = known if with_mask else known & (flux > 0) & (error < _MAX_ERROR)
    with np.errstate(divide="ignore"):
        ivar = np.where(good, 1 / error**2, 0).astype("f4")
    return Spectra(wavelength, flux, ivar, stars, _pixel_bits(flux, error) if with_mask else None)


# %%
spectra = real_stars()
spectra

# %%
stars = spectra.stars
giants = np.asarray(stars["LOGG"]) < 3.8
assert len(spectra) == 553 and giants.sum() == 479
assert np.all(stars["CLUSTER"][~giants] == "Pleiades")
assert np.all(stars["CLUSTER"][giants] != "Pleiades")
assert abs(np.mean(spectra.ivar > 0) - 0.888) < 0.001  # 11 % of the on-band pixels are bad
assert spectra.ivar.max() <= 1.001 / 0.005**2  # no error below the survey's floor
assert np.isfinite(spectra.labels()).all() and (spectra.label_errors() > 0).all()
assert np.sum(["-" in name for name in stars["APOGEE_ID"]]) == 36  # southern stars

# %%
full = real_stars(with_mask=True)
assert np.array_equal(full.mask == 0, spectra.ivar > 0)  # bits on exactly the bad pixels
assert np.array_equal(full.ivar[full.mask == 0], spectra.ivar[spectra.ivar > 0])
share = {name: float(np.mean(full.mask >> bit & 1)) for bit, name in enumerate(PIXMASK_NAMES)}
shown = [name for name in share if share[name]]
fig, axes = plt.subplots(1, 2, figsize=(10, 3), gridspec_kw={"width_ratios": [1, 2]})
axes[0].barh(shown, [100 * share[name] for name in shown], color="C0")
axes[0].set(xlabel="on-band pixels [%]")
plot_spectrum(wavelength, 100 * np.mean(full.mask != 0, axis=0), ax=axes[1])
axes[1].set(ylabel="stars with a bad pixel [%]");

# %% [markdown]
# **What to see.** Sky lines make most of it. They stand still in the observatory's frame, and the stars move: at rest each line smears into a hump
# that is as wide as the clusters' velocities differ. Real bad pixels are neither random nor the same for all stars.

# %% [markdown]
# ## Who they are
# Eighteen clusters of giants and one of dwarfs. A cluster is a laboratory of its own: its stars were born together from one cloud, so they share
# age and (to some hundredths of a dex, at least in iron) composition. Whatever metallicity a method reads, it must read the same for all of them,
# and the literature knows which. No label of the survey enters that test.

# %%
table = clusters()
members = [stars["CLUSTER"] == name for name in table["CLUSTER"]]
table["STARS"] = [int(np.sum(inside)) for inside in members]
table["median SNR"] = [round(float(np.median(stars["SNR"][inside]))) for inside in members]
shown = ("CLUSTER", "KIND", "FIELDS", "LOCATION_ID", "STARS", "median SNR", "FE_H", "AGE")
Table(table[*shown, "FE_H_SOURCE", "AGE_SOURCE"])

# %%
#| echo: false
Markdown(
    "Globular clusters: [Fe/H] of Carretta et al. (2009), ages of VandenBerg et al. (2013). Open "
    "clusters: each row names its own sources, by ADS bibcode; the column `NOTE` says what to know "
    "about a row, and an age source `round` is a round value without one source. Authors differ by "
    f"0.05 to 0.1 dex, for NGC 6791 by more. {table['STARS'].sum()} stars, signal-to-noise from "
    f"{stars['SNR'].min():.0f} to {stars['SNR'].max():.0f}, "
    f"{np.min(stars['NVISITS'])} to {np.max(stars['NVISITS'])} visits each."
)

# %%
assert table["STARS"].sum() == 553 and len(table) == 19
assert table["FE_H"].unit == u.dex and table["AGE"].unit == u.Gyr
assert set(stars["CLUSTER"]) == set(table["CLUSTER"]) and np.all(table["STARS"] > 0)
where = dict(zip(table["CLUSTER"], table["LOCATION_ID"], strict=True))
assert [where[name] for name in stars["CLUSTER"]] == list(stars["LOCATION_ID"])
assert set(np.unique(stars["LOCATION_ID"]).astype(str)) == set(ARCHIVES["clusters"].fields)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 4), gridspec_kw={"width_ratios": [1.25, 1]})
points = axes[0].scatter(stars["TEFF"], stars["LOGG"], c=stars["M_H"], s=14, cmap="viridis")
axes[0].set(xlabel=LABELS["TEFF"].axis, ylabel=LABELS["LOGG"].axis)
axes[0].invert_xaxis()
axes[0].invert_yaxis()
axes[0].axhline(3.8, color="0.6", ls="--", lw=1)
fig.colorbar(points, ax=axes[0], label=LABELS["M_H"].axis)
axes[1].hist(stars["SNR"], bins=np.geomspace(60, 1400, 30), color="C0")
axes[1].axvline(50, color="0.6", ls="--", lw=1)
axes[1].set(xscale="log", xlabel="signal-to-noise ratio per pixel", ylabel="stars")
axes[1].set_xticks([50, 100, 200, 500, 1000], ["50", "100", "200", "500", "1000"]);

# %% [markdown]
# **What to see.** Left: giants climb to the upper right, cool and large; the metal-poor clusters (dark) form the hotter branch, the metal-rich ones
# (bright) the cooler. The dwarfs below the dashed line at log g 3.8 are the Pleiades; a cut takes them out. Right: every star lies well above the cut
# at 50 (dashed).

# %%
order = np.argsort(table["FE_H"].value)
fig, ax = plt.subplots(figsize=(10, 3.4))
for x, row in enumerate(order):
    values = np.asarray(stars["M_H"][stars["CLUSTER"] == table["CLUSTER"][row]])
    places = x + np.linspace(-0.25, 0.25, len(values))
    ax.plot(places, values, ".", ms=4, color="C0", label="a star" if x == 0 else None)
literature = table["FE_H"].value[order]
ax.plot(range(len(order)), literature, "_", ms=18, mew=2, color="C3", label="literature")
ax.set_xticks(range(len(order)), table["CLUSTER"][order], rotation=60, ha="right")
ax.set(ylabel=LABELS["M_H"].axis)
ax.legend();

# %%
#| echo: false
inside = []
offset = []
for row in table:
    if row["CLUSTER"] != "Pleiades":
        values = np.asarray(stars["M_H"][stars["CLUSTER"] == row["CLUSTER"]])
        inside.append(np.std(values, ddof=1))
        offset.append(np.median(values) - row["FE_H"].value)
odd = np.max(stars["M_H"][stars["CLUSTER"] == "M107"])
Markdown(
    "**What to see.** The survey's calibrated [M/H] follows the literature: the median of a "
    f"cluster of giants lies within {np.abs(offset).max():.2f} dex of it at worst. Its stars "
    f"scatter by {np.median(inside):.2f} dex in the typical cluster: this is what the labels that "
    f"we train on are worth. One star of M107 stands at {odd:.2f}, a whole dex above its cluster. "
    "It is hardly a member, but its spectrum and its labels belong together."
)

# %%
assert np.abs(offset).max() < 0.35 and np.median(inside) < 0.1

# %% [markdown]
# ## A flux scale
# Now the instrument. 2MASS magnitudes are fluxes: a star of $H=0$ sends $1.133\times10^{-10}$ erg/s/cm²/Å in the middle of the band ([Cohen et al.
# 2003](https://doi.org/10.1086/376474)), and the survey counts in units of $10^{-17}$ of that.

# %%
#| export
_H_ZERO = 1.133e7  # flux of a star with H = 0 [1e-17 erg/s/cm^2/Angstrom] (Cohen et al. 2003)
_H_WAVELENGTH = 16_300.0  # where a star's black body has the flux of its H magnitude [Angstrom]


# %%
#| exporti
def black_body(wave, teff) -> np.ndarray:
    """Planck's law, relative to its value in the middle of the H band (16,300 Angstrom).

    Parameters
    ----------
    wave : (P,) array
        Wavelengths [Angstrom].
    teff : (N,) array
        Temperatures [K].

    Returns
    -------
    (N, P) array
        B(wave, teff) / B(16300, teff), with B = wave^-5 / (exp(hc / (wave k teff)) - 1).
    """

    def planck(x):
        kelvin = np.asarray(teff, float)[:, None]
        return x**-5 / np.expm1(constants.h * constants.c / (x * 1e-10 * constants.k * kelvin))

    return planck(np.asarray(wave)[None]) / planck(np.array([[_H_WAVELENGTH]]))


# %% [markdown]
# The reference is astropy's own black body, normalized at the same wavelength.

# %%
ours = black_body(wavelength, [4500])[0]
planck = BlackBody(4500 * u.K, scale=1 * u.erg / (u.s * u.cm**2 * u.AA * u.sr))
reference = planck(wavelength * u.AA) / planck(_H_WAVELENGTH * u.AA)
assert np.allclose(ours, reference, rtol=1e-6)
Table([ours[[0, -1]], reference.value[[0, -1]]], names=["ours", "astropy's"])

# %% [markdown]
# The throughput is a polynomial of fourth degree per chip, drawn for each star: level, slope and curvature of some percent, as raw spectra show them,
# and a third and a fourth order of a few tenths of a percent. The original lab fits parabolas: most of this a parabola removes, and some it cannot. The
# draw depends on the seed and the star's name alone, so a star looks the same in a small archive and in a large one, in any order.

# %%
#| export
# Mean and spread of a chip's five Legendre coefficients:
_THROUGHPUT_MEAN = (1, 0, 0, 0, 0)
_THROUGHPUT_SPREAD = (0.03, 0.04, 0.03, 0.004, 0.004)


def _draw_throughput(seed, apogee_id):
    "The instrument's response to one star: (3, 5) Legendre coefficients, one row per chip."
    drawn = _star_rng(seed, apogee_id, "throughput").standard_normal((3, len(_THROUGHPUT_MEAN)))
    return np.array(_THROUGHPUT_MEAN) + np.array(_THROUGHPUT_SPREAD) * drawn


def _star_rng(seed, apogee_id, purpose):
    "A random generator of the star's own."
    return np.random.default_rng([seed, zlib.crc32(f"{purpose} {apogee_id}".encode())])


def _instrument_continuum(teff, h_magnitude, throughput):
    """What the instrument would record of stars without lines: a black body, seen through it.

    Of (N,) temperatures [K], (N,) 2MASS H and (N, 3, 5) Legendre coefficients per star and chip;
    (N, 7214) in units of 1e-17 erg/s/cm^2/Angstrom."""
    shape = [
        legval(np.linspace(-1, 1, size), throughput[:, chip].T)
        for chip, size in enumerate(_CHIP_SIZES)
    ]
    level = _H_ZERO * 10 ** (-0.4 * np.asarray(h_magnitude, float)[:, None])
    return level * black_body(wavelength, teff) * np.concatenate(shape, axis=1)


# %%
names = [str(name) for name in stars["APOGEE_ID"]]
drawn = np.array([_draw_throughput(42, name) for name in names])
curves = _instrument_continuum(stars["TEFF"], stars["H"], drawn)
ideal = _instrument_continuum([4500], [10], np.array([[[1, 0, 0, 0, 0]] * 3]))[0]
# H = 10 is ten thousand times fainter than H = 0:
assert np.isclose(np.interp(_H_WAVELENGTH, wavelength, ideal), 1133, rtol=1e-3)
assert np.array_equal(_draw_throughput(42, names[7]), _draw_throughput(42, names[7]))
assert not np.allclose(_draw_throughput(42, names[7]), _draw_throughput(43, names[7]))

# %%
chip = slice(0, 2920)  # blue
x = np.linspace(-1, 1, 2920)
residual = np.array(
    [1 - np.polyval(np.polyfit(x, curve[chip], 2), x) / curve[chip] for curve in curves[::20]]
)
fig, axes = plt.subplots(1, 2, figsize=(10, 3))
for curve in curves[:60:10]:
    plot_spectrum(wavelength, curve / curve.mean(), color=None, ax=axes[0])
axes[0].set(ylabel="continuum / its mean")
axes[1].plot(wavelength[chip], 100 * residual.T[:, :6])
axes[1].set(xlabel="vacuum wavelength [Å]", ylabel="left by a parabola [%]");

# %%
#| echo: false
Markdown(
    "**What to see.** Left: each star has its own slope and steps between the chips, the black "
    "body falls to the red. Right: what a parabola fitted to the noiseless continuum of a blue "
    f"chip leaves over, {100 * residual.std():.2f} % in the rms and up to "
    f"{100 * np.abs(residual).max():.1f} %. No normalization by parabolas can be better than this."
)

# %%
assert 0.0005 < residual.std() < 0.004

# %% [markdown]
# ## Visits
# A star was observed on several nights and the file holds each night and the combination. Our 553 come combined; the visits are **simulated** so
# that they could have been the ones. With weights $w_v$ that sum to one, a visit's error is $\sigma/\sqrt{w_v}$, and noise of that size, less its
# own weighted mean, is added to the combination: the weighted mean of the visits then *is* the combination, exactly, and their scatter is what the
# errors promise. Real is only the sum, and how many there were.

# %%
#| export
_COSMIC_RAYS = 0.001  # share of pixels that a cosmic ray hits in one of the visits
_NO_VALUE = 1e10  # the error that apStar files give a pixel without a value


def _split_visits(flux, error, visits, rng):
    """Visits that could have made a combination (P,): (V, P) fluxes and errors, (V,) weights.

    Their weighted mean is the combination, and their scatter agrees with their errors."""
    weights = rng.lognormal(0, 0.3, visits)
    weights /= weights.sum()
    errors = error / np.sqrt(weights)[:, None]
    size = np.minimum(errors, 0.1 * np.abs(flux))  # a bad pixel's error is no noise
    noise = rng.standard_normal((visits, len(flux))) * size
    return flux + noise - weights @ noise, errors, weights


# %%
rng = np.random.default_rng(1)
flux = np.full(20_000, 100.0)
error = np.full(20_000, 2.0)
visits, errors, weights = _split_visits(flux, error, 4, rng)
assert np.allclose(weights @ visits, flux, rtol=1e-12)  # they average to the combination
assert np.allclose(1 / (1 / errors**2).sum(axis=0), error**2)  # and so do their errors
chi2 = (((visits - flux) / errors) ** 2).sum(axis=0)
# Four visits, one mean: three degrees of freedom.
assert abs(chi2.mean() - 3) < 4 * np.sqrt(2 * 3 / len(flux))
print(f"chi2 of four visits around their mean: {chi2.mean():.2f}")

# %% [markdown]
# ## The survey's files
# An `apStar` file has ten parts: a header; flux, error, mask, sky, sky error, telluric, telluric error as rows (two combinations, then the visits);
# the line-spread function; a table of velocities. A star with a single visit has arrays of one dimension, and readers stumble over it. Everything
# stands on the full grid of 8,575 pixels; beyond the on-band ones we have nothing, so flux is zero there, the error $10^{10}$ (the survey's "no
# value"), and the mask says `BADPIX`, where a detector does see `NOT_ENOUGH_PSF` too.
#
# In a FITS file each part, an *HDU*, is a header and an array, both filled up to whole blocks of 2,880 bytes. The headers of arrays are the same for
# all stars of as many visits: astropy makes each once, and we keep its text. (Making them anew took four fifths of the time.)

# %%
#| export
_BLOCK = 2880  # bytes


def _blocks(array):
    "The bytes of an array, filled up to whole blocks."
    content = array.tobytes()
    return content + bytes(-len(content) % _BLOCK)


def _text(hdu):
    "The header of an HDU as it stands in a file."
    return hdu.header.tostring().encode()


@cache
def _image_header(shape, dtype, cards):
    "The header of all images of one shape."
    return _text(fits.ImageHDU(np.zeros(shape, dtype), fits.Header(cards)))


@cache
def _table_header(dtype):
    "The header of all tables of one row and these columns."
    return _text(fits.BinTableHDU(np.zeros(1, dtype)))


def _table(row):
    "A table of one row as an HDU, in bytes."
    return _table_header(row.dtype) + _blocks(row)


# %%
row = np.array([(4500, 2.5)], [("TEFF", ">f4"), ("LOGG", ">f4")])
assert len(_table(row)) == 2 * _BLOCK
Table(fits.BinTableHDU.fromstring(_table(row)).data)

# %% [markdown]
# An image carries the grid in its header: where it begins, and the step of $\log_{10}\lambda$ from pixel to pixel.

# %%
#| export
_GRID_CARDS = (
    ("CRVAL1", LOG10_START),
    ("CDELT1", LOG10_STEP),
    ("CRPIX1", 1),
    ("CTYPE1", "LOG-LINEAR"),
    ("DC-FLAG", 1),
)
# Full-grid pixels that light can reach, of a real file:
_DETECTORS = {"B": (213, 3308), "G": (3553, 6116), "R": (6309, 8369)}
_UNIT = "(10^-17 erg/s/cm^2/Ang)"


def _image(on_band_values, fill, unit, dtype=">f4"):
    "An image on the full grid, from values on the on-band pixels, as an HDU in bytes."
    values = np.full((*on_band_values.shape[:-1], N_PIXELS), fill, dtype)
    values[..., on_band] = on_band_values
    header = _image_header(values.shape, dtype, (*_GRID_CARDS, ("BUNIT", unit)))
    return header + _blocks(values)


def _mask_image(bits):
    "The bitmask on the full grid; in the gaps BADPIX, and NOT_ENOUGH_PSF where a detector sees."
    fill = np.full(N_PIXELS, PIXMASK.BADPIX)
    for first, last in _DETECTORS.values():
        fill[first : last + 1] |= PIXMASK.NOT_ENOUGH_PSF
    return _image(bits, fill, "Flag Mask (bitwise)", ">i2")


# %%
image = fits.ImageHDU.fromstring(_image(np.ones((3, 7214)), 0, "Flux"))
bits = fits.ImageHDU.fromstring(_mask_image(np.zeros(7214, int))).data
assert image.data.shape == (3, 8575) and image.data.sum() == 3 * 7214
assert image.header["CRVAL1"] == 4.179
assert bits[0] == PIXMASK.BADPIX and bits[322] == 0
assert bits[321] == PIXMASK.BADPIX + PIXMASK.NOT_ENOUGH_PSF
dict(zip(*(values.tolist() for values in np.unique(bits, return_counts=True)), strict=True))


# %% [markdown]
# The header carries the survey's keywords. Position, magnitudes, velocity and its scatter are real; dates, fibers and the velocity of each visit
# are drawn, so that they add up (heliocentric velocity = Doppler shift + barycentric correction). No file holds the date it was written: same seed,
# same bytes.

# %%
#| export
def _star_dicts(stars):
    "The rows of a stars table as dicts: Python's own numbers, strings without blanks around."
    columns = [stars[name].tolist() for name in stars.colnames]
    rows = [dict(zip(stars.colnames, row, strict=True)) for row in zip(*columns, strict=True)]
    return [
        {name: value.strip() if isinstance(value, str) else value for name, value in row.items()}
        for row in rows
    ]


def _draw_visits(star, weights, rng):
    "Facts about each visit that a header wants. Invented, but they add up."
    days = np.sort(rng.choice(np.arange(55_800, 56_500), len(weights), replace=False))
    plate = 5000 + star["LOCATION_ID"] % 1000
    velocity = star["VHELIO"] + star["VSCATTER"] * rng.standard_normal(len(weights))
    visits = []
    for day, weight, vhelio in zip(days, weights, velocity, strict=True):
        fiber = int(rng.integers(1, 301))
        correction = round(float(rng.uniform(-28, 28)), 4)
        hour = round(float(rng.uniform(0.1, 0.5)), 5)
        visit = {
            "FILE": f"apVisit-r8-{plate}-{day}-{fiber:03d}.fits",
            "FIBER": fiber,
            "PLATE": str(plate),
            "MJD": int(day),
            "LOCID": star["LOCATION_ID"],
            "JD": 2_400_000.5 + int(day) + hour,
            "VREL": round(float(vhelio) - correction, 4),
            "VRELERR": 0.05,
            "VHELIO": round(float(vhelio), 4),
            "BC": correction,
            "SNR": round(star["SNR"] * float(weight) ** 0.5, 3),
        }
        visits.append(visit)
    return visits


# %%
star = _star_dicts(spectra.stars[:1])[0]
visits = _draw_visits(star, np.full(3, 1 / 3), np.random.default_rng(1))
Table(rows=visits)["FILE", "JD", "VREL", "BC", "VHELIO", "SNR"]

# %%
assert all(abs(visit["VREL"] + visit["BC"] - visit["VHELIO"]) < 1e-3 for visit in visits)


# %%
#| export
def _star_header(star, visits):
    "Primary header of an apStar file, with the survey's keywords."
    cards = [
        ("OBJID", star["APOGEE_ID"], "Object ID"),
        *((band, round(star[band], 4), f"2MASS {band} magnitude") for band in "JHK"),
        ("TARG1", star.get("TARG1", 0), "First APOGEE targeting flag"),
        ("TARG2", star.get("TARG2", 0), "Second APOGEE targeting flag"),
        ("SURVEY", "apogee", "Survey name"),
        ("TELESCOP", star["TELESCOPE"], "Telescope"),
        ("LOCID", star["LOCATION_ID"], "LocationID"),
        ("FIELD", star["FIELD"], "Field name"),
        ("RA", star["RA"], "right ascension, deg, J2000"),
        ("DEC", star["DEC"], "declination, deg, J2000"),
        ("NVISITS", star["NVISITS"], "number of visit spectra combined"),
        ("VRAD", 0.0, "Doppler shift (km/s) of this spectrum"),
        ("VHELIO", star["VHELIO"], "mean heliocentric velocity (km/s)"),
        ("VSCATTER", star["VSCATTER"], "STDEV of VHELIO (km/s)"),
        ("VERR", star["VERR"], "weighted error in VHELIO (km/s)"),
        ("SNR", star["SNR"], "final median Signal/Noise ratio"),
        ("STARFLAG", star.get("STARFLAG", 0), "OR of visit starflags"),
        ("ANDFLAG", star.get("ANDFLAG", 0), "AND of visit starflags"),
    ]
    for i, visit in enumerate(visits, 1):
        cards += _visit_cards(i, visit)
    for detector, (first, last) in zip("BGR", CHIPS.values(), strict=True):
        cards.append((f"{detector}MIN", first, "Min pixel of this chip, any frame"))
        cards.append((f"{detector}MAX", last, "Max pixel of this chip, any frame"))
    history = [("HISTORY", line) for line in _HISTORY]
    return fits.Header([*cards, ("NWAVE", N_PIXELS), *_GRID_CARDS, *history])


_HISTORY = (
    "row 1: combined spectrum with individual pixel weighting",
    "row 2: combined spectrum with global weighting",
    "row 3-nvisits+2: individual visit spectra; nvisits=1: a single row",
    "HDU1 flux, 2 error, 3 mask (row 1 OR, row 2 AND of visits)",
    "HDU4 sky, 5 sky error, 6 telluric, 7 telluric error, 8 LSF, 9 RV",
    "written by stellar_lab: flux scale, visits, HDU4-9 simulated",
)


def _visit_cards(i, visit):
    "Keywords of the i-th visit."
    return [
        (f"SFILE{i}", visit["FILE"], f"Visit #{i} spectrum file"),
        (f"JD{i}", visit["JD"], f"Julian date of visit {i}"),
        (f"FIBER{i}", visit["FIBER"], f"Fiber, visit {i}"),
        (f"BC{i}", visit["BC"], "Barycentric correction (km/s)"),
        (f"VRAD{i}", visit["VREL"], f"Doppler shift (km/s) of visit {i}"),
        (f"VERR{i}", visit["VRELERR"], "error in VRAD (km/s)"),
        (f"VHELIO{i}", visit["VHELIO"], "Heliocentric velocity (km/s)"),
        (f"SNRVIS{i}", visit["SNR"], "Signal/Noise ratio"),
    ]


# %%
header = _star_header(star, visits)
print(*[str(card).rstrip() for card in header.cards[:5]], "…", sep="\n")

# %% [markdown]
# Mask bits follow the survey's rule: the first row is the OR of all visits, the second the AND. The bits of the real bad pixels are in every visit;
# in addition a cosmic ray hits one pixel in a thousand in one of the visits, so the OR holds them and the AND does not.

# %%
#| export
# A Gauss-Hermite profile as wide as the instrument's, one for all stars:
_LSF = (1, 4287, 5, 1, 1, 1, 1, 1, 0, 1.715, -7.9e-6, -0.033, 9e-7, -0.227, 5.7e-6, 0.093)
_LSF += (-8.4e-6, 0.244, -4e-6, -0.046, 1, 2, 0, 0, 0.01, 0.057)
_LSF_CARDS = (("CTYPE1", "Parameters"), ("BUNIT", "LSF Coefficients"))

_RV_COLUMNS = [
    ("FILE", "S30"),
    ("FIBER", ">i2"),
    ("PLATE", "S4"),
    ("MJD", ">i4"),
    ("LOCID", ">i2"),
    ("JD", ">f8"),
    *((name, ">f4") for name in ("VREL", "VRELERR", "VHELIO", "BC")),
]


def _rv_table(visits):
    "HDU 9: velocities of the visits, and empty cross-correlation functions."
    n = len(visits)
    shape = (n,) if n > 1 else ()
    rows = n + 2 if n > 1 else 1
    dtype = [(name, kind, shape) for name, kind in _RV_COLUMNS]
    dtype += [("CCF", ">f4", (rows, 401)), ("CCFERR", ">f4", (rows, 401))]
    dtype += [("CCFLAG", ">f4", 401), ("CCFW0", ">f8"), ("CCFDW", ">f8")]
    table = np.zeros(1, dtype)
    for name, _ in _RV_COLUMNS:
        table[name] = [visit[name] for visit in visits] if n > 1 else visits[0][name]
    table["CCFLAG"] = np.arange(-200, 201)
    table["CCFDW"] = LOG10_STEP
    return table


def _visit_masks(mask, visits, rng):
    "The mask of each visit (V, P): the real bits in all, a cosmic ray here and there in one."
    masks = np.broadcast_to(mask, (visits, len(mask))).copy()
    hit = np.flatnonzero(rng.random(len(mask)) < _COSMIC_RAYS)
    masks[rng.integers(visits, size=len(hit)), hit] |= PIXMASK.CRPIX
    return masks


# %%
masks = _visit_masks(full.mask[0], 3, np.random.default_rng(1))
extra = np.count_nonzero(masks & PIXMASK.CRPIX, axis=1)
print(f"cosmic rays in the three visits: {extra}")
assert np.array_equal(np.bitwise_and.reduce(masks), full.mask[0])


# %%
#| export
def _apstar_parts(star, flux, error, mask, rng):
    """Header, images and table of an apStar file of DR14, 1-D arrays where there was one visit.

    From a row of the stars table as a dict, (7214,) flux and error in 1e-17 erg/s/cm^2/Angstrom
    (`_NO_VALUE` where there is none) and mask bits. https://data.sdss.org/datamodel"""
    n = star["NVISITS"]
    if n > 1:
        fluxes, errors, weights = _split_visits(flux, error, n, rng)
        masks = _visit_masks(mask, n, rng)
        fluxes = np.vstack([flux, flux, fluxes])
        errors = np.vstack([error, error, np.minimum(errors, _NO_VALUE)])
        masks = np.vstack([np.bitwise_or.reduce(masks), np.bitwise_and.reduce(masks), masks])
    else:
        fluxes = flux
        errors = error
        masks = mask
        weights = np.ones(1)
    sky = np.where(masks & PIXMASK.SIG_SKYLINE, 300.0, 15.0)
    visits = _draw_visits(star, weights, rng)
    images = [
        _image(fluxes, 0, f"Flux {_UNIT}"),
        _image(errors, _NO_VALUE, f"Error {_UNIT}"),
        _mask_image(masks),
        _image(sky, 0, f"Sky {_UNIT}"),
        _image(0.1 * sky, 0, f"Sky Error {_UNIT}"),
        _image(np.full_like(sky, 0.99), 0, "Telluric"),
        _image(np.full_like(sky, 1e-4), 0, "Telluric Error"),
    ]
    lsf = np.array(_LSF, ">f8")
    images.append(_image_header(lsf.shape, lsf.dtype, _LSF_CARDS) + _blocks(lsf))
    return _star_header(star, visits), images, _rv_table(visits)


def _file(header, images, table):
    "A file's bytes: a header, which says that more follows, then images and a table."
    primary = fits.PrimaryHDU(header=header)
    primary.header.set("EXTEND", True, after="NAXIS")
    return b"".join([_text(primary), *images, _table(table)])


def _apstar_file(star, flux, error, mask, rng):
    "The bytes of an apStar file: ten HDUs."
    return _file(*_apstar_parts(star, flux, error, mask, rng))


# %%
seen = (np.full(7214, 100.0), np.full(7214, 1.0), full.mask[0])
content = _apstar_file(star | {"NVISITS": 3}, *seen, np.random.default_rng(1))
hdus = fits.open(io.BytesIO(content))
rows = [
    (i, "-" if hdu.data is None else str(hdu.data.shape), hdu.header.get("BUNIT", "-"))
    for i, hdu in enumerate(hdus)
]
Table(rows=rows, names=["HDU", "shape", "unit"])

# %% [markdown]
# The *mystery star* of the original lab is an apStar file of one row from which name, place, brightness and velocities are taken. The pseudo-normalized
# product, `aspcapStar`, gets flux and error as they are. The survey's third array, ASPCAP's best fit, was not packed and is zero.

# %%
#| export
_SECRETS = (
    "OBJID RA DEC J H K LOCID FIELD TARG1 TARG2 "
    "SFILE1 JD1 FIBER1 BC1 VRAD1 VHELIO1 VHELIO VSCATTER VERR"
).split()


def _mystery_file(star, flux, error, mask, rng):
    "A star without a name: an apStar file of one row, all that could identify it taken out."
    header, images, table = _apstar_parts(star | {"NVISITS": 1}, flux, error, mask, rng)
    for key in _SECRETS:
        del header[key]
    return _file(header, images, np.zeros_like(table))


def _aspcapstar_file(star, flux, error):
    "An aspcapStar file: normalized flux and error as they are, an empty best fit, the labels."
    keys = ("FIELD", "RA", "DEC", "J", "H", "K", "SNR", "NVISITS")
    cards = [
        ("OBJ", star["APOGEE_ID"], "Object ID"),
        ("LOCID", star["LOCATION_ID"]),
        *((key, star[key]) for key in keys),
        ("HISTORY", "HDU1 pseudo-normalized flux, 2 error, 3 best fit (zero: not kept), 4 labels"),
    ]
    images = [
        _image(flux, 0, "Flux / pseudo-continuum"),
        _image(error, 0, "Error"),
        _image(np.zeros_like(flux), 0, "Best fit"),
    ]
    dtype = [("APOGEE_ID", "S18"), ("LOCATION_ID", ">i4"), ("SNR", ">f4")]
    row = np.zeros(1, dtype + [(name, ">f4") for name in star if _is_label(name)])
    for name in row.dtype.names:
        row[name] = _filled(star[name])
    return _file(fits.Header(cards), images, row)


def _is_label(name):
    "Whether a column is a label or a label's error."
    return name in LABELS or name.removesuffix("_ERR") in LABELS


def _filled(value):
    "-9999 for a missing number, as the survey writes it."
    return value if isinstance(value, (str, int)) or np.isfinite(value) else -9999.0


# %%
nameless = fits.open(io.BytesIO(_mystery_file(star, *seen, np.random.default_rng(1))))
normalized = fits.open(io.BytesIO(_aspcapstar_file(star, spectra.flux[0], np.ones(7214))))
print("the mystery's header:", *nameless[0].header[:8])
Table(normalized[4].data)["APOGEE_ID", "SNR", "TEFF", "TEFF_ERR", "LOGG", "LOGG_ERR"]


# %% [markdown]
# ## Flaws, planted and counted
# Real archives are dirty, and a reader that was never fed dirt chokes on its first. But a real star is too precious to be spoiled: the flaws are
# carried by *copies* under invented names (a right ascension of 99 hours does not exist). Each flaw is a record that a test can ask for, and says
# what the reader has to do. The copies are made of stars that would pass every cut, so one rule alone stands between them and the training set.

# %%
#| export
@dataclass(frozen=True)
class _Flaw:
    "A fault planted in an archive on purpose."

    name: str
    count: int  # how many copies carry it
    what: str
    reader: str  # what a reader of the archive must do


_FLAWS = {
    flaw.name: flaw
    for flaw in (
        _Flaw("low-snr", 6, "SNR below 50, with the noise to match", "drop by the cut in SNR"),
        _Flaw("no-labels", 6, "all labels -9999 in the catalogue", "drop: no label"),
        _Flaw("zero-flux", 4, "flux zero in every pixel", "drop: no flux"),
        _Flaw(
            "duplicate",
            4,
            "two rows in the catalogue; "
            "the one of higher SNR has a label outside the archive's cuts",
            "take the row of higher SNR, so that the cut drops the star",
        ),
        _Flaw(
            "no-row",
            5,
            "a file without a row in the catalogue",
            "drop: not in the catalogue, counted",
        ),
        _Flaw(
            "no-file", 5, "a row in the catalogue without a file", "no star, or counted as missing"
        ),
        _Flaw("truncated", 3, "files cut off after 40 % of their bytes", "report and skip"),
        _Flaw("html", 2, "a server's error page under the name of a FITS file", "report and skip"),
    )
}

# %%
#| echo: false
Table(
    rows=[(flaw.name, flaw.count, flaw.what, flaw.reader) for flaw in _FLAWS.values()],
    names=["flaw", "copies", "what is wrong", "what a reader does"],
)


# %% [markdown]
# A duplicate is the subtle one. Its better row has a label beyond the archive's cuts, its worse row looks fine: a reader that takes the first row, or
# the worse one, keeps a star that should go, and the count of stars betrays it.
#
# Two questions come first. Which stars would a reader keep? And which of them becomes the mystery: one star, well measured and from the middle of every
# label.

# %%
#| export
def _passes_cuts(stars, record):
    "Which stars pass the cuts of an archive's record: (N,) bool."
    passed = np.ones(len(stars), bool)
    for cut in record.cuts:
        passed &= cut.keeps(stars[cut.column])
    return passed


def _good_stars(spectra, record):
    "Rows of the stars that no cut of a reader would drop, two at least."
    good = np.flatnonzero(
        _passes_cuts(spectra.stars, record)
        & np.isfinite(spectra.labels(record.labels)).all(axis=1)
        & ((spectra.mask != 0).sum(axis=1) <= MASKED_LIMIT)
    )
    if len(good) < 2:
        raise LabError(
            f"only {len(good)} of {len(spectra)} stars pass the cuts of {record.name}: "
            "an archive needs two at least"
        )
    return good


def _pick_mystery(spectra, good, record, rng):
    "A well measured star from the middle of every label."
    snr = np.asarray(spectra.stars["SNR"], float)[good]
    labels = spectra.labels(record.labels)[good]
    low, high = np.nanpercentile(labels, [10, 90], axis=0)
    middle = (snr >= np.median(snr)) & np.all((labels >= low) & (labels <= high), axis=1)
    return int(rng.choice(good[middle] if middle.any() else good))


# %%
record = ARCHIVES["clusters"]
good = _good_stars(full, record)
print(f"{_passes_cuts(full.stars, record).sum()} stars pass the cuts, {len(good)} can be copied")


# %% [markdown]
# The plan of an archive is a table: who is in it, under which name, with which flaw.

# %%
#| export
def _plan_archive(spectra, record, seed=42, flaws=None):
    """Who will be in the archive: a table with SOURCE (row of spectra), APOGEE_ID, FLAW, SNR.

    Every star stands under its name but one, the mystery star; copies under invented names carry
    the flaws, {name: how many}, by default all of `_FLAWS`."""
    flaws = {name: flaw.count for name, flaw in _FLAWS.items()} if flaws is None else flaws
    unknown = set(flaws) - set(_FLAWS)
    if unknown:
        raise LabError(
            f"unknown flaw {', '.join(sorted(unknown))}: choose from {', '.join(_FLAWS)}"
        )
    rng = np.random.default_rng([seed, 1])
    snr = np.asarray(spectra.stars["SNR"], float)
    # The mystery star and the copies must not fall to other cuts than their own.
    good = _good_stars(spectra, record)
    mystery = _pick_mystery(spectra, good, record, rng)
    others = good[good != mystery]
    # Well measured, so that only its flaw can drop a copy.
    others = others[snr[others] >= np.median(snr[others])]
    rows = [
        (i, str(name), "mystery" if i == mystery else "", snr[i])
        for i, name in enumerate(spectra.stars["APOGEE_ID"])
    ]
    for number, flaw in enumerate(_FLAWS):
        for k in range(flaws.get(flaw, 0)):
            source = int(rng.choice(others))
            # A right ascension of 99 hours does not exist.
            name = f"2M99{number:02d}{k:04d}{'+-'[k % 2]}{k:07d}"
            seen = round(rng.uniform(15, 45), 3) if flaw == "low-snr" else snr[source]
            rows.append((source, name, flaw, seen))
    return Table(rows=rows, names=["SOURCE", "APOGEE_ID", "FLAW", "SNR"])


# %%
plan = _plan_archive(full, record, seed=42)
counts = {name: int(np.sum(plan["FLAW"] == name)) for name in np.unique(plan["FLAW"])}
assert counts == {"": 552, "mystery": 1} | {flaw.name: flaw.count for flaw in _FLAWS.values()}
copies = plan[553:]
assert len(set(plan["APOGEE_ID"])) == len(plan)
assert np.all(np.char.startswith(copies["APOGEE_ID"].astype(str), "2M99"))
assert np.all(_passes_cuts(full.stars[copies["SOURCE"]], record))
with pytest.raises(LabError, match="unknown flaw meteorite: choose from low-snr, no-labels"):
    _plan_archive(full, record, flaws={"meteorite": 1})

# %% [markdown]
# So 552, 553 and 582 are all right numbers for this archive, and it helps to know which counts what.

# %%
with_file = len(copies) - counts["no-file"]
rows = [
    ("stars under their own names", counts[""]),
    ("the mystery star, in a file without a name", counts["mystery"]),
    ("real stars", counts[""] + counts["mystery"]),
    ("copies that carry a flaw", len(copies)),
    ("copies that have a file", with_file),
    ("apStar files, and as many aspcapStar files", counts[""] + with_file),
]
Table(rows=rows, names=["what", "how many"])

# %% [markdown]
# ## One star, written
# A worker process writes a star's files from numbers alone: the noise of a faint copy, the visits, the headers come from a random generator of the
# star's own, so workers may finish in any order.

# %%
#| export
_HTML = """<!DOCTYPE html>
<html><head><title>503 Service Unavailable</title></head><body>Try again later.</body></html>
"""


def _write_star(root, rules, star, flaw, flux, error, mask, seed, products):
    """Write one star's files, as its flaw wants them; returns how many.

    `flux` and `error` are relative to the pseudo-continuum, an error of 0 says there is none."""
    rng = _star_rng(seed, star["APOGEE_ID"], "star")
    if flaw == "no-file":
        return 0
    if flaw == "zero-flux":
        flux = np.zeros_like(flux)
    if flaw == "low-snr":
        flux = np.where(error > 0, flux + rng.standard_normal(len(flux)) / star["SNR"], flux)
        error = np.where(error > 0, np.hypot(error, 1 / star["SNR"]), 0)
    throughput = _draw_throughput(seed, star["APOGEE_ID"])
    scale = _instrument_continuum([_continuum_teff(star)], [star["H"]], throughput[None])[0]
    raw = (flux * scale, np.where(error > 0, error * scale, _NO_VALUE), mask)
    if flaw == "mystery":
        (Path(root) / MYSTERY_FILE).write_bytes(_mystery_file(star, *raw, rng))
        return 1
    for product in products:
        if product == "apstar":
            content = _apstar_file(star, *raw, rng)
        else:  # this product has no mask: a bad pixel shows by its error
            bad = (mask != 0) & (error > 0)
            seen = np.where(bad, np.maximum(error, _MAX_ERROR), error)
            content = _aspcapstar_file(star, flux, seen)
        field = str(star[rules.field_column])
        path = Path(root) / rules.path(product, field, star["APOGEE_ID"], star["TELESCOPE"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_damaged(content, flaw))
    return len(products)


def _continuum_teff(star):
    "The black body's temperature, of a star or a table: the true one where known, or TEFF."
    return star["TEFF_CONTINUUM" if "TEFF_CONTINUUM" in star.keys() else "TEFF"]


def _damaged(content, flaw):
    "A file cut off, or an apology in its place, where the flaw wants it."
    if flaw == "truncated":
        return content[: int(0.4 * len(content)) + 1]  # within a block of 2,880 bytes
    return _HTML.encode() if flaw == "html" else content


# %%
rules = record.rules
rows = []
with tempfile.TemporaryDirectory() as folder:
    for flaw in ("none", "low-snr", "truncated", "html"):
        numbers = (spectra.flux[0], np.full(7214, 0.01), full.mask[0])
        _write_star(Path(folder) / flaw, rules, star, flaw, *numbers, 42, ("apstar",))
        file = next((Path(folder) / flaw).rglob("*.fits"))
        rows.append((flaw, file.stat().st_size, str(file.read_bytes()[:9])))
assert rows[0][1] == rows[1][1] > 2 * rows[2][1]
Table(rows=rows, names=["flaw", "bytes", "begins with"])

# %% [markdown]
# ## The catalogue and the truth
# `allStar` has the survey's column names and number types. The labels stand in it as its readers know them, -9999 for what is missing. Which labels
# there are is up to the spectra: the writer has no list of its own.

# %%
#| export
_COPIED = "J H K RA DEC GLON GLAT NVISITS SNR STARFLAG ANDFLAG ASPCAPFLAG VSCATTER VERR".split()


def _catalogue_facts(star, rules):
    "The columns of allStar that are no labels."
    telescope = star["TELESCOPE"]
    field = star[rules.field_column]
    name = star["APOGEE_ID"]
    return {
        "APSTAR_ID": f"apogee.{telescope}.s.stars.{field}.{name}",
        "TARGET_ID": rules.target_id.format(telescope=telescope, field=field, id=name),
        "FILE": Path(rules.path("apstar", field, name, telescope)).name,
        "APOGEE_ID": name,
        "TELESCOPE": telescope,
        "LOCATION_ID": star["LOCATION_ID"],
        "FIELD": star["FIELD"],
        **{column: star[column] for column in _COPIED if column in star},
        "VHELIO_AVG": star["VHELIO"],
        "COMMISS": 0,
        "EXTRATARG": 0,
    }


def _allstar_table(stars, flaws, record):
    "The catalogue of star dicts and their flaws: one row per target, two for a duplicate."
    cut = [cut for cut in record.cuts if cut.column in LABELS][-1]
    outside = cut.high + 1 if np.isfinite(cut.high) else cut.low - 1
    rows = []
    for star, flaw in zip(stars, flaws, strict=True):
        if flaw in ("mystery", "no-row"):
            continue
        labels = {name: _filled(value) for name, value in star.items() if _is_label(name)}
        if flaw == "no-labels":
            labels = dict.fromkeys(labels, -9999.0)
        row = _catalogue_facts(star, record.rules) | labels
        if flaw == "duplicate":
            rows.append(row | {"SNR": 0.7 * star["SNR"]})
            row = row | {cut.column: outside}
        rows.append(row)
    order = np.argsort([row["TARGET_ID"] for row in rows], kind="stable")
    table = Table(rows=[rows[i] for i in order])
    for name in table.colnames:
        old = table[name].dtype
        new = {"f": "f4", "i": "i4"}.get(old.kind, old)
        table[name] = table[name].astype("f8" if name in ("RA", "DEC", "GLON", "GLAT") else new)
    return table


# %%
three = _star_dicts(full.stars[:3])
catalogue = _allstar_table(three, ["", "no-labels", "duplicate"], record)
catalogue["TARGET_ID", "SNR", "TEFF", "LOGG", "LOGG_ERR"]


# %% [markdown]
# Beside the tree lies what no survey can give: the truth table. It says whose spectrum a file holds (the mystery star's name is sealed in it; do
# not look), which flaw it has, and the parameters of its continuum, five numbers per chip. `true_continuum` turns them back into curves, against
# which a normalization can be judged.

# %%
#| exporti
def _truth_table(spectra, plan, seed, truth=None):
    "What only the writer knows: whose spectrum it is, its flaw, its labels and its continuum."
    stars = spectra.stars[plan["SOURCE"]] if truth is None else truth[plan["SOURCE"]]
    source = spectra.stars[plan["SOURCE"]]
    table = Table(
        {
            "APOGEE_ID": plan["APOGEE_ID"],
            "SOURCE_ID": source["APOGEE_ID"],
            "FLAW": plan["FLAW"],
            "LOCATION_ID": source["LOCATION_ID"],
            "SNR": plan["SNR"],
            "H": np.asarray(source["H"], float),
            "TEFF_CONTINUUM": np.asarray(_continuum_teff(source), float),
        }
    )
    table["THROUGHPUT"] = [_draw_throughput(seed, str(name)) for name in plan["APOGEE_ID"]]
    for name in LABELS if truth is None else truth.colnames:
        if name in stars.colnames and name not in table.colnames:
            table[name] = np.asarray(stars[name], float if name in LABELS else None)
    table["APOGEE_ID"][plan["FLAW"] == "mystery"] = "mystery"
    return table


def true_continuum(root) -> tuple:
    """The continuum that each spectrum of an archive was put on.

    Parameters
    ----------
    root : str or Path
        Of an archive that was written here.

    Returns
    -------
    names : (N,) array of str
        APOGEE_ID, "mystery" for the nameless one.
    continuum : (N, 7214) array
        In units of 1e-17 erg/s/cm^2/Angstrom.

    Raises
    ------
    LabError
        If the archive has no truth table.
    """
    table = read_truth(root)
    if table is None:
        raise LabError(
            f"{Path(root) / TRUTH_FILE} is missing: only an archive that stellar_lab wrote "
            "knows its continua"
        )
    throughput = np.asarray(table["THROUGHPUT"])
    curves = _instrument_continuum(table["TEFF_CONTINUUM"], table["H"], throughput)
    return np.array(table["APOGEE_ID"]), curves


# %%
truth = _truth_table(full, plan, seed=42)
print(*truth.colnames)
truth["APOGEE_ID", "SOURCE_ID", "FLAW", "SNR", "TEFF_CONTINUUM"][-3:]

# %% [markdown]
# ## The whole tree
# `archive.json` says what an archive is: the record's name, the seed, a digest of what went in, and, once it is written, the sha256 of each of its files.
# So a second run can tell that nothing is left to do, a reader that a file is as it was written, and nothing else is ever overwritten.

# %%
#| export
_FORMAT = 2  # 1 had no checksums
_NEEDED = (
    "APOGEE_ID FIELD LOCATION_ID TELESCOPE SNR NVISITS J H K RA DEC VHELIO VSCATTER VERR TEFF"
).split()


def _check_input(spectra):
    "LabError for spectra that the writer cannot take."
    pixels = spectra.flux.shape[1]
    if pixels != len(wavelength) or spectra.mask is None:
        raise LabError(
            f"the writer takes spectra on the {len(wavelength)} on-band pixels with a mask; "
            f"these have {pixels} pixels" + (" and no mask" if spectra.mask is None else "")
        )
    missing = sorted(set(_NEEDED) - set(spectra.stars.colnames))
    if missing:
        raise LabError(
            f"the stars lack the column {', '.join(missing)}, which the survey's files hold"
        )


def _archive_card(spectra, plan, record, seed):
    "The content of archive.json: enough to tell whether an archive is this one."
    content = hashlib.sha256(" ".join(map(str, spectra.stars["APOGEE_ID"])).encode())
    for array in (spectra.flux, spectra.ivar, spectra.mask):
        content.update(np.ascontiguousarray(array))
    flaws = {name: int(np.sum(plan["FLAW"] == name)) for name in _FLAWS}
    return {
        "archive": record.name,
        "format": _FORMAT,
        "seed": seed,
        "stars": len(spectra) - 1,
        "content": content.hexdigest()[:16],
        "flaws": {name: count for name, count in flaws.items() if count},
        "files": [MYSTERY_FILE, TRUTH_FILE],
    }


# %%
card = _archive_card(full, plan, record, 42)
card


# %%
#| export
def _sums(root):
    "Path below the root -> sha256, of all files of an archive but archive.json."
    files = sorted(path for path in root.rglob("*") if path.is_file())
    names = {file: file.relative_to(root).as_posix() for file in files}
    return {name: sha256_of(file) for file, name in names.items() if name != ARCHIVE_FILE}


def _already_there(root, card):
    "Whether the very same archive stands at root; LabError if something else does."
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        if what_stands_at(root / ARCHIVE_FILE):
            raise ValueError("not a file")
        found = json.loads((root / ARCHIVE_FILE).read_text())
        identity = {name: found.get(name) for name in card if name != "format"}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise LabError(
            f"{root} exists and is not an archive of ours: name another folder, or remove it"
        ) from None
    if any(identity[name] != card[name] for name in identity):
        what = f"{found.get('archive')}, seed {found.get('seed')}, {found.get('stars')} stars"
        raise LabError(f"{root} holds another archive ({what}): name another folder, or remove it")
    _check_intact(root, found.get("sha256", {}))
    return True


def _check_intact(root, sums):
    "LabError if a file of an archive is not as it was written."
    if not isinstance(sums, dict):
        raise LabError(f"{root / ARCHIVE_FILE} is damaged: remove {root} and write it again")
    changed = []
    for name, sha256 in sums.items():
        file = root / str(name)
        if not file.is_file() or sha256_of(file) != sha256:
            changed.append(str(name))
    if changed:
        raise LabError(
            f"{root} is not as it was written: {changed[0]} is missing or changed, and "
            f"{len(changed) - 1} more; remove the folder and write it again"
        )


# %%
with tempfile.TemporaryDirectory() as folder:
    there = Path(folder)
    (there / "star.fits").write_text("one")
    (there / ARCHIVE_FILE).write_text(json.dumps(card | {"sha256": _sums(there)}))
    assert _already_there(there, card)
    (there / "star.fits").write_text("two")
    with pytest.raises(LabError, match="star.fits is missing or changed, and 0 more") as refusal:
        _already_there(there, card)
    print(str(refusal.value).replace(folder, "…"))


# %%
#| exporti
@dataclass(frozen=True)
class ArchiveSummary:
    """What was written where; printed, it is one line.

    Attributes
    ----------
    root : Path
        The folder.
    stars : int
        Stars under their names; the mystery star is one more.
    files : int
        All files.
    size : int
        Bytes of all files.
    flaws : dict
        Name of a flaw -> how many copies carry it.
    new : bool
        False if the very same archive was there already.
    """

    root: Path
    stars: int
    files: int
    size: int
    flaws: dict
    new: bool

    def __str__(self):
        copies = sum(self.flaws.values()) - self.flaws.get("no-file", 0)
        flaws = ", ".join(f"{count} {name}" for name, count in self.flaws.items()) or "none"
        state = "written to" if self.new else "is already at"
        return (
            f"archive of {self.stars} stars {state} {self.root}, and a mystery star "
            f"({self.stars + 1} in all); with {copies} planted copies "
            f"{self.stars + copies} files of each product, {self.files} files in all, "
            f"{self.size / 1e6:.0f} MB; planted flaws: {flaws}"
        )


def _summary(root, card, new):
    "The summary of an archive that is there."
    sizes = [file.stat().st_size for file in root.rglob("*") if file.is_file()]
    return ArchiveSummary(root, card["stars"], len(sizes), sum(sizes), card["flaws"], new)


# %%
print(ArchiveSummary(Path("stars"), 552, 1168, 904_000_000, card["flaws"], True))


# %% [markdown]
# The tree grows in a hidden folder beside its place and is renamed when it is whole: an interrupted run leaves nothing that looks like an archive. A run
# that was killed leaves the hidden folder, and the next one removes it; its workers have ended with it. Two runs at once both write, and the second one
# to end finds its work done.
#
# The writer takes any normalized spectra with labels, a mask and a record, so synthetic stars pass through the same lines.

# %%
#| export
def _write_stars(root, rules, jobs, seed, products):
    "A worker's share of the stars."
    return sum(_write_star(root, rules, *job, seed, products) for job in jobs)


def _write_all(root, record, jobs, seed, workers, progress):
    "All stars, by a few processes."
    chunks = [jobs[i : i + 8] for i in range(0, len(jobs), 8)]
    workers = workers or os.cpu_count() or 1
    bar = tqdm(total=len(jobs), desc="writing", unit="star", disable=not progress)
    try:
        with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool, bar:
            pending = {}
            for chunk in chunks:
                future = pool.submit(_write_stars, root, record.rules, chunk, seed, record.products)
                pending[future] = len(chunk)
            for future in as_completed(pending):
                future.result()
                bar.update(pending[future])
    except BrokenProcessPool as error:
        raise LabError(
            "the system ended a process that wrote stars, for want of memory perhaps: "
            "try it with fewer processes (workers=1)"
        ) from error


def _fill(tree, spectra, plan, record, seed, truth, workers, progress):
    "Write everything but archive.json."
    sources = _star_dicts(spectra.stars)
    stars = [
        sources[source] | {"APOGEE_ID": str(apogee_id), "SNR": float(snr)}
        for source, apogee_id, _, snr in plan.iterrows()
    ]
    flaws = [str(flaw) for flaw in plan["FLAW"]]
    with np.errstate(divide="ignore"):
        error = np.where(spectra.ivar > 0, 1 / np.sqrt(spectra.ivar), 0).astype("f4")
    jobs = [
        (star, flaw, spectra.flux[i], error[i], spectra.mask[i])
        for star, flaw, i in zip(stars, flaws, plan["SOURCE"], strict=True)
    ]
    _write_all(tree, record, jobs, seed, workers, progress)
    catalogue = tree / record.rules.allstar
    catalogue.parent.mkdir(parents=True, exist_ok=True)
    fits.BinTableHDU(_allstar_table(stars, flaws, record)).writeto(catalogue)
    fits.BinTableHDU(_truth_table(spectra, plan, seed, truth)).writeto(tree / TRUTH_FILE)


# %%
with tempfile.TemporaryDirectory() as folder:
    few = full[:5]
    _fill(Path(folder), few, _plan_archive(few, record, flaws={}), record, 42, None, 1, False)
    written = sorted(path.name for path in Path(folder).rglob("*.fits"))
assert len(written) == 4 * 2 + 3
written

# %%
#| export
_OLD = 86_400  # seconds; what is as old as that is not being written any more


def _remove_old_strays(root):
    "Remove what older versions left of an archive when they were ended: .root.xxxxxxxx."
    for stray in root.parent.glob(f".{escape(root.name)}.????????"):
        with suppress(OSError):
            ours = stray.is_dir() and not stray.is_symlink() and {*os.listdir(stray)} <= {root.name}
            if ours and time.time() - stray.stat().st_mtime > _OLD:
                shutil.rmtree(stray, ignore_errors=True)


@contextmanager
def _growing(root):
    "A folder to fill that becomes `root` when the block ends well, and vanishes when it does not."
    with trouble_in_words(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        remove_strays(root)
        _remove_old_strays(root)
        tree = own_temporary(root)
        try:
            tree.mkdir()
            yield tree
            tree.replace(root)
        finally:
            shutil.rmtree(tree, ignore_errors=True)


# %%
with tempfile.TemporaryDirectory() as folder:
    with pytest.raises(ZeroDivisionError), _growing(Path(folder) / "tree") as tree:
        (tree / "leaf").touch()
        raise ZeroDivisionError
    assert not list(Path(folder).iterdir())


# %%
#| export
def write_archive(
    root,
    spectra: Spectra,
    record,
    seed: int = 42,
    truth: Table = None,
    flaws: dict = None,
    workers: int = None,
    progress: bool = True,
) -> ArchiveSummary:
    """Write stars as the survey would, whole or not at all.

    Files, catalogue and mystery star; the truth and archive.json beside them.

    Parameters
    ----------
    root : str or Path
        Folder to make; it must not exist, be empty or hold this very archive.
    spectra : Spectra
        Normalized, on the on-band grid, with a mask; `ivar` of bad pixels says their error, 0
        where there is none.
    record : str or Archive
        The archive's record, or its name.
    seed : int, default 42
        Same spectra and same seed, same bytes.
    truth : Table, optional
        N rows of true labels, where they differ from the catalogue's.
    flaws : dict, optional
        Name of a flaw -> how many copies carry it: "low-snr", "no-labels", "zero-flux",
        "duplicate", "no-row", "no-file", "truncated", "html". All of them by default.
    workers : int, optional
        Processes; one per core by default.
    progress : bool, default True
        Show a bar.

    Returns
    -------
    ArchiveSummary

    Raises
    ------
    LabError
        If something else stands at `root`, or the spectra lack what the files hold.
    """
    record = ARCHIVES[record] if isinstance(record, str) else record
    root = Path(root)
    _check_input(spectra)
    plan = _plan_archive(spectra, record, seed, flaws)
    card = _archive_card(spectra, plan, record, seed)
    if _already_there(root, card):
        return _summary(root, card, new=False)
    try:
        with _growing(root) as tree:
            _fill(tree, spectra, plan, record, seed, truth, workers, progress)
            text = json.dumps(card | {"sha256": _sums(tree)}, indent=1)
            (tree / ARCHIVE_FILE).write_text(text + "\n")
    except OSError:
        # Another run was faster: what it wrote is this archive, or in the way.
        if _already_there(root, card):
            return _summary(root, card, new=False)
        raise
    return _summary(root, card, new=True)


# %% [markdown]
# A handful of flat spectra with other labels, under another record:

# %%
scratch = tempfile.TemporaryDirectory()
ones = np.ones((9, 7214), "f4")
flat = Spectra(wavelength, ones, 1e4 * ones, full.stars[:9].copy(), np.zeros((9, 7214), "i2"))
for name in ("M_H", "ALPHA_M", "C_M", "N_M"):
    flat.stars.remove_columns([name, f"{name}_ERR"])
for name in ("FE_H", "MG_FE", "SI_FE"):
    flat.stars[name] = np.linspace(-0.5, 0.3, 9)
    flat.stars[f"{name}_ERR"] = 0.05
mock_root = Path(scratch.name) / "mock"
summary = write_archive(mock_root, flat, "mock", seed=7, flaws={"duplicate": 2}, progress=False)
print(str(summary).replace(scratch.name, "…"))

# %%
assert summary.stars == 8
mock = Table.read(mock_root / rules.allstar)
assert "FE_H" in mock.colnames and "M_H" not in mock.colnames and len(mock) == 8 + 2 * 2
# The better row of a duplicate lies outside the cut of *this* record:
assert np.sum(mock["FE_H"] < -1) == 2
problem = "takes spectra on the 7214 on-band pixels with a mask; these have 7214 pixels and no mask"
with pytest.raises(LabError, match=problem):
    write_archive(Path(scratch.name) / "x", flat.replace(mask=None), "mock")


# %% [markdown]
# For the real stars there is a shorthand. Here is a small archive, every flaw in it.

# %%
#| export
def write_clusters(
    root, seed: int = 42, stars=None, flaws: dict = None, workers: int = None, progress: bool = True
) -> ArchiveSummary:
    """Write the archive of real stars in DR14's files. Same seed, same bytes.

    Parameters
    ----------
    root : str or Path
        Folder to make.
    seed : int, default 42
        Decides what is simulated: flux scale, visits, flaws.
    stars : int or sequence of int, optional
        How many of the 553 (spread evenly), or their rows; all by default.
    flaws, workers, progress
        As in `write_archive`.

    Returns
    -------
    ArchiveSummary

    Raises
    ------
    LabError
        If there are not so many stars, or something else stands at `root`.
    """
    spectra = _chosen_stars(stars)
    return write_archive(
        root, spectra, "clusters", seed, flaws=flaws, workers=workers, progress=progress
    )


def _chosen_stars(stars):
    "Real stars as the writers take them: so many, those of some rows, or all for None."
    if stars is None:
        return real_stars(with_mask=True)
    everyone = len(_packed(_PACKED_STARS)[2])
    rows = _spread(everyone, stars) if np.ndim(stars) == 0 else np.asarray(stars)
    return _real_stars(rows, with_mask=True)


def _spread(n, count):
    "So many of n rows, evenly spread."
    if not 2 <= count <= n:
        raise LabError(
            f"cannot take {count} stars: the archive of real stars has {n}, choose 2 to {n}"
        )
    return np.linspace(0, n - 1, int(count)).round().astype(int)


# %%
root = Path(scratch.name) / "clusters"
summary = write_clusters(root, stars=24, progress=False)
print(str(summary).replace(scratch.name, "…"))

# %%
assert archive_record(root).name == "clusters" and summary.stars == 23 and summary.new
assert summary.flaws == {flaw.name: flaw.count for flaw in _FLAWS.values()}
assert not write_clusters(root, stars=24, progress=False).new  # nothing is done twice
# No temporary folder is left:
assert {path.name for path in Path(scratch.name).iterdir()} == {"clusters", "mock"}

# %% [markdown]
# ## The same stars in SDSS-V's files
# SDSS-V has [other files](22_mwm.ipynb): one mwmStar per star, called by a number, and a catalogue with other columns. This writer makes such a tree of the same real stars, so that
# fetching, training and labelling can be tried. Three things are **invented**: the numbers; [Fe/H], for which the embedded catalogue's [M/H] stands in; and [Mg/H], which is [M/H] plus
# [α/M]. Some stars are what SDSS-V's files can be: seen from both observatories, by BOSS alone, with labels that are flagged as bad, without a row in the catalogue.

# %%
#| export
_FIRST_SDSS_ID = 60_000_123
_SDSS_ID_STEP = 1_013  # so that the folders differ
_ROLES = {
    "both": 3,
    "boss": 2,
    "bad": 3,
    "no-row": 2,
}  # stars of each kind that is out of the usual


def _roles(stars, seed):
    "What each star (N,) is to be: a key of `_ROLES`, or empty. Small archives have fewer."
    roles = np.full(len(stars), "", "U8")
    order = np.random.default_rng([seed, 19]).permutation(len(stars))
    share = min(1.0, len(stars) / 100)
    for role, number in _ROLES.items():
        number = max(1, round(number * share)) if len(stars) >= 12 else 0
        roles[order[:number]] = role
        order = order[number:]
    return roles


def _on_flux_scale(spectra, seed):
    "The spectra as the instrument saw them: flux and error with a continuum, mask."
    names = [str(name) for name in spectra.stars["APOGEE_ID"]]
    drawn = np.array([_draw_throughput(seed, name) for name in names])
    curves = _instrument_continuum(spectra.stars["TEFF"], spectra.stars["H"], drawn)
    ivar = np.where(np.isfinite(spectra.ivar), spectra.ivar / curves**2, 0)
    return spectra.replace(flux=(spectra.flux * curves).astype("f4"), ivar=ivar.astype("f4"))


def _two_halves(star, seed):
    "One star's spectrum as two that could have made it, from two observatories."
    with np.errstate(divide="ignore"):
        error = np.where(star.ivar[0] > 0, 1 / np.sqrt(star.ivar[0]), _NO_VALUE)
    rng = _star_rng(seed, star.stars["APOGEE_ID"][0], "observatories")
    fluxes, errors, _ = _split_visits(star.flux[0].astype(float), error, 2, rng)
    halves = []
    for flux, error in zip(fluxes, errors):
        ivar = np.where(error < _NO_VALUE, 1 / error**2, 0)
        halves.append(star.replace(flux=flux[None].astype("f4"), ivar=ivar[None].astype("f4")))
    return halves


# %%
print(dict(zip(*np.unique(_roles(range(553), 42), return_counts=True))))
bright = _on_flux_scale(full[[3]], 42)
first, second = _two_halves(bright, 42)
weight = first.ivar + second.ivar
mean = (first.flux * first.ivar + second.flux * second.ivar) / np.where(weight > 0, weight, 1)
known = bright.ivar[0] > 0
assert np.allclose(mean[0, known], bright.flux[0, known], rtol=1e-4)

# %% [markdown]
# The catalogue has astra's columns, as far as we have something to say: who, where, how bright, labels with errors, abundances relative to hydrogen (those that nobody measured are
# NaN), flags.

# %%
#| export
_ELEMENTS = "al c_1 c ca ce co cr cu k mg mn na nd ni n o p si s ti ti_2 v".split()
_ATMOSPHERE = {
    "TEFF": "teff",
    "LOGG": "logg",
    "M_H": "m_h_atm",
    "ALPHA_M": "alpha_m_atm",
    "C_M": "c_m_atm",
    "N_M": "n_m_atm",
}


def _astra_row(star, sdss_id, telescope, bad):
    "A row of astraAllStarASPCAP as a dict."
    row = {"sdss_id": sdss_id, "sdss4_apogee_id": star["APOGEE_ID"], "gaia_dr3_source_id": -1}
    row |= {name.lower(): star[name] for name in ("RA", "DEC")}
    row |= {f"{band.lower()}_mag": star[band] for band in "JHK"}
    row |= {"release": "sdss5", "filetype": "apStar", "apred": "1.3", "obj": star["APOGEE_ID"]}
    row |= {"telescope": telescope, "field": "", "n_visits": star["NVISITS"], "snr": star["SNR"]}
    row |= {"spectrum_flags": star.get("STARFLAG", 0), "v_rad": star["VHELIO"]}
    row |= {"v_astra": "0.6.0", "e_v_rad": star["VERR"], "std_v_rad": star["VSCATTER"]}
    for name, column in _ATMOSPHERE.items():
        row |= {column: star[name], f"e_{column}": star[f"{name}_ERR"]}
    metals = {"fe": star["M_H"], "mg": star["M_H"] + star["ALPHA_M"]}
    for element in sorted([*_ELEMENTS, "fe"]):
        value = metals.get(element, np.nan)
        error = 0.03 if element in metals else np.nan
        row |= {f"{element}_h": value, f"e_{element}_h": error, f"{element}_h_flags": 0}
    return row | {"result_flags": int(bad), "flag_warn": bool(bad), "flag_bad": bool(bad)}


def _astra_table(rows):
    "The catalogue: nothing of BOSS, and APOGEE in HDU 2; packed, without a date."
    kinds = {bool: "L", int: "K", float: "E"}
    columns = []
    for name in rows[0]:
        values = [row[name] for row in rows]
        kind = kinds.get(type(values[0])) or f"{max(map(len, [*values, '1']))}A"
        kind = "D" if name in ("ra", "dec") else "J" if name.endswith("_flags") else kind
        columns.append(fits.Column(name, kind, array=values))
    few = (fits.Column("sdss_id", "K"), fits.Column("telescope", "6A"), fits.Column("snr", "E"))
    boss = fits.BinTableHDU.from_columns(few, nrows=0)
    apogee = fits.BinTableHDU.from_columns(columns)
    boss.header["INSTRMNT"] = "BOSS"
    apogee.header["INSTRMNT"] = "APOGEE"
    primary = fits.PrimaryHDU(header=fits.Header({"PIPELINE": "ASPCAP", "V_ASTRA": "0.6.0"}))
    plain = io.BytesIO()
    fits.HDUList([primary, boss, apogee]).writeto(plain)
    return gzip.compress(plain.getvalue(), compresslevel=6, mtime=0)


# %%
row = _astra_row(_star_dicts(full.stars[:1])[0], 42, "apo25m", bad=False)
print(len(row), "columns:", *list(row)[:8], "…")
assert np.isclose(row["mg_h"] - row["fe_h"], full.stars["ALPHA_M"][0]) and np.isnan(row["si_h"])


# %%
#| export
def _fill_sdssv(tree, spectra, seed, visits, progress):
    "Write star by star, then the catalogue."
    rules = ARCHIVES["sdssv"].rules
    made_mwm = import_module("stellar_lab.mwm").made_mwm
    seen = _on_flux_scale(spectra, seed)
    rows = []
    facts = _star_dicts(spectra.stars)
    roles = _roles(spectra, seed)
    for n in tqdm(range(len(spectra)), desc="writing", unit="star", disable=not progress):
        sdss_id = _FIRST_SDSS_ID + n * _SDSS_ID_STEP
        star = seen[[n]]
        apo, lco = _two_halves(star, seed) if roles[n] == "both" else (star, None)
        spectrum = {"boss": True} if roles[n] == "boss" else {"apo": apo, "lco": lco}
        for product in rules.paths:
            if product == "mwmvisit" and (not visits or roles[n] == "boss"):
                continue
            path = tree / rules.path(product, sdss_id_folder(sdss_id), str(sdss_id))
            path.parent.mkdir(parents=True, exist_ok=True)
            nights = product == "mwmvisit"
            made_mwm(**spectrum, sdss_id=sdss_id, visits=nights).writeto(path)
        if roles[n] in ("boss", "no-row"):
            continue
        rows.append(_astra_row(facts[n], sdss_id, "apo25m", roles[n] == "bad"))
        if lco is not None:  # the same star once more, from the other side: other labels
            worse = facts[n] | {"SNR": 0.7 * facts[n]["SNR"], "TEFF": facts[n]["TEFF"] + 100}
            rows.append(_astra_row(worse, sdss_id, "lco25m", False))
    catalogue = tree / rules.allstar
    catalogue.parent.mkdir(parents=True, exist_ok=True)
    catalogue.write_bytes(_astra_table(rows))


class _SdssVSummary(ArchiveSummary):
    "Its own words: there is no mystery star."

    def __str__(self):
        state = "written to" if self.new else "is already at"
        roles = ", ".join(f"{count} {name}" for name, count in self.flaws.items()) or "none"
        return (
            f"archive of {self.stars} stars in SDSS-V's files {state} {self.root}: {self.files} "
            f"files, {self.size / 1e6:.0f} MB; stars out of the usual: {roles}"
        )


# %%
#| export
def write_sdssv(
    root, seed: int = 42, stars=None, visits: bool = False, progress: bool = True
) -> ArchiveSummary:
    """Write the real stars in the files of SDSS-V's data release 19. Same seed, same bytes.

    Parameters
    ----------
    root : str or Path
        Folder to make; it must not exist, be empty or hold this very archive.
    seed : int, default 42
        Decides what is simulated: flux scale, and which stars are out of the usual.
    stars : int or sequence of int, optional
        How many of the 553 (spread evenly), or their rows; all by default.
    visits : bool, default False
        Write mwmVisit files, too.
    progress : bool, default True
        Show a bar.

    Returns
    -------
    ArchiveSummary
        Its `flaws` say how many stars are seen from both observatories, by BOSS alone, and so on.

    Raises
    ------
    LabError
        If there are not so many stars, or something else stands at `root`.
    """
    spectra = _chosen_stars(stars)
    root = Path(root)
    content = hashlib.sha256(" ".join(map(str, spectra.stars["APOGEE_ID"])).encode())
    roles = _roles(spectra, seed)
    card = {"archive": "sdssv", "format": _FORMAT, "seed": seed, "stars": len(spectra)}
    card |= {"content": content.hexdigest()[:16], "visits": visits, "files": []}
    card["flaws"] = {name: int(np.sum(roles == name)) for name in _ROLES if name in roles}
    new = not _already_there(root, card)
    if new:
        with _growing(root) as tree:
            _fill_sdssv(tree, spectra, seed, visits, progress)
            text = json.dumps(card | {"sha256": _sums(tree)}, indent=1)
            (tree / ARCHIVE_FILE).write_text(text + "\n")
    return _SdssVSummary(**vars(_summary(root, card, new)))


# %%
summary = write_sdssv(Path(scratch.name) / "sdssv", stars=16, progress=False)
print(str(summary).replace(scratch.name, "…"))
assert summary.stars == 16 and len(list(summary.root.rglob("mwmStar-*.fits"))) == 16
assert not write_sdssv(summary.root, stars=16, progress=False).new

# %% [markdown]
# ## One spectrum, step by step
# From what the survey published to what its file looks like, and the visits that were made up for it.

# %%
truth = read_truth(root)
ids, curves = true_continuum(root)
subset = full[_spread(553, 24)]
many_visits = subset.stars["NVISITS"] > 3
bright_giant = (subset.stars["LOGG"] < 2.5) & (subset.stars["M_H"] > -0.9)
row = int(np.flatnonzero(many_visits & bright_giant)[0])
star = subset.stars[row]
k = list(ids).index(star["APOGEE_ID"])
with fits.open(root / rules.path("apstar", str(star["LOCATION_ID"]), star["APOGEE_ID"])) as hdus:
    flux, error, mask = (hdus[i].data[:, on_band].astype(float) for i in (1, 2, 3))
    weights = np.array([hdus[0].header[f"SNRVIS{v + 1}"] ** 2 for v in range(star["NVISITS"])])
weights /= weights.sum()

# %%
fig, axes = plt.subplots(
    4, 1, figsize=(10, 8.5), sharex=True, gridspec_kw={"height_ratios": [3, 3, 3, 1.2]}
)
window = (16_140, 16_300)
inside = (wavelength > window[0]) & (wavelength < window[1])
plot_spectrum(wavelength, subset.flux[row], ax=axes[0], window=window, color="0.7")
plot_spectrum(wavelength, subset.flux[row], subset.mask[row] == 0, ax=axes[0], window=window)
title = f"{star['APOGEE_ID']}, {star['CLUSTER']}"
axes[0].set(ylabel="published:\nflux / continuum", xlabel="", title=title)
plot_spectrum(wavelength, curves[k], ax=axes[1], window=window, color="C3")
plot_spectrum(wavelength, flux[1], ax=axes[1], window=window)
axes[1].set(ylabel="file, row 1:\n[$10^{-17}$ erg/s/cm²/Å]", xlabel="")
mean = np.where(flux[1] > 0, flux[1], np.nan)
for i in range(2, 5):
    percent = 100 * (flux[i] / mean - 1)
    plot_spectrum(wavelength, percent, mask[1] == 0, ax=axes[2], window=window, color=f"C{i}")
axes[2].set(ylabel="three visits\nover the mean [%]", xlabel="", ylim=(-8, 8))
for bit in np.flatnonzero([np.any(mask[0][inside].astype(int) >> b & 1) for b in range(15)]):
    marked = inside & (mask[0].astype(int) >> bit & 1 == 1)
    axes[3].plot(wavelength[marked], np.full(marked.sum(), PIXMASK_NAMES[bit]), "|", ms=10)
axes[3].set(xlabel="vacuum wavelength [Å]")
axes[3].margins(y=0.3);

# %% [markdown]
# **What to see.** First: the published spectrum, in grey what it marks as bad. Second: the same lines on a flux scale; the orange curve is the
# continuum that was put in. Third: the visits scatter by their noise, more near a sky line. Last: the mask's bits sit on the grey stretches; a
# cosmic ray adds `CRPIX`.

# %%
good = subset.mask[row] == 0
# The file gives back what was packed:
assert np.abs(flux[1] / curves[k] - subset.flux[row])[good].max() < 1e-6
assert np.allclose((curves[k] / error[1]) ** 2, subset.ivar[row], rtol=1e-5)
assert np.abs(weights @ flux[2:] - flux[1])[good].max() < 1e-6 * np.median(flux[1])
assert np.array_equal(flux[0], flux[1])
# Row 1: bits on exactly the bad pixels.
assert np.array_equal(mask[1] == 0, good) and np.all(mask[0][~good] != 0)
extra = (mask[0] != 0) & good
assert np.all(mask[0][extra] == PIXMASK.CRPIX) and extra.mean() < 3 * _COSMIC_RAYS

# %% [markdown]
# ## What stands on disk
# A plain walk through the tree, without any of our reading code, finds the flaws in the numbers that the list promises.

# %%
catalogue = Table.read(root / rules.allstar)
target, times = np.unique(catalogue["TARGET_ID"], return_counts=True)
names = {rules.parse_name("apstar", file.name) for file in root.rglob("apStar-*.fits")}
listed = {str(name).strip() for name in catalogue["APOGEE_ID"]}
broken = [file for file in root.rglob("apStar-*.fits") if file.stat().st_size % 2880]

# %%
found = {
    "low-snr": int(np.sum(catalogue["SNR"] < 50)),
    "no-labels": int(np.sum(catalogue["TEFF"] < -9000)),
    "duplicate": int(np.sum(times > 1)),
    "no-row": len(names - listed),
    "no-file": len(listed - names),
    "truncated and html": len(broken),
}
Table(rows=list(found.items()), names=["flaw", "found"])

# %%
expected = {name: _FLAWS[name].count for name in list(found)[:-1]}
expected["truncated and html"] = _FLAWS["truncated"].count + _FLAWS["html"].count
assert found == expected
for name in truth["APOGEE_ID"][truth["FLAW"] == "zero-flux"]:
    file = next(root.rglob(f"apStar-r8-{name}.fits"))
    assert not fits.getdata(file, 1).any()

# %% [markdown]
# The files have the shapes and number types of the survey's; a star of one visit has one dimension, and the mystery star has no name.

# %%
for file in sorted(root.rglob("apStar-*.fits")):
    if file not in broken:
        with fits.open(file) as hdus:
            visits = hdus[0].header["NVISITS"]
            shape = (visits + 2, 8575) if visits > 1 else (8575,)
            assert len(hdus) == 10 and hdus[1].data.shape == shape
            kinds = [hdus[i].data.dtype.str for i in range(1, 9)]
            assert kinds == [">f4", ">f4", ">i2", ">f4", ">f4", ">f4", ">f4", ">f8"]

# %%
with fits.open(root / MYSTERY_FILE) as hdus:
    assert hdus[1].data.shape == (8575,) and not set(_SECRETS) & set(hdus[0].header)
    sealed = list(ids).index("mystery")
    source = list(subset.stars["APOGEE_ID"]).index(truth["SOURCE_ID"][sealed])
    assert np.allclose(hdus[1].data[on_band] / curves[sealed], subset.flux[source], atol=1e-6)
    assert truth["SOURCE_ID"][sealed] not in listed | names

# %% [markdown]
# ## Same seed, same bytes
# Two archives made in different folders by a different number of workers are the same to the last bit; another seed gives the same stars in other
# files. And what stands in the way is never overwritten.

# %%
few = {"low-snr": 1, "duplicate": 1, "truncated": 1}
again = [Path(scratch.name) / name for name in ("first", "second", "third")]
for place, seed, workers in zip(again, (1, 1, 2), (1, 2, 1), strict=True):
    write_clusters(place, seed=seed, stars=5, flaws=few, workers=workers, progress=False)
digests = [tree_digest(place) for place in again]
assert digests[0] == digests[1] != digests[2]
[digest[:16] for digest in digests]

# %%
problem = r"holds another archive \(clusters, seed 1, 4 stars\): name another folder"
with pytest.raises(LabError, match=problem):
    write_clusters(again[0], seed=3, stars=5, progress=False)
with pytest.raises(LabError, match="exists and is not an archive of ours"):
    write_clusters(scratch.name, progress=False)
with pytest.raises(LabError, match="cannot take 1000 stars: the archive of real stars has 553"):
    write_clusters(again[0] / "new", stars=1000)
with pytest.raises(LabError, match="truth.fits is missing: only an archive that stellar_lab wrote"):
    true_continuum(scratch.name)

# %%
#| hide
scratch.cleanup()

# %% [markdown]
# **Exercise.** The visits here differ by noise only. Give a binary star visits that move against each other by its velocity, and find it again from
# its apStar file: which of the ten parts do you need?
