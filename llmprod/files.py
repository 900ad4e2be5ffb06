"""Files: atomic writes, JSON."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmprod import LLMProdError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path next to `path` to write a file or folder to; it replaces `path` when the block ends without an error.

    A reader sees the old content or the new one, never a part; remains of a killed run are overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.writing")
    remove(temporary)
    yield temporary
    if temporary.is_dir():  # a folder can't be renamed onto one that holds something
        remove(path)
    os.replace(temporary, path)


def remove(path: Path) -> None:
    """Deletes a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """Reads a JSON file. Raises LLMProdError if it is missing or damaged, or holds half of a surrogate pair."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # "\ud800" is JSON, but no text that can be written again
        return content
    except (ValueError, OSError, RecursionError) as error:  # the last where it is nested too deep
        raise LLMProdError(f"{path} can't be read ({error}). Delete it and run again.") from error
