# %% [markdown]
# # Do the stars lie where stars can be?
# > The Kiel diagram: temperature against gravity, over the lines on which theory lets stars of one age and metallicity lie.
#
# **Question.** We have labels from spectra, and a table says how far they are from the catalogue's. But the catalogue may be wrong. Is there a
# judge who has never seen a spectrum?
#
# **Idea.** A star cannot have any temperature and gravity it likes: all stars of one age and composition lie on one line, the *isochrone* of
# [the chapter before](09_isochrones.ipynb). Plot $\log g$ against $T_\mathrm{eff}$ (the diagram is named after Kiel, where it was first drawn),
# colour by metallicity, and each star should lie on the line of its colour. Metals make a giant's envelope opaque, and an opaque envelope is large
# and cool: the colours must run sideways.
#
# You learn to draw this diagram, to measure how far a star is from a line in it, and what such a judge says of predicted, catalogue and random
# labels. You need [the isochrones](09_isochrones.ipynb) and [the inversion](06_inversion.ipynb).

# %%
#| default_exp kiel

# %%
#| export
from collections.abc import Sequence

import astropy.units as u
import matplotlib.pyplot as plt
import numpy as np
from astropy.table import QTable
from matplotlib import patheffects

from stellar_lab.models import in_blocks
from stellar_lab.survey import LABELS, LabError, label_records

# %%
#| hide
from astropy.table import Table
from IPython.display import Markdown
from scipy.stats import wilcoxon

from stellar_lab.archives import clusters
from stellar_lab.cannon import Cannon
from stellar_lab.inversion import infer
from stellar_lab.isochrones import isochrone, total_metallicity
from stellar_lab.judging import cross_label
from stellar_lab.models import fold_numbers, train_test_rows
from stellar_lab.normalize import training_set
from stellar_lab.survey import archive_record, archive_root, use_style

# %% [markdown]
# ## The diagram
# Temperature runs to the left and gravity downwards, as in the diagrams of astronomers since Hertzsprung. The axes are those of the original lab
# (6000 to 3000 K, 6 to -0.5), and so is the colour where the label is [Fe/H] (-0.8 to 0.5); for another metallicity it is the range in which plots
# show that label. Isochrones are drawn in the colour of their own metallicity, so a star should sit on a line of its colour. They have a gap: after
# the helium flash at the tip of the branch (EEP 604 to 631) a star falls to the clump within a million years or two, and nobody is caught there.

# %%
#| export
_COLOR_RANGES = {"FE_H": (-0.8, 0.5)}  # of the original lab; other labels: their plot range
_FLASH = (604, 631)  # EEPs between which a star falls from the tip of the branch to the clump


def _metallicity_label(names: Sequence) -> str:
    """The label that colours the diagram.

    Parameters
    ----------
    names : sequence of str
        The labels at hand.

    Returns
    -------
    str
        FE_H, else M_H.

    Raises
    ------
    LabError
        Where there is neither.
    """
    found = [name for name in ("FE_H", "M_H") if name in names]
    if not found:
        raise LabError(
            "a Kiel diagram is coloured by metallicity, "
            f"but the labels are {', '.join(names)}: FE_H or M_H is needed"
        )
    return found[0]


def _color_range(metallicity, chosen):
    "Lowest and highest metallicity of the colours."
    if chosen is not None:
        return chosen
    return _COLOR_RANGES.get(metallicity, label_records(metallicity)[0].plot_range)


# %%
assert _metallicity_label(["TEFF", "LOGG", "M_H"]) == "M_H"
_color_range("FE_H", None), _color_range("M_H", None)


# %% [markdown]
# A line is one colour, with a dark rim so that it can be seen on white. NaN makes the gap.

# %%
#| export
def _draw_isochrone(ax, line, low, high):
    "One isochrone in the colour of its metallicity, without the fall after the helium flash."
    share = (line["FE_H"][0].value - low) / (high - low)
    falling = (line["EEP"] > _FLASH[0]) & (line["EEP"] < _FLASH[1])
    ax.plot(
        np.where(falling, np.nan, line["TEFF"].value),
        line["LOGG"].value,
        color=plt.get_cmap("viridis")(np.clip(share, 0, 1)),
        lw=1.2,
        path_effects=[patheffects.withStroke(linewidth=2, foreground="0.25")],
    )


