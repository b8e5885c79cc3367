"""Connects to every port of its arguments at localhost, in both families, over and over."""

import socket
import sys
import time

while True:
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        for port in sys.argv[1:]:
            with socket.socket(family) as dialing:
                try:
                    dialing.connect((address, int(port)))
                    answer = "connected"
                except OSError as e:
                    answer = e.strerror
                print(address, port, answer, flush=True)
    time.sleep(0.1)
