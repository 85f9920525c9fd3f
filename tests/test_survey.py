"Facts, cuts and labels of stellar_lab.survey; what a reader learns from stands in nbs/00_survey."

import doctest
import errno
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from astropy import units as u
from astropy.table import Column, MaskedColumn, QTable, Table
from hypothesis import given
from hypothesis import strategies as st

from stellar_lab.survey import (
    ARCHIVE_FILE,
    ARCHIVES,
    LABELS,
    MYSTERY_FILE,
    RELEASES,
    Cut,
    LabError,
    air_to_vacuum,
    archive_sums,
    atomic_path,
    known_sums,
    label_record,
    label_records,
    own_temporary,
    remove_strays,
    safe_output,
    said_of,
    write_table,
)


def test_air_and_vacuum():
    air = np.linspace(15_000, 17_000, 50)
    shift = air_to_vacuum(air) / air - 1
    assert np.all((shift > 2.72e-4) & (shift < 2.74e-4)) and np.all(np.diff(shift) < 0)
    assert float(air_to_vacuum(5006.843)) == pytest.approx(5008.239, abs=0.001)  # SDSS, DR7
    assert air_to_vacuum(air.reshape(5, 10)).shape == (5, 10)


@pytest.mark.parametrize("name", ["TEFF", "teff", "Teff"])
def test_a_known_label_in_any_case(name):
    assert label_record(name) is LABELS["TEFF"] is label_records([name])[0]


def test_an_unknown_label_is_a_plain_number():
    age = label_record("Age")
    assert (age.name, age.symbol, age.axis) == ("Age", "Age", "Age")
    assert age.unit == u.dimensionless_unscaled and age.plot_range is None
    assert age == label_record("Age") and isinstance(hash(age), int)


def test_every_reduction_belongs_to_one_release():
    tags = [tag for release in RELEASES.values() for tag in release.reductions]
    assert sorted(tags) == sorted(set(tags))
    assert [release.row for release in RELEASES.values()] == [1, 1, 1, 0, 0]


# Cuts --------------------------------------------------------------------------------------------


@given(st.lists(st.floats() | st.none(), max_size=8), st.floats(-10, 0), st.floats(0, 10))
def test_an_interval_is_the_plain_comparison(values, low, high):
    column = np.ma.array([v or 0.0 for v in values], mask=[v is None for v in values], dtype=float)
    kept = Cut("x", "X", low, high).keeps(column)
    assert kept.dtype == bool and not isinstance(kept, np.ma.MaskedArray)
    assert kept.tolist() == [v is not None and low < v < high for v in values]


@given(
    st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=8),
    st.lists(st.integers(0, 63), min_size=1, max_size=4),
    st.sampled_from([">i4", "<i4", "i8"]),
)
def test_bits_are_the_plain_loop(values, bits, kind):
    width = 8 * np.dtype(kind).itemsize
    kept = Cut("x", "STARFLAG", without_bits=bits).keeps(np.array(values, kind))
    plain = [
        value != -9999 and not any((value % (1 << width)) >> bit & 1 for bit in bits)
        for value in values
    ]
    assert kept.tolist() == plain


@pytest.mark.parametrize(
    "column",
    [
        [1.0, np.nan, 9.0],
        np.array([1.0, np.nan, 9.0], ">f4"),
        Column([1, np.nan, 9], unit=u.K),
        MaskedColumn([1, 2, 9], mask=[False, True, False], unit=u.K),
        [1, np.nan, 9] * u.K,
        QTable({"x": [1, np.nan, 9] * u.dex})["x"],
        Table({"x": MaskedColumn([1, 0, 9], mask=[0, 1, 0])})["x"],
    ],
)
def test_a_cut_takes_any_column(column):
    assert Cut("x", "X", 0, 5).keeps(column).tolist() == [True, False, False]
    assert Cut("x", "X", without_bits=(0,), high=20).keeps([2, 3, 4]).tolist() == [
        True,
        False,
        True,
    ]


def test_flags_that_nobody_knows_pass_no_cut():
    cut = Cut("x", "ASPCAPFLAG", without_bits=("star_bad", 2))
    flags = np.ma.array([0, 1 << 23, 4, 3, 0, -9999], mask=[0, 0, 0, 0, 1, 0])
    assert cut.keeps(flags).tolist() == [True, False, False, True, False, False]
    assert cut.keeps(flags.filled(0).astype(float)).tolist() == [
        True,
        False,
        False,
        True,
        True,
        False,
    ]
    assert cut.keeps(np.array([np.nan, 0, np.inf])).tolist() == [False, True, False]
    assert cut.keeps([]).tolist() == []


