"""Fetching from a real HTTP server on the loopback address that misbehaves on purpose.

Nothing wrong may ever stand under a final name."""

import json
import multiprocessing
import os
import re
import signal
import socket
import struct
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urljoin

import numpy as np
import pytest
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_lab import __version__
from stellar_lab.fetch import (
    _MAX_WAIT,
    _PLAIN_NAME,
    ArchiveHandler,
    Patience,
    SourceError,
    _bytes,
    _fetch_file,
    _find_stars,
    _is_safe,
    _Item,
    _list_fields,
    _parse_index,
    _ShortRetry,
    fetch,
    file_problem,
    open_source,
    serve,
)
from stellar_lab.survey import (
    ARCHIVE_FILE,
    ARCHIVES,
    PRODUCTS,
    RELEASES,
    SUMS_FILE,
    TRUTH_FILE,
    LabError,
    archive_sums,
    real_data,
    sha256_of,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::astropy.utils.exceptions.AstropyUserWarning"
)  # astropy's, about damaged headers

DR14 = RELEASES["dr14"]
IDS = ("2M21334193-0048169", "2M00004994+1621552", "VESTA")
STAR = DR14.path("apstar", "4230", IDS[0])
UNFINISHED = (".part", ".note", ".old")


@cache
def tiny(hdus, fill=0.0):
    "Bytes of a FITS file with so many HDUs."
    file = BytesIO()
    fits.HDUList(
        [fits.PrimaryHDU(), *(fits.ImageHDU(np.full(2000, fill + k, "f4")) for k in range(1, hdus))]
    ).writeto(file)
    return file.getvalue()


def put(root, path, content):
    file = Path(root) / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def tree(root, unfinished=False):
    "path -> content of the files that stand under a final name."
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in Path(root).rglob("*")
        # an unfinished file may vanish under the reader while a fetch goes on
        if (unfinished or not file.name.endswith(UNFINISHED)) and file.is_file()
        if file.name != SUMS_FILE
    }


def make_tree(
    root, release=DR14, fields=("4230",), products=("apstar",), telescope="apo25m", fill=0.0
):
    put(root, release.allstar, tiny(2, fill))
    for product in products:
        for k, field in enumerate(fields):
            for j, star in enumerate(IDS):
                put(
                    root,
                    release.path(product, field, star, telescope),
                    tiny(PRODUCTS[product].hdus, fill + 10 * k + j),
                )
    return Path(root)


