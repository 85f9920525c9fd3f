"""From files to a table of labels: found, treated alike, written in any format."""

import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.table import QTable, Table

from stellar_lab import labelling, survey
from stellar_lab.cannon import Cannon
from stellar_lab.clean import find_catalogue, find_files, read_files
from stellar_lab.inversion import infer
from stellar_lab.labelling import find_spectra, label
from stellar_lab.models import Flag
from stellar_lab.normalize import as_trained, training_set
from stellar_lab.readers import RidgeLabels
from stellar_lab.survey import LabError
from stellar_lab.training import train

pytest_plugins = ["forty_stars"]
FACTS = ["snr", "ra", "dec", "field", "telescope"]


@pytest.mark.parametrize("suffix", [".fits", ".ecsv", ".parquet"])
def test_round_trip_of_the_table(run, model, good_files, tmp_path, suffix, same_labels):
    files, spectra = good_files
    trained, out = Cannon.load(model), tmp_path / f"labels{suffix}"
    code, said, err = run("label", "--model", model, *files, "--out", out)
    assert (code, err) == (0, "") and f"{len(files)} of {len(files)} stars labelled" in said
    table, expected = QTable.read(out), infer(trained, spectra)
    wanted = [
        "apogee_id",
        "teff",
        "teff_err",
        "m_h",
        "m_h_err",
        "covariance",
        "chi2",
        "n_good",
        "steps",
        "flags",
        *FACTS,
        "strange_pixels",
        "verified",
        "file",
    ]
    assert table.colnames == wanted and [str(name) for name in table["file"]] == files
    assert [str(name) for name in table["apogee_id"]] == list(spectra.stars["APOGEE_ID"])
    same_labels(table, expected, trained)
    assert all(table[name].unit == expected[name].unit for name in wanted[1:5])
    assert np.allclose(
        np.asarray(table["covariance"]).reshape(-1, 2, 2), expected["covariance"], rtol=1e-5
    )
    assert np.array_equal(table["flags"], expected["flags"]) and np.array_equal(
        table["n_good"], expected["n_good"]
    )


def test_roots_folders_and_files_name_the_same_stars(run, root, model, tmp_path):
    code, out, err = run("label", root, "--model", model, "--out", tmp_path / "root.fits")
    table = QTable.read(tmp_path / "root.fits")
    problems = re.findall(r"^no labels: .*/(.*\.fits): (.*)$", err, re.MULTILINE)
    assert code == 1 and len(problems) == 3 and f"without labels: {len(problems)}" in out
    assert sorted(reason.split(":")[0] for _, reason in problems) == [
        "cut short",
        "no usable pixel, or too few for the model",
        "not a FITS file",
    ]
    everything = find_files(root, "apstar", "all")
    assert len(table) == len(everything) - 2 and {
        Path(str(file)).name[:6] for file in table["file"]
    } == {"apStar"}
    blind = table[~np.isfinite(table["teff"])]
    assert (
        len(blind) == 1
        and blind["flags"][0] & Flag.FEW_PIXELS
        and blind["flags"][0] & Flag.NOT_CONVERGED
    )
    folder = Path(str(table["file"][0])).parent
    inside = table[[Path(str(file)).parent == folder for file in table["file"]]]
    run(
        "label", folder, str(inside["file"][0]), "--model", model, "--out", tmp_path / "folder.ecsv"
    )  # a file named twice is one star
    assert list(QTable.read(tmp_path / "folder.ecsv")["apogee_id"]) == [
        str(name) for name in inside["apogee_id"]
    ]


def test_batches_do_not_matter(model, good_files, same_labels):
    files, _ = good_files
    whole = label(model, files[:9], progress=False)
    loaded = Cannon.load(model)
    same_labels(label(loaded, files[:9], batch=2, progress=False).table, whole.table, loaded)
    alone = label(model, files[4], progress=False)
    assert alone.ok and alone.labelled == 1
    same_labels(alone.table, whole.table[4:5], Cannon.load(model))


