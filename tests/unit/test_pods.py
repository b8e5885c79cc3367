"""Which pods there are."""

from __future__ import annotations

import secrets
import socket

from testbed.pods import control


def test_a_pod_is_there_while_its_supervisor_listens_and_not_while_it_says_its_last_words() -> None:
    name = f"t{secrets.token_hex(3)}"
    with socket.socket(socket.AF_UNIX) as asking:
        with socket.socket(socket.AF_UNIX) as supervisor:
            supervisor.bind(control.socket_name(name))
            assert name not in control.names()
            supervisor.listen()
            assert name in control.names()
            asking.connect(control.socket_name(name))
            asker, _ = supervisor.accept()
        with asker:
            assert name not in control.names()
