"""Reads settings.ini, the single source of metadata and requirements."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(here / "settings.ini", encoding="utf-8")
project = settings["DEFAULT"]


def requirements(name):
    return project[name].split()


EXTRAS = ("notebook", "network", "parquet", "video", "test")
extras = {extra: requirements(f"{extra}_requirements") for extra in EXTRAS}
extras["all"] = [requirement for extra in EXTRAS for requirement in extras[extra]]
extras["synthesis"] = requirements(
    "synthesis_requirements"
)  # remakes what data/ ships; not part of "all"

setup(
    name=project["lib_name"],
    version=project["version"],
    description=project["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
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
    ],
    python_requires=f">={project['min_python']}",
    packages=["stellar_lab", "stellar_lab.data"],
    package_dir={"stellar_lab.data": "data"},
    package_data={"stellar_lab.data": ["*.fits", "*.npy", "*.ecsv", "*.md"]},
    install_requires=requirements("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": project["console_scripts"].split()},
    zip_safe=False,
)
