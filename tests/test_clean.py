"Files, faults and properties of stellar_lab.clean; nbs/02_clean has what a reader learns from."

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import socket
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Column, MaskedColumn, Table
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stellar_lab import clean
from stellar_lab.clean import (
    Ledger,
    apply_cuts,
    dark_pixels,
    drop_dark_pixels,
    find_catalogue,
    find_files,
    inverse_variance,
    keep,
    match_catalogue,
    product_of,
    read_archive,
    read_catalogue,
    read_files,
)
from stellar_lab.survey import (
    ARCHIVES,
    PRODUCTS,
    RELEASES,
    Cut,
    LabError,
    Spectra,
    on_band,
    real_data,
    sha256_of,
    wavelength,
    write_table,
)

GRID = {"CRVAL1": 4.179, "CDELT1": 6e-6, "CRPIX1": 1}
A, B, C, SOUTH = (
    "2M00000001+0000001",
    "2M00000002+0000002",
    "2M00000003+0000003",
    "2M00000004-0000004",
)


def values(seed=0, level=100.0):
    "Flux, error and mask of one star on the full grid."
    rng = np.random.default_rng(seed)
    return (
        level * rng.uniform(0.5, 1.5, 8575),
        level * rng.uniform(0.01, 0.02, 8575),
        rng.integers(0, 1 << 14, 8575),
    )


def write_apstar(
    path, seed=0, rows=5, floats=np.float32, ints=np.int16, level=100.0, grid=GRID, **header
):
    "An apStar file; row k holds k times the values. Without rows the arrays are 1-D."
    flux, error, mask = values(seed, level)
    if rows:
        flux, error, mask = (
            np.outer(np.arange(rows), flux),
            np.tile(error, (rows, 1)),
            np.tile(mask, (rows, 1)),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    first = fits.PrimaryHDU(
        header=fits.Header(
            {
                "OBJID": path.stem.split("-", 2)[-1],
                "SNR": 100.0,
                "NVISITS": 3,
                "FIELD": "M2",
                "LOCID": 4230,
                "J": 9.0,
                "H": 8.5,
                "K": 8.4,
                **GRID,
                **header,
            }
        )
    )
    images = [
        fits.ImageHDU(data, fits.Header(grid))
        for data in (flux.astype(floats), error.astype(floats), mask.astype(ints))
    ]
    rest = [fits.ImageHDU(flux.astype(floats)) for _ in range(4)] + [
        fits.ImageHDU(),
        fits.BinTableHDU(Table({"RV": [1.0]})),
    ]
    fits.HDUList([first, *images, *rest]).writeto(path, overwrite=True)
    return path


def write_aspcapstar(path, seed=0, **header):
    "An aspcapStar file: normalized flux, error, best fit, a table; no mask."
    flux, error, _ = values(seed, 1.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    first = fits.PrimaryHDU(
        header=fits.Header({"OBJ": path.stem.split("-", 2)[-1], "SNR": 100.0, **header})
    )
    images = [
        fits.ImageHDU(data.astype(np.float32), fits.Header(GRID)) for data in (flux, error, flux)
    ]
    fits.HDUList([first, *images, fits.BinTableHDU(Table({"PARAM": [1.0]}))]).writeto(
        path, overwrite=True
    )
    return path


def write_allstar(path, rows, **columns):
    "An allStar table of (location, APOGEE_ID, SNR, Teff) with plausible other labels."
    path.parent.mkdir(parents=True, exist_ok=True)
    location, star, snr, teff = zip(*rows)
    table = Table(
        {
            "TARGET_ID": [f"{a}.{b}" for a, b in zip(location, star)],
            "APOGEE_ID": star,
            "TELESCOPE": ["apo25m"] * len(rows),
            "LOCATION_ID": np.array(location, np.int32),
            "FIELD": ["M2"] * len(rows),
            "SNR": np.array(snr, np.float32),
            "TEFF": np.array(teff, np.float32),
            "TEFF_ERR": np.full(len(rows), 50, np.float32),
        }
    )
    for name, value in {"LOGG": 2.0, "FE_H": -0.5, "MG_FE": 0.1, "SI_FE": 0.1, "M_H": -0.5}.items():
        table[name] = np.full(len(rows), value, np.float32)
        table[f"{name}_ERR"] = np.full(len(rows), 0.05, np.float32)
    for name, column in columns.items():
        table[name] = column
    table["FILLER"] = np.zeros((len(rows), 50), np.float32)
    table.write(path, overwrite=True)
    return path


def star_path(root, star, field="4230", product="apstar"):
    return root / RELEASES["dr14"].path(product, field, star)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "A DR14 tree in which everything goes wrong once."
    root = tmp_path_factory.mktemp("dr14")
    for seed, star in enumerate((A, B, C, SOUTH)):
        write_apstar(star_path(root, star), seed, rows=0 if star == B else 5)
    write_apstar(star_path(root, A, "4262"), 7)  # the same star in another field
    write_apstar(star_path(root, "2M00000005+0000005"), level=0.0)  # no light
    write_apstar(star_path(root, "2M00000006+0000006"), 6)  # no row
    write_apstar(star_path(root, "2M00000007+0000007"), 7)  # no label
    write_apstar(star_path(root, "2M00000008+0000008"), 8)  # noisy
    star_path(root, "2M00000009+0000009").write_text("<!DOCTYPE html><title>404</title>")
    shutil.copy(star_path(root, A), star_path(root, A + "-56931"))  # a single visit
    rows = [
        (4230, A, 90, 4500),
        (4230, A, 200, 4600),
        (4230, A, 100, 4700),
        (4262, A, 300, 4650),
        (4230, B, 80, 4300),
        (4230, C, 80, 4800),
        (4230, SOUTH, 80, 4900),
        (4230, "2M00000005+0000005", 80, 4000),
        (4230, "2M00000007+0000007", 80, -9999),
        (4230, C[:-1] + "9", 80, 4000),
        (4230, "2M00000008+0000008", 20, 4100),
        (4230, "2M00000009+0000009", 80, 4000),
        (9999, B, 999, 9999),
    ]
    write_allstar(root / RELEASES["dr14"].allstar, rows)
    return root


@pytest.fixture
def archive(written, tmp_path):
    "A copy of that tree, which a test may change."
    return shutil.copytree(written, tmp_path, dirs_exist_ok=True)


# Reading files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 1, 3])
@pytest.mark.parametrize("floats, ints", [(np.float32, np.int16), (np.float64, np.int64)])
def test_rows_and_number_types(tmp_path, row, floats, ints):
    spectra, problems = read_files(
        [write_apstar(tmp_path / f"apStar-r8-{A}.fits", 3, 5, floats, ints)],
        row=row,
        progress=False,
    )
    flux, error, mask = values(3)
    assert not problems and (spectra.flux.dtype, spectra.ivar.dtype, spectra.mask.dtype) == (
        np.float32,
        np.float32,
        np.int32,
    )
    assert spectra.flux.dtype.isnative and spectra.mask.dtype.isnative
    np.testing.assert_allclose(spectra.flux[0], row * flux[on_band], rtol=1e-6)
    np.testing.assert_allclose(spectra.ivar[0], error[on_band] ** -2, rtol=1e-5)
    np.testing.assert_array_equal(spectra.mask[0], mask[on_band])


def test_a_star_seen_once_has_no_rows(tmp_path):
    file = write_apstar(tmp_path / f"apStar-r8-{A}.fits", rows=0)
    for row in (0, 1):
        np.testing.assert_allclose(
            read_files(file, row=row, progress=False)[0].flux[0], values()[0][on_band], rtol=1e-6
        )
    with pytest.raises(LabError, match="row 2 does not exist: the star was seen once"):
        read_files(file, row=2, progress=False)


def test_a_row_that_does_not_exist_is_that_files_problem(tmp_path):
    files = [
        write_apstar(tmp_path / f"apStar-r8-{star}.fits", rows=rows)
        for star, rows in ((A, 3), (B, 8))
    ]
    spectra, problems = read_files(files, row=5, progress=False)
    assert list(spectra.stars["APOGEE_ID"]) == [B]
    assert [str(p) for p in problems] == [
        f"apStar-r8-{A}.fits: row 5 does not exist: the file has rows 0 to 2"
    ]
    with pytest.raises(LabError, match="row must be 0, 1, 2"):
        read_files(files, row=-1)


# Which row is the combination --------------------------------------------------------------------


def write_dr17(path, **header):
    "A file as DR17 writes them: float64, int64, and no flags in row 1."
    write_apstar(path, 3, 5, np.float64, np.int64, **header)
    with fits.open(path, mode="update") as hdus:
        hdus[1].data += 1  # so that row 0, too, has light
        hdus[3].data[1] = 0
    return path


@pytest.mark.parametrize(
    "name, header, row",
    [
        ("apStar-dr17-{}.fits", {}, 0),
        ("asStar-dr17-{}.fits", {}, 0),
        ("nameless.fits", {"SFILE1": "apVisit-dr17-5815-56396-212.fits"}, 0),
        ("nameless.fits", {"SFILE1": "asVisit-dr17-5815-56396-212.fits"}, 0),
        ("nameless.fits", {}, 1),
        ("apStar-s3-{}.fits", {}, 1),
        ("apStar-r5-{}.fits", {}, 1),
        ("apStar-r6-{}.fits", {"SFILE1": "apVisit-r6-5815-56396-212.fits"}, 1),
        ("apStar-r8-{}.fits", {}, 1),
        ("apStar-r12-{}.fits", {}, 1),
    ],
)
def test_a_loose_file_says_which_row_it_means(tmp_path, name, header, row):
    file = write_dr17(tmp_path / name.format(A), **header)
    spectra, _ = read_files(file, progress=False)
    flux, _, mask = values(3)
    np.testing.assert_allclose(spectra.flux[0], row * flux[on_band] + 1, rtol=1e-6)
    np.testing.assert_array_equal(spectra.mask[0], 0 if row == 1 else mask[on_band])
    assert spectra.stars.meta["row"] == row
    for asked in (0, 1, 4):  # whoever names a row gets it
        spectra, _ = read_files(file, row=asked, progress=False)
        np.testing.assert_allclose(spectra.flux[0], asked * flux[on_band] + 1, rtol=1e-6)
        assert spectra.stars.meta["row"] == asked


def test_each_file_of_a_mixture_is_read_by_its_own_release(tmp_path):
    files = [write_dr17(tmp_path / f"apStar-{tag}-{A}.fits") for tag in ("r8", "dr17", "r12")]
    spectra, _ = read_files(files, progress=False)
    assert [bool(mask.any()) for mask in spectra.mask] == [False, True, False]
    assert spectra.stars.meta["row"] is None  # there is no row that all of them were read from
    assert read_files(files, row=1, progress=False)[0].stars.meta["row"] == 1
    assert read_files(files[::2], progress=False)[0].stars.meta["row"] == 1


def test_products_without_rows_record_none(tmp_path):
    file = write_aspcapstar(tmp_path / f"aspcapStar-dr17-{A}.fits")
    assert read_files(file, progress=False)[0].stars.meta["row"] is None


@pytest.mark.parametrize("release, row", [("dr10", 1), ("dr14", 1), ("dr16", 1), ("dr17", 0)])
def test_an_archive_is_read_by_the_row_of_its_release(tmp_path, release, row):
    rules = RELEASES[release]
    write_dr17(tmp_path / rules.path("apstar", "4230", SOUTH))
    write_allstar(
        tmp_path / rules.allstar, [(4230, SOUTH, 80, 4500)], TARGET_ID=["?"], FIELD=["4230"]
    )
    spectra, _ = read_archive(tmp_path, "apstar", "all", release=release, progress=False, dark=0)
    flux, _, mask = values(3)
    np.testing.assert_allclose(spectra.flux[0], row * flux[on_band] + 1, rtol=1e-6)
    np.testing.assert_array_equal(spectra.mask[0], 0 if row == 1 else mask[on_band])
    assert spectra.stars.meta["row"] == row
    asked, _ = read_archive(tmp_path, fields="all", release=release, row=3, progress=False, dark=0)
    np.testing.assert_allclose(asked.flux[0], 3 * flux[on_band] + 1, rtol=1e-6)
    assert asked.stars.meta["row"] == 3


@pytest.mark.skipif(
    not real_data(), reason="STELLAR_LAB_REAL_DATA names no folder with raw survey files"
)
def test_the_real_dr17_file_comes_with_its_flags(tmp_path):
    file = real_data() / "apStar-dr17-2M17335483-2753043.fits"
    spectra, _ = read_files(file, progress=False)
    assert spectra.stars.meta["row"] == 0 and np.mean(spectra.mask != 0) > 0.05
    nameless = tmp_path / "a.fits"
    shutil.copy(file, nameless)
    again, _ = read_files(nameless, progress=False)
    np.testing.assert_array_equal(again.mask, spectra.mask)
    assert not read_files(file, row=1, progress=False)[0].mask.any()


# What the header says ----------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_apstar, write_aspcapstar])
def test_every_product_brings_what_its_header_says(tmp_path, write):
    kind = "aspcapStar" if write is write_aspcapstar else "apStar"
    cards = {"RA": 12.5, "DEC": -3.25, "SNR": 88.5, "FIELD": "N188", "TELESCOP": "lco25m"}
    stars = read_files(write(tmp_path / f"{kind}-r8-{A}.fits", **cards), progress=False)[0].stars
    assert [stars[name][0] for name in ("RA", "DEC", "SNR", "FIELD", "TELESCOPE")] == list(
        cards.values()
    )
    assert all(stars[name].dtype.kind == "f" for name in ("RA", "DEC", "SNR"))
    without = read_files(
        write(tmp_path / f"{kind}-r8-{B}.fits", SNR="?", FIELD=""), progress=False
    )[0].stars
    assert all(np.isnan(without[name][0]) for name in ("RA", "DEC", "SNR"))
    assert [without[name][0] for name in ("FIELD", "TELESCOPE")] == ["", ""]


# Kinds of file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "aspcapStar-v304-{}.fits",
        "aspcapStar-r8-l31c.2-{}.fits",
        "aspcapStar-r12-{}.fits",
        "aspcapStar-dr17-{}.fits",
    ],
)
def test_aspcapstar_of_every_release(tmp_path, name):
    spectra, problems = read_files(write_aspcapstar(tmp_path / name.format(SOUTH)), progress=False)
    assert not problems and spectra.mask is None
    assert (
        spectra.stars["APOGEE_ID"][0] == SOUTH
        and spectra.stars.meta["product"] == "aspcapstar"
        and spectra.stars.meta["normalized"]
    )


