"""Executed notebooks as web pages that need nothing but themselves: figures inside, math as MathML,
no script and no link to a server of scripts."""

import ast
import base64
import html
import mimetypes
import re
import unicodedata
from configparser import ConfigParser
from copy import deepcopy
from pathlib import Path

from latex2mathml.converter import convert as mathml
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbconvert.exporters import HTMLExporter
from pygments.formatters import HtmlFormatter

from notebooks import NBS, ROOT, directives, title

STYLE = (Path(__file__).parent / "pages.css").read_text(encoding="utf-8")
PROGRESS = re.compile(r"\d+%\||\bit/s|s/it\b|\d+it \[")
SCRIPTS = re.compile(
    r"""<(?:script|link|img|iframe|video|source)\b[^>]*(?:src|href)\s*=\s*["']?(?:https?:)?//[^"'\s>]*""",
    re.IGNORECASE,
)
NO_ALT = "No description has been provided for this image"
BEGINNING = "begin here"  # part of the chapters that are not on README's map


# ---- formulas

VARIANTS = {  # MathML's name -> Unicode's, for the letters that stand for a variant of the font
    "bold": "BOLD",
    "italic": "ITALIC",
    "bold-italic": "BOLD ITALIC",
    "double-struck": "DOUBLE-STRUCK",
    "script": "SCRIPT",
    "bold-script": "BOLD SCRIPT",
    "fraktur": "FRAKTUR",
    "bold-fraktur": "BOLD FRAKTUR",
    "sans-serif": "SANS-SERIF",
    "bold-sans-serif": "SANS-SERIF BOLD",
    "sans-serif-italic": "SANS-SERIF ITALIC",
    "sans-serif-bold-italic": "SANS-SERIF BOLD ITALIC",
    "monospace": "MONOSPACE",
}


def letter(character, variant):
    "The Unicode letter of a variant, such as the bold theta; the character itself where none is."
    name = re.sub(r"^(LATIN|GREEK) ", "", unicodedata.name(character, ""))
    name = name.replace("SMALL LETTER", "SMALL").replace("CAPITAL LETTER", "CAPITAL")
    style = VARIANTS[variant]
    # Some letters were there before the others, under names of their own (R of the real numbers).
    older = f"{style.replace('FRAKTUR', 'BLACK-LETTER')} {name}"
    for candidate in (f"MATHEMATICAL {style} {name}", older):
        try:
            return unicodedata.lookup(candidate)
        except KeyError:
            continue
    return "\N{PLANCK CONSTANT}" if (character, variant) == ("h", "italic") else character


def with_letters(made):
    "MathML whose variants of letters are letters: browsers ignore `mathvariant` but for `normal`."

    def spelled(match):
        variant, text = match["variant"], html.unescape(match["text"])
        if variant not in VARIANTS:
            return match[0]
        rest = match["before"] + match["after"]
        letters = "".join(letter(character, variant) for character in text)
        return f"<{match['tag']}{rest}>{html.escape(letters)}</{match['tag']}>"

    return re.sub(
        r'<(?P<tag>mi|mn|mo|mtext)(?P<before>[^>]*?) mathvariant="(?P<variant>[\w-]+)"'
        r"(?P<after>[^>]*)>(?P<text>[^<]*)</(?P=tag)>",
        spelled,
        made,
    )


def formula(latex, options):
    "A formula as MathML, which browsers draw by themselves."
    block = options["display_mode"]
    try:
        made = with_letters(mathml(latex, display="block" if block else "inline"))
        # A row of its own keeps a big bracket big where it has an exponent.
        big = r'<mo stretchy="true" fence="true" minsize[^>]*>[^<]*</mo>'
        return re.sub(big, r"<mrow>\g<0></mrow>", made)
    except Exception:  # a formula that cannot be converted is shown as it was written
        return f"<code>{html.escape(latex)}</code>"


