# %% [markdown]
# # What does today's survey give?
# > Files of SDSS-V, the survey that goes on: other names, other tables, the same stars.
#
# **Question.** APOGEE's spectrographs go on observing, within SDSS-V's Milky Way Mapper. Its files are called mwmStar and mwmVisit, hold two instruments and two
# observatories, and its catalogue has other columns. Can a model read them, and learn from them?
#
# **Idea.** Only the envelope is new. The pixels are the 8,575 of old, the flags have the same bits, and the spectra stand at rest. So a reader by *columns* gives the
# `Spectra` that every chapter knows, and a table of names turns the catalogue into labels.
#
# You learn where SDSS-V keeps a star, what stands in its files, and what is *not* in them. You need [visits](21_visits.ipynb). No real file of this kind comes with the
# book: the files of this chapter are made from real giants, after these public pages:
#
# | fact | page |
# |---|---|
# | four extensions BOSS/APO, BOSS/LCO, APOGEE/APO, APOGEE/LCO; a table each, empty where nothing was observed | the same example, and the [loader of specutils](https://github.com/astropy/specutils/blob/main/specutils/io/default_loaders/sdss_v.py), which skips empty ones |
# | columns of an APOGEE row (`wavelength`, `flux`, `ivar`, `pixel_flags`, `continuum`, `snr`, …) | [an example by astra's author](https://gist.github.com/andycasey/c28d73ca3f51ae26c787dd8957cc58b6) |
# | wavelengths of mwmVisit stand in the header (`CRVAL`, `CDELT`, `NPIXELS`) | [loader of specutils](https://github.com/astropy/specutils/blob/main/specutils/io/default_loaders/sdss_v.py) |
# | the grid, 10^(4.179 + 6e-6 i), and the rest frame | [astra](https://github.com/sdss/astra) |
# | catalogue `astraAllStarASPCAP`, APOGEE in HDU 2, `sdss_id` | public code that reads it; the names of its label columns are taken from [astra](https://github.com/sdss/astra) and were not compared with a real file |

# %%
#| default_exp mwm

# %%
#| export
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table, vstack

from stellar_lab.clean import inverse_variance
from stellar_lab.survey import (
    LABELS,
    LOG10_START,
    LOG10_STEP,
    N_PIXELS,
    PRODUCTS,
    LabError,
    Spectra,
    full_wavelength,
    label_records,
    on_band,
    wavelength,
)
from stellar_lab.visits import combine

# %%
#| hide
import tempfile

import pytest

from stellar_lab.cannon import Cannon
from stellar_lab.inversion import infer
from stellar_lab.normalize import as_trained, normalize, training_set
from stellar_lab.survey import archive_root


# %% [markdown]
# ## Where is a star?
# By its `sdss_id`: the last four digits, in two pairs, are the folders.

# %%
#| export
@dataclass(frozen=True)
class MwmRelease:
    """Where a data release of the Milky Way Mapper keeps its files.

    Parameters
    ----------
    name, version : str
        of the release, and of astra, the software that wrote it
    star, visit, catalogue : str
        templates of paths, with `{version}`, `{sdss_id}`, `{first}`, `{second}`
    """

    name: str
    version: str
    star: str
    visit: str
    catalogue: str

    def path(self, kind: str, sdss_id: int) -> str:
        "Path of a star's file, `star` or `visit`, below the root of the archive."
        if kind not in ("star", "visit"):
            raise LabError(f"unknown kind of file {kind!r}: choose star or visit")
        number = f"{int(sdss_id) % 10_000:04d}"
        parts = {"version": self.version, "sdss_id": int(sdss_id)}
        return getattr(self, kind).format(first=number[:2], second=number[2:], **parts)


_ASTRA = "dr19/spectro/astra/{version}/"
MWM_RELEASES = {
    "dr19": MwmRelease(
        "DR19",
        "0.6.0",
        _ASTRA + "spectra/star/{first}/{second}/mwmStar-{version}-{sdss_id}.fits",
        _ASTRA + "spectra/visit/{first}/{second}/mwmVisit-{version}-{sdss_id}.fits",
        _ASTRA + "summary/astraAllStarASPCAP-{version}.fits.gz",
    ),
}

