"""Sources against evil servers and growing files; the journal killed, locked and damaged; duplicates; order."""

import gzip
import io
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprod import LLMProdError
from llmprod.news_monitoring import channels, fetch, sources
from llmprod.news_monitoring.documents import (
    DAY,
    HEAD,
    HOUR,
    LIMIT,
    Document,
    NewsError,
    document,
    fingerprint,
    public,
    seconds,
)
from llmprod.news_monitoring.duplicates import new_documents
from llmprod.news_monitoring.feeds import Feed
from llmprod.news_monitoring.fetch import decoded
from llmprod.news_monitoring.journal import Journal
from llmprod.news_monitoring.order import ready
from llmprod.news_monitoring.sources import Lines, Replay, Tail
from llmprod.products import opened_store


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now: float = 1.7e9):
        self.now = now

    def __call__(self) -> float:
        return self.now


def rss(*titles: str, more: str = "") -> str:
    items = "".join(
        f"<item><guid>{n}</guid><title>{t}</title><description>&lt;p&gt;Body of &lt;b&gt;{n}&lt;/b&gt;&lt;/p&gt;"
        f"</description><link>http://x/{n}</link><pubDate>{formatdate(1.6e9 + n)}</pubDate></item>"
        for n, t in enumerate(titles)
    )
    return f'<?xml version="1.0"?>{more}<rss version="2.0"><channel><title>f</title>{items}</channel></rss>'


# Feeds


