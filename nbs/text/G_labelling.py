# %% [markdown]
# # How do ten thousand files get their labels?
# > From files to one table: found, treated as the training spectra were, labelled in batches, written whole or not at all.
#
# **Question.** We have a model and ten thousand files, some of them damaged, some of another kind. How does each get its labels, or one sentence that says why not?
#
# **Idea.** Each file goes the way of the training spectra, whose recipe the model keeps. Files are read in batches, so memory stays small. A file that cannot be labelled is named, and stops nothing.
#
# You learn how to label a folder, and what the columns of the table mean.

# %%
#| default_exp labelling

# %%
#| export
import copy
import csv
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import astropy.units as u
import numpy as np
from astropy.io import fits
from astropy.io.votable import from_table
from astropy.io.votable.tree import Info
from astropy.table import MaskedColumn, QTable, Table, vstack
from sklearn.utils.validation import check_is_fitted
from tqdm import TMonitor, tqdm

from stellar_lab import __version__
from stellar_lab.cannon import plot_fit
from stellar_lab.clean import FILE_NAME, MaskRule, Problem, product_of, read_stars
from stellar_lab.inversion import infer
from stellar_lab.models import (
    LabelModel,
    count_flags,
    flag_names,
    label_values,
    read_regular,
    single_threaded,
)
from stellar_lab.mwm import mwm_kind, read_mwm
from stellar_lab.normalize import as_trained
from stellar_lab.spectrum import from_arrays, holds_spectrum, label_star, read_spectrum
from stellar_lab.survey import (
    LOG10_START,
    LOG10_STEP,
    N_PIXELS,
    PRODUCTS,
    RELEASES,
    TABLE_FORMATS,
    LabError,
    Release,
    Spectra,
    atomic_path,
    end_with_parent,
    known_sums,
    on_band,
    plain_text,
    require,
    safe_output,
    write_table,
)
from stellar_lab.training import believable, check_target, load_model
from stellar_lab.visits import is_visit, read_visit

# %%
#| hide
import io
import tempfile
from contextlib import redirect_stderr

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from IPython.display import Markdown

from stellar_lab.cannon import Cannon
from stellar_lab.clean import find_files, read_archive
from stellar_lab.normalize import normalize, training_set
from stellar_lab.survey import LABELS, archive_record, archive_root, use_style
from stellar_lab.training import train

# %% [markdown]
# ## Which files?
# Spectra are named as files or folders. A folder is searched down to the last one for the survey's file names: apStar and aspcapStar, visits on the detector's pixels (apVisit), and the files of SDSS-V (mwmStar, mwmVisit).
# A visit cut out of an apStar file is not a star and stays out. Of a folder that holds both apStar and aspcapStar files only the model's product is taken. FITS files that stay out are counted: a spectrum that somebody renamed should not vanish without a word. Spectra as text are taken where they are named themselves.

# %%
#| export
_KINDS = {  # what a name says of a file -> how we count it
    "apstar": "apStar files",
    "aspcapstar": "aspcapStar files",
    "apvisit": "apVisit files",
    "mwmstar": "mwmStar files",
    "mwmvisit": "mwmVisit files",
    "visit": "files of single visits",
    "other": "other FITS files",
}
_NAMED = 3  # of the other files, at most


_ELSEWHERE_NAME = re.compile(r"(apVisit|asVisit|mwmStar|mwmVisit)-.+\.fits(\.gz)?")


def _kind_of_name(name):
    "What a file's name says of it, a key of `_KINDS`; None if it is no FITS file."
    elsewhere = _ELSEWHERE_NAME.fullmatch(name)
    if elsewhere:
        return elsewhere[1].lower().replace("asvisit", "apvisit")
    match = FILE_NAME.fullmatch(name)
    if not match:
        return "other" if name.endswith((".fits", ".fits.gz")) else None
    if not name[match.end("id") :].startswith(".fits"):
        return "visit"
    return "aspcapstar" if match["kind"] == "aspcap" else "apstar"


_ELSEWHERE = {  # what is neither apStar nor aspcapStar -> its reader
    "own": read_spectrum,
    "apvisit": read_visit,
    "mwmstar": read_mwm,
    "mwmvisit": read_mwm,
}


def _unmistakable(name):
    "A file's name, in quotes where it could be taken for something else."
    return name if name.isprintable() and ", " not in name else ascii(name)


def _counted(files):
    "Files (path, kind) in words, such as: 2 aspcapStar files, 1 other FITS file (my_star.fits)."
    counts = Counter(kind for _, kind in files)
    words = []
    for kind, text in _KINDS.items():
        if counts[kind]:
            text = text.replace("files", "file", 1) if counts[kind] == 1 else text
            words.append(f"{counts[kind]} {text}")
    others = [_unmistakable(Path(path).name) for path, kind in files if kind == "other"]
    if others:  # they may be spectra, and only their user can tell
        more = ", …" if len(others) > _NAMED else ""
        words[-1] += f" ({', '.join(others[:_NAMED])}{more})"
    return ", ".join(words)


def _raise(error):
    raise error


def _search(folder):
    "(path, kind) of each FITS file below a folder, sorted."
    found = []
    seen = set()
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link led back to where we were
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        kinds = [(Path(parent) / name, _kind_of_name(name)) for name in sorted(files)]
        found += [pair for pair in kinds if pair[1]]
    return found


# %%
print(_unmistakable("my_star.fits"), _unmistakable("my\nlabelled: 12 stars.fits"))
night = [("a/v1.fits", "visit"), ("a/my_star.fits", "other"), ("a/v2.fits", "visit")]
assert _counted(night) == "2 files of single visits, 1 other FITS file (my_star.fits)"
for name in ("apStar-r8-2M00085893+5748452.fits", "allStar-l31c.2.fits", "notes.txt"):
    print(f"{name:36}{_kind_of_name(name)}")


# %%
#| export
def _inside(folder, product):
    "(path, product) of the stars to take from a folder, and (path, kind) of all its FITS files."
    everything = _search(folder)
    stars = [pair for pair in everything if pair[1] in PRODUCTS]
    further = [pair for pair in everything if pair[1] in _ELSEWHERE]
    if not stars and not further:
        others = _counted(everything)
        raise LabError(
            f"{folder} holds no apStar or aspcapStar file, none of visits or of SDSS-V, neither "
            "does a folder in it "
            f"(they are known by name){f'; it has {others}: name these' if others else ''}"
        )
    return ([pair for pair in stars if pair[1] == product] or stars) + further, everything


def _path_list(paths):
    "Paths as a list; LabError for what is none."
    one = isinstance(paths, (str, os.PathLike))
    paths = [paths] if one or not isinstance(paths, Iterable) else list(paths)
    for path in paths:
        if not isinstance(path, (str, os.PathLike)):
            raise LabError(f"spectra are named by paths, not by {path!r}: give files or folders")
    if not paths:
        raise LabError("there are no files to label: name files or folders")
    return [Path(path) for path in paths]


def _kind_of_file(path):
    "The product of a file, or a key of `_ELSEWHERE`; empty where neither is known."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of astropy, about files that are none of FITS
        kind = product_of(path) or mwm_kind(path)
        kind = kind or ("apvisit" if is_visit(path, whole=False) else None)
        kind = kind or ("own" if holds_spectrum(path) else None)
    return kind or ""


