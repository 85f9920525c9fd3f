# %% [markdown]
# # What was the model not told?
# > Stars differ in more than the labels we are given: a Cannon that learns these hidden labels weighs its evidence rightly, and knows how sure it is.
#
# **Question.** Two giants have the same temperature, gravity and composition in the catalogue, and their spectra still differ by more than photon noise. What is a
# model to do with the difference?
#
# **Idea.** [The Cannon](05_cannon.ipynb) calls it scatter, and believes that each pixel scatters on its own. But a star with more carbon is darker in a thousand pixels at
# once. Such a common change is one more label of the star. Nobody tells us its value, so we call it *hidden*, and learn it together with the coefficients.
#
# You learn expectation maximization, how to get rid of a quantity that you do not want to know, and why a model with hidden labels states larger errors and makes smaller ones.

# %%
#| default_exp hidden

# %%
#| export
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted
from tqdm import tqdm

from stellar_lab.cannon import Cannon, pair_index, whole_matrices
from stellar_lab.inversion import infer, pixel_weights
from stellar_lab.models import (
    Held,
    check_spectra,
    finite_flux,
    fold_numbers,
    in_blocks,
    label_values,
    poor_fit_limit,
)
from stellar_lab.survey import LabError

# %%
#| hide
import tempfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
from astropy.table import Table
from sklearn.linear_model import RidgeCV

from stellar_lab.inversion import statistics
from stellar_lab.judging import error_table
from stellar_lab.models import train_test_rows
from stellar_lab.normalize import training_set
from stellar_lab.survey import Spectra, archive_record, archive_root, label_record, use_style

# %% [markdown]
# ## A world of one label and one secret
# We begin where we know the truth. Each of 200 stars has one label, and its spectrum of 60 pixels is a straight line in it. But each star also has a secret, a number that
# darkens every third pixel, and that no catalogue lists.

# %%
use_style()
rng = np.random.default_rng(1)
N, P = 200, 60
label = rng.normal(size=(N, 1))
secret = rng.normal(size=(N, 1))
slope = 0.02 * rng.normal(size=(1, P))
slope[:, ::3] -= 0.02  # where the secret acts, the label acts, too
darker = np.where(np.arange(P) % 3 == 0, 0.03, 0.0)[None]
error = 0.01
flux = 0.9 + label @ slope - secret @ darker + error * rng.standard_normal((N, P))
flux = flux.astype("f4")
ivar = np.full((N, P), error**-2, "f4")

# %% [markdown]
# A plain Cannon does not know the secret. What it leaves over should be noise, and noise in one pixel should know nothing of noise in another. We look at the correlation
# of what is left in all pairs of pixels.

# %%
plain = Cannon(order=1, scatter=True).fit(label, flux, ivar, ["SHOWN"])
left = flux - plain.predict(label)
correlation = np.corrcoef(left.T)
fig, ax = plt.subplots(figsize=(5, 3.6))
image = ax.imshow(correlation, vmin=-1, vmax=1, cmap="RdBu_r")
fig.colorbar(image, ax=ax, label="correlation of residuals")
ax.set(xlabel="pixel", ylabel="pixel", title="What a Cannon leaves over")
together = correlation[::3, ::3][~np.eye(20, dtype=bool)]
assert together.min() > 0.5 and np.abs(correlation[1::3, 2::3]).max() < 0.4

# %% [markdown]
# **What to see.** Every third pixel goes with every other third pixel. This is no noise of single pixels: it is one number per star, seen twenty times.
#
# The plain Cannon counts twenty pixels that say the same as twenty independent measurements. So its errors are too small:

# %%
table = infer(plain, flux, ivar, min_good=0)
pull = (table["shown"].value - label[:, 0]) / table["shown_err"].value
print(f"errors made over errors stated: {pull.std():.2f}")
assert pull.std() > 1.15

# %% [markdown]
# ## If we knew how the secret works
# A star's spectrum is now
# $$ f_p = \boldsymbol\theta_p\cdot\mathbf v(\boldsymbol\ell) + \mathbf u_p\cdot\mathbf z + \text{noise}, \qquad \mathbf z\sim\mathcal N(0,1), $$
# with $q$ hidden labels $\mathbf z$, each of them a number of order one, and a direction $\mathbf u$ in which each moves the spectrum. If coefficients and directions are known,
# the hidden labels of a training star follow from its residuals $\mathbf r = \mathbf f-\Theta\mathbf v$ by a small linear system: with weights $w_p=1/(\sigma_p^2+s_p^2)$,
# $$ M = 1 + \sum_p w_p\,\mathbf u_p\mathbf u_p^{\mathsf T}, \qquad \langle\mathbf z\rangle = M^{-1}\sum_p w_p\,\mathbf u_p r_p, \qquad \operatorname{cov}\mathbf z = M^{-1}. $$
# The $1$ in $M$ is what we know before we look: a hidden label of 5 is unlikely. For all stars at once this is two matrix products and one inversion of small matrices.