# %%
assert MWM_RELEASES["dr19"].path("star", 70_350_007).endswith("/00/07/mwmStar-0.6.0-70350007.fits")
MWM_RELEASES["dr19"].path("visit", 114_986_844)

# %% [markdown]
# ## Inside
# A star seen by BOSS alone has an optical spectrum and no other: that deserves a sentence. A star seen from both observatories has two APOGEE spectra, which we combine.

# %%
#| export
_NAME = re.compile(r"mwm(?P<kind>Star|Visit)-(?P<version>[^-]+)-(?P<sdss_id>\d+)\.fits(\.gz)?")
_NEEDED = ("flux", "ivar")


def mwm_kind(path) -> str | None:
    "`mwmstar` or `mwmvisit`, from a file's name or its extensions; None for another file."
    match = _NAME.fullmatch(Path(path).name)
    if match:
        return f"mwm{match['kind'].lower()}"
    try:
        with fits.open(path, lazy_load_hdus=True) as hdus:
            tables = [hdu for hdu in hdus[1:] if hdu.name.upper().startswith(("APOGEE/", "BOSS/"))]
            if not tables:
                return None
            visit = any("mjd" in map(str.lower, hdu.columns.names) for hdu in tables)
            return "mwmvisit" if visit else "mwmstar"
    except Exception:  # whatever a damaged file makes astropy raise
        return None


def _tables(path):
    "Observatory -> its APOGEE table with rows, and what else the file holds, in words."
    found = {}
    others = []
    try:
        with fits.open(path) as hdus:
            for hdu in hdus[1:]:
                instrument, _, observatory = hdu.name.upper().partition("/")
                rows = 0 if hdu.is_image or hdu.data is None else len(hdu.data)
                if instrument == "APOGEE" and rows:
                    found[observatory.lower()] = (Table(hdu.data), hdu.header.copy())
                elif rows:
                    others.append(hdu.name)
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror or error}") from error
    except (TypeError, ValueError) as error:
        raise LabError(f"{path} is damaged ({error}): fetch it again") from error
    return found, others


# %%
#| export
def _lower(table):
    "Columns by their names in lower case."
    return {name.lower(): table[name] for name in table.colnames}


def _check_columns(columns, header, path):
    "LabError where a table lacks what we need, or has another grid."
    lacking = [name for name in _NEEDED if name not in columns]
    if lacking:
        raise LabError(
            f"{path}: the APOGEE table has no column {', '.join(lacking)}; it has "
            f"{', '.join(list(columns)[:12])}, … Is it of a later version of astra?"
        )
    if "wavelength" in columns:
        grid = np.atleast_2d(np.asarray(columns["wavelength"], float))[0]
    else:
        keys = [header.get(key, np.nan) for key in ("CRVAL", "CDELT", "NPIXELS")]
        usual = np.allclose(keys, [LOG10_START, LOG10_STEP, N_PIXELS], rtol=1e-7)
        grid = full_wavelength if usual else np.array([])
    if len(grid) != N_PIXELS or not np.allclose(grid, full_wavelength, rtol=1e-7):
        raise LabError(f"{path}: another wavelength grid than the survey's {N_PIXELS} pixels")


def _facts(columns, row, path, observatory):
    "What a row says of its star, in the names of our tables."

    def value(name, missing):
        found = columns[name][row] if name in columns else missing
        return found.strip() if isinstance(found, str) else found

    telescope = {"apo": "apo25m", "lco": "lco25m"}.get(observatory, "")
    sdss_id = int(value("sdss_id", -1))
    name = str(value("obj", "")) or str(sdss_id)
    facts = {"APOGEE_ID": name, "SDSS_ID": sdss_id, "TELESCOPE": telescope, "FIELD": ""}
    facts |= {"LOCATION_ID": -1, "SNR": float(value("snr", np.nan))}
    facts |= {"NVISITS": int(value("n_visits", -1)), "J": np.nan, "H": np.nan, "K": np.nan}
    facts |= {"RA": float(value("ra", np.nan)), "DEC": float(value("dec", np.nan))}
    return facts | {"MJD": int(value("mjd", -1)), "FILE": Path(path).name}


