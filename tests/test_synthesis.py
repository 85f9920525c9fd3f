"""Synthetic stars: shipped files that belong together, labels and grids as properties, faults that a user can cause, the command."""

import hashlib
import importlib.util
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_lab import synthesis
from stellar_lab.survey import LabError, MissingExtra, wavelength
from stellar_lab.synthesis import GRID_LABELS, Emulator

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ROOT / "tools" / "synthesis.py"
FOLDERS = {"giants": ROOT / "tools" / "grid", "dwarfs": ROOT / "tools" / "grid" / "dwarfs"}
BATCHES = {domain: sorted(folder.glob("batch_*.fits")) for domain, folder in FOLDERS.items()}
unit_cubes = st.lists(
    st.lists(st.floats(0, 1), min_size=9, max_size=9), min_size=1, max_size=5
).map(np.array)


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
    lines = digest(synthesis.LINES_FILE)
    assert emulator.facts["LINES"] == dwarfs.facts["LINES"] == lines
    with synthesis.check_file() as hdus:
        assert hdus["LABORATORY"].header["LINES"] == lines
    for path in BATCHES["giants"] + BATCHES["dwarfs"]:
        assert fits.getheader(path, "DEPTH")["LINES"] == lines, path.name


def test_products_name_their_versions(emulator):
    assert {"PYTHON", "PYSME", "NUMPY", "SCIPY", "ASTROPY", "SEED", "MODELS", "ASIDE"} <= set(
        emulator.facts
    )
    assert synthesis.shipped_lines().meta["PYSME"] == emulator.facts["PYSME"] == "1.2.0"


needs_batches = pytest.mark.skipif(
    not BATCHES["giants"], reason="the grid's batches are not at hand"
)


@needs_batches
@pytest.mark.parametrize("domain", synthesis.DOMAINS)
def test_batches_hold_the_design_and_whole_spectra(domain):
    path = BATCHES[domain][-1]
    number = int(path.stem.split("_")[1])
    design = synthesis.grid_design(
        (number + 1) * synthesis.BATCH, fits.getheader(path, "DEPTH")["SEED"], domain
    )
    labels, flux, _ = synthesis.read_batch(path)
    assert np.allclose(
        synthesis.label_matrix(labels[list(GRID_LABELS)]),
        synthesis.label_matrix(design)[-synthesis.BATCH :],
    )
    good = np.asarray(labels["GOOD"], bool)
    assert good.mean() > 0.9 and flux.shape == (synthesis.BATCH, len(synthesis.grid_wavelength))
    assert flux[good].min() > 0 and flux[good].max() < 1.005


@needs_batches
@pytest.mark.parametrize("domain", synthesis.DOMAINS)
def test_the_shipped_error_is_that_of_models_kept_aside(domain):
    made = Emulator.load(domain=domain)
    labels, flux, _ = synthesis.read_grid(BATCHES[domain])
    aside = synthesis.kept_aside(len(labels))
    error = synthesis.emulator_error(made, labels[aside], flux[aside])
    assert (aside.sum(), (~aside).sum()) == (made.facts["ASIDE"], made.facts["MODELS"])
    assert error["median"] == pytest.approx(made.facts["RMSMED"], rel=0.05) and error[
        "p99"
    ] == pytest.approx(made.facts["RMS99"], rel=0.05)


def test_the_witness_saw_the_shipped_emulator(emulator):
    with synthesis.check_file() as hdus:
        assert hdus["WITNESS"].header["EMULATOR"] == digest(synthesis.EMULATOR_FILES["giants"])
        stars = Table(hdus["WITNESS"].data)
        assert len(stars) == 479 and (stars["INSIDE"] == emulator.inside(stars)).all()
        assert (np.isfinite(stars["CORRELATION"]) == stars["INSIDE"]).all() and len(
            hdus["WITNESS_PIXELS"].data
        ) == len(wavelength)


def test_lines_are_as_the_recipe_says():
    lines = synthesis.shipped_lines()
    change = np.abs(lines["LOGGF_CAL"] - lines["LOGGF"])
    hydrogen = np.asarray(lines["SPECIES"], str) == "H 1"
    assert hydrogen.sum() == 18 and change[hydrogen].max() < 1e-3  # theory knows hydrogen exactly
    assert (lines["DEPTH"].max(axis=1)[~hydrogen] > synthesis.MIN_DEPTH).all()
    assert np.all(np.diff(lines["WAVE"]) >= 0) and change.max() < 2


# ---- labels


@given(unit_cubes, st.sampled_from(list(synthesis.DOMAINS)))
@settings(deadline=None)
def test_labels_and_their_place_in_the_domain_are_inverse(cube, domain):
    assert np.allclose(
        synthesis.unit_labels(synthesis.labels_from_unit(cube, domain), domain), cube, atol=1e-6
    )


