# %% [markdown]
# # Can a network read labels straight from the spectrum?
# > The original lab's network of 13.6 million weights: what it learns, and why it is a straight line in disguise.
#
# **Question.** [Ridge regression](13_readers.ipynb) reads labels as weighted sums of the pixels. The original lab trained a network for the same task. What does it gain by its millions of weights?
#
# **Idea.** A network is a chain of layers $\mathbf x_{i+1} = a(W_i\mathbf x_i + \mathbf b_i)$, trained until its outputs come close to the catalogue's labels,
# $$ \text{loss} = \frac1{NK}\sum_{nk}\Bigl(y_{nk} - \ell_{nk}\Bigr)^2 , $$
# in scaled labels, so that always answering the mean costs 1. The original lab's network has six such layers, and its $a$ is *linear*: $a(x)=x$. Then
# $$ W_6(\cdots W_2(W_1\mathbf f+\mathbf b_1)+\mathbf b_2\cdots)+\mathbf b_6 \;=\; W\mathbf f+\mathbf b , $$
# one matrix and one vector. We train it as the original lab did, check on the trained network that it is such a map, and compare it with the line that ridge regression finds.
#
# You learn how a network's weights are found, how to keep it with everything that it needs, and to ask of a big model what small one it is. [The next chapter](15_augmentation.ipynb) builds networks that
# are more than a line.

# %%
#| default_exp network

# %%
#| export
import ctypes
import gc
import hashlib
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

import numpy as np
from sklearn.utils.validation import check_is_fitted
from tqdm import tqdm

from stellar_lab import __version__
from stellar_lab.models import (
    Held,
    all_or_nothing,
    check_held,
    check_parameters,
    check_spectra,
    finite_flux,
    plain_value,
    read_regular,
    train_test_rows,
    whole_model,
)
from stellar_lab.readers import LabelReader, photon_covariance
from stellar_lab.survey import LabError, Spectra, WrongFile, atomic_path, require, said_of

# %%
#| hide
import tempfile
from copy import copy

import matplotlib.pyplot as plt
import pytest
from astropy.table import Table
from IPython.display import Markdown
from sklearn.base import clone

from stellar_lab.cannon import Cannon
from stellar_lab.clean import read_files
from stellar_lab.inversion import infer
from stellar_lab.judging import error_table, plot_comparison, with_error_model
from stellar_lab.labelling import label
from stellar_lab.models import Flag, label_values
from stellar_lab.normalize import as_trained, training_set
from stellar_lab.readers import RidgeLabels
from stellar_lab.survey import (
    LABELS,
    archive_record,
    archive_root,
    plot_spectrum,
    profile,
    use_style,
)


# %% [markdown]
# ## The frame of all networks
# What networks have in common is written once. A network of one's own only says in `_build` which layers stand between pixels and labels. The frame does the rest:
#
# - the Keras model takes flux and inverse variance *as read* and returns labels in physical units, so filling, centring and scaling are layers of it;
# - the order of the stars follows from the seed and the epoch alone, so an interrupted training goes on as if nothing had happened;
# - the loss of stars set aside is followed, and the best epoch kept if wanted.
#
# TensorFlow takes ten seconds to import and greets on the error output before anyone can ask it not to. So only chapters with networks import it, with that output shut.

# %%
#| export
@contextmanager
def _hushed():
    "Nothing that compiled libraries say reaches the error output."
    kept = None
    with suppress(OSError, ValueError):  # a process may have none
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
# Free memory goes back to the process, not to a pool of TensorFlow's own.
os.environ.setdefault("TF_ONEDNN_USE_SYSTEM_ALLOCATOR", "1")
with _hushed():
    tf = require("tensorflow", "network")
    keras = require("keras", "network")
    tf.constant(0)  # wakes it up
tf.get_logger().setLevel("ERROR")  # it warns of functions traced anew, which happens per network

# %%
print(f"Keras speaks to {keras.backend.backend()}")
assert keras.backend.backend() == "tensorflow"


# %% [markdown]
# The first layer prepares the flux as [every reader](13_readers.ipynb) does: the typical flux stands in for a bad pixel. If wanted, the typical flux is then subtracted.

# %%
#| export
@keras.saving.register_keras_serializable(package="stellar_lab", name="Prepare")
class _Prepare(keras.layers.Layer):
    "Flux and ivar as read -> flux with typical values in unusable pixels, centred if wanted."

    def __init__(self, centre=False, **options):
        super().__init__(**{"name": "prepare"} | options)
        self.centre = centre

    def build(self, flux_shape, ivar_shape):
        constant = {"shape": (flux_shape[-1],), "initializer": "ones", "trainable": False}
        self.typical = self.add_weight(**constant, name="typical")
        self.usable = self.add_weight(**constant, name="usable")

    def call(self, flux, ivar):
        filled = keras.ops.where(ivar * self.usable > 0, flux, self.typical)
        return filled - self.typical if self.centre else filled

    def compute_output_shape(self, flux_shape, ivar_shape):
        return flux_shape

    def get_config(self):
        return super().get_config() | {"centre": self.centre}


# %%
flux = tf.constant([[0.9, 55.0, 0.7]])
ivar = tf.constant([[1.0, 0.0, 1.0]])  # the second pixel is bad
print(
    "filled",
    _Prepare()(flux, ivar).numpy(),
    "and centred",
    _Prepare(centre=True)(flux, ivar).numpy(),
)
assert np.allclose(_Prepare()(flux, ivar), [[0.9, 1, 0.7]])


# %% [markdown]
# ### One step downhill
# Adam with amsgrad keeps four numbers per weight. For weights $\theta$ with gradient $\mathbf g$ in step $t$,
# $$ \mathbf m \leftarrow \mathbf m + (1-\beta_1)(\mathbf g-\mathbf m),\quad \mathbf v \leftarrow \mathbf v + (1-\beta_2)(\mathbf g^2-\mathbf v),\quad \hat{\mathbf v} \leftarrow \max(\hat{\mathbf v},\mathbf v),\quad
# \theta \leftarrow \theta - \eta_t\,\mathbf m/(\sqrt{\hat{\mathbf v}}+\epsilon) . $$
# With 32 stars to a batch and 13 million weights, most of a step's time goes into moving these numbers through memory, not into multiplying. Keras writes each little operation as a pass of its own, about 35 of them. TensorFlow has the
# whole formula as one operation, which needs a third of the time. Using it makes an epoch a third faster and changes nothing else.

# %%
#| export
class _FusedAdam(keras.optimizers.Adam):
    "Keras' Adam with amsgrad, each step TensorFlow's single operation for it (on the processor)."

    def __init__(self, learning_rate=0.001, name="fused_adam", **options):
        super().__init__(learning_rate, name=name, **options)

    # It leans on names that Keras 3 keeps to itself; the next cell and the tests guard it.
    def update_step(self, gradient, variable, learning_rate):
        number = self._get_variable_index(variable)
        step = tf.cast(self.iterations + 1, tf.float32)
        tf.raw_ops.ResourceApplyAdamWithAmsgrad(
            var=_handle(variable),
            m=_handle(self._momentums[number]),
            v=_handle(self._velocities[number]),
            vhat=_handle(self._velocity_hats[number]),
            beta1_power=tf.pow(self.beta_1, step),
            beta2_power=tf.pow(self.beta_2, step),
            lr=tf.cast(learning_rate, tf.float32),
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )


