"""Campaigns: a plan's trials, run in random order by workers on this or other machines."""
