"""Places: starts the workers of a campaign, reads their events in threads, and ends them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import IO, BinaryIO, Protocol

from testbed.campaigns.protocol import BEAT_S, Event, Job
from testbed.model.errors import Error


class Worker(Protocol):
    """A worker process that has its job: a `subprocess.Popen`, or a process on another host."""

    @property
    def stdin(self) -> IO[str] | None: ...
    @property
    def stdout(self) -> IO[str] | None: ...
    def wait(self) -> int: ...


class Place(Protocol):
    """A machine that a worker can be started on."""

    name: str
    """Name of the host in its trials; empty for this machine."""

    def start(self, job: Job, log: BinaryIO, say: Callable[[str], None]) -> Worker:
        """Start a worker whose standard error goes to `log`. Raises `Error` if it cannot start."""


class Here:
    """This machine as a place."""

    name = ""

    def start(self, job: Job, log: BinaryIO, say: Callable[[str], None]) -> Worker:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "testbed.campaigns.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert worker.stdin is not None
        with suppress(BrokenPipeError):  # the worker has ended, and its exit status says why
            worker.stdin.write(json.dumps(asdict(job)) + "\n")
            worker.stdin.flush()
        return worker


HERE = (Here(),)


@dataclass
class Share:
    """The blocks that one place runs, and the state of its worker."""

    name: str
    place: Place | None
    """None: a host on which blocks were begun, and which is not among the hosts of this run."""
    job: Job
    stop: threading.Event = field(default_factory=threading.Event)
    """Set to end the worker."""
    working: bool = False
    """Whether the worker was started."""
    error: Error | None = None
    """Why the worker failed."""


def events_of(shares: list[Share]) -> Generator[tuple[Share, Event], None, None]:
    """Start the workers and yield their events as they arrive, each with its share.

    When the generator ends or is closed, the workers have ended.
    """
    inbox: SimpleQueue[tuple[Share, Event | BaseException]] = SimpleQueue()

    def attend(share: Share) -> None:
        try:
            for event in _attend(share, lambda text: inbox.put((share, _step(text)))):
                inbox.put((share, event))
            inbox.put((share, {"event": "end"}))
        except BaseException as e:
            inbox.put((share, e))

    threads = [threading.Thread(target=attend, args=(share,), daemon=True) for share in shares]
    for thread in threads:
        thread.start()
    running = len(threads)
    try:
        while running:
            share, event = inbox.get()
            if isinstance(event, BaseException):
                running -= 1
                if not isinstance(event, Error):
                    raise event
                share.error = share.error or event
                yield share, {"event": "failed"}
            elif event["event"] == "end":
                running -= 1
            elif share.error is None:
                yield share, event
    finally:
        for share in shares:
            share.stop.set()
        for share, thread in zip(shares, threads, strict=True):
            if share.working:  # a worker that was not started has nothing to take down
                _join(thread)


def _step(text: str) -> Event:
    return {"event": "step", "text": text}


def _join(thread: threading.Thread) -> None:
    """Wait for a worker to take its pods down, also if the user presses Ctrl-C again."""
    while thread.is_alive():
        with suppress(KeyboardInterrupt):
            thread.join()


def _attend(share: Share, say: Callable[[str], None]) -> Iterator[Event]:
    """Start the worker of a share and yield its events. At the end the worker has ended.

    Its standard error goes to `worker.log` in the campaign's directory, or `worker-HOST.log`.
    """
    if share.place is None:
        raise Error(
            f"blocks were begun on {share.name}, which is not among the hosts of this run",
            f"--on {share.name}",
        )
    log = Path(share.job.directory, f"worker-{share.name}.log" if share.name else "worker.log")
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        complaints = log.open("wb")
    except OSError as e:
        raise Error(f"cannot write {log}: {e.strerror}", "choose a directory with --out") from e
    with complaints:
        worker = share.place.start(share.job, complaints, say)
        share.working = True
        assert worker.stdin is not None
        assert worker.stdout is not None
        beat = threading.Thread(target=_beat, args=(worker.stdin, share.stop), daemon=True)
        beat.start()
        try:
            for line in worker.stdout:
                event = json.loads(line)
                if event["event"] == "error":
                    where = f"{share.name}: " if share.name else ""
                    raise Error(f"{where}{event['message']}", event["hint"])
                yield event
        finally:
            share.stop.set()
            beat.join()
            status = worker.wait()
            worker.stdout.close()
    if status:
        again = f"testbed run --resume {share.job.directory}"
        last = log.read_text(errors="replace").strip().rpartition("\n")[2] or "it said nothing"
        if status < 0 and share.name:
            raise Error(f"lost the link to {share.name}", f"continue with {again}")
        where = f"the worker on {share.name}" if share.name else "the worker"
        raise Error(
            f"{where} ended with status {status}: {last}", f"see {log}; then go on with {again}"
        )


def _beat(orders: IO[str], stop: threading.Event) -> None:
    """Send a heartbeat (an empty line) to a worker every `BEAT_S` until `stop` is set."""
    with suppress(OSError):
        while not stop.wait(BEAT_S):
            orders.write("\n")
            orders.flush()
    with suppress(OSError):
        orders.close()
