# %% [markdown]
# # What can go wrong?
# > A campaign of some thousand faults: damaged files, hostile servers, full disks and killed commands, and what became of each.
#
# **Question.** A spectrum travels far before it is a label: over a network, onto a disk, through a program that may be stopped at any moment. Each step can damage it. Which damage does stellar_lab
# see, which does no harm, and which can nobody see?
#
# **Idea.** Do not wait for damage, cause it. Take a whole file, change one thing, run the program, and compare with what it said of the undamaged file. There are only a few ways for this to end. Repeat it
# some thousand times, at places drawn by chance, and count.
#
# You learn what a label from a file is worth, and why checksums are. This chapter has no library of its own; the campaign is a tool, `make faults`.

# %%
#| hide
import gzip
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from astropy.io import fits
from astropy.table import Table
from IPython.display import Markdown

from stellar_lab.archives import write_clusters
from stellar_lab.labelling import label
from stellar_lab.models import flag_names
from stellar_lab.survey import LabError, data_file, use_style
from stellar_lab.training import load_model, train

# %%
#| hide
use_style()

# %% [markdown]
# ## How it can end
# A fault can end in eight ways. The first three are fine.
#
# | outcome | what it means |
# |---|---|
# | reported | the file is refused, or a report or ledger has a line about it, in words that name the file |
# | harmless | the labels are those of the undamaged file, or the bytes are |
# | flagged | the labels are other ones, and a flag or a count in the table says so |
# | slight | the labels moved by less than half an error bar, and nothing says so |
# | traceback | the program fell over, or spoke of its own inside |
# | hang | no answer came, or a process stayed behind |
# | file | a wrong file has a final name, or a file of the user's was replaced |
# | wrong | the labels are other ones, and nothing says so |
#
# The last column is the worst. A program that falls over is a nuisance; a number that is silently wrong ends up in a paper.

# %% [markdown]
# ## A star to damage
# We need a star, a model that has labelled it, and the labels. A small archive of 95 real stars will do.

# %%
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
write_clusters(folder / "stars", stars=95, flaws={}, workers=2, progress=False)
options = {"labels": ["teff", "m_h"], "scatter": True, "test_size": 0.2}
train(folder / "stars", folder / "model.asdf", progress=False, **options)
model = load_model(folder / "model.asdf")

files = sorted((folder / "stars").rglob("apStar-*.fits"))
table = label(model, files[:30], progress=False).table
good = [files[row] for row in np.flatnonzero(table["flags"] == 0)]
star, other = good[:2]
undamaged = label(model, star, progress=False).table[0]
print(f"{star.name}: {undamaged['teff']:.0f}, [M/H] {undamaged['m_h'].value:.2f}")


# %% [markdown]
# A fault is a function: it takes the bytes of the file, and gives other bytes. Each of the following has happened to somebody. A download breaks off. A disk forgets a bit. A server that wants a password answers with a
# page. Somebody copies a file, and the name is that of another star.

# %%
def cut_short(data):
    "A download that broke off."
    return data[: len(data) // 2]


def web_page(data):
    "A server that wants a password."
    return b"<html><body>Please log in</body></html>"


def sent_as_text(data):
    "A transfer that changed the ends of lines."
    return data.replace(b"\n", b"\r\n")


def another_star(data):
    "A copy under the name of another star."
    return other.read_bytes()


def damaged_header(data):
    "A number of the header that cannot be."
    return data.replace(b"CRVAL1  =                4.179", b"CRVAL1  =                4.279")


def changed_pixels(data, change):
    "The file after `change(hdus)`."
    with fits.open(io.BytesIO(data)) as hdus, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(hdus)
        out = io.BytesIO()
        hdus.writeto(out)
    return out.getvalue()


# %% [markdown]
# Others need a look inside: a spectrum that moves, a flux that no star has, a spectrum without lines, the sky in place of the star.

# %%
def moving(data):
    "A spectrum that is not at rest, and a header that says so."

    def change(hdus):
        hdus[0].header["VRAD"] = 30.0
        hdus[1].data = np.roll(hdus[1].data, 7, axis=-1)

    return changed_pixels(data, change)


def impossible_flux(data):
    "A pixel that holds more light than a galaxy."

    def change(hdus):
        hdus[1].data[..., 4000] = 1e30

    return changed_pixels(data, change)


def no_lines(data):
    "A spectrum without a line."

    def change(hdus):
        hdus[1].data[...] = np.median(hdus[1].data)

    return changed_pixels(data, change)


def sky_for_star(data):
    "The HDUs of the star and of the sky, exchanged."

    def change(hdus):
        hdus[1], hdus[4] = hdus[4].copy(), hdus[1].copy()

    return changed_pixels(data, change)


def one_bit(data):
    "A bit of the flux that a disk forgot: a lower one."
    start = data.find(b"XTENSION") + 2880 * 2  # within the flux, beyond its header
    return data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :]


# %% [markdown]
# The judge labels the damaged file and compares. It knows nothing of the fault: only what came out counts.