# %%
use_style()
fig, ax = plt.subplots(figsize=(4, 3.4))
for feh in (-1, -0.5, 0, 0.5):
    _draw_isochrone(ax, isochrone(6, feh), -1, 0.5)
ax.set(xlim=(6000, 3000), ylim=(6, -0.5), title="6 Gyr, [Fe/H] from -1 to 0.5")
ax.set(xlabel=LABELS["TEFF"].axis, ylabel=LABELS["LOGG"].axis);

# %% [markdown]
# Now the stars on top.

# %%
#| export
_TEFF_LIMITS = (6000, 3000)  # [K], left and right
_LOGG_LIMITS = (6, -0.5)  # [dex], bottom and top
_LIMITS = (_TEFF_LIMITS, _LOGG_LIMITS)  # the axes of the original lab


def plot_kiel(
    labels: np.ndarray,
    metallicity: str = "FE_H",
    isochrones: Sequence = (),
    limits: tuple | None = _LIMITS,
    color_range: tuple | None = None,
    ax=None,
    **points,
):
    """Kiel diagram of stars over isochrones.

    Parameters
    ----------
    labels : array (N, 3)
        Teff [K], log g [dex], metallicity [dex].
    metallicity : str, default "FE_H"
        Name of the third label.
    isochrones : sequence of QTable, optional
        Lines to draw below the stars, from `isochrones.isochrone`.
    limits : pair of pairs, optional
        (left, right) in kelvin and (bottom, top) in dex; None fits the stars.
    color_range : pair, optional
        Lowest and highest metallicity of the colours.
    ax : Axes, optional
    **points
        Style of the stars, for `Axes.scatter`.

    Returns
    -------
    Axes
        The scatter, for a colour bar, is `ax.collections[-1]`.
    """
    ax = plt.subplots(figsize=(4.5, 4.5))[1] if ax is None else ax
    teff, logg, metals = np.asarray(labels, dtype=float).T
    low, high = _color_range(metallicity, color_range)
    for line in isochrones:
        _draw_isochrone(ax, line, low, high)
    style = {"cmap": "viridis", "s": 14, "edgecolors": "k", "linewidths": 0.25, "zorder": 3}
    ax.scatter(teff, logg, c=metals, vmin=low, vmax=high, **(style | points))
    if limits is None:
        teff_limits = (np.nanmax(teff) + 150, np.nanmin(teff) - 150)
        limits = (teff_limits, (np.nanmax(logg) + 0.3, np.nanmin(logg) - 0.3))
    ax.set(xlim=limits[0], ylim=limits[1])
    ax.set(xlabel=LABELS["TEFF"].axis, ylabel=LABELS["LOGG"].axis)
    return ax


# %% [markdown]
# The archive at hand, as the original lab did it: a model learns from 67 % of the stars and labels the others, and these are drawn over isochrones of
# 6 Gyr.

# %%
record = archive_record(archive_root())
names = list(record.labels)
metal = _metallicity_label(names)
spectra, ledger = training_set(archive_root(), progress=False)
train, test = train_test_rows(len(spectra))
table = infer(Cannon(scatter=True, labels=names).fit(spectra[train]), spectra[test])

# %%
KIEL = ["TEFF", "LOGG", metal]
predicted = np.column_stack([table[name.lower()].value for name in KIEL])
catalogue = spectra[test].labels(KIEL)
lab_lines = [isochrone(6, 0), isochrone(6, -1)]
ax = plot_kiel(predicted, metal, lab_lines)
ax.figure.colorbar(ax.collections[-1], label=LABELS[metal].axis)
ax.set_title("predicted labels");

# %% [markdown]
# ## One arrow per star
# The eye compares clouds, not stars. So a second kind of picture, zoomed to the stars, draws an arrow for each star from where our label puts it to
# where the catalogue's does. Lengths are measured in units of 100 K and 0.2 dex, about the error of a good spectroscopic label: a shift of more than
# three such units makes an outlier.

# %%
#| export
_SCALE = (100.0, 0.2)  # K, dex: one unit of distance in the diagram
_OUTLIER = 3.0  # a star that moves by more than this many units is an outlier


