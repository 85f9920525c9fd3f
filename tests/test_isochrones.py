"""Isochrones: the extract and its maker, MIST's files in both forms and broken ones, and what holds
for any age and metallicity."""

import hashlib
import os
from importlib.resources import files

import astropy.units as u
import numpy as np
import pytest
from astropy.table import vstack
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_lab import isochrones
from stellar_lab.isochrones import (
    _PHASES,
    _from_table,
    _read_grid,
    isochrone,
    make_isochrones,
    read_mist,
    shipped_isochrones,
    total_metallicity,
)
from stellar_lab.survey import LabError, MissingExtra, real_data

GRID = shipped_isochrones()
AGES = st.floats(1.0, 14.1)
METALS = st.floats(-2.5, 0.5)


# --- the extract


def test_extract_is_small_and_whole():
    path = files("stellar_lab.data") / isochrones._EXTRACT
    assert path.stat().st_size < 4e6
    assert len(GRID.feh) == 15 and GRID.feh[0] == -4 and GRID.feh[-1] == 0.5
    assert GRID.ages[0] == pytest.approx(1) and 14 < GRID.ages[-1] < 14.2
    for cube in (GRID.log_teff, GRID.logg, GRID.mass, GRID.phase):
        assert cube.shape == (15, 24, 606) and not cube.flags.writeable
    older = np.diff(np.where(GRID.phase < 0, 99, GRID.phase), axis=2)
    assert not np.any((older < 0) & (older > -90))  # phases follow each other
    assert not np.any(np.diff(GRID.mass, axis=2) < 0)  # a star further in life was born heavier


def test_first_eep_of_each_phase():
    "Dotter (2016): 454 ends the main sequence, 605 is the tip, 707 ends helium in the core."
    for first, phase in ((454, 2), (605, 3), (707, 4)):
        assert (GRID.phase[:, :, first - 202] == phase).all() and (
            GRID.phase[:, :, first - 203] < phase
        ).all()


def test_missing_extract_says_so(monkeypatch):
    monkeypatch.setattr(isochrones, "_EXTRACT", "lost.fits")
    shipped_isochrones.cache_clear()
    try:
        with pytest.raises(
            LabError, match="lacks its data file lost.fits: install stellar_lab again"
        ):
            shipped_isochrones()
    finally:
        shipped_isochrones.cache_clear()


@pytest.mark.skipif(
    not os.environ.get("STELLAR_LAB_MIST_WHEEL"), reason="STELLAR_LAB_MIST_WHEEL is not set"
)
def test_remade_extract_is_the_shipped_one(tmp_path):
    wheel = os.environ["STELLAR_LAB_MIST_WHEEL"]
    shipped = (files("stellar_lab.data") / isochrones._EXTRACT).read_bytes()
    assert make_isochrones(wheel, tmp_path / "again.fits") == hashlib.sha256(shipped).hexdigest()
    source = _read_grid(wheel)  # float32 -> FITS -> float64 loses nothing
    for name in ("feh", "log_age", "eep", "log_teff", "logg", "mass", "phase"):
        assert np.array_equal(getattr(source, name), getattr(GRID, name), equal_nan=True), name


def tiny_grid(path):
    "Like the package's file: 2 metallicities, 3 ages, unequal first EEPs and lengths, a NaN row."
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    lengths, first = np.array([5, 3, 6, 4, 5, 2]), np.array([200, 203, 201, 205, 199, 204])
    values = rng.normal(size=(lengths.sum(), 5)).astype("f4")
    values[:, 4] = 2
    values[7] = np.nan
    with h5py.File(path, "w") as file:
        file.attrs["columns"] = [
            "mass_of_something_else",
            "log_g",
            "log_Teff",
            "initial_mass",
            "phase",
        ]
        for name, array in {
            "feh_values": [-1.0, 0.0],
            "age_values": [8.0, 9.0, 10.0],
            "lengths": lengths,
            "offsets": first,
            "values": values,
        }.items():
            file[name] = np.asarray(array)
    return values, lengths, first


