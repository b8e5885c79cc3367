"""This machine: namespaces, links, cgroups, processes, nftables, and a ledger of what was made."""