def _shift_length(predicted: np.ndarray, catalogue: np.ndarray) -> np.ndarray:
    """How far apart two sets of labels put each star in the diagram.

    Parameters
    ----------
    predicted, catalogue : array (N, K)
        Labels, the first two Teff [K] and log g [dex].

    Returns
    -------
    array (N,)
        In units of 100 K and 0.2 dex.
    """
    shift = (np.asarray(predicted, dtype=float) - catalogue)[:, :2] / _SCALE
    return np.hypot(*shift.T)


# %%
shift = _shift_length(predicted, catalogue)
print(f"median {np.median(shift):.2f} units, {np.count_nonzero(shift > _OUTLIER)} outliers")
assert np.mean(shift > _OUTLIER) < 0.05
assert _shift_length(catalogue, catalogue).max() == 0
assert np.isclose(_shift_length(catalogue + np.array([100, 0, 0]), catalogue), 1).all()


# %%
#| export
def _plot_shifts(
    predicted: np.ndarray,
    catalogue: np.ndarray,
    metallicity: str = "FE_H",
    isochrones: Sequence = (),
    color_range: tuple | None = None,
    ax=None,
):
    """An arrow per star, from its predicted to its catalogue labels, outliers circled.

    Parameters
    ----------
    predicted, catalogue : array (N, 3)
        Teff [K], log g [dex], metallicity [dex].
    metallicity, isochrones, color_range, ax
        As for `plot_kiel`.

    Returns
    -------
    Axes
        Its title counts the outliers.
    """
    both = np.concatenate([predicted, catalogue])
    ax = plot_kiel(both, metallicity, isochrones, limits=None, color_range=color_range, ax=ax, s=0)
    teff, logg, metals = np.transpose(predicted)
    d_teff, d_logg, _ = np.transpose(np.asarray(catalogue) - predicted)
    colors = {"clim": ax.collections[-1].get_clim(), "cmap": "viridis"}
    in_data_units = {"angles": "xy", "scale_units": "xy", "scale": 1}
    ax.quiver(teff, logg, d_teff, d_logg, metals, width=0.003, zorder=3, **colors, **in_data_units)
    far = _shift_length(predicted, catalogue) > _OUTLIER
    circle = {"facecolors": "none", "edgecolors": "crimson", "linewidths": 1.2}
    ax.scatter(teff[far], logg[far], s=45, zorder=4, **circle)
    ax.set_title(f"predicted → catalogue: {far.sum()} outliers of {len(teff)}")
    return ax


# %%
_plot_shifts(predicted, catalogue, metal);


# %% [markdown]
# ## Side by side
# Predicted and catalogue labels of the same stars on the same axes, and the arrows between them.

# %%
#| export
def _off_the_axes(labels, limits):
    "How many stars lie outside the axes, or have no labels."
    left, right = sorted(limits[0])
    bottom, top = sorted(limits[1])
    teff, logg = labels[:, 0], labels[:, 1]
    inside = (teff > left) & (teff < right) & (logg > bottom) & (logg < top)
    return np.count_nonzero(~inside)


def kiel_diagrams(
    predicted: np.ndarray,
    catalogue: np.ndarray,
    metallicity: str = "FE_H",
    isochrones: Sequence = (),
    limits: tuple = _LIMITS,
    color_range: tuple | None = None,
):
    """The two diagrams of the original lab side by side, and the shifts between them.

    Parameters
    ----------
    predicted, catalogue : array (N, 3)
        Teff [K], log g [dex], metallicity [dex].
    metallicity, isochrones, limits, color_range
        As for `plot_kiel`.

    Returns
    -------
    Figure
    """
    fig, panels = plt.subplot_mosaic("pc;ss", figsize=(7.5, 7.8), height_ratios=(1, 1.25))
    axes = list(panels.values())
    for ax, (name, labels) in zip(axes, {"predicted": predicted, "catalogue": catalogue}.items()):
        plot_kiel(labels, metallicity, isochrones, limits, color_range, ax)
        off = _off_the_axes(labels, limits)
        ax.set_title(f"{name} labels" + (f", {off} off the axes" if off else ""))
    _plot_shifts(predicted, catalogue, metallicity, isochrones, color_range, axes[2])
    axis = label_records(metallicity)[0].axis
    fig.colorbar(axes[1].collections[-1], ax=axes, label=axis, pad=0.01)
    return fig


