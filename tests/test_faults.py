"""The quick part of the campaign of faults: none is silently wrong, none a traceback or a hang."""

import random
import sys
from pathlib import Path

import pytest

from stellar_lab.survey import LabError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import faults
from faults import KINDS, Bench, Kind, campaign, failures, lines


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
    for found in counts.values():
        assert not found["traceback"] and not found["hang"]


def test_the_campaign_sees_what_is_wrong(bench, monkeypatch):
    "A fault that raises, hangs or changes the labels in silence is counted as such."

    def raises(bench, rng):
        raise ValueError("operands could not be broadcast")

    def hangs(bench, rng):
        while True:
            pass

    def refused(bench, rng):
        raise LabError("star 3 is none")

    def silent(bench, rng):
        star = bench.stars[0]
        row = bench.answers[star.name]
        moved = {"teff": row["teff"] + row["teff_err"], "flags": 0}
        return faults.judge_row({name: row[name] for name in row.colnames} | moved, row)

    monkeypatch.setattr(faults, "LONGEST", 0.2)
    for fault, outcome in (
        (raises, "traceback"),
        (hangs, "hang"),
        (refused, "reported"),
        (silent, "wrong"),
    ):
        kind = Kind("test", "test", fault, 1, 1)
        assert faults.tried(bench, kind, random.Random(0))[0] == outcome
        assert bool(failures(campaign(bench, True, 1, [kind]))) == (outcome != "reported")


def test_the_same_seed_gives_the_same_faults(bench):
    some = [kind for kind in KINDS if (kind.part, kind.name) == ("model", "entries")]
    assert campaign(bench, True, 3, some) == campaign(bench, True, 3, some)
