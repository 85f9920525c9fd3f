"""What took how long the last time, so that of two processes none begins the longest job last."""

import json
from pathlib import Path

from notebooks import ROOT

FILE = ROOT / ".durations.json"  # of this machine; git ignores it
# Seconds of a processor where nothing was measured yet: `run` whole notebooks (make lab), `test`
# the tests in them, `file` the files of tests/. Rooms are named without their number.
NOTEBOOKS = {
    "results": 80,
    "augmentation": 75,
    "mcmc": 45,
    "physics": 44,
    "giants": 38,
    "network": 32,
    "latents": 28,
    "spectrum": 24,
    "cli": 22,
    "normalize": 19,
    "visits": 17,
    "training": 16,
    "traps": 15,
    "labelling": 14,
    "animation": 14,
    "refusal": 13,
    "gaps": 12,
    "mock": 11,
    "synthesis": 11,
    "mwm": 11,
    "kiel": 11,
    "judging": 10,
    "cannon": 10,
    "clean": 10,
}
TYPICAL = {
    "run": NOTEBOOKS,
    "test": NOTEBOOKS,
    "file": {
        "cli": 26,
        "faults": 33,
        "visits": 24,
        "archives": 17,
        "labelling": 14,
        "front_door": 27,
        "fetch": 18,
        "augmentation": 23,
        "physics": 17,
        "results": 24,
        "tools": 16,
        "clean": 21,
        "training": 20,
        "mcmc": 18,
        "network": 18,
        "sdssv": 11,
        "smoke": 11,
        "animation": 10,
        "mock": 10,
        "synthesis": 10,
        "hidden": 7,
        "spectrum": 7,
    },
}
ELSE = {"run": 9, "test": 9, "file": 4}


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
