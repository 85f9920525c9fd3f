# %% [markdown]
# # How do ten thousand files get their labels?
# > From files to one table: found, treated as the training spectra were, labelled in batches, written whole or not at all.
#
# **Question.** We have a model and ten thousand files, some of them damaged, some of another kind. How does each get its labels, or one sentence that says why not?
#
# **Idea.** Each file goes the way of the training spectra, whose recipe the model keeps. Files are read in batches, so memory stays small. A file that cannot be labelled is named, and stops nothing.
#
# You learn how to label a folder, and what the columns of the table mean.

# %%
#| default_exp labelling

# %%
#| export
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from astropy.table import QTable, vstack
from tqdm import tqdm

from stellar_lab import __version__
from stellar_lab.clean import FILE_NAME, Problem, product_of, read_stars
from stellar_lab.inversion import infer
from stellar_lab.normalize import as_trained
from stellar_lab.survey import PRODUCTS, TABLE_FORMATS, LabError, require, write_table
from stellar_lab.training import check_target, count_flags, flag_text, load_model


# %%
#| hide

# %% [markdown]
# ## Label
# Spectra are named as files or folders. A folder is searched down to the last one for the survey's file names; a visit's file is not a star and stays
# out, and of a folder that holds both products only the model's is taken. A file of the other product is refused: its labels would look fine and be
# wrong.

# %%
#| export
def find_spectra(
    paths,  # files, folders, archive roots
    product: str = None,  # "apstar" or "aspcapstar"; of a folder that holds both only these are taken
) -> list:  # of (path, product); "" where neither name nor content says it
    "The stars' files that `paths` name, each once, in order; a folder's sorted. LabError where there is nothing."
    found = {}
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        if path.is_dir():
            inside = _search(path)
            if not inside:
                raise LabError(
                    f"{path} holds no apStar or aspcapStar file, neither does a folder in it (they are known by name)"
                )
            inside = [pair for pair in inside if pair[1] == product] or inside
        elif path.exists():
            inside = [(path, product_of(path) or "")]
        else:
            raise LabError(f"there is no file or folder {path}")
        for file, kind in inside:
            found.setdefault(os.path.abspath(file), (str(file), kind))
    return list(found.values())


def _search(folder):
    "(path, product) of each star's file below a folder; visits left out."
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = (
            [] if real in seen else sorted(folders)
        )  # a link may lead back to where it stands
        for name in [] if real in seen else sorted(files):
            match = FILE_NAME.fullmatch(name)
            if match and name[match.end("id") :].startswith(".fits"):
                found.append(
                    (Path(parent) / name, "aspcapstar" if match["kind"] == "aspcap" else "apstar")
                )
        seen.add(real)
    return found


def _raise(error):
    raise error


# %% [markdown]
# Labels come in batches, so that a hundred thousand files need no more memory than a few dozen. What fails is counted and said, file by file.
# The model is a Cannon's file (`.asdf`) or a network's (`.keras`, chapter 9); the table is the same, with no $\chi^2$ from a network.

# %%
#| export
LABEL_BATCH = 64  # files in memory at a time


@dataclass
class LabelSummary:
    "The table of labels, and what could not be labelled."

    table: "QTable"  # as `infer`, with the column `file`
    files: int  # how many were looked at
    problems: list = field(default_factory=list)  # of clean.Problem: files that gave no labels
    model: str = ""
    out: str = ""

    @property
    def labelled(self) -> int:
        "Stars with labels."
        return self.files - len(self.problems)

    @property
    def ok(self) -> bool:
        "Every file gave labels."
        return not self.problems

    def __str__(self):
        lost = {problem.path for problem in self.problems}
        flags = self.table["flags"][[file not in lost for file in self.table["file"]]]
        doubtful = sum(flags > 0)
        by, where = (
            f" by {self.model}" if self.model else "",
            f", in {self.out}" if self.out else "",
        )
        lines = [
            f"{self.labelled} of {self.files} stars labelled{by}{where}",
            f"with a flag: {doubtful}{flag_text(count_flags(flags))}",
        ]
        return "\n".join(
            lines + ([f"without labels: {len(self.problems)}"] if self.problems else [])
        )


