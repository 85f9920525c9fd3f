"""A small archive and a model of it, for the tests of training, labelling and command line.

A test module that wants these fixtures says `pytest_plugins = ["forty_stars"]`.
"""

import numpy as np
import pytest

from stellar_lab.archives import write_clusters
from stellar_lab.clean import find_files
from stellar_lab.cli import main
from stellar_lab.normalize import training_set

QUICK = ["--labels", "teff,m_h", "--scatter"]  # six terms: forty stars are enough


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    "Forty stars, two of their files damaged."
    root = tmp_path_factory.mktemp("archives") / "forty"
    write_clusters(
        root,
        stars=40,
        flaws={"truncated": 1, "html": 1, "no-row": 1, "zero-flux": 1},
        workers=2,
        progress=False,
    )
    return root


@pytest.fixture(scope="session")
def model(root, tmp_path_factory):
    "A model of that archive, in a file with its record."
    path = tmp_path_factory.mktemp("models") / "giants.asdf"
    assert main(["train", str(root), "--model", str(path), *QUICK]) == 0
    return path


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
