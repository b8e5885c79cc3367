"""Short cells of `capture` and `steer` with stand-ins, against the same traffic on loopback.

Both in one pod: the loopback's ends are two natives, which a datapath must not slow down either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from testbed import datapaths, runtimes, trial
from testbed.agent import Mode
from testbed.ledger import Owner
from testbed.model import Family, Pair, Runtime, Transport
from testbed.pod import Pod
from testbed.runtimes import Options

from .gate import Ratio

pytestmark = [pytest.mark.root, pytest.mark.bench]

AMOUNTS: dict[Mode, tuple[int, int]] = {"stream": (65536, 48 << 20), "rr": (64, 64 * 600)}
"""Size of a write or request, and bytes in all: some 40 ms."""


@pytest.fixture(scope="module", params=["capture", "steer"])
def pod(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    kinds = (Runtime.PROCESS, Runtime.STANDIN)
    prepared = {r: runtimes.prepare(r, Options()) for r in kinds}
    pairs = (Pair.NATIVE_NATIVE, Pair.NATIVE_GUEST, Pair.GUEST_NATIVE)
    manifest = trial.manifest(pairs, Runtime.STANDIN)
    way = datapaths.get(request.param)
    with Owner() as owner:
        with Pod(owner, "cells", manifest, way, prepared, tmp_path_factory.mktemp("cells")) as pod:
            pod.start()
            yield pod


@pytest.mark.parametrize("family", Family, ids=str)
@pytest.mark.parametrize(
    ("transport", "mode"), [(Transport.TCP, "stream"), (Transport.TCP, "rr"), (Transport.UDP, "rr")]
)
@pytest.mark.parametrize("pair", [Pair.NATIVE_GUEST, Pair.GUEST_NATIVE], ids=str)
def test_a_cell(
    ratio: Ratio, pod: Pod, pair: Pair, transport: Transport, mode: Mode, family: Family
) -> None:
    guest = runtimes.prepare(Runtime.STANDIN, Options())
    size, amount = AMOUNTS[mode]
    with ExitStack() as stack:

        def traffic(between: Pair) -> Callable[[], None]:
            client, server = trial.ROLES[between]
            dialing, serving = (stack.enter_context(pod.agent(name)) for name in (client, server))
            bind = "any" if pod.number_of(server) else "localhost"
            port = serving.serve(transport, family, trial.port(server), bind).port
            host = guest.dialed(family) if pod.number_of(client) else "localhost"

            def move() -> None:
                done = dialing.run(transport, family, host, port, mode, size, bytes=amount)
                assert done.bytes + size * done.lost >= amount

            return move

        ratio(
            f"{pod.datapath.name}: {pair.label('guest')} {mode}, {transport} {family}",
            traffic(pair),
            traffic(Pair.NATIVE_NATIVE),
        )
