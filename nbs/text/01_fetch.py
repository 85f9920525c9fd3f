# %% [markdown]
# # Is it all there?
# > Bringing an archive home: list, download, resume, verify, and never a wrong file under a right name.
#
# **Question.** The four fields of the original lab are 2,723 files and 8 GB on a server far away. Connections drop, servers are busy, a page of
# apologies comes instead of a spectrum. How do we know, at the end, that every file is there and whole?
#
# **Idea.** Do not trust the transfer, check the thing. A FITS file says itself how long it must be: it is a chain of HDUs, each a header of $c$ cards and
# an array, both padded to blocks of 2,880 bytes,
# $$ \text{size} = \sum_{h}\; 2880\left\lceil \frac{80\,c_h}{2880} \right\rceil + 2880\left\lceil \frac{|\mathrm{BITPIX}_h|}{8\cdot 2880}
# \prod_i \mathrm{NAXIS}i_h \right\rceil . $$
# So we write under another name (`….part`), compare with the size that the server promised and with the size that the file itself promises, and only
# then give it its name. What stands under a final name was whole when it got there.
#
# You learn how to fetch thousands of files without babysitting. You need a little of how the web works: a *request* asks, a *response* has a status
# (200 here it is, 206 here is the rest of it, 404 no such thing, 503 come back later), headers and a body.

# %%
#| default_exp fetch

# %%
#| export
import codecs
import errno
import ipaddress
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from html.parser import HTMLParser
from http.client import HTTPException
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urljoin, urlsplit

import requests
from astropy.io import fits
from astropy.table import Table
from astropy.utils.exceptions import AstropyWarning
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from stellar_lab import __version__
from stellar_lab.survey import (
    ARCHIVE_FILE,
    ARCHIVES,
    PRODUCTS,
    RELEASES,
    SUMS_FILE,
    Archive,
    LabError,
    Release,
    archive_sums,
    atomic_path,
    said_of,
    same_star,
    sdss_id_folder,
    sha256_of,
    what_stands_at,
)

# %%
#| hide
import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython.display import Markdown, display

from stellar_lab.survey import archive_record, archive_root, use_style

# %%
#| hide
use_style()


# %% [markdown]
# ## Is this file whole?
# `file_problem` walks from header to header, adds up what the formula says and never touches the arrays: about a millisecond per file. It answers with
# the first thing that is wrong, in words, or with an empty string. A star's file also says whose it is, and that has to be the star of its name.

# %%
#| exporti
def file_problem(path, hdus: int = 0, star: str = "") -> str:
    """Say why a file is not whole.

    Of a FITS file only the headers are read, of other files the first bytes. The size that
    the headers promise is that of the FITS standard 4.0, section 3.1.

    Parameters
    ----------
    path : str or Path
        A file.
    hdus : int, default 0
        HDUs that a FITS file has at least; 0 for a file that is no FITS file.
    star : str, optional
        APOGEE_ID, or sdss_id, that a star's file should have in its first header.

    Returns
    -------
    str
        What is wrong, "" if nothing is.
    """
    other = what_stands_at(path)
    if other:
        return f"{other}, not a file"
    size = os.path.getsize(path)
    if not size:
        return "empty"
    with open(path, "rb") as file:
        start = file.read(512)
        text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
        if text.startswith(b"<") and re.search(rb"<(!doctype\s+)?html", start, re.IGNORECASE):
            return "a web page, not data"
        if not hdus:
            return ""
        if not start.startswith(b"SIMPLE  ="):
            return "not a FITS file"
        file.seek(0)
        return _fits_problem(file, size, hdus, star)


# %%
#| export
def _fits_problem(file, size, hdus, star):
    "What is wrong with the chain of HDUs of an open FITS file, '' if nothing is."
    count = 0
    end = 0
    while end < size:
        try:
            header = fits.Header.fromfile(file)
            length = header.data_size_padded
        except Exception as error:  # astropy answers garbage with many kinds of errors
            reason = error or type(error).__name__
            return f"damaged: the header of HDU {count} cannot be read ({reason})"
        end = file.tell() + length
        if length < 0 or (count and "XTENSION" not in header):
            return f"damaged: HDU {count} is not an extension of FITS"
        if end > size:
            return f"truncated: HDU {count} ends at byte {end:,}, the file at {size:,}"
        named = str(header.get("OBJID", header.get("OBJ", header.get("SDSS_ID", "")))).strip()
        another = named not in ("", star) if star.isdigit() else not same_star(named, star)
        if not count and star and another:
            return f"holds another star: its header says {named}, its name {star}"
        count += 1
        file.seek(end)
    return "" if count >= hdus else f"only {count} of {hdus} HDUs"


# %% [markdown]
# To play with, we make an archive of our own: seven stars in two fields and a small catalogue, in the tree of data release 14. The files hold no
# science, but as many HDUs as the survey's.

# %%
def write_star(path, hdus=10, pixels=8575):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = [fits.ImageHDU(np.full(pixels, k, "f4")) for k in range(1, hdus)]
    fits.HDUList([fits.PrimaryHDU(), *arrays]).writeto(path)


# %%
dr14 = RELEASES["dr14"]
desk = Path(tempfile.mkdtemp())
for field_name, sign in (("4230", "+"), ("4262", "-")):
    for k in range(3 if field_name == "4230" else 4):
        write_star(desk / "server" / dr14.path("apstar", field_name, f"2M2133419{k}{sign}0048169"))
write_star(desk / "server" / dr14.allstar, hdus=2)

# %% [markdown]
# One of them, whole, cut short, and exchanged for an apology:

# %%
star = desk / "server" / dr14.path("apstar", "4230", "2M21334190+0048169")
cut = desk / "cut.fits"
page = desk / "page.fits"
cut.write_bytes(star.read_bytes()[:200_000])
page.write_text("<!DOCTYPE html><html><body>Down for maintenance</body></html>")
verdicts = [
    (file.name, file.stat().st_size, file_problem(file, hdus=10) or "whole")
    for file in (star, cut, page)
]
Table(rows=verdicts, names=["file", "bytes", "verdict"])

# %% [markdown]
# Drawn as the chain that it is, with the place of the cut:

# %%
with fits.open(star) as hdul:
    chain = [hdul.fileinfo(k) for k in range(len(hdul))]
fig, ax = plt.subplots(figsize=(9, 1.3))
for k, hdu in enumerate(chain):
    ax.barh(0, hdu["datLoc"] - hdu["hdrLoc"], left=hdu["hdrLoc"], color="0.35")
    ax.barh(0, hdu["datSpan"], left=hdu["datLoc"], color=f"C{k % 2 * 9}", alpha=0.7)
    ax.text(hdu["datLoc"] + hdu["datSpan"] / 2, 0, str(k) if k else "", ha="center", va="center")
ax.axvline(200_000, color="C3", lw=2)
ax.set(
    yticks=[],
    xlabel="byte of the file (grey: headers; numbers: HDU)",
    xlim=(0, star.stat().st_size),
);

# %% [markdown]
# **What to see.** The red line falls into HDU 6, and the verdict names it. The next test cuts the file at *every* block: none of the halves passes,
# although astropy opens most of them with no more than a warning. A cut exactly between two HDUs leaves a perfect FITS file; only the number of HDUs
# gives it away.

# %%
assert file_problem(cut, hdus=10).startswith("truncated: HDU 6 ends at byte")
content = star.read_bytes()
for end in range(0, len(content), 2880):
    cut.write_bytes(content[:end])
    assert file_problem(cut, hdus=10), end
assert file_problem(star, hdus=10) == ""
assert file_problem(star, hdus=11) == "only 10 of 11 HDUs"
# astropy's own account of the file:
assert chain[-1]["datLoc"] + chain[-1]["datSpan"] == len(content)
cut.write_bytes(content[: chain[3]["hdrLoc"]])
assert file_problem(cut, hdus=10) == "only 3 of 10 HDUs"

# %% [markdown]
# ## What the server says it has
# A web server that serves a folder answers with a page of links. The page comes from outside, so we believe as little of it as we can: of every link
# we work out where it leads, and keep it only if that is a plain name in the very folder that we asked for. What is a star's file,
# `Release.parse_name` says later.

# %%
#| export
# Names of files and folders: no slash, no hidden file, no "..", nothing that a shell would read.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class _Listing:
    "What a folder holds."

    files: tuple
    folders: tuple


class _Links(HTMLParser):
    "Collects the plain names that an index page links to."

    def __init__(self, url):
        super().__init__()
        self.files = {}  # dicts, for they keep the order
        self.folders = {}
        self.url = url
        self.server, steps = self._address(url)
        self.here = steps[:-1]

    @staticmethod
    def _address(url):
        "The server of a URL, and the steps of its path."
        parts = urlsplit(url)
        # Cut first, then unquoted: an escaped slash cannot make a step.
        steps = [unquote(step) for step in parts.path.split("/")]
        return (parts.scheme, parts.hostname, parts.port), steps

    def handle_starttag(self, tag, attrs):
        href = dict(attrs).get("href") if tag == "a" else None
        if not href:
            return
        try:
            url = urljoin(self.url, href.strip())
            server, steps = self._address(url)
            extras = urlsplit(url).query or urlsplit(url).fragment
        except ValueError:  # not an address at all
            return
        is_folder = steps[-1] == ""
        *parents, name = (steps[:-1] if is_folder else steps) or [""]
        is_here = (server, parents) == (self.server, self.here) and not extras
        if is_here and _PLAIN_NAME.fullmatch(name):
            (self.folders if is_folder else self.files)[name] = None


# %%
#| export
def _parse_index(chunks, url):
    """Names in an HTML directory index (Apache's and the like), which comes in pieces.

    Links that lead elsewhere, up, or to a query are not names."""
    links = _Links(url)
    try:
        for block in _blocks(chunks):
            links.feed(block)
            if len(links.rawdata) > _MAX_TAG:  # a tag that never ends would be read again and again
                links.rawdata = ""
        links.close()
    except AssertionError:  # how html.parser of some Pythons answers a broken <![declaration
        pass
    return _Listing(tuple(links.files), tuple(links.folders))


_MAX_TAG = 1 << 16  # letters; what is longer is no tag


def _blocks(chunks):
    "The same text in pieces of equal length."
    text = ""
    for chunk in chunks:
        text += chunk
        while len(text) >= _MAX_TAG:
            yield text[:_MAX_TAG]
            text = text[_MAX_TAG:]
    yield text


# %%
base = "https://archive.org.invalid/sas/4230/"
names = [
    "apStar-r8-2M21334190%2B0048169.fits",
    "../secret.fits",
    "https://evil.invalid/apStar-r8-x.fits",
    "?C=M;O=A",
    "..%2Fsecret.fits",
    "/etc/passwd",
    "apStar-r8-2M21334190+0048169.fits",
    "sub/",
    "javascript:alert(1)",
    ".hidden",
    "a b.fits",
    "https://archive.org.invalid/sas/4230/b.fits",
]
links = "".join(f'<a href="{name}">{name}</a>\n' for name in names)
index = f"<h1>Index of /4230</h1>{links}"
listing = _parse_index([index], base)
listing

