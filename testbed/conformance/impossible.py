"""What datapaths cannot do by design, and why: a check that fails there counts as unsupported.

Whatever is not here is a fault. A case that passes all the same is a pass.
"""

from __future__ import annotations

from testbed.model import Pair

IMPOSSIBLE: dict[str, tuple[tuple[frozenset[str], Pair | None, str], ...]] = {
    "capture": (
        (
            frozenset({"simultaneous-open"}),
            None,
            "addresses alone tell who dials and who answers: two who dial each other miss",
        ),
        (
            frozenset({"datagram-1472", "datagram-3000", "datagram-64k", "path-mtu"}),
            Pair.NATIVE_GUEST,
            "a native's datagram leaves lo whole; too large for the link, it is dropped, counted",
        ),
    ),
}
"""By datapath: names of checks, a pair or all of them, the reason."""
