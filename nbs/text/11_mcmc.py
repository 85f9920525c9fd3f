# %% [markdown]
# # How sure can we be?
# > The whole posterior of a star's labels: sampled, judged, tested on stars whose labels we know, and then on one whose name was sealed.
#
# **Question.** [The inversion](06_inversion.ipynb) gave each star one best set of labels and a covariance. Which other labels would fit nearly as
# well, how are they tied to one another, and is the error that comes out of it the error that we make?
#
# **Idea.** Bayes: what we know of the labels $\boldsymbol\ell$ after the spectrum is what we knew before, times how well they explain it,
# $$ p(\boldsymbol\ell\mid f) \;\propto\; p(\boldsymbol\ell)\; e^{-\chi^2(\boldsymbol\ell)/2},\qquad
# \chi^2 = \sum_p \frac{(f_p - \boldsymbol\theta_p\cdot\mathbf v(\boldsymbol\ell))^2}{\sigma_p^2+s_p^2}. $$
# We cannot write this density down as a table in six dimensions, but we can *walk* in it: a Markov chain visits every region as often as the density
# is high there, so the steps of the walk are draws. [emcee](https://emcee.readthedocs.io) moves a whole *ensemble* of walkers, each along the line to
# another one, and so needs no tuning, whatever the scales and tilts of the density
# ([Goodman & Weare 2010](https://doi.org/10.2140/camcos.2010.5.65), [Foreman-Mackey et al. 2013](https://doi.org/10.1086/670067)).
#
# A walk gives an answer whether it has arrived or not. So half of this chapter is about knowing when to believe it. You learn to judge a chain by
# numbers instead of by eye, to test error bars by their coverage, and why the calibrated error of a star is ten times the one that its pixels promise.
# You need [the Cannon](05_cannon.ipynb) and [its inversion](06_inversion.ipynb).

# %%
#| default_exp mcmc

# %%
#| export
from collections.abc import Callable
from dataclasses import dataclass, field

import astropy.units as u
import corner
import emcee
import matplotlib.pyplot as plt
import numpy as np
from arviz_stats.base import array_stats
from astropy.table import QTable, vstack
from scipy.stats import chi2, norm, qmc
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from stellar_lab.cannon import Cannon, Vectorizer
from stellar_lab.inversion import Statistics, descend, infer, statistics
from stellar_lab.models import apply_error_model, in_blocks, label_box, label_values
from stellar_lab.survey import LabError, Spectra, label_record

# %%
#| hide
import math

import pytest
from astropy.table import Table
from IPython.display import Markdown
from scipy.stats import binom, kstest

from stellar_lab.archives import MYSTERY_FILE, clusters
from stellar_lab.cannon import plot_fit
from stellar_lab.clean import read_files
from stellar_lab.judging import with_error_model
from stellar_lab.models import flag_names, train_test_rows
from stellar_lab.normalize import normalize, training_set
from stellar_lab.survey import (
    LABELS,
    archive_record,
    archive_root,
    chip_slices,
    profile,
    read_truth,
    real_data,
    use_style,
)

# %% [markdown]
# ## A likelihood that touches no pixel
# A chain of 15,000 steps with 16 walkers asks for the likelihood 240,000 times. [The inversion](06_inversion.ipynb) has shown that a spectrum says all
# that it has to say about the labels in two sums, $A$ and $\mathbf b$. So we make these once (in double precision: a walk compares *differences* of
# $\chi^2$ of order one) and then
# $$ \ln L(\boldsymbol\ell) = \mathbf b\cdot\mathbf v - \tfrac12\,\mathbf v^\mathsf T A\,\mathbf v + \mathrm{const}, $$
# for many trial labels of many stars in one call.

# %%
#| export
_CAST_BLOCK = 256  # stars whose pixels are turned to double precision at a time


def _exact_statistics(model, flux, ivar):
    "Sufficient statistics of spectra (N, P) with every product in double precision."
    blocks = []
    for start in range(0, len(flux), _CAST_BLOCK):
        rows = slice(start, start + _CAST_BLOCK)
        weight = np.asarray(ivar[rows], dtype=float)
        usable_flux = np.where(weight > 0, flux[rows], 0).astype(float)
        blocks.append(statistics(model, usable_flux, weight, dtype=float))
    fields = ("A", "b", "n_good")
    return Statistics(
        *(np.concatenate([getattr(block, name) for block in blocks]) for name in fields)
    )


def _log_likelihood(vectorizer, A, b, labels):
    "-chi2/2 above its value at the pivots (N, S), at S scaled trial labels (N, S, K) per star."
    v = vectorizer(labels.reshape(-1, labels.shape[-1]))[:, 1:].reshape(*labels.shape[:-1], -1)
    return np.einsum("nst,nst->ns", b[:, None] - 0.5 * (v @ A), v)


@dataclass
class _LogPosterior:
    "ln of one star's posterior at scaled labels (S, K), up to a constant."

    vectorizer: Vectorizer
    A: np.ndarray  # (T-1, T-1) from `Statistics.matrix`
    b: np.ndarray  # (T-1,)
    prior: Callable  # scaled labels (S, K) -> ln of their prior density (S,), -inf where forbidden
    offset: float = 0.0  # makes the likelihood -chi2/2

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        likelihood = _log_likelihood(self.vectorizer, self.A[None], self.b[None], labels[None])[0]
        return self.offset + likelihood + self.prior(labels)


# %% [markdown]
# ### The reference implementation
# The same thing over all pixels, as the original lab had it: slow, and with nothing to go wrong. The star is the archive's *mystery star*, a file
# without a name that we shall sample in this chapter (a test star takes its place where an archive has none). Reading it is the subject of
# [the chapter on files](02_clean.ipynb), its continuum and its bitmask that of [the chapter on the continuum](03_normalize.ipynb); the original lab
# forgot the mask.

# %%
use_style()
root = archive_root()
record = archive_record(root)
names = list(record.labels)
spectra, _ = training_set(root, progress=False)
train, test = train_test_rows(len(spectra))
model = Cannon(scatter=True, labels=names).fit(spectra[train])

# %%
has_mystery = (root / MYSTERY_FILE).is_file()
star = spectra[test[:1]]
if has_mystery:
    star = normalize(read_files([root / MYSTERY_FILE], progress=False)[0])
print(f"{np.mean(star.ivar == 0):.1%} of its pixels are masked or otherwise unusable")
assert star.mask is None or np.all(star.ivar[0, star.mask[0] != 0] == 0)


# %%
def pixel_log_likelihood(model, flux, ivar, labels):
    "The original lab's likelihood: one spectrum, all pixels, at scaled labels (S, K)."
    usable = (ivar > 0) & model.usable_
    weight = 1 / (1 / ivar[usable].astype(float) + model.scatter_[usable] ** 2)
    residual = flux[usable].astype(float) - model.vectorizer_(labels) @ model.theta_[usable].T
    return -0.5 * (residual**2) @ weight


# %% [markdown]
# At 100 random points, half of them anywhere within two standard deviations of the mean labels and half within a few formal errors of the best fit, the
# *differences* between points must agree to a millionth of their spread.

# %%
rng = np.random.default_rng(1)
stats = _exact_statistics(model, star.flux, star.ivar)
best = model.scale(np.column_stack([infer(model, star)[name.lower()].value for name in names]))
anywhere = rng.uniform(-2, 2, (50, len(names)))
nearby = best + 0.01 * rng.standard_normal((50, len(names)))
for points in (anywhere, nearby):
    fast = _log_likelihood(model.vectorizer_, stats.matrix(), stats.b, points[None])[0]
    slow = pixel_log_likelihood(model, star.flux[0], star.ivar[0], points)
    off = np.abs((fast - fast[0]) - (slow - slow[0])).max()
    print(f"spread of ln L {np.ptp(slow):9.3g}, largest disagreement {off:.1e}")
    assert off < 1e-6 * np.ptp(slow)


# %% [markdown]
# ## What we knew before
# Two priors. That of the original lab is *uniform*: any scaled label between -5 and 5, five standard deviations of the training stars to both sides,
# is as good as any other. That sounds modest and is not: it gives a cool dwarf and a hot supergiant, of which the training set has none, the same
# chance as a star on the giant branch.

# %%
#| export
@dataclass(frozen=True)
class UniformPrior:
    """All labels within a box are alike: the prior of the original lab.

    Parameters
    ----------
    bound : float, default 5
        Half the width of the box, in scaled units around the training mean.
    """

    bound: float = 5

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        "ln of the density at scaled labels (..., K); -inf outside the box."
        inside = np.all(np.abs(labels) <= self.bound, axis=-1)
        return np.where(inside, -labels.shape[-1] * np.log(2 * self.bound), -np.inf)

    def draw(self, n: int, K: int, rng) -> np.ndarray:
        "Scaled labels (n, K) from the prior."
        return rng.uniform(-self.bound, self.bound, (n, K))


# %%
assert np.isclose(UniformPrior(2)(np.zeros((1, 3)))[0], np.log(1 / 4**3))
assert UniformPrior()(np.array([[0, 5.1]]))[0] == -np.inf

# %% [markdown]
# The other prior says: *this star comes from where the training stars came from*. A mixture of Gaussians is fitted to the scaled training labels, with
# as many components as the Bayesian information criterion (BIC) asks for. A kernel density would do as well in two dimensions; in six it needs far more
# stars than we have, while a few Gaussians follow a narrow tilted band with few parameters. Its strength is its danger: it knows how the survey chose
# its stars, and pulls an odd star towards the ordinary.

# %%
#| export
_COMPONENTS = 8  # at most, of the mixture


