"""Guests' images, composed from prebuilt kernels, programs of this machine and hosts files."""
