"""Writes SCOREBOARD.md, README.md's table of six rows, and README.md's picture.

readme.py              all; for the table of errors it trains on the embedded archive, as users do
readme.py scoreboard   what was recorded alone; it trains nothing and keeps the table of errors
readme.py picture      the picture alone: a figure that a notebook carries"""

import base64
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BOARD = ROOT / "SCOREBOARD.md"
PICTURE = ROOT / "nbs" / "real_star.png"
PICTURED = ROOT / "nbs" / "E_physics.ipynb"

# what stands between two markers is written here; the rest of README.md is anyone's
SCOREBOARD = ("<!-- scoreboard: written by tools/readme.py -->\n", "<!-- end of scoreboard -->")
ERRORS = ("<!-- errors: written by tools/readme.py -->\n", "<!-- end of errors -->")

CHAINS = {"apstar": "raw flux, normalized here", "aspcapstar": "normalized by the survey"}
TITLES = {
    "clusters": "Real stars of 18 clusters",
    "mock": "Synthetic stars whose true labels are known",
    "survey": "The survey's own stars",
}


# ---- parts between markers


def between(text, begin, end):
    """What stands between two markers."""
    _check_markers(text, begin, end)
    return text.split(begin)[1].split(end)[0]


def put(text, begin, end, part):
    """The text with another part between the markers; nothing else changes."""
    _check_markers(text, begin, end)
    before, rest = text.split(begin)
    return before + begin + part + end + rest.split(end)[1]


def _check_markers(text, begin, end):
    once = text.count(begin) == 1 and text.count(end) == 1
    if not once or text.index(end) < text.index(begin):
        raise ValueError(f"the text needs the lines {begin.strip()} and {end}, once and in order")


# ---- tables as markdown


def markdown(table):
    """An astropy table of text as markdown, in columns: the first to the left, others right."""
    lines = [table.colnames, *([str(cell) for cell in row] for row in table.iterrows())]
    widths = [max(len(line[k]) for line in lines) for k in range(len(table.colnames))]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_row(line, widths) for line in (lines[0], rules, *lines[1:]))


def _row(cells, widths):
    first, *others = zip(cells, widths, strict=True)
    padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return f"| {' | '.join(padded)} |"


# ---- errors, trained anew


def judge(product):
    """The error table of stars left out of training, as the command line records it."""
    options = f"--product {product} --scatter --folds 5 --seed 0".split()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.asdf"
        command = ["stellar-lab", "train", "data/archives/clusters", "--model", str(model)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*command, *options], cwd=ROOT, check=True, **quiet)
        return json.loads(model.with_suffix(".json").read_text())


def errors_table(records):
    """The errors of the trainings in `CHAINS` as markdown, one row per label."""
    from astropy.table import Table

    # the last table of a record judges stars left out
    tables = [record["errors"][list(record["errors"])[-1]] for record in records]
    rows = []
    for lines in zip(*tables, strict=True):
        label = lines[0]["label"] + (" [K]" if lines[0]["unit"] == "K" else "")
        row = {"label": label}
        for chain, line in zip(CHAINS.values(), lines, strict=True):
            row[f"{chain}: RMSE (bias)"] = _error(line)
        rows.append(row)
    return markdown(Table(rows)) + "\n"


def _error(line):
    if line["unit"] == "K":
        return f"{line['rmse']:.3g} ({line['bias']:+.2g})"
    return f"{line['rmse']:.3f} ({line['bias']:+.3f})"


# ---- what was recorded


# contest -> heads of the labels that all models give; a table of 100 characters
SHOWN = ("TEFF", "LOGG", "M_H")
SHOWN_MODELS = (
    *("Cannon", "hidden labels", "ridge regression"),
    *("latents", "lab network", "error-aware network"),
)
HEADS = {
    "five folds": ("Teff [K]", "log g", "[M/H]"),
    "clusters left out": ("Teff*", "log g*", "[M/H]*"),
}


