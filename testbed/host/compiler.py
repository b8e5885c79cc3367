"""Compiles the testbed's C programs for guests and hosts, once per content.

What is compiled is told by its users, `agent` and `shim`; eBPF is compiled by `bpf`.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from testbed.host.cache import cache_folder
from testbed.model.errors import Error


def build(title: str, name: str, sources: Path, flags: Sequence[str]) -> Path:
    """Compile all C files of a folder into one file; its path.

    Kept as `<folder>/<hash>/<name>` in the cache, by the hash of sources and flags. `title` says in
    errors what it is. Raises `Error` if there is no compiler or it fails.
    """
    files = sorted(sources.glob("*.[ch]"))
    if not files:
        raise Error(
            f"no sources of {title} in {sources}", hint="run from a clone of the repository"
        )
    digest = hashlib.sha256(" ".join(flags).encode())
    for file in files:
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    folder = cache_folder() / sources.name / digest.hexdigest()[:16]
    built = folder / name
    if built.exists():
        return built
    cc = shutil.which("cc")
    if cc is None:
        raise Error(f"no C compiler to build {title}", hint="apt install gcc libc6-dev")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / name
        command = [cc, *flags, "-o", str(output), *(str(f) for f in files if f.suffix == ".c")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            first = next((x for x in done.stderr.splitlines() if "error" in x), "no message")
            raise Error(f"{title} does not compile: {first}", hint=shlex.join(command))
        output.replace(built)
    return built
