"""Alert channels: console, file, webhook, W&B."""

import hashlib
import hmac
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from tqdm.auto import tqdm

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
        kind, since = ("ALERT" if first else " over" if over else " also"), f"since {_when(alert['since'])}"
        size = "" if over else f", {alert['count']} documents"
        title = f"{kind} {alert['id']}  {shown(alert['key'], 100)}: {alert['said']}; {since}{size}"
        tqdm.write(title, file=sys.stdout)
        for document in alert["documents"][: 3 * first]:
            tqdm.write(f"    {shown(' '.join(document['text'][:1000].split()), 100)}", file=sys.stdout)


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


def _when(seconds: float) -> str:
    """A time as people write it, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


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


def open_channel(word: str) -> Console | Log | Webhook | Wandb:
    """A channel from the command line: `console`, `wandb`, `http(s)://…`, or a file for lines of JSON."""
    if word in ("console", "wandb"):
        return Console() if word == "console" else Wandb()
    if word.startswith(("http://", "https://")):
        return Webhook(word)
    if "://" in word or not word.endswith(".jsonl"):
        word = public(word) if "://" in word else word
        raise NewsError(f"--alert {word}: use console, wandb, an http(s) address, or a file that ends in .jsonl.")
    return Log(Path(word))
