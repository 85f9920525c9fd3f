# %% [markdown]
# # What does a star with these labels look like?
# > The Cannon: every pixel of the spectrum is a polynomial of the star's labels, learned from stars whose labels we trust.
#
# **Question.** We have spectra of stars whose temperature, gravity and abundances somebody has measured with care. Can we learn from them, without any
# physics of line formation, what the spectrum of *any* such star looks like?
#
# **Idea.** We assume that stars with the same labels have the same spectrum, and that the flux in one pixel changes smoothly with the labels. So we draw the flux of one pixel against
# the labels and lay a smooth curve through the points: a polynomial. We do so for each pixel on its own. What the curve misses beyond the noise is kept as well, as the *scatter* of that pixel.
# This is *The Cannon* of [Ness et al. 2015](https://doi.org/10.1088/0004-637X/808/1/16), named after Annie Jump Cannon; arbitrary terms
# are those of [Casey et al. 2016](https://arxiv.org/abs/1603.03040).
#
# You learn how 7,214 fits become one matrix product, what the scatter is good for, and how to find the quietest pixels.

# %%
#| default_exp cannon

# %%
#| export
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations_with_replacement
from math import comb
from pathlib import Path

import numpy as np
from astropy.table import Row, Table
from sklearn.utils.validation import check_is_fitted

from stellar_lab.models import (
    Held,
    LabelModel,
    all_or_nothing,
    in_blocks,
    infer,
    label_values,
    name_list,
    poor_fit_limit,
    single_threaded,
    whole_model,
)
from stellar_lab.survey import (
    LabError,
    Spectra,
    WrongFile,
    broken_at_gaps,
    chip_slices,
    label_record,
    plot_spectrum,
)

# %%
#| hide
import tempfile
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
from IPython.display import Markdown
from scipy.optimize import minimize_scalar
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from stellar_lab.clean import apply_cuts, read_archive
from stellar_lab.models import train_test_rows
from stellar_lab.normalize import lab_continuum_pixels, read_continuum_pixels, training_set
from stellar_lab.survey import (
    LABELS,
    archive_record,
    archive_root,
    real_data,
    use_style,
    wavelength,
)

# %% [markdown]
# ## One pixel
# Before any algebra, a single pixel: its flux in all training stars, against their temperature. Which one? Each pixel that no star lacks gets its own parabola, and we take the one whose parabola explains most.

# %%
use_style()
spectra, ledger = training_set(archive_root(), progress=False)
train, test = train_test_rows(len(spectra))
teff = spectra[train].labels("TEFF")[:, 0]
complete = np.flatnonzero((spectra[train].ivar > 0).all(axis=0))
flux = spectra[train].flux[:, complete].astype(float)
parabolas = np.polynomial.polynomial.polyfit((teff - 4500) / 500, flux, 2)
left = flux - np.polynomial.polynomial.polyval((teff - 4500) / 500, parabolas).T
k = np.argmin(left.var(axis=0) / flux.var(axis=0))
hot = np.linspace(teff.min(), teff.max(), 100)
fig, ax = plt.subplots(figsize=(5, 3))
ax.plot(teff, flux[:, k], ".", color="k", ms=4, alpha=0.6)
ax.plot(hot, np.polynomial.polynomial.polyval((hot - 4500) / 500, parabolas[:, k]), color="C3")
ax.set(xlabel=LABELS["TEFF"].axis, ylabel="flux / continuum")
ax.set(title=f"one pixel, at {wavelength[complete[k]]:.2f} Å, and its parabola");

# %%
#| echo: false
Markdown(
    f"**What to see.** The flux of this pixel follows the temperature. The parabola leaves "
    f"{left[:, k].std() / flux[:, k].std():.0%} of the flux's standard deviation, and that is the "
    f"best pixel; in half of the pixels it leaves more than "
    f"{np.median(left.std(axis=0) / flux.std(axis=0)):.0%}. Temperature alone is not enough."
)

# %%
share_left = left.std(axis=0) / flux.std(axis=0)
assert share_left[k] < 0.6 and np.median(share_left) > share_left[k]


# %% [markdown]
# ## All labels
# With several labels the parabola becomes a polynomial in all of them,
# $$ f_{np} = \boldsymbol\theta_p\cdot\mathbf v(\boldsymbol\ell_n) + \text{noise},\qquad \operatorname{Var} = \sigma_{np}^2 + s_p^2 , $$
# where $\mathbf v(\boldsymbol\ell)$, the *vectorizer*, lists a one, the labels, their squares and products. The coefficients $\boldsymbol\theta_p$ of a
# pixel follow from a weighted linear fit over the stars, and $s_p$ is the scatter that the noise $\sigma_{np}$ does not explain: what the polynomial
# gets wrong.

# %% [markdown]
# ### The vectorizer
# A term is a product of powers of labels, `TEFF^2*LOGG` for example, so it is a row of exponents. With all rows as one matrix, any list of terms and its
# derivatives come from the same few lines. Quadratic in five labels means $1 + 5 + 15 = 21$ terms, in the six of these stars $1 + 6 + 21 = 28$.

# %%
#| export
@dataclass(frozen=True)
class _Polynomial:
    "Terms as rows of exponents: how they are named and written."

    label_names: tuple  # K names
    exponents: np.ndarray  # (T, K) integers; first row zero

    def __len__(self):
        return len(self.exponents)

    @property
    def terms(self) -> list:
        "The terms as text, the constant as `1`."
        return [self._text(row) for row in self.exponents]

    def _text(self, row):
        powers = [(name, power) for name, power in zip(self.label_names, row) if power]
        return "*".join(n if power == 1 else f"{n}^{power}" for n, power in powers) or "1"


def _exponents(term, label_names):
    "The row of exponents of a term such as `TEFF*LOGG^2`."
    row = np.zeros(len(label_names), dtype=int)
    for factor in str(term).replace("**", "^").split("*"):
        name, _, power = factor.strip().partition("^")
        name = label_record(name).name
        power = power or "1"
        if name not in label_names:
            raise LabError(
                f"term {term!r} names {name!r}, which is not among the labels "
                f"{', '.join(label_names)}"
            )
        if not power.isdigit() or int(power) < 1:
            raise LabError(
                f"term {term!r} has the power {power!r}: powers are whole numbers from 1"
            )
        row[label_names.index(name)] += int(power)
    return row


# %%
assert _exponents("TEFF*LOGG^2", ("TEFF", "LOGG")).tolist() == [1, 2]
_Polynomial(("TEFF", "LOGG"), np.array([[0, 0], [1, 0], [1, 2]])).terms


# %% [markdown]
# The value of a term is a product of powers, so all powers of all labels are computed once. The slope of a product follows from the product rule: the slope of one factor times the others, for each label in turn.

# %%
#| export
def _powers(vectorizer, labels):
    "Powers of scaled labels (N, K): K arrays (N, highest power + 1)."
    powers = [np.ones((len(labels.T), len(labels)))]
    for _ in range(vectorizer.exponents.max(initial=1)):
        powers.append(powers[-1] * labels.T)
    return np.stack(powers, axis=-1)


def _slopes(vectorizer, labels):
    "Derivative of each term with respect to each label, (N, T, K)."
    powers = _powers(vectorizer, labels)
    exponents = vectorizer.exponents.T
    factors = [power[:, e] for power, e in zip(powers, exponents)]
    slopes = [e * power[:, np.maximum(e - 1, 0)] for power, e in zip(powers, exponents)]
    products = [
        reduce(np.multiply, [*factors[:k], slope, *factors[k + 1 :]])
        for k, slope in enumerate(slopes)
    ]
    return np.stack(products, axis=-1)


# %%
cubic = _Polynomial(("TEFF", "LOGG"), np.array([[0, 0], [1, 0], [1, 3]]))
print("powers of 2 and of 3:", _powers(cubic, np.array([[2.0, 3.0]])).astype(int).tolist())
print("slopes of", cubic.terms, "at (2, 3):", _slopes(cubic, np.array([[2.0, 3.0]]))[0].tolist())


