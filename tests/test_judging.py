"""Judging: names stay whole, calibrated errors are not calibrated again, shapes must agree."""

import numpy as np
import pytest
from conftest import make_spectra

from stellar_lab.cannon import Cannon
from stellar_lab.judging import cross_label, error_table, plot_comparison, with_error_model
from stellar_lab.models import infer
from stellar_lab.survey import LabError

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
