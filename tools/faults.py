"""A campaign of faults: what is damaged, and what became of it.

faults.py                all of it, some 25 minutes of one processor, into data/faults.ecsv, too
faults.py --quick        some 300 faults, part of `make test`
faults.py --seed 7       other places and bits
faults.py --part star    the kinds of one part; --kind "cut short" of one name
faults.py --said FILE    keeps what was said of each fault; stopped, it goes on with the same FILE

Each kind of fault is a line of fault_kinds.py or fault_others.py: what it damages, how, and how
often. What became of a fault is told by a judge of fault_bench.py, which compares with the
undisturbed result. The last column of the table says which kinds nobody could see: a valid number
in place of another."""

import argparse
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

from astropy.table import Table

from fault_bench import (
    LONGEST,
    MUST_NOT_BE,
    OUTCOMES,
    Bench,
    Found,
    Hang,
    deadline,
    processor_seconds,
    recorded_warnings,
    told,
)
from fault_kinds import KINDS as USUAL
from fault_others import OTHERS
from stellar_lab.survey import LabError

KINDS = (*USUAL, *OTHERS)
RECORD = Path(__file__).resolve().parents[1] / "data" / "faults.ecsv"
PROCESSES = ("kill", "resources")  # parts whose faults have deadlines of their own
# in which order the whole campaign goes: what is worth most for its time comes first
ORDER = ("model", "record", "catalogue", "source", "output", "numbers", "network", "table")
ORDER += ("mwm", "visit", "kill", "resources", "star")


def tried(bench, kind, rng):
    "What one fault came to, and what was said."
    longest = None if kind.part in PROCESSES else LONGEST
    try:
        with deadline(longest or 3600), recorded_warnings() as warned:
            found = kind.fault(bench, rng)
    except Hang:
        return Found("hang")
    except LabError as error:
        return told(error)
    except Exception:
        return Found("traceback", traceback.format_exc())
    if warned and found.outcome != "wrong":
        return Found("traceback", "\n".join(warned))
    return found


class Journal:
    """What was said of each fault, a line of JSON each, in a file that a stopped campaign goes on
    with: a fault that stands there is not tried again. It belongs to one state of the code."""

    def __init__(self, file, seed):
        self.file = Path(file)
        self.seed = seed
        self.seconds = 0.0  # of processor time, those of earlier runs too
        self._known = {}
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        for line in filter(_is_whole, lines):
            entry = json.loads(line)
            if entry["seed"] == seed:
                self.seconds += entry["seconds"]
                place = entry["part"], entry["kind"], entry["number"]
                self._known[place] = Found(entry["outcome"], entry["said"])

    def known(self, kind, number):
        "What this fault came to when it was tried before; None if it was not."
        return self._known.get((kind.part, kind.name, number))

    def add(self, kind, number, found, seconds):
        "Write down what a fault came to."
        self.seconds += seconds
        entry = {"seed": self.seed, "part": kind.part, "kind": kind.name, "number": number}
        entry |= {"outcome": found.outcome, "seconds": round(seconds, 3), "said": found.said}
        before = self.file.read_bytes() if self.file.exists() else b""
        torn = before and not before.endswith(b"\n")  # the line at which it was stopped
        with open(self.file, "a", encoding="utf-8") as file:
            file.write("\n" * bool(torn) + json.dumps(entry) + "\n")


def _is_whole(line):
    "Whether a line of a journal was written to its end."
    return line.startswith("{") and line.endswith("}")


def campaign(bench, quick=False, seed=1, kinds=KINDS, verbose=False, journal=None, finished=None):
    """Kind -> how often which outcome.

    Faults that a `journal` knows are not tried again; `finished({kind: outcomes})` is called after
    each kind."""
    counts = {}
    for kind in kinds:
        counts[kind] = Counter()
        for k in range(kind.quick if quick else kind.full):
            found = journal and journal.known(kind, k)
            if not found:
                begun = processor_seconds()
                found = tried(bench, kind, random.Random(f"{seed} {kind.part} {kind.name} {k}"))
                if journal:
                    journal.add(kind, k, found, processor_seconds() - begun)
            counts[kind][found.outcome] += 1
            if verbose and is_failure(kind, found.outcome):
                print(
                    f"{kind.part}, {kind.name}, {k}: {found.outcome}\n{found.said}", file=sys.stderr
                )
        if finished is not None:
            finished({kind: counts[kind]})
    return counts