# %%
#| export
class Vectorizer(_Polynomial):
    """Turns labels into the terms of a polynomial; the first term is the constant.

    Parameters
    ----------
    label_names : tuple of str
        K names
    exponents : (T, K) int array
        a row per term; the first row is zero
    """

    @classmethod
    def of_order(cls, label_names: Sequence, order: int) -> "Vectorizer":
        "All products of the labels up to a total power of `order`."
        K = len(label_names)
        factors = [
            np.array(factor, dtype=int)
            for degree in range(order + 1)
            for factor in combinations_with_replacement(range(K), degree)
        ]
        exponents = [np.bincount(factor, minlength=K) for factor in factors]
        return cls(tuple(label_names), np.array(exponents))

    @classmethod
    def of_terms(cls, label_names: Sequence, terms) -> "Vectorizer":
        """The constant and the given terms, such as `TEFF^4` or `TEFF*LOGG`; LabError for unknown
        ones."""
        names = tuple(label_names)
        terms = name_list(terms)
        rows = [np.zeros(len(names), dtype=int), *(_exponents(term, names) for term in terms)]
        if len(np.unique(rows, axis=0)) < len(rows):
            raise LabError(f"a term occurs twice in {', '.join(map(str, terms))}")
        return cls(names, np.array(rows))

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        "The terms (N, T) of stars with scaled labels (N, K)."
        factors = [power[:, e] for power, e in zip(_powers(self, labels), self.exponents.T)]
        return reduce(np.multiply, factors)

    def derivative(self, labels: np.ndarray) -> np.ndarray:
        "Derivative of each term with respect to each label, (N, T, K), at scaled labels (N, K)."
        return _slopes(self, labels)

    def curvature(self, labels: np.ndarray, force: np.ndarray) -> np.ndarray:
        "Second derivatives (N, K, K) of the terms, summed over the terms with `force` (N, T)."
        return _curvature(self, labels, force)


# %%
lab = Vectorizer.of_order(["TEFF", "LOGG", "FE_H", "MG_FE", "SI_FE"], 2)
assert len(lab) == 21
print(*lab.terms, sep="  ")


# %% [markdown]
# The search for a star's labels also asks how the slopes themselves change. The second derivatives of all terms, weighed and summed, come from the same exponents.

# %%
#| export
def _curvature(vectorizer, labels, force):
    "Second derivatives of the terms, summed over the terms with `force`: (N, K, K)."
    exponents = vectorizer.exponents
    quadratic = exponents.sum(axis=1).max() <= 2
    at = labels[:1] if quadratic else labels  # a quadratic bends the same everywhere
    bends = []
    for e, step in zip(exponents.T, np.eye(exponents.shape[1], dtype=int)):
        lowered = Vectorizer(vectorizer.label_names, np.maximum(exponents - step, 0))
        bends.append(e[:, None] * lowered.derivative(at))
    bend = np.stack(bends, axis=2)  # (N or 1, T, K, K)
    if len(at) > 1:
        return np.einsum("nt,ntjk->njk", force, bend)
    return np.tensordot(force, bend[0], axes=1)


# %% [markdown]
# A test by hand: at (2, 3) the terms are easy sums, and so are the slopes; a general one by finite differences, for a list of terms as strange as allowed.

# %%
two = Vectorizer.of_order("ab", 2)
assert two.terms == ["1", "a", "b", "a^2", "a*b", "b^2"]
assert two(np.array([[2.0, 3.0]])).tolist() == [[1, 2, 3, 4, 6, 9]]
assert two.derivative(np.array([[2.0, 3.0]]))[0].T.tolist() == [
    [0, 1, 0, 4, 3, 0],
    [0, 0, 1, 0, 2, 6],
]

odd = Vectorizer.of_terms("abc", ["a^4", "a*c^2", "b", "b^3*c"])
at = np.random.default_rng(0).normal(size=(5, 3))
step = 1e-5
slopes = np.stack(
    [(odd(at + step * e) - odd(at - step * e)) / (2 * step) for e in np.eye(3)], axis=-1
)
assert np.allclose(odd.derivative(at), slopes, atol=1e-8)
force = np.random.default_rng(1).normal(size=(5, len(odd)))
numeric = np.stack(
    [
        np.einsum(
            "nt,ntk->nk", force, odd.derivative(at + step * e) - odd.derivative(at - step * e)
        )
        for e in np.eye(3)
    ],
    axis=-1,
) / (2 * step)
assert np.allclose(odd.curvature(at, force), numeric, atol=1e-7)
assert two.curvature(np.ones((3, 2)), np.ones((3, 6))).tolist() == [[[2, 1], [1, 2]]] * 3
assert Vectorizer.of_terms("abc", odd.terms[1:]).terms == odd.terms  # text -> exponents -> text
with pytest.raises(LabError, match="term 'a\\*z' names 'z', which is not among the labels a, b, c"):
    Vectorizer.of_terms("abc", ["a*z"])
assert Vectorizer.of_terms("abc", "a*c").terms == ["1", "a*c"]  # one term, not three letters
print("largest error of a slope:", np.abs(odd.derivative(at) - slopes).max().round(10))


# %% [markdown]
# ## All pixels at once
# The weighted fit of pixel $p$ solves the normal equations $A_p\boldsymbol\theta_p = \mathbf b_p$ with
# $$ A_p = \sum_n w_{np}\,\mathbf v_n\mathbf v_n^\mathsf T ,\qquad \mathbf b_p = \sum_n w_{np} f_{np}\,\mathbf v_n . $$
# The outer products $\mathbf v_n\mathbf v_n^\mathsf T$ do not depend on the pixel. Written out as the $T(T+1)/2$ distinct products of two terms, they are a matrix $Q$ of
# one row per star, and *all* $A_p$ are one matrix product $W^\mathsf T Q$. The original lab looped over pixels with a dense weight matrix each; this is the
# same sum in another order, some hundred times faster.
#
# Pixels are independent, so blocks of them run in threads side by side, each block small enough to stay in the processor's cache.

# %% [markdown]
# A symmetric matrix holds each number twice. `pair_index` names the entries that differ, by the two terms of each pair; `whole_matrices` puts such entries into their places.

# %%
#| exporti
def pair_index(T: int) -> tuple:
    """The distinct products of two of `T` terms.

    Parameters
    ----------
    T : int
        number of terms

    Returns
    -------
    tuple
        two (T(T+1)/2,) int arrays, the terms of each pair
    """
    return np.triu_indices(T)


def whole_matrices(entries: np.ndarray, T: int, diagonal: float = 0) -> np.ndarray:
    """Symmetric matrices from their distinct entries.

    Parameters
    ----------
    entries : (N, T(T+1)/2) array
        in the order of `pair_index`
    T : int
    diagonal : float, default 0
        added to it

    Returns
    -------
    (N, T, T) array of float64
    """
    i, j = pair_index(T)
    place = np.empty((T, T), dtype=int)
    place[i, j] = place[j, i] = np.arange(len(i))
    matrices = np.take(entries, place, axis=1).astype(float, copy=False)
    matrices[:, np.arange(T), np.arange(T)] += diagonal
    return matrices


# %%
i, j = pair_index(3)
terms = np.array([2, 3, 5])
print("pairs", list(zip(i.tolist(), j.tolist())), "products", terms[i] * terms[j])
(product,) = whole_matrices((terms[i] * terms[j])[None], 3, diagonal=0.5)
assert np.array_equal(product, np.outer(terms, terms) + 0.5 * np.eye(3))

# %% [markdown]
# The scatter of a pixel maximizes its own likelihood $-\frac12\sum_n [\,r_{np}^2 w_{np} - \ln w_{np}]$ with $w = 1/(\sigma^2+s^2)$ and the residuals $r$.
# Setting the derivative to zero gives an equation that reads like common sense,
# $$ s_p^2 = \frac{\sum_n w_{np}^2\,(r_{np}^2 - \sigma_{np}^2)}{\sum_n w_{np}^2} : $$
# the scatter is what the residuals have more than the noise, in a weighted mean (a negative result is set to zero). Iterating it is Fisher's scoring; between rounds
# the coefficients are fitted again with the new weights. A few rounds settle it, all pixels in step.

# %%
#| export
_SCATTER_ROUNDS = 40  # fits per pixel at most
_SCATTER_TOLERANCE = 1e-4  # done when no scatter moves by more than this share


def _solve(weight, flux, design, products):
    "Normal equations of a block of pixels: (B, T) coefficients."
    A = whole_matrices(weight.T @ products, design.shape[1])
    b = (design.T @ (weight * flux)).T
    return np.linalg.solve(A, b[..., None])[..., 0]


