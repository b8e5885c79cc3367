"""Frozen data types that all layers use: errors, terms, addresses, cells, trials, manifests."""
