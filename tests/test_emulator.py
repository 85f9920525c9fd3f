"""The emulators: labels and domains as properties, spectra, files, faults that a user can cause."""

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_lab.emulator import (
    DOMAINS,
    GRID_LABELS,
    Emulator,
    _rotation_kernel,
    complete_labels,
    label_matrix,
    labels_from_unit,
    unit_labels,
)
from stellar_lab.survey import LabError, wavelength
from stellar_lab.synthesis import grid_design

unit_cubes = st.lists(
    st.lists(st.floats(0, 1), min_size=9, max_size=9), min_size=1, max_size=5
).map(np.array)


@pytest.fixture(scope="module")
def emulator():
    return Emulator.load()


@pytest.fixture(scope="module")
def dwarfs():
    return Emulator.load(domain="dwarfs")


# ---- labels


@given(unit_cubes, st.sampled_from(list(DOMAINS)))
@settings(deadline=None)
def test_labels_and_their_place_in_the_domain_are_inverse(cube, domain):
    assert np.allclose(unit_labels(labels_from_unit(cube, domain), domain), cube, atol=1e-6)


def test_dwarfs_follow_the_main_sequence():
    dwarfs = grid_design(256, domain="dwarfs")
    assert dwarfs["TEFF"].min() >= 4000 and dwarfs["TEFF"].max() <= 6200
    assert (grid_design(100, domain=DOMAINS["dwarfs"])["LOGG"] == dwarfs["LOGG"][:100]).all()
    assert (
        np.corrcoef(dwarfs["TEFF"], dwarfs["LOGG"])[0, 1] < -0.6
    )  # the heavier a dwarf, the hotter and the larger
    assert not ((unit_labels(label_matrix(dwarfs)) <= 1).all(axis=1)).any()  # none is a giant


def test_an_unknown_domain_is_named():
    with pytest.raises(
        LabError, match="there is no domain 'hamsters' of synthetic stars: choose giants or dwarfs"
    ):
        grid_design(4, domain="hamsters")


def test_usual_dwarfs_have_not_dredged_up():
    star = {"TEFF": [5000.0], "LOGG": [4.55], "FE_H": [0.0]}
    giant, dwarf = complete_labels(star), complete_labels(star, "dwarfs")
    assert giant["N_FE"][0] > dwarf["N_FE"][0] == 0 and giant["C_FE"][0] < dwarf["C_FE"][0] == 0
    unit = unit_labels(label_matrix(dwarf), "dwarfs")
    assert ((unit >= 0) & (unit <= 1)).all()


@given(unit_cubes)
@settings(deadline=None, max_examples=25)
def test_every_star_of_the_domain_has_a_spectrum(emulator, cube):
    labels = labels_from_unit(cube)
    flux = emulator(labels)
    assert emulator.inside(labels).all()
    assert flux.shape == (len(cube), len(wavelength)) and np.isfinite(flux).all()
    assert (
        flux.min() > -0.1 and flux.max() < 1.1
    )  # in the corners of nine dimensions a polynomial may overshoot


@given(unit_cubes)
@settings(deadline=None, max_examples=25)
def test_every_dwarf_of_the_domain_has_a_spectrum_and_is_no_giant(emulator, dwarfs, cube):
    labels = labels_from_unit(cube, "dwarfs")
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
    table = complete_labels({"TEFF": [teff], "LOGG": [logg], "FE_H": [fe_h], "MG_FE": [0.3]})
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
        complete_labels({"TEFF": [4500.0], "FE_H": [0.0]})


@given(st.floats(0.5, 60))
@settings(deadline=None)
def test_rotation_takes_no_light_away(vsini):
    kernel = _rotation_kernel(vsini)
    assert (
        kernel.sum() == pytest.approx(1)
        and np.allclose(kernel, kernel[::-1])
        and (kernel >= 0).all()
    )


def test_a_wavelength_grid_of_ones_own_shows_the_same_star(emulator):
    star = labels_from_unit(np.full((1, 9), 0.5))
    own = wavelength[1000:1100]
    assert np.allclose(emulator(star, own), emulator(star)[:, 1000:1100], atol=1e-6)
    between = emulator(star, np.sqrt(own[1:] * own[:-1]))
    assert (
        np.abs(between - 0.5 * (emulator(star, own)[:, 1:] + emulator(star, own)[:, :-1])).max()
        < 0.05
    )


def test_stars_do_not_depend_on_their_company(emulator):
    stars = label_matrix(grid_design(8, seed=3))
    together = emulator(stars)
    assert np.allclose(together[3:4], emulator(stars[3:4]), atol=1e-5)


def test_an_emulator_survives_saving(emulator, tmp_path):
    emulator.save(tmp_path / "again.fits")
    again = Emulator.load(tmp_path / "again.fits")
    star = labels_from_unit(np.full((1, 9), 0.4))
    assert (
        np.abs(again(star) - emulator(star)).max() < 2e-4
        and again.facts == emulator.facts
        and again.domain is DOMAINS["giants"]
    )


def test_a_file_without_a_domain_is_of_giants(emulator, tmp_path):
    emulator.save(tmp_path / "old.fits")
    with fits.open(tmp_path / "old.fits", mode="update") as hdus:
        hdus["COMPONENTS"].header.pop("DOMAIN", None)
    assert Emulator.load(tmp_path / "old.fits").domain is DOMAINS["giants"]


def test_an_emulator_of_another_version_is_refused(emulator, tmp_path):
    emulator.save(tmp_path / "old.fits")
    with fits.open(tmp_path / "old.fits", mode="update") as hdus:
        hdus["COMPONENTS"].header["EMUVERS"] = 0
    with pytest.raises(LabError, match="old.fits was made by another version"):
        Emulator.load(tmp_path / "old.fits")
