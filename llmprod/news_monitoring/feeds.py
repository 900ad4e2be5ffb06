"""RSS and Atom feeds, with guards against what a hostile one sends."""

import codecs
import io
import queue
import re
import threading
import time
import zlib
from calendar import timegm
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from urllib.parse import urljoin

import requests

from llmprod.extras import extra
from llmprod.news_monitoring.documents import DAY, HOUR, Clock, Document, NewsError, Source, document, fingerprint


class _Session(requests.Session):
    def get_redirect_target(self, answer: requests.Response) -> None:
        """Feed follows redirects itself, since requests reads the body of a redirect, however large it is."""


@dataclass
class Feed(Source):
    """RSS or Atom at an address.

    `poll` raises nothing; what went wrong is in cursor["error"] until an answer is good. Entries that can be read
    in a malformed feed are given. A document type that declares entities is refused. An entry is known by its id, else
    its link, else its text; its time is that of publication, else of its change, else now.
    """

    name: str  # its address
    interval: float = 60.0  # seconds between two requests
    base: float = 30.0  # after n failures the next request waits base * 2**n s, at most an hour, or as Retry-After says
    timeout: float = 10.0  # seconds for connecting and for each read
    deadline: float = 30.0  # seconds for the whole answer, and for parsing it
    limit: int = 5_000_000  # bytes of the answer, uncompressed
    clock: Clock = time.time  # seconds since 1970

    def poll(self, cursor: dict) -> tuple[list[Document], dict]:
        """Entries that were not there before, and the next cursor."""
        now, retry = self.clock(), 0.0
        if now < cursor.get("not_before", 0) <= now + DAY:  # further away, the clock was wrong
            return [], cursor
        seen, tags = cursor.get("seen", []), cursor.get("tags", {})
        try:
            status, headers, documents, trouble = _within(self.deadline, lambda: self._ask(tags, now))
            if status == 304:
                return [], {"seen": seen, "tags": tags, "not_before": now + self.interval}
            if status != 200:
                retry = _retry_after(headers.get("Retry-After", ""), now)
                raise NewsError(f"answered {status}")
        except Exception as reason:  # feedparser, requests and urllib3 raise anything on hostile input
            failures = cursor.get("failures", 0) + 1
            wait = max(min(self.base * 2 ** min(failures, 30), HOUR), retry)
            error = f"{self.name}: {_explained(reason)}; asked again after {wait:.0f} s"
            return [], {"seen": seen, "failures": failures, "not_before": now + wait, "error": error}
        # A malformed answer may be half of one: it is asked for again, and what it lacks is not new when it returns.
        tags = {} if trouble else {name: headers[name] for name in ("ETag", "Last-Modified") if name in headers}
        found = {document.id: document for document in documents}
        kept = [*found, *(name for name in seen if name not in found)][: max(1000, len(found))]
        after = {"seen": kept, "tags": tags, "not_before": now + self.interval}
        known = set(seen)
        return [d for d in found.values() if d.id not in known], after | ({"error": trouble} if trouble else {})

    def _ask(self, tags: dict, now: float) -> tuple[int, Mapping[str, str], list[Document], str]:
        """Status and headers of the answer, after at most 5 redirects; documents in a good one, and what is wrong."""
        ends, url = time.monotonic() + self.deadline, self.name
        headers = {"User-Agent": "llmprod", "Accept-Encoding": "gzip"}
        for name, condition in (("ETag", "If-None-Match"), ("Last-Modified", "If-Modified-Since")):
            headers |= {condition: tags[name]} if name in tags else {}
        with _Session() as session:
            for _ in range(6):
                with session.get(url, headers=headers, stream=True, timeout=self.timeout) as answer:
                    if answer.status_code == 200:
                        text = decoded(self._body(answer, ends), answer.headers.get("Content-Type", ""))
                        return 200, answer.headers, *self._entries(text, now)
                    if not answer.is_redirect:
                        return answer.status_code, answer.headers, [], ""
                    url = urljoin(url, answer.headers["Location"])
        raise NewsError("more than 5 redirects")

    def _body(self, answer: requests.Response, ends: float) -> bytes:
        """The bytes of an answer, uncompressed; NewsError where they are too many or too few."""
        coding, body = answer.headers.get("Content-Encoding", "identity").strip().lower(), bytearray()
        if coding not in ("identity", "gzip", "x-gzip"):
            raise NewsError(f"sent the encoding {coding}, which was not asked for")
        unzip = None if coding == "identity" else zlib.decompressobj(wbits=31)
        while part := answer.raw.read1(1 << 16, decode_content=False):
            body += unzip.decompress(part, self.limit + 1 - len(body)) if unzip else part
            if len(body) > self.limit:
                raise NewsError(f"more than {self.limit:,} bytes")
            if time.monotonic() > ends:
                raise TimeoutError
        if unzip and not unzip.eof:
            raise NewsError("the answer broke off")
        return bytes(body)

    def _entries(self, text: str, now: float) -> tuple[list[Document], str]:
        """The documents in a feed, and what is wrong with it; NewsError where it is none."""
        with extra("news"):
            import feedparser

        lower = text.lower()
        if (start := lower.find("<!doctype")) >= 0 and lower.find("<!entity", start) >= 0:
            raise NewsError("refused, since its document type declares entities")
        # Its own declaration goes: the text is UTF-8 now, and feedparser would use any codec that it names.
        xml = '<?xml version="1.0" encoding="utf-8"?>\n' + re.sub(r"^\s*<\?xml[^>]*\?>", "", text)
        parsed = feedparser.parse(io.BytesIO(xml.encode()), sanitize_html=False, resolve_relative_uris=False)
        documents = []
        for entry in parsed.entries:
            title, link = strip_html(entry.get("title") or ""), entry.get("link") or ""
            bodies = [entry.get("summary"), *(content.get("value") for content in entry.get("content", []))]
            body, name = strip_html(max(filter(None, bodies), key=len, default="")), entry.get("id") or link
            date = entry.get("published_parsed") or entry.get("updated_parsed")
            record = {"text": f"{title}\n{body}", "title": title, "link": link, "time": timegm(date) if date else now}
            with suppress(NewsError):  # neither title nor text
                # Ids as short as "17" are common, so that an id counts within its feed.
                documents.append(document(record | {"id": name and fingerprint(self.name, name)}, self.name, now))
        if not documents and (parsed.bozo or not parsed.version):
            raise NewsError("neither RSS nor Atom" if not parsed.version else "malformed, without an entry")
        reason = _explained(parsed.bozo_exception) if parsed.bozo else ""
        return documents, reason and f"{self.name}: malformed, {len(documents)} entries could be read ({reason})"


