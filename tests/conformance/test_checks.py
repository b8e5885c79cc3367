"""Each check passes on the kernel's own loopback, and fails where localhost is broken."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from testbed import datapaths
from testbed.conformance import checks, known_limits, stage
from testbed.conformance.check import EVERY, IPV4, Result, Status
from testbed.conformance.checks import changes
from testbed.datapaths.bridge import Bridge
from testbed.datapaths.interface import Attachment, Wiring
from testbed.datapaths.loopback import Loopback
from testbed.host import namespaces, nft
from testbed.host.ledger import Scope
from testbed.model.cells import Pair
from testbed.model.terms import Runtime

from .conftest import Run

pytestmark = pytest.mark.timeout(900)  # a whole suite each, and components that are compiled once

SLOW = {
    "bulk-up",
    "bulk-down",
    "sequential-connections",
    "concurrent-connections",
    "full-backlog",
    "idle",
    "keepalive",
    "nginx-and-wrk",
    "iperf3",
    "postgresql-as-installed",
    "syn-flood",
    "restarts-under-load",
}
"""Seconds each; the suite itself is where they run."""
QUICK = [check.name for check in checks.matching() if check.name not in SLOW]

FOR_CAPTURE = (
    "connect",
    "refused",
    "refused-after-close",
    "data-before-accept",
    "listen-*",
    "client-*",
    "any-process",
    "guests-unlisted-port",
    "listener-bound-to-lo",
    "reuseport",
    "syn-cookies",
    "half-close*",
    "fin-at-once",
    "reset*",
    "linger",
    "urgent-data",
    "flow-control",
    "segment-size",
    "gso-sizes",
    "port-*",
    "same-port-*",
    "server-names",
    "server-restart",
    "every-address-answers",
    "datagram",
    "datagram-[a-o]*",
    "datagram-r*",
    "datagram-same-*",
    "forged-*",
    "outside-*",
    "alias-*",
    "pods-are-apart",
    "native-*",
    "server-killed",
    "link-replaced-*",
    "pod-rebuilt",
)


class Pretender(Bridge):
    """A datapath that says it makes localhost work, and does nothing."""

    name = "pretender"
    localhost = True
    pairs = EVERY


PORTS = f"{min(map(min, stage.PORTS.values()))}-{max(map(max, stage.PORTS.values()))}"
NO_FIN = "chain c { type filter hook output priority 0; tcp flags & fin == fin drop; }"
FAULTS = {
    "fin-at-once": (NO_FIN, "native2 sees no end"),
    "port-forward": (NO_FIN, "native2: receive: Connection timed out"),
    "threads-of-connections": (
        f"""
        chain c {{
            type filter hook output priority 0
            tcp dport {PORTS} tcp flags & (syn | ack) == syn limit rate over 50/second \
                reject with tcp reset
        }}""",
        "Connection refused",
    ),
    "datagram-answers-to-their-own": (
        f"""
        map first {{ type inet_service : inet_service; size 1000; flags dynamic; }}
        chain c {{
            type filter hook output priority 0
            udp dport {PORTS} add @first {{ udp dport : udp sport }}
            udp sport {PORTS} udp dport set udp sport map @first
        }}""",
        "client 0 was answered b'15'",
    ),
    "outside-reaches-the-wildcard-alone": (
        f"""
        chain c {{
            type nat hook prerouting priority dstnat
            tcp dport {PORTS} dnat ip to 127.0.0.1
        }}""",
        "a server at 127.0.0.1 was reached from",
    ),
}
"""Check → rules of nftables in the pod's namespace that make a fault, and what the check says."""


class Faulty(Loopback):
    """The kernel's own loopback, spoiled by rules."""

    def __init__(self, check: str, rules: str) -> None:
        self.name, self.rules = f"faulty-{check}", rules

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        namespaces.set_sysctls(wiring.netns, {"net/ipv4/conf/all/route_localnet": 1})
        nft.load(wiring.netns, f"table inet faulty {{\n{self.rules}\n}}")
        return super().attach(wiring, owner)


def failed(results: Iterable[Result]) -> list[str]:
    return [
        f"{r.check} {r.pair} {r.family} {r.transport}: {r.reason}"
        for r in results
        if r.status is Status.FAIL
    ]


def test_every_check_says_in_one_line_what_it_proves_and_what_it_stands_for() -> None:
    found = checks.matching()
    assert len(found) >= 60
    for check in found:
        assert check.proves.endswith("."), check.name
        assert len(check.proves) <= 100, check.name
        assert check.standard, check.name


def test_what_is_impossible_is_said_of_checks_and_datapaths_that_there_are() -> None:
    names = {check.name for check in checks.matching()}
    assert known_limits.DATAPATHS.keys() <= set(datapaths.names())
    assert known_limits.GUESTS.keys() <= set(Runtime)
    for entries in (*known_limits.DATAPATHS.values(), *known_limits.GUESTS.values()):
        for entry in entries:
            assert entry.checks <= names
            assert entry.why


@pytest.mark.root
def test_every_check_passes_on_the_kernels_own_loopback(run: Run) -> None:
    results = run("loopback", *QUICK)
    assert not failed(results)
    assert not {r.reason for r in results if "on this host" in r.reason}  # no program lacks


