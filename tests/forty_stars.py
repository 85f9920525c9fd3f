"""A small archive and a model of it, for the tests of training, labelling and command line.

A test module that wants these fixtures says `pytest_plugins = ["forty_stars"]`.
"""

import fcntl
import os

import numpy as np
import pytest

from stellar_lab.archives import write_clusters
from stellar_lab.clean import find_files
from stellar_lab.cli import main
from stellar_lab.normalize import training_set

QUICK = ["--labels", "teff,m_h", "--scatter"]  # six terms: forty stars are enough


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    "Archive and model, made by the process of the tests that is first to need them."
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the folder above belongs to all processes
        folder = folder.parent
    root = folder / "archives" / "forty"
    path = folder / "models" / "giants.asdf"
    with open(folder / "forty.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            flaws = {"truncated": 1, "html": 1, "no-row": 1, "zero-flux": 1}
            write_clusters(root, stars=40, flaws=flaws, workers=2, progress=False)
            path.parent.mkdir()
            assert main(["train", str(root), "--model", str(path), *QUICK]) == 0
    return root, path


@pytest.fixture(scope="session")
def root(made_once):
    "Forty stars, two of their files damaged."
    return made_once[0]


@pytest.fixture(scope="session")
def model(made_once):
    "A model of that archive, in a file with its record."
    return made_once[1]


@pytest.fixture(scope="session")
def good_files(root):
    "Files of the stars that pass all cuts, and their spectra as training has them."
    spectra, _ = training_set(root, labels=("TEFF", "M_H"), progress=False)
    files = find_files(root, "apstar", "all")
    place = {str(name): str(path) for name, path in zip(files["APOGEE_ID"], files["path"])}
    return [place[str(name)] for name in spectra.stars["APOGEE_ID"]], spectra


@pytest.fixture
def run(capsys):
    "Run a command; gives exit code, output, error output."

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def same_labels():
    "Assert that two tables hold the same labels."
    return _same_labels


def _same_labels(table, expected, model):
    "To a millionth, errors to a ten-thousandth: the covariance comes from float32 products."
    for name in model.label_names_:
        for column, rtol in ((name.lower(), 1e-6), (f"{name.lower()}_err", 1e-4)):
            assert np.allclose(table[column].value, expected[column].value, rtol=rtol, atol=1e-6), (
                column
            )