def _handle(variable):
    "What TensorFlow's own operations call a variable of Keras or of TensorFlow."
    return variable.handle if hasattr(variable, "handle") else variable.value.handle


# %% [markdown]
# Compared with Keras' own, on random gradients: the same path to rounding.

# %%
gradients = np.random.default_rng(2).normal(size=(50, 6)).astype("f4")
ends = []
for kind in (keras.optimizers.Adam, _FusedAdam):
    weight = keras.Variable(np.ones(6, "f4"))
    optimizer = kind(0.05, amsgrad=True)
    optimizer.build([weight])
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)])
    ends.append(weight.numpy())
print("Keras", ends[0].round(4), "fused", ends[1].round(4))
assert np.allclose(*ends, atol=1e-6) and np.abs(ends[0] - 1).min() > 1e-3

# %% [markdown]
# The loss and the optimizer are compiled into one function, the step. **What a training leaves behind** should be its weights. Before a step Keras sums the gradients of all machines that train together. TensorFlow notes how that sum
# would be differentiated, in a register of the whole process. With the note it keeps the graph of the step, and with the graph its variables: weights, $\mathbf m$, $\mathbf v$ and $\hat{\mathbf v}$, 208 MiB for each training of the
# original lab's network until the process ends ([a known fault](https://github.com/tensorflow/tensorflow/issues/80895)). We train on one machine and leave the sum out.

# %%
#| export
_NET_BLOCK = 128  # stars that a network reads at a time: its layers keep arrays of as many spectra


def _block_by_block(function, *arrays):
    "Results of a function of arrays (N, ...), called with a block of stars at a time."
    starts = range(0, len(arrays[0]), _NET_BLOCK)
    return [function(*(a[start : start + _NET_BLOCK] for a in arrays)) for start in starts]


def _compiled(core, loss, optimizer):
    "Two functions of flux, ivar and truth: a step downhill on a batch; the loss of any stars."
    weights = core.trainable_variables
    optimizer.build(weights)
    optimizer._all_reduce_sum_gradients = lambda pairs: pairs  # no sum over machines, see above
    shapes = [(None, core.inputs[0].shape[1])] * 2 + [(None, None)]
    any_batch = [tf.TensorSpec(shape) for shape in shapes]  # one graph for batches of any size

    @tf.function(input_signature=any_batch)
    def step(flux, ivar, truth):
        with tf.GradientTape() as tape:
            value = loss(truth, core([flux, ivar], training=True))
            total = value + sum(core.losses)  # penalties on weights, where layers have them
        optimizer.apply_gradients(zip(tape.gradient(total, weights), weights))
        return value

    @tf.function(input_signature=any_batch)
    def loss_of_block(flux, ivar, truth):
        return loss(truth, core([flux, ivar], training=False))

    def loss_of(*stars):
        losses = _block_by_block(
            lambda *block: (float(loss_of_block(*block)), len(block[0])), *stars
        )
        values, sizes = zip(*losses)
        return np.average(values, weights=sizes)

    return step, loss_of


# %% [markdown]
# Does it go downhill? The smallest network has one weight and one constant. The truth is that the label is twice the flux.

# %%
inputs = [keras.Input((1,)), keras.Input((1,))]
line = keras.Model(inputs, keras.layers.Dense(1)(_Prepare()(*inputs)))
optimizer = _FusedAdam(0.2, amsgrad=True)
step, loss_of = _compiled(
    line, lambda truth, output: tf.reduce_mean(tf.square(output - truth)), optimizer
)
flux = tf.constant(np.linspace(-1, 1, 20, dtype="f4")[:, None])
losses = [float(step(flux, tf.ones_like(flux), 2 * flux)) for _ in range(100)]
slope = float(line.trainable_variables[0][0, 0])
print(f"loss {losses[0]:.2f}, after 100 steps {losses[-1]:.1e}; weight {slope:.3f}")
assert np.isclose(loss_of(flux, tf.ones_like(flux), 2 * flux), losses[-1], atol=1e-3)
assert abs(slope - 2) < 0.02


# %% [markdown]
# ### What a network may choose
# A network says in `_build` which layers it has. It may also change how flux and error are prepared, what its output means, what counts as loss, which stars make a batch, and how to go downhill. Here stands the usual choice for each.

