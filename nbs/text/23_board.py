# %% [markdown]
# # Can you do better?
# > The contests of this book are open: take the folds, label the stars with whatever model you like, and have your table scored as ours are.
#
# **Question.** You have a model of your own. Is it better than those of this book, and are its errors right?
#
# **Idea.** [A comparison is fair](19_results.ipynb) when the stars to learn from and the stars to be judged on are the same. So the folds are written down, star by star: who learns, who is left out, and with whom. You train
# as often as there are folds, label the stars that were left out, and hand in one table. It is scored by the same code that scores our own models.
#
# You learn the rules of a fair contest by holding one.

# %%
#| default_exp board

# %%
#| export
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import QTable, Table, vstack

from stellar_lab.judging import coverage, error_table
from stellar_lab.models import label_values, number_array
from stellar_lab.normalize import training_set
from stellar_lab.refusal import FAULTS, spoiled
from stellar_lab.results import contests
from stellar_lab.survey import (
    LabError,
    Spectra,
    WrongFile,
    atomic_path,
    safe_output,
    said_of,
    what_stands_at,
)

# %%
#| hide
import tempfile

import pytest

from stellar_lab.inversion import infer
from stellar_lab.readers import RidgeLabels
from stellar_lab.survey import archive_root


# %% [markdown]
# ## The folds, written down
# Each row is a star in a contest. Its fold is the number of the training that must not see it. A fold of -1 means that the star only ever trains.

# %%
#| export
def published_folds(
    root, product: str = None, seed: int = 0, progress: bool = False
) -> tuple[Table, list]:
    """Which star of an archive is left out when.

    Parameters
    ----------
    root : str or Path
        of the archive
    product : {"apstar", "aspcapstar"}, optional
        the archive's first by default
    seed : int, default 0
        of the folds
    progress : bool, default False
        show a bar

    Returns
    -------
    folds : Table
        one row per contest and star: ``contest``, ``apogee_id``, ``fold``, ``file``, and the
        catalogue's labels in lower case
    held : list of Contest
        the contests themselves
    """
    spectra, _ = training_set(root, product, progress=progress)
    held = contests(spectra.replace(mask=None), "full", seed)
    tables = []
    for contest in held:
        stars = contest.spectra.stars
        table = Table({"contest": [contest.name] * len(stars)})
        table["apogee_id"] = [str(name) for name in stars["APOGEE_ID"]]
        table["fold"] = contest.groups
        table["file"] = [Path(str(name)).name for name in stars["FILE"]]
        for name in spectra.label_names:
            table[name.lower()] = np.asarray(stars[name], dtype=float)
            table[name.lower()].info.format = ".6g"
        tables.append(table)
    return vstack(tables, metadata_conflicts="silent"), held


# %%
folds, held = published_folds(archive_root(), "aspcapstar")
print({contest.name: len(contest.judged) for contest in held})
assert all(len(set(c.spectra.stars["APOGEE_ID"][c.groups >= 0])) > 100 for c in held)
folds["contest", "apogee_id", "fold", "teff", "logg", "m_h"][:4]


# %% [markdown]
# ## A table of predictions
# What comes in may be anything. So it is checked first: do we know the contest and the stars, is each there once, are the labels numbers? A star without a prediction is counted as missing. It cannot be left out in silence.

# %%
#| export
def _column(table, name):
    "A column whatever the case of its name; None where there is none."
    known = {column.lower(): column for column in table.colnames}
    return table[known[name]] if name in known else None


def _contest_names(predictions):
    "Contest of each row; None where no column says it."
    column = _column(predictions, "contest")
    return None if column is None else np.char.strip(np.asarray(column).astype(str))


def _of_contest(predictions, contest):
    "Rows of the predictions for a contest: of all its stars, where no column says which."
    named = _contest_names(predictions)
    if named is not None:
        return predictions[named == contest.name]
    names = _column(predictions, "apogee_id")
    if names is None:
        return predictions
    of_contest = {str(name) for name in contest.spectra.stars["APOGEE_ID"]}
    return predictions[[str(name).strip() in of_contest for name in names]]


def _check_stars(predictions, contests):
    "LabError for a contest or a star that nobody knows."
    named = _contest_names(predictions)
    names = _column(predictions, "apogee_id")
    if named is not None:
        known = [contest.name for contest in contests] + [_GARBAGE]
        unknown = set(named) - set(known)
        if unknown:
            raise LabError(
                f"no contest {str(min(unknown))!r}: the column contest may hold {', '.join(known)} "
                "(in a table with commas, put a name with a comma between quotes)"
            )
    elif names is not None:
        known = {str(name) for contest in contests for name in contest.spectra.stars["APOGEE_ID"]}
        unknown = {str(name).strip() for name in names} - known
        if unknown:
            raise LabError(f"{min(unknown)} is no star of any contest")


