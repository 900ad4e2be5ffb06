"""Export: a classifier as ONNX, in float32 or with 8-bit integers; as a file, or as a folder that can be served."""

import contextlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from llmprod import artifacts, files, models

ONNX = "model.onnx"  # the file of the weights in a folder that `save` wrote


class OnnxClassifier(torch.nn.Module):
    """A classifier of `models` that ONNX Runtime computes on the processor, in float32 or in 8-bit integers.

    A `models.Predictor` uses it like a `models.Classifier`. With `quantise_dynamic` the activations of a batch share
    one scale, so that the logits of a text depend a little on the other texts of its batch.
    """

    def __init__(self, file: Path, config: object, threads: int = 0):
        """Reads a file that this module wrote; `config` is the checkpoint's. Raises ModelError if it is damaged.

        A batch is computed by so many threads; 0: by as many as PyTorch's.
        """
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self.config, self.file = config, Path(file)
        with models.reading(self.file):
            self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            shapes = [[*found.shape][1:] for found in self.session.get_outputs()]
            if shapes != [[config.num_labels], [config.hidden_size]]:
                raise ValueError(f"outputs of {shapes}, of which config.json knows nothing")

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> models.Outputs:
        """Logits and text vectors."""
        batch = {"input_ids": input_ids.cpu().numpy(), "attention_mask": attention_mask.cpu().numpy()}
        logits, vectors = (torch.from_numpy(found) for found in self.session.run(None, batch))
        return models.Outputs(logits=logits, vectors=vectors)

    def save_pretrained(self, folder: Path) -> None:
        """Writes the file and the config into a folder."""
        shutil.copy(self.file, folder / ONNX)
        self.config.save_pretrained(folder)