# %%
#| export
class _Layers:
    "What a network may choose; all but `_build` have a usual choice."

    paced = False  # does the learning rate follow a course over all epochs?
    _by_blocks = staticmethod(_block_by_block)

    def _build(self, n_pixels, n_labels):
        "The trainable Keras model: what `_prepare` gives -> what `_loss` and `_finish` take."
        raise NotImplementedError(f"{type(self).__name__} does not say in _build its layers")

    def _look(self, flux, ivar, truth):
        "What the layers have to know of the training stars before they are built: here nothing."

    def _prepare(self, flux, ivar):
        "Symbolic flux and ivar (N, P) as read -> the input, or inputs, of the trainable part."
        layer = _Prepare(self.centre, name="prepare")
        prepared = layer(flux, ivar)
        layer.set_weights([self.typical_flux_, self.usable_])
        return prepared

    def _finish(self, output):
        "Symbolic output -> labels in physical units, or a dict of `labels` and `covariance`."
        scales = self.scales_.tolist()
        return keras.layers.Rescaling(scales, self.pivots_.tolist(), name="labels")(output)

    def _loss(self, truth, output):
        "Mean loss of a batch; truth (N, K) in scaled labels. Here the mean squared error."
        return tf.reduce_mean(tf.square(output - truth))

    def _batches(self, data, epoch):
        "The stars of an epoch in batches: each once, in an order that seed and epoch fix."
        order = np.random.default_rng([self.seed, epoch]).permutation(len(data[0]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            yield tuple(tf.gather(part, rows) for part in data)

    def _optimizer(self):
        "Adam with amsgrad."
        on_gpu = bool(tf.config.list_physical_devices("GPU"))
        kind = keras.optimizers.Adam if on_gpu else _FusedAdam
        return kind(self.learning_rate, amsgrad=True)


# %% [markdown]
# Ten stars in batches of four: each star once per epoch, in another order each time. A network that always answers the mean has the loss 1.

# %%
class TenStars(_Layers):
    seed = 42
    batch_size = 4


ten = (tf.range(10),)
for epoch in (0, 1):
    batches = [batch[0].numpy().tolist() for batch in TenStars()._batches(ten, epoch)]
    print("epoch", epoch, batches)
    assert sorted(sum(batches, [])) == list(range(10))
scaled = tf.constant([[1.0], [-1.0]])
assert float(TenStars()._loss(scaled, tf.zeros((2, 1)))) == 1

# %% [markdown]
# ### A training that survives
# A training of hours must survive a power cut. Its state is the weights, the optimizer's memory of the gradients, the number of the epoch and the losses so far. Every half a minute it goes to a file, whole or not at all.

# %%
#| export
_SAVE_EVERY = 30  # seconds between two states of a training that are kept


class _State:
    "The state of a training: numbers in variables, losses so far; in a file if there is one."

    def __init__(self, path, identity, variables):
        self.path = None if path is None else Path(path)
        self.identity = identity
        self.variables = variables
        self.saved = time.monotonic()

    def begin(self, history):
        "Epochs done, their losses and the best weights; from the file, if there is one."
        if self.path is None or not self.path.exists():
            return 0, history, None
        facts, arrays, best = self._read()
        if facts["identity"] != self.identity:
            raise LabError(
                f"{self.path} is the state of another training (other stars or parameters): "
                "remove it, or name another file"
            )
        for variable, array in zip(self.variables, arrays):
            variable.assign(array)
        return facts["epoch"], facts["history"], best or None

    def _read(self):
        try:
            with np.load(self.path, allow_pickle=False) as file:
                facts = json.loads(str(file["facts"]))
                arrays = [file[f"state{k}"] for k in range(facts["state"])]
                best = [file[f"best{k}"] for k in range(facts["best"])]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise LabError(
                f"{self.path} is not the state of a training ({said_of(error)}): "
                "remove it, or name another file"
            ) from error
        return facts, arrays, best

    def keep(self, epoch, history, best, last):
        "Write the file, if it is time or the last epoch."
        if self.path is None or not (last or time.monotonic() - self.saved >= _SAVE_EVERY):
            return
        best = best or []
        facts = {"identity": self.identity, "epoch": epoch, "history": history}
        facts |= {"state": len(self.variables), "best": len(best)}
        arrays = {f"state{k}": variable.numpy() for k, variable in enumerate(self.variables)}
        arrays |= {f"best{k}": array for k, array in enumerate(best)}
        with atomic_path(self.path) as temporary, open(temporary, "wb") as file:
            np.savez(file, facts=json.dumps(facts), **arrays)
        self.saved = time.monotonic()


# %%
with tempfile.TemporaryDirectory() as folder:
    weight = tf.Variable([1.0, 2.0])
    path = Path(folder) / "state.npz"
    _State(path, "mine", [weight]).keep(3, {"loss": [0.9, 0.5, 0.4]}, best=None, last=True)
    weight.assign([0.0, 0.0])  # a power cut
    epoch, history, best = _State(path, "mine", [weight]).begin({"loss": []})
    with pytest.raises(LabError, match="another training"):
        _State(path, "another", [weight]).begin({"loss": []})
print(f"taken up after epoch {epoch}, loss {history['loss'][-1]}, weights {weight.numpy()}")
assert epoch == 3 and weight.numpy().tolist() == [1, 2]


# %% [markdown]
# ### All epochs
# An epoch is one pass over all stars. Its loss is the mean over stars, although the last batch may be smaller. A loss that is no longer a number is answered at once. A state belongs to one training only, so each training has a
# fingerprint. And after a training Python has to find the graph and the optimizer, which refer to each other, and the C library to give back the pages that fell free.

# %%
#| export
def _as_tensors(arrays):
    return [tf.constant(array, tf.float32) for array in arrays]


def _mean_loss(model, step, data, epoch):
    "Take the steps of an epoch; returns the mean loss of its stars."
    results = [(step(*batch), len(batch[0])) for batch in model._batches(data, epoch)]
    losses, sizes = zip(*results)
    losses = np.asarray(tf.stack(losses), dtype=float)
    if not np.isfinite(losses).all():
        raise LabError(
            f"the loss is no longer finite in epoch {epoch + 1}: "
            f"take a smaller learning_rate than {model.learning_rate:g}"
        )
    return float(np.average(losses, weights=sizes))


def _identity(model, held):
    "Fingerprint of a training: kind of model, parameters, stars learned from and set aside."
    parameters = dict(model.get_params())
    if not model.paced:
        del parameters["epochs"]  # more epochs are the same training, longer
    facts = (type(model).__name__, parameters, model.training_digest_, model.label_names_)
    identity = hashlib.sha256(repr(facts).encode())
    for array in held or ():
        identity.update(np.asarray(array).tobytes())
    return identity.hexdigest()


@contextmanager
def _tidied():
    """What is made within and refers to itself is collected at the end; free memory goes back to
    the machine where C allows it."""
    ours = not gc.get_freeze_count()
    if ours:
        gc.freeze()  # a million objects of TensorFlow were there before: nobody looks through them
    try:
        yield
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    finally:
        if ours:
            gc.unfreeze()


# %%
by_number = _mean_loss(TenStars(), lambda stars: tf.reduce_mean(stars), _as_tensors([range(10)]), 0)
print(f"ten stars with the losses 0 to 9, in batches of 4, 4 and 2: mean {by_number}")
assert by_number == 4.5


# %% [markdown]
# Now the training itself. Stars set aside are never learned from. Their loss tells when a network begins to learn its training stars by heart.

# %%
#| export
class _Training(_Layers):
    "Stars become tensors, layers become models, and the epochs go by."

    def _sets(self, flux, ivar, validation):
        "Stars to learn from and stars set aside (or None): tensors of flux, ivar, scaled labels."
        stars = (flux, ivar, self.scale(self.training_labels_))
        held = None
        if isinstance(validation, Spectra):
            asked = check_spectra(self, validation)
            truth = self.scale(validation.labels(self.label_names_))
            held = (finite_flux(asked.flux, asked.ivar), asked.ivar, truth)
        elif self.validation:
            rows, others = train_test_rows(len(flux), self.validation, self.seed)
            held = tuple(array[others] for array in stars)
            stars = tuple(array[rows] for array in stars)
        if self.keep_best and held is None:
            raise LabError(
                "keep_best needs stars set aside: give fit a validation set, "
                "or the network a share (validation=0.2)"
            )
        return _as_tensors(stars), None if held is None else _as_tensors(held)

    def _assemble(self):
        "Keras models: `core_` in scaled labels is trained; `keras_`, in physical ones, is kept."
        pixels = len(self.typical_flux_)
        inputs = [keras.Input((pixels,), name="flux"), keras.Input((pixels,), name="ivar")]
        self.net_ = self._build(pixels, len(self.label_names_))
        output = self.net_(self._prepare(*inputs))
        self.core_ = keras.Model(inputs, output)
        self.keras_ = keras.Model(inputs, self._finish(output))

    def _train(self, data, held, checkpoint, progress):
        optimizer = self._optimizer()
        step, loss_of = _compiled(self.core_, self._loss, optimizer)
        variables = [*self.core_.variables, *optimizer.variables]
        identity = None if checkpoint is None else _identity(self, held)
        state = _State(checkpoint, identity, variables)
        history = {"loss": []} if held is None else {"loss": [], "val_loss": []}
        epoch, self.history_, best = state.begin(history)
        bar = {"total": self.epochs, "initial": epoch, "desc": "training", "unit": "epoch"}
        with tqdm(**bar, disable=not progress, leave=False) as bar:
            while epoch < self.epochs:
                self.history_["loss"].append(_mean_loss(self, step, data, epoch))
                if held is not None:
                    self.history_["val_loss"].append(float(loss_of(*held)))
                    if self.keep_best and np.argmin(self.history_["val_loss"]) == epoch:
                        best = self.core_.get_weights()
                epoch += 1
                state.keep(epoch, self.history_, best, last=epoch == self.epochs)
                bar.update()
                latest = {name: f"{values[-1]:.4f}" for name, values in self.history_.items()}
                bar.set_postfix(latest, refresh=False)
        self.best_epoch_ = epoch - 1
        if self.keep_best:
            self.best_epoch_ = int(np.argmin(self.history_["val_loss"]))
        if best is not None:
            self.core_.set_weights(best)


# %% [markdown]
# Ten stars again, a fifth of them set aside:

# %%
class TenStarsSplit(_Training):
    validation = 0.2
    keep_best = False
    seed = 42
    training_labels_ = np.arange(10.0)[:, None]

    def scale(self, labels):
        return labels


data, held = TenStarsSplit()._sets(np.ones((10, 3)), np.ones((10, 3)), None)
print(f"{len(data[0])} to learn from, {len(held[0])} set aside")
assert not set(data[2].numpy().ravel()) & set(held[2].numpy().ravel())


# %% [markdown]
# A reader that is trained: `fit` takes the steps in their order, and `_read` asks the Keras model.

# %%
#| export
class _Trainable(_Training, LabelReader):
    "A reader of labels that is trained in epochs."

    @all_or_nothing
    def fit(
        self,
        labels,
        flux: np.ndarray = None,
        ivar: np.ndarray = None,
        label_names: Sequence = None,
        wavelength: np.ndarray = None,
        *,
        validation: Spectra = None,
        checkpoint=None,
        progress: bool = True,
    ) -> "Network":
        """Train on stars with known labels; the same seed gives the same network on one machine.

        Parameters
        ----------
        labels, flux, ivar, label_names, wavelength
            as for `Cannon.fit`; a `Spectra` alone holds all of it
        validation : Spectra, optional
            other stars to follow the loss on; by default the share ``validation`` of these
        checkpoint : str or Path, optional
            file for the state of the training, from which an interrupted one goes on
        progress : bool, default True
            show a bar

        Returns
        -------
        Network
            itself, with the losses of all epochs in ``history_``

        Raises
        ------
        LabError
            where the loss is no longer finite, or the checkpoint is of another training
        """
        flux, ivar = self._begin(labels, flux, ivar, label_names, wavelength)
        data, held = self._sets(flux, ivar, validation)
        del labels, flux, ivar, validation  # the tensors are all that is needed, and are copies
        keras.utils.set_random_seed(self.seed)
        tf.config.experimental.enable_op_determinism()
        with _tidied():
            self._look(*data)
            self._assemble()
            self._train(data, held, checkpoint, progress)
            del data, held
        return self

    def _read(self, flux, ivar):
        check_is_fitted(self, "keras_")
        outputs = self._by_blocks(
            lambda *block: self.keras_(_as_tensors(block), training=False), flux, ivar
        )
        if isinstance(outputs[0], dict):
            covariance = np.concatenate([output["covariance"] for output in outputs]).astype(float)
            outputs = [output["labels"] for output in outputs]
            return np.concatenate(outputs).astype(float), covariance
        labels = np.concatenate(outputs).astype(float)
        return labels, self._covariance(labels, ivar)

    def _covariance(self, labels, ivar):
        "Covariance (N, K, K) of labels where the Keras model does not give one: unknown."
        return np.full((*labels.shape, labels.shape[1]), np.nan)


# %% [markdown]
# On made-up stars that follow three labels exactly, with a single layer and all choices written out:

# %%
def made_up(seed=3):
    "300 spectra of 60 pixels that depend linearly on three labels: labels, flux, ivar."
    scaled = np.random.default_rng(seed).normal(size=(300, 3))
    flux = 0.9 + 0.03 * scaled @ np.random.default_rng(0).normal(size=(3, 60))
    labels = [4500, 2.0, -0.3] + scaled * [400, 0.8, 0.3]
    return labels, flux.astype("f4"), np.full(flux.shape, 1e4, "f4")


class WrittenOut(_Trainable):
    labels = None
    epochs = 20
    batch_size = 100
    learning_rate = 0.05
    centre = True
    validation = 0.2
    keep_best = False
    seed = 42

    def _build(self, n_pixels, n_labels):
        return keras.Sequential([keras.Input((n_pixels,)), keras.layers.Dense(n_labels)])


# %%
three = ["TEFF", "LOGG", "M_H"]
labels, flux, ivar = made_up()
first = WrittenOut().fit(labels, flux, ivar, three, progress=False)
losses = first.history_
Table({"loss": losses["loss"], "of stars set aside": losses["val_loss"]})[::5]

# %%
assert losses["val_loss"][-1] < 0.1 * losses["val_loss"][0]
assert first.read(flux, ivar).shape == (300, 3)

# %% [markdown]
# ### Kept in a file
# A network is saved in Keras' own format, and with it goes everything that others need: labels, scaling, grid, the digest of the training set, versions. These facts can be read without building the network. The file names the class
# that wrote it, and only a class that this package or the reader has defined is used.

# %%
#| export
_NETWORK_FORMAT = 1
_MEMBER = "stellar_lab.json"  # the part of the file that is ours
_FACTS = {
    "stellar_lab_model": Held("text"),
    "module": Held("text"),
    "versions": Held("facts"),
    "parameters": Held("facts"),
    "learned": Held("facts"),
}
_KERAS_MEMBERS = ("metadata.json", "config.json", "model.weights.h5")
_MOST_JSON = 1 << 28  # bytes of a text in the file, unpacked


@contextmanager
def _opened(path):
    "The parts of a Keras file, once it is sure that they do not unpack to more than they should."
    read_regular(path, first=1)
    with zipfile.ZipFile(path) as file:
        parts = file.infolist()
        names = {part.filename for part in parts}
        if len(names) < len(parts) or names - {*_KERAS_MEMBERS, _MEMBER}:
            raise WrongFile("its parts are not those of a network")
        for part in parts:
            packed = part.compress_size < part.file_size / 50 and part.file_size > 1 << 20
            text = part.filename.endswith(".json") and part.file_size > _MOST_JSON
            if packed or text:
                raise WrongFile(f"its part {part.filename} is far too large")
        yield file


def _fingerprint(file, facts):
    "SHA-256 of Keras' own parts of a file and of what else the file says."
    digest = hashlib.sha256()
    for name in _KERAS_MEMBERS:
        digest.update(hashlib.sha256(file.read(name)).digest())
    said = {name: value for name, value in facts.items() if name != "fingerprint"}
    digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()


def _to_json(value):
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    return plain_value(value)


def _from_json(value):
    if isinstance(value, dict) and "array" in value:
        dtype = np.dtype(value["dtype"])
        if dtype.kind not in "biuf":
            raise WrongFile(f"it holds an array of {dtype}")
        return np.array(value["array"], dtype=dtype)
    return value


# %%
print(_to_json(np.float32([1, 2])))
assert _from_json(_to_json(np.float32([1, 2]))).dtype == "f4"


# %%
#| exporti
def network_facts(path) -> dict:
    """What a file of a network says of itself, without building it.

    Parameters
    ----------
    path : str or Path
        .keras file

    Returns
    -------
    dict
        ``stellar_lab_model`` (name of the class), ``versions``, ``parameters``, ``learned``

    Raises
    ------
    LabError
        where there is no such file, or it is no network of this version
    """
    try:
        with _opened(path) as file:
            tree = json.loads(file.read(_MEMBER))
        if not isinstance(tree, dict):
            raise WrongFile("it says nothing of itself")
    except FileNotFoundError as error:
        raise LabError(f"there is no network at {path}: train one and save it there") from error
    except Exception as error:  # whatever a foreign or damaged file brings about
        raise LabError(
            f"{path} is not a network of stellar_lab ({said_of(error)}): train the network again"
        ) from error
    version = tree.get("format_version")
    if type(version) is not int or version != _NETWORK_FORMAT:
        raise LabError(
            f"{path} has the format {version!r:.50}; this version reads format {_NETWORK_FORMAT}: "
            "train the network again"
        )
    with whole_model(path, "network"):
        check_held(tree, _FACTS)
        if not all(isinstance(v, str) for v in tree["versions"].values()):
            raise WrongFile("it does not say by which versions it was made")
    return tree


# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "notes.keras"
    path.write_text("not a network")
    with pytest.raises(LabError, match="notes.keras is not a network of stellar_lab") as refused:
        network_facts(path)
print(str(refused.value).replace(str(path), "notes.keras"))


# %%
#| export
def _facts(model):
    "What the file says of a network beside Keras' own part."
    keras_models = ("keras_", "core_", "net_")
    learned = {k: v for k, v in vars(model).items() if k.endswith("_") and k not in keras_models}
    versions = {"stellar_lab": __version__, "tensorflow": tf.__version__}
    versions |= {"keras": keras.__version__, "numpy": np.__version__}
    return {
        "stellar_lab_model": type(model).__name__,
        "module": type(model).__module__,
        "format_version": _NETWORK_FORMAT,
        "versions": versions,
        "parameters": {name: _to_json(value) for name, value in model.get_params().items()},
        "learned": {name: _to_json(value) for name, value in learned.items()},
    }


def _network_class(tree, path):
    "The class that a file names: of this package, or defined already. Nothing else is imported."
    if tree["module"].startswith("stellar_lab."):
        with suppress(ImportError):
            import_module(tree["module"])
    known = []
    found = [_InKerasFile]
    while found:
        known += found
        found = [below for kind in found for below in kind.__subclasses__()]
    named = [kind for kind in known if kind.__name__ == tree["stellar_lab_model"]]
    if not named:
        raise LabError(
            f"{path} holds a {tree['stellar_lab_model']!r}, which is not known here: "
            f"import {tree['module']} first"
        )
    named.sort(key=lambda kind: kind.__module__ == tree["module"])  # last: of the module named
    return named[-1]


# %%
facts = _facts(first)
print(facts["stellar_lab_model"], "learned", ", ".join(facts["learned"]))
assert not {"keras_", "core_", "net_"} & set(facts["learned"])


# %%
#| export
def _rebuilt(kind, tree, path):
    "The network again, from what its file says and what Keras reads."
    with whole_model(path, kind.__name__):
        parameters = {name: _from_json(value) for name, value in tree["parameters"].items()}
        check_parameters(kind, parameters, path)
        model = kind(**parameters)
        learned = {name: _from_json(value) for name, value in tree["learned"].items()}
        check_held(learned | {"parameters": parameters}, LabelReader._entries | _LEARNED)
        for name, value in learned.items():
            if not name.endswith("_") or hasattr(kind, name):
                raise WrongFile(f"it has the entry {name}")
            held = LabelReader._entries.get(name)
            if value is not None or held is None or not held.optional:
                setattr(model, name, value)  # nothing in place of an entry: nobody has learned it
        if not hasattr(model, "wavelength_"):
            model.wavelength_ = None  # it may be unknown
        model.label_names_ = tuple(model.label_names_)
        model._check_restored()
    try:
        with _opened(path) as file:
            if tree.get("fingerprint") != _fingerprint(file, tree):
                raise WrongFile("something in it was changed since it was written")
        model.keras_ = keras.saving.load_model(path, compile=False)
        layers = model.keras_.layers
        model.net_ = next(layer for layer in layers if isinstance(layer, keras.Model))
    except Exception as error:  # whatever Keras makes of a broken file
        raise LabError(
            f"{path} cannot be read ({said_of(error)}): train the network again"
        ) from error
    with whole_model(path, kind.__name__):
        _try_out(model)
    return model


_LEARNED = {"history_": Held("facts"), "best_epoch_": Held("whole", low=0)}


def _try_out(model):
    "ValueError unless the layers read a spectrum and say as many labels as there are names."
    for losses in model.history_.values():
        if not all(isinstance(loss, int | float) for loss in losses):
            raise WrongFile("its losses are no numbers")
    K = len(model.label_names_)
    star = np.ones((1, len(model.typical_flux_)), np.float32)
    labels, covariance = model._read(star, star)[:2]
    if labels.shape != (1, K) or covariance.shape != (1, K, K):
        raise WrongFile(f"its layers do not say {K} labels")


# %%
_try_out(first)
shorter = copy(first)
shorter.label_names_ = ("A",)
with pytest.raises(ValueError, match="do not say 1 labels") as problem:
    _try_out(shorter)
print(problem.value)


# %%
#| export
class _InKerasFile:
    "Writing a network to Keras' own file and reading it back."

    def save(self, path):
        """Write the network, whole or not at all.

        Parameters
        ----------
        path : str or Path
            .keras file; replaced if it exists. Keras alone reads it, too: flux and ivar in,
            labels in physical units out

        Raises
        ------
        LabError
            where the extension is another one
        NotFittedError
            where there is nothing to write yet
        """
        check_is_fitted(self, "keras_")
        if Path(path).suffix.lower() != ".keras":
            raise LabError(f"cannot write the network to {path}: its extension must be .keras")
        with atomic_path(path) as temporary:
            self.keras_.save(temporary)
            facts = json.loads(json.dumps(_facts(self)))
            with zipfile.ZipFile(temporary) as file:
                facts["fingerprint"] = _fingerprint(file, facts)
            with zipfile.ZipFile(temporary, "a", zipfile.ZIP_DEFLATED) as file:
                file.writestr(_MEMBER, json.dumps(facts))

    @classmethod
    def load(cls, path) -> "Network":
        """Read a network that `save` wrote.

        Parameters
        ----------
        path : str or Path
            .keras file

        Returns
        -------
        Network
            of this class or one derived from it, ready for `infer`

        Raises
        ------
        LabError
            where the file is missing, damaged, or holds another kind of model
        """
        tree = network_facts(path)
        kind = _network_class(tree, path)
        if not issubclass(kind, cls):
            raise LabError(
                f"{path} holds a {kind.__name__}, which is not a {cls.__name__}: "
                f"load it with {kind.__name__}.load"
            )
        return _rebuilt(kind, tree, path)


# %%
class Kept(_InKerasFile, WrittenOut):
    "The network above, with a file."


kept = Kept().fit(labels, flux, ivar, three, progress=False)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "kept.keras"
    kept.save(path)
    facts = network_facts(path)
    again = Kept.load(path)
print("the file says:", facts["stellar_lab_model"], "for", ", ".join(again.label_names_))
assert np.array_equal(again.read(flux, ivar), kept.read(flux, ivar))
with pytest.raises(LabError, match="oracle.keras holds a 'Oracle', which is not known here"):
    _network_class({"stellar_lab_model": "Oracle", "module": "delphi"}, "oracle.keras")


# %% [markdown]
# ### The network
# All together, and the parameters that networks share. This is the class to build on.

# %%
#| export
class Network(_InKerasFile, _Trainable):
    """A Keras network from spectrum to labels.

    A subclass says in `_build` which layers it has, and may override what else `_Layers` lists.

    Parameters
    ----------
    labels : sequence of str, optional
        names of the labels to learn from a `Spectra`; by default all that it holds
    epochs : int, default 100
        times that each star is seen
    batch_size : int, default 32
        stars to a step
    learning_rate : float, default 0.001
        of Adam with amsgrad (Reddi et al. 2018, arXiv:1904.09237)
    centre : bool, default True
        subtract the typical flux before anything else
    validation : float, default 0
        share of the training stars to set aside, to follow the loss
    keep_best : bool, default False
        keep the weights of the epoch with the lowest loss of the stars set aside
    seed : int, default 42
    """

    def __init__(
        self,
        labels: Sequence = None,
        epochs: int = 100,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        centre: bool = True,
        validation: float = 0,
        keep_best: bool = False,
        seed: int = 42,
    ):
        self.labels = labels
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.centre = centre
        self.validation = validation
        self.keep_best = keep_best
        self.seed = seed


# %% [markdown]
# ## A network in three lines
# A network of one's own needs little. This one has a single dense layer, so on the made-up stars it should find the map that we put in. A tenth of the pixels is bad, with nonsense in them.

# %%
class OneLayer(Network):
    "A single dense layer, for trying things out."

    def _build(self, n_pixels, n_labels):
        return keras.Sequential([keras.Input((n_pixels,)), keras.layers.Dense(n_labels)])


# %%
labels, flux, ivar = made_up()
ivar[np.random.default_rng(1).random(ivar.shape) < 0.1] = 0
flux[ivar == 0] = np.nan
small = OneLayer(epochs=60, learning_rate=0.05).fit(labels, flux, ivar, three, progress=False)
residual = small.scale(label_values(infer(small, flux, ivar), three)) - small.scale(labels)
losses = small.history_["loss"]
print(f"loss at the start {losses[0]:.2f}, at the end {losses[-1]:.3f}")
assert losses[-1] < 0.05 and np.sqrt(np.mean(residual[:, 0] ** 2)) < 0.2

# %% [markdown]
# Without bad pixels the map itself must come back: labels of new stars to a hundredth of their spread.

# %%
labels, flux, ivar = made_up()
exact = OneLayer(epochs=300, batch_size=100, learning_rate=0.02)
exact.fit(labels, flux, ivar, three, progress=False)
new_labels, new_flux, new_ivar = made_up(seed=9)
residual = exact.scale(exact.read(new_flux, new_ivar)) - exact.scale(new_labels)
print(f"largest error {np.abs(residual).max():.4f}")
assert np.abs(residual).max() < 0.01

# %% [markdown]
# The same seed gives the same network, to the last bit; another seed another one. And whatever stands in a bad pixel must not matter.

# %%
answers = {}
for name, seed in {"first": 42, "again": 42, "other": 43}.items():
    network = OneLayer(epochs=5, seed=seed).fit(labels, flux, ivar, three, progress=False)
    answers[name] = network.read(flux, ivar)
print(
    "temperature of a star:", {name: round(float(read[0, 0]), 2) for name, read in answers.items()}
)
assert np.array_equal(answers["first"], answers["again"])
assert not np.array_equal(answers["first"], answers["other"])

# %%
holes = ivar.copy()
holes[:, 7] = 0
nothing = np.where(holes > 0, flux, np.nan)
nonsense = np.where(holes > 0, flux, 99)
assert np.array_equal(network.read(nothing, holes), network.read(nonsense, holes))
filled = flux.copy()
filled[:, 7] = network.typical_flux_[7]
assert np.allclose(network.read(flux, holes), network.read(filled, ivar), rtol=1e-6)

# %% [markdown]
# ### Interrupted
# Trained for 8 epochs at once, or stopped after 3 and taken up again from the file: the same weights, bit by bit. A state that belongs to another training is refused.

# %%
options = {"validation": 0.2, "keep_best": True, "seed": 5}
with tempfile.TemporaryDirectory() as folder:
    to_learn = (labels, flux, ivar, three)
    kept = {"checkpoint": Path(folder) / "training.npz", "progress": False}
    whole = OneLayer(epochs=8, **options).fit(*to_learn, progress=False)
    OneLayer(epochs=3, **options).fit(*to_learn, **kept)
    resumed = OneLayer(epochs=8, **options).fit(*to_learn, **kept)
    with pytest.raises(LabError, match="is the state of another training"):
        OneLayer(epochs=8).fit(*to_learn, **kept)
print("loss epoch by epoch:", np.round(resumed.history_["loss"], 3))
assert whole.history_ == resumed.history_ and len(whole.history_["val_loss"]) == 8
assert whole.best_epoch_ == np.argmin(whole.history_["val_loss"])
for one, two in zip(whole.net_.get_weights(), resumed.net_.get_weights()):
    assert np.array_equal(one, two)

# %% [markdown]
# ## The original lab's network
# Six dense layers, all linear, weights drawn uniformly at the start, Adam with amsgrad (which ended the spikes of the loss), mean squared error, 32 stars to a batch, 250 epochs. For the survey's
# five labels these are 13,623,325 weights.
#
# What photon noise does to its labels we know [from ridge regression](13_readers.ipynb), as soon as the layers are multiplied out.

# %%
#| export
LAB_EPOCHS = 250


class LabNetwork(Network):
    """The original lab's network: dense layers, all linear, hence an affine map.

    Parameters
    ----------
    labels, batch_size, learning_rate, validation, keep_best, seed
        as of `Network`
    epochs : int, default 250
    centre : bool, default False
        the original lab fed the flux as it is; with True the same layers see the flux minus its
        mean
    """

    widths = (1000, 2000, 2000, 200, 20)  # of the layers; one more layer for the labels

    def __init__(
        self,
        labels: Sequence = None,
        epochs: int = LAB_EPOCHS,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        centre: bool = False,
        validation: float = 0,
        keep_best: bool = False,
        seed: int = 42,
    ):
        super().__init__(
            labels, epochs, batch_size, learning_rate, centre, validation, keep_best, seed
        )

    def _build(self, n_pixels, n_labels):
        layers = [
            keras.layers.Dense(width, activation="linear", kernel_initializer="random_uniform")
            for width in (*self.widths, n_labels)
        ]
        return keras.Sequential([keras.Input((n_pixels,)), *layers])

    def affine_map(self) -> tuple:
        """The layers multiplied out, and centring and scaling with them: labels = W flux + b.

        Returns
        -------
        W : (K, P) array
            physical units of the labels per unit of flux
        b : (K,) array
            physical units
        """
        check_is_fitted(self, "net_")
        product = np.eye(len(self.label_names_))
        constant = np.zeros(len(self.label_names_))
        for layer in reversed(self.net_.layers):
            kernel, bias = (np.asarray(part, dtype=float) for part in layer.get_weights())
            constant = constant + bias @ product
            product = kernel @ product
        weights = product.T * self.scales_[:, None]
        shift = weights @ self.typical_flux_ if self.centre else 0
        return weights, self.unscale(constant) - shift

    def _covariance(self, labels, ivar):
        return photon_covariance(self.affine_map()[0], np.where(self.usable_, ivar, 0))


# %%
survey_labels = ["TEFF", "LOGG", "FE_H", "MG_FE", "SI_FE"]
blank = LabNetwork(epochs=0, labels=survey_labels)
blank.fit(np.random.default_rng(0).normal(size=(8, 5)), np.ones((8, 7214), "f4"), progress=False)
assert blank.net_.count_params() == 13_623_325
print(f"{blank.net_.count_params():,} weights, of which {7214 * 5 + 5:,} would do")


# %% [markdown]
# ## Training
# We train it twice. Once as the original lab did, on the flux as it is. Once with the typical flux subtracted first. That adds no new function, since $W(\mathbf f-\bar{\mathbf f})+\mathbf b$ is again $W\mathbf f+\mathbf b'$, but it
# changes the way downhill: 7,214 fluxes near one all push the same way, and any change of a weight first of all moves the mean prediction of all stars.
#
# The full profile trains both for the original lab's 250 epochs. The quick profile counts steps instead: twenty for the first, to see how it begins, and a hundred and twenty for the second, which are enough to come near its final error. An
# epoch with more stars has more steps, so fewer epochs are needed.

# %%
#| exporti
def epochs_within(steps: int, stars: int, most: int = LAB_EPOCHS, batch_size: int = 32) -> int:
    """The epochs that hold so many steps, the last one whole.

    Parameters
    ----------
    steps : int
        that a training may take
    stars : int
        to train on
    most : int, default 250
        epochs, at most
    batch_size : int, default 32
        stars to a step

    Returns
    -------
    int
    """
    steps_per_epoch = math.ceil(stars / batch_size)
    return min(most, math.ceil(steps / steps_per_epoch))


# %%
assert epochs_within(500, 320) == 50 and epochs_within(500, 1_010) == 16
assert epochs_within(501, 320, batch_size=64) == 101 and epochs_within(500, 320, most=20) == 20
print("epochs of 200 steps with 320 stars:", epochs_within(200, 320))

# %%
use_style()
record = archive_record(archive_root())
names = list(record.labels)
spectra, _ = training_set(archive_root(), progress=False)
train, test = train_test_rows(len(spectra))
truth = spectra[test].labels(names)

# %%
steps = {"flux as it is": 20, "flux centred": 120}
networks = {}
for name, number in steps.items():
    epochs = LAB_EPOCHS if profile() == "full" else epochs_within(number, len(train))
    network = LabNetwork(labels=names, epochs=epochs, centre=name == "flux centred")
    networks[name] = network.fit(spectra[train], validation=spectra[test], progress=False)


# %%
#| export
def plot_history(histories: dict, ax=None):
    """Loss of training stars (lines) and of stars set aside (dashes) against the epoch.

    Parameters
    ----------
    histories : dict
        name -> ``history_`` of a network
    ax : Axes, optional
        made by default

    Returns
    -------
    Axes
    """
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3))
    for k, (name, history) in enumerate(histories.items()):
        for kind, style in (("loss", "-"), ("val_loss", "--")):
            losses = history.get(kind, [])
            shown = name if kind == "loss" else None
            ax.plot(1 + np.arange(len(losses)), losses, style, color=f"C{k}", label=shown)
    ax.axhline(1, color="0.6", lw=0.8, zorder=0)
    ax.set(xlabel="epoch", ylabel="loss (scaled labels, squared)", yscale="log")
    ax.legend(frameon=False)
    return ax


