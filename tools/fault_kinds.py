"""The kinds of faults: what is damaged, how, and how often. `KINDS` lists them, a line for a kind.

A fault is a function of a bench and a random number generator; it damages something and returns
what a judge found."""

import bz2
import copy
import gzip
import io
import json
import lzma
import os
import shutil
import signal
import time
import warnings
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import asdf
import numpy as np
from astropy.io import fits
from astropy.table import MaskedColumn, Table

from fault_bench import (
    LABELS,
    SCRIPT,
    SLIGHT,
    Found,
    Process,
    judge_model,
    judge_record,
    judge_star,
    judge_training,
    judge_words,
    rewrite,
    told,
    whole_folder,
)
from stellar_lab import archives, training
from stellar_lab.clean import find_catalogue
from stellar_lab.cli import main as command
from stellar_lab.fetch import ArchiveHandler, fetch, serve
from stellar_lab.inversion import infer
from stellar_lab.labelling import label
from stellar_lab.normalize import read_continuum_pixels
from stellar_lab.survey import ARCHIVE_FILE, LabError

# --- bytes


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


def zeros(rng, data):
    "A sector that was never written."
    place = rng.randrange(len(data) // 4096 + 1) * 4096
    return data[:place] + bytes(min(4096, len(data) - place)) + data[place + 4096 :]


def missing(rng, data):
    "A block that was left out: all that follows stands too early."
    place = rng.randrange(len(data))
    return data[:place] + data[place + rng.choice([1, 80, 2880, 4096]) :]


def repeated(rng, data):
    "A block that was written twice."
    place = rng.randrange(len(data))
    size = rng.choice([1, 80, 2880, 4096])
    return data[: place + size] + data[place:]


def ends_of_lines(rng, data):
    "Sent as text: every line feed becomes a carriage return and a line feed."
    return data.replace(b"\n", b"\r\n")


def seventh_bit(rng, data):
    "Sent over a line of seven bits."
    return bytes(value & 127 for value in data)


def nothing(rng, data):
    return b""


def noise(rng, data):
    return rng.randbytes(5000)


def page(rng, data):
    return b"<html><body>Please log in</body></html>" * 100


def append(rng, data):
    return data + rng.randbytes(100)


def itself(rng, data):
    return data + data


# --- stars


def chosen(rng, bench):
    return rng.choice(bench.stars)


def star_bytes(change, before=lambda data: data):
    "A fault in the bytes of a star's file."

    def fault(bench, rng):
        star = chosen(rng, bench)
        path = bench.place() / star.name
        path.write_bytes(change(rng, before(star.read_bytes())))
        return judge_star(bench, path, star)

    return fault


def summed(data):
    "The same file with the checksums of the FITS standard."
    with fits.open(io.BytesIO(data)) as hdus:
        out = io.BytesIO()
        hdus.writeto(out, checksum=True)
    return out.getvalue()


def _zipped(data):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("star.fits", data)
    return out.getvalue()


PACKINGS = {
    "gz": lambda data: gzip.compress(data, 1),
    "bz2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
    "zip": _zipped,
}


def packed_bytes(change, packing="gz"):
    "A fault in a packed star's file."

    def fault(bench, rng):
        star = chosen(rng, bench)
        path = bench.place() / f"{star.name}.gz"
        path.write_bytes(change(rng, PACKINGS[packing](star.read_bytes())))
        return judge_star(bench, path, star)

    return fault


def in_archive(change):
    "A fault in a star of an archive that knows its checksums."

    def fault(bench, rng):
        root = bench.copy(bench.place())
        star = chosen(rng, bench)
        path = root / star.relative_to(bench.root)
        rewrite(path, change(rng, star.read_bytes()))
        return judge_star(bench, path, star)

    return fault


def exchanged(bench, rng):
    "Two stars of an archive whose spectra were exchanged, with headers that fit the names."
    root = bench.copy(bench.place())
    star, other = rng.sample(bench.stars, 2)
    path = root / star.relative_to(bench.root)
    with fits.open(star) as mine, fits.open(other) as theirs:
        for number in (1, 2, 3):
            mine[number].data = theirs[number].data
        path.unlink()
        mine.writeto(path)
    return judge_star(bench, path, star)


CARDS = {
    **{key: [0, -1, 2**31, 10**20, 1e400, "text", "", True] for key in ("NAXIS1", "NAXIS")},
    **{key: [4.2, "4.179", 0, -1e300] for key in ("CRVAL1", "CDELT1", "CRPIX1")},
    **{key: [0, -1, 7, 64, "text", 1e30] for key in ("BITPIX", "PCOUNT", "GCOUNT", "NAXIS2")},
    **{key: ["text", "IMAGE", 3, ""] for key in ("XTENSION", "SIMPLE", "EXTEND", "EXTNAME")},
}
FACT_CARDS = {
    "SNR": ["x" * 60, -9999, 1e300, "", -3.0, "nan"],
    "RA": ["x" * 60, -9999, 1e300, "", 361.0, "12:30:00"],
    "DEC": ["x" * 60, -9999, 1e300, "", -91.0, 90.5],
    "LOCID": ["x" * 60, -9999, 1e300, ""],
    "NVISITS": ["x" * 60, -9999, 1e300, -2],
    "OBJID": ["", "2M00000000+0000000", 17, "x" * 60],
    "VRAD": [100.0, "fast", 1e300, True],
}


def card(cards, from_place=0):
    "A card of a header with another value."

    def fault(bench, rng):
        star = chosen(rng, bench)
        path = bench.place() / star.name
        key = rng.choice(list(cards))
        value = rng.choice(cards[key])
        data = bytearray(star.read_bytes())
        value = repr(value) if not isinstance(value, bool) else "T"
        text = f"{key:<8}= {value:>20}".encode()[:80].ljust(80)
        start = data.find(f"{key:<8}=".encode(), from_place)
        if start < 0:
            start = data.find(b"END" + b" " * 77)  # the card was not there: before the end
            data[start + 80 : start + 160] = data[start : start + 80]
        data[start : start + 80] = text
        path.write_bytes(data)
        return judge_star(bench, path, star)

    return fault


PIXELS = {  # what stands in some pixels: HDU, values
    "flux": (1, [np.nan, np.inf, 3e38, -3e38, 1e30, 1e20, 1e6, -1e6]),
    "errors": (2, [np.nan, -1.0, 0.0, 1e-12, 1e-30, np.inf, 1e38]),
}


def pixels(which, some=None):
    "Impossible numbers in a few pixels of a star: the answer is that without these pixels."

    def fault(bench, rng):
        star = chosen(rng, bench)
        path = bench.place() / star.name
        hdu, values = PIXELS[which]
        with fits.open(star) as hdus:
            places = [rng.randrange(400, 8000) for _ in range(rng.choice([1, 1, 20]))]
            hdus[hdu].data[..., places] = rng.choice(values if some is None else some)
            hdus.writeto(path)
            found = judge_star(bench, path, star)
            if found.outcome != "slight":
                return found
            hdus[2].data[..., places] = 0
            without = path.with_name(f"without-{star.name}")
            hdus.writeto(without)
        rows = [label(bench.model, one, progress=False).table[0] for one in (path, without)]
        same = all(abs(rows[0][n] - rows[1][n]) < 1e-3 * rows[1][f"{n}_err"] for n in LABELS)
        return Found("harmless", "as without these pixels") if same else found

    return fault


def hdus_of(change):
    "HDUs in another order, or fewer, or other ones."

    def fault(bench, rng):
        star = chosen(rng, bench)
        path = bench.place() / star.name
        with fits.open(star) as hdus:
            with np.errstate(all="ignore"):
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


def _shaped(change):
    def shape(rng, hdus):
        number = rng.choice([1, 2, 3])
        header = hdus[number].header
        hdus[number] = fits.ImageHDU(change(hdus[number].data), header)
        return hdus

    return shape


SHAPES = {
    "one row only": lambda a: a[:1],
    "one axis": lambda a: a[0],
    "three axes": lambda a: a[None],
    "a pixel short": lambda a: a[..., :-1],
    "a pixel long": lambda a: np.pad(a, ((0, 0), (0, 1))),
    "turned": lambda a: a.T.copy(),
    "doubles": lambda a: a.astype("f8"),
    "whole numbers": lambda a: a.astype("i4"),
    "bytes": lambda a: a.astype("u1"),
    "no rows": lambda a: a[:0],
}


def other_shape(rng, hdus):
    return _shaped(SHAPES[rng.choice(list(SHAPES))])(rng, hdus)


def scaled(rng, hdus):
    "A legal image of whole numbers and a scale."
    data = np.nan_to_num(hdus[1].data)
    step = max(float(np.abs(data).max()) / 30000, 1e-12)
    hdus[1] = fits.ImageHDU(data, hdus[1].header)
    hdus[1].scale("int16", bzero=0, bscale=step)
    return hdus


def table_instead(rng, hdus):
    number = rng.choice([1, 2, 3])
    hdus[number] = fits.BinTableHDU(Table({"FLUX": np.arange(10.0)}))
    return hdus


def compressed(rng, hdus):
    hdus[1] = fits.CompImageHDU(np.nan_to_num(hdus[1].data), hdus[1].header)
    return hdus


def pipe(bench, rng):
    "A pipe, a device, a folder or a link to nothing in place of a star."
    star = chosen(rng, bench)
    path = bench.place() / star.name
    what = rng.choice(["pipe", "device", "folder", "link", "circle"])
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "link": "nowhere", "circle": star.name}[what])
    return judge_star(bench, path, star)


