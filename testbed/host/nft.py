"""Rules of nftables (nft(8)), for a namespace. What they are for is their callers' business."""

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
    """Why no rules can be had here, or None."""
    if shutil.which("nft") is None:
        return MISSING
    asked = subprocess.run(["nft", "list", "tables"], capture_output=True, check=False)
    return "the kernel has no nf_tables" if asked.returncode else None


def load(netns: str, text: str) -> None:
    """One transaction, in nft's language. Raises `Error` with what nft says."""
    done = subprocess.run(
        ["nsenter", f"--net={namespaces.NETNS / netns}", "nft", "-f", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Error(
            f"nft refuses the rules of {netns}: {done.stderr.strip().splitlines()[0]}",
            hint="see whether the kernel has nf_tables with NAT",
        )


def elements(what: str, kind: str, listed: Iterable[str]) -> str:
    """A named set or map (`what`) of a table. (nft knows none that is written as empty.)"""
    words = ", ".join(listed)
    return f"{what} {{ type {kind}; " + (f"elements = {{ {words} }}; }}\n" if words else "}\n")