def six_rows():
    """Six models in one table for README.md, and what its figures mean."""
    from astropy.table import Table

    from stellar_lab.results import readable, records

    boards = records()
    real = boards["clusters"][boards["clusters"]["product"] == "apstar"]
    rows = []
    for line in readable(real):
        if line["model"] not in SHOWN_MODELS:
            continue
        row = {"model": line["model"]}
        for contest, heads in HEADS.items():
            for label, head in zip(SHOWN, heads, strict=True):
                error = _one(real, contest, line["model"], label)
                row[head] = _rounded(error["rmse"], label)
        row["train [s]"] = line["training [s]"]
        row["read [ms]"] = line["labelling [ms/star]"]
        rows.append(row)
    note = textwrap.wrap(_note(real, boards["mock"]), 100, break_on_hyphens=False)
    return "\n".join([markdown(Table(rows)), "", *note]) + "\n"


def _one(table, contest, model, label):
    """The row of one contest, model and label; ValueError where the record holds another number."""
    chosen = (table["contest"] == contest) & (table["model"] == model) & (table["label"] == label)
    (row,) = table[chosen]
    return row


def _rounded(error, label):
    return f"{error:.0f}" if label == "TEFF" else f"{error:.3f}"


def _note(real, mock):
    """What the figures of the six rows mean."""
    from stellar_lab.results import against_truth

    average = {}
    for label in SHOWN:
        row = _one(real, "five folds", "Cannon", label)
        average[label] = row["rmse"] / row["scaled_rmse"]
    made = against_truth(mock)
    synthetic = []
    for model in ("Cannon", "error-aware network", "latents"):
        errors = {}
        for label in ("TEFF", "LOGG", "FE_H"):
            errors[label] = _one(made, made["contest"][0], model, label)["rmse"]
        synthetic.append(f"{model} {_in_words(errors)}")
    return (
        f"RMSE in K and dex for {real.meta['stars']} real giants of 18 clusters, compared with the "
        "survey's labels, whose own errors are in it; all left out of training once, in five folds "
        f"or (*) as whole clusters. The average star would miss by {_in_words(average)}. Synthetic "
        f"stars, {made['n'][0]} of {made.meta['stars']:,} left out, compared with the true Teff, "
        f"log g, [Fe/H]: {'; '.join(synthetic)}. Times are the processor's. "
        "More: [SCOREBOARD.md](SCOREBOARD.md)."
    )


def _in_words(errors):
    """Errors as a text, such as 87 K, 0.217, 0.080."""
    texts = [_rounded(error, label) for label, error in errors.items()]
    return ", ".join([f"{texts[0]} K", *texts[1:]])


def board(archive, table):
    """The recorded scoreboard of one archive: its first contest, the truth, all contests."""
    import numpy as np

    from stellar_lab.results import against_truth, contests_side_by_side, readable

    parts = [f"## {TITLES[archive]} (`{archive}`)"]
    parts += [f"{_first_contest(table)} RMSE with bias in brackets:", markdown(readable(table))]
    if "true_rmse" in table.colnames and np.isfinite(table["true_rmse"]).any():
        parts.append("The same answers against the labels that the stars were made from:")
        parts.append(markdown(readable(against_truth(table))))
    rich = table["n"][table["contest"] == "metal-rich, five folds"]
    where = ""
    if len(rich):
        where = f" (metal-rich: the {rich[0]} stars above [M/H] = -1.3 among themselves)"
    parts.append(
        "Scaled RMSE averaged over the labels and, in brackets, its ratio to the Cannon's on the "
        f"same labels, in all contests{where}:"
    )
    parts += [markdown(contests_side_by_side(table)), *_coverage(archive)]
    return "\n\n".join([*parts, _provenance(archive, table.meta)])


