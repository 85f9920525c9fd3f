"""The tools behind make: order, checks, pages, and what a failing notebook says."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat.v4 as nb
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check_generated
import check_notebooks
import lab
import pages
from notebooks import directives, environment, natural, notebooks, read, title


def notebook(*cells):
    "A notebook of code cells (source, outputs) and markdown cells (source)."
    made = [
        nb.new_markdown_cell(cell)
        if isinstance(cell, str)
        else nb.new_code_cell(cell[0], outputs=cell[1])
        for cell in cells
    ]
    return nb.new_notebook(cells=made)


def printed(text, name="stdout"):
    return nb.new_output("stream", name=name, text=text)


def test_numbers_count_and_letters_come_last():
    names = [
        "C_cli.ipynb",
        "10_augmentation.ipynb",
        "2_clean.ipynb",
        "B_archives.ipynb",
        "00_survey.ipynb",
    ]
    assert sorted(names, key=natural) == [
        "00_survey.ipynb",
        "2_clean.ipynb",
        "10_augmentation.ipynb",
        "B_archives.ipynb",
        "C_cli.ipynb",
    ]
    assert notebooks(["00"])[0].name == notebooks(["00_survey"])[0].name == "00_survey.ipynb"
    with pytest.raises(SystemExit, match="no such notebook: atlantis. There are 00_survey"):
        notebooks(["atlantis"])


def test_directives_and_titles():
    cell = nb.new_code_cell("#| hide\n#| echo: false\n#|eval:false\n# a comment\nx = 1")
    assert directives(cell) == {"hide": "", "echo": "false", "eval": "false"}
    assert title(notebook("# What?\n> This.\n\nText")) == ("What?", "This.")
    assert title(notebook(("1", []))) == ("", "")


# ---- outputs


@pytest.mark.parametrize(
    "source, shown",
    [
        ("x = 1\nx", True),
        ("print(1)", True),
        ("for i in y:\n    print(i)", True),
        ("fig, ax = plt.subplots()", True),
        ("Table(rows)", True),
        ("%matplotlib inline\nx.shape", True),
        ("a / b", True),
        ("x = 1", False),
        ("ax.legend();", False),
        ("use_style()", False),
        ("def f():\n    print(1)", False),
        ("assert x", False),
        ("", False),
        ("with pytest.raises(ValueError):\n    print(f())", False),
    ],
)
def test_what_should_show_something(source, shown):
    assert check_notebooks.shows(source) is shown


def test_outputs_that_a_reader_must_not_find():
    def complaints(*cells, size=1000):
        return " | ".join(check_notebooks.complaints(notebook(*cells), size))

    assert complaints("# Text", ("x = 1", []), ("print(1)", [printed("1\n")])) == ""
    assert "carries no outputs" in complaints("# Text", ("print(1)", []))
    assert "cell 1 (x) should show something" in complaints(("print(1)", [printed("1")]), ("x", []))
    assert complaints(("print(1)", [printed("1")]), ("#| eval: false\nx", [])) == ""
    assert "carries an error: ValueError: no" in complaints(
        ("f()", [nb.new_output("error", ename="ValueError", evalue="no", traceback=[])])
    )
    assert "carries a warning" in complaints(("f()", [printed("UserWarning: hm", "stderr")]))
    assert "path of somebody's machine: /home/eve" in complaints(
        ("f()", [printed("wrote /home/eve/labels.fits")])
    )
    assert "more than 2" in complaints(("print(1)", [printed("1")]), size=3_000_000)
    assert (
        complaints(
            ("print(1)", [printed("https://data.sdss.org/home/x and ROOT/dr14/apogee, a/tmp/b")])
        )
        == ""
    )


def test_outputs_are_tidied_of_places_and_progress():
    bar = printed("files: 10%|# | 1/9 [00:03, 3it/s]", "stderr")
    table = nb.new_output(
        "execute_result", data={"text/html": '<table id="table1402" class="t">'}, execution_count=3
    )
    made = notebook(
        (
            "f()",
            [
                printed(f"{ROOT}/data/x.fits and {lab.tempfile.gettempdir()}/abc_12/y.fits"),
                bar,
                table,
            ],
        )
    )
    text, table = lab.tidy(made).cells[0].outputs
    assert (
        text.text == "data/x.fits and …/y.fits" and table.data["text/html"] == '<table class="t">'
    )


# ---- pages


def test_a_page_shows_what_a_reader_shall_see_and_needs_nothing_else():
    value = nb.new_output(
        "execute_result",
        data={
            "text/latex": r"$4.1 \; \mathrm{\frac{km}{s}}$",
            "text/plain": "<Quantity 4.1 km / s>",
        },
    )
    image = nb.new_output("display_data", data={"image/png": "iVBORw0KGgo="})
    page = pages.chapter(
        notebook(
            "# How *strong*?\n> A line.\n\nWith $\\lambda_1 * \\sigma^2 * 3$ and\n$$ \\sum_p w_p $$\nit costs $5. "
            "See [it](01_fetch.ipynb) & [there](https://sdss.org).",
            ("#| hide\nsecret = 1", []),
            ("#| export\ndef public():\n    return 1", []),
            ("#| echo: false\nunseen()", [printed("seen output")]),
            ("value", [value]),
            ("fig", [image, printed("a: 5%|  | 3it/s", "stderr")]),
            ("#| default_exp lines", []),
        ),
        previous="00_survey",
    )
    assert pages.outside(page) == []
    assert page.count("<math") == 3 and 'display="block"' in page and "costs $5" in page
    assert (
        "secret" not in page
        and "unseen" not in page
        and "seen output" in page
        and "#|" not in page
        and "it/s" not in page
    )
    assert "public" in page and "data:image/png;base64" in page
    assert (
        'href="01_fetch.html"' in page
        and 'href="00_survey.html"' in page
        and 'href="https://sdss.org"' in page
    )
    assert "<title>How *strong*?</title>" in page


def test_what_a_page_would_load_from_elsewhere_is_found():
    assert pages.outside('<script src="https://cdn.example/x.js"></script>') and pages.outside(
        "<img alt='a' src=//x.org/a.png>"
    )


def test_the_contents_name_chapters_and_failures():
    chapters = [
        ("00_survey", "What?", "The <facts>", ""),
        ("01_fetch", "Is it?", "", "cell 3: ValueError"),
    ]
    page = pages.index(chapters, ["archive clusters"], "TEFF 80 K")
    assert (
        '<a href="00_survey.html">' in page
        and "The &lt;facts&gt;" in page
        and "failed: cell 3: ValueError" in page
        and "TEFF 80 K" in page
    )


# ---- running


def test_a_failing_notebook_says_where_and_why_and_keeps_its_outputs():
    made = notebook(
        "# Title", ("print('before')", []), ("x = 0\n1 / x", []), ("print('after')", [])
    )
    with pytest.raises(lab.Failed) as error:
        lab.run_notebook(made, "09_test.ipynb", timeout=60)
    message = str(error.value)
    assert (
        message.startswith("09_test.ipynb, cell 2: ZeroDivisionError: division by zero")
        and "    1 / x" in message
        and "\x1b" not in message
    )
    assert (
        made.cells[1].outputs[0].text == "before\n"
        and made.cells[2].outputs[0].output_type == "error"
        and not made.cells[3].outputs
    )


def test_a_cell_that_hangs_is_stopped():
    with pytest.raises(lab.Failed, match="09_test.ipynb, cell 0: took longer than 1 s"):
        lab.run_notebook(notebook(("import time; time.sleep(60)", [])), "09_test.ipynb", timeout=1)
    assert lab.peak_memory() > 20


# ---- generated files


@pytest.fixture
def small_project(tmp_path):
    "A copy of the project with one notebook, and with a front door written by hand."
    for name in check_generated.COPIED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, tmp_path / name)
    for extra in [
        *tmp_path.glob("nbs/*.ipynb"),
        *tmp_path.glob("nbs/text/*.py"),
        *tmp_path.glob("stellar_lab/*.py"),
    ]:
        if "survey" not in extra.name:
            extra.unlink()
    (tmp_path / "stellar_lab/__init__.py").write_text(
        '"""A house."""\n\n__version__ = "0.0.0"\n\n\ndef __getattr__(name):\n    return name\n'
    )
    (tmp_path / "stellar_lab/__main__.py").write_text("print('by hand')\n")
    subprocess.run(
        ["sh", "tools/sync.sh"], cwd=tmp_path, env=environment(), check=True, capture_output=True
    )
    return tmp_path


def test_what_is_written_by_hand_stays(small_project):
    package = small_project / "stellar_lab"
    version = (ROOT / "settings.ini").read_text().split("\nversion = ")[1].splitlines()[0]
    assert (package / "__init__.py").read_text() == (
        f'"""A house."""\n\n__version__ = "{version}"\n\n\n'
        "def __getattr__(name):\n    return name\n"
    )
    assert (package / "__main__.py").read_text() == "print('by hand')\n"
    assert (package / "py.typed").exists()


def test_notebooks_name_their_kernel(small_project):
    (path,) = small_project.glob("nbs/*.ipynb")
    assert read(path).metadata.kernelspec == {
        "name": "python3",
        "display_name": "python3",
        "language": "python",
    }
    (twin,) = small_project.glob("nbs/text/*.py")
    assert "kernelspec" not in twin.read_text()


def test_stale_files_are_found_without_touching_them(small_project):
    assert list(check_generated.differences(small_project)) == []
    module = small_project / "stellar_lab/survey.py"
    twin = small_project / "nbs/text/00_survey.py"
    orphan = small_project / "stellar_lab/orphan.py"
    module.write_text(module.read_text() + "# by hand\n")
    twin.write_text(twin.read_text().replace("What is a star", "What is a planet"))
    orphan.write_text("x = 1\n")
    before = {path: path.read_bytes() for path in (module, twin, orphan)}
    wrong = "\n".join(check_generated.differences(small_project))
    assert "-# by hand" in wrong and "-# # What is a planet, to us?" in wrong and "-x = 1" in wrong
    assert before == {path: path.read_bytes() for path in before}


# ---- make


def make(*arguments, **variables):
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment(**variables), capture_output=True, text=True
    )


def test_make_alone_lists_the_targets():
    listed = make().stdout
    assert all(
        f"make {target}" in listed
        for target in ("lab", "test", "notebook", "sync", "check", "archive", "outputs", "bench")
    )


def test_the_callers_environment_does_not_choose_the_archive(tmp_path):
    planned = make("-n", "lab", f"VENV={tmp_path}", ARCHIVE="leaked", PROFILE="leaked").stdout
    assert '--archive "clusters" --profile "quick"' in planned


def test_an_interpreter_that_is_none_is_refused(tmp_path):
    refused = make("env", f"VENV={tmp_path / 'venv'}", PYTHON="python2.nothing")
    assert (
        refused.returncode
        and "python2.nothing is not a Python 3.11, 3.12 or 3.13" in refused.stderr
        and not (tmp_path / "venv").exists()
    )


def test_a_folder_that_is_no_environment_is_not_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    refused = make("env", f"VENV={tmp_path}")
    assert (
        refused.returncode
        and "no virtual environment" in refused.stderr
        and (tmp_path / "thesis.tex").exists()
    )
