# %% [markdown]
# # How many stars, how much light?
# > Learning curves of all models: what more training stars bring, what more light brings, and how near a model comes to what the photons allow.
#
# **Question.** You plan a survey. Is it better to take trusted labels of twice as many stars, or to expose twice as long? And when is a model so good that only light can make it better?
#
# **Idea.** Noise sets a limit to what a spectrum can tell. If a label changes by $\delta$, the spectrum changes by $\delta\,\partial f/\partial\ell$, and that is seen only as far as it stands out of the noise. All pixels together give the *Fisher matrix*
# $$ F = D^{\mathsf T}\,\mathrm{diag}(1/\sigma^2)\,D, \qquad D_{pk} = \partial f_p/\partial\ell_k, \qquad \sigma(\ell_k) \ge \sqrt{(F^{-1})_{kk}} . $$
# No unbiased estimate of a label has a smaller error than the last expression, whatever the model: this is the bound of Cramér and Rao. We call it the *photon limit*.
#
# You learn to compute the limit, to measure how far each model is above it, and to see whether it lacks stars or light.

# %%
#| default_exp curves

# %%
#| export
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from astropy.table import QTable, Table, vstack
from sklearn.base import clone
from sklearn.utils.validation import has_fit_parameter
from tqdm import tqdm

from stellar_lab.inversion import infer
from stellar_lab.judging import error_table
from stellar_lab.results import look_of, slug, training_digest
from stellar_lab.survey import LabError, Spectra, data_file, write_table

# %%
#| hide
import tempfile

import pytest
from IPython.display import Markdown

from stellar_lab.cannon import Cannon
from stellar_lab.mock import GIANT_STEPS, judged_giants, learning_stars, true_spectra
from stellar_lab.readers import RidgeLabels
from stellar_lab.survey import use_style

# %% [markdown]
# ## What the photons allow
# The bound needs two things: how the spectrum answers to each label, and the noise. Labels that we do not want to know count too: if carbon may vary freely, what carbon can imitate cannot be read. So $D$ has a column for everything in which stars differ, and the inverse is taken of the whole.

# %%
#| export
BRIGHTNESS = (20, 30, 50, 100, 200, 300)  # signal-to-noise ratios of the stars that are read


def photon_errors(slopes: np.ndarray, ivar: np.ndarray) -> np.ndarray:
    """Smallest errors that noise allows, by the bound of Cramér and Rao.

    Parameters
    ----------
    slopes : (N, P, K) array
        change of each star's spectrum with each of K labels, all of them free
    ivar : (N, P) array
        inverse variance of the pixels; 0 for an unusable one

    Returns
    -------
    (N, K) array
        1-sigma errors, in the labels' units; infinite for a star whose pixels leave a label open

    References
    ----------
    Rao, C. R. 1945, Bull. Calcutta Math. Soc. 37, 81
    """
    slopes = np.asarray(slopes, dtype=float)
    fisher = np.swapaxes(slopes * np.asarray(ivar, dtype=float)[..., None], 1, 2) @ slopes
    size = np.sqrt(np.einsum("nkk->nk", fisher))
    errors = np.full(size.shape, np.inf)
    for star, (matrix, unit) in enumerate(zip(fisher, size)):  # K x K each: small
        if np.all(unit > 0):
            scaled = matrix / np.outer(unit, unit)
            if np.linalg.cond(scaled) < 1e12:
                errors[star] = np.sqrt(np.diag(np.linalg.inv(scaled))) / unit
    return errors


# %% [markdown]
# Is it the limit? A toy decides. Its spectrum is a straight line in two labels, and the best estimate is then the weighted least-squares fit. From 4,000 noisy copies of one star we take the scatter of the fits.

# %%
rng = np.random.default_rng(0)
toy = rng.normal(size=(50, 2)) @ np.array([[1.0, 0.6], [0.0, 0.3]])
toy_ivar = rng.uniform(50, 200, size=50)
limit = photon_errors(toy[None], toy_ivar[None])[0]
noise = rng.normal(size=(4000, 50)) / np.sqrt(toy_ivar)
fits = np.linalg.solve((toy.T * toy_ivar) @ toy, (toy.T * toy_ivar) @ noise.T)
print("limit", limit.round(4), "scatter of the fits", fits.std(axis=1).round(4))
assert np.allclose(fits.std(axis=1), limit, rtol=0.04)

# %%
alone = photon_errors(toy[None, :, :1], toy_ivar[None])[0, 0]
print(f"with the second label known, the first has the limit {alone:.4f}")
assert alone < limit[0]
assert np.allclose(photon_errors(toy[None], 4 * toy_ivar[None])[0], limit / 2)
blind = photon_errors(np.zeros((1, 50, 2)), toy_ivar[None])
assert np.isinf(blind).all()