def _scatter_step(residual2, ivar, variance, scatter2):
    "One step of Fisher's scoring for s^2 of each pixel."
    weight2 = (ivar / (1 + ivar * scatter2)) ** 2
    return np.maximum((weight2 * (residual2 - variance)).sum(axis=0) / weight2.sum(axis=0), 0)


def _fit_block(flux, ivar, design, products, scatter):
    """Coefficients (B, T) and scatter (B,) of pixels that have enough stars; flux, ivar (N, B)
    float64."""
    theta = _solve(ivar, flux, design, products)
    scatter2 = np.zeros(flux.shape[1])
    if not scatter:
        return theta, scatter2
    variance = 1 / np.where(ivar > 0, ivar, np.inf)
    moving = np.arange(flux.shape[1])  # pixels whose scatter has not settled
    for _ in range(_SCATTER_ROUNDS):
        f = flux[:, moving]
        w = ivar[:, moving]
        residual2 = (f - design @ theta[moving].T) ** 2
        before = scatter2[moving]
        now = before
        for _ in range(3):
            now = _scatter_step(residual2, w, variance[:, moving], now)
        theta[moving] = _solve(w / (1 + w * now), f, design, products)
        scatter2[moving] = now
        change = np.abs(np.sqrt(now) - np.sqrt(before))
        moving = moving[change > _SCATTER_TOLERANCE * np.sqrt(now)]
        if not len(moving):
            break
    return theta, scatter2


# %%
rng = np.random.default_rng(0)
design = Vectorizer.of_order("a", 1)(rng.normal(size=(500, 1)))
flux = design @ [[1.0], [0.2]] + rng.normal(scale=np.hypot(0.03, 0.04), size=(500, 1))
i, j = pair_index(2)
known_noise = np.full(flux.shape, 0.03**-2)
theta, scatter2 = _fit_block(flux, known_noise, design, design[:, i] * design[:, j], True)
print(f"coefficients {theta[0].round(3)}, scatter {np.sqrt(scatter2[0]):.4f} where 0.04 was put in")
assert abs(np.sqrt(scatter2[0]) / 0.04 - 1) < 0.1 and np.allclose(theta[0], [1, 0.2], atol=0.01)


# %% [markdown]
# ### Many pixels
# A pixel with too few good stars is *marked*: its coefficients are NaN, and the inversion gives it no weight. What cannot be fitted must not look fitted. All others go through the fit, block by block.

# %%
#| export
def _fit_pixels(flux, ivar, design, min_stars, scatter):
    "All pixels at once: coefficients (P, T), scatter (P,), good pixels and chi2 (N,) of each star."
    T = design.shape[1]
    i, j = pair_index(T)
    products = design[:, i] * design[:, j]

    def work(pixels):
        f = flux[:, pixels].copy()
        w = ivar[:, pixels]
        good = w > 0
        f[~good] = 0  # whatever is in an unusable pixel, NaN included
        theta = np.full((f.shape[1], T), np.nan)
        scatter2 = np.full(f.shape[1], np.nan)
        usable = good.sum(axis=0, dtype=np.int32) >= min_stars
        if not usable.all():
            f, w, good = (part[:, usable] for part in (f, w, good))
        theta[usable], scatter2[usable] = _fit_block(
            f.astype(float), w.astype(float), design, products, scatter
        )
        if scatter:
            w = w / (1 + w * scatter2[usable].astype(w.dtype))
        f -= (design @ theta[usable].T).astype(f.dtype)
        chi2 = np.einsum("np,np,np->n", w, f, f)
        return theta, np.sqrt(scatter2), good.sum(axis=1, dtype=np.int32), chi2

    theta, scatters, n_good, chi2 = zip(*in_blocks(work, flux.shape[1]))
    return np.concatenate(theta), np.concatenate(scatters), sum(n_good), sum(chi2)


# %% [markdown]
# Three pixels of the real stars, each a polynomial in all labels of the catalogue. Drawn is the flux that the polynomial gives a star, and the flux that the star has.

# %%
names = list(archive_record(archive_root()).labels)
labels = spectra[train].labels(names)
vectorizer = Vectorizer.of_order(names, 2)
design = vectorizer((labels - labels.mean(axis=0)) / labels.std(axis=0))
three = complete[np.argsort(share_left)[[0, 100, 400]]]
three_flux = spectra[train].flux[:, three]
three_ivar = spectra[train].ivar[:, three]
enough = 2 * len(vectorizer)
theta, scatter, n_good, chi2 = _fit_pixels(three_flux, three_ivar, design, enough, True)
fig, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
for ax, pixel, flux, made in zip(axes, three, three_flux.T, theta @ design.T):
    ax.plot(made, flux, ".", color="k", ms=4, alpha=0.6)
    ends = [min(made.min(), flux.min()), max(made.max(), flux.max())]
    ax.plot(ends, ends, color="C3")
    ax.set(title=f"{wavelength[pixel]:.2f} Å", xlabel="flux of the polynomial")
axes[0].set_ylabel("flux of the star")
print(f"{len(vectorizer)} coefficients for each of {len(theta)} pixels; scatter {scatter.round(4)}")

# %%
left = three_flux - (theta @ design.T).T
alone = share_left[np.searchsorted(complete, three)] * three_flux.std(axis=0)
assert np.all(left.std(axis=0) < alone)  # more labels explain more

# %% [markdown]
# ## The estimator
# `Cannon` is an estimator as scikit-learn means it: parameters in the constructor, `fit` returns the object, what was learned ends in an underscore. How training stars come in and how labels are scaled is
# [common to all models](04_models.ipynb).
#
# What a trained model knows of its pixels, and how it draws spectra, comes first; the class that is trained inherits it.

# %%
#| export
_HIGHEST_POWER = 64  # of a label in a term, in a file


class _PixelPolynomials(LabelModel):
    """A trained Cannon: coefficients ``theta_`` (P, T) and ``scatter_`` (P,), and what follows from
    them."""

    _entries = LabelModel._entries | {
        "exponents": Held("whole", "TK", low=0, high=_HIGHEST_POWER),
        "theta_": Held("number", "PT", holes=True, low=-1e15, high=1e15),  # squares are numbers
        "scatter_": Held("number", "P", holes=True, low=0, high=1e15),
        "training_chi2_": Held("number", "N", low=0),
    }

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        tags.target_tags.single_output = False  # a spectrum has many pixels
        return tags

    @property
    def usable_(self) -> np.ndarray:
        "(P,) True where the pixel had enough stars to be fitted."
        check_is_fitted(self, "theta_")
        return np.isfinite(self.theta_[:, 0])

    @property
    def typical_flux_(self) -> np.ndarray:
        "(P,) The spectrum at the pivots; NaN in pixels that could not be fitted."
        check_is_fitted(self, "theta_")
        return self.theta_[:, 0]

    @property
    def least_pixels_(self) -> int:
        "Usable pixels without which a star has no labels: as many as there are terms."
        return len(self.vectorizer_)

    @property
    def poor_fit_limit_(self) -> float:
        "chi2 per pixel from which a fit counts as poor, from that of the training stars."
        return poor_fit_limit(self.training_chi2_)

    def _learn_pixels(self, flux, ivar, design, min_stars):
        "Coefficients, scatter, good pixels and chi2 of each star; a subclass may learn more."
        return _fit_pixels(flux, ivar, design, min_stars, self.scatter)

    def _scaled_labels(self, labels):
        "Scaled labels (N, K) from physical ones, an array or a table that `infer` gave."
        check_is_fitted(self, "theta_")
        if isinstance(labels, (Table, Row)):
            labels = label_values(Table(labels), self.label_names_)
        labels = np.atleast_2d(np.asarray(labels, dtype=float))
        if labels.shape[1] != len(self.label_names_):
            raise LabError(
                f"{labels.shape[1]} labels per star, but the model has {len(self.label_names_)}: "
                f"{', '.join(self.label_names_)}"
            )
        return self.scale(labels)

    def _learned(self):
        learned = super()._learned()
        del learned["vectorizer_"]
        return {"exponents": self.vectorizer_.exponents, **learned}

    def _check_restored(self):
        super()._check_restored()
        whole = np.isfinite(self.theta_).all(axis=1) & np.isfinite(self.scatter_)
        if not np.array_equal(whole, self.usable_):
            raise WrongFile("some of its pixels have only some of their coefficients")

    @classmethod
    def _from_tree(cls, tree):
        model = super()._from_tree(tree)
        exponents = np.asarray(tree["exponents"], dtype=int)
        with whole_model(tree.get("file", "the model's file"), cls.__name__):
            if exponents[0].any() or len(np.unique(exponents, axis=0)) < len(exponents):
                raise WrongFile("its terms are none")
        model.vectorizer_ = Vectorizer(model.label_names_, exponents)
        return model


