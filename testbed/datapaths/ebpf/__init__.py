"""What the datapaths made of eBPF share in user space."""