def another_star(bench, rng):
    "The bytes of a star under the name of another."
    star, other = rng.sample(bench.stars, 2)
    path = bench.place() / star.name
    shutil.copy(other, path)
    return judge_star(bench, path, star)


def other_product(bench, rng):
    "A spectrum of the survey's pipeline under the name of a combined one."
    star = chosen(rng, bench)
    path = bench.place() / star.name
    name = "*" + star.name.split("-", 2)[2]
    shutil.copy(next(bench.root.rglob(f"aspcapStar{name}")), path)
    return judge_star(bench, path, star)


def moving(bench, rng):
    "A spectrum that is not at rest, and says so."
    star = chosen(rng, bench)
    path = bench.place() / star.name
    with fits.open(star) as hdus:
        hdus[0].header["VRAD"] = rng.choice([-1, 1]) * rng.uniform(2, 200)
        for k in (1, 2, 3):
            hdus[k].data = np.roll(hdus[k].data, rng.randrange(1, 20), axis=-1)
        hdus.writeto(path)
    return judge_star(bench, path, star)


FLUXES = {
    "flat": lambda f, rng: f * 0 + np.median(f),
    "shifted": lambda f, rng: np.roll(f, rng.choice([-7, -2, 2, 7]), axis=-1),
    "upside down": lambda f, rng: 2 * np.median(f) - f,
    "backwards": lambda f, rng: f[..., ::-1].copy(),
    "magnitudes": lambda f, rng: -2.5 * np.log10(np.maximum(f, 1e-30)),
    "smoothed": lambda f, rng: np.apply_along_axis(np.convolve, -1, f, np.ones(9) / 9, "same"),
    "clipped": lambda f, rng: np.minimum(f, np.quantile(f, 0.3)),
    "no light": lambda f, rng: f * 0,
}


def strange_light(bench, rng):
    "A whole spectrum of another kind, in a file without a fault."
    star = chosen(rng, bench)
    path = bench.place() / star.name
    name = rng.choice(list(FLUXES))
    with fits.open(star) as hdus:
        hdus[1].data = FLUXES[name](hdus[1].data, rng).astype("f4")
        hdus.writeto(path)
    found = judge_star(bench, path, star)
    return found._replace(said=f"{name}: {found.said}")


NAMES = [
    "étoile.fits",
    "-rf.fits",
    "two words.fits",
    "line\nbreak.fits",
    "\x1b[31mred\x1b[0m.fits",
    "{id}.fits",
    "%s%n.fits",
    "*.fits",
    "~.fits",
    "x" * 240 + ".fits",
    os.fsdecode(b"\xff\xfe.fits"),
]


def odd_name(bench, rng):
    "A whole or an empty star under an odd name, through the command: its words are harmless."
    star = chosen(rng, bench)
    place = bench.place()
    path = place / rng.choice(NAMES)
    whole = rng.random() < 0.5
    path.write_bytes(star.read_bytes() if whole else b"")
    out = place / rng.choice(["o.fits", "o.ecsv", "o.csv", "o.vot"])
    words = ["label", "--model", bench.models["guarded"], path, "--out", out]
    said = in_process(*words)
    if isinstance(said, Found):
        return said
    table = label(bench.model, path, progress=False).table
    same = all(table[0][n] == bench.answer(star)[n] for n in LABELS)
    return Found("harmless" if whole and same and out.exists() else "wrong")


def in_process(*words):
    "A command in this process; a Found where it was refused, else None."
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = command([str(word) for word in words])
    return judge_words(code, out.getvalue(), err.getvalue())


