"""Checks of names: what localhost is, who is who in a connection, who may have which port."""

from __future__ import annotations

import errno
import time

from testbed.conformance.bed import Bed
from testbed.conformance.check import (
    BOTH,
    EVERY,
    FROM_GUEST,
    NATIVE_CLIENT,
    NATIVE_SERVER,
    Unsupported,
    check,
    expect,
    fails_with,
)
from testbed.conformance.steps import exchange, two_clients_on_one_port
from testbed.model.cells import Pair
from testbed.model.terms import Family, Transport


@check("RFC 6761, 6.3: localhost")
def resolves(bed: Bed) -> None:
    """The client's resolver gives one address of the family asked for, loopback to a native."""
    found = bed.client.resolve("localhost", bed.family)
    expect(len(set(found)) == 1, f"localhost is {found}")
    expect(found[0].version == int(bed.family[-1]), f"localhost is {found[0]} in {bed.family}")
    if not bed.client.is_guest:
        expect(found[0] == bed.loopback, f"localhost is {found[0]}")


@check("RFC 6724; getaddrinfo(3): a program tries the addresses in their order")
def every_address_answers(bed: Bed) -> None:
    """Each address of localhost connects, or refuses at once: trying them in order ends well."""
    listener = bed.serve()
    reached = 0
    for address in dict.fromkeys(bed.client.resolve("localhost")):
        near = bed.client.socket(Transport.TCP, Family(f"ipv{address.version}"))
        began = time.monotonic()
        try:
            near.connect(address, bed.port)
            exchange(near, listener.accept()[0])
            reached += 1
        except ConnectionRefusedError:
            pass
        took_s = time.monotonic() - began
        expect(took_s < 1, f"{address} took {took_s:.1f} s")
    if not reached and len(set(bed.client.resolve("localhost"))) == 1:
        raise Unsupported("the resolver over there knows localhost in the other family alone")
    expect(reached > 0, "no address of localhost reaches the server")


@check("getpeername(2), getsockname(2)")
def client_names(bed: Bed) -> None:
    """The client's peer is what it dialed; a native's own address is loopback."""
    near, _ = bed.connected()
    expect(near.peer_name[0] == bed.target, f"the peer is {near.peer_name[0]}, not {bed.target}")
    if not bed.client.is_guest:
        expect(near.own_name[0] == bed.loopback, f"its own address is {near.own_name[0]}")


@check(
    "getpeername(2), getsockname(2); protected modes and pg_hba trust these", pairs=NATIVE_SERVER
)
def server_names(bed: Bed) -> None:
    """To a native server both ends of a connection are exactly 127.0.0.1 or ::1."""
    listener = bed.serve()
    near = bed.dial()
    far, name = listener.accept()
    expect(far.peer_name == (bed.loopback, near.own_name[1]), f"getpeername: {far.peer_name}")
    expect(name == far.peer_name, f"accept: {name}")
    expect(far.own_name == (bed.loopback, bed.port), f"getsockname: {far.own_name}")


@check("accept(2) and getpeername(2) agree; WSL #41137: another port than was dialed")
def accept_names(bed: Bed) -> None:
    """accept and getpeername give one name, getsockname the port that was dialed."""
    listener = bed.serve()
    bed.dial()
    far, name = listener.accept()
    expect(name == far.peer_name, f"accept: {name}, getpeername: {far.peer_name}")
    expect(far.own_name[1] == bed.port, f"getsockname: {far.own_name}")


@check("RFC 9293, 3.4.1: a connection is its four names", pairs=FROM_GUEST)
def guests_on_the_same_port_have_names_of_their_own(bed: Bed) -> None:
    """To a native server, two guests that dial from the same port have different names."""
    names = {far.peer_name for _, far in two_clients_on_one_port(bed)}
    expect(len(names) == 2, f"both are {names}")


@check(
    "bind(2): ports are the pod's, not a workload's",
    transports=BOTH,
    pairs=frozenset({Pair.NATIVE_GUEST}),
)
def native_cannot_take_a_guests_port(bed: Bed) -> None:
    """A native that binds a guest's port gets EADDRINUSE, whatever the address."""
    for address in (bed.loopback, bed.family.wildcard):
        sock = bed.open(bed.client)
        with fails_with(errno.EADDRINUSE):
            sock.bind(address, bed.port)


@check("ip(7): ip_local_port_range", transports=BOTH, pairs=NATIVE_CLIENT)
def ephemeral_ports_serve_nobody(bed: Bed) -> None:
    """Ports that the kernel chooses are none that a workload owns."""
    from testbed.conformance.stage import PORTS

    taken = {port for ports in PORTS.values() for port in ports}
    chosen = set()
    for _ in range(200):
        sock = bed.open(bed.client)
        sock.bind(bed.loopback)
        chosen.add(sock.own_name[1])
    expect(not chosen & taken, f"the kernel gave {sorted(chosen & taken)}")


@check(
    "the kernel's own loopback is left alone",
    pairs=frozenset({Pair.NATIVE_NATIVE}),
    transports=BOTH,
)
def native_traffic_untouched(bed: Bed) -> None:
    """Between natives no packet leaves lo, and no program counts one."""
    pod = bed.own_pod.pod

    def counted_bytes() -> int:
        carried = [pod.attachment.carried(None, n) for n in pod.manifest.guests]
        return sum(count.bytes for count in (*carried, *pod.attachment.counters().values()))

    size = 50_000
    before = counted_bytes()
    server = bed.serve()
    near = bed.dial()
    if bed.transport is Transport.TCP:
        exchange(near, server.accept()[0], size)
    else:
        near.send(size)
        expect(server.receive().bytes == size, "the datagram did not arrive")
    counted = counted_bytes() - before  # other connections may be closing still
    expect(counted < size // 2, f"of {size} bytes programs counted {counted}")


@check("RFC 5961, 5: resets must fit the window", pairs=EVERY)
def connections_do_not_disturb_each_other(bed: Bed) -> None:
    """Of two connections between the same workloads one is reset, and the other does not mind."""
    listener = bed.serve()
    nears = [bed.dial() for _ in range(2)]
    for i, near in enumerate(nears):
        near.set("TCP_NODELAY", 1)  # else OSv delays the next write until a timer ends
        near.send(f"{i}")
    fars = {far.receive(1).text: far for far, _ in (listener.accept() for _ in nears)}
    expect(fars.keys() == {b"0", b"1"}, f"the connections brought {list(fars)}")
    nears[0].reset()
    exchange(nears[1], fars[b"1"])
