"""The workshop of the synthetic stars: shipped files, the grid, faults, the command."""

import hashlib
import importlib.util
import os
import runpy
import sys
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from hypothesis import given
from hypothesis import strategies as st

from stellar_lab import synthesis
from stellar_lab.emulator import (
    DOMAINS,
    GRID_LABELS,
    Emulator,
    grid_wavelength,
    label_matrix,
    unit_labels,
)
from stellar_lab.survey import LabError, MissingExtra, wavelength

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ROOT / "tools" / "synthesis.py"
FOLDERS = {"giants": ROOT / "tools" / "grid", "dwarfs": ROOT / "tools" / "grid" / "dwarfs"}
BATCHES = {domain: sorted(folder.glob("batch_*.fits")) for domain, folder in FOLDERS.items()}
BATCH = 25  # models a file


@pytest.fixture(scope="module")
def emulator():
    return Emulator.load()


@pytest.fixture(scope="module")
def dwarfs():
    return Emulator.load(domain="dwarfs")


def digest(name):
    with as_file(files("stellar_lab.data") / name) as path:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# ---- what is shipped


def test_lines_checks_batches_and_emulators_come_from_the_same_calibration(emulator, dwarfs):
    lines = digest("synthetic_lines.fits")
    assert emulator.facts["LINES"] == dwarfs.facts["LINES"] == lines
    with synthesis._check_file() as hdus:
        assert hdus["LABORATORY"].header["LINES"] == lines
    for path in BATCHES["giants"] + BATCHES["dwarfs"]:
        assert fits.getheader(path, "DEPTH")["LINES"] == lines, path.name


def test_products_name_their_versions(emulator):
    assert {"PYTHON", "PYSME", "NUMPY", "SCIPY", "ASTROPY", "SEED", "MODELS", "ASIDE"} <= set(
        emulator.facts
    )
    assert synthesis._shipped_lines().meta["PYSME"] == emulator.facts["PYSME"] == "1.2.0"


needs_batches = pytest.mark.skipif(
    not BATCHES["giants"], reason="the grid's batches are not at hand"
)


@needs_batches
@pytest.mark.parametrize("domain", DOMAINS)
def test_batches_hold_the_design_and_whole_spectra(domain):
    path = BATCHES[domain][-1]
    number = int(path.stem.split("_")[1])
    design = synthesis.grid_design(
        (number + 1) * BATCH, fits.getheader(path, "DEPTH")["SEED"], domain
    )
    labels, flux, _ = synthesis._read_batch(path)
    assert np.allclose(
        label_matrix(labels[list(GRID_LABELS)]),
        label_matrix(design)[-BATCH:],
    )
    good = np.asarray(labels["GOOD"], bool)
    assert good.mean() > 0.9 and flux.shape == (BATCH, len(grid_wavelength))
    assert flux[good].min() > 0 and flux[good].max() < 1.005


@needs_batches
@pytest.mark.parametrize("domain", DOMAINS)
def test_the_shipped_error_is_that_of_models_kept_aside(domain):
    made = Emulator.load(domain=domain)
    labels, flux, _ = synthesis._read_grid(BATCHES[domain])
    aside = synthesis._kept_aside(len(labels))
    error = synthesis._emulator_error(made, labels[aside], flux[aside])
    assert (aside.sum(), (~aside).sum()) == (made.facts["ASIDE"], made.facts["MODELS"])
    assert error["median"] == pytest.approx(made.facts["RMSMED"], rel=0.05) and error[
        "p99"
    ] == pytest.approx(made.facts["RMS99"], rel=0.05)


def test_the_witness_saw_the_shipped_emulator(emulator):
    with synthesis._check_file() as hdus:
        assert hdus["WITNESS"].header["EMULATOR"] == digest(DOMAINS["giants"].file)
        stars = Table(hdus["WITNESS"].data)
        assert len(stars) == 479 and (stars["INSIDE"] == emulator.inside(stars)).all()
        assert (np.isfinite(stars["CORRELATION"]) == stars["INSIDE"]).all() and len(
            hdus["WITNESS_PIXELS"].data
        ) == len(wavelength)


def test_lines_are_as_the_recipe_says():
    lines = synthesis._shipped_lines()
    change = np.abs(lines["LOGGF_CAL"] - lines["LOGGF"])
    hydrogen = np.asarray(lines["SPECIES"], str) == "H 1"
    assert hydrogen.sum() == 18 and change[hydrogen].max() < 1e-3  # theory knows hydrogen exactly
    assert (lines["DEPTH"].max(axis=1)[~hydrogen] > 0.001).all()
    assert np.all(np.diff(lines["WAVE"]) >= 0) and change.max() < 2


# ---- the grid


def test_the_design_of_the_giants_is_the_one_that_the_grid_was_computed_for():
    labels = label_matrix(
        synthesis.grid_design(1500)
    )  # a change of the last bit would mix two designs in one grid
    assert (
        hashlib.sha256(labels.tobytes()).hexdigest()
        == "3bb0352d619e392455dd2b708a74f64ed587aab0dc43413481fc5dd1db3c9992"
    )


# ---- spectra


@given(st.floats(14000, 18000))
def test_air_and_vacuum_are_inverse(vacuum):
    assert synthesis._vacuum_wavelength(synthesis._air_wavelength(np.array([vacuum])))[
        0
    ] == pytest.approx(vacuum, abs=1e-5)