class TrainingPrior:
    """Density of the training set: a mixture of Gaussians in the scaled labels.

    Parameters
    ----------
    model : Cannon
        A trained model; its training labels are the sample.
    components : int, optional
        Number of Gaussians. By default the number up to 8 with the lowest BIC.
    seed : int, default 42
        Of the fits.
    """

    def __init__(self, model: Cannon, components: int | None = None, seed: int = 42):
        labels = model.scale(model.training_labels_)
        sizes = range(1, _COMPONENTS + 1) if components is None else [components]
        with threadpool_limits(limits=1):  # the fits are too small for threads
            fits = [
                GaussianMixture(size, reg_covar=1e-4, n_init=2, random_state=seed).fit(labels)
                for size in sizes
                if size < len(labels)
            ]
        self.mixture = min(fits, key=lambda fit: fit.bic(labels))
        self._root = self.mixture.precisions_cholesky_
        log_det = np.log(np.einsum("ckk->ck", self._root)).sum(axis=1)
        self._log_height = (
            np.log(self.mixture.weights_) + log_det - 0.5 * labels.shape[1] * np.log(2 * np.pi)
        )

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        "ln of the density at scaled labels (..., K)."
        whitened = (labels[..., None, None, :] - self.mixture.means_[:, None]) @ self._root
        distance2 = (whitened[..., 0, :] ** 2).sum(axis=-1)
        return np.logaddexp.reduce(self._log_height - 0.5 * distance2, axis=-1)

    def draw(self, n: int, K: int, rng) -> np.ndarray:
        "Scaled labels (n, K) from the prior."
        component = rng.choice(len(self._root), size=n, p=self.mixture.weights_)
        root = np.linalg.cholesky(self.mixture.covariances_)
        steps = np.einsum("nkj,nj->nk", root[component], rng.standard_normal((n, K)))
        return self.mixture.means_[component] + steps


# %% [markdown]
# The density is compared with scikit-learn's own `score_samples`, the draws with the training labels.

# %%
population = TrainingPrior(model)
scaled = model.scale(model.training_labels_)
assert np.allclose(population(scaled), population.mixture.score_samples(scaled))
drawn = population.draw(20_000, len(names), np.random.default_rng(2))
assert np.allclose(np.cov(drawn.T), np.cov(scaled.T), atol=0.1)
print(f"{len(population._root)} components for {len(scaled)} stars in {len(names)} dimensions")

# %%
fig, ax = plt.subplots(figsize=(6, 3.2))
physical = model.unscale(drawn[:3000])
ax.plot(*physical[:, :2].T, ".", ms=2, color="0.7", label="drawn from the prior")
ax.plot(*model.training_labels_[:, :2].T, ".", ms=3, color="C0", label="training stars")
ax.set(xlabel=LABELS[names[0]].axis, ylabel=LABELS[names[1]].axis, title="the training set's prior")
ax.invert_xaxis()
ax.invert_yaxis()
ax.legend(frameon=False, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5));


# %% [markdown]
# ## How long does a walk remember?
# Neighbouring steps of a walk are alike, so $n$ steps are worth fewer independent draws. How many fewer? We build the answer step by step, as
# [emcee's tutorial](https://emcee.readthedocs.io/en/stable/tutorials/autocorr/) does.
#
# We need a walk whose memory we know. In $x_{t+1} = a\,x_t + \text{noise}$ a step keeps a share $a$ of the one before, so the correlation of two steps
# that are $t$ apart is $\rho(t) = a^t$.

# %%
def autoregressive(shape, a=0.9, seed=3):
    "Walks whose steps (axis 1) keep a share `a` of the one before."
    noise = np.random.default_rng(seed).standard_normal(shape)
    x = np.empty_like(noise)
    x[:, 0] = noise[:, 0] / np.sqrt(1 - a**2)
    for step in range(1, shape[1]):
        x[:, step] = a * x[:, step - 1] + noise[:, step]
    return x


toy = autoregressive((4, 2000, 16, 2))  # ensembles, steps, walkers, labels


# %% [markdown]
# The correlation at *all* distances $t$ takes one Fourier transform: the power spectrum of a series and its autocorrelation are transforms of one
# another (Wiener and Khinchin). Zeros behind the walk keep its end from meeting its beginning. `np.correlate` multiplies it out and must say the same.

# %%
def autocorrelation(x):
    "Correlation of the steps of a walk (S,) by their distance (S,); 1 at distance 0."
    x = x - x.mean()
    power = np.abs(np.fft.rfft(x, 2 * len(x))) ** 2
    products = np.fft.irfft(power)[: len(x)]
    return products / products[0]


one_walker = toy[0, :, 0, 0]
around_mean = one_walker - one_walker.mean()
products = np.correlate(around_mean, around_mean, "full")[len(one_walker) - 1 :]
assert np.allclose(autocorrelation(one_walker), products / products[0])

# %% [markdown]
# The variance of a mean over $n$ steps is that of one step times $\tau/n$, with the *integrated autocorrelation time*
# $$ \tau = 1 + 2\sum_{t=1}^{\infty}\rho(t) , $$
# because each step shares its news with its neighbours on both sides. So $n$ steps are worth $n/\tau$ draws. For the toy the sum is geometric,
# $\tau=(1+a)/(1-a)$, and $a=0.9$ gives 19.
#
# The measured $\rho$ does not end at zero, it ends in noise, and a sum over noise walks away. So the sum must stop somewhere: late enough to take all
# of the correlation, early enough to leave the noise. Sokal's rule stops at the first distance $M$ that is at least five times the $\tau$ summed so far.

# %%
all_walkers = np.mean([autocorrelation(walk) for walk in toy[0, :, :, 0].T], axis=0)
distance = np.arange(300)
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2))
for rho, name in ((autocorrelation(one_walker), "one walker"), (all_walkers, "mean of 16")):
    axes[0].plot(distance, rho[:300], lw=1, label=name)
    axes[1].plot(distance, 2 * np.cumsum(rho)[:300] - 1, lw=1, label=name)
axes[0].plot(distance, 0.9**distance, "k--", lw=1, label="known: $0.9^t$")
axes[1].axhline(19, color="k", ls="--", lw=1, label="known: 19")
axes[1].plot(distance, distance / 5, color="0.7", lw=1, label="$M/5$")
axes[0].set(xlabel="distance $t$ [steps]", ylabel=r"correlation $\rho(t)$")
axes[1].set(xlabel="end of the sum $M$ [steps]", ylabel=r"$\tau(M)$ [steps]", ylim=(0, 40))
axes[0].legend(frameon=False)
axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5));


# %% [markdown]
# **What to see.** One walker's correlation wanders about zero long after the memory is gone, and the sum wanders with it. The mean over walkers is
# quieter. Where the grey line crosses a sum, Sokal's rule stops.

# %%
def built_time(walks):
    "Integrated autocorrelation time [steps] of walks (W, S) of one label."
    rho = np.mean([autocorrelation(walk) for walk in walks], axis=0)
    tau = 2 * np.cumsum(rho) - 1
    far_enough = np.arange(len(tau)) >= 5 * tau
    return tau[np.argmax(far_enough)] if far_enough.any() else tau[-1]


# %% [markdown]
# emcee holds the same estimator, and the library takes emcee's.

# %%
#| export
def _autocorrelation_time(chain):
    "Integrated autocorrelation time [steps] of each label (K,) of a chain (E, S, W, K), by emcee."
    E, S, W, K = chain.shape
    walks = np.moveaxis(chain, 0, 1).reshape(S, E * W, K)
    with np.errstate(invalid="ignore"):
        return emcee.autocorr.integrated_time(walks, tol=0)


# %%
walks = np.moveaxis(toy[..., 0], 1, 2).reshape(64, 2000)
print(f"built here {built_time(walks):.3f}, emcee {_autocorrelation_time(toy)[0]:.3f} steps")
assert np.isclose(built_time(walks), _autocorrelation_time(toy)[0], rtol=1e-6)

# %% [markdown]
# How long must a chain be before its $\tau$ can be believed?

# %%
long_walk = autoregressive((1, 20_000, 64, 1), seed=30)[0, ..., 0].T
lengths = np.geomspace(50, 20_000, 14).astype(int)
estimates = [built_time(long_walk[:, :length]) for length in lengths]
fig, ax = plt.subplots(figsize=(6, 3.2))
ax.semilogx(lengths, estimates, "o-", ms=4, label="estimate")
ax.axhline(19, color="k", ls="--", lw=1, label="known: 19")
ax.plot(lengths, lengths / 50, color="0.7", lw=1, label="steps / 50")
ax.set(xlabel="steps", ylabel=r"$\tau$ [steps]", ylim=(0, 30), title="64 walkers")
ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5));

# %% [markdown]
# **What to see.** A short chain has a short memory: each walker's own mean is taken away, and with it whatever is slower than the chain. Right of the
# grey line the chain is longer than 50 $\tau$, and the estimate levels off. Only there may it be believed.

# %%
trusted = lengths >= 50 * np.array(estimates)
assert np.allclose(np.array(estimates)[trusted], 19, rtol=0.25)
assert estimates[0] < 0.6 * 19 and not trusted[0]

# %% [markdown]
# ## When is a chain long enough?
# With $\tau$ at hand, numbers decide what used to be judged by eye:
#
# - **Burn-in.** The first steps remember the start. They go: the earliest point is taken that lies at least ten $\tau$ *of what is left* behind the
#   start. (If too little goes, what is left still drifts, its $\tau$ is long, and the point moves on.)
# - **Length.** At least 50 $\tau$, as we have just seen.
# - **Effective sample size** (ESS). What the draws are worth; 400 at least ([Vehtari et al. 2021](https://doi.org/10.1214/20-BA1221)).
# - **Split R-hat.** Several ensembles walk independently. Each is cut in half, and the spread *between* the halves is compared with that *within*
#   them, on ranks. Where all saw the same density the ratio is one; it may be 1.01. This finds what no single chain can know: that there is another
#   place.
#
# R-hat and effective sample size come from [ArviZ](https://python.arviz.org).

# %%
#| export
_BURN_IN = 10  # autocorrelation times
_LENGTH = 50  # autocorrelation times


