"""Judging: names stay whole, calibrated errors are not calibrated again, shapes must agree."""

import numpy as np
import pytest
from astropy.table import QTable
from conftest import make_spectra
from scipy.stats import chi2

from stellar_lab.cannon import Cannon
from stellar_lab.judging import (
    cross_label,
    error_table,
    mahalanobis2,
    plot_comparison,
    with_error_model,
)
from stellar_lab.models import ERROR_MODEL, apply_error_model, infer, label_values
from stellar_lab.survey import LabError
from stellar_lab.training import load_model

NAMES = ("TEFF", "LOGG", "FE_H")


def test_long_names_are_kept_whole():
    spectra = make_spectra()
    names = [f"star {'x' * (row // 10)}{row}" for row in range(len(spectra))]
    spectra.stars["APOGEE_ID"] = names
    table = cross_label(Cannon(order=1), spectra, np.arange(150) // 50, progress=False)
    assert list(table["apogee_id"]) == names


def test_the_order_is_that_of_the_stars():
    spectra = make_spectra()
    groups = np.arange(150) % 3
    table = cross_label(Cannon(order=1), spectra, groups, progress=False)
    assert list(table["apogee_id"]) == list(spectra.stars["APOGEE_ID"])
    by_hand = infer(Cannon(order=1).fit(spectra[groups != 1]), spectra[groups == 1])
    assert np.array_equal(table["teff"][groups == 1], by_hand["teff"])
    assert table.colnames == by_hand.colnames and table.meta["errors"] == "formal"
    with pytest.raises(LabError, match="100 groups for 150 stars"):
        cross_label(Cannon(order=1), spectra, groups[:100], progress=False)


def test_calibrated_errors_are_not_calibrated_again():
    spectra = make_spectra()
    truth = spectra.labels(NAMES)
    model = Cannon(order=1).fit(spectra)
    calibrated = with_error_model(model, infer(model, spectra), truth)
    with pytest.raises(LabError, match="errors are calibrated already"):
        with_error_model(model, infer(calibrated, spectra), truth)


def answers(labels, error):
    "A table of labels (N, K), formal errors up to `error` (K,) and covariance, as `infer` gives."
    table = QTable()
    for name, values, sigma in zip(NAMES, labels.T, error):
        table[name.lower()] = values
        table[f"{name.lower()}_err"] = sigma * np.linspace(0.1, 1, len(values))
    variances = label_values(table, [f"{name}_err" for name in NAMES]) ** 2
    table["covariance"] = variances[:, :, None] * np.eye(len(NAMES))
    return table


def test_floors_of_labels_that_err_together_are_correlated(tmp_path):
    spectra = make_spectra(2000)
    truth = spectra.labels(NAMES)
    model = Cannon(order=1).fit(spectra)
    right = np.array([[1, 0.8, 0], [0.8, 1, -0.5], [0, -0.5, 1]])
    error = 0.2 * truth.std(axis=0)
    rng = np.random.default_rng(3)
    seen = answers(truth + rng.multivariate_normal(np.zeros(3), right, 2000) * error, error / 10)
    half = np.arange(2000) % 2 == 0
    calibrated = with_error_model(model, seen[half], truth[half])
    assert np.allclose(calibrated.error_correlation_, right, atol=0.1)
    judged = seen[~half]
    labels = label_values(judged, NAMES)
    judged["covariance"] = apply_error_model(calibrated, judged["covariance"], labels)
    distance2 = mahalanobis2(judged, truth[~half], NAMES)
    for share in (0.68, 0.95):
        assert abs(np.mean(distance2 < chi2.ppf(share, 3)) - share) < 0.05
    calibrated.save(tmp_path / "model.asdf")
    again = load_model(tmp_path / "model.asdf")
    for name in set(ERROR_MODEL) & set(vars(calibrated)):
        assert np.array_equal(getattr(again, name), getattr(calibrated, name)), name


def test_what_a_mask_hides_is_not_judged_by():
    spectra = make_spectra()
    model = Cannon(order=1).fit(spectra[:100])
    table = infer(model, spectra[100:])
    truth = spectra[100:].labels(NAMES)
    hidden = np.zeros(truth.shape, bool)
    hidden[:3] = True
    wrong = np.ma.array(np.where(hidden, -9999, truth), mask=hidden)
    missing = np.where(hidden, np.nan, truth)
    masked = with_error_model(model, table, wrong)
    assert np.array_equal(masked.error_floor_, with_error_model(model, table, missing).error_floor_)
    assert np.sqrt(masked.error_floor_[0]) < 1000  # not the 9,999 that was hidden


@pytest.mark.filterwarnings("error")
def test_a_catalogue_may_state_no_error_of_a_label():
    spectra = make_spectra()
    model = Cannon(order=1).fit(spectra[:100])
    table = infer(model, spectra[100:])
    truth = spectra[100:].labels(NAMES)
    stated = np.full(truth.shape, 0.01)
    stated[:, 1] = np.nan
    noise = with_error_model(model, table, truth, stated).catalogue_noise_
    assert noise[1] == 0 and np.isfinite(noise).all()


def test_a_catalogue_cannot_err_beyond_all_numbers():
    spectra = make_spectra()
    model = Cannon(order=1).fit(spectra[:100])
    table = infer(model, spectra[100:])
    truth = spectra[100:].labels(NAMES)
    with pytest.raises(LabError, match=r"errors go up to 1e\+200: give them in the labels' units"):
        with_error_model(model, table, truth, np.full(truth.shape, 1e200))


@pytest.mark.parametrize("error", [np.inf, -1.0])
def test_impossible_errors_are_refused(error):
    spectra = make_spectra()
    model = Cannon(order=1).fit(spectra)
    table = infer(model, spectra)
    table["teff_err"][3] = error * table["teff_err"].unit
    with pytest.raises(LabError, match="1 errors in the table are negative or infinite"):
        with_error_model(model, table, spectra.labels(NAMES))


def test_shapes_must_agree():
    spectra = make_spectra()
    truth = spectra.labels(NAMES)
    model = Cannon(order=1).fit(spectra)
    table = infer(model, spectra)
    with pytest.raises(LabError, match=r"catalogue labels have the shape \(1, 3\)"):
        error_table(table, truth[:1], NAMES, truth.std(axis=0))
    with pytest.raises(LabError, match=r"catalogue labels have the shape \(150, 1\)"):
        with_error_model(model, table, truth[:, :1])


def test_one_name_is_not_a_row_of_letters():
    spectra = make_spectra()
    truth = spectra.labels(["LOGG"])
    table = infer(Cannon(order=1).fit(spectra), spectra)
    assert list(error_table(table, truth, "LOGG", [1.0])["label"]) == ["LOGG"]
    assert len(plot_comparison({"all": (table, truth)}, "LOGG")) == 1
    with pytest.raises(LabError, match="no label AGE"):
        error_table(table, truth, "AGE", [1.0])
