"""Figures of a campaign, one file per kind of figure."""
