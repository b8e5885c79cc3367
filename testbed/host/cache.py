"""The cache folder: what is made once and found again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """`~/.cache/testbed`, or `$XDG_CACHE_HOME/testbed`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "testbed"


def made(path: Path, make: Callable[[Path], object], *, anew: bool = False) -> Path:
    """The file or folder at `path`, made if it is not there, all or nothing.

    `make` gets another path to make it at, whose folder is for scratch files, too. `anew` makes it
    in any case.
    """
    if path.exists() and not anew:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as scratch:
        new = Path(scratch, path.name)
        make(new)
        if anew and path.is_dir():
            path.rename(Path(scratch, f"{path.name}.old"))
        try:
            new.replace(path)
        except OSError:
            if not path.is_dir():  # else somebody made it meanwhile
                raise
    return path
