"A spectrum of one's own: what readers take and refuse, and that the model meets it."

import os

import astropy.units as u
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from stellar_lab.cannon import Cannon
from stellar_lab.inversion import infer
from stellar_lab.labelling import find_spectra, label, write_spectra
from stellar_lab.readers import RidgeLabels
from stellar_lab.spectrum import (
    LIGHT,
    check_star,
    from_arrays,
    from_specutils,
    from_table,
    holds_spectrum,
    interpolate,
    label_star,
    model_for,
    read_spectrum,
    resample,
)
from stellar_lab.survey import LabError, air_to_vacuum

pytest_plugins = ["forty_stars"]

GRID = np.linspace(15_200, 16_900, 2_000)
ONES = np.ones(2_000)


@pytest.fixture(scope="module")
def cannon(good_files):
    return Cannon(scatter=True, labels=["TEFF", "M_H"]).fit(good_files[1])


@pytest.fixture(scope="module")
def star(good_files):
    "Wavelengths, flux and ivar of one good star."
    spectra = good_files[1]
    return spectra.wavelength, spectra.flux[3], spectra.ivar[3]


def own(star, **options):
    grid, flux, ivar = star
    return from_arrays(grid, flux, ivar=ivar, unit="AA", **options)


@pytest.mark.parametrize("factor", [1, 0.1, 1e-4, 1e-10])
def test_the_unit_is_guessed(factor):
    assert np.allclose(from_arrays(GRID * factor, ONES, 0.1).wavelength, GRID)


@pytest.mark.parametrize("unit", [u.nm, u.um, u.AA])
def test_a_quantity_says_its_unit(unit):
    assert np.allclose(from_arrays((GRID * u.AA).to(unit), ONES, 0.1).wavelength, GRID)


def test_a_long_spectrum_in_nanometres_is_cut_to_our_range():
    grid = np.linspace(300, 2_500, 40_000)
    found = from_arrays(grid, np.ones(40_000), 0.1)
    assert found.wavelength[0] > 15_000 and found.wavelength[-1] < 17_100


def test_any_order_of_pixels():
    flux = np.arange(2_000.0) + 1
    usual = from_arrays(GRID, flux, 1.0)
    for order in (slice(None, None, -1), np.r_[1_000:2_000, 0:1_000]):
        other = from_arrays(GRID[order], flux[order], 1.0)
        assert np.array_equal(other.wavelength, usual.wavelength)
        assert np.array_equal(other.flux, usual.flux)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((np.linspace(4_000, 9_000, 500), np.ones(500), 0.1), "optical spectrum in Angstrom"),
        ((np.linspace(400, 900, 500), np.ones(500), 0.1), "optical spectrum in nm"),
        ((np.linspace(2.0, 2.4, 500), np.ones(500), 0.1), "another infrared band in micron"),
        ((GRID, ONES), "no errors are given"),
        ((GRID, ONES[:-1], 0.1), "lengths differ: 2000 wavelengths, 1999 values of flux"),
        ((GRID, ONES, np.ones(3)), "lengths differ: 2000 wavelengths, 3 values of error"),
        ((GRID, ONES, 0.1, ONES), "error and ivar are both given"),
        ((GRID, ONES, 0.0), "0 usable pixels"),
        ((GRID, ONES * np.nan, 0.1), "0 usable pixels"),
        ((np.full(2_000, np.nan), ONES, 0.1), "no finite wavelength"),
        ((np.r_[GRID[:-1], GRID[0]], ONES, 0.1), "1 wavelengths occur twice"),
        ((15_500 + np.arange(2_000) % 7 * 10.0, ONES, 0.1), "go up and down"),
    ],
)
def test_what_cannot_be_read_is_named(arguments, said):
    with pytest.raises(LabError, match=said):
        from_arrays(*arguments)


@pytest.mark.parametrize(
    "options", [{"velocity": np.nan}, {"velocity": "fast"}, {"resolution": 0}, {"unit": "kg"}]
)
def test_options_that_make_no_sense(options):
    with pytest.raises(LabError):
        from_arrays(GRID, ONES, 0.1, **options)