# --- models


def tree_of(path):
    with asdf.open(path, memmap=False, lazy_load=False) as file:
        return {
            name: np.array(value) if hasattr(value, "dtype") else copy.deepcopy(value)
            for name, value in file.tree.items()
            if name not in ("asdf_library", "history")
        }


VALUES = [None, "x", -1, 0, 10**9, 1e300, float("nan"), [], {}, [None], True, [[1]], 3.7]
VALUES += [float("-inf"), "\x1b[2J", "x" * 100_000, {"a": {"b": []}}, ""]
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
    "negative": lambda a: -a if a.dtype != bool else ~a,
    "backwards": lambda a: a[::-1],
    "one row": lambda a: a[:1],
    "one NaN": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 0, np.nan, a),
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
        with _any_fingerprint():
            return judge_model(bench, path, kind)

    return fault


class _any_fingerprint:
    "Files count as sealed, whatever their fingerprint says: what a careful forger would write."

    def __enter__(self):
        self.read = training.read_model_file
        fits_all = type("Any", (str,), {"__ne__": lambda *_: False, "__eq__": lambda *_: True})

        def as_if_sealed(path):
            found = self.read(path)
            found.fingerprint = fits_all()
            return found

        training.read_model_file = as_if_sealed

    def __exit__(self, *_):
        training.read_model_file = self.read


ATTACKS = [
    (b"source: 0", b"source: file:///etc/passwd"),
    (b"source: 0", b"source: http://127.0.0.1:9/x"),
    (b"source: 1", b"source: 10000"),
    (b"source: 1", b"source: -1"),
    (b"format_version: 1", b"format_version: !!python/object/apply:os.system ['true']"),
    (b"format_version: 1", b"format_version: &a [*a, *a]"),
    (b"format_version: 1", b"format_version: " + b"[" * 100_000),
    (b"format_version: 1", b"format_version: !core/ndarray-1.1.0 {}"),
    (b"format_version: 1", b"format_version: !core/complex-1.0.0 1j"),
    (b"format_version: 1", b"format_version: 1\n? {a: b}\n: 1"),
    (b"format_version: 1", b"format_version: 1\n<<: {stellar_lab_model: RidgeLabels}"),
    (b"shape: [", b"shape: [1000000000000, "),
    (b"shape: [", b"shape: [-1, "),
    (b"datatype: float64", b"datatype: [ucs4, 1000000000]"),
    (b"datatype: float64", b"datatype: object"),
    (b"byteorder: little", b"byteorder: middle"),
    (b"byteorder: little", b"byteorder: big"),
    (b"\xd3BLK", b"\xd3BLX"),
    (b"Cannon", b"os.system"),
]


def model_attack(bench, rng):
    "A model's file that asks for other files, the network, code or all memory."
    kind = rng.choice(list(bench.models))
    path = bench.place() / "model.asdf"
    old, new = rng.choice(ATTACKS)
    path.write_bytes(bench.models[kind].read_bytes().replace(old, new))
    return judge_model(bench, path, kind)


def no_model(bench, rng):
    "Something else in place of a model."
    place = bench.place()
    path = place / "model.asdf"
    what = rng.choice(["pipe", "device", "folder", "circle", "star", "record", "keras", "nothing"])
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what in ("device", "circle"):
        path.symlink_to("/dev/zero" if what == "device" else "model.asdf")
    elif what == "star":
        shutil.copy(bench.stars[0], path)
    elif what == "record":
        shutil.copy(bench.models["cannon"].with_suffix(".json"), path)
    elif what == "keras":
        path = place / "model.keras"
        path.write_bytes(_zipped(b"{}"))
    return judge_model(bench, path, "cannon")


# --- records


def paths_in(value, above=()):
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*above, name)
        if isinstance(part, (dict, list)):
            yield from paths_in(part, (*above, name))


def record_entry(sealed):
    "An entry of a record missing, or another; a forger's record has no checksum."

    def fault(bench, rng):
        place = bench.place()
        shutil.copy(bench.models["cannon"], place / "m.asdf")
        record = copy.deepcopy(bench.record)
        if not sealed:
            del record["sha256"]
        where = rng.choice(list(paths_in(record)))
        inner = record
        for name in where[:-1]:
            inner = inner[name]
        if rng.random() < 0.3:
            del inner[where[-1]]
        else:
            inner[where[-1]] = rng.choice([*VALUES, 2**70])
        (place / "m.json").write_text(json.dumps(record))
        found = judge_record(bench, place / "m.asdf")
        return found._replace(said=f"{where}: {found.said}")

    return fault


def record_number(bench, rng):
    "A number of a record that is another one."
    place = bench.place()
    shutil.copy(bench.models["cannon"], place / "m.asdf")
    record = copy.deepcopy(bench.record)
    numbers = []
    for where in paths_in(record):
        inner = record
        for name in where[:-1]:
            inner = inner[name]
        if type(inner[where[-1]]) in (int, float):
            numbers.append((inner, where[-1]))
    inner, name = rng.choice(numbers)
    inner[name] = inner[name] + 1 if isinstance(inner[name], int) else inner[name] * 1.1
    (place / "m.json").write_text(json.dumps(record))
    return judge_record(bench, place / "m.asdf")


def record_bytes(change):
    "A record that is cut short, or something else."

    def fault(bench, rng):
        place = bench.place()
        shutil.copy(bench.models["cannon"], place / "m.asdf")
        data = bench.models["cannon"].with_suffix(".json").read_bytes()
        (place / "m.json").write_bytes(change(rng, data))
        return judge_record(bench, place / "m.asdf")

    return fault


def any_of(*changes):
    return lambda rng, data: rng.choice(changes)(rng, data)


def other_record(bench, rng):
    "The record of another model."
    place = bench.place()
    shutil.copy(bench.models["cannon"], place / "m.asdf")
    shutil.copy(bench.models["ridge"].with_suffix(".json"), place / "m.json")
    return judge_record(bench, place / "m.asdf")


MARKERS = [b"{}", b"[]", b"null", b"1e999", b'{"archive": ["clusters"]}', b'{"archive": {}}']
MARKERS += [b'{"archive": "mock"}', b'{"archive": "nowhere"}', b"[" * 100_000, b"\xff\xfe{"]
MARKERS += [b'{"archive": "clusters", "sha256": 3}', b'{"archive": "clusters", "sha256": {"a": 1}}']


