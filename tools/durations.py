"""What took how long the last time, so that of two processes none begins the longest job last."""

import json
from pathlib import Path

from notebooks import ROOT

FILE = ROOT / ".durations.json"  # of this machine; git ignores it
# Seconds of a processor where nothing was measured yet: `run` whole notebooks (make lab), `test`
# the tests in them, `file` the files of tests/. Rooms are named without their number.
NOTEBOOKS = {
    "network": 240,
    "augmentation": 200,
    "results": 120,
    "physics": 90,
    "synthesis": 60,
    "mcmc": 50,
    "mock": 50,
    "normalize": 45,
    "cannon": 40,
    "clean": 35,
    "fetch": 15,
    "survey": 12,
}
TYPICAL = {
    "run": NOTEBOOKS,
    "test": NOTEBOOKS,
    "file": {
        "cli": 70,
        "faults": 60,
        "tools": 45,
        "augmentation": 34,
        "archives": 23,
        "mcmc": 19,
        "network": 18,
        "synthesis": 17,
        "smoke": 16,
        "mock": 13,
        "physics": 12,
        "fetch": 11,
        "animation": 10,
    },
}
ELSE = {"run": 30, "test": 30, "file": 5}


def room(path):
    "05_cannon.ipynb and test_cannon.py -> cannon."
    return Path(path).stem.split("_", 1)[-1]


def measured():
    try:
        return json.loads(FILE.read_text())
    except (OSError, ValueError):
        return {}


def longest_first(kind, paths):
    "The paths, those that take longest first; the order of the others stays."
    known = TYPICAL[kind] | measured().get(kind, {})
    return sorted(paths, key=lambda path: -known.get(room(path), ELSE[kind]))


def remember(kind, seconds):
    "Keep measured times, a dict of path -> seconds, beside those measured before."
    kept = measured()
    times = {room(path): round(value, 1) for path, value in seconds.items()}
    kept[kind] = kept.get(kind, {}) | times
    try:
        FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    except OSError:
        pass  # a project that cannot be written to is run in the typical order