def test_the_design_of_the_giants_is_the_one_that_the_grid_was_computed_for():
    labels = synthesis.label_matrix(
        synthesis.grid_design(1500)
    )  # a change of the last bit would mix two designs in one grid
    assert (
        hashlib.sha256(labels.tobytes()).hexdigest()
        == "3bb0352d619e392455dd2b708a74f64ed587aab0dc43413481fc5dd1db3c9992"
    )


def test_dwarfs_follow_the_main_sequence():
    dwarfs = synthesis.grid_design(256, domain="dwarfs")
    assert dwarfs["TEFF"].min() >= 4000 and dwarfs["TEFF"].max() <= 6200
    assert (
        synthesis.grid_design(100, domain=synthesis.DWARFS)["LOGG"] == dwarfs["LOGG"][:100]
    ).all()
    assert (
        np.corrcoef(dwarfs["TEFF"], dwarfs["LOGG"])[0, 1] < -0.6
    )  # the heavier a dwarf, the hotter and the larger
    assert not (
        (synthesis.unit_labels(synthesis.label_matrix(dwarfs)) <= 1).all(axis=1)
    ).any()  # none is a giant


def test_an_unknown_domain_is_named():
    with pytest.raises(
        LabError, match="there is no domain 'hamsters' of synthetic stars: choose giants or dwarfs"
    ):
        synthesis.grid_design(4, domain="hamsters")


def test_usual_dwarfs_have_not_dredged_up():
    star = {"TEFF": [5000.0], "LOGG": [4.55], "FE_H": [0.0]}
    giant, dwarf = synthesis.complete_labels(star), synthesis.complete_labels(star, "dwarfs")
    assert giant["N_FE"][0] > dwarf["N_FE"][0] == 0 and giant["C_FE"][0] < dwarf["C_FE"][0] == 0
    unit = synthesis.unit_labels(synthesis.label_matrix(dwarf), "dwarfs")
    assert ((unit >= 0) & (unit <= 1)).all()


@given(unit_cubes)
@settings(deadline=None, max_examples=25)
def test_every_star_of_the_domain_has_a_spectrum(emulator, cube):
    labels = synthesis.labels_from_unit(cube)
    flux = emulator(labels)
    assert emulator.inside(labels).all()
    assert flux.shape == (len(cube), len(wavelength)) and np.isfinite(flux).all()
    assert (
        flux.min() > -0.1 and flux.max() < 1.1
    )  # in the corners of nine dimensions a polynomial may overshoot


@given(unit_cubes)
@settings(deadline=None, max_examples=25)
def test_every_dwarf_of_the_domain_has_a_spectrum_and_is_no_giant(emulator, dwarfs, cube):
    labels = synthesis.labels_from_unit(cube, "dwarfs")
    flux = dwarfs(labels)
    assert np.isfinite(flux).all() and flux.min() > 0 and flux.max() < 1.1
    assert dwarfs.inside(labels).all() and not emulator.inside(labels).any()
    with pytest.raises(
        LabError,
        match="lie outside the grid of giants, the first is row 0 with its LOGG|TEFF, LOGG",
    ):
        emulator(labels)


@given(st.floats(3000, 8000), st.floats(-1, 5), st.floats(-3, 1))
@settings(deadline=None, max_examples=50)
def test_complete_labels_keeps_what_it_is_given(teff, logg, fe_h):
    table = synthesis.complete_labels(
        {"TEFF": [teff], "LOGG": [logg], "FE_H": [fe_h], "MG_FE": [0.3]}
    )
    assert (
        table["TEFF"][0],
        table["LOGG"][0],
        table["FE_H"][0],
        table["MG_FE"][0],
        table["SI_FE"][0],
    ) == (teff, logg, fe_h, 0.3, 0.3)
    assert table.colnames == list(GRID_LABELS)


def test_a_star_lacks_a_label():
    with pytest.raises(LabError, match="a star needs LOGG"):
        synthesis.complete_labels({"TEFF": [4500.0], "FE_H": [0.0]})


# ---- spectra


@given(st.floats(14000, 18000))
def test_air_and_vacuum_are_inverse(vacuum):
    assert synthesis.vacuum_wavelength(synthesis.air_wavelength(np.array([vacuum])))[
        0
    ] == pytest.approx(vacuum, abs=1e-5)


@given(st.floats(0.5, 60))
@settings(deadline=None)
def test_rotation_takes_no_light_away(vsini):
    kernel = synthesis.rotation_kernel(vsini)
    assert (
        kernel.sum() == pytest.approx(1)
        and np.allclose(kernel, kernel[::-1])
        and (kernel >= 0).all()
    )


