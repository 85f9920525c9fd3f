"""Networks: files, interrupted trainings, answers that bad pixels do not change, errors."""

import gc
import json
import zipfile
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("tensorflow")

from test_readers import NAMES, stars

from stellar_lab import network, readers, training
from stellar_lab.inversion import infer
from stellar_lab.judging import cross_label, with_error_model
from stellar_lab.models import Flag
from stellar_lab.network import LabNetwork, Network, keras
from stellar_lab.survey import LabError


class Small(Network):
    def _build(self, n_pixels, n_labels):
        return keras.Sequential(
            [
                keras.Input((n_pixels,)),
                keras.layers.Dense(8),
                keras.layers.Dropout(0.1),
                keras.layers.Dense(n_labels),
            ]
        )


class WithError(Small):
    "Gives a covariance of its own: a tenth of the unit matrix."

    def _finish(self, output):
        labels = super()._finish(output)
        return {
            "labels": labels,
            "covariance": 0 * keras.ops.expand_dims(labels, 1) + 0.1 * keras.ops.eye(3),
        }


@pytest.fixture(scope="module")
def trained():
    return Small(labels=NAMES, epochs=20, learning_rate=0.01).fit(stars(), progress=False)


def same(one, two):
    return all(
        np.array_equal(a, b)
        for a, b in zip(one.net_.get_weights(), two.net_.get_weights(), strict=True)
    )


def test_table_is_the_cannons(trained):
    table = infer(trained, stars(20, seed=3))
    assert table.colnames[:3] == ["apogee_id", "teff", "teff_err"] and {
        "covariance",
        "chi2",
        "n_good",
        "steps",
        "flags",
    } <= set(table.colnames)
    assert (
        str(table["teff"].unit) == "K"
        and np.isnan(table["chi2"]).all()
        and np.isnan(table["teff_err"]).all()
        and not table["steps"].any()
    )


def test_bad_pixels_and_company_do_not_matter(trained):
    spectra = stars(30, seed=4)
    nonsense = np.where(spectra.ivar > 0, spectra.flux, np.nan).astype("f4")
    np.testing.assert_array_equal(trained.read(nonsense, spectra.ivar), trained.read(spectra))
    np.testing.assert_allclose(trained.read(spectra[7]), trained.read(spectra)[[7]], rtol=1e-5)
    before = spectra.flux.copy()
    infer(trained, spectra)
    np.testing.assert_array_equal(spectra.flux, before)


def test_blocks_are_seamless(trained, monkeypatch):
    spectra = stars(30, seed=4)
    whole = infer(trained, spectra)
    monkeypatch.setattr(readers, "_READ_BLOCK", 7)
    np.testing.assert_allclose(
        infer(trained, spectra)["logg"].value, whole["logg"].value, rtol=1e-5
    )


def test_flags(trained):
    spectra = stars(20, seed=5)
    ivar, flux = spectra.ivar.copy(), spectra.flux.copy()
    ivar[0], ivar[1, 10:], flux[2] = 0, 0, 3
    flags = infer(trained, flux, ivar)["flags"]
    assert (
        flags[0] == Flag.NOT_CONVERGED | Flag.FEW_PIXELS
        and flags[1] & Flag.FEW_PIXELS
        and flags[2] & Flag.OUTSIDE_TRAINING
    )


def alive():
    "Variables and graphs of TensorFlow in this process, by kind."
    gc.collect()
    return Counter(
        kind
        for kind in (type(thing).__name__ for thing in gc.get_objects())
        if kind in ("ResourceVariable", "FuncGraph", "_EagerDefinedFunction", "_FusedAdam", "AdamW")
    )


def leftovers(model, data):
    "What a second training leaves in the process while its network lives, and after that."
    type(model)(**model.get_params()).fit(data, progress=False)
    before = alive()
    kept = type(model)(**model.get_params()).fit(data, validation=data[:20], progress=False)
    during, weights = alive() - before, len(kept.keras_.variables)
    del kept
    return during, weights, alive() - before


def test_a_training_leaves_its_weights_and_nothing_else():
    during, weights, after = leftovers(Small(labels=NAMES, epochs=2), stars())
    assert during["ResourceVariable"] == weights and set(during) == {"ResourceVariable"}
    assert not after


def test_a_killed_training_goes_on(tmp_path, monkeypatch):
    def killed(self, data, epoch):
        if epoch == 4:
            raise KeyboardInterrupt
        return Network._batches(self, data, epoch)

    options = {"labels": NAMES, "epochs": 7, "validation": 0.2, "keep_best": True}
    whole, state = Small(**options).fit(stars(), progress=False), tmp_path / "state.npz"
    monkeypatch.setattr(network, "_SAVE_EVERY", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Small, "_batches", killed)
        Small(**options).fit(stars(), checkpoint=state, progress=False)
    resumed = Small(**options).fit(stars(), checkpoint=state, progress=False)
    assert same(whole, resumed) and whole.history_ == resumed.history_
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]


def test_a_foreign_state_is_refused(tmp_path):
    state = tmp_path / "state.npz"
    state.write_bytes(b"nonsense")
    with pytest.raises(LabError, match="is not the state of a training"):
        Small(labels=NAMES, epochs=1).fit(stars(), checkpoint=state, progress=False)
    state.unlink()
    Small(labels=NAMES, epochs=1).fit(stars(), checkpoint=state, progress=False)
    with pytest.raises(LabError, match="another training"):
        Small(labels=NAMES, epochs=1).fit(stars(seed=8), checkpoint=state, progress=False)


