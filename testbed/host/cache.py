"""The cache folder: files and folders that are made once and then reused."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
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


def hold(file: Path) -> int:
    """Keep a file from `remove_unused` as long as the returned descriptor is open.

    The lock (flock(2)) ends with this process, too.
    """
    held = os.open(file, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    return held


def remove_unused(folder: Path, kept_s: float) -> None:
    """Remove files of a folder that are older than `kept_s`, and that no process holds (`hold`)."""
    for path in folder.glob("[!.]*"):  # without the folders in which others are made
        # Another process removes files, too, or holds this one.
        with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            if os.fstat(file.fileno()).st_mtime < time.time() - kept_s:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