# %%
#| exporti
_PASS = 256  # stars to a product


def hidden_values(residual, ivar, directions, scatter2) -> tuple:
    """The hidden labels of stars whose other labels are known.

    Parameters
    ----------
    residual : (N, P) array
        flux - what the labels explain; finite
    ivar : (N, P) array
        inverse variance, 0 where unusable
    directions : (q, P) array
        change of the flux per unit of each hidden label
    scatter2 : (P,) array
        squared scatter of each pixel; NaN where the model has nothing to say

    Returns
    -------
    values : (N, q) array
        means
    covariance : (N, q, q) array
    """
    rows = np.asarray(directions, np.float32)
    scatter2 = np.asarray(scatter2, np.float32)
    i, j = pair_index(len(rows))
    products = (rows[i] * rows[j]).T.copy()

    def work(stars):
        weight = pixel_weights(np.asarray(ivar[stars], np.float32), scatter2)
        M = whole_matrices(weight @ products, len(rows), diagonal=1)
        pull = ((weight * residual[stars]) @ rows.T).astype(float)
        covariance = np.linalg.inv(M)
        return (covariance @ pull[..., None])[..., 0], covariance

    parts = in_blocks(work, len(residual), _PASS)
    return tuple(np.concatenate(part) for part in zip(*parts))


def hidden_chi2(residual, ivar, directions, scatter2, values) -> np.ndarray:
    """chi2 (N,) of stars at their hidden labels, which count as seen to be 0 with an error of 1.

    Parameters
    ----------
    residual, ivar, directions, scatter2
        as of `hidden_values`
    values : (N, q) array
        the hidden labels
    """
    left = residual - (values @ directions).astype(np.float32)
    weight = pixel_weights(ivar, np.asarray(scatter2, np.float32))
    return np.einsum("np,np,np->n", weight, left, left) + (values**2).sum(axis=1)


# %% [markdown]
# We tell it the true direction:

# %%
values, covariance = hidden_values(left, ivar, -darker, np.zeros(P))
print(f"correlation with the true secret {np.corrcoef(values[:, 0], secret[:, 0])[0, 1]:.4f}")
pull = (values[:, 0] - secret[:, 0]) / np.sqrt(covariance[:, 0, 0])
print(f"errors made over errors stated {pull.std():.2f}")
assert np.corrcoef(values[:, 0], secret[:, 0])[0, 1] > 0.99

# %% [markdown]
# ## If we knew the secret
# The other way round it is as easy. If every star's hidden labels were known, they would be labels like the others: one regression per pixel on the terms *and* the hidden labels
# gives coefficients and directions. But the hidden labels are known up to a covariance only, and $\langle\mathbf z\mathbf z^{\mathsf T}\rangle = \langle\mathbf z\rangle\langle\mathbf z\rangle^{\mathsf T}+M^{-1}$: the
# covariance is added where the regression multiplies hidden labels with each other. A direction that the stars barely show is thereby kept short.
#
# The scatter follows from what is then left: squared residuals, plus what the uncertain hidden labels may have moved, $\mathbf u^{\mathsf T}M^{-1}\mathbf u$, less the photon noise.

# %%
#| export
_LEAST_SCATTER2 = 1e-8
_RIDGE = 1e-6  # keeps a direction that no star shows at zero
_SCATTER_STEPS = 2


@dataclass
class _Moments:
    "What one pixel's regression needs to know of the stars: terms and hidden labels together."

    design: np.ndarray  # (N, T+q) terms and hidden labels' means
    products: np.ndarray  # (N, M) distinct products of two columns, covariance added
    covariance: np.ndarray  # (N, q(q+1)/2) of the hidden labels, off the diagonal twice

    @classmethod
    def of(cls, terms, values, covariance):
        design = np.concatenate([terms, values], axis=1)
        T = terms.shape[1]
        i, j = pair_index(design.shape[1])
        products = design[:, i] * design[:, j]
        hidden = i >= T
        products[:, hidden] += covariance[:, i[hidden] - T, j[hidden] - T]
        a, b = pair_index(values.shape[1])
        twice = covariance[:, a, b] * np.where(a == b, 1, 2)
        return cls(design.astype("f4"), products.astype("f4"), twice.astype("f4"))


