# %% [markdown]
# # How do we do it without a notebook?
# > The lab as five commands: an archive of spectra comes home, a model is trained and judged, stars get their labels.
#
# **Question.** A notebook is for understanding. Once we understand, we have ten thousand files and want their labels tonight, from a terminal or a
# script, and next year we want to know how they came about. What is the shortest way that loses nothing?
#
# **Idea.** Each command is one function and one file that it leaves behind:
#
# | command | takes | leaves |
# |---|---|---|
# | `stellar-lab archive` | nothing | a folder of real stars in the survey's own files |
# | `stellar-lab fetch` | a URL or a folder | the same tree at home |
# | `stellar-lab train` | an archive | a model, and beside it a record of how it was made and how wrong it is |
# | `stellar-lab label` | a model, spectra | a table of labels |
# | `stellar-lab report` | a model | what its record says |
#
# You learn what must travel with a model so that somebody else can use it: not only its coefficients, but how its spectra were treated.

# %%
#| default_exp cli

# %%
#| export
import argparse
import os
import shutil
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from stellar_lab import __version__

# %% [markdown]
# The module imports almost nothing. numpy, astropy and the plotting packages take seconds to load, and whoever asks for `--help` should not wait for
# them; so each function below asks for what it needs when it is called.

# %%
#| hide
import contextlib
import io
import shlex
import subprocess
import tempfile

import matplotlib.pyplot as plt
import numpy as np
from astropy.table import QTable
from IPython.display import Markdown

from stellar_lab.cannon import Cannon
from stellar_lab.clean import read_archive
from stellar_lab.inversion import infer
from stellar_lab.judging import error_table, with_error_model
from stellar_lab.labelling import label
from stellar_lab.models import train_test_rows
from stellar_lab.normalize import as_trained, normalize, training_set
from stellar_lab.survey import LABELS, archive_root, use_style, write_table
from stellar_lab.training import TrainingReport, train

# %% [markdown]
# ## The commands
# A command is a description for `--help`, its options, and a function of a few lines that calls the one above. The help is the first thing that a
# newcomer reads, so every command says what it does, what it writes where, and shows an example.

# %%
#| export
ARCHIVE_WRITERS = {
    "clusters": ("archives", "write_clusters"),
    "mock": ("mock", "write_mock"),
}  # name -> module and function of stellar_lab
PRODUCT_NAMES = ("apstar", "aspcapstar")


def _list(text):
    "A comma separated list."
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise argparse.ArgumentTypeError("an empty list: name something, with commas between")
    return parts


def _product_list(text):
    names = [name.lower() for name in _list(text)]
    for name in names:
        if name not in PRODUCT_NAMES:
            raise argparse.ArgumentTypeError(
                f"unknown product {name!r}: choose from {', '.join(PRODUCT_NAMES)}"
            )
    return names


def _fields(text):
    return "all" if text.strip().lower() == "all" else _list(text)


class _Help(argparse.RawDescriptionHelpFormatter):
    "Keeps the lines of descriptions, and shows defaults."

    def __init__(self, prog):
        super().__init__(
            prog, max_help_position=26, width=min(shutil.get_terminal_size().columns - 2, 100)
        )

    def _get_help_string(self, action):
        shown = (
            action.option_strings
            and action.default not in (None, False, argparse.SUPPRESS)
            and "default" not in action.help
        )
        return f"{action.help} (default: {action.default})" if shown else action.help


@contextmanager
def _command(commands, name, run, summary, text, interrupted):
    "One command: a line for the list, a text for its own help."
    parser = commands.add_parser(
        name, help=summary, description=text.strip(), formatter_class=_Help, allow_abbrev=False
    )
    parser.set_defaults(run=run, interrupted=interrupted)
    yield parser


# %%
#| export
def _run_archive(options):
    module, function = ARCHIVE_WRITERS[options.name]
    writer = getattr(import_module(f"stellar_lab.{module}"), function)
    print(writer(options.root, seed=options.seed, stars=options.stars, progress=_shows_progress()))
    return 0


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
    )
    if options.dry_run:
        for item in summary.items:
            print(f"{item.state:<13} {'?' if item.size is None else item.size:>12}  {item.path}")
    print(summary)
    return 0 if summary.ok else 1


