"""Composes images of guests and root file systems of containers, and finds guests' kernels."""
