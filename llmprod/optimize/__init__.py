"""04_optimize: hyper-parameter search; smaller and faster models."""
