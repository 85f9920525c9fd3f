# %% [markdown]
# # Which star is it?
# > The Cannon turned round: the labels whose model spectrum fits best, for all stars at once, with their formal errors.
#
# **Question.** We can say what a star of given labels looks like. Here is a star; what are its labels, and how sure are we?
#
# **Idea.** The best labels minimize
# $$ \chi^2(\boldsymbol\ell) = \sum_p w_p\,\bigl(f_p - \boldsymbol\theta_p\cdot\mathbf v(\boldsymbol\ell)\bigr)^2 ,\qquad w_p = \frac{1}{\sigma_p^2 + s_p^2}. $$
# An optimizer that evaluates this sum touches 7,214 pixels at each step. But the pixels enter only through two sums: with the spectrum at the mean labels
# subtracted, and $\mathbf v$ without its constant,
# $$ \chi^2 = \mathrm{const} - 2\,\mathbf b\cdot\mathbf v + \mathbf v^\mathsf T A\,\mathbf v,\qquad
# A = \sum_p w_p\,\boldsymbol\theta_p\boldsymbol\theta_p^\mathsf T,\qquad \mathbf b = \sum_p w_p f_p\boldsymbol\theta_p . $$
# $A$ and $\mathbf b$ are *sufficient statistics*: one matrix product gives them for all stars, and after that no step of the search sees a pixel again. What remains for
# each star is a smooth function of a few labels, with known derivatives.
#
# You learn how to invert a generative model in a tenth of a millisecond per star. How far its formal errors can be believed is a question of [judging](07_judging.ipynb).
# The method is that of [Ness et al. 2015](https://doi.org/10.1088/0004-637X/808/1/16).

# %%
#| default_exp inversion

# %%
#| export
from dataclasses import dataclass

import numpy as np

from stellar_lab.cannon import Cannon, pair_index, whole_matrices
from stellar_lab.models import Answer, answer, finite_flux, in_blocks, infer, label_box
from stellar_lab.survey import LabError

# %%
#| hide
import matplotlib.pyplot as plt
import pytest
from IPython.display import Markdown
from scipy.optimize import minimize

from stellar_lab.models import Flag, flag_names, label_values, train_test_rows
from stellar_lab.normalize import training_set
from stellar_lab.survey import LABELS, archive_record, archive_root, use_style

# %% [markdown]
# ## A model to invert
# A quadratic model of the labels of the archive at hand, trained on two thirds of its stars.

# %%
use_style()
record = archive_record(archive_root())
names = list(record.labels)
spectra, ledger = training_set(archive_root(), progress=False)
train, test = train_test_rows(len(spectra))
model = Cannon(scatter=True, labels=names).fit(spectra[train])
truth = spectra[test].labels(names)
print(
    f"{len(train)} stars taught {len(model.vectorizer_)} terms in {len(names)} labels; "
    f"{len(test)} to ask"
)


# %% [markdown]
# ## Sufficient statistics
# All $A$ are one product of the weights (stars × pixels) and the pairwise products of the coefficients (pixels × pairs). It runs in single precision, in blocks of
# stars that fit the cache. That is twice as fast, and accurate to a thousandth of an error bar; a last step on exact residuals takes care of the rest.

# %%
#| export
@dataclass
class Statistics:
    """What N spectra say about their labels.

    chi2 = const - 2 b . v + v . A v, with v the terms without the constant.

    Attributes
    ----------
    A : (N, M) array
        the distinct entries of the symmetric matrices, in the order of `pair_index`
    b : (N, T-1) array
    n_good : (N,) int array
        pixels that carry weight
    inverse, share : (N, q, q) and (N, q, T-1) arrays, optional
        where the model has q hidden labels, already eliminated from A and b: these are
        inverse @ force - share @ (change of v), with `force` the slope along their directions
    """

    A: np.ndarray
    b: np.ndarray
    n_good: np.ndarray
    inverse: np.ndarray = None
    share: np.ndarray = None

    def __len__(self):
        return len(self.b)

    def __getitem__(self, rows) -> "Statistics":
        parts = (self.A, self.b, self.n_good, self.inverse, self.share)
        return Statistics(*(None if part is None else part[rows] for part in parts))

    def matrix(self) -> np.ndarray:
        "The matrices A written out, (N, T-1, T-1) float64."
        return whole_matrices(self.A, self.b.shape[1])

    def chi2(self, terms: np.ndarray) -> np.ndarray:
        """chi2 of each star at each of S trials, above its value at the pivots, as two products.

        Parameters
        ----------
        terms : (S, T-1) array
            the terms of S trial stars

        Returns
        -------
        (N, S) array
        """
        i, j = pair_index(terms.shape[1])
        pairs = terms[:, i] * terms[:, j] * np.where(i == j, 1, 2)
        quadratic = self.A @ pairs.T.astype(self.A.dtype)
        return quadratic - 2 * (self.b @ terms.T.astype(self.b.dtype))

    def own_chi2(self, terms: np.ndarray) -> np.ndarray:
        "chi2 (N,) of each star at its own trial (N, T-1), like `chi2`, in double precision."
        product = (self.matrix() @ terms[..., None])[..., 0]
        return np.einsum("nt,nt->n", product - 2 * self.b, terms)


