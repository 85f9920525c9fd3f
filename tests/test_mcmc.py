"""The posterior: five labels of made-up models, shapes of the input, chains that must be refused,
and properties of weighted draws."""

import astropy.units as u
import matplotlib.pyplot as plt
import numpy as np
import pytest
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_lab.cannon import Cannon, Vectorizer
from stellar_lab.inversion import infer
from stellar_lab.judging import with_error_model
from stellar_lab.mcmc import (
    NotConverged,
    TrainingPrior,
    UniformPrior,
    _diagnose,
    _exact_statistics,
    _formal_covariance,
    _log_likelihood,
    _pareto_shape,
    _run_ensembles,
    _weighted_quantiles,
    plot_posterior,
    plot_trace,
    sample,
    sample_many,
    weighted_draws,
)
from stellar_lab.survey import ARCHIVES, LabError, Spectra

FIVE = ARCHIVES["survey"].labels  # TEFF, LOGG, FE_H, MG_FE, SI_FE
few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)
PIXELS, NOISE = 400, 0.02


@pytest.fixture(scope="module")
def giants():
    "A quadratic model of the survey's five labels; labels and noisy spectra with gaps of 12 stars."
    rng = np.random.default_rng(0)
    labels = rng.normal([4500, 2.0, -0.2, 0.1, 0.1], [300, 0.7, 0.3, 0.1, 0.1], (400, 5))
    vectorizer = Vectorizer.of_order(FIVE, 2)
    size = np.where(vectorizer.exponents.sum(axis=1) > 1, 0.01, 0.04)
    theta = rng.normal(size=(PIXELS, len(vectorizer))) * size + np.eye(len(vectorizer))[0]
    scaled = (labels - labels.mean(axis=0)) / labels.std(axis=0)
    model = Cannon().fit(labels, vectorizer(scaled) @ theta.T, label_names=FIVE)
    truth = labels[:12]
    flux = (model.predict(truth) + NOISE * rng.standard_normal((12, PIXELS))).astype("f4")
    ivar = np.where(rng.random(flux.shape) < 0.1, 0, NOISE**-2).astype("f4")
    return model, truth, flux, ivar


@pytest.fixture(scope="module")
def walk(giants):
    model, _, flux, ivar = giants
    return sample(model, flux[0], ivar[0], ensembles=2, progress=False)


# ---- one star, five labels


def test_five_labels(giants, walk):
    model, truth, flux, ivar = giants
    assert (
        walk.converged
        and walk.label_names == FIVE
        and walk.flags == infer(model, flux[:1], ivar[:1])["flags"][0]
    )
    summary = walk.summary(catalogue_errors=[100, 0.1, 0.05, 0.05, 0.05])
    assert (
        list(summary["unit"]) == ["K", "dex", "dex", "dex", "dex"]
        and "calibrated" not in summary.colnames
    )
    sigma = (summary["plus"] + summary["minus"]) / 2
    assert np.all(np.abs(summary["value"] - truth[0]) < 4.5 * sigma)


def test_it_agrees_with_the_weighted_draws(giants, walk):
    model, _, flux, ivar = giants
    many, summary = sample_many(model, flux[:1], ivar[:1], progress=False), walk.summary()
    for row in summary:
        name, sigma = row["label"].lower(), (row["plus"] + row["minus"]) / 2
        for ours, theirs in ((name, "value"), (f"{name}_plus", "plus"), (f"{name}_minus", "minus")):
            assert abs(many[ours][0].value - row[theirs]) < 0.2 * sigma
    assert many["teff"].unit == u.K and many["converged"][0]


def test_statistics_give_the_likelihood_of_the_pixels(giants):
    model, _, flux, ivar = giants
    at = np.random.default_rng(1).normal(size=(100, 5))
    stats = _exact_statistics(model, flux[:1], ivar[:1])
    fast = _log_likelihood(model.vectorizer_, stats.matrix(), stats.b, at[None])[0]
    slow = (
        -0.5
        * (flux[0].astype(float) - model.vectorizer_(at) @ model.theta_.T) ** 2
        @ ivar[0].astype(float)
    )
    assert np.abs((fast - fast[0]) - (slow - slow[0])).max() < 1e-6 * np.ptp(slow)


