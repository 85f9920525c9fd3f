"""The main job: an archive of stars, the notebooks, a table of errors.

lab.py run [--archive clusters|mock|URL|folder] [--profile quick|full]   everything, into _build/
lab.py archive [NAME]             write an embedded archive, unless it is there
lab.py outputs [NOTEBOOK ...]     refresh the outputs that the notebooks carry
"""

import argparse
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event, Lock, Thread

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tqdm import tqdm

import pages
from durations import longest_first, remember
from kernels import manager_class
from notebooks import NBS, ROOMY, ROOT, environment, notebooks, read, thread_share, title

ARCHIVES = ROOT / "data" / "archives"
BUILD = ROOT / "_build"
COMMAND = Path(sys.prefix) / "bin" / "stellar-lab"
# seconds; generous, for a busy or slow machine must pass too
CELL_TIMEOUT = {"quick": 900, "full": 7200}
WORKERS = 2  # notebooks that run at a time
SHARP = ("--InlineBackend.figure_formats={'retina'}",)  # two pixels for one
# Inline figures are drawn when they are shown; pyplot's own hook draws each of them once before.
DRAWN_ONCE = "from matplotlib import pyplot as _plt; _plt.get_backend(); "
DRAWN_ONCE += "_plt.uninstall_repl_displayhook(); del _plt"
SETTINGS = {
    # The kernel of this environment, whatever the user has elsewhere.
    "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter"),
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
        ("survey", "archives", "isochrones", "emulator", "mock"),
        ("isochrones.fits", "synthetic_emulator.fits", "synthetic_dwarfs.fits"),
    ),
}


def recipe(name):
    "A digest of what an archive is made from: its name, the code that writes it and the data."
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
    """Write an embedded archive into data/archives and return its root; does nothing where the
    one that is there was made by the same code from the same data."""
    root, stamp = ARCHIVES / name, ARCHIVES / f"{name}.made"
    wanted = recipe(name)
    if root.is_dir() and stamp.is_file() and stamp.read_text() == wanted:
        say(f"== archive: {root.relative_to(ROOT)} is there")
        return root
    say(f"== archive: writing {root.relative_to(ROOT)}")
    # A copy of the old one is no longer a copy of this one.
    old_ones = (root, ARCHIVES / "fetched" / name)
    for old in old_ones:
        if old.is_symlink():
            raise SystemExit(
                f"{old} is a symbolic link to {os.readlink(old)}: remove the link, or write the "
                "archive there"
            )
    stamp.unlink(missing_ok=True)
    for old in old_ones:
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            raise SystemExit(f"could not remove {old}, which an archive is to replace")
    ARCHIVES.mkdir(parents=True, exist_ok=True)
    if subprocess.run([COMMAND, "archive", name, str(root)]).returncode:
        raise SystemExit(f"could not write the archive {name}: see above")
    stamp.write_text(wanted)
    return root


def fetch_archive(archive):
    "Fetch an archive by its name, URL or folder into data/archives/fetched; returns its root."
    from stellar_lab import survey
    from stellar_lab.fetch import fetch, serve

    def bring(root, source):
        say(f"== fetch: {source} into {root.relative_to(ROOT)}")
        say(str(fetch(root, source, products=tuple(survey.PRODUCTS), progress=sys.stderr.isatty())))

    # An embedded one is served on this machine, to go the way that all others go.
    if archive in survey.ARCHIVES and archive != "survey":
        written = write_archive(archive)
        root = ARCHIVES / "fetched" / archive
        stamp = ARCHIVES / "fetched" / f"{archive}.made"
        if root.is_dir() and stamp.is_file() and stamp.read_text() == recipe(archive):
            say(f"== fetch: {root.relative_to(ROOT)} is there")
            return root
        with serve(written) as url:
            bring(root, url)
        stamp.write_text(recipe(archive))
        return root
    source = archive
    if not re.match(r"https?://", archive):
        source = str(Path(archive).expanduser().resolve())
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", re.sub(r"^https?://", "", source)).strip("_.")
    root = ARCHIVES / "fetched" / name
    bring(root, source)
    return root


# ---- notebooks


class Failed(Exception):
    "A notebook failed: which cell, and why."


