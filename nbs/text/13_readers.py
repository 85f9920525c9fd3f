# %% [markdown]
# # Can a straight line read labels?
# > Labels straight from the spectrum: what a model that reads owes, ridge regression, and what to put into a bad pixel.
#
# **Question.** The Cannon draws a star from its labels, and to label a star we turn it round. Why not learn the other direction at once: spectrum in, labels out?
#
# **Idea.** The simplest reader is a straight line, $\boldsymbol\ell = W\mathbf f + \mathbf b$: each label is a weighted sum of all pixels. There are more pixels than stars, so many lines pass through all training
# stars. *Ridge regression* takes the one with the shortest weights, which pass on the least noise.
#
# You learn what a model that reads has to say about bad pixels and errors, and you get a mark that every network has to beat. No network is needed here.

# %%
#| default_exp readers

# %%
#| export
from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.utils.validation import check_is_fitted

from stellar_lab.models import Answer, LabelModel, answer, check_spectra, finite_flux, pair_index

# %%
#| hide
import tempfile
from pathlib import Path

import pytest
from astropy.table import Table
from IPython.display import Markdown

from stellar_lab.inversion import infer
from stellar_lab.judging import error_table
from stellar_lab.models import train_test_rows
from stellar_lab.normalize import training_set
from stellar_lab.survey import LabError, archive_record, archive_root, use_style


# %% [markdown]
# ## Any model that reads
# A model that goes from spectrum to labels needs no search, but everything around it is [the contract of all models](04_models.ipynb): how training stars come in, how labels are scaled, when to doubt an answer.
#
# **Bad pixels.** A sum over all pixels has no way to leave one out. A bad pixel therefore gets the value that says nothing: the mean that good pixels have there in the training stars. The original lab fed its network whatever stood in the
# spectrum; we measure below what that costs.
#
# **Errors.** A linear map carries the photon noise over exactly, $C = W\operatorname{diag}(\sigma^2)W^\mathsf T$. Other readers state no error of their own (NaN) unless a subclass knows better. Both are calibrated as the
# Cannon's are, [on stars left out](07_judging.ipynb).

# %%
#| export
class LabelReader(LabelModel):
    """A model from spectrum to labels.

    A subclass says in `fit` how it learns, and in `_read` how it reads.
    """

    def _begin(self, labels, flux, ivar, label_names, wavelength):
        """Training stars as all models take them; learns the typical flux, returns flux and ivar
        float32."""
        flux, ivar = super()._begin(labels, flux, ivar, label_names, wavelength)
        ivar = np.asarray(ivar, np.float32)
        flux = finite_flux(np.asarray(flux, np.float32), ivar)  # a copy, ours to change
        good = ivar > 0
        flux[~good] = 0
        count = good.sum(axis=0)
        self.usable_ = count > 0  # (P,) some training star has the pixel
        mean = flux.sum(axis=0, dtype=float) / np.maximum(count, 1)
        self.typical_flux_ = np.where(self.usable_, mean, 1)
        n_good = good.sum(axis=1, dtype=np.int32)
        self.training_digest_ = self._digest(n_good, flux.sum(axis=1, dtype=float))
        return flux, ivar

    def fill(self, flux: np.ndarray, ivar: np.ndarray) -> np.ndarray:
        """Flux (N, P) with the training mean in pixels that are unusable in the star or in all
        training stars."""
        return np.where((ivar > 0) & self.usable_, flux, self.typical_flux_.astype(np.float32))

    def _read(self, flux, ivar):
        "Labels (N, K) in physical units and their covariance (N, K, K), NaN where none is known."
        raise NotImplementedError

    def read(self, flux, ivar: np.ndarray = None) -> np.ndarray:
        """Labels alone; `infer` gives them with errors and flags.

        Parameters
        ----------
        flux : (N, P) array or Spectra
            relative to the continuum
        ivar : (N, P) array, optional
            inverse variance, 0 where unusable; a `Spectra` has its own

        Returns
        -------
        (N, K) array
            physical units
        """
        spectra = check_spectra(self, flux, ivar)
        return self._read(spectra.flux, spectra.ivar)[0]


