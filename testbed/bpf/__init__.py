"""eBPF programs: compiled once per host and content, loaded once, run where datapaths say.

`bytecode` compiles, `programs` has what the kernel holds, `hooks` attaches, `syscall` is bpf(2).
"""

from testbed.bpf.bytecode import SOURCES, compile, headers, source
from testbed.bpf.hooks import EGRESS, INGRESS, attach_cgroup, attach_tc
from testbed.bpf.programs import PINS, ProgramSet, load
from testbed.bpf.syscall import Map, run

__all__ = [
    "EGRESS",
    "INGRESS",
    "PINS",
    "SOURCES",
    "Map",
    "ProgramSet",
    "attach_cgroup",
    "attach_tc",
    "compile",
    "headers",
    "load",
    "run",
    "source",
]