# %% [markdown]
# A pixel's weight is the inverse of its whole variance, the survey's and the model's own scatter. Where the model could not be fitted, the weight is zero.

# %%
#| exporti
def pixel_weights(ivar: np.ndarray, scatter2: np.ndarray) -> np.ndarray:
    """1 / (sigma^2 + s^2): 0 where ivar is 0 and where the model has no coefficients.

    Parameters
    ----------
    ivar : (N, P) array
    scatter2 : (P,) array
        variance that the model adds; NaN where it has nothing to say

    Returns
    -------
    (N, P) array
        `ivar` itself where there is nothing to change
    """
    if not scatter2.any():
        return ivar
    weight = ivar * scatter2
    weight += 1
    np.divide(ivar, weight, out=weight)
    unknown = np.isnan(scatter2)
    if unknown.any():
        weight[:, unknown] = 0
    return weight


# %%
weights = pixel_weights(np.array([[100.0, 0, 100, 100]]), np.array([0, 0.01, 0.01, np.nan]))
print("weights", weights)
assert np.allclose(weights, [[100, 0, 50, 0]])


# %% [markdown]
# The model in the form that the products want:

# %%
#| export
@dataclass
class _Basis:
    "A model as the products want it: unfitted pixels have coefficients 0 and a scatter of NaN."

    reference: np.ndarray  # (P,) the spectrum at the pivots
    theta: np.ndarray  # (T, P); the constant's row holds what rounding took from the reference
    hidden: np.ndarray  # (q, P) directions of hidden labels, none in a plain Cannon
    rows: np.ndarray  # (T-1+q, P) theta without the constant, then the directions
    products: np.ndarray  # (M, P) distinct products of two of these rows
    scatter2: np.ndarray  # (P,)

    @classmethod
    def of(cls, model, dtype):
        theta = np.where(model.usable_[:, None], model.theta_, 0).T
        reference = theta[0].astype(dtype)
        theta = np.vstack([theta[0] - reference, theta[1:]]).astype(dtype)
        hidden = np.asarray(getattr(model, "hidden_", np.empty((0, len(reference)))), dtype)
        rows = np.vstack([theta[1:], hidden])
        i, j = pair_index(len(rows))
        scatter2 = np.where(model.usable_, model.scatter_**2, np.nan).astype(dtype)
        return cls(reference, theta, hidden, rows, rows[i] * rows[j], scatter2)


# %% [markdown]
# A later chapter meets stars with [labels that nobody told](16_hidden.ipynb). Their directions stand below the coefficients, and they are eliminated at once, so that all that follows sees
# $A$ and $\mathbf b$ of the labels alone. A plain Cannon has none.

# %%
#| export
_BLOCK = 1024  # stars that a thread takes at a time
_PASS = 256  # of these a product: few enough to stay in the processor's cache


def _passes(work, size):
    "Results of `work` on slices of _PASS rows, each put together."
    results = (work(slice(start, start + _PASS)) for start in range(0, size, _PASS))
    return map(np.concatenate, zip(*results))


def _without_hidden(A, b, hidden):
    """Hidden labels eliminated: A and b of the terms alone, and what gives the hidden labels
    back."""
    full = whole_matrices(A, b.shape[1])
    terms = b.shape[1] - hidden
    inverse = np.linalg.inv(full[:, terms:, terms:] + np.eye(hidden))
    share = inverse @ full[:, terms:, :terms]
    turned = np.swapaxes(share, 1, 2)
    i, j = pair_index(terms)
    left = full[:, :terms, :terms] - turned @ full[:, terms:, :terms]
    right = b[:, :terms] - (turned @ b[:, terms:, None])[..., 0]
    return left[:, i, j].astype(A.dtype), right.astype(b.dtype), inverse, share


