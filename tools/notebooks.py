"""What the tools know of the notebooks: their order, their title, the directives of their cells."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
ROOMY = 2_000_000  # bytes: a notebook above this is no longer read where it lies


def environment(**settings):
    "The caller's environment, but the programs are those of this Python's, with `settings` on top."
    return (
        os.environ
        | {"PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        | settings
    )


def thread_share(processes):
    "Settings that give each of some processes side by side its share of the cores."
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    return {"OMP_NUM_THREADS": threads, "TF_NUM_INTRAOP_THREADS": threads}


def natural(path):
    "Sort key: the tour 000 before 00, 2 before 10, numbers before letters, then the name."
    name = Path(path).stem
    number = name.split("_")[0]
    if number.isdigit():
        return (0, int(number), -len(number), name)
    return (1, 0, 0, name)


def notebooks(names=()):
    "The notebooks in the order of the lab, all of them or those named (`03_normalize`, or `03`)."
    found = sorted(NBS.glob("*.ipynb"), key=natural)
    chosen = [
        path
        for path in found
        if not names
        or any(path.stem == Path(name).stem or path.stem.split("_")[0] == name for name in names)
    ]
    if not chosen:
        there = ", ".join(path.stem for path in found)
        raise SystemExit(f"no such notebook: {' '.join(names)}. There are {there}")
    return chosen


def read(path):
    import nbformat  # takes a second, and not every tool reads notebooks

    return nbformat.read(path, as_version=4)


def directives(cell):
    "The `#| name value` lines of a code cell as a dict."
    lines = (
        re.findall(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", cell.source, re.MULTILINE)
        if cell.cell_type == "code"
        else []
    )
    return dict(lines)


def title(notebook):
    "Title and one-line subtitle: the first heading and the quotation below it."
    text = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    subtitle = re.search(r"^> (.+)$", text, re.MULTILINE)
    return (heading.group(1) if heading else ""), (subtitle.group(1) if subtitle else "")
