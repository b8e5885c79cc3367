"""Checks of TCP connections: made, refused, used in every way, ended in every way."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from testbed.conformance.bed import Bed
from testbed.conformance.check import (
    EVERY,
    GUEST_SERVER,
    IPV4,
    NATIVE_CLIENT,
    NATIVE_SERVER,
    Unsupported,
    check,
    expect,
    fails_with,
)
from testbed.conformance.sockets import TIMEOUT_S, Sock
from testbed.conformance.steps import (
    AT_ONCE_S,
    exchange,
    need_ipv6,
    refused_at_once,
    two_clients_on_one_port,
)
from testbed.host import namespaces
from testbed.model.addresses import loopback
from testbed.model.cells import Pair
from testbed.model.terms import Family, Transport

STALL_S = 0.040
"""Shortest delayed acknowledgment of Linux (TCP_DELACK_MIN)."""
IDLE_S = 5.0
PROBES = 9
"""Number of keep-alive probes, Linux's default: floods of other checks make a few get lost."""
SIZE = 20_000
"""Number of bytes that every stack buffers before anybody reads them."""
BACKLOG_S = 16.0
"""Limit for a full backlog: SYNs that it dropped are sent again after 1, 3, 7 and 15 s."""


# --- making connections ---------------------------------------------------------------------


@check("RFC 9293, 3.5")
def connect(bed: Bed) -> None:
    """A connection to localhost is made and carries bytes both ways."""
    exchange(*bed.connected())


@check("RFC 9293, 3.5.2: reset generation, case 1; WSL #12245")
def refused(bed: Bed) -> None:
    """A port that nobody serves refuses at once."""
    refused_at_once(bed)


@check("RFC 9293, 3.5.2; close(2)")
def refused_after_close(bed: Bed) -> None:
    """A port refuses at once after its listener closed."""
    listener = bed.serve()
    near = bed.dial()
    far, _ = listener.accept()
    near.reset()
    far.close()
    listener.close()
    refused_at_once(bed)


@check("connect(2): EINPROGRESS, SO_ERROR")
def connect_without_waiting(bed: Bed) -> None:
    """A non-blocking connect becomes writable with no error, or with ECONNREFUSED."""
    listener = bed.serve()
    near = bed.open(bed.client)
    near.begin_connect(bed.target, bed.port)
    near.poll("write")
    expect(near.get("SO_ERROR") == 0, "SO_ERROR is set on a connection that was made")
    exchange(near, listener.accept()[0])
    near = bed.open(bed.client)
    with fails_with(errno.ECONNREFUSED):
        near.connect(bed.target, bed.next_port())


@check("listen(2): the kernel completes the handshake")
def data_before_accept(bed: Bed) -> None:
    """What was sent before accept was called is there after it."""
    listener = bed.serve()
    near = bed.dial()
    near.send(2000)
    far, _ = listener.accept()
    got = far.receive(2000)
    expect(got.bytes == 2000 and got.intact, f"{got.bytes} of 2000 bytes, intact: {got.intact}")


@check("bind(2): INADDR_ANY, in6addr_any")
def listen_wildcard(bed: Bed) -> None:
    """A server bound to the wildcard address is reached at localhost."""
    listener = bed.serve(bed.family.wildcard)
    near = bed.dial()
    exchange(near, listener.accept()[0])


@check("bind(2): a loopback address", pairs=NATIVE_SERVER)
def listen_loopback(bed: Bed) -> None:
    """A native server bound to 127.0.0.1 or ::1 is reached at localhost."""
    listener = bed.serve(bed.loopback)
    near = bed.dial()
    exchange(near, listener.accept()[0])


@check("RFC 1122, 3.2.1.3 (g): loopback stays in the host, here the pod", pairs=GUEST_SERVER)
def guest_listens_on_loopback(bed: Bed) -> None:
    """A server in a guest bound to 127.0.0.1 or ::1 is reached at localhost."""
    listener = bed.serve(bed.loopback)
    try:
        near = bed.dial()
    except ConnectionRefusedError as e:
        raise Unsupported("the guest has no shim: what it binds to loopback stays in it") from e
    exchange(near, listener.accept()[0])


