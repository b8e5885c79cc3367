"""Changed copies of the programs, loaded in their place: for tests that need other programs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from testbed import paths
from testbed.bpf import bytecode

COMPILE = """
import os, sys
from pathlib import Path
from testbed import paths
from testbed.bpf import bytecode
headers = bytecode.headers()
os.environ.update(headers.environment)
paths.BPF = Path(sys.argv[1])
bytecode._compile_here(sys.argv[2], Path(sys.argv[3]), list(headers.cflags))
"""


@contextmanager
def variant(datapath: str, change: Callable[[Path], None]) -> Iterator[None]:
    """While the context lasts, the programs of a datapath are loaded from a changed copy of `bpf/`.

    `change` gets the folder of the copy. It is compiled into a cache of its own. What is loaded
    stays loaded after the context.
    """
    with TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        folder = Path(root, "bpf")
        shutil.copytree(paths.BPF, folder)
        change(folder)
        patch.setattr(paths, "BPF", folder)
        patch.setenv("XDG_CACHE_HOME", root)
        file = bytecode._file(datapath)
        file.parent.mkdir(parents=True)
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, folder, datapath, file],
            cwd=paths.ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        yield
