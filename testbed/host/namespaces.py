"""Creates, enters and removes network namespaces, and reads and writes their sysctls."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pyroute2.netns
from pyroute2 import AsyncIPRoute, IPRoute
from pyroute2.netlink.rtnl.iprsocket import IPRouteProxy

from testbed.host import facts
from testbed.host.ledger import Scope
from testbed.model.errors import Error
from testbed.model.terms import Family

NETNS = Path("/run/netns")
"""Folder of named namespaces, as `ip netns` has it."""

CLONE_NEWNET = 0x40000000
MS_BIND, MS_REC, MS_SHARED = 0x1000, 0x4000, 0x100000
NS_GET_NSTYPE = 0xB703

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


def own() -> int:
    """Number of this thread's network namespace: the inode that stands for it."""
    return Path("/proc/thread-self/ns/net").stat().st_ino


def create(owner: Scope, name: str) -> IPRoute:
    """Make a namespace (`make`), written down in the owner's ledger."""
    owner.defer(remove_netns, name=name)
    return make(name)


def make(name: str) -> IPRoute:
    """Make a namespace with `lo` up, and return a netlink socket in it.

    Addresses in it are usable at once (no duplicate address detection). Options that a host may
    have set for all links, and that a new namespace may inherit
    (net.core.devconf_inherit_init_net), are switched off.
    """
    if not is_namespace(NETNS / name):
        _in_thread(lambda: _unshare(_mount_file(name)))
    ip = open_socket(name)
    ip.link("set", index=1, state="up")
    off = {
        "ipv4": ("route_localnet", "accept_local"),
        "ipv6": ("accept_dad", "accept_ra", "autoconf"),
    }
    set_sysctls(
        name,
        {
            f"net/{family}/conf/{links}/{key}": 0
            for family, keys in off.items()
            for key in keys
            for links in ("all", "default")
        },
    )
    return ip


def hold(owner: Scope, name: str, path: Path) -> IPRoute:
    """Give a foreign namespace a name of ours by a bind mount, and return a socket in it."""
    owner.defer(remove_netns, name=name)
    if not is_namespace(NETNS / name):
        _mount(path, _mount_file(name))
    return open_socket(name)


def is_namespace(path: Path) -> bool:
    """Whether a file is a network namespace (ioctl_ns(2))."""
    try:
        with path.open() as file:
            return bool(fcntl.ioctl(file, NS_GET_NSTYPE) == CLONE_NEWNET)
    except OSError:
        return False


def open_socket(netns: str) -> IPRoute:
    """Open an rtnetlink socket in a namespace. Any thread may use it, one at a time."""
    ip = IPRoute.__new__(IPRoute)  # to set another `asyncore`: the constructor takes none
    ip.asyncore = _Inside(netns)
    ip.asyncore.status["event_loop"] = "new"
    ip.asyncore.local.keep_event_loop = True
    return ip


class _Inside(AsyncIPRoute):  # type: ignore[misc]
    """Opens its sockets (one per thread) in a thread inside a namespace.

    pyroute2 would fork a process for each, which takes 8 ms.
    """

    def __init__(self, netns: str) -> None:
        super().__init__()
        self._netns = netns
        self.request_proxy = SimpleNamespace(handle=self._handle)

    def _handle(self, message: Any) -> bytes:
        """Handle the requests that netlink cannot: creation of taps."""
        if message.get(("linkinfo", "kind")) != "tuntap":
            return b""
        return inside(self._netns, lambda: bytes(IPRouteProxy().handle(message)))

    def setup_socket(self) -> socket.socket:
        opened: socket.socket = inside(self._netns, super().setup_socket)
        return opened


def remove_netns(name: str) -> None:
    """Remove a namespace's name. Without a name or process it ends, its links a moment later."""
    if (NETNS / name).exists():
        pyroute2.netns.remove(name)


def inside(netns: str, call: Callable[[], T]) -> T:
    """Run a short call in a thread inside the namespace. Sockets that it opens belong to it."""

    def run() -> T:
        with (NETNS / netns).open() as file:
            _checked(_libc.setns(file.fileno(), CLONE_NEWNET), f"enter namespace {netns}")
        return call()

    return _in_thread(run)


@functools.cache
def _share_folder() -> None:
    """Make `/run/netns` a shared mount, as `ip netns` does, unless it is one.

    A lock lets one process do so: a second mount would cover the namespaces that are mounted in the
    folder by then, and nobody could unmount them.
    """
    NETNS.mkdir(exist_ok=True)
    folder = os.open(NETNS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # so does iproute2
        path = str(NETNS).encode()
        if _libc.mount(b"", path, b"none", MS_SHARED | MS_REC, None):
            _checked(_libc.mount(path, path, b"none", MS_BIND | MS_REC, None), f"mount {NETNS}")
            _checked(_libc.mount(b"", path, b"none", MS_SHARED | MS_REC, None), f"share {NETNS}")
    finally:
        os.close(folder)


def _mount_file(name: str) -> Path:
    """Make the empty file at which a namespace will be mounted."""
    _share_folder()
    (NETNS / name).touch(mode=0o444)
    return NETNS / name


def _unshare(at: Path) -> None:
    """Move this thread to a new namespace and mount that at a path: `ip netns add` without fork."""
    _checked(_libc.unshare(CLONE_NEWNET), "make a network namespace")
    _mount(Path("/proc/thread-self/ns/net"), at)


def _mount(path: Path, at: Path) -> None:
    source, target = str(path).encode(), str(at).encode()
    _checked(_libc.mount(source, target, b"none", MS_BIND, None), f"mount {at}")


def _checked(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise Error(f"cannot {what}: {os.strerror(code)}", hint="be root; see 'testbed doctor'")


def _in_thread(call: Callable[[], T]) -> T:
    """Run a call in a thread of its own, so that this thread stays in its namespace."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(call).result()


def set_sysctls(netns: str, values: Mapping[str, int | str]) -> None:
    """Write sysctls (`net/…`, with slashes) of a namespace, in this order.

    Skips IPv6's on a kernel without it, and those of links that are gone or have no IPv6.
    """
    has_ipv6 = Family.IPV6 in facts.families()

    def write() -> None:
        for key, value in values.items():
            path = Path("/proc/sys", key)
            if has_ipv6 or not key.startswith("net/ipv6/"):
                with _no_link(path):
                    path.write_text(str(value))

    inside(netns, write)


def sysctls(netns: str, *keys: str) -> dict[str, str]:
    """Read sysctls (`net/…`, with slashes) of a namespace, but those of links that are gone."""

    def read() -> dict[str, str]:
        found = {}
        for key in keys:
            path = Path("/proc/sys", key)
            with _no_link(path):
                found[key] = path.read_text().strip()
        return found

    return inside(netns, read)


@contextmanager
def _no_link(path: Path) -> Iterator[None]:
    """It is no error if this sysctl is missing because its link, or the link's IPv6, is."""
    try:
        yield
    except FileNotFoundError:
        if path.parent.exists():
            raise