# %%
plot_history({name: network.history_ for name, network in networks.items()});

# %%
#| echo: false
network = networks["flux centred"]
raw = networks["flux as it is"].history_
centred = network.history_
Markdown(
    "**What to see.** Solid: training stars, dashed: test stars, grey: a network that answers the "
    f"mean. With flux as it is the loss starts at {raw['loss'][0]:.0f}, with the flux centred at "
    f"{centred['loss'][0]:.2f}. It ends at {centred['loss'][-1]:.3f} for the training stars, at "
    f"{centred['val_loss'][-1]:.3f} for the test stars: with more weights than stars, one can "
    "learn the stars by heart."
)

# %%
assert network.history_["val_loss"][-1] < 0.5 and raw["loss"][0] > 10 * centred["loss"][0]

# %% [markdown]
# Recorded once with 250 epochs of Keras' own Adam (24 November 2026, two processor cores, 320 training stars of the embedded archive, seed 42): on the flux as it is, the loss was still 0.54 and the scaled RMSE of the test stars,
# averaged over the labels, 0.70. Centred, the loss was 0.42 after 20 epochs, 0.39 after 50 and 0.39 after 250 (then 79 K, 0.199, 0.081, 0.049 in the first four labels). The original lab had six times as many stars, hence six times as
# many steps in its 250 epochs, and they were needed.
#
# ## One line in disguise
# We multiply out the layers of the trained network, in double precision, from the side of the labels (so that no product is larger than pixels × labels): one matrix, one vector. On stars it says what the network says.

