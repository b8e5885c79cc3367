"""Checks of UDP: sizes, names, connected and unconnected sockets, errors that come back."""

from __future__ import annotations

import errno
import time
from ipaddress import ip_address

from testbed.conformance.bed import Bed
from testbed.conformance.check import (
    BOTH,
    EVERY,
    GUEST_SERVER,
    IPV4,
    NATIVE_CLIENT,
    NATIVE_SERVER,
    UDP,
    Unsupported,
    check,
    expect,
    fails_with,
)
from testbed.conformance.sockets import Sock
from testbed.conformance.steps import AT_ONCE_S, bound_to_one_port, need_ipv6
from testbed.model.cells import Pair
from testbed.model.terms import Family, Transport

LARGEST = {Family.IPV4: 65_507, Family.IPV6: 65_487}
"""Largest UDP payload that Linux accepts, by family: an IP packet of 65,535 bytes less headers
(RFC 768, RFC 8200)."""


def echo(bed: Bed, size: int) -> None:
    """Send a datagram of `size` bytes to an unconnected server and back."""
    server, client = bed.serve(), bed.dial()
    for sock in (server, client):
        sock.set("SO_RCVBUF", 1 << 18)
    sending = bed.client
    try:
        client.send(size, phase=7)
        got = server.receive(phase=7)
        expect(got.bytes == size and got.intact, f"arrived: {got.bytes} of {size}, {got.intact}")
        sending = bed.server
        server.send(size, phase=9, to=got.sender)
        got = client.receive(phase=9)
    except TimeoutError as e:
        raise TimeoutError(e.errno, f"no datagram of {size} bytes arrived ({e})") from e
    except OSError as e:
        if e.errno == errno.EMSGSIZE and sending.is_guest:
            raise Unsupported(f"the guest's kernel sends no datagram of {size} bytes") from e
        raise
    expect(got.bytes == size and got.intact, f"came back: {got.bytes} of {size}, {got.intact}")


@check("RFC 768", transports=UDP)
def datagram(bed: Bed) -> None:
    """A datagram to localhost arrives, and the answer comes back to an unconnected socket."""
    server, client = bed.serve(), bed.open(bed.client)
    client.send("ask", to=(bed.target, bed.port))
    got = server.receive()
    expect(got.text == b"ask", f"the server received {got.text!r}")
    server.send("answer", to=got.sender)
    got = client.receive()
    expect(got.text == b"answer", f"the client received {got.text!r}")
    expect(got.sender == (bed.target, bed.port), f"the answer is from {got.sender}")


@check("udp(7): connected sockets receive from their peer alone", transports=UDP)
def datagram_connected(bed: Bed) -> None:
    """A connected client receives the answer of an unconnected server."""
    echo(bed, 100)


@check("RFC 768: length 8", transports=UDP)
def datagram_empty(bed: Bed) -> None:
    """A datagram without payload arrives."""
    echo(bed, 0)


@check("as much as an Ethernet frame holds over IPv4", transports=UDP)
def datagram_1472(bed: Bed) -> None:
    """A datagram of 1,472 bytes goes there and back."""
    echo(bed, 1472)


@check("RFC 791, 3.2; RFC 8200, 4.5: fragments", transports=UDP)
def datagram_3000(bed: Bed) -> None:
    """A datagram of 3,000 bytes goes there and back."""
    echo(bed, 3000)


@check("RFC 768; RFC 791, 3.2: the largest packet", transports=UDP)
def datagram_64k(bed: Bed) -> None:
    """A datagram of 64 KiB less headers goes there and back."""
    echo(bed, LARGEST[bed.family])


@check("RFC 1122, 4.1.3.3; ICMP port unreachable", transports=UDP)
def datagram_refused(bed: Bed) -> None:
    """A connected socket learns by ECONNREFUSED, at once, that nobody serves the port."""
    refused(bed)


def refused(bed: Bed, family: Family | None = None) -> None:
    client = bed.dial(family=family)
    client.send("anybody?")
    began = time.monotonic()
    with fails_with(errno.ECONNREFUSED):
        client.receive()
    took_s = time.monotonic() - began
    expect(took_s < AT_ONCE_S, f"refused only after {took_s:.2f} s")