def _statistics(basis, flux, ivar):
    "Statistics of a block of stars."

    def work(rows):
        weight = pixel_weights(ivar[rows], basis.scatter2)
        difference = flux[rows] - basis.reference
        if weight.min() < 0:
            raise LabError("ivar is negative somewhere: give 0 where a pixel is unusable")
        A = weight @ basis.products.T
        n_good = (weight > 0).sum(axis=1, dtype=np.int32)
        difference *= weight
        b = difference @ basis.rows.T
        if not len(basis.hidden):
            return A, b, n_good
        A, b, inverse, share = _without_hidden(A, b, len(basis.hidden))
        return A, b, n_good, inverse, share

    return Statistics(*_passes(work, len(flux)))


def _finite_statistics(basis, flux, ivar, first):
    "Statistics of a block of stars, and its flux with zeros where unusable pixels hold no number."
    found = _statistics(basis, flux, ivar)
    if not (np.isfinite(found.A).all() and np.isfinite(found.b).all()):
        flux = finite_flux(flux, ivar, first)  # only now is it worth looking at every pixel
        found = _statistics(basis, flux, ivar)
    return found, flux


def statistics(model: Cannon, flux: np.ndarray, ivar: np.ndarray, dtype=np.float32) -> Statistics:
    """Sufficient statistics of spectra under a model.

    Parameters
    ----------
    model : Cannon
        fitted
    flux : (N, P) array
        not looked at where ivar is 0
    ivar : (N, P) array
    dtype : dtype, default float32
        of the products

    Raises
    ------
    LabError
        where a usable pixel has no finite flux or ivar, or an ivar is negative
    """
    basis = _Basis.of(model, dtype)

    def work(rows):
        found, _ = _finite_statistics(basis, flux[rows], ivar[rows], rows.start)
        return found.A, found.b, found.n_good

    return Statistics(*map(np.concatenate, zip(*in_blocks(work, len(flux), _BLOCK))))


# %% [markdown]
# Do the two sums say the same as the 7,214 pixels? For three stars at the labels of three others:

# %%
three = spectra[test[:3]]
stats = statistics(model, three.flux, three.ivar, np.float64)
trial = model.scale(truth[3:6])
scatter2 = np.where(model.usable_, model.scatter_**2, np.nan)


def chi2_over_pixels(scaled):
    made = np.nan_to_num(model.vectorizer_(scaled) @ model.theta_.T)
    return (pixel_weights(three.ivar.astype(float), scatter2) * (three.flux - made) ** 2).sum(
        axis=1
    )


slow = chi2_over_pixels(trial) - chi2_over_pixels(np.zeros_like(trial))
fast = stats.own_chi2(model.vectorizer_(trial)[:, 1:])
print("chi2 above the pivots', from pixels:", slow.round(2), "from the statistics:", fast.round(2))
assert np.allclose(slow, fast, rtol=1e-6)

# %% [markdown]
# ## Downhill, safely
# Newton's method in the approximation of Gauss: with the Jacobian $J = \partial\mathbf v/\partial\boldsymbol\ell$,
# $$ (J^\mathsf T\! A J + \lambda D)\,\boldsymbol\delta = J^\mathsf T(\mathbf b - A\mathbf v). $$
# Three safeguards make it fit for stars of any kind. The damping $\lambda$ of Levenberg and Marquardt grows when a step does not go down and shrinks when it does. A *box* around the training
# labels, a quarter wider than they reach, keeps the polynomial from being asked where it was never taught. And the search starts at the training star that fits
# best, which takes one more product to find out. The term that Gauss left out, the
# curvature of $\mathbf v$ itself, comes back for the few stars that eight steps did not settle. A star is done when the expected gain of a step is below 0.1 in $\chi^2$, a third of an error bar; the exact step below does the rest.

# %%
#| export
_DECREMENT = 0.1  # expected gain in chi2 at which a star is done: a third of an error bar
# added to second derivatives: a label of which a star says nothing stays, with a huge error
_RIDGE = 1e-10
_TRIALS = 512  # training stars that the search may start from
_GAUSS_STEPS = 8  # steps after which a star that still moves gets the full second derivative


