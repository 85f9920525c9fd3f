"Hidden labels and latents: planted truths, and what the other rooms do with these models."

import asdf
import numpy as np
import pytest
from astropy.table import Table
from sklearn.base import clone

from stellar_lab import LatentLabels, cross_label, infer, load_model, with_error_model
from stellar_lab.hidden import HiddenCannon, hidden_values, learn_directions
from stellar_lab.inversion import statistics
from stellar_lab.models import label_values, read_model_file
from stellar_lab.survey import LabError, Spectra


def planted(n=240, pixels=90, seed=0, error=0.01, bad=0.1):
    "Spectra of two labels and two hidden ones, quadratic in the first: a dict of arrays."
    rng = np.random.default_rng(seed)
    world = np.random.default_rng(99)
    slopes = 0.03 * world.normal(size=(3, pixels))
    directions = 0.04 * world.normal(size=(2, pixels))
    labels = rng.normal(size=(n, 2))
    secrets = rng.normal(size=(n, 2))
    terms = np.column_stack([labels, labels[:, 0] ** 2])
    flux = 0.8 + terms @ slopes + secrets @ directions + error * rng.standard_normal((n, pixels))
    ivar = np.where(rng.random(flux.shape) < bad, 0, error**-2)
    flux[ivar == 0] = np.nan
    return {
        "labels": labels * [300, 0.5] + [4500, 2],
        "flux": flux.astype("f4"),
        "ivar": ivar.astype("f4"),
        "secrets": secrets,
        "directions": directions,
    }


def fitted(world, model=None):
    model = HiddenCannon(hidden=2) if model is None else model
    return model.fit(world["labels"], world["flux"], world["ivar"], ["TEFF", "LOGG"])


def pulls(model, world):
    table = infer(model, world["flux"], world["ivar"], min_good=0)
    names = ["teff", "logg"]
    missed = label_values(table, names) - world["labels"]
    return missed / label_values(table, [f"{name}_err" for name in names])


def test_planted_directions_come_back():
    world = planted()
    model = fitted(world)
    inside = np.linalg.lstsq(model.hidden_.T, world["directions"].T, rcond=None)[0]
    lost = world["directions"].T - model.hidden_.T @ inside
    assert np.linalg.norm(lost) < 0.06 * np.linalg.norm(world["directions"])
    values = hidden_values(
        np.nan_to_num(world["flux"] - model.predict(world["labels"])),
        world["ivar"],
        model.hidden_,
        model.scatter_**2,
    )[0]
    terms = model.vectorizer_(model.scale(world["labels"]))
    for secret in world["secrets"].T:
        # what the training stars' secrets share with their labels by chance went into theta
        design = np.column_stack([terms, values])
        left = secret - design @ np.linalg.lstsq(design, secret, rcond=None)[0]
        assert left.std() < 0.06


def test_errors_of_new_stars_are_right_and_labels_unbiased():
    model = fitted(planted(600))
    pull = pulls(model, planted(3_000, seed=5))
    assert np.all(np.abs(pull.mean(axis=0)) < 0.12)
    assert np.all(np.abs(pull.std(axis=0) - 1) < 0.12)


def test_each_round_makes_the_spectra_more_probable():
    world = planted(150)
    flux = np.nan_to_num(world["flux"])
    ivar = world["ivar"]
    terms = np.ones((150, 1))
    mean = np.average(flux, axis=0, weights=ivar)
    found = []
    for rounds in range(1, 8):
        theta, directions, scatter2 = learn_directions(
            flux, ivar, terms, mean[:, None], np.full(90, 1e-5), 4, rounds
        )
        noise = np.where(ivar > 0, 1 / np.where(ivar > 0, ivar, 1) + scatter2, 1e9)
        cost = 0
        for left, variance in zip(flux - theta[:, 0], noise):
            left = np.where(variance < 1e8, left, 0)
            full = np.diag(variance) + directions.T @ directions
            cost += left @ np.linalg.solve(full, left) + np.linalg.slogdet(full)[1]
        found.append(cost)
    assert np.all(np.diff(found) < 1e-3 * abs(found[0]))
    assert found[-1] < found[0]


def test_statistics_are_the_same_in_both_precisions():
    world = planted()
    model = fitted(world)
    single = statistics(model, world["flux"][:9], world["ivar"][:9])
    double = statistics(
        model, world["flux"][:9].astype(float), world["ivar"][:9].astype(float), float
    )
    assert np.allclose(single.A, double.A, rtol=1e-3, atol=1e-4 * np.abs(double.A).max())
    assert single.b.shape == (9, len(model.vectorizer_) - 1)