def test_the_other_product_is_refused(run, root, model, tmp_path):
    other = [str(path) for path in sorted(root.rglob("aspcapStar-*.fits"))[:3]]
    code, out, err = run("label", *other, "--model", model, "--out", tmp_path / "o.fits")
    assert (
        (code, out) == (2, "")
        and "the model learned from apstar files" in err
        and "aspcapstar file (3 of 3 are)" in err
        and "--any-product" in err
    )
    mine = str(next(root.rglob("apStar-*.fits")))
    code, out, err = run(
        "label", *other, mine, "--any-product", "--model", model, "--out", tmp_path / "o.fits"
    )
    table = QTable.read(tmp_path / "o.fits")
    assert code == 0 and sorted(map(str, table["file"])) == sorted([*other, mine])
    nameless = shutil.copy(other[0], tmp_path / "mystery.fits")  # known by its HDUs alone
    assert find_spectra(nameless) == [(str(nameless), "aspcapstar")]
    assert run("label", nameless, "--model", model, "--out", tmp_path / "o.fits")[0] == 2


def test_a_model_that_does_not_know_its_product(good_files, same_labels):
    files, spectra = good_files
    bare = Cannon(scatter=True).fit(
        spectra.labels(("TEFF", "M_H")), spectra.flux, spectra.ivar, label_names=("TEFF", "M_H")
    )
    with pytest.raises(LabError, match="does not say from which product it learned"):
        label(bare, files[:2], progress=False)
    same_labels(
        label(bare, files[:2], any_product=True, progress=False).table,
        infer(bare, spectra[:2]),
        bare,
    )


def test_new_spectra_are_treated_as_the_training_spectra_were(
    root, good_files, tmp_path, same_labels
):
    "A model's own continuum pixels travel with it."
    files, _ = good_files
    pixels = survey.wavelength[np.arange(7214) % 20 == 3]
    np.savetxt(tmp_path / "pixels.txt", pixels, fmt="%.4f")
    report = train(
        root,
        tmp_path / "m.asdf",
        labels=["teff", "m_h"],
        continuum_pixels=tmp_path / "pixels.txt",
        kind="cannon",
        progress=False,
    )
    flags = np.isin(survey.wavelength, pixels)
    assert report.facts["continuum_pixels"] == {
        "source": "pixels.txt",
        "pixels": np.flatnonzero(flags).tolist(),
    }
    spectra, _ = training_set(root, labels=("TEFF", "M_H"), continuum_pixels=flags, progress=False)
    loaded = Cannon.load(tmp_path / "m.asdf")
    same_labels(label(loaded, files, progress=False).table, infer(loaded, spectra), loaded)
    again = train(
        root, labels=["teff", "m_h"], continuum_pixels=flags, kind="cannon", progress=False
    )
    assert np.array_equal(again.model.theta_, report.model.theta_, equal_nan=True)


