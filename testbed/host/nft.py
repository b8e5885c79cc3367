"""Loads nftables rules (nft(8)) into a namespace. Callers write the rules."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterable

from testbed.host import namespaces
from testbed.model.errors import Error

MISSING = "no nft; apt-get install nftables"


@functools.cache
def unsupported() -> str | None:
    """Why nftables cannot be used on this machine, or None."""
    if shutil.which("nft") is None:
        return MISSING
    asked = subprocess.run(["nft", "list", "tables"], capture_output=True, check=False)
    return "the kernel has no nf_tables" if asked.returncode else None


def load(netns: str, text: str) -> None:
    """Load rules in nft's language as one transaction. Raises `Error` with nft's message."""
    done = subprocess.run(
        ["nsenter", f"--net={namespaces.NETNS / netns}", "nft", "-f", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        process_group=0,  # Ctrl-C is for this process, which ends it
    )
    if done.returncode:
        raise Error(
            f"nft rejects the rules of {netns}: {done.stderr.strip().splitlines()[0]}",
            hint="check that the kernel has nf_tables with NAT",
        )


def elements(name: str, kind: str, listed: Iterable[str]) -> str:
    """Definition of a set or map of a table; `name` begins with `set` or `map`.

    Without elements the list is left out, since nft rejects an empty one.
    """
    words = ", ".join(listed)
    return f"{name} {{ type {kind}; " + (f"elements = {{ {words} }}; }}\n" if words else "}\n")
