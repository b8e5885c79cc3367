# SPDX-License-Identifier: Apache-2.0
"""The traffic agent in Python, for WebAssembly: the orders and the traffic of the C agent.

componentize-py makes a WASI component of it. It runs as plain Python too: `python -m agent.python`.
The modules have the names of the C files that they mirror; `loop` stands for the threads there.

WASI has sockets and poll(), but no threads: everything that may wait is a generator that yields
what it waits for, and one loop resumes those that can go on. Not here: UDP streams down. What WASI
has no call for (an option, a flag, closing by reset) fails with ENOPROTOOPT or EOPNOTSUPP, as on a
kernel that lacks it. Every socket has to be closed: the destructor of a socket that is left open
ends the component.
"""