class Planned(ArchiveHandler):
    """Follows `plan`: path -> what to do at its first, second, … GET.

    The last is repeated; None: be good."""

    def do_GET(self):
        path = self.path.lstrip("/")
        with self.lock:
            self.log.append((path, self.headers.get("Range")))
            self.agents.add(self.headers["User-Agent"])
            self.open_now[0] += 1
            self.open_now[1] = max(self.open_now)
            steps = self.plan.get(path, [None])
            step = steps.pop(0) if len(steps) > 1 else steps[0]
        try:
            step(self) if step else super().do_GET()
        finally:
            with self.lock:
                self.open_now[0] -= 1

    def file(self):
        return Path(self.translate_path(self.path)).read_bytes()

    def answer(self, status, body=b"", length=None, close=False, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length is not False:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        if close:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:  # the client has seen enough
            self.close_connection = True


def status(code, **headers):
    return lambda handler: handler.answer(code, b"no", **headers)


def cut(handler):
    "Half of the file, then goodbye."
    whole = handler.file()
    handler.answer(200, whole[: len(whole) // 2], len(whole), close=True)


def reset(handler):
    "A reset instead of the second half."
    cut(handler)
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def reset_at_once(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def stall(handler):
    "Some bytes, then silence."
    handler.answer(200, handler.file()[:1000], len(handler.file()), close=True)
    handler.leave.wait(5)


def trickle(handler):
    "A byte now and then: never silent, never done."
    handler.answer(200, b"", len(handler.file()), close=True)
    try:
        for k in range(200):
            handler.wfile.write(handler.file()[k : k + 1])
            if handler.leave.wait(0.03):
                return
    except OSError:
        pass


def says_more(handler):
    handler.answer(200, handler.file(), len(handler.file()) + 2880, close=True)


def says_less(handler):
    handler.answer(200, handler.file()[:-2880], close=True)


def no_range(handler):
    "Ignores the question for the rest."
    handler.answer(200, handler.file(), ETag='"same"')


def page(handler):
    handler.answer(
        200, b"<!DOCTYPE html>\n<html><body>Please log in</body></html>", Content_Type="text/html"
    )


def chunked(handler):
    handler.answer(200, b"", length=False, Transfer_Encoding="chunked")
    body = handler.file()
    for k in range(0, len(body), 10_000):
        piece = body[k : k + 10_000]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    handler.wfile.write(b"0\r\n\r\n")


@contextmanager
def misbehaving(folder, plan=None):
    "A server that follows a plan; what was asked of it stands in the log."
    state = dict(
        plan=plan or {},
        log=[],
        agents=set(),
        open_now=[0, 0],
        lock=threading.Lock(),
        leave=threading.Event(),
        began=threading.Event(),
    )
    with serve(folder, handler=type("Handler", (Planned,), state)) as url:
        try:
            yield SimpleNamespace(url=url, **state)
        finally:
            state["leave"].set()


def get(root, source, **options):
    options = dict(fields=["4230"], progress=False, backoff=0.001, timeout=10, tries=3) | options
    return fetch(root, source, **options)


@pytest.fixture
def server(tmp_path):
    return make_tree(tmp_path / "server")


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def downloads(log):
    return [path for path, _ in log if path.endswith(".fits")]


# --- the good day ---------------------------------------------------------------------------------


def test_all_comes_once_and_only_once(server, home):
    with misbehaving(server) as net:
        first = get(home, net.url)
        asked = len(net.log)
        second = get(home, net.url)
    assert first.ok and first.fetched == first.found == 4 and first.failed == 0
    assert first.bytes == sum(len(content) for content in tree(server).values())
    assert tree(home, unfinished=True) == tree(server)
    assert second.ok and second.already_there == 4 and second.bytes == 0
    assert downloads(net.log[asked:]) == []
    assert net.agents == {f"stellar_lab/{__version__}"}


def test_dry_run_writes_nothing(server, home):
    with misbehaving(server) as net:
        plan = get(home, net.url, dry_run=True)
    assert not home.exists() and downloads(net.log) == []
    assert plan.ok and plan.count("to fetch") == 4
    assert plan.bytes_to_fetch == sum(len(content) for content in tree(server).values())
    assert "4 to fetch" in str(plan) and "nothing was written" in str(plan)


def test_both_products_and_the_catalogue_once(tmp_path, home):
    fields = ("4230", "4262", "5162")
    server = make_tree(tmp_path / "server", fields=fields, products=("apstar", "aspcapstar"))
    with misbehaving(server) as net:
        summary = get(home, net.url, fields=fields, products=("apstar", "aspcapstar"))
    assert summary.ok and summary.found == 1 + 2 * 3 * 3 and tree(home) == tree(server)
    assert downloads(net.log).count(DR14.allstar) == 1 and len(downloads(net.log)) == summary.found
    assert (
        get(home, server, fields=fields, catalogue=False).found == 9
    )  # of apstar, without the catalogue


def test_a_folder_is_a_source(server, home, tmp_path):
    assert get(home, server).fetched == 4 and tree(home, unfinished=True) == tree(server)
    assert get(home, server).already_there == 4
    with pytest.raises(LabError, match="is the source itself"):
        get(server, server)


@pytest.mark.parametrize(
    "name, field, telescope",
    [
        ("dr10", "4260", "apo25m"),
        ("dr16", "M67", "apo25m"),
        ("dr17", "N362", "lco25m"),
        ("dr17", "060+00", "apo25m"),
        ("dr17", "120-08-RV", "apo1m"),
    ],
)
def test_path_rules_are_those_of_the_release(tmp_path, home, name, field, telescope):
    release = RELEASES[name]
    server = make_tree(tmp_path / "server", release, [field], ("apstar", "aspcapstar"), telescope)
    put(server, release.path("apstar", field, IDS[0] + "-56789", telescope), b"a visit: not wanted")
    with misbehaving(server) as net:
        summary = get(home, net.url, release=name, fields=field, products="apstar,aspcapstar")
    assert summary.ok and summary.found == 7
    expected = {
        release.path(product, field, star, telescope)
        for product in ("apstar", "aspcapstar")
        for star in IDS
    } | {release.allstar}
    assert set(tree(home)) == expected
    if telescope == "lco25m":
        assert sum("/asStar-" in path for path in expected) == 3


def test_the_labs_own_layout_counts(server, home):
    for star in IDS:
        put(
            home,
            f"stars/4230/apStar-r8-{star}.fits",
            (server / DR14.path("apstar", "4230", star)).read_bytes(),
        )
    put(home, "stars/allStar-l31c.2.fits", (server / DR14.allstar).read_bytes())
    before = tree(home)
    assert get(home, server).already_there == 4 and tree(home) == before
    assert get(home.parent / "other", home).fetched == 4 and tree(home.parent / "other") == tree(
        server
    )


def test_bounded_and_polite(tmp_path, home):
    server = make_tree(tmp_path / "server", fields=("4230", "4262", "5162", "4241"))
    with misbehaving(server) as net:
        assert get(home, net.url, fields=["4230", "4262", "5162", "4241"], workers=3).ok
    assert net.open_now[1] <= 3


def test_a_proxy_is_not_asked_for_the_loopback_address(server, home, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serve(server) as url:
        assert get(home, url).ok


# --- the bad day ----------------------------------------------------------------------------------

SECONDS = {stall: 0.7, trickle: 0.7}  # s; short where the client has to run out of it
PERMANENT = {
    "truncated": (cut, "broke off"),
    "reset in the body": (reset, "broke off"),
    "reset at once": (reset_at_once, "reset|aborted|closed"),
    "stalled": (stall, "timed out"),
    "trickles": (trickle, "too slow"),
    "says more": (says_more, "broke off"),
    "says less": (says_less, "truncated: HDU 9"),
    "web page": (page, "a web page"),
    "404": (status(404), "404"),
    "403": (status(403), "403"),
    "500": (status(500), "500"),
    "503": (status(503), "503"),
}


@pytest.mark.parametrize("fault", PERMANENT)
def test_what_stays_broken_is_reported_and_has_no_name(server, home, fault):
    step, reason = PERMANENT[fault]
    with misbehaving(server, {STAR: [step]}) as net:
        summary = get(home, net.url, timeout=SECONDS.get(step, 10), tries=2)
    assert not summary.ok and summary.fetched == 3
    [(path, why)] = summary.problems
    assert path == STAR and re.search(reason, why), why
    damaged = fault in ("web page", "says less")
    assert (
        STAR in str(summary)
        and ("damaged there" if damaged else "run the same again") in str(summary)
        and summary.damaged == damaged
    )
    assert tree(home) == {path: content for path, content in tree(server).items() if path != STAR}
    with misbehaving(server) as net:  # the next day
        assert get(home, net.url).ok and set(downloads(net.log)) == {STAR}
    assert tree(home, unfinished=True) == tree(server)


@pytest.mark.parametrize(
    "step",
    [
        cut,
        reset,
        reset_at_once,
        stall,
        trickle,
        says_more,
        says_less,
        page,
        status(500),
        status(502),
        status(504),
        status(429, Retry_After="0"),
        status(503, Retry_After="0"),
    ],
)
def test_what_breaks_once_is_tried_again(server, home, step):
    with misbehaving(server, {STAR: [step, None]}) as net:
        assert get(home, net.url, timeout=SECONDS.get(step, 10)).ok
    assert tree(home, unfinished=True) == tree(server) and downloads(net.log).count(STAR) in (
        2,
        3,
    )  # the third starts over


def test_what_is_damaged_at_the_source_is_asked_for_twice_only(server, home):
    with misbehaving(server, {STAR: [page]}) as net:
        assert get(home, net.url, tries=5).damaged == 1
    assert downloads(net.log).count(STAR) == 2


def test_a_busy_server_may_ask_for_a_pause(server, home):
    asked = []

    def busy(handler):
        asked.append(time.monotonic())
        handler.answer(503, Retry_After="1")

    def ready(handler):
        asked.append(time.monotonic())
        ArchiveHandler.do_GET(handler)

    with misbehaving(server, {STAR: [busy, ready]}) as net:
        assert get(home, net.url).ok
    assert asked[1] - asked[0] >= 0.99
    a_day = SimpleNamespace(headers={"Retry-After": "86400"})
    assert _ShortRetry(3).new().get_retry_after(a_day) == _MAX_WAIT


def test_a_busy_index_and_a_broken_one(server, home):
    index = f"{DR14.folder('apstar', '4230')}/"
    with misbehaving(server, {index: [status(503), None]}) as net:
        assert get(home, net.url).ok

    def half(handler):
        handler.answer(200, b"<a href='apStar", 500, close=True)

    with misbehaving(server, {index: [half, None]}) as net:
        assert get(home.parent / "other", net.url).ok
    with misbehaving(server, {index: [status(403)]}) as net:
        with pytest.raises(LabError, match="found nothing to fetch.*cannot be listed: 403"):
            get(home.parent / "third", net.url)
    assert not (home.parent / "third").exists()


def test_one_field_that_cannot_be_listed_does_not_stop_the_others(tmp_path, home):
    server = make_tree(tmp_path / "server", fields=("4230", "4262"))
    with misbehaving(server, {f"{DR14.folder('apstar', '4262')}/": [status(403)]}) as net:
        summary = get(home, net.url, fields=["4230", "4262"])
    assert (
        not summary.ok
        and summary.fetched == 4
        and summary.problems
        == [(f"{DR14.folder('apstar', '4262')}/", "cannot be listed: 403 Forbidden")]
    )


def test_a_server_without_head_or_length(server, home):
    def no_head(handler):
        handler.answer(405)

    with misbehaving(server, {STAR: [chunked]}) as net:
        Handler = type("Handler", (Planned,), dict(net.__dict__, do_HEAD=no_head))
        with serve(server, handler=Handler) as url:
            assert get(home, url).ok
            assert get(home, url).already_there == 4  # by its own headers
    assert tree(home, unfinished=True) == tree(server)


def test_an_answer_to_another_question(server, home):
    with misbehaving(
        server,
        {STAR: [lambda handler: handler.answer(206, handler.file(), Content_Range="bytes 0-9/10")]},
    ) as net:
        summary = get(home, net.url)
    assert summary.problems == [
        (STAR, "a plain question was answered with 206 Partial Content")
    ] and STAR not in tree(home)


def test_a_dying_server_is_left_alone(tmp_path, home):
    folder = DR14.folder("apstar", "4230")
    server = make_tree(tmp_path / "server")
    for k in range(60):
        put(
            server,
            f"{folder}/apStar-r8-2M000000{k:02d}+0000000.fits",
            b"SIMPLE  = but not more than that",
        )
    with misbehaving(server) as net:
        summary = get(home, net.url, tries=1, workers=2)
    assert any("others failed in a row" in reason for _, reason in summary.problems)
    assert summary.failed >= 20 and len(downloads(net.log)) < 50
    assert all(
        content == tree(server)[path] and not file_problem(home / path, 2)
        for path, content in tree(home).items()
    )


# --- going on where it broke off ------------------------------------------------------------------


def begin(server, home, path=STAR):
    "A first run that ends in the middle."
    with misbehaving(server, {path: [lambda handler: partial_answer(handler)]}) as net:
        assert not get(home, net.url, tries=1).ok
    part = home / f"{path}.part"
    assert 0 < part.stat().st_size < (server / path).stat().st_size and not (home / path).exists()
    return part.stat().st_size


def partial_answer(handler):
    whole = handler.file()
    tag = open_source("/").stat(handler.translate_path(handler.path)).tag
    handler.answer(200, whole[:30_000], len(whole), close=True, ETag=tag)


def test_resume(server, home):
    length = begin(server, home)
    with misbehaving(server) as net:
        summary = get(home, net.url)
    assert (STAR, f"bytes={length}-") in net.log
    assert summary.ok and summary.bytes == (server / STAR).stat().st_size - length
    assert tree(home, unfinished=True) == tree(server)


def test_resume_where_the_server_ignores_it(server, home):
    begin(server, home)
    with misbehaving(server, {STAR: [no_range]}) as net:
        assert get(home, net.url).ok
    assert tree(home, unfinished=True) == tree(server)


@pytest.mark.parametrize("obeys", [True, False])
def test_resume_of_a_file_that_changed(server, home, obeys):
    length = begin(server, home)
    put(server, STAR, tiny(10, 77))  # same size, other content

    def rest_of_another(handler):  # an answer that must not be glued to what is there
        whole = handler.file()
        if handler.headers.get("Range"):
            handler.answer(
                206,
                whole[length:],
                ETag='"new"',
                Content_Range=f"bytes {length}-{len(whole) - 1}/{len(whole)}",
            )
        else:
            handler.answer(200, whole, ETag='"new"')

    with misbehaving(server, {} if obeys else {STAR: [rest_of_another]}) as net:
        assert get(home, net.url).ok
    assert tree(home, unfinished=True) == tree(server)


@pytest.mark.parametrize("claim", ["bytes 0-9/57600", "bytes 1-2/*", "pages 3-4/5", ""])
def test_a_wrong_range_is_not_believed(server, home, claim):
    begin(server, home)

    def wrong(handler):
        if handler.headers.get("Range"):
            handler.answer(206, handler.file()[:10], Content_Range=claim)
        else:
            ArchiveHandler.do_GET(handler)

    with misbehaving(server, {STAR: [wrong]}) as net:
        assert get(home, net.url).ok
    assert tree(home, unfinished=True) == tree(server)


@pytest.mark.parametrize(
    "note",
    [
        None,
        "",
        "[]",
        '{"size": "x", "tag": ""}',
        '{"size": 9, "tag": "\\"t\\""}',
        '{"size": 999999, "tag": ""}',
    ],
)
def test_a_part_of_unknown_origin_is_not_trusted(server, home, note):
    put(home, f"{STAR}.part", b"x" * 20_000)
    if note is not None:
        put(home, f"{STAR}.part.note", note.encode())
    with misbehaving(server) as net:
        assert get(home, net.url).ok
    assert tree(home, unfinished=True) == tree(server)


def test_a_part_that_is_complete_or_too_long(server, home):
    whole = (server / STAR).read_bytes()
    for content in (whole, whole + b"x" * 100):
        put(home, f"{STAR}.part", content)
        put(home, f"{STAR}.part.note", json.dumps({"size": len(whole), "tag": ""}).encode())
        with misbehaving(server) as net:
            assert get(home, net.url).ok
        assert tree(home, unfinished=True) == tree(server)
        (home / STAR).unlink()


def test_a_flaky_line_gets_there_if_it_makes_progress(tmp_path):
    big = tmp_path / "server" / "big.bin"
    big.parent.mkdir()
    big.write_bytes(os.urandom(5 << 20))

    class Flaky(ArchiveHandler):
        def copyfile(self, source, outputfile):
            outputfile.write(source.read((1 << 20) + 1000))
            self.close_connection = True

    with serve(big.parent, handler=Flaky) as url:
        patience = Patience(tries=2, backoff=0.001)
        item = _Item("big.bin", "big.bin")
        _fetch_file(open_source(url, patience), item, tmp_path / "home", patience)
    assert item.state == "fetched" and item.received == big.stat().st_size
    assert (tmp_path / "home" / "big.bin").read_bytes() == big.read_bytes()


def test_a_damaged_file_at_home_loses_its_name(server, home):
    put(home, STAR, (server / STAR).read_bytes()[:-2880])
    with misbehaving(server, {STAR: [cut]}) as net:
        assert not get(home, net.url, tries=1).ok
    assert STAR not in tree(home)
    assert get(home, server).ok and tree(home, unfinished=True) == tree(server)


def test_damage_at_home_is_seen_and_mended(server, home):
    assert get(home, server).ok
    assert archive_sums(home) == {path: sha256_of(home / path) for path in tree(home)}
    data = bytearray((home / STAR).read_bytes())
    data[-2000] ^= 1  # the same size, a whole FITS file
    put(home, STAR, bytes(data))
    again = get(home, server)
    assert again.ok and again.fetched == 1 and again.already_there == again.found - 1
    assert tree(home) == tree(server)
    assert (home / f"{STAR}.old").read_bytes() == data  # perhaps somebody changed it on purpose
    assert get(home, server).fetched == 0


def test_a_newer_version_replaces_an_older_one(server, home):
    assert get(home, server).ok
    put(server, STAR, tiny(11, 5))
    assert get(home, server).fetched == 1 and tree(home, unfinished=True) == tree(server)


def slowly(handler):
    whole = handler.file()
    tag = open_source("/").stat(handler.translate_path(handler.path)).tag
    handler.answer(200, whole[:20_000], len(whole), close=True, ETag=tag)
    handler.began.set()
    for k in range(20_000, len(whole), 1000):
        if handler.leave.wait(0.1):
            return
        handler.wfile.write(whole[k : k + 1000])


def goes_on(server, home):
    """After an interruption: the part is there, nothing wrong has a name.

    And the next run takes up the part."""
    assert (home / f"{STAR}.part").stat().st_size >= 20_000
    assert STAR not in tree(home) and all(
        content == tree(server)[path] for path, content in tree(home).items()
    )
    with misbehaving(server) as net:
        assert get(home, net.url).ok
    assert any(path == STAR and asked for path, asked in net.log) and tree(
        home, unfinished=True
    ) == tree(server)


@pytest.fixture
def control_c():
    "Control-C interrupts, also where a shell that runs the tests in the background has it ignored."
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def test_control_c(server, home, control_c):
    def press(handler):
        threading.Timer(
            0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]
        ).start()
        slowly(handler)

    with misbehaving(server, {STAR: [press]}) as net:
        with pytest.raises(KeyboardInterrupt):
            get(home, net.url)
    assert threading.active_count() < 20 and not [
        thread for thread in threading.enumerate() if "ThreadPool" in thread.name
    ]
    goes_on(server, home)


def fetch_when_told(home, pipe):
    get(home, pipe.recv())


def test_killed(server, home):
    context = multiprocessing.get_context(
        "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    )
    told, pipe = context.Pipe()
    process = context.Process(target=fetch_when_told, args=(home, told))
    process.start()  # before the server's threads
    with misbehaving(server, {STAR: [slowly]}) as net:
        pipe.send(net.url)
        assert net.began.wait(100)
        for _ in range(10):
            assert all(
                content == tree(server)[path] for path, content in tree(home).items()
            )  # at any moment
            time.sleep(0.03)
        process.kill()
        process.join(20)
    assert process.exitcode == -signal.SIGKILL
    goes_on(server, home)


# --- a page of links from a stranger --------------------------------------------------------------


def test_hostile_index(server, home, tmp_path):
    other = make_tree(tmp_path / "other", fill=50)
    folder = DR14.folder("apstar", "4230")
    put(server, "secret.fits", tiny(10))
    with misbehaving(other) as evil, misbehaving(server) as net:
        names = [f"apStar-r8-2M{k:08d}+0000000.fits" for k in range(3000)]
        links = [
            *(f"../{name}" for name in names),
            *(f"{evil.url}/{folder}/{name}" for name in names),
            *(f"..%2f..%2F{name}" for name in names),
            f"//{evil.url.partition('//')[2]}/{folder}/{names[0]}",
            f"{names[0]}?x=1",
            f"{names[0]}#top",
            f"sub/{names[0]}",
            "/secret.fits",
            "apStar-r8-2M21334193-0048169-56931.fits",
            "file:///etc/passwd",
            "http://[broken/",
            "../../../../../../secret.fits",
            "%2e%2e/",
            "",
            "C:\\x",
            f"{names[0]}%00.fits",
            f"{names[0]};rm -rf",
            *(f"x{k}.txt" for k in range(1000)),
            f"apStar-r8-{IDS[0]}.fits",
        ]
        body = (
            "<html><base href='http://elsewhere.invalid/'>"
            + "".join(f'<a href="{link}">x</a>' for link in links)
        ).encode()
        net.plan[f"{folder}/"] = [
            lambda handler: handler.answer(200, body, Content_Type="text/html")
        ]
        summary = get(home, net.url)
    assert len(links) > 10_000 and summary.ok and evil.log == []
    assert (
        set(tree(home, unfinished=True)) == {STAR, DR14.allstar}
        and tree(home)[STAR] == tree(server)[STAR]
    )
    assert {path for path, _ in net.log} == {
        ARCHIVE_FILE,
        f"{folder}/",
        f"{folder}/".replace("apo25m", "apo1m"),
        STAR,
        DR14.allstar,
    }


def test_a_large_index(server):
    folder = DR14.folder("apstar", "4230")
    names = [f"apStar-r8-2M{k:08d}-0000000.fits" for k in range(10_000)]
    body = "".join(
        f'<tr><td><a href="{name}">{name}</a></td><td align="right">1.2M</td></tr>\n'
        for name in names
    ).encode()
    with misbehaving(server, {f"{folder}/": [lambda handler: handler.answer(200, body)]}) as net:
        items = _find_stars(open_source(net.url), DR14, "apstar", "4230", ("apo25m",))
    assert [Path(item.path).name for item in items] == names


BASE = "http://archive.invalid:8080/a/b/"
pieces = st.sampled_from(
    [
        "..",
        ".",
        "/",
        "\\",
        "%2f",
        "%2e",
        "a",
        "apStar-r8-",
        "2M21334193-0048169",
        ".fits",
        "?",
        "#",
        ":",
        "//",
        "http:",
        "@",
        "evil",
        "archive.invalid:8080",
        "/a/b/",
        "\x00",
        " ",
        "[",
        "é",
        "\n",
        "&amp;",
        "%00",
        ";",
        "+",
        "-",
    ]
)
scraps = st.sampled_from(
    [
        "<",
        ">",
        "<a href=",
        "'",
        '"',
        "</",
        "<!--",
        "-->",
        "<![",
        "]]>",
        "<!",
        "x",
        "<script>",
        "&#0;",
        "&",
    ]
)
hrefs = st.lists(pieces, max_size=8).map("".join) | st.text(max_size=20)


@settings(deadline=None, max_examples=60)
@given(st.lists(hrefs, max_size=10))
def test_index_links_lead_nowhere_else(links):
    page = "".join('<a href="{}">x</a>'.format(link.replace('"', "&quot;")) for link in links)
    listing = _parse_index([page], BASE)
    for name in listing.files:
        assert _PLAIN_NAME.fullmatch(name) and urljoin(BASE, name) == BASE + name
        assert Path("/home/x", name).parent == Path("/home/x")
    for name in listing.folders:
        assert _PLAIN_NAME.fullmatch(name)


@settings(deadline=None, max_examples=60)
@given(st.text() | st.lists(scraps).map("".join))
def test_any_page_is_read_without_an_error(page):
    assert _parse_index(page, BASE) == _parse_index([page], BASE)  # in whatever pieces it comes


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,20}", fullmatch=True), max_size=10, unique=True
    )
)
def test_plain_names_are_found(names):
    page = "".join(f"<li><a href={name!r}>{name}</a>" for name in names)
    assert list(_parse_index([page], BASE).files) == names


@settings(deadline=None, max_examples=60)
@given(st.lists(pieces, max_size=6).map("".join) | st.text(max_size=30) | st.none() | st.integers())
def test_extra_files_stay_below_the_root(name):
    if _is_safe(name):
        root = Path("/home/x")
        assert (
            (root / name).relative_to(root).parts
            and ".." not in Path(name).parts
            and "\\" not in name
        )
        assert Path(os.path.normpath(root / name)).is_relative_to(root)


# --- files ----------------------------------------------------------------------------------------

WHOLE = tiny(10)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, len(WHOLE) - 1))
def test_no_half_is_whole(tmp_path_factory, end):
    file = tmp_path_factory.getbasetemp() / "half.fits"
    file.write_bytes(WHOLE[:end])
    assert file_problem(file, 10)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3), st.integers(0, 2879), st.binary(min_size=1, max_size=80))