# %%
kiel_diagrams(predicted, catalogue, metal, lab_lines);

# %%
moved = np.median(predicted - catalogue, axis=0)
along = np.mean(np.prod((predicted - catalogue)[:, :2], axis=1) > 0)
Table(
    {
        "predicted - catalogue": [
            "test stars",
            "median shift [100 K, 0.2 dex]",
            f"outliers (more than {_OUTLIER:g})",
            "median difference [K]",
            "median difference [dex]",
            "arrows along the branch",
        ],
        "value": [
            f"{len(test)}",
            f"{np.median(shift):.2f}",
            f"{np.count_nonzero(shift > _OUTLIER)}",
            f"{moved[0]:+.0f}",
            f"{moved[1]:+.2f}",
            f"{along:.0%}",
        ],
    }
)

# %% [markdown]
# **What to see.** The colours run sideways in both diagrams: metal-poor stars are on the hot side. Most arrows point along the branch: temperature and
# gravity err together, because both follow from the same lines. An error along the branch is the one that this diagram forgives.

# %% [markdown]
# The same axes for both diagrams, the same colours, and an outlier that we plant is counted:

# %%
planted = predicted.copy()
planted[0, 0] = catalogue[0, 0] + 1500
fig = kiel_diagrams(planted, catalogue, metal, lab_lines)
left, right, arrows = fig.axes[:3]
assert left.get_xlim() == right.get_xlim() == (6000, 3000)
assert left.get_ylim() == right.get_ylim() == (6, -0.5)
assert left.collections[-1].get_clim() == right.collections[-1].get_clim()
far = np.count_nonzero(shift[1:] > _OUTLIER) + 1
assert f"{far} outliers of {len(test)}" in arrows.get_title()
plt.close(fig)

# %% [markdown]
# ## How far is a star from its isochrone?
# A cluster's stars share age and metallicity, and astronomers know both without a single spectrum of ours. So each giant of a cluster must lie on
# *one* known line, and its distance from the line is a quality number in which no spectroscopic label takes part as truth.
#
# A giant may be on its way up the branch, in the red clump, or on its second way up (the AGB); it counts as right on any of them. So the distance
# is that to the nearest point of the line after the turn-off, both axes in their units,
# $$ d^2 = \Bigl(\frac{\Delta T_\mathrm{eff}}{100\ \mathrm K}\Bigr)^2 + \Bigl(\frac{\Delta\log g}{0.2}\Bigr)^2 . $$
# The fall after the helium flash does not count, as in the pictures. Between two rows of the line lies a straight piece: the nearest *point* counts,
# not the nearest row. So we cut the line into pieces first.

# %%
#| export
# EEPs of giants, both ends included: turn-off to tip; clump to the end of the early AGB.
_BRANCHES = ((454, _FLASH[0]), (_FLASH[1], 807))


def _giant_pieces(line):
    "The straight pieces of an isochrone's giants: start and step (S, 2) in units, EEP (S,)."
    points = np.column_stack([line["TEFF"].to_value(u.K), line["LOGG"].to_value(u.dex)]) / _SCALE
    starts, ends, eep = [], [], []
    for first, last in _BRANCHES:
        rows = np.flatnonzero((line["EEP"] >= first) & (line["EEP"] <= last))
        starts.append(points[rows[:-1]])
        ends.append(points[rows[1:]])
        eep.append(np.asarray(line["EEP"])[rows[:-1]])
    start = np.concatenate(starts)
    if not len(start):
        low = min(line["EEP"], default="-")
        high = max(line["EEP"], default="-")
        raise LabError(
            f"the isochrone has no giants: it reaches from EEP {low} to {high}, "
            f"giants from {_BRANCHES[0][0]}"
        )
    return start, np.concatenate(ends) - start, np.concatenate(eep)


# %%
line = isochrone(6, 0)
start, step, eep = _giant_pieces(line)
print(f"{len(start)} pieces, the longest {np.hypot(*step.T).max():.2f} units, EEP {eep[0]} first")

# %% [markdown]
# The foot of the perpendicular on a piece lies a share $t$ along it, $t = (\mathbf p-\mathbf s)\cdot\mathbf d/\mathbf d^2$ for a star at $\mathbf p$
# and a piece from $\mathbf s$ along $\mathbf d$; where $t$ is below 0 or above 1, an end is nearest.

