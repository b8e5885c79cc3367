"""The cache folder: files and folders that are made once and then reused."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """`~/.cache/testbed`, or `$XDG_CACHE_HOME/testbed`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "testbed"


def made(path: Path, make: Callable[[Path], object], *, anew: bool = False) -> Path:
    """Return `path` after making the file or folder there, if it is missing.

    `make` gets a temporary path, which is renamed to `path` when it is complete. It may put scratch
    files beside it. `anew` makes it even if it exists.
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
            if not path.is_dir():  # else another process made it meanwhile
                raise
    return path