def _places(predictions, contest):
    "Row (M,) of the predictions for each judged star, -1 for a missing one."
    names = _column(predictions, "apogee_id")
    if names is None:
        raise LabError("the predictions have no column apogee_id: which star is which?")
    names = np.array([str(name).strip() for name in names])
    judged = [str(name) for name in contest.spectra.stars["APOGEE_ID"][contest.judged]]
    values, counts = np.unique(names, return_counts=True)
    if (counts > 1).any():
        raise LabError(f"{values[counts > 1][0]} is predicted twice in {contest.name!r}")
    unknown = sorted(set(names) - set(str(n) for n in contest.spectra.stars["APOGEE_ID"]))
    if unknown:
        raise LabError(f"{unknown[0]} is no star of the contest {contest.name!r}")
    row_of = {name: row for row, name in enumerate(names)}
    return np.array([row_of.get(name, -1) for name in judged])


def _numbers(predictions, name):
    "One number per row of a column, NaN where it is masked; None without such a column."
    column = _column(predictions, name)
    if column is None:
        return None
    values = np.ma.filled(np.ma.asarray(number_array(column, name), dtype=float), np.nan)
    if values.ndim != 1:
        raise LabError(f"{name} holds {values.shape[1:]} numbers for each star: one is needed")
    return values


def _answers(predictions, contest, names):
    "A table for `error_table`: a row for each judged star, NaN where nothing was predicted."
    places = _places(predictions, contest)
    answers = QTable()
    for name in (part for label in names for part in (label.lower(), f"{label.lower()}_err")):
        values = _numbers(predictions, name)
        if values is not None:
            answers[name] = np.where(places >= 0, values[places], np.nan)
    flags = _numbers(predictions, "flags")
    flags = np.zeros(len(predictions)) if flags is None else np.nan_to_num(flags)
    answers["flags"] = np.where(places >= 0, flags[places], 0).astype(int)
    return answers


# %%
stars = held[0].spectra.stars["APOGEE_ID"][held[0].judged]
some = Table({"APOGEE_ID": stars[[2, 0]], "TEFF": [4500.0, 4000.0], "TEFF_ERR": [80.0, 60.0]})
_answers(some, held[0], ["TEFF"])[:4]


# %%
#| export
def read_predictions(path) -> Table:
    """A table of predictions from a file.

    Parameters
    ----------
    path : str or Path
        .csv, .fits, .ecsv or any other table that astropy knows by its extension

    Raises
    ------
    LabError
        where there is no file, or no table in it
    """
    other = what_stands_at(path)
    if other:
        raise LabError(f"{path} is no table of predictions (it is {other}, not a file)")
    try:
        table = Table.read(path, format="ascii.csv") if _is_csv(path) else Table.read(path)
        if not len(table):
            raise WrongFile("it has no rows")
        return table
    except FileNotFoundError as error:
        raise LabError(f"there is no file {path}") from error
    except Exception as error:  # a file can hold anything
        raise LabError(f"{path} is no table of predictions ({said_of(error)})") from error


def _is_csv(path):
    "Whether a path says that it is a table of text with commas."
    return Path(path).suffix.lower() == ".csv"


# %%
with tempfile.TemporaryDirectory() as folder:
    some.write(Path(folder) / "some.csv")
    print(read_predictions(Path(folder) / "some.csv"))
    (Path(folder) / "empty.csv").write_text("")
    with pytest.raises(LabError) as refusal:
        read_predictions(Path(folder) / "empty.csv")
    print(str(refusal.value).replace(folder, "…"))


# %% [markdown]
# The score has one row per contest and label: RMSE in the label's unit and in units of its spread, bias, robust scatter, and, where errors are given, how often they hold.

# %%
#| export
def _score(answers, contest, names):
    "The rows of one contest."
    truth = contest.spectra[contest.judged].labels(names)
    table = error_table(answers, truth, names, truth.std(axis=0))
    table.add_column([contest.name] * len(table), index=0, name="contest")
    table["missing"] = len(truth) - table["n"]
    table["refused"] = np.mean(answers["flags"] != 0)
    inside = np.full((2, len(names)), np.nan)
    for k, name in enumerate(names):
        if f"{name.lower()}_err" in answers.colnames:
            row = coverage(answers, truth[:, [k]], name)[0]
            inside[:, k] = row["inside_1"], row["inside_2"]
    table["inside_1"], table["inside_2"] = inside
    for column in ("refused", "inside_1", "inside_2"):
        table[column].info.format = ".2f"
    return table


