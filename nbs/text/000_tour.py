# %% [markdown]
# # From a folder of stars to labels in a minute
# > The tour: read real spectra, train a model on some of them, label the others with calibrated errors, look at a star, and watch metals change a spectrum.
#
# **Question.** Here are spectra of some five hundred red giants. How hot is each, how strong is its gravity, how rich is it in metals, and how sure are we?
#
# **Idea.** A survey has measured *labels* of these stars: temperature, gravity, abundances. We learn from some of the stars what a spectrum with given labels looks like. Then we turn the
# question round: which labels fit a new spectrum best? That is [The Cannon](https://doi.org/10.1088/0004-637X/808/1/16), and this book builds it step by step. The tour uses what the later chapters make.
#
# Nothing here needs a network. The stars are real: giants of 18 star clusters, observed by the APOGEE survey in infrared light.

# %%
import numpy as np
from astropy.table import Table

from stellar_lab import (
    Cannon,
    cross_label,
    error_table,
    fold_numbers,
    infer,
    plot_comparison,
    plot_fit,
    read_files,
    training_set,
    with_error_model,
)
from stellar_lab.animation import film, player
from stellar_lab.normalize import as_trained
from stellar_lab.survey import archive_root, plot_spectrum, use_style

use_style()

# %% [markdown]
# ## A star
# An archive is a folder of files as the survey writes them. `training_set` reads it, joins each spectrum with the survey's labels, drops what cannot be trusted, and divides each spectrum by its
# *continuum*: the light that the star would send without the dark lines of its elements.

# %%
spectra, ledger = training_set(archive_root(), progress=False)
spectra

# %%
names = list(spectra.label_names)
metals = spectra.labels([names[2]])[:, 0]
star = metals.argmax()  # the richest in metals has the most lines
ax = plot_spectrum(spectra.wavelength, spectra.flux[star], spectra.ivar[star], lw=0.5)
ax.set(ylabel="flux / continuum", ylim=(0.3, 1.2))
ax.set(title=f"the giant {spectra.stars['APOGEE_ID'][star]}");

# %% [markdown]
# **What to see.** Infrared light on three detectors. Each dark line is the mark of an element, and most lines are too crowded to be told apart by eye. How deep they are depends on the star's
# temperature, its gravity and what it is made of.

# %% [markdown]
# The ledger accounts for every star: which rule dropped how many. Nothing is left out in silence.

# %%
ledger

# %% [markdown]
# Why so many files, and so few stars? The archive that comes with this book holds 553 real stars: 552 under their names, and one that waits below without its name. Another 30 files are copies with faults
# planted on purpose, so that every rule has something to catch: 582 files in all. (Five of these are damaged; an archive that was [fetched](01_fetch.ipynb) has 577, for fetching turns damaged files away.) Then the dwarfs go, for the model is one of giants. With them goes one of the 19 clusters, for in the Pleiades
# only dwarfs were observed. The *spectra* are real. The continuum is not: it was put back, so that there is something to divide by. [Where the stars come from](A_archives.ipynb) tells it in full.

# %% [markdown]
# ## Learn
# The Cannon writes the flux of each of 7,214 pixels as a quadratic function of the labels. Training takes about a second.

# %%
model = Cannon(scatter=True, labels=names).fit(spectra)
names

# %% [markdown]
# ## How wrong is it?
# A model that is judged on the stars it learned from flatters itself. So every star is labelled once by a model that has not seen it: five trainings, each without a fifth of the stars.

# %%
folds = fold_numbers(len(spectra), stars=spectra.stars["APOGEE_ID"])
left_out = cross_label(model, spectra, folds, progress=False)
catalogue = spectra.labels(names)
errors = error_table(left_out, catalogue, names, catalogue.std(axis=0))
errors

# %% [markdown]
# The column `rmse` says how far model and survey are apart, in kelvin and in dex (factors of ten, as a logarithm); `robust` says it for the typical star, which a few bad ones do not move. `scaled_rmse` compares it
# with the spread of the label: at 1, naming the average star would do as well.

