"""Conformance suite: checks that a datapath's `localhost` behaves as programs expect.

Each check is one function. It uses a `bed.Bed`, with sockets that the traffic agents of workloads
hold, and runs through every pair, family and transport that it applies to and that the datapath
supports. The control is the kernel's own loopback, on which every check must pass. `check` defines
the data types, `checks` contains the checks, `runner` runs them, `output` and `archive` show the
results.
"""