def test_what_a_cut_refuses():
    with pytest.raises(LabError, match="STARFLAG has no bit with the name 'STAR_BAD': choose from"):
        Cut("x", "STARFLAG", without_bits=("STAR_BAD",))
    with pytest.raises(LabError, match="SNR has no bit with the name 'STAR_BAD': give its number"):
        Cut("x", "SNR", without_bits="STAR_BAD")
    for bit in (-1, 64):
        with pytest.raises(LabError, match="a number from 0 to 63"):
            Cut("x", "STARFLAG", without_bits=bit)
    with pytest.raises(LabError, match="'x' needs one number per star, but STARFLAGS holds text"):
        Cut("x", "STARFLAGS", high=1).keeps(["LOW_SNR", ""])
    with pytest.raises(LabError, match=r"but PARAM holds an array of shape \(2, 3\)"):
        Cut("x", "PARAM", high=1).keeps(np.zeros((2, 3)))


def test_how_cuts_read():
    assert [str(cut) for cut in ARCHIVES["survey"].cuts] == ["50 < SNR", "-1 < FE_H"]
    assert str(Cut("x", "A", 1, 2)) == "1 < A < 2"
    assert (
        str(Cut("x", "STARFLAG", without_bits=("LOW_SNR", 9))) == "STARFLAG without LOW_SNR, bit 9"
    )
    assert str(Cut("x", "A", 1, without_bits=9)) == "1 < A without bit 9"


# Docstrings and imports --------------------------------------------------------------------------


@pytest.mark.parametrize("room", ["survey", "clean"])
def test_the_examples_run(room):
    result = doctest.testmod(import_module(f"stellar_lab.{room}"))
    assert result.attempted > 3 and not result.failed


@pytest.mark.parametrize("room", ["survey", "clean"])
def test_reading_needs_no_plotting(room):
    code = f"import stellar_lab.{room}, sys; print(*sys.modules, sep='\\n')"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"matplotlib", "seaborn", "corner", "pandas", "scipy.stats", "astropy.nddata"}
    assert not heavy & set(found)


@pytest.mark.parametrize("room, most", [("survey", 39), ("clean", 14)])
def test_public_names_are_few_and_documented(room, most):
    module = import_module(f"stellar_lab.{room}")
    assert len(module.__all__) <= most
    for name in module.__all__:
        thing = getattr(module, name)
        if callable(thing):
            assert thing.__doc__, name


# --- nothing of the user's is lost ----------------------------------------------------------------


def test_output_never_stands_over_an_input_or_an_archives_file(tmp_path):
    star = tmp_path / "star.fits"
    star.write_bytes(b"the only copy")
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path)
    hard = tmp_path / "hard.fits"
    hard.hardlink_to(star)
    for name in (star, linked / "star.fits", hard, f"{tmp_path}/./star.fits"):
        with pytest.raises(LabError, match="is one of the inputs: give another name"):
            safe_output(name, [star])
    (tmp_path / ARCHIVE_FILE).touch()
    tree = tmp_path / Path(RELEASES["dr14"].allstar).parent
    names = ("truth.fits", MYSTERY_FILE, "archive.json", "apStar-r8-VESTA.fits")
    for name in (*names, "allStar-l31c.2.fits", "allStar-l31c.2.fits.gz"):
        for folder in (tmp_path, tree):
            with pytest.raises(LabError, match="is the name of an archive's own file"):
                safe_output(folder / name)
    assert safe_output(tmp_path / "labels.fits", [star, tmp_path / "nobody"]).name == "labels.fits"
    elsewhere = tmp_path.parent / "truth.fits"  # in no archive, and nothing stands there
    assert safe_output(elsewhere) == elsewhere


