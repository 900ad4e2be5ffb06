"""The bundle: one folder that holds all that is served, with a checksum of every file and texts with their answers."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.special import softmax

from llmprod import LLMProdError, artifacts, files, machine, shapes
from llmprod.models import ModelError, Predictor
from llmprod.optimize import export

FORMAT = 1
MANIFEST, FROZEN = "bundle.json", "frozen.json"
TEMPERATURES = (1e-6, 1e6)  # beyond, logits in fp32 become 0 or infinite
NEAR = 0.05  # how far a frozen text's confidence may move: int8 depends a little on the batch and the processor


class BundleError(LLMProdError):
    """A bundle can't be read, or is not what it says."""


@dataclass(frozen=True)
class Answer:
    """What the model says of one text."""

    label: str
    confidence: float  # the label's calibrated probability, 0 to 1
    sure: bool  # whether that is at least the bundle's threshold
    probabilities: dict[str, float]  # of every label


@dataclass
class Bundle:
    """A bundle that was read: `load` makes one."""

    folder: Path
    manifest: dict
    predictor: Predictor

    @cached_property
    def id(self) -> str:
        """The first digits of the manifest's sha256, and so a checksum over everything in the bundle."""
        return artifacts.sha256(self.folder / MANIFEST)[:12]

    @property
    def labels(self) -> list[str]:
        """The names of the classes."""
        return self.manifest["labels"]

    @cached_property
    def frozen(self) -> list[dict]:
        """Texts that the model was never trained on, each with its right label and this bundle's answer.

        Raises BundleError if the file does not hold that.
        """
        one = {
            "text": shapes.text,
            "label": shapes.text,
            "answer": self.labels.__contains__,
            "confidence": shapes.number,
        }
        return shapes.read(self.folder / FROZEN, [one], "write the bundle again", BundleError)

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Calibrated probabilities (texts, classes), computed by batches of similar length."""
        logits, size = np.zeros((len(texts), len(self.labels)), np.float32), self.predictor.batch_size
        order = np.argsort([len(text) for text in texts], kind="stable")
        for start in range(
            0, len(texts), size
        ):  # one batch a call, which shows no progress bar: a service has no use for one
            rows = order[start : start + size]
            logits[rows] = self.predictor.predict([texts[row] for row in rows])
        return softmax(logits / self.manifest["temperature"], axis=1)

    def predict(self, texts: Sequence[str]) -> list[Answer]:
        """One answer for each text, in their order."""
        return [self.answer(row) for row in self.probabilities(texts)] if texts else []

    def answer(self, probabilities: np.ndarray) -> Answer:
        """The answer that a row of probabilities means."""
        best, named = int(probabilities.argmax()), dict(zip(self.labels, map(float, probabilities), strict=True))
        confidence = float(probabilities[best])
        return Answer(self.labels[best], confidence, confidence >= self.manifest["threshold"], named)

    def check(self) -> None:
        """Answers the frozen texts. Raises BundleError if an answer is not the one that was kept."""
        for kept, found in zip(self.frozen, self.predict([kept["text"] for kept in self.frozen]), strict=True):
            if abs(found.probabilities[kept["answer"]] - kept["confidence"]) > NEAR:
                raise BundleError(
                    f"{self.folder.name} answers a frozen text '{found.label}' ({found.confidence:.2f}), not "
                    f"'{kept['answer']}' ({kept['confidence']:.2f}): the processor or a library computes otherwise. "
                    "Write the bundle on this machine."
                )


def write(
    folder: Path,
    predictor: Predictor,
    frozen: Mapping[str, Sequence[str]],
    card: str,
    *,
    temperature: float = 1.0,
    threshold: float = 0.0,
    provenance: Mapping[str, object] | None = None,
) -> Bundle:
    """Writes a bundle, atomically, and reads it back.

    Args:
        folder: a new folder, or one that is replaced
        predictor: a classifier; an `export.OnnxClassifier` is kept as ONNX, another as safetensors
        frozen: "text" and "label" of texts that were not trained on; their answers are kept with them
        card: the model card (Markdown)
        temperature: the logits are divided by it (`metrics.temperature`)
        threshold: an answer is `sure` from this confidence on
        provenance: what it was made from: checksums of data, the bundle before it, the feedback
    """
    labels = predictor.labels
    if unknown := set(frozen["label"]) - set(labels):
        raise BundleError(f"Frozen texts have labels that the model lacks: {', '.join(sorted(unknown))}.")
    manifest = {
        "format": FORMAT,
        "labels": labels,
        "temperature": float(temperature),
        "threshold": float(threshold),
        "max_length": int(predictor.tokenizer.model_max_length),
        "provenance": {"commit": machine.git_commit(), **(provenance or {})},
    }
    with files.atomic(folder) as temporary:
        temporary.mkdir()
        predictor.write(temporary, card)
        answers = Bundle(temporary, manifest, predictor).predict(list(frozen["text"]))
        kept = [
            {"text": text, "label": label, "answer": answer.label, "confidence": round(answer.confidence, 6)}
            for text, label, answer in zip(frozen["text"], frozen["label"], answers, strict=True)
        ]
        files.write_json(temporary / FROZEN, kept)
        files.write_json(temporary / MANIFEST, manifest | {"files": artifacts.checksums(temporary, (MANIFEST,))})
    return load(folder)


def load(folder: str | Path) -> Bundle:
    """Reads a bundle. Raises BundleError if a byte was changed, a file is missing or not what it should hold, or its
    format is not known.
    """
    folder = Path(os.path.expanduser(folder))  # Path's own fails for an unknown ~user
    if not os.path.isfile(folder / MANIFEST):
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}. 05_deploy writes one.")
    manifest = files.read_json(folder / MANIFEST)
    found = manifest.get("format") if isinstance(manifest, dict) else "none"
    if found != FORMAT:
        raise BundleError(
            f"{folder} has the format {found}, and this version reads {FORMAT}: "
            "write it again, or install the version that wrote it."
        )
    try:
        if changed := artifacts.differing(manifest["files"], artifacts.checksums(folder, (MANIFEST,))):
            raise BundleError(f"{folder} was changed since it was written: {changed}. Write or copy it again.")
        predictor = predictor_of(folder)
        fits = manifest["labels"] == predictor.labels and 0 <= manifest["threshold"] < 2 and manifest["max_length"] > 0
        fits = fits and TEMPERATURES[0] <= manifest["temperature"] <= TEMPERATURES[1]
    except (AttributeError, KeyError, TypeError):
        fits = False
    if not fits:
        raise BundleError(f"{folder / MANIFEST} does not fit the model beside it. Write or copy the bundle again.")
    made = Bundle(folder, manifest, predictor)
    made.frozen  # noqa: B018 - so that a damaged one is found now, and not when it is asked for
    return made


def predictor_of(folder: Path) -> Predictor:
    """The bundle's model and tokenizer. Raises BundleError for what can't be loaded."""
    try:
        return export.load(folder) if (folder / export.ONNX).exists() else Predictor.load(folder)
    except ModelError as error:
        raise BundleError(f"The model in {folder} can't be loaded: {error}") from error
