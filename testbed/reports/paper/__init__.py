"""The paper: numbers and tables from a campaign, and LaTeX."""
