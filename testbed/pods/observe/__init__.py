"""Observes a running pod: traffic rates by pair, and traces of packets."""
