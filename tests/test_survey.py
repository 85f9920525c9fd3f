"Facts, cuts and labels of stellar_lab.survey; what a reader learns from stands in nbs/00_survey."

import doctest
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
from astropy import units as u
from astropy.table import Column, MaskedColumn, QTable, Table
from hypothesis import given
from hypothesis import strategies as st

from stellar_lab.survey import (
    ARCHIVES,
    LABELS,
    RELEASES,
    Cut,
    LabError,
    air_to_vacuum,
    label_record,
    label_records,
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
    assert [release.row for release in RELEASES.values()] == [1, 1, 1, 0]


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


@pytest.mark.parametrize("room, most", [("survey", 36), ("clean", 14)])
def test_public_names_are_few_and_documented(room, most):
    module = import_module(f"stellar_lab.{room}")
    assert len(module.__all__) <= most
    for name in module.__all__:
        thing = getattr(module, name)
        if callable(thing):
            assert thing.__doc__, name
