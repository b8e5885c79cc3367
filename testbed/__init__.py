"""Testbed for one `localhost` shared by containers, unikernels and WASM workloads of a pod."""

__version__ = "0.1.0"
