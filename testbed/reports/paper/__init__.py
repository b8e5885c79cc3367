"""The paper: numbers and tables of a campaign as LaTeX, and running LaTeX."""