def _find(paths, product):
    "What `find_spectra` finds, and in words what it leaves out."
    found = {}
    seen = {}
    for path in _path_list(paths):
        if path.is_dir():
            stars, everything = _inside(path, product)
        elif path.exists() and not path.is_file():
            raise LabError(f"{path} is a pipe, a device or a socket: give files of spectra")
        elif path.exists():
            stars = everything = [(path, _kind_of_file(path))]
        else:
            raise LabError(f"there is no file or folder {path}")
        for file, kind in stars:
            found.setdefault(os.path.abspath(file), (str(file), kind))
        seen |= {os.path.abspath(file): kind for file, kind in everything}
    left_out = [(place, kind) for place, kind in seen.items() if place not in found]
    return list(found.values()), _counted(left_out)


def find_spectra(paths, product: str = None) -> list:
    """The stars' files that some paths name, each once, in order; those of a folder are sorted.

    Parameters
    ----------
    paths : path or sequence of paths
        files, folders, roots of archives
    product : {"apstar", "aspcapstar"}, optional
        of a folder that holds both products only this one is taken

    Returns
    -------
    list of (str, str)
        path and product; the product is empty where neither name nor content says it

    Raises
    ------
    LabError
        where there is nothing
    """
    return _find(paths, product)[0]


# %% [markdown]
# A night's folder for this chapter: three stars as apStar, two of them as aspcapStar, one star under a name of its own, one file that is cut short.

# %%
scratch = tempfile.TemporaryDirectory()
here = Path(scratch.name)
labels = ["teff", "logg", "m_h"]
report = train(archive_root(), here / "giants.asdf", labels, scatter=True, progress=False)
model = report.model
known = report.facts["stars"]["test stars"]
night = here / "night"
night.mkdir()
for product, number in (("apstar", 3), ("aspcapstar", 2)):
    files = find_files(archive_root(), product)
    places = {str(star): path for star, path in zip(files["APOGEE_ID"], files["path"])}
    for star in known[:number]:
        shutil.copy(places[star], night)
    if product == "apstar":
        shutil.copy(places[known[3]], night / "my_star.fits")
        whole = Path(places[known[4]])
        (night / whole.name).write_bytes(whole.read_bytes()[:100_000])

# %%
found, left_out = _find(night, "apstar")
print(*(f"{Path(path).name}  {kind}" for path, kind in found), f"left out: {left_out}", sep="\n")
assert len(found) == 4 and left_out == "2 aspcapStar files, 1 other FITS file (my_star.fits)"
assert find_spectra(night / "my_star.fits") == [(str(night / "my_star.fits"), "apstar")]
assert _find([night, night / "my_star.fits"], "apstar")[1] == "2 aspcapStar files"


# %% [markdown]
# One star of a file of any kind, as `label_star` and `check_star` take it: on the pixels of the file, with what the file says of its velocity.

# %%
#| export
def read_star(path, **options) -> Spectra:
    """A star from a file of any kind that `label` reads.

    Parameters
    ----------
    path : str or Path
    **options
        for `from_arrays`, if the file is a spectrum of one's own; of an apVisit file the velocity

    Returns
    -------
    Spectra
        one star, for `label_star` or `check_star`; of several visits the one of the highest SNR

    Raises
    ------
    LabError
        where there is no spectrum; it says what the file is
    """
    kind = _kind_of_file(path)
    if kind == "own":
        return read_spectrum(path, **options)
    if kind == "apvisit":
        return read_visit(path, options.get("velocity"))
    if kind.startswith("mwm"):
        spectra = read_mwm(path)
    else:
        spectra, _, problems = read_stars([path], PRODUCTS[kind or "apstar"], progress=False)
        if problems:
            raise LabError(str(problems[0]))
    best = int(np.argmax(np.nan_to_num(np.asarray(spectra.stars["SNR"], float))))
    star = spectra[[best]]
    mask = None if star.mask is None else star.mask[0]
    known = {"unit": "AA", "velocity": 0.0, "resolution": 22_500, "mask": mask} | options
    known["name"] = str(star.stars["APOGEE_ID"][0])
    return from_arrays(star.wavelength, star.flux[0], ivar=star.ivar[0], **known)


# %%
print(read_star(night / "my_star.fits"))
with pytest.raises(LabError, match="cut short"):
    read_star(night / whole.name)


# %% [markdown]
# ## The right treatment
# A file of the other product is refused: its labels would look fine and be wrong. And an apStar file has rows: two combinations of all visits, then the visits one by one. A model that learned from its release's own
# combination reads that of each file's release. A model that was asked to learn from another row reads the same one again.

# %%
#| export
def _check_products(model, files, any_product):
    "LabError if some files are of another product than the model's."
    product = model.metadata_.get("product")
    others = [(path, kind) for path, kind in files if kind not in ("", *_ELSEWHERE, product)]
    if not others or any_product:
        return
    path, kind = others[0]
    said = "the model does not say from which product it learned"
    if product:
        said = f"the model learned from {product} files"
    raise LabError(
        f"{said}, but {path} is an {kind} file ({len(others)} of {len(files)} are). "
        f"Another normalization shifts the labels: give it {product or 'its own'} files, "
        "or insist with --any-product (any_product=True)"
    )


def _row_of(model):
    "The row that a model was asked to learn from; None if that was its release's own."
    release = RELEASES.get(model.metadata_.get("release"), Release)
    row = model.metadata_.get("row")
    return None if row == release.row else row


def _has_one_spectrum(kind):
    "Whether files of a kind have no rows."
    return kind not in PRODUCTS or PRODUCTS[kind].normalized


def _check_row(row, files):
    "LabError if a row was asked for, and no file has rows."
    kinds = {kind for _, kind in files if kind}
    if row is not None and kinds and all(map(_has_one_spectrum, kinds)):
        raise LabError(f"{files[0][0]} holds one spectrum, and no rows: leave the row out")


# %%
with pytest.raises(LabError, match="the model learned from apstar files, but") as problem:
    _check_products(model, find_spectra(night, "aspcapstar"), any_product=False)
print(str(problem.value).replace(f"{here}/", ""))
few = archive_record(archive_root()).fields[:6]
other_row, _ = training_set(archive_root(), fields=few, row=0, progress=False)
assert _row_of(model) is None and _row_of(Cannon(order=1).fit(other_row)) == 0

# %% [markdown]
# ## Labels in batches
# Labels come in batches, so that a hundred thousand files need no more memory than a few dozen. What fails is collected, file by file.
#
# The table has what `infer` gives, then what the files know of their stars and a join with a catalogue needs: `snr`, `ra`, `dec`, `field`, `telescope`. The last column is the file.

# %%
#| export
_FACTS = {"snr": None, "ra": u.deg, "dec": u.deg, "field": None, "telescope": None}  # and units


class _Job(NamedTuple):
    "Some files of one product, and how they are to be labelled."

    product: str
    paths: tuple
    row: int | None
    any_product: bool
    mask: str | None = None  # the rule for flagged pixels; the model's by default


def _label_batch(model, job):
    "The table of some files (None if none can be read), and the problems."
    rules = PRODUCTS[job.product]
    row = None if rules.normalized else job.row
    paths = [path for path in job.paths if os.path.isfile(path)]
    problems = [Problem(path, "no file any more") for path in job.paths if path not in paths]
    sums = known_sums(paths)
    spectra, places, unread = read_stars(paths, rules, row=row, progress=False, sums=sums)
    problems += unread
    if not len(spectra):
        return None, problems
    treated, wild = believable(as_trained(model, spectra))
    table = infer(model, treated, any_recipe=job.any_product)
    _add_facts(table, spectra, wild)
    table["file"] = [paths[place] for place in places]
    table.meta |= {"product": job.product, "row": spectra.stars.meta.get("row")}
    blind = table["file"][np.isnan(table[model.label_names_[0].lower()])]
    problems += [Problem(str(file), "no usable pixel, or too few for the model") for file in blind]
    return table, problems