def test_bad_pixels_have_no_weight():
    error = np.full(2_000, 0.1)
    error[:5] = [0, -1, np.nan, np.inf, 0.1]
    flux = ONES.copy()
    flux[4] = np.nan
    ivar = from_arrays(GRID, flux, error).ivar[0]
    assert not ivar[:5].any() and np.allclose(ivar[5:], 100)


def test_tiny_flux_does_not_overflow():
    found = from_arrays(GRID, ONES * 1e-25, 1e-27)
    assert np.isfinite(found.ivar).all() and np.allclose(found.ivar, 1e4)


def test_air_and_velocity():
    found = from_arrays(GRID, ONES, 0.1, air=True, velocity=100.0, unit="AA")
    assert np.allclose(found.wavelength, air_to_vacuum(GRID) / (1 + 100 / LIGHT))


def test_units_of_flux_and_error_must_agree():
    with pytest.raises(LabError, match="its error in"):
        from_arrays(GRID, ONES * u.Jy, ONES * u.m)
    found = from_arrays(GRID, ONES * u.Jy, 100 * ONES * u.mJy)
    assert np.allclose(found.ivar, 100)


def test_specutils_without_uncertainty():
    with pytest.raises(LabError, match="no uncertainty"):
        from_specutils(type("Spectrum", (), {"spectral_axis": GRID * u.AA, "flux": ONES}))


def test_the_real_class_of_specutils():
    specutils = pytest.importorskip("specutils")
    from astropy.nddata import StdDevUncertainty

    kind = getattr(specutils, "Spectrum", None) or specutils.Spectrum1D
    spectrum = kind(
        spectral_axis=GRID * u.AA, flux=ONES * u.Jy, uncertainty=StdDevUncertainty(ONES * 0.1)
    )
    assert np.allclose(from_specutils(spectrum).ivar, 100)


def test_tables_without_a_column():
    table = Table({"wave": GRID, "counts": ONES})
    with pytest.raises(LabError, match="no column of flux: it has wave, counts"):
        from_table(table)
    with pytest.raises(LabError, match="holds no numbers"):
        from_table(Table({"wave": GRID, "flux": ["a"] * 2_000, "error": ONES}))


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.ecsv", "a.fits"])
def test_files(tmp_path, name):
    table = Table({"wavelength": GRID * u.AA, "flux": ONES, "ivar": np.full(2_000, 25.0)})
    formats = {".csv": "ascii.csv", ".txt": "ascii", ".ecsv": "ascii.ecsv", ".fits": "fits"}
    table.write(tmp_path / name, format=formats[(tmp_path / name).suffix])
    found = read_spectrum(tmp_path / name)
    assert np.allclose(found.wavelength, GRID) and np.allclose(found.ivar, 25)
    assert find_spectra(tmp_path / name) == [(str(tmp_path / name), "own")]


def test_images_of_one_axis(tmp_path):
    header = fits.Header({"CRVAL1": 15_200.0, "CDELT1": 0.5, "CRPIX1": 1, "SPEC_RES": 9_000.0})
    hdus = [fits.PrimaryHDU(np.ones(3_000), header), fits.ImageHDU(np.full(3_000, 0.1), name="ERR")]
    fits.HDUList(hdus).writeto(tmp_path / "i.fits")
    found = read_spectrum(tmp_path / "i.fits")
    assert np.isclose(found.wavelength[1], 15_200.5) and found.stars["RESOLUTION"][0] == 9_000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "no table of text|no column|no errors"),
        (b"wavelength,flux\n1.6,1\n1.61,1\n", "has no errors"),
        (b"# velocity: fast\nwavelength,flux,error\n1.6,1,1\n", "is no number"),
        (b"SIMPLE  =  broken", "."),
    ],
)
def test_files_that_hold_no_spectrum(tmp_path, content, said):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(LabError, match=said):
        read_spectrum(tmp_path / "x.csv")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(LabError, match="cannot read"):
        read_spectrum(tmp_path / "none.csv")


