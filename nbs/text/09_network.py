# %% [markdown]
# # Can a network read labels straight from the spectrum?
# > The lab's network of 13.6 million weights: what it learns, why it is a straight line in disguise, and the ridge regression that finds that line in a second.
#
# **Question.** The Cannon draws a star from its labels, and to label a star we turn it round. Why not learn the other direction at once: spectrum in, labels out?
#
# **Idea.** A network is a chain of layers $\mathbf x_{i+1} = a(W_i\mathbf x_i + \mathbf b_i)$, trained until its outputs come close to the catalogue's labels,
# $$ \text{loss} = \frac1{NK}\sum_{nk}\Bigl(y_{nk} - \ell_{nk}\Bigr)^2 , $$
# in scaled labels, so that always answering the mean costs 1. The lab's network has six such layers, and its $a$ is *linear*: $a(x)=x$. Then
# $$ W_6(\cdots W_2(W_1\mathbf f+\mathbf b_1)+\mathbf b_2\cdots)+\mathbf b_6 \;=\; W\mathbf f+\mathbf b , $$
# one matrix and one vector. We train it as the lab did, check on the trained network that it is such a map, and find a better one without any training.
#
# You learn how a network's weights are found, how to keep it with everything that it needs, and to ask of a big model what small one it is. Chapter 10 builds networks that
# are more than a line.

# %%
#| default_exp network

# %%
#| export
import hashlib
import json
import os
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.utils.validation import check_is_fitted
from tqdm import tqdm

from stellar_lab import __version__
from stellar_lab.cannon import LabelModel, pair_index, train_test_rows
from stellar_lab.inversion import MIN_GOOD, Flag, apply_error_model, check_spectra, finite_flux, infer, label_table, outside_training, with_names
from stellar_lab.survey import LABELS, LabError, Spectra, atomic_path, plot_spectrum, require

# %%
#| hide
import tempfile

import pytest
from astropy.table import Table
from IPython.display import Markdown
from sklearn.base import clone

from stellar_lab.archives import real_stars
from stellar_lab.cannon import Cannon, fold_numbers, training_set
from stellar_lab.inversion import cross_label, error_table, plot_comparison, with_error_model
from stellar_lab.survey import archive_record, archive_root, profile, use_style


# %% [markdown]
# ## Any model that reads
# A model that goes from spectrum to labels needs no search, but everything around it is the same: how training stars come in, how labels are scaled, what a table of labels looks like, when to doubt one.
# So `LabelReader` shares with the Cannon what can be shared (`LabelModel`), and registers itself with chapter 5's `infer`, which thereby labels with any model.
#
# **Bad pixels.** A sum over all pixels has no way to leave one out. A bad pixel therefore gets the value that says nothing: the mean that good pixels have there in the training stars. The lab fed the network whatever stood in the
# spectrum; we measure below what that costs.
#
# **Errors.** A linear map carries the photon noise over exactly, $C = W\operatorname{diag}(\sigma^2)W^\mathsf T$. Other readers state no error of their own (NaN) unless a subclass knows better. Both become
# honest as the Cannon's do, by `with_error_model` and stars left out.

# %%
#| export
class LabelReader(LabelModel):
    "A model from spectrum to labels. A subclass says in `fit` how it learns and in `_read` how it reads."

    def _begin(self, labels, flux, ivar, label_names, wavelength):
        "Training stars as the Cannon takes them; learns scaling and typical flux, returns flux and ivar (N, P) float32."
        flux, ivar = super()._begin(labels, flux, ivar, label_names, wavelength)
        flux, ivar = np.asarray(flux, np.float32), np.asarray(ivar, np.float32)
        flux, good = finite_flux(flux, ivar), ivar > 0
        count = good.sum(axis=0)
        self.usable_ = count > 0   # (P,) some training star has the pixel
        self.typical_flux_ = np.where(self.usable_, np.where(good, flux, 0).sum(axis=0, dtype=float) / np.maximum(count, 1), 1)
        self.training_digest_ = self._digest(good.sum(axis=1, dtype=np.int32), np.where(good, flux, 0).sum(axis=1, dtype=float))
        return flux, ivar

    def fill(self, flux: np.ndarray, ivar: np.ndarray) -> np.ndarray:   # (N, P)
        "Flux with the training mean in pixels that are unusable in the star or were in all training stars."
        return np.where((ivar > 0) & self.usable_, flux, self.typical_flux_.astype(np.float32))

    def _read(self, flux, ivar):
        "Labels (N, K) in physical units and their covariance (N, K, K), NaN where none is known."
        raise NotImplementedError

    def predict(
        self,
        flux,                       # (N, P) relative to the continuum, or a `Spectra`
        ivar: np.ndarray = None,    # (N, P) inverse variance, 0 where unusable
    ) -> np.ndarray:                # (N, K) labels in physical units
        "Labels alone; `infer` gives them with errors and flags."
        return self._read(*check_spectra(self, flux, ivar))[0]


