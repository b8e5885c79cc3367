"""What is carried to a host: this clone's files, named by their content."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from testbed import paths
from testbed.model.errors import Error


@dataclass(frozen=True)
class Package:
    """This project's files as they are now."""

    files: Mapping[str, Path]
    sha256: str
    """Of names, modes and contents."""
    environment: str
    """SHA-256 of what `bootstrap` reads: hosts with the same need no new Python environment."""

    def archive(self) -> bytes:
        """All files as a compressed tar."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, path in self.files.items():
                tar.add(path, name, recursive=False)
        return buffer.getvalue()


@cache
def package() -> Package:
    """The files of this clone that git has or would take, but for texts, tests and results."""
    command = [
        "git",
        "-C",
        str(paths.ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
        ".",
        ":!paper",
        ":!results",
        ":!tests",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Error(
            f"{paths.ROOT} cannot be carried to other hosts: it is no git clone", "git clone it"
        )
    listed = {
        name: paths.ROOT / name for name in sorted(set(filter(None, done.stdout.split("\0"))))
    }
    files = {name: path for name, path in listed.items() if path.is_file()}  # not deleted ones
    reads = [files[name] for name in ("bootstrap", "packages.txt", "pyproject.toml")]
    return Package(files, _digest(files), _digest({path.name: path for path in reads}))


def _digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in files.items():
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{name}\0{path.stat().st_mode & 0o111:o}\0{content}\n".encode())
    return digest.hexdigest()
