# %% [markdown]
# # Where do the stars come from?
# > Real spectra that fit into a repository, and a writer that gives them back the survey's own files, flaws included.

# %%
#| default_exp archives

# %%
#| export
import csv
import hashlib
import json
import os
import tarfile
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import QTable, Table
from numpy.polynomial.legendre import legval
from scipy import constants
from scipy.ndimage import binary_opening
from tqdm.auto import tqdm

from stellar_lab.survey import (
    ARCHIVE_FILE, ARCHIVES, CHIPS, LABELS, LOG10_START, LOG10_STEP, N_PIXELS, PIXMASK, LabError, Spectra, atomic_path, on_band, wavelength,
)

# %%
#| export
PACKED_STARS = "clusters_dr10.fits"   # in stellar_lab.data, beside clusters.ecsv and continuum_pixels.npy
TARBALL_SHA256 = "4c65eb239868b90f944d4fe268d8f839f0e6926e8cb862e6c6a6867281fd9d58"   # TheCannon-0.3.5.tar.gz
EXAMPLE = "TheCannon-0.3.5/TheCannon/example_DR10"                                     # the folder in it that we take
EXAMPLE_DIGEST = "68fe3779aa948dba0dceb76009340ce47a8a4793db59ea15297a494a5af59494"   # its 553 spectra and their label table
FLUX_STEP, LOG_ERROR_STEP, NO_ERROR = 1e-4, 5e-4, -32768   # NO_ERROR stands where the survey wrote an error of zero
MAX_ERROR = 0.3                                            # a pixel with a larger error is unusable
# 1-sigma floors: the covariance of the survey's fit is formal, far below what clusters show
ERROR_FLOORS = {"TEFF": 50.0, "LOGG": 0.1, "M_H": 0.05, "ALPHA_M": 0.04, "C_M": 0.07, "N_M": 0.07}

# %%
#| export
def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digest(
    root,               # a folder
) -> str:               # sha256 over names and contents of all files below it, hidden ones left out
    "One checksum for a whole folder."
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(root).rglob("*") if path.is_file()):
        name = file.relative_to(root).as_posix()
        if not any(part.startswith(".") for part in name.split("/")):
            digest.update(f"{name} {_sha256(file)}\n".encode())
    return digest.hexdigest()

# %%
#| export
def _example_folder(source, scratch):
    "The unpacked folder of the example, checked; `scratch` is where a tarball may be unpacked."
    source = Path(source)
    if source.is_file():
        if _sha256(source) != TARBALL_SHA256:
            raise LabError(f"{source} is not TheCannon-0.3.5.tar.gz as we know it (sha256 {TARBALL_SHA256}): download it again")
        with tarfile.open(source) as tar:
            tar.extractall(scratch, [member for member in tar if member.name.startswith(EXAMPLE)], filter="data")
        source = Path(scratch) / EXAMPLE
    if not (source / "reference_labels.csv").is_file():
        raise LabError(f"{source} holds no reference_labels.csv: name the tarball TheCannon-0.3.5.tar.gz or its folder example_DR10")
    if _example_digest(source) != EXAMPLE_DIGEST:
        raise LabError(f"the files in {source} are not those of TheCannon 0.3.5: unpack the tarball again")
    return source


def _example_digest(folder):
    digest = hashlib.sha256()
    for file in [*sorted((folder / "Data").glob("*.fits")), folder / "reference_labels.csv"]:
        digest.update(f"{file.name} {_sha256(file)}\n".encode())
    return digest.hexdigest()

# %%
#| export
CSV_LABELS = {"TEFF": "Teff_{corr}", "LOGG": "logg_{corr}", "M_H": "[M/H]_{corr}", "ALPHA_M": "[a/M]", "C_M": "[C/M]", "N_M": "[N/M]",
              "TEFF_RAW": "Teff", "LOGG_RAW": "logg", "M_H_RAW": "[M/H]"}
CSV_ERRORS = {"TEFF": "e_Teff_corr", "M_H": "e_[MH]+corr"}
FPARAM = {"TEFF": 0, "LOGG": 1, "M_H": 3, "C_M": 4, "N_M": 5, "ALPHA_M": 6}   # places in the survey's parameter vector
FACTS = {"FIELD": "FIELD", "LOCATION_ID": "LOC", "RA": "RA", "DEC": "DEC", "GLON": "GLON", "GLAT": "GLAT", "J": "J", "H": "H", "K": "K",
         "SNR": "SNR", "NVISITS": "NVISITS", "VHELIO": "VHELIO", "VSCATTER": "VSCATTER", "VERR": "VERR", "STARFLAG": "STARFLAG",
         "ANDFLAG": "ANDFLAG", "ASPCAPFLAG": "ASPCAPFLAG", "CHI2": "PARAM_CHI2", "TARG1": "TARG1", "TARG2": "TARG2"}   # ours -> HDU 4


def _catalogue_row(file, table, labels):
    "One star's row of the packed table, from its file's HDU 4 and its row of reference_labels.csv."
    row = {"APOGEE_ID": str(table["OBJ"]).strip(), "FILE": file.name}
    for name, column in FACTS.items():
        value = table[column]
        row[name] = value.strip() if isinstance(value, str) else value.item()
    row |= {name: float(labels[column]) for name, column in CSV_LABELS.items()}
    for name, place in FPARAM.items():
        given = float(labels[CSV_ERRORS[name]]) if name in CSV_ERRORS else 0.0
        row[f"{name}_ERR"] = given if given > 0 else max(float(table["FPARAM_COV"][place, place]) ** 0.5, ERROR_FLOORS[name])
    return row