@check("RFC 1122, 3.2.1.3 (g): a literal loopback address", pairs=EVERY - NATIVE_CLIENT)
def guest_dials_loopback(bed: Bed) -> None:
    """A program in a guest that dials 127.0.0.1 or ::1 by number reaches the pod."""
    listener = bed.serve()
    near = bed.open(bed.client)
    try:
        near.connect(bed.loopback, bed.port)
    except ConnectionRefusedError as e:
        raise Unsupported("the guest has no shim: its loopback addresses stay in it") from e
    if bed.pair is Pair.GUEST_SELF:
        expect(listener.poll("read").readable, "nothing to accept")
    exchange(near, listener.accept()[0])


@check("bind(2): port 0; libkrun #818", pairs=NATIVE_SERVER)
def listen_chosen_port(bed: Bed) -> None:
    """A native server that leaves its port to the kernel is reached there at localhost."""
    listener = bed.open(bed.server)
    listener.bind(bed.loopback)
    listener.listen()
    near = bed.dial(listener.own_name[1])
    exchange(near, listener.accept()[0])


@check("the manifest says whose a port is, all others are natives'", pairs=GUEST_SERVER)
def guests_unlisted_port(bed: Bed) -> None:
    """At a guest's port that no manifest lists, localhost refuses at once until a native serves."""
    unlisted = bed.open(bed.server)
    unlisted.bind(bed.family.wildcard)
    unlisted.listen()
    port = unlisted.own_name[1]
    refused_at_once(bed, port)
    listener = bed.serve(port=port, peer=bed.peer("native2"))
    near = bed.dial(port)
    exchange(near, listener.accept()[0])


@check("RFC 3493, 3.7: IPv4-mapped addresses", families=IPV4, pairs=NATIVE_SERVER)
def listen_mapped(bed: Bed) -> None:
    """A native server bound to ::ffff:127.0.0.1 serves 127.0.0.1, and refuses ::1 at once."""
    mapped = f"::ffff:{bed.loopback}"
    listener = bed.serve(mapped, family=Family.IPV6, options={"IPV6_V6ONLY": 0})
    near = bed.dial()
    exchange(near, listener.accept()[0])
    refused_at_once(bed, family=Family.IPV6)


@check("RFC 3493, 3.7 and 5.3: IPv4-mapped addresses", families=IPV4)
def listen_dual_stack(bed: Bed) -> None:
    """A dual-stack server at [::] serves IPv4 clients, and sees them as ::ffff:a.b.c.d."""
    listener = _serve_ipv6(bed, v6only=0)
    near = bed.dial()
    far, name = listener.accept()
    mapped = getattr(name[0], "ipv4_mapped", None)
    expect(mapped is not None, f"the client is {name[0]}, not a mapped address")
    if not bed.server.is_guest:
        expect(mapped == loopback(Family.IPV4), f"the client is {name[0]}")
    exchange(near, far)


@check("RFC 3493, 5.3: IPV6_V6ONLY", families=IPV4)
def listen_ipv6_only(bed: Bed) -> None:
    """A server at [::] with IPV6_V6ONLY serves IPv6, and refuses IPv4 at once."""
    listener = _serve_ipv6(bed, v6only=1)
    refused_at_once(bed)
    near = bed.dial(family=Family.IPV6)
    exchange(near, listener.accept()[0])


@check("bind(2): a socket is of one family", families=IPV4)
def listen_ipv4_only(bed: Bed) -> None:
    """A server of IPv4 alone refuses a client that dials localhost by IPv6 at once."""
    need_ipv6(bed)
    listener = bed.serve()
    refused_at_once(bed, family=Family.IPV6)
    near = bed.dial()
    exchange(near, listener.accept()[0])


