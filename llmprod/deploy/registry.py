"""Which bundle is served: a folder of bundles by id, and a file that names the current one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from llmprod import files, shapes
from llmprod.deploy import bundle
from llmprod.deploy.bundle import Bundle, BundleError

STATE = "served.json"
SHAPE = {"current": shapes.text, "shadow": shapes.text, "history": [{"id": shapes.text, "why": shapes.text}]}


class Registry:
    """A folder of bundles. The service reads it; `promote` and `roll_back` change what it serves.

    `served.json` holds {"current": id, "shadow": id or "", "history": [{"id", "why"}]}, the newest last. It is replaced
    atomically under a lock, so that a reader never sees half of a change, and two writers come one after the other.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def state(self) -> dict:
        """What the folder serves. Raises BundleError where nothing was promoted yet, and for a damaged file."""
        path = self.folder / STATE
        if not os.path.isfile(path):  # Path's own fails for a name that is too long
            raise BundleError(f"{self.folder} serves no bundle yet: promote one first (05_deploy does).")
        return shapes.read(path, SHAPE, "delete it, and promote a bundle again (05_deploy does)", BundleError)

    def load(self, identity: str = "") -> Bundle:
        """Reads a bundle of the folder by its id; by default the current one.

        Raises BundleError for an unknown id, and for a folder that holds another bundle than its name says.
        """
        identity = identity or self.state()["current"]
        folder = self.folder / identity
        if not identity.isalnum() or not os.path.isdir(folder):  # Path's own fails for a name that is too long
            raise BundleError(f"{self.folder} has no bundle '{identity}'.")
        made = bundle.load(folder)
        if made.id != identity:
            raise BundleError(f"{folder} holds the bundle {made.id}: name the folder so, or add that bundle anew.")
        return made

    def add(self, made: Bundle) -> str:
        """Copies a bundle into the folder, under its id, and returns that. What is served does not change."""
        if not (self.folder / made.id).exists():
            with files.atomic(self.folder / made.id) as temporary:
                shutil.copytree(made.folder, temporary)
        return made.id

    def promote(self, identity: str, why: str) -> None:
        """Makes a bundle of the folder the current one. Raises BundleError if it answers its frozen texts otherwise."""
        self.load(identity).check()
        with self.changing() as state:
            state |= {"current": identity, "history": [*state["history"], {"id": identity, "why": why}]}
            state["shadow"] = "" if state["shadow"] == identity else state["shadow"]

    def roll_back(self, why: str) -> str:
        """Makes the bundle before the current one current again; returns its id. Raises BundleError without one."""
        state = self.state()
        earlier = [entry["id"] for entry in state["history"] if entry["id"] != state["current"]]
        if not earlier:
            raise BundleError(f"{self.folder} never served another bundle than {state['current']}.")
        self.promote(earlier[-1], why)
        return earlier[-1]

    def shadow(self, identity: str) -> None:
        """Lets a bundle answer with the current one, without being shown; "" ends that."""
        if identity:
            self.load(identity)
        with self.changing() as state:
            state["shadow"] = identity

    @contextmanager
    def changing(self) -> Iterator[dict]:
        """The state, to be changed within the block; it is written when the block ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "served.lock"):
            empty = {"current": "", "shadow": "", "history": []}
            state = self.state() if (self.folder / STATE).exists() else empty
            yield state
            files.write_json(self.folder / STATE, state)
