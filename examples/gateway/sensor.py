"""A temperature sensor that tells the broker at localhost what it measures: 20 to 30 °C."""

import itertools
import socket
import time

READINGS = itertools.cycle([*range(20, 30), *range(30, 20, -1)])

while True:
    try:
        with socket.create_connection(("localhost", 6379)) as broker:
            for celsius in READINGS:
                broker.sendall(f"SET temperature {celsius}\r\n".encode())
                broker.recv(100)
                time.sleep(0.1)
    except OSError as e:
        print("no broker yet:", e, flush=True)
        time.sleep(0.1)
