"""A campaign of faults: what is damaged, and what became of it.

faults.py            all of it, some minutes
faults.py --quick    some 300 faults, part of `make test`
faults.py --seed 7   other places and bits

Each kind of fault is a line of `KINDS`: what it damages, how, and how often. A fault is *reported*
(refused, or a line in a report, in our words), *harmless* (the answer is that of the undamaged
file), *flagged* (the answer is another one, and a flag says so), or it is wrong: a *traceback*, a
*hang*, or a *silently* wrong answer. The last column says which kinds nobody could see: a valid
number in place of another."""

import argparse
import copy
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import asdf
import numpy as np
from astropy.io import fits
from astropy.table import Table

from stellar_lab import archives, models
from stellar_lab.cannon import Cannon
from stellar_lab.clean import find_catalogue
from stellar_lab.fetch import fetch
from stellar_lab.inversion import infer
from stellar_lab.labelling import label
from stellar_lab.normalize import read_continuum_pixels
from stellar_lab.readers import RidgeLabels
from stellar_lab.survey import LabError, Spectra
from stellar_lab.training import describe, load_model, train

OUTCOMES = ("reported", "harmless", "flagged", "traceback", "hang", "wrong")
LONGEST = 30  # seconds that an answer may take
LABELS = ["teff", "m_h"]


class Hang(BaseException):
    "The answer did not come in time."


@contextmanager
def deadline(seconds):
    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Bench:
    "What is damaged: a small archive, models of it, and the undamaged answers."

    def __init__(self, folder, stars=40):
        self.folder = Path(folder)
        self.root = self.folder / "archive"
        archives.write_clusters(self.root, stars=stars, flaws={}, workers=2, progress=False)
        self.models = {"cannon": self.folder / "cannon.asdf", "ridge": self.folder / "ridge.asdf"}
        self.report = train(
            self.root, self.models["cannon"], labels=LABELS, scatter=True, progress=False
        )
        train(self.root, self.models["ridge"], labels=LABELS, kind="ridge", progress=False)
        self.model = load_model(self.models["cannon"])
        whole = label(self.model, self.root, progress=False).table
        good = whole[whole["flags"] == 0]
        self.stars = [Path(str(file)) for file in good["file"]]
        self.answers = {Path(str(row["file"])).name: row for row in good}
        self.record = json.loads(self.models["cannon"].with_suffix(".json").read_text())
        self.described = describe(self.models["cannon"])

    def place(self):
        "An empty folder for one fault."
        place = self.folder / "fault"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place


# --- what became of it: each takes the damaged thing and says reported, harmless, flagged or wrong


def judge_star(bench, path, original):
    "Label a file, and compare with the labels of the undamaged one."
    summary = label(bench.model, path, progress=False)
    if summary.problems:
        return "reported"
    return judge_row(summary.table[0], bench.answers[original.name])


def judge_row(row, expected):
    same = row["apogee_id"] == expected["apogee_id"]
    close = all(abs(row[name] - expected[name]) <= 0.5 * expected[f"{name}_err"] for name in LABELS)
    if same and close:
        return "harmless"
    return "flagged" if row["flags"] and same else "wrong"


def judge_model(bench, path, kind):
    "Read a file of a model, describe it, label with it."
    model = load_model(path)
    describe(path)
    star = bench.stars[0]
    if not isinstance(model, (Cannon, RidgeLabels)) or len(model.label_names_) != 2:
        return "wrong"
    row = label(path, star, progress=False).table[0]
    expected = label(bench.models[kind], star, progress=False).table[0]
    if np.array_equal(row["covariance"], expected["covariance"], equal_nan=True):
        if row["teff"] == expected["teff"] and row["m_h"] == expected["m_h"]:
            return "harmless"
    return "flagged" if row["flags"] else "wrong"


def judge_record(bench, path):
    said = describe(path)
    if "is not the record" in said or "of another training" in said or "no record" in said:
        return "reported"
    return "harmless"  # a record is read by people; what it says cannot be compared


