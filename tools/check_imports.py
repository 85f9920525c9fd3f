"""Does data flow downwards only? Each notebook is one room of the house; a room may import from the
rooms before it in the order of reading, from none after it, and no room's private names."""

import ast
import re
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from notebooks import ROOT, directives, notebooks, read

PACKAGE = "stellar_lab"
FRONT_DOOR = ("__init__", "__main__", "_modidx")  # above all rooms: they may name any of them


class Import(NamedTuple):
    "A name taken from a room; `name` is empty where the room is imported as a whole."

    line: int
    room: str
    name: str = ""


def room_of(notebook):
    "The module that a notebook makes, or nothing."
    named = (directives(cell).get("default_exp") for cell in notebook.cells)
    return next(filter(None, named), "")


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


@cache
def nodes_of(source):
    "Imports and attributes in Python text, which is asked for them several times."
    kinds = (ast.Import, ast.ImportFrom, ast.Attribute)
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def imports(source, known):
    """What Python text takes from the rooms in `known`: all imports, also those inside functions,
    and private attributes of a room that was imported as a whole."""
    found = []
    called = {}  # a name in the text -> the room that it stands for
    nodes = nodes_of(source)
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            path = f"{PACKAGE}.{node.module or ''}" if node.level else node.module
            _, _, room = path.rstrip(".").partition(".")
            if path.split(".")[0] != PACKAGE:
                continue
            for alias in node.names:
                if room:
                    found.append(Import(node.lineno, room, alias.name))
                elif alias.name in known:
                    called[alias.asname or alias.name] = alias.name
                    found.append(Import(node.lineno, alias.name))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(PACKAGE + "."):
                    room = alias.name.split(".")[1]
                    called[alias.asname or alias.name] = room
                    found.append(Import(node.lineno, room))
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            room = called.get(ast.unparse(node.value))
            if room:
                found.append(Import(node.lineno, room, node.attr))
    return sorted(set(found))


def upward(sources, order):
    "Imports that run up: from a room that comes later in the order of reading."
    place = {room: number for number, room in enumerate(order)}
    for room, text in sources.items():
        if room not in place:
            yield f"{room}: no notebook makes this module"
            continue
        for taken in imports(text, order):
            if taken.room not in place:
                yield f"{room}:{taken.line}: imports from {taken.room}, which is no room"
            elif place[taken.room] > place[room]:
                what = f"{taken.name} from {taken.room}" if taken.name else taken.room
                yield f"{room}:{taken.line}: imports {what}, which comes after it"


def circles(sources, order):
    "Rooms that need each other; the first circle found."
    below = {
        room: {taken.room for taken in imports(text, order)} - {room}
        for room, text in sources.items()
    }
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        yield f"a circle: {' <- '.join(error.args[1])}"


def trespasses(sources, order):
    "Private names of a room in other files, from a dict of file's name (a room's or any) -> text."
    for file, text in sources.items():
        for taken in imports(text, order):
            if is_private(taken.name) and taken.room != file:
                yield f"{file}:{taken.line}: takes {taken.name}, a private name of {taken.room}"


def sources(paths):
    "File's name -> its text."
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def complaints():
    "All that is wrong with the imports of the project."
    chapters = {path.name: read(path) for path in notebooks()}
    order = list(filter(None, map(room_of, chapters.values())))
    package = sources(sorted((ROOT / PACKAGE).glob("*.py")))
    modules = {name: text for name, text in package.items() if name not in FRONT_DOOR}
    yield from upward(modules, order)
    yield from circles(modules, order)
    yield from trespasses(package, order)
    yield from trespasses(sources(sorted((ROOT / "tools").glob("*.py"))), order)
    for name, notebook in chapters.items():
        for complaint in trespasses({room_of(notebook): shown_code(notebook)}, order):
            yield f"{name}, not exported: {complaint}"


def shown_code(notebook):
    "The code of a notebook that does not go into the package, without its magic commands."
    cells = [
        re.sub(r"^\s*[%!].*", "", cell.source, flags=re.MULTILINE)
        for cell in notebook.cells
        if cell.cell_type == "code" and not {"export", "exports"} & directives(cell).keys()
    ]
    return "\n".join(cells)


def main():
    wrong = list(complaints())
    for complaint in wrong:
        print(complaint)
    print(f"{len(wrong)} wrong import(s)" if wrong else "imports run downwards only")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
