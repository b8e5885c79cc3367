"""Compiles `bpf/` with an ordinary C compiler, without code: every warning is an error.

Each header has to compile on its own, so it includes what it uses, and twice, so it has a guard.
`bcc.h` beside this has what bcc predefines. Lint runs it: it needs no bcc, kernel headers or root.

    python -m tests.bpf.syntax
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from testbed import paths
from testbed.bpf import bytecode

WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
"""GCC does not know `#pragma unroll`."""
COMPILERS = ("gcc", "clang")


@contextmanager
def flags() -> Iterator[list[str]]:
    """What makes a C compiler accept the text of `bpf/`: the system's UAPI headers are in uapi/."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "uapi").symlink_to("/usr/include")
        yield [
            "-std=gnu11",
            "-isystem",
            folder,
            "-I",
            str(paths.BPF),
            "-include",
            str(Path(__file__).with_name("bcc.h")),
        ]


def texts() -> Iterator[tuple[str, str]]:
    """Name and text of what has to compile: sets, their traced variants, and headers."""
    sets = sorted(paths.BPF.glob("*.c"))
    for file in sets:
        yield file.name, f'#include "{file.name}"\n'
        if bytecode.reasons(file.stem):
            yield file.name, f'#define TRACED\n#include "{file.name}"\n'
    names = dict.fromkeys(name for file in sets for name in bytecode.reasons(file.stem))
    reasons = ", ".join((*(f"REASON_{name.upper()}" for name in names), "REASONS"))
    for file in sorted(paths.BPF.glob("*.h")):
        define = "#define TRACED\n" if file.name == "trace.h" else ""
        twice = f'#include "{file.name}"\n' * 2
        yield file.name, f"{define}enum reason {{ {reasons} }};\n{twice}"


def main() -> int:
    """Exit status 1 if a compiler has something to say; it is printed."""
    failed = False
    with flags() as given:
        for compiler in filter(shutil.which, COMPILERS):
            command = [compiler, "-fsyntax-only", *WARNINGS, *given, "-x", "c", "-"]
            for name, text in texts():
                if subprocess.run(command, input=text, text=True, check=False).returncode:
                    print(f"bpf/{name} does not compile with {compiler}", file=sys.stderr)
                    failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
