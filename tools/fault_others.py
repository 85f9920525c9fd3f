"""Faults in files of other kinds than combined spectra: of SDSS-V, of single visits, of one's own
spectra, and of networks. `OTHERS` lists the kinds."""

import gzip
import io
import json
import os
import shutil
import warnings
import zipfile
from unittest.mock import patch

import numpy as np
from astropy.io import fits
from astropy.table import Table

from fault_bench import FACTS, FOREIGN, LABELS, Found, judge_model, judge_row, told
from fault_kinds import (
    FORGED,
    VALID,
    VALUES,
    Kind,
    any_of,
    cut,
    ends_of_lines,
    flip,
    in_process,
    missing,
    noise,
    nothing,
    overwrite,
    page,
    paths_in,
    regular_files,
    repeated,
    seventh_bit,
    zeros,
)
from stellar_lab.clean import read_stars
from stellar_lab.labelling import label
from stellar_lab.mwm import made_mwm
from stellar_lab.normalize import training_set
from stellar_lab.survey import PRODUCTS
from stellar_lab.visits import made_visit

N_OTHERS = 4  # stars of each kind
PARTS = {"mwm": "mwm", "visit": "visit", "csv": "table", "table": "table", "npz": "table"}
TEXT = "a valid number in place of another; text has no checksum, and its lines may end anywhere"
UNSEEN = {"mwm": VALID, "visit": VALID, "csv": TEXT, "table": VALID, "npz": ""}
SEEN = (cut, flip, overwrite, zeros)


def _spectra(bench):
    "Some of the bench's stars, raw."
    return read_stars(bench.stars[:N_OTHERS], PRODUCTS["apstar"], progress=False)[0]


def _write(hdus, path, sums):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hdus.writeto(path, checksum=sums)


def _make_mwm(folder, spectra, number, sums):
    path = folder / f"mwmStar-0.6.0-{number + 40}.fits"
    hdus = made_mwm(apo=spectra[[number]], sdss_id=number + 40)
    for hdu in hdus:
        for key in () if sums else ("CHECKSUM", "DATASUM"):
            hdu.header.remove(key, ignore_missing=True)
    _write(hdus, path, sums)


def _pixels_of(spectra, number):
    "Wavelength, flux where it is not known filled in, and ivar of a star."
    good = (spectra.ivar[number] > 0) & (spectra.mask[number] == 0)
    flux = np.interp(spectra.wavelength, spectra.wavelength[good], spectra.flux[number][good])
    return spectra.wavelength, flux, np.where(good, spectra.ivar[number], 0)


def _make_visit(folder, spectra, number, sums):
    grid, flux, _ = _pixels_of(spectra, number)
    name = str(spectra.stars["APOGEE_ID"][number])
    error = float(0.01 * np.median(flux))
    hdus = made_visit(grid, flux, error, 30.0 * number, name=name, seed=number)
    _write(hdus, folder / f"apVisit-r8-1-{number}-1.fits", sums)


def _table(spectra, number):
    grid, flux, ivar = _pixels_of(spectra, number)
    good = ivar > 0
    columns = {"wavelength": grid[good], "flux": flux[good], "error": ivar[good] ** -0.5}
    return Table(columns)


def _make_csv(folder, spectra, number, sums):
    table = _table(spectra, number)
    text = io.StringIO()
    table.write(text, format="ascii.csv")
    (folder / f"my{number}.csv").write_text("# unit: AA\n# velocity: 0\n" + text.getvalue())


def _make_table(folder, spectra, number, sums):
    hdu = fits.BinTableHDU(_table(spectra, number))
    _write(fits.HDUList([fits.PrimaryHDU(), hdu]), folder / f"my{number}.fits", sums)


def _make_npz(folder, spectra, number, sums):
    table = _table(spectra, number)
    np.savez(folder / f"my{number}.npz", **{name: table[name] for name in table.colnames})