def test_resampling_keeps_the_information():
    rng = np.random.default_rng(0)
    grid = np.arange(0, 1_000, 1.7)
    new = np.arange(10, 900, 1.0)
    means = []
    for _ in range(400):
        flux, ivar = resample(grid, rng.standard_normal(len(grid)), np.ones(len(grid)), new)
        means.append((flux * ivar).sum() / np.sqrt(ivar.sum()))
    assert abs(np.std(means) - 1) < 0.12


def test_resampling_like_the_published_rule():
    flux, ivar = resample([3, 5, 13], [2.5, 4.5, 8.5], [1, 1, 1], [2, 6, 10])
    assert np.isnan(flux[0]) and ivar[0] == 0 and np.allclose(flux[1:], [4.5, 7.5])
    flux, ivar = resample([3, 5, 13], [2.5, np.nan, 8.5], [1, 0, 1], [2, 6, 10])
    assert not ivar.any()


def test_interpolation_knows_its_gaps():
    grid = np.r_[np.arange(15_200, 15_300, 0.2), np.arange(15_400, 15_500, 0.2)]
    _, ivar = interpolate(grid, np.ones(len(grid)), np.ones(len(grid)), [15_250.1, 15_350.0])
    assert ivar[0] > 0 and ivar[1] == 0


def test_the_same_grid_gives_the_same_labels(cannon, good_files, star):
    expected = infer(cannon, good_files[1][[3]])[0]
    found = label_star(cannon, own(star, velocity=0)).table[0]
    for name in ("teff", "m_h"):
        # formal errors, and another treatment of the continuum
        assert abs(found[name] - expected[name]) < 5 * expected[f"{name}_err"]
        assert 0.9 < found[f"{name}_err"] / expected[f"{name}_err"] < 1.5


def test_one_chip_has_larger_errors(cannon, star):
    grid, flux, ivar = star
    whole = label_star(cannon, own(star, velocity=0)).table[0]
    red = grid > 16_450
    part = label_star(cannon, own((grid[red], flux[red], ivar[red]), velocity=0)).table[0]
    assert part["teff_err"] > whole["teff_err"]


def test_too_small_a_part_is_refused(cannon, star):
    grid, flux, ivar = star
    few = (grid > 15_995) & (grid < 16_010)
    with pytest.raises(LabError, match="wider range"):
        label_star(cannon, own((grid[few], flux[few], ivar[few]), velocity=0))


def test_a_velocity_is_found_from_afar(cannon, star):
    grid, flux, ivar = star
    still = label_star(cannon, own(star)).table["velocity"][0].value
    for velocity in (-320.0, 250.0):
        moving = from_arrays(grid * (1 + velocity / LIGHT), flux, ivar=ivar, unit="AA")
        found = label_star(cannon, moving).table
        assert abs(found["velocity"][0].value - velocity - still) < 1


def test_noise_has_no_velocity(cannon):
    noise = np.random.default_rng(0).normal(1, 0.1, 2_000)
    with pytest.raises(LabError, match="resembles it"):
        label_star(cannon, from_arrays(GRID, noise, 0.1))


def test_nobody_waits_for_a_pipe(tmp_path):
    for name in ("mine.fits", "mine.dat", "mine"):
        os.mkfifo(tmp_path / name)
        assert not holds_spectrum(tmp_path / name) or name.endswith(".dat")
        with pytest.raises(LabError, match="not a file"):
            read_spectrum(tmp_path / name)


def test_the_velocity_is_measured_for_a_model_that_draws_no_spectra(star, good_files):
    ridge = RidgeLabels(labels=["TEFF", "M_H"]).fit(good_files[1])
    grid, flux, ivar = star
    still = label_star(ridge, own(star)).table
    moving = label_star(ridge, own((grid * (1 + 87.6 / 299_792.458), flux, ivar))).table
    speed = moving["velocity"][0].value - still["velocity"][0].value
    assert abs(speed - 87.6) < 0.5 and 0 < moving["velocity_err"][0].value < 1
    assert abs(moving["teff"][0] - still["teff"][0]) < 2 * still["teff_err"][0]