READ_BLOCK = 512   # stars at a time


@infer.register(LabelReader)
def infer_by_reading(
    model: LabelReader,
    flux,                        # (N, P) relative to the continuum, or a `Spectra`
    ivar: np.ndarray = None,     # (N, P) inverse variance, 0 where unusable
    min_good: float = MIN_GOOD,  # share of the model's pixels below which a star is flagged FEW_PIXELS
    max_steps: int = None,       # of a search, which there is none
):                               # -> QTable as `infer`
    "What `infer` does with a model that reads: no chi2 (NaN), no steps (0), the flags FEW_PIXELS and OUTSIDE_TRAINING."
    check_is_fitted(model, "typical_flux_")
    spectra, (flux, ivar) = flux, check_spectra(model, flux, ivar)
    parts = []
    for start in range(0, len(flux), READ_BLOCK):
        f, w = flux[start:start + READ_BLOCK], ivar[start:start + READ_BLOCK]
        if w.min() < 0:
            raise LabError("ivar is negative somewhere: give 0 where a pixel is unusable")
        parts.append((*model._read(finite_flux(f, w, start), w), ((w > 0) & model.usable_).sum(axis=1)))
    labels, covariance, n_good = map(np.concatenate, zip(*parts))
    K = labels.shape[1]
    blind, covariance = n_good <= K, apply_error_model(model, covariance)
    labels[blind], covariance[blind] = np.nan, np.nan
    flags = np.where(blind, Flag.NOT_CONVERGED, 0) | np.where(n_good < max(min_good * model.usable_.sum(), K + 1), Flag.FEW_PIXELS, 0)
    flags[~blind] |= np.where(outside_training(model, model.scale(labels[~blind])), Flag.OUTSIDE_TRAINING, 0)
    return with_names(label_table(model, labels, covariance, np.full(len(flux), np.nan), n_good, 0 * n_good, flags), spectra)


def photon_covariance(
    weights: np.ndarray,   # (K, P) labels = weights @ flux + constant
    ivar: np.ndarray,      # (N, P)
) -> np.ndarray:           # (N, K, K)
    "What photon noise does to labels that are a linear map of the flux; filled pixels bring none."
    i, j, place = pair_index(len(weights))
    variance = np.divide(1, ivar, out=np.zeros(ivar.shape), where=ivar > 0)
    return (variance @ (weights[i] * weights[j]).T)[:, place]


# %% [markdown]
# ## Ridge regression
# The simplest reader is the line itself. There are more pixels than stars, so many lines pass through all training stars; ridge regression takes the one that minimizes
# $$ \sum_n \bigl|\,W\mathbf f_n+\mathbf b-\boldsymbol\ell_n\bigr|^2 + \alpha\,|W|^2 , $$
# short weights, little noise passed on. How short, $\alpha$ decides, and leaving out one star at a time tells which is best. scikit-learn's `RidgeCV` does all of it with one singular value decomposition.

# %%
#| export
class RidgeLabels(LabelReader):
    "Ridge regression from flux to labels: the best that a linear map can do, in a second."

    def __init__(
        self,
        labels: Sequence = None,                 # names of the labels to learn from a `Spectra`; by default all that it holds
        alphas: Sequence = tuple(np.logspace(-3, 3, 19)),   # penalties to choose from, by leaving out one star at a time
    ):
        self.labels, self.alphas = labels, alphas

    def fit(self, labels, flux=None, ivar=None, label_names=None, wavelength=None) -> "RidgeLabels":
        "Learn from stars with known labels, given as to `Cannon.fit`."
        flux, ivar = self._begin(labels, flux, ivar, label_names, wavelength)
        fitted = RidgeCV(np.array(self.alphas, dtype=float)).fit(self.fill(flux, ivar) - self.typical_flux_, self.scale(self.training_labels_))
        self.alpha_ = float(fitted.alpha_)
        self.weights_ = fitted.coef_ * self.scales_[:, None]   # (K, P) physical units
        self.constant_ = self.unscale(fitted.intercept_) - self.weights_ @ self.typical_flux_   # (K,)
        return self

    def affine_map(self) -> tuple:
        "W (K, P) and b (K,) of labels = W flux + b, in physical units."
        check_is_fitted(self, "weights_")
        return self.weights_, self.constant_

    def _read(self, flux, ivar):
        weights, constant = self.affine_map()
        return self.fill(flux, ivar) @ weights.T + constant, photon_covariance(weights, np.where(self.usable_, ivar, 0))


