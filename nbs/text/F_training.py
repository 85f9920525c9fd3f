# %% [markdown]
# # How is a model trained, and what must be kept of it?
# > One training and its record: an archive goes in, a model comes out, and with it the account of every star and every error.
#
# **Question.** A notebook is for understanding. Next year somebody wants to know how a model came about, from which stars, and how wrong it is. What has to be written down?
#
# **Idea.** A training is one function, and it leaves two files: the model, and a *record* in plain text. The record names every star and its fate, the arguments, the seed, the versions, and the tables of errors.
#
# You learn what must travel with a model so that somebody else can use it: not only its coefficients, but how its spectra were treated.

# %%
#| default_exp training

# %%
#| export
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np
from astropy.table import QTable

from stellar_lab import __version__
from stellar_lab.cannon import Cannon
from stellar_lab.clean import Ledger, MaskRule, find_files
from stellar_lab.inversion import infer
from stellar_lab.judging import cross_label, error_table, with_error_model
from stellar_lab.models import (
    Held,
    check_held,
    count_flags,
    fold_numbers,
    group_numbers,
    plain_value,
    read_model_file,
    read_regular,
    restored,
    stated_errors,
    train_test_rows,
)
from stellar_lab.mwm import mwm_training_set
from stellar_lab.normalize import continuum_steps, read_continuum_pixels, training_set
from stellar_lab.survey import (
    PRODUCTS,
    LabError,
    WrongFile,
    archive_record,
    atomic_path,
    label_records,
    safe_output,
    said_of,
)

# %%
#| hide
import matplotlib.pyplot as plt
import pytest
from astropy.table import Table

from stellar_lab.normalize import lab_continuum_pixels
from stellar_lab.survey import Spectra, archive_root, use_style


# %% [markdown]
# ## The record
# A record holds three things: the *facts* (arguments, archive, seed, versions), the *ledger* that says which star fell to which rule, and a *table of errors* for each set of stars. It is kept as
# [JSON](https://www.json.org), which every language reads and a person can, too. It holds no date and no duration: the same command gives the same record.
#
# JSON has no word for "not a number". An error that could not be computed is written as `null`.

# %%
#| export
def _plain_rows(table):
    "A table as a list of plain rows; None stands for NaN, which JSON does not have."

    def or_none(value):
        return None if isinstance(value, float) and math.isnan(value) else value

    columns = {name: map(or_none, table[name].tolist()) for name in table.colnames}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _error_rows(rows):
    "The table of errors again, from its plain rows."
    table = QTable()
    for name in rows[0]:
        table[name] = [math.nan if row[name] is None else row[name] for row in rows]
        if table[name].dtype.kind == "f":
            table[name].info.format = ".4g"
    return table


# %%
made_up = QTable({"label": ["TEFF", "M_H"], "n": [2, 0], "rmse": [61.25, math.nan]})
print(json.dumps(_plain_rows(made_up)))
assert _error_rows(_plain_rows(made_up))["rmse"].tolist()[0] == 61.25

# %% [markdown]
# To read a record is easy; to recognize a file that is none takes most of the lines below. The ledger's reasons make wide lines, so they are left out where the terminal is narrow.

# %%
#| export
_REPORT_FORMAT = 1


_LARGEST_RECORD = 1 << 28  # bytes
_RECORD = {
    "arguments": Held("facts"),
    "archive": Held("facts"),
    "model": Held("facts"),
    "notes": Held("texts"),
    "error_model": Held("facts", optional=True),
    "ledger": Held("facts"),
    "errors": Held("facts"),
}
_TEXTS = {"archive": ("root", "title"), "model": ("digest",)}  # what `describe` prints


def _is_number(value, whole=False):
    "Is this a finite number, and a whole one where it has to be?"
    if isinstance(value, bool):
        return False
    if whole:
        return isinstance(value, (int, np.integer))
    return isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)


def _check_record(plain):
    "ValueError where a record does not hold what `TrainingReport` and `describe` need."
    if "error_model" not in plain:
        raise WrongFile("it has no entry error_model")
    check_held(plain, _RECORD)
    for fact, names in _TEXTS.items():
        if not all(isinstance(plain[fact].get(name), str) for name in names):
            raise WrongFile(f"its entry {fact} lacks {' or '.join(names)}")
    for label in (plain["error_model"] or {}).values():
        if not isinstance(label, dict) or not _is_number(label.get("floor")):
            raise WrongFile("an error floor in it is no number")
    for value in plain["arguments"].values():
        parts = value if isinstance(value, list) else [value]
        if not all(part is None or isinstance(part, str | bool | int | float) for part in parts):
            raise WrongFile("its arguments are neither texts nor numbers")
    _check_steps(plain["ledger"])
    for name, rows in plain["errors"].items():
        _check_rows(name, rows)


def _check_steps(ledger):
    "ValueError for a ledger that says more, or less, than how stars fell to rules."
    steps = ledger.get("steps")
    check_held(ledger, {"found": Held("whole", low=0, high=1e15)})
    if not isinstance(steps, list):
        raise WrongFile("its ledger is none")
    stars = Held("texts")
    parts = {"rule": Held("text"), "stars": stars, "details": stars}
    parts |= {"counted": Held("whole", low=0, high=1e15), "reason": Held("any")}
    for step in steps:
        if not isinstance(step, dict) or step.keys() != parts.keys():
            raise WrongFile("a step of its ledger is none")
        check_held(step, parts)
        if not isinstance(step["reason"], str) or step["details"][len(step["stars"]) :]:
            raise WrongFile("a step of its ledger is none")
        if step["details"] and len(step["details"]) < len(step["stars"]):
            raise WrongFile("a step of its ledger is none")
    if sum(len(step["stars"]) for step in steps) > ledger["found"]:
        raise WrongFile("its ledger drops more stars than there were")


def _check_rows(name, rows):
    "ValueError for what is no table of errors."
    if not isinstance(rows, list) or not rows:
        raise WrongFile(f"its errors of the {name} are none")
    for row in rows:
        same = isinstance(row, dict) and isinstance(rows[0], dict) and row.keys() == rows[0].keys()
        if not same or not isinstance(row.get("label"), str):
            raise WrongFile(f"its errors of the {name} have other columns")
        for column, value in row.items():
            text = column in ("label", "unit")
            if not isinstance(value, str) if text else not (value is None or _is_number(value)):
                raise WrongFile(f"{column} of the {name} holds {value!r:.30}")


# %%
with pytest.raises(ValueError, match="a step of its ledger is none"):
    _check_steps({"found": 3, "steps": [{"rule": "too noisy"}]})
with pytest.raises(ValueError, match="drops more stars than there were"):
    _check_steps(Ledger(1).drop("too noisy", ["Castor"]).to_dict() | {"found": 0})
_check_steps(Ledger(3).drop("too noisy", ["Castor"]).count("seen twice", 1).to_dict())