@check("RFC 1122, 4.1.3.3; close(2)", transports=UDP)
def datagram_refused_after_close(bed: Bed) -> None:
    """A port refuses after its server closed."""
    server, client = bed.serve(), bed.dial()
    client.send("x")
    server.receive()
    server.close()
    refused(bed)


@check("RFC 1122, 4.1.3.3: errors reach the socket whose datagram it was", transports=UDP)
def datagram_refusals_to_their_own(bed: Bed) -> None:
    """A refusal reaches the socket that it is about, and no other."""
    bed.serve()
    served = bed.dial()
    refused_port = bed.next_port()
    lost = bed.dial(refused_port)
    lost.send("x")
    with fails_with(errno.ECONNREFUSED):
        lost.receive()
    served.send("y")
    with fails_with(errno.ETIMEDOUT):
        served.receive(timeout_s=0.1)


@check("getpeername(2), getsockname(2)", transports=UDP)
def datagram_names(bed: Bed) -> None:
    """A connected client's peer is what it dialed; a native's own address is loopback."""
    bed.serve()
    client = bed.dial()
    expect(client.peer_name == (bed.target, bed.port), f"the peer is {client.peer_name}")
    if not bed.client.is_guest:
        expect(client.own_name[0] == bed.loopback, f"its own address is {client.own_name[0]}")


@check("recvfrom(2): the source address", transports=UDP)
def datagram_port_is_kept(bed: Bed) -> None:
    """The server sees the port that the client has."""
    server, client = bed.serve(), bed.dial()
    client.send("x")
    sender = server.receive().sender
    expect(sender is not None and sender[1] == client.own_name[1], f"the sender is {sender}")


@check("bind(2): a loopback address", transports=UDP, pairs=NATIVE_SERVER)
def datagram_listen_loopback(bed: Bed) -> None:
    """A native server bound to 127.0.0.1 or ::1 is reached, and answers."""
    server, client = bed.serve(bed.loopback), bed.dial()
    client.send("x")
    server.send("y", to=server.receive().sender)
    expect(client.receive().text == b"y", "another answer")


@check(
    "bind(2): 127.0.0.2 is another address",
    transports=UDP,
    families=IPV4,
    pairs=NATIVE_SERVER,
)
def datagram_listen_other_loopback(bed: Bed) -> None:
    """A native server bound to 127.0.0.2 is not reached at localhost, which refuses."""
    server = bed.serve("127.0.0.2")
    refused(bed)
    if not bed.client.is_guest:
        client = bed.open(bed.client)
        client.connect("127.0.0.2", bed.port)
        client.send("x")
        server.send("y", to=server.receive().sender)
        expect(client.receive().text == b"y", "another answer")


@check("bind(2): a socket is of one family", transports=UDP, families=IPV4)
def datagram_listen_ipv4_only(bed: Bed) -> None:
    """A server of IPv4 alone is not reached by IPv6, which refuses."""
    need_ipv6(bed)
    server = bed.serve()
    refused(bed, Family.IPV6)
    client = bed.dial()
    client.send("x")
    server.send("y", to=server.receive().sender)
    expect(client.receive().text == b"y", "another answer")


@check("bind(2): INADDR_ANY, in6addr_any", transports=UDP)
def datagram_listen_wildcard(bed: Bed) -> None:
    """A server at the wildcard address answers from the address that was dialed."""
    server = bed.serve(bed.family.wildcard)
    client = bed.dial()
    client.send("x")
    server.send("y", to=server.receive().sender)
    expect(client.receive().text == b"y", "another answer")


@check("RFC 3493, 3.7: IPv4-mapped addresses", transports=UDP, families=IPV4)
def datagram_dual_stack(bed: Bed) -> None:
    """A dual-stack server at [::] answers IPv4 clients."""
    server = bed.serve("::", family=Family.IPV6, options={"IPV6_V6ONLY": 0})
    client = bed.dial()
    client.send("x")
    server.send("y", to=server.receive().sender)
    expect(client.receive().text == b"y", "another answer")