@check("RFC 3493, 5.3; bind(2)", families=IPV4)
def listen_both_families(bed: Bed) -> None:
    """Two servers on one port, one a family, each get their own clients."""
    listeners = {Family.IPV4: bed.serve(), Family.IPV6: _serve_ipv6(bed, v6only=1)}
    for family, listener in listeners.items():
        near = bed.dial(family=family)
        far, _ = listener.accept()
        near.send("hello")
        got = far.receive(5)
        expect(got.text == b"hello", f"{family}: received {got.text!r}")


def _serve_ipv6(bed: Bed, v6only: int) -> Sock:
    return bed.serve("::", family=Family.IPV6, options={"IPV6_V6ONLY": v6only})


@check("RFC 3493, 3.7: IPv4-mapped addresses", families=IPV4)
def connect_mapped(bed: Bed) -> None:
    """An IPv6 socket reaches an IPv4 server at ::ffff:127.0.0.1."""
    listener = bed.serve()
    near = bed.client.socket(Transport.TCP, Family.IPV6)
    near.set("IPV6_V6ONLY", 0)
    near.connect(f"::ffff:{bed.target}", bed.port)
    exchange(near, listener.accept()[0])


@check("RFC 1122, 3.2.1.3 (g): all of 127/8 is loopback", families=IPV4, pairs=NATIVE_CLIENT)
def other_loopback_address(bed: Bed) -> None:
    """A server at the wildcard is reached at 127.0.0.2, too."""
    listener = bed.serve("0.0.0.0")
    near = bed.open(bed.client)
    near.connect("127.0.0.2", bed.port)
    expect(str(near.peer_name[0]) == "127.0.0.2", f"the peer's name is {near.peer_name[0]}")
    exchange(near, listener.accept()[0])


@check("bind(2): 127.0.0.2 is another address", families=IPV4, pairs=NATIVE_SERVER)
def listen_other_loopback(bed: Bed) -> None:
    """A native server bound to 127.0.0.2 is not reached at localhost, nor at ::ffff:127.0.0.1."""
    listener = bed.serve("127.0.0.2")
    refused_at_once(bed)
    mapped = bed.client.socket(Transport.TCP, Family.IPV6)
    mapped.set("IPV6_V6ONLY", 0)
    with fails_with(errno.ECONNREFUSED):
        mapped.connect(f"::ffff:{bed.target}", bed.port)
    if not bed.client.is_guest:
        with fails_with(errno.ECONNREFUSED):
            bed.open(bed.client).connect("127.0.0.3", bed.port)
        near = bed.open(bed.client)
        near.connect("127.0.0.2", bed.port)
        exchange(near, listener.accept()[0])


@check("bind(2) before connect(2)", pairs=NATIVE_CLIENT)
def client_bound_to_loopback(bed: Bed) -> None:
    """A client bound to 127.0.0.1 or ::1 before it connects gets through."""
    listener = bed.serve()
    near = bed.open(bed.client)
    near.bind(bed.loopback)
    near.connect(bed.target, bed.port)
    exchange(near, listener.accept()[0])


@check("bind(2) before connect(2)", families=IPV4, pairs=NATIVE_CLIENT)
def client_bound_to_other_loopback(bed: Bed) -> None:
    """A client bound to 127.0.0.5 gets through, and keeps its name."""
    listener = bed.serve()
    near = bed.open(bed.client)
    near.bind("127.0.0.5")
    near.connect(bed.target, bed.port)
    far, name = listener.accept()
    expect(str(near.own_name[0]) == "127.0.0.5", f"the client's own name is {near.own_name[0]}")
    if not bed.server.is_guest:
        expect(str(name[0]) == "127.0.0.5", f"the server sees the client as {name[0]}")
    exchange(near, far)


@check("ip(7): the pod is one host, whichever program asks", pairs=NATIVE_CLIENT)
def any_process(bed: Bed) -> None:
    """A process that merely entered the pod's namespace is served like all others."""
    listener = bed.serve()
    with _dial_from_elsewhere(bed, str(bed.loopback)) as near:
        far, _ = listener.accept()
        near.sendall(b"hello")
        expect(far.receive(5).text == b"hello", "what it sent did not arrive")
        far.send("there")
        expect(near.recv(5) == b"there", "what it was sent did not arrive")


