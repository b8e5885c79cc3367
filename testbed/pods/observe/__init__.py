"""What a standing pod does: its traffic by pair, and the path of each packet."""