# %%
known = _PixelPolynomials()
known.fit = None  # nothing is left to learn
known.label_names_ = tuple(names)
known.vectorizer_ = vectorizer
known.theta_ = np.vstack([theta, np.full(theta.shape[1], np.nan)])  # and one that was not fitted
print("usable", known.usable_, "typical flux", known.typical_flux_.round(3))
assert known.usable_.tolist() == [True, True, True, False]
assert known.least_pixels_ == len(vectorizer)


# %% [markdown]
# Once the coefficients are known, a spectrum is one product, and so is its slope. The table that `infer` gave may stand for the labels.

# %%
#| export
class _Drawing(_PixelPolynomials):
    "Labels -> spectra."

    def predict(self, labels) -> np.ndarray:
        """Spectra of stars with these labels.

        Parameters
        ----------
        labels : (N, K) array or Table
            physical units; a table may be what `infer` gave

        Returns
        -------
        (N, P) float64 array
            relative to the continuum; NaN in pixels that could not be fitted
        """
        scaled = self._scaled_labels(labels)
        return self.vectorizer_(scaled) @ self.theta_.T

    def derivative(self, labels) -> np.ndarray:
        """How the spectrum changes with each label.

        Parameters
        ----------
        labels : (N, K) array or Table
            physical units

        Returns
        -------
        (N, K, P) float64 array
            flux per unit of the label
        """
        scaled = self._scaled_labels(labels)
        slopes = self.vectorizer_.derivative(scaled) / self.scales_
        return np.swapaxes(slopes, 1, 2) @ self.theta_.T

    def score(self, labels, flux, ivar=None) -> float:
        """The share of the flux's variance that the model explains: scikit-learn's R^2.

        Parameters
        ----------
        labels : (N, K) array or Table
        flux : (N, P) array
        ivar : (N, P) array, optional
            weights, 0 where unusable; all 1 by default

        Returns
        -------
        float
            1 for a perfect model, 0 for the mean spectrum; over pixels that could be fitted
        """
        flux = np.asarray(flux, dtype=float)
        weight = np.ones(flux.shape) if ivar is None else np.asarray(ivar, dtype=float)
        weight = np.where(self.usable_ & np.isfinite(flux), weight, 0)
        seen = np.where(weight > 0, flux, 0)
        mean = (weight * seen).sum(axis=0) / np.maximum(weight.sum(axis=0), 1e-30)
        model = np.nan_to_num(self.predict(labels))
        explained = (weight * (seen - model) ** 2).sum() / (weight * (seen - mean) ** 2).sum()
        return float(1 - explained)


# %%
drawing = _Drawing()
vars(drawing).update(vars(known))
drawing.pivots_ = labels.mean(axis=0)
drawing.scales_ = labels.std(axis=0)
drawn = drawing.predict(labels[:1])[0]
print("the first star's three pixels:", three_flux[0].round(3), "drawn", drawn.round(3))


# %% [markdown]
# The estimator itself. First the terms that its parameters ask for: a polynomial with more terms than stars is refused before anything is computed.

# %%
#| export
def _check_terms(n_terms, n_stars, n_labels):
    "LabError where the stars cannot determine the terms, before these are written out."
    if n_terms > n_stars:
        raise LabError(
            f"{n_stars} training stars cannot determine {n_terms} terms in {n_labels} labels: "
            "take more stars, a lower order or fewer labels"
        )


def _vectorizer_of(model):
    "The terms, unless there are too many for the stars."
    names = model.label_names_
    if model.terms is None:
        if not isinstance(model.order, (int, np.integer)) or model.order < 0:
            raise LabError(f"order is {model.order!r}: it must be 0, 1, 2, …")
        n_terms = comb(len(names) + model.order, model.order)
    else:
        n_terms = len(name_list(model.terms)) + 1
    _check_terms(n_terms, len(model.training_labels_), len(names))
    if model.terms is None:
        return Vectorizer.of_order(names, model.order)
    return Vectorizer.of_terms(names, model.terms)


# %%
asked = SimpleNamespace(order=3, terms=None, label_names_=("TEFF", "LOGG"), training_labels_=labels)
print(*_vectorizer_of(asked).terms, sep="  ")
asked.terms = "TEFF^4"
print(*_vectorizer_of(asked).terms, sep="  ")
asked.training_labels_ = labels[:1]
with pytest.raises(LabError, match="1 training stars cannot determine 2 terms in 2 labels"):
    _vectorizer_of(asked)

# %% [markdown]
# Not every set of stars can teach. What makes no sense is named before any pixel is fitted.

# %%
#| export
_LEAST_OWN = 0.01  # of a label's spread that the other labels must not explain


def _check_alike(scaled, names):
    "LabError where one label follows from the others: no spectrum could tell them apart."
    n_stars, n_labels = scaled.shape
    if n_labels < 2 or n_stars < 2 * n_labels + 2:
        return
    with single_threaded():
        correlation = np.corrcoef(scaled.T)
        values, vectors = np.linalg.eigh(correlation)
    own = 1 / (vectors**2 / np.maximum(values, 1e-15)).sum(axis=1)
    label = int(own.argmin())
    if own[label] < _LEAST_OWN**2:
        closest = np.abs(correlation[label] - np.eye(n_labels)[label]).argmax()
        raise LabError(
            f"{names[label]} follows from the other labels, above all from {names[closest]}, in "
            "all training stars: leave one of them out"
        )


def _check_stars(n_stars, most_good, min_stars):
    "LabError where no pixel has enough good stars."
    if most_good < min_stars:
        there = f"{n_stars} training stars"
        if n_stars >= min_stars:
            there = f"no pixel is good in more than {most_good} of {n_stars} training stars"
        raise LabError(
            f"{there}, {min_stars} are needed: take more stars, a lower order or fewer labels"
        )


_LARGEST_SHARE = 1e12  # weight of a star in a pixel over that of all others together


def _check_weights(ivar):
    "LabError where one star alone would decide a pixel."
    largest = ivar.max(axis=0, initial=0).astype(float)
    others = np.where(ivar < largest, ivar, 0).sum(axis=0, dtype=float)
    alone = (largest > _LARGEST_SHARE * others) & (others > 0)
    if alone.any():
        pixel = int(np.argmax(alone))
        raise LabError(
            f"star {np.argmax(ivar[:, pixel])} has the ivar {largest[pixel]:.3g} in a pixel, "
            f"{largest[pixel] / others[pixel]:.0e} times that of all others together: "
            "set ivar to 0 there"
        )


def _odd_star(model):
    "In words, which training star is the least like the others, where no solution was found."
    labels = model.training_labels_
    middle = np.median(labels, axis=0)
    spread = np.median(np.abs(labels - middle), axis=0)
    far = np.abs(labels - middle) / np.where(spread > 0, spread, np.inf)
    star, label = np.unravel_index(far.argmax(), far.shape)
    return (
        "these stars have no solution in double precision: the one least like the others is "
        f"star {star}, whose {model.label_names_[label]} is {labels[star, label]:.4g}; leave it "
        "out, or look for pixels with far too small errors"
    )


def _check_rank(design):
    "LabError where the stars are too much alike to tell the terms (N, T) apart."
    with single_threaded():
        rank = np.linalg.matrix_rank(design)
    if rank < design.shape[1]:
        raise LabError(
            f"{len(design)} training stars determine only {rank} of {design.shape[1]} terms: "
            "take more stars, a lower order or fewer labels"
        )


# %%
same = np.random.default_rng(0).normal(size=(50, 1)) @ np.ones((1, 2))
for check, arguments in {
    _check_rank: [Vectorizer.of_order("ab", 1)(same)],
    _check_alike: [same + 1e-6 * np.random.default_rng(1).normal(size=same.shape), "ab"],
    _check_stars: [50, 20, 30],
    _check_weights: [np.array([[1e20], [1.0], [1.0]])],
}.items():
    with pytest.raises(LabError) as problem:
        check(*arguments)
    print(problem.value)


# %% [markdown]
# Then `fit`: take the stars, write out the terms, fit all pixels.

