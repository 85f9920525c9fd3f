"""Normalization: properties that hold for any star, and the files that a user may bring."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import make_spectra
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_lab.cannon import Cannon
from stellar_lab.clean import read_files
from stellar_lab.normalize import (
    _CHIP_BITS,
    _fit_polynomials,
    _inliers,
    _plot_normalization,
    _unusable_pixels,
    as_trained,
    continuum,
    count_mask_bits,
    drop_masked,
    lab_continuum_pixels,
    normalize,
    read_continuum_pixels,
)
from stellar_lab.survey import (
    N_PIXELS,
    LabError,
    Spectra,
    chip_slices,
    full_wavelength,
    on_band,
    real_data,
    wavelength,
)

PIXELS = lab_continuum_pixels()
SLICES = chip_slices(wavelength)
few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def made_up(n_stars=4, seed=0, grid=wavelength, noisy=True):
    "Noisy parabolas with lines outside the continuum pixels."
    rng = np.random.default_rng(seed)
    x = (grid - 16_000) / 1_000
    bends = 1 + rng.uniform(-0.2, 0.2, (n_stars, 2)) @ [x, x**2]
    curve = rng.lognormal(5, 2, (n_stars, 1)) * bends
    lines = np.where(np.isin(grid, wavelength[PIXELS]), 0, rng.uniform(0, 0.5, len(grid)))
    flux = curve * (1 - lines)
    error = 0.01 * curve
    return make_spectra(
        grid=grid, names=(), flux=flux, error=error, noisy=noisy, seed=seed, normalized=False
    )


# ---- the fit


@few
@given(seeds, st.integers(1, 70), st.integers(1, 25), st.floats(0.01, 0.5))
def test_inliers_equal_a_plain_loop(seed, n_pixels, run, tolerance):
    rng = np.random.default_rng(seed)
    flux, good = rng.normal(1, 0.2, (3, n_pixels)), rng.random((3, n_pixels)) < rng.random()
    expected = np.zeros_like(good)
    for n in range(3):
        n_runs = max(n_pixels // run, 1)
        for r in range(n_runs):
            part = slice(r * run, n_pixels if r == n_runs - 1 else (r + 1) * run)
            if good[n, part].any():
                middle = np.median(flux[n, part][good[n, part]])
                expected[n, part] = good[n, part] & (
                    np.abs(flux[n, part] - middle) <= tolerance * abs(middle)
                )
    assert np.array_equal(_inliers(flux, good, run, tolerance), expected)


@few
@given(seeds, st.integers(0, 4), st.floats(0.2, 1))
def test_polynomials_equal_numpy(seed, degree, share):
    rng = np.random.default_rng(seed)
    x = np.linspace(-1, 1, 60)
    weights = rng.gamma(2, 1, (5, 60)) * (rng.random((5, 60)) < share)
    weights[:, ::10] += 0.1
    y = 100 + rng.standard_normal((5, 60))
    y[weights == 0] = np.nan
    coefficients, solvable = _fit_polynomials(x, y, weights, degree)
    for n in range(5):
        use = weights[n] > 0
        expected = np.polyfit(x[use], y[n, use], degree, w=np.sqrt(weights[n, use]))[::-1]
        assert solvable[n] and np.allclose(
            np.polyval(coefficients[n, ::-1], x), np.polyval(expected[::-1], x), rtol=1e-8
        )


@few
@given(seeds, st.floats(-6, 6))
def test_brightness_does_not_matter(seed, magnitude):
    spectra = made_up(seed=seed)
    scale = np.float32(10**magnitude)
    scaled = spectra.replace(flux=spectra.flux * scale, ivar=spectra.ivar / scale / scale)
    one, other = normalize(spectra), normalize(scaled)
    assert np.allclose(one.flux, other.flux, rtol=2e-6) and np.allclose(
        one.ivar, other.ivar, rtol=1e-5
    )


@few
@given(seeds)
def test_a_star_does_not_depend_on_its_neighbours(seed):
    spectra, rng = made_up(5, seed), np.random.default_rng(seed)
    spectra.ivar[rng.random(spectra.ivar.shape) < 0.2] = 0
    spectra.flux[3] = 0
    order = rng.permutation(5)
    together, shuffled = normalize(spectra), normalize(spectra[order], block=2)
    assert np.allclose(together.flux[order], shuffled.flux, rtol=1e-6)
    assert list(together.stars["APOGEE_ID"][order]) == list(shuffled.stars["APOGEE_ID"])
    assert list(together.stars["CHIPS_FAILED"][order]) == list(shuffled.stars["CHIPS_FAILED"])


@few
@given(seeds, st.floats(0, 1))
def test_nothing_dirty_comes_out_and_nothing_is_changed(seed, dirt):
    spectra, rng = made_up(seed=seed), np.random.default_rng(seed)
    dirty = rng.random(spectra.flux.shape) < dirt
    spectra.flux[dirty] = rng.choice([np.nan, np.inf, -np.inf, 0, -1e30, 1e30], dirty.sum())
    dirty = rng.random(spectra.flux.shape) < dirt
    spectra.ivar[dirty] = rng.choice([np.nan, np.inf, 0, -1, 1e-20, 1e30], dirty.sum())
    spectra.mask[rng.random(spectra.flux.shape) < dirt] = 4
    before = [np.copy(array) for array in (spectra.flux, spectra.ivar, spectra.mask)]
    result = normalize(spectra)
    assert (
        np.isfinite(result.flux).all()
        and np.isfinite(result.ivar).all()
        and (result.ivar >= 0).all()
    )
    assert np.all(result.ivar[spectra.mask != 0] == 0) and np.all(
        result.ivar[~(spectra.ivar > 0)] == 0
    )
    for name, chip in SLICES.items():
        assert np.all(result.ivar[result.stars["CHIPS_FAILED"] & _CHIP_BITS[name] > 0, chip] == 0)
    for old, new in zip(before, (spectra.flux, spectra.ivar, spectra.mask)):
        assert np.array_equal(old, new, equal_nan=old.dtype.kind == "f")


# ---- chips that cannot be trusted


@pytest.mark.parametrize("left, failed", [(11, True), (12, False)])
def test_a_chip_needs_twelve_pixels_without_a_bit(left, failed):
    spectra = made_up()
    blue = np.flatnonzero(PIXELS)[: PIXELS[SLICES["blue"]].sum()]
    spectra.mask[1, blue] = 1 << 10
    spectra.mask[1, blue[:: len(blue) // left][:left]] = 0
    assert list(normalize(spectra).stars["CHIPS_FAILED"]) == [0, _CHIP_BITS["blue"] * failed, 0, 0]


def test_outliers_are_counted_and_not_fitted():
    spectra = made_up(noisy=False)
    hit = np.flatnonzero(PIXELS)[[30, 300, 500]]
    clean = continuum(spectra)
    spectra.flux[2, hit] *= 1.2
    fit = continuum(spectra)
    assert (
        np.array_equal(np.flatnonzero(fit.rejected[2]), hit) and not fit.rejected[[0, 1, 3]].any()
    )
    assert np.allclose(fit.continuum, clean.continuum, rtol=1e-5)
    assert not continuum(spectra, tolerance=0.3).rejected.any()


def test_one_overwhelming_pixel_is_no_continuum():
    spectra = made_up()
    spectra.ivar[0, SLICES["red"]] *= 1e-15
    spectra.ivar[0, np.flatnonzero(PIXELS)[-3]] *= 1e15
    assert list(continuum(spectra).failed[0]) == [False, False, True]


def test_no_star_is_no_trouble():
    assert len(normalize(made_up()[:0])) == 0


# ---- grids and products


def test_full_grid_and_cut_grid_find_the_labs_pixels():
    assert normalize(made_up(grid=full_wavelength)).flux.shape == (4, N_PIXELS)
    cut = made_up()[:]
    chip = SLICES["green"]
    cut = Spectra(
        wavelength[chip], cut.flux[:, chip], cut.ivar[:, chip], cut.stars, cut.mask[:, chip]
    )
    assert np.allclose(normalize(cut).flux, normalize(made_up()).flux[:, chip], rtol=1e-6)
    with pytest.raises(LabError, match="have another: give continuum_pixels"):
        normalize(cut.replace(wavelength=cut.wavelength + 0.1))


def test_normalized_spectra_come_back():
    spectra = made_up()
    spectra.stars.meta["normalized"] = True
    assert normalize(spectra) is spectra


def test_float64_and_no_mask():
    spectra = made_up()
    wide = spectra.replace(
        flux=spectra.flux.astype(float), ivar=spectra.ivar.astype(float), mask=None
    )
    result = normalize(wide)
    assert result.flux.dtype == result.ivar.dtype == np.float32 and np.allclose(
        result.flux, normalize(spectra).flux, rtol=1e-6
    )


# ---- pixel lists


def written(folder, values, name="pixels.npy"):
    np.save(folder / name, values) if name.endswith(".npy") else np.savetxt(
        folder / name, values, fmt="%.2f", header="Angstrom"
    )
    return folder / name


@pytest.mark.parametrize(
    "values",
    [
        PIXELS,
        np.isin(np.arange(N_PIXELS), on_band[PIXELS]),
        PIXELS.astype(int),
        np.flatnonzero(PIXELS),
        wavelength[PIXELS],
    ],
    ids=["on-band flags", "full-grid flags", "0 and 1", "numbers", "wavelengths"],
)
def test_every_form_of_a_list_is_read(tmp_path, values):
    assert np.array_equal(read_continuum_pixels(written(tmp_path, values)), PIXELS)


def test_a_text_list_is_read(tmp_path):
    assert np.array_equal(
        read_continuum_pixels(written(tmp_path, wavelength[PIXELS], "pixels.txt")), PIXELS
    )


@pytest.mark.parametrize(
    "values, words",
    [
        (np.ones(7000, bool), "holds 7000 flags, but the grids have 7214"),
        (np.array([5, 7214]), "names pixel 7214, but the on-band pixels are numbered 0 to 7213"),
        (np.ones(N_PIXELS, bool), "1361 of 8575 pixels lie beside the chips"),
        (np.ones((2, 7214), bool), "an array of shape"),
        (np.array(["a"]), "give one row of flags"),
        (np.array([]), "give one row of flags"),
        (np.array([15800.0, 12000.0]), "1 of 2 wavelengths meet no pixel.*12000.00"),
        (np.array([np.nan]), "meet no pixel"),
        (np.array([{"a": 1}], dtype=object), "cannot read continuum pixels"),
    ],
)
def test_a_bad_list_is_an_error(tmp_path, values, words):
    path = tmp_path / "pixels.npy"
    np.save(path, values, allow_pickle=True)
    with pytest.raises(LabError, match=words) as error:
        read_continuum_pixels(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "name, content",
    [
        ("pixels.npy", b"not numpy"),
        ("pixels.npy", b""),
        ("pixels.txt", b"15800 ?"),
        ("pixels.txt", b"\xff\xfe"),
    ],
)
def test_a_file_that_is_no_list_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LabError, match="cannot read continuum pixels"):
        read_continuum_pixels(tmp_path / name)


def test_a_missing_list_is_an_error(tmp_path):
    with pytest.raises(LabError, match="cannot read continuum pixels from .*nowhere.txt"):
        read_continuum_pixels(tmp_path / "nowhere.txt")


# ---- as trained


def trained(grid=wavelength, **meta):
    "A Cannon of made-up normalized stars on a grid."
    return Cannon(order=1).fit(make_spectra(20, grid=grid, names=("TEFF",), **meta))


def test_as_trained_refuses_another_grid():
    raw = made_up()
    model = trained()
    assert as_trained(model, raw).stars.meta["normalized"]
    stretched = raw.replace(wavelength=raw.wavelength * 1.0001)
    normalized = make_spectra(2, names=())
    for spectra in (made_up(grid=full_wavelength), stretched, normalized):
        with pytest.raises(LabError, match="read the spectra on the model's grid"):
            as_trained(model, spectra)
    nameless = Cannon(order=1).fit(np.arange(20.0)[:, None], np.ones((20, 100)), label_names=["A"])
    with pytest.raises(LabError, match="have 7214 pixels .*, the model 100"):
        as_trained(nameless, raw)


@pytest.mark.parametrize(
    "meta, dark",
    [
        ({"product": "apstar", "dark": 0.05}, True),
        ({"product": "apstar", "dark": 0.0}, False),
        ({"product": "aspcapstar", "dark": 0.0}, True),
        ({}, True),
    ],
)
def test_dark_pixels_of_a_raw_star_lose_their_weight(meta, dark):
    raw = made_up(noisy=False)
    raw.flux[1, 3000] *= 0.01
    treated = as_trained(trained(**meta), raw)
    assert (treated.ivar[1, 3000] == 0) == dark
    assert np.all(treated.ivar[[0, 2, 3], 3000] > 0)


# ---- unusable pixels


def test_unusable_pixels_are_those_on_the_chips():
    spectra = made_up(grid=full_wavelength)
    spectra.ivar[:, : on_band[0]] = 0
    spectra.ivar[1, on_band[:10]], spectra.ivar[1, on_band[10]] = 0, np.nan
    assert list(_unusable_pixels(spectra)) == [0, 11, 0, 0]


@pytest.mark.parametrize(
    "rule", [{"degree": "two"}, {"degree": 1.5}, {"run": 0}, {"tolerance": "a"}, {"min_pixels": 1}]
)
def test_a_rule_that_makes_no_sense_is_an_error(rule):
    with pytest.raises(LabError, match=f"{next(iter(rule))} is .*: it must be"):
        normalize(made_up(), **rule)


def test_masked_stars_are_dropped_and_named():
    spectra = made_up()
    spectra.mask[1, :3001], spectra.mask[2, :3000] = 1 << 12, 1 << 12
    kept, ledger = drop_masked(normalize(spectra))
    assert list(kept.stars["APOGEE_ID"]) == ["star 0", "star 2", "star 3"]
    assert ledger.left == 3 and ledger.dropped == {"star 1": "masked"}
    assert len(drop_masked(normalize(spectra), limit=2999)[0]) == 2


def test_mask_bits_are_counted():
    spectra = made_up()
    spectra.mask[0, :10], spectra.mask[1, :5] = 1 << 12 | 1, 1 << 12
    bits = count_mask_bits(spectra)
    assert (
        dict(zip(bits["name"], bits["pixels"]))["SIG_SKYLINE"] == 15
        and bits["pixels"][0] == 10
        and bits["pixels"].sum() == 25
    )


def test_pictures_of_a_failed_chip():
    spectra = made_up(2)
    spectra.stars["SNR"] = 100.0
    spectra.ivar[0, SLICES["red"]] = 0
    figure = _plot_normalization(spectra)
    assert "failed: red" in figure.axes[0].get_title()
    plt.close(figure)


# ---- the survey's own files


@pytest.mark.skipif(real_data() is None, reason="STELLAR_LAB_REAL_DATA is not set")
def test_raw_files_of_the_survey():
    spectra, problems = read_files(sorted(real_data().glob("apStar-*.fits")), progress=False)
    result = normalize(spectra)
    assert not problems and np.isfinite(result.flux).all()
    assert np.all(result.ivar[spectra.mask != 0] == 0)
    fit = continuum(spectra)
    for n in range(len(spectra)):
        for chip, failed in zip(SLICES.values(), fit.failed[n]):
            level = np.median(
                spectra.flux[n, chip][fit.used[n, chip]] / fit.continuum[n, chip][fit.used[n, chip]]
            )
            assert failed or abs(level - 1) < 0.02


@pytest.mark.skipif(real_data() is None, reason="STELLAR_LAB_REAL_DATA is not set")
def test_persistence_makes_a_blue_chip_fail():
    spectra, _ = read_files(
        real_data() / "apStar-r6-2M00005143+5615568.fits", row=0, progress=False
    )
    assert normalize(spectra).stars["CHIPS_FAILED"][0] == _CHIP_BITS["blue"]


@pytest.mark.skipif(real_data() is None, reason="STELLAR_LAB_REAL_DATA is not set")
def test_the_labs_own_list():
    assert np.array_equal(read_continuum_pixels(real_data() / "pixels_cannon.npy"), PIXELS)
