#!/bin/sh
# Regenerates what comes from the notebooks, in the project at hand:
# the package, the notebooks' own tidy form, the text twins.
set -eu
nbdev_export
# Keeps outputs (clear_all = False in settings.ini) and the kernel's name; drops execution counts,
# other metadata and memory addresses.
python tools/kernelspec.py
nbdev_clean
# Twins last: metadata that the cleaning drops (lines_to_next_cell) changes the blank lines of a twin.
jupytext --quiet --from nbs//ipynb --to nbs/text//py:percent nbs/*.ipynb