def judge_training(bench, root):
    "Train, and compare with the undamaged training."
    report = train(root, labels=LABELS, scatter=True, progress=False)
    if report.facts["model"]["digest"] == bench.report.facts["model"]["digest"]:
        return "harmless"
    if report.ledger.left < bench.report.ledger.left or "count as unusable" in str(report):
        return "reported"  # by a rule of the ledger
    return "wrong"


def judge_pixels(bench, path):
    return "harmless" if read_continuum_pixels(path).sum() == 5 else "wrong"


# --- mutations


def chosen(rng, bench):
    return rng.choice(bench.stars)


def cut(rng, data):
    return data[: rng.randrange(len(data))]


def flip(rng, data):
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def flip_header(rng, data):
    place = rng.randrange(min(2880 * 3, len(data)))
    return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]


def overwrite(rng, data):
    place = rng.randrange(len(data))
    return data[:place] + rng.randbytes(min(2880, len(data) - place)) + data[place + 2880 :]


def nothing(rng, data):
    return b""


def noise(rng, data):
    return rng.randbytes(5000)


def page(rng, data):
    return b"<html><body>Please log in</body></html>" * 100


def append(rng, data):
    return data + rng.randbytes(100)


def star_bytes(change):
    "A fault in the bytes of a star's file."

    def fault(bench, rng):
        star = chosen(rng, bench)
        path = bench.place() / star.name
        path.write_bytes(change(rng, star.read_bytes()))
        return judge_star(bench, path, star)

    return fault


def packed_bytes(change):
    "A fault in a packed star's file."

    def fault(bench, rng):
        star = chosen(rng, bench)
        path = bench.place() / f"{star.name}.gz"
        path.write_bytes(change(rng, gzip.compress(star.read_bytes(), 1)))
        return judge_star(bench, path, star)

    return fault


CARDS = {
    **{
        key: ("grid", [0, -1, 2**31, 10**20, 1e400, "text", "", True])
        for key in ("NAXIS1", "NAXIS")
    },
    **{key: ("grid", [4.2, "4.179", 0, -1e300]) for key in ("CRVAL1", "CDELT1", "CRPIX1")},
    **{key: ("fact", ["x" * 60, -9999, 1e300, ""]) for key in ("SNR", "RA", "LOCID", "NVISITS")},
}


def card(bench, rng):
    "A card of a header with another value."
    star = chosen(rng, bench)
    path = bench.place() / star.name
    key = rng.choice(list(CARDS))
    value = rng.choice(CARDS[key][1])
    data = bytearray(star.read_bytes())
    text = f"{key:<8}= {value!r:>20}".encode()[:80].ljust(80)
    start = data.find(f"{key:<8}=".encode(), 2880 if CARDS[key][0] == "grid" else 0)
    if start < 0:
        return "harmless"
    data[start : start + 80] = text
    path.write_bytes(data)
    return judge_star(bench, path, star)


PIXELS = {  # what stands in some pixels: HDU, values
    "flux": (1, [np.nan, np.inf, 3e38, -3e38, 1e30, 1e20, 1e6, 0.0]),
    "errors": (2, [np.nan, -1.0, 0.0, 1e-12, 1e-30, np.inf, 1e38]),
}


def pixels(which):
    "Impossible numbers in a few pixels of a star."

    def fault(bench, rng):
        star = chosen(rng, bench)
        path = bench.place() / star.name
        hdu, values = PIXELS[which]
        with fits.open(star) as hdus:
            places = [rng.randrange(400, 8000) for _ in range(rng.choice([1, 1, 20]))]
            hdus[hdu].data[..., places] = rng.choice(values)
            hdus.writeto(path)
        return judge_star(bench, path, star)

    return fault


def hdus_of(change):
    "HDUs in another order, or fewer."

    def fault(bench, rng):
        star = chosen(rng, bench)
        path = bench.place() / star.name
        with fits.open(star) as hdus:
            kept = change(rng, list(hdus))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fits.HDUList(kept).writeto(path, output_verify="ignore")
        return judge_star(bench, path, star)

    return fault


def fewer(rng, hdus):
    return hdus[: rng.randrange(1, len(hdus))]


def swapped(rng, hdus):
    one, other = rng.sample(range(1, 6), 2)
    hdus[one], hdus[other] = hdus[other], hdus[one]
    return hdus