# %%
assert listing.files == ("apStar-r8-2M21334190+0048169.fits", "b.fits")
assert listing.folders == ("sub",)
assert _parse_index(index, base) == listing  # letter by letter: a page may come in any pieces
assert _parse_index(["<![x[ <a href='a.fits'>"], base).folders == ()  # broken pages break nothing
assert _parse_index(['<a href="/else/a.fits">'], base).files == ()
assert _parse_index(["<a " + "x" * 200_000, "> <a href='a.fits'>"], base).files == ("a.fits",)

# %% [markdown]
# ## Patience
# How many downloads run at once, how long do we wait, how often do we try? These answers travel together through the whole chapter, so they stand in
# one record. It also holds the one thing by which everything can be stopped.

# %%
#| exporti
_MAX_WAIT = 60  # s; the longest pause between two tries, whatever the server asks for


@dataclass(frozen=True)
class Patience:
    """How hard a fetch tries, and whether it shows how far it is.

    Parameters
    ----------
    workers : int, default 4
        Downloads, and connections, at once.
    timeout : float, default 30
        Seconds without a byte, or with hardly any, after which a connection is given up.
    tries : int, default 5
        Tries in a row for each file.
    backoff : float, default 0.5
        Seconds of pause after the first failure, doubled after each further one.
    progress : bool, default True
        Show bars.
    stop : threading.Event, optional
        Once it is set, all workers stop at their next chunk.

    Raises
    ------
    LabError
        If `workers` or `tries` is below 1.
    """

    workers: int = 4
    timeout: float = 30
    tries: int = 5
    backoff: float = 0.5
    progress: bool = True
    stop: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    def __post_init__(self):
        if int(self.workers) < 1 or int(self.tries) < 1:
            raise LabError(
                f"workers and tries must be at least 1, not {self.workers} and {self.tries}"
            )

    def pause(self, attempt: int) -> float:
        "Seconds to wait before the next try, after `attempt` failed ones."
        return min(self.backoff * 2**attempt, _MAX_WAIT)


# %%
[Patience().pause(attempt) for attempt in range(10)]


# %% [markdown]
# What can go wrong is one of four things: the file is *missing*, the source *refuses*, the connection was *dropped*, or what came is *damaged*. Only the
# last two are worth another try.
#
# How often do we try? A connection that drops five times in a row is hopeless, but over a shaky line a catalogue of 4 GB may need fifty drops to
# arrive, and each of them brought us further. So a megabyte of progress wipes the slate clean. A file that arrived complete and is wrong gets one
# more chance (a proxy's apology may be gone in a moment); after that we believe that the source itself has it so.

# %%
#| exporti
class SourceError(Exception):
    """A source did not give what it was asked for.

    Its text may quote the source, so nothing in it can move a terminal's cursor.

    Parameters
    ----------
    reason : str
        What went wrong.

    Attributes
    ----------
    cause : str
        "missing", "refused", "dropped" or "damaged".
    """

    cause = ""

    def __init__(self, reason=""):
        super().__init__(_harmless(reason))


def _harmless(text):
    "One line of a stranger's text, without what a terminal would obey."
    plain = "".join(letter if letter.isprintable() else "?" for letter in str(text))
    return plain if len(plain) <= 300 else plain[:300] + "…"


class _Missing(SourceError):
    "The source does not have it."

    cause = "missing"


class _Refused(SourceError):
    "The source does not give it, and asking again now is pointless."

    cause = "refused"


class _Dropped(SourceError):
    "It broke off: worth another try."

    cause = "dropped"


class _Damaged(_Dropped):
    "It came as promised and is wrong all the same: worth one more try, no more."

    cause = "damaged"


# %%
#| export
def _persist(action, patience, received=lambda: 0):
    """Do it again while it is dropped, so many times in a row without a megabyte of progress.

    What comes damaged is asked for once more. `received` says how many bytes are there."""
    attempt = 0
    damaged = 0
    best = received()
    while True:
        try:
            return action()
        except _Dropped as error:
            attempt += 1
            damaged += isinstance(error, _Damaged)
            if received() > best + (1 << 20):
                attempt = 0
                best = received()
            hopeless = attempt >= patience.tries or damaged > 1
            if hopeless or patience.stop.wait(patience.pause(attempt)):
                raise


# %% [markdown]
# A connection that always drops, but brings two megabytes each of the first four times:

# %%
calls = []


def drops():
    calls.append(len(calls))
    raise _Dropped


print(_Refused("503 \x1b[2J\x07 gone"))
hasty = Patience(tries=3, backoff=0.001, progress=False)
with pytest.raises(SourceError):
    _persist(drops, hasty, received=lambda: min(len(calls), 4) * (2 << 20))
print(f"given up after {len(calls)} tries")
assert len(calls) == 4 + 3  # four got further and count for nothing; then three were in vain

# %% [markdown]
# ## Two sources with one face
# An archive stands on a server or in a folder, on a disk that a colleague lent us, say. For the rest of this chapter both are a *source* that can do
# three things: `list` a folder, `stat` a file (its size and a tag that changes when the file does), `open` it from some byte on. First the words in which
# they answer, and how the errors of a file system become those of a source.

# %%
#| export
_CHUNK = 1 << 16  # bytes read at a time


@dataclass(frozen=True)
class _Remote:
    "What a source says about a file."

    size: int | None  # bytes, None where it does not say
    tag: str = ""  # differs when the content does; "" where there is none


@dataclass
class _Body:
    "An open file of a source."

    remote: _Remote
    offset: int  # the first byte that `chunks` brings
    chunks: object  # iterator of bytes


@contextmanager
def _refusing():
    "A file system's errors as a source's."
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _Missing(error.strerror) from error
    except OSError as error:
        raise _Refused(error.strerror or str(error)) from error


# %%
for path in (desk / "nowhere", desk):
    try:
        with _refusing():
            path.read_bytes()
    except SourceError as error:
        print(f"{error.cause}: {error}")


# %% [markdown]
# A folder is the simple one.

