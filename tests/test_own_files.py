"Spectra from everybody's files: each is read, or refused in a sentence that says why."

import gzip

import astropy.units as u
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable, Table

from stellar_lab.labelling import read_star
from stellar_lab.spectrum import read_spectrum
from stellar_lab.survey import LabError

GRID = np.linspace(15_200.0, 16_900.0, 1_200)
FLUX = 1 - 0.3 * np.exp(-0.5 * ((GRID - 16_000) / 3) ** 2)
ERROR = np.full(len(GRID), 0.02)


def lines(form="{:.4f},{:.6f},{:.4f}", names="wavelength,flux,error", rows=None, mark=None):
    "Lines of a table of text."
    rows = zip(GRID, FLUX, ERROR) if rows is None else rows
    body = [form.format(*row) for row in rows]
    body = [line.replace(".", ",") for line in body] if mark == "," else body
    return "\n".join([*([names] if names else []), *body, ""])


TEXTS = {  # name -> content, what must be read as wavelength, flux, error
    "plain.csv": lines().encode(),
    "semicolons.csv": lines("{:.4f};{:.6f};{:.4f}", "wavelength;flux;error").encode(),
    "decimal commas.csv": lines("{:.4f};{:.6f};{:.4f}", "wave;flux;err", mark=",").encode(),
    "decimal tabs.txt": lines("{:.4f}\t{:.6f}\t{:.4f}", None, mark=",").encode(),
    "comments.csv": ("# my star\n\n% by hand\n" + lines() + "# end\n").encode(),
    "no names.csv": lines(names=None).encode(),
    "no names.spec": lines("  {:.4f}   {:.6f} {:.4f}", None).encode(),
    "names in a comment.txt": lines("{:.4f} {:.6f} {:.4f}", "# wave flux err").encode(),
    "unit in a name.csv": lines(
        names="wavelength [nm],flux,error", rows=zip(GRID / 10, FLUX, ERROR), form="{:.5f},{},{}"
    ).encode(),
    "unit in a row.csv": lines(names="wavelength,flux,error\nAngstrom,,").encode(),
    "windows.csv": lines().replace("\n", "\r\n").encode("utf-8-sig"),
    "utf16.csv": lines().encode("utf-16"),
    "latin.csv": ("# Göttingen\n" + lines(names="wavelength (Å),flux,error")).encode("latin-1"),
    "packed.csv.gz": gzip.compress(lines().encode()),
    "fortran.txt": lines("{:.8E} {:.8E} {:.8E}", None).replace("E", "D").encode(),
    "thousands.csv": lines('"{:,.4f}","{:.6f}","{:.4f}"').encode(),
    "other names.csv": lines(names="WAVE,SPEC,SIG").encode(),
    "long names.csv": lines(names="lambda(A),normalized flux,flux uncertainty").encode(),
    "percent.csv": lines(
        names="wavelength,flux,error [%]", rows=zip(GRID, FLUX, 100 * ERROR / FLUX), form="{},{},{}"
    ).encode(),
    "snr.csv": lines(
        names="wavelength,flux,snr", rows=zip(GRID, FLUX, FLUX / ERROR), form="{},{},{}"
    ).encode(),
    "variance.csv": lines(names="wave,flux,var", rows=zip(GRID, FLUX, ERROR**2))
    .replace("0.0004", "0.00040")
    .encode(),
    "ivar.csv": lines(names="wave,flux,ivar", rows=zip(GRID, FLUX, ERROR**-2.0)).encode(),
    "logarithm.csv": lines(
        names="loglam,flux,ivar", rows=zip(np.log10(GRID), FLUX, ERROR**-2.0), form="{:.9f},{},{}"
    ).encode(),
    "unnamed logarithm.csv": lines(
        rows=zip(np.log10(GRID), FLUX, ERROR), form="{:.9f},{},{}"
    ).encode(),
    "wavenumber.csv": lines(
        names="wavenumber,flux,error", rows=zip(1e8 / GRID, FLUX, ERROR), form="{:.6f},{},{}"
    ).encode(),
    "backwards.csv": lines(rows=list(zip(GRID, FLUX, ERROR))[::-1]).encode(),
}


def check(star):
    assert np.allclose(star.wavelength, GRID, atol=2e-3)
    level = star.stars.meta["level"]
    assert np.allclose(star.flux[0] * level, FLUX, atol=1e-4)
    assert np.allclose(star.ivar[0] ** -0.5 * level, ERROR, rtol=1e-2)


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_all_kinds(name, tmp_path):
    (tmp_path / name).write_bytes(TEXTS[name])
    check(read_star(tmp_path / name))