# %%
weights, constant = network.affine_map()
by_map = network.fill(spectra[test].flux, spectra[test].ivar) @ weights.T + constant
by_network = network.read(spectra[test])
difference = np.abs(network.scale(by_map) - network.scale(by_network)).max()
print(f"network and map differ by {difference:.1e} scaled units at most")

# %%
assert difference < 1e-4
assert np.linalg.matrix_rank(weights) == len(names) <= min(LabNetwork.widths)  # the narrowest layer

# %% [markdown]
# The difference is the rounding of single precision. No training, however long, can make this network more than a line: whatever it learns, ridge regression can be asked for.
#
# ### What the line looks at
# A row of $W$ is a spectrum: the weight that each pixel has in a label. We draw it with the row that ridge regression found, in the same units, below the typical star.

# %%
ridge = RidgeLabels(labels=names).fit(spectra[train])
lines = {"network": weights, "ridge": ridge.affine_map()[0]}
colors = {"network": "C0", "ridge": "C3"}
window = (15990, 16210)
fig, axes = plt.subplots(4, 1, figsize=(9, 6.4), sharex=True)
typical = network.typical_flux_
plot_spectrum(spectra.wavelength, typical, network.usable_, window, ax=axes[0], color="0.3")
axes[0].set_ylabel("mean flux")
for ax, name, k in zip(axes[1:], names, range(3)):
    for kind, rows in lines.items():
        row = rows[k] / network.scales_[k]
        plot_spectrum(spectra.wavelength, row, None, window, ax=ax, color=colors[kind], label=kind)
    ax.set_ylabel(LABELS[name].symbol)
