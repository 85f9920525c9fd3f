# %% [markdown]
# # How wrong is a model?
# > Left-out stars, tables of errors, calibrated errors, and the one picture that shows them all.
#
# **Question.** A model gives labels and says how sure it is. How do we find out how wrong it really is, and whether its errors can be believed?
#
# **Idea.** Ask it about stars that it has not seen. *Folds* leave out every star once; *groups* leave out all stars of a kind, such as a cluster, and so ask the harder question: what
# about stars whose like was not in training? The differences between answer and catalogue give a table of errors. Divided by the stated errors they say whether these hold: of errors that are right, 68 % of
# all stars lie within one.
#
# Nothing in this chapter knows what is inside a model. It uses `fit` and `infer`, as [the contract](04_models.ipynb) promises them.
#
# You learn to judge a model without flattering it, and to turn formal errors into calibrated ones.

# %%
#| default_exp judging

# %%
#| export
import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
from astropy.table import QTable, vstack
from scipy.optimize import minimize
from scipy.special import erf, ndtri
from sklearn.base import clone
from sklearn.utils.validation import has_fit_parameter
from tqdm import tqdm

from stellar_lab.clean import nan_median
from stellar_lab.inversion import infer
from stellar_lab.models import (
    ERROR_MODEL,
    LabelModel,
    apply_error_model,
    beyond_base,
    label_trend,
    label_values,
    name_list,
    number_array,
    poor_fit_limit,
)
from stellar_lab.survey import LabError, Spectra, label_record

# %%
#| hide
import matplotlib.pyplot as plt
import pytest
from astropy.table import Table
from IPython.display import Markdown
from scipy.stats import chi2

from stellar_lab.cannon import Cannon
from stellar_lab.models import fold_numbers, train_test_rows
from stellar_lab.normalize import training_set
from stellar_lab.survey import archive_record, archive_root, use_style


# %% [markdown]
# ## Answers of models that have not seen the star
# `cross_label` trains once per group on all the others, and asks about the group.

# %%
#| export
def cross_label(
    model: LabelModel,
    spectra: Spectra,
    groups: Sequence,
    progress: bool = True,
    prepare: Callable = None,
) -> QTable:
    """Label each star with a model that has not seen its group.

    Parameters
    ----------
    model : LabelModel
        its parameters count; it is cloned, not changed
    spectra : Spectra
        with labels, as `training_set` gives them
    groups : (N,) sequence
        number of the fold, or name of the group, of each star
    progress : bool, default True
        show a bar
    prepare : callable, optional
        what is done to the training stars, a `Spectra`, before each fit; it sees no star left out

    Returns
    -------
    QTable
        `infer` of every star by a model trained without its group, in the order of the stars

    Raises
    ------
    LabError
        where all stars are in one group, or there is not a group for each star

    Examples
    --------
    >>> from stellar_lab import Cannon, cross_label, fold_numbers
    >>> from stellar_lab.archives import real_stars
    >>> spectra = real_stars()[:150]
    >>> labels = ["TEFF", "LOGG", "M_H"]
    >>> folds = fold_numbers(len(spectra), folds=2, stars=spectra.stars["APOGEE_ID"])
    >>> table = cross_label(Cannon(order=1, labels=labels), spectra, folds, progress=False)
    >>> len(table)
    150
    """
    groups = np.asarray(groups)
    if len(groups) != len(spectra):
        raise LabError(f"{len(groups)} groups for {len(spectra)} stars: give one for each star")
    names, place = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise LabError("all stars are in one group: nothing is left to train on")
    quiet = {"progress": progress} if has_fit_parameter(model, "progress") else {}
    bar = tqdm(range(len(names)), desc="left out", unit="group", disable=not progress, leave=False)
    answers = []
    for number in bar:
        rows = place == number
        training = spectra[~rows] if prepare is None else prepare(spectra[~rows])
        answers.append(infer(clone(model).fit(training, **quiet), spectra[rows]))
    table = vstack(answers, metadata_conflicts="silent")  # keeps the longest name whole
    table.meta = answers[0].meta
    return table[np.argsort(np.argsort(place, kind="stable"))]


# %%
use_style()
names = list(archive_record(archive_root()).labels)
spectra, ledger = training_set(archive_root(), progress=False)
truth = spectra.labels(names)
cannon = Cannon(scatter=True, labels=names)
folds = fold_numbers(len(spectra), stars=spectra.stars["APOGEE_ID"])
table = cross_label(cannon, spectra, folds, progress=False)
table[:3]


# %% [markdown]
# ## A table of errors
# The root mean square of the differences (RMSE) counts every star, and a few wild ones decide it. The *robust scatter*, 1.48 times the median distance from the median, is
# what most stars have; both agree where the differences follow a Gaussian. The *bias* is the mean difference. To average over labels with different units,
# the RMSE is also given in units of the label's spread: at 1.0 a model is no better than saying "an average star".

# %%
#| export
def robust_scatter(values) -> np.ndarray:
    """The standard deviation that outliers do not move: 1.4826 median |x - median x|.

    Parameters
    ----------
    values : (N,) or (N, K) array
        NaN is left out

    Returns
    -------
    float or (K,) array
    """
    return 1.4826 * np.nanmedian(np.abs(values - np.nanmedian(values, axis=0)), axis=0)


