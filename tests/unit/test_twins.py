"""The traffic agent in Python, run without WebAssembly, answers as the one in C does."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent.python import sockets
from testbed.agent import Agent, build
from testbed.model.addresses import loopback
from testbed.model.terms import Family
from testbed.paths import ROOT
from tests.children import ending

Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def agents() -> Iterator[list[Agent]]:
    """One of each."""
    commands: list[list[Path | str]] = [[build()], [sys.executable, "-m", "agent.python"]]
    with ExitStack() as stack:
        made = []
        for command in commands:
            started = subprocess.Popen(
                [*command, "--control-port", "0"], stdout=subprocess.PIPE, cwd=ROOT
            )
            process = stack.enter_context(ending(started))
            assert process.stdout is not None
            port = int(process.stdout.readline().split()[-1])
            made.append(stack.enter_context(Agent.connect("127.0.0.1", port)))
        yield made


class Session:
    """Socket calls of one agent, and all that it answered; ports stand by when they first came."""

    def __init__(self, agent: Agent, family: Family) -> None:
        self.agent, self.family, self.here = agent, family, str(loopback(family))
        self.answers: Answers = []
        self._ports: list[int] = []

    def order(self, op: str, **keys: Any) -> dict[str, Any]:
        self.agent.ask(op=op, **keys)
        answer = self.agent.answer()
        self.answers.append(
            {
                key: self._order_of(value) if key.endswith("port") and value else value
                for key, value in answer.items()
            }
        )
        return answer

    def _order_of(self, port: int) -> str:
        if port not in self._ports:
            self._ports.append(port)
        return f"port {self._ports.index(port)}"

    def socket(self, transport: str) -> int:
        return int(self.order("socket", transport=transport, family=self.family)["socket"])

    def bound(self, transport: str) -> tuple[int, dict[str, Any]]:
        """A socket with a port of its own, and that as keys."""
        made = self.socket(transport)
        self.order("bind", socket=made, address=self.here, port=0)
        port = self.order("names", socket=made)["own_port"]
        return made, {"address": self.here, "port": port}


def connections(s: Session) -> None:
    listener, at = s.bound("tcp")
    s.order("listen", socket=listener, backlog=4)
    s.order("accept", socket=listener, timeout_s=0.01)
    near = s.socket("tcp")
    s.order("set", socket=near, option="TCP_NODELAY", value=1)
    s.order("set", socket=near, option="SO_KEEPALIVE", value=1)
    s.order("get", socket=near, option="SO_KEEPALIVE")
    s.order("connect", socket=near, timeout_s=0, **at)
    s.order("connect", socket=near, timeout_s=2)
    s.order("names", socket=near)
    far = s.order("accept", socket=listener)["socket"]
    s.order("names", socket=far)
    s.order("poll", socket=far, timeout_s=0.01, **{"for": "read"})
    s.order("send", socket=near, text="hello")
    s.order("poll", socket=far, **{"for": "read"})
    s.order("receive", socket=far, size=5, flag="peek")
    s.order("receive", socket=far, size=5)
    s.order("send", socket=near, size=50_000, phase=3)
    s.order("receive", socket=far, size=20_000, phase=3)
    s.order("receive", socket=far, size=30_000, phase=3)
    s.order("receive", socket=far, size=1, timeout_s=0.01)
    s.order("shutdown", socket=near, how="write")
    s.order("receive", socket=far)
    s.order("close", socket=far)
    s.order("receive", socket=near)
    s.order("close", socket=near)
    s.order("close", socket=listener)
    s.order("connect", socket=s.socket("tcp"), **at)


def datagrams(s: Session) -> None:
    server, at = s.bound("udp")
    client = s.socket("udp")
    s.order("send", socket=client, text="ask", **at)
    got = s.order("receive", socket=server)
    s.order("send", socket=server, size=1000, phase=9, address=got["address"], port=got["port"])
    s.order("receive", socket=client, size=100, phase=9)
    s.order("connect", socket=client, **at)
    s.order("names", socket=client)
    s.order("send", socket=client, size=0)
    s.order("receive", socket=server)
    s.order("bind", socket=s.socket("udp"), **at)
    s.order("send", socket=client, size=70_000)
    s.order("close", socket=server)
    s.order("send", socket=client, text="gone")
    s.order("receive", socket=client)


@pytest.mark.parametrize("family", Family, ids=str)
@pytest.mark.parametrize("session", [connections, datagrams])
def test_both_answer_socket_calls_alike(agents: list[Agent], family: Family, session: Any) -> None:
    sessions = [Session(agent, family) for agent in agents]
    for s in sessions:
        session(s)
    assert sessions[0].answers == sessions[1].answers


@pytest.mark.parametrize(
    "order",
    [
        {"op": "close", "socket": 77},
        {"op": "bind", "socket": 0, "address": "nowhere"},
        {"op": "reboot"},
    ],
)
def test_both_refuse_with_the_same_words(agents: list[Agent], order: dict[str, Any]) -> None:
    said = []
    for agent in agents:
        agent.ask(op="socket", transport="tcp", family="ipv4")
        agent.answer()
        agent.ask(**order)
        with pytest.raises(Exception, match="traffic agent: ") as refused:
            agent.answer()
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_errors_have_linux_numbers() -> None:
    assert {name: getattr(errno, name) for name in sockets.LINUX} == sockets.LINUX