@check("kubectl port-forward; containerd #14074", pairs=NATIVE_CLIENT)
def port_forward(bed: Bed) -> None:
    """A runtime that enters the pod's namespace forwards a connection, its half-close as well.

    The runtime is in none of the pod's cgroups. It dials 127.0.0.1, ::1 and the name `localhost`,
    which this host's resolver may know in IPv4 only.
    """
    listener = bed.serve()
    for host in (str(bed.loopback), *(["localhost"] if bed.family is Family.IPV4 else [])):
        with _dial_from_elsewhere(bed, host) as near:
            far, _ = listener.accept()
            near.sendall(b"request")
            near.shutdown(socket.SHUT_WR)
            got = far.receive()
            expect(got.ended and got.text == b"request", f"the server received {got.text!r}, {got}")
            far.send(SIZE)
            far.close()
            with near.makefile("rb") as answer:
                size = len(answer.read())
            expect(size == SIZE, f"by {host} {size} of {SIZE} bytes came back")


def _dial_from_elsewhere(bed: Bed, host: str) -> socket.socket:
    """A connection of this process, which is not the pod's, from the pod's namespace."""
    if bed.client.name != "native1":
        raise Unsupported("its client is a plain process, not the component")
    return namespaces.inside(
        bed.stage.netns, lambda: socket.create_connection((host, bed.port), TIMEOUT_S)
    )


@check("socket(7): SO_BINDTODEVICE", pairs=NATIVE_CLIENT)
def client_bound_to_lo(bed: Bed) -> None:
    """A client bound to the device lo gets through."""
    listener = bed.serve()
    near = bed.open(bed.client)
    near.set("SO_BINDTODEVICE", "lo")
    near.connect(bed.target, bed.port)
    exchange(near, listener.accept()[0])


@check("socket(7): SO_BINDTODEVICE", pairs=NATIVE_SERVER)
def listener_bound_to_lo(bed: Bed) -> None:
    """A native server bound to the device lo is reached at localhost."""
    listener = bed.serve(options={"SO_BINDTODEVICE": "lo"})
    near = bed.dial()
    exchange(near, listener.accept()[0])


@check("socket(7): SO_REUSEPORT", disruptive=True)
def reuseport(bed: Bed) -> None:
    """Two servers that share a port by SO_REUSEPORT share its clients."""
    options = {"SO_REUSEPORT": 1}
    group = [bed.serve(options=options), bed.serve(options=options)]
    for _ in range(32):
        bed.dial().send("x")
    counts = []
    for listener in group:
        count = 0
        while True:
            try:
                listener.accept(timeout_s=0.1)
            except TimeoutError:
                break
            count += 1
        counts.append(count)
    expect(sum(counts) == 32, f"{sum(counts)} of 32 connections were there to accept")
    if bed.server.is_guest and 0 in counts:
        raise Unsupported(f"the guest's kernel gives all to one listener ({counts})")
    expect(0 not in counts, f"one listener got all: {counts}")


@check("tcp(7): tcp_syncookies; RFC 4987, 3.6", pairs=NATIVE_SERVER)
def syn_cookies(bed: Bed) -> None:
    """Connections are made while the kernel answers every SYN with a cookie."""
    key = "net/ipv4/tcp_syncookies"
    listener = bed.serve()
    namespaces.set_sysctls(bed.stage.netns, {key: 2})
    try:
        for _ in range(10):
            near = bed.dial()
            exchange(near, listener.accept()[0])
    finally:
        namespaces.set_sysctls(bed.stage.netns, {key: 1})


