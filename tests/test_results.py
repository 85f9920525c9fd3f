"""The scoreboard: contests, interrupted runs, tables, recorded files and pages that show them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from astropy.table import QTable, Table

pytest.importorskip("tensorflow")

from stellar_lab import results
from stellar_lab.cannon import Cannon
from stellar_lab.readers import RidgeLabels
from stellar_lab.results import (
    Contest,
    _plot_residual_trends,
    _plot_scores,
    _predictions,
    _with_truth,
    against_truth,
    averages,
    contestants,
    contests,
    contests_side_by_side,
    judge,
    readable,
    records,
    run_scoreboard,
)
from stellar_lab.survey import ARCHIVES, LABELS, LabError, Spectra

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import readme  # noqa: E402

FIVE = ARCHIVES["survey"].labels
SIX = ARCHIVES["clusters"].labels


def stars(names=SIX, n=120, pixels=60, seed=0, archive="clusters"):
    "Stars whose flux is linear in their scaled labels, in seven locations."
    rng = np.random.default_rng(seed)
    scaled = rng.normal(size=(n, len(names)))
    flux = (
        0.9
        + 0.03 * scaled @ np.random.default_rng(1).normal(size=(len(names), pixels))
        + 0.003 * rng.normal(size=(n, pixels))
    )
    columns = {
        name: (4500 + 300 * column if name == "TEFF" else -1 + column)
        for name, column in zip(names, scaled.T, strict=True)
    }
    table = Table(
        {
            "APOGEE_ID": [f"2M{k}" for k in range(n)],
            "FIELD": [f"F{k % 7}" for k in range(n)],
            "LOCATION_ID": 4000 + np.arange(n) % 7,
            **columns,
        },
        meta={"product": "apstar", "normalized": True, "archive": archive, "labels": list(names)},
    )
    return Spectra(
        np.linspace(15200, 15300, pixels), flux.astype("f4"), np.full((n, pixels), 1e5, "f4"), table
    )


@pytest.fixture(scope="module")
def board():
    "Cannon of four and of all labels and ridge regression in five folds."
    contest = contests(stars(), "full")[0]
    return contest, *judge(
        {
            name: contestants(SIX)[name]
            for name in ("Cannon, four labels", "Cannon", "ridge regression")
        },
        contest,
        progress=False,
    )


@pytest.mark.parametrize("names", [FIVE, SIX])
def test_contestants(names):
    quick, full = contestants(names), contestants(names, "full")
    assert list(quick) == list(full) and len(quick) == (8 if names is FIVE else 9)
    assert {"hidden labels", "latents"} < set(quick)
    assert names is FIVE or quick["hidden, four labels"].labels == list(names[:4])
    smaller = list(quick)[0]
    assert smaller == ("Cannon, linear" if names is FIVE else "Cannon, four labels") and quick[
        "Cannon"
    ].labels == list(names)
    assert (quick[smaller].order, len(quick[smaller].labels)) == (
        (1, 5) if names is FIVE else (2, 4)
    )
    assert all(model.scatter for name, model in quick.items() if name.startswith("Cannon"))
    assert (
        full["lab network"].epochs == full["augmented network"].epochs == 250
        and full["lab network"].centre
    )
    with pytest.raises(KeyError):
        contestants(names, "slow")


def test_many_stars_need_fewer_epochs_but_not_in_the_full_profile():
    few, many, full = (
        contestants(FIVE, profile, stars)
        for profile, stars in (("quick", 320), ("quick", 1824), ("full", 1824))
    )
    names = ("lab network", "augmented network", "error-aware network")
    assert [few[name].epochs for name in names] == [12, 25, 50] and [
        full[name].epochs for name in names
    ] == [250, 250, 100]
    assert [many[name].epochs for name in names] == [11, 14, 36]


def test_contests_leave_out_whole_places():
    spectra = stars()
    (split,) = contests(spectra)
    assert len(split.judged) == 40 and set(split.groups) == {-1, 0}
    folds, apart, each, rich = contests(spectra, "full")
    assert each.name == "each cluster left out" and each.strangers
    assert len(set(each.groups)) == len(set(spectra.stars["LOCATION_ID"])) == 7
    assert all(len(set(each.groups[k::7])) == 1 for k in range(7))
    assert (
        apart.name == "clusters left out"
        and all(len(set(apart.groups[k::7])) == 1 for k in range(7))
        and len(set(apart.groups)) == 5
    )
    assert (
        len(folds.judged) == 120
        and np.all(rich.spectra.labels(["M_H"]) > results._METAL_RICH)
        and len(rich.spectra) < 120
    )


def test_contests_of_the_surveys_labels():
    spectra = stars(FIVE, archive="survey")
    split, folds, apart = contests(spectra, "full")
    assert (
        split.name == "one split"
        and np.array_equal(split.groups, contests(spectra)[0].groups)
        and apart.name == "fields left out"
    )
    without = spectra.replace(
        stars=Table(
            {name: spectra.stars[name] for name in ("APOGEE_ID", "FIELD", *FIVE)},
            meta=spectra.stars.meta,
        )
    )
    assert np.array_equal(contests(without, "full")[2].groups, apart.groups)
    with pytest.raises(LabError, match="all stars have the same FIELD"):
        contests(without[np.arange(0, 120, 7)], "full")


def test_all_rows_of_a_star_are_left_out_together():
    spectra = stars()
    spectra.stars["APOGEE_ID"][[50, 90]] = spectra.stars["APOGEE_ID"][3]  # in three clusters
    spectra.stars["APOGEE_ID"][11] = spectra.stars["APOGEE_ID"][4]  # twice in one
    folds, apart, *others = contests(spectra, "full")
    for contest in (folds, apart, *others):
        names = np.array(contest.spectra.stars["APOGEE_ID"])
        for name in set(names):
            assert len(set(contest.groups[names == name])) == 1
    before = contests(stars(), "full")[0]
    assert set(np.flatnonzero(folds.groups != before.groups)) <= {11, 50, 90}
    assert len(folds.judged) == 120
    # a star in places that are left out at different times takes no part
    assert len(apart.judged) == 117 and "2M3" not in set(apart.spectra.stars["APOGEE_ID"])
    assert set(apart.spectra.stars["APOGEE_ID"]) >= {"2M4", "2M5"}


def test_another_seed_is_another_order():
    first, second = (contests(stars(), "full", seed)[0].groups for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_stars_are_judged_by_strangers_and_in_order(board):
    contest, table, labelled = board
    model = RidgeLabels(labels=SIX).fit(contest.spectra[contest.groups != 3])
    inside = contest.groups[contest.judged] == 3
    np.testing.assert_allclose(
        labelled["ridge regression"]["logg"].value[inside],
        model.read(contest.spectra[contest.groups == 3])[:, 1],
    )
    assert np.array_equal(labelled["ridge regression"]["row"], contest.judged)
    four = [("teff", "teff_err"), ("logg", "logg_err"), ("m_h", "m_h_err")]
    columns = ["row", "flags", *sum(four, ()), "alpha_m", "alpha_m_err"]
    assert list(labelled["Cannon, four labels"].colnames) == columns


def test_scaled_rmse_has_one_scale(board):
    contest, table, _ = board
    spread = dict(zip(SIX, contest.spectra.labels(SIX).std(axis=0), strict=True))
    assert np.allclose(
        table["rmse"] / table["scaled_rmse"], [spread[label] for label in table["label"]]
    )
    assert list(table["model"][:4]) == ["Cannon, four labels"] * 4 and len(table) == 16
    six, four = (
        table["scaled_rmse"][table["model"] == name] for name in ("Cannon", "Cannon, four labels")
    )
    assert (
        six.max() < 0.1 and four.mean() > six[:4].mean()
    )  # what two hidden labels do to the lines goes into the others


def test_averages_compare_the_same_labels(board):
    _, table, _ = board
    found = averages(table)
    ratio = dict(zip(found["model"], found["ratio"], strict=True))
    six, four = (
        table["scaled_rmse"][table["model"] == name] for name in ("Cannon", "Cannon, four labels")
    )
    assert ratio["Cannon"] == 1 and np.isclose(
        ratio["Cannon, four labels"], four.mean() / six[:4].mean()
    )
    assert np.isnan(averages(table[table["model"] == "ridge regression"])["ratio"][0])


def test_readable(board):
    _, table, _ = board
    text = readable(table)
    assert (
        text.colnames[:3] == ["model", "TEFF [K]", "LOGG"]
        and text["N_M"][0] == ""
        and len(text) == 3
    )
    row = table[(table["model"] == "Cannon") & (table["label"] == "LOGG")][0]
    assert text["LOGG"][1] == f"{row['rmse']:.3f} ({row['bias']:+.3f})"
    wide = contests_side_by_side(table)
    assert (
        wide.colnames == ["model", "five folds (apstar)"]
        and "(1.00)" in wide["five folds (apstar)"][1]
    )


def test_figures(board):
    contest, table, labelled = board
    fig = _plot_residual_trends(labelled, contest)
    assert [len(ax.lines) for ax in fig.axes] == [
        4,
        4,
        4,
        4,
        3,
        3,
    ]  # the zero line and three models, or two
    line = fig.axes[1].lines[3]  # ridge regression, LOGG
    truth = contest.spectra.labels(["LOGG"])[:, 0]
    lowest = np.argsort(truth)[:15]
    assert np.isclose(
        line.get_ydata()[0], np.median((labelled["ridge regression"]["logg"].value - truth)[lowest])
    )
    shown = _plot_scores({"two": table[table["model"] == "Cannon"], "one": table}).axes[::-1]
    assert (
        shown[0].get_ylim()[1] > table["scaled_rmse"].max()
    )  # the second panel is not cut at the first one's largest value
    assert len(shown) == 2 and np.allclose(
        shown[0].lines[0].get_ydata(), table["scaled_rmse"][table["model"] == "Cannon"]
    )


# ---- kept trainings


class Counted(RidgeLabels):
    fits = 0

    def fit(self, *args, **kwargs):
        Counted.fits += 1
        return super().fit(*args, **kwargs)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(Counted, "fits", 0)
    contest = contests(stars(), "full")[0]
    whole = _predictions(Counted(labels=SIX), contest, tmp_path, progress=False)
    assert Counted.fits == 5 and len(list(tmp_path.iterdir())) == 5
    sorted(tmp_path.iterdir())[2].unlink()
    again = _predictions(Counted(labels=SIX), contest, tmp_path, progress=False)
    assert Counted.fits == 6
    for name in whole.colnames:
        np.testing.assert_array_equal(whole[name], again[name])  # a file keeps every digit
    boards = [
        judge({"model": Counted(labels=SIX)}, contest, folder, progress=False)[0]
        for folder in (tmp_path, None)
    ]
    assert Counted.fits == 11  # the first of the two trained nothing
    assert boards[0]["rmse"].tolist() == boards[1]["rmse"].tolist()


def test_what_is_kept_belongs_to_stars_and_parameters(tmp_path, monkeypatch):
    contest = contests(stars(), "full")[0]
    _predictions(Counted(labels=SIX), contest, tmp_path, progress=False)
    monkeypatch.setattr(Counted, "fits", 0)
    _predictions(Counted(labels=SIX, alphas=(1.0,)), contest, tmp_path, progress=False)
    assert Counted.fits == 5
    flux = contest.spectra.flux.copy()
    flux[7, 7] += 0.01
    _predictions(
        Counted(labels=SIX),
        Contest(contest.name, contest.spectra.replace(flux=flux), contest.groups),
        tmp_path,
        progress=False,
    )
    assert Counted.fits == 10
    _predictions(
        Counted(labels=SIX),
        Contest(contest.name, contest.spectra, (contest.groups + 1) % 5),
        tmp_path,
        progress=False,
    )
    assert Counted.fits == 15


def test_a_contest_without_training_stars():
    spectra = stars()
    for groups in (np.zeros(120, int), np.full(120, -1)):
        with pytest.raises(LabError, match="odd: no star is left out, or all are at once"):
            _predictions(RidgeLabels(), Contest("odd", spectra, groups), progress=False)


def test_a_whole_run(tmp_path, monkeypatch):
    "Cheap models first; the large ones on one product; while it grows it names what is missing."
    seen = []

    class Slow(RidgeLabels):
        "Stands for the large networks."

    def training_set(root, product, progress):
        spectra = stars(FIVE, archive="survey")
        spectra.stars.meta["product"] = product
        return spectra, None

    def write(table, path):
        if "missing" in table.meta:  # the scoreboard, not the coverage beside it
            seen.append(list(table.meta["missing"]))
        QTable(table).write(path, overwrite=True, format="ascii.ecsv")

    monkeypatch.setattr(results, "training_set", training_set)
    monkeypatch.setattr(
        results,
        "contestants",
        lambda names, profile, stars: {
            "lab network": Slow(labels=names[:2]),  # two labels: this is about runs, not errors
            "Cannon": Cannon(labels=names[:2]),
        },
    )
    monkeypatch.setattr(results, "write_table", write)

    def run(only):
        return run_scoreboard(
            tmp_path,
            tmp_path / "board.ecsv",
            None,
            products=["apstar", "aspcapstar"],
            remark="a test",
            progress=False,
            only=only,
        )

    table = run(only=["five folds", "fields left out"])
    heads = ["product", "contest", "model"]
    held = QTable.read(tmp_path / "board_coverage.ecsv")
    assert set(held[heads].iterrows()) == set(table[heads].iterrows())
    whole = held[held["by"] == "all"]
    assert len(whole) == len(table) and np.all(whole["inside_2"] >= whole["inside_1"])
    assert list(dict.fromkeys(table[heads].iterrows())) == [
        ("apstar", "five folds", "lab network"),
        ("apstar", "five folds", "Cannon"),
        ("apstar", "fields left out", "lab network"),
        ("apstar", "fields left out", "Cannon"),
        ("aspcapstar", "five folds", "Cannon"),
        ("aspcapstar", "fields left out", "Cannon"),
    ]
    assert [len(missing) for missing in seen] == [5, 4, 3, 2, 1, 0] and seen[3] == [
        "lab network, five folds",
        "lab network, fields left out",
    ]
    assert set(run(only=["one split"])["contest"]) == {"one split"}
    with pytest.raises(
        LabError,
        match="no contest 'clusters left out': choose from "
        "'one split', 'five folds', 'fields left out'",
    ):
        run(only=["clusters left out"])
    table = run(only=["five folds", "fields left out"])
    back = QTable.read(tmp_path / "board.ecsv")
    assert (
        back.meta["archive"] == "survey"
        and back.meta["stars"] == 120
        and back.meta["remark"] == "a test"
        and back.meta["versions"]["numpy"] == np.__version__
    )
    assert "CPU core" in back.meta["device"] and len(back) == len(table)


# ---- against the truth


def made_up(folder, shift=0.1, lost=()):
    "Stars whose catalogue lies `shift` above the truth, which is not known of the stars `lost`."
    spectra = stars(FIVE, archive="mock")
    truth = Table(
        {name: np.asarray(spectra.stars[name]) - shift for name in FIVE}
        | {"APOGEE_ID": spectra.stars["APOGEE_ID"]}
    )
    truth[np.setdiff1d(np.arange(120), lost)[::-1]].write(folder / "truth.fits")
    return _with_truth(spectra, folder)


def test_truth_is_joined_by_name(tmp_path):
    spectra = made_up(tmp_path, lost=[3, 5])
    true = np.asarray(spectra.stars["LOGG_TRUE"])
    assert set(np.flatnonzero(np.isnan(true))) == {3, 5} and spectra.label_names == FIVE
    good = np.isfinite(true)
    assert np.allclose(spectra.labels(["LOGG"])[good, 0] - true[good], 0.1)


def test_no_truth_no_columns(tmp_path):
    spectra = stars(FIVE, archive="mock")
    assert _with_truth(spectra, tmp_path) is spectra
    made_up(tmp_path, shift=0)
    assert _with_truth(spectra, tmp_path) is spectra  # a file that repeats the catalogue is none
    assert (
        _with_truth(stars(SIX), tmp_path).stars.colnames == stars(SIX).stars.colnames
    )  # other labels
    table, _ = judge(
        {"ridge regression": RidgeLabels(labels=FIVE)}, contests(spectra)[0], progress=False
    )
    with pytest.raises(LabError, match="no truth is known"):
        against_truth(table)


def test_errors_against_the_truth(tmp_path):
    spectra = made_up(tmp_path, lost=[3])
    contest = contests(spectra)[0]
    table, labelled = judge(
        {name: contestants(FIVE)[name] for name in ("Cannon", "ridge regression")},
        contest,
        progress=False,
    )
    true = against_truth(table)
    assert np.allclose(true["bias"] - table["bias"], 0.1, atol=0.01)  # but for the lost star
    left = contest.spectra[contest.judged].stars["LOGG_TRUE"]
    by_hand = np.sqrt(np.nanmean((labelled["ridge regression"]["logg"].value - left) ** 2))
    row = true[(true["model"] == "ridge regression") & (true["label"] == "LOGG")][0]
    assert np.isclose(row["rmse"], by_hand) and np.isclose(
        row["scaled_rmse"], by_hand / contest.spectra[contest.judged].labels(["LOGG"]).std()
    )
    assert averages(true)["ratio"][0] == 1 and readable(true).colnames == readable(table).colnames
    table.write(tmp_path / "t.ecsv")
    assert np.allclose(against_truth(QTable.read(tmp_path / "t.ecsv"))["rmse"], true["rmse"])


# ---- what is shipped


def test_published_table():
    table = results._published()
    assert (
        len(table) == 15
        and set(table["label"]) == set(FIVE)
        and table["unit"][0] == str(LABELS["TEFF"].unit)
    )
    rmse, bias = (
        {(row["model"], row["label"]): row[column] for row in table} for column in ("rmse", "bias")
    )
    assert (
        rmse["Cannon", "TEFF"] == 74.32
        and rmse["lab network", "LOGG"] == 0.188
        and rmse["augmented network", "SI_FE"] == 0.0404
    )
    assert (
        bias["augmented network", "TEFF"] == -5.044
        and bias["Cannon", "SI_FE"] == 0.0077
        and bias["lab network", "FE_H"] == 0.0035
    )


def test_recorded_run():
    assert records().get("atlantis") is None
    table = records()["clusters"]
    assert table.meta["archive"] == "clusters" and table.meta["profile"] == "full"
    assert {"date", "device", "versions", "seed", "stars"} <= set(table.meta)
    folds = averages(table[(table["contest"] == "five folds") & (table["product"] == "apstar")])
    assert list(folds["model"]) == list(contestants(SIX)) and set(
        table["n"][table["contest"] == "five folds"]
    ) == {table.meta["stars"]}
    ratio = dict(zip(folds["model"], folds["ratio"], strict=True))
    assert ratio["error-aware network"] <= 0.9 and ratio["augmented network"] <= 1.1


def test_what_was_recorded_is_read_without_tensorflow_and_without_plots():
    code = """