# %% [markdown]
# A known truth first: made-up spectra of 60 pixels whose labels are exactly a linear map of the flux. The map must come back, and the errors must be the size of the noise that we add.

# %%
def made_up(n_stars=300, n_pixels=60, noise=0.0, seed=3):
    "Spectra that depend linearly on three labels: labels, flux, ivar."
    rng = np.random.default_rng(seed)
    labels = rng.normal([4500, 2.0, -0.3], [400, 0.8, 0.3], size=(n_stars, 3))
    slopes = 0.03 * np.random.default_rng(0).normal(size=(3, n_pixels))
    flux = 0.9 + (labels - [4500, 2.0, -0.3]) / [400, 0.8, 0.3] @ slopes + noise * rng.standard_normal((n_stars, n_pixels))
    return labels, flux.astype("f4"), np.full(flux.shape, (noise or 0.01) ** -2, "f4")


# %%
THREE = ["TEFF", "LOGG", "M_H"]
labels, flux, ivar = made_up()
ridge = RidgeLabels(alphas=(1e-9,)).fit(labels, flux, ivar, THREE)
assert np.allclose(ridge.scale(ridge.predict(flux, ivar)), ridge.scale(labels), atol=1e-4)

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
spectra, ledger = training_set(archive_root(), progress=False)
train, test = train_test_rows(len(spectra))
truth = spectra[test].labels(names)

# %%
good, every = spectra.ivar > 0, np.ones_like(spectra.ivar)
fillings = {"as it stands": (np.nan_to_num(spectra.flux), every), "one": (np.where(good, spectra.flux, 1), every), "training mean": (spectra.flux, spectra.ivar)}
rows, errors = [], {}
for filling, (flux, ivar) in fillings.items():
    ridge = RidgeLabels().fit(spectra[train].labels(names), flux[train], ivar[train], names)
    table = infer(ridge, flux[test], ivar[test])
    errors["ridge", filling] = error_table(table, truth, names, ridge.scales_)
    rows.append({"bad pixels": filling, "alpha": f"{ridge.alpha_:.3g}", **{n: f"{v:.3f}" for n, v in zip(names, errors["ridge", filling]["scaled_rmse"])},
                 "mean": f"{errors['ridge', filling]['scaled_rmse'].mean():.3f}"})
Table(rows)

# %%
#| echo: false
scaled = {filling: errors["ridge", filling]["scaled_rmse"].mean() for filling in fillings}
Markdown(f"**What to see.** RMSE of {len(test)} test stars in scaled labels. {np.mean(~good):.0%} of the pixels are bad, and what stands in them decides: {scaled['as it stands']:.3f} with the flux as it stands, {scaled['one']:.3f} with ones, "
         f"{scaled['training mean']:.3f} with the training mean. The mean is what all our networks put there. It stands inside the model, so nobody has to remember it.")

# %%
assert scaled["training mean"] < scaled["one"] and scaled["training mean"] < scaled["as it stands"]


# %% [markdown]
# ## The network's frame
# What all networks of the lab have in common is written once; a network of its own only says in `_build` which layers stand between pixels and labels. The frame does the rest:
#
# - the Keras model takes flux and inverse variance *as read* and returns labels in physical units: filling, centring and scaling are layers of it;
# - batches of stars in an order that follows from the seed and the epoch alone, so a training that was interrupted goes on as if nothing had happened;
# - the loss of stars set aside is followed, and the best epoch kept if wanted.
#
# TensorFlow takes ten seconds to import and greets on the error output before anyone can ask it not to. So only chapters with networks import it, with that output shut.

