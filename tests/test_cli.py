"""The command line: what it says, and how it fails."""

import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from commands import CLOSED, loaded

import stellar_lab
from stellar_lab import archives, clean, cli, labelling, survey, training
from stellar_lab.archives import tree_digest
from stellar_lab.clean import find_files
from stellar_lab.labelling import label
from stellar_lab.models import Flag
from stellar_lab.survey import LABELS, PRODUCTS, RELEASES

pytest_plugins = ["forty_stars"]
SCRIPT = Path(sys.executable).with_name("stellar-lab")
COMMANDS = ("archive", "fetch", "train", "label", "check", "repeats", "judge", "report")


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
    assert f"{{{','.join(PRODUCTS)}}}" in helps["train"]
    assert all(release in helps["fetch"] for release in RELEASES)
    assert all(
        telescope in helps["fetch"]
        for release in RELEASES.values()
        for telescope in release.telescopes
    )
    named = (
        "not conv|at the edge|far|poor|few|shifted|broadened|diluted|tilted|a second|unusual|bright"
    )
    assert re.findall(rf"\b(\d+) (?={named})", helps["label"]) == [str(flag.value) for flag in Flag]
    assert all(suffix in helps["label"] for suffix in (*survey.TABLE_FORMATS, ".csv", ".vot"))
    for name, (module, function) in cli._ARCHIVE_WRITERS.items():
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
    done = subprocess.run([SCRIPT, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"stellar_lab {stellar_lab.__version__}\n",
        "",
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([SCRIPT, "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
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
        (["train", "x", "--model", "m.asdf"], "stellar_lab.training.train", "nothing was written"),
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

    monkeypatch.setattr(labelling, "label", full)
    assert run("label", "x", "--model", "m", "--out", "o.fits") == (
        2,
        "",
        "stellar-lab: No space left on device: x/labels.fits; make room, or choose another "
        "folder\n",
    )
    monkeypatch.setattr(labelling, "label", lambda *_, **__: 1 / 0)
    words = ["label", "x", "--model", "m", "--out", "o.fits"]
    code, out, err = run(*words)
    assert (code, out) == (2, "") and "Traceback" not in err and len(err.splitlines()) == 1
    assert "a mistake of stellar_lab itself (ZeroDivisionError" in err and "--debug" in err
    for debug in ([*words, "--debug"], ["--debug", *words]):
        code, out, err = run(*debug)
        assert code == 2 and "Traceback" in err and "ZeroDivisionError" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError(), "not enough memory; close other programs"),
        (ImportError("x.so: cannot allocate memory in static TLS block"), "not enough memory"),
        (OSError(30, "Read-only file system", "m.asdf"), "m.asdf; choose another folder"),
        (OSError(24, "Too many open files"), "raise the limit"),
        (RuntimeError("Not enough\nof it"), "a mistake of stellar_lab itself (RuntimeError: Not"),
    ],
)
def test_every_error_is_one_line_with_a_way_out(run, monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(training, "describe", fail)
    code, out, err = run("report", "--model", "m.asdf")
    assert (code, out) == (2, "") and words in err and len(err.splitlines()) == 1


# --- streams, signals, folders


@pytest.fixture(scope="module")
def process():
    "Run a command as a process of its own, forked from one that has loaded what it needs."
    with loaded() as run:
        yield run


@pytest.mark.parametrize("where", [">&-", ">/dev/full"])
def test_output_that_cannot_be_written_is_said(process, model, good_files, tmp_path, where):
    out = {">&-": CLOSED, ">/dev/full": "/dev/full"}[where]
    words = ["label", "--model", model, good_files[0][0], "--out", tmp_path / "o.fits"]
    ends = [process("report", "--model", model, stdout=out), process(*words, stdout=out)]
    if where == ">&-":  # once from the very beginning, where Python itself finds no output
        command = " ".join(map(str, [SCRIPT, *words, where]))
        ends.append(subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True))
    for done in ends:
        assert done.returncode == 1 and "files that were to be written are written" in done.stderr
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "o.fits").stat().st_size > 1000


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&- <&-"])
def test_a_lost_error_output_loses_nothing_else(process, model, good_files, tmp_path, where):
    (tmp_path / "broken.fits").write_text("no star")
    files = [good_files[0][0], tmp_path / "broken.fits"]
    words = ["label", "--model", model, *files, "--out", tmp_path / "o.fits"]
    if where == "2>/dev/full":
        done = process(*words, stderr="/dev/full")
    else:
        command = " ".join(map(str, [SCRIPT, *words, where]))
        done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "1 of 2 stars labelled" in done.stdout
    assert (tmp_path / "o.fits").stat().st_size > 1000
    assert "broken.fits" in (tmp_path / "o-failed.csv").read_text()


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_signals_are_answered_alike(tmp_path, name, code):
    "A command that waits, here for a pipe, ends with one line."
    program = (
        "import sys, time, types; from stellar_lab import cli; "
        "training = types.ModuleType('stellar_lab.training'); "  # the real one takes seconds
        "training.describe = lambda *_: (print('ready', flush=True), time.sleep(60)); "
        "sys.modules['stellar_lab.training'] = training; "
        "sys.exit(cli.main(['report', '--model', 'x.asdf']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err == "\nstellar-lab: interrupted: nothing was lost\n"


def test_a_folder_that_is_gone(process, model, good_files, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    words = f"label --model {model} {good_files[0][0]} --out"
    command = f"cd {gone}; rmdir {gone}; {SCRIPT} {words} o.fits"
    ends = [subprocess.run(["sh", "-c", command], capture_output=True, text=True)]
    gone.mkdir()
    ends.append(process(*words.split(), tmp_path / "o.fits", gone=gone))
    assert not gone.exists()
    for done in ends:
        assert "Traceback" not in done.stderr and done.returncode in (0, 2)
        assert done.returncode == 0 or "folder" in done.stderr


def test_names_that_are_no_letters(run, process, root, model, good_files, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe9"))
    odd.mkdir()
    star = odd / Path(good_files[0][0]).name
    shutil.copy(good_files[0][0], star)
    shutil.copy(good_files[0][1], odd / "nam\udcfe.fits")
    (odd / "broken.fits").write_text("no star")
    words = ["label", "--model", model, star, odd / "nam\udcfe.fits", odd / "broken.fits", "--out"]
    done = process(*words, odd / "o.fits")
    assert done.returncode == 1 and "2 of 3 stars labelled" in done.stdout, done.stderr
    assert "no letters" in run(*words, odd / "o.parquet")[2]
    label(model, words[3:6], tmp_path / "o.parquet", progress=False)
    for suffix in (".csv", ".ecsv", ".vot"):
        label(*([model, words[3:6], odd / f"o{suffix}"]), progress=False, notes={"a": str(star)})
        assert (odd / "o-failed.csv").read_bytes().count(b"\n") == 2
    (odd / "root").symlink_to(root)
    done = process("train", odd / "root", "--labels", "teff,m_h", "--model", odd / "m.asdf")
    assert done.returncode == 0, done.stderr
    done = process("report", "--model", odd / "m.asdf")
    assert done.returncode == 0 and "rmse" in done.stdout


def test_a_pipe_in_place_of_a_file_is_refused(run, model, good_files, tmp_path):
    os.mkfifo(tmp_path / "pipe.asdf")
    os.mkfifo(tmp_path / "pipe.fits")
    out = tmp_path / "o.fits"
    for words in (
        ["report", "--model", tmp_path / "pipe.asdf"],
        ["label", "--model", tmp_path / "pipe.asdf", good_files[0][0], "--out", out],
        ["label", "--model", model, tmp_path / "pipe.fits", "--out", out],
        ["label", "--model", model, "/dev/zero", "--out", out],
    ):
        code, _, err = run(*words)
        assert code == 2 and "a pipe, a device or a socket" in err
    os.mkfifo(tmp_path / Path(good_files[0][0]).name)
    shutil.copy(good_files[0][1], tmp_path)
    code, said, err = run("label", "--model", model, tmp_path, "--out", out)
    assert code == 1 and "1 of 2 stars labelled" in said and "no file" in err


def test_without_the_command_on_the_path():
    "`python -m` says the same, and words of no command are an error there, too."
    for module in ("stellar_lab", "stellar_lab.cli"):
        version = [sys.executable, "-m", module, "--version"]
        done = subprocess.run(version, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"stellar_lab {stellar_lab.__version__}\n")
        done = subprocess.run([sys.executable, "-m", module, "dance"], capture_output=True)
        assert done.returncode == 2


def test_names_that_moved_are_found_where_they_were():
    assert cli.train is training.train and cli.label is labelling.label
    assert cli.TrainingReport is training.TrainingReport
    with pytest.raises(AttributeError, match="no attribute 'dance'"):
        cli.dance  # noqa: B018


# --- archive and fetch


def test_archive(run, tmp_path, monkeypatch):
    once = {name: replace(flaw, count=1) for name, flaw in archives._FLAWS.items()}
    monkeypatch.setattr(archives, "_FLAWS", once)
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


# --- paths


def test_paths_that_cannot_be(run, root, model, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.asdf").mkdir()
    (tmp_path / "notes.asdf").write_text("not a model")
    cases = [
        (["train", tmp_path / "no", "--model", tmp_path / "m.asdf"], "there is no folder"),
        (["train", root, "--model", tmp_path / "m.pkl"], "its extension must be .asdf"),
        (["train", root, "--model", tmp_path / "file" / "m.asdf"], "cannot write to"),
        (["train", root, "--model", tmp_path / "folder.asdf"], "is a folder, not a file"),
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
            ["label", root, "--model", tmp_path / "no.asdf", "--out", tmp_path / "o.doc"],
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


def test_names_of_files_cannot_move_the_cursor(run, model, tmp_path):
    path = tmp_path / "\x1b[31mred\x1b[0m.fits"
    path.write_bytes(b"")
    where = ("--out", tmp_path / "o.fits")
    code, out, err = run("label", "--model", model, path, *where)
    assert code == 2 and "\\x1b[31mred" in err and "\x1b" not in out + err
    code, out, err = run("label", "--model", model, tmp_path / "caf\xe9\n.fits", *where)
    assert code == 2 and "caf\xe9" in err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems limit memory in other ways")
def test_too_little_memory_is_said_before_anything(model):
    command = f"ulimit -v 500000; {SCRIPT} report --model {model}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("stellar-lab: not enough memory: allow")


def test_a_machine_without_semaphores_brings_no_remark_of_a_library(model):
    "joblib warns while it is imported; it works in one process then, as we ask it to anyway."
    program = (
        "import sys, _multiprocessing\n"
        "def broken(*_, **__):\n    raise OSError(28, 'No space left on device')\n"
        "_multiprocessing.SemLock = broken\n"
        "from stellar_lab.cli import main\n"
        "code = main(['report', '--model', sys.argv[1]])\n"
        "import joblib\n"
        "assert joblib._multiprocessing_helpers.mp is None\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, model], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "a Cannon" in done.stdout


def test_other_warnings_are_shown(run, monkeypatch):
    def warns(*_):
        warnings.warn("joblib will operate in serial mode", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(cli, "_main", warns)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    assert [str(one.message) for one in caught] == ["something else"]


def test_no_command_writes_over_a_file_of_another_kind(run, root, model, good_files, tmp_path):
    star = good_files[0][3]
    (tmp_path / "my.csv").write_text("wavelength,flux,error\n16000,1,0.1\n")
    (tmp_path / "p.csv").write_text("apogee_id,teff\n2M,4500\n")
    (tmp_path / "folds.csv").write_text("my,notes\n")
    for name in ("t.fits", "t.png", "t.ecsv"):
        (tmp_path / name).write_text("my only copy")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for words in (
        ["repeats", star, "--model", model, "--out", tmp_path / "t.fits"],
        ["check", tmp_path / "my.csv", "--model", model, "--plot", tmp_path / "t.png"],
        ["check", tmp_path / "my.csv", "--model", model, "--plot", tmp_path / "my.csv"],
        ["judge", root, tmp_path / "p.csv", "--out", tmp_path / "t.ecsv"],
        ["judge", root, "--write", tmp_path],
        [
            *("label", star, "--model", model, "--out", tmp_path / "l.fits"),
            *("--spectra", tmp_path / "t.fits"),
        ],
    ):
        code, _, err = run(*words)
        assert code == 2 and err.count("\n") == 1, words
        assert "another kind" in err or "its extension must be" in err, err
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
