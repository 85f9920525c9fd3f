# %% [markdown]
# # Is it all there?
# > Bringing an archive home: list, download, resume, verify, and never a wrong file under a right name.
#
# **Question.** The lab's four fields are 2,723 files and 8 GB on a server far away. Connections drop, servers are busy, a page of apologies comes
# instead of a spectrum. How do we know, at the end, that every file is there and whole?
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
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager
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
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from stellar_lab import __version__
from stellar_lab.survey import (
    ARCHIVE_FILE,
    ARCHIVES,
    PRODUCTS,
    RELEASES,
    LabError,
    Release,
    atomic_path,
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
# `file_problem` walks from header to header, adds up what the formula says and never touches the arrays: about a millisecond a file. It answers with
# the first thing that is wrong, in words, or with an empty string.

# %%
#| export
BLOCK = 2880  # bytes; headers and arrays of a FITS file fill whole blocks (FITS standard 4.0, section 3.1)


def file_problem(
    path,  # a file
    hdus: int = 0,  # HDUs that it has at least; 0 if it is no FITS file
) -> str:  # what is wrong, "" if nothing is
    "Why a file is not whole. Reads the headers of a FITS file only; of other files the first bytes."
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(512)
        if not size:
            return "empty"
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") and re.search(
            rb"<(!doctype\s+)?html", start, re.IGNORECASE
        ):
            return "a web page, not data"
        if not hdus:
            return ""
        if not start.startswith(b"SIMPLE  ="):
            return "not a FITS file"
        file.seek(0)
        return _fits_problem(file, size, hdus)


def _fits_problem(file, size, hdus):
    count = end = 0
    while end < size:
        try:
            header = fits.Header.fromfile(file)
            length = header.data_size_padded
        except Exception as error:  # astropy answers garbage with many kinds of errors
            return f"damaged: the header of HDU {count} cannot be read ({error or type(error).__name__})"
        end = file.tell() + length
        if length < 0 or (count and "XTENSION" not in header):
            return f"damaged: HDU {count} is not an extension of FITS"
        if end > size:
            return f"truncated: HDU {count} ends at byte {end:,}, the file at {size:,}"
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
cut, page = desk / "cut.fits", desk / "page.fits"
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
    parts = [hdul.fileinfo(k) for k in range(len(hdul))]
fig, ax = plt.subplots(figsize=(9, 1.3))
for k, part in enumerate(parts):
    ax.barh(0, part["datLoc"] - part["hdrLoc"], left=part["hdrLoc"], color="0.35")
    ax.barh(0, part["datSpan"], left=part["datLoc"], color=f"C{k % 2 * 9}", alpha=0.7)
    ax.text(part["datLoc"] + part["datSpan"] / 2, 0, str(k) if k else "", ha="center", va="center")
ax.axvline(200_000, color="C3", lw=2)
ax.set(
    yticks=[],
    xlabel="byte of the file (grey: headers; numbers: HDU)",
    xlim=(0, star.stat().st_size),
);

# %% [markdown]
# **What to see.** The red line falls into HDU 6, and the verdict names it. The next test cuts the file at *every* block: none of the halves passes,
# although astropy opens most of them with a warning at worst. A cut exactly between two HDUs leaves a perfect FITS file; only the number of HDUs
# gives it away.

# %%
assert file_problem(cut, hdus=10).startswith("truncated: HDU 6 ends at byte")
content = star.read_bytes()
for end in range(0, len(content), BLOCK):
    cut.write_bytes(content[:end])
    assert file_problem(cut, hdus=10), end
assert file_problem(star, hdus=10) == ""
assert file_problem(star, hdus=11) == "only 10 of 11 HDUs"
assert parts[-1]["datLoc"] + parts[-1]["datSpan"] == len(
    content
)  # astropy's own account of the file
cut.write_bytes(content[: parts[3]["hdrLoc"]])
assert file_problem(cut, hdus=10) == "only 3 of 10 HDUs"

# %% [markdown]
# ## What the server says it has
# A web server that serves a folder answers with a page of links. The page comes from outside, so we believe as little of it as we can: of every link
# we work out where it leads, and keep it only if that is a plain name in the very folder that we asked for. What is a star's file,
# `Release.parse_name` says later.

# %%
#| export
PLAIN_NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
)  # of files and folders: no slash, no hidden file, no "..", nothing that a shell would read


@dataclass(frozen=True)
class Listing:
    "What a folder holds."

    files: tuple
    folders: tuple


class _Links(HTMLParser):
    "Collects the plain names that an index page links to."

    def __init__(self, url):
        super().__init__()
        self.files, self.folders = {}, {}  # dicts, for they keep the order
        self.url = url
        parts = urlsplit(url)
        self.server, self.here = (
            (parts.scheme, parts.hostname, parts.port),
            self._steps(parts.path)[:-1],
        )

    @staticmethod
    def _steps(path):
        return [
            unquote(step) for step in path.split("/")
        ]  # cut first: an escaped slash cannot make a step

    def handle_starttag(self, tag, attrs):
        href = dict(attrs).get("href") if tag == "a" else None
        if not href:
            return
        try:
            parts = urlsplit(urljoin(self.url, href.strip()))
            server = (parts.scheme, parts.hostname, parts.port)
        except ValueError:  # not an address at all
            return
        steps = self._steps(parts.path)
        folder = steps[-1] == ""
        *parents, name = (steps[:-1] if folder else steps) or [""]
        if (
            server == self.server
            and parents == self.here
            and PLAIN_NAME.fullmatch(name)
            and not (parts.query or parts.fragment)
        ):
            (self.folders if folder else self.files)[name] = None


