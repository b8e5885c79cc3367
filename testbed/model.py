"""What everybody agrees on: errors, the field's words as types, address plan, cells, trials.

Plain frozen data; no input or output, nothing of the project is imported here. The same plan of
addresses stands in `bpf/addresses.h`, and a test holds the two together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address
from math import ceil, nan
from typing import Any

Address = IPv4Address | IPv6Address


class Error(Exception):
    """A fault that a user can act on: what is wrong and where, then what to type.

    Raised by every layer, printed by the command line as one line (traceback with `--debug`).
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class Family(StrEnum):
    """IP version."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"


class Transport(StrEnum):
    """Layer 4 protocol."""

    TCP = "tcp"
    UDP = "udp"


class Runtime(StrEnum):
    """What runs a workload. Guests have a network stack of their own."""

    PROCESS = "process"
    CONTAINER = "container"
    WASM = "wasm"
    STANDIN = "standin"
    LINUX = "linux"
    OSV = "osv"

    @property
    def is_guest(self) -> bool:
        return self in (Runtime.STANDIN, Runtime.LINUX, Runtime.OSV)


class Pair(StrEnum):
    """Client role and server role of a cell. `guest-self` is a guest that dials itself.

    `native` is a plain process; containers and WASM components are native to the pod as well.
    """

    NATIVE_NATIVE = "native-native"
    NATIVE_GUEST = "native-guest"
    GUEST_NATIVE = "guest-native"
    GUEST_GUEST = "guest-guest"
    GUEST_SELF = "guest-self"
    WASM_GUEST = "wasm-guest"
    GUEST_WASM = "guest-wasm"
    WASM_CONTAINER = "wasm-container"

    @property
    def shape(self) -> Pair:
        """The same with all that is native called so: the datapath sees no difference."""
        return Pair(re.sub("wasm|container", "native", self.value))

    @property
    def guests(self) -> int:
        """Number of guests that the pair needs."""
        return {"native-native": 0, "guest-guest": 2}.get(self.shape.value, 1)

    def label(self, guest: str) -> str:
        """The pair as people read it, for one guest runtime: `process→osv`."""
        client, server = self.value.split("-")
        names = {"native": "process", "guest": guest, "self": "itself"}
        return f"{names.get(client, client)}→{names.get(server, server)}"


class Metric(StrEnum):
    """What a trial measures; the unit of its value is `unit`."""

    THROUGHPUT = "throughput"
    """TCP: of a stream. UDP: at the highest rate with hardly any loss (`testbed.search`)."""
    LATENCY = "latency"
    CONNECTIONS = "connections"
    STARTUP = "startup"
    """From nothing to the first request answered at `localhost`, for all guests of all pods."""
    MEMORY = "memory"
    """What a pod takes then."""

    @property
    def unit(self) -> str:
        return {"throughput": "bps", "latency": "us", "connections": "per_s", "startup": "ms",
                "memory": "bytes"}[self.value]  # fmt: skip

    @property
    def higher_is_better(self) -> bool:
        return self in (Metric.THROUGHPUT, Metric.CONNECTIONS)

    @property
    def of_building(self) -> bool:
        """Whether it is pods being built that is measured, and not those that stand."""
        return self in (Metric.STARTUP, Metric.MEMORY)


# --- address plan ---------------------------------------------------------------------------
#
# One plan for every pod: pods never share a link, so the same addresses may stand in each.
# Guests are numbered from 1; everything about guest n is arithmetic in n.

MAX_GUESTS = 250

LINK_PREFIX = {Family.IPV4: 20, Family.IPV6: 64}
"""Prefix length of the guest link, 169.254.64.0/20 and fd77::/64. It holds alias, native source,
links and guest views, so that a guest needs no route; it does not hold 169.254.169.254."""

_ALIAS = {Family.IPV4: "169.254.77.1", Family.IPV6: "fd77::1"}
_NATIVE_SOURCE = {Family.IPV4: "169.254.77.2", Family.IPV6: "fd77::2"}
_NATIVE_SOURCE_ODD = {Family.IPV4: "169.254.77.4", Family.IPV6: "fd77::4"}
_POD_LINK = {Family.IPV4: "169.254.77.3", Family.IPV6: "fd77::3"}
_GUEST_LINK = {Family.IPV4: "169.254.78.0", Family.IPV6: "fd77::78:0"}
_GUEST_VIEW = {Family.IPV4: "169.254.79.0", Family.IPV6: "fd77::79:0"}
_NATIVE_VIEW = {Family.IPV4: "127.77.0.0", Family.IPV6: "fd77:0:0:127::"}
_LOOPBACK = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}

NATIVE_VIEW_NET6 = "fd77:0:0:127::/64"
"""Routed to `lo` in the pod's namespace (127.77.0.0 is there by nature)."""


