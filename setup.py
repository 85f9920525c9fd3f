"""Reads settings.ini, the single source of metadata and requirements."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
SETTINGS = here / "settings.ini"


def read_settings():
    if not SETTINGS.is_file():  # configparser would pass over it in silence
        raise SystemExit(
            f"{SETTINGS} is missing: setup.py reads name, version and requirements from it. "
            "Build from the repository or from a complete source distribution."
        )
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(SETTINGS, encoding="utf-8")
    return parser["DEFAULT"]


project = read_settings()


def requirements(name):
    return project[name].split()


def description():
    """README.md with absolute links, since PyPI shows it without the files beside it."""

    def absolute(link):
        kind = "raw" if link[1].endswith((".png", ".jpg", ".svg", ".gif")) else "blob"
        return f"]({project['git_url']}/{kind}/{project['branch']}/{link[1]}"

    text = (here / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\((?![a-z]+:|//|#)(?:\./)?([^)\s]+)", absolute, text)


EXTRAS = ("notebook", "network", "parquet", "video", "test")
extras = {extra: requirements(f"{extra}_requirements") for extra in EXTRAS}
extras["all"] = [requirement for extra in EXTRAS for requirement in extras[extra]]
# Remakes what data/ ships; not part of "all".
extras["synthesis"] = requirements("synthesis_requirements")

setup(
    name=project["lib_name"],
    version=project["version"],
    description=project["description"],
    long_description=description(),
    long_description_content_type="text/markdown",
    keywords=project["keywords"],
    author=project["author"],
    author_email=project["author_email"],
    url=project["git_url"],
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Astronomy",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
    ],
    python_requires=f">={project['min_python']}",
    packages=["stellar_lab", "stellar_lab.data"],
    package_dir={"stellar_lab.data": "data"},
    package_data={
        "stellar_lab": ["py.typed"],
        "stellar_lab.data": ["*.fits", "*.npy", "*.ecsv", "*.md"],
    },
    install_requires=requirements("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": project["console_scripts"].split()},
    zip_safe=False,
)