# %%
#| export
def _scatter_step(squares, ivar, scatter2):
    "One step of Fisher's scoring for the scatter of each pixel; squares (N, B) hold the noise too."
    weight2 = pixel_weights(ivar, scatter2.astype("f4")) ** 2
    variance = 1 / np.where(ivar > 0, ivar, np.inf)
    change = (weight2 * (squares - variance)).sum(axis=0, dtype=float)
    total = weight2.sum(axis=0, dtype=float)
    return np.maximum(change / np.maximum(total, 1e-30), _LEAST_SCATTER2)


def _regress(moments, flux, ivar, scatter2, hidden):
    "Coefficients and directions (B, T+q) and scatter (B,) of a block of pixels."
    columns = moments.design.shape[1]
    weight = pixel_weights(ivar, scatter2.astype("f4"))
    A = whole_matrices(weight.T @ moments.products, columns, diagonal=_RIDGE)
    b = ((weight * flux).T @ moments.design).astype(float)
    solved = np.linalg.solve(A, b[..., None])[..., 0]
    directions = solved[:, -hidden:].astype("f4")
    i, j = pair_index(hidden)
    squares = (flux - moments.design @ solved.T.astype("f4")) ** 2
    squares += moments.covariance @ (directions[:, i] * directions[:, j]).T
    for _ in range(_SCATTER_STEPS):
        scatter2 = _scatter_step(squares, ivar, scatter2)
    return solved, scatter2


# %% [markdown]
# With the true secret in hand (and no covariance) one regression finds the direction:

# %%
exact = np.zeros((N, 1, 1))
terms = np.concatenate([np.ones((N, 1)), label], axis=1)
found, _ = _regress(_Moments.of(terms, secret, exact), flux, ivar, np.full(P, 1e-6), 1)
fig, ax = plt.subplots(figsize=(5, 2.2))
ax.plot(-darker[0], "k", lw=3, alpha=0.3, label="true")
ax.plot(found[:, 2], ".", label="regression")
ax.set(xlabel="pixel", ylabel="change of the flux\nper unit of the secret")
ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
assert np.abs(found[:, 2] + darker[0]).max() < 5 * error / np.sqrt(N)


# %% [markdown]
# ## Neither is known
# So we go round. Guess the directions, find the hidden labels, find better directions, and again. This is *expectation maximization* (Dempster, Laird and Rubin 1977, JRSS B 39,
# 1): each round makes the training spectra more probable, never less. The first guess are the directions in which the plain Cannon's residuals vary most. Stretching all directions and
# shrinking all hidden labels would change nothing, so after each round we stretch until the hidden labels have a variance of one.

# %%
#| exporti
def _first_guess(residual, hidden):
    "The directions (q, P) in which residuals (N, P) vary most."
    values, vectors = np.linalg.eigh((residual @ residual.T).astype(float))
    largest = np.argsort(values)[::-1][:hidden]
    return (residual.T @ vectors[:, largest].astype("f4")).T / np.sqrt(len(residual))


def learn_directions(
    flux: np.ndarray,
    ivar: np.ndarray,
    terms: np.ndarray,
    theta: np.ndarray,
    scatter2: np.ndarray,
    hidden: int,
    rounds: int = 12,
    progress: bool = False,
) -> tuple:
    """Coefficients, hidden directions and scatter of all pixels, by expectation maximization.

    Parameters
    ----------
    flux, ivar : (N, P) float32 arrays
        flux finite; ivar 0 where unusable
    terms : (N, T) array
        of the training stars' scaled labels, the constant first
    theta : (P, T) array
        coefficients to begin with, finite
    scatter2 : (P,) array
        squared scatter to begin with
    hidden : int
        q, number of hidden labels
    rounds : int, default 12
    progress : bool, default False
        show a bar

    Returns
    -------
    theta : (P, T) array
        coefficients
    directions : (q, P) array
        change of the flux per unit of a hidden label
    scatter2 : (P,) array

    Notes
    -----
    Probabilistic principal components with known, unequal noise and missing pixels (Tipping and
    Bishop 1999, JRSS B 61, 611; Roweis 1998, NIPS 10, 626), beside a regression on the terms.
    """
    residual = np.where(ivar > 0, flux - (terms @ theta.T).astype("f4"), 0)
    directions = _first_guess(residual, hidden)
    T = terms.shape[1]
    for _ in tqdm(range(rounds), desc="hidden labels", disable=not progress, leave=False):
        residual = flux - (terms @ theta.T).astype("f4")
        values, covariance = hidden_values(residual, ivar, directions, scatter2)
        moments = _Moments.of(terms, values, covariance)

        def work(pixels, moments=moments, scatter2=scatter2):
            block = flux[:, pixels], ivar[:, pixels], scatter2[pixels]
            return _regress(moments, *block, hidden)

        parts = in_blocks(work, flux.shape[1])
        solved, scatter2 = (np.concatenate(part) for part in zip(*parts))
        size = np.linalg.cholesky((values.T @ values + covariance.sum(axis=0)) / len(values))
        theta = solved[:, :T]
        directions = (solved[:, T:] @ size).T
    return theta, directions, scatter2


