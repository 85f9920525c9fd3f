import sys

from stellar_lab.cli import main

if __name__ == "__main__":  # python -m stellar_lab
    sys.exit(main())