class Running:
    "The kernels at work: their progress, their memory, and how to end them all."

    def __init__(self, progress=None):
        self.progress = progress
        self.lock = Lock()
        self.clients = {}  # name -> client, in the order of their start
        self.peaks = {}  # name -> most memory of its kernel and that one's workers [bytes]
        self.peak = 0  # most memory of all at once, this process included [bytes]
        self.stopped = Event()

    def begin(self, name, client):
        with self.lock:
            self.clients[name] = client
            self.peaks[name] = 0
            self.describe()

    def end(self, name):
        with self.lock:
            del self.clients[name]
            self.describe()

    def describe(self):
        if self.progress is not None:
            names = [Path(name).stem for name in self.clients]
            self.progress.set_description(", ".join(names))

    def step(self):
        with self.lock:
            if self.progress is not None:
                self.progress.update()

    def measure(self):
        "Look at the memory once."
        with self.lock:
            kernels = {name: kernel_pid(client) for name, client in self.clients.items()}
        used = {name: tree_memory(pid) for name, pid in kernels.items() if pid}
        for name, memory in used.items():
            self.peaks[name] = max(self.peaks[name], memory)
        self.peak = max(self.peak, psutil.Process().memory_info().rss + sum(used.values()))

    def watch(self, every=0.5):
        while not self.stopped.wait(every):
            self.measure()

    def kill(self):
        "End all kernels at once, and their workers: each kernel leads a session of its own."
        self.stopped.set()
        with self.lock:
            kernels = [kernel_pid(client) for client in self.clients.values()]
        for pid in filter(None, kernels):
            try:
                os.killpg(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # it has just ended


def kernel_pid(client):
    "The process of a client's kernel, or nothing where it has not begun or has ended."
    provisioner = getattr(client.km, "provisioner", None)
    return getattr(provisioner, "pid", None)


def tree_memory(pid):
    "Resident memory of a process and all that it started [bytes]."
    total = 0
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            pass  # it has just ended
    return total


def run_notebook(notebook, name, timeout, running=None, sharp=False):
    "Execute a notebook in place, in a kernel of its own; `sharp` draws figures twice as fine."
    running = running or Running()
    last = {}

    def begun(cell, cell_index):
        if running.stopped.is_set():
            raise KeyboardInterrupt
        last.update(cell=cell, index=cell_index)

    def done(cell, cell_index, **_):
        running.step()

    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        kernel_manager_class=manager_class(),
        resources={"metadata": {"path": str(NBS)}},
        on_cell_start=begun,
        on_cell_executed=done,
        record_timing=False,
        extra_arguments=[
            "--log-level=ERROR",
            f"--IPKernelApp.exec_lines={DRAWN_ONCE}",
            *(SHARP if sharp else ()),
        ],
    )
    running.begin(name, client)
    try:
        client.execute()
    except CellExecutionError as error:
        problem = f"{error.ename}: {error.evalue}"
        raise Failed(failure(name, last, problem, trace(last["cell"]))) from error
    except CellTimeoutError as error:
        problem = f"took longer than {timeout} s, the limit of a cell"
        raise Failed(failure(name, last, problem)) from error
    except DeadKernelError as error:
        raise Failed(failure(name, last, "its kernel died (out of memory?)")) from error
    finally:
        running.end(name)


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
    "Peak memory of the largest process so far [MiB]: this one, the kernels, the commands."
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    used = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in used) * unit / 2**20


def timed(path, notebook, *arguments):
    "Run a notebook: (seconds, problem or '')."
    begin = time.monotonic()
    problem = ""
    try:
        run_notebook(notebook, path.name, *arguments)
    except Failed as error:
        problem = str(error)
    return time.monotonic() - begin, problem


