"""Labels without a survey: properties of the pieces, a model that goes through a file to real ones,
faults that a user can cause, stars that must be flagged."""

import copy

import numpy as np
import pytest
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_lab import physics as room
from stellar_lab.archives import real_stars, write_clusters
from stellar_lab.clean import read_files
from stellar_lab.inversion import infer
from stellar_lab.labelling import label
from stellar_lab.models import ERROR_MODEL, Flag, label_values
from stellar_lab.normalize import as_trained, normalize
from stellar_lab.physics import (
    KNOWN,
    PHYSICS_LABELS,
    Correction,
    Knowledge,
    PhysicsModel,
    SyntheticStars,
    draw_stars,
    redraw,
)
from stellar_lab.survey import LabError, Spectra, real_data, wavelength
from stellar_lab.training import load_model


@pytest.fixture(scope="module")
def stars():
    return SyntheticStars()


@pytest.fixture(scope="module")
def real():
    return redraw(real_stars())


@pytest.fixture(scope="module")
def clusters(real):
    "Name of each real star's cluster."
    return np.asarray(real.stars["CLUSTER"], str)


@pytest.fixture(scope="module")
def model(stars, real, clusters):
    spectra = real[np.isin(clusters, ("M67", "NGC 188", "NGC 2158", "M71"))]
    fe_h = room._literature_fe_h(spectra)
    return PhysicsModel(rounds=1).fit(spectra, {"FE_H": fe_h}, stars)


def table_of(model, spectra):
    "Labels of spectra that the survey normalized and `redraw` has drawn anew."
    return infer(model, spectra, any_recipe=True)


def made_up(flux, ivar=1e6):
    weights = np.full(flux.shape, ivar, "f4")
    return Spectra(wavelength, flux.astype("f4"), weights, Table({"STAR": np.arange(len(flux))}))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 200))
def test_drawn_stars_repeat_grow_and_stay_in_their_ranges(seed, n):
    labels = draw_stars(n, seed)
    assert labels.shape == (n, len(PHYSICS_LABELS)) and np.isfinite(labels).all()
    assert np.array_equal(labels, draw_stars(n, seed))
    assert labels[:, 0].min() > 3600
    assert np.all((labels[:, -1] >= 12) & (labels[:, -1] <= 17))
    assert np.all((labels[:, 8] >= 0.9) & (labels[:, 8] <= 2.3))


@settings(deadline=None, max_examples=25)
@given(st.floats(0.3, 3.0), st.integers(0, 1000))
def test_a_correction_of_one_gain_is_found_again(gain, seed):
    flux = 1 - np.random.default_rng(seed).uniform(0.1, 0.5, (20, 50)).astype("f4")
    deeper = 1 - np.float32(gain) * (1 - flux)
    names = Table({"STAR": np.arange(20)})
    spectra = Spectra(wavelength[:50], deeper, np.ones_like(flux), names)
    correction = Correction.learned(spectra, flux)
    assert np.allclose(correction.gain, gain, atol=1e-3)
    assert np.allclose(correction.offset, 0, atol=1e-3)


@settings(deadline=None, max_examples=25)
@given(st.floats(0.5, 2), st.floats(-0.5, 0.5), st.integers(0, 1000))
def test_the_line_of_the_scale_is_found_again_whatever_the_numbers_of_stars(slope, intercept, seed):
    rng = np.random.default_rng(seed)
    literature = np.repeat([-0.8, -0.3, 0.0, 0.1], rng.integers(5, 40, 4))
    fitted = (literature - intercept) / slope
    # a star gone astray and one without an answer do not matter
    fitted[rng.choice(len(fitted), 2, replace=False)] = [3.0, np.nan]
    found = room._literature_scale(fitted, literature)
    assert np.allclose(found, (slope, intercept), atol=1e-6)


def test_what_is_known_holds_for_an_ordinary_giant():
    star = [4600, 2.4, 0.0, 0, 0, 0, -0.05, 0.2, 2.24 - 0.72, 13.8]
    column = dict(zip(PHYSICS_LABELS, star))
    for one in KNOWN:
        said = sum(factor * column[name] for name, factor in one.factors.items())
        assert np.isclose(said, one.value) and one.error > 0
    assert len(KNOWN) == 5