# %%
#| export
_STAR_BLOCK = 1024  # stars per call


def _nearest(stars, start, step, eep):
    "From the nearest point of the pieces to each star (N, 2) in units, and that point's EEP (N,)."
    away = stars[:, None] - start
    length2 = np.maximum(np.einsum("sk,sk->s", step, step), 1e-30)
    along = np.clip(np.einsum("nsk,sk->ns", away, step) / length2, 0, 1)
    away -= along[..., None] * step
    distance2 = np.einsum("nsk,nsk->ns", away, away)
    best = np.where(np.isnan(distance2), np.inf, distance2).argmin(axis=1)
    n = np.arange(len(best))
    return away[n, best], eep[best] + np.rint(np.nan_to_num(along[n, best])).astype(int)


def giant_distance(teff: np.ndarray, logg: np.ndarray, line: QTable) -> QTable:
    """Distance of stars from the giant branch of an isochrone, red clump and AGB included.

    Parameters
    ----------
    teff, logg : array (N,) or Quantity
        Temperatures [K] and gravities [dex].
    line : QTable
        An isochrone, from `isochrones.isochrone`.

    Returns
    -------
    QTable
        One row per star: distance (in units of 100 K and 0.2 dex), d_teff and d_logg (star minus
        nearest point), eep of that point. NaN for a star without labels.

    Raises
    ------
    LabError
        Where the isochrone has no giants.
    """
    pieces = _giant_pieces(line)
    stars = np.column_stack([u.Quantity(teff, u.K).value, u.Quantity(logg, u.dex).value])
    stars = stars.astype(float) / _SCALE
    away = np.empty((0, 2))
    nearest = np.empty(0, dtype=int)
    if len(stars):
        blocks = in_blocks(lambda rows: _nearest(stars[rows], *pieces), len(stars), _STAR_BLOCK)
        away, nearest = (np.concatenate(parts) for parts in zip(*blocks))
    return QTable(
        {
            "distance": np.hypot(*away.T),
            "d_teff": away[:, 0] * _SCALE[0] * u.K,
            "d_logg": away[:, 1] * _SCALE[1] * u.dex,
            "eep": nearest,
        }
    )


# %% [markdown]
# A point on the line has distance zero, also between two rows. The branch climbs at about 45 degrees in these units, so a star that is 100 K off at
# the same gravity is some 0.7 units away: half of the way back leads through the temperature, half through the gravity.

# %%
giants = line[(line["EEP"] >= 460) & (line["EEP"] < 604)]
halfway = [(giants[name][1:] + giants[name][:-1]) / 2 for name in ("TEFF", "LOGG")]
assert giant_distance(giants["TEFF"], giants["LOGG"], line)["distance"].max() < 1e-9
assert giant_distance(*halfway, line)["distance"].max() < 1e-9


# %%
def branch_teff(line, logg):
    "Temperature [K] on the first ascent of the giant branch at a gravity."
    giants = line[(line["PHASE"] == 2) & (line["LOGG"] < 3.4 * u.dex)]
    return np.interp(-logg, -giants["LOGG"].value, giants["TEFF"].value)


cooler = giant_distance([branch_teff(line, 1.2) - 100], [1.2], line)
assert 0.6 < cooler["distance"][0] < 0.8
assert -60 < cooler["d_teff"][0].value < -40
nobody = giant_distance([np.nan, 4500], [2, np.nan], line)
assert np.isnan(nobody["distance"]).all()
for name in ("distance", "d_teff", "d_logg"):
    cooler[name].info.format = ".3g"
cooler


# %% [markdown]
# The slow reference implementation: the smallest of the distances to some 200,000 points spread over the pieces.

# %%
def slow_distance(teff, logg, line, steps=600):
    "Distances by brute force."
    spread = []
    for first, last in _BRANCHES:
        rows = line[(line["EEP"] >= first) & (line["EEP"] <= last)]
        at = np.linspace(0, len(rows) - 1, steps * len(rows))
        columns = [rows[name].value for name in ("TEFF", "LOGG")]
        spread.append(
            np.column_stack([np.interp(at, np.arange(len(rows)), column) for column in columns])
        )
    points = np.concatenate(spread)
    return [np.hypot(*((points - star) / _SCALE).T).min() for star in zip(teff, logg)]


