"""Data flows downwards only: no import that runs up, no circle, no private name across rooms."""

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from check_imports import Import, circles, complaints, imports, is_private, trespasses, upward

ROOT = Path(__file__).resolve().parents[1]
ORDER = ["survey", "clean", "cannon", "cli"]
HOUSE = {
    "survey": "import numpy as np",
    "clean": "from stellar_lab.survey import Spectra, _Hidden\n",
    "cannon": "from .clean import keep\nfrom stellar_lab import __version__, survey",
    "cli": "def main():\n    from stellar_lab.cannon import Cannon\n    from . import clean",
}


def test_the_house_is_in_order():
    assert list(complaints()) == []


def test_imports_are_found_wherever_they_stand():
    text = """
import os, stellar_lab.clean as reading
from stellar_lab import __version__, survey
from .cannon import Cannon, _plain as plain
from . import cli
from numpy import array
def later():
    from stellar_lab.survey import Spectra
    return reading._open, survey.__doc__, survey.facts, os._exit
try:
    import stellar_lab.cli
except ImportError:
    stellar_lab.cli._speak
"""
    assert imports(text, ORDER) == [
        Import(2, "clean"),
        Import(3, "survey"),
        Import(4, "cannon", "Cannon"),
        Import(4, "cannon", "_plain"),
        Import(5, "cli"),
        Import(8, "survey", "Spectra"),
        Import(9, "clean", "_open"),
        Import(11, "cli"),
        Import(13, "cli", "_speak"),
    ]


@pytest.mark.parametrize("name, private", [("_x", True), ("x_", False), ("__version__", False)])
def test_private_names(name, private):
    assert is_private(name) is private


def test_a_house_in_order_has_no_complaint():
    assert list(upward(HOUSE, ORDER)) == [] and list(circles(HOUSE, ORDER)) == []


@pytest.mark.parametrize(
    "line",
    [
        "from stellar_lab.cannon import Cannon",
        "from .cannon import Cannon",
        "import stellar_lab.cannon",
        "from stellar_lab import cannon",
        "from . import cannon",
        "def f():\n    from stellar_lab.cannon import Cannon",
        "class A:\n    def f(self):\n        import stellar_lab.cannon as model",
        "if False:\n    from .cannon import (\n        Cannon,\n    )",
    ],
)
def test_an_import_that_runs_up_is_found(line):
    planted = HOUSE | {"clean": f"{HOUSE['clean']}{line}\n"}
    (found,) = upward(planted, ORDER)
    assert found.startswith("clean:") and "cannon, which comes after it" in found
    (found,) = circles(planted, ORDER)  # cannon imports clean
    assert found.startswith("a circle: ") and "clean" in found and "cannon" in found


def test_a_circle_through_three_rooms_is_found():
    planted = HOUSE | {"survey": "def f():\n    from .cli import main"}
    (found,) = circles(planted, ORDER)
    assert {"survey", "cli"} <= set(found.removeprefix("a circle: ").split(" <- "))


def test_a_room_without_a_notebook_is_found():
    assert list(upward({"attic": ""}, ORDER)) == ["attic: no notebook makes this module"]
    (found,) = upward({"clean": "from stellar_lab.attic import dust"}, ORDER)
    assert found == "clean:1: imports from attic, which is no room"


def test_a_private_name_that_crosses_rooms_is_found():
    assert list(trespasses(HOUSE, ORDER)) == ["clean:1: takes _Hidden, a private name of survey"]
    tool = {"bench": "from stellar_lab import cannon\nprint(cannon._plain(1), cannon.Cannon)"}
    assert list(trespasses(tool, ORDER)) == ["bench:2: takes _plain, a private name of cannon"]
    assert list(trespasses({"survey": "from stellar_lab.survey import _Hidden"}, ORDER)) == []


@pytest.mark.parametrize("path", sorted((ROOT / "stellar_lab").glob("*.py")), ids=lambda p: p.stem)
def test_each_room_defines_a_name_once(path):
    "A second definition, cells away, would take the place of the first for all that call it."
    kinds = ast.FunctionDef | ast.ClassDef
    names = [part.name for part in ast.parse(path.read_text()).body if isinstance(part, kinds)]
    assert sorted(names) == sorted(set(names))
