"""Requests over HTTP in a process of its own, which is killed at the deadline; the entries of feeds.

Looking up a name, a drip of headers and the parsers know no limit of time, and a thread can't be ended.
"""

import codecs
import io
import ipaddress
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import zlib
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests

from llmprod.extras import extra

MEMORY = 2 << 30  # bytes that the process may have


class Refused(Exception):
    """An answer that is not taken; says why."""


class Helper:
    """The process; started when it is first asked, and again after it was killed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, request: dict, deadline: float) -> dict:
        """The answer of `feed` or `post` to a request, or {"error": what went wrong}.

        Raises TimeoutError after `deadline` seconds.
        """
        if self.process is None or self.process.poll() is not None:
            command, root = [sys.executable, "-m", "llmprod.news_monitoring.fetch"], Path(__file__).parents[2]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)
            self.process.stdout.readline()  # it is ready: its start is not the answer's
        timer = threading.Timer(deadline, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            self.process.kill()
            self.process.communicate()
            raise TimeoutError from None
        finally:
            timer.cancel()


HELPER = Helper()


def serve() -> None:
    """Answers requests, lines of JSON, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    with suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = feed(request) if "limit" in request else post(request)
        except Exception as error:  # feedparser, requests and urllib3 raise anything on hostile input
            answer = {"error": explained(error)}
        print(json.dumps(answer), flush=True)


def post(request: dict) -> dict:
    """Posts `body` with `headers` to `url`. Returns the status; the answer's body is not read."""
    options = {"timeout": request["timeout"], "allow_redirects": False, "stream": True}
    with requests.post(request["url"], request["body"].encode(), headers=request["headers"], **options) as answer:
        return {"status": answer.status_code}


class _Session(requests.Session):
    def get_redirect_target(self, answer: requests.Response) -> None:
        """`feed` follows redirects itself, since requests reads the body of a redirect, however large it is."""


def feed(request: dict) -> dict:
    """Asks for the feed at `url` with `headers`, following at most 5 redirects.

    Returns status, headers and, of a good answer, what `entries` says. Raises Refused or what requests raises.
    """
    url = request["url"]
    with _Session() as session:
        for _ in range(6):
            options = {"headers": request["headers"], "stream": True, "timeout": request["timeout"]}
            with session.get(url, **options) as answer:
                kept = {k: answer.headers[k] for k in ("ETag", "Last-Modified", "Retry-After") if k in answer.headers}
                found = {"status": answer.status_code, "headers": kept}
                if answer.status_code == 200:
                    body = uncompressed(answer, request["limit"])
                    return found | entries(decoded(body, answer.headers.get("Content-Type", "")), url)
                if not answer.is_redirect:
                    return found
                url, old = urljoin(url, answer.headers["Location"]), url
                if is_private(url) and not is_private(old):
                    raise Refused("refused, since it leads from a public address to a private one")
    raise Refused("more than 5 redirects")


def is_private(url: str) -> bool:
    """Whether an address leads into this machine or a private network; False where its name isn't known."""
    with suppress(OSError, ValueError):
        parts = urlsplit(url)
        return any(
            not ipaddress.ip_address(found[4][0].partition("%")[0]).is_global
            for found in socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        )
    return False


def uncompressed(answer: requests.Response, limit: int) -> bytes:
    """The bytes of an answer, uncompressed. Raises Refused where they are too many or too few."""
    coding, body = answer.headers.get("Content-Encoding", "identity").strip().lower(), bytearray()
    if coding not in ("identity", "gzip", "x-gzip"):
        raise Refused(f"sent the encoding {coding}, which was not asked for")
    unzip = None if coding == "identity" else zlib.decompressobj(wbits=31)
    while part := answer.raw.read1(1 << 16, decode_content=False):
        body += unzip.decompress(part, limit + 1 - len(body)) if unzip else part
        if len(body) > limit:
            raise Refused(f"more than {limit:,} bytes")
    if unzip and not unzip.eof:
        raise Refused("the answer broke off")
    return bytes(body)


def entries(text: str, url: str) -> dict:
    """The entries of a feed, dicts of texts without tags, and `trouble`, what is wrong with it.

    Raises Refused where it is no feed, or declares entities.
    """
    with extra("news"):
        import feedparser

    lower = text.lower()
    if (start := lower.find("<!doctype")) >= 0 and lower.find("<!entity", start) >= 0:
        raise Refused("refused, since its document type declares entities")
    text = re.sub(r"&#(x[0-9a-f]+|[0-9]+);?", _reference, text, flags=re.IGNORECASE)
    # Its own declaration goes: the text is UTF-8 now, and feedparser would use any codec that it names.
    xml = '<?xml version="1.0" encoding="utf-8"?>\n' + re.sub(r"^\s*<\?xml[^>]*\?>", "", text)
    parsed = feedparser.parse(io.BytesIO(xml.encode()), sanitize_html=False, resolve_relative_uris=False)
    found = []
    for entry in parsed.entries:
        bodies = [entry.get("summary"), *(content.get("value") for content in entry.get("content", []))]
        link = _link(entry.get("link") or "", url)
        found.append(
            {
                "title": plain(entry.get("title") or ""),
                "body": plain(max(filter(None, bodies), key=len, default="")),
                "name": entry.get("id") or link,
                "link": link,
                "dates": [entry[key] for key in ("published", "updated") if entry.get(key)],
            }
        )
    if not found and (parsed.bozo or not parsed.version):
        raise Refused("neither RSS nor Atom" if not parsed.version else "malformed, without an entry")
    return {"entries": found, "trouble": explained(parsed.bozo_exception) if parsed.bozo else ""}


def _reference(match: re.Match) -> str:
    """A character reference, U+FFFD in place of one that XML does not have: feedparser fails on some."""
    digits = match[1].lower()
    number = int(digits[1:], 16) if digits[0] == "x" else int(digits[:9])
    valid = number in (9, 10, 13) or 32 <= number < 0xD800 or 0xE000 <= number < 0xFFFE or 1 << 16 <= number < 17 << 16
    return match[0] if valid else "\ufffd"


def _link(link: str, url: str) -> str:
    """An entry's link, relative to its feed; "" for what can't be opened, as an id that feedparser takes for one."""
    with suppress(ValueError):
        found = urljoin(url, link)
        return found if link and urlsplit(found).scheme in ("http", "https") else ""
    return ""


def explained(error: Exception) -> str:
    """What an error says, in one line."""
    for kinds, words in (
        ((TimeoutError, requests.Timeout), "no whole answer in time"),
        ((requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema), "leads to what is not http"),
        ((requests.ConnectionError, requests.exceptions.ChunkedEncodingError), "can't be reached"),
        ((requests.exceptions.InvalidURL, UnicodeError), "leads to no address"),
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


def plain(html: str) -> str:
    """The text of HTML without tags, scripts and styles, with single spaces; also of HTML that was escaped twice.

    Text beyond 100,000 characters is left out: the parser of the standard library is quadratic on some input.
    """
    for _ in range(2):
        parser = _Text()
        parser.feed(html[:100_000])
        parser.close()
        html = " ".join("".join(parser.parts).split())
        if not re.search(r"</[a-z]\w*>|<(?:br|p)\b[^>]*>|&(?:amp|lt|gt|quot|nbsp|#\d+);", html, re.IGNORECASE):
            break
    return html


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

if __name__ == "__main__":
    serve()