def header(log=False, **cards):
    step = np.log10(GRID[1] / GRID[0]) if log else GRID[1] - GRID[0]
    first = np.log10(GRID[0]) if log else GRID[0]
    return fits.Header({"CRVAL1": first, "CDELT1": step, "CRPIX1": 1.0} | cards)


def images(first, **others):
    later = [fits.ImageHDU(values, name=name) for name, values in others.items()]
    return fits.HDUList([first, *later])


def bands():
    cube = np.zeros((4, 1, len(GRID)))
    cube[0, 0], cube[3, 0] = FLUX, ERROR
    return fits.PrimaryHDU(cube, header(BANDID1="spectrum", BANDID4="sigma - background fit"))


FITS = {
    "image.fits": lambda: images(fits.PrimaryHDU(FLUX, header()), ERROR=ERROR),
    "image with CD.fits": lambda: images(
        fits.PrimaryHDU(FLUX, header(CD1_1=GRID[1] - GRID[0])), SIGMA=ERROR
    ),
    "named images.fits": lambda: images(
        fits.PrimaryHDU(), FLUX=FLUX.astype("f4"), ERR=ERROR, WAVE=GRID
    ),
    "variance image.fits": lambda: images(
        fits.PrimaryHDU(), FLUX=FLUX, VARIANCE=ERROR**2, WAVELENGTH=GRID / 1e4
    ),
    "bands.fits": lambda: fits.HDUList([bands()]),
    "upper case.fits": lambda: fits.HDUList(
        [fits.PrimaryHDU(), fits.table_to_hdu(Table({"WAVE": GRID, "FLUX": FLUX, "ERR": ERROR}))]
    ),
    "one row.fits": lambda: fits.HDUList(
        [
            fits.PrimaryHDU(),
            fits.table_to_hdu(
                Table({"LOGLAM": [np.log10(GRID)], "FLUX": [FLUX], "SIGMA": [ERROR]})
            ),
        ]
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_fits_of_all_kinds(name, tmp_path):
    FITS[name]().writeto(tmp_path / name)
    check(read_star(tmp_path / name))


def test_a_logarithmic_image(tmp_path):
    grid = GRID[0] * (GRID[1] / GRID[0]) ** np.arange(len(GRID))
    card = header(log=True)
    card["DC-FLAG"] = 1
    primary = fits.PrimaryHDU(FLUX, card)
    images(primary, ERR=ERROR).writeto(tmp_path / "log.fits")
    star = read_star(tmp_path / "log.fits")
    assert np.allclose(star.wavelength, grid[: len(star.wavelength)], rtol=1e-8)


def test_orders_of_an_echelle(tmp_path):
    "IRAF's multispec: each order has its own wavelengths."
    half = len(GRID) // 2
    step = GRID[1] - GRID[0]
    places = [f"{GRID[k * half]:.6f} {step:.8f} {half} 0. 1. 1." for k in (0, 1)]
    text = "wtype=multispec " + " ".join(
        f'spec{k + 1} = "{k + 1} {k + 1} 0 {place}"' for k, place in enumerate(places)
    )
    cards = {f"WAT2_{k + 1:03d}": text[68 * k : 68 * k + 68] for k in range(len(text) // 68 + 1)}
    primary = fits.PrimaryHDU(FLUX.reshape(2, half), fits.Header(cards))
    images(primary, SIGMA=ERROR.reshape(2, half)).writeto(tmp_path / "echelle.fits")
    check(read_star(tmp_path / "echelle.fits"))
    images(primary).writeto(tmp_path / "bare.fits")
    with pytest.raises(LabError, match="no errors"):
        read_star(tmp_path / "bare.fits")


def test_other_containers(tmp_path):
    rows = Table({"wavelength": GRID, "flux": FLUX, "error": ERROR})
    rows.write(tmp_path / "a.vot", format="votable")
    rows.write(tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", [GRID, FLUX, ERROR])
    units = {"wave": GRID / 10 * u.nm, "flux": FLUX * u.Jy, "err": ERROR * 1_000 * u.mJy}
    QTable(units).write(tmp_path / "a.ecsv")
    for path in sorted(tmp_path.iterdir()):
        check(read_star(path))


def test_what_specutils_writes(tmp_path):
    specutils = pytest.importorskip("specutils")
    from astropy.nddata import StdDevUncertainty

    kind = getattr(specutils, "Spectrum", None) or specutils.Spectrum1D
    made = kind(
        spectral_axis=GRID * u.AA, flux=FLUX * u.Jy, uncertainty=StdDevUncertainty(ERROR * u.Jy)
    )
    made.write(tmp_path / "table.fits", format="tabular-fits")
    check(read_star(tmp_path / "table.fits"))


def test_missing_pixels_and_doubled_ones(tmp_path):
    flux = FLUX.copy()
    flux[::50] = -9999
    flux[1::50] = 0
    (tmp_path / "holes.csv").write_text(lines(rows=zip(GRID, flux, ERROR)))
    star = read_spectrum(tmp_path / "holes.csv")
    assert np.sum(star.ivar == 0) == 48
    assert "48 pixels without flux are left out" in star.stars.meta["notes"][0]
    words = lines(rows=zip(GRID, np.where(flux == 0, np.nan, FLUX), ERROR)).replace("nan", "NULL")
    (tmp_path / "words.csv").write_text(words)
    assert np.sum(read_spectrum(tmp_path / "words.csv").ivar == 0) == 24
    again = [*zip(GRID, FLUX, ERROR), *zip(GRID[:9], FLUX[:9] + 0.01, ERROR[:9])]
    (tmp_path / "twice.csv").write_text(lines(rows=[*again, *again[:3]]))
    star = read_spectrum(tmp_path / "twice.csv")
    error = star.ivar[0] ** -0.5 * star.stars.meta["level"]
    assert len(star.wavelength) == len(GRID)
    assert np.allclose(error[:9], 0.02 / np.sqrt(2), rtol=1e-4) and np.isclose(error[20], 0.02)


REFUSED = {
    "empty.csv": (b"", "is empty"),
    "names alone.csv": (b"wavelength,flux,error\n", "no rows"),
    "no errors.csv": (lines("{:.4f},{:.6f}", "wave,flux").encode(), "Labels without errors"),
    "page.csv": (b"<!DOCTYPE html>\n<html>404</html>", "a page of the web"),
    "prose.txt": (b"Dear observer,\nhere are my data. They are good.\n", "no table of text"),
    "isochrones.cmd": (b"# MIST version number = 1.2\n1 2 3\n", "isochrones"),
    "foreign.txt": (lines(names="Welle,Fluss,Fehler").encode(), "no column of flux and wavelength"),
    "picture.png": (b"\x89PNG\r\n\x1a\n" + bytes(99), "not a FITS file"),
    "optical.csv": (
        lines(rows=zip(GRID / 3, FLUX, ERROR)).encode(),
        "an optical spectrum in Angstrom",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_sentence_for_a_wrong_file(name, tmp_path):
    content, said = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LabError, match=said) as told:
        read_star(tmp_path / name)
    assert "\n" not in str(told.value)


def test_wrong_fits_and_numpy_are_named(tmp_path):
    fits.PrimaryHDU(np.zeros((50, 60))).writeto(tmp_path / "sky.fits")
    with pytest.raises(LabError, match="an image of 50 x 60 pixels"):
        read_star(tmp_path / "sky.fits")
    Table({"HIP": [1], "APOGEE_ID": ["2M"]}).write(tmp_path / "catalogue.fits")
    packed = gzip.compress((tmp_path / "catalogue.fits").read_bytes())
    (tmp_path / "catalogue.fits.gz").write_bytes(packed)
    with pytest.raises(LabError, match="an allStar table, a catalogue"):
        read_star(tmp_path / "catalogue.fits.gz")
    Table({"planet": [1], "mass": [2.0]}).write(tmp_path / "planets.fits")
    with pytest.raises(LabError, match="a table of planet, mass"):
        read_star(tmp_path / "planets.fits")
    np.save(tmp_path / "one.npy", GRID)
    with pytest.raises(LabError, match="one array of the shape"):
        read_star(tmp_path / "one.npy")
    two = Table({"wave": [GRID, GRID], "flux": [FLUX, FLUX], "err": [ERROR, ERROR]})
    two.write(tmp_path / "two.fits")
    with pytest.raises(LabError, match="holds 2 spectra, one per row"):
        read_star(tmp_path / "two.fits")
    whole = FITS["upper case.fits"]()
    whole.writeto(tmp_path / "whole.fits")
    (tmp_path / "cut.fits").write_bytes((tmp_path / "whole.fits").read_bytes()[:9_000])
    with pytest.raises(LabError, match="cut short"):
        read_star(tmp_path / "cut.fits")