axes[1].legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
for ax in axes:
    ax.label_outer()

# %%
alike = [np.corrcoef(lines["network"][k], lines["ridge"][k])[0, 1] for k in range(len(names))]
Table({"label": names, "correlation of the two rows": np.round(alike, 2)})

# %%
#| echo: false
size = [np.linalg.norm(rows / network.scales_[:, None]) for rows in lines.values()]
Markdown(
    "**What to see.** Scaled label per unit of flux. Both lines read the same features. The "
    f"weights of the network are {size[0] / size[1]:.1f} times as long as those of the ridge. A "
    "Cannon's derivative shows which pixels change with a label; these weights also say what to "
    "subtract so that the other labels do not show."
)

# %%
assert np.mean(alike) > 0.3 or record.name != "clusters"  # two ways to nearly the same line

# %% [markdown]
# ## Judged on the same stars
# The same split, the same tables, the same figures as for [the Cannon](05_cannon.ipynb).

# %%
models = {
    "Cannon": Cannon(scatter=True, labels=names).fit(spectra[train]),
    "ridge": ridge,
    "network": network,
    "network, flux as it is": networks["flux as it is"],
}
tables = {name: infer(model, spectra[test]) for name, model in models.items()}
known = infer(network, spectra[train])
stars = {"training": (known, spectra[train].labels(names)), "test": (tables["network"], truth)}
plot_comparison(stars, names)
compared = {name: (tables[name], truth) for name in ("Cannon", "network")}
plot_comparison(compared, names, difference=True);