# %% [markdown]
# Slopes of a real or synthetic spectrum come from differences: a step to one side, a step to the other.

# %%
#| exporti
def label_slopes(draw: Callable, labels: Table, steps: Mapping) -> np.ndarray:
    """How spectra change with their labels, by central differences.

    Parameters
    ----------
    draw : callable
        table of labels -> (N, P) spectra without noise
    labels : Table
        of N stars
    steps : dict
        name of a column -> step to either side, in its unit

    Returns
    -------
    (N, P, K) array
        in the order of `steps`
    """
    slopes = []
    for name, step in steps.items():
        sides = []
        for sign in (1, -1):
            moved = labels.copy()
            moved[name] = np.asarray(labels[name], dtype=float) + sign * step
            sides.append(draw(moved))
        slopes.append((sides[0] - sides[1]) / (2 * step))
    return np.stack(slopes, axis=-1)


# %%
bent = Table({"a": [1.0, 2.0], "b": [0.0, 1.0]})


def parabola(table):
    return np.column_stack([table["a"] ** 2, table["a"] * table["b"]])


found = label_slopes(parabola, bent, {"a": 0.1, "b": 0.1})
assert np.allclose(found[1], [[4, 0], [1, 2]])
print(found[1])

# %% [markdown]
# ## Stars of every brightness
# [The synthetic survey](D_mock.ipynb) knows the noise-free spectrum of each star. So the same stars can be observed at any signal-to-noise ratio (SNR). Stars to learn from have the SNR and the noisy catalogue of a survey. Stars to judge by are single giants, and their labels are the true ones as a catalogue without noise would list them, with its trends.

# %%
train = learning_stars(430)
judged = {snr: judged_giants(90, snr)[0] for snr in BRIGHTNESS}
truth = judged_giants(90, BRIGHTNESS[0])[1]
print(f"{len(train)} stars to learn from, {len(truth)} to judge by, at {len(BRIGHTNESS)} SNRs")
names = train.label_names

# %% [markdown]
# Slopes do not depend on the noise. They are computed once.

# %%
slopes = label_slopes(true_spectra, truth, GIANT_STEPS)
columns = [list(GIANT_STEPS).index(name) for name in names]
photons = {snr: photon_errors(slopes, stars.ivar)[:, columns] for snr, stars in judged.items()}
rows = [(snr, *np.sqrt(np.mean(limit**2, axis=0))) for snr, limit in photons.items()]
shown = Table(rows=rows, names=["SNR", *names])
for name in names:
    shown[name].info.format = ".1f" if name == "TEFF" else ".4f"
shown

# %% [markdown]
# The limit must fall as the noise does, and it must be reached by a fit that knows all: from the true labels, one step of weighted least squares along the true slopes.

# %%
assert np.allclose(photons[30], 10 * photons[300], rtol=0.02)
bright = judged[100]
residual = bright.flux - true_spectra(truth)
weighted = np.swapaxes(slopes * bright.ivar[..., None], 1, 2)
step = np.linalg.solve(weighted @ slopes, weighted @ residual[..., None])[..., 0]
pulls = step[:, columns] / photons[100]
print("scatter of the steps over the limit:", pulls.std(axis=0).round(2))
assert np.all(np.abs(pulls.std(axis=0) - 1) < 5 / np.sqrt(2 * len(pulls)))


# %% [markdown]
# ## Learning curves
# Now the models. Each learns from a part of the stars, every larger part containing the smaller ones, and labels the same judged stars at every SNR. The error is the RMSE over the spread of the label, averaged over the labels, as [on the scoreboard](19_results.ipynb).

# %%
#| export
def _judged_at(model, judged):
    "Errors of a fitted model at each SNR, a row per SNR and label."
    tables = []
    names = list(model.label_names_)
    for snr, stars in judged.items():
        truth = stars.labels(names)
        errors = error_table(infer(model, stars), truth, names, truth.std(axis=0))
        errors.add_column(np.full(len(errors), snr), index=0, name="snr")
        tables.append(errors)
    return vstack(tables)


def _one_size(name, model, stars, judged, path):
    "The rows of one training: from its file if it is there, else from a training."
    if path is not None and path.exists():
        return QTable.read(path)
    quiet = {"progress": False} if has_fit_parameter(model, "progress") else {}
    rows = _judged_at(clone(model).fit(stars, **quiet), judged)
    rows.add_column(np.full(len(rows), len(stars)), index=0, name="stars")
    rows.add_column(np.full(len(rows), name, dtype="U32"), index=0, name="model")
    if path is not None:
        write_table(rows, path)
    return rows