def _encode(flux, error):
    "Flux and error as 16-bit steps; a pixel never changes between usable and unusable."
    flux, error = flux.astype(float), error.astype(float)
    steps = np.rint(flux / FLUX_STEP).astype("i2")
    with np.errstate(divide="ignore"):
        levels = np.where(error > 0, np.log(error) / LOG_ERROR_STEP, NO_ERROR)
    limit = int(np.floor(np.log(MAX_ERROR) / LOG_ERROR_STEP))
    levels = np.where(error < MAX_ERROR, np.minimum(np.rint(levels), limit), np.maximum(np.rint(levels), limit + 1)).astype("i2")
    return np.where(flux > 0, np.maximum(steps, 1), steps).astype("i2"), levels


def pack_real_stars(
    source,             # TheCannon-0.3.5.tar.gz, or the folder example_DR10 in it
    path,               # the FITS file to write
    progress: bool = True,
) -> str:               # its sha256
    "Pack the 553 spectra and their labels into one file; same source, same bytes. LabError if the source is not the one we know."
    with tempfile.TemporaryDirectory() as scratch:
        folder = _example_folder(source, scratch)
        with open(folder / "reference_labels.csv", newline="") as file:
            labels = {row["ID"]: row for row in csv.DictReader(file)}
        rows, steps, levels = [], [], []
        for file in tqdm(sorted((folder / "Data").glob("*.fits")), desc="packing", unit="star", disable=not progress):
            with fits.open(file) as hdus:
                rows.append(_catalogue_row(file, hdus[4].data[0], labels[file.name]))
                flux, error = _encode(hdus[1].data[on_band], hdus[2].data[on_band])
            steps.append(flux)
            levels.append(error)
    images = [fits.CompImageHDU(np.array(array), compression_type="RICE_1", name=name)
              for name, array in (("FLUX", steps), ("ERROR", levels))]
    images[0].header["STEP"] = (FLUX_STEP, "flux = STEP * value")
    images[1].header["STEP"] = (LOG_ERROR_STEP, f"error = exp(STEP * value); {NO_ERROR}: zero")
    table = fits.BinTableHDU(Table(rows=rows), name="STARS")
    with atomic_path(path) as temporary:
        fits.HDUList([fits.PrimaryHDU(), *images, table]).writeto(temporary)
    return _sha256(path)

# %%
#| export
def _data_file(name):
    "A file of the package's data folder, as a context manager that gives a path."
    file = files("stellar_lab.data") / name
    if not file.is_file():
        raise LabError(f"the installed package lacks its data file {name}: install stellar_lab again")
    return as_file(file)


def clusters() -> QTable:   # one row a cluster: CLUSTER, KIND, FIELDS, LOCATION_ID, FE_H, AGE, FE_H_SOURCE, AGE_SOURCE, NOTE
    "The star clusters of the real stars, with literature metallicities and ages; `FIELDS` holds the survey's names with blanks between."
    with _data_file("clusters.ecsv") as path:
        return QTable.read(path, format="ascii.ecsv")


def _unpack():
    "Flux (553, 7214), its error with 0 where the survey gave none, and the stars table."
    with _data_file(PACKED_STARS) as path, fits.open(path) as hdus:
        steps, levels = hdus["FLUX"].data, hdus["ERROR"].data
        stars = Table(hdus["STARS"].data)
    error = np.where(levels > NO_ERROR, np.exp(levels * LOG_ERROR_STEP), 0)
    stars["TELESCOPE"] = "apo25m"
    stars["CLUSTER"] = _cluster_of(stars["FIELD"])
    for name in LABELS:
        for column in {name, f"{name}_ERR", f"{name}_RAW"} & set(stars.colnames):
            stars[column].unit = LABELS[name].unit
    stars.meta = {"product": "aspcapstar", "release": "dr10", "archive": "clusters", "normalized": True}
    return (steps * FLUX_STEP).astype("f4"), error.astype("f4"), stars


def real_stars() -> Spectra:   # 553 stars, 7,214 pixels, sorted by the name of the survey's file
    "The embedded real spectra, pseudo-normalized as SDSS DR10 published them, with their labels."
    flux, error, stars = _unpack()
    good = (flux > 0) & (error > 0) & (error < MAX_ERROR)
    with np.errstate(divide="ignore"):
        return Spectra(wavelength, flux, np.where(good, 1 / error**2, 0).astype("f4"), stars)


def _cluster_of(fields):
    "The cluster that each field of the survey was pointed at."
    names = {field: row["CLUSTER"] for row in clusters() for field in str(row["FIELDS"]).split()}
    return [names[str(field).strip()] for field in fields]

# %% [markdown]
# WRITER

# %%
#| export
EDGE, RUN = 60, 5   # pixels from a chip's edge that count as its rim; neighbours in a row that make a sky line


def pixel_bits(
    flux: np.ndarray,    # (N, 7214) relative to the pseudo-continuum
    error: np.ndarray,   # (N, 7214) its 1-sigma error; 0.3 and more marks a bad pixel
) -> np.ndarray:         # (N, 7214) int16 APOGEE_PIXMASK bits, 0 on good pixels
    "Mask bits for pixels that a pseudo-normalized spectrum marks as bad only by a flux of zero or a huge error."
    empty = (flux <= 0) | (error <= 0)
    inflated = ~empty & (error >= MAX_ERROR)
    sky = binary_opening(inflated, np.ones((1, RUN), bool))
    rim = np.concatenate([np.minimum(np.arange(n), np.arange(n)[::-1]) < EDGE for n in _CHIP_SIZES])
    bits = empty * PIXMASK.BADPIX + inflated * PIXMASK.BADERR + sky * PIXMASK.SIG_SKYLINE
    return (bits + ((empty | inflated) & rim) * PIXMASK.NOT_ENOUGH_PSF).astype("i2")