MAKERS = {
    "mwm": _make_mwm,
    "visit": _make_visit,
    "csv": _make_csv,
    "table": _make_table,
    "npz": _make_npz,
}


def files_of(bench, what, sums=False):
    "Undamaged files of a kind, made once; with the checksums of FITS or without."
    folder = bench.folder / f"{what}{' with sums' if sums else ''}"
    if not folder.exists():
        folder.mkdir()
        spectra = _spectra(bench)
        for number in range(len(spectra)):
            MAKERS[what](folder, spectra, number, sums)
    return sorted(folder.iterdir())


def other_bytes(what, change, sums=False, name=None):
    "A fault in the bytes of a file of another kind, perhaps under another name."

    def fault(bench, rng):
        original = rng.choice(files_of(bench, what, sums))
        path = bench.place() / (name or original.name)
        path.write_bytes(change(rng, original.read_bytes()))
        return judge_other(bench, path, original)

    return fault


MEASURED = ("apVisit", "my")  # such files state no SNR: it is that of the pixels


def judge_other(bench, path, original):
    "Label a file, and compare with the labels of the undamaged one."
    summary = label(bench.model, path, progress=False)
    said = str(summary)
    if FOREIGN.search(said):
        return Found("traceback", said)
    if summary.problems:
        return told(summary.problems[0].reason)
    expected = bench.answer(original)
    if len(summary.table) != 1:
        return Found("wrong", f"{len(summary.table)} rows")
    facts = [name for name in FACTS if name != "snr" or not original.name.startswith(MEASURED)]
    return judge_row(summary.table[0], expected, facts)


def other_star(what):
    "The bytes of a star under the name of another."

    def fault(bench, rng):
        original, other = rng.sample(files_of(bench, what), 2)
        path = bench.place() / original.name
        path.write_bytes(other.read_bytes())
        return judge_other(bench, path, original)

    return fault


def _mwm_values(rng, hdus):
    "Impossible numbers in some pixels of a table of SDSS-V."
    table = next(hdu for hdu in hdus[1:] if not hdu.is_image and hdu.header["NAXIS2"])
    name = rng.choice(["flux", "ivar", "pixel_flags"])
    places = [rng.randrange(400, 8000) for _ in range(rng.choice([1, 20]))]
    values = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e30, -1.0]
    table.data[name][..., places] = rng.choice(values)
    return lambda: table.data["ivar"].__setitem__((..., places), 0)


def _visit_values(rng, hdus):
    "Impossible numbers in some pixels of a visit."
    number = rng.choice([1, 2, 4])
    places = [rng.randrange(4096) for _ in range(rng.choice([1, 20]))]
    chip = rng.randrange(3)
    hdus[number].data[chip, places] = rng.choice([np.nan, np.inf, -1e30, 1e30, -1.0])
    return lambda: hdus[2].data.__setitem__((chip, places), 1e10)


def _table_values(rng, hdus):
    "Impossible numbers in some pixels of a table."
    name = rng.choice(["wavelength", "flux", "error"])
    places = [rng.randrange(5000) for _ in range(rng.choice([1, 20]))]
    hdus[1].data[name][places] = rng.choice([np.nan, np.inf, -1e30, 1e30, -1.0, 0.0])
    return lambda: hdus[1].data["error"].__setitem__(places, np.nan)


def _facts(rng, hdus):
    "Cards of facts with values that are none."
    header = hdus[rng.choice([0, 1])].header
    keys = "SDSS_ID SNR RA DEC VRAD BC VHELIO OBJID OBJECT MJD5 TELESCOP V_ASTRA J_MAG SPEC_RES"
    keys += " CRVAL CDELT NPIXELS CRVAL1 CDELT1 CUNIT1 TUNIT1 TTYPE1 TDIM1 TNULL1 TSCAL1 TZERO1"
    header[rng.choice(keys.split())] = rng.choice([-9999, 1e300, "", "x" * 60, True, 2**62])


