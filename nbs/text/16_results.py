# %% [markdown]
# # Which model reads stars best?
# > One table for all models: the same stars left out, the same yardstick, and what a label costs.
#
# **Question.** Twelve chapters have brought six models from spectra to labels. Which one should you use? And is a difference between two of them more than luck, or than an easier set of stars?
#
# **Idea.** A comparison is fair when everything but the model is the same: the stars to learn from, the stars to be judged on, and the unit of error. Labels have different units, so each error is divided by the standard
# deviation $S_k$ of that label over the judged stars, one $S_k$ for all models. A model that always answers the mean has then a *scaled RMSE* of one,
# $$ \mathrm{RMSE}_k = \sqrt{\frac1N\sum_n (\hat\ell_{nk}-\ell_{nk})^2}, \qquad \text{scaled RMSE}_k = \mathrm{RMSE}_k / S_k , $$
# and its average over the labels is one number for a model.
#
# You learn to set up such a contest so that no star is judged by a model that has seen it, to make the judging harder step by step (a random split, folds, whole clusters left out), and to read a published table beside your own without
# fooling yourself.

# %%
#| default_exp results

# %%
#| export
import hashlib
import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import cycle
from pathlib import Path

import astropy.units as u
import matplotlib.pyplot as plt
import numpy as np
from astropy.table import QTable, Table, vstack
from sklearn.base import clone
from sklearn.model_selection import GroupKFold
from sklearn.utils.validation import has_fit_parameter
from tqdm import tqdm

from stellar_lab import __version__
from stellar_lab.augmentation import AugmentedNetwork, ErrorAwareNetwork
from stellar_lab.cannon import Cannon
from stellar_lab.inversion import infer
from stellar_lab.judging import error_table
from stellar_lab.models import LabelModel, fold_numbers, train_test_rows
from stellar_lab.network import LAB_EPOCHS, LabNetwork, epochs_within, tf
from stellar_lab.normalize import training_set
from stellar_lab.readers import RidgeLabels
from stellar_lab.survey import (
    ARCHIVES,
    LABELS,
    LabError,
    Spectra,
    archive_record,
    data_file,
    label_records,
    read_truth,
    write_table,
)

# %%
import tempfile

import pytest
from IPython.display import Markdown

from stellar_lab.readers import LabelReader
from stellar_lab.survey import TRUTH_FILE, archive_root, profile, use_style

# %% [markdown]
# ## The contestants
# Two Cannons, one with all labels that the archive has and a smaller one (four labels, or, where there are only five, a linear model of them); the ridge regression of chapter 9, the best that a linear map can do in a second; the lab's network, on centred flux; the same network on noisy copies; and
# the network that takes the errors in. The quick profile trains the two large networks for 35 epochs, the full one for the lab's 250; the others are the same in both. Where there are many stars, an epoch holds more steps, and the quick
# profile takes fewer epochs.

# %%
#| export
STANDARD = "Cannon"  # the model that the others are measured by


def contestants(
    names,  # K labels of the archive
    profile: str = "quick",  # "full": the lab's epochs
    stars: int = 0,  # to train on; many stars need fewer epochs in the quick profile
) -> dict:  # name -> estimator
    "The models of the scoreboard."
    names, rows = list(names), {"all": max(stars, 1), "learned": max(round(0.8 * stars), 1)}
    lab, augmented, aware = {
        "quick": (
            epochs_within(600, rows["all"], 35),
            epochs_within(600, rows["learned"], 35),
            epochs_within(2_000, rows["all"], 100),
        ),
        "full": (LAB_EPOCHS, LAB_EPOCHS, 100),
    }[profile]
    smaller = (
        {"Cannon, four labels": Cannon(scatter=True, labels=names[:4])}
        if len(names) > 5
        else {"Cannon, linear": Cannon(order=1, scatter=True, labels=names)}
    )
    return smaller | {
        STANDARD: Cannon(scatter=True, labels=names),
        "ridge regression": RidgeLabels(labels=names),
        "lab network": LabNetwork(labels=names, centre=True, epochs=lab),
        "augmented network": AugmentedNetwork(labels=names, epochs=augmented),
        "error-aware network": ErrorAwareNetwork(labels=names, epochs=aware),
    }


# %% [markdown]
# ## A truth, where there is one
# A catalogue has errors of its own, and every RMSE against it contains them. The synthetic archive keeps, beside its catalogue, the labels that each star was made from (`truth.fits`). These ride along as columns of the stars, so that every
# later table can be had against the catalogue and against the truth. Real stars have no truth: their file only repeats the catalogue.

# %%
#| export
TRUE = "_TRUE"  # ending of the columns


def with_truth(
    spectra: Spectra,
    root,  # of their archive
) -> Spectra:  # with columns `<label>_TRUE`, or as they are where no truth is known
    "Stars with the labels they were made from beside those of the catalogue."
    table, names = read_truth(root), spectra.label_names
    if table is None or not set(names) <= set(table.colnames):
        return spectra
    place = {str(name).strip(): row for row, name in enumerate(table["APOGEE_ID"])}
    rows = np.array([place.get(str(name).strip(), -1) for name in spectra.stars["APOGEE_ID"]])
    labels = np.where(
        rows[:, None] >= 0,
        np.column_stack([np.asarray(table[name], float) for name in names])[rows],
        np.nan,
    )
    if np.allclose(labels, spectra.labels(names), rtol=1e-4, atol=1e-4, equal_nan=True):
        return spectra
    stars = spectra.stars.copy()
    for name, column in zip(names, labels.T):
        stars[f"{name}{TRUE}"] = column
    return spectra.replace(stars=stars)


# %%
use_style()
record = archive_record(archive_root())
names = list(record.labels)
spectra = with_truth(
    training_set(archive_root(), progress=False)[0].replace(mask=None), archive_root()
)
models = contestants(names, profile(), len(train_test_rows(len(spectra))[0]))
known = all(f"{name}{TRUE}" in spectra.stars.colnames for name in names)
print(
    f"{len(spectra)} stars, {len(names)} labels{', truth known' * known}; models: {', '.join(models)}"
)

