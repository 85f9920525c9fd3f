# %% [markdown]
# # What if the catalogue errs?
# > Labels have gaps, and labels have noise: how a catalogue is completed by the spectra themselves, and how lines get back the strength that noisy labels took from them.
#
# **Question.** A model learns from labels that others measured. Some are missing, and all have errors. What does that do to the model, and what can be done?
#
# **Idea.** A spectrum that resembles many others has their labels, too. So [the Gaussian process on latents](17_latents.ipynb) has a second opinion of each training star, to which the star's own label contributed nothing. Where the catalogue is
# silent, the second opinion stands in; where both speak, they are averaged.
#
# You learn to train on stars that lack labels, why noise in a label weakens the lines that belong to it, and a trick that takes the noise out again by adding more of it.

# %%
#| default_exp gaps

# %%
#| export
from collections.abc import Sequence

import numpy as np
from sklearn.base import clone

from stellar_lab.latents import LatentLabels
from stellar_lab.models import name_list
from stellar_lab.survey import LabError, Spectra

# %%
#| hide
import matplotlib.pyplot as plt
import pytest
from astropy.table import Table

from stellar_lab.cannon import Cannon
from stellar_lab.inversion import infer
from stellar_lab.judging import error_table
from stellar_lab.models import train_test_rows
from stellar_lab.normalize import training_set
from stellar_lab.survey import archive_record, archive_root, label_record, use_style


# %% [markdown]
# ## Two opinions
# The catalogue says $c$ with the noise $\sigma_c$, the other stars say $m$ with the error $\sigma_m$. The best that can be said of both is the mean weighted by the inverse variances,
# $$ \ell = \frac{c/\sigma_c^2+m/\sigma_m^2}{1/\sigma_c^2+1/\sigma_m^2}, \qquad \sigma^{-2} = \sigma_c^{-2}+\sigma_m^{-2} . $$
# A label that is missing has no weight.

# %%
#| export
def _weighted(values, noise, opinion, error):
    "Mean of two opinions (N, K) by their variances, and its error; NaN in values weighs nothing."
    weight = np.where(np.isfinite(values), noise**-2.0, 0)
    other = error**-2.0
    mean = (weight * np.nan_to_num(values) + other * opinion) / (weight + other)
    return mean, (weight + other) ** -0.5


# %%
mean, error = _weighted(np.array([[1.0, np.nan]]), np.array([1.0, 1.0]), np.zeros((1, 2)), 1.0)
print("means", mean, "errors", error.round(2))
assert np.allclose(mean, [[0.5, 0]]) and np.allclose(error, [[0.5**0.5, 1]])


# %%
#| export
def complete_labels(
    spectra: Spectra, labels: Sequence = None, latents: int = 40, progress: bool = False
) -> Spectra:
    """Stars with labels that their spectra complete and clean.

    Parameters
    ----------
    spectra : Spectra
        N stars with labels, NaN where the catalogue has none; each label is known of ten at least
    labels : sequence of str, optional
        names of the labels; by default all that the stars have
    latents : int, default 40
        of the `LatentLabels` that learns from them
    progress : bool, default False
        show bars

    Returns
    -------
    Spectra
        the same stars. Each label is the mean of the catalogue's and of what all other stars say of
        such a spectrum, weighted by their variances; ``<label>_ERR`` is the error of this mean

    Raises
    ------
    LabError
        where a label is known of too few stars

    Notes
    -----
    To train on, not to judge by: the labels of different stars are no longer independent.

    Examples
    --------
    >>> import numpy as np
    >>> from stellar_lab.archives import real_stars
    >>> from stellar_lab.gaps import complete_labels
    >>> stars = real_stars()[:100]
    >>> stars.stars["M_H"][::2] = np.nan
    >>> complete = complete_labels(stars, ["TEFF", "M_H"], latents=10)
    >>> bool(np.isfinite(complete.labels(["M_H"])).all())
    True
    """
    names = list(spectra.label_names if labels is None else name_list(labels))
    model = LatentLabels(latents=latents, labels=names).fit(spectra, progress=progress)
    names = model.label_names_
    noise = np.maximum(model.noise(), 1e-6 * model.scales_)
    found, errors = _weighted(spectra.labels(names), noise, *model.opinions(spectra))
    stars = spectra.stars.copy()
    for name, values, error in zip(names, found.T, errors.T):
        stars[name] = values
        stars[f"{name}_ERR"] = error
    return spectra.replace(stars=stars)


