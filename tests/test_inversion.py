"""The inversion: answers that do not depend on company, errors that follow noise, flags."""

import numpy as np
import pytest
from test_cannon import stars

from stellar_lab.cannon import Cannon
from stellar_lab.inversion import infer, statistics
from stellar_lab.judging import cross_label, error_table, with_error_model
from stellar_lab.models import Flag, apply_error_model, flag_names
from stellar_lab.survey import LabError

NAMES = ["TEFF", "LOGG", "M_H"]


@pytest.fixture(scope="module")
def trained():
    labels, flux, ivar = stars(400, 60, noise=0.01)
    return (
        Cannon(scatter=True).fit(labels[:300], flux[:300], ivar[:300], NAMES),
        labels[300:],
        flux[300:],
        ivar[300:],
    )


def values(table):
    return np.column_stack([table[name.lower()].value for name in NAMES])


def test_labels_come_back_with_errors_of_the_right_size(trained):
    model, labels, flux, ivar = trained
    table = infer(model, flux, ivar)
    pull = (values(table) - labels) / np.sqrt(np.einsum("nkk->nk", table["covariance"]))
    assert np.all(np.abs(pull.std(axis=0) - 1) < 4 / np.sqrt(2 * len(pull))) and np.all(
        np.abs(pull.mean(axis=0)) < 4 / np.sqrt(len(pull))
    )
    assert abs(np.mean(table["chi2"] / (table["n_good"] - 3)) - 1) < 0.1
    assert np.mean(table["flags"] > 0) < 0.05


def test_a_star_does_not_depend_on_its_company(trained):
    model, _, flux, ivar = trained
    together = infer(model, flux, ivar)
    for row in (0, 50, 99):
        alone = infer(model, flux[row], ivar[row])
        error = together["teff_err"][row]
        assert (
            abs(alone["teff"][0] - together["teff"][row]) < 1e-3 * error
            and alone["flags"][0] == together["flags"][row]
        )


def test_batches_are_seamless(trained, monkeypatch):
    model, _, flux, ivar = trained
    whole = infer(model, flux, ivar)
    monkeypatch.setattr("stellar_lab.inversion._BLOCK", 7)
    pieces = infer(model, flux, ivar)
    assert np.all(
        np.abs(pieces["teff"] - whole["teff"]) < 1e-3 * whole["teff_err"]
    ) and np.array_equal(pieces["flags"], whole["flags"])


def test_a_star_that_does_not_rest_does_not_depend_on_its_company(trained, monkeypatch):
    model, _, flux, ivar = trained
    monkeypatch.setattr("stellar_lab.inversion._EXACT_STEPS", 1)
    monkeypatch.setattr("stellar_lab.inversion._EXACT_ERROR", -1)  # nobody rests
    whole = infer(model, flux, ivar)
    assert np.all(whole["flags"] & Flag.NOT_CONVERGED)
    for size in (1, 3, 7):
        starts = range(0, len(flux), size)
        pieces = [infer(model, flux[k : k + size], ivar[k : k + size]) for k in starts]
        assert np.array_equal(np.concatenate(list(map(values, pieces))), values(whole))


def test_twice_the_noise_is_twice_the_error():
    labels, flux, ivar = stars(400, 60, noise=0.01)
    model = Cannon().fit(labels, flux, ivar, NAMES)
    one, four = infer(model, flux[:20], ivar[:20]), infer(model, flux[:20], ivar[:20] / 4)
    np.testing.assert_allclose(four["logg_err"] / one["logg_err"], 2, rtol=1e-3)
    np.testing.assert_allclose(one["chi2"] / four["chi2"], 4, rtol=1e-3)


def test_statistics_are_chi2(trained):
    model, labels, flux, ivar = trained
    stats = statistics(model, flux, ivar, dtype=float)
    trials = model.scale(labels[:5])
    got = stats.chi2(model.vectorizer_(trials)[:, 1:])
    weight = 1 / (1 / ivar + model.scatter_**2)
    slow = np.array(
        [
            [np.sum(w * (f - m) ** 2) for m in model.predict(labels[:5])]
            for f, w in zip(flux, weight)
        ]
    )
    slow -= np.sum(weight * (flux - model.theta_[:, 0]) ** 2, axis=1)[:, None]
    np.testing.assert_allclose(got, slow, rtol=1e-6, atol=1e-6 * np.abs(slow).max())


