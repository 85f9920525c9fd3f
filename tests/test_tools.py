"""The tools behind make: order, checks, pages, and what a failing notebook says."""

import base64
import html
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import astropy.units as u
import nbformat.v4 as nb
import numpy as np
import psutil
import pytest
from astropy.table import QTable

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import check_generated
import check_notebooks
import durations
import kernels
import lab
import pages
from notebooks import ROOT, directives, environment, natural, notebooks, read, title


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
        "000_tour.ipynb",
        "B_a.ipynb",
    ]
    assert sorted(names, key=natural) == [
        "000_tour.ipynb",
        "00_survey.ipynb",
        "2_clean.ipynb",
        "10_augmentation.ipynb",
        "B_a.ipynb",
        "B_archives.ipynb",
        "C_cli.ipynb",
    ]
    assert notebooks(["00"])[0].name == notebooks(["00_survey"])[0].name == "00_survey.ipynb"
    with pytest.raises(
        SystemExit, match="no such notebook: atlantis. There are 000_tour, 00_survey"
    ):
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


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("$$ a = b +\nc $$ and $$ d $$", ""),
        ("$$ a = \\begin{matrix} 1 \\\\ 2 \\end{matrix} $$", ""),
        ("$$ a = b\n+ c $$", "cell 0 has a formula whose line would become a list: + c"),
        ("$$ a = b\n  - c $$", "cell 0 has a formula whose line would become a list: - c"),
        ("$$ \\\\sum_i a_i $$", "cell 0 has a formula with a doubled backslash: \\\\sum_i"),
        ("$$ a $$ and $$ b", "cell 0 has an odd number of $$"),
        ("$$ a $$\n- a list\n- of text\n\n$$ b $$ and `$$` in code", ""),
    ],
)
def test_formulas_that_would_not_be_shown_as_such(text, complaint):
    assert " | ".join(check_notebooks.complaints(notebook(text), 1000)) == complaint


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
            "# How *strong*?\n> A line.\n\n"
            "With $\\lambda_1 * \\sigma^2 * 3$ and\n$$ \\sum_p w_p $$\nit costs $5. "
            "See [it](01_fetch.ipynb) & [there](https://sdss.org).",
            ("#| hide\nsecret = 1", []),
            ("#| export\ndef public():\n    return 1", []),
            ("#| echo: false\nunseen()", [printed("seen output")]),
            ("value", [value]),
            ("fig", [image, printed("a: 5%|  | 3it/s", "stderr")]),
            ("#| default_exp lines", []),
        ),
        previous=("00_survey", "What is a *star*?"),
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
        and '<a href="00_survey.html">← What is a star?</a>' in page
        and 'href="https://sdss.org"' in page
    )
    assert "<title>How strong?</title>" in page


def test_what_a_page_would_load_from_elsewhere_is_found():
    assert pages.outside('<script src="https://cdn.example/x.js"></script>') and pages.outside(
        "<img alt='a' src=//x.org/a.png>"
    )


@pytest.mark.parametrize(
    "latex, letters",
    [
        (r"\mathbf{v}", "𝐯"),
        (r"\boldsymbol{\theta}_p", "𝜽"),
        (r"\bm{\Sigma}", "𝜮"),
        (r"v^\mathsf{T}", "𝖳"),
        (r"\mathbf{\hat{x} + 12}", "𝐱𝟏𝟐"),
        (r"\mathbb{R}\mathcal{L}\mathfrak{C}", "ℝℒℭ"),
        (r"\textbf{abc}", "𝐚𝐛𝐜"),
        (r"\mathit{Th}", "𝑇ℎ"),
    ],
)
def test_variants_of_letters_are_letters_since_browsers_ignore_mathvariant(latex, letters):
    made = html.unescape(pages.render(f"${latex}$"))
    assert not re.search('mathvariant="(?!normal)', made)
    assert all(letter in made for letter in letters)


def test_text_after_a_displayed_formula_stays_in_its_paragraph():
    made = pages.render("The sum\n$$ a = b $$\nis small.\n\nMore.")
    first = made.split("</p>")[0]
    assert "<div" not in made and "<math" in first and "is small." in first
    assert '<span class="formula">' in first and 'display="block"' in first