# %%
judged = {name: error_table(table, truth, names, network.scales_) for name, table in tables.items()}
rows = []
for name, errors in judged.items():
    row = {"model": name}
    for label_name, rmse, bias in zip(names, errors["rmse"], errors["bias"]):
        row[label_name] = f"{rmse:.3g} ({bias:+.2g})"
    rows.append(row | {"mean scaled RMSE": f"{errors['scaled_rmse'].mean():.3f}"})
Table(rows)

# %%
#| echo: false
mean = {name: errors["scaled_rmse"].mean() for name, errors in judged.items()}
Markdown(
    f"**What to see.** RMSE (bias) of {len(test)} test stars, {profile()} profile. The network is "
    f"behind the line that ridge regression finds: {mean['network'] / mean['Cannon']:.2f} times "
    f"the Cannon's error against {mean['ridge'] / mean['Cannon']:.2f}. In the first panels "
    "training stars lie on the diagonal and test stars do not. That is learning by heart, which "
    "the ridge's penalty holds back."
)

# %%
assert mean["network"] < 0.8 and mean["network"] < mean["network, flux as it is"]
assert mean["ridge"] < mean["network"] < 1.3 * mean["Cannon"] or record.name != "clusters"
of_training = error_table(known, spectra[train].labels(names), names, network.scales_)
assert of_training["scaled_rmse"].mean() < mean["network"]

