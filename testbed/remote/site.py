"""Site: a host with the testbed installed, on which its commands can be run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from shlex import quote

from testbed.campaigns.protocol import Job
from testbed.images import kernels
from testbed.model.errors import Error
from testbed.remote.package import package
from testbed.remote.ssh import Link

Say = Callable[[str], None]


class Site:
    """A host that is connected and has this project's files and a Python environment."""

    def __init__(self, link: Link, say: Say) -> None:
        self.link, self.host = link, link.host
        self._at = self.host.directory
        self._bring_package(say)

    def _bring_package(self, say: Say) -> None:
        bundle, link = package(), self.link
        self._package = f"{self._at}/packages/{bundle.sha256}"
        self._environment = f"{self._at}/environments/{bundle.environment}"
        if not link.test(f"test -d {quote(self._package)}"):
            say("copying the testbed to it")
            link.run(_filling(self._package, "tar -xzf - -C"), bundle.archive())
        if not link.test(f"test -d {quote(self._environment)}"):
            link.run(_filling(self._environment, f"cp -a {quote(self._package)}/. "))
        if not link.test(f"test -e {quote(self._environment)}/.venv/installed"):
            say("making its Python environment (minutes, once)")
        link.run(f"{quote(self._environment)}/bootstrap >&2")

    def testbed(self, *arguments: str) -> str:
        """A shell line that runs a command of the testbed on the host."""
        return self.python("testbed.cli", *arguments)

    def python(self, module: str, *arguments: str) -> str:
        """A shell line that runs a Python module of the testbed on the host."""
        at, pin = quote(self._package), ""
        if self.host.cpus:
            pin = f"taskset --cpu-list {','.join(map(str, self.host.cpus))} "
        return (
            f"cd {at} && export PYTHONPATH={at} PYTHONDONTWRITEBYTECODE=1 && "
            f"exec {pin}{quote(self._environment)}/bootstrap "
            f"{shlex.join(['python', '-P', '-m', module, *arguments])}"
        )

    def findings(self, *options: str) -> list[dict[str, str]]:
        """Run the host's doctor with options: the fields of each `doctor.Finding`."""
        output = self.link.run(f"({self.testbed('doctor', '--json', *options)}) || test $? = 1")
        try:
            found: list[dict[str, str]] = json.loads(output)
        except ValueError as e:
            raise Error(f"{self.host.name}: its doctor does not answer ({e})") from e
        return found

    def clean(self) -> None:
        """Remove what killed runs have left behind on the host."""
        self.link.run(self.testbed("clean"))

    def kernel(self, job: Job) -> str | None:
        """Path on the host of the OSv kernel that is found here, copied if it is not there yet.

        None: no OSv kernel is wanted, or none is found here.
        """
        if job.guest not in ("osv", "best"):
            return None
        explicit = Path(job.osv_kernel) if job.osv_kernel else None
        found = kernels.find_osv(explicit, download=False)
        if found is None:
            return None  # the host may have one itself, or may download one
        there = f"{self._at}/kernels/{found.sha256}.elf"
        if not self.link.test(f"test -e {quote(there)}"):
            new = f"{quote(there)}.$$"
            self.link.run(
                f"mkdir -p {quote(self._at)}/kernels && cat > {new} && "
                f"mv {new} {quote(there)} || {{ rm -f {new}; false; }}",
                found.path.read_bytes(),
            )
        return there


def _filling(folder: str, command: str) -> str:
    """A shell script that fills a folder by `command` and then gives it its name, atomically."""
    above = quote(str(PurePosixPath(folder).parent))
    return f"""set -e; umask 077; mkdir -p {above}; new=$(mktemp -d {quote(folder)}.XXXXXX)
trap 'rm -rf "$new"' EXIT
why=$({command} "$new" 2>&1) || {{
  free=$(df -h --output=avail "$new" | tail -n 1)
  echo "$(echo "$why" | grep -m 1 :) (free:$free)" >&2
  exit 1
}}
mv -T "$new" {quote(folder)} 2>/dev/null || test -d {quote(folder)}"""