# %%
#| export
def _record_sum(plain):
    "The checksum of what a record says; its lines may be broken in another way."
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _read_record(path):
    "What a record's file holds, as a dict; LabError for any other file."
    try:
        plain = json.loads(read_regular(path, most=_LARGEST_RECORD).decode("utf-8"))
        if not isinstance(plain, dict) or plain.get("format") != _REPORT_FORMAT:
            raise WrongFile("another format")
        if plain.pop("sha256", None) not in (None, _record_sum(plain)):
            raise WrongFile("it was changed since it was written, although it looks whole")
        del plain["format"]
        _check_record(plain)
        plain["ledger"] = Ledger.from_dict(plain["ledger"])
        plain["errors"] = {name: _error_rows(rows) for name, rows in plain["errors"].items()}
        return plain
    except FileNotFoundError as error:
        raise LabError(
            f"there is no record {path}: 'stellar-lab train' writes it with the model"
        ) from error
    except Exception as error:  # a file can hold anything
        raise LabError(
            f"{path} is not the record of a training ({said_of(error)}): train the model again"
        ) from error


def _ledger_lines(ledger, width):
    "The ledger as a table; the reasons are left out where they do not fit."
    table = ledger.table
    text = str(ledger).splitlines()
    if max(map(len, text)) > width:
        table.remove_column("reason")
        text = table.pformat(max_lines=-1, max_width=-1, align=["<", ">", ">", ">"])
    return [line.rstrip() for line in text]


# %%
scratch = tempfile.TemporaryDirectory()
here = Path(scratch.name)
ledger = Ledger(3).drop("too noisy", ["2M00000000+0000000"], reason="keep 50 < SNR")
print(*_ledger_lines(ledger, width=100), "", *_ledger_lines(ledger, width=40), sep="\n")
(here / "other.json").write_text('{"format": 1}')
with pytest.raises(LabError, match="other.json is not the record of a training"):
    _read_record(here / "other.json")


# %%
#| export
@dataclass
class TrainingReport:
    """How a model was trained and how wrong it is; `print` shows it.

    Attributes
    ----------
    facts : dict
        plain data: arguments, archive, product, stars, continuum pixels, seed, versions, notes
    ledger : Ledger
        which star fell to which rule
    errors : dict
        name of a set of stars -> its `error_table`
    model : Cannon
        as trained, with calibrated errors; None for a report that was read
    """

    facts: dict
    ledger: Ledger
    errors: dict
    model: Cannon = None

    def to_dict(self) -> dict:
        "Plain data, for JSON."
        ledger = self.ledger.to_dict() | {"dropped": self.ledger.dropped}
        errors = {name: _plain_rows(table) for name, table in self.errors.items()}
        return {"format": _REPORT_FORMAT, **self.facts, "ledger": ledger, "errors": errors}

    def save(self, path):
        "Write the record as JSON, whole or not at all."
        plain = json.loads(json.dumps(self.to_dict(), allow_nan=False))
        plain["sha256"] = _record_sum(plain)
        text = json.dumps(plain, indent=1, ensure_ascii=False)
        # bytes of a path that are no letters are spelled out, in a way that JSON reads
        data = f"{text}\n".encode(errors="backslashreplace")
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)

    @classmethod
    def load(cls, path) -> "TrainingReport":
        "Read a record that `save` wrote; LabError for any other file."
        facts = _read_record(path)
        ledger = facts.pop("ledger")
        errors = facts.pop("errors")
        return cls(facts, ledger, errors)

    def lines(self, width: int = None) -> list:
        "Ledger, tables of errors and notes as text for `width` columns, the terminal's by default."
        text = _ledger_lines(self.ledger, width or shutil.get_terminal_size().columns)
        for name, table in self.errors.items():
            text += ["", f"errors of the {name}:", *table.pformat(max_lines=-1, max_width=-1)]
        return [*text, "", *self.facts["notes"]]

    def __str__(self):
        return "\n".join(self.lines())


# %% [markdown]
# A record of a training that never was, written and read back:

# %%
facts = {"notes": ["a made-up training"], "arguments": {}, "model": {"digest": ""}}
facts |= {"archive": {"root": "stars", "title": "made-up stars"}, "error_model": None}
report = TrainingReport(facts, ledger, {"test stars": made_up})
report.save(here / "made_up.json")
again = TrainingReport.load(here / "made_up.json")
assert str(again) == str(report) and again.ledger == ledger
print(again)


# %% [markdown]
# ## Before anything slow begins
# A run of an hour must not fail at its last line because the folder for its result cannot be written. So first we look at all that can be wrong with a request: the place for the result, the labels and
# numbers, the fields.

# %%
#| exporti
def _as_path(path, what):
    "A `Path`; LabError for what is no path."
    if not isinstance(path, (str, os.PathLike)):
        raise LabError(f"{what}: give a path, not {path!r}")
    return Path(path)


def check_target(path, suffixes, what: str, inputs=(), marks=()) -> Path:
    """A file can be written at `path`, its extension is a right one, and nothing is lost by it.

    Parameters
    ----------
    path : str or Path
        the folders above it are made
    suffixes : sequence of str
        extensions to choose from, such as ``(".asdf",)``
    what : str
        goes there, for the message
    inputs : sequence of paths, default ()
        files that are read, and must not be replaced
    marks : sequence of bytes, default ()
        what a file that may be replaced holds

    Returns
    -------
    Path

    Raises
    ------
    LabError
        where the extension is another, nothing can be written there, or what stands there must not
        be replaced (see `safe_output`)
    """
    path = _as_path(path, what)
    if path.suffix.lower() not in suffixes:
        raise LabError(
            f"cannot write {what} to {path}: its extension must be {' or '.join(suffixes)}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise LabError(
            f"cannot write to {path.parent}: {error.strerror}; choose another folder"
        ) from error
    return safe_output(path, inputs, marks)


_HEAD = 1_000_000  # bytes of a model's file that name it


def _check_model_target(path):
    "LabError where a model would replace a file that is none."
    if path.exists() and path.stat().st_size:
        if b"stellar_lab_model" not in read_regular(path, first=_HEAD):
            raise LabError(
                f"cannot write the model to {path}: what stands there is no model of stellar_lab; "
                "choose another name, or remove that file"
            )


def _check_record_target(path):
    "LabError where a record would replace a file that is none; all records know their ledger."
    safe_output(path)
    if not path.exists():
        return
    try:
        plain = json.loads(read_regular(path, most=_LARGEST_RECORD).decode("utf-8"))
        known = {"format", "arguments", "ledger"} <= plain.keys()
    except Exception:  # whatever else stands there
        known = False
    if not known:
        raise LabError(
            f"cannot write the record to {path}: what stands there is no record of a training; "
            "give the model another name, or remove that file"
        )


# %%
print(check_target(here / "new" / "giants.asdf", (".asdf",), "the model").name)
with pytest.raises(LabError, match="its extension must be .asdf"):
    check_target("giants.pkl", (".asdf",), "the model")
