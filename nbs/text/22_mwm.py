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
# book: the files of this chapter are made from real giants, column by column as astra, the program that writes the survey's files, writes them. Each fact has its page:
#
# | fact | where it is from |
# |---|---|
# | folders: the last four digits of the sdss_id, the two higher ones first, zero-padded | [astra](https://github.com/sdss/astra), `python/astra/models/mwm.py`, `MWMStarMixin.path` |
# | extensions BOSS/APO, BOSS/LCO, APOGEE/APO, APOGEE/LCO in this order, empty where nothing was observed | astra, `python/astra/products/mwm.py` |
# | columns, their order and types; pixels are numbers of single precision, flags and wavelengths too | astra, `models/mwm.py` (`ApogeeCombinedSpectrum`) and `products/utils.py`; an [example by its author](https://gist.github.com/andycasey/c28d73ca3f51ae26c787dd8957cc58b6) |
# | wavelengths of mwmVisit stand in the header only (`CRVAL`, `CDELT`, `NPIXELS`) | astra, `products/utils.py`; the [loader of specutils](https://github.com/astropy/specutils/blob/main/specutils/io/default_loaders/sdss_v.py) |
# | flux, ivar and pixel_flags of mwmStar are those of the apStar combination, so the flags have the bits of old | astra, `products/apogee.py` |
# | the reduction's own apStar file of SDSS-V: `<apred>/stars/<telescope>/<healpix / 1000>/<healpix>/apStar-<apred>-<telescope>-<obj>.fits`; its first row is the combination, visits begin at row 2 where there are several | astra, `python/astra/models/apogee.py` (`ApogeeVisitSpectrumInApStar`), and the loader of specutils |
# | the two observatories are not combined by the survey | [DR19, data products](https://www.sdss.org/dr19/mwm/astra/output-files) |
# | `astraAllStarASPCAP`: APOGEE in HDU 2; columns such as `teff`, `m_h_atm`, `mg_h`, errors `e_…`, `flag_warn`, `flag_bad` | [DR19, abundances](https://www.sdss.org/dr19/mwm/data/abundances); astra, `models/aspcap.py` and `products/pipeline_summary.py` |

# %%
#| default_exp mwm

# %%
#| export
import gzip
import re
from functools import cache
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table, vstack

from stellar_lab.clean import (
    Ledger,
    apply_cuts,
    checked_hdus,
    dark_pixels,
    find_catalogue,
    find_files,
    inverse_variance,
    star_fact,
    strange_pixels,
)
from stellar_lab.normalize import drop_masked, normalize, weigh_by
from stellar_lab.survey import (
    LABELS,
    LOG10_START,
    LOG10_STEP,
    N_PIXELS,
    PRODUCTS,
    LabError,
    Spectra,
    archive_record,
    full_wavelength,
    label_records,
    on_band,
    sha256_of,
    wavelength,
)
from stellar_lab.visits import combine

# %%
#| hide
import tempfile

import pytest

from stellar_lab.cannon import Cannon
from stellar_lab.inversion import infer
from stellar_lab.normalize import as_trained, training_set
from stellar_lab.survey import ARCHIVE_FILE, RELEASES, archive_root, sdss_id_folder

# %% [markdown]
# ## Where is a star?
# By its `sdss_id`: the last four digits, in two pairs, are the folders. [The release](00_survey.ipynb) knows the rest.

# %%
dr19 = RELEASES["dr19"]
print(dr19.path("mwmstar", sdss_id_folder(114_986_844), "114986844"))
print(dr19.path("mwmvisit", sdss_id_folder(907), "907"))
assert sdss_id_folder(114_986_844) == "68/44" and sdss_id_folder(907) == "09/07"

# %% [markdown]
# ## Inside
# A star seen by BOSS alone has an optical spectrum and no other: that deserves a sentence. A star seen from both observatories has two APOGEE spectra, which we combine.

# %%
#| exporti
_NAME = re.compile(r"mwm(?P<kind>Star|Visit)-(?P<version>[^-]+)-(?P<sdss_id>\d+)\.fits(\.gz)?")
_VERSION = "0.6."  # of astra, whose files these functions know
_NEEDED = ("flux", "ivar")


def mwm_kind(path) -> str | None:
    "`mwmstar` or `mwmvisit`, from a file's name or its extensions; None for another file."
    match = _NAME.fullmatch(Path(path).name)
    if match:
        return f"mwm{match['kind'].lower()}"
    try:
        with checked_hdus(path) as (hdus, _):
            tables = [hdu for hdu in hdus[1:] if hdu.name.upper().startswith(("APOGEE/", "BOSS/"))]
            if not tables:
                return None
            visit = any("mjd" in map(str.lower, hdu.columns.names) for hdu in tables)
            return "mwmvisit" if visit else "mwmstar"
    except Exception:  # whatever a damaged file makes astropy raise
        return None


