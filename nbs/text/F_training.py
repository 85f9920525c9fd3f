# %% [markdown]
# # How is a model trained, and what must be kept of it?
# > One training and its record: an archive goes in, a model comes out, and beside it the account of every star and every error.
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
import json
import math
import shutil
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np
from astropy.table import QTable

from stellar_lab import __version__
from stellar_lab.cannon import Cannon
from stellar_lab.clean import Ledger, find_files
from stellar_lab.inversion import infer
from stellar_lab.judging import cross_label, error_table, with_error_model
from stellar_lab.models import Flag, fold_numbers, read_model_file, train_test_rows
from stellar_lab.normalize import (
    continuum_steps,
    read_continuum_pixels,
    training_set,
)
from stellar_lab.survey import PRODUCTS, LabError, archive_record, atomic_path, label_records

# %%
#| hide

# %% [markdown]
# ## Train
# A training is more than the model that comes out. Its record says from which archive, which stars fell to which rule, which were learned from and
# which were left out, how far the predicted labels are from the catalogue for both, and which versions computed it. It holds no date and no duration:
# the same command gives the same record.

# %%
#| export
REPORT_FORMAT = 1


@dataclass
class TrainingReport:
    "How a model was trained and how wrong it is. `print` shows it; `save` and `load` keep it as JSON beside the model."

    facts: (
        dict  # plain data: arguments, archive, product, stars, continuum pixels, seed, versions, …
    )
    ledger: "Ledger"  # clean.Ledger: which star fell to which rule
    errors: dict  # name of a set of stars -> inversion.error_table
    model: "Cannon" = None  # as trained; None for a report that was read

    def to_dict(self) -> dict:
        "Plain data, for JSON."
        ledger = self.ledger.to_dict() | {"dropped": self.ledger.dropped}
        return {
            "format": REPORT_FORMAT,
            **self.facts,
            "ledger": ledger,
            "errors": {name: _plain_rows(table) for name, table in self.errors.items()},
        }

    def save(self, path):
        "Write the record as JSON, whole or not at all."
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        with atomic_path(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path) -> "TrainingReport":
        "Read a record that `save` wrote; LabError for any other file."
        try:
            plain = json.loads(Path(path).read_text(encoding="utf-8"))
            if plain.pop("format") != REPORT_FORMAT:
                raise ValueError("another format")
            ledger, errors = Ledger.from_dict(plain.pop("ledger")), plain.pop("errors")
            return cls(plain, ledger, {name: _error_rows(rows) for name, rows in errors.items()})
        except FileNotFoundError as error:
            raise LabError(
                f"there is no record {path}: 'stellar-lab train' writes it beside the model"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LabError(
                f"{path} is not the record of a training ({error or type(error).__name__}): train the model again"
            ) from error

    def __str__(self):
        return "\n".join(self.lines())

    def lines(
        self,
        width: int = None,  # columns to fill; those of the terminal by default
    ) -> list:
        "The ledger and the tables of errors as text."
        text = _ledger_lines(self.ledger, width or shutil.get_terminal_size().columns)
        for name, table in self.errors.items():
            text += ["", f"errors of the {name}:", *table.pformat(max_lines=-1, max_width=-1)]
        return [*text, "", *self.facts["notes"]]


def _plain_rows(table):
    "A table as a list of plain rows; None stands for NaN, which JSON does not have."
    columns = [
        [
            None if isinstance(value, float) and math.isnan(value) else value
            for value in table[name].tolist()
        ]
        for name in table.colnames
    ]
    return [dict(zip(table.colnames, row)) for row in zip(*columns)]


def _error_rows(rows):
    table = QTable(
        {name: [math.nan if row[name] is None else row[name] for row in rows] for name in rows[0]}
    )
    for name in table.colnames:
        if table[name].dtype.kind == "f":
            table[name].info.format = ".4g"
    return table


def _ledger_lines(ledger, width):
    "The ledger as a table; the reasons are left out where they do not fit."
    table = ledger.table
    text = str(ledger).splitlines()
    if max(map(len, text)) > width:
        table.remove_column("reason")
        text = table.pformat(max_lines=-1, max_width=-1, align=["<", ">", ">", ">"])
    return [line.rstrip() for line in text]


# %% [markdown]
# New spectra must be treated as the training spectra were: another product or another list of continuum pixels shifts the labels by more than their
# errors (chapter 3 measures it). So the model carries the product and the pixels in its own file, and `inversion.as_trained` follows them.

# %% [markdown]
# Before anything slow begins, all that can be wrong with the request is looked at: a run of an hour must not fail at its last line because the folder
# for its result cannot be written.

# %%
#| export
def check_target(path, suffixes, what):
    "A file of a right kind can be written at `path`, else LabError."
    path = Path(path)
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
    if path.is_dir():
        raise LabError(f"cannot write {what} to {path}: it is a folder")
    return path


def _check_request(root, labels, product, order, test_size, folds, seed):
    "LabError for what no archive can make right; returns the names of the labels."
    names = [
        label.name
        for label in label_records(archive_record(root).labels if labels is None else labels)
    ]
    checks = (
        (
            names and len(set(names)) == len(names),
            f"labels are {', '.join(names) or 'none'}: name each once",
        ),
        (
            product in (None, *PRODUCTS),
            f"unknown product {product!r}: choose from {', '.join(PRODUCTS)}",
        ),
        (order == int(order) and order >= 1, f"order is {order}: it must be 1, 2, …"),
        (
            folds is not None or 0 < test_size < 1,
            f"test_size is {test_size}: give a share of the stars between 0 and 1",
        ),
        (
            folds is None or folds == int(folds) and folds >= 2,
            f"folds is {folds}: it must be 2 at least",
        ),
        (
            0 <= seed < 2**32 and seed == int(seed),
            f"seed is {seed}: give a whole number from 0 to {2**32 - 1}",
        ),
    )
    for right, problem in checks:
        if not right:
            raise LabError(problem)
    return names


def _check_fields(root, product, fields):
    "Every field that was asked for has files."
    if fields is None or isinstance(fields, str) or not Path(root).is_dir():
        return
    products = archive_record(root).products if product is None else (product,)
    empty = [
        name
        for name in map(str, fields)
        if not any(len(find_files(root, each, [name])) for each in products)
    ]
    if empty:
        there = sorted(
            {str(name) for each in products for name in find_files(root, each, "all")["FOLDER"]}
        )
        some = ", ".join(there[:12]) + (f" and {len(there) - 12} more" if len(there) > 12 else "")
        raise LabError(
            f"no {' or '.join(products)} files of field {', '.join(empty)} below {root}: it has {some or 'none of any field'}"
        )


# %% [markdown]
# Judging comes in two ways. With a *test share* the model learns from the rest and is judged on the share, as the lab does. In *folds* every star is
# left out once by a model that learned from the others; the model that is kept learns from all. Either way the left-out stars teach the error model
# of chapter 5.

# %%
#| export
def train(
    root,  # archive root
    path=None,  # .asdf file for the model, its record goes beside it as .json; nothing is written by default
    labels=None,  # label names in any case; the archive's by default
    fields=None,  # fields to take, or "all"; the archive's by default
    product: str = None,  # "apstar" or "aspcapstar"; the archive's first that has files by default
    continuum_pixels=None,  # (P,) bool, or a file for normalize.read_continuum_pixels; the lab's 529 by default
    order: int = 2,  # of the polynomial
    scatter: bool = False,  # fit an intrinsic scatter per pixel
    test_size: float = 0.33,  # share of the stars left out for testing, unless `folds`
    folds: int = None,  # leave out every star once, in this many folds
    seed: int = 42,  # of the split or the folds
    progress: bool = True,  # show bars
) -> TrainingReport:  # its `.model` is the Cannon
    "Train a Cannon on an archive, judge it on stars left out, and keep both. LabError for what the user can mend."
    names = _check_request(root, labels, product, order, test_size, folds, seed)
    _check_fields(root, product, fields)
    path = None if path is None else check_target(path, (".asdf",), "the model")
    pixels, source = _chosen_pixels(continuum_pixels)
    spectra, ledger = training_set(root, product, fields, names, pixels, progress)
    _check_training(spectra, names, order, pixels)
    spectra.stars.meta["continuum_source"] = source
    model, sets = _judge(
        Cannon(order=order, scatter=scatter, labels=names),
        spectra,
        test_size,
        folds,
        seed,
        progress,
    )
    arguments = {
        "labels": names,
        "fields": fields,
        "product": product,
        "continuum_pixels": None if pixels is None else source,
        "order": order,
        "scatter": scatter,
        "test_size": test_size if folds is None else None,
        "folds": folds,
        "seed": seed,
    }
    report = _report(model, spectra, ledger, sets, arguments, root, path)
    if path is not None:
        report.model.save(path)
        report.save(path.with_suffix(".json"))
    return report


def _chosen_pixels(continuum_pixels):
    "Flags of the continuum pixels (None: the lab's), and where they come from."
    if continuum_pixels is None:
        return None, "the lab's list"
    if isinstance(continuum_pixels, np.ndarray):
        return continuum_pixels, "an array"
    return read_continuum_pixels(continuum_pixels), Path(continuum_pixels).name


def _check_training(spectra, names, order, pixels):
    product, terms = spectra.stars.meta["product"], math.comb(len(names) + order, order)
    if pixels is not None and PRODUCTS[product].normalized:
        raise LabError(
            f"{product} spectra are normalized already, continuum pixels change nothing: leave them out, or choose product apstar"
        )
    if terms > len(spectra):
        raise LabError(
            f"{len(spectra)} stars cannot determine {terms} terms (order {order} in {len(names)} labels): "
            "take more stars, a lower order or fewer labels"
        )


def _judge(model, spectra, test_size, folds, seed, progress):
    "The fitted model, and name of a set -> (rows, their `infer` table); the set of left-out stars comes last."
    everyone = np.arange(len(spectra))
    if folds is not None:
        left_out = cross_label(model, spectra, fold_numbers(len(spectra), folds, seed), progress)
        model.fit(spectra)
        return model, {
            "training stars": (everyone, infer(model, spectra)),
            f"stars left out in {folds} folds": (everyone, left_out),
        }
    learned, kept = _split(len(spectra), test_size, seed)
    model.fit(spectra[learned])
    return model, {
        "training stars": (learned, infer(model, spectra[learned])),
        "test stars": (kept, infer(model, spectra[kept])),
    }


def _split(n, test_size, seed):
    try:
        return train_test_rows(n, test_size, seed)
    except ValueError as error:
        raise LabError(
            f"{n} stars cannot be split with a test size of {test_size} ({error})"
        ) from error


# %% [markdown]
# From the two tables of labels follow the tables of errors, the error model, and the share of left-out stars that carry a flag.

# %%
#| export
def _report(model, spectra, ledger, sets, arguments, root, path):
    names = list(model.label_names_)
    errors = {
        name: error_table(table, spectra[rows].labels(names), names, model.scales_)
        for name, (rows, table) in sets.items()
    }
    kind, (rows, table) = list(sets.items())[-1]
    flagged = count_flags(table["flags"])
    notes = [f"{kind} with a flag: {sum(table['flags'] > 0)} of {len(table)}{flag_text(flagged)}"]
    try:
        model = with_error_model(model, table, spectra[rows].labels(names))
        notes.append(
            f"the errors of new labels are honest: inflated to fit the {len(table)} {kind}"
        )
    except LabError as error:
        notes.append(
            f"the errors of new labels are formal, photon noise alone and much too small: {error}"
        )
    facts = _facts(model, spectra, arguments, root, path)
    ids = [str(name) for name in spectra.stars["APOGEE_ID"]]
    facts["stars"] = {name: [ids[row] for row in rows] for name, (rows, _) in sets.items()}
    return TrainingReport(facts | {"flagged": flagged, "notes": notes}, ledger, errors, model)


def count_flags(flags) -> dict:
    "How many stars carry each flag; those that none carries are left out."
    counts = {flag.name: int(np.count_nonzero(np.asarray(flags, int) & flag)) for flag in Flag}
    return {name: count for name, count in counts.items() if count}


def flag_text(counts):
    return f" ({', '.join(f'{count} {name}' for name, count in counts.items())})" if counts else ""


def _facts(model, spectra, arguments, root, path):
    "What a record holds beside ledger and errors: plain data."
    record, meta = archive_record(root), spectra.stars.meta
    honest = hasattr(model, "error_floor_")
    return {
        "arguments": {name: _plain(value) for name, value in arguments.items()},
        "archive": {
            "root": str(root),
            "name": record.name,
            "title": record.title,
            "release": meta["release"],
        },
        "product": meta["product"],
        "seed": arguments["seed"],
        "model": {
            "file": None if path is None else path.name,
            "digest": model.training_digest_,
            "labels": list(model.label_names_),
            "terms": model.vectorizer_.terms,
            "scatter_median": float(np.nanmedian(model.scatter_)),
            "pixels": int(model.usable_.sum()),
        },
        "continuum_pixels": _continuum_facts(meta),
        "error_model": {
            name: {"inflation": float(a), "floor": float(np.sqrt(b))}
            for name, a, b in zip(model.label_names_, model.error_inflation_, model.error_floor_)
        }
        if honest
        else None,
        "versions": _versions(),
    }


def _continuum_facts(meta):
    "Source and numbers of the continuum pixels; None where the survey normalized."
    steps = continuum_steps(meta)
    if not steps:
        return None
    return {"source": meta.get("continuum_source", "unknown"), "pixels": steps[-1]["pixels"]}


def _plain(value):
    "A value as JSON takes it."
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return value.item() if hasattr(value, "item") else [_plain(part) for part in value]


def _versions():
    packages = ("numpy", "scipy", "scikit-learn", "astropy")
    return {
        "stellar_lab": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: version(name) for name in packages},
    }


