"""Executed notebooks as web pages that need nothing but themselves: figures inside, math as MathML, no script and no link to a server of scripts."""

import html
import re
from copy import deepcopy

from latex2mathml.converter import convert as mathml
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbconvert.exporters import HTMLExporter
from pygments.formatters import HtmlFormatter

from notebooks import directives, title

STYLE = """
body { margin: 0 auto; max-width: 74rem; padding: 1rem 1.5rem 4rem; font: 17px/1.55 Georgia, "DejaVu Serif", serif; color: #222; }
h1, h2, h3, nav, table, .note { font-family: "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { line-height: 1.2; margin: 1.2rem 0 0.6rem; } h2 { margin: 2.2rem 0 0.6rem; }
nav { display: flex; justify-content: space-between; gap: 1rem; font-size: 0.85rem; border-bottom: 1px solid #ddd; padding-bottom: 0.5rem; }
nav.foot { border: 0; border-top: 1px solid #ddd; margin-top: 3rem; padding-top: 0.5rem; }
p, ul, ol, blockquote { max-width: 58rem; } a { color: #0b5a94; }
blockquote { margin: 0 0 1.2rem; color: #555; font-style: italic; }
pre, code { font: 13px/1.45 "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.highlight pre { background: #f6f7f9; border-left: 3px solid #c9d3dd; margin: 0.6rem 0; padding: 0.6rem 0.9rem; overflow-x: auto; }
.output_area { margin: 0.4rem 0 1rem; overflow-x: auto; } .output_area pre { margin: 0.3rem 0; white-space: pre-wrap; }
.output_stderr pre, .output_error pre { background: #fdecea; padding: 0.6rem 0.9rem; }
img, svg, video { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.85rem; } th, td { padding: 0.2rem 0.7rem; text-align: left; border-bottom: 1px solid #e4e4e4; }
math[display="block"] { margin: 0.8rem 0; font-size: 1.1em; }
.note { color: #555; font-size: 0.9rem; } .failed { color: #a11; } li { margin: 0.25rem 0; }
"""
PROGRESS = re.compile(r"\d+%\||\bit/s|s/it\b|\d+it \[")
SCRIPTS = re.compile(
    r"""<(?:script|link|img|iframe|video|source)\b[^>]*(?:src|href)\s*=\s*["']?(?:https?:)?//[^"'\s>]*""",
    re.IGNORECASE,
)


def formula(latex, options):
    "A formula as MathML, which browsers draw by themselves."
    block = options["display_mode"]
    try:
        return mathml(latex, display="block" if block else "inline")
    except Exception:  # a formula that cannot be converted is shown as it was written
        return f"<code>{html.escape(latex)}</code>"


MARKDOWN = (
    MarkdownIt("commonmark", {"html": True})
    .enable(["table", "strikethrough"])
    .use(
        dollarmath_plugin,
        renderer=formula,
        allow_space=False,
        allow_digits=False,
        double_inline=True,
    )
)


def is_progress(output):
    "A progress bar's trace, or what moves the cursor between one bar and another."
    if output.output_type != "stream" or output.name != "stderr":
        return False
    return bool(PROGRESS.search(output.text)) or not re.sub(
        r"\x1b\[[0-9;]*[A-Za-z]|\s", "", output.text
    )


def presented(notebook):
    "The notebook as a reader shall see it: without hidden cells, directives and progress bars."
    shown = deepcopy(notebook)
    shown.cells = [cell for cell in shown.cells if "hide" not in directives(cell)]
    for cell in shown.cells:
        if cell.cell_type != "code":
            continue
        orders = directives(cell)
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE).strip("\n")
        if orders.get("echo") == "false":
            cell.source = ""
        cell.outputs = (
            []
            if orders.get("output") == "false"
            else [output for output in cell.outputs if not is_progress(output)]
        )
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/latex" in data and "text/html" not in data:
                data["text/html"] = MARKDOWN.render(data["text/latex"])
    shown.cells = [cell for cell in shown.cells if cell.source.strip() or cell.get("outputs")]
    return shown


def body(notebook):
    "The cells as HTML."
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    exporter.register_filter("markdown2html", MARKDOWN.render)
    made, _ = exporter.from_notebook_node(presented(notebook))
    made = re.sub(
        r'<div class="input">\s*<div class="inner_cell">\s*<div class="input_area">\s*<div class="highlight[^"]*"><pre>'
        r"(?:<span></span>)?\s*</pre></div>\s*</div>\s*</div>\s*</div>",
        "",
        made,
    )  # a cell that shows its output only
    return re.sub(r'(href="[^":/]+)\.ipynb', r"\1.html", made)


def page(heading, content, navigation=""):
    "A whole page."
    code = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    code = re.sub(r"\.highlight \{[^}]*\}", "", code)
    top = f"<nav>{navigation}</nav>" if navigation else ""
    foot = f'<nav class="foot">{navigation}</nav>' if navigation else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(heading)}</title><style>{STYLE}{code}</style></head>\n<body>{top}\n{content}\n{foot}</body></html>\n"
    )


def chapter(notebook, previous=None, following=None):
    "A notebook's page; `previous` and `following` are the names of its neighbours."

    def link(name, text):
        return f'<a href="{name}.html">{text}</a>' if name else "<span></span>"

    navigation = (
        link(previous, f"← {previous}")
        + link("index", "contents")
        + link(following, f"{following} →")
    )
    return page(title(notebook)[0], body(notebook), navigation)


def index(chapters, facts, errors):
    "The contents: (name, title, subtitle, problem) of each chapter, lines about the run, the printed table of errors."
    items = []
    for name, heading, subtitle, problem in chapters:
        failed = f' <span class="failed">failed: {html.escape(problem)}</span>' if problem else ""
        described = (
            f'<b>{html.escape(heading)}</b> <span class="note">{html.escape(subtitle)}</span>'
        )
        items.append(f'<li><a href="{name}.html">{name}</a>: {described}{failed}</li>')
    table = (
        f"<h2>Errors on the stars of this archive</h2>\n<pre>{html.escape(errors)}</pre>"
        if errors
        else ""
    )
    notes = "<br>".join(map(html.escape, facts))
    return page(
        "stellar_lab",
        f'<h1>stellar_lab</h1>\n<p class="note">{notes}</p>\n<ul>{"".join(items)}</ul>\n{table}',
    )


def outside(made):
    "What a page would load from elsewhere."
    return SCRIPTS.findall(made)
