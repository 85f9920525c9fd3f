"""The embedded real stars and the writer: files, faults, what must hold for any seed."""

import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stellar_lab import archives
from stellar_lab.archives import (
    _LOG_ERROR_STEP,
    _MAX_ERROR,
    _NO_ERROR,
    MYSTERY_FILE,
    _draw_throughput,
    _encode,
    _pixel_bits,
    _split_visits,
    clusters,
    real_stars,
    tree_digest,
    true_continuum,
    write_archive,
    write_clusters,
)
from stellar_lab.clean import read_archive
from stellar_lab.survey import (
    ARCHIVE_FILE,
    ARCHIVES,
    TRUTH_FILE,
    LabError,
    archive_sums,
    on_band,
    sha256_of,
)

RULES = ARCHIVES["clusters"].rules
FLAWS = {
    "low-snr": 6,
    "no-labels": 6,
    "zero-flux": 4,
    "duplicate": 4,
    "no-row": 5,
    "no-file": 5,
    "truncated": 3,
    "html": 2,
}


def spread(count):
    "The rows of so many of the 553 stars that an archive of that size takes."
    return np.linspace(0, 552, count).round().astype(int)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "Twelve stars, every flaw."
    root = tmp_path_factory.mktemp("archives") / "clusters"
    write_clusters(root, stars=12, workers=2, progress=False)
    return root


def apstar(root, star):
    return root / RULES.path("apstar", str(star["LOCATION_ID"]), star["APOGEE_ID"])


# --- what is shipped


def test_checksums_of_the_readme():
    """data/README.md's table has the checksum of every file.

    But for records, which each run of a tool writes anew."""
    data = files("stellar_lab.data")
    rows = re.findall(
        r"^\| `([\w.]+)` \|.*\| `([0-9a-f]{64})` \|$",
        (data / "README.md").read_text(encoding="utf-8"),
        flags=re.M,
    )
    shipped = {
        file.name
        for file in data.iterdir()
        if file.name.endswith((".fits", ".ecsv", ".npy"))
        and not file.name.startswith(("scoreboard", "coverage", "curves", "faults"))
    }
    assert {name for name, _ in rows} == shipped
    for name, sha256 in rows:
        assert hashlib.sha256((data / name).read_bytes()).hexdigest() == sha256, name


def test_continuum_pixels():
    with (files("stellar_lab.data") / "continuum_pixels.npy").open("rb") as file:
        pixels = np.load(file)
    assert pixels.shape == on_band.shape and pixels.dtype == bool and pixels.sum() == 529


def test_real_stars_match_their_clusters():
    spectra, table = real_stars(), clusters()
    assert len(spectra) == 553 and np.sum(spectra.stars["LOGG"] < 3.8) == 479
    assert list(spectra.stars["FILE"]) == sorted(spectra.stars["FILE"])
    assert spectra.flux.dtype == spectra.ivar.dtype == np.float32
    assert set(spectra.label_names) == set(ARCHIVES["clusters"].labels)
    assert spectra.stars.meta["product"] == "aspcapstar" and spectra.stars.meta["normalized"]
    assert all(
        len(source) == 19 or source == "round"
        for name in ("FE_H_SOURCE", "AGE_SOURCE")
        for source in table[name]
    )
    bibcodes = set(table["FE_H_SOURCE"]) | set(table["AGE_SOURCE"]) - {"round"}
    assert bibcodes == set(table.meta["references"])


def test_a_missing_data_file_says_so(monkeypatch):
    monkeypatch.setattr(archives, "_PACKED_STARS", "lost.fits")
    with pytest.raises(LabError, match="lacks its data file lost.fits: install stellar_lab again"):
        real_stars()


@pytest.mark.skipif(
    not os.environ.get("STELLAR_LAB_CANNON_TARBALL"), reason="STELLAR_LAB_CANNON_TARBALL is not set"
)
def test_remade_file_is_the_shipped_one(tmp_path):
    shipped = (files("stellar_lab.data") / archives._PACKED_STARS).read_bytes()
    sha256 = archives.pack_real_stars(
        os.environ["STELLAR_LAB_CANNON_TARBALL"], tmp_path / "again.fits", progress=False
    )
    assert sha256 == hashlib.sha256(shipped).hexdigest()


