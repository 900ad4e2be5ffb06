"""RSS and Atom feeds, with guards against what a hostile one sends."""

import time
from collections import Counter
from contextlib import suppress
from email.utils import parsedate_to_datetime

from llmprod import LLMProdError
from llmprod.news_monitoring.documents import (
    DAY,
    HOUR,
    Clock,
    Document,
    NewsError,
    Source,
    document,
    fingerprint,
    public,
    seconds,
)
from llmprod.news_monitoring.fetch import HELPER, explained


class Feed(Source):
    """RSS or Atom at an address, which is shown and stored in its public form alone.

    `poll` raises nothing; what went wrong is in cursor["error"] until an answer is good. Entries that can be read
    in a malformed feed are given. A document type that declares entities is refused. An entry is known by its id, else
    its link, else its text; where several share an id, by their text as well. Its time is that of publication, else of
    its change.

    Args:
        interval: seconds between two requests
        base: after n failures the next request waits base * 2**n s, at most an hour, or as Retry-After says
        timeout: seconds for connecting and for each read
        deadline: seconds for the whole answer with its parsing
        limit: bytes of the answer, uncompressed
    """

    def __init__(
        self,
        address: str,
        interval: float = 60.0,
        base: float = 30.0,
        timeout: float = 10.0,
        deadline: float = 30.0,
        limit: int = 5_000_000,
        clock: Clock = time.time,
    ) -> None:
        self.address, self.name = address, public(address)
        self.interval, self.base, self.timeout, self.deadline = interval, base, timeout, deadline
        self.limit, self.clock = limit, clock

    def poll(self, cursor: dict, last: bool = False) -> tuple[list[Document], dict]:
        """Entries that were not there before, and the next cursor."""
        now, retry = self.clock(), 0.0
        if cursor.get("asked", 0) <= now < cursor.get("not_before", 0):  # before it was asked, the clock was set back
            return [], cursor
        seen, tags = cursor.get("seen", []), cursor.get("tags", {})
        try:
            answer = self._answer(tags)
            status, headers = answer["status"], answer["headers"]
            if status == 304:
                return [], {"seen": seen, "tags": tags, "asked": now, "not_before": now + self.interval}
            if status != 200:
                retry = _retry_after(headers.get("Retry-After", ""), now)
                raise NewsError(f"answered {status}")
        except (LLMProdError, TimeoutError) as reason:
            failures = cursor.get("failures", 0) + 1
            wait = max(min(self.base * 2 ** min(failures, 30), HOUR), retry)
            error = f"{self.name}: {explained(reason)}; asked again after {wait:.0f} s"
            return [], {"seen": seen, "failures": failures, "asked": now, "not_before": now + wait, "error": error}
        found, trouble = self._documents(answer["entries"]), answer["trouble"]
        # A malformed answer may be half of one: it is asked for again, and what it lacks is not new when it returns.
        tags = {} if trouble else {name: headers[name] for name in ("ETag", "Last-Modified") if name in headers}
        kept = [*found, *(name for name in seen if name not in found)][: max(1000, len(found))]
        after = {"seen": kept, "tags": tags, "asked": now, "not_before": now + self.interval}
        if trouble:
            after["error"] = f"{self.name}: malformed, {len(found)} entries could be read ({trouble})"
        known = set(seen)
        return [d for d in found.values() if d.id not in known], after

    def _answer(self, tags: dict) -> dict:
        """What `fetch.feed` answers. Raises NewsError or TimeoutError."""
        headers = {"User-Agent": "llmprod", "Accept-Encoding": "gzip"}
        for name, condition in (("ETag", "If-None-Match"), ("Last-Modified", "If-Modified-Since")):
            headers |= {condition: tags[name]} if name in tags else {}
        request = {"url": self.address, "headers": headers, "timeout": self.timeout, "limit": self.limit}
        answer = HELPER.ask(request, self.deadline)
        if "error" in answer:
            raise NewsError(answer["error"].replace(self.address, self.name))
        return answer

    def _documents(self, entries: list[dict]) -> dict[str, Document]:
        """The documents in entries, by id."""
        found, names = {}, Counter(entry["name"] for entry in entries)
        for entry in entries:
            name, text = entry["name"], f"{entry['title']}\n{entry['body']}"
            # Ids as short as "17" are common, so that an id counts within its feed.
            parts = [name, *([text] if names[name] > 1 else [])]
            record = {"text": text, "title": entry["title"], "link": entry["link"]}
            record |= {"id": fingerprint(self.address, *parts)} if name else {}
            for date in entry["dates"]:
                with suppress(LLMProdError):  # feedparser would read 2025/01/06 as the first of this month
                    record["time"] = seconds(date)
                    break
            with suppress(NewsError):  # neither title nor text
                d = document(record, self.name)
                found[d.id] = d
        return found


def _retry_after(text: str, now: float) -> float:
    """Seconds that a Retry-After header asks to wait, at most a day; 0 where it can't be read."""
    with suppress(TypeError, ValueError, OverflowError):
        wait = float(text) if text.strip().isdigit() else parsedate_to_datetime(text).timestamp() - now
        return min(max(wait, 0.0), DAY)
    return 0.0