# %%
def judge(damaged, directory=None):
    "What became of some bytes under the star's name, and what was said."
    path = Path(directory or tempfile.mkdtemp(dir=folder)) / star.name
    path.unlink(missing_ok=True)
    path.write_bytes(damaged)
    try:
        row = label(model, path, progress=False).table[0]
    except LabError as error:
        return "reported", str(error).split(": ", 2)[-1]
    names = ("teff", "m_h", "teff_err", "m_h_err")
    if all(row[name] == undamaged[name] for name in names):
        return "harmless", "the labels are the same"
    if row["flags"] or row["strange_pixels"]:
        doubts = flag_names(row["flags"])[0] or f"{row['strange_pixels']} strange pixels"
        return "flagged", doubts
    off = max(abs(row[name] - undamaged[name]) / undamaged[f"{name}_err"] for name in names[:2])
    return "slight" if off < 0.5 else "wrong", f"{float(off):.2g} error bars off"


FAULTS = (cut_short, web_page, sent_as_text, another_star, damaged_header)
FAULTS += (moving, impossible_flux, no_lines, sky_for_star, one_bit)
rows = [(fault.__name__.replace("_", " "), *judge(fault(star.read_bytes()))) for fault in FAULTS]
Markdown(
    "| fault | outcome | what was said |\n|---|---|---|\n"
    + "\n".join(f"| {' | '.join(row)} |" for row in rows)
)

# %%
#| hide
outcomes = {name: outcome for name, outcome, _ in rows}
assert not {"wrong", "traceback", "hang", "file"} & set(outcomes.values())
assert outcomes["impossible flux"] == "flagged" == outcomes["no lines"]
assert [outcomes[name] for name in ("cut short", "another star", "moving")] == ["reported"] * 3


# %% [markdown]
# **What to see.** Most faults are told by evidence that lies in the file: its length, its name, a header. The strange pixel lost its weight and was counted. The spectrum without lines was labelled, and the guard of
# [the chapter on refusal](18_refusal.ipynb) flagged it. Only the forgotten bit left no trace that anybody could find in this file; this time it did no harm.

# %% [markdown]
# ## What a checksum is worth
# One bit of a number makes another number, and it is as good as the first. To see the change, somebody must have noted what stood there before. Three can have done so: the packing (gzip), the file itself (the FITS cards
# CHECKSUM and DATASUM), and the archive: the ones that we write keep the sha256 of each file in `archive.json`, and a fetch notes it in `sha256sums.txt`.
#
# We flip thirty bits at random places, in the same file under each kind of care.

# %%
def with_sums(data):
    "The file with the checksums of the FITS standard."
    with fits.open(io.BytesIO(data)) as hdus:
        out = io.BytesIO()
        hdus.writeto(out, checksum=True)
    return out.getvalue()


def flipped(data, rng):
    "The same bytes but for one bit."
    place = rng.integers(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.integers(8)]) + data[place + 1 :]


plain = star.read_bytes()
care = {
    "no checksum": (plain, None),
    "packed by gzip": (gzip.compress(plain), None),
    "FITS checksums": (with_sums(plain), None),
    "in an archive": (plain, star.parent),
}
rng = np.random.default_rng(4)
seen = {
    name: Counter(judge(flipped(data, rng), place)[0] for _ in range(30))
    for name, (data, place) in care.items()
}
judge(plain, star.parent)  # the archive's own star is whole again
shown = ("reported", "flagged", "harmless", "slight", "wrong")
Markdown(
    f"| {' | '.join(['care', *shown])} |\n|{'---|' * 6}\n"
    + "\n".join(
        f"| {' | '.join([name, *(str(found[one]) for one in shown)])} |"
        for name, found in seen.items()
    )
)

# %%
#| hide
for name in ("packed by gzip", "FITS checksums", "in an archive"):
    assert not seen[name]["wrong"] and not seen[name]["slight"], name
assert seen["in an archive"]["reported"] == 30 > seen["no checksum"]["reported"]

# %% [markdown]
# **What to see.** With any kind of care, no bit changes a label unseen. Without it most bits do no harm, for they hit visits that are not read, or a digit that does not count. The rest is luck. So a table of labels says in its
# meta how many of its spectra had a checksum:

# %%
print(label(model, star, progress=False).table.meta["verified"])
loose = Path(shutil.copy(star, folder / star.name))
print(label(model, loose, progress=False).table.meta["verified"])

# %% [markdown]
# ## Killed in the middle
# A program can be killed between any two of its instructions (`kill -9`, a power cut), and it has no last words. So a file must never stand under its final name before it is whole. All writers of this book write under
# another name, and rename at the very end; a rename happens at once, or not at all. The next run removes what the dead one left.

# %%
program = """
import os, signal, sys
from stellar_lab.survey import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half of the tab")
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    temporary.write_text("the whole table")
"""
place = folder / "killed"
place.mkdir()
for what in ("die", "live"):
    done = subprocess.run([sys.executable, "-c", program, place / "labels.csv", what])
    names = ["(a hidden one)" if name.startswith(".") else name for name in os.listdir(place)]
    print(f"exit code {done.returncode}, files: {', '.join(names)}")