def test_a_record_starts_where_those_before_it_end(tmp_path, monkeypatch):
    "By a plain loop over the file; 8.0 is too young, EEP below 202 too early."
    path = tmp_path / "grid.h5"
    values, lengths, first = tiny_grid(path)
    monkeypatch.setattr(isochrones, "_GRID_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(isochrones, "_EXTRACT_EEP", (202, 208))
    found, row = _read_grid(path), 0
    assert list(found.log_age) == [9, 10] and found.logg.shape == (2, 2, 7)
    seen = np.zeros(found.logg.shape, bool)
    for k, (n, begin) in enumerate(zip(lengths, first)):
        for eep in range(begin, begin + n):
            i, j = divmod(k, 3)
            if j and eep >= 202:
                at = i, j - 1, eep - 202
                assert np.array_equal(
                    [found.logg[at], found.log_teff[at], found.mass[at]],
                    values[row, [1, 2, 3]],
                    equal_nan=True,
                )
                assert found.phase[at] == (-1 if np.isnan(values[row, 4]) else 2)
                seen[at] = True
            row += 1
    assert np.isnan(found.logg[~seen]).all() and (found.phase[~seen] == -1).all()


def test_foreign_sources(tmp_path):
    (tmp_path / "other.h5").write_bytes(b"something else")
    with pytest.raises(
        LabError,
        match="other.h5 is not mist_v2.5_vvcrit0.4.h5 of lachesis-grids 0.0.9: its sha256 is",
    ):
        make_isochrones(tmp_path / "other.h5", tmp_path / "out.fits")
    with pytest.raises(LabError, match="cannot read .*mist_v2.5_vvcrit0.4.h5 from .*nothing.whl"):
        make_isochrones(tmp_path / "nothing.whl", tmp_path / "out.fits")
    import zipfile

    with zipfile.ZipFile(tmp_path / "wrong.whl", "w") as wheel:
        wheel.writestr("some/file.txt", "text")
    with pytest.raises(LabError, match="wrong.whl .*give the wheel of lachesis-grids 0.0.9"):
        make_isochrones(tmp_path / "wrong.whl", tmp_path / "out.fits")
    assert not (tmp_path / "out.fits").exists()


def test_maker_without_h5py_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtra, match="needs the package 'h5py'"):
        _read_grid("any.whl")


# --- interpolation


@settings(max_examples=30, deadline=None)
@given(i=st.integers(0, 14), j=st.integers(0, 23))
def test_nodes_come_back(i, j):
    line, there = isochrone(GRID.ages[j], GRID.feh[i]), GRID.phase[i, j] >= 0
    assert np.array_equal(line["EEP"], GRID.eep[there]) and np.array_equal(
        line["PHASE"], GRID.phase[i, j, there]
    )
    assert np.array_equal(line["LOGG"].value, GRID.logg[i, j, there]) and np.array_equal(
        line["MASS"].value, GRID.mass[i, j, there]
    )
    assert np.array_equal(line["TEFF"].value, 10 ** GRID.log_teff[i, j, there])


@settings(max_examples=30, deadline=None)
@given(age=AGES, feh=METALS)
def test_between_neighbours_with_units_and_without_change(age, feh):
    line = isochrone(age * u.Gyr, feh * u.dex)
    j, i = (
        np.clip(np.searchsorted(GRID.ages, age), 1, 23),
        np.clip(np.searchsorted(GRID.feh, feh), 1, 14),
    )
    k = line["EEP"] - 202
    for name, cube in (("LOGG", GRID.logg), ("MASS", GRID.mass)):
        corners = cube[i - 1 : i + 1, j - 1 : j + 1][:, :, k].reshape(4, -1)
        lowest, highest = np.nanmin(corners, axis=0) - 1e-9, np.nanmax(corners, axis=0) + 1e-9
        slack = 0.01  # an age within a node's tolerance is on the node
        assert np.all((line[name].value >= lowest - slack) & (line[name].value <= highest + slack))
    assert (
        line["TEFF"].unit == u.K
        and line["LOGG"].unit == u.dex
        and line["MASS"].unit == u.Msun
        and line["AGE"].unit == u.Gyr
    )
    assert np.all(line["AGE"] == age * u.Gyr) and np.all(line["FE_H"] == feh * u.dex)
    assert np.all(np.diff(line["EEP"]) > 0) and set(line["PHASE"]) <= set(_PHASES)


def test_interpolation_by_hand():
    "A point of the giant branch, mixed from its four corners in the logarithm of the age."
    age, feh = 7.5, -0.6
    j, i = np.searchsorted(GRID.ages, age) - 1, np.searchsorted(GRID.feh, feh) - 1
    a = (np.log10(age) + 9 - GRID.log_age[j]) / 0.05
    f = (feh - GRID.feh[i]) / 0.25
    k = 550 - 202
    corner = GRID.log_teff[i : i + 2, j : j + 2, k]
    by_hand = (1 - f) * ((1 - a) * corner[0, 0] + a * corner[0, 1]) + f * (
        (1 - a) * corner[1, 0] + a * corner[1, 1]
    )
    line = isochrone(age, feh)
    assert line["TEFF"][line["EEP"] == 550].value[0] == pytest.approx(10**by_hand, rel=1e-10)