def _add_facts(table, spectra, wild=0):
    """What the files know of their stars, as columns; how many pixels hold what no star has (`wild`
    more than those that reading took out), and whether a checksum was verified."""
    for name, unit in _FACTS.items():
        column = np.asarray(spectra.stars[name.upper()])
        table[name] = column if unit is None else column * unit
    known = spectra.stars.colnames
    strange = np.asarray(spectra.stars["STRANGE_PIXELS"]) if "STRANGE_PIXELS" in known else 0
    verified = np.asarray(spectra.stars["VERIFIED"]) if "VERIFIED" in known else False
    table["strange_pixels"] = np.full(len(table), strange + wild, np.int32)
    table["verified"] = np.full(len(table), verified, bool)


# %%
three = tuple(path for path, kind in found if kind == "apstar")[:3]
table, problems = _label_batch(model, _Job("apstar", three, None, False))
print(len(table), "stars labelled, and", *(f"{p.reason}" for p in problems))
table["apogee_id", "teff", "teff_err", "snr", "field"]


# %% [markdown]
# Files that are not the archive's go another way: [single visits](21_visits.ipynb), [SDSS-V's files](22_mwm.ipynb), [spectra of one's own](20_spectrum.ipynb).

# %%
#| export
def _label_elsewhere(model, path, kind):
    "The table of one file of a kind in `_ELSEWHERE`."
    rule = model.metadata_.get("mask_rule") if kind == "apvisit" else None
    spectra = _ELSEWHERE[kind](path, **({"rule": MaskRule.parse(rule)} if rule else {}))
    if kind.startswith("mwm"):  # on the survey's pixels, at rest
        treated, wild = believable(as_trained(model, spectra))
        table = infer(model, treated, any_recipe=True)
        _add_facts(table, spectra, wild)
        notes = spectra.stars.meta.get("notes", [])
        table.meta["said"] = [f"{Path(path).name}: {note}" for note in notes]
        return table
    found = label_star(model, spectra)
    _add_facts(found.table, found.spectra)
    found.table.meta["said"] = [f"{Path(path).name}: {note}" for note in found.notes]
    return found.table


def _label_own(model, job):
    "As `_label_batch`, for spectra on any grid: the model goes to each star."
    tables = []
    problems = []
    for path in job.paths:
        try:
            table = _label_elsewhere(model, path, job.product)
        except LabError as error:
            said = str(error).removeprefix(str(path)).removeprefix(f"{Path(path).name}:")
            problems.append(Problem(str(path), said.lstrip(": ")))
            continue
        table["file"] = [path] * len(table)
        tables.append(table)
    if not tables:
        return None, problems
    table = vstack(tables, metadata_conflicts="silent")
    table.meta |= {"product": job.product, "row": None}
    return table, problems


# %%
(here / "note.csv").write_text("no star")
table, problems = _label_own(model, _Job("own", (str(here / "note.csv"),), None, False))
print(table, *(problem.reason.replace(f"{here}/", "") for problem in problems))
assert table is None and len(problems) == 1


# %% [markdown]
# A strange spectrum must not take the others with it. Where a batch fails, each half is tried by itself, down to the file that is the cause.

# %%
#| export
def _give_all_velocities(tables):
    "Columns of velocity in all tables, empty where none was measured, if one has them."
    if any("velocity" in table.colnames for table in tables):
        for table in tables:
            for name in ("velocity", "velocity_err"):
                if name not in table.colnames:
                    table[name] = np.full(len(table), np.nan) * u.km / u.s


def _label_job(model, job):
    """Tables of some files in a list, and the problems.

    Where one file makes the others fail, they are labelled without it: half by half, down to the
    file that is the cause."""
    if job.mask is not None:
        model = copy.copy(model)
        model.metadata_ = model.metadata_ | {"mask_rule": job.mask}
    try:
        with single_threaded():  # sums do not depend on the number of cores
            work = _label_batch if job.product in PRODUCTS else _label_own
            table, problems = work(model, job)
        return ([] if table is None else [table]), problems
    except Exception as error:  # whatever a strange spectrum brings about
        if len(job.paths) == 1:
            said = next(iter(str(error).splitlines()), "")
            reason = said if isinstance(error, LabError) else f"cannot be labelled ({said})"
            return [], [Problem(job.paths[0], reason)]
    half = len(job.paths) // 2
    first, problems = _label_job(model, job._replace(paths=job.paths[:half]))
    second, others = _label_job(model, job._replace(paths=job.paths[half:]))
    return first + second, problems + others


def _jobs(model, files, row, any_product, batch, mask=None):
    "All files in jobs of so many, product by product."
    usual = model.metadata_.get("product")
    by_kind = {}
    for path, kind in files:
        by_kind.setdefault(kind or (usual if usual in PRODUCTS else "apstar"), []).append(path)
    return [
        _Job(kind, tuple(paths[start : start + batch]), row, any_product, mask)
        for kind, paths in sorted(by_kind.items())
        for start in range(0, len(paths), batch)
    ]


# %%
jobs = _jobs(model, found, None, False, 2)
print([(job.product, len(job.paths)) for job in jobs])
tables, problems = _label_job(model, jobs[0])
assert len(tables[0]) + len(problems) == 2


# %% [markdown]
# ## A run that was stopped
# A hundred thousand files take a while, and much can happen meanwhile. So each finished batch is kept in a hidden folder beside the table, and a run that was stopped goes on where it was: the same command finds what is
# there. A part is known by a fingerprint of all that it depends on, the model, the files with their sizes and times, the options; whatever has changed is labelled anew. The final table has the same bytes as without
# the interruption, and the folder goes when the table stands.

# %%
#| export
class _Parts:
    "Finished batches of a run, kept beside the table that they will make."

    def __init__(self, out, model):
        self.folder = Path(out).with_name(f".{Path(out).name}.parts")
        with open(model, "rb") as file:
            self.model = hashlib.file_digest(file, "sha256").hexdigest()

    def place(self, job):
        "The file of a job's part: its name holds all that the part depends on."
        found = [os.stat(path) for path in job.paths if os.path.isfile(path)]
        known = [__version__, self.model, job, [(one.st_size, one.st_mtime_ns) for one in found]]
        return self.folder / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]}.npz"

    def keep(self, place, result):
        "Write a part; a disk that is full will be named when the table is written."
        tables, problems = result
        arrays = {}
        facts = {"problems": [tuple(map(str, problem)) for problem in problems], "tables": []}
        for number, table in enumerate(tables):
            units = {}
            for name in table.colnames:
                unit = getattr(table[name], "unit", None)
                units[name] = None if unit is None else str(unit)
                arrays[f"{number} {name}"] = np.asarray(getattr(table[name], "value", table[name]))
            facts["tables"].append({"units": units, "meta": table.meta})
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        with suppress(OSError), atomic_path(place) as temporary:
            np.savez(temporary, **arrays)

    def find(self, place):
        "The tables and problems of a part; None where it is not there, or not whole."
        if not place.is_file():
            return None
        try:
            with np.load(place, allow_pickle=False) as arrays:
                facts = json.loads(arrays["facts"].tobytes())
                tables = []
                for number, kept in enumerate(facts["tables"]):
                    table = QTable(meta=kept["meta"])
                    for name, unit in kept["units"].items():
                        values = arrays[f"{number} {name}"]
                        table[name] = values if unit is None else u.Quantity(values, unit)
                    tables.append(table)
            return tables, [Problem(*problem) for problem in facts["problems"]]
        except Exception:  # damaged: the files are labelled again
            return None

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