def markdown(**options):
    "A converter of markdown with formulas."
    converter = MarkdownIt("commonmark", options).enable(["table", "strikethrough"])
    return converter.use(
        dollarmath_plugin,
        renderer=formula,
        allow_space=False,
        allow_digits=False,
        double_inline=True,
    )


MARKDOWN = markdown(html=True)
LINE = markdown(html=False)  # for titles


def render(text):
    """Markdown as HTML. A displayed formula inside a paragraph is a span: a div would end the
    paragraph, and the text after it would stand outside of any."""
    made = MARKDOWN.render(text)
    return re.sub(
        r'<div class="math inline">(.*?)</div>',
        r'<span class="formula">\1</span>',
        made,
        flags=re.S,
    )


# ---- a notebook's cells


def is_progress(output):
    "A progress bar's trace, or what moves the cursor between one bar and another."
    if output.output_type != "stream" or output.name != "stderr":
        return False
    return bool(PROGRESS.search(output.text)) or not re.sub(
        r"\x1b\[[0-9;]*[A-Za-z]|\s", "", output.text
    )


def plain(text):
    "Markdown as a line of text."
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^#+\s*|^>\s*|[*`]|\$+", "", text, flags=re.MULTILINE)
    return " ".join(text.split())


def last_sentence(text):
    "The end of the last paragraph of a markdown text, without its formulas' signs."
    text = re.sub(r"^#+ .*$|^\|.*$", "", text, flags=re.MULTILINE)
    paragraphs = [part for part in text.strip().split("\n\n") if part.strip()]
    if not paragraphs:
        return ""
    return re.split(r"(?<=[.?!:])\s+(?=[A-Z(])", plain(paragraphs[-1]))[-1]


def drawn_title(source):
    "The titles that a cell's code gives to its figure, as far as they are plain text."
    code = re.sub(r"^\s*[%!].*", "", source, flags=re.MULTILINE)
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", "")
        named = [keyword.value for keyword in node.keywords if keyword.arg in ("title", "suptitle")]
        given = node.args[:1] if name in ("set_title", "suptitle", "title") else []
        for value in [*given, *named]:
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found.append((name != "suptitle", value.value))
    texts = dict.fromkeys(plain(text) for _, text in sorted(found, key=lambda pair: pair[0]))
    return "; ".join(filter(None, texts))


def describe_figures(cells):
    "Give each figure a text for readers who do not see it: its title, or the words before it."
    heading, before = "", ""
    for cell in cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)
            heading = plain(headings[-1]) if headings else heading
            before = last_sentence(cell.source) or heading
            continue
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                before = last_sentence(data["text/markdown"])
            for kind in ("image/png", "image/jpeg"):
                if kind in data:
                    text = drawn_title(cell.source) or before or heading or "figure"
                    output.setdefault("metadata", {}).setdefault(kind, {})["alt"] = text


def presented(notebook):
    "The notebook as a reader shall see it: without hidden cells, directives and progress bars."
    shown = deepcopy(notebook)
    shown.cells = [cell for cell in shown.cells if "hide" not in directives(cell)]
    describe_figures(shown.cells)
    for cell in shown.cells:
        if cell.cell_type != "code":
            continue
        orders = directives(cell)
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE).strip("\n")
        if orders.get("echo") == "false":
            cell.source = ""
        cell.outputs = [output for output in cell.outputs if not is_progress(output)]
        if orders.get("output") == "false":
            cell.outputs = []
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/latex" in data and "text/html" not in data:
                data["text/html"] = render(data["text/latex"])
    shown.cells = [cell for cell in shown.cells if cell.source.strip() or cell.get("outputs")]
    return shown


# ---- HTML


def tidy_tables(made):
    "Tables without astropy's line on their length and without its row of types."
    made = re.sub(r"<i>\w*Table\b[^<]*\blength=\d+</i>\s*", "", made)
    number = r"(?:u?int|float|complex|str|bytes)\d+|bool|object"
    types = rf"(?:<th[^>]*>(?:(?:{number})(?:\[[\d,]+\])?)?</th>\s*)+"
    return re.sub(rf"<thead>\s*<tr>\s*{types}</tr>\s*</thead>", "", made)


