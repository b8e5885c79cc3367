"""Known limits of datapaths, guests and WASI: cases that cannot pass, with the reason.

If such a case fails, it counts as unsupported; if it passes, it counts as passed. Any other failure
is a fault. The limits of guests were also seen with `bridge`, where no program changes packets, or
within the guest.
"""

from __future__ import annotations

from dataclasses import dataclass

from testbed.conformance.check import EVERY, Case
from testbed.model.cells import Pair
from testbed.model.terms import Family, Runtime


@dataclass(frozen=True)
class Impossible:
    """Checks that cannot pass in some pairs and families, and the reason."""

    checks: frozenset[str]
    why: str
    pairs: frozenset[Pair] = EVERY - {Pair.NATIVE_NATIVE}
    families: tuple[Family, ...] = tuple(Family)

    def holds(self, case: Case) -> bool:
        """Whether the case is one of these."""
        return (
            case.check.name in self.checks
            and case.pair.shape in self.pairs
            and case.family in self.families
        )


_STRANGERS = Impossible(
    frozenset({"simultaneous-open"}),
    "addresses alone tell who dials and who answers: two who dial each other miss",
)
_SAME_NAME = Impossible(
    frozenset({"guests-on-the-same-port-have-names-of-their-own"}),
    "a native sees every guest as the loopback address, and of two on the same port one name",
)
_LARGE = frozenset({"datagram-1472", "datagram-3000", "datagram-64k"})

DATAPATHS: dict[str, tuple[Impossible, ...]] = {
    "capture": (
        _STRANGERS,
        _SAME_NAME,
        Impossible(
            frozenset({"ipv6-client-of-ipv4-guest"}),
            "addresses are translated within a family",
        ),
    ),
    "steer": (_STRANGERS, _SAME_NAME),
}

GUESTS: dict[str, tuple[Impossible, ...]] = {
    "gvisor": (
        Impossible(
            frozenset({"concurrent-connections"}),
            "gVisor lets about 1,000 connections wait to be accepted, and more time out",
            pairs=frozenset({Pair.NATIVE_GUEST, Pair.GUEST_GUEST, Pair.GUEST_SELF}),
        ),
        Impossible(
            frozenset({"urgent-data"}),
            "gVisor reports no urgent data, even over its own loopback",
        ),
        Impossible(
            frozenset({"linger"}),
            "gVisor's close with SO_LINGER waits its full time, even over its own loopback",
            pairs=frozenset({Pair.GUEST_NATIVE, Pair.GUEST_GUEST, Pair.GUEST_SELF}),
        ),
    ),
    "osv": (
        Impossible(
            frozenset({"keepalive"}),
            "OSv answers no keep-alive probe, and takes no answer to its own",
        ),
        Impossible(
            _LARGE,
            "OSv's IPv6 never receives a datagram in fragments",
            families=(Family.IPV6,),
        ),
        Impossible(
            frozenset({"reuseport", "datagram-reuseport"}),
            "OSv counts sockets that bind with SO_REUSEPORT from memory that it has not set, and "
            "may stop by an assertion",
        ),
        Impossible(
            frozenset({"outside-reaches-the-wildcard-alone"}),
            "OSv takes an IPv6 gateway for ::, and has no route to what is outside the pod",
            families=(Family.IPV6,),
        ),
        Impossible(
            frozenset({"gso-sizes"}),
            "OSv sends the beginning of a burst again and again, each time after a time-out",
        ),
    ),
}

WASI: tuple[Impossible, ...] = (
    Impossible(
        frozenset({"reset", "reset-wakes-reader", "close-with-unread-data"}),
        "WASI's streams say that they failed, not why",
        pairs=EVERY,
    ),
    Impossible(
        frozenset({"reset-is-polled"}),
        "WASI's poll says that a stream is ready, not what for",
        pairs=EVERY,
    ),
    Impossible(
        frozenset(
            {
                "datagram-refused",
                "datagram-refused-after-close",
                "datagram-refusals-to-their-own",
                "datagram-listen-other-loopback",
                "datagram-listen-ipv4-only",
            }
        ),
        "WASI tells of a refused datagram when the next is sent, not to who waits for an answer",
        pairs=EVERY,
    ),
)


def why(datapath: str, guest: str, case: Case) -> str | None:
    """Why this case cannot pass, or None."""
    wasi = WASI if Runtime.WASM in case.pair else ()
    for entry in (*DATAPATHS.get(datapath, ()), *GUESTS.get(guest, ()), *wasi):
        if entry.holds(case):
            return entry.why
    return None