def parse_index(
    chunks,  # pieces of the page's text
    url: str,  # where it came from, with a slash at the end
) -> Listing:
    "Names in an HTML directory index (Apache's and the like): links that lead elsewhere, up, or to a query are not names."
    links = _Links(url)
    try:
        for chunk in chunks:
            links.feed(chunk)
        links.close()
    except AssertionError:  # how html.parser of some Pythons answers a broken <![declaration
        pass
    return Listing(tuple(links.files), tuple(links.folders))


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
page = "<h1>Index of /4230</h1>" + "".join(f'<a href="{name}">{name}</a>\n' for name in names)
listing = parse_index([page], base)
listing

# %%
assert listing.files == ("apStar-r8-2M21334190+0048169.fits", "b.fits") and listing.folders == (
    "sub",
)
assert parse_index(page, base) == listing  # letter by letter: a page may come in any pieces
assert parse_index(["<![x[ <a href='a.fits'>"], base).folders == ()  # broken pages break nothing
assert parse_index(['<a href="/else/a.fits">'], base).files == ()

# %% [markdown]
# ## Two sources with one face
# An archive stands on a server or in a folder, on a disk that a colleague lent us, say. For the rest of this chapter both are a *source* that can do
# three things: `list` a folder, `stat` a file (its size and a tag that changes when the file does), `open` it from some byte on. All that can go
# wrong is one of four: it is *missing*, the source *refuses*, the connection was *dropped*, or what came is *damaged*. Only the last two are worth
# another try.

# %%
#| export
CHUNK = 1 << 16  # bytes read at a time
MAX_TEXT = 1 << 26  # bytes; an index or archive.json beyond that is not one
MIN_RATE = 500  # bytes a second; a body that comes slower has stalled
MAX_WAIT = 60  # s; the longest pause between two tries, whatever the server asks for


class SourceError(Exception):
    "A source did not give what it was asked for."


class Missing(SourceError):
    "The source does not have it."


class Refused(SourceError):
    "The source does not give it, and asking again now is pointless."


class Dropped(SourceError):
    "It broke off: worth another try."


class Damaged(Dropped):
    "It came as promised and is wrong all the same: worth one more try, no more."


@dataclass(frozen=True)
class Remote:
    "What a source says about a file."

    size: int | None  # bytes, None where it does not say
    tag: str = ""  # differs when the content does; "" where there is none


@dataclass
class Body:
    "An open file of a source."

    remote: Remote
    offset: int  # the first byte that `chunks` brings
    chunks: object  # iterator of bytes


# %% [markdown]
# A folder is the simple one.

