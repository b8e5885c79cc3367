"""Makes a bundle: the conformance suite with a static traffic agent in one compressed tar.

On a Linux machine with Python a bundle checks pods that are there already, as root and with
nothing installed: no compiler, no other packages, no clone. It has the package `testbed`, the
libraries that the suite needs, which are pure Python, and the agent for this machine's kind of CPU,
for guests and natives alike.
"""

from __future__ import annotations

import io
import platform
import tarfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from testbed import agent, paths
from testbed.model.errors import Error

LIBRARIES = ("pyelftools", "pyroute2", "rich")
"""Distributions whose modules a run against a pod that is there already imports."""

LAUNCHER = """\
#!/bin/sh
# Checks localhost in a pod that is there already: README has how.
here=$(dirname "$(readlink -f "$0")")
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "conformance: needs Python 3.11 or later as python3" >&2; exit 3; }
exec python3 -P -c '
import sys
here = sys.argv.pop(1)
sys.path[:0] = [here, here + "/lib"]
from testbed.cli import main
sys.exit(main(["conformance", *sys.argv[1:]]))' "$here" "$@"
"""

README = """\
Does your runtime's localhost behave like localhost?

1. Start agent/static in your guest, as its program. It needs a Linux system call interface of
   {machine}, a hosts file, and no library. For another kernel compile agent/*.c there.
   The guest owns ports 8064 to 8095, TCP and UDP; 8000 to 8063 are the natives'.
2. As root, say where the pod's network namespace is, and where its guest's agent takes orders:

     ./conformance --netns /run/netns/pod --control 169.254.78.1:4700

   ./conformance --list says what is checked, --tap FILE and --junit FILE write results for CI.
   Exit status: 0 no check failed, 1 some checks failed, 3 could not run.

This is revision {revision} of the testbed, for Python 3.11 or later.
"""


def write(file: Path) -> None:
    """Write the bundle, compressed by gzip, which every machine has.

    Raises `Error` if the agent cannot be compiled, or the file cannot be written.
    """
    revision = paths.revision()
    top = f"testbed-conformance-{revision}"
    written = {
        "conformance": LAUNCHER,
        "README": README.format(machine=platform.machine(), revision=revision),
    }
    program = agent.build(static=True)
    try:
        with tarfile.open(file, "w:gz") as archive:
            for name, content in written.items():
                entry = tarfile.TarInfo(f"{top}/{name}")
                entry.size, entry.mode = len(content), 0o755 if name == "conformance" else 0o644
                archive.addfile(entry, io.BytesIO(content.encode()))
            archive.add(program, f"{top}/{paths.BUNDLED_AGENT.relative_to(paths.ROOT)}")
            for path, name in _files():
                archive.add(path, f"{top}/{name}", recursive=False)
    except OSError as e:
        raise Error(f"{file}: {e.strerror}", hint="choose another file") from e


def _files() -> Iterator[tuple[Path, str]]:
    """Files of the clone and of libraries, each with its name in the bundle."""
    patterns = ("LICENSE", "agent/README.md", "agent/*.[ch]", "osv/hosts*", "testbed/**/*.py")
    for path in (path for pattern in patterns for path in sorted(paths.ROOT.glob(pattern))):
        yield path, str(path.relative_to(paths.ROOT))
    for library in LIBRARIES:
        for file in metadata.distribution(library).files or ():
            if ".." not in file.parts and file.suffix != ".pyc":  # programs, compiled modules
                yield Path(str(file.locate())), f"lib/{file}"