@check("listen(2): backlog; tcp(7)")
def full_backlog(bed: Bed) -> None:
    """Where the backlog is full, connections wait: none is refused or reset.

    Clients speak first. Where SYNs come faster than handshakes end, a kernel answers them with SYN
    cookies, and forgets a connection whose last ACK finds the backlog full: the connection's next
    bytes bring it back.
    """
    listener = bed.serve(backlog=2)
    nears = []
    for _ in range(5):
        near = bed.open(bed.client)
        near.begin_connect(bed.target, bed.port)
        nears.append(near)
    fars = [listener.accept(timeout_s=BACKLOG_S)[0] for _ in range(2)]
    for near in nears:
        near.finish_connect(timeout_s=BACKLOG_S)
        near.send("x")
    for _ in range(3):
        try:
            fars.append(listener.accept(timeout_s=BACKLOG_S)[0])
        except TimeoutError as e:
            if bed.server.is_guest and bed.stage.guest == "osv":
                raise Unsupported("the guest's kernel forgets clients beyond its backlog") from e
            raise
    for far in fars:
        expect(far.receive(1, timeout_s=BACKLOG_S).text == b"x", "a connection brought nothing")


@check("RFC 9293, figure 7: simultaneous open", pairs=EVERY - {Pair.GUEST_SELF})
def simultaneous_open(bed: Bed) -> None:
    """Two clients that dial each other's port become one connection."""
    ports = {bed.client: bed.next_port(bed.client_name), bed.server: bed.port}
    first, second = bed.open(bed.client), bed.open(bed.server)
    for sock in (first, second):
        sock.set("SO_REUSEADDR", 1)
    first.set("SO_ATTACH_FILTER", 0)  # drops the reset that answers its first SYN
    first.bind(bed.client.bind_address(bed.family), ports[bed.client])
    first.begin_connect(bed.target, ports[bed.server])
    second.bind(bed.server.bind_address(bed.family), ports[bed.server])
    second.connect(bed.server.localhost(bed.family), ports[bed.client])
    first.finish_connect()
    exchange(first, second)


# --- using connections ----------------------------------------------------------------------


@check("RFC 9293, 3.6: half-closed connections; lima #5264")
def half_close(bed: Bed) -> None:
    """After the client's FIN the server still sends, and all of it arrives."""
    near, far = bed.connected()
    near.send("request")
    near.shutdown()
    got = far.receive()
    expect(got.ended and got.text == b"request", f"the server received {got.text!r}, {got}")
    far.send(SIZE)
    far.close()
    got = near.receive()
    expect(got.bytes == SIZE and got.intact, f"{got.bytes} of {SIZE} bytes after the FIN")
    expect(got.ended, "no end of the stream")


@check("RFC 9293, 3.6: half-closed connections")
def half_close_by_server(bed: Bed) -> None:
    """After the server's FIN the client still sends, and all of it arrives."""
    near, far = bed.connected()
    far.shutdown()
    expect(near.receive(1).ended, "the client sees no end of the stream")
    near.send(SIZE)
    near.close()
    got = far.receive()
    expect(got.bytes == SIZE and got.intact, f"{got.bytes} of {SIZE} bytes after the FIN")


def _timed_answer(waiting: Sock, act: Callable[[], None]) -> tuple[dict[str, Any], float]:
    """What a socket that waits is told once something is done, and after how many seconds."""
    began = time.monotonic()
    try:
        act()
    finally:
        answer = waiting.answer()
    return answer, time.monotonic() - began


@check("RFC 9293, 3.6: FIN; cocoonstack/sandbox #158")
def fin_at_once(bed: Bed) -> None:
    """The end of a stream is seen at once, with bytes before it and without, both ways."""
    for text in ("", "last"):
        for first, second in (bed.connected(), bed.connected()[::-1]):
            if text:
                first.send(text)
            second.ask_receive(SIZE, timeout_s=TIMEOUT_S)
            answer, took_s = _timed_answer(second, first.close)
            expect(bool(answer["ended"]), f"{second.peer.name} sees no end: {answer['errno']}")
            expect(took_s < AT_ONCE_S, f"{second.peer.name} sees the end after {took_s:.2f} s")