@pytest.fixture
def server(monkeypatch):
    """Serves `pages`: path -> function of the handler, or (status, headers, body); `asked` logs the requests."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    pages, asked, ending = {}, [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, dict(self.headers)))
            page = pages[self.path]
            try:
                if callable(page):
                    return page(self)
                status, headers, body = page
                self.send_response(status)
                for name, value in ({"Content-Length": len(body)} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass  # the client had enough

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads, http.pages, http.asked, http.ending = True, pages, asked, ending
    http.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield http
    ending.set()
    http.shutdown()
    http.server_close()


def page(body: str | bytes, **headers: str) -> tuple:
    return (
        200,
        {name.replace("_", "-"): value for name, value in headers.items()},
        (body.encode() if isinstance(body, str) else body),
    )


def feed(server, path: str, **options) -> Feed:
    return Feed(server.url + path, **({"clock": Clock(), "interval": 0} | options))


def test_feed_gives_each_entry_once_with_its_time_and_plain_text(server):
    server.pages["/"] = page(rss("One &amp; only", "Two"))
    source = feed(server, "/")
    documents, cursor = source.poll({})
    assert [d.title for d in documents] == ["One & only", "Two"] and [d.time for d in documents] == [1.6e9, 1.6e9 + 1]
    assert documents[0].text == "One & only\nBody of 0" and documents[0].link == "http://x/0"
    assert documents[0].source == source.name and not source.finished(cursor) and "error" not in cursor
    server.pages["/"] = page(rss("One, corrected", "Two", "Three"))
    later, cursor = source.poll(json.loads(json.dumps(cursor)))
    assert [d.title for d in later] == ["Three"]
    server.pages["/other"] = page(rss("Of another feed"))
    other = feed(server, "/other").poll({})[0][0]
    assert other.id != documents[0].id, "the guid 0 of two feeds names two entries"


def test_feed_without_ids_and_dates(server):
    atom = "<feed xmlns='http://www.w3.org/2005/Atom'><entry><title>A</title><content type='html'>{}</content></entry>"
    server.pages["/"] = page(atom.format("Text&lt;br&gt;more &lt;script&gt;evil()&lt;/script&gt;") + "</feed>")
    (document,), cursor = feed(server, "/").poll({})
    assert document.text == "A\nText more" and math.isnan(document.time)
    assert document.id == fingerprint(document.source, document.text)
    assert feed(server, "/").poll(cursor)[0] == []


def test_feed_is_asked_only_for_what_changed(server):
    def conditional(handler):
        same = handler.headers.get("If-None-Match") == '"v1"' and handler.headers.get("If-Modified-Since") == "then"
        handler.send_response(304 if same else 200)
        handler.send_header("ETag", '"v1"')
        handler.send_header("Last-Modified", "then")
        handler.end_headers()
        if not same:
            handler.wfile.write(rss("One").encode())

    server.pages["/"] = conditional
    source = feed(server, "/", interval=60)
    documents, cursor = source.poll({})
    assert len(documents) == 1
    assert source.poll(cursor) == ([], cursor) and len(server.asked) == 1, "not before the interval has passed"
    source.clock.now += 61
    documents, after = source.poll(cursor)
    assert documents == [] and "error" not in after and after["seen"] == cursor["seen"] and len(server.asked) == 2
    source.clock.now += 61
    assert source.poll(after)[0] == [] and server.asked[-1][1]["If-None-Match"] == '"v1"'


def test_feed_backs_off_and_comes_back(server):
    server.pages["/"] = (500, {}, b"")
    source, waits, cursor = feed(server, "/", base=60), [], {}
    for asked in range(1, 8):
        documents, cursor = source.poll(cursor)
        assert documents == [] and cursor["failures"] == asked == len(server.asked)
        assert source.name in cursor["error"] and "answered 500" in cursor["error"]
        waits.append(cursor["not_before"] - source.clock.now)
        source.clock.now = cursor["not_before"] - 1
        assert source.poll(cursor) == ([], cursor) and len(server.asked) == asked, "not asked too early"
        source.clock.now += 1
    assert waits == [120, 240, 480, 960, 1920, 3600, 3600]
    assert source.poll(cursor | {"failures": 10_000})[1]["failures"] == 10_001
    server.pages["/"] = page(rss("One"))
    documents, cursor = source.poll(cursor)
    assert len(documents) == 1 and "failures" not in cursor and "error" not in cursor


@pytest.mark.parametrize(
    ("header", "wait"),
    [("900", 900), (formatdate(1.7e9 + 500, usegmt=True), 500), ("1", 2), ("9" * 400, DAY), ("soon", 2), ("-3", 2)],
)
def test_feed_honours_retry_after(server, header, wait):
    server.pages["/"] = (429, {"Retry-After": header}, b"")
    _, cursor = feed(server, "/", base=1).poll({})
    assert cursor["not_before"] == 1.7e9 + wait and "answered 429" in cursor["error"]


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 65536)


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.ending.wait(0.02):
        handler.wfile.write(b" ")


def slow_body(handler):
    """Ends after the deadline, without a moment in which nothing comes."""
    handler.send_response(200)
    handler.end_headers()
    for part in rss("One").encode():
        if handler.server.ending.wait(0.02):
            return
        handler.wfile.write(bytes([part]))


def drip_headers(handler):
    while not handler.server.ending.wait(0.02):
        handler.wfile.write(b"H")


def endless_redirect(handler):
    handler.send_response(302)
    handler.send_header("Location", "/good")
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 65536)


def bomb(size: int) -> bytes:
    return gzip.compress(b" " * size)


LAUGHS = '<!DOCTYPE r [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE r [<!ENTITY a SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (page("<rss><channel><item"), "malformed, without an entry"),
        (page("<html><body>Not here</body></html>"), "neither RSS nor Atom"),
        (page(""), "neither RSS nor Atom"),
        (endless, "more than 200,000 bytes"),
        (page(b" " * 300_000), "more than 200,000 bytes"),
        (page(bomb(50_000_000), Content_Encoding="gzip"), "more than 200,000 bytes"),
        (page(bomb(1000)[:-9], Content_Encoding="gzip"), "broke off"),
        (page(gzip.compress(bomb(1000)), Content_Encoding="gzip, gzip"), "not asked for"),
        (page(b"no gzip", Content_Encoding="gzip"), "header check"),
        (page("<rss>", Content_Length="100"), "more expected"),
        (page(rss("&b;", more=LAUGHS)), "declares entities"),
        (page(rss("&b;", more=LAUGHS).encode("utf-16")), "declares entities"),
        (page(rss("&b;", more=LAUGHS).encode("utf-16-be")), "declares entities"),
        (page(rss("&a;", more=OUTSIDE)), "declares entities"),
        ((302, {"Location": "/"}, b""), "more than 5 redirects"),
        ((302, {"Location": "file:///etc/passwd"}, b""), "not http"),
        ((302, {"Location": "http://"}, b""), ""),
        ((204, {}, b""), "answered 204"),
        (drip, "in time"),
        (drip_headers, "in time"),
        (slow_body, "in time"),
    ],
)
def test_evil_feeds_are_reported_and_end(server, answer, message):
    server.pages["/"] = answer
    limit = 0.3 if message == "in time" else 60.0
    documents, cursor = feed(server, "/", limit=200_000, timeout=limit, deadline=limit).poll({"seen": ["x"]})
    assert documents == [] and cursor["failures"] == 1 and cursor["seen"] == ["x"]
    error = cursor["error"]
    assert error.startswith(public(server.url + "/")) and message in error and "\n" not in error
    json.dumps(cursor)


def test_feed_that_nobody_serves(server):
    server.shutdown()
    server.server_close()
    documents, cursor = feed(server, "/").poll({})
    assert documents == [] and "can't be reached" in cursor["error"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into another process")
def test_what_reads_feeds_may_not_fill_the_memory(server):
    import resource

    server.pages["/"] = page(rss("One"))
    assert len(feed(server, "/").poll({})[0]) == 1
    assert resource.prlimit(fetch.HELPER.process.pid, resource.RLIMIT_AS) == (fetch.MEMORY, fetch.MEMORY)


def test_feed_follows_a_redirect_without_reading_its_body(server):
    server.pages |= {"/": endless_redirect, "/good": page(rss("One"))}
    documents, cursor = feed(server, "/", deadline=5).poll({})
    assert len(documents) == 1 and "error" not in cursor and [path for path, _ in server.asked] == ["/", "/good"]


def test_half_a_feed_gives_its_entries_and_is_asked_for_again(server):
    whole = rss("One", "Two", "Three")
    server.pages["/"] = page(whole[: whole.index("Three")], ETag="half")
    documents, cursor = feed(server, "/").poll({})
    assert [d.title for d in documents][:2] == ["One", "Two"] and "malformed" in cursor["error"]
    server.pages["/"] = page(rss("One"))
    documents, cursor = feed(server, "/").poll(cursor)
    assert documents == [] and "If-None-Match" not in server.asked[-1][1]
    server.pages["/"] = page(rss("One", "Two"))
    assert feed(server, "/").poll(cursor)[0] == [], "what was missing for once is not new"


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (rss("Zürich rises").encode(), "text/xml"),
        (rss("Zürich rises").encode(), "application/xml; charset=iso-8859-1"),
        (rss("Zürich rises").encode(), "application/xml; charset=klingon"),
        (rss("Zürich rises").encode("latin-1"), "application/xml; charset=utf-8"),
        (rss("Zürich rises").encode("latin-1"), "application/xml; charset=punycode"),
        (rss("Zürich rises").replace("?>", " encoding='iso-8859-1'?>", 1).encode("latin-1"), ""),
        (rss("Zürich rises").encode("utf-16"), "application/xml; charset=utf-8"),
        (b"\xef\xbb\xbf" + rss("Zürich rises").encode(), "text/plain"),
    ],
)
def test_wrong_encodings_are_read(server, body, content_type):
    server.pages["/"] = page(body, Content_Type=content_type)
    (document,), cursor = feed(server, "/").poll({})
    assert document.title == "Zürich rises" and "error" not in cursor
    assert "Zürich rises" in decoded(body, content_type), "feedparser repairs some of this by itself"


def test_one_broken_byte_spoils_one_letter(server):
    server.pages["/"] = page(rss("Zürich", "b\0ad").encode() + b"\x81")
    documents, _ = feed(server, "/").poll({})
    assert documents[0].title == "Zürich" and len(documents) == 2
    assert decoded("é".encode() + b"\xe9") == "éé"


def test_entries_that_share_a_guid_or_a_link_are_all_given(server):
    item = "<item>{}<title>{}</title></item>"
    same = "".join(item.format("<guid>same</guid>", t) for t in ("One", "Two", "Two"))
    links = "".join(item.format("<link>http://x/live</link>", t) for t in ("Three", "Four"))
    server.pages["/"] = page(f"<rss version='2.0'><channel>{same}{links}</channel></rss>")
    source = feed(server, "/")
    documents, cursor = source.poll({})
    assert [d.title for d in documents] == ["One", "Two", "Three", "Four"]
    assert source.poll(cursor)[0] == []


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ('<link href="news/1?a=b"/>', "/feeds/news/1?a=b"),
        ('<link href="/1"/>', "/1"),
        ('<link href="https://y/z"/>', "https://y/z"),
        ("<id>urn:uuid:1</id>", ""),
        ("<id>tag:x,2024:1</id>", ""),
        ('<link href="javascript:alert(1)"/>', ""),
        ('<link href="http://[bad"/>', ""),
    ],
)
def test_a_link_can_be_opened_or_is_none(server, link, expected):
    entry = f"<entry>{link}<title>A</title></entry>"
    server.pages["/feeds/atom"] = page(f"<feed xmlns='http://www.w3.org/2005/Atom'>{entry}</feed>")
    (document,), cursor = feed(server, "/feeds/atom").poll({})
    assert document.link == (server.url + expected if expected.startswith("/") else expected), cursor


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("&lt;p&gt;AT&amp;amp;T &lt;b&gt;up&lt;/b&gt;&lt;/p&gt;", "AT&T up"),
        ("&amp;lt;p&amp;gt;AT&amp;amp;amp;T &amp;lt;b&amp;gt;up&amp;lt;/b&amp;gt;&amp;lt;/p&amp;gt;", "AT&T up"),
        ("5 &amp;lt; 6 and 7 &amp;gt; 3", "5 < 6 and 7 > 3"),
    ],
)
def test_html_is_plain_text_also_where_it_was_escaped_twice(server, html, text):
    item = f"<item><title>t</title><description>{html}</description></item>"
    server.pages["/"] = page(f"<rss version='2.0'><channel>{item}</channel></rss>")
    assert feed(server, "/").poll({})[0][0].text == f"t\n{text}"


@pytest.mark.parametrize("reference", ["&#0;", "&#xFFFFFFFF;", "&#xD800;", "&#99999999999;", "&#x110000;", "&#1"])
@pytest.mark.parametrize("tag", ["title", "guid", "pubDate"])
def test_one_bad_character_reference_spoils_one_character(server, tag, reference):
    item = f"<item><title>Two</title><{tag}>a{reference}b</{tag}></item>"
    server.pages["/"] = page(rss("One").replace("</channel>", f"{item}</channel>"))
    documents, cursor = feed(server, "/").poll({})
    assert documents[0].title == "One" and len(documents) == 2, cursor


@pytest.mark.parametrize(
    ("date", "expected"),
    [
        ("Mon, 06 Jan 2025 10:00:00 GMT", 1736157600.0),
        ("2025-01-06T10:00:00Z", 1736157600.0),
        ("1736157600", 1736157600.0),
        ("2025/01/06", math.nan),
        ("06/01/2025", math.nan),
        ("0001-01-01T00:00:00Z", math.nan),
    ],
)
def test_dates_of_entries_are_read_or_missing(server, date, expected):
    server.pages["/"] = page(rss("One").replace(formatdate(1.6e9), date))
    (document,), _ = feed(server, "/").poll({})
    assert document.time == expected or (math.isnan(document.time) and math.isnan(expected))


def test_a_clock_set_back_does_not_stop_a_feed(server):
    server.pages["/"] = page(rss("One"))
    source = feed(server, "/", interval=60)
    _, cursor = source.poll({})
    source.clock.now -= 5 * HOUR
    source.poll(cursor)
    assert len(server.asked) == 2


def test_secrets_of_an_address_stay_in_it(server):
    server.pages["/feed?token=hidden"] = page(rss("One"))
    source = Feed(server.url.replace("//", "//user:hidden@") + "/feed?token=hidden", clock=Clock())
    documents, cursor = source.poll({})
    assert len(documents) == 1 and "hidden" not in str((source.name, documents, cursor)) and "127.0.0.1" in source.name
    server.pages["/feed?token=hidden"] = (302, {"Location": "http://[hidden"}, b"")
    error = source.poll({})[1]["error"]
    assert "hidden" not in error and source.name in error
    assert public("https://a/1") != public("https://a/2") and "hidden" not in public("http://hidden@[bad/")
    with pytest.raises(NewsError) as refused:
        sources.open_source("ftp://user:hidden@host/")
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("http://127.0.0.1/", True),
        ("http://[::1]:8080/", True),
        ("http://169.254.169.254/latest", True),
        ("http://10.1.2.3/", True),
        ("http://2130706433/", True),
        ("http://[::ffff:127.0.0.1]/", True),
        ("https://8.8.8.8/", False),
        ("http://", True),
    ],
)
def test_private_addresses(url, private):
    assert fetch.is_private(url) == private


def test_a_feed_does_not_lead_from_outside_to_inside(server, monkeypatch):
    server.pages |= {"/": (302, {"Location": "/inside"}, b""), "/inside": page(rss("Secret"))}
    request = {"url": server.url + "/", "headers": {}, "timeout": 60, "limit": 10**6}
    assert fetch.feed(request)["entries"], "within a network it may"
    monkeypatch.setattr(fetch, "is_private", lambda url: url.endswith("inside"))
    with pytest.raises(fetch.Refused, match="public address to a private"):
        fetch.feed(request)


MARKUP = [
    "<item>",
    "</item>",
    "<title>",
    "</title>",
    "<description>",
    "<![CDATA[",
    "]]>",
    "<guid/>",
    "&#x",
    ";",
    "<!--",
]
MARKUP += ["<entry xmlns='http://www.w3.org/2005/Atom'>", "<link href='", "'/>", "<pubDate>", "&amp;lt;", "</rss>"]
MARKUP += ["<rss version='2.0'>", "<?xml encoding='utf-16'?>", "<!DOCTYPE x [", "&#99999999999;"]


@given(
    st.lists(
        st.one_of(
            st.sampled_from(MARKUP),
            st.text(max_size=20),
        ),
        max_size=20,
    ),
    st.binary(max_size=5),
)
def test_any_feed_gives_documents_or_a_reason(parts, rest):
    text = decoded(b"<rss version='2.0'><channel><item><title>a" + "".join(parts).encode("utf-8", "replace") + rest)
    try:
        answer = fetch.entries(text, "http://x/")
    except fetch.Refused as error:
        assert str(error)
    else:
        documents = Feed("http://x/")._documents(json.loads(json.dumps(answer))["entries"])
        assert all(d.text.strip() and d.text.encode() and d.link[:4] in ("", "http") for d in documents.values())


# Files, standard input, dated documents


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1700000000.5", 1700000000.5),
        (1.7e12, 1.7e9),
        ("2023-11-14T22:13:20Z", 1.7e9),
        ("2023-11-14 23:13:20+01:00", 1.7e9),
        ("2023-11-14T22:13:20", 1.7e9),
        ("Tue, 14 Nov 2023 22:13:20 GMT", 1.7e9),
        ({"$date": "2023-11-14T22:13:20Z"}, 1.7e9),
        (pd.Timestamp("2023-11-14T22:13:20"), 1.7e9),
        *[(missing, math.nan) for missing in ("", None, math.nan)],
    ],
)
def test_times_as_they_come(value, expected):
    assert seconds(value) == expected or (math.isnan(expected) and math.isnan(seconds(value)))
    assert document({"text": "x", "time": value}, "s").time == seconds(value) or math.isnan(expected)


@pytest.mark.parametrize("value", ["soon", True, [], math.inf, 10**400, 5, "14/11/2023", "2023/11/14", 1.7e15])
def test_times_that_would_be_another_are_refused(value):
    with pytest.raises(LLMProdError, match="time"):
        document({"text": "x", "time": value}, "s")


def line(text: str, **more) -> bytes:
    return json.dumps({"text": text} | more).encode() + b"\n"


def test_tail_follows_growth_rotation_and_truncation(tmp_path):
    path = tmp_path / "news.jsonl"
    source, cursor = Tail(path), {}
    documents, cursor = source.poll(cursor)
    assert documents == [] and not source.finished(cursor)
    path.write_bytes(line("one", id="a", time="2026-01-31T12:00:00Z", title="t", link="l", source="s") + b'{"text": "t')
    documents, cursor = source.poll(cursor)
    a = f"a@{fingerprint(str(path))[:8]}"
    assert documents == [Document(a, "s", 1769860800.0, "one", "t", "l")], "an id counts within its file"
    with path.open("ab") as file:
        file.write(b'wo", "time": 1e9}\n')
    documents, cursor = source.poll(json.loads(json.dumps(cursor)))
    (two,) = documents
    assert (two.text, two.time, two.source) == ("two", 1e9, str(path)) and two.id == fingerprint(str(path), "two")
    assert source.poll(cursor)[0] == []
    path.rename(tmp_path / "old")
    assert source.poll(cursor)[0] == [], "gone while it is rotated"
    path.write_bytes(line("three") * 1 + line("a longer fourth, so that this file is larger than its predecessor" * 9))
    documents, cursor = source.poll(cursor)
    assert [d.text[:5] for d in documents] == ["three", "a lon"] and math.isnan(documents[0].time)
    path.write_bytes(line("five"))
    documents, cursor = source.poll(cursor)
    assert [d.text for d in documents] == ["five"] and "bad" in cursor and cursor["bad"] == 0 and "error" not in cursor


def test_tail_skips_and_counts_bad_lines(tmp_path):
    path = tmp_path / "news.jsonl"
    bad = [
        b"no json\n",
        b'{"title": "x"}\n',
        b'["text"]\n',
        b'{"text": "\xff"}\n',
        b'{"text": 5}\n',
        b'{"text": " "}\n',
    ]
    bad += [b"[" * 100_000 + b"\n", b"9" * 5000 + b"\n", b'{"text": "' + b"x" * LIMIT + b'"}\n']
    bad += [line("later", time=True), line("d", time="soon"), line("e", time="31/12/2024")]
    odd = [b"\n", b'{"text": "\\ud800 b\\u0000c", "time": NaN}\n']
    path.write_bytes(line("first") + b"".join(bad) + b"".join(odd) + b"no json either\n")
    documents, cursor = Tail(path).poll({})
    assert [d.text for d in documents] == ["first", "? bc"] and all(math.isnan(d.time) for d in documents)
    assert cursor["bad"] == len(bad) + 1 and cursor["error"] == f"{path}, line {len(bad) + 4}: no JSON"
    path.write_bytes(path.read_bytes() + line("x")[:-2] + b"\n")
    assert Tail(path).poll(cursor)[1]["error"] == f"{path}, line {len(bad) + 5}: no JSON"


def test_tail_of_a_folder(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"".join(line(f"a{n}") for n in range(5)))
    (tmp_path / "b.jsonl").write_bytes(line("b0"))
    (tmp_path / "c.txt").write_text("A whole\ntext.")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "e.txt").touch()
    (tmp_path / "ignored.csv").write_text("text")
    os.utime(tmp_path / "c.txt", (1e9, 1e9))
    source = Tail(tmp_path, batch=2)
    documents, cursor = source.poll({})
    assert sorted(d.text for d in documents) == ["A whole\ntext.", "a0", "a1", "b0"]
    assert [d.time for d in documents if d.text.startswith("A")] == [1e9]
    assert cursor["bad"] == 1 and cursor["error"] == f"{tmp_path / 'd.txt'}: broken UTF-8"
    (tmp_path / "e.txt").write_text("No longer empty")
    (tmp_path / "b.jsonl").unlink()
    seen = []
    for _ in range(3):
        documents, cursor = source.poll(cursor)
        seen += [d.text for d in documents]
    assert sorted(seen) == ["No longer empty", "a2", "a3", "a4"] and cursor["bad"] == 1
    assert set(cursor["files"]) == {"a.jsonl", "c.txt", "d.txt", "e.txt"}


@settings(max_examples=settings().max_examples // 5)
@given(
    texts=st.lists(st.text(min_size=1).filter(lambda text: text.replace("\0", "").strip()), max_size=8),
    cuts=st.lists(st.floats(0, 1), max_size=8),
    batch=st.integers(1, 3),
)
def test_tail_polled_at_any_cut_gives_each_line_once(tmp_path_factory, texts, cuts, batch):
    path = tmp_path_factory.mktemp("cut") / "news.jsonl"
    body = b"".join(
        json.dumps({"text": t, "id": str(n)}, ensure_ascii=False).encode() + b"\n" for n, t in enumerate(texts)
    )
    cursor, ids, written = {}, [], 0
    for end in [*sorted(int(cut * len(body)) for cut in cuts), *[len(body)] * (len(texts) + 1)]:
        with path.open("ab") as file:
            file.write(body[written:end])
        written = end
        documents, cursor = Tail(path, batch=batch).poll(json.loads(json.dumps(cursor)))
        ids += [d.id for d in documents]
    assert [name.partition("@")[0] for name in ids] == [str(n) for n in range(len(texts))] and cursor["bad"] == 0


def test_ids_count_within_their_file(tmp_path):
    for name in ("a", "b"):
        rows = (line(f"document {n} of {name}", id=n) for n in range(20))
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(rows))
    documents, _ = Tail(tmp_path).poll({})
    assert len({d.id for d in documents}) == 40


def test_a_rotated_file_of_a_folder_goes_on_under_its_new_name(tmp_path):
    """news.jsonl -> news.1.jsonl -> news.2.jsonl, as logrotate does; a copy of what was read is not read again."""
    source, cursor, texts, written = Tail(tmp_path), {}, [], 0
    for turn in range(4):
        for old, new in ((".1", ".2"), ("", ".1")):
            if (path := tmp_path / f"news{old}.jsonl").exists():
                with path.open("ab") as file:  # after the last poll
                    file.write(line(f"rest {turn}{old}"))
                    written += 1
                path.rename(tmp_path / f"news{new}.jsonl")
        (tmp_path / "news.jsonl").write_bytes(b"".join(line(f"{turn} {n}") for n in range(5)))
        written += 5
        documents, cursor = source.poll(json.loads(json.dumps(cursor)))
        texts += [d.text for d in documents]
    assert len(texts) == len(set(texts)) == written
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "news.jsonl").read_bytes())
    assert source.poll(cursor)[0] == []


def test_links_in_a_folder_are_not_followed(tmp_path):
    (tmp_path / "secret").write_bytes(line("secret"))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").symlink_to(tmp_path / "secret")
    (folder / "b.txt").symlink_to("/etc/passwd")
    (folder / "c.jsonl").write_bytes(line("mine"))
    documents, cursor = Tail(folder).poll({})
    assert [d.text for d in documents] == ["mine"] and "b.txt: a link, which is not followed" in cursor["error"]
    (tmp_path / "named.jsonl").symlink_to(tmp_path / "secret")
    assert len(Tail(tmp_path / "named.jsonl").poll({})[0]) == 1, "a link that is named is followed"


def test_names_of_files_that_are_not_utf8(tmp_path, journal):
    for name in (b"bad\xff.jsonl", b"bad\xff.txt", b"good.jsonl"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(line(f"of {name!r} alone"))
    source = Tail(tmp_path)
    documents, cursor = source.poll(journal.cursor(source.name))
    journal.set_cursor(source.name, cursor)
    assert len(take(journal, *documents)) == 3 and source.poll(journal.cursor(source.name))[0] == []
    single = Tail(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"bad\xff.jsonl")))
    journal.set_cursor(single.name, single.poll({})[1])
    told = channels.open_channel(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"told\xff.jsonl")), opened_store)
    journal.delivered("a", told.name)


def test_the_last_poll_reads_a_last_line_without_an_end(tmp_path):
    path = tmp_path / "news.jsonl"
    path.write_bytes(line("one") + line("two")[:-1])
    source = Tail(path)
    documents, cursor = source.poll({})
    assert [d.text for d in documents] == ["one"]
    documents, cursor = source.poll(cursor, last=True)
    assert [d.text for d in documents] == ["two"] and cursor["bad"] == 0
    path.write_bytes(path.read_bytes() + b"\n" + line("three")[:9])
    documents, half = source.poll(cursor, last=True)
    assert documents == [] and "line 3: no JSON; its line has no end yet" in half["error"]
    path.write_bytes(path.read_bytes() + line("three")[9:])
    assert [d.text for d in source.poll(half)[0]] == ["three"], "half a line is not lost"
    path.write_text(json.dumps([{"text": "of a list"}]))
    assert "a list; write one object in each line" in source.poll({}, last=True)[1]["error"]


def test_what_was_there_at_first_is_behind_until_it_is_read(tmp_path):
    path, cursor, seen = tmp_path / "news.jsonl", {}, []
    path.write_bytes(b"".join(line(f"n {n}") for n in range(5)) + b'{"half')
    source = Tail(path, batch=2)
    for _ in range(3):
        _, cursor = source.poll(cursor)
        seen.append("behind" in cursor)
        with path.open("ab") as file:  # what comes later is no backlog, however much it is
            file.write(b'"\n' + b"".join(line(f"{len(seen)} {n}") for n in range(20)))
    assert seen == [True, True, False]


def test_the_mark_of_utf_8_is_no_part_of_a_document(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line("of a line"))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfof a file")
    documents, cursor = Tail(tmp_path).poll({})
    assert [d.text for d in documents] == ["of a line", "of a file"] and cursor["bad"] == 0


def test_a_poll_reads_a_part_of_many_large_lines(tmp_path):
    path = tmp_path / "news.jsonl"
    path.write_bytes(line("x" * 1_000_000) * 40)
    documents, cursor = Tail(path).poll({})
    assert len(documents) < 40 and len(Tail(path).poll(cursor)[0]) == 40 - len(documents)


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(
                        st.sampled_from(["text", "time", "id", "$date", "title", "link", "source"]), inner
                    )
                ),
                max_leaves=6,
            ).map(lambda value: json.dumps(value).encode()),
        ),
        max_size=8,
    )
)
def test_any_line_is_a_document_or_is_named(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("lines") / "in.jsonl"
    path.write_bytes(b"".join(row.replace(b"\n", b" ") + b"\n" for row in lines))
    documents, cursor = Tail(path).poll({})
    assert len(documents) + cursor["bad"] == sum(bool(row.strip(b" \t\r\n\v\f")) for row in lines)
    for d in documents:
        assert (
            d.text.strip() and "".join((d.id, d.source, d.text, d.title, d.link)).encode() and not d.time >= 4e9 + DAY
        )


def until_finished(source: sources.Source, cursor: dict | None = None) -> tuple[list[Document], dict]:
    documents, cursor, ends = [], cursor or {}, time.monotonic() + 10
    while not source.finished(cursor):
        assert time.monotonic() < ends
        more, cursor = source.poll(cursor)
        documents += more
    return documents, cursor


def test_lines_of_standard_input():
    read, write = os.pipe()
    source = Lines(os.fdopen(read, "rb"), batch=2)
    os.write(write, line("one") + b"bad\n" + line("two"))
    documents, cursor, ends = [], {}, time.monotonic() + 10
    while len(documents) < 2 and time.monotonic() < ends:
        more, cursor = source.poll(cursor)
        documents += more
    assert [d.text for d in documents] == ["one", "two"] and not source.finished(cursor)
    assert cursor["bad"] == 1 and cursor["error"] == "standard input, line 2: no JSON"
    os.write(write, line("three")[:-1])
    os.close(write)
    rest, cursor = until_finished(source, cursor)
    assert [d.text for d in rest] == ["three"], "the end of the stream ends its last line"


def test_lines_are_held_back_until_polled():
    body = io.BytesIO(b"".join(line(str(n)) for n in range(100)))
    source = Lines(body, batch=2)
    documents, _ = until_finished(source)
    assert [d.text for d in documents] == [str(n) for n in range(100)]


def test_replay_in_order_of_time_from_where_the_cursor_stands():
    frame = pd.DataFrame({"text": ["c", "a", "b", None], "time": [7200.0, 0.0, 3600.0, 1.0], "id": [3, 1, 2, 4]})
    source = Replay(frame, batch=1)
    documents, cursor = source.poll({})
    assert [(d.id, d.time, d.source) for d in documents] == [("1", 0.0, "replay")]
    again = Replay(frame)
    documents, end = again.poll(cursor)
    assert [d.text for d in documents] == ["b", "c"] and again.finished(end) and again.poll(end) == ([], end)
    assert again.name == source.name != Replay(frame[:2]).name


def test_replay_of_dates_and_what_it_refuses():
    days = pd.date_range("2020-01-01", periods=5)
    source = Replay(pd.DataFrame({"text": list("abcde"), "time": days}), batch=2)
    first, cursor = source.poll({})
    assert [d.time for d in first] == [1577836800.0, 1577923200.0]
    assert [d.text for d in first + until_finished(source, cursor)[0]] == list("abcde")
    with pytest.raises(NewsError, match="no column time; there are text"):
        Replay(pd.DataFrame({"text": ["a"]}))
    for times, match in ((["soon"], "row 1: 'soon'"), ([math.nan], "row 1"), ([1.7e12], "row 1"), ([None], "row 1")):
        with pytest.raises(LLMProdError, match=match):
            Replay(pd.DataFrame({"text": ["a"], "time": times}))


def test_open_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(line("x"))}))
    (tmp_path / "a.jsonl").touch()
    kinds = [
        type(sources.open_source(word))
        for word in ("https://a/b", "HTTP://a", "-", str(tmp_path / "a.jsonl"), str(tmp_path))
    ]
    assert kinds == [Feed, Feed, Lines, Tail, Tail]
    for word in ("ftp://a/b", "http://", str(tmp_path / "none.jsonl"), ""):
        if word:
            with pytest.raises(NewsError, match="is not a source: give the address"):
                sources.open_source(word)


# The journal


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "journal.db", clock=Clock()) as journal:
        yield journal


def take(journal: Journal, *documents: Document) -> list[str]:
    """Takes documents as a monitor does; returns the ids of those that are new."""
    with journal.transaction():
        found = new_documents(journal, documents)
        for document, signature in found:
            journal.add(document, {"negative": 0.5}, signature)
    return [document.id for document, _ in found]


def doc(name: str, text: str = "", time: float = 1.6e9, source: str = "s") -> Document:
    return Document(name, source, time, text or f"text {name} of its own, with words {name}{name} for {name}")


@pytest.mark.parametrize(
    "change",
    [
        "DROP TABLE deliveries",
        "ALTER TABLE documents DROP COLUMN link",
        "DROP INDEX documents_time",
        "CREATE VIEW more AS SELECT * FROM alerts",
        "CREATE TRIGGER no BEFORE INSERT ON alerts BEGIN SELECT RAISE(ABORT, 'no'); END",
        """INSERT INTO cursors VALUES ('s', '{"files": []}')""",
        """INSERT INTO cursors VALUES ('s', '{"files": {"a.jsonl": 1}}')""",
        """INSERT INTO cursors VALUES ('s', '{"files": {"a.jsonl": {"offset": "1", "line": 0}}}')""",
        """INSERT INTO cursors VALUES ('s', '{"files": {"a.jsonl": {"offset": 1, "line": 0}}}')""",
        """INSERT INTO cursors VALUES ('s', '{"bad": "1"}')""",
        """INSERT INTO cursors VALUES ('s', '{"seen": 1}')""",
        """INSERT INTO cursors VALUES ('s', '{"position": 0.5}')""",
        "INSERT INTO states VALUES ('watermark', '[]')",
        "INSERT INTO states VALUES ('suspects', '1')",
        "INSERT INTO states VALUES ('on', '[1]')",
        "INSERT INTO states VALUES ('begun', '{}')",
        "INSERT INTO alerts (id, time, alert) VALUES ('a', 1.0, '{\"documents\": 1}')",
    ],
)
def test_a_journal_of_another_shape_is_one_message(tmp_path, change):
    path = tmp_path / "journal.sqlite"
    Journal(path).close()
    with sqlite3.connect(path) as database:
        database.execute(change)
    before = path.read_bytes()
    with pytest.raises(NewsError, match="is damaged or not a journal"):
        Journal(path)
    assert path.read_bytes() == before


def test_what_pandas_writes_for_missing_is_no_id_and_no_title(tmp_path):
    rows = [{"id": math.nan, "title": math.nan, "text": f"text number {i}"} for i in range(3)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, _ = sources.Tail(path).poll({})
    assert len({document.id for document in documents}) == 3 and {document.title for document in documents} == {""}
    (word,) = sources.from_line(b'{"id": "NaN", "text": "a text"}', "here")
    assert word.id.startswith("NaN@")


def test_ids_with_a_space_count_within_their_file():
    (one,), (other,) = (sources.from_line(b'{"id": " 17", "text": "a text"}', name) for name in ("a", "b"))
    assert one.id != other.id and one.id.startswith("17@")


def test_a_place_that_cannot_be_is_one_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("~nobody-of-that-name/x", "long" * 100):
        with pytest.raises(NewsError, match="is not a source"):
            sources.open_source(name)
    for shared in (False, True):
        with pytest.raises(NewsError, match="can't be"):
            Journal("long" * 100, shared=shared)
    Journal("~nobody-of-that-name/x").close()
    assert (tmp_path / "~nobody-of-that-name/x").is_file(), "a shell leaves the name of nobody as it is"


def test_journal_keeps_everything_or_nothing(journal):
    with journal.transaction():
        journal.set_cursor("a", {"offset": 1})
        journal.set_state("cusum", [1.5, None])
        journal.add(doc("1"), {"negative": 0.25})
        journal.add(doc("1", "other"), {"negative": 1})
    with pytest.raises(ZeroDivisionError), journal.transaction():
        journal.set_cursor("a", {"offset": 2})
        journal.set_state("cusum", 0)
        journal.add(doc("2"), {})
        journal.add_alert("x", 1.0, {})
        1 / 0  # noqa: B018
    assert journal.cursor("a") == {"offset": 1} and journal.cursor("b") == {}
    assert journal.state("cusum") == [1.5, None] and journal.state("other", 7) == 7
    recent = journal.recent()
    assert recent["id"].tolist() == ["1"] and recent["scores"][0] == {"negative": 0.25} and len(journal.alerts()) == 0
    assert recent["text"][0] == doc("1").text and len(journal.recent(since=1.6e9 + 1)) == 0


def test_alerts_are_an_outbox(journal):
    assert list(journal.alerts()) == ["id", "time", "acknowledged", "right"]
    journal.add_alert("b", 2.0, {"kind": "drift", "id": "own", "said": "drifts", "event": "a"})
    journal.add_alert("a", 1.0, {"kind": "volume", "z": 3.5})  # as of before there were words and events
    journal.add_alert("a", 9.0, {"kind": "again"})
    assert journal.undelivered("mail") == [
        {"kind": "volume", "z": 3.5, "said": "negatives surge", "event": "a", "id": "a", "time": 1.0},
        {"kind": "drift", "said": "drifts", "event": "a", "id": "b", "time": 2.0},
    ]
    journal.delivered("a", "mail")
    journal.delivered("a", "mail")
    assert [alert["id"] for alert in journal.undelivered("mail")] == ["b"] and len(journal.undelivered("file")) == 2
    journal.acknowledge("b")
    assert journal.alerts()["right"].tolist() == [None, None] and journal.alerts()["acknowledged"].tolist() == [
        False,
        True,
    ]
    journal.acknowledge("a", False)
    journal.acknowledge("b", True)
    journal.acknowledge("a")
    frame = journal.alerts()
    assert frame["id"].tolist() == ["a", "b"] and [right is False for right in frame["right"]] == [True, False]
    assert frame["right"][1] is True and frame["acknowledged"].all() and frame["kind"].tolist() == ["volume", "drift"]
    for act in (journal.acknowledge, lambda name: journal.acknowledge(name, True)):
        with pytest.raises(NewsError, match=r"No alert 'c' in .*journal.db; journal.alerts\(\) lists"):
            act("c")


def test_one_monitor_writes_a_journal(tmp_path):
    path = tmp_path / "deep" / "journal.db"
    with Journal(path) as journal:
        journal.add_alert("a", 1.0, {})
        with pytest.raises(NewsError, match="held by another monitor"):
            Journal(path)
        code = f"from llmprod.news_monitoring.journal import Journal; Journal({str(path)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 1 and "NewsError" in done.stderr and "held by another monitor" in done.stderr
        with Journal(path, shared=True) as other:
            other.acknowledge("a", True)
        assert journal.alerts()["right"].tolist() == [True]
    Journal(path).close()


def test_journals_that_can_not_be_used(tmp_path):
    path = tmp_path / "journal.db"
    Journal(path).close()
    whole = path.read_bytes()

    def refused(match: str, where=path):
        before = where.read_bytes() if where.is_file() else None
        with pytest.raises(NewsError, match=match):
            Journal(where)
        assert before is None or where.read_bytes() == before, "left as it is"

    path.write_bytes(b"no database at all" * 100)
    refused("damaged or not a journal")
    path.write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))
    refused("damaged or not a journal")
    path.write_bytes(whole[: len(whole) // 2])
    refused("damaged or not a journal")
    path.write_bytes(whole)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    refused("version 9")
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    refused("database of something else")
    refused("folder can't be written", tmp_path / "journal.db" / "below.db")
    refused("folder can't be written", type(path)("/proc/journal.db"))
    (tmp_path / "folder.db").mkdir()
    refused("can't be opened", tmp_path / "folder.db")
    path.unlink()
    Journal(path).close()


def test_a_journal_has_one_lock_under_all_its_names(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    path = tmp_path / "folder" / "journal.db"
    with Journal(path):
        (tmp_path / "journal.db").symlink_to(path)
        for name in (tmp_path / "journal.db", tmp_path / "link" / "journal.db"):
            with pytest.raises(NewsError, match="held by another monitor"):
                Journal(name)
    (tmp_path / "hard.db").hardlink_to(path)
    with pytest.raises(NewsError, match="a second name"):
        Journal(tmp_path / "hard.db")


@pytest.fixture(scope="module")
def a_journal(tmp_path_factory):
    """The bytes of a journal with something in each table."""
    path = tmp_path_factory.mktemp("whole") / "journal.db"
    with Journal(path, clock=Clock()) as journal:
        take(journal, *(doc(str(n), time=1.6e9 + n) for n in range(20)))
        with journal.transaction():
            ready(journal, 5)
            journal.set_cursor("a", {"files": {"x": {"offset": 3, "line": 1, "mark": "m"}}})
            journal.add_alert("x", 1.6e9, {"key": "topic: a", "documents": []})
            journal.delivered("x", "console")
    return path.read_bytes()


@settings(max_examples=settings().max_examples // 8)
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=40)), min_size=1, max_size=4),
    data=st.data(),
)
def test_a_damaged_journal_is_named_or_read(tmp_path_factory, a_journal, changes, data):
    damaged = bytearray(a_journal)
    for place, part in changes:
        damaged[place % len(damaged) : place % len(damaged) + len(part)] = part
    damaged = damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))]
    path = tmp_path_factory.mktemp("damaged") / "journal.db"
    path.write_bytes(damaged)
    try:
        with Journal(path, clock=Clock()) as journal:
            take(journal, doc("new"), doc("3"))
            with journal.transaction():
                ready(journal, 0)
                journal.forget(5)
            journal.cursor("a"), journal.alerts(), journal.undelivered("console"), journal.recent(), journal.late()
    except NewsError as error:
        assert str(path) in str(error)


def test_a_damaged_name_of_a_table_is_one_message(a_journal, tmp_path):
    """SQLite quotes the name in its message, which Python can't decode."""
    damaged = a_journal.replace(b"CREATE TABLE cursors", b"CREATE TABLE \x80ursors").replace(
        b"cursorscursors", b"\x80ursorscursors"
    )
    assert damaged != a_journal
    (tmp_path / "journal.db").write_bytes(damaged)
    with pytest.raises(NewsError, match=r"journal\.db is damaged"):
        Journal(tmp_path / "journal.db")