def _coverage(archive):
    """How often errors hold, in the contests of an archive, on its first product."""
    from stellar_lab.results import coverage_records, coverage_side_by_side

    table = coverage_records().get(archive)
    if table is None:
        return []
    parts = [
        "Share of the stars within one calibrated error, averaged over the labels; 0.68 is right. "
        "Groups of ten stars and more; models whose run kept its answers:"
    ]
    for contest in dict.fromkeys(table["contest"]):
        for about in dict.fromkeys(table["about"][table["contest"] == contest]):
            parts.append(f"*{contest}, about the {about}*")
            parts.append(markdown(coverage_side_by_side(table, contest, about)))
    return parts


def _first_contest(table):
    product = table["product"][0]
    return f"{table['contest'][0].capitalize()}, {CHAINS[product]} (`{product}`)."


def _provenance(archive, meta):
    command = "python tools/scoreboard.py"
    if archive != "clusters":
        command += f" --archive data/archives/{archive}"
    if meta["profile"] != "full":
        command += f" --profile {meta['profile']}"
    remark = f", {meta['remark']}" if meta["remark"] else ""
    return (
        f"Recorded on {meta['date']} by `{command}` ({meta['profile']} profile, {meta['stars']} "
        f"stars, {meta['device']}{remark}; tensorflow {meta['versions']['tensorflow']}); the "
        f"figures are those of `data/scoreboard_{archive}.ecsv`."
    )


HEAD = """\
# The scoreboard

What each model of this book reads from spectra that took no part in its training, and what that
costs. `tools/readme.py` writes this page from what was recorded; change nothing here by hand.
[The chapter on results](nbs/19_results.ipynb) says how the contests are held.

- *RMSE*: root mean square of predicted minus catalogue; *bias*, in brackets: their mean.
- *Scaled RMSE*: RMSE divided by the spread of the label over the judged stars. At 1 a model is no
  better than naming an average star.
- *training*: the processor's time for one training, all cores added up.
- *Within 1, 2 errors*: share of the judged stars whose label lies so near, averaged over the
  labels; right errors have 68 and 95 %. The errors of each fold were calibrated on the others.
- *Flagged*: share of the judged stars with any flag of [the models' chapter](nbs/04_models.ipynb).
- The settings of the error-aware network were chosen on two of the five folds, the form of the
  latents' curve on these folds and on the synthetic stars. The number of hidden labels and all
  settings of the latents' curve are found inside the training stars, anew each time.

## The Cannon as `stellar-lab train --scatter --folds 5` makes it

Labels of 478 real giants, each left out of training once (five folds), quadratic in six labels with
a scatter per pixel, against the survey's calibrated labels. The first column is the whole chain
from raw flux, the second takes the survey's own normalization. The giants run from [M/H] -2.5 to
+0.5.
"""


def document(errors):
    """SCOREBOARD.md, around the table of errors."""
    from stellar_lab.results import records

    parts = [HEAD, ERRORS[0] + errors + ERRORS[1] + "\n"]
    parts += [board(archive, table) + "\n" for archive, table in records().items()]
    return "\n".join(parts)


def write_recorded(errors):
    """Write SCOREBOARD.md and README.md's table of six rows."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    BOARD.write_text(document(errors), encoding="utf-8")
    text = put(README.read_text(encoding="utf-8"), *SCOREBOARD, six_rows())
    README.write_text(text, encoding="utf-8")


# ---- the picture


def picture():
    """The star under its synthetic fit, as the notebook drew it, in a file for README.md."""
    cells = json.loads(PICTURED.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if "plot_star(" in "".join(cell["source"]):
            for output in cell.get("outputs", ()):
                if "image/png" in output.get("data", {}):
                    PICTURE.write_bytes(base64.b64decode("".join(output["data"]["image/png"])))
                    return
    raise ValueError(f"{PICTURED.name} carries no picture of a cell that calls plot_star")


def main(parts=()):
    if "scoreboard" not in parts:
        picture()
    if "picture" in parts:
        return 0
    if "scoreboard" in parts:
        errors = between(BOARD.read_text(encoding="utf-8"), *ERRORS)
    else:
        errors = errors_table([judge(product) for product in CHAINS])
    write_recorded(errors)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
