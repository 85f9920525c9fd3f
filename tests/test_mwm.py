"Files of SDSS-V: what is read, what is refused, and that label takes them."

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from stellar_lab.labelling import find_spectra
from stellar_lab.mwm import made_mwm, mwm_kind, mwm_stars, read_astra, read_mwm
from stellar_lab.survey import RELEASES, LabError, sdss_id_folder

pytest_plugins = ["forty_stars"]


@pytest.fixture
def star(good_files):
    return good_files[1][[3]]


def written(hdus, path, checksum=True):
    "The file, with checksums that fit what the test has changed."
    hdus.writeto(path, overwrite=True, checksum=checksum)
    return path


def test_paths():
    release = RELEASES["dr19"]
    path = release.path("mwmstar", sdss_id_folder(5), "5")
    assert path.endswith("spectra/star/00/05/mwmStar-0.6.0-5.fits")
    assert sdss_id_folder(123_456) == "34/56"
    with pytest.raises(LabError, match="choose from mwmstar, mwmvisit"):
        release.path("apstar", "00/05", "5")


def test_a_star_comes_back(star, tmp_path):
    found = read_mwm(written(made_mwm(lco=star), tmp_path / "any.fits"))
    assert np.array_equal(found.flux, star.flux) and found.stars["TELESCOPE"][0] == "lco25m"
    assert mwm_kind(tmp_path / "any.fits") == "mwmstar"
    assert find_spectra(tmp_path / "any.fits") == [(str(tmp_path / "any.fits"), "mwmstar")]


def test_other_files_are_none(good_files, tmp_path):
    (tmp_path / "x.fits").write_bytes(b"SIMPLE")
    assert mwm_kind(good_files[0][0]) is None and mwm_kind(tmp_path / "x.fits") is None
    with pytest.raises(LabError):
        read_mwm(tmp_path / "x.fits")
    with pytest.raises(LabError, match="cannot read"):
        read_mwm(tmp_path / "none.fits")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda star: made_mwm(boss=True), "BOSS/APO only, optical spectra"),
        (lambda star: made_mwm(), "all extensions are empty"),
    ],
)
def test_without_an_apogee_spectrum(star, tmp_path, made, said):
    with pytest.raises(LabError, match=said):
        read_mwm(written(made(star), tmp_path / "mwmStar-0.6.0-1.fits"))


def test_another_observatory(star, tmp_path):
    path = written(made_mwm(apo=star), tmp_path / "mwmStar-0.6.0-1.fits")
    with pytest.raises(LabError, match="no spectrum from lco: it has apo"):
        read_mwm(path, "lco")


def test_a_file_cut_short(star, tmp_path):
    path = written(made_mwm(apo=star), tmp_path / "mwmStar-0.6.0-1.fits")
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(LabError):
        read_mwm(path)


def test_another_grid(star, tmp_path):
    hdus = made_mwm(apo=star, sdss_id=1)
    hdus["APOGEE/APO"].data["wavelength"] += 1
    with pytest.raises(LabError, match="another wavelength grid"):
        read_mwm(written(hdus, tmp_path / "mwmStar-0.6.0-1.fits"))


def test_bad_values_have_no_weight(star, tmp_path):
    hdus = made_mwm(apo=star, sdss_id=1)
    hdus["APOGEE/APO"].data["flux"][0, 4000] = np.nan
    hdus["APOGEE/APO"].data["ivar"][0, 4001] = np.inf
    hdus["APOGEE/APO"].data["ivar"][0, 4002] = -1
    found = read_mwm(written(hdus, tmp_path / "mwmStar-0.6.0-1.fits"))
    assert np.isfinite(found.flux).all() and np.isfinite(found.ivar).all()
    assert np.all(found.ivar >= 0)


def test_the_catalogue(tmp_path):
    rows = Table(
        {"sdss_id": [1, 2], "teff": [4500.0, np.nan], "fe_h": [0.1, 0.2], "mg_h": [0.4, 0.2]}
    )
    hdus = fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU(), fits.table_to_hdu(rows)])
    table = read_astra(written(hdus, tmp_path / "a.fits"))
    assert np.allclose(table["MG_FE"], [0.3, 0.0]) and np.isnan(table["TEFF"][1])
    with pytest.raises(LabError, match="has no LOGG"):
        read_astra(tmp_path / "a.fits", ["logg"])
    with pytest.raises(LabError, match="no table in HDU 5"):
        read_astra(tmp_path / "a.fits", hdu=5)


def test_learning(star, tmp_path):
    rows = Table({"sdss_id": [1, 2], "teff": [4500.0, 4600.0], "flag_bad": [False, True]})
    hdus = fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU(), fits.table_to_hdu(rows)])
    catalogue = read_astra(written(hdus, tmp_path / "a.fits"))
    paths = []
    for sdss_id in (1, 2, 3):
        paths.append(tmp_path / f"mwmStar-0.6.0-{sdss_id}.fits")
        written(made_mwm(star, sdss_id=sdss_id), paths[-1])
    stars, ledger = mwm_stars(paths, catalogue)
    assert stars.labels(["TEFF"])[:, 0].tolist() == [4500, 4600]
    assert stars.stars["FLAG_BAD"].tolist() == [0, 1] and ledger.dropped.keys() == {"3"}
    with pytest.raises(LabError, match="no star is left"):
        mwm_stars(paths[2:], catalogue)


def test_label_takes_them(model, star, run, tmp_path):
    good = written(made_mwm(star, star, sdss_id=1), tmp_path / "mwmStar-0.6.0-1.fits")
    three = star[[0, 0, 0]]
    visits = made_mwm(three, sdss_id=1, visits=True)
    visits = written(visits, tmp_path / "mwmVisit-0.6.0-1.fits")
    boss = written(made_mwm(boss=True, sdss_id=2), tmp_path / "mwmStar-0.6.0-2.fits")
    words = ("label", "--model", model, good, visits, boss, "--out", tmp_path / "l.fits")
    code, out, err = run(*words)
    assert code == 1 and "optical spectra" in err and "2 of 3" in out
    assert len(Table.read(tmp_path / "l.fits")) == 4


def test_a_changed_bit_is_told_by_the_checksum_of_the_file(star, tmp_path):
    path = written(made_mwm(apo=star), tmp_path / "any.fits")
    assert read_mwm(path).stars["VERIFIED"].all()
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(LabError, match="does not fit its checksum"):
        read_mwm(path)


def test_another_star_than_the_name_says(star, tmp_path):
    path = written(made_mwm(apo=star, sdss_id=7), tmp_path / "mwmStar-0.6.0-8.fits")
    with pytest.raises(LabError, match="holds another star: its table says 7, its name 8"):
        read_mwm(path)


def test_numbers_that_no_star_has_are_counted(star, tmp_path):
    hdus = made_mwm(apo=star)
    table = next(hdu for hdu in hdus[1:] if hdu.header["NAXIS2"])
    table.data["flux"][..., 4000] = 1e30
    hdus[0].header["DEC"] = 1e300
    for hdu in hdus:
        for key in ("CHECKSUM", "DATASUM"):
            hdu.header.remove(key, ignore_missing=True)
    found = read_mwm(written(hdus, tmp_path / "any.fits", checksum=False))
    assert found.stars["STRANGE_PIXELS"][0] == 1 and np.isnan(found.stars["DEC"][0])
    assert not found.stars["VERIFIED"][0] and np.abs(found.flux).max() < 1e6