# %%
parts = _Parts(here / "labels.fits", here / "giants.asdf")
place = parts.place(jobs[0])
parts.keep(place, (tables, problems))
again, same_problems = parts.find(place)
print(place.parent.name, len(again[0]), "stars")
assert same_problems == problems and again[0].meta == tables[0].meta
for name in tables[0].colnames:
    assert np.array_equal(np.asarray(again[0][name]), np.asarray(tables[0][name])), name
    assert getattr(again[0][name], "unit", None) == getattr(tables[0][name], "unit", None)
place.write_bytes(place.read_bytes()[:-99])
assert parts.find(place) is None
parts.remove()
assert not parts.folder.exists()


# %% [markdown]
# ## How long will it take?
# Who waits wants to know: a bar in a terminal, a line a minute in a log.

# %%
#| export
class _Progress:
    "A bar (True), a line a minute on the error output (``lines``), or nothing."

    def __init__(self, total, how):
        self.total = total
        self.lines = how == "lines"
        shown = how is True
        self.bar = tqdm(total=total, desc="labelling", unit="star", disable=not shown, leave=False)
        self.done = self.failed = 0
        self.began = self.said = time.monotonic()

    def update(self, number, failed):
        self.done += number
        self.failed += failed
        self.bar.update(number)
        now = time.monotonic()
        if self.lines and now - self.said >= _MINUTE:
            self.said = now
            left = (now - self.began) / max(self.done, 1) * (self.total - self.done) / 60
            with suppress(OSError, ValueError):
                print(
                    f"labelling: {self.done} of {self.total} stars, {self.failed} without labels, "
                    f"about {left:.0f} minutes left",
                    file=sys.stderr,
                    flush=True,
                )


_MINUTE = 60  # seconds from line to line

# %%
bar = _Progress(10_000, "lines")
bar.said -= 600  # as if ten minutes had passed
bar.began -= 600
with redirect_stderr(io.StringIO()) as said:
    bar.update(2_500, 3)
print(said.getvalue())
assert "about 30 minutes left" in said.getvalue()

# %% [markdown]
# ## Several processes
# Reading a file is work for the processor, and Python does one thing at a time in a process. With `workers` several processes take a batch each. A batch gives the same numbers in any of them, so the table does not
# depend on how many there are. They end with the process that started them, also where that is killed.

# %%
#| export
_worker = {}  # the model of a worker process


def _start_worker(model):
    "What a worker process does first."
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers, and ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    _worker["model"] = load_model(model) if isinstance(model, str) else model


def _work(job):
    return _label_job(_worker["model"], job)


def _pool(workers, model, name):
    "Processes that label; they are copies of this one where that is quick and safe."
    threads = [one for one in threading.enumerate() if not isinstance(one, TMonitor)]  # of a bar
    forked = sys.platform == "linux" and len(threads) == 1 and "tensorflow" not in sys.modules
    given = model if forked or not name else name
    context = multiprocessing.get_context("fork" if forked else "spawn")
    return ProcessPoolExecutor(workers, context, _start_worker, (given,))


def _in_processes(jobs, workers, model, name):
    "Number and result of each job, as they come; not all jobs wait in a queue at once."
    with _pool(min(workers, len(jobs)), model, name) as pool:
        waiting = {}
        try:
            for number, job in jobs:
                waiting[pool.submit(_work, job)] = number
                if len(waiting) > 3 * workers:
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from ((waiting.pop(one), one.result()) for one in done)
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                yield from ((waiting.pop(one), one.result()) for one in done)
        except BrokenProcessPool as error:
            raise LabError(
                "a worker process ended before its work was done, perhaps for lack of memory: "
                "run the same again, with fewer workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# %% [markdown]
# All jobs together, in one process or in several, and one table of what they give:

# %%
#| export
def _label_files(model, jobs, workers=1, parts=None, progress=False, name=""):
    "One table of all files that give labels (None if none does), and the problems of the others."
    results = {}
    bar = _Progress(sum(len(job.paths) for job in jobs), progress)
    places = [None if parts is None else parts.place(job) for job in jobs]
    for number, place in enumerate(places):
        kept = None if place is None else parts.find(place)
        if kept is not None:
            results[number] = kept
            bar.update(len(jobs[number].paths), len(kept[1]))
    open_jobs = [(number, job) for number, job in enumerate(jobs) if number not in results]
    one_process = ((number, _label_job(model, job)) for number, job in open_jobs)
    several = workers > 1 and len(open_jobs) > 1
    found = _in_processes(open_jobs, workers, model, name) if several else one_process
    for number, result in found:
        if places[number] is not None:
            parts.keep(places[number], result)
        results[number] = result
        bar.update(len(jobs[number].paths), len(result[1]))
    bar.bar.close()
    tables = [table for number in range(len(jobs)) for table in results[number][0]]
    problems = [problem for number in range(len(jobs)) for problem in results[number][1]]
    return (_joined(model, tables) if tables else None), problems


def _joined(model, tables):
    "One table of all batches; its meta holds for all of them."
    usual = model.metadata_.get("product")
    products = sorted({table.meta["product"] for table in tables})
    with_rows = [t for t in tables if not _has_one_spectrum(t.meta["product"])]
    rows = {table.meta["row"] for table in with_rows}
    foreign = sum(len(t) for t in tables if t.meta["product"] not in (*_ELSEWHERE, usual))
    _give_all_velocities(tables)
    table = vstack(tables, metadata_conflicts="silent")
    del table.meta["row"]
    if rows:
        (row,) = rows if len(rows) == 1 else (None,)
        table.meta["row"] = "that of each file's release" if row is None else row
    table.meta |= {"product": ", ".join(products), "made_by": f"stellar_lab {__version__}"}
    if foreign:
        table.meta["foreign"] = foreign
    if foreign and table.meta["errors"] == "calibrated":
        table.meta["errors"] = f"calibrated on {usual or 'unknown'} spectra, too small for others"
    return table


# %%
table, problems = _label_files(model, _jobs(model, found, None, False, 2))
print(*problems, sep="\n")
print("product:", table.meta["product"], " row:", table.meta["row"])
assert len(table) == 3 and len(problems) == 1 and "cut short" in problems[0].reason
assert list(table["apogee_id"]) == sorted(known[:3]) and table["ra"].unit == u.deg
table["apogee_id", "teff", "teff_err", "flags", "snr", "ra", "dec", "field", "telescope"]

# %% [markdown]
# [A spectrum of one's own](20_spectrum.ipynb), a text file or a FITS table on any grid, is named like any other file. It keeps its pixels, and its velocity is
# measured.

# %%
star = read_stars([found[0][0]], PRODUCTS["apstar"], progress=False)[0]
usable = star.ivar[0] > 0
mine = Table({"wave_nm": star.wavelength[usable] / 10, "flux": star.flux[0][usable]})
mine["error"] = 1 / np.sqrt(star.ivar[0][usable])
mine[::-1].write(night / "my.csv", format="ascii.csv")
files, _ = _find(night / "my.csv", "apstar")
foreign, _ = _label_files(model, _jobs(model, files, None, False, 8))
print(*foreign.meta["said"], sep="\n")
both = vstack([foreign, infer(model, as_trained(model, star))], metadata_conflicts="silent")
assert np.all(np.abs(np.diff(both["teff"].value)) < both["teff_err"].value[0])
both["apogee_id", "teff", "teff_err", "velocity"]

# %% [markdown]
# ## What a table should say
# A few stars are answered with their labels, rounded as their errors deserve. Ten thousand stars are answered with a few lines. Of these the most important is of what kind the errors are: a *formal* error may be ten
# times too small. And a calibrated error that is as wide as the training stars are spread says, in one number, that the label was not found.

# %%
#| export
_FEW = 5  # so many stars are shown one by one
_ERRORS = {
    "calibrated": "calibrated on stars left out of training",
    "formal": "formal, as the model states them; nobody compared them with left-out stars",
}


def _about(table):
    "What calibrated errors are about, in words, where the catalogue's noise is not in them."
    if "true" not in str(table.meta.get("about", "")):
        return ""
    return "; about the true label: a catalogue's own noise comes on top of them"


def _rounded(value, error):
    "A number and its error with two digits of the error."
    if not np.isfinite(value):
        return "none"
    if not error > 0:
        return f"{value:.5g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} +- {error:.{digits}f}"


def _label_lines(table):
    "The labels of a few stars as text: one row per label, one column per star."
    rows = [["", *table["apogee_id"]]]
    for name in table.meta["labels"].lower().split(","):
        unit = table[name].unit
        values = label_values(table, [name, f"{name}_err"])
        rows.append([f"{name} [{unit}]" if str(unit) else name, *(_rounded(*v) for v in values)])
    if any(table["flags"] > 0):
        rows.append(["flags", *(names or "none" for names in flag_names(table["flags"]))])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(str(text).ljust(w) for text, w in zip(row, widths)) for row in rows]
    return [line.rstrip() for line in lines]


