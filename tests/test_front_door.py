"""What a user meets first: names, help, examples that run, errors for what cannot work."""

import doctest
import inspect
import json
import os
import pydoc
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.table import Table
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import stellar_lab
from stellar_lab.survey import LabError

AGG = {"MPLBACKEND": "Agg"}
ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.stem for path in (ROOT / "stellar_lab").glob("[a-z]*.py"))
PLOTS = "{'matplotlib.pyplot', 'seaborn', 'corner', 'tensorflow'}"


def make_stars(n=120, pixels=40, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=(n, 2))
    flux = 1 + labels @ rng.normal(scale=0.05, size=(2, pixels))
    return labels, flux + rng.normal(scale=0.01, size=(n, pixels))


@pytest.mark.parametrize("name", stellar_lab.__all__)
def test_help_shows_parameters_and_an_example(name):
    thing = getattr(stellar_lab, name)
    if inspect.ismodule(thing):  # the room `normalize` has its function's name
        thing = getattr(thing, name)
    text = pydoc.render_doc(thing, renderer=pydoc.plaintext)
    assert thing.__doc__ and len(thing.__doc__.splitlines()[0]) <= 100
    if name != "Flag":
        assert "Parameters" in text
        assert ">>>" in text
    if inspect.isfunction(thing):
        assert "Returns" in thing.__doc__
        for parameter in inspect.signature(thing).parameters:
            assert parameter in thing.__doc__


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    if ">>>" not in (ROOT / "stellar_lab" / f"{name}.py").read_text():
        return  # loading what has none, TensorFlow perhaps, would say nothing
    module = import_module(f"stellar_lab.{name}")
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, _ = doctest.testmod(module, optionflags=options)
    assert failed == 0