def test_log_probabilities_are_minus_half_chi2(giants, walk):
    model, _, flux, ivar = giants
    at = walk.chain[0, -1, :3]
    expected = -0.5 * (flux[0] - model.predict(at)) ** 2 @ ivar[0].astype(float) + UniformPrior()(
        model.scale(at)
    )
    assert np.allclose(walk.log_prob[0, -1, :3], expected, atol=1e-3)


def test_a_spectra_and_its_arrays_give_the_same(giants):
    model, _, flux, ivar = giants
    spectra = Spectra(
        np.arange(PIXELS) + 15200.0,
        flux,
        ivar,
        Table({"APOGEE_ID": [f"star {n}" for n in range(12)]}),
    )
    one = sample(model, spectra[3], ensembles=2, steps=50, progress=False)
    assert np.array_equal(
        one.chain, sample(model, flux[3], ivar[3], ensembles=2, steps=50, progress=False).chain
    )
    assert list(sample_many(model, spectra[:2], progress=False)["apogee_id"]) == [
        "star 0",
        "star 1",
    ]


def test_unusable_pixels_may_hold_anything(giants):
    model, _, flux, ivar = giants
    dirty = np.where(ivar > 0, flux, np.nan)
    one, other = (
        sample_many(model, f[:2], ivar[:2], progress=False)["teff"] for f in (flux, dirty)
    )
    assert np.allclose(one, other, rtol=1e-6)