def test_a_damaged_number_of_the_format_is_one_message(a_journal, tmp_path):
    """Found by the test above: SQLite's own code for it is that of any mistake."""
    content = bytearray(a_journal)
    content[44:48] = (200).to_bytes(4, "big")
    (tmp_path / "journal.db").write_bytes(content)
    with pytest.raises(NewsError, match=r"journal\.db is damaged"):
        Journal(tmp_path / "journal.db")


def test_a_full_disk_is_told_and_nothing_is_half(journal):
    pages = journal.db.execute("PRAGMA page_count").fetchone()[0]
    journal.db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(NewsError, match="disk is full"), journal.transaction():
        journal.set_cursor("a", {"offset": 1})
        journal.add(doc("1", "x" * 100_000), {})
    assert journal.cursor("a") == {} and len(journal.recent()) == 0
    journal.db.execute("PRAGMA max_page_count = 100000")
    assert take(journal, doc("1")) == ["1"]


MONITOR = """
    import os, sys
    import datasketch  # imported once, before processes are made
    from llmprod.news_monitoring import fetch, sources
    from llmprod.news_monitoring.duplicates import new_documents
    from llmprod.news_monitoring.journal import Journal
    from llmprod.news_monitoring.order import ready

    def monitor(folder):
        source = sources.Tail(folder + "/news.jsonl", batch=5)
        with Journal(folder + "/journal.db") as journal:
            for turn in range(10**6):
                documents, cursor = source.poll(journal.cursor(source.name))
                with journal.transaction():
                    for document, signature in new_documents(journal, documents):
                        journal.add(document, {"n": 1}, signature)
                    journal.set_cursor(source.name, cursor)
                    fed = ready(journal, lateness=3)
                    journal.set_state("fed", journal.state("fed", []) + [document.id for document, _ in fed])
                if turn == 0:
                    print("committed", os.getpid(), flush=True)

    for folder in sys.stdin:
        if (child := os.fork()) == 0:
            monitor(folder.strip())
        print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_killed_monitor_loses_nothing_and_doubles_nothing(tmp_path):
    rng, count = random.Random(0), 3000
    lines = [line(doc(str(n)).text, id=str(n), time=1e9 + n + rng.uniform(-1, 1)) for n in range(count)]
    (tmp_path / "news.jsonl").write_bytes(b"".join(lines))
    source, past = str(tmp_path / "news.jsonl"), []
    command = [sys.executable, "-c", textwrap.dedent(MONITOR)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        for _ in range(5):
            process.stdin.write(f"{tmp_path}\n")
            word, monitor = process.stdout.readline().split()
            assert word == "committed"
            time.sleep(rng.uniform(0, 0.1))
            os.kill(int(monitor), signal.SIGKILL)
            assert process.stdout.readline() == f"ended {-signal.SIGKILL:d}\n"
            with Journal(tmp_path / "journal.db") as journal:
                place = journal.cursor(source).get("files", {}).get("news.jsonl", {"offset": 0, "line": 0})
                recent = journal.recent()
                assert len(recent) == place["line"] and place["offset"] == sum(map(len, lines[: place["line"]]))
                assert (recent["fed"] == 1).sum() == len(journal.state("fed", []))
                past.append(place["line"])
    assert 0 < past[0] < past[-1] < count and past == sorted(set(past))
    with Journal(tmp_path / "journal.db") as journal:
        tail, documents = Tail(source), True
        while documents:
            with journal.transaction():
                documents, cursor = tail.poll(journal.cursor(tail.name))
                for document, signature in new_documents(journal, documents):
                    journal.add(document, {"n": 1}, signature)
                journal.set_cursor(tail.name, cursor)
        with journal.transaction():
            fed = journal.state("fed") + [document.id for document, _ in ready(journal, 3, True, limit=count)]
        times = journal.recent().set_index("id")["time"]
        numbers = sorted(int(name.partition("@")[0]) for name in fed)
        assert len(times) == count and numbers == list(range(count)) and journal.late() == 0
        assert times[fed].is_monotonic_increasing


# Duplicates

STORY = (
    "the central bank raised its main interest rate by half a point on thursday and said that further steps would "
    "follow if prices went on rising as they had done since the spring of last year"
)


def test_repeats_and_near_repeats_are_dropped(journal):
    words = STORY.split()
    changed = " ".join([*words[:-1], "month"])
    half = " ".join([*words[:16], *(f"other{n}" for n in range(18))])
    assert take(journal, doc("a", STORY), doc("a", "same id"), doc("b", STORY.upper(), source="t"), doc("c", half)) == [
        "a",
        "c",
    ]
    assert take(journal, doc("a", "same id"), doc("d", f"  {STORY}\n"), doc("e", changed), doc("f", half + " x")) == []
    assert take(journal, doc("g", " ".join(reversed(words))), doc("h", "short"), doc("i", "short too")) == [
        "g",
        "h",
        "i",
    ]
    assert take(journal, doc("j", "Short"), doc("k", STORY, time=1.6e9 + 2 * DAY)) == []
    assert take(journal, doc("k", STORY, time=1.6e9 + 4 * DAY)) == ["k"], "three days are over"
    assert take(journal, doc("a", "an id is known for ever")) == []


def test_of_a_long_text_the_head_is_compared(journal):
    """Normalising takes the square of a run of marks, and a text may have a million of them."""
    tails = ("e" + "\u0301" * 200_000, " ".join(f"other{n}" for n in range(20_000)))
    head = (STORY + " ") * (HEAD // len(STORY) + 1)
    assert take(journal, *(doc(str(n), head + tail) for n, tail in enumerate(tails))) == ["0"]


def test_signatures_go_with_what_was_watched(journal):
    """And not with the newest date: a document dated today among those of an archive makes nothing forgotten."""
    take(journal, *(doc(str(n), time=1.6e9 + n) for n in range(50)), doc("now", time=1.7e9))
    count = "SELECT count(*) FROM signatures"
    with journal.transaction():
        journal.set_state("watermark", 1.6e9 + 3 * DAY + 25)
        journal.forget(keep=100)
    assert journal.db.execute(count).fetchone() == (26,) and len(journal.recent()) == 51
    assert take(journal, doc("0", "an id is known for ever")) == []


def test_old_texts_are_forgotten_and_their_ids_are_not(journal):
    """Counted as they came, so that no date makes it forget, and not those that still wait."""
    take(journal, *(doc(str(n), time=1.6e9 - n) for n in range(10)), doc("waits", time=1.7e9))
    with journal.transaction():
        assert len(ready(journal, 10)) == 10
    take(journal, doc("new", time=1.7e9 - 1))
    with journal.transaction():
        journal.forget(keep=4)
    assert set(journal.recent()["id"]) == {"8", "9", "waits", "new"}
    with journal.transaction():
        journal.forget(keep=0)
    assert set(journal.recent()["id"]) == {"waits", "new"}
    assert take(journal, doc("3", "another text of a known id")) == []


def test_near_repeats_are_found_as_the_measure_says(journal):
    """Texts with a known Jaccard similarity: nearly all pairs at 0.9 are found, and nearly none at 0.6."""
    rng = random.Random(0)
    found = {}
    for shared, fresh in ((47, 3), (37, 13)):  # 50 words, 48 runs of three; a new end changes as many runs
        originals = [[f"w{rng.randrange(10**6)}" for _ in range(50)] for _ in range(100)]
        copies = [words[:shared] + [f"v{rng.randrange(10**6)}" for _ in range(fresh)] for words in originals]
        assert len(take(journal, *(doc(f"o{fresh}-{n}", " ".join(w)) for n, w in enumerate(originals)))) == 100
        found[fresh] = 100 - len(take(journal, *(doc(f"c{fresh}-{n}", " ".join(w)) for n, w in enumerate(copies))))
    assert found[3] >= 93 and found[13] <= 3


def test_writing_needs_a_transaction_and_leaves_no_half_of_one(journal):
    for act in (lambda: journal.forget(0), lambda: ready(journal, 0)):
        with pytest.raises(RuntimeError, match="within journal"):
            act()
    with pytest.raises(ZeroDivisionError), journal.transaction():
        ((document, signature),) = new_documents(journal, [doc("a")])
        journal.add(document, {}, signature)
        1 / 0  # noqa: B018
    assert take(journal, doc("a")) == ["a"] and take(journal) == []


def test_no_date_is_ahead_of_the_clock(journal):
    times = {"now": 1.7e9 - 5, "far": 4e9, "soon": 1.7e9 + 60, "nan": math.nan}
    take(journal, *(doc(name, time=moment) for name, moment in times.items()))
    stored = journal.recent().set_index("id")["time"].to_dict()
    assert stored == {"now": 1.7e9 - 5, "far": 1.7e9, "soon": 1.7e9, "nan": 1.7e9}


# Order


def test_ready_waits_for_the_late_and_takes_no_step_back(journal):
    def fed(*documents, **options):
        take(journal, *documents)
        with journal.transaction():
            return [document.id for document, scores in ready(journal, **({"lateness": 10} | options)) if scores]

    base = 1.6e9
    assert fed() == []
    assert fed(doc("a", time=base), doc("b", time=base + 5)) == []
    assert fed(doc("c", time=base + 12)) == ["a"]
    assert fed(doc("d", time=base + 3), doc("e", time=base + 15)) == ["d", "b"], "d is late, and not too late"
    assert fed(doc("f", time=base + 4)) == [] and journal.late() == 1
    assert fed(flush=True) == ["c", "e"] and fed(flush=True) == []
    assert fed(doc("g", time=base + 15), doc("h", time=base + 14)) == ["g"] and journal.late() == 2
    assert journal.recent().set_index("id")["fed"].to_dict() == dict.fromkeys("abcdeg", 1) | {"f": 2, "h": 2}


def test_nothing_dated_ahead_blinds_it_to_what_follows(journal):
    """Neither a document, nor a clock that is a year ahead for a while, nor a document without a time in an archive."""

    def fed(*documents: Document) -> list[str]:
        take(journal, *documents)
        with journal.transaction():
            return [document.id for document, _ in ready(journal, 100)]

    now = journal.clock.now
    assert fed(doc("ahead", time=now + 5 * HOUR), doc("a", time=now - 90)) == []
    assert fed(doc("b", time=now - 50)) == [] and journal.late() == 0
    journal.clock.now += 365 * DAY
    assert fed(doc("of a wrong clock", time=now + 300 * DAY)) == ["a", "b", "ahead"]
    journal.clock.now = now + 200
    assert fed(doc("c", time=now + 110)) == [] and journal.late() == 0
    journal.clock.now += 1000
    assert fed(doc("undated", time=math.nan)) == ["undated"], "it is watched as it came, and moves nothing"
    assert fed(doc("d", time=now + 105), doc("e", time=now + 400)) == ["d", "c", "of a wrong clock"]
    assert journal.late() == 0
    journal.set_state("watermark", now + DAY)  # as an earlier version left it
    assert fed(doc("f", time=journal.clock.now - 50)) == []
    assert journal.recent().set_index("id")["fed"]["f"] == 0, "it waits"


def test_what_is_watched_at_once_has_a_limit(journal):
    take(journal, *(doc(str(n), time=1.6e9 + n // 2) for n in range(10)), doc("undated", time=math.nan))
    found, rounds = [], 0
    while True:
        with journal.transaction():
            part = ready(journal, 0, flush=True, limit=3)
        if not part:
            break
        found, rounds = [*found, *part], rounds + 1
    assert [d.id for d, _ in found] == [*map(str, range(10)), "undated"] and rounds == 4 and journal.late() == 0


@settings(max_examples=settings().max_examples // 8)
@given(
    arrivals=st.lists(st.lists(st.integers(0, 30), max_size=4), max_size=10),
    lateness=st.integers(0, 15),
)
def test_each_document_is_fed_once_in_order_or_is_late(tmp_path_factory, arrivals, lateness):
    fed, watermark, expected_late, number = [], float("-inf"), 0, 0
    with Journal(tmp_path_factory.mktemp("order") / "journal.db") as journal:
        latest = float("-inf")
        for batch in [*arrivals, None]:
            with journal.transaction():
                for moment in batch or []:
                    journal.add(doc(str(number), time=moment), {"n": number})
                    number, latest = number + 1, max(latest, moment)
                    expected_late += moment < watermark
                given_now = ready(journal, lateness, flush=batch is None)
            watermark = max(watermark, latest - (0 if batch is None else lateness))
            assert all(document.time <= watermark for document, _ in given_now)
            fed += given_now
        assert [d.time for d, _ in fed] == sorted(d.time for d, _ in fed)
        assert all(scores == {"n": int(d.id)} for d, scores in fed)
        assert len({d.id for d, _ in fed}) == len(fed) == number - expected_late and journal.late() == expected_late
