"""A campaign of faults: what is damaged, and what became of it.

faults.py                all of it, half an hour; the table goes into data/faults.ecsv, too
faults.py --quick        some 300 faults, part of `make test`
faults.py --seed 7       other places and bits
faults.py --part star    the kinds of one part; --kind "cut short" of one name

Each kind of fault is a line of `KINDS` in fault_kinds.py: what it damages, how, and how often.
What became of a fault is told by a judge of fault_bench.py, which compares with the undisturbed
result. The last column of the table says which kinds nobody could see: a valid number in place of
another."""

import argparse
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
    recorded_warnings,
    told,
)
from fault_kinds import KINDS
from stellar_lab.survey import LabError

RECORD = Path(__file__).resolve().parents[1] / "data" / "faults.ecsv"
PROCESSES = ("kill", "resources")  # parts whose faults have deadlines of their own


def tried(bench, kind, rng):
    "What one fault came to, and what was said."
    longest = None if kind.part in PROCESSES else LONGEST
    try:
        with deadline(longest or 600), recorded_warnings() as warned:
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


def campaign(bench, quick=False, seed=1, kinds=KINDS, verbose=False, watch=None):
    "Kind -> how often which outcome; `watch(kind, number, found)` sees each fault."
    counts = {}
    for kind in kinds:
        counts[kind] = Counter()
        for k in range(kind.quick if quick else kind.full):
            rng = random.Random(f"{seed} {kind.part} {kind.name} {k}")
            found = tried(bench, kind, rng)
            counts[kind][found.outcome] += 1
            if watch is not None:
                watch(kind, k, found)
            if verbose and is_failure(kind, found.outcome):
                print(
                    f"{kind.part}, {kind.name}, {k}: {found.outcome}\n{found.said}", file=sys.stderr
                )
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
    parser.add_argument("--said", help="a file for what was said of each fault")
    options = parser.parse_args(words)
    kinds = [kind for kind in KINDS if options.part is None or kind.part in options.part]
    kinds = [kind for kind in kinds if fnmatch(kind.name, options.kind or "*")]

    def watch(kind, number, found):
        if options.said:
            with open(options.said, "a", encoding="utf-8", errors="backslashreplace") as file:
                said = found.said.replace("\n", "\n    ")
                print(f"{kind.part}, {kind.name}, {number}: {found.outcome}: {said}", file=file)

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.bench or folder)
        counts = campaign(bench, options.quick, options.seed, kinds, True, watch)
    if options.record or not options.quick:
        keep(counts, options.seed)
    print(*lines(counts), sep="\n")
    wrong = failures(counts)
    print(*(["", "must not be:", *wrong] if wrong else ["", "nothing is silently wrong"]), sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
