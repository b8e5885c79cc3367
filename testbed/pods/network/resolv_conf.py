"""Writes a resolv.conf (resolv.conf(5))."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def text(servers: Iterable[str], searches: Collection[str], options: Collection[str]) -> str:
    """Text of the file; without lines for what there is none of."""
    lines = [f"nameserver {address}\n" for address in servers]
    lines += [
        f"{key} {' '.join(words)}\n"
        for key, words in (("search", searches), ("options", options))
        if words
    ]
    return "".join(lines)
