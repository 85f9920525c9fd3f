#!/bin/sh
# Brings changes made in text twins into their notebooks; outputs of cells that did not change stay.
#   from_text.sh [NAME ...]     such as 05_cannon; all by default
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- $(cd nbs/text && ls | sed 's/\.py$//')
for name in "$@"; do
    if [ ! -f "nbs/$name.ipynb" ]; then jupytext --quiet --to ipynb --output "nbs/$name.ipynb" "nbs/text/$name.py"; fi
done
jupytext --quiet --from nbs/text//py:percent --to nbs//ipynb --update $(printf 'nbs/text/%s.py ' "$@")
sh tools/sync.sh