def loopback(family: Family) -> Address:
    """127.0.0.1 or ::1."""
    return ip_address(_LOOPBACK[family])


def alias(family: Family) -> Address:
    """What `localhost` resolves to in a guest."""
    return ip_address(_ALIAS[family])


def native_source(family: Family) -> Address:
    """Source address of native clients as a guest sees them; never the alias."""
    return ip_address(_NATIVE_SOURCE[family])


def native_source_odd(family: Family) -> Address:
    """The same, of flows that are not from 127.0.0.1 to 127.0.0.1 (::1), but on `lo` all the same.

    Which, is kept per flow for the way back; the ordinary flow needs no memory.
    """
    return ip_address(_NATIVE_SOURCE_ODD[family])


def pod_link(family: Family) -> Address:
    """The pod's own address on the guest link (control connections, `direct`, `bridge`)."""
    return ip_address(_POD_LINK[family])


def guest_link(family: Family, n: int) -> Address:
    """Guest n's own address on the guest link."""
    return ip_address(_GUEST_LINK[family]) + n


def guest_view(family: Family, n: int) -> Address:
    """Guest n as guests (itself too) see it when it dials `localhost`."""
    return ip_address(_GUEST_VIEW[family]) + n


def native_view(family: Family, n: int) -> Address:
    """Guest n as native servers see it when it dials `localhost`."""
    return ip_address(_NATIVE_VIEW[family]) + n


MAX_PODS = 65000
"""With addresses of one node."""

_NODE = {Family.IPV4: "10.77.0.1", Family.IPV6: "fd77:1::1"}


def node_address(family: Family) -> Address:
    """The node's own on its network, 10.77.0.0/16 and fd77:1::/112. It routes for its pods."""
    return ip_address(_NODE[family])


def pod_address(family: Family, n: int) -> Address:
    """What the n-th pod of the node (from 1) has there: the pod's IP."""
    return node_address(family) + n


_BETWEEN_HOSTS = {Family.IPV4: "10.78.0.0", Family.IPV6: "fd77:2::"}


def address_between_hosts(family: Family, n: int) -> Address:
    """Of a pod that another host's pod dials: of the k-th two of hosts, client's and server's are
    number 2k and 2k + 1.
    """
    return ip_address(_BETWEEN_HOSTS[family]) + n


ALIAS_MAC = "02:77:00:00:00:01"
"""Answered for alias, native source and guest views; source MAC of translated frames."""
POD_MAC = "02:77:00:00:00:03"
"""The pod's own interface on the guest link."""


def guest_mac(n: int) -> str:
    """MAC of guest n's interface."""
    return f"02:77:00:00:01:{n:02x}"


CONTROL_PORT = 4700
"""TCP port on which a traffic agent takes its orders, at the workload's own address."""


UDP_LOSS = 0.001
"""Share of datagrams that may be lost at the rate that is called UDP's throughput."""


# --- cells and trials -----------------------------------------------------------------------


AGAIN, SLOW = "again", "slow"
"""Variants of a datapath, for controls: the same in another pod, and with servers that are slow."""
SLOW_US = 50.0
"""What a slow server waits before each response: the known effect of the positive control."""


