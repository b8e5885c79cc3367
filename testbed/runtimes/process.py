"""Runtime `process`: a plain program of this host in the pod's namespace."""

from __future__ import annotations

from testbed.images import compose
from testbed.model.terms import Runtime
from testbed.runtimes.interface import Options
from testbed.runtimes.program import PlainProgram


def prepare(options: Options) -> PlainProgram:
    """Compile the agent. It gets the stock hosts file, since this host's may lack a family."""
    return PlainProgram(Runtime.PROCESS, compose.hosts_file(patched=False))