def pipe(bench, rng):
    "A pipe, a device, a folder or a link to nothing in place of a star."
    star = chosen(rng, bench)
    path = bench.place() / star.name
    what = rng.choice(["pipe", "device", "folder", "link"])
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if what == "device" else "nowhere")
    return judge_star(bench, path, star)


def another_star(bench, rng):
    "The bytes of a star under the name of another."
    star, other = rng.sample(bench.stars, 2)
    path = bench.place() / star.name
    shutil.copy(other, path)
    return judge_star(bench, path, star)


def moving(bench, rng):
    "A spectrum that is not at rest, and says so."
    star = chosen(rng, bench)
    path = bench.place() / star.name
    with fits.open(star) as hdus:
        hdus[0].header["VRAD"] = rng.uniform(20, 200)
        for k in (1, 2, 3):
            hdus[k].data = np.roll(hdus[k].data, rng.randrange(3, 20), axis=-1)
        hdus.writeto(path)
    return judge_star(bench, path, star)


# --- models


def tree_of(path):
    with asdf.open(path, memmap=False, lazy_load=False) as file:
        return {
            name: np.array(value) if hasattr(value, "dtype") else copy.deepcopy(value)
            for name, value in file.tree.items()
            if name not in ("asdf_library", "history")
        }


VALUES = [None, "x", -1, 0, 10**9, 1e300, float("nan"), [], {}, [None], True, [[1]], 3.7]
ARRAYS = {
    "shorter": lambda a: a[:-1],
    "deeper": lambda a: a[..., None],
    "turned": lambda a: a.T,
    "NaN": lambda a: a * np.nan,
    "zero": lambda a: a * 0,
    "huge": lambda a: a * 1e300,
    "text": lambda a: a.astype(str),
    "complex": lambda a: a.astype(complex),
    "truth": lambda a: a > 0,
    "empty": lambda a: a[:0],
    "list": lambda a: a.tolist(),
    "half": lambda a: a.astype("f2"),
}


def model_bytes(change):
    "A fault in the bytes of a model's file."

    def fault(bench, rng):
        kind = rng.choice(list(bench.models))
        path = bench.place() / "model.asdf"
        path.write_bytes(change(rng, bench.models[kind].read_bytes()))
        return judge_model(bench, path, kind)

    return fault


def model_entry(sealed):
    "An entry of a model's file missing, or another; `sealed` with a fingerprint that fits."

    def fault(bench, rng):
        kind = rng.choice(list(bench.models))
        path = bench.place() / "model.asdf"
        tree = tree_of(bench.models[kind])
        name = rng.choice(sorted(tree))
        value = tree[name]
        if rng.random() < 0.2:
            del tree[name]
        elif isinstance(value, np.ndarray) and rng.random() < 0.7:
            with np.errstate(all="ignore"):
                tree[name] = rng.choice(list(ARRAYS.values()))(value)
        elif isinstance(value, dict) and value and rng.random() < 0.7:
            value[rng.choice(sorted(value))] = rng.choice(VALUES)
        else:
            tree[name] = rng.choice(VALUES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            asdf.AsdfFile(tree).write_to(path)
        if not sealed:
            return judge_model(bench, path, kind)
        real = models.LabelModel._from_tree.__func__
        fits_all = type("Any", (str,), {"__ne__": lambda *_: False, "__eq__": lambda *_: True})
        read = models.read_model_file

        def as_if_sealed(path):
            found = read(path)
            found.fingerprint = fits_all()
            return found

        from stellar_lab import training

        training.read_model_file = as_if_sealed
        try:
            outcome = judge_model(bench, path, kind)
        finally:
            training.read_model_file = read
        assert real is models.LabelModel._from_tree.__func__
        return "flagged" if outcome == "wrong" else outcome  # a valid file with other numbers

    return fault


ATTACKS = [
    (b"source: 0", b"source: file:///etc/passwd"),
    (b"source: 0", b"source: http://127.0.0.1:9/x"),
    (b"source: 1", b"source: 10000"),
    (b"format_version: 1", b"format_version: !!python/object/apply:os.system ['true']"),
    (b"format_version: 1", b"format_version: &a [*a, *a]"),
    (b"format_version: 1", b"format_version: " + b"[" * 100_000),
    (b"shape: [", b"shape: [1000000000000, "),
    (b"datatype: float64", b"datatype: [ucs4, 1000000000]"),
    (b"byteorder: little", b"byteorder: middle"),
    (b"\xd3BLK", b"\xd3BLX"),
]


def model_attack(bench, rng):
    "A model's file that asks for other files, the network, code or all memory."
    kind = rng.choice(list(bench.models))
    path = bench.place() / "model.asdf"
    old, new = rng.choice(ATTACKS)
    path.write_bytes(bench.models[kind].read_bytes().replace(old, new))
    return judge_model(bench, path, kind)


def paths_in(value, above=()):
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*above, name)
        if isinstance(part, (dict, list)):
            yield from paths_in(part, (*above, name))


