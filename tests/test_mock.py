"""The synthetic survey: its stars, what is done to their light, its files, and its command."""

import re
from dataclasses import replace

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from stellar_lab import archives
from stellar_lab.archives import MYSTERY_FILE, true_continuum
from stellar_lab.clean import apply_cuts, find_files, read_archive
from stellar_lab.cli import main
from stellar_lab.emulator import GRID_LABELS, Emulator, label_matrix
from stellar_lab.mock import (
    _FIBRES,
    _KINDS,
    _LABEL_ERRORS,
    _catalogue_trend,
    _companion_share,
    _draw_catalogue,
    _draw_mask,
    _observe,
    _place_on_isochrones,
    draw_population,
    mock_stars,
    true_spectra,
)
from stellar_lab.survey import (
    APOGEE_ID,
    ARCHIVES,
    PIXMASK,
    TRUTH_FILE,
    LabError,
    archive_record,
    wavelength,
)

STARS = 60


@pytest.fixture(scope="module", autouse=True)
def one_of_each_flaw():
    "Archives have each of their planted flaws once: these tests are about the stars."
    with pytest.MonkeyPatch.context() as patch:
        flaws = archives._FLAWS.items()
        patch.setattr(archives, "_FLAWS", {name: replace(flaw, count=1) for name, flaw in flaws})
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "The archive as the command line writes it."
    root = tmp_path_factory.mktemp("archives") / "mock"
    assert main(["archive", "mock", str(root), "--stars", str(STARS), "--seed", "7"]) == 0
    return root


@pytest.fixture(scope="module")
def drawn():
    return mock_stars(STARS, seed=7)


@pytest.fixture(scope="module")
def people():
    return draw_population(800, seed=3)


# --- who lives there


def test_every_kind_is_there_in_its_share(people):
    kinds, counts = np.unique(people["KIND"], return_counts=True)
    assert dict(zip(kinds.tolist(), counts.tolist())) == {"binary": 16, "dwarf": 12, "giant": 772}
    assert set(_KINDS) == set(kinds)
    assert np.array_equal(np.isfinite(people["RATIO"]), people["KIND"] == "binary")


def test_all_stars_lie_inside_their_emulator(people):
    dwarf = people["LOGG"] > 4
    for emulator, mine in ((Emulator.load(), ~dwarf), (Emulator.load(domain="dwarfs"), dwarf)):
        assert emulator.inside(label_matrix(people)[mine]).all()
    assert set(people["KIND"][dwarf]) == {"dwarf", "binary"}


def test_names_follow_the_survey_and_the_sky(people):
    assert all(
        re.fullmatch(APOGEE_ID, name) and not name.startswith("2M99")
        for name in people["APOGEE_ID"]
    )
    south = np.array(["-" in name for name in people["APOGEE_ID"]])
    assert np.array_equal(south, people["DEC"] < 0) and south.any()
    hours = np.array([int(name[2:4]) for name in people["APOGEE_ID"]])
    assert np.all(np.abs((people["RA"] % 360) / 15 - hours - 0.5) <= 0.5)


def test_same_seed_same_stars(people):
    again, other = draw_population(800, seed=3), draw_population(800, seed=4)
    assert all(
        np.array_equal(people[name], again[name], equal_nan=people[name].dtype.kind == "f")
        for name in people.colnames
    )
    assert not np.array_equal(people["TEFF"], other["TEFF"])


def test_a_star_stands_on_its_isochrone():
    "Stars of one age and metallicity lie on the line that the isochrones' own reader draws."
    from stellar_lab.isochrones import isochrone

    n = 300
    stars = _place_on_isochrones(
        np.full(n, 5.0119), np.full(n, -0.25), (0.5, 3.6), 0.8, np.random.default_rng(0)
    )
    line = isochrone(5.0119, -0.25)
    teff, logg = line["TEFF"].value, line["LOGG"].value
    gap = np.min(
        np.hypot((stars["TEFF"][:, None] - teff) / 10, (stars["LOGG"][:, None] - logg) / 0.01),
        axis=1,
    )
    assert gap.max() < 1 and 0.9 < np.min(stars["MASS"]) and np.max(stars["MASS"]) < 1.5


def test_too_few_stars():
    with pytest.raises(LabError, match="survey of 5 stars is too small"):
        draw_population(5)


# --- their light


def test_a_single_star_is_its_emulators_spectrum(people):
    row = people[people["KIND"] == "giant"][:1]
    assert np.allclose(
        true_spectra(row), Emulator.load()(label_matrix(row), fwhm=row["FWHM"][0]), atol=1e-6
    )
    assert set(people["FWHM"]) <= set(_FIBRES)


def test_companions_light(people):
    pairs = people[people["KIND"] == "binary"]
    share = _companion_share(pairs)
    assert share.shape == (len(pairs), len(wavelength)) and np.all((share > 0) & (share < 0.75))
    cooler = np.asarray(pairs["TEFF_2"] < pairs["TEFF"] - 100)
    assert np.all(
        (share[:, -1] > share[:, 0])[cooler]
    )  # a cooler star gives more of its light in the red


def test_companion_moves_to_the_red(people):
    "With all light from the companion, the spectrum is its own, shifted as Doppler says."
    pair = people[people["KIND"] == "binary"][:1].copy()
    pair["RATIO"], pair["VELOCITY_2"] = 1e9, 30.0
    ours = true_spectra(pair)[0]
    own = Table(
        {name: pair[f"{name}_2"] for name in GRID_LABELS}
        | {"FWHM": pair["FWHM"], "RATIO": [np.nan]}
    )
    at_rest = true_spectra(own)[0]
    expected = np.interp(wavelength / (1 + 30.0 / 299792.458), wavelength, at_rest)
    inner = slice(100, 2800)
    assert np.abs(ours - expected)[inner].max() < 0.02 < np.abs(ours - at_rest)[inner].max()