def test_a_folder_that_was_tampered_with_is_refused(tmp_path):
    (tmp_path / "Data").mkdir()
    (tmp_path / "reference_labels.csv").write_text("ID\n")
    with pytest.raises(
        LabError, match="are not those of TheCannon 0.3.5: unpack the tarball again"
    ):
        archives.pack_real_stars(tmp_path, tmp_path / "packed.fits", progress=False)
    assert not (tmp_path / "packed.fits").exists()


@given(
    hnp.arrays("f4", 20, elements=st.floats(0, 1.25, width=32)),
    hnp.arrays("f4", 20, elements=st.floats(0, 100, width=32)),
)
def test_packing_keeps_good_pixels_good(flux, error):
    error = np.where(error > 0, np.maximum(error, 1e-3), 0)
    steps, levels = _encode(flux, error)
    back = np.where(levels > _NO_ERROR, np.exp(levels * _LOG_ERROR_STEP), 0)
    assert np.array_equal(
        (flux > 0) & (error > 0) & (error < _MAX_ERROR),
        (steps > 0) & (back > 0) & (back < _MAX_ERROR),
    )
    assert np.all(np.abs(steps * archives._FLUX_STEP - flux) <= 1e-4)
    some = error > 0
    assert np.all(np.abs(np.log(back[some] / error[some].astype(float))) <= _LOG_ERROR_STEP + 1e-9)


# --- the writer


def test_flux_comes_back_from_both_products(small):
    ids, curves = true_continuum(small)
    spectra = real_stars(with_mask=True)[spread(12)]
    sealed = Table.read(small / TRUTH_FILE)["SOURCE_ID"][list(ids).index("mystery")]
    for i, star in enumerate(spectra.stars):
        if star["APOGEE_ID"] == sealed:
            assert not apstar(small, star).exists()
            continue
        with fits.open(apstar(small, star)) as hdus:
            flux, mask = (np.atleast_2d(hdus[k].data)[:, on_band] for k in (1, 3))
        curve, row = curves[list(ids).index(star["APOGEE_ID"])], min(1, len(flux) - 1)
        assert np.abs(flux[row] / curve - spectra.flux[i]).max() < 1e-6
        assert np.array_equal(mask[row] != 0, spectra.mask[i] != 0)
        aspcap = small / RULES.path("aspcapstar", str(star["LOCATION_ID"]), star["APOGEE_ID"])
        with fits.open(aspcap) as hdus:
            assert np.array_equal(hdus[1].data[on_band], spectra.flux[i])
            error, known = hdus[2].data[on_band], spectra.ivar[i] > 0
            assert (
                np.allclose(error[known] ** -2.0, spectra.ivar[i][known], rtol=1e-5)
                and not error[~known].any()
            )


def test_single_visits_are_one_dimensional_and_off_band_pixels_empty(tmp_path):
    stars = real_stars().stars
    rows = np.flatnonzero((stars["NVISITS"] == 1) & (stars["LOGG"] < 3.8))[:4]
    write_clusters(tmp_path / "a", stars=rows, flaws={}, workers=1, progress=False)
    found = sorted((tmp_path / "a").rglob("apStar-*.fits"))
    assert len(found) == 3  # and one mystery star
    off_band = np.setdiff1d(np.arange(8575), on_band)
    for file in found:
        with fits.open(file) as hdus:
            hdus.verify("exception")
            assert [hdus[i].data.shape for i in range(1, 8)] == [(8575,)] * 7 and hdus[
                3
            ].data.dtype == np.dtype(">i2")
            assert (
                not hdus[1].data[off_band].any()
                and np.all(hdus[2].data[off_band] == 1e10)
                and np.all(hdus[3].data[off_band] & 1)
            )


def test_the_mystery_star_is_nameless(small):
    truth = Table.read(small / TRUTH_FILE)
    secret = truth["SOURCE_ID"][truth["FLAW"] == "mystery"][0]
    assert secret.encode() not in (small / MYSTERY_FILE).read_bytes()
    assert secret.encode() not in (small / RULES.allstar).read_bytes()
    with fits.open(small / MYSTERY_FILE) as hdus:
        assert len(hdus) == 10 and hdus[1].data.shape == (8575,) and not hdus[9].data["JD"].any()


