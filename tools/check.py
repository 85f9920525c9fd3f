"""Runs the checks of the house side by side: are imports in order, generated files as the notebooks
say, outputs there?"""

import subprocess
import sys

from notebooks import ROOT

CHECKS = ("check_generated.py", "check_imports.py", "check_notebooks.py")  # the longest first


def main():
    running = [subprocess.Popen([sys.executable, ROOT / "tools" / name]) for name in CHECKS]
    return any([check.wait() for check in running])


if __name__ == "__main__":
    sys.exit(main())
