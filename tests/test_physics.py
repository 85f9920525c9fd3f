"""Labels without a survey: properties of the pieces, faults that a user can cause, stars that must be flagged, the recorded networks."""

import numpy as np
import pytest
from astropy.table import QTable, Table
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_lab import sky as rooms
from stellar_lab.archives import real_stars
from stellar_lab.models import Flag
from stellar_lab.physics import (
    KNOWN,
    SKY_LABELS,
    Correction,
    SyntheticSky,
    draw_stars,
    known_rows,
    learn_correction,
    literature_fe_h,
    literature_scale,
    redraw,
    sky_model,
)
from stellar_lab.survey import LabError, Spectra, data_file, real_data, wavelength


@pytest.fixture(scope="module")
def sky():
    return SyntheticSky()


@pytest.fixture(scope="module")
def real():
    return redraw(real_stars())


@pytest.fixture(scope="module")
def model(sky, real):
    mine = real[np.isin(np.asarray(real.stars["CLUSTER"], str), rooms.CALIBRATION_CLUSTERS)]
    return sky_model(mine, sky, rounds=1, known={"FE_H": literature_fe_h(mine)})


def stars(flux, ivar=1e6):
    return Spectra(
        wavelength,
        flux.astype("f4"),
        np.full(flux.shape, ivar, "f4"),
        Table({"STAR": np.arange(len(flux))}),
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 200))
def test_drawn_stars_repeat_grow_and_stay_in_their_ranges(seed, n):
    labels = draw_stars(n, seed)
    assert labels.shape == (n, len(SKY_LABELS)) and np.isfinite(labels).all()
    assert np.array_equal(labels, draw_stars(n, seed))
    assert (
        labels[:, 0].min() > 3600
        and np.all((labels[:, -1] >= 12) & (labels[:, -1] <= 17))
        and np.all((labels[:, 8] >= 0.9) & (labels[:, 8] <= 2.3))
    )


@settings(deadline=None, max_examples=25)
@given(st.floats(0.3, 3.0), st.floats(-0.05, 0.05), st.integers(0, 1000))
def test_a_correction_of_one_gain_is_found_again(gain, offset, seed):
    flux = 1 - np.random.default_rng(seed).uniform(0.1, 0.5, (20, 50)).astype("f4")
    correction = learn_correction(
        Spectra(
            wavelength[:50],
            1 - np.float32(gain) * (1 - flux),
            np.ones_like(flux),
            Table({"STAR": np.arange(20)}),
        ),
        flux,
    )
    assert np.allclose(correction.gain, gain, atol=1e-3) and np.allclose(
        correction.offset, 0, atol=1e-3
    )


@settings(deadline=None, max_examples=25)
@given(st.floats(0.5, 2), st.floats(-0.5, 0.5), st.integers(0, 1000))
def test_the_line_of_the_scale_is_found_again_whatever_the_numbers_of_stars(slope, intercept, seed):
    rng = np.random.default_rng(seed)
    literature = np.repeat([-0.8, -0.3, 0.0, 0.1], rng.integers(5, 40, 4))
    fitted = (literature - intercept) / slope
    fitted[rng.choice(len(fitted), 2, replace=False)] = [
        3.0,
        np.nan,
    ]  # a star gone astray and one without an answer do not matter
    assert np.allclose(literature_scale(fitted, literature), (slope, intercept), atol=1e-6)


def test_what_is_known_holds_for_an_ordinary_giant():
    rows, values = known_rows()
    star = np.array([4600, 2.4, 0.0, 0, 0, 0, -0.05, 0.2, 2.24 - 0.72, 13.8])
    assert len(rows) == len(KNOWN) and np.allclose(rows @ star, values)


def test_the_continuum_is_forgotten_and_nothing_given_is_changed(real):
    few = real[:3]
    before = few.flux.copy()
    again = redraw(few.replace(flux=few.flux * np.float32(1.05)))
    assert np.array_equal(few.flux, before) and again.stars.meta["normalized"]
    assert np.abs(again.flux - few.flux)[few.ivar > 0].max() < 1e-3


def test_broader_stars_are_shallower(sky):
    star = np.array(
        [[4300, 1.8, 0.0, 0, 0, 0, -0.05, 0.2, 1.7, width] for width in (12.0, 14.0, 17.0)]
    )
    depth = 1 - sky(star).min(axis=1)
    assert depth[0] > depth[1] > depth[2]