def label(
    model,  # a fitted model, or the file of one: .asdf of a Cannon, .keras of a network
    paths,  # apStar or aspcapStar files, folders, archive roots
    out=None,  # .fits, .ecsv or .parquet for the table; nothing is written by default
    any_product: bool = False,  # take spectra of another product than the model's, although their labels are biased
    progress: bool = True,  # show a bar
) -> LabelSummary:  # its `.table` holds the labels
    "Labels of stars from their files, treated as the model's training spectra were. LabError if there are none."
    if (
        out is not None
        and check_target(out, tuple(TABLE_FORMATS), "a table").suffix.lower() == ".parquet"
    ):
        require("pyarrow", "parquet")
    name = str(model) if isinstance(model, (str, os.PathLike)) else ""
    model = load_model(model) if name else model
    files = find_spectra(paths, model.metadata_.get("product"))
    _check_products(model, files, any_product)
    table, problems = _label_files(model, files, progress)
    if table is None:
        raise LabError(
            f"none of {len(files)} files gave labels: {'; '.join(map(str, problems[:3]))}{'; …' if len(problems) > 3 else ''}"
        )
    if out is not None:
        write_labels(table, out)
    return LabelSummary(table, len(files), problems, name, "" if out is None else str(out))


def _check_products(model, files, any_product):
    product = model.metadata_.get("product")
    others = [(path, kind) for path, kind in files if kind and kind != product]
    if others and not any_product:
        path, kind = others[0]
        said = (
            f"the model learned from {product} files"
            if product
            else "the model does not say from which product it learned"
        )
        raise LabError(
            f"{said}, but {path} is an {kind} file ({len(others)} of {len(files)} are). Another normalization shifts the labels: "
            f"give it {product or 'its own'} files, or insist with --any-product (any_product=True)"
        )


# %%
#| export
def _label_files(model, files, progress):
    "One table of all files that give labels (None if none does), and the problems of the others."
    own = model.metadata_.get("product") or "apstar"
    kinds = {
        kind: [path for path, its in files if (its or own) == kind]
        for kind in sorted({kind or own for _, kind in files})
    }
    parts, problems = [], []
    with tqdm(
        total=len(files), desc="labelling", unit="star", disable=not progress, leave=False
    ) as bar:
        for kind, paths in kinds.items():
            for start in range(0, len(paths), LABEL_BATCH):
                batch = paths[start : start + LABEL_BATCH]
                part, bad = _label_batch(model, batch, kind)
                parts += [] if part is None else [part]
                problems += bad
                bar.update(len(batch))
    return (vstack(parts, metadata_conflicts="silent") if parts else None), problems


def _label_batch(model, paths, product):
    spectra, places, problems = read_stars(paths, PRODUCTS[product], row=1, progress=False)
    if not len(spectra):
        return None, problems
    table = infer(model, as_trained(model, spectra))
    table["file"] = [paths[place] for place in places]
    table.meta |= {"product": product, "made_by": f"stellar_lab {__version__}"}
    blind = [
        Problem(str(file), "no usable pixel, or too few for the model")
        for file in table["file"][np.isnan(table[model.label_names_[0].lower()])]
    ]
    return table, problems + blind


def write_labels(
    table,  # QTable of `label`
    path,  # .fits, .ecsv or .parquet
):
    "Write a table of labels, whole or not at all. Parquet has no matrices: there `covariance` is a row of K*K numbers."
    if Path(path).suffix.lower() == ".fits":  # its text is ASCII; a file's name need not be
        table = table.copy(copy_data=False)
        table["file"] = np.char.encode(np.asarray(table["file"], str), "utf-8", "surrogateescape")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*could not be saved in native FITS format"
        )  # dex; astropy keeps it another way
        write_table(table, path)

# %% [markdown]
# **Exercise.** Label the archive with a model of three labels and with one of six. For which stars do the two disagree by more than their errors?
