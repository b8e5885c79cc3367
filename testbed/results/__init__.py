"""Stored campaigns and the statistics of their trials."""
