"""Watches over one pod: mends links that vanish, ends the connections of guests that died.

A thread that sleeps until the kernel has something to say (a link message, the end of a process).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from types import TracebackType
from typing import Self

from testbed import netlink
from testbed.pod import Pod

RTMGRP_LINK = 1


class Supervisor:
    """Keeps a pod whole, as a context manager. `deaths` names guests that ended on their own."""

    def __init__(self, pod: Pod) -> None:
        self.deaths: list[str] = []
        self._pod = pod
        self._wake, self._sleeper = os.pipe()
        netns, _ = pod.link_netns
        self._links = netlink.inside(
            netns, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        )
        self._links.bind((0, RTMGRP_LINK))
        self._thread = threading.Thread(target=self._watch, name=f"supervisor {pod.name}")

    def _watch(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        poller.register(self._links, select.POLLIN)
        alive: dict[int, tuple[str, int]] = {}
        while True:
            for name, process in list(self._pod.processes.items()):
                if (name, process.pid) not in alive.values():
                    with contextlib.suppress(ProcessLookupError):  # was collected meanwhile
                        fd = os.pidfd_open(process.pid)
                        alive[fd] = (name, process.pid)
                        poller.register(fd, select.POLLIN)
            for fd, _ in poller.poll(1000):
                if fd == self._wake:
                    return
                if fd == self._links.fileno():
                    self._links.recv(65536)
                    if self._pod.missing_links():
                        self._pod.mend()
                else:
                    poller.unregister(fd)
                    os.close(fd)
                    name, pid = alive.pop(fd)
                    current = self._pod.processes.get(name)
                    if current and current.pid == pid:  # it was not us who ended it
                        self.deaths.append(name)
                        self._pod.end_peers(name)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        os.close(self._sleeper)
        self._thread.join()
        self._links.close()