# %%
#| export
def learning_curves(
    models: Callable,
    train: Spectra,
    judged: Mapping,
    sizes: Sequence,
    seed: int = 0,
    folder=None,
    progress: bool = True,
) -> QTable:
    """Errors of models by the number of training stars, and by the light of the stars they read.

    Parameters
    ----------
    models : callable
        number of stars -> dict of name -> estimator, not fitted; as `contestants`
    train : Spectra
        stars with the catalogue's labels
    judged : dict
        signal-to-noise ratio -> Spectra of other stars, whose labels are true
    sizes : sequence of int
        numbers of training stars; a larger set contains the smaller ones
    seed : int, default 0
        of the order in which stars are taken
    folder : str or Path, optional
        keeps each training, so that an interrupted run goes on
    progress : bool, default True
        show a bar

    Returns
    -------
    QTable
        one row per model, size, SNR and label: ``model``, ``stars``, ``snr`` and the columns of
        `error_table`

    Raises
    ------
    LabError
        where there are fewer training stars than asked for
    """
    if max(sizes) > len(train):
        raise LabError(f"{len(train)} training stars are fewer than the {max(sizes)} asked for")
    order = np.random.default_rng(seed).permutation(len(train))
    jobs = [(size, name, model) for size in sizes for name, model in models(size).items()]
    tables = []
    for size, name, model in tqdm(jobs, desc="curves", unit="training", disable=not progress):
        stars = train[np.sort(order[:size])]
        path = None
        if folder is not None:
            path = Path(folder) / f"{slug(name)}-{size}-{training_digest(model, stars)}.ecsv"
        tables.append(_one_size(name, model, stars, judged, path))
    return vstack(tables, metadata_conflicts="silent")


# %% [markdown]
# Live, two quick models:

# %%
def two_models(stars):
    return {
        "Cannon, linear": Cannon(order=1, scatter=True, labels=list(names)),
        "ridge regression": RidgeLabels(labels=list(names)),
    }


live = learning_curves(two_models, train, judged, (50, 100, 200), progress=False)
live[:2]["model", "stars", "snr", "label", "rmse", "scaled_rmse"]


# %% [markdown]
# More stars must help a model that can learn from them, more light must help any, and a run that was stopped must go on. (The linear Cannon may even get worse: it cannot bend, and with more stars it takes its own stiffness for scatter.)

# %%
def mean_error(table, **where):
    "Scaled RMSE averaged over the labels, of some rows."
    chosen = np.all([table[name] == value for name, value in where.items()], axis=0)
    return np.mean(table["scaled_rmse"][chosen])


ridge = {stars: mean_error(live, model="ridge regression", stars=stars) for stars in (50, 200)}
assert ridge[200] < 0.9 * ridge[50]
for model in two_models(50):
    assert mean_error(live, model=model, snr=300) < mean_error(live, model=model, snr=20)
with pytest.raises(LabError, match="fewer than the 5000 asked for"):
    learning_curves(two_models, train, judged, (5000,), progress=False)

# %%
with tempfile.TemporaryDirectory() as folder:
    at_100 = {100: judged[100]}
    again = [
        learning_curves(two_models, train, at_100, (50,), folder=folder, progress=False)
        for _ in range(2)
    ]
    assert len(list(Path(folder).iterdir())) == 2
assert np.allclose(again[0]["rmse"], again[1]["rmse"])
assert np.allclose(again[0]["rmse"], live["rmse"][(live["stars"] == 50) & (live["snr"] == 100)])


# %% [markdown]
# ## All models, recorded
# Eight models at six sizes and six brightnesses take more than an hour, so the figure was computed once, by `python tools/curves.py`, and the package carries what it found. The photon limit is in the table, too.

# %%
#| export
def with_photon_limit(table: QTable, judged: Mapping, photons: Mapping) -> QTable:
    """Curves with the photon limit beside each error.

    Parameters
    ----------
    table : QTable
        from `learning_curves`
    judged : dict
        signal-to-noise ratio -> Spectra, as there
    photons : dict
        signal-to-noise ratio -> (N, K) limits, from `photon_errors`, in the order of the labels

    Returns
    -------
    QTable
        a copy with the column ``photons``, the root mean square of the limits over the stars, in
        units of the label's spread
    """
    found = table.copy()
    limits = {}
    for snr, stars in judged.items():
        names = stars.label_names
        scaled = np.sqrt(np.mean(np.square(photons[snr]), axis=0)) / stars.labels(names).std(axis=0)
        limits |= {(snr, name): value for name, value in zip(names, scaled)}
    found["photons"] = [limits[int(row["snr"]), row["label"]] for row in found]
    for column in ("scaled_rmse", "photons"):
        found[column].info.format = ".4g"
    return found