# %%
with tempfile.TemporaryDirectory() as folder:
    made = Table(
        {"APOGEE_ID": spectra.stars["APOGEE_ID"][[2, 0, 1]]}
        | dict(zip(names, spectra[[2, 0, 1]].labels(names).T))
    )  # the fourth star is not in it
    made["TEFF"] += 10
    made.write(Path(folder) / TRUTH_FILE)
    told = with_truth(spectra[:4], folder).stars
assert (
    np.allclose(told["TEFF_TRUE"][:3], np.asarray(told["TEFF"][:3]) + 10, rtol=1e-6)
    and np.isnan(told["TEFF_TRUE"][3])
    and known == (record.name == "mock")
)

# %% [markdown]
# ## The contests
# Who is left out decides what a figure means. One split, as in the lab, judges a third of the stars, once. Five folds judge every star. But stars of one cluster are siblings: in both, the model has seen sisters of the star that it is asked
# about. So a third contest leaves out whole clusters, in five trainings, with all stars of a cluster on one side. A last one takes the metal-rich stars by themselves, for these resemble the stars of the published table. An archive without
# clusters has the lab's own split first, for there are stars enough, then five folds and whole fields.

# %%
#| export
METAL_RICH = -1.3  # [M/H]; stars above it resemble those of the published table


@dataclass
class Contest:
    "Stars, and which of them are left out together."

    name: str
    spectra: Spectra
    groups: (
        np.ndarray
    )  # (N,) number of the group that a star is left out with; -1: it only ever trains

    @property
    def judged(self) -> np.ndarray:
        "Rows of the stars that are left out once."
        return np.flatnonzero(self.groups >= 0)


def contests(
    spectra: Spectra,
    profile: str = "quick",
    seed: int = 0,  # of the folds
) -> list:
    "One split (quick); folds, whole clusters left out, and the metal-rich stars among themselves where [M/H] is a label (full). Without clusters: split, folds, fields."
    groups = np.full(len(spectra), -1)
    groups[train_test_rows(len(spectra))[1]] = 0
    split, clusters = (
        Contest("one split", spectra, groups),
        spectra.stars.meta.get("archive") == "clusters",
    )
    if profile == "quick":
        return [split]
    found = [split] * (not clusters) + [
        Contest("five folds", spectra, fold_numbers(len(spectra), 5, seed)),
        whole_groups(spectra),
    ]
    if clusters and "M_H" in spectra.label_names:
        rich = spectra[spectra.labels(["M_H"])[:, 0] > METAL_RICH]
        found.append(Contest("metal-rich, five folds", rich, fold_numbers(len(rich), 5, seed)))
    return found


def whole_groups(spectra: Spectra) -> Contest:
    "Whole clusters left out, in at most five trainings; in an archive without clusters whole fields."
    column = (
        "LOCATION_ID" if "LOCATION_ID" in spectra.stars.colnames else "FIELD"
    )  # a cluster has a location of its own
    place, groups = (
        np.array([str(value) for value in spectra.stars[column]]),
        np.empty(len(spectra), dtype=int),
    )
    count = min(5, len(set(place)))
    if count < 2:
        raise LabError(
            f"all stars have the same {column}: nothing is left to train on when it is left out"
        )
    for number, (_, rows) in enumerate(GroupKFold(count).split(groups, groups=place)):
        groups[rows] = number
    return Contest(
        "clusters left out"
        if spectra.stars.meta.get("archive") == "clusters"
        else "fields left out",
        spectra,
        groups,
    )


# %% [markdown]
# Every star is judged at most once, folds are of one size, and no location stands on both sides:

# %%
(split,) = contests(spectra)
every = {contest.name: contest for contest in (split, *contests(spectra, "full"))}
for contest in every.values():
    sizes = np.bincount(contest.groups[contest.judged])
    print(
        f"{contest.name:24s} {len(contest.spectra)} stars, {len(contest.judged)} judged, left out together: {', '.join(map(str, sizes))}"
    )

# %%
folds, apart = every["five folds"], whole_groups(spectra)
place = np.array(spectra.stars["LOCATION_ID"]).astype(str)
assert np.array_equal(split.judged, np.sort(train_test_rows(len(spectra))[1])) and np.array_equal(
    folds.groups, fold_numbers(len(spectra))
)
assert (
    all(len(set(apart.groups[place == one])) == 1 for one in set(place))
    and np.bincount(folds.groups).max() - np.bincount(folds.groups).min() <= 1
)
with pytest.raises(LabError, match="all stars have the same LOCATION_ID"):
    whole_groups(spectra[place == place[0]])

# %% [markdown]
# ## Train, label, look at the clock
# A training is one group left out. Its labels go to a file as soon as they are there, for the whole run takes hours and a computer may be needed for something else: started again, it goes on where it was. A file belongs to one
# set of parameters and one set of stars, which its name says as a digest; change either, and it is not found. (A change in a model's *code* it cannot know: remove the folder then.)
#
# Of the training we keep the time on the clock and the processor's own (all cores added up), which does not care what else the machine does. Labelling is timed three times over and the best counts, since the first call of a network also builds it.

# %%
#| export
TIMES = ("train_seconds", "train_cpu_seconds", "label_ms")


