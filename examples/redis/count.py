"""Counts in Redis at localhost, forever: count.py KEY. Plain Python, run as a WASI component."""

import socket
import sys
import time


def ask(connection: socket.socket, *words: str) -> str:
    """A command and its one-line answer, in Redis' protocol (RESP)."""
    parts = "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
    connection.sendall(f"*{len(words)}\r\n{parts}".encode())
    return connection.recv(1000).decode().strip()


while True:
    try:
        with socket.create_connection(("localhost", 6379)) as redis:
            while True:
                print(ask(redis, "INCR", sys.argv[1]), flush=True)
                time.sleep(0.2)
    except OSError as e:
        print("no Redis yet:", e, flush=True)
        time.sleep(0.1)