# %%
#| export
class _FolderSource:
    "An archive in a folder."

    def __init__(self, folder):
        self.root = Path(folder)
        self.name = str(folder)

    def list(self, folder):
        "Names in a folder below the root."
        with _refusing(), os.scandir(self.root / folder) as entries:
            plain = [entry for entry in entries if _PLAIN_NAME.fullmatch(entry.name)]
            names = sorted((entry.name, entry.is_dir()) for entry in plain)
        return _Listing(
            tuple(name for name, is_dir in names if not is_dir),
            tuple(name for name, is_dir in names if is_dir),
        )

    def stat(self, path):
        "Size and tag of a file below the root."
        other = what_stands_at(self.root / path)
        if other:
            raise (_Missing if other == "a folder" else _Refused)(f"{other}, not a file")
        with _refusing():
            stat = os.stat(self.root / path)
        return _Remote(stat.st_size, f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"')

    @contextmanager
    def open(self, path, offset=0, expected=None):
        "The file from byte `offset` on if it is still the `expected` one, else from its start."
        remote = self.stat(path)
        offset = offset if remote == expected and offset < remote.size else 0
        with ExitStack() as opened:
            with _refusing():
                file = opened.enter_context(open(self.root / path, "rb"))
                file.seek(offset)
            yield _Body(remote, offset, self._chunks(file))

    def close(self):
        "Nothing to close; an HTTP source has connections."

    @staticmethod
    def _chunks(file):
        with _refusing():
            while chunk := file.read(_CHUNK):
                yield chunk


# %%
here = dr14.folder("apstar", "4230")
_FolderSource(desk / "server").list(here)


# %% [markdown]
# ## A server for one
# To try the other one we need a server, and Python brings one. Ours knows three things more than Python's: the tag of a file (`ETag`), how to send the
# rest of it (`Range`), and to be quiet.

# %%
#| exporti
class ArchiveHandler(SimpleHTTPRequestHandler):
    """Serves a folder: HTML index, ETag, and open-ended ranges (RFC 9110).

    The handler that `serve` takes unless it is given another one. A server that misbehaves
    for a test is made of a subclass."""

    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True  # small answers leave at once

    def log_message(self, format, *args):
        "Say nothing."

    def send_head(self):
        "Send status and headers; returns the open file from which the body is copied."
        path = self.translate_path(self.path)
        if not os.path.isfile(path) or path.endswith("/"):
            return super().send_head()
        tag = _FolderSource("/").stat(path).tag
        file = open(path, "rb")
        size = os.fstat(file.fileno()).st_size
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and self.headers.get("If-Range", tag) == tag else 0
        if start and start >= size:
            file.close()
            self.send_error(416)
            return None
        file.seek(start)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Length", str(size - start))
        self.send_header("ETag", tag)
        self.end_headers()
        return file


# %% [markdown]
# Four things of Python's handler are changed:

# %%
[name for name in vars(ArchiveHandler) if not name.startswith("_")]


# %% [markdown]
# `serve` runs it in a thread while a `with` block lasts, on this machine's loopback address, where nobody else can reach it. With port 0 the system
# chooses a free port, so two notebooks never quarrel over one.

# %%
#| export
class _Server(ThreadingHTTPServer):
    "Ignores a client that hangs up; other errors are printed."

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serve(folder, port: int = 0, handler=ArchiveHandler):
    """Serve a folder over HTTP on the loopback address while a `with` block runs.

    Parameters
    ----------
    folder : str or Path
        The root of an archive.
    port : int, default 0
        0 takes any free one.
    handler : type, default ArchiveHandler
        Class that answers the requests.

    Yields
    ------
    str
        The URL of the root.

    Raises
    ------
    LabError
        If there is no such folder, or the port cannot be had.
    """
    if not Path(folder).is_dir():
        raise LabError(f"there is no folder {folder} to serve")
    try:
        server = _Server(("127.0.0.1", port), partial(handler, directory=os.fspath(folder)))
    except (OSError, OverflowError) as error:
        raise LabError(
            f"cannot serve on port {port}: {error}; choose another one, or 0 for any that is free"
        ) from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.daemon = True
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# %% [markdown]
# Four questions to it: the index of a folder, a star, the rest of that star from byte 200,000 on, and a star that it does not have.

# %%
questions = [
    ("index", f"{here}/", {}),
    ("star", f"{here}/{star.name}", {}),
    ("rest of it", f"{here}/{star.name}", {"Range": "bytes=200000-"}),
    ("nobody", f"{here}/apStar-r8-nobody.fits", {}),
]
rows = []
with serve(desk / "server") as url, requests.Session() as session:
    session.trust_env = False  # no proxy between this machine and itself
    for name, path, headers in questions:
        answer = session.get(f"{url}/{path}", headers=headers)
        rows.append((name, answer.status_code, answer.reason, len(answer.content)))
Table(rows=rows, names=["asked for", "status", "in words", "bytes"])

# %%
assert [row[1] for row in rows] == [200, 200, 206, 404]
assert rows[2][3] == rows[1][3] - 200_000

# %% [markdown]
# ## Over HTTP
# `requests` keeps the connections open and urllib3's `Retry` asks again, after growing pauses or when the server says (`Retry-After`),
# when a connection cannot be made or the answer is 429 or 5xx. We stay polite: a name to complain about in `User-Agent`, and no more connections than
# workers. First four small helpers.

# %%
#| export
_MAX_TEXT = 1 << 26  # bytes; an index or archive.json beyond that is not one


class _ShortRetry(Retry):
    "urllib3's Retry, but a server's Retry-After of a day does not keep us for a day."

    def get_retry_after(self, response):
        wait = super().get_retry_after(response)
        return None if wait is None else min(wait, _MAX_WAIT)


def _is_loopback(host):
    "Whether a host is this machine itself."
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bounded(chunks):
    "The same chunks, but no more than a text can have."
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > _MAX_TEXT:
            raise _Refused(f"more than {_MAX_TEXT >> 20} MB where a page was expected")
        yield chunk


def _why(error):
    "The innermost reason of an error of requests or urllib3, without its addresses in memory."
    while True:
        inner = getattr(error, "reason", None) or next(
            (arg for arg in error.args if isinstance(arg, Exception)), None
        )
        if not isinstance(inner, Exception):
            where = r"^.*?(?:HTTPS?Connection(?:Pool)?\(.*?\)|<[^>]*>): "
            return re.sub(where, "", str(error)) or type(error).__name__
        error = inner


# %%
assert _ShortRetry(3).new().get_retry_after(requests.Response()) is None
hosts = ("127.0.0.1", "::1", "localhost", "data.sdss.org")
assert [_is_loopback(host) for host in hosts] == [True, True, True, False]
with requests.Session() as session:
    session.trust_env = False
    try:
        session.get("http://127.0.0.1:9")
    except requests.RequestException as error:
        print(_why(error))


# %% [markdown]
# A time limit for each read is not enough: a server that sends a letter of its headers now and then would keep us for ever. So status and headers
# together must be there in time, or the connection is hung up.

# %%
#| export
class _InTime:
    "A connection that hangs up when status and headers do not come in time, however they trickle."

    def getresponse(self):
        late = threading.Event()
        timer = threading.Timer(self.sock.gettimeout() or 60, self._hang_up, [late])
        timer.daemon = True
        timer.start()
        try:
            response = super().getresponse()
        finally:
            timer.cancel()
        if late.is_set():  # the end of a connection looks like the end of its headers
            response.close()
            raise TimeoutError("the headers did not come in time")
        return response

    def _hang_up(self, late):
        late.set()
        with suppress(OSError, AttributeError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


class _HttpInTime(_InTime, HTTPConnection):
    "Over http."


class _HttpsInTime(_InTime, HTTPSConnection):
    "Over https."


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _HttpInTime


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _HttpsInTime


class _Adapter(HTTPAdapter):
    "The adapter of requests, with these connections."

    def init_poolmanager(self, *args, **options):
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def proxy_manager_for(self, *args, **options):
        manager = super().proxy_manager_for(*args, **options)
        manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
        return manager


# %%
class Slow(ArchiveHandler):
    "Sends a header that never ends, a letter now and then."

    def do_GET(self):
        with suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.02)


with serve(desk / "server", handler=Slow) as url, requests.Session() as session:
    session.trust_env = False
    session.mount("http://", _Adapter())
    begun = time.monotonic()
    with pytest.raises(requests.RequestException):
        session.get(url, timeout=0.3)
    assert time.monotonic() - begun < 1.5

# %% [markdown]
# A body is read as it comes (`read1`), so that one that trickles in is noticed, not waited for.

# %%
#| export
_MIN_RATE = 500  # bytes per second; a body that comes slower has stalled
_PAGE_TIMEOUTS = 10  # a page may take so many timeouts in all


def _session(parts, patience):
    "A session for the server of a URL: polite, patient, with as many connections as workers."
    session = requests.Session()
    # A proxy cannot reach this machine's own servers.
    session.trust_env = not _is_loopback(parts.hostname)
    session.headers["User-Agent"] = f"stellar_lab/{__version__}"
    session.headers["Accept-Encoding"] = "identity"
    retry = _ShortRetry(
        patience.tries - 1,
        backoff_factor=patience.backoff,
        backoff_jitter=patience.backoff / 2,
        backoff_max=_MAX_WAIT,
        raise_on_status=False,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=("GET", "HEAD"),
    )
    adapter = _Adapter(
        pool_connections=2, pool_maxsize=patience.workers, max_retries=retry, pool_block=True
    )
    session.mount(f"{parts.scheme}://", adapter)
    return session


def _chunks(response, timeout, in_all=float("inf")):
    "The body of an answer as it comes, given up when hardly anything comes, or too late `in_all`."
    begun = time.monotonic()
    start = begun
    received = 0
    while True:
        try:
            chunk = response.raw.read1(_CHUNK, decode_content=False)
        except (HTTPError, HTTPException, OSError) as error:
            raise _Dropped(f"broke off: {_why(error)}") from error
        if not chunk:
            return
        yield chunk
        received += len(chunk)
        if time.monotonic() - begun > in_all:
            raise _Dropped(f"too slow: not there after {in_all:g} s")
        if time.monotonic() - start > timeout:
            if received < _MIN_RATE * timeout:
                raise _Dropped(f"too slow: {received} bytes in {timeout:g} s")
            start = time.monotonic()
            received = 0


# %%
with serve(desk / "server") as url, _session(urlsplit(url), hasty) as session:
    with session.get(f"{url}/{here}/{star.name}", stream=True) as answer:
        pieces = [len(chunk) for chunk in _chunks(answer, timeout=10)]
    print(answer.request.headers["User-Agent"], "read", sum(pieces), "bytes as they came")
assert sum(pieces) == star.stat().st_size and max(pieces) <= 1 << 16


# %% [markdown]
# A request is refused, missing, or an answer that we can read. An answer says three things about its file: how long it is, which tag it has, and at which
# byte it starts. The tag of a file is its `ETag`, if it is *strong*: a weak one (`W/…`) promises only that the meaning is the same, not the bytes, and a
# date does not even promise that. The rest of a file (status 206) is taken only if it starts at the byte that we asked for, belongs to a file of the same
# size and carries the same tag; anything else is thrown away and the whole file asked for. Without a strong tag nobody can say that the rest belongs to
# the beginning, so a file without one always starts anew.

# %%
#| export
def _status_problem(response, url):
    "The error that an answer is, None if we can read it."
    status = f"{response.status_code} {response.reason}"
    if response.url.startswith("http:") and url.startswith("https:"):
        return _Refused("the server leads from https to http")
    if response.status_code in (404, 410):
        return _Missing(status)
    return _Refused(status) if response.status_code not in (200, 206, 416) else None


def _remote(response):
    "Size and tag of a file, as far as an answer tells."
    length = response.headers.get("Content-Length", "")
    tag = response.headers.get("ETag", "")
    tag = tag if re.fullmatch(r'"[^"]+"', tag) else ""  # a weak tag does not promise the same bytes
    return _Remote(int(length) if length.isdecimal() and length.isascii() else None, tag)


def _start(response, offset, expected):
    """What an answer brings, and from which byte on.

    None if it is not the rest of the file that we have the start of."""
    remote = _remote(response)
    if response.status_code == 200:
        return remote, 0
    if response.status_code != 206 or not offset:  # 416: there is no such rest
        return None
    content_range = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range)
    if not match or match[2] == "*":
        return None
    same_place = int(match[1]) == offset and int(match[2]) == expected.size
    same_file = remote.tag == expected.tag != ""
    return (expected, offset) if same_place and same_file else None


# %%
answer = requests.Response()
answer.status_code = 206
answer.headers["Content-Range"] = "bytes 100-999/1000"
answer.headers["ETag"] = '"v1"'
for expected in (_Remote(1000, '"v1"'), _Remote(1000, '"v2"'), _Remote(2000, '"v1"')):
    print(expected, "->", _start(answer, 100, expected))
assert _start(answer, 200, _Remote(1000, '"v1"')) is None  # another place


# %% [markdown]
# Now the source itself. Of an index it is the address that *answered* which counts, for a server may have led us elsewhere.

# %%
#| export
class _HttpSource:
    "An archive on a web server."

    def __init__(self, url, patience=None):
        self.url = url.rstrip("/") + "/"
        parts = urlsplit(self.url)
        without_password = parts.netloc.rpartition("@")[2]
        self.name = parts._replace(netloc=without_password).geturl()  # for messages
        self.patience = patience or Patience()
        self.session = _session(parts, self.patience)

    def list(self, folder):
        "Names in the index of a folder below the root."
        with self._request("GET", f"{folder}/" if folder else "") as response:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            in_all = _PAGE_TIMEOUTS * self.patience.timeout
            text = _bounded(_chunks(response, self.patience.timeout, in_all))
            return _parse_index(map(decoder.decode, text), response.url)

    def stat(self, path):
        "Size and tag of a file below the root, as far as the server tells."
        try:
            with self._request("HEAD", path) as response:
                remote = _remote(response)
        except _Refused:  # some servers do not answer HEAD; the download will tell
            return _Remote(None)
        # 0 is how some servers say that they do not know
        return _Remote(remote.size or None, remote.tag)

    @contextmanager
    def open(self, path, offset=0, expected=None):
        "The file from byte `offset` on if it is still the `expected` one, else from its start."
        headers = {}
        if offset:
            headers = {"Range": f"bytes={offset}-", "If-Range": expected.tag}
        with self._request("GET", path, headers) as response:
            start = _start(response, offset, expected)
            if start:
                yield _Body(*start, _chunks(response, self.patience.timeout))
            elif not offset:
                status = f"{response.status_code} {response.reason}"
                raise _Dropped(f"a plain question was answered with {status}")
        if not start:
            with self.open(path) as body:
                yield body

    def close(self):
        "Close all connections."
        self.session.close()

    def _request(self, method, path, headers=None):
        url = self.url + quote(path, safe="/+")
        timeout = (min(self.patience.timeout, 10), self.patience.timeout)  # to connect, to read
        try:
            response = self.session.request(
                method, url, headers=headers, stream=True, timeout=timeout
            )
        except (requests.RequestException, ValueError) as error:
            raise _Refused(_why(error)) from error
        problem = _status_problem(response, url)
        if problem:
            response.close()
            raise problem
        return response


