"""Dead code: what `llmprod` defines and neither the module nor a notebook, study or benchmark uses (`make lint`)."""

import json
import sys

import yaml
from vulture import Vulture

from llmprod import paths

# Called or read by a library (torch, transformers, optuna, onnxruntime, requests, html.parser, IPython, ipywidgets,
# pydantic, starlette, rocrate, ray), or, as `severity`, the key that a dataclass gives to a record.
HOOKS = [
    "_load_from_checkpoint",
    "_render_traceback_",
    "_save",
    "attrs",
    "base_model_prefix",
    "check_health",
    "compute_loss",
    "create_optimizer",
    "disabled",
    "fill_uninitialized_memory",
    "forward",
    "get_*_dataloader",
    "get_next",
    "get_redirect_target",
    "handle_*",
    "intra_op_num_threads",
    "kwargs",
    "license",
    "max_seq_length",
    "media_type",
    "model_accepts_loss_kwargs",
    "model_config",
    "on_*",
    "pooler",
    "safe_output_keys",
    "sampler",
    "set_epoch",
    "severity",
    "should_training_stop",
    "state_dict",
]


def dead_code() -> list[str]:
    """One line for each definition in `llmprod` without a use; tests don't count as one."""
    vulture = Vulture(ignore_names=HOOKS, ignore_decorators=["@app.*"])  # the routes of the service
    vulture.scavenge([paths.PACKAGE, paths.ROOT / "benchmarks"])
    for path in paths.NOTEBOOKS.glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        vulture.scan("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"), path)
    for experiment in yaml.safe_load((paths.NOTEBOOKS / "studies.yaml").read_text(encoding="utf-8"))[
        "experiments"
    ].values():
        vulture.scan(experiment["run"].partition(":")[2])
    unused = vulture.get_unused_code(min_confidence=60)
    return [item.get_report() for item in unused if paths.PACKAGE in item.filename.resolve().parents]


if __name__ == "__main__":
    found = dead_code()
    print("\n".join(found))
    sys.exit(bool(found))