def marker(bench, rng):
    "An archive.json that is none, through the training."
    root = bench.copy(bench.place())
    file = root / ARCHIVE_FILE
    data = file.read_bytes()
    changes = [lambda rng, data: rng.choice(MARKERS), cut, flip, nothing, noise, page]
    rewrite(file, rng.choice(changes)(rng, data))
    return judge_training(bench, root)


def pixel_list(bench, rng):
    "A list of continuum pixels that is none."
    path = bench.place() / rng.choice(["pixels.npy", "pixels.txt"])
    np.save(bench.folder / "list.npy", np.array([10, 20, 30, 40, 50]))
    data = (bench.folder / "list.npy").read_bytes()
    header = data.replace(b"(5,)", b"(5000000000,)").replace(b"    ", b"", 2)
    change = rng.choice([cut, flip_header, nothing, noise, page])
    texts = [b"1e400\n-5\nnan\n", b"15200.0 16000\n", b"0x10\n", b"1\n1\n1\n"]
    path.write_bytes(rng.choice([header, change(rng, data), rng.choice(texts)]))
    found = read_continuum_pixels(path)
    return Found("harmless" if np.flatnonzero(found).tolist() == [10, 20, 30, 40, 50] else "wrong")


# --- catalogues, through train


def _changed_catalogue(bench, change, sealed=False):
    "A copy of the archive with another catalogue."
    root = bench.copy(bench.place(), sealed)
    catalogue = find_catalogue(root)
    rewrite(catalogue, change(catalogue.read_bytes()))
    return root


def _changed_table(bench, change):
    "A copy of the archive whose catalogue went through `change(table)`, and perhaps got cards."
    root = bench.copy(bench.place(), sealed=False)
    catalogue = find_catalogue(root)
    table = Table.read(catalogue)
    table = change(table) or table
    catalogue.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table.write(catalogue)
    return root


BAD_LABELS = [-9999.0, -9999.99, np.nan, np.inf, -np.inf, 0.0, 99999.0, 1e30, -99.9, -1.0]


def bad_label(bench, rng):
    "A label of five stars that is no label."
    value = rng.choice(BAD_LABELS)

    def change(table):
        rows = rng.sample(range(len(table)), min(5, len(table)))
        table["TEFF"][rows] = value

    return judge_training(bench, _changed_table(bench, change))


def _with_unit(name, unit, factor):
    def change(table):
        table[name] = np.asarray(table[name]) * factor
        table[name].unit = unit

    return change


def _as_whole_numbers(table):
    values = np.round(np.asarray(table["TEFF"])).astype("i4")
    values[:5] = -9999
    table.replace_column("TEFF", values)


def _masked(table):
    values = np.round(np.asarray(table["TEFF"])).astype("i4")
    table.replace_column("TEFF", MaskedColumn(values, mask=np.arange(len(values)) < 5))


def _renamed(old, new):
    return lambda table: table.rename_column(old, new)


def _twice(table):
    table.add_row(table[0])
    table["TEFF"][-1] += 500


CATALOGUES = {
    "whole numbers": _as_whole_numbers,
    "masked whole numbers": _masked,
    "text": lambda t: t.replace_column("TEFF", np.asarray(t["TEFF"]).astype(str)),
    "complex": lambda t: t.replace_column("TEFF", np.asarray(t["TEFF"], complex)),
    "truth": lambda t: t.replace_column("TEFF", np.asarray(t["TEFF"]) > 4500),
    "two numbers": lambda t: t.replace_column("TEFF", np.column_stack([t["TEFF"]] * 2)),
    "lacking": lambda t: t.remove_column("TEFF"),
    "renamed": _renamed("TEFF", "TEFF_OLD"),
    "small letters": _renamed("TEFF", "teff"),
    "one value": lambda t: t.replace_column("M_H", np.full(len(t), 0.1)),
    "no names": lambda t: t.remove_column("APOGEE_ID"),
    "no rows": lambda t: t.remove_rows(slice(None)),
    "one row": lambda t: t.remove_rows(slice(1, None)),
    "twice the same": lambda t: t.replace_column("M_H", (t["TEFF"] - 4500) / 1000),
    "in kK": _with_unit("TEFF", "kK", 1e-3),
    "in parsec": _with_unit("TEFF", "pc", 1),
    "in an unknown unit": _with_unit("TEFF", "furlong", 1),
    "kK without a unit": _with_unit("TEFF", None, 1e-3),
    "a star twice": _twice,
    "other order": lambda t: t[::-1],
    "all missing": lambda t: t.replace_column("TEFF", np.full(len(t), -9999.0)),
}


def catalogue_table(bench, rng):
    "A catalogue with a column, a unit or rows of another kind."
    name = rng.choice(list(CATALOGUES))
    found = judge_training(bench, _changed_table(bench, CATALOGUES[name]))
    return found._replace(said=f"{name}: {found.said}")


def names_shuffled(bench, rng):
    "The labels of the catalogue at other stars."

    def change(table):
        order = list(range(len(table)))
        rng.shuffle(order)
        table.replace_column("TEFF", np.asarray(table["TEFF"])[order])

    return judge_training(bench, _changed_table(bench, change))


def catalogue_bytes(change, sealed):
    "A catalogue that is damaged, in an archive that knows its checksum or not."

    def fault(bench, rng):
        root = _changed_catalogue(bench, lambda data: change(rng, data), sealed)
        return judge_training(bench, root)

    return fault


def packed_catalogue(bench, rng):
    "A packed catalogue with a changed bit, or cut short."
    root = bench.copy(bench.place(), sealed=False)
    catalogue = find_catalogue(root)
    data = gzip.compress(catalogue.read_bytes(), 1)
    catalogue.unlink()
    catalogue.with_name(f"{catalogue.name}.gz").write_bytes(rng.choice([cut, flip])(rng, data))
    return judge_training(bench, root)


def one_of_many(sealed):
    "One damaged star among those of a training."

    def fault(bench, rng):
        root = bench.copy(bench.place(), sealed)
        star = root / chosen(rng, bench).relative_to(bench.root)
        changes = [cut, overwrite, nothing, page] if sealed else [cut, nothing, page, missing]
        rewrite(star, rng.choice(changes)(rng, star.read_bytes()))
        return judge_training(bench, root)

    return fault


# --- sources


