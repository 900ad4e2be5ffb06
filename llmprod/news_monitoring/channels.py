"""Alert channels: console, file, webhook, W&B, the feedback store."""

import hashlib
import hmac
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from tqdm.auto import tqdm

from llmprod import LLMProdError
from llmprod.news_monitoring.documents import NewsError, public
from llmprod.news_monitoring.fetch import HELPER
from llmprod.news_monitoring.journal import OVER
from llmprod.tables import shown


class Console:
    """Alerts as lines of text."""

    name = "console"

    def send(self, alert: dict) -> None:
        """Prints an alert above the progress line; what comes from documents without control characters.

        Of an event that was told already only the further key is, and its end.
        """
        first, over = alert["event"] == alert["id"], alert["id"].endswith(OVER)
        title, *texts = _in_words(alert, 100)
        tqdm.write(f"{'ALERT' if first else ' over' if over else ' also'} {alert['id']}  {title}", file=sys.stdout)
        for text in texts[: 3 * first]:
            tqdm.write(f"    {text}", file=sys.stdout)


class Log:
    """Alerts as lines of JSON in a file; one that is there already, from before a kill, is not written again."""

    def __init__(self, path: Path):
        name = f"log {path}".encode("utf-8", "backslashreplace").decode()  # the journal keeps it
        self.path, self.name, self.ids = path, name, set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                self.ids = {alert_id for line in file if (alert_id := _alert_id(line))}
        except (OSError, RecursionError) as error:  # the latter under thousands of folders that are to be made
            reason = getattr(error, "strerror", error)
            raise NewsError(f"--alert {path}: it can't be written ({reason}). Name another file.") from error

    def send(self, alert: dict) -> None:
        """Appends an alert; a line that a kill cut off is ended first."""
        if alert["id"] in self.ids:
            return
        with self.path.open("a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            start = b"\n" if file.read() not in (b"", b"\n") else b""
            file.write(start + json.dumps(alert, ensure_ascii=False).encode() + b"\n")
        self.ids.add(alert["id"])


def _in_words(alert: dict, width: int) -> list[str]:
    """An alert for people: a line with what is said, one for each of its three most telling documents."""
    since = datetime.fromtimestamp(alert["since"], UTC).strftime("%Y-%m-%d %H:%M")
    size = f", {alert['count']} documents" if alert["count"] else ""  # an end has none
    texts = [shown(" ".join(document["text"][:1000].split()), width) for document in alert["documents"][:3]]
    return [f"{shown(alert['key'], 100)}: {alert['said']}; since {since}{size}", *texts]


def _alert_id(line: bytes) -> str:
    """The id of the alert in a line; "" for a line that was cut off."""
    try:
        return str(json.loads(line)["id"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""


class Webhook:
    """Alerts by POST, as JSON; `name` has the public form of the address.

    `Idempotency-Key` is the alert's id: a delivery whose answer was lost is repeated, and the receiver can tell.
    With `$LLMPROD_WEBHOOK_SECRET`, `X-Signature: sha256=…` is the HMAC of the body. Of the answer only the status is
    read.

    Args:
        deadline: seconds for all tries of one alert
        wait: seconds after the first one; twice as many after the next
    """

    def __init__(self, url: str, tries: int = 3, wait: float = 0.5, deadline: float = 10.0):
        self.url, self.tries, self.wait, self.deadline, self.name = url, tries, wait, deadline, f"webhook {public(url)}"

    def send(self, alert: dict) -> None:
        """Posts an alert, a few times where the receiver fails. Raises NewsError where it never accepted it."""
        body = json.dumps(alert, ensure_ascii=False).encode("utf-8", "replace").decode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": alert["id"]}
        if secret := os.environ.get("LLMPROD_WEBHOOK_SECRET"):
            headers["X-Signature"] = "sha256=" + hmac.new(secret.encode(), body.encode(), hashlib.sha256).hexdigest()
        request = {"url": self.url, "body": body, "headers": headers, "timeout": self.deadline}
        ends, problem = time.monotonic() + self.deadline, ""
        for attempt in range(self.tries):
            if (left := ends - time.monotonic()) <= 0:
                break
            try:
                answer = HELPER.ask(request, left)
            except TimeoutError:
                answer = {"error": "no answer in time"}
            if 200 <= answer.get("status", 0) < 300:
                return
            problem = f"it answered {answer['status']}" if "status" in answer else answer["error"]
            time.sleep(min(self.wait * 2**attempt, max(0.0, ends - time.monotonic())))
        problem = problem.replace(self.url, public(self.url))
        raise NewsError(f"{self.name} did not accept the alert {alert['id']} ({problem}); it is tried again later.")


class Wandb:
    """Alerts of Weights & Biases, on a run of its own, which stores neither the command line nor what is printed.

    `WANDB_MODE` and `WANDB_DISABLED` decide first; without them it is online where there is a `WANDB_API_KEY`.
    Raises NewsError where W&B can't start.
    """

    name = "wandb"

    def __init__(self) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
            mode = "disabled"
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        quiet = {"console": "off", "disable_git": True, "disable_code": True}
        quiet |= {"host": "", "program": "monitor"}  # or they would be this machine's name and the file that runs
        quiet |= {"init_timeout": 15} if mode == "online" else {}  # seconds; its own 90 would keep the sources waiting
        try:
            settings = wandb.Settings(x_disable_stats=True, x_disable_meta=True, silent=mode == "offline", **quiet)
            project = os.environ.get("WANDB_PROJECT", "llmprod")
            self.run = wandb.init(project=project, job_type="monitor", mode=mode, settings=settings)
        except (wandb.Error, ValueError, OSError) as error:
            reason = shown(str(error).split("\n")[0], 200)
            raise NewsError(f"--alert wandb: {reason}. WANDB_MODE=offline does without the network.") from None

    def send(self, alert: dict) -> None:
        """Sends an alert, with its first documents as text."""
        text = "\n".join(document["text"][:200] for document in alert["documents"][:3])
        self.run.alert(title=f"{alert['key']}: {alert['said']}", text=text)


class Store(Protocol):
    """Where alerts are kept: `feedback.store.Store`, whose libraries are of another extra."""

    place: str

    def add_answer(self, request: str, bundle: str, text: str, label: str, confidence: float, **more: object) -> None:
        """Keeps an alert; one that is there already stays as it was."""


class FeedbackStore:
    """Alerts as answers of the feedback store, where people say which were real ("up") and which false ("down").

    An event is judged once: further keys of it, and its end, are not kept. The label is what is watched (topic,
    company, currency or all news), the confidence 1: an alarm has no probability.

    The request is the alert's id, made of its key and the id of the document that raised it, which counts within its
    source. So an alert that comes again adds nothing, and where two monitors of one source raise the same alert, the
    first one's is kept. Sources on two machines that have one path and number their documents alike need two stores.
    """

    def __init__(self, store: Store):
        self.store, self.name = store, f"store {store.place}".encode("utf-8", "backslashreplace").decode()

    def send(self, alert: dict) -> None:
        """Keeps the first alert of an event. Raises NewsError where the store can't be used."""
        if alert["event"] != alert["id"]:
            return
        label, text = shown(alert["key"].partition(":")[0], 100), "\n".join(_in_words(alert, 1000))
        try:
            self.store.add_answer(alert["id"], "monitor", text, label, 1.0, source="alert")
        except LLMProdError as error:
            raise NewsError(f"The alert {alert['id']} is not kept ({error}); it is tried again later.") from error


def open_channel(word: str, opened: Callable[[str], Store]) -> Console | Log | Webhook | Wandb | FeedbackStore:
    """A channel from the command line: `console`, `wandb`, `http(s)://…`, a file for lines of JSON, or a store.

    `opened` opens the feedback store at an address. Raises NewsError for another word, and what the channel raises.
    """
    if word in ("console", "wandb"):
        return Console() if word == "console" else Wandb()
    if word.startswith(("http://", "https://")):
        return Webhook(word)
    if word.startswith(("sqlite://", "postgresql://")):
        return FeedbackStore(opened(word))
    if "://" in word or not word.endswith(".jsonl"):
        word = public(word) if "://" in word else word
        known = "console, wandb, an http(s) address, a file that ends in .jsonl, or sqlite:///FILE or postgresql://…"
        raise NewsError(f"--alert {word}: use {known}.")
    return Log(Path(word))
