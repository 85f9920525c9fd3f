"""The lab's main job: an archive of stars, the notebooks in order, a table of errors.

lab.py run [--archive clusters|mock|URL|folder] [--profile quick|full]   everything, into _build/
lab.py archive [NAME]                                               write an embedded archive, unless it is there
lab.py outputs [NOTEBOOK ...]                                       refresh the outputs that the notebooks carry
"""

import argparse
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tqdm import tqdm

import pages
from notebooks import NBS, ROOMY, ROOT, environment, notebooks, read, title

ARCHIVES = ROOT / "data" / "archives"
BUILD = ROOT / "_build"
COMMAND = Path(sys.prefix) / "bin" / "stellar-lab"
CELL_TIMEOUT = {"quick": 300, "full": 7200}  # seconds
SETTINGS = {
    "JUPYTER_PATH": str(
        Path(sys.prefix) / "share" / "jupyter"
    ),  # the kernel of this environment, whatever the user has elsewhere
    "PYTHONHASHSEED": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


def say(text=""):
    tqdm.write(text)
    sys.stdout.flush()


# ---- archives

MADE_FROM = {  # embedded archive -> modules and files of data/ that decide its bytes
    "clusters": (("survey", "archives"), ("clusters*",)),
    "mock": (
        ("survey", "archives", "kiel", "emulator", "mock"),
        ("isochrones.fits", "synthetic_emulator.fits", "synthetic_dwarfs.fits"),
    ),
}


def recipe(name):
    "A digest of what an embedded archive is made from: its name, the code that writes it and the data."
    modules, patterns = MADE_FROM[name]
    sources = [
        *sorted(file for pattern in patterns for file in (ROOT / "data").glob(pattern)),
        *(ROOT / "stellar_lab" / f"{module}.py" for module in modules),
    ]
    digest = hashlib.sha256(name.encode())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


def write_archive(name):
    "Write an embedded archive into data/archives unless the one there was made by the same code from the same data; returns its root."
    root, stamp = ARCHIVES / name, ARCHIVES / f"{name}.made"
    wanted = recipe(name)
    if root.is_dir() and stamp.is_file() and stamp.read_text() == wanted:
        say(f"== archive: {root.relative_to(ROOT)} is there")
        return root
    say(f"== archive: writing {root.relative_to(ROOT)}")
    stamp.unlink(missing_ok=True)
    for old in (
        root,
        ARCHIVES / "fetched" / name,
    ):  # a copy of the old one is no longer a copy of this one
        shutil.rmtree(old, ignore_errors=True)
    ARCHIVES.mkdir(parents=True, exist_ok=True)
    if subprocess.run([COMMAND, "archive", name, str(root)]).returncode:
        raise SystemExit(f"could not write the archive {name}: see above")
    stamp.write_text(wanted)
    return root


def fetch_archive(archive):
    "Fetch an archive by its name, its URL or its folder into data/archives/fetched; returns the root of the copy."
    from stellar_lab import survey
    from stellar_lab.fetch import fetch, serve

    def bring(root, source):
        say(f"== fetch: {source} into {root.relative_to(ROOT)}")
        say(str(fetch(root, source, products=tuple(survey.PRODUCTS), progress=sys.stderr.isatty())))

    if (
        archive in survey.ARCHIVES and archive != "survey"
    ):  # an embedded one: served on this machine, to go the way that all others go
        written, root, stamp = (
            write_archive(archive),
            ARCHIVES / "fetched" / archive,
            ARCHIVES / "fetched" / f"{archive}.made",
        )
        if root.is_dir() and stamp.is_file() and stamp.read_text() == recipe(archive):
            say(f"== fetch: {root.relative_to(ROOT)} is there")
            return root
        with serve(written) as url:
            bring(root, url)
        stamp.write_text(recipe(archive))
        return root
    source = (
        archive if re.match(r"https?://", archive) else str(Path(archive).expanduser().resolve())
    )
    root = (
        ARCHIVES
        / "fetched"
        / re.sub(r"[^A-Za-z0-9.-]+", "_", re.sub(r"^https?://", "", source)).strip("_.")
    )
    bring(root, source)
    return root


# ---- notebooks


class Failed(Exception):
    "A notebook failed: which cell, and why."


def run_notebook(notebook, name, timeout, progress=None):
    "Execute a notebook in place, in a kernel of its own."
    last = {}

    def begun(cell, cell_index):
        last.update(cell=cell, index=cell_index)

    def done(cell, cell_index, **_):
        if progress is not None:
            progress.update()

    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(NBS)}},
        on_cell_start=begun,
        on_cell_executed=done,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise Failed(
            failure(name, last, f"{error.ename}: {error.evalue}", trace(last["cell"]))
        ) from error
    except CellTimeoutError as error:
        raise Failed(
            failure(name, last, f"took longer than {timeout} s, the limit of a cell")
        ) from error
    except DeadKernelError as error:
        raise Failed(failure(name, last, "its kernel died (out of memory?)")) from error


def trace(cell):
    "The traceback that a cell carries, without colours."
    lines = next((output.traceback for output in cell.outputs if output.output_type == "error"), [])
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines))


def failure(name, last, problem, detail=""):
    source = (
        "\n".join(f"    {line}" for line in last["cell"].source.splitlines()[:12]) if last else ""
    )
    where = f"cell {last['index']}" if last else "start"
    return f"{name}, {where}: {problem}\n{source}\n{detail[-3000:]}".rstrip()