@check("RFC 3493, 3.7: IPv4-mapped addresses", transports=UDP, families=IPV4)
def datagram_mapped(bed: Bed) -> None:
    """An IPv6 socket exchanges datagrams with an IPv4 server at ::ffff:127.0.0.1."""
    server = bed.serve()
    client = bed.client.socket(Transport.UDP, Family.IPV6)
    client.set("IPV6_V6ONLY", 0)
    client.send("x", to=(ip_address(f"::ffff:{bed.target}"), bed.port))
    server.send("y", to=server.receive().sender)
    got = client.receive()
    expect(got.text == b"y", f"the answer is {got.text!r}")
    mapped = getattr(got.sender[0], "ipv4_mapped", None) if got.sender else None
    expect(mapped == bed.target, f"the answer is from {got.sender}")


@check("bind(2) before sendto(2)", transports=UDP, pairs=NATIVE_CLIENT)
def datagram_client_bound_to_loopback(bed: Bed) -> None:
    """A client bound to 127.0.0.1 or ::1 is answered, connected or not."""
    server = bed.serve()
    for connected in (False, True):
        client = bed.open(bed.client)
        client.bind(bed.loopback)
        if connected:
            client.connect(bed.target, bed.port)
        client.send("x", to=None if connected else (bed.target, bed.port))
        server.send("y", to=server.receive().sender)
        expect(client.receive().text == b"y", "another answer")


@check("bind(2) before sendto(2)", transports=UDP, families=IPV4, pairs=NATIVE_CLIENT)
def datagram_client_bound_to_other_loopback(bed: Bed) -> None:
    """A client bound to 127.0.0.5 is answered there."""
    server, client = bed.serve(), bed.open(bed.client)
    client.bind("127.0.0.5")
    client.send("x", to=(bed.target, bed.port))
    server.send("y", to=server.receive().sender)
    expect(client.receive().text == b"y", "another answer")


@check("udp(7): a socket is its names", transports=UDP, pairs=EVERY - {Pair.NATIVE_NATIVE})
def datagram_same_port_from_two_clients(bed: Bed) -> None:
    """One server answers two workloads that use the same source port, each its own."""
    server, clients = bed.serve(), bound_to_one_port(bed)
    for client in clients:
        client.send(client.peer.name, to=(client.peer.localhost(bed.family), bed.port))
    for _ in clients:
        got = server.receive()
        server.send(got.text.decode(), to=got.sender)
    for client in clients:
        got = client.receive()
        expect(got.text == client.peer.name.encode(), f"{client.peer.name} got {got.text!r}")


@check("recvfrom(2), sendto(2): the source address; lima #3724", transports=UDP)
def datagram_answers_to_their_own(bed: Bed) -> None:
    """Sixteen sockets ask at once and are answered in another order, each its own answer alone."""
    server, clients = bed.serve(), [bed.dial() for _ in range(16)]
    for i, client in enumerate(clients):
        client.send(f"{i}")
    asked = [server.receive() for _ in clients]
    for got in reversed(asked):
        server.send(got.text.decode(), to=got.sender)
    for i, client in enumerate(clients):
        got = client.receive()
        expect(got.text == f"{i}".encode(), f"client {i} was answered {got.text!r}")
    expect(not _count(clients[0]), "a client was answered twice")


@check("bind(2): port 0", transports=UDP, pairs=NATIVE_SERVER)
def datagram_chosen_port(bed: Bed) -> None:
    """A native server that leaves its port to the kernel is reached there, and answers."""
    server = bed.open(bed.server)
    server.bind(bed.loopback)
    client = bed.dial(server.own_name[1])
    client.send("x")
    server.send("y", to=server.receive().sender)
    expect(client.receive().text == b"y", "another answer")


@check("udp(7): connect to who sent", transports=UDP)
def datagram_server_connects(bed: Bed) -> None:
    """A server that connects its socket to the client goes on talking with it."""
    server, client = bed.serve(), bed.dial()
    client.send("x")
    sender = server.receive().sender
    assert sender is not None
    server.connect(*sender)
    for _ in range(3):
        server.send("y")
        expect(client.receive().text == b"y", "another answer")
        client.send("z")
        expect(server.receive().text == b"z", "another datagram")