def test_a_wavelength_grid_of_ones_own_shows_the_same_star(emulator):
    star = synthesis.labels_from_unit(np.full((1, 9), 0.5))
    own = wavelength[1000:1100]
    assert np.allclose(emulator(star, own), emulator(star)[:, 1000:1100], atol=1e-6)
    between = emulator(star, np.sqrt(own[1:] * own[:-1]))
    assert (
        np.abs(between - 0.5 * (emulator(star, own)[:, 1:] + emulator(star, own)[:, :-1])).max()
        < 0.05
    )


def test_agreement_forgives_a_continuum_and_leaves_out_pixels_without_weight(emulator):
    stars = synthesis.label_matrix(synthesis.grid_design(3, seed=4))
    theirs = emulator(stars) * (1 + 0.02 * np.sin(wavelength / 150))
    theirs[1, 500:600] -= 0.1  # a feature that we lack
    theirs[2, :50] = 0  # where ASPCAP has no model
    ivar = np.ones_like(theirs)
    ivar[0, 200:300] = 0
    off, correlation, rms = synthesis.aspcap_agreement(emulator, stars, theirs, ivar)
    assert np.isnan(off[0]).sum() == 100 and np.isnan(off[2]).sum() == 50
    assert max(rms[0], rms[2]) < 2e-3 < rms[1] and correlation[1] < correlation[0]
    assert off[1, 500:600].mean() == pytest.approx(-0.1, abs=0.01)


def test_stars_do_not_depend_on_their_company(emulator):
    stars = synthesis.label_matrix(synthesis.grid_design(8, seed=3))
    together = emulator(stars)
    assert np.allclose(together[3:4], emulator(stars[3:4]), atol=1e-5)


# ---- files


def test_an_emulator_survives_saving(emulator, tmp_path):
    emulator.save(tmp_path / "again.fits")
    again = Emulator.load(tmp_path / "again.fits")
    star = synthesis.labels_from_unit(np.full((1, 9), 0.4))
    assert (
        np.abs(again(star) - emulator(star)).max() < 2e-4
        and again.facts == emulator.facts
        and again.domain is synthesis.GIANTS
    )


def test_a_file_without_a_domain_is_of_giants(emulator, tmp_path):
    emulator.save(tmp_path / "old.fits")
    with fits.open(tmp_path / "old.fits", mode="update") as hdus:
        hdus["COMPONENTS"].header.pop("DOMAIN", None)
    assert Emulator.load(tmp_path / "old.fits").domain is synthesis.GIANTS


def test_an_emulator_of_another_version_is_refused(emulator, tmp_path):
    emulator.save(tmp_path / "old.fits")
    with fits.open(tmp_path / "old.fits", mode="update") as hdus:
        hdus["COMPONENTS"].header["EMUVERS"] = 0
    with pytest.raises(LabError, match="old.fits was made by another version"):
        Emulator.load(tmp_path / "old.fits")


def test_batches_of_different_lines_do_not_mix(tmp_path):
    labels = synthesis.grid_design(2)
    labels["GOOD"] = True
    for number, lines in enumerate(("one", "two")):
        synthesis.write_batch(
            tmp_path / f"batch_{number}.fits",
            labels,
            np.ones((2, len(synthesis.grid_wavelength))),
            {"LINES": lines, "SEED": 1},
        )
    with pytest.raises(LabError, match="batch_1.fits was made with other lines"):
        synthesis.read_grid(sorted(tmp_path.iterdir()))


def test_batches_of_giants_and_dwarfs_do_not_mix(tmp_path):
    for number, domain in enumerate(("giants", "dwarfs")):
        labels = synthesis.grid_design(2, domain=domain)
        labels["GOOD"] = True
        facts = {"LINES": "one", "SEED": 1} | (
            {"DOMAIN": domain} if domain == "dwarfs" else {}
        )  # the oldest batches of giants do not say so
        synthesis.write_batch(
            tmp_path / f"batch_{number}.fits",
            labels,
            np.ones((2, len(synthesis.grid_wavelength))),
            facts,
        )
    with pytest.raises(LabError, match="batch_1.fits was made .* for another domain"):
        synthesis.read_grid(sorted(tmp_path.iterdir()))


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


# ---- the command


def test_the_command_explains_itself():
    said = subprocess.run(
        [sys.executable, COMMAND, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(
        step in said
        for step in ("lines", "atmospheres", "calibrate", "check", "grid", "emulator", "witness")
    )


def test_the_emulator_can_be_made_from_batches(tmp_path):
    design = synthesis.grid_design(200)
    unit = synthesis.unit_labels(synthesis.label_matrix(design))
    shapes = np.sin(
        np.outer(np.arange(1, 10), synthesis.grid_wavelength / 3)
    )  # every label moves a pattern of its own
    flux = 0.7 + 0.01 * (unit + 0.2 * unit**2) @ shapes
    design["GOOD"] = True
    for number in range(8):
        rows = slice(25 * number, 25 * number + 25)
        synthesis.write_batch(
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