def _within(limit: float, work: Callable) -> object:
    """The result of `work`, or TimeoutError; a thread, since looking up a name and a drip of headers know no limit."""
    results = queue.Queue()

    def run() -> None:
        try:
            results.put((work(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = results.get(timeout=limit)
    except queue.Empty:
        raise TimeoutError from None
    if error:
        raise error
    return result


def _retry_after(text: str, now: float) -> float:
    """Seconds that a Retry-After header asks to wait, at most a day; 0 where it can't be read."""
    with suppress(TypeError, ValueError, OverflowError):
        wait = float(text) if text.strip().isdigit() else parsedate_to_datetime(text).timestamp() - now
        return min(max(wait, 0.0), DAY)
    return 0.0


def _explained(error: Exception) -> str:
    """What an error says, in one line."""
    for kinds, words in (
        ((TimeoutError, requests.Timeout), "no whole answer in time"),
        ((requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema), "leads to what is not http"),
        ((requests.ConnectionError, requests.exceptions.ChunkedEncodingError), "can't be reached"),
    ):
        if isinstance(error, kinds):
            return words
    return " ".join(str(error).split())[:200] or type(error).__name__


class _Text(HTMLParser):
    """Collects the text between tags, in `parts`; Beautiful Soup would make ATT of AT&T."""

    INLINE = ("a", "abbr", "b", "code", "em", "font", "i", "small", "span", "strong", "sub", "sup", "u")

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.hidden = [], False

    def handle_starttag(self, tag: str, attrs: list = ()) -> None:
        self.hidden = tag in ("script", "style")
        self.parts.append("" if tag in self.INLINE else " ")

    def handle_endtag(self, tag: str) -> None:
        self.handle_starttag("" if tag in ("script", "style") else tag)

    def handle_data(self, data: str) -> None:
        self.parts.append("" if self.hidden else data)


def strip_html(html: str) -> str:
    """The text of HTML without tags, scripts and styles, with single spaces.

    Text beyond 100,000 characters is left out: the parser of the standard library is quadratic on some input.
    """
    parser = _Text()
    parser.feed(html[:100_000])
    parser.close()
    return " ".join("".join(parser.parts).split())


def decoded(body: bytes, content_type: str = "") -> str:
    """The text of an XML document: UTF-8 where it is valid, else as declared, else UTF-8 with Windows-1252 in gaps."""
    for mark, name in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if body.startswith(mark) or body.startswith("<".encode(name)):
            return body.decode(name, "replace").removeprefix("\ufeff")
    with suppress(UnicodeDecodeError):
        return body.decode("utf-8-sig")
    # Only these declared names count: Python also knows codecs that take quadratic time or aren't text.
    names = r"(?:charset|encoding)=[\"']?((?:iso|windows|cp|koi|gb|big5|euc|shift|latin|mac)[\w-]*)"
    if name := re.search(names, content_type + " " + body[:200].decode("latin-1"), re.IGNORECASE):
        with suppress(UnicodeDecodeError, LookupError):
            return body.decode(name[1])
    return body.decode("utf-8-sig", "windows-1252 in gaps")


codecs.register_error(
    "windows-1252 in gaps", lambda error: (error.object[error.start : error.end].decode("cp1252", "replace"), error.end)
)
