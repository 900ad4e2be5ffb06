"""Export: a classifier as ONNX, in float32 or with 8-bit integers."""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from llmprod import files, models


class OnnxClassifier(torch.nn.Module):
    """A classifier of `models` whose matrix products ONNX Runtime computes in 8-bit integers, on the processor.

    A `models.Predictor` uses it like a `models.Classifier`. The activations of a batch share one scale, so that the
    logits of a text depend a little on the other texts of its batch.
    """

    def __init__(self, file: Path, config: object):
        """Reads what `save_int8` wrote; `config` is the checkpoint's."""
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.config = config
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> models.Outputs:
        """Logits and text vectors."""
        batch = {"input_ids": input_ids.cpu().numpy(), "attention_mask": attention_mask.cpu().numpy()}
        logits, vectors = (torch.from_numpy(found) for found in self.session.run(None, batch))
        return models.Outputs(logits=logits, vectors=vectors)


def int8(folder: Path, batch_size: int = 32) -> models.Predictor:
    """The checkpoint in a folder with int8 weights, which are written next to it the first time.

    Small batches keep the products in the processor's cache, and are faster.
    """
    whole, file = models.Predictor.load(folder), folder / "int8.onnx"
    if not file.exists():
        print(f"Writing {file.name} next to the checkpoint, once.")
        save_int8(whole.model, file)
    return models.Predictor(OnnxClassifier(file, whole.model.config), whole.tokenizer, "fp32", batch_size)


def save_int8(classifier: models.Classifier, file: Path) -> None:
    """Writes a classifier as ONNX with 8-bit weights, one scale for each output of a layer; atomically.

    Activations are rounded as they come, by the range of each batch (dynamic quantisation, Jacob et al. 2018; library
    `onnxruntime`). One scale for a whole layer costs a MiniLM ten times the accuracy that one for each output does.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            outputs = classifier(input_ids=input_ids, attention_mask=attention_mask)
            return outputs.logits, outputs.vectors

    plain = Plain().eval()
    plain.classifier = classifier.eval()
    classifier.encoder.set_attn_implementation("eager")  # the export cannot follow the fused attention's mask
    tokens = torch.ones(2, 8, dtype=torch.long)
    mask = torch.tensor([[1] * 8, [1] * 4 + [0] * 4])  # without any padding the export would leave the mask out
    sizes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    with tempfile.TemporaryDirectory(dir=file.parent) as folder, files.atomic(file) as small, silence_export_warnings():
        whole = Path(folder) / "whole.onnx"
        torch.onnx.export(
            plain,
            (tokens, mask),
            whole,
            verbose=False,
            external_data=False,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits", "vectors"],
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
        )
        quantize_dynamic(whole, small, weight_type=QuantType.QInt8, per_channel=True)


@contextlib.contextmanager
def silence_export_warnings() -> Iterator[None]:
    """Silences warnings: the exporter tells of optional packages and of its own outdated calls."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