_CHIP_SIZES = [last - first + 1 for first, last in CHIPS.values()]

# %%
#| export
H_ZERO = 1.133e7              # flux of a star with H = 0 [1e-17 erg/s/cm^2/Angstrom] (Cohen et al. 2003)
H_WAVELENGTH = 16_300.0       # where a star's black body has the flux of its H magnitude [Angstrom]
THROUGHPUT = ((1, 0, 0, 0, 0), (0.03, 0.04, 0.03, 0.004, 0.004))   # mean and spread of a chip's five Legendre coefficients


def black_body(wave, teff):
    "Planck's law in `wave` [Angstrom] for (N,) temperatures [K], relative to its value at `H_WAVELENGTH`: (N, P)."
    def planck(x):
        return x**-5 / np.expm1(constants.h * constants.c / (x * 1e-10 * constants.k * np.asarray(teff, float)[:, None]))
    return planck(np.asarray(wave)[None]) / planck(np.array([[H_WAVELENGTH]]))


def draw_throughput(
    seed: int,
    apogee_id: str,
) -> np.ndarray:        # (3, 5) Legendre coefficients, a row a chip
    "The instrument's response to one star; depends on seed and name only, so the order of stars does not matter."
    mean, spread = np.array(THROUGHPUT)
    return mean + spread * _star_rng(seed, apogee_id, "throughput").standard_normal((3, len(mean)))


def _star_rng(seed, apogee_id, purpose):
    return np.random.default_rng([seed, zlib.crc32(f"{purpose} {apogee_id}".encode())])


def continuum(
    teff: np.ndarray,         # (N,) [K]
    h_magnitude: np.ndarray,  # (N,) 2MASS H
    throughput: np.ndarray,   # (N, 3, 5) Legendre coefficients a star and chip
) -> np.ndarray:              # (N, 7214) [1e-17 erg/s/cm^2/Angstrom]
    "What the instrument would record of stars without lines: a black body through a smooth throughput per chip."
    shape = [legval(np.linspace(-1, 1, n), throughput[:, chip].T) for chip, n in enumerate(_CHIP_SIZES)]
    return H_ZERO * 10 ** (-0.4 * np.asarray(h_magnitude, float)[:, None]) * black_body(wavelength, teff) * np.concatenate(shape, axis=1)

# %%
#| export
COSMIC_RAYS = 0.001     # share of pixels that a cosmic ray hits in one of the visits
NO_VALUE = 1e10         # the error that apStar files give a pixel without a value


def split_visits(
    flux: np.ndarray,    # (P,) combined spectrum
    error: np.ndarray,   # (P,) its error
    visits: int,         # V
    rng: np.random.Generator,
) -> tuple:              # (V, P) fluxes, (V, P) errors, (V,) weights that sum to 1
    "Visits that could have made a combination: their weighted mean is it, and their scatter agrees with their errors."
    weights = rng.lognormal(0, 0.3, visits)
    weights /= weights.sum()
    errors = error / np.sqrt(weights)[:, None]
    noise = rng.standard_normal((visits, len(flux))) * np.minimum(errors, 0.1 * np.abs(flux))   # a bad pixel's error is no noise
    return flux + noise - weights @ noise, errors, weights

# %%
#| export
def _cards(*cards):
    header = fits.Header()
    for card in cards:
        header.append(card, end=True)
    return header


_GRID_CARDS = (("CRVAL1", LOG10_START), ("CDELT1", LOG10_STEP), ("CRPIX1", 1), ("CTYPE1", "LOG-LINEAR"), ("DC-FLAG", 1))
_DETECTORS = {"B": (213, 3308), "G": (3553, 6116), "R": (6309, 8369)}   # full-grid pixels that light can reach, of a real file
_LSF = (1, 4287, 5, 1, 1, 1, 1, 1, 0, 1.715, -7.9e-6, -0.033, 9e-7, -0.227, 5.7e-6, 0.093, -8.4e-6, 0.244, -4e-6, -0.046, 1, 2, 0, 0, 0.01,
        0.057)   # a Gauss-Hermite profile as wide as the instrument's, one for all stars
_UNIT = "(10^-17 erg/s/cm^2/Ang)"


def _image(on_band_values, fill, unit, dtype=">f4"):
    "An image HDU on the full grid from values on the on-band pixels."
    values = np.full((*on_band_values.shape[:-1], N_PIXELS), fill, dtype)
    values[..., on_band] = on_band_values
    return fits.ImageHDU(values, _cards(*_GRID_CARDS, ("BUNIT", unit)))


def _mask_image(bits):
    "The bitmask on the full grid: BADPIX in the gaps, NOT_ENOUGH_PSF too where a detector sees but nothing was kept."
    fill = np.full(N_PIXELS, PIXMASK.BADPIX)
    for first, last in _DETECTORS.values():
        fill[first:last + 1] |= PIXMASK.NOT_ENOUGH_PSF
    return _image(bits, fill, "Flag Mask (bitwise)", ">i2")


