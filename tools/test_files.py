"""Runs the files of tests/ in two processes, the longest file first.

test_files.py [FILE ...] [options of pytest]"""

import os
import sys
from collections import defaultdict

import pytest

from durations import longest_first, remember
from notebooks import ROOT, environment, thread_share

TIMEOUT = 300  # seconds that one test may take
WORKERS = 2


class Clock:
    "Adds up what the tests of each file took."

    def __init__(self):
        self.seconds = defaultdict(float)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid.split("::")[0]] += report.duration


def main(arguments):
    files = [argument for argument in arguments if not argument.startswith("-")]
    options = [argument for argument in arguments if argument.startswith("-")]
    os.environ.update(environment(**thread_share(WORKERS)))
    os.chdir(ROOT)
    clock = Clock()
    code = pytest.main(
        [
            *longest_first("file", files or sorted(map(str, ROOT.glob("tests/test_*.py")))),
            f"--timeout={TIMEOUT}",
            f"--numprocesses={WORKERS}",
            "--dist=loadfile",
            "--no-loadscope-reorder",  # keep our order, the longest file first
            *options,
        ],
        plugins=[clock],
    )
    if not files and not options:
        remember("file", clock.seconds)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
