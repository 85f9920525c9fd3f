"""The Kiel diagram: distances from any isochrone's giant branch, and what the pictures count."""

import astropy.units as u
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_lab.isochrones import isochrone
from stellar_lab.kiel import (
    _BRANCHES,
    _metallicity_label,
    _shift_length,
    giant_distance,
    kiel_diagrams,
    plot_kiel,
)
from stellar_lab.survey import LABELS, LabError

AGES = st.floats(1.0, 14.1)
METALS = st.floats(-2.5, 0.5)


# --- distances and diagrams


@settings(max_examples=20, deadline=None)
@given(age=AGES, feh=METALS, share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_point_on_the_line_has_no_distance(age, feh, share, seed):
    line = isochrone(age, feh)
    first, last = _BRANCHES[seed % 2]
    row = int(np.random.default_rng(seed).integers(first, last))
    a, b = (line[line["EEP"] == eep][0] for eep in (row, row + 1))
    away = giant_distance(
        [a["TEFF"].value * (1 - share) + b["TEFF"].value * share],
        [a["LOGG"].value * (1 - share) + b["LOGG"].value * share],
        line,
    )
    assert away["distance"][0] < 1e-6


@settings(max_examples=20, deadline=None)
@given(teff=st.floats(3000, 6500), logg=st.floats(-0.5, 5), step=st.floats(-1, 1))
def test_distance_is_a_distance(teff, logg, step):
    "Not above that to any row, and no star gets further away than it moved."
    line = isochrone(8, -0.7)
    here, there = giant_distance([teff, teff + 100 * step], [logg, logg + 0.2 * step], line)[
        "distance"
    ]
    assert abs(here - there) <= np.sqrt(2) * abs(step) + 1e-9
    on = np.any(
        [(line["EEP"] >= first) & (line["EEP"] <= last) for first, last in _BRANCHES], axis=0
    )
    assert (
        here
        <= np.hypot(
            (line["TEFF"][on].value - teff) / 100, (line["LOGG"][on].value - logg) / 0.2
        ).min()
        + 1e-9
    )


def test_distances_in_blocks_with_gaps_and_units():
    line, rng = isochrone(6, 0), np.random.default_rng(1)
    teff, logg = rng.uniform(3500, 5500, 2500), rng.uniform(0, 3.5, 2500)
    teff[7] = np.nan
    before = teff.copy(), logg.copy()
    away = giant_distance(teff * u.K, logg * u.dex, line)
    assert np.array_equal(teff, before[0], equal_nan=True) and np.array_equal(logg, before[1])
    assert np.flatnonzero(np.isnan(away["distance"])).tolist() == [7]
    assert np.allclose(
        away["distance"][1500:], giant_distance(teff[1500:], logg[1500:], line)["distance"]
    )
    assert np.allclose(
        np.hypot(away["d_teff"].value / 100, away["d_logg"].value / 0.2),
        away["distance"],
        equal_nan=True,
    )
    assert len(giant_distance([], [], line)) == 0
    with pytest.raises(
        LabError,
        match="the isochrone has no giants: it reaches from EEP 228 to 453, giants from 454",
    ):
        giant_distance(teff, logg, line[line["PHASE"] == 0])


def test_phases_are_not_needed():
    "A file of MIST may lack them."
    line = isochrone(6, 0)
    line["PHASE"] = -1
    assert giant_distance([4500.0], [2.0], isochrone(6, 0, grid=line))["distance"][0] < 1


def test_shuffled_labels_are_worse():
    "Stars of eight isochrones with the errors of spectra: each near its own, not near another's."
    rng = np.random.default_rng(3)
    lines = [isochrone(8, feh) for feh in (-2, -1.5, -1, -0.75, -0.5, -0.25, 0, 0.4)]
    stars = []
    for line in lines:
        giants = line[(line["EEP"] > 480) & (line["EEP"] < 600)]
        rows = rng.integers(len(giants), size=50)
        stars.append(
            [
                giants["TEFF"][rows].value + rng.normal(0, 50, 50),
                giants["LOGG"][rows].value + rng.normal(0, 0.1, 50),
            ]
        )
    stars = np.array(stars)
    order = rng.permutation(8 * 50)
    shuffled = (
        stars.transpose(1, 0, 2).reshape(2, -1)[:, order].reshape(2, 8, 50).transpose(1, 0, 2)
    )
    own, other = (
        np.median([giant_distance(*mine, line)["distance"] for mine, line in zip(choice, lines)])
        for choice in (stars, shuffled)
    )
    assert own < 0.5 and other > 3 * own


def test_metallicity_label_and_colours():
    assert (
        _metallicity_label(["TEFF", "LOGG", "FE_H", "MG_FE"]) == "FE_H"
        and _metallicity_label(("M_H", "TEFF")) == "M_H"
    )
    with pytest.raises(LabError, match="labels are TEFF, LOGG: FE_H or M_H is needed"):
        _metallicity_label(["TEFF", "LOGG"])
    stars = np.array([[4500.0, 2.5, -0.2], [4000, 1.2, 0.1]])
    assert plot_kiel(stars).collections[-1].get_clim() == (-0.8, 0.5)
    assert plot_kiel(stars, "M_H").collections[-1].get_clim() == LABELS["M_H"].plot_range


def test_diagrams_count_outliers_and_strangers():
    "On the lab's axes; one star off them, one moved by more than three units, one without labels."
    rng = np.random.default_rng(0)
    catalogue = np.column_stack(
        [rng.uniform(4000, 5000, 40), rng.uniform(1, 3, 40), rng.uniform(-0.5, 0.3, 40)]
    )
    predicted = catalogue + rng.normal(0, 1, (40, 3)) * [50, 0.1, 0.05]
    predicted[3, 0] = catalogue[3, 0] + 400
    predicted[5, 0] = 7000
    predicted[8] = np.nan
    fig = kiel_diagrams(predicted, catalogue, isochrones=[isochrone(6, 0), isochrone(6, -1)])
    left, right, shifts = fig.axes[:3]
    assert (
        left.get_title() == "predicted labels, 2 off the axes"
        and right.get_title() == "catalogue labels"
    )
    assert "2 outliers of 40" in shifts.get_title()
    for ax in (left, right):
        assert (ax.get_xlim(), ax.get_ylim()) == ((6000, 3000), (6, -0.5)) and len(ax.lines) == 2
    assert np.nanmax(_shift_length(predicted, catalogue)) > 20 and np.isnan(
        _shift_length(predicted, catalogue)[8]
    )