def _newton_step(hessian, gradient, labels, low, high, damping):
    """The step (N, K) to the quadratic's minimum, labels at a bound that would leave the box stay;
    which moved."""
    at_low = (labels <= low) & (gradient < 0)
    at_high = (labels >= high) & (gradient > 0)
    free = ~(at_low | at_high)
    diagonal = np.einsum("nkk->nk", hessian)
    identity = np.eye(labels.shape[1])
    damped = np.where(free, damping[:, None] * diagonal + _RIDGE, 1)[:, :, None] * identity
    both = free[:, :, None] & free[:, None, :]
    right = np.where(free, gradient, 0)[..., None]
    step = np.linalg.solve(np.where(both, hessian, 0) + damped, right)[..., 0]
    return np.clip(labels + step, low, high) - labels, free


def _with_curvature(model, labels, hessian, force):
    "Newton's Hessian where it is positive definite, else Gauss's."
    full = hessian - model.vectorizer_.curvature(labels, np.insert(force, 0, 0, axis=1))
    try:
        np.linalg.cholesky(full)
        return full
    except np.linalg.LinAlgError:  # some star's is not: look which
        positive = np.linalg.eigvalsh(full)[:, 0] > 1e-3 * np.linalg.eigvalsh(hessian)[:, 0]
        return np.where(positive[:, None, None], full, hessian)


# %%
bowl = np.array([[[2.0, 0.5], [0.5, 1.0]]])
pull = np.array([[1.0, 3.0]])
walls = (np.array([-1.0, -1]), np.array([1.0, 1]))
for height, damping in ((0.0, 0.0), (0.0, 10.0), (1.0, 0.0)):
    at = np.array([[0.0, height]])
    step, free = _newton_step(bowl, pull, at, *walls, np.array([damping]))
    print(f"at {at[0]}, damping {damping}: step {step[0].round(2)}, free to move {free[0]}")

# %% [markdown]
# The gradient points up the second label. A damped step is shorter, a step ends at the wall, and a label that stands at the wall stays.

# %%
assert np.allclose(_newton_step(bowl, pull, at * 0, *walls, np.zeros(1))[0][0, 1], 1)
assert not free[0, 1] and step[0, 1] == 0


# %%
#| exporti
def descend(model: Cannon, stats: Statistics, start, box: tuple, max_steps: int) -> tuple:
    """Levenberg-Marquardt for all stars at once.

    Parameters
    ----------
    model : Cannon
        fitted
    stats : Statistics
        of N spectra
    start : (N, K) array
        scaled labels
    box : tuple of two (K,) arrays
        bounds of the scaled labels, from `label_box`
    max_steps : int

    Returns
    -------
    tuple
        scaled labels (N, K), steps taken (N,), and whether each star came to rest (N,)
    """
    low, high = box
    labels = np.clip(start, low, high)
    steps = np.zeros(len(start), dtype=int)
    resting = np.zeros(len(start), dtype=bool)
    rows = np.arange(len(start))  # stars that still move
    here = labels.copy()
    A = stats.matrix()
    b = stats.b.astype(float)
    damping = np.full(len(start), 1e-3)
    v = model.vectorizer_(here)[:, 1:]
    Av = np.einsum("ntu,nu->nt", A, v)
    for count in range(max_steps):
        J = model.vectorizer_.derivative(here)[:, 1:]
        Jt = np.swapaxes(J, 1, 2)
        hessian = Jt @ (A @ J)
        gradient = (Jt @ (b - Av)[..., None])[..., 0]
        if count >= _GAUSS_STEPS:
            hessian = _with_curvature(model, here, hessian, b - Av)
        step, _ = _newton_step(hessian, gradient, here, low, high, damping)
        trial = model.vectorizer_(here + step)[:, 1:]
        A_trial = np.einsum("ntu,nu->nt", A, trial)
        gain = np.einsum("nt,nt->n", Av - 2 * b, v) - np.einsum("nt,nt->n", A_trial - 2 * b, trial)
        down = gain >= 0
        here[down] = (here + step)[down]
        v[down] = trial[down]
        Av[down] = A_trial[down]
        damping = np.where(down, damping * 0.1, np.maximum(damping, 1e-3) * 10)
        steps[rows] += 1
        done = np.einsum("nk,nkl,nl->n", step, hessian, step) < _DECREMENT
        labels[rows] = here
        resting[rows] = done
        if done.all():
            break
        moving = ~done
        rows, here, A, b, damping, v, Av = (p[moving] for p in (rows, here, A, b, damping, v, Av))
    return labels, steps, resting


