"""Do the notebooks carry their outputs, without errors, warnings or somebody's paths; are they
small enough to read where they lie, and are their formulas shown as such?"""

import ast
import re
import sys

from notebooks import ROOMY, directives, notebooks, read

PATHS = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|Users|work|private|opt|var|mnt|srv)/[\w.-]+")
DISPLAYS = (ast.Name, ast.Attribute, ast.Subscript, ast.BinOp, ast.Compare, ast.JoinedStr)


def shows(source):
    "Does this code surely show something: a bare value at its end, a `print`, a new figure?"
    code = "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))
    body = ast.parse(code).body
    calls = [
        ast.unparse(node.func)
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
        and not isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.With, ast.Try, ast.If))
    ]
    if {"print", "plt.subplots", "plt.figure"} & set(calls):
        return True
    last = body[-1] if body else None
    if not isinstance(last, ast.Expr) or code.rstrip().endswith(";"):
        return False
    named = isinstance(last.value, ast.Call) and ast.unparse(last.value.func) in (
        "Markdown",
        "Table",
        "QTable",
        "display",
        "HTML",
    )
    return isinstance(last.value, DISPLAYS) or named


def texts(output):
    "All text of an output."
    if output.output_type == "stream":
        return [output.text]
    return [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]


def broken_formulas(text):
    "What in a markdown cell's displayed formulas would not be shown as a formula, one line each."
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)
    pieces = text.split("$$")
    if len(pieces) % 2 == 0:
        yield "has an odd number of $$"
        return
    for formula in pieces[1::2]:
        item = re.search(r"^\s*[-+*] .*", formula, re.MULTILINE)
        if item:
            yield f"has a formula whose line would become a list: {item.group().strip()[:50]}"
        doubled = re.search(r"\\\\[A-Za-z]\w*", formula)
        if doubled:
            yield f"has a formula with a doubled backslash: {doubled.group()}"


def complaints(notebook, size):
    "What is wrong with a notebook's formulas and outputs, one line each."
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            for broken in broken_formulas(cell.source):
                yield f"cell {number} {broken}"
    code = [
        (number, cell) for number, cell in enumerate(notebook.cells) if cell.cell_type == "code"
    ]
    if size > ROOMY:
        limit = f"{size / 1e6:.1f} MB, more than {ROOMY / 1e6:g}"
        yield f"has {limit}: draw fewer points or smaller figures"
    if code and not any(cell.outputs for _, cell in code):
        yield "carries no outputs: run 'make outputs'"
        return
    for number, cell in code:
        lines = cell.source.strip().splitlines()
        where = f"cell {number} ({lines[-1][:50] if lines else 'empty'})"
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"{where} carries an error: {output.ename}: {output.evalue[:200]}"
            elif output.get("name") == "stderr":
                yield f"{where} carries a warning: {output.text.strip()[:200]}"
            path = next(filter(None, (PATHS.search(text) for text in texts(output))), None)
            if path:
                yield f"{where} shows a path of somebody's machine: {path.group()}"
        if not cell.outputs and directives(cell).get("eval") != "false" and shows(cell.source):
            yield f"{where} should show something but has no output: run 'make outputs'"


def main(names=()):
    wrong = 0
    for path in notebooks(names):
        for complaint in complaints(read(path), path.stat().st_size):
            print(f"{path.name}: {complaint}")
            wrong += 1
    print(f"{wrong} complaint(s) about notebooks" if wrong else "all notebooks carry their outputs")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
