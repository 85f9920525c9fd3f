#!/bin/sh
# The project's virtual environment, with the package in it (editable, all extras) and the versions that constraints.txt fixes.
#   environment.sh VENV [PYTHON]           make it, or bring it up to date
#   environment.sh --ready VENV [PYTHON]   is it there, in this place and of this Python?
set -eu
ask=
if [ "$1" = --ready ]; then ask=yes; shift; fi
venv=$1
wanted=${2:-}
root=$(cd "$(dirname "$0")/.." && pwd)
stamp=$venv/stellar_lab.stamp

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
supported() { case "$(version "$1")" in 3.11 | 3.12 | 3.13) ;; *) false ;; esac; }
# A virtual environment knows its own path and the package's, so one that was moved, or whose Python is gone, is no good.
ready() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$venv $root $(version "$venv/bin/python")" ] &&
        { [ -z "$wanted" ] || [ "$(version "$wanted")" = "$(version "$venv/bin/python")" ]; }
}

if [ -n "$ask" ]; then ready; exit; fi

if ! ready; then
    if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
        echo "$venv is there but is no virtual environment: move it away, or name another folder with VENV=…" >&2
        exit 1
    fi
    for python in ${wanted:-python3 python3.13 python3.12 python3.11 python}; do
        if supported "$python"; then break; fi
        python=
    done
    if [ -z "$python" ]; then
        echo "${wanted:-python3} is not a Python 3.11, 3.12 or 3.13: install one, or name it, as in 'PYTHON=python3.12 make test'" >&2
        exit 1
    fi
    echo "== environment: Python $(version "$python") in $venv"
    rm -rf "$venv"
    "$python" -m venv "$venv" || uv venv --clear --seed --python "$python" "$venv" || {
        echo "$python cannot make a virtual environment: install its venv module (on Debian and Ubuntu the package python3-venv)" >&2
        exit 1
    }
fi

rm -f "$stamp"
python=$venv/bin/python
cd "$root"
# uv would take the requirements it remembers of setup.py, and not see that settings.ini changed: hence --reinstall-package.
set -- install -c constraints.txt -e '.[all]'
if uv --version >/dev/null 2>&1; then
    echo "== packages: through uv"
    uv pip "$@" --reinstall-package stellar-lab --python "$python" || "$python" -m pip "$@"
elif "$python" -m pip install --quiet uv && "$python" -m uv --version >/dev/null; then
    echo "== packages: through uv, from PyPI"
    "$python" -m uv pip "$@" --reinstall-package stellar-lab --python "$python" || "$python" -m pip "$@"
else
    echo "== packages: through pip"
    "$python" -m pip "$@"
fi
echo "$venv $root $(version "$python")" >"$stamp"
