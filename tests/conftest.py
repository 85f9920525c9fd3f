"""What several tests need: made-up stars.

`from conftest import make_spectra`; a plain function, so that properties (hypothesis) and
module-level models can use it, too.
"""

import numpy as np
from astropy.table import Table

from stellar_lab.survey import LABELS, Spectra

MIDDLE = {"TEFF": 4500, "LOGG": 2}  # of made-up stars; -0.3 for an abundance
SPREAD = {"TEFF": 300, "LOGG": 0.7}  # 0.4 for an abundance


def make_labels(n_stars, names, seed=0):
    "Labels (N, L) of made-up giants, each drawn from a normal distribution of its own."
    middle = [MIDDLE.get(name, -0.3) for name in names]
    spread = [SPREAD.get(name, 0.4) for name in names]
    return np.random.default_rng(seed).normal(middle, spread, (n_stars, len(names)))


def make_spectra(
    n_stars=150,
    grid=None,
    names=("TEFF", "LOGG", "FE_H"),
    *,
    labels=None,
    flux=None,
    error=0.01,
    noisy=True,
    bad=0.0,
    seed=0,
    **meta,
):
    """Made-up stars: noise around a flux, `ivar` to match, labels in the table.

    Parameters
    ----------
    n_stars : int
        How many; as many as `labels` or `flux` has where these are given.
    grid : (P,) array, optional
        Wavelengths; 40 pixels by default.
    names : sequence of str
        Names of the labels; () for stars without labels.
    labels : (N, L) array, optional
        Drawn by `make_labels` by default.
    flux : (N, P) array, optional
        Without noise. By default linear in the labels, 0.9 in the middle; the slopes are the same
        for any seed, so that stars of two seeds can be trained on and tested.
    error : float or (N, P) array
        1-sigma error of the flux, and size of the noise.
    noisy : bool
        False leaves the noise out; the errors stay.
    bad : float
        Share of pixels with `ivar = 0`.
    seed : int
        Same seed, same stars.
    **meta
        Facts for `stars.meta`, over a product "apstar" that is normalized.
    """
    rng = np.random.default_rng([seed, 1])
    grid = np.linspace(15200, 15300, 40) if grid is None else grid
    if labels is None:
        labels = make_labels(n_stars if flux is None else len(flux), names, seed)
    if flux is None:
        middle = [MIDDLE.get(name, -0.3) for name in names]
        spread = [SPREAD.get(name, 0.4) for name in names]
        slopes = 0.05 * np.random.default_rng(1).normal(size=(len(names), len(grid)))
        flux = 0.9 + (labels - middle) / spread @ slopes
    error = np.broadcast_to(error, flux.shape)
    noise = error * rng.standard_normal(flux.shape) if noisy else 0
    ivar = np.where(rng.random(flux.shape) < bad, 0, error**-2.0)
    stars = Table({"APOGEE_ID": [f"star {k}" for k in range(len(flux))]})
    for name, column in zip(names, np.transpose(labels), strict=True):
        stars[name] = column
        stars[name].unit = LABELS[name].unit if name in LABELS else None
    stars.meta = {"product": "apstar", "normalized": True} | meta
    mask = np.zeros(flux.shape, np.int16)
    return Spectra(grid, (flux + noise).astype("f4"), ivar.astype("f4"), stars, mask)
