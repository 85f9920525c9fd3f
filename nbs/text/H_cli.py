# %% [markdown]
# # How do we do it without a notebook?
# > Eight commands: an archive of spectra comes home, a model is trained and judged, stars get their labels.
#
# **Question.** A notebook is for understanding. Once we understand, we have ten thousand files and want their labels tonight, from a terminal or a script, and next year we want to know how they came about. What is the
# shortest way that loses nothing?
#
# **Idea.** Each command is one function and one file that it leaves behind:
#
# | command | takes | leaves |
# |---|---|---|
# | `stellar-lab archive` | nothing | a folder of real stars in the survey's own files |
# | `stellar-lab fetch` | a URL or a folder | the same tree at home |
# | `stellar-lab train` | an archive | a model, and a record of how it was made and how wrong it is |
# | `stellar-lab label` | a model, spectra | a table of labels |
# | `stellar-lab check` | a model, a spectrum of your own | a verdict on it |
# | `stellar-lab repeats` | a model, visits | how far labels of one star scatter |
# | `stellar-lab judge` | an archive, your predictions | their score |
# | `stellar-lab report` | a model | what its record says |
#
# You learn how a function becomes a command: what it asks for, what it prints, and the one number that a script looks at.

# %%
#| default_exp cli

# %%
#| export
import argparse
import contextlib
import errno
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import traceback
import warnings
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from stellar_lab import __version__

# %% [markdown]
# The module imports almost nothing. numpy, astropy and the plotting packages take seconds to load, and `--help` should come at once. So each function below asks for what it needs when it is called.

# %%
#| hide
import io
import subprocess
import tempfile

import numpy as np
from astropy.table import QTable

from stellar_lab.cannon import Cannon
from stellar_lab.inversion import infer
from stellar_lab.judging import error_table, with_error_model
from stellar_lab.models import label_values, train_test_rows
from stellar_lab.normalize import training_set
from stellar_lab.survey import archive_record, archive_root, write_table
from stellar_lab.training import TrainingReport, train

# %% [markdown]
# ## Words
# What a user types is text. These functions turn it into what the functions of the other chapters take, or say what was expected.

# %%
#| export
_PRODUCTS = ("apstar", "aspcapstar")  # as in `survey`, whose import takes a second


def _list(text):
    "A comma separated list."
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise argparse.ArgumentTypeError("an empty list: name something, with commas between")
    return parts


def _product_list(text):
    "A list of products, in any case."
    return _known_products(text, _PRODUCTS)


def _fetched_list(text):
    "A list of products that can be fetched, in any case."
    return _known_products(text, (*_PRODUCTS, "mwmstar", "mwmvisit"))


def _known_products(text, known):
    "Names from a list of known ones."
    names = [name.lower() for name in _list(text)]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"unknown product {name!r}: choose from {', '.join(known)}"
            )
    return names


def _fields(text):
    "The word all, or a list of fields."
    return "all" if text.strip().lower() == "all" else _list(text)


# %%
print(_list("teff, logg,"), _product_list("APSTAR"), _fields("All"))


# %% [markdown]
# ## A command
# A command is a description for `--help`, its options, and a function of a few lines that calls one from another chapter. The help is the first thing that a newcomer reads, so every command says what it does, what it
# writes where, and shows an example.

# %%
#| export
class _Help(argparse.RawDescriptionHelpFormatter):
    "Keeps the lines of descriptions, and shows defaults."

    def __init__(self, prog):
        width = min(shutil.get_terminal_size().columns - 2, 100)
        super().__init__(prog, max_help_position=26, width=width)

    def _get_help_string(self, action):
        known = action.default not in (None, False, argparse.SUPPRESS)
        if action.option_strings and known and "default" not in action.help:
            return f"{action.help} (default: {action.default})"
        return action.help


def _command(commands, name, run, summary, text, interrupted):
    "The parser of one command: a line for the list, a text for its own help."
    parser = commands.add_parser(
        name, help=summary, description=text.strip(), formatter_class=_Help, allow_abbrev=False
    )
    parser.set_defaults(run=run, interrupted=interrupted)
    parser.add_argument("--debug", action="store_true", help=_DEBUG, default=argparse.SUPPRESS)
    return parser


_DEBUG = "show where in the program an error came up"


def _shows_progress():
    "Bars are for a terminal, not for a log."
    return sys.stderr.isatty()