with pytest.raises(LabError, match="is a folder, not a file"):
    check_target(here, ("",), "the model")


# %%
#| export
def _label_list(root, labels):
    "The names of the labels to learn, the archive's by default; LabError if one comes twice."
    labels = archive_record(root).labels if labels is None else labels
    if not isinstance(labels, Iterable):
        raise LabError(f"labels is {labels!r}: give a list of names, such as ['TEFF', 'M_H']")
    names = [label.name for label in label_records(labels)]
    if not names or len(set(names)) < len(names):
        raise LabError(f"labels are {', '.join(names) or 'none'}: name each once")
    return names


def _check_numbers(order, test_size, folds, seed):
    "LabError for a number that no archive can make right."
    if order is not None and (not _is_number(order, whole=True) or order < 1):
        raise LabError(f"order is {order}: it must be 1, 2, …")
    if folds is None and not (_is_number(test_size) and 0 < test_size < 1):
        raise LabError(f"test_size is {test_size}: give a share of the stars between 0 and 1")
    if folds is not None and (not _is_number(folds, whole=True) or folds < 2):
        raise LabError(f"folds is {folds}: it must be 2 at least, a whole number")
    if not _is_number(seed, whole=True) or not 0 <= seed < 2**32:
        raise LabError(f"seed is {seed}: give a whole number from 0 to {2**32 - 1}")


def _check_fields(root, product, fields):
    "LabError if a field that was asked for has no files."
    if fields is None or isinstance(fields, str) or not Path(root).is_dir():
        return
    if not isinstance(fields, Iterable):
        raise LabError(f"fields is {fields!r}: give a list of fields, or 'all'")
    products = archive_record(root).products if product is None else (product,)
    wanted = [str(name) for name in fields]
    empty = [n for n in wanted if not any(len(find_files(root, each, [n])) for each in products)]
    if not empty:
        return
    there = set()
    for each in products:
        there |= set(map(str, find_files(root, each, "all")["FOLDER"]))
    some = ", ".join(sorted(there)[:12]) or "none of any field"
    more = f" and {len(there) - 12} more" if len(there) > 12 else ""
    raise LabError(
        f"no {' or '.join(products)} files of field {', '.join(empty)} below {root}: "
        f"it has {some}{more}"
    )


# %%
print(_label_list(archive_root(), ["teff", "M_H"]))
with pytest.raises(LabError, match="labels are TEFF, TEFF: name each once"):
    _label_list(archive_root(), ["teff", "TEFF"])


# %% [markdown]
# Own continuum pixels and a row make sense for raw spectra only. An aspcapStar file is normalized already, and it holds one spectrum.

# %%
#| export
def _check_treatment(product, pixels, row):
    "LabError for a wish that spectra of this product cannot meet."
    if product is not None and product not in list(PRODUCTS):
        raise LabError(f"unknown product {product!r}: choose from {', '.join(PRODUCTS)}")
    if product is None or not PRODUCTS[product].normalized:
        return
    if pixels is not None:
        raise LabError(
            f"{product} spectra are normalized already, continuum pixels change nothing: "
            "leave them out, or choose product apstar"
        )
    if row is not None:
        raise LabError(
            f"an {product} file holds one spectrum, and no rows: leave the row out, "
            "or choose product apstar"
        )


def _chosen_pixels(continuum_pixels):
    "Flags of the continuum pixels (None: the original lab's), and where they come from."
    if continuum_pixels is None:
        return None, "the original lab's list"
    if isinstance(continuum_pixels, np.ndarray):
        return continuum_pixels, "an array"
    if not isinstance(continuum_pixels, (str, os.PathLike)):
        raise LabError(
            f"continuum_pixels is a {type(continuum_pixels).__name__}: give an array of flags, or "
            "the path of a file"
        )
    return read_continuum_pixels(continuum_pixels), Path(continuum_pixels).name


def _check_terms(n_stars, n_labels, order):
    "LabError if there are more coefficients per pixel than stars to determine them."
    terms = math.comb(n_labels + order, order)
    if terms > n_stars:
        raise LabError(
            f"{n_stars} stars cannot determine {terms} terms (order {order} in {n_labels} "
            "labels): take more stars, a lower order or fewer labels"
        )


# %%
wishes = {
    "folds": lambda: _check_numbers(order=2, test_size=None, folds=1, seed=42),
    "fields": lambda: _check_fields(archive_root(), None, ["Orion"]),
    "row": lambda: _check_treatment("aspcapstar", None, row=0),
    "terms": lambda: _check_terms(20, n_labels=6, order=2),
}
for check in wishes.values():
    with pytest.raises(LabError) as problem:
        check()
    print(str(problem.value).replace(str(archive_root()), "<archive>"))


# %% [markdown]
# ## Judge
# Judging comes in two ways. With a *test share* the model learns from the rest and is judged on the share, as in the original lab. In *folds* every star is left out once by a model that learned from the others;
# the model that is kept learns from all. A star that was observed in two fields has two rows, and both lie in the same fold: else the model would be asked about a star that it knows.
#
# Either way the left-out stars teach [the error model](07_judging.ipynb).

# %%
#| export
def _split(n, test_size, seed):
    "Rows to learn from and rows to leave out; LabError where there are too few stars."
    try:
        return train_test_rows(n, test_size, seed)
    except ValueError as error:
        raise LabError(
            f"{n} stars cannot be split with a test size of {test_size} ({error})"
        ) from error


def _judge(model, spectra, test_size, folds, seed, progress, prepare=None):
    """The fitted model, and the answers it is judged by.

    A dict: name of a set -> (rows, table of `infer`); the set of left-out stars comes last.
    """
    everyone = np.arange(len(spectra))
    if folds is not None:
        numbers = fold_numbers(len(spectra), folds, seed, stars=spectra.stars["APOGEE_ID"])
        left_out = cross_label(model, spectra, numbers, progress, prepare)
        model.fit(spectra if prepare is None else prepare(spectra))
        return model, {
            "training stars": (everyone, infer(model, spectra)),
            f"stars left out in {folds} folds": (everyone, left_out),
        }
    learned, kept = _split(len(spectra), test_size, seed)
    training = spectra[learned]
    model.fit(training if prepare is None else prepare(training))
    return model, {
        "training stars": (learned, infer(model, spectra[learned])),
        "test stars": (kept, infer(model, spectra[kept])),
    }


# %% [markdown]
# Two tables of labels are worth a few sentences. How many left-out stars carry a flag? Of what kind are the errors of new labels? And is there a label that the model does not know at all? That is so where its RMSE
# exceeds the label's spread: then the mean of all training stars would be the better answer. An error can be calibrated and the label useless all the same.

