"""Where things are: in a checkout next to this package or, where it was installed without one, inside it."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


IN_CHECKOUT = (PACKAGE.parent / "pyproject.toml").is_file()


# what is read: the repository, or the copy of its notebooks and references that a wheel carries
ROOT = PACKAGE.parent if IN_CHECKOUT else PACKAGE / "repository"


NOTEBOOKS = ROOT / "notebooks"


PROFILES = NOTEBOOKS / "profiles"


REFERENCE = ROOT / "reports" / "reference"


PUBLISHED = ROOT / "reports" / "published.yaml"


# what is written: where $LLMPROD_HOME says, else in the checkout, else in the folder where the user is
HOME = Path(os.environ.get("LLMPROD_HOME") or (ROOT if IN_CHECKOUT else Path.cwd())).resolve()


REPORTS = HOME / "reports"


RUNS = HOME / "runs"


def run_folder() -> Path:
    """The folder of the run that this process belongs to: `$LLMPROD_RUN` where the runner set it, else `runs/lab`."""
    return Path(os.environ.get("LLMPROD_RUN") or RUNS / "lab").resolve()
