"""What a program may rely on at `localhost`: one check per function, of any datapath.

A check is written once against a `bed.Bed`, with sockets that a workload's agent holds, and
runs through every pair, family and transport that it is about and the datapath claims. On the
kernel's own loopback each must pass: that is the control. `check` has the words of checks, `checks`
the checks, `runner` runs them, `output` and `archive` show what came of it.
"""