# %%
#| export
class _Learning(_Drawing):
    "Stars with known labels -> coefficients."

    @all_or_nothing
    def fit(self, labels, flux=None, ivar=None, label_names=None, wavelength=None) -> "Cannon":
        """Learn the spectrum from stars with known labels.

        Parameters
        ----------
        labels : (N, K) array, DataFrame, Table or Spectra
            physical units; a table's columns name the labels; a `Spectra` holds everything
        flux : (N, P) array, optional
            relative to the continuum
        ivar : (N, P) array, optional
            inverse variance, 0 where unusable; all 1 by default
        label_names : sequence of str, optional
            K names, in any case
        wavelength : (P,) array, optional
            Angstrom, vacuum

        Returns
        -------
        Cannon
            itself

        Raises
        ------
        LabError
            where shapes do not fit, a label is missing, a usable pixel holds no number, or there
            are too few stars for the terms
        """
        flux, ivar = self._begin(labels, flux, ivar, label_names, wavelength)
        self.vectorizer_ = _vectorizer_of(self)
        design = self.vectorizer_(self.scale(self.training_labels_))
        _check_rank(design)
        _check_alike(self.scale(self.training_labels_), self.label_names_)
        _check_weights(ivar)
        terms = len(self.vectorizer_)
        min_stars = 2 * terms if self.min_stars is None else self.min_stars
        if self.min_stars is None:
            _check_stars(len(flux), (ivar > 0).sum(axis=0).max(), min_stars)
        try:
            learned = self._learn_pixels(flux, ivar, design, min_stars)
        except np.linalg.LinAlgError as error:
            raise LabError(_odd_star(self)) from error
        self.theta_, self.scatter_, n_good, chi2 = learned
        self.training_chi2_ = chi2 / np.maximum(n_good, 1)
        self.training_digest_ = self._digest(n_good, chi2)
        return self


# %%
class Parabolas(_Learning):
    "A parabola of the temperature in each pixel: the picture at the top, 7,214 times."

    order = 2
    terms = None
    scatter = True
    min_stars = None
    labels = "TEFF"


parabola = Parabolas().fit(spectra[train])
at_top = complete[k]
rest = spectra[train].flux[:, at_top] - parabola.predict(teff[:, None])[:, at_top]
print(f"{parabola.theta_.shape[0]} pixels with {parabola.theta_.shape[1]} coefficients each;")
print(f"at {wavelength[at_top]:.2f} Å they leave {rest.std():.4f}")
assert rest.std() < 1.05 * share_left[k] * spectra[train].flux[:, at_top].std()


# %% [markdown]
# `Cannon` adds its parameters, and the words that `help(Cannon)` shows.

# %%
#| export
class Cannon(_Learning):
    """Generative model of a spectrum: each pixel a polynomial of the labels.

    The flux of star n in pixel p is theta_p . v(labels_n) + noise, with the variance
    sigma_np^2 + s_p^2 (Ness et al. 2015, ApJ 808, 16; arbitrary terms as in Casey et al. 2016).

    Parameters
    ----------
    order : int, default 2
        highest total power of the labels, where `terms` does not say otherwise
    terms : sequence of str, optional
        terms beside the constant, such as ``"TEFF^4"`` or ``"TEFF*LOGG"``
    scatter : bool, default False
        fit an intrinsic scatter s_p for each pixel, so that pixels which the labels do not explain
        weigh less
    labels : sequence of str, optional
        names of the labels to learn from a `Spectra`, in any case; by default all that it holds
    pivots, scales : (K,) sequences, optional
        subtracted from, and divided into, the labels; by default mean and standard deviation of the
        training stars
    min_stars : int, optional
        good stars that a pixel needs; by default twice the number of terms

    Attributes
    ----------
    theta_ : (P, T) array
        coefficients of the scaled labels' terms; NaN in pixels with too few stars
    scatter_ : (P,) array
        s_p, in units of the flux
    label_names_ : tuple of str
    vectorizer_ : Vectorizer
    training_labels_ : (N, K) array
    training_chi2_ : (N,) array
        per pixel, of each training star at its catalogue labels

    Notes
    -----
    The errors that `infer` gives with a freshly trained model are formal, ten times too small.
    `with_error_model` calibrates them on left-out stars; `stellar_lab.train` does all of it.
    In scikit-learn's words X are the labels and y is the flux: `cross_val_predict(Cannon(), labels,
    flux)` gives left-out spectra, and `Pipeline`, `GridSearchCV`, `clone` work. To judge labels use
    `cross_label`.

    Examples
    --------
    >>> from stellar_lab import Cannon, infer
    >>> from stellar_lab.archives import real_stars
    >>> stars = real_stars()[:120]
    >>> model = Cannon(order=1, scatter=True, labels=["TEFF", "LOGG", "M_H"]).fit(stars)
    >>> model.predict([[4500, 2.0, -0.3]]).shape
    (1, 7214)
    >>> infer(model, stars[:2]).colnames[:3]
    ['apogee_id', 'teff', 'teff_err']
    """

    def __init__(
        self,
        order: int = 2,
        terms: Sequence = None,
        scatter: bool = False,
        labels: Sequence = None,
        pivots: Sequence = None,
        scales: Sequence = None,
        min_stars: int = None,
    ):
        self.order = order
        self.terms = terms
        self.scatter = scatter
        self.labels = labels
        self.pivots = pivots
        self.scales = scales
        self.min_stars = min_stars


# %% [markdown]
# ## Does it find what we put in?
# A made-up spectrum of 300 pixels, exactly quadratic in three labels, without noise: the coefficients must come back to rounding, in whatever units the
# labels are. Then with noise, and with a scatter of our own on top: the fitted scatter must be right within its own error, $s/\sqrt{2N}$, and zero where
# we put none.

# %%
def made_up(n_stars=400, n_pixels=300, noise=0.01, scatter=0.0, seed=1):
    """A model that is right by construction: labels, flux, ivar and the true coefficients in scaled
    labels."""
    rng = np.random.default_rng(seed)
    labels = rng.normal([4500, 2.0, -0.3], [400, 0.8, 0.3], size=(n_stars, 3))
    theta = rng.normal(size=(n_pixels, 10)) * 0.03 + np.eye(10)[0]
    scaled = (labels - labels.mean(axis=0)) / labels.std(axis=0)
    sigma = noise * rng.uniform(0.5, 2, size=(n_stars, n_pixels))
    flux = Vectorizer.of_order("abc", 2)(scaled) @ theta.T
    flux += np.hypot(sigma, scatter) * rng.standard_normal(flux.shape) if noise else 0
    return labels, flux, 1 / sigma**2 if noise else np.ones_like(flux), theta


# %%
labels, flux, ivar, theta = made_up(noise=0)
assert np.allclose(Cannon().fit(labels, flux, ivar).theta_, theta, atol=1e-10)

scatter = np.where(np.arange(300) < 150, 0.02, 0.0)
labels, flux, ivar, theta = made_up(scatter=scatter)
model = Cannon(scatter=True).fit(labels, flux, ivar)
print(
    f"scatter put in 0.02, found {model.scatter_[:150].mean():.4f} +- "
    f"{model.scatter_[:150].std():.4f}; none put in, found {model.scatter_[150:].mean():.4f}"
)

# %%
assert (
    abs(model.scatter_[:150].mean() / 0.02 - 1) < 0.05
)  # maximum likelihood forgets its 10 fitted terms of 400 stars: 1.3 % low
assert np.all(np.abs(model.scatter_[:150] - 0.02) < 5 * 0.02 / np.sqrt(2 * 400) * 1.5)
assert np.median(model.scatter_[150:]) < 0.004

# %% [markdown]
# Mistakes are answered at once. Spectra given as labels would ask for millions of terms; too many terms for the stars are named before they are written out.

# %%
with pytest.raises(LabError, match="labels come first, then flux"):
    Cannon().fit(flux, labels)
with pytest.raises(LabError, match="400 training stars cannot determine 8008 terms in 6 labels"):
    Cannon(order=10).fit(np.hstack([labels, labels]), flux)
with pytest.raises(LabError, match="order is 2.5"):
    Cannon(order=2.5).fit(labels, flux)
with pytest.raises(NotFittedError):
    Cannon().predict(labels)
lower = Cannon(order=1).fit(labels, flux, ivar, ["teff", "logg", "age"])
assert lower.label_names_ == ("TEFF", "LOGG", "age")
assert 0.9 < model.score(labels, flux, ivar) < 1 and model.score(labels[::-1], flux) < 0.1