def test_any_garbage_is_answered_in_words(tmp_path_factory, block, at, garbage):
    file = tmp_path_factory.getbasetemp() / "garbage.fits"
    start = block * 2880 + at
    file.write_bytes(WHOLE[:start] + garbage + WHOLE[start + len(garbage) :])
    assert isinstance(file_problem(file, 10), str)


def test_what_is_wrong_with_a_file(tmp_path):
    def verdict(content, hdus):
        return file_problem(put(tmp_path, "x", content), hdus)

    assert verdict(WHOLE, 10) == "" and verdict(WHOLE, 11) == "only 10 of 11 HDUs"
    assert verdict(b"", 0) == verdict(b"", 1) == "empty"
    assert verdict(b"PK", 1) == "not a FITS file" and verdict(b"# %ECSV 1.0", 0) == ""
    assert (
        verdict(b"\xef\xbb\xbf\n <HTML>", 0)
        == verdict(b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC', 1)
        == "a web page, not data"
    )
    assert verdict(b"<VOTABLE>", 0) == ""
    assert verdict(WHOLE + b"\0" * 2880, 10).startswith("damaged")
    assert verdict(WHOLE + WHOLE, 10) == "damaged: HDU 10 is not an extension of FITS"
    negative = WHOLE.replace(b"NAXIS1  =                 2000", b"NAXIS1  =                -2000")
    assert verdict(negative, 10).startswith("damaged")
    assert [_bytes(n) for n in (0, 999, 1500, 2.5e6, 8e9)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "2.5 MB",
        "8.0 GB",
    ]


def test_the_surveys_own_files_are_whole():
    if real_data() is None:
        pytest.skip("STELLAR_LAB_REAL_DATA is not set")
    files = sorted(real_data().glob("apStar-*.fits"))
    assert files and all(file_problem(file, PRODUCTS["apstar"].hdus) == "" for file in files)
    assert all(file_problem(file, 2) == "" for file in real_data().glob("allStar*.fits"))


# --- our own archives -----------------------------------------------------------------------------


def mark(root, name="clusters", files=()):
    put(
        root, ARCHIVE_FILE, json.dumps({"archive": name, "seed": 42, "files": list(files)}).encode()
    )


def further_files(monkeypatch, *names):
    "Let the record of clusters know further files."
    record = replace(ARCHIVES["clusters"], files=names)
    monkeypatch.setitem(ARCHIVES, "clusters", record)


def test_archive_json_and_the_files_it_lists(server, home, monkeypatch):
    further_files(monkeypatch, "mystery.fits", "truth/truth.ecsv")
    mark(server, files=["mystery.fits", "truth/truth.ecsv"])
    put(server, "mystery.fits", tiny(4))
    put(server, "truth/truth.ecsv", b"# %ECSV 1.0\nid teff\n")
    with misbehaving(server) as net:
        summary = get(home, net.url)
        again = get(home, net.url)
    assert (
        summary.ok
        and summary.archive == "clusters"
        and summary.found == summary.fetched == 7
        and again.already_there == 7
    )
    assert tree(home, unfinished=True) == tree(server)
    assert net.log[0][0] == ARCHIVE_FILE


def test_a_small_archive_of_ours_has_not_all_fields(server, home):
    mark(server)
    assert get(home, server, fields=None).ok  # 4230 only, of the record's 19
    (server / ARCHIVE_FILE).unlink()
    with pytest.raises(
        LabError, match="no field '(4262|5162|4241)'"
    ):  # the survey has all that its record names
        get(home.parent / "other", server, fields=None)


def test_extra_files_are_checked_too(server, home, monkeypatch):
    further_files(monkeypatch, "truth.ecsv", "mystery.fits", "absent.ecsv")
    mark(server, files=["truth.ecsv", "mystery.fits", "absent.ecsv"])
    put(server, "truth.ecsv", b"# %ECSV 1.0\nid teff\n" * 100)
    put(server, "mystery.fits", tiny(4))
    with misbehaving(server, {"truth.ecsv": [cut], "mystery.fits": [page]}) as net:
        summary = get(home, net.url, tries=1)
    assert {path for path, _ in summary.problems} == {"truth.ecsv", "mystery.fits", "absent.ecsv"}
    assert not {"truth.ecsv", "mystery.fits", "absent.ecsv"} & set(tree(home))
    put(home, "truth.ecsv", b"half a truth")  # of the wrong size
    with misbehaving(server, {"truth.ecsv": [cut]}) as net:
        assert not get(home, net.url, tries=1).ok and "truth.ecsv" not in tree(home)


def test_a_page_in_place_of_archive_json_means_none(server, home):
    with misbehaving(server, {ARCHIVE_FILE: [page]}) as net:
        summary = get(home, net.url)
    assert summary.ok and summary.archive == "survey" and not (home / ARCHIVE_FILE).exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "does not name an archive"),
        ("[]", "does not name an archive"),
        ('{"archive": "atlantis"}', "'atlantis'.*choose from survey"),
        ('{"archive": ["clusters"]}', "choose from"),
        ('{"archive": "clusters", "files": "/etc/passwd"}', "do not trust"),
        (
            '{"archive": "clusters", "files": ["../x"]}',
            "'../x', which is not a path below its root",
        ),
        ('{"archive": "clusters", "files": ["archive.json"]}', "do not trust"),
        ('{"archive": "clusters", "files": [7]}', "do not trust"),
        ('{"archive": "clusters", "files": ["thesis.tex"]}', "'thesis.tex', which an archive"),
        ('{"archive": "clusters", "files": ["dr14/apogee/x.fits"]}', "do not trust"),
        ('{"archive": "clusters", "sha256": ["x"]}', "checksums that are none"),
        ("[" * 20_000, "does not name an archive"),
    ],
)
def test_a_wrong_archive_json(server, home, content, message):
    put(server, ARCHIVE_FILE, content.encode())
    with pytest.raises(LabError, match=message):
        get(home, server)
    assert not home.exists()