# %%
#| hide
assert done.returncode == 0 and os.listdir(place) == ["labels.csv"]
assert (place / "labels.csv").read_text() == "the whole table"
assert -signal.SIGKILL == -9

# %% [markdown]
# ## The whole campaign
# `make faults` does the same in earnest. It knows some 150 kinds of faults, each with its own judge: stars, spectra of visits, of SDSS-V and of one's own, catalogues, models, networks, records, servers, numbers, outputs, kills,
# and resources that run short. It tries each many times, at places that a seed decides, and takes some 25 minutes of one processor; with `--said FILE` it keeps what was said of each fault, and a campaign that was stopped
# goes on there. A quick part, a few faults of most kinds, runs with the tests (`python tools/faults.py --quick`). The table below is the record of what was tried.

# %%
with data_file("faults.ecsv") as path:
    record = Table.read(path, format="ascii.ecsv", fill_values=[])
outcome_names = record.colnames[record.colnames.index("tried") + 1 : -1]
seeds = sorted(set(record["seed"]))


def as_markdown(rows, names):
    "Rows of a table of counts; nothing stands where nothing was counted."
    lines = [f"| {' | '.join(names)} |", "|---" * 2 + "|--:" * (len(names) - 2) + "|"]
    lines += [f"| {' | '.join(str(cell or '') for cell in row)} |" for row in rows]
    return "\n".join(lines)


counted = ["tried", *outcome_names]
rows = []
for part, kind in dict.fromkeys(zip(record["part"], record["kind"])):
    same = (record["part"] == part) & (record["kind"] == kind)
    rows.append((part, kind, *(int(record[name][same].sum()) for name in counted)))
total = ("all", "", *(int(record[name].sum()) for name in counted))
Markdown(
    f"All faults that were tried (random seed {', '.join(map(str, seeds))}):\n\n"
    + as_markdown([*rows, total], ["part", "kind", *counted])
)

# %%
parts = list(dict.fromkeys(record["part"]))
share = np.array(
    [
        [record[name][record["part"] == part].sum() for name in outcome_names]
        / record["tried"][record["part"] == part].sum()
        for part in parts
    ]
)
fig, ax = plt.subplots(figsize=(8, 0.5 + 0.32 * len(parts)))
left = np.zeros(len(parts))
for number, name in enumerate(outcome_names):
    if share[:, number].any():
        ax.barh(parts, share[:, number], left=left, label=name, color=f"C{number}")
        left += share[:, number]
ax.set(xlabel="share of the faults", xlim=(0, 1), title="What became of the faults of each part")
ax.invert_yaxis()
ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False);

# %%
#| echo: false
bad = {name: int(record[name].sum()) for name in ("traceback", "hang", "file")}
unexplained = sum(int(row["wrong"] + row["slight"]) for row in record if not row["unseen"])
Markdown(
    f"**What to see.** Of {record['tried'].sum()} faults {bad['traceback']} made a traceback, "
    f"{bad['hang']} a hang and {bad['file']} a wrong file. Silently wrong without a reason why "
    f"nobody can see it: {unexplained}."
)

# %%
#| hide
assert not any(bad.values()) and not unexplained

# %% [markdown]
# ## What nobody can see
# These are the kinds with faults that no program can tell, with the reason. In each of them a valid number took the place of another.

# %%
reasons = {}
for row in record:
    if row["wrong"] or row["slight"]:
        reasons.setdefault((row["part"], row["kind"], row["unseen"]), np.zeros(2, int))
        reasons[row["part"], row["kind"], row["unseen"]] += [row["slight"], row["wrong"]]
Markdown(
    "| kind | slight | wrong | why nobody can see it |\n|---|--:|--:|---|\n"
    + "\n".join(
        f"| {part}: {kind} | {slight} | {wrong} | {why} |"
        for (part, kind, why), (slight, wrong) in reasons.items()
    )
)

# %% [markdown]
# What follows for your own work:
#
# - **Keep checksums.** Fetch with `stellar-lab fetch`, which notes them, or keep files packed. A copy of one file out of an archive has nobody who vouches for it.
# - **Labels shuffled among stars** cannot be told by the labels. The left-out errors of [a training](F_training.ipynb) can: they grow to the spread of the labels.
# - **A model from a stranger** is a table of numbers. It cannot run code here, but nobody checks that the numbers were learned from stars. Train your own.
# - **Light of another kind** is the business of [the guard](18_refusal.ipynb). It needs sixty training stars to know what is usual.

# %%
#| hide
scratch.cleanup()

# %% [markdown]
# ## Exercise
# Swap the flux of two stars of an archive, and keep both headers. Which evidence tells? Now do the same with two files without an archive around them. Then find the pair of stars for which the difference in the labels is the
# smallest: how would *you* notice?