def _columns(rng, hdus):
    "A column missing, or of another name or kind."
    table = next(hdu for hdu in hdus[1:] if not hdu.is_image and hdu.header["NAXIS2"])
    columns = list(table.columns)
    number = rng.randrange(len(columns))
    if rng.random() < 0.4:
        del columns[number]
    else:
        old = columns[number]
        size = len(table.data)
        values = rng.choice([np.arange(size), np.array(["x"] * size), np.ones((size, 2)) * 1j])
        form = {"i": "K", "U": "1A", "c": "2M"}[values.dtype.kind]
        columns[number] = fits.Column(old.name, form, array=values)
    header = table.header
    new = fits.BinTableHDU.from_columns(fits.ColDefs(columns), name=table.name)
    for key in ("CRVAL", "CDELT", "NPIXELS"):
        if key in header:
            new.header[key] = header[key]
    hdus[hdus.index(table)] = new


def _shapes(rng, hdus):
    "An image of another shape or type."
    number = rng.choice([1, 2, 3, 4])
    data = hdus[number].data
    changes = [data[:1], data[0], data[..., :-1], data.T, data.astype("i4"), data.astype("u1")]
    hdus[number] = fits.ImageHDU(np.ascontiguousarray(rng.choice(changes)), hdus[number].header)


def _hdus(rng, hdus):
    "HDUs exchanged or missing."
    if rng.random() < 0.5:
        del hdus[rng.randrange(1, len(hdus))]
    elif len(hdus) > 2:
        one, other = rng.sample(range(1, len(hdus)), 2)
        hdus[one], hdus[other] = hdus[other], hdus[one]


def other_hdus(what, change):
    "A file of another kind with other HDUs."

    def fault(bench, rng):
        original = rng.choice(files_of(bench, what))
        path = bench.place() / original.name
        with fits.open(original) as hdus, warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            kept = [hdu.copy() for hdu in hdus]
            take_out = change(rng, kept)
            fits.HDUList(kept).writeto(path, output_verify="ignore")
            found = judge_other(bench, path, original)
            if found.outcome not in ("slight", "wrong") or take_out is None:
                return found
            take_out()  # the answer should be that without these pixels
            without = path.with_name("without") / path.name
            without.parent.mkdir()
            fits.HDUList(kept).writeto(without, output_verify="ignore")
        rows = [label(bench.model, one, progress=False).table[0] for one in (path, without)]
        same = all(abs(rows[0][n] - rows[1][n]) < 1e-3 * rows[1][f"{n}_err"] for n in LABELS)
        return Found("harmless", "as without these pixels") if same else found

    return fault


def text_lines(change):
    "A fault in the lines of a text file."

    def fault(bench, rng):
        original = rng.choice(files_of(bench, "csv"))
        path = bench.place() / original.name
        lines = original.read_text().splitlines()
        path.write_bytes("\n".join(change(rng, lines)).encode("utf-8", "surrogateescape"))
        return judge_other(bench, path, original)

    return fault


def _one_line(rng, lines):
    "A line that is none."
    bad = ["", ",,", "a,b,c", "1,2", "nan,nan,nan", "1e999,1,1", "15500,-1e30,0", "\x1b[2J"]
    bad += ["# velocity: fast", "# unit: furlong", "# air: maybe", "# resolution: -3", "\udcff"]
    place = rng.choice([0, 2, 3, rng.randrange(len(lines))])
    return [*lines[:place], rng.choice(bad), *lines[place + rng.choice([0, 1]) :]]


def _other_unit(rng, lines):
    "A comment that says something else of the wavelengths."
    lines[0] = rng.choice(["# unit: nm", "# unit: kK", "# unit: 7", "# unit: um", "# unit: km/s"])
    return lines


def _shuffled(rng, lines):
    "Lines in another order: the same spectrum."
    rows = lines[3:]
    rng.shuffle(rows)
    return lines[:3] + rows