def slug(text, taken):
    "An id of a heading that is not taken yet."
    words = re.sub(r"<[^>]*>|&\w+;", "", text).lower()
    base = re.sub(r"[^\w]+", "-", words).strip("-") or "section"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return name


def with_sections(made):
    "HTML whose headings have ids and links to themselves, and (level, id, heading) of each."
    sections = {}

    def heading(match):
        level, text = match[1], match[2]
        name = slug(text, sections)
        sections[name] = (int(level), name, text)
        link = f'<a class="anchor" href="#{name}" aria-label="Link to this section">#</a>'
        return f'<h{level} id="{name}">{text} {link}</h{level}>'

    made = re.sub(r"<h([1-4])>(.*?)</h\1>", heading, made, flags=re.S)
    return made, list(sections.values())


def embedded(made, folder):
    "HTML with the pictures that it takes from files inside."

    def picture(match):
        path = folder / html.unescape(match[2])
        if not path.is_file():
            return match[0]
        kind = mimetypes.guess_type(path.name)[0]
        return f"{match[1]}data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

    return re.sub(r'(<img\b[^>]*\bsrc=")(?![a-z]+:)([^"]+)', picture, made)


def described(made):
    "No picture without a text for readers who do not see it."
    made = made.replace(f'alt="{NO_ALT}"', 'alt="figure"')
    return re.sub(r"<img\b(?![^>]*\balt=)", '<img alt="figure"', made)


def unchanged(text):
    return text


def body(notebook):
    "The cells as HTML."
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    exporter.register_filter("markdown2html", render)
    exporter.register_filter("clean_html", unchanged)  # nbconvert's is slow, and for strangers
    made, _ = exporter.from_notebook_node(presented(notebook))
    made = re.sub(
        r'<div class="input">\s*<div class="inner_cell">\s*<div class="input_area">\s*'
        r'<div class="highlight[^"]*"><pre>'
        r"(?:<span></span>)?\s*</pre></div>\s*</div>\s*</div>\s*</div>",
        "",
        made,
    )  # a cell that shows its output only
    made = re.sub(r'(href="[^":/]+)\.ipynb', r"\1.html", made)
    return described(embedded(tidy_tables(made), NBS))


def page(heading, content, navigation="", contents=""):
    "A whole page; `contents` is the list of its sections."
    code = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    code = re.sub(r"\.highlight \{[^}]*\}", "", code)
    top = f'<nav class="top" aria-label="Chapters">{navigation}</nav>' if navigation else ""
    foot = f'<nav class="foot" aria-label="Chapters">{navigation}</nav>' if navigation else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(heading)}</title><style>{STYLE}{code}</style></head>\n"
        f"<body>{top}\n{contents}<main>\n{content}\n</main>\n{foot}</body></html>\n"
    )


def table_of_contents(sections):
    "The sections of a page: beside it where there is room, else folded at its top."
    items = "".join(
        f'<li class="level{level}"><a href="#{name}">{text}</a></li>'
        for level, name, text in sections
        if level in (2, 3)
    )
    if not items:
        return ""
    return (
        '<nav class="toc wide" aria-label="On this page"><p>On this page</p>'
        f"<ul>{items}</ul></nav>\n"
        f'<details class="toc narrow"><summary>On this page</summary><ul>{items}</ul></details>\n'
    )


def chapter(notebook, previous=None, following=None):
    "A notebook's page; `previous` and `following` are (name, title) of its neighbours."

    def link(neighbour, before="", after=""):
        if not neighbour:
            return "<span></span>"
        name, text = neighbour
        return f'<a href="{name}.html">{before}{html.escape(plain(text))}{after}</a>'

    navigation = (
        link(previous, before="← ") + link(("index", "Contents")) + link(following, after=" →")
    )
    content, sections = with_sections(body(notebook))
    heading = plain(title(notebook)[0])
    return page(heading, content, navigation, table_of_contents(sections))


