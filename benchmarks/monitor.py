"""Documents a second through the whole monitor, from a growing file or a feed to the alert, by size of the encoder.

    python -m benchmarks.monitor [--documents 2000] [--layers 6 3] [--precision auto int8]

Speed does not depend on what the weights are, so that the encoders here are not trained; what fewer layers and int8
weights cost in accuracy is in the study `distillation`. One encoder has both heads, topic and sentiment; companies need
a second one, which is trained here for one pass. The ratio is to the first encoder alone, called on all texts at once.
"""

import argparse
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

import pandas as pd

from benchmarks import record
from llmprod import data, machine, models
from llmprod.financial_sentiment import entities, recognizer, sentiment
from llmprod.harness import results
from llmprod.news_monitoring import channels, feeds, monitor, shift, sources, streams
from llmprod.news_monitoring.journal import Journal
from llmprod.news_monitoring.scorer import MonitorConfig, Scorer

HEADS = [
    "sentiment",
    *(f"topic: {name}" for name in ("acq", "crude", "earn", "grain", "interest", "money", "ship", "trade")),
]


def saved(folder: Path, layers: int, max_length: int, finder: recognizer.Recognizer | None = None) -> Path:
    """An encoder of so many layers with two heads, as `Scorer` reads it, and one that finds companies."""
    predictor = models.Predictor.pretrained("minilm", HEADS, dropout=0.0, max_length=max_length)
    del predictor.model.encoder.encoder.layer[layers:]
    predictor.model.config.num_hidden_layers = layers
    config = MonitorConfig(sentiment.PlattScaling(-3.0, 0.0, 0.5), (-0.1, 0.1), threshold=114.0)
    config.save(folder, "speed", predictor, finder=finder)
    return folder


class OneFeed(BaseHTTPRequestHandler):
    """Serves `server.body`."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *args):
        pass


def through(scorer: Scorer, source: sources.Source, folder: Path, documents: int) -> float:
    """Documents a second from the source to the alerts' file."""
    with Journal(folder / "journal.sqlite") as journal:
        watching = monitor.Monitor(scorer, journal, shift.allowing(1.0), [channels.Log(folder / "alerts.jsonl")], 0.0)
        started = time.perf_counter()
        while watching.counts["documents"] + watching.counts["repeats"] < documents:
            watching.step([source])
            watching.deliver()
        watching.step([], last=True)
        return documents / (time.perf_counter() - started)


def followed(texts: Sequence[str], folder: Path) -> Iterator[tuple[str, sources.Source]]:
    """The texts as a file of lines in a folder, and as a feed that is served over HTTP."""
    lines = "".join(json.dumps({"id": str(i), "time": 1e9 + 3600 * i, "text": t}) + "\n" for i, t in enumerate(texts))
    (folder / "in.jsonl").write_text(lines, encoding="utf-8")
    yield "file", sources.Tail(folder / "in.jsonl")
    items = "".join(
        f"<item><guid>{i}</guid><title/><description>{escape(t)}</description></item>" for i, t in enumerate(texts)
    )
    server = HTTPServer(("127.0.0.1", 0), OneFeed)
    server.body = f"<rss version='2.0'><channel>{items}</channel></rss>".encode()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield "feed", feeds.Feed(f"http://127.0.0.1:{server.server_port}/", deadline=120)
    server.shutdown()


def main() -> None:
    """Prints one row for each kind of text, size and precision."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--documents", type=int, default=2000)
    options.add_argument("--layers", type=int, nargs="+", default=[6, 3])
    options.add_argument("--precision", nargs="+", default=["auto", "int8"])
    options = options.parse_args()
    machine.set_threads()
    machine.quiet()
    titles = streams.load("business-headlines")["text"].head(options.documents).tolist()
    wire = data.load("reuters-r8")["text"].drop_duplicates().head(options.documents // 4).tolist()
    finder = recognizer.train(entities.conll("train")[: options.documents], epochs=1)
    kinds = {
        "headlines": (titles, 64, None),
        "headlines, companies": (titles, 64, finder),
        "newswire": (wire, 128, None),
    }
    rows = []
    for (kind, (texts, *settings)), layers, precision in itertools.product(
        kinds.items(), options.layers, options.precision
    ):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            scorer = Scorer(saved(folder / "models", layers, *settings), precision)
            scorer.ratings.predict(texts[:64])
            started = time.perf_counter()
            scorer.ratings.predict(texts)
            alone = len(texts) / (time.perf_counter() - started)
            row = {"texts": kind, "layers": layers, "precision": precision, "encoder alone, documents/s": alone}
            for name, source in followed(texts, folder):
                (folder / name).mkdir()
                row[f"{name}, documents/s"] = through(scorer, source, folder / name, len(texts))
            rows.append(row | {"file over encoder alone": row["file, documents/s"] / alone})
    print(machine.describe())
    print(results.markdown(pd.DataFrame(rows).round(2)))
    record("monitor", rows)


if __name__ == "__main__":
    main()