def no_other(bench, rng):
    "A pipe, a device, a folder or a circle in place of a file of another kind."
    original = rng.choice(files_of(bench, rng.choice(list(MAKERS))))
    path = bench.place() / original.name
    what = rng.choice(["pipe", "device", "folder", "circle"])
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if what == "device" else path.name)
    command = rng.choice(["label", "check", "repeats", "judge"])
    words = {
        "label": [
            "label",
            path,
            "--model",
            bench.models["guarded"],
            "--out",
            path.parent / "o.csv",
        ],
        "check": ["check", path, "--model", bench.models["guarded"]],
        "repeats": ["repeats", path, "--model", bench.models["guarded"]],
        "judge": ["judge", bench.root, path],
    }
    return in_process(*words[command]) or Found("wrong", f"{command} of a {what}")


def checked(bench, rng):
    "A damaged file through `check` and `repeats`: an answer, or our words."
    what = rng.choice(list(MAKERS))
    original = rng.choice(files_of(bench, what))
    path = bench.place() / original.name
    change = rng.choice([cut, flip, overwrite, zeros, nothing, page])
    path.write_bytes(change(rng, original.read_bytes()))
    command = rng.choice(["check", "repeats"])
    found = in_process(command, path, "--model", bench.models["guarded"])
    return found or Found("harmless", "an answer, which nobody compares")


# --- outputs of the other commands


def other_output(bench, rng):
    "An output of check, repeats, judge or label --spectra over what is there."
    place = bench.place()
    visit = place / "apVisit-r8-1-0-1.fits"
    mine = place / "my0.csv"
    shutil.copy(files_of(bench, "visit")[0], visit)
    shutil.copy(files_of(bench, "csv")[0], mine)
    model = place / "m.asdf"
    shutil.copy(bench.models["cannon"], model)
    for name in ("thesis.fits", "thesis.ecsv", "thesis.png", "thesis.csv"):
        (place / name).write_bytes(b"my only copy")
    os.link(visit, place / "hard.fits")
    os.link(mine, place / "hard.png")
    (place / "link.fits").symlink_to("thesis.fits")
    (place / "link.png").symlink_to("thesis.png")
    (place / "predictions.csv").write_text("apogee_id,teff\n2M,4500\n")
    (place / "folds.csv").write_text("my,notes\n")
    tables = [visit, place / "thesis.fits", place / "thesis.ecsv", place / "hard.fits", model]
    tables += [place / "link.fits", place / ".." / place.name / visit.name, "/dev/full", mine]
    pictures = [place / "thesis.png", place / "hard.png", place / "link.png", mine, model]
    choices = [
        lambda: ["repeats", visit, "--model", model, "--out", rng.choice(tables)],
        lambda: ["check", mine, "--model", model, "--plot", rng.choice(pictures)],
        lambda: ["judge", bench.root, place / "predictions.csv", "--out", rng.choice(tables)],
        lambda: ["judge", bench.root, "--write", place],
        lambda: [
            *("label", bench.stars[0], "--model", model, "--out", place / "o.csv"),
            *("--spectra", rng.choice(tables)),
        ],
    ]
    before = regular_files(place)
    words = rng.choice(choices)()
    said = in_process(*words)
    after = regular_files(place)
    lost = [name for name, content in before.items() if after.get(name) != content]
    if lost:
        return Found("file", f"{' '.join(map(str, words))}: {', '.join(lost)} replaced")
    return said or Found("harmless")


# --- networks


def network_file(bench):
    "A small network of two labels, in a file, made once."
    from fault_network import Small

    path = bench.folder / "small.keras"
    if not path.exists():
        spectra, _ = training_set(bench.root, labels=LABELS, progress=False)
        Small(labels=LABELS, epochs=1).fit(spectra, progress=False).save(path)
    bench.models["network"] = path
    return path


