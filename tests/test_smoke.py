"""The package as it is shipped, its requirements, and the versions that must go together."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import stellar_lab

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.stem for path in (ROOT / "stellar_lab").glob("*.py"))
EXTRA_ONLY = (
    "IPython",
    "execnb",
    "fastcore",
    "ghapi",
    "hypothesis",
    "imageio_ffmpeg",
    "ipykernel",
    "jupyter",
    "jupyter_client",
    "jupyter_core",
    "jupyterlab",
    "jupytext",
    "keras",
    "nbclient",
    "nbconvert",
    "nbdev",
    "nbformat",
    "psutil",
    "pyarrow",
    "pytest",
    "ruff",
    "tensorflow",
    "xdist",
)
NETWORKS = ("augmentation", "network")  # cannot be without TensorFlow, and say so


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def requirements(settings):
    """All requirements of settings.ini: group -> list. Those of the recipe of the synthetic stars
    are its own: nobody who uses the package installs them."""
    groups = [
        key
        for key in settings
        if key == "requirements"
        or key.endswith("_requirements")
        and key != "synthesis_requirements"
    ]
    return {group: [Requirement(line) for line in settings[group].split()] for group in groups}


@pytest.fixture(scope="module")
def constraints():
    "constraints.txt: name -> version."
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len({pin.name for pin in pins}) == len(pins)  # one version for all three Pythons
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}


def shipped_data():
    "What git holds of data/ (all files there, where git is not at hand), archives apart."
    listed = subprocess.run(["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True)
    names = [Path(name).name for name in listed.stdout.split()] if listed.returncode == 0 else []
    return sorted(names or (path.name for path in (ROOT / "data").iterdir() if path.is_file()))


def build(kind, source, out):
    "A distribution, built as pip does it but without the network: its path, or what was said."
    call = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", call], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    "A copy of what git holds, but for notebooks and tools."
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    for name in ("stellar_lab", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data").mkdir()
    for name in shipped_data():
        shutil.copy(ROOT / "data" / name, folder / "data")
    return folder


@pytest.fixture(scope="module")
def unpacked(checkout, tmp_path_factory):
    "The source distribution, unpacked."
    made = build("sdist", checkout, tmp_path_factory.mktemp("sdist"))
    assert made.name == f"stellar_lab-{stellar_lab.__version__}.tar.gz"
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(made) as packed:
        packed.extractall(folder, filter="data")
    return folder / made.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    "The wheel, built from the source distribution: both must be whole."
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


def test_the_source_distribution_carries_what_it_is_built_from(unpacked):
    names = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    needed = {"settings.ini", "setup.py", "constraints.txt", "stellar_lab/py.typed"}
    told = {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"}
    assert needed | told <= names
    assert {f"data/{name}" for name in shipped_data()} <= names
    assert not [name for name in names if name.startswith(("tests", "nbs", "data/archives"))]


def test_a_lost_settings_file_is_named(checkout, tmp_path):
    for name in ("setup.py", "README.md"):
        shutil.copy(checkout / name, tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode and "settings.ini is missing" in done.stderr
    assert "KeyError" not in done.stderr


def test_links_of_the_description_lead_somewhere_from_anywhere(wheel, settings):
    "PyPI shows README.md alone: a relative link is dead there, a relative picture empty."
    (metadata,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA")]
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    targets = re.findall(r"\]\(([^)\s]+)", text)
    assert [target for target in targets if not re.match("https?://|#", target)] == []
    relative = {
        target
        for target in re.findall(r"\]\(([^)\s]+)", (ROOT / "README.md").read_text())
        if "://" not in target and not target.startswith("#")
    }
    assert relative
    for target in relative:
        kind = "raw" if target.endswith(".png") else "blob"
        assert f"]({settings['git_url']}/{kind}/main/{target}" in text
        assert (ROOT / target.split("#")[0]).exists(), f"README.md links to {target}"


def test_the_wheel_carries_code_and_data_but_no_notebooks(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith(f"stellar_lab-{stellar_lab.__version__}-py3-none-any")
    assert {f"stellar_lab/{module}.py" for module in MODULES} <= set(names)
    assert {f"stellar_lab/data/{name}" for name in shipped_data()} <= set(names)
    assert "stellar_lab/py.typed" in names
    assert not [
        name
        for name in names
        if name.endswith(".ipynb") or name.startswith(("nbs", "tests", "tools"))
    ]
    assert any(name.endswith("LICENSE") for name in names)


def test_every_module_imports_without_any_extra_or_names_it(wheel, tmp_path):
    "From the unpacked wheel, with all packages of the extras hidden."
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = f"""
import sys, importlib
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *more):
        return None if name.split(".")[0] in {EXTRA_ONLY} else self.finder.find_spec(name, *more)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