# %%
#| export
def _flag_note(kind, table):
    "How many stars of a set carry a flag, and which."
    counts = count_flags(table["flags"])
    which = ", ".join(f"{count} {name}" for name, count in counts.items())
    flagged = np.count_nonzero(table["flags"])
    return f"{kind} with a flag: {flagged} of {len(table)}{f' ({which})' if which else ''}"


def _useless_notes(errors):
    "A sentence for each label of which the model knows less than the mean does."
    return [
        f"{row['label']} says nothing: its RMSE is {row['scaled_rmse']:.2g} times the spread of "
        "the label, the mean of the training stars would be nearer. Do not use it"
        for row in errors
        if row["scaled_rmse"] > 1
    ]


def _formal_words(model):
    "What formal errors of a model are worth."
    if hasattr(model, "vectorizer_"):
        return "formal, photon noise alone and much too small"
    return "formal, as the model states them, not compared with stars left out"


def _stated_errors(spectra, names):
    "The errors (N, K) that the catalogue states; None where it states none for a label."
    stated = stated_errors(spectra, names)
    known = stated is not None and np.all((np.isfinite(stated) & (stated > 0)).any(axis=0))
    return stated if known else None


def _calibrated(model, kind, table, truth, stated=None, by_label=True):
    "The model with calibrated errors if the left-out stars are enough, and a sentence about them."
    try:
        calibrated = with_error_model(model, table, truth, stated, by_label)
    except LabError as error:
        note = f"the errors of new labels are {_formal_words(model)}"
        return model, f"{note}: {error}"
    note = "the errors of new labels are calibrated: inflated to fit"
    return calibrated, f"{note} the {len(table)} {kind}"


# %% [markdown]
# Look at it on real stars, with two labels, in three folds:

# %%
spectra, ledger = training_set(archive_root(), labels=["TEFF", "M_H"], progress=False)
two = Cannon(order=1, labels=["TEFF", "M_H"])
model, sets = _judge(two, spectra, test_size=None, folds=3, seed=42, progress=False)
kind, (rows, table) = list(sets.items())[-1]
truth = spectra[rows].labels(["TEFF", "M_H"])
errors = error_table(table, truth, ["TEFF", "M_H"], model.scales_)
model, note = _calibrated(model, kind, table, truth)
print(_flag_note(kind, table), note, sep="\n")
assert model.errors_ == "calibrated" and not _useless_notes(errors)
errors

# %%
stars = np.array(spectra.stars["APOGEE_ID"], dtype=str)
numbers = fold_numbers(len(stars), 3, 42, stars=stars)
twice = {star for star in stars if np.sum(stars == star) > 1}
assert all(len(set(numbers[stars == star])) == 1 for star in twice)
answers = table.copy()
answers["teff"] = np.roll(answers["teff"], 1)  # everybody gets a stranger's temperature
wrong = error_table(answers, truth, ["TEFF", "M_H"], model.scales_)
print(*_useless_notes(wrong))
assert len(_useless_notes(wrong)) == 1


# %% [markdown]
# ## The facts
# New spectra must be treated as the training spectra were: another product or another list of continuum pixels shifts the labels by more than their errors
# ([the chapter on the continuum](03_normalize.ipynb) measures it). So the model carries this recipe in its own file, [and `as_trained` follows it](03_normalize.ipynb). The record names it once more, for the reader.

# %%
#| export
def _plain(value):
    "A value as JSON takes it."
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(part) for part in value]
    return plain_value(value)


def _versions():
    "Of what computed the model."
    packages = ("numpy", "scipy", "scikit-learn", "astropy")
    return {
        "stellar_lab": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: version(name) for name in packages},
    }


def _continuum_facts(meta):
    "Source and numbers of the continuum pixels; None where the survey normalized."
    steps = continuum_steps(meta)
    if not steps:
        return None
    return {"source": meta.get("continuum_source", "unknown"), "pixels": steps[-1]["pixels"]}


def _model_facts(model, path):
    "What the record says of the model itself."
    return {
        "file": None if path is None else path.name,
        "digest": model.training_digest_,
        "class": type(model).__name__,
        "labels": list(model.label_names_),
        **_learned_facts(model),
        "pixels": int(model.usable_.sum()),
    }


def _learned_facts(model):
    "What only some kinds of models have learned."
    facts = {}
    if hasattr(model, "vectorizer_"):
        facts["terms"] = model.vectorizer_.terms
    if hasattr(model, "scatter_"):
        facts["scatter_median"] = float(np.nanmedian(model.scatter_))
    if hasattr(model, "hidden_"):
        facts["hidden"] = len(model.hidden_)
    if hasattr(model, "directions_"):
        facts["latents"] = len(model.directions_)
    return facts


def _error_facts(model):
    "Inflation and floor of each label, and the catalogue's noise; None for formal errors."
    if model.errors_ != "calibrated":
        return None
    noise = getattr(model, "catalogue_noise_", np.zeros(len(model.label_names_)))
    found = zip(model.label_names_, model.error_inflation_, np.sqrt(model.error_floor_), noise)
    facts = {}
    for name, inflation, floor, variance in found:
        facts[name] = {"inflation": float(inflation), "floor": float(floor)}
        if hasattr(model, "catalogue_noise_"):
            facts[name]["catalogue_noise"] = float(np.sqrt(variance))
    for name, slopes in zip(model.label_names_, getattr(model, "error_slopes_", ())):
        facts[name]["slopes"] = dict(zip(model.label_names_, map(float, slopes)))
    return facts


# %%
facts = _model_facts(model, None)
print(facts["terms"], _error_facts(model))
pixels = _continuum_facts(spectra.stars.meta)["pixels"]
assert pixels == np.flatnonzero(lab_continuum_pixels()).tolist()
assert json.dumps(_plain({"a": 1}["a"])) == "1" and _plain((np.float32(2), "x")) == [2.0, "x"]

# %% [markdown]
# ## Train, step by step
# All pieces are there, and a training is four steps: *select* the stars, *fit and judge* the model, *report* what came out, *write* it down. First the request is checked, and put as the record keeps it.

# %%
#| export
_KINDS = {
    "cannon": "Cannon",
    "hidden": "HiddenCannon",
    "ridge": "RidgeLabels",
    "latents": "LatentLabels",
}  # name of a kind of model -> its class
_ROOMS = {
    "Cannon": "cannon",
    "HiddenCannon": "hidden",
    "RidgeLabels": "readers",
    "LatentLabels": "latents",
    "PhysicsModel": "physics",
    "Refusal": "refusal",
}  # class -> the module that it lives in


def _class(name):
    "The class of a model by its name; imported only now."
    return getattr(import_module(f"stellar_lab.{_ROOMS[name]}"), name)


def _model_of_kind(request):
    "An untrained model, as asked for."
    kind = request["kind"]
    order = request["order"]
    scatter = request["scatter"]
    options = {"labels": request["labels"]}
    if kind in ("cannon", "hidden"):
        options["order"] = order
    elif order is not None:
        raise LabError(f"a model of kind {kind} has no polynomial: leave the order out")
    if kind == "cannon":
        options["scatter"] = scatter
    elif scatter:
        raise LabError(f"a model of kind {kind} is fitted without that option: leave scatter out")
    return _class(_KINDS[kind])(**options)


