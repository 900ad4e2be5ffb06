"""Registered models whose weights are published as a pickle alone: read without unpickling, kept as safetensors."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

from llmprod import artifacts, models


def model(name: str) -> str:
    """A model as it is, or, of a registered one with `pickled` weights, the folder of its safetensors.

    That is written on first use, next to the artifact in the cache.
    """
    if "pickled" not in artifacts.registry().get(name, {}):
        return name
    folder = artifacts.cache_folder() / f"{name}-safetensors"
    source = artifacts.fetch(name)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / models.MANIFEST).is_file():
            convert(source, folder, **artifacts.entry(name)["pickled"])
    return str(folder)


def convert(source: Path, folder: Path, file: str, first: list[str]) -> None:
    """Writes a model's folder with the weights of a checkpoint of PyTorch as safetensors.

    The checkpoint is a zip archive: a pickle that describes the tensors, which stays closed, and the bytes of each
    tensor in a member of its own, in the order in which the model names them. So names and shapes come from the model,
    after the tensors `first`, which it has no longer.

    Raises ModelError where number or sizes of the tensors are not those of the model.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with torch.device("meta"):
        shapes = {name: weights.shape for name, weights in AutoModel.from_config(config).state_dict().items()}
    with models.reading(source / file), zipfile.ZipFile(source / file) as archive:
        top = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix(".pkl")
        raw = [archive.read(f"{top}/{k}") for k in range(len(first) + len(shapes))][len(first) :]
        extra = f"{top}/{len(first) + len(shapes)}" in archive.namelist()
    if extra or any(len(data) != 4 * shape.numel() for data, shape in zip(raw, shapes.values(), strict=True)):
        raise models.ModelError(f"{source / file}: its tensors are not those of a {config.model_type} in float32.")
    weights = {
        name: torch.from_numpy(np.frombuffer(data, dtype="<f4").copy()).reshape(shape)
        for (name, shape), data in zip(shapes.items(), raw, strict=True)
    }
    with models.sealed(folder) as temporary:
        for other in sorted(source.glob("*.json")):
            shutil.copy(other, temporary)
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
