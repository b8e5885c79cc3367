"""Virtual machines: QEMU's command line, and which accelerator works here."""