_BEST = "latents"  # of these kinds the scoreboard shows it best in every contest


def _kind_and_order(kind, order, scatter):
    """The kind of model and the order of its polynomial, None where it has none.

    By default the best kind; who gives an order or a scatter means the Cannon, which has them."""
    if kind is None:
        kind = "cannon" if scatter or order is not None else _BEST
    if kind not in _KINDS:
        raise LabError(f"unknown kind {kind!r} of model: choose from {', '.join(_KINDS)}")
    if order is None and kind in ("cannon", "hidden"):
        order = 2
    return kind, order


def _request(
    root,
    labels,
    fields,
    product,
    row,
    order,
    scatter,
    test_size,
    folds,
    seed,
    kind=None,
    groups=None,
    refusal=True,
    gaps=False,
    mask=None,
):
    "What was asked for, checked, as the record keeps it."
    kind, order = _kind_and_order(kind, order, scatter)
    _check_numbers(order, test_size, folds, seed)
    return {
        "kind": kind,
        "labels": _label_list(root, labels),
        "fields": fields,
        "product": product,
        "continuum_pixels": None,
        "row": row,
        "order": order,
        "scatter": scatter,
        "test_size": test_size if folds is None else None,
        "folds": folds,
        "seed": seed,
        "groups": groups,
        "refusal": refusal,
        "gaps": gaps,
        "mask": None if mask is None else str(MaskRule.parse(mask)),
    }


# %%
numbers = {"order": 1, "scatter": False, "test_size": 0.33, "folds": 3, "seed": 42}
numbers["refusal"] = False  # a guard takes longest, and comes below
request = _request(archive_root(), ["teff", "m_h"], None, None, None, **numbers)
print(request)
assert request["labels"] == ["TEFF", "M_H"] and request["test_size"] is None


# %% [markdown]
# Then the stars are read.

# %%
#| export
def _check_numbered(request):
    "LabError for a wish that SDSS-V's files cannot meet."
    for name, why in (("fields", "has no fields"), ("row", "files have no rows")):
        if request[name] not in (None, "all"):
            raise LabError(f"SDSS-V {why}: leave --{name} out")
    if request["product"] not in (None, "mwmstar"):
        raise LabError(f"SDSS-V has no product {request['product']!r}: leave it out")


def _select(root, request, pixels, progress):
    "The stars to learn from, and their ledger, if nothing is wrong with the request."
    product = request["product"]
    row = request["row"]
    if archive_record(root).rules.numbered:
        _check_numbered(request)
        names = request["labels"]
        wish = (root, names, pixels, progress)
        spectra, ledger = mwm_training_set(*wish, mask=request["mask"], gaps=request["gaps"])
    else:
        _check_treatment(product, pixels, row)
        _check_fields(root, product, request["fields"])
        wish = (root, product, request["fields"], request["labels"], pixels, progress, row)
        spectra, ledger = training_set(*wish, request["gaps"], request["mask"])
        _check_treatment(spectra.stars.meta["product"], pixels, row)
    if request["kind"] in ("cannon", "hidden"):
        _check_terms(len(spectra), len(request["labels"]), request["order"])
    return spectra, ledger


# %%
spectra, ledger = _select(archive_root(), request, pixels=None, progress=False)
print(f"{ledger.left} of {len(ledger.dropped) + ledger.left} stars are left")
assert len(spectra) == ledger.left

# %% [markdown]
# Random folds ask: how wrong is the model for one more star of this kind? A new cluster is another question. Its stars share an age, a composition and a place on the sky, and none of their siblings was in training.
# So `groups` names a column, such as the field, and all stars of a group are left out together. Errors that are calibrated on these stars are larger, and hold where random folds promise too much.

# %%
#| export
_MOST_GROUPS = 8  # fits; more groups than that are left out several at a time


def _group_numbers(spectra, column):
    "Number (N,) of the set in which each star's group is left out; LabError for a useless column."
    if column not in spectra.stars.colnames:
        known = ", ".join(spectra.stars.colnames)
        raise LabError(f"the stars have no column {column!r} to group them by: choose from {known}")
    return group_numbers(spectra.stars[column], _MOST_GROUPS, column)


def _judge_groups(model, spectra, column, progress, prepare=None):
    "A set for `_judge`: each star, labelled by a model that has not seen its group."
    numbers = _group_numbers(spectra, column)
    table = cross_label(model, spectra, numbers, progress, prepare)
    return {f"stars whose {column} was left out": (np.arange(len(spectra)), table)}


# %%
print(np.bincount(_group_numbers(spectra, "FIELD")), "stars are left out together")
with pytest.raises(LabError, match="no column 'CLUSTER' to group them by"):
    _group_numbers(spectra, "CLUSTER")

# %% [markdown]
# Last comes [the guard](18_refusal.ipynb), which flags spectra that are of no such star. The light of another star that may be mixed in comes from [synthetic dwarfs](B_emulator.ipynb): a cool one, a warm one that turns
# fast, and the mean of four.

# %%
#| exporti
_DWARFS = {  # name -> (TEFF, LOGG) of synthetic dwarfs whose mean it is, and their rotation [km/s]
    "cool dwarf": ([(4200, 4.7)], 5.0),
    "fast dwarf": ([(4700, 4.6)], 30.0),
    "dwarfs": ([(4500, 4.65), (5000, 4.58), (5500, 4.5), (6000, 4.35)], 10.0),
}
_LEAST_GUARDED = 60  # training stars of a guard


def dwarf_lights(wavelength) -> dict:
    """Spectra of dwarfs whose light may be mixed into a giant's.

    Parameters
    ----------
    wavelength : (P,) array
        Angstrom, vacuum

    Returns
    -------
    dict
        name -> (P,) flux relative to the continuum; empty where the emulator does not reach
    """
    emulator = import_module("stellar_lab.emulator").Emulator.load(domain="dwarfs")
    lights = {}
    for name, (stars, vsini) in _DWARFS.items():
        labels = np.array([[teff, logg, 0, 0, 0, 0, 0, 0, 1.1] for teff, logg in stars])
        try:
            lights[name] = emulator(labels, np.asarray(wavelength), vsini=vsini).mean(axis=0)
        except LabError:  # wavelengths that no synthetic star was computed for
            return {}
    return lights


def _guarded(model, spectra, order):
    "The model with a guard that knows its training stars, and a sentence about it."
    if len(spectra) < _LEAST_GUARDED:
        note = f"no guard: {len(spectra)} training stars are too few, {_LEAST_GUARDED} are needed"
        return model, note
    names = list(model.label_names_)
    enough = math.comb(len(names) + 2, 2) <= len(spectra) // 2
    guard = _class("Refusal")(order=min(order, 2) if enough else 1, labels=names)
    model.refusal_ = guard.fit(spectra, lights=dwarf_lights(spectra.wavelength))
    return model, "a guard flags spectra that no star like the training stars explains"