def network_bytes(change):
    "A fault in the bytes of a network's file."

    def fault(bench, rng):
        data = network_file(bench).read_bytes()
        path = bench.place() / "model.keras"
        path.write_bytes(change(rng, data))
        return judge_model(bench, path, "network")

    return fault


def network_forged(bench, rng):
    "The same, in a file whose fingerprint fits."
    network_file(bench)
    from stellar_lab import network

    # a careful forger would write the right fingerprint
    with patch.object(network, "_fingerprint", lambda file, tree: tree.get("fingerprint")):
        return network_entry(bench, rng)


def network_entry(bench, rng):
    "An entry of what a network's file says of it missing, or another."
    source = network_file(bench)
    path = bench.place() / "model.keras"
    member = rng.choice(["stellar_lab.json", "stellar_lab.json", "config.json", "metadata.json"])
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == member:
                tree = json.loads(content)
                where = rng.choice(list(paths_in(tree)))
                inner = tree
                for step in where[:-1]:
                    inner = inner[step]
                if rng.random() < 0.3:
                    del inner[where[-1]]
                else:
                    inner[where[-1]] = rng.choice(VALUES)
                content = json.dumps(tree).encode()
            new.writestr(name, content)
    return judge_model(bench, path, "network")


OTHERS = (
    *(
        kind
        for what in ("mwm", "visit", "csv", "table", "npz")
        for kind in (
            Kind(PARTS[what], f"{what}, cut short", other_bytes(what, cut), 1, 30, UNSEEN[what]),
            Kind(PARTS[what], f"{what}, a bit", other_bytes(what, flip), 1, 40, UNSEEN[what]),
            Kind(
                PARTS[what],
                f"{what}, a block",
                other_bytes(what, any_of(overwrite, zeros, missing, repeated)),
                1,
                40,
                UNSEEN[what],
            ),
            Kind(
                PARTS[what],
                f"{what}, something else",
                other_bytes(what, any_of(nothing, noise, page, ends_of_lines, seventh_bit)),
                1,
                20,
                UNSEEN[what],
            ),
        )
    ),
    *(
        Kind(
            PARTS[what],
            f"{what}, with FITS checksums",
            other_bytes(what, any_of(*SEEN), True),
            1,
            30,
        )
        for what in ("mwm", "visit", "table")
    ),
    *(
        Kind(
            PARTS[what],
            f"{what}, packed, a bit",
            other_bytes(what, lambda rng, data: flip(rng, gzip.compress(data, 1)), name=name),
            1,
            20,
        )
        for what, name in {
            "mwm": "any.fits.gz",
            "visit": "any.fits.gz",
            "table": "any.fits",
        }.items()
    ),
    *(
        Kind(PARTS[what], f"{what}, {name}", other_hdus(what, change), 1, 40, VALID)
        for what, changes in {
            "mwm": {"numbers": _mwm_values, "facts": _facts, "columns": _columns, "HDUs": _hdus},
            "visit": {"numbers": _visit_values, "facts": _facts, "shapes": _shapes, "HDUs": _hdus},
            "table": {"numbers": _table_values, "facts": _facts, "columns": _columns},
        }.items()
        for name, change in changes.items()
    ),
    Kind("mwm", "another star's bytes", other_star("mwm"), 1, 10),
    Kind("table", "lines of text", text_lines(_one_line), 2, 60, VALID),
    Kind("table", "text of another unit", text_lines(_other_unit), 1, 10),
    Kind("table", "lines in another order", text_lines(_shuffled), 1, 10),
    Kind("table", "no file", no_other, 2, 40),
    Kind("table", "through check and repeats", checked, 2, 40),
    Kind("output", "of other commands", other_output, 5, 80),
    Kind("network", "a bit", network_bytes(flip), 0, 40),
    Kind("network", "bytes", network_bytes(any_of(cut, overwrite, zeros, missing, noise)), 0, 40),
    Kind("network", "entries", network_entry, 0, 60),
    Kind("network", "entries, forged", network_forged, 0, 120, FORGED),
)