def _foreign_note(model, table):
    "A sentence about spectra of another product than the model's."
    foreign = table.meta.get("foreign", 0)
    if not foreign:
        return []
    known = model.metadata_.get("product")
    said = f"that the model learned from, {known}" if known else "that the model knows"
    return [f"{foreign} of {len(table)} stars are not of the product {said}: labels are biased"]


def _strange_note(table):
    "A sentence about pixels that hold what no star has."
    strange = np.asarray(table["strange_pixels"])
    if not strange.any():
        return []
    return [
        f"{strange.sum()} pixels of {np.count_nonzero(strange)} stars hold a flux or an error that "
        "no star has: they count as unusable (strange_pixels)"
    ]


def _verified_note(table):
    "What could be verified, for the table's meta."
    verified = np.count_nonzero(table["verified"])
    said = f"{verified} of {len(table)} spectra had a checksum, and fit it"
    others = "; in the others nobody can see a changed number"
    return said + (others if verified < len(table) else "")


def _wide_errors(model, table):
    "A sentence for each label whose errors are as wide as the training stars are spread."
    spreads = dict(zip(model.label_names_, getattr(model, "scales_", ())))
    said = []
    for name, spread in spreads.items():
        errors = label_values(table, [f"{name}_err"])
        known = errors[np.isfinite(errors)]
        if len(known) and np.median(known) >= spread:
            said.append(
                f"{name} says nothing: its error is typically as wide as the training stars "
                "are spread"
            )
    return said


# %%
print(*_label_lines(table), sep="\n")
assert (_rounded(4523.7, 42.6), _rounded(-0.123, 0.0456)) == ("4524 +- 43", "-0.123 +- 0.046")
assert not _wide_errors(model, table)


# %%
#| export
@dataclass
class LabelSummary:
    """The table of labels, and what could not be labelled; `print` says it in a few lines.

    Attributes
    ----------
    table : QTable
        as `infer` gives it, with snr, ra, dec, field, telescope and file
    files : int
        how many were looked at
    problems : list of Problem
        files that gave no labels, and why
    model, out : str
        where the model came from and the table went, if these are files
    left_out : str
        what the folders hold that was not looked at, in words
    failed : str
        the table that names the files without labels
    notes : list of str
        what else a user of the labels should know
    """

    table: QTable
    files: int
    problems: list = field(default_factory=list)
    model: str = ""
    out: str = ""
    left_out: str = ""
    notes: list = field(default_factory=list)
    failed: str = ""

    @property
    def labelled(self) -> int:
        "Stars with labels."
        return self.files - len(self.problems)

    @property
    def ok(self) -> bool:
        "Every file gave labels."
        return not self.problems

    def __str__(self):
        by = f" by {self.model}" if self.model else ""
        where = f", in {self.out}" if self.out else ""
        kind = self.table.meta["errors"]
        lost = {problem.path for problem in self.problems}
        flags = self.table["flags"][[file not in lost for file in self.table["file"]]]
        which = ", ".join(f"{count} {name}" for name, count in count_flags(flags).items())
        lines = [
            f"{self.labelled} of {self.files} stars labelled{by}{where}",
            f"errors: {_ERRORS.get(kind, kind)}{_about(self.table)}",
            f"with a flag: {np.count_nonzero(flags)}{f' ({which})' if which else ''}",
        ]
        lines += [f"left out: {self.left_out}"] if self.left_out else []
        named = f", named in {self.failed}" if self.failed else ""
        lines += [f"without labels: {len(self.problems)}{named}"] if self.problems else []
        lines += self.notes
        lines += ["", *_label_lines(self.table)] if len(self.table) <= _FEW else []
        return "\n".join(lines)


# %%
print(LabelSummary(table, len(found), problems, left_out=left_out))


# %% [markdown]
# ## One table, five formats
# FITS and [ECSV](https://docs.astropy.org/en/stable/io/ascii/ecsv.html) keep everything, units included. Parquet is for many rows. CSV and VOTable need a little care, so that a reader sees numbers and no warnings:
#
# - CSV has no matrices. The covariance is spread over columns such as `cov_teff_logg`; the variances are the squares of the `_err` columns. A number that is not there is an empty cell, for `pandas`, astropy and TOPCAT agree on
#   nothing else. There are no comment lines, since `pandas` would take them for data; so units and meta stay behind.
# - VOTable knows no unit "dex". It goes into the column's description. The meta becomes `INFO` elements.
# - A FITS header is plain ASCII, and so is the text in a FITS table; other letters in the names of files are encoded.

# %%
#| export
def _for_fits(table):
    "The table with text that FITS can hold: names in UTF-8 where ASCII is not enough, meta in it."
    table = table.copy(copy_data=False)
    for name in table.colnames:
        values = np.asarray(table[name])
        if values.dtype.kind == "U" and (name == "file" or not all(map(str.isascii, values))):
            table[name] = np.char.encode(values, "utf-8", "surrogateescape")
    for key, value in table.meta.items():
        if isinstance(value, str):
            table.meta[key] = value.encode("unicode_escape").decode("ascii")
    return table


def _spelled(text):
    "A text in which bytes that are no letters are spelled out."
    return str(text).encode("utf-8", "backslashreplace").decode()


def _for_text(table, suffix):
    "The table with text, also in its meta, that every format but FITS can hold."
    table = plain_text(table, suffix).copy(copy_data=False)
    table.meta = {k: _spelled(v) if isinstance(v, str) else v for k, v in table.meta.items()}
    return table


def _for_csv(table):
    "Plain columns: covariances spread out, an empty cell instead of NaN."
    labels = table.meta["labels"].lower().split(",")
    plain = Table()
    for name in table.colnames:
        values = np.asarray(getattr(table[name], "value", table[name]))
        if name != "covariance":
            plain[name] = values
            continue
        for i, first in enumerate(labels):
            for j in range(i + 1, len(labels)):
                plain[f"cov_{first}_{labels[j]}"] = values[:, i, j]
    for name in plain.colnames:
        if plain[name].dtype.kind == "f":
            plain[name] = MaskedColumn(plain[name], mask=np.isnan(plain[name]))
    return plain