# %%
#| export
def _spectra_of(columns, header, path, observatory):
    "`Spectra` of all rows of one observatory's table."
    _check_columns(columns, header, path)
    flux = np.atleast_2d(np.asarray(columns["flux"], float))[:, on_band]
    ivar = np.atleast_2d(np.asarray(columns["ivar"], float))[:, on_band]
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(ivar > 0, 1 / np.sqrt(ivar), 0)
    ivar = inverse_variance(flux, error, PRODUCTS["apstar"])
    mask = np.zeros(flux.shape, np.int32)
    if "pixel_flags" in columns:
        mask = np.atleast_2d(np.asarray(columns["pixel_flags"]))[:, on_band].astype(np.int32)
    facts = [_facts(columns, row, path, observatory) for row in range(len(flux))]
    stars = Table({name: [fact[name] for fact in facts] for name in facts[0]})
    stars.meta = {"product": "apstar", "normalized": False, "row": None, "level": 1.0}
    flux = np.nan_to_num(flux, nan=0, posinf=0, neginf=0).astype(np.float32)
    return Spectra(wavelength, flux, ivar, stars, mask)


# %%
#| export
def read_mwm(path, observatory: str = None) -> Spectra:
    """APOGEE spectra of an mwmStar or mwmVisit file, by columns.

    Parameters
    ----------
    path : str or Path
    observatory : {"apo", "lco"}, optional
        whose spectrum of a star seen from both; by default the two are combined (mwmStar), or all
        visits are taken (mwmVisit)

    Returns
    -------
    Spectra
        raw flux at rest, on the survey's on-band pixels, ready for `as_trained`: one row per star
        for mwmStar, one per visit for mwmVisit; `SDSS_ID` is among the columns

    Raises
    ------
    LabError
        where there is no APOGEE spectrum, or the table is of another version
    """
    found, others = _tables(path)
    if not found:
        if others:
            raise LabError(
                f"{Path(path).name} holds {', '.join(others)} only, optical spectra: APOGEE has "
                "not seen this star"
            )
        raise LabError(f"{Path(path).name}: all extensions are empty, nothing was observed")
    if observatory is not None and observatory not in found:
        there = ", ".join(found)
        raise LabError(f"{Path(path).name} has no spectrum from {observatory}: it has {there}")
    chosen = found if observatory is None else {observatory: found[observatory]}
    parts = [_spectra_of(_lower(t), h, path, name) for name, (t, h) in chosen.items()]
    if len(parts) == 1:
        return parts[0]
    if mwm_kind(path) == "mwmstar":
        return combine([_without_mask(part) for part in parts])
    return _stacked(parts)


def _without_mask(spectra):
    "Flagged pixels without weight, so that two spectra can be averaged."
    ivar = np.where(spectra.mask == 0, spectra.ivar, 0).astype(np.float32)
    return spectra.replace(ivar=ivar, mask=np.zeros_like(spectra.mask))


def _stacked(parts):
    "Spectra of several tables, one below the other."
    stars = vstack([part.stars for part in parts], metadata_conflicts="silent")
    arrays = (np.concatenate([getattr(p, name) for p in parts]) for name in ("flux", "ivar"))
    return Spectra(wavelength, *arrays, stars, np.concatenate([part.mask for part in parts]))


# %% [markdown]
# ## A file to read
# The writer goes by the pages above. It is for this chapter and for tests.

# %%
#| exporti
def _apogee_table(flux, ivar, flags, facts, observatory, visits):
    "One APOGEE extension; an empty one where flux is None."
    rows = 0 if flux is None else len(flux)
    size = f"{N_PIXELS}"
    full = [np.zeros((rows, N_PIXELS)) for _ in range(3)]
    if rows:
        for target, values in zip(full, (flux, ivar, flags)):
            target[:, on_band] = values
    facts = [] if rows == 0 else facts
    columns = [
        fits.Column("sdss_id", "K", array=[fact["sdss_id"] for fact in facts]),
        fits.Column("obj", "18A", array=[fact["obj"] for fact in facts]),
        fits.Column("telescope", "6A", array=[f"{observatory}25m"] * rows),
        fits.Column("snr", "E", array=[fact["snr"] for fact in facts]),
        fits.Column("v_rad", "E", array=[0.0] * rows),
        fits.Column("flux", f"{size}E", array=full[0]),
        fits.Column("ivar", f"{size}E", array=full[1]),
        fits.Column("pixel_flags", f"{size}K", array=full[2]),
        fits.Column("continuum", f"{size}E", array=np.ones((rows, N_PIXELS))),
    ]
    if visits:
        columns.append(fits.Column("mjd", "J", array=59_800 + np.arange(rows)))
    else:
        grid = np.tile(full_wavelength, (rows, 1))
        columns.append(fits.Column("wavelength", f"{size}D", array=grid))
        columns.append(fits.Column("n_visits", "J", array=[3] * rows))
    hdu = fits.BinTableHDU.from_columns(columns, nrows=rows, name=f"APOGEE/{observatory.upper()}")
    hdu.header.update({"CRVAL": LOG10_START, "CDELT": LOG10_STEP, "NPIXELS": N_PIXELS})
    return hdu