@check("RFC 9293, 3.6: close delivers")
def close_delivers(bed: Bed) -> None:
    """What was sent just before close arrives, then the end."""
    near, far = bed.connected()
    near.send(SIZE)
    near.close()
    got = far.receive()
    expect(got.bytes == SIZE and got.intact and got.ended, f"only {got.bytes} of {SIZE} bytes")


@check("socket(7): SO_LINGER 0; RFC 9293, 3.10.4: ABORT")
def reset(bed: Bed) -> None:
    """A close by RST is ECONNRESET at the other end."""
    near, far = bed.connected()
    near.reset()
    with fails_with(errno.ECONNRESET):
        far.receive(1)


@check("RFC 9293, 3.10.7.4: a RST wakes who waits")
def reset_wakes_reader(bed: Bed) -> None:
    """A receive that waits ends with ECONNRESET at once when the other end resets."""
    near, far = bed.connected()
    near.ask_receive(1, timeout_s=3)
    answer, took_s = _timed_answer(near, far.reset)
    expect(answer["errno"] == errno.ECONNRESET, f"it ended with errno {answer['errno']}")
    expect(took_s < AT_ONCE_S, f"it took {took_s:.2f} s")


@check("poll(2): POLLHUP, POLLERR")
def reset_is_polled(bed: Bed) -> None:
    """poll tells of a reset, and of the end of a stream."""
    near, far = bed.connected()
    far.shutdown()
    expect(near.poll("read").readable, "the end of the stream is not readable")
    near, far = bed.connected()
    far.reset()
    ready = near.poll("read")
    expect(ready.error or ready.hangup, f"after a reset: {ready}")


@check("RFC 1122, 4.2.2.13; RFC 2525, 2.17")
def close_with_unread_data(bed: Bed) -> None:
    """Closing without having read all is a reset for the sender."""
    near, far = bed.connected()
    near.send(10_000)
    far.poll("read")
    far.close()
    deadline = time.monotonic() + TIMEOUT_S
    with fails_with(errno.ECONNRESET, errno.EPIPE):
        while time.monotonic() < deadline:
            time.sleep(0.01)
            near.send(1000)
            near.receive(1, timeout_s=0.2)


@check("socket(7): SO_LINGER with a time")
def linger(bed: Bed) -> None:
    """Close with SO_LINGER waits until all is delivered."""
    near, far = bed.connected()
    near.set("SO_LINGER", 5)
    near.send(SIZE)
    far.ask_receive(SIZE, timeout_s=5)
    began = time.monotonic()
    near.close()
    took_s = time.monotonic() - began
    answer = far.answer()
    expect(answer["bytes"] == SIZE and answer["intact"], f"{answer['bytes']} of {SIZE} bytes")
    expect(took_s < 4, f"close took {took_s:.2f} s")


@check("RFC 6093; tcp(7): MSG_OOB")
def urgent_data(bed: Bed) -> None:
    """A byte of urgent data is told apart from the stream."""
    near, far = bed.connected()
    near.send("ab")
    near.send("!", flag="oob")
    near.send("cd")
    try:
        far.poll("urgent")
    except TimeoutError as e:
        if far.peer.is_guest and bed.stage.guest == "osv":
            raise Unsupported("poll of this guest's kernel does not tell of urgent data") from e
        raise
    got = far.receive(1, flag="oob")
    expect(got.text == b"!", f"out of band came {got.text!r}")
    text = b""
    while len(text) < 4:
        got = far.receive(4 - len(text), some=True)
        text += got.text
        expect(not got.ended, f"the stream ended after {text!r}")
    expect(text == b"abcd", f"in the stream stood {text!r}")


@check("recv(2): MSG_PEEK")
def peek(bed: Bed) -> None:
    """What was peeked at is still there."""
    near, far = bed.connected()
    near.send("hello")
    far.poll("read")
    for flag in ("peek", ""):
        got = far.receive(5, flag=flag)
        expect(got.text == b"hello", f"{flag or 'read'}: {got.text!r}")