# %% [markdown]
# One, three and twelve rounds on the toy, and the angle between the direction found and the true one:

# %%
start = np.nan_to_num(plain.theta_), plain.scatter_**2


def angle(a, b):
    "Angle between two directions [degrees]."
    cosine = abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)
    return np.degrees(np.arccos(min(cosine, 1)))


for rounds in (1, 3, 12):
    _, directions, scatter2 = learn_directions(flux, ivar, terms, *start, 1, rounds)
    print(f"{rounds:2d} rounds: {angle(directions[0], darker[0]):.2f} degrees")
photons = np.degrees(error / np.sqrt(N) * np.sqrt(P) / np.linalg.norm(darker))
print(f"photon noise alone would allow {photons:.2f}")
assert angle(directions[0], darker[0]) < 2 * photons
assert np.median(np.sqrt(scatter2)) < error / 3  # what looked like scatter is explained

# %% [markdown]
# ## Getting rid of what nobody asked for
# To label a star we need its labels at the best hidden labels, whatever these are. For given labels the best hidden ones follow from the linear system above. Put in, they leave a $\chi^2$ of
# the labels alone, again with a matrix $A'$ and a vector $\mathbf b'$:
# $$ A' = A_{vv}-A_{vz}(A_{zz}+1)^{-1}A_{zv}, \qquad \mathbf b' = \mathbf b_v-A_{vz}(A_{zz}+1)^{-1}\mathbf b_z. $$
# All that follows, search, exact step, posterior and errors, sees $A'$ and $\mathbf b'$ and never learns that anything was hidden. What is taken off $A$ is the evidence
# that a hidden label could explain as well. That is why the errors grow.
#
# The model keeps its directions as `hidden_`, and [the inversion](06_inversion.ipynb) eliminates them.

# %%
#| exporti
_ROUNDS = 12


def _check_number(number, n_stars):
    "LabError for a number of hidden labels that cannot be."
    whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    if not whole or not 0 <= number < n_stars:
        raise LabError(
            f"hidden is {number!r}: give a whole number from 0, and below the number of "
            f"training stars ({n_stars})"
        )


def _learn_hidden(flux, ivar, terms, plain, hidden, rounds=_ROUNDS):
    """Coefficients, ordered directions, scatter^2 of all pixels, and chi2 of each star at its best
    hidden labels, from what a plain Cannon learned."""
    theta, scatter, _, _ = plain
    usable = np.isfinite(theta[:, 0])
    ivar = np.where(usable, ivar, 0).astype(np.float32)
    flux = np.where(ivar > 0, flux, 0).astype(np.float32)
    start = np.nan_to_num(theta), np.nan_to_num(scatter) ** 2
    found = learn_directions(flux, ivar, terms, *start, hidden, rounds)
    theta, directions, scatter2 = found
    directions = strongest_first(np.where(usable, directions, 0))
    residual = np.where(ivar > 0, flux - (terms @ theta.T).astype("f4"), 0)
    values, _ = hidden_values(residual, ivar, directions, scatter2)
    chi2 = hidden_chi2(residual, ivar, directions, scatter2, values)
    theta = np.where(usable[:, None], theta, np.nan)
    return theta, directions, np.where(usable, scatter2, np.nan), chi2