def train_and_label(
    model: LabelModel,  # parameters; it is cloned, not changed
    contest: Contest,
    number: int,  # of the group that is left out
    progress: bool = False,
) -> QTable:  # labels of the group's stars, and their `row` in the contest; what it took in `meta`
    "Train on all other stars, label those left out, and look at the clock."
    test, spectra = np.flatnonzero(contest.groups == number), contest.spectra
    train = spectra[contest.groups != number]
    quiet = {"progress": progress} if has_fit_parameter(model, "progress") else {}
    begin, begin_cpu = time.perf_counter(), time.process_time()
    fitted = clone(model).fit(train, **quiet)
    train_seconds, train_cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    table, label_seconds = infer(fitted, spectra[test]), []
    for _ in range(3):
        begin = time.perf_counter()
        infer(fitted, spectra[test])
        label_seconds.append(time.perf_counter() - begin)
    kept = QTable(
        {"row": test} | {name.lower(): table[name.lower()] for name in fitted.label_names_}
    )
    kept.meta = {"labels": ",".join(fitted.label_names_)} | dict(
        zip(TIMES, (train_seconds, train_cpu, 1000 * min(label_seconds) / len(test)))
    )
    return kept


# %%
#| export
def predictions(
    model: LabelModel,
    contest: Contest,
    folder=None,  # keeps what is done, a file a training, so that an interrupted run goes on
    name: str = "model",  # for bar and files
    progress: bool = True,
) -> QTable:  # a row a judged star, in the order of `contest.judged`; mean times in `meta`
    "Labels of every judged star by a model that has not seen its group."
    numbers, sizes = np.unique(contest.groups[contest.judged], return_counts=True)
    if not len(sizes) or sizes.max() == len(contest.spectra):
        raise LabError(
            f"{contest.name}: no star is left out, or all are at once; give groups that leave some to train on"
        )
    parts = []
    for number in tqdm(
        numbers, desc=f"{name}, {contest.name}", unit="training", disable=not progress, leave=False
    ):
        path = (
            None
            if folder is None
            else Path(folder)
            / f"{_slug(contest.name)}-{_slug(name)}-{number}-{_identity(model, contest, number)}.ecsv"
        )
        if path is not None and path.exists():
            parts.append(QTable.read(path))
            continue
        parts.append(train_and_label(model, contest, number, progress))
        if path is not None:
            write_table(parts[-1], path)
    table = vstack(parts, metadata_conflicts="silent")
    table.meta = {"labels": parts[0].meta["labels"]} | {
        key: float(np.mean([part.meta[key] for part in parts])) for key in TIMES
    }
    return table[np.argsort(table["row"])]


def _slug(text):
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _identity(model, contest, number):
    "A digest of the model's parameters, the stars and which of them are left out: another one is another training."
    spectra = contest.spectra
    digest = hashlib.sha256(
        repr((type(model).__name__, sorted(model.get_params().items()))).encode()
    )
    for part in (spectra.flux, spectra.ivar, spectra.labels(), contest.groups == number):
        digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()[:12]


# %%
#| export
def device() -> str:
    "What this run computes on, in words."
    gpus = tf.config.list_physical_devices("GPU")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = [
        tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in gpus
    ]
    return ", ".join([f"{cores} CPU core{'s' * (cores > 1)}", *names])


# %% [markdown]
# Can a model cheat? This one tries: it remembers every spectrum it was trained on, answers the catalogue's label when it meets one again, and otherwise -9999, as the survey does where it has no label. In a fair contest it says
# nothing else.

# %%
class Parrot(LabelReader):
    "Knows what it has seen, and nothing else."

    trainings = 0

    def __init__(self, labels=None):
        self.labels = labels

    def fit(self, labels, flux=None, ivar=None, label_names=None, wavelength=None):
        flux, _ = self._begin(labels, flux, ivar, label_names, wavelength)
        self.seen_ = dict(zip((star.tobytes() for star in flux), self.training_labels_))
        Parrot.trainings += 1
        return self

    def _read(self, flux, ivar):
        nothing = np.full(len(self.label_names_), -9999.0)
        labels = np.array([self.seen_.get(star.tobytes(), nothing) for star in flux])
        return labels, np.full((*labels.shape, labels.shape[1]), np.nan)


# %%
few = spectra[::6].replace(
    flux=spectra.flux[::6, :50].copy(),
    ivar=np.ones_like(spectra.ivar[::6, :50]),
    wavelength=spectra.wavelength[:50],
    mask=None,
)
parrot = Parrot().fit(few)
assert np.allclose(parrot.read(few), few.labels())  # it can speak
for contest in contests(few, "full"):
    silent = predictions(Parrot(), contest, progress=False)
    assert np.array_equal(silent["row"], contest.judged) and np.all(
        silent[names[0].lower()].value == -9999
    )

# %% [markdown]
# And an interrupted run: after the first two of five trainings the folder holds two files; the rest is trained, what is there is not. Another model, or one star more, and it starts anew.

# %%
(contest,) = (one for one in contests(few, "full") if one.name == "five folds")
with tempfile.TemporaryDirectory() as folder:
    whole = predictions(Parrot(), contest, folder, progress=False)
    kept = sorted(Path(folder).glob("*.ecsv"))
    for path in kept[2:]:
        path.unlink()
    Parrot.trainings = 0
    again = predictions(Parrot(), contest, folder, progress=False)
    assert len(kept) == 5 and Parrot.trainings == 3 and np.array_equal(whole["row"], again["row"])
    predictions(Parrot(labels=names[:2]), contest, folder, progress=False)
    assert Parrot.trainings == 8


# %% [markdown]
# ## Judging
# The errors come from chapter 5's `error_table`; here they only get one common scale and the name of the model. All judged stars count, the flagged ones too: whoever throws away the hard stars looks good.

# %%
#| export
def score(
    name: str,  # of the model
    labelled: QTable,  # its `predictions`
    contest: Contest,
) -> QTable:  # a row a label
    "The rows of one model. Labels are scaled by their standard deviation over all judged stars, the same for every model."
    names = labelled.meta["labels"].split(",")
    truth = contest.spectra[contest.judged].labels(names)
    errors = error_table(labelled, truth, names, truth.std(axis=0))
    heads = {
        "product": contest.spectra.stars.meta.get("product", ""),
        "contest": contest.name,
        "model": name,
    }
    table = QTable(
        {key: [value] * len(names) for key, value in heads.items()}
        | {column: errors[column] for column in errors.colnames}
    )
    table["true_rmse"], table["true_bias"] = _true_errors(labelled, contest, names)
    for key in TIMES:
        table[key] = labelled.meta[key]
    for column in (*errors.colnames[3:], "true_rmse", "true_bias", *TIMES):
        table[column].info.format = ".4g"
    return table