def test_the_best_epoch_is_kept():
    held = stars(60, seed=11)
    best = Small(labels=NAMES, epochs=15, learning_rate=0.3, keep_best=True).fit(
        stars(), validation=held, progress=False
    )
    loss = np.mean((best.scale(best.read(held)) - best.scale(held.labels(NAMES))) ** 2)
    assert np.argmin(best.history_["val_loss"]) == best.best_epoch_
    np.testing.assert_allclose(loss, min(best.history_["val_loss"]), rtol=1e-4)


def test_file_gives_the_same_bits(trained, tmp_path):
    path = tmp_path / "small.keras"
    calibrated = with_error_model(
        trained, infer(trained, stars(50, seed=6)), stars(50, seed=6).labels(NAMES)
    )
    calibrated.save(path)
    loaded = Network.load(path)
    assert (
        type(loaded) is Small
        and loaded.metadata_ == trained.metadata_
        and loaded.label_names_ == tuple(NAMES)
    )
    one, two = infer(calibrated, stars(seed=7)), infer(loaded, stars(seed=7))
    for name in one.colnames:
        np.testing.assert_array_equal(one[name], two[name])
    assert np.isfinite(two["teff_err"]).all()
    with pytest.raises(LabError, match="holds a Small, which is not a LabNetwork"):
        LabNetwork.load(path)


def test_wrong_files_are_refused(trained, tmp_path):
    path = tmp_path / "small.keras"
    trained.save(path)
    with zipfile.ZipFile(path) as file:
        tree, weights = json.loads(file.read("stellar_lab.json")), file.read("model.weights.h5")
        config = file.read("config.json")
    for change, message in (
        ({"format_version": 99}, "has the format 99"),
        ({"stellar_lab_model": "Stranger", "module": "os"}, "'Stranger', which is not known"),
    ):
        other = tmp_path / "other.keras"
        with zipfile.ZipFile(other, "w") as file:
            file.writestr("stellar_lab.json", json.dumps(tree | change))
        with pytest.raises(LabError, match=message):
            Network.load(other)
    with zipfile.ZipFile(tmp_path / "broken.keras", "w") as file:
        file.writestr("stellar_lab.json", json.dumps(tree))
        file.writestr("config.json", config)
        file.writestr("model.weights.h5", weights[:1000])
    with pytest.raises(LabError, match="broken.keras cannot be read"):
        Network.load(tmp_path / "broken.keras")
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]).save(tmp_path / "foreign.keras")
    with pytest.raises(LabError, match="foreign.keras is not a network of stellar_lab"):
        Network.load(tmp_path / "foreign.keras")
    with pytest.raises(LabError, match="there is no network at"):
        Network.load(tmp_path / "nowhere.keras")


def test_a_subclass_gives_its_own_covariance(tmp_path):
    model = WithError(labels=NAMES, epochs=1).fit(stars(), progress=False)
    np.testing.assert_allclose(infer(model, stars(5))["logg_err"].value, np.sqrt(0.1), rtol=1e-5)
    model.save(tmp_path / "own.keras")
    np.testing.assert_allclose(
        infer(Network.load(tmp_path / "own.keras"), stars(5))["logg_err"].value,
        np.sqrt(0.1),
        rtol=1e-5,
    )


def test_layers_collapse_to_one_map():
    model = LabNetwork(labels=NAMES, epochs=2, centre=True).fit(stars(), progress=False)
    weights, constant = model.affine_map()
    spectra = stars(30, seed=9)
    by_map = model.fill(spectra.flux, spectra.ivar) @ weights.T + constant
    np.testing.assert_allclose(model.scale(by_map), model.scale(model.read(spectra)), atol=1e-4)
    assert np.isfinite(infer(model, spectra)["teff_err"]).all()


def test_in_folds():
    spectra = stars()
    model = Small(labels=NAMES, epochs=30, learning_rate=0.02)
    table = cross_label(model, spectra, np.arange(len(spectra)) % 3, progress=False)
    assert np.sqrt(np.mean((table["teff"].value - spectra.labels(["TEFF"])[:, 0]) ** 2)) < 0.5 * 300


def test_mistakes_are_named(trained):
    spectra = stars(5)
    with pytest.raises(LabError, match="ivar is negative"):
        infer(trained, spectra.flux, -spectra.ivar - 1)
    with pytest.raises(LabError, match="star 2 has a usable pixel without a finite flux"):
        infer(
            trained,
            np.where(np.arange(5)[:, None] == 2, np.nan, spectra.flux),
            np.ones_like(spectra.ivar),
        )
    with pytest.raises(LabError, match="no longer finite in epoch"):
        Small(labels=NAMES, epochs=60, learning_rate=1e30).fit(stars(), progress=False)
    with pytest.raises(LabError, match="extension must be .keras"):
        trained.save("x.h5")


def test_command_line_reads_a_network(trained, tmp_path):
    path = tmp_path / "small.keras"
    trained.save(path)
    text = training.describe(path, width=100)
    assert "a Small" in text and "20 epochs" in text and "no record" in text and "keras" in text
    assert isinstance(training.load_model(path), Small)
