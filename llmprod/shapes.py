"""The shape that the content of a JSON file must have before it is used."""

from pathlib import Path

from llmprod import LLMProdError
from llmprod.files import read_json


def fits(found: object, shape: object) -> bool:
    """Whether content has a shape.

    A shape is a function of the content (`text`, `number`); a list with the shape of all items; or name -> shape, where
    "*" stands for every name, and a name that ends with "?" may be missing.
    """
    if isinstance(shape, list):
        return isinstance(found, list) and all(fits(item, shape[0]) for item in found)
    if not isinstance(shape, dict):
        return shape(found)
    if not isinstance(found, dict):
        return False
    needed = {name for name in shape if name != "*" and not name.endswith("?")}
    parts = [(value, shape[n]) for key, value in found.items() for n in ("*", key, f"{key}?") if n in shape]
    return needed <= found.keys() and all(fits(value, part) for value, part in parts)


def read(path: Path, shape: object, way_out: str, error: type[LLMProdError] = LLMProdError) -> dict | list:
    """The content of a JSON file. Raises an error, with the way out, if it is damaged or has another shape."""
    try:
        found = read_json(path)
    except (LLMProdError, RecursionError):
        found = None
    if not fits(found, shape):
        raise error(f"{path} was damaged or edited: {way_out}.")
    return found


def text(found: object) -> bool:
    """Whether it is a text."""
    return isinstance(found, str)


def number(found: object) -> bool:
    """Whether it is a number that a float can hold; NaN is one."""
    return isinstance(found, float) or (isinstance(found, int) and not isinstance(found, bool) and abs(found) < 2**1023)


def whole(found: object) -> bool:
    """Whether it is a whole number from 0 on that SQLite and files can count to."""
    return number(found) and isinstance(found, int) and 0 <= found < 2**63


def finite(found: object) -> bool:
    """Whether it is a finite number, and far enough from the largest that its spread is one, too."""
    return number(found) and abs(found) < 1e300


def finites(found: object) -> bool:
    """Whether it is a mapping of at least one name to finite numbers."""
    return bool(found) and fits(found, {"*": finite})


def positive(found: object) -> bool:
    """Whether it is a finite number above 0."""
    return finite(found) and found > 0


def number_or_none(found: object) -> bool:
    """Whether it is a `number`, or null."""
    return found is None or number(found)


def classes(found: object) -> bool:
    """Whether it maps "0", "1", … to texts that all differ."""
    if not found or not fits(found, {"*": text}):
        return False
    return {*found} == {str(number) for number in range(len(found))} and len({*found.values()}) == len(found)