# %%
plot_comparison({"left-out stars": (left_out, catalogue[:, :4])}, names[:4]);

# %% [markdown]
# **What to see.** Each point is a star that the model had not seen; on the line, model and survey agree.

# %%
assert errors["scaled_rmse"][0] < 0.35  # an average star would be 1

# %% [markdown]
# ## Errors that can be believed
# Errors computed from the noise of the pixels are about ten times too small. The left-out stars say how large they really are, and `with_error_model` learns it: the errors are *calibrated*.

# %%
few = spectra[:5]
formal = infer(model, few)
model = with_error_model(model, left_out, catalogue)
calibrated = infer(model, few)
missed = left_out["teff"].value[:5] - catalogue[:5, 0]
Table(
    {
        "star": few.stars["APOGEE_ID"],
        "Teff [K]": calibrated["teff"].value.round(),
        "formal": formal["teff_err"].value.round(1),
        "calibrated": calibrated["teff_err"].value.round(1),
        "missed by": missed.round(1),
    }
)

# %% [markdown]
# **What to see.** Five temperatures with either error, all in kelvin. These errors are about a catalogue's label, whose own noise is in them; [`train`](F_training.ipynb) takes that off. The last column is left out minus catalogue: how far a model that had not seen the star is from the survey. That is much more than the formal errors allow, and about what the calibrated ones say.

# %%
assert formal.meta["errors"] == "formal" and calibrated.meta["errors"] == "calibrated"
assert np.all(calibrated["teff_err"] > 3 * formal["teff_err"])

# %% [markdown]
# ## A star without a name
# One star of the archive has had its name removed, so no catalogue can be asked. (The survey's own archive has no such star; there the first file is taken.) `as_trained` treats its spectrum as the training spectra were treated, and `infer` finds its labels.

# %%
files = [*archive_root().glob("mystery*.fits"), *archive_root().rglob("apStar*.fits")]
raw, problems = read_files(files[:1], progress=False)
mystery = as_trained(model, raw)
table = infer(model, mystery)
title = str(mystery.stars["APOGEE_ID"][0])
if files[0].name.startswith("mystery"):
    title = "the star without a name"
for name in names:
    value, error = table[name.lower()][0], table[f"{name.lower()}_err"][0]
    print(f"{name:8s} {value:.4g} +- {error.value:.2g}")

# %%
plot_fit(model, mystery, 0, window=(15990, 16210), name=title);

# %% [markdown]
# **What to see.** The model (orange) was never told what this star is, and draws its lines from the labels alone. Below is what is left, over a band as wide as the noise.

# %%
assert table["flags"][0] == 0 and table.meta["errors"] == "calibrated"

# %% [markdown]
# ## A film
# The model can draw stars that nobody has observed. Here a giant becomes twenty times richer in metals.

# %%
metallicity = "M_H" if "M_H" in names else "FE_H"
rising = film(model, metallicity, -1, 0.3, frames=16, window=(16100, 16250), others="branch")
player(rising, interval=150)

# %% [markdown]
# ## Where to go
# - The path of the book: [what a star is to us](00_survey.ipynb), [fetching](01_fetch.ipynb), [cleaning](02_clean.ipynb), [the continuum](03_normalize.ipynb),
#   [the contract of models](04_models.ipynb), [The Cannon](05_cannon.ipynb), [its inversion](06_inversion.ipynb), [judging](07_judging.ipynb).
# - Your own files: [ten thousand labels](G_labelling.ipynb), and [the command line](H_cli.ipynb).
# - How good it gets: [real giants](08_giants.ipynb), and [all models side by side](19_results.ipynb). Which model should you take? For the smallest errors the [Gaussian process on latents](17_latents.ipynb),
#   which `stellar-lab train` makes when nothing is said; to learn and to look into what a model believes, the Cannon of this tour, which says by its chi2 when a star is of another kind, or the one with [hidden labels](16_hidden.ipynb).
# - Words that you do not know: [the glossary](I_glossary.ipynb).
#
# **Exercise.** Train on four labels instead of six: set `names = names[:4]` after the ledger, and run on. Which errors grow, although these labels were kept?