def _star_header(star, visits):
    "Primary header of an apStar file, with the survey's keywords."
    cards = [("OBJID", star["APOGEE_ID"], "Object ID"), *((band, round(star[band], 4), f"2MASS {band} magnitude") for band in "JHK"),
             ("TARG1", star.get("TARG1", 0), "First APOGEE targeting flag"), ("TARG2", star.get("TARG2", 0), "Second APOGEE targeting flag"),
             ("SURVEY", "apogee", "Survey name"), ("TELESCOP", star["TELESCOPE"], "Telescope"), ("LOCID", star["LOCATION_ID"], "LocationID"),
             ("FIELD", star["FIELD"], "Field name"), ("RA", star["RA"], "right ascension, deg, J2000"),
             ("DEC", star["DEC"], "declination, deg, J2000"), ("NVISITS", star["NVISITS"], "number of visit spectra combined"),
             ("VRAD", 0.0, "Doppler shift (km/s) of this spectrum"), ("VHELIO", star["VHELIO"], "mean heliocentric velocity (km/s)"),
             ("VSCATTER", star["VSCATTER"], "STDEV of VHELIO (km/s)"), ("VERR", star["VERR"], "weighted error in VHELIO (km/s)"),
             ("SNR", star["SNR"], "final median Signal/Noise ratio"), ("STARFLAG", star.get("STARFLAG", 0), "OR of visit starflags"),
             ("ANDFLAG", star.get("ANDFLAG", 0), "AND of visit starflags")]
    for i, visit in enumerate(visits, 1):
        cards += [(f"SFILE{i}", visit["FILE"], f"Visit #{i} spectrum file"), (f"JD{i}", visit["JD"], f"Julian date of visit {i}"),
                  (f"FIBER{i}", visit["FIBER"], f"Fiber, visit {i}"), (f"BC{i}", visit["BC"], "Barycentric correction (km/s)"),
                  (f"VRAD{i}", visit["VREL"], f"Doppler shift (km/s) of visit {i}"), (f"VERR{i}", visit["VRELERR"], "error in VRAD (km/s)"),
                  (f"VHELIO{i}", visit["VHELIO"], "Heliocentric velocity (km/s)"), (f"SNRVIS{i}", visit["SNR"], "Signal/Noise ratio")]
    for detector, (first, last) in zip("BGR", CHIPS.values()):
        cards += [(f"{detector}MIN", first, "Min pixel of this chip, any frame"), (f"{detector}MAX", last, "Max pixel of this chip, any frame")]
    history = ("row 1: combined spectrum with individual pixel weighting", "row 2: combined spectrum with global weighting",
               "row 3-nvisits+2: individual visit spectra; nvisits=1: a single row", "HDU1 flux, 2 error, 3 mask (row 1 OR, row 2 AND of visits)",
               "HDU4 sky, 5 sky error, 6 telluric, 7 telluric error, 8 LSF, 9 RV", "written by stellar_lab: flux scale, visits, HDU4-9 simulated")
    return _cards(*cards, ("NWAVE", N_PIXELS), *_GRID_CARDS, *(("HISTORY", line) for line in history))


def _draw_visits(star, weights, rng):
    "Facts about each visit that a header wants: dates, fibers, velocities. Invented, but they add up."
    days = np.sort(rng.choice(np.arange(55_800, 56_500), len(weights), replace=False))
    plate, velocity = 5000 + star["LOCATION_ID"] % 1000, star["VHELIO"] + star["VSCATTER"] * rng.standard_normal(len(weights))
    visits = []
    for day, weight, vhelio in zip(days, weights, velocity):
        fiber, bc = int(rng.integers(1, 301)), round(float(rng.uniform(-28, 28)), 4)
        visits.append({"FILE": f"apVisit-r8-{plate}-{day}-{fiber:03d}.fits", "FIBER": fiber, "PLATE": str(plate), "MJD": int(day),
                       "LOCID": star["LOCATION_ID"], "JD": 2_400_000.5 + int(day) + round(float(rng.uniform(0.1, 0.5)), 5),
                       "VREL": round(float(vhelio) - bc, 4), "VRELERR": 0.05, "VHELIO": round(float(vhelio), 4), "BC": bc,
                       "SNR": round(star["SNR"] * float(weight) ** 0.5, 3)})
    return visits


def _rv_table(visits):
    "HDU 9: velocities of the visits, and empty cross-correlation functions."
    n = len(visits)
    each, rows = ((n,), n + 2) if n > 1 else ((), 1)
    columns = [("FILE", "S30"), ("FIBER", ">i2"), ("PLATE", "S4"), ("MJD", ">i4"), ("LOCID", ">i2"), ("JD", ">f8"), ("VREL", ">f4"),
               ("VRELERR", ">f4"), ("VHELIO", ">f4"), ("BC", ">f4")]
    dtype = [(name, kind, each) for name, kind in columns]
    dtype += [("CCF", ">f4", (rows, 401)), ("CCFERR", ">f4", (rows, 401)), ("CCFLAG", ">f4", 401), ("CCFW0", ">f8"), ("CCFDW", ">f8")]
    table = np.zeros(1, dtype)
    for name, _ in columns:
        table[name] = [visit[name] for visit in visits] if n > 1 else visits[0][name]
    table["CCFLAG"], table["CCFDW"] = np.arange(-200, 201), LOG10_STEP
    return fits.BinTableHDU(table)