def test_answers_do_not_depend_on_the_company():
    world = planted()
    model = fitted(world)
    together = infer(model, world["flux"], world["ivar"], min_good=0)
    alone = infer(model, world["flux"][7:8], world["ivar"][7:8], min_good=0)
    error = together["teff_err"][7].value
    assert abs(together["teff"][7].value - alone["teff"][0].value) < 1e-2 * error


@pytest.mark.parametrize("model", [HiddenCannon(hidden=2), LatentLabels(latents=6)])
def test_kept_cloned_and_calibrated(model, tmp_path):
    world = planted(120)
    one = fitted(world, clone(model))
    again = fitted(world, clone(model))
    asked = world["flux"][:5], world["ivar"][:5]
    table = infer(one, *asked, min_good=0)
    assert np.array_equal(table["covariance"], infer(again, *asked, min_good=0)["covariance"])
    one.save(tmp_path / "model.asdf")
    read = load_model(tmp_path / "model.asdf")
    assert np.allclose(infer(read, *asked, min_good=0)["teff"].value, table["teff"].value)
    stars = np.arange(120) % 3
    catalogue = Table(world["labels"], names=["TEFF", "LOGG"])
    spectra = Spectra(np.arange(90) + 15_200.0, world["flux"], world["ivar"], catalogue)
    left_out = cross_label(clone(model), spectra, stars, progress=False)
    calibrated = with_error_model(one, left_out, world["labels"])
    assert infer(calibrated, *asked, min_good=0).meta["errors"] == "calibrated"


def test_latents_read_curves_with_right_errors():
    reader = fitted(planted(400), LatentLabels(latents=8))
    pull = pulls(reader, planted(1_000, seed=5))
    assert np.all(np.abs(pull.std(axis=0) - 1) < 0.25)
    straight = np.corrcoef(pull[:, 0], planted(1_000, seed=5)["labels"][:, 0] ** 2)[0, 1]
    assert abs(straight) < 0.2  # nothing of the curve is left


@pytest.mark.parametrize(
    "model", [HiddenCannon(hidden=-1), HiddenCannon(hidden=0.5), LatentLabels(latents=0)]
)
def test_numbers_that_cannot_be_are_refused(model):
    with pytest.raises(LabError, match="give a whole number"):
        fitted(planted(60), model)


@pytest.mark.parametrize("number", [True, 2.0, "x", np.nan, None, [2]])
def test_numbers_of_another_kind_are_refused(number):
    with pytest.raises(LabError, match="give a whole number"):
        fitted(planted(60), LatentLabels(latents=number))
    if number is not None:  # which lets the stars choose
        with pytest.raises(LabError, match="give a whole number"):
            fitted(planted(60), HiddenCannon(hidden=number))


def test_too_few_stars_and_labels_that_tell_nothing_apart():
    world = planted(9)
    with pytest.raises(LabError, match="9 training stars are too few"):
        fitted(world, LatentLabels())
    world = planted(40)
    world["labels"][:, 1] = 2
    with pytest.raises(LabError, match="LOGG is 2 in all training stars"):
        fitted(world, LatentLabels())
    assert len(fitted(planted(40), HiddenCannon()).hidden_) == 0


@pytest.mark.parametrize("model", [HiddenCannon(hidden=1), LatentLabels(latents=3)])
def test_a_new_fit_forgets_the_old_calibration(model):
    world = planted(80)
    table = infer(fitted(world, model), world["flux"], world["ivar"], min_good=0)
    calibrated = with_error_model(model, table, world["labels"])
    assert calibrated.errors_ == "calibrated"
    assert fitted(world, calibrated).errors_ == "formal"


@pytest.mark.parametrize("model", [HiddenCannon(hidden=1), LatentLabels(latents=3)])
def test_a_file_without_an_entry_is_refused(model, tmp_path):
    path = tmp_path / "model.asdf"
    fitted(planted(80), model).save(path)
    whole = read_model_file(path)
    learned = [name for name in whole if name.endswith("_")]
    assert len(learned) > 8
    optional = {"wavelength_", "error_inflation_", "error_floor_"}
    for name in sorted(set(learned) - optional):
        asdf.AsdfFile({key: value for key, value in whole.items() if key != name}).write_to(path)
        with pytest.raises(LabError, match=f"no entry {name}"):
            load_model(path)


def test_values_of_broken_spectra_are_refused():
    world = planted(80)
    model = fitted(world)
    flux = np.where(world["ivar"] > 0, world["flux"], 0)
    flux[2] = np.nan
    grid = np.arange(90) + 15_200.0
    broken = Spectra(grid, flux, world["ivar"], Table(world["labels"], names=["TEFF", "LOGG"]))
    with pytest.raises(LabError, match="star 2"):
        model.values(broken, world["labels"])
    with pytest.raises(LabError, match="3 rows of labels for 80 spectra"):
        model.values(broken.replace(flux=np.nan_to_num(flux)), world["labels"][:3])