def _differences(table, truth, names):
    "Predicted minus catalogue labels (N, K)."
    predicted = label_values(table, names)
    catalogue = number_array(truth, "the catalogue labels").astype(float)
    if catalogue.shape != predicted.shape:
        raise LabError(
            f"the catalogue labels have the shape {catalogue.shape}: for {len(predicted)} stars "
            f"and the labels {', '.join(names)} it must be {predicted.shape}"
        )
    return predicted - catalogue


# %%
wild = np.array([-1.0, 0.5, 0.0, 1.0, 50.0])
print(f"standard deviation {wild.std():.1f}, robust {robust_scatter(wild):.1f}")


# %%
#| export
def error_table(table: QTable, truth, names, scales) -> QTable:
    """How far predicted labels are from the catalogue's.

    Parameters
    ----------
    table : QTable
        from `infer`
    truth : (N, K) array
        catalogue labels, physical units
    names : str or sequence of str
        of the K labels
    scales : (K,) array
        standard deviation of each label

    Returns
    -------
    QTable
        one row per label: ``label``, ``unit``, ``n`` stars, ``rmse``, ``scaled_rmse``,
        ``mae`` (mean
        absolute error), ``bias`` (mean of predicted - catalogue), ``robust`` (1.48 MAD)

    Raises
    ------
    LabError
        where the table lacks a label, or `truth` has another shape

    Examples
    --------
    >>> import numpy as np
    >>> from astropy.table import QTable
    >>> from stellar_lab import error_table
    >>> table = QTable({"teff": [4510.0, 4790.0]})
    >>> errors = error_table(table, np.array([[4500.0], [4800.0]]), ["TEFF"], [100.0])
    >>> float(errors["rmse"][0]), float(errors["bias"][0])
    (10.0, 0.0)
    """
    names = name_list(names)
    missing = [name for name in names if name.lower() not in table.colnames]
    if missing:
        raise LabError(
            f"the table has no label {', '.join(missing)}: it has "
            f"{table.meta.get('labels', ', '.join(table.colnames))}"
        )
    residual = _differences(table, truth, names)
    errors = QTable({"label": list(names), "unit": [str(label_record(n).unit) for n in names]})
    errors["n"] = np.isfinite(residual).sum(axis=0)
    with np.errstate(invalid="ignore"):
        rmse = np.sqrt(np.nanmean(residual**2, axis=0))
        columns = {
            "rmse": rmse,
            "scaled_rmse": rmse / np.asarray(scales),
            "mae": np.nanmean(np.abs(residual), axis=0),
            "bias": np.nanmean(residual, axis=0),
            "robust": robust_scatter(residual),
        }
    for name, column in columns.items():
        errors[name] = column
        errors[name].info.format = ".4g"
    return errors


# %%
errors = error_table(table, truth, names, truth.std(axis=0))
errors

# %%
shuffled = error_table(table, np.random.default_rng(0).permutation(truth), names, truth.std(axis=0))
assert np.all(shuffled["scaled_rmse"] > 1.5 * errors["scaled_rmse"])  # no luck
moved = error_table(table, truth + 3 * truth.std(axis=0), names, truth.std(axis=0))
assert np.allclose(moved["bias"] - errors["bias"], -3 * truth.std(axis=0))
assert np.allclose(moved["robust"], errors["robust"])
with pytest.raises(LabError, match="no label FE_H"):
    error_table(table, truth[:, :1], ["FE_H"], [1])


# %% [markdown]
# ## One picture for all labels

# %%
#| export
def plot_comparison(tables: dict, names, difference: bool = False, axes=None):
    """Predicted against catalogue labels, one panel per label, with the line of equality.

    Parameters
    ----------
    tables : dict
        name -> (table from `infer`, catalogue labels (N, K)), drawn over each other
    names : str or sequence of str
        of the K labels
    difference : bool, default False
        draw predicted - catalogue instead of predicted
    axes : array of Axes, optional
        K panels; made by default

    Returns
    -------
    array of Axes

    Raises
    ------
    LabError
        where catalogue labels have another shape, or there are not as many axes as labels

    Examples
    --------
    >>> import numpy as np
    >>> from astropy.table import QTable
    >>> from stellar_lab import plot_comparison
    >>> table = QTable({"teff": [4510.0, 4790.0]})
    >>> axes = plot_comparison({"stars": (table, np.array([[4500.0], [4800.0]]))}, ["TEFF"])
    """
    import matplotlib.pyplot as plt

    names = name_list(names)
    if axes is None:
        columns = 2 if len(names) in (2, 4) else min(len(names), 3)
        rows = math.ceil(len(names) / columns)
        fig, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.7 * rows), squeeze=False)
        for empty in axes.ravel()[len(names) :]:
            fig.delaxes(empty)
        left = axes[:, 0]
        axes = axes.ravel()[: len(names)]
    else:
        axes = np.atleast_1d(axes).ravel()
        left = axes[:1]
    if len(axes) != len(names):
        raise LabError(f"{len(axes)} panels for {len(names)} labels: give one for each")
    for k, (ax, name) in enumerate(zip(axes, names)):
        record = label_record(name)
        for title, (table, truth) in tables.items():
            residual = _differences(table, truth, names)[:, k]
            predicted = label_values(table, [name])[:, 0]
            shown = residual if difference else predicted
            ax.plot(predicted - residual, shown, ".", ms=3, alpha=0.6, label=title)
        ends = np.array(ax.get_xlim())
        ax.plot(ends, 0 * ends if difference else ends, color="0.3", lw=0.8)
        ax.set(xlabel=f"catalogue {record.axis}", title=record.symbol, xlim=ends)
    for ax in left:
        ax.set_ylabel("predicted - catalogue" if difference else "predicted")
    if len(tables) > 1:
        axes[0].legend(markerscale=3, handletextpad=0, frameon=False)
    return axes