def test_what_a_folder_is_searched_for(good_files, tmp_path):
    files, _ = good_files
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    star = Path(files[0]).name
    for name in (star, star.replace(".fits", "-56931.fits"), "notes.txt", f"{star}.part"):
        shutil.copy(files[0], deep / name)
    (deep / "up").symlink_to(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    shutil.copy(files[1], outside)
    (tmp_path / "link").symlink_to(outside)
    found = [Path(path).name for path, kind in find_spectra(tmp_path, "apstar")]
    assert sorted(found) == sorted([star, Path(files[1]).name])
    visit = deep / star.replace(".fits", "-56931.fits")
    assert find_spectra([visit, visit]) == [(str(visit), "apstar")]  # who names a file means it


def test_names_beyond_ascii(run, model, good_files, tmp_path):
    files, _ = good_files
    place = tmp_path / "Jürgens Sterne" / "étoile.fits"
    place.parent.mkdir()
    shutil.copy(files[0], place)
    for suffix in (".fits", ".ecsv"):
        assert (
            run(
                "label",
                place,
                "--model",
                model,
                "--out",
                place.with_suffix(suffix).with_stem("labels"),
            )[0]
            == 0
        )
        table = QTable.read(place.with_suffix(suffix).with_stem("labels"))
        assert str(table["file"][0]) == str(place)


def test_a_failed_run_leaves_the_old_table(run, model, good_files, tmp_path, monkeypatch):
    files, _ = good_files
    out = tmp_path / "labels.ecsv"
    run("label", files[0], "--model", model, "--out", out)
    before = out.read_text()

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("stellar_lab.labelling.infer", stop)
    assert run("label", *files, "--model", model, "--out", out)[0] == 130
    assert out.read_text() == before and [path.name for path in tmp_path.iterdir()] == [
        "labels.ecsv"
    ]


# --- what travels with a model


def test_own_continuum_pixels_travel_from_python(root, good_files, tmp_path, same_labels):
    "A model that was trained without `train` labels with its own pixels, too."
    files, _ = good_files
    pixels = np.arange(7214) % 20 == 3
    spectra, _ = training_set(root, labels=("TEFF", "M_H"), continuum_pixels=pixels, progress=False)
    model = Cannon(scatter=True).fit(spectra)
    model.save(tmp_path / "own.asdf")
    table = label(tmp_path / "own.asdf", files, progress=False).table
    same_labels(table, infer(model, spectra), model)
    usual, _ = training_set(root, labels=("TEFF", "M_H"), progress=False)
    assert np.abs(infer(model, usual, any_recipe=True)["teff"] - table["teff"]).max().value > 1


def test_rows(run, model, good_files, root, tmp_path, same_labels):
    "The row of the files' release, that of the model, or the one that is asked for."
    files, _ = good_files
    several = [file for file in files if survey_rows(file) > 2][:3]
    loaded = Cannon.load(model)

    def expected(row, trained=loaded):
        return infer(trained, as_trained(trained, read_files(several, row=row, progress=False)[0]))

    assert np.all(expected(0)["teff"] != expected(1)["teff"])
    same_labels(label(loaded, several, progress=False).table, expected(1), loaded)
    same_labels(label(loaded, several, row=0, progress=False).table, expected(0), loaded)
    out = tmp_path / "visit.ecsv"
    assert run("label", *several, "--model", model, "--out", out, "--row", 2)[0] == 0
    same_labels(QTable.read(out), expected(2), loaded)
    other = train(root, labels=["teff", "m_h"], row=0, kind="cannon", progress=False).model
    same_labels(label(other, several, progress=False).table, expected(0, other), other)
    newer = [
        shutil.copy(file, tmp_path / Path(file).name.replace("-r8-", "-dr17-")) for file in several
    ]
    same_labels(label(loaded, newer, progress=False).table, expected(0), loaded)  # DR17 means row 0
    spectrum = next(root.rglob("aspcapStar-*.fits"))
    with pytest.raises(LabError, match="holds one spectrum, and no rows"):
        label(loaded, spectrum, row=0, any_product=True, progress=False)


def survey_rows(file):
    "How many rows an apStar file has."
    from astropy.io import fits

    with fits.open(file) as hdus:
        return hdus[1].data.shape[0] if hdus[1].data.ndim > 1 else 1


@pytest.mark.parametrize("errors", ["formal", "calibrated"])
def test_a_table_says_of_what_kind_its_errors_are(run, model, good_files, tmp_path, errors):
    files, spectra = good_files
    path = model
    if errors == "formal":
        path = tmp_path / "formal.asdf"
        Cannon(scatter=True).fit(spectra).save(path)
    code, out, _ = run("label", *files, "--model", path, "--out", tmp_path / "o.ecsv")
    assert code == 0 and f"\nerrors: {errors}" in out and "honest" not in out
    assert QTable.read(tmp_path / "o.ecsv").meta["errors"] == errors


def test_where_a_table_comes_from(run, model, good_files, tmp_path, monkeypatch):
    files, _ = good_files
    words = ["label", files[0], "--model", model, "--out"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    for name in ("a/o.fits", "b/o.fits", "o.ecsv"):
        run(*words, tmp_path / name)
    meta = QTable.read(tmp_path / "o.ecsv").meta
    assert meta["date"] == "2001-09-09T01:46:40Z" and meta["model"] == str(model)
    assert meta["command"].startswith(f"stellar-lab label {files[0]} --model")
    assert (meta["files"], meta["failed"]) == (1, 0)
    one, two = (QTable.read(tmp_path / name / "o.fits") for name in "ab")
    assert one.meta["DATE"] == two.meta["DATE"] and np.array_equal(one["teff"], two["teff"])
    summary = label(model, files[0], tmp_path / "1.ecsv", progress=False)
    label(model, files[0], tmp_path / "2.ecsv", progress=False)
    assert (tmp_path / "1.ecsv").read_bytes() == (tmp_path / "2.ecsv").read_bytes()
    assert not {"date", "command"} & set(summary.table.meta)


# --- what is said


def test_what_was_left_out_is_said(run, root, model, good_files, tmp_path):
    files, _ = good_files
    night = tmp_path / "night"
    night.mkdir()
    for file in [*files[:2], *sorted(root.rglob("aspcapStar-*.fits"))[:2]]:
        shutil.copy(file, night)
    shutil.copy(files[2], night / "my_star.fits")
    shutil.copy(files[2], night / Path(files[2]).name.replace(".fits", "-56931.fits"))
    (night / "notes.txt").write_text("clouds")
    code, out, _ = run("label", night, "--model", model, "--out", tmp_path / "o.fits")
    said = "left out: 2 aspcapStar files, 1 file of single visits, 1 other FITS file (my_star.fits)"
    assert code == 0 and said in out and "2 of 2 stars labelled" in out
    code, out, _ = run(
        "label", night, night / "my_star.fits", "--model", model, "--out", tmp_path / "o.fits"
    )
    assert "3 of 3 stars" in out and "other FITS" not in out
    shutil.move(night / "my_star.fits", night / "a\nb, c.fits")
    code, out, _ = run("label", night, "--model", model, "--out", tmp_path / "o.fits")
    assert "1 other FITS file ('a\\nb, c.fits')\n" in out
    (tmp_path / "empty").mkdir()
    shutil.copy(files[2], tmp_path / "empty" / "my_star.fits")
    with pytest.raises(LabError, match=r"it has 1 other FITS file \(my_star.fits\): name these"):
        find_spectra(tmp_path / "empty")


def test_few_stars_are_shown(model, good_files):
    files, _ = good_files
    few = label(model, files[:5], progress=False)
    many = label(model, files[:6], progress=False)
    text = str(few)
    assert all(str(star) in text for star in few.table["apogee_id"]) and "teff [K]" in text
    value, error = few.table["teff"][0].value, few.table["teff_err"][0].value
    shown, wide = re.search(r"teff \[K\] +(\S+) \+- (\S+)", text).groups()
    assert abs(float(shown) - value) <= error / 10 and abs(float(wide) / error - 1) < 0.05
    assert "teff [K]" not in str(many)


# --- formats


def test_csv_and_votable(run, model, good_files, tmp_path):
    "They open without a warning."
    files, spectra = good_files
    expected = infer(Cannon.load(model), spectra)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("o.csv", "o.vot"):
            assert run("label", *files, "--model", model, "--out", tmp_path / name)[0] == 0
        frame = pd.read_csv(tmp_path / "o.csv")
        table = Table.read(tmp_path / "o.csv")
        votable = Table.read(tmp_path / "o.vot")
    for found in (frame, table, votable):
        assert np.allclose(found["teff"], expected["teff"].value, rtol=1e-6)
        assert list(map(str, found["apogee_id"])) == list(expected["apogee_id"])
        assert list(map(str, found["file"])) == files
    assert np.allclose(frame["cov_teff_m_h"], expected["covariance"][:, 0, 1], rtol=1e-4)
    assert np.allclose(votable["covariance"], expected["covariance"], rtol=1e-4, atol=1e-12)
    assert (str(votable["teff"].unit), str(votable["ra"].unit)) == ("K", "deg")
    assert votable["m_h"].unit is None and votable["m_h"].description == "in dex"
    assert b"calibrated" in (tmp_path / "o.vot").read_bytes()


def test_a_number_that_is_not_there_is_an_empty_cell(root, model, tmp_path):
    label(model, root, tmp_path / "o.csv", progress=False)
    text = (tmp_path / "o.csv").read_text()
    assert "nan" not in text and pd.read_csv(tmp_path / "o.csv")["teff"].isna().sum() == 1
    assert pd.read_csv(tmp_path / "o.csv")["teff"].dtype == float


def test_facts_of_the_star(model, good_files):
    files, spectra = good_files
    table = label(model, files, progress=False).table
    raw, _ = read_files(files, progress=False)
    assert (str(table["ra"].unit), str(table["dec"].unit)) == ("deg", "deg")
    for name in FACTS:
        found = np.asarray(getattr(table[name], "value", table[name]))
        wanted = np.asarray(raw.stars[name.upper()])
        assert np.array_equal(found, wanted, equal_nan=found.dtype.kind == "f"), name
    assert np.isfinite(table["snr"]).all() and np.isfinite(table["ra"].value).all()


# --- kinds of models


def test_a_ridge_regression_labels_and_is_described(run, good_files, tmp_path):
    files, spectra = good_files
    ridge = RidgeLabels(labels=["TEFF", "M_H"]).fit(spectra)
    ridge.save(tmp_path / "ridge.asdf")
    out = tmp_path / "o.ecsv"
    code, said, _ = run("label", *files, "--model", tmp_path / "ridge.asdf", "--out", out)
    assert code == 0 and "errors: formal" in said
    assert np.allclose(QTable.read(out)["teff"], infer(ridge, spectra)["teff"], rtol=1e-6)
    code, said, _ = run("report", "--model", tmp_path / "ridge.asdf")
    assert code == 0 and "a RidgeLabels" in said and "errors       formal" in said


def test_labels_that_say_nothing_are_named(model, good_files):
    files, _ = good_files
    loaded = Cannon.load(model)
    assert "says nothing" not in str(label(loaded, files[:6], progress=False))
    loaded.error_floor_ = loaded.scales_**2 * [2, 0.01]
    said = str(label(loaded, files[:6], progress=False))
    assert "TEFF says nothing" in said and "M_H says nothing" not in said


# --- what a table says of products and rows


def test_errors_are_not_called_calibrated_for_another_product(run, root, model, tmp_path):
    other = sorted(root.rglob("aspcapStar-*.fits"))[:2]
    mine = sorted(root.rglob("apStar-*.fits"))[:2]
    out = tmp_path / "o.fits"
    code, said, _ = run("label", *other, *mine, "--any-product", "--model", model, "--out", out)
    meta = QTable.read(out).meta
    honest = "calibrated on apstar spectra, too small for others"
    assert code == 0 and f"errors: {honest}" in said
    assert "2 of 4 stars are not of the product that the model learned from, apstar" in said
    assert (meta["ERRORS"], meta["PRODUCT"], meta["ROW"]) == (honest, "apstar, aspcapstar", 1)
    code, said, _ = run("label", *mine, "--any-product", "--model", model, "--out", out)
    assert QTable.read(out).meta["ERRORS"] == "calibrated" and "not of the product" not in said
    table = label(model, other, any_product=True, progress=False).table
    assert "row" not in table.meta and table.meta["product"] == "aspcapstar"


def test_a_table_says_from_which_row(model, good_files, tmp_path):
    files, _ = good_files
    assert label(model, files[:3], progress=False).table.meta["row"] == 1
    assert label(model, files[:3], row=0, progress=False).table.meta["row"] == 0
    name = Path(files[0]).name.replace("-r8-", "-dr17-")
    newer = shutil.copy(files[0], tmp_path / name)
    for batch in (1, 64):
        table = label(model, [newer, files[1]], batch=batch, progress=False).table
        assert table.meta["row"] == "that of each file's release"


def test_a_raw_star_keeps_the_dark_mask_with_a_model_of_normalized_spectra(root, good_files):
    files, _ = good_files
    spectra, _ = training_set(root, product="aspcapstar", labels=["TEFF"], progress=False)
    ridge = RidgeLabels(labels=["TEFF"]).fit(spectra)
    raw, _ = read_files(files[:1], progress=False)
    good = np.flatnonzero((raw.ivar[0] > 0) & (raw.mask[0] == 0))
    raw.flux[0, good[1000]] = 0.001 * np.median(raw.flux[0, good])
    assert as_trained(ridge, raw).ivar[0, good[1000]] == 0


# --- arguments that make no sense


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"model": None}, "None is no model"),
        ({"model": Cannon}, "is no model: give a fitted model"),
        ({"model": ""}, "is not a model|cannot|there is no"),
        ({"paths": None}, "named by paths, not by None"),
        ({"paths": 5}, "named by paths, not by 5"),
        ({"paths": []}, "there are no files to label"),
        ({"paths": [["a.fits"]]}, "named by paths, not by"),
        ({"out": 5}, "a table: give a path, not 5"),
        *(({"batch": batch}, "batch is .*: give a whole number") for batch in (0, -2, "a", 2.5)),
        ({"notes": "a"}, "notes is a str"),
        ({"notes": {"x": object()}}, "note 'x' is a object"),
        ({"row": "a"}, "row must be 0, 1, 2"),
    ],
)
def test_arguments_that_make_no_sense_are_named(model, good_files, wrong, message):
    arguments = {"model": model, "paths": good_files[0][:1], "progress": False} | wrong
    with pytest.raises(LabError, match=message):
        label(**arguments)