# %% [markdown]
# The path of one star downhill, seen from above: $\chi^2$ over two of its labels, the others at their best.

# %%
one = stats[2:3]
box = label_box(model)
path = [np.zeros((1, len(names)))]
for _ in range(8):
    path.append(descend(model, one, path[-1], box, 1)[0])
best = path[-1][0]
grid = np.stack(np.meshgrid(np.linspace(-2.5, 2.5, 60), np.linspace(-2.5, 2.5, 60)), axis=-1)
at = np.tile(best, (3600, 1))
at[:, [0, 2]] = grid.reshape(-1, 2)
height = one.chi2(model.vectorizer_(at)[:, 1:])[0].reshape(60, 60)
fig, ax = plt.subplots(figsize=(4.5, 3.6))
ax.contourf(grid[..., 0], grid[..., 1], np.log10(height - height.min() + 10), 20, cmap="Greys_r")
ax.plot(*np.array(path)[:, 0, [0, 2]].T, "o-", color="C3", ms=4)
symbols = [LABELS[name].symbol for name in names]
ax.set(xlabel=f"scaled {symbols[0]}", ylabel=f"scaled {symbols[2]}")
ax.set(title="steps of a star to its labels");

# %% [markdown]
# **What to see.** Dark is a good fit. From the mean of all stars (the middle) the search is in the valley after two or three steps, and at its bottom after four.

# %%
heights = [one.own_chi2(model.vectorizer_(at)[:, 1:])[0] for at in path]
assert np.all(np.diff(heights) <= 0)  # never uphill
assert np.abs(path[-1] - path[-2]).max() < 0.1 and heights[-1] <= height.min()


# %% [markdown]
# $\chi^2$ may have several valleys. So the search starts from the training star that fits best, and a doubtful star starts twice more: from the best training star far away, and from the mean, as in the original lab.

# %%
#| export
def _starts(model):
    "Scaled labels of training stars that a search may start from."
    training = model.scale(model.training_labels_)
    return training[np.unique(np.linspace(0, len(training) - 1, _TRIALS).astype(int))]


def _search(model, stats, box, max_steps):
    "Best scaled labels from several starts, and the steps they took."
    trials = _starts(model)
    chi2 = stats.chi2(model.vectorizer_(trials)[:, 1:])
    labels, steps, resting = descend(model, stats, trials[chi2.argmin(axis=1)], box, max_steps)
    at_edge = np.any((labels <= box[0]) | (labels >= box[1]), axis=1)
    doubtful = np.flatnonzero(~resting | at_edge)
    if not len(doubtful):
        return labels, steps
    far = np.linalg.norm(trials - labels[doubtful, None], axis=2) > 2
    second = trials[np.where(far, chi2[doubtful], np.inf).argmin(axis=1)]
    for start in (second, np.zeros_like(second)):
        again, more, rest = descend(model, stats[doubtful], start, box, max_steps)
        now = stats[doubtful].own_chi2(model.vectorizer_(again)[:, 1:])
        before = stats[doubtful].own_chi2(model.vectorizer_(labels[doubtful])[:, 1:])
        deeper = now < before - _DECREMENT
        better = deeper | (rest & ~resting[doubtful] & (now <= before))
        labels[doubtful[better]] = again[better]
        resting[doubtful[better]] = rest[better]
        steps[doubtful] += more
    return labels, steps


# %%
found, steps = _search(model, stats, box, 50)
print(f"{len(_starts(model))} starts to choose from; steps of each star: {steps}")
assert np.allclose(found[2], path[-1][0], atol=0.05)

# %% [markdown]
# ## The last step is exact
# Single precision leaves $A$ and $\mathbf b$ with errors of a millionth, and in their difference these are larger. So the search ends on the pixels themselves. The reference spectrum
# was subtracted first, and that subtraction is exact (two numbers within a factor of two); what is left of the model is small, so the residual has no
# larger error than the flux had when it was stored. From the residuals follow their gradient (a product with 20 columns, not with 210), one more Newton step with the full second
# derivative, and again for the few stars that this step did not bring to within a thousandth of an error bar. The same residuals give the exact $\chi^2$.