# %%
#| exporti
def made_mwm(apo: Spectra = None, lco: Spectra = None, sdss_id=42, boss=False, visits=False):
    """An mwmStar (or mwmVisit) file from spectra on the survey's pixels.

    Parameters
    ----------
    apo, lco : Spectra, optional
        what each observatory saw of the star; empty extensions by default
    sdss_id : int
    boss : bool, default False
        BOSS saw the star from APO, too
    visits : bool, default False
        rows are visits

    Returns
    -------
    HDUList
    """
    hdus = [fits.PrimaryHDU(header=fits.Header({"SDSS_ID": sdss_id, "V_ASTRA": "0.6.0"}))]
    optical = [
        fits.Column("sdss_id", "K", array=[sdss_id]),
        fits.Column("flux", "4648E", array=np.ones((1, 4648))),
    ]
    for observatory, rows in (("APO", int(boss)), ("LCO", 0)):
        hdus.append(fits.BinTableHDU.from_columns(optical, nrows=rows, name=f"BOSS/{observatory}"))
        if not rows:
            hdus[-1].data = hdus[-1].data[:0]
    for observatory, spectra in (("apo", apo), ("lco", lco)):
        if spectra is None:
            hdus.append(_apogee_table(None, None, None, [], observatory, visits))
            continue
        names = spectra.stars["APOGEE_ID"]
        snr = np.median(spectra.flux * np.sqrt(spectra.ivar), axis=1)
        facts = [{"sdss_id": sdss_id, "obj": str(n), "snr": float(s)} for n, s in zip(names, snr)]
        mask = np.zeros(spectra.flux.shape) if spectra.mask is None else spectra.mask
        hdus.append(_apogee_table(spectra.flux, spectra.ivar, mask, facts, observatory, visits))
    return fits.HDUList(hdus)


# %%
spectra, _ = training_set(archive_root(), progress=False)
scratch = tempfile.TemporaryDirectory()
here = Path(scratch.name)
path = here / "mwmStar-0.6.0-42.fits"
made_mwm(spectra[[3]], sdss_id=42).writeto(path)
star = read_mwm(path)
print(star, star.stars["SDSS_ID"][0], mwm_kind(path))
assert np.array_equal(star.flux[0], spectra.flux[3])
assert np.allclose(star.ivar[0], spectra.ivar[3], rtol=1e-5)

# %% [markdown]
# A reader that agrees with its own writer proves little. Plain astropy, by column, sees what the pages say:

# %%
with fits.open(path) as hdus:
    print([(hdu.name, 0 if hdu.data is None else len(hdu.data)) for hdu in hdus[1:]])
    by_hand = hdus["APOGEE/APO"].data
    assert (
        by_hand["flux"].shape == (1, 8575)
        and by_hand["flux"][0, on_band[100]] == spectra.flux[3, 100]
    )
    assert np.isclose(by_hand["wavelength"][0, 322], wavelength[0])

# %% [markdown]
# The sentences: BOSS alone, nothing at all, both observatories, a later version.

# %%
refused = {}
for name, made in (
    ("BOSS alone", made_mwm(boss=True)),
    ("nothing", made_mwm()),
    ("renamed column", made_mwm(spectra[[3]])),
):
    if name == "renamed column":
        made["APOGEE/APO"].columns.change_name("ivar", "inverse_variance")
    made.writeto(here / "mwmStar-0.9.0-1.fits", overwrite=True)
    with pytest.raises(LabError) as said:
        read_mwm(here / "mwmStar-0.9.0-1.fits")
    refused[name] = str(said.value)
    print(f"{name}: {refused[name].replace(str(here) + '/', '')[:90]}")
