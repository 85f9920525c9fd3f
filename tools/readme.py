"""Writes what README.md shows: the recorded scoreboard, a picture, and errors, for which it trains on the embedded archive as a user would and judges in five folds.

readme.py              all
readme.py scoreboard   the scoreboard alone; it trains nothing
readme.py picture      the picture alone: a figure that a notebook carries"""

import base64
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ERRORS = "<!-- errors: written by tools/readme.py -->\n", "<!-- end of errors -->"
SCOREBOARD = "<!-- scoreboard: written by tools/readme.py -->\n", "<!-- end of scoreboard -->"
PICTURE = ROOT / "nbs" / "real_star.png"
CHAINS = {"apstar": "raw flux, normalized here", "aspcapstar": "normalized by the survey"}


def judge(product):
    """The error table of stars left out of training, as the command line records it."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.asdf"
        command = [
            "stellar-lab",
            "train",
            "data/archives/clusters",
            "--model",
            str(model),
            "--product",
            product,
            "--scatter",
            "--folds",
            "5",
            "--seed",
            "0",
        ]
        subprocess.run(
            command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return json.loads(model.with_suffix(".json").read_text())


def rows(records):
    """The table as markdown, a label a line."""
    yield "| label | " + " | ".join(f"{text}: RMSE (bias)" for text in CHAINS.values()) + " |"
    yield "|---|" + "---|" * len(CHAINS)
    tables = [
        record["errors"][list(record["errors"])[-1]] for record in records
    ]  # the last one judges stars left out
    for lines in zip(*tables):
        cells = (
            f"{line['rmse']:.3g} ({line['bias']:+.2g})"
            if line["unit"] == "K"
            else f"{line['rmse']:.3f} ({line['bias']:+.3f})"
            for line in lines
        )
        yield (
            f"| {lines[0]['label']}{' [K]' if lines[0]['unit'] == 'K' else ''} | "
            + " | ".join(cells)
            + " |"
        )


def markdown(table):
    """An astropy table of text as markdown."""
    lines = [table.colnames, ["---"] * len(table.colnames), *table.iterrows()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def scoreboard():
    """The recorded scoreboards of the full runs: all models in the archive's first contest, the others as averages, errors against the truth where one is known, and where it all comes from."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from stellar_lab.results import records

    parts = {archive: board(archive, table) for archive, table in records().items()}
    titles = {
        "clusters": "Real stars of 18 clusters (`clusters`)",
        "mock": "Synthetic stars whose truth is known (`mock`)",
        "survey": "The survey's own stars",
    }
    return "\n".join(
        f"**{titles[archive]}.**\n\n{part}" if len(parts) > 1 else part
        for archive, part in parts.items()
    )


def board(archive, table):
    """The recorded scoreboard of one archive."""
    import numpy as np

    from stellar_lab.results import against_truth, contests_side_by_side, leading, readable

    first, meta, rich = (
        leading(table),
        table.meta,
        table["n"][table["contest"] == "metal-rich, five folds"],
    )
    remark = f", {meta['remark']}" if meta["remark"] else ""
    text = f"{markdown(readable(first))}\n\n"
    if "true_rmse" in first.colnames and np.isfinite(first["true_rmse"]).any():
        text += f"The same answers against the labels that the stars were made from:\n\n{markdown(readable(against_truth(first)))}\n\n"
    where = (
        f" (metal-rich: the {rich[0]} stars above [M/H] = -1.3 among themselves)"
        if len(rich)
        else ""
    )
    text += f"Scaled RMSE averaged over the labels and, in brackets, beside the Cannon's on the same labels, in all contests{where}:\n\n{markdown(contests_side_by_side(table))}\n\n"
    command = (
        "python tools/scoreboard.py"
        + ("" if archive == "clusters" else f" --archive data/archives/{archive}")
        + ("" if meta["profile"] == "full" else f" --profile {meta['profile']}")
    )
    return (
        f"{text}Recorded on {meta['date']} by `{command}` ({meta['profile']} profile, {meta['stars']} stars, {meta['device']}{remark}; tensorflow {meta['versions']['tensorflow']}); "
        f"the figures are those of `data/scoreboard_{archive}.ecsv`.\n"
    )


def picture():
    """The star under its synthetic fit, as the notebook drew it, in a file that README.md can show."""
    cells = json.loads((ROOT / "nbs" / "D_sky.ipynb").read_text(encoding="utf-8"))["cells"]
    images = [
        output["data"]["image/png"]
        for cell in cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {}) and "plot_star(" in "".join(cell["source"])
    ]
    PICTURE.write_bytes(base64.b64decode("".join(images[0])))


def between(text, begin, end):
    """What stands between two markers."""
    return text.split(begin)[1].split(end)[0]


def put(text, begin, end, part):
    """The text with another part between the markers."""
    before, rest = text.split(begin)
    return before + begin + part + end + rest.split(end)[1]


def main(parts=()):
    if "scoreboard" not in parts:
        picture()
    if "picture" in parts:
        return 0
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if "scoreboard" not in parts:
        text = put(text, *ERRORS, "\n".join(rows([judge(product) for product in CHAINS])) + "\n")
    readme.write_text(put(text, *SCOREBOARD, scoreboard()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