def test_readers_get_the_star_resampled(good_files, star):
    ridge = RidgeLabels(labels=["TEFF", "M_H"]).fit(good_files[1])
    found = label_star(ridge, own(star, velocity=0)).table
    usual = infer(ridge, good_files[1][[3]])
    assert abs(found["teff"] - usual["teff"])[0] < 0.3 * good_files[1].labels(["TEFF"]).std() * u.K
    with pytest.raises(LabError, match="take a Cannon"):
        label_star(ridge, own(star, velocity=0, resolution=5_000))


def test_a_model_without_wavelengths(good_files, star):
    spectra = good_files[1]
    bare = Cannon(order=1).fit(spectra.labels(), spectra.flux, spectra.ivar)
    with pytest.raises(LabError, match="does not know its wavelengths"):
        label_star(bare, own(star, velocity=0))


def test_the_model_itself_is_left_alone(cannon, star):
    before = cannon.theta_.copy()
    there, spectra = model_for(cannon, own(star, velocity=0))
    assert np.array_equal(cannon.theta_, before, equal_nan=True)
    assert len(there.theta_) == len(spectra.wavelength) and not hasattr(cannon, "hidden_")


def test_check_finds_air(cannon, star):
    grid, flux, ivar = star
    in_air = from_arrays(grid / 1.0002731, flux, ivar=ivar, velocity=0, unit="AA")
    verdicts = {v.what: v for v in check_star(cannon, in_air).verdicts}
    assert verdicts["air or vacuum"].verdict == "bad" and "air" in verdicts["velocity"].advice


def write_own(star, path):
    grid, flux, ivar = star
    good = ivar > 0
    table = Table({"wave_nm": grid[good] / 10, "flux": flux[good], "error": ivar[good] ** -0.5})
    table.write(path, format="ascii.csv")
    return path


def test_commands(run, model, star, tmp_path):
    path = write_own(star, tmp_path / "my.csv")
    code, out, _ = run("label", "--model", model, path, "--out", tmp_path / "l.fits")
    assert code == 0 and "velocity measured" in out
    code, out, _ = run("check", path, "--model", model, "--plot", tmp_path / "c.png")
    assert code in (0, 1) and "resolution" in out and (tmp_path / "c.png").stat().st_size > 10_000
    code, _, err = run("check", tmp_path / "none.csv", "--model", model)
    assert code == 2 and "none.csv" in err and err.count("\n") == 1


def test_own_and_survey_files_in_one_table(model, good_files, star, tmp_path):
    path = write_own(star, tmp_path / "my.csv")
    table = label(model, [path, good_files[0][3]], progress=False).table
    assert len(table) == 2 and np.isfinite(np.asarray(table["velocity"].value)).sum() == 1
    assert abs(np.diff(table["teff"].value)[0]) < table["teff_err"].value[0]


def test_spectra_and_pictures(run, model, good_files, star, tmp_path):
    path = write_own(star, tmp_path / "my.csv")
    words = ("label", "--model", model, path, good_files[0][3], "--out", tmp_path / "l.fits")
    code, out, _ = run(*words, "--spectra", tmp_path / "s.fits", "--plot", tmp_path / "p")
    assert code == 0 and "2 pictures" in out and len(list((tmp_path / "p").iterdir())) == 2
    with fits.open(tmp_path / "s.fits") as hdus:
        assert hdus["MODEL"].shape == (1, 8575) and len(hdus["STAR1"].data) > 5_000
        flux, made, rest = (hdus[name].data for name in ("FLUX", "MODEL", "RESIDUAL"))
        assert np.allclose(flux - made, rest, atol=1e-6, equal_nan=True)