assert "optical" in refused["BOSS alone"] and "empty" in refused["nothing"]
assert "later version" in refused["renamed column"]

# %%
made_mwm(spectra[[3]], spectra[[3]]).writeto(path, overwrite=True)
both = read_mwm(path)
assert len(both) == 1 and np.allclose(both.ivar[0], 2 * spectra.ivar[3], rtol=1e-3)
assert len(read_mwm(path, "lco")) == 1
made_mwm(spectra[[3, 3, 3]], visits=True).writeto(here / "mwmVisit-0.6.0-42.fits")
visits = read_mwm(here / "mwmVisit-0.6.0-42.fits")
assert len(visits) == 3 and mwm_kind(here / "mwmVisit-0.6.0-42.fits") == "mwmvisit"
visits.stars["APOGEE_ID", "SDSS_ID", "MJD", "SNR"]

# %% [markdown]
# ## The catalogue
# `astraAllStarASPCAP` calls its columns by lower-case names, its errors `e_teff`, and gives elements relative to hydrogen: [Mg/Fe] is [Mg/H] - [Fe/H], and its error the
# root of two squares. `flag_bad` and `flag_warn` are the survey's own doubts.

# %%
#| export
_ASTRA_COLUMNS = {  # our label -> column, and what is subtracted from it
    "TEFF": ("teff", None),
    "LOGG": ("logg", None),
    "FE_H": ("fe_h", None),
    "MG_FE": ("mg_h", "fe_h"),
    "SI_FE": ("si_h", "fe_h"),
    "M_H": ("m_h_atm", None),
    "ALPHA_M": ("alpha_m_atm", None),
    "C_M": ("c_m_atm", None),
    "N_M": ("n_m_atm", None),
}


def _numbers(table, name):
    "A column as float64, NaN where masked or far outside."
    values = np.ma.filled(np.ma.asarray(table[name], dtype=float), np.nan)
    return np.where(np.abs(values) < 9_000 if name != "teff" else values > 0, values, np.nan)


# %%
#| export
def read_astra(path, labels=None, hdu: int = 2) -> Table:
    """Labels of the catalogue `astraAllStarASPCAP`, in the names of this book.

    Parameters
    ----------
    path : str or Path
    labels : sequence of str, optional
        which; all that the table has by default
    hdu : int, default 2
        APOGEE's extension

    Returns
    -------
    Table
        SDSS_ID, APOGEE_ID, labels and `_ERR` columns, BAD and WARN

    Raises
    ------
    LabError
        where a label or the table is missing
    """
    try:
        with fits.open(path) as hdus:
            table = Table(hdus[hdu].data)
    except (OSError, IndexError, TypeError, ValueError) as error:
        raise LabError(
            f"{path} has no table in HDU {hdu} ({error}): is it astraAllStarASPCAP?"
        ) from error
    known = {n: v for n, v in _ASTRA_COLUMNS.items() if {v[0], v[1] or v[0]} <= set(table.colnames)}
    names = list(known) if labels is None else [label.name for label in label_records(labels)]
    missing = [name for name in names if name not in known]
    if missing or not names or "sdss_id" not in table.colnames:
        lacks = ", ".join(missing) or "sdss_id, or any label"
        raise LabError(f"{path} has no {lacks}: it has {', '.join(table.colnames[:12])}, …")
    found = Table({"SDSS_ID": np.asarray(table["sdss_id"], np.int64)})
    if "sdss4_apogee_id" in table.colnames:
        found["APOGEE_ID"] = [str(name).strip() for name in table["sdss4_apogee_id"]]
    for name in names:
        column, less = known[name]
        found[name] = _numbers(table, column) - (_numbers(table, less) if less else 0)
        columns = [f"e_{c}" for c in (column, less) if c and f"e_{c}" in table.colnames]
        errors = [_numbers(table, column) for column in columns]
        found[f"{name}_ERR"] = np.sqrt(sum(error**2 for error in errors)) if errors else np.nan
        found[name].unit = found[f"{name}_ERR"].unit = LABELS[name].unit
    for flag in ("bad", "warn"):
        column = f"flag_{flag}"
        found[flag.upper()] = np.asarray(table[column], bool) if column in table.colnames else False
    found.meta["labels"] = names
    return found