import sys
for package in ("tensorflow", "keras"):
    sys.modules[package] = None  # an import of it fails
from stellar_lab.results import contests_side_by_side, readable, records
for table in records().values():
    assert len(readable(table)) == len(contests_side_by_side(table)) == len(set(table["model"]))
import stellar_lab.results
assert not hasattr(stellar_lab.results, "plt")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_part_between_markers_is_replaced_and_nothing_else():
    begin, end = readme.SCOREBOARD
    text = f"# Title\n\n{begin}| old |\n{end}\n\nafter \u00e9\n"
    assert readme.between(text, begin, end) == "| old |\n"
    new = readme.put(text, begin, end, "| new |\n| row |\n")
    assert new == text.replace("| old |\n", "| new |\n| row |\n")
    assert readme.put(new, begin, end, "| old |\n") == text
    for broken in ("", begin, end + begin, text + text, text.replace(end, "")):
        with pytest.raises(ValueError, match="end of scoreboard"):
            readme.put(broken, begin, end, "x")


def test_markdown_keeps_columns():
    lines = readme.markdown(Table({"model": ["a", "longer"], "x": ["1.25", "10"]})).splitlines()
    assert lines == [
        "| model  |    x |",
        "| ------ | ---: |",
        "| a      | 1.25 |",
        "| longer |   10 |",
    ]