def _true_errors(labelled, contest, names):
    "RMSE and bias (K,) against the truth; NaN where none is known."
    stars, columns = contest.spectra[contest.judged].stars, [f"{name}{TRUE}" for name in names]
    if not set(columns) <= set(stars.colnames):
        return np.full((2, len(names)), np.nan)
    values = [
        np.asarray(getattr(labelled[name.lower()], "value", labelled[name.lower()])) - stars[column]
        for name, column in zip(names, columns)
    ]
    return np.sqrt(np.nanmean(np.square(values), axis=1)), np.nanmean(values, axis=1)


def against_truth(
    table: QTable,  # from `judge`
) -> QTable:  # the same, RMSE, scaled RMSE and bias against the truth; LabError where none is known
    "The errors of a table against the labels that the stars were made from; the scale of each label stays the catalogue's."
    if "true_rmse" not in table.colnames or not np.isfinite(table["true_rmse"]).any():
        raise LabError("no truth is known of these stars: only an archive that was made has one")
    found = table.copy()
    found["scaled_rmse"] = table["true_rmse"] * table["scaled_rmse"] / table["rmse"]
    found["rmse"], found["bias"] = table["true_rmse"], table["true_bias"]
    found.remove_columns([column for column in ("mae", "robust") if column in found.colnames])
    return found


def judge(
    models: Mapping,  # name -> estimator, as from `contestants`
    contest: Contest,
    folder=None,  # as for `predictions`
    progress: bool = True,
) -> tuple:  # table, a row for each model and label; and name -> `predictions`
    "RMSE, scaled RMSE, bias and scatter of every model on the same left-out stars, and what it costs."
    labelled = {
        name: predictions(model, contest, folder, name, progress) for name, model in models.items()
    }
    return vstack(
        [score(name, table, contest) for name, table in labelled.items()],
        metadata_conflicts="silent",
    ), labelled


# %% [markdown]
# A reader whose errors we know: it looks the star up in the catalogue (its spectrum *is* its labels) and adds an offset, up for one half of the stars and further up for the other. Mean and root mean square can then be worked out by hand.

# %%
class Offset(LabelReader):
    "Answers the first pixels of the spectrum, times 1000 and 2, off by a tenth or three tenths of a unit."

    labels = None

    def fit(self, labels, **_):
        self._begin(labels, None, None, None, None)
        return self

    def _read(self, flux, ivar):
        off = np.where(flux[:, 2:3] > 0, 0.1, 0.3)
        return (flux[:, :2] + off) * [1000, 2], np.full((len(flux), 2, 2), np.nan)


# %%
rng = np.random.default_rng(4)
made = np.column_stack([rng.normal(size=(40, 2)), np.tile([1, -1], 20)]).astype("f4")
stars = Table({"TEFF": made[:, 0] * 1000.0, "LOGG": made[:, 1] * 2.0}, meta={"product": "apstar"})
toy = Contest(
    "toy",
    Spectra(np.arange(3.0) + 15_200, made, np.ones_like(made), stars),
    np.tile([0, 0, 1, 1], 10),
)
board, labelled = judge({"offset": Offset()}, toy, progress=False)
board["model", "label", "n", "rmse", "scaled_rmse", "bias"]

# %%
by_hand = np.sqrt((0.1**2 + 0.3**2) / 2)
assert (
    np.allclose(board["bias"], [200, 0.4])
    and np.allclose(board["rmse"], [1000 * by_hand, 2 * by_hand])
    and np.all(board["n"] == 40)
)
assert np.allclose(board["scaled_rmse"], by_hand / made[:, :2].std(axis=0))
with pytest.raises(LabError, match="no truth is known of these stars"):
    against_truth(board)

# %% [markdown]
# With a truth that lies 0.1 units above the catalogue everywhere, one half of the answers is right and the other two tenths too high.

# %%
stars["TEFF_TRUE"], stars["LOGG_TRUE"] = stars["TEFF"] + 100, stars["LOGG"] + 0.2
true = against_truth(judge({"offset": Offset()}, toy, progress=False)[0])
assert np.allclose(true["bias"], [100, 0.2], rtol=1e-5) and np.allclose(
    true["rmse"], [1000 * np.sqrt(0.02), 2 * np.sqrt(0.02)], rtol=1e-5
)
assert np.allclose(true["scaled_rmse"], np.sqrt(0.02) / made[:, :2].std(axis=0), rtol=1e-5)


# %% [markdown]
# The table has a row for each model and label. Two shorter forms are for reading: the average over labels beside the Cannon's, and a line a model. A model of four labels is compared with the Cannon on these four.

# %%
#| export
def averages(
    table: Table,  # from `judge`
) -> QTable:  # a row for each product, contest and model
    "Scaled RMSE averaged over a model's labels, and `ratio`: the same beside the Cannon's on the same labels (NaN without a Cannon)."
    rows, heads = [], ("product", "contest", "model")
    for product, contest, model in dict.fromkeys(zip(*(map(str, table[head]) for head in heads))):
        own = _part(table, product, contest, model)
        standard = {
            row["label"]: row["scaled_rmse"] for row in _part(table, product, contest, STANDARD)
        }
        mean, beside = (
            np.mean(own["scaled_rmse"]),
            np.mean([standard.get(label, np.nan) for label in own["label"]]),
        )
        rows.append((product, contest, model, len(own), mean, mean / beside))
    found = QTable(rows=rows, names=[*heads, "labels", "scaled_rmse", "ratio"])
    for column in ("scaled_rmse", "ratio"):
        found[column].info.format = ".3f"
    return found


