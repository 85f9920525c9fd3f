"""The contract of all models: what `fit` and `infer` refuse, what a file must hold, one thread."""

import asdf
import numpy as np
import pytest
from astropy.table import Table
from conftest import make_labels, make_spectra
from threadpoolctl import ThreadpoolController

from stellar_lab import models
from stellar_lab.cannon import Cannon
from stellar_lab.inversion import infer
from stellar_lab.models import (
    Answer,
    fold_numbers,
    label_table,
    label_values,
    outside_training,
    single_threaded,
)
from stellar_lab.readers import RidgeLabels
from stellar_lab.survey import LabError

NAMES = ("TEFF", "LOGG", "FE_H")


def arrays():
    spectra = make_spectra()
    return spectra.labels(NAMES), spectra.flux, spectra.ivar


@pytest.mark.parametrize(
    "grid, message",
    [
        (np.arange(39.0), r"wavelength has the shape \(39,\), but flux has 40 pixels"),
        (np.arange(40.0)[::-1], "wavelengths must be finite and increase"),
        (np.where(np.arange(40) == 3, np.nan, np.arange(40.0)), "must be finite and increase"),
        (np.zeros(40), "must be finite and increase"),
    ],
)
@pytest.mark.parametrize("model", [Cannon(order=1), RidgeLabels()])
def test_a_grid_that_does_not_fit_is_refused_at_once(model, grid, message):
    with pytest.raises(LabError, match=message):
        model.fit(*arrays(), NAMES, wavelength=grid)


@pytest.mark.parametrize(
    "flux, ivar, message",
    [
        (np.nan, 1e4, r"star 7 has a usable pixel without a finite flux or ivar \(2 such pixels\)"),
        (np.inf, 1e4, r"star 7 has a usable pixel without a finite flux or ivar \(2 such pixels\)"),
        (1.0, np.nan, r"star 7 has a usable pixel without a finite flux or ivar \(2 such pixels\)"),
        (1.0, np.inf, r"star 7 has a usable pixel without a finite flux or ivar \(2 such pixels\)"),
        (1.0, -1.0, "ivar is negative in 2 pixels of star 7"),
    ],
)
@pytest.mark.parametrize("model", [Cannon(order=1), Cannon(scatter=True), RidgeLabels()])
def test_a_usable_pixel_holds_a_number(model, flux, ivar, message):
    spectra = make_spectra()
    spoiled = spectra.replace(flux=spectra.flux.copy(), ivar=spectra.ivar.copy())
    spoiled.flux[7, [3, 30]] = flux
    spoiled.ivar[7, [3, 30]] = ivar
    with pytest.raises(LabError, match=message):
        model.fit(spoiled)
    with pytest.raises(LabError, match=message):
        infer(model.fit(spectra), spoiled)


@pytest.mark.parametrize("model", [Cannon(order=1, scatter=True), RidgeLabels()])
def test_an_unusable_pixel_may_hold_anything(model):
    spectra = make_spectra(bad=0.1)
    holes = np.where(spectra.ivar > 0, spectra.flux, [[np.nan], [np.inf], [-np.inf]] * 50)
    filled = spectra.replace(flux=np.where(spectra.ivar > 0, spectra.flux, 0).astype("f4"))
    with_holes = spectra.replace(flux=holes.astype("f4"))
    one, other = model.fit(filled), model.__class__(**model.get_params()).fit(with_holes)
    assert one.training_digest_ == other.training_digest_
    np.testing.assert_array_equal(
        label_values(infer(one, filled), NAMES), label_values(infer(other, with_holes), NAMES)
    )


@pytest.mark.parametrize(
    "names",
    [
        ("TEFF", "teff", "LOGG"),
        ("Age", "age", "LOGG"),
        ("TEFF", "LOGG", "chi2"),
        ("TEFF", "LOGG", "Flags"),
        ("TEFF", "APOGEE_ID", "LOGG"),
        ("age", "age_err", "LOGG"),
        ("age_err", "age", "LOGG"),
    ],
)
def test_labels_have_columns_of_their_own(names):
    with pytest.raises(LabError, match="a label cannot be called"):
        Cannon(order=1).fit(*arrays(), names)


def test_one_name_is_not_a_row_of_letters():
    labels, flux, ivar = arrays()
    spectra = make_spectra()
    assert Cannon(order=1, labels="teff").fit(spectra).label_names_ == ("TEFF",)
    assert RidgeLabels(labels="TEFF").fit(spectra).label_names_ == ("TEFF",)
    table = infer(Cannon(order=1).fit(labels[:, :1], flux, ivar, "TEFF"), flux, ivar)
    assert label_values(table, "TEFF").shape == (150, 1)
    frame = Table(labels, names=NAMES)
    assert Cannon(order=1).fit(frame, flux, ivar, "LOGG").label_names_ == ("LOGG",)
    with pytest.raises(LabError, match=r"1 names \(TEFF\) for 3 labels"):
        Cannon(order=1).fit(labels, flux, ivar, "TEFF")