# %%
plot_comparison({"folds": (table, truth)}, names)
plot_comparison({"folds": (table, truth)}, names, difference=True);

# %%
#| echo: false
slope = np.polyfit(truth[:, 0], label_values(table, ["teff"])[:, 0] - truth[:, 0], 1)[0]
Markdown(
    "**What to see.** The points lie along the line. The differences show more: they fall with "
    "temperature, "
    f"by {-slope * 1000:.0f} K in 1,000 K. Hot stars are predicted too cool and cool stars too "
    f"hot, as with any "
    "estimate that learns from noisy labels."
)


# %% [markdown]
# ## Do the stated errors hold?
# The *pull* is the difference in units of the stated error. If the errors were right, 68 % of all pulls would lie between -1 and 1. The formal errors of The Cannon know the noise of each pixel and
# the scatter that the model learned for it, and take all pixels as independent. They know neither the catalogue's own errors, nor that the polynomial may be wrong in many pixels at once.

# %%
def pulls(table, truth):
    stated = label_values(table, [f"{name}_err" for name in names])
    return (label_values(table, names) - truth) / stated


within = np.mean(np.abs(pulls(table, truth)) < 1, axis=0)
print("share of stars within one formal error:", dict(zip(names, within.round(2).tolist())))
assert np.all(within < 0.4)

# %% [markdown]
# ## Calibrated errors
# Left-out stars tell what to add to the formal errors. For each label
# $$ \sigma^2_\mathrm{calibrated} = (a\,\sigma^2_\mathrm{formal} + b)\; e^{\mathbf g\cdot\mathbf z} , $$
# with an inflation $a$ (a noisy star is worse off than a bright one), a floor $b$, and slopes $\mathbf g$ along the star's own labels $\mathbf z$, which count in spreads from the mean: a hot or a metal-poor star has weak lines.
# All are found by maximum likelihood: the Gaussian that makes the differences most probable. Such errors hold for the labels of the catalogue that the model was trained on, whose own errors are included. Wild outliers, beyond
# four robust standard deviations, take no part. A small set of stars gets no slopes. Where the best floor is none, the formal errors may be too large rather than too small: a model that learned from noisy labels can
# count their noise as its own. Then what all formal variances share, nearly the smallest of them, is taken off before they are inflated.
#
# But a catalogue errs, too, and its noise is no fault of the model. Where the catalogue states an error $c$ for each star, the difference has the variance
# $$ (a\,\sigma^2_\mathrm{formal} + b)\;e^{\mathbf g\cdot\mathbf z} + s\,c^2, $$
# and the error about the *true* label is what is left without the last term. The share $s$ should be 1. It is smaller where the stated errors are larger than all the differences that we see: such a catalogue is
# too modest. What share to believe then, nobody can tell, for a floor $b$ and a noise $s\,c^2$ look alike. So of what is seen, a catalogue that states twice as much is given one half at most, and the errors stay on the safe side.

# %%
#| export
_CLIP = 4  # residuals beyond this many robust standard deviations take no part
_STARTS = ((-1, -1), (0, -6), (-6, 0))  # of the search for log inflation and log floor
_LEAST_STARS = 10
_PER_SLOPE = 10  # stars for each number of an error model with slopes
_NO_FLOOR = 1e-2  # of the inflated variance: a floor below it is none, and the formal errors may
_SHARED = 0.97  # have a noise in them that all stars share: so much of the smallest variance
_CALM = 10.0  # how strongly slopes are drawn to zero, in stars


def _judged(residual, formal2):
    "The stars of one label that shape its error model, (N,) bool."
    use = np.isfinite(residual)
    if np.isfinite(formal2).any():
        use &= np.isfinite(formal2) & (formal2 > 0)
    use[use] = np.abs(residual[use] - np.median(residual[use])) < _CLIP * robust_scatter(
        residual[use]
    )
    if use.sum() < _LEAST_STARS:
        raise LabError(
            f"{use.sum()} left-out stars are too few for an error model: {_LEAST_STARS} are needed"
        )
    return use


_TRUST = 0.1  # what it costs to take a catalogue's stated errors for nothing


def _noise_share(logit):
    "Share of the catalogue's stated variance that is believed."
    return 1 / (1 + np.exp(-logit))


def _most_share(residual2, stated2):
    """The largest share of the catalogue's stated variance that may be believed. Where it exceeds
    what is seen twice over, at most half of what is seen is the catalogue's."""
    seen2 = np.median(residual2) / ndtri(0.75) ** 2  # half of a normal distribution is nearer
    excess = np.median(stated2) / max(seen2, np.finfo(float).tiny)
    if excess <= 1:
        return 1.0
    return max(0.5, 1.5 - 0.5 * excess) / excess


