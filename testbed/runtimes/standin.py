"""A network namespace in the place of a guest: its own stack and hosts file, no hypervisor.

What is true of a guest's packets is true of its, at a speed that an emulated guest cannot show.
"""

from __future__ import annotations

from testbed import images
from testbed.model import Runtime
from testbed.runtimes import Options, Program


def prepare(options: Options) -> Program:
    """Compiles the agent, and patches the hosts file as for an image."""
    return Program(Runtime.STANDIN, images.hosts_file(patched=options.hosts_patch))