def test_output_on_what_is_no_plain_file(tmp_path):
    kept = tmp_path / "kept.ecsv"
    kept.write_text("mine")
    kept.chmod(0o444)
    link = tmp_path / "link.ecsv"
    link.symlink_to(tmp_path / "elsewhere.ecsv")
    pipe = tmp_path / "pipe.ecsv"
    os.mkfifo(pipe)
    folder = tmp_path / "folder.ecsv"
    folder.mkdir()
    says = {
        kept: "is read-only: give another name",
        link: "is a symbolic link to .*: name the file itself",
        pipe: "is a named pipe, not a file",
        folder: "is a folder, not a file",
        Path("/dev/null"): "is a device, not a file",
        kept / "labels.ecsv": "its folder is none",
    }
    for path, words in says.items():
        with pytest.raises(LabError, match=words):
            with atomic_path(path) as temporary:
                temporary.write_text("new")
    assert kept.read_text() == "mine" and link.is_symlink()
    assert {file.name for file in tmp_path.iterdir()} == {path.name for path in list(says)[:4]}


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: free some space"),
        (OSError("Not enough space on disk: requested 9"), "the disk is full: free some space"),
        (RuntimeError("No space left on device"), "the disk is full: free some space"),
        (RuntimeError("[Errno 28] cannot flush"), "the disk is full: free some space"),
        (OSError("Unable to open file ([Errno 30] by a library)"), "the disk is read-only"),
        (OSError(errno.EROFS, "Read-only file system"), "the disk is read-only"),
        (PermissionError(errno.EACCES, "Permission denied"), "permission denied: choose another"),
    ],
)
def test_a_disk_says_in_words_what_is_wrong(tmp_path, trouble, words):
    with pytest.raises(LabError, match=rf"cannot write .*labels.fits: {words}"):
        with atomic_path(tmp_path / "labels.fits") as temporary:
            temporary.write_text("half")
            raise trouble
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trouble", [RuntimeError("[Errno 9999] odd"), RuntimeError("odd")])
def test_what_is_no_trouble_of_a_disk_stays_what_it_is(tmp_path, trouble):
    with pytest.raises(RuntimeError, match="odd"):
        with atomic_path(tmp_path / "labels.fits"):
            raise trouble
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    program = (
        "import os, signal, sys\nfrom stellar_lab.survey import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "labels [*].ecsv"
    subprocess.run([sys.executable, "-c", program, target])
    assert [file.name.startswith(".") for file in tmp_path.iterdir()] == [True]
    ours = tmp_path / f".{os.getppid()}.{target.name}"  # of a process that runs
    ours.touch()
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
    assert {file.name for file in tmp_path.iterdir()} == {target.name, ours.name}


@pytest.mark.parametrize("suffix", [".fits", ".ecsv", ".parquet"])
def test_names_beyond_ascii_are_written(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    strange = os.fsdecode(b"st\xffar")  # bytes that are no letters
    table = Table({"apogee_id": ["étoile", "星", strange], "n": [1, 2, 3]})
    write_table(table, tmp_path / f"t{suffix}")
    back = Table.read(tmp_path / f"t{suffix}")
    names = np.asarray(back["apogee_id"]).tolist()  # bytes where the format has no letters
    names = [name if isinstance(name, bytes) else name.encode() for name in names]
    assert [name.decode() for name in names[:2]] == ["étoile", "星"]
    assert names[2] in (b"st\xffar", b"st\\xffar") and table["apogee_id"][2] == strange


def test_checksums_are_those_of_the_archive_and_of_a_fetch(tmp_path):
    old, new, more = "0" * 64, "1" * 64, "2" * 64
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    lines = [f"{old}  a/one.fits", "nonsense", f"{new}  a/one.fits", f"{more}  a/two.fits"]
    sums = root / "sha256sums.txt"
    sums.write_text("\n".join(lines) + "\n" + f"{old}  a/two.fits")  # the last has no end: killed
    assert archive_sums(root) == {"a/one.fits": new, "a/two.fits": more}
    (root / "archive.json").write_text('{"archive": "clusters", "sha256": {"a/two.fits": "3"}}')
    paths = [root / "a/one.fits", root / "a/two.fits", root / "three.fits", tmp_path / "four.fits"]
    assert known_sums(paths) == [new, "3", "", ""]
    (root / "archive.json").write_text('{"archive": "somebody else\'s"}')
    assert known_sums(paths) == ["", "", "", ""]  # not ours: nothing is known


@pytest.mark.parametrize(
    "error, said",
    [
        (KeyError("seed"), "it has no entry seed"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "it is no text in UTF-8"),
        (RecursionError("maximum recursion depth"), "it is nested too deep"),
        (MemoryError(), "it does not fit into the memory that is left"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (TypeError("'NoneType' object is not iterable"), "it holds something else than it should"),
        (LabError("take another file"), "take another file"),
    ],
)
def test_errors_are_said_in_our_words(error, said):
    assert said_of(error) == said


def test_a_temporary_of_a_temporary_is_removed_too(tmp_path):
    target = tmp_path / "m.asdf"
    for name in (".4194304..4194304.m.asdf", ".4194304.m.asdf"):  # no system has so many processes
        (tmp_path / name).touch()
    own_temporary(own_temporary(target)).touch()
    remove_strays(target)
    assert [file.name for file in tmp_path.iterdir()] == [own_temporary(own_temporary(target)).name]