def _run_train(options):
    from stellar_lab.training import train

    report = train(
        options.root,
        options.model,
        labels=options.labels,
        fields=options.fields,
        product=options.product,
        continuum_pixels=options.continuum_pixels,
        order=options.order,
        scatter=options.scatter,
        test_size=options.test_size,
        folds=options.folds,
        seed=options.seed,
        progress=_shows_progress(),
    )
    print(report)
    record = Path(options.model).with_suffix(".json")
    print(
        f"\nmodel   {options.model}\nrecord  {record} (which star fell to which rule, and all of the above)"
    )
    return 0


def _run_label(options):

    summary = label(
        options.model,
        options.paths,
        options.out,
        any_product=options.any_product,
        progress=_shows_progress(),
    )
    for problem in summary.problems:
        print(f"no labels: {problem.path}: {problem.reason}", file=sys.stderr)
    print(summary)
    return 0 if summary.ok else 1


def _run_report(options):
    from stellar_lab.training import describe

    print(describe(options.model))
    return 0


def _shows_progress():
    return sys.stderr.isatty()


# %%
#| export
_OVERVIEW = """
Labels of stars (temperature, gravity, abundances) from their APOGEE spectra:
bring an archive of spectra home, train The Cannon on it, label stars with it.

A first run, without a network, in a few minutes:
  stellar-lab archive clusters stars
  stellar-lab train stars --model giants.asdf --scatter
  stellar-lab label --model giants.asdf stars --out labels.fits
"""

_AFTERWORD = """
'stellar-lab COMMAND --help' explains a command and all of its options.
Exit codes: 0 all is well, 1 done but something is missing (it says what),
2 an error, 130 interrupted.
"""

_ARCHIVE = """
Write an archive of stars that stellar_lab carries: spectra, catalogue and
all, in the survey's own files and folders. No network is needed.

  clusters   553 real giants and dwarfs of 18 star clusters and the Pleiades
             (SDSS DR10), as apStar and as aspcapStar files of DR14, some 600
             stars with the copies that carry planted flaws; 0.9 GB
  mock       2,723 synthetic giants in four fields, with the survey's noise,
             masks and label errors, a few dwarfs and binaries among them;
             truth.fits knows their true labels; 3 GB

The same seed gives the same bytes. An archive that is there already stays.

Examples:
  stellar-lab archive clusters stars
  stellar-lab archive mock made --stars 600
"""

_FETCH = """
Fetch fields of the survey, or of any archive, into the folder ROOT: the
catalogue once, and the spectra of the fields, in the survey's own tree. What
is there and whole stays, what has begun goes on, so a broken run is simply
run again. Nothing half or wrong is ever left under a file's name.

Exit code 0 says that all is there, 1 that something is missing.

Examples:
  stellar-lab fetch stars --from https://data.sdss.org/sas --fields 4230,4262
  stellar-lab fetch stars --from https://data.sdss.org/sas --release dr17 \\
      --fields N2420 --product apstar,aspcapstar --dry-run
  stellar-lab fetch copy --from /data/apogee
"""

_TRAIN = """
Train The Cannon on the stars of an archive: read the spectra, join them with
the catalogue's labels, drop what the archive's cuts drop, normalize, fit; then
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

_LABEL = """
Label stars: read their spectra, treat them as the model's training spectra
were treated, find the labels that fit best. The model is a Cannon's file
(.asdf) or a network's (.keras, saved in Python; its chi2 is empty).

PATH is an apStar or aspcapStar file, a folder (searched for such files down
to the last one, files of single visits left out) or the root of an archive.
A model that learned from apStar files takes only these, and the other way
round: their normalizations differ, and so would the labels.

Writes one table, a row a star: apogee_id, each label and its error (teff,
teff_err, ...), covariance, chi2, n_good (pixels), steps, flags, file.
flags is a sum, 0 means no reason to doubt: 1 not converged, 2 at the edge of
what the model may say, 4 far from all training stars, 8 poor fit, 16 few
pixels. In .parquet a covariance is a row of numbers, not a matrix.

Exit code 0 says that every file gave labels, 1 that some did not (each is
named on the error output).

Examples:
  stellar-lab label --model giants.asdf apStar-r8-*.fits --out labels.fits
  stellar-lab label --model giants.asdf stars --out labels.parquet
"""

_REPORT = """
Say what a model is (labels, terms, stars, pixels, errors, versions) and, from
the record beside it, how it was trained: ledger and tables of errors.

Example:
  stellar-lab report --model giants.asdf
