"""Reports on a stored campaign: tables, figures, HTML, claims, comparison, the paper."""