def _part(table, product, contest, model):
    return table[
        (table["product"] == product) & (table["contest"] == contest) & (table["model"] == model)
    ]


def readable(
    table: Table,  # from `judge`, of one product and contest
) -> Table:  # a row a model, as text
    "RMSE (bias) of each label, scaled RMSE averaged, its ratio to the Cannon's, processor seconds to train, milliseconds to label a star."
    labels, rows = list(dict.fromkeys(table["label"])), []
    for line in averages(table):
        own = {
            row["label"]: row
            for row in _part(table, line["product"], line["contest"], line["model"])
        }
        seconds, milliseconds = (next(iter(own.values()))[key] for key in TIMES[1:])
        rows.append(
            {"model": line["model"]}
            | {_heading(label): _cell(own[label]) if label in own else "" for label in labels}
            | {
                "scaled RMSE": f"{line['scaled_rmse']:.3f}",
                "beside the Cannon": f"{line['ratio']:.2f}",
                "training [s]": f"{seconds:.{0 if seconds >= 9.5 else 1}f}",
                "labelling [ms/star]": f"{milliseconds:.2f}",
            }
        )
    return Table(rows)


def _heading(label):
    return f"{label} [K]" if LABELS[label].unit == u.K else label


def _cell(row):
    return (
        f"{row['rmse']:.1f} ({row['bias']:+.1f})"
        if row["unit"] == "K"
        else f"{row['rmse']:.3f} ({row['bias']:+.3f})"
    )


# %% [markdown]
# ## Live: the contest of this run
# In the quick profile one split, now; in the full profile all three contests, which takes hours unless the folder already holds them.

# %%
kept = (
    None if profile() == "quick" else Path("../data/archives/scoreboard")
)  # where the command below keeps its trainings
first, *others = contests(spectra, profile())
live, labelled = judge(models, first, kept)

# %%
live = vstack(
    [live, *(judge(models, contest, kept)[0] for contest in others)], metadata_conflicts="silent"
)
readable(live[live["contest"] == first.name])

# %%
readable(
    against_truth(live[live["contest"] == first.name])
) if known else "no truth is known of these stars"

# %%
#| echo: false
beside = {(row["contest"], row["model"]): row["ratio"] for row in averages(live)}
sizes = {
    name: len(live[(live["contest"] == first.name) & (live["model"] == name)]) for name in models
}
best = min(
    (name for name in models if sizes[name] == len(names)),
    key=lambda name: beside[first.name, name],
)
Markdown(
    f"**What to see.** {profile()} profile, {first.name}, {len(first.judged)} stars judged on {device()}: RMSE with bias in brackets; times are processor seconds of one training, all cores added up. Of the models with all {len(names)} labels the {best} has the smallest scaled RMSE. "
    f"Beside the Cannon's, ridge regression has {beside[first.name, 'ridge regression']:.2f} times, the lab's network {beside[first.name, 'lab network']:.2f}, the augmented network {beside[first.name, 'augmented network']:.2f} and the "
    f"error-aware network {beside[first.name, 'error-aware network']:.2f} times; the first one, {list(models)[0]}, {beside[first.name, list(models)[0]]:.2f} times, over its {sizes[list(models)[0]]} labels. With {len(first.judged)} stars an RMSE is known to some "
    f"{1 / np.sqrt(2 * len(first.judged)):.0%} if errors are normal, and less well where single stars stand out: small differences between two models mean little here."
)

# %% [markdown]
# What this lab promises on the embedded stars: in the quick run the error-aware network has at most 1.1 times the Cannon's scaled RMSE and the augmented one at most 1.25 times; in the full run 0.9 and 1.1. One scale for all models,
# and shuffled labels do no better than the mean.

# %%
limits = (
    {"error-aware network": 1.1, "augmented network": 1.25}
    if profile() == "quick"
    else {"error-aware network": 0.9, "augmented network": 1.1}
)
for name, limit in limits.items():
    print(f"{name}: {beside[first.name, name]:.3f}, at most {limit}")
    assert beside[first.name, name] <= limit or record.name != "clusters"
scales = live["rmse"] / live["scaled_rmse"]
assert all(
    np.allclose(
        scales[(live["contest"] == first.name) & (live["label"] == label)],
        scales[live["label"] == label][0],
    )
    for label in names
)
shuffled = first.spectra[first.judged].labels(names)[
    np.random.default_rng(0).permutation(len(first.judged))
]
assert np.all(
    error_table(labelled[STANDARD], shuffled, names, shuffled.std(axis=0))["scaled_rmse"] > 0.95
)

# %% [markdown]
# ## Where each model errs
# An RMSE does not tell a scatter from a trend. So for every label the difference predicted - catalogue against the catalogue's value: the median of each eighth of the stars, a line a model.

# %%
#| export
LOOKS = [
    ("C0", "o"),
    ("C1", "s"),
    ("C2", "D"),
    ("C3", "^"),
    ("C4", "v"),
    ("0.1", "P"),
]  # colour and marker of each model in turn