# %% [markdown]
# ## Real stars
# The training set again: the stars of the archive at hand that pass its cuts, normalized. `training_set` is the way all later chapters, and the command line,
# get it.

# %%
print(f"{len(train)} stars to learn from, {len(test)} to ask")
spectra


# %% [markdown]
# Two thirds of them are for training. A kelvin is not a dex, so labels are standardized on the training stars: the same shape, around zero, one wide.

# %%
#| export
def _plot_labels(labels, names, axes=None, **histogram):
    """Histograms of labels, one panel each.

    Parameters
    ----------
    labels : (N, K) array
    names : str or sequence of str
        of the K labels
    axes : array of Axes, optional
        K panels; made by default
    **histogram
        for `Axes.hist`

    Returns
    -------
    array of Axes
    """
    import matplotlib.pyplot as plt

    names = name_list(names)
    if axes is None:
        _, axes = plt.subplots(1, len(names), figsize=(2 * len(names), 2), sharey=True)
    axes = np.atleast_1d(axes)
    for ax, name, column in zip(axes, names, np.asarray(labels).T):
        ax.hist(column, **({"bins": 25} | histogram))
        ax.set_xlabel(label_record(name).axis)
    axes[0].set_ylabel("stars")
    return axes


# %%
model = Cannon(scatter=True, labels=names).fit(spectra[train])
_plot_labels(spectra[train].labels(names), names)
axes = _plot_labels(model.scale(spectra[train].labels(names)), names, color="C1")
for ax, name in zip(axes, names):
    ax.set_xlabel(f"scaled {LABELS[name].symbol}")

# %%
scaled = model.scale(spectra[train].labels(names))
assert np.allclose(scaled.mean(axis=0), 0, atol=1e-9) and np.allclose(scaled.std(axis=0), 1)
assert np.allclose(model.unscale(scaled), spectra[train].labels(names))


# %% [markdown]
# ### Three stars and their models
# The model draws each training star from its catalogue labels alone. Below each star is what is left, over a grey band as wide as the survey's stated error; the rms
# difference in the title counts good pixels only.

# %%
#| export
def _draw_rest(ax, star, left, good, window):
    "What a model leaves of a star, over a band as wide as the star's stated errors."
    grid = star.wavelength
    plot_spectrum(grid, left, good, window, ax=ax, color="C3", lw=0.7)
    sigma = 1 / np.sqrt(np.where(good, star.ivar[0], np.nan))
    at, sigma = broken_at_gaps(grid, sigma, _in_window(grid, window))
    ax.fill_between(at, -sigma, sigma, color="0.8", lw=0, zorder=0)
    ax.set(ylabel="star\n- model", ylim=(-0.06, 0.06))


def _in_window(grid, window):
    "Which pixels a window shows; all where there is none."
    low, high = (grid[0], grid[-1]) if window is None else window
    return (grid >= low) & (grid <= high)


def _flux_limits(star, made, shown):
    "Lowest and highest flux to draw: the model's lines and the star's, without its worst pixels."
    if not shown.any():
        return 0.4, 1.25
    flux = np.percentile(star.flux[0, shown], [0.5, 99.5])
    low = min(flux[0], made[shown].min(), 0.9)
    high = max(flux[1], made[shown].max(), 1.05)
    room = 0.06 * (high - low)
    return low - room, high + room


# %%
_, ax = plt.subplots(figsize=(9, 1.4))
star = spectra[[train[0]]]
left = star.flux[0] - model.predict(star.labels(names))[0]
_draw_rest(ax, star, left, star.ivar[0] > 0, (15990, 16210))


# %%
#| export
def plot_fit(model, spectra: Spectra, row: int, labels=None, window=None, axes=None, name=None):
    """A star, the model's spectrum over it, and below what is left: star - model.

    Parameters
    ----------
    model : Cannon
        or another fitted model with `predict`
    spectra : Spectra
        relative to the continuum
    row : int
        the star
    labels : (K,) array or table of one row, optional
        of the model's spectrum; by default those that `infer` finds
    window : (low, high), optional
        part of the spectrum [Angstrom]
    axes : two Axes, optional
        for the spectrum and for the residuals; made by default
    name : str, optional
        of the star, for the title

    Returns
    -------
    array of two Axes

    Raises
    ------
    LabError
        where a table lacks a label of the model, or another number of labels is given

    Examples
    --------
    >>> from stellar_lab import Cannon, plot_fit
    >>> from stellar_lab.archives import real_stars
    >>> stars = real_stars()[:120]
    >>> model = Cannon(order=1, labels=["TEFF", "LOGG", "M_H"]).fit(stars)
    >>> axes = plot_fit(model, stars, 3, window=(15990, 16210))
    """
    import matplotlib.pyplot as plt

    star = spectra[[row]]
    made = model.predict(infer(model, star) if labels is None else labels)[0]
    if axes is None:
        _, axes = plt.subplots(
            2, 1, figsize=(9, 3.6), sharex=True, height_ratios=(3, 1), layout="constrained"
        )
    good = (star.ivar[0] > 0) & np.isfinite(made)
    left = star.flux[0] - made
    name = star.stars["APOGEE_ID"][0] if name is None else name
    grid = star.wavelength
    under = {"color": "0.55", "lw": 1.6, "label": "star"}  # wide: the model must not hide it
    plot_spectrum(grid, star.flux[0], star.ivar[0], window, ax=axes[0], **under)
    plot_spectrum(grid, made, good, window, ax=axes[0], color="C3", lw=0.6, label="model")
    rms = np.sqrt(np.mean(left[good] ** 2))
    axes[0].set(title=f"{name}: rms {rms:.4f}", xlabel=None, ylabel="flux / continuum")
    axes[0].set(ylim=_flux_limits(star, made, good & _in_window(grid, window)))
    legend_place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
    axes[0].legend(ncols=2, frameon=False, **legend_place)
    _draw_rest(axes[1], star, left, good, window)
    return axes


# %%
rows = train[:3]
fig, axes = plt.subplots(
    6, 1, figsize=(9, 9), sharex=True, height_ratios=(3, 1) * 3, layout="constrained"
)
for pair, row in zip(axes.reshape(3, 2), rows):
    plot_fit(model, spectra, row, spectra[[row]].labels(names), (15990, 16210), pair)
    pair[1].label_outer()
with pytest.raises(LabError, match="the table has no column"):
    plot_fit(model, spectra, 0, Table({"teff": [4500.0]}))

# %%
#| echo: false
residual = (spectra[train].flux - model.predict(spectra[train].labels(names)))[
    (spectra[train].ivar > 0) & model.usable_
]
outside = (spectra[test].flux - model.predict(spectra[test].labels(names)))[
    (spectra[test].ivar > 0) & model.usable_
]
others = spectra[train].labels(names) - spectra[[rows[2]]].labels(names)
beyond = np.minimum(np.mean(others > 0, axis=0), np.mean(others < 0, axis=0))
rare = np.argmin(beyond)
ripples = (
    f" The third model ripples: only {100 * beyond[rare]:.1f} % lie beyond that star in "
    f"{LABELS[names[rare]].symbol}, where parabolas are poorly held."
)
Markdown(
    f"**What to see.** The lines are where the model draws them, and nearly as deep. Over all "
    f"{len(train)} training stars the rms difference is "
    f"{residual.std():.4f}, over the {len(test)} stars that it has never seen "
    f"{outside.std():.4f}: little of what it learned is noise."
    + (ripples if beyond[rare] < 0.02 else "")
)

# %%
assert outside.std() < 1.2 * residual.std()  # no overfitting
assert (
    residual.std()
    < 0.7
    * (spectra[train].flux - np.median(spectra[train].flux, axis=0))[
        (spectra[train].ivar > 0) & model.usable_
    ].std()
)

# %% [markdown]
# ## Two reference implementations
# The batched fit against the plain one, pixel by pixel, on fifty real pixels: `numpy.linalg.lstsq` on rows weighted by $1/\sigma$. The predicted spectra
# must agree to a millionth. And the scatter against a general optimizer that knows nothing of scoring steps: it maximizes the likelihood over $s$, with the fit
# redone inside.