teff, logg = catalogue[:30, :2].T
fast = giant_distance(teff, logg, line)["distance"]
assert np.allclose(fast, slow_distance(teff, logg, line), atol=1e-3)

# %% [markdown]
# ## Eighteen clusters
# Each cluster has its own age and metallicity from the literature, hence its own isochrone. For globular clusters we take the isochrone of the
# [total metallicity](09_isochrones.ipynb), with [α/Fe] = 0.3 for all of them (a literature value, not ours); for open clusters [α/Fe] = 0.
#
# Every star is now labelled by a model that has not seen it, in five folds. What would labels be like that know nothing of a star? We shuffle the
# predicted labels over all stars, twenty times: still labels of real giants, but of others.

# %%
ALPHA = {"globular": 0.3, "open": 0.0}
in_folds = None
if record.name == "clusters":
    folds = fold_numbers(len(spectra))
    in_folds = cross_label(Cannon(scatter=True, labels=names), spectra, folds, progress=False)
    field_cluster = {
        field: row["CLUSTER"] for row in clusters() for field in str(row["FIELDS"]).split()
    }
    members = np.array([field_cluster[str(field).strip()] for field in spectra.stars["FIELD"]])
    rng = np.random.default_rng(6)
    shuffles = np.concatenate([rng.permutation(len(spectra)) for _ in range(20)])
    choices = {
        "predicted": np.column_stack([in_folds[name.lower()].value for name in KIEL]),
        "catalogue": spectra.labels(KIEL),
    }
    choices["shuffled"] = choices["predicted"][shuffles]


# %% [markdown]
# For each cluster we also ask how far its stars are to the side of the line, in kelvin at their own gravity. Where the line is straight, that follows
# from the perpendicular (Euclid): $d^2$ divided by its part along the temperature axis.

# %%
def sideways(away):
    "How far stars are to the side of a straight line at their own gravity [K]."
    return away["distance"] ** 2 * _SCALE[0] ** 2 / away["d_teff"].value


def one_cluster(cluster, alpha):
    "Each choice of labels against the isochrone of a cluster: the medians, and all distances."
    inside = members == cluster["CLUSTER"]
    line = isochrone(cluster["AGE"], total_metallicity(cluster["FE_H"].value, alpha))
    row = {
        "cluster": cluster["CLUSTER"],
        "age [Gyr]": cluster["AGE"].value,
        "[Fe/H]": cluster["FE_H"].value,
        "[M/H]": line["FE_H"][0].value,
        "stars": inside.sum(),
    }
    distances = {}
    for name, labels in choices.items():
        chosen = labels[np.resize(inside, len(labels))]
        away = giant_distance(chosen[:, 0], chosen[:, 1], line)
        distances[name] = away["distance"]
        row[name] = np.median(away["distance"])
        if name == "predicted":
            row["sideways [K]"] = np.median(sideways(away))
    return row, distances


# %%
def cluster_distances(alpha):
    "One row per cluster, for an [α/Fe] of each kind of cluster; and all distances of a choice."
    present = [cluster for cluster in clusters() if cluster["CLUSTER"] in members]
    results = [one_cluster(cluster, alpha[cluster["KIND"]]) for cluster in present]
    pooled = {
        name: np.concatenate([distances[name] for _, distances in results]) for name in choices
    }
    return Table([row for row, _ in results]), pooled


def tidy(table):
    "The table with sensible digits."
    for name in table.colnames[1:]:
        if table[name].dtype.kind == "f":
            table[name].info.format = ".0f" if "[K]" in name else ".2f"
    return table


# %%
if in_folds:
    distances, pooled = cluster_distances(ALPHA)
tidy(distances) if in_folds else "this table needs the embedded archive of real stars"

# %% [markdown]
# All stars together, for three choices of the isochrones of globular clusters. The last row leaves the α elements out.

# %%
if in_folds:
    _, more_alpha = cluster_distances({"globular": 0.4, "open": 0.0})
    _, iron_alone = cluster_distances({"globular": 0.0, "open": 0.0})
    assumptions = {
        "[M/H] with [α/Fe] = 0.3 (used here)": pooled,
        "[M/H] with [α/Fe] = 0.4": more_alpha,
        "[Fe/H] alone": iron_alone,
    }
    medians = {
        name: [np.median(result[name]) for result in assumptions.values()] for name in choices
    }
    summary = Table({"isochrones of globular clusters": list(assumptions)} | medians)