def strongest_first(directions: np.ndarray) -> np.ndarray:
    """The same hidden labels, turned so that each moves the spectrum in a way of its own.

    Parameters
    ----------
    directions : (q, P) array

    Returns
    -------
    (q, P) array
        at right angles to each other, the strongest first; the largest change of each is positive
    """
    size, turn = np.linalg.eigh(directions @ directions.T)
    turned = turn[:, np.argsort(size)[::-1]].T @ directions
    largest = np.abs(turned).argmax(axis=1)
    return turned * np.sign(turned[np.arange(len(turned)), largest])[:, None]


# %% [markdown]
# On the toy, two hidden labels where there is one: the second direction has nothing to say, and stays short.

# %%
parts = plain.theta_, plain.scatter_, None, None
_, directions, _, chi2 = _learn_hidden(flux, ivar, terms, parts, 2)
print("lengths of the directions:", np.linalg.norm(directions, axis=1).round(3))
print(f"chi2 per pixel {chi2.mean() / P:.2f}")
assert np.linalg.norm(directions[1]) < 0.3 * np.linalg.norm(directions[0])


# %% [markdown]
# The hidden labels of a star, and its own best spectrum, follow from the directions.

# %%
#| export
class _Hidden(Cannon):
    """A Cannon with hidden directions ``hidden_`` (q, P), and what follows from them."""

    _entries = Cannon._entries | {"hidden_": Held("number", "qP")}

    @property
    def poor_fit_limit_(self) -> float:
        "chi2 per pixel from which a fit counts as poor; each pixel learned T + q numbers."
        learned = len(self.vectorizer_) + len(self.hidden_) if len(self.hidden_) else 0
        return poor_fit_limit(self.training_chi2_, learned)

    def values(self, spectra, labels) -> np.ndarray:
        """The hidden labels of stars.

        Parameters
        ----------
        spectra : Spectra
            N stars, as for `infer`
        labels : (N, K) array or Table
            their labels; a table may be what `infer` gave

        Returns
        -------
        (N, q) array
            each of variance 1 among the training stars
        """
        check_is_fitted(self, "hidden_")
        spectra = check_spectra(self, spectra)
        flux = finite_flux(spectra.flux, spectra.ivar)
        drawn = np.nan_to_num(self.predict(labels))
        if len(drawn) != len(flux):
            raise LabError(f"{len(drawn)} rows of labels for {len(flux)} spectra")
        left = np.where(spectra.ivar > 0, flux - drawn, 0)
        scatter2 = np.where(self.usable_, self.scatter_**2, np.nan)
        return hidden_values(left, spectra.ivar, self.hidden_, scatter2)[0]

    def best_spectra(self, spectra, labels) -> np.ndarray:
        """The model's spectra at the best hidden labels of each star; `predict` has them at zero.

        Parameters
        ----------
        spectra : Spectra
            N stars, as for `infer`
        labels : (N, K) array or Table
            their labels; a table may be what `infer` gave

        Returns
        -------
        (N, P) array
            relative to the continuum; NaN in pixels that could not be fitted
        """
        return self.predict(labels) + self.values(spectra, labels) @ self.hidden_


# %% [markdown]
# Put together by hand on the toy, the direction that we know in it:

# %%
by_hand = _Hidden(order=1, scatter=True).fit(label, flux, ivar, ["SHOWN"])
by_hand.hidden_ = -darker
toys = Spectra(np.arange(float(P)), flux, ivar, Table({"APOGEE_ID": [str(n) for n in range(N)]}))
seen = by_hand.values(toys, label)[:, 0]
drawn = by_hand.best_spectra(toys, label)
print(
    f"hidden labels: correlation with the true secret {np.corrcoef(seen, secret[:, 0])[0, 1]:.3f}"
)
print(f"rms left by the labels {np.std(flux - by_hand.predict(label)):.4f}", end=", ")
print(f"and by the star's own best spectrum {np.std(flux - drawn):.4f}")
assert np.std(flux - drawn) < 1.1 * error

# %% [markdown]
# How many hidden labels are there? The stars say it: a third of them is left out, and the number that labels them best is taken. Few stars bear few hidden labels, and few left-out stars say little: where there are few, each third is
# left out in turn.

# %%
#| export
_CANDIDATES = (0, 5, 10, 20, 40, 60)  # numbers of hidden labels to choose from
_CHOICE_FOLDS = 3
_CHOICE_ROUNDS = 6  # enough to compare
_STARS_EACH = 4  # training stars that a hidden label needs at least
_WORSE = 1.03  # times the smallest error: no larger number is tried
_MANY_STARS = 300  # of so many a third is asked, not each third


