# SPDX-License-Identifier: Apache-2.0
"""The traffic agent in Python, for WebAssembly: same orders and same traffic as the C agent.

componentize-py makes a WASI component of it. It also runs as plain Python, by
`python -m agent.python`. Modules are named after the C files that they mirror; `loop` replaces the
threads.

WASI has sockets and poll(), but no threads. So each function that may wait is a generator that
yields what it waits for, and one loop resumes those that can go on.

UDP streams down are not implemented, nor requests at a given rate: poll() waits for whole
milliseconds, so that they would not leave when they are due. Calls that WASI lacks (an option, a
flag, closing by reset) fail with ENOPROTOOPT or EOPNOTSUPP, as on a kernel without them. All
sockets have to be closed: the destructor of a socket that is left open ends the component.
"""