# ---- the contents


def introduction():
    "README's beginning, up to its first section, its links leading into these pages."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.split(r"^## ", text, maxsplit=1, flags=re.MULTILINE)[0]
    first = re.sub(r"\A# .*\n", "", first)
    made = embedded(render(first), ROOT)
    made = re.sub(r'href="nbs/([^"/]+)\.ipynb', r'href="\1.html', made)
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    project = settings["DEFAULT"]
    files = f"{project['git_url']}/blob/{project['branch']}/"
    made = re.sub(r'href="(?![a-z]+:|#)(?![^"]*\.html)', f'href="{files}', made)
    return described(made)


def book_map():
    "README's map of the chapters: name -> (part, subject), in the order of its rows."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## The chapters\n")[2].partition("\n## ")[0]
    found = {}
    for part, chapters in re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE):
        for subject, name in re.findall(r"\[([^\]]+)\]\(nbs/(\w+)\.ipynb\)", chapters):
            found[name] = (part, subject)
    return found


def index(chapters, facts, errors):
    """The contents: (name, title, subtitle, problem) of each chapter, lines about the run, the
    printed table of errors. Chapters stand in the parts of README's map, one that is not in it
    (the tour) before them."""
    places = book_map()
    parts = {BEGINNING: [], **{part: [] for part, _ in places.values()}}
    for name, heading, subtitle, problem in chapters:
        part, subject = places.get(name, (BEGINNING, ""))
        failed = f' <span class="failed">failed: {html.escape(problem)}</span>' if problem else ""
        about = f'<br><span class="note">{LINE.renderInline(subtitle)}</span>' if subtitle else ""
        link = f'<a href="{name}.html">{LINE.renderInline(heading)}</a>'
        before = f'<span class="subject">{html.escape(subject)}</span> ' if subject else ""
        parts[part].append(f"<li>{before}{link}{about}{failed}</li>")
    lists = "\n".join(
        f"<h2>{html.escape(part[0].upper() + part[1:])}</h2>\n"
        f"<ul class='chapters'>{''.join(items)}</ul>"
        for part, items in parts.items()
        if items
    )
    table = ""
    if errors:
        heading = "Errors on the stars of this archive"
        table = f"<h2>{heading}</h2>\n<pre>{html.escape(errors)}</pre>"
    notes = "<br>".join(map(html.escape, facts))
    content = (
        f'<h1>stellar_lab</h1>\n{introduction()}\n<p class="note">These pages: {notes}</p>\n'
        f"{lists}\n{table}"
    )
    content, sections = with_sections(content)
    return page("stellar_lab", content, contents=table_of_contents(sections))


class Book:
    """The pages of a book in a folder: each chapter's as soon as its notebook is ready, then the
    contents. `notebooks` is a dict of name -> notebook in the order of reading, executed or not."""

    def __init__(self, folder, notebooks):
        self.folder = folder
        self.titles = {name: title(notebook) for name, notebook in notebooks.items()}

    def neighbours(self, name):
        "(name, title) of the chapters before and after, None where there is none."
        names = [None, *self.titles, None]
        place = names.index(name)
        around = (names[place - 1], names[place + 1])
        return [other and (other, self.titles[other][0]) for other in around]

    def write_chapter(self, name, notebook):
        made = chapter(notebook, *self.neighbours(name))
        (self.folder / f"{name}.html").write_text(made, encoding="utf-8")

    def write_index(self, facts=(), errors="", failed=None):
        "The contents; `failed` says of a name what went wrong."
        chapters = [
            (name, *told, (failed or {}).get(name, "")) for name, told in self.titles.items()
        ]
        made = index(chapters, facts, errors)
        (self.folder / "index.html").write_text(made, encoding="utf-8")


def outside(made):
    "What a page would load from elsewhere."
    return SCRIPTS.findall(made)