@dataclass(frozen=True, order=True)
class Cell:
    """One point of an experiment."""

    datapath: str
    """A datapath's name, or with a variant: `capture~again`."""
    pair: Pair
    family: Family
    transport: Transport
    metric: Metric
    size_bytes: int
    """Message size: bytes per write (throughput), per request and response (latency)."""
    streams: int = 1
    rate_per_s: int = 0
    """Of latency: requests per second of all streams together, each timed from when it was due; 0:
    each request when the last is answered."""
    guest: str = ""
    """Runtime of the guests; empty: the campaign's."""
    guests: int = 1
    """Guests per pod, all of them at work at once: rates are their sum, times are of all."""
    pods: int = 1
    """Pods likewise."""

    @property
    def params(self) -> str:
        """Size, streams and rate, then what is not as usual: `64x1`, `64x4@5000,guests=16`."""
        rate = f"@{self.rate_per_s}" if self.rate_per_s else ""
        more = {"guest": self.guest, "guests": self.guests, "pods": self.pods}
        rest = (f",{name}={value}" for name, value in more.items() if value not in ("", 1))
        return f"{self.size_bytes}x{self.streams}{rate}{''.join(rest)}"

    def label(self, guest: str) -> str:
        """The pair as people read it, with the campaign's guest where it is not the cell's own."""
        return self.pair.label(self.guest or guest)

    @property
    def id(self) -> str:
        """Stable name, e.g. `capture/native-guest/ipv4/tcp/latency/64x1`."""
        path = f"{self.datapath}/{self.pair}/{self.family}/{self.transport}"
        return f"{path}/{self.metric}/{self.params}"

    @property
    def variant(self) -> str:
        """`again`, `slow`, or empty."""
        return self.datapath.partition("~")[2]

    @classmethod
    def parse(cls, id: str) -> Cell:
        """The cell of an `id`. Raises `Error` if it is none."""
        try:
            datapath, pair, family, transport, metric, params = id.split("/")
            traffic, *rest = params.split(",")
            size, streams = traffic.split("x")
            streams, _, rate = streams.partition("@")
            more = dict(part.split("=") for part in rest)
            cell = cls(datapath, Pair(pair), Family(family), Transport(transport), Metric(metric),
                       int(size), int(streams), int(rate or 0), more.pop("guest", ""),
                       int(more.pop("guests", 1)), int(more.pop("pods", 1)))  # fmt: skip
            if more:
                raise ValueError(f"no parameter {min(more)}")
            return cell
        except ValueError as e:
            raise Error(f"not a cell: {id!r} ({e})") from e


class Status(StrEnum):
    """How a trial ended."""

    OK = "ok"
    FAILED = "failed"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class Trial:
    """One measured run of a cell in a block: a line of `trials.jsonl`.

    `value` is in `metric.unit`: bits per second of goodput at the receiver, microseconds of median
    round-trip time, connections per second, milliseconds until the first answer, bytes per pod.
    """

    cell: str
    block: int
    order: int
    """Position in the block's random order."""
    status: Status
    reason: str | None = None
    """Why it failed or is unsupported."""
    value: float | None = None
    duration_s: float | None = None
    payload_bytes: int = 0
    transactions: int = 0
    errors: int = 0
    histogram_us: tuple[tuple[float, int], ...] = ()
    """Round-trip times (or connect/request/close times): (upper bound of bucket in µs, count)."""
    searched: tuple[tuple[float, float, float], ...] = ()
    """Of a search for a rate all attempts: bits per second sent and arrived, share of datagrams
    lost. The last is the trial."""
    parts: dict[str, float] = field(default_factory=dict)
    """What the value is the sum of: of a start the steps, of memory whose it is."""
    dialed: str | None = None
    """The name or address that the client was told to dial."""
    carried: dict[str, int] = field(default_factory=dict)
    """What the datapath under test counted during the trial: packets, bytes."""
    counters: dict[str, int] = field(default_factory=dict)
    """Packets per reason of the datapath's programs during the trial (only those that moved)."""
    machine: dict[str, float] = field(default_factory=dict)
    """Of the host during the trial: cpu_s and what it is made of, steal_s (`machine.busy`), load1,
    elapsed_s, of it active_s with traffic, frequency_mhz where it is known."""
    disturbed: str | None = None
    """What came in between, if anything did: the trial was run once more, and both are kept."""
    started: str = ""
    """UTC, ISO 8601."""
    host: str = ""
    """The host's name in the inventory; empty: the machine that the campaign was started on."""

    def as_json(self) -> dict[str, Any]:
        """Plain data for one line of `trials.jsonl`, defaults left out."""
        default = Trial(cell="", block=-1, order=-1, status=Status.OK)
        always = ("cell", "block", "order", "status")
        return {k: v for k, v in vars(self).items() if k in always or v != getattr(default, k)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trial:
        """The inverse of `as_json`."""
        data = dict(data, status=Status(data["status"]))
        data["histogram_us"] = tuple((float(u), int(c)) for u, c in data.get("histogram_us", ()))
        data["searched"] = tuple((s, a, lost) for s, a, lost in data.get("searched", ()))
        return cls(**data)


def percentile(histogram: Sequence[tuple[float, int]], percent: float) -> float:
    """Value at a percentile, from (upper bound of bucket, count): nearest rank.

    The upper bound of the bucket that holds the ⌈percent · n / 100⌉-th smallest sample, so it is
    never below the sample itself and above it by no more than the bucket is wide (as HdrHistogram
    does). NaN for an empty histogram.
    """
    samples = sum(count for _, count in histogram)
    rank = max(1, ceil(percent * samples / 100))
    seen = 0
    for upper, count in sorted(histogram):
        seen += count
        if seen >= rank:
            return upper
    return nan