# %% [markdown]
# Do the two sources really have one face? Ask both for the same things.

# %%
path = f"{here}/{star.name}"
rows = []
with serve(desk / "server") as url:
    for origin in (_FolderSource(desk / "server"), _HttpSource(url)):
        listing = origin.list(here)
        remote = origin.stat(path)
        with origin.open(path, 1000, remote) as body:
            rest = b"".join(body.chunks)
            assert body.offset == 1000 and rest == star.read_bytes()[1000:]
        older = _Remote(remote.size, '"older"')
        with origin.open(path, 1000, older) as body:  # the file is not what it was:
            assert body.offset == 0  # from the start, then
            assert b"".join(body.chunks) == star.read_bytes()
        with pytest.raises(_Missing):
            origin.stat(f"{here}/apStar-r8-nobody.fits")
        parent = str(Path(here).parent)
        assert len(listing.files) == 3 and origin.list(parent).folders == ("4230", "4262")
        assert remote.size == star.stat().st_size
        kind = type(origin).__name__
        rows.append((kind, len(listing.files), remote.size, len(rest), len(star.read_bytes())))
        origin.close()
Table(rows=rows, names=["source", "files listed", "size", "from byte 1000", "older version"])

# %% [markdown]
# Which of the two it is, the address says.

# %%
#| exporti
_EXAMPLE = "https://data.sdss.org/sas"


def open_source(source, patience: Patience = None):
    """Open an archive on a server or in a folder.

    Parameters
    ----------
    source : str or Path
        An https or http URL, or a folder: the root of an archive.
    patience : Patience, optional
        How hard to try; the defaults of `Patience` without it.

    Returns
    -------
    object
        A source: `list(folder)` gives names, `stat(path)` size and tag, `open(path, offset)` is
        a context with the bytes, `close()` ends it. These raise `SourceError`.

    Raises
    ------
    LabError
        If there is no such folder, or the URL is none that we can fetch from.
    """
    text = os.fspath(source)
    if "://" not in text:
        if not Path(text).is_dir():
            raise LabError(
                f"there is no folder {text} to fetch from: give the root of an archive, "
                f"a folder or a URL such as {_EXAMPLE}"
            )
        return _FolderSource(text)
    try:
        parts = urlsplit(text)
        is_web = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if is_web and not (parts.query or parts.fragment):
            return _HttpSource(text, patience)
    except ValueError:  # a port that is no number, an address that is none
        pass
    raise LabError(f"cannot fetch from {text}: give a folder or a URL such as {_EXAMPLE}")


# %%
for address in (desk / "server", "https://data.sdss.org/sas", "ftp://data.sdss.org"):
    try:
        print(type(open_source(address)).__name__)
    except LabError as error:
        print("LabError:", error)


# %% [markdown]
# ## One file
# A file grows under the name `….part`. Beside it a note (`….part.note`) keeps what the source said about it, so that the next run, tomorrow perhaps,
# can ask for the rest, *if the file has not changed* (`If-Range`). A source that ignores the question sends all of it, and we start over; so we do
# when the rest belongs to a newer version. Only a file without a problem gets its name.

# %%
#| export
@dataclass(slots=True)
class _Item:
    "One file to bring home."

    path: str  # below the root, where it goes
    origin: str  # below the source
    hdus: int = 0  # HDUs that it has at least, 0 for what is no FITS file
    elsewhere: tuple = ()  # other paths below the root where it counts as there
    size: int | None = None  # bytes, as the source says
    state: str = "to fetch"  # then "fetched", "already there" or "failed"
    reason: str = ""  # why it failed
    stale: bool = False  # what stands at home is not what a fetch brought
    cause: str = ""  # "missing", "refused", "dropped" or "damaged" if it failed
    star: str = ""  # whose spectrum it should be
    sha256: str = ""  # its checksum, where the archive knows it
    received: int = 0  # bytes that came
    shown: int = 0  # bytes that the progress bar knows of

    def fail(self, reason, cause=""):
        "It is not there, and why."
        self.state = "failed"
        self.reason = str(reason)
        self.cause = cause


def _beside(target, ending):
    "The name that a file has while it is not whole, or that of the note about it."
    return target.with_name(f"{target.name}.{ending}")


def _started(part, note):
    "How much of a file is there from an earlier try, and what the source said about it then."
    try:
        kept = json.loads(note.read_text(encoding="utf-8"))
        remote = _Remote(kept["size"], kept["tag"])
        offset = part.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None
    is_tagged = isinstance(remote.tag, str) and remote.tag != ""
    known = is_tagged and isinstance(remote.size, int) and offset < remote.size
    return (offset, remote) if known else (0, None)


# %%
part = _beside(desk / "a.fits", "part")
note = _beside(desk / "a.fits", "part.note")
part.write_bytes(b"SIMPLE")
for text in ("", '{"size": 57600, "tag": "v1"}'):
    note.write_text(text)
    print("with" if text else "without", "a note:", _started(part, note))

# %% [markdown]
# A FITS file says how long it is, and we read that while it comes. A body that goes on behind its last HDU, or whose headers promise more than the disk
# holds, is stopped: a server that sends without end must not fill the disk.

# %%
#| export
_MAX_HEADER = 1 << 20  # bytes; no header is longer
_MAX_HDUS = 1000


def _bytes(number):
    "A number of bytes as people read it."
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f} bytes"


