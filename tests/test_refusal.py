"What no star like the training stars explains must be flagged; good stars must not."

import numpy as np
import pytest
from astropy.table import QTable, Table

from stellar_lab import Flag, Refusal, RidgeLabels, Spectra, infer, with_error_model
from stellar_lab.judging import errors_about_catalogue
from stellar_lab.models import flag_names
from stellar_lab.refusal import PIXEL_VELOCITY, QUESTIONS, foreign_columns
from stellar_lab.survey import LabError
from stellar_lab.training import dwarf_lights

PIXELS = 200


def stars(number, seed, shift=0.0, tilt=0.0, light=0.0):
    "Labels (N, 2) and spectra (N, P) of six lines, and what should not be there."
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=(number, 2))
    where = np.arange(PIXELS) - shift / PIXEL_VELOCITY
    flux = np.ones((number, PIXELS))
    for k, centre in enumerate(np.linspace(20, 180, 6)):
        depth = 0.3 + 0.05 * labels[:, [k % 2]]
        flux = flux - depth * np.exp(-0.5 * ((where - centre) / 2.5) ** 2)
    flux = (1 - light) * flux + light * other_light()
    flux = flux * (1 + tilt * np.linspace(-1, 1, PIXELS))
    flux = flux + 0.003 * rng.normal(size=flux.shape)
    return labels, flux.astype("f4"), np.full(flux.shape, 0.003**-2, "f4")


def other_light():
    return 1 - 0.4 * np.exp(-0.5 * ((np.arange(PIXELS) - 60) / 6) ** 2)


@pytest.fixture(scope="module")
def guard():
    return Refusal(hidden=1).fit(*stars(150, 1), ["A", "B"], lights={"other": other_light()})


def examined(guard, flux, ivar):
    some = Spectra(np.arange(float(PIXELS)), flux, ivar, Table({"ROW": np.arange(len(flux))}))
    return guard.examine(some, infer(guard, flux, ivar, min_good=0))


def test_each_fault_raises_its_flag_and_is_measured(guard):
    cases = {
        "velocity": (Flag.SHIFTED, 2.0, {"shift": 2.0}),
        "tilt": (Flag.TILTED, 0.05, {"tilt": 0.05}),
        "second_light": (Flag.SECOND_LIGHT, 0.3, {"light": 0.3}),
    }
    for name, (flag, size, fault) in cases.items():
        table = examined(guard, *stars(30, 7, **fault)[1:])
        assert np.all(np.asarray(table["flags"]) & flag), name
        found = np.asarray(getattr(table[name], "value", table[name]))
        assert abs(found.mean() / size - 1) < 0.25, name


def test_good_stars_keep_their_flags(guard):
    flags = np.asarray(examined(guard, *stars(200, 2)[1:])["flags"])
    assert np.mean(flags != 0) < 0.12


def test_a_star_without_pixels_is_not_flagged_twice(guard):
    _, flux, ivar = stars(3, 3)
    ivar[1] = 0
    table = examined(guard, flux, ivar)
    assert np.isnan(table["velocity"][1]) and np.isfinite(table["velocity"][0])
    assert flag_names(table["flags"])[1] == "NOT_CONVERGED FEW_PIXELS"


def test_it_does_not_matter_who_is_asked_with_whom(guard):
    _, flux, ivar = stars(130, 4, shift=1.0)
    together = examined(guard, flux, ivar)["velocity"].value
    alone = examined(guard, flux[7:9], ivar[7:9])["velocity"].value
    error = examined(guard, flux, ivar)["velocity_err"].value
    assert np.all(np.abs(together[7:9] - alone) < 1e-2 * error[7:9])


def test_columns_are_derivatives():
    line = 1 - 0.4 * np.exp(-0.5 * ((np.arange(80) - 40) / 3) ** 2)
    columns = foreign_columns(line[None].astype("f4"), [slice(0, 80)], np.ones((1, 80)))
    assert columns.shape == (1, 5, 80) and len(QUESTIONS) == 8
    moved = 1 - 0.4 * np.exp(-0.5 * ((np.arange(80) - 40.1) / 3) ** 2)
    assert np.allclose(columns[0, 0] * 0.1 * PIXEL_VELOCITY, moved - line, atol=2e-3)
    assert np.allclose(columns[0, 2], 1 - line, atol=1e-6)
    assert np.allclose(columns[0, 4], 1 - line, atol=1e-6)


def test_a_model_keeps_its_guard_and_a_new_fit_loses_it(guard, tmp_path):
    labels, flux, ivar = stars(60, 5)
    model = RidgeLabels().fit(labels, flux, ivar, ["A", "B"])
    model.refusal_ = guard
    model.save(tmp_path / "m.asdf")
    again = RidgeLabels.load(tmp_path / "m.asdf")
    wrong = stars(4, 6, shift=3.0)[1:]
    assert np.all(np.asarray(infer(again, *wrong)["flags"]) & Flag.SHIFTED)
    again.fit(labels, flux, ivar, ["A", "B"])
    assert not hasattr(again, "refusal_")
    model.refusal_ = RidgeLabels().fit(labels, flux, ivar, ["A", "B"])
    model.save(tmp_path / "n.asdf")
    with pytest.raises(LabError, match="guard of kind 'RidgeLabels'"):
        RidgeLabels.load(tmp_path / "n.asdf")


def test_synthetic_dwarfs_lend_their_light():
    wavelength = np.linspace(15_200, 15_300, 50)
    lights = dwarf_lights(wavelength)
    assert all(light.shape == (50,) and 0.3 < light.min() < 1 for light in lights.values())
    assert len(lights) == 3 and dwarf_lights(np.array([9_000.0])) == {}


def test_a_catalogues_noise_is_taken_off():
    rng = np.random.default_rng(0)
    model = RidgeLabels().fit(rng.normal(size=(60, 1)), rng.normal(size=(60, 30)), None, ["A"])
    truth, stated = rng.normal(size=(2000, 1)), rng.uniform(1, 3, (2000, 1))
    catalogue = truth + stated * rng.normal(size=truth.shape)
    table = QTable({"a": (truth + rng.normal(size=truth.shape))[:, 0], "a_err": np.ones(2000)})
    aware = with_error_model(model, table, catalogue, stated)
    unaware = with_error_model(model, table, catalogue)
    about_truth = np.sqrt(aware.error_inflation_ + aware.error_floor_)
    assert abs(about_truth - 1) < 0.25 and unaware.error_inflation_ + unaware.error_floor_ > 3
    answers = QTable({"a": [0.0], "a_err": about_truth})
    assert 2 < errors_about_catalogue(aware, answers)[0, 0] < 2.6
    with pytest.raises(LabError, match="one for each of 2000 stars"):
        with_error_model(model, table, catalogue, stated[:5])