# %%
#| export
@contextmanager
def _hushed():
    "Nothing that compiled libraries say reaches the error output."
    kept = None
    with suppress(OSError, ValueError):   # a process may have none
        sys.stderr.flush()
        kept = os.dup(2)
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        if kept is not None:
            os.dup2(kept, 2)
            os.close(kept)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with _hushed():
    tf, keras = require("tensorflow", "network"), require("keras", "network")
    tf.constant(0)   # wakes it up


@keras.saving.register_keras_serializable(package="stellar_lab")
class Prepare(keras.layers.Layer):
    "Flux and inverse variance as read -> flux with the typical value in unusable pixels, minus the typical flux if `centre`."

    def __init__(self, centre=False, **options):
        super().__init__(**options)
        self.centre = centre

    def build(self, flux_shape, ivar_shape):
        self.typical = self.add_weight(shape=(flux_shape[-1],), initializer="ones", trainable=False, name="typical")
        self.usable = self.add_weight(shape=(flux_shape[-1],), initializer="ones", trainable=False, name="usable")

    def call(self, flux, ivar):
        filled = keras.ops.where(ivar * self.usable > 0, flux, self.typical)
        return filled - self.typical if self.centre else filled

    def compute_output_shape(self, flux_shape, ivar_shape):
        return flux_shape

    def get_config(self):
        return super().get_config() | {"centre": self.centre}


# %%
#| export
NETWORK_FORMAT, MEMBER = 1, "stellar_lab.json"   # of the file; the part of it that is ours
SAVE_EVERY = 30   # seconds between two states of a training that are kept


