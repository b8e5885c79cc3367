"""Short cells of `capture` and `steer` with stand-ins, against the same traffic on loopback.

Both in one pod: the loopback's ends are two natives, which a datapath must not slow down either.
They are on the CPUs of the cell's ends: a hypervisor does not give one as much as the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from testbed import datapaths, runtimes
from testbed.agent import Mode
from testbed.campaigns import roles
from testbed.host.ledger import Owner
from testbed.model.cells import Pair
from testbed.model.terms import Family, Runtime, Transport
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Options

from .gate import Ratio

pytestmark = [pytest.mark.root, pytest.mark.bench]

AMOUNTS: dict[Mode, tuple[int, int]] = {"stream": (65536, 48 << 20), "rr": (64, 64 * 600)}
"""Size of a write or request, and bytes in all: some 40 ms."""

ON_THE_SAME_CPUS = {
    Pair.NATIVE_GUEST: ("native1", "native2"),
    Pair.GUEST_NATIVE: ("native2", "native1"),
}


@pytest.fixture(scope="module", params=["capture", "steer"])
def pod(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    kinds = (Runtime.PROCESS, Runtime.STANDIN)
    prepared = {r: runtimes.prepare(r, Options()) for r in kinds}
    pairs = (Pair.NATIVE_NATIVE, Pair.NATIVE_GUEST, Pair.GUEST_NATIVE)
    manifest = roles.manifest(pairs, Runtime.STANDIN)
    way = datapaths.get(request.param)
    with Owner() as owner:
        with Pod(owner, "cells", manifest, way, prepared, tmp_path_factory.mktemp("cells")) as pod:
            pod.start()
            yield pod


@pytest.mark.parametrize("family", Family, ids=str)
@pytest.mark.parametrize(
    ("transport", "mode"), [(Transport.TCP, "stream"), (Transport.TCP, "rr"), (Transport.UDP, "rr")]
)
@pytest.mark.parametrize("pair", ON_THE_SAME_CPUS, ids=str)
def test_a_cell(
    ratio: Ratio, pod: Pod, pair: Pair, transport: Transport, mode: Mode, family: Family
) -> None:
    guest = runtimes.prepare(Runtime.STANDIN, Options())
    size, amount = AMOUNTS[mode]
    with ExitStack() as stack:

        def traffic(client: str, server: str) -> Callable[[], None]:
            dialing, serving = (stack.enter_context(pod.agent(name)) for name in (client, server))
            bind, at = ("any", roles.port(server)) if pod.number_of(server) else ("localhost", 0)
            port = serving.serve(transport, family, at, bind).port
            host = guest.dialed(family) if pod.number_of(client) else "localhost"

            def move() -> None:
                done = dialing.run(transport, family, host, port, mode, size, bytes=amount)
                assert done.bytes + size * done.lost >= amount

            return move

        ratio(
            f"{pod.datapath.name}: {pair.label('guest')} {mode}, {transport} {family}",
            traffic(*roles.ROLES[pair]),
            traffic(*ON_THE_SAME_CPUS[pair]),
        )