# %%
#| export
class FolderSource:
    "An archive in a folder."

    def __init__(self, folder):
        self.root = Path(folder)
        self.name = str(folder)

    def list(self, folder: str) -> Listing:
        "Names in a folder below the root."
        with _refusing(), os.scandir(self.root / folder) as entries:
            names = sorted(
                (entry.name, entry.is_dir())
                for entry in entries
                if PLAIN_NAME.fullmatch(entry.name)
            )
        return Listing(
            tuple(name for name, is_dir in names if not is_dir),
            tuple(name for name, is_dir in names if is_dir),
        )

    def stat(self, path: str) -> Remote:
        "Size and tag of a file below the root."
        if (self.root / path).is_dir():
            raise Missing("a folder, not a file")
        with _refusing():
            stat = os.stat(self.root / path)
        return Remote(stat.st_size, f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"')

    @contextmanager
    def open(self, path: str, offset: int = 0, expected: Remote = None):
        "The file from byte `offset` on if it is still the `expected` one, else from its start."
        remote = self.stat(path)
        offset = offset if remote == expected and offset < remote.size else 0
        with ExitStack() as opened:
            with _refusing():
                file = opened.enter_context(open(self.root / path, "rb"))
                file.seek(offset)
            yield Body(remote, offset, self._chunks(file))

    def close(self):
        "Nothing to close; an HTTP source has connections."

    @staticmethod
    def _chunks(file):
        with _refusing():
            while chunk := file.read(CHUNK):
                yield chunk


@contextmanager
def _refusing():
    "A file system's errors as a source's."
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Missing(error.strerror) from error
    except OSError as error:
        raise Refused(error.strerror or str(error)) from error


# %% [markdown]
# Over HTTP, `requests` keeps the connections open and urllib3's `Retry` asks again, after growing pauses or when the server says (`Retry-After`),
# when a connection cannot be made or the answer is 429 or 5xx. We stay polite: a name to complain about in `User-Agent`, and no more connections than
# workers. A body is read as it comes (`read1`), so that one that trickles in is noticed, not waited for.

# %%
#| export
class _Patience(Retry):
    "urllib3's Retry, but a server's Retry-After of a day does not keep us for a day."

    def get_retry_after(self, response):
        wait = super().get_retry_after(response)
        return None if wait is None else min(wait, MAX_WAIT)


def _is_loopback(host):
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bounded(chunks):
    "The same chunks, but no more than a text can have."
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > MAX_TEXT:
            raise Refused(f"more than {MAX_TEXT >> 20} MB where a page was expected")
        yield chunk


def _why(error):
    "The innermost reason of an error of requests or urllib3, without its addresses in memory."
    while True:
        inner = getattr(error, "reason", None) or next(
            (arg for arg in error.args if isinstance(arg, Exception)), None
        )
        if not isinstance(inner, Exception):
            return (
                re.sub(r"^.*?(?:HTTPS?Connection(?:Pool)?\(.*?\)|<[^>]*>): ", "", str(error))
                or type(error).__name__
            )
        error = inner


# %%
assert _Patience(3).new().get_retry_after(requests.Response()) is None
assert (
    _is_loopback("127.0.0.1")
    and _is_loopback("::1")
    and _is_loopback("localhost")
    and not _is_loopback("data.sdss.org")
)


# %% [markdown]
# Now the source itself. Three of its decisions deserve a sentence. The tag of a file is its `ETag` or, if that is missing or *weak* (the server then
# promises only that the meaning is the same, not the bytes), its date. The rest of a file (status 206) is taken only if it starts at the byte that we
# asked for, belongs to a file of the same size and carries the same tag; anything else is thrown away and the whole file asked for. And of an index
# it is the address that *answered* which counts, for a server may have led us elsewhere.

# %%
#| export
class HttpSource:
    "An archive on a web server."

    def __init__(
        self,
        url: str,  # of the root, https or http
        workers: int = 4,  # connections at most
        timeout: float = 30,  # s without a byte, or with hardly any
        tries: int = 5,
        backoff: float = 0.5,  # s before the second repetition, doubled each time
    ):
        self.url = url.rstrip("/") + "/"
        parts = urlsplit(self.url)
        self.name = parts._replace(
            netloc=parts.netloc.rpartition("@")[2]
        ).geturl()  # no password in messages
        self.timeout = timeout
        self.session = requests.Session()
        self.session.trust_env = not _is_loopback(
            parts.hostname
        )  # a proxy cannot reach this machine's own servers
        self.session.headers.update(
            {"User-Agent": f"stellar_lab/{__version__}", "Accept-Encoding": "identity"}
        )
        retry = _Patience(
            tries - 1,
            backoff_factor=backoff,
            backoff_jitter=backoff / 2,
            backoff_max=MAX_WAIT,
            raise_on_status=False,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=("GET", "HEAD"),
        )
        self.session.mount(
            f"{parts.scheme}://",
            HTTPAdapter(
                pool_connections=2, pool_maxsize=workers, max_retries=retry, pool_block=True
            ),
        )

    def list(self, folder: str) -> Listing:
        "Names in the index of a folder below the root."
        with self._request("GET", f"{folder}/" if folder else "") as response:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            return parse_index(map(decoder.decode, _bounded(self._chunks(response))), response.url)

    def stat(self, path: str) -> Remote:
        "Size and tag of a file below the root, as far as the server tells."
        try:
            with self._request("HEAD", path) as response:
                remote = self._remote(response)
            return Remote(
                remote.size or None, remote.tag
            )  # 0 is how some servers say that they do not know
        except Refused:  # some servers do not answer HEAD; the download will tell
            return Remote(None)

    @contextmanager
    def open(self, path: str, offset: int = 0, expected: Remote = None):
        "The file from byte `offset` on if it is still the `expected` one, else from its start."
        headers = {}
        if offset:
            headers = {"Range": f"bytes={offset}-"} | (
                {"If-Range": expected.tag} if expected.tag else {}
            )
        with self._request("GET", path, headers) as response:
            body = self._body(response, offset, expected)
            if body:
                yield body
            elif not offset:
                raise Dropped(
                    f"a plain question was answered with {response.status_code} {response.reason}"
                )
        if not body:
            with self.open(path) as body:
                yield body

    def close(self):
        "Close all connections."
        self.session.close()

    def _body(self, response, offset, expected):
        "The body of an answer; None if it is not the rest of the file that we have the start of."
        remote, start = self._remote(response), 0
        if response.status_code == 206:
            match = re.fullmatch(
                r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "")
            )
            total = int(match[2]) if match and match[2] != "*" else None
            if (
                not offset
                or not match
                or int(match[1]) != offset
                or total != expected.size
                or remote.tag not in ("", expected.tag)
            ):
                return None
            remote, start = Remote(total, expected.tag), offset
        elif response.status_code != 200:  # 416: there is no such rest
            return None
        return Body(remote, start, self._chunks(response))

    def _request(self, method, path, headers=None):
        url = self.url + quote(path, safe="/+")
        try:
            response = self.session.request(
                method,
                url,
                headers=headers,
                stream=True,
                timeout=(min(self.timeout, 10), self.timeout),
            )
        except (requests.RequestException, ValueError) as error:
            raise Refused(_why(error)) from error
        status = f"{response.status_code} {response.reason}"
        if response.url.startswith("http:") and url.startswith("https:"):
            problem = Refused("the server leads from https to http")
        elif response.status_code in (404, 410):
            problem = Missing(status)
        else:
            problem = Refused(status) if response.status_code not in (200, 206, 416) else None
        if problem:
            response.close()
            raise problem
        return response

    def _chunks(self, response):
        "The body as it comes, given up when hardly anything comes."
        start, received = time.monotonic(), 0
        while True:
            try:
                chunk = response.raw.read1(CHUNK, decode_content=False)
            except (HTTPError, HTTPException, OSError) as error:
                raise Dropped(f"broke off: {_why(error)}") from error
            if not chunk:
                return
            yield chunk
            received += len(chunk)
            if time.monotonic() - start > self.timeout:
                if received < MIN_RATE * self.timeout:
                    raise Dropped(f"too slow: {received} bytes in {self.timeout:g} s")
                start, received = time.monotonic(), 0

    @staticmethod
    def _remote(response):
        length, tag = response.headers.get("Content-Length", ""), response.headers.get("ETag", "")
        if not tag or tag.startswith("W/"):  # a weak tag does not promise the same bytes
            tag = response.headers.get("Last-Modified", "")
        return Remote(int(length) if length.isdecimal() and length.isascii() else None, tag)


# %% [markdown]
# Which of the two it is, the address says.

# %%
#| export
EXAMPLE = "https://data.sdss.org/sas"


def open_source(
    source,  # an https or http URL, or a folder: the root of an archive
    **settings,  # workers, timeout, tries, backoff of an HttpSource
):
    "The source that a URL or a folder names."
    text = os.fspath(source)
    if "://" not in text:
        if not Path(text).is_dir():
            raise LabError(
                f"there is no folder {text} to fetch from: give the root of an archive, a folder or a URL such as {EXAMPLE}"
            )
        return FolderSource(text)
    try:
        parts = urlsplit(text)
        if (
            parts.scheme in ("http", "https")
            and parts.hostname
            and parts.port != 0
            and not (parts.query or parts.fragment)
        ):
            return HttpSource(text, **settings)
    except ValueError:  # a port that is no number, an address that is none
        pass
    raise LabError(f"cannot fetch from {text}: give a folder or a URL such as {EXAMPLE}")