def apstar_hdus(
    star: dict,          # a row of the stars table
    flux: np.ndarray,    # (7214,) [1e-17 erg/s/cm^2/Angstrom]
    error: np.ndarray,   # (7214,) its error, `NO_VALUE` where there is none
    mask: np.ndarray,    # (7214,) APOGEE_PIXMASK bits
    rng: np.random.Generator,
) -> fits.HDUList:
    "An apStar file of DR14 (10 HDUs; 1-D arrays where there was one visit). https://data.sdss.org/datamodel"
    n = star["NVISITS"]
    masks = np.broadcast_to(mask, (n, len(mask))).copy()
    if n > 1:
        fluxes, errors, weights = split_visits(flux, error, n, rng)
        hit = np.flatnonzero(rng.random(len(mask)) < COSMIC_RAYS)
        masks[rng.integers(n, size=len(hit)), hit] |= PIXMASK.CRPIX
        fluxes, errors = np.vstack([flux, flux, fluxes]), np.vstack([error, error, np.minimum(errors, NO_VALUE)])
        masks = np.vstack([np.bitwise_or.reduce(masks), np.bitwise_and.reduce(masks), masks])
    else:
        fluxes, errors, masks, weights = flux, error, masks[0], np.ones(1)
    sky = np.where(masks & PIXMASK.SIG_SKYLINE, 300.0, 15.0)
    visits = _draw_visits(star, weights, rng)
    images = [_image(fluxes, 0, f"Flux {_UNIT}"), _image(errors, NO_VALUE, f"Error {_UNIT}"), _mask_image(masks),
              _image(sky, 0, f"Sky {_UNIT}"), _image(0.1 * sky, 0, f"Sky Error {_UNIT}"),
              _image(np.full_like(sky, 0.99), 0, "Telluric"), _image(np.full_like(sky, 1e-4), 0, "Telluric Error")]
    lsf = fits.ImageHDU(np.array(_LSF, ">f8"), _cards(("CTYPE1", "Parameters"), ("BUNIT", "LSF Coefficients")))
    return fits.HDUList([fits.PrimaryHDU(header=_star_header(star, visits)), *images, lsf, _rv_table(visits)])

# %%
#| export
_SECRETS = ("OBJID", "RA", "DEC", "J", "H", "K", "LOCID", "FIELD", "TARG1", "TARG2", "SFILE1", "JD1", "FIBER1", "BC1", "VRAD1", "VHELIO1", "VHELIO")


def mystery_hdus(star, flux, error, mask, rng) -> fits.HDUList:
    "A star without a name: an apStar file of one row from which all that could identify it is taken."
    hdus = apstar_hdus(star | {"NVISITS": 1}, flux, error, mask, rng)
    for key in _SECRETS:
        del hdus[0].header[key]
    hdus[9] = fits.BinTableHDU(np.zeros_like(np.asarray(hdus[9].data)))
    return hdus


def aspcapstar_hdus(
    star: dict,
    flux: np.ndarray,    # (7214,) relative to the pseudo-continuum
    error: np.ndarray,   # (7214,)
) -> fits.HDUList:
    "An aspcapStar file: pseudo-normalized flux and error as they are, an empty best fit, one row of labels."
    keys = ("LOCATION_ID", "FIELD", "RA", "DEC", "J", "H", "K", "SNR", "NVISITS")
    names = {"LOCATION_ID": "LOCID"}
    header = _cards(("OBJ", star["APOGEE_ID"], "Object ID"), *((names.get(key, key), star[key]) for key in keys),
                    ("HISTORY", "HDU1 pseudo-normalized flux, 2 error, 3 best fit (zero: not kept), 4 labels"))
    images = [_image(flux, 0, "Flux / pseudo-continuum"), _image(error, 0, "Error"), _image(np.zeros_like(flux), 0, "Best fit")]
    labels = [name for name in star if name in LABELS or name.removesuffix("_ERR") in LABELS]
    row = np.zeros(1, [("APOGEE_ID", "S18"), ("LOCATION_ID", ">i4"), ("SNR", ">f4"), *((name, ">f4") for name in labels)])
    for name in row.dtype.names:
        row[name] = _filled(star[name])
    return fits.HDUList([fits.PrimaryHDU(header=header), *images, fits.BinTableHDU(row)])


def _filled(value):
    "-9999 for a missing number, as the survey writes it."
    return value if isinstance(value, (str, int)) or np.isfinite(value) else -9999.0

# %%
#| export
@dataclass(frozen=True)
class Flaw:
    "A fault planted in an archive on purpose."
    name: str
    count: int      # how many copies carry it
    what: str
    reader: str     # what whoever reads the archive must do


FLAWS = {flaw.name: flaw for flaw in (
    Flaw("low-snr", 6, "SNR below 50, with the noise to match", "drop by the cut in SNR"),
    Flaw("no-labels", 6, "all labels -9999 in the catalogue", "drop: no label"),
    Flaw("zero-flux", 4, "flux zero in every pixel", "drop: no flux"),
    Flaw("duplicate", 4, "two rows in the catalogue; the one of higher SNR has a label outside the archive's cuts",
         "take the row of higher SNR, so that the cut drops the star"),
    Flaw("no-row", 5, "a file without a row in the catalogue", "drop: not in the catalogue, counted"),
    Flaw("no-file", 5, "a row in the catalogue without a file", "no star, or counted as missing"),
    Flaw("truncated", 3, "files cut off after 40 % of their bytes", "report and skip"),
    Flaw("html", 2, "a server's error page under the name of a FITS file", "report and skip"),
)}
_HTML = "<!DOCTYPE html>\n<html><head><title>503 Service Unavailable</title></head><body>Try again later.</body></html>\n"


