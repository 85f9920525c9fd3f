# %% [markdown]
# # What can go wrong before the first label?
# > Ten traps between a spectrograph and a label, each on the same real star: what it costs, and what `check` says.
#
# **Question.** A label is a number, and it looks the same whether the spectrum was understood or not. Wavelengths may be in air, lines may be blurred, errors may be
# copied from somewhere. Which of these slips moves a label, by how much, and would anybody notice?
#
# **Idea.** Take one star whose labels we know from its own file. Spoil the spectrum in one way only, read it as an unsuspecting user would, and compare. What differs is
# the trap's doing. Then ask [`check_star`](20_spectrum.ipynb) whether it sees the trap.
#
# You learn which slips are harmless, which are not, and what to look at first. You need [a spectrum of your own](20_spectrum.ipynb).

# %%
#| hide
import matplotlib.pyplot as plt
import numpy as np
from astropy.table import Table
from scipy.ndimage import gaussian_filter1d, median_filter

from stellar_lab.cannon import Cannon
from stellar_lab.models import train_test_rows
from stellar_lab.normalize import training_set
from stellar_lab.spectrum import LIGHT, check_star, from_arrays, label_star, plot_check
from stellar_lab.survey import (
    LabError,
    air_to_vacuum,
    archive_root,
    chip_slices,
    use_style,
    wavelength,
)

# %%
#| hide
use_style()

# %% [markdown]
# ## The star
# A real giant that the model has not learned from. Its gaps are bridged, and it gets noise that we know, three percent in each pixel: so nothing but the trap differs from case to case.

# %%
spectra, _ = training_set(archive_root(), labels=["TEFF", "LOGG", "M_H"], progress=False)
learn, left_out = train_test_rows(len(spectra))
giants = Cannon(scatter=True).fit(spectra[learn])
row = left_out[np.argmax(spectra.stars["SNR"][left_out])]
good = spectra.ivar[row] > 0
quiet = np.interp(np.arange(len(good)), np.flatnonzero(good), spectra.flux[row][good])
noise = 0.03 * np.random.default_rng(25).standard_normal(len(quiet))
flux = quiet + noise
error = np.full(len(flux), 0.03)
untouched = from_arrays(wavelength, flux, error, unit="AA", velocity=0, resolution=22_500)
known = label_star(giants, untouched).table
print({name: round(float(known[name.lower()].value[0]), 3) for name in giants.label_names_})


# %% [markdown]
# One function does the comparison: how far the labels move, in kelvin and dex, what the error claims, and what `check_star` complains about.

# %%
def fall_into(trap, star):
    "A row of the table: how a trap moves the labels of the star, and what the check says."
    found = label_star(giants, star).table
    moved = [float((found[name] - known[name]).value[0]) for name in ("teff", "logg", "m_h")]
    check = check_star(giants, star)
    said = [f"{v.what}: {v.verdict}" for v in check.verdicts if v.verdict != "ok"]
    rows.append((trap, *moved, float(found["teff_err"].value[0]), ", ".join(said) or "all ok"))
    return check


rows = []
check = fall_into("none", untouched)
print(check)
assert check.ok

# %% [markdown]
# ## Wavelengths
# **Air for vacuum.** Line lists and optical spectrographs count in air. In our range that is 4.4 Å, twenty pixels. If the star is said to be at rest, the model looks for every line in the
# wrong place.
#
# **A velocity that was forgotten.** Thirty kilometres a second are what the Earth's own motion does. That is seven pixels.
#
# **The wrong unit.** Nanometres that are called Ångström are a spectrum of the far ultraviolet; the reader refuses them. Pixels in another *order* cost nothing: they are sorted.

# %%
in_air = wavelength * wavelength / air_to_vacuum(wavelength)
air = fall_into(
    "air taken for vacuum",
    from_arrays(in_air, flux, error, unit="AA", velocity=0, resolution=22_500),
)
fall_into(
    "30 km/s forgotten",
    from_arrays(
        wavelength * (1 + 30 / LIGHT), flux, error, unit="AA", velocity=0, resolution=22_500
    ),
)
fall_into(
    "30 km/s, left to be measured",
    from_arrays(wavelength * (1 + 30 / LIGHT), flux, error, unit="AA", resolution=22_500),
)
fall_into(
    "the red end first, in nm",
    from_arrays(wavelength[::-1] / 10, flux[::-1], error, velocity=0, resolution=22_500),
)
try:
    from_arrays(wavelength / 10, flux, error, unit="AA")
except LabError as refusal:
    print(refusal)

# %%
plot_check(air);

# %% [markdown]
# **What to see.** Top left, the peak stands at -82 km/s and not at 0: that is air. Below, the model keeps its lines, the star (black) has them elsewhere.

# %% [markdown]
# ## The continuum
# **A continuum drawn by somebody else.** A running median of 10 Å looks like a fair continuum and eats the broad lines. We divide again, the model likewise, but what was eaten is gone.
# A *smooth* slope, on the other hand, costs nothing.

# %%
chips = chip_slices(wavelength).values()
eaten = np.concatenate([median_filter(quiet[chip], 45, mode="nearest") for chip in chips])
fall_into(
    "divided by a running median",
    from_arrays(wavelength, flux / eaten, error / eaten, unit="AA", velocity=0, resolution=22_500),
)
slope = 300 * (1 + 0.3 * (wavelength - 16_000) / 1_000)
fall_into(
    "a slope of 50 %",
    from_arrays(wavelength, flux * slope, error * slope, unit="AA", velocity=0, resolution=22_500),
)

