"""llmprod: the thin module under the notebooks that take a pretrained language model to a product."""

__version__ = "0.1.0"

DISK_ERRORS = {13, 20, 27, 28, 30, 122}  # errno: permission, not a folder, file too large, space, read-only, quota


class LLMProdError(Exception):
    """What went wrong, with the name of the thing and the way out, in one message.

    Raised for whatever a user can put right (a missing file, a wrong column, no network). Notebooks and the
    command line show its message alone; every other exception is a fault of the program and keeps its traceback.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython prints in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]