def test_agreement_forgives_a_continuum_and_leaves_out_pixels_without_weight(emulator):
    stars = label_matrix(synthesis.grid_design(3, seed=4))
    theirs = emulator(stars) * (1 + 0.02 * np.sin(wavelength / 150))
    theirs[1, 500:600] -= 0.1  # a feature that we lack
    theirs[2, :50] = 0  # where ASPCAP has no model
    ivar = np.ones_like(theirs)
    ivar[0, 200:300] = 0
    off, correlation, rms = synthesis._aspcap_agreement(emulator, stars, theirs, ivar)
    assert np.isnan(off[0]).sum() == 100 and np.isnan(off[2]).sum() == 50
    assert max(rms[0], rms[2]) < 2e-3 < rms[1] and correlation[1] < correlation[0]
    assert off[1, 500:600].mean() == pytest.approx(-0.1, abs=0.01)


# ---- files


def test_batches_of_different_lines_do_not_mix(tmp_path):
    labels = synthesis.grid_design(2)
    labels["GOOD"] = True
    for number, lines in enumerate(("one", "two")):
        synthesis._write_batch(
            tmp_path / f"batch_{number}.fits",
            labels,
            np.ones((2, len(grid_wavelength))),
            {"LINES": lines, "SEED": 1},
        )
    with pytest.raises(LabError, match="batch_1.fits was made with other lines"):
        synthesis._read_grid(sorted(tmp_path.iterdir()))


def test_batches_of_giants_and_dwarfs_do_not_mix(tmp_path):
    for number, domain in enumerate(("giants", "dwarfs")):
        labels = synthesis.grid_design(2, domain=domain)
        labels["GOOD"] = True
        facts = {"LINES": "one", "SEED": 1} | (
            {"DOMAIN": domain} if domain == "dwarfs" else {}
        )  # the oldest batches of giants do not say so
        synthesis._write_batch(
            tmp_path / f"batch_{number}.fits",
            labels,
            np.ones((2, len(grid_wavelength))),
            facts,
        )
    with pytest.raises(LabError, match="batch_1.fits was made .* for another domain"):
        synthesis._read_grid(sorted(tmp_path.iterdir()))


def test_a_wrong_tarball_is_named(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "wrong.tar.gz", "w:gz"):
        pass
    with pytest.raises(LabError, match="wrong.tar.gz holds 0 files"):
        synthesis.read_linemake(tmp_path / "wrong.tar.gz")


@pytest.mark.skipif(importlib.util.find_spec("pysme") is not None, reason="PySME is installed")
def test_without_pysme_the_error_says_how_to_get_it():
    with pytest.raises(MissingExtra, match=r"pip install 'stellar_lab\[synthesis\]'"):
        synthesis.Synthesizer(Table(), {})


# ---- what runs without PySME


def test_the_environment_is_as_it_was_even_after_a_fault(monkeypatch):
    monkeypatch.setenv("HOME", "here")
    monkeypatch.delenv("PYSME_H_STARK_CONVOLUTION", raising=False)
    with (
        pytest.raises(ValueError, match="a fault"),
        synthesis._environment(HOME="there", PYSME_H_STARK_CONVOLUTION="legacy"),
    ):
        assert os.environ["HOME"] == "there"
        raise ValueError("a fault")
    assert os.environ["HOME"] == "here" and "PYSME_H_STARK_CONVOLUTION" not in os.environ


def test_a_model_that_fails_is_named_and_left_out(tmp_path, monkeypatch):
    def fake(labels):
        if labels["LOGG"] > np.median(design["LOGG"]):
            raise RuntimeError("no such star")
        return np.full(len(grid_wavelength), 0.5)

    design = synthesis.grid_design(4)
    monkeypatch.setattr(synthesis, "_synthesizer", lambda lines, net: fake)
    path = tmp_path / "batch_0000.fits"
    facts = {"LINES": "x", "SEED": 1}
    failures = synthesis.compute_batch(path, design, "lines", "net", facts)
    labels, flux, _ = synthesis._read_batch(path)
    assert len(failures) == 2 and all("no such star" in line for line in failures)
    assert labels["GOOD"].sum() == 2 and np.allclose(flux[labels["GOOD"]], 0.5)


# ---- the command


def test_the_command_explains_itself(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(COMMAND), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(COMMAND), run_name="__main__")
    assert not end.value.code
    said = capsys.readouterr().out
    assert all(
        step in said
        for step in ("lines", "atmospheres", "calibrate", "check", "grid", "emulator", "witness")
    )


def test_the_emulator_can_be_made_from_batches(tmp_path):
    design = synthesis.grid_design(200)
    unit = unit_labels(label_matrix(design))
    shapes = np.sin(
        np.outer(np.arange(1, 10), grid_wavelength / 3)
    )  # every label moves a pattern of its own
    flux = 0.7 + 0.01 * (unit + 0.2 * unit**2) @ shapes
    design["GOOD"] = True
    for number in range(8):
        rows = slice(25 * number, 25 * number + 25)
        synthesis._write_batch(
            tmp_path / f"batch_{number}.fits", design[rows], flux[rows], {"LINES": "x", "SEED": 1}
        )
    made = synthesis.make_emulator(
        sorted(tmp_path.glob("batch_*.fits")),
        tmp_path / "emulator.fits",
        {"NUMPY": "0"},
        components=12,
    )
    assert made.facts["MODELS"] == 180 and made.facts["RMSMED"] < 2e-3
    assert Emulator.load(tmp_path / "emulator.fits").facts["ASIDE"] == 20