def record_entry(bench, rng):
    "An entry of a record missing, or another."
    place = bench.place()
    shutil.copy(bench.models["cannon"], place / "m.asdf")
    record = copy.deepcopy(bench.record)
    where = rng.choice(list(paths_in(record)))
    inner = record
    for name in where[:-1]:
        inner = inner[name]
    if rng.random() < 0.3:
        del inner[where[-1]]
    else:
        inner[where[-1]] = rng.choice(VALUES)
    (place / "m.json").write_text(json.dumps(record))
    return judge_record(bench, place / "m.asdf")


def record_bytes(bench, rng):
    "A record that is cut short, or something else."
    place = bench.place()
    shutil.copy(bench.models["cannon"], place / "m.asdf")
    data = json.dumps(bench.record).encode()
    change = rng.choice([cut, flip, overwrite, nothing, noise, page])
    (place / "m.json").write_bytes(change(rng, data))
    return judge_record(bench, place / "m.asdf")


def pixel_list(bench, rng):
    "A list of continuum pixels that is none."
    path = bench.place() / rng.choice(["pixels.npy", "pixels.txt"])
    np.save(bench.folder / "list.npy", np.array([10, 20, 30, 40, 50]))
    data = (bench.folder / "list.npy").read_bytes()
    header = data.replace(b"(5,)", b"(5000000000,)").replace(b"    ", b"", 2)
    change = rng.choice([cut, flip_header, nothing, noise, page])
    path.write_bytes(rng.choice([header, change(rng, data), b"1e400\n-5\nnan\n"]))
    return judge_pixels(bench, path)


# --- catalogues, through train


def _copy_of_archive(bench):
    "A copy whose spectra are links, and whose catalogue can be changed."
    place = bench.place() / "archive"
    shutil.copytree(bench.root, place, copy_function=os.link)
    catalogue = find_catalogue(place)
    data = catalogue.read_bytes()
    catalogue.unlink()
    catalogue.write_bytes(data)
    return place, catalogue


BAD_LABELS = [-9999.0, -9999.99, np.nan, np.inf, 0.0, 99999.0, 1e30, -99.9]


def bad_label(bench, rng):
    "A label of five stars that is no label."
    place, catalogue = _copy_of_archive(bench)
    table = Table.read(catalogue)
    rows = rng.sample(range(len(table)), min(5, len(table)))
    table["TEFF"][rows] = rng.choice(BAD_LABELS)
    table.write(catalogue, overwrite=True)
    return judge_training(bench, place)


CATALOGUES = {
    "whole numbers": lambda t: t.replace_column("TEFF", np.round(t["TEFF"]).astype("i4")),
    "text": lambda t: t.replace_column("TEFF", np.asarray(t["TEFF"]).astype(str)),
    "complex": lambda t: t.replace_column("TEFF", np.asarray(t["TEFF"], complex)),
    "two numbers": lambda t: t.replace_column("TEFF", np.column_stack([t["TEFF"]] * 2)),
    "lacking": lambda t: t.remove_column("TEFF"),
    "one value": lambda t: t.replace_column("M_H", np.full(len(t), 0.1)),
    "no names": lambda t: t.remove_column("APOGEE_ID"),
    "no rows": lambda t: t.remove_rows(slice(None)),
    "twice the same": lambda t: t.replace_column("M_H", (t["TEFF"] - 4500) / 1000),
}