# %% [markdown]
# ## A server for one
# To try all this we need a server, and Python brings one. Ours knows three things more than Python's: the tag of a file (`ETag`), how to send the
# rest of it (`Range`), and to be quiet. `serve` runs it on this machine's loopback address, where nobody else can reach it.

# %%
#| export
class ArchiveHandler(SimpleHTTPRequestHandler):
    "Serves a folder: HTML index, ETag, and open-ended ranges (RFC 9110)."

    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True  # small answers leave at once

    def log_message(self, format, *args):
        "Say nothing."

    def send_head(self):
        "Status and headers; returns the open file from which the body is copied."
        path = self.translate_path(self.path)
        if not os.path.isfile(path) or path.endswith("/"):
            return super().send_head()
        tag = FolderSource("/").stat(path).tag
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
        for name, value in (
            ("Content-Type", self.guess_type(path)),
            ("Content-Length", str(size - start)),
            ("ETag", tag),
        ):
            self.send_header(name, value)
        self.end_headers()
        return file


# %% [markdown]
# `serve` runs it in a thread while a `with` block lasts. With port 0 the system chooses a free one, so two notebooks never quarrel over it.

# %%
#| export
class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        "A client that hangs up is no news; other errors are printed."
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serve(
    folder,  # the root of an archive
    port: int = 0,  # 0: any free one
    handler=ArchiveHandler,
):
    "Serve a folder over HTTP on the loopback address while the block runs; gives the URL."
    if not Path(folder).is_dir():
        raise LabError(f"there is no folder {folder} to serve")
    try:
        server = _Server(("127.0.0.1", port), partial(handler, directory=os.fspath(folder)))
    except (OSError, OverflowError) as error:
        raise LabError(
            f"cannot serve on port {port}: {error}; choose another one, or 0 for any that is free"
        ) from error
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# %% [markdown]
# Do the two sources really have one face? Ask both for the same things.

# %%
here = f"{dr14.folder('apstar', '4230')}"
with serve(desk / "server") as url:
    for origin in (FolderSource(desk / "server"), HttpSource(url)):
        assert len(origin.list(here).files) == 3 and origin.list(
            str(Path(here).parent)
        ).folders == ("4230", "4262")
        remote = origin.stat(f"{here}/{star.name}")
        assert remote.size == star.stat().st_size
        with origin.open(f"{here}/{star.name}", 1000, remote) as body:
            assert body.offset == 1000 and b"".join(body.chunks) == star.read_bytes()[1000:]
        with origin.open(
            f"{here}/{star.name}", 1000, Remote(remote.size, '"older"')
        ) as body:  # the file is not what it was:
            assert (
                body.offset == 0 and b"".join(body.chunks) == star.read_bytes()
            )  # from the start, then
        with pytest.raises(Missing):
            origin.stat(f"{here}/apStar-r8-nobody.fits")
        origin.close()


# %% [markdown]
# ## One file
# A file grows under the name `….part`. Beside it a note (`….part.note`) keeps what the source said about it, so that the next run, tomorrow perhaps,
# can ask for the rest, *if the file has not changed* (`If-Range`). A source that ignores the question sends all of it, and we start over; so we do
# when the rest belongs to a newer version. Only a file without a problem gets its name.

# %%
#| export
@dataclass(slots=True)
class Item:
    "One file to bring home."

    path: str  # below the root, where it goes
    origin: str  # below the source
    hdus: int = 0  # HDUs that it has at least, 0 for what is no FITS file
    elsewhere: tuple = ()  # other paths below the root where it counts as there
    size: int | None = None  # bytes, as the source says
    state: str = "to fetch"  # then "fetched", "already there" or "failed"
    reason: str = ""  # why it failed
    cause: str = ""  # "missing", "refused", "dropped" or "damaged" if it failed
    received: int = 0  # bytes that came
    shown: int = 0  # bytes that the progress bar knows of


def _part(target):
    return target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.part.note")


def _started(part, note):
    "How much of a file is there from an earlier try, and what the source said about it then."
    try:
        kept = json.loads(note.read_text(encoding="utf-8"))
        remote, offset = Remote(kept["size"], kept["tag"]), part.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None
    known = isinstance(remote.size, int) and isinstance(remote.tag, str) and offset < remote.size
    return (offset, remote) if known else (0, None)


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
            raise Refused("the server does not say how long it is")
        if not body.offset:
            note.unlink(
                missing_ok=True
            )  # first the note, so that it never stands beside another version's bytes
            part.write_bytes(b"")
            note.write_text(
                json.dumps({"size": body.remote.size, "tag": body.remote.tag}), encoding="utf-8"
            )
        length = body.offset
        with open(part, "ab") as file:
            show(item, length)
            for chunk in body.chunks:
                if stop.is_set():
                    raise Refused("interrupted")
                file.write(chunk)
                length += len(chunk)
                item.received += len(chunk)
                show(item, length)
    if body.remote.size not in (None, length):
        raise Dropped(f"truncated: {length:,} of {body.remote.size:,} bytes came")


# %% [markdown]
# How often do we try? A connection that drops five times in a row is hopeless, but over a shaky line a catalogue of 4 GB may need fifty drops to
# arrive, and each of them brought us further. So a megabyte of progress wipes the slate clean. A file that arrived complete and is wrong gets one
# more chance (a proxy's apology may be gone in a moment); after that we believe that the source itself has it so.

# %%
#| export
def _persist(action, tries, backoff, stop, progress=lambda: 0):
    "Do it again while it is dropped, `tries` times in a row without a megabyte of progress; if it comes damaged, once."
    attempt, damaged, best = 0, 0, progress()
    while True:
        try:
            return action()
        except Dropped as error:
            attempt, damaged = attempt + 1, damaged + isinstance(error, Damaged)
            if progress() > best + (1 << 20):
                attempt, best = 0, progress()
            if attempt >= tries or damaged > 1 or stop.wait(min(backoff * 2**attempt, MAX_WAIT)):
                raise


