"""The experiment with networks that saw synthetic stars first: its record, and the tool."""

import sys
from pathlib import Path

import numpy as np
import pytest
from astropy.table import QTable

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import tuning
from stellar_lab.archives import real_stars
from stellar_lab.physics import PHYSICS_LABELS, SyntheticStars, draw_stars, redraw
from stellar_lab.survey import data_file


@pytest.fixture(scope="module")
def giants():
    spectra = redraw(real_stars())
    return spectra[np.flatnonzero(spectra.labels(("LOGG",))[:, 0] < 3.8)[::12]]


def test_recorded_networks_are_complete():
    with data_file("sky_tuning.ecsv") as path:
        table = QTable.read(path, format="ascii.ecsv")
    assert set(table["label"]) == set(tuning.LABELS) and np.isfinite(table["rmse"]).all()
    assert {"command", "date", "stars", "tensorflow", "emulator_models"} <= set(table.meta)


def test_synthetic_labels_in_the_words_of_the_survey():
    labels = draw_stars(4)
    survey = tuning.as_survey_labels(labels)
    alpha = [PHYSICS_LABELS.index(name) for name in ("MG_FE", "SI_FE", "ALPHA_FE")]
    assert survey.shape == (4, len(tuning.LABELS))
    assert np.array_equal(survey[:, 2], labels[:, 2])
    assert np.allclose(survey[:, 3], labels[:, alpha].mean(axis=1))


def test_a_network_sees_synthetic_stars_first(giants):
    synthetic = tuning.noisy_stars(SyntheticStars(), giants, n=32)
    options = dict(labels=tuning.LABELS, members=1, width=4, components=4, epochs=0)
    weights = [
        network.fit(giants, progress=False).core_.get_weights()
        for network in (
            tuning.synthetic_first(None, **options),
            tuning.synthetic_first(synthetic, first_epochs=1, **options),
        )
    ]
    assert any(not np.array_equal(a, b) for a, b in zip(*weights))
