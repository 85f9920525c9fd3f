"""A training: what it prints and records, and what it refuses."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from stellar_lab import training
from stellar_lab.cannon import Cannon
from stellar_lab.labelling import label
from stellar_lab.models import count_flags
from stellar_lab.survey import LabError
from stellar_lab.training import TrainingReport, describe, load_model, train

pytest_plugins = ["forty_stars"]
QUICK = ["--labels", "teff,m_h", "--scatter"]  # six terms: forty stars are enough


def test_training_prints_and_records(run, root, tmp_path):
    path = tmp_path / "new" / "giants.asdf"
    code, out, err = run(
        "train", root, "--model", path, *QUICK, "--test-size", "0.4", "--seed", "3"
    )
    assert (code, err) == (0, "") and sorted(file.name for file in path.parent.iterdir()) == [
        "giants.asdf",
        "giants.json",
    ]
    record = json.loads(
        path.with_suffix(".json").read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
    )
    assert record["arguments"] == {
        "kind": "cannon",
        "labels": ["TEFF", "M_H"],
        "fields": None,
        "product": None,
        "continuum_pixels": None,
        "row": None,
        "order": 2,
        "scatter": True,
        "test_size": 0.4,
        "folds": None,
        "seed": 3,
        "groups": None,
        "refusal": True,
        "gaps": False,
        "mask": None,
    }
    assert (
        record["archive"]["name"] == "clusters"
        and record["product"] == "apstar"
        and len(record["continuum_pixels"]["pixels"]) == 529
    )
    assert {"stellar_lab", "python", "numpy"} <= set(record["versions"])
    learned, kept = (set(record["stars"][name]) for name in ("training stars", "test stars"))
    assert (
        not learned & kept
        and len(learned | kept) == record["ledger"]["left"]
        and abs(len(kept) / record["ledger"]["left"] - 0.4) < 0.03
    )
    assert set(record["ledger"]["dropped"].values()) >= {
        "damaged",
        "no row in the catalogue",
        "dwarf",
    }
    for name in ("rmse", "scaled_rmse", "mae", "bias"):
        assert name in out and all(
            np.isfinite(row[name]) for rows in record["errors"].values() for row in rows
        )
    assert (
        "files found" in out
        and "errors of the training stars" in out
        and "errors of the test stars" in out
        and str(path) in out
    )
    report = TrainingReport.load(path.with_suffix(".json"))
    report.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.with_suffix(".json").read_text()
    assert str(report).splitlines()[0] == out.splitlines()[0]


def test_same_seed_same_record_and_model(root, model, tmp_path):
    for seed in (42, 43):
        train(
            root,
            tmp_path / str(seed) / model.name,
            labels=["teff", "M_H"],
            scatter=True,
            seed=seed,
            kind="cannon",
            progress=False,
        )
    same, other = (tmp_path / str(seed) / model.name for seed in (42, 43))
    assert (
        same.with_suffix(".json").read_text()
        == model.with_suffix(".json").read_text()
        != other.with_suffix(".json").read_text()
    )
    files = [str(path) for path in sorted(root.rglob("apStar-*.fits"))[:5]]
    first, second = (label(path, files, progress=False).table for path in (model, same))
    assert all(
        np.array_equal(np.asarray(first[name]), np.asarray(second[name]))
        for name in first.colnames
        if name != "file"
    )


def test_folds(root, tmp_path):
    report = train(
        root,
        labels=("TEFF", "M_H"),
        folds=3,
        product="aspcapstar",
        fields="all",
        kind="cannon",
        progress=False,
    )
    assert set(report.errors) == {"training stars", "stars left out in 3 folds"}
    assert (
        np.all(report.errors["stars left out in 3 folds"]["n"] == report.ledger.left)
        and len(report.model.training_labels_) == report.ledger.left
    )
    assert (
        report.facts["product"] == "aspcapstar"
        and report.facts["continuum_pixels"] is None
        and report.facts["arguments"]["test_size"] is None
    )
    assert hasattr(report.model, "error_floor_") and not list(tmp_path.iterdir())


def test_all_spectra_of_a_star_lie_in_one_fold(root, monkeypatch):
    real_set = training.training_set
    real_cross = training.cross_label
    asked = {}

    def twice(*request):
        spectra, ledger = real_set(*request)
        return spectra[np.tile(np.arange(len(spectra)), 2)], ledger

    def cross(model, spectra, groups, progress, prepare=None):
        asked["stars"] = np.array(spectra.stars["APOGEE_ID"], dtype=str)
        asked["groups"] = np.asarray(groups)
        return real_cross(model, spectra, groups, progress, prepare)

    monkeypatch.setattr(training, "training_set", twice)
    monkeypatch.setattr(training, "cross_label", cross)
    train(root, labels=["m_h"], folds=4, kind="cannon", progress=False)
    half = len(asked["stars"]) // 2
    assert np.array_equal(asked["stars"][:half], asked["stars"][half:])
    assert np.array_equal(asked["groups"][:half], asked["groups"][half:])
    assert len(set(asked["groups"])) == 4


def test_the_row_that_was_asked_for(root, tmp_path):
    path = tmp_path / "row.asdf"
    report = train(root, path, labels=["teff", "m_h"], row=0, kind="cannon", progress=False)
    usual = train(root, labels=["teff", "m_h"], kind="cannon", progress=False)
    assert report.facts["arguments"]["row"] == 0
    assert Cannon.load(path).metadata_["row"] == 0 and usual.model.metadata_["row"] == 1
    assert report.facts["model"]["digest"] != usual.facts["model"]["digest"]
    assert "row 0" in training.describe(path)


def test_a_label_that_says_nothing_is_not_praised(root, monkeypatch):
    "Calibrated errors of a label that is worse than the mean: the record says so."
    real_set = training.training_set

    def shuffled(*request):
        spectra, ledger = real_set(*request)
        stars = spectra.stars.copy()
        stars["TEFF"] = np.random.default_rng(0).permutation(stars["TEFF"])
        return spectra.replace(stars=stars), ledger

    assert not re.search(
        "says nothing", str(train(root, labels=["m_h"], kind="cannon", progress=False))
    )
    monkeypatch.setattr(training, "training_set", shuffled)
    report = train(root, labels=["teff"], kind="cannon", progress=False)
    (errors,) = report.errors["test stars"]
    assert errors["scaled_rmse"] > 1
    assert re.search("TEFF says nothing: its RMSE is .* Do not use it", str(report))
    assert any("TEFF says nothing" in note for note in report.to_dict()["notes"])


def test_too_few_stars_for_an_error_model(run, root, tmp_path):
    words = ["--labels", "m_h", "--test-size", "0.1", "--kind", "cannon"]
    code, out, _ = run("train", root, "--model", tmp_path / "m.asdf", *words)
    assert code == 0 and "too few for an error model" in out and "much too small" in out
    assert json.loads((tmp_path / "m.json").read_text())["error_model"] is None
    assert "formal: photon noise alone" in run("report", "--model", tmp_path / "m.asdf")[1]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--labels", "teff,mass"], "unknown label 'mass': choose from TEFF"),
        (["--labels", "teff,TEFF"], "name each once"),
        (["--labels", "fe_h"], "has no label FE_H"),
        (["--fields", "4105,9"], "no apstar or aspcapstar files of field 9 below"),
        (["--test-size", "1.5"], "test_size is 1.5"),
        (["--test-size", "nan"], "test_size is nan"),
        (["--folds", "1"], "folds is 1"),
        (["--folds", "1000"], "1000 folds of"),
        (["--order", "0"], "order is 0"),
        (["--order", "40"], "stars cannot determine 12341 terms"),
        (["--seed", "-1"], "seed is -1"),
        (["--row", "-1"], "row must be 0, 1, 2"),
        (["--row", "0", "--product", "aspcapstar"], "leave the row out"),
        (["--continuum-pixels", "nowhere.npy"], "cannot read continuum pixels from nowhere.npy"),
        (["--test-size", "0.95"], "are too few for a Gaussian process: 10 are needed"),
        (
            ["--test-size", "0.95", "--kind", "cannon"],
            "take more stars, a lower order or fewer labels",
        ),
    ],
)
def test_training_requests_that_cannot_be_met(run, root, tmp_path, words, message):
    words = words if "--labels" in words else ["--labels", "teff,m_h,alpha_m", *words]
    code, out, err = run("train", root, "--model", tmp_path / "m.asdf", *words)
    assert (
        (code, out) == (2, "")
        and err.startswith("stellar-lab: ")
        and message in err
        and not list(tmp_path.iterdir())
    )


# --- report


def test_report(run, model, tmp_path):
    code, out, err = run("report", "--model", model)
    assert (code, err) == (0, "")
    for words in (
        "TEFF",
        "6: 1, TEFF, M_H, TEFF^2",
        "apstar",
        "529 continuum pixels",
        "7214 from 15168",
        "calibrated",
        "files found",
        "rmse",
        Cannon.load(model).training_digest_[:16],
    ):
        assert words in " ".join(out.split()), words
    alone = Path(shutil.copy(model, tmp_path / "alone.asdf"))
    code, out, _ = run("report", "--model", alone)
    assert code == 0 and "no record: there is no record" in out and "TEFF" in out
    alone.with_suffix(".json").write_text('{"format": 1}')
    assert "is not the record of a training" in run("report", "--model", alone)[1]
    record = json.loads(model.with_suffix(".json").read_text())
    record["model"]["digest"] = "0" * 64
    del record["sha256"]  # which would say it first
    alone.with_suffix(".json").write_text(json.dumps(record))
    code, out, _ = run("report", "--model", alone)
    assert code == 0 and "is the record of another training" in out and "rmse" not in out


def test_the_ledger_keeps_its_reasons_where_they_fit(model):
    report = TrainingReport.load(model.with_suffix(".json"))
    wide, narrow = report.lines(150), report.lines(80)
    assert any("the model is one of giants" in line for line in wide) and not any(
        "giants" in line for line in narrow
    )
    assert max(map(len, narrow)) <= 80 and len(wide) == len(narrow)


def test_count_flags():
    assert (
        count_flags([0, 8, 9, 4, 0]) == {"NOT_CONVERGED": 1, "OUTSIDE_TRAINING": 1, "POOR_FIT": 2}
        and count_flags([]) == {}
    )


# --- arguments that make no sense


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"labels": ["teff", "mass"]}, "unknown label 'mass'"),
        ({"labels": 5}, "labels is 5: give a list of names"),
        ({"labels": []}, "labels are none"),
        *(({"folds": k}, "folds is .*: it must be 2 at least") for k in (0, 1, -3, 2.5, "5", [2])),
        ({"folds": float("nan")}, "folds is nan"),
        *(({"seed": s}, "seed is .*: give a whole number") for s in (-1, 1.5, "six", None)),
        *(({"order": o}, "order is .*: it must be") for o in (0, "two", float("inf"), 1.5)),
        *(({"test_size": t}, "test_size is .*: give a share") for t in (0, 1, "a", None)),
        ({"product": "apvisit"}, "unknown product 'apvisit'"),
        ({"product": ["apstar"]}, "unknown product"),
        ({"fields": 4230}, "fields is 4230: give a list of fields"),
        ({"continuum_pixels": [True, False]}, "continuum_pixels is a list"),
        ({"row": "a"}, "row must be 0, 1, 2"),
        ({"path": 5}, "the model: give a path, not 5"),
        ({"root": None}, "the root of an archive: give a path, not None"),
    ],
)
def test_arguments_that_make_no_sense_are_named(root, request_, message):
    arguments = {"root": root, "labels": ["teff", "m_h"], "progress": False} | request_
    with pytest.raises(LabError, match=message):
        train(**arguments)


@pytest.mark.parametrize("fact", ["arguments", "archive", "model", "notes", "error_model"])
@pytest.mark.parametrize("damage", ["missing", "null"])
def test_a_record_that_lacks_something_is_none(model, tmp_path, fact, damage):
    path = tmp_path / "m.asdf"
    shutil.copy(model, path)
    record = json.loads(model.with_suffix(".json").read_text())
    del record["sha256"]  # as a forger would
    if damage == "missing":
        del record[fact]
    else:
        record[fact] = None
    path.with_suffix(".json").write_text(json.dumps(record))
    if (fact, damage) == ("error_model", "null"):  # formal errors
        assert "error floor" not in describe(path)
    else:
        assert "is not the record of a training" in describe(path)


@pytest.mark.parametrize("ask", [load_model, describe])
def test_no_path_is_no_model(ask, tmp_path):
    for nothing in (None, 5):
        with pytest.raises(LabError, match="the file of a model: give a path"):
            ask(nothing)
    with pytest.raises(LabError):
        ask(tmp_path)


# --- nothing lost, nothing half


def test_a_record_replaces_no_other_file(run, root, tmp_path):
    words = ["train", root, "--labels", "teff,m_h", "--model"]
    settings = tmp_path / "m.json"
    for text in ('{"my": "settings"}', "no JSON", '{"archive": "clusters"}', "[" * 9999):
        settings.write_text(text)
        code, out, err = run(*words, tmp_path / "m.asdf")
        assert (code, out) == (2, "") and "m.json" in err and "is no record of a training" in err
        assert settings.read_text() == text and not (tmp_path / "m.asdf").exists()
    settings.unlink()
    assert run(*words, tmp_path / "m.asdf")[0] == 0
    assert run(*words, tmp_path / "m.asdf")[0] == 0  # its own record may be replaced


def test_an_archive_s_record_stays(run, root):
    before = (root / "archive.json").read_bytes()
    code, _, err = run("train", root, "--labels", "teff,m_h", "--model", root / "archive.asdf")
    assert code == 2 and "archive.json" in err and (root / "archive.json").read_bytes() == before


@pytest.mark.parametrize("what", ["link", "read-only", "pipe"])
def test_what_must_not_be_replaced_stays(run, root, tmp_path, what):
    path = tmp_path / "m.asdf"
    if what == "link":
        (tmp_path / "mine").write_text("mine")
        path.symlink_to(tmp_path / "mine")
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("mine")
        path.chmod(0o444)
    code, _, err = run("train", root, "--labels", "teff,m_h", "--model", path)
    assert code == 2 and what in err and "m.asdf" in err


def test_too_few_stars_are_said_and_nothing_is_written(run, root, tmp_path):
    words = ["--model", tmp_path / "m.asdf", "--labels", "teff,m_h,alpha_m", "--kind", "cannon"]
    code, out, err = run("train", root, *words, "--test-size", "0.6")
    assert (code, out) == (2, "") and not list(tmp_path.iterdir())
    assert re.search(r"\d+ training stars, 20 are needed: take more stars, a lower order", err)


def test_a_model_replaces_only_models(run, root, tmp_path):
    path = tmp_path / "thesis.asdf"
    path.write_bytes(b"my only copy")
    code, _, err = run("train", root, "--model", path, *QUICK)
    assert code == 2 and "what stands there is no model of stellar_lab" in err
    assert path.read_bytes() == b"my only copy"


@pytest.mark.parametrize("where", ["the record", "the model's name"])
def test_model_and_record_appear_both_or_neither(root, model, tmp_path, monkeypatch, where):
    path = tmp_path / "m.asdf"
    shutil.copy(model, path)
    shutil.copy(model.with_suffix(".json"), tmp_path / "m.json")
    before = [file.read_bytes() for file in (path, tmp_path / "m.json")]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    real = os.replace
    if where == "the record":
        monkeypatch.setattr(TrainingReport, "save", full)
    else:
        monkeypatch.setattr(os, "replace", lambda a, b: full() if Path(b) == path else real(a, b))
    for there in (True, False):
        with pytest.raises((OSError, LabError)):
            train(root, path, labels=["teff", "m_h"], kind="cannon", progress=False, seed=7)
        after = [file.read_bytes() for file in (path, tmp_path / "m.json") if file.exists()]
        assert after == (before if there else [])
        for file in tmp_path.iterdir():
            file.unlink()


@pytest.mark.parametrize(
    "flux, ivar", [(1e36, 1e4), (np.nan, 1e4), (np.inf, 1e4), (0.9, 1e24), (-3e38, 1e24)]
)
def test_one_damaged_star_does_not_end_a_training(root, monkeypatch, flux, ivar):
    real_set = training.training_set

    def damaged(*request):
        spectra, ledger = real_set(*request)
        spectra.flux[3, 100] = flux
        spectra.ivar[3, 100] = ivar
        return spectra, ledger

    usual = train(root, labels=["teff", "m_h"], kind="cannon", progress=False)
    monkeypatch.setattr(training, "training_set", damaged)
    report = train(root, labels=["teff", "m_h"], kind="cannon", progress=False)
    assert any("1 pixels of 1 stars" in note for note in report.facts["notes"])
    sets = list(usual.errors)
    assert abs(report.errors[sets[1]]["rmse"][0] / usual.errors[sets[1]]["rmse"][0] - 1) < 0.02


@pytest.mark.parametrize("path", [("ledger", "found"), ("errors",), ("notes",), ("arguments",)])
@pytest.mark.parametrize("value", [None, 10**20, "x", [None], {"a": {}}, [[1]], -1, True])
def test_a_record_that_holds_something_else_is_none(model, tmp_path, path, value):
    shutil.copy(model, tmp_path / "m.asdf")
    record = json.loads(model.with_suffix(".json").read_text())
    del record["sha256"]  # as a forger would
    inner = record
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    (tmp_path / "m.json").write_text(json.dumps(record))
    assert "is not the record of a training" in describe(tmp_path / "m.asdf")


@pytest.mark.parametrize("path", [("seed",), ("ledger", "found"), ("model", "digest")])
def test_a_record_that_was_changed_is_none(model, tmp_path, path):
    shutil.copy(model, tmp_path / "m.asdf")
    record = json.loads(model.with_suffix(".json").read_text())
    shown = json.dumps(record, indent=4, sort_keys=True)  # other lines, the same facts
    (tmp_path / "m.json").write_text(shown)
    assert "is not the record" not in describe(tmp_path / "m.asdf")
    inner = record
    for name in path[:-1]:
        inner = inner[name]
    last = inner[path[-1]]
    inner[path[-1]] = f"{last}0" if isinstance(last, str) else last + 1
    (tmp_path / "m.json").write_text(json.dumps(record))
    assert "it was changed since it was written" in describe(tmp_path / "m.asdf")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"{", b"", b'{"format": 1}'])
def test_a_foreign_record_is_described_in_our_words(model, tmp_path, content):
    shutil.copy(model, tmp_path / "m.asdf")
    (tmp_path / "m.json").write_bytes(content)
    said = describe(tmp_path / "m.asdf")
    assert "is not the record of a training" in said
    assert not any(word in said for word in ("codec", "Expecting", "recursion", "Error"))


def test_a_record_cannot_move_the_cursor(model, tmp_path):
    shutil.copy(model, tmp_path / "m.asdf")
    record = json.loads(model.with_suffix(".json").read_text())
    del record["sha256"]
    record["arguments"]["test_size"] = "\x1b[2J"
    record["notes"][0] = "\x07 beep"
    (tmp_path / "m.json").write_text(json.dumps(record))
    said = describe(tmp_path / "m.asdf")
    assert "\\x1b[2J" in said and "\\x07 beep" in said
    assert all(letter.isprintable() or letter == "\n" for letter in said)


@pytest.mark.parametrize("kind", ["cannon", "latents"])
def test_stars_that_lack_labels_take_part(root, monkeypatch, kind):
    real_set = training.training_set

    def with_gaps(*request):
        assert request[7]  # stars with gaps are asked for
        spectra, ledger = real_set(*request)
        stars = spectra.stars.copy()
        stars["M_H"][::4] = np.nan
        return spectra.replace(stars=stars), ledger

    monkeypatch.setattr(training, "training_set", with_gaps)
    wish = {"labels": ["teff", "m_h"], "kind": kind, "progress": False, "test_size": 0.4}
    report = train(root, gaps=True, **wish)
    (errors,) = (table for name, table in report.errors.items() if name == "test stars")
    known = dict(zip(errors["label"], errors["n"], strict=True))
    assert known["M_H"] < known["TEFF"] == len(report.facts["stars"]["test stars"])
    assert np.isfinite(report.model.training_labels_).all()
    assert len(report.model.training_labels_) == len(report.facts["stars"]["training stars"])
