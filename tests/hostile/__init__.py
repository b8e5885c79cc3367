"""Attempts to break in or to do harm: a file per adversary (docs/security.md)."""