def test_without_a_name_the_hdus_decide(tmp_path):
    raw = write_apstar(tmp_path / "mystery.fits", OBJID="")
    normalized = write_aspcapstar(tmp_path / "riddle.fits", OBJ="")
    assert (product_of(raw), product_of(normalized)) == ("apstar", "aspcapstar")
    assert read_files(raw, progress=False)[0].stars["APOGEE_ID"][0] == "mystery"
    with pytest.raises(LabError, match="two kinds, apstar and aspcapstar: choose one"):
        read_files([raw, normalized])
    spectra, problems = read_files([raw, normalized], product="apstar", progress=False)
    assert (
        len(spectra) == 1
        and "HDUs are those of an aspcapstar file, not of an apstar file" in problems[0].reason
    )
    with pytest.raises(LabError, match="unknown product 'apvisit'"):
        read_files(raw, product="apvisit")


def _cut_to(share):
    def damage(path):
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return damage


def _fewer_hdus(path):
    with fits.open(path) as hdus:
        fits.HDUList(hdus[:4]).writeto(path, overwrite=True)


def _no_mask(path):
    with fits.open(path) as hdus:
        hdus[3].data = hdus[3].data[:, :100]
        hdus.writeto(path, overwrite=True)


def _noise(path):
    bad = bytearray(path.read_bytes())
    bad[2880:5760] = np.random.default_rng(0).bytes(2880)  # the header of the flux
    path.write_bytes(bytes(bad))