# %%
#| export
_EXACT_STEPS = 6  # rounds at most
_EXACT_ERROR = 1e-4  # error that is left, in error bars


def _gradient(basis, terms, values, flux, ivar):
    """Half the slope of chi2 along each term and each of the hidden labels, (N, T-1+q), and chi2
    (N,), from residuals."""
    terms = terms.astype(basis.theta.dtype)
    values = values.astype(basis.theta.dtype)

    def work(rows):
        residual = flux[rows] - basis.reference
        residual -= terms[rows] @ basis.theta
        if len(basis.hidden):
            residual -= values[rows] @ basis.hidden
        weighted = pixel_weights(ivar[rows], basis.scatter2) * residual
        return weighted @ basis.rows.T, np.einsum("np,np->n", weighted, residual)

    return _passes(work, len(flux))


def _at_best_hidden(stats, force, chi2, values):
    "Slopes along the terms (N, T-1) and chi2 (N,) at each star's best hidden labels; their change."
    terms = stats.b.shape[1]
    pull = force[:, terms:] - values
    change = (stats.inverse @ pull[..., None])[..., 0]
    chi2 = chi2 + (values**2).sum(axis=1) - (pull * change).sum(axis=1)
    along = force[:, :terms] - (np.swapaxes(stats.share, 1, 2) @ pull[..., None])[..., 0]
    return along, chi2, change


def _finish(model, basis, labels, stats, flux, ivar, box):
    """Exact Newton steps: scaled labels, chi2, the Hessian (half of chi2's second derivative), who
    rests."""
    labels = labels.copy()
    chi2 = np.empty(len(labels))
    resting = np.zeros(len(labels), dtype=bool)
    hessian = np.empty(labels.shape + labels.shape[1:])
    values = np.zeros((len(labels), len(basis.hidden)))  # of the hidden labels
    rows = slice(None)
    for _ in range(_EXACT_STEPS):
        here = stats[rows]
        terms = model.vectorizer_(labels[rows])
        jacobian = model.vectorizer_.derivative(labels[rows])[:, 1:]
        force, chi2_here = _gradient(basis, terms, values[rows], flux[rows], ivar[rows])
        if len(basis.hidden):
            force, chi2_here, change = _at_best_hidden(here, force, chi2_here, values[rows])
        turned = np.swapaxes(jacobian, 1, 2)
        gradient = (turned @ force[..., None].astype(float))[..., 0]
        gauss = turned @ (here.matrix() @ jacobian)
        hessian[rows] = gauss
        H = _with_curvature(model, labels[rows], gauss, force)
        step, _ = _newton_step(H, gradient, labels[rows], *box, np.zeros(len(terms)))
        curved = np.einsum("nk,nkl,nl->n", step, H, step)
        gain = 2 * np.einsum("nk,nk->n", step, gradient) - curved
        labels[rows] += step
        if len(basis.hidden):
            values[rows] += change - (here.share @ (jacobian @ step[..., None]))[..., 0]
        # Newton's error after a step: the step in error bars times the step
        left = np.sqrt(np.abs(gain)) * np.abs(step).max(axis=1)
        chi2[rows] = chi2_here - gain
        resting[rows] = left < _EXACT_ERROR
        rows = np.flatnonzero(~resting)
        if not len(rows):
            break
    return labels, chi2, hessian, resting


# %%
basis = _Basis.of(model, np.float32)
exact, _, _, resting = _finish(model, basis, found, stats, three.flux, three.ivar, box)
print(f"the last step moves the scaled labels by {np.abs(exact - found).max():.0e} at most")
assert resting.all() and np.abs(exact - found).max() < 0.01


# %% [markdown]
# ## From spectra to labels
# The three steps in a row, for a block of stars: sufficient statistics, search, last step. The formal covariance is the inverse of half of $\chi^2$'s second derivative.
# What comes out is an answer as [the contract of all models](04_models.ipynb) wants it; `infer`, its table and its flags are the same for every model.

# %%
#| export
@answer.register(Cannon)
def _invert(model, spectra, max_steps):
    "How a Cannon answers: the labels that minimize chi2."
    basis = _Basis.of(model, np.float32)
    box = label_box(model)

    def work(rows):
        flux, ivar = spectra.flux[rows], spectra.ivar[rows]
        return _invert_block(model, basis, box, flux, ivar, rows.start, max_steps)

    parts = in_blocks(work, len(spectra), _BLOCK)
    return Answer(*map(np.concatenate, zip(*parts)))