def test_the_continuum_is_forgotten_and_nothing_given_is_changed(real):
    few = real[:3]
    before = few.flux.copy()
    again = redraw(few.replace(flux=few.flux * np.float32(1.05)))
    assert np.array_equal(few.flux, before) and again.stars.meta["normalized"]
    assert np.abs(again.flux - few.flux)[few.ivar > 0].max() < 1e-3


def test_broader_stars_are_shallower(stars):
    labels = [[4300, 1.8, 0.0, 0, 0, 0, -0.05, 0.2, 1.7, width] for width in (12.0, 14.0, 17.0)]
    depth = 1 - stars(np.array(labels)).min(axis=1)
    assert depth[0] > depth[1] > depth[2]


def test_a_correction_on_the_cannon_is_the_correction_of_its_spectra(model):
    rng = np.random.default_rng(1)
    gain = rng.uniform(0.5, 2, 7214)
    correction = Correction(gain, rng.normal(0, 0.01, 7214), np.full(7214, 0.01))
    at = draw_stars(5, 7)
    on_cannon = correction.of_cannon(model.cannon_).predict(at)
    assert np.allclose(on_cannon, correction(model.cannon_.predict(at)), atol=1e-5)


def test_what_stands_in_a_pixel_without_weight_does_not_matter(model, real, clusters):
    spectra = real[np.flatnonzero(clusters == "NGC 6819")[:3]]
    dirty = spectra.flux.copy()
    dirty[spectra.ivar == 0] = np.nan
    dirty[0, np.flatnonzero(spectra.ivar[0] == 0)[0]] = np.inf
    clean = table_of(model, spectra)
    table = table_of(model, spectra.replace(flux=dirty))
    for name in clean.colnames:
        assert np.array_equal(clean[name], table[name]), name
    dirty[1, np.flatnonzero(spectra.ivar[1] > 0)[0]] = np.nan
    with pytest.raises(LabError, match="star 1 has a usable pixel without a finite flux"):
        table_of(model, spectra.replace(flux=dirty))


def test_a_correction_is_not_spoiled_by_stars_that_have_no_answer(stars, model, real, clusters):
    rows = np.flatnonzero(clusters == "M67")[:12]
    good = real[rows]
    ivar = np.vstack([good.ivar, np.zeros_like(good.ivar[:1])])
    flux = np.vstack([good.flux, np.full_like(good.flux[:1], np.nan)])
    flux[0, good.ivar[0] == 0] = np.nan
    more = real[[*rows, rows[0]]].replace(flux=flux, ivar=ivar)
    plain = model.cannon_
    wanted = PhysicsModel(rounds=1).fit(good, {"FE_H": np.zeros(12)}, stars, plain)
    found = PhysicsModel(rounds=1).fit(more, {"FE_H": np.zeros(13)}, stars, plain)
    assert np.array_equal(found.stars_.correction.gain, wanted.stars_.correction.gain)
    assert np.array_equal(found.stars_.correction.scatter, wanted.stars_.correction.scatter)
    assert np.isfinite(found.poor_fit_) and found.poor_fit_ == wanted.poor_fit_
    with pytest.raises(LabError, match="no star has labels"):
        PhysicsModel(rounds=1).fit(more[[12]], None, stars, plain)


def test_a_star_without_labels_has_no_spectrum_and_teaches_nothing(stars, real):
    labels = draw_stars(4)
    labels[2, 5] = np.nan
    flux = stars(labels)
    assert np.isnan(flux[2]).all() and np.isfinite(flux[[0, 1, 3]]).all()
    few = real[:4]
    others = Correction.learned(few[[0, 1, 3]], flux[[0, 1, 3]])
    correction = Correction.learned(few, flux)
    for name in ("gain", "offset", "scatter"):
        assert np.array_equal(getattr(correction, name), getattr(others, name))


@pytest.mark.parametrize("values", [np.full(3, np.nan), np.zeros(2), [0.1, np.inf, 0.1]])
def test_stars_are_held_at_numbers(stars, model, real, values):
    with pytest.raises(LabError, match="must be 3 finite numbers, one per star"):
        PhysicsModel(rounds=1).fit(real[:3], {"FE_H": values}, stars, model.cannon_)


def test_a_cluster_without_an_answer_sets_no_scale():
    literature = np.repeat([-0.8, -0.3, 0.0], 3)
    fitted = np.where(literature == -0.3, np.nan, literature)
    assert np.allclose(room._literature_scale(fitted, literature), (1, 0))
    with pytest.raises(LabError, match="set no scale"):
        room._literature_scale(np.where(literature == 0, fitted, np.nan), literature)


