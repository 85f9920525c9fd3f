"""`python -m stellar_lab` is the command `stellar-lab`."""

import sys

from stellar_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