# %% [markdown]
# ## Resolution
# **Lines that are blurred.** At R = 8,000 all lines are shallower. A model of sharp lines reads that as a hotter or poorer star, unless it is told.

# %%
blur = np.sqrt(8_000**-2 - 22_500**-2) / 2.3548 / 1.3816e-5  # pixels
soft = np.concatenate([gaussian_filter1d(quiet[chip], blur, mode="nearest") for chip in chips])
fall_into(
    "R = 8,000, not said",
    from_arrays(wavelength, soft + noise, error, unit="AA", velocity=0),
)
fall_into(
    "R = 8,000, said",
    from_arrays(wavelength, soft + noise, error, unit="AA", velocity=0, resolution=8_000),
)

# %% [markdown]
# ## Errors
# **Errors that are too small, or too large.** Three times too small, because only the photons of the star were counted and not those of the sky. The labels stay, and their errors are too small.
#
# **Errors of another star.** They have the right size in the middle, but not along the spectrum: here the noise grows fourfold towards the red, and the errors do not know.
#
# **Interpolation's covariance.** Some resample their spectrum onto three times as many pixels before they fit, and copy the errors. Nothing was measured anew, but the fit counts every photon
# three times.

# %%
fall_into(
    "errors 3 times too small",
    from_arrays(wavelength, flux, error / 3, unit="AA", velocity=0, resolution=22_500),
)
fall_into(
    "errors 3 times too large",
    from_arrays(wavelength, flux, error * 3, unit="AA", velocity=0, resolution=22_500),
)
growing = quiet + noise * np.geomspace(0.5, 2, len(quiet))
fall_into(
    "errors copied from another star",
    from_arrays(wavelength, growing, error, unit="AA", velocity=0, resolution=22_500),
)
parts = []
for chip in chips:
    fine = np.linspace(wavelength[chip][0], wavelength[chip][-1], 3 * (chip.stop - chip.start))
    parts.append((fine, np.interp(fine, wavelength[chip], flux[chip])))
fine, between = map(np.concatenate, zip(*parts))
fall_into(
    "resampled, errors copied",
    from_arrays(fine, between, 0.03, unit="AA", velocity=0, resolution=22_500),
)

# %% [markdown]
# ## What they cost

# %%
columns = ["trap", "Teff moves [K]", "log g", "[M/H]", "its error [K]", "check says"]
cost = Table(rows=rows, names=columns)
for name, digits in zip(columns[1:5], (".0f", ".2f", ".2f", ".0f")):
    cost[name].info.format = digits
cost

# %%
fig, ax = plt.subplots(figsize=(6, 4.2))
place = np.arange(len(cost))[::-1]
quietly = np.array(["bad" not in said for said in cost["check says"]])
for shown, color, name in ((quietly, "C0", "nothing bad"), (~quietly, "C3", "bad")):
    size = np.hypot(np.abs(cost["Teff moves [K]"][shown]), 0.1)
    ax.barh(place[shown], size, color=color, label=f"check says: {name}")
ax.set_yticks(place, cost["trap"])
ax.set(xlabel="Teff moves by [K]", xscale="symlog", title="Traps, one giant")
fig.legend(frameon=False, loc="outside lower center", ncols=2);

# %% [markdown]
# **What to see.** The long bars have the second colour: the check sees the trap before the label is believed. Order, units and smooth slopes do nothing. Some traps hardly move the temperature and hurt all the same: air and
# vacuum move gravity and metallicity, and wrong errors of pixels make wrong errors of labels.

# %%
moved = dict(zip(cost["trap"], np.abs(cost["Teff moves [K]"])))
stated = dict(zip(cost["trap"], cost["its error [K]"]))
says = dict(zip(cost["trap"], cost["check says"]))
metals = dict(zip(cost["trap"], np.abs(cost["[M/H]"])))
assert metals["air taken for vacuum"] > 1 and "air or vacuum: bad" in says["air taken for vacuum"]
assert "velocity: bad" in says["30 km/s forgotten"]
assert "resolution: bad" in says["R = 8,000, not said"]
assert "errors: bad" in says["errors 3 times too small"]
assert moved["the red end first, in nm"] < 0.2 * stated["none"]
assert moved["30 km/s, left to be measured"] < stated["none"]
assert moved["R = 8,000, said"] < moved["R = 8,000, not said"]
assert stated["resampled, errors copied"] < 0.8 * stated["none"]
assert "continuum: bad" in says["divided by a running median"]
assert "errors: bad" in says["resampled, errors copied"] and says["a slope of 50 %"] == "all ok"
assert "errors: look" in says["errors 3 times too large"]
assert "errors: look" in says["errors copied from another star"]

# %% [markdown]
# What to look at first, then: the velocity and the resolution. Leave a velocity out rather than guess it. Give your own pixels, never resampled ones. And if all is well but the errors, ask
# where the errors came from.
#
# **Exercise.** Mix two traps: air, with a velocity of +82 km/s that nobody mentioned. What does `check` say, and are the labels right?