def passes_cuts(stars: Table, record) -> np.ndarray:
    "Which stars pass the cuts of an archive's record: (N,) bool."
    passed = np.ones(len(stars), bool)
    for cut in record.cuts:
        column = np.ma.filled(np.ma.asarray(stars[cut.column], dtype=float), np.nan)
        passed &= (column > cut.low) & (column < cut.high)
    return passed


def plan_archive(
    spectra: Spectra,
    record,                # the archive's record in survey.ARCHIVES
    seed: int = 42,
    flaws: dict = None,    # name of a flaw -> how many; all of FLAWS by default
) -> Table:                # a row a star: SOURCE (row of spectra), APOGEE_ID, FLAW, SNR
    "Who will be in the archive: every star under its name but one, the mystery star; copies under invented names carry the flaws."
    flaws = {name: flaw.count for name, flaw in FLAWS.items()} if flaws is None else flaws
    unknown = set(flaws) - set(FLAWS)
    if unknown:
        raise LabError(f"unknown flaw {', '.join(sorted(unknown))}: choose from {', '.join(FLAWS)}")
    rng, snr = np.random.default_rng([seed, 1]), np.asarray(spectra.stars["SNR"], float)
    good = np.flatnonzero(passes_cuts(spectra.stars, record))
    if len(good) < 2:
        raise LabError(f"only {len(good)} of {len(spectra)} stars pass the cuts of {record.name}: an archive needs two at least")
    mystery = _pick_mystery(spectra, good, record, rng)
    others = good[good != mystery]
    others = others[snr[others] >= np.median(snr[others])]   # well measured, so that only its flaw can drop a copy
    rows = [(i, str(name), "mystery" if i == mystery else "", snr[i]) for i, name in enumerate(spectra.stars["APOGEE_ID"])]
    for number, name in enumerate(FLAWS):
        for k in range(flaws.get(name, 0)):
            source = int(rng.choice(others))
            copy = f"2M99{number:02d}{k:04d}{'+-'[k % 2]}{k:07d}"   # a right ascension of 99 hours does not exist
            rows.append((source, copy, name, round(rng.uniform(15, 45), 3) if name == "low-snr" else snr[source]))
    return Table(rows=rows, names=["SOURCE", "APOGEE_ID", "FLAW", "SNR"])


def _pick_mystery(spectra, good, record, rng):
    "A well measured star from the middle of every label."
    snr, labels = np.asarray(spectra.stars["SNR"], float)[good], spectra.labels(record.labels)[good]
    low, high = np.nanpercentile(labels, [10, 90], axis=0)
    middle = (snr >= np.median(snr)) & np.all((labels >= low) & (labels <= high), axis=1)
    return int(rng.choice(good[middle] if middle.any() else good))

# %%
#| export
def write_star(
    root,                # of the archive
    rules,               # the release's path rules
    star: dict,          # its row of the stars table
    flaw: str,           # name of its flaw, "mystery", or ""
    flux: np.ndarray,    # (7214,) relative to the pseudo-continuum
    error: np.ndarray,   # (7214,) its error, 0 where there is none
    mask: np.ndarray,    # (7214,) APOGEE_PIXMASK bits
    seed: int,
    products: tuple = ("apstar", "aspcapstar"),
) -> int:                # files written
    "Write one star's files, as its flaw wants them."
    rng = _star_rng(seed, star["APOGEE_ID"], "star")
    if flaw == "no-file":
        return 0
    if flaw == "zero-flux":
        flux = np.zeros_like(flux)
    if flaw == "low-snr":
        flux = np.where(error > 0, flux + rng.standard_normal(len(flux)) / star["SNR"], flux)
        error = np.where(error > 0, np.hypot(error, 1 / star["SNR"]), 0)
    scale = continuum([star["TEFF"]], [star["H"]], draw_throughput(seed, star["APOGEE_ID"])[None])[0]
    raw = (star, flux * scale, np.where(error > 0, error * scale, NO_VALUE), mask, rng)
    if flaw == "mystery":
        mystery_hdus(*raw).writeto(Path(root) / MYSTERY_FILE)
        return 1
    make = {"apstar": lambda: apstar_hdus(*raw), "aspcapstar": lambda: aspcapstar_hdus(star, flux, error)}
    for product in products:
        path = Path(root) / rules.path(product, str(star[rules.field_column]), star["APOGEE_ID"], star["TELESCOPE"])
        path.parent.mkdir(parents=True, exist_ok=True)
        make[product]().writeto(path)
        _damage(path, flaw)
    return len(products)


def _damage(path, flaw):
    if flaw == "truncated":
        path.write_bytes(path.read_bytes()[: int(0.4 * path.stat().st_size)])
    if flaw == "html":
        path.write_text(_HTML)


def _write_stars(root, rules, jobs, seed, products):
    "A worker's share of the stars."
    return sum(write_star(root, rules, *job, seed, products) for job in jobs)

# %%
#| export
MYSTERY_FILE, TRUTH_FILE, FORMAT = "mystery_spec_wiped.fits", "truth.fits", 1


def _star_dicts(spectra, plan):
    "The stars table as plain dicts in the order of the plan, under the plan's names."
    columns = {name: spectra.stars[name].tolist() for name in spectra.stars.colnames}
    stars = []
    for source, apogee_id, _, snr in plan.iterrows():
        star = {name: column[source] for name, column in columns.items()}
        stars.append({name: value.strip() if isinstance(value, str) else value for name, value in star.items()}
                     | {"APOGEE_ID": str(apogee_id), "SNR": float(snr)})
    return stars