class _Promise:
    "How long a FITS file that is being written will be, by the headers that have come."

    def __init__(self, part):
        self.part = part
        self.end = 0
        self.hdus = 0

    def check(self, length):
        "Stop if the file has outgrown its headers, or will outgrow the disk."
        with open(self.part, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", AstropyWarning)  # odd padding is checked at the end
            while self.end + _MAX_HEADER < length:
                file.seek(self.end)
                try:
                    size = fits.Header.fromfile(file).data_size_padded
                except Exception as error:  # astropy answers garbage with many kinds of errors
                    problem = f"more comes than its headers explain ({_bytes(self.end)})"
                    raise _Damaged(problem) from error
                self.end = file.tell() + size
                self.hdus += 1
                if size < 0 or self.hdus > _MAX_HDUS:
                    raise _Damaged("more comes than a file of the survey has")
        missing = self.end - length
        if missing > shutil.disk_usage(self.part.parent).free:
            raise _Refused(f"its headers promise {_bytes(self.end)}, which the disk cannot hold")


# %%
part.write_bytes(star.read_bytes() + bytes(2 << 20))
try:
    _Promise(part).check(part.stat().st_size)
except SourceError as error:
    print(f"{error.cause}: {error}")


# %% [markdown]
# One try is: look how much is there, ask for the rest, append it. The order in which note and bytes are written matters, for we may be killed between
# any two lines: a note must never stand beside bytes of another version. So when a file starts anew, the old note goes first, then the old bytes, and
# only then comes the new note.

# %%
#| export
def _receive(source, item, part, note, show, stop):
    "One try: the whole file, or the rest of it, into `part`."
    offset, expected = _started(part, note)
    with source.open(item.origin, offset, expected) as body:
        if body.remote.size is None and not item.hdus:
            raise _Refused("the server does not say how long it is")
        if not body.offset:
            # First the note, so that it never stands beside another version's bytes.
            note.unlink(missing_ok=True)
            part.write_bytes(b"")
            about = {"size": body.remote.size, "tag": body.remote.tag}
            note.write_text(json.dumps(about), encoding="utf-8")
        length = body.offset
        promise = _Promise(part)
        with open(part, "ab") as file:
            show(item, length)
            for chunk in body.chunks:
                if stop.is_set():
                    raise _Refused("interrupted")
                file.write(chunk)
                length += len(chunk)
                item.received += len(chunk)
                show(item, length)
                if item.hdus and length > promise.end + _MAX_HEADER:
                    file.flush()
                    promise.check(length)
    if body.remote.size not in (None, length):
        raise _Dropped(f"truncated: {length:,} of {body.remote.size:,} bytes came")


# %% [markdown]
# `_fetch_file` ties these together. If something damaged already stands under the final name (another tool left it there), it loses that name before
# we start, so that even a failure leaves nothing wrong behind. Is it no more than a beginning of the right file, or a page of apologies, then it goes
# when the right one has come. Anything else may be somebody's work: it is kept, as `….old`.

# %%
#| export
def _put_aside(target, hdus, star, stale=False):
    "Take its name from a file that cannot be whole: nothing wrong stays under a final name."
    other = what_stands_at(target)
    if other:
        raise _Refused(f"{other} stands in its place")
    if target.exists() and (stale or not hdus or file_problem(target, hdus, star)):
        old = _beside(target, "old")
        number = 1
        while old.exists() and not _is_worthless(old, target):
            number += 1
            old = _beside(target, f"{number}.old")
        os.replace(target, old)


def _is_worthless(old, target):
    "Whether a file holds nothing but a page, or a beginning of what stands at `target`."
    if file_problem(old) in ("empty", "a web page, not data"):
        return True
    size = old.stat().st_size
    if not target.exists() or size > target.stat().st_size:
        return False
    with open(old, "rb") as one, open(target, "rb") as other:
        return all(chunk == other.read(len(chunk)) for chunk in iter(lambda: one.read(_CHUNK), b""))


def _note_sum(root, item, part):
    "Note the checksum of what came, unless the archive's own record has it."
    if not item.sha256:
        line = f"{sha256_of(part)}  {item.path}\n"
        # One write of a few bytes at the end: lines of two threads do not mix.
        with open(Path(root) / SUMS_FILE, "ab", buffering=0) as file:
            file.write(line.encode())


def _check_arrived(item, part):
    "Stop if what came is not what it should be."
    problem = file_problem(part, item.hdus, item.star)
    if not problem and item.sha256 and sha256_of(part) != item.sha256:
        problem = f"another content than {ARCHIVE_FILE} says (its sha256 differs)"
    if problem:
        raise _Damaged(problem)


# %%
#| export
def _fetch_file(source, item, root, patience, show=lambda item, length: None):
    "Bring one file home, whole and under its name, or say in the item why not."
    target = Path(root) / item.path
    part = _beside(target, "part")
    note = _beside(target, "part.note")
    old = _beside(target, "old")

    def attempt():
        try:
            _receive(source, item, part, note, show, patience.stop)
            _check_arrived(item, part)
        except _Damaged:
            note.unlink(missing_ok=True)
            part.unlink(missing_ok=True)
            raise

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _put_aside(target, item.hdus, item.star, item.stale)
        _persist(attempt, patience, lambda: part.stat().st_size if part.exists() else 0)
        _note_sum(root, item, part)
        os.replace(part, target)
        note.unlink(missing_ok=True)
        item.state = "fetched"
        if old.exists() and _is_worthless(old, target):
            old.unlink()
        elif old.exists():
            item.reason = f"what stood there is kept as {old.name}"
    except SourceError as error:
        item.fail(error, error.cause)
    except OSError as error:
        raise LabError(
            f"cannot write {target}: {error.strerror or error}; free the disk or choose another "
            "root, then run the same again: what is whole stays"
        ) from error
    return item


# %% [markdown]
# Here is a server that hangs up after 100,000 bytes of whatever it is asked for. The first run may try only once: it fails, leaves the start of the
# file and the note, and nothing under the final name.

# %%
class HangsUp(ArchiveHandler):
    "Sends 100,000 bytes, then closes the connection."

    asked = []  # the Range of each request

    def copyfile(self, source, outputfile):
        self.asked.append(self.headers.get("Range", "bytes=0-"))
        outputfile.write(source.read(100_000))
        self.close_connection = True


# %%
path = f"{here}/{star.name}"
home = desk / "one file"
with serve(desk / "server", handler=HangsUp) as url:
    once = Patience(tries=1)
    first = _fetch_file(_HttpSource(url, once), _Item(path, path, hdus=10), home, once)
print(first.state, "-", first.reason)
sorted(file.name for file in (home / here).iterdir())

# %% [markdown]
# The second run meets the same bad server but may try five times. Each try asks for what is still missing.

# %%
assert first.state == "failed" and not (home / path).exists()
with serve(desk / "server", handler=HangsUp) as url:
    often = Patience(tries=5, backoff=0.01)
    second = _fetch_file(_HttpSource(url, often), _Item(path, path, hdus=10), home, often)
HangsUp.asked

# %%
starts = [int(asked[len("bytes=") : -1]) for asked in HangsUp.asked]
lengths = [min(100_000, len(content) - start) for start in starts]
fig, ax = plt.subplots(figsize=(7, 1.8))
ax.barh(range(len(starts)), lengths, left=starts, color=["C0", "C2", "C2", "C2"])
ax.axvline(len(content), color="0.4", lw=1)
ax.set(xlabel="byte of the file", xlim=(0, len(content) * 1.01))
ax.set_yticks(range(len(starts)), ["first run"] + [f"second run, try {k}" for k in (1, 2, 3)])
ax.invert_yaxis()

# %% [markdown]
# **What to see.** No byte travelled twice, and the sum of the pieces is the file, to the byte. Only now it has its name.

# %%
assert second.state == "fetched" and (home / path).read_bytes() == content
assert first.received + second.received == len(content)
assert [file.name for file in (home / here).iterdir()] == [star.name]


# %% [markdown]
# ## Which files
# What to fetch follows from records: the release's templates say where a product of a field lies, the index which stars there are. The archive may
# add to it: if it is one of ours, an `archive.json` at its root names its record, further files that belong to it (a mystery star, a truth table) and
# the sha256 of each file. That text comes from outside, too. So its names must be names that our own record of the archive knows: otherwise a source
# could choose which of our files it replaces.

# %%
#| export
@dataclass(frozen=True)
class _Marker:
    "What archive.json at the root of an archive says."

    record: Archive = ARCHIVES["survey"]
    files: tuple = ()  # further files
    content: bytes | None = None  # None where there is no archive.json
    sums: dict = field(default_factory=dict)  # path -> sha256, as far as it says


def _parse_marker(content, where):
    "The marker in the bytes of an archive.json; LabError if it cannot be trusted."
    try:
        marker = json.loads(content)
        name = marker["archive"]
        files = marker.get("files", [])
        sums = marker.get("sha256", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LabError(
            f"{where} does not name an archive ({said_of(error)}): it is damaged, "
            "or this is no archive of stellar_lab"
        ) from error
    if name not in [*ARCHIVES]:
        raise LabError(
            f"{where} names the archive {name!r}, which this version does not know: "
            f"choose from {', '.join(ARCHIVES)}"
        )
    _check_files(files, ARCHIVES[name], where)
    sums = sums if isinstance(sums, dict) else {"": sums}
    if not all(re.fullmatch("[0-9a-f]{64}", str(value)) for value in sums.values()):
        raise LabError(
            f"{where} holds checksums that are none: it is damaged, fetch or write it again"
        )
    return _Marker(ARCHIVES[name], tuple(files), content, sums)


def _check_files(files, record, where):
    "LabError for a file that the archive cannot have."
    unsafe = [file for file in files if not _is_safe(file)] if isinstance(files, list) else [files]
    if unsafe:
        raise LabError(
            f"{where} names the file {unsafe[0]!r}, which is not a path below its root: "
            "do not trust this archive"
        )
    strange = [file for file in files if file not in record.files]
    if strange:
        raise LabError(
            f"{where} names the file {strange[0]!r}, which an archive {record.name!r} does not "
            f"have (it may have {', '.join(record.files)}): do not trust this archive"
        )


def _is_safe(path):
    "A relative path of plain names; not the marker itself, nor a name of a download on its way."
    plain = isinstance(path, str) and all(_PLAIN_NAME.fullmatch(step) for step in path.split("/"))
    return plain and path != ARCHIVE_FILE and not path.endswith((".part", ".part.note", ".old"))


# %%
good = ("truth.fits", "more/truth.ecsv")
bad = ("../x", "/etc/passwd", "a//b", "a/../b", ".ssh/key", "C:\\x", "", "archive.json", "x.part")
assert all(_is_safe(path) for path in good)
assert not any(_is_safe(path) for path in (*bad, 7, None))
marker = _parse_marker(b'{"archive": "clusters", "files": ["truth.fits"]}', "a test")
print(marker.record.title, "and", *marker.files)
with pytest.raises(LabError, match="names the file 'thesis.tex', which an archive 'clusters' does"):
    _parse_marker(b'{"archive": "clusters", "files": ["thesis.tex"]}', "a test")


# %%
#| export
def _read_marker(source, patience):
    "What the archive.json of a source says; the survey's marker without one."

    def read():
        with source.open(ARCHIVE_FILE) as body:
            return b"".join(_bounded(body.chunks))

    try:
        content = _persist(read, patience)
    except _Missing:
        return _Marker()
    except SourceError as error:
        raise LabError(
            f"cannot fetch from {source.name}: {error}; check the address, "
            "and whether the server can be reached from here"
        ) from error
    if content.lstrip()[:1] == b"<":  # a server that answers "no such page" with a page
        return _Marker()
    return _parse_marker(content, f"{ARCHIVE_FILE} of {source.name}")


# %% [markdown]
# What the user asks for is checked before anything is asked of the source: release, fields, products, telescopes. Whatever is left out comes from the
# record.

# %%
#| export
def _release(release, record):
    "The path rules that were asked for, else the archive's own."
    if release is None or isinstance(release, Release):
        return release or record.rules
    if str(release).lower() not in RELEASES:
        raise LabError(f"unknown release {release!r}: choose from {', '.join(RELEASES)}")
    return RELEASES[str(release).lower()]


def _names(names, what):
    "One or several names (a comma may part them) as a tuple, in their order and each once."
    if isinstance(names, str):
        names = names.split(",")
    elif isinstance(names, int):
        names = [names]
    names = tuple(dict.fromkeys(str(name).strip() for name in names))
    if not names:
        raise LabError(f"no {what} was given: name at least one")
    for name in names:
        if not _PLAIN_NAME.fullmatch(name):
            raise LabError(f"{name!r} cannot be a {what}")
    return names


# %%
_names("4230, 4262,4230", "field"), _names(4230, "field")


# %%
#| export
@dataclass(frozen=True)
class _Wanted:
    "What to look for: path rules, fields, products, telescopes."

    release: Release
    fields: tuple
    products: tuple
    telescopes: tuple
    numbers: tuple | None = None  # sdss_ids of a numbered release; None for all that are there


def _wanted(record, release, fields, products, telescopes, sdss_ids=None):
    "What to look for, checked against what the release has."
    rules = _release(release, record)
    if release is None and sdss_ids is not None and not rules.numbered:
        rules = next(rules for rules in RELEASES.values() if rules.numbered)
    products = products or tuple(rules.paths)[:1]
    if rules.numbered or sdss_ids is not None:
        return _wanted_numbers(record, rules, fields, products, sdss_ids)
    if fields is None and rules != record.rules:
        raise LabError(
            f"which fields of {rules.name}? Name them: the record {record.name!r} knows only "
            f"those of {record.rules.name}"
        )
    wanted = _Wanted(
        rules,
        _names(record.fields if fields is None else fields, "field"),
        _names(products, "product"),
        _names(rules.telescopes if telescopes is None else telescopes, "telescope"),
    )
    _check_known(wanted.products, tuple(rules.paths), f"{rules.name} has no product")
    _check_known(wanted.telescopes, rules.telescopes, f"{rules.name} has no telescope")
    return wanted


def _wanted_numbers(record, rules, fields, products, sdss_ids):
    "What to look for in a release that calls its stars by numbers."
    if not rules.numbered:
        raise LabError(f"{rules.name} knows no sdss_id: name fields, or take a release of SDSS-V")
    if fields is not None:
        raise LabError(f"{rules.name} has no fields: name its stars by their sdss_id")
    if sdss_ids is None and rules != record.rules:
        raise LabError(f"which stars of {rules.name}? Name them by their sdss_id")
    products = _names(products, "product")
    _check_known(products, tuple(rules.paths), f"{rules.name} has no product")
    numbers = None if sdss_ids is None else read_sdss_ids(sdss_ids)
    return _Wanted(rules, (), products, rules.telescopes, numbers)


def _check_known(names, known, problem):
    for name in names:
        if name not in known:
            raise LabError(f"{problem} {name!r}: choose from {', '.join(known)}")


# %%
wanted = _wanted(ARCHIVES["survey"], None, "4230,4262", "apstar", None)
wanted.fields, wanted.products, wanted.telescopes


# %% [markdown]
# SDSS-V calls its stars by numbers. A list of them comes as numbers, as a file of text with numbers in it, or as a table with a column `sdss_id`, such
# as a catalogue's own.

# %%
#| exporti
def read_sdss_ids(ids) -> tuple:
    """A list of stars of SDSS-V.

    Parameters
    ----------
    ids : int, str, Path or sequence of int
        Numbers; a text of numbers with commas or blanks between; or the path of a text file, where
        lines may end in a comment (#), or of a table with a column sdss_id (.fits, .csv, .ecsv).

    Returns
    -------
    tuple of int
        Each once, in their order.

    Raises
    ------
    LabError
        If there is none, or something else.

    Examples
    --------
    >>> read_sdss_ids("70350907, 5")
    (70350907, 5)
    """
    words = ids
    if isinstance(ids, (str, os.PathLike)):
        words = _words_of(ids)
    numbers = []
    for word in [words] if isinstance(words, int) else words:
        if not re.fullmatch(r"\d{1,18}", str(word)):
            raise LabError(f"{str(word)[:40]!r} is no sdss_id: give whole numbers, or a file")
        numbers.append(int(word))
    if not numbers:
        raise LabError("no sdss_id was given: name at least one")
    return tuple(dict.fromkeys(numbers))


def _words_of(ids):
    "What stands in a list of sdss_ids: a text, a file of text, or the column of a table."
    path = Path(ids)
    if re.fullmatch(r"[\d\s,]+", str(ids)):
        return str(ids).replace(",", " ").split()
    if not path.is_file():
        raise LabError(f"{ids} is no file, and no list of sdss_ids: give whole numbers")
    try:
        if path.suffix in (".fits", ".gz", ".csv", ".ecsv"):
            table = Table.read(path)
            column = {name.lower(): name for name in table.colnames}.get("sdss_id")
            if column is None:
                known = ", ".join(table.colnames[:8])
                raise LabError(f"{ids} has no column sdss_id, it has {known}")
            return [str(number) for number in table[column]]
        lines = path.read_text(encoding="utf-8").splitlines()
    except LabError:
        raise
    except Exception as error:  # whatever a file that is no table makes astropy raise
        raise LabError(f"{ids} cannot be read as a list of sdss_ids: {_why(error)}") from error
    return " ".join(line.partition("#")[0] for line in lines).replace(",", " ").split()


# %%
(desk / "mine.txt").write_text("70350907 # a giant\n5, 70350907\n")
assert read_sdss_ids(desk / "mine.txt") == read_sdss_ids([70350907, "5"]) == (70350907, 5)
with pytest.raises(LabError, match="'2M21334190.0048169' is no sdss_id: give whole numbers"):
    read_sdss_ids(["2M21334190+0048169"])
_wanted(ARCHIVES["survey"], None, None, None, None, "70350907, 5")


# %% [markdown]
# A field may have been observed by several telescopes, and a folder may follow the original lab's layout instead of the survey's; both are a loop over
# templates, the survey's first. Wherever a file comes from, it goes to the survey's place.

# %%
#| export
def _fill(template, release, field, telescope, star="x"):
    "A template of the release with everything filled in."
    prefix = release.prefixes.get(telescope, "ap")
    return template.format(field=field, telescope=telescope, id=star, prefix=prefix)


def _find_stars(source, release, product, field, telescopes):
    "Files of one product in one field, as the index lists them: stars, not single visits."
    templates = release.templates(product)
    for template in templates:
        folders = set()
        items = {}
        for telescope in telescopes:
            folder = str(PurePosixPath(_fill(template, release, field, telescope)).parent)
            if folder in folders:  # a tree that does not ask for the telescope
                continue
            try:
                listing = source.list(folder)
            except _Missing:
                continue
            folders.add(folder)
            for name in (*listing.files, *listing.folders):
                star = release.parse_name(product, name)
                if star:
                    path, *others = [
                        _fill(other, release, field, telescope, star) for other in templates
                    ]
                    hdus = PRODUCTS[product].hdus
                    item = _Item(path, f"{folder}/{name}", hdus, tuple(others), star=star)
                    if name not in listing.files:
                        item.origin = ""
                        item.fail("a folder, not a file", "missing")
                    items.setdefault(path, item)
        if folders:
            return list(items.values())
    raise _Missing("no such folder")


# %%
with serve(desk / "server") as url:
    stars = _find_stars(_HttpSource(url), dr14, "apstar", "4262", wanted.telescopes)
assert [dr14.parse_name("apstar", Path(item.path).name) for item in stars] == [
    f"2M2133419{k}-0048169" for k in range(4)
]  # southern ones, too
rows = [(Path(item.path).name, item.hdus, item.elsewhere[0]) for item in stars]
Table(rows=rows, names=["file", "HDUs", "or here"])


# %% [markdown]
# And which fields are there? The folder above a field's folder lists them, so an error can name those that come close to what was typed.

# %%
#| export
def _list_fields(source, release, product="apstar"):
    "Sorted names of the fields that a source has, whatever the telescope; empty if it says none."
    names = set()
    for telescope in release.telescopes:
        for template in release.templates(product):
            parent = PurePosixPath(_fill(template, release, "x", telescope)).parent.parent
            try:
                names.update(source.list(str(parent)).folders)
            except SourceError:
                continue
    return sorted(names)


def _no_field(source, wanted, product, field):
    "The error that says which fields there are instead."
    there = _list_fields(source, wanted.release, product)
    folder = wanted.release.folder(product, field, wanted.telescopes[0])
    if not there:
        return LabError(
            f"{source.name} has no field {field!r}: there is no {folder} in it; "
            f"the root of an archive is the folder that holds {folder.split('/')[0]}"
        )
    close = get_close_matches(field, there, n=10, cutoff=0.5) or there[:10]
    more = f" and {len(there) - len(close)} more" if len(there) > len(close) else ""
    return LabError(
        f"{source.name} has no field {field!r} with {product} files of {wanted.release.name}; "
        f"it has {', '.join(close)}{more}"
    )


# %%
assert _list_fields(_FolderSource(desk / "server"), RELEASES["dr17"]) == []
fields = _list_fields(_FolderSource(desk / "server"), dr14)
assert fields == ["4230", "4262"]
fields


# %% [markdown]
# All of it together: the catalogue once, the further files, and the stars of each field and product. The folders are listed side by side. One that
# cannot be listed does not stop the others, but the summary will say that it is not complete; one that does not exist stops everything, before a byte
# has moved.

# %%
#| export
def _side_by_side(items, work, patience):
    """Do `work` on each item with a few threads; gives the results as they come.

    Whatever breaks the loop (close it!) stops the workers."""
    with ThreadPoolExecutor(patience.workers) as pool:
        try:
            for future in as_completed([pool.submit(work, item) for item in items]):
                yield future.result()
        except BaseException:
            patience.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _find_catalogue(source, release):
    "The allStar table, wherever the release or the original lab keeps it."
    path, *others = release.templates("allstar")
    hdus = 0 if path.endswith(".gz") else 2
    for template in (path, *others):
        try:
            source.stat(template)
            return _Item(path, template, hdus, tuple(others))
        except SourceError:
            continue
    return _Item(path, path, hdus, tuple(others))


def _find_field(source, wanted, product, field, patience):
    "Files of one product in one field; the folder itself as a failed one where there are none."
    folder = wanted.release.folder(product, field, wanted.telescopes[0])
    nothing = _Item(f"{folder}/", "", state="failed", reason=f"no {product} file of a star in it")
    try:
        find = partial(_find_stars, source, wanted.release, product, field, wanted.telescopes)
        return _persist(find, patience) or [nothing]
    except _Missing:
        raise _no_field(source, wanted, product, field) from None
    except SourceError as error:
        nothing.reason = f"cannot be listed: {error}"
        return [nothing]


# %% [markdown]
# A star of SDSS-V needs no index: its number says where it is. Only an archive of ours, which is small, is asked for all of its stars.

# %%
#| export
_MWM_HDUS = 5  # of mwmStar and mwmVisit files


def _find_numbered(source, wanted, patience):
    "Files of the stars of a numbered release that were asked for, or of all that are there."
    items = []
    for product in wanted.products:
        numbers = wanted.numbers
        if numbers is None:
            numbers = _persist(partial(_list_numbers, source, wanted.release, product), patience)
        for number in numbers:
            path = wanted.release.path(product, sdss_id_folder(number), str(number))
            items.append(_Item(path, path, _MWM_HDUS, star=str(number)))
    return items


def _list_numbers(source, release, product):
    "The sdss_ids of all stars of a source, folder by folder; none where it lacks the product."
    top = PurePosixPath(release.folder(product, "x/y")).parent.parent
    numbers = []
    with suppress(_Missing):
        for first in source.list(str(top)).folders:
            for second in source.list(str(top / first)).folders:
                names = source.list(str(top / first / second)).files
                stars = [release.parse_name(product, name) for name in names]
                numbers += [int(star) for star in stars if star]
    return numbers


# %%
#| export
def _find_all(source, wanted, extra, catalogue, patience):
    "Every file that belongs to what was asked for, each once."
    if wanted.release.numbered:
        stars = _find_numbered(source, wanted, patience)
        if not stars:
            raise LabError(f"found nothing to fetch at {source.name}: no star's file is there")
    else:
        stars = _find_in_fields(source, wanted, patience)
    items = [_find_catalogue(source, wanted.release)] if catalogue else []
    items += [_Item(path, path, 1 if path.endswith(".fits") else 0) for path in extra]
    return list({item.path: item for item in items + stars}.values())


def _find_in_fields(source, wanted, patience):
    "The stars' files of all fields and products; LabError where there are none."
    asked = [(product, field) for product in wanted.products for field in wanted.fields]
    find = partial(_find_field, source, wanted, patience=patience)
    with closing(_side_by_side(asked, lambda pair: find(*pair), patience)) as found:
        stars = sorted((item for items in found for item in items), key=lambda item: item.path)
    if all(item.state == "failed" for item in stars):
        first = stars[0]
        raise LabError(f"found nothing to fetch at {source.name}: {first.path}: {first.reason}")
    return stars


def _give_sums(items, sums):
    "Checksums for the items whose archive knows them."
    for item in items:
        item.sha256 = sums.get(item.origin, "")


# %%
items = _find_all(_FolderSource(desk / "server"), wanted, (), True, Patience())
assert len(items) == 1 + 3 + 4
[Path(item.path).name for item in items]


# %% [markdown]
# ## All of them
# A summary says what was found, what is there now, and what is not and why. First it counts.

# %%
#| export
@dataclass
class _Counts:
    "What became of some files."

    root: str
    source: str
    archive: str  # name of the record
    release: str
    items: list = field(default_factory=list, repr=False)  # of _Item
    dry_run: bool = False

    def count(self, state: str) -> int:
        "How many files are in a state: `to fetch`, `fetched`, `already there`, `failed`."
        return sum(item.state == state for item in self.items)

    @property
    def found(self) -> int:
        "Files that belong to what was asked for."
        return len(self.items)

    @property
    def fetched(self) -> int:
        "Files that came now."
        return self.count("fetched")

    @property
    def already_there(self) -> int:
        "Files that were there before, whole."
        return self.count("already there")

    @property
    def failed(self) -> int:
        "Files that are not there."
        return self.count("failed")

    @property
    def damaged(self) -> int:
        "Failed files that came as the source has them, which is wrong: another run will not help."
        return sum(item.cause == "damaged" for item in self.items)

    @property
    def bytes(self) -> int:
        "Bytes that came over the line."
        return sum(item.received for item in self.items)

    @property
    def bytes_to_fetch(self) -> int:
        "Bytes of the files that are still to be fetched, as far as the source says."
        return sum(item.size or 0 for item in self.items if item.state == "to fetch")


# %%
counts = _Counts("home", "a folder", "survey", "DR14", items)
items[1].fail("a cat sat on it", "refused")
counts.found, counts.failed, counts.count("to fetch")


# %% [markdown]
# Then it speaks, as a table of one row per file or as a text.

# %%
#| export
class FetchSummary(_Counts):
    """What a fetch found and did; printed, it is a report.

    Attributes
    ----------
    ok : bool
        Whether all is there.
    found, fetched, already_there, failed, damaged : int
        Numbers of files.
    bytes, bytes_to_fetch : int
        What came over the line, and what a dry run would let come.
    problems : list of tuple
        (path, reason) of each file that failed.
    """

    @property
    def problems(self) -> list:
        "(path, reason) of each file that failed."
        return [(item.path, item.reason) for item in self.items if item.state == "failed"]

    @property
    def ok(self) -> bool:
        "All is there (after a dry run: all of it can be fetched)."
        fine = {"fetched", "already there"} | ({"to fetch"} if self.dry_run else set())
        return all(item.state in fine for item in self.items)

    def table(self) -> Table:
        "One row per file: path below the root, size in bytes (-1 unknown), state, reason."
        rows = [
            (item.path, -1 if item.size is None else item.size, item.state, item.reason)
            for item in self.items
        ]
        names = ["path", "size", "state", "reason"]
        return Table(rows=rows or None, names=names, dtype=[str, "i8", str, str])

    def __str__(self):
        return "\n".join(_report(self))


# %%
#| export
def _report(summary):
    "The lines of a summary."
    states = ("to fetch", "fetched", "already there", "failed")
    counts = [(summary.count(state), state) for state in states]
    found = ", ".join(f"{count:,} {state}" for count, state in counts if count)
    if summary.dry_run:
        come = f"{_bytes(summary.bytes_to_fetch)} to fetch (dry run: nothing was written)"
    else:
        come = f"{_bytes(summary.bytes)} came"
    archive = f"{summary.release}, archive {summary.archive!r}"
    yield f"{archive}, from {summary.source} to {summary.root}"
    yield f"{summary.found:,} files: {found}; {come}"
    for path, reason in summary.problems[:20]:
        yield f"  failed: {path}: {reason}"
    if summary.failed > 20:
        yield f"  and {summary.failed - 20:,} more"
    if summary.damaged:
        yield f"{summary.damaged} of these came as the source has them: they are damaged there"
    if summary.failed > summary.damaged:
        yield "run the same again: what is whole stays, what has begun goes on"


# %%
print(FetchSummary("home", "a folder", "survey", "DR14", items))


# %% [markdown]
# `fetch` first looks (index, sizes, what is at home already), which costs little and writes nothing; a dry run ends here. Then
# it checks that the root can be written and is large enough, and downloads with a few workers. Two runs into the same root at once would write into
# the same files, so the second one is turned away; a server that fails twenty times in a row is left alone.

# %%
#| export
def _is_there(root, item, known):
    """A whole file of the right size and content is at home, in the survey's layout or another one.

    `known` are the checksums of what was fetched before."""
    for path in (item.path, *item.elsewhere):
        try:
            right = item.size in (None, os.path.getsize(root / path))
            checkable = item.hdus or item.size is not None
            whole = right and checkable and not file_problem(root / path, item.hdus, item.star)
            wanted = item.sha256 or known.get(path)
            if whole and wanted in (None, sha256_of(root / path)):
                return True
            item.stale = whole and not item.sha256
        except OSError:
            continue
    return False


def _look(source, root, known, item):
    "Ask for the size of a file, and whether it is at home."
    if item.origin:
        try:
            item.size = source.stat(item.origin).size
        except SourceError as error:
            item.fail(error, error.cause)
        if _is_there(root, item, known):
            item.state = "already there"
            item.reason = item.cause = ""
    return item


# %%
origin = _FolderSource(desk / "server")
rows = []
for root in (home, desk / "server"):
    items = _find_all(origin, wanted, (), True, Patience())
    states = [_look(origin, root, {}, item).state for item in items]
    rows.append((root.name, states.count("to fetch"), states.count("already there")))
Table(rows=rows, names=["root", "to fetch", "already there"])


# %% [markdown]
# A root holds one archive. Stars of two archives in one tree could not be told apart afterwards, so the second one is refused. A root that holds
# something else altogether is most likely a slip of the pen; it is refused, too, and so is a file of ours that no fetch can have written. While we write,
# the root is locked: on Linux and macOS a folder itself can be locked, and the lock vanishes with the process that held it, however that ends.

# %%
#| export
def _check_root(root, source, marker, release):
    """A root holds one archive, and it is not the source's own.

    Returns whether the root has the source's archive.json already."""
    if isinstance(source, _FolderSource) and root.exists() and root.samefile(source.root):
        raise LabError(f"{root} is the source itself: choose another root")
    try:
        _check_holds_archive(root)
        old = (root / ARCHIVE_FILE).read_bytes()
    except FileNotFoundError:
        old = None
    except OSError as error:
        raise LabError(f"cannot write to {root}: {error.strerror}; choose another root") from error
    there = _Marker() if old is None else _parse_marker(old, f"{root / ARCHIVE_FILE}")
    has_stars = any((root / path).exists() for path in release.templates("allstar"))
    another = old is not None and marker.content is not None and _differ(old, marker.content)
    if another or (there.record.name != marker.record.name and (old is not None or has_stars)):
        which = "another archive" if another else f"the archive {there.record.name!r}"
        raise LabError(
            f"{root} holds {which}, but {source.name} is "
            f"{marker.record.name!r}: choose another root"
        )
    return old == marker.content


def _check_holds_archive(root):
    "LabError for a root that holds something, but nothing that a fetch writes."
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    known = {ARCHIVE_FILE, SUMS_FILE}
    for rules in RELEASES.values():
        for product in ("allstar", *rules.paths):
            known |= {template.split("/")[0] for template in rules.templates(product)}
    if names and not known & set(names):
        raise LabError(
            f"{root} is not empty and holds no archive ({names[0]} is in it): choose another root"
        )
    other = what_stands_at(root / ARCHIVE_FILE)
    if other:
        raise LabError(f"{root / ARCHIVE_FILE} is {other}, not a file: choose another root")


def _differ(old, new):
    "Whether two archive.json are of two archives: made of other stars, or with another seed."
    old, new = json.loads(old), json.loads(new)
    return any(old.get(key) != new.get(key) for key in ("seed", "stars", "content"))


def _check_further(root, items, marker):
    "LabError for a file that bears the name of an archive's further file, but no fetch wrote it."
    for item in items:
        unknown = item.path in marker.files and item.state != "already there"
        if unknown and not (root / ARCHIVE_FILE).exists() and (root / item.path).exists():
            raise LabError(
                f"{root / item.path} was not fetched from an archive: choose another root"
            )


# %%
(desk / "thesis").mkdir()
(desk / "thesis" / "thesis.tex").touch()
with pytest.raises(LabError, match="thesis is not empty and holds no archive") as refusal:
    _check_root(desk / "thesis", origin, _Marker(), dr14)
print(str(refusal.value).replace(str(desk), "…"))


# %%
#| export
@contextmanager
def _locked(root):
    "The root, writable and ours alone while the block runs (where the system can lock a folder)."
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise LabError(
            f"cannot write to {root}: {error.strerror}; choose another root or mend its permissions"
        ) from error
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise LabError(
                    f"another fetch is writing to {root}: wait for it, or choose another root"
                ) from error
        yield
    finally:
        os.close(handle)


# %%
try:
    with _locked(home), _locked(home):
        pass
except LabError as error:
    print(str(error).replace(str(desk), "…"))

# %% [markdown]
# The downloads are independent, so a few threads share them; they wait for the network most of the time. The bar counts bytes, and a file that has to
# start over takes its bytes back from it. Whatever interrupts us (Ctrl-C, a full disk) tells the threads to stop at their next chunk.

# %%
#| export
_MAX_FAILURES = 20  # in a row; then the source is left alone


def _download(source, root, items, patience):
    "Fetch what is to be fetched."
    todo = [item for item in items if item.state == "to fetch"]
    volume = sum(item.size or 0 for item in todo)
    if volume > shutil.disk_usage(root).free:
        raise LabError(
            f"{root} has no room for {_bytes(volume)}: free the disk or choose another root"
        )
    lock = threading.Lock()
    bar = tqdm(
        total=volume, unit="B", unit_scale=True, desc="fetching", disable=not patience.progress
    )

    def show(item, length):
        with lock:
            bar.update(length - item.shown)
            item.shown = length

    def work(item):
        stopped = patience.stop.is_set()
        return item if stopped else _fetch_file(source, item, root, patience, show)

    failures = 0
    with bar, closing(_side_by_side(todo, work, patience)) as done:
        for item in done:
            if item.state == "fetched":
                failures = 0
            elif item.cause not in ("", "missing"):
                failures += 1
            if failures >= _MAX_FAILURES:
                patience.stop.set()
    for item in todo:
        if item.state == "to fetch":
            item.fail(f"not tried, for {_MAX_FAILURES} others failed in a row")


# %%
items = _find_all(origin, wanted, (), True, Patience())
(desk / "some").mkdir()
_download(origin, desk / "some", items[:3], Patience(progress=False))
[item.state for item in items]


# %% [markdown]
# Two small things are left. An archive of ours may be small: its record names the fields that it can have, not those that it has. And its
# `archive.json` is a file like the others in the summary, but it is written first.

# %%
#| export
def _fields_at_hand(source, wanted):
    "The same, without the fields that the source lacks (all of them if it lacks all)."
    there = set()
    for product in wanted.products:
        there.update(_list_fields(source, wanted.release, product))
    return replace(
        wanted, fields=tuple(name for name in wanted.fields if name in there) or wanted.fields
    )


def _marker_items(marker, root, is_there):
    "archive.json as a file of the summary, if the source has one."
    if marker.content is None:
        return []
    state = "already there" if is_there else "to fetch"
    return [_Item(ARCHIVE_FILE, ARCHIVE_FILE, size=len(marker.content), state=state)]


def _write_marker(root, marker, items):
    "Write archive.json, if it is among the files to fetch."
    for item in items:
        if item.path == ARCHIVE_FILE and item.state == "to fetch":
            with atomic_path(root / ARCHIVE_FILE) as temporary:
                temporary.write_bytes(marker.content)
            item.state = "fetched"
            item.received = len(marker.content)


def _look_for(source, root, wanted, marker, catalogue, patience):
    "All files that belong to what was asked for, and which of them are at home."
    is_marked = _check_root(root, source, marker, wanted.release)
    items = _find_all(source, wanted, marker.files, catalogue, patience)
    _give_sums(items, marker.sums)
    look = partial(_look, source, root, archive_sums(root))
    with closing(_side_by_side(items, look, patience)) as looking:
        bar = {"total": len(items), "unit": "file", "desc": "looking"}
        list(tqdm(looking, **bar, disable=not patience.progress))
    _check_further(root, items, marker)
    return _marker_items(marker, root, is_marked) + items


# %%
items = _look_for(origin, desk / "some", wanted, _read_marker(origin, hasty), True, hasty)
assert sorted({item.state for item in items}) == ["already there", "to fetch"]
[item.state for item in items]


# %% [markdown]
# And the one function that the user sees.

# %%
#| export
def fetch(
    root,
    source,
    release=None,
    fields=None,
    products=None,
    telescopes=None,
    workers: int = 4,
    dry_run: bool = False,
    progress: bool = True,
    catalogue: bool = True,
    timeout: float = 30,
    tries: int = 5,
    backoff: float = 0.5,
    sdss_ids=None,
) -> FetchSummary:
    """Bring fields of a release home, or stars of SDSS-V.

    What is there and whole stays, what has begun goes on, what fails is in the summary.

    Parameters
    ----------
    root : str or Path
        Folder where the archive goes.
    source : str or Path
        An https or http URL, or a folder: the root of the archive to fetch from.
    release : str or Release, optional
        "dr10", "dr14", "dr16", "dr17" or "dr19"; the archive's own by default.
    fields, products, telescopes : str or sequence of str, optional
        Location IDs (up to DR14) or names of fields; the archive's own by default. Of "apstar",
        "aspcapstar", of DR19 "mwmstar", "mwmvisit"; the first of the release by default.
        Telescopes of the release; all by default.
    dry_run : bool, default False
        Only look, and write nothing.
    catalogue : bool, default True
        Fetch the allStar table, too.
    workers, timeout, tries, backoff, progress
        See `Patience`.
    sdss_ids : optional
        Stars of a release of SDSS-V (the first by default) in place of fields: numbers or a file,
        see `read_sdss_ids`. An archive of ours is fetched as a whole without them.

    Returns
    -------
    FetchSummary
        Its `ok` says whether all is there.

    Raises
    ------
    LabError
        If what was asked for cannot be, the source has none of it, or the root cannot be written.
    """
    root = Path(root)
    patience = Patience(workers, timeout, tries, backoff, progress)
    with warnings.catch_warnings(), closing(open_source(source, patience)) as origin:
        warnings.simplefilter("ignore", AstropyWarning)  # said by the summary, where it matters
        marker = _read_marker(origin, patience)
        record = marker.record
        wanted = _wanted(record, release, fields, products, telescopes, sdss_ids)
        if fields is None and marker.content is not None and not wanted.release.numbered:
            wanted = _fields_at_hand(origin, wanted)
        items = _look_for(origin, root, wanted, marker, catalogue, patience)
        if not dry_run:
            with _locked(root):
                _write_marker(root, marker, items)
                _download(origin, root, items, patience)
    return FetchSummary(str(root), origin.name, record.name, wanted.release.name, items, dry_run)


# %% [markdown]
# First a look, without a trace.

# %%
home = desk / "home"
with serve(desk / "server") as url:
    plan = fetch(home, url, fields=["4230", "4262"], dry_run=True, progress=False)
assert plan.ok and not home.exists()
plan.table()["path", "size", "state"]

# %% [markdown]
# Then in earnest, and once more. The second run asks for every size, finds every file whole, and downloads nothing.

# %%
with serve(desk / "server") as url:
    once = fetch(home, url, fields=["4230", "4262"], progress=False)
    twice = fetch(home, url, fields=["4230", "4262"], progress=False)
print(str(once).replace(url, "http://…").replace(str(desk), "…"))
print("\nonce more:", str(twice).splitlines()[1])


# %%
def tree(root):
    "All files but the list of checksums that a fetch keeps for itself."
    files = [file for file in root.rglob("*") if file.is_file() and file.name != SUMS_FILE]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


assert tree(home) == tree(desk / "server") and (home / SUMS_FILE).exists()
assert once.ok and once.fetched == once.found == 8
assert twice.ok and twice.already_there == 8 and twice.bytes == 0

# %% [markdown]
# From a folder it is the same call. And a folder in the original lab's layout, `stars/4230/…`, counts as home: nothing that was fetched by hand for
# it is downloaded again.

# %%
by_hand = desk / "by hand"
for file in (desk / "server").rglob("*.fits"):
    name = file.name if "allStar" in file.name else f"{file.parent.name}/{file.name}"
    place = by_hand / "stars" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, place)
quietly = {"fields": "4230,4262", "progress": False}
assert fetch(by_hand, desk / "server", **quietly).already_there == 8
assert fetch(desk / "again", by_hand, **quietly).fetched == 8  # and it is a source
assert tree(desk / "again") == tree(home)  # which comes out in the survey's layout


# %% [markdown]
# ## A bad day
# Now the server fails in four ways at once: one star's file breaks off, of another there is only an apology, the third comes only when asked a second
# time (503 first), and the catalogue is missing.

# %%
class BadDay(ArchiveHandler):
    "Misbehaves by the last digit before the sign of a star's name."

    busy = True

    def do_GET(self):
        if "34192" in self.path and BadDay.busy:
            BadDay.busy = False
            self.send_error(503)
        elif "34191" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "28")
            self.end_headers()
            self.wfile.write(b"<html>back tomorrow</html>\r\n")
        else:
            self.send_error(404) if "allStar" in self.path else super().do_GET()

    def copyfile(self, source, outputfile):
        self.close_connection = "34190" in self.path
        outputfile.write(source.read(100_000 if self.close_connection else None))


