"""Pods: links and workloads, the supervisor process of each pod, and the client of its socket."""