def test_a_folder_is_no_model(run, good_files, tmp_path):
    for name in ("folder", "folder.asdf"):
        (tmp_path / name).mkdir()
        words = ["label", good_files[0][0], "--model", tmp_path / name, "--out", tmp_path / "o.csv"]
        for command in (words, ["report", "--model", tmp_path / name]):
            code, out, err = run(*command)
            assert (code, out) == (2, "") and name in err and "Traceback" not in err


# --- nothing lost


def test_one_file_that_fails_is_one_line(model, good_files, tmp_path, monkeypatch):
    "Whatever goes wrong with one spectrum, the others are labelled."
    files, _ = good_files
    real = labelling.infer

    def fails(model, spectra, **options):
        if spectra.stars["FILE"][0] and Path(files[4]).name in list(spectra.stars["FILE"]):
            raise ValueError("array must not contain infs or NaNs")
        return real(model, spectra, **options)

    expected = label(model, files[:4] + files[5:9], progress=False).table
    monkeypatch.setattr(labelling, "infer", fails)
    summary = label(model, files[:9], tmp_path / "o.fits", progress=False)
    assert summary.labelled == 8 and summary.problems[0].path == files[4]
    assert "cannot be labelled (array must not" in summary.problems[0].reason
    assert np.allclose(summary.table["teff"].value, expected["teff"].value, rtol=1e-6)
    failed = pd.read_csv(tmp_path / "o-failed.csv")
    assert failed["file"].tolist() == [files[4]] and "o-failed.csv" in str(summary)
    monkeypatch.undo()
    assert not label(model, files[:9], tmp_path / "o.fits", progress=False).failed
    assert not (tmp_path / "o-failed.csv").exists()  # it would be wrong now


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_was_stopped_goes_on(run, model, good_files, tmp_path, monkeypatch, workers):
    files, _ = good_files
    out = tmp_path / "o.ecsv"
    once = label(model, files[:9], tmp_path / "once.ecsv", batch=2, progress=False)
    real = labelling._Parts.keep
    kept = []

    def stop(parts, place, result):
        real(parts, place, result)
        kept.append(place)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(labelling._Parts, "keep", stop)
    with pytest.raises(KeyboardInterrupt):
        label(model, files[:9], out, batch=2, progress=False, workers=workers)
    assert not out.exists() and len(list(tmp_path.glob(".o.ecsv.parts/*.npz"))) == 3
    monkeypatch.undo()
    kept[0].write_bytes(kept[0].read_bytes()[:-50])  # one of them is damaged
    asked = []
    job = labelling._label_job
    monkeypatch.setattr(labelling, "_label_job", lambda *a: asked.append(1) or job(*a))
    label(model, files[:9], out, batch=2, progress=False)
    assert len(asked) == 3  # two that were missing, and the damaged one
    assert out.read_bytes() == (tmp_path / "once.ecsv").read_bytes() and once.ok
    assert sorted(file.name for file in tmp_path.iterdir()) == ["o.ecsv", "once.ecsv"]