def test_seeds(giants):
    model, _, flux, ivar = giants
    chains = [
        sample(model, flux[0], ivar[0], ensembles=2, steps=60, seed=seed, progress=False).chain
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(chains[0], chains[1]) and not np.array_equal(chains[0], chains[2])
    assert not np.array_equal(chains[0][0], chains[0][1])  # the ensembles are independent


def test_calibrated_errors_come_from_the_model(giants):
    model, _, flux, ivar = giants
    rng = np.random.default_rng(6)
    labels = model.training_labels_[50:110]
    table = infer(
        model,
        model.predict(labels) + NOISE * rng.standard_normal((60, PIXELS)),
        np.full((60, PIXELS), NOISE**-2),
    )
    calibrated = with_error_model(
        model, table, labels + 0.5 * model.scales_ * rng.standard_normal(labels.shape)
    )
    summary = sample(calibrated, flux[0], ivar[0], ensembles=2, steps=300, progress=False).summary(
        insist=True
    )
    assert np.allclose(summary["calibrated"] / model.scales_, 0.5, rtol=0.4) and np.all(
        summary["calibrated"] > 2 * summary["plus"]
    )


def test_the_original_lab_s_own_way(giants):
    model, _, flux, ivar = giants
    walk = sample(
        model, flux[0], ivar[0], ensembles=1, steps=40, burn_in=20, start="mean", progress=False
    )
    assert (
        walk.diagnosis.burn_in == 20
        and np.abs(model.scale(walk.chain[0, 0])).max() < 0.1
        and not walk.converged
    )
    with pytest.raises(LabError, match="a burn-in of 40 leaves nothing of 40 steps"):
        sample(model, flux[0], ivar[0], ensembles=1, steps=40, burn_in=40, progress=False)


def test_what_a_user_can_get_wrong(giants):
    model, _, flux, ivar = giants
    for call, message in (
        (lambda: sample(model, flux[:2], ivar[:2], progress=False), "takes one star, not 2"),
        (lambda: sample(model, flux[0], progress=False), "ivar is missing"),
        (lambda: sample(model, flux[0], 0 * ivar[0], progress=False), "no usable pixel"),
        (
            lambda: sample(model, flux[0], ivar[0], walkers=6, progress=False),
            "6 walkers are too few for 5 labels: an ensemble needs at least 10",
        ),
        (
            lambda: sample(model, flux[0], ivar[0], start="nowhere", progress=False),
            "choose best, mean or prior",
        ),
        (
            lambda: sample(model, flux[0], ivar[0], prior=UniformPrior(1e-3), progress=False),
            "outside the prior",
        ),
        (lambda: sample_many(model, flux[:0], ivar[:0], progress=False), "no spectra"),
        (lambda: sample_many(model, flux, progress=False), "ivar is missing"),
        (lambda: sample_many(model, flux, ivar, draws=100, progress=False), "power of two"),
    ):
        with pytest.raises(LabError, match=message):
            call()


# ---- chains that must be refused


def test_too_short_a_chain_is_refused_unless_the_caller_insists(giants):
    model, _, flux, ivar = giants
    short = sample(model, flux[0], ivar[0], steps=100, progress=False)
    for refused in (short.draws, short.summary, lambda: plot_posterior(short)):
        with pytest.raises(NotConverged, match="autocorrelation times, 50 are needed.*insist=True"):
            refused()
    summary = short.summary(insist=True)
    assert (
        not summary.meta["converged"]
        and summary.meta["problems"]
        and "NOT CONVERGED" in repr(short)
    )
    plot_posterior(short, insist=True)
    plt.close("all")


def test_a_star_with_two_valleys_is_refused():
    rng = np.random.default_rng(2)
    labels, slopes = rng.normal(size=(100, 2)), rng.normal(size=(2, 200)) * 0.03
    model = Cannon(terms=["a^2", "b"], pivots=[0, 0], scales=[1, 1]).fit(
        labels, 1 + labels ** [2, 1] @ slopes, label_names=["a", "b"]
    )
    flux = model.predict([[1.2, 0.3]]) + 0.02 * rng.standard_normal((1, 200))
    walk = sample(model, flux[0], np.full(200, 0.02**-2), ensembles=2, steps=800, progress=False)
    assert not walk.converged and walk.diagnosis.rhat[0] > 1.2


@few
@given(seeds, st.floats(1, 100))
def test_apart_is_apart_in_any_order_and_unit(seed, unit):
    rng = np.random.default_rng(seed)
    chain = rng.normal(size=(2, 400, 8, 2)) * unit
    assert (
        not _diagnose(chain, "xy", burn_in=0).problems
        or np.max(_diagnose(chain, "xy", burn_in=0).rhat) < 1.03
    )
    chain[1, ..., 1] += 3 * unit
    for turned in (chain, chain[::-1], -chain):
        problems = _diagnose(turned, "xy", burn_in=0).problems
        assert any(problem.startswith("y: the ensembles disagree") for problem in problems)


def test_walkers_that_do_not_move_are_no_answer():
    begin = np.random.default_rng(3).normal(0, 1e-3, (1, 8, 2))
    spike = _run_ensembles(
        lambda x: -1e12 * (x**2).sum(axis=1) - 1e12 * (np.abs(x[:, 0]) > 1e-9),
        begin,
        "xy",
        steps=50,
        progress=False,
    )
    assert not spike.converged
    stuck = _diagnose(np.zeros((2, 60, 4, 1)), "x")
    assert stuck.problems and np.isnan(stuck.tau[0])
    assert np.isnan(_diagnose(np.zeros((2, 60, 4, 1)), "x", burn_in=0).tau[0])


# ---- priors


def test_the_prior_of_the_training_set_is_a_density(giants):
    model = giants[0]
    prior, rng = TrainingPrior(model), np.random.default_rng(4)
    labels = model.scale(model.training_labels_)
    assert np.allclose(prior(labels), prior.mixture.score_samples(labels)) and prior(
        labels[:, None]
    ).shape == (400, 1)
    x = rng.uniform(-6, 6, (200_000, 5))  # integrates to one
    assert abs(np.mean(np.exp(prior(x))) * 12**5 - 1) < 0.2
    drawn = prior.draw(5000, 5, rng)
    assert np.allclose(drawn.std(axis=0), labels.std(axis=0), atol=0.1)


def test_without_data_the_prior_comes_back(giants):
    model, _, flux, ivar = giants
    prior = TrainingPrior(model, components=1)
    table, draws, weights, _ = weighted_draws(model, flux[:1], 1e-9 * ivar[:1], prior, draws=2**14)
    scaled = model.scale(draws[0])
    assert np.allclose(weights[0] @ scaled, prior.mixture.means_[0], atol=0.15)
    walk = sample(
        model,
        flux[0],
        1e-9 * ivar[0],
        prior=prior,
        start="prior",
        ensembles=2,
        steps=800,
        progress=False,
    )
    assert np.allclose(
        model.scale(walk.draws(insist=True)).std(axis=0),
        np.sqrt(np.diag(prior.mixture.covariances_[0])),
        atol=0.2,
    )


# ---- weighted draws


@few
@given(seeds)
def test_weighted_quantiles_equal_repeated_values(seed):
    rng = np.random.default_rng(seed)
    values, counts = rng.normal(size=(3, 40, 2)), rng.integers(0, 5, (3, 40))
    counts[:, 0] += 1
    levels = [0.1603, 0.5017, 0.8397]  # no share of the counts is equal to one of them
    found = _weighted_quantiles(values, counts / counts.sum(axis=1, keepdims=True), levels)
    for n in range(3):
        plain = np.quantile(
            np.repeat(values[n], counts[n], axis=0), levels, axis=0, method="inverted_cdf"
        )
        assert np.array_equal(found[:, n], plain)


def test_a_star_does_not_depend_on_its_company(giants):
    model, _, flux, ivar = giants
    together, alone = (
        sample_many(model, flux, ivar, progress=False),
        sample_many(model, flux[7:8], ivar[7:8], progress=False),
    )
    assert np.allclose(together["teff_plus"][7].value, alone["teff_plus"][0].value, rtol=1e-4)
    assert np.all(together["ess"] > 1000) and np.all(together["pareto_k"] < 0.7)


def test_weights_that_may_not_be_trusted_give_no_values(giants):
    model, _, flux, ivar = giants
    blind = ivar.copy()
    blind[0] = 0  # nothing known
    blind[1, 6:] = 0  # six pixels for five labels
    table = sample_many(model, flux, blind, progress=False)
    assert (
        np.isnan(table["teff"][0]) and np.isinf(table["pareto_k"][0]) and not table["converged"][0]
    )
    assert (
        np.isnan(table["teff"][1]) and not table["converged"][1] and np.all(table["converged"][2:])
    )
    assert np.isfinite(
        sample_many(model, flux[1:2], blind[1:2], insist=True, progress=False)["teff"][0]
    )


def test_the_tail_of_the_weights_is_seen():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 2048))
    assert _pareto_shape(0.1 * x)[0] < 0.5 and _pareto_shape(0.49 * x**2)[0] > 0.7
    assert np.isinf(_pareto_shape(np.full((1, 100), np.nan))[0])


def test_formal_covariance_is_the_inversion_s(giants):
    model, _, flux, ivar = giants
    table = infer(model, flux, ivar)
    best = model.scale(np.column_stack([table[name.lower()].value for name in FIVE]))
    ours = _formal_covariance(model, _exact_statistics(model, flux, ivar), best) * np.outer(
        model.scales_, model.scales_
    )
    assert np.allclose(
        ours, table["covariance"], rtol=1e-2, atol=1e-3 * np.outer(model.scales_, model.scales_)
    )


# ---- pictures


def test_figures(walk):
    axes = plot_trace(walk)
    assert len(axes) == 6 and axes[-1].get_xlabel() == "step" and len(axes[0].lines) == 16
    fig = plot_posterior(walk, truth=walk.best)
    assert len(fig.axes) == 25
    plt.close("all")