def _spelled(text):
    "A text in which nothing is left that a terminal would obey: names of files may hold anything."
    text = str(text)
    if text.isprintable():
        return text
    plain = (c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return "".join(plain)


def _say(text):
    "A line on the error output; if nobody can read it there, it is lost, and nothing else is."
    try:
        print(_spelled(text), file=sys.stderr, flush=True)
    except (OSError, ValueError):  # full, or closed
        _silence(sys.stderr)


class _Unprinted(Exception):
    "The result of a command cannot be printed."


def _print(text=""):
    "Print a result at once; `_Unprinted` where there is no place for it."
    try:
        print(_spelled(text), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _Unprinted(error.strerror) from error


def _silence(stream):
    "Let what is still in a stream that cannot be written go nowhere."
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


# %%
def show_help(add, name):
    "What `--help` of one command says."
    parser = argparse.ArgumentParser("stellar-lab")
    add(parser.add_subparsers(prog="stellar-lab"))
    with contextlib.suppress(SystemExit):
        parser.parse_args([name, "--help"])


print("a name that would colour the terminal:", _spelled("apStar-\x1b[31mred.fits"))
assert "\x1b" not in _spelled("apStar-\x1b[31mred.fits")

# %% [markdown]
# ### `archive`

# %%
#| export
_ARCHIVE_WRITERS = {  # name -> module and function of stellar_lab
    "clusters": ("archives", "write_clusters"),
    "mock": ("mock", "write_mock"),
    "sdssv": ("archives", "write_sdssv"),
}
_ARCHIVE = """
Write an archive of stars that stellar_lab carries: spectra, catalogue and
all, in the survey's own files and folders. No network is needed.

  clusters   553 real giants and dwarfs of 18 star clusters and the Pleiades
             (SDSS DR10), one of them the nameless mystery star, as apStar and
             as aspcapStar files of DR14, some 600 stars with the copies that
             carry planted flaws; 0.9 GB
  mock       2,723 synthetic giants in four fields, with the survey's noise,
             masks and label errors, a few dwarfs and binaries among them;
             truth.fits knows their true labels; 3 GB
  sdssv      the 553 real stars in the files of SDSS-V (DR19): mwmStar, called
             by sdss_id, and the catalogue astraAllStarASPCAP; 0.2 GB

The same seed gives the same bytes. An archive that is there already stays.

Examples:
  stellar-lab archive clusters stars
  stellar-lab archive mock made --stars 600
"""


# %%
#| export
def _run_archive(options):
    module, function = _ARCHIVE_WRITERS[options.name]
    writer = getattr(import_module(f"stellar_lab.{module}"), function)
    _print(writer(options.root, seed=options.seed, stars=options.stars, progress=_shows_progress()))
    return 0


def _add_archive(commands):
    parser = _command(
        commands,
        "archive",
        _run_archive,
        "write an archive of real or synthetic stars, no network needed",
        _ARCHIVE,
        "nothing was written",
    )
    option = parser.add_argument
    names = ", ".join(_ARCHIVE_WRITERS)
    option("name", metavar="NAME", choices=_ARCHIVE_WRITERS, help=f"which archive: {names}")
    option("root", metavar="ROOT", help="folder to write; must not exist, or be empty")
    option("--stars", type=int, metavar="N", help="so many stars instead of all")
    drawn = "of what is drawn: noise, visits, flaws, synthetic stars"
    option("--seed", type=int, default=42, metavar="S", help=drawn)


# %%
show_help(_add_archive, "archive")

# %% [markdown]
# ### `fetch`

# %%
#| export
_FETCH = """
Fetch fields of the survey, or of any archive, into the folder ROOT: the
catalogue once, and the spectra of the fields, in the survey's own tree. What
is there and whole stays, what has begun goes on, so a broken run is simply
run again. Nothing half or wrong is ever left under a file's name.

SDSS-V (DR19) has no fields: name its stars by their sdss_id, as numbers or in
a file (text, or a table with a column sdss_id). Its catalogue has 1.2 GB.

Exit code 0 says that all is there, 1 that something is missing.

Examples:
  stellar-lab fetch stars --from https://data.sdss.org/sas --fields 4230,4262
  stellar-lab fetch stars --from https://data.sdss.org/sas --release dr17 \\
      --fields N2420 --product apstar,aspcapstar --dry-run
  stellar-lab fetch copy --from /data/apogee
  stellar-lab fetch today --from https://data.sdss.org/sas --release dr19 \\
      --sdss-id mine.txt
"""


def _run_fetch(options):
    from stellar_lab.fetch import fetch

    summary = fetch(
        options.root,
        options.source,
        release=options.release,
        fields=options.fields,
        products=options.product,
        telescopes=options.telescope,
        workers=options.workers,
        dry_run=options.dry_run,
        progress=_shows_progress(),
        sdss_ids=options.sdss_id,
        catalogue=not options.no_catalogue,
    )
    if options.dry_run:
        for item in summary.items:
            _print(f"{item.state:<13} {'?' if item.size is None else item.size:>12}  {item.path}")
    _print(summary)
    return 0 if summary.ok else 1


# %%
#| export
_FETCHED_RELEASE = "dr10, dr14, dr16, dr17, dr19 (default: the archive's own; dr14 for the survey)"
_FETCHED_FIELDS = (
    "location IDs up to DR14, names since DR16 (default: the archive's own; "
    "the original lab's four for the survey)"
)
_FETCHED_TELESCOPES = "apo25m, lco25m, apo1m (default: all of the release)"


def _add_fetch(commands):
    parser = _command(
        commands,
        "fetch",
        _run_fetch,
        "bring fields of the survey, or an archive, home",
        _FETCH,
        "what is whole stays, what has begun goes on: run the same again",
    )
    option = parser.add_argument
    option("root", metavar="ROOT", help="folder that the archive goes to")
    source = "URL or folder of the archive to fetch from"
    option("--from", dest="source", required=True, metavar="SOURCE", help=source)
    option("--release", metavar="NAME", help=_FETCHED_RELEASE)
    option("--fields", type=_list, metavar="LIST", help=_FETCHED_FIELDS)
    product = "apstar, aspcapstar or both; of DR19 mwmstar, mwmvisit, its mwmstar by default "
    product += "(default: apstar)"
    option("--product", type=_fetched_list, metavar="LIST", help=product)
    numbers = "stars of SDSS-V: numbers with commas between, or a file of them"
    option("--sdss-id", metavar="LIST", help=numbers)
    option("--no-catalogue", action="store_true", help="spectra only, not the table of all stars")
    option("--telescope", type=_list, metavar="LIST", help=_FETCHED_TELESCOPES)
    option("--workers", type=int, default=4, metavar="N", help="downloads at once")
    option("--dry-run", action="store_true", help="only list what would be fetched")


# %%
show_help(_add_fetch, "fetch")

# %% [markdown]
# ### `train`

# %%
#| export
_TRAIN = """
Train a model on the stars of an archive (--kind says which; without it the
one that the scoreboard shows best): read the spectra, join them with the
catalogue's labels, drop what the archive's cuts drop, normalize, fit; then
judge the model on stars that it has not seen, and give it errors that hold.

Prints the ledger (which rule dropped how many stars) and, for each label, the
errors (predicted - catalogue) of the training stars and of those left out:
RMSE, RMSE in units of the label's spread, mean absolute error, bias, and a
robust scatter that outliers do not move.

Writes the model to FILE (.asdf) and beside it a record of the training,
the same name with .json: arguments, which star fell to which rule, tables,
seed, versions.

Examples:
  stellar-lab train stars --model giants.asdf --scatter
  stellar-lab train stars --model giants.asdf --scatter --folds 5 \\
      --labels teff,logg,m_h --product aspcapstar
"""


def _run_train(options):
    from stellar_lab.training import train

    report = train(
        options.root,
        options.model,
        labels=options.labels,
        fields=options.fields,
        product=options.product,
        continuum_pixels=options.continuum_pixels,
        row=options.row,
        kind=options.kind,
        groups=options.groups,
        refusal=not options.no_refusal,
        gaps=options.gaps,
        mask=options.mask,
        order=options.order,
        scatter=options.scatter,
        test_size=options.test_size,
        folds=options.folds,
        seed=options.seed,
        progress=_shows_progress(),
    )
    _print(report)
    record = Path(options.model).with_suffix(".json")
    _print(f"\nmodel   {options.model}")
    _print(f"record  {record} (which star fell to which rule, and all of the above)")
    return 0


# %% [markdown]
# It has the most options. Those for the spectra come first, then those for the model and its judge.

# %%
#| export
_TRAINED = {  # option -> its help
    "--kind": "which model: latents, a Gaussian process on latents (default: the best on the "
    "scoreboard); cannon, that of the original lab (default with --scatter or --order); hidden, "
    "a Cannon with hidden labels; ridge, a straight line",
    "--labels": "teff, logg, fe_h, mg_fe, si_fe, m_h, alpha_m, c_m, n_m "
    "(default: the archive's own)",
    "--fields": "fields to learn from, or 'all' (default: the archive's own)",
    "--product": "apstar: raw flux, normalized here; aspcapstar: normalized by "
    "the survey (default: apstar if there are any)",
    "--continuum-pixels": "pixels for the continuum of apstar spectra: .npy of flags or pixel "
    "numbers, or text, one vacuum wavelength per line (default: the original lab's 529)",
    "--scatter": "fit an intrinsic scatter per pixel, so that pixels that the labels do not "
    "explain weigh less (default: off, as in the original lab)",
    "--folds": "judge in K folds instead: each star is left out once, with all its spectra; "
    "the model itself learns from all",
    "--groups": "a column of the catalogue, such as FIELD: calibrate the errors on stars whose "
    "whole group was left out, so that they hold for a new one (default: on the stars above)",
    "--gaps": "let stars take part that lack some of the labels: latents learn from what is there, "
    "the other models from labels that the spectra complete",
    "--no-refusal": "learn no guard against spectra that no star like the training stars explains",
}
_MASK = (
    "which flagged pixels count, of raw spectra: strict, every flag kills; gentle, what the survey "
    "calls bad kills, doubts such as persistence raise the error; a release, such as dr17; or "
    "'kill=BADPIX,CRPIX raise=PERSIST_LOW:3', with a factor on the error"
)
_ROW = "of apstar files: 0 and 1 are combinations of all visits, 2, 3, … the visits"


def _add_spectra_options(option):
    option("root", metavar="ROOT", help="root of an archive")
    option("--model", required=True, metavar="FILE", help="where the model goes (.asdf)")
    option("--labels", type=_list, metavar="LIST", help=_TRAINED["--labels"])
    option("--fields", type=_fields, metavar="LIST", help=_TRAINED["--fields"])
    option("--product", type=str.lower, choices=_PRODUCTS, help=_TRAINED["--product"])
    option("--continuum-pixels", metavar="FILE", help=_TRAINED["--continuum-pixels"])
    row = f"{_ROW} (default: the combination that the release means)"
    option("--row", type=int, metavar="N", help=row)
    option("--mask", metavar="RULE", help=f"{_MASK} (default: strict)")


# %%
parser = argparse.ArgumentParser()
_add_spectra_options(parser.add_argument)
print(parser.parse_args(["stars", "--model", "m.asdf", "--labels", "teff,m_h", "--row", "0"]))


# %%
#| export
def _add_train(commands):
    parser = _command(
        commands,
        "train",
        _run_train,
        "learn a model from an archive, and say how wrong it is",
        _TRAIN,
        "nothing was written",
    )
    option = parser.add_argument
    _add_spectra_options(option)
    option("--kind", metavar="NAME", help=_TRAINED["--kind"])
    order = "of a Cannon's polynomial in the labels (default: 2)"
    option("--order", type=int, metavar="N", help=order)
    option("--scatter", action="store_true", help=_TRAINED["--scatter"])
    split = parser.add_mutually_exclusive_group().add_argument
    share = "share of the stars left out to judge the model, which learns from the others"
    split("--test-size", type=float, default=0.33, metavar="SHARE", help=share)
    split("--folds", type=int, metavar="K", help=_TRAINED["--folds"])
    option("--groups", type=str.upper, metavar="COLUMN", help=_TRAINED["--groups"])
    option("--gaps", action="store_true", help=_TRAINED["--gaps"])
    option("--no-refusal", action="store_true", help=_TRAINED["--no-refusal"])
    option("--seed", type=int, default=42, metavar="S", help="of the split or the folds")


# %%
show_help(_add_train, "train")

# %% [markdown]
# ### `label`
# A table that was written by a command says by which one, and when. The date is the one thing in it that changes from run to run. Where the same input must give the same bytes, the variable
# [`SOURCE_DATE_EPOCH`](https://reproducible-builds.org/docs/source-date-epoch/) sets it.

# %%
#| export
_LABEL = """
Label stars: read their spectra, treat them as the model's training spectra
were treated, find the labels that fit best. The model is any that this version
can read: one that 'stellar-lab train' wrote, the physics model (.asdf), or a
network (.keras, saved in Python). Where nothing is fitted, chi2 is empty.

PATH is an apStar or aspcapStar file, an apVisit, mwmStar or mwmVisit file, a
spectrum of your own (see 'stellar-lab check --help'), a folder (searched for
apStar and aspcapStar files down to the last one; what is left out is counted)
or the root of an archive.
A model that learned from apStar files takes only these, and the other way
round: their normalizations differ, and so would the labels.

Writes one table, one row per star: apogee_id, each label and its error (teff,
teff_err, ...), covariance, chi2, n_good (pixels), steps, flags, snr, ra, dec,
field, telescope, file. Up to five stars are printed, too. Says whether errors
are calibrated (on stars left out of training) or formal.

flags is a sum, 0 means no reason to doubt: 1 not converged, 2 at the edge of
what the model may say, 4 far from all training stars, 8 poor fit, 16 few
pixels. The guard of a model adds: 32 shifted, 64 broadened, 128 diluted,
256 tilted, 512 a second light, 1024 unusual, 2048 bright lines, and says
velocity, broadening, dilution, tilt, second_light and more in columns.

.fits, .ecsv and .parquet keep units and where the table comes from (model,
date, command; SOURCE_DATE_EPOCH fixes the date). In .parquet a covariance is a
row of numbers, not a matrix. .csv has plain numbers only, the covariance in
columns such as cov_teff_logg. .vot opens in TOPCAT.

Exit code 0 says that every file gave labels, 1 that some did not (each is
named on the error output and, with the reason, in FILE-failed.csv beside the
table). A run that was stopped goes on where it was: give the same command.

Examples:
  stellar-lab label --model giants.asdf apStar-r8-*.fits --out labels.fits
  stellar-lab label --model giants.asdf stars --out labels.parquet
"""

# %%
#| export
_LONGEST = 1000  # characters of a command that a table keeps: a shell may spell out every file


def _notes(words):
    "Command and date, for the meta of a table."
    command = shlex.join(["stellar-lab", *map(str, words)])
    if len(command) > _LONGEST:
        command = f"{command[:_LONGEST]} ... ({len(words)} words)"
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.fromtimestamp(int(seconds), UTC) if seconds.isdigit() else datetime.now(UTC)
    return {"command": command, "date": now.strftime("%Y-%m-%dT%H:%M:%SZ")}


def _write_fits(options, table):
    "The best-fitting spectra and the pictures that were asked for."
    if not (options.spectra or options.plot):
        return
    from stellar_lab.labelling import plot_stars, write_spectra
    from stellar_lab.training import load_model

    model = load_model(options.model)
    if options.spectra:
        write_spectra(model, table, options.spectra, options.row)
        print(f"spectra and residuals: {options.spectra}")
    if options.plot:
        print(
            f"{len(plot_stars(model, table, options.plot, options.row))} pictures: {options.plot}"
        )


def _run_label(options):
    from stellar_lab.labelling import check_draws, check_spectra_target, label
    from stellar_lab.training import load_model

    if options.spectra:
        check_spectra_target(options.spectra, [options.model, *options.paths])
    if options.spectra or options.plot:
        check_draws(load_model(options.model))
    summary = label(
        options.model,
        options.paths,
        options.out,
        any_product=options.any_product,
        row=options.row,
        notes=_notes(options.words),
        progress=_shows_progress() or "lines",
        workers=options.workers,
        mask=options.mask,
    )
    for problem in summary.problems:
        _say(f"no labels: {problem.path}: {problem.reason}")
    _print(summary)
    _write_fits(options, summary.table)
    return 0 if summary.ok else 1


# %%
print(_notes(["label", "my star.fits", "--model", "m.asdf"])["command"])
assert len(_notes(["label", *["star.fits"] * 10_000])["command"]) < 1100

# %%
#| export
_MODEL = "a model: what 'stellar-lab train' wrote or Python saved (.asdf), or a network (.keras)"


def _add_label(commands):
    parser = _command(
        commands,
        "label",
        _run_label,
        "labels of stars from their files",
        _LABEL,
        "the table was not written; finished batches are kept, run the same again to go on",
    )
    option = parser.add_argument
    option("paths", nargs="+", metavar="PATH", help="files, folders, or the root of an archive")
    option("--model", required=True, metavar="FILE", help=_MODEL)
    out = "where the table goes: .fits, .ecsv, .parquet, .csv or .vot"
    option("--out", required=True, metavar="FILE", help=out)
    anything = "take files of the other product, too, although their labels are biased"
    option("--any-product", action="store_true", help=anything)
    row = f"{_ROW} (default: as the model learned)"
    option("--row", type=int, metavar="N", help=row)
    option("--mask", metavar="RULE", help=f"{_MASK} (default: as the model learned)")
    workers = "processes that read and label; the table does not depend on how many"
    option("--workers", type=int, default=1, metavar="N", help=workers)
    best = "write each star's best-fitting spectrum and residual (.fits, 5,000 stars at most)"
    option("--spectra", metavar="FILE", help=best)
    option("--plot", metavar="FOLDER", help="write a picture of each star with its model")


# %%
show_help(_add_label, "label")
assert _notes(["label", "my star.fits"])["command"] == "stellar-lab label 'my star.fits'"

# %% [markdown]
# ## check, repeats
# Two commands that look before anyone believes: is a spectrum of one's own fit for labels, and do the labels of single visits scatter as the errors say?

# %%
#| export
_CHECK = """
Is a spectrum of your own fit for labels? Prints a verdict (ok, look, bad) on
its grid, bad pixels, air or vacuum, velocity, resolution, continuum and errors,
and what to do. FILE is text (.csv, .txt, ...), a FITS table or a FITS image of
one axis, on any grid, in Angstrom, nm or micron; or a file of the survey.
Columns are wavelength, flux, error (or ivar). In text, comments such as

  # velocity: -12.3
  # resolution: 11000
  # air: yes

say what the numbers cannot; the options below override them. The model draws
the spectra, or the guard beside it where it draws none.
'stellar-lab label' reads the same files.

Exit code 0 says that nothing is bad, 1 that something is.

Example:
  stellar-lab check my.csv --model giants.asdf --plot check.png
"""


_PICTURES = (".png", ".pdf", ".svg")


def _run_check(options):
    from stellar_lab.labelling import read_star
    from stellar_lab.spectrum import check_star, plot_check
    from stellar_lab.survey import atomic_path
    from stellar_lab.training import check_target, load_model

    if options.plot:
        inputs = [options.file, options.model]
        check_target(options.plot, _PICTURES, "the picture", inputs, [b"matplotlib"])
    model = load_model(options.model)
    said = {"velocity": options.velocity, "resolution": options.resolution, "unit": options.unit}
    said = {name: value for name, value in said.items() if value is not None}
    said |= {"air": True} if options.air else {}
    check = check_star(model, read_star(options.file, **said))
    print(check)
    if options.plot:
        with atomic_path(options.plot) as temporary:
            plot_check(check).savefig(temporary, dpi=120)
        print(f"picture: {options.plot}")
    return 0 if check.ok else 1


def _add_check(commands):
    parser = _command(
        commands,
        "check",
        _run_check,
        "is a spectrum of your own fit for labels?",
        _CHECK,
        "nothing was lost",
    )
    option = parser.add_argument
    option(
        "file",
        metavar="FILE",
        help="the spectrum: text, FITS table or image, or a file of the survey",
    )
    option("--model", required=True, metavar="FILE", help=_MODEL)
    option("--velocity", type=float, metavar="V", help="of the star, km/s (default: measured)")
    option("--resolution", type=float, metavar="R", help="wavelength over FWHM of a narrow line")
    option("--unit", metavar="NAME", help="of the wavelengths (default: guessed)")
    option("--air", action="store_true", help="the wavelengths are in air (default: vacuum)")
    option("--plot", metavar="FILE", help="write a picture, such as check.png")


# %%
def understood(add, words):
    "What the parser of one command makes of words."
    parser = argparse.ArgumentParser("stellar-lab")
    add(parser.add_subparsers(prog="stellar-lab"))
    options = vars(parser.parse_args(shlex.split(words)))
    return {name: value for name, value in options.items() if name not in ("run", "interrupted")}


print(understood(_add_check, "check my.csv --model giants.asdf --velocity -12.3"))

# %%
#| export
_REPEATS = """
The test of repeats: label the single visits of stars, and compare their scatter
with the errors, per label and range of signal-to-noise ratio. PATH is an apStar
file of several visits (rows 2 and on), an apVisit file, or a folder of these.

Formal errors, photon noise alone, should meet the scatter (ratio 1). Quoted
errors, if calibrated, hold what is wrong with the model in all visits alike,
too, and must be larger (ratio below 1).

Exit code 0 says that every file had visits, 1 that some had none.

Example:
  stellar-lab repeats --model giants.asdf stars/dr14 --out repeats.fits
"""


def _run_repeats(options):
    from stellar_lab.survey import TABLE_FORMATS, write_table
    from stellar_lab.training import check_target, load_model
    from stellar_lab.visits import find_visits, repeats

    files = find_visits(options.paths)[: options.limit]
    if options.out:
        inputs = [options.model, *files]
        check_target(options.out, tuple(TABLE_FORMATS), "a table", inputs, [b"formal_"])
    found = repeats(load_model(options.model), files)
    print(found)
    if options.out:
        write_table(found.visits, options.out)
    return 1 if found.problems else 0


def _add_repeats(commands):
    parser = _command(
        commands,
        "repeats",
        _run_repeats,
        "do labels of a star's visits scatter as the errors say?",
        _REPEATS,
        "nothing was written",
    )
    option = parser.add_argument
    option("paths", nargs="+", metavar="PATH", help="apStar or apVisit files, or folders")
    option("--model", required=True, metavar="FILE", help=_MODEL)
    option("--limit", type=int, metavar="N", help="so many files at most (default: all)")
    option("--out", metavar="FILE", help="write the labels of each visit (.fits, .ecsv, .parquet)")


# %%
print(understood(_add_repeats, "repeats stars --model giants.asdf --limit 20"))

# %% [markdown]
# ## judge
# A third command asks whether a model of one's own is better than those of this book, [in the same contests](23_board.ipynb).

# %%
#| export
_JUDGE = """
Enter the contests of this project with a model of your own. With --write, two
files go into FOLDER: folds.csv says which star is left out when, and
garbage.fits holds spectra that a good model flags. Train without each fold,
label its stars, and score the one table that comes of it: apogee_id, labels in
lower case and, if there are any, their errors (teff_err, ...), flags, and the
name of the contest.

Prints a row per contest and label: RMSE in the label's unit and in units of its
spread, bias, how many stars are missing, the share with a flag, the shares
within one and two stated errors (0.68 and 0.95 would be right).

Examples:
  stellar-lab judge stars --write contest
  stellar-lab judge stars mine.csv
"""


def _run_judge(options):
    from stellar_lab.board import (
        judge_predictions,
        published_folds,
        read_predictions,
        write_contest,
    )
    from stellar_lab.survey import TABLE_FORMATS, LabError, write_table
    from stellar_lab.training import check_target

    if options.write is None and options.predictions is None:
        raise LabError("nothing to do: give a table of predictions, or --write FOLDER")
    if options.out:
        inputs = [options.predictions] if options.predictions else []
        check_target(options.out, tuple(TABLE_FORMATS), "the scores", inputs, [b"inside_1"])
    if options.write is not None:
        for path in write_contest(options.root, options.write, options.product):
            _print(f"wrote {path}")
    if options.predictions is None:
        return 0
    predictions = read_predictions(options.predictions)
    _, held = published_folds(options.root, options.product)
    table = judge_predictions(predictions, held)
    _print("\n".join(table.pformat(max_lines=-1, max_width=-1)))
    if options.out:
        write_table(table, options.out)
    return 1 if any(table["missing"] > 0) else 0


def _add_judge(commands):
    parser = _command(
        commands,
        "judge",
        _run_judge,
        "score a table of predictions as this project's models are scored",
        _JUDGE,
        "nothing was written",
    )
    option = parser.add_argument
    option("root", metavar="ROOT", help="root of an archive")
    option("predictions", nargs="?", metavar="PREDICTIONS", help="a table: .csv, .fits, .ecsv")
    option("--write", metavar="FOLDER", help="write the folds and the garbage")
    option("--product", type=str.lower, choices=_PRODUCTS, help="default: the archive's first")
    option("--out", metavar="FILE", help="write the scores (.fits, .ecsv, .parquet)")


# %%
print(understood(_add_judge, "judge stars mine.csv"))

# %% [markdown]
# ## report
# And what is this file?

# %%
#| export
_REPORT = """
Say what a model is (labels, terms, stars, pixels, errors, versions) and, from
the record beside it, how it was trained: ledger and tables of errors.

Example:
  stellar-lab report --model giants.asdf
"""


def _run_report(options):
    from stellar_lab.training import describe

    _print(describe(options.model))
    return 0


def _add_report(commands):
    parser = _command(
        commands,
        "report",
        _run_report,
        "what a model is, and how wrong",
        _REPORT,
        "nothing was lost",
    )
    parser.add_argument("--model", required=True, metavar="FILE", help=_MODEL)


# %%
show_help(_add_report, "report")

# %% [markdown]
# ## All commands
# One parser holds them.

# %%
#| export
_OVERVIEW = """
Labels of stars (temperature, gravity, abundances) from their APOGEE spectra:
bring an archive of spectra home, train a model on it, label stars with it.

A first run, without a network, in a few minutes:
  stellar-lab archive clusters stars
  stellar-lab train stars --model giants.asdf --scatter
  stellar-lab label --model giants.asdf stars --out labels.fits
"""

_AFTERWORD = """
'stellar-lab COMMAND --help' explains a command and all of its options.
Exit codes: 0 all is well, 1 done but something is missing (it says what),
2 an error, 130 interrupted, 143 or 129 ended by SIGTERM or SIGHUP.
With --debug an error shows where in the program it came up.
"""


def _make_parser() -> argparse.ArgumentParser:
    "The parser of all commands."
    parser = argparse.ArgumentParser(
        "stellar-lab",
        description=_OVERVIEW.strip(),
        epilog=_AFTERWORD.strip(),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help=_DEBUG)
    parser.add_argument("--version", action="version", version=f"stellar_lab {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", prog="stellar-lab")
    for add in (
        _add_archive,
        _add_fetch,
        _add_train,
        _add_label,
        _add_check,
        _add_repeats,
        _add_judge,
        _add_report,
    ):
        add(commands)
    return parser


# %%
options = _make_parser().parse_args(["train", "stars", "--model", "m.asdf", "--labels", "teff,m_h"])
print(options.run.__name__, options.labels, options.order, options.row)

# %% [markdown]
# ## Run it
# What a user can mend is one line on the error output, without a traceback. What we did wrong keeps its traceback: somebody has to mend it.

# %%
#| export
_WAYS_OUT = {  # what a system says -> what to do
    errno.ENOSPC: "make room, or choose another folder",
    errno.EDQUOT: "make room, or choose another folder",
    errno.EROFS: "choose another folder",
    errno.EACCES: "choose another, or change who may use it",
    errno.EPERM: "choose another, or change who may use it",
    errno.EMFILE: "close other programs, or raise the limit (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOMEM: "close other programs, or take fewer files at a time",
}


def _of_system(error):
    "What the system says of a file, and a way out."
    if error.errno == errno.ENOENT and _without_folder():
        return "the current folder was removed: change to one that exists (cd), run the same again"
    said = error.strerror or next(iter(str(error).splitlines()), "") or type(error).__name__
    said = re.sub(r"\[Errno \d+\] ", "", said)
    said += f": {error.filename}" if error.filename else ""
    number = errno.ENOSPC if "space on disk" in said else error.errno
    return f"{said}; {_WAYS_OUT[number]}" if number in _WAYS_OUT else said


def _without_folder():
    "Was the folder in which the command runs removed?"
    try:
        os.getcwd()
    except OSError:
        return True
    return False


def _in_words(error):
    "An exception as one line that names a way out."
    if any(kind.__name__ == "LabError" for kind in type(error).__mro__):
        return str(error)
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return f"not enough memory; {_WAYS_OUT[errno.ENOMEM]}"
    if isinstance(error, OSError):
        return _of_system(error)
    said = next(iter(str(error).splitlines()), "")
    return (
        f"a mistake of stellar_lab itself ({type(error).__name__}: {said}): run the same with "
        "--debug, and report what it says"
    )


# %%
print(_in_words(OSError(errno.ENOSPC, "No space left on device", "x/labels.fits")))
print(_in_words(ZeroDivisionError("division by zero")))


# %%
#| export
class _Stopped(KeyboardInterrupt):
    "The process was told to end by a signal other than Ctrl-C."


_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _stop(number, frame):
    raise _Stopped(number)


@contextlib.contextmanager
def _signals_answered():
    "SIGTERM and SIGHUP are answered like Ctrl-C: what is half done goes, and one line is said."
    answered = []
    if threading.current_thread() is threading.main_thread():
        answered = [one for one in _SIGNALS if signal.getsignal(one) == signal.SIG_DFL]
    for number in answered:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in answered:
            signal.signal(number, signal.SIG_DFL)


_LEAST_MEMORY = 800_000_000  # bytes; with less, libraries below us end the process by themselves


def _lacks_memory():
    "Is this process allowed less memory than it needs?"
    try:
        import resource
    except ImportError:  # Windows
        return False
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    return allowed not in (resource.RLIM_INFINITY, -1) and allowed < _LEAST_MEMORY


# %%
try:
    with _signals_answered():
        signal.raise_signal(signal.SIGTERM)
except _Stopped as stop:
    print("stopped by", signal.Signals(stop.args[0]).name)
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not _lacks_memory()


# %%
#| export
def _run(options):
    "Run a command; whatever goes wrong becomes one line."
    try:
        with _signals_answered():
            return options.run(options)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if isinstance(stop, _Stopped) else signal.SIGINT
        _say(f"\nstellar-lab: interrupted: {options.interrupted}")
        return 128 + number
    except BrokenPipeError:
        raise
    except _Unprinted as error:
        _silence(sys.stdout)
        _say(f"stellar-lab: cannot print the result: {error}; {_PRINTED}")
        return 1
    except Exception as error:
        if options.debug:
            _say(traceback.format_exc().rstrip())
        _say(f"stellar-lab: {_in_words(error)}")
        return 2


def _main(words):
    "Understand the words and run the command that they name."
    parser = _make_parser()
    try:
        options = parser.parse_args(words)
    except SystemExit as stop:  # --help, --version, and words that argparse does not take
        return stop.code or 0
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    options.words = words
    if _lacks_memory():
        _say("stellar-lab: not enough memory: allow 1 GB (ulimit -v 1000000)")
        return 2
    return _run(options)


# %% [markdown]
# A command may be started without a place to print to, or with a full one: by a timer, in a pipeline, on a full disk. What it was asked to do it does; what could not be printed is said where there is still a place.

# %%
#| export
def _stand_ins():
    "Give closed standard streams a stand-in, before a file gets their number; was output closed?"
    closed = []
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            closed.append(name)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # names of files may hold bytes that are no letters
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    return "stdout" in closed


def _output_fails():
    "Can what was printed not be written? Then it is said, and the rest goes nowhere."
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _silence(sys.stdout)
        _say(f"stellar-lab: cannot print the result: {_of_system(error)}; {_PRINTED}")
        return True
    return False


_PRINTED = "files that were to be written are written. Send the output elsewhere (> FILE)"

# %%
assert _main(["--version"]) == 0 and not _output_fails()
print("words that are no command:", _main([]))


# %%
#| export
def main(argv: list = None) -> int:
    """The command `stellar-lab`.

    Parameters
    ----------
    argv : list of str, optional
        words after the command's name; those of the process by default

    Returns
    -------
    int
        exit code: 0 all is well, 1 done but something is missing (such as a place to print to),
        2 an error, 130 interrupted, 143 and 129 ended by SIGTERM and SIGHUP
    """
    closed = _stand_ins()
    try:
        with warnings.catch_warnings():
            # A library's remark about the machine, which changes nothing here.
            warnings.filterwarnings("ignore", message=".*joblib will operate in serial mode")
            code = _main(sys.argv[1:] if argv is None else argv)
        if closed:
            _say(f"stellar-lab: standard output is closed; {_PRINTED}")
        return max(code, 1) if closed or _output_fails() else code
    except BrokenPipeError:  # the reader has seen enough, as in `stellar-lab report … | head`
        _silence(sys.stdout)
        return 0


# %% [markdown]
# `python -m stellar_lab` and `python -m stellar_lab.cli` do the same where the command is not on the path. Names that lived in this module once are still found here; their rooms open when somebody asks.

# %%
#| export
_MOVED = {
    "train": "training",
    "TrainingReport": "training",
    "describe": "training",
    "load_model": "training",
    "label": "labelling",
    "LabelSummary": "labelling",
    "find_spectra": "labelling",
    "write_labels": "labelling",
}


def __getattr__(name):
    "A name that lived here once, from its new room."
    if name in _MOVED:
        return getattr(import_module(f"stellar_lab.{_MOVED[name]}"), name)
    raise AttributeError(f"module 'stellar_lab.cli' has no attribute {name!r}")


if __name__ == "__main__" and globals().get("__spec__"):  # python -m, and no notebook
    sys.exit(main())

# %%
assert __getattr__("train") is train
with contextlib.redirect_stderr(io.StringIO()) as said:
    assert main(["dance"]) == 2
assert "invalid choice: 'dance'" in said.getvalue()

# %% [markdown]
# ## At the keyboard
# From here on we type. `shell` runs a command as the terminal would, in a folder of its own, and shows what it prints: results, then what went to the error output, then the exit code, which is all that a script looks at.

# %%
scratch = tempfile.TemporaryDirectory()
ROOT = archive_root()
HERE = Path(scratch.name)
PLACE = shlex.quote(str(ROOT))


def shell(words):
    "Run `stellar-lab` with these words; returns the exit code and what it printed."
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.chdir(HERE), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(shlex.split(words))
    return code, out.getvalue(), err.getvalue()


def show(words, lines=45):
    "The same, printed as a terminal shows it, cut after so many lines."
    code, out, err = shell(words)
    print(f"$ stellar-lab {words}", *(out + err).splitlines()[:lines], sep="\n")
    print(f"[exit code {code}]")
    return code


# %%
assert show("--help") == 0

# %% [markdown]
# Asking for help must not load the whole package. We ask a fresh Python which packages came along.

# %%
heavy = "{'numpy', 'astropy', 'matplotlib'}"
question = (
    "import sys, stellar_lab.cli as cli; cli.main(['--help']); "
    f"print(*({heavy} & set(sys.modules)))"
)
said = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=True)
assert said.stdout.splitlines()[-1] == "" and "commands:" in said.stdout

# %% [markdown]
# ### A small archive, and its copy
# Twelve of the embedded stars, with all the planted flaws. The second command would bring one of its fields to another folder, as it does from the survey's server, and lists what would come.

# %%
assert show("archive clusters twelve --stars 12") == 0
stars = HERE / "twelve/dr14/apogee/spectro/redux/r8/stars/apo25m"
folders = sorted(path.name for path in stars.iterdir())

# %%
both = "--product apstar,aspcapstar"
assert show(f"fetch copy --from twelve --fields {folders[0]} {both} --dry-run") == 0
assert not (HERE / "copy").exists()

# %%
everything = f"fetch copy --from twelve --fields {','.join(folders)}"
assert show(everything) == 1

# %%
code, out, err = shell(everything)
assert code == 1 and "0 fetched" not in out and "already there" in out

# %% [markdown]
# The damaged files of this archive are damaged where they come from. Nothing wrong gets a file's name here, and exit code 1 tells a script that not everything is there. What is whole was not fetched twice.

# %% [markdown]
# ### Train
# On the archive at hand, with three of its labels (all of them where `--labels` is not given). First come the stars: how many files there were, which rule took how many, who is left. Then what the model is worth, on the stars it learned from and on those it did not.

# %%
three = archive_record(ROOT).labels[:3]
TRAIN = f"train {PLACE} --scatter --labels {','.join(three).lower()}"
assert show(f"{TRAIN} --model giants.asdf") == 0

# %% [markdown]
# ### The same in ten lines of Python
# The command calls what the chapters built. To change a step, call these functions yourself. It is also a test: this other way must give the same numbers.

# %%
# files -> normalized spectra with labels
spectra, ledger = training_set(ROOT, labels=three, progress=False)
train_rows, test_rows = train_test_rows(len(spectra))
model = Cannon(scatter=True).fit(spectra[train_rows])  # labels -> spectrum
table = infer(model, spectra[test_rows])  # spectrum -> labels
truth = spectra[test_rows].labels(model.label_names_)
errors = error_table(table, truth, model.label_names_, model.scales_)
calibrated = with_error_model(model, table, truth)
calibrated.save(HERE / "model.asdf")
write_table(infer(calibrated, spectra[test_rows]), HERE / "test_stars.ecsv")
errors

# %%
report = TrainingReport.load(HERE / "giants.json")
names = list(model.label_names_)
difference = label_values(table, names) - truth
kept = report.errors["test stars"]
assert list(kept["label"]) == names
assert np.allclose(kept["rmse"], np.sqrt(np.mean(difference**2, axis=0)), rtol=1e-6)
assert np.allclose(kept["bias"], difference.mean(axis=0), rtol=1e-6, atol=1e-9)
assert report.ledger == ledger and report.facts["model"]["digest"] == model.training_digest_

# %% [markdown]
# Each command is one function, too: `train` does what `stellar-lab train` did. Its record names every star and its fate, and holds nothing that changes from run to run: made again, it is the same to the last letter,
# and so is the model. (Here without [the guard](18_refusal.ipynb), which takes most of the time and has no part in the labels.)

# %%
assert shell(f"{TRAIN} --model plain/giants.asdf --no-refusal")[0] == 0
plain = {"scatter": True, "refusal": False, "progress": False}
again = train(ROOT, HERE / "again/giants.asdf", three, **plain)
assert (HERE / "again/giants.json").read_text() == (HERE / "plain/giants.json").read_text()
assert np.array_equal(again.model.theta_, Cannon.load(HERE / "giants.asdf").theta_, equal_nan=True)

# %%
sets = report.facts["stars"]
assert len(sets["training stars"]) + len(sets["test stars"]) == report.ledger.left
assert not set(sets["training stars"]) & set(sets["test stars"])
for step in report.ledger.steps:
    if step.stars:
        print(f"{step.stars[0]}: {report.ledger.why(step.stars[0])}")

# %% [markdown]
# ### Label
# Every spectrum below the archive's root. Stars that the ledger had dropped for their labels or their kind are labelled, too: for a spectrum we need no catalogue. The exit code is 1 where an archive holds damaged files.

# %%
assert show(f"label --model giants.asdf {PLACE} --out labels.fits", lines=7) in (0, 1)

# %%
labels = QTable.read(HERE / "labels.fits")
columns = [f"{name.lower()}{end}" for name in names[:3] for end in ("", "_err")]
for name in columns:
    labels[name].info.format = ".4g"
labels["apogee_id", *columns, "n_good", "flags"].pprint(max_lines=12, max_width=120)
assert labels.meta["ERRORS"] == "calibrated" and labels.meta["MODEL"] == "giants.asdf"
assert labels.meta["COMMAND"].startswith("stellar-lab label --model giants.asdf")

# %% [markdown]
# Are these the labels that the notebook's way gives? The command read files one batch after another and knew nothing of a training set; the test stars above were normalized all together. Star by star, both must agree
# far within the errors.

# %%
counted = np.unique(labels["apogee_id"].astype(str), return_index=True, return_counts=True)
ids, first, count = counted
place = dict(zip(ids[count == 1], first[count == 1]))  # a star may have been observed in two fields
here = [row for row, name in enumerate(table["apogee_id"]) if name in place]
rows = [place[name] for name in table["apogee_id"][here]]
for name in (name.lower() for name in names):
    shift = np.abs(labels[name][rows] - table[name][here]) / labels[f"{name}_err"][rows]
    assert np.median(shift) < 1e-6 and np.max(shift) < 0.1
    assert labels[name].unit == table[name].unit

# %% [markdown]
# ### What can go wrong, and what it says
# A spectrum of the other product, a label that nobody knows, a model that is none: each is one line and exit code 2, before any work is done.

# %%
product = report.facts["product"]
other = "aspcapStar" if product == "apstar" else "apStar"
stranger = next(HERE.glob(f"twelve/**/{other}-*.fits")).relative_to(HERE)
refused = f"the model learned from {product} files"
mistakes = {
    f"label --model giants.asdf {stranger} --out x.fits": refused,
    f"train {PLACE} --model m.asdf --labels teff,mass": "unknown label 'mass': choose from TEFF",
    f"train {PLACE} --model model.pkl": "its extension must be .asdf",
    "train nowhere --model m.asdf": "there is no folder nowhere",
    "label --model giants.json twelve --out x.fits": "giants.json is not a model of stellar_lab",
}
for words, message in mistakes.items():
    code, out, err = shell(words)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err, err
print(err)

# %% [markdown]
# A damaged file stops nothing. It is named, and the exit code 1 tells a script that not everything is there. One star was labelled, so its labels are shown.

# %%
good = labels["flags"] == 0
whole = Path(str(labels["file"][good][0]))
broken = HERE / "mixed" / whole.name.replace("Star-", "Star-broken-")
broken.parent.mkdir()
(HERE / "mixed" / whole.name).write_bytes(whole.read_bytes())
broken.write_bytes(whole.read_bytes()[:100_000])
assert show("label --model giants.asdf mixed --out mixed.csv") == 1
assert len(QTable.read(HERE / "mixed.csv")) == 1

# %% [markdown]
# ### Report
# A year later somebody finds `giants.asdf`. What is it?

# %%
assert show("report --model giants.asdf", lines=20) == 0

# %%
scratch.cleanup()

# %% [markdown]
# **Exercise.** Train once with `--seed 42` and once with `--seed 7`, each with its third of the stars left out. By how much do the tables differ? Then with `--folds 5` and both seeds: why do the tables agree better now,
# and which of them would you publish?
