"""SSH connection to a host (fabric, paramiko): runs commands as root, with their streams."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from shlex import quote
from typing import Any, Self

import fabric
import paramiko

from testbed.model.errors import Error
from testbed.remote.inventory import Host

CONNECT_LIMIT_S = 10
LINK_LIMIT_S = 20
"""Time that sent data may stay unacknowledged until the connection is closed (TCP_USER_TIMEOUT)."""


class RefuseUnknownKey:
    """Refuses a host whose key is not in known_hosts (paramiko's MissingHostKeyPolicy)."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def missing_host_key(self, client: object, hostname: str, key: paramiko.PKey) -> None:
        host = self._host
        raise Error(
            f"{host.name}: its host key is not on file in {host.known_hosts} "
            f"({key.get_name()} {key.fingerprint})",
            f"if that is its key: ssh-keyscan -p {host.port} {host.address} >> {host.known_hosts}",
        )


class Link:
    """SSH connection to a host. Raises `Error` if it cannot be made, or if a command fails."""

    def __init__(self, host: Host) -> None:
        self.host = host
        keys = {"key_filename": str(host.key), "look_for_keys": False} if host.key else {}
        self._connection = fabric.Connection(
            host.address, host.user, host.port, connect_timeout=CONNECT_LIMIT_S, connect_kwargs=keys
        )
        client = self._connection.client
        client.set_missing_host_key_policy(RefuseUnknownKey(host))
        where = f"{host.name}: {host.address} port {host.port}"
        try:
            if host.known_hosts.exists():
                client.load_system_host_keys(str(host.known_hosts))
            self._connection.open()
            # Events are short lines, so no Nagle. Both ends must notice when the other is gone.
            wire = self._connection.transport.sock
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LINK_LIMIT_S * 1000)
            self._connection.transport.set_keepalive(5)
        except paramiko.BadHostKeyException as e:
            raise Error(
                f"{where} shows another host key than the one in {host.known_hosts}",
                "another machine may pretend to be it; if it was reinstalled: ssh-keygen "
                f"-f {host.known_hosts} -R '{e.hostname}'",
            ) from e
        except paramiko.PasswordRequiredException as e:
            raise Error(
                f"{where}: the key {host.key} needs a passphrase", f"ssh-add {host.key}"
            ) from e
        except paramiko.AuthenticationException as e:
            login = f"-p {host.port} {host.user}@{host.address}"
            raise Error(f"{where} does not let {host.user} in", f"ssh-copy-id {login}") from e
        except (OSError, EOFError, paramiko.SSHException) as e:
            first = next(iter(getattr(e, "errors", {}).values()), e)  # one for each address
            why = getattr(first, "strerror", None) or str(first) or type(first).__name__
            raise Error(
                f"{where} cannot be reached: {why}",
                f"ssh -p {host.port} {host.user}@{host.address}",
            ) from e
        finally:
            if not self._connection.is_connected:
                client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. A worker on the host then ends."""
        self._connection.close()

    def run(self, line: str, data: bytes = b"") -> bytes:
        """Run a shell line as root on the host, with `data` as its input; returns its output."""
        with self.start(line) as channel:
            errors: list[bytes] = []
            listener = threading.Thread(
                target=lambda: errors.extend(ChannelReader(channel.recv_stderr))
            )
            listener.start()
            with suppress(OSError):  # it ended before it had read all data: its status says why
                channel.sendall(data)
                channel.shutdown_write()
            output = ChannelReader(channel.recv).readall()
            listener.join()
            if status := channel.recv_exit_status():
                self._fail(status, b"".join(errors).decode(errors="replace"), line)
            return output

    def test(self, line: str) -> bool:
        """Whether a shell line succeeds on the host."""
        return self.run(f"{line} && echo yes || true") == b"yes\n"

    def start(self, line: str) -> paramiko.Channel:
        """Start a shell line as root on the host. Its streams are those of the channel."""
        command = f"sh -c {quote(line)}"
        if self.host.sudo:
            command = f"sudo -n -H {command}"
        try:
            channel = self._connection.transport.open_session(timeout=CONNECT_LIMIT_S)
            channel.exec_command(command)
        except (OSError, EOFError, paramiko.SSHException) as e:
            raise Error(f"{self.host.name}: lost the link ({e})") from e
        return channel

    def _fail(self, status: int, errors: str, line: str) -> None:
        if status < 0:
            raise Error(f"{self.host.name}: lost the link")
        last = errors.strip().rpartition("\n")[2] or f"status {status} of {line}"
        raise Error(f"{self.host.name}: {last}")


class ChannelReader(io.RawIOBase):
    """A stream of a channel as a Python file. paramiko's own files raise when collected late."""

    def __init__(self, receive: Callable[[int], bytes]) -> None:
        self._receive = receive

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._receive(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class ChannelWriter(io.RawIOBase):
    """Writes the same data to the standard input of several channels. Closing it ends the input."""

    def __init__(self, *channels: paramiko.Channel) -> None:
        self._channels = channels

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        for channel in self._channels:
            channel.sendall(bytes(data))
        return len(data)

    def close(self) -> None:
        if not self.closed:
            for channel in self._channels:
                with suppress(OSError):  # the connection is gone, and the stream with it
                    channel.shutdown_write()
        super().close()