def test_a_big_bracket_with_an_exponent_stays_big():
    made = pages.render(r"$$ \bigl(x\bigr)^2 $$")
    assert made.count("<mrow><mo stretchy") == 2


def test_sections_can_be_linked_and_are_listed():
    text = "# What?\n\n## One `f(x)` & *two*\nText\n\n### Deeper\n\n## Deeper\n"
    page = pages.chapter(notebook(text))
    ids = re.findall(r'<h[1-4] id="([^"]+)"', page)
    assert ids == ["what", "one-f-x-two", "deeper", "deeper-2"]
    listed = re.findall(r'<li class="level\d"><a href="#([^"]+)"', page)
    assert listed == 2 * ids[1:]  # for wide and for narrow windows
    assert all(f'href="#{name}"' in page for name in ids)
    assert "On this page" not in pages.chapter(notebook("# What?\n\nText"))


def test_tables_lose_their_length_and_their_row_of_types():
    table = QTable({"name": ["a"], "TEFF": [4000.0] * u.K, "c": np.zeros((1, 2)), "n": [1]})
    value = nb.new_output("execute_result", data={"text/html": table._repr_html_()})
    page = pages.chapter(notebook(("table", [value])))
    assert "length=" not in page and "float64" not in page and "str1" not in page
    assert "<th>K</th>" in page and "<th>TEFF</th>" in page and "4000.0" in page
    plain = "<table><thead><tr><th>int</th><th>bool</th></tr></thead></table>"
    assert pages.tidy_tables(plain.replace("bool", "stars")) == plain.replace("bool", "stars")


def test_figures_are_described():
    def alt(*cells):
        image = nb.new_output("display_data", data={"image/png": "iVBORw0KGgo="})
        page = pages.chapter(notebook(*cells[:-1], (cells[-1], [image])))
        (text,) = re.findall(r'<img[^>]*alt="([^"]*)"', page)
        return text

    titled = "axes[0].set_title('flux & *error*')\nfig.suptitle('One star')"
    assert alt("# A\n\nText.", titled) == "One star; flux &amp; error"
    assert alt("plot(star, title='A fit')") == "A fit"
    assert (
        alt("## B\nIt is cold. Look at **the [line](x.ipynb)**:", "plot()") == "Look at the line:"
    )
    assert alt("## The `end`", "%matplotlib inline\nplot(f'{x}')") == "The end"
    assert alt("plot()") == "figure"


def test_the_contents_lead_into_the_book():
    chapters = [
        ("000_tour", "How fast?", "", ""),
        ("00_survey", "What?", "The <facts>", ""),
        ("01_fetch", "Is it?", "", "cell 3: ValueError"),
        ("19_results", "Which is best?", "", ""),
        ("A_archives", "Where from?", "", ""),
    ]
    page = pages.index(chapters, ["archive clusters"], "TEFF 80 K")
    order = [
        "data:image/png",  # README's picture
        "archive clusters",
        ">Begin here",
        "How fast?",
        ">From files to spectra",
        '<span class="subject">survey</span> <a href="00_survey.html">What?</a>',
        "The &lt;facts&gt;",
        '<a href="01_fetch.html">Is it?</a>',
        "failed: cell 3: ValueError",
        ">Other readers",
        "Which is best?",
        ">Stars from physics",
        "Where from?",
        "TEFF 80 K",
    ]
    places = [page.index(text, page.index("<main>")) for text in order]
    assert places == sorted(places)
    assert pages.outside(page) == []
    relative = re.findall(r'href="(?!https?://|#)([^"]*)"', page)
    assert all(name.endswith(".html") for name in relative)


def test_every_chapter_but_the_tour_has_its_place_on_the_map():
    names = [path.stem for path in notebooks()]
    places = pages.book_map()
    assert sorted(places) == sorted(name for name in names if name != "000_tour")
    parts = list(dict.fromkeys(part for part, _ in places.values()))
    assert len(parts) == 7 and parts[0] == "from files to spectra"
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 80


def test_a_book_is_written_chapter_by_chapter(tmp_path):
    made = {name: notebook(f"# {name}?") for name in ("00_a", "01_b", "C_c")}
    book = pages.Book(tmp_path, made)
    book.write_chapter("01_b", made["01_b"])
    book.write_index(["quick"], failed={"C_c": "cell 1: no"})
    text = (tmp_path / "01_b.html").read_text()
    assert "← 00_a?" in text and "C_c? →" in text
    assert "failed: cell 1: no" in (tmp_path / "index.html").read_text()
    assert book.neighbours("00_a") == [None, ("01_b", "01_b?")]


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