@pytest.mark.parametrize(
    "age, feh, message",
    [
        (
            0.12,
            0,
            "an age of 0.12 Gyr is outside the isochrones at hand, which reach from 1 to 14.13 Gyr",
        ),
        (15, 0, "an age of 15 Gyr is outside"),
        (0, 0, "an age of 0 Gyr is outside"),
        (-3, 0, "an age of -3 Gyr is outside"),
        (6, 0.6, r"\[Fe/H\] = 0.6 is outside the isochrones at hand, which reach from -4 to 0.5"),
        (6, -4.2, r"\[Fe/H\] = -4.2 is outside"),
        (np.nan, 0, "the age must be finite"),
        (6, np.inf, "the metallicity must be finite"),
        ("old", 0, "the age must be one number in Gyr, not 'old'"),
        (6 * u.m, 0, "the age must be one number in Gyr"),
        (6, [0, -1], "the metallicity must be one number in dex"),
    ],
)
def test_outside_the_grid(age, feh, message):
    with pytest.raises(LabError, match=message):
        isochrone(age, feh)


def test_a_gap_in_a_table_is_named():
    table = vstack([isochrone(5, 0), isochrone(7, 0), isochrone(5, -1)])
    known = "there are 5 Gyr at -1, 5 Gyr at 0, 7 Gyr at 0"
    with pytest.raises(LabError, match=rf"6 Gyr at \[Fe/H\] = -0.5 lies beside a gap .*: {known}"):
        isochrone(6, -0.5, grid=table)
    assert len(isochrone(6, 0, grid=table)) and len(isochrone(5, -0.5, grid=table))


def test_a_table_of_one_isochrone_is_a_grid_of_one_node():
    only = isochrone(5, 0)
    assert _from_table(only).logg.shape[:2] == (1, 1)
    assert np.allclose(isochrone(5.0, 0, grid=only)["TEFF"], only["TEFF"])
    with pytest.raises(LabError, match="reach from 5 to 5 Gyr"):
        isochrone(5.1, 0, grid=only)


# --- MIST's files


def mist_text(lines, feh, photometry, logarithmic, phase=True):
    "A file of MIST with these isochrones, in one of its two forms."
    age_name = "log10_isochrone_age_yr" if logarithmic else "isochrone_age_yr"
    text = ["# MIST version number  = 1.2", "# MESA revision number =     7503"]
    text += ["# photometric system   = SDSS (AB)                         "] if photometry else []
    text += [
        "# " + "-" * 86,
        "#  Yinit        Zinit   [Fe/H]   [a/Fe]  v/vcrit      ",
        f"# 0.2703  1.42000E-02 {feh:8.2f}     0.00     0.40",
        "# " + "-" * 86,
        f"# number of isochrones = {len(lines):5d}",
        *(["# CCM89 extinction: Av =  0.000"] if photometry else []),
        "# " + "-" * 86,
    ]
    names = [
        "EEP",
        age_name,
        "initial_mass",
        "star_mass",
        "log_Teff",
        "log_g",
        *(["SDSS_g"] if photometry else []),
        *(["phase"] if phase else []),
    ]
    for line in lines:
        text += [
            f"# number of EEPs, cols = {len(line):5d} {len(names):4d}",
            "#  1 " + "".join(f"{k:32d}" for k in range(2, len(names) + 1)),
            "# EEP" + "".join(f"{name:>32s}" for name in names[1:]),
        ]
        for row in line:
            age = row["AGE"].to_value(u.yr)
            numbers = [
                np.log10(age) if logarithmic else age,
                row["MASS"].value,
                row["MASS"].value,
                np.log10(row["TEFF"].value),
                row["LOGG"].value,
            ]
            extra = ([17.123456] if photometry else []) + ([float(row["PHASE"])] if phase else [])
            text.append(
                f"{row['EEP']:5d}"
                + "".join(f"{number:32.16E}" for number in numbers)
                + "".join(f"{number:20.6f}" for number in extra)
            )
        text += ["", ""]
    return "\n".join(text)


@pytest.mark.parametrize("photometry", [False, True])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_both_forms_with_several_ages(tmp_path, photometry, logarithmic):
    lines = [isochrone(age, -0.5) for age in (2, 6, 12)]
    path = tmp_path / ("some.iso.cmd" if photometry else "some.iso")
    path.write_text(mist_text(lines, -0.5, photometry, logarithmic))
    table, wanted = read_mist(path), vstack(lines, metadata_conflicts="silent")
    assert table.colnames == wanted.colnames and len(table) == len(wanted)
    for name in table.colnames:
        assert table[name].unit == wanted[name].unit and np.allclose(
            table[name], wanted[name], rtol=1e-12
        )
    assert table.meta["source"] == "MIST 1.2, v/vcrit 0.40, [a/Fe] 0.00"
    assert np.allclose(isochrone(6, -0.5, grid=table)["TEFF"], lines[1]["TEFF"])
    assert len(isochrone(4, -0.5, grid=table)) > 400