class Network(LabelReader):
    "A Keras network from spectrum to labels. A subclass overrides `_build`, and `_prepare`, `_finish`, `_loss`, `_batches` or `_optimizer` where it differs."

    def __init__(
        self,
        labels: Sequence = None,       # names of the labels to learn from a `Spectra`; by default all that it holds
        epochs: int = 100,             # times that each star is seen
        batch_size: int = 32,          # stars to a step
        learning_rate: float = 1e-3,
        centre: bool = True,           # subtract the typical flux before anything else
        validation: float = 0,         # share of the training stars to set aside, to follow the loss
        keep_best: bool = False,       # keep the weights of the epoch with the lowest loss of the stars set aside
        seed: int = 42,
    ):
        self.labels, self.epochs, self.batch_size, self.learning_rate = labels, epochs, batch_size, learning_rate
        self.centre, self.validation, self.keep_best, self.seed = centre, validation, keep_best, seed

    # ---- what a subclass may change

    def _build(self, n_pixels: int, n_labels: int):   # -> keras.Model
        "The trainable part: what `_prepare` gives -> scaled labels (or whatever `_loss` and `_finish` understand)."
        raise NotImplementedError(f"{type(self).__name__} does not say in _build which layers it has")

    def _prepare(self, flux, ivar):
        "Symbolic flux and ivar (N, P) as read -> the input, or list of inputs, of the trainable part."
        layer = Prepare(self.centre, name="prepare")
        prepared = layer(flux, ivar)
        layer.set_weights([self.typical_flux_, self.usable_])
        return prepared

    def _finish(self, output):
        "Symbolic output of the trainable part -> labels in physical units, or a dict with `labels` (N, K) and `covariance` (N, K, K)."
        return keras.layers.Rescaling(self.scales_.tolist(), self.pivots_.tolist(), name="labels")(output)

    def _loss(self, truth, output):
        "Mean loss of a batch; truth (N, K) in scaled labels. Here the mean squared error."
        return tf.reduce_mean(tf.square(output - truth))

    def _batches(
        self,
        data: tuple,        # flux (N, P), ivar (N, P), scaled labels (N, K) as float32 tensors
        epoch: int,         # from 0; whatever is drawn must follow from it and the seed
    ) -> Iterator:          # of the same three, a batch of stars each
        "The stars of an epoch, batch by batch: each once, in a new order."
        order = np.random.default_rng([self.seed, epoch]).permutation(len(data[0]))
        for start in range(0, len(order), self.batch_size):
            yield tuple(tf.gather(part, order[start:start + self.batch_size]) for part in data)

    def _optimizer(self):
        return keras.optimizers.Adam(self.learning_rate, amsgrad=True)

    # ---- training

    def fit(
        self,
        labels,                          # (N, K) physical units, or a `Spectra` that holds everything
        flux: np.ndarray = None,         # (N, P) relative to the continuum
        ivar: np.ndarray = None,         # (N, P) inverse variance, 0 where unusable; all 1 by default
        label_names: Sequence = None,
        wavelength: np.ndarray = None,   # (P,) [Angstrom, vacuum]
        *,
        validation: Spectra = None,      # other stars to follow the loss on; by default the share `self.validation` of these
        checkpoint=None,                 # file for the state of the training, from which an interrupted one goes on
        progress: bool = True,           # show a bar
    ) -> "Network":
        "Train on stars with known labels, given as to `Cannon.fit`. The same seed gives the same network on the same machine."
        flux, ivar = self._begin(labels, flux, ivar, label_names, wavelength)
        data, held = self._sets(flux, ivar, validation)
        keras.utils.set_random_seed(self.seed)
        self._assemble()
        self._train(data, held, checkpoint, progress)
        return self

    def _sets(self, flux, ivar, validation):
        "Stars to learn from and stars to follow the loss on (or None): tensors of flux, ivar and scaled labels."
        sets = [(flux, ivar, self.scale(self.training_labels_)), None]
        if isinstance(validation, Spectra):
            held_flux, held_ivar = check_spectra(self, validation, None)
            sets[1] = finite_flux(held_flux, held_ivar), held_ivar, self.scale(validation.labels(self.label_names_))
        elif self.validation:
            sets = [tuple(part[rows] for part in sets[0]) for rows in train_test_rows(len(flux), self.validation, self.seed)]
        if self.keep_best and sets[1] is None:
            raise LabError("keep_best needs stars set aside: give fit a validation set, or the network a share (validation=0.2)")
        return [None if part is None else tuple(tf.constant(array, tf.float32) for array in part) for part in sets]

    def _assemble(self):
        "The Keras models: `core_` in scaled labels, which is trained, and `keras_` around it in physical ones, which is kept."
        P, K = len(self.typical_flux_), len(self.label_names_)
        inputs = [keras.Input((P,), name="flux"), keras.Input((P,), name="ivar")]
        self.net_ = self._build(P, K)
        output = self.net_(self._prepare(*inputs))
        self.core_, self.keras_ = keras.Model(inputs, output), keras.Model(inputs, self._finish(output))

    def _train(self, data, held, checkpoint, progress):
        step, loss_of, optimizer = self._steps()
        state = _State(self, optimizer, data, held, checkpoint)
        epoch, self.history_, best = state.begin()
        with tqdm(total=self.epochs, initial=epoch, desc="training", unit="epoch", disable=not progress, leave=False) as bar:
            while epoch < self.epochs:
                losses, sizes = zip(*((step(*batch), len(batch[0])) for batch in self._batches(data, epoch)))
                losses = np.asarray(tf.stack(losses), dtype=float)
                if not np.isfinite(losses).all():
                    raise LabError(f"the loss is no longer finite in epoch {epoch + 1}: take a smaller learning_rate than {self.learning_rate:g}")
                self.history_["loss"].append(float(np.average(losses, weights=sizes)))
                if held is not None:
                    self.history_["val_loss"].append(float(loss_of(*held)))
                    if self.keep_best and np.argmin(self.history_["val_loss"]) == epoch:
                        best = self.core_.get_weights()
                epoch += 1
                state.keep(epoch, self.history_, best, last=epoch == self.epochs)
                bar.update()
                bar.set_postfix({name: f"{values[-1]:.4f}" for name, values in self.history_.items()}, refresh=False)
        self.best_epoch_ = int(np.argmin(self.history_["val_loss"])) if self.keep_best else epoch - 1
        if best is not None:
            self.core_.set_weights(best)

    def _steps(self):
        "Compiled: a step downhill on a batch, and the loss of a set of stars; and the optimizer."
        optimizer, core, variables = self._optimizer(), self.core_, self.core_.trainable_variables
        optimizer.build(variables)

        @tf.function(reduce_retracing=True)
        def step(flux, ivar, truth):
            with tf.GradientTape() as tape:
                loss = self._loss(truth, core([flux, ivar], training=True))
                total = loss + sum(core.losses)   # penalties on weights, where layers have them
            optimizer.apply_gradients(zip(tape.gradient(total, variables), variables))
            return loss

        @tf.function(reduce_retracing=True)
        def loss_of(flux, ivar, truth):
            return self._loss(truth, core([flux, ivar], training=False))

        return step, loss_of, optimizer

    # ---- reading

    def _read(self, flux, ivar):
        check_is_fitted(self, "keras_")
        output = self.keras_([tf.constant(flux, tf.float32), tf.constant(ivar, tf.float32)], training=False)
        output = output if isinstance(output, dict) else {"labels": output}
        labels = np.asarray(output["labels"], dtype=float)
        covariance = output.get("covariance")
        return labels, self._covariance(labels, ivar) if covariance is None else np.asarray(covariance, dtype=float)

    def _covariance(self, labels, ivar):
        "Covariance (N, K, K) of the labels where the Keras model does not give one: unknown."
        return np.full((*labels.shape, labels.shape[1]), np.nan)

    # ---- keeping

    def save(self, path):
        "Write the network in Keras' own format (.keras), preprocessing, labels, grid, scaling and versions inside."
        check_is_fitted(self, "keras_")
        if Path(path).suffix.lower() != ".keras":
            raise LabError(f"cannot write the network to {path}: its extension must be .keras")
        learned = {name: _to_json(value) for name, value in vars(self).items() if name.endswith("_") and name not in ("keras_", "core_", "net_")}
        versions = {"stellar_lab": __version__, "tensorflow": tf.__version__, "keras": keras.__version__, "numpy": np.__version__}
        tree = {"stellar_lab_model": type(self).__name__, "module": type(self).__module__, "format_version": NETWORK_FORMAT, "versions": versions,
                "parameters": {name: _to_json(value) for name, value in self.get_params().items()}, "learned": learned}
        with atomic_path(path) as temporary:
            self.keras_.save(temporary)
            with zipfile.ZipFile(temporary, "a", zipfile.ZIP_DEFLATED) as file:
                file.writestr(MEMBER, json.dumps(tree))

    @classmethod
    def load(cls, path) -> "Network":
        "Read a network that `save` wrote, of this class or one derived from it; LabError for any other file."
        tree = network_facts(path)
        kind = _network_class(tree, path)
        if not issubclass(kind, cls):
            raise LabError(f"{path} holds a {kind.__name__}, which is not a {cls.__name__}: load it with {kind.__name__}.load")
        model = kind(**{name: _from_json(value) for name, value in tree["parameters"].items()})
        for name, value in tree["learned"].items():
            setattr(model, name, _from_json(value))
        model.label_names_ = tuple(model.label_names_)
        try:
            model.keras_ = keras.saving.load_model(path, compile=False)
            model.net_ = next(layer for layer in model.keras_.layers if isinstance(layer, keras.Model))
        except Exception as error:   # whatever Keras makes of a broken file
            raise LabError(f"{path} cannot be read ({str(error).splitlines()[0]}): train the network again") from error
        return model


