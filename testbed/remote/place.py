"""Hosts reached by SSH: an inventory names them, fabric reaches them, a worker is started on each.

What a host needs is carried there by content, and only once: this project's files, an OSv kernel
that is found here. Its Python environment is made by `bootstrap`, once for each set of
requirements; images are composed there, by the same code, of the host's own libraries. At every
contact the host's doctor is asked, and what a killed run has left there is taken down (a pod that
was kept, too).

    DIRECTORY/packages/HASH        this project's files
    DIRECTORY/environments/HASH    where `bootstrap` ran, by what it reads
    DIRECTORY/kernels/HASH.elf     OSv kernels
    DIRECTORY/campaigns/HASH       consoles, until they are fetched

A host is believed only by the key that is on file for it. What fails on one host is that host's
error; nothing is ever run here in its place. Cells between two hosts take hosts by twos: the first
of each has the worker, the second the servers' pod (`far`), and measures nothing itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import BinaryIO

from testbed.campaigns.protocol import Job
from testbed.datapaths.between_hosts import Side
from testbed.model.errors import Error
from testbed.model.terms import Family
from testbed.remote.inventory import Host
from testbed.remote.site import Say, Site
from testbed.remote.ssh import ChannelReader, ChannelWriter, Link

END_LIMIT_S = 60
"""How long a worker may take to take everything down."""


# --- inventory ------------------------------------------------------------------------------


# --- what is carried ------------------------------------------------------------------------


# --- link -----------------------------------------------------------------------------------


# --- a host at work -------------------------------------------------------------------------


class Place:
    """Where a campaign's worker runs: a host."""

    def __init__(self, host: Host, far: Host | None = None, number: int = 0) -> None:
        """`far`: the other host of cells between two, of which this is the `number`-th first."""
        self.host, self.name = host, host.name
        self._far, self._number = far, number

    def start(self, job: Job, log: BinaryIO, say: Say) -> Worker:
        """Bring the host up to date and start a worker there, with its job; it complains to `log`.

        Raises `Error` if the host cannot be reached or cannot run it.
        """
        say("connecting")
        link = Link(self.host)
        try:
            site = Site(link, say)
            say("asking its doctor")
            site.clean()
            for finding in site.findings():
                if finding["state"] == "missing":
                    what = f"{self.name}: {finding['name']}: {finding['detail']}"
                    raise Error(what, finding["hint"])
            if not self._far:
                return Worker(site, job, log)
            say(f"starting servers on {self._far.name}")
            clients = Side(2 * self._number, self._far.on_link)
            servers = Side(2 * self._number + 1, self.host.on_link)
            far = _Far(self._far, servers, log)
            try:
                return Worker(site, replace(job, side=replace(clients, lacks=far.lacks)), log, far)
            except BaseException:
                far.close()
                raise
        except BaseException:
            link.close()
            raise


def places(hosts: Sequence[Host], between: bool) -> list[Place]:
    """Where workers run: on every host, or, for cells `between` two, on the first of each two.

    Raises `Error` if one host is left alone.
    """
    if not between:
        return [Place(host) for host in hosts]
    if len(hosts) % 2:
        raise Error(
            f"cells between hosts take hosts by twos, and {len(hosts)} are chosen",
            "choose by --on NAME",
        )
    twos = zip(hosts[::2], hosts[1::2], strict=True)
    return [Place(first, second, number) for number, (first, second) in enumerate(twos)]


class _Far:
    """The servers' pod on the other host, as long as it is wanted."""

    def __init__(self, host: Host, side: Side, log: BinaryIO) -> None:
        self._link = Link(host)
        try:
            site = Site(self._link, lambda _: None)
            site.clean()
            self.channel = self._link.start(site.python("testbed.campaigns.far_end"))
            self.channel.sendall((json.dumps(asdict(side)) + "\n").encode())
            said = io.BufferedReader(ChannelReader(self.channel.recv)).readline()
            if not said:
                log.write(ChannelReader(self.channel.recv_stderr).readall())
                raise Error(f"{host.name}: its servers do not start", f"see {log.name}")
            answer = json.loads(said)
            if "error" in answer:
                raise Error(f"{host.name}: {answer['error']}", answer["hint"])
            self.lacks = {Family(family): why for family, why in answer["lacks"].items()}
        except BaseException:
            self._link.close()
            raise

    def close(self) -> None:
        """Have it taken down, and wait for that."""
        with suppress(OSError):
            self.channel.shutdown_write()
        self.channel.status_event.wait(END_LIMIT_S)
        self._link.close()


class Worker:
    """A worker on a host, with what `campaign` uses of the Popen of a local one."""

    def __init__(self, site: Site, job: Job, log: BinaryIO, far: _Far | None = None) -> None:
        """`far` ends with it."""
        self._link, self._far = site.link, far
        self._consoles = Path(job.directory, "consoles")
        # The same for every contact of a campaign: what a lost link left is fetched by the next.
        campaign = hashlib.sha256(f"{platform.node()}:{job.directory}".encode()).hexdigest()
        self._directory = f"{site.host.directory}/campaigns/{campaign}"
        job = replace(job, directory=self._directory, osv_kernel=site.kernel(job))
        # Its shell outlives it, to tell of a signal that ended it.
        self._channel = site.link.start(f"({site.python('testbed.campaigns.worker')}); exit $?")
        channels = [self._channel, *([far.channel] if far else ())]
        self.stdin = io.TextIOWrapper(io.BufferedWriter(ChannelWriter(*channels)))
        self.stdout = io.TextIOWrapper(io.BufferedReader(ChannelReader(self._channel.recv)))
        self._complaints = threading.Thread(target=self._copy, args=(log,), daemon=True)
        self._complaints.start()
        with suppress(OSError):
            self._channel.sendall((json.dumps(asdict(job)) + "\n").encode())

    def _copy(self, log: BinaryIO) -> None:
        for line in ChannelReader(self._channel.recv_stderr):
            log.write(line)
            log.flush()

    def wait(self) -> int:
        """Its exit status, when it has ended; -1 if the link was lost. Consoles are fetched."""
        try:
            self._channel.status_event.wait(END_LIMIT_S)
            status = self._channel.exit_status
            self._complaints.join(END_LIMIT_S)
            if status >= 0:
                with suppress(Error):
                    self._fetch()
            return int(status)
        finally:
            if self._far:
                self._far.close()
            self._link.close()

    def _fetch(self) -> None:
        at = quote(self._directory)
        packed = self._link.run(f"mkdir -p {at}/consoles && tar -C {at}/consoles -czf - .")
        for name, text in _files(packed):
            path = self._consoles / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        self._link.run(f"rm -rf {at}")


def _files(packed: bytes) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Plain files of a tar that stay below where they are unpacked."""
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as tar:
        for member in tar:
            name, file = PurePosixPath(member.name), tar.extractfile(member)
            if member.isreg() and file and not name.is_absolute() and ".." not in name.parts:
                yield name, file.read()


# --- looking ---------------------------------------------------------------------------------