def test_a_correction_on_the_cannon_is_the_correction_of_its_spectra(model, sky):
    rng = np.random.default_rng(1)
    correction = Correction(
        rng.uniform(0.5, 2, 7214), rng.normal(0, 0.01, 7214), np.full(7214, 0.01)
    )
    at = draw_stars(5, 7)
    assert np.allclose(
        rooms.corrected_cannon(model.cannon, correction).predict(at),
        correction(model.cannon.predict(at)),
        atol=1e-5,
    )


def test_labels_do_not_hang_on_neighbours_or_order(model, real):
    rows = np.flatnonzero(np.asarray(real.stars["CLUSTER"], str) == "NGC 6819")[:4]
    together, flux = model.label(real[rows])
    alone, _ = model.label(real[rows[2:3]])
    turned, _ = model.label(real[rows[::-1]])
    for name in ("teff", "logg", "fe_h"):
        assert np.isclose(alone[name][0].value, together[name][2].value, rtol=1e-3, atol=2e-3)
        assert np.allclose(turned[name][::-1].value, together[name].value, rtol=1e-3, atol=2e-3)
    assert (
        flux.shape == (4, 7214)
        and not together["flags"].any()
        and np.all(together["correlation"] > 0.95)
    )


def test_what_is_no_giant_is_flagged(model, real):
    dwarfs = real[real.labels(("LOGG",))[:, 0] > 3.8]
    assert np.all(model.label(dwarfs[::4])[0]["flags"] > 0)
    nonsense = stars(1 + 0.1 * np.random.default_rng(0).standard_normal((2, 7214)), 1e4)
    assert np.all(model.label(nonsense)[0]["flags"] > 0)


def test_a_star_without_pixels_is_flagged_and_does_not_spoil_its_neighbour(model, real):
    row = np.flatnonzero(np.asarray(real.stars["CLUSTER"], str) == "M67")[0]
    pair = real[[row, row]].replace(ivar=real.ivar[[row, row]] * np.array([[1], [0]], "f4"))
    table, _ = model.label(pair)
    assert table["flags"][1] & Flag.FEW_PIXELS and not table["flags"][0]


def test_faults_are_named(model, real):
    with pytest.raises(LabError, match="no star"):
        learn_correction(real[:0], real.flux[:0])
    short = Spectra(wavelength[:100], real.flux[:1, :100], real.ivar[:1, :100], real.stars[:1])
    with pytest.raises(LabError, match="pixels"):
        model.label(short)
    with pytest.raises(LabError, match="set no scale"):
        literature_scale(np.zeros(5), np.full(5, -0.3))
    with pytest.raises(LabError, match="no label M_H to hold"):
        sky_model(real[:2], model.sky, 1, model.cannon, known={"M_H": np.zeros(2)})
    stranger = real[:1].replace(stars=Table({"CLUSTER": ["NGC 1"]}))
    with pytest.raises(LabError, match="no cluster NGC 1"):
        literature_fe_h(stranger)


@pytest.mark.skipif(real_data() is None, reason="STELLAR_LAB_REAL_DATA is not set")
def test_the_mystery_star_is_reproduced(model):
    from stellar_lab.clean import read_files
    from stellar_lab.normalize import normalize

    spectra, _ = read_files([real_data() / "mystery_spec_wiped.fits"], progress=False)
    table, _ = model.label(redraw(normalize(spectra)))
    assert table["correlation"][0] > 0.95 and not table["flags"][0]


def test_recorded_networks_are_complete():
    with data_file(rooms.TUNING_FILE) as path:
        table = QTable.read(path, format="ascii.ecsv")
    assert set(table["label"]) == set(rooms.TUNING_LABELS) and np.isfinite(table["rmse"]).all()
    assert {"command", "date", "stars", "tensorflow", "emulator_models"} <= set(table.meta)


def test_a_network_sees_synthetic_stars_first(sky, real):
    giants = real[np.flatnonzero(real.labels(("LOGG",))[:, 0] < 3.8)[::12]]
    synthetic = rooms.noisy_stars(sky, giants, n=32)
    options = dict(labels=rooms.TUNING_LABELS, members=1, width=4, components=4, epochs=0)
    spectra = [
        network.fit(giants, progress=False).core_.get_weights()
        for network in (
            rooms.synthetic_first(None, **options),
            rooms.synthetic_first(synthetic, first_epochs=1, **options),
        )
    ]
    assert any(not np.array_equal(a, b) for a, b in zip(*spectra))
