"""Alert channels: console, file, webhook, W&B."""

import hashlib
import hmac
import json
import os
import sys
import time
from pathlib import Path

import requests
from tqdm.auto import tqdm

from llmprod.news_monitoring.documents import NewsError


class Console:
    """Alerts as lines of text."""

    name = "console"

    def send(self, alert: dict) -> None:
        """Prints an alert above the progress line."""
        tqdm.write(
            f"ALERT {alert['id']}  {alert['key']}: {alert['share']:.0%} negative against {alert['baseline']:.0%} "
            f"({alert['severity']:.1f} times), since {alert['count']} documents",
            file=sys.stdout,
        )
        for document in alert["documents"][:3]:
            tqdm.write(f"    {document['text'][:100]}", file=sys.stdout)


class Log:
    """Alerts as lines of JSON in a file; one that is there already, from before a kill, is not written again."""

    def __init__(self, path: Path):
        self.path, self.name = path, f"log {path}"
        path.parent.mkdir(parents=True, exist_ok=True)

    def send(self, alert: dict) -> None:
        """Appends an alert; a line that a kill cut off is ended first."""
        content = self.path.read_bytes() if self.path.exists() else b""
        if f'"id": "{alert["id"]}"'.encode() in content:
            return
        start = b"\n" if content and not content.endswith(b"\n") else b""
        with self.path.open("ab") as file:
            file.write(start + json.dumps(alert, ensure_ascii=False).encode() + b"\n")


class Webhook:
    """Alerts by POST, as JSON.

    `Idempotency-Key` is the alert's id: a delivery whose answer was lost is repeated, and the receiver can tell.
    With `$LLMPROD_WEBHOOK_SECRET`, `X-Signature: sha256=…` is the HMAC of the body.
    """

    def __init__(self, url: str, tries: int = 3, wait: float = 0.5):
        self.url, self.tries, self.wait, self.name = url, tries, wait, f"webhook {url.partition('?')[0]}"

    def send(self, alert: dict) -> None:
        """Posts an alert, a few times where the receiver fails. Raises NewsError where it never accepted it."""
        body = json.dumps(alert, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": alert["id"]}
        if secret := os.environ.get("LLMPROD_WEBHOOK_SECRET"):
            headers["X-Signature"] = "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
        for attempt in range(self.tries):
            try:
                answer = requests.post(self.url, data=body, headers=headers, timeout=10, allow_redirects=False)
                if answer.status_code < 300:
                    return
                problem = f"it answered {answer.status_code}"
            except requests.RequestException as error:
                problem = type(error).__name__
            time.sleep(self.wait * 2**attempt)
        raise NewsError(f"{self.name} did not accept the alert {alert['id']} ({problem}); it is tried again later.")


class Wandb:
    """Alerts of Weights & Biases, on a run of its own; offline without `WANDB_API_KEY`."""

    name = "wandb"

    def __init__(self) -> None:
        import wandb

        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "llmprod"), job_type="monitor", mode=mode)

    def send(self, alert: dict) -> None:
        """Sends an alert, with its first documents as text."""
        text = "\n".join(document["text"][:200] for document in alert["documents"][:3])
        self.run.alert(title=f"{alert['key']}: {alert['severity']:.1f} times as many negatives", text=text)


def open_channel(word: str) -> Console | Log | Webhook | Wandb:
    """A channel from the command line: `console`, `wandb`, `http(s)://…`, or a file for lines of JSON."""
    if word in ("console", "wandb"):
        return Console() if word == "console" else Wandb()
    if word.startswith(("http://", "https://")):
        return Webhook(word)
    if "://" in word or not word.endswith(".jsonl"):
        raise NewsError(f"--alert {word}: use console, wandb, an http(s) address, or a file that ends in .jsonl.")
    return Log(Path(word))
