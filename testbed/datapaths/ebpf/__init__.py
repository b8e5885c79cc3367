"""User-space part that the eBPF datapaths share: attachment, maps, setup of `lo`."""
