"""The command line: what it says, what it leaves behind, and how it fails."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from astropy.table import QTable

import stellar_lab
from stellar_lab import archives, clean, cli, survey
from stellar_lab.archives import tree_digest, write_clusters
from stellar_lab.cannon import Cannon
from stellar_lab.clean import find_files
from stellar_lab.cli import ARCHIVE_WRITERS, PRODUCT_NAMES, main
from stellar_lab.inversion import infer
from stellar_lab.labelling import find_spectra, label
from stellar_lab.models import Flag
from stellar_lab.normalize import training_set
from stellar_lab.survey import LABELS, PRODUCTS, RELEASES, LabError
from stellar_lab.training import TrainingReport, count_flags, train

COMMANDS = ("archive", "fetch", "train", "label", "report")
QUICK = ["--labels", "teff,m_h", "--scatter"]  # six terms: forty stars are enough


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "Forty stars, two of their files damaged."
    root = tmp_path_factory.mktemp("archives") / "forty"
    write_clusters(
        root,
        stars=40,
        flaws={"truncated": 1, "html": 1, "no-row": 1, "zero-flux": 1},
        workers=2,
        progress=False,
    )
    return root


@pytest.fixture(scope="module")
def model(root, tmp_path_factory):
    "A model of that archive, in a file with its record."
    path = tmp_path_factory.mktemp("models") / "giants.asdf"
    assert main(["train", str(root), "--model", str(path), *QUICK]) == 0
    return path


@pytest.fixture(scope="module")
def good_files(root):
    "Files of the stars that pass all cuts, and their spectra as training has them."
    spectra, _ = training_set(root, labels=("TEFF", "M_H"), progress=False)
    files = find_files(root, "apstar", "all")
    place = {str(name): str(path) for name, path in zip(files["APOGEE_ID"], files["path"])}
    return [place[str(name)] for name in spectra.stars["APOGEE_ID"]], spectra


@pytest.fixture
def run(capsys):
    "Run a command; gives exit code, output, error output."

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def same_labels(table, expected, model):
    "To a millionth, errors to a ten-thousandth: the covariance comes from float32 products."
    for name in model.label_names_:
        for column, rtol in ((name.lower(), 1e-6), (f"{name.lower()}_err", 1e-4)):
            assert np.allclose(table[column].value, expected[column].value, rtol=rtol, atol=1e-6), (
                column
            )


# --- what it says


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_fits_the_terminal(run, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= width
    assert "Example" in out or not command
    assert "usage: stellar-lab" in out and "==SUPPRESS==" not in out and "None" not in out


def test_help_shows_defaults(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    helps = {command: " ".join(run(command, "--help")[1].split()) for command in COMMANDS}
    for command, default in (
        ("train", "0.33"),
        ("train", "42"),
        ("train", "2"),
        ("fetch", "4"),
        ("fetch", "apstar"),
        ("archive", "42"),
    ):
        assert f"(default: {default})" in helps[command]
    for option in ("--labels", "--fields", "--product", "--continuum-pixels", "--scatter"):
        assert re.search(rf"{option} [^-].*?\(default: ", helps["train"]), option


def test_help_names_what_the_lab_knows(run, monkeypatch):
    "The module does not load the lab to print its help, so names stand there a second time."
    monkeypatch.setenv("COLUMNS", "200")
    helps = {command: " ".join(run(command, "--help")[1].split()) for command in COMMANDS}
    assert ", ".join(LABELS).lower() in helps["train"]
    assert PRODUCT_NAMES == tuple(PRODUCTS)
    assert all(release in helps["fetch"] for release in RELEASES)
    assert all(
        telescope in helps["fetch"]
        for release in RELEASES.values()
        for telescope in release.telescopes
    )
    assert re.findall(r"\b(1|2|4|8|16) (?=not conv|at the edge|far|poor|few)", helps["label"]) == [
        str(flag.value) for flag in Flag
    ]
    assert all(suffix in helps["label"] for suffix in survey.TABLE_FORMATS)
    for name, (module, function) in ARCHIVE_WRITERS.items():
        assert (
            name in survey.ARCHIVES
            and callable(getattr(import_module(f"stellar_lab.{module}"), function))
            and name in helps["archive"]
        )
    overview = run("--help")[1]
    assert all(f"\n    {command} " in overview for command in COMMANDS)


def test_version(run):
    assert run("--version") == (0, f"stellar_lab {stellar_lab.__version__}\n", "")


@pytest.mark.parametrize(
    "words, message",
    [
        (["dance"], "invalid choice: 'dance'"),
        (["train"], "required: ROOT, --model"),
        (["label", "x", "--model", "m.asdf"], "required: --out"),
        (
            ["train", "x", "--model", "m.asdf", "--folds", "5", "--test-size", "0.2"],
            "not allowed with",
        ),
        (["train", "x", "--model", "m.asdf", "--labels", ","], "an empty list"),
        (["train", "x", "--model", "m.asdf", "--seed", "six"], "invalid int value"),
        (["train", "x", "--mod", "m.asdf"], "required: --model"),
        (["archive", "milky-way", "x"], "choose from"),
        (
            ["fetch", "x", "--from", "y", "--product", "apvisit"],
            "unknown product 'apvisit': choose from apstar, aspcapstar",
        ),
    ],
)
def test_words_that_make_no_command(run, words, message):
    code, out, err = run(*words)
    assert (code, out) == (2, "") and message in err and "usage: stellar-lab" in err


def test_no_command_shows_the_way(run):
    code, out, _ = run()
    assert code == 2 and "A first run" in out


def test_the_console_script_and_a_reader_who_leaves():
    "`… | head` is no error, and leaves no traceback."
    script = Path(sys.executable).with_name("stellar-lab")
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"stellar_lab {stellar_lab.__version__}\n",
        "",
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([script, "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command, function, sentence",
    [
        (["fetch", "x", "--from", "y"], "stellar_lab.fetch.fetch", "run the same again"),
        (
            ["archive", "clusters", "x"],
            "stellar_lab.archives.write_clusters",
            "nothing was written",
        ),
        (["train", "x", "--model", "m.asdf"], "stellar_lab.cli.train", "nothing was written"),
    ],
)
def test_interrupted(run, monkeypatch, command, function, sentence):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(function, stop)
    code, _, err = run(*command)
    assert code == 130 and "interrupted" in err and sentence in err and "Traceback" not in err


def test_a_full_disk_is_no_traceback_but_a_mistake_of_ours_is(run, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "x/labels.fits")

    monkeypatch.setattr(cli, "label", full)
    assert run("label", "x", "--model", "m", "--out", "o.fits") == (
        2,
        "",
        "stellar-lab: No space left on device: x/labels.fits\n",
    )
    monkeypatch.setattr(cli, "label", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("label", "x", "--model", "m", "--out", "o.fits")


# --- archive and fetch


def test_archive(run, tmp_path):
    code, out, err = run("archive", "clusters", tmp_path / "a", "--stars", 3, "--seed", 5)
    assert code == 0 and f"archive of 2 stars written to {tmp_path / 'a'}" in out
    before = tree_digest(tmp_path / "a")
    assert (
        "is already at" in run("archive", "clusters", tmp_path / "a", "--stars", 3, "--seed", 5)[1]
    )
    code, out, err = run("archive", "clusters", tmp_path / "a", "--stars", 3, "--seed", 6)
    assert (
        code == 2
        and "holds another archive (clusters, seed 5" in err
        and tree_digest(tmp_path / "a") == before
    )
    assert (
        run("archive", "clusters", tmp_path / "b", "--stars", 1)[0] == 2
        and not (tmp_path / "b").exists()
    )


def test_fetch(run, root, tmp_path):
    folders = sorted(set(find_files(root, "apstar", "all")["FOLDER"]))
    damaged = {
        Path(problem.path).parent.name
        for problem in clean.read_files(find_files(root, "apstar", "all")["path"], progress=False)[
            1
        ]
    }
    whole = [str(name) for name in folders if name not in damaged][:2]
    code, out, _ = run(
        "fetch",
        tmp_path / "copy",
        "--from",
        root,
        "--fields",
        ",".join(whole),
        "--product",
        "APSTAR,aspcapstar",
        "--dry-run",
    )
    listed = re.findall(r"^to fetch +\d+  (.+)$", out, re.MULTILINE)
    assert code == 0 and not (tmp_path / "copy").exists() and len(listed) > 4
    code, out, _ = run(
        "fetch",
        tmp_path / "copy",
        "--from",
        root,
        "--fields",
        ",".join(whole),
        "--product",
        "apstar,aspcapstar",
    )
    assert (
        code == 0
        and f"{len(listed)} fetched" in out
        and all((tmp_path / "copy" / name).is_file() for name in listed)
    )
    assert (
        "0 bytes came"
        in run(
            "fetch",
            tmp_path / "copy",
            "--from",
            root,
            "--fields",
            ",".join(whole),
            "--product",
            "apstar,aspcapstar",
        )[1]
    )
    code, out, _ = run(
        "fetch", tmp_path / "copy", "--from", root, "--fields", ",".join(map(str, folders))
    )
    assert code == 1 and "damaged there" in out
    for words, message in (
        (["--from", tmp_path / "no"], "there is no folder"),
        (["--from", root, "--fields", "1"], "has no field '1'"),
        (["--from", root, "--release", "dr99"], "dr99"),
        (["--from", root, "--workers", "0"], "must be at least 1"),
    ):
        code, out, err = run("fetch", tmp_path / "other", *words)
        assert (code, out) == (2, "") and message in err


# --- train


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
        "labels": ["TEFF", "M_H"],
        "fields": None,
        "product": None,
        "continuum_pixels": None,
        "order": 2,
        "scatter": True,
        "test_size": 0.4,
        "folds": None,
        "seed": 3,
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
        root, labels=("TEFF", "M_H"), folds=3, product="aspcapstar", fields="all", progress=False
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


def test_too_few_stars_for_an_error_model(run, root, tmp_path):
    code, out, _ = run(
        "train", root, "--model", tmp_path / "m.asdf", "--labels", "m_h", "--test-size", "0.1"
    )
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
        (["--continuum-pixels", "nowhere.npy"], "cannot read continuum pixels from nowhere.npy"),
        (["--test-size", "0.95"], "take more stars, a lower order or fewer labels"),
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


def test_paths_that_cannot_be(run, root, model, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.asdf").mkdir()
    (tmp_path / "notes.asdf").write_text("not a model")
    cases = [
        (["train", tmp_path / "no", "--model", tmp_path / "m.asdf"], "there is no folder"),
        (["train", root, "--model", tmp_path / "m.pkl"], "its extension must be .asdf"),
        (["train", root, "--model", tmp_path / "file" / "m.asdf"], "cannot write to"),
        (["train", root, "--model", tmp_path / "folder.asdf"], "it is a folder"),
        (
            [
                "train",
                root,
                "--model",
                tmp_path / "m.asdf",
                "--product",
                "aspcapstar",
                "--labels",
                "m_h",
                "--continuum-pixels",
                Path(archives.__file__).parents[1] / "data" / "continuum_pixels.npy",
            ],
            "continuum pixels change nothing",
        ),
        (
            ["label", root, "--model", tmp_path / "no.asdf", "--out", tmp_path / "o.fits"],
            "there is no model at",
        ),
        (
            ["label", root, "--model", tmp_path / "notes.asdf", "--out", tmp_path / "o.fits"],
            "is not a model of stellar_lab",
        ),
        (
            ["label", root, "--model", tmp_path / "no.asdf", "--out", tmp_path / "o.csv"],
            "its extension must be .fits or .ecsv or .parquet",
        ),
        (
            ["label", root, "--model", model, "--out", tmp_path / "file" / "o.fits"],
            "cannot write to",
        ),
        (
            ["label", tmp_path / "no", "--model", model, "--out", tmp_path / "o.fits"],
            "there is no file or folder",
        ),
        (
            ["label", tmp_path / "folder.asdf", "--model", model, "--out", tmp_path / "o.fits"],
            "holds no apStar or aspcapStar file",
        ),
        (
            ["label", tmp_path / "file", "--model", model, "--out", tmp_path / "o.fits"],
            "none of 1 files gave labels: file: empty",
        ),
        (["report", "--model", tmp_path / "no.asdf"], "there is no model at"),
    ]
    for words, message in cases:
        code, out, err = run(*words)
        assert (code, out) == (2, "") and message in err and "Traceback" not in err, words
    assert not (tmp_path / "o.fits").exists() and not list(tmp_path.glob("m.*"))


# --- label


@pytest.mark.parametrize("suffix", [".fits", ".ecsv", ".parquet"])
def test_round_trip_of_the_table(run, model, good_files, tmp_path, suffix):
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


def test_batches_do_not_matter(model, good_files, monkeypatch):
    files, _ = good_files
    whole = label(model, files[:9], progress=False)
    monkeypatch.setattr(cli, "LABEL_BATCH", 2)
    same_labels(
        label(Cannon.load(model), files[:9], progress=False).table, whole.table, Cannon.load(model)
    )
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


def test_a_model_that_does_not_know_its_product(good_files):
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


def test_new_spectra_are_treated_as_the_training_spectra_were(root, good_files, tmp_path):
    "A model's own continuum pixels travel with it."
    files, _ = good_files
    pixels = survey.wavelength[np.arange(7214) % 20 == 3]
    np.savetxt(tmp_path / "pixels.txt", pixels, fmt="%.4f")
    report = train(
        root,
        tmp_path / "m.asdf",
        labels=["teff", "m_h"],
        continuum_pixels=tmp_path / "pixels.txt",
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
    again = train(root, labels=["teff", "m_h"], continuum_pixels=flags, progress=False)
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

    monkeypatch.setattr("stellar_lab.inversion.infer", stop)
    assert run("label", *files, "--model", model, "--out", out)[0] == 130
    assert out.read_text() == before and [path.name for path in tmp_path.iterdir()] == [
        "labels.ecsv"
    ]


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
        "honest",
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
