"""Writes the table of errors in README.md: trains on the embedded archive as a user would, and judges in five folds."""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- errors: written by tools/readme.py -->\n", "<!-- end of errors -->"
CHAINS = {"apstar": "raw flux, normalized here", "aspcapstar": "normalized by the survey"}


def judge(product):
    """The error table of stars left out of training, as the command line records it."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.asdf"
        command = ["stellar-lab", "train", "data/archives/clusters", "--model", str(model), "--product", product, "--scatter", "--folds", "5", "--seed", "0"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(model.with_suffix(".json").read_text())


def rows(records):
    """The table as markdown, a label a line."""
    yield "| label | " + " | ".join(f"{text}: RMSE (bias)" for text in CHAINS.values()) + " |"
    yield "|---|" + "---|" * len(CHAINS)
    tables = [record["errors"][list(record["errors"])[-1]] for record in records]   # the last one judges stars left out
    for lines in zip(*tables):
        cells = (f"{line['rmse']:.3g} ({line['bias']:+.2g})" if line["unit"] == "K" else f"{line['rmse']:.3f} ({line['bias']:+.3f})" for line in lines)
        yield f"| {lines[0]['label']}{' [K]' if lines[0]['unit'] == 'K' else ''} | " + " | ".join(cells) + " |"


def main():
    records = [judge(product) for product in CHAINS]
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    readme.write_text(before + BEGIN + "\n".join(rows(records)) + "\n" + END + rest.split(END)[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