def test_two_archives_do_not_mix(server, home):
    mark(server)
    assert get(home, server).ok
    (server / ARCHIVE_FILE).unlink()
    with pytest.raises(LabError, match="holds the archive 'clusters', but .* is 'survey'"):
        get(home, server)


# --- what a user can get wrong --------------------------------------------------------------------


def test_no_such_field(tmp_path, home):
    server = make_tree(tmp_path / "server", fields=("4230", "4262"))
    for source in (server, None):
        with misbehaving(server) as net:
            with pytest.raises(
                LabError, match="no field '4231' with apstar files of DR14; it has 4230"
            ):
                get(home, source or net.url, fields=["4230", "4231"])
            with pytest.raises(
                LabError, match="no field '4230' with aspcapstar|no field '4230': there is no"
            ):
                get(home, source or net.url, products=["aspcapstar"])
    assert _list_fields(open_source(server), DR14) == ["4230", "4262"] and not home.exists()


def test_nothing_found(tmp_path, home):
    put(tmp_path, f"server/{DR14.folder('apstar', '4230')}/readme.txt", b"empty")
    with pytest.raises(LabError, match="found nothing to fetch.*no apstar file of a star"):
        get(home, tmp_path / "server")


def test_an_empty_field_beside_a_good_one(server, home):
    (server / DR14.folder("apstar", "4262")).mkdir()
    summary = get(home, server, fields=["4230", "4262"])
    assert (
        not summary.ok
        and summary.fetched == 4
        and summary.problems[0][1] == "no apstar file of a star in it"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(release="dr99"), "unknown release 'dr99': choose from dr10"),
        (dict(fields=["../x"]), "'../x' cannot be a field"),
        (dict(fields=[]), "no field was given"),
        (dict(products=["apvisit"]), "no product 'apvisit': choose from apstar, aspcapstar"),
        (dict(telescopes=["hst"]), "no telescope 'hst': choose from apo25m"),
        (dict(release="dr17", fields=None), "which fields of DR17"),
        (dict(workers=0), "at least 1"),
    ],
)
def test_wrong_options(server, home, options, message):
    with pytest.raises(LabError, match=message):
        get(home, server, **options)