def run_all(chapters, timeout, sharp=False, ready=None):
    """Execute notebooks, a dict of path -> notebook, two at a time and the longest first; call
    `ready(path, notebook)` with each as it is done.

    Returns (path, executed notebook, problem or '') of each in the order given, and the most memory
    that all processes took at once [MiB]. Ctrl-C ends both kernels.
    """
    paths = list(chapters)
    cells = sum(
        cell.cell_type == "code" and bool(cell.source.strip())
        for notebook in chapters.values()
        for cell in notebook.cells
    )
    workers = min(WORKERS, len(paths))
    if workers > 1:
        for name, threads in thread_share(workers).items():
            os.environ.setdefault(name, threads)  # unless the user has decided
    problems = {}
    times = {}
    with tqdm(total=cells, unit="cell", disable=None, leave=False) as progress:
        running = Running(progress)
        Thread(target=running.watch, daemon=True).start()
        with ThreadPoolExecutor(workers) as pool:
            jobs = {
                pool.submit(timed, path, chapters[path], timeout, running, sharp): path
                for path in longest_first("run", paths)
            }
            try:
                for job in as_completed(jobs):
                    path = jobs[job]
                    times[path], problems[path] = job.result()
                    memory = running.peaks[path.name] / 2**20
                    report(path, chapters[path], times[path], memory, problems[path])
                    if ready is not None:
                        ready(path, chapters[path])
            except BaseException:  # Ctrl-C
                pool.shutdown(wait=False, cancel_futures=True)
                running.kill()
                raise
            finally:
                running.stopped.set()
    remember("run", times)
    done = [(path, chapters[path], problems[path]) for path in paths]
    return done, max(running.peak / 2**20, peak_memory())


def report(path, notebook, seconds, memory, problem):
    "One line on a notebook that ran, and all about its failure."
    verdict = "FAILED" if problem else "ok    "
    say(f"{verdict} {path.stem:15} {seconds:5.0f} s {memory:6.0f} MiB  {title(notebook)[0]}")
    if problem:
        say(problem)


def run_lab(archive, profile):
    "Archive, notebooks, pages, errors; returns an exit code."
    begin = time.monotonic()
    root = fetch_archive(archive)
    os.environ.update(STELLAR_LAB_ARCHIVE=str(root), STELLAR_LAB_PROFILE=profile)
    shutil.rmtree(BUILD, ignore_errors=True)
    (BUILD / "notebooks").mkdir(parents=True)
    chapters = {path: read(path) for path in notebooks()}
    say(f"== notebooks: {len(chapters)} into {BUILD.relative_to(ROOT)}/")
    book = pages.Book(BUILD, {path.stem: notebook for path, notebook in chapters.items()})

    def ready(path, notebook):
        nbformat.write(notebook, BUILD / "notebooks" / path.name)
        book.write_chapter(path.stem, notebook)

    executed, memory = run_all(chapters, CELL_TIMEOUT[profile], sharp=True, ready=ready)
    errors, code = error_table(root)
    facts = [f"archive {archive}, profile {profile}"]
    failed = {path.stem: problem.splitlines()[0] for path, _, problem in executed if problem}
    book.write_index(facts, errors, failed)
    say(f"\nlook at  {BUILD / 'index.html'}")
    say(f"notebooks with their outputs in  {BUILD / 'notebooks'}")
    say(f"{time.monotonic() - begin:.0f} s, at most {memory:.0f} MiB at once")
    if failed:
        say(f"failed: {', '.join(failed)} (see above, and the executed notebook)")
    return 1 if failed else code


def error_table(root):
    """Train on the archive and judge on stars left out by the command line, as a user would: what
    it printed, and its exit code."""
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
    """Text without what differs from run to run: the places of the project and of temporary files,
    ids made of memory addresses."""
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
    "Execute notebooks on the embedded archive and keep their outputs; returns an exit code."
    os.environ.update(
        STELLAR_LAB_ARCHIVE=str(write_archive("clusters")), STELLAR_LAB_PROFILE="quick"
    )
    os.environ.pop("STELLAR_LAB_REAL_DATA", None)  # what everyone sees can be made by everyone
    failed = 0
    chapters = {path: read(path) for path in notebooks(names)}
    executed, _ = run_all(chapters, CELL_TIMEOUT["quick"])
    for path, notebook, problem in executed:
        failed += bool(problem)
        if not problem:
            nbformat.write(tidy(notebook), path)
            if path.stat().st_size > ROOMY:
                size = f"{path.stat().st_size / 1e6:.1f} MB, more than {ROOMY / 1e6:g}"
                say(f"{path.name} has {size}: draw fewer points or smaller figures")
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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run(options):
    if options.command == "run":
        return run_lab(options.archive, options.profile)
    if options.command == "outputs":
        return refresh_outputs(options.names)
    write_archive(options.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
