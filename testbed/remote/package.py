"""Package: the files of this clone that are copied to other hosts, named by their hash."""

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
    """SHA-256 of names, modes and contents of the files."""
    environment: str
    """SHA-256 of the files that `bootstrap` reads. If it is the same, the Python environment on the
    host is used again."""

    def archive(self) -> bytes:
        """All files as a compressed tar."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, path in self.files.items():
                tar.add(path, name, recursive=False)
        return buffer.getvalue()


@cache
def package() -> Package:
    """The files of this clone that git tracks or would add, without paper, tests and results."""
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
    files = {name: path for name, path in listed.items() if path.is_file()}  # no deleted files
    reads = [files[name] for name in ("bootstrap", "packages.txt", "pyproject.toml")]
    return Package(files, _digest(files), _digest({path.name: path for path in reads}))


def _digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in files.items():
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{name}\0{path.stat().st_mode & 0o111:o}\0{content}\n".encode())
    return digest.hexdigest()
