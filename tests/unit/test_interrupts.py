"""Signals interrupt a process once, and what it does then comes to its end."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.host import interrupts
from tests.children import ending

CLEANING = """if True:
    import sys, time
    from pathlib import Path
    from testbed.host import interrupts
    done = Path(sys.argv[1])
    with interrupts.once("patience"):
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("cleaning", flush=True)
            while not done.with_suffix(".go").exists():
                time.sleep(0.01)
            print("goes on", flush=True)
            done.write_text("cleaned")
"""


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_later_signals_only_say_that_cleaning_up_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    done, pipe = tmp_path / "done", subprocess.PIPE
    command = [sys.executable, "-c", CLEANING, str(done)]
    with ending(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)) as child:
        assert child.stdout
        assert child.stderr
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        assert child.stdout.readline() == "cleaning\n"
        for later in interrupts.SIGNALS:
            child.send_signal(later)
            assert child.stderr.readline() == "patience\n"
        done.with_suffix(".go").touch()
        child.wait()
    assert done.read_text() == "cleaned"


def test_a_terminal_that_is_gone_is_no_error(tmp_path: Path) -> None:
    done = tmp_path / "done"
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-c", CLEANING, str(done)])
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    done.with_suffix(".go").touch()
    os.waitpid(pid, 0)
    assert done.read_text() == "cleaned"


def test_what_is_ignored_stays_so() -> None:
    """As of a background job of a script, or after nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.once("patience"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