FAULTS = {
    "cut short": _cut_to(0.99),
    "cut in half": _cut_to(0.5),
    "cut in the flux": _cut_to(0.05),
    "cut in the header": lambda p: p.write_bytes(p.read_bytes()[:1000]),
    "empty": lambda p: p.write_bytes(b""),
    "html": lambda p: p.write_text("<html>404</html>"),
    "gone": lambda p: p.unlink(),
    "fewer HDUs": _fewer_hdus,
    "another mask": _no_mask,
    "noise": _noise,
    "grid": lambda p: write_apstar(p, grid=GRID | {"CDELT1": 6.001e-6}),
    "shifted grid": lambda p: write_apstar(p, grid=GRID | {"CRPIX1": 2}),
    "another start": lambda p: write_apstar(p, grid=GRID | {"CRVAL1": 4.1791}),
    "no grid": lambda p: write_apstar(p, grid={}, CRVAL1=4.0),
    "a table": lambda p: Table({"a": [1]}).write(p, overwrite=True),
    "normalized": write_aspcapstar,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_reported_and_skipped(tmp_path, fault):
    files = [
        write_apstar(tmp_path / f"apStar-r8-{star}.fits", seed)
        for seed, star in enumerate((A, B, C))
    ]
    FAULTS[fault](files[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectra, problems = read_files(files, progress=False)
    assert list(spectra.stars["APOGEE_ID"]) == [A, C]
    np.testing.assert_allclose(
        spectra.flux[1], values(2)[0][on_band], rtol=1e-6
    )  # ranks are closed with the right rows
    assert len(problems) == 1 and problems[0].path == str(files[1]) and len(problems[0].reason) > 4
    with pytest.raises(LabError, match="none of 1 files is a good apstar file: apStar-r8-"):
        read_files(files[1], product="apstar", progress=False)


def test_the_reasons_say_what_is_wrong(tmp_path):
    reasons = {}
    for fault, damage in FAULTS.items():
        file = write_apstar(tmp_path / f"apStar-r8-{A}.fits")
        damage(file)
        with pytest.raises(LabError) as error:
            read_files(file, progress=False)
        reasons[fault] = str(error.value)
        assert str(tmp_path) not in reasons[fault]
    for fault, words in {
        "cut short": "cut short: ",
        "empty": "empty",
        "html": "not a FITS file: it begins with '<html>404",
        "gone": "No such file",
        "fewer HDUs": "has 4 HDUs, a whole apstar file at least 10",
        "grid": "another wavelength grid",
    }.items():
        assert words in reasons[fault]


# Files that are something else --------------------------------------------------------------------


def write_apvisit(path):
    "The first HDUs of an apVisit file: three chips of 4096 pixels each."
    images = [fits.ImageHDU(np.ones((3, 4096), kind)) for kind in ("f4", "f4", "i2", "f8")]
    fits.HDUList([fits.PrimaryHDU(), *images, *(fits.ImageHDU() for _ in range(6))]).writeto(path)
    return path


def write_optical(path, second="SPALL"):
    "An SDSS optical spectrum: tables COADD, SPALL (SPECOBJ in older ones), SPZLINE."
    coadd = Table(
        {"flux": np.ones(10, "f4"), "loglam": np.linspace(3.5, 4, 10), "ivar": np.ones(10)}
    )
    tables = [fits.BinTableHDU(coadd, name="COADD")]
    tables += [fits.BinTableHDU(Table({"MJD": [55874]}), name=name) for name in (second, "SPZLINE")]
    fits.HDUList([fits.PrimaryHDU(), *tables]).writeto(path)
    return path


def write_allvisit(path):
    Table(
        {"APOGEE_ID": [A, A], "VISIT_ID": ["a", "b"], "FIBERID": [88, 88], "SNR": [9.0, 9]}
    ).write(path)
    return path


def write_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 494336\n")
    return path


def write_half_packed(path):
    whole = gzip.compress(write_apstar(path.parent / "whole.fits").read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    return path


OTHERS = {
    "apVisit-r6-5094-55874-088.fits": (write_apvisit, "an apVisit file.*give apStar or aspcapStar"),
    "spec-5094-55874-0088.fits": (write_optical, "an optical spectrum of SDSS.*not one of APOGEE"),
    "spec-lite.fits": (lambda p: write_optical(p, "SPECOBJ"), "an optical spectrum of SDSS"),
    "allVisit-r8.fits": (write_allvisit, "an allVisit table, one row per visit: give apStar or"),
    "allStar-r8.fits": (
        lambda p: write_allstar(p, [(1, A, 80, 4000)]),
        "an allStar table, a catalogue: give apStar",
    ),
    f"apStar-r8-{A}.fits": (write_pointer, "a pointer of Git LFS.*fetch it with 'git lfs pull'"),
    f"apStar-r8-{B}.fits.gz": (write_half_packed, "cut short: what is packed in it ends too early"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_are_named_for_what_they_are(tmp_path, name):
    write, words = OTHERS[name]
    file = write(tmp_path / name)
    said = f"none of 1 files is a good apstar file: {re.escape(name)}: {words}"
    with pytest.raises(LabError, match=said):
        read_files(file, progress=False)
    good = write_apstar(tmp_path / f"apStar-r8-{C}.fits")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectra, problems = read_files([file, good], progress=False)
    assert len(spectra) == 1 and [Path(problem.path).name for problem in problems] == [name]


def test_a_file_whose_bytes_lost_a_bit_is_damaged(tmp_path):
    file = write_apstar(tmp_path / f"apStar-r8-{A}.fits")
    file.write_bytes(bytes(value & 127 for value in file.read_bytes()))
    with pytest.raises(LabError, match="each byte lost its first bit"):
        read_files(file, progress=False)


@pytest.mark.parametrize("missing", [1, 100, 5000])
def test_a_packed_file_that_lost_its_end_is_damaged(tmp_path, missing):
    packed = gzip.compress(write_apstar(tmp_path / f"apStar-r8-{A}.fits").read_bytes())
    file = tmp_path / f"apStar-r8-{B}.fits.gz"
    file.write_bytes(packed[:-missing])
    with pytest.raises(LabError, match="cut short: what is packed in it ends too early; fetch it"):
        read_files(file, progress=False)


def test_catalogues_that_are_something_else(tmp_path):
    remedy = "give the allStar table, one row per star"
    with pytest.raises(LabError, match=f"an allVisit table, one row per visit: {remedy}"):
        read_catalogue(write_allvisit(tmp_path / "allStar-l31c.2.fits"))
    with pytest.raises(LabError, match=f"an apVisit file.*: {remedy}"):
        read_catalogue(write_apvisit(tmp_path / "visit.fits"))
    with pytest.raises(LabError, match=f"an optical spectrum of SDSS.*: {remedy}"):
        read_catalogue(write_optical(tmp_path / "spec.fits"))
    for write, name in ((write_apstar, "apStar"), (write_aspcapstar, "aspcapStar")):
        file = write(tmp_path / f"{name}-r8-{A}.fits")
        with pytest.raises(LabError, match=f"a spectrum, an {name.lower()} file: {remedy}"):
            read_catalogue(file)
    with pytest.raises(LabError, match="a pointer of Git LFS, not the file itself"):
        read_catalogue(write_pointer(tmp_path / "pointer.fits"))
    with pytest.raises(LabError, match=f"a folder: {remedy}"):
        read_catalogue(tmp_path)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_packed_catalogue_that_lost_its_end(tmp_path, share):
    rows = [(1, f"2M{k:08d}+0000000", 50 + k, 4000 + k) for k in range(3000)]
    whole = gzip.compress(write_allstar(tmp_path / "allStar.fits", rows).read_bytes())
    file = tmp_path / "allStar.fits.gz"
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(LabError, match="allStar.*cut short: what is packed in it ends too early"):
        read_catalogue(file, ["TEFF"])


@pytest.mark.skipif(
    not (real_data() and (real_data() / "own").is_dir()),
    reason="STELLAR_LAB_REAL_DATA names no folder with visits",
)
def test_real_files_that_are_something_else():
    visits = sorted((real_data() / "own").glob("apVisit-*.fits"))
    with pytest.raises(LabError, match="an apVisit file, a single visit on the detectors'"):
        read_files(visits, progress=False)
    table = real_data() / "own" / "allVisit-164rows.fits"
    with pytest.raises(LabError, match="an allVisit table, one row per visit: give the allStar"):
        read_catalogue(table)
    with pytest.raises(LabError, match="an allStar table, a catalogue: give apStar or aspcapStar"):
        read_files(real_data() / "allStar-dr16-33rows.fits", progress=False)


def test_folders_and_patterns(tmp_path):
    first = write_apstar(tmp_path / f"a/apStar-r8-{B}.fits", 1)
    second = write_apstar(tmp_path / f"b/c/apStar-r8-{A}.fits", 2)
    write_apstar(tmp_path / f"a/apStar-r8-{A}-56931.fits")  # a single visit
    (tmp_path / "a/apStar-r8-notes.txt").write_text("no star")

    def stars(paths, **options):
        return list(read_files(paths, progress=False, **options)[0].stars["APOGEE_ID"])

    assert stars(tmp_path) == stars(str(tmp_path)) == [B, A]
    assert stars([second, tmp_path / "a"]) == [A, B]
    assert stars(f"{tmp_path}/**/apStar-*0001.fits") == [A] == stars(tmp_path / "b/*/*.fits")
    write_aspcapstar(tmp_path / f"b/aspcapStar-r8-l31c.2-{A}.fits")
    with pytest.raises(LabError, match="two kinds, apstar and aspcapstar: choose one"):
        read_files(tmp_path)
    assert stars(tmp_path, product="apstar") == [B, A]
    assert stars(tmp_path, product="aspcapstar") == [A]
    with pytest.raises(LabError, match="no file matches the pattern .*nothing"):
        read_files(tmp_path / "nothing-*.fits")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LabError, match="the folder .*empty holds no apStar or aspcapStar file"):
        read_files(tmp_path / "empty")
    brackets = first.rename(first.with_name(f"apStar-r8-[1]-{B}.fits"))
    assert stars(brackets) == [B]  # a name that exists is no pattern


def test_no_file_at_all():
    with pytest.raises(LabError, match="none of 0 files is a good apstar file: no file was given"):
        read_files([])


def test_packed_files_are_read_too(tmp_path):
    plain = write_apstar(tmp_path / f"apStar-r8-{A}.fits", 4)
    packed = tmp_path / f"apStar-r8-{A}.fits.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    np.testing.assert_array_equal(
        read_files(packed, progress=False)[0].flux, read_files(plain, progress=False)[0].flux
    )


@pytest.mark.parametrize("how", ["bz2", "xz", "zip"])
def test_other_packings_are_read_to_their_end(tmp_path, how):
    plain = write_apstar(tmp_path / f"apStar-r8-{A}.fits", 4)
    content = plain.read_bytes()
    packed = tmp_path / f"apStar-r12-{A}.fits"
    if how == "zip":
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("star.fits", content)
    else:
        packed.write_bytes(bz2.compress(content) if how == "bz2" else lzma.compress(content))
    spectra, problems = read_files([plain, packed], progress=False)
    assert not problems and list(spectra.stars["VERIFIED"]) == [False, True]
    np.testing.assert_array_equal(*spectra.flux)
    damaged = bytearray(packed.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    packed.write_bytes(damaged)
    with pytest.raises(LabError, match="what is packed in it"):
        read_files(packed, progress=False)


def test_bad_pixels_weigh_nothing(tmp_path):
    file = write_apstar(tmp_path / f"apStar-r8-{A}.fits", rows=0)
    with fits.open(file, mode="update") as hdus:
        hdus[2].data[on_band[:5]] = [0, -1, np.nan, 1e10, np.inf]
        hdus[1].data[on_band[5:7]] = [np.nan, 0]
    spectra, _ = read_files(file, progress=False)
    assert (
        list(spectra.ivar[0, :8] > 0) == [False] * 6 + [True] * 2
        and np.isfinite(spectra.flux).all()
    )


@given(
    arrays(np.float32, 20, elements=st.floats(width=32)),
    arrays(np.float32, 20, elements=st.floats(width=32)),
    st.sampled_from(list(PRODUCTS)),
)
def test_weights_are_finite_and_not_negative(flux, error, product):
    ivar = inverse_variance(flux, error, PRODUCTS[product])
    assert ivar.dtype == np.float32 and np.isfinite(ivar).all() and (ivar >= 0).all()
    assert not ivar[
        ~np.isfinite(flux) | ~(error > 0) | (error >= PRODUCTS[product].max_error)
    ].any()


# Finding files -----------------------------------------------------------------------------------


def test_the_labs_own_layout(tmp_path):
    write_apstar(tmp_path / f"stars/4230/apStar-r8-{SOUTH}.fits", 1)
    write_allstar(tmp_path / "stars/allStar-l31c.2.fits", [(4230, SOUTH, 80, 4500)])
    spectra, ledger = read_archive(tmp_path, progress=False)
    assert list(spectra.stars["APOGEE_ID"]) == [SOUTH] and ledger.left == 1


def test_both_layouts_are_one_archive(archive):
    copy = archive / f"stars/4230/apStar-r8-{A}.fits"
    write_apstar(copy, 9)
    write_apstar(archive / "stars/4230/apStar-r8-2M00000077+0000077.fits", 9)
    files = find_files(archive)
    assert (
        sum(files["APOGEE_ID"] == A) == 2 and str(copy) not in files["path"]
    )  # two fields; the copy does not count again
    assert "2M00000077+0000077" in files["APOGEE_ID"]


@pytest.mark.parametrize(
    "release, field, telescope",
    [
        ("dr10", "4230", "apo25m"),
        ("dr14", "hip", "apo1m"),
        ("dr16", "000+02", "lco25m"),
        ("dr17", "N7789", "apo25m"),
    ],
)
@pytest.mark.parametrize("product", list(PRODUCTS))
def test_every_release_has_its_tree(tmp_path, release, field, telescope, product):
    rules = RELEASES[release]
    path = tmp_path / rules.path(product, field, SOUTH, telescope)
    (write_apstar if product == "apstar" else write_aspcapstar)(path)
    for fields in ("all", [field], field):
        files = find_files(tmp_path, product, fields, release=release)
        assert (
            list(files["APOGEE_ID"]) == [SOUTH]
            and list(files["FOLDER"]) == [field]
            and list(files["path"]) == [str(path)]
        )
    row = {"telescope": files["TELESCOPE"][0], "field": field, "id": SOUTH}
    write_allstar(
        tmp_path / rules.allstar,
        [(1, SOUTH, 80, 4500)],
        TARGET_ID=[rules.target_id.format(**row)],
        FIELD=[field],
    )
    spectra, ledger = read_archive(tmp_path, product, "all", release=release, progress=False)
    assert spectra.stars["TEFF"][0] == 4500 and spectra.stars.meta["release"] == release
    assert spectra.stars["TELESCOPE"][0] == (
        telescope if "{telescope}" in rules.paths[product] else "apo25m"
    )


def test_fields_and_visits(archive):
    assert set(find_files(archive, fields=["4262"])["FOLDER"]) == {"4262"}
    assert (
        len(find_files(archive, fields="4230")) == 9 and len(find_files(archive)) == 10
    )  # the single visit is no star
    assert (
        len(find_files(archive, fields="1234")) == 0 and len(find_files(archive, "aspcapstar")) == 0
    )


def test_nothing_found_says_where_it_looked(archive, tmp_path):
    with pytest.raises(
        LabError, match="looked for dr14/apogee/spectro/redux/r8/stars/.* in fields 77"
    ):
        read_archive(archive, fields=["77"])
    with pytest.raises(LabError, match="there is no folder .*nowhere"):
        read_archive(archive / "nowhere")
    with pytest.raises(LabError, match="unknown release 'dr99': choose from dr10, dr14"):
        read_archive(archive, release="dr99")
    (archive / RELEASES["dr14"].allstar).unlink()
    with pytest.raises(
        LabError,
        match="no allStar table.*looked for dr14/.*allStar-l31c.2.fits, stars/allStar-l31c.2.fits",
    ):
        read_archive(archive)


def test_nothing_left_says_why(tmp_path):
    star_path(tmp_path, A).parent.mkdir(parents=True)
    star_path(tmp_path, A).write_text("<html>")
    write_apstar(star_path(tmp_path, B))
    write_allstar(tmp_path / RELEASES["dr14"].allstar, [(4230, C, 80, 4500)])
    with pytest.raises(
        LabError,
        match=r"2 apstar files found, of which 1 are damaged: .*not a FITS file.*"
        r"have no row in allStar-l31c.2.fits",
    ):
        read_archive(tmp_path, progress=False)


# The catalogue -----------------------------------------------------------------------------------


def test_the_catalogue_packed_or_not(tmp_path):
    path = write_allstar(
        tmp_path / "allStar.fits",
        [(4230, f"2M{k:08d}+0000000", 50 + k, 4000 + k) for k in range(25)],
    )
    packed = tmp_path / "allStar.fits.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    blocks = {"block": 7}  # more than one block, the last not full
    for table in (read_catalogue(path, ["TEFF"], **blocks), read_catalogue(packed, ["TEFF"])):
        assert table.colnames == [
            "APOGEE_ID",
            "TARGET_ID",
            "TELESCOPE",
            "FIELD",
            "LOCATION_ID",
            "SNR",
            "TEFF",
            "TEFF_ERR",
        ]
        assert (
            list(table["TEFF"]) == list(range(4000, 4025))
            and table["TEFF"].unit == "K"
            and table["TEFF_ERR"].unit == "K"
        )
        assert all(table[name].dtype.isnative for name in table.colnames) and table.meta[
            "labels"
        ] == ["TEFF"]


def test_missing_values_become_nan(tmp_path):
    path = write_allstar(
        tmp_path / "allStar.fits",
        [(1, A, -9999, -9999), (1, B, 80, -9999.99), (1, C, 80, np.nan), (1, SOUTH, 80, 4000)],
        TEFF_ERR=np.array([-9999, -1, 0, 50.0]),
    )
    table = read_catalogue(path, ["TEFF"])
    assert list(np.isfinite(table["TEFF"])) == list(np.isfinite(table["TEFF_ERR"])) == [
        False
    ] * 3 + [True] and np.isnan(table["SNR"][0])


def test_older_names_and_labels_without_errors(tmp_path):
    path = tmp_path / "allStar.fits"
    Table({"APOGEE_ID": [A], "PARAM_M_H": [-0.5], "TEFF": [4000.0]}).write(path)
    table = read_catalogue(path)
    assert (
        table.meta["labels"] == ["TEFF", "M_H"]
        and table["M_H"][0] == -0.5
        and np.isnan(table["M_H_ERR"][0])
    )


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "No such file"),
        (b"", "empty"),
        (b"<html>", "not a FITS file"),
        ("truncated", "allStar"),
    ],
)
def test_a_broken_catalogue_is_an_error(tmp_path, content, words):
    path = tmp_path / "allStar.fits"
    if content == "truncated":
        write_allstar(path, [(1, f"{k}", 80, 4000) for k in range(200)])
        path.write_bytes(path.read_bytes()[:9000])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(LabError, match=words):
        read_catalogue(path, ["TEFF"])


def test_a_catalogue_without_what_is_needed(tmp_path):
    path = write_allstar(tmp_path / "allStar.fits", [(1, A, 80, 4000)])
    with pytest.raises(
        LabError,
        match=r"no label ALPHA_M, N_M \(looked for the columns ALPHA_M, PARAM_ALPHA_M, N_M\): "
        r"it has TEFF, LOGG, FE_H",
    ):
        read_catalogue(path, ["TEFF", "ALPHA_M", "N_M"])
    with pytest.raises(LabError, match="no column VSINI: a cut needs it"):
        read_catalogue(path, ["TEFF"], ["VSINI"])
    Table({"NAME": ["x"]}).write(path, overwrite=True)
    with pytest.raises(LabError, match="it has no column APOGEE_ID"):
        read_catalogue(path)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_join_is_the_plain_scan(data):
    fields, names = ["4230", "4262"], ["a", "b", "c"]
    rows = data.draw(
        st.lists(
            st.tuples(st.sampled_from(fields), st.sampled_from(names), st.floats(1, 999)),
            min_size=1,
            max_size=12,
        )
    )
    files = data.draw(
        st.lists(
            st.tuples(st.sampled_from(fields), st.sampled_from(names)),
            min_size=1,
            max_size=6,
            unique=True,
        )
    )
    usual = data.draw(st.booleans())  # whether TARGET_ID follows the template
    catalogue = Table(
        {
            "APOGEE_ID": [r[1] for r in rows],
            "TARGET_ID": [f"{r[0]}.{r[1]}" if usual else "?" for r in rows],
            "TELESCOPE": ["apo25m"] * len(rows),
            "LOCATION_ID": [int(r[0]) for r in rows],
            "SNR": [r[2] for r in rows],
        }
    )
    stars = Table(
        {
            "APOGEE_ID": [f[1] for f in files],
            "FOLDER": [f[0] for f in files],
            "TELESCOPE": ["apo25m"] * len(files),
        }
    )
    place, further = match_catalogue(stars, catalogue, RELEASES["dr14"])
    known = {r[0] for r in rows}
    for n, (field, name) in enumerate(files):
        same = [
            k for k, r in enumerate(rows) if r[1] == name and (r[0] == field or field not in known)
        ]
        best = max(same, key=lambda k: rows[k][2], default=-1)
        assert place[n] == best or rows[place[n]][2] == rows[best][2]
        assert further[n] == max(len(same) - 1, 0)


# From an archive to a sample ---------------------------------------------------------------------


def test_each_flaw_falls_to_its_rule(archive):
    spectra, ledger = read_archive(archive, progress=False)
    assert (
        spectra.stars["TEFF"][list(spectra.stars["APOGEE_ID"]).index(A)] == 4600
    )  # the row of SNR 200
    assert spectra.label_names == ARCHIVES["survey"].labels and spectra.stars["TEFF"].unit == "K"
    good, ledger = apply_cuts(spectra, ledger=ledger)
    assert ledger.dropped == {
        "2M00000009+0000009": "damaged",
        "2M00000006+0000006": "no row in the catalogue",
        "2M00000005+0000005": "flux all zero",
        "2M00000007+0000007": "missing labels",
        "2M00000008+0000008": "signal-to-noise",
    }
    counts = dict(zip(ledger.table["rule"], ledger.table["counted"]))
    assert (
        counts["duplicate rows resolved"] == 2
        and counts["rows of the catalogue without a file"] == 1
    )
    assert (
        sorted(good.stars["APOGEE_ID"]) == sorted([A, A, B, C, SOUTH])
        and ledger.left == len(good) == 5
        and ledger.found == 10
    )
    assert ledger.why("2M00000009+0000009").startswith("damaged (not a FITS file")
    assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger


def test_spectra_and_labels_stay_with_their_star(archive):
    spectra, _ = read_archive(archive, progress=False, dark=0)
    for seed, star in enumerate((A, B, C, SOUTH)):
        row = np.flatnonzero((spectra.stars["APOGEE_ID"] == star) & (spectra.stars["SNR"] <= 200))[
            0
        ]
        np.testing.assert_allclose(spectra.flux[row], values(seed)[0][on_band], rtol=1e-6)


def test_a_cut_may_use_a_label_that_was_not_asked_for(archive):
    (archive / "archive.json").write_text('{"archive": "clusters"}')
    spectra, ledger = read_archive(archive, labels=["TEFF"], progress=False)
    assert spectra.label_names == ("TEFF",) and np.all(spectra.stars["LOGG"] == 2)
    spectra.stars["LOGG"][0] = 4.5
    good, ledger = apply_cuts(spectra, ledger=ledger)
    assert ledger.dropped[spectra.stars["APOGEE_ID"][0]] == "dwarf"


def test_both_products_in_one_archive(archive):
    write_aspcapstar(star_path(archive, A, product="aspcapstar"), 1)
    spectra, ledger = read_archive(archive, "aspcapstar", progress=False)
    assert (
        len(spectra) == 1
        and spectra.mask is None
        and spectra.stars["TEFF"][0] == 4600
        and spectra.stars.meta["normalized"]
    )


def some_spectra(n=6, seed=0):
    rng = np.random.default_rng(seed)
    flux = rng.uniform(0.5, 1.5, (n, len(wavelength))).astype("f4")
    stars = Table(
        {"APOGEE_ID": [f"s{k}" for k in range(n)], "SNR": np.linspace(10, 200, n)},
        meta={"labels": []},
    )
    return Spectra(wavelength, flux, np.ones_like(flux), stars)


def test_cuts_of_ones_own():
    spectra = some_spectra()
    good, ledger = apply_cuts(
        spectra, [Cut("faint", "SNR", low=50), Cut("bright", "SNR", high=150)]
    )
    assert list(ledger.table["rule"]) == [
        "files found",
        "flux all zero",
        "missing labels",
        "faint",
        "bright",
    ]
    assert (
        len(good)
        == ledger.left
        == np.sum((spectra.stars["SNR"] > 50) & (spectra.stars["SNR"] < 150))
    )
    with pytest.raises(LabError, match="say which cuts to apply"):
        apply_cuts(spectra)
    with pytest.raises(
        LabError, match="needs a column LOGG, which the stars lack: there are APOGEE_ID, SNR"
    ):
        apply_cuts(spectra, [Cut("dwarf", "LOGG", high=3.8)])
    with pytest.raises(LabError, match="no star passed the cuts(.|\n)*impossible"):
        apply_cuts(spectra, [Cut("impossible", "SNR", low=999)])


def test_cuts_of_bits(archive):
    path = archive / RELEASES["dr14"].allstar
    table = Table.read(path)
    ids = np.char.strip(np.asarray(table["APOGEE_ID"], str))
    table["STARFLAG"] = np.where(ids == B, 1 << 3, 1 << 9).astype(np.int32)
    table["ASPCAPFLAG"] = np.where(ids == C, -(1 << 31), 0).astype(np.int32)
    table.write(path, overwrite=True)
    spectra, ledger = read_archive(archive, progress=False)
    assert spectra.stars["STARFLAG"].dtype.isnative
    cuts = [
        Cut("neighbour", "STARFLAG", without_bits="VERY_BRIGHT_NEIGHBOR"),
        Cut("no labels", "ASPCAPFLAG", without_bits=31, reason="ASPCAP gave up"),
    ]
    good, ledger = apply_cuts(spectra, cuts, ledger)
    assert (ledger.dropped[B], ledger.dropped[C]) == ("neighbour", "no labels")
    assert not set(good.stars["APOGEE_ID"]) & {B, C} and A in good.stars["APOGEE_ID"]
    assert "keep STARFLAG without VERY_BRIGHT_NEIGHBOR" in str(ledger)
    assert ledger.why(C) == "no labels (keep ASPCAPFLAG without bit 31: ASPCAP gave up)"


def test_a_later_step_goes_on_with_the_ledger():
    spectra, ledger = apply_cuts(some_spectra(), [Cut("faint", "SNR", low=50)])
    fewer, longer = keep(spectra, np.arange(len(spectra)) > 0, "too many masked pixels", ledger)
    assert (
        longer.dropped[spectra.stars["APOGEE_ID"][0]] == "too many masked pixels"
        and longer.left == len(fewer) == ledger.left - 1
    )
    with pytest.raises(LabError, match="the ledger has 4 stars left, but there are 6 spectra"):
        keep(some_spectra(), np.ones(6, bool), "x", ledger)


@given(st.lists(st.integers(0, 5), max_size=6))
def test_every_ledger_balances(drops):
    ledger = Ledger(sum(drops) + 3)
    for k, n in enumerate(drops):
        ledger = ledger.drop(f"rule {k}", [f"{k}-{i}" for i in range(n)]).count("seen", n)
    assert (
        ledger.left == 3
        and ledger.table["dropped"].sum() + ledger.left == ledger.found
        and len(ledger.dropped) == sum(drops)
    )
    assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger and len(
        str(ledger).splitlines()
    ) == 3 + 2 * len(drops)


# Dark pixels -------------------------------------------------------------------------------------


def test_dark_pixels_do_not_know_how_bright_a_star_is():
    spectra = some_spectra(8)
    spectra.flux[3, 100] = 0.001
    spectra.ivar[:, 200] = 0
    before = spectra.ivar.copy()
    dark = dark_pixels(spectra.flux, spectra.ivar)
    assert list(zip(*np.nonzero(dark))) == [(3, 100)]
    scale = 10.0 ** np.linspace(-3, 3, 8)[:, None]
    np.testing.assert_array_equal(
        dark_pixels((spectra.flux * scale).astype("f4"), spectra.ivar, block=1000), dark
    )
    after = drop_dark_pixels(spectra)
    assert after.ivar[3, 100] == 0 and after.flux is spectra.flux
    np.testing.assert_array_equal(spectra.ivar, before)  # the argument is left alone


def test_dark_pixels_of_few_stars():
    one = some_spectra(1)
    one.flux[0, :5] = -1
    assert not dark_pixels(one.flux, one.ivar).any()
    assert dark_pixels(np.zeros((0, 7214), "f4"), np.zeros((0, 7214), "f4")).shape == (0, 7214)
    dead = some_spectra(3)
    dead.flux[0], dead.ivar[1] = 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dark_pixels(dead.flux, dead.ivar)


# The survey's own files --------------------------------------------------------------------------


@pytest.mark.skipif(
    not real_data(), reason="STELLAR_LAB_REAL_DATA names no folder with raw survey files"
)
def test_every_real_file_is_read():
    paths = [*sorted(real_data().glob("apStar-*.fits")), real_data() / "mystery_spec_wiped.fits"]
    spectra, problems = read_files(paths, progress=False)
    assert len(spectra) == len(paths) and not problems
    for n, path in enumerate(paths):
        flux, error, mask = (np.atleast_2d(fits.getdata(path, k))[:, on_band] for k in (1, 2, 3))
        row = min(0 if "dr17" in path.name else 1, len(flux) - 1)
        np.testing.assert_array_equal(spectra.flux[n], flux[row].astype("f4"))
        np.testing.assert_array_equal(spectra.mask[n], mask[row])
        np.testing.assert_array_equal(spectra.ivar[n] > 0, error[row] < 1e9)


@pytest.mark.skipif(
    not real_data(), reason="STELLAR_LAB_REAL_DATA names no folder with raw survey files"
)
def test_real_catalogues():
    new = read_catalogue(real_data() / "allStar-dr16-33rows.fits", ["TEFF", "MG_FE"])
    assert len(new) == 33 and np.isclose(new["TEFF"][0], 4723.117) and np.isnan(new["MG_FE"]).any()
    stars = Table(
        {"APOGEE_ID": new["APOGEE_ID"], "TELESCOPE": new["TELESCOPE"], "FOLDER": new["FIELD"]}
    )
    rows, further = match_catalogue(stars, new, RELEASES["dr16"])
    assert list(rows) == list(range(33)) and not further.any()
    with pytest.raises(LabError, match="no label MG_FE .*it has TEFF, LOGG, FE_H, M_H, ALPHA_M"):
        read_catalogue(real_data() / "allStar-v603-hipparcos.fits.gz", ["TEFF", "MG_FE"])


# Evidence that is there is looked at --------------------------------------------------------------

OURS = re.compile(  # whose words these are
    "memmap|ufunc|verify|Errno|numpy|astropy|Traceback|NoneType|cannot convert|header missing"
)


def change(number, **cards):
    "A fault: other cards in the header of an HDU."

    def damage(path):
        with fits.open(path) as hdus:
            hdus[number].header.update(
                {key.replace("_", "-"): value for key, value in cards.items()}
            )
            hdus.writeto(path, overwrite=True)

    return damage


def raw_change(old, new, count=1):
    "A fault: other bytes."
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new, count))