class _Variance:
    """Variance of one label's differences, by inflation, floor, share of the catalogue's variance
    and slopes; its cost is the log-likelihood's, averaged over the stars."""

    def __init__(self, residual2, formal2, stated2, trend):
        self.residual2, self.formal2, self.stated2, self.trend = residual2, formal2, stated2, trend

    def cost(self, p):
        "The cost, and its slopes along the parameters."
        growth = np.exp(self.trend @ p[3:])
        inflated = np.exp(p[0]) * self.formal2 * growth
        floor = np.exp(p[1]) * growth
        share = _noise_share(p[2])
        variance = inflated + floor + share * self.stated2
        calm = _CALM / len(variance)
        value = np.mean(self.residual2 / variance + np.log(variance))
        value += _TRUST * (1 - share) + calm * np.sum(p[3:] ** 2)
        pull = (1 - self.residual2 / variance) / variance / len(variance)
        of_share = (pull @ self.stated2 - _TRUST) * share * (1 - share)
        along = (pull * (inflated + floor)) @ self.trend + 2 * calm * p[3:]
        return value, np.array([pull @ inflated, pull @ floor, of_share, *along])

    def best(self):
        "The most probable parameters, from several starts."
        slopes = np.zeros(self.trend.shape[1])
        most = _most_share(self.residual2, self.stated2)
        logit = min(6, np.log(most / (1 - most))) if most < 1 else 6
        bounds = [(-12, 8), (-12, 8), (-6, max(logit, -6)), *[(-3, 3) for _ in slopes]]
        starts = [np.array([*start, min(2, logit), *slopes]) for start in _STARTS]
        fits = [
            minimize(self.cost, start, jac=True, method="L-BFGS-B", bounds=bounds)
            for start in starts
        ]
        return min(fits, key=lambda fit: fit.fun).x


# %%
#| export
def _error_model(residual, formal2, stated2=None, trend=None):
    """Inflation and floor of one label's variance, by maximum likelihood; the share of the
    catalogue's stated variance (N,) in what is seen; slopes along the trend (N, K); the base that
    is taken off the formal variance (N,) first."""
    use = _judged(residual, formal2)
    unit2 = np.mean(residual[use] ** 2)
    if not 0 < unit2 < np.inf:
        raise LabError(
            "the labels of the left-out stars are exactly the catalogue's, or beyond all numbers: "
            "give the answers of a model that has not seen these stars"
        )
    columns = 0 if trend is None else trend.shape[1]
    base = 0
    sloped = columns and use.sum() >= _PER_SLOPE * (columns + 2)
    along = trend[use] if sloped else np.empty((use.sum(), 0))
    told = np.isfinite(formal2).any()  # a model that states no error has a floor alone
    typical2 = np.median(formal2[use]) if told else 1
    known = told and stated2 is not None
    nothing = np.zeros(use.sum())
    noise2 = stated2[use] / unit2 if known else nothing
    formal2 = formal2[use] / typical2 if told else nothing
    residual2 = residual[use] ** 2 / unit2
    found = _Variance(residual2, formal2, noise2, along).best()
    if told and found[1] < found[0] + np.log(_NO_FLOOR):
        base = _SHARED * formal2.min()
        found = _Variance(residual2, beyond_base(formal2, base), noise2, along).best()
    inflation = np.exp(found[0]) * unit2 / typical2 if told else 0
    share = _noise_share(found[2]) if known else 0
    slopes = found[3:] if sloped else np.zeros(columns)
    return inflation, np.exp(found[1]) * unit2, share, slopes, base * typical2


# %%
stated2 = np.random.default_rng(0).uniform(0.5, 2, 1000) ** 2
drawn = np.sqrt(4 * stated2 + 3**2) * np.random.default_rng(1).standard_normal(1000)
inflation, floor, *_ = _error_model(drawn, stated2)
print(
    f"put in: inflation 4, floor 3 squared; found {inflation:.1f} and {np.sqrt(floor):.1f} squared"
)
assert abs(inflation * np.mean(stated2) + floor - 4 * np.mean(stated2) - 9) < 2

# %% [markdown]
# With a catalogue that errs by half of a unit to three units, of which we know, the same numbers must come out; and a catalogue that states ten times its error is not believed.

# %%
catalogue2 = np.random.default_rng(2).uniform(0.5, 3, 1000) ** 2
seen = drawn + np.sqrt(catalogue2) * np.random.default_rng(3).standard_normal(1000)
_, _, right, *_ = _error_model(seen, stated2, catalogue2)
inflation, floor, modest, *_ = _error_model(seen, stated2, 100 * catalogue2)
print(f"share of the stated noise: {right:.2f}; where ten times the error is stated: {modest:.3f}")
assert right > 0.7 and modest < 0.03
hardly = np.full(1000, 0.3**2)  # a model that is too sure: all else would be the catalogue's
inflation, floor, *_ = _error_model(seen, hardly, np.full(1000, 30.0**2))
own = np.sqrt(inflation * hardly[0] + floor) / robust_scatter(seen)
print(f"of a catalogue that states far too much, the error keeps {own:.2f} of what is seen")
assert 0.65 < own < 1.1

# %% [markdown]
# And slopes: here the variance grows with the first of two labels, by a factor $e^{0.8}$ for each spread, and does not care about the second.