def network_facts(path) -> dict:
    "What a file of a network says of itself, without building it; LabError if it is none."
    try:
        with zipfile.ZipFile(path) as file:
            tree = json.loads(file.read(MEMBER))
    except FileNotFoundError as error:
        raise LabError(f"there is no network at {path}: train one and save it there") from error
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise LabError(f"{path} is not a network of stellar_lab ({error})") from error
    if tree.get("format_version") != NETWORK_FORMAT:
        raise LabError(f"{path} has the format {tree.get('format_version')!r}; this version reads format {NETWORK_FORMAT}: train the network again")
    return tree


def _network_class(tree, path):
    "The class that a file names: one of this package, or one that is defined already. Nothing else is imported."
    if tree["module"].startswith("stellar_lab."):
        with suppress(ImportError):
            import_module(tree["module"])
    known, new = {}, [Network]
    while new:
        known |= {kind.__name__: kind for kind in new}
        new = [below for kind in new for below in kind.__subclasses__()]
    if tree["stellar_lab_model"] not in known:
        raise LabError(f"{path} holds a {tree['stellar_lab_model']!r}, which is not known here: import {tree['module']} first")
    return known[tree["stellar_lab_model"]]


def _to_json(value):
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    return value.item() if isinstance(value, np.generic) else list(value) if isinstance(value, tuple) else value


def _from_json(value):
    return np.array(value["array"], dtype=value["dtype"]) if isinstance(value, dict) and "array" in value else value