tidy(summary) if in_folds else "this table needs the embedded archive of real stars"

# %%
#| echo: false
text = "This archive has no clusters."
if in_folds:
    closer = np.mean(pooled["predicted"] < pooled["catalogue"])
    p_value = wilcoxon(pooled["predicted"], pooled["catalogue"]).pvalue
    text = (
        "**What to see.** The line does judge: shuffled labels are several times further from "
        "it. Predicted labels are a little nearer to theory than the catalogue's, for "
        f"{closer:.0%} of the stars (a paired Wilcoxon test: p = {p_value:.1g}). A model averages "
        "over many stars and sheds part of the noise of their labels. The α elements matter."
    )
Markdown(text)

# %%
if in_folds:
    assert np.isclose(sideways(cooler), -100, rtol=0.05)
    assert np.median(pooled["predicted"]) < 0.5
    assert np.median(pooled["predicted"]) < 1.1 * np.median(pooled["catalogue"])
    assert np.median(pooled["shuffled"]) > 2 * np.median(pooled["predicted"])
    assert np.mean(distances["shuffled"] > distances["predicted"]) > 0.9
    assert np.median(pooled["predicted"]) < np.median(iron_alone["predicted"])


# %% [markdown]
# Each cluster under its own isochrone, titled with its [Fe/H] and age; the line is black where distances are measured. Dots are predicted labels,
# crosses the catalogue's, and the number in the corner is the median distance of the dots.

# %%
def plot_cluster(ax, row):
    "One cluster's diagram."
    line = isochrone(row["age [Gyr]"], row["[M/H]"])
    ax.plot(line["TEFF"], line["LOGG"], color="0.75", lw=0.6)
    for first, last in _BRANCHES:
        branch = line[(line["EEP"] >= first) & (line["EEP"] <= last)]
        ax.plot(branch["TEFF"], branch["LOGG"], color="k", lw=0.9)
    inside = members == row["cluster"]
    crosses = {"color": "C1", "ms": 3.5, "mew": 0.7, "label": "catalogue"}
    ax.plot(*choices["catalogue"][inside, :2].T, "x", **crosses)
    ax.plot(*choices["predicted"][inside, :2].T, ".", color="C0", ms=4, label="predicted")
    ax.set_title(f"{row['cluster']}  {row['[Fe/H]']:+.2f}, {row['age [Gyr]']:.3g} Gyr", fontsize=8)
    corner = f"median {row['predicted']:.2f}"
    ax.text(0.05, 0.93, corner, transform=ax.transAxes, va="top", fontsize=8)


# %%
if in_folds:
    fig, axes = plt.subplots(6, 3, figsize=(7, 11), sharex=True, sharey=True)
    for ax, row in zip(axes.flat, distances):
        plot_cluster(ax, row)
    axes[0, 0].set(xlim=(5900, 3300), ylim=(4.2, -0.7))
    axes[0, 0].legend(frameon=False, fontsize=7, loc="lower right", handletextpad=0)
    fig.supxlabel(LABELS["TEFF"].axis)
    fig.supylabel(LABELS["LOGG"].axis)

# %%
#| echo: false
text = "This archive has no clusters."
if in_folds:
    offsets = distances["sideways [K]"]
    text = (
        "**What to see.** From the poorest cluster to the richest the lines march to the right "
        f"and the stars with them. In {np.count_nonzero(offsets < 0)} of {len(distances)} clusters "
        "the stars are cooler than the line at their gravity (column *sideways*). Two versions of "
        "MIST differ by as much, so this offset judges the theory as much as our labels."
    )
Markdown(text)

# %% [markdown]
# Predicted, catalogue and shuffled labels meet the same line, so between *them* the race is fair.
#
# **Exercise.** Take the age of a cluster as unknown and look for the one whose isochrone its giants like best. How well can giants tell an age?
# Then do the same with the metallicity: which of the two do they know better, and why did
# [the first figure of the isochrones](09_isochrones.ipynb) tell you so?