@pytest.mark.parametrize(
    "spoil, flag",
    [
        (lambda f, w: (f + 0.5 * np.sin(np.arange(60)), w), Flag.POOR_FIT),
        (lambda f, w: (f, np.where(np.arange(60) < 40, 0, w)), Flag.FEW_PIXELS),
        (lambda f, w: (f, w * 0), Flag.FEW_PIXELS | Flag.NOT_CONVERGED),
    ],
)
def test_flags_fire(trained, spoil, flag):
    model, _, flux, ivar = trained
    f, w = spoil(flux[:10], ivar[:10])
    assert np.all(infer(model, f, w)["flags"] & flag == flag)


def test_a_star_beyond_the_box_stands_at_its_edge(trained):
    model, *_ = trained
    table = infer(
        model,
        model.predict(model.unscale(np.array([[12.0, 0, 0], [0, -12, 0]]))),
        np.full((2, 60), 1e4),
    )
    assert np.all(table["flags"] & Flag.AT_BOUND) and np.all(np.isfinite(values(table)))


def test_a_star_far_from_the_training_set_is_outside(trained):
    model, *_ = trained
    far = model.unscale(np.array([[-3.0, 3, -3], [0, 0, 0]]))
    table = infer(model, model.predict(far), np.full((2, 60), 1e4))
    np.testing.assert_allclose(values(table), far, rtol=1e-4)
    assert flag_names(table["flags"])[1] == "" and table["flags"][0] & Flag.OUTSIDE_TRAINING


def test_nan_counts_only_where_it_is_used(trained):
    model, _, flux, ivar = trained
    hidden, masked = flux[:3].copy(), ivar[:3].copy()
    masked[1, 7] = 0
    reference = infer(model, hidden, masked)
    hidden[1, 7] = np.nan
    np.testing.assert_array_equal(values(infer(model, hidden, masked)), values(reference))
    masked[1, 7] = 1
    with pytest.raises(LabError, match="star 1 has a usable pixel without a finite flux"):
        infer(model, hidden, masked)
    with pytest.raises(LabError, match="ivar is negative"):
        infer(model, flux[:3], -ivar[:3])
    with pytest.raises(LabError, match="no spectra to label"):
        infer(model, flux[:0], ivar[:0])


def test_pixels_that_the_model_does_not_know_do_not_count(trained):
    labels, flux, ivar = stars(400, 60, noise=0.01)
    blind = ivar.copy()
    blind[:, 10] = 0
    model = Cannon(scatter=True).fit(labels, flux, blind, NAMES)
    strange = flux[:5].copy()
    strange[:, 10] = 77
    table = infer(model, strange, ivar[:5])
    assert np.all(table["n_good"] == 59) and np.all(table["flags"] == 0)


def test_error_model_finds_what_was_put_in(trained):
    model, labels, flux, ivar = trained
    rng = np.random.default_rng(3)
    table = infer(model, flux, ivar)
    scale = np.array([60, 0.2, 0.1])
    truth = values(table) + scale * rng.normal(
        size=labels.shape
    )  # a catalogue that is much worse than the photons
    honest = with_error_model(model, table, truth)
    errors = np.sqrt(np.einsum("nkk->nk", apply_error_model(honest, table["covariance"])))
    np.testing.assert_allclose(np.sqrt(np.mean(errors**2, axis=0)), scale, rtol=0.25)
    assert not hasattr(model, "error_floor_")
    with pytest.raises(LabError, match="3 left-out stars are too few"):
        with_error_model(model, table[:3], truth[:3])


def test_errors_are_counted_as_they_are_defined(trained):
    model, labels, flux, ivar = trained
    table = infer(model, flux, ivar)
    errors = error_table(table, values(table) - [10, 0.1, -0.1], NAMES, [100, 1, 1])
    np.testing.assert_allclose(errors["bias"], [10, 0.1, -0.1])
    np.testing.assert_allclose(errors["scaled_rmse"], [0.1, 0.1, 0.1])
    np.testing.assert_allclose(errors["robust"], 0, atol=1e-9)


def test_left_out_means_left_out(monkeypatch):
    from astropy.table import Table

    from stellar_lab.survey import Spectra

    labels, flux, ivar = stars(120, 60)
    table = Table(dict(zip(("APOGEE_ID", *NAMES), ([f"s{k}" for k in range(120)], *labels.T))))
    spectra = Spectra(np.arange(60.0), flux, ivar, table)
    groups = np.arange(120) % 3
    by_hand = infer(Cannon().fit(spectra[groups != 1]), spectra[groups == 1])
    crossed = cross_label(Cannon(), spectra, groups, progress=False)
    np.testing.assert_array_equal(values(crossed[groups == 1]), values(by_hand))
    assert list(crossed["apogee_id"]) == list(table["APOGEE_ID"])
