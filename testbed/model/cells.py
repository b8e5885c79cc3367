"""Cell: one point of an experiment, and the values that its fields can have. Frozen data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from testbed.model.errors import Error
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Transport


class Pair(StrEnum):
    """Client role and server role of a cell. In `guest-self` a guest dials itself.

    `native` means a plain process. Containers and WASM components run in the pod's namespace too.
    """

    NATIVE_NATIVE = "native-native"
    NATIVE_GUEST = "native-guest"
    GUEST_NATIVE = "guest-native"
    GUEST_GUEST = "guest-guest"
    GUEST_SELF = "guest-self"
    WASM_GUEST = "wasm-guest"
    GUEST_WASM = "guest-wasm"
    WASM_CONTAINER = "wasm-container"
    CONTAINER_GUEST = "container-guest"
    GUEST_CONTAINER = "guest-container"

    @property
    def shape(self) -> Pair:
        """The pair with `native` for `wasm` and `container`: datapaths treat them alike."""
        return Pair(re.sub("wasm|container", "native", self.value))

    @property
    def guests(self) -> int:
        """Number of guests that the pair needs."""
        return {"native-native": 0, "guest-guest": 2}.get(self.shape.value, 1)

    def label(self, guest: str) -> str:
        """The pair as tables and figures show it, for one guest runtime: `process→osv`."""
        client, server = self.value.split("-")
        names = {"native": "process", "guest": guest, "self": "itself"}
        return f"{names.get(client, client)}→{names.get(server, server)}"


UDP_LOSS = 0.001
"""Largest share of datagrams lost at the rate that counts as the throughput of UDP."""

AGAIN = "again"
"""Variant of a datapath for a control: the same datapath in another pod (A/A)."""
SLOW_US = {"slow": 50.0, "slow-2us": 2.0}
"""Variant of a datapath for a positive control → its known effect: the time in µs for which its
servers wait before each response. The second is of about the size of what is claimed."""


@dataclass(frozen=True, order=True)
class Cell:
    """One point of an experiment."""

    datapath: str
    """Name of the datapath, with a variant if it is a control: `capture~again`."""
    pair: Pair
    family: Family
    transport: Transport
    metric: Metric
    size_bytes: int
    """Message size: bytes per write (throughput), per request and response (latency)."""
    streams: int = 1
    rate_per_s: int = 0
    """Latency under load: requests per second of all streams together, each sent when it is due
    and timed from then (open loop). 0: closed loop, each is sent when the last one is answered."""
    guest: str = ""
    """Runtime of the guests. Empty: the campaign's runtime."""
    guests: int = 1
    """Guests per pod that run at the same time: rates are summed, times are of all guests."""
    pods: int = 1
    """Pods that run at the same time, with the same rule."""
    application: str = ""
    """Name of the programs whose requests are measured, in the place of traffic agents
    (`testbed.application`). Then `size_bytes`, `streams` and `rate_per_s` are what its client is
    told; a size of 0 is the application's own."""

    @property
    def params(self) -> str:
        """Size, streams and rate, then what differs from the default: `64x4@5000,guests=16`."""
        rate = f"@{self.rate_per_s}" if self.rate_per_s else ""
        more = {
            "guest": self.guest,
            "guests": self.guests,
            "pods": self.pods,
            "application": self.application,
        }
        rest = (f",{name}={value}" for name, value in more.items() if value not in ("", 1))
        return f"{self.size_bytes}x{self.streams}{rate}{''.join(rest)}"

    def label(self, guest: str) -> str:
        """The pair as tables show it. `guest` is the campaign's, for cells that name none."""
        return self.pair.label(self.guest or guest)

    @property
    def id(self) -> str:
        """Stable name, e.g. `capture/native-guest/ipv4/tcp/latency/64x1`."""
        path = f"{self.datapath}/{self.pair}/{self.family}/{self.transport}"
        return f"{path}/{self.metric}/{self.params}"

    @property
    def variant(self) -> str:
        """Variant of the datapath: `again`, `slow`, or empty."""
        return self.datapath.partition("~")[2]

    @classmethod
    def parse(cls, id: str) -> Cell:
        """The cell with this `id`. Raises `Error` if the text is not an id."""
        try:
            datapath, pair, family, transport, metric, params = id.split("/")
            traffic, *rest = params.split(",")
            size, streams = traffic.split("x")
            streams, _, rate = streams.partition("@")
            more = dict(part.split("=") for part in rest)
            cell = cls(
                datapath,
                Pair(pair),
                Family(family),
                Transport(transport),
                Metric(metric),
                int(size),
                int(streams),
                int(rate or 0),
                more.pop("guest", ""),
                int(more.pop("guests", 1)),
                int(more.pop("pods", 1)),
                more.pop("application", ""),
            )
            if more:
                raise ValueError(f"no parameter {min(more)}")
            return cell
        except ValueError as e:
            raise Error(f"not a cell: {id!r} ({e})") from e