@pytest.fixture
def forks(monkeypatch):
    """Processes that label are copies of this one, whatever other tests have loaded or started in
    it: others begin with nothing, and load everything anew."""
    monkeypatch.setattr(labelling.threading, "enumerate", lambda: [threading.main_thread()])
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)


def test_labels_do_not_depend_on_workers_or_batches(model, good_files, tmp_path, forks):
    files, _ = good_files
    tables = {}
    for workers, batch in ((1, 5), (2, 5), (3, 5), (1, 64)):
        out = tmp_path / f"{workers}-{batch}.fits"
        label(model, files, out, batch=batch, workers=workers, progress=False)
        tables[workers, batch] = out.read_bytes()
    assert tables[1, 5] == tables[2, 5] == tables[3, 5]
    one, other = (QTable.read(tmp_path / name) for name in ("1-5.fits", "1-64.fits"))
    for name in ("teff", "m_h"):
        assert np.all(np.abs(one[name] - other[name]) < 1e-3 * one[f"{name}_err"])
    assert np.array_equal(one["flags"], other["flags"])


def test_outputs_spare_what_is_read(run, root, model, good_files, tmp_path):
    star = Path(shutil.copy(good_files[0][0], tmp_path / "star.fits"))
    shutil.copy(good_files[0][1], tmp_path)
    (tmp_path / "diary.csv").write_text("Monday: rain")
    (tmp_path / "new-failed.csv").write_text("mine")
    (tmp_path / "link.fits").symlink_to(star)
    os.link(star, tmp_path / "other.fits")
    catalogue = find_catalogue(root)
    for paths, out, message in (
        ([star], star, "is one of the inputs"),
        ([star], tmp_path / "other.fits", "is one of the inputs"),
        ([star], tmp_path / "link.fits", "a symbolic link to"),
        ([tmp_path], tmp_path / "diary.csv", "no table of labels"),
        ([tmp_path], tmp_path / "new.fits", "new-failed.csv"),
        ([root], catalogue, "an archive's own file"),
        ([tmp_path], Path(good_files[0][2]), "an archive's own file"),
    ):
        before = out.read_bytes() if out.exists() else None
        code, said, err = run("label", "--model", model, *paths, "--out", out)
        assert (code, said) == (2, "") and message in err, (out, err)
        assert before is None or out.read_bytes() == before
    assert not (tmp_path / "new.fits").exists()