# %% [markdown]
# ## Errors
# A line carries the photons' noise over exactly. What it gets wrong otherwise, only stars left out can tell. Half of the test stars teach [the error model](07_judging.ipynb), the other half judges it. A network that states no error at
# all gets the floor alone.

# %%
half = np.arange(len(test)) % 2 == 0
calibrated = with_error_model(network, tables["network"][half], truth[half])
stated = {
    "formal": tables["network"][~half],
    "calibrated": infer(calibrated, spectra[test[~half]]),
}
within = {}
for kind, table in stated.items():
    errors = label_values(table, [f"{name}_err" for name in names])
    pulls = (label_values(table, names) - truth[~half]) / errors
    within[kind] = np.mean(np.abs(pulls) < 1, axis=0)
shares = {name: [f"{share[k]:.0%}" for share in within.values()] for k, name in enumerate(names)}
Table({"errors": list(within), **shares})

# %%
#| echo: false
formal_size = {
    name: np.median(label_values(tables[name], [f"{names[0]}_err"]))
    for name in ("Cannon", "network")
}
Markdown(
    "**What to see.** Share of stars within one error. The network's formal errors hold more often "
    f"than the Cannon's, for they are larger: {formal_size['network']:.0f} K in temperature, where "
    f"the Cannon's are {formal_size['Cannon']:.0f} K. The Cannon gives a noisy pixel little "
    "weight; the line gives each pixel its fixed weight, however noisy it is in this star."
)

# %%
binomial = np.sqrt(0.68 * 0.32 / (~half).sum())
assert formal_size["network"] > formal_size["Cannon"]
assert np.all(np.abs(within["calibrated"] - 0.68) < 4 * binomial)
table = infer(exact, new_flux, new_ivar)
assert np.isnan(table["teff_err"]).all()
silent = with_error_model(exact, table, new_labels)
assert np.isfinite(infer(silent, new_flux, new_ivar)["teff_err"]).all()

# %% [markdown]
# ## Keep it
# The file gives the same labels to the last bit, and the command line takes it as it takes a Cannon: `stellar-lab label --model network.keras …`. Keras alone can read it, too.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "network.keras"
    calibrated.save(path)
    loaded = Network.load(path)
    by_keras = keras.saving.load_model(path, compile=False)
    files = []
    if spectra.stars.meta["product"] == "apstar":
        files = sorted(archive_root().rglob("apStar-*.fits"))[:3]
    by_command = label(path, files, progress=False).table if files else None
print(
    f"read back: a {type(loaded).__name__}, {loaded.net_.count_params():,} weights, "
    f"errors {loaded.errors_}"
)
assert type(loaded) is LabNetwork and loaded.get_params() == calibrated.get_params()
assert loaded.training_digest_ == calibrated.training_digest_
assert np.array_equal(loaded.read(spectra[test]), calibrated.read(spectra[test]))
assert np.array_equal(loaded.error_floor_, calibrated.error_floor_)
two = [spectra[test[:2]].flux, spectra[test[:2]].ivar]
assert np.array_equal(np.asarray(by_keras(two)), np.asarray(calibrated.keras_(two)))

# %%
if by_command is not None:
    raw_spectra, *_ = read_files(files, progress=False)
    asked = infer(calibrated, as_trained(calibrated, raw_spectra))
    close = {"rtol": 1e-5, "equal_nan": True}
    assert np.allclose(by_command["teff"].value, asked["teff"].value, **close)
fresh = clone(network)
assert not hasattr(fresh, "keras_") and fresh.get_params() == network.get_params()

# %% [markdown]
# ## What goes wrong, said clearly
# A star without a usable pixel has no labels, and says so; its neighbours do not notice. Spectra on another grid are refused.

# %%
two = spectra[test[:2]]
blind = infer(network, two.flux, np.where([[True], [False]], 0, two.ivar))
assert np.isnan(blind["teff"][0]) and blind["flags"][0] == Flag.NOT_CONVERGED | Flag.FEW_PIXELS
assert np.allclose(blind["teff"][1].value, infer(network, two)["teff"][1].value, rtol=1e-6)
with pytest.raises(LabError, match=r"must both be \(N, 7214\)"):
    infer(network, two.flux[:, :100], two.ivar[:, :100])
with pytest.raises(LabError, match="keep_best needs stars set aside"):
    OneLayer(keep_best=True).fit(labels, flux, ivar, three)
with pytest.raises(LabError, match="its extension must be .keras"):
    network.save("network.h5")

# %% [markdown]
# **Exercise.** Give `OneLayer` a hidden layer with `activation="relu"` and train it on the real stars, centred and as they are. Which of the two does the original lab's remark "nonlinear layers: loss stuck at 1" describe, and why does centring mend it?