# %%
along = np.clip(np.random.default_rng(4).standard_normal((1000, 2)), -2.5, 2.5)
sloped = drawn * np.exp(0.8 * along[:, 0] / 2)
slopes = _error_model(sloped, stated2, trend=along)[3]
print("slopes", slopes.round(2))
assert np.allclose(slopes, [0.8, 0], atol=0.15)
assert not _error_model(sloped[:30], stated2[:30], trend=along[:30])[3].any()  # too few stars

# %% [markdown]
# A model that counts the catalogue's noise of 3 as its own, beside an error that differs from star to star, must be seen through:

# %%
own2 = np.random.default_rng(5).uniform(0.5, 2, 20_000) ** 2
differences = np.sqrt(own2 + 9) * np.random.default_rng(6).standard_normal(20_000)
inflation, floor, _, _, base = _error_model(differences, own2 + 9, np.full(20_000, 9.0))
found2 = inflation * beyond_base(own2 + 9, base) + floor
print(
    f"base {base:.1f}; mean variance about the truth {found2.mean():.2f}, put in {own2.mean():.2f}"
)
assert abs(found2.mean() / own2.mean() - 1) < 0.25
assert found2[own2 > 3].mean() > 2 * found2[own2 < 1].mean()

# %%
problem = _Variance(sloped**2 / np.mean(sloped**2), stated2, catalogue2, along)
at = np.array([-0.5, 0.3, 0.2, 0.4, -0.2])
steps = 1e-6 * np.eye(5)
by_differences = [(problem.cost(at + h)[0] - problem.cost(at - h)[0]) / 2e-6 for h in steps]
assert np.allclose(problem.cost(at)[1], by_differences, atol=1e-7)

# %%
#| export
_LARGEST_ERROR = 1e30  # of a label, in any unit: its square is still a number


def _stated(model, catalogue_error, stars):
    "Variance (N, K) that a catalogue states; None for none. LabError for another shape."
    if catalogue_error is None:
        return [None] * len(model.label_names_)
    stated = number_array(catalogue_error, "the catalogue's errors").astype(float)
    if stated.shape != (stars, len(model.label_names_)):
        raise LabError(
            f"the catalogue's errors have the shape {stated.shape}: one for each of {stars} stars "
            f"and {len(model.label_names_)} labels is needed"
        )
    unknown = ~(np.isfinite(stated) & (stated >= 0))
    if np.any(stated[~unknown] > _LARGEST_ERROR):
        raise LabError(
            f"the catalogue's errors go up to {stated[~unknown].max():g}: give them in the labels' "
            "units, and NaN where there is none"
        )
    if unknown.any():  # such a star counts as a usual one
        usual = nan_median(np.where(unknown, np.nan, stated), axis=0)
        stated = np.where(unknown, np.nan_to_num(usual), stated)
    return stated.T**2


# %% [markdown]
# Labels err together: a star that is taken for too hot is taken for too large in $\log g$ as well. The formal covariance knows the part of this that comes from the pixels' noise. The floors get the correlation that the
# left-out stars' differences show, each divided by its error. A few wild stars must not decide it, so differences count as three errors at most; and of few stars it is drawn towards none at all, as far as the number
# of stars asks for ([oracle approximating shrinkage](https://scikit-learn.org/stable/modules/covariance.html)).

# %%
#| export
_WILD = 3  # errors; a difference beyond counts as this in the correlation


def _calibrated2(model, formal2, labels):
    "Calibrated variances (N, K) of formal ones; a model that states none has its floor."
    variances = np.nan_to_num(formal2)[:, :, None] * np.eye(formal2.shape[1])
    return np.einsum("nkk->nk", apply_error_model(model, variances, labels))


def _correlation(pulls):
    "How pulls (N, K) go together, (K, K); None where there is one label, or too few stars."
    from sklearn.covariance import oas  # brings the linear models, which nothing else here needs

    pulls = pulls[np.isfinite(pulls).all(axis=1)]
    if pulls.shape[1] < 2 or len(pulls) < _LEAST_STARS:
        return None
    covariance, _ = oas(np.clip(pulls, -_WILD, _WILD), assume_centered=True)
    spread = np.sqrt(np.diag(covariance))
    return np.clip(covariance / spread[:, None] / spread, -1, 1)


# %%
together = np.random.default_rng(7).multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], 1000)
together[-10:] = [50, -50]  # ten stars of another kind: unclipped, they would give -0.9
for stars in (990, 20, 1000):
    print(f"the first {stars} stars: correlation {_correlation(together[:stars])[0, 1]:.2f}")
assert 0.6 < _correlation(together)[0, 1] < _correlation(together[:-10])[0, 1] < 0.85
assert abs(_correlation(together[:20])[0, 1]) < 0.85 and _correlation(together[:5]) is None