def test_flaws_are_where_the_truth_says(small):
    truth, catalogue = Table.read(small / TRUTH_FILE), Table.read(small / RULES.allstar)
    card = json.loads((small / ARCHIVE_FILE).read_text())
    assert card["archive"] == "clusters" and card["files"] == [MYSTERY_FILE, TRUTH_FILE]
    assert card["flaws"] == FLAWS
    rows = {name: catalogue[catalogue["APOGEE_ID"] == name] for name in truth["APOGEE_ID"]}
    for name, flaw in zip(truth["APOGEE_ID"], truth["FLAW"], strict=True):
        exist = [
            bool(list(small.rglob(f"{product}-*-{name}.fits")))
            for product in ("apStar*", "aspcapStar*")
        ]
        if flaw != "mystery":
            assert exist == [flaw != "no-file"] * 2, (name, flaw)
            assert len(rows[name]) == {"no-row": 0, "duplicate": 2}.get(flaw, 1), (name, flaw)
    for name in truth["APOGEE_ID"][truth["FLAW"] == "duplicate"]:
        best = rows[name][np.argmax(rows[name]["SNR"])]
        assert best["LOGG"] > 3.8 > rows[name]["LOGG"].min() and rows[name]["SNR"].min() > 50


def test_low_snr_copies_are_as_noisy_as_they_say(small):
    truth = Table.read(small / TRUTH_FILE)
    spectra, faint = real_stars(), truth[truth["FLAW"] == "low-snr"]
    for name, source, snr in faint["APOGEE_ID", "SOURCE_ID", "SNR"].iterrows():
        clean = spectra[spectra.stars["APOGEE_ID"] == source]
        good = clean.ivar[0] > 0
        noisy = fits.getdata(next(small.rglob(f"aspcapStar-*-{name}.fits")), 1)[on_band]
        assert np.isclose(np.std((noisy - clean.flux[0])[good]), 1 / snr, rtol=0.05) and snr < 50


def test_a_star_is_the_same_in_a_smaller_archive(small, tmp_path):
    rows = spread(12)
    write_clusters(tmp_path / "few", stars=rows[:6], flaws={}, workers=1, progress=False)
    same = {file.name for file in (tmp_path / "few").rglob("apStar-*.fits")} & {
        file.name for file in small.rglob("apStar-*.fits")
    }
    assert len(same) >= 4
    for name in same:
        assert (
            next(small.rglob(name)).read_bytes()
            == next((tmp_path / "few").rglob(name)).read_bytes()
        )