# %%
plain = Cannon(labels=names).fit(spectra[train])
design = plain.vectorizer_(plain.scale(spectra[train].labels(names)))
for pixel in np.flatnonzero(plain.usable_)[::140]:
    root_weight = np.sqrt(spectra[train].ivar[:, pixel].astype(float))
    slow = np.linalg.lstsq(
        design * root_weight[:, None], spectra[train].flux[:, pixel] * root_weight
    )[0]
    assert np.allclose(design @ plain.theta_[pixel], design @ slow, rtol=1e-6)


# %%
def minus_log_likelihood(s, flux, variance, design):
    total = variance + s**2
    fit = np.linalg.lstsq(design / np.sqrt(total)[:, None], flux / np.sqrt(total))[0]
    return 0.5 * np.sum((flux - design @ fit) ** 2 / total + np.log(total))


def slow_scatter(pixel):
    "The most likely scatter of a pixel, by a general optimizer."
    good = spectra[train].ivar[:, pixel] > 0
    flux = spectra[train].flux[good, pixel].astype(float)
    variance = 1 / spectra[train].ivar[good, pixel].astype(float)
    search = minimize_scalar(
        minus_log_likelihood,
        bounds=(0, 0.2),
        args=(flux, variance, design[good]),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return search.x


for pixel in np.flatnonzero(model.usable_ & (model.scatter_ > 0))[100::900]:
    assert abs(model.scatter_[pixel] / slow_scatter(pixel) - 1) < 1e-2, pixel

# %% [markdown]
# A pixel that almost no star has must be marked, and whatever stands in unusable pixels, NaN included, must not matter.

# %%
few = spectra[train]
ivar = few.ivar.copy()
ivar[5:, 100] = 0
flux = np.where(ivar > 0, few.flux, np.nan)
marked = Cannon(labels=names).fit(few.replace(flux=flux, ivar=ivar))
others = np.delete(np.arange(len(few.wavelength)), 100)
assert not marked.usable_[100] and np.isnan(marked.predict(few.labels(names)[:1])[0, 100])
assert np.allclose(
    marked.theta_[others], plain.theta_[others], equal_nan=True, rtol=1e-9, atol=1e-12
)

# %% [markdown]
# ## Where the polynomial is not enough
# The scatter tells: it is large where the labels do not explain the flux, because other elements have lines there, because the night sky does, or because a
# line's strength bends more than a parabola can.

# %%
fig, axes = plt.subplots(2, 1, figsize=(9, 4), sharex=True)
plot_spectrum(
    wavelength,
    model.theta_[:, 0],
    model.usable_,
    ax=axes[0],
    title="the spectrum at the mean labels",
).set_ylabel("flux")
plot_spectrum(
    wavelength,
    model.scatter_,
    model.usable_,
    ax=axes[1],
    color="C3",
    title="the scatter that noise does not explain",
)
axes[1].set(ylabel="$s$", ylim=(0, 0.06))
axes[0].label_outer()

# %%
#| echo: false
deep = model.theta_[:, 0] < 0.8
Markdown(
    f"**What to see.** Half of the pixels have a scatter below "
    f"{np.nanmedian(model.scatter_):.4f}, where the smallest error that the survey "
    f"states for a pixel is 0.005; in the {np.nansum(deep)} pixels that are deeper than 0.8 at "
    f"the mean labels it is "
    f"{np.nanmedian(model.scatter_[deep]):.4f}."
)

# %% [markdown]
# ## What a label does to the spectrum
# The derivative is a product, too. Each panel shows how the flux changes when one label grows by one standard deviation of the training set, on a scale of its own.

# %%
centre = model.pivots_[None]
slopes = model.derivative(centre)[0] * model.scales_[:, None]
fig, axes = plt.subplots(len(names), 1, figsize=(9, 1.2 * len(names)), sharex=True)
for ax, name, slope in zip(axes, names, slopes):
    plot_spectrum(wavelength, slope, model.usable_, (15990, 16210), ax=ax).set(
        ylabel=LABELS[name].symbol
    )
    ax.axhline(0, color="0.8", zorder=0)
    ax.label_outer()

# %% [markdown]
# **What to see.** Look at the scales first: metals change the flux most. More metals, deeper lines: their slope is negative in most pixels, and strongest in the lines. A hotter star has
# weaker lines: there the temperature points up, except in the broad lines of hydrogen (16,114 Å), which grow with it. Where two panels look alike, two labels are hard to tell apart; the covariance of [the inversion](06_inversion.ipynb) says so.
#
# Against finite differences, at a star that is not the mean:

# %%
at = spectra[test].labels(names)[:1]
for k, step in enumerate(1e-4 * model.scales_):
    shift = step * np.eye(len(names))[k]
    numeric = (model.predict(at + shift) - model.predict(at - shift)) / (2 * step)
    assert np.allclose(
        model.derivative(at)[0, k], numeric[0], rtol=1e-5, atol=1e-7 / step * 1e-4, equal_nan=True
    )
metallicity = slopes[[name in ("FE_H", "M_H") for name in names]][0]
assert np.nanmean(metallicity < 0) > 0.7  # metals darken
names

# %% [markdown]
# ## Keep it
# A model is saved as [ASDF](https://asdf.readthedocs.io): text that a person can read, and arrays. No pickle, so loading a stranger's model runs no
# stranger's code. The file knows its format, grid, labels, scaling, a digest of the training set and the versions that made it, and a file that is not a
# model is refused.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "giants.asdf"
    model.save(path)
    again = Cannon.load(path)
    (Path(folder) / "notes.txt").write_text("not a model")
    with pytest.raises(LabError, match="notes.txt is not a model of stellar_lab"):
        Cannon.load(Path(folder) / "notes.txt")
    with pytest.raises(
        LabError, match="there is no model at .*: train one with 'stellar-lab train'"
    ):
        Cannon.load(Path(folder) / "nowhere.asdf")
assert np.array_equal(again.predict(at), model.predict(at), equal_nan=True)
assert again.get_params() == model.get_params() and again.training_digest_ == model.training_digest_

# %%
assert clone(model).get_params() == model.get_params() and not hasattr(clone(model), "theta_")
with pytest.raises(LabError, match="2 labels per star, but the model has"):
    model.predict([[4500, 2.0]])
with pytest.raises(LabError, match=r"10 training stars cannot determine \d+ terms"):
    Cannon(labels=names).fit(spectra[:10])

# %% [markdown]
# ## The quietest pixels
# [Normalization](03_normalize.ipynb) needs pixels that lines hardly touch, and the model knows which these are: the ones whose flux is near one at the mean labels and whose linear
# coefficients are small. But the model needs normalized spectra first. [Ness et al. 2015](https://doi.org/10.1088/0004-637X/808/1/16) break the circle
# with a *naive* continuum: in runs of 100 pixels the flux that nine tenths of the pixels stay below, and a parabola through these. It lies wrong by a
# percent or two, smoothly, and that is good enough to find the quiet pixels.

# %%
#| export
_NAIVE_RUN = 100  # pixels
_NAIVE_QUANTILE = 0.9


def _naive_normalize(spectra: Spectra) -> Spectra:
    """Divide each chip by a parabola through the upper edge of the flux.

    Parameters
    ----------
    spectra : Spectra
        raw flux; masked pixels are left out

    Returns
    -------
    Spectra
        flux relative to a continuum that lies wrong by a percent or two, smoothly

    Raises
    ------
    LabError
        where a chip has fewer than 300 pixels
    """
    flux = spectra.flux.copy()
    ivar = spectra.ivar.copy()
    if spectra.mask is not None:
        ivar[spectra.mask != 0] = 0
    for name, chip in chip_slices(spectra.wavelength).items():
        edge, x, place = _upper_edge(np.where(ivar[:, chip] > 0, flux[:, chip], np.nan), name)
        coefficients = np.polynomial.polynomial.polyfit(x, edge.T, 2)
        curve = np.polynomial.polynomial.polyval(place, coefficients).astype(flux.dtype)
        good = curve > 0
        flux[:, chip] = np.where(good, flux[:, chip] / np.where(good, curve, 1), 1)
        ivar[:, chip] = np.where(good, ivar[:, chip] * curve**2, 0)
    return spectra.replace(flux=flux, ivar=ivar)


def _upper_edge(flux, chip):
    "High quantile of each run of pixels (N, R), places of the runs (R,) and of the pixels (P,)."
    runs = flux.shape[1] // _NAIVE_RUN
    if runs < 3:
        raise LabError(
            f"the {chip} chip has {flux.shape[1]} pixels: a naive continuum needs {3 * _NAIVE_RUN}"
        )
    place = np.linspace(-1, 1, flux.shape[1])
    whole = runs * _NAIVE_RUN
    in_runs = np.sort(flux[:, :whole].reshape(len(flux), runs, _NAIVE_RUN), axis=2)  # NaN last
    good = np.isfinite(in_runs).sum(axis=2)
    rank = np.maximum(np.round(_NAIVE_QUANTILE * (good - 1)), 0).astype(int)
    edge = np.take_along_axis(in_runs, rank[:, :, None], axis=2)[:, :, 0].astype(float)
    lit = (good > 0).any(axis=1, keepdims=True)
    level = np.nan_to_num(np.nanmedian(np.where(lit, edge, 0), axis=1, keepdims=True))
    filled = np.where(good > _NAIVE_RUN // 10, edge, level)
    return filled, place[:whole].reshape(runs, _NAIVE_RUN).mean(axis=1), place


# %%
raw, _ = apply_cuts(read_archive(archive_root(), product="apstar", progress=False)[0])
fig, axes = plt.subplots(2, 1, figsize=(9, 3.6), sharex=True)
for ax, stars, title in zip(
    axes, (raw, _naive_normalize(raw)), ("raw", "after the naive continuum")
):
    plot_spectrum(wavelength, stars.flux[3], stars.ivar[3], ax=ax, title=title)
    ax.set_ylabel("flux")
    ax.label_outer()


# %% [markdown]
# Then the quiet pixels: in each chip the ones that no label moves much.

# %%
#| export
def find_continuum_pixels(
    spectra: Spectra, labels: Sequence = None, share: float = 529 / 7214, baseline: float = 0.15
) -> np.ndarray:
    """Continuum pixels found from the data: near 1, and the least sensitive to any label.

    The idea is that of Ness et al. 2015, ApJ 808, 16, section 2.3.

    Parameters
    ----------
    spectra : Spectra
        raw flux, with labels
    labels : sequence of str, optional
        label names; all of the spectra's by default
    share : float, default 529 / 7214
        of each chip's pixels to choose; the list of the original lab has this many
    baseline : float, default 0.15
        largest distance of the flux at the mean labels from 1

    Returns
    -------
    (P,) bool array
    """
    model = Cannon(scatter=True, labels=labels).fit(_naive_normalize(spectra))
    linear = model.vectorizer_.exponents.sum(axis=1) == 1
    slope = np.abs(model.theta_[:, linear])
    near = np.abs(model.theta_[:, 0] - 1) < baseline
    chosen = np.zeros(len(near), dtype=bool)
    for chip in chip_slices(spectra.wavelength).values():
        candidates = chip.start + np.flatnonzero(near[chip])
        rank = slope[candidates].argsort(axis=0).argsort(axis=0)
        worst_rank = rank.max(axis=1)  # that of the label which moves the pixel most
        count = round(share * (chip.stop - chip.start))
        chosen[candidates[worst_rank.argsort(kind="stable")[:count]]] = True
    return chosen


# %%
found = find_continuum_pixels(raw, names)
theirs = lab_continuum_pixels()
fig, ax = plt.subplots(figsize=(9, 2.5))
window = (15990, 16210)
plot_spectrum(
    wavelength,
    model.theta_[:, 0],
    model.usable_,
    window,
    ax=ax,
    color="0.5",
    title="the spectrum at the mean labels, and pixels for its continuum",
)
for pixels, marker, height, label in (
    (theirs, "v", 1.06, "the list of 529"),
    (found, "^", 1.04, "found here"),
):
    shown = pixels & (wavelength > window[0]) & (wavelength < window[1])
    ax.plot(wavelength[shown], np.full(shown.sum(), height), marker, ms=4, label=label)
ax.legend(loc="lower right", frameon=False, ncols=2);

# %%
#| echo: false
chips = chip_slices(wavelength)
chance = found.sum() * theirs.sum() / len(found)
by_chip = ", ".join(
    f"{found[chip].sum()} and {theirs[chip].sum()} in the {name} chip"
    for name, chip in chips.items()
)
depth = [1 - np.nanmean(model.theta_[pixels, 0]) for pixels in (found, theirs)]
shift = [
    np.sqrt(np.nanmean((model.theta_[pixels, 1 : 1 + len(names)]) ** 2))
    for pixels in (found, theirs)
]
Markdown(
    f"**What to see.** {(found & theirs).sum()} of our {found.sum()} pixels are in the list, too; "
    f"{chance:.0f} would be by chance. "
    f"A label moves ours {shift[1] / shift[0]:.1f} times less than the list's, which was found on "
    "other stars, mostly of solar metallicity. What either costs in labels is measured on [real "
    "giants](08_giants.ipynb)."
)

# %%
assert (found & theirs).sum() > 2 * chance
assert shift[0] < 0.5 * np.sqrt(
    np.nanmean(model.theta_[:, 1 : 1 + len(names)] ** 2)
)  # quieter than pixels at large
assert all(abs(found[chip].mean() - 529 / 7214) < 0.002 for chip in chips.values())

# %% [markdown]
# On a made-up star the naive continuum must take out a slope that we put in: a flat spectrum with lines in every fifth pixel, times a parabola, comes back
# flat to a percent, and the same star a thousand times brighter gives the same answer.

# %%
rng = np.random.default_rng(4)
lines = 1 - 0.3 * (rng.random(len(wavelength)) < 0.2)
x = (wavelength - 16000) / 900
bent = (lines * (5 + x - 0.5 * x**2) * np.array([[1], [1000]])).astype("f4")
flat = _naive_normalize(raw[:2].replace(flux=bent, ivar=np.ones_like(bent), mask=None)).flux
assert np.ptp(flat[0, lines == 1]) < 0.02 and abs(flat[0, lines == 1].mean() - 1) < 0.02
assert np.allclose(flat[0], flat[1], rtol=1e-5)


# %% [markdown]
# ## A published model, made again
# The Cannon 2 carries a test set: 671 giants, 100 pixels, and the coefficients of a fit with twelve terms up to the fourth power of the temperature. Its terms and pivots are options of our estimator;
# fitted to the same stars, ours must say the same. (Where `STELLAR_LAB_REAL_DATA` names a folder with the file.)

# %%
#| exporti
def published_giants(folder):
    """The Cannon 2's test set of 671 giants: labels, flux, ivar, label names, and what its authors
    fitted."""
    with np.load(Path(folder) / "apogee_671_stars_100_pixels.npz") as file:
        giants = dict(file)
    return (
        giants["labels"],
        giants["flux"],
        giants["flux_err"] ** -2.0,
        [str(name) for name in giants["label_names"]],
        giants,
    )


# %%
if real_data():
    labels, flux, ivar, published_names, published = published_giants(real_data())
    ours = Cannon(
        terms=published["terms"], pivots=published["pivots"], scales=np.ones(3), scatter=True
    ).fit(labels, flux, ivar, published_names)
    theirs_flux = ours.vectorizer_(ours.scale(labels)) @ published["theta_first_50"].T
    difference = np.std(ours.predict(labels)[:, :50] - theirs_flux, axis=0) / np.std(
        theirs_flux, axis=0
    )
    ratio = ours.scatter_[:50] / published["scatter_first_50"]
    print(
        f"largest rms difference of the predictions, in units of their spread: "
        f"{difference.max():.1e}"
    )
    print(f"scatter, ours / theirs: {ratio.min():.4f} to {ratio.max():.4f}")
    assert difference.max() < 1e-5 and np.all(np.abs(ratio - 1) < 0.01)
else:
    print("skipped: STELLAR_LAB_REAL_DATA names no folder with the published model")

# %% [markdown]
# With the variable set, the original list of continuum pixels goes through the same reader as a user's, and is the one that the project ships.

# %%
if real_data():
    assert np.array_equal(
        read_continuum_pixels(real_data() / "pixels_cannon.npy"), lab_continuum_pixels()
    )
    assert np.allclose(np.load(real_data() / "wavelength.npy"), wavelength, atol=1e-8, rtol=0)
else:
    print("skipped: STELLAR_LAB_REAL_DATA is not set")

# %% [markdown]
# **Exercise.** Train with `order=1` and with `order=3` (fewer labels, or `terms`), and compare the rms difference on the stars left out of training. At which order do the stars stop paying
# for the terms?