@check("RFC 9293, 3.8.6: flow control")
def flow_control(bed: Bed) -> None:
    """A sender waits for a reader that does not read, and loses nothing."""
    size = 8 << 20
    near, far = bed.connected()
    near.ask_send(size, timeout_s=20)
    far.poll("read")
    time.sleep(0.3)
    got = far.receive(size, timeout_s=20)
    expect(got.bytes == size and got.intact, f"{got.bytes} of {size} bytes, intact: {got.intact}")
    answer = near.answer()
    expect(answer["bytes"] == size, f"the sender was rid of {answer['bytes']} bytes")


@check("RFC 9293, 3.8.6; full duplex")
def both_ways_at_once(bed: Bed) -> None:
    """Both ends send megabytes at the same time, and all arrives."""
    size = 4 << 20
    near, far = bed.connected()
    near.ask_send(size, timeout_s=20)
    far.ask_send(64 << 10, timeout_s=20)
    expect(far.answer()["bytes"] == 64 << 10, "the smaller way stopped")
    got = far.receive(size, timeout_s=20)
    expect(got.bytes == size and got.intact, f"{got.bytes} of {size} bytes up")
    near.answer()
    got = near.receive(64 << 10)
    expect(got.bytes == 64 << 10 and got.intact, f"{got.bytes} of {64 << 10} bytes down")


@check("tcp(7): TCP_NODELAY; RFC 1122, 4.2.3.2: delayed ACK")
def no_stalls(bed: Bed) -> None:
    """Requests in two writes are answered without waits of 40 ms."""
    near, far = bed.connected()
    near.set("TCP_NODELAY", 1)
    far.set("TCP_NODELAY", 1)
    slow = 0
    for _ in range(40):
        began = time.monotonic()
        near.send("head")
        near.send("body")
        far.receive(8)
        far.send("done")
        near.receive(4)
        slow += time.monotonic() - began > STALL_S
    # A datapath that stalls does so in every exchange; a busy host is slow in some only.
    often = 20 if bed.stage.emulated else 4
    expect(slow <= often, f"{slow} of 40 exchanges took more than {STALL_S * 1000:.0f} ms")


@check("RFC 9293, 3.7.1; RFC 6691: maximum segment size")
def segment_size(bed: Bed) -> None:
    """The segment size fits the path: 1,460 bytes at most where a guest takes part."""
    near, far = bed.connected()
    exchange(near, far)
    most = 65_535 if bed.pair is Pair.NATIVE_NATIVE else 1460
    for end in (near, far):
        size = end.get("TCP_MAXSEG")
        expect(500 <= size <= most, f"{end.peer.name} has segments of {size} bytes, not to {most}")


@check("segmentation offload: writes of any size come out whole")
def gso_sizes(bed: Bed) -> None:
    """Writes from 1 byte to 1 MB arrive byte by byte as they were sent."""
    near, far = bed.connected()
    for size in (1, 100, 1447, 1448, 1449, 2896, 4096, 16_384, 65_483, 65_536, 200_000, 1 << 20):
        near.ask_send(size, timeout_s=10)
        got = far.receive(size, timeout_s=10)
        near.answer()
        expect(got.bytes == size and got.intact, f"of {size} bytes {got.bytes}, {got.intact}")


# --- ports over time ------------------------------------------------------------------------


@check("RFC 6191; tcp(7): a SYN that meets TIME_WAIT", pairs=EVERY)
def port_reused_after_close(bed: Bed) -> None:
    """A client's port serves again at once after the server closed first."""
    listener = bed.serve()
    port = 0
    for turn in range(3):
        near = bed.open(bed.client)
        near.set("SO_REUSEADDR", 1)
        near.bind(bed.family.wildcard, port)
        began = time.monotonic()
        near.connect(bed.target, bed.port)
        took_s = time.monotonic() - began
        expect(took_s < AT_ONCE_S, f"turn {turn + 1} took {took_s:.2f} s to connect")
        port = near.own_name[1]
        far, _ = listener.accept()
        exchange(near, far)
        far.shutdown()
        expect(near.receive(1).ended, "no end of the stream")
        near.close()
        expect(far.receive(1).ended, "no end of the stream at the server")
        far.close()


