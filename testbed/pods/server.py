"""Server of a pod's control socket: answers questions about the pod (`control` is the client).

Questions and answers are one line of JSON each. `down` ends the server, and is answered when the
pod is gone. `trace` lasts as long as the client stays connected.
"""

from __future__ import annotations

import functools
import json
import select
import socket
import threading
from contextlib import suppress
from typing import Any

from pyroute2 import IPRoute

from testbed import bpf
from testbed.model.errors import Error
from testbed.pods import control
from testbed.pods.workloads import Workloads


class Server:
    """Answers questions about one pod."""

    def __init__(self, workloads: Workloads) -> None:
        self._workloads, self._pod = workloads, workloads.pod
        self._tracing = threading.Lock()

    def serve(self, server: socket.socket, ending: int) -> socket.socket | None:
        """Answer questions until `ending` is readable, or a client asks for `down`.

        Returns the connection of that client, which waits for an answer, or None.
        """
        while True:
            if ending in select.select([server.fileno(), ending], [], [])[0]:
                return None
            asker, _ = server.accept()
            try:
                asker.settimeout(control.TIMEOUT_S)
                line = control.trusted(asker) and asker.makefile("rb").readline()
                if not line:
                    asker.close()
                    continue
                question = json.loads(line)["ask"]
                if question == "down":
                    return asker
                if question == "trace":
                    self._workloads.run_beside(functools.partial(self._trace, asker), "trace")
                    continue
                answers = {"describe": self.describe, "traffic": self.traffic}
                answer = answers.get(question, self._workloads.status)()
                asker.sendall(json.dumps(answer).encode() + b"\n")
            except (OSError, ValueError, KeyError):
                pass  # the client is gone, or none of ours
            asker.close()

    def _trace(self, asker: socket.socket) -> None:
        """Trace the pod for as long as the client stays connected."""
        with asker, suppress(OSError):  # the client is gone
            if not self._tracing.acquire(blocking=False):
                answer: dict[str, Any] = {
                    "error": f"{self._workloads.spec.name} is being traced already"
                }
                asker.sendall(json.dumps(answer).encode() + b"\n")
                return
            try:
                with self._pod.attachment.trace(self._pod.lock) as answer:
                    answer["guests"] = {
                        n: w.name for n, w in self._workloads.spec.manifest.guests.items()
                    }
                    asker.sendall(json.dumps(answer).encode() + b"\n")
                    select.select([asker.fileno(), self._workloads.stop], [], [])
            except Error as e:
                answer = {"error": e.message, "hint": e.hint}
                asker.sendall(json.dumps(answer).encode() + b"\n")
            finally:
                self._tracing.release()

    def traffic(self) -> dict[str, Any]:
        """Traffic between all pairs of which at least one is a guest, and counters."""
        ends: dict[int | None, str] = {None: "natives"}
        ends |= {n: w.name for n, w in self._workloads.spec.manifest.guests.items()}
        with self._pod.lock:
            attachment = self._pod.attachment
            counters = attachment.counters()
            traffic = [
                {
                    "client": ends[client],
                    "server": ends[server],
                    **vars(attachment.carried(client, server)),
                }
                for client in ends
                for server in ends
                if client or server
            ]
        return {
            "traffic": traffic,
            "counters": {reason: vars(count) for reason, count in counters.items()},
        }

    def describe(self) -> dict[str, Any]:
        """Status, links, traffic, counters and events."""
        with self._pod.lock:
            ips = {
                self._pod.netns: self._pod.links.ip,
                self._pod.links.link_netns: self._pod.links.link_ip,
            }
            links = [link for netns, ip in ips.items() for link in _links(netns, ip)]
            taps = self._pod.links.taps.data()
        status = self._workloads.status()
        for described, words in zip(status["workloads"], self._workloads.last_words(), strict=True):
            described["last_words"] = words
        return {
            **status,
            "links": links,
            "taps": taps,
            **self.traffic(),
            "cgroup": str(self._pod.cgroup),
            "events": list(self._workloads.events),
        }


def _links(netns: str, ip: IPRoute) -> list[dict[str, Any]]:
    """Links of a namespace with their addresses, and the programs at their tc hooks."""
    addresses: dict[int, list[str]] = {}
    for a in ip.get_addr():
        shown = f"{a.get('address')}/{a['prefixlen']}"
        addresses.setdefault(a["index"], []).append(shown)
    return [
        {
            "netns": netns,
            "name": link.get("ifname"),
            "mac": link.get("address"),
            "up": link["state"] == "up",
            "addresses": addresses.get(link["index"], []),
            "programs": bpf.running_tc(netns, ip, link["index"]),
        }
        for link in ip.get_links()
    ]
