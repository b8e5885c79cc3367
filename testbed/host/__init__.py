"""Access to this machine: namespaces, links, cgroups, processes, nftables, ledger of resources."""