def _burn_in(chain):
    "The earliest point that lies _BURN_IN times the tau of the rest behind the start; else half."
    S = chain.shape[1]
    thin = max(1, S // 1000)
    for steps in np.unique(np.geomspace(max(S // 100, 1), max(S // 2, 1), 20).astype(int)):
        if steps >= _BURN_IN * thin * _autocorrelation_time(chain[:, steps::thin]).max():
            return steps
    return S // 2


def _rhat_and_ess(chain):
    "Rank-normalized split R-hat (K,), each ensemble one chain, and bulk ESS (K,)."
    E, S, W, K = chain.shape
    compared = chain
    if E == 1:  # a single ensemble can only be compared with itself
        compared = chain[:, : S // 2 * 2].reshape(2, S // 2, W, K)
    walks = np.swapaxes(chain, 1, 2).reshape(E * W, S, K)
    with np.errstate(invalid="ignore", divide="ignore"):
        ensembles = compared.reshape(len(compared), -1, K)
        rhat = array_stats.rhat(ensembles, chain_axis=0, draw_axis=1)
        ess = array_stats.ess(walks, chain_axis=0, draw_axis=1)
    return rhat, ess


# %%
rhat, ess = _rhat_and_ess(toy)
print("burn-in", _burn_in(toy), " R-hat", rhat.round(4), " ESS", ess.round())
assert np.allclose(ess, 4 * 16 * 2000 / 19, rtol=0.15) and np.all(rhat < 1.01)

# %% [markdown]
# `_diagnose` gathers these numbers and says in words what is wrong. A chain with problems is not summarized: `NotConverged` says why, unless the caller
# insists.

# %%
#| export
_RHAT_LIMIT = 1.01
_ESS_LIMIT = 400


class NotConverged(LabError):
    "A chain is no answer yet; the message says what is missing."


@dataclass
class _Diagnosis:
    """Whether a chain may be believed.

    Attributes
    ----------
    burn_in : int
        Steps to throw away.
    tau : array (K,)
        Integrated autocorrelation time [steps]; NaN where nothing moved.
    rhat : array (K,)
        Rank-normalized split R-hat, each ensemble one chain.
    ess : array (K,)
        Bulk effective sample size.
    problems : list of str
        What is wrong, in words; empty where nothing is.
    """

    burn_in: int
    tau: np.ndarray
    rhat: np.ndarray
    ess: np.ndarray
    problems: list


def _problems(name, steps, tau, rhat, ess):
    "What is wrong with one label of a chain, in words. NaN is wrong."
    if not steps >= _LENGTH * tau:
        yield (
            f"{name}: {steps} steps after the burn-in are {steps / tau:.0f} autocorrelation times, "
            f"{_LENGTH} are needed"
        )
    if not rhat <= _RHAT_LIMIT:
        yield f"{name}: the ensembles disagree, R-hat {rhat:.3f} (at most {_RHAT_LIMIT})"
    if not ess >= _ESS_LIMIT:
        yield f"{name}: effective sample size {ess:.0f} ({_ESS_LIMIT} needed)"


# %%
list(_problems("x", steps=100, tau=19.0, rhat=1.2, ess=90))


# %%
#| export
def _diagnose(chain: np.ndarray, names, burn_in: int | None = None) -> _Diagnosis:
    """Judge a chain: autocorrelation time, burn-in, R-hat, effective sample size.

    Parameters
    ----------
    chain : array (E, S, W, K)
        Ensembles, steps, walkers, labels.
    names : sequence of str
        Of the K labels.
    burn_in : int, optional
        Steps to throw away; by default judged by the autocorrelation time.

    Returns
    -------
    _Diagnosis

    Raises
    ------
    LabError
        Where the burn-in leaves nothing of the chain.
    """
    S = chain.shape[1]
    burn_in = _burn_in(chain) if burn_in is None else burn_in
    if not 0 <= burn_in <= S - 4:
        raise LabError(
            f"a burn-in of {burn_in} leaves nothing of {S} steps: take a smaller one or more steps"
        )
    kept = chain[:, burn_in:]
    tau = _autocorrelation_time(kept)
    rhat, ess = _rhat_and_ess(kept)
    problems = [
        problem
        for label in zip(names, tau, rhat, ess)
        for problem in _problems(label[0], kept.shape[1], *label[1:])
    ]
    return _Diagnosis(int(burn_in), tau, rhat, ess, problems)


# %% [markdown]
# The toy passes. (emcee takes each walker's own mean away, which makes $\tau$ a tenth too short here; ArviZ compares the chains and does not mind.)

# %%
good = _diagnose(toy, "xy")
print("tau", good.tau.round(1), "R-hat", good.rhat.round(4))
print("ESS", good.ess.round(), "burn-in", good.burn_in)
assert np.allclose(good.tau, 19, rtol=0.15) and not good.problems
assert np.allclose(good.ess, 4 * 16 * (2000 - good.burn_in) / 19, rtol=0.15)

# %% [markdown]
# And three that must be refused: too short, two ensembles in different places, and a drift that never ends.

# %%
short = _diagnose(toy[:, :200], "xy")
apart = _diagnose(toy + np.array([0, 0, 0, 3])[:, None, None, None], "xy")
drifting = _diagnose(toy + np.linspace(0, 30, 2000)[:, None, None], "xy")
for bad in (short, apart, drifting):
    print(bad.problems[0])
assert "autocorrelation times, 50 are needed" in short.problems[0]
assert any("the ensembles disagree" in problem for problem in apart.problems)
assert drifting.problems
stuck = _diagnose(np.zeros((2, 100, 4, 1)), "x")  # walkers that never moved
assert stuck.problems


# %% [markdown]
# ## The walk
# A walk keeps every step and its diagnosis. It hands out draws only where the diagnosis has nothing to say.

# %%
#| export
@dataclass
class _Walk:
    "A chain and whether it may be believed."

    label_names: tuple
    chain: np.ndarray
    log_prob: np.ndarray
    acceptance: float
    diagnosis: _Diagnosis

    @property
    def converged(self) -> bool:
        "May the chain be believed?"
        return not self.diagnosis.problems

    def draws(self, insist: bool = False) -> np.ndarray:
        """Draws after the burn-in, (n, K).

        Parameters
        ----------
        insist : bool, default False
            Take them though the chain has not converged.

        Raises
        ------
        NotConverged
            If the chain may not be believed, unless `insist`.
        """
        if not (self.converged or insist):
            problems = self.diagnosis.problems
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise NotConverged(
                f"the chain has not converged: {'; '.join(problems[:3])}{more}. "
                "Take more steps or another start, or insist=True to see it all the same"
            )
        return self.chain[:, self.diagnosis.burn_in :].reshape(-1, self.chain.shape[-1])

    def __repr__(self):
        E, S, W, K = self.chain.shape
        d = self.diagnosis
        verdict = "converged" if self.converged else f"NOT CONVERGED, {d.problems[0]}"
        return (
            f"<Posterior of {K} labels: {E} x {W} walkers x {S} steps, burn-in {d.burn_in}, "
            f"tau {np.max(d.tau):.0f}, R-hat {np.max(d.rhat):.4f}, "
            f"effective draws {np.min(d.ess):.0f}: {verdict}>"
        )


# %%
toy_walk = _Walk(("x", "y"), toy, np.zeros(toy.shape[:3]), 1.0, good)
print(toy_walk)
assert toy_walk.draws().shape == (4 * 16 * (2000 - good.burn_in), 2)
with pytest.raises(NotConverged, match="the ensembles disagree"):
    _Walk(("x", "y"), toy, np.zeros(toy.shape[:3]), 1.0, apart).draws()


# %% [markdown]
# A star's walk is a `Posterior`: it also knows the model, the best fit of the inversion and its flags, and it makes the table that a reader wants.

# %%
#| export
@dataclass(repr=False)
class Posterior(_Walk):
    """Draws of a star's labels, and whether they may be believed.

    Attributes
    ----------
    label_names : tuple of str
    chain : array (E, S, W, K)
        Every step of every walker, burn-in included; physical units.
    log_prob : array (E, S, W)
    acceptance : float
        Share of accepted steps.
    diagnosis : _Diagnosis
    model : Cannon
    best : array (K,)
        The inversion's best fit, physical units.
    flags : int
        The inversion's reasons to doubt.
    """

    model: Cannon = None
    best: np.ndarray = field(default=None)
    flags: int = 0

    def summary(self, catalogue_errors: np.ndarray = None, insist: bool = False) -> QTable:
        """Median of each label and the distances to its 84 and 16 % quantiles.

        Parameters
        ----------
        catalogue_errors : array (K,), optional
            Mean errors of the catalogue, for comparison.
        insist : bool, default False
            Take the draws though the chain has not converged.

        Returns
        -------
        QTable
            One row per label: label, unit, value, plus, minus; calibrated, where the model carries
            an error model; catalogue, where its errors are given.

        Raises
        ------
        NotConverged
            If the chain may not be believed, unless `insist`.
        """
        draws = self.draws(insist)
        low, value, high = np.quantile(draws, [0.16, 0.5, 0.84], axis=0)
        units = [str(label_record(name).unit) for name in self.label_names]
        table = QTable({"label": list(self.label_names), "unit": units, "value": value})
        table["plus"] = high - value
        table["minus"] = value - low
        if hasattr(self.model, "error_inflation_"):
            covariance = np.atleast_2d(np.cov(draws.T))
            calibrated = apply_error_model(self.model, covariance[None], value[None])[0]
            table["calibrated"] = np.sqrt(np.diag(calibrated))
        if catalogue_errors is not None:
            table["catalogue"] = np.asarray(catalogue_errors, dtype=float)
        for name in table.colnames[2:]:
            table[name].info.format = ".4g"
        table.meta = {"converged": self.converged, "problems": list(self.diagnosis.problems)}
        return table


# %%
Posterior(("x", "y"), toy, np.zeros(toy.shape[:3]), 1.0, good).summary()

# %% [markdown]
# `_run_ensembles` lets emcee walk any log-density. Without a given number of steps it goes on, 1,500 at a time, until the diagnosis has nothing to say,
# and at most the 15,000 of the original lab. Each ensemble has its own random numbers, all from one seed, so the same seed gives the same chain.

# %%
#| export
_ROUND = 1500  # steps between two looks at the chain
_MOST_STEPS = 15_000


def _ensembles(log_prob, start, seed):
    "A sampler and a first state for each ensemble of walkers, start (E, W, K)."
    E, W, K = start.shape
    if W < 2 * K:
        raise LabError(
            f"{W} walkers are too few for {K} labels: an ensemble needs at least {2 * K}"
        )
    if not np.isfinite(log_prob(start.reshape(-1, K))).all():
        raise LabError("a walker begins where the density is zero: begin inside the prior")
    samplers = [emcee.EnsembleSampler(W, K, log_prob, vectorize=True) for _ in range(E)]
    seeds = np.random.SeedSequence(seed).generate_state(E)
    states = [
        emcee.State(walkers, random_state=np.random.RandomState(number).get_state())
        for walkers, number in zip(start, seeds)
    ]
    return samplers, states


def _worth_judging(chain):
    "Is the second half of a chain so calm that the whole may be long enough? Saves diagnoses."
    S = chain.shape[1]
    return S >= (_BURN_IN + _LENGTH) * _autocorrelation_time(chain[:, S // 2 :]).max()


# %%
print(
    "worth a diagnosis:",
    _worth_judging(toy),
    "and, cut to 200 steps,",
    _worth_judging(toy[:, :200]),
)


# %%
#| export
def _run_ensembles(
    log_prob: Callable,
    start: np.ndarray,
    names,
    steps: int | None = None,
    burn_in: int | None = None,
    seed: int = 42,
    progress: bool = True,
) -> Posterior:
    """Independent emcee ensembles in any density.

    Parameters
    ----------
    log_prob : callable
        Points (S, K) -> ln of the density (S,).
    start : array (E, W, K)
        Where the walkers of each ensemble begin.
    names : sequence of str
        Of the K labels.
    steps : int, optional
        Of each walker; by default as many as needed, at most 15,000.
    burn_in : int, optional
        Steps to throw away; by default judged by the autocorrelation time.
    seed : int, default 42
    progress : bool, default True

    Returns
    -------
    Posterior
        In the units of `start`.

    Raises
    ------
    LabError
        For too few walkers, or a start where the density is zero.
    """
    samplers, states = _ensembles(log_prob, start, seed)
    most = _MOST_STEPS if steps is None else steps
    total = most * len(samplers)
    done = 0
    diagnosis = None
    with tqdm(total=total, desc="walking", unit="step", disable=not progress, leave=False) as bar:
        while done < most and (steps is not None or diagnosis is None or diagnosis.problems):
            count = min(_ROUND, most - done)
            for e, sampler in enumerate(samplers):
                states[e] = sampler.run_mcmc(states[e], count, skip_initial_state_check=done > 0)
                bar.update(count)
            done += count
            chain = np.stack([sampler.get_chain() for sampler in samplers])
            if done == most or (steps is None and _worth_judging(chain)):
                diagnosis = _diagnose(chain, names, burn_in)
    log_probs = np.stack([sampler.get_log_prob() for sampler in samplers])
    acceptance = np.mean([sampler.acceptance_fraction for sampler in samplers])
    return Posterior(tuple(names), chain, log_probs, float(acceptance), diagnosis)


# %% [markdown]
# Before any star: densities that we know. A sampler that is given nothing but the prior must return the prior.

# %%
flat = UniformPrior(2)
middle = np.random.default_rng(4).uniform(-0.1, 0.1, (2, 16, 2))
only_prior = _run_ensembles(flat, middle, "xy", progress=False)
forgotten = int(2 * only_prior.diagnosis.tau.max())
thinned = only_prior.chain[:, only_prior.diagnosis.burn_in :: forgotten].reshape(-1, 2)
print(only_prior)
assert only_prior.converged
assert min(kstest(column, "uniform", (-2, 4)).pvalue for column in thinned.T) > 1e-3


# %% [markdown]
# Two narrow peaks six apart, and ensembles that begin in one of them each: every chain looks perfect alone, and together they are refused. So is a
# chain that is too short. And the same seed gives the same chain, another one another.

# %%
def two_peaks(x):
    "ln of a density with peaks at 3 and -3 in all coordinates."
    right = -0.5 * (((x - 3) / 0.3) ** 2).sum(axis=1)
    left = -0.5 * (((x + 3) / 0.3) ** 2).sum(axis=1)
    return np.logaddexp(right, left)


begin = np.random.default_rng(5).normal(0, 0.3, (2, 16, 2)) + np.array([3, -3])[:, None, None]
bimodal = _run_ensembles(two_peaks, begin, "xy", steps=2000, progress=False)
with pytest.raises(NotConverged, match="the ensembles disagree"):
    bimodal.summary()
assert bimodal.summary(insist=True).meta["converged"] is False
assert "NOT CONVERGED" in repr(bimodal)
alone = _run_ensembles(two_peaks, begin[:1], "xy", steps=2000, progress=False)
print("one ensemble alone:", alone)

# %%
brief = [
    _run_ensembles(two_peaks, begin, "xy", steps=200, seed=seed, progress=False)
    for seed in (1, 1, 2)
]
with pytest.raises(NotConverged, match="autocorrelation times, 50 are needed"):
    brief[0].draws()
assert np.array_equal(brief[0].chain, brief[1].chain)
assert not np.array_equal(brief[0].chain, brief[2].chain)


# %% [markdown]
# **What to see.** The ensemble alone finds nothing wrong with itself: a chain cannot miss what it has never seen. Therefore several ensembles, and
# therefore they should begin wherever the posterior might have a peak.
#
# ## Where to begin
# `sample` looks for those places first: the descent of [the inversion](06_inversion.ipynb) from 64 training stars. Where it ends in several valleys
# whose depths differ by less than 5 in $\ln p$, the ensembles are dealt out over them (one that lies higher holds less than a percent of the
# posterior). Two ends are two valleys where they lie five formal errors apart. The formal errors are the curvature of $\chi^2$ at the end.

# %%
#| export
def _formal_covariance(model, stats, labels):
    """Inverse of half of chi2's second derivative (Gauss's part) at best fits (N, K), scaled.

    What a spectrum does not say is as wide as the uniform prior.
    """
    J = model.vectorizer_.derivative(labels)[:, 1:]
    hessian = np.swapaxes(J, 1, 2) @ (stats.matrix() @ J)
    return np.linalg.inv(hessian + np.eye(labels.shape[1]) / UniformPrior.bound**2)


_VALLEY_STARTS = 64  # training stars from which the descent looks for valleys
_VALLEY_DEPTH = 5.0  # in ln p: how much less deep a valley may be
_VALLEY_DISTANCE = 5.0  # formal errors between two valleys


def _copies(stats, n):
    "The statistics of one star, n times."
    return stats[np.zeros(n, dtype=int)]


def _valleys(model, stats, log_prob, best):
    "Distinct minima (V, K) of one star, the deepest first, and their formal covariances."
    trials = model.scale(model.training_labels_)
    trials = trials[np.unique(np.linspace(0, len(trials) - 1, _VALLEY_STARTS).astype(int))]
    ends, _, resting = descend(model, _copies(stats, len(trials)), trials, label_box(model), 60)
    ends = np.concatenate([best, ends[resting]])
    heights = log_prob(ends)
    ends = ends[np.argsort(-heights, kind="stable")]
    ends = ends[log_prob(ends) > np.max(heights) - _VALLEY_DEPTH]
    precision = np.linalg.inv(_formal_covariance(model, _copies(stats, len(ends)), ends))
    kept = []
    for end, weight in zip(ends, precision):
        distances2 = [(end - other) @ weight @ (end - other) for other in kept]
        if all(distance2 > _VALLEY_DISTANCE**2 for distance2 in distances2):
            kept.append(end)
    kept = np.array(kept)
    return kept, _formal_covariance(model, _copies(stats, len(kept)), kept)


# %%
one_star = _LogPosterior(model.vectorizer_, stats.matrix()[0], stats.b[0], UniformPrior())
centres, covariances = _valleys(model, stats, one_star, best)
print(f"the mystery star has {len(centres)} valley")
formal = np.sqrt(np.diag(covariances[0])) * model.scales_
Table({"label": names, "formal error": [f"{value:.2g}" for value in formal]})


# %% [markdown]
# The walkers begin in a ball as small as the formal errors around their valley. The original lab's own start, 0 ± 10⁻⁴ (the mean labels), and one
# scattered over the prior are options.

# %%
#| export
def _into_prior(walkers, centre, prior):
    "Walkers outside the prior, moved towards a centre inside it."
    for _ in range(60):
        outside = ~np.isfinite(prior(walkers))
        if not outside.any():
            break
        walkers = np.where(outside[:, None], (walkers + centre) / 2, walkers)
    return walkers


def _begin(start, model, stats, log_prob, best, shape, rng):
    "Where the walkers (E, W, K) of each ensemble begin."
    E, W, K = shape
    prior = log_prob.prior
    if start == "mean":
        return rng.normal(0, 1e-4, shape)
    if start == "prior":
        return prior.draw(E * W, K, rng).reshape(shape)
    if start != "best":
        raise LabError(f"unknown start {start!r}: choose best, mean or prior")
    if not np.isfinite(prior(best)).all():
        raise LabError("the best fit lies outside the prior: take a wider prior, or start='prior'")
    centres, covariance = _valleys(model, stats, log_prob, best)
    dealt = np.arange(E) % len(centres)
    roots = np.linalg.cholesky(covariance)[dealt]
    walkers = [
        _into_prior(centre + rng.standard_normal((W, K)) @ root.T, centre, prior)
        for centre, root in zip(centres[dealt], roots)
    ]
    return np.stack(walkers)


# %%
for start in ("best", "mean", "prior"):
    shape = (4, 16, len(names))
    walkers = _begin(start, model, stats, one_star, best, shape, np.random.default_rng(0))
    widest = walkers.std(axis=(0, 1)).max()
    print(f"start {start!r}: the widest label spreads over {widest:.2g} scaled units")


# %% [markdown]
# ## A star

# %%
#| export
def _scaled_best(model, table):
    "The best fits of `infer`'s table (N, K), scaled."
    return model.scale(label_values(table, model.label_names_))


def _arrays(spectra, ivar):
    "Flux and ivar (N, P) of a `Spectra` or of arrays."
    if isinstance(spectra, Spectra):
        return spectra.flux, spectra.ivar
    flux = np.atleast_2d(np.asarray(spectra))
    return flux, None if ivar is None else np.atleast_2d(np.asarray(ivar))


def _inferred(model, spectrum, ivar):
    "`infer`'s table of one star and its best fit (1, K), scaled."
    table = infer(model, spectrum, ivar)
    if len(table) != 1:
        raise LabError(
            f"sample takes one star, not {len(table)}: "
            "cut the spectra (spectra[row]), or use sample_many"
        )
    best = _scaled_best(model, table)
    if not np.isfinite(best).all():
        raise LabError("the star has no usable pixel: nothing can be said of its labels")
    return table, best


def _star_posterior(model, stats, prior, best, chi2_best):
    "ln of one star's posterior, its likelihood -chi2/2."
    at_best = _log_likelihood(model.vectorizer_, stats.matrix(), stats.b, best[None])[0, 0]
    prior = UniformPrior() if prior is None else prior
    log_prob = _LogPosterior(model.vectorizer_, stats.matrix()[0], stats.b[0], prior)
    log_prob.offset = -0.5 * chi2_best - at_best
    return log_prob


# %%
table, best = _inferred(model, star, None)
log_prob = _star_posterior(model, stats, None, best, float(table["chi2"][0]))
prior_density = UniformPrior()(best)
print(f"-chi2/2 of the best fit {(log_prob(best) - prior_density)[0]:.2f}")
assert np.isclose((log_prob(best) - prior_density)[0], -0.5 * table["chi2"][0])


# %%
#| export
def sample(
    model: Cannon,
    spectrum,
    ivar: np.ndarray = None,
    prior: Callable | None = None,
    walkers: int = 16,
    ensembles: int = 4,
    steps: int | None = None,
    burn_in: int | None = None,
    start: str = "best",
    seed: int = 42,
    progress: bool = True,
) -> Posterior:
    """Posterior of one star's labels.

    Parameters
    ----------
    model : Cannon
    spectrum : Spectra or array (P,)
        One star, or its flux.
    ivar : array (P,), optional
        Inverse variance of a flux, 0 where unusable.
    prior : callable, optional
        Scaled labels (S, K) -> ln of their density (S,), by default `UniformPrior()`;
        start="prior" also needs its `draw`.
    walkers, ensembles : int, default 16 and 4
        Walkers of an ensemble, and ensembles that walk independently.
    steps, burn_in : int, optional
        As for `_run_ensembles`. The original lab took 15,000 and 8,000.
    start : {"best", "mean", "prior"}
        The valleys of chi2, the mean labels (as the original lab), or anywhere in the prior.
    seed : int, default 42
    progress : bool, default True

    Returns
    -------
    Posterior
        Of the labels in physical units.

    Raises
    ------
    LabError
        For more than one star, or for one without usable pixels.
    """
    table, best = _inferred(model, spectrum, ivar)
    stats = _exact_statistics(model, *_arrays(spectrum, ivar))
    log_prob = _star_posterior(model, stats, prior, best, float(table["chi2"][0]))
    shape = (ensembles, walkers, best.shape[1])
    begin = _begin(start, model, stats, log_prob, best, shape, np.random.default_rng(seed))
    posterior = _run_ensembles(log_prob, begin, model.label_names_, steps, burn_in, seed, progress)
    posterior.chain = model.unscale(posterior.chain)
    posterior.model = model
    posterior.best = model.unscale(best)[0]
    posterior.flags = int(table["flags"][0])
    return posterior


# %% [markdown]
# ## The run of the original lab
# 16 walkers from the mean labels, 15,000 steps, 8,000 of them thrown away. The quick profile takes half as many steps and throws away 1,500 of them: the walkers have arrived by then.

# %%
length = {"steps": 15_000, "burn_in": 8_000}
if profile() == "quick":
    length = {"steps": 7_500, "burn_in": 1_500}
lab_run = sample(model, star, walkers=16, ensembles=1, start="mean", progress=False, **length)
lab_run


# %% [markdown]
# Its first picture is the *trace*: each label and $\ln p$ against the step, the burn-in shaded.

# %%
#| export
def plot_trace(posterior: Posterior, ensemble: int = 0, most_points: int = 1000, axes=None):
    """Every label and ln p of one ensemble's walkers against the step, the burn-in shaded.

    Parameters
    ----------
    posterior : Posterior
    ensemble : int, default 0
        Which one to draw.
    most_points : int, default 1000
        Per walker.
    axes : sequence of K + 1 Axes, optional

    Returns
    -------
    sequence of Axes
    """
    names = posterior.label_names
    if axes is None:
        size = (9, 1.1 * (len(names) + 1))
        axes = plt.subplots(len(names) + 1, 1, figsize=size, sharex=True)[1]
    steps = posterior.chain.shape[1]
    thin = slice(None, None, max(1, steps // most_points))
    x = np.arange(1, steps + 1)[thin]
    log_prob = posterior.log_prob[ensemble]
    rows = [*np.moveaxis(posterior.chain[ensemble], 2, 0), log_prob - log_prob.max()]
    for ax, values in zip(axes, rows):
        ax.plot(x, values[thin], color="C0", lw=0.3, alpha=0.5)
        ax.axvspan(0, posterior.diagnosis.burn_in, color="0.9", zorder=0)
    for ax, name in zip(axes, names):
        ax.set_ylabel(label_record(name).axis)
    axes[-1].set(ylabel=r"$\ln p - \max$", xlabel="step", yscale="symlog", xlim=(0, steps))
    axes[-1].set_yticks([0, -10, -1000])
    return axes


# %%
plot_trace(lab_run);

# %%
#| echo: false
judged_run = _diagnose(lab_run.chain, names)
Markdown(
    "**What to see.** The walkers set out at the mean, fall into the valley and then fill it. "
    f"Shaded are the {length['burn_in']:,} steps thrown away; judged by the autocorrelation time "
    f"of {judged_run.tau.max():.0f} steps, {judged_run.burn_in} would do. What is left is worth "
    f"{lab_run.diagnosis.ess.min():.0f} independent draws."
)

# %% [markdown]
# ## Our run
# Four ensembles from the best fit, as long as it takes; two in the quick profile.

# %%
quick = profile() == "quick"
posterior = sample(model, star, ensembles=2 if quick else 4, progress=False)
posterior

# %% [markdown]
# The second picture is the *corner plot*: each label's distribution with its 16 and 84 %, and each pair against one another. The lines of a pair enclose 39 and 86 % of the draws, as
# one and two standard deviations do in two dimensions.

# %%
#| export
_CORNER = {
    "quantiles": [0.16, 0.84],
    "bins": 30,
    "color": "#0173b2",
    "truth_color": "#d55e00",
    "labelpad": 0.2,
    "max_n_ticks": 3,
    "plot_datapoints": False,
    "levels": (0.393, 0.865),  # one and two standard deviations of a Gaussian in two dimensions
}


def plot_posterior(
    posterior: Posterior,
    truth: np.ndarray = None,
    insist: bool = False,
    most_points: int = 20_000,
    **style,
):
    """Corner plot of the draws with the 16 and 84 % quantiles.

    Parameters
    ----------
    posterior : Posterior
    truth : array (K,), optional
        Marked by lines.
    insist : bool, default False
        Draw a chain that has not converged.
    most_points : int, default 20,000
    **style
        For `corner.corner`.

    Returns
    -------
    Figure

    Raises
    ------
    NotConverged
        If the chain may not be believed, unless `insist`.
    """
    draws = posterior.draws(insist)
    draws = draws[:: max(1, len(draws) // most_points)]
    K = draws.shape[1]
    fig = plt.figure(figsize=(1.6 * K, 1.6 * K), layout="none")  # corner spaces its panels itself
    axes = [label_record(name).axis for name in posterior.label_names]
    corner.corner(draws, fig=fig, labels=axes, truths=truth, **(_CORNER | style))
    return fig


# %%
plot_posterior(posterior);

# %% [markdown]
# The table of the original lab, with its last column: the mean error that the catalogue states for the training stars.

# %%
stated = np.nanmean(spectra[train].label_errors(names), axis=0)
posterior.summary(stated)

# %%
#| echo: false
summary = posterior.summary(stated)
half_width = (np.asarray(summary["plus"]) + np.asarray(summary["minus"])) / 2
ratio = np.asarray(summary["catalogue"]) / half_width
corr = np.corrcoef(posterior.draws().T)
i, j = np.unravel_index(np.argmax(np.abs(corr - np.eye(len(corr)))), corr.shape)
Markdown(
    "**What to see.** The posterior is nearly a Gaussian, and labels hang together, most of all "
    f"{LABELS[names[i]].symbol} and {LABELS[names[j]].symbol} with a correlation of "
    f"{corr[i, j]:+.2f}. Its errors are {ratio.min():.0f} to {ratio.max():.0f} times smaller than "
    "the catalogue's, for what the model lacks counts as independent from pixel to pixel. The "
    "original lab noted that, too. We come back to it below."
)

# %% [markdown]
# Both runs, and the inversion with its covariance, must tell the same star. So must a run with another prior, the density of the training stars, that starts anywhere in it.

# %%
to_physical = np.diag(model.scales_)
covariance = to_physical @ _formal_covariance(model, stats, best)[0] @ to_physical
formal = np.sqrt(np.diag(covariance))
middle = posterior.draws().mean(axis=0)
assert posterior.converged and lab_run.converged
# 1,000 effective draws: 0.03 each
assert np.all(np.abs(lab_run.draws().mean(axis=0) - middle) < 0.15 * formal)
assert np.all(np.abs(middle - posterior.best) < 0.3 * formal)
assert np.allclose(posterior.draws().std(axis=0), formal, rtol=0.25)

# %%
wide = {"prior": population, "start": "prior", "ensembles": 1 if quick else 2}
scattered = sample(model, star, **wide, progress=False)
print(scattered)
assert scattered.converged
assert np.all(np.abs(scattered.draws().mean(axis=0) - middle) < 0.3 * formal)


# %% [markdown]
# ## A posterior known exactly
# If the spectrum is *linear* in the labels, the posterior is a Gaussian with a mean and a covariance that a student can write down:
# $C = (\Theta^\mathsf T W\Theta)^{-1}$, mean $C\,\Theta^\mathsf T W(f-\boldsymbol\theta_0)$. So a made-up linear model is the strictest test there is.

# %%
def made_up(order, label_names, n_pixels=300, n_stars=400, seed=6):
    "A Cannon trained on noiseless stars of a random polynomial."
    rng = np.random.default_rng(seed)
    vectorizer = Vectorizer.of_order(label_names, order)
    size = np.where(vectorizer.exponents.sum(axis=1) > 1, 0.01, 0.03)
    theta = rng.normal(size=(n_pixels, len(vectorizer))) * size
    theta += np.eye(len(vectorizer))[0]  # the mean spectrum is about one
    labels = rng.normal(size=(n_stars, len(label_names)))
    return Cannon(order=order).fit(labels, vectorizer(labels) @ theta.T, label_names=label_names)


def observed(model, labels, noise, rng):
    "Spectra of a model at physical labels (N, K) with Gaussian noise: flux and ivar."
    flux = model.predict(labels)
    return flux + noise * rng.standard_normal(flux.shape), np.full(flux.shape, noise**-2)


# %%
linear = made_up(1, ["a", "b", "c"])
flux, ivar = observed(linear, np.array([[0.3, -0.5, 1.0]]), 0.3, np.random.default_rng(7))
slopes = linear.theta_[:, 1:]
exact_covariance = np.linalg.inv(slopes.T * ivar[0] @ slopes)
exact_mean = exact_covariance @ slopes.T @ (ivar[0] * (flux[0] - linear.theta_[:, 0]))
walk = sample(linear, flux[0], ivar[0], ensembles=2, progress=False)
walked = linear.scale(walk.draws())

# %% [markdown]
# The mean must be right to what the effective sample size promises, which judges the size too; the covariance to a few percent.

# %%
off = (walked.mean(axis=0) - exact_mean) / np.sqrt(np.diag(exact_covariance) / walk.diagnosis.ess)
whitened = np.linalg.solve(np.linalg.cholesky(exact_covariance), (walked - exact_mean).T)
wrong = np.abs(np.cov(whitened) - np.eye(3)).max()
print(walk)
print(f"mean off by {np.abs(off).max():.1f} of its own error; covariance / exact - 1: {wrong:.3f}")
assert np.all(np.abs(off) < 4)
assert np.allclose(np.cov(whitened), np.eye(3), atol=0.12)

# %% [markdown]
# ## Two valleys
# A star whose label enters only squared cannot tell plus from minus. `sample` finds both valleys, ensembles stay each in its own, and the table is
# refused: a median between two valleys would name a star that fits nowhere.

# %%
rng = np.random.default_rng(8)
labels = rng.normal(size=(200, 2))
slopes = rng.normal(size=(300, 2)) * 0.03
spectra_of_both = 1 + np.column_stack([labels[:, 0] ** 2, labels[:, 1]]) @ slopes.T
even = Cannon(terms=["a^2", "b"], pivots=[0, 0], scales=[1, 1])
even = even.fit(labels, spectra_of_both, label_names=["a", "b"])
flux, ivar = observed(even, np.array([[1.0, 0.5]]), 0.02, rng)
mirrored = sample(even, flux[0], ivar[0], ensembles=2, steps=1000, progress=False)
print(mirrored)
assert set(np.sign(mirrored.chain[:, -1, :, 0].mean(axis=1))) == {-1, 1}
with pytest.raises(NotConverged, match="a: the ensembles disagree"):
    mirrored.summary()

# %% [markdown]
# ## Many stars at once
# A walk takes seconds for each star. For thousands of stars there is a shorter way, because their posteriors are nearly Gaussian: draw from a
# Gaussian's broader cousin at the best fit, a Student $t$ with 8 degrees of freedom and the formal covariance, and *weight* each draw by what the
# posterior has there and the proposal has not,
# $$ w_s \propto \frac{p(\boldsymbol\ell_s\mid f)}{q(\boldsymbol\ell_s)} . $$
# This *importance sampling* is exact for any posterior, has no burn-in and no autocorrelation, and is one vectorized call for a block of stars.
#
# All stars use the same draws, spread evenly by a scrambled Sobol sequence instead of by chance. That makes quantiles ten times more exact, and a
# star's answer does not depend on its company.

# %%
#| export
_DEGREES = 8  # of freedom of the proposal


def _proposal(K, draws, seed):
    "Standard Student t draws (draws, K), evenly spread, and ln of their density up to a constant."
    if draws < 64 or draws & (draws - 1):
        raise LabError(f"{draws} draws: take a power of two from 64, which spreads evenly")
    points = qmc.Sobol(K + 1, seed=seed).random_base2(draws.bit_length() - 1)
    points = np.clip(points, 1e-10, 1 - 1e-10)
    gauss = norm.ppf(points[:, :K])
    stretch = np.sqrt(chi2.ppf(points[:, K:], _DEGREES) / _DEGREES)
    t = gauss / stretch
    return t, -0.5 * (_DEGREES + K) * np.log1p((t**2).sum(axis=1) / _DEGREES)


# %%
x, log_q = _proposal(2, 2048, 1)
print(f"variance of the proposal {x.var():.3f}, of a Student t {_DEGREES / (_DEGREES - 2):.3f}")

# %% [markdown]
# The weights come in logarithms, and the largest of each star is set to zero.

# %%
#| exporti
_DRAW_BLOCK = 8  # stars at a time


def _log_weights(model, stats, best, prior, draws, seed):
    "Draws (N, S, K) around each star's best fit, scaled, and ln of their raw weights (N, S)."
    t, log_proposal = _proposal(best.shape[1], draws, seed)
    roots = np.linalg.cholesky(_formal_covariance(model, stats, best))

    def work(rows):
        labels = best[rows, None] + t @ np.swapaxes(roots[rows], 1, 2)
        block = stats[rows]
        likelihood = _log_likelihood(model.vectorizer_, block.matrix(), block.b, labels)
        return labels, likelihood + prior(labels) - log_proposal

    blocks = in_blocks(work, len(best), _DRAW_BLOCK)
    return tuple(np.concatenate(parts) for parts in zip(*blocks))


def weighted_draws(
    model: Cannon,
    spectra,
    ivar: np.ndarray = None,
    prior: Callable | None = None,
    draws: int = 2048,
    seed: int = 42,
) -> tuple:
    """Draws around each star's best fit, weighted so that they represent its posterior.

    Parameters
    ----------
    model : Cannon
    spectra : Spectra or array (N, P)
        Stars, or their flux.
    ivar : array (N, P), optional
        Inverse variance of a flux, 0 where unusable.
    prior : callable, optional
        By default `UniformPrior()`.
    draws : int, default 2048
        A power of two.
    seed : int, default 42

    Returns
    -------
    tuple
        `infer`'s table; labels (N, S, K) in physical units; their weights (N, S) with sum 1; ln of
        the raw weights (N, S). Weights are NaN for a star without usable pixels.
    """
    prior = UniformPrior() if prior is None else prior
    table = infer(model, spectra, ivar)
    best = _scaled_best(model, table)
    known = np.isfinite(best).all(axis=1)
    best = np.where(known[:, None], best, 0)
    stats = _exact_statistics(model, *_arrays(spectra, ivar))
    labels, log_weights = _log_weights(model, stats, best, prior, draws, seed)
    top = log_weights.max(axis=1, keepdims=True)
    finite = np.isfinite(top)
    log_weights = log_weights - np.where(finite, top, 0)
    log_weights = np.where(known[:, None] & finite, log_weights, np.nan)
    weights = np.exp(log_weights)
    return table, model.unscale(labels), weights / weights.sum(axis=1, keepdims=True), log_weights


# %%
_, draws, weights, _ = weighted_draws(model, star)
print(f"weighted mean of {names[0]}: {weights[0] @ draws[0, :, 0]:.1f}, emcee's {middle[0]:.1f}")
assert np.all(np.abs(weights[0] @ draws[0] - middle) < 0.15 * formal)

# %% [markdown]
# Importance sampling fails where the posterior has something that the proposal misses, and says so: the effective sample size $1/\sum w^2$ falls, and
# the tail of the weights gets fat, which the Pareto shape $\hat k$ of [Vehtari et al. 2024](https://jmlr.org/papers/v25/19-556.html) measures (above
# 0.7 nobody should trust it). It looks only around the best fit; other valleys are `sample`'s business.

# %%
#| export
_PARETO_LIMIT = 0.7  # largest trustworthy shape of the weights' tail


def _weighted_quantiles(values, weights, quantiles):
    "Quantiles (Q, N, K) of weighted draws (N, S, K), their weights (N, S) with sum 1."
    order = np.argsort(values, axis=1)
    ordered = np.take_along_axis(values, order, axis=1)
    spread = np.broadcast_to(weights[:, :, None], values.shape)
    below = np.cumsum(np.take_along_axis(spread, order, axis=1), axis=1)
    last = values.shape[1] - 1
    places = [np.minimum((below < q).sum(axis=1, keepdims=True), last) for q in quantiles]
    return np.array([np.take_along_axis(ordered, place, axis=1)[:, 0] for place in places])


def _pareto_shape(log_weights):
    "Shape (N,) of the upper tail of raw weights, given as ln (N, S); inf where there are none."
    shape = np.full(len(log_weights), np.inf)
    known = ~np.isnan(log_weights).any(axis=1)
    if known.any():
        # psislw was made for leaving one out: it takes minus the log weights, and no infinities
        shape[known] = array_stats.psislw(-np.maximum(log_weights[known], -1e6))[1]
    return shape


# %% [markdown]
# A proposal that misses is found out: weights for a Gaussian as wide as the proposal have no tail, those for one three times wider have one, and
# $\hat k$ sees it.

# %%
sizes = (1.0, 0.3)
gaussians = np.array([-0.5 * ((size * x) ** 2).sum(axis=1) for size in sizes])
wide, narrow = _pareto_shape(gaussians - log_q)
print(f"Pareto k of a Gaussian as wide as the proposal {wide:.2f}")
print(f"Pareto k of one three times wider {narrow:.2f}")
assert wide < 0.5 and narrow > _PARETO_LIMIT

# %%
halves = _weighted_quantiles(np.array([[[1.0], [2.0], [9.0]]]), np.array([[0.3, 0.3, 0.4]]), [0.5])
assert halves[0, 0, 0] == 2

# %% [markdown]
# `sample_many` goes through the stars in blocks, because their draws fill the memory, and makes one table.

# %%
#| export
_STARS_AT_ONCE = 128  # whose draws are in memory


def _summarized(model, spectra, ivar, prior, draws, seed, insist):
    "The table of `sample_many` for a block of stars."
    inferred, labels, weights, log_weights = weighted_draws(
        model, spectra, ivar, prior, draws, seed
    )
    low, middle, high = _weighted_quantiles(labels, weights, [0.16, 0.5, 0.84])
    ess = 1 / np.sum(weights**2, axis=1)
    pareto = _pareto_shape(log_weights)
    converged = (ess >= _ESS_LIMIT) & (pareto <= _PARETO_LIMIT)
    table = QTable()
    for k, name in enumerate(model.label_names_):
        for suffix, column in (("", middle), ("_plus", high - middle), ("_minus", middle - low)):
            shown = np.where(converged | insist, column[:, k], np.nan)
            table[name.lower() + suffix] = shown * label_record(name).unit
    table["ess"] = ess
    table["pareto_k"] = pareto
    table["converged"] = converged
    table["flags"] = np.asarray(inferred["flags"])
    return table


# %%
_summarized(model, star.flux, star.ivar, None, 2048, 42, False)[names[0].lower(), "ess", "pareto_k"]


# %%
#| export
def sample_many(
    model: Cannon,
    spectra,
    ivar: np.ndarray = None,
    prior: Callable | None = None,
    draws: int = 2048,
    seed: int = 42,
    insist: bool = False,
    progress: bool = True,
) -> QTable:
    """Medians and 16 and 84 % quantiles of many stars' posteriors.

    Parameters
    ----------
    model, spectra, ivar, prior, draws, seed
        As for `weighted_draws`.
    insist : bool, default False
        Values also where the weights may not be trusted.
    progress : bool, default True

    Returns
    -------
    QTable
        One row per star: label, label_plus, label_minus (with units); ess, pareto_k, converged;
        flags of the inversion. NaN where the weights may not be trusted, unless `insist`.

    Raises
    ------
    LabError
        Where there are no spectra.
    """
    if not isinstance(spectra, Spectra):
        spectra, ivar = _arrays(spectra, ivar)
    if len(spectra) == 0:
        raise LabError("there are no spectra to sample")
    blocks = []
    starts = range(0, len(spectra), _STARS_AT_ONCE)
    for begin in tqdm(starts, desc="sampling", unit="block", disable=not progress, leave=False):
        rows = slice(begin, begin + _STARS_AT_ONCE)
        block_ivar = None if ivar is None else ivar[rows]
        blocks.append(_summarized(model, spectra[rows], block_ivar, prior, draws, seed, insist))
    many = vstack(blocks, metadata_conflicts="silent")
    if isinstance(spectra, Spectra) and "APOGEE_ID" in spectra.stars.colnames:
        identifiers = [str(name) for name in spectra.stars["APOGEE_ID"]]
        many.add_column(identifiers, index=0, name="apogee_id")
    return many


# %% [markdown]
# ### Against the exact answer, and against emcee
# The linear model first: quantiles of a Gaussian are known. Then the mystery star under both priors: two algorithms that have nothing in common but the
# likelihood.

# %%
many_labels = np.random.default_rng(9).normal(size=(50, 3))
flux, ivar = observed(linear, many_labels, 0.3, np.random.default_rng(10))
many = sample_many(linear, flux, ivar, progress=False)
exact_covariance = np.linalg.inv(linear.theta_[:, 1:].T * ivar[0] @ linear.theta_[:, 1:])
exact_mean = (flux - linear.theta_[:, 0]) * ivar @ linear.theta_[:, 1:] @ exact_covariance
exact_values = linear.unscale(exact_mean)
sigma = np.sqrt(np.diag(exact_covariance)) * linear.scales_
for k, name in enumerate("abc"):
    assert np.allclose(many[name].value, exact_values[:, k], atol=0.02 * sigma[k], rtol=0)
    for side in ("plus", "minus"):
        assert np.allclose(many[f"{name}_{side}"].value / sigma[k], norm.ppf(0.84), atol=0.02)
assert np.all(many["converged"]) and np.all(many["ess"] > 0.7 * 2048)
assert np.all(many["pareto_k"] < 0.5)

# %%
rows = []
for title, prior, walk in (
    ("uniform", UniformPrior(), posterior),
    ("training set", population, scattered),
):
    many = sample_many(model, star, prior=prior, progress=False)
    by_emcee = walk.summary()
    sigma = (np.asarray(by_emcee["plus"]) + np.asarray(by_emcee["minus"])) / 2
    off = [
        [many[name.lower() + suffix][0].value for name in names] - np.asarray(by_emcee[column])
        for suffix, column in (("", "value"), ("_plus", "plus"), ("_minus", "minus"))
    ]
    largest = np.abs(off / sigma).max()
    rows.append((title, f"{largest:.3f}", f"{many['ess'][0]:.0f} of 2048"))
    assert largest < 0.15
Table(rows=rows, names=["prior", "largest difference from emcee [sigma]", "effective draws"])


# %% [markdown]
# ## Does the truth lie inside?
# Now the test that the whole chapter is for. Stars are drawn *from the model itself*: labels from the prior, the spectrum at these labels, noise of
# variance $\sigma_p^2+s_p^2$ with the errors and gaps of a real test star. Their 68 % intervals, from 16 to 84 %, must hold the true labels for 68 % of
# the stars, for every label: three binomial standard deviations are allowed.

# %%
def model_stars(model, errors, labels, rng):
    "Noisy spectra of the model at physical labels (N, K), for stated errors (ivar of N stars)."
    usable = (errors > 0) & model.usable_
    scatter = np.where(model.usable_, model.scatter_, 0)
    sigma = np.sqrt(1 / np.where(usable, errors, 1) + scatter**2)
    flux = np.nan_to_num(model.predict(labels)) + sigma * rng.standard_normal(sigma.shape)
    return flux.astype(np.float32), np.where(usable, errors, 0)


def below_truth(model, flux, ivar, truth, prior):
    "Share (N, K) of each star's posterior below the true labels."
    shares = []
    for rows in np.array_split(np.arange(len(flux)), math.ceil(len(flux) / _STARS_AT_ONCE)):
        _, draws, weights, _ = weighted_draws(model, flux[rows], ivar[rows], prior, draws=1024)
        shares.append(np.einsum("ns,nsk->nk", weights, draws < truth[rows, None]))
    return np.concatenate(shares)


# %%
N = {"quick": 300, "full": 2000}[profile()]
rng = np.random.default_rng(11)
truth = model.unscale(population.draw(N, len(names), rng))
flux, ivar = model_stars(model, spectra.ivar[rng.choice(test, N)], truth, rng)
shares = {
    "uniform": below_truth(model, flux, ivar, truth, None),
    "training set": below_truth(model, flux, ivar, truth, population),
}
inside = {
    prior: np.mean((share > 0.16) & (share < 0.84), axis=0) for prior, share in shares.items()
}
columns = {name: [f"{share[k]:.1%}" for share in inside.values()] for k, name in enumerate(names)}
Table({"prior": list(inside)} | columns)

# %%
allowed = 3 * np.sqrt(0.68 * 0.32 / N)
print(f"{N} stars: 68 % +- {allowed:.1%} are allowed")
for share in inside.values():
    assert np.all(np.abs(share - 0.68) < allowed)

# %% [markdown]
# 68 % is one number of a whole curve. If the posterior is right at every level, the share of it below the true label is spread evenly between 0 and 1;
# then its distribution, minus the diagonal, is a noise around zero, inside the band that 99.7 % of such curves keep at each place.

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 2.8), sharey=True)
level = np.linspace(0, 1, 201)
low, high = (binom.ppf(q, N, level) / N - level for q in (0.0015, 0.9985))
for ax, (prior, share) in zip(axes, shares.items()):
    ax.fill_between(level, low, high, color="0.88", step="mid")
    for k, name in enumerate(names):
        found = np.mean(share[:, k, None] <= level, axis=0)
        ax.plot(level, found - level, label=LABELS[name].symbol)
    ax.set(xlabel="level $q$", title=f"prior: {prior}")
axes[0].set_ylabel("stars with truth below\nthe $q$ quantile, minus $q$")
axes[1].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5));

# %% [markdown]
# **What to see.** Curves inside the band, for every label and both priors: statistics, sampler and intervals are right *if the model is*. Make the
# errors too small on purpose, and the test must notice:

# %%
proud = below_truth(model, flux[:150], 4 * ivar[:150], truth[:150], None)
share = np.mean((proud > 0.16) & (proud < 0.84), axis=0)
print("flux errors stated half as large:", *(f"{value:.0%}" for value in share))
assert np.all(share < 0.63)

# %% [markdown]
# ## When the prior matters
# With thousands of good pixels the two priors agree. Leave the mystery star one pixel in a hundred and make its noise four times larger, and they part.

# %%
hundredth = np.where(np.arange(star.flux.shape[1]) % 100 == 0, star.ivar / 16, 0)
noise = np.sqrt(np.where(star.ivar > 0, 15 / np.where(star.ivar > 0, star.ivar, 1), 0))
faint = star.flux + noise * np.random.default_rng(12).standard_normal(star.flux.shape)
fig, ax = plt.subplots(figsize=(6.5, 3.4))
widths = {}
effective = {}
for name, prior in {"uniform": UniformPrior(), "training set": population}.items():
    _, draws, weights, _ = weighted_draws(model, faint, hundredth, prior, draws=2**15)
    shown = rng.choice(2**15, 1000, p=weights[0])
    widths[name] = np.sqrt(np.diag(np.cov(draws[0].T, aweights=weights[0])))
    effective[name] = 1 / np.sum(weights**2)
    ax.plot(*draws[0, shown, :2].T, ".", ms=2, alpha=0.5, label=f"prior: {name}")
ax.plot(*posterior.best[:2], "k*", ms=10, label="all pixels")
ax.set(xlabel=LABELS[names[0]].axis, ylabel=LABELS[names[1]].axis)
ax.set_title(f"{np.count_nonzero(hundredth)} noisy pixels of the mystery star")
ax.invert_xaxis()
ax.invert_yaxis()
ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5));

# %%
columns = {name: [f"{width[k]:.2g}" for width in widths.values()] for k, name in enumerate(names)}
counts = [f"{value:.0f} of {2**15}" for value in effective.values()]
Table({"width of the posterior": list(widths)} | columns | {"effective draws": counts})

# %% [markdown]
# **What to see.** So few pixels leave a long band, from cool giants of low gravity to warmer ones of higher. The training set's prior narrows it.
# Neither prior is the truth: the first knows too little, the second only the stars of this archive. Few draws are effective, so the proposal fits
# badly: such a star is for `sample`.

# %% [markdown]
# ## The seal is broken
# So the posterior is right, if the model is. Is it? The archive keeps the mystery star's name in its truth table. We open it, and compare with what the
# catalogue says of this star. Two errors are at hand: that of the posterior, and the *calibrated* one of [the chapter on judging](07_judging.ipynb),
# learned from stars that took no part in training.

# %%
test_table = infer(model, spectra[test])
calibrated_model = with_error_model(model, test_table, spectra[test].labels(names))
posterior.model = calibrated_model
summary = posterior.summary(stated)
summary


# %%
def verdict(summary, truth):
    "Each label compared with the truth (a dict), in formal and in calibrated errors."
    rows = summary[[label in truth for label in summary["label"]]]
    value = np.asarray(rows["value"])
    sealed = np.array([truth[label] for label in rows["label"]])
    formal = (np.asarray(rows["plus"]) + np.asarray(rows["minus"])) / 2
    table = Table({"label": rows["label"], "posterior": value, "sealed": sealed})
    table["difference"] = value - sealed
    table["in formal errors"] = table["difference"] / formal
    table["in calibrated errors"] = table["difference"] / np.asarray(rows["calibrated"])
    for name in table.colnames[1:]:
        table[name].info.format = "+.1f" if name.startswith("in ") else ".4g"
    return table


# %%
opened = read_truth(root, ["mystery"]) if has_mystery else None
if opened is not None:
    row = opened[0]
    print("the mystery star is", row["SOURCE_ID"])
    answer = verdict(summary, {name: float(row[name]) for name in names})
answer if opened is not None else "this archive has no sealed mystery star"

# %% [markdown]
# **What to see.** By the posterior's own word, differences of many formal errors should happen to no star in the Galaxy. In calibrated errors they
# happen every day.
#
# Where the archive is that of the real clusters, the star belongs to one of them, and the literature knows its [Fe/H] without our catalogue:

# %%
cluster_answer = None
if opened is not None and record.name == "clusters":
    home = clusters()[clusters()["LOCATION_ID"] == row["LOCATION_ID"]][0]
    cluster_answer = verdict(summary, {"M_H": home["FE_H"].to_value(u.dex)})
    cluster_answer["label"] = [f"[Fe/H] of {home['CLUSTER']}"]
cluster_answer if cluster_answer is not None else "this archive has no clusters"

# %%
if opened is not None:
    assert np.abs(answer["in calibrated errors"]).max() < 3.5
    assert np.asarray(summary["calibrated"]).min() > 0


# %% [markdown]
# ## Why the formal errors are ten times too small
# Not because single pixels are treated badly: $\chi^2$ per pixel is about one, scatter included. It is the *adding up*. The likelihood takes what the
# model gets wrong for fresh noise in every pixel, and independent errors of $n$ pixels average down as $1/\sqrt n$. But a model that lacks an element
# is wrong in all lines of that element at once, a continuum that lies high lies high for hundreds of pixels, and errors of the training labels are in
# every coefficient. Shared errors do not average at all.
#
# That can be seen without any catalogue: the three chips are three spectra of the same star. If their posteriors were right, the labels from each alone
# would agree within their errors. (What is wrong in all three alike, such as the training labels, this test does not see.)

# %%
def one_chip(stars, chip):
    "Labels (N, K) and formal errors (N, K) from a single chip."
    ivar = np.zeros_like(stars.ivar)
    ivar[:, chip] = stars.ivar[:, chip]
    table = infer(model, stars.flux, ivar)
    values = np.column_stack([table[name.lower()].value for name in names])
    return values, np.column_stack([table[f"{name.lower()}_err"].value for name in names])


def disagreement(stars):
    "rms difference between chips, in the errors that they state: (K,)."
    chips = [one_chip(stars, chip) for chip in chip_slices(stars.wavelength).values()]
    pulls = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        difference = chips[i][0] - chips[j][0]
        pulls.append(difference / np.hypot(chips[i][1], chips[j][1]))
    median_square = np.median(np.square(pulls), axis=1)
    return np.sqrt(np.mean(median_square / 0.455, axis=0))  # 0.455: that of a unit Gaussian


# %%
real = disagreement(spectra[test])
rng = np.random.default_rng(13)
flux, ivar = model_stars(model, spectra[test].ivar, spectra[test].labels(names), rng)
drawn = disagreement(spectra[test].replace(flux=flux, ivar=ivar.astype(np.float32)))
columns = {name: [f"{real[k]:.1f}", f"{drawn[k]:.1f}"] for k, name in enumerate(names)}
Table({"stars": ["real", "drawn from the model"]} | columns)

# %%
half_width = (np.asarray(summary["plus"]) + np.asarray(summary["minus"])) / 2
inflation = np.median(np.asarray(summary["calibrated"]) / half_width)
n_good = np.count_nonzero(star.ivar[0] > 0)
per_pixel = np.median(test_table["chi2"] / test_table["n_good"])
print(f"median chi2 per pixel of the test stars: {per_pixel:.2f}")
print(f"calibrated / formal error of the mystery star, median: {inflation:.0f}")
print(f"good pixels: {n_good}; as many independent ones would do: {n_good / inflation**2:.0f}")

# %% [markdown]
# **What to see.** For stars drawn from the model the chips differ by one stated error, as they should. Real stars disagree with themselves several times
# more, though $\chi^2$ per pixel is fine. That is the error which changes from chip to chip; the calibrated errors also hold what all chips share.
#
# The sampler adds nothing to this and takes nothing away: a posterior is a statement *within* a model, and the error of the model has to come from
# stars that were left out.

# %%
assert np.all(np.abs(drawn - 1) < 0.35) and np.median(real) > 1.5

# %% [markdown]
# ## The mystery star of the original lab
# Where `STELLAR_LAB_REAL_DATA` names the folder of raw survey files, the star that the original lab set: one visit, no name.

# %%
puzzle = None
if real_data():
    puzzle = normalize(read_files([real_data() / MYSTERY_FILE], progress=False)[0])
    walk = sample(calibrated_model, puzzle, progress=False)
    fit = model.predict(walk.summary()["value"])[0]
    plot_fit(
        model,
        puzzle,
        0,
        window=(15990, 16210),
        name="the original lab's mystery star",
    )
walk.summary(stated) if real_data() else "skipped: STELLAR_LAB_REAL_DATA is not set"

# %%
doubts = None
if puzzle is not None:
    table = infer(model, puzzle)
    facts = {
        "flags": str(flag_names(walk.flags)[0] or "none"),
        "chi2 per pixel": f"{float(table['chi2'][0] / table['n_good'][0]):.1f}",
        "chi2 per pixel, training stars": f"{np.median(model.training_chi2_):.1f}",
    }
    doubts = Table({"question": list(facts), "answer": list(facts.values())})
doubts if doubts is not None else "skipped: STELLAR_LAB_REAL_DATA is not set"

# %% [markdown]
# **What the model may say.** Without flags the star is a giant like those that the model learned from, and its temperature, gravity and metallicity may
# be believed within the calibrated errors, on the scale of the catalogue behind the model. With a flag they are an extrapolation. Where $\chi^2$ per
# pixel is above that of the training stars (this file comes from another reduction, with smaller stated errors), the calibrated errors are a lower
# limit, and the formal ones say nothing.

# %% [markdown]
# ## What goes wrong, said clearly

# %%
too_many = r"sample takes one star, not 2: cut the spectra \(spectra\[row\]\), or use sample_many"
with pytest.raises(LabError, match=too_many):
    sample(model, spectra[:2], progress=False)
with pytest.raises(LabError, match="no usable pixel"):
    sample(model, star.flux[0], 0 * star.ivar[0], progress=False)
with pytest.raises(LabError, match="8 walkers are too few for .* labels"):
    sample(model, star, walkers=8, progress=False)
with pytest.raises(LabError, match="unknown start 'anywhere': choose best, mean or prior"):
    sample(model, star, start="anywhere", progress=False)
with pytest.raises(LabError, match="the best fit lies outside the prior"):
    sample(model, star, prior=UniformPrior(0.01), progress=False)
with pytest.raises(LabError, match="1000 draws: take a power of two"):
    sample_many(model, star, draws=1000, progress=False)

# %% [markdown]
# Among many stars, a blind one has no values, and its neighbours' stay what they are alone. The arrays that go in come out as they were.

# %%
two = spectra[test[:2]]
flux = two.flux.copy()
ivar = two.ivar.copy()
ivar[0] = 0
given = (flux.copy(), ivar.copy())
blind = sample_many(model, flux, ivar, progress=False)
alone = sample_many(model, two[1], progress=False)
assert np.isnan(blind["teff"][0]) and not blind["converged"][0]
assert np.isclose(blind["teff"][1], alone["teff"][0], rtol=1e-6) and blind["converged"][1]
assert np.array_equal(flux, given[0]) and np.array_equal(ivar, given[1])

# %% [markdown]
# **Exercise.** Give the likelihood what it lacks: one more parameter $a$ that multiplies all variances, with the term $-\tfrac n2\ln a$ that keeps it
# from running away. Sample the mystery star with it. Does $a$ come out as one hundred, as the calibrated errors would ask for? Why not, and what kind
# of covariance between pixels would be needed?
