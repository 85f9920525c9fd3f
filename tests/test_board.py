"The open board scores anybody's table as ours are scored, and refuses what is no entry."

import numpy as np
import pytest
from astropy.table import Table

from stellar_lab import Spectra
from stellar_lab.board import garbage, judge_predictions, read_predictions, write_garbage
from stellar_lab.judging import coverage, mahalanobis2
from stellar_lab.refusal import FAULTS, spoiled
from stellar_lab.results import Contest
from stellar_lab.survey import LabError, wavelength


@pytest.fixture
def contest():
    rng = np.random.default_rng(0)
    stars = Table({"APOGEE_ID": [f"star {n}" for n in range(40)]})
    stars["TEFF"] = rng.normal(4500, 300, 40)
    stars["M_H"] = rng.normal(0, 0.3, 40)
    stars.meta["labels"] = ["TEFF", "M_H"]
    flux = np.ones((40, len(wavelength)), "f4")
    spectra = Spectra(wavelength, flux, flux * 1e4, stars)
    groups = np.arange(40) % 5
    groups[:4] = -1
    return Contest("toy", spectra, groups)


def predictions(contest, error=0.1):
    stars = contest.spectra.stars[contest.judged]
    table = Table({"apogee_id": stars["APOGEE_ID"], "m_h": stars["M_H"] + error})
    table["m_h_err"] = 2 * error
    return table


def test_the_score_is_the_plain_formula(contest):
    scores = judge_predictions(predictions(contest), [contest])
    assert scores["contest"].tolist() == ["toy"] and scores["n"][0] == 36
    assert np.isclose(scores["rmse"][0], 0.1) and np.isclose(scores["bias"][0], 0.1)
    assert scores["inside_1"][0] == 1 and scores["refused"][0] == 0


def test_order_case_and_missing_stars(contest):
    table = predictions(contest)[::-1][3:]
    table.rename_column("m_h", "M_H")
    table["flags"] = 0
    table["flags"][:3] = 8
    scores = judge_predictions(table, [contest])
    assert np.isclose(scores["rmse"][0], 0.1) and scores["missing"][0] == 3
    assert np.isclose(scores["refused"][0], 3 / 36)


def with_flags(table, value):
    table = table.copy()
    table["flags"] = [value] * len(table)
    return table


def test_without_a_contest_a_table_counts_where_its_stars_are(contest):
    rows = np.flatnonzero(np.arange(len(contest.spectra)) % 3 == 0)
    fewer = Contest("fewer", contest.spectra[rows], contest.groups[rows])
    scores = judge_predictions(predictions(contest), [contest, fewer])
    both = dict(zip(scores["contest"], scores["n"]))
    assert both == {"toy": len(contest.judged), "fewer": len(fewer.judged)}
    named = predictions(contest)
    named["contest"] = " toy "
    assert judge_predictions(named, [contest, fewer])["contest"].tolist() == ["toy"]
    stranger = predictions(contest)
    stranger["apogee_id"] = stranger["apogee_id"].astype("U20")
    stranger["apogee_id"][0] = "nobody"
    with pytest.raises(LabError, match="nobody is no star of any contest"):
        judge_predictions(stranger, [contest, fewer])


def test_what_is_no_entry_is_named(contest, tmp_path):
    table = predictions(contest)
    text = table.copy()
    text["m_h"] = ["cool"] * len(text)
    other = table.copy()
    other["contest"] = "another"
    for wrong, message in (
        (text, "m_h"),
        (other, "no contest 'another': the column contest may hold toy, garbage"),
        (table["apogee_id", "m_h_err"], "none of the labels"),
        (with_flags(table, "fine"), "flags"),
        (with_flags(table, [0, 0]), "flags holds .* numbers for each star: one is needed"),
    ):
        with pytest.raises(LabError, match=message):
            judge_predictions(wrong, [contest])
    (tmp_path / "folder").mkdir()
    with pytest.raises(LabError, match="is no table of predictions"):
        read_predictions(tmp_path / "folder")


def test_garbage_is_what_it_says(contest, tmp_path):
    wrong = garbage(contest.spectra[:2])
    assert len(wrong) == 2 * len(FAULTS)
    write_garbage(wrong, tmp_path / "g.fits")
    stars = Table.read(tmp_path / "g.fits", hdu="STARS")
    assert sorted(set(map(str, stars["fault"]))) == sorted(FAULTS)
    same = spoiled(contest.spectra[:2], "noise", seed=3).flux
    assert np.array_equal(same, spoiled(contest.spectra[:2], "noise", seed=3).flux)
    assert np.allclose(spoiled(contest.spectra[:1], "flat").flux, 1)


def test_coverage_counts_by_group():
    table = Table({"m_h": [0.5, 1.5, 2.5, np.nan], "m_h_err": np.ones(4)})
    found = coverage(table, np.zeros((4, 1)), "M_H", by=["a", "a", "b", "b"])
    assert found["inside_1"].tolist() == [0.5, 0] and found["inside_2"].tolist() == [1, 0]
    assert found["n"].tolist() == [2, 1]
    with pytest.raises(LabError, match="3 groups for 4 stars"):
        coverage(table, np.zeros((4, 1)), "M_H", by=["a"] * 3)


def test_distances_know_stars_without_labels():
    table = Table({"teff": [2.0, np.nan], "m_h": [0.0, 0.0]})
    table["covariance"] = np.tile(np.diag([4.0, 1.0]), (2, 1, 1))
    found = mahalanobis2(table, np.zeros((2, 2)), ["TEFF", "M_H"])
    assert found[0] == 1 and np.isnan(found[1])