# %%
print(*[name for name in _for_csv(table).colnames if name.startswith("cov")][:4], "…", sep="\n")


# %%
#| export
def _write_csv(table, path):
    _for_csv(table).write(path, format="ascii.csv")


def _write_votable(table, path):
    "A VOTable whose units the Virtual Observatory knows, and the meta as INFO."
    table = Table(table)
    for name in table.colnames:
        if table[name].unit == u.dex:
            table[name].unit = None
            table[name].description = "in dex"
    votable = from_table(table)
    infos = votable.get_first_table().infos
    for key, value in table.meta.items():
        infos.append(Info(name=key, value=str(value)))
    votable.to_xml(str(path))


_MORE_FORMATS = {".csv": _write_csv, ".vot": _write_votable}
_FORMATS = (*TABLE_FORMATS, *_MORE_FORMATS)


# %%
#| export
def write_labels(table: QTable, path):
    """Write a table of labels, whole or not at all.

    Parameters
    ----------
    table : QTable
        of `label`
    path : str or Path
        .fits, .ecsv, .parquet, .csv or .vot. In .parquet, a covariance is a row of K*K numbers; in
        .csv, it is spread over columns such as ``cov_teff_logg``, and there is no meta

    Raises
    ------
    LabError
        where the extension is another
    """
    suffix = Path(path).suffix.lower()
    if suffix != ".fits":
        table = _for_text(table, suffix)
    if suffix in _MORE_FORMATS:
        with atomic_path(path) as temporary:
            _MORE_FORMATS[suffix](table, temporary)
        return
    write_table(_for_fits(table) if suffix == ".fits" else table, path)


# %%
with warnings.catch_warnings():
    warnings.simplefilter("error")  # nobody who opens these files shall be warned
    for suffix in _FORMATS:
        write_labels(table, here / f"labels{suffix}")
    votable = Table.read(here / "labels.vot")
frame = pd.read_csv(here / "labels.csv")
print(votable["teff", "teff_err", "logg", "logg_err"].info)
assert np.allclose(frame["cov_teff_logg"], table["covariance"][:, 0, 1])
assert np.allclose(votable["covariance"], table["covariance"])
assert votable["teff"].unit == u.K and votable["logg"].description == "in dex"
assert frame["apogee_id"].tolist() == list(table["apogee_id"])

# %% [markdown]
# ## Label
# The model is any file that `load_model` reads: a Cannon, a ridge regression, the physics model, a network. The table looks the same; where nothing was fitted, `chi2` is empty.
#
# A table should say where it comes from. Model, version, product and row stand in its meta. Date and command would, too, but then the same input would not give the same bytes; so only who asks for them, as the command line does,
# gets them, through `notes`.
#
# `any_product` lets spectra of the other product in. Then the table says so: their labels are biased, and errors that were calibrated on the model's own product are too small for them.

# %%
#| export
_ENDS = 1 << 16  # bytes at both ends of a file in which a table of labels names its columns


def _check_out(out):
    "LabError if the table could not be written, before anything slow begins."
    if out is None:
        return
    path = check_target(out, _FORMATS, "a table")
    if path.suffix.lower() == ".parquet":
        require("pyarrow", "parquet")
        if str(path) != _spelled(path):
            raise LabError(
                f"a Parquet table cannot be written to {_spelled(path)}, whose name holds bytes "
                "that are no letters: choose another name, or another format"
            )


def _check_spared(out, inputs):
    "LabError where the table, or the list of failed files, would replace something else."
    path = check_target(out, _FORMATS, "a table", inputs)
    failed = check_target(_failed_name(path), (".csv",), "the list of failed files", inputs)
    if path.exists():
        whole = read_regular(path)
        if b"apogee_id" not in whole[:_ENDS] + whole[-_ENDS:]:
            raise LabError(
                f"cannot write a table to {path}: what stands there is no table of labels; choose "
                "another name, or remove that file"
            )
    if failed.exists() and not read_regular(failed).startswith(_FAILED_HEAD.encode()):
        raise LabError(
            f"cannot write the list of failed files to {failed}: what stands there is none; choose "
            "another name for the table, or remove that file"
        )


_FAILED_HEAD = "file,reason"


def _failed_name(out):
    "The table beside the table: which files gave no labels."
    return Path(out).with_name(f"{Path(out).stem}-failed.csv")