def _tables(hdus):
    "Observatory -> its APOGEE table with rows, and its header; what else the file holds."
    found = {}
    others = []
    for hdu in hdus[1:]:
        instrument, _, observatory = hdu.name.upper().partition("/")
        rows = 0 if hdu.is_image else hdu.header["NAXIS2"]
        if instrument == "APOGEE" and rows:
            found[observatory.lower()] = (Table(hdu.data), hdu.header)
        elif rows:
            others.append(hdu.name)
    return found, others


def _version_notes(path, primary):
    "A sentence about a file that another version of astra wrote, in a list."
    match = _NAME.fullmatch(Path(path).name)
    version = str(primary.get("V_ASTRA", match["version"] if match else _VERSION))
    if version.startswith(_VERSION):
        return []
    return [
        f"written by astra {version}, not {_VERSION}x: its columns are read as if nothing changed"
    ]


# %%
for name in ("mwmStar-0.6.0-114986844.fits", "mwmVisit-0.6.0-7.fits.gz", "apStar-r8-2M01.fits"):
    print(f"{name}: {mwm_kind(name)}")
print(*_version_notes("mwmStar-0.7.0-7.fits", {}))
assert not _version_notes("mwmStar-0.6.0-7.fits", {})


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
    if len(grid) != N_PIXELS or not np.allclose(grid, full_wavelength, rtol=1e-6):
        raise LabError(f"{path}: another wavelength grid than the survey's {N_PIXELS} pixels")


def _facts(columns, row, path, observatory, primary):
    "What a row, and the file's first header, say of a star, in the names of our tables."

    def value(name, missing):
        found = columns[name][row] if name in columns else missing
        return found.strip() if isinstance(found, str) else found

    telescope = str(value("telescope", "")) or {"apo": "apo25m", "lco": "lco25m"}[observatory]
    sdss_id = int(value("sdss_id", primary.get("SDSS_ID", -1)))
    match = _NAME.fullmatch(Path(path).name)
    if match and sdss_id not in (-1, int(match["sdss_id"])):
        raise LabError(
            f"{Path(path).name} holds another star: its table says {sdss_id}, its name "
            f"{match['sdss_id']}"
        )
    name = str(value("obj", "")) or str(sdss_id)
    facts = {"APOGEE_ID": name, "SDSS_ID": sdss_id, "TELESCOPE": telescope, "FIELD": ""}
    facts |= {"LOCATION_ID": -1, "SNR": star_fact("SNR", value("snr", None))}
    facts |= {"NVISITS": star_fact("NVISITS", value("n_visits", None))}
    facts |= {band: star_fact(band, primary.get(f"{band}_MAG")) for band in "JHK"}
    facts |= {name: star_fact(name, primary.get(name)) for name in ("RA", "DEC")}
    return facts | {"MJD": int(value("mjd", -1)), "FILE": Path(path).name}


# %%
row_of_one = {"obj": ["2M00000002+7417074"], "sdss_id": [114_986_844], "snr": [90.0]}
facts = _facts(row_of_one, 0, "mwmStar-0.6.0-114986844.fits", "apo", {"RA": 0.01, "J_MAG": 11})
assert (facts["TELESCOPE"], facts["J"], facts["MJD"]) == ("apo25m", 11, -1)
facts


# %%
#| export
def _spectra_of(columns, header, path, observatory, primary):
    "`Spectra` of all rows of one observatory's table."
    _check_columns(columns, header, path)
    flux = np.atleast_2d(np.asarray(columns["flux"], float))[:, on_band]
    ivar = np.atleast_2d(np.asarray(columns["ivar"], float))[:, on_band]
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(ivar > 0, 1 / np.sqrt(ivar), 0)
    ivar = inverse_variance(flux, error, PRODUCTS["apstar"])
    mask = np.zeros(flux.shape, np.int32)
    if "pixel_flags" in columns:
        flags = np.atleast_2d(np.asarray(columns["pixel_flags"], float))[:, on_band]
        mask = np.nan_to_num(flags, nan=1).astype(np.int64).astype(np.int32)  # 1: a bad pixel
    facts = [_facts(columns, row, path, observatory, primary) for row in range(len(flux))]
    rules = PRODUCTS["apstar"]
    strange = [strange_pixels(*star, rules.max_flux) for star in zip(flux, ivar)]
    ivar = np.where(strange, np.float32(0), ivar)
    flux = np.where(strange, 0, flux)
    for fact, pixels in zip(facts, strange):
        fact["STRANGE_PIXELS"] = int(pixels.sum())
    stars = Table({name: [fact[name] for fact in facts] for name in facts[0]})
    stars.meta = {"product": "apstar", "normalized": False, "row": None, "level": 1.0}
    stars.meta["notes"] = _version_notes(path, primary)
    flux = np.nan_to_num(flux, nan=0, posinf=0, neginf=0).astype(np.float32)
    return Spectra(wavelength, flux, ivar, stars, mask)