def test_same_seed_same_bytes_for_any_number_of_workers(tmp_path):
    for name, seed, workers in (("a", 3, 1), ("b", 3, 2), ("c", 4, 2)):
        write_clusters(
            tmp_path / name,
            seed=seed,
            stars=4,
            flaws={"low-snr": 1, "html": 1},
            workers=workers,
            progress=False,
        )
    digests = [tree_digest(tmp_path / name) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(archives, "_allstar_table", stop)
    with pytest.raises(KeyboardInterrupt):
        write_clusters(tmp_path / "clusters", stars=3, flaws={}, workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_summary_says_what_its_numbers_count():
    copies = dict(low=4, html=2) | {"no-file": 3}
    summary = archives.ArchiveSummary(Path("here"), 10, 40, 5_000_000, copies, True)
    assert str(summary) == (
        "archive of 10 stars written to here, and a mystery star (11 in all); with 6 planted "
        "copies 16 files of each product, 40 files in all, 5 MB; planted flaws: 4 low, 2 html, "
        "3 no-file"
    )
    old = archives.ArchiveSummary(Path("here"), 10, 23, 5_000_000, {}, False)
    assert str(old).startswith("archive of 10 stars is already at here") and "none" in str(old)


def test_the_summary_counts_files_of_each_product(small):
    summary = write_clusters(small, stars=12, progress=False)
    for product in ("apStar", "aspcapStar"):
        count = len(list(small.rglob(f"{product}-*.fits")))
        assert f" {count} files of each product" in str(summary) and count == 11 + 30


def test_what_stands_in_the_way_is_kept(small, tmp_path):
    before = tree_digest(small)
    assert not write_clusters(small, stars=12, progress=False).new
    with pytest.raises(LabError, match="holds another archive"):
        write_clusters(small, stars=13, progress=False)
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(
        LabError, match="is not an archive of ours: name another folder, or remove it"
    ):
        write_clusters(tmp_path, progress=False)
    with pytest.raises(LabError, match="is not an archive of ours"):
        write_clusters(tmp_path / "letter", progress=False)
    assert (tmp_path / "letter").read_text() == "dear" and tree_digest(small) == before
    (tmp_path / "empty").mkdir()
    assert write_clusters(tmp_path / "empty", stars=3, flaws={}, workers=1, progress=False).new


@pytest.mark.parametrize(
    "stars, message",
    [
        (0, "cannot take 0 stars: .* choose 2 to 553"),
        (554, "cannot take 554 stars"),
        ([0, 1, 2], None),
        (np.arange(3), None),
    ],
)
def test_how_many_stars(tmp_path, stars, message):
    if message:
        with pytest.raises(LabError, match=message):
            write_clusters(tmp_path / "a", stars=stars)
        assert not (tmp_path / "a").exists()
    else:
        assert (
            write_clusters(tmp_path / "a", stars=stars, flaws={}, workers=1, progress=False).stars
            == 2
        )


def test_dwarfs_alone_make_no_archive(tmp_path):
    dwarfs = np.flatnonzero(real_stars().stars["LOGG"] > 3.8)[:5]
    with pytest.raises(LabError, match="only 0 of 5 stars pass the cuts of clusters"):
        write_clusters(tmp_path / "a", stars=dwarfs, progress=False)


def test_lacking_columns_are_named(tmp_path):
    spectra = real_stars(with_mask=True)[:3]
    spectra.stars.remove_columns(["H", "VHELIO"])
    with pytest.raises(LabError, match="lack the column H, VHELIO"):
        write_archive(tmp_path / "a", spectra, "clusters", progress=False)


def test_the_writer_leaves_its_input_alone(tmp_path):
    spectra = real_stars(with_mask=True)[:4]
    before = [spectra.flux.copy(), spectra.ivar.copy(), spectra.mask.copy(), spectra.stars.copy()]
    for array in (spectra.flux, spectra.ivar, spectra.mask):
        array.flags.writeable = False
    once = dict.fromkeys(FLAWS, 1)
    write_archive(
        tmp_path / "a", spectra, ARCHIVES["clusters"], flaws=once, workers=1, progress=False
    )
    after = (spectra.flux, spectra.ivar, spectra.mask)
    assert all(np.array_equal(a, b) for a, b in zip(before[:3], after, strict=True))
    assert before[3].colnames == spectra.stars.colnames and all(
        np.all(before[3][name] == spectra.stars[name]) for name in before[3].colnames
    )


def test_the_full_plan_keeps_every_giant_but_the_mystery():
    spectra, record = real_stars(with_mask=True), ARCHIVES["clusters"]
    for seed in (0, 42):
        plan = archives._plan_archive(spectra, record, seed)
        kept = archives._passes_cuts(spectra.stars[plan["SOURCE"]], record) & (plan["FLAW"] == "")
        assert kept.sum() == 478 and np.sum(plan["FLAW"] == "mystery") == 1
        assert all(
            RULES.parse_name("apstar", f"apStar-r8-{name}.fits") == name
            for name in plan["APOGEE_ID"]
        )


# --- its parts


@settings(max_examples=30)
@given(st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_visits_average_to_their_combination(visits, seed):
    rng = np.random.default_rng(seed)
    flux, error = rng.uniform(10, 4000, 500), rng.uniform(0.1, 10, 500)
    error[:3] = [1e10, 1e6, 1e3]  # no value, and two bad pixels
    fluxes, errors, weights = _split_visits(flux, error, visits, rng)
    assert fluxes.shape == errors.shape == (visits, 500) and np.isclose(weights.sum(), 1)
    assert np.allclose(weights @ fluxes, flux, rtol=1e-9) and np.allclose(
        (errors**-2).sum(axis=0), error**-2.0
    )


@given(
    hnp.arrays("f4", (2, 7214), elements=st.sampled_from([0, 1])),
    hnp.arrays("f4", (2, 7214), elements=st.sampled_from([0, 0.01, 0.5, 10])),
)
@settings(max_examples=15)
def test_bits_on_exactly_the_bad_pixels(flux, error):
    assert np.array_equal(
        _pixel_bits(flux, error) == 0, (flux > 0) & (error > 0) & (error < _MAX_ERROR)
    )


@given(st.integers(0, 2**31), st.text("ABM0123456789+-", min_size=1, max_size=18))
def test_throughput_is_positive_and_repeatable(seed, name):
    drawn = _draw_throughput(seed, name)
    assert np.array_equal(drawn, _draw_throughput(seed, name)) and drawn.shape == (3, 5)
    curve = archives._instrument_continuum([4500], [10], drawn[None])
    assert np.all(curve > 0) and np.all(np.isfinite(curve))


def test_tree_digest_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = tree_digest(tmp_path)
    (tmp_path / ".hidden").write_text("x")
    assert tree_digest(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert tree_digest(tmp_path) != first
    assert Path(tmp_path / "b").read_text() == "1"


# --- what is written stays what it is -------------------------------------------------------------


def test_archive_json_knows_every_file(small):
    card = json.loads((small / ARCHIVE_FILE).read_text())
    files = {file for file in small.rglob("*") if file.is_file()} - {small / ARCHIVE_FILE}
    assert card["sha256"] == {
        file.relative_to(small).as_posix(): sha256_of(file) for file in sorted(files)
    }
    assert archive_sums(small) == card["sha256"] and card["format"] == 2
    spectra, ledger = read_archive(small, progress=False)
    assert spectra.stars["VERIFIED"].all() and len(spectra) > 10


@pytest.fixture
def few(tmp_path):
    "A function that writes a tiny archive."

    def write(name="few"):
        return write_clusters(tmp_path / name, stars=3, flaws={}, workers=1, progress=False)

    return write


def test_a_changed_file_is_seen(few):
    root = few().root
    star = next(root.rglob("apStar-*.fits"))
    content = star.read_bytes()
    star.write_bytes(content[:-1] + b"x")
    with pytest.raises(LabError, match=f"{re.escape(star.name)} is missing or changed, and 0 more"):
        few()
    star.write_bytes(content)
    assert not few().new
    card = json.loads((root / ARCHIVE_FILE).read_text())  # as earlier versions wrote it
    del card["sha256"]
    (root / ARCHIVE_FILE).write_text(json.dumps(card | {"format": 1}))
    assert not few().new
    for content in ("[]", "[" * 10_000, '{"archive": 1, "sha256": 3}'):
        (root / ARCHIVE_FILE).write_text(content)
        with pytest.raises(LabError, match="is not an archive of ours|holds another archive"):
            few()


def test_two_at_once(few, tmp_path, monkeypatch):
    other = few("other").root
    sums = archives._sums

    def slower(tree):
        shutil.copytree(other, tmp_path / "few")  # another run ends first
        return sums(tree)

    monkeypatch.setattr(archives, "_sums", slower)
    summary = few()
    assert not summary.new and tree_digest(tmp_path / "few") == tree_digest(other)
    assert {file.name for file in tmp_path.iterdir()} == {"few", "other"}


def test_a_full_disk_is_said(few, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archives, "_allstar_table", full)
    with pytest.raises(LabError, match="cannot write .*few: the disk is full: free some space"):
        few()
    assert not list(tmp_path.iterdir())


def children(process):
    "Numbers of a process's children."
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc here")
def test_killed_while_it_writes(tmp_path):
    root = tmp_path / "clusters"
    # from a process that has loaded everything
    context = multiprocessing.get_context("fork")
    run = context.Process(
        target=write_clusters, args=[root], kwargs=dict(stars=40, workers=2, progress=False)
    )
    run.start()
    end = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.fits"))) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    workers = children(run.pid)
    run.kill()
    run.join(60)
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < end:
        time.sleep(0.02)
    assert workers and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert [file.name for file in tmp_path.iterdir()] == [f".{run.pid}.clusters"]
    assert write_clusters(root, stars=3, flaws={}, workers=1, progress=False).new
    assert [file.name for file in tmp_path.iterdir()] == ["clusters"]


def test_what_older_versions_left_is_removed(tmp_path):
    old, young, other = (tmp_path / f".small.{end}" for end in ("fdd7p1rr", "abcdefgh", "12345678"))
    for stray in (old, young):
        (stray / "small" / "dr14").mkdir(parents=True)
    (other / "thesis").mkdir(parents=True)
    for stray in (old, other):
        os.utime(stray, (1e9, 1e9))
    archives.write_clusters(tmp_path / "small", stars=3, flaws={}, workers=1, progress=False)
    assert not old.exists() and young.exists() and other.exists()