# %% [markdown]
# ## Half of all labels
# We take real labels away, half of them at random, and complete what is left. The picture shows the gaps only: what stood there, and what the spectra put in its place.

# %%
use_style()
record = archive_record(archive_root())
names = list(record.labels)
spectra, _ = training_set(archive_root(), progress=False)
train, test = train_test_rows(len(spectra))
known = spectra[train].labels(names)
gaps = np.random.default_rng(3).random(known.shape) < 0.5
holed = spectra[train].stars.copy()
for name, lacks in zip(names, gaps.T):
    holed[name] = np.where(lacks, np.nan, holed[name])
complete = complete_labels(spectra[train].replace(stars=holed), names)
filled = complete.labels(names)

# %%
rows = (len(names) + 2) // 3
fig, axes = plt.subplots(rows, 3, figsize=(9, 2.9 * rows), squeeze=False)
for ax, label, k in zip(axes.flat, map(label_record, names), range(len(names))):
    ax.plot(known[gaps[:, k], k], filled[gaps[:, k], k], ".", ms=4)
    ends = [known[:, k].min(), known[:, k].max()]
    ax.plot(ends, ends, "k", lw=0.8)
    ax.set(xlabel=f"removed: {label.axis}", ylabel="filled in")
for ax in axes.flat[len(names) :]:
    ax.set_axis_off()

# %% [markdown]
# **What to see.** Gaps in temperature, gravity and metals are filled almost as well as a catalogue fills them. Where a label hardly shows in the spectrum, the fill is drawn to the mean: the spectra do not know.
#
# A Cannon cannot learn from stars with gaps. From the completed ones it can. What does the loss of half of all labels cost, on test stars that keep theirs?

# %%
catalogue = spectra[test].labels(names)
scales = known.std(axis=0)


def mean_error(model):
    "Scaled RMSE of the test stars, averaged over the labels."
    return error_table(infer(model, spectra[test]), catalogue, names, scales)["scaled_rmse"].mean()


with pytest.raises(LabError, match="lack a label"):
    Cannon(labels=names).fit(spectra[train].replace(stars=holed))
whole = mean_error(Cannon(scatter=True, labels=names).fit(spectra[train]))
half = mean_error(Cannon(scatter=True, labels=names).fit(complete))
print(f"scaled RMSE {whole:.3f} with all labels, {half:.3f} with half: {half / whole:.2f} times")
assert half / whole < (1.15 if record.name == "mock" else 1.35)

# %% [markdown]
# ## Noise weakens lines
# Errors of labels do another harm. Suppose that a line grows with silicon, and that the catalogue's silicon is noisy. Stars that the catalogue calls rich are, on average, less rich than it says, and those it calls poor less poor. So the line
# seems to grow more slowly than it does. Statisticians call it *attenuation*. It does not shrink with more stars.
#
# The cure sounds absurd: add *more* noise. With twice the noise the lines get weaker, with three times weaker yet. The trend can be followed back, to no noise at all. This is *simulation and extrapolation* (Cook and Stefanski 1994, JASA 89, 1314).

# %%
#| export
_ADDED = (0.5, 1.0, 1.5, 2.0)  # variance of the noise added, in units of that of the catalogue
_DRAWS = 3
_DEGREE = 2  # of the polynomial that is followed back


def _back_to_none(values, added, degree=_DEGREE):
    "Values (S, …) at some added variance, followed back to where the noise is gone, at -1."
    powers = np.vander(np.asarray(added, float), degree + 1)
    weights = np.vander([-1.0], degree + 1)[0] @ np.linalg.pinv(powers)
    return np.tensordot(weights, values, axes=1)


# %%
line = np.array([1 / (1 + 0.1 * (1 + added)) for added in (0, *_ADDED)])  # of strength 1
followed = _back_to_none(line, (0, *_ADDED))
print(f"seen at {line[0]:.2f} of its strength, followed back to {followed:.3f}")
assert abs(followed - 1) < 0.01 < 1 - line[0]