# %%
calls = []


def drops():
    calls.append(len(calls))
    raise Dropped


with pytest.raises(Dropped):
    _persist(drops, 3, 0.001, threading.Event(), progress=lambda: min(len(calls), 4) * (2 << 20))
assert (
    len(calls) == 4 + 3
)  # four tries got further and count for nothing; then three in a row were in vain


# %% [markdown]
# `fetch_file` ties these together. If something damaged already stands under the final name (another tool left it there), it loses that name before
# we start, so that even a failure leaves nothing wrong behind.

# %%
#| export
def _put_aside(target, hdus):
    "Take its name from a file that cannot be whole: nothing wrong stays under a final name, whatever happens next."
    if target.exists() and (not hdus or file_problem(target, hdus)):
        os.replace(target, target.with_name(f"{target.name}.old"))


def fetch_file(
    source,  # a FolderSource or HttpSource
    item: Item,  # its state is changed
    root,  # where the archive goes
    tries: int = 5,
    backoff: float = 0.5,  # s
    show=lambda item, length: None,  # told how many bytes are there
    stop: threading.Event = None,  # set: give up at the next chunk
) -> Item:
    "Bring one file home, whole and under its name, or say in the item why not. A file that cannot be written is a LabError."
    target, stop = Path(root) / item.path, stop or threading.Event()
    part, note = _part(target)

    def attempt():
        _receive(source, item, part, note, show, stop)
        problem = file_problem(part, item.hdus)
        if problem:
            note.unlink(missing_ok=True)
            part.unlink()
            raise Damaged(problem)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _put_aside(target, item.hdus)
        _persist(attempt, tries, backoff, stop, lambda: part.stat().st_size if part.exists() else 0)
        os.replace(part, target)
        note.unlink(missing_ok=True)
        target.with_name(f"{target.name}.old").unlink(missing_ok=True)
        item.state = "fetched"
    except SourceError as error:
        item.state, item.reason, item.cause = "failed", str(error), type(error).__name__.lower()
    except OSError as error:
        raise LabError(
            f"cannot write {target}: {error.strerror or error}; free the disk or choose another root, then run the same again: "
            "what is whole stays"
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
    first = fetch_file(HttpSource(url), Item(path, path, hdus=10), home, tries=1)
print(first.state, "-", first.reason)
sorted(file.name for file in (home / here).iterdir())

# %% [markdown]
# The second run meets the same bad server but may try five times. Each try asks for what is still missing.

# %%
assert first.state == "failed" and not (home / path).exists()
with serve(desk / "server", handler=HangsUp) as url:
    second = fetch_file(HttpSource(url), Item(path, path, hdus=10), home, tries=5, backoff=0.01)
HangsUp.asked

# %%
starts = [int(asked[len("bytes=") : -1]) for asked in HangsUp.asked]
fig, ax = plt.subplots(figsize=(7, 1.8))
ax.barh(
    range(len(starts)),
    [min(100_000, len(content) - start) for start in starts],
    left=starts,
    color=["C0", "C2", "C2", "C2"],
)
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
# add to it: if it is one of ours, an `archive.json` at its root names its record and further files that belong to it (a mystery star, a truth table).
# That text comes from outside, too, so its names must be plain steps down from the root.

# %%
#| export
def _read_marker(source, tries, backoff):
    "archive.json of a source: its bytes (None without one), the record it names, further files."

    def read():
        with source.open(ARCHIVE_FILE) as body:
            return b"".join(_bounded(body.chunks))

    try:
        content = _persist(read, tries, backoff, threading.Event())
    except Missing:
        return None, ARCHIVES["survey"], ()
    except SourceError as error:
        raise LabError(
            f"cannot fetch from {source.name}: {error}; check the address, and whether the server can be reached from here"
        ) from error
    if content.lstrip()[:1] == b"<":  # a server that answers "no such page" with a page
        return None, ARCHIVES["survey"], ()
    return content, *_parse_marker(content, f"{ARCHIVE_FILE} of {source.name}")


def _parse_marker(content, where):
    try:
        marker = json.loads(content)
        name, files = marker["archive"], marker.get("files", [])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabError(
            f"{where} does not name an archive ({error!r}): it is damaged, or this is no archive of the lab"
        ) from error
    if name not in [*ARCHIVES]:
        raise LabError(
            f"{where} names the archive {name!r}, which this version does not know: choose from {', '.join(ARCHIVES)}"
        )
    unsafe = [file for file in files if not _is_safe(file)] if isinstance(files, list) else [files]
    if unsafe:
        raise LabError(
            f"{where} names the file {unsafe[0]!r}, which is not a path below its root: do not trust this archive"
        )
    return ARCHIVES[name], tuple(files)


def _is_safe(path):
    "A relative path of plain names, without the marker itself and the names that downloads have on their way."
    plain = isinstance(path, str) and all(PLAIN_NAME.fullmatch(step) for step in path.split("/"))
    return plain and path != ARCHIVE_FILE and not path.endswith((".part", ".part.note", ".old"))


# %%
assert all(_is_safe(path) for path in ("truth.fits", "more/truth.ecsv"))
assert not any(
    _is_safe(path)
    for path in (
        "../x",
        "/etc/passwd",
        "a//b",
        "a/../b",
        ".ssh/key",
        "C:\\x",
        "",
        "archive.json",
        "x.part",
        7,
        None,
    )
)


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
    names = (
        names.split(",") if isinstance(names, str) else [names] if isinstance(names, int) else names
    )
    names = tuple(dict.fromkeys(str(name).strip() for name in names))
    wrong = [name for name in names if not PLAIN_NAME.fullmatch(name)]
    if wrong or not names:
        raise LabError(
            f"{wrong[0]!r} cannot be a {what}"
            if wrong
            else f"no {what} was given: name at least one"
        )
    return names


@dataclass(frozen=True)
class Wanted:
    "What to look for: path rules, fields, products, telescopes."

    release: Release
    fields: tuple
    products: tuple
    telescopes: tuple


def _wanted(record, release, fields, products, telescopes):
    rules = _release(release, record)
    if fields is None and rules != record.rules:
        raise LabError(
            f"which fields of {rules.name}? Name them: the record {record.name!r} knows only those of {record.rules.name}"
        )
    fields = _names(record.fields if fields is None else fields, "field")
    products, telescopes = (
        _names(products, "product"),
        _names(rules.telescopes if telescopes is None else telescopes, "telescope"),
    )
    for names, known, what in (
        (products, tuple(rules.paths), "product"),
        (telescopes, rules.telescopes, "telescope"),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise LabError(
                f"{rules.name} has no {what} {unknown[0]!r}: choose from {', '.join(known)}"
            )
    return Wanted(rules, fields, products, telescopes)


# %% [markdown]
# A field may have been observed by several telescopes, and a folder may follow the lab's own layout instead of the survey's; both are a loop over
# templates, the survey's first. Wherever a file comes from, it goes to the survey's place.

# %%
#| export
def _fill(template, release, field, telescope, star="x"):
    return template.format(
        field=field, telescope=telescope, id=star, prefix=release.prefixes.get(telescope, "ap")
    )


def find_stars(
    source,  # a FolderSource or HttpSource
    release: Release,
    product: str,
    field: str,
    telescopes: tuple,
) -> list:  # of Item; Missing is raised where the source has no folder of this field
    "Files of one product in one field, as the index of its folder lists them: stars, not single visits."
    templates = release.templates(product)
    for template in templates:
        folders, items = set(), {}
        for telescope in telescopes:
            folder = str(PurePosixPath(_fill(template, release, field, telescope)).parent)
            if folder in folders:  # a tree that does not ask for the telescope
                continue
            try:
                listing = source.list(folder)
            except Missing:
                continue
            folders.add(folder)
            for name in listing.files:
                star = release.parse_name(product, name)
                if star:
                    path, *others = [
                        _fill(other, release, field, telescope, star) for other in templates
                    ]
                    items.setdefault(
                        path, Item(path, f"{folder}/{name}", PRODUCTS[product].hdus, tuple(others))
                    )
        if folders:
            return list(items.values())
    raise Missing("no such folder")


# %%
with serve(desk / "server") as url:
    stars = find_stars(HttpSource(url), dr14, "apstar", "4262", ("apo25m", "apo1m"))
assert [dr14.parse_name("apstar", Path(item.path).name) for item in stars] == [
    f"2M2133419{k}-0048169" for k in range(4)
]  # southern ones, too
Table(
    rows=[(Path(item.path).name, item.hdus, item.elsewhere[0]) for item in stars],
    names=["file", "HDUs", "or here"],
)


# %% [markdown]
# And which fields are there? The folder above a field's folder lists them, so an error can name those that come close to what was typed.

# %%
#| export
def list_fields(
    source,  # a FolderSource or HttpSource
    release: Release,
    product: str = "apstar",
) -> list:  # sorted names; empty if the source has none or does not list its folders
    "Names of the fields that a source has, whatever the telescope."
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
    there = list_fields(source, wanted.release, product)
    folder = wanted.release.folder(product, field, wanted.telescopes[0])
    if not there:
        return LabError(
            f"{source.name} has no field {field!r}: there is no {folder} in it; the root of an archive is the folder that holds "
            f"{folder.split('/')[0]}"
        )
    close = get_close_matches(field, there, n=10, cutoff=0.5) or there[:10]
    more = f" and {len(there) - len(close)} more" if len(there) > len(close) else ""
    return LabError(
        f"{source.name} has no field {field!r} with {product} files of {wanted.release.name}; it has {', '.join(close)}{more}"
    )


# %%
assert list_fields(FolderSource(desk / "server"), dr14) == ["4230", "4262"]
assert list_fields(FolderSource(desk / "server"), RELEASES["dr17"]) == []


# %% [markdown]
# All of it together: the catalogue once, the further files, and the stars of each field and product. The folders are listed side by side. One that
# cannot be listed does not stop the others, but the summary will say that it is not complete; one that does not exist stops everything, before a byte
# has moved.

# %%
#| export
def _run(items, work, workers, stop):
    "Do `work` on each item with a few threads; gives the results as they come. Whatever breaks the loop (close it!) stops the workers."
    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in as_completed([pool.submit(work, item) for item in items]):
                yield future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _find_catalogue(source, release):
    "The allStar table, wherever the release or the lab keeps it."
    path, *others = release.templates("allstar")
    for template in (path, *others):
        try:
            source.stat(template)
            return Item(path, template, 2, tuple(others))
        except SourceError:
            continue
    return Item(path, path, 2, tuple(others))


def _find_field(source, wanted, product, field, retry):
    "Files of one product in one field; the folder itself as a failed one where there are none."
    folder = wanted.release.folder(product, field, wanted.telescopes[0])
    try:
        stars = retry(lambda: find_stars(source, wanted.release, product, field, wanted.telescopes))
        return stars or [
            Item(f"{folder}/", "", state="failed", reason=f"no {product} file of a star in it")
        ]
    except Missing:
        raise _no_field(source, wanted, product, field) from None
    except SourceError as error:
        return [Item(f"{folder}/", "", state="failed", reason=f"cannot be listed: {error}")]


def _find_all(source, wanted, extra, catalogue, workers, retry, stop):
    "Every file that belongs to what was asked for, each once."
    asked = [(product, field) for product in wanted.products for field in wanted.fields]
    with closing(
        _run(asked, lambda pair: _find_field(source, wanted, *pair, retry), workers, stop)
    ) as found:
        stars = sorted((item for items in found for item in items), key=lambda item: item.path)
    if all(item.state == "failed" for item in stars):
        raise LabError(
            f"found nothing to fetch at {source.name}: {stars[0].path}: {stars[0].reason}"
        )
    items = [_find_catalogue(source, wanted.release)] if catalogue else []
    items += [Item(path, path, 1 if path.endswith(".fits") else 0) for path in extra]
    return list({item.path: item for item in items + stars}.values())


# %% [markdown]
# ## All of them
# A summary says what was found, what is there now, and what is not and why. Its table has a row a file.

# %%
#| export
@dataclass
class FetchSummary:
    "What a fetch found and did."

    root: str
    source: str
    archive: str  # name of the record
    release: str
    items: list = field(default_factory=list, repr=False)  # of Item
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

    @property
    def problems(self) -> list:
        "(path, reason) of each file that failed."
        return [(item.path, item.reason) for item in self.items if item.state == "failed"]

    @property
    def ok(self) -> bool:
        "All is there (after a dry run: all of it can be fetched)."
        return all(
            item.state in ("fetched", "already there", *(("to fetch",) if self.dry_run else ()))
            for item in self.items
        )

    def table(self) -> Table:
        "One row a file: path below the root, size in bytes (-1 unknown), state, reason."
        rows = [
            (item.path, -1 if item.size is None else item.size, item.state, item.reason)
            for item in self.items
        ]
        return Table(
            rows=rows or None,
            names=["path", "size", "state", "reason"],
            dtype=[str, "i8", str, str],
        )

    def __str__(self):
        states = [
            f"{self.count(state):,} {state}"
            for state in ("to fetch", "fetched", "already there", "failed")
            if self.count(state)
        ]
        come = (
            f"{_bytes(self.bytes_to_fetch)} to fetch (dry run: nothing was written)"
            if self.dry_run
            else f"{_bytes(self.bytes)} came"
        )
        lines = [
            f"{self.release}, archive {self.archive!r}, from {self.source} to {self.root}",
            f"{self.found:,} files: {', '.join(states)}; {come}",
        ]
        lines += [f"  failed: {path}: {reason}" for path, reason in self.problems[:20]]
        if self.failed > 20:
            lines.append(f"  and {self.failed - 20:,} more")
        if self.damaged:
            lines.append(
                f"{self.damaged} of these came as the source has them: they are damaged there"
            )
        if self.failed > self.damaged:
            lines.append("run the same again: what is whole stays, what has begun goes on")
        return "\n".join(lines)


def _bytes(number):
    "A number of bytes as people read it."
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f} bytes"


# %% [markdown]
# `fetch` puts it together. It first looks (index, sizes, what is at home already), which costs little and writes nothing; a dry run ends here. Then
# it checks that the root can be written and is large enough, and downloads with a few workers. Two runs into the same root at once would write into
# the same files, so the second one is turned away; a server that fails twenty times in a row is left alone.

# %%
#| export
def _is_there(root, item):
    "A whole file of the right size stands at home, in the survey's layout or another one."
    for path in (item.path, *item.elsewhere):
        try:
            right = item.size in (None, os.path.getsize(root / path))
            if (
                right
                and (item.hdus or item.size is not None)
                and not file_problem(root / path, item.hdus)
            ):
                return True
        except OSError:
            continue
    return False


def _look(source, root, item):
    "Ask for the size of a file, and whether it is at home."
    if item.origin:
        try:
            item.size = source.stat(item.origin).size
        except SourceError as error:
            item.state, item.reason, item.cause = "failed", str(error), type(error).__name__.lower()
        if _is_there(root, item):
            item.state, item.reason, item.cause = "already there", "", ""
    return item


# %% [markdown]
# A root holds one archive. Stars of two archives in one tree could not be told apart afterwards, so the second one is refused. And while we write,
# the root is locked: on Linux and macOS a folder itself can be locked, and the lock vanishes with the process that held it, however that ends.

# %%
#| export
def _check_root(root, source, marker, record, release):
    "A root holds one archive, and it is not the source's own."
    if isinstance(source, FolderSource) and root.exists() and root.samefile(source.root):
        raise LabError(f"{root} is the source itself: choose another root")
    try:
        old = (root / ARCHIVE_FILE).read_bytes()
    except FileNotFoundError:
        old = None
    except OSError as error:
        raise LabError(f"cannot write to {root}: {error.strerror}; choose another root") from error
    there = _parse_marker(old, f"{root / ARCHIVE_FILE}")[0].name if old is not None else "survey"
    if there != record.name and (
        old is not None or any((root / path).exists() for path in release.templates("allstar"))
    ):
        raise LabError(
            f"{root} holds the archive {there!r}, but {source.name} is {record.name!r}: choose another root"
        )
    return old == marker


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


# %% [markdown]
# The downloads are independent, so a few threads share them; they wait for the network most of the time. The bar counts bytes, and a file that has to
# start over takes its bytes back from it. Whatever interrupts us (Ctrl-C, a full disk) tells the threads to stop at their next chunk.

# %%
#| export
MAX_FAILURES = 20  # in a row; then the source is left alone


def _download(source, root, items, workers, tries, backoff, progress, stop):
    "Fetch what is to be fetched."
    todo = [item for item in items if item.state == "to fetch"]
    volume, lock, failures = sum(item.size or 0 for item in todo), threading.Lock(), 0
    if volume > shutil.disk_usage(root).free:
        raise LabError(
            f"{root} has no room for {_bytes(volume)}: free the disk or choose another root"
        )

    def work(item):
        return item if stop.is_set() else fetch_file(source, item, root, tries, backoff, show, stop)

    def show(item, length):
        with lock:
            bar.update(length - item.shown)
            item.shown = length

    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=volume, unit="B", unit_scale=True, desc="fetching", disable=not progress)
        )
        done = stack.enter_context(closing(_run(todo, work, workers, stop)))
        for item in done:
            failures = (
                0 if item.state == "fetched" else failures + (item.cause not in ("", "missing"))
            )
            if failures >= MAX_FAILURES:
                stop.set()
    for item in todo:
        if item.state == "to fetch":
            item.state, item.reason = (
                "failed",
                f"not tried, for {MAX_FAILURES} others failed in a row",
            )