# %%
with serve(desk / "server", handler=BadDay) as url:
    bad = fetch(desk / "bad day", url, fields=["4230"], progress=False, tries=3, backoff=0.01)
table = bad.table()
table["path"] = [Path(path).name for path in table["path"]]
table["path", "state", "reason"]

# %% [markdown]
# **What to see.** The summary is not `ok`, and says why of each. On the disk: the one star that came whole under its name, and the start of the
# broken one under another. The next day it goes on from there.

# %%
assert not bad.ok and bad.fetched == 1 and bad.failed == 3
assert [not file_problem(file, 10) for file in (desk / "bad day").rglob("*.fits")] == [True]
with serve(desk / "server") as url:
    good = fetch(desk / "bad day", url, fields=["4230"], progress=False)
size = sum(item.size for item in good.items if item.state == "fetched")
assert good.ok and good.already_there == 1 and good.bytes < size  # resumed
sorted(file.name for file in (desk / "bad day").rglob("*") if file.is_file())

# %% [markdown]
# ## The archive at hand
# The same on the archive that the other chapters work on (the real stars unless `STELLAR_LAB_ARCHIVE` names another): a dry run counts what it holds,
# and five of its stars travel over the loopback.

# %%
try:
    root = archive_root()
except LabError as error:
    root = None
    print("skipped:", str(error).split(":")[0].split(" at ")[0])