def swap(one, other):
    "A fault: two HDUs in each other's place."

    def damage(path):
        with fits.open(path) as hdus:
            parts = list(hdus)
            for k, kind in enumerate(
                ("Flux (x)", "Error (x)", "Flag Mask (bitwise)", "Sky (x)"), 1
            ):
                parts[k].header["BUNIT"] = kind
            parts[one], parts[other] = parts[other], parts[one]
            fits.HDUList(parts).writeto(path, overwrite=True)

    return damage


def wrong_sum(path):
    with fits.open(path) as hdus:
        hdus.writeto(path, overwrite=True, checksum=True)
    content = bytearray(path.read_bytes())
    content[3 * 2880] ^= 1
    path.write_bytes(content)


SPOKEN = {
    "another star": (
        change(0, OBJID=B),
        re.escape(f"holds another star: its header says {B}, its name {A}"),
    ),
    "not at rest": (change(0, VRAD=8.3), "not at rest: its header says VRAD 8.3 km/s"),
    "linear": (change(1, CTYPE1="LINEAR"), "another wavelength grid: CTYPE1 LINEAR in HDU 1"),
    "air": (change(1, CTYPE1="AWAV"), "another wavelength grid: CTYPE1 AWAV"),
    "no logarithm": (change(1, DC_FLAG=0), "another wavelength grid: DC-FLAG 0"),
    "nanometres": (change(1, CUNIT1="nm"), "another wavelength grid: CUNIT1 NM"),
    "another step": (
        lambda p: fits.setval(p, "CD1_1", value=1e-6, ext=1),
        "another wavelength grid",
    ),
    "errors elsewhere": (change(2, CRVAL1=4.1), "another wavelength grid: CRVAL1 4.1 in HDU 2"),
    "mask elsewhere": (change(3, CRPIX1=5), "another wavelength grid: CRPIX1 5 in HDU 3"),
    "text for a number": (
        raw_change(b"CRVAL1  =                4.179", b"CRVAL1  = '4.179   '          ", 9),
        "another wavelength grid: CRVAL1 4.179",
    ),
    "no number": (
        raw_change(b"CRVAL1  =                4.179", b"CRVAL1  =                  NaN", 9),
        "damaged|another wavelength grid",
    ),
    "negative": (
        raw_change(b"NAXIS2  =                    5", b"NAXIS2  =                   -1"),
        "damaged: the header of HDU 1 has no good card NAXIS2",
    ),
    "huge": (
        raw_change(b"NAXIS2  =                    5", b"NAXIS2  = 99999999999999999999"),
        "cut short",
    ),
    "endless": (
        raw_change(b"NAXIS   =                    2", b"NAXIS   =           2147483648"),
        "damaged: HDU 1 has more axes or columns than FITS allows",
    ),
    "sky for flux": (swap(1, 4), "HDU 1 holds 'Sky .x.', where the flux should be"),
    "error for flux": (swap(1, 2), "HDU 1 holds 'Error .x.', where the flux should be"),
    "checksum": (wrong_sum, "damaged: HDU 1 does not fit its checksum"),
}