# %% [markdown]
# And the one function that the user sees.

# %%
#| export
def fetch(
    root,  # folder where the archive goes
    source,  # an https or http URL, or a folder: the root of the archive to fetch from
    release=None,  # "dr14", "dr16", "dr17", … or a Release; the archive's own by default
    fields=None,  # location IDs (up to DR14) or names; the archive's own by default
    products=("apstar",),  # of "apstar", "aspcapstar"
    telescopes=None,  # all of the release by default
    workers: int = 4,  # downloads at once
    dry_run: bool = False,  # only look; writes nothing
    progress: bool = True,  # show bars
    catalogue: bool = True,  # the allStar table, too
    timeout: float = 30,  # s without a byte
    tries: int = 5,  # in a row, for each file
    backoff: float = 0.5,  # s, pause after the first failure, doubled after each
) -> FetchSummary:  # its `.ok` says whether all is there
    "Bring fields of a release home: what is there and whole stays, what has begun goes on, what fails is in the summary. Raises LabError."
    root, stop = Path(root), threading.Event()
    if int(workers) < 1 or int(tries) < 1:
        raise LabError(f"workers and tries must be at least 1, not {workers} and {tries}")
    with ExitStack() as stack:
        origin = open_source(source, workers=workers, timeout=timeout, tries=tries, backoff=backoff)
        stack.callback(origin.close)
        marker, record, extra = _read_marker(origin, tries, backoff)
        wanted = _wanted(record, release, fields, products, telescopes)
        if (
            fields is None and marker is not None
        ):  # an archive of ours may be small: its record names the fields that it can have
            there = set().union(
                *(list_fields(origin, wanted.release, product) for product in wanted.products)
            )
            wanted = replace(
                wanted,
                fields=tuple(name for name in wanted.fields if name in there) or wanted.fields,
            )
        marked = _check_root(root, origin, marker, record, wanted.release)
        retry = partial(_persist, tries=tries, backoff=backoff, stop=stop)
        items = _find_all(origin, wanted, extra, catalogue, workers, retry, stop)
        looking = stack.enter_context(
            closing(_run(items, lambda item: _look(origin, root, item), workers, stop))
        )
        list(tqdm(looking, total=len(items), unit="file", desc="looking", disable=not progress))
        if marker is not None:
            items.insert(
                0,
                Item(
                    ARCHIVE_FILE,
                    ARCHIVE_FILE,
                    size=len(marker),
                    state="already there" if marked else "to fetch",
                ),
            )
        summary = FetchSummary(
            str(root), origin.name, record.name, wanted.release.name, items, dry_run
        )
        if dry_run:
            return summary
        stack.enter_context(_locked(root))
        if marker is not None and not marked:
            _write_marker(root / ARCHIVE_FILE, marker, items[0])
        _download(origin, root, items, workers, tries, backoff, progress, stop)
    return summary


