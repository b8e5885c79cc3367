"""Remote places: starts a campaign's workers on hosts that are reached by SSH.

Each host gets what it needs: this project's files, and the OSv kernel that is found on this
machine. Both are named by their hash and copied only once. `bootstrap` makes the Python
environment, once for each set of requirements. Images are composed on the host, from the host's own
libraries. At every contact the host's doctor runs, and what a killed run left behind is removed
(also a pod that was left standing).

    DIRECTORY/packages/HASH        this project's files
    DIRECTORY/environments/HASH    Python environments, named by the hash of what `bootstrap` reads
    DIRECTORY/kernels/HASH.elf     OSv kernels
    DIRECTORY/campaigns/HASH       consoles, until they are fetched

A host must show the key that known_hosts has for it. If a host fails, that is the host's error;
nothing is run on this machine in its place. Cells between two hosts take the hosts in pairs: the
worker runs on the first host of a pair. The second host is the far end, which runs the servers' pod
and measures nothing.
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
"""Time that a worker may need to take everything down."""


class RemotePlace:
    """A remote host that a campaign's worker can be started on."""

    def __init__(self, host: Host, far: Host | None = None, number: int = 0) -> None:
        """`far` is the other host of cells between two hosts, `number` the number of the pair."""
        self.host, self.name = host, host.name
        self._far, self._number = far, number

    def start(self, job: Job, log: BinaryIO, say: Say) -> RemoteWorker:
        """Update the host's files and start a worker there, whose standard error goes to `log`.

        Raises `Error` if the host cannot be reached or cannot run a worker.
        """
        say("connecting")
        link = Link(self.host)
        try:
            site = Site(link, say)
            say("running its doctor")
            site.clean()
            for finding in site.findings("--fast"):  # the worker finds out how quiet it is
                if finding["state"] == "missing":
                    what = f"{self.name}: {finding['name']}: {finding['detail']}"
                    raise Error(what, finding["hint"])
            if not self._far:
                return RemoteWorker(site, job, log)
            say(f"starting servers on {self._far.name}")
            clients = Side(2 * self._number, self._far.on_link)
            servers = Side(2 * self._number + 1, self.host.on_link)
            far = _Far(self._far, servers, log)
            try:
                return RemoteWorker(
                    site, replace(job, side=replace(clients, lacks=far.lacks)), log, far
                )
            except BaseException:
                far.close()
                raise
        except BaseException:
            link.close()
            raise


def places(hosts: Sequence[Host], between: bool) -> list[RemotePlace]:
    """Places of workers: every host, or the first host of each pair for cells `between` two hosts.

    Raises `Error` for an odd number of hosts, if they are needed in pairs.
    """
    if not between:
        return [RemotePlace(host) for host in hosts]
    if len(hosts) % 2:
        raise Error(
            f"cells between hosts take hosts by twos, and {len(hosts)} are chosen",
            "choose by --on NAME",
        )
    twos = zip(hosts[::2], hosts[1::2], strict=True)
    return [RemotePlace(first, second, number) for number, (first, second) in enumerate(twos)]


class _Far:
    """The far end (`campaigns.far_end`) on the second host of a pair, until it is closed."""

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
        """Have the pod taken down, and wait for that."""
        with suppress(OSError):
            self.channel.shutdown_write()
        self.channel.status_event.wait(END_LIMIT_S)
        self._link.close()


class RemoteWorker:
    """A worker process on a host, with the interface of `places.Worker`."""

    def __init__(self, site: Site, job: Job, log: BinaryIO, far: _Far | None = None) -> None:
        """`far` is closed when the worker has ended."""
        self._link, self._far = site.link, far
        self._consoles = Path(job.directory, "consoles")
        # The same directory for every contact of a campaign: if the link is lost, the next contact
        # fetches the consoles.
        campaign = hashlib.sha256(f"{platform.node()}:{job.directory}".encode()).hexdigest()
        self._directory = f"{site.host.directory}/campaigns/{campaign}"
        job = replace(job, directory=self._directory, osv_kernel=site.kernel(job))
        # The shell outlives the worker, so that its status says if a signal ended the worker.
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
        """Wait for the worker, and fetch consoles. Its exit status; -1 if the link is lost."""
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
    """Regular files of a tar archive, without those whose path leads out of the archive."""
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as tar:
        for member in tar:
            name, file = PurePosixPath(member.name), tar.extractfile(member)
            if member.isreg() and file and not name.is_absolute() and ".." not in name.parts:
                yield name, file.read()