@pytest.mark.parametrize("fault", SPOKEN)
def test_what_a_header_or_a_checksum_says_is_heard(tmp_path, fault):
    damage, words = SPOKEN[fault]
    file = write_apstar(tmp_path / f"apStar-r8-{A}.fits")
    damage(file)
    good = write_apstar(tmp_path / f"apStar-r8-{B}.fits", 1)
    spectra, (problem,) = read_files([file, good], progress=False)
    assert list(spectra.stars["APOGEE_ID"]) == [B]
    assert re.match(words, problem.reason) and not OURS.search(problem.reason)


def test_a_good_checksum_is_said(tmp_path):
    file = write_apstar(tmp_path / f"apStar-r8-{A}.fits", VRAD=0.0, CUNIT1="Angstrom")
    (tmp_path / f"apStar-r8-{A}.fits.gz").write_bytes(gzip.compress(file.read_bytes()))
    with fits.open(file) as hdus:
        hdus.writeto(tmp_path / f"apStar-r12-{A}.fits", checksum=True)
    spectra, problems = read_files(sorted(tmp_path.glob("*.fits*")), progress=False)
    assert not problems and len(spectra) == 3
    said = dict(zip(spectra.stars["FILE"], spectra.stars["VERIFIED"]))
    assert said == {
        f"apStar-r12-{A}.fits": True,
        f"apStar-r8-{A}.fits": False,
        f"apStar-r8-{A}.fits.gz": True,
    }