# %%
table = {name: np.ones((2, N_PIXELS)) for name in ("flux", "ivar")}
table |= {"pixel_flags": np.zeros((2, N_PIXELS)), "wavelength": full_wavelength, "sdss_id": [7, 7]}
header = fits.Header()
visits = _spectra_of(table, header, "mwmVisit-0.6.0-7.fits", "lco", {})
print(visits, visits.stars["TELESCOPE"][0])
with pytest.raises(LabError, match="no column ivar") as refusal:
    _check_columns({"flux": table["flux"]}, header, "mwmStar-0.6.0-7.fits")
print(refusal.value)


# %%
#| export
def _read_tables(hdus, path, observatory):
    "`Spectra` of a file's HDUs."
    found, others = _tables(hdus)
    primary = hdus[0].header
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
    parts = [_spectra_of(_lower(t), h, path, name, primary) for name, (t, h) in chosen.items()]
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


# %%
print(_stacked([visits, visits]))
for extension, rows in (("BOSS/APO", 1), ("APOGEE/APO", 0)):
    hdu = fits.BinTableHDU(Table({"snr": np.ones(rows)}), name=extension)
    with pytest.raises(LabError) as refusal:
        _read_tables([fits.PrimaryHDU(), hdu], "mwmStar-0.6.0-7.fits", None)
    print(refusal.value)