def test_blocks_of_stars_are_seamless(model, real, monkeypatch):
    spectra = real[::60]
    whole = table_of(model, spectra)
    monkeypatch.setattr(room, "_STAR_BLOCK", 3)
    blocks = table_of(model, spectra)
    error = np.asarray(whole["teff_err"])
    moved = np.abs(np.asarray(whole["teff"]) - np.asarray(blocks["teff"]))
    assert np.nanmax(moved / error) < 0.02 and np.array_equal(whole["n_good"], blocks["n_good"])
    assert np.allclose(whole["correlation"], blocks["correlation"], atol=1e-3)


def test_labels_do_not_hang_on_neighbours_or_order(model, real, clusters):
    rows = np.flatnonzero(clusters == "NGC 6819")[:4]
    together = table_of(model, real[rows])
    alone = table_of(model, real[rows[2:3]])
    turned = table_of(model, real[rows[::-1]])
    for name in ("teff", "logg", "fe_h"):
        assert np.isclose(alone[name][0].value, together[name][2].value, rtol=1e-3, atol=2e-3)
        assert np.allclose(turned[name][::-1].value, together[name].value, rtol=1e-3, atol=2e-3)
    assert not together["flags"].any() and np.all(together["correlation"] > 0.95)


def test_predict_draws_the_spectra_that_were_fitted(model, real, clusters):
    rows = np.flatnonzero(clusters == "NGC 6819")[:4]
    table = table_of(model, real[rows])
    flux = model.predict(table)
    assert flux.shape == (4, 7214) and flux.dtype == np.float32
    assert np.array_equal(flux, model.predict(label_values(table, PHYSICS_LABELS)))
    good = real.ivar[rows] > 0
    drawn = [np.corrcoef(a[g], b[g])[0, 1] for a, b, g in zip(flux, real.flux[rows], good)]
    assert np.allclose(drawn, table["correlation"], atol=1e-4)
    assert np.all(table["chi2"] < model.poor_fit_limit_ * table["n_good"])


def test_knowledge_is_a_parameter(model, stars, real, clusters):
    rows = np.flatnonzero(clusters == "M67")[:4]
    informed = copy.copy(model).set_params(knowledge=(Knowledge({"FWHM": 1}, 15.5, 0.001),))
    assert np.allclose(label_values(table_of(informed, real[rows]), ["FWHM"]), 15.5, atol=0.01)
    assert np.all(label_values(table_of(model, real[rows]), ["FWHM"]) < 15)


def test_what_is_no_giant_is_flagged(model, real):
    dwarfs = real[real.labels(("LOGG",))[:, 0] > 3.8]
    assert np.all(table_of(model, dwarfs[::4])["flags"] > 0)
    nonsense = made_up(1 + 0.1 * np.random.default_rng(0).standard_normal((2, 7214)), 1e4)
    assert np.all(infer(model, nonsense)["flags"] > 0)


def test_a_star_without_pixels_is_flagged_and_does_not_spoil_its_neighbour(model, real, clusters):
    row = np.flatnonzero(clusters == "M67")[0]
    pair = real[[row, row]].replace(ivar=real.ivar[[row, row]] * np.array([[1], [0]], "f4"))
    table = table_of(model, pair)
    assert table["flags"][1] & Flag.FEW_PIXELS and not table["flags"][0]
    assert np.isnan(label_values(table, PHYSICS_LABELS)[1]).all()


@pytest.fixture(scope="module")
def kept(model, real, tmp_path_factory):
    "The model, on a scale of its own, and the file that it went into."
    scaled = copy.copy(model)
    scaled.fe_h_scale_ = [1.1, 0.02]
    labels = len(PHYSICS_LABELS)
    # slopes ask for the spread of training labels, which physics has not
    for name in set(ERROR_MODEL) - {"error_slopes_", "error_correlation_"}:
        setattr(scaled, name, np.linspace(0.1, 0.9, labels))
    scaled.error_correlation_ = 0.7 * np.eye(labels) + 0.3
    path = tmp_path_factory.mktemp("physics") / "physics.asdf"
    scaled.save(path)
    return scaled, path