def recorded_curves() -> QTable:
    """The learning curves of all models that the package carries; None where it has none.

    Returns
    -------
    QTable
        from `with_photon_limit`, with facts of the run in its meta
    """
    with suppress(LabError), data_file("curves_mock.ecsv") as path:
        return QTable.read(path, format="ascii.ecsv")


# %%
limited = with_photon_limit(live, judged, photons)
assert np.all(limited["scaled_rmse"] > 0.9 * limited["photons"])
record = recorded_curves()
Markdown(
    f"Recorded on {record.meta['date']}: {record.meta['judged']} judged stars, "
    f"{len(set(record['model']))} models, {min(record['stars'])} to {max(record['stars']):,} stars."
)


# %%
#| export
def _means(table, over, model):
    "Values of a column, and the scaled RMSE of a model averaged over the labels at each."
    rows = table[table["model"] == model]
    values = np.unique(rows[over])
    return values, [np.mean(rows["scaled_rmse"][rows[over] == value]) for value in values]


def plot_curves(table: QTable, stars: int = None, snr: float = 100):
    """Errors by number of training stars, and by light, with the photon limit.

    Parameters
    ----------
    table : QTable
        from `with_photon_limit`
    stars : int, optional
        number of training stars in the right panel; the largest by default
    snr : float, default 100
        signal-to-noise ratio in the left panel

    Returns
    -------
    Figure
    """
    import matplotlib.pyplot as plt

    stars = max(table["stars"]) if stars is None else stars
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True)
    panels = {"stars": table[table["snr"] == snr], "snr": table[table["stars"] == stars]}
    for ax, (over, rows) in zip(axes, panels.items()):
        for model in dict.fromkeys(table["model"]):
            values, errors = _means(rows, over, model)
            ax.plot(values, errors, ms=5, lw=1.1, label=model, **look_of(model))
        values = np.unique(rows[over])
        limit = [np.mean(rows["photons"][rows[over] == value]) for value in values]
        ax.plot(values, limit, "k--", lw=1.2, label="photon limit")
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(values, [f"{value:,}" for value in values])
        ax.minorticks_off()
    axes[0].set(xlabel=f"training stars (read at SNR {snr})", ylabel="scaled RMSE")
    axes[1].set(xlabel=f"SNR of the stars read ({stars:,} training stars)")
    ticks = (0.02, 0.05, 0.1, 0.2, 0.5, 1)
    axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return fig


# %%
use_style()
fig = plot_curves(record)

# %%
#| echo: false
most = max(record["stars"])
whole = {name: mean_error(record, model=name, stars=most) for name in set(record["model"])}
best = min(whole, key=whole.get)
above = {
    snr: mean_error(record, model=best, stars=most, snr=snr)
    / np.mean(record["photons"][record["snr"] == snr])
    for snr in (20, 300)
}
Markdown(
    f"**What to see.** A plain Cannon has soon learned all that it can, and more stars do not "
    "help it; latents go on learning. For bright stars the best, "
    f"{best}, is {above[300]:.1f} times above the photon limit: more stars would still help it. "
    "For faint ones it lies below the limit."
)

# %% [markdown]
# How can that be? The bound holds for estimates without bias. A model that has seen many stars knows which labels occur together, and where a spectrum says little it answers what is usual. That is a bias towards the mean, and for a typical star it is a good guess.
#
# The record must be of the code at hand. The photon limit of these stars is the recorded one, as far as so few stars tell; with all its stars every model is the better the more light there is; and where light abounds none is better than the photons allow.

# %%
at = record[(record["model"] == "Cannon") & (record["stars"] == most)]
for row in at[at["snr"] == 100]:
    spread = judged[100].labels([row["label"]])[:, 0].std()
    here = np.sqrt(np.mean(photons[100][:, list(names).index(row["label"])] ** 2)) / spread
    assert 0.6 < here / row["photons"] < 1.6, row["label"]
for model in whole:
    errors = [mean_error(record, model=model, stars=most, snr=snr) for snr in BRIGHTNESS]
    assert np.all(np.diff(errors) < 0)
    limit = [np.mean(record["photons"][record["snr"] == snr]) for snr in BRIGHTNESS]
    assert np.all(np.array(errors[3:]) > np.array(limit[3:]))

# %% [markdown]
# **Exercise.** Your stars have SNR 100, and 800 of them have trusted labels. Use the figure to decide for latents: labels for 1,200 more, or exposures four times as long, which double the SNR?