def source(bench, rng):
    "A source that names the user's own files, or holds something else than files."
    place = bench.place()
    there, home = place / "there", place / "home"
    shutil.copytree(bench.root, there, copy_function=os.link)
    home.mkdir()
    (home / "thesis.tex").write_text("my only copy")
    facts = json.loads((there / ARCHIVE_FILE).read_text())
    names = rng.choice(
        [
            ["thesis.tex"],
            ["../thesis.tex"],
            ["/etc/passwd"],
            "thesis.tex",
            {"a": 1},
            [None],
            [1e300],
            ["archive.json"],
            ["truth.fits\x00"],
        ]
    )
    rewrite(there / ARCHIVE_FILE, json.dumps(facts | {"files": names}).encode())
    (there / "thesis.tex").write_text("not yours")
    field = bench.stars[0].parent.name
    try:
        summary = fetch(home, str(there), fields=[field], products=["apstar"], progress=False)
        found = Found("harmless") if summary.ok else told(summary.problems[0][1])
    except LabError as error:
        found = told(error)
    mine = (home / "thesis.tex").read_text() == "my only copy"
    return found if mine else Found("file", "the user's file was replaced")


def _field_of(bench):
    "The field with the fewest stars, and the files that a fetch of it should bring."
    field = min({star.parent for star in bench.stars}, key=lambda f: len(os.listdir(f)))
    return field.name


def _star_of_field(bench, rng):
    "A star of that field, as a path below the root."
    star = rng.choice([star for star in bench.stars if star.parent.name == _field_of(bench)])
    return star.relative_to(bench.root)


def _judge_home(bench, home, summary, untouched=()):
    "Every file under a final name is the source's; the summary names those that are not there."
    for name, content in whole_folder(home).items():
        temporary = name.endswith((".part", ".note", ".old")) or Path(name).name.startswith(".")
        original = bench.root / name
        if temporary or name in untouched or name == "sha256sums.txt":
            continue
        if not original.is_file() or original.read_bytes() != content:
            return Found("file", f"{name} is not the source's")
    if summary.ok:
        return Found("harmless")
    return told("; ".join(f"{path}: {reason}" for path, reason in summary.problems[:3]))


def _fetched(bench, there, sealed=True, home=None):
    "Fetch a field from a folder or a URL, and judge what came."
    home = bench.folder / "fault" / "home" if home is None else home
    options = {"progress": False, "timeout": 2, "tries": 2, "backoff": 0.01}
    try:
        summary = fetch(home, str(there), fields=[_field_of(bench)], **options)
    except LabError as error:
        return told(error)
    untouched = () if sealed else (ARCHIVE_FILE,)
    return _judge_home(bench, home, summary, untouched)


def source_bytes(bench, rng):
    "A star at the source is damaged; its archive knows the checksum."
    there = bench.copy(bench.place())
    star = there / _star_of_field(bench, rng)
    change = rng.choice([cut, flip, overwrite, nothing, page, append])
    rewrite(star, change(rng, star.read_bytes()))
    return _fetched(bench, there)


def at_home(bench, rng):
    "A fetched star is damaged at home, and fetched again: the damage is seen and mended."
    place = bench.place()
    there = bench.copy(place, sealed=rng.random() < 0.5)
    sealed = "sha256" in (there / ARCHIVE_FILE).read_text()
    home = place / "home"
    first = _fetched(bench, there, sealed, home)
    if first.outcome != "harmless":
        return first._replace(outcome="wrong")
    star = home / _star_of_field(bench, rng)
    star.write_bytes(rng.choice([cut, flip, overwrite, page])(rng, star.read_bytes()))
    return _fetched(bench, there, sealed, home)


