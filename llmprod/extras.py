"""Optional dependencies: one clear error where a library that an extra brings is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from llmprod import LLMProdError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports inside `with extra("news"):` need that extra. Raises LLMProdError, with what to type, without it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise LLMProdError(
            f"The package '{error.name}' is missing. It comes with the extra '{name}': "
            f'pip install "llmprod[{name}]" (in a checkout: make setup), then restart the kernel.'
        ) from error