def _missed(model, number, flux, ivar, rows):
    "Scaled errors of some stars, by a model with so many hidden labels that has not seen them."
    labels = model.training_labels_
    names = model.label_names_
    one = clone(model).set_params(hidden=number)
    one._rounds = _CHOICE_ROUNDS
    one.fit(labels[~rows], flux[~rows], ivar[~rows], names)
    found = label_values(infer(one, flux[rows], ivar[rows]), names)
    return (found - labels[rows]) / model.scales_


def _chosen_number(model, flux, ivar):
    "The number of hidden labels with which left-out stars are labelled best."
    stars = len(model.training_labels_)
    learned = stars * (1 - 1 / _CHOICE_FOLDS)
    if learned < 2 * _CANDIDATES[1] * _STARS_EACH:
        return 0  # too few to bear any, and to ask
    folds = fold_numbers(stars, _CHOICE_FOLDS, model.seed, stars=model._star_names)
    asked = 1 if stars >= _MANY_STARS else _CHOICE_FOLDS
    thirds = [folds == fold for fold in range(asked)]
    error = {}
    for number in _CANDIDATES:
        if number * _STARS_EACH > learned:
            break
        missed = np.concatenate([_missed(model, number, flux, ivar, rows) for rows in thirds])
        known = np.isfinite(missed).all(axis=1)
        error[number] = np.sqrt((missed[known] ** 2).sum(axis=0) / max(known.sum(), 1)).mean()
        if error[number] > _WORSE * min(error.values()):
            break  # more would not help these stars
    return min(error, key=error.get)


# %%
thirty = SimpleNamespace(training_labels_=label[:30])
print("hidden labels that thirty stars bear:", _chosen_number(thirty, flux[:30], ivar[:30]))


# %%
#| export
class HiddenCannon(_Hidden):
    """A Cannon whose stars have labels that nobody told.

    The flux of star n in pixel p is theta_p . v(labels_n) + u_p . z_n + noise, with hidden labels
    z_n ~ N(0, 1) in q dimensions and the variance sigma_np^2 + s_p^2. Coefficients, directions u
    and scatter are learned together by expectation maximization; `infer` eliminates z.

    Parameters
    ----------
    hidden : int, optional
        q, number of hidden labels; by default what labels stars best that were left out, among 0,
        5, 10, 20, 40 and 60
    order, terms, labels, pivots, scales, min_stars
        as of `Cannon`
    seed : int, default 0
        of the folds in which the number is chosen

    Attributes
    ----------
    theta_ : (P, T) array
        coefficients of the labels' terms
    hidden_ : (q, P) array
        change of the flux per unit of each hidden label, the strongest first; 0 in pixels that
        could not be fitted
    scatter_ : (P,) array
        what labels and hidden labels leave, in units of the flux

    Examples
    --------
    >>> from stellar_lab import HiddenCannon
    >>> from stellar_lab.archives import real_stars
    >>> stars = real_stars()[:150]
    >>> model = HiddenCannon(hidden=3, order=1, labels=["TEFF", "LOGG", "M_H"]).fit(stars)
    >>> model.hidden_.shape
    (3, 7214)
    """

    scatter = True
    _rounds = _ROUNDS  # a subclass may be content with fewer

    def __init__(
        self,
        hidden: int = None,
        order: int = 2,
        terms: Sequence = None,
        labels: Sequence = None,
        pivots: Sequence = None,
        scales: Sequence = None,
        min_stars: int = None,
        seed: int = 0,
    ):
        self.hidden = hidden
        self.order = order
        self.terms = terms
        self.labels = labels
        self.pivots = pivots
        self.scales = scales
        self.min_stars = min_stars
        self.seed = seed

    def _number(self, flux, ivar):
        "How many hidden labels there are to be; a subclass may choose otherwise."
        return _chosen_number(self, flux, ivar)

    def _learn_pixels(self, flux, ivar, design, min_stars):
        learned = super()._learn_pixels(flux, ivar, design, min_stars)
        number = self._number(flux, ivar) if self.hidden is None else self.hidden
        _check_number(number, len(flux))
        if not number:
            self.hidden_ = np.empty((0, flux.shape[1]))
            return learned
        theta, directions, scatter2, chi2 = _learn_hidden(
            flux, ivar, design, learned, number, self._rounds
        )
        self.hidden_ = directions
        return theta, np.sqrt(scatter2), learned[2], chi2


# %% [markdown]
# On the toy: stars that took no part in the training, and their errors.

