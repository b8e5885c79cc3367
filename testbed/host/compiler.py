"""Compiles C programs of the testbed with `cc`, once per content (not eBPF: `testbed.bpf`)."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from testbed.host.cache import cache_folder, made
from testbed.model.errors import Error


def build(title: str, name: str, sources: Path, flags: Sequence[str]) -> Path:
    """Compile all C files of a folder into one output file, and return its path.

    The output is `<folder>/<hash>/<name>` in the cache, with the hash of sources and flags. Errors
    call it `title`. Raises `Error` if there is no compiler or it fails.
    """
    files = sorted(sources.glob("*.[ch]"))
    if not files:
        raise Error(
            f"no sources of {title} in {sources}", hint="run from a clone of the repository"
        )
    digest = hashlib.sha256(" ".join(flags).encode())
    for file in files:
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    built = cache_folder() / sources.name / digest.hexdigest()[:16] / name

    def compile(output: Path) -> None:
        cc = shutil.which("cc")
        if cc is None:
            raise Error(f"no C compiler to build {title}", hint="apt install gcc libc6-dev")
        command = [cc, *flags, "-o", str(output), *(str(f) for f in files if f.suffix == ".c")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            first = next((x for x in done.stderr.splitlines() if "error" in x), "no message")
            raise Error(f"{title} does not compile: {first}", hint=shlex.join(command))

    return made(built, compile)