def is_failure(kind, outcome):
    "Must this outcome not be, for a fault of this kind?"
    return outcome in MUST_NOT_BE or (outcome in ("slight", "wrong") and not kind.unseen)


def failures(counts):
    "Kinds with an outcome that must not be."
    return [
        f"{kind.part}, {kind.name}: {dict(found)}"
        for kind, found in counts.items()
        if any(found[outcome] and is_failure(kind, outcome) for outcome in OUTCOMES)
    ]


def rows(counts):
    "The table: a list of texts for each kind that was tried, below the names of the columns."
    yield ["part", "kind", "tried", *OUTCOMES, ""]
    for kind, found in counts.items():
        if found.total():
            numbers = [str(found[outcome] or "-") for outcome in OUTCOMES]
            unseen = kind.unseen if found["wrong"] or found["slight"] else ""
            yield [kind.part, kind.name, str(found.total()), *numbers, unseen]
    total = sum(counts.values(), Counter())
    yield ["all", "", str(total.total()), *(str(total[one] or "-") for one in OUTCOMES), ""]


def lines(counts):
    "The table as text."
    table = list(rows(counts))
    widths = [max(map(len, column)) for column in zip(*table)]
    left = (0, 1, len(widths) - 1)
    return [
        "  ".join(
            text.ljust(width) if k in left else text.rjust(width)
            for k, (text, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in table
    ]


def keep(counts, seed, file=RECORD):
    "Write what a campaign found into the record, where other seeds, and kinds not tried, stay."
    found = read_record(file) if file.exists() else {}
    for kind, counted in counts.items():
        if not counted.total():
            continue
        numbers = [counted[outcome] for outcome in OUTCOMES]
        found[seed, kind.part, kind.name] = [counted.total(), *numbers, kind.unseen]
    order = {(kind.part, kind.name): k for k, kind in enumerate(KINDS)}
    rows = [
        (*key, *found[key])
        for key in sorted(found, key=lambda key: (key[0], order.get(key[1:], -1)))
        if key[1:] in order
    ]
    table = Table(rows=rows, names=["seed", "part", "kind", "tried", *OUTCOMES, "unseen"])
    table.write(file, format="ascii.ecsv", overwrite=True)


def read_record(file=RECORD):
    "What campaigns found: (seed, part, kind) -> tried, a number for each outcome, why unseen."
    table = Table.read(file, format="ascii.ecsv", fill_values=[])
    plain = [[value.item() for value in row] for row in table.as_array()]
    return {tuple(row[:3]): row[3:] for row in plain}


def main(words):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="some 300 faults")
    parser.add_argument("--record", action="store_true", help="record a quick run, too")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", action="append", help="only kinds of this part, such as model")
    parser.add_argument("--kind", help="only kinds of this name, such as 'label*'")
    parser.add_argument("--bench", help="a folder in which archive and models stay for other runs")
    parser.add_argument("--said", help="what was said of each fault; goes on where it ends")
    options = parser.parse_args(words)
    kinds = [kind for kind in KINDS if options.part is None or kind.part in options.part]
    kinds = [kind for kind in kinds if fnmatch(kind.name, options.kind or "*")]
    kinds.sort(key=lambda kind: ORDER.index(kind.part))

    def finished(counts):
        if options.record or not options.quick:
            keep(counts, options.seed)

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.bench or folder)
        journal = Journal(options.said or Path(folder) / "said", options.seed)
        counts = campaign(bench, options.quick, options.seed, kinds, True, journal, finished)
        print(f"{journal.seconds / 60:.1f} minutes of one processor", file=sys.stderr)
    print(*lines(counts), sep="\n")
    wrong = failures(counts)
    print(*(["", "must not be:", *wrong] if wrong else ["", "nothing is silently wrong"]), sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