class _Rude(ArchiveHandler):
    "A server that misbehaves with the files of stars, `how` being drawn for each fault."

    how = ""

    def do_GET(self):
        if "Star-" not in self.path or self.path.endswith("/"):
            return super().do_GET()
        body = Path(self.translate_path(self.path)).read_bytes()
        return getattr(self, f"_{self.how.replace(' ', '_')}")(body)

    do_HEAD = ArchiveHandler.do_HEAD

    def _answer(self, body, status=200, length=None, **headers):
        self.send_response_only(status, headers.pop("reason", None))
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            pass
        self.close_connection = True

    def _breaks_off(self, body):
        self._answer(body[: len(body) // 2], length=len(body))

    def _says_too_little(self, body):
        self._answer(body, length=len(body) - 2880)

    def _gives_a_page(self, body):
        self._answer(page(None, b""), Content_Type="text/html")

    def _gives_another_star(self, body):
        stars = sorted(Path(self.directory).rglob("apStar-*"))
        self._answer(next(other for star in stars if (other := star.read_bytes()) != body))

    def _is_busy(self, body):
        self._answer(b"", 503, Retry_After="1")

    def _curses(self, body):
        self._answer(b"", 500, reason="\x1b[2J\x1b]0;owned\x07")

    def _leads_in_circles(self, body):
        self._answer(b"", 302, Location=self.path)

    def _leads_elsewhere(self, body):
        self._answer(b"", 302, Location="file:///etc/passwd")

    def _says_nothing(self, body):
        self.close_connection = True

    def _talks_nonsense(self, body):
        self.wfile.write(b"\x00\xff" * 100)
        self.close_connection = True

    def _packs(self, body):
        self._answer(gzip.compress(body), Content_Encoding="gzip")

    def _flips_a_bit(self, body):
        middle = len(body) // 2
        self._answer(body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :])

    def _answers_part(self, body):
        self._answer(body[100:], 206, Content_Range=f"bytes 100-{len(body) - 1}/{len(body)}")

    def _trickles(self, body):
        self.send_response_only(200)
        try:
            for _ in range(40):
                self.wfile.write(b"X")
                self.wfile.flush()
                time.sleep(0.2)
        except OSError:
            pass
        self.close_connection = True


RUDE = [
    name[1:].replace("_", " ")
    for name in vars(_Rude)
    if name.startswith("_") and not name.startswith("__") and name != "_answer"
]


def server(bench, rng):
    "A server that misbehaves."
    bench.place()
    handler = type("Rude", (_Rude,), {"how": rng.choice(RUDE)})
    with serve(bench.root, handler=handler) as url:
        found = _fetched(bench, url)
    return found._replace(said=f"{handler.how}: {found.said}")


# --- numbers


SPECTRA = {
    "no light": lambda f, w: (f * 0, w),
    "negative": lambda f, w: (-f, w),
    "faint": lambda f, w: (f * 1e-20, w),
    "bright": lambda f, w: (f * 1e30, w),
    "beyond": lambda f, w: (np.where(np.arange(f.size) == 99, 3e38, f), w),
    "no weight": lambda f, w: (f, w * 0),
    "one pixel": lambda f, w: (f, np.where(np.arange(f.size) == 99, w, 0)),
    "sure": lambda f, w: (f, w * 1e20),
    "unsure": lambda f, w: (f, w * 1e-30),
    "NaN": lambda f, w: (np.where(np.arange(f.size) == 99, np.nan, f), w),
    "unused NaN": lambda f, w: (np.where(w == 0, np.nan, f), w),
    "negative weight": lambda f, w: (f, -w),
    "text": lambda f, w: (f.astype(str), w),
    "complex": lambda f, w: (f.astype(complex), w),
    "short": lambda f, w: (f[:-1], w[:-1]),
    "whole numbers": lambda f, w: (np.round(f * 1000).astype(int), w),
    "emission": lambda f, w: (2 - f, w),
    "flat": lambda f, w: (f * 0 + 1, w),
}


def number(bench, rng):
    "A spectrum of odd numbers, next to a good one."
    spectra = bench.undisturbed("real stars", archives.real_stars)[rng.sample(range(500), 2)]
    good = infer(bench.model, spectra.flux, spectra.ivar)
    flux, ivar = spectra.flux.copy(), spectra.ivar.copy()
    name = rng.choice(list(SPECTRA))
    odd_flux, odd_ivar = SPECTRA[name](flux[0], ivar[0])
    both = [np.stack(pair) for pair in ((odd_flux, odd_flux), (odd_ivar, odd_ivar))]
    alone = odd_flux.dtype.kind not in "fi" or len(odd_flux) != flux.shape[1]
    if not alone:
        both = [np.stack([odd_flux, flux[1]]), np.stack([odd_ivar, ivar[1]])]
    with np.errstate(all="ignore"):
        table = infer(bench.model, *both)
    if not alone and abs(table["teff"][1] - good["teff"][1]) > 1e-3 * good["teff_err"][1]:
        return Found("wrong", f"{name}: the neighbour feels it")
    if abs(table["teff"][0] - good["teff"][0]) <= 1e-3 * good["teff_err"][0]:
        return Found("harmless")
    if table["flags"][0]:
        return Found("flagged")
    wide = table["teff_err"][0] > abs(table["teff"][0] - good["teff"][0]) / SLIGHT
    return Found("flagged" if wide else "wrong", f"{name}: errors as wide as what is lost")


# --- outputs over what is there


def output(bench, rng):
    "An output that would replace a file of the user's, a link, a device or an input."
    place = bench.place()
    root = bench.copy(place)
    star = root / chosen(rng, bench).relative_to(bench.root)
    model = place / "m.asdf"
    shutil.copy(bench.models["cannon"], model)
    shutil.copy(bench.models["cannon"].with_suffix(".json"), place / "m.json")
    (place / "thesis.fits").write_bytes(b"my only copy")
    (place / "thesis.asdf").write_bytes(b"my only copy")
    (place / "notes.csv").write_text("my,notes\n")
    (place / "t-failed.csv").write_text("my,notes\n")
    (place / "settings.json").write_text('{"colour": "green"}')
    (place / "link.fits").symlink_to("thesis.fits")
    (place / "locked.fits").write_bytes(b"apogee_id my only copy")
    (place / "locked.fits").chmod(0o444)
    (place / "folder.fits").mkdir()
    os.mkfifo(place / "pipe.fits")
    outs = [star, find_catalogue(root), root / "truth.fits", place / "thesis.fits"]
    outs += [place / "notes.csv", place / "link.fits", place / "locked.fits", place / "t.fits"]
    outs += [place / "folder.fits", place / "pipe.fits", "/dev/null.fits", place / "m.asdf"]
    outs += [place / "m.json", root / ARCHIVE_FILE, place / "thesis.fits" / "t.fits"]
    targets = [root / "archive.asdf", place / "settings.asdf", place / "thesis.asdf", star]
    targets += [place / "thesis.fits", place / "folder.fits"]
    before = regular_files(place)
    if rng.random() < 0.7:
        broken = place / "broken.fits"
        broken.write_bytes(b"")  # so that the list of failed files is asked for
        before = regular_files(place)
        words = ["label", "--model", model, star, broken, "--out", rng.choice(outs)]
    else:
        names = ",".join(LABELS)
        words = ["train", root, "--labels", names, "--scatter", "--model", rng.choice(targets)]
    said = in_process(*words)
    after = regular_files(place)
    lost = [name for name, content in before.items() if after.get(name) != content]
    # what nobody knows as a model or a table of labels may be the user's
    if lost:
        return Found("file", f"{' '.join(map(str, words))}: {', '.join(lost)} replaced")
    return said or Found("harmless")


def regular_files(place):
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


# --- kills and resources: processes of their own

NAMED = ",".join(LABELS)


def _words(bench, what, place):
    "The words of a command, and the folder in which it writes."
    out = place / "out"
    out.mkdir(exist_ok=True)
    if what == "train":
        return ["train", bench.root, "--labels", NAMED, "--scatter", "--model", out / "m.asdf"], out
    if what.startswith("label"):
        more = ["--workers", "2"] if "two" in what else []
        words = ["label", bench.root, "--model", bench.models["cannon"], "--out", out / "o.fits"]
        return words + more, out
    if what == "archive":
        return ["archive", "clusters", out / "a", "--stars", "12"], out
    return ["fetch", out / "home", "--from", bench.root, "--fields", _field_of(bench)], out


def _run_undisturbed(bench, what):
    "How long a command takes, its exit code and the bytes that it writes."
    words, out = _words(bench, what, bench.place())  # there, where the others run
    begun = time.monotonic()
    code, _, err = Process(*words).end()
    seconds = time.monotonic() - begun
    if code not in (0, 1):
        raise RuntimeError(f"{what} cannot run: {err}")
    return seconds, code, whole_folder(out)


def killed(what, number):
    "A command that is killed somewhere, and run again: the same bytes, and nothing else left."

    def fault(bench, rng):
        seconds, _, expected = bench.undisturbed(what, lambda: _run_undisturbed(bench, what))
        place = bench.place()
        words, out = _words(bench, what, place)
        process = Process(*words)
        time.sleep(rng.uniform(0.1, 1.05) * seconds)
        begun = process.catches(number)
        process.process.send_signal(number)
        code, said, err = process.end()
        if process.left_behind():
            return Found("hang", "processes stay behind")
        if begun:  # before that nobody could answer
            wrong = judge_words(code, said, err)
            if wrong is not None and wrong.outcome == "traceback":
                return wrong
        for name, content in whole_folder(out).items():
            final = not Path(name).name.startswith(".") and not name.endswith((".part", ".note"))
            hidden = any(step.startswith(".") for step in Path(name).parts)
            if final and not hidden and not _is_growing(name, content, expected):
                return Found("file", f"{name} is not what it should be after the kill")
        again = Process(*words)
        code, said, err = again.end()
        if again.left_behind():
            return Found("hang", "processes stay behind")
        wrong = judge_words(0 if code == 1 else code, said, err)
        if wrong is not None:
            return wrong._replace(outcome="wrong")
        found = whole_folder(out)
        strays = sorted(found.keys() - expected.keys())
        if strays:
            return Found("file", f"left behind: {', '.join(strays)}")
        other = [name for name in expected if found.get(name) != expected[name]]
        return Found("wrong", f"other bytes: {', '.join(other)}") if other else Found("harmless")

    return fault


def _is_growing(name, content, expected):
    "Whether a file is the final one; a list of checksums grows line by line."
    if name.endswith("sha256sums.txt"):
        return set(content.splitlines()) <= set(expected.get(name, b"").splitlines())
    return expected.get(name) == content


def parts_damaged(bench, rng):
    "Finished parts of a table are damaged before the run goes on."
    place = bench.place()
    out = place / "o.fits"
    options = {"progress": False, "batch": 8}
    model = str(bench.models["cannon"])

    def whole():
        label(model, bench.root, bench.folder / "whole.fits", **options)
        return (bench.folder / "whole.fits").read_bytes()

    expected = bench.undisturbed("parts", whole)
    parts = place / ".o.fits.parts"
    real = shutil.rmtree
    try:
        shutil.rmtree = lambda path, **_: None  # the parts stay, as if the run had been stopped
        label(model, bench.root, out, **options)
    finally:
        shutil.rmtree = real
    out.unlink()
    for part in rng.sample(sorted(parts.iterdir()), 2):
        change = rng.choice([cut, flip, overwrite, nothing, noise])
        part.write_bytes(change(rng, part.read_bytes()))
    label(model, bench.root, out, **options)
    if parts.exists():
        return Found("file", "parts are left behind")
    return Found("harmless" if out.read_bytes() == expected else "wrong")


LIMITS = {  # what a command is short of, as shell words around it
    "files": ["ulimit -n 24; {run}", "ulimit -n 12; {run}"],
    "memory": ["ulimit -v 300000; {run}", "ulimit -v 600000; {run}", "ulimit -v 1000000; {run}"],
    "length of files": ["ulimit -f 20; {run}", "ulimit -f 0; {run}", "ulimit -f 200; {run}"],
    "output": ["{run} >&-", "{run} > /dev/full", "{run} | true", "{run} >&- 2>&-"],
    "error output": ["{run} 2>&-", "{run} 2> /dev/full", "{run} 2>&1 | true"],
    "disk": [
        "unshare -rm sh -c 'mount -t tmpfs -o size=40k tmpfs {out} && {run}; cp -a {out}/. {kept}'",
        "unshare -rm sh -c 'mount -t tmpfs -o size=4k tmpfs {out} && {run}; cp -a {out}/. {kept}'",
        "unshare -rm sh -c 'mount -t tmpfs -o ro tmpfs {out} && {run}'",
    ],
    "surroundings": [
        "env -i {run}",
        "HOME=/proc/nowhere LC_ALL=C {run}",
        "umask 777; {run}",
        "cd {place}/gone && rmdir {place}/gone && {run}",
        "PYTHONWARNINGS=error {run}",
        "TMPDIR=/proc/nowhere {run}",
        "COLUMNS=0 LINES=-1 TERM=dumb {run}",
    ],
}
SHORT = ("label", "train", "archive", "fetch")


def short_of(what):
    "A command that is short of something: done, or refused in our words, and nothing half done."

    def fault(bench, rng):
        doing = rng.choice(SHORT)
        _, usual, expected = bench.undisturbed(doing, lambda: _run_undisturbed(bench, doing))
        place = bench.place()
        words, out = _words(bench, doing, place)
        kept = place / "kept"
        kept.mkdir()
        (place / "gone").mkdir()
        run = " ".join([str(SCRIPT), *map(str, words)])
        limit = rng.choice(LIMITS[what])
        shell = limit.format(run=run, out=out, kept=kept, place=place)
        process = Process(shell=f"export SOURCE_DATE_EPOCH=1000000000; {shell}")
        code, said, err = process.end()
        case = f"{doing}, {limit}"
        if process.left_behind():
            return Found("hang", f"{case}: processes stay behind")
        if "unshare" in limit and ("unshare:" in err or "mount:" in err):
            return Found("reported", "this machine mounts nothing for us")
        wrong = judge_words(code, said, err)
        if wrong is not None and wrong.outcome == "traceback":
            return wrong._replace(said=f"{case}: {wrong.said}")
        found = whole_folder(out) | whole_folder(kept)
        for name, content in found.items():
            if name.endswith((".part", ".note")):
                continue
            if doing == "train" and name == "m.json" and "env -i" in limit:
                continue  # without our environment a record has other facts
            if not _is_growing(name, content, expected):
                return Found("file", f"{case}: {name} is not what it should be")
        whole = found.keys() >= expected.keys()
        if whole:
            return Found("harmless")
        silent = not (said + err).strip() and not any(
            n in limit for n in ("2>", "&-", "true", "full")
        )
        piped = "| true" in limit
        if silent or (code == usual == 0 and not piped and "kept" not in limit):
            return Found("wrong", f"{case}: exit code {code}, and not all is there: {err}")
        return Found("reported", f"{case}: {err}")

    return fault


def together(bench, rng):
    "The same command twice at once: both are right, or one says why not."
    what = rng.choice(SHORT)
    _, _, expected = bench.undisturbed(what, lambda: _run_undisturbed(bench, what))
    place = bench.place()
    words, out = _words(bench, what, place)
    processes = [Process(*words), Process(*words)]
    ends = [process.end() for process in processes]
    refused = None
    for code, said, err in ends:
        wrong = judge_words(0 if code == 1 else code, said, err)
        if wrong is not None and wrong.outcome == "traceback":
            return wrong
        refused = wrong or refused
    found = whole_folder(out)
    if found != expected:
        other = [n for n in {*found, *expected} if found.get(n) != expected.get(n)]
        return Found("file", f"{what} twice: {', '.join(sorted(other))} differ")
    return refused or Found("harmless")


class Kind(NamedTuple):
    "A kind of fault."

    part: str
    name: str
    fault: object  # called with a bench and a random number generator; returns a Found
    quick: int  # how many in the quick part
    full: int
    unseen: str = ""  # why nobody could see some of them


VALID = "a valid number in place of another, and no checksum in the file"
FORGED = "a valid file with a new checksum, made by somebody else"
LIGHT = "valid light of another kind: the guard of a model of 60 stars and more sees most of it"

KINDS = (
    Kind("star", "cut short", star_bytes(cut), 8, 240),
    Kind("star", "a byte in the header", star_bytes(flip_header), 8, 180, VALID),
    Kind("star", "a bit in the data", star_bytes(flip), 8, 120, VALID),
    Kind("star", "2880 bytes overwritten", star_bytes(overwrite), 6, 60, VALID),
    Kind("star", "4096 bytes of zeros", star_bytes(zeros), 4, 60, VALID),
    Kind("star", "a block left out", star_bytes(missing), 5, 60),
    Kind("star", "a block twice", star_bytes(repeated), 5, 60, VALID),
    Kind("star", "sent as text", star_bytes(ends_of_lines), 1, 10),
    Kind("star", "sent as seven bits", star_bytes(seventh_bit), 1, 10),
    Kind("star", "empty", star_bytes(nothing), 1, 5),
    Kind("star", "noise", star_bytes(noise), 1, 10),
    Kind("star", "a web page", star_bytes(page), 1, 5),
    Kind("star", "bytes appended", star_bytes(append), 2, 20),
    Kind("star", "the file twice in one", star_bytes(itself), 1, 5),
    Kind("star", "with FITS checksums, a bit", star_bytes(flip, summed), 4, 120),
    Kind("star", "in an archive, a bit", in_archive(flip), 5, 60),
    Kind("star", "in an archive, overwritten", in_archive(overwrite), 3, 40),
    Kind("star", "in an archive, exchanged", exchanged, 2, 20),
    *(
        Kind("star", f"a bit of a packed file, .{packing}", packed_bytes(flip, packing), 2, 60)
        for packing in PACKINGS
    ),
    Kind("star", "a packed file cut short", packed_bytes(cut), 2, 60),
    Kind("star", "cards of the structure", card(CARDS), 10, 300),
    Kind("star", "cards of the flux", card(CARDS, 2880), 6, 200),
    Kind("star", "cards of facts", card(FACT_CARDS), 8, 160),
    Kind("star", "impossible flux", pixels("flux", PIXELS["flux"][1][:6]), 6, 100),
    Kind("star", "improbable flux", pixels("flux", [1e6, -1e6, 1e4, 0.0]), 3, 60, VALID),
    Kind("star", "impossible errors", pixels("errors"), 5, 120),
    Kind("star", "HDUs missing", hdus_of(fewer), 4, 60),
    Kind("star", "HDUs swapped", hdus_of(swapped), 5, 60),
    Kind("star", "other shapes and types", hdus_of(other_shape), 6, 100, VALID),
    Kind("star", "legal scaled images", hdus_of(scaled), 2, 10, "rounded by the writer"),
    Kind("star", "a table in place of an image", hdus_of(table_instead), 2, 10),
    Kind("star", "a compressed image", hdus_of(compressed), 1, 5, "rounded by the writer"),
    Kind("star", "no file", pipe, 5, 20),
    Kind("star", "another star's bytes", another_star, 3, 40),
    Kind("star", "another product's bytes", other_product, 2, 20),
    Kind("star", "not at rest", moving, 3, 40),
    Kind("star", "strange light", strange_light, 8, 80, LIGHT),
    Kind("star", "odd names", odd_name, 5, 60),
    Kind("model", "a bit", model_bytes(flip), 8, 120),
    Kind("model", "cut short", model_bytes(cut), 6, 60),
    Kind("model", "overwritten", model_bytes(any_of(overwrite, zeros)), 5, 60),
    Kind("model", "a block left out or twice", model_bytes(any_of(missing, repeated)), 4, 40),
    Kind("model", "something else", model_bytes(any_of(noise, nothing, page, append)), 4, 20),
    Kind("model", "no file", no_model, 6, 30),
    Kind("model", "entries", model_entry(sealed=False), 12, 300),
    Kind("model", "entries, forged", model_entry(sealed=True), 12, 300, FORGED),
    Kind("model", "attacks", model_attack, 8, 80),
    Kind("record", "entries", record_entry(sealed=True), 6, 100),
    Kind("record", "entries, forged", record_entry(sealed=False), 8, 300, FORGED),
    Kind("record", "numbers", record_number, 4, 40),
    Kind("record", "a bit", record_bytes(flip), 6, 60),
    Kind("record", "bytes", record_bytes(any_of(cut, overwrite, nothing, noise, page)), 6, 60),
    Kind("record", "of another model", other_record, 1, 2),
    Kind("record", "archive.json", marker, 5, 60),
    Kind("record", "lists of pixels", pixel_list, 8, 60),
    Kind("catalogue", "labels that are none", bad_label, 2, 40),
    Kind("catalogue", "columns, units, rows", catalogue_table, 6, 80),
    Kind("catalogue", "labels shuffled", names_shuffled, 1, 5, "labels at other stars"),
    Kind("catalogue", "a bit", catalogue_bytes(flip, sealed=False), 2, 60, VALID),
    Kind("catalogue", "in an archive, a bit", catalogue_bytes(flip, sealed=True), 2, 20),
    Kind(
        "catalogue",
        "bytes",
        catalogue_bytes(any_of(cut, nothing, noise, page, missing, zeros), sealed=False),
        4,
        60,
        VALID,
    ),
    Kind("catalogue", "packed", packed_catalogue, 2, 20),
    Kind("catalogue", "one damaged star", one_of_many(sealed=False), 2, 24),
    Kind("catalogue", "in an archive, one star", one_of_many(sealed=True), 2, 24),
    Kind("source", "names", source, 4, 30),
    Kind("source", "damaged at the source", source_bytes, 3, 40),
    Kind("source", "damaged at home", at_home, 3, 40),
    Kind("source", "rude servers", server, 4, 60, "a bit that no checksum knows"),
    Kind("numbers", "spectra", number, 10, 100),
    Kind("output", "over what is there", output, 8, 120),
    Kind("kill", "damaged parts", parts_damaged, 1, 10),
    *(
        Kind("kill", f"{what}, {name}", killed(what, getattr(signal, name)), 0, times)
        for what, times in {
            "train": 4,
            "label": 4,
            "label in two": 3,
            "archive": 3,
            "fetch": 2,
        }.items()
        for name in ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")
    ),
    *(Kind("resources", what, short_of(what), 0, 2 * len(cases)) for what, cases in LIMITS.items()),
    Kind("resources", "the same twice at once", together, 0, 8),
)