def peak_memory():
    "Peak memory of the largest process so far [MiB]: this one, the kernels, their workers, the commands."
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    return (
        max(
            resource.getrusage(who).ru_maxrss
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        * unit
        / 2**20
    )


def run_all(paths, timeout):
    "Execute the notebooks one after the other; yields (path, executed notebook, problem or '')."
    read_in = [(path, read(path)) for path in paths]
    cells = sum(
        cell.cell_type == "code" and bool(cell.source.strip())
        for _, notebook in read_in
        for cell in notebook.cells
    )
    with tqdm(total=cells, unit="cell", disable=None, leave=False) as progress:
        for path, notebook in read_in:
            begin, problem = time.monotonic(), ""
            progress.set_description(path.stem)
            try:
                run_notebook(notebook, path.name, timeout, progress)
            except Failed as error:
                problem = str(error)
            verdict, cost = (
                "FAILED" if problem else "ok    ",
                f"{time.monotonic() - begin:5.0f} s, peak so far {peak_memory():.0f} MiB",
            )
            say(f"{verdict} {path.stem:15} {cost}  {title(notebook)[0]}")
            if problem:
                say(problem)
            yield path, notebook, problem


def run_lab(archive, profile):
    "Archive, notebooks, pages, errors; returns an exit code."
    begin = time.monotonic()
    root = fetch_archive(archive)
    os.environ.update(STELLAR_LAB_ARCHIVE=str(root), STELLAR_LAB_PROFILE=profile)
    shutil.rmtree(BUILD, ignore_errors=True)
    (BUILD / "notebooks").mkdir(parents=True)
    paths = notebooks()
    say(f"== notebooks: {len(paths)} into {BUILD.relative_to(ROOT)}/")
    chapters = []
    for number, (path, notebook, problem) in enumerate(run_all(paths, CELL_TIMEOUT[profile])):
        nbformat.write(notebook, BUILD / "notebooks" / path.name)
        neighbours = [
            paths[k].stem if 0 <= k < len(paths) else None for k in (number - 1, number + 1)
        ]
        (BUILD / f"{path.stem}.html").write_text(
            pages.chapter(notebook, *neighbours), encoding="utf-8"
        )
        chapters.append((path.stem, *title(notebook), problem.splitlines()[0] if problem else ""))
    errors, code = error_table(root)
    facts = [f"archive {archive}, profile {profile}"]
    (BUILD / "index.html").write_text(pages.index(chapters, facts, errors), encoding="utf-8")
    failed = [name for name, *_, problem in chapters if problem]
    say(
        f"\nlook at  {BUILD / 'index.html'}\nnotebooks with their outputs in  {BUILD / 'notebooks'}"
    )
    say(f"{time.monotonic() - begin:.0f} s, largest process {peak_memory():.0f} MiB")
    if failed:
        say(f"failed: {', '.join(failed)} (see above, and the executed notebook)")
    return 1 if failed else code


def error_table(root):
    "Train on the archive and judge on stars left out by the command line, as a user would: what it printed, and its exit code."
    arguments = [
        "train",
        str(root.relative_to(ROOT)),
        "--model",
        str((BUILD / "model.asdf").relative_to(ROOT)),
        "--folds",
        "5",
        "--scatter",
    ]
    say(f"== errors: stellar-lab {' '.join(arguments)}")
    done = subprocess.run([COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    say(done.stdout.rstrip())
    return done.stdout, done.returncode


# ---- outputs that the notebooks carry


def plain(text):
    "Text without what differs from run to run: the places of the project and of temporary files, ids made of memory addresses."
    text = text.replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    text = re.sub(r'(<table) id="table\d+"', r"\1", text)
    return re.sub(re.escape(tempfile.gettempdir()) + r"/[\w.-]+", "…", text)


def tidy(notebook):
    "Keep of the outputs what a reader needs."
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if not pages.is_progress(output)]
        for output in cell.outputs:
            if "metadata" in output:
                output.metadata = {}
            if output.output_type == "stream":
                output.text = plain(output.text)
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output.data[kind] = plain(value)
    return notebook


def refresh_outputs(names):
    "Execute notebooks on the embedded archive and keep their outputs in nbs/; returns an exit code."
    os.environ.update(
        STELLAR_LAB_ARCHIVE=str(write_archive("clusters")), STELLAR_LAB_PROFILE="quick"
    )
    os.environ.pop("STELLAR_LAB_REAL_DATA", None)  # what everyone sees can be made by everyone
    failed = 0
    for path, notebook, problem in run_all(notebooks(names), CELL_TIMEOUT["quick"]):
        failed += bool(problem)
        if not problem:
            nbformat.write(tidy(notebook), path)
            if path.stat().st_size > ROOMY:
                say(
                    f"{path.name} has {path.stat().st_size / 1e6:.1f} MB, more than {ROOMY / 1e6:g}: draw fewer points or smaller figures"
                )
                failed += 1
    subprocess.run(["nbdev_clean"], cwd=ROOT, check=True)
    return int(bool(failed))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    lab = commands.add_parser("run")
    lab.add_argument("--archive", default="clusters")
    lab.add_argument("--profile", default="quick", choices=CELL_TIMEOUT)
    commands.add_parser("archive").add_argument("name", nargs="?", default="clusters")
    commands.add_parser("outputs").add_argument("names", nargs="*")
    options = parser.parse_args()
    os.environ.update(environment(**SETTINGS))
    os.environ.pop("MPLBACKEND", None)  # the notebooks' own, inline
    from stellar_lab.survey import LabError

    try:
        return run(options)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(options):
    if options.command == "run":
        return run_lab(options.archive, options.profile)
    if options.command == "outputs":
        return refresh_outputs(options.names)
    write_archive(options.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
