"""What took how long the last time, so that of two processes none begins the longest job last."""

import json
from pathlib import Path

from notebooks import ROOT

FILE = ROOT / ".durations.json"  # of this machine; git ignores it
# Seconds of a processor where nothing was measured yet: `run` whole notebooks (make lab), `test`
# the tests in them, `file` the files of tests/. Rooms are named without their number.
NOTEBOOKS = {
    "augmentation": 100,
    "physics": 80,
    "results": 75,
    "giants": 70,
    "mcmc": 55,
    "cli": 50,
    "network": 50,
    "training": 40,
    "labelling": 30,
    "latents": 27,
    "mock": 27,
    "spectrum": 27,
    "synthesis": 25,
    "normalize": 23,
    "animation": 20,
    "cannon": 20,
    "kiel": 20,
    "refusal": 20,
    "visits": 20,
    "clean": 18,
}
TYPICAL = {
    "run": NOTEBOOKS,
    "test": NOTEBOOKS,
    "file": {
        "front_door": 55,
        "augmentation": 29,
        "archives": 27,
        "faults": 23,
        "tools": 22,
        "physics": 20,
        "labelling": 20,
        "mcmc": 19,
        "network": 18,
        "cli": 17,
        "results": 16,
        "clean": 15,
        "synthesis": 15,
        "training": 15,
        "fetch": 13,
        "mock": 12,
        "smoke": 10,
        "spectrum": 10,
    },
}
ELSE = {"run": 15, "test": 15, "file": 5}


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
