"""What people read of a stored campaign: tables, figures, pages, claims, the paper."""