def test_a_log_gets_a_line_a_minute(model, good_files, capsys, monkeypatch):
    files, _ = good_files
    label(model, files[:4], batch=1, progress="lines")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(labelling, "_MINUTE", 0)
    label(model, files[:4], batch=1, progress="lines")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[0].startswith("labelling: 1 of 4 stars, 0 without labels")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(model, good_files, monkeypatch, forks, number):
    read, write = os.pipe()

    def wait(*_):
        os.write(write, b"%d\n" % os.getpid())  # at once: both write here
        time.sleep(99)

    monkeypatch.setattr(labelling, "_label_job", wait)
    # from a process that has loaded everything
    process = multiprocessing.get_context("fork").Process(
        target=label,
        args=[str(model), good_files[0][:4]],
        kwargs={"batch": 1, "workers": 2, "progress": False},
    )
    process.start()
    with open(read) as said:
        workers = [int(said.readline()) for _ in range(2)]
    os.close(write)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode is not None
    for _ in range(100):
        alive = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        if not alive:
            return
        time.sleep(0.1)
    raise AssertionError(f"{alive} still run")


def test_a_star_of_an_archive_fits_its_checksum(root, model, good_files, tmp_path):
    copy = tmp_path / "archive"
    shutil.copytree(root, copy)
    first, second = (copy / Path(name).relative_to(root) for name in good_files[0][:2])
    data = bytearray(first.read_bytes())
    data[len(data) // 4] ^= 1
    first.write_bytes(data)
    summary = label(model, [first, second], progress=False)
    (problem,) = summary.problems
    assert (
        problem.path == str(first) and "sha256 is not the one its archive knows" in problem.reason
    )
    table = summary.table
    assert (
        list(table["verified"]) == [True]
        and "1 of 1 spectra had a checksum" in (table.meta["verified"])
    )
    alone = tmp_path / second.name
    shutil.copy(second, alone)
    assert list(label(model, alone, progress=False).table["verified"]) == [False]


def test_strange_pixels_are_counted_and_said(model, good_files, tmp_path):
    path = tmp_path / Path(good_files[0][0]).name
    with fits.open(good_files[0][0]) as hdus:
        hdus[1].data[:, [1000, 2000]] = 1e30
        hdus.writeto(path)
    summary = label(model, path, progress=False)
    assert list(summary.table["strange_pixels"]) == [2]
    assert "2 pixels of 1 stars hold a flux or an error that no star has" in str(summary)