# %% [markdown]
# A training of hours must survive a power cut. Its state is the weights, the optimizer's memory of the gradients, the number of the epoch and the losses so far; every half a minute it goes to a file, whole or not at all.

# %%
#| export
class _State:
    "The state of a training, in a file if there is one."

    def __init__(self, model, optimizer, data, held, path):
        self.path, self.saved = None if path is None else Path(path), time.monotonic()
        self.variables, self.losses = [*model.core_.variables, *optimizer.variables], ["loss"] + ["val_loss"] * (held is not None)
        if self.path is not None:
            parameters = {name: value for name, value in model.get_params().items() if name != "epochs"}   # more epochs are the same training, longer
            self.identity = hashlib.sha256(repr((type(model).__name__, parameters, model.training_digest_, model.label_names_)).encode())
            for part in held or ():
                self.identity.update(np.asarray(part).tobytes())

    def begin(self):
        "Epochs done, their losses and the best weights so far; from the file, if it is there."
        if self.path is None or not self.path.exists():
            return 0, {name: [] for name in self.losses}, None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                facts = json.loads(str(file["facts"]))
                arrays, best = ([file[f"{kind}{k}"] for k in range(facts[kind])] for kind in ("state", "best"))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise LabError(f"{self.path} is not the state of a training ({error}): remove it, or name another file") from error
        if facts["identity"] != self.identity.hexdigest():
            raise LabError(f"{self.path} is the state of another training (other stars or parameters): remove it, or name another file")
        for variable, array in zip(self.variables, arrays):
            variable.assign(array)
        return facts["epoch"], facts["history"], best or None

    def keep(self, epoch, history, best, last):
        if self.path is None or not (last or time.monotonic() - self.saved >= SAVE_EVERY):
            return
        best = best or []
        facts = {"identity": self.identity.hexdigest(), "epoch": epoch, "history": history, "state": len(self.variables), "best": len(best)}
        arrays = {f"state{k}": np.asarray(variable) for k, variable in enumerate(self.variables)} | {f"best{k}": array for k, array in enumerate(best)}
        with atomic_path(self.path) as temporary, open(temporary, "wb") as file:
            np.savez(file, facts=json.dumps(facts), **arrays)
        self.saved = time.monotonic()


# %% [markdown]
# ## The lab's network
# Six dense layers, all linear, weights drawn uniformly at the start, Adam with amsgrad (which ended the lab's spikes of the loss), mean squared error, 32 stars to a batch, 250 epochs.

# %%
#| export
LAB_LAYERS = (1000, 2000, 2000, 200, 20)   # and one for the labels


class LabNetwork(Network):
    "The lab's network: dense layers, all linear, hence an affine map."

    def __init__(self, labels=None, epochs=250, batch_size=32, learning_rate=1e-3, centre=False, validation=0, keep_best=False, seed=42):
        super().__init__(labels, epochs, batch_size, learning_rate, centre, validation, keep_best, seed)

    def _build(self, n_pixels, n_labels):
        layers = [keras.layers.Dense(width, activation="linear", kernel_initializer="random_uniform") for width in (*LAB_LAYERS, n_labels)]
        return keras.Sequential([keras.Input((n_pixels,)), *layers], name="net")

    def affine_map(
        self,
    ) -> tuple:   # W (K, P) and b (K,) of labels = W flux + b, physical units, float64
        "The layers multiplied out, and filling and scaling with them."
        check_is_fitted(self, "net_")
        product, constant = np.eye(len(self.label_names_)), np.zeros(len(self.label_names_))
        for layer in reversed(self.net_.layers):
            kernel, bias = (np.asarray(part, dtype=float) for part in layer.get_weights())
            product, constant = kernel @ product, constant + bias @ product
        weights = product.T * self.scales_[:, None]
        shift = weights @ self.typical_flux_ if self.centre else 0
        return weights, self.unscale(constant) - shift

    def _covariance(self, labels, ivar):
        return photon_covariance(self.affine_map()[0], np.where(self.usable_, ivar, 0))


# %%
five = LabNetwork(epochs=0).fit(np.random.default_rng(0).normal(size=(8, 5)), np.ones((8, len(spectra.wavelength)), "f4"))
assert five.net_.count_params() == (13_623_325 if len(spectra.wavelength) == 7214 else five.net_.count_params())