# %%
if root:
    record = archive_record(root)
    there = _list_fields(_FolderSource(root), record.rules)
    known = [name for name in record.fields if name in there]
    plan = fetch(desk / "elsewhere", root, fields=known, dry_run=True, progress=False)
    in_field = {
        name: [item.size / 1e6 for item in plan.items if f"/{name}/" in item.origin]
        for name in known
    }

# %%
if root:
    fig, ax = plt.subplots(figsize=(8, 2.4))
    ax.bar(list(in_field), [len(sizes) for sizes in in_field.values()], color="C0", width=0.7)
    ax.set(xlabel="field (location ID)", ylabel="apStar files")
    ax.tick_params(axis="x", rotation=60)

# %%
#| echo: false
if root:
    sizes = np.concatenate([*in_field.values()])
    display(
        Markdown(
            f"**What to see.** The archive `{record.name}` holds {len(sizes):,} apStar files in "
            f"{len(known)} fields, {sizes.sum():,.0f} MB; a file has {np.median(sizes):.1f} MB at "
            f"the median and up to {sizes.max():.1f} MB: each visit adds a row to its arrays."
        )
    )

# %% [markdown]
# Our own archives hold damaged files on purpose, for [the chapter on reading](02_clean.ipynb) to trip over. They must not arrive, and everything else
# must. So we compare with the verdict on the originals.

