"""Virtual machines on QEMU: the common part of runtimes, command lines, choice of accelerator."""