def allstar_table(
    stars: list,        # star dicts
    flaws: list,        # the flaw of each
    record,
) -> Table:             # a row a target, two for a duplicate
    "The survey's catalogue of these stars: its column names, its dtypes, -9999 for what is missing."
    rules, cut = record.rules, [cut for cut in record.cuts if cut.column in LABELS][-1]
    outside = cut.high + 1 if np.isfinite(cut.high) else cut.low - 1
    rows = []
    for star, flaw in zip(stars, flaws):
        if flaw in ("mystery", "no-row"):
            continue
        labels = {name: _filled(value) for name, value in star.items() if name in LABELS or name.removesuffix("_ERR") in LABELS}
        if flaw == "no-labels":
            labels = dict.fromkeys(labels, -9999.0)
        row = _catalogue_facts(star, rules) | labels
        if flaw == "duplicate":
            rows.append(row | {"SNR": 0.7 * star["SNR"]})
            row = row | {cut.column: outside}
        rows.append(row)
    order = np.argsort([row["TARGET_ID"] for row in rows], kind="stable")
    table = Table(rows=[rows[i] for i in order])
    for name in table.colnames:
        kind = table[name].dtype.kind
        table[name] = table[name].astype("f8" if name in ("RA", "DEC", "GLON", "GLAT") else {"f": "f4", "i": "i4"}.get(kind, table[name].dtype))
    return table


def _catalogue_facts(star, rules):
    "The columns of allStar that are no labels."
    where = {"telescope": star["TELESCOPE"], "field": star[rules.field_column], "id": star["APOGEE_ID"]}
    copied = {ours: star[ours] for ours in ("J", "H", "K", "RA", "DEC", "GLON", "GLAT", "NVISITS", "SNR", "STARFLAG", "ANDFLAG", "ASPCAPFLAG",
                                            "VSCATTER", "VERR") if ours in star}
    return {"APSTAR_ID": "apogee.{telescope}.s.stars.{field}.{id}".format(**where), "TARGET_ID": rules.target_id.format(**where),
            "FILE": Path(rules.path("apstar", **{"telescope": where["telescope"], "field": where["field"], "apogee_id": where["id"]})).name,
            "APOGEE_ID": star["APOGEE_ID"], "TELESCOPE": star["TELESCOPE"], "LOCATION_ID": star["LOCATION_ID"], "FIELD": star["FIELD"],
            **copied, "VHELIO_AVG": star["VHELIO"], "COMMISS": 0, "EXTRATARG": 0}


def truth_table(spectra, plan, seed, truth=None) -> Table:
    "What only the writer knows: whose spectrum it is, which flaw it has, its labels and its continuum's parameters."
    stars = spectra.stars[plan["SOURCE"]] if truth is None else truth[plan["SOURCE"]]
    source = spectra.stars[plan["SOURCE"]]
    table = Table({"APOGEE_ID": plan["APOGEE_ID"], "SOURCE_ID": source["APOGEE_ID"], "FLAW": plan["FLAW"], "LOCATION_ID": source["LOCATION_ID"],
                   "SNR": plan["SNR"], "H": np.asarray(source["H"], float), "TEFF_CONTINUUM": np.asarray(source["TEFF"], float)})
    table["THROUGHPUT"] = [draw_throughput(seed, str(name)) for name in plan["APOGEE_ID"]]
    for name in LABELS:
        if name in stars.colnames:
            table[name] = np.asarray(stars[name], float)
    table["APOGEE_ID"][plan["FLAW"] == "mystery"] = "mystery"
    return table


def true_continuum(
    root,          # of an archive that was written here
) -> tuple:        # (N,) APOGEE_ID ("mystery" for the nameless one), (N, 7214) continuum [1e-17 erg/s/cm^2/Angstrom]
    "The continuum that each spectrum of the archive was put on."
    file = Path(root) / TRUTH_FILE
    if not file.is_file():
        raise LabError(f"{file} is missing: only an archive that stellar_lab wrote knows its continua")
    table = Table.read(file)
    return np.array(table["APOGEE_ID"].astype(str)), continuum(table["TEFF_CONTINUUM"], table["H"], np.asarray(table["THROUGHPUT"]))

# %%
#| export
@dataclass(frozen=True)
class ArchiveSummary:
    "What was written where."
    root: Path
    stars: int
    files: int
    size: int       # bytes
    flaws: dict     # name -> how many
    new: bool       # False: the very same archive was there already

    def __str__(self):
        flaws = ", ".join(f"{count} {name}" for name, count in self.flaws.items()) or "none"
        state = "written to" if self.new else "is already at"
        return f"archive of {self.stars} stars {state} {self.root}: {self.files} files, {self.size / 1e6:.0f} MB; planted flaws: {flaws}"