@check("udp(7): one socket, many peers", transports=UDP, pairs=NATIVE_CLIENT | NATIVE_SERVER)
def datagram_many_servers(bed: Bed) -> None:
    """One unconnected socket asks servers of several workloads, and knows the answers apart."""
    client = bed.open(bed.client)
    asked = {}
    for name in (bed.server_name, "native1" if bed.server_name == "native2" else "native2"):
        port = bed.next_port(name)
        asked[port] = bed.serve(port=port, peer=bed.peer(name))
    for port in asked:
        client.send(str(port), to=(bed.target, port))
    for server in asked.values():
        got = server.receive()
        server.send(got.text.decode(), to=got.sender)
    for _ in asked:
        got = client.receive()
        expect(got.sender is not None, "no sender")
        assert got.sender is not None
        expect(got.sender[0] == bed.target, f"an answer is from {got.sender[0]}")
        expect(got.text == str(got.sender[1]).encode(), f"{got.sender} answered {got.text!r}")


@check("recv(2): MSG_TRUNC", transports=UDP)
def datagram_truncated(bed: Bed) -> None:
    """What does not fit the buffer is cut off, and the next datagram is whole."""
    server, client = bed.serve(), bed.dial()
    client.send(1000)
    client.send("next")
    got = server.receive(100)
    expect(got.bytes == 100 and got.intact, f"{got.bytes} bytes of the first")
    got = server.receive()
    expect(got.text == b"next", f"the next is {got.text!r}")


@check("loopback loses nothing that is waited for", transports=UDP)
def datagram_order(bed: Bed) -> None:
    """Two hundred datagrams, each answered before the next, all arrive, once and in order."""
    server, client = bed.serve(), bed.dial()
    sender = None
    for i in range(200):
        client.send(f"{i}")
        got = server.receive()
        expect(got.text == f"{i}".encode(), f"{i} arrived as {got.text!r}")
        sender = sender or got.sender
        expect(got.sender == sender, f"{i} is from {got.sender}, not {sender}")
        server.send(f"{i}", to=got.sender)
        got = client.receive()
        expect(got.text == f"{i}".encode(), f"the answer to {i} is {got.text!r}")


@check("RFC 1191; RFC 8201; ip(7): IP_MTU_DISCOVER", transports=UDP)
def path_mtu(bed: Bed) -> None:
    """A large datagram that may not be fragmented arrives or is EMSGSIZE: it is not just gone."""
    server, client = bed.serve(), bed.dial()
    option = "IP_MTU_DISCOVER" if bed.family is Family.IPV4 else "IPV6_MTU_DISCOVER"
    client.set(option, 2)  # IP_PMTUDISC_DO
    for _ in range(3):  # the kernel may have to learn the path MTU from the first
        try:
            client.send(3000)
        except OSError as e:
            if e.errno != errno.EMSGSIZE:
                raise
            break
        try:
            got = server.receive(timeout_s=0.3)
        except TimeoutError:
            continue
        expect(got.bytes == 3000 and got.intact, f"{got.bytes} of 3000 bytes")
        break
    else:
        expect(False, "three times it was sent without an error, and never arrived")
    client.send(1000)
    expect(server.receive().bytes == 1000, "a datagram that fits the link did not arrive after it")


@check(
    "socket(7): SO_REUSEPORT",
    transports=UDP,
    pairs=NATIVE_SERVER | GUEST_SERVER,
    disruptive=True,
)
def datagram_reuseport(bed: Bed) -> None:
    """Sockets that share a port by SO_REUSEPORT share its clients."""
    options = {"SO_REUSEPORT": 1}
    group = [bed.serve(options=options), bed.serve(options=options)]
    for _ in range(32):
        bed.dial().send("x")
    counts = [_count(sock) for sock in group]
    expect(sum(counts) == 32, f"{sum(counts)} of 32 datagrams arrived")
    if bed.server.is_guest and 0 in counts:
        raise Unsupported(f"the guest's kernel gives all to one socket ({counts})")
    expect(0 not in counts, f"one socket got all: {counts}")


def _count(sock: Sock) -> int:
    for n in range(1000):
        try:
            sock.receive(timeout_s=0.1)
        except TimeoutError:
            return n
    return 1000


@check("bind(2): EADDRINUSE", transports=BOTH)
def port_in_use(bed: Bed) -> None:
    """A second server on the same port of one workload is refused it."""
    bed.serve()
    second = bed.open(bed.server)
    with fails_with(errno.EADDRINUSE):
        second.bind(bed.server.bind_address(bed.family), bed.port)