def test_readers_draw_no_spectra(good_files, tmp_path):
    ridge = RidgeLabels(labels=["TEFF", "M_H"]).fit(good_files[1])
    table = label(ridge, good_files[0][3], progress=False).table
    with pytest.raises(LabError, match="draws no spectra"):
        write_spectra(ridge, table, tmp_path / "s.fits")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"resolution": 0}, "resolution is 0"),
        ({"resolution": np.zeros(900)}, "no pixel has a resolution"),
        ({"fwhm": np.ones(5)}, "lengths differ: 900 wavelengths, 5 values of fwhm"),
        ({"fwhm": 0.1, "resolution": 9_000}, "both given"),
    ],
)
def test_resolutions_that_are_none(how, said):
    grid = np.linspace(1520, 1690, 900)
    with pytest.raises(LabError, match=said):
        from_arrays(grid, np.ones(900), 0.01, **how)


def test_a_width_for_each_pixel_follows_the_order_of_the_pixels():
    grid = np.linspace(1690, 1520, 900)  # nm, the red end first
    star = from_arrays(grid, np.ones(900), 0.01, fwhm=grid / np.linspace(5_000, 20_000, 900))
    assert np.allclose(star.stars.meta["resolution"][[0, -1]], [20_000, 5_000])
    assert abs(star.stars["RESOLUTION"][0] - 12_500) < 20
    alone = from_arrays(grid, np.ones(900), 0.01, fwhm=grid / 9_000)
    assert np.isclose(alone.stars["RESOLUTION"][0], 9_000)


def test_the_width_of_apogees_profile():
    from stellar_lab.spectrum import lsf_fwhm

    plain = [0, 0, 0, 1, 1.0, 0.01, 1, 2, 0, 0, 0.0, 9.0]  # sigma 1 + 0.01 x
    assert np.allclose(lsf_fwhm(plain, [0, 100]), [2.355, 4.71], rtol=0.01)
    binned = [2, *plain[1:]]
    assert np.isclose(
        lsf_fwhm(binned, [100])[0], np.hypot(4.71, 2 / np.sqrt(12) * 2.355), rtol=0.02
    )


def test_a_number_that_no_star_has_is_counted(star):
    grid, flux, ivar = star
    usual = own(star)
    assert usual.stars["STRANGE_PIXELS"][0] == 0
    flux = flux.copy()
    place = np.flatnonzero(ivar > 0)[3000]
    flux[place] = 1e30
    strange = from_arrays(grid, flux, ivar=ivar, unit="AA")
    assert strange.stars["STRANGE_PIXELS"][0] == 1 and np.abs(strange.flux).max() < 100
    ivar = np.where(np.arange(len(ivar)) % 3, ivar, 1e-30)  # many odd ones are no few odd ones
    assert from_arrays(grid, star[1], ivar=ivar, unit="AA").stars["STRANGE_PIXELS"][0] == 0


def test_a_pipe_is_no_spectrum(tmp_path):
    os.mkfifo(tmp_path / "my.csv")
    with pytest.raises(LabError, match="a named pipe, not a file"):
        read_spectrum(tmp_path / "my.csv")


def test_lone_pixels_do_not_matter(star):
    "A pixel far from all others has no neighbours to interpolate between."
    grid = np.concatenate([[15_200.0], np.linspace(15_300, 16_900, 5000)])
    flux, weight = interpolate(grid, np.ones(5001), np.ones(5001), np.array([15_200.0, 16_000.0]))
    assert flux[1] == pytest.approx(1) and weight[0] == 0 < weight[1]


def test_names_of_columns_are_made_harmless(tmp_path):
    (tmp_path / "my.csv").write_text("\x1b[2J,b\n1,2\n3,4\n")
    with pytest.raises(LabError) as refused:
        read_spectrum(tmp_path / "my.csv")
    assert "\x1b" not in str(refused.value)


def test_checksums_of_own_files_are_looked_at(star, tmp_path):
    grid, flux, ivar = star
    good = ivar > 0
    table = Table({"wavelength": grid[good], "flux": flux[good], "error": ivar[good] ** -0.5})
    path = tmp_path / "my.fits"
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU(table)]).writeto(path, checksum=True)
    assert read_spectrum(path).stars["VERIFIED"][0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(LabError, match="does not fit its checksum"):
        read_spectrum(path)
