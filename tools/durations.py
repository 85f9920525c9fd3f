"""What took how long the last time, so that of two processes none begins the longest job last."""

import json
from pathlib import Path

from notebooks import ROOT

FILE = ROOT / ".durations.json"  # of this machine; git ignores it
# Seconds on a quiet core where nothing was measured yet: `run` whole notebooks (make lab), `test`
# the tests in them, `file` the files of tests/. Rooms are named without their number.
TYPICAL = {
    "run": {"network": 240, "augmentation": 200, "results": 120, "physics": 90, "synthesis": 60},
    "test": {"network": 240, "augmentation": 200, "results": 120, "physics": 90, "synthesis": 60},
    "file": {"results": 100, "cli": 100, "augmentation": 60, "network": 60, "tools": 60},
}
ELSE = 30


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
    return sorted(paths, key=lambda path: -known.get(room(path), ELSE))


def remember(kind, seconds):
    "Keep measured times, a dict of path -> seconds, beside those measured before."
    kept = measured()
    times = {room(path): round(value, 1) for path, value in seconds.items()}
    kept[kind] = kept.get(kind, {}) | times
    try:
        FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    except OSError:
        pass  # a project that cannot be written to is run in the typical order
