"""Checks by volume: many connections and many bytes, of which none may be lost."""

from __future__ import annotations

from testbed.agent import Direction, Mode, Result
from testbed.conformance.bed import Bed
from testbed.conformance.check import BOTH, check, expect
from testbed.conformance.sockets import connect_many

SEQUENTIAL = 10_000
CONCURRENT = 2_000
BULK_BYTES = 1 << 30
THREADS = 16
EMULATED_SHARE = 16
"""Divisor of these amounts for emulated guests."""


def amount(bed: Bed, whole: int) -> int:
    """The amount for this stage: the whole, or a share of it for emulated guests."""
    return whole // EMULATED_SHARE if bed.stage.emulated and bed.pair.guests else whole


@check("no connection is lost to chance")
def sequential_connections(bed: Bed) -> None:
    """10,000 connections, one after the other, without one failure."""
    _connections(bed, amount(bed, SEQUENTIAL))


@check("connections that begin at once; libkrun #511")
def threads_of_connections(bed: Bed) -> None:
    """Sixteen threads make 500 short connections each at the same time, without one failure."""
    _connections(bed, amount(bed, 500), threads=THREADS)


@check("no connection is lost to crowding")
def concurrent_connections(bed: Bed) -> None:
    """2,000 connections open at once, each with its own bytes."""
    count = amount(bed, CONCURRENT)
    listener = bed.serve(backlog=count)
    nears = connect_many(bed.client, bed.family, (bed.target, bed.port), count)
    for i, near in enumerate(nears):
        near.send(f"{i:4}")
    fars = {far.receive(4).text: far for far, _ in (listener.accept() for _ in nears)}
    expect(len(fars) == count, f"{len(fars)} different clients of {count}")
    for i in range(0, count, 50):
        fars[f"{i:4}".encode()].send(f"{i:4}")
        got = nears[i].receive(4)
        expect(got.text == f"{i:4}".encode(), f"connection {i} was answered {got.text!r}")


def _by_agents(
    bed: Bed,
    mode: Mode,
    size_bytes: int,
    *,
    bytes: int,
    streams: int = 1,
    direction: Direction = "up",
) -> Result:
    """Traffic from the client's agent to the server's (`Agent.run`)."""
    to = (bed.transport, bed.family, str(bed.target), bed.port)
    return bed.client.agent.run(
        *to, mode, size_bytes, bytes=bytes, streams=streams, direction=direction
    )


def _connections(bed: Bed, each: int, threads: int = 1) -> None:
    """Connections one after the other, with a question and an answer of 64 bytes each."""
    count = threads * each
    bed.serve_by_agent()
    result = _by_agents(bed, "crr", 64, streams=threads, bytes=each * 64)
    expect(not result.errors and not result.corrupt, f"{result.errors} of {count} failed")
    expect(result.transactions == count, f"{result.transactions} of {count} connections")


def _bulk(bed: Bed, direction: Direction) -> None:
    size = amount(bed, BULK_BYTES)
    bed.serve_by_agent()
    result = _by_agents(bed, "stream", 65_536, direction=direction, bytes=size)
    expect(result.bytes == size, f"{result.bytes} of {size} bytes arrived")
    expect(not result.corrupt, f"{result.corrupt} pieces are not what was sent")


@check("RFC 9293, 3.8: every byte compared")
def bulk_up(bed: Bed) -> None:
    """1 GiB from client to server, each byte as it was sent."""
    _bulk(bed, "up")


@check("RFC 9293, 3.8: every byte compared")
def bulk_down(bed: Bed) -> None:
    """1 GiB from server to client, each byte as it was sent."""
    _bulk(bed, "down")


@check("connections side by side share nothing but the link", transports=BOTH)
def requests_side_by_side(bed: Bed) -> None:
    """Eight clients at once, each answered with its own bytes, none lost."""
    bed.serve_by_agent()
    tries = 2 if bed.stage.emulated else 1  # an emulated guest may stand still while one is awaited
    for _ in range(tries):
        result = _by_agents(bed, "rr", 1000, streams=8, bytes=amount(bed, 400_000))
        if not result.lost:
            break
    expect(not result.corrupt, f"{result.corrupt} answers were another's")
    expect(not result.lost, f"{result.lost} requests were lost")