# %%
#| export
def with_error_model(
    model: LabelModel, table: QTable, truth, catalogue_error=None, by_label: bool = True
) -> LabelModel:
    """Learn from left-out stars how large the errors really are.

    Parameters
    ----------
    model : LabelModel
        fitted
    table : QTable
        `infer` of stars left out of training, with formal errors; where the model has none (NaN),
        the floor is all
    truth : (N, K) array
        their catalogue labels
    catalogue_error : (N, K) array, optional
        errors that the catalogue states for these labels. With them the model's errors are about
        the true label on the catalogue's scale; without, about a label of the catalogue, whose
        noise is then part of them
    by_label : bool, default True
        may errors grow with the labels, where there are ten stars for each number of the error
        model? Not where whole groups were left out: a slope would be of the groups

    Returns
    -------
    LabelModel
        a copy whose errors are calibrated: variance = (inflation * formal variance + floor) *
        exp(slopes * scaled labels), see `apply_error_model`; the floors of labels that err together
        are correlated. From the same stars it knows how large chi2 may be (``fit_limit_``), and
        how much noise the catalogue has (``catalogue_noise_``, a variance for each label)

    Raises
    ------
    LabError
        where fewer than ten stars are left, the table's errors are calibrated already, negative or
        infinite, or `truth` has another shape

    Examples
    --------
    >>> from stellar_lab import Cannon, cross_label, fold_numbers, infer, with_error_model
    >>> from stellar_lab.archives import real_stars
    >>> stars = real_stars()[:150]
    >>> model = Cannon(order=1, labels=["TEFF", "LOGG", "M_H"]).fit(stars)
    >>> left_out = cross_label(model, stars, fold_numbers(len(stars), 2), progress=False)
    >>> truth = stars.labels(model.label_names_)
    >>> model = with_error_model(model, left_out, truth)
    >>> infer(model, stars[:1]).meta["errors"]
    'calibrated'
    """
    if table.meta.get("errors") == "calibrated":
        raise LabError(
            "the table's errors are calibrated already: give the answers of the model as it was "
            "before, with formal errors"
        )
    residual = _differences(table, truth, model.label_names_)
    formal = label_values(table, [f"{name}_err" for name in model.label_names_])
    impossible = (formal < 0) | np.isinf(formal)
    if impossible.any():
        raise LabError(
            f"{impossible.sum()} errors in the table are negative or infinite: give those of infer"
        )
    formal2 = formal**2
    stated2 = _stated(model, catalogue_error, len(residual))
    trend = None
    if by_label and hasattr(model, "pivots_"):
        trend = label_trend(model, label_values(table, model.label_names_))
    fits = [_error_model(*parts, trend) for parts in zip(residual.T, formal2.T, stated2)]
    inflation, floor, share, slopes, base = zip(*fits)
    model = copy.copy(model)
    for learned in (*ERROR_MODEL, "catalogue_noise_"):
        vars(model).pop(learned, None)
    model.error_inflation_ = np.array(inflation)
    model.error_floor_ = np.array(floor)
    if np.any(slopes):
        model.error_slopes_ = np.array(slopes)
    if np.any(base):
        model.error_base_ = np.array(base)
    noise2 = np.zeros(residual.shape)
    if catalogue_error is not None:
        model.catalogue_noise_ = np.array(share) * np.median(stated2, axis=1)
        noise2 = np.array(share) * np.transpose(stated2)
    seen2 = _calibrated2(model, formal2, label_values(table, model.label_names_)) + noise2
    correlation = _correlation(residual / np.sqrt(seen2))
    if correlation is not None:
        model.error_correlation_ = correlation
    if "chi2" in table.colnames:
        fit = np.asarray(table["chi2"]) / np.maximum(np.asarray(table["n_good"]), 1)
        fit = fit[np.isfinite(fit)]
        if len(fit):
            model.fit_limit_ = poor_fit_limit(fit)
    return model


# %%
#| export
def errors_about_catalogue(model: LabelModel, table: QTable) -> np.ndarray:
    """Errors about a label of the catalogue: those of a table, and the catalogue's usual noise.

    Parameters
    ----------
    model : LabelModel
        calibrated
    table : QTable
        `infer` of N stars by this model

    Returns
    -------
    (N, K) array
        1-sigma errors in the labels' units
    """
    errors = label_values(table, [f"{name}_err" for name in model.label_names_])
    return np.sqrt(errors**2 + getattr(model, "catalogue_noise_", 0))


# %% [markdown]
# An error model learned on half of the test stars is judged on the other half, which had no part in it.

# %%
train, test = train_test_rows(len(spectra))
model = Cannon(scatter=True, labels=names).fit(spectra[train])
formal = infer(model, spectra[test])
half = np.arange(len(test)) % 2 == 0
calibrated = with_error_model(model, formal[half], truth[test][half])
judged = infer(calibrated, spectra[test][~half])
within = {
    "formal": np.abs(pulls(formal[~half], truth[test][~half])) < 1,
    "calibrated": np.abs(pulls(judged, truth[test][~half])) < 1,
}
shares = {name: [f"{w[:, k].mean():.0%}" for w in within.values()] for k, name in enumerate(names)}
QTable({"errors": list(within), **shares})

# %%
#| echo: false
factor = np.std(pulls(formal, truth[test]), axis=0)
Markdown(
    "**What to see.** Share of stars within one stated error. The formal errors are "
    f"{factor.min():.0f} to {factor.max():.0f} times too small. The calibrated ones hold on stars "
    f"that took no part in finding them."
)

# %%
binomial = np.sqrt(0.68 * 0.32 / (~half).sum())
assert np.all(within["formal"].mean(axis=0) < 0.4)
share = within["calibrated"].mean(axis=0)
assert np.all(np.abs(share - 0.68) < 4 * binomial)  # both halves are samples
assert np.allclose(label_values(judged, ["teff"]), label_values(formal[~half], ["teff"]))
assert (judged.meta["errors"], formal.meta["errors"]) == ("calibrated", "formal")


