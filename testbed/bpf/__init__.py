"""eBPF programs: compiled once per host and content, loaded once, run where datapaths say.

`bytecode` compiles, `programs` has what the kernel holds, `hooks` attaches, `syscall` is bpf(2).
"""

from testbed.bpf.bytecode import compile, headers, reasons, source
from testbed.bpf.hooks import (
    EGRESS,
    INGRESS,
    attach_cgroup,
    attach_tc,
    attach_tcx,
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
    "Map",
    "ProgramSet",
    "attach_cgroup",
    "attach_tc",
    "attach_tcx",
    "compile",
    "has_tcx",
    "headers",
    "load",
    "load_traced",
    "reasons",
    "replace_tc",
    "run",
    "running_tc",
    "source",
]
