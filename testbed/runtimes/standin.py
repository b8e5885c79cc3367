"""Runtime `standin`: a network namespace in place of a guest, without a hypervisor.

It has a network stack and a hosts file of its own, so its packets are like a guest's, at a speed
that an emulated guest does not reach. Its program is one of this host, or that of a guest's image
definition, so it can take the place of any guest.
"""

from __future__ import annotations

from testbed.images import compose
from testbed.model.terms import Runtime
from testbed.runtimes.interface import Options
from testbed.runtimes.program import PlainProgram


def prepare(options: Options) -> PlainProgram:
    """Compile the agent, and choose the hosts file as for an image."""
    return PlainProgram(Runtime.STANDIN, compose.hosts_file(patched=options.hosts_patch))
