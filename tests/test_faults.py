"""The quick part of the campaign of faults: none is silently wrong, none a traceback or a hang."""

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from stellar_lab.survey import LabError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import fault_bench
import faults
from fault_bench import OUTCOMES, Bench, Found, Process, judge_row, judge_words, told
from fault_kinds import Kind
from faults import KINDS, campaign, failures, is_failure, keep, lines, read_record


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"))


def test_the_quick_part(bench, capsys):
    counts = campaign(bench, quick=True, verbose=True)
    table = lines(counts)
    with capsys.disabled():
        print("", *table, sep="\n")
    assert sum(found.total() for found in counts.values()) >= 300
    assert not failures(counts)


def test_the_campaign_sees_what_is_wrong(bench, monkeypatch):
    "A fault that raises, hangs or changes the labels in silence is counted as such."

    def raises(bench, rng):
        raise ValueError("operands could not be broadcast")

    def hangs(bench, rng):
        while True:
            pass

    def refused(bench, rng):
        raise LabError("star 3 is none")

    def speaks_of_itself(bench, rng):
        raise LabError("star 3 is none ('NoneType' object is not subscriptable)")

    def curses(bench, rng):
        raise LabError("star \x1b[2J is none")

    def silent(bench, rng):
        return moved(bench, 1.0)

    def slightly(bench, rng):
        return moved(bench, 1e-9)

    def moved(bench, share):
        row = bench.answer(bench.stars[0])
        other = {"teff": row["teff"] + share * row["teff_err"]}
        return judge_row(Row({name: row[name] for name in row.colnames} | other), row)

    class Row(dict):
        colnames = ()

    monkeypatch.setattr(faults, "LONGEST", 0.2)
    for fault, outcome in (
        (raises, "traceback"),
        (hangs, "hang"),
        (refused, "reported"),
        (speaks_of_itself, "traceback"),
        (curses, "traceback"),
        (silent, "wrong"),
        (slightly, "slight"),
    ):
        kind = Kind("test", "test", fault, 1, 1)
        assert faults.tried(bench, kind, random.Random(0)).outcome == outcome
        assert bool(failures(campaign(bench, True, 1, [kind]))) == (outcome != "reported")
        excused = kind._replace(unseen="nobody could see it")
        found = campaign(bench, True, 1, [excused])
        assert bool(failures(found)) == (outcome in fault_bench.MUST_NOT_BE)


def test_another_identity_is_wrong_and_an_unknown_one_is_not(bench):
    row = bench.answer(bench.stars[0])

    class Row(dict):
        colnames = ()

    same = {name: row[name] for name in row.colnames}
    assert judge_row(Row(same), row) == Found("harmless")
    assert judge_row(Row(same | {"apogee_id": "2M"}), row).outcome == "wrong"
    assert judge_row(Row(same | {"ra": row["ra"] + row["dec"]}), row).outcome == "wrong"
    assert judge_row(Row(same | {"ra": row["ra"] * float("nan")}), row).outcome == "harmless"


def test_a_warning_counts(bench):
    def warns(bench, rng):
        import warnings

        warnings.warn("invalid value encountered in divide", RuntimeWarning, stacklevel=1)
        return Found("harmless")

    kind = Kind("test", "test", warns, 1, 1)
    assert faults.tried(bench, kind, random.Random(0)).outcome == "traceback"


@pytest.mark.parametrize(
    "code, out, err, outcome",
    [
        (0, "22 of 22 stars labelled", "", None),
        (2, "", "stellar-lab: there is no folder x: name another", "reported"),
        (1, "", "Traceback (most recent call last):", "traceback"),
        (2, "", "stellar-lab: a mistake of stellar_lab itself (KeyError: 'x')", "traceback"),
        (-11, "", "", "traceback"),
    ],
)
def test_words_of_a_command(code, out, err, outcome):
    found = judge_words(code, out, err)
    assert (found and found.outcome) == outcome


def test_who_stays_behind_is_seen():
    process = Process(shell="sleep 60 & exit 0")
    subprocess.run(["true"], check=True)
    process.process.wait()
    assert process.left_behind(patience=0.3)
    assert not process.left_behind(patience=1)


def test_several_lines_are_no_message():
    assert told("one\ntwo").outcome == "traceback"
    assert told("no star passed, by rule:\n rule 1").outcome == "reported"


def test_the_same_seed_gives_the_same_faults(bench):
    some = [kind for kind in KINDS if (kind.part, kind.name) == ("model", "entries")]
    assert campaign(bench, True, 3, some) == campaign(bench, True, 3, some)


def test_kinds_are_many_and_named_once():
    names = [(kind.part, kind.name) for kind in KINDS]
    assert len(set(names)) == len(names)
    assert {part for part, _ in names} >= {"star", "catalogue", "model", "record", "source", "kill"}
    assert all(kind.full >= kind.quick for kind in KINDS)


def test_what_was_found_is_kept_and_the_rest_stays(tmp_path):
    file = tmp_path / "found.ecsv"
    first, second = KINDS[1], KINDS[0]
    keep({first: Counter(reported=2, wrong=1)}, 1, file)
    keep({second: Counter(harmless=1)}, 1, file)
    keep({first: Counter(reported=3)}, 2, file)
    found = read_record(file)
    assert list(found) == [(1, *second[:2]), (1, *first[:2]), (2, *first[:2])]
    numbers = [2 * (outcome == "reported") + (outcome == "wrong") for outcome in OUTCOMES]
    assert found[1, *first[:2]] == [3, *numbers, first.unseen]


def test_the_record_is_that_of_these_kinds():
    "What the chapter shows was found by the campaign as it stands, and holds its promise."
    kinds = {(kind.part, kind.name): kind for kind in KINDS}
    found = read_record()
    for seed in {key[0] for key in found}:
        there = {key[1:] for key in found if key[0] == seed}
        quick = {name for name, kind in kinds.items() if kind.quick}
        assert quick <= there <= set(kinds)
    for (_, part, name), row in found.items():
        kind = kinds[part, name]
        assert 0 < row[0] == sum(row[1:-1]) and row[-1] == kind.unseen, name
        for outcome, number in zip(OUTCOMES, row[1:-1]):
            assert not (number and is_failure(kind, outcome)), (name, outcome)


def test_a_campaign_goes_on_where_it_was_stopped(bench, tmp_path):
    tries = []

    def fault(bench, rng):
        tries.append(1)
        if len(tries) == 3:
            raise KeyboardInterrupt
        return Found("harmless", "said\nin lines")

    kind = Kind("test", "test", fault, 1, 4)
    said = tmp_path / "said"
    with pytest.raises(KeyboardInterrupt):
        campaign(bench, False, 1, [kind], journal=faults.Journal(said, 1))
    with open(said, "a") as file:
        file.write('{"seed": 1, "part": "te')  # torn
    kept = []
    journal = faults.Journal(said, 1)
    found = campaign(bench, False, 1, [kind], journal=journal, finished=kept.append)
    assert len(tries) == 5 and found[kind] == Counter(harmless=4) and kept == [found]
    assert faults.Journal(said, 1).known(kind, 3) == Found("harmless", "said\nin lines")
    assert faults.Journal(said, 2).known(kind, 3) is None


def test_who_works_is_given_time_and_who_waits_is_not():
    begun = time.process_time()
    with fault_bench.deadline(0.3):
        while time.process_time() - begun < 0.15:
            pass
    with pytest.raises(fault_bench.Hang), fault_bench.deadline(0.2):
        time.sleep(30)
    with pytest.raises(fault_bench.Hang), fault_bench.deadline(0.2):
        while True:
            pass