def test_a_kernel_leaves_nothing_to_the_next_one(monkeypatch, tmp_path):
    monkeypatch.setenv("LAST_WORDS", str(tmp_path))
    leave = """
import os, tempfile, threading, time, matplotlib
os.environ["LEFT"] = "by the first"
last = os.path.join(os.environ["LAST_WORDS"], "said")
threading.Thread(target=lambda: (time.sleep(1), open(last, "w").close())).start()
matplotlib.rcParams["lines.linewidth"] = 7
scratch = tempfile.TemporaryDirectory()
print(scratch.name)
"""
    find = """
import os, matplotlib
print(os.environ.get("LEFT"), matplotlib.rcParams["lines.linewidth"])
"""
    first, second = notebook((leave, [])), notebook((find, []))
    for made in (first, second):
        lab.run_notebook(made, "09_test.ipynb", timeout=60)
    assert not Path(first.cells[0].outputs[0].text.strip()).exists()  # its exit handlers ran
    assert (tmp_path / "said").exists()  # its threads ended, too
    assert second.cells[0].outputs[0].text == "None 1.5\n"


def test_after_a_kernel_that_died_the_next_one_runs():
    with pytest.raises(lab.Failed, match="09_test.ipynb, cell 0: its kernel died"):
        lab.run_notebook(notebook(("import os; os._exit(3)", [])), "09_test.ipynb", timeout=60)
    if kernels.CAN_FORK:  # killed while a cell runs
        kill = threading.Timer(3, kernels.SOURCE.process.kill)
        kill.start()
        with pytest.raises(lab.Failed, match="its kernel died"):
            lab.run_notebook(notebook(("import time; time.sleep(90)", [])), "09_test.ipynb", 80)
    made = notebook(("print('alive')", []))
    lab.run_notebook(made, "09_test.ipynb", timeout=60)
    assert made.cells[0].outputs[0].text == "alive\n"


@pytest.fixture
def alone(monkeypatch, tmp_path):
    "Runs of this test do not count as measured, and its threads are its own."
    monkeypatch.setattr(durations, "FILE", tmp_path / "durations.json")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "1")


def test_notebooks_run_side_by_side_and_come_back_in_order(alone):
    meet = "import os; print(os.environ['OMP_NUM_THREADS'])"
    draw = (
        "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.figure(figsize=(2, 1), dpi=50);"
    )
    chapters = {
        Path("00_slow.ipynb"): notebook("# Slow?", (meet, []), ("import time; time.sleep(3)", [])),
        Path("01_wrong.ipynb"): notebook("# Wrong?", ("1 / 0", [])),
        Path("02_figure.ipynb"): notebook("# Figure?", (f"{draw}\nplt.plot([1, 2]);", [])),
    }
    finished = []
    done, memory = lab.run_all(
        chapters, 60, sharp=True, ready=lambda path, _: finished.append(path)
    )
    assert [path for path, _, _ in done] == list(chapters) and set(finished) == set(chapters)
    slow, wrong, figure = (problem for _, _, problem in done)
    assert (slow, figure) == ("", "") and "cell 1: ZeroDivisionError" in wrong
    assert done[0][1].cells[1].outputs[0].text == "1\n"
    (drawn,) = done[2][1].cells[1].outputs
    width = int.from_bytes(base64.b64decode(drawn.data["image/png"])[16:20])
    assert width == pytest.approx(2 * drawn.metadata["image/png"]["width"], abs=1)
    assert memory > 60
    assert set(durations.measured()["run"]) == {"slow", "wrong", "figure"}


