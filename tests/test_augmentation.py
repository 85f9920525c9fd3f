"""Augmentation and the error-aware network: rules, bad pixels, files, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tensorflow")

from test_network import leftovers
from test_readers import NAMES, stars

from stellar_lab.augmentation import (
    _BAD_JITTER,
    AugmentedNetwork,
    ErrorAwareNetwork,
    _draw_chances,
    _feature_axes,
    _jitter_scale,
    _Local,
    _Mixture,
    _noisy_copies,
    _noisy_stream,
)
from stellar_lab.inversion import infer
from stellar_lab.judging import cross_label
from stellar_lab.network import Network, tf
from stellar_lab.survey import LabError


class SmallLayers(AugmentedNetwork):
    widths = (20, 10)


SMALL = dict(epochs=3, members=2, width=8, components=5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-4, 1e3), min_size=2, max_size=6))
def test_the_jitter_is_the_error_or_that_of_a_bad_pixel(errors):
    errors = np.array([errors])
    expected = np.where(errors > 0.1, _BAD_JITTER, errors)
    close = np.abs(errors - 0.1) < 1e-6  # rounding decides there
    assert np.allclose(_jitter_scale(errors**-2)[~close], expected[~close], rtol=1e-6)
    assert np.allclose(
        np.asarray(_jitter_scale(tf.constant(errors**-2)))[~close], expected[~close], rtol=1e-6
    )
    assert np.all(_jitter_scale(np.zeros((1, 3))) == np.float32(_BAD_JITTER))


def test_a_precise_star_is_drawn_more_often_and_copies_follow_the_seed():
    ivar = np.array([[1e6] * 2000, [400.0] * 2000])  # errors 0.001 and 0.05
    weights = _draw_chances(ivar)
    assert np.isclose(weights.sum(), 1) and np.isclose(
        weights[0] / weights[1], (100 + 100) / (100 + 2)
    )
    flux = np.ones((2, 2000), "f4")
    before = flux.copy()
    rows, copies = _noisy_copies(flux, ivar, 40, seed=1)
    again, other = _noisy_copies(flux, ivar, 40, seed=1), _noisy_copies(flux, ivar, 40, seed=2)
    assert (
        np.array_equal(copies, again[1])
        and not np.array_equal(copies, other[1])
        and np.array_equal(flux, before)
    )
    assert copies.dtype == np.float32 and np.allclose(
        copies.std(axis=1), np.where(rows == 0, 0.001, 0.05), rtol=0.1
    )


def test_the_stream_pairs_each_copy_with_its_own_labels():
    truth = tf.reshape(tf.range(20.0), (20, 1))
    flux = tf.repeat(truth, 5, axis=1)
    seen = [
        (f.numpy(), t.numpy())
        for f, _, t in _noisy_stream(flux, tf.fill((20, 5), np.float32(1e6)), truth, 30, 8, (1, 0))
    ]
    assert [len(f) for f, _ in seen] == [8, 8, 8, 6]
    assert all(np.allclose(f, t, atol=0.01) for f, t in seen)


def test_an_augmented_network_holds_stars_back_not_copies():
    sets = SmallLayers(epochs=1, draws=3)
    sets.fit(stars(100), progress=False)
    data, held = sets._sets(
        *(np.asarray(part, "f4") for part in (stars(100).flux, stars(100).ivar)), None
    )
    sets._look(*data)
    assert len(data[0]) + len(held[0]) == 100 and not set(map(bytes, data[0].numpy())) & set(
        map(bytes, held[0].numpy())
    )
    assert sum(len(batch[0]) for batch in sets._batches(data, 0)) == 3 * len(data[0])
    assert len(sets.history_["val_loss"]) == 1 and sets.best_epoch_ == 0


def test_gates_limit_the_reach_of_a_pixel_and_of_a_chip():
    layer, flux, ivar = (
        _Local([0, 12, 24]),
        np.full((1, 24), 0.9, "f4"),
        np.full((1, 24), 1e4, "f4"),
    )
    calm = np.asarray(layer(flux, ivar))
    moved = flux.copy()
    moved[0, 11] = 0.1
    changed = np.flatnonzero(np.asarray(layer(moved, ivar)) != calm)
    assert changed.min() >= 11 - layer.reach and changed.max() == 11  # the other chip begins at 12
    ivar[0, 11] = 0
    assert np.array_equal(layer(flux, ivar), layer(moved, ivar))


def test_a_gap_is_filled_with_what_the_neighbours_say():
    layer, flux, ivar = _Local([0, 30]), np.full((1, 30), 0.8, "f4"), np.full((1, 30), 1e8, "f4")
    ivar[0, 14:16] = 0
    assert np.allclose(
        np.asarray(layer(flux, ivar))[0, 14:16], -0.2, atol=0.01
    )  # the typical flux is 1 before training
    ivar[0, 5:25] = 0
    assert np.abs(np.asarray(layer(flux, ivar))[0, 15]) < 1e-6  # nothing near


def test_the_kernel_learns_the_same_where_a_chip_has_no_pixels():
    rng = np.random.default_rng(0)
    flux, ivar, weight = (
        tf.constant(rng.uniform(*limits, (8, 30)), tf.float32)
        for limits in ((0.5, 1), (100, 1000), (-1, 1))
    )

    def slope(edges):
        layer = _Local(edges)
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(layer(flux, ivar) * weight)
        return np.asarray(tape.gradient(total, layer.log_kernel))

    expected = slope([0, 30])
    for _ in range(20):
        dirt = [tf.fill((200,), np.float32("nan")) for _ in range(50)]  # what the memory held
        del dirt
        assert np.allclose(slope([0, 30, 30, 30]), expected, rtol=1e-5, atol=1e-9)
    assert np.abs(expected).max() > 0


def test_axes_are_orthogonal_and_features_of_the_size_wanted():
    spectra = (
        np.random.default_rng(0).normal(size=(60, 4))
        @ np.diag([3, 1, 0.3, 0.1])
        @ np.random.default_rng(1).normal(size=(4, 50))
    )
    axes = _feature_axes(spectra, 4)
    off = axes.T @ axes - np.diag(np.diag(axes.T @ axes))
    assert axes.shape == (50, 4) and np.abs(off).max() < 1e-4 * np.abs(axes.T @ axes).max()
    assert np.isclose(
        np.sqrt(np.mean(((spectra - spectra.mean(axis=0)) @ axes) ** 2)), 0.15, rtol=0.05
    )
    assert _feature_axes(spectra[:3], 64).shape[1] == 3


def test_a_mixture_of_equals_has_their_error():
    same = np.zeros((1, 4, 2, 2), "f4")
    same[:, :, 0], same[:, :, 1] = [0.5, -1], np.log([0.1, 0.2])
    out = _Mixture([10.0, 1.0], [100.0, 0.0])(same)
    assert np.allclose(out["labels"], [[105, -1]]) and np.allclose(
        out["covariance"], [np.diag([1, 0.04])], atol=1e-6
    )


def test_the_error_aware_network_keeps_its_word(tmp_path):
    sample = stars(120, pixels=60)
    network = ErrorAwareNetwork(**SMALL).fit(sample[:80], progress=False)
    table = infer(network, sample[80:])
    assert np.all(np.isfinite(table["teff_err"].value)) and np.all(
        np.linalg.eigvalsh(table["covariance"]) > 0
    )
    nonsense = sample.replace(flux=np.where(sample.ivar > 0, sample.flux, np.float32(99)))
    assert np.array_equal(infer(network, nonsense[80:])["teff"], table["teff"])
    network.save(tmp_path / "n.keras")
    again = Network.load(tmp_path / "n.keras")
    assert isinstance(again, ErrorAwareNetwork) and again.get_params() == network.get_params()
    assert np.array_equal(infer(again, sample[80:])["covariance"], table["covariance"])
    assert (
        len(cross_label(ErrorAwareNetwork(**SMALL), sample, np.arange(120) % 2, progress=False))
        == 120
    )


@pytest.mark.parametrize(
    "model",
    [SmallLayers(epochs=2), ErrorAwareNetwork(**SMALL)],
    ids=["augmented", "error-aware"],
)
def test_a_training_leaves_its_weights_and_nothing_else(model):
    during, weights, after = leftovers(model, stars(60, pixels=60))
    assert (
        during["ResourceVariable"] == weights and set(during) == {"ResourceVariable"} and not after
    )


def test_an_interrupted_training_ends_as_the_whole_one(tmp_path, monkeypatch):
    sample, whole = stars(80, pixels=60), ErrorAwareNetwork(**SMALL | {"epochs": 4})
    whole.fit(sample, progress=False)
    halted = ErrorAwareNetwork(**SMALL | {"epochs": 4})
    batches = ErrorAwareNetwork._batches
    monkeypatch.setattr("stellar_lab.network._SAVE_EVERY", 0)
    monkeypatch.setattr(
        ErrorAwareNetwork,
        "_batches",
        lambda self, data, epoch: (
            batches(self, data, epoch) if epoch < 2 else (_ for _ in ()).throw(KeyboardInterrupt)
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        halted.fit(sample, checkpoint=tmp_path / "state.npz", progress=False)
    monkeypatch.setattr(ErrorAwareNetwork, "_batches", batches)
    halted.fit(sample, checkpoint=tmp_path / "state.npz", progress=False)
    assert halted.history_ == whole.history_ and np.array_equal(
        halted.read(sample), whole.read(sample)
    )
    with pytest.raises(
        LabError, match="another training"
    ):  # its learning rate follows another course
        ErrorAwareNetwork(**SMALL | {"epochs": 5}).fit(
            sample, checkpoint=tmp_path / "state.npz", progress=False
        )


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"lost": 0.7}, "between 0 and half"),
        ({"lost": -0.1}, "between 0 and half"),
        ({"components": 0}, "one component"),
        ({"members": 0}, "one member"),
    ],
)
def test_what_cannot_work_is_refused(wrong, message):
    with pytest.raises(LabError, match=message):
        ErrorAwareNetwork(**SMALL | wrong).fit(stars(30), progress=False)


def test_names_are_those_of_the_stars():
    assert ErrorAwareNetwork(**SMALL).fit(stars(40), progress=False).label_names_ == tuple(NAMES)
