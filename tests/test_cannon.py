"""Properties of The Cannon for any stars: units, order, other stars' pixels, what a file keeps."""

import asdf
import matplotlib.pyplot as plt
import numpy as np
import pytest
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_lab.cannon import Cannon, Vectorizer, plot_fit
from stellar_lab.models import fold_numbers, train_test_rows
from stellar_lab.survey import LabError, Spectra


def stars(n=150, pixels=40, seed=0, noise=0.02):
    rng = np.random.default_rng(seed)
    labels = rng.normal([4500, 2, -0.3], [300, 0.7, 0.4], size=(n, 3))
    scaled = (labels - [4500, 2, -0.3]) / [300, 0.7, 0.4]
    theta = 0.05 * rng.normal(size=(pixels, 10)) + np.eye(10)[0]
    flux = Vectorizer.of_order("abc", 2)(scaled) @ theta.T + noise * rng.normal(size=(n, pixels))
    return labels, flux.astype("f4"), np.full((n, pixels), noise**-2, "f4")


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
@settings(max_examples=20, deadline=None)
def test_units_of_labels_do_not_matter(seed, unit, zero):
    labels, flux, ivar = stars(seed=seed)
    shifted = labels * unit + zero
    one, other = (
        Cannon(scatter=True).fit(labels, flux, ivar),
        Cannon(scatter=True).fit(shifted, flux, ivar),
    )
    np.testing.assert_allclose(one.predict(labels), other.predict(shifted), atol=1e-6)
    np.testing.assert_allclose(one.scatter_, other.scatter_, atol=1e-5)


@given(st.randoms(use_true_random=False))
@settings(max_examples=10, deadline=None)
def test_order_of_stars_and_pixels_does_not_matter(random):
    labels, flux, ivar = stars()
    rows, columns = list(range(len(flux))), list(range(flux.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    one = Cannon(scatter=True).fit(labels, flux, ivar)
    other = Cannon(scatter=True).fit(
        labels[rows], flux[np.ix_(rows, columns)], ivar[np.ix_(rows, columns)]
    )
    np.testing.assert_allclose(one.theta_[columns], other.theta_, rtol=1e-6, atol=1e-8)


def test_a_star_without_weight_is_a_star_that_is_not_there():
    labels, flux, ivar = stars()
    flux[-20:], ivar[-20:] = 99, 0
    one = Cannon(pivots=[4500, 2, 0], scales=[300, 1, 1]).fit(labels, flux, ivar)
    other = Cannon(pivots=[4500, 2, 0], scales=[300, 1, 1]).fit(
        labels[:-20], flux[:-20], ivar[:-20]
    )
    np.testing.assert_allclose(one.theta_, other.theta_, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scatter", [False, True])
def test_training_leaves_its_arrays_alone(scatter):
    arrays = stars()
    arrays[2][3, 5] = 0
    arrays[1][3, 5] = np.nan
    before = [array.copy() for array in arrays]
    Cannon(scatter=scatter).fit(*arrays)
    for array, copy in zip(arrays, before):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize(
    "parameters",
    [
        {"order": 1},
        {"order": 3},
        {"scatter": True},
        {"terms": ["TEFF^4", "TEFF*LOGG", "M_H"]},
        {"pivots": [4500, 2, 0], "scales": [100, 1, 1]},
        {"min_stars": 200},
    ],
)
def test_a_file_keeps_the_model(tmp_path, parameters):
    labels, flux, ivar = stars()
    table = Table(
        dict(
            zip(
                ("APOGEE_ID", "TEFF", "LOGG", "M_H"),
                ([f"s{k}" for k in range(len(flux))], *labels.T),
            )
        ),
        meta={"product": "apstar", "pixels": [1, 2]},
    )
    model = Cannon(**parameters).fit(Spectra(np.arange(40.0), flux, ivar, table))
    model.save(tmp_path / "model.asdf")
    again = Cannon.load(tmp_path / "model.asdf")
    np.testing.assert_array_equal(model.predict(labels), again.predict(labels))
    np.testing.assert_array_equal(model.derivative(labels[:2]), again.derivative(labels[:2]))
    assert again.get_params() == model.get_params() and again.metadata_ == {
        "product": "apstar",
        "pixels": [1, 2],
    }
    assert (
        again.label_names_ == ("TEFF", "LOGG", "M_H")
        and again.training_digest_ == model.training_digest_
    )
    assert np.isnan(again.theta_).all() == (parameters == {"min_stars": 200})


def test_the_digest_tells_training_sets_apart():
    labels, flux, ivar = stars()
    digests = {
        Cannon().fit(labels, flux, ivar).training_digest_,
        Cannon().fit(labels, flux, ivar).training_digest_,
    }
    changed = flux.copy()
    changed[7, 3] += 0.01
    assert len(digests) == 1 and Cannon().fit(labels, changed, ivar).training_digest_ not in digests


def test_foreign_files_are_refused(tmp_path):
    asdf.AsdfFile({"stellar_lab_model": "Cannon", "format_version": 99}).write_to(
        tmp_path / "future.asdf"
    )
    with pytest.raises(
        LabError,
        match="in format 99; this version reads models in format 1: train the model again",
    ):
        Cannon.load(tmp_path / "future.asdf")
    asdf.AsdfFile({"something": 1}).write_to(tmp_path / "other.asdf")
    with pytest.raises(LabError, match="other.asdf holds None"):
        Cannon.load(tmp_path / "other.asdf")
    (tmp_path / "empty.asdf").touch()
    with pytest.raises(LabError, match="empty.asdf is not a model"):
        Cannon.load(tmp_path / "empty.asdf")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: (a[0][:5], a[1][:5], a[2][:5]), "5 training stars cannot determine 10 terms"),
        (
            lambda a: (np.where(np.arange(150)[:, None] == 4, np.nan, a[0]), *a[1:]),
            r"1 of 150 training stars lack a label \(first: row 4\)",
        ),
        (lambda a: (a[0], a[1][:, :5], a[2]), r"flux \(150, 5\) and ivar \(150, 40\) must be"),
        (lambda a: (np.full_like(a[0], 3.0), *a[1:]), "determine only 1 of 10 terms"),
    ],
)
def test_what_cannot_be_learned_is_said(change, message):
    with pytest.raises(LabError, match=message):
        Cannon().fit(*change(stars()))