@pytest.mark.parametrize("suffix", [".fits.gz", ".fits"])  # packed, and packed under a plain name
@pytest.mark.parametrize("level", [0, 9])
def test_every_bit_of_a_packed_file_counts(tmp_path, suffix, level):
    packed = gzip.compress(write_apstar(tmp_path / "a.fits").read_bytes(), level)
    file = tmp_path / f"apStar-r8-{A}{suffix}"
    for at in np.random.default_rng(level).integers(20, len(packed) - 8, 6):
        damaged = bytearray(packed)
        damaged[at] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(LabError, match="what is packed in it|cut short"):
            read_files(file, progress=False)


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(clean, "_MAX_STAR", 1 << 20)
    file = tmp_path / f"apStar-r8-{A}.fits.gz"
    file.write_bytes(gzip.compress(bytes(1 << 21)))
    with pytest.raises(LabError, match="unpacks to more than any star's file"):
        read_files(file, progress=False)


@pytest.mark.parametrize("what", ["pipe", "device", "socket"])
def test_only_files_are_read(tmp_path, what):
    path = tmp_path / f"apStar-r8-{A}.fits"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    good = write_apstar(tmp_path / f"apStar-r8-{B}.fits")
    for paths in ([path, good], tmp_path):
        spectra, (problem,) = read_files(paths, progress=False)
        assert len(spectra) == 1 and re.match("a (named pipe|device|socket), not", problem.reason)
    nameless = path.rename(tmp_path / "pipe.fits")
    assert product_of(nameless) is None
    with pytest.raises(LabError, match="not a whole allStar table .a .*, not a file"):
        read_catalogue(nameless)


