# %% [markdown]
# # What does a network gain from noise, and from knowing it?
# > The original lab's recipe of ten thousand noisy copies, what is wrong with it, and a network that takes each pixel's error in and gives each label's error out.
#
# **Question.** A few hundred stars are little for a network of millions of weights. The spectra come with their errors $\sigma_p$. Can we turn these into more training stars? And can the network itself use them, as the Cannon does when it
# weighs each pixel by $1/\sigma_p^2$?
#
# **Idea.** A star observed again would have the same labels and another noise. So we draw such observations,
# $$ f'_p = f_p + \sigma_p\,\varepsilon_p, \qquad \varepsilon_p \sim \mathcal N(0, 1), $$
# and train on them: that is *augmentation*. What it teaches is which pixels not to trust. The second half of the chapter tells the network directly: flux and error go in together, and a pixel's error meets its own
# flux before anything is mixed.
#
# You learn to augment without fooling yourself, to see a validation loss that lies, to build layers that respect what errors mean, and to train a network by likelihood so that it says how sure it is.

# %%
#| default_exp augmentation

# %%
#| export
import math
from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import PCA

from stellar_lab.network import LabNetwork, Network, keras, tf
from stellar_lab.survey import LabError, chip_slices

# %%
#| hide
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from astropy.table import Table
from IPython.display import Markdown
from scipy.optimize import minimize

from stellar_lab.cannon import Cannon
from stellar_lab.clean import apply_cuts, read_archive
from stellar_lab.inversion import infer
from stellar_lab.judging import error_table, plot_comparison
from stellar_lab.models import label_values, train_test_rows
from stellar_lab.network import LAB_EPOCHS, epochs_within, plot_history
from stellar_lab.normalize import count_mask_bits, normalize, training_set
from stellar_lab.readers import RidgeLabels
from stellar_lab.survey import (
    Spectra,
    archive_record,
    archive_root,
    plot_spectrum,
    profile,
    use_style,
)

# %% [markdown]
# ## The original lab's recipe
# The original lab draws 10,000 stars from its training set, with replacement. A star with small errors is drawn more often: its chance is proportional to $1/(100 + \sum_p\sigma_p)$. Each draw gets fresh Gaussian noise, as large as
# its own errors. An error above 0.1 (a bad pixel) counts as 0.05. For us a bad pixel's error is infinite (`ivar = 0`), so it counts as 0.05 too, around the training mean that stands there.

# %%
#| export
_BAD_ERROR = 0.1  # an error above this ...
_BAD_JITTER = 0.05  # ... counts as this
_DRAW_OFFSET = 100  # chance of a star: 1 / (this + the sum of its errors)
_COPY_BLOCK = 256  # stars at a time, so that no second array of the whole set's size is made


def _jitter_scale(ivar):
    """The noise that a copy of a star gets, by the original lab's rule.

    Parameters
    ----------
    ivar : (N, P) array or tensor
        inverse variance, 0 where unusable

    Returns
    -------
    (N, P) array, or tensor for a tensor
        standard deviation
    """
    lib = tf if tf.is_tensor(ivar) else np
    error = lib.where(ivar > 0, lib.maximum(ivar, 1e-12) ** -0.5, np.float32(np.inf))
    return lib.where(error > _BAD_ERROR, np.float32(_BAD_JITTER), error)


def _draw_chances(ivar):
    "The chance of each star to be drawn (N,): proportional to 1 / (100 + sum of its errors)."
    starts = range(0, len(ivar), _COPY_BLOCK)
    blocks = [_jitter_scale(ivar[start : start + _COPY_BLOCK]) for start in starts]
    total = np.concatenate([block.sum(axis=1, dtype=float) for block in blocks])
    weights = 1 / (_DRAW_OFFSET + total)
    return weights / weights.sum()


# %% [markdown]
# By hand, for two stars of three pixels, the first of which has a bad pixel:

# %%
errors = np.array([[0.01, 0.02, 0.2], [0.05, 0.05, 0.05]])
by_hand = np.array([1 / (100 + 0.01 + 0.02 + 0.05), 1 / (100 + 0.15)])
print("noise", _jitter_scale(errors**-2).tolist(), "chances", _draw_chances(errors**-2).round(5))
assert np.allclose(_draw_chances(errors**-2), by_hand / by_hand.sum())


# %%
#| export
def _noisy_copies(flux: np.ndarray, ivar: np.ndarray, n: int = 10_000, seed: int = 42) -> tuple:
    """The original lab's augmented training set: stars drawn by their chances, each copy jittered.

    Parameters
    ----------
    flux : (N, P) array
        bad pixels filled
    ivar : (N, P) array
        inverse variance, 0 where unusable
    n : int, default 10,000
        copies
    seed : int, default 42

    Returns
    -------
    rows : (n,) int array
        the stars drawn
    copies : (n, P) float32 array
        their flux, each with noise of its own
    """
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(flux), size=n, p=_draw_chances(ivar))
    copies = rng.standard_normal((n, flux.shape[1]), dtype=np.float32)
    for start in range(0, n, _COPY_BLOCK):
        block = slice(start, start + _COPY_BLOCK)
        copies[block] *= _jitter_scale(ivar[rows[block]])
        copies[block] += flux[rows[block]]
    return rows, copies


# %% [markdown]
# The noise by the scatter of many copies, the draws by their counts:

# %%
flux = np.ones((2, 3), "f4")
drawn, noisy = _noisy_copies(flux, errors**-2, n=20_000, seed=1)
scatter = noisy[drawn == 0].std(axis=0)
print(f"scatter of the first star's copies {scatter.round(3)}; drawn in {np.mean(drawn == 0):.1%}")
assert np.allclose(scatter, [0.01, 0.02, _BAD_JITTER], rtol=0.03)
assert np.allclose(noisy.mean(axis=0), 1, atol=2e-3)
assert abs(np.mean(drawn == 0) - 0.5) < 4 * 0.5 / np.sqrt(len(drawn))
assert np.array_equal(noisy, _noisy_copies(flux, errors**-2, n=20_000, seed=1)[1])

# %% [markdown]
# Now the stars of the archive at hand, with the split of all models, and the two models that every network is compared with.

# %%
use_style()
full = profile() == "full"
record = archive_record(archive_root())
names = list(record.labels)
spectra, _ = training_set(archive_root(), progress=False)
train, test = train_test_rows(len(spectra))
truth = spectra[test].labels(names)

# %%
cannon = Cannon(scatter=True, labels=names).fit(spectra[train])
ridge = RidgeLabels(labels=names).fit(spectra[train])
filled = ridge.fill(spectra.flux, spectra.ivar)  # the typical star's flux, where a star has none
rows, copies = _noisy_copies(filled[train], spectra.ivar[train], n=2_000)

# %% [markdown]
# One star, two of its copies, and below the noise they get: where pixels are bad the copies are wild, elsewhere they hardly differ from the star.