# %%
#| export
def read_mwm(path, observatory: str = None) -> Spectra:
    """APOGEE spectra of an mwmStar or mwmVisit file, by columns.

    Parameters
    ----------
    path : str or Path
    observatory : {"apo", "lco"}, optional
        whose spectrum of a star seen from both; by default the two, which the survey keeps apart,
        are combined (mwmStar), or all visits are taken (mwmVisit)

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
    with checked_hdus(path, "mwmStar or mwmVisit files") as (hdus, verified):
        spectra = _read_tables(hdus, path, observatory)
    spectra.stars["VERIFIED"] = verified
    return spectra


# %% [markdown]
# ## A file to write
# To read such files we must have some. The writer goes by the pages above, column by column: names, order and types. Two columns hold the date of writing, `created` and `modified`;
# here they are empty, so that the same spectra give the same bytes.

# %%
#| export
# name and type of each column: K, J whole numbers, E real ones, A text, P a number for each pixel
_BEFORE = "spectrum_pk:K release:A filetype:A v_astra:A healpix:J sdss_id:K"
_DOPPLER = " ".join(
    f"doppler_{name}:E" for name in "teff e_teff logg e_logg fe_h e_fe_h rchi2".split()
)
_XCORR = "xcorr_v_rad:E xcorr_v_rel:E xcorr_e_v_rel:E ccfwhm:E autofwhm:E n_components:J"
_DATES = "created:A26 modified:A26"
_COLUMNS = {
    ("APOGEE", "star"): f"""{_BEFORE} apred:A obj:A telescope:A min_mjd:J max_mjd:J n_entries:J
        n_visits:J n_good_visits:J n_good_rvs:J snr:E mean_fiber:E std_fiber:E spectrum_flags:J
        v_rad:E e_v_rad:E std_v_rad:E median_e_v_rad:E {_DOPPLER} doppler_flags:J {_XCORR}
        wavelength:P flux:P ivar:P pixel_flags:P
        continuum:P nmf_rectified_model_flux:P nmf_rchi2:E nmf_flags:J {_DATES}""",
    ("APOGEE", "visit"): f"""spectrum_pk:K catalogid:K star_pk:K visit_pk:K rv_visit_pk:K
        release:A filetype:A v_astra:A healpix:J sdss_id:K apred:A plate:A telescope:A fiber:J
        mjd:J field:A prefix:A reduction:A obj:A date_obs:A jd:E exptime:E dithered:L
        f_night_time:E input_ra:E input_dec:E n_frames:J assigned:J on_target:J valid:J fps:L
        snr:E in_stack:L spectrum_flags:J v_rad:E v_rel:E e_v_rel:E bc:E {_DOPPLER}
        doppler_flags:J {_XCORR} flux:P ivar:P pixel_flags:P continuum:P nmf_rchi2:E nmf_flags:J
        {_DATES}""",
    ("BOSS", "star"): f"""{_BEFORE} run2d:A telescope:A min_mjd:J max_mjd:J n_visits:J
        n_good_visits:J n_good_rvs:J v_rad:E e_v_rad:E std_v_rad:E median_e_v_rad:E snr:E
        gri_gaia_transform_flags:J zwarning_flags:J wavelength:P flux:P ivar:P pixel_flags:P
        continuum:P nmf_rectified_model_flux:P nmf_rchi2:E nmf_flags:J {_DATES}""",
    ("BOSS", "visit"): f"""spectrum_pk:K release:A filetype:A v_astra:A healpix:J sdss_id:K
        run2d:A mjd:J fieldid:J catalogid:K n_exp:J exptime:E telescope:A snr:E in_stack:L
        flux:P ivar:P wresl:P pixel_flags:P continuum:P nmf_rchi2:E nmf_flags:J {_DATES}""",
}
# what astra writes for nothing
_MISSING = {"A26": "", "A": "", "K": -1, "J": -1, "E": np.nan, "L": False}
_WHEN = "astra's, as far as it can be told"  # in place of the date of a checksum
_GRIDS = {"APOGEE": (LOG10_START, LOG10_STEP, N_PIXELS), "BOSS": (3.5523, 1e-4, 4648)}

# %%
for which, columns in _COLUMNS.items():
    names = [entry.split(":")[0] for entry in columns.split()]
    print(*which, f"{len(names)} columns:", *names[:5], "…")


# %% [markdown]
# Where nothing was observed the table has all its columns and no rows; a column of pixels then has the length 0.

# %%
#| export
def _made_column(name, kind, rows):
    "A column of rows (dicts), with astra's type."
    values = [row.get(name, 0 if name.endswith("_flags") else _MISSING.get(kind)) for row in rows]
    if kind == "P":
        size = len(values[0]) if rows else 0
        array = np.array(values, "f4") if rows else None
        return fits.Column(name, f"{size}E", dim=f"({size})", array=array)
    if kind == "A":
        kind = f"{max([1, *map(len, values)])}A"
    return fits.Column(name, kind, array=np.array(values) if rows else None)


def _made_hdu(instrument, kind, observatory, rows):
    "One extension: a table with astra's columns and the cards of its header."
    columns = [
        _made_column(*entry.split(":"), rows) for entry in _COLUMNS[instrument, kind].split()
    ]
    start, step, pixels = _GRIDS[instrument]
    hdu = fits.BinTableHDU.from_columns(columns, nrows=len(rows))
    hdu.header.update(
        {
            "EXTNAME": f"{instrument}/{observatory}",
            "OBSRVTRY": observatory,
            "INSTRMNT": instrument,
            "V_ASTRA": "0.6.0",
            "CRVAL": start,
            "CDELT": step,
            "CTYPE": "LOG-LINEAR",
            "CUNIT": "Angstrom (Vacuum)",
            "CRPIX": 1,
            "DC-FLAG": 1,
            "NPIXELS": pixels,
        }
    )
    hdu.add_checksum(when=_WHEN)
    return hdu


@cache
def _empty_hdu(*which):
    "An extension without rows: it is always the same."
    return _made_hdu(*which, [])


def _extension(*which):
    "One extension, a copy of the empty one where there are no rows."
    return _made_hdu(*which) if which[-1] else _empty_hdu(*which[:-1]).copy()


# %%
nothing = _extension("APOGEE", "star", "LCO", [])
print(f"{nothing.name}: {len(nothing.columns)} columns, {len(nothing.data)} rows")
assert len(nothing.data) == 0 and nothing.columns["flux"].format == "0E"


# %%
#| export
def _apogee_rows(spectra, sdss_id, observatory, kind):
    "Rows of an APOGEE extension from spectra on the survey's pixels; none of None."
    if spectra is None:
        return []
    mask = np.zeros(spectra.flux.shape) if spectra.mask is None else spectra.mask
    rows = []
    for n, star in enumerate(spectra.stars):
        pixels = {}
        for name, values in (("flux", spectra.flux), ("ivar", spectra.ivar), ("pixel_flags", mask)):
            pixels[name] = np.zeros(N_PIXELS)
            pixels[name][on_band] = values[n]
        good = spectra.ivar[n] > 0
        ratio = spectra.flux[n][good] * np.sqrt(spectra.ivar[n][good])
        facts = {"sdss_id": sdss_id, "obj": str(star["APOGEE_ID"]), "release": "sdss5"}
        facts |= {"telescope": f"{observatory.lower()}25m", "v_astra": "0.6.0", "apred": "1.3"}
        facts |= {"snr": float(np.median(ratio)) if len(ratio) else 0.0, "v_rad": 0.0}
        if kind == "star":
            visits = int(star["NVISITS"]) if "NVISITS" in spectra.stars.colnames else 3
            facts |= {"filetype": "mwmStar", "n_visits": visits, "wavelength": full_wavelength}
        else:
            facts |= {"filetype": "mwmVisit", "mjd": 59_800 + n, "in_stack": True}
        empty = np.full(N_PIXELS, np.nan)
        rows.append(facts | pixels | {"continuum": empty, "nmf_rectified_model_flux": empty})
    return rows


# %%
#| exporti
def made_mwm(
    apo: Spectra = None, lco: Spectra = None, sdss_id=42, boss=False, visits=False
) -> fits.HDUList:
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
    kind = "visit" if visits else "star"
    primary = fits.PrimaryHDU(header=fits.Header({"V_ASTRA": "0.6.0", "SDSS_ID": int(sdss_id)}))
    seen = apo if apo is not None else lco
    if seen is not None:
        primary.header["APOGEEID"] = str(seen.stars["APOGEE_ID"][0])
        cards = {"RA": "RA", "DEC": "DEC"} | {band: f"{band}_MAG" for band in "JHK"}
        for column, key in cards.items():
            if column in seen.stars.colnames and np.isfinite(seen.stars[column][0]):
                primary.header[key] = float(seen.stars[column][0])
    optical = dict.fromkeys(("flux", "ivar", "pixel_flags", "continuum"), np.ones(4648))
    optical |= {"wresl": np.ones(4648), "nmf_rectified_model_flux": np.ones(4648)}
    optical |= {"wavelength": 10 ** (3.5523 + 1e-4 * np.arange(4648)), "sdss_id": sdss_id}
    hdus = [primary]
    for observatory, rows in (("APO", [optical] if boss else []), ("LCO", [])):
        hdus.append(_extension("BOSS", kind, observatory, rows))
    for observatory, spectra in (("APO", apo), ("LCO", lco)):
        rows = _apogee_rows(spectra, sdss_id, observatory, kind)
        hdus.append(_extension("APOGEE", kind, observatory, rows))
    made = fits.HDUList(hdus)
    made.update_extend()  # a card of the first header: before its checksum
    primary.add_checksum(when=_WHEN)  # the loaders of specutils ask for it
    return made


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
    print([(hdu.name, hdu.header["NAXIS2"]) for hdu in hdus[1:]])
    print(*hdus["APOGEE/APO"].columns.names[:12], "…")
    by_hand = hdus["APOGEE/APO"].data
    assert (
        by_hand["flux"].shape == (1, 8575)
        and by_hand["flux"][0, on_band[100]] == spectra.flux[3, 100]
    )
    assert np.isclose(by_hand["wavelength"][0, 322], wavelength[0])
    assert all(hdu.verify_checksum() and hdu.verify_datasum() for hdu in hdus)

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
    made.writeto(here / "mwmStar-0.9.0-1.fits", overwrite=True, checksum=True)
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
newer = made_mwm(spectra[[3]])
newer[0].header["V_ASTRA"] = "0.9.0"
newer.writeto(here / "mwmStar-0.9.0-42.fits", checksum=True)
print(*read_mwm(here / "mwmStar-0.9.0-42.fits").stars.meta["notes"])
made_mwm(spectra[[3, 3, 3]], visits=True).writeto(here / "mwmVisit-0.6.0-42.fits")
visits = read_mwm(here / "mwmVisit-0.6.0-42.fits")
assert len(visits) == 3 and mwm_kind(here / "mwmVisit-0.6.0-42.fits") == "mwmvisit"
visits.stars["SNR"].info.format = ".1f"
visits.stars["APOGEE_ID", "SDSS_ID", "MJD", "SNR"]

# %% [markdown]
# ## The catalogue
# `astraAllStarASPCAP` calls its columns by lower-case names, its errors `e_teff`, and gives elements relative to hydrogen: [Mg/Fe] is [Mg/H] - [Fe/H], and its error the
# root of two squares. `flag_bad` and `flag_warn` are the survey's own doubts.
#
# The real table has over a million rows of hundreds of columns, and is packed. So it is unpacked piece by piece, and of each piece only the columns that we need are kept.

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


_READ_AT_ONCE = 1 << 24  # bytes


def _table_columns(path, number):
    "Type of a row, place of the first one, and how many there are, of the table in an HDU."
    try:
        with fits.open(path, lazy_load_hdus=True) as hdus:
            hdu = hdus[number]
            if not isinstance(hdu, fits.BinTableHDU):
                raise TypeError("no table")
            return (
                hdu.columns.dtype.newbyteorder(">"),
                hdu.fileinfo()["datLoc"],
                hdu.header["NAXIS2"],
            )
    except (OSError, EOFError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise LabError(
            f"{path} has no table in HDU {number} ({error}): is it astraAllStarASPCAP?"
        ) from error


def _copied(path, names, row_type, start, rows):
    "Some columns of a table, packed or not, in the machine's own byte order; read in pieces."
    found = {name: [] for name in names}
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rb") as file:
        file.seek(start)
        left = rows
        while left:
            number = max(1, min(left, _READ_AT_ONCE // row_type.itemsize))
            block = file.read(number * row_type.itemsize)
            if len(block) < number * row_type.itemsize:
                raise LabError(f"{path} is cut short: fetch it again")
            piece = np.frombuffer(block, row_type)
            for name in names:
                found[name].append(piece[name].astype(piece[name].dtype.newbyteorder("=")))
            left -= number
    return {name: np.concatenate(parts) if parts else np.array([]) for name, parts in found.items()}


def _numbers(values, name):
    "A column as float64, NaN where nothing, or nothing that could be, stands."
    values = np.asarray(values, float)
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values) < 9_000 if name != "teff" else values > 0, values, np.nan)


def _is_true(values):
    "A column of FITS's logical values, letters T and F, as bool."
    return values == ord("T") if values.dtype.kind in "iu" else values.astype(bool)


# %%
small = here / "small.fits"
fits.HDUList(
    [fits.PrimaryHDU(), fits.table_to_hdu(Table({"sdss_id": [7, 8], "teff": [4500.0, -1.0]}))]
).writeto(small)
row_type, start, rows = _table_columns(small, 1)
print(row_type.names, "from byte", start, "on,", rows, "rows")
found = _copied(small, ["teff"], row_type, start, rows)
print(found, "->", _numbers(found["teff"], "teff"))

# %%
#| export
_ASTRA_FACTS = {  # column -> what we call it
    "sdss_id": "SDSS_ID",
    "sdss4_apogee_id": "APOGEE_ID",
    "telescope": "TELESCOPE",
    "snr": "SNR",
    "flag_bad": "FLAG_BAD",
    "flag_warn": "FLAG_WARN",
}


def _fact(values, name):
    "A column that is no label."
    if name.startswith("FLAG"):
        return _is_true(values)
    if values.dtype.kind == "S":
        return np.char.strip(np.char.decode(values, "ascii", "replace"))
    return values


def _label_of(table, column, less):
    "Value and error of a label, which may be the difference of two columns."
    value = _numbers(table[column], column) - (_numbers(table[less], less) if less else 0)
    errors = [_numbers(table[f"e_{name}"], name) for name in (column, less) if f"e_{name}" in table]
    if not errors:
        return value, np.full(len(value), np.nan)
    return value, np.sqrt(sum(error**2 for error in errors))


# %%
columns = {"mg_h": [0.3], "fe_h": [0.1], "e_mg_h": [0.03], "e_fe_h": [0.04]}
columns = {name: np.array(values) for name, values in columns.items()}
value, error = _label_of(columns, "mg_h", "fe_h")
print(f"[Mg/Fe] = {value[0]:.2f} ± {error[0]:.2f}")
assert np.isclose(error[0], 0.05)


# %%
#| export
def read_astra(path, labels=None, hdu: int = 2) -> Table:
    """Labels of the catalogue `astraAllStarASPCAP`, in the names of this book.

    Parameters
    ----------
    path : str or Path
        packed (.gz) or not
    labels : sequence of str, optional
        which; all that the table has by default
    hdu : int, default 2
        APOGEE's extension

    Returns
    -------
    Table
        SDSS_ID, APOGEE_ID, TELESCOPE, SNR, labels and `_ERR` columns, FLAG_BAD and FLAG_WARN; one
        row per spectrum, so maybe several per star

    Raises
    ------
    LabError
        where a label or the table is missing
    """
    row_type, start, rows = _table_columns(path, hdu)
    there = set(row_type.names or ())
    known = {n: v for n, v in _ASTRA_COLUMNS.items() if {v[0], v[1] or v[0]} <= there}
    names = list(known) if labels is None else [label.name for label in label_records(labels)]
    missing = [name for name in names if name not in known]
    if missing or not names or "sdss_id" not in there:
        lacks = ", ".join(missing) or "sdss_id, or any label"
        raise LabError(f"{path} has no {lacks}: it has {', '.join(row_type.names[:12])}, …")
    wanted = {column for name in names for column in known[name] if column}
    wanted |= {f"e_{column}" for column in wanted} | set(_ASTRA_FACTS)
    try:
        table = _copied(path, sorted(wanted & there), row_type, start, rows)
    except (OSError, EOFError) as error:
        raise LabError(f"{path} cannot be read: {error}; is it cut short?") from error
    found = Table({"SDSS_ID": np.asarray(table["sdss_id"], np.int64)})
    for column, name in _ASTRA_FACTS.items():
        if column in table and column != "sdss_id":
            found[name] = _fact(table[column], name)
    for name in names:
        found[name], found[f"{name}_ERR"] = _label_of(table, *known[name])
        found[name].unit = found[f"{name}_ERR"].unit = LABELS[name].unit
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
made.writeto(here / "astraAllStarASPCAP-0.6.0.fits.gz")
catalogue = read_astra(here / "astraAllStarASPCAP-0.6.0.fits.gz")
assert np.allclose(catalogue["MG_FE"], 0.25) and np.allclose(
    catalogue["MG_FE_ERR"], 0.03 * np.sqrt(2)
)
with pytest.raises(LabError, match="has no SI_FE"):
    read_astra(here / "astraAllStarASPCAP-0.6.0.fits.gz", ["teff", "si_fe"])
for name in catalogue.meta["labels"]:
    catalogue[name].info.format = catalogue[f"{name}_ERR"].info.format = ".5g"
catalogue["SDSS_ID", "FLAG_BAD", "TEFF", "TEFF_ERR", "MG_FE", "MG_FE_ERR"][:3]


# %% [markdown]
# ## Learning from it
# Files and catalogue meet by `sdss_id`. A star that was seen from both observatories has two rows of labels, and one file: the row of the better spectrum counts. What comes
# out is what every model learns from, with [a ledger](02_clean.ipynb) of the stars that fell.

# %%
#| export
def _row_of_star(catalogue):
    "sdss_id -> the row of the catalogue that counts, and how many rows it has: two dicts."
    snr = catalogue["SNR"] if "SNR" in catalogue.colnames else np.zeros(len(catalogue))
    order = np.argsort(np.nan_to_num(np.asarray(snr, float), nan=-1), kind="stable")
    ids = np.asarray(catalogue["SDSS_ID"])
    place = {int(ids[row]): int(row) for row in order}
    return place, dict(zip(*np.unique(ids, return_counts=True)))


def _read_each(paths, place):
    "Spectra of files and their rows in the catalogue; names left out by rule, and why some are."
    parts, rows = [], []
    left_out = {"no spectrum of APOGEE": [], "no row in the catalogue": []}
    reasons = []
    for path in paths:
        match = _NAME.fullmatch(path.name)
        name = match["sdss_id"] if match else path.name
        try:
            star = read_mwm(path)
        except LabError as error:
            left_out["no spectrum of APOGEE"].append(name)
            reasons.append(str(error))
            continue
        row = place.get(int(star.stars["SDSS_ID"][0]))
        if row is None:
            left_out["no row in the catalogue"].append(name)
            continue
        parts.append(star)
        rows.append(row)
    return parts, rows, left_out, reasons


# %%
wanted = np.array([5, 6, 5])
place, times = _row_of_star(Table({"SDSS_ID": wanted, "SNR": [50.0, 80.0, 70.0]}))
for star, row in place.items():
    print(f"sdss_id {star}: row {row} counts, of {times[star]}")
assert place == {5: 2, 6: 1}


# %%
#| exporti
def mwm_stars(paths, catalogue: Table) -> tuple:
    """Spectra of mwmStar files with the catalogue's labels, and what became of the others.

    Parameters
    ----------
    paths : sequence of str or Path
        mwmStar files
    catalogue : Table
        of `read_astra`

    Returns
    -------
    tuple
        `Spectra`, raw, with labels; and the `Ledger` of the files that were left out

    Raises
    ------
    LabError
        where no star is left
    """
    paths = [Path(path) for path in paths]
    place, times = _row_of_star(catalogue)
    parts, rows, left_out, reasons = _read_each(paths, place)
    if not parts:
        first = (reasons or ["none of them is in the catalogue"])[0]
        raise LabError(f"no star is left of {len(paths)} files: {first}")
    ledger = Ledger(len(paths))
    for rule, names in left_out.items():
        ledger = ledger.drop(rule, names, "", reasons if "APOGEE" in rule else ())
    further = sum(times[catalogue["SDSS_ID"][row]] - 1 for row in rows)
    ledger = ledger.count("duplicate rows resolved", further, "the row with the highest SNR counts")
    return _with_rows(_stacked(parts), catalogue, rows), ledger


def _with_rows(spectra, catalogue, rows):
    "The spectra with labels and flags of their rows of the catalogue."
    for name in filter(LABELS.__contains__, catalogue.colnames):
        for column in (name, f"{name}_ERR"):
            spectra.stars[column] = catalogue[column][rows]
    for name in ("FLAG_BAD", "FLAG_WARN"):
        flags = catalogue[name][rows] if name in catalogue.colnames else np.zeros(len(rows))
        spectra.stars[name] = np.asarray(flags, np.int16)
    spectra.stars.meta["labels"] = list(catalogue.meta["labels"])
    return spectra


# %%
chosen = np.arange(0, len(spectra), 18)
paths = []
for row in chosen:
    paths.append(here / f"mwmStar-0.6.0-{1000 + row}.fits")
    made_mwm(spectra[[row]], sdss_id=1000 + row).writeto(paths[-1], overwrite=True)
made_mwm(boss=True, sdss_id=7).writeto(here / "mwmStar-0.6.0-7.fits")
stars, ledger = mwm_stars([*paths, here / "mwmStar-0.6.0-7.fits"], catalogue)
print(stars)
assert len(stars) == len(chosen) == ledger.left
ledger


# %% [markdown]
# A whole tree at once: its files, its catalogue, the cuts of its record (bad labels are among them) and the treatment of any raw spectrum. `stellar-lab train FOLDER` does this
# where FOLDER holds SDSS-V. The catalogue's checksum goes into the model, for the content of `astraAllStarASPCAP-0.6.0` is known to have changed once under one version.

# %%
#| exporti
def mwm_training_set(
    root,
    labels=None,
    continuum_pixels: np.ndarray = None,
    progress: bool = True,
    dark=0.05,
    mask: str = None,
    gaps: bool = False,
) -> tuple:
    """Normalized spectra of SDSS-V's stars to learn from, and the account of those that fell.

    Parameters
    ----------
    root : str or Path
        of a tree of SDSS-V's release: mwmStar files and astraAllStarASPCAP
    labels : sequence of str, optional
        labels that a star must have; the archive's by default
    continuum_pixels : (P,) bool array, optional
        the 529 of the original lab by default
    progress : bool, default True
        unused: for the same calls as `normalize.training_set`
    dark : float, default 0.05
        `fraction` of `dark_pixels`; 0 keeps all pixels
    mask : str, optional
        rule for flagged pixels, as for `MaskRule.parse`; by default every flag kills
    gaps : bool, default False
        keep stars that lack some of the labels

    Returns
    -------
    tuple
        `Spectra` of the stars that pass all cuts, and their `Ledger`

    Raises
    ------
    LabError
        where there is no star's file or catalogue, or no star is left
    """
    record = archive_record(root)
    files = find_files(root, "mwmstar", "all")
    if not len(files):
        where = record.rules.folder("mwmstar", "AB/CD")
        raise LabError(f"no star's file below {root}: looked for {where}; fetch them by sdss_id")
    table = find_catalogue(root)
    wanted = record.labels if labels is None else labels
    names = [label.name for label in label_records(wanted)]
    for_cuts = [cut.column for cut in record.cuts if cut.column in LABELS]
    catalogue = read_astra(table, dict.fromkeys([*names, *for_cuts]))
    catalogue.meta["labels"] = names
    spectra, ledger = mwm_stars(list(files["path"]), catalogue)
    known = {"release": record.release, "archive": record.name, "dark": float(dark or 0)}
    spectra.stars.meta |= known | {"catalogue_sha256": sha256_of(table)}
    if dark:
        spectra.ivar[dark_pixels(spectra.flux, spectra.ivar, dark)] = 0
    spectra = weigh_by(spectra, mask)
    spectra, ledger = apply_cuts(spectra, ledger=ledger, gaps=gaps)
    spectra = normalize(spectra, continuum_pixels=continuum_pixels)
    return drop_masked(spectra, ledger=ledger)


# %%
tree = here / "tree"
for path in paths:
    sdss_id = path.stem.split("-")[-1]
    place = tree / dr19.path("mwmstar", sdss_id_folder(sdss_id), sdss_id)
    place.parent.mkdir(parents=True, exist_ok=True)
    path.rename(place)
(tree / dr19.allstar).parent.mkdir(parents=True)
(here / "astraAllStarASPCAP-0.6.0.fits.gz").rename(tree / dr19.allstar)
learn, ledger = mwm_training_set(tree, ["TEFF", "LOGG", "M_H"])
assert archive_record(tree).name == "milkyway" and not (tree / ARCHIVE_FILE).exists()
ledger

# %% [markdown]
# A model learns from these files, and labels them as it would label the survey's older ones.

# %%
model = Cannon(order=1, scatter=True).fit(learn)
file = find_files(tree, "mwmstar")["path"][5]
found = infer(model, as_trained(model, read_mwm(file)))
known = catalogue["TEFF"][catalogue["SDSS_ID"] == int(Path(file).stem.split("-")[-1])][0]
print(f"Teff {found['teff'][0]:.0f}, catalogue {known:.0f} K")
print("learned from the catalogue", model.metadata_["catalogue_sha256"][:16], "…")
assert abs(found["teff"][0].value - known) < 400

# %% [markdown]
# Release notes, as far as they matter here. `flag_bad` rows are cut, `flag_warn` rows stay. mwmStar's spectrum of APOGEE is the combination of the apStar file, which the
# survey's pipeline worked on. And ASPCAP's numbers in DR19 are calibrated: the uncalibrated ones have the prefix `raw_`.
#
# **Exercise.** Write a star that both observatories have seen, with different noise, and compare the labels of each with those of the combination.

# %%
#| hide
scratch.cleanup()