def plot_residual_trends(
    labelled: Mapping,  # model -> its `predictions`
    contest: Contest,
    bins: int = 8,  # with as many stars each
):
    "Running medians of predicted - catalogue against the catalogue's label, a panel a label, all models in each. Returns the Figure."
    names = list(contest.spectra.label_names)
    columns = min(3, len(names))
    fig, axes = plt.subplots(
        -(-len(names) // columns),
        columns,
        figsize=(10, 2.7 * -(-len(names) // columns)),
        squeeze=False,
    )
    for ax, label in zip(axes.flat, label_records(names)):
        truth = contest.spectra[contest.judged].labels([label.name])[:, 0]
        parts = np.array_split(np.argsort(truth), bins)
        middle = [np.median(truth[part]) for part in parts]
        ax.axhline(0, color="0.5", lw=0.8)
        for (name, table), (color, marker) in zip(labelled.items(), cycle(LOOKS)):
            if label.name.lower() in table.colnames:
                residual = (
                    getattr(table[label.name.lower()], "value", table[label.name.lower()]) - truth
                )
                ax.plot(
                    middle,
                    [np.nanmedian(residual[part]) for part in parts],
                    f"{marker}-",
                    color=color,
                    ms=4,
                    lw=1.1,
                    label=name,
                )
        ax.set(xlabel=label.axis)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("predicted - catalogue")
    lines = {
        line.get_label(): line for ax in axes.flat for line in ax.get_legend_handles_labels()[0]
    }
    shown = [name for name in labelled if name in lines]
    fig.legend(
        [lines[name] for name in shown], shown, loc="outside upper center", ncols=3, frameon=False
    )
    return fig


# %%
fig = plot_residual_trends(labelled, first)


# %%
def trend(name, label):
    "Slope of predicted - catalogue against catalogue."
    truth = first.spectra[first.judged].labels([label])[:, 0]
    return np.polyfit(
        truth,
        getattr(labelled[name][label.lower()], "value", labelled[name][label.lower()]) - truth,
        1,
    )[0]


# %%
#| echo: false
full_models = [name for name in models if sizes[name] == len(names)]
slopes, trends = (
    {name: trend(name, "TEFF") for name in full_models},
    [trend(name, label) for name in full_models for label in names],
)
last = names[-1]
Markdown(
    f"**What to see.** {np.sum(np.less(trends, 0))} of {len(trends)} trends fall from left to right: small values are predicted too large and large ones too small. Any estimate from noisy labels is drawn to the mean a little, and the more so the harder a label is to read. In temperature the "
    f"slopes are {', '.join(f'{slope:+.3f} ({name})' for name, slope in slopes.items())}; in {last} they reach {min(trend(name, last) for name in full_models):+.2f}. A line that lies below or above the others throughout is a bias; where all lines "
    "bend together, it is the catalogue that bends, or the stars are few."
)


# %% [markdown]
# ## Recorded: the full run
# Folds and left-out clusters with 250 epochs take hours on two cores. They were run once by the command
# ```
# python tools/scoreboard.py --profile full --products apstar,aspcapstar
# ```
# which calls the function below, and what it found lies in `data/scoreboard_clusters.ecsv` with date, device and versions; with `--archive` it does the same for another archive, and writes `data/scoreboard_mock.ecsv` for the synthetic stars.
# Nothing in the following tables was computed by this notebook; they are read from these files.

# %%
#| export
def run_scoreboard(
    root,  # of the archive
    out,  # table to write (.ecsv), again after every model
    folder,  # keeps every training
    profile: str = "full",
    products=None,  # by default the archive's first; the lab's two large networks run on the first only
    seed: int = 0,  # of the folds
    remark: str = "",  # goes into the table's meta: what else the machine did, say
    only=None,  # names of the contests to hold; by default all
    progress: bool = True,
) -> QTable:
    "The whole scoreboard of an archive, cheap models first. Interrupted, it goes on where it was."
    record, jobs = archive_record(root), []
    products = list(products or record.products[:1])
    for k, product in enumerate(products):
        spectra = with_truth(
            training_set(root, product=product, progress=progress)[0].replace(mask=None), root
        )
        models, held = (
            contestants(spectra.label_names, profile, len(train_test_rows(len(spectra))[0])),
            contests(spectra, profile, seed),
        )
        unknown = sorted(set(only or ()) - {contest.name for contest in held})
        if unknown:
            raise LabError(
                f"no contest {', '.join(map(repr, unknown))}: choose from {', '.join(contest.name for contest in held)}"
            )
        held = [contest for contest in held if only is None or contest.name in only]
        jobs += [
            (isinstance(model, LabNetwork), k, place, rank, model, contest)
            for place, contest in enumerate(held)
            for rank, model in enumerate(models.values())
            if k == 0 or not isinstance(model, LabNetwork)
        ]
    jobs.sort(key=lambda job: job[:4])
    order, parts = list(models), {}
    for number, (_, k, place, rank, model, contest) in enumerate(jobs):
        parts[k, place, rank] = score(
            order[rank], predictions(model, contest, folder, order[rank], progress), contest
        )
        table = vstack([parts[key] for key in sorted(parts)], metadata_conflicts="silent")
        table.meta = {
            "archive": record.name,
            "profile": profile,
            "seed": seed,
            "stars": len(spectra),
            "device": device(),
            "remark": remark,
            "date": datetime.now(UTC).date().isoformat(),
            "versions": _versions(),
            "missing": [f"{order[job[3]]}, {job[5].name}" for job in jobs[number + 1 :]],
        }
        write_table(table, out)
    return table


def _versions():
    packages = ("numpy", "scipy", "scikit-learn", "tensorflow", "keras", "astropy")
    return {"stellar_lab": __version__, "python": platform.python_version()} | {
        package: version(package) for package in packages
    }


# %%
#| export
def recorded(
    archive: str = "clusters",  # name of its record
):  # -> QTable, or None where no run was recorded
    "The scoreboard of the full run that the package carries."
    try:
        file = data_file(f"scoreboard_{archive}.ecsv")
    except LabError:
        return None
    with file as path:
        return QTable.read(path, format="ascii.ecsv")


# %%
#| export
def leading(
    table: Table,  # from `run_scoreboard` or `recorded`
) -> Table:
    "The rows of its first contest, on its first product."
    return table[
        (table["product"] == table["product"][0]) & (table["contest"] == table["contest"][0])
    ]


# %%
old = recorded(record.name)
readable(leading(old)) if old is not None else "no full run of this archive is recorded"

# %%
#| echo: false
text = "So there is nothing to compare with here."
if old is not None:
    when = (
        f"recorded on {old.meta['date']}, {old.meta['profile']} profile, {old.meta['device']}"
        + (f" ({old.meta['remark']})" if old.meta["remark"] else "")
    )
    text = f"**Recorded, not live:** {old['contest'][0]} of {old.meta['stars']} stars, {when}; tensorflow {old.meta['versions']['tensorflow']}. RMSE with bias in brackets; a training's time is the processor's, all cores added up."
Markdown(text)


# %% [markdown]
# The same for all contests, as scaled RMSE averaged over labels and, in brackets, beside the Cannon's. `aspcapstar` are the same stars as the survey normalized them, on which the catalogue's labels were fitted too.

# %%
#| export
def contests_side_by_side(
    table: Table,  # from `judge` or `recorded`
) -> Table:  # a row a model, a column a contest and product, as text
    "Scaled RMSE averaged over labels, in brackets beside the Cannon's."
    found = averages(table)
    cells = {
        (
            row["model"],
            row["product"],
            row["contest"],
        ): f"{row['scaled_rmse']:.3f} ({row['ratio']:.2f})"
        for row in found
    }
    columns = list(dict.fromkeys(zip(found["product"], found["contest"])))
    return Table(
        [
            {"model": model}
            | {
                f"{contest} ({product})": cells.get((model, product, contest), "")
                for product, contest in columns
            }
            for model in dict.fromkeys(found["model"])
        ]
    )


# %%
contests_side_by_side(old) if old is not None else "no full run of this archive is recorded"

# %%
#| echo: false
text = "Where a full run of the clusters is recorded, what to see in it stands here."
if old is not None and record.name == "clusters":
    was = {(row["product"], row["contest"], row["model"]): row for row in averages(old)}
    ratio = lambda model, contest="five folds", product="apstar": was[product, contest, model][
        "ratio"
    ]
    hard = np.array(
        [
            [
                was["apstar", contest, name]["scaled_rmse"]
                for name in models
                if ("apstar", "clusters left out", name) in was
            ]
            for contest in ("five folds", "clusters left out")
        ]
    )
    text = (
        f"**What to see.** Over five folds the error-aware network has {ratio('error-aware network'):.2f} times the Cannon's scaled RMSE and ridge regression {ratio('ridge regression'):.2f} times. "
        f"With whole clusters left out all do worse, by {np.min(hard[1] / hard[0] - 1):.0%} to {np.max(hard[1] / hard[0] - 1):.0%}, and come closer to each other ({ratio('error-aware network', 'clusters left out'):.2f} and "
        f"{ratio('ridge regression', 'clusters left out'):.2f} times): part of what a flexible model gains in folds it learns from a star's siblings. Among the metal-rich stars alone, where there are few to learn from, they have "
        f"{ratio('error-aware network', 'metal-rich, five folds'):.2f} and {ratio('ridge regression', 'metal-rich, five folds'):.2f} times."
    )
    if old.meta["missing"]:
        text += f" (Not run yet: {'; '.join(old.meta['missing'])}.)"
Markdown(text)


# %% [markdown]
# The archives that are not at hand have a record, too, if their full run was made: real stars and synthetic ones, side by side. Their labels and stars differ, so only the order of the models can be compared.

# %%
#| export
def records() -> dict:  # archive -> QTable
    "The recorded scoreboards of all archives that have one."
    return {name: table for name in sorted(ARCHIVES) if (table := recorded(name)) is not None}


# %%
others = {name: table for name, table in records().items() if name != record.name}
pairs = [
    (model, archive, ratio)
    for archive, table in records().items()
    for model, ratio in zip(*(averages(leading(table))[key] for key in ("model", "ratio")))
]
Table(
    [
        {"model": model}
        | {
            f"{archive}, {records()[archive]['contest'][0]}": f"{ratio:.2f}"
            for name, archive, ratio in pairs
            if name == model
        }
        for model in dict.fromkeys(name for name, *_ in pairs)
        if sum(name == model for name, *_ in pairs) == len(records())
    ]
)

# %%
shown = {
    f"{archive}: {table['contest'][0]}, {table.meta['stars']} stars, recorded on {table.meta['date']}": leading(
        table
    )
    for archive, table in others.items()
}
shown |= {
    f"{archive}, against the truth": against_truth(leading(table))
    for archive, table in records().items()
    if "true_rmse" in table.colnames and np.isfinite(table["true_rmse"]).any()
}
tables = [
    "\n".join([title, *readable(table).pformat(max_lines=-1, max_width=-1)])
    for title, table in shown.items()
]
print("\n\n".join(tables) or "No other archive has a record yet.")

# %% [markdown]
# The lab's promises for the full run, on the recorded figures: error-aware at most 0.9 times the Cannon, augmented at most 1.1 times. And the record must belong to the code at hand: the Cannon and ridge regression, run again
# in the same contest, have to give it back to a hundredth. On synthetic stars the limits are 1.0 and 1.15.

# %%
if old is not None:
    best = {row["model"]: row["ratio"] for row in averages(leading(old))}
    for name, limit in {
        "error-aware network": 0.9 if record.name == "clusters" else 1.0,
        "augmented network": 1.1 if record.name == "clusters" else 1.15,
    }.items():
        print(f"{name}: {best[name]:.3f}, at most {limit}")
        assert best[name] <= limit
    fresh, _ = judge(
        {name: models[name] for name in (STANDARD, "ridge regression")},
        every[old["contest"][0]],
        kept,
        progress=False,
    )
    for line in fresh:
        before = old[
            (old["product"] == "apstar")
            & (old["contest"] == line["contest"])
            & (old["model"] == line["model"])
            & (old["label"] == line["label"])
        ]
        assert np.isclose(line["rmse"], before["rmse"][0], rtol=0.01), line

# %% [markdown]
# ## Beside the published table
# The lab published its own comparison. It stands here as data, the source of every figure being the lab's own table.

# %%
#| export
PUBLISHED = {  # label -> RMSE and bias of the Cannon, the network, the network with augmentation; the lab's own table
    "TEFF": (74.32, -11.0, 104.95, -13.8, 90.28, -5.044),
    "LOGG": (0.1543, -0.0093, 0.188, -0.0261, 0.156, -0.0187),
    "FE_H": (0.0537, -0.0061, 0.0612, 0.0035, 0.0541, -0.0038),
    "MG_FE": (0.0516, -0.0016, 0.0623, -0.0034, 0.0510, -0.0023),
    "SI_FE": (0.0558, 0.0077, 0.0650, -0.0047, 0.0404, -0.0012),
}


def published() -> QTable:  # a row for each model and label: model, label, unit, rmse, bias
    "The published table: labels against ASPCAP's on some 500 test stars, [Fe/H] > -1, data release 14."
    columns = {"Cannon": 0, "lab network": 2, "augmented network": 4}
    rows = [
        (model, label, str(LABELS[label].unit), *figures[k : k + 2])
        for model, k in columns.items()
        for label, figures in PUBLISHED.items()
    ]
    return QTable(rows=rows, names=["model", "label", "unit", "rmse", "bias"])


# %%
def beside_published(table):
    "Published and our RMSE (bias) of the labels that can stand beside each other, a row a model."
    pairs = {"TEFF": "TEFF", "LOGG": "LOGG", "FE_H": "M_H" if "M_H" in names else "FE_H"} | {
        label: label for label in ("MG_FE", "SI_FE") if label in names
    }
    theirs = {(row["model"], row["label"]): _cell(row) for row in published()}
    ours = {(row["model"], row["label"]): _cell(row) for row in table}
    return Table(
        [
            {"model": model}
            | {
                f"{kind} {name}": cells.get((model, name), "")
                for label, our in pairs.items()
                for kind, cells, name in (("published", theirs, label), ("ours", ours, our))
            }
            for model in ("Cannon", "lab network", "augmented network")
        ]
    )


rich = (
    []
    if old is None or record.name != "clusters"
    else old[(old["product"] == "apstar") & (old["contest"] == "metal-rich, five folds")]
)
closest, which = (
    (rich, f"recorded, stars with [M/H] > {METAL_RICH} in five folds among themselves")
    if len(rich)
    else (live[live["contest"] == first.name], f"live, {first.name}")
)
beside_published(closest)

# %%
#| echo: false
stars = closest["n"][0]
same = (
    "have the same names, in another catalogue"
    if "FE_H" in names
    else "are ASPCAP's of data release 10, with [M/H] in the place of [Fe/H] and nothing in the place of [Mg/Fe] and [Si/Fe]"
)
snr = np.percentile(first.spectra.stars["SNR"], [0, 50])
Markdown(
    f"Ours: {which}, {stars} stars. **What may be compared:** the order of the models inside each half, and how much one gains on the other. **What may not:** the figures themselves. The published ones are of other stars (some 500 test "
    f"stars in four fields of data release 14, [Fe/H] > -1, SNR > 50; ours have SNR {snr[0]:.0f} and more, half of them above {snr[1]:.0f}), and a catalogue's errors count in every RMSE: our labels {same}. Scaled RMSE cannot be compared at all, since each set "
    "is scaled by its own spread; so none is shown."
)

# %% [markdown]
# With the survey's own stars at hand (`STELLAR_LAB_ARCHIVE`) this notebook runs on the same fields, cuts and labels as the published table; then the figures themselves may stand beside each other.

# %%
assert (
    np.isclose(
        published()["rmse"][
            (published()["model"] == "augmented network") & (published()["label"] == "SI_FE")
        ][0],
        0.0404,
    )
    and len(published()) == 15
)
if len(rich):
    assert np.all(
        closest["rmse"][closest["model"] == STANDARD][:2] < [74.32, 0.1543]
    )  # metal-rich cluster giants are no harder than field stars


# %% [markdown]
# ## All in one picture
# Scaled RMSE of every label, live on the left, recorded on the right.

# %%
#| export
def plot_scores(
    tables: Mapping,  # title -> part of a table from `judge`, of one product and contest
):
    "Scaled RMSE against label, a marker a model, a panel a table. Returns the Figure."
    fig, axes = plt.subplots(
        1, len(tables), figsize=(5 * len(tables), 3.6), sharey=True, squeeze=False
    )
    models = list(dict.fromkeys(str(name) for table in tables.values() for name in table["model"]))
    lines = {}
    for ax, (title, table) in zip(axes[0], tables.items()):
        labels = list(dict.fromkeys(table["label"]))
        for k, (name, (color, marker)) in enumerate(zip(models, cycle(LOOKS))):
            own = table[table["model"] == name]
            at = np.array([labels.index(label) for label in own["label"]]) + 0.1 * (
                k - (len(models) - 1) / 2
            )
            (lines[name],) = ax.plot(at, own["scaled_rmse"], marker, color=color, ms=6)
        ax.set(title=title, xticks=range(len(labels)))
        ax.set_xticklabels([record.symbol for record in label_records(labels)])
    axes[0, 0].set(
        ylabel="scaled RMSE", ylim=(0, None)
    )  # after all panels are drawn: they share it
    fig.legend(lines.values(), lines, loc="outside upper center", ncols=3, frameon=False)
    return fig


# %%
panels = {f"live: {profile()} profile, {first.name}": live[live["contest"] == first.name]}
if old is not None:
    panels[f"recorded: {old.meta['profile']} profile, {old['contest'][0]}"] = leading(old)
fig = plot_scores(panels)

# %% [markdown]
# **What to see.** Within a label the models lie close together; between labels they do not: what the spectrum and the catalogue do not say, no model reads.
#
# **Which one, then?** If you want a model that explains (what does a star with these labels look like?) and says by its $\chi^2$ when a spectrum is none of its business, take the Cannon. If you want the smallest errors on stars like those
# of the training set, take the network that knows the errors. And keep ridge regression beside every network: it takes a second, and whoever does not beat it has learned a linear map the hard way.
#
# **Exercise.** Average the predictions of the Cannon and the error-aware network, star by star. Is the average better than both? What does that say about how much their errors have in common?