def _invert_block(model, basis, box, flux, ivar, first, max_steps):
    """The fields of an `Answer` for a block of stars; `first` is its first star's number.

    A star that did not come to rest stands where rounding left it, and that depends on its
    neighbours in the products: it is inverted once more, alone."""
    found = _invert_together(model, basis, box, flux, ivar, first, max_steps)
    *_, resting, _ = found
    for star in np.flatnonzero(~resting) if len(flux) > 1 else ():
        rows = slice(star, star + 1)
        alone = (flux[rows], ivar[rows], first + int(star))
        for values, value in zip(found, _invert_together(model, basis, box, *alone, max_steps)):
            values[rows] = value
    return found


def _invert_together(model, basis, box, flux, ivar, first, max_steps):
    "The same, for stars that share the products."
    stats, flux = _finite_statistics(basis, flux, ivar, first)
    scaled, steps = _search(model, stats, box, max_steps)
    scaled, chi2, hessian, resting = _finish(model, basis, scaled, stats, flux, ivar, box)
    units = np.outer(model.scales_, model.scales_)
    covariance = np.linalg.inv(hessian + _RIDGE * np.eye(len(units))) * units
    at_bound = np.any((scaled <= box[0]) | (scaled >= box[1]), axis=1)
    return model.unscale(scaled), covariance, stats.n_good, chi2, steps, resting, at_bound


# %% [markdown]
# ## Does it come back?
# Labels of noiseless spectra that the model itself made must come back, to a millionth of a standard deviation and from anywhere in the training set.

# %%
exact = np.nan_to_num(model.predict(truth))
noiseless = exact.astype("f4")
back = infer(model, noiseless, spectra[test].ivar)
inside = np.all(np.abs(model.scale(truth)) < 3, axis=1)
difference = model.scale(label_values(back, names)) - model.scale(truth)
print(f"largest difference {np.abs(difference[inside]).max():.1e} scaled units")

# %% [markdown]
# What is left is the rounding of the flux to single precision, carried over to the labels: $(JWJ^T)^{-1}JW\,\delta f$, with $J$ the slopes of the spectrum and $W$ the weights. It is the spectrum's error and not the
# inversion's, so it is computed and taken off.

# %%
slopes = np.nan_to_num(model.derivative(truth)) * model.scales_[:, None]
weight = pixel_weights(spectra[test].ivar, scatter2)
hessian = (slopes * weight[:, None]) @ np.swapaxes(slopes, 1, 2)
force = slopes @ (weight * (noiseless - exact))[..., None]
rounding = np.linalg.solve(hessian, force)[..., 0]
error = np.abs(difference - rounding)[inside]
print(f"largest error {error.max():.1e}, largest chi2 {back['chi2'][inside].max():.1e}")

# %%
assert error.max() < 1e-6 and not np.any(back["flags"][inside] & ~Flag.OUTSIDE_TRAINING)


# %% [markdown]
# ## A slow reference implementation
# The way of the original lab: `scipy.optimize.minimize` (BFGS, numerical gradient) over all pixels, started from our answer's neighbourhood so that both look into the same
# valley. On twenty real stars the two must agree to a thousandth of the formal error. The numerical gradient is the weak one of the two (the original lab met "precision
# loss"), so its sum is shifted to begin at zero.

# %%
def slow_labels(model, flux, ivar, start):
    usable = (ivar > 0) & model.usable_
    weight = 1 / (1 / ivar[usable].astype(float) + model.scatter_[usable] ** 2)
    theta = model.theta_[usable]
    flux = flux[usable].astype(float)

    def half_chi2(scaled):
        return 0.5 * np.sum(weight * (flux - theta @ model.vectorizer_(scaled[None])[0]) ** 2)

    shift = half_chi2(start)

    def shifted(scaled):
        return half_chi2(scaled) - shift

    return minimize(shifted, start, method="BFGS", options={"gtol": 1e-4}).x


# %%
def formal_pull(table, truth):
    "Differences (N, K) in formal errors."
    errors = label_values(table, [f"{name}_err" for name in names])
    return (label_values(table, names) - truth) / errors