def test_an_unknown_label_is_named_with_the_known_ones():
    spectra = make_spectra()
    table = infer(Cannon(order=1).fit(spectra), spectra)
    with pytest.raises(LabError, match="no column age: it has apogee_id, teff, teff_err, logg"):
        label_values(table, ["TEFF", "AGE"])


def test_facts_of_the_spectra_survive_as_plain_values(tmp_path):
    facts = {
        "row": np.int64(1),
        "dark": np.float32(0.5),
        "release": np.str_("dr10"),
        "good": np.bool_(True),
        "pixels": [np.int16(3)],
        "array": np.ones(3),
    }
    model = Cannon(order=1).fit(make_spectra(**facts))
    kept = {name: model.metadata_.get(name) for name in facts}
    assert kept == {
        "row": 1,
        "dark": 0.5,
        "release": "dr10",
        "good": True,
        "pixels": [3],
        "array": None,
    }
    assert [type(kept[name]) for name in ("row", "dark", "release", "good")] == [
        int,
        float,
        str,
        bool,
    ]
    model.save(tmp_path / "model.asdf")
    assert Cannon.load(tmp_path / "model.asdf").metadata_ == model.metadata_


@pytest.mark.parametrize("entry", ["parameters", "label_names_", "theta_", "exponents", "pivots_"])
def test_a_file_that_lacks_an_entry_is_refused_by_name(tmp_path, entry):
    from stellar_lab.training import load_model

    path = tmp_path / "model.asdf"
    Cannon(order=1).fit(make_spectra()).save(path)
    with asdf.open(path, memmap=False, lazy_load=False) as file:
        tree = {name: value for name, value in file.tree.items() if name != entry}
        asdf.AsdfFile(tree).write_to(tmp_path / "less.asdf")
    for read in (Cannon.load, load_model):
        with pytest.raises(LabError, match=f"less.asdf has no entry {entry}"):
            read(tmp_path / "less.asdf")


def test_a_file_with_a_parameter_that_nobody_knows_is_refused(tmp_path):
    path = tmp_path / "model.asdf"
    Cannon(order=1).fit(make_spectra()).save(path)
    with asdf.open(path, memmap=False, lazy_load=False) as file:
        tree = dict(file.tree)
        tree["parameters"] = {"colour": "red", **tree["parameters"]}
        asdf.AsdfFile(tree).write_to(tmp_path / "more.asdf")
    with pytest.raises(LabError, match="more.asdf has the parameters colour, which a Cannon does"):
        Cannon.load(tmp_path / "more.asdf")


def test_a_table_leaves_the_answer_alone():
    model = Cannon(order=1).fit(make_spectra())
    found = Answer(np.ones((2, 3)), np.tile(np.eye(3), (2, 1, 1)), n_good=np.array([0, 40]))
    table = label_table(model, found)
    assert np.isnan(table["teff"].value).tolist() == [True, False]
    assert np.all(found.labels == 1) and np.isfinite(found.covariance).all()
    assert found.resting.all()


def blas_threads():
    pools = ThreadpoolController().select(user_api="blas").info()
    return [pool["num_threads"] for pool in pools]


def test_overlapping_single_threads_give_the_threads_back():
    with ThreadpoolController().limit(limits=2):
        before = blas_threads()
        first, second = single_threaded(), single_threaded()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert set(blas_threads()) <= {1}  # somebody is still inside
        second.__exit__(None, None, None)
        assert blas_threads() == before


def test_training_stars_are_searched_in_one_tree(monkeypatch):
    model = Cannon(order=1).fit(make_spectra())
    built = []
    tree = models.cKDTree
    monkeypatch.setattr(models, "cKDTree", lambda points: built.append(1) or tree(points))
    far = make_labels(50, NAMES, seed=1) * [1, 1, 3]
    first = outside_training(model, far)
    assert np.array_equal(outside_training(model, far), first) and len(built) == 1
    model.fit(make_spectra(seed=5))
    assert not np.array_equal(outside_training(model, far), first) and len(built) == 2


def test_names_of_stars_must_match_the_rows():
    with pytest.raises(LabError, match="2 names of stars for 10 rows"):
        fold_numbers(10, stars=["a", "b"])