def test_an_interruption_ends_all_kernels_and_their_workers(alone, tmp_path):
    told = tmp_path / "worker"
    work = f"""
import os, subprocess
worker = subprocess.Popen(["sleep", "600"])
open({str(told)!r} + ".part", "w").write(str(worker.pid))
os.replace({str(told)!r} + ".part", {str(told)!r})
"""
    wait = f"import os, time\nwhile not os.path.exists({str(told)!r}):\n    time.sleep(0.1)"
    hanging = notebook("# Long?", (work, []), ("import time; time.sleep(600)", []))
    quick = notebook("# Quick?", (wait, []))

    def interrupt(path, _):
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        lab.run_all({Path("0_a.ipynb"): hanging, Path("1_b.ipynb"): quick}, 600, ready=interrupt)
    assert time.monotonic() - begin < 200  # it would hang for 600
    worker = int(told.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(worker) and time.monotonic() < deadline:
        if psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
            break  # killed, and not yet fetched by the one who inherits it
        time.sleep(0.1)
    else:
        assert not psutil.pid_exists(worker)


def test_what_took_longest_begins_first(alone):
    paths = ["00_survey.ipynb", "14_network.ipynb", "D_mock.ipynb"]
    assert durations.longest_first("run", paths)[0] == "14_network.ipynb"  # known beforehand
    durations.remember("run", {"04_mock.ipynb": 900, "x/14_network.ipynb": 1})
    durations.remember("test", {"00_survey.ipynb": 9000})
    again = durations.longest_first("run", paths)
    assert again == ["D_mock.ipynb", "00_survey.ipynb", "14_network.ipynb"]
    durations.FILE.write_text("cut sho")
    assert durations.longest_first("run", paths)[0] == "14_network.ipynb"


# ---- generated files


@pytest.fixture(scope="module")
def small_project(tmp_path_factory):
    "A copy of the project with one notebook, and with a front door written by hand."
    tmp_path = tmp_path_factory.mktemp("project")
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


def test_stale_files_are_found_without_touching_them(small_project, tmp_path):
    changed = shutil.copytree(small_project, tmp_path / "changed")
    module = changed / "stellar_lab/survey.py"
    twin = changed / "nbs/text/00_survey.py"
    orphan = changed / "stellar_lab/orphan.py"
    module.write_text(module.read_text() + "# by hand\n")
    twin.write_text(twin.read_text().replace("What is a star", "What is a planet"))
    orphan.write_text("x = 1\n")
    before = {path: path.read_bytes() for path in (module, twin, orphan)}
    wrong = list(check_generated.differences(changed))
    names = sorted(diff.split()[1] for diff in wrong)  # all others agree, as before
    assert names == sorted(str(path.relative_to(changed)) for path in before)
    wrong = "\n".join(wrong)
    assert "-# by hand" in wrong and "-# # What is a planet, to us?" in wrong and "-x = 1" in wrong
    assert before == {path: path.read_bytes() for path in before}


# ---- make


def make(*arguments, **variables):
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment(**variables), capture_output=True, text=True
    )


TARGETS = ("lab", "test", "notebook", "fromtext", "sync", "check", "archive", "outputs", "bench")


def test_make_alone_lists_the_targets():
    listed = make().stdout
    assert all(f"make {target}" in listed for target in TARGETS)


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


@pytest.mark.parametrize("place", ["stars", "fetched/stars"])
def test_an_archive_that_is_a_link_is_not_written_over(monkeypatch, tmp_path, place):
    "A link is not removed, so nothing may be written or stamped in its place."
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "allStar.fits").write_text("kept")
    archives = tmp_path / "archives"
    (archives / place).parent.mkdir(parents=True)
    (archives / place).symlink_to(elsewhere)
    (archives / "stars.made").write_text("an older one")
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    monkeypatch.setattr(lab, "ARCHIVES", archives)
    monkeypatch.setattr(lab, "recipe", lambda name: "a newer one")
    monkeypatch.setattr(lab, "COMMAND", "true")
    with pytest.raises(SystemExit, match="stars is a symbolic link to .*elsewhere: remove"):
        lab.write_archive("stars")
    assert (archives / "stars.made").read_text() == "an older one"
    assert (elsewhere / "allStar.fits").read_text() == "kept" and (archives / place).is_symlink()


def test_an_archive_that_cannot_be_removed_is_not_stamped(monkeypatch, tmp_path):
    (tmp_path / "stars").mkdir()
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    monkeypatch.setattr(lab, "ARCHIVES", tmp_path)
    monkeypatch.setattr(lab, "recipe", lambda name: "a newer one")
    monkeypatch.setattr(lab, "COMMAND", "true")
    monkeypatch.setattr(lab.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="could not remove .*stars"):
        lab.write_archive("stars")
    assert not (tmp_path / "stars.made").exists()