def test_errors_are_shown_as_the_command_line_records_them():
    line = {"label": "TEFF", "unit": "K", "rmse": 87.21, "bias": -26.01}
    other = {"label": "LOGG", "unit": "dex", "rmse": 0.2169, "bias": -0.0551}
    unseen = {"training stars": [other, line], "stars left out": [line, other]}
    lines = readme.errors_table([{"errors": unseen}, {"errors": unseen}]).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in lines]
    assert cells[0][1:] == [f"{chain}: RMSE (bias)" for chain in readme.CHAINS.values()]
    assert cells[2:] == [
        ["TEFF [K]", "87.2 (-26)", "87.2 (-26)"],
        ["LOGG", "0.217 (-0.055)", "0.217 (-0.055)"],
    ]


def test_scoreboard_shows_the_recorded_runs():
    text = (ROOT / "SCOREBOARD.md").read_text(encoding="utf-8")
    errors = readme.between(text, *readme.ERRORS)
    assert readme.document(errors) == text
    for cells in ("87.2 (-26)", "75.4 (-8.1)", "0.181 (-0.002)"):
        assert cells in errors
    for archive in records():
        assert f"scoreboard_{archive}.ecsv" in text


def test_readme_shows_six_rows():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.between(text, *readme.SCOREBOARD) == readme.six_rows()


