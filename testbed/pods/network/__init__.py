"""The node's network: pods' addresses on it, their way out, and DNS for guests."""