# %%
lights = dwarf_lights(spectra.wavelength)
use_style()
fig, ax = plt.subplots(figsize=(7, 2.6))
window = (spectra.wavelength > 16_000) & (spectra.wavelength < 16_100)
for name, flux in lights.items():
    ax.plot(spectra.wavelength[window], flux[window], label=name)
ax.set(xlabel="vacuum wavelength [Å]", ylabel="flux / continuum")
ax.set_title("Light that may be mixed in", loc="left")
ax.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
assert dwarf_lights(np.array([5000.0])) == {}


# %% [markdown]
# **What to see.** The three agree in their lines and differ in depth and breadth.
#
# `_judge` above has fitted a model and asked it. Here its answers become errors, and everything else that the record keeps.

# %%
#| export
def _facts(model, spectra, arguments, root, path):
    "What a record holds apart from ledger, errors, stars and notes: plain data."
    record = archive_record(root)
    meta = spectra.stars.meta
    archive = {"root": str(root), "name": record.name, "title": record.title}
    archive |= {"catalogue_sha256": meta.get("catalogue_sha256", "")}
    return {
        "arguments": {name: _plain(value) for name, value in arguments.items()},
        "archive": archive | {"release": meta["release"]},
        "product": meta["product"],
        "seed": arguments["seed"],
        "model": _model_facts(model, path),
        "continuum_pixels": _continuum_facts(meta),
        "error_model": _error_facts(model),
        "versions": _versions(),
    }


def _report(model, spectra, ledger, sets, arguments, root, path):
    "The record of a training, with the model in it."
    names = list(model.label_names_)
    truth = {name: spectra[rows].labels(names) for name, (rows, _) in sets.items()}
    errors = {
        name: error_table(table, truth[name], names, model.scales_)
        for name, (_, table) in sets.items()
    }
    kind = list(sets)[-1]
    rows, table = sets[kind]
    # with left-out groups, slopes would be of the groups, and of few groups nobody can tell the
    # catalogue's noise from the model's error
    alike = arguments.get("groups") is None
    stated = _stated_errors(spectra[rows], names) if alike else None
    model, error_note = _calibrated(model, kind, table, truth[kind], stated, alike)
    facts = _facts(model, spectra, arguments, root, path)
    ids = [str(name) for name in spectra.stars["APOGEE_ID"]]
    facts["stars"] = {name: [ids[row] for row in rows] for name, (rows, _) in sets.items()}
    facts["flagged"] = count_flags(table["flags"])
    facts["notes"] = [_flag_note(kind, table), error_note, *_useless_notes(errors[kind])]
    if hasattr(model, "catalogue_noise_"):
        facts["notes"].insert(2, "they are about true labels: the catalogue's noise is taken off")
    return TrainingReport(facts, ledger, errors, model)


# %%
small = _report(model, spectra, ledger, sets, request, archive_root(), None)
print(*small.facts, sep=", ")
assert small.model.errors_ == "calibrated" and small.facts["flagged"] == count_flags(table["flags"])


# %% [markdown]
# The last step writes both files, the model and next to it its record. Then the four steps in a row are a training.

# %%
#| exporti
def _write(report, path):
    """The model to `path`, and its record to the same name with .json: both or neither.

    Nothing is written where path is None."""
    if path is None:
        return
    record = path.with_suffix(".json")
    _check_record_target(record)
    before = record.read_bytes() if record.exists() else None
    try:
        with atomic_path(path) as temporary:
            report.model.save(temporary)
            report.save(record)  # first: there is no model without a record
    except BaseException:
        if before is None:
            record.unlink(missing_ok=True)
        else:
            record.write_bytes(before)
        raise


_WILD_FLUX = 1e4  # times the continuum: no star, and no line, is as bright
_WILD_RATIO = 1e6  # signal to noise in a pixel: no detector counts as many photons


def believable(spectra) -> tuple:
    """Spectra without the pixels that no star and no detector could have made.

    Parameters
    ----------
    spectra : Spectra
        relative to the continuum

    Returns
    -------
    spectra : Spectra
        the same where there is nothing to doubt; otherwise these pixels have no weight
    wild : (N,) int array
        how many pixels of each star
    """
    with np.errstate(over="ignore", invalid="ignore"):
        size = np.abs(spectra.flux)
        wild = ~(size <= _WILD_FLUX) | (size * np.sqrt(spectra.ivar) > _WILD_RATIO)
    wild &= spectra.ivar > 0
    counts = wild.sum(axis=1)
    if not counts.any():
        return spectra, counts
    flux = np.where(wild, 0, spectra.flux).astype(spectra.flux.dtype)
    return spectra.replace(flux=flux, ivar=np.where(wild, 0, spectra.ivar)), counts


def _believable_note(spectra, wild):
    "A sentence about stars with pixels that were not believed."
    if not wild.any():
        return []
    names = [str(name) for name in spectra.stars["APOGEE_ID"][wild > 0]]
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [
        f"{wild.sum()} pixels of {len(names)} stars ({some}) hold a flux or an error that no star "
        "has: they count as unusable"
    ]


# %%
broken = Spectra(
    np.arange(3.0),
    np.array([[1, 0.9, 1], [1, 1e36, 1]], "f4"),
    np.array([[1e4, 1e24, 1e4], [1e4, 1e4, 1e4]], "f4"),
    Table({"APOGEE_ID": ["Castor", "Pollux"]}),
)
sober, wild = believable(broken)
print(*_believable_note(broken, wild))
assert (sober.ivar > 0).sum(axis=1).tolist() == [2, 2] and believable(sober)[0] is sober


# %% [markdown]
# With `gaps` stars may take part that lack some labels. [Latents](17_latents.ipynb) learn from them as they are. All other models learn from labels that [the spectra themselves complete](26_gaps.ipynb), anew in each fold, so that no
# star that is left out has a say.

# %%
#| export
def _filler(request):
    "What completes the labels of training stars; None where nothing is to be done."
    if not request["gaps"] or request["kind"] == "latents":
        return None
    return partial(import_module("stellar_lab.gaps").complete_labels, labels=request["labels"])


def _as_learned(model, spectra):
    "The training stars with the labels that the model learned from, no gaps in them."
    if np.isfinite(spectra.labels(model.label_names_)).all():
        return spectra
    stars = spectra.stars.copy()
    for name, values in zip(model.label_names_, model.training_labels_.T):
        stars[name] = values
    return spectra.replace(stars=stars)