def catalogue_type(bench, rng):
    "A column of another kind."
    place, catalogue = _copy_of_archive(bench)
    table = Table.read(catalogue)
    CATALOGUES[rng.choice(list(CATALOGUES))](table)
    table.write(catalogue, overwrite=True)
    return judge_training(bench, place)


def catalogue_bytes(bench, rng):
    "A catalogue that is cut short, or something else."
    place, catalogue = _copy_of_archive(bench)
    change = rng.choice([cut, flip_header, nothing, noise, page])
    catalogue.write_bytes(change(rng, catalogue.read_bytes()))
    return judge_training(bench, place)


def one_of_many(bench, rng):
    "One damaged star among those of a training."
    place, _ = _copy_of_archive(bench)
    star = place / chosen(rng, bench).relative_to(bench.root)
    whole = star.read_bytes()
    star.unlink()
    star.write_bytes(rng.choice([cut, overwrite, nothing, page])(rng, whole))
    return judge_training(bench, place)


# --- sources


def source(bench, rng):
    "A source that names the user's own files, or holds something else than files."
    place = bench.place()
    there, home = place / "there", place / "home"
    shutil.copytree(bench.root, there, copy_function=os.link)
    home.mkdir()
    (home / "thesis.tex").write_text("my only copy")
    facts = json.loads((there / "archive.json").read_text())
    names = rng.choice(
        [
            ["thesis.tex"],
            ["../thesis.tex"],
            ["/etc/passwd"],
            "thesis.tex",
            {"a": 1},
            [None],
            [1e300],
        ]
    )
    (there / "archive.json").unlink()
    (there / "archive.json").write_text(json.dumps(facts | {"files": names}))
    (there / "thesis.tex").write_text("not yours")
    field = bench.stars[0].parent.name
    try:
        summary = fetch(home, str(there), fields=[field], products=["apstar"], progress=False)
        outcome = "harmless" if summary.ok else "reported"
    except LabError:
        outcome = "reported"
    return outcome if (home / "thesis.tex").read_text() == "my only copy" else "wrong"


# --- numbers


SPECTRA = {
    "no light": lambda f, w: (f * 0, w),
    "flat": lambda f, w: (f * 0 + 1, w),
    "negative": lambda f, w: (-f, w),
    "faint": lambda f, w: (f * 1e-20, w),
    "bright": lambda f, w: (f * 1e30, w),
    "beyond": lambda f, w: (np.where(np.arange(f.size) == 99, 3e38, f), w),
    "no weight": lambda f, w: (f, w * 0),
    "one pixel": lambda f, w: (f, np.where(np.arange(f.size) == 99, w, 0)),
    "sure": lambda f, w: (f, w * 1e20),
    "NaN": lambda f, w: (np.where(np.arange(f.size) == 99, np.nan, f), w),
    "negative weight": lambda f, w: (f, -w),
    "text": lambda f, w: (f.astype(str), w),
    "complex": lambda f, w: (f.astype(complex), w),
    "short": lambda f, w: (f[:-1], w[:-1]),
}
UNSEEN_SPECTRA = ("flat",)  # a straight line has labels, of a star without lines


def number(bench, rng):
    "A spectrum of odd numbers, next to a good one."
    spectra = archives.real_stars()[:2]
    good = infer_one(bench, spectra)
    flux, ivar = spectra.flux.copy(), spectra.ivar.copy()
    name = rng.choice([name for name in SPECTRA if name not in UNSEEN_SPECTRA])
    odd_flux, odd_ivar = SPECTRA[name](flux[0], ivar[0])
    both = [np.stack(pair) for pair in ((odd_flux, odd_flux), (odd_ivar, odd_ivar))]
    if odd_flux.dtype.kind == "f" and len(odd_flux) == flux.shape[1]:
        both = [np.stack([odd_flux, flux[1]]), np.stack([odd_ivar, ivar[1]])]
    with np.errstate(all="ignore"):
        table = infer(bench.model, *both)
    if abs(table["teff"][1] - good["teff"][1]) > 1e-3 * good["teff_err"][1]:
        return "wrong"  # the neighbour must not feel it
    if abs(table["teff"][0] - good["teff"][0]) <= 0.5 * good["teff_err"][0]:
        return "harmless"
    return "flagged" if table["flags"][0] else "wrong"