# %%
true = held[0].spectra[held[0].judged].labels(["TEFF"])[:, 0]
near = QTable({"teff": true + 50, "teff_err": np.full(len(true), 40.0)})
near["flags"] = np.zeros(len(true), int)
shown = _score(near, held[0], ["TEFF"])  # 50 K too hot, and sure of it to 40 K
assert np.isclose(shown["rmse"][0], 50) and shown["inside_1"][0] == 0 and shown["inside_2"][0] == 1
shown["contest", "label", "n", "rmse", "bias", "missing", "inside_1", "inside_2"]

# %% [markdown]
# One contest is scored otherwise: stars with a planted fault, [the garbage](#the-garbage) below. There the right answer is a flag, and the score is the share of stars that got one.

# %%
#| export
_GARBAGE = "garbage"  # name of the contest
_GARBAGE_STARS = 50  # of each fault


def _garbage_stars(held):
    "The good stars that the garbage is made from."
    stars = held[0].spectra
    return stars[np.linspace(0, len(stars) - 1, min(_GARBAGE_STARS, len(stars))).astype(int)]


def _score_garbage(predictions, held):
    "Share refused of each fault; a spectrum without a row is missing, not refused."
    columns = {name: _column(predictions, name) for name in ("apogee_id", "fault", "flags")}
    lacking = [name for name, column in columns.items() if column is None]
    if lacking:
        raise LabError(f"the predictions of garbage have no column {', '.join(lacking)}")
    refused = number_array(columns["flags"], "flags") != 0
    faults = np.asarray(columns["fault"]).astype(str)
    unknown = sorted(set(faults) - set(FAULTS))
    if unknown:
        raise LabError(f"unknown fault {str(unknown[0])!r}: choose from {', '.join(FAULTS)}")
    stars = {str(name) for name in _garbage_stars(held).stars["APOGEE_ID"]}
    names = np.array([str(name).strip() for name in columns["apogee_id"]])
    rows = []
    for fault in FAULTS:
        of_fault = faults == fault
        if len(set(names[of_fault])) < of_fault.sum() or set(names[of_fault]) - stars:
            raise LabError(f"garbage, {fault}: stars that are predicted twice or do not belong")
        share = np.mean(refused[of_fault]) if of_fault.any() else np.nan
        rows.append((_GARBAGE, fault, of_fault.sum(), len(stars) - of_fault.sum(), share))
    table = QTable(rows=rows, names=["contest", "label", "n", "missing", "refused"])
    table["refused"].info.format = ".2f"
    for column in ("rmse", "scaled_rmse", "mae", "bias", "robust", "inside_1", "inside_2"):
        table[column] = np.nan
    return table


# %%
spoilt_stars = np.array(_garbage_stars(held).stars["APOGEE_ID"])
flagged = Table({"apogee_id": np.tile(spoilt_stars, len(FAULTS))})
flagged["fault"] = np.repeat(list(FAULTS), len(spoilt_stars))
flagged["flags"] = np.where(flagged["fault"] == "noise", 8, 0)  # a model that knows noise alone
_score_garbage(flagged, held)["contest", "label", "n", "missing", "refused"][:3]


# %% [markdown]
# And all contests of one table:

# %%
#| export
def judge_predictions(predictions: Table, held: Sequence) -> QTable:
    """Score a table of predictions on the published folds.

    Parameters
    ----------
    predictions : Table
        ``apogee_id``, labels in lower case, and if there are any their ``_err``, ``flags`` and the
        name of the ``contest``; in rows of the contest ``garbage`` also the ``fault``
    held : sequence of Contest
        from `published_folds`

    Returns
    -------
    QTable
        one row per contest and label, or fault of the garbage: the columns of `error_table`;
        ``missing``, judged stars without a prediction; ``refused``, the share with a flag;
        ``inside_1`` and ``inside_2``, the shares within one and two stated errors

    Raises
    ------
    LabError
        for stars that are unknown or predicted twice, and where no label is predicted
    """
    tables = []
    named = _contest_names(predictions)
    if named is not None:
        spoilt = named == _GARBAGE
        if spoilt.any():
            tables.append(_score_garbage(predictions[spoilt], held))
        predictions = predictions[~spoilt]
    _check_stars(predictions, held)
    for contest in held:
        some = _of_contest(predictions, contest)
        if not len(some):
            continue
        known = {name.lower() for name in some.colnames}
        names = [name for name in contest.spectra.label_names if name.lower() in known]
        if not names:
            raise LabError(
                "the predictions have none of the labels "
                + ", ".join(name.lower() for name in contest.spectra.label_names)
            )
        tables.append(_score(_answers(some, contest, names), contest, names))
    if not tables:
        choice = ", ".join(repr(contest.name) for contest in held)
        raise LabError(f"the predictions are for none of the contests {choice}")
    return vstack(tables, metadata_conflicts="silent")