# %%
model = HiddenCannon(hidden=1, order=1).fit(label, flux, ivar, ["SHOWN"])
new_label = rng.normal(size=(2_000, 1))
new_secret = rng.normal(size=(2_000, 1))
new_flux = 0.9 + new_label @ slope - new_secret @ darker
new_flux = (new_flux + error * rng.standard_normal(new_flux.shape)).astype("f4")
new_ivar = np.full(new_flux.shape, error**-2, "f4")
for name, one in {"plain": plain, "with a hidden label": model}.items():
    table = infer(one, new_flux, new_ivar, min_good=0)
    missed = table["shown"].value - new_label[:, 0]
    pull = missed / table["shown_err"].value
    print(f"{name}: RMSE {missed.std():.4f}, made over stated {pull.std():.2f}")

# %%
assert abs(pull.std() - 1) < 0.06 and abs(missed.mean()) < 4 * missed.std() / np.sqrt(2_000)

# %% [markdown]
# **What to see.** The model that knows of the hidden label makes smaller errors, and states the right ones. The plain one trusted pixels that the secret had spoiled.
#
# ## Is the elimination right?
# There is a slow way to say the same: the hidden labels make the noise of different pixels correlated, with the covariance $\Sigma=\operatorname{diag}(\sigma_p^2+s_p^2)+\sum_k\mathbf u_k\mathbf u_k^{\mathsf T}$. Then $\chi^2$ is
# $(\mathbf f-\mathbf m)^{\mathsf T}\Sigma^{-1}(\mathbf f-\mathbf m)$ with a full matrix. For 60 pixels we can afford it:

# %%
stats = statistics(model, new_flux[:5], new_ivar[:5], dtype=float)
noise = np.diag(error**2 + model.scatter_**2) + model.hidden_.T @ model.hidden_


def slow_chi2(scaled):
    left = new_flux[:5] - model.vectorizer_(scaled) @ model.theta_.T
    return np.einsum("np,np->n", left, np.linalg.solve(noise, left.T).T)


trial = rng.normal(size=(5, 1))
fast = stats.own_chi2(model.vectorizer_(trial)[:, 1:])
slow = slow_chi2(trial) - slow_chi2(np.zeros((5, 1)))
print("fast", fast.round(3), "slow", slow.round(3))
assert np.allclose(fast, slow, rtol=1e-5, atol=1e-5)

# %% [markdown]
# The whole inversion, too: its $\chi^2$ at the best label, and the stated error, which is the inverse of the slopes' weight under $\Sigma$.

# %%
table = infer(model, new_flux[:5], new_ivar[:5], min_good=0)
best = model.scale(label_values(table, ["SHOWN"]))
slopes = model.derivative(label_values(table, ["SHOWN"]))[:, 0]
weight = np.einsum("np,np->n", slopes, np.linalg.solve(noise, slopes.T).T)
assert np.allclose(table["chi2"], slow_chi2(best), rtol=1e-3)
assert np.allclose(table["shown_err"].value, weight**-0.5, rtol=1e-3)
assert np.all(slow_chi2(best) <= slow_chi2(best + 0.01))
assert np.all(slow_chi2(best) <= slow_chi2(best - 0.01))

# %% [markdown]
# ## Real stars
# Now the stars of the archive at hand. We tell the model four labels only, and keep the others to ourselves: these are secrets whose names we know.

# %%
record = archive_record(archive_root())
names = list(record.labels)
told = names[:4]
untold = names[4:]
spectra, _ = training_set(archive_root(), progress=False)
train, test = train_test_rows(len(spectra))
catalogue = spectra[test].labels(told)
plain = Cannon(scatter=True, labels=told).fit(spectra[train])
model = HiddenCannon(hidden=20, labels=told).fit(spectra[train])
answers = {"Cannon": infer(plain, spectra[test]), "20 hidden labels": infer(model, spectra[test])}

# %%
found = {"label": told}
summary = {}
for name, table in answers.items():
    errors = error_table(table, catalogue, told, plain.scales_)
    stated = label_values(table, [f"{label}_err" for label in told])
    pull = np.abs(label_values(table, told) - catalogue) / stated
    found[name] = [f"{error:.3g}" for error in errors["rmse"]]
    summary[name] = errors["scaled_rmse"].mean(), np.median(pull)
    print(
        f"{name}: mean scaled RMSE {summary[name][0]:.3f}, made over stated {summary[name][1]:.1f}"
    )
