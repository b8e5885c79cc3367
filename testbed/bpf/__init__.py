"""eBPF programs: compiled once per host and content, loaded once, run where datapaths say.

`bytecode` compiles, `programs` has what the kernel holds, `hooks` attaches, `syscall` is bpf(2).
"""

from testbed.bpf.bytecode import SOURCES, compile, entries, headers, source
from testbed.bpf.hooks import (
    EGRESS,
    INGRESS,
    Place,
    attach_cgroup,
    attach_tc,
    has_tcx,
    replace_tc,
    running_tc,
)
from testbed.bpf.programs import PINS, ProgramSet, load, load_traced
from testbed.bpf.syscall import Map, run

__all__ = [
    "EGRESS",
    "INGRESS",
    "PINS",
    "SOURCES",
    "Map",
    "Place",
    "ProgramSet",
    "attach_cgroup",
    "attach_tc",
    "compile",
    "entries",
    "has_tcx",
    "headers",
    "load",
    "load_traced",
    "replace_tc",
    "run",
    "running_tc",
    "source",
]
