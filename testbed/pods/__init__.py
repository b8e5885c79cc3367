"""Pods: their links and workloads, the supervisor process of each, and who talks to it."""