# %%
#| export
READ_BLOCK = 512  # stars at a time


@answer.register(LabelReader)
def _read_in_blocks(model, spectra, max_steps):
    "How a reader answers: no chi2, no search."
    parts = []
    for start in range(0, len(spectra), READ_BLOCK):
        rows = slice(start, start + READ_BLOCK)
        ivar = spectra.ivar[rows]
        labels, covariance = model._read(finite_flux(spectra.flux[rows], ivar, start), ivar)
        parts.append((labels, covariance, ((ivar > 0) & model.usable_).sum(axis=1)))
    return Answer(*map(np.concatenate, zip(*parts)))


# %% [markdown]
# ## Ridge regression
# $$ \sum_n \bigl|\,W\mathbf f_n+\mathbf b-\boldsymbol\ell_n\bigr|^2 + \alpha\,|W|^2 $$
# is to be smallest: near the catalogue's labels, with short weights. How short, $\alpha$ decides, and leaving out one star at a time tells which $\alpha$ is best. scikit-learn's `RidgeCV` does all of it with one
# singular value decomposition.

# %%
#| export
def photon_covariance(weights: np.ndarray, ivar: np.ndarray) -> np.ndarray:
    """What photon noise does to labels that are a linear map of the flux.

    Parameters
    ----------
    weights : (K, P) array
        of labels = weights @ flux + constant
    ivar : (N, P) array
        inverse variance; filled pixels (0) bring no noise

    Returns
    -------
    (N, K, K) array
    """
    i, j, place = pair_index(len(weights))
    variance = np.divide(1, ivar, out=np.zeros(ivar.shape), where=ivar > 0)
    return (variance @ (weights[i] * weights[j]).T)[:, place]


class RidgeLabels(LabelReader):
    """Ridge regression from flux to labels: the best that a linear map can do, in a second.

    Parameters
    ----------
    labels : sequence of str, optional
        names of the labels to learn from a `Spectra`; by default all that it holds
    alphas : sequence of float, optional
        penalties to choose from, by leaving out one star at a time
    """

    def __init__(self, labels: Sequence = None, alphas: Sequence = tuple(np.logspace(-3, 3, 19))):
        self.labels = labels
        self.alphas = alphas

    def fit(self, labels, flux=None, ivar=None, label_names=None, wavelength=None) -> "RidgeLabels":
        "Learn from stars with known labels, given as to `Cannon.fit`."
        flux, ivar = self._begin(labels, flux, ivar, label_names, wavelength)
        ridge = RidgeCV(np.array(self.alphas, dtype=float))
        ridge.fit(self.fill(flux, ivar) - self.typical_flux_, self.scale(self.training_labels_))
        self.alpha_ = float(ridge.alpha_)
        self.weights_ = ridge.coef_ * self.scales_[:, None]  # (K, P) physical units
        self.constant_ = self.unscale(ridge.intercept_) - self.weights_ @ self.typical_flux_
        return self

    def affine_map(self) -> tuple:
        "W (K, P) and b (K,) of labels = W flux + b, in physical units."
        check_is_fitted(self, "weights_")
        return self.weights_, self.constant_

    def _read(self, flux, ivar):
        weights, constant = self.affine_map()
        labels = self.fill(flux, ivar) @ weights.T + constant
        return labels, photon_covariance(weights, np.where(self.usable_, ivar, 0))


# %% [markdown]
# A known truth first: made-up spectra of 60 pixels whose labels are exactly a linear map of the flux. The map must come back, and the errors must be the size of the noise that we add.