# %%
times = np.bincount(rows, minlength=len(train))
star = np.flatnonzero(times >= 2)[0]
noise = _jitter_scale(spectra.ivar[train[star]][None])[0]
window = (16_150, 16_260)
fig, axes = plt.subplots(2, 1, figsize=(9, 4), sharex=True)
drawn = {"copy 1": "C1", "copy 2": "C2"}
for (name, color), copy in zip(drawn.items(), copies[rows == star]):
    style = {"color": color, "lw": 0.8, "label": name}
    plot_spectrum(spectra.wavelength, copy, None, window, ax=axes[0], **style)
style = {"color": "0.2", "label": "star"}
plot_spectrum(spectra.wavelength, filled[train[star]], None, window, ax=axes[0], **style)
plot_spectrum(spectra.wavelength, noise, None, window, ax=axes[1], color="0.2")
axes[1].set_ylabel("noise of a copy")
axes[0].legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
axes[0].label_outer()
del copies

# %%
scale = _jitter_scale(spectra.ivar[train])
bad = scale == np.float32(_BAD_JITTER)
chances = len(train) * _draw_chances(spectra.ivar[train])
facts = {
    "pixels that count as bad": f"{bad.mean():.0%}",
    "noise of the others, median": f"{np.median(scale[~bad]):.4f}",
    "smallest and largest chance of a star": f"{chances.min():.2f}, {chances.max():.2f}",
    "copies per star": f"{len(rows) / len(train):.0f}",
}
Table({"of the copies": list(facts), "value": list(facts.values())})


# %% [markdown]
# **What to see.** The chances, in units of the average, hardly differ. The sum of 7,214 errors is mostly the sum over bad pixels, and all stars have about as many of these.
#
# ## A validation loss that lies
# The original lab trains on four fifths of the 10,000 copies and follows the loss on the last fifth, to keep the best of 1,000 epochs. But the copies of one star stand on both sides. The network has seen the star, so the "validation"
# measures how well it knows its training stars by heart. Split by *star*, then draw: now no star is on both sides.
#
# To see it we train the same network both ways and ask the test stars, which neither has seen. In the quick profile the layers are ten times narrower and there are 2,000 copies. In the full profile it is the original lab's network and
# all of its numbers, for the original lab's own split.

