"""The front of speed, size and accuracy: timings, the gate that a smaller model must pass, non-dominated points."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.text import Text

from llmprod import models
from llmprod.evaluate import metrics

FEATURES = {  # as people call them, and as PyTorch does
    "AVX2": ("avx2",),
    "AVX-512": ("avx512_f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "bf16": ("avx512_bf16", "bf16"),
    "AMX": ("amx_tile",),
}


def processor() -> str:
    """The processor's features on which the speed, and the digits, of small number formats depend."""
    can = torch.cpu.get_capabilities()
    found = [name for name, keys in FEATURES.items() if any(can.get(key) for key in keys)]
    return f"{can.get('architecture', 'unknown')}: {', '.join(found) or 'none of ' + ', '.join(FEATURES)}"


def timed(predictor: models.Predictor, texts: Sequence[str], alone: Sequence[str]) -> tuple[np.ndarray, dict]:
    """Logits (texts, classes) of all texts in batches, and the speeds: texts/s, and p50 and p99 in ms of one text.

    Args:
        alone: the texts that are sent one at a time, after a first one that is not counted
    """
    times = []
    for text in [alone[0], *alone]:
        started = time.perf_counter()
        predictor.predict([text])
        times.append(1000 * (time.perf_counter() - started))
    started = time.perf_counter()
    logits = predictor.predict(texts)
    rate = len(texts) / (time.perf_counter() - started)
    p50, p99 = np.percentile(times[1:], [50, 99])
    return logits, {"p50, ms": float(p50), "p99, ms": float(p99), "texts/s": rate}


def megabytes(folder: Path) -> float:
    """The size of a saved model: weights, settings and tokenizer; 1 MB is a million bytes."""
    kept = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".onnx", ".json")]
    return sum(file.stat().st_size for file in kept) / 1e6


def gate(
    original_predictions: np.ndarray,
    new_predictions: np.ndarray,
    labels: np.ndarray,
    agreement: float = 0.98,
    loss: float = 0.005,
) -> list[str]:
    """Why a smaller model may not replace the original; [] if it may.

    Args:
        original_predictions, new_predictions, labels: class numbers (texts,), on validation
        agreement: the least share of texts to which both models must give the same class
        loss: how much accuracy may be lost at most
    """
    same = float((original_predictions == new_predictions).mean())
    lost = metrics.accuracy(labels, original_predictions) - metrics.accuracy(labels, new_predictions)
    reasons = []
    if same < agreement:
        reasons.append(f"agrees on {same:.1%} of the texts, at least {agreement:.1%} is asked for")
    if lost > loss + 1e-12:
        reasons.append(f"loses {100 * lost:.2f} points of accuracy, at most {100 * loss:.2f} are allowed")
    return reasons


def pareto(cost: Sequence[float], value: Sequence[float]) -> np.ndarray:
    """Which points no other one dominates: none costs as little and is worth as much, and is better in one of both."""
    cost, value = np.asarray(cost, dtype=float), np.asarray(value, dtype=float)
    no_worse = (cost[:, None] <= cost) & (value[:, None] >= value)  # row: the one that dominates, column: the other
    better = (cost[:, None] < cost) | (value[:, None] > value)
    return ~(no_worse & better).any(axis=0)


def label_points(axes: Axes, x: Sequence[float], y: Sequence[float], names: Sequence[str]) -> None:
    """Writes a name next to each point, at a near place where it covers no other name or point; call it last."""
    axes.figure.canvas.draw()
    renderer, frame = axes.figure.canvas.get_renderer(), axes.get_window_extent()
    points, taken = axes.transData.transform(np.column_stack([x, y])), []
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    places = [(r * np.cos(a), r * np.sin(a)) for r in range(9, 120, 5) for a in angles]  # in points, the nearest first
    line = {"arrowstyle": "-", "color": "#9aa5ad", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    for name, point in zip(names, zip(x, y, strict=True), strict=True):
        for place in places:
            side = "left" if place[0] > 1 else "right" if place[0] < -1 else "center"
            settings = {"textcoords": "offset points", "ha": side, "va": "center", "fontsize": 9}
            settings |= {"bbox": {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}, "zorder": 4}
            text = axes.annotate(name, point, place, arrowprops=line, **settings)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(3)  # without the line
            inside = frame.count_contains(box.corners()) == 4
            if inside and not box.count_contains(points) and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()