# %% [markdown]
# We enter the contest with ridge regression. It sees no star that it is asked about.

# %%
def entries(model, contest):
    "One table of predictions, as anybody could hand it in."
    tables = []
    for fold in np.unique(contest.groups[contest.groups >= 0]):
        learned = contest.spectra[contest.groups != fold]
        asked = contest.spectra[contest.groups == fold]
        table = infer(model.fit(learned), asked)
        some = Table({"apogee_id": table["apogee_id"], "flags": table["flags"]})
        some["contest"] = contest.name
        for name in model.label_names_:
            some[name.lower()] = label_values(table, [name.lower()])[:, 0]
            some[f"{name.lower()}_err"] = label_values(table, [f"{name.lower()}_err"])[:, 0]
        tables.append(some)
    return vstack(tables)


mine = entries(RidgeLabels(), held[0])
scores = judge_predictions(mine, held)
scores["contest", "label", "rmse", "scaled_rmse", "bias", "missing", "inside_1"]

# %% [markdown]
# The score must be that of the plain formula, a star that is missing must be counted, and a table that is no entry must be refused.

# %%
truth = held[0].spectra[held[0].judged].labels(["TEFF"])[:, 0]
order = {name: row for row, name in enumerate(mine["apogee_id"])}
rows = [order[str(name)] for name in held[0].spectra.stars["APOGEE_ID"][held[0].judged]]
plain = np.sqrt(np.mean((np.asarray(mine["teff"])[rows] - truth) ** 2))
assert np.isclose(scores["rmse"][0], plain)
assert judge_predictions(mine[:-3], held)["missing"].tolist() == [3] * len(scores)
shuffled = mine.copy()
shuffled["teff"] = np.random.default_rng(0).permutation(mine["teff"])
assert judge_predictions(shuffled, held)["scaled_rmse"][0] > 1

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "mine.csv"
    mine.write(path)
    assert np.allclose(judge_predictions(read_predictions(path), held)["rmse"], scores["rmse"])
    path.write_text("")
    with pytest.raises(LabError, match="mine.csv is no table of predictions"):
        read_predictions(path)
with pytest.raises(LabError, match="there is no file nowhere.csv"):
    read_predictions("nowhere.csv")

# %%
twice = vstack([mine, mine[:1]])
stranger = mine.copy()
stranger["apogee_id"][0] = "2M0000"
for wrong, message in {
    "is predicted twice": twice,
    "is no star of the contest": stranger,
    "no column apogee_id": mine["teff", "contest"],
    "none of the labels": mine["apogee_id", "contest"],
}.items():
    with pytest.raises(LabError, match=wrong):
        judge_predictions(message, held)


# %% [markdown]
# ## The garbage
# A model should also know when to say nothing. The same giants with something that should not be there (see [the guard](18_refusal.ipynb)) go into one file. Who labels them and flags a row has refused it.

# %%
#| exporti
def garbage(spectra: Spectra, seed: int = 0) -> Spectra:
    """Stars with all faults of `FAULTS`, one after the other.

    Parameters
    ----------
    spectra : Spectra
        N good stars relative to the continuum
    seed : int, default 0

    Returns
    -------
    Spectra
        N stars for each fault; the column ``FAULT`` says which
    """
    kinds = [spoiled(spectra, fault, seed) for fault in FAULTS]
    stars = vstack([kind.stars for kind in kinds], metadata_conflicts="silent")
    stars["FAULT"] = np.repeat(list(FAULTS), len(spectra))
    flux = np.concatenate([kind.flux for kind in kinds])
    ivar = np.concatenate([kind.ivar for kind in kinds])
    return Spectra(spectra.wavelength, flux, ivar, stars)