"""


# %%
#| export
def _add_archive(commands):
    with _command(
        commands,
        "archive",
        _run_archive,
        "write an archive of real or synthetic stars, no network needed",
        _ARCHIVE,
        "nothing was written",
    ) as parser:
        parser.add_argument(
            "name",
            metavar="NAME",
            choices=ARCHIVE_WRITERS,
            help=f"which archive: {', '.join(ARCHIVE_WRITERS)}",
        )
        parser.add_argument(
            "root", metavar="ROOT", help="folder to write; must not exist, or be empty"
        )
        parser.add_argument("--stars", type=int, metavar="N", help="so many stars instead of all")
        parser.add_argument(
            "--seed",
            type=int,
            default=42,
            metavar="S",
            help="of what is drawn: noise, visits, flaws, synthetic stars",
        )


def _add_fetch(commands):
    with _command(
        commands,
        "fetch",
        _run_fetch,
        "bring fields of the survey, or an archive, home",
        _FETCH,
        "what is whole stays, what has begun goes on: run the same again",
    ) as parser:
        parser.add_argument("root", metavar="ROOT", help="folder that the archive goes to")
        parser.add_argument(
            "--from",
            dest="source",
            required=True,
            metavar="SOURCE",
            help="URL or folder of the archive to fetch from",
        )
        parser.add_argument(
            "--release",
            metavar="NAME",
            help="dr10, dr14, dr16 or dr17 (default: the archive's own; dr14 for the survey)",
        )
        parser.add_argument(
            "--fields",
            type=_list,
            metavar="LIST",
            help="location IDs up to DR14, names since DR16 (default: the archive's own; "
            "the lab's four for the survey)",
        )
        parser.add_argument(
            "--product",
            type=_product_list,
            default="apstar",
            metavar="LIST",
            help="apstar, aspcapstar or both",
        )
        parser.add_argument(
            "--telescope",
            type=_list,
            metavar="LIST",
            help="apo25m, lco25m, apo1m (default: all of the release)",
        )
        parser.add_argument("--workers", type=int, default=4, metavar="N", help="downloads at once")
        parser.add_argument(
            "--dry-run", action="store_true", help="only list what would be fetched"
        )


def _add_train(commands):
    with _command(
        commands,
        "train",
        _run_train,
        "learn a model from an archive, and say how wrong it is",
        _TRAIN,
        "nothing was written",
    ) as parser:
        parser.add_argument("root", metavar="ROOT", help="root of an archive")
        parser.add_argument(
            "--model", required=True, metavar="FILE", help="where the model goes (.asdf)"
        )
        parser.add_argument(
            "--labels",
            type=_list,
            metavar="LIST",
            help="teff, logg, fe_h, mg_fe, si_fe, m_h, alpha_m, c_m, n_m (default: "
            "the archive's own)",
        )
        parser.add_argument(
            "--fields",
            type=_fields,
            metavar="LIST",
            help="fields to learn from, or 'all' (default: the archive's own)",
        )
        parser.add_argument(
            "--product",
            type=str.lower,
            choices=PRODUCT_NAMES,
            help="apstar: raw flux, normalized here; aspcapstar: normalized by "
            "the survey (default: apstar if there are any)",
        )
        parser.add_argument(
            "--continuum-pixels",
            metavar="FILE",
            help="pixels for the continuum of apstar spectra: .npy of flags or pixel "
            "numbers, or text, a vacuum wavelength a line (default: the lab's 529)",
        )
        parser.add_argument(
            "--order", type=int, default=2, metavar="N", help="of the polynomial in the labels"
        )
        parser.add_argument(
            "--scatter",
            action="store_true",
            help="fit an intrinsic scatter per pixel, so that pixels that the labels do not "
            "explain weigh less (default: off, as in the lab)",
        )
        split = parser.add_mutually_exclusive_group()
        split.add_argument(
            "--test-size",
            type=float,
            default=0.33,
            metavar="SHARE",
            help="share of the stars left out to judge the model, which learns from the others",
        )
        split.add_argument(
            "--folds",
            type=int,
            metavar="K",
            help="judge in K folds instead: each star is left out once; the model itself "
            "learns from all",
        )
        parser.add_argument(
            "--seed", type=int, default=42, metavar="S", help="of the split or the folds"
        )


def _add_label(commands):
    with _command(
        commands,
        "label",
        _run_label,
        "labels of stars from their files",
        _LABEL,
        "nothing was written",
    ) as parser:
        parser.add_argument(
            "paths", nargs="+", metavar="PATH", help="files, folders, or the root of an archive"
        )
        parser.add_argument(
            "--model",
            required=True,
            metavar="FILE",
            help="a model: what 'stellar-lab train' wrote (.asdf), or a network (.keras)",
        )
        parser.add_argument(
            "--out",
            required=True,
            metavar="FILE",
            help="where the table goes: .fits, .ecsv or .parquet",
        )
        parser.add_argument(
            "--any-product",
            action="store_true",
            help="take files of the other product, too, although their labels are biased",
        )


def _add_report(commands):
    with _command(
        commands,
        "report",
        _run_report,
        "what a model is, and how wrong",
        _REPORT,
        "nothing was lost",
    ) as parser:
        parser.add_argument(
            "--model",
            required=True,
            metavar="FILE",
            help="a model: what 'stellar-lab train' wrote (.asdf), or a network (.keras)",
        )


def make_parser() -> argparse.ArgumentParser:
    "The parser of all commands."
    parser = argparse.ArgumentParser(
        "stellar-lab",
        description=_OVERVIEW.strip(),
        epilog=_AFTERWORD.strip(),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"stellar_lab {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", prog="stellar-lab")
    for add in (_add_archive, _add_fetch, _add_train, _add_label, _add_report):
        add(commands)
    return parser


# %% [markdown]
# What a user can mend is one line on the error output, without a traceback. What we did wrong keeps its traceback: somebody has to mend it.

# %%
#| export
def main(
    argv: list = None,  # words after the command's name; those of the process by default
) -> int:  # exit code: 0 all is well, 1 done but something is missing, 2 an error, 130 interrupted
    "The command `stellar-lab`."
    try:
        code = _main(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read us has seen enough, as in `stellar-lab report … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(argv):
    parser = make_parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:  # --help, --version, and words that argparse does not take
        return stop.code or 0
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    try:
        return _run(options)
    except KeyboardInterrupt:
        print(f"\nstellar-lab: interrupted: {options.interrupted}", file=sys.stderr)
        return 130


def _run(options):
    from stellar_lab.survey import LabError

    try:
        return options.run(options)
    except BrokenPipeError:
        raise
    except LabError as error:
        return _fail(error)
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")


def _fail(message):
    print(f"stellar-lab: {message}", file=sys.stderr)
    return 2


# %% [markdown]
# ## At the keyboard
# From here on we type. `shell` runs a command as the terminal would, in a folder of its own, and shows what it prints: results, then what went to the
# error output, then the exit code, which is all that a script looks at.

# %%
scratch = tempfile.TemporaryDirectory()
ROOT, HERE = archive_root(), Path(scratch.name)
PLACE = shlex.quote(str(ROOT))


def shell(words):
    "Run `stellar-lab` with these words; returns the exit code and what it printed."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(HERE), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(shlex.split(words))
    return code, out.getvalue(), err.getvalue()


def show(words, lines=45):
    "The same, printed as a terminal shows it, cut after so many lines."
    code, out, err = shell(words)
    print(
        f"$ stellar-lab {words}", *(out + err).splitlines()[:lines], f"[exit code {code}]", sep="\n"
    )
    return code


# %%
assert show("--help") == 0

# %% [markdown]
# Asking for help must not load the whole lab. We ask a fresh Python which packages came along.

# %%
question = "import sys, stellar_lab.cli as cli; cli.main(['--help']); print(*({'numpy', 'astropy', 'matplotlib'} & set(sys.modules)))"
answer = subprocess.run(
    [sys.executable, "-c", question], capture_output=True, text=True, check=True
).stdout
assert answer.splitlines()[-1] == "" and "commands:" in answer

# %% [markdown]
# ### A small archive, and its copy
# Twelve of the embedded stars, with all the planted flaws. The second command would bring one of its fields to another folder, as it does from the
# survey's server, and lists what would come.

# %%
assert show("archive clusters twelve --stars 12") == 0
folders = sorted(
    path.name for path in HERE.glob("twelve/dr14/apogee/spectro/redux/r8/stars/apo25m/*")
)

# %%
assert (
    show(f"fetch copy --from twelve --fields {folders[0]} --product apstar,aspcapstar --dry-run")
    == 0
)
assert not (HERE / "copy").exists()

# %%
assert show(f"fetch copy --from twelve --fields {','.join(folders)}") == 1

# %%
code, out, err = shell(f"fetch copy --from twelve --fields {','.join(folders)}")
assert code == 1 and "0 fetched" not in out and "already there" in out

# %% [markdown]
# The damaged files of this archive are damaged where they come from. Nothing wrong gets a file's name here, and exit code 1 tells a script that not
# everything is there. What is whole was not fetched twice.

# %% [markdown]
# ### Train
# On the archive at hand, with its own labels. First come the stars: how many files there were, which rule took how many, who is left. Then what the
# model is worth, on the stars it learned from and on those it did not.

# %%
assert show(f"train {PLACE} --model giants.asdf --scatter") == 0

# %% [markdown]
# ### The same in ten lines of Python
# Behind the command stand the chapters, and whoever wants to change a step takes these. It is also the test: by another way, the numbers must be the
# same.

# %%
spectra, ledger = training_set(ROOT, progress=False)  # files -> normalized spectra with labels
train_rows, test_rows = train_test_rows(len(spectra))
model = Cannon(scatter=True).fit(spectra[train_rows])  # labels -> spectrum
table = infer(model, spectra[test_rows])  # spectrum -> labels
truth = spectra[test_rows].labels(model.label_names_)
errors = error_table(table, truth, model.label_names_, model.scales_)
with_error_model(model, table, truth).save(HERE / "model.asdf")  # honest errors
write_table(table, HERE / "test_stars.ecsv")
errors

# %%
report, names = TrainingReport.load(HERE / "giants.json"), list(model.label_names_)
difference = np.column_stack([table[name.lower()].value for name in names]) - truth
assert list(report.errors["test stars"]["label"]) == names
assert np.allclose(
    report.errors["test stars"]["rmse"], np.sqrt(np.mean(difference**2, axis=0)), rtol=1e-6
)
assert np.allclose(
    report.errors["test stars"]["bias"], difference.mean(axis=0), rtol=1e-6, atol=1e-9
)
assert report.ledger == ledger and report.facts["model"]["digest"] == model.training_digest_

# %% [markdown]
# Each command is one function, too: `train` does what `stellar-lab train` did. Its record names every star and its fate, and holds nothing that
# changes from run to run: made again, it is the same to the last letter, and so is the model.

# %%
again = train(ROOT, HERE / "again" / "giants.asdf", scatter=True, progress=False)
assert (HERE / "again" / "giants.json").read_text() == (HERE / "giants.json").read_text()
assert np.array_equal(again.model.theta_, Cannon.load(HERE / "giants.asdf").theta_, equal_nan=True)

# %%
sets = report.facts["stars"]
assert len(sets["training stars"]) + len(sets["test stars"]) == report.ledger.left
assert not set(sets["training stars"]) & set(sets["test stars"])
print(
    *(
        f"{step.stars[0]}: {report.ledger.why(step.stars[0])}"
        for step in report.ledger.steps
        if step.stars
    ),
    sep="\n",
)

# %% [markdown]
# ### Label
# Every spectrum below the archive's root. Stars that the ledger had dropped for their labels or their kind are labelled, too: for a spectrum we need
# no catalogue.

# %%
assert show(f"label --model giants.asdf {PLACE} --out labels.fits", lines=7) in (
    0,
    1,
)  # 1: an archive may hold damaged files

# %%
labels = QTable.read(HERE / "labels.fits")
columns = [f"{name.lower()}{end}" for name in names[:3] for end in ("", "_err")]
for name in columns:
    labels[name].info.format = ".4g"
labels["apogee_id", *columns, "n_good", "flags"].pprint(max_lines=12, max_width=120)

# %% [markdown]
# Are these the labels that the notebook's way gives? The command read files one batch after another and knew nothing of a training set; the test
# stars above were normalized all together. Star by star, both must agree far within the errors.

# %%
ids, first, count = np.unique(
    labels["apogee_id"].astype(str), return_index=True, return_counts=True
)
place = dict(zip(ids[count == 1], first[count == 1]))  # a star may have been observed in two fields
here = [row for row, name in enumerate(table["apogee_id"]) if name in place]
rows = [place[name] for name in table["apogee_id"][here]]
for name in (name.lower() for name in names):
    shift = np.abs(labels[name][rows] - table[name][here]) / labels[f"{name}_err"][rows]
    assert np.median(shift) < 1e-6 and np.max(shift) < 0.1
    assert labels[name].unit == table[name].unit

# %%
use_style()
fig, ax = plt.subplots(figsize=(6.5, 4.2))
good, (x, y, z) = labels["flags"] == 0, [name.lower() for name in names[:3]]
doubtful = ~good & np.isfinite(labels[x])
value = {name: labels[name].value for name in (x, y, z, f"{x}_err", f"{y}_err")}
ax.errorbar(
    value[x][good],
    value[y][good],
    value[f"{y}_err"][good],
    value[f"{x}_err"][good],
    fmt="none",
    color="0.8",
    lw=0.5,
    zorder=0,
)
points = ax.scatter(value[x][good], value[y][good], s=9, c=value[z][good], cmap="viridis")
ax.plot(value[x][doubtful], value[y][doubtful], "x", color="C3", ms=4, mew=0.8, label="flagged")
fig.colorbar(points, label=LABELS[names[2]].axis)
ax.set(
    xlabel=LABELS[names[0]].axis,
    ylabel=LABELS[names[1]].axis,
    xlim=LABELS[names[0]].plot_range[::-1],
    ylim=LABELS[names[1]].plot_range[::-1],
)
ax.legend(frameon=False);

# %%
#| echo: false
unseen = set(map(str, labels["apogee_id"])) - set(map(str, spectra.stars["APOGEE_ID"]))
strange = np.array([str(name) in unseen for name in labels["apogee_id"]]) & (good | doubtful)
Markdown(
    "**What to see.** Hot on the left, as astronomers draw it: the giant branch from the lower left to the upper right, metal-poor stars "
    f"(dark) on its hot side. Of the {strange.sum()} labelled stars that were neither training nor test stars, {np.mean(~good[strange]):.0%} "
    "carry a flag (crosses; also those outside the plot's range), and not all of the rest are strange: some only lack a label in the "
    f"catalogue. Of the {len(spectra)} others {np.mean(~good[~strange & (good | doubtful)]):.1%} carry one. The model answers for a dwarf, "
    "too, with the labels of some giant; without the column `flags` nobody would know."
)

# %% [markdown]
# ### What makes the labels repeatable
# `as_trained` must give new files exactly the training set's treatment. We leave out one part of it, the dark pixels, and look at how far labels
# move, in units of their formal errors (photon noise alone).

# %%
raw, _ = read_archive(ROOT, dark=0, progress=False)
raw = raw[np.isin(raw.stars["APOGEE_ID"], spectra.stars["APOGEE_ID"][test_rows])]
same, without = infer(model, as_trained(model, raw)), infer(model, normalize(raw))

# %%
moved = np.array(
    [
        np.nanmax(np.abs(same[name.lower()] - without[name.lower()]) / same[f"{name.lower()}_err"])
        for name in names
    ]
)
lonely = infer(model, as_trained(model, raw[3]))
assert np.allclose(
    lonely[names[0].lower()], same[names[0].lower()][3], rtol=1e-7
)  # whoever is labelled beside a star does not matter
print(
    "largest shift without the rule, in formal errors:",
    *(f"{name} {value:.2f}" for name, value in zip(names, moved)),
)

# %% [markdown]
# ### What can go wrong, and what it says
# A spectrum of the other product, a label that nobody knows, a model that is none: each is one line and exit code 2, before any work is done.

# %%
product = report.facts["product"]
other = "aspcapStar" if product == "apstar" else "apStar"
stranger = next(HERE.glob(f"twelve/**/{other}-*.fits"))
mistakes = {
    f"label --model giants.asdf {stranger.relative_to(HERE)} --out x.fits": f"the model learned from {product} files",
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
# A damaged file stops nothing. It is named, and the exit code 1 tells a script that not everything is there.

# %%
whole = next(path for path in map(Path, map(str, labels["file"][good])))
(HERE / "mixed").mkdir()
(HERE / "mixed" / whole.name).write_bytes(whole.read_bytes())
(HERE / "mixed" / whole.name.replace("Star-", "Star-broken-")).write_bytes(
    whole.read_bytes()[:100_000]
)
assert show("label --model giants.asdf mixed --out mixed.ecsv") == 1
assert len(QTable.read(HERE / "mixed.ecsv")) == 1

# %% [markdown]
# ### Report
# A year later somebody finds `giants.asdf`. What is it?

# %%
assert show("report --model giants.asdf", lines=20) == 0

# %%
scratch.cleanup()

# %% [markdown]
# **Exercise.** Train once with `--seed 42` and once with `--seed 7`, each with its third of the stars left out. By how much do the tables differ?
# Then with `--folds 5` and both seeds: why do the tables agree better now, and which of them would you publish?
