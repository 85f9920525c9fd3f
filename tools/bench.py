"""Speed of training and inversion, as ratios to the one matrix product that each cannot do without,
measured in this run."""

import argparse
import os
import platform
import sys
from time import perf_counter, sleep

import numpy as np
import scipy.optimize

from stellar_lab.cannon import Cannon, Vectorizer
from stellar_lab.hidden import HiddenCannon
from stellar_lab.inversion import infer
from stellar_lab.survey import wavelength

LABELS = 5
TRAINING = 1000  # stars to train on
STARS = 2000  # stars to label
LIMIT = 4  # allowed times of the bare product
HIDDEN = 40  # hidden labels
HIDDEN_TRAINING = 40  # allowed times of the plain Cannon's training, with scatter
HIDDEN_LABELLING = 5  # allowed times of its labelling
# How much of the original lab's own loops is run; their time is then scaled up.
LOOP_PIXELS = 8
LOOP_STARS = 4


def made_up_stars(n, scatter, seed=0):
    """Stars of a quadratic model in five labels, with noise, an intrinsic scatter, and a tenth of
    the pixels unusable."""
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=(n, LABELS)).clip(-2.5, 2.5)
    vectorizer = Vectorizer.of_order("abcde", 2)
    theta = rng.normal(size=(len(wavelength), len(vectorizer))) * 0.03 + np.eye(len(vectorizer))[0]
    ivar = rng.uniform(1e3, 1e4, size=(n, len(wavelength))).astype(np.float32)
    flux = (
        vectorizer(labels) @ theta.T + rng.normal(size=ivar.shape) * np.sqrt(1 / ivar + scatter**2)
    ).astype(np.float32)
    ivar[rng.random(ivar.shape) < 0.1] = 0
    return labels, flux, ivar


def best_times(repeats, calls):
    """Shortest time of each call; the calls take turns, so that a busy moment of the machine meets
    all of them."""
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            sleep(0.2)  # the threads of the call before spin for a while, waiting for more
            start = perf_counter()
            call()
            times[name].append(perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def lab_training(labels, flux, ivar):
    """Seconds that the original lab takes: a dense N x N weight matrix for each pixel."""
    design = Vectorizer.of_order("abcde", 2)(labels)
    start = perf_counter()
    for pixel in range(LOOP_PIXELS):
        weight = np.diag(ivar[:, pixel].astype(float))
        np.linalg.solve(design.T @ weight @ design, design.T @ weight @ flux[:, pixel])
    return (perf_counter() - start) / LOOP_PIXELS * flux.shape[1]


def lab_inversion(model, flux, ivar):
    """Seconds per star of the original lab: BFGS with a numerical gradient over all pixels."""

    def half_chi2(scaled, f, w):
        return 0.5 * np.sum(w * (f - model.theta_ @ model.vectorizer_(scaled[None])[0]) ** 2)

    start = perf_counter()
    for f, w in zip(flux[:LOOP_STARS].astype(float), ivar[:LOOP_STARS].astype(float)):
        scipy.optimize.minimize(half_chi2, np.zeros(LABELS), args=(f, w), method="BFGS")
    return (perf_counter() - start) / LOOP_STARS


def row(name, value, unit, remark=""):
    print(f"  {name:41}{value:9.3f} {unit}  {remark}".rstrip())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repeats",
        type=int,
        default=9,
        help="times that each call is measured; the shortest counts (default: %(default)s)",
    )
    repeats = parser.parse_args().repeats
    labels, flux, ivar = made_up_stars(STARS, 0)
    _, scattered, _ = made_up_stars(STARS, 0.01)
    train = (labels[:TRAINING], flux[:TRAINING], ivar[:TRAINING])
    train_scattered = (labels[:TRAINING], scattered[:TRAINING], ivar[:TRAINING])
    terms = len(Vectorizer.of_order("abcde", 2))
    pixels = len(wavelength)
    pairs = terms * (terms + 1) // 2
    rng = np.random.default_rng(1)
    weights64 = train[2].astype(np.float64)
    products64 = rng.normal(size=(TRAINING, pairs))
    products32 = rng.normal(size=(pixels, pairs)).astype(np.float32)
    model = Cannon().fit(*train)
    with_scatter = Cannon(scatter=True).fit(*train_scattered)
    times = best_times(
        repeats,
        {
            "bare float64 product": lambda: weights64.T @ products64,
            "training": lambda: Cannon().fit(*train),
            "training with scatter": lambda: Cannon(scatter=True).fit(*train_scattered),
            "bare float32 product": lambda: ivar @ products32,
            "inversion": lambda: infer(model, flux, ivar),
            "inversion with scatter": lambda: infer(with_scatter, scattered, ivar),
        },
    )
    hidden = HiddenCannon(hidden=HIDDEN)
    learned = []  # the last fit
    with_hidden = best_times(
        2,
        {
            "training": lambda: learned.append(hidden.fit(*train_scattered)),
            "inversion": lambda: infer(learned[-1], scattered, ivar),
        },
    )
    slow_training = lab_training(*train)
    slow_star = lab_inversion(model, flux, ivar)

    print(
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"numpy {np.__version__}; shortest of {repeats} runs"
    )
    product = times["bare float64 product"]
    seconds = times["training"]
    scatter = times["training with scatter"]
    train_ratio = seconds / product
    print(f"\ntraining: {TRAINING} stars x {pixels} pixels, {terms} terms, float64")
    row(f"bare product (P x N) (N x {pairs}), float64", product, "s")
    row("Cannon().fit", seconds, "s", f"{train_ratio:5.2f} times   (at most {LIMIT})")
    row(
        "original lab, dense matrices",
        slow_training,
        "s",
        f"{slow_training / seconds:.0f} times ours",
    )
    row("Cannon(scatter=True).fit", scatter, "s", f"{scatter / product:5.2f} times, several rounds")
    hidden_training = with_hidden["training"] / scatter
    remark = f"{hidden_training:5.2f} times the line above   (at most {HIDDEN_TRAINING})"
    row(f"HiddenCannon(hidden={HIDDEN}).fit", with_hidden["training"], "s", remark)

    product = times["bare float32 product"] / STARS * 1e3
    seconds = times["inversion"] / STARS * 1e3
    scatter = times["inversion with scatter"] / STARS * 1e3
    slow_star *= 1e3
    ratio = seconds / product
    unit = "ms per star"
    print(f"\ninversion: {STARS} stars x {pixels} pixels, {pairs} products, float32,")
    print("the last step on exact residuals")
    row(f"bare product (N x P) (P x {pairs}), float32", product, unit)
    row("infer", seconds, unit, f"{ratio:5.2f} times   (at most {LIMIT})")
    row(
        "original lab, BFGS over all pixels",
        slow_star,
        unit,
        f"{slow_star / seconds:.0f} times ours",
    )
    row("infer, a scatter in each weight", scatter, unit, f"{scatter / product:5.2f} times")
    seconds = with_hidden["inversion"] / STARS * 1e3
    hidden_labelling = seconds / scatter
    remark = f"{hidden_labelling:5.2f} times the line above   (at most {HIDDEN_LABELLING})"
    row(f"infer, {HIDDEN} hidden labels", seconds, unit, remark)
    beyond = max(train_ratio, ratio) > LIMIT
    beyond |= hidden_training > HIDDEN_TRAINING or hidden_labelling > HIDDEN_LABELLING
    if beyond:
        print("\nabove a limit: is the machine busy with something else?")
    return int(beyond)


if __name__ == "__main__":
    sys.exit(main())