def write_archive(
    root,                  # folder to make; must not exist, be empty or hold this very archive
    spectra: Spectra,      # normalized, on-band grid, with a mask; ivar of bad pixels says their error, 0 where there is none
    record,                # the archive's record, or its name
    seed: int = 42,
    truth: Table = None,   # N rows of true labels, where they differ from the catalogue's
    flaws: dict = None,    # name of a flaw -> how many; all of FLAWS by default
    workers: int = None,   # processes; one a core by default
    progress: bool = True,
) -> ArchiveSummary:
    "Write stars as the survey would: files, catalogue, mystery star; truth and archive.json beside them. Whole or not at all."
    record, root = ARCHIVES[record] if isinstance(record, str) else record, Path(root)
    _check_input(spectra)
    plan = plan_archive(spectra, record, seed, flaws)
    card = _archive_card(spectra, plan, record, seed)
    if _already_there(root, card):
        return _summary(root, card, new=False)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as scratch:
        tree = Path(scratch) / root.name
        tree.mkdir()
        _fill(tree, spectra, plan, record, seed, truth, workers, progress)
        (tree / ARCHIVE_FILE).write_text(json.dumps(card, indent=1) + "\n")
        tree.replace(root)
    return _summary(root, card, new=True)


def _check_input(spectra):
    if spectra.flux.shape[1] != len(wavelength) or spectra.mask is None:
        raise LabError(f"the writer takes spectra on the {len(wavelength)} on-band pixels with a mask; these have {spectra.flux.shape[1]} pixels"
                       + (" and no mask" if spectra.mask is None else ""))
    missing = {"APOGEE_ID", "FIELD", "LOCATION_ID", "TELESCOPE", "SNR", "NVISITS", "J", "H", "K", "RA", "DEC", "VHELIO", "VSCATTER", "VERR",
               "TEFF"} - set(spectra.stars.colnames)
    if missing:
        raise LabError(f"the stars lack the column {', '.join(sorted(missing))}, which the survey's files hold")


def _archive_card(spectra, plan, record, seed):
    "The content of archive.json: enough to tell whether an archive is this one."
    content = hashlib.sha256(" ".join(map(str, spectra.stars["APOGEE_ID"])).encode())
    for array in (spectra.flux, spectra.ivar, spectra.mask):
        content.update(np.ascontiguousarray(array))
    flaws = {name: int(np.sum(plan["FLAW"] == name)) for name in FLAWS}
    return {"archive": record.name, "format": FORMAT, "seed": seed, "stars": len(spectra) - 1, "content": content.hexdigest()[:16],
            "flaws": {name: count for name, count in flaws.items() if count}, "files": [MYSTERY_FILE, TRUTH_FILE]}


def _already_there(root, card):
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / ARCHIVE_FILE).read_text())
    except (OSError, ValueError):
        raise LabError(f"{root} exists and is not an archive of ours: name another folder, or remove it") from None
    if found != card:
        raise LabError(f"{root} holds another archive ({found.get('archive')}, seed {found.get('seed')}, {found.get('stars')} stars): "
                       "name another folder, or remove it")
    return True


def _fill(tree, spectra, plan, record, seed, truth, workers, progress):
    "Write everything but archive.json."
    stars, flaws = _star_dicts(spectra, plan), [str(flaw) for flaw in plan["FLAW"]]
    with np.errstate(divide="ignore"):
        error = np.where(spectra.ivar > 0, 1 / np.sqrt(spectra.ivar), 0).astype("f4")
    jobs = [(star, flaw, spectra.flux[i], error[i], spectra.mask[i]) for star, flaw, i in zip(stars, flaws, plan["SOURCE"])]
    chunks = [jobs[i:i + 8] for i in range(0, len(jobs), 8)]
    workers = workers or os.cpu_count() or 1
    with ProcessPoolExecutor(workers) as pool, tqdm(total=len(jobs), desc="writing", unit="star", disable=not progress) as bar:
        pending = {pool.submit(_write_stars, tree, record.rules, chunk, seed, record.products): len(chunk) for chunk in chunks}
        for future in as_completed(pending):
            future.result()
            bar.update(pending[future])
    catalogue = tree / record.rules.allstar
    catalogue.parent.mkdir(parents=True, exist_ok=True)
    fits.BinTableHDU(allstar_table(stars, flaws, record)).writeto(catalogue)
    fits.BinTableHDU(truth_table(spectra, plan, seed, truth)).writeto(tree / TRUTH_FILE)


def _summary(root, card, new):
    sizes = [file.stat().st_size for file in root.rglob("*") if file.is_file()]
    return ArchiveSummary(root, card["stars"], len(sizes), sum(sizes), card["flaws"], new)

# %%
#| export
def write_clusters(
    root,                  # folder to make
    seed: int = 42,
    stars=None,            # how many of the 553 (spread evenly), or their rows; all by default
    flaws: dict = None,    # name of a flaw -> how many; all of FLAWS by default
    workers: int = None,   # processes; one a core by default
    progress: bool = True,
) -> ArchiveSummary:
    "Write the archive of real stars in DR14's files. Same seed, same bytes."
    spectra = _with_bad_pixels()
    if stars is not None:
        spectra = spectra[_spread(len(spectra), stars) if np.ndim(stars) == 0 else np.asarray(stars)]
    return write_archive(root, spectra, "clusters", seed, flaws=flaws, workers=workers, progress=progress)


def _spread(n, count):
    if not 2 <= count <= n:
        raise LabError(f"cannot take {count} stars: the archive of real stars has {n}, choose 2 to {n}")
    return np.linspace(0, n - 1, int(count)).round().astype(int)


def _with_bad_pixels():
    "The packed spectra with the errors of their bad pixels kept, and the reasons as mask bits: what the writer takes."
    flux, error, stars = _unpack()
    with np.errstate(divide="ignore"):
        ivar = np.where(error > 0, 1 / error**2, 0).astype("f4")
    return Spectra(wavelength, flux, ivar, stars, pixel_bits(flux, error))