# %%
def made_up(n_stars=300, n_pixels=60, noise=0.0, seed=3):
    "Spectra that depend linearly on three labels: labels, flux, ivar."
    rng = np.random.default_rng(seed)
    labels = rng.normal([4500, 2.0, -0.3], [400, 0.8, 0.3], size=(n_stars, 3))
    slopes = 0.03 * np.random.default_rng(0).normal(size=(3, n_pixels))
    flux = (
        0.9
        + (labels - [4500, 2.0, -0.3]) / [400, 0.8, 0.3] @ slopes
        + noise * rng.standard_normal((n_stars, n_pixels))
    )
    return labels, flux.astype("f4"), np.full(flux.shape, (noise or 0.01) ** -2, "f4")


# %%
THREE = ["TEFF", "LOGG", "M_H"]
labels, flux, ivar = made_up()
ridge = RidgeLabels(alphas=(1e-9,)).fit(labels, flux, ivar, THREE)
assert np.allclose(ridge.scale(ridge.read(flux, ivar)), ridge.scale(labels), atol=1e-4)

noisy = made_up(noise=0.01, seed=5)
table = infer(ridge, *noisy[1:])
pull = (table["teff"].value - noisy[0][:, 0]) / table["teff_err"].value
print(f"pulls of the temperature: mean {pull.mean():.2f}, scatter {pull.std():.2f}")
assert abs(pull.std() - 1) < 4 / np.sqrt(2 * len(pull))

# %% [markdown]
# ## What is in a bad pixel?
# The stars of the archive at hand, split as in chapter 4 by the same function. Ridge regression is quick enough to try the three ways: flux as it stands, one (the continuum), and the training mean.

# %%
use_style()
record = archive_record(archive_root())
names = list(record.labels)
spectra = training_set(archive_root(), progress=False)[0].replace(
    mask=None
)  # its bits have become ivar = 0
train, test = train_test_rows(len(spectra))
truth = spectra[test].labels(names)

# %%
good, every = spectra.ivar > 0, np.ones_like(spectra.ivar)
fillings = {
    "as it stands": (np.nan_to_num(spectra.flux), every),
    "one": (np.where(good, spectra.flux, 1), every),
    "training mean": (spectra.flux, spectra.ivar),
}
rows, errors = [], {}
for filling, (flux, ivar) in fillings.items():
    ridge = RidgeLabels().fit(spectra[train].labels(names), flux[train], ivar[train], names)
    table = infer(ridge, flux[test], ivar[test])
    errors["ridge", filling] = error_table(table, truth, names, ridge.scales_)
    rows.append(
        {
            "bad pixels": filling,
            "alpha": f"{ridge.alpha_:.3g}",
            **{n: f"{v:.3f}" for n, v in zip(names, errors["ridge", filling]["scaled_rmse"])},
            "mean": f"{errors['ridge', filling]['scaled_rmse'].mean():.3f}",
        }
    )
Table(rows)

# %%
#| echo: false
scaled = {filling: errors["ridge", filling]["scaled_rmse"].mean() for filling in fillings}
Markdown(
    f"**What to see.** RMSE of {len(test)} test stars in scaled labels. {np.mean(~good):.0%} of "
    f"the pixels are bad, and what stands in them decides: {scaled['as it stands']:.3f} with the "
    f"flux as it stands, {scaled['one']:.3f} with ones, "
    f"{scaled['training mean']:.3f} with the training mean. The mean is what all our networks put "
    f"there. It stands inside the model, so nobody has to remember it."
)

# %%
assert scaled["training mean"] < scaled["one"] and scaled["training mean"] < scaled["as it stands"]

# %% [markdown]
# ## Keep it
# A reader is kept as every model is.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "ridge.asdf"
    ridge.save(path)
    again = RidgeLabels.load(path)
assert np.array_equal(again.read(spectra[test]), ridge.read(spectra[test]))
with pytest.raises(LabError, match="ivar is negative"):
    infer(ridge, spectra.flux[:1], -spectra.ivar[:1])

# %% [markdown]
# **Exercise.** Draw the weights of the temperature over the spectrum of a star. Which lines does the line look at? Compare with the derivative of [The Cannon](05_cannon.ipynb).