def _write_failed(problems, out):
    "Name the files without labels beside the table; the name of the list, empty if there are none."
    path = _failed_name(out)
    if not problems:
        path.unlink(missing_ok=True)  # of an earlier run; it would be wrong now
        return ""
    with atomic_path(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(_FAILED_HEAD.split(","))
            rows.writerows((str(problem.path), problem.reason) for problem in problems)
    return str(path)


# %%
print(_failed_name("night/labels.fits").as_posix())
with pytest.raises(LabError, match="its extension must be .fits or .ecsv or"):
    _check_out(here / "labels.doc")
(here / "diary.csv").write_text("Monday: rain")
with pytest.raises(LabError, match="what stands there is no table of labels"):
    _check_spared(here / "diary.csv", [])
with pytest.raises(LabError, match="is one of the inputs"):
    _check_spared(here / "labels.csv", [here / "labels.csv"])


# %%
#| export
def _opened(model):
    "The name of a model's file, empty where there is none, and the model; LabError for no model."
    name = ""
    if isinstance(model, (str, os.PathLike)):
        name = str(model)
        model = load_model(model)
    if not isinstance(model, LabelModel):
        raise LabError(f"{model!r} is no model: give a fitted model, or the file of one")
    check_is_fitted(model)
    return name, model


_MOST_WORKERS = 256


def _check_options(batch, notes, workers, row):
    "LabError for numbers that are none, or notes that a file cannot keep."
    if not isinstance(batch, (int, np.integer)) or batch < 1:
        raise LabError(f"batch is {batch!r}: give a whole number of files, at least 1")
    if not isinstance(workers, (int, np.integer)) or not 1 <= workers <= _MOST_WORKERS:
        raise LabError(f"workers is {workers!r}: give a whole number from 1 to {_MOST_WORKERS}")
    if row is not None and (not isinstance(row, (int, np.integer)) or row < 0):
        raise LabError(
            f"row must be 0, 1, 2 … (0 and 1 are the combinations, the visits follow), not {row!r}"
        )
    if notes is None:
        return
    if not isinstance(notes, dict):
        raise LabError(f"notes is a {type(notes).__name__}: give a dict of names and texts")
    for name, value in notes.items():
        if not isinstance(value, (str, int, float)):
            raise LabError(f"note {name!r} is a {type(value).__name__}: give a text or a number")


def _few(problems, number=3):
    "The first problems as text."
    return "; ".join(map(str, problems[:number])) + ("; …" if len(problems) > number else "")


# %%
print(_few(problems * 5))


# %%
#| export
def label(
    model,
    paths,
    out=None,
    any_product: bool = False,
    progress: bool = True,
    row: int = None,
    notes: dict = None,
    batch: int = 64,
    workers: int = 1,
    mask: str = None,
) -> LabelSummary:
    """Labels of stars from their files, treated as the model's training spectra were.

    Parameters
    ----------
    model : LabelModel or path
        fitted, or the file of one, as for `load_model`
    paths : path or sequence of paths
        apStar or aspcapStar files, folders, roots of archives
    out : str or Path, optional
        file for the table, as for `write_labels`; nothing is written by default. Files that give
        no labels are named beside it, in ``<name>-failed.csv``. A run that was stopped goes on
        where it was
    any_product : bool, default False
        take spectra of another product than the model's, although their labels are biased
    progress : bool or "lines", default True
        show a bar; "lines" says a line a minute on the error output
    row : int, optional
        of apStar files: 0 and 1 are the combinations, the visits follow; by default as the model
        learned
    notes : dict, optional
        goes into the table's meta, such as a date
    batch : int, default 64
        files in memory at a time; labels of other batches differ by less than 0.001 of an error
    workers : int, default 1
        processes that read and label; the table does not depend on it
    mask : str, optional
        rule for flagged pixels, as for `MaskRule.parse`; by default as the model learned

    Returns
    -------
    LabelSummary
        its ``table`` holds the labels

    Raises
    ------
    LabError
        where no file gives labels, or model and files do not go together

    Examples
    --------
    >>> from stellar_lab import label
    >>> summary = label("giants.asdf", "stars", "labels.fits")  # doctest: +SKIP
    >>> print(summary)  # doctest: +SKIP
    """
    _check_out(out)
    _check_options(batch, notes, workers, row)
    name, model = _opened(model)
    files, left_out = _find(paths, model.metadata_.get("product"))
    _check_products(model, files, any_product)
    _check_row(row, files)
    if out is not None:
        inputs = [path for path, _ in files] + ([name] if name else [])
        _check_spared(out, inputs)
    row = _row_of(model) if row is None else int(row)
    mask = None if mask is None else str(MaskRule.parse(mask))
    jobs = _jobs(model, files, row, bool(any_product), int(batch), mask)
    parts = _Parts(out, name) if out is not None and name and len(jobs) > 1 else None
    table, problems = _label_files(model, jobs, int(workers), parts, progress, name)
    if table is None:
        raise LabError(f"none of {len(files)} files gave labels: {_few(problems)}")
    own_notes = table.meta.pop("said", [])[: 2 * _FEW]
    table.meta["verified"] = _verified_note(table)
    table.meta |= {"model": name, "files": len(files), "failed": len(problems)} | (notes or {})
    failed = ""
    if out is not None:
        failed = _write_failed(problems, out)
        write_labels(table, out)
    if parts is not None:
        parts.remove()
    said = _foreign_note(model, table) + _wide_errors(model, table) + _strange_note(table)
    said += own_notes
    where = "" if out is None else str(out)
    return LabelSummary(table, len(files), problems, name, where, left_out, said, failed)


# %%
summary = label(here / "giants.asdf", night, here / "night.ecsv", progress=False)
print(str(summary).replace(f"{here}/", ""))
again = QTable.read(here / "night.ecsv")
assert not summary.ok and summary.labelled == 3
assert again.meta["errors"] == "calibrated" and "date" not in again.meta
assert np.allclose(again["teff"].value, table["teff"].value, rtol=1e-6)  # however they are read

# %%
mixed = label(
    here / "giants.asdf", [night, *night.glob("aspcap*")], any_product=True, progress=False
)
print(*str(mixed).replace(f"{here}/", "").splitlines()[:6], sep="\n")
assert mixed.table.meta["foreign"] == 2 and mixed.table.meta["product"] == "apstar, aspcapstar"

# %% [markdown]
# ## The recipe is followed
# A Python user normalizes with continuum pixels of her own and trains. Her model labels new files with the same pixels: file by file, the labels are those of the training spectra. The 529 of the original lab would
# give others.

# %%
pixels = np.zeros(len(model.usable_), dtype=bool)
pixels[3::20] = True
spectra, _ = training_set(archive_root(), fields=few, continuum_pixels=pixels, progress=False)
own = Cannon(order=1, scatter=True).fit(spectra)
files = find_files(archive_root(), "apstar", few)
stars, counts = np.unique(files["APOGEE_ID"], return_counts=True)
once = np.isin(spectra.stars["APOGEE_ID"], stars[counts == 1])  # the others have two files
some = spectra[once][:5]
paths = [files["path"][files["APOGEE_ID"] == star][0] for star in some.stars["APOGEE_ID"]]
answers = label(own, paths, progress=False)
expected = infer(own, some)
names = own.label_names_
formal = label_values(expected, [f"{name}_err" for name in names])
moved = label_values(answers.table, names) - label_values(expected, names)
print(f"largest difference: {np.abs(moved / formal).max():.0e} formal errors")
assert np.abs(moved / formal).max() < 1e-3
print(answers)

# %% [markdown]
# The recipe has another part, the rule for dark pixels. We leave it out and look at how far the labels move, in units of their formal errors. And who is labelled with a star must not matter to it.

# %%
raw, _ = read_archive(archive_root(), dark=0, fields=few, progress=False)
raw = raw[np.isin(raw.stars["APOGEE_ID"], spectra.stars["APOGEE_ID"])]
same = infer(own, as_trained(own, raw))
without = label_values(infer(own, normalize(raw, continuum_pixels=pixels)), names)
formal = label_values(same, [f"{name}_err" for name in names])
moved = np.nanmax(np.abs(label_values(same, names) - without) / formal, axis=0)
print("largest shift in formal errors:", dict(zip(names, moved.round(2).tolist())))
lonely = infer(own, as_trained(own, raw[3]))
assert np.allclose(lonely["teff"].value, same["teff"].value[3], rtol=1e-7)

# %% [markdown]
# ## A whole folder
# The archive at hand, dwarfs and damaged files included.

# %%
use_style()
summary = label(here / "giants.asdf", archive_root(), progress=False)
print(str(summary).replace(f"{here}/", ""))
good = summary.table[summary.table["flags"] == 0]
doubtful = summary.table[summary.table["flags"] > 0]
fig, ax = plt.subplots(figsize=(6.5, 4.2))
x, y, z = label_values(good, ["TEFF", "LOGG", "M_H"]).T
error = label_values(good, ["TEFF_err", "LOGG_err"]).T
ax.errorbar(x, y, error[1], error[0], fmt="none", color="0.8", lw=0.5, zorder=0)
points = ax.scatter(x, y, c=z, s=9, cmap="viridis")
crosses = label_values(doubtful, ["TEFF", "LOGG"]).T
ax.plot(*crosses, "x", color="C3", ms=4, mew=0.8, label="flagged")
ax.legend(frameon=False, loc="lower left")
fig.colorbar(points, label=LABELS["M_H"].axis)
ax.set(
    xlabel=LABELS["TEFF"].axis,
    ylabel=LABELS["LOGG"].axis,
    xlim=LABELS["TEFF"].plot_range[::-1],
    ylim=LABELS["LOGG"].plot_range[::-1],
    title="Labels of all spectra of the archive",
);

# %%
#| echo: false
learned = set(known) | set(report.facts["stars"]["training stars"])
strange = np.array([str(name) not in learned for name in summary.table["apogee_id"]])
flagged = summary.table["flags"] > 0
Markdown(
    "**What to see.** Hot on the left, as astronomers draw it: the giant branch, metal-poor "
    "stars (dark) on its hot side. Of the stars that were in neither set, "
    f"{flagged[strange].mean():.0%} carry a flag (crosses), of the others "
    f"{flagged[~strange].mean():.1%}. The model answers for a dwarf, too, with the labels of "
    "some giant; without the column `flags` nobody would know."
)

# %% [markdown]
# ## Output that goes on
# A table says what a star is; its spectrum says whether to believe it. So the best-fitting spectra can be written, too, with what they leave of each star: an image with
# one row per star on the survey's grid, whose header says the wavelengths (FITS software calls that a WCS), and a table for each star that came on a grid of its own.

# %%
#| export
_MOST_SPECTRA = 5_000  # stars in one file of spectra: 0.5 GB


def check_draws(model):
    "LabError for a model that reads labels and draws no spectra."
    if not hasattr(model, "predict"):
        raise LabError(
            f"a {type(model).__name__} reads labels and draws no spectra from them: take a Cannon "
            "(train --kind cannon or hidden)"
        )


def best_fits(model, table, row: int = None):
    """Each star of a table of labels, treated as it was labelled, and the model on its pixels.

    Parameters
    ----------
    model : LabelModel
        fitted, that can `predict` spectra
    table : QTable
        of `label`
    row : int, optional
        of apStar files, as for `label`

    Yields
    ------
    tuple
        file, model, `Spectra`, table of labels

    Raises
    ------
    LabError
        where the model draws no spectra, or a file is gone
    """
    check_draws(model)
    row = _row_of(model) if row is None else row
    for path in dict.fromkeys(map(str, table["file"])):
        kind = _kind_of_file(Path(path)) or model.metadata_.get("product") or "apstar"
        if kind in ("own", "apvisit"):
            found = label_star(model, _ELSEWHERE[kind](path))
            yield path, found.model, found.spectra, found.table
            continue
        if kind in PRODUCTS:
            asked = None if PRODUCTS[kind].normalized else row
            spectra, _, problems = read_stars([path], PRODUCTS[kind], row=asked, progress=False)
            if problems:
                raise LabError(str(problems[0]))
        else:
            spectra = _ELSEWHERE[kind](path)
        star = as_trained(model, spectra)
        yield path, model, star, infer(model, star, any_recipe=True)


# %%
for file, there, star, labels in best_fits(model, summary.table[:2]):
    left = (star.flux - there.predict(label_values(labels, model.label_names_)))[star.ivar > 0]
    print(f"{Path(file).name}: {np.nanstd(left):.3f} of the continuum is left")
    assert np.nanstd(left) < 0.1


# %%
#| export
def _grid_header():
    "The header of an image on the survey's grid, as apStar files have it."
    cards = {"CRVAL1": LOG10_START, "CDELT1": LOG10_STEP, "CRPIX1": 1}
    header = fits.Header(cards | {"CTYPE1": "LOG-LINEAR", "DC-FLAG": 1})
    header["COMMENT"] = (
        "wavelength in vacuum: 10**(CRVAL1 + CDELT1 * pixel), pixel from 0 [Angstrom]"
    )
    return header


def _own_table(number, name, star, made):
    "The spectrum of a star on a grid of its own, as an extension."
    columns = {"wavelength": star.wavelength * u.AA, "flux": star.flux[0], "ivar": star.ivar[0]}
    columns |= {"model": made, "residual": star.flux[0] - made}
    hdu = fits.table_to_hdu(QTable(columns))
    hdu.name = f"STAR{number}"
    hdu.header["OBJECT"] = str(name).encode("ascii", "replace").decode()
    return hdu


def check_spectra_target(path, inputs=()):
    """Spectra can be written to a path, and replace nothing but spectra that were written before.

    Parameters
    ----------
    path : str or Path
        .fits file
    inputs : sequence of paths
        files that are read

    Raises
    ------
    LabError
        where they cannot
    """
    check_target(path, (".fits",), "spectra", inputs, [b"residual"])


def write_spectra(model, table, path, row: int = None):
    """Write the best-fitting spectrum of each star and what it leaves, as FITS.

    Parameters
    ----------
    model, table, row
        as for `best_fits`
    path : str or Path
        .fits file: images FLUX, IVAR, MODEL, RESIDUAL with one row per star on the survey's grid
        (NaN between the chips), a table STARS with the row's star and file, and a table for each
        star on another grid

    Raises
    ------
    LabError
        where there are more stars than one file should hold
    """
    if len(table) > _MOST_SPECTRA:
        raise LabError(f"{len(table)} spectra are too many for one file: label in parts")
    check_spectra_target(path, [path for path in map(str, table["file"])])
    images = {"FLUX": [], "IVAR": [], "MODEL": [], "RESIDUAL": []}
    names = []
    files = []
    further = []  # tables of stars on other grids
    for file, there, star, labels in best_fits(model, table, row):
        made = there.predict(label_values(labels, model.label_names_))
        if len(star.wavelength) != len(on_band):
            further.append(_own_table(len(further) + 1, star.stars["APOGEE_ID"][0], star, made[0]))
            continue
        for name, values in zip(images, (star.flux, star.ivar, made, star.flux - made)):
            full = np.full((len(star), N_PIXELS), 0 if name == "IVAR" else np.nan, np.float32)
            full[:, on_band] = values
            images[name].append(full)
        names += [str(name) for name in star.stars["APOGEE_ID"]]
        files += [Path(file).name] * len(star)
    hdus = [fits.PrimaryHDU()]
    if names:
        header = _grid_header()
        hdus += [fits.ImageHDU(np.vstack(v), header, name=n) for n, v in images.items()]
        stars = Table({"apogee_id": names, "file": [f.encode("utf-8", "replace") for f in files]})
        hdus.append(fits.table_to_hdu(stars))
        hdus[-1].name = "STARS"
    with atomic_path(path) as temporary:
        fits.HDUList(hdus + further).writeto(temporary)


# %%
few = label(model, [night / "my.csv", *(path for path, _ in found[:2])], progress=False)
write_spectra(model, few.table, here / "spectra.fits")
with fits.open(here / "spectra.fits") as hdus:
    print([hdu.name for hdu in hdus[1:]], hdus["MODEL"].shape)
    rest = hdus["RESIDUAL"].data[0, on_band]
    sure = hdus["IVAR"].data[0, on_band] > 0
    assert np.nanstd(rest[sure]) < 0.05 and hdus["RESIDUAL"].header["CRVAL1"] == LOG10_START


# %%
#| export
def plot_stars(model, table, folder, row: int = None) -> list:
    """A picture of each star, the model over it, and what is left.

    Parameters
    ----------
    model, table, row
        as for `best_fits`
    folder : str or Path
        where the pictures go, one .png per spectrum, named after its file

    Returns
    -------
    list of Path
    """
    import matplotlib.pyplot as plt

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for file, there, star, labels in best_fits(model, table, row):
        for number in range(len(star)):
            stem = Path(file).name.split(".fits")[0]
            written.append(folder / f"{stem}{f'-{number + 1}' if len(star) > 1 else ''}.png")
            safe_output(written[-1], [file], [b"matplotlib"])
            axes = plot_fit(there, star, number, label_values(labels[[number]], model.label_names_))
            with atomic_path(written[-1]) as temporary:
                axes[0].figure.savefig(temporary)
            plt.close(axes[0].figure)
    return written


# %%
pictures = plot_stars(model, few.table, here / "pictures")
print(*(path.name for path in pictures))
assert all(path.stat().st_size > 5_000 for path in pictures)

# %%
assert summary.labelled + len(summary.problems) == summary.files
assert "aspcapStar" in summary.left_out
with pytest.raises(LabError, match="there is no file or folder"):
    label(model, here / "nowhere")
with pytest.raises(LabError, match="its extension must be .fits or .ecsv"):
    label(model, night, here / "labels.doc")
scratch.cleanup()

# %% [markdown]
# **Exercise.** Label the archive with a model of three labels and with one of six. For which stars do the two disagree by more than their errors?