Table(found)

# %% [markdown]
# **What to see.** Errors of the test stars. Every label gains. Errors are still larger than stated, but by far less: the catalogue's own errors are in them too.

# %%
(plain_error, plain_pull), (hidden_error, hidden_pull) = summary.values()
assert hidden_error < (0.95 if record.name == "clusters" else 0.8) * plain_error
assert hidden_pull < 0.8 * plain_pull


# %% [markdown]
# ## What did it find?
# A hidden label has no name. But we kept some labels from the model, and we can ask how its hidden labels go with them. What the four known labels tell already is taken out first, by a linear fit.

# %%
def rest(values, known):
    "What a linear fit in the known labels leaves of some values, in standard deviations."
    design = np.column_stack([np.ones(len(known)), known, known**2])
    left = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return left / left.std(axis=0)


known = model.scale(catalogue)
values = model.values(spectra[test], answers["20 hidden labels"])
left = rest(values, known)
secrets = rest(spectra[test].labels(untold), known)
correlation = left.T @ secrets / len(left)
fig, ax = plt.subplots(figsize=(6, 1 + 0.5 * len(untold)))
image = ax.imshow(correlation.T, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
ax.set(xlabel="hidden label, the strongest first", xticks=range(0, 20, 5))
ax.set_yticks(range(len(untold)))
ax.set_yticklabels([label_record(name).symbol for name in untold])
fig.colorbar(image, ax=ax, label="correlation");

# %% [markdown]
# How much of an untold label do all hidden labels hold together? One regression on the first half of these stars, asked about the second half:

# %%
half = len(left) // 2
weights = RidgeCV(np.logspace(-1, 4, 20)).fit(left[:half], secrets[:half])
guess = np.atleast_2d(weights.predict(left[half:]).T)
shares = [np.corrcoef(a, b)[0, 1] for a, b in zip(guess, secrets[half:].T)]
for name, share in zip(untold, shares):
    print(f"{name}: correlation {share:.2f} between the untold label and the hidden ones")
assert max(shares) > 0.4

# %% [markdown]
# ## A star's own best spectrum
# `predict` draws the spectrum of an average star with these labels, all hidden labels at zero. `best_spectra` puts in the star's own. The residuals of one test star, at both:

# %%
row = int(np.argmax(np.abs(values[:, 0])))
star = spectra[test[[row]]]
table = answers["20 hidden labels"][[row]]
window = (star.wavelength > 15_950) & (star.wavelength < 16_050)
usable = window & (star.ivar[0] > 0)
drawn = {"hidden labels at zero": model.predict(table)[0]}
drawn["its own hidden labels"] = model.best_spectra(star, table)[0]
ax = plt.subplots(figsize=(7, 2.4))[1]
for name, line in drawn.items():
    residual = np.where(usable, star.flux[0] - line, np.nan)
    ax.plot(star.wavelength[window], residual[window], lw=1, label=name)
ax.axhline(0, color="0.6", lw=0.8)
ax.set(xlabel="vacuum wavelength [Å]", ylabel="flux - model", title="One star, two models of it")
ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
size = {name: np.nanstd((star.flux[0] - line)[usable]) for name, line in drawn.items()}
assert size["its own hidden labels"] < size["hidden labels at zero"]

# %% [markdown]
# ## Kept like any other model
# The file holds the directions, and the model read back says the same. The number of hidden labels must make sense.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "hidden.asdf"
    model.save(path)
    again = infer(HiddenCannon.load(path), spectra[test[:3]])
assert np.array_equal(again["covariance"], infer(model, spectra[test[:3]])["covariance"])
for number in (-1, 1.5, 500):
    with pytest.raises(LabError, match="give a whole number from 0"):
        HiddenCannon(hidden=number, labels=told).fit(spectra[train[:200]])

# %% [markdown]
# Without any hidden label it is the plain Cannon again, to the last bit; and with few stars it says itself how many they bear.

# %%
none = HiddenCannon(hidden=0, labels=told).fit(spectra[train])
assert np.array_equal(none.theta_, plain.theta_, equal_nan=True)
few = HiddenCannon(order=1, labels=told[:3]).fit(spectra[train[:60]])
print(f"60 stars bear {len(few.hidden_)} hidden labels")

# %% [markdown]
# ## Exercise
# Tell the model all labels of the archive instead of four, and look at the correlations again. Which hidden labels are gone? What may the strongest of those that are left be: the continuum, the
# line-spread function, or something about the star?
