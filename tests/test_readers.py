"""Readers without TensorFlow: ridge regression in folds, bad pixels, stars without an answer."""

import numpy as np
import pytest
from astropy.table import Table

from stellar_lab import readers
from stellar_lab.judging import cross_label
from stellar_lab.models import Flag, infer
from stellar_lab.readers import RidgeLabels
from stellar_lab.survey import LabError, Spectra

NAMES = ["TEFF", "LOGG", "M_H"]


def stars(n=200, pixels=40, seed=0, bad=0.1):
    rng = np.random.default_rng(seed)
    labels = rng.normal([4500, 2, -0.3], [300, 0.7, 0.4], size=(n, 3))
    slopes = 0.05 * np.random.default_rng(1).normal(size=(3, pixels))
    flux = (
        0.9
        + (labels - [4500, 2, -0.3]) / [300, 0.7, 0.4] @ slopes
        + 0.01 * rng.normal(size=(n, pixels))
    )
    ivar = np.where(rng.random((n, pixels)) < bad, 0, 1e4).astype("f4")
    table = Table(
        {"APOGEE_ID": [f"2M{k}" for k in range(n)], **dict(zip(NAMES, labels.T))},
        meta={"product": "apstar", "normalized": True},
    )
    return Spectra(np.linspace(15200, 15300, pixels), flux.astype("f4"), ivar, table)


def test_in_folds():
    spectra = stars()
    table = cross_label(
        RidgeLabels(labels=NAMES), spectra, np.arange(len(spectra)) % 3, progress=False
    )
    assert np.sqrt(np.mean((table["teff"].value - spectra.labels(["TEFF"])[:, 0]) ** 2)) < 0.5 * 300


def test_bad_pixels_do_not_matter_and_blocks_are_seamless(monkeypatch):
    ridge = RidgeLabels(labels=NAMES).fit(stars())
    spectra = stars(30, seed=4)
    before = spectra.flux.copy()
    whole = infer(ridge, spectra)
    nonsense = np.where(spectra.ivar > 0, spectra.flux, np.nan).astype("f4")
    np.testing.assert_array_equal(ridge.read(nonsense, spectra.ivar), ridge.read(spectra))
    np.testing.assert_array_equal(spectra.flux, before)
    monkeypatch.setattr(readers, "_READ_BLOCK", 7)
    np.testing.assert_allclose(infer(ridge, spectra)["logg"].value, whole["logg"].value, rtol=1e-5)


def test_a_reader_that_has_no_answer_is_flagged_not_fatal():
    class Silent(RidgeLabels):
        def _read(self, flux, ivar):
            labels, covariance = super()._read(flux, ivar)
            labels[0] = np.nan
            return labels, covariance

    sample = stars(60)
    table = infer(Silent(labels=NAMES).fit(sample), sample)
    assert (
        np.isnan(table["teff"][0])
        and np.all(np.isnan(table["covariance"][0]))
        and table["flags"][0] & Flag.NOT_CONVERGED
    )
    assert np.all(np.isfinite(table["teff"][1:].value))


def test_read_refuses_what_infer_refuses():
    ridge = RidgeLabels(labels=NAMES).fit(stars())
    spectra = stars(5, seed=4, bad=0)
    broken = spectra.flux.copy()
    broken[3, 7] = np.nan
    for ask in (ridge.read, lambda *asked: infer(ridge, *asked)):
        with pytest.raises(LabError, match="star 3 has a usable pixel without a finite flux"):
            ask(broken, spectra.ivar)
        with pytest.raises(LabError, match="ivar is negative in 40 pixels of star 0"):
            ask(spectra.flux, -spectra.ivar)


def test_read_takes_another_normalization_where_it_is_told_to():
    ridge = RidgeLabels(labels=NAMES).fit(stars())
    other = stars(5, seed=4)
    other.stars.meta |= {"recipe": [{"step": "continuum", "pixels": [1, 2]}]}
    with pytest.raises(LabError, match="any_recipe=True"):
        ridge.read(other)
    read = ridge.read(other, any_recipe=True)
    np.testing.assert_array_equal(read, ridge.read(other.flux, other.ivar))


def test_read_computes_labels_alone(monkeypatch):
    ridge = RidgeLabels(labels=NAMES).fit(stars())
    spectra = stars(30, seed=4)
    table = infer(ridge, spectra)
    monkeypatch.setattr(readers, "photon_covariance", None)  # nobody may call it
    read = ridge.read(spectra)
    np.testing.assert_array_equal(read[:, 1], table["logg"].value)
    monkeypatch.setattr(readers, "_READ_BLOCK", 7)
    np.testing.assert_allclose(ridge.read(spectra), read, rtol=1e-6)