def test_scaled_images_are_read(tmp_path):
    "Whole numbers with BSCALE, BZERO and BLANK, as the standard allows them."
    plain = write_apstar(tmp_path / f"apStar-r8-{A}.fits")
    with fits.open(plain) as hdus:
        hdus[1].data[1, on_band[0]] = np.nan
        parts = [hdus[0], *hdus[1:3], *hdus[3:]]
        for k, step in ((1, 0.01), (2, 0.0001)):
            with np.errstate(invalid="ignore"):
                numbers = np.rint(np.nan_to_num(hdus[k].data / step, nan=-7)).astype(">i4")
            parts[k] = fits.ImageHDU(numbers, fits.Header(GRID))
            parts[k].header["BLANK"] = -7
        parts[3] = fits.ImageHDU(hdus[3].data.astype(np.uint16), fits.Header(GRID))
        fits.HDUList(parts).writeto(tmp_path / f"apStar-r12-{A}.fits")
    scaled = tmp_path / f"apStar-r12-{A}.fits"
    with fits.open(scaled, mode="update", do_not_scale_image_data=True) as hdus:
        hdus[1].header["BSCALE"] = 0.01
        hdus[2].header["BSCALE"] = 0.0001
    spectra, problems = read_files([plain, scaled], progress=False)
    assert not problems and spectra.ivar[1, 0] == 0
    np.testing.assert_allclose(spectra.flux[1, 1:], spectra.flux[0, 1:], atol=0.006)
    np.testing.assert_allclose(spectra.ivar[1, 1:], spectra.ivar[0, 1:], rtol=1e-3)
    np.testing.assert_array_equal(spectra.mask[1], spectra.mask[0])


STRANGE = [(1, 1e36), (1, 3e38), (1, -1e36), (1, 1e20), (1, 1e300), (2, 1e-12), (2, 1e-30)]


@pytest.mark.parametrize("hdu, value", STRANGE)
@pytest.mark.parametrize("write", [write_apstar, write_aspcapstar])
def test_a_pixel_that_no_star_has_is_unusable(tmp_path, write, hdu, value):
    kind = "aspcapStar" if write is write_aspcapstar else "apStar"
    file = write(tmp_path / f"{kind}-r8-{A}.fits")
    plain, _ = read_files(file, progress=False)
    with fits.open(file) as hdus:
        hdus[hdu].data = hdus[hdu].data.astype("f8")
        hdus[hdu].data[..., on_band[[5, 700]]] = value
        hdus.writeto(file, overwrite=True)
    spectra, problems = read_files(file, progress=False)
    assert not problems and not spectra.ivar[0, [5, 700]].any()
    others = np.delete(np.arange(7214), [5, 700])
    np.testing.assert_allclose(spectra.ivar[0, others], plain.ivar[0, others], rtol=1e-6)
    np.testing.assert_array_equal(spectra.flux[0, others], plain.flux[0, others])
    assert spectra.stars["STRANGE_PIXELS"][0] == (0 if value == -1e36 and kind[:2] == "as" else 2)
    assert np.isfinite(spectra.flux).all() and plain.stars["STRANGE_PIXELS"][0] == 0


def test_numbers_that_signal_are_unusable(tmp_path):
    "A signalling NaN makes numpy warn where it is converted."
    file = write_aspcapstar(tmp_path / f"aspcapStar-r8-{A}.fits")
    with fits.open(file) as hdus:
        places = [hdus.fileinfo(k)["datLoc"] for k in (1, 2)]
    content = bytearray(file.read_bytes())
    for place in places:
        at = place + 4 * int(on_band[5])
        content[at : at + 4] = b"\x7f\xa0\x00\x01"
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectra, problems = read_files(file, progress=False)
    assert not problems and spectra.ivar[0, 5] == 0 and np.isfinite(spectra.flux).all()


def test_strange_pixels_stand_in_the_ledger(archive):
    with fits.open(star_path(archive, A), mode="update") as hdus:
        hdus[1].data[:, on_band[9]] = 1e36
    spectra, ledger = read_archive(archive, fields="all", progress=False)
    (line,) = [step for step in ledger.steps if step.rule == "strange pixels"]
    assert line.counted == 1 and np.isfinite(spectra.flux).all()


def test_the_checksums_of_an_archive_are_verified(archive):
    files = [path for path in archive.rglob("apStar*.fits")]
    sums = {path.relative_to(archive).as_posix(): sha256_of(path) for path in files}
    card = {"archive": "clusters", "sha256": sums}
    (archive / "archive.json").write_text(json.dumps(card))
    options = {"fields": "all", "labels": ["TEFF"], "progress": False}
    spectra, _ = read_archive(archive, **options)
    assert spectra.stars["VERIFIED"].all()
    with fits.open(star_path(archive, A), mode="update") as hdus:
        hdus[1].data[1, on_band[9]] *= 1.5
    fewer, ledger = read_archive(archive, **options)
    assert len(fewer) == len(spectra) - 1
    assert "its sha256 is not the one its archive knows" in ledger.why(A)
    catalogue = find_catalogue(archive)
    known = sums | {catalogue.relative_to(archive).as_posix(): sha256_of(catalogue)}
    (archive / "archive.json").write_text(json.dumps(card | {"sha256": known}))
    assert len(read_archive(archive, **options)[0]) == len(fewer)
    with fits.open(catalogue, mode="update") as hdus:
        hdus[1].data["TEFF"][0] += 100
    with pytest.raises(
        LabError, match="allStar.*damaged: its sha256 is not the one that its archi"
    ):
        read_archive(archive, **options)


