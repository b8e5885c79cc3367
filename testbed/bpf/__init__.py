"""Compiles, loads and attaches eBPF programs.

`bytecode` compiles them and caches the result, `programs` loads and pins them, `hooks` attaches
them to links and cgroups, `ring` reads ring buffers, `syscall` is bpf(2).
"""

from testbed.bpf.bytecode import compile, headers, reasons, refusing, source
from testbed.bpf.hooks import (
    EGRESS,
    INGRESS,
    attach_cgroup,
    attach_tc,
    attach_tcx,
    attached_tc,
    detach_tcx,
    has_tcx,
    replace_tc,
    running_tc,
    runs_by_tcx,
    runs_in_cgroup,
)
from testbed.bpf.programs import PINS, ProgramSet, load, load_traced, own_rows
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
    "attached_tc",
    "compile",
    "detach_tcx",
    "has_tcx",
    "headers",
    "load",
    "load_traced",
    "own_rows",
    "reasons",
    "refusing",
    "replace_tc",
    "run",
    "running_tc",
    "runs_by_tcx",
    "runs_in_cgroup",
    "source",
]