# %% [markdown]
# ## Coverage
# One number per label, the share within one error, hides much: errors may hold on average, and be too small for faint stars. `coverage` counts for each group of stars, within one error and within two, where errors that are
# right have 68 % and 95 %. It needs no model, only a table of predictions, whoever made them. Labels also err together, and a covariance says how. The *Mahalanobis distance* of a star,
# $$ d^2 = (\hat{\boldsymbol\ell}-\boldsymbol\ell)^{\mathsf T}\,C^{-1}\,(\hat{\boldsymbol\ell}-\boldsymbol\ell), $$
# tests all labels at once: for a right covariance its mean is the number of labels.

# %%
#| export
def _pulls(table, truth, names):
    "Difference over error (N, K); LabError where the table states none."
    columns = [f"{name}_err" for name in names]
    missing = [name.lower() for name in columns if name.lower() not in table.colnames]
    if missing:
        raise LabError(f"the table states no errors: it has no column {', '.join(missing)}")
    errors = label_values(table, columns)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _differences(table, truth, names) / np.where(errors > 0, errors, np.nan)


def coverage(table: QTable, truth, names, by: Sequence = None) -> QTable:
    """How often the truth lies within the stated errors.

    Parameters
    ----------
    table : QTable
        predictions with a column for each label and its ``_err``, of any model
    truth : (N, K) array
        the labels to compare with
    names : str or sequence of str
        of the K labels
    by : (N,) sequence, optional
        the group of each star, such as its cluster

    Returns
    -------
    QTable
        one row per group and label: ``group``, ``label``, ``n`` stars, the shares ``inside_1`` and
        ``inside_2`` within one and two errors (0.68 and 0.95 where errors are right), and
        ``bias``, the median of difference over error

    Raises
    ------
    LabError
        where the table lacks a label or an error, or `truth` has another shape

    Examples
    --------
    >>> import numpy as np
    >>> from astropy.table import QTable
    >>> from stellar_lab.judging import coverage
    >>> table = QTable({"m_h": [0.05, 0.15, 0.5], "m_h_err": [0.1, 0.1, 0.1]})
    >>> found = coverage(table, np.zeros((3, 1)), "M_H")
    >>> float(found["inside_2"][0].round(2))
    0.67
    """
    names = name_list(names)
    pulls = _pulls(table, truth, names)
    groups = np.full(len(pulls), "all") if by is None else np.asarray(by).astype(str)
    if len(groups) != len(pulls):
        raise LabError(f"{len(groups)} groups for {len(pulls)} stars: give one for each")
    rows = []
    for group in np.unique(groups):
        some = pulls[groups == group]
        for name, values in zip(names, some.T):
            values = values[np.isfinite(values)]
            count = max(len(values), 1)
            inside = [np.count_nonzero(np.abs(values) < k) / count for k in (1, 2)]
            bias = np.median(values) if len(values) else np.nan
            rows.append((group, name, len(values), *inside, bias))
    found = QTable(rows=rows, names=["group", "label", "n", "inside_1", "inside_2", "bias"])
    for column in ("inside_1", "inside_2", "bias"):
        found[column].info.format = ".2f"
    return found


# %%
rich = np.where(truth[test][~half][:, names.index("M_H")] > -1, "[M/H] > -1", "[M/H] < -1")
coverage(judged, truth[test][~half], names, by=rich)


# %%
#| export
def mahalanobis2(table: QTable, truth, names) -> np.ndarray:
    """Squared Mahalanobis distance of each star from the truth; chi-squared of K where covariances
    are right.

    Parameters
    ----------
    table : QTable
        with the labels and their ``covariance`` (N, K, K), as from `infer`
    truth : (N, K) array
    names : str or sequence of str
        of the K labels, in the order of the covariance

    Returns
    -------
    (N,) array
        NaN where a star has no labels
    """
    difference = _differences(table, truth, name_list(names))
    covariance = np.asarray(table["covariance"], dtype=float)
    known = np.isfinite(difference).all(axis=1) & np.isfinite(covariance).all(axis=(1, 2))
    found = np.full(len(difference), np.nan)
    solved = np.linalg.solve(covariance[known], difference[known][..., None])[..., 0]
    found[known] = np.einsum("nk,nk->n", difference[known], solved)
    return found


def plot_coverage(tables: dict, truth, names, ax=None):
    """The share of stars within so many errors, compared with what it should be.

    Parameters
    ----------
    tables : dict
        title -> predictions, a curve each; all their labels are taken together
    truth : (N, K) array
    names : str or sequence of str
        of the K labels
    ax : matplotlib Axes, optional

    Returns
    -------
    matplotlib Axes
    """
    import matplotlib.pyplot as plt

    ax = plt.gca() if ax is None else ax
    sigmas = np.linspace(0, 3, 61)
    ax.plot(sigmas, erf(sigmas / np.sqrt(2)), color="k", lw=1, ls="--", label="right")
    for title, table in tables.items():
        size = np.abs(_pulls(table, truth, name_list(names))).ravel()
        size = np.sort(size[np.isfinite(size)])
        ax.plot(sigmas, np.searchsorted(size, sigmas) / max(len(size), 1), label=title)
    ax.set(xlabel="stated errors", ylabel="share of stars within", xlim=(0, 3), ylim=(0, 1))
    ax.legend()
    return ax


