# %% [markdown]
# # Where do the stars come from?
# > Real spectra that fit into a repository, and a writer that gives them back the survey's own files, flaws included.

# %%
#| default_exp archives

# %%
#| export
import csv
import hashlib
import tarfile
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

import astropy.units as u
import numpy as np
from astropy.io import fits
from astropy.table import QTable, Table
from tqdm.auto import tqdm

from stellar_lab.survey import ARCHIVES, LABELS, LabError, Spectra, atomic_path, on_band, wavelength

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


def real_stars() -> Spectra:   # 553 stars, 7,214 pixels, sorted by the name of the survey's file
    "The embedded real spectra, pseudo-normalized as SDSS DR10 published them, with their labels."
    with _data_file(PACKED_STARS) as path, fits.open(path) as hdus:
        steps, levels = hdus["FLUX"].data, hdus["ERROR"].data
        stars = Table(hdus["STARS"].data)
    flux = (steps * FLUX_STEP).astype("f4")
    error = np.exp(levels * LOG_ERROR_STEP)
    good = (steps > 0) & (levels > NO_ERROR) & (error < MAX_ERROR)
    ivar = np.where(good, 1 / error**2, 0).astype("f4")
    stars["TELESCOPE"] = "apo25m"
    stars["CLUSTER"] = _cluster_of(stars["FIELD"])
    for name in LABELS:
        for column in (name, f"{name}_ERR", f"{name}_RAW"):
            if column in stars.colnames:
                stars[column] = stars[column].astype(float) * 1.0
                stars[column].unit = LABELS[name].unit
    stars.meta = {"product": "aspcapstar", "release": "dr10", "archive": "clusters", "normalized": True}
    return Spectra(wavelength, flux, ivar, stars)


def _cluster_of(fields):
    "The cluster that each field of the survey was pointed at."
    names = {field: row["CLUSTER"] for row in clusters() for field in str(row["FIELDS"]).split()}
    return [names[str(field).strip()] for field in fields]