# %%
labels = spectra.labels()
rows = Table({"sdss_id": 1000 + np.arange(len(spectra)), "teff": labels[:, 0]})
rows["e_teff"] = 20.0
rows["logg"], rows["m_h_atm"] = labels[:, 1], labels[:, 2]
rows["fe_h"], rows["mg_h"] = labels[:, 2], labels[:, 2] + 0.25
rows["e_fe_h"] = rows["e_mg_h"] = 0.03
rows["flag_bad"] = np.arange(len(rows)) % 50 == 0
made = fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU(name="BOSS"), fits.table_to_hdu(rows)])
made.writeto(here / "astraAllStarASPCAP-0.6.0.fits")
catalogue = read_astra(here / "astraAllStarASPCAP-0.6.0.fits")
assert np.allclose(catalogue["MG_FE"], 0.25) and np.allclose(
    catalogue["MG_FE_ERR"], 0.03 * np.sqrt(2)
)
with pytest.raises(LabError, match="has no SI_FE"):
    read_astra(here / "astraAllStarASPCAP-0.6.0.fits", ["teff", "si_fe"])
catalogue[:3]


# %% [markdown]
# ## Learning from it
# Files and catalogue meet by `sdss_id`. What comes out is what every model learns from.

# %%
#| export
def mwm_stars(paths, catalogue: Table, keep_bad: bool = False) -> tuple:
    """Spectra of mwmStar files with the catalogue's labels, and what became of the others.

    Parameters
    ----------
    paths : sequence of str or Path
        mwmStar files
    catalogue : Table
        of `read_astra`
    keep_bad : bool, default False
        keep stars whose labels the survey calls bad

    Returns
    -------
    tuple
        `Spectra`, raw, with labels; and a dict path -> reason of the files left out

    Raises
    ------
    LabError
        where no star is left
    """
    place = {int(sdss_id): row for row, sdss_id in enumerate(catalogue["SDSS_ID"])}
    parts, rows, left_out = [], [], {}
    for path in paths:
        try:
            star = read_mwm(path)
        except LabError as error:
            left_out[str(path)] = str(error)
            continue
        row = place.get(int(star.stars["SDSS_ID"][0]))
        if row is None or (catalogue["BAD"][row] and not keep_bad):
            left_out[str(path)] = "not in the catalogue" if row is None else "its labels are bad"
            continue
        parts.append(star)
        rows.append(row)
    if not parts:
        first = next(iter(left_out.values()), "there are none")
        raise LabError(f"no star is left of {len(left_out)} files: {first}")
    stars = _stacked(parts)
    for name in catalogue.meta["labels"]:
        for column in (name, f"{name}_ERR"):
            stars.stars[column] = catalogue[column][rows]
    stars.stars.meta["labels"] = list(catalogue.meta["labels"])
    return stars, left_out


# %%
chosen = np.arange(0, len(spectra), 13)
paths = []
for row in chosen:
    paths.append(here / f"mwmStar-0.6.0-{1000 + row}.fits")
    made_mwm(spectra[[row]], sdss_id=1000 + row).writeto(paths[-1], overwrite=True)
stars, left_out = mwm_stars(paths, catalogue)
print(stars, f"{len(left_out)} left out: {set(left_out.values())}")
assert len(stars) + len(left_out) == len(chosen)

# %% [markdown]
# A model learns from these files, and labels them as it would label the survey's older ones.

# %%
model = Cannon(order=1, scatter=True, labels=["TEFF", "LOGG", "M_H"]).fit(normalize(stars))
found = infer(model, as_trained(model, read_mwm(paths[5])))
known = catalogue["TEFF"][catalogue["SDSS_ID"] == 1000 + chosen[5]][0]
print(f"Teff {found['teff'][0]:.0f}, catalogue {known:.0f} K")
assert abs(found["teff"][0].value - known) < 400

# %% [markdown]
# Release notes, as far as they matter here: the content of `astraAllStarASPCAP-0.6.0` has changed once under one version, so keep the checksum of the file that you
# learned from beside the model. And mwmStar's spectra are weighted combinations of visits; the survey's pipeline worked on these very spectra.
#
# **Exercise.** Write a star that both observatories have seen, with different noise, and compare the labels of each with those of the combination.

# %%
#| hide
scratch.cleanup()