def write_garbage(spectra: Spectra, path):
    """Write spectra as a FITS file: FLUX and IVAR (N, P), WAVELENGTH (P,), and a table STARS.

    Parameters
    ----------
    spectra : Spectra
        from `garbage`
    path : str or Path
        .fits file
    """
    names = np.array([str(name) for name in spectra.stars["APOGEE_ID"]])
    stars = Table({"apogee_id": names, "fault": np.asarray(spectra.stars["FAULT"]).astype(str)})
    hdus = [fits.PrimaryHDU()]
    for name in ("flux", "ivar", "wavelength"):
        hdus.append(fits.ImageHDU(getattr(spectra, name), name=name))
    hdus.append(fits.BinTableHDU(stars, name="STARS"))
    with atomic_path(path) as temporary:
        fits.HDUList(hdus).writeto(temporary)


# %%
few = held[0].spectra[:5]
wrong = garbage(few)
with tempfile.TemporaryDirectory() as folder:
    write_garbage(wrong, Path(folder) / "garbage.fits")
    with fits.open(Path(folder) / "garbage.fits") as hdus:
        print([hdu.name for hdu in hdus], hdus["FLUX"].shape)
        assert np.array_equal(hdus["FLUX"].data, wrong.flux)
        assert sorted(set(hdus["STARS"].data["fault"])) == sorted(FAULTS)

# %% [markdown]
# The file comes back as a contest of its own, `garbage`: a row for each star and fault, with the flags. A model without [a guard](18_refusal.ipynb) lets most of it pass. Here ridge regression reads it, with the flags that any model has.

# %%
stars = _garbage_stars(held)
spoilt = garbage(stars)
answer = infer(RidgeLabels().fit(held[0].spectra), spoilt)
back = Table({"apogee_id": answer["apogee_id"], "flags": answer["flags"]})
back["fault"] = np.asarray(spoilt.stars["FAULT"]).astype(str)
back["contest"] = "garbage"
refused = judge_predictions(back, held)
refused["contest", "label", "n", "missing", "refused"]

# %%
assert list(refused["label"]) == list(FAULTS) and not refused["missing"].any()
assert 0 < np.mean(refused["refused"]) < 1
honest = back.copy()
honest["flags"] = 1
both = judge_predictions(vstack([honest[1:], mine]), held)
assert np.all(both["refused"][: len(FAULTS)] == 1) and both["missing"][0] == 1
assert np.isclose(both["rmse"][len(FAULTS)], plain)
honest["fault"][0] = "a comet"
with pytest.raises(LabError, match="unknown fault 'a comet'"):
    judge_predictions(honest, held)
with pytest.raises(LabError, match="garbage have no column fault"):
    judge_predictions(back["apogee_id", "flags", "contest"], held)
with pytest.raises(LabError, match="none of the labels"):  # a fault, and no contest
    judge_predictions(back["apogee_id", "flags", "fault"], held)


# %% [markdown]
# Last, one function writes what a guest needs: the folds and the garbage. `stellar-lab judge ROOT --write FOLDER` calls it, and `stellar-lab judge ROOT PREDICTIONS.csv` scores what comes back.

# %%
#| exporti
def write_contest(root, folder, product: str = None, progress: bool = False) -> list:
    """Write the folds and the garbage of an archive.

    Parameters
    ----------
    root : str or Path
        of the archive
    folder : str or Path
        takes ``folds.csv`` and ``garbage.fits``; made where it is not there
    product : {"apstar", "aspcapstar"}, optional
    progress : bool, default False
        show a bar

    Returns
    -------
    list of Path
        the two files
    """
    folds, held = published_folds(root, product, progress=progress)
    folder = Path(folder)
    paths = [folder / "folds.csv", folder / "garbage.fits"]
    for path in paths:
        safe_output(path, [root], [b"apogee_id"])
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(paths[0]) as temporary:
        folds.write(temporary, format="ascii.csv")
    write_garbage(garbage(_garbage_stars(held)), paths[1])
    return paths


# %%
with tempfile.TemporaryDirectory() as folder:
    for path in write_contest(archive_root(), Path(folder) / "contest", "aspcapstar"):
        print(path.name, f"{path.stat().st_size / 1e6:.1f} MB")
    again = Table.read(Path(folder) / "contest" / "folds.csv")
    assert again["fold"].tolist() == folds["fold"].tolist()
    assert np.allclose(again["teff"], folds["teff"], rtol=1e-5)
    print((Path(folder) / "contest" / "folds.csv").read_text().split("\n")[1])
    assert len((Path(folder) / "contest" / "folds.csv").read_text()) < 150 * len(folds)

# %% [markdown]
# **Exercise.** Average the answers of ridge regression and of [the reader from latents](17_latents.ipynb), and hand them in. Is the mean of two models better than either?