sys.path.insert(0, {str(tmp_path)!r})
from stellar_lab.survey import MissingExtra
for module in {MODULES}:
    try:
        name = "stellar_lab" if module == "__init__" else f"stellar_lab.{{module}}"
        importlib.import_module(name)
    except MissingExtra as error:
        assert module in {NETWORKS} and "stellar_lab[network]" in str(error), (module, error)
    else:
        assert module not in {NETWORKS}, module
place = sys.modules["stellar_lab"].__file__
assert place.startswith({str(tmp_path)!r}), place
from importlib.resources import files
found = {{file.name for file in files("stellar_lab.data").iterdir()}}
assert set({shipped_data()}) <= found, found
assert str(files("stellar_lab.data")).startswith({str(tmp_path)!r})
assert not [name for name in sys.modules if name.split(".")[0] in {EXTRA_ONLY}]
from stellar_lab.cli import main
main(["--help"])
"""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("STELLAR_LAB_", "PYTHONPATH"))
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "archive" in done.stdout and "train" in done.stdout


def test_what_a_module_imports_is_a_requirement(requirements):
    "So that nothing works only because a notebook tool happened to bring it."
    declared = {canonicalize_name(requirement.name) for requirement in requirements["requirements"]}
    distributions = packages_distributions()
    for module in MODULES:
        tree = ast.parse((ROOT / "stellar_lab" / f"{module}.py").read_text(encoding="utf-8"))
        names = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        names |= {
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module and not node.level
        }
        packages = (
            {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"stellar_lab"}
        )
        wanted = {
            canonicalize_name(name) for package in packages for name in distributions[package]
        }
        assert wanted <= declared, (
            f"stellar_lab.{module} imports {wanted - declared}, "
            "which 'requirements' of settings.ini does not list"
        )


def test_constraints_fix_a_version_of_each_requirement(requirements, constraints):
    for group in requirements.values():
        for requirement in group:
            fixed = constraints.get(canonicalize_name(requirement.name))
            assert fixed and requirement.specifier.contains(fixed), (
                f"constraints.txt has {fixed} for {requirement}: run 'make constraints'"
            )


def test_what_is_installed_meets_the_requirements(requirements):
    for group in requirements.values():
        for requirement in group:
            assert requirement.specifier.contains(version(requirement.name)), (
                f"{requirement} is installed as {version(requirement.name)}"
            )


def test_nbdev_and_what_it_breaks_without():
    "pip reports no conflict when one of these is too new: nbdev simply breaks."
    import nbdev.clean
    import nbdev.export
    import nbdev.test

    assert (
        version("nbdev") == "2.4.14"
        and nbdev.export.nb_export
        and nbdev.test.test_nb
        and nbdev.clean.clean_nb
    )
    assert (
        version("execnb") < "0.2"
        and int(version("fastcore").split(".")[0]) < 2
        and int(version("ghapi").split(".")[0]) < 2
    )


def test_one_version_everywhere(settings):
    assert stellar_lab.__version__ == settings["version"] == version("stellar_lab")
    assert f"\nversion: {settings['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{settings['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_supported_pythons_are_named_alike(settings):
    pythons = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text())
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    (matrix,) = re.findall(r"python: \[(.*)\]", workflow)
    assert re.findall(r'"(3\.\d+)"', matrix) == pythons
    assert (
        re.search(r"in ([\d.| ]+)\) ;;", (ROOT / "tools/environment.sh").read_text())
        .group(1)
        .split(" | ")
        == pythons
    )
    assert settings["min_python"] == pythons[0]


def test_cleaning_keeps_the_outputs_of_notebooks():
    from nbdev.config import get_config

    config = get_config(path=ROOT)
    assert not config.clear_all and config.clean_ids