@pytest.mark.root
@pytest.mark.parametrize("name", ["concurrent-connections", "syn-flood"])
def test_slow_checks_pass_on_loopback_or_do_not_apply(run: Run, name: str) -> None:
    assert not failed(run("loopback", name))


@pytest.mark.root
@pytest.mark.parametrize("name", ["nginx-and-wrk", "postgresql-as-installed"])
def test_real_servers_serve_on_loopback(run: Run, name: str) -> None:
    results = run("loopback", name, families=IPV4)
    assert [r.status for r in results] == [Status.PASS], [r.reason for r in results]


@pytest.mark.root
def test_capture_passes_with_stand_ins(run: Run) -> None:
    results = run("capture", *FOR_CAPTURE)
    assert not failed(results)
    passed = {r.pair for r in results if r.status is Status.PASS}
    assert passed == EVERY


@pytest.mark.root
@pytest.mark.parametrize("datapath", ["capture", "steer"])
def test_clients_get_through_restarts_of_a_guest(
    run: Run, monkeypatch: pytest.MonkeyPatch, datapath: str
) -> None:
    """Three of them; the suite itself has a hundred."""
    monkeypatch.setattr(changes, "RESTARTS", 3)
    results = run(datapath, "restarts-under-load")
    assert [r.status for r in results] == [Status.PASS] * 2, failed(results)


@pytest.mark.root
def test_a_refusal_while_the_guest_serves_is_a_failure(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = changes.all_go_on

    def disturb(clients: list[changes.Client], what: str, by: int) -> None:
        if what == "made":
            clients[0].bed.own_pod.pod.attachment.guest_ended(1)
        go_on(clients, what, by)

    monkeypatch.setattr(changes, "all_go_on", disturb)
    (result,) = run("steer", "restarts-under-load", families=IPV4)
    assert result.status is Status.FAIL
    assert "refused" in result.reason


COMPONENTS = {Pair.WASM_GUEST, Pair.GUEST_WASM, Pair.WASM_CONTAINER}


@pytest.mark.root
def test_a_component_has_connections_and_datagrams_as_a_process_has(run: Run) -> None:
    results = run(
        "steer",
        "connect",
        "refused",
        "connect-without-*",
        "half-close",
        "flow-control",
        "accept-names",
        "datagram",
        "datagram-64k",
        "datagram-many-servers",
        native=Runtime.WASM,
    )
    assert {r.status for r in results} == {Status.PASS}, failed(results)
    assert {r.pair for r in results} == COMPONENTS


@pytest.mark.root
def test_what_wasi_has_no_call_for_is_unsupported_and_says_so(run: Run) -> None:
    results = run(
        "steer", "segment-size", "no-stalls", "urgent-data", native=Runtime.WASM, families=IPV4
    )
    assert {r.status for r in results} == {Status.UNSUPPORTED}
    assert {r.reason for r in results} == {
        "WASI has no TCP_MAXSEG",
        "WASI has no TCP_NODELAY",
        "WASI has no MSG_OOB",
        "WASI has no POLLPRI",
    }
    assert {r.pair for r in results} == COMPONENTS


@pytest.mark.root
def test_what_lay_idle_is_resumed_after_the_other_checks(run: Run) -> None:
    results = run("loopback", "idle", "connect")
    assert [r.check for r in results] == ["connect", "connect", "idle", "idle"]
    assert not failed(results)


@pytest.mark.root
def test_checks_fail_where_the_guest_dials_its_own_loopback(run: Run) -> None:
    results = run("capture", "server-names", "datagram", hosts_patch=False, families=IPV4)
    outcome = {(r.check, r.pair): r.status for r in results}
    assert outcome["server-names", Pair.GUEST_NATIVE] is Status.FAIL
    assert outcome["datagram", Pair.GUEST_NATIVE] is Status.FAIL
    assert outcome["datagram", Pair.NATIVE_GUEST] is Status.PASS


@pytest.mark.root
def test_checks_fail_on_a_datapath_that_only_pretends(run: Run) -> None:
    results = run(Pretender(), "connect", "native-cannot-*", families=IPV4)
    outcome = {(r.check, r.pair): r.status for r in results}
    for pair in (Pair.NATIVE_GUEST, Pair.GUEST_NATIVE, Pair.GUEST_GUEST, Pair.GUEST_SELF):
        assert outcome["connect", pair] is Status.FAIL
    assert outcome["native-cannot-take-a-guests-port", Pair.NATIVE_GUEST] is Status.FAIL
    assert outcome["connect", Pair.NATIVE_NATIVE] is Status.PASS


@pytest.mark.root
@pytest.mark.parametrize("check", FAULTS)
def test_a_check_finds_its_fault(run: Run, check: str) -> None:
    rules, says = FAULTS[check]
    (result,) = run(Faulty(check, rules), check, families=IPV4)
    assert result.status is Status.FAIL
    assert says in result.reason


@pytest.mark.root
@pytest.mark.parametrize(
    "check",
    [
        "listen-chosen-port",
        "guests-unlisted-port",
        "listen-mapped",
        "listen-ipv4-only",
        "listen-other-loopback",
        "datagram-chosen-port",
        "datagram-listen-ipv4-only",
        "datagram-listen-other-loopback",
    ],
)
def test_a_proxy_answers_whatever_the_server_is_bound_to(run: Run, check: str) -> None:
    assert failed(run("proxy", check, families=IPV4))