def infer_one(bench, spectra: Spectra):
    return infer(bench.model, spectra.flux, spectra.ivar)


# --- kills and resources: processes of their own


def _command(*words, **options):
    script = Path(sys.executable).with_name("stellar-lab")
    settings = os.environ | {"SOURCE_DATE_EPOCH": "1000000000"}
    return subprocess.Popen(
        [script, *map(str, words)],
        env=settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def killed(what, number):
    "A command that is killed somewhere, and run again: the same bytes, and nothing else left."

    def fault(bench, rng):
        place = bench.place()
        out = place / ("m.asdf" if what == "train" else "o.fits")
        words = {
            "train": ["train", bench.root, "--labels", ",".join(LABELS), "--scatter", "--model"],
            "label": ["label", bench.root, "--model", bench.models["cannon"], "--out"],
        }[what]
        process = _command(*words, out)
        time.sleep(rng.uniform(0.5, 6))
        process.send_signal(number)
        _, err = process.communicate()
        if "Traceback" in err:
            return "traceback"
        again = _command(*words, out)
        _, err = again.communicate()
        if again.returncode not in (0, 1):
            return "wrong"
        expected = bench.folder / f"undisturbed-{out.name}"
        if not expected.exists():
            _command(*words, out).communicate()
            shutil.copy(out, expected)
        return "harmless" if out.read_bytes() == expected.read_bytes() else "wrong"

    return fault


def short_of(limit):
    "A command that is short of something."

    def fault(bench, rng):
        place = bench.place()
        script = Path(sys.executable).with_name("stellar-lab")
        words = f"{script} label --model {bench.models['cannon']} {bench.stars[0]}"
        command = f"{limit.format(command=f'{words} --out {place}/o.fits')}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
        if "Traceback" in done.stderr or "mistake of stellar_lab" in done.stderr:
            return "traceback"
        if done.returncode == 0:
            return "harmless" if (place / "o.fits").exists() else "wrong"
        return "reported" if done.stderr or "2>" in limit else "wrong"

    return fault


class Kind(NamedTuple):
    "A kind of fault."

    part: str
    name: str
    fault: object  # called with a bench and a random number generator; returns an outcome
    quick: int  # how many in the quick part
    full: int
    unseen: bool = False  # could nobody see it? A valid number in place of another


KINDS = (
    Kind("star", "cut short", star_bytes(cut), 12, 240),
    Kind("star", "a byte in the header", star_bytes(flip_header), 12, 180),
    Kind("star", "a bit in the data", star_bytes(flip), 8, 120, unseen=True),
    Kind("star", "2880 bytes overwritten", star_bytes(overwrite), 8, 60, unseen=True),
    Kind("star", "empty, noise, a page", star_bytes(nothing), 2, 10),
    Kind("star", "noise", star_bytes(noise), 2, 10),
    Kind("star", "a web page", star_bytes(page), 2, 10),
    Kind("star", "bytes appended", star_bytes(append), 3, 20),
    Kind("star", "a bit of a packed file", packed_bytes(flip), 8, 120),
    Kind("star", "a packed file cut short", packed_bytes(cut), 4, 60),
    Kind("star", "cards of the header", card, 16, 400),
    Kind("star", "flux", pixels("flux"), 16, 160, unseen=True),
    Kind("star", "errors", pixels("errors"), 14, 120, unseen=True),
    Kind("star", "HDUs missing", hdus_of(fewer), 5, 60),
    Kind("star", "HDUs swapped", hdus_of(swapped), 8, 60),
    Kind("star", "no file", pipe, 8, 20),
    Kind("star", "another star's bytes", another_star, 4, 40),
    Kind("star", "not at rest", moving, 4, 40),
    Kind("model", "bytes", model_bytes(flip), 12, 120),
    Kind("model", "cut short", model_bytes(cut), 10, 60),
    Kind("model", "overwritten", model_bytes(overwrite), 8, 60),
    Kind("model", "something else", model_bytes(noise), 3, 10),
    Kind("model", "entries", model_entry(sealed=False), 24, 300),
    Kind("model", "entries, sealed again", model_entry(sealed=True), 24, 300),
    Kind("model", "attacks", model_attack, 12, 60),
    Kind("record", "entries", record_entry, 30, 400),
    Kind("record", "bytes", record_bytes, 12, 60),
    Kind("pixels", "lists", pixel_list, 10, 60),
    Kind("catalogue", "labels that are none", bad_label, 5, 40),
    Kind("catalogue", "columns", catalogue_type, 6, 40),
    Kind("catalogue", "bytes", catalogue_bytes, 6, 60),
    Kind("catalogue", "one damaged star", one_of_many, 4, 24),
    Kind("source", "names", source, 5, 30),
    Kind("numbers", "spectra", number, 14, 60),
    Kind("kill", "train, kill -9", killed("train", signal.SIGKILL), 0, 10),
    Kind("kill", "label, kill -9", killed("label", signal.SIGKILL), 0, 10),
    Kind("kill", "label, SIGTERM", killed("label", signal.SIGTERM), 0, 5),
    Kind("resources", "files", short_of("ulimit -n 24; {command}"), 0, 2),
    Kind("resources", "memory", short_of("ulimit -v 600000; {command}"), 0, 2),
    Kind("resources", "output", short_of("{command} >&-"), 0, 2),
    Kind("resources", "error output", short_of("{command} 2>&-"), 0, 2),
    Kind("resources", "a full place", short_of("{command} > /dev/full"), 0, 2),
)


def tried(bench, kind, rng):
    "The outcome of one fault, and what was said where it is wrong."
    try:
        with deadline(LONGEST), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = kind.fault(bench, rng)
    except Hang:
        return "hang", ""
    except LabError as error:
        one_line = "\n" not in str(error) or "rule" in str(error)  # a ledger has several lines
        return ("reported" if one_line else "traceback"), str(error)
    except Exception:
        return "traceback", traceback.format_exc()
    return outcome, ""


def campaign(bench, quick=False, seed=1, kinds=KINDS, verbose=False):
    "Kind -> how often which outcome."
    counts = {}
    for kind in kinds:
        number = kind.quick if quick else kind.full
        counts[kind] = Counter()
        for k in range(number):
            rng = random.Random(f"{seed} {kind.part} {kind.name} {k}")
            outcome, said = tried(bench, kind, rng)
            counts[kind][outcome] += 1
            if verbose and outcome in ("traceback", "hang", "wrong") and not kind.unseen:
                print(f"{kind.part}, {kind.name}, {k}: {outcome}\n{said}", file=sys.stderr)
    return counts


def lines(counts):
    "The table as text."
    names = ["part", "kind", "tried", *OUTCOMES, ""]
    rows = [names]
    for kind, found in counts.items():
        if found.total():
            numbers = [str(found[outcome] or "-") for outcome in OUTCOMES]
            unseen = "nobody could see these" if kind.unseen and found["wrong"] else ""
            rows.append([kind.part, kind.name, str(found.total()), *numbers, unseen])
    total = sum(counts.values(), Counter())
    rows.append(["all", "", str(total.total()), *(str(total[one] or "-") for one in OUTCOMES), ""])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            text.ljust(w) if k < 2 else text.rjust(w)
            for k, (text, w) in enumerate(zip(row, widths))
        )
        for row in rows
    ]


def failures(counts):
    "Kinds with an outcome that must not be."
    return [
        f"{kind.part}, {kind.name}: {dict(found)}"
        for kind, found in counts.items()
        if found["traceback"] or found["hang"] or (found["wrong"] and not kind.unseen)
    ]


def main(words):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="some 300 faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", help="only kinds of this part, such as model")
    options = parser.parse_args(words)
    kinds = [kind for kind in KINDS if options.part in (None, kind.part)]
    with tempfile.TemporaryDirectory() as folder:
        counts = campaign(Bench(folder), options.quick, options.seed, kinds, verbose=True)
    print(*lines(counts), sep="\n")
    wrong = failures(counts)
    print(*(["", "must not be:", *wrong] if wrong else ["", "nothing is silently wrong"]), sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