@check("tcp(7): the port is part of the connection's name")
def port_is_kept(bed: Bed) -> None:
    """The server sees the port that the client has."""
    listener = bed.serve()
    near = bed.dial()
    _, name = listener.accept()
    expect(near.own_name[1] == name[1], f"client {near.own_name[1]}, at the server {name[1]}")


@check("RFC 9293, 3.4.1: a connection is its four names", pairs=EVERY - {Pair.NATIVE_NATIVE})
def same_port_from_two_clients(bed: Bed) -> None:
    """Two workloads that use the same source port at once have a connection each."""
    ends = two_clients_on_one_port(bed)
    for near, _ in ends:
        near.send(near.peer.name)
    for near, far in ends:
        name = near.peer.name
        got = far.receive(len(name))
        expect(got.text == name.encode(), f"{name}'s connection brought {got.text!r}")
        far.send(name)
        got = near.receive(len(name))
        expect(got.text == name.encode(), f"{name} was answered {got.text!r}")


@check("bind(2): SO_REUSEADDR")
def server_restart(bed: Bed) -> None:
    """A server that ended with connections open starts again on its port at once."""
    for _ in range(3):
        listener = bed.serve()
        near = bed.dial()
        far, _ = listener.accept()
        exchange(near, far)
        listener.close()
        far.close()
        expect(near.receive(1).ended, "no end of the stream")
        near.close()


@check("TCP and UDP ports are different ports", transports=(Transport.TCP,))
def same_port_of_udp(bed: Bed) -> None:
    """One number is a TCP and a UDP port at once, each with its own server."""
    datagrams = bed.server.socket(Transport.UDP, bed.family)
    datagrams.bind(bed.server.bind_address(bed.family), bed.port)
    refused_at_once(bed)
    listener = bed.serve()
    near = bed.dial()
    exchange(near, listener.accept()[0])
    sender = bed.client.socket(Transport.UDP, bed.family)
    sender.send("datagram", to=(bed.target, bed.port))
    expect(datagrams.receive().text == b"datagram", "the datagram did not arrive")


@check("RFC 9293: an idle connection stays")
def idle(bed: Bed) -> Iterator[None]:
    """A connection that lay idle for as long as the other checks took still works."""
    near, far = bed.connected()
    exchange(near, far)
    began = time.monotonic()
    yield
    time.sleep(max(0.0, IDLE_S - (time.monotonic() - began)))
    exchange(near, far)


@check("RFC 1122, 4.2.3.6; tcp(7): SO_KEEPALIVE")
def keepalive(bed: Bed) -> Iterator[None]:
    """Keep-alive probes are answered, so that an idle connection is not given up."""
    near, far = bed.connected()
    for sock in (near, far):
        sock.set("SO_KEEPALIVE", 1)
        for option, value in (
            ("TCP_KEEPIDLE", 1),
            ("TCP_KEEPINTVL", 1),
            ("TCP_KEEPCNT", PROBES),
        ):
            sock.set(option, value)
    began = time.monotonic()
    yield
    time.sleep(max(0.0, PROBES + 3 - (time.monotonic() - began)))
    exchange(near, far)


@check(
    "beyond loopback: a pod whose guests lack a family",
    families=IPV4,
    pairs=frozenset({Pair.NATIVE_GUEST}),
)
def ipv6_client_of_ipv4_guest(bed: Bed) -> None:
    """A client that dials ::1 reaches a guest that speaks IPv4 alone."""
    if Family.IPV6 in bed.server.agent.hello().families:
        raise Unsupported("the guest speaks IPv6")
    listener = bed.serve()
    near = bed.client.socket(Transport.TCP, Family.IPV6)
    near.connect(loopback(Family.IPV6), bed.port)
    exchange(near, listener.accept()[0])