# %%
class Narrow(Network):
    "The original lab's network with layers a tenth as wide (the last hidden one as it is)."

    layer = {"activation": "linear"}

    def _build(self, n_pixels, n_labels):
        widths = [max(width // 10, 20) for width in LabNetwork.widths]
        hidden = [keras.layers.Dense(width, **self.layer) for width in widths]
        return keras.Sequential([keras.Input((n_pixels,)), *hidden, keras.layers.Dense(n_labels)])


def copies_of(stars, n, seed):
    "The original lab's augmented set from some of the stars, as `Spectra`."
    rows, flux = _noisy_copies(filled[stars], spectra.ivar[stars], n, seed)
    ivar = np.broadcast_to(np.float32(1), flux.shape)
    return Spectra(spectra.wavelength, flux, ivar, spectra.stars[stars[rows]])


# %%
quick = {"labels": names, "epochs": 16, "batch_size": 64, "keep_best": True}
if full:
    by_copy = LabNetwork(
        labels=names, epochs=1000, batch_size=512, centre=True, validation=0.2, keep_best=True
    )
else:
    by_copy = Narrow(**quick, validation=0.2)
by_copy.fit(copies_of(train, 10_000 if full else 2_000, 0), progress=False);

# %%
learned, held = train_test_rows(len(train), 0.2, 0)
by_star = Narrow(**quick | {"epochs": 40 if full else 8})
others = copies_of(train[held], 400, 1)
by_star.fit(copies_of(train[learned], 1_600, 0), validation=others, progress=False);


# %%
def mark_best(history, ax, color, count=5):
    "Mark the epochs with the lowest validation loss."
    best = np.argsort(history["val_loss"])[:count]
    ax.plot(1 + best, np.array(history["val_loss"])[best], "o", mfc="none", color=color)


ways = {"split by copy (the original lab's)": by_copy, "split by star": by_star}
ax = plot_history({name: network.history_ for name, network in ways.items()})
for k, network in enumerate(ways.values()):
    mark_best(network.history_, ax, f"C{k}")


# %%
def root_loss(model, stars):
    "Root of the mean squared error in scaled labels, which is what the loss is the square of."
    residual = model.scale(model.read(stars)) - model.scale(stars.labels(names))
    return np.sqrt(np.mean(residual**2))


test_copies = copies_of(test, 800, 2)
promised = {}
reached = {}
for name, network in ways.items():
    promised[name] = np.sqrt(min(network.history_["val_loss"]))
    reached[name] = root_loss(network, test_copies)
best_epoch = [network.best_epoch_ + 1 for network in ways.values()]
leak = Table({"split": list(ways), "best epoch": best_epoch})
leak["validation says"] = [f"{value:.3f}" for value in promised.values()]
leak["copies of test stars say"] = [f"{value:.3f}" for value in reached.values()]
leak

# %%
#| echo: false
copy, star = ways
Markdown(
    "**What to see.** Root of the loss; circles mark the five best epochs. Split by copy the test "
    f"stars get {reached[copy] / promised[copy]:.1f} times the error that the validation promises. "
    "Split by star the promise holds. The leaking loss finds late epochs best: it rewards learning "
    "the stars by heart."
)

# %%
copies_each = (
    "many" if len(train) < 500 else "few"
)  # the more copies of a star, the more it promises
assert reached[copy] > {"many": 1.3, "few": 1.1}[copies_each] * promised[copy]
assert reached[star] < 1.2 * promised[star]


# %% [markdown]
# ## Noise drawn afresh
# Ten thousand stars in memory are 289 MB, and the network sees the same ten thousand noises a thousand times over. Nothing forces us to store them. We draw the noise when a batch is needed, anew in every epoch, from the few hundred
# stars that there are. Each epoch's noise follows from the seed and the epoch's number, so an interrupted training still goes on as if nothing had happened.

# %%
#| export
def _noisy_stream(flux, ivar, truth, n, batch_size, seed, chances=None):
    "Batches of n stars drawn by their chances, jittered on the fly; seed: two whole numbers."
    if chances is None:
        chances = _draw_chances(np.asarray(ivar))
    rows = np.random.default_rng(seed).choice(len(flux), size=n, p=chances)
    for start in range(0, n, batch_size):
        picked = [tf.gather(part, rows[start : start + batch_size]) for part in (flux, ivar, truth)]
        noise = tf.random.stateless_normal(picked[0].shape, (seed[0] + start, seed[1]))
        yield picked[0] + noise * _jitter_scale(picked[1]), *picked[1:]


# %% [markdown]
# Does the stream keep the rules? The batches of an epoch by themselves: the same twice, others in the next epoch, and noise as large as asked for.

# %%
def epoch_of(number):
    "The flux of 4,000 copies of 50 stars with the error 0.02."
    flux = tf.ones((50, 4))
    ivar = tf.fill((50, 4), np.float32(0.02**-2))
    truth = tf.reshape(tf.range(50.0), (50, 1))
    return np.concatenate(
        [batch[0] for batch in _noisy_stream(flux, ivar, truth, 4_000, 32, (42, number))]
    )


first = epoch_of(0)
print(
    f"noise {first.std():.4f}, mean {first.mean():.4f}, {len(np.unique(first)):,} different numbers"
)
assert np.array_equal(first, epoch_of(0)) and not np.array_equal(first, epoch_of(1))
assert abs(first.std() / 0.02 - 1) < 0.03 and abs(first.mean() - 1) < 1e-3
assert len(np.unique(first)) > 15_000
assert abs(np.corrcoef(first[:, 0], first[:, 1])[0, 1]) < 4 / np.sqrt(4_000)


# %%
#| export
class AugmentedNetwork(LabNetwork):
    """The original lab's network, on stars drawn by its chances, with new noise in every epoch.

    Parameters
    ----------
    labels, epochs, batch_size, learning_rate, seed
        as of `LabNetwork`
    centre : bool, default True
        subtract the typical flux first
    validation : float, default 0.2
        share of the stars, not of their copies, to set aside
    keep_best : bool, default True
        keep the epoch with the lowest loss of the stars set aside, as the original lab did
    draws : float, default 1
        copies per epoch, in units of the number of stars
    """

    def __init__(
        self,
        labels: Sequence = None,
        epochs: int = 250,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        centre: bool = True,
        validation: float = 0.2,
        keep_best: bool = True,
        draws: float = 1,
        seed: int = 42,
    ):
        super().__init__(
            labels, epochs, batch_size, learning_rate, centre, validation, keep_best, seed
        )
        self.draws = draws

    def _look(self, flux, ivar, truth):
        self._chances = _draw_chances(np.asarray(ivar))

    def _batches(self, data, epoch):
        n = round(self.draws * len(data[0]))
        return _noisy_stream(*data, n, self.batch_size, (self.seed, epoch), self._chances)


# %% [markdown]
# On the stars: as many epochs as the profile allows, the same chances and noise as the original lab's, validation split by star and the best epoch kept. A plain network, without noise, is stopped at the same epoch. In the quick profile
# the layers of both are half as wide.

# %%
class NoisyHalf(AugmentedNetwork):
    widths = (500, 1000, 1000, 100, 20)


class PlainHalf(LabNetwork):
    widths = NoisyHalf.widths


epochs = LAB_EPOCHS if full else epochs_within(200, round(0.8 * len(train)))
augmented = (AugmentedNetwork if full else NoisyHalf)(labels=names, epochs=epochs)
augmented.fit(spectra[train], progress=False)
epochs = augmented.best_epoch_ + 1
plain = (LabNetwork if full else PlainHalf)(labels=names, epochs=epochs, centre=True)
plain.fit(spectra[train], progress=False);

# %%
ax = plot_history({"new noise in every epoch": augmented.history_, "plain": plain.history_})
mark_best(augmented.history_, ax, "C0")


# %%
def scaled_error(model, stars):
    "RMSE of some stars in scaled labels, averaged over the labels."
    errors = error_table(infer(model, stars), stars.labels(names), names, cannon.scales_)
    return errors["scaled_rmse"].mean()


models = {"Cannon": cannon, "ridge": ridge, "plain network": plain, "augmented network": augmented}
found = {name: scaled_error(model, spectra[test]) for name, model in models.items()}
Table(
    {
        "model": list(found),
        "mean scaled RMSE": [f"{error:.3f}" for error in found.values()],
        "compared with the Cannon": [f"{error / found['Cannon']:.2f}" for error in found.values()],
    }
)

# %%
#| echo: false
stars_each = 0.8 * len(train)
Markdown(
    f"**What to see.** {len(test)} test stars, {profile()} profile. The noise gains little over "
    "the plain network, if anything. Noise acts on a linear map as a penalty on its weights, "
    "$\\sum_p W_p^2\\sigma_p^2$: it is ridge regression by dice, with a heavier hand on noisy "
    f"pixels. An epoch holds {stars_each * 7214 * 4 / 2**20:.0f} MiB, the original lab's array "
    f"{10_000 * 7214 * 4 / 2**20:.0f}."
)

# %%
leeway = 1 if record.name == "clusters" else 1.2
assert found["augmented network"] < 1.25 * found["Cannon"] * leeway


# %% [markdown]
# ## What the original lab tried in vain
# The original lab lists what it tried without gain. Each takes a few lines in this frame, with the narrow network, so each can be looked at again.

# %%
class LinearDistance(Narrow):
    "The mean distance instead of the mean square."

    def _loss(self, truth, output):
        return tf.reduce_mean(tf.abs(output - truth))


class ErrorsAsInputs(Narrow):
    "The errors as 7,214 more inputs, side by side with the fluxes."

    def _prepare(self, flux, ivar):
        jitter = keras.layers.Lambda(_jitter_scale)(ivar)
        return keras.layers.Concatenate()([super()._prepare(flux, ivar), jitter])

    def _build(self, n_pixels, n_labels):
        return super()._build(2 * n_pixels, n_labels)


class Nonlinear(Narrow):
    "Rectified units in between, with the original lab's initializer."

    layer = {"activation": "relu", "kernel_initializer": "random_uniform"}


class NonlinearHe(Narrow):
    "Rectified units, with weights at the start as large as such units need (He et al. 2015)."

    layer = {"activation": "relu", "kernel_initializer": "he_normal"}


class Spiky(Narrow):
    "Adam without amsgrad."

    def _optimizer(self):
        return keras.optimizers.Adam(self.learning_rate)


# %%
odd = (spectra.flux > 1.1) | (spectra.flux < 0)
ones = spectra.replace(flux=np.where(odd, np.float32(1), spectra.flux))
common = {"labels": names, "epochs": epochs_within(600 if full else 120, len(train), most=60)}
tries = {
    "as it is": (Narrow(**common), spectra),
    "linear distance": (LinearDistance(**common), spectra),
    "errors as inputs": (ErrorsAsInputs(**common), spectra),
    "without amsgrad": (Spiky(**common), spectra),
    "odd fluxes set to 1": (Narrow(**common), ones),
    "nonlinear, flux as it is": (Nonlinear(**common, centre=False), spectra),
    "nonlinear, centred": (Nonlinear(**common), spectra),
    "nonlinear, He weights": (NonlinearHe(**common), spectra),
}
error = {}
final_loss = {}
largest_jump = {}
for name, (network, stars) in tries.items():
    network.fit(stars[train], progress=False)
    error[name] = scaled_error(network, stars[test])
    loss = np.array(network.history_["loss"])
    final_loss[name] = loss[-1]
    largest_jump[name] = np.max(loss[1:] / np.minimum.accumulate(loss)[:-1])

# %% [markdown]
# The error of the test stars, and how far the loss of the training stars ever jumped above its lowest value:

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
place = np.arange(len(tries))[::-1]
for ax, values in zip(axes, (error, largest_jump)):
    ax.plot(list(values.values()), place, "o", color="C0")
    ax.axvline(values["as it is"], color="0.6", lw=0.8, zorder=0)
    ax.grid(axis="y", alpha=0.3)
axes[0].set(yticks=place, yticklabels=list(tries), xlabel="scaled RMSE of the test stars")
axes[1].set(xlabel="largest jump of the loss [times its lowest]");

# %%
Table(
    {
        "tried": list(tries),
        "scaled RMSE": [f"{value:.3f}" for value in error.values()],
        "final loss": [f"{value:.3f}" for value in final_loss.values()],
        "largest jump": [f"{value:.1f}" for value in largest_jump.values()],
    }
)

# %%
#| echo: false
Markdown(
    "**What to see.** The nonlinear network, which the original lab saw stuck, "
    f"ends at {final_loss['nonlinear, flux as it is']:.2f} on the flux as it is, at "
    f"{final_loss['nonlinear, centred']:.2f} on centred flux, and with weights as large at the "
    "start as rectified units need them it beats the linear one. Nonlinearity was not the "
    f"obstacle. Only {np.mean(odd & (spectra.ivar > 0)):.3%} of the good pixels are odd."
)

# %%
assert error["nonlinear, He weights"] < 1.1 * error["as it is"] < error["nonlinear, flux as it is"]

# %% [markdown]
# **Mask bits, one by one.** The original lab throws away every pixel with any bit. We let one bit in at a time, normalize again, and ask ridge regression, which takes a second, whether the pixels that come back help. Some hundred stars of
# the first fields are enough to see it.

# %%
places, counts = np.unique(spectra.stars["LOCATION_ID"], return_counts=True)
places = places[np.cumsum(counts) - counts < 470]
raw, _ = apply_cuts(read_archive(archive_root(), fields=places, progress=False)[0])
bits = {}
if raw.mask is not None:
    frequent = sorted(count_mask_bits(raw), key=lambda bit: -bit["pixels"])
    bits = {bit["name"]: 1 << int(bit["bit"]) for bit in frequent[: None if full else 4]}


# %%
def with_bit(bit):
    "Share of usable pixels, and scaled RMSE of the test stars by ridge regression, without a bit."
    let_in = normalize(raw.replace(mask=raw.mask & ~bit) if bit else raw)
    known = np.isin(let_in.stars["APOGEE_ID"], spectra.stars["APOGEE_ID"][train])
    asked = np.isin(let_in.stars["APOGEE_ID"], spectra.stars["APOGEE_ID"][test])
    share = np.mean(let_in.ivar[known | asked] > 0)
    return share, scaled_error(RidgeLabels(labels=names).fit(let_in[known]), let_in[asked])


shares = {name: with_bit(bit) for name, bit in {"none": 0, **bits}.items()}
Table(
    {
        "let in": list(shares),
        "usable pixels": [f"{share:.1%}" for share, _ in shares.values()],
        "scaled RMSE": [f"{error:.3f}" for _, error in shares.values()],
    }
)

# %%
#| echo: false
text = "The spectra at hand carry no bitmask."
if bits:
    alone = (raw.mask != 0) & (raw.mask & (raw.mask - 1) == 0)  # a power of two: a single bit
    together = 1 - alone.sum() / np.count_nonzero(raw.mask)
    text = (
        f"**What to see.** {together:.0%} of the flagged pixels carry more than one bit, so "
        "letting in a single one brings few pixels back, and these do not help."
    )
Markdown(text)

# %% [markdown]
# **Other optimizers.** The original lab inverted its Cannon by numerical gradients, over all pixels. We minimize the same $\chi^2$ of three stars with four methods of scipy and compare with the exact answer of
# [the inversion](06_inversion.ipynb).

# %%
three = spectra[test[:3]]
exact = cannon.scale(label_values(infer(cannon, three), names))
theta = np.nan_to_num(cannon.theta_).T
scatter = np.nan_to_num(cannon.scatter_)
weights = three.ivar * cannon.usable_ / (1 + three.ivar * scatter**2)


def half_chi2(scaled, flux, weight):
    return 0.5 * np.sum(weight * (flux - cannon.vectorizer_(scaled[None])[0] @ theta) ** 2)


ends = {}
for method in ("BFGS", "CG", "Powell", "Nelder-Mead"):
    start = np.zeros(len(names))
    ends[method] = [
        minimize(half_chi2, start, star, method=method) for star in zip(three.flux, weights)
    ]

# %% [markdown]
# How often each method calls $\chi^2$, and how far its answer is from the exact one; a filled mark says that the method called itself successful.

# %%
ax = plt.subplots(figsize=(7, 3.2))[1]
rows = []
for k, (method, results) in enumerate(ends.items()):
    off = [np.abs(result.x - best).max() for result, best in zip(results, exact)]
    calls = [result.nfev for result in results]
    for result, x, y in zip(results, calls, off):
        ax.plot(x, y, "o", color=f"C{k}", mfc=f"C{k}" if result.success else "none")
    ax.plot([], [], "o", color=f"C{k}", label=method)
    success = f"{sum(result.success for result in results)} of 3"
    rows.append(
        {"method": method, "says it succeeded": success, "largest error": f"{max(off):.1e}"}
    )
ax.set(xlabel="calls of $\\chi^2$", ylabel="largest error [scaled labels]", yscale="log")
ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
Table(rows)

# %% [markdown]
# **What to see.** An optimizer that complains is not always wrong, and one that does not is not always right. With the analytic Jacobian, as in [the inversion](06_inversion.ipynb), neither has to be asked.

# %% [markdown]
# ## A network that knows the errors
# The original lab tried to give its network the errors as well, side by side with the fluxes, and gained nothing: in a dense layer every error meets every flux, and nothing says which belongs to which. What an error means is local. It
# says how far the flux *of that pixel* is to be trusted. So, before anything is mixed:
#
# 1. **Gate.** The deviation from the typical flux is shrunk as a Wiener filter would, $z_p = g_p\,(f_p-\bar f_p)$ with $g_p = \tau^2/(\tau^2+\sigma_p^2)$: all of a precise pixel, nothing of a bad one ($\sigma_p=\infty$). $\tau$ is learned.
# 2. **Convolution.** What the gate took away is filled in from the neighbours, by a convolution that weighs them by their own gates, $z_p + (1-g_p)\,(k*z)_p/(k*g)_p$. The spectrograph smears a line over some pixels, so the neighbours know. The
#    kernel $k$ is learned; it does not reach across the gaps between chips.
# 3. **Mixing.** The filled spectrum is projected on the principal components of the training stars, and small networks with one hidden, nonlinear layer go on from there.
# 4. **Mean and error.** Each of them gives a mean $\mu_k$ and an error $s_k$ for every label, and is trained by likelihood, $\;\sum_k \tfrac12(\ell_k-\mu_k)^2/s_k^2 + \ln s_k\;$: a label that cannot be read may be given a large error, at a price.
#    Several of them, started differently, make a mixture, whose scatter counts as error too.
#
# ### Gate and convolution

# %%
#| export
_FAINT = 0.01  # weight of "nothing deviates" against the neighbours, where these are bad too
_BAND = 64  # pixels smoothed by one product


def _weighted_neighbours(values, kernel):
    """Values (N, P), each replaced by the sum of its neighbours' times the kernel.

    A product with a matrix that holds the kernel along its diagonal: a third of the time that
    TensorFlow's convolution takes with a single channel.
    """
    width = kernel.shape[0]
    reach = width // 2
    offset = np.arange(_BAND + 2 * reach)[:, None] - np.arange(_BAND)
    inside = (offset >= 0) & (offset < width)
    band = tf.where(inside, tf.gather(kernel, np.where(inside, offset, 0)), 0.0)
    pixels = values.shape[1]
    blocks = math.ceil(pixels / _BAND)
    padded = tf.pad(values, [[0, 0], [reach, reach + blocks * _BAND - pixels]])
    framed = tf.signal.frame(padded, _BAND + 2 * reach, _BAND, axis=1)
    smoothed = tf.reshape(framed, (-1, _BAND + 2 * reach)) @ band
    return tf.reshape(smoothed, (-1, blocks * _BAND))[:, :pixels]


@keras.saving.register_keras_serializable(package="stellar_lab", name="Local")
class _Local(keras.layers.Layer):
    "Flux and ivar -> deviation from the typical flux, gated by its error, filled from neighbours."

    def __init__(self, edges, tau=0.04, reach=4, **options):
        super().__init__(**{"name": "local"} | options)
        self.edges = list(edges)  # first pixels of the chips, and the end
        self.tau = tau  # at the start
        self.reach = reach  # pixels that the kernel reaches

    def build(self, flux_shape, ivar_shape):
        constant = {"shape": (flux_shape[-1],), "initializer": "ones", "trainable": False}
        self.typical = self.add_weight(**constant, name="typical")
        self.usable = self.add_weight(**constant, name="usable")
        log_tau = keras.initializers.Constant(float(np.log(self.tau)))
        self.log_tau = self.add_weight(shape=(), initializer=log_tau, name="log_tau")
        offsets = np.arange(-self.reach, self.reach + 1, dtype="f4")
        self.log_kernel = self.add_weight(
            shape=offsets.shape, initializer="zeros", name="log_kernel"
        )
        self.log_kernel.assign(-0.5 * offsets**2)  # starts as a Gaussian of one pixel

    def _smooth(self, values):
        kernel = keras.ops.softmax(self.log_kernel)
        chips = [
            _weighted_neighbours(values[:, start:stop], kernel)
            for start, stop in zip(self.edges[:-1], self.edges[1:])
            if stop > start
        ]
        return keras.ops.concatenate(chips, axis=1)

    def call(self, flux, ivar):
        ivar = keras.ops.maximum(ivar * self.usable, 0)
        signal = keras.ops.exp(2 * self.log_tau) * ivar
        gate = signal / (1 + signal)
        kept = gate * keras.ops.where(ivar > 0, flux - self.typical, 0)
        return kept + (1 - gate) * self._smooth(kept) / (self._smooth(gate) + _FAINT)

    def compute_output_shape(self, flux_shape, ivar_shape):
        return flux_shape

    def get_config(self):
        return super().get_config() | {"edges": self.edges, "tau": self.tau, "reach": self.reach}


# %% [markdown]
# A star with its bad pixels, and what comes out of gate and convolution before any training: where the star has good pixels its own flux, where it has none what the neighbours suggest, and far from any good pixel the typical flux (zero).

# %%
one = spectra[test[:1]]
local = _Local([0, len(spectra.wavelength)])
local.build(one.flux.shape, one.ivar.shape)
local.typical.assign(ridge.typical_flux_)
local.usable.assign(ridge.usable_)
bad = np.flatnonzero((one.ivar[0] == 0) & ridge.usable_)
middle = spectra.wavelength[bad[len(bad) // 2]]
window = (middle - 25, middle + 25)
deviation = np.where(one.ivar[0] > 0, one.flux[0] - ridge.typical_flux_, np.nan)
gated = np.asarray(local(one.flux, one.ivar))[0]
style = {"color": "0.2", "marker": ".", "label": "good pixels of the star"}
ax = plot_spectrum(spectra.wavelength, deviation, None, window, **style)
style = {"color": "C1", "label": "gated and filled"}
plot_spectrum(spectra.wavelength, gated, None, window, ax=ax, **style)
ax.set_ylabel("flux - typical flux")
ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2);

# %% [markdown]
# Is it true that an error meets only its own flux? The derivative of an output pixel by the error of an input pixel must vanish further away than the kernel reaches, and across the gap between chips whatever the distance. And the two
# limits: no error, then the flux itself; no information, then nothing.

# %%
small = _Local([0, 30, 60])
flux = tf.constant(np.random.default_rng(0).uniform(0.5, 1, (1, 60)), tf.float32)
ivar = tf.constant(np.random.default_rng(1).uniform(100, 1000, (1, 60)), tf.float32)
with tf.GradientTape() as tape:
    tape.watch(ivar)
    out = small(flux, ivar)
reach = np.abs(np.asarray(tape.jacobian(out, ivar)))[0, :, 0]
pixel = np.arange(60)
far = np.abs(np.subtract.outer(pixel, pixel)) > small.reach
other_chip = np.not_equal.outer(pixel < 30, pixel < 30)
print("pixels that feel the error of pixel 28:", np.flatnonzero(reach[:, 28]))
assert np.all(reach[far | other_chip] == 0) and np.all(np.diag(reach) > 0)

# %%
assert np.allclose(small(flux, tf.fill((1, 60), 1e12)), flux - small.typical, atol=1e-4)
assert np.all(np.asarray(small(flux, 0 * ivar)) == 0)
holes = np.where(pixel % 7 == 0, 0, ivar).astype("f4")
nonsense = np.where(holes > 0, flux, np.float32(77))
assert np.array_equal(small(flux, holes), small(nonsense, holes))


# %% [markdown]
# ### Small networks side by side
# All members of the mixture are computed by the same products. Each has a hidden layer, and a straight line past it, so that it need not learn what a line can say.

# %%
#| export
@keras.saving.register_keras_serializable(package="stellar_lab", name="Experts")
class _Experts(keras.layers.Layer):
    "Several small networks: features (N, R) -> means and log errors (N, members, 2, K)."

    def __init__(self, members, width, n_labels, **options):
        super().__init__(**{"name": "experts"} | options)
        self.members = members
        self.width = width
        self.n_labels = n_labels

    def build(self, shape):
        members = self.members
        width = self.width
        out = 2 * self.n_labels
        self._add("hidden", (members, shape[-1], width), stddev=1)
        self._add("hidden_bias", (members, 1, width), stddev=0.5)
        self._add("head", (members, width, out), stddev=0.3 * width**-0.5)
        zeros = {"initializer": "zeros"}
        self.head_bias = self.add_weight(shape=(members, 1, out), name="head_bias", **zeros)
        line = (members, shape[-1], self.n_labels)
        self.line = self.add_weight(shape=line, name="line", **zeros)

    def _add(self, name, shape, stddev):
        drawn = keras.initializers.RandomNormal(stddev=stddev)
        setattr(self, name, self.add_weight(shape=shape, initializer=drawn, name=name))

    def call(self, features):
        hidden = keras.ops.gelu(features @ self.hidden + self.hidden_bias)
        shape = (self.members, -1, 2, self.n_labels)
        both = keras.ops.reshape(hidden @ self.head + self.head_bias, shape)
        mean = both[:, :, 0] + features @ self.line
        log_error = both[:, :, 1] - 1
        return keras.ops.transpose(keras.ops.stack([mean, log_error], axis=2), (1, 0, 2, 3))

    def compute_output_shape(self, shape):
        return (shape[0], self.members, 2, self.n_labels)

    def get_config(self):
        sizes = {"members": self.members, "width": self.width, "n_labels": self.n_labels}
        return super().get_config() | sizes


# %%
experts = _Experts(members=4, width=8, n_labels=3)
output = experts(tf.zeros((5, 2)))
print("5 stars, 4 members, mean and log error, 3 labels:", output.shape)
assert output.shape == experts.compute_output_shape((5, 2)) == (5, 4, 2, 3)


# %% [markdown]
# ### One answer of many
# The mixture's mean is the mean of the members. Its covariance has two parts: the mean of the variances that the members state, and the scatter of their means.

# %%
#| export
@keras.saving.register_keras_serializable(package="stellar_lab", name="Mixture")
class _Mixture(keras.layers.Layer):
    "Means and log errors (N, M, 2, K), scaled -> labels (N, K), covariance (N, K, K), physical."

    def __init__(self, scales, pivots, **options):
        super().__init__(**{"name": "mixture"} | options)
        self.scales = list(scales)
        self.pivots = list(pivots)

    def call(self, output):
        ops = keras.ops
        scales = ops.array(self.scales, dtype="float32")
        means = output[:, :, 0]
        variance = ops.mean(ops.exp(2 * output[:, :, 1]), axis=1)
        mean = ops.mean(means, axis=1)
        apart = means - mean[:, None]
        scatter = ops.einsum("nmk,nml->nkl", apart, apart) / means.shape[1]
        covariance = scatter + variance[:, :, None] * ops.eye(len(self.scales))
        labels = mean * scales + ops.array(self.pivots, dtype="float32")
        return {"labels": labels, "covariance": covariance * scales[:, None] * scales}

    def compute_output_shape(self, shape):
        K = shape[-1]
        return {"labels": (shape[0], K), "covariance": (shape[0], K, K)}

    def get_config(self):
        return super().get_config() | {"scales": self.scales, "pivots": self.pivots}


# %% [markdown]
# The covariance by its formula, and by drawing 200,000 times from five members:

# %%
rng = np.random.default_rng(3)
means = rng.normal(size=(2, 5, 3))
log_errors = rng.normal(-1, 0.2, size=(2, 5, 3))
members = np.stack([means, log_errors], axis=2).astype("f4")
scales = np.array([2.0, 1.0, 0.5])
pivots = np.array([10.0, 0.0, -1.0])
mixed = _Mixture(scales, pivots)(members)
which = rng.integers(0, 5, 200_000)
noise = np.exp(members[0, which, 1]) * rng.standard_normal((len(which), 3))
draws = (members[0, which, 0] + noise) * scales + pivots
print(
    "errors by the formula",
    np.sqrt(np.diag(mixed["covariance"][0])).round(2),
    "drawn",
    draws.std(axis=0).round(2),
)
assert np.allclose(mixed["labels"][0], draws.mean(axis=0), atol=0.03)
assert np.allclose(mixed["covariance"][0], np.cov(draws.T), atol=0.06)

# %% [markdown]
# ### How it is trained
# Three things are particular to this training.
#
# - The loss is the likelihood above, summed over members: each learns as if it were alone.
# - Every star loses some of its pixels by chance, another set in every step, so that no label comes to hang on a single pixel. Noise is not added; what it would change is left as an exercise.
# - The learning rate rises during the first steps and falls to zero along a cosine.

# %%
#| export
_WARM_UP = 30  # steps


def _likelihood(truth, output):
    "-ln likelihood of the labels, mean over stars and labels, summed over members."
    mean = output[:, :, 0]
    log_error = output[:, :, 1]
    each = 0.5 * tf.square(mean - truth[:, None]) * tf.exp(-2 * log_error) + log_error
    return tf.reduce_sum(tf.reduce_mean(each, axis=(0, 2)))


def _lose_pixels(ivar, lost, seed, number):
    "Inverse variance without a random share of each star's pixels, from 0 to twice `lost`."
    share = tf.random.stateless_uniform((len(ivar), 1), (seed, number))
    chance = tf.random.stateless_uniform(ivar.shape, (seed + 1, number))
    return tf.where(chance < 2 * lost * share, 0.0, ivar)


def _paced(peak, steps):
    "Learning rate by step: up to its peak, then along a cosine to zero."
    rise = min(_WARM_UP, steps // 2)
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(steps - rise, 1), warmup_target=peak, warmup_steps=rise
    )


# %%
rate = [float(_paced(2e-3, 1000)(step)) for step in (0, 15, 30, 500, 1000)]
print("learning rate after 0, 15, 30, 500, 1000 steps:", [round(value, 5) for value in rate])
left = np.mean(_lose_pixels(tf.ones((500, 100)), 0.25, seed=42, number=0) > 0, axis=1)
print(
    f"share of pixels left: {left.mean():.2f} on average, from {left.min():.2f} to {left.max():.2f}"
)
assert rate[0] == 0 and max(rate) == rate[2] and rate[-1] < 1e-6
assert abs(left.mean() - 0.75) < 0.03

# %% [markdown]
# A label whose error is 0.5 costs least when the network says 0.5, neither less nor more:

# %%
truth_of_many = tf.constant(0.5 * np.random.default_rng(0).normal(size=(5000, 1)), tf.float32)
stated = [0.3, 0.4, 0.5, 0.6, 0.8]
costs = []
for error_stated in stated:
    answer = tf.stack(
        [tf.zeros((5000, 1, 1)), tf.fill((5000, 1, 1), math.log(error_stated))], axis=2
    )
    costs.append(float(_likelihood(truth_of_many, answer)))
print(dict(zip(stated, np.round(costs, 3).tolist())))
assert stated[np.argmin(costs)] == 0.5

# %% [markdown]
# ### What the members read
# The principal components of the training stars, each divided by the square root of its scatter, so that faint ones are heard but do not shout.

# %%
#| export
_FEATURE_SIZE = 0.15  # rms of a feature: the scale on which the hidden units bend


def _feature_axes(spectra, components):
    "Axes (P, R) to project deviations from the typical flux (N, P) on."
    fitted = PCA(min(components, *spectra.shape), svd_solver="full").fit(spectra)
    scatter = np.sqrt(np.maximum(fitted.explained_variance_, 1e-12 * fitted.explained_variance_[0]))
    axes = fitted.components_.T / np.sqrt(scatter)
    return (_FEATURE_SIZE * axes / np.sqrt(np.mean(scatter))).astype(np.float32)


# %%
deviations = filled[train] - ridge.typical_flux_
features = (deviations - deviations.mean(axis=0)) @ _feature_axes(deviations, 64)
size = features.std(axis=0)
print(f"64 features: the first {size[0]:.2f}, the last {size[-1]:.2f}, all {features.std():.2f}")
assert size[0] > size[-1] and np.isclose(features.std(), 0.15, rtol=0.05)


# %% [markdown]
# ### The network
# All pieces in [the frame of all networks](14_network.ipynb).

# %%
#| export
class _GatedMixture(Network):
    "Gate, convolution, components and mixture, in the frame of a network."

    paced = True

    def _begin(self, *training_stars):
        if not 0 <= self.lost <= 0.5:
            raise LabError(
                f"lost is {self.lost}: training takes between 0 and half of the pixels away"
            )
        if self.components < 1 or self.members < 1:
            raise LabError(
                f"{self.components} components and {self.members} members: "
                "there must be at least one component and one member"
            )
        return super()._begin(*training_stars)

    def _look(self, flux, ivar, truth):
        pixels = len(self.typical_flux_)
        starts = [0]
        if self.wavelength_ is not None:
            starts = [chip.start for chip in chip_slices(self.wavelength_).values()]
        self._local = _Local([*starts, pixels], name="local")
        self._local.build((None, pixels), (None, pixels))
        self._local.typical.assign(self.typical_flux_)
        self._local.usable.assign(self.usable_)
        deviations = self._by_blocks(self._local, flux, ivar)
        self._axes = _feature_axes(np.concatenate(deviations), self.components)

    def _prepare(self, flux, ivar):
        return self._local(flux, ivar)

    def _build(self, n_pixels, n_labels):
        width = self._axes.shape[1]
        project = keras.layers.Dense(width, use_bias=False, trainable=False, name="components")
        experts = _Experts(self.members, self.width, n_labels, name="experts")
        model = keras.Sequential([keras.Input((n_pixels,)), project, experts])
        project.set_weights([self._axes])
        return model

    def _finish(self, output):
        return _Mixture(self.scales_.tolist(), self.pivots_.tolist(), name="mixture")(output)

    def _loss(self, truth, output):
        return _likelihood(truth, output)

    def _batches(self, data, epoch):
        for number, (flux, ivar, truth) in enumerate(super()._batches(data, epoch)):
            yield flux, _lose_pixels(ivar, self.lost, self.seed, epoch * 100_003 + number), truth

    def _optimizer(self):
        stars = len(self.training_labels_) * (1 - self.validation)
        steps = self.epochs * math.ceil(stars / self.batch_size)
        schedule = _paced(self.learning_rate, steps)
        return keras.optimizers.AdamW(schedule, weight_decay=self.weight_decay)


# %%
class Untrained(_GatedMixture):
    weight_decay = 0.01
    components = 64
    members = 2
    width = 8
    lost = 0.25


untrained = Untrained(labels=names, epochs=0).fit(spectra[train], progress=False)
for layer in (untrained.keras_.get_layer("local"), *untrained.net_.layers):
    print(f"{layer.name}: {layer.count_params():,} numbers")
assert untrained.net_.get_layer("components").count_params() == 7214 * 64


# %%
#| export
class ErrorAwareNetwork(_GatedMixture):
    """Flux and error in, labels and their errors out.

    Each pixel is gated by its own error and filled from its neighbours; a mixture of small
    networks reads the principal components and is trained by likelihood (mixtures of networks:
    Lakshminarayanan et al. 2017, arXiv:1612.01474).

    Parameters
    ----------
    labels, epochs, batch_size, validation, keep_best, seed
        as of `Network`
    learning_rate : float, default 0.002
        at its peak: it rises during the first steps and falls to zero along a cosine
    weight_decay : float, default 0.01
    components : int, default 64
        principal components that are read
    members : int, default 16
        networks in the mixture
    width : int, default 128
        hidden units of each
    lost : float, default 0.25
        share of a star's pixels that is taken from it in training: between 0 and twice this

    Raises
    ------
    LabError
        by `fit`, where `lost` is not between 0 and 0.5 or there is no component or member
    """

    def __init__(
        self,
        labels: Sequence = None,
        epochs: int = 100,
        batch_size: int = 32,
        learning_rate: float = 2e-3,
        weight_decay: float = 1e-2,
        components: int = 64,
        members: int = 16,
        width: int = 128,
        lost: float = 0.25,
        validation: float = 0,
        keep_best: bool = False,
        seed: int = 42,
    ):
        super().__init__(
            labels, epochs, batch_size, learning_rate, True, validation, keep_best, seed
        )
        self.weight_decay = weight_decay
        self.components = components
        self.members = members
        self.width = width
        self.lost = lost


# %% [markdown]
# ## Is the likelihood right?
# A truth that we make: labels that can be read from the flux, but with a noise of their own that is large for half of the stars, and the flux says for which. The network must find both the labels and who is uncertain.

# %%
def two_kinds(n, seed):
    "Labels, flux, ivar, true errors, noiseless labels; pixel 0 tells which kind of star it is."
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=n)
    kind = rng.integers(0, 2, n)
    error = np.where(kind, 0.8, 0.1)
    slopes = np.array([1, -1, 0.5, -0.5, 0.8, 0.3, -0.7])
    flux = np.column_stack([1 + 0.3 * kind, 1 + 0.1 * signal[:, None] * slopes])
    flux = flux + 0.003 * rng.standard_normal((n, 8))
    labels = (signal + error * rng.standard_normal(n))[:, None]
    return labels, flux.astype("f4"), np.full((n, 8), 0.003**-2, "f4"), error, signal


labels, flux, ivar, *_ = two_kinds(1500, 0)
few = {"members": 4, "width": 64, "components": 8, "batch_size": 64}
sure = ErrorAwareNetwork(epochs=12, learning_rate=6e-3, lost=0, seed=1, **few)
sure.fit(labels, flux, ivar, ["M_H"], progress=False)
_, flux, ivar, error_of_star, signal = two_kinds(2000, 1)
answers = infer(sure, flux, ivar)
median = {size: np.median(answers["m_h_err"].value[error_of_star == size]) for size in (0.1, 0.8)}
print(
    "true error -> error given:", {size: round(float(value), 2) for size, value in median.items()}
)

# %%
assert abs(median[0.1] / 0.1 - 1) < 0.35 and abs(median[0.8] / 0.8 - 1) < 0.2
assert np.std(answers["m_h"].value - signal) < 0.15

# %% [markdown]
# ## Trained on the stars
# The same stars, the same split. The networks' errors are learned on the training stars, which they know too well. So we ask the test stars whether the errors are right. Where they are not, `with_error_model` stretches them as it does
# [the Cannon's](07_judging.ipynb). In the quick profile half as many members, twice as wide, learn in fewer and larger steps.

# %%
paced = {"labels": names}
if not full:
    epochs = epochs_within(200, len(train), most=100)
    paced |= {"epochs": epochs, "learning_rate": 5e-3, "members": 8, "width": 256}
aware = ErrorAwareNetwork(**paced)
aware.fit(spectra[train], validation=spectra[test], progress=False)
table = infer(aware, spectra[test])
known = infer(aware, spectra[train])

# %%
ax = plt.subplots(figsize=(7, 2.8))[1]
per_member = {kind: np.array(losses) / aware.members for kind, losses in aware.history_.items()}
ax.plot(per_member["loss"], "-", color="C0", label="training stars, pixels taken away")
ax.plot(per_member["val_loss"], "--", color="C0", label="test stars")
ax.set(xlabel="epoch", ylabel="-ln likelihood of a label", ylim=(None, 1.5))
ax.legend(frameon=False)
stars = {"training": (known, spectra[train].labels(names)), "test": (table, truth)}
plot_comparison(stars, names);


# %%
def stated_errors(table):
    return label_values(table, [f"{name}_err" for name in names])


pull = (label_values(table, names) - truth) / stated_errors(table)
within = np.mean(np.abs(pull) < 1, axis=0)
found["error-aware network"] = scaled_error(aware, spectra[test])
Table(
    {
        "label": names,
        "scatter of error over stated error": pull.std(axis=0).round(2),
        "within the stated error": [f"{share:.0%}" for share in within],
        "median stated error": [f"{m:.3g}" for m in np.median(stated_errors(table), axis=0)],
    }
)

# %%
#| echo: false
Markdown(
    f"**What to see.** The scaled RMSE is {found['error-aware network'] / found['Cannon']:.2f} "
    f"times the Cannon's ({profile()} profile). The stated errors hold for {within.mean():.0%} of "
    "the labels, where 68 % would be right. The dashes rise: each member for itself becomes too "
    "sure of what it learned by heart. It is their scatter, counted as error, that keeps the "
    "mixture right."
)

# %%
assert found["error-aware network"] < 1.1 * found["Cannon"]
assert 0.45 < within.mean() < 0.85

# %% [markdown]
# Does a large error mean a poor label? The test stars in four groups by the error given, all labels in scaled units. The true scatter must rise with it.

# %%
given = stated_errors(table) / aware.scales_
missed = (label_values(table, names) - truth) / aware.scales_
groups = np.array_split(np.argsort(given, axis=None), 4)
rms_given = np.array([np.sqrt(np.mean(given.flat[group] ** 2)) for group in groups])
rms_missed = np.array([np.sqrt(np.mean(missed.flat[group] ** 2)) for group in groups])
ax = plt.subplots(figsize=(3.4, 3))[1]
ax.plot(rms_given, rms_missed, "o-")
ax.axline((0, 0), slope=1, color="0.6", lw=0.8)
ax.set(xlabel="error given [scaled labels]", ylabel="true scatter [scaled labels]");

# %% [markdown]
# **What to see.** The points follow the line on which the stated error is the true one, and rise from each quarter of the stars to the next.

# %%
assert np.all(np.diff(rms_missed) > 0)

# %% [markdown]
# ## Thirty per cent of the pixels gone
# Now every test star loses 30 % of its good pixels, more than it lost in training on average (the share was drawn up to twice `lost`), on top of those that were bad. A model that cannot handle bad pixels breaks here. In the last column
# the same pixels are zero, and no model is told.

# %%
taken = np.random.default_rng(7).random(spectra.ivar[test].shape) < 0.3
zero = np.float32(0)
stars = {
    "as they are": spectra[test],
    "30 % bad": spectra[test].replace(ivar=np.where(taken, zero, spectra.ivar[test])),
    "30 % zero, untold": spectra[test].replace(flux=np.where(taken, zero, spectra.flux[test])),
}
shorter = paced | {"epochs": math.ceil(aware.epochs / (1 if full else 2))}
light = ErrorAwareNetwork(**shorter, lost=0.15 / 2).fit(spectra[train], progress=False)
models = {
    "Cannon": cannon,
    "plain network": plain,
    "error-aware": aware,
    "error-aware, 15 %": light,
}
broken = {
    name: {kind: scaled_error(model, some) for kind, some in stars.items()}
    for name, model in models.items()
}
columns = {kind: [f"{errors[kind]:.3f}" for errors in broken.values()] for kind in stars}
Table({"model": list(broken), **columns})

# %%
#| echo: false
rise = {name: errors["30 % bad"] / errors["as they are"] for name, errors in broken.items()}
Markdown(
    "**What to see.** Scaled RMSE. With 30 % of the pixels known to be bad, the error-aware "
    f"network's is {rise['error-aware']:.2f} times what it was, also when it lost at most 15 % in "
    f"training (last row). The plain network's, with means filled in, rises "
    f"{rise['plain network']:.2f} times. The last column, which no model survives, is what errors "
    "are for."
)

# %%
assert rise["error-aware"] < 1.15 and rise["error-aware, 15 %"] < 1.2
assert broken["error-aware"]["30 % zero, untold"] > 2 * broken["error-aware"]["30 % bad"]

# %% [markdown]
# ## Keep it
# A network kept in a file says the same as before, errors included.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "aware.keras"
    aware.save(path)
    again = infer(Network.load(path), spectra[test[:5]])
before = infer(aware, spectra[test[:5]])
assert np.array_equal(label_values(again, names), label_values(before, names))
assert np.array_equal(again["covariance"], before["covariance"])
error = stated_errors(before)  # the number of stars in a batch moves the last bits
assert np.all(np.abs(label_values(before, names) - label_values(table[:5], names)) < 1e-3 * error)
limit = 1e-3 * error[:, :, None] * error[:, None]
assert np.all(np.abs(before["covariance"] - table["covariance"][:5]) < limit)

# %% [markdown]
# What cannot work is refused in words.

# %%
with pytest.raises(LabError, match="takes between 0 and half"):
    ErrorAwareNetwork(lost=0.7).fit(spectra[train])
with pytest.raises(LabError, match="at least one component"):
    ErrorAwareNetwork(components=0).fit(spectra[train])

# %% [markdown]
# ## Exercises
# - Set `members=1` and look at the errors again: what does a single network not know about itself?
# - Let training also jitter the flux it keeps (`_jitter_scale`), and look at the test stars.
# - Replace the convolution by nothing ($k$ a single pixel) and repeat the 30 % test.
# - The stars of the archive are bright. Add noise to the test spectra until the median signal-to-noise is 30, tell the network (`ivar`), and watch the gate and the errors.