# %%
if root:
    rules = record.rules
    few = _find_stars(_FolderSource(root), rules, "apstar", known[0], rules.telescopes)[:5]
    with serve(root) as url:
        came = [_fetch_file(_HttpSource(url), item, desk / "five", Patience()) for item in few]
    for item in came:
        whole = not file_problem(root / item.origin, item.hdus)
        assert (item.state == "fetched") == whole == (desk / "five" / item.path).exists()
    print([item.state for item in came])

# %% [markdown]
# ## What a user can get wrong
# A field that is not there, an address that leads nowhere, a root that cannot be written, two archives in one root: each has an answer that helps.

# %%
with serve(desk / "server") as url:
    with pytest.raises(LabError, match="no field '4262x' with apstar files of DR14; it has 4262"):
        fetch(desk / "x", url, fields=["4230", "4262x"], progress=False)
    with pytest.raises(
        LabError, match="there is no dr14/.* the root of an archive is the folder that holds dr14"
    ):
        fetch(desk / "x", f"{url}/dr14", progress=False)
    with pytest.raises(LabError, match="unknown release 'dr15': choose from dr10, dr14"):
        fetch(desk / "x", url, release="dr15", progress=False)
    with pytest.raises(LabError, match="cannot write to .*page.fits"):
        fetch(desk / "page.fits", url, fields=["4230"], progress=False)
# Nobody is listening any more:
with pytest.raises(LabError, match="Connection refused; check the address"):
    fetch(desk / "x", url, progress=False, tries=1)
with pytest.raises(
    LabError, match="cannot fetch from ftp://archive: give a folder or a URL such as"
):
    fetch(desk / "x", "ftp://archive")
assert not (desk / "x").exists()  # an error on the way in leaves no trace

# %%
(desk / "server" / ARCHIVE_FILE).write_text('{"archive": "mock", "files": ["../../.profile"]}')
with pytest.raises(
    LabError, match="names the file '../../.profile', which is not a path below its root"
):
    fetch(desk / "x", desk / "server", fields=["4230"], progress=False)
(desk / "server" / ARCHIVE_FILE).write_text('{"archive": "mock"}')
with pytest.raises(
    LabError, match="home holds the archive 'survey', but .* is 'mock': choose another root"
):
    fetch(home, desk / "server", fields=["4230"], progress=False)

# %%
#| hide
shutil.rmtree(desk)

# %% [markdown]
# **Exercise.** Where an archive brings no checksums, our check reads the headers and believes the arrays. Let a server change one byte in the middle of a
# spectrum: does anything notice? FITS knows `CHECKSUM` and `DATASUM` keywords (`astropy.io.fits`, `checksum=True`); what would it cost to demand them, and what if a file has none?