class SideBySide(models.Predictor):
    """A predictor whose batches are computed at the same time, each by one thread.

    Small products gain little from a second thread: many texts are done sooner so, a single batch later.
    """

    def infer(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `models.Predictor.infer`, with the same batches."""
        batches = list(models.length_sorted_batches(texts, self.tokenizer, self.batch_size))
        logits = np.zeros((len(texts), self.model.config.num_labels), dtype=np.float32)
        vectors = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            found = pool.map(lambda batch: self.model(**batch[1]), batches)
            for (rows, _), outputs in zip(batches, found, strict=True):
                logits[rows], vectors[rows] = outputs.logits.numpy(), outputs.vectors.numpy()
        return logits, vectors


def int8(folder: Path, batch_size: int = 32, side_by_side: bool = False) -> models.Predictor:
    """The checkpoint in a folder with int8 weights, which are written next to it the first time.

    A file next to them says of which weights they were made; where it does not hold, they are written again. Small
    batches keep the products in the processor's cache, and are faster. `side_by_side` is for many texts at a time, see
    `SideBySide`.
    """
    whole, (file, made) = models.Predictor.load(folder), (folder / name for name in models.INT8)

    def found() -> dict[str, str]:
        return {path.name: artifacts.sha256(path) for path in (*sorted(folder.glob("*.safetensors")), file)}

    if not file.is_file() or not made.is_file() or files.read_json(made) != found():
        print(f"Writing {file.name} next to the checkpoint, once.")
        save_int8(whole.model, file)
        files.write_json(made, found())
    kind, threads = (SideBySide, 1) if side_by_side else (models.Predictor, 0)
    return kind(OnnxClassifier(file, whole.model.config, threads), whole.tokenizer, "fp32", batch_size)


def save(predictor: models.Predictor, folder: Path, write: Callable[[Path], None] | None = None) -> models.Predictor:
    """Writes a folder with `model.onnx`, `config.json` and the tokenizer, atomically, and loads it.

    Args:
        write: writes the ONNX file to a path; None: the classifier as it is, in float32
    """
    with models.sealed(folder) as temporary:
        predictor.model.config.save_pretrained(temporary)
        predictor.tokenizer.save_pretrained(temporary)
        (write or (lambda file: save_onnx(predictor.model, file)))(temporary / ONNX)
    return load(folder)


def load(folder: Path, batch_size: int = 32) -> models.Predictor:
    """Reads a folder that `save` wrote. Raises ModelError if there is no `model.onnx`, or a damaged one."""
    if not (folder / ONNX).is_file():
        raise models.ModelError(f"{folder} has no {ONNX}; a checkpoint in safetensors is read by Predictor.load.")
    with models.reading(models.checked(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = models.read_tokenizer(folder, config.vocab_size)
    return models.Predictor(OnnxClassifier(folder / ONNX, config), tokenizer, "fp32", batch_size)


def save_onnx(classifier: torch.nn.Module, file: Path) -> None:
    """Writes a classifier as ONNX in float32, atomically; texts and tokens of a batch may be any number.

    Inputs are `input_ids` and `attention_mask`, int64 (texts, tokens); outputs `logits` and `vectors`, float32.
    """

    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            outputs = classifier(input_ids=input_ids, attention_mask=attention_mask)
            return outputs.logits, outputs.vectors

    plain = Plain().eval()
    plain.classifier = classifier.eval().cpu()
    encoder = getattr(classifier, "encoder", None)  # static embeddings have none
    attention = encoder.config._attn_implementation if encoder else ""
    tokens = torch.ones(2, 8, dtype=torch.long)
    mask = torch.tensor([[1] * 8, [1] * 4 + [0] * 4])  # without any padding the export would leave the mask out
    sizes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    with files.atomic(file) as temporary, silence_export_warnings():
        if encoder:
            encoder.set_attn_implementation("eager")  # the export cannot follow the fused attention's mask
        try:
            torch.onnx.export(
                plain,
                (tokens, mask),
                temporary,
                verbose=False,
                external_data=False,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits", "vectors"],
                dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
            )
        finally:
            if encoder:
                encoder.set_attn_implementation(attention)


def save_int8(classifier: torch.nn.Module, file: Path) -> None:
    """Writes a classifier as ONNX with 8-bit weights (`quantise_dynamic`), atomically."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".int8-") as folder:
        save_onnx(classifier, Path(folder) / ONNX)
        quantise_dynamic(Path(folder) / ONNX, file)


def quantise_dynamic(whole: Path, small: Path) -> None:
    """Writes a float32 ONNX file again with 8-bit weights, one scale for each output of a layer; atomically.

    Activations are rounded as they come, by the range of each batch (dynamic quantisation, Jacob et al. 2018; library
    `onnxruntime`). One scale for a whole layer costs a MiniLM ten times the accuracy that one for each output does.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with files.atomic(small) as temporary, silence_export_warnings():
        quantize_dynamic(whole, temporary, weight_type=QuantType.QInt8, per_channel=True)


def quantise_static(whole: Path, small: Path, batches: Iterable[dict[str, np.ndarray]]) -> None:
    """Writes a float32 ONNX file again with 8-bit weights and activations in fixed ranges; atomically.

    The ranges are the least and greatest values seen on `batches` (static quantisation, Jacob et al. 2018; library
    `onnxruntime`), which must be of training texts. Only products with a weight matrix are in integers, and the token
    embeddings; attention itself stays in float32.

    Args:
        batches: see `calibration_batches`
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    with (
        tempfile.TemporaryDirectory(dir=small.parent) as folder,
        files.atomic(small) as temporary,
        silence_export_warnings(),
    ):
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        weights = {tensor.name for tensor in graph.initializer}
        without = [n.name for n in graph.node if n.op_type == "MatMul" and not weights & set(n.input)]
        quantize_static(
            prepared,
            temporary,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            nodes_to_exclude=without,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def calibration_batches(
    predictor: models.Predictor, texts: Sequence[str], batch_size: int = 8
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of texts as the inputs of an ONNX file: `input_ids` and `attention_mask`, int64 (texts, tokens)."""
    for _, batch in models.length_sorted_batches(texts, predictor.tokenizer, batch_size):
        yield {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}


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
