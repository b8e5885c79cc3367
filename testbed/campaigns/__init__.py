"""Campaigns: workers run the trials of a plan in random order, on this machine or on others."""