def _write_marker(path, marker, item):
    with atomic_path(path) as temporary:
        temporary.write_bytes(marker)
    item.state, item.received = "fetched", len(marker)


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
print(
    str(once).replace(url, "http://…").replace(str(desk), "…"),
    str(twice).splitlines()[1],
    sep="\n\n",
)


# %%
def tree(root):
    return {
        str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()
    }


assert tree(home) == tree(desk / "server")
assert (
    once.ok
    and once.fetched == once.found == 8
    and twice.ok
    and twice.already_there == 8
    and twice.bytes == 0
)

# %% [markdown]
# From a folder it is the same call. And a folder in the lab's own layout, `stars/4230/…`, counts as home: who has done the lab by hand downloads
# nothing.

# %%
by_hand = desk / "by hand"
for file in (desk / "server").rglob("*.fits"):
    place = (
        by_hand
        / "stars"
        / (file.name if "allStar" in file.name else f"{file.parent.name}/{file.name}")
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, place)
assert fetch(by_hand, desk / "server", fields="4230,4262", progress=False).already_there == 8
assert (
    fetch(desk / "again", by_hand, fields="4230,4262", progress=False).fetched == 8
)  # and it is a source
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
assert (
    good.ok
    and good.already_there == 1
    and good.bytes < sum(item.size for item in good.items if item.state == "fetched")
)  # resumed
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
    there = list_fields(FolderSource(root), record.rules)
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
            f"**What to see.** The archive `{record.name}` holds {len(sizes):,} apStar files in {len(known)} fields, {sizes.sum():,.0f} MB; "
            f"a file has {np.median(sizes):.1f} MB at the median and up to {sizes.max():.1f} MB: each further visit adds a row to its arrays."
        )
    )

# %% [markdown]
# Our own archives hold damaged files on purpose, for the next chapter to trip over. They must not arrive, and everything else must. So we compare
# with the verdict on the originals.

# %%
if root:
    few = find_stars(FolderSource(root), record.rules, "apstar", known[0], record.rules.telescopes)[
        :5
    ]
    with serve(root) as url:
        came = [fetch_file(HttpSource(url), item, desk / "five") for item in few]
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
with pytest.raises(
    LabError, match="Connection refused; check the address"
):  # nobody is listening any more
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
# **Exercise.** Our check reads the headers and believes the arrays. Let a server change one byte in the middle of a spectrum: does anything notice?
# FITS knows `CHECKSUM` and `DATASUM` keywords (`astropy.io.fits`, `checksum=True`); what would it cost to demand them, and what if a file has none?