# One process goes through the front door: each import is the first one. What the Cannon does at
# once is done by a copy of the process that has opened no other room than those of the Cannon.
FIRST_STEPS = f"""
import json, os, sys
from importlib import import_module
import stellar_lab
found = {{"lazy": "numpy" not in sys.modules, "names": dir(stellar_lab), "plots": {{}}}}
for room in ("survey", "clean", "normalize", "models", "cannon", "judging"):
    import_module(f"stellar_lab.{{room}}")
    found["plots"][room] = sorted({PLOTS} & set(sys.modules))
    if room == "cannon" and os.fork() == 0:
        from stellar_lab import Cannon, plot_fit
        from stellar_lab.archives import real_stars
        stars = real_stars()[:60]
        plot_fit(Cannon(order=1, labels=["TEFF"]).fit(stars), stars, 3)
        print("fitted", flush=True)
        os._exit(0)
import stellar_lab.readers
found["networks"] = sorted({{"tensorflow", "keras"}} & set(sys.modules))
from stellar_lab import normalize
import stellar_lab.normalize as room
found["callable"] = callable(normalize) and callable(room.continuum)
os.wait()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def first_steps():
    "What a process said of its first steps."
    command = [sys.executable, "-c", FIRST_STEPS]
    environment = os.environ | AGG
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    *others, last = done.stdout.splitlines()
    return json.loads(last) | {"others": others, "err": done.stderr}


def test_the_front_door_is_lazy_and_complete(first_steps):
    assert first_steps["lazy"]
    assert {"Cannon", "infer", "label"} <= set(first_steps["names"])
    assert first_steps["callable"]
    with pytest.raises(AttributeError, match="no attribute 'Canon'"):
        stellar_lab.Canon  # noqa: B018


def test_rooms_without_plots_load_no_plotting(first_steps):
    "One process opens them all, one after the other."
    rooms = ("survey", "clean", "normalize", "models", "cannon", "judging")
    assert first_steps["plots"] == {room: [] for room in rooms}


def test_readers_need_no_tensorflow(first_steps):
    assert first_steps["networks"] == []


def test_the_front_doors_cannon_can_answer_at_once(first_steps):
    assert first_steps["others"] == ["fitted"], first_steps["err"]


def test_labels_and_flux_in_the_wrong_order_are_answered_at_once():
    labels, flux = make_stars(pixels=7214)
    with pytest.raises(LabError, match="labels come first"):
        stellar_lab.Cannon().fit(flux, labels)
    with pytest.raises(LabError, match="labels come first"):
        cross_val_predict(stellar_lab.Cannon(), flux, labels, cv=3)


def test_a_table_names_its_labels():
    labels, flux = make_stars()
    frame = pd.DataFrame(labels, columns=["teff", "age"])
    model = stellar_lab.Cannon(order=1).fit(frame, flux)
    assert model.label_names_ == ("TEFF", "age")
    table = stellar_lab.infer(model, flux[:3], np.full((3, 40), 1e4), min_good=0)
    assert table["teff"].unit == "K"
    assert np.allclose(
        model.predict(table),
        model.predict(np.column_stack([table["teff"].value, table["age"].value])),
    )


def test_what_has_not_learned_says_so():
    labels, flux = make_stars()
    model = stellar_lab.Cannon()
    for question in (
        lambda: model.predict(labels),
        lambda: model.derivative(labels),
        lambda: model.score(labels, flux),
        lambda: model.usable_,
        lambda: stellar_lab.infer(model, flux, flux),
        lambda: model.save("nowhere.asdf"),
        lambda: stellar_lab.infer(stellar_lab.RidgeLabels(), flux, flux),
    ):
        with pytest.raises(NotFittedError):
            question()


def test_scikit_learn_can_work_with_it():
    labels, flux = make_stars()
    left_out = cross_val_predict(stellar_lab.Cannon(order=1), labels, flux, cv=4)
    assert np.std(left_out - flux) < 0.015
    scores = cross_val_score(stellar_lab.Cannon(order=1), labels, flux, cv=4)
    assert np.all(scores > 0.9)
    search = GridSearchCV(stellar_lab.Cannon(), {"order": [0, 1]}, cv=3).fit(labels, flux)
    assert search.best_params_ == {"order": 1}
    pipeline = make_pipeline(StandardScaler(), stellar_lab.Cannon(order=1)).fit(labels, flux)
    assert pipeline.predict(labels).shape == flux.shape
    assert clone(stellar_lab.Cannon(order=3)).get_params()["order"] == 3


OUR_WORDS = "refused, in words of our own"
NO_FEATURES = "labels have names (label_names_), and are not counted as features"
EXCEPTIONS = {
    "check_fit_score_takes_y": "the second argument is called flux",
    "check_n_features_in_after_fitting": NO_FEATURES,
    "check_n_features_in": NO_FEATURES,
    "check_fit2d_predict1d": "one star may be given as one row of labels",
    "check_complex_data": OUR_WORDS,
    "check_dtype_object": OUR_WORDS,
    "check_estimators_empty_data_messages": OUR_WORDS,
    "check_estimators_nan_inf": OUR_WORDS,
    "check_estimator_sparse_tag": OUR_WORDS,
    "check_estimator_sparse_array": OUR_WORDS,
    "check_estimator_sparse_matrix": OUR_WORDS,
    "check_fit2d_1sample": OUR_WORDS,
    "check_requires_y_none": OUR_WORDS,
}


@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_own_checks_hold_but_for_these():
    model = stellar_lab.Cannon(order=1)
    results = check_estimator(model, expected_failed_checks=EXCEPTIONS, on_skip=None)
    failed = {result["check_name"] for result in results if result["status"] == "xfail"}
    assert failed == set(EXCEPTIONS)  # nothing is excused that works
    assert sum(result["status"] == "passed" for result in results) >= 25


def test_a_table_gives_labels_by_name_and_its_gaps_are_no_numbers():
    labels, flux = make_stars()
    table = Table({"LOGG": labels[:, 1], "TEFF": labels[:, 0]}, masked=True)
    model = stellar_lab.Cannon(order=1, labels=["TEFF", "LOGG"]).fit(table, flux)
    assert np.array_equal(model.training_labels_, labels)
    table["TEFF"].mask[4] = True
    with pytest.raises(LabError, match="1 of 120 training stars lack a label"):
        stellar_lab.Cannon(order=1).fit(table, flux)
    terms = stellar_lab.Cannon(terms=["teff^2"]).fit(labels, flux, None, ["teff", "logg"])
    assert terms.vectorizer_.terms == ["1", "TEFF^2"]


def test_a_blind_star_has_no_error_either():
    labels, flux = make_stars()
    ridge = stellar_lab.RidgeLabels().fit(labels, flux, None, ["A", "B"])
    ridge.error_inflation_, ridge.error_floor_ = np.zeros(2), np.ones(2)
    table = stellar_lab.infer(ridge, flux[:2], np.stack([np.zeros(40), np.ones(40)]))
    assert np.isnan(table["a_err"][0]) and np.isfinite(table["a_err"][1])