# %%
#| export
def without_attenuation(model, spectra: Spectra, label_errors=None, seed: int = 0):
    """A Cannon whose lines have the strength that they would have without noise in the labels.

    Parameters
    ----------
    model : Cannon
        its parameters count; it is cloned, not changed
    spectra : Spectra
        N stars with labels
    label_errors : (N, K) array, optional
        1 sigma of each label, in its unit; by default what the stars' catalogue states
    seed : int, default 0
        of the noise that is added

    Returns
    -------
    Cannon
        fitted; coefficients are extrapolated, scatter and all else are those of a plain fit

    Raises
    ------
    LabError
        where the errors are unknown for some star, or have another shape

    Notes
    -----
    Simulation and extrapolation: Cook and Stefanski 1994, JASA 89, 1314. It takes 13 fits.
    """
    fitted = clone(model).fit(spectra)
    names = fitted.label_names_
    labels = spectra.labels(names)
    errors = spectra.label_errors(names) if label_errors is None else np.asarray(label_errors)
    if errors.shape != labels.shape or not np.all(np.isfinite(errors) & (errors >= 0)):
        raise LabError(
            f"label_errors have the shape {errors.shape}, the labels {labels.shape}: give the "
            "error of each label of each star, no one negative or unknown"
        )
    rng = np.random.default_rng(seed)
    again = clone(model).set_params(pivots=fitted.pivots_, scales=fitted.scales_)
    found = [np.nan_to_num(fitted.theta_)]
    for added in _ADDED:
        theta = 0
        for _ in range(_DRAWS):
            noisy = labels + np.sqrt(added) * errors * rng.standard_normal(labels.shape)
            theta = theta + again.fit(noisy, spectra.flux, spectra.ivar, names).theta_
        found.append(np.nan_to_num(theta / _DRAWS))
    cured = _back_to_none(np.array(found), (0, *_ADDED))
    fitted.theta_ = np.where(fitted.usable_[:, None], cured, np.nan)
    return fitted


# %% [markdown]
# To see it we need labels without noise, and take those of the archive for such. One label gets noise as large as 40 % of its spread. How strong are its lines in each model, compared with the lines from the labels as they were?

# %%
victim = 3
added = np.zeros(known.shape)
added[:, victim] = 0.4 * scales[victim]
noisy = known + added * np.random.default_rng(4).standard_normal(known.shape)
stars = spectra[train].stars.copy()
stars[names[victim]] = noisy[:, victim]
blurred = spectra[train].replace(stars=stars)
straight = Cannon(order=1, labels=names)
models = {
    "right labels": clone(straight).fit(spectra[train]),
    "noisy labels": clone(straight).fit(blurred),
    "followed back": without_attenuation(straight, blurred, added),
}


# %%
def line_strength(model):
    "Slopes with the victim, projected on those from the right labels."
    slopes = {}
    for name, one in {"right": models["right labels"], "this": model}.items():
        slopes[name] = np.nan_to_num(one.derivative(known.mean(axis=0)[None])[0, victim])
    return slopes["this"] @ slopes["right"] / (slopes["right"] @ slopes["right"])


strength = {name: line_strength(model) for name, model in models.items()}
shown = np.round(list(strength.values()), 2)
Table({"labels": list(strength), f"strength of the lines of {names[victim]}": shown})

# %%
lost = 1 - strength["noisy labels"]
assert lost > 0.1 and abs(1 - strength["followed back"]) < 0.5 * lost
nothing = without_attenuation(straight, spectra[train][:60], np.zeros((60, len(names))))
assert np.allclose(nothing.theta_, clone(straight).fit(spectra[train][:60]).theta_, equal_nan=True)
with pytest.raises(LabError, match="give the error of each label"):
    without_attenuation(straight, spectra[train], added[:, :2])

# %% [markdown]
# **What to see.** Noise takes a part of the lines' strength, and the extrapolation gives it back and a little more: a number above 1 says that it overshoots. What is wrong afterwards is less than half of what was wrong before. The trend that it follows is a guess: noise as large as the label's own spread cannot be undone.
#
# **Exercise.** Take the errors that the catalogue itself states for the stars at hand. Which label's lines get stronger, and do the test stars gain by it?
