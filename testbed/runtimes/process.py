"""A plain program in the pod's namespace, where `localhost` is loopback in both families."""

from __future__ import annotations

from testbed.images import compose
from testbed.model.terms import Runtime
from testbed.runtimes.interface import Options
from testbed.runtimes.program import PlainProgram


def prepare(options: Options) -> PlainProgram:
    """Compiles the agent. The pod has a hosts file of its own: this host's may lack a family."""
    return PlainProgram(Runtime.PROCESS, compose.hosts_file(patched=False))