# %%
#| export
def _train(root, path, request, continuum_pixels, progress):
    "Select, fit and judge, report, write."
    pixels, source = _chosen_pixels(continuum_pixels)
    if pixels is not None:
        request["continuum_pixels"] = source
    if path is not None:
        path = check_target(path, (".asdf",), "the model")
        _check_model_target(path)
        _check_record_target(path.with_suffix(".json"))
    spectra, ledger = _select(root, request, pixels, progress)
    spectra, wild = believable(spectra)
    spectra.stars.meta["continuum_source"] = source.encode(errors="backslashreplace").decode()
    model = _model_of_kind(request)
    way = (request["test_size"], request["folds"], request["seed"])
    if request["groups"] is not None:
        _group_numbers(spectra, request["groups"])  # before any long work
    prepare = _filler(request)
    model, sets = _judge(model, spectra, *way, progress, prepare)
    if request["groups"] is not None:
        sets |= _judge_groups(model, spectra, request["groups"], progress, prepare)
    report = _report(model, spectra, ledger, sets, request, root, path)
    if request["refusal"]:
        learned = _as_learned(model, spectra[next(iter(sets.values()))[0]])
        report.model, note = _guarded(report.model, learned, request["order"] or 2)
        report.facts["notes"].append(note)
    report.facts["notes"] += _believable_note(spectra, wild)
    _write(report, path)
    return report


# %%
small = _train(archive_root(), here / "small.asdf", request, None, progress=False)
print(*small.facts["notes"], sep="\n")
print(*sorted(file.name for file in here.glob("small.*")))


# %% [markdown]
# The one function for it all:

# %%
#| export
def train(
    root,
    path=None,
    labels=None,
    fields=None,
    product: str = None,
    continuum_pixels=None,
    order: int = None,
    scatter: bool = False,
    test_size: float = 0.33,
    folds: int = None,
    seed: int = 42,
    progress: bool = True,
    row: int = None,
    kind: str = None,
    groups: str = None,
    refusal: bool = True,
    gaps: bool = False,
    mask: str = None,
) -> TrainingReport:
    """Train a model on an archive, judge it on stars left out, and keep both.

    Parameters
    ----------
    root : str or Path
        of the archive
    path : str or Path, optional
        .asdf file for the model, its record beside it as .json; nothing is written by default
    labels, fields : sequence of str, optional
        labels in any case, fields or "all"; the archive's by default
    product : {"apstar", "aspcapstar"}, optional
        the archive's first that has files by default
    continuum_pixels : (P,) bool array or path, optional
        flags, or a file for `read_continuum_pixels`; the 529 of the original lab by default
    order : int, optional
        of a Cannon's polynomial in the labels, by default 2
    scatter : bool, default False
        fit an intrinsic scatter per pixel
    test_size : float, default 0.33
        share of the stars left out for testing, unless `folds`
    folds : int, optional
        leave out every star once, in so many folds
    seed : int, default 42
        of the split or the folds
    progress : bool, default True
        show bars
    row : int, optional
        of apStar files: 0 and 1 are the combinations, the visits follow; the release's by default
    kind : {"cannon", "hidden", "ridge", "latents"}, optional
        which model: the Cannon of the original lab, one with hidden labels, ridge regression, or a
        Gaussian process on latents; order and scatter are the Cannon's (order the hidden's, too).
        By default the process on latents, which the scoreboard shows best; the Cannon where an
        order or a scatter is given
    groups : str, optional
        a column of the stars, such as FIELD: errors are calibrated on stars whose whole group was
        left out, and hold for groups that are new
    refusal : bool, default True
        learn a guard, too, that flags spectra which no star like the training stars explains
    gaps : bool, default False
        let stars take part that lack some of the labels: `LatentLabels` learn from what is there,
        the other models from labels completed by `complete_labels`
    mask : str, optional
        rule for flagged pixels of raw spectra, as for `MaskRule.parse`: strict, gentle, a release,
        or kill=… raise=…; by default every flag kills

    Returns
    -------
    TrainingReport
        its ``model`` is trained, with calibrated errors where the left-out stars are enough

    Raises
    ------
    LabError
        for what the user can mend

    Examples
    --------
    >>> from stellar_lab import train
    >>> report = train("stars", "giants.asdf", scatter=True)  # doctest: +SKIP
    >>> print(report)  # doctest: +SKIP
    """
    _as_path(root, "the root of an archive")
    wish = (labels, fields, product, row, order, scatter, test_size, folds, seed, kind)
    wish += (groups, refusal, gaps, mask)
    request = _request(root, *wish)
    return _train(root, path, request, continuum_pixels, progress)


# %%
three = archive_record(archive_root()).labels[:3]
report = train(archive_root(), here / "giants.asdf", three, scatter=True, progress=False)
print(report)

# %% [markdown]
# Another kind of model comes by its name, with the same judgement, errors and record. What it has no use for is refused.

# %%
ridge = train(
    archive_root(),
    here / "ridge.asdf",
    ["teff", "m_h"],
    kind="ridge",
    refusal=False,
    progress=False,
)
print(ridge.facts["model"]["class"], "-", ridge.facts["notes"][1])
assert ridge.facts["arguments"]["kind"] == "ridge" and ridge.model.errors_ == "calibrated"
with pytest.raises(LabError, match="has no polynomial"):
    train(archive_root(), kind="ridge", order=3, progress=False)
with pytest.raises(LabError, match="choose from cannon, hidden, ridge, latents"):
    train(archive_root(), kind="best", progress=False)

# %% [markdown]
# The record that was written is the record that was printed, and no star is in both sets.

# %%
again = TrainingReport.load(here / "giants.json")
assert again.to_dict() == report.to_dict() and again.model is None
sets = report.facts["stars"]
assert len(sets["training stars"]) + len(sets["test stars"]) == report.ledger.left
assert report.facts["error_model"] and "errors of new labels are calibrated" in str(report)
assert report.model.errors_ == "calibrated"

# %% [markdown]
# ## A model from its file
# A file says what kind of model it holds. Each kind is at home in a room of its own, and only that room is opened: a Cannon's file needs no TensorFlow.

# %%
#| export


def load_model(path):
    """Read a model of any kind.

    Parameters
    ----------
    path : str or Path
        .asdf file of a Cannon, a ridge regression or a physics model; .keras file of a network,
        whose import takes ten seconds

    Returns
    -------
    LabelModel
        ready for `infer`

    Raises
    ------
    LabError
        where there is no model of this version in the file

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from stellar_lab import RidgeLabels, load_model
    >>> from stellar_lab.archives import real_stars
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "ridge.asdf"
    ...     RidgeLabels(labels=["TEFF"]).fit(real_stars()[:50]).save(path)
    ...     type(load_model(path)).__name__
    'RidgeLabels'
    """
    if _as_path(path, "the file of a model").suffix.lower() == ".keras":
        return import_module("stellar_lab.network").Network.load(path)
    tree = read_model_file(path)
    kind = tree["stellar_lab_model"]
    if kind not in _ROOMS:
        raise LabError(f"{path} holds a {kind}, which this version does not know")
    return restored(_class(kind), tree)


