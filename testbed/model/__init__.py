"""Frozen data that every layer knows: errors, terms, addresses, cells, trials, manifests."""
