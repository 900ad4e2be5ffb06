"""The experiment of the continual-learning study: one method, one scenario, one seed."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

from llmprod import data
from llmprod.feedback import continual, phases


def phases_of(parameters: Mapping[str, object]) -> tuple[list[phases.Phase], int]:
    """The phases of a scenario, "new classes" or "shifted topics", and the number of classes in all of them."""
    size, tests, seed = (parameters[name] for name in ("phase_texts", "phase_tests", "seed"))
    if parameters["scenario"] == "shifted topics":
        shifted, names = phases.shifted_topics(size, tests, seed)
        return shifted, len(names)
    splits, names, _ = data.prepared(Path(parameters["splits"]))
    train, test = ((list(splits[s]["text"]), np.array(splits[s]["label"])) for s in ("train", parameters["split"]))
    return phases.new_classes(train, test, names, parameters["together"], size, tests, seed), len(names)


def settings_of(parameters: Mapping[str, object]) -> continual.Settings:
    """The settings of a run among its parameters."""
    names = {field.name for field in fields(continual.Settings)} - {"method"}
    return continual.Settings(**{name: parameters[name] for name in names if name in parameters})


def continual_learning(parameters: Mapping[str, object]) -> dict:
    """Learns phases by one method: average accuracy, backward transfer, forgetting, and the seconds it took."""
    some, classes = phases_of(parameters)
    matrix, seconds = continual.run(parameters["learner"], some, classes, settings_of(parameters))
    return {"metrics": continual.summary(matrix), "speeds": {"learning, s": seconds}, "matrix": matrix.tolist()}