def _versions_of(path):
    "What a model's file says it was computed with."
    if Path(path).suffix.lower() == ".keras":
        return import_module("stellar_lab.network").network_facts(path)["versions"]
    return read_model_file(path)["versions"]


# %%
model = load_model(here / "giants.asdf")
print(type(model).__name__, model.label_names_, _versions_of(here / "giants.asdf"))
assert np.array_equal(model.theta_, report.model.theta_, equal_nan=True)
with pytest.raises(LabError, match="giants.json is not a model of stellar_lab"):
    load_model(here / "giants.json")

# %% [markdown]
# ## What is this file?
# A year later somebody finds `giants.asdf`. Its own file says what the model is; the record with the same name says how well it did. If the two are not from the same training, `describe` says so.

# %%
#| export
_NAME_WIDTH = 15  # columns for the names on the left


def _paragraphs(pairs):
    "Names on the left, texts on the right, wrapped to 100 columns or the terminal."
    width = min(shutil.get_terminal_size().columns, 100)
    wrapper = textwrap.TextWrapper(
        width,
        subsequent_indent=" " * _NAME_WIDTH,
        break_long_words=False,
        break_on_hyphens=False,
    )
    lines = []
    for name, text in pairs:
        wrapper.initial_indent = f"  {name}".ljust(_NAME_WIDTH)
        lines += wrapper.wrap(text)
    return lines


def _inside(model):
    "What a model is made of: pairs of name and text, as far as its kind is known here."
    if hasattr(model, "vectorizer_"):
        terms = model.vectorizer_.terms
        scatter = f"{np.nanmedian(model.scatter_):.4f} in the median pixel"
        hidden = getattr(model, "hidden_", ())
        return [
            ("terms", f"{len(terms)}: {', '.join(terms)}"),
            *([("hidden labels", str(len(hidden)))] if len(hidden) else []),
            ("scatter", scatter if model.scatter else "none fitted"),
        ]
    if hasattr(model, "directions_"):
        return [("latents", f"{len(model.directions_)} numbers describe a spectrum")]
    if hasattr(model, "net_"):
        last = [f"{name} {kept[-1]:.4g}" for name, kept in model.history_.items() if kept]
        epochs = len(model.history_["loss"])
        return [
            ("weights", f"{model.net_.count_params():,}"),
            ("training", f"{epochs} epochs, at the end {', '.join(last)}"),
        ]
    if hasattr(model, "alpha_"):
        return [("penalty", f"{model.alpha_:.3g} on the squared weights")]
    return []


# %%
print(*_paragraphs(_inside(model)), sep="\n")


# %%
#| export
def _errors_text(model):
    "Of what kind a model's errors are."
    if model.errors_ != "formal":
        return model.errors_
    if hasattr(model, "vectorizer_"):
        return "formal: photon noise alone, much too small"
    return "formal: as the model states them, not compared with left-out stars"


def _origin(model):
    "The stars that a model learned from."
    meta = model.metadata_
    stars = getattr(model, "training_labels_", ())
    parts = [f"{len(stars)} stars", meta.get("product") or "of unknown product"]
    parts += [f"archive {meta['archive']}"] if meta.get("archive") else []
    parts += [f"release {meta['release'].upper()}"] if meta.get("release") else []
    parts += [f"row {meta['row']}"] if meta.get("row") is not None else []
    continuum = _continuum_facts(meta)
    if continuum:
        parts.append(f"{len(continuum['pixels'])} continuum pixels ({continuum['source']})")
    return ", ".join(parts)


def _ranges(model):
    "Each label with its range among the training stars."
    stars = getattr(model, "training_labels_", None)
    if stars is None:
        return ", ".join(model.label_names_)
    ranges = zip(model.label_names_, stars.min(axis=0), stars.max(axis=0))
    return ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, low, high in ranges)


def _model_lines(model, versions):
    "What a model's own file says of it."
    pixels = f"{model.usable_.sum()} of {len(model.usable_)}"
    grid = model.wavelength_
    if grid is not None:
        pixels += f" from {grid[0]:.2f} to {grid[-1]:.2f} Angstrom"
    pairs = [
        ("labels", _ranges(model)),
        *_inside(model),
        ("trained on", _origin(model)),
        ("pixels", pixels),
        ("errors", _errors_text(model)),
        ("digest", model.training_digest_[:16]),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
    ]
    return _paragraphs(pairs)


# %%
print(*_model_lines(model, {"stellar_lab": "0.1"})[-6:], sep="\n")


# %%
#| export
def _training_lines(facts):
    "What a record says of the request."
    asked = []
    for name, value in facts["arguments"].items():
        if value is not None:
            said = " ".join(map(str, value)) if isinstance(value, list) else value
            asked.append(f"{name} {said}")
    pairs = [
        ("archive", f"{facts['archive']['root']}: {facts['archive']['title']}"),
        ("asked for", ", ".join(asked)),
    ]
    if facts["error_model"]:
        floors = [f"{name} {said['floor']:.3g}" for name, said in facts["error_model"].items()]
        pairs.append(("error floor", ", ".join(floors)))
    return _paragraphs(pairs)


def describe(path, width: int = None) -> str:
    """What a model is and, from its record, how it was trained and how wrong it is.

    Parameters
    ----------
    path : str or Path
        of a model, as for `load_model`; the record has the same name with .json
    width : int, optional
        columns for the ledger; those of the terminal by default

    Returns
    -------
    str
        many lines

    Raises
    ------
    LabError
        where there is no model
    """
    said = _description(path, width)
    # What a stranger wrote into the file must not move a terminal's cursor.
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in said)


def _description(path, width):
    "The lines of `describe`, as the files have them."
    model = load_model(path)
    record = Path(path).with_suffix(".json")
    text = [f"{path}: a {type(model).__name__}", *_model_lines(model, _versions_of(path)), ""]
    try:
        report = TrainingReport.load(record)
    except LabError as error:
        return "\n".join([*text, f"no record: {error}"])
    if report.facts["model"]["digest"] != model.training_digest_:
        unknown = "is the record of another training: nothing more is known of this model"
        return "\n".join([*text, f"{record} {unknown}"])
    return "\n".join([*text, *_training_lines(report.facts), "", *report.lines(width)])


# %%
text = describe(here / "giants.asdf", width=100)
print(text.split("\n\n")[0].replace(str(here), "<here>"))
assert "529 continuum pixels" in " ".join(text.split()) and "calibrated" in text

# %% [markdown]
# Without its record a model still says what it is.

# %%
(here / "giants.json").unlink()
text = describe(here / "giants.asdf")
assert "no record: there is no record" in text and "TEFF" in text and "rmse" not in text
scratch.cleanup()

# %% [markdown]
# **Exercise.** Train twice with the same seed and compare the two records. Then change the seed: which numbers move, and by how much more than you expected?