def test_six_rows_are_those_of_the_records():
    lines = readme.six_rows().splitlines()
    assert max(map(len, lines)) <= 100
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:8]]
    assert [row[0] for row in cells] == list(readme.SHOWN_MODELS)
    assert lines[8] == "" and "SCOREBOARD.md" in lines[-1]
    apart = ["140", "0.354", "0.132"]
    assert cells[0] == ["Cannon", "87", "0.217", "0.080", *apart, "1.2", "0.52"]
    apart = ["135", "0.352", "0.127"]
    assert cells[5] == ["error-aware network", "65", "0.169", "0.059", *apart, "35", "0.91"]
    assert "latents" in [row[0] for row in cells]
    note = " ".join(lines[9:])
    assert "478 real giants of 18 clusters" in note  # the average star misses by the labels' spread
    assert "miss by 279 K, 0.640, 0.774" in note and "Cannon 75 K, 0.149, 0.045" in note


def test_readme_shows_a_second_record(tmp_path, monkeypatch):
    spectra = made_up(tmp_path)
    table, _ = judge(
        {name: contestants(FIVE)[name] for name in ("Cannon, linear", "Cannon")},
        contests(spectra)[0],
        progress=False,
    )
    clusters = records()["clusters"]
    table.meta = clusters.meta | {"archive": "mock", "stars": 120}
    assert list(records()) == ["clusters", "mock"]
    monkeypatch.setattr(results, "records", lambda: {"clusters": clusters, "mock": table})
    text = readme.document("")
    assert (
        text.index("## Real stars") < text.index("## Synthetic stars")
        and text.count("Recorded on") == 2
    )
    assert (
        "against the labels that the stars were made from" in text
        and "scoreboard.py --archive data/archives/mock`" in text
        and "scoreboard_mock.ecsv" in text
    )
    assert "Cannon, linear" in text and "metal-rich: the 174 stars" in text