table = infer(model, spectra[test])
starts = model.scale(label_values(table[:20], names))
slow = [
    slow_labels(model, spectra.flux[row], spectra.ivar[row], start + 0.02)
    for row, start in zip(test[:20], starts)
]
difference = formal_pull(table[:20], model.unscale(np.array(slow)))
print(
    f"largest difference of {difference.size} labels: {np.abs(difference).max():.1e} formal errors"
)

# %%
assert np.abs(difference).max() < 1e-3

# %% [markdown]
# The errors are those of the same sum: half its second derivative, by finite differences of the exact gradient, inverted.

# %%
row = test[0]
at = starts[0]


def gradient(scaled):
    v = model.vectorizer_(scaled[None])[0]
    slope = model.vectorizer_.derivative(scaled[None])[0]
    weight = pixel_weights(spectra.ivar[[row]], scatter2)[0]
    theta = np.nan_to_num(model.theta_)
    return -2 * (weight * (spectra.flux[row] - theta @ v)) @ (theta @ slope)


steps = 1e-4 * np.eye(len(names))
hessian = np.array([(gradient(at + step) - gradient(at - step)) / 2e-4 for step in steps])
numeric_error = np.sqrt(np.diag(np.linalg.inv(hessian / 2))) * model.scales_
ours = label_values(table[:1], [f"{name}_err" for name in names])[0]
print("formal errors, ours / numerical:", np.round(ours / numeric_error, 3))

# %% [markdown]
# Most agree within a few percent; [α/M] (the fourth, where six labels are fitted) differs by a quarter. The difference is the curvature of the model times the residuals, which the formal covariance (Fisher's) leaves out by definition.

# %%
assert np.allclose(ours, numeric_error, rtol=0.25)

# %% [markdown]
# ## One valley or several?
# $\chi^2$ of a quadratic model is of the fourth degree in the labels and may have several minima. So the search starts from the training star that fits best. Fifty
# stars, each also from ten random training stars: where does another start end lower?

# %%
rng = np.random.default_rng(8)
fifty = spectra[test[:50]]
stats = statistics(model, fifty.flux, fifty.ivar)
best, _ = _search(model, stats, box, 60)
lowest = stats.own_chi2(model.vectorizer_(best)[:, 1:])
training = model.scale(model.training_labels_)
elsewhere = [
    descend(model, stats, training[rng.integers(len(training), size=50)], box, 60)[0]
    for _ in range(10)
]
others = np.array([stats.own_chi2(model.vectorizer_(scaled)[:, 1:]) for scaled in elsewhere])

# %%
#| echo: false
deeper = (others.min(axis=0) < lowest - 1).sum()
stuck = (others > lowest + 1).mean()
Markdown(
    f"**What to see.** {stuck:.0%} of the random starts end in a worse minimum: starting well "
    f"matters. "
    f"{deeper} of the 50 stars have a deeper one than ours."
)

# %%
assert deeper <= 2

# %% [markdown]
# ## What goes wrong, said clearly

# %%
with pytest.raises(LabError, match="ivar is missing"):
    infer(model, spectra.flux[:2])
with pytest.raises(LabError, match=r"flux \(2, 100\) and ivar \(2, 100\) must both be \(N, 7214\)"):
    infer(model, spectra.flux[:2, :100], spectra.ivar[:2, :100])
with pytest.raises(LabError, match="star 1 has a usable pixel without a finite flux"):
    infer(model, np.array([spectra.flux[0], spectra.flux[1] * np.nan]), spectra.ivar[:2])

# %% [markdown]
# A star without a single usable pixel has no labels, and says so; the arrays that go in come out as they were.

# %%
two = spectra[test[:2]]
flux = two.flux.copy()
ivar = two.ivar.copy()
ivar[0] = 0
before = (flux.copy(), ivar.copy())
blind = infer(model, flux, ivar)
assert np.isnan(blind["teff"][0]) and flag_names(blind["flags"])[0] == "NOT_CONVERGED FEW_PIXELS"
assert np.allclose(blind["covariance"][1], infer(model, two)["covariance"][1], rtol=1e-3)
assert np.array_equal(flux, before[0]) and np.array_equal(ivar, before[1])

# %% [markdown]
# **Exercise.** Draw spectra from the model at known labels, with noise of the stated size and the model's scatter, and count how often the truth lies within the formal error. Is it 68 %? What, then, is
# missing from the formal errors of real stars?