def test_splits_are_deterministic_and_whole():
    train, test = train_test_rows(300)
    assert len(test) == 99 and sorted([*train, *test]) == list(range(300))
    assert np.array_equal(train, train_test_rows(300)[0])
    numbers = fold_numbers(479)
    assert np.ptp(np.bincount(numbers)) <= 1 and np.array_equal(
        np.flatnonzero(numbers == 0), np.sort(np.random.default_rng(0).permutation(479)[::5])
    )
    with pytest.raises(LabError, match="1 folds of 10 stars"):
        fold_numbers(10, 1)


@pytest.mark.parametrize(
    "term, message",
    [("a^0", "power '0'"), ("a^x", "power 'x'"), ("q", "names 'q'"), ("", "names ''")],
)
def test_terms_that_make_no_sense(term, message):
    with pytest.raises(LabError, match=message):
        Vectorizer.of_terms("ab", [term])
    with pytest.raises(LabError, match="occurs twice"):
        Vectorizer.of_terms("ab", ["a*b", "b*a"])


def test_a_picture_of_a_fit_shows_its_lines_and_leaves_the_gaps_between_chips_white():
    grid = np.r_[np.arange(15200.0, 15240, 0.2), np.arange(15300.0, 15340, 0.2)]
    flux = np.ones((30, 400), "f4")
    labels = np.linspace(4000, 5000, 30)
    flux[:, 50] -= 0.05 + 1e-4 * (labels - 4000)
    table = Table({"APOGEE_ID": [f"2M{k:08d}" for k in range(30)], "TEFF": labels})
    spectra = Spectra(grid, flux, np.full(flux.shape, 1e4, "f4"), table)
    model = Cannon(order=1, labels=["TEFF"]).fit(spectra)
    above, below = plot_fit(model, spectra, 3, labels[[3]][None])
    edges = [path.vertices[:, 0] for path in below.collections[0].get_paths()]
    assert edges and not any(x.min() < 15270 < x.max() for x in edges)
    low, high = above.get_ylim()
    assert 0.8 < low < flux[3, 50] and 1 < high < 1.1  # no room for what is not drawn
    plt.close(above.figure)