# %% [markdown]
# ## A model from its file

# %%
#| export
_ROOMS = {"Cannon": "cannon", "RidgeLabels": "readers", "PhysicsModel": "physics"}  # by class


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
    """
    if Path(path).suffix.lower() == ".keras":
        return import_module("stellar_lab.network").Network.load(path)
    tree = read_model_file(path)
    kind = tree["stellar_lab_model"]
    if kind not in _ROOMS:
        raise LabError(f"{path} holds a {kind}, which this version does not know")
    room = import_module(f"stellar_lab.{_ROOMS[kind]}")
    return getattr(room, kind)._from_tree(tree)


# %% [markdown]
# ## Report
# What a model is stands in its own file; how it did stands in the record beside it. If the two are not from the same training, it says so.

# %%
#| export
def describe(
    path,  # .asdf file of a Cannon, .keras file of a network
    width: int = None,  # columns to fill; those of the terminal by default
) -> str:
    "What a model is and, from the record beside it, how it was trained and how wrong it is."
    model, record = load_model(path), Path(path).with_suffix(".json")
    text = [f"{path}: a {type(model).__name__}", *_model_lines(model, _versions_of(path)), ""]
    try:
        report = TrainingReport.load(record)
    except LabError as error:
        return "\n".join([*text, f"no record: {error}"])
    if report.facts["model"]["digest"] != model.training_digest_:
        return "\n".join(
            [
                *text,
                f"{record} is the record of another training: nothing more is known of this model",
            ]
        )
    return "\n".join([*text, *_training_lines(report.facts), "", *report.lines(width)])


def _versions_of(path):
    if Path(path).suffix.lower() == ".keras":
        return import_module("stellar_lab.network").network_facts(path)["versions"]

    return read_model_file(path)["versions"]


def _inside_lines(model):
    "What a model is made of, and its errors: a Cannon's terms and scatter, or a network's weights and training."
    if hasattr(model, "vectorizer_"):
        terms = model.vectorizer_.terms
        scatter = (
            f"{np.nanmedian(model.scatter_):.4f} in the median pixel"
            if model.scatter
            else "none fitted"
        )
        return [
            ("terms", f"{len(terms)}: {', '.join(terms)}"),
            ("scatter", scatter),
        ], "formal: photon noise alone, much too small"
    losses = ", ".join(
        f"{name} {values[-1]:.4g}" for name, values in model.history_.items() if values
    )
    return [
        ("weights", f"{model.net_.count_params():,}"),
        ("training", f"{len(model.history_['loss'])} epochs, at the end {losses}"),
    ], "as the network gives them"


def _model_lines(model, versions):
    names = model.label_names_
    inside, errors = _inside_lines(model)
    grid = (
        ""
        if model.wavelength_ is None
        else f" from {model.wavelength_[0]:.2f} to {model.wavelength_[-1]:.2f} Angstrom"
    )
    low, high = model.training_labels_.min(axis=0), model.training_labels_.max(axis=0)
    lines = [
        ("labels", ", ".join(f"{name} {a:.4g} to {b:.4g}" for name, a, b in zip(names, low, high))),
        *inside[:1],
        ("trained on", f"{len(model.training_labels_)} stars, {_origin(model.metadata_)}"),
        ("pixels", f"{model.usable_.sum()} of {len(model.usable_)}{grid}"),
        *inside[1:],
        ("errors", "honest" if hasattr(model, "error_floor_") else errors),
        ("digest", model.training_digest_[:16]),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
    ]
    return _paragraphs(lines)


def _origin(meta):
    parts = [meta.get("product", "of unknown product")]
    parts += [f"archive {meta['archive']}"] if meta.get("archive") else []
    parts += [f"release {meta['release'].upper()}"] if meta.get("release") else []
    continuum = _continuum_facts(meta)
    if continuum:
        parts.append(f"{len(continuum['pixels'])} continuum pixels ({continuum['source']})")
    return ", ".join(parts)


def _training_lines(facts):
    asked = {name: value for name, value in facts["arguments"].items() if value is not None}
    said = ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in asked.items()
    )
    floors = facts["error_model"] or {}
    return _paragraphs(
        [
            ("archive", f"{facts['archive']['root']}: {facts['archive']['title']}"),
            ("asked for", said),
            *(
                [
                    (
                        "error floor",
                        ", ".join(f"{name} {part['floor']:.3g}" for name, part in floors.items()),
                    )
                ]
                if floors
                else []
            ),
        ]
    )


def _paragraphs(pairs):
    "Names on the left, texts on the right, wrapped to 100 columns or the terminal."
    width = min(shutil.get_terminal_size().columns, 100)
    return [
        line
        for name, text in pairs
        for line in textwrap.wrap(
            text,
            width,
            initial_indent=f"  {name:<13}",
            subsequent_indent=" " * 15,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]

# %% [markdown]
# **Exercise.** Train twice with the same seed and compare the two records. Then change the seed: which numbers move, and by how much more than you expected?