def test_noise_grows_where_the_sky_shines():
    flux, mask = np.ones((200, 50), "f4"), np.zeros((200, 50), "i2")
    mask[:, :10] = PIXMASK.SIG_SKYLINE
    mask[:, 10] = PIXMASK.BADPIX
    observed, error = _observe(flux, np.full(200, 50.0), mask, np.random.default_rng(0))
    spread = (observed - 1).std(axis=0)
    assert np.allclose(spread[:10] / spread[20:].mean(), 6, rtol=0.2) and np.allclose(
        spread[20:], 1 / 50, rtol=0.2
    )
    assert np.all(observed[:, 10] == 0) and np.all(error[:, 10] == 0)


def test_every_bit_of_the_mask_has_its_cause():
    mask = _draw_mask(np.linspace(-150, 150, 400), np.random.default_rng(0))
    assert mask.shape == (400, 7214) and mask.dtype == np.int16
    used = int(np.bitwise_or.reduce(mask.ravel()))
    named = (
        PIXMASK.SIG_SKYLINE
        | PIXMASK.SIG_TELLURIC
        | PIXMASK.BADPIX
        | PIXMASK.CRPIX
        | PIXMASK.PERSIST_HIGH
        | PIXMASK.PERSIST_LOW
    )
    assert used == int(named)
    lost = (mask & PIXMASK.PERSIST_HIGH) != 0
    assert set(lost.sum(axis=1)) == {0, 2920}  # the whole blue chip or nothing


# --- the catalogue


def test_catalogue_errors_are_honest_and_grow_with_noise(people):
    bright, faint = (
        _draw_catalogue(people, np.full(len(people), snr), np.random.default_rng(1))
        for snr in (400.0, 40.0)
    )
    for name in _LABEL_ERRORS:
        for table in (bright, faint):
            rest = (table[name] - people[name] - _catalogue_trend(people)[name]) / table[
                f"{name}_ERR"
            ]
            assert abs(np.nanstd(rest) - 1) < 0.15
        assert np.nanmedian(faint[f"{name}_ERR"]) > 1.8 * np.nanmedian(bright[f"{name}_ERR"])
    assert np.isnan(faint["TEFF"]).mean() > np.isnan(bright["TEFF"]).mean()


# --- the files


def test_archive_is_what_was_drawn(root, drawn):
    spectra, truth = drawn
    assert archive_record(root) is ARCHIVES["mock"]
    read, _ = read_archive(root, progress=False)
    rows = {str(name): i for i, name in enumerate(spectra.stars["APOGEE_ID"])}
    mine = [i for i, name in enumerate(read.stars["APOGEE_ID"]) if str(name) in rows]
    assert len(mine) > 40
    names, continua = true_continuum(root)
    for i in mine[:10]:
        name = str(read.stars["APOGEE_ID"][i])
        curve, good = continua[list(names).index(name)], read.ivar[i] > 0
        assert np.allclose((read.flux[i] / curve)[good], spectra.flux[rows[name]][good], atol=2e-4)
    labels = read.labels(ARCHIVES["mock"].labels)[mine]
    assert np.allclose(
        labels,
        spectra.labels(ARCHIVES["mock"].labels)[
            [rows[str(read.stars["APOGEE_ID"][i])] for i in mine]
        ],
        equal_nan=True,
        rtol=1e-5,
    )


def test_truth_stays_in_its_table(root, drawn):
    truth = Table.read(root / TRUTH_FILE)
    assert {"KIND", "TEFF", "TEFF_TREND", "VMICRO", "FWHM", "RATIO", "THROUGHPUT"} <= set(
        truth.colnames
    )
    with fits.open(root / ARCHIVES["mock"].rules.allstar) as hdus:
        listed = set(hdus[1].columns.names)
    assert not listed & (
        set(truth.colnames)
        - {"APOGEE_ID", "LOCATION_ID", "SNR", "H", "RA", "DEC", "GLON", "GLAT", *_LABEL_ERRORS}
    )
    sealed = truth[truth["APOGEE_ID"] == "mystery"]
    assert len(sealed) == 1 and sealed["FLAW"][0] == "mystery" and np.isfinite(sealed["TEFF"][0])
    assert (root / MYSTERY_FILE).is_file() and sealed["SOURCE_ID"][0] not in {
        str(name) for name in find_files(root, "apstar", "all")["APOGEE_ID"]
    }
    again = true_spectra(
        truth[truth["FLAW"] == ""]
    )  # the table is enough to make the true spectra again
    rows = [
        list(drawn[1]["APOGEE_ID"]).index(name) for name in truth["APOGEE_ID"][truth["FLAW"] == ""]
    ]
    assert np.allclose(again, true_spectra(drawn[1])[rows], atol=1e-6)


def test_lab_and_command_line_take_it(root, tmp_path, capsys):
    spectra, ledger = read_archive(root, progress=False)
    kept, _ = apply_cuts(spectra, ledger=ledger)
    assert len(kept) > 20 and np.all(kept.stars["SNR"] > 50) and np.all(kept.stars["FE_H"] > -1)
    code = main(
        [
            "train",
            str(root),
            "--model",
            str(tmp_path / "m.asdf"),
            "--labels",
            "teff,fe_h",
            "--test-size",
            "0.3",
        ]
    )
    assert code == 0 and "FE_H" in capsys.readouterr().out.upper()
    assert main(["archive", "mock", str(root), "--stars", "30"]) == 2
    assert "holds another archive" in capsys.readouterr().err