@pytest.mark.parametrize(
    "source",
    [
        "ftp://archive.invalid",
        "http://",
        "https://archive.invalid:port/",
        "http://archive.invalid/?q=1",
        "/no/such/folder",
    ],
)
def test_wrong_sources(home, source):
    with pytest.raises(LabError, match="cannot fetch from|there is no folder"):
        get(home, source)


def test_nobody_answers(server, home):
    with serve(server) as url:
        pass
    with pytest.raises(LabError, match="cannot fetch from .*refused.*check the address"):
        get(home, url, tries=1)
    secret = url.replace("http://", "http://sdss:open-sesame@")
    with pytest.raises(LabError) as caught:
        get(home, secret, tries=1)
    assert "open-sesame" not in str(caught.value) and not home.exists()


def test_a_root_that_cannot_be_written(server, tmp_path):
    file = put(tmp_path, "file", b"")
    for root in (file, file / "below"):
        with pytest.raises(LabError, match="cannot write to|is not a"):
            get(root, server)
    with pytest.raises(LabError, match="no room for"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
            get(tmp_path / "full", server)


def test_a_disk_that_fails_is_said_once(server, home, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(LabError, match="cannot write .*No space left on device; free the disk"):
        get(home, server)
    assert tree(home) == {}


def test_two_at_once(server, home):
    pytest.importorskip("fcntl")
    seen = []

    def other_one(handler):
        try:
            get(home, server)
        except LabError as error:
            seen.append(str(error))
        ArchiveHandler.do_GET(handler)

    with misbehaving(server, {STAR: [other_one]}) as net:
        assert get(home, net.url).ok
    assert "another fetch is writing to" in seen[0]


def test_sources_say_what_is_wrong(server):
    source = open_source(server)
    for ask, path in (
        (source.stat, "nothing.fits"),
        (source.stat, "dr14"),
        (source.list, "nowhere"),
    ):
        with pytest.raises(SourceError) as caught:
            ask(path)
        assert caught.value.cause == "missing"
    with misbehaving(server, {STAR: [cut], "page": [status(403)]}) as net:
        web = open_source(net.url, Patience(tries=1))
        with pytest.raises(SourceError, match="403") as refused, web.open("page"):
            pass
        with pytest.raises(SourceError) as dropped, web.open(STAR) as body:
            b"".join(body.chunks)
    assert (refused.value.cause, dropped.value.cause) == ("refused", "dropped")
    with (
        pytest.raises(LabError, match="cannot serve on port"),
        serve(server) as url,
        serve(server, port=int(url.rpartition(":")[2])),
    ):
        pass


def test_the_summary_as_a_table(server, home):
    with misbehaving(server, {STAR: [status(404)]}) as net:
        summary = get(home, net.url)
    table = summary.table()
    assert (
        table.colnames == ["path", "size", "state", "reason"] and len(table) == summary.found == 4
    )
    states = dict(zip(table["path"], table["state"], strict=True))
    assert states[STAR] == "failed" and set(table["size"]) == {len(WHOLE), len(tiny(2))}


# --- nothing of the user's is lost, nothing wrong is taken ----------------------------------------


def test_a_source_cannot_choose_what_it_replaces(server, home):
    mark(server, files=["thesis.tex"])
    put(server, "thesis.tex", b"x")
    put(home, "thesis.tex", b"my only copy")
    for source in (server, home):  # whichever of the two refusals comes first
        with pytest.raises(LabError, match="thesis.tex|is the source itself"):
            get(home, source)
    assert tree(home, unfinished=True) == {"thesis.tex": b"my only copy"}


def test_a_root_with_other_things_in_it_is_refused(server, home):
    put(home, "notes/thesis.tex", b"my only copy")
    with pytest.raises(LabError, match="is not empty and holds no archive .notes is in it"):
        get(home, server)
    assert list(tree(home, unfinished=True)) == ["notes/thesis.tex"]
    put(home, STAR, (server / STAR).read_bytes())  # an archive with notes in it is one
    assert get(home, server).ok and tree(home)["notes/thesis.tex"] == b"my only copy"


def test_what_no_fetch_wrote_is_not_replaced(server, home):
    mark(server, files=[TRUTH_FILE])
    put(server, TRUTH_FILE, tiny(2))
    put(home, TRUTH_FILE, b"my own truth")
    put(home, STAR, (server / STAR).read_bytes())
    with pytest.raises(LabError, match="truth.fits was not fetched from an archive"):
        get(home, server)
    assert tree(home, unfinished=True)[TRUTH_FILE] == b"my own truth"


def test_what_stood_under_a_stars_name_is_kept(server, home):
    put(home, STAR, b"my own notes, under a daring name")
    put(home, DR14.allstar, (server / DR14.allstar).read_bytes()[:4000])  # a beginning: worthless
    summary = get(home, server)
    assert summary.ok and tree(home) == tree(server)
    kept = {name for name in tree(home, unfinished=True) if name not in tree(server)}
    assert kept == {f"{STAR}.old"} and b"daring" in (home / f"{STAR}.old").read_bytes()
    assert [item.reason for item in summary.items if item.path == STAR] == [
        f"what stood there is kept as {Path(STAR).name}.old"
    ]


@pytest.mark.parametrize("tag", [None, 'W/"1"', "1", '""'])
def test_without_a_strong_tag_a_file_starts_anew(server, home, tag):
    def half_of_the_old(handler):
        whole = handler.file()
        handler.answer(200, whole[:30_000], len(whole), close=True, **tags)

    def rest_of_the_new(handler):
        wanted = handler.headers.get("Range")
        whole = handler.file()
        if not wanted:
            return handler.answer(200, whole, **tags)
        start = int(wanted[6:-1])
        place = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        handler.answer(206, whole[start:], Content_Range=place, **tags)

    tags = {"Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT"} | ({"ETag": tag} if tag else {})
    with misbehaving(server, {STAR: [half_of_the_old]}) as net:
        assert not get(home, net.url, tries=1).ok
    put(server, STAR, tiny(10, 77))  # same size, other content
    with misbehaving(server, {STAR: [rest_of_the_new]}) as net:
        assert get(home, net.url).ok
    assert tree(home, unfinished=True) == tree(server)


def with_sums(root):
    "archive.json with the checksum of each file."
    sums = {path: sha256_of(root / path) for path in tree(root)}
    put(root, ARCHIVE_FILE, json.dumps({"archive": "clusters", "sha256": sums}).encode())


def changed(content):
    "The same content but for one bit of the first array."
    at = 2880 * 2 + 100
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_a_file_with_another_content_is_not_there(server, home):
    with_sums(server)
    assert get(home, server).ok
    put(home, STAR, changed((home / STAR).read_bytes()))  # of the same size, and whole
    plan = get(home, server, dry_run=True)
    assert [item.path for item in plan.items if item.state == "to fetch"] == [STAR]
    assert get(home, server).fetched == 1 and tree(home, unfinished=True) == tree(server)


def test_a_file_that_changed_on_its_way_is_refused(server, home):
    with_sums(server)
    wrong = lambda handler: handler.answer(200, changed(handler.file()))  # noqa: E731
    with misbehaving(server, {STAR: [wrong]}) as net:
        summary = get(home, net.url)
    assert [path for path, _ in summary.problems] == [STAR] and STAR not in tree(home)
    assert "another content than archive.json says" in summary.problems[0][1]
    with misbehaving(server, {STAR: [wrong, None]}) as net:
        assert get(home, net.url).ok


def test_two_archives_of_one_kind_do_not_mix(server, home):
    mark(server)
    assert get(home, server).ok
    put(server, ARCHIVE_FILE, json.dumps({"archive": "clusters", "seed": 43}).encode())
    with pytest.raises(LabError, match="holds another archive"):
        get(home, server)


def named(star, hdus=10):
    "A star's file that says whose it is."
    file = BytesIO()
    first = fits.PrimaryHDU(header=fits.Header({"OBJID": star}))
    fits.HDUList([first, *(fits.ImageHDU(np.zeros(9)) for _ in range(hdus - 1))]).writeto(file)
    return file.getvalue()


def test_another_stars_file_is_refused(server, home):
    put(server, STAR, named(IDS[1]))
    summary = get(home, server)
    assert summary.problems == [
        (STAR, f"holds another star: its header says {IDS[1]}, its name {IDS[0]}")
    ]
    put(server, STAR, named(f" {IDS[0]} "))
    assert get(home, server).ok


def test_headers_have_a_deadline(server, home):
    def slowly_headers(handler):
        with suppress(OSError):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            while not handler.leave.wait(0.05):
                handler.wfile.write(b"x")

    begun = time.monotonic()
    with misbehaving(server, {STAR: [slowly_headers]}) as net:
        summary = get(home, net.url, tries=2, timeout=0.4)
        assert time.monotonic() - begun < 8
    assert [path for path, _ in summary.problems] == [STAR]


@pytest.mark.parametrize("content", [b"", WHOLE])
def test_a_body_without_end_is_stopped(server, home, content):
    sent = []

    def endless(handler):
        handler.answer(200, content, length=False, close=True)
        with suppress(OSError):
            while not handler.leave.is_set() and len(sent) < 1000:
                sent.append(handler.wfile.write(bytes(1 << 16)))

    with misbehaving(server, {STAR: [endless]}) as net:
        summary = get(home, net.url)
    assert [path for path, _ in summary.problems] == [STAR] and sum(sent) < 40 << 20
    assert "more comes than its headers explain" in summary.problems[0][1]
    assert not [name for name in tree(home, unfinished=True) if name.startswith(STAR)]


def test_headers_that_promise_more_than_the_disk(server, home):
    huge = WHOLE.replace(b"NAXIS1  =                 2000", b"NAXIS1  =     9000000000000000", 1)

    def much(handler):
        handler.answer(200, huge + bytes(3 << 20), length=False, close=True)

    with misbehaving(server, {STAR: [much]}) as net:
        summary = get(home, net.url, tries=1)
    assert "which the disk cannot hold" in summary.problems[0][1]


def test_what_is_no_file_in_a_folder(server, home):
    folder = Path(STAR).parent
    pipe = str(folder / "apStar-r8-2M00000001+0000000.fits")
    os.mkfifo(server / pipe)
    inside = str(folder / "apStar-r8-2M00000002+0000000.fits")
    (server / inside).mkdir()
    endless = str(folder / "apStar-r8-2M00000003+0000000.fits")
    (server / endless).symlink_to("/dev/zero")
    summary = get(home, server)
    assert dict(summary.problems) == {
        pipe: "a named pipe, not a file",
        inside: "a folder, not a file",
        endless: "a device, not a file",
    }
    (server / ARCHIVE_FILE).unlink(missing_ok=True)
    os.mkfifo(server / ARCHIVE_FILE)
    with pytest.raises(LabError, match="cannot fetch from .*a named pipe, not a file"):
        get(home, server)


def test_what_is_no_file_at_home(server, home):
    (home / STAR).mkdir(parents=True)
    summary = get(home, server)
    assert summary.problems == [(STAR, "a folder stands in its place")]
    os.mkfifo(home / ARCHIVE_FILE)
    with pytest.raises(LabError, match="archive.json is a named pipe, not a file"):
        get(home, server)


def test_a_servers_words_cannot_move_the_cursor(server, home):
    def rude(handler):
        handler.wfile.write(b"HTTP/1.1 403 \x1b[2J\x1b]0;owned\x07\r\nContent-Length: 0\r\n\r\n")

    with misbehaving(server, {STAR: [rude]}) as net:
        summary = get(home, net.url)
    assert summary.problems == [(STAR, "403 ?[2J?]0;owned?")]
    assert "\x1b" not in str(summary) and "\x07" not in str(summary)


@pytest.mark.parametrize("scrap", ["<a ", "<a href='", "<!--", "<![", "<", "&#"])
def test_a_page_is_read_in_linear_time(scrap):
    begun = time.process_time()
    _parse_index([scrap + "x" * (8 << 20)], BASE)
    _parse_index([scrap * (1 << 18)], BASE)
    assert time.process_time() - begun < 6


def test_odd_files_bring_no_warnings_of_a_library(server, home):
    "What the summary says of a file is enough."
    usual = (server / STAR).read_bytes()
    odd = usual.replace(b"NAXIS1  =                 2000", b"naxis1  =                 2000", 1)
    put(server, STAR, odd + b"x" * 100)
    with pytest.warns(AstropyWarning), fits.open(server / STAR) as file:
        file.verify("warn")  # the library has something to say of such a file
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with serve(server) as url:
            fetch(home, url, fields=["4230"], progress=False)
            fetch(home.with_name("other"), str(server), fields=["4230"], progress=False)
    assert not [one for one in caught if issubclass(one.category, AstropyWarning)]