def test_a_model_comes_back_from_its_file(kept, real, clusters):
    model, path = kept
    again = load_model(path)
    assert isinstance(again, PhysicsModel) and again.training_digest_ == model.training_digest_
    assert again.metadata_ == model.metadata_ and again.errors_ == model.errors_
    for name in set(ERROR_MODEL) & set(vars(model)):
        assert np.array_equal(getattr(again, name), getattr(model, name)), name
    assert again.knowledge == KNOWN and again.get_params() == model.get_params()
    spectra = real[np.flatnonzero(clusters == "NGC 6819")[:3]]
    before = table_of(model, spectra)
    after = table_of(again, spectra)
    assert all(np.array_equal(before[name], after[name]) for name in before.colnames)
    assert np.array_equal(model.predict(before), again.predict(before))


def test_a_file_for_another_emulator_is_refused(kept, monkeypatch):
    dwarfs = room.Emulator.load(domain="dwarfs")
    monkeypatch.setattr(room.Emulator, "load", classmethod(lambda cls: dwarfs))
    with pytest.raises(LabError, match="needs the emulator .* build the model again"):
        load_model(kept[1])


@pytest.fixture(scope="module")
def raw(real, clusters):
    "Raw light of three giants, as an instrument would bend it."
    rows = np.flatnonzero(clusters == "NGC 6819")[:3]
    bend = 300 * (1 + 0.2 * np.sin((wavelength - 15100) / 600)).astype("f4")
    spectra = real[rows].replace(flux=real.flux[rows] * bend, ivar=real.ivar[rows] / bend**2)
    spectra.stars.meta.update(product="apstar", normalized=False, recipe=[])
    return spectra


def test_the_recipe_is_that_of_the_chapter(model, raw):
    treated = as_trained(model, raw)
    by_hand = redraw(normalize(raw))
    assert np.array_equal(treated.flux, by_hand.flux)
    assert np.array_equal(treated.ivar, by_hand.ivar)
    assert np.array_equal(infer(model, treated)["teff"], infer(model, by_hand)["teff"])
    with pytest.raises(LabError, match="another normalization"):
        infer(model, normalize(raw))


@pytest.fixture(scope="module")
def files(clusters, tmp_path_factory):
    "Files of four raw giants, as the survey writes them."
    root = tmp_path_factory.mktemp("archive") / "giants"
    rows = np.flatnonzero(clusters == "NGC 6819")[:4]
    write_clusters(root, stars=rows, flaws={}, workers=1, progress=False)
    return sorted(root.rglob("apStar-*.fits"))


def test_raw_files_are_labelled_by_a_model_from_its_file(kept, files, tmp_path):
    model, path = kept
    summary = label(path, files, out=tmp_path / "labels.fits", progress=False)
    spectra, _ = read_files(files, progress=False)
    by_hand = infer(model, redraw(normalize(spectra)))
    assert summary.ok and (tmp_path / "labels.fits").exists()
    assert list(summary.table["apogee_id"]) == list(by_hand["apogee_id"])
    for name in ("teff", "fe_h", "fe_h_err", "correlation", "flags"):
        assert np.array_equal(summary.table[name], by_hand[name], equal_nan=name != "flags")


def test_faults_are_named(model, stars, real):
    with pytest.raises(LabError, match="no star"):
        Correction.learned(real[:0], real.flux[:0])
    short = Spectra(wavelength[:100], real.flux[:1, :100], real.ivar[:1, :100], real.stars[:1])
    with pytest.raises(LabError, match="pixels"):
        infer(model, short)
    with pytest.raises(LabError, match="set no scale"):
        room._literature_scale(np.zeros(5), np.full(5, -0.3))
    with pytest.raises(LabError, match="no label M_H to hold"):
        PhysicsModel(rounds=1).fit(real[:2], {"M_H": np.zeros(2)}, stars, model.cannon_)
    stranger = real[:1].replace(stars=Table({"CLUSTER": ["NGC 1"]}))
    with pytest.raises(LabError, match="no cluster NGC 1"):
        room._literature_fe_h(stranger)


@pytest.mark.skipif(real_data() is None, reason="STELLAR_LAB_REAL_DATA is not set")
def test_the_mystery_star_is_reproduced(model):
    spectra, _ = read_files([real_data() / "mystery_spec_wiped.fits"], progress=False)
    table = infer(model, as_trained(model, spectra))
    assert table["correlation"][0] > 0.95 and not table["flags"][0]