def test_a_file_without_phases(tmp_path):
    (tmp_path / "old.iso").write_text(mist_text([isochrone(6, 0)], 0, False, True, phase=False))
    table = read_mist(tmp_path / "old.iso")
    assert (table["PHASE"] == -1).all()
    assert (isochrone(6, 0, grid=table)["PHASE"] == -1).all()


@pytest.mark.skipif(
    not os.environ.get("STELLAR_LAB_REAL_DATA"), reason="STELLAR_LAB_REAL_DATA is not set"
)
def test_the_lab_s_two_files():
    paths = [real_data() / name for name in ("SDSS_6Gyr_Fe0.cmd", "SDSS_6Gyr_Fe-1.cmd")]
    table = read_mist(*paths)
    assert len(table) == 1469 + 1477 and set(np.unique(table["FE_H"].value)) == {0, -1}
    assert np.allclose(table["AGE"].value, 6) and table["EEP"][0] == 242
    first = paths[0].read_text().splitlines()[13].split()
    assert table["TEFF"][0].value == pytest.approx(10 ** float(first[4])) and table["LOGG"][
        0
    ].value == float(first[5])
    for feh in (0, -1):
        lab, ours = isochrone(6, feh, grid=table), isochrone(6, feh)
        both = np.intersect1d(lab["EEP"], ours["EEP"][(ours["EEP"] > 300) & (ours["EEP"] < 450)])
        away = lab["TEFF"][np.isin(lab["EEP"], both)] - ours["TEFF"][np.isin(ours["EEP"], both)]
        assert np.abs(away).max() < 250 * u.K  # two versions of one theory, dwarfs


BREAKS = {
    "an empty file": (lambda text: "", "is not an isochrone file of MIST .* no line starts with"),
    "other text": (
        lambda text: "# teff logg\n4500 2.5\n",
        "no line starts with '# number of EEPs, cols'",
    ),
    "cut within a row": (
        lambda text: text[:-400],
        r"isochrone 2 of 2 announces \d+ rows and holds \d+: download it again|"
        "does not hold 8 numbers",
    ),
    "cut between isochrones": (
        lambda text: text[: text.rindex("# number of EEPs")],
        "announces 2 isochrones and holds 1: download it again",
    ),
    "rows lost": (
        lambda text: "\n".join(line for k, line in enumerate(text.splitlines()) if k != 40),
        "isochrone 1 of 2 announces",
    ),
    "a foreign column": (
        lambda text: text.replace("log_Teff", "Teff"),
        "lacks the column log_Teff; it has EEP, isochrone_age_yr",
    ),
    "no age": (
        lambda text: text.replace("isochrone_age_yr", "star_age"),
        "lacks the column log10_isochrone_age_yr or isochrone_age_yr",
    ),
    "no composition": (lambda text: text.replace("Yinit", "Y"), r"its header lacks \[Fe/H\]"),
    "a word among the numbers": (
        lambda text: text.replace("17.123456", "nothing", 1),
        None,
    ),  # in a column that nobody reads
    "a broken number": (
        lambda text: text.replace("E+00", "E+0?", 1),
        "a row does not hold 8 numbers",
    ),
    "a row too short": (
        lambda text: text.replace("          17.123456", "", 1),
        "a row does not hold 8 numbers",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_files(tmp_path, name):
    change, message = BREAKS[name]
    path = tmp_path / "broken.iso.cmd"
    path.write_text(
        change(mist_text([isochrone(5, 0)[::20], isochrone(6, 0)[::20]], 0, True, False))
    )
    if message is None:
        assert len(read_mist(path)) > 40
        return
    with pytest.raises(LabError, match=message) as caught:
        read_mist(path)
    assert "broken.iso.cmd" in str(caught.value)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "picture.iso").write_bytes(bytes(range(256)))
    for path in (tmp_path / "picture.iso", tmp_path / "nowhere.iso", tmp_path):
        with pytest.raises(LabError, match="cannot read .* as text"):
            read_mist(path)
    with pytest.raises(LabError, match="no file to read"):
        read_mist()


# --- metals that are not iron


def test_total_metallicity():
    assert total_metallicity(0.1, 0) == pytest.approx(0.1)
    assert total_metallicity(np.array([-2.0, -1.0]), 0.4) == pytest.approx(
        [-1.7067, -0.7067], abs=1e-4
    )  # log10(0.638 * 2.5119 + 0.362) = 0.2933