# %% [markdown]
# How to read such a curve is best learned from answers that we make up: right ones, some that are twice too sure, and some with a bias of one error.

# %%
use_style()
rng = np.random.default_rng(3)
made_truth = np.zeros((4000, 1))
noise = rng.standard_normal(4000)
made_up = {
    "right errors": QTable({"m_h": noise, "m_h_err": np.ones(4000)}),
    "twice too sure": QTable({"m_h": noise, "m_h_err": np.full(4000, 0.5)}),
    "biased": QTable({"m_h": noise + 1, "m_h_err": np.ones(4000)}),
}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
plot_coverage(made_up, made_truth, "M_H", axes[0]).set_title("made-up answers")
both = {"formal": formal[~half], "calibrated": judged}
plot_coverage(both, truth[test][~half], names, axes[1]).set_title("the Cannon on real giants")
axes[1].set_ylabel("");

# %% [markdown]
# **What to see.** A curve on the dashed line means errors that hold. One that lies below is too sure; a bias bends it most near zero. The Cannon's formal errors lie far below, its calibrated ones close to it: above it below one error and a little below it beyond, since a few stars are far off.

# %%
table = coverage(made_up["twice too sure"], made_truth, "M_H")
assert abs(table["inside_1"][0] - 0.383) < 0.03 and abs(table["inside_2"][0] - 0.683) < 0.03
assert abs(coverage(made_up["biased"], made_truth, "M_H")["bias"][0] - 1) < 0.06
correlated = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], 4000)
two = QTable({"teff": correlated[:, 0], "m_h": correlated[:, 1]})
two["covariance"] = np.tile([[1, 0.8], [0.8, 1]], (4000, 1, 1))
assert abs(mahalanobis2(two, np.zeros((4000, 2)), ["TEFF", "M_H"]).mean() - 2) < 0.15
with pytest.raises(LabError, match="states no errors"):
    coverage(two, np.zeros((4000, 2)), ["TEFF", "M_H"])

# %% [markdown]
# Now all labels at once. Around each star's answer lies an ellipsoid that should hold the true labels of 68 % of all stars: where $d^2$ stays below the 68 % point of chi-squared. We ask three covariances of the same errors: the calibrated one, the same with its floors taken as independent, and the same without any correlation.

# %%
apart = copy.copy(calibrated)
del apart.error_correlation_
tables = {"correlated floors": judged, "independent floors": infer(apart, spectra[test][~half])}
tables["no correlation"] = judged.copy()
tables["no correlation"]["covariance"] = judged["covariance"] * np.eye(len(names))
rows = []
for title, table in tables.items():
    distance2 = mahalanobis2(table, truth[test][~half], names)
    middle = np.nanmedian(distance2) / chi2.median(len(names))
    inside = [np.nanmean(distance2 < chi2.ppf(share, len(names))) for share in (0.68, 0.95)]
    rows.append((title, f"{middle:.2f}", *(f"{share:.0%}" for share in inside)))
Table(rows=rows, names=["covariance", "median d2 / right", "inside 68 %", "inside 95 %"])

# %% [markdown]
# **What to see.** All three hold about as many stars, as far as so few can tell, and too few at 95 %: some stars are far off, and no normal distribution has such tails. But where labels err together, the ellipsoid that knows it is the smallest. It says the same with less room.

# %%
volume = [np.nanmedian(np.linalg.slogdet(np.asarray(t["covariance"]))[1]) for t in tables.values()]
print("log volume, smaller is better:", np.round(np.array(volume) / 2, 1))
assert volume[0] < volume[1] < volume[2]
assert np.allclose(judged["teff_err"], tables["independent floors"]["teff_err"])
assert abs(float(rows[0][1]) - 1) < 0.4 and 0.5 < np.nanmean(distance2 < chi2.mean(len(names)))

# %% [markdown]
# ## On made-up answers
# Where the noise is known, the error model must find it: errors that are three times too small, on top of a scatter that no error knows.

# %%
rng = np.random.default_rng(1)
stated = rng.uniform(0.5, 2, size=(4000, len(names))) * model.scales_ / 100
floor = model.scales_ / 20
known = truth[rng.integers(len(truth), size=4000)]
noise = np.hypot(3 * stated, floor) * rng.standard_normal(stated.shape)
answers = QTable()
for k, name in enumerate(names):
    answers[name.lower()] = known[:, k] + noise[:, k]
    answers[f"{name.lower()}_err"] = stated[:, k]
learned = with_error_model(model, answers, known)
print(
    "inflation",
    learned.error_inflation_.round(1),
    "floor",
    (np.sqrt(learned.error_floor_) / floor).round(2),
)
assert np.allclose(learned.error_inflation_, 9, rtol=0.3)
assert np.allclose(np.sqrt(learned.error_floor_) / floor, 1, rtol=0.1)

# %%
with pytest.raises(LabError, match="all stars are in one group"):
    cross_label(cannon, spectra, np.zeros(len(spectra)))
with pytest.raises(LabError, match="too few for an error model"):
    with_error_model(model, formal[:5], truth[test][:5])
plt.close("all")

# %% [markdown]
# **Exercise.** Leave out whole clusters instead of folds (`groups=spectra.stars["FIELD"]`), and look at the share within one calibrated error that was learned in folds. Does it hold? Why should it not?