@pytest.mark.parametrize(
    "card, value, column, missing",
    [
        ("RA", 361.0, "RA", np.nan),
        ("RA", 1e300, "RA", np.nan),
        ("DEC", -91.0, "DEC", np.nan),
        ("SNR", -3.0, "SNR", np.nan),
        ("NVISITS", -2, "NVISITS", -1),
        ("H", 99.9, "H", np.nan),
    ],
)
def test_facts_that_cannot_be_are_missing(archive, card, value, column, missing):
    with fits.open(star_path(archive, A), mode="update") as hdus:
        hdus[0].header[card] = value
    spectra, problems = read_files(star_path(archive, A), progress=False)
    assert not problems and np.array_equal(spectra.stars[column], [missing], equal_nan=True)


def test_a_name_beyond_ascii(tmp_path):
    file = write_apstar(tmp_path / "étoile 星.fits", OBJID="")
    spectra, _ = read_files(file, progress=False)
    assert list(spectra.stars["APOGEE_ID"]) == ["étoile 星"]
    names = spectra.stars["APOGEE_ID", "FILE"]
    names.meta = {}
    write_table(names, tmp_path / "out.fits")
    back = Table.read(tmp_path / "out.fits")
    back.convert_bytestring_to_unicode()
    assert list(back["APOGEE_ID"]) == ["étoile 星"]


# A catalogue is read as it is meant ---------------------------------------------------------------

ROWS = [(4230, A, 80, 4500), (4230, B, 80, 4600), (4230, C, 80, 4700)]


def test_missing_values_of_whole_numbers(tmp_path):
    path = write_allstar(
        tmp_path / "a.fits",
        ROWS,
        TEFF=np.array([4500, -9999, 4700], ">i4"),
        LOGG=MaskedColumn([2, 3, 4], mask=[0, 1, 0], fill_value=99),
        FE_H=np.array([0, -32768, 1], ">i2"),
        NVISITS=MaskedColumn([3, 4, 5], mask=[1, 0, 0]),
        STARFLAG=np.array([0, -(1 << 31), -9999], ">i4"),
    )
    table = read_catalogue(path, ["TEFF", "LOGG", "FE_H"], ["NVISITS"])
    assert list(np.isnan(table["TEFF"])) == list(np.isnan(table["LOGG"])) == [False, True, False]
    assert list(np.isnan(table["FE_H"])) == [False, True, False]
    assert table["TEFF"].dtype == table["LOGG"].dtype == np.float64
    assert list(Cut("seen", "NVISITS", low=0).keeps(table["NVISITS"])) == [False, True, True]
    flags = Cut("flags", "STARFLAG", without_bits=3).keeps(table["STARFLAG"])
    assert list(flags) == [True, True, False]


def test_units_are_converted(tmp_path):
    path = write_allstar(tmp_path / "a.fits", ROWS)
    plain = read_catalogue(path, ["TEFF", "LOGG"])
    table = Table.read(path)
    for name in ("TEFF", "TEFF_ERR"):
        table[name] = Column(np.asarray(table[name], float) / 1000, unit="kK")
    table.write(path, overwrite=True)
    again = read_catalogue(path, ["TEFF", "LOGG"])
    for name in ("TEFF", "TEFF_ERR"):
        assert again[name].unit == "K"
        np.testing.assert_allclose(again[name], plain[name], rtol=1e-6)
    for unit, shift in (("dex(m/s2)", 2), ("[cm/s2]", 0), ("log(cgs)", 0)):
        with fits.open(path, mode="update") as hdus:
            hdus[1].header[f"TUNIT{hdus[1].columns.names.index('LOGG') + 1}"] = unit
        again = read_catalogue(path, ["LOGG"])
        np.testing.assert_allclose(again["LOGG"], plain["LOGG"] + shift)
        np.testing.assert_allclose(again["LOGG_ERR"], plain["LOGG_ERR"])


@pytest.mark.parametrize(
    "name, unit",
    [("LOGG", "m/s2"), ("LOGG", "cm/s2"), ("TEFF", "eV"), ("TEFF", "furlong"), ("M_H", "%")],
)
def test_units_that_mean_something_else_are_refused(tmp_path, name, unit):
    path = write_allstar(tmp_path / "a.fits", ROWS)
    with fits.open(path, mode="update") as hdus:
        hdus[1].header[f"TUNIT{hdus[1].columns.names.index(name) + 1}"] = unit
    with pytest.raises(LabError, match=f"the column {name} is in '{unit}', which does not become"):
        read_catalogue(path, [name])


@pytest.mark.parametrize(
    "column, words",
    [
        (np.array(["4500"] * 3), "holds text; one number per star is needed"),
        (np.array([1j, 2, 3]), "holds complex numbers"),
        (np.ones((3, 2), "f4"), "holds arrays"),
        (np.array([True, False, True]), "holds truth values"),
        (np.array([np.ones(1), np.ones(2), np.ones(3)], dtype=object), "holds arrays of varying"),
    ],
)
@pytest.mark.parametrize("name", ["TEFF", "TEFF_ERR", "SNR", "NVISITS"])
def test_columns_that_hold_no_number_per_star(tmp_path, column, words, name):
    path = write_allstar(tmp_path / "a.fits", ROWS, **{name: column})
    with pytest.raises(LabError, match=f"the column {name} {words}"):
        read_catalogue(path, ["TEFF"], ["NVISITS"] if name == "NVISITS" else [])


def test_keys_must_be_text(tmp_path):
    for column in (np.arange(3), np.array([["a", "b"]] * 3)):
        path = write_allstar(tmp_path / "a.fits", ROWS, APOGEE_ID=column)
        with pytest.raises(LabError, match="the column APOGEE_ID holds .*; one text per star"):
            read_catalogue(path)


@pytest.mark.parametrize("teff", [50_000, 1e30, 0, -999.9, -99, 4.5, 99_999])
def test_a_label_that_no_star_can_have_falls_to_a_rule(archive, teff):
    path = archive / RELEASES["dr14"].allstar
    table = Table.read(path)
    table["TEFF"][table["APOGEE_ID"] == C] = teff
    table.write(path, overwrite=True)
    spectra, ledger = read_archive(archive, fields="all", labels=["TEFF"], progress=False)
    good, ledger = apply_cuts(spectra, (), ledger)
    assert ledger.dropped[C] == "impossible label" and C not in good.stars["APOGEE_ID"]
    assert "stars have TEFF within 2000 and 30000" in ledger.why(C)
    assert ledger.left == len(good)


def test_every_bit_of_a_packed_catalogue_counts(tmp_path):
    packed = gzip.compress(write_allstar(tmp_path / "a.fits", ROWS).read_bytes())
    for at in np.random.default_rng(1).integers(20, len(packed) - 8, 10):
        damaged = bytearray(packed)
        damaged[at] ^= 1
        (tmp_path / "a.fits.gz").write_bytes(damaged)
        with pytest.raises(LabError, match="what is packed in it .*fetch it again"):
            read_catalogue(tmp_path / "a.fits.gz")


def test_the_checksum_of_a_catalogue_counts(tmp_path):
    path = write_allstar(tmp_path / "a.fits", ROWS)
    with fits.open(path) as hdus:
        hdus.writeto(path, overwrite=True, checksum=True)
    assert len(read_catalogue(path)) == 3
    content = bytearray(path.read_bytes())
    content[-2880] ^= 1
    path.write_bytes(content)
    with pytest.raises(LabError, match="HDU 1 does not fit its checksum; fetch it again"):
        read_catalogue(path)


def test_counting_finds_the_same_strange_pixels_as_the_median():
    rng = np.random.default_rng(1)
    for power in (0, 2, 3, 3.9, 4, 4.1, 5, 30):
        flux = rng.uniform(0.5, 1.5, 101)
        ivar = rng.uniform(0.5, 1.5, 101)
        flux[7] = 10**power
        ivar[9] = 10 ** (1.5 * power)
        level = np.median(flux[ivar > 0])
        wanted = (flux > 1e4 * level) | (ivar > np.median(ivar) * 1e6)
        assert np.array_equal(clean.strange_pixels(flux, ivar), wanted), power
    assert not clean.strange_pixels(np.zeros(5), np.ones(5)).any()
    assert not clean.strange_pixels(np.zeros(0), np.zeros(0)).any()
